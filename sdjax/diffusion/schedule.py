"""The forward process and the noise levels that a sampler visits.

Two views of one process. Variance preserving (the papers' and the network's):
x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps. Sigma space (the samplers'):
x = x_0 + sigma eps with sigma_t = sqrt((1 - alpha_bar_t) / alpha_bar_t), which is x_t /
sqrt(alpha_bar_t). Tables are float64 on the host.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from sdjax.config import ScheduleConfig
from sdjax.diffusion.names import RHO
from sdjax.diffusion.spacings import SPACINGS
from sdjax.types import Array

TERMINAL_ALPHA_BAR = 2.0**-24
"""Stands for alpha_bar = 0 under zero terminal SNR: a finite sigma of 4096."""


class NoiseSchedule(NamedTuple):
    """Tables over the training timesteps, numpy float64[steps]: beta_t, alpha_bar_t and sigma_t."""

    betas: np.ndarray
    alpha_bars: np.ndarray
    sigmas: np.ndarray

    def levels(self, steps: int, spacing: str = "leading", rho: float | None = None) -> np.ndarray:
        """The sigmas of a run, float64[steps + 1], from the noisiest down to 0.

        spacing: one of `sdjax.diffusion.spacings.SPACINGS`, which describes them; a few of them make other lengths.
        rho: exponent of the spacings that have one; None: the usual one.

        Raises:
            ValueError: `steps` is not a whole number in [1, T], or the spacing is unknown.
        """
        total = len(self.sigmas)
        if not isinstance(steps, int | np.integer) or not 1 <= steps <= total:
            raise ValueError(f"steps must be a whole number in [1, {total}], found {steps!r}")
        if spacing not in SPACINGS:
            raise ValueError(f"unknown spacing {spacing!r}; the spacings are {', '.join(SPACINGS)}")
        return SPACINGS[spacing](self.sigmas, steps, RHO.get(spacing, 1.0) if rho is None else rho)

    def timesteps(self, sigma: np.ndarray) -> np.ndarray:
        """The (fractional) timesteps of the given sigmas, by linear interpolation in log sigma."""
        return np.interp(np.log(sigma), np.log(self.sigmas), np.arange(len(self.sigmas)))


@lru_cache(maxsize=16)
def noise_schedule(config: ScheduleConfig) -> NoiseSchedule:
    """The tables of a configuration, read-only."""
    if config.trained_betas is not None:
        betas = np.array(config.trained_betas)
    elif config.curve == "squared_cosine":
        betas = _squared_cosine(config.steps)
    elif config.curve == "scaled_linear":
        betas = np.linspace(config.beta_start**0.5, config.beta_end**0.5, config.steps) ** 2
    else:
        betas = np.linspace(config.beta_start, config.beta_end, config.steps)
    alpha_bars = np.cumprod(1 - betas)
    if config.zero_terminal_snr:
        alpha_bars = _zero_terminal_snr(alpha_bars)
        betas = 1 - alpha_bars / np.append(1.0, alpha_bars[:-1])
    tables = NoiseSchedule(betas, alpha_bars, np.sqrt((1 - alpha_bars) / alpha_bars))
    for table in tables:
        table.setflags(write=False)  # others will be given the same
    return tables


def _squared_cosine(steps: int) -> np.ndarray:
    """alpha_bar_t proportional to cos^2, no beta above 0.999 (Nichol & Dhariwal 2021, eq. 17)."""
    alpha_bars = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bars[1:] / alpha_bars[:-1], 0.999)


def _zero_terminal_snr(alpha_bars: np.ndarray) -> np.ndarray:
    """Shifts sqrt(alpha_bar) to end at 0, its start kept (Lin et al. 2024, algorithm 1)."""
    roots = np.sqrt(alpha_bars)
    roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    return np.maximum(roots**2, TERMINAL_ALPHA_BAR)


def q_sample(schedule: NoiseSchedule, x0: Array, t: Array, noise: Array) -> Array:
    """A draw of q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I) (Ho et al. 2020, eq.
    4).

    x0 and noise f[b, ...], t i32[b] in [0, T) -> f[b, ...] in the variance-preserving view.
    """
    alpha_bar = per_image(jnp.asarray(schedule.alpha_bars, x0.dtype)[t], x0)
    return jnp.sqrt(alpha_bar) * x0 + jnp.sqrt(1 - alpha_bar) * noise


def q_step(schedule: NoiseSchedule, x: Array, t: Array, noise: Array) -> Array:
    """A draw of q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I) (Ho et al. 2020, eq. 2).

    x f[b, ...] is x_{t-1} (x_0 for t = 0), t i32[b] in [0, T).
    """
    beta = per_image(jnp.asarray(schedule.betas, x.dtype)[t], x)
    return jnp.sqrt(1 - beta) * x + jnp.sqrt(beta) * noise


def per_image(value: Array, x: Array) -> Array:
    """A scalar, or one number for each image f[b], shaped to multiply x f[b, ...]."""
    value = jnp.asarray(value)
    return value.reshape(value.shape + (1,) * (x.ndim - 1)) if value.ndim else value


def start_step(steps: int, strength: float) -> int:
    """The first of `steps` that image-to-image runs: int(steps * strength) of them are left.

    Raises:
        ValueError: `strength` is not in [0, 1].
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must lie in [0, 1], found {strength!r}")
    return steps - min(int(steps * strength), steps)
