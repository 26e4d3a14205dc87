"""The commands and what becomes of their errors."""

from __future__ import annotations

import os
import traceback
from collections.abc import Sequence

from sdjax.cli.options import parser
from sdjax.cli.signals import INTERRUPTED
from sdjax.cli.terminal import console, error, explained, steady_streams


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    with steady_streams():
        options = parser().parse_args(arguments)
        try:
            return options.run(options)
        except KeyboardInterrupt:
            console().print("sdjax: interrupted; what was made so far is kept", markup=False)
            return INTERRUPTED
        except Exception as failure:
            if os.environ.get("SDJAX_TRACEBACK"):
                traceback.print_exc()
            error(explained(failure))
            return 2
