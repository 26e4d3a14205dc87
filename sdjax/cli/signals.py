"""Ctrl-C and closed streams. This module imports nothing large, so that it is there while the libraries load."""

from __future__ import annotations

import os
import signal
from typing import Any

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


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
