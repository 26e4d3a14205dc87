"""`sdjax-convert SRC DST` (the same as `python -m convert SRC DST`): a checkpoint from one format to another.

DST says the format: a name ending in .safetensors is a file in the original names, `--to diffusers` writes a diffusers
folder, anything else becomes a checkpoint of ours. Nothing is written under the final name before all of it is there.

Here is what must be there at once; the work is in `convert.command`, whose libraries take seconds to import.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

INTERRUPTED = "sdjax-convert: interrupted; nothing was written"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    try:
        with _ending_at_ctrl_c():
            from sdjax.storage.files import open_streams

            open_streams()
            options = _parser().parse_args(arguments)
            from convert.command import run
        run(options)
    except KeyboardInterrupt:
        with suppress(OSError):
            print(INTERRUPTED, file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        return _failed(str(error))
    except MemoryError:
        return _failed("out of memory")
    except Exception as error:  # no file that people have may end in a traceback
        return _failed(f"{type(error).__name__}: {error} (this is a fault of sdjax-convert, please report it)")
    return 0


def _failed(message: str) -> int:
    line = " ".join(message.split()).encode(errors="backslashreplace").decode()  # file names need not be text
    with suppress(OSError):  # nobody may be there to read it
        print(f"sdjax-convert: error: {line}", file=sys.stderr)
    return 2


@contextmanager
def _ending_at_ctrl_c() -> Iterator[None]:
    """Within it Ctrl-C ends the process at once: a library whose import is interrupted may print or pass over it."""

    def end(*_: object) -> None:
        os.write(2, f"{INTERRUPTED}\n".encode())
        os._exit(130)

    usual = signal.getsignal(signal.SIGINT)
    if usual is not signal.default_int_handler:  # ignored, as in a script's background, or somebody else's
        yield
        return
    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sdjax-convert", description="Convert Stable Diffusion weights to and from sdjax checkpoints."
    )
    add = parser.add_argument
    add("source", metavar="SRC", help="a .ckpt, a .safetensors, a diffusers folder, or a checkpoint of ours")
    add("destination", metavar="DST", help="a new folder, or a name ending in .safetensors")
    add("--to", choices=("sdjax", "safetensors", "diffusers"), help="the format of DST (by its name)")
    add("--dtype", default="float32", help="float32, bfloat16, float16, or keep for the stored one (float32)")
    add("--vae", metavar="FILE", help="take the autoencoder from this file or folder")
    add("--text-encoder", metavar="FILE", help="take the text encoder from this file or folder")
    add("--ema", default="auto", help="the UNet's moving averages: yes, no, or auto for yes if all are there (auto)")
    add("--prediction", help="epsilon or v, for Stable Diffusion 2 files, which do not say")
    add("--config", metavar="FILE", help="a config.json of ours, or a preset such as sd15, for other models")
    add("--ignore", metavar="PATTERN", action="append", default=[], help="names that may be there unused, such as x.*")
    add("--report", metavar="FILE", help="write what became of every name (.json, else text; - for the screen)")
    add("--force", action="store_true", help="replace DST if it is there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
