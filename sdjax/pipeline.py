"""Text to image, image to image and inpainting: pure functions, and a thin `Pipeline` that feeds them.

The pure part is four functions of arrays: `encode_text`, `encode_images`, `generate_latents`, `decode_latents`. All
three tasks are the same `generate_latents`: a task only says where to start (noise, or a noised picture), what to hold
fixed (the known region) and what else to show the network (mask and masked picture).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from sdjax import image as images
from sdjax.config import ModelConfig
from sdjax.diffusion.denoiser import guided, keep_known, to_denoiser
from sdjax.diffusion.sample import image_keys, initial_noise, sample, stream, with_time_table
from sdjax.diffusion.samplers import Rows
from sdjax.diffusion.schedule import per_image
from sdjax.diffusion.torch_noise import torch_noise
from sdjax.models.clip import TextEncoder
from sdjax.models.unet import UNet
from sdjax.models.vae import VAE
from sdjax.request import BATCH, SAMPLING, Plan, Request, check_settings, filled_in, plan, stacked
from sdjax.tokenizer import Tokenizer
from sdjax.types import Array, Denoiser, Latent, Level, Params

SOURCES = 64
"""Prepared pictures that are kept for later requests with the same one."""

WAITING = 8
"""Batches of requests that may wait for others of their shape."""


class Inputs(NamedTuple):
    """What the denoiser is made from: everything that may change without compiling anew.

    unet: the UNet's parameters. context_kv: `UNet.text_kv` of the negative prompts, then of the prompts, 2b rows.
    known f32[b, h, w, 4] and mask f32[b, h, w, 1]: the region to keep, where the mask is 0 (all 1: nothing is kept).
    concat f32[b, h, w, k]: channels behind the latent; k = 0 for models without.
    """

    unet: Params
    context_kv: Any
    known: Array
    mask: Array
    concat: Array


@dataclass(frozen=True)
class MakeDenoiser:
    """Inputs -> Denoiser; equal for equal fields, so that it can be static under jit."""

    config: ModelConfig

    def __call__(self, inputs: Inputs) -> Denoiser:
        unet = UNet(self.config.unet)

        def predict(kv: Any, x: Latent, level: Level) -> Any:
            x = jnp.concatenate([x, inputs.concat], axis=-1)
            return unet.apply({"params": inputs.unet}, x, level.time, kv, method="predict")

        positive = jax.tree.map(lambda leaf: leaf[leaf.shape[0] // 2 :], inputs.context_kv)
        network = guided(partial(predict, inputs.context_kv), partial(predict, positive))
        return keep_known(to_denoiser(network, self.config.schedule.prediction), inputs.known, inputs.mask)


@partial(jax.jit, static_argnames=("config", "skip"))
def encode_text(params: Params, ids: Array, *, config: ModelConfig, skip: int | None = None) -> Array:
    """Token ids i32[b, l] -> the context f[b, l, d] that the UNet attends to. params: the "text" tree."""
    return TextEncoder(config.clip).apply({"params": params}, ids, skip).last_hidden_state  # type: ignore


@partial(jax.jit, static_argnames="config")
def encode_images(params: Params, pictures: Array, *, config: ModelConfig) -> Latent:
    """Pictures f32[b, H, W, 3] in [-1, 1] -> scaled latents f32[b, h, w, 4], the posterior's mean, one at a time."""

    def encode(picture: Array) -> Array:
        posterior: Any = VAE(config.vae).apply({"params": params}, picture[None], method="encode")
        return posterior.mean[0] * config.vae.scaling_factor

    return jax.lax.map(encode, pictures)


@partial(jax.jit, static_argnames="config")
def decode_latents(params: Params, latents: Latent, *, config: ModelConfig) -> Array:
    """Scaled latents f32[b, h, w, 4] -> pictures u8[b, H, W, 3], one at a time so that memory stays bounded."""

    def decode(latent: Array) -> Array:
        z = latent[None] / config.vae.scaling_factor
        picture: Any = VAE(config.vae).apply({"params": params}, z, method="decode")
        return images.to_uint8(picture)[0]

    return jax.lax.map(decode, latents)


@partial(jax.jit, static_argnames="config")
def text_kv(params: Params, context: Array, *, config: ModelConfig) -> Any:
    """The context's keys and values for every cross-attention, computed once per prompt."""
    return UNet(config.unet).apply({"params": params}, context, method="text_kv")


