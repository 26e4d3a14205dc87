"""Compiled programs: kept on disk between processes, and made ahead of time.

Two things are kept in one folder (`keep_programs`). The programs of `sdjax.devices.placement` are kept as whole
executables: a later process loads them and neither traces, lowers nor compiles. All else that is jitted (a training
step, small helpers) is left to JAX's own cache, in `FOLDER/jax`, which saves the compilation alone.

An executable is found by all that it depends on: the function and its fixed arguments, the arguments' shapes, the
placement, JAX's version and configuration, the device or the CPU's instructions, and the text of this package. Whatever
differs is another file, so a stale one is never loaded; one that is damaged is compiled anew and replaced. They are
machine code and pickles, so whoever writes them runs code in the reader's name: the folder must be its user's alone.

Two kinds are left to JAX's cache: those of `jax.pmap`, which cannot be traced apart from being called, and those of a
job of several processes, which number their devices by themselves.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
import platform
import re
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import flax
import jax
import jaxlib
import numpy as np
from jax.experimental import serialize_executable

from sdjax.devices.platform import pinned

COMPILED = "/jax/core/compile/backend_compile_duration"
"""JAX's event for a program that was compiled, or read from the cache."""

FROM_CACHE = "/jax/compilation_cache/cache_hits"
"""JAX's event for a program that was read from its cache."""

WORTH_KEEPING = 0.2
"""Seconds of compilation from which JAX's cache keeps a program."""

SUFFIX = ".executable"

UNUSED = 30 * 86400
"""Seconds after which a file that no process has read is deleted."""

SAYS_NOTHING = re.compile(
    r"jax_(compilation_cache|persistent_cache|raise_persistent|enable_compilation_cache|log|debug_log|explain|dump"
    r"|include_debug_info|include_full_tracebacks|traceback|tracer_error|platforms$|platform_name|check_proxy)"
)
"""What of JAX's configuration says where things are kept and what is shown, and changes no program."""

_kept: Path | None = None  # the folder, once `keep_programs` was called
_lock = threading.Lock()
_whole = 0  # compilations under way that are none of JAX's cache
_thread = threading.local()


# The folder


