"""A job file in, pictures out: `sdjax batch jobs.jsonl -o out/`.

    OUT/jobs.jsonl      the job as it was understood, one line for each request; the same command goes on, another job
                        is refused
    OUT/manifest.jsonl  a line for each finished picture: id, file, seed, settings, sha256 of the file
    OUT/failed.jsonl    what could not be made in the last run, and why; the next run tries it again
    OUT/rejected.jsonl  lines that are no request, and why (`skip_bad`)
    OUT/*.png           pictures with their recipes, or OUT/shard-*.tar of them

Several processes (`Share`) may do one job together; the second and later ones put their number into the names of their
own manifest-0001.jsonl, failed-0001.jsonl and shard-0001-000000.tar.

A picture counts as made when its line is in the manifest. Files appear under their final name when they are whole, the
line follows, and what a kill leaves behind is cleared away by the next start: so every picture is made exactly once, at
whatever moment the work was interrupted.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
import numpy as np

from sdjax.hints import hint
from sdjax.hosts import ALONE, Share
from sdjax.job_file import Job, Rejected, from_json, read_lines, to_json
from sdjax.outputs import Files, Manifest, Shards, append
from sdjax.pipeline import Pipeline
from sdjax.recipe import Recipe, encoded, file_hash, recipe_of
from sdjax.request import BATCH, Request
from sdjax.storage.files import new_file

LATE = 60.0
"""Seconds by which processes of one job may start apart."""

ENCODING = 64
"""Pictures that may wait to be encoded and written."""


class Summary(NamedTuple):
    """What a run did: pictures made now and before, and those that could not be made."""

    made: int
    before: int
    failed: int


def prepare(
    source: IO[str],
    kind: str,
    out: Path,
    settings: dict[str, Any],
    defaults: dict[str, Any],
    *,
    skip_bad: bool,
    share: Share = ALONE,
) -> list[Rejected]:
    """Reads and checks a whole job file into OUT/jobs.jsonl, and returns the lines that are no requests.

    settings: what else the pictures depend on (model, dtype, file format); a folder is for one job and one of these.
    share: of several processes each does this for itself, and comes to the same file.

    Raises:
        ValueError: `out` holds another job, or, without `skip_bad`, there are lines that are no requests.
    """
    partial, claim = out / f".jobs{share.tag}.jsonl.partial", out / "job.json"
    rejected: list[Rejected] = []
    digest = hashlib.sha256()
    try:
        with open(partial, "wb") as file:
            for line in read_lines(source, kind, defaults):
                if isinstance(line, Rejected):
                    rejected.append(line)
                    continue
                text = (to_json(line) + "\n").encode()
                digest.update(text)
                file.write(text)
        if rejected and not skip_bad:
            shown = "; ".join(f"line {line.number}: {line.reason}" for line in rejected[:5])
            more = f"; and {len(rejected) - 5} more" if len(rejected) > 5 else ""
            raise ValueError(
                f"{len(rejected)} lines are no requests ({hint('skip_bad')} goes on without them): {shown}{more}"
            )
        if not partial.stat().st_size:
            raise ValueError("there is no request in this job")
        found = {"requests": digest.hexdigest(), **settings}
        if claim.exists() and json.loads(claim.read_text()) != found:
            raise ValueError(f"{out} holds another job, or this one with other settings; give it a folder of its own")
        with new_file(claim, force=True) as temporary:
            temporary.write_text(json.dumps(found))
        partial.replace(out / "jobs.jsonl")
    finally:
        partial.unlink(missing_ok=True)
    if rejected:
        with new_file(out / "rejected.jsonl", force=True) as temporary:
            lines = [json.dumps(line._asdict(), ensure_ascii=False) + "\n" for line in rejected]
            temporary.write_text("".join(lines), "utf-8")
    else:
        (out / "rejected.jsonl").unlink(missing_ok=True)
    return rejected


def first_request(out: Path) -> Request:
    """The first request of OUT/jobs.jsonl (`prepare`)."""
    with open(out / "jobs.jsonl", encoding="utf-8") as file:
        return from_json(file.readline()).request


@contextmanager
def at_work(out: Path, share: Share = ALONE) -> Iterator[None]:
    """Holds a share of a folder's job for this process alone, and clears away what a kill left if no other process is
    at work there. Makes the folder if need be.

    Raises:
        ValueError: another process is at work on this share.
    """
    out.mkdir(parents=True, exist_ok=True)
    with open(out / f".lock{share.tag}", "w") as own, open(out / ".at-work", "w") as common:
        try:
            fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{out}: another process is at work in this folder") from None
        with suppress(BlockingIOError):
            fcntl.flock(common, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left in out.glob(".*.partial"):
                left.unlink()
        fcntl.flock(common, fcntl.LOCK_SH)
        start = time.time()
        try:
            yield
        finally:
            if share.process:
                jax.distributed.shutdown()  # while process 0 is there for certain: it waits for this lock
        if share.process == 0:
            for other in range(1, share.processes):
                _wait_for(out / f".lock{Share(other, share.processes).tag}", start)


def _wait_for(lock: Path, start: float) -> None:
    """Waits until a process that was started with this one has let go of its lock; one that is late has a minute."""
    while not (lock.exists() and lock.stat().st_mtime > start - LATE) and time.time() < start + LATE:
        time.sleep(0.2)
    with open(lock, "a") as file:
        fcntl.flock(file, fcntl.LOCK_SH)


Progress = Callable[[int, int], None]
"""Called with (pictures done, pictures in all)."""


def run(
    pipe: Pipeline,
    out: Path,
    *,
    model: str,
    dtype: str,
    batch: int = BATCH,
    suffix: str = ".png",
    shards: bool = False,
    share: Share = ALONE,
    report: Callable[[str, str], None] | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Makes all pictures of OUT/jobs.jsonl (`prepare`) that are not in OUT/manifest.jsonl, or a share of them, inside
    `at_work`.

    model, dtype: as they shall stand in the recipes. report: called with (id, reason) for what could not be made; the
    others are made. Pictures are encoded in threads while the device makes the next ones.
    """
    with (
        Job(out / "jobs.jsonl", pipe.config.sampling) as job,
        Manifest(out, share) as manifest,
        open(share.failures(out), "wb", buffering=0) as failures,
        ThreadPoolExecutor() as pool,
        ThreadPoolExecutor(1) as writing,  # what a thread has begun Ctrl-C does not cut off: a picture and its line
    ):
        kind = Shards if shards else Files
        writer = writing.submit(lambda: kind(out, suffix, manifest)).result()
        pictures, lines = job.share(share)
        missing = np.array([picture not in manifest.entries for picture in pictures.tolist()], bool)
        total, before, made, failed = len(pictures), int((~missing).sum()), 0, 0
        places: dict[str, tuple[int, int]] = {}  # id of a request under way -> picture, line

        def requests() -> Iterator[Request]:
            index, line = -1, None
            for picture, its_line in zip(pictures[missing].tolist(), lines[missing].tolist(), strict=True):
                if line is None or its_line != index:
                    index, line = its_line, job.line(its_line)
                j = picture - int(job.first[index])
                places[line.name(j)] = picture, line.number
                yield dataclasses.replace(line.request, seed=line.request.seed + j, id=line.name(j))

        def fail(request: Request, error: Exception) -> None:
            nonlocal failed
            failed += 1
            reason, (_, number) = " ".join(str(error).split()), places.pop(request.id)
            if report is not None:
                report(request.id, reason)
            entry = {"id": request.id, "line": number, "seed": request.seed, "reason": reason}
            with suppress(OSError):  # a full disk; it was reported
                append(failures, (json.dumps(entry, ensure_ascii=False) + "\n").encode())

        def write(request: Request, recipe: Recipe, data: Future[bytes]) -> None:
            nonlocal made
            picture, number = places[request.id]
            try:
                digest = hashlib.sha256(data.result()).hexdigest()
                entry = {"picture": picture, "id": request.id, "line": number, "seed": request.seed, "sha256": digest}
                writing.submit(writer.add, entry, data.result(), recipe).result()
                del places[request.id]
                made += 1
            except (OSError, ValueError) as error:
                fail(request, error)
            if progress is not None:
                progress(before + made, total)

        encoding: deque[tuple[Request, Recipe, Future[bytes]]] = deque()
        hashed = lru_cache(maxsize=256)(lambda path: None if path is None else (str(path), file_hash(path)))
        try:
            for request, picture in pipe.batch(requests(), batch=batch, on_error=fail):
                files: dict[str, Any] = dict(image=hashed(request.image), mask=hashed(request.mask))
                recipe = recipe_of(request, pipe.config.sampling, picture, model=model, dtype=dtype, **files)
                encoding.append((request, recipe, pool.submit(encoded, picture, recipe, suffix)))
                while encoding and (encoding[0][2].done() or len(encoding) > ENCODING):
                    write(*encoding.popleft())
        finally:  # after an interruption too
            for waiting in encoding:
                write(*waiting)
        writing.submit(writer.close).result()
    if not failed:
        share.failures(out).unlink()
    return Summary(made, before, failed)


