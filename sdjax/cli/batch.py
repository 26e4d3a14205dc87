"""`sdjax batch`: a job file in, pictures out."""

from __future__ import annotations

import argparse
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import IO, Any

from sdjax.cli.job import check_of, do_job, line_settings
from sdjax.cli.model import conversion_of
from sdjax.cli.terminal import note
from sdjax.request import Request, check_positive

KINDS = (".jsonl", ".csv", ".tsv", ".txt")
"""Endings of job files."""


def batch(options: argparse.Namespace) -> int:
    """A job file in, pictures out; exit status 1 if some could not be made."""
    check_positive(batch=options.batch)
    kind = _kind_of(options.jobs)

    from sdjax.jobs import run as jobs
    from sdjax.jobs.processes import ALONE, initialize
    from sdjax.load import configuration, library_of

    jobs.check_output(Path(options.output), None if options.jobs == "-" else Path(options.jobs))
    config = configuration(options.model or None, **conversion_of(options))
    others = (options.coordinator, options.num_processes, options.process_id)
    share = initialize(*others) if options.distributed or others != (None,) * 3 else ALONE
    if options.jobs == "-" and share.process_count > 1:
        raise ValueError("several processes need a job file; standard input is read by one alone")

    dotted: list[str] = []
    library = library_of(options.lora_dir)
    check_one = check_of(options.model, config, library)

    def check(request: Request) -> None:
        check_one(request)
        if options.shards and "." in request.id and not dotted:
            dotted.append(request.id)

    def note_dots() -> None:
        for name in dotted:
            note(f"the id {name!r} has a dot; other readers of shards take a name up to its first dot for the key")

    def source() -> AbstractContextManager[IO[bytes]]:
        return nullcontext(sys.stdin.buffer) if options.jobs == "-" else open(options.jobs, "rb")

    defaults = line_settings(options)
    named: dict[str, Any] = dict(
        config=config, check=check, library=library, defaults=defaults, share=share, on_ready=note_dots
    )
    return do_job(options, source, kind, **named)


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
