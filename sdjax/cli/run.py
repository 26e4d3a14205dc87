"""The commands and what becomes of their errors."""

from __future__ import annotations

import os
import traceback
from collections.abc import Sequence

from sdjax.cli.options import parser
from sdjax.cli.signals import INTERRUPTED
from sdjax.cli.terminal import console, error, explained, note, steady_streams


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    with steady_streams():
        options = parser().parse_args(arguments)
        try:
            if not getattr(options, "no_compile_cache", True):
                keep_programs()
            return options.run(options)
        except KeyboardInterrupt:
            console.print("sdjax: interrupted; what was made so far is kept", markup=False)
            return INTERRUPTED
        except Exception as failure:
            if os.environ.get("SDJAX_TRACEBACK"):
                traceback.print_exc()
            error(explained(failure))
            return 2


def keep_programs() -> None:
    """Keeps compiled programs on disk, if there is a place for them."""
    from sdjax.devices import compilation
    from sdjax.storage.cache import programs_folder
    from sdjax.storage.files import refuse_unwritable

    try:
        folder = programs_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        refuse_unwritable(folder)
        compilation.keep_programs(folder)
    except OSError as failure:
        note(f"compiled programs are not kept: {' '.join(str(failure).split())}")
