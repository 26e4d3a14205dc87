"""Reading torch's .ckpt without torch, and without ever running the pickle in it.

A .ckpt is a zip archive of uncompressed records: `<name>/data.pkl`, a pickle that describes dicts of tensors, and
`<name>/data/<key>`, the raw bytes of each storage. The pickle is read as inert data (`convert.files.unpickle`): the few
functions that it names to make tensors (`CALLS`) make descriptions of them here.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from convert.files.source import DTYPES, MAX_SHAPE, CheckpointError, Source, TensorInfo, read_at, unwrap
from convert.files.unpickle import Global, Parameters, PickleError, load
from convert.files.zip_records import Record, locate, read_directory

PICKLE_BOUND = 32 * 2**20  # bytes; the largest in an official file has 0.4 MB

TORCH_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
"""torch's dtypes that can be read -> theirs in `DTYPES`."""

OTHER_DTYPES = {
    *("complex32", "complex64", "complex128", "quint8", "qint8", "qint32", "quint4x2", "quint2x4"),
    *("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2"),
    *(
        "bits1x8",
        "bits2x4",
        "bits4x2",
        "bits8",
        "bits16",
        *(f"{sign}int{n}" for sign in ("", "u") for n in range(1, 8)),
    ),
}
"""The other ones: a tensor of these is unusable, which does not matter where it is not needed."""

STORAGES = {
    Global("torch", "DoubleStorage"): "F64",
    Global("torch", "FloatStorage"): "F32",
    Global("torch", "HalfStorage"): "F16",
    Global("torch", "BFloat16Storage"): "BF16",
    Global("torch", "LongStorage"): "I64",
    Global("torch", "IntStorage"): "I32",
    Global("torch", "ShortStorage"): "I16",
    Global("torch", "CharStorage"): "I8",
    Global("torch", "ByteStorage"): "U8",
    Global("torch", "BoolStorage"): "BOOL",
    Global("torch.storage", "UntypedStorage"): "U8",
}

STORAGES |= {
    Global("torch", f"{name}Storage"): dtype
    for name, dtype in (
        *(("ComplexFloat", "complex64"), ("ComplexDouble", "complex128"), ("QInt8", "qint8"), ("QUInt8", "quint8")),
        *(("QInt32", "qint32"), ("QUInt4x2", "quint4x2"), ("QUInt2x4", "quint2x4")),
    )
}

INERT = {
    *STORAGES,
    *(Global("torch", name) for name in OTHER_DTYPES),
    *(Global("torch", name) for name in ("per_tensor_affine", "per_channel_affine", "strided", "sparse_coo")),
    *(Global("torch", name) for name in ("Generator", "contiguous_format", "channels_last", "preserve_format")),
    Global("torch.serialization", "_get_layout"),
    *(Global("torch", name) for name in TORCH_DTYPES),
    Global("torch", "Tensor"),
    Global("torch", "device"),
    Global("torch.nn.parameter", "Parameter"),
    Global("torch.torch_version", "TorchVersion"),
}
"""Globals of torch that may be there and do nothing."""


class Storage(NamedTuple):
    """A record of raw bytes: its key, dtype and number of elements."""

    key: str
    dtype: str
    numel: int


class Odd(NamedTuple):
    """A tensor that is no strided array, such as a sparse one: what it is."""

    kind: str
    shape: tuple[int, ...] = ()


