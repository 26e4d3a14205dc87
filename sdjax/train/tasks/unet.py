"""The training of the UNet, on latents and text states that are computed once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from sdjax.devices.platform import pinned
from sdjax.diffusion.schedule import noise_schedule
from sdjax.image import from_uint8
from sdjax.models.unet import UNet
from sdjax.models.vae import VAE, Posterior
from sdjax.pipeline.functions import encode_text
from sdjax.pipeline.pipeline import Pipeline
from sdjax.train.cache import cached, fingerprint
from sdjax.train.dataset import Dataset
from sdjax.train.losses import Metrics, diffusion_loss, drop_prompts
from sdjax.train.plots import sheet
from sdjax.train.settings import Settings
from sdjax.train.tasks.task import SHEET, Task, drawn, hash_of, token_ids, with_part
from sdjax.types import Array, Params


@pinned
def unet_task(model: Pipeline, data: Dataset, settings: Settings, cache: Path) -> Task:
    """The UNet by the prediction of the noise (or velocity), prompts dropped at times (Rombach et al. 2022, eq. 3).

    cache: a folder for latents and text states; they are computed at the first start, and again if the data, the
    autoencoder or the text encoder have changed. For 512x512 pictures a picture takes 131 kB and a caption 237 kB.

    Raises:
        ValueError: the UNet has channels that a plain picture cannot fill (inpainting models).
    """
    config = model.config
    if config.unet.in_channels != config.unet.out_channels:
        raise ValueError(
            f"{model.name} has {config.unet.in_channels} input channels; training is for models with as many as they "
            f"predict, {config.unet.out_channels}"
        )
    moments = _cached_moments(model, data, cache)
    captions = ["", *sorted({text for example in data.examples for text in example.captions})]
    row_of = {text: row for row, text in enumerate(captions)}
    states = _cached_states(model, captions, cache)
    schedule = noise_schedule(config.schedule)
    unet = UNet(config.unet, remat=settings.remat)

    def loss(params: Params, frozen: Params, batch: Any, key: Array) -> tuple[Array, Metrics]:
        drop_key, latent_key, noise_key = jax.random.split(key, 3)
        mean, logvar = jnp.split(batch["moments"], 2, axis=-1)
        latents = Posterior(mean, logvar).sample(latent_key) * config.vae.scaling_factor
        context = drop_prompts(batch["context"], frozen["empty"], drop_key, settings.prompt_dropout)

        def predict(x: Array, t: Array, context: Array) -> Array:
            return unet.apply({"params": params}, x, t, context)  # type: ignore[return-value]

        options = dict(min_snr=settings.min_snr, noise_offset=settings.noise_offset)
        prediction = config.schedule.prediction
        return diffusion_loss(predict, schedule, latents, context, noise_key, prediction=prediction, **options)  # type: ignore[arg-type]

    def batch(step: int) -> dict[str, np.ndarray]:
        index, texts = drawn(data, settings, step)
        return {"moments": moments[index], "context": states[[row_of[text] for text in texts]]}

    prompts = drawn(data, settings, 0)[1][:SHEET]

    def show(params: Params) -> Image.Image:
        """The first batch's captions, drawn by the model as it is now."""
        return sheet(finish(params).text_to_image(prompts, batch_size=len(prompts), weighting="none"), 4, prompts)

    def finish(params: Params) -> Pipeline:
        return with_part(model, "unet", params)

    frozen = {"empty": jnp.asarray(states[0])}
    return Task(model.params["unet"], frozen, loss, batch, show, finish)


def _cached_moments(model: Pipeline, data: Dataset, cache: Path) -> np.ndarray:
    """Mean and log-variance of every picture's latents, f32[n, h, w, 2c]."""
    config = model.config

    @jax.jit
    def encode(params: Params, pictures: Array) -> Array:
        def one(picture: Array) -> Array:
            images = from_uint8(picture)[None]
            posterior: Any = VAE(config.vae).apply({"params": params}, images, method="encode")
            return jnp.concatenate(posterior, axis=-1)[0]

        return jax.lax.map(one, pictures)

    def rows(first: int, last: int) -> np.ndarray:
        return np.asarray(encode(model.params["vae"], data.pictures(range(first, last), config.image_size)))

    cache.mkdir(parents=True, exist_ok=True)
    key = hash_of(fingerprint(data), config.vae, config.image_size, model.params["vae"])
    return cached(cache / "latents.npy", key, rows, len(data))


def _cached_states(model: Pipeline, captions: list[str], cache: Path) -> np.ndarray:
    """What the text encoder makes of every caption, f32[n, l, d]."""

    def rows(first: int, last: int) -> np.ndarray:
        ids = token_ids(model.tokenizer, model.config, captions[first:last])
        return np.asarray(encode_text(model.params["text"], ids, config=model.config), np.float32)

    cache.mkdir(parents=True, exist_ok=True)
    ids = token_ids(model.tokenizer, model.config, captions)
    key = hash_of(ids.tobytes(), model.config.clip, model.params["text"])
    return cached(cache / "text.npy", key, rows, len(captions))
