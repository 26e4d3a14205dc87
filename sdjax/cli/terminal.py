"""What the command line says, and that saying it never costs work."""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from sdjax.hints import hint

if TYPE_CHECKING:
    from rich.console import Console


class Steady:
    """A text stream that goes on when it cannot be written: pictures are made though nobody reads their names.

    What the stream's encoding lacks is written with backslashes; when the reader is gone, or the disk full, the rest is
    thrown away.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            try:
                self.stream.write(text)
            except UnicodeEncodeError:
                self.stream.write(text.encode("ascii", "backslashreplace").decode())
        except (OSError, ValueError):
            self._give_up()
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (OSError, ValueError):
            self._give_up()

    def _give_up(self) -> None:
        """Lets the stream's file descriptor lead nowhere, so that what is buffered cannot fail again at the end."""
        with suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@lru_cache(maxsize=1)
def console() -> Console:
    """The error stream: notes, errors, progress."""
    from rich.console import Console

    return Console(stderr=True, soft_wrap=True, highlight=False, emoji=False)


def note(text: str) -> None:
    console().print(f"sdjax: note: {text}", markup=False)


def error(text: str) -> None:
    console().print(f"sdjax: error: {' '.join(text.split())}", markup=False)


@contextmanager
def steady_streams() -> Iterator[None]:
    """Inside, neither output nor errors can fail, warnings are notes, and Ctrl-C is not lost in a destructor."""
    out, err, unraisable = sys.stdout, sys.stderr, sys.unraisablehook

    def again(args: Any) -> None:
        if isinstance(args.exc_value, KeyboardInterrupt):
            threading.Timer(0.01, os.kill, (os.getpid(), 2)).start()
        else:
            unraisable(args)

    sys.stdout, sys.stderr, sys.unraisablehook = Steady(out), Steady(err), again  # type: ignore[assignment]
    try:
        with warnings.catch_warnings():
            filters = [entry for entry in warnings.filters if entry[0] != "error"]  # a note never ends the work
            warnings.resetwarnings()
            warnings.filters.extend(filters)  # type: ignore[attr-defined]
            warnings.showwarning = _show_warning
            yield
            sys.stdout.flush()
    finally:
        sys.stdout, sys.stderr, sys.unraisablehook = out, err, unraisable


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    from sdjax.devices.compilation import drop_damaged

    note(drop_damaged(str(message)))


def explained(failure: Exception) -> str:
    """One line for whatever ended a command: what was wrong, and what to do."""
    text = " ".join(str(failure).split())
    if isinstance(failure, MemoryError) or "RESOURCE_EXHAUSTED" in text or "Out of memory" in text:
        less = f"make fewer or smaller pictures at once, or use {hint('dtype')}"
        return f"there is too little memory ({_short(text) or 'of this machine'}); {less}"
    if isinstance(failure, ValueError | TypeError | OSError | FloatingPointError):
        return text or type(failure).__name__
    if (reason := _why_no_device()) is not None:
        asked = os.environ.get("JAX_PLATFORMS")
        if asked:
            return f"JAX_PLATFORMS is {asked!r}, and JAX finds no such device here ({reason}); unset it"
        return f"JAX finds no device to work with ({reason})"
    where = "SDJAX_TRACEBACK=1 in the environment shows where"
    return f"{type(failure).__name__}: {_short(text)}; this is a fault of sdjax or of a library it uses ({where})"


def _why_no_device() -> str | None:
    """What JAX says when asked for its devices, if it has none."""
    import jax

    try:
        jax.local_devices()
    except Exception as error:  # each platform fails in its own way
        return _short(" ".join(str(error).split())) or type(error).__name__
    return None


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]} ..."
