"""Hires-fix: a second pass at a larger size, from the latents or the picture of the first."""

import dataclasses
import io
import json

import jax
import numpy as np
import pytest
import torch
from PIL import Image

from sdjax import Request
from sdjax.cli.job import check_of
from sdjax.config import TINY, UNetConfig
from sdjax.diffusion.names import UPSCALER_NAMES, UPSCALERS, upscaler_of
from sdjax.diffusion.upscale import LATENT_UPSCALERS, PICTURE_UPSCALERS, covering, upscaled_latents, upscaled_picture
from sdjax.jobs.job_file import read_lines
from sdjax.load import library_of
from sdjax.models.params import random_params
from sdjax.pipeline.batching import Waiting
from sdjax.pipeline.pipeline import Pipeline
from sdjax.pipeline.programs import programs
from sdjax.pipeline.recipe import Recipe, recipe_of
from sdjax.request import check_request, second_pass
from tests.small import MINI, mini

TORCH = {
    "latent": dict(mode="bilinear"),
    "latent_antialiased": dict(mode="bilinear", antialias=True),
    "latent_bicubic": dict(mode="bicubic"),
    "latent_bicubic_antialiased": dict(mode="bicubic", antialias=True),
    "latent_nearest": dict(mode="nearest"),
    "latent_nearest_exact": dict(mode="nearest-exact"),
}


# Upscalers


@pytest.mark.parametrize("size", [(24, 16), (18, 12), (21, 14), (15, 10), (12, 8)])
@pytest.mark.parametrize("upscaler", LATENT_UPSCALERS)
def test_latents_are_enlarged_as_torch_does(upscaler, size):
    latents = np.random.default_rng(0).normal(size=(8, 12, 4)).astype(np.float32)
    channels_first = torch.tensor(latents).permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(channels_first, size=size[::-1], **TORCH[upscaler])[0]
    found = upscaled_latents(latents, size, upscaler)
    np.testing.assert_allclose(found, expected.permute(1, 2, 0), atol=1e-5)


def test_another_shape_is_covered_and_its_centre_kept():
    assert covering((8, 12), (16, 16)) == (16, 24)
    latents = np.arange(8 * 12, dtype=np.float32).reshape(12, 8, 1)
    whole = upscaled_latents(latents, (16, 24), "latent_nearest")
    np.testing.assert_array_equal(upscaled_latents(latents, (16, 16), "latent_nearest"), whole[4:20])
    picture = Image.fromarray(np.arange(96, dtype=np.uint8).reshape(12, 8)).convert("RGB")
    found = upscaled_picture(picture, (16, 16), "nearest")
    np.testing.assert_array_equal(found, np.asarray(picture.resize((16, 24), Image.Resampling.NEAREST))[4:20])


def test_upscalers_are_understood_as_a1111_spells_them():
    assert {upscaler_of(spelled) for spelled in UPSCALER_NAMES.values()} == set(UPSCALERS)
    assert upscaler_of("None") == "lanczos"
    assert Request("a", hires_upscaler="Latent (bicubic)").hires_upscaler == "latent_bicubic"


# Pictures

EIGHT = dict(seed=3, steps=3)


def test_the_second_pass_is_image_to_image_of_the_enlarged_picture():
    first = mini().text_to_image("red disc", **EIGHT)[0]
    larger = upscaled_picture(first, (16, 16), "bicubic")
    expected = mini().image_to_image("red disc", larger, seed=3, steps=8, strength=0.5, width=16, height=16)[0]
    hires = dict(hires_scale=2, hires_upscaler="bicubic", hires_steps=4, hires_strength=0.5)
    found = mini().text_to_image("red disc", **EIGHT, **hires)[0]
    assert found.size == (16, 16)
    np.testing.assert_array_equal(found, expected)


def test_without_strength_the_second_pass_is_the_enlargement_alone():
    hires = dict(hires_scale=2, hires_strength=0.0, hires_upscaler="lanczos")
    found = mini().text_to_image("red disc", **EIGHT, **hires)[0]
    first = upscaled_picture(mini().text_to_image("red disc", **EIGHT)[0], (16, 16), "lanczos")
    expected = mini().image_to_image("red disc", first, seed=3, strength=0.0, width=16, height=16)[0]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("upscaler", ["latent", "lanczos"])
