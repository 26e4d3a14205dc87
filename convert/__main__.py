"""`sdjax-convert SRC DST` (the same as `python -m convert SRC DST`): a checkpoint from one format to another.

    sdjax-convert merge A B [C] -o DST --formula ...    what two or three models make together (`convert.merge`)
    sdjax-convert extract BASE TUNED -o LORA            the LoRA that makes one model of another
    sdjax-convert adapter SRC -o DST                    an adapter of any naming in the names that all programs read

A model that is itself called merge, extract or adapter is converted as ./merge.

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
            words = list(sys.argv[1:] if arguments is None else arguments)
            if words[:1] == ["merge"]:
                options = _merge_parser().parse_intermixed_args(words[1:])
                from convert.merge import run
            elif words[:1] == ["extract"]:
                options = _extract_parser().parse_args(words[1:])
                from convert.adapter_command import run_extract as run
            elif words[:1] == ["adapter"]:
                options = _adapter_parser().parse_args(words[1:])
                from convert.adapter_command import run_adapter as run
            else:
                options = _parser().parse_args(words)
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
    _add_options(parser)
    text = "an adapter to bake into the model, at a weight; may be given several times"
    add("--lora", metavar="FILE[:WEIGHT[:TEXT_WEIGHT]]", action="append", default=[], help=text)
    add("--report", metavar="FILE", help="write what became of every name (.json, else text; - for the screen)")
    return parser


def _merge_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sdjax-convert merge", description="Merge two or three models into one, tensor by tensor."
    )
    add = parser.add_argument
    add("a", metavar="A", help="a model, in any format that sdjax-convert reads")
    add("b", metavar="B", help="another one of the same architecture")
    add("c", metavar="C", nargs="?", help="a third one, whose difference from B is added")
    add(
        "-o",
        "--output",
        dest="destination",
        metavar="DST",
        required=True,
        help="a new folder, or a name ending in .safetensors",
    )
    add(
        "--formula",
        default="weighted-sum",
        help="weighted-sum: A (1 - m) + B m; add-difference: A + m (B - C); train-difference: the same as if trained "
        "into A (weighted-sum)",
    )
    add("--weight", metavar="M", help="m (0.5 in a weighted sum, 1 before a difference)")
    add("--blocks", metavar="M,M,...", help="m of IN00-IN11, M00, OUT00-OUT11; before them that of BASE, all the rest")
    _add_options(parser)
    return parser


def _extract_parser() -> argparse.ArgumentParser:
    text = "The LoRA that makes TUNED of BASE, as nearly as its rank allows."
    parser = argparse.ArgumentParser(prog="sdjax-convert extract", description=text)
    add = parser.add_argument
    add("base", metavar="BASE", help="a model, in any format that sdjax-convert reads")
    add("tuned", metavar="TUNED", help="what was trained from it")
    _add_adapter(parser)
    add("--rank", type=int, default=32, metavar="R", help="of every module (32)")
    add("--linear", action="store_true", help="leave out 3x3 convolutions, which few programs apply")
    add("--dtype", default="float16", help="float16, bfloat16 or float32, of its numbers (float16)")
    return parser


def _adapter_parser() -> argparse.ArgumentParser:
    text = "An adapter (LoRA, LyCORIS) of any naming, in kohya's names; its numbers keep every bit."
    parser = argparse.ArgumentParser(prog="sdjax-convert adapter", description=text)
    add = parser.add_argument
    add("source", metavar="SRC", help="a .safetensors, .bin or .pt, or a folder of peft")
    _add_adapter(parser)
    add("--config", default="sd15", metavar="FILE", help="of its model: a preset's name or a config.json (sd15)")
    return parser


def _add_adapter(parser: argparse.ArgumentParser) -> None:
    """Where an adapter is written to."""
    add = parser.add_argument
    add("-o", "--output", dest="destination", metavar="DST", required=True, help="a name ending in .safetensors")
    add("--force", action="store_true", help="replace DST if it is there")


def _add_options(parser: argparse.ArgumentParser) -> None:
    """Options of every command: how models are to be understood, and how the result is written."""
    add = parser.add_argument
    add("--to", choices=("sdjax", "safetensors", "diffusers"), help="the format of DST (by its name)")
    add("--dtype", default="float32", help="float32, bfloat16, float16, or keep for the stored one (float32)")
    add("--vae", metavar="FILE", help="take the autoencoder from this file or folder")
    add("--text-encoder", metavar="FILE", help="take the text encoder from this file or folder")
    add("--ema", default="auto", help="the UNet's moving averages: yes, no, or auto for yes if all are there (auto)")
    add("--prediction", help="epsilon or v, for Stable Diffusion 2 files, which do not say")
    add("--config", metavar="FILE", help="a config.json of ours, or a preset such as sd15, for other models")
    add("--ignore", metavar="PATTERN", action="append", default=[], help="names that may be there unused, such as x.*")
    add("--force", action="store_true", help="replace DST if it is there")


if __name__ == "__main__":
    sys.exit(main())