def described(pipe: Pipeline, out: Path, batch: int, share: Share = ALONE) -> str:
    """What `run` would do, as lines to print: pictures, batches and programs by shape, estimated memory."""
    with Job(out / "jobs.jsonl", pipe.config.sampling) as job, Manifest(out, share) as manifest:
        lines = [f"{len(job.offsets)} requests, {job.pictures} pictures, {len(manifest.entries)} of them made"]
    own, shares = pipe.config.image_size, pipe.placement.shares
    at_once, each = batch * shares, " on each device" if shares * pipe.placement.model > 1 else ""
    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(pipe.params)) // pipe.placement.model
    for (size, clip_skip, rows), pictures in job.shapes.items():
        if size == "unreadable":
            lines.append(f"  unreadable init_image: {pictures} pictures")
            continue
        width, height = (own if side is None else side for side in size)
        skipped = f", clip_skip {clip_skip}" if clip_skip else ""
        memory = (parameters + working_set(pipe, width, height, batch)) / 1e9
        lines.append(
            f"  {width}x{height}{skipped}, up to {rows} UNet calls: {pictures} pictures in "
            f"{-(-pictures // at_once)} batches of {at_once}, one program; about {memory:.1f} GB{each}"
        )
    return "\n".join(lines) + "\n"


def working_set(pipe: Pipeline, width: int, height: int, batch: int) -> int:
    """A rough estimate of the bytes that sampling and decoding need besides the parameters.

    The UNet keeps a map for each skip connection and works on a few maps of its widest layer, for two rows of each
    picture; the decoder works on one picture at a time, in a few maps of full size.
    """
    config, unet, vae = pipe.config, pipe.config.unet, pipe.config.vae
    cells = width * height // config.vae.downscale**2
    levels = enumerate(zip(unet.channels, unet.level_res_blocks, strict=True))
    skips = sum(cells // 4**i * channels * (blocks + 1) for i, (channels, blocks) in levels)
    widest = cells * unet.channels[0] * 16  # the gated feed-forward: 8 times the width, its input and output
    bytes_each = jax.tree.leaves(pipe.params["unet"])[0].dtype.itemsize
    return 2 * batch * (skips + widest) * bytes_each + 4 * width * height * vae.channels[0] * 4
