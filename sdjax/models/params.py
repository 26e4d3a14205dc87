"""The parameter trees of a model: their shapes, where training starts, and seeded random values for tests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.config import ModelConfig
from sdjax.models.clip import TextEncoder
from sdjax.models.unet import UNet
from sdjax.models.vae import VAE
from sdjax.types import Array, Params

PARTS = ("text", "vae", "unet")


@lru_cache(maxsize=16)
def abstract_params(config: ModelConfig) -> Params:
    """{"text", "vae", "unet"}: nested dicts of float32 jax.ShapeDtypeStruct; nothing is computed.

    The result is cached: do not change it.
    """
    return {part: jax.eval_shape(partial(_init, config, part), jax.random.key(0)) for part in PARTS}


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
    """Where training from nothing starts: f32 arrays on the device, for the parts asked for.

    Kernels are normal with variance 1 / fan_in, biases 0, norm scales 1. The last map of every residual branch of the
    UNet, and its output, are 0: each block begins as the identity (Dhariwal & Nichol 2021, appendix; Ho et al. 2020's
    code).
    """

    def init(key: Array) -> Params:
        params = {part: _init(config, part, jax.random.fold_in(key, PARTS.index(part))) for part in parts}
        if "unet" in params:
            params["unet"] = jax.tree_util.tree_map_with_path(_zero_last_maps, params["unet"])
        return params

    return jax.jit(init)(jax.random.key(seed))


def _zero_last_maps(path: tuple, leaf: Array) -> Array:
    return jnp.zeros_like(leaf) if path[-2].key in ("conv2", "proj_out", "conv_out") else leaf


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
        noise = rng.standard_normal(leaf.shape, dtype=np.float32)
        if name == "kernel":
            noise *= float(np.prod(leaf.shape[:-1])) ** -0.5
        elif name == "scale":
            noise = 1 + 0.1 * noise
        elif name == "logit_scale":
            noise = np.log(1 / 0.07) + 0 * noise
        else:
            noise *= 0.02
        return np.asarray(noise, jnp.dtype(dtype))

    return jax.tree_util.tree_map_with_path(fill, abstract_params(config))
