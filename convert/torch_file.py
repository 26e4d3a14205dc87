"""Reading torch's .ckpt without torch, and without ever running the pickle in it.

A .ckpt is a zip archive of uncompressed records: `<name>/data.pkl`, a pickle that describes dicts of tensors, and
`<name>/data/<key>`, the raw bytes of each storage. A pickle is a program. Here it is read by a small interpreter of our
own that has no way to import or to call anything: what the pickle calls a global stays a pair of names, and the few
"calls" that checkpoints need (`CALLS`) build descriptions of tensors. Everything else is refused by name.
"""

from __future__ import annotations

import math
import os
import pickletools
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from convert.source import DTYPES, CheckpointError, Source, TensorInfo, read_at, unwrap

PICKLE_BOUND = 256 * 2**20  # bytes; the largest real one has 0.4 MB

STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "UntypedStorage": "U8",
}
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

INERT = {"pytorch_lightning", "lightning", "lightning_fabric", "omegaconf", "numpy", "typing"}
"""Packages whose objects lie beside the weights in real files. They become placeholders and are never looked at."""

INERT_GLOBALS = {
    ("_codecs", "encode"),
    ("__builtin__", "set"),
    ("builtins", "set"),
    ("__builtin__", "dict"),
    ("builtins", "dict"),
    ("__builtin__", "list"),
    ("builtins", "list"),
    ("__builtin__", "int"),
    ("builtins", "int"),
    ("__builtin__", "bytearray"),
    ("builtins", "bytearray"),
    ("collections", "defaultdict"),
    ("torch.nn.modules.container", "ParameterDict"),
    ("torch._utils", "_rebuild_device_tensor_from_numpy"),
    ("torch.torch_version", "TorchVersion"),
    ("torch", "device"),
}


class Global(NamedTuple):
    """What a pickle names as module and attribute; never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Placeholder(NamedTuple):
    """Stands for an object that is not needed."""

    kind: str


class Storage(NamedTuple):
    """A record of raw bytes: its key, dtype and number of elements."""

    key: str
    dtype: str
    numel: int


class View(NamedTuple):
    """A tensor: a strided view of a storage, in elements of `dtype`."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def open_torch(path: Path) -> Source:
    """Opens a zip .ckpt. Raises CheckpointError if it is damaged, unsafe, or something else."""
    records, pickle, swapped, descriptor = _open_archive(path)
    try:
        state = load_pickle(path, pickle)
        views, skipped, metadata = unwrap(state, path, lambda value: isinstance(value, View))
        for name, view in views.items():
            _check_view(path, name, view, records)
    except BaseException:
        os.close(descriptor)
        raise

    def read(name: str) -> np.ndarray:
        view = views[name]
        dtype = DTYPES[view.dtype]
        last = view.offset + sum((n - 1) * step for n, step in zip(view.shape, view.stride, strict=True))
        count = last + 1 - view.offset if math.prod(view.shape) else 0
        begin = records[view.storage.key].begin + view.offset * dtype.itemsize
        raw = read_at(descriptor, path, begin, count * dtype.itemsize)
        if swapped:
            raw = raw.view(f"u{dtype.itemsize}").byteswap().view(np.uint8)
        flat = raw.view(dtype)
        if count == math.prod(view.shape) and _contiguous(view):
            return flat.reshape(view.shape)
        steps = [step * dtype.itemsize for step in view.stride]
        return np.lib.stride_tricks.as_strided(flat, view.shape, steps).copy() if count else flat.reshape(view.shape)

    tensors = {name: TensorInfo(view.dtype, view.shape) for name, view in views.items()}
    return Source(path, "ckpt", tensors, read, lambda: os.close(descriptor), skipped, metadata)


class Record(NamedTuple):
    """Where a record's bytes lie in the file."""

    begin: int
    size: int


