"""The three tasks as a user calls them: what a picture may depend on, what stays untouched, and what is refused.

The networks are the tiny preset's with fewer levels, so that programs compile in seconds.
"""

import dataclasses
import warnings
from functools import partial
from itertools import pairwise
from pathlib import Path

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

from sdjax import image as images
from sdjax.diffusion.plan import stack_plans
from sdjax.diffusion.sample import first_state, image_keys, initial_noise
from sdjax.diffusion.samplers import SAMPLERS
from sdjax.diffusion.schedule import noise_schedule, q_sample
from sdjax.models.adapters import NO_GATES
from sdjax.models.params import random_params
from sdjax.models.unet import UNet
from sdjax.models.vae import VAE
from sdjax.pipeline import functions
from sdjax.pipeline.pipeline import Pipeline
from sdjax.request import Request, plan
from sdjax.text.tokenizer import clip_tokenizer
from tests.small import SMALL

PHOTO = Path(__file__).parent / "data" / "astronaut.png"
SMALL_INPAINT = dataclasses.replace(SMALL, unet=dataclasses.replace(SMALL.unet, in_channels=9))
SIZE = dict(width=56, height=40)  # not square, an odd number of cells
FAST = dict(**SIZE, steps=4)
STREAMED = dict(**FAST, progress=lambda *step: None)  # shares its compiled step with `latents_of`


@pytest.fixture(scope="module")
def pipe():
    return Pipeline(SMALL, random_params(SMALL), clip_tokenizer(), "small")


@pytest.fixture(scope="module")
def inpaint_pipe():
    return Pipeline(SMALL_INPAINT, random_params(SMALL_INPAINT), clip_tokenizer(), "small-inpainting")


@pytest.fixture(scope="module")
def photo():
    return images.fit(images.load_image(PHOTO), (SIZE["width"], SIZE["height"]))


@pytest.fixture(scope="module")
def astronaut(pipe):
    """The picture of one prompt that many tests compare with."""
    (picture,) = pipe.text_to_image("an astronaut", seed=3, **FAST)
    return picture


def pixels(picture):
    return np.asarray(picture, np.int64)


def distance(first, second):
    """The mean absolute difference of two pictures, in steps of 1/255."""
    return np.abs(pixels(first) - pixels(second)).mean()


def latents_of(make, *args, **settings):
    """The final latents of every batch that `make` runs: the last x0_hat, as all samplers end at sigma = 0."""
    found = []

    def progress(done, total, x0_hat):
        if done == total:
            found.append(np.asarray(x0_hat))

    make(*args, **settings, progress=progress)
    return np.concatenate(found)


# Seeds, prompts and batches


def test_a_picture_depends_on_its_own_seed_alone(pipe):
    def latents(**settings):
        return latents_of(pipe.text_to_image, "an astronaut", sampler="euler_a", **settings, **FAST)

    alone = latents(seed=5, count=3, batch=1)
    assert alone.shape == (3, 5, 7, 4)
    assert np.abs(alone[0] - alone[1]).max() > 0.1
    in_batch = latents(seed=5, count=3, batch=2)[:3]  # the last batch is padded
    np.testing.assert_allclose(in_batch, alone, atol=1e-5 * np.abs(alone).max())
    elsewhere = latents(seed=4, count=2, batch=2)
    np.testing.assert_allclose(elsewhere[1], alone[0], atol=1e-5 * np.abs(alone).max())


def test_prompts_come_one_after_the_other_with_their_seeds_in_order(pipe):
    settings = dict(sampler="euler_a", batch=2, **FAST)
    together = latents_of(pipe.text_to_image, ["an astronaut", "a cat"], seed=5, count=2, **settings)
    astronauts = latents_of(pipe.text_to_image, "an astronaut", seed=5, count=2, **settings)
    cats = latents_of(pipe.text_to_image, ["a cat"], seed=5, count=2, **settings)
    assert np.abs(astronauts - cats).max() > 1e-3
    np.testing.assert_allclose(together, np.concatenate([astronauts, cats]), atol=1e-5 * np.abs(together).max())


