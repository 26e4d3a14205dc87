"""Compiled programs: kept on disk between processes, and made ahead of time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import jax

COMPILED = "/jax/core/compile/backend_compile_duration"
"""JAX's event for a program that was compiled, or read from the cache."""

WORTH_KEEPING = 0.2
"""Seconds of compilation from which a program is kept."""


def keep_programs(folder: Path) -> None:
    """From here on this process reads compiled programs from `folder`, and puts new ones there.

    Programs are found by what they compute, JAX's version and the device; a changed one is recompiled.
    """
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH_KEEPING)


def drop_damaged(warning: str) -> str:
    """Deletes kept programs that JAX warns it cannot read, and returns the note to show for the warning.

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


Lower = Callable[[], jax.stages.Lowered]
"""Traces a program, for arguments that are fixed."""


@contextmanager
def compile_in_background() -> Iterator[Callable[[Iterable[Lower]], None]]:
    """Compiles programs at the side, all at once, while the inside does something else; at the end waits for them.

    A call of the program then finds it compiled. What cannot be compiled says so there. Tracing is Python, of which one
    thread runs at a time: programs are traced one after the other, the first before `start` returns, so that nothing
    holds up its compilation.
    """
    with ThreadPoolExecutor() as pool, ThreadPoolExecutor(1) as tracer:

        def trace(lower: Lower) -> None:
            with suppress(Exception):
                pool.submit(lower().compile)

        def start(programs: Iterable[Lower]) -> None:
            first, *others = programs
            trace(first)
            for lower in others:
                tracer.submit(trace, lower)

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
