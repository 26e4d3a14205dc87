"""The linear rule that every sampler is: a table of rows, and one short step that runs over them.

Every coefficient of a sampler depends on the sigmas alone. Its table has them, worked out on the host in float64, one
row for each call of the network. So the jitted step is plain arithmetic, all samplers share one compiled program, and a
batch may have another sampler in every picture.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.diffusion.schedule import per_image
from sdjax.types import Array, Denoiser, Latent, NoiseLevel

HISTORY = 5  # directions that a rule may combine, the newest first


class Rows(NamedTuple):
    """A sampler's table, one row for each call of the network.

    For one picture each field has the leading axis s, for a batch the axes [b, s]; a step sees one row, [b].
    """

    levels: NoiseLevel  # [s]
    direction: Any  # [s, 2]
    correct: Any  # [s, 2]
    correct_history: Any  # [s, HISTORY]
    scale: Any  # [s]
    history: Any  # [s, HISTORY]
    noise: Any  # [s]


class Carry(NamedTuple):
    """What one call hands to the next. x: where it will be evaluated; previous: where the call before was (corrected);
    history: the directions H_0, H_1, ... of the calls before.
    """

    x: Latent
    x0_hat: Latent
    previous: Latent
    history: tuple[Latent, ...]


def first_carry(x: Latent) -> Carry:
    """The carry before the first row."""
    zero = jnp.zeros_like(x)
    return Carry(x, zero, zero, (zero,) * HISTORY)


def step(denoise: Denoiser, carry: Carry, row: Rows, noise: Array) -> Carry:
    """One row of any sampler: a linear multistep rule with a linear corrector. noise: unit normal, like x.

    D = denoise(x, level)
    H_0 = direction . (x, D),  then H_1, H_2, ... of the calls before
    x = correct . (x, previous x) + sum_k correct_history_k H_k
    x' = scale x + sum_k history_k H_k + noise eps
    """
    x = carry.x
    x0_hat = denoise(x, row.levels)
    times = partial(_times, x)
    new = times(row.direction[..., 0], x) + times(row.direction[..., 1], x0_hat)
    history = (new, *carry.history[:-1])
    x = times(row.correct[..., 0], x) + times(row.correct[..., 1], carry.previous)
    x += sum(times(row.correct_history[..., k], history[k]) for k in range(HISTORY))
    after = times(row.scale, x) + times(row.noise, noise)
    after += sum(times(row.history[..., k], history[k]) for k in range(HISTORY))
    return Carry(after, x0_hat, x, history)


def _times(x: Latent, value: Any, y: Array) -> Array:
    return per_image(value.astype(x.dtype), x) * y


def rows_at(sigma: np.ndarray) -> Rows:
    """A table that evaluates at every sigma but the last and keeps x, float64; a sampler's table fills it in."""
    count = len(sigma) - 1
    return Rows(
        NoiseLevel(sigma[:-1], None),
        direction=np.tile([0.0, 1.0], (count, 1)),
        correct=np.tile([1.0, 0.0], (count, 1)),
        correct_history=np.zeros((count, HISTORY)),
        scale=np.ones(count),
        history=np.zeros((count, HISTORY)),
        noise=np.zeros(count),
    )


def padded(rows: Rows, length: int, level: NoiseLevel) -> Rows:
    """The table filled up to `length` rows with such that leave x as it is. level: that these are evaluated at."""
    rest = rows_at(np.full(1 + length - len(rows.scale), level.sigma))
    rest = rest._replace(levels=NoiseLevel(rest.levels.sigma, np.full(len(rest.scale), level.t)))
    return jax.tree.map(lambda own, more: np.concatenate([own, more]), rows, rest)