def test_every_picture_of_a_mixed_batch_is_the_one_made_alone(upscaler):
    """More of them than places, with and without a second pass, of two sizes."""
    plain = [Request("red disc", seed=seed, steps=2 + seed % 2) for seed in range(3)]
    twice = [
        Request("blue disc", seed=seed, steps=2, hires_scale=scale, hires_steps=1 + seed % 3, hires_upscaler=upscaler)
        for scale in (2, 3)
        for seed in range(3)
    ]
    requests = [one for pair in zip(plain * 2, twice, strict=True) for one in pair]
    made = list(mini().batch(requests, batch_size=2))
    assert sorted(id(request) for request, _ in made) == sorted(map(id, requests))
    for request, picture in made:
        (_, alone), *_ = mini().batch([request], batch_size=2)
        assert picture.size == ((request.hires_scale or 1) * 8,) * 2
        assert np.abs(np.asarray(picture, int) - np.asarray(alone, int)).max() <= 1


def test_another_upscaler_strength_or_sampler_compiles_nothing():
    def made(**settings):
        mini().text_to_image("red disc", hires_scale=2, steps=2, **settings)

    made()
    made(hires_upscaler="lanczos")  # which encodes
    known = [programs(mini().config, mini().placement)[i].program for i in (0, 2, 3, 5)]
    before = [program._cache_size() for program in known]
    for settings in (
        dict(hires_upscaler="nearest", hires_strength=0.3),
        dict(hires_sampler="Euler a Karras", hires_steps=5),
        dict(hires_prompt="blue square", hires_guidance=2.0, hires_spacing="beta"),
        dict(sampler="heun", hires_sampler="euler_cfg_pp", hires_upscaler="latent_antialiased"),
    ):
        made(**settings)
    assert [program._cache_size() for program in known] == before


def test_its_own_steps_are_those_that_run():
    """As in A1111: the schedule has steps / strength steps, of which the last run."""
    resolved = check_request(Request("a", steps=20, hires_scale=2, hires_steps=15, hires_strength=0.7), MINI, "mini")
    second = second_pass(resolved, MINI)
    assert (second.request.steps, second.steps) == (21, 15)
    assert (second.request.width, second.request.height) == (16, 16)


def test_what_is_not_said_is_as_in_the_first_pass():
    request = Request("a", steps=9, sampler="euler", s_churn=2.0, guidance=3, hires_size="24x16", hires_strength=1.0)
    second = second_pass(check_request(request, MINI, "mini"), MINI).request
    for name in ("prompt", "sampler", "spacing", "s_churn", "guidance", "steps", "seed"):
        assert getattr(second, name) == getattr(check_request(request, MINI, "mini"), name)
    assert (second.width, second.height) == (24, 16)
    other = dataclasses.replace(request, hires_sampler="unipc")  # which has no churn
    assert second_pass(check_request(other, MINI, "mini"), MINI).request.s_churn == 0.0


def test_schedules_in_the_prompt_go_on_in_the_second_pass():
    """Fractions from 1 to 2 are of the second pass (A1111)."""
    hires = dict(hires_scale=2, hires_steps=4, steps=2, seed=1, hires_upscaler="latent")

    def made(prompt, **more):
        return np.asarray(mini().text_to_image(prompt, **hires, **more)[0])

    np.testing.assert_array_equal(made("[red:blue:1.0] disc"), made("red disc", hires_prompt="blue disc"))
    assert not np.array_equal(made("[red:blue:1.6] disc"), made("[red:blue:1.0] disc"))
    np.testing.assert_array_equal(made("[red:blue:2.0] disc"), made("red disc"))


def test_what_came_out_as_nan_is_not_hidden_by_bytes():
    params = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), mini().params["unet"])
    broken = dataclasses.replace(mini(), params={**mini().params, "unet": params})
    for upscaler in ("latent", "lanczos"):
        with pytest.raises(FloatingPointError, match="seed 3 came out as NaN"):
            broken.text_to_image("red disc", hires_scale=2, hires_strength=0.0, hires_upscaler=upscaler, **EIGHT)


def test_an_inpainting_model_has_second_passes_too():
    unet = dataclasses.replace(MINI.unet, in_channels=9)
    assert isinstance(unet, UNetConfig)
    config = dataclasses.replace(MINI, unet=unet)
    pipe = Pipeline(config, random_params(config), mini().tokenizer, "nine")
    assert pipe.text_to_image("red disc", hires_scale=2, steps=2)[0].size == (16, 16)


def test_second_passes_that_wait_keep_further_requests_out():
    @dataclasses.dataclass
    class One:
        shape: str
        plan = dataclasses.make_dataclass("Plan", [("calls", int)])(1)

    taken = []
    waiting = Waiting((taken.append(i) or One("first") for i in range(100)), bound=4)
    for _ in range(3):
        waiting.add(One("second"))
    assert waiting.next_shape(3) == "second"
    assert len(waiting.take("first", 4)) == 1
    assert len(taken) == 1