@partial(jax.jit, static_argnames="config")
def time_tables(params: Params, rows: Any, *, config: ModelConfig) -> Any:
    """A sampler's rows with the UNet's time shifts for all steps at once."""
    return with_time_table(rows, lambda t: UNet(config.unet).apply({"params": params}, t, method="time_table"))


@partial(jax.jit, static_argnames="config")
def generate_latents(
    inputs: Inputs, rows: Rows, count: Array, x: Latent, keys: Array, *, config: ModelConfig
) -> Latent:
    """The whole sampling loop as one program: x f32[b, h, w, 4] at the first row's level -> latents f32[b, h, w, 4].

    rows: `request.stacked` plans through `time_tables`, [s, b, ...]; count: i32[], those that run. keys: key[b], one
    for each picture.
    """
    return sample(MakeDenoiser(config), inputs, rows, x, keys, count)


@jax.jit
def start(unit: Array, sigma: Array, known: Latent, mask: Array, from_noise: Array) -> Latent:
    """Where sampling starts, f32[b, h, w, c] in sigma space. unit: unit normal noise; sigma f32[b]; from_noise bool[b].

    Pure noise is the prior N(0, I) of the variance-preserving view: sqrt(sigma^2 + 1) noise. A picture starts at
    known + sigma noise, and so does the known region of inpainting (mask 0) even where the rest is pure noise.
    """
    noised = known + per_image(sigma, unit) * unit
    pure = per_image(jnp.sqrt(sigma**2 + 1), unit) * unit
    weight = per_image(from_noise, unit) * mask
    return jnp.where(weight == 1, pure, noised + weight * (pure - noised))


@jax.jit
def all_finite(latents: Latent) -> Array:
    """bool[b]: whether a picture's latents f32[b, h, w, c] hold neither infinity nor NaN."""
    return jnp.isfinite(latents).all((1, 2, 3))


def inpainting_channels(params: Params, pictures: Array, mask: Array, *, config: ModelConfig) -> Array:
    """What a 9-channel model sees besides the latent: mask, then the latent of the picture with the mask cut out.

    params: the "vae" tree. pictures f32[b, H, W, 3], mask f32[b, H, W, 1], 1 = paint; a soft mask cuts from 0.5 up.
    """
    masked = jnp.where(mask < 0.5, pictures, 0.0)
    small = images.latent_mask(mask, config.vae.downscale)
    hard = (small >= 0.5).astype(jnp.float32)
    return jnp.concatenate([hard, encode_images(params, masked, config=config)], axis=-1)


Progress = Callable[[int, int, Latent], None]
"""Called after every row of the sampler with (rows done, rows in all, x0_hat f32[b, h, w, 4])."""


class Source(NamedTuple):
    """What a request's picture has become, one row each. known: its scaled latents, or zeros; mask: ones where nothing
    is kept; concat: what an inpainting model sees besides. finish: from what the model made to what was asked for.
    """

    size: tuple[int, int]
    known: Latent
    mask: Array
    concat: Array
    finish: Callable[[Image.Image], Image.Image]


Sources = dict[Any, tuple[Request, Source]]
"""Prepared pictures by what names them, each with the first request that had it."""


class Prepared(NamedTuple):
    """A request that is ready to run. shape: only jobs of one shape can run together."""

    request: Request
    plan: Plan
    source: Source
    texts: tuple[str, str]  # negative, positive
    from_noise: bool
    shape: tuple[Any, ...]


