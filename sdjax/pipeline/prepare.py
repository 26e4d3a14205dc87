"""One request, prepared on the host: its plan, its prompts, its adapters, its pictures as latents."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from sdjax import image as images
from sdjax.config import ModelConfig
from sdjax.diffusion.plan import Plan, calls_per_step
from sdjax.diffusion.torch_noise import torch_noise
from sdjax.models.adapters import NO_GATES
from sdjax.pipeline.adapters import Adapted, Weights
from sdjax.pipeline.functions import inpainting_channels
from sdjax.request import Request, check_request, plan, size_of
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


Sources = dict[Any, Source]
"""Encoded pictures, by the content of picture and mask and the size asked for: a picture that many requests start from
is encoded once.
"""


class Prepared(NamedTuple):
    """A request that is ready to run.

    prompts: laid out for the text encoder.
    weights: the adapters that it shares parameters or a batch by; None without.
    gates: f[sections, R], its weights of their ranks.
    pure: whether it starts from noise alone.
    shape: requests with equal ones can run together.
    """

    request: Request
    plan: Plan
    source: Source
    prompts: Prompts
    weights: Weights | None
    gates: np.ndarray
    pure: bool
    shape: tuple[Any, ...]


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
    hashes = [None if file is None else images.content_hash(file) for file in (request.image, request.mask)]
    key = (*hashes, request.width, request.height, request.tiling)
    if key not in sources:
        if len(sources) >= SOURCES:
            del sources[next(iter(sources))]
        sources[key] = _source(request, config, encode)
    source = sources[key]
    latent = source.known.shape[1:]
    if not isinstance(request.noise, str) and np.shape(request.noise) != latent:
        raise ValueError(f"noise must have the shape {latent} for each picture, found {np.shape(request.noise)}")
    planned = plan(full, config)
    negative, positive = readings(full, config)
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
    shape = (source.size, request.tiling, request.clip_skip, len(planned.rows.scale), *shape_of(prompts), weights)
    return Prepared(
        request, planned, source, prompts, weights, gates, request.image is None or full.strength == 1, shape
    )


def readings(full: Request, config: ModelConfig) -> tuple[Reading | np.ndarray, Reading | np.ndarray]:
    """A request's negative prompt and prompt, read. full: with every default in its place.

    What there is to tell of them is told as warnings.

    Raises:
        ValueError: they cannot be used.
    """
    steps = (full.steps or 1) * calls_per_step(full.sampler or "")
    positive = reading(full.to_prompt if full.travel == 1 else full.prompt, full.weighting, steps, config)
    is_used = full.guidance != 1 or (isinstance(positive, Reading) and [part.weight for part in positive.parts] != [1])
    negative = reading(full.negative_prompt if is_used else "", full.weighting, steps, config, negative=True)
    for prompt in (positive, negative):
        for note in prompt.notes if isinstance(prompt, Reading) else ():
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
    prompt: str | np.ndarray, weighting: str, steps: int, config: ModelConfig, *, negative: bool = False
) -> Reading | np.ndarray:
    """A prompt, read; one that is encoded already is checked and stays as it is.

    Raises:
        ValueError: it cannot be used.
    """
    if isinstance(prompt, str):
        return read(prompt, weighting, steps=steps, negative=negative)
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


def initial_noise_of(one: Prepared) -> Any:
    """Unit normal noise f32[h, w, c] that does not come from JAX: the request's own, PyTorch's, or None."""
    request = one.request
    if not isinstance(request.noise, str):
        return request.noise
    if request.noise == "jax":
        return None
    height, width, channels = one.source.known.shape[1:]
    return torch_noise(request.seed, (channels, height, width)).transpose(1, 2, 0)


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


class Pixels(NamedTuple):
    """A request's picture and mask on the host, as the networks will see them. size: (width, height) to work at.

    picture: f32[1, H, W, 3], zeros without one; mask: f32[1, H, W, 1], and cells: f32[1, h, w, 1], of the latent's
    grid; ones without a mask. finish: from what the model made to what was asked for.
    """

    size: tuple[int, int]
    picture: np.ndarray
    mask: np.ndarray
    cells: np.ndarray
    finish: Callable[[Image.Image], Image.Image]


def pixels_of(request: Request, config: ModelConfig) -> Pixels:
    """Opens and fits the picture and the mask of a request; no network is needed for it.

    Raises:
        FileNotFoundError: no such file. ValueError: it cannot be read, or the mask does not fit or regenerates nothing.
    """
    cell = config.vae.downscale
    if request.image is None:
        size = size_of(request, config, None)
        empty = np.zeros((1, size[1], size[0], config.vae.image_channels), np.float32)
        whole = np.ones((1, size[1], size[0], 1), np.float32)
        return Pixels(size, empty, whole, images.latent_mask(whole, cell), lambda result: result)
    original = images.load_image(request.image)
    size = size_of(request, config, original.size)
    asked, picture = request.width is not None, images.fit(original, size)
    array, whole = images.to_array(picture)[None], np.ones((1, size[1], size[0], 1), np.float32)
    if request.mask is None:
        return Pixels(
            size,
            array,
            whole,
            images.latent_mask(whole, cell),
            lambda result: result if asked else _resized(result, original.size),
        )
    given = images.load_mask(request.mask, original.size)
    fitted = images.load_mask(images.fit(Image.fromarray(np.round(given * 255).astype(np.uint8)), size), size)
    whole = fitted[None, ..., None]
    cells = images.latent_mask(whole, cell)
    if not cells.any():
        raise ValueError(f"the mask is too fine and would regenerate nothing; make it {cell} pixels wide or more")

    def finish(result: Image.Image) -> Image.Image:
        if asked:
            return images.paste_back(picture, result, fitted)
        return images.paste_back(original, _resized(result, original.size), given)

    return Pixels(size, array, whole, cells, finish)


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)