class View(NamedTuple):
    """A tensor: a strided view of a storage, in elements of `dtype`."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def span(self) -> int:
        """The number of elements from the first to the last."""
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return last + 1 if self.numel else 0

    @property
    def contiguous(self) -> bool:
        steps = [math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape))]
        return all(size == 1 or a == b for size, a, b in zip(self.shape, self.stride, steps, strict=True))


def open_torch(path: Path) -> Source:
    """Opens a zip .ckpt. Raises CheckpointError if it is damaged, unsafe, or something else."""
    file = open(path, "rb", buffering=0)  # noqa: SIM115, the source closes it
    try:
        storages, pickle, swapped = _open_archive(file)
        try:
            state = load(pickle, CALLS, INERT, storage_of)
        except PickleError as error:
            raise CheckpointError(f"{path}: {error}") from None
        views, skipped, metadata = unwrap(state, path, lambda value: isinstance(value, View | Odd))
        size = os.fstat(file.fileno()).st_size
        wrong = {name: _problem(view, storages, size) for name, view in views.items()}
    except BaseException:
        file.close()
        raise

    def read(name: str) -> np.ndarray:
        view = views[name]
        dtype = DTYPES[view.dtype]
        begin = storages[view.storage.key].begin + view.offset * dtype.itemsize
        flat = read_at(file, begin, view.span * dtype.itemsize).view(dtype)
        if swapped:
            flat.view(f"u{dtype.itemsize}").byteswap(inplace=True)
        if not view.numel or view.contiguous:
            return flat.reshape(view.shape)
        steps = [step * dtype.itemsize for step in view.stride]
        return np.lib.stride_tricks.as_strided(flat, view.shape, steps).copy()

    tensors = {
        name: TensorInfo(view.kind if isinstance(view, Odd) else view.dtype, view.shape) for name, view in views.items()
    }
    unusable = {name: problem for name, problem in wrong.items() if problem}
    begins = {
        name: storages[view.storage.key].begin + view.offset for name, view in views.items() if name not in unusable
    }
    return Source(path, "ckpt", tensors, read, file.close, skipped, metadata, unusable, begins)


def _open_archive(file: FileIO) -> tuple[dict[str, Record], bytes, bool]:
    """The storages by key, the pickle, and whether the bytes of their numbers are swapped."""
    path = file.name
    entries, directory = read_directory(file)
    names = [entry.text for entry in entries]
    if any(name.endswith("/constants.pkl") for name in names):
        raise CheckpointError(f"{path}: a TorchScript archive; expected a checkpoint of weights")
    pickles = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
    if names and all(name.endswith(".npy") for name in names):
        raise CheckpointError(f"{path}: arrays of numpy (.npz); expected a .ckpt or .safetensors")
    if not pickles:
        few = ", ".join(ascii(name[:60])[1:-1] for name in names[:3]) or "nothing"
        raise CheckpointError(
            f"{path}: a zip archive with 0 data.pkl, which holds {few}; a checkpoint of torch has one"
        )
    if len(pickles) != 1:
        raise CheckpointError(f"{path}: a zip archive with {len(pickles)} data.pkl; a checkpoint of torch has one")
    folder = pickles[0].removesuffix("data.pkl")
    for name in names:
        if not name.startswith(folder):
            raise CheckpointError(f"{path}: the record {name!r} lies outside {folder!r}; this is no plain checkpoint")
    records = locate(file, entries, directory)
    order = records.get(folder + "byteorder")
    value = b"little" if order is None else read_at(file, order.begin, min(order.size, 16)).tobytes()
    if value not in (b"little", b"big"):
        raise CheckpointError(f"{path}: the byte order {value!r} is unknown; expected 'little' or 'big'")
    pickle = records[pickles[0]]
    if pickle.size > PICKLE_BOUND:
        raise CheckpointError(f"{path}: a pickle of {pickle.size} bytes; expected at most {PICKLE_BOUND}")
    data = folder + "data/"
    storages = {name.removeprefix(data): record for name, record in records.items() if name.startswith(data)}
    return storages, read_at(file, *pickle).tobytes(), value == b"big"


def _problem(view: View | Odd, storages: dict[str, Record], file_size: int) -> str:
    """What makes a tensor unusable; "" if every number of it is in its storage."""
    if isinstance(view, Odd):
        return f"is {view.kind}, which is not supported"
    storage = view.storage
    if not {view.dtype, storage.dtype} <= set(DTYPES):
        return f"has the dtype {storage.dtype if storage.dtype not in DTYPES else view.dtype}, which is not supported"
    if storage.key not in storages:
        return "has no data, which is missing in the file; get the file again"
    itemsize = DTYPES[view.dtype].itemsize
    size = storages[storage.key].size
    held = storage.numel * DTYPES[storage.dtype].itemsize
    if size != held:
        return f"has {size} bytes of data and should have {held}; get the file again"
    if (view.offset + view.span) * itemsize > held and view.numel:
        return f"reaches beyond its data (shape {view.shape}, stride {view.stride})"
    if view.numel * itemsize > file_size or math.prod(max(n, 1) for n in view.shape) >= MAX_SHAPE:
        return f"has the shape {view.shape}, more than the whole file could hold"
    return ""


def _naturals(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple) or len(value) > 16:
        raise ValueError("sizes that are no short tuple")
    if not all(type(item) is int and 0 <= item < 2**48 for item in value):
        raise ValueError("sizes that are no whole numbers")
    return value


def storage_of(pid: Any) -> Storage:
    """The persistent id ("storage", type, key, location, number of elements), and more in legacy files."""
    if isinstance(pid, tuple) and pid[:1] == ("module",) and isinstance(pid[1], Global):
        raise PickleError(f"holds {pid[1]} as torch before 1.6 wrote it; load it with torch and save it again")
    kind, storage, key, _, numel, *_ = pid
    if kind != "storage" or not isinstance(storage, Global) or not isinstance(key, str):
        raise ValueError("a persistent id that is no storage")
    return Storage(key, STORAGES[storage], *_naturals((numel,)))


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> View:
    """torch._utils._rebuild_tensor_v2, and _v3 whose argument after two more is the dtype."""
    if not isinstance(storage, Storage):
        raise ValueError("a tensor without a storage")
    dtype = storage.dtype
    if len(rest) > 2 and isinstance(rest[2], Global):
        name = rest[2].name
        dtype = name if name in OTHER_DTYPES else TORCH_DTYPES[name]
    shape, stride, (offset,) = _naturals(shape), _naturals(stride), _naturals((offset,))
    if len(shape) != len(stride):
        raise ValueError("a tensor with fewer strides than sizes")
    return View(storage, dtype, offset, shape, stride)


def _ordered_dict() -> dict[str, Any]:
    """An OrderedDict begins empty; what it holds is put in later, item by item."""
    return {}


def _with_attributes(function: Any, _kind: Any, arguments: Any, _state: Any) -> Any:
    """torch._tensor._rebuild_from_type_v2: a tensor that has attributes, which are left out."""
    if not isinstance(function, Global) or not isinstance(arguments, tuple):
        raise ValueError("a tensor that no function makes")
    return CALLS[function](*arguments)


def _odd(kind: str) -> Callable[..., Odd]:
    return lambda *_: Odd(kind)


CALLS: dict[Global, Callable[..., Any]] = {
    Global("torch._utils", "_rebuild_qtensor"): _odd("a quantised tensor"),
    Global("torch._utils", "_rebuild_sparse_tensor"): _odd("a sparse tensor"),
    Global("torch._utils", "_rebuild_sparse_csr_tensor"): _odd("a sparse tensor"),
    Global("torch._utils", "_rebuild_nested_tensor"): _odd("a nested tensor"),
    Global("torch._utils", "_rebuild_meta_tensor_no_storage"): _odd("a tensor without numbers (meta)"),
    Global("torch._utils", "_rebuild_wrapper_subclass"): _odd("a wrapped tensor"),
    Global("torch._utils", "_rebuild_device_tensor_from_numpy"): _odd("a tensor in numpy's form"),
    Global("collections", "OrderedDict"): _ordered_dict,
    Global("torch", "Size"): lambda sizes: sizes,
    Global("torch._utils", "_rebuild_tensor_v2"): _tensor,
    Global("torch._utils", "_rebuild_tensor_v3"): _tensor,
    Global("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    Global("torch._utils", "_rebuild_parameter_with_state"): lambda tensor, *_: tensor,
    Global("torch._tensor", "_rebuild_from_type_v2"): _with_attributes,
    Global("torch.nn.modules.container", "ParameterDict"): lambda *_: Parameters(),
}
"""All that the pickle may call, and what we do instead."""
