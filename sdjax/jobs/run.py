"""A job file in, pictures out: `sdjax batch jobs.jsonl -o out/`.

    OUT/jobs.jsonl      the job as it was understood, one line for each request; the same command resumes it,
                        another job is refused
    OUT/manifest.jsonl  a line for each finished picture: id, file, seed, settings, sha256 of the file
    OUT/failed.jsonl    what could not be made in the last run, and why; the next run tries it again
    OUT/rejected.jsonl  invalid lines, and why (`skip_bad`)
    OUT/*.png           pictures with their recipes, or OUT/shard-*.tar of them

Several processes (`Share`) may do one job together; the second and later ones put their number into the names of their
own manifest-0001.jsonl, failed-0001.jsonl and shard-0001-000000.tar.

A picture counts as made when its line is in the manifest. Files appear under their final name when they are whole, the
line follows, and what a crash leaves behind is cleared away by the next start: so every picture is made exactly once,
at whatever moment the work was interrupted.
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
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
import numpy as np

from sdjax.config import ModelConfig
from sdjax.hints import hint
from sdjax.jobs.job_file import SHOWN, Job, Line, Rejected, from_json, read_lines, to_json
from sdjax.jobs.outputs import Files, Manifest, Shards, append
from sdjax.jobs.processes import ALONE, Share
from sdjax.pipeline.pipeline import Pipeline
from sdjax.pipeline.recipe import Recipe, encoded, file_hash, recipe_of
from sdjax.request import BATCH, Request, numbered
from sdjax.storage.cache import signature
from sdjax.storage.files import flush, json_line, move, new_file, refuse_long_names, refuse_unwritable

OWN_FILES = ("jobs.jsonl", "manifest.jsonl", "failed.jsonl", "rejected.jsonl", "job.json")
"""What a job writes besides its pictures."""

LATE = 60.0
"""Seconds by which processes of one job may start apart."""

ENCODING = 64
"""Pictures that may wait to be encoded and written."""


class Summary(NamedTuple):
    """What a run did: pictures made now and before, and those that could not be made."""

    made: int
    before: int
    failed: int


def check_output(out: Path, jobs: Path | None) -> None:
    """Looks whether a job can be done in a folder, as far as that shows beforehand. jobs: its file, if it has one.

    Raises:
        ValueError, OSError: it cannot be made or written, or the job file is one that the job will write.
    """
    if "\0" in str(out):
        raise ValueError(f"{str(out)!r}: a zero byte, which no name of a folder can have")
    refuse_long_names(out.parts)
    if out.is_symlink() and not out.exists():
        raise ValueError(f"{out}: a link to nothing; choose another folder")
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not there.is_dir():
        made = "it" if there == out else str(out)
        raise ValueError(f"{there}: is there and is no folder, so {made} cannot be one; choose another name")
    refuse_unwritable(there)
    for own in (out / name for name in OWN_FILES):
        if jobs is not None and own.exists() and own.samefile(jobs):
            raise ValueError(f"{jobs}: is what {out} keeps of its job; copy it to another place to do it again")


def prepare(
    source: IO[bytes] | IO[str],
    kind: str,
    out: Path,
    settings: dict[str, Any],
    defaults: dict[str, Any],
    *,
    skip_bad: bool,
    share: Share = ALONE,
    check: Callable[[Request], object] | None = None,
    request_class: type[Request] = Request,
) -> list[Rejected]:
    """Reads and checks a whole job file into OUT/jobs.jsonl, and returns the invalid lines.

    source, kind: the job file, and its ending.
    settings: what else the pictures depend on (model, dtype, file format); a folder is for one job and one of these.
    defaults: fields for lines that lack them.
    skip_bad: whether invalid lines are left out, into OUT/rejected.jsonl.
    share: of several processes each does this for itself, and comes to the same file.
    check: raises ValueError for a request that the model cannot make.
    request_class: what the lines are of.

    Raises:
        ValueError: `out` holds another job or other files of these names, no line is valid, or some are not and
        `skip_bad` is not given.
    """
    partial, bad = (out / f".{name}{share.tag}.jsonl.partial" for name in ("jobs", "rejected"))
    claim = out / "job.json"
    rejected: list[Rejected] = []
    digest, size = hashlib.sha256(), 0
    named = getattr(source, "name", None)
    name = named if isinstance(named, str) else "the job"
    try:
        with open(partial, "wb") as file, open(bad, "wb") as bad_file:
            ignores_case = (out / partial.name.upper()).exists()
            options: dict[str, Any] = dict(ignores_case=ignores_case, request_class=request_class)
            for line in _named(name, read_lines(source, kind, defaults, check, **options)):
                if isinstance(line, Rejected):
                    bad_file.write(json_line(line._asdict()))
                    rejected.append(line._replace(text=line.text[:SHOWN]))
                    continue
                text = to_json(line)
                digest.update(text)
                size += file.write(text)
        if rejected and not (skip_bad and size):
            reasons = shown([f"line {line.number}: {line.reason}" for line in rejected], 20 if skip_bad else 5)
            advice = "" if skip_bad else f" ({hint('skip_bad')} goes on without them)"
            nothing = "" if size else "; there is no request in this job"
            raise ValueError(f"{name}: {len(rejected)} lines are invalid{advice}{nothing}: {'; '.join(reasons)}")
        if not size:
            raise ValueError(f"{name}: there is no request in this job; the file has no line that says anything")
        _claim(claim, {"requests": digest.hexdigest(), **settings})
        move(partial, out / "jobs.jsonl")
        if rejected:
            move(bad, out / "rejected.jsonl")
        else:
            (out / "rejected.jsonl").unlink(missing_ok=True)
    finally:
        partial.unlink(missing_ok=True)
        bad.unlink(missing_ok=True)
    return rejected


def _named(name: str, lines: Iterator[Line | Rejected]) -> Iterator[Line | Rejected]:
    """The lines; an error of the whole file names it."""
    try:
        yield from lines
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def shown(lines: list[str], most: int, where: str = "") -> list[str]:
    """The first of many lines, and how many more there are, where."""
    more = len(lines) - most
    return lines if more <= 0 else [*lines[:most], f"and {more:,} more{where}"]


def _claim(claim: Path, job: dict[str, Any]) -> None:
    """Takes a folder for a job, by a job.json that says which. Raises ValueError if it is taken."""
    out = claim.parent
    if not claim.exists():
        if there := [name for name in OWN_FILES if (out / name).exists()]:
            raise ValueError(f"{out / there[0]}: is there, and of no job of sdjax (job.json is missing); move it away")
        was = job
    else:
        try:
            was = json.loads(claim.read_bytes())
            if not isinstance(was, dict):
                raise ValueError("no object in it")
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{claim}: damaged ({error}); if {out} holds this very job, remove this file to go on"
            ) from None
    ignored = () if "content" in was else ("content", "conversion")  # as earlier versions left them out
    names = [name for name in {**was, **job} if name not in ignored and was.get(name) != job.get(name)]
    if names:
        listed = ", ".join(f"{name} {was.get(name)} there, {job.get(name)} here" for name in names[:4])
        raise ValueError(
            f"{out} holds another job, or this one with other settings ({listed}); give it a folder of its own"
        )
    with new_file(claim, force=True) as temporary:
        temporary.write_text(json.dumps(job))


def first_request(out: Path, request_class: type[Request] = Request) -> Request:
    """The first request of OUT/jobs.jsonl (`prepare`)."""
    with open(out / "jobs.jsonl", encoding="utf-8") as file:
        return from_json(file.readline(), request_class).request


@contextmanager
def at_work(out: Path, share: Share = ALONE) -> Iterator[None]:
    """Holds a share of a folder's job for this process alone, and clears away what a crash left if no other process is
    at work there. Makes the folder if need be.

    Raises:
        ValueError: another process is at work on this share.
    """
    out.mkdir(parents=True, exist_ok=True)
    flush(out.parent)
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
            if share.process_index:
                jax.distributed.shutdown()  # while process 0 is there for certain: it waits for this lock
        if share.process_index == 0:
            for other in range(1, share.process_count):
                _wait_for(out / f".lock{Share(other, share.process_count).tag}", start)


def _wait_for(lock: Path, start: float) -> None:
    """Waits until a process that was started with this one has let go of its lock; one that is late has a minute."""
    while not (lock.exists() and lock.stat().st_mtime > start - LATE) and time.time() < start + LATE:
        time.sleep(0.2)
    with open(lock, "a") as file:
        fcntl.flock(file, fcntl.LOCK_SH)


def _hashed(picture: Any) -> tuple[str, str] | None:
    """An input picture's path and sha256, for the recipe."""
    if picture is None:
        return None
    return str(picture), _hash(str(picture), *signature(Path(picture)))


