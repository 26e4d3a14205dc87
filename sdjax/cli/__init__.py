"""The command line: `sdjax txt2img | img2img | inpaint | batch | grid | train | warmup | info | selftest`.

Options left out take the values of the recipe given by --recipe, else the defaults of `Pipeline`. Whatever goes wrong
with what the user gave is one line on the error stream and exit status 2; pictures made before that are kept.

Nothing large is imported before it is needed: Ctrl-C is one line, too, while the libraries load, and help and wrong
options need none of them. So the commands' modules import JAX, rich and the like inside functions, behind the checks of
what was asked for.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Sequence

from sdjax.cli.signals import INTERRUPTED, leave
from sdjax.storage.files import open_streams


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    from sdjax.cli.run import run

    return run(arguments)


def script() -> int:
    """What the installed command calls: `main`, with one line for Ctrl-C at any moment."""
    open_streams()
    gc.set_threshold(100_000, 50, 100)  # a start makes a million objects that stay, and looked through them 1,000 times
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
    gc.freeze()  # what is left ends with the process, and to look through it first takes 0.3 s
    return status
