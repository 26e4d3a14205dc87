"""Training data as a stream: an endless order over a data set's examples that can be entered anywhere, and kept rows.

What is drawn at a place of the stream is a function of (seed, place) alone, so nothing needs to be saved to go on in
the middle. What a data set may be: `sdjax.train.dataset`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from itertools import count as numbers_from
from pathlib import Path
from typing import TypeVar

import numpy as np

from sdjax.storage.cache import signature
from sdjax.storage.files import new_file
from sdjax.train.dataset import Dataset as Dataset
from sdjax.train.dataset import Example as Example
from sdjax.train.dataset import open_dataset as open_dataset

T = TypeVar("T")

CHUNK = 64
"""Rows that `cached` asks for at a time."""


def order(weights: Sequence[float] | np.ndarray, seed: int, first: int, count: int) -> np.ndarray:
    """Entries first .. first + count - 1 of the endless shuffled stream of examples, as i64[count].

    An epoch has floor(sum of weights) entries, at least 1; in it, an example comes floor or ceil of
    weight x entries / sum of weights times: with weights of 1, once each. Epoch e depends on (seed, e) alone.

    Raises:
        ValueError: no weights, or one that is not positive and finite; a negative seed.
    """
    key = np.asarray(weights, np.float64).tobytes()
    length = _epoch_length(key)
    epochs = range(first // length, (first + count - 1) // length + 1) if count else range(0)
    stream = np.concatenate([np.zeros(0, np.int64), *(_epoch(key, length, seed, epoch) for epoch in epochs)])
    return stream[first % length :][:count]


@lru_cache(maxsize=4)
def _epoch_length(weights: bytes) -> int:
    values = np.frombuffer(weights, np.float64)
    if not values.size or not (np.isfinite(values).all() and (values > 0).all()):
        raise ValueError("weights must be positive finite numbers, at least one")
    return max(1, math.floor(math.fsum(values)))


@lru_cache(maxsize=4)
def _epoch(weights: bytes, length: int, seed: int, epoch: int) -> np.ndarray:
    """One epoch: systematic sampling (`length` marks one apart on the shuffled weights laid end to end), shuffled."""
    rng = np.random.default_rng([seed, epoch])
    values = np.frombuffer(weights, np.float64)
    shuffled = rng.permutation(len(values))
    ends = np.cumsum(values[shuffled])
    marks = np.arange(length) + rng.random()
    drawn = np.searchsorted(ends * (length / ends[-1]), marks, side="right")
    return rng.permutation(shuffled[np.minimum(drawn, len(values) - 1)])


def caption(example: Example, seed: int, position: int) -> str:
    """The caption drawn for place `position` of the stream.

    Raises:
        ValueError: the example has no captions.
    """
    if not example.captions:
        raise ValueError(f"{example.name}: no caption to draw from; open the data set with captions")
    if len(example.captions) == 1:
        return example.captions[0]
    return example.captions[np.random.default_rng([seed, position, 1]).integers(len(example.captions))]


def prefetch(make: Callable[[int], T], first: int, *, depth: int = 2) -> Iterator[T]:
    """Yields make(first), make(first + 1), ... without end; one thread works `depth` results ahead of the consumer.

    An exception of `make` is raised in the place of its result. Closing the generator ends the thread.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    ahead: deque[Future[T]] = deque()
    try:
        for number in numbers_from(first):
            ahead.append(pool.submit(make, number))
            if len(ahead) > depth:
                yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def cached(path: str | Path, key: str, make: Callable[[int, int], np.ndarray], count: int) -> np.ndarray:
    """Rows that are computed once and kept on disk: [count, ...], memory-mapped, read only.

    path: a .npy, with a .json beside it that holds `key`. With another key, or without the files, rows are computed
    by make(first, last) -> [last - first, ...], at most `CHUNK` at a time, and replace the old ones when all are there.

    Raises:
        ValueError: count < 1, or `make` gave rows of another number, shape or dtype than asked for or than before.
        TypeError: rows of a dtype that .npy does not know (bfloat16). FileNotFoundError: no folder to write into.
    """
    path = Path(path)
    note = path.with_suffix(".json")
    if count < 1:
        raise ValueError(f"{path}: count must be at least 1, found {count}")
    if (kept := _kept(path, note, key, count)) is not None:
        return kept
    with new_file(path, force=True) as temporary:
        _fill(temporary, make, count)
        note.unlink(missing_ok=True)  # until the new one is there, the rows on disk have no key
    with new_file(note, force=True) as temporary:
        temporary.write_text(json.dumps({"key": key}))
    return np.load(path, mmap_mode="r")


def _kept(path: Path, note: Path, key: str, count: int) -> np.ndarray | None:
    """The rows on disk if they are whole and of this key."""
    try:
        if json.loads(note.read_text()) != {"key": key}:
            return None
        rows = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return rows if len(rows) == count else None


def _fill(file: Path, make: Callable[[int, int], np.ndarray], count: int) -> None:
    """Writes rows 0 .. count - 1 as .npy."""
    out: np.ndarray | None = None
    for first in range(0, count, CHUNK):
        last = min(first + CHUNK, count)
        rows = np.asarray(make(first, last))
        if out is None:
            if rows.dtype.kind == "V":
                raise TypeError(f".npy cannot hold {rows.dtype}; cast the rows to float32 or float16")
            out = np.lib.format.open_memmap(file, "w+", rows.dtype, (count, *rows.shape[1:]))
        if rows.shape != (last - first, *out.shape[1:]) or rows.dtype != out.dtype:
            raise ValueError(
                f"rows {first} to {last} must be {out.dtype}{[last - first, *out.shape[1:]]}, "
                f"found {rows.dtype}{list(rows.shape)}"
            )
        out[first:last] = rows


def fingerprint(dataset: Dataset) -> str:
    """sha256 over names, captions, weights, and sizes, places, inodes and times of change of the files."""
    signed = lru_cache(maxsize=None)(signature)
    digest = hashlib.sha256()
    for example in dataset.examples:
        found = signed(example.file)
        row = (example.name, example.captions, example.weight, example.offset, example.size)
        digest.update(json.dumps([*row, *found]).encode())
    return digest.hexdigest()