@dataclass(frozen=True)
class Pipeline:
    """A model ready for use: configuration, parameters {"text", "vae", "unet"}, tokenizer, and a name. No other state.

    Settings that all three tasks share are the fields of `Request`, by keyword, and besides
        count: pictures of each prompt, with seeds seed, seed + 1, ...; batch: pictures made at once; progress: called
        after every row of the sampler.
    Results come prompt by prompt, seeds in order within a prompt. A picture depends on its own prompt, settings and
    seed alone, not on what else is in the batch.
    """

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer
    name: str = "unnamed"

    def text_to_image(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str = "",
        *,
        width: int | None = None,
        height: int | None = None,
        noise: str | Array = "jax",
        **settings: Any,
    ) -> list[Image.Image]:
        """Pictures for one prompt or several. width, height: multiples of 8, the model's own size if left out.

        noise: "jax", "torch" (PyTorch's for the same seeds), or unit normal f32[b, h, w, 4] to start from.

        Raises:
            ValueError, TypeError: a setting is out of range or of the wrong kind; the message says what was expected.
        """
        for name in ("image", "mask", "strength"):
            if name in settings:
                raise TypeError(f"text_to_image starts from noise and has no {name}; see image_to_image and inpaint")
        return self._pictures(prompt, negative_prompt, noise, width=width, height=height, **settings)

    def image_to_image(
        self,
        prompt: str | Sequence[str],
        image: images.ImageLike,
        negative_prompt: str = "",
        *,
        strength: float = 0.75,
        width: int | None = None,
        height: int | None = None,
        noise: str | Array = "jax",
        **settings: Any,
    ) -> list[Image.Image]:
        """Pictures that start from `image` noised to `strength` (0: only through the autoencoder; 1: noise alone).

        Without width and height the results have the size of `image`. Raises as `text_to_image`, and FileNotFoundError.
        """
        settings |= dict(image=images.load_image(image), strength=strength, width=width, height=height)
        return self._pictures(prompt, negative_prompt, noise, **settings)

    def inpaint(
        self,
        prompt: str | Sequence[str],
        image: images.ImageLike,
        mask: images.ImageLike,
        negative_prompt: str = "",
        *,
        strength: float = 1.0,
        width: int | None = None,
        height: int | None = None,
        noise: str | Array = "jax",
        **settings: Any,
    ) -> list[Image.Image]:
        """Pictures in which the white part of `mask` is made anew; where it is black they are `image` to the byte.

        A model with 9 input channels sees the mask; with any other the known region is held at every step.
        Without width and height the results have the size of `image`. Raises as `image_to_image`.
        """
        settings |= dict(image=images.load_image(image), mask=mask, strength=strength, width=width, height=height)
        return self._pictures(prompt, negative_prompt, noise, **settings)

    def batch(
        self,
        requests: Iterable[Request],
        *,
        batch: int = BATCH,
        on_error: Callable[[Request, Exception], None] | None = None,
    ) -> Iterator[tuple[Request, Image.Image]]:
        """Each request with its picture, as they become ready: requests of one size run together, `batch` at a time.

        Requests may differ in everything; those of one shape (size, clip_skip, up to 64 rows of a sampler, then up to
        128, ...) share one compiled program, and each picture equals the one made alone. Requests are taken as they are
        needed: memory stays bounded over any number of them. What is left at the end runs in batches filled up with
        copies. on_error: called for a request that cannot be made, and the others go on; without it, the error is
        raised.

        Raises:
            ValueError, TypeError, FileNotFoundError: as `text_to_image`, when the request is taken.
            FloatingPointError: a picture came out as NaN or infinity.
        """
        check_settings(batch=batch)
        waiting: dict[tuple[Any, ...], list[Prepared]] = {}
        sources: Sources = {}

        def batches() -> Iterator[list[Prepared]]:
            for request in requests:
                try:
                    ready = self._prepared(request, sources)
                except (ValueError, TypeError, OSError) as error:
                    if on_error is None:
                        raise
                    on_error(request, error)
                    continue
                same = waiting.setdefault(ready.shape, [])
                same.append(ready)
                if len(same) == batch:
                    yield waiting.pop(ready.shape)
                elif sum(map(len, waiting.values())) >= WAITING * batch:
                    yield waiting.pop(max(waiting, key=lambda shape: len(waiting[shape])))
            yield from waiting.values()

        before: tuple[list[Prepared], tuple[Array, Array]] | None = None
        for part in batches():
            result = self._run(part, batch, None)  # under way while the batch before is handed out
            if before is not None:
                yield from self._finished(*before, on_error)
            before = part, result
        if before is not None:
            yield from self._finished(*before, on_error)

    def _pictures(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str,
        noise: str | Array,
        /,
        *,
        seed: int = 0,
        count: int = 1,
        batch: int = BATCH,
        progress: Progress | None = None,
        **settings: Any,
    ) -> list[Image.Image]:
        """One request for each prompt and seed, in batches."""
        check_settings(prompts=[prompt] if isinstance(prompt, str) else prompt, seed=seed, count=count, batch=batch)
        prompts = [prompt] if isinstance(prompt, str) else prompt
        total = len(prompts) * count
        if not isinstance(noise, str) and (np.ndim(noise) != 4 or len(noise) != total):
            raise ValueError(f"noise must have the shape ({total}, h, w, c), found {np.shape(noise)}")
        own: list[Any] = [noise] * total if isinstance(noise, str) else list(noise)
        requests = [
            Request(text, negative_prompt, seed + j, noise=own[i * count + j], **settings)
            for i, text in enumerate(prompts)
            for j in range(count)
        ]
        sources: Sources = {}
        ready = [self._prepared(request, sources) for request in requests]
        batch = min(batch, total)
        results: list[Image.Image] = []
        for first in range(0, total, batch):
            part = ready[first : first + batch]
            results += [picture for _, picture in self._finished(part, self._run(part, batch, progress), None)]
        return results

    def _prepared(self, request: Request, sources: Sources) -> Prepared:
        """Checks a request and does all that can be done for it alone. sources: pictures that were prepared before."""
        config = self.config
        full = filled_in(request, config.sampling)
        check_settings(
            prompts=[request.prompt],
            negative_prompt=request.negative_prompt,
            seed=request.seed,
            clip_skip=request.clip_skip,
            noise=request.noise,
            **{name: getattr(full, name) for name in SAMPLING},
        )
        worked_out = plan(full, config)
        key = (*(_name(file) for file in (request.image, request.mask)), request.width, request.height)
        if key not in sources:
            if len(sources) >= SOURCES:
                del sources[next(iter(sources))]
            sources[key] = request, self._source(request)  # the request keeps its pictures, and so their ids, alive
        _, source = sources[key]
        latent = source.known.shape[1:]
        if not isinstance(request.noise, str) and np.shape(request.noise) != latent:
            raise ValueError(f"noise must have the shape {latent} for each picture, found {np.shape(request.noise)}")
        texts = ("" if full.guidance == 1 else request.negative_prompt, request.prompt)
        shape = (source.size, request.clip_skip, len(worked_out.rows.scale))
        return Prepared(request, worked_out, source, texts, request.image is None or full.strength == 1, shape)

    def _source(self, request: Request) -> Source:
        """The picture and mask of a request, or what stands for them in text to image."""
        config, params = self.config, self.params["vae"]
        extra = config.unet.in_channels - config.unet.out_channels
        sees_mask = config.unet.in_channels == 9
        if extra != 0 and not sees_mask:
            raise ValueError(
                f"{self.name} has {config.unet.in_channels} input channels; text-to-image, image-to-image and "
                "inpainting are for models with 4 or 9"
            )
        if request.image is None:
            if request.mask is not None:
                raise ValueError("a mask needs the image that it belongs to")
            side = config.image_size
            asked: tuple[int, int] | None = (
                side if request.width is None else request.width,
                side if request.height is None else request.height,
            )
            size = images.working_size((side, side), asked=asked, multiple=config.vae.downscale)
        else:
            original = images.load_image(request.image)
            if (request.width is None) != (request.height is None):
                raise ValueError("give both width and height, or neither")
            asked = None if request.width is None or request.height is None else (request.width, request.height)
            size = images.working_size(original.size, asked=asked, multiple=config.vae.downscale)
        height, width = size[1] // config.vae.downscale, size[0] // config.vae.downscale
        known = jnp.zeros((1, height, width, config.vae.latent_channels))
        mask, concat = jnp.ones((1, height, width, 1)), jnp.zeros((1, height, width, 0))

        def finish(result: Image.Image) -> Image.Image:
            return result

        array = jnp.zeros((1, size[1], size[0], config.vae.image_channels))  # an inpainting model without a picture
        whole = jnp.ones((1, size[1], size[0], 1))  # sees that everything is to be painted
        if request.image is not None:
            picture = images.fit(original, size)
            array = jnp.asarray(images.to_array(picture))[None]
            known = encode_images(params, array, config=config)

            def finish(result: Image.Image) -> Image.Image:
                return result if asked else _resized(result, original.size)

        if request.mask is not None:
            given = images.load_mask(request.mask, original.size)
            fitted = images.load_mask(images.fit(Image.fromarray(np.round(given * 255).astype(np.uint8)), size), size)
            whole = jnp.asarray(fitted)[None, ..., None]
            cells = images.latent_mask(whole, config.vae.downscale)
            if not cells.any():
                cell = config.vae.downscale
                raise ValueError(f"the mask is too fine and would paint nothing; make it {cell} pixels wide or more")
            mask = cells

            def finish(result: Image.Image) -> Image.Image:
                if asked:
                    return images.paste_back(picture, result, fitted)
                return images.paste_back(original, _resized(result, original.size), given)

        if sees_mask:
            concat = inpainting_channels(params, array, whole, config=config)
        return Source(size, known, mask, concat, finish)

    def _run(self, part: list[Prepared], batch: int, progress: Progress | None) -> tuple[Array, Array]:
        """Requests of one shape -> pictures u8[batch, H, W, 3], and whether each is finite, bool[batch].

        A short batch is filled up with copies of the last.
        """
        config, params = self.config, self.params
        whole = part + part[-1:] * (batch - len(part))
        texts = [one.texts[0] for one in whole] + [one.texts[1] for one in whole]
        ids = self.tokenizer(texts, config.clip.length, config.clip.pad_token)
        if ids.max() >= config.clip.vocab_size:
            raise ValueError(
                f"the tokenizer has tokens up to {ids.max()} and the model {config.clip.vocab_size}; "
                "use the tokenizer that belongs to the model"
            )
        context = encode_text(params["text"], ids, config=config, skip=whole[0].request.clip_skip)
        rows, count = stacked([one.plan for one in whole])
        rows = time_tables(params["unet"], rows, config=config)
        known, mask, concat = (
            jnp.concatenate([getattr(one.source, name) for one in whole]) for name in ("known", "mask", "concat")
        )
        keys = image_keys([one.request.seed for one in whole])
        unit = initial_noise(keys, known.shape[1:])
        if any(not isinstance(one.request.noise, str) or one.request.noise != "jax" for one in whole):
            unit = jnp.stack([_noise(one.request, own) for one, own in zip(whole, np.asarray(unit), strict=True)])
        sigma, from_noise = (
            np.asarray(values) for values in zip(*((one.plan.sigma, one.from_noise) for one in whole), strict=True)
        )
        x = start(unit, sigma.astype(np.float32), known, mask, from_noise)
        held = jnp.ones_like(mask) if config.unet.in_channels == 9 else mask  # a model that sees the mask is free
        inputs = Inputs(params["unet"], text_kv(params["unet"], context, config=config), known, held, concat)
        if progress is None:
            latents = generate_latents(inputs, rows, np.int32(count), x, keys, config=config)
        else:
            latents = x
            steps = stream(MakeDenoiser(config), inputs, rows, x, keys, count)
            for done, (after, x0_hat) in enumerate(steps, 1):
                progress(done, count, x0_hat)
                latents = after
        return decode_latents(params["vae"], latents, config=config), all_finite(latents)

    def _finished(
        self,
        part: list[Prepared],
        result: tuple[Array, Array],
        on_error: Callable[[Request, Exception], None] | None,
    ) -> Iterator[tuple[Request, Image.Image]]:
        pictures, finite = images.to_images(result[0]), np.asarray(result[1])
        for ready, picture, good in zip(part, pictures, finite, strict=False):  # without what filled the batch up
            if good:
                yield ready.request, ready.source.finish(picture)
                continue
            dtype = jax.tree.leaves(self.params["unet"])[0].dtype
            error = FloatingPointError(
                f"the picture of seed {ready.request.seed} came out as NaN or infinity in {dtype}; try "
                f"{'float32' if dtype != np.float32 else 'less guidance, or another file of the model'}"
            )
            if on_error is None:
                raise error
            on_error(ready.request, error)


def _noise(request: Request, own: np.ndarray) -> Any:
    """Unit normal noise f32[h, w, c] as the request wants it; own: that of its seed's JAX key."""
    if not isinstance(request.noise, str):
        return request.noise
    height, width, channels = own.shape
    return own if request.noise == "jax" else torch_noise(request.seed, (channels, height, width)).transpose(1, 2, 0)


def _name(file: images.ImageLike | None) -> Any:
    """What a picture can be found again by while its request is alive."""
    return str(file) if isinstance(file, str | Path) else id(file)


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)
