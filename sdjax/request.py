"""What is asked for: one picture each, checked, and worked out on the host into a sampler's rows.

All that may differ from picture to picture without another compiled program is in a `Request`; how far a plan for one
picture reaches is its own affair, because every plan is filled up to a common number of rows.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import numpy as np

from sdjax.config import ModelConfig, SamplingConfig, ScheduleConfig
from sdjax.diffusion.samplers import SAMPLERS, Rows, ddim
from sdjax.diffusion.schedule import SPACINGS, noise_schedule, start_step
from sdjax.image import ImageLike, working_size
from sdjax.types import Array, Guidance

NOISES = ("jax", "torch")
"""Where the starting noise may come from."""

BATCH = 8
"""Pictures made at once; longer requests are worked through in batches of this size."""

ROW_BOUND = 64
"""Plans are filled up to this number of rows, or the smallest power of two that holds them: one program for all."""


@dataclass(frozen=True)
class Request:
    """One picture. None stands for the model's own default (`config.sampling`).

    prompt, negative_prompt: what to paint, what to steer away from. seed: decides all randomness. steps: sampling
    steps, 1 to 1000. guidance: classifier-free guidance scale; 1 leaves the negative prompt out and halves the work.
    guidance_rescale: 0 to 1, against overexposure. guidance_interval: (start, stop) as fractions of the steps; outside
    it guidance is 1. sampler: a name from `SAMPLERS`. spacing: a name from `SPACINGS`. eta: noise of "ddim", 0 to 1.
    clip_skip: layers of the text encoder left out. width, height: in pixels. image: to start from; mask: white where it
    is to be made anew. strength: how much of the image to change, 0 to 1 (0.75, with a mask 1). noise: where the
    start comes from: "jax", "torch" (what PyTorch on a CPU draws for the seed, as diffusers starts from), or unit
    normal numbers f32[h, w, c]. id: yours, comes back with the picture.
    """

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    sampler: str | None = None
    spacing: str | None = None
    eta: float | None = None
    clip_skip: int | None = None
    width: int | None = None
    height: int | None = None
    image: ImageLike | None = None
    mask: ImageLike | None = None
    strength: float | None = None
    noise: str | Array | np.ndarray = "jax"
    id: str = ""


STRENGTHS = {"img2img": 0.75, "inpaint": 1.0}
"""How much of a picture is changed when nothing is said."""


LARGEST_NUMBER = float(np.finfo(np.float32).max)


def parse_size(text: Any) -> tuple[int, int]:
    """Width and height from a text such as "512x768".

    Raises:
        ValueError: it is something else.
    """
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text) if isinstance(text, str) else None
    if match is None:
        raise ValueError(f"size must be WIDTHxHEIGHT such as 512x768, found {text!r}")
    return int(match[1]), int(match[2])


def filled_in(request: Request, own: SamplingConfig) -> Request:
    """The request with every default in its place."""
    own_settings = {name: getattr(own, name) for name in ("steps", "guidance", "sampler", "spacing")}
    settings = {name: value for name, value in own_settings.items() if getattr(request, name) is None}
    if request.strength is None:
        task = "img2img" if request.image is not None and request.mask is None else "inpaint"
        settings["strength"] = STRENGTHS[task]  # without a picture all is made anew, too
    return dataclasses.replace(request, **settings)


def size_of(request: Request, config: ModelConfig, given: tuple[int, int] | None) -> tuple[int, int]:
    """The (width, height) to work at: what was asked for, else near those of the picture that was given, else the
    model's own.

    Raises:
        ValueError: not a multiple of the latent cell, or one side of a picture's alone.
    """
    sides = request.width, request.height
    multiple = config.vae.downscale
    if given is None:
        width, height = (config.image_size if side is None else side for side in sides)
        return working_size((width, height), asked=(width, height), multiple=multiple)
    if sides == (None, None):
        return working_size(given, multiple=multiple)
    if request.width is None or request.height is None:
        raise ValueError("give both width and height, or neither")
    return working_size(given, asked=(request.width, request.height), multiple=multiple)


def check_request(request: Request, config: ModelConfig, name: str) -> Request:
    """The request with every default in its place, if a model can make it as far as that shows without its picture.

    name: of the model, for messages.

    Raises:
        TypeError: not a `Request`. ValueError: a setting is out of range, of the wrong kind, or not for this model.
    """
    if not isinstance(request, Request):
        raise TypeError(f"expected a sdjax.Request, found {type(request).__name__}; write Request(prompt, seed=1, ...)")
    full = filled_in(request, config.sampling)
    check_settings(
        prompts=[request.prompt],
        negative_prompt=request.negative_prompt,
        seed=request.seed,
        clip_skip=request.clip_skip,
        noise=request.noise,
        **{setting: getattr(full, setting) for setting in SAMPLING},
    )
    channels, latent = config.unet.in_channels, config.unet.out_channels
    if channels not in (latent, 9):
        raise ValueError(
            f"{name} has {channels} input channels; text-to-image, image-to-image and inpainting are for models with "
            f"{latent} or 9"
        )
    if full.steps is not None and full.steps > config.schedule.steps:
        raise ValueError(f"steps must be a whole number in [1, {config.schedule.steps}], found {full.steps}")
    if request.clip_skip is not None and request.clip_skip >= config.clip.layers:
        raise ValueError(f"clip_skip must lie in [0, {config.clip.layers}), found {request.clip_skip}")
    if request.mask is not None and request.image is None:
        raise ValueError("a mask needs the image that it belongs to")
    size_of(request, config, None if request.image is None else (8, 8))  # any picture: what was asked for counts
    return full


class Plan(NamedTuple):
    """How to sample one picture, on the host. rows: with guidance filled in, float64[s, ...]; calls: the first rows,
    those that run; sigma: the level to start at.
    """

    rows: Rows
    calls: int
    sigma: float


def plan(request: Request, config: ModelConfig) -> Plan:
    """The rows for one picture's settings, read-only."""
    full = filled_in(request, config.sampling)
    settings = {name: getattr(full, name) for name in SAMPLING} | {"guidance_interval": tuple(full.guidance_interval)}
    return _plan(config.schedule, **settings)


