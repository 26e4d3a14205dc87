"""Differential masks: a pixel of value m is free in the last fraction m of the steps, and its neighbours in theirs."""

import dataclasses
from itertools import pairwise

import jax
import numpy as np
import pytest
from PIL import Image

from sdjax.config import ScheduleConfig
from sdjax.devices.compilation import compilations
from sdjax.diffusion.denoiser import keep_known
from sdjax.diffusion.plan import make_plan, stack_plans, thresholds
from sdjax.diffusion.sample import first_state, image_keys, sample
from sdjax.diffusion.samplers import SAMPLERS
from sdjax.diffusion.schedule import noise_schedule
from sdjax.models.params import random_params
from sdjax.pipeline.pipeline import Pipeline
from sdjax.request import Request
from tests.small import MINI, mini

RNG = np.random.default_rng(0)
PHOTO = Image.fromarray(RNG.integers(0, 255, (16, 16, 3), np.uint8))
KNOWN = RNG.normal(size=(6, 7, 4)).astype(np.float32)
NOISE = RNG.normal(size=(6, 7, 4)).astype(np.float32)
STEPS = 5
MAP = RNG.choice([0, 0.1, 0.2, 0.39, 0.4, 0.41, 0.8, 1], size=(6, 7, 1)).astype(np.float32)
SCHEDULE = noise_schedule(ScheduleConfig())
DIFFERENTIAL = dict(soft_mask="differential")


def plan_of(sampler="euler", steps=STEPS, strength=1.0, soft_mask="differential"):
    return make_plan(
        ScheduleConfig(),
        steps=steps,
        sampler=sampler,
        spacing="karras",
        eta=None,
        strength=strength,
        guidance=1.0,
        guidance_rescale=0.0,
        guidance_interval=(0.0, 1.0),
        soft_mask=soft_mask,
    )


def grey(value, size=(16, 16)):
    return Image.new("L", size, value)


def believed(x, sigma):
    """What a model might believe; works on numpy and JAX."""
    return x / (1 + sigma**2) + 0.3 * (x - x**2 / (4 + sigma**2 + x**2))


def make_denoiser(params, given, index):
    known, mask = given

    def denoise(x, level):
        return believed(x, level.sigma[:, None, None, None])

    return keep_known(denoise, known, mask)


def run(plans, masks):
    rows, calls = stack_plans(plans)
    sigma = rows.levels.sigma[:, 0, None, None, None]
    state = first_state(
        rows, calls, KNOWN + sigma * NOISE, image_keys(range(len(plans))), (np.stack([KNOWN] * len(plans)), masks)
    )
    return np.asarray(jax.jit(sample, static_argnums=0)(make_denoiser, (), state).carry.x)


def by_hand(sigmas, held, picture_mask):
    """Euler's method, pixel by pixel in float64 (Levin & Fried 2023, algorithm 1).

    held: (mask, step) -> whether the pixel is that of the known picture in this step.
    """
    x = KNOWN.astype(np.float64) + sigmas[0] * NOISE
    for i, (sigma, after) in enumerate(pairwise(sigmas)):
        for y, z in np.ndindex(x.shape[:2]):
            if held(picture_mask[y, z, 0], i):
                x[y, z] = KNOWN[y, z] + after * (x[y, z] - KNOWN[y, z]) / sigma
            else:
                x[y, z] += (after - sigma) * (x[y, z] - believed(x[y, z], sigma)) / sigma
    return x


def test_the_steps_that_are_left_decide_which_pixels_are_free():
    expected = by_hand(SCHEDULE.levels(STEPS, "karras"), lambda m, i: m < np.float32((STEPS - i) / STEPS), MAP)
    np.testing.assert_allclose(run([plan_of()], MAP[None])[0], expected, rtol=2e-4, atol=2e-5)


def test_at_less_strength_they_are_those_that_run():
    sigmas = SCHEDULE.levels(10, "karras")[6:]
    expected = by_hand(sigmas, lambda m, i: m < np.float32((4 - i) / 4), MAP)
    np.testing.assert_allclose(run([plan_of(steps=10, strength=0.4)], MAP[None])[0], expected, rtol=2e-4, atol=2e-5)


