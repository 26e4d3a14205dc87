"""The command line: `sdjax txt2img | img2img | inpaint | batch | train | warmup | info | selftest`.

Options left out take the values of the recipe given by --recipe, else the defaults of `Pipeline`. Whatever goes wrong
with what the user gave is one line on the error stream and exit status 2; pictures made before that are kept.

This module imports nothing large: Ctrl-C is one line, too, while the libraries load.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    from sdjax.cli.run import run

    return run(arguments)


def open_streams() -> None:
    """Opens those of input, output and errors that the process was started without (`>&-`), to and from nowhere.

    Else the next file that is opened, such as a picture, would get their number, and what others print.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))


def script() -> int:
    """What the installed command calls: `main`, with one line for Ctrl-C at any moment."""
    open_streams()
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not in a shell's background
    if interruptible:
        signal.signal(signal.SIGINT, leave)
    try:
        from sdjax.cli.run import run

        status = run()
    except KeyboardInterrupt:
        leave()
    finally:
        if interruptible:
            signal.signal(signal.SIGINT, leave)
    if status == INTERRUPTED:  # without waiting for what is still compiled at the side
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def begin_work() -> None:
    """From here on Ctrl-C raises KeyboardInterrupt, so that what is under way is finished or cleared away.

    Until a command says so, `script` ends the process at once: libraries that are interrupted while they are imported,
    or look for devices, may print of it or pass over it.
    """
    if signal.getsignal(signal.SIGINT) is leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def leave(*_: Any) -> None:
    """Ends the process at once; nothing is under way, or it was interrupted before."""
    os.write(2, b"sdjax: interrupted; what was made so far is kept\n")
    os._exit(INTERRUPTED)
