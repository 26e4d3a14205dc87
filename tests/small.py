"""Models for tests: two levels in the UNet and one width in the autoencoder, or next to nothing."""

import dataclasses
from functools import cache

from sdjax.config import TINY, CLIPConfig, ModelConfig, SamplingConfig, UNetConfig, VAEConfig
from sdjax.models.params import random_params
from sdjax.pipeline.pipeline import Pipeline
from sdjax.text.tokenizer import from_merges, learn_merges

SMALL = dataclasses.replace(
    TINY,
    name="small",
    image_size=32,
    vae=dataclasses.replace(TINY.vae, channels=(8, 8, 16, 16)),
    unet=dataclasses.replace(TINY.unet, channels=(32, 64), transformer_layers=(1, 0), heads=(2, 2)),
)

MINI = ModelConfig(
    name="mini",
    text=(CLIPConfig(vocab_size=530, length=16, width=16, layers=1, heads=2, mlp_width=32, pad_token=529),),
    vae=VAEConfig(channels=(8,), res_blocks=1, groups=4),
    unet=UNetConfig(channels=(16,), transformer_layers=(1,), heads=(2,), res_blocks=1, context_width=16, groups=4),
    image_size=8,
    sampling=SamplingConfig(steps=2),
)
"""Compiles in a few seconds, all three parts of it; trains in as many more."""

COLOURS = ("red", "green", "blue", "orange")
"""Of the pictures that it is trained on."""


@cache
def mini() -> Pipeline:
    """MINI untrained, with a tokenizer of its own."""
    texts = [f"{colour} {shape}" for colour in COLOURS for shape in ("disc", "square")]
    tokenizer = from_merges(learn_merges(texts, MINI.clip.vocab_size))
    return Pipeline(MINI, random_params(MINI), tokenizer, "mini")
