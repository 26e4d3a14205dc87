"""A job in a folder, as `sdjax batch` and `sdjax grid` make it: checked, resumed, with bars, and what came of it."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

from sdjax.cli.model import conversion_of, folders_of, load_model, placement_of, progress_bars
from sdjax.cli.signals import begin_work
from sdjax.cli.terminal import console, error, note
from sdjax.config import ModelConfig
from sdjax.request import Request, check_request, second_pass

NOTES = 20
"""Most lines that are named of those that were left out."""


def line_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given for all lines of a job."""
    return {name: value for name in options.line_settings if (value := getattr(options, name)) is not None}


def check_of(model: str, config: ModelConfig, library: Any) -> Callable[[Request], None]:
    """What raises ValueError for a request that the model cannot make, or whose adapters are not there.

    model: its name, for messages; "" is the model in the box. library: of adapters.
    """
    from sdjax.pipeline.adapters import tags_of

    def check(request: Request) -> None:
        second = second_pass(check_request(request, config, model or config.name), config)
        for one in [request] if second is None else [request, second.request]:
            for tag in tags_of(one):
                library.adapter(tag, config)

    return check


def do_job(
    options: argparse.Namespace,
    source: Callable[[], AbstractContextManager[IO[bytes] | IO[str]]],
    kind: str,
    *,
    config: ModelConfig,
    check: Callable[[Request], object],
    library: Any,
    defaults: dict[str, Any],
    share: Any,
    on_ready: Callable[[], None] = lambda: None,
    on_done: Callable[[], None] = lambda: None,
) -> int:
    """Makes the pictures of a job, and says what came of it; exit status 1 if some could not be made.

    options: of the command: output, model, dtype, format, shards, batch, skip_bad, dry_run, request, and of devices.
    source, kind: what opens the job's lines, and in which form they are.
    config: of the model, which is loaded if a picture is missing.
    check: of every request (`check_of`). library: of adapters, which it has read.
    defaults: fields for lines that lack them.
    share: of several processes.
    on_ready: called when the lines are checked. on_done: called when the pictures are made, in the locked folder.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from sdjax.jobs import run as jobs
    from sdjax.load import identity

    out, conversion = Path(options.output), conversion_of(options)
    settings: dict[str, Any] = {"model": options.model, "dtype": options.dtype}
    settings |= {"format": options.format, "shards": options.shards}
    settings |= folders_of(options)
    settings |= {"conversion": conversion, "content": identity(options.model or None, **conversion)}
    placement = placement_of(options)
    begin_work()
    with jobs.at_work(out, share):
        with source() as file:
            keys: dict[str, Any] = dict(
                skip_bad=options.skip_bad, share=share, check=check, request_class=options.request
            )
            rejected = jobs.prepare(file, kind, out, settings, defaults, **keys)
        left_out = [f"line {line.number} left out: {line.reason}" for line in rejected]
        for line in jobs.shown(left_out, NOTES, f", in {out / 'rejected.jsonl'}"):
            note(line)
        on_ready()

        def load() -> Any:
            with progress_bars(options.model) as (on_convert, _):
                like = None if options.dry_run else jobs.first_request(out, options.request)
                pipe = load_model(options, on_convert, placement=placement, like=like, batch_size=options.batch)
            return dataclasses.replace(pipe, library=library)

        if options.dry_run:
            print(jobs.described(load(), out, options.batch, share, options.request), end="")
            return 0
        columns = (TextColumn("pictures"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
        bars = Progress(*columns, TimeRemainingColumn(), console=console(), disable=not console().is_terminal)
        bar, clock, first = bars.add_task("", rate="", total=None), 0.0, None

        def begin() -> Any:
            nonlocal clock
            pipe, clock = load(), time.monotonic()
            bars.start()
            return pipe

        def progress(done: int, total: int) -> None:
            nonlocal first
            first = done - 1 if first is None else first
            rate = (done - first) / max(1e-3, time.monotonic() - clock)
            bars.update(bar, completed=done, total=total, rate=f"{rate:.2f} a second")

        def report(name: str, reason: str) -> None:
            error(f"{name}: {reason}")

        keys = dict(model=options.model, dtype=options.dtype, config=config, conversion=conversion, batch=options.batch)
        keys |= dict(suffix=f".{options.format}", shards=options.shards, share=share, request_class=options.request)
        try:
            done = jobs.run(begin, out, **keys, report=report, progress=progress)
        finally:
            bars.stop()
        on_done()
    print(f"{done.made} pictures made, {done.before} were there before, {done.failed} failed")
    if done.failed:
        note(f"the same command tries them again; {share.failures(out)} says why")
    return 1 if done.failed else 0
