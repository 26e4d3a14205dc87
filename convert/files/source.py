"""One checkpoint file, whatever its format: names, dtypes and shapes at once, the numbers tensor by tensor.

What a file is, is found by its first bytes and never by its name. Opening reads headers alone; `Source.read` reads one
tensor into memory of its own, so that nothing of the file stays resident.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from convert.files.unpickle import Parameters, describe
from sdjax.storage import tensors

DTYPES: dict[str, np.dtype] = tensors.DTYPES | {
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
"""Stored dtypes that can be read, by their name in .safetensors files."""

FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
"""The dtypes that parameters may be stored in."""

MAX_TENSORS = 100_000
MAX_DEPTH = 8  # of dicts within dicts
MAX_NAME = 1000  # characters
MAX_SHAPE = 2**48  # product of the sizes that are not 0


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; one line that names the file and says why."""


class TensorInfo(NamedTuple):
    """A stored tensor's dtype, a key of `DTYPES` unless the tensor is unusable, and shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass
class Source:
    """An open file.

    format: "ckpt", "ckpt-legacy", "safetensors" or "flax".
    tensors: in the file's order, names of nested dicts joined by dots.
    skipped: what there is besides the tensors, name -> its type or short value.
    metadata: __metadata__ of a .safetensors file, global_step and name of a .ckpt.
    unusable: tensors that cannot be read, and what is wrong with them, as "has the dtype ..."; the file is refused only
        if one of them is needed.
    begins: where in the file the numbers begin.
    files: of what is in several files, which one holds a tensor.

    Use as a context manager. `read` may be called from several threads.
    """

    path: Path
    format: str
    tensors: dict[str, TensorInfo]
    reader: Callable[[str], np.ndarray]
    close: Callable[[], None]
    skipped: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    unusable: dict[str, str] = field(default_factory=dict)
    begins: dict[str, int] = field(default_factory=dict)
    files: dict[str, Source] = field(default_factory=dict)

    def file_of(self, name: str) -> Source:
        """The file that holds a tensor."""
        return self.files.get(name, self)

    def read(self, name: str) -> np.ndarray:
        """A tensor as a new array in the stored dtype; C-contiguous, but for those of Flax, which are transposed views.

        Raises:
            KeyError: there is no such tensor. CheckpointError: it is unusable, or the file got shorter. ValueError: the
            file was closed.
        """
        if name in self.unusable:
            raise CheckpointError(f"{self.path}: {name} {self.unusable[name]}")
        return self.reader(name)

    def misfit(self, name: str, shape: tuple[int, ...], accepts: Callable[[tuple[int, ...]], bool]) -> str | None:
        """Why a tensor cannot be the parameter of this shape; None if it can. accepts: which shapes it may have."""
        info = self.tensors[name]
        if name in self.unusable:
            return self.unusable[name]
        if not accepts(info.shape):
            return f"expected {shape}, found {info.shape}"
        return None if info.dtype in FLOATS else f"expected floating point, found {info.dtype}"

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def read_at(file: FileIO, begin: int, size: int) -> np.ndarray:
    """`size` bytes of an open file from `begin`, in a new array u8[size]. Raises CheckpointError if it ends before."""
    buffer = np.empty(size, np.uint8)
    view = buffer.data
    done = 0
    while done < size:
        count = os.preadv(file.fileno(), [view[done:]], begin + done)
        if count == 0:
            raise CheckpointError(f"{file.name}: ends before byte {begin + size}; the file is cut off, get it again")
        done += count
    return buffer


def check_name(path: Path, name: str) -> None:
    """Raises CheckpointError if a name in a file could not be shown in one line."""
    if len(name) > MAX_NAME or not name.isprintable():
        raise CheckpointError(f"{path}: an entry is called {name[:60]!a}; refused, no tensor has such a name")


def unwrap(
    state: Any, path: Path, is_tensor: Callable[[Any], bool]
) -> tuple[dict[str, Any], dict[str, str], dict[str, str]]:
    """The tensors in what a pickle held, by dotted name; what else was there, name -> type or value; and its metadata.

    `state_dict` wrappers, and others of one key, are opened; an empty one inside is left out. A list of dicts or
    tensors counts as a dict with the keys 0, 1, ...

    Raises:
        CheckpointError: no dict, nested too deep, with too many entries or odd names.
    """
    metadata: dict[str, str] = {}
    tensors: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    visited = 0

    def skip(name: str, value: Any) -> None:
        check_name(path, name)
        skipped[name] = "tensor" if is_tensor(value) else describe(value)  # shown, so it must be short

    def flatten(entries: dict[Any, Any], prefix: str, depth: int) -> None:
        nonlocal visited
        for key, value in entries.items():
            visited += 1
            if visited > MAX_TENSORS:
                raise CheckpointError(f"{path}: more than {MAX_TENSORS} entries; this is no checkpoint")
            name = prefix + _key_text(key)
            value = _plain(value)
            if isinstance(value, dict) and value:
                if depth == MAX_DEPTH:
                    raise CheckpointError(f"{path}: dicts nested more than {MAX_DEPTH} deep; this is no checkpoint")
                flatten(value, name + ".", depth + 1)
            elif not is_tensor(value):
                skip(name, value)
            elif name in tensors:
                raise CheckpointError(f"{path}: two tensors are called {name[:60]!a}")
            else:
                check_name(path, name)
                tensors[name] = value

    if type(state) is list and state and all(isinstance(item, dict) or is_tensor(item) for item in state):
        state = {str(place): item for place, item in enumerate(state)}
    for _ in range(MAX_DEPTH):
        state = _plain(state)
        if not isinstance(state, dict):
            held = f"a single tensor of shape {tuple(state.shape)}" if is_tensor(state) else _what(state)
            raise CheckpointError(f"{path}: holds {held} where a dict of tensors was expected; this is no checkpoint")
        step = state.get("global_step")
        if type(step) is int and abs(step) < 2**63:
            metadata["global_step"] = str(step)
        title = state.get("name")
        if isinstance(title, str) and len(title) <= MAX_NAME and title.isprintable():
            metadata["name"] = title
        inner = state.get("state_dict")
        if inner is None and len(state) == 1:
            inner = _plain(next(iter(state.values())))
        if not isinstance(inner, dict) or not inner:
            break
        for key, value in state.items():
            if value is not inner:
                skip(_key_text(key), value)
        state = inner
    flatten(state, "", 1)
    if not tensors:
        held = ", ".join(f"{name} ({what})" for name, what in list(skipped.items())[:3])
        if "layer_structure" in skipped:
            raise CheckpointError(
                f"{path}: a hypernetwork, which is not supported; expected a model, LoRA or embedding"
            )
        raise CheckpointError(f"{path}: holds no tensors" + (f", but {held}" if held else ""))
    return tensors, skipped, metadata


def _plain(value: Any) -> Any:
    return value.entries if isinstance(value, Parameters) else value


def _what(value: Any) -> str:
    sized = isinstance(value, list | tuple) and type(value) in (list, tuple)
    return f"a {type(value).__name__} of {len(value)}" if sized else describe(value)


def _key_text(key: Any) -> str:
    return key if isinstance(key, str) else describe(key)
