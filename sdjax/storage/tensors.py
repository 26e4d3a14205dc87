"""Files of tensors (.safetensors), written and read tensor by tensor, so that none is in memory longer than needed.

The format: the header's length (8 bytes, little endian), the header as JSON, padded to 8 bytes, the tensors one after
another (https://github.com/huggingface/safetensors). Large files are written past the page cache where the file system
can (`write_parts`).
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import ml_dtypes
import numpy as np

Value = TypeVar("Value")

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F32": np.dtype("<f4"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype("<f2"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
"""Dtypes by their names in a header. In this order are the tensors of a file, wide ones first, so that each is aligned
(`save_file` of the safetensors package has the same order).
"""

NAMES = {dtype: name for name, dtype in DTYPES.items()}
AHEAD = 2**26  # bytes of tensors that a thread makes before they are needed
BLOCK, BLOCKS = 2**21, 3  # bytes written at once, and buffers of that size
ALIGNED = 64  # bytes; of an array so aligned JAX makes its own on a CPU without copying it


class Tensor(NamedTuple):
    """A tensor to be written. make: called once, in a thread; gives an array of this dtype and shape."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


def write(
    path: Path, tensors: Sequence[Tensor], metadata: Mapping[str, str] | None = None, *, workers: int = 1
) -> None:
    """Writes a file of these tensors, in this order; the next ones are made while one is written.

    workers: threads that make them. One keeps up with the writing if it only copies; two do if it turns axes.

    Raises:
        OSError: it could not be written. What `make` of a tensor raises.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.nbytes
        header[tensor.name] = {"dtype": NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def parts() -> Iterator[np.ndarray]:
        yield np.frombuffer(len(text).to_bytes(8, "little") + text, np.uint8)
        arrays = in_order([(tensor.nbytes, tensor.make) for tensor in tensors], workers)
        for name, dtype, shape, _ in tensors:
            array = next(arrays)
            if (array.dtype, array.size) != (dtype, math.prod(shape)):
                raise ValueError(f"{name}: {array.dtype} {array.shape} instead of {dtype} {shape}")
            yield np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            del array  # before the next one is waited for

    write_parts(path, parts())


def sorted_by_dtype(tensors: Iterable[Tensor]) -> list[Tensor]:
    """In the order of `DTYPES`, those of one dtype by their names."""
    order = list(DTYPES.values())
    return sorted(tensors, key=lambda tensor: (order.index(tensor.dtype), tensor.name))


def in_order(calls: Iterable[tuple[int, Callable[[], Value]]], workers: int, ahead: int = AHEAD) -> Iterator[Value]:
    """What functions give, one after another; the next ones are called in threads in the meantime.

    calls: how many bytes it will be, and the function. workers: how many threads. ahead: bytes for each of them of what
    is made or waits; one may be larger.
    """
    with ThreadPoolExecutor(workers) as pool:
        under_way: deque[tuple[int, Future[Value]]] = deque()
        held = 0
        try:
            for size, call in calls:
                while under_way and held + size > ahead * workers:
                    held -= under_way[0][0]
                    yield under_way.popleft()[1].result()
                under_way.append((size, pool.submit(call)))
                held += size
            while under_way:
                yield under_way.popleft()[1].result()
        finally:
            for _, future in under_way:
                future.cancel()


def write_parts(path: Path, parts: Iterable[np.ndarray]) -> None:
    """Writes arrays u8[n] one after another as a file, whole blocks of it past the page cache (O_DIRECT).

    So the kernel neither looks for pages nor copies into them, and nothing is left to be flushed at the end: on a
    virtual machine a file of 4 GB takes 2 s instead of 5 to 20. Where a file system cannot, it is written as usual.

    Raises:
        OSError: it could not be written.
    """
    handle = _open(path)
    try:
        with ThreadPoolExecutor(1) as pool:
            memory = np.frombuffer(mmap.mmap(-1, BLOCK * BLOCKS), np.uint8).reshape(BLOCKS, BLOCK)  # begins at a page
            under_way: deque[tuple[Future[None], np.ndarray]] = deque()
            free = list(memory)
            block, used, at = free.pop(), 0, 0
            for part in parts:
                begin = 0
                while begin < part.size:
                    count = min(BLOCK - used, part.size - begin)
                    block[used : used + count] = part[begin : begin + count]
                    used, begin = used + count, begin + count
                    if used == BLOCK:
                        under_way.append((pool.submit(_write_at, handle, block, at), block))
                        used, at = 0, at + BLOCK
                        if not free:
                            future, written = under_way.popleft()
                            future.result()
                            free.append(written)
                        block = free.pop()
                del part  # before the next one is waited for
            for future, _ in under_way:
                future.result()
            _write_as_usual(handle)  # the rest is no whole number of sectors
            _write_at(handle, block[:used], at)
    finally:
        os.close(handle)


def _open(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)


def _write_at(handle: int, block: np.ndarray, at: int) -> None:
    """Writes all of a block, as usual if the file system refuses otherwise."""
    done = 0
    while done < block.size:
        try:
            done += os.pwrite(handle, block[done:].data, at + done)
        except OSError as error:
            if error.errno != errno.EINVAL or not _write_as_usual(handle):
                raise


def _write_as_usual(handle: int) -> bool:
    """Ends writing past the page cache; False if it was not so written."""
    flags, direct = fcntl.fcntl(handle, fcntl.F_GETFL), getattr(os, "O_DIRECT", 0)
    fcntl.fcntl(handle, fcntl.F_SETFL, flags & ~direct)
    return bool(flags & direct)


class Place(NamedTuple):
    """Where a tensor is in a file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


def places(file: Path) -> dict[str, Place]:
    """The tensors of a file by name, in its order.

    Raises:
        ValueError: the file is damaged, or has a dtype that is not in `DTYPES`. OSError: it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np"):  # checks all of the header, and the file's size
            pass
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{name[:60]} has the dtype {entry['dtype'][:20]}")
    found = {
        name: Place(DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }
    return dict(sorted(found.items(), key=lambda item: item[1].begin))


def read(file: Path, place: Place) -> np.ndarray:
    """A tensor of a file as a new array, aligned to `ALIGNED` bytes.

    Raises:
        ValueError: the file got shorter. OSError: it cannot be read.
    """
    size = place.nbytes
    memory = np.empty(size + ALIGNED, np.uint8)
    first = -memory.ctypes.data % ALIGNED
    array = memory[first : first + size]
    with open(file, "rb", buffering=0) as opened:
        done = 0
        while done < size:
            count = os.preadv(opened.fileno(), [array[done:].data], place.begin + done)
            if count == 0:
                raise ValueError("the file is cut off")
            done += count
    return array.view(place.dtype).reshape(place.shape)