@lru_cache(maxsize=256)
def _plan(
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
) -> Plan:
    schedule = noise_schedule(config)
    sigma = schedule.levels(steps, spacing)
    low, high = _interval(sigma, guidance_interval)
    sigma = sigma[start_step(steps, strength) :]
    chosen = SAMPLERS[sampler] if eta is None else ddim(eta)
    count = len(chosen.plan(sigma).scale) if len(sigma) > 1 else 0
    rows = chosen.rows(schedule, sigma, row_bound(count))
    inside = (low < rows.levels.sigma) & (rows.levels.sigma <= high) & (np.arange(len(rows.scale)) < count)
    scale = np.where(inside, guidance, 1.0)
    steering = Guidance(scale, np.where(inside, guidance_rescale, 0.0), scale != 1)
    rows = rows._replace(levels=rows.levels._replace(guidance=steering))
    jax.tree.map(lambda leaf: leaf.setflags(write=False), rows)  # others will be given the same
    return Plan(rows, count, float(sigma[0]))


SAMPLING = ("steps", "guidance", "guidance_rescale", "guidance_interval", "sampler", "spacing", "eta", "strength")
"""The fields of a request that its plan is made from."""


def row_bound(count: int) -> int:
    """The number of rows that a plan of `count` is filled up to."""
    return max(ROW_BOUND, 1 << max(0, count - 1).bit_length())


def stacked(plans: Sequence[Plan], *, alike: bool = False) -> tuple[Rows, np.ndarray]:
    """The plans of a batch as rows f32[s, b, ...], and how many of them run for each picture, i32[b].

    alike: all pictures count as guided where one of them is, and run as many rows as the longest plan has. No picture
    changes by it; devices that have parts of one product must take the same branches.
    """
    rows: Rows = jax.tree.map(lambda *leaves: np.stack(leaves, axis=1), *(plan.rows for plan in plans))
    rows = jax.tree.map(lambda leaf: leaf if leaf.dtype == bool else leaf.astype(np.float32), rows)
    counts = np.array([plan.calls for plan in plans], np.int32)
    if alike:
        assert rows.levels.guidance is not None
        used = rows.levels.guidance.used
        counts[:], used[:] = counts.max(), used.any(axis=1, keepdims=True)
    return rows, counts


