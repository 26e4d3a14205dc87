"""Spacings: which noise levels a run of the sampler visits. Each is one function, listed in `SPACINGS`.

A function takes sigmas (float64[T], the schedule's, rising), steps, and rho (where it has one), and returns the levels
of a run, float64[steps + 1], falling to 0. Three are exceptions, as in the programs that they come from: `ddim_uniform`
may have more levels, `beta` drops levels that fall together, `kl_optimal_a1111` ends at the least sigma instead of 0.

    leading           every (T // steps)-th timestep, shifted by one, as Stable Diffusion's own DDIM took them
    linspace          evenly from T - 1 to 0, sigma interpolated linearly (diffusers)
    trailing          evenly, T - 1 included (Lin et al. 2024, table 2)
    normal            evenly from T - 1 to 0, log sigma interpolated (k-diffusion; "Uniform" in A1111)
    sgm_uniform       as normal with one timestep more, and without the last (Stability's generative-models)
    simple            every (T / steps)-th sigma from the top (ComfyUI)
    ddim_uniform      every (T // steps)-th sigma from the bottom, from the second on (ComfyUI; "DDIM" in A1111)
    lcm               evenly on the grid of 50 timesteps that latent consistency models know (Luo et al. 2023)
    karras            evenly in sigma^(1/rho), rho 7 (Karras et al. 2022, eq. 5)
    exponential       evenly in log sigma
    polyexponential   in log sigma, ramp^rho, rho 1 (k-diffusion)
    beta              quantiles of Beta(0.6, 0.6) in the timestep (Lee et al. 2024, as ComfyUI has it)
    beta_a1111        quantiles of Beta(0.6, 0.6) in sigma, as A1111 has it
    kl_optimal        evenly in arctan sigma (Sabour et al. 2024, appendix)
    kl_optimal_a1111  the same with the least sigma in the place of 0, as A1111 has it
    ays, ays_sdxl     Align Your Steps (Sabour et al. 2024): tables for SD 1 and SDXL, interpolated in log sigma
    ays_a1111, ays_sdxl_a1111   the same interpolated to one level less, 0 behind it, as A1111 has them

karras, exponential and the like span the schedule's whole range of sigma.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

LCM_STEPS = 50
"""Timesteps that latent consistency models were distilled on."""

AYS = {
    "sd1": (
        *(14.6146412293, 6.4745760956, 3.8636745985, 2.6946151520, 1.8841921177, 1.3943805092),
        *(0.9642583904, 0.6523686016, 0.3977456272, 0.1515232662, 0.0291671582),
    ),
    "sdxl": (
        *(14.6146412293, 6.3184485287, 3.7681790315, 2.1811480769, 1.3405244945, 0.8620721141),
        *(0.5550693289, 0.3798540708, 0.2332364134, 0.1114188177, 0.0291671582),
    ),
}
"""Levels of ten steps (Sabour et al. 2024, in the digits that ComfyUI has)."""

AYS_SHORT = {
    "sd1": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
}
"""The same in the digits that the paper's authors published first, and A1111 has."""


def _at(sigmas: np.ndarray, t: np.ndarray) -> np.ndarray:
    """The sigmas of fractional timesteps, by linear interpolation in log sigma."""
    return np.exp(np.interp(t, np.arange(len(sigmas)), np.log(sigmas)))


def _to_zero(sigma: np.ndarray) -> np.ndarray:
    return np.append(sigma, 0.0)


# Evenly in the timestep


