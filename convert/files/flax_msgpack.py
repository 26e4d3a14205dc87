"""Reading .msgpack, the files in which Flax keeps parameters (`flax.serialization.to_bytes`).

Such a file is one map of maps in MessagePack. Its leaves are extensions of type 1, which hold [shape, dtype's name,
bytes]; arrays of more than 2**30 bytes are stored in chunks (https://flax.readthedocs.io, flax.serialization). Here the
maps are walked from beginning to end, every length is checked against the file, and the bytes of the arrays are passed
over until one is asked for.

Flax names and lays out weights in its own way. Names and shapes are given as diffusers' PyTorch files have them, so
that all that follows is the same for both:

    down_blocks_0/resnets_0/conv1/kernel, HWIO    down_blocks.0.resnets.0.conv1.weight, OIHW
    mid_block/attentions_0/proj_in/kernel, [in, out]    mid_block.attentions.0.proj_in.weight, [out, in]
    norm1/scale, token_embedding/embedding    norm1.weight, token_embedding.weight
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from convert.files.source import (
    DTYPES,
    MAX_NAME,
    MAX_SHAPE,
    MAX_TENSORS,
    CheckpointError,
    Source,
    TensorInfo,
    check_name,
    read_at,
)

MAX_DEPTH = 16  # of maps within maps; a UNet has 7
NDARRAY, SCALAR = 1, 3  # Flax' extension types of arrays
CHUNKED = "__msgpack_chunked_array__"
FLAX_DTYPES = {dtype.name: name for name, dtype in DTYPES.items()}
"""Names of dtypes as numpy and Flax write them -> theirs in `DTYPES`."""

LISTS = "down_blocks|up_blocks|resnets|attentions|downsamplers|upsamplers|transformer_blocks|to_out|net"
"""Modules that PyTorch numbers with a dot, and Flax with an underscore."""

ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""What Flax' autoencoder calls the maps of its attention, as PyTorch's once did."""


class Piece(NamedTuple):
    """An array in the file, or a chunk of one: dtype's name as written, shape, and where its bytes are."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    size: int


class Array(NamedTuple):
    """An array: its dtype and shape as Flax has them, and its pieces in their order."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


class Other(NamedTuple):
    """A value that is no array: what it is, and the number where it is a whole one."""

    kind: str
    number: int | None = None


def is_msgpack(head: bytes) -> bool:
    """Whether a file that begins like this is a map with names in MessagePack."""
    if not head:
        return False
    skip = {0xDE: 3, 0xDF: 5}.get(head[0], 1 if 0x80 < head[0] <= 0x8F else 0)
    first = head[skip : skip + 1]
    return bool(skip and first) and (0xA0 < first[0] < 0xC0 or first[0] == 0xD9)


def torch_name(path: Sequence[str]) -> str:
    """The name that the same parameter has in PyTorch's files. path: the keys under which Flax has it."""
    *modules, leaf = path
    parts = [ATTENTION.get(module) or re.sub(rf"^({LISTS})_(\d+)$", r"\1.\2", module) for module in modules]
    return ".".join([*parts, "weight" if leaf in ("kernel", "scale", "embedding") else leaf])


def open_msgpack(path: Path) -> Source:
    """Opens a file. Raises CheckpointError if it is damaged, or anything but a tree of arrays."""
    arrays: dict[tuple[str, ...], Array] = {}
    skipped: dict[str, str] = {}
    with open(path, "rb") as walked:
        _flatten(path, _Walk(path, walked).whole(), (), arrays, skipped)
    if not arrays:
        held = ", ".join(f"{name} ({kind})" for name, kind in list(skipped.items())[:3])
        raise CheckpointError(f"{path}: holds no tensors" + (f", but {held}" if held else ""))
    tensors: dict[str, TensorInfo] = {}
    places: dict[str, tuple[Array, tuple[int, ...] | None]] = {}
    unusable: dict[str, str] = {}
    for keys, array in arrays.items():
        name, order = torch_name(keys), kernel_order(keys[-1], len(array.shape))
        check_name(path, name)
        if name in tensors:
            raise CheckpointError(f"{path}: two tensors are called {name[:60]!a}")
        shape = array.shape if order is None else tuple(array.shape[axis] for axis in order)
        tensors[name] = TensorInfo(FLAX_DTYPES.get(array.dtype, array.dtype), shape)
        places[name] = array, order
        if problem := _problem(array):
            unusable[name] = problem
    file = open(path, "rb", buffering=0)  # noqa: SIM115, the source closes it

    def read(name: str) -> np.ndarray:
        array, order = places[name]
        held = [read_at(file, piece.begin, piece.size) for piece in array.pieces]
        data = held[0] if len(held) == 1 else np.concatenate(held)
        flax = data.view(DTYPES[FLAX_DTYPES[array.dtype]]).reshape(array.shape)
        return flax if order is None else flax.transpose(order)

    begins = {name: array.pieces[0].begin for name, (array, _) in places.items() if array.pieces}
    return Source(path, "flax", tensors, read, file.close, skipped, unusable=unusable, begins=begins)


