"""Tiled pictures: convolutions see the opposite border beyond each border, so a picture repeats without a seam."""

import dataclasses
import io
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from PIL import Image

from sdjax import cli
from sdjax.config import BOX, SD15, ModelConfig, tiled
from sdjax.devices.compilation import compilations
from sdjax.jobs.forms import entries
from sdjax.load import load
from sdjax.models.layers import CPU_FEW_POSITIONS, Conv
from sdjax.models.params import random_params
from sdjax.models.unet import UNet
from sdjax.models.vae import VAE
from sdjax.pipeline.recipe import read_recipe
from sdjax.request import Request, check_request, size_of
from sdjax.storage import checkpoint
from tests.arrays import normal
from tests.small import MINI, SMALL, mini

SETTINGS = dict(width=16, height=16, steps=3, guidance=4.0, sampler="euler", seed=3)


# Networks


@pytest.mark.parametrize("height", [8, 28], ids=["few positions", "many"])
@pytest.mark.parametrize(("size", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (1, 1, 0), (5, 1, 2)])
def test_a_wrapped_convolution_is_pytorchs_circular_one(size, stride, padding, height):
    x, kernel, bias = normal(0, 2, height, 10, 5), normal(1, size, size, 5, 7), normal(2, 7)
    assert (2 * height * 10 <= CPU_FEW_POSITIONS) == (height == 8)
    theirs = torch.nn.Conv2d(5, 7, size, stride, padding, padding_mode="circular")
    with torch.no_grad():
        theirs.weight.copy_(torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy()))
        theirs.bias.copy_(torch.from_numpy(bias))
        expected = theirs(torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
    conv = Conv(7, size, stride, (padding, padding), wrap=True)
    found = conv.apply({"params": dict(kernel=kernel, bias=bias)}, x)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    if size > 1:
        plain = dataclasses.replace(conv, wrap=False).apply({"params": dict(kernel=kernel, bias=bias)}, x)
        assert np.abs(plain - expected).max() > 0.1


def rolled(x, cells):
    return np.roll(np.asarray(x), cells, (1, 2))


@pytest.mark.parametrize("cells", [(2, 0), (0, 4), (6, 2)])
def test_the_unet_of_rolled_latents_is_rolled(cells):
    """By multiples of its coarsest cell, which is 2 latents here."""
    config = tiled(SMALL).unet
    unet, params = UNet(config), random_params(SMALL)["unet"]
    x, t, context = normal(0, 1, 8, 12, 4), np.array([500]), normal(1, 1, 7, 64)
    apply = jax.jit(lambda x: unet.apply({"params": params}, x, t, context))
    found, expected = apply(rolled(x, cells)), rolled(apply(x), cells)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    zeros = UNet(SMALL.unet)
    plain = zeros.apply({"params": params}, x, t, context)
    other = zeros.apply({"params": params}, rolled(x, cells), t, context)
    assert np.abs(other - rolled(plain, cells)).max() > 1e-2 * np.abs(expected).max(), "without wrapping they are not"


@pytest.mark.parametrize("method", ["decode", "encode"])
def test_the_autoencoder_of_what_is_rolled_is_rolled(method):
    vae, params, scale = VAE(tiled(SMALL).vae), random_params(SMALL)["vae"], SMALL.vae.downscale
    x = normal(0, 1, 3, 4, 4) if method == "decode" else normal(0, 1, 24, 32, 3)
    before, after = (1, scale) if method == "decode" else (scale, 1)

    def apply(x):
        found = vae.apply({"params": params}, x, method=method)
        return np.asarray(found if method == "decode" else found.mean)

    found, expected = apply(rolled(x, (before, 2 * before))), rolled(apply(x), (after, 2 * after))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


# Configuration


def test_configurations_say_it_only_where_it_is_not_the_usual():
    for config in (MINI, BOX, SD15):
        assert "padding" not in json.loads(config.to_json())["unet"]
        assert "padding" not in json.loads(config.to_json())["vae"]
        again = ModelConfig.from_json(tiled(config).to_json())
        assert again == tiled(config) != config
        assert again.unet.wraps
        assert again.vae.wraps


# Pictures


@pytest.fixture
def made(latents):
    def of(prompt="red disc", pipe=None, **settings):
        (found,) = latents(pipe or mini(), [Request(prompt, **(SETTINGS | settings), id="a")], 1).values()
        return found

    return of


def test_a_tiled_picture_of_rolled_noise_is_rolled(made):
    noise = normal(0, 16, 16, 4)
    found = made(tiling=True, noise=np.roll(noise, (5, 3), (0, 1)))
    expected = np.roll(made(tiling=True, noise=noise), (5, 3), (0, 1))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    other = made(noise=np.roll(noise, (5, 3), (0, 1)))
    assert np.abs(other - np.roll(made(noise=noise), (5, 3), (0, 1))).max() > 1e-2


def test_pictures_that_are_not_tiled_are_as_they_were_next_to_those_that_are(latents):
    pipe = mini()
    requests = [Request("red disc", **SETTINGS | dict(seed=i), tiling=i % 2 == 1, id=str(i)) for i in range(6)]
    together = latents(pipe, requests, 3)
    for one in requests:
        (alone,) = latents(pipe, [one], 3).values()
        np.testing.assert_array_equal(together[one.id], alone)
    plain = latents(pipe, [dataclasses.replace(one, tiling=False) for one in requests], 3)
    same = [np.array_equal(together[str(i)], plain[str(i)]) for i in range(6)]
    assert same == [True, False] * 3


def test_each_kind_compiles_once_and_the_text_for_both(latents):
    pipe = mini()
    size = dict(width=24, height=8)
    latents(pipe, [Request("red", **SETTINGS | size, id="a")], 2)
    with compilations() as found:
        latents(pipe, [Request("red", **SETTINGS | size, tiling=True, id="a")], 2)
    assert sorted(name.split("(")[0] for name in found)
    assert not any("condition" in name or "initial" in name for name in found), list(found)
    with compilations() as found:
        for tiling in (True, False):
            latents(pipe, [Request("blue", **SETTINGS | size | dict(steps=5), tiling=tiling, id="a")], 2)
    assert not found


def seam(picture):
    """The mean jump across the borders, relative to that between neighbours inside; across rows and columns."""
    found = []
    for axis in (0, 1):
        lines = np.moveaxis(np.asarray(picture, np.float64), axis, 0)
        found.append(np.abs(lines[0] - lines[-1]).mean() / np.abs(np.diff(lines, axis=0)).mean())
    return found


def test_a_tiled_picture_jumps_no_more_at_its_border_than_inside():
    """Of the model in the box. A part that is cut out of the middle of the same picture does jump."""
    pictures = load().text_to_image(["bricks", "fireworks"], steps=12, count=2, tiling=True)
    assert np.mean([seam(picture) for picture in pictures]) < 1
    assert np.mean([seam(picture.crop((0, 0, 40, 40))) for picture in pictures]) > 2


def test_image_to_image_and_inpainting_are_tiled_too():
    pipe = mini()
    noise = np.random.default_rng(0)
    photo = Image.fromarray(noise.integers(0, 255, (16, 16, 3), np.uint8))
    mask = np.zeros((16, 16), np.uint8)
    mask[:, :6] = 255
    rolls = 5, 3

    def turned(picture):
        return Image.fromarray(np.roll(np.asarray(picture), rolls, (0, 1)))

    start = normal(1, 1, 16, 16, 4)
    keys = dict(steps=3, strength=0.7, seed=1)
    for tiling, close in ((True, True), (False, False)):
        options = keys | dict(tiling=tiling)
        (one,) = pipe.image_to_image("red", photo, noise=start, **options)
        (other,) = pipe.image_to_image("red", turned(photo), noise=np.roll(start, rolls, (1, 2)), **options)
        difference = np.abs(np.asarray(turned(one), int) - np.asarray(other, int)).max()
        assert (difference <= 1) == close, difference
        (one,) = pipe.inpaint("red", photo, Image.fromarray(mask), noise=start, **options)
        rolled_mask = turned(Image.fromarray(mask))
        (other,) = pipe.inpaint("red", turned(photo), rolled_mask, noise=np.roll(start, rolls, (1, 2)), **options)
        difference = np.abs(np.asarray(turned(one), int) - np.asarray(other, int)).max()
        assert (difference <= 1) == close, difference


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(width=24, height=16, tiling=True), "the sides of a tiled picture must be multiples of 16, found 24"),
        (dict(tiling="yes"), "tiling must be true or false, found 'yes'"),
        (dict(tiling=1), "tiling must be true or false, found 1"),
    ],
)
def test_what_cannot_be_tiled_is_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        check_request(Request("a", **settings), SMALL, "small")


