"""Variations of a seed, and the noise of a picture of another size: A1111's rules, in every place that settings go."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from sdjax import cli
from sdjax.diffusion.noise import SOURCES, centred, picture_noise, slerp
from sdjax.jobs.job_file import Line, from_json, read_lines, to_json
from sdjax.pipeline.recipe import Recipe, read_parameters, read_recipe
from sdjax.request import Request, numbered, requests_for, seeds_of
from tests.small import MINI, mini

SIZE = dict(width=8, height=8, steps=2)
SHAPE = (6, 9, 4)  # h, w, c


def lines(text, kind=".jsonl"):
    return list(read_lines(io.BytesIO(text.encode()), kind, {}))


# Noise


def theirs(share, low, high):
    """Spherical interpolation along the first axis after the channels, as A1111 has it, by PyTorch in float64."""
    low, high = torch.tensor(low, dtype=torch.float64), torch.tensor(high, dtype=torch.float64)
    omega = torch.acos(torch.nn.functional.cosine_similarity(low, high, dim=1))
    a, b = (torch.sin(part * omega) / torch.sin(omega) for part in (1 - share, share))
    return (a[:, None] * low + b[:, None] * high).numpy()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("source", SOURCES)
def test_a_variation_lies_on_the_sphere_between_two_noises(source, share):
    first, second = (picture_noise(source, seed, SHAPE)[0].transpose(2, 0, 1) for seed in (3, 4))
    found, added = picture_noise(source, 3, SHAPE, variation=(4, share))
    assert added is None
    np.testing.assert_allclose(found.transpose(2, 0, 1), theirs(share, first, second), atol=1e-5)


def test_a_variation_is_unit_normal_noise_as_an_average_would_not_be():
    first, second = (SOURCES["torch"](seed).randn((4, 64, 64)) for seed in (3, 4))
    assert abs(slerp(0.5, first, second).std() - 1) < 0.02
    assert abs((0.5 * first + 0.5 * second).std() - 0.707) < 0.02


def test_noises_without_an_angle_are_joined_by_a_straight_line():
    noise = SOURCES["torch"](3).randn((4, 8, 8))
    np.testing.assert_allclose(slerp(0.3, noise, noise), noise, atol=1e-6)
    flat, other = (SOURCES["torch"](seed).randn((4, 1, 8)) for seed in (3, 4))  # one cell high: all angles 0 or pi
    np.testing.assert_allclose(slerp(0.25, flat, other), 0.75 * flat + 0.25 * other, atol=1e-6)
    assert np.isfinite(slerp(0.5, noise, -noise)).all()


@pytest.mark.parametrize(
    ("inner", "expected"),
    [
        ((2, 2), ["0000", "0110", "0220", "0000"]),
        ((4, 2), ["0110", "0220", "0330", "0440"]),
        ((4, 4), ["1111", "2222", "3333", "4444"]),
        ((8, 2), ["0330", "0440", "0550", "0660"]),
        ((1, 1), ["0000", "0100", "0000", "0000"]),
        ((7, 3), ["3330", "4440", "5550", "0000"]),
    ],
)
def test_noise_of_another_size_takes_the_middle(inner, expected):
    """Row i of the other has the number i. Of 7 rows on 4 A1111 takes 3, from the third on: floor(-3 / 2) = -2."""
    rows = np.tile(np.arange(1.0, inner[0] + 1)[None, :, None], (1, 1, inner[1]))
    found = centred(rows, np.zeros((1, 4, 4)))
    assert ["".join(f"{value:.0f}" for value in row) for row in found[0]] == expected


@pytest.mark.parametrize("of_size", [(4, 5), (10, 7), (6, 3), (16, 16)])
def test_noise_of_another_size_is_drawn_in_the_order_of_other_tools(of_size):
    """The other size by a generator of its own; this size, and then the sampler's noise, by the picture's."""
    adds = np.array([True, False, True])
    found, added = picture_noise("torch", 3, SHAPE, of_size=of_size, variation=(4, 0.2), adds=adds)
    height, width, channels = SHAPE
    own = torch.Generator().manual_seed(3)
    inner = [torch.randn((channels, *of_size), generator=torch.Generator().manual_seed(s)).numpy() for s in (3, 4)]
    expected = torch.randn((channels, height, width), generator=own).numpy()
    middle = theirs(0.2, *inner)
    dy, dx = (height - of_size[0]) // 2, (width - of_size[1]) // 2
    for y in range(height):
        for x in range(width):
            inside = 0 <= y - dy < of_size[0] and 0 <= x - dx < of_size[1]
            odd = (dy < 0 and y >= of_size[0] + 2 * dy) or (dx < 0 and x >= of_size[1] + 2 * dx)
            if inside and not odd:
                expected[:, y, x] = middle[:, y - dy, x - dx]
    np.testing.assert_allclose(found.transpose(2, 0, 1), expected, atol=1e-5)
    for row, taken in zip(added, adds, strict=True):
        drawn = torch.randn((channels, height, width), generator=own).numpy() if taken else np.zeros(1)
        np.testing.assert_allclose(row, drawn.transpose(1, 2, 0) if taken else 0 * row, atol=1e-6)


# Pictures


def picture(**settings):
    return np.asarray(mini().text_to_image("red disc", **(SIZE | settings))[0]).astype(int)


@pytest.mark.parametrize("noise", SOURCES)
@pytest.mark.parametrize("sampler", ["euler", "euler_a"])
def test_strength_goes_from_one_seeds_picture_to_the_others(noise, sampler):
    named = dict(noise=noise, sampler=sampler, variation_seed=9)
    plain = picture(noise=noise, sampler=sampler, seed=3)
    assert np.array_equal(picture(seed=3, variation_strength=0, **named), plain)
    assert np.abs(picture(seed=3, variation_strength=1e-4, **named) - plain).max() <= 2
    half = picture(seed=3, variation_strength=0.5, **named)
    assert np.abs(half - plain).max() > 8
    if sampler == "euler":  # what the sampler adds stays that of the seed
        other = picture(noise=noise, sampler=sampler, seed=9)
        assert np.abs(picture(seed=3, variation_strength=1, **named) - other).max() <= 1
        assert np.abs(half - other).max() > 8


@pytest.mark.parametrize("noise", SOURCES)
def test_the_own_size_as_seed_size_changes_nothing_and_another_does(noise):
    plain = picture(noise=noise, seed=3)
    assert np.abs(picture(noise=noise, seed=3, seed_size="8x8") - plain).max() <= 1
    assert np.abs(picture(noise=noise, seed=3, seed_size="4x6") - plain).max() > 8


def test_a_picture_from_a_picture_is_varied_too():
    image = Image.fromarray(np.full((8, 8, 3), 90, np.uint8))
    named = dict(seed=3, steps=2, strength=0.9, noise="torch")
    pictures = [
        np.asarray(mini().image_to_image("red disc", image, **named, **more)[0]).astype(int)
        for more in ({}, dict(variation_seed=4, variation_strength=0.5), dict(seed_size="4x4"))
    ]
    assert np.abs(pictures[0] - pictures[1]).max() > 2
    assert np.abs(pictures[0] - pictures[2]).max() > 2


def test_variations_in_a_batch_are_those_made_alone():
    requests = [
        Request("red disc", seed=3, noise=noise, sampler="lcm", **SIZE, **more)
        for noise in SOURCES
        for more in (dict(variation_seed=5, variation_strength=0.2), dict(seed_size="6x4"), {})
    ]
    alone = [np.asarray(mini().text_to_image("red disc", **asked(one))[0]).astype(int) for one in requests]
    together = {id(request): np.asarray(made) for request, made in mini().batch(requests, batch_size=4)}
    for request, one in zip(requests, alone, strict=True):
        assert np.abs(together[id(request)] - one).max() <= 1


def asked(request):
    names = ("seed", "noise", "sampler", "variation_seed", "variation_strength", "seed_size", *SIZE)
    return {name: getattr(request, name) for name in names}


# Several of them


def test_with_a_strength_the_variation_counts_up_and_the_seed_stays():
    several = requests_for(["a", "b"], count=2, seed=5, variation_seed=7, variation_strength=0.1)
    assert [(one.prompt, one.seed, one.variation_seed) for one in several] == [
        *(("a", 5, 7), ("a", 5, 8), ("b", 5, 7), ("b", 5, 8)),
    ]
    plain = requests_for("a", count=2, seed=5, variation_seed=7)
    assert [(one.seed, one.variation_seed) for one in plain] == [(5, 7), (6, 7)]
    assert [seeds_of(one) for one in (*several, *plain)] == ["5-7", "5-8", "5-7", "5-8", "5", "6"]
    assert numbered(several[0], 1) == several[1]


def test_names_of_other_tools_are_understood():
    assert Request("a", subseed=3, subseed_strength=0.5) == Request("a", variation_seed=3, variation_strength=0.5)


def test_variation_seed_minus_one_is_a_random_one_that_is_written_down():
    found = {Request("a", variation_seed=-1, variation_strength=0.5).variation_seed for _ in range(4)}
    assert len(found) == 4
    with pytest.warns(UserWarning, match="variation_seed -1 stands for a random one, which is"):
        first, second = requests_for("a", count=2, seed=1, variation_seed=-1, variation_strength=0.5)
    assert second.variation_seed == first.variation_seed + 1
    text = '{"prompt": "a", "seed": -1, "variation_seed": -1, "variation_strength": 0.5}\n'
    (line,), (again,) = lines(text), lines(text)
    assert line == again, "a job that is read again is the same job"
    assert line.request.seed != line.request.variation_seed


def test_lines_of_a_job_say_it_and_their_pictures_have_names_of_their_own():
    text = (
        '{"prompt": "a", "id": "x", "seed": 5, "subseed": 7, "subseed_strength": 0.1, "count": 2, "seed_size": "8x6"}\n'
    )
    (line,) = lines(text + '{"prompt": "a", "id": "y", "seed": 5, "noise": "torch-cuda", "count": 2}\n')[:1]
    assert isinstance(line, Line)
    assert [line.name(j) for j in range(2)] == ["x-5-7", "x-5-8"]
    assert from_json(to_json(line)) == line
    taken = lines(text + '{"prompt": "b", "id": "x-5-8"}\n')[1]
    assert "the id 'x-5-8' is taken" in taken.reason
    header = "prompt,seed,variation_seed,variation_strength,seed_size,noise\n"
    (line,) = lines(header + "a,5,7,0.25,8x6,torch-cuda\n", ".csv")
    found = line.request
    assert (found.variation_seed, found.variation_strength, found.seed_size) == (7, 0.25, "8x6")
    assert found.noise == "torch-cuda"
    assert from_json(to_json(line)) == line


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to write into, and the small model instead of any other."""
    from sdjax.cli import generate

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generate, "load_model", lambda *args, on_config, **named: on_config(MINI) or mini())
    return tmp_path


