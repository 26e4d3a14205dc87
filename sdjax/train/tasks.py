"""The three trainings: which parameters learn, from which batches, by which loss.

A `Task` is all that the loop needs to know of a training. `vae_task`, `clip_task` and `unet_task` make one from a
model, a data set and settings. What does not change during a training is computed once: for the UNet the moments of
every picture's latents and the text states of every caption lie in memory-mapped files.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from sdjax.config import CLIPVisionConfig, ModelConfig
from sdjax.diffusion.schedule import noise_schedule
from sdjax.functions import encode_text
from sdjax.image import from_uint8, to_images, to_uint8
from sdjax.models.clip import ImageEncoder, TextEncoder
from sdjax.models.params import initial_params
from sdjax.models.unet import UNet
from sdjax.models.vae import VAE, Posterior
from sdjax.pipeline import Pipeline
from sdjax.target import pinned, seeded_keys
from sdjax.tokenizer import Tokenizer
from sdjax.train.data import Dataset, cached, caption, fingerprint, order
from sdjax.train.losses import Metrics, contrastive_loss, diffusion_loss, drop_prompts, unit, vae_loss
from sdjax.train.plots import sheet
from sdjax.train.settings import Settings
from sdjax.train.step import Loss
from sdjax.types import Array, Params

SHEET = 8
"""Pictures on a sample sheet."""

PICTURE_BOUND = 2**31
"""Bytes of decoded pictures that are kept on disk (2 GiB); a larger data set is decoded again in every epoch."""


@dataclass(frozen=True)
class Task:
    """One training, as the loop sees it.

    params: where it starts; frozen: parameters and tables that the loss needs and that stay. loss: see `step.Loss`.
    batch: number of an update -> numpy arrays with a leading axis b. sheet: averaged parameters -> a picture that shows
    how far it is. finish: averaged parameters -> the whole model. beside: -> what else was learnt, if anything.
    """

    params: Params
    frozen: Params
    loss: Loss
    batch: Callable[[int], dict[str, np.ndarray]]
    sheet: Callable[[Params], Image.Image]
    finish: Callable[[Params], Pipeline]
    beside: Callable[[Params], Params] | None = None


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

    read = _reader(data, config.image_size, cache)
    first = _pictures(data, settings, 0, read)[:SHEET]

    @jax.jit
    def reconstruct(params: Params) -> Array:
        return to_uint8(vae.apply({"params": params}, from_uint8(jnp.asarray(first))))  # type: ignore[arg-type]

    def show(params: Params) -> Image.Image:
        return sheet([Image.fromarray(row) for row in first] + to_images(reconstruct(params)), len(first))

    return Task(
        params=model.params["vae"],
        frozen={},
        loss=loss,
        batch=lambda step: {"pictures": _pictures(data, settings, step, read)},
        sheet=show,
        finish=lambda params: _with_part(model, "vae", params),
    )


@pinned
def clip_task(model: Pipeline, vision: CLIPVisionConfig, data: Dataset, settings: Settings, cache: Path) -> Task:
    """The text encoder by contrast with pictures (Radford et al. 2021), an image encoder of `vision` beside it.

    The parameters are {"text", "image"}; `finish` keeps the text encoder alone. A model whose text encoder has no
    projection and temperature gets them.

    Raises:
        ValueError: the projections of the two encoders differ in width.
    """
    clip = model.config.clip
    text_params = model.params["text"]
    if clip.projection is None:
        clip = dataclasses.replace(clip, projection=vision.projection)
        fresh = initial_params(dataclasses.replace(model.config, clip=clip), settings.seed, ("text",))["text"]
        text_params = {**text_params, **{name: fresh[name] for name in ("projection", "logit_scale")}}
    if clip.projection != vision.projection:
        raise ValueError(f"the text encoder projects to {clip.projection} and the image encoder to {vision.projection}")
    config = dataclasses.replace(model.config, clip=clip)
    text, image = TextEncoder(clip), ImageEncoder(vision)
    read = _reader(data, vision.image_size, cache)

    def loss(params: Params, frozen: Params, batch: Any, key: Array) -> tuple[Array, Metrics]:
        pooled: Any = text.apply({"params": params["text"]}, batch["ids"])
        embedded: Any = image.apply({"params": params["image"]}, from_uint8(batch["pictures"]))
        ids, index = batch["ids"], batch["index"]
        same = (ids[:, None] == ids[None]).all(-1) | (index[:, None] == index[None])
        return contrastive_loss(embedded, pooled.pooled, params["text"]["logit_scale"], same)

    def batch(step: int) -> dict[str, np.ndarray]:
        index, texts = _drawn(data, settings, step)
        pictures = _pictures(data, settings, step, read)
        return {"pictures": pictures, "ids": _ids(model.tokenizer, config, texts), "index": index}

    shown = batch(0)

    @jax.jit
    def similar(params: Params) -> Array:
        pooled: Any = text.apply({"params": params["text"]}, shown["ids"])
        embedded: Any = image.apply({"params": params["image"]}, from_uint8(jnp.asarray(shown["pictures"])))
        return unit(pooled.pooled) @ unit(embedded).T

    def show(params: Params) -> Image.Image:
        """One row a caption of the first batch: the pictures of that batch that are nearest to it."""
        nearest = np.argsort(-np.asarray(similar(params)), axis=1)[:SHEET, :SHEET]
        texts = _drawn(data, settings, 0)[1]
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
        finish=lambda params: dataclasses.replace(_with_part(model, "text", params["text"]), config=config),
        beside=lambda params: {"image": params["image"]},
    )


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
        index, texts = _drawn(data, settings, step)
        return {"moments": moments[index], "context": states[[row_of[text] for text in texts]]}

    prompts = _drawn(data, settings, 0)[1][:SHEET]

    def show(params: Params) -> Image.Image:
        """The first batch's captions, drawn by the model as it is now."""
        return sheet(finish(params).text_to_image(prompts, batch=len(prompts)), 4, prompts)

    def finish(params: Params) -> Pipeline:
        return _with_part(model, "unet", params)

    frozen = {"empty": jnp.asarray(states[0])}
    return Task(model.params["unet"], frozen, loss, batch, show, finish)