def _open_archive(path: Path) -> tuple[dict[str, Record], bytes, bool, int]:
    """The storages by key, the pickle, whether bytes are swapped, and an open descriptor of the file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with os.fdopen(os.dup(descriptor), "rb") as file:
            try:
                archive = zipfile.ZipFile(file)
            except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, OverflowError) as error:
                raise CheckpointError(
                    f"{path}: the zip directory is missing or damaged ({error}); get it again"
                ) from None
            infos = archive.infolist()
        places = _check_records(path, descriptor, infos)
        pickles = [name for name in places if name.endswith("/data.pkl") and name.count("/") == 1]
        if any(name.endswith("/constants.pkl") for name in places):
            raise CheckpointError(f"{path}: a TorchScript archive; expected a checkpoint of weights")
        if len(pickles) != 1:
            raise CheckpointError(f"{path}: a zip archive with {len(pickles)} data.pkl; a checkpoint of torch has one")
        folder = pickles[0].removesuffix("data.pkl")
        strangers = [name for name in places if not name.startswith(folder)]
        if strangers:
            raise CheckpointError(
                f"{path}: the record {strangers[0]!r} lies outside {folder}; this is no plain checkpoint"
            )
        if places[pickles[0]].size > PICKLE_BOUND:
            raise CheckpointError(
                f"{path}: a pickle of {places[pickles[0]].size} bytes; expected less than {PICKLE_BOUND}"
            )

        def content(name: str) -> bytes:
            return read_at(descriptor, path, *places[name]).tobytes()

        order = content(folder + "byteorder") if folder + "byteorder" in places else b"little"
        if order not in (b"little", b"big"):
            raise CheckpointError(f"{path}: the byte order {order[:20]!r} is unknown")
        storages = {
            name.removeprefix(folder + "data/"): place
            for name, place in places.items()
            if name.startswith(folder + "data/")
        }
        return storages, content(pickles[0]), order == b"big", descriptor
    except BaseException:
        os.close(descriptor)
        raise


def _check_records(path: Path, descriptor: int, infos: list[zipfile.ZipInfo]) -> dict[str, Record]:
    """Every record's place, from the directory and its local header, which must agree."""
    size = os.fstat(descriptor).st_size
    places: dict[str, Record] = {}
    for info in infos:
        name = info.orig_filename
        if name in places:
            raise CheckpointError(
                f"{path}: the record {name!r} is there twice; refused, programs disagree on which counts"
            )
        if ".." in name.split("/") or name.startswith("/") or "\\" in name or "\0" in name:
            raise CheckpointError(f"{path}: a record is called {name!r}; refused")
        if info.flag_bits & 0x2041:
            raise CheckpointError(f"{path}: the record {name!r} is encrypted; unpack the file first")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise CheckpointError(f"{path}: the record {name!r} is compressed; load and save the file again with torch")
        if info.header_offset + 30 > size:
            raise CheckpointError(f"{path}: the record {name!r} lies outside the file; it is cut off, get it again")
        head = read_at(descriptor, path, info.header_offset, 30).tobytes()
        length, extra = int.from_bytes(head[26:28], "little"), int.from_bytes(head[28:30], "little")
        begin = info.header_offset + 30 + length + extra
        if head[:4] != b"PK\x03\x04" or begin + info.file_size > size:
            raise CheckpointError(f"{path}: the record {name!r} is damaged or cut off; get the file again")
        local = read_at(descriptor, path, info.header_offset + 30, length).tobytes()
        if local.decode("utf-8", "replace") != name:
            raise CheckpointError(f"{path}: the record {name!r} has another name in its own header; refused")
        places[name] = Record(begin, info.file_size)
    at = 0
    for name, place in sorted(places.items(), key=lambda item: item[1]):
        if place.begin < at:
            raise CheckpointError(f"{path}: the record {name!r} overlaps another; refused")
        at = place.begin + place.size
    return places


def _check_view(path: Path, name: str, view: View, records: dict[str, Record]) -> None:
    if view.storage.key not in records:
        raise CheckpointError(f"{path}: the data of {name} (record {view.storage.key}) is missing; get the file again")
    size = records[view.storage.key].size
    held = view.storage.numel * DTYPES[view.storage.dtype].itemsize
    if size != held:
        raise CheckpointError(
            f"{path}: the storage of {name} has {size} bytes and should have {held}; get the file again"
        )
    numel = math.prod(view.shape)
    last = view.offset + sum((n - 1) * step for n, step in zip(view.shape, view.stride, strict=True))
    itemsize = DTYPES[view.dtype].itemsize
    if numel and ((last + 1) * itemsize > held or numel * itemsize > held):
        raise CheckpointError(f"{path}: {name} reaches beyond its storage (shape {view.shape}, stride {view.stride})")