def kernel_order(leaf: str, axes: int) -> tuple[int, ...] | None:
    """The axes of a kernel in PyTorch's order: HWIO to OIHW, [in, out] to [out, in]; None where they are the same."""
    return {4: (3, 2, 0, 1), 2: (1, 0)}.get(axes) if leaf == "kernel" else None


def _problem(array: Array) -> str:
    """What makes an array unusable; "" if nothing does."""
    if array.dtype not in FLAX_DTYPES:
        return f"has the dtype {ascii(array.dtype[:40])[1:-1]}, which is not supported"
    if math.prod(max(n, 1) for n in array.shape) >= MAX_SHAPE:
        return f"has the shape {array.shape}, which is too large"
    held = sum(piece.size for piece in array.pieces)
    needed = math.prod(array.shape) * DTYPES[FLAX_DTYPES[array.dtype]].itemsize
    if held != needed:
        return f"has {held} bytes; the shape {array.shape} in {array.dtype} needs {needed}"
    return ""


def _flatten(
    path: Path,
    tree: dict[str, Any],
    keys: tuple[str, ...],
    arrays: dict[tuple[str, ...], Array],
    skipped: dict[str, str],
) -> None:
    """Sorts the leaves of a tree into arrays and others, an array in chunks as one."""
    for key, value in tree.items():
        at = (*keys, key)
        if isinstance(value, Piece):
            arrays[at] = Array(value.dtype, value.shape, (value,))
        elif isinstance(value, dict) and CHUNKED in value:
            arrays[at] = _joined(path, ".".join(at), value)
        elif isinstance(value, dict):
            _flatten(path, value, at, arrays, skipped)
        else:
            name = ".".join(at)
            check_name(path, name)
            skipped[name] = value.kind


def _joined(path: Path, name: str, chunked: dict[str, Any]) -> Array:
    """An array that Flax stored in chunks of its flat form. Raises CheckpointError unless they are all there."""
    check_name(path, name)
    shape, chunks = chunked.get("shape"), chunked.get("chunks")
    sizes = _listed(shape)
    pieces = _listed(chunks)
    if (
        sizes is None
        or not pieces
        or not all(isinstance(size, Other) and size.number is not None and size.number >= 0 for size in sizes)
        or not all(isinstance(piece, Piece) for piece in pieces)
        or len({piece.dtype for piece in pieces}) != 1
        or len(sizes) > 16
    ):
        raise CheckpointError(f"{path}: {name} is stored in chunks that do not fit together; get the file again")
    return Array(pieces[0].dtype, tuple(size.number for size in sizes), tuple(pieces))


def _listed(value: Any) -> list[Any] | None:
    """What Flax stored as {"0": ..., "1": ...}; None if it is nothing of the kind."""
    names = [str(place) for place in range(len(value))] if isinstance(value, dict) else None
    return None if names is None or set(names) != set(value) else [value[name] for name in names]