def _interval(sigma: np.ndarray, fractions: tuple[float, float]) -> tuple[float, float]:
    """Fractions of the steps -> the sigmas (low, high] that the guided steps start from."""
    steps = len(sigma) - 1
    first, last = (round(fraction * steps) for fraction in fractions)
    high = np.inf if first == 0 else (sigma[first - 1] + sigma[first]) / 2
    low = -1.0 if last == steps else (sigma[last - 1] + sigma[last]) / 2 if last > 0 else np.inf
    return float(low), float(high)


def check_settings(
    *,
    prompts: Any = ("",),
    negative_prompt: Any = "",
    steps: Any = 25,
    guidance: Any = 7.5,
    guidance_rescale: Any = 0.0,
    guidance_interval: Any = (0.0, 1.0),
    sampler: Any = "dpmpp_2m",
    spacing: Any = "karras",
    eta: Any = None,
    seed: Any = 0,
    count: Any = 1,
    clip_skip: Any = None,
    strength: Any = None,
    noise: Any = "jax",
    batch: Any = BATCH,
) -> None:
    """Raises ValueError, naming the setting, what was expected and what was found, unless all are usable."""

    def need(good: bool, name: str, expected: str, found: Any) -> None:
        if not good:
            raise ValueError(f"{name} must be {expected}, found {found!r}")

    def is_int(value: Any) -> bool:
        return isinstance(value, int | np.integer) and not isinstance(value, bool)

    def is_real(value: Any, low: float = -np.inf, high: float = np.inf) -> bool:
        number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
        return number and low <= value <= high and abs(value) <= LARGEST_NUMBER

    good = isinstance(prompts, Sequence) and len(prompts) > 0 and all(isinstance(text, str) for text in prompts)
    need(good, "prompt", "a string, or a list of at least one string", prompts)
    need(isinstance(negative_prompt, str), "negative_prompt", "a string", negative_prompt)
    for name, text in (*(("prompt", text) for text in prompts), ("negative_prompt", negative_prompt)):
        whole = text.encode("utf-8", "replace").decode() == text
        need(whole, name, "text (half of a character, or bytes that are none, cannot be kept in a recipe)", text)
    need(is_int(steps) and steps > 0, "steps", "a whole number above 0", steps)
    need(is_real(guidance), "guidance", "a finite number", guidance)
    need(is_real(guidance_rescale, 0, 1), "guidance_rescale", "in [0, 1]", guidance_rescale)
    good = isinstance(guidance_interval, tuple | list) and len(guidance_interval) == 2
    good = (
        good and all(is_real(end, 0, 1) for end in guidance_interval) and guidance_interval[0] <= guidance_interval[1]
    )
    need(good, "guidance_interval", "two fractions of the steps, 0 <= start <= stop <= 1", guidance_interval)
    need(isinstance(sampler, str) and sampler in SAMPLERS, "sampler", f"one of {', '.join(SAMPLERS)}", sampler)
    need(spacing in SPACINGS, "spacing", f"one of {', '.join(SPACINGS)}", spacing)
    need(eta is None or sampler == "ddim", "eta", f"left out for {sampler} (it belongs to ddim)", eta)
    need(eta is None or is_real(eta, 0, 1), "eta", "in [0, 1]", eta)
    need(not isinstance(noise, str) or noise in NOISES, "noise", f"one of {', '.join(NOISES)}, or an array", noise)
    need(is_int(count) and count > 0, "count", "a whole number above 0", count)
    need(is_int(batch) and batch > 0, "batch", "a whole number above 0", batch)
    need(is_int(seed) and 0 <= seed <= 2**32 - count, "seed", "a whole number in [0, 2^32 - count]", seed)
    need(clip_skip is None or (is_int(clip_skip) and clip_skip >= 0), "clip_skip", "a whole number from 0", clip_skip)
    need(strength is None or is_real(strength, 0, 1), "strength", "in [0, 1]", strength)