@lru_cache(maxsize=256)
def _hash(path: str, *_: int) -> str:
    """A file's sha256, remembered as long as the file system says that it is the same."""
    return file_hash(path)


Progress = Callable[[int, int], None]
"""Called with (pictures done, pictures in all)."""


def run(
    pipe: Pipeline | Callable[[], Pipeline],
    out: Path,
    *,
    model: str,
    dtype: str,
    config: ModelConfig | None = None,
    conversion: dict[str, Any] | None = None,
    batch: int = BATCH,
    suffix: str = ".png",
    shards: bool = False,
    share: Share = ALONE,
    request_class: type[Request] = Request,
    report: Callable[[str, str], None] | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Makes the pictures of OUT/jobs.jsonl (`prepare`) that are not in OUT/manifest.jsonl; call it inside `at_work`.

    Pictures are encoded in threads while the device makes the next ones.

    pipe: the model, or what loads it, which is called if a picture is missing; then config says what it will be.
    model, dtype, conversion: as they shall stand in the recipes.
    batch: pictures at once on each device.
    suffix: of picture files; shards: whether they go into WebDataset shards.
    share: which part of the job is made.
    request_class: what the lines are of.
    report: called with (id, reason) for what could not be made; the others are made.
    progress: called with (pictures done, pictures in all).
    """
    if config is None:
        assert not callable(pipe)
        config = pipe.config
    with (
        ExitStack() as opened,
        Job(out / "jobs.jsonl", config.sampling, request_class) as job,
        Manifest(out, share) as manifest,
        ThreadPoolExecutor() as pool,
        ThreadPoolExecutor(1) as writing,  # what a thread has begun Ctrl-C does not cut off: a picture and its line
    ):
        kind = Shards if shards else Files
        writer = writing.submit(lambda: kind(out, suffix, manifest)).result()
        pictures, lines = job.share(share)
        missing = np.array([picture not in manifest.entries for picture in pictures.tolist()], bool)
        total, before, made, failed = len(pictures), int((~missing).sum()), 0, 0
        made_by = pipe if not callable(pipe) else pipe() if missing.any() else None
        failures = opened.enter_context(open(share.failures(out), "wb", buffering=0))
        places: dict[str, tuple[int, int]] = {}  # id of a request under way -> picture, line

        def requests() -> Iterator[Request]:
            index, line = -1, None
            for picture, its_line in zip(pictures[missing].tolist(), lines[missing].tolist(), strict=True):
                if line is None or its_line != index:
                    index, line = its_line, job.line(its_line)
                j = picture - int(job.first[index])
                places[line.name(j)] = picture, line.number
                yield dataclasses.replace(numbered(line.request, j), id=line.name(j))

        def fail(request: Request, error: Exception) -> None:
            nonlocal failed
            failed += 1
            reason, (_, number) = " ".join(str(error).split()), places.pop(request.id)
            if report is not None:
                report(request.id, reason)
            entry = {"id": request.id, "line": number, "seed": request.seed, "reason": reason}
            with suppress(OSError):  # a full disk; it was reported
                append(failures, json_line(entry))

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
        try:
            making = () if made_by is None else made_by.batch(requests(), batch_size=batch, on_error=fail)
            for request, picture in making:
                assert made_by is not None
                try:
                    said: dict[str, Any] = dict(image=_hashed(request.image), mask=_hashed(request.mask))
                except OSError as error:  # gone since it was read
                    fail(request, error)
                    continue
                said |= dict(model=model, dtype=dtype, conversion=conversion, **made_by.files_of(request))
                recipe = recipe_of(request, config.sampling, picture, image_size=config.image_size, **said)
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


def described(
    pipe: Pipeline, out: Path, batch: int, share: Share = ALONE, request_class: type[Request] = Request
) -> str:
    """What `run` would do, as lines to print: pictures, batches and programs by shape, estimated memory."""
    with Job(out / "jobs.jsonl", pipe.config.sampling, request_class) as job, Manifest(out, share) as manifest:
        lines = [f"{len(job.offsets)} requests, {job.pictures} pictures, {len(manifest.entries)} of them made"]
    own, shares = pipe.config.image_size, pipe.placement.data_parallel
    at_once, each = batch * shares, " on each device" if shares * pipe.placement.model_parallel > 1 else ""
    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(pipe.params)) // pipe.placement.model_parallel
    for (size, clip_skip, rows, drawn, tiling), pictures in job.shapes.items():
        if size == "unreadable":
            lines.append(f"  unreadable init_image: {pictures} pictures")
            continue
        what, shared = ("masked regions of about ", " for each shape") if size == "region" else ("", "")
        width, height = (own if side is None else side for side in ((own, own) if shared else size))
        skipped = f", clip_skip {clip_skip}" if clip_skip else ""
        skipped += ", PyTorch's noise in every step" if drawn else ""
        skipped += ", tiled" if tiling else ""
        memory = (parameters + working_set(pipe, width, height, batch)) / 1e9
        lines.append(
            f"  {what}{width}x{height}{skipped}, up to {rows} UNet calls: {pictures} pictures in "
            f"{-(-pictures // at_once)} batches of {at_once}, one program{shared}; about {memory:.1f} GB{each}"
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
