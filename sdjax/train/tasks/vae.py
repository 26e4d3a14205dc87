"""The training of the autoencoder."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from PIL import Image

from sdjax.devices.platform import pinned
from sdjax.image import from_uint8, to_images, to_uint8
from sdjax.models.vae import VAE
from sdjax.pipeline.pipeline import Pipeline
from sdjax.train.dataset import Dataset
from sdjax.train.losses import Metrics, vae_loss
from sdjax.train.plots import sheet
from sdjax.train.settings import Settings
from sdjax.train.tasks.task import SHEET, Task, pictures_of, reader, with_part
from sdjax.types import Array, Params


@pinned
def vae_task(model: Pipeline, data: Dataset, settings: Settings, cache: Path) -> Task:
    """The autoencoder by the evidence lower bound, on pictures at the model's own size. Captions are not needed."""
    config, vae = model.config, VAE(model.config.vae)

    def loss(params: Params, frozen: Params, batch: Any, key: Array) -> tuple[Array, Metrics]:
        images = from_uint8(batch["pictures"])
        posterior: Any = vae.apply({"params": params}, images, method="encode")
        decode = partial(vae.apply, {"params": params}, method="decode")
        options = dict(sigma=settings.sigma, kl_weight=settings.kl_weight, l1=settings.l1)
        return vae_loss(decode, posterior, images, key, **options)  # type: ignore[arg-type]

    read = reader(data, config.image_size, cache)
    first = pictures_of(data, settings, 0, read)[:SHEET]

    @jax.jit
    def reconstruct(params: Params) -> Array:
        return to_uint8(vae.apply({"params": params}, from_uint8(jnp.asarray(first))))  # type: ignore[arg-type]

    def show(params: Params) -> Image.Image:
        return sheet([Image.fromarray(row) for row in first] + to_images(reconstruct(params)), len(first))

    return Task(
        params=model.params["vae"],
        frozen={},
        loss=loss,
        batch=lambda step: {"pictures": pictures_of(data, settings, step, read)},
        sheet=show,
        finish=lambda params: with_part(model, "vae", params),
    )
