"""Text to image, image to image and inpainting: pure functions, and a thin `Pipeline` that feeds them.

The pure part is four functions of arrays: `encode_text`, `encode_images`, `generate_latents`, `decode_latents`. All
three tasks are the same `generate_latents`: a task only says where to start (noise, or a noised picture), what to hold
fixed (the known region) and what else to show the network (mask and masked picture).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from sdjax import image as images
from sdjax.config import ModelConfig
from sdjax.diffusion.denoiser import guided, keep_known, to_denoiser
from sdjax.diffusion.sample import image_keys, initial_noise, sample, stream, with_time_table
from sdjax.diffusion.samplers import SAMPLERS, Method, ddim
from sdjax.diffusion.schedule import SPACINGS, noise_schedule, start_step
from sdjax.models.clip import TextEncoder
from sdjax.models.unet import UNet
from sdjax.models.vae import VAE
from sdjax.tokenizer import Tokenizer
from sdjax.types import Array, Denoiser, Latent, Level, Params, Predictor

BATCH = 8
"""Pictures made at once; longer requests are worked through in batches of this size."""


class Inputs(NamedTuple):
    """What the denoiser is made from: everything that may change without compiling anew.

    unet: the UNet's parameters. context_kv: `UNet.text_kv` of the prompts, negative ones first if guided.
    guidance, rescale: f32[] or f32[b]. interval: the sigmas (low, high] in which guidance applies.
    known f32[b, h, w, 4] and mask f32[b, h, w, 1]: the region to keep, or None.
    concat f32[b, h, w, k]: channels behind the latent, or None.
    """

    unet: Params
    context_kv: Any
    guidance: Array
    rescale: Array
    interval: tuple[Array, Array]
    known: Array | None
    mask: Array | None
    concat: Array | None


@dataclass(frozen=True)
class MakeDenoiser:
    """Inputs -> Denoiser; equal for equal fields, so that it can be static under jit."""

    config: ModelConfig
    guided: bool

    def __call__(self, inputs: Inputs) -> Denoiser:
        unet = UNet(self.config.unet)

        def predict(x: Latent, level: Level) -> Any:
            if inputs.concat is not None:
                x = jnp.concatenate([x, inputs.concat], axis=-1)
            return unet.apply({"params": inputs.unet}, x, level.time, inputs.context_kv, method="predict")

        network: Predictor = predict
        if self.guided:
            network = guided(predict, inputs.guidance, inputs.rescale, inputs.interval)
        denoise = to_denoiser(network, self.config.schedule.prediction)
        if inputs.known is None or inputs.mask is None:
            return denoise
        return keep_known(denoise, inputs.known, inputs.mask)


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


@partial(jax.jit, static_argnames=("config", "method", "is_guided"))
def generate_latents(
    inputs: Inputs, rows: Any, x: Latent, keys: Array, *, config: ModelConfig, method: Method, is_guided: bool
) -> Latent:
    """The whole sampling loop as one program: x f32[b, h, w, 4] at the first row's level -> latents f32[b, h, w, 4].

    rows: a sampler's table (`Sampler.rows`) through `time_tables`. keys: key[b], one for each picture.
    """
    return sample(MakeDenoiser(config, is_guided), inputs, method, rows, x, keys)


def inpainting_channels(params: Params, pictures: Array, mask: Array, *, config: ModelConfig) -> Array:
    """What a 9-channel model sees besides the latent: mask, then the latent of the picture with the mask cut out.

    params: the "vae" tree. pictures f32[b, H, W, 3], mask f32[b, H, W, 1], 1 = paint; a soft mask cuts from 0.5 up.
    """
    masked = jnp.where(mask < 0.5, pictures, 0.0)
    small = images.latent_mask(mask, config.vae.downscale)
    hard = (small >= 0.5).astype(jnp.float32)
    return jnp.concatenate([hard, encode_images(params, masked, config=config)], axis=-1)


Progress = Callable[[int, int, Latent], None]
"""Called after every step with (steps done, steps in all, x0_hat f32[b, h, w, 4])."""


@dataclass(frozen=True)
class Pipeline:
    """A model ready for use: configuration, parameters {"text", "vae", "unet"}, tokenizer, and a name. No other state.

    Settings that all three tasks share (keywords; steps, guidance, sampler and spacing have the model's own defaults,
    `config.sampling`):
        negative_prompt: what to steer away from. steps: sampling steps, 1 to 1000. guidance: classifier-free guidance
        scale; 1 leaves the negative prompt out and halves the work. guidance_rescale: 0 to 1, against overexposure.
        guidance_interval: (start, stop) as fractions of the steps; outside it guidance is 1. sampler: a name from
        `SAMPLERS`. spacing: a name from `SPACINGS`. eta: noise of "ddim", 0 to 1. seed, count: seeds seed, seed + 1,
        ..., one for each picture of a prompt. clip_skip: layers of the text encoder left out (None: as trained).
        batch: pictures made at once. progress: called after every step.
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
        noise: Array | None = None,
        **settings: Any,
    ) -> list[Image.Image]:
        """Pictures for one prompt or several. width, height: multiples of 8, the model's own size if left out.

        noise: unit normal f32[b, h, w, 4] to start from instead of the seeds'.

        Raises:
            ValueError, TypeError: a setting is out of range or of the wrong kind; the message says what was expected.
        """
        own = self.config.image_size
        asked = (own if width is None else width, own if height is None else height)
        size = images.working_size(asked, asked=asked, multiple=self.config.vae.downscale)
        return self._generate(prompt, negative_prompt, size, noise, None, None, 1.0, **settings)

    def image_to_image(
        self,
        prompt: str | Sequence[str],
        image: images.ImageLike,
        negative_prompt: str = "",
        *,
        strength: float = 0.75,
        width: int | None = None,
        height: int | None = None,
        noise: Array | None = None,
        **settings: Any,
    ) -> list[Image.Image]:
        """Pictures that start from `image` noised to `strength` (0: only through the autoencoder; 1: noise alone).

        Without width and height the results have the size of `image`. Raises as `text_to_image`, and FileNotFoundError.
        """
        original = images.load_image(image)
        size = self._size(original, width, height)
        picture = images.fit(original, size)
        results = self._generate(prompt, negative_prompt, size, noise, picture, None, strength, **settings)
        return results if width and height else [_resized(result, original.size) for result in results]

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
        noise: Array | None = None,
        **settings: Any,
    ) -> list[Image.Image]:
        """Pictures in which the white part of `mask` is made anew; where it is black they are `image` to the byte.

        A model with 9 input channels sees the mask; with any other the known region is held at every step.
        Without width and height the results have the size of `image`. Raises as `image_to_image`.
        """
        original = images.load_image(image)
        whole = images.load_mask(mask, original.size)
        size = self._size(original, width, height)
        picture = images.fit(original, size)
        small = images.load_mask(images.fit(Image.fromarray(np.round(whole * 255).astype(np.uint8)), size), size)
        results = self._generate(prompt, negative_prompt, size, noise, picture, small, strength, **settings)
        if width and height:
            return [images.paste_back(picture, result, small) for result in results]
        return [images.paste_back(original, _resized(result, original.size), whole) for result in results]

    def _size(self, image: Image.Image, width: int | None, height: int | None) -> tuple[int, int]:
        if (width is None) != (height is None):
            raise ValueError("give both width and height, or neither")
        asked = (width, height) if width is not None and height is not None else None
        return images.working_size(image.size, asked=asked, multiple=self.config.vae.downscale)

    def _generate(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str,
        size: tuple[int, int],
        noise: Array | None,
        picture: Image.Image | None,
        mask: np.ndarray | None,
        strength: float,
        /,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        sampler: str | None = None,
        spacing: str | None = None,
        eta: float | None = None,
        seed: int = 0,
        count: int = 1,
        clip_skip: int | None = None,
        batch: int = BATCH,
        progress: Progress | None = None,
    ) -> list[Image.Image]:
        config, params = self.config, self.params
        steps = config.sampling.steps if steps is None else steps
        guidance = config.sampling.guidance if guidance is None else guidance
        sampler = config.sampling.sampler if sampler is None else sampler
        spacing = config.sampling.spacing if spacing is None else spacing
        prompts = [prompt] if isinstance(prompt, str) else prompt
        check_settings(
            prompts=prompts,
            negative_prompt=negative_prompt,
            steps=steps,
            guidance=guidance,
            guidance_rescale=guidance_rescale,
            guidance_interval=guidance_interval,
            sampler=sampler,
            spacing=spacing,
            eta=eta,
            seed=seed,
            count=count,
            clip_skip=clip_skip,
            strength=strength,
            batch=batch,
        )
        plan = SAMPLERS[sampler] if eta is None else ddim(eta)
        schedule = noise_schedule(config.schedule)
        sigma = schedule.levels(steps, spacing)
        low, high = _interval(sigma, guidance_interval)
        sigma = sigma[start_step(steps, strength) :]

        is_guided = guidance != 1
        texts = [negative_prompt, *prompts] if is_guided else prompts
        ids = self.tokenizer(texts, config.clip.length, config.clip.pad_token)
        if ids.max() >= config.clip.vocab_size:
            raise ValueError(
                f"the tokenizer has tokens up to {ids.max()} and the model {config.clip.vocab_size}; "
                "use the tokenizer that belongs to the model"
            )
        context = encode_text(params["text"], ids, config=config, skip=clip_skip)
        rows = plan.rows(schedule, sigma) if len(sigma) > 1 else None
        if rows is not None:
            rows = time_tables(params["unet"], rows, config=config)

        known = concat = small = None
        if picture is not None:
            array = jnp.asarray(images.to_array(picture))[None]
            known = encode_images(params["vae"], array, config=config)
            if mask is not None:
                whole = jnp.asarray(mask)[None, ..., None]
                small = images.latent_mask(whole, config.vae.downscale)
                if not small.any():
                    cell = config.vae.downscale
                    raise ValueError(
                        f"the mask is too fine and would paint nothing; make it {cell} pixels wide or more"
                    )
                if config.unet.in_channels == 9:
                    concat = inpainting_channels(params["vae"], array, whole, config=config)
        if config.unet.in_channels == 9 and concat is None:
            concat = self._no_picture(size)
        extra = config.unet.in_channels - config.unet.out_channels
        if extra != (0 if concat is None else concat.shape[-1]):
            raise ValueError(
                f"{self.name} has {config.unet.in_channels} input channels; text-to-image, image-to-image and "
                "inpainting are for models with 4 or 9"
            )

        jobs = [(i, seed + j) for i in range(len(prompts)) for j in range(count)]
        size_latent = (size[1] // config.vae.downscale, size[0] // config.vae.downscale, config.vae.latent_channels)
        if noise is not None and np.shape(noise) != (len(jobs), *size_latent):
            raise ValueError(f"noise must have the shape {(len(jobs), *size_latent)}, found {np.shape(noise)}")
        results: list[Image.Image] = []
        batch = min(batch, len(jobs))
        for first in range(0, len(jobs), batch):
            part = jobs[first : first + batch]
            padded = part + part[-1:] * (batch - len(part))  # one batch size, one compiled program
            keys = image_keys([image_seed for _, image_seed in padded])
            rows_of_text = jnp.asarray([i for i, _ in padded])
            chosen = context[rows_of_text + 1] if is_guided else context[rows_of_text]
            if is_guided:
                chosen = jnp.concatenate([jnp.broadcast_to(context[:1], chosen.shape), chosen])
            unit = (
                initial_noise(keys, size_latent)
                if noise is None
                else jnp.asarray(noise)[jnp.minimum(jnp.arange(first, first + batch), len(jobs) - 1)]
            )
            x = _start(unit, sigma[0], known, small, pure_noise=strength == 1)
            inputs = Inputs(
                params["unet"],
                text_kv(params["unet"], chosen, config=config),
                jnp.float32(guidance),
                jnp.float32(guidance_rescale),
                (jnp.float32(low), jnp.float32(high)),
                known if small is not None and config.unet.in_channels != 9 else None,
                small if config.unet.in_channels != 9 else None,
                None if concat is None else jnp.broadcast_to(concat, (batch, *concat.shape[1:])),
            )
            latents = _run(inputs, rows, x, keys, config, plan.method, is_guided, progress)
            pixels = decode_latents(params["vae"], latents, config=config)[: len(part)]
            results += images.to_images(pixels)
        return results

    def _no_picture(self, size: tuple[int, int]) -> Array:
        """For a 9-channel model without a picture: everything is to be painted, and what is there is grey."""
        grey = jnp.zeros((1, size[1], size[0], self.config.vae.image_channels))
        everything = jnp.ones((1, size[1], size[0], 1))
        return inpainting_channels(self.params["vae"], grey, everything, config=self.config)


def _run(
    inputs: Inputs,
    rows: Any,
    x: Latent,
    keys: Array,
    config: ModelConfig,
    method: Method,
    is_guided: bool,
    progress: Progress | None,
) -> Latent:
    """All rows in one program, or one by one where somebody wants to see the progress."""
    if rows is None:
        return x
    if progress is None:
        return generate_latents(inputs, rows, x, keys, config=config, method=method, is_guided=is_guided)
    total = rows.levels.sigma.shape[0]
    steps = stream(MakeDenoiser(config, is_guided), inputs, method, rows, x, keys)
    for done, (after, x0_hat) in enumerate(steps, 1):
        progress(done, total, x0_hat)
        x = after
    return x


def _start(unit: Array, sigma: float, known: Array | None, mask: Array | None, *, pure_noise: bool) -> Latent:
    """Where sampling starts, f32[b, h, w, c] in sigma space.

    Pure noise is the prior N(0, I) of the variance-preserving view: sqrt(sigma^2 + 1) noise. A picture starts at
    known + sigma noise, and so does the known region of inpainting even where the rest is pure noise.
    """
    if known is None:
        return unit * np.float32(np.sqrt(sigma**2 + 1))
    noised = known + np.float32(sigma) * unit
    if not pure_noise:
        return noised
    prior = unit * np.float32(np.sqrt(sigma**2 + 1))
    return prior if mask is None else noised + mask * (prior - noised)


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


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
        return number and bool(np.isfinite(value)) and low <= value <= high

    good = isinstance(prompts, Sequence) and len(prompts) > 0 and all(isinstance(text, str) for text in prompts)
    need(good, "prompt", "a string, or a list of at least one string", prompts)
    need(isinstance(negative_prompt, str), "negative_prompt", "a string", negative_prompt)
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
    need(is_int(count) and count > 0, "count", "a whole number above 0", count)
    need(is_int(batch) and batch > 0, "batch", "a whole number above 0", batch)
    need(is_int(seed) and 0 <= seed <= 2**32 - count, "seed", "a whole number in [0, 2^32 - count]", seed)
    need(clip_skip is None or (is_int(clip_skip) and clip_skip >= 0), "clip_skip", "a whole number from 0", clip_skip)
    need(strength is None or is_real(strength, 0, 1), "strength", "in [0, 1]", strength)
