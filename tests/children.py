"""Processes that tests start."""

import sys

RESET = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.executable, sys.argv[1:])"


def interruptible(*arguments: str) -> list[str]:
    """The command line of a Python that Ctrl-C can interrupt, though the tests may run where it is ignored, as `nohup`
    and `&` in a script have it: a child inherits that.
    """
    return [sys.executable, "-c", RESET, sys.executable, *arguments]