class _Walk:
    """Goes through a file once, and holds nothing of the arrays. Every method raises CheckpointError."""

    def __init__(self, path: Path, file: BufferedReader) -> None:
        self.path, self.file = path, file
        self.size = os.fstat(file.fileno()).st_size
        self.at = self.entries = 0

    def whole(self) -> dict[str, Any]:
        """The maps within maps of the whole file; leaves are `Piece` and `Other`."""
        tree = self._value(0)
        if not isinstance(tree, dict):
            raise self._wrong("no map of names")
        if self.at != self.size:
            raise CheckpointError(f"{self.path}: {self.size - self.at} bytes behind the parameters; get the file again")
        return tree

    def _wrong(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: {what} at byte {self.at}; this is no msgpack file of parameters, or a damaged one"
        )

    def _pass(self, size: int) -> None:
        """Goes on by so many bytes, which must be there."""
        if size > self.size - self.at:
            missing = f"{self.at + size} bytes are needed and {self.size} are there"
            raise CheckpointError(f"{self.path}: the file is cut off ({missing}); get it again")
        self.at += size

    def _take(self, size: int) -> bytes:
        begin = self.at
        self._pass(size)
        self.file.seek(begin)
        return self.file.read(size)

    def _number(self, size: int, signed: bool = False) -> int:
        return int.from_bytes(self._take(size), "big", signed=signed)

    def _length(self, code: int, few: tuple[int, int], codes: Sequence[int]) -> int | None:
        """The length that a code says, or that follows it; None if the code is of something else.

        few: the first and last of the codes that say a short length themselves. codes: those that are followed by a
        length of 1, 2 or 4 bytes; where there are two of them, by 2 or 4.
        """
        if few[0] <= code <= few[1]:
            return code - few[0]
        return self._number(1 << codes.index(code) + (3 - len(codes))) if code in codes else None

    def _value(self, depth: int) -> Any:
        """A map as a dict, an array of Flax as `Piece`, anything else as `Other`."""
        code = self._number(1)
        if (count := self._length(code, (0x80, 0x8F), (0xDE, 0xDF))) is not None:
            return self._map(count, depth)
        if code in (0xC7, 0xC8, 0xC9, 0xD4, 0xD5, 0xD6, 0xD7, 0xD8):
            size = 1 << code - 0xD4 if code >= 0xD4 else self._number(1 << code - 0xC7)
            return self._extension(self._number(1, signed=True), size)
        if (count := self._length(code, (0x90, 0x9F), (0xDC, 0xDD))) is not None:
            self._count(count)
            if depth == MAX_DEPTH:
                raise self._wrong(f"lists nested more than {MAX_DEPTH} deep")
            for _ in range(count):
                self._value(depth + 1)
            return Other(f"a list of {count}")
        if (letters := self._length(code, (0xA0, 0xBF), (0xD9, 0xDA, 0xDB))) is not None:
            self._pass(letters)
            return Other("str")
        if code in (0xC4, 0xC5, 0xC6):
            self._pass(self._number(1 << code - 0xC4))
            return Other("bytes")
        return self._plain(code)

    def _plain(self, code: int) -> Other:
        """A number, a truth value or nothing."""
        if code <= 0x7F or code >= 0xE0:
            return Other("int", code if code <= 0x7F else code - 0x100)
        if 0xCC <= code <= 0xD3:
            return Other("int", self._number(1 << (code - 0xCC) % 4, signed=code >= 0xD0))
        if code in (0xCA, 0xCB):
            self._pass(4 if code == 0xCA else 8)
            return Other("float")
        if code in (0xC0, 0xC2, 0xC3):
            return Other("None" if code == 0xC0 else "bool")
        raise self._wrong(f"the code {code:#x}, which MessagePack does not use,")

    def _count(self, count: int) -> None:
        self.entries += count
        if self.entries > MAX_TENSORS:
            raise CheckpointError(f"{self.path}: more than {MAX_TENSORS} entries; this is no checkpoint")

    def _map(self, count: int, depth: int) -> dict[str, Any]:
        self._count(count)
        if depth == MAX_DEPTH:
            raise self._wrong(f"maps nested more than {MAX_DEPTH} deep")
        tree: dict[str, Any] = {}
        for _ in range(count):
            key = self._text(MAX_NAME)
            if key in tree:
                raise CheckpointError(f"{self.path}: the name {key[:60]!a} is there twice in one map")
            tree[key] = self._value(depth + 1)
        return tree

    def _text(self, most: int) -> str:
        """A short text, such as a name; old files have it as bytes."""
        code = self._number(1)
        size = self._number(1) if code == 0xC4 else self._length(code, (0xA0, 0xBF), (0xD9, 0xDA, 0xDB))
        if size is None or size > most:
            raise self._wrong("something else than a name")
        try:
            return self._take(size).decode()
        except UnicodeDecodeError:
            raise self._wrong("a name that is not UTF-8") from None

    def _extension(self, kind: int, size: int) -> Piece | Other:
        """An array of Flax, or another extension, whose content is passed over."""
        end = self.at + size
        if kind not in (NDARRAY, SCALAR):
            self._pass(size)
            return Other("complex" if kind == 2 else f"an extension of type {kind}")
        if self._number(1) != 0x93:
            raise self._wrong("an array that is not made of shape, dtype and bytes")
        axes = self._length(self._number(1), (0x90, 0x9F), (0xDC, 0xDD))
        if axes is None or axes > 16:
            raise self._wrong("an array without a shape")
        sizes = [self._plain(self._number(1)).number for _ in range(axes)]
        if any(found is None or found < 0 for found in sizes):
            raise self._wrong("an array whose shape has something else than sizes")
        dtype = self._text(100)
        code = self._number(1)
        if code not in (0xC4, 0xC5, 0xC6):
            raise self._wrong("an array without bytes")
        held = self._number(1 << code - 0xC4)
        begin = self.at
        self._pass(held)
        if self.at != end:
            raise self._wrong("an array that is longer or shorter than it says")
        return Piece(dtype, tuple(found for found in sizes if found is not None), begin, held)
