"""Prompt travel: from one prompt to another, by the share that each has in what the UNet attends to."""

import dataclasses

import numpy as np
import pytest

from sdjax import cli
from sdjax.devices.compilation import compilations
from sdjax.jobs.grid import grid
from sdjax.models.params import random_params
from sdjax.pipeline.recipe import read_recipe
from sdjax.request import Request
from sdjax.storage import checkpoint
from sdjax.text.embeddings import Embedding
from sdjax.text.prompt import interpolated
from tests.small import MINI, mini

SETTINGS = dict(width=8, height=8, steps=3, guidance=4.0, sampler="euler", seed=3)
PAIRS = [
    ("red disc", "blue square"),
    ("(red:1.4) [disc]", "blue (square:0.6)"),
    ("(red)0.5 disc", "blue (square)1.3"),
    ("red disc", "blue square, " * 8),
    ("red disc " * 9, "blue"),
]


@pytest.fixture
def made(latents):
    def of(prompt, **settings):
        (found,) = latents(mini(), [Request(prompt, **(SETTINGS | settings), id="a")], 1).values()
        return found

    return of


@pytest.mark.parametrize("weighting", ["a1111", "comfy", "compel", "none"])
@pytest.mark.parametrize(("start", "end"), PAIRS)
def test_a_prompt_on_its_way_is_the_mean_of_both_encodings(made, start, end, weighting):
    first, last = mini().encode([start, end], weighting=weighting)
    for travel in (0.25, 0.7):
        expected = made(interpolated(first, last, travel))
        found = made(start, to_prompt=end, travel=travel, weighting=weighting)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
        assert np.abs(found - made(start, weighting=weighting)).max() > 1e-4
        assert np.abs(found - made(end, weighting=weighting)).max() > 1e-4


@pytest.mark.parametrize(("start", "end"), PAIRS)
def test_both_ends_are_the_prompts_themselves_to_the_bit(made, start, end):
    np.testing.assert_array_equal(made(start, to_prompt=end), made(start))
    np.testing.assert_array_equal(made(start, to_prompt=end, travel=1), made(end))


def test_the_negative_prompt_stays_where_it_is(made):
    first, last = mini().encode(["red disc", "blue square"])
    expected = made(interpolated(first, last, 0.5), negative_prompt="(green:1.2)")
    found = made("red disc", to_prompt="blue square", travel=0.5, negative_prompt="(green:1.2)")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_pictures_at_different_points_of_their_way_share_batches_and_compile_nothing(latents):
    pipe = mini()
    ends = ["", "blue square", "green", "orange disc"]
    requests = [
        Request("red disc", to_prompt=ends[i % 4], travel=(i / 8 if i % 4 else 0), **SETTINGS, id=str(i))
        for i in range(9)
    ]
    latents(pipe, requests[:1] * 1, 4)
    with compilations() as found:
        together = latents(pipe, requests, 4)
    assert not found
    for one in requests:
        (alone,) = latents(pipe, [one], 1).values()
        np.testing.assert_allclose(together[one.id], alone, rtol=0, atol=1e-5 * np.abs(alone).max())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(travel=0.5), "travel must be 0 without a to_prompt to go to, found 0.5"),
        (dict(travel=1.5, to_prompt="b"), "travel must be in \\[0, 1\\], found 1.5"),
        (dict(to_prompt=3), "to_prompt must be a string, found 3"),
        (dict(to_prompt="a AND b"), "'a AND b' is no single text: travel takes no schedule, AND or <lora:...>"),
        (dict(to_prompt="[a:b:3]"), "is no single text"),
        (dict(to_prompt="b <lora:x:1>"), "is no single text"),
        (dict(to_prompt="b", prompt="[a|b]"), "'\\[a|b\\]' is no single text: travel takes no schedule, AND$"),
        (dict(to_prompt="b", prompt="a AND c"), "is no single text"),
        (dict(to_prompt='("a", "b").and()', weighting="compel"), "is no single text"),
        (dict(to_prompt="b", prompt=np.zeros((16, 16), np.float32)), "to_prompt goes with a prompt that is text"),
    ],
)
def test_a_way_that_cannot_be_gone_is_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        mini().text_to_image(**({"prompt": "a"} | SETTINGS | settings))


def test_learnt_words_at_the_end_of_the_way_are_in_the_recipe(tmp_path):
    pipe = mini()
    (tmp_path / "word.pt").touch()
    vectors = np.asarray(pipe.params["text"]["token_embedding"])[:2]
    learnt = pipe.words.with_embeddings([Embedding("green", vectors, str(tmp_path / "word.pt"))]).learnt
    pipe = dataclasses.replace(pipe, embeddings=learnt)
    used = pipe.files_of(Request("red", to_prompt="green", travel=0.5))["embeddings"]
    assert list(used) == [str(tmp_path / "word.pt")]
    assert not pipe.files_of(Request("red"))["embeddings"]


def test_a_way_is_an_axis_of_a_grid():
    sheet = grid(mini(), "red disc", x=("travel", [0.0, 0.5, 1.0]), to_prompt="blue square", steps=2)
    assert sheet.width > 3 * 96


def test_the_command_goes_there_and_the_recipe_comes_back(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    mini().tokenizer.engine.save("tokenizer.json")
    checkpoint.save(tmp_path / "mini", MINI, random_params(MINI), tokenizer=tmp_path, one_file=True)
    command = ["txt2img", "red", "--model", "mini", "--steps", "2", "--to-prompt", "blue, bright", "--travel", "0.5"]
    assert cli.main([*command, "-o", "a.png"]) == 0
    recipe = read_recipe("a.png")
    assert (recipe.to_prompt, recipe.travel) == ("blue, bright", 0.5)
    assert 'To prompt: "blue, bright", Travel: 0.5' in recipe.parameters()
    assert cli.main(["txt2img", "--recipe", "a.png", "-o", "b.png"]) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert cli.main(["txt2img", "red", "--model", "mini", "--steps", "2", "-o", "c.png"]) == 0
    assert "ravel" not in read_recipe("c.png").parameters()
    capsys.readouterr()
    assert cli.main(["txt2img", "red", "--model", "mini", "--travel", "0.5"]) == 2
    assert "travel must be 0 without a to_prompt" in capsys.readouterr().err
