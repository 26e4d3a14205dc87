"""Compiled programs: kept on disk between processes, and made ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from sdjax.pipeline import Pipeline

COMPILED = "/jax/core/compile/backend_compile_duration"
"""JAX's event for a program that was compiled, or read from the cache."""

WORTH_KEEPING = 0.2
"""Seconds of compilation from which a program is kept."""


def keep_programs(folder: Path) -> None:
    """From here on this process reads compiled programs from `folder`, and puts new ones there.

    Programs are found by what they compute, JAX's version and the device; a changed one is compiled anew.
    """
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH_KEEPING)


def warm_up(pipe: Pipeline, width: int, height: int, batch: int) -> dict[str, float]:
    """Compiles, or reads from the cache, all that pictures of a size need, `batch` at a time on each device; seconds by
    program.

    For the whole loop (`Pipeline.batch`, and calls without progress) and for single steps (calls with progress).
    """
    count = batch * pipe.placement.shares
    settings: dict[str, Any] = dict(width=width, height=height, steps=1, count=count, batch=batch)
    with _compilations() as seconds:
        pipe.text_to_image("", **settings)
        pipe.text_to_image("", progress=lambda *_: None, **settings)
    return seconds


@contextmanager
def _compilations() -> Iterator[dict[str, float]]:
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
