"""One request, prepared on the host: its plan, its prompts, its adapters, its pictures as latents."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from sdjax import image as images
from sdjax.config import ModelConfig
from sdjax.diffusion.noise import picture_noise
from sdjax.diffusion.plan import Plan, calls_per_step
from sdjax.diffusion.upscale import PICTURE_UPSCALERS, upscaled_latents, upscaled_picture
from sdjax.models.adapters import NO_GATES
from sdjax.pipeline.adapters import Adapted, Weights
from sdjax.pipeline.functions import inpainting_channels
from sdjax.pipeline.pixels import pixels_of
from sdjax.request import Request, check_request, parse_size, plan, second_pass, with_defaults
from sdjax.text.prompt import Prompts, Reading, Words, lay_out, read, shape_of, single

SOURCES = 64
"""Encoded pictures that are kept for later requests with the same one."""


class Source(NamedTuple):
    """What a request's picture has become, with a first axis of 1.

    size: (width, height) in pixels.
    known: f32[1, h, w, c], its scaled latents, or zeros without a picture.
    mask: f32[1, h, w, 1], ones where nothing is kept.
    concat: f32[1, h, w, k], what an inpainting model sees besides the latent.
    finish: from what the model made to what was asked for.
    """

    size: tuple[int, int]
    known: Any
    mask: Any
    concat: Any
    finish: Callable[[Image.Image], Image.Image]


SHAPING = ("width", "height", "tiling", "outpaint", "feather", "only_masked", "soft_mask")
"""Settings that decide, with picture and mask, what a `Source` is."""

Sources = dict[Any, Source]
"""Encoded pictures, by the content of picture and mask and `SHAPING`: a picture that many requests start from is
encoded once.
"""


class Prepared(NamedTuple):
    """A request that is ready to run.

    prompts: laid out for the text encoder.
    weights: the adapters that it shares parameters or a batch by; None without.
    gates: f[sections, R], its weights of their ranks.
    pure: whether it starts from noise alone.
    adds: bool[s], the rows for which noise is drawn on the host (`noise_of`); None: the program draws what it adds.
    shape: requests with equal ones can run together.
    second: the second pass of hires-fix, which starts from what this one makes; None: this is the last.
    origin: the request that it is of, where `request` is its second pass; None: `request` itself.
    """

    request: Request
    plan: Plan
    source: Source
    prompts: Prompts
    weights: Weights | None
    gates: np.ndarray
    pure: bool
    adds: np.ndarray | None
    shape: tuple[Any, ...]
    second: Second | None = None
    origin: Request | None = None


class Second(NamedTuple):
    """A second pass, ready but for the latents that it starts from.

    one: of it, with zeros for these. upscaler: one of `UPSCALERS`. encode: as `prepare` has it.
    """

    one: Prepared
    upscaler: str
    encode: Callable[[np.ndarray], Any]

    @property
    def sees_picture(self) -> bool:
        """Whether it starts from the decoded picture, and not from the latents."""
        return self.upscaler in PICTURE_UPSCALERS

    def started(self, latents: np.ndarray, pixels: np.ndarray | None) -> Prepared:
        """The second pass from what the first has made: latents f32[h, w, c], and u8[H, W, 3] if it `sees_picture`."""
        source = self.one.source
        if pixels is not None and self.sees_picture:
            picture = upscaled_picture(Image.fromarray(pixels), source.size, self.upscaler)
            known = np.asarray(self.encode(images.to_array(picture)[None]))
            if not np.isfinite(latents).all():  # which bytes cannot say
                known = np.full_like(known, np.nan)
        else:
            height, width = source.known.shape[1:3]
            known = upscaled_latents(latents, (width, height), self.upscaler)[None]
        return self.one._replace(source=source._replace(known=known))


def prepare(
    request: Request,
    config: ModelConfig,
    name: str,
    *,
    words: Words,
    encode: Callable[[np.ndarray], Any],
    sources: Sources,
    adapt: Callable[[Request], Adapted] | None = None,
) -> Prepared:
    """Checks a request and does all that can be done for it alone.

    name: of the model, for messages.
    words: what prompts become tokens by.
    encode: a picture f32[1, H, W, 3] -> scaled latents f32[1, h, w, c].
    sources: pictures encoded before; what is encoded now is added.
    adapt: what the adapters that it names make of a request; None: it has none.

    Raises:
        TypeError, ValueError, OSError: the request cannot be made; the message says why.
    """
    full = check_request(request, config, name)
    has: dict[str, Any] = dict(words=words, encode=encode, sources=sources, adapt=adapt)
    one = _prepared(request, full, config, None, **has)
    second = second_pass(full, config)
    if second is None:
        return one
    resolved = with_defaults(second.request, config.sampling)
    later = _prepared(second.request, resolved, config, (full, second.steps), **has)
    later = later._replace(pure=False, origin=request)
    return one._replace(second=Second(later, request.hires_upscaler, encode))


def _prepared(
    request: Request,
    full: Request,
    config: ModelConfig,
    after: tuple[Request, int] | None,
    *,
    words: Words,
    encode: Callable[[np.ndarray], Any],
    sources: Sources,
    adapt: Callable[[Request], Adapted] | None,
) -> Prepared:
    """One pass. full: the request with every default in its place.

    after: the first pass, and how many steps of this one run; None: it is the first.
    """
    hashes = [None if file is None else images.content_hash(file) for file in (request.image, request.mask)]
    key = (*hashes, *(getattr(request, name) for name in SHAPING))
    if key not in sources:
        if len(sources) >= SOURCES:
            del sources[next(iter(sources))]
        sources[key] = _source(request, config, encode)
    source = sources[key]
    latent = source.known.shape[1:]
    if not isinstance(request.noise, str) and np.shape(request.noise) != latent:
        raise ValueError(f"noise must have the shape {latent} for each picture, found {np.shape(request.noise)}")
    planned = plan(full, config, None if after is None else after[1])
    negative, positive = readings(full, config, planned, after)
    adapted = Adapted(None, NO_GATES) if adapt is None else adapt(full)
    prompts = lay_out(
        negative,
        positive,
        words.with_embeddings(adapted.embeddings),
        rows=len(planned.rows.scale),
        weighting=full.weighting,
        pad_token=config.clip.pad_token,
        width=config.clip.width,
        toward=destination(full),
    )
    planned, (weights, gates, _) = steered(planned, prompts), adapted
    adds, pure = _adds(request, planned), request.image is None or full.strength == 1
    rows = len(planned.rows.scale)
    shape = (
        source.size,
        request.tiling,
        request.clip_skip,
        rows,
        0 if adds is None else rows,
        *shape_of(prompts),
        weights,
    )
    return Prepared(request, planned, source, prompts, weights, gates, pure, adds, shape)


def readings(
    full: Request, config: ModelConfig, planned: Plan, after: tuple[Request, int] | None = None
) -> tuple[Reading | np.ndarray, Reading | np.ndarray]:
    """A request's negative prompt and prompt, read. full: with every default in its place; planned: its rows.

    after: the first pass of a second one, and how many steps of this one run.

    What there is to tell of them is told as warnings.

    Raises:
        ValueError: they cannot be used.
    """
    first_pass = None if after is None else (after[0].steps or 1) * calls_per_step(after[0].sampler or "")
    steps = ((full.steps or 1) if after is None else after[1]) * calls_per_step(full.sampler or "")
    positive = reading(full.to_prompt if full.travel == 1 else full.prompt, full.weighting, steps, config, first_pass)
    guidance, parts = planned.rows.levels.guidance, positive.parts if isinstance(positive, Reading) else ()
    is_used = guidance is None or guidance.used.any() or (bool(parts) and [part.weight for part in parts] != [1])
    unwanted = full.negative_prompt if is_used else ""
    negative = reading(unwanted, full.weighting, steps, config, first_pass, negative=True)
    for prompt in (positive, negative):
        for note in prompt.notes if isinstance(prompt, Reading) and after is None else ():
            warnings.warn(note, stacklevel=2)
    return negative, positive


def destination(full: Request) -> tuple[Reading, float] | None:
    """The text that a request's prompt goes to, and how far it has gone; None at both ends."""
    if full.travel in (0, 1):
        return None
    found = single(full.to_prompt, full.weighting, "travel")
    for note in found.notes:
        warnings.warn(note, stacklevel=2)
    return found, full.travel


