"""The command line, as a person uses it: results, recipes, and one line for every mistake."""

import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdjax import cli
from sdjax.config import BOX
from sdjax.models.params import random_params
from sdjax.pipeline.recipe import read_recipe
from sdjax.storage import checkpoint
from tests.children import interruptible
from tests.small import SMALL

STEPS = ["--steps", "2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "small"
    checkpoint.save(path, SMALL, random_params(SMALL))
    return str(path)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def photo(here):
    pixels = np.random.default_rng(0).integers(0, 255, (30, 45, 3), np.uint8)
    Image.fromarray(pixels).save(here / "photo.png")
    mask = np.zeros((30, 45), np.uint8)
    mask[5:25, 10:40] = 255
    Image.fromarray(mask).save(here / "mask.png")
    return here / "photo.png"


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def fails(capsys, *arguments):
    """The one line that a wrong command ends in."""
    assert cli.main(list(arguments)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sdjax: error:")]
    assert len(lines) == 1
    return lines[0]


def test_text_to_image_and_its_recipe(model, here, capsys):
    arguments = [
        "txt2img",
        "red heart",
        "-o",
        "heart.png",
        "--model",
        model,
        *STEPS,
        "--seed",
        "3",
        "--negative-prompt",
        "blue",
    ]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.strip() == "heart.png"
    recipe = read_recipe("heart.png")
    assert (recipe.prompt, recipe.negative_prompt, recipe.seed, recipe.width) == ("red heart", "blue", 3, 32)
    assert cli.main(["txt2img", "--recipe", "heart.png", "-o", "again.png"]) == 0
    assert Path("again.png").read_bytes() == Path("heart.png").read_bytes()
    assert cli.main(["txt2img", "--recipe", "heart.png", "-o", "other.png", "--seed", "4"]) == 0
    assert read_recipe("other.png").seed == 4
    assert (pixels("other.png") != pixels("heart.png")).any()
    assert cli.main(["info", "heart.png"]) == 0
    shown = capsys.readouterr().out
    assert "Negative prompt: blue\nSteps: 2, Sampler: DPM++ 2M" in shown
    assert recipe.to_json() in shown


def test_several_pictures_have_names_with_seeds(model, here, capsys):
    assert (
        cli.main(["txt2img", "Red heart!", "-o", "out", "--model", model, *STEPS, "--count", "2", "--seed", "5"]) == 0
    )
    assert sorted(os.listdir("out")) == ["red-heart-5.png", "red-heart-6.png"]
    assert cli.main(["txt2img", "x", "-o", "p.png", "--model", model, *STEPS, "--count", "2"]) == 0
    assert sorted(path.name for path in here.glob("p-*.png")) == ["p-0.png", "p-1.png"]


def test_image_to_image_and_its_recipe(model, photo, capsys):
    arguments = ["img2img", "a cat", str(photo), "-o", "cat.png", "--model", model, *STEPS, "--strength", "0.5"]
    assert cli.main(arguments) == 0
    assert pixels("cat.png").shape == (30, 45, 3)
    assert cli.main(["img2img", "--recipe", "cat.png", "-o", "again.png"]) == 0
    assert Path("again.png").read_bytes() == Path("cat.png").read_bytes()
    Image.new("RGB", (45, 30)).save(photo)
    assert "its contents changed" in fails(capsys, "img2img", "--recipe", "cat.png", "-o", "again.png")


def test_inpainting_keeps_what_is_not_masked(model, photo):
    assert cli.main(["inpaint", "a cat", str(photo), "mask.png", "-o", "cat.png", "--model", model, *STEPS]) == 0
    found, before, mask = pixels("cat.png"), pixels(photo), pixels("mask.png")[..., 0]
    np.testing.assert_array_equal(found[mask == 0], before[mask == 0])
    assert (found[mask == 255] != before[mask == 255]).any()
    assert cli.main(["inpaint", "--recipe", "cat.png", "-o", "again.png"]) == 0
    assert Path("again.png").read_bytes() == Path("cat.png").read_bytes()


def test_photographs_are_not_overwritten(model, photo, capsys):
    before = photo.read_bytes()
    arguments = ["img2img", "a cat", str(photo), "-o", str(photo), "--model", model, *STEPS]
    assert "was not made by sdjax" in fails(capsys, *arguments)
    assert photo.read_bytes() == before


def test_without_a_model_the_box_paints_with_its_own_settings(here, capsys):
    assert "no such folder" in fails(capsys, "txt2img", "x", "-o", "no/such/x.png")
    assert cli.main(["txt2img", "red heart", "-o", "h.png", "--steps", "2"]) == 0
    recipe = read_recipe("h.png")
    assert (recipe.width, recipe.height) == (64, 64)
    own = BOX.sampling
    assert (recipe.guidance, recipe.sampler, recipe.spacing) == (own.guidance, own.sampler, own.spacing)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["txt2img"], "a prompt is missing"),
        (["txt2img", "x", "-o", "x.bmp"], "expected a name that ends in .png, .webp"),
        (["txt2img", "x", "--size", "512"], "WIDTHxHEIGHT"),
        (["txt2img", "x", "--size", "13x16"], "multiples of 8"),
        (["txt2img", "x", "--steps", "0"], "steps must be"),
        (["txt2img", "x", "--count", "0"], "count must be 1 or more"),
        (["txt2img", "x", "--guidance", "nan"], "guidance must be a finite number"),
        (["txt2img", "x", "--sampler", "magic"], "sampler must be one of ddpm"),
        (["txt2img", "x", "--spacing", "magic"], "spacing must be one of leading"),
        (["txt2img", "x", "--eta", "0.5"], "eta must be left out for dpmpp_2m"),
        (["txt2img", "x", "--seed", "-2"], "seed must be"),
        (["txt2img", "x", "--clip-skip", "9"], "skip must lie in"),
        (["txt2img", "x", "--model", "nothing"], "no such file or folder"),
        (["txt2img", "x", "--dtype", "int8"], "dtype must be"),
        (["txt2img", "x", "--recipe", "mask.png"], "no recipe of sdjax"),
        (["txt2img", "x", "--recipe", "absent.png"], "no such picture"),
        (["img2img", "x"], "the image is missing"),
        (["img2img", "x", "absent.png"], "absent.png: no such picture file"),
        (["img2img", "x", "text.png"], "not a picture that can be read"),
        (["img2img", "x", "photo.png", "--strength", "1.5"], "strength must be in"),
        (["inpaint", "x", "photo.png"], "the mask is missing"),
        (["info", "photo.png"], "no recipe in this picture"),
        (["info", "nothing"], "no such file or folder"),
        (["info", "text.ckpt"], "text.ckpt: a text, not a checkpoint"),
    ],
)
def test_every_mistake_is_one_line_and_leaves_nothing(arguments, says, model, photo, capsys):
    Path("text.png").write_text("this is not a picture, just text")
    Path("text.ckpt").write_text("this is not a checkpoint, just text")
    before = sorted(os.listdir())
    if "--model" not in arguments and arguments[0] != "info":
        arguments = [*arguments, "--model", model]
    assert says in fails(capsys, *arguments)
    assert sorted(os.listdir()) == before


def test_info_describes_models(model, capsys):
    assert cli.main(["info", model]) == 0
    assert "model       small: 32x32 pixels, epsilon prediction" in capsys.readouterr().out


def test_interrupting_keeps_what_is_done(model, here):
    code = (
        "import sys, sdjax.pipeline.batching as b, sdjax.cli as c\n"
        "start = b.Batches._started\n"
        "def once(self, places):\n"
        "    if places[0].request.seed: print('started', flush=True); import time; time.sleep(60)\n"
        "    return start(self, places)\n"
        "b.Batches._started = once\n"
        f"sys.exit(c.main(['txt2img', 'x', '-o', 'out', '--model', {model!r}, '--steps', '1', '--count', '9']))\n"
    )
    process = subprocess.Popen(interruptible("-c", code), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.stdout.readline() != "started\n":
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in error
    assert len(os.listdir("out")) == 8
