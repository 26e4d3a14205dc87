"""What `sdjax-convert` does: checks of all that can be known beforehand, the conversion, and its report."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from convert.read import lazy, named_config
from convert.report import Report
from convert.write import write_diffusers, write_safetensors
from sdjax.config import PRESETS, unusual
from sdjax.hints import HINTS
from sdjax.storage import checkpoint
from sdjax.storage.files import new_file, refuse_existing

FOREIGN: dict[str, Any] = {
    "vae": None,
    "text_encoder": None,
    "ema": "auto",
    "prediction": None,
    "config": None,
    "ignore": [],
}
"""Options, with their defaults, that say how a file that is no checkpoint of ours is to be understood."""


def run(options: argparse.Namespace) -> None:
    """Converts as the options of `convert.__main__` say.

    Raises:
        ValueError, OSError: it could not be done; nothing is left under the name of the destination.
    """
    report = Report(options.source, "")
    _check_places(options)
    try:
        _convert(options, report)
    finally:
        if options.report is not None and report.format:
            _write_report(options.report, report)


def _check_places(options: argparse.Namespace) -> None:
    """Raises ValueError or OSError if an output cannot be written, or would replace what is read."""
    destination = Path(options.destination).absolute()
    if destination.suffix in (".ckpt", ".pt", ".bin"):
        raise ValueError(f"{destination.name}: pickles are not written; choose a .safetensors name or a folder")
    if options.to == "safetensors" and destination.is_dir():
        raise IsADirectoryError(f"{options.destination}: a folder; expected the name of a file")
    inputs = [options.source, options.vae, options.text_encoder, None if options.config in PRESETS else options.config]
    inputs = [Path(name) for name in inputs if name is not None]
    refuse_existing(destination, options.force)
    outputs = [(destination, inputs)]
    if options.report not in (None, "-"):
        report = Path(options.report).absolute()
        if report.is_dir():
            raise IsADirectoryError(f"{options.report}: a folder; expected the name of a file for the report")
        refuse_existing(report, force=True)
        outputs.append((report, [*inputs, Path(options.destination)]))
    for output, others in outputs:
        for other in others:
            _refuse_within(output, other)
        _try_to_write(output)


def _refuse_within(output: Path, other: Path) -> None:
    """Raises ValueError if one of two places is the other one, or within it."""
    one, two = os.path.realpath(output), os.path.realpath(other)
    if one == two:
        raise ValueError(f"{other}: source and destination are the same")
    if one.startswith(two + os.sep):
        raise ValueError(f"{output} lies inside {other}; choose a place outside")
    if two.startswith(one + os.sep):
        raise ValueError(f"{output} holds {other}, and would be replaced; choose another name")


def _try_to_write(path: Path) -> None:
    """Raises OSError if no file of this name can be made."""
    try:
        with suppress(FileNotFoundError):
            os.lstat(path)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror})") from None


def _convert(options: argparse.Namespace, report: Report) -> None:
    source, destination = Path(options.source), Path(options.destination).absolute()
    to = options.to or ("safetensors" if destination.suffix == ".safetensors" else "sdjax")
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    with _progress(console) as bar, ExitStack() as stack:
        if checkpoint.is_checkpoint(source):
            useless = [name for name, default in FOREIGN.items() if getattr(options, name) != default]
            if useless:
                named = ", ".join(HINTS[name].option for name in useless)
                raise ValueError(f"{source}: a checkpoint of ours, which says everything; leave out {named}")
            dtype = None if options.dtype == "keep" else options.dtype
            config, params = checkpoint.restore(source, dtype=dtype)
            own = source / "tokenizer"
            tokenizer = own if own.is_dir() else None
        else:
            given = {name: getattr(options, name) for name in FOREIGN} | {
                "config": None if options.config is None else named_config(options.config)
            }
            converted = stack.enter_context(lazy(source, dtype=options.dtype, progress=bar, report=report, **given))
            config, params, tokenizer = converted.config, converted.params, converted.tokenizer
        if to == "safetensors":
            report.notes += [f"other programs cannot learn this from {destination.name}: {x}" for x in unusual(config)]
            write_safetensors(destination, config, params, force=options.force)
        elif to == "diffusers":
            write_diffusers(destination, config, params, tokenizer=tokenizer, force=options.force)
        else:
            checkpoint.save(destination, config, params, tokenizer=tokenizer, force=options.force)
    for note in report.notes:
        _say(f"note: {note}\n", "stderr")
    _say(f"{options.destination}: {config.name}, {to}\n")


def _write_report(path: str, report: Report) -> None:
    text = report.to_json() if path.endswith(".json") else report.text()
    if path == "-":
        _say(text)
        return
    with new_file(Path(path).absolute(), force=True) as temporary:
        temporary.write_text(text, "utf-8", errors="backslashreplace")


def _say(text: str, stream: str = "stdout") -> None:
    """Prints to the output stream. Nobody may be there to read it, or it may lack letters; the work is done anyway."""
    try:
        print(text, end="", flush=True, file=getattr(sys, stream))
    except UnicodeError:
        print(ascii(text)[1:-1].replace("\\n", "\n"), end="", flush=True, file=getattr(sys, stream))
    except OSError:
        setattr(sys, stream, open(os.devnull, "w"))  # noqa: SIM115, so that nothing is flushed at the end


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[int, int], None]]:
    """A bar over the bytes read, on the error stream."""
    columns = (TextColumn("converting"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("converting", total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