def reading(
    prompt: str | np.ndarray,
    weighting: str,
    steps: int,
    config: ModelConfig,
    first_pass: int | None = None,
    *,
    negative: bool = False,
) -> Reading | np.ndarray:
    """A prompt, read; one that is encoded already is checked and stays as it is.

    Raises:
        ValueError: it cannot be used.
    """
    if isinstance(prompt, str):
        return read(prompt, weighting, steps=max(steps, 1), first_pass=first_pass, negative=negative)
    array, clip = np.asarray(prompt, np.float32), config.clip
    if array.ndim != 2 or array.shape[1] != clip.width or not array.shape[0] or array.shape[0] % clip.length:
        raise ValueError(
            f"an encoded prompt must be f32[rows, {clip.width}] with rows a multiple of {clip.length}, "
            f"found {array.shape}; Pipeline.encode makes such"
        )
    if not np.isfinite(array).all():
        raise ValueError("an encoded prompt holds NaN or infinity; encode it again")
    return array


def steered(planned: Plan, prompts: Prompts) -> Plan:
    """The plan, with the negative prompt used throughout where the parts of a prompt have weights of their own."""
    if prompts.is_plain:
        return planned
    guidance = planned.rows.levels.guidance
    assert guidance is not None
    levels = planned.rows.levels._replace(guidance=guidance._replace(used=np.ones_like(guidance.used)))
    return planned._replace(rows=planned.rows._replace(levels=levels))