def test_the_same_call_gives_the_same_picture(pipe, astronaut):
    assert distance(pipe.text_to_image("an astronaut", seed=3, **FAST)[0], astronaut) == 0
    assert distance(pipe.text_to_image("an astronaut", seed=4, **FAST)[0], astronaut) > 1
    assert astronaut.size == (56, 40)
    assert astronaut.mode == "RGB"


def test_the_negative_prompt_and_the_guidance_matter(pipe):
    plain = latents_of(pipe.text_to_image, "an astronaut", **FAST)
    assert np.abs(latents_of(pipe.text_to_image, "an astronaut", "a cat", **FAST) - plain).max() > 1e-3
    assert np.abs(latents_of(pipe.text_to_image, "an astronaut", guidance=20, **FAST) - plain).max() > 1e-3
    assert np.abs(latents_of(pipe.text_to_image, "an astronaut", guidance_rescale=1, **FAST) - plain).max() > 1e-3


def test_guidance_1_is_the_conditional_model(pipe):
    """Euler's loop on the network's own epsilon; and the same with guidance, where no step is in its interval."""
    settings = dict(sampler="euler", spacing="leading", **FAST)
    with warnings.catch_warnings(action="error"):  # the negative prompt is too long, and not even tokenized
        conditional = latents_of(pipe.text_to_image, "an astronaut", "cat " * 80, guidance=1, seed=2, **settings)
    off = latents_of(pipe.text_to_image, "an astronaut", "a cat", seed=2, guidance_interval=(0, 0), **settings)
    np.testing.assert_allclose(off, conditional, atol=1e-5 * np.abs(conditional).max())

    schedule = noise_schedule(SMALL.schedule)
    sigma = schedule.levels(4, "leading")
    ids = clip_tokenizer()(["an astronaut"])
    context = functions.encode_text(pipe.params["text"], ids, config=SMALL)
    unet = jax.jit(lambda x, t: UNet(SMALL.unet).apply({"params": pipe.params["unet"]}, x, t, context))
    keys = image_keys([2])
    x = initial_noise(keys, (5, 7, 4)) * np.float32(np.sqrt(sigma[0] ** 2 + 1))
    for now, after in pairwise(sigma):
        t = jnp.full((1,), schedule.timesteps(now), jnp.float32)
        x = x + np.float32(after - now) * unet(x * np.float32(1 / np.sqrt(now**2 + 1)), t)
    np.testing.assert_allclose(conditional, x, atol=1e-4 * np.abs(conditional).max())


def test_progress_sees_every_step_and_changes_nothing(pipe, astronaut):
    seen = []
    (picture,) = pipe.text_to_image(
        "an astronaut", seed=3, progress=lambda *step: seen.append((*step[:2], step[2].shape)), **FAST
    )
    assert seen == [(done, 4, (1, 5, 7, 4)) for done in (1, 2, 3, 4)]
    assert np.abs(pixels(picture) - pixels(astronaut)).max() <= 1


def test_no_word_of_a_long_prompt_is_lost(pipe):
    """Eighty words are two chunks, and the last five of them count."""
    (long,) = pipe.text_to_image("cat " * 80, **FAST)
    (other,) = pipe.text_to_image("cat " * 75 + "dog " * 5, **FAST)
    assert distance(long, other) > 0


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_makes_a_finite_picture_of_its_own_prompt(pipe, sampler):
    def latents(prompt):
        return latents_of(pipe.text_to_image, prompt, sampler=sampler, **FAST)

    found = latents("an astronaut")
    assert np.isfinite(found).all()
    assert found.std() > 0.05
    assert np.abs(latents("a cat") - found).max() > 1e-3


def test_eta_turns_ddim_into_ddpm(pipe):
    def latents(**settings):
        return latents_of(pipe.text_to_image, "an astronaut", **settings, **FAST)

    assert np.array_equal(latents(sampler="ddim", eta=1.0), latents(sampler="ddpm"))
    assert np.array_equal(latents(sampler="ddim", eta=0.0), latents(sampler="ddim"))
    assert not np.array_equal(latents(sampler="ddim", eta=0.5), latents(sampler="ddim"))


