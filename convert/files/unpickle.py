"""A pickle as inert data.

A pickle is a program. Here it is run by a small interpreter that has no way to import or to call anything: what the
pickle calls a global stays a pair of names, known pairs alone are taken, and the few "calls" that a reader needs are
given to it as a table. Everything else becomes a placeholder or is refused by name.

Values are never compared, hashed or printed unless their type bounds the cost: a short pickle can describe a tuple that
is nested a million deep, or one that would be a terabyte of text.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, NamedTuple

OPCODE_BOUND = 1_000_000  # a tensor takes some 45

INERT_PACKAGES = {"pytorch_lightning", "lightning", "lightning_fabric", "lightning_utilities", "omegaconf"}
"""Packages whose objects are stored next to the weights in real files; any class of theirs becomes a placeholder."""


class Global(NamedTuple):
    """What a pickle names as module and attribute; never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Placeholder(NamedTuple):
    """Stands for an object that is not needed."""

    kind: str


@dataclass
class Parameters:
    """Stands for a torch.nn.ParameterDict; of the object's state the parameters are kept."""

    entries: dict[str, Any] = field(default_factory=dict)


class PickleError(ValueError):
    """A pickle that cannot be read; one line without the file's name."""


BUILTINS = (
    *("set", "frozenset", "dict", "list", "tuple", "int", "long", "float", "complex", "bool"),
    *("str", "unicode", "bytes", "bytearray", "object"),
)
PATHS = ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
INERT = {
    *(Global(module, name) for module in ("__builtin__", "builtins") for name in BUILTINS),
    *(Global(module, name) for module in ("pathlib", "pathlib._local") for name in PATHS),
    *(Global(f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    Global("numpy", "dtype"),
    Global("numpy", "ndarray"),
    Global("_codecs", "encode"),
    Global("argparse", "Namespace"),
    *(Global("collections", name) for name in ("defaultdict", "Counter", "deque")),
    *(Global("datetime", name) for name in ("datetime", "date", "timedelta", "timezone")),
    *(Global("numpy.random._pickle", f"__{name}_ctor") for name in ("randomstate", "generator", "bit_generator")),
    *(Global(f"numpy.random._{name.lower()}", name) for name in ("MT19937", "PCG64", "Philox")),
    Global("types", "SimpleNamespace"),
    Global("decimal", "Decimal"),
    Global("uuid", "UUID"),
    Global("copyreg", "_reconstructor"),
    Global("copy_reg", "_reconstructor"),
    Global("typing", "Any"),
    Global("typing", "Union"),
}
"""Other objects that are stored next to the weights."""

MARK = object()
Calls = Mapping[Global, Callable[..., Any]]


def load(data: bytes | BytesIO, calls: Calls, inert: set[Global], persistent: Callable[[Any], Any]) -> Any:
    """What a pickle describes: dicts with texts as keys, lists, tuples, plain values, and what `calls` made.

    data: bytes, or a BytesIO, which is read from where it stands to the end of the pickle. calls: what a global
    does when the pickle calls it. inert: further globals that may be there. persistent: what becomes of a persistent
    id.

    Raises:
        PickleError: the pickle is damaged, too long, or wants something that is not known.
    """
    machine = Machine(calls, INERT | inert, persistent)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if opcode.name == "STOP":
                return machine.pop(1)[0]
            if count == OPCODE_BOUND:
                raise PickleError(f"a pickle of more than {OPCODE_BOUND} steps; this is no checkpoint")
            if opcode.name in PUSHES:
                machine.stack.append(PUSHES[opcode.name](machine, argument))
            elif opcode.name in ACTIONS:
                ACTIONS[opcode.name](machine, argument)
            else:
                raise PickleError(f"the pickle uses {opcode.name}, which no checkpoint needs; refused, nothing was run")
    except PickleError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, RecursionError) as error:
        reason = ascii(str(error))[1:80].rstrip("'\"")
        raise PickleError(f"the pickle is damaged ({type(error).__name__}: {reason}); get the file again") from None
    raise PickleError("the pickle has no end; the file is damaged, get it again")


def describe(value: Any) -> str:
    """A short printable text for any value, however large: a number or short text itself, else its type."""
    if isinstance(value, Placeholder | Global):
        return value.kind if isinstance(value, Placeholder) else str(value)
    if value is None or isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 2**63):
        return str(value)
    if isinstance(value, str) and len(value) < 60 and value.isprintable():
        return repr(value)
    return type(value).__name__