# What is said of it


def test_the_recipe_says_the_size_of_the_first_pass_and_makes_the_same_picture():
    request = Request("red disc", seed=3, steps=2, hires_size="16x24", hires_upscaler="latent_bicubic", hires_steps=3)
    (_, picture), *_ = mini().batch([request])
    sampling, size = mini().config.sampling, mini().config.image_size
    recipe = recipe_of(request, sampling, picture, model="", dtype="float32", image_size=size)
    assert (recipe.width, recipe.height, picture.size) == (8, 8, (16, 24))
    again = Recipe.from_json(recipe.to_json())
    values = {name: getattr(again, name) for name in again.settings if name != "strength"}
    (_, found), *_ = mini().batch([Request(**values)])
    np.testing.assert_array_equal(found, picture)


def test_the_text_for_other_tools_has_their_labels():
    request = Request("a", hires_scale=1.5, hires_strength=0.4, hires_sampler="euler_a", hires_prompt="b, c: d")
    text = recipe_of(request, MINI.sampling, Image.new("RGB", (12, 12)), model="", dtype="", image_size=8).parameters()
    for said in (
        "Size: 8x8",
        "Hires upscale: 1.5",
        "Denoising strength: 0.4",
        "Hires sampler: Euler a",
        'Hires prompt: "b, c: d"',
    ):
        assert said in text
    plain = recipe_of(Request("a"), MINI.sampling, Image.new("RGB", (8, 8)), model="", dtype="").parameters()
    assert "Hires" not in plain


def test_lines_of_jobs_may_have_second_passes():
    line = {"prompt": "a", "hr_scale": 2, "hr_upscaler": "Latent", "hires_sampler": "DPM++ 2M Karras"}
    (found,) = read_lines(io.BytesIO(json.dumps(line).encode()), ".jsonl", {})
    assert (found.request.hires_scale, found.request.hires_upscaler) == (2, "latent")
    assert (found.request.hires_sampler, found.request.hires_spacing) == ("dpmpp_2m", "karras")


def test_adapters_of_the_second_pass_are_looked_for_before_anything_runs():
    check = check_of("", MINI, library_of(None))
    check(Request("a", hires_scale=2, hires_prompt="b"))
    with pytest.raises(FileNotFoundError, match="the adapter 'ink' is not there"):
        check(Request("a", hires_scale=2, hires_prompt="b <lora:ink:1>"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(hires_steps=5), "hires_steps is of a second pass; give hires_scale or hires_size too"),
        (dict(hires_scale=2, hires_size="16x16"), "hires_scale and hires_size say the same; give one of them"),
        (dict(hires_scale=0.5), r"hires_scale must be in \[1, 16\], found 0.5"),
        (dict(hires_size="large"), "hires_size must be WIDTHxHEIGHT such as 1024x1024, found 'large'"),
        (
            dict(hires_size="8x16", width=16, height=16),
            "in the second pass the picture would be 8x16, smaller than in the first, 16x16",
        ),
        (dict(hires_scale=16, width=8000, height=8000), "a picture can be up to 16383 pixels"),
        (dict(hires_scale=2, hires_sampler="eular"), "hires_sampler must be .*; nearest to it is euler"),
        (dict(hires_scale=2, hires_upscaler="R-ESRGAN 4x+"), "hires_upscaler must be one of latent, .*found 'R-ESRGAN"),
        (dict(hires_scale=2, hires_strength=1.5), r"hires_strength must be in \[0, 1\]"),
    ],
)
def test_a_second_pass_that_cannot_be_is_one_clear_error(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        mini().text_to_image("a", **settings)
    assert "\n" not in str(caught.value)


def test_a_size_that_is_no_multiple_of_the_cell_is_named():
    with pytest.raises(
        ValueError, match="in the second pass width and height must be multiples of 8, found 100x64; try"
    ):
        check_request(Request("a", hires_size="100x64"), TINY, "tiny")
    second = second_pass(check_request(Request("a", hires_scale=1.7), TINY, "tiny"), TINY)
    assert second.request.width == int(TINY.image_size * 1.7) // 8 * 8, "cut to whole cells, as in A1111"


def test_a_second_pass_is_for_pictures_from_a_prompt_alone():
    with pytest.raises(ValueError, match="hires_scale is for pictures from a prompt alone"):
        mini().image_to_image("a", Image.new("RGB", (8, 8)), hires_scale=2)


def test_pictures_have_upscalers_of_their_own():
    assert set(PICTURE_UPSCALERS) | set(LATENT_UPSCALERS) == set(UPSCALERS)
