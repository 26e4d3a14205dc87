"""Training data as a stream: an endless order over a data set's examples that can be entered anywhere, and kept rows.

What is drawn at a place of the stream is a function of (seed, place) alone, so nothing needs to be saved to go on in
the middle. What a data set may be: `sdjax.train.dataset`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from itertools import count as numbers_from
from typing import TypeVar

import numpy as np

from sdjax.train.dataset import Dataset as Dataset
from sdjax.train.dataset import Example as Example
from sdjax.train.dataset import open_dataset as open_dataset

T = TypeVar("T")


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