def leading(sigmas: np.ndarray, steps: int, rho: float) -> np.ndarray:
    total = len(sigmas)
    shift = 1 if steps < total else 0  # T steps leave no room for it
    return _to_zero(sigmas[np.arange(steps)[::-1] * (total // steps) + shift])


def linspace(sigmas: np.ndarray, steps: int, rho: float) -> np.ndarray:
    last = len(sigmas) - 1
    return _to_zero(np.interp(last * (1 - np.linspace(0, 1, steps)), np.arange(last + 1), sigmas))


def trailing(sigmas: np.ndarray, steps: int, rho: float) -> np.ndarray:
    total = len(sigmas)
    return _to_zero(sigmas[np.round(np.arange(steps, 0, -1) * (total / steps)).astype(int) - 1])


def normal(sigmas: np.ndarray, steps: int, rho: float) -> np.ndarray:
    return _to_zero(_at(sigmas, np.linspace(len(sigmas) - 1, 0, steps)))


def sgm_uniform(sigmas: np.ndarray, steps: int, rho: float) -> np.ndarray:
    return _to_zero(_at(sigmas, np.linspace(len(sigmas) - 1, 0, steps + 1)[:-1]))


def simple(sigmas: np.ndarray, steps: int, rho: float) -> np.ndarray:
    total = len(sigmas)
    return _to_zero(sigmas[total - 1 - np.arange(steps) * total // steps])


def ddim_uniform(sigmas: np.ndarray, steps: int, rho: float) -> np.ndarray:
    total = len(sigmas)
    if steps == total:
        return _to_zero(sigmas[::-1])
    return _to_zero(sigmas[1 : total : total // steps][::-1])


def lcm(sigmas: np.ndarray, steps: int, rho: float) -> np.ndarray:
    grid = max(LCM_STEPS, steps)
    t = np.arange(1, grid + 1) * (len(sigmas) // grid) - 1
    return _to_zero(sigmas[t[::-1][np.arange(steps) * grid // steps]])


def beta(sigmas: np.ndarray, steps: int, rho: float) -> np.ndarray:
    t = np.rint((len(sigmas) - 1) * _beta_quantile(1 - np.arange(steps) / steps)).astype(int)
    return _to_zero(sigmas[np.unique(t)[::-1]])


# Evenly in a function of sigma


def karras(sigmas: np.ndarray, steps: int, rho: float) -> np.ndarray:
    high, low, ramp = sigmas[-1] ** (1 / rho), sigmas[0] ** (1 / rho), np.linspace(0, 1, steps)
    return _to_zero((high + ramp * (low - high)) ** rho)


def polyexponential(sigmas: np.ndarray, steps: int, rho: float) -> np.ndarray:
    high, low, ramp = np.log(sigmas[-1]), np.log(sigmas[0]), np.linspace(1, 0, steps) ** rho
    return _to_zero(np.exp(low + ramp * (high - low)))


def exponential(sigmas: np.ndarray, steps: int, rho: float) -> np.ndarray:
    return polyexponential(sigmas, steps, 1.0)


def beta_a1111(sigmas: np.ndarray, steps: int, rho: float) -> np.ndarray:
    low, high = sigmas[0], sigmas[-1]
    return _to_zero(low + (high - low) * _beta_quantile(1 - np.linspace(0, 1, steps)))


def _beta_quantile(probability: np.ndarray) -> np.ndarray:
    """The quantiles of the distribution Beta(0.6, 0.6)."""
    from scipy.special import betaincinv

    return betaincinv(0.6, 0.6, probability)


def _arctan(sigmas: np.ndarray, ramp: np.ndarray) -> np.ndarray:
    return np.tan(ramp * np.arctan(sigmas[0]) + (1 - ramp) * np.arctan(sigmas[-1]))


def kl_optimal(sigmas: np.ndarray, steps: int, rho: float) -> np.ndarray:
    return _to_zero(_arctan(sigmas, np.linspace(0, 1, steps)))


def kl_optimal_a1111(sigmas: np.ndarray, steps: int, rho: float) -> np.ndarray:
    return _arctan(sigmas, np.linspace(0, 1, steps + 1))


# Tables


def align_your_steps(sigmas: np.ndarray, steps: int, rho: float, *, table: tuple[float, ...]) -> np.ndarray:
    return _to_zero(_between(table, steps + 1)[:-1])


def align_your_steps_a1111(sigmas: np.ndarray, steps: int, rho: float, *, table: tuple[float, ...]) -> np.ndarray:
    return _to_zero(_between(table, steps))


def _between(table: tuple[float, ...], count: int) -> np.ndarray:
    """A table of levels brought to `count` of them, evenly in its own index and in log sigma; of one, the least."""
    places = np.linspace(0, 1, len(table))
    return np.exp(np.interp(np.linspace(0, 1, count), places, np.log(table[::-1])))[::-1]


SPACINGS: dict[str, Callable[[np.ndarray, int, float], np.ndarray]] = {
    "leading": leading,
    "linspace": linspace,
    "trailing": trailing,
    "karras": karras,
    "exponential": exponential,
    "polyexponential": polyexponential,
    "normal": normal,
    "sgm_uniform": sgm_uniform,
    "simple": simple,
    "ddim_uniform": ddim_uniform,
    "lcm": lcm,
    "beta": beta,
    "beta_a1111": beta_a1111,
    "kl_optimal": kl_optimal,
    "kl_optimal_a1111": kl_optimal_a1111,
    "ays": partial(align_your_steps, table=AYS["sd1"]),
    "ays_sdxl": partial(align_your_steps, table=AYS["sdxl"]),
    "ays_a1111": partial(align_your_steps_a1111, table=AYS_SHORT["sd1"]),
    "ays_sdxl_a1111": partial(align_your_steps_a1111, table=AYS_SHORT["sdxl"]),
}
"""By name, in the order in which they are listed for people."""