def _with_part(model: Pipeline, part: str, params: Params) -> Pipeline:
    return dataclasses.replace(model, params={**model.params, part: params})


def _drawn(data: Dataset, settings: Settings, step: int) -> tuple[np.ndarray, list[str]]:
    """The examples of update `step` and their captions."""
    first = step * settings.batch
    index = order(data.weights, settings.seed, first, settings.batch)
    texts = [caption(data.examples[i], settings.seed, first + row) for row, i in enumerate(index)]
    return index, texts


def _reader(data: Dataset, size: int, cache: Path) -> Callable[[np.ndarray], np.ndarray]:
    """i64[b] -> the pictures, u8[b, size, size, 3]; a data set of up to `PICTURE_BOUND` bytes is decoded only once."""

    if len(data) * size * size * 3 > PICTURE_BOUND:
        return lambda index: data.pictures(index, size)
    cache.mkdir(parents=True, exist_ok=True)
    key = _hash(fingerprint(data), size)
    pictures = cached(
        cache / "pictures.npy", key, lambda first, last: data.pictures(range(first, last), size), len(data)
    )
    return lambda index: pictures[index]


def _pictures(data: Dataset, settings: Settings, step: int, read: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The pictures of update `step`, u8[b, size, size, 3]."""
    pictures = read(order(data.weights, settings.seed, step * settings.batch, settings.batch))
    if settings.flip:
        mirrored = np.random.default_rng([settings.seed, step, 2]).random(len(pictures)) < 0.5
        pictures[mirrored] = pictures[mirrored, :, ::-1]
    return pictures


def _ids(tokenizer: Tokenizer, config: ModelConfig, texts: list[str]) -> np.ndarray:
    return tokenizer(texts, config.clip.length, config.clip.pad_token)


def _hash(*things: Any) -> str:
    """sha256 of parameters and of what `repr` says of anything else."""
    digest = hashlib.sha256()
    for thing in things:
        if isinstance(thing, dict):
            for leaf in jax.tree.leaves(thing):
                digest.update(np.asarray(leaf).tobytes())
        else:
            digest.update(repr(thing).encode())
    return digest.hexdigest()


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
    key = _hash(fingerprint(data), config.vae, config.image_size, model.params["vae"])
    return cached(cache / "latents.npy", key, rows, len(data))


def _cached_states(model: Pipeline, captions: list[str], cache: Path) -> np.ndarray:
    """What the text encoder makes of every caption, f32[n, l, d]."""

    def rows(first: int, last: int) -> np.ndarray:
        ids = _ids(model.tokenizer, model.config, captions[first:last])
        return np.asarray(encode_text(model.params["text"], ids, config=model.config), np.float32)

    cache.mkdir(parents=True, exist_ok=True)
    ids = _ids(model.tokenizer, model.config, captions)
    key = _hash(ids.tobytes(), model.config.clip, model.params["text"])
    return cached(cache / "text.npy", key, rows, len(captions))
