"""Reading .safetensors: 8 bytes with the length of the header (little endian), the header as JSON, then the data.

The header is checked in full before a tensor is read: data without holes, overlaps or anything behind it. A tensor with
an unknown dtype, or a size that does not fit its shape, is unusable, and no reason to refuse the others. Old files
whose data is not aligned are fine: every tensor is read into memory of its own.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from convert.files.source import (
    DTYPES,
    MAX_SHAPE,
    MAX_TENSORS,
    CheckpointError,
    Source,
    TensorInfo,
    check_name,
    read_at,
)
from convert.files.unpickle import describe

HEADER_BOUND = 100_000_000  # bytes, the format's own bound
VALUE_BOUND = 4_000_000  # brackets and commas: a tensor has some 10, a long __metadata__ a few hundred thousand
OLD_PREFIX = "state_dict."  # of files in which a nested dict was flattened


def open_safetensors(path: Path) -> Source:
    """Opens a file. Raises CheckpointError if anything about its header is wrong."""
    file = open(path, "rb", buffering=0)  # noqa: SIM115, the source closes it
    try:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(read_at(file, 0, 8).tobytes(), "little")
        if not 2 <= length <= HEADER_BOUND:
            raise CheckpointError(f"{path}: a header of {length} bytes; expected 2 to {HEADER_BOUND}")
        if 8 + length > size:
            raise CheckpointError(f"{path}: the file is cut off within its header; get it again")
        header = _parse(path, read_at(file, 8, length).tobytes())
        metadata, places, unusable = _check(path, header, size - 8 - length)
    except BaseException:
        file.close()
        raise
    start = 8 + length

    def read(name: str) -> np.ndarray:
        info, begin, end = places[name]
        return read_at(file, start + begin, end - begin).view(DTYPES[info.dtype]).reshape(info.shape)

    tensors = {name: info for name, (info, _, _) in places.items()}
    begins = {name: begin for name, (_, begin, _) in places.items()}
    return Source(path, "safetensors", tensors, read, file.close, metadata=metadata, unusable=unusable, begins=begins)


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, value in pairs:
            if name in result:
                raise CheckpointError(f"{path}: the header has {name[:60]!a} twice")
            result[name] = value
        return result

    if sum(map(text.count, (b"[", b"{", b","))) > VALUE_BOUND:
        raise CheckpointError(f"{path}: a header of more than {VALUE_BOUND} values; this is no checkpoint")
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not JSON ({str(error)[:100]}); get the file again") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is {type(header).__name__}, expected a JSON object")
    return header


Places = dict[str, tuple[TensorInfo, int, int]]


def _check(path: Path, header: dict[str, Any], size: int) -> tuple[dict[str, str], Places, dict[str, str]]:
    metadata = header.pop("__metadata__", {})
    strings = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    if not strings:
        raise CheckpointError(f"{path}: __metadata__ must map strings to strings")
    if not 0 < len(header) <= MAX_TENSORS:
        none = "" if header else "holds no tensors: "
        raise CheckpointError(f"{path}: {none}{len(header)} tensors; expected 1 to {MAX_TENSORS}")
    nested = all(name.startswith(OLD_PREFIX) for name in header)
    places: Places = {}
    unusable: dict[str, str] = {}
    for name, entry in header.items():
        check_name(path, name)
        info, begin, end, wrong = _entry(path, name, entry)
        name = name.removeprefix(OLD_PREFIX) if nested else name
        places[name] = (info, begin, end)
        if wrong:
            unusable[name] = wrong
    at = 0
    for name, (_, begin, end) in sorted(places.items(), key=lambda item: item[1][1:]):
        if begin != at:
            kind = "overlaps the tensor before it" if begin < at else "leaves a hole before it"
            raise CheckpointError(f"{path}: the data of {name} {kind}")
        at = end
    if at > size:
        raise CheckpointError(
            f"{path}: {size} bytes of data where the header says {at}; the file is cut off, get it again"
        )
    if at < size:
        raise CheckpointError(
            f"{path}: {size - at} bytes behind the last tensor; this is not a plain .safetensors file"
        )
    return metadata, places, unusable


def _entry(path: Path, name: str, entry: Any) -> tuple[TensorInfo, int, int, str]:
    """A tensor's description, where its data begins and ends, and what makes it unusable ("" if nothing does)."""

    def naturals(value: Any) -> bool:
        return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{path}: {name} must have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise CheckpointError(f"{path}: {name} has the dtype {describe(dtype)}, which is not supported")
    if not naturals(shape) or not naturals(offsets) or len(offsets) != 2 or len(shape) > 16:
        raise CheckpointError(f"{path}: {name} has a shape or data_offsets that are no lists of whole numbers")
    begin, end = offsets
    if begin > end:
        raise CheckpointError(f"{path}: {name} has {end - begin} bytes")
    info = TensorInfo(dtype, tuple(shape))
    if dtype not in DTYPES:
        return info, begin, end, f"has the dtype {describe(dtype)}, which is not supported"
    if math.prod(max(n, 1) for n in shape) >= MAX_SHAPE:
        return info, begin, end, f"has the shape {shape}, which is too large"
    held = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin == held:
        return info, begin, end, ""
    return info, begin, end, f"has {end - begin} bytes; the shape {shape} in {dtype} needs {held}"