def keep_programs(folder: Path) -> None:
    """From here on this process reads compiled programs from `folder`, and puts new ones there.

    A folder that is not there is made, for its user alone. Files that no process has read for a month are deleted when
    a new one is written.

    Raises:
        PermissionError: the folder is another user's, or others can write to it. OSError: it cannot be made.
    """
    global _kept
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.geteuid():
        raise PermissionError(f"{folder}: belongs to another user, whose programs are not run")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{folder}: others can write to it, and their programs are not run; chmod 700 it")
    if _kept is None:
        jax.monitoring.register_event_listener(_notice)
    _kept = folder
    jax.config.update("jax_compilation_cache_dir", str(folder / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH_KEEPING)


def kept_in() -> Path | None:
    """The folder that programs are kept in; None if they are not."""
    return _kept


def drop_damaged(warning: str) -> str:
    """Deletes files of JAX's cache that it warns it cannot read, and returns the note to show for the warning.

    Such a file was cut off while it was written. JAX says only the name of the program and never overwrites the file,
    so all files of that name are deleted. Any other warning is returned as it is.
    """
    found = re.search(r"Error reading persistent compilation cache entry for '(\w+)'", warning)
    if found is None:
        return warning
    folder = Path(jax.config.values["jax_compilation_cache_dir"])
    for path in folder.glob(f"{found[1]}-*-cache"):
        path.unlink(missing_ok=True)
    return f"a compiled program in {folder} was damaged; it is compiled again"


def _read(name: str) -> bytes | None:
    """A file's content; None if it is not there, not whole, or not this user's."""
    if _kept is None:
        return None
    with suppress(OSError), open(os.open(_kept / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
        found = os.fstat(file.fileno())
        if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return None
        digest, body = file.read(32), file.read()
        if hashlib.sha256(body).digest() == digest:
            with suppress(OSError):
                os.utime(file.fileno())  # it was used
            return body
    return None


def _write(name: str, body: bytes) -> None:
    """Puts a file there, whole or not at all; where that cannot be, there is none."""
    if _kept is None:
        return
    with suppress(OSError):
        handle, temporary = tempfile.mkstemp(suffix=".partial", dir=_kept)
        try:
            with open(handle, "wb") as file:
                file.write(hashlib.sha256(body).digest())
                file.write(body)
            os.replace(temporary, _kept / name)
        except BaseException:
            os.unlink(temporary)
            raise
        _delete_unused(_kept)


@functools.cache  # once for each process
def _delete_unused(folder: Path) -> None:
    """Deletes what nobody has used for long: executables, JAX's own files, and what killed processes left."""
    for path in (*folder.iterdir(), *(folder / "jax").glob("*")):
        if path.name.endswith((SUFFIX, ".partial", "-cache")):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > UNUSED:
                    path.unlink()


# What an executable depends on


@functools.cache
def _versions() -> str:
    """What of the software and the machine machine code depends on, as a hash of it and of this package's text."""
    digest = hashlib.sha256()
    for said in (sys.version, jax.__version__, jaxlib.__version__, flax.__version__, np.__version__, *_machine()):
        digest.update(said.encode() + b"\0")
    root = Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root)} {len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def _machine() -> list[str]:
    """What instructions this machine's processors take, and how many of them there are."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    said = [platform.machine(), platform.processor(), str(count)]
    with suppress(OSError):
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        named = r"^(?:vendor_id|cpu family|model|model name|flags|Features|CPU \w+)\s*:.*$"
        said += re.findall(named, first, re.MULTILINE)
    return said


def _configuration() -> list[str]:
    """JAX's configuration here and now, that of `with` blocks included, and what the environment says to XLA."""
    names = [name for name in jax.config.values if not SAYS_NOTHING.match(name)]
    found = [f"{name}={_now(name)!r}" for name in sorted(names)]
    return found + [f"{name}={os.environ.get(name)}" for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS", *_nvidia())]


def _now(name: str) -> Any:
    """A setting of JAX, that of a `with` block if this is inside one."""
    return getattr(jax.config, name, jax.config.values[name])


def _nvidia() -> list[str]:
    return sorted(name for name in os.environ if name.startswith(("NVIDIA_TF32", "CUDNN_", "CUBLAS_")))


def identity_of(function: Callable[..., Any]) -> str | None:
    """A name for a function with its fixed arguments, the same in every process; None where there is none."""
    fixed: list[str] = []
    if isinstance(function, functools.partial):
        fixed = [*map(repr, function.args), *(f"{name}={value!r}" for name, value in sorted(function.keywords.items()))]
        function = function.func
    name = f"{getattr(function, '__module__', '<')}.{getattr(function, '__qualname__', '<')}"
    said = f"{name}({', '.join(fixed)})"
    return None if "<" in name or " at 0x" in said else said


def _placed(sharding: jax.sharding.Sharding) -> str:
    """A sharding, with the numbers of its devices in their order."""
    if isinstance(sharding, jax.sharding.NamedSharding):
        return f"{sharding} {list(sharding.mesh.device_ids.flat)}"
    return f"{sharding} {sorted(map(str, sharding.device_set))}"


# Programs


class Ahead:
    """A program for arguments of fixed shapes, before it is called with any; called, it is traced and lowered.

    name: of the file that it is kept in; None: it is not kept.
    devices: those that it runs on, if it is kept.
    shapes: what gives the shapes of what it returns, if that is not what the jitted function returns.
    """

    def __init__(
        self,
        jitted: Any,
        arguments: Sequence[Any],
        name: str | None = None,
        devices: Sequence[jax.Device] = (),
        shapes: Callable[[], Any] | None = None,
    ) -> None:
        self.jitted, self.name, self.devices, self._shapes = jitted, name, devices, shapes
        self.arguments = jax.tree.map(_struct, tuple(arguments))
        self._traced: Any = None
        self._lowered: Any = None
        self._read: tuple[Any, bytes] | None = None
        self._looked, self._ready = name is None, False
        self._compiled: Any = None
        self._lock = threading.RLock()

    @pinned
    def __call__(self) -> jax.stages.Lowered:
        with self._lock:
            if self._lowered is None:
                self._lowered = self.jitted.lower(*self.arguments) if self._shapes else self._trace().lower()
            return self._lowered

    @pinned
    def _trace(self) -> Any:
        if self._traced is None:
            self._traced = self.jitted.trace(*self.arguments)
        return self._traced

    def is_kept(self) -> bool:
        """Whether there is a file of it, which needs not be traced."""
        with self._lock:
            if not self._looked:
                self._looked = True
                body = _read(self.name or "")
                with suppress(Exception):  # a pickle of other classes
                    self._read = None if body is None else pickle.loads(body)
            return self._read is not None

    def shapes(self) -> Any:
        """The shapes of what it returns (`jax.ShapeDtypeStruct`)."""
        with self._lock:
            if self.is_kept():
                assert self._read is not None
                return self._read[0]
            if self._shapes:
                return self._shapes()
            return jax.tree.map(_struct, self._trace().out_info)

    def ready(self) -> Any:
        """The executable: loaded, or compiled and then kept. None where calls of the jitted function find it."""
        with self._lock:
            if not self._ready:
                self._compiled = self._loaded() if self.is_kept() else None
                if self._compiled is None:
                    self._compiled = self._compile()
                self._ready, self._read, self._traced, self._lowered = True, None, None, None
            return self._compiled

    def _loaded(self) -> Any:
        assert self._read is not None
        (out, code), self._read = self._read, None
        in_tree, out_tree = jax.tree.structure((self.arguments, {})), jax.tree.structure(out)
        where = dict(backend=self.devices[0].client, execution_devices=self.devices)
        with suppress(Exception):
            return serialize_executable.deserialize_and_load(code, in_tree, out_tree, **where)
        return None

    def _compile(self) -> Any:
        if self.name is None:
            self().compile()  # the jitted function finds it
            return None
        lowered, out = self(), self.shapes()
        with _past_the_cache() as is_fresh:
            compiled = lowered.compile()
        if is_fresh():  # what came from JAX's cache lacks half of its code when it is written again
            with suppress(Exception):  # as with custom calls of oneDNN (std::bad_alloc)
                _write(self.name, pickle.dumps((out, serialize_executable.serialize(compiled)[0])))
        return compiled


def _struct(leaf: Any) -> Any:
    """A leaf's shape and, where it is bound to devices, its sharding; what has no shape is left as it is."""
    if isinstance(leaf, jax.ShapeDtypeStruct) or not hasattr(leaf, "dtype"):
        return leaf
    sharding = leaf.sharding if getattr(leaf, "committed", False) else None
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding, weak_type=getattr(leaf, "weak_type", False))


class Kept:
    """A jitted function whose executables are kept between processes, once `keep_programs` was called.

    jitted: made by `jax.jit`.
    identity: what it is and how it is placed; None: it cannot be said, and JAX's own cache has to do.
    devices: those that it runs on, None: the default one.
    """

    def __init__(self, jitted: Any, identity: str | None, devices: Sequence[jax.Device] | None) -> None:
        self.jitted, self.identity, self._devices = jitted, identity, devices
        self.entries: dict[Any, Ahead] = {}
        self._latest: Any = None

    def __call__(self, *arguments: Any) -> Any:
        if _kept is None or self.identity is None:
            return self.jitted(*arguments)
        if self._latest is not None and self._latest[0] == _context():
            try:
                return self._latest[1](*arguments)
            except (TypeError, ValueError):  # other shapes, or other devices, which it sees before it runs
                pass
        if _now("jax_disable_jit") or any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arguments)):
            return self.jitted(*arguments)
        ahead = self.ahead(*arguments)
        if ahead.name is None:
            return self.jitted(*arguments)
        compiled = ahead.ready()
        try:
            result = compiled(*arguments)
        except (TypeError, ValueError):
            return self.jitted(*arguments)  # which moves its arguments, or says what is wrong with them
        self._latest = _context(), compiled
        return result

    def ahead(self, *arguments: Any) -> Ahead:
        """The program for arguments of which shapes are enough; asked for again, the same."""
        devices = tuple(self._devices or jax.local_devices()[:1])
        if _kept is None or self.identity is None or jax.process_count() > 1:
            return Ahead(self.jitted, arguments)
        home = jax.sharding.SingleDeviceSharding(devices[0]) if self._devices is None else None
        leaves, tree = jax.tree.flatten(arguments)
        places = [
            None if struct.sharding == home else struct.sharding if hasattr(struct, "dtype") else type(struct)
            for struct in map(_struct, leaves)
        ]
        kinds = [
            (np.shape(leaf), str(getattr(leaf, "dtype", "")), getattr(leaf, "weak_type", False)) for leaf in leaves
        ]
        key = (tree, *kinds, *places, *_configuration())
        with _lock:
            if key not in self.entries:
                said = [self.identity, _versions(), str(tree), *map(str, kinds), *map(_said, places)]
                said += [*_configuration(), *map(_device, devices)]
                digest = hashlib.sha256("\0".join(said).encode()).hexdigest()
                name = f"{self.jitted.__name__}-{digest}{SUFFIX}"
                self.entries[key] = Ahead(self.jitted, arguments, name, devices)
            return self.entries[key]


