"""The training of the text encoder, with an image encoder as its teacher."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from sdjax.config import CLIPVisionConfig
from sdjax.devices.platform import pinned, seeded_keys
from sdjax.image import from_uint8
from sdjax.models.clip import ImageEncoder, TextEncoder
from sdjax.models.params import initial_params
from sdjax.pipeline.pipeline import Pipeline
from sdjax.train.dataset import Dataset
from sdjax.train.losses import Metrics, contrastive_loss, unit
from sdjax.train.plots import sheet
from sdjax.train.settings import Settings
from sdjax.train.tasks.task import SHEET, Task, drawn, pictures_of, reader, token_ids, with_part
from sdjax.types import Array, Params


@pinned
def clip_task(model: Pipeline, vision: CLIPVisionConfig, data: Dataset, settings: Settings, cache: Path) -> Task:
    """The text encoder by contrast with pictures (Radford et al. 2021), together with an image encoder of `vision`.

    The parameters are {"text", "image"}; `finish` keeps the text encoder alone. A model whose text encoder has no
    projection and temperature gets them.

    Raises:
        ValueError: the projections of the two encoders differ in width.
    """
    clip = model.config.clip
    text_params = model.params["text"]
    if clip.projection is None:
        clip = dataclasses.replace(clip, projection=vision.projection)
        fresh = initial_params(dataclasses.replace(model.config, text=(clip,)), settings.seed, ("text",))["text"]
        text_params = {**text_params, **{name: fresh[name] for name in ("projection", "logit_scale")}}
    if clip.projection != vision.projection:
        raise ValueError(f"the text encoder projects to {clip.projection} and the image encoder to {vision.projection}")
    config = dataclasses.replace(model.config, text=(clip,))
    text, image = TextEncoder(clip), ImageEncoder(vision)
    read = reader(data, vision.image_size, cache)

    def loss(params: Params, frozen: Params, batch: Any, key: Array) -> tuple[Array, Metrics]:
        pooled: Any = text.apply({"params": params["text"]}, batch["ids"])
        embedded: Any = image.apply({"params": params["image"]}, from_uint8(batch["pictures"]))
        ids, index = batch["ids"], batch["index"]
        same = (ids[:, None] == ids[None]).all(-1) | (index[:, None] == index[None])
        return contrastive_loss(embedded, pooled.pooled, params["text"]["logit_scale"], same)

    def batch(step: int) -> dict[str, np.ndarray]:
        index, texts = drawn(data, settings, step)
        pictures = pictures_of(data, settings, step, read)
        return {"pictures": pictures, "ids": token_ids(model.tokenizer, config, texts), "index": index}

    shown = batch(0)

    @jax.jit
    def similar(params: Params) -> Array:
        pooled: Any = text.apply({"params": params["text"]}, shown["ids"])
        embedded: Any = image.apply({"params": params["image"]}, from_uint8(jnp.asarray(shown["pictures"])))
        return unit(pooled.pooled) @ unit(embedded).T

    def show(params: Params) -> Image.Image:
        """One row a caption of the first batch: the pictures of that batch that are nearest to it."""
        nearest = np.argsort(-np.asarray(similar(params)), axis=1)[:SHEET, :SHEET]
        texts = drawn(data, settings, 0)[1]
        pictures = [Image.fromarray(shown["pictures"][i]) for i in nearest.ravel()]
        columns = nearest.shape[1]
        labels = [text if column == 0 else "" for text in texts[: len(nearest)] for column in range(columns)]
        return sheet(pictures, columns, labels)

    picture = jnp.zeros((1, vision.image_size, vision.image_size, 3))
    tower = jax.jit(image.init)(seeded_keys(settings.seed), picture)["params"]
    return Task(
        params={"text": text_params, "image": tower},
        frozen={},
        loss=loss,
        batch=batch,
        sheet=show,
        finish=lambda params: dataclasses.replace(with_part(model, "text", params["text"]), config=config),
        beside=lambda params: {"image": params["image"]},
    )
