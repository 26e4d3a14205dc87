"""The arithmetic of weights: from a text encoder's output to what the UNet attends to.

z is the output for one text, m its tokens' weights, e the output for the empty prompt:

    a1111   y = z m, then times mean(z) / mean(y), over the whole chunk and all texts that take turns with it
    comfy   y = e + m (z - e)
    compel  the same, then a sum of texts that see less and less of what has a weight below 1

A text whose weights are all 1 keeps every bit.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from sdjax.text.prompt import MODES, Prompts
from sdjax.types import Array


def weighted(z: Array, prompts: Prompts) -> Array:
    """The texts of pictures, weighted.

    z: f[b, V, L, l, d], as encoded.
    prompts: of the same pictures, leaves [b, ...].
    """
    m = prompts.weights[..., None]
    same = (prompts.group[:, :, None] == prompts.group[:, None, :]).astype(jnp.float32)  # [b, V, V]
    counted = same * prompts.repeats[:, None, :]
    x = z.astype(jnp.float32)

    # a1111
    scaled = x * m
    before, after = (jnp.einsum("bvw,bwl->bvl", counted, y.mean((-2, -1))) for y in (x, scaled))
    restored = scaled * (before / after)[..., None, None]

    # comfy
    empty = jnp.take_along_axis(x[:, :, :1], prompts.empty[:, None, None, None, None], axis=1)  # [b, 1, 1, l, d]
    relative = empty + m * (x - empty)

    is_weighted = jnp.any(m != 1, axis=(2, 3, 4))
    is_touched = jnp.einsum("bvw,bw->bv", same, is_weighted.astype(jnp.float32)) > 0
    by_token = jnp.where(m == 1, x, relative)
    mode = prompts.mode[:, None, None, None, None]
    y = jnp.where(mode == MODES["a1111"], restored, jnp.where(mode == MODES["comfy"], by_token, x))
    y = jnp.where(is_touched[:, :, None, None, None], y, x)
    return lax.cond(jnp.any(prompts.mixed), lambda: _mixed(y, prompts), lambda: y).astype(z.dtype)


def _mixed(y: Array, prompts: Prompts) -> Array:
    """Each text as the sum of texts that it is mixed from."""
    mixed = jnp.einsum("bvw,bwlnd->bvlnd", prompts.mix, y, precision=jax.lax.Precision.HIGHEST)
    return jnp.where(prompts.mixed[:, None, None, None, None], mixed, y)
