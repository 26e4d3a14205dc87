"""What `sdjax-convert` does: checks of all that can be known beforehand, the conversion, and its report."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from convert.adapters import with_loras
from convert.read import Converted, lazy, named_config
from convert.report import Report
from convert.write import write_diffusers, write_safetensors
from sdjax.config import PRESETS, ModelConfig, unusual
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
    check_destination(options, [options.source])
    if options.report not in (None, "-"):
        report = Path(options.report).absolute()
        if report.is_dir():
            raise IsADirectoryError(f"{options.report}: a folder; expected the name of a file for the report")
        refuse_existing(report, force=True)
        check_output(report, [*_inputs(options, [options.source]), Path(options.destination)])


def check_destination(options: argparse.Namespace, models: Sequence[str]) -> None:
    """Raises ValueError or OSError if the destination cannot be written, or would replace a model or another input."""
    destination = Path(options.destination).absolute()
    if destination.suffix in (".ckpt", ".pt", ".bin"):
        raise ValueError(f"{destination.name}: pickles are not written; choose a .safetensors name or a folder")
    if options.to == "safetensors" and destination.is_dir():
        raise IsADirectoryError(f"{options.destination}: a folder; expected the name of a file")
    refuse_existing(destination, options.force)
    check_output(destination, _inputs(options, models))


def _inputs(options: argparse.Namespace, models: Sequence[str]) -> list[Path]:
    """Every file and folder that is read."""
    config = None if options.config in PRESETS else options.config
    return [Path(name) for name in (*models, options.vae, options.text_encoder, config) if name is not None]


def check_output(output: Path, others: list[Path]) -> None:
    """Raises ValueError or OSError if an output cannot be written, or would replace one of `others`."""
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
    source, dtype = Path(options.source), "keep" if options.lora else options.dtype  # adapters round at the end
    with progress_bar("converting") as bar, ExitStack() as stack:
        if checkpoint.is_checkpoint(source):
            refuse_useless(options, source, FOREIGN)
            config, params = checkpoint.restore(source, dtype=None if dtype == "keep" else dtype)
            own = source / "tokenizer"
            converted = Converted(config, params, report, own if own.is_dir() else None)
        else:
            given = foreign_options(options)
            converted = stack.enter_context(lazy(source, dtype=dtype, progress=bar, report=report, **given))
        if options.lora:
            converted = with_loras(converted, options.lora, options.dtype)
        report.notes += write(options, converted)
    tell(options, converted.config, report.notes)


def refuse_useless(options: argparse.Namespace, source: str | Path, names: Iterable[str]) -> None:
    """Raises ValueError if one of these options is given, with which no checkpoint of ours is understood."""
    useless = [name for name in names if getattr(options, name) != FOREIGN[name]]
    if useless:
        named = ", ".join(HINTS[name].option for name in useless)
        raise ValueError(f"{source}: a checkpoint of ours, which says everything; leave out {named}")


def foreign_options(options: argparse.Namespace) -> dict[str, Any]:
    """The options of `convert.read` as they were given."""
    given = {name: getattr(options, name) for name in FOREIGN}
    return given | {"config": None if options.config is None else named_config(options.config)}


def format_of(options: argparse.Namespace) -> str:
    """The format to write: as asked for, or as the name of the destination says."""
    return options.to or ("safetensors" if Path(options.destination).suffix == ".safetensors" else "sdjax")


def write(options: argparse.Namespace, converted: Converted, metadata: Mapping[str, str] | None = None) -> list[str]:
    """Writes the model under the destination's name, and returns notes on it. metadata: for a .safetensors file."""
    destination, to = Path(options.destination).absolute(), format_of(options)
    config, params, tokenizer = converted.config, converted.params, converted.tokenizer
    if to == "safetensors":
        write_safetensors(destination, config, params, metadata=metadata or {}, force=options.force)
        return [f"other programs cannot learn this from {destination.name}: {x}" for x in unusual(config)]
    if to == "diffusers":
        write_diffusers(destination, config, params, tokenizer=tokenizer, force=options.force)
    else:
        checkpoint.save(destination, config, params, tokenizer=tokenizer, one_file=True, force=options.force)
    return []


def tell(options: argparse.Namespace, config: ModelConfig, notes: Sequence[str]) -> None:
    """Says what was written, and before it the notes."""
    for note in notes:
        say(f"note: {note}\n", "stderr")
    say(f"{options.destination}: {config.name}, {format_of(options)}\n")


def _write_report(path: str, report: Report) -> None:
    text = report.to_json() if path.endswith(".json") else report.text()
    if path == "-":
        say(text)
        return
    with new_file(Path(path).absolute(), force=True) as temporary:
        temporary.write_text(text, "utf-8", errors="backslashreplace")


def say(text: str, stream: str = "stdout") -> None:
    """Prints to a stream. Nobody may be there to read it, or it may lack letters; the work is done anyway."""
    try:
        print(text, end="", flush=True, file=getattr(sys, stream))
    except UnicodeError:
        print(ascii(text)[1:-1].replace("\\n", "\n"), end="", flush=True, file=getattr(sys, stream))
    except OSError:
        setattr(sys, stream, open(os.devnull, "w"))  # noqa: SIM115, so that nothing is flushed at the end


@contextmanager
def progress_bar(what: str, *, of_bytes: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A bar on the error stream. what: is done; of_bytes: whether bytes are counted, or things."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    count = DownloadColumn() if of_bytes else MofNCompleteColumn()
    columns = (TextColumn(what), BarColumn(), count, TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