def test_a_picture_without_a_size_is_worked_on_at_one_that_can_be_tiled():
    assert size_of(Request("a", tiling=True), SMALL, (42, 75)) == (48, 80)
    assert size_of(Request("a"), SMALL, (42, 75)) == (40, 72)


# A flag, wherever settings are given


def test_a_flag_is_said_in_every_form():
    for text, kind, expected in (
        ('{"prompt": "a", "tiling": true}', ".jsonl", True),
        ("prompt,tiling\na,yes\n", ".csv", True),
        ("prompt;tiling\na;FALSE\n", ".csv", False),
        ("--prompt a --tiling", ".txt", True),
        ("--tiling --prompt a", ".txt", True),
        ("--tiling no --prompt a", ".txt", False),
        ("prompt,tiling\na,perhaps\n", ".csv", "perhaps"),
    ):
        (entry,) = entries(io.StringIO(text), kind)
        assert entry.fields["tiling"] == expected


def test_the_command_tiles_and_the_recipe_comes_back(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    mini().tokenizer.engine.save("tokenizer.json")
    checkpoint.save(tmp_path / "mini", MINI, random_params(MINI), tokenizer=tmp_path, one_file=True)
    command = ["txt2img", "red", "--model", "mini", "--steps", "2", "--size", "16x16"]
    assert cli.main([*command, "--tiling", "-o", "a.png"]) == 0
    assert read_recipe("a.png").tiling is True
    assert ", Tiling: True" in read_recipe("a.png").parameters()
    assert cli.main(["txt2img", "--recipe", "a.png", "-o", "b.png"]) == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    assert cli.main(["txt2img", "--recipe", "a.png", "--no-tiling", "-o", "c.png"]) == 0
    assert cli.main([*command, "-o", "d.png"]) == 0
    assert Path("c.png").read_bytes() == Path("d.png").read_bytes() != Path("a.png").read_bytes()
    assert "Tiling" not in read_recipe("d.png").parameters()
    capsys.readouterr()
    assert cli.main(["grid", "red", "--model", "mini", "--steps", "1", "--x", "tiling=yes,no", "-o", "grid"]) == 0
    assert read_recipe("grid/x1.png").tiling is True
    assert cli.main(["grid", "red", "--model", "mini", "--steps", "1", "--x", "tiling=yes,maybe", "-o", "g"]) == 2
    assert "tiling must be true or false, found 'maybe'" in capsys.readouterr().err