ASKED = ["txt2img", "red disc", "--size", "8x8", "--steps", "2", "--seed", "5", "--sampler", "euler_a"]


def test_the_command_line_makes_them_and_their_recipes_make_them_again(folder):
    more = ["--noise", "torch-cuda", "--variation-seed", "7", "--variation-strength", "0.2", "--seed-size", "4x6"]
    assert cli.main([*ASKED, *more, "--count", "2", "-o", "a.png"]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["a-5-7.png", "a-5-8.png"]
    recipe = read_recipe("a-5-8.png")
    assert (recipe.seed, recipe.variation_seed, recipe.variation_strength) == (5, 8, 0.2)
    assert (recipe.noise, recipe.seed_size) == ("torch-cuda", "4x6")
    said = read_parameters("a-5-8.png")
    assert "Variation seed: 8, Variation seed strength: 0.2, Seed resize from: 4x6" in said
    assert cli.main(["txt2img", "--recipe", "a-5-8.png", "-o", "b.png"]) == 0
    first, again = Image.open("a-5-8.png"), Image.open("b.png")
    assert first.tobytes() == again.tobytes()
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_a_picture_that_is_no_variation_says_nothing_of_it(folder):
    assert cli.main([*ASKED, "-o", "a.png"]) == 0
    assert "ariation" not in read_parameters("a.png")
    assert "Seed resize" not in read_parameters("a.png")
    old = json.loads(read_recipe("a.png").to_json())
    for name in ("variation_seed", "variation_strength", "seed_size"):
        del old[name]
    assert Recipe.from_json(json.dumps(old)) == read_recipe("a.png")


# What cannot be


BAD = [
    (dict(variation_strength=0.5), "variation_strength needs a variation_seed: a whole number, or -1 for a random one"),
    (dict(variation_strength=1.5, variation_seed=1), r"variation_strength must be in \[0, 1\], found 1.5"),
    (dict(variation_seed=2**32), r"variation_seed must be a whole number in \[0, 2\^32\), or -1"),
    (dict(variation_seed=2**32 - 1, variation_strength=0.5, count=2), r"variation_seed must be a whole number in \[0,"),
    (dict(seed_size="big"), "seed_size must be WIDTHxHEIGHT such as 512x768, in pixels, up to 16383, found 'big'"),
    (dict(seed_size="0x8"), "seed_size must be WIDTHxHEIGHT"),
    (dict(seed_size="99999x8"), "seed_size must be WIDTHxHEIGHT"),
    (dict(seed_size=(8, 8)), "seed_size must be WIDTHxHEIGHT"),
    (dict(noise="cuda"), "noise must be one of jax, torch, torch-cuda, or an array, found 'cuda'"),
]
ARRAY = np.zeros((1, 8, 8, 4), np.float32)
BAD_IN_PYTHON = [
    (dict(noise=ARRAY, variation_seed=1, variation_strength=0.5), "variation_strength is for the noise of seeds"),
    (dict(noise=ARRAY, seed_size="8x8"), "seed_size is for the noise of seeds, and noise is given as an array"),
]


@pytest.mark.parametrize(("settings", "says"), BAD + BAD_IN_PYTHON)
def test_what_cannot_be_is_one_clear_error(settings, says):
    with pytest.raises(ValueError, match=says):
        mini().text_to_image("red disc", **SIZE, **settings)


@pytest.mark.parametrize(("settings", "says"), BAD)
def test_a_line_that_cannot_be_is_named(settings, says):
    (rejected,) = lines(json.dumps({"prompt": "a", **settings}))
    with pytest.raises(ValueError, match=says):
        raise ValueError(rejected.reason)


def test_a_size_between_the_cells_of_the_latent_is_refused():
    import dataclasses

    config = dataclasses.replace(MINI, vae=dataclasses.replace(MINI.vae, channels=(8, 8)))
    from sdjax.request import check_request

    with pytest.raises(ValueError, match="seed_size must be multiples of 2, found 8x5"):
        check_request(Request("a", seed_size="8x5"), config, "mini")


def test_the_command_line_refuses_it_before_a_model_is_loaded(capsys):
    assert cli.main([*ASKED, "--variation-strength", "0.5"]) != 0
    assert "variation_strength needs a variation_seed" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*ASKED, "--noise", "cuda"])
    assert "torch-cuda" in capsys.readouterr().err