@dataclass
class Machine:
    """The interpreter's state."""

    calls: Calls
    inert: set[Global]
    persistent: Callable[[Any], Any]
    stack: list[Any] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise ValueError("empty stack")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def to_mark(self) -> list[Any]:
        for at in reversed(range(len(self.stack))):
            if self.stack[at] is MARK:
                items = self.stack[at + 1 :]
                del self.stack[at:]
                return items
        raise ValueError("no mark")

    def name(self, module: Any, name: Any) -> Global:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a global whose name is no text")
        found = Global(module, name)
        is_class = module.split(".")[0] in INERT_PACKAGES and re.fullmatch(r"[A-Z][A-Za-z0-9_]*", name)
        if is_class and re.fullmatch(r"[a-z0-9_.]+", module):
            return found
        if found in self.calls or found in self.inert:
            return found
        text = ascii(str(found)[:100])[1:-1]
        raise PickleError(f"the pickle names {text}, which no checkpoint of weights needs; refused, nothing was run")

    def call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise ValueError("a call of something that is no function")
        if function in self.calls:
            return self.calls[function](*arguments)
        return Placeholder(str(function))

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Placeholder):
            return
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError("items for something that is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[key_text(key)] = value

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Placeholder):
            return
        if not isinstance(target, list):
            raise ValueError("items for something that is no list")
        target.extend(items)

    def build(self) -> None:
        """An object's state is left out: OrderedDict's `_metadata`, a parameter's hooks, anything of a placeholder.

        A ParameterDict alone keeps of it what it is for.
        """
        (state,) = self.pop(1)
        target = self.stack[-1]
        if isinstance(target, Global) or target is MARK:
            raise ValueError("a state for something that has none")
        parameters = state.get("_parameters") if isinstance(state, dict) else None
        if isinstance(target, Parameters) and isinstance(parameters, dict):
            target.entries = parameters

    def memoize(self, index: int) -> None:
        self.memo[index] = self.stack[-1]


def key_text(key: Any) -> str:
    """A dict's key as text. Only texts are hashed: of numbers a file could hold a million that collide."""
    if isinstance(key, str):
        return key
    if isinstance(key, int | float | None | Global | Placeholder):
        return describe(key)
    raise ValueError(f"a dict key that is {type(key).__name__}")


PUSHES: dict[str, Callable[[Machine, Any], Any]] = {
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
    "FROZENSET": lambda m, a: Placeholder(f"frozenset of {len(m.to_mark())}"),
    "GLOBAL": lambda m, a: m.name(*a.split(" ", 1)),
    "STACK_GLOBAL": lambda m, a: m.name(*m.pop(2)),
    "BINPERSID": lambda m, a: m.persistent(*m.pop(1)),
    "REDUCE": lambda m, a: m.call(*m.pop(2)),
    "NEWOBJ": lambda m, a: m.call(*m.pop(2)),
    "NEWOBJ_EX": lambda m, a: m.call(*m.pop(3)[:2]),
    "BINGET": lambda m, a: m.memo[a],
    "LONG_BINGET": lambda m, a: m.memo[a],
} | dict.fromkeys(
    [
        *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINSTRING", "SHORT_BINSTRING"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    ],
    lambda m, a: a,
)
"""Opcodes that push one value."""

ACTIONS: dict[str, Callable[[Machine, Any], Any]] = {
    "PROTO": lambda m, a: None,
    "FRAME": lambda m, a: None,
    "POP": lambda m, a: m.pop(1),
    "POP_MARK": lambda m, a: m.to_mark(),
    "SETITEM": lambda m, a: m.set_items(m.pop(2)),
    "SETITEMS": lambda m, a: m.set_items(m.to_mark()),
    "APPEND": lambda m, a: m.extend(m.pop(1)),
    "APPENDS": lambda m, a: m.extend(m.to_mark()),
    "ADDITEMS": lambda m, a: m.extend(m.to_mark()),
    "BUILD": lambda m, a: m.build(),
    "BINPUT": lambda m, a: m.memoize(a),
    "LONG_BINPUT": lambda m, a: m.memoize(a),
    "MEMOIZE": lambda m, a: m.memoize(len(m.memo)),
}
"""Opcodes that change what is there."""
