"""`sdjax batch`: a job file in, pictures out."""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sdjax.cli.model import load_model, placement_of, progress_bars
from sdjax.cli.terminal import console, error, note
from sdjax.request import check_settings

LINE_DEFAULTS = (
    *("negative_prompt", "sampler", "spacing", "size", "noise", "steps", "seed", "count", "clip_skip"),
    *("guidance", "guidance_rescale", "eta"),
)


def batch(options: argparse.Namespace) -> int:
    """A job file in, pictures out; exit status 1 if some could not be made."""
    from sdjax import batch as jobs
    from sdjax.hosts import ALONE, join

    check_settings(batch=options.batch)
    defaults = {name: getattr(options, name) for name in LINE_DEFAULTS if getattr(options, name) is not None}
    out, kind = Path(options.output), ".jsonl" if options.jobs == "-" else Path(options.jobs).suffix.lower()
    if kind not in (".jsonl", ".csv", ".txt"):
        raise ValueError(f"{options.jobs}: expected a job file that ends in .jsonl, .csv or .txt, or -")
    if options.jobs != "-" and not Path(options.jobs).is_file():
        raise FileNotFoundError(f"{options.jobs}: no such job file")
    settings = {"model": options.model, "dtype": options.dtype, "format": options.format, "shards": options.shards}
    named = (options.coordinator, options.num_processes, options.process_id)
    share = join(*named) if options.distributed or named != (None,) * 3 else ALONE
    if options.jobs == "-" and share.processes > 1:
        raise ValueError("several processes need a job file; standard input is read by one alone")
    with jobs.at_work(out, share):
        with (
            nullcontext(sys.stdin) if options.jobs == "-" else open(options.jobs, encoding="utf-8", newline="") as file
        ):
            rejected = jobs.prepare(file, kind, out, settings, defaults, skip_bad=options.skip_bad, share=share)
        for line in rejected:
            note(f"line {line.number} left out: {line.reason}")
        with progress_bars(options.model) as (on_convert, _):
            placement = placement_of(options)
            like = None if options.dry_run else jobs.first_request(out)
            pipe = load_model(options, on_convert, placement=placement, like=like, batch=options.batch, loop=True)
        if options.dry_run:
            print(jobs.described(pipe, out, options.batch, share), end="")
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

            keys = dict(model=options.model, dtype=options.dtype, batch=options.batch)
            suffix = f".{options.format}"
            keys |= dict(suffix=suffix, shards=options.shards, share=share)
            done = jobs.run(pipe, out, **keys, report=report, progress=progress)
    print(f"{done.made} pictures made, {done.before} were there before, {done.failed} failed")
    if done.failed:
        note(f"the same command tries them again; {share.failures(out)} says why")
    return 1 if done.failed else 0