def test_what_differs_from_the_rule_shows():
    """The comparison above can fail: with another rule, pixels of one value at least come out otherwise."""
    sigmas, found = SCHEDULE.levels(STEPS, "karras"), run([plan_of()], MAP[None])[0]
    for held in (lambda m, i: m <= (STEPS - i) / STEPS, lambda m, i: m < (STEPS - 1 - i) / (STEPS - 1)):
        assert np.abs(found - by_hand(sigmas, held, MAP)).max() > 1e-2


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_call_of_a_step_has_its_threshold(sampler):
    sigmas = SCHEDULE.levels(6, "karras")
    plan = plan_of(sampler, steps=6)
    found = plan.rows.levels.threshold
    own = found[: plan.calls]
    assert (found[plan.calls :] == -1).all()
    assert sorted(set(own), reverse=True) == pytest.approx([1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert (np.diff(own) <= 0).all()
    calls = {11: [2, 2, 2, 2, 2, 1], 7: [2, 1, 1, 1, 1, 1], 15: [3, 3, 3, 3, 2, 1]}.get(plan.calls, [1] * 6)
    np.testing.assert_allclose(own, np.repeat(np.arange(6, 0, -1) / 6, calls))
    assert (plan_of(sampler, steps=6, soft_mask="blend").rows.levels.threshold == -1).all()
    np.testing.assert_array_equal(thresholds(sigmas[:-1], sigmas), np.arange(6, 0, -1) / 6)


def test_levels_that_no_call_visits_begin_where_they_are_passed():
    assert thresholds(np.array([9.0, 5.0, 2.0]), np.array([9.0, 6.0, 3.0, 0.0])).tolist() == [1, 2 / 3, 1 / 3]
    again = np.array([9.0, 6.0, 9.0, 6.0, 3.0])  # back to more noise and down again: the last visit counts
    assert thresholds(again, np.array([9.0, 6.0, 3.0, 0.0])).tolist() == [1, 1, 1, 2 / 3, 1 / 3]


def test_both_kinds_of_masks_share_a_batch():
    plans = [plan_of(), plan_of(soft_mask="blend"), plan_of("heun")]
    together = run(plans, np.stack([MAP] * 3))
    for i, plan in enumerate(plans):
        np.testing.assert_allclose(together[i], run([plan], MAP[None])[0], rtol=1e-5, atol=1e-6)
    assert np.abs(together[0] - together[1]).max() > 0.01


# Pictures


def pixels(pictures):
    return np.asarray(pictures[0], np.int16)


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "euler_a"])
def test_a_white_map_is_image_to_image(sampler, strength):
    settings = dict(sampler=sampler, strength=strength, steps=4)
    found = mini().inpaint("red disc", PHOTO, grey(255), **DIFFERENTIAL, **settings)
    assert np.array_equal(pixels(found), pixels(mini().image_to_image("red disc", PHOTO, **settings)))


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "dpmpp_sde"])
def test_a_map_of_black_and_white_is_a_mask(sampler):
    mask = grey(0)
    mask.paste(255, (3, 2, 12, 9))
    settings = dict(sampler=sampler, steps=4, guidance=3.0)
    found = mini().inpaint("red disc", PHOTO, mask, **DIFFERENTIAL, **settings)
    assert np.array_equal(pixels(found), pixels(mini().inpaint("red disc", PHOTO, mask, **settings)))


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm2"])
def test_a_grey_map_is_image_to_image_at_that_strength(sampler):
    settings = dict(sampler=sampler, steps=8)
    found = mini().inpaint("red disc", PHOTO, grey(128), **DIFFERENTIAL, **settings)
    expected = mini().image_to_image("red disc", PHOTO, strength=0.5, **settings)
    assert np.abs(pixels(found) - pixels(expected)).max() <= 1
    assert np.abs(pixels(found) - pixels(mini().inpaint("red disc", PHOTO, grey(128), **settings))).max() > 1


def test_where_the_map_is_black_the_picture_stays_to_the_byte():
    ramp = np.tile(np.linspace(0, 255, 16).astype(np.uint8), (16, 1))
    ramp[:, :4] = 0
    found = pixels(mini().inpaint("red disc", PHOTO, Image.fromarray(ramp), steps=8, **DIFFERENTIAL))
    assert np.array_equal(found[:, :4], np.asarray(PHOTO)[:, :4])
    assert (found[:, 8:] != np.asarray(PHOTO)[:, 8:]).any()


def test_another_kind_of_mask_compiles_nothing():
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, 16).astype(np.uint8), (16, 1)))
    common = dict(image=PHOTO, mask=ramp, steps=4)
    first = [Request("a", image=PHOTO, mask=ramp, steps=1 + i % 2) for i in range(5)]  # places are taken anew
    list(mini().batch(first, batch_size=2))
    with compilations() as seconds:
        kinds = [
            Request("a", **common, **DIFFERENTIAL),
            Request("b", **common),
            Request("a", image=PHOTO, outpaint="left=4", width=16, height=16, steps=5, sampler="heun"),
            Request("a", **common, feather=3, strength=0.5),
            Request("a", **common, only_masked=2, width=16, height=16),
        ]
        assert len(list(mini().batch(kinds, batch_size=2))) == 5
    assert not seconds


def test_a_model_that_sees_the_mask_refuses_differential_masks():
    nine = dataclasses.replace(MINI, unet=dataclasses.replace(MINI.unet, in_channels=9))
    pipe = Pipeline(nine, random_params(nine), mini().tokenizer, "nine")
    with pytest.raises(
        ValueError, match="nine is an inpainting model, which sees the mask in black and white; soft_mask"
    ):
        pipe.inpaint("a", PHOTO, grey(128), soft_mask="differential")