def test_noise_that_is_given_replaces_the_seeds(pipe, astronaut):
    own = np.asarray(initial_noise(image_keys([3]), (5, 7, 4)))
    (picture,) = pipe.text_to_image("an astronaut", seed=99, noise=own, **FAST)
    assert distance(picture, astronaut) == 0


def test_torch_noise_is_what_diffusers_starts_from(pipe):
    """A batch of seeds, one generator for each, as diffusers draws them."""
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    noise = torch.cat([torch.randn((1, 4, 5, 7), generator=generator) for generator in generators])
    settings = dict(count=2, sampler="euler", **FAST)
    expected = latents_of(pipe.text_to_image, "an astronaut", noise=noise.numpy().transpose(0, 2, 3, 1), **settings)
    found = latents_of(pipe.text_to_image, "an astronaut", noise="torch", seed=3, **settings)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_clip_skip_leaves_layers_out(pipe, astronaut):
    assert distance(pipe.text_to_image("an astronaut", seed=3, clip_skip=0, **FAST)[0], astronaut) == 0
    skipped = latents_of(pipe.text_to_image, "an astronaut", seed=3, clip_skip=1, **FAST)
    assert np.abs(skipped - latents_of(pipe.text_to_image, "an astronaut", seed=3, **FAST)).max() > 1e-4


# Image to image


def test_strength_0_is_the_round_trip_through_the_autoencoder(pipe, photo):
    (picture,) = pipe.image_to_image("an astronaut", photo, strength=0, **FAST)
    vae = VAE(SMALL.vae)
    array = np.asarray(photo, np.float32)[None] / 127.5 - 1
    mean = jax.jit(lambda params: vae.apply({"params": params}, array, method="encode").mean)(pipe.params["vae"])
    decoded = jax.jit(lambda params: vae.apply({"params": params}, mean, method="decode"))(pipe.params["vae"])
    expected = np.round(np.clip(np.asarray(decoded[0]) / 2 + 0.5, 0, 1) * 255)
    assert np.abs(pixels(picture) - expected).max() <= 1


def test_strength_1_is_text_to_image_from_the_same_noise(pipe, photo, astronaut):
    (picture,) = pipe.image_to_image("an astronaut", photo, strength=1, seed=3, **FAST)
    assert distance(picture, astronaut) == 0


def test_the_way_from_the_photograph_grows_with_strength(pipe, photo):
    known = functions.encode(pipe.params, jnp.asarray(images.to_array(photo))[None], config=SMALL)
    settings = dict(seed=3, guidance=2, sampler="ddim", steps=8, **SIZE)
    ways = [
        np.linalg.norm(latents_of(pipe.image_to_image, "a cat", photo, strength=strength, **settings) - known)
        for strength in (0.125, 0.25, 0.5, 0.75)
    ]
    assert ways[0] > 0
    assert ways == sorted(ways)


# Inpainting


