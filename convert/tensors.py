"""The numbers of a conversion: a tensor of a file, and the parameters it becomes, read when they are asked for."""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np

from convert.files.source import DTYPES, CheckpointError, Source
from convert.names import Entry, Part, Path
from convert.report import Report
from sdjax.models.params import dtype_of

KEPT = {"F32", "F16", "BF16"}  # what dtype "keep" leaves as it is; the other floats become float32


@dataclass(eq=False)
class Laid(ABC):
    """What becomes parameters when they are asked for: a tensor of a file (`Tensor`), or what is computed of others."""

    entry: Entry
    _held: dict[Path, np.ndarray] = field(default_factory=dict, init=False, kw_only=True)
    _lock: Any = field(default_factory=threading.Lock, init=False, kw_only=True)

    @property
    @abstractmethod
    def target(self) -> np.dtype:
        """The dtype that the numbers are handed out in."""

    @abstractmethod
    def array(self) -> np.ndarray:
        """The numbers as `entry` lays them out in a file."""

    def leaves(self) -> dict[Path, Leaf]:
        """The parameters it becomes, none of them read yet."""
        shape = self.entry.leaf_shape
        return {path: Leaf(self, path, shape, self.target) for path in self.entry.leaves}

    def take(self, path: Path) -> np.ndarray:
        """One of its parameters. Where there are several, the others are held until they are taken."""
        with self._lock:
            if path not in self._held:
                self._held = self.entry.to_leaves(self.array())
            return self._held.pop(path)


@dataclass(eq=False)
class Tensor(Laid):
    """One tensor of a file: what it is (`entry` of `part`), and the dtype it is to have ("keep" for the stored one)."""

    part: Part
    source: Source
    name: str
    dtype: str
    report: Report
    done: Callable[[int], None]  # told how many bytes were read
    zeros: Zeros

    @property
    def target(self) -> np.dtype:
        """The dtype that the numbers are handed out in."""
        if self.dtype != "keep":
            return jnp.dtype(dtype_of(self.part, self.dtype))
        stored = self.source.tensors[self.name].dtype
        return DTYPES[stored] if stored in KEPT else np.dtype("float32")

    def array(self) -> np.ndarray:
        """The tensor as the file lays it out, cast; what is odd about its numbers goes into the report's notes.

        Raises:
            CheckpointError: a number is too large for the dtype asked for.
        """
        array, target = self.source.read(self.name), self.target
        self.done(array.nbytes)
        finite = math.isfinite(_sum(array)) or bool(np.isfinite(array).all())
        if not finite:
            self.report.notes.append(f"{self.name} holds NaN or infinite values")
        if self.name in self.zeros.order and finite and not array.any():
            self.report.notes.append(f"{self.name} is zero everywhere")
            self.zeros.add(self.name)
        if array.dtype == target:
            return array
        with np.errstate(over="ignore"):
            array = array.astype(target)
        if finite and not math.isfinite(_sum(array)) and not np.isfinite(array).all():
            raise CheckpointError(
                f"{self.source.path}: {self.name} is too large for {target}; convert to float32 or bfloat16"
            )
        return array


@dataclass(frozen=True, eq=False)
class Leaf:
    """A parameter that `np.asarray` reads from its file, or computes."""

    tensor: Laid
    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.tensor.take(self.path).astype(dtype or self.dtype, copy=False)


class Zeros:
    """Finds the parts of a file that were never written: a broken download has its full size, and zeros in it.

    One weight that is zero everywhere may be meant so, but no trained model has several one after another.
    """

    RUN = 4
    END = 4096  # bytes
    LITTLE = 256  # of the weight before one that is zero everywhere

    def __init__(self, source: Source, tensors: list[tuple[Entry, str]]) -> None:
        weights = [(entry, name) for entry, name in tensors if not entry.name.endswith("bias")]
        weights.sort(key=lambda weight: source.begins.get(weight[1], 0))
        self.source = source
        self.weights = weights
        self.order = {name: at for at, (_, name) in enumerate(weights)}
        self.found: set[int] = set()
        self.lock = threading.Lock()

    def check_end(self) -> None:
        """Raises CheckpointError if the last weights of the file end in zeros."""
        ends = []
        for entry, name in self.weights[-2:]:
            array = self.source.read(name).ravel("K").view(np.uint8)  # as the file has them
            ends.append((not array.any(), *(not array[-n:].any() for n in (self.END, self.LITTLE)), entry.leaves[0][0]))
        if not ends:
            return
        whole, end, _, key = ends[-1]
        before = len(ends) == 2 and ends[0][2]
        if before if whole else (end and key != "token_embedding"):  # where words may have been added
            raise CheckpointError(
                f"{self.source.path}: the end of the file is filled with zeros; "
                "the download is not complete, get it again"
            )

    def add(self, name: str) -> None:
        """Takes note of a tensor that is zero everywhere; raises CheckpointError if there are several in a row."""
        with self.lock:
            self.found.add(at := self.order[name])
            first = last = at
            while first - 1 in self.found:
                first -= 1
            while last + 1 in self.found:
                last += 1
        if last - first + 1 >= self.RUN:
            raise CheckpointError(
                f"{self.source.path}: from {self.weights[first][1]} on a part of the file is filled with zeros; "
                "the download is not complete, get it again"
            )


def _sum(array: np.ndarray) -> float:
    """The sum in float32: finite unless a value is not, or the values are absurdly large; cheap to look at first."""
    with np.errstate(all="ignore"):
        return float(np.sum(array, dtype=np.float32))
