"""The three trainings: which parameters learn, from which batches, by which loss.

A `Task` is all that the loop needs to know of a training. `vae_task`, `clip_task` and `unet_task` make one from a
model, a data set and settings. What does not change during a training is computed once: for the UNet the moments of
every picture's latents and the text states of every caption are stored in memory-mapped files.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from sdjax.config import ModelConfig
from sdjax.pipeline.pipeline import Pipeline
from sdjax.text.tokenizer import Tokenizer
from sdjax.train.cache import cached, fingerprint
from sdjax.train.dataset import Dataset
from sdjax.train.settings import Settings
from sdjax.train.step import Loss
from sdjax.train.stream import caption, order
from sdjax.types import Params

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


def with_part(model: Pipeline, part: str, params: Params) -> Pipeline:
    return dataclasses.replace(model, params={**model.params, part: params})


def drawn(data: Dataset, settings: Settings, step: int) -> tuple[np.ndarray, list[str]]:
    """The examples of update `step` and their captions."""
    first = step * settings.batch
    index = order(data.weights, settings.seed, first, settings.batch)
    texts = [caption(data.examples[i], settings.seed, first + row) for row, i in enumerate(index)]
    return index, texts


def reader(data: Dataset, size: int, cache: Path) -> Callable[[np.ndarray], np.ndarray]:
    """i64[b] -> the pictures, u8[b, size, size, 3]; a data set of up to `PICTURE_BOUND` bytes is decoded only once."""

    if len(data) * size * size * 3 > PICTURE_BOUND:
        return lambda index: data.pictures(index, size)
    cache.mkdir(parents=True, exist_ok=True)
    key = hash_of(fingerprint(data), size)
    pictures = cached(
        cache / "pictures.npy", key, lambda first, last: data.pictures(range(first, last), size), len(data)
    )
    return lambda index: pictures[index]


def pictures_of(data: Dataset, settings: Settings, step: int, read: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The pictures of update `step`, u8[b, size, size, 3]."""
    pictures = read(order(data.weights, settings.seed, step * settings.batch, settings.batch))
    if settings.flip:
        mirrored = np.random.default_rng([settings.seed, step, 2]).random(len(pictures)) < 0.5
        pictures[mirrored] = pictures[mirrored, :, ::-1]
    return pictures


def token_ids(tokenizer: Tokenizer, config: ModelConfig, texts: list[str]) -> np.ndarray:
    return tokenizer(texts, config.clip.length, config.clip.pad_token)


def hash_of(*things: Any) -> str:
    """sha256 of parameters and of what `repr` says of anything else."""
    digest = hashlib.sha256()
    for thing in things:
        if isinstance(thing, dict):
            for leaf in jax.tree.leaves(thing):
                digest.update(np.asarray(leaf).tobytes())
        else:
            digest.update(repr(thing).encode())
    return digest.hexdigest()
