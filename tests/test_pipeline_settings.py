"""Every bad setting of the three tasks is one clear error: what was wrong, what was expected, what was found."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from sdjax.config import TINY
from sdjax.pipeline.pipeline import Pipeline
from sdjax.text.tokenizer import clip_tokenizer


@pytest.fixture(scope="module")
def pipe(tiny_params):
    return Pipeline(TINY, tiny_params, clip_tokenizer(), "tiny")


BAD = [
    (dict(steps=0), "steps must be a whole number above 0, found 0"),
    (dict(steps=2.5), "steps must be a whole number above 0, found 2.5"),
    (dict(steps=True), "steps must be a whole number above 0, found True"),
    (dict(steps=1001), r"steps must be a whole number in \[1, 1000\], found 1001"),
    (dict(guidance=float("nan")), "guidance must be a finite number, found nan"),
    (dict(guidance="7"), "guidance must be a finite number, found '7'"),
    (dict(guidance_rescale=1.5), r"guidance_rescale must be in \[0, 1\], found 1.5"),
    (dict(guidance_interval=(0.5, 0.2)), "guidance_interval must be two fractions"),
    (dict(guidance_interval=0.5), "guidance_interval must be two fractions"),
    (dict(sampler="eular"), "sampler must be one of ddpm, ddim, .*, found 'eular'"),
    (dict(sampler=["ddim"]), "sampler must be one of ddpm, ddim, "),
    (dict(spacing="cosine"), "spacing must be one of leading, .*, found 'cosine'"),
    (dict(eta=0.5), "eta must be left out for dpmpp_2m"),
    (dict(eta=2, sampler="ddim"), r"eta must be in \[0, 1\], found 2"),
    (dict(seed=-2), "seed must be a whole number in"),
    (dict(seed=2**32), "seed must be a whole number in"),
    (dict(seed=2**32 - 1, count=2), "seed must be a whole number in"),
    (dict(seed=0.5), "seed must be a whole number in"),
    (dict(count=0), "count must be a whole number above 0"),
    (dict(batch_size=0), "batch_size must be a whole number above 0"),
    (dict(batch=0), "batch must be a whole number above 0"),
    (dict(guidance=3, cfg_scale=7), "guidance is given twice"),
    (dict(clip_skip=-1), "clip_skip must be a whole number from 0"),
    (dict(clip_skip=2), r"skip must lie in \[0, 2\), found 2"),
    (dict(width=60), "width and height must be multiples of 8, found 60x64; try 64x64"),
    (dict(width=0), "width and height must be multiples of 8, found 0x64; try 8x64"),
    (dict(height="64"), "width and height must be whole numbers"),
    (dict(negative_prompt=None), "negative_prompt must be a string, or an encoded prompt .*, found None"),
    (dict(noise=np.zeros((1, 4, 8, 8))), r"noise must have the shape \(8, 8, 4\) for each picture, found \(4, 8, 8\)"),
    (dict(noise="numpy"), "noise must be one of jax, torch, torch-cuda, or an array, found 'numpy'"),
    (dict(prompt=[]), "prompt must be a string, or a list of at least one string"),
    (dict(prompt=None), "prompt must be a string, or a list of at least one string"),
    (dict(prompt=["a cat", 3]), "prompt must be a string, or a list of at least one string"),
    (dict(strength=0.5), "strength"),
    (dict(stepz=3), "stepz"),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_a_bad_setting_is_one_clear_error(pipe, settings, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        pipe.text_to_image(**dict(prompt="a cat") | settings)
    assert "\n" not in str(caught.value)


def mask_of(rows):
    """A mask 56x40 with white rows."""
    mask = np.zeros((40, 56), np.uint8)
    mask[rows] = 255
    return Image.fromarray(mask)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(strength=1.5), r"strength must be in \[0, 1\], found 1.5"),
        (dict(strength=float("nan")), r"strength must be in \[0, 1\], found nan"),
        (dict(strength="0.5"), r"strength must be in \[0, 1\], found '0.5'"),
        (dict(width=64), "give both width and height, or neither"),
        (dict(width=0, height=0), "multiples of 8, found 0x0"),
        (dict(mask=Image.new("L", (56, 40))), "the mask is black everywhere"),
        (dict(mask=mask_of(slice(9, 15))), "too fine and would regenerate nothing; make it 8 pixels wide or more"),
        (dict(mask=Image.new("L", (40, 56), 255)), "the mask is 40x56 and the picture 56x40"),
        (dict(mask="no.png"), "no.png: no such picture file"),
        (dict(image="no.png"), "no.png: no such picture file"),
        (dict(image=None), "expected a path or a PIL image, found NoneType"),
    ],
)
def test_a_bad_setting_of_inpainting_is_one_clear_error(pipe, settings, message):
    photo = Image.new("RGB", (56, 40), "red")
    good = dict(prompt="a cat", image=photo, mask=Image.new("L", photo.size, 255))
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        pipe.inpaint(**good | settings)


def test_a_tokenizer_of_another_model_is_refused(pipe):
    config = dataclasses.replace(TINY, text=(dataclasses.replace(TINY.clip, vocab_size=1000, pad_token=0),))
    with pytest.raises(ValueError, match="use the tokenizer that belongs to the model"):
        dataclasses.replace(pipe, config=config).text_to_image("a cat", steps=4)


def test_a_model_with_other_input_channels_says_so(pipe):
    config = dataclasses.replace(TINY, unet=dataclasses.replace(TINY.unet, in_channels=8))
    odd = dataclasses.replace(pipe, config=config, name="edit")
    with pytest.raises(ValueError, match=r"edit has 8 input channels; .* are for models with 4 or 9"):
        odd.text_to_image("a cat", steps=4)
