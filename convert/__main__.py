"""`sdjax-convert SRC DST` (the same as `python -m convert SRC DST`): a checkpoint from one format to another.

DST says the format: a name ending in .safetensors is a file in the original names, `--to diffusers` writes a diffusers
folder, anything else becomes a checkpoint of ours. Nothing is written under the final name before all of it is there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from convert.read import lazy
from convert.report import Report
from convert.write import write_diffusers, write_safetensors
from sdjax import checkpoint
from sdjax.config import PRESETS, ModelConfig, unusual
from sdjax.storage.files import refuse_existing

console = Console(stderr=True, soft_wrap=True, highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    options = _parser().parse_args(arguments)
    report = Report(options.source, "")
    try:
        try:
            _convert(options, report)
        finally:
            if options.report is not None and report.format:
                _write_report(options.report, report)
    except (ValueError, OSError) as error:
        line = " ".join(str(error).split())
        console.print(f"sdjax-convert: error: {line}", markup=False)
        return 2
    except KeyboardInterrupt:
        console.print("sdjax-convert: interrupted; nothing was written", markup=False)
        return 130
    return 0


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
    add("--config", metavar="FILE", help=f"a config.json of ours, or one of {', '.join(PRESETS)}, for other models")
    add("--ignore", metavar="PATTERN", action="append", default=[], help="names that may be there unused, such as x.*")
    add("--report", metavar="FILE", help="write what became of every name (.json, else text; - for the screen)")
    add("--force", action="store_true", help="replace DST if it is there")
    return parser


def _convert(options: argparse.Namespace, report: Report) -> None:
    source, destination = Path(options.source), Path(options.destination).absolute()
    to = options.to or ("safetensors" if destination.suffix == ".safetensors" else "sdjax")
    if destination.suffix in (".ckpt", ".pt", ".bin"):
        raise ValueError(f"{destination.name}: pickles are not written; choose a .safetensors name or a folder")
    refuse_existing(destination, options.force)
    if destination.exists() and source.exists() and destination.samefile(source):
        raise ValueError(f"{source}: source and destination are the same")
    with _progress() as bar, ExitStack() as stack:
        if checkpoint.is_checkpoint(source):
            dtype = None if options.dtype == "keep" else options.dtype
            config, params = checkpoint.restore(source, dtype=dtype)
            own = source / "tokenizer"
            tokenizer = own if own.is_dir() else None
        else:
            converted = stack.enter_context(
                lazy(
                    source,
                    vae=options.vae,
                    text_encoder=options.text_encoder,
                    ema=options.ema,
                    prediction=options.prediction,
                    dtype=options.dtype,
                    config=_config(options.config),
                    ignore=options.ignore,
                    progress=bar,
                    report=report,
                )
            )
            config, params, tokenizer = converted.config, converted.params, converted.tokenizer
        if to == "safetensors":
            report.notes += [f"other programs cannot learn this from {destination.name}: {x}" for x in unusual(config)]
            write_safetensors(destination, config, params, force=options.force)
        elif to == "diffusers":
            write_diffusers(destination, config, params, tokenizer=tokenizer, force=options.force)
        else:
            checkpoint.save(destination, config, params, tokenizer=tokenizer, force=options.force)
    for note in report.notes:
        console.print(f"note: {note}", markup=False)
    print(f"{options.destination}: {config.name}, {to}")


def _config(given: str | None) -> ModelConfig | None:
    if given is None or given in PRESETS:
        return None if given is None else PRESETS[given]
    try:
        return ModelConfig.from_json(Path(given).read_text("utf-8"))
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"--config {given}: {error}") from None


def _write_report(path: str, report: Report) -> None:
    text = report.to_json() if path.endswith(".json") else report.text()
    if path == "-":
        print(text, end="")
    else:
        Path(path).write_text(text, "utf-8")


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar over the bytes read, on the error stream."""
    columns = (TextColumn("converting"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("converting", total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


if __name__ == "__main__":
    sys.exit(main())