def _said(place: Any) -> str:
    return _placed(place) if isinstance(place, jax.sharding.Sharding) else str(place)


def _device(device: jax.Device) -> str:
    return f"{device.id} {device.platform} {device.device_kind} {device.client.platform_version}"


def _context() -> tuple[Any, ...]:
    """What of JAX's configuration people set for a `with` block and is another program."""
    names = ("default_matmul_precision", "default_device", "debug_nans", "debug_infs", "disable_jit")
    return tuple(_now(f"jax_{name}") for name in names)


# Compilations


def _notice(event: str, **_: Any) -> None:
    if event == FROM_CACHE:
        _thread.from_cache = True


@contextmanager
def _past_the_cache() -> Iterator[Callable[[], bool]]:
    """Inside, JAX's own cache keeps nothing; gives what says whether this thread compiled without it so far.

    One setting serves all threads: while a program is compiled that is kept whole, small ones are not kept.
    """
    global _whole
    with _lock:
        _whole += 1
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
    _thread.from_cache = False
    try:
        yield lambda: not _thread.from_cache
    finally:
        with _lock:
            _whole -= 1
            if not _whole:
                jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH_KEEPING)


@contextmanager
def compile_in_background() -> Iterator[Callable[[Iterable[Ahead]], None]]:
    """Makes programs ready at the side, all at once, while the inside does something else; at the end waits for them.

    A call of the program then finds it compiled. What cannot be compiled says so there. Programs that are kept are
    loaded, which takes no Python. Tracing is Python, of which one thread runs at a time: programs are traced one after
    the other, the first before `start` returns, so that nothing holds up its compilation.
    """
    with ThreadPoolExecutor() as pool, ThreadPoolExecutor(1) as tracer:

        def ready(ahead: Ahead) -> None:
            with suppress(Exception):
                ahead.ready()

        def begin(ahead: Ahead) -> None:
            with suppress(Exception):
                if not ahead.is_kept():
                    ahead()
                pool.submit(ready, ahead)

        def start(programs: Iterable[Ahead]) -> None:
            first, *others = programs
            begin(first)
            for ahead in others:
                tracer.submit(begin, ahead)

        yield start


@contextmanager
def compilations() -> Iterator[dict[str, float]]:
    """Seconds of every program that is compiled inside, by its name; of several with one name, the sum."""
    found: dict[str, float] = {}
    listening = True

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if listening and event == COMPILED:
            name = str(kwargs.get("fun_name", "unnamed")).removeprefix("jit(").removesuffix(")")
            found[name] = found.get(name, 0.0) + duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        listening = False  # JAX offers no way to take a listener back