def masks(width, height):
    """A hard square, and the same with soft edges."""
    y, x = np.mgrid[:height, :width]
    away = np.maximum(abs(x - width // 2), abs(y - height // 2))
    hard = (away < 10) * 255
    soft = np.clip((14 - away) / 8, 0, 1) * 255
    return {"hard": Image.fromarray(hard.astype(np.uint8)), "soft": Image.fromarray(soft.astype(np.uint8))}


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("model", ["pipe", "inpaint_pipe"])
def test_inpainting_leaves_every_unmasked_pixel_as_it_was(request, photo, model, kind):
    mask = masks(*photo.size)[kind]
    (picture,) = request.getfixturevalue(model).inpaint("a cat", photo, mask, **STREAMED)
    black = np.asarray(mask) == 0
    assert 0.1 < black.mean() < 0.9
    assert np.array_equal(pixels(picture)[black], pixels(photo)[black])
    assert np.abs(pixels(picture) - pixels(photo))[np.asarray(mask) == 255].mean() > 5


def test_the_known_region_is_held_in_the_latent_and_the_rest_is_regenerated(pipe, photo):
    mask = masks(*photo.size)["hard"]
    found = latents_of(pipe.inpaint, "a cat", photo, mask, **FAST)
    known = functions.encode(pipe.params, jnp.asarray(images.to_array(photo))[None], config=SMALL)
    small = np.asarray(mask)[::8, ::8] / 255
    np.testing.assert_allclose(found[0][small == 0], known[0][small == 0], atol=1e-5)
    assert np.abs(found[0] - known[0])[small == 1].max() > 0.1


def test_the_known_region_starts_at_the_noised_picture_and_the_rest_at_noise():
    rng = np.random.default_rng(0)
    known, noise = (rng.standard_normal((1, 5, 7, 4)).astype(np.float32) for _ in range(2))
    mask = rng.integers(0, 2, (1, 5, 7, 1)).astype(np.float32)
    schedule = noise_schedule(SMALL.schedule)
    sigma = np.float32(schedule.sigmas[999:])
    x = functions.start_from(noise, sigma, known, mask, np.array([True]))
    x = x * np.sqrt(schedule.alpha_bars[999])  # variance preserving, as the network sees it
    expected = np.where(mask == 0, q_sample(schedule, known, np.array([999]), noise), noise)
    np.testing.assert_allclose(x, expected, atol=1e-5)


def test_inpainting_at_strength_0_pastes_the_round_trip(pipe, photo):
    mask = masks(*photo.size)["hard"]
    (trip,) = pipe.image_to_image("a cat", photo, strength=0, **FAST)
    (picture,) = pipe.inpaint("a cat", photo, mask, strength=0, **FAST)
    inside = np.asarray(mask)[..., None] == 255
    assert np.array_equal(pixels(picture), np.where(inside, pixels(trip), pixels(photo)))


def test_an_inpainting_model_sees_the_mask_and_the_picture_outside_it_alone(inpaint_pipe, photo):
    mask = masks(*photo.size)["hard"]

    def latents(picture=photo, mask=mask):
        noise = np.random.default_rng(0).standard_normal((1, 5, 7, 4)).astype(np.float32)
        return latents_of(inpaint_pipe.inpaint, "a cat", picture, mask, noise=noise, strength=0.99, **FAST)

    def changed(picture, where):
        return Image.fromarray(np.where(where[..., None], 255 - np.asarray(picture), picture).astype(np.uint8))

    def channels(picture):
        encode = partial(functions.encode, inpaint_pipe.params, config=SMALL_INPAINT)
        white = jnp.asarray(mask, jnp.float32)[None, ..., None] / 255
        return functions.inpainting_channels(encode, images.to_array(picture)[None], white, downscale=8)

    inside = np.asarray(mask) == 255
    concat, hidden = channels(photo), channels(changed(photo, inside))
    assert concat.shape == (1, 5, 7, 5)
    assert np.array_equal(concat[0, ..., 0], np.asarray(mask)[::8, ::8] / 255)
    assert np.array_equal(hidden, concat)
    base = latents()
    assert np.abs(latents(mask=Image.fromarray(255 - np.asarray(mask))) - base).max() > 1e-3
    assert np.abs(latents(picture=changed(photo, ~inside)) - base).max() > 1e-3


def test_an_inpainting_model_makes_pictures_without_a_mask_too(inpaint_pipe, photo):
    assert np.isfinite(latents_of(inpaint_pipe.text_to_image, "a cat", **FAST)).all()
    assert np.isfinite(latents_of(inpaint_pipe.image_to_image, "a cat", photo, **FAST)).all()


# Photographs of any kind

PHOTOGRAPHS = {
    "odd sides": lambda photo: photo.resize((43, 61)),
    "RGBA": lambda photo: photo.resize((42, 62)).convert("RGBA"),
    "grey": lambda photo: photo.resize((41, 63)).convert("L"),
    "palette": lambda photo: photo.resize((41, 61)).convert("P"),
    "CMYK": lambda photo: photo.resize((43, 63)).convert("CMYK"),
    "16 bit": lambda photo: Image.fromarray(np.asarray(photo.resize((38, 65)).convert("L"), np.uint16) * 257),
    "strip": lambda photo: photo.resize((3, 57)),
    "one pixel": lambda photo: photo.resize((1, 1)),
}


@pytest.mark.parametrize("kind", PHOTOGRAPHS)
def test_a_photograph_of_any_kind_comes_out_in_the_size_it_had(pipe, photo, kind):
    picture = PHOTOGRAPHS[kind](photo)
    (result,) = pipe.image_to_image("a cat", picture, strength=0)
    assert (result.size, result.mode) == (picture.size, "RGB")
    mask = Image.new("L", picture.size, 255)
    mask.paste(0, (0, picture.height // 2, picture.width, picture.height))
    if kind != "one pixel":
        (result,) = pipe.inpaint("a cat", picture, mask, strength=0)
        black = np.asarray(mask) == 0
        assert np.array_equal(pixels(result)[black], pixels(images.load_image(picture))[black])


def test_a_turned_photograph_comes_out_upright(pipe, photo, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    photo.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    (expected,) = pipe.image_to_image("a cat", photo, strength=0)
    (result,) = pipe.image_to_image("a cat", tmp_path / "turned.png", strength=0)
    assert result.size == photo.size
    assert distance(result, expected) == 0


def test_the_size_that_was_asked_for_comes_out(pipe):
    mask = Image.new("L", (256, 256))
    mask.paste(255, (0, 128, 256, 256))
    assert pipe.image_to_image("a cat", PHOTO, strength=0, **SIZE)[0].size == (56, 40)
    (picture,) = pipe.inpaint("a cat", PHOTO, mask, strength=0, **SIZE)
    assert picture.size == (56, 40)
    cropped = images.fit(images.load_image(PHOTO), (56, 40))
    assert np.array_equal(pixels(picture)[:10], pixels(cropped)[:10])


# Compilation


def test_another_prompt_guidance_seed_or_model_compiles_nothing(pipe, photo, astronaut, caplog):
    mask = masks(*photo.size)["hard"]
    other = Pipeline(SMALL, random_params(SMALL, seed=1), pipe.tokenizer, "other")
    pipe.inpaint("a cat", photo, mask, **STREAMED)
    (different,) = other.text_to_image("an astronaut", seed=3, **FAST)
    assert distance(different, astronaut) > 1
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for model in (pipe, other):
            model.text_to_image("a dog", "a horse", guidance=3, guidance_rescale=0.5, seed=77, **FAST)
            model.text_to_image("a dog", guidance_interval=(0.2, 0.7), spacing="leading", sampler="euler", **FAST)
            model.image_to_image("a bird", photo, strength=1, sampler="unipc", **FAST)
            model.inpaint("a bird", photo, masks(*photo.size)["soft"], **STREAMED)
    assert [record.message for record in caplog.records if "ompil" in record.message] == []


def test_parameters_are_arguments_and_never_constants(pipe):
    rows, calls = stack_plans([plan(Request("a cat", steps=4), SMALL)])
    known, mask, concat = (jnp.zeros((1, 5, 7, channels)) for channels in (4, 1, 0))
    prompts = jax.tree.map(lambda leaf: leaf[None], pipe._prepared(Request("a cat"), {}).prompts)
    given, kv = functions.condition(pipe.params, prompts, rows, NO_GATES[None], known, mask, concat, config=SMALL)
    state = first_state(rows, calls, known, image_keys([0]), given, kv)
    traced = functions.sample.trace(pipe.params, state, config=SMALL)
    assert max((np.size(constant) for constant in constants(traced.jaxpr)), default=0) < 100


def constants(jaxpr):
    """Every array that a jaxpr, or one inside it, holds as a constant."""
    yield from jaxpr.consts
    for equation in jaxpr.eqns:
        for value in jax.tree.leaves(
            equation.params, is_leaf=lambda value: isinstance(value, jax.extend.core.ClosedJaxpr)
        ):
            if isinstance(value, jax.extend.core.ClosedJaxpr):
                yield from constants(value)
