"""`sdjax batch`: a job file in, pictures out."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sdjax.cli.model import conversion_of, folders_of, load_model, placement_of, progress_bars
from sdjax.cli.signals import begin_work
from sdjax.cli.terminal import console, error, note
from sdjax.request import Request, check_positive, check_request

KINDS = (".jsonl", ".csv", ".tsv", ".txt")
"""Endings of job files."""

NOTES = 20
"""Most lines that are named of those that were left out."""


def batch(options: argparse.Namespace) -> int:
    """A job file in, pictures out; exit status 1 if some could not be made."""
    from sdjax.jobs import run as jobs
    from sdjax.jobs.processes import ALONE, initialize
    from sdjax.load import configuration, identity, library_of
    from sdjax.pipeline.adapters import tags_of

    check_positive(batch=options.batch)
    defaults = {name: value for name in options.line_settings if (value := getattr(options, name)) is not None}
    out, conversion = Path(options.output), conversion_of(options)
    kind = _kind_of(options.jobs)
    jobs.check_output(out, None if options.jobs == "-" else Path(options.jobs))
    config = configuration(options.model or None, **conversion)
    settings: dict[str, Any] = {"model": options.model, "dtype": options.dtype}
    settings |= {"format": options.format, "shards": options.shards}
    settings |= folders_of(options)
    settings |= {"conversion": conversion, "content": identity(options.model or None, **conversion)}
    named = (options.coordinator, options.num_processes, options.process_id)
    share = initialize(*named) if options.distributed or named != (None,) * 3 else ALONE
    if options.jobs == "-" and share.process_count > 1:
        raise ValueError("several processes need a job file; standard input is read by one alone")

    dotted: list[str] = []
    library = library_of(options.lora_dir)

    def check(request: Request) -> None:
        check_request(request, config, options.model or config.name)
        for tag in tags_of(request):
            library.adapter(tag, config)
        if options.shards and "." in request.id and not dotted:
            dotted.append(request.id)

    placement = placement_of(options)
    begin_work()
    with jobs.at_work(out, share):
        with nullcontext(sys.stdin.buffer) if options.jobs == "-" else open(options.jobs, "rb") as file:
            keys: dict[str, Any] = dict(
                skip_bad=options.skip_bad, share=share, check=check, request_class=options.request
            )
            rejected = jobs.prepare(file, kind, out, settings, defaults, **keys)
        left_out = [f"line {line.number} left out: {line.reason}" for line in rejected]
        for line in jobs.shown(left_out, NOTES, f", in {out / 'rejected.jsonl'}"):
            note(line)
        for name in dotted:
            note(f"the id {name!r} has a dot; other readers of shards take a name up to its first dot for the key")
        with progress_bars(options.model) as (on_convert, _):
            like = None if options.dry_run else jobs.first_request(out, options.request)
            pipe = load_model(options, on_convert, placement=placement, like=like, batch_size=options.batch)
        pipe = dataclasses.replace(pipe, library=library)  # which has read the adapters
        if options.dry_run:
            print(jobs.described(pipe, out, options.batch, share, options.request), end="")
            return 0
        columns = (TextColumn("pictures"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
        with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bars:
            bar, clock, first = bars.add_task("", rate="", total=None), time.monotonic(), None

            def progress(done: int, total: int) -> None:
                nonlocal first
                first = done - 1 if first is None else first
                rate = (done - first) / max(1e-3, time.monotonic() - clock)
                bars.update(bar, completed=done, total=total, rate=f"{rate:.2f} a second")

            def report(name: str, reason: str) -> None:
                error(f"{name}: {reason}")

            keys = dict(model=options.model, dtype=options.dtype, conversion=conversion, batch=options.batch)
            keys |= dict(suffix=f".{options.format}", shards=options.shards, share=share, request_class=options.request)
            done = jobs.run(pipe, out, **keys, report=report, progress=progress)
    print(f"{done.made} pictures made, {done.before} were there before, {done.failed} failed")
    if done.failed:
        note(f"the same command tries them again; {share.failures(out)} says why")
    return 1 if done.failed else 0


def _kind_of(jobs: str) -> str:
    """The form of a job file, by its ending. Raises ValueError or OSError if it is none."""
    if jobs == "-":
        return ".jsonl"
    path, expected = Path(jobs), f"expected a job file that ends in {', '.join(KINDS[:-1])} or {KINDS[-1]}, or -"
    if path.is_dir():
        raise ValueError(f"{jobs}: a folder; {expected}")
    if path.suffix.lower() not in KINDS:
        raise ValueError(f"{jobs}: {expected}")
    if path.is_symlink() and not path.exists():
        raise FileNotFoundError(f"{jobs}: a link to nothing")
    if not path.is_file():
        raise FileNotFoundError(f"{jobs}: no such job file")
    return path.suffix.lower()
