"""The parameter trees of a model: their shapes, where training starts, and seeded random values for tests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.config import ModelConfig
from sdjax.devices.platform import pinned, seeded_keys
from sdjax.models.clip import TextEncoder
from sdjax.models.unet import UNet
from sdjax.models.vae import VAE
from sdjax.types import Array, Params

PARTS = ("text", "vae", "unet")


@lru_cache(maxsize=16)
@pinned
def abstract_params(config: ModelConfig) -> Params:
    """{"text", "vae", "unet"}: nested dicts of float32 jax.ShapeDtypeStruct; nothing is computed.

    The result is cached: do not change it.
    """
    return {part: jax.eval_shape(partial(_init, config, part), seeded_keys(0)) for part in PARTS}


def _init(config: ModelConfig, part: str, key: Array) -> Params:
    """Flax' own initialisation of one part, on the smallest inputs that it takes."""
    size = 2 ** max(len(config.unet.channels), len(config.vae.channels))
    if part == "text":
        ids = jnp.zeros((1, config.clip.length), jnp.int32)
        return TextEncoder(config.clip).init(key, ids)["params"]
    if part == "vae":
        return VAE(config.vae).init(key, jnp.zeros((1, size, size, config.vae.image_channels)))["params"]
    latent = jnp.zeros((1, size, size, config.unet.in_channels))
    context = jnp.zeros((1, config.clip.length, config.unet.context_width))
    return UNet(config.unet).init(key, latent, jnp.zeros(1), context)["params"]


def initial_params(config: ModelConfig, seed: int = 0, parts: Sequence[str] = PARTS) -> Params:
    """Where training from nothing starts: f32 numpy arrays, for the parts asked for.

    Kernels are normal with variance 1 / fan_in, embeddings normal with 0.02, biases 0, norm scales 1. The last map of
    every residual branch of the UNet, and its output, are 0: each block begins as the identity (Dhariwal & Nichol 2021,
    appendix; Ho et al. 2020's code).
    """

    def fill(part: str, rng: np.random.Generator, path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name, owner = path[-1].key, path[max(0, len(path) - 2)].key
        if name == "scale":
            return np.ones(leaf.shape, np.float32)
        if name == "bias" or (part == "unet" and owner in ("conv2", "proj_out", "conv_out")):
            return np.zeros(leaf.shape, np.float32)
        return _random(rng, name, leaf.shape)

    shapes = abstract_params(config)
    return {
        part: jax.tree_util.tree_map_with_path(
            partial(fill, part, np.random.default_rng([seed, PARTS.index(part)])), shapes[part]
        )
        for part in parts
    }


def _random(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A kernel with variance 1 / fan_in, CLIP's first temperature, or anything else with standard deviation 0.02."""
    if name == "logit_scale":
        return np.full(shape, math.log(1 / 0.07), np.float32)
    noise = rng.standard_normal(shape, dtype=np.float32)
    return noise * np.float32(math.prod(shape[:-1]) ** -0.5 if name == "kernel" else 0.02)


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """The number of parameters of each part, "text", "vae" and "unet"."""
    return {
        part: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
        for part, tree in abstract_params(config).items()
    }


def random_params(config: ModelConfig, seed: int = 0, dtype: str = "float32") -> Params:
    """Seeded random weights of every leaf, as numpy arrays: an untrained model that computes
    finite, varied numbers.

    Kernels are normal with variance 1 / fan_in, embeddings normal with 0.02; no norm scale or bias
    sits at 1 or 0, so that a test on these weights sees every parameter. Leaf by leaf in tree
    order: the same seed, the same model.
    """
    rng = np.random.default_rng(seed)

    def fill(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = path[-1].key
        if name == "scale":
            values = 1 + np.float32(0.1) * rng.standard_normal(leaf.shape, dtype=np.float32)
        else:
            values = _random(rng, name, leaf.shape)
        return np.asarray(values, jnp.dtype(dtype))

    return jax.tree_util.tree_map_with_path(fill, abstract_params(config))


DTYPES = ("float32", "bfloat16", "float16")


def dtype_of(part: str, dtype: str) -> str:
    """The dtype of one part ("text", "vae", "unet") under the policy `dtype`.

    In float16 the autoencoder stays in float32: the decoder of the published models overflows in float16.

    Raises:
        ValueError: not one of `DTYPES`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, found {dtype!r}")
    return "float32" if part == "vae" and dtype == "float16" else dtype


def cast(params: Params, dtype: str) -> Params:
    """The parameters {"text", "vae", "unet"} in `dtype`, as the policy above has it; no copy where nothing changes."""

    def cast_part(part: str) -> Params:
        to = jnp.dtype(dtype_of(part, dtype))
        return jax.tree.map(lambda leaf: leaf if leaf.dtype == to else leaf.astype(to), params[part])

    return {part: cast_part(part) for part in params}