def _adds(request: Request, planned: Plan) -> np.ndarray | None:
    """bool[s], the rows that add noise which is drawn on the host; None where there are none, or the program draws."""
    adds = planned.rows.noise != 0
    return adds if isinstance(request.noise, str) and request.noise != "jax" and adds.any() else None


def noise_of(one: Prepared) -> tuple[Any, np.ndarray | None]:
    """Unit normal noise f32[h, w, c] to start from, and f32[s, h, w, c] that the rows add; None: the program draws."""
    request = one.request
    if not isinstance(request.noise, str):
        return request.noise, None
    if request.noise == "jax" and not request.variation_strength and request.seed_size is None:
        return None, None
    of_size = None
    if request.seed_size is not None:
        cell = one.source.size[0] // one.source.known.shape[2]  # pixels per cell
        width, height = parse_size(request.seed_size)
        of_size = height // cell, width // cell
    variation = None
    if request.variation_strength:
        assert request.variation_seed is not None
        variation = request.variation_seed, request.variation_strength
    shape = one.source.known.shape[1:]
    return picture_noise(request.noise, request.seed, shape, variation=variation, of_size=of_size, adds=one.adds)


def _source(request: Request, config: ModelConfig, encode: Callable[[np.ndarray], Any]) -> Source:
    """The picture and mask of a request, encoded, or what stands for them in text to image."""
    pixels = pixels_of(request, config)
    shape = (1, pixels.size[1] // config.vae.downscale, pixels.size[0] // config.vae.downscale)
    known: Any = np.zeros((*shape, config.vae.latent_channels), np.float32)
    concat: Any = np.zeros((*shape, 0), np.float32)
    if request.image is not None:
        known = encode(pixels.picture)
    if config.unet.in_channels == 9:
        concat = inpainting_channels(encode, pixels.picture, pixels.mask, downscale=config.vae.downscale)
    return Source(pixels.size, known, pixels.cells, concat, pixels.finish)
