"""From settings to rows: how one picture is sampled, worked out on the host in float64."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import numpy as np

from sdjax.config import ScheduleConfig
from sdjax.diffusion.rows import Rows, padded
from sdjax.diffusion.samplers import SAMPLERS
from sdjax.diffusion.schedule import noise_schedule, start_step
from sdjax.types import Guidance, NoiseLevel

ROW_BOUND = 64
"""Plans are padded to this number of rows, or the smallest power of two that holds them: one program for all."""


class Plan(NamedTuple):
    """How to sample one picture, on the host.

    rows: the sampler's table with the guidance of every row, float64[s, ...], read-only.
    calls: the first rows, those that run.
    sigma: the noise level to start at.
    """

    rows: Rows
    calls: int
    sigma: float


@lru_cache(maxsize=256)
def make_plan(
    config: ScheduleConfig,
    *,
    steps: int,
    sampler: str,
    spacing: str,
    eta: float | None,
    strength: float,
    guidance: float,
    guidance_rescale: float,
    guidance_interval: tuple[float, float],
    rho: float | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float | None = None,
    s_noise: float = 1.0,
    soft_mask: str = "blend",
    last: int | None = None,
) -> Plan:
    """The plan for one picture's settings (`Request`), every default in its place.

    last: how many steps run, the last ones; None: as `strength` says.
    """
    schedule = noise_schedule(config)
    sigma = schedule.levels(steps, spacing, rho)
    low, high = _interval(sigma, guidance_interval)
    count = len(sigma) - 1
    sigma = sigma[start_step(count, strength) if last is None else max(count - last, 0) :]
    chosen, start = SAMPLERS[sampler], float(sigma[0])
    asked = {"eta": eta, "s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax}
    options: dict[str, Any] = {
        name: value for name, value in asked.items() if name in chosen.options and value is not None
    }
    rows = chosen.rows(schedule, sigma, s_noise=s_noise, **options)
    count = len(rows.scale)
    rows = padded(rows, row_bound(count), NoiseLevel(schedule.sigmas[0], 0.0))
    if count:  # noise before the first step is part of the initial noise
        start = float(np.sqrt(start**2 + s_noise**2 * (rows.levels.sigma[0] ** 2 - start**2)))
    inside = (low < rows.levels.sigma) & (rows.levels.sigma <= high) & (np.arange(len(rows.scale)) < count)
    strong = guidance / np.where(inside, rows.history[:, 0], 1.0) if chosen.cfg_pp else guidance
    scale = np.where(inside, strong, 1.0)
    steering = Guidance(scale, np.where(inside, guidance_rescale, 0.0), scale != 1)
    threshold = np.full(len(rows.scale), -1.0)
    if soft_mask == "differential":
        threshold[:count] = thresholds(rows.levels.sigma[:count], sigma)
    rows = rows._replace(levels=rows.levels._replace(guidance=steering, threshold=threshold))
    jax.tree.map(lambda leaf: leaf.setflags(write=False), rows)  # others will be given the same
    return Plan(rows, count, start)


def thresholds(visited: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """The value from which pixels of a differential mask are free, for each call of the network, float64[calls].

    It is the fraction of the steps that are left: 1 in the first of n, 1 / n in the last, as Levin & Fried 2023 count
    (algorithm 1; ComfyUI compares with a fraction of the timesteps instead). All calls of a step have the same.

    visited: sigma of every call. sigma: float64[n + 1], the levels between the steps.
    """
    steps = len(sigma) - 1
    calls = np.arange(len(visited))
    begun = np.zeros(len(visited), int)
    for level in sigma[1:-1]:
        there = np.flatnonzero(visited == level)  # the last visit of a level is where the step from there begins
        first = there[-1] if len(there) else np.argmax(visited < level)
        begun += calls >= first
    return (steps - begun) / steps


def row_bound(count: int) -> int:
    """The number of rows that a plan of `count` is padded to."""
    return max(ROW_BOUND, 1 << max(0, count - 1).bit_length())


@lru_cache(maxsize=4096)
def calls_of(sampler: str, steps: int) -> int:
    """The calls of the network that a sampler needs for so many steps from noise to a picture."""
    schedule = noise_schedule(ScheduleConfig())
    return len(SAMPLERS[sampler].rows(schedule, schedule.levels(steps, "karras")).scale)


def calls_per_step(sampler: str) -> int:
    """The calls of the network for each step, as schedules in prompts count them: 2 for samplers of second order."""
    return round(calls_of(sampler, 16) / 16)


def stack_plans(plans: Sequence[Plan], *, uniform: bool = False) -> tuple[Rows, np.ndarray]:
    """The plans of a batch as rows f32[b, s, ...], and how many of them run for each picture, i32[b].

    uniform: a row counts as guided for all pictures if it is for one, and all run as many rows as the longest plan.
    No picture changes by it; devices that hold parts of one product must take the same branches.
    """
    rows: Rows = jax.tree.map(lambda *leaves: np.stack(leaves), *(plan.rows for plan in plans))
    rows = jax.tree.map(lambda leaf: leaf if leaf.dtype == bool else leaf.astype(np.float32), rows)
    calls = np.array([plan.calls for plan in plans], np.int32)
    if uniform:
        assert rows.levels.guidance is not None
        used = rows.levels.guidance.used
        calls[:], used[:] = calls.max(), used.any(axis=0, keepdims=True)
    return rows, calls


def _interval(sigma: np.ndarray, fractions: tuple[float, float]) -> tuple[float, float]:
    """Fractions of the steps -> the sigmas (low, high] that the guided steps start from."""
    steps = len(sigma) - 1
    first, last = (round(fraction * steps) for fraction in fractions)
    high = np.inf if first == 0 else (sigma[first - 1] + sigma[first]) / 2
    low = -1.0 if last == steps else (sigma[last - 1] + sigma[last]) / 2 if last > 0 else np.inf
    return float(low), float(high)
