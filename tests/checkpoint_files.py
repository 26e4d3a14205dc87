"""Builders of small checkpoint files in the layouts that people have, and how tests read them."""

from __future__ import annotations

import contextlib
import json
import struct
import sys
import tracemalloc
import types
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from convert.files.open import open_source
from convert.files.source import DTYPES, CheckpointError

MB = 2**20
LIGHTNING_MODULE = "pytorch_lightning.callbacks.model_checkpoint"
SAFETENSORS_NAMES = {
    np.dtype(dtype): name
    for dtype, name in [
        ("f8", "F64"),
        ("f4", "F32"),
        ("f2", "F16"),
        (ml_dtypes.bfloat16, "BF16"),
        (ml_dtypes.float8_e4m3fn, "F8_E4M3"),
        (ml_dtypes.float8_e5m2, "F8_E5M2"),
        ("i8", "I64"),
        ("i4", "I32"),
        ("i2", "I16"),
        ("i1", "I8"),
        ("u8", "U64"),
        ("u4", "U32"),
        ("u2", "U16"),
        ("u1", "U8"),
        ("?", "BOOL"),
    ]
}
TORCH_SPECIAL = {
    np.dtype(ml_dtypes.bfloat16): torch.bfloat16,
    np.dtype(ml_dtypes.float8_e4m3fn): torch.float8_e4m3fn,
    np.dtype(ml_dtypes.float8_e5m2): torch.float8_e5m2,
}


def to_torch(array: np.ndarray) -> torch.Tensor:
    """The same numbers as a torch tensor; bfloat16 and float8 included."""
    special = TORCH_SPECIAL.get(array.dtype)
    if special is None:
        return torch.from_numpy(np.array(array))
    bits = np.array(array).view(f"u{array.dtype.itemsize}")
    return torch.from_numpy(bits).view(special)


@contextmanager
def lightning_class() -> Iterator[type]:
    """A stand-in ModelCheckpoint class, importable under Lightning's module name while it lasts."""
    stand_in = type("ModelCheckpoint", (), {"__module__": LIGHTNING_MODULE})
    modules = {}
    for name in ["pytorch_lightning", "pytorch_lightning.callbacks", LIGHTNING_MODULE]:
        modules[name] = types.ModuleType(name)
    modules[LIGHTNING_MODULE].ModelCheckpoint = stand_in  # type: ignore[attr-defined]
    with mock.patch.dict(sys.modules, modules):
        yield stand_in


def write_ckpt(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    *,
    lightning: bool = True,
    legacy: bool = False,
) -> None:
    """A torch .ckpt: with Lightning's metadata as in the official files, or a bare dict."""
    state: Any = {name: to_torch(array) for name, array in tensors.items()}
    with lightning_class() as model_checkpoint:
        if lightning:
            state = {
                "epoch": 840,
                "global_step": 840000,
                "pytorch-lightning_version": "1.4.2",
                "state_dict": state,
                "callbacks": {model_checkpoint: {"monitor": "val/loss", "best_model_path": "/x"}},
                "lr_schedulers": [],
            }
        torch.save(state, path, _use_new_zipfile_serialization=not legacy)


def write_safetensors(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    *,
    old_writer: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """A .safetensors file; `old_writer` leaves out the padding, as writers before 0.3.0 did."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offset = 0
    for name, array in tensors.items():
        header[name] = {
            "dtype": SAFETENSORS_NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    if not old_writer:
        text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in tensors.values():
            file.write(np.ascontiguousarray(array).tobytes())


def write_raw_safetensors(path: Path, header: bytes | dict, data: bytes = b"") -> None:
    """A .safetensors file with this header, right or wrong, and this data behind it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_torch_zip(
    path: Path,
    pickle: bytes,
    storages: Mapping[str, bytes] | None = None,
    *,
    folder: str = "archive",
    byteorder: str | None = None,
    compression: int = zipfile.ZIP_STORED,
) -> None:
    """A torch zip around a hand-made pickle and raw storage bytes by key."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(f"{folder}/data.pkl", pickle)
        if byteorder is not None:
            archive.writestr(f"{folder}/byteorder", byteorder)
        for key, data in (storages or {}).items():
            archive.writestr(f"{folder}/data/{key}", data)
        archive.writestr(f"{folder}/version", "3\n")


def pickled(value: str | int | Sequence[int | str]) -> bytes:
    """The opcodes that push a text, a whole number, or a tuple of these."""
    if isinstance(value, str):
        text = value.encode()
        return b"X" + struct.pack("<I", len(text)) + text
    if isinstance(value, int):
        return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)
    return b"(" + b"".join(map(pickled, value)) + b"t"


def tensor_pickle(
    *,
    name: str = "w",
    size: Sequence[int | str] = (3,),
    stride: Sequence[int | str] = (1,),
    offset: int | str = 0,
    numel: int | str = 3,
    storage: bytes = b"ctorch\nFloatStorage\n",
) -> bytes:
    """A hand-made pickle of {name: tensor} over the storage "0"; without arguments a right one."""
    place = b"(" + pickled("storage") + storage + pickled("0") + pickled("cpu") + pickled(numel) + b"tQ"
    arguments = b"(" + place + pickled(offset) + pickled(size) + pickled(stride) + b"\x89}t"
    return b"\x80\x02}" + pickled(name) + b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"Rs."


def peak_memory(function: Callable[[], Any]) -> int:
    """The most bytes that a call holds at one time, beyond what was held before it."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def read_all(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a file by name, each as its description says."""
    with open_source(path) as source:
        arrays = {name: source.read(name) for name in source.tensors}
        for name, (dtype, shape) in source.tensors.items():
            assert (arrays[name].dtype, arrays[name].shape) == (DTYPES[dtype], shape)
    return arrays


def refusal(path: Path, memory: int = 8 * MB) -> str:
    """The one line that opening and reading `path` ends in, with less than `memory` bytes held meanwhile."""

    def refused() -> None:
        with pytest.raises(CheckpointError) as caught:
            read_all(path)
        lines.append(str(caught.value))

    lines: list[str] = []
    assert peak_memory(refused) < memory
    assert lines[0].startswith(f"{path}: ")
    assert lines[0].isprintable()
    assert len(lines[0]) < 600
    return lines[0]


FUZZ = settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
CHANGES = st.lists(st.tuples(st.integers(0, 2**30), st.integers(0, 255)), min_size=1, max_size=4)


def damage(data: bytes, changes: Sequence[tuple[int, int]]) -> bytes:
    """The data with some bytes replaced: (where, by what)."""
    damaged = bytearray(data)
    for at, value in changes:
        damaged[at % len(damaged)] = value
    return bytes(damaged)


def survive(path: Path) -> None:
    """Fails if reading a file ends in anything but sound arrays or a refusal."""
    with contextlib.suppress(CheckpointError):
        read_all(path)