def _contiguous(view: View) -> bool:
    expected = 1
    for n, step in zip(reversed(view.shape), reversed(view.stride), strict=True):
        if n != 1 and step != expected:
            return False
        expected *= n
    return True


def _naturals(value: Any) -> tuple[int, ...]:
    if (
        not isinstance(value, tuple)
        or len(value) > 16
        or not all(type(item) is int and 0 <= item < 2**48 for item in value)
    ):
        raise ValueError(f"sizes {str(value)[:60]}")
    return value


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> View:
    """torch._utils._rebuild_tensor_v2, and _v3 whose last argument is the dtype."""
    if not isinstance(storage, Storage):
        raise ValueError("a tensor without a storage")
    dtype = storage.dtype
    if len(rest) >= 3 and isinstance(rest[2], Global):
        dtype = TORCH_DTYPES[rest[2].name]
    shape, stride, (offset,) = _naturals(shape), _naturals(stride), _naturals((offset,))
    if len(shape) != len(stride):
        raise ValueError("a tensor with fewer strides than sizes")
    return View(storage, dtype, offset, shape, stride)


def _ordered_dict(items: Any = ()) -> dict[Any, Any]:
    return dict(items)


CALLS: dict[Global, Callable[..., Any]] = {
    Global("collections", "OrderedDict"): _ordered_dict,
    Global("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    Global("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor,
    Global("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    Global("torch._utils", "_rebuild_parameter_with_state"): lambda tensor, *_: tensor,
    Global("torch", "Size"): lambda sizes: tuple(sizes),
}
"""All that a pickle may "call", and what we do instead."""


def _is_known(name: Global) -> bool:
    if name in CALLS or name in INERT_GLOBALS or name.module.split(".")[0] in INERT:
        return True
    return name.module in ("torch", "torch.storage") and (name.name in STORAGES or name.name in TORCH_DTYPES)


MARK = object()


@dataclass
class Machine:
    """The interpreter's state."""

    path: Path
    stack: list[Any]
    memo: dict[int, Any]

    def to_mark(self) -> list[Any]:
        at = len(self.stack) - 1
        while self.stack[at] is not MARK:
            at -= 1
            if at < 0:
                raise ValueError("no mark")
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise ValueError("empty stack")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def name(self, module: Any, name: Any) -> Global:
        found = Global(str(module), str(name))
        if not _is_known(found):
            raise CheckpointError(
                f"{self.path}: the pickle names {str(found)[:100]}, which no checkpoint needs; refused, nothing was run"
            )
        return found

    def call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise ValueError("a call of something that is no function")
        if function in CALLS:
            return CALLS[function](*arguments)
        return Placeholder(str(function))

    def set_items(self, target: Any, items: list[Any]) -> None:
        if isinstance(target, Placeholder):
            return
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError("items for something that is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value

    def extend(self, target: Any, items: list[Any]) -> None:
        if isinstance(target, Placeholder):
            return
        if not isinstance(target, list):
            raise ValueError("items for something that is no list")
        target.extend(items)


def _key(key: Any) -> Any:
    """A dict key; classes stand as their names, and only plain values are taken."""
    if isinstance(key, Global | Placeholder):
        return str(key)
    if not isinstance(key, str | int | float | bool | bytes | None):
        raise ValueError(f"a dict key that is {type(key).__name__}")
    return key


def _storage(pid: Any) -> Storage:
    """The persistent id ("storage", type, key, location, number of elements)."""
    kind, storage_type, key, _, numel = pid
    if kind != "storage" or not isinstance(storage_type, Global) or not isinstance(key, str):
        raise ValueError("a persistent id that is no storage")
    return Storage(key, STORAGES[storage_type.name], _naturals((numel,))[0])


Push = Callable[[Machine, Any], Any]
PUSHES: dict[str, Push] = {
    "NONE": lambda m, a: None,
    "NEWTRUE": lambda m, a: True,
    "NEWFALSE": lambda m, a: False,
    "MARK": lambda m, a: MARK,
    "EMPTY_TUPLE": lambda m, a: (),
    "EMPTY_LIST": lambda m, a: [],
    "EMPTY_DICT": lambda m, a: {},
    "EMPTY_SET": lambda m, a: Placeholder("set"),
    "TUPLE": lambda m, a: tuple(m.to_mark()),
    "TUPLE1": lambda m, a: tuple(m.pop(1)),
    "TUPLE2": lambda m, a: tuple(m.pop(2)),
    "TUPLE3": lambda m, a: tuple(m.pop(3)),
    "LIST": lambda m, a: m.to_mark(),
    "FROZENSET": lambda m, a: Placeholder(f"frozenset of {len(m.to_mark())}"),
    "DUP": lambda m, a: m.stack[-1],
    "GLOBAL": lambda m, a: m.name(*a.split(" ", 1)),
    "STACK_GLOBAL": lambda m, a: m.name(*m.pop(2)),
    "BINPERSID": lambda m, a: _storage(*m.pop(1)),
    "REDUCE": lambda m, a: m.call(*m.pop(2)),
    "NEWOBJ": lambda m, a: m.call(*m.pop(2)),
    "NEWOBJ_EX": lambda m, a: m.call(*m.pop(3)[:2]),
    "GET": lambda m, a: m.memo[a],
    "BINGET": lambda m, a: m.memo[a],
    "LONG_BINGET": lambda m, a: m.memo[a],
} | dict.fromkeys(
    [
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
        *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    ],
    lambda m, a: a,
)
"""Opcodes that push one value."""


def _dict(machine: Machine) -> None:
    items = machine.to_mark()
    machine.stack.append({})
    machine.set_items(machine.stack[-1], items)


def _with_items(machine: Machine, apply: Callable[[Any, list[Any]], None], items: list[Any]) -> None:
    apply(machine.stack[-1], items)


def _build(machine: Machine) -> None:
    """An object's state is left out: OrderedDict's `_metadata`, a parameter's hooks, a placeholder's anything."""
    machine.pop(1)
    if not isinstance(machine.stack[-1], dict | Placeholder | View):
        raise ValueError("a state for something that has none")


def _memoize(machine: Machine, index: int) -> None:
    machine.memo[index] = machine.stack[-1]


ACTIONS: dict[str, Callable[[Machine, Any], Any]] = {
    "PROTO": lambda m, a: None,
    "FRAME": lambda m, a: None,
    "POP": lambda m, a: m.pop(1),
    "POP_MARK": lambda m, a: m.to_mark(),
    "DICT": lambda m, a: _dict(m),
    "SETITEM": lambda m, a: _with_items(m, m.set_items, m.pop(2)),
    "SETITEMS": lambda m, a: _with_items(m, m.set_items, m.to_mark()),
    "APPEND": lambda m, a: _with_items(m, m.extend, m.pop(1)),
    "APPENDS": lambda m, a: _with_items(m, m.extend, m.to_mark()),
    "ADDITEMS": lambda m, a: _with_items(m, m.extend, m.to_mark()),
    "BUILD": lambda m, a: _build(m),
    "PUT": lambda m, a: _memoize(m, int(a)),
    "BINPUT": _memoize,
    "LONG_BINPUT": _memoize,
    "MEMOIZE": lambda m, a: _memoize(m, len(m.memo)),
}
"""Opcodes that change what is there."""


def load_pickle(path: Path, data: bytes) -> Any:
    """What a pickle describes: dicts, lists, plain values, `View`s and `Placeholder`s.

    Raises:
        CheckpointError: it is damaged, or wants something that checkpoints do not need.
    """
    machine = Machine(path, [], {})
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return machine.pop(1)[0]
            if opcode.name in PUSHES:
                machine.stack.append(PUSHES[opcode.name](machine, argument))
            elif opcode.name in ACTIONS:
                ACTIONS[opcode.name](machine, argument)
            else:
                raise CheckpointError(f"{path}: the pickle uses {opcode.name}, which no checkpoint needs; refused")
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path}: the pickle is damaged ({type(error).__name__}: {str(error)[:80]})") from None
    raise CheckpointError(f"{path}: the pickle has no end; the file is damaged, get it again")
