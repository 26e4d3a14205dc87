"""A job file in, pictures out: `sdjax batch jobs.jsonl -o out/`.

    OUT/jobs.jsonl      the job as it was understood, one line for each request; the same command goes on, another job
                        is refused
    OUT/manifest.jsonl  a line for each finished picture: id, file, seed, settings, sha256 of the file
    OUT/failed.jsonl    what could not be made in the last run, and why; the next run tries it again
    OUT/rejected.jsonl  lines that are no request, and why (`skip_bad`)
    OUT/*.png           pictures with their recipes, or OUT/shard-*.tar of them

A picture counts as made when its line is in the manifest. Files appear under their final name when they are whole, the
line follows, and what a kill leaves behind is cleared away by the next start: so every picture is made exactly once, at
whatever moment the work was interrupted.
"""

from __future__ import annotations

import csv
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import tarfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import jax
import numpy as np
from PIL import Image

from sdjax.checkpoint import new_file
from sdjax.pipeline import Pipeline
from sdjax.recipe import Recipe, encoded, file_hash, has_recipe
from sdjax.request import BATCH, Request, check_settings, filled_in, row_bound

SHARD = 1000
"""Pictures in one .tar."""

ENCODING = 64
"""Pictures that may wait to be encoded and written."""

NUMBERS: dict[str, type] = {
    **dict.fromkeys(("seed", "count", "steps", "clip_skip", "width", "height"), int),
    **dict.fromkeys(("guidance", "guidance_rescale", "eta", "strength"), float),
}
TEXTS = ("id", "prompt", "negative_prompt", "sampler", "spacing", "size", "init_image", "mask", "noise")
FIELDS = (*TEXTS, *NUMBERS, "guidance_interval")
"""What a line may say."""


@dataclass(frozen=True)
class Line:
    """One line of a job: `count` pictures, of seeds seed, seed + 1, ... number: where it stands in its file, from 1."""

    number: int
    id: str
    count: int
    request: Request

    def names(self) -> list[str]:
        """The ids of its pictures."""
        return [self.id] if self.count == 1 else [f"{self.id}-{self.request.seed + j}" for j in range(self.count)]


class Rejected(NamedTuple):
    """A line that is no request. text: as it was given; reason: what is wrong with it."""

    number: int
    text: str
    reason: str


IN_RECIPE = tuple(
    field.name
    for field in dataclasses.fields(Request)
    if field.name not in ("width", "height", "image", "mask", "strength", "id")
)
"""Fields of a request that stand in a recipe as they are."""


class Summary(NamedTuple):
    """What a run did: pictures made now and before, and those that could not be made."""

    made: int
    before: int
    failed: int


# Reading


def read_lines(file: IO[str], kind: str, defaults: dict[str, Any]) -> Iterator[Line | Rejected]:
    """Every request of a job file, checked as far as it can be without the model.

    kind: ".jsonl" (an object per line), ".csv" (a head line of field names) or ".txt" (a prompt per line). Empty lines
    are passed over. defaults: fields for lines that lack them.
    """
    seen: set[bytes] = set()
    for number, text, fields in _entries(file, kind):
        try:
            if isinstance(fields, ValueError):
                raise fields
            line = _line(number, {**defaults, **fields})
            digests = [hashlib.blake2b(name.encode(), digest_size=12).digest() for name in line.names()]
            if len(set(digests)) < len(digests) or not seen.isdisjoint(digests):
                raise ValueError(f"the id {line.id!r} is taken by a line before; ids must be unique")
            seen.update(digests)
            yield line
        except (ValueError, TypeError, OSError) as error:
            yield Rejected(number, text, " ".join(str(error).split()))


def _entries(file: IO[str], kind: str) -> Iterator[tuple[int, str, dict[str, Any] | ValueError]]:
    if kind == ".csv":
        reader = csv.DictReader(file, strict=True)
        unknown = [name for name in reader.fieldnames or [] if name not in FIELDS]
        if unknown or "prompt" not in (reader.fieldnames or []):
            found = ", ".join(map(str, reader.fieldnames or ())) or "nothing"
            raise ValueError(f"the first line must name the columns, prompt and others of {', '.join(FIELDS)}: {found}")
        while True:
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield reader.line_num, "", ValueError(f"no line of a CSV file ({error})")
                continue
            text = ",".join(str(value) for value in row.values())
            if None in row:
                yield reader.line_num, text, ValueError("more values than there are columns")
            else:
                yield reader.line_num, text, _from_csv(row)
        return
    for number, text in enumerate(file, 1):
        text = text.rstrip("\r\n")
        if not text.strip():
            continue
        if kind == ".txt":
            yield number, text, {"prompt": text.strip()}
            continue
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            yield number, text, ValueError(f"not JSON ({error})")
            continue
        wrong = None if isinstance(fields, dict) else ValueError(f"expected an object {{...}}, found {text[:40]}")
        yield number, text, wrong or fields


def _from_csv(row: dict[str, str]) -> dict[str, Any] | ValueError:
    fields: dict[str, Any] = {}
    for name, value in row.items():
        if value is None or value == "":
            continue
        try:
            if name in NUMBERS:
                fields[name] = NUMBERS[name](value)
            else:
                fields[name] = [float(end) for end in value.split()] if name == "guidance_interval" else value
        except ValueError:
            return ValueError(f"{name} must be a number, found {value!r}")
    return fields


def _line(number: int, fields: dict[str, Any]) -> Line:
    unknown = [name for name in fields if name not in FIELDS]
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r}; the fields are {', '.join(FIELDS)}")
    fields = {name: value for name, value in fields.items() if value is not None}
    if "prompt" not in fields:
        raise ValueError("the prompt is missing")
    name = fields.pop("id", f"{number:07d}")
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]{0,99}", name, re.ASCII):
        raise ValueError(f"id must be up to 100 letters, digits, '.', '_' and '-', found {name!r}")
    if "size" in fields:
        size = fields.pop("size")
        match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", size) if isinstance(size, str) else None
        if match is None:
            raise ValueError(f"size must be WIDTHxHEIGHT such as 512x768, found {size!r}")
        fields |= dict(width=int(match[1]), height=int(match[2]))
    count, image, mask = fields.pop("count", 1), fields.pop("init_image", None), fields.pop("mask", None)
    for key, path in (("init_image", image), ("mask", mask)):
        if path is not None and not isinstance(path, str):
            raise ValueError(f"{key} must be the path of a picture, found {path!r}")
        if path is not None and not Path(path).is_file():
            raise ValueError(f"{key}: {path}: no such picture file")
    if mask is not None and image is None:
        raise ValueError("a mask needs an init_image")
    if image is None and "strength" in fields:
        raise ValueError("strength needs an init_image")
    for side in ("width", "height"):
        length = fields.get(side, 8)
        if not isinstance(length, int) or isinstance(length, bool) or length < 8 or length % 8:
            raise ValueError(f"{side} must be a multiple of 8, found {length!r}")
    checked = {key: value for key, value in fields.items() if key not in ("width", "height")}
    check_settings(prompts=[checked.pop("prompt")], count=count, **checked)
    if "guidance_interval" in fields:
        fields["guidance_interval"] = tuple(fields["guidance_interval"])
    return Line(number, name, count, Request(**fields, image=image, mask=mask, id=name))


# The job as it was understood


def _to_json(line: Line) -> str:
    given = {
        field.name: getattr(line.request, field.name)
        for field in dataclasses.fields(Request)
        if getattr(line.request, field.name) != field.default
    }
    return json.dumps({"line": line.number, "id": line.id, "count": line.count, **given}, ensure_ascii=False)


def _from_json(text: str) -> Line:
    fields = json.loads(text)
    if "guidance_interval" in fields:
        fields["guidance_interval"] = tuple(fields["guidance_interval"])
    return Line(fields.pop("line"), fields["id"], fields.pop("count"), Request(**fields))


class Job:
    """The lines of OUT/jobs.jsonl by number, none of them in memory. order: lines of one shape stand together."""

    def __init__(self, path: Path) -> None:
        self.file = open(path, "rb")  # noqa: SIM115
        offsets: list[int] = []
        counts: list[int] = []
        shapes: list[int] = []
        shape_ids: dict[tuple[Any, ...], int] = {}
        offset = 0
        for text in self.file:
            line = _from_json(text.decode())
            shape = self.shape(line.request)
            offsets.append(offset)
            counts.append(line.count)
            shapes.append(shape_ids.setdefault(shape, len(shape_ids)))
            offset += len(text)
        self.offsets, self.counts = np.array(offsets, np.int64), np.array(counts, np.int64)
        self.first = np.concatenate([[0], np.cumsum(self.counts)])  # each line's first picture
        self.order = np.argsort(np.array(shapes), kind="stable")
        self.shapes = {shape: int(self.counts[np.array(shapes) == number].sum()) for shape, number in shape_ids.items()}

    @staticmethod
    def shape(request: Request) -> tuple[Any, ...]:
        """What must be equal for requests to share a batch, as far as it shows without the model."""
        size: Any = (request.width, request.height)
        if size == (None, None) and request.image is not None:
            try:
                with Image.open(str(request.image)) as image:
                    size = image.size
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
                size = "unreadable"  # named when it is its turn
        return size, request.clip_skip, row_bound(2 * (request.steps or 25))

    def line(self, index: int) -> Line:
        self.file.seek(self.offsets[index])
        return _from_json(self.file.readline().decode())

    @property
    def pictures(self) -> int:
        return int(self.first[-1])


# Writing


class Manifest:
    """OUT/manifest.jsonl: appended to, a line at a time, and never left with half a line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[int, tuple[str, int]] = {}  # picture -> (file, end of its part of it)
        whole = 0
        if path.exists():
            with open(path, "rb") as file:
                for text in file:
                    try:
                        entry = json.loads(text)
                        self.entries[entry["picture"]] = entry["file"], entry.get("end", 0)
                    except (ValueError, TypeError, KeyError):
                        break
                    if not text.endswith(b"\n"):
                        break
                    whole += len(text)
        self.file = open(path, "ab")  # noqa: SIM115
        self.file.truncate(whole)

    def keep(self, there: Callable[[str, int], bool]) -> None:
        """Forgets the pictures whose file is gone."""
        gone = {picture for picture, (file, end) in self.entries.items() if not there(file, end)}
        if not gone:
            return
        self.file.close()
        with new_file(self.path, force=True) as temporary, open(self.path, "rb") as old, open(temporary, "wb") as new:
            new.writelines(text for text in old if json.loads(text)["picture"] not in gone)
        self.entries = {picture: entry for picture, entry in self.entries.items() if picture not in gone}
        self.file = open(self.path, "ab")  # noqa: SIM115

    def add(self, entry: dict[str, Any]) -> None:
        _append(self.file, (json.dumps(entry, ensure_ascii=False) + "\n").encode())


def _append(file: IO[bytes], data: bytes) -> None:
    """All of `data`, or none of it and an OSError."""
    before = os.fstat(file.fileno()).st_size
    try:
        file.write(data)
        file.flush()
    except OSError:
        os.ftruncate(file.fileno(), before)
        raise


class Files:
    """A file for each picture."""

    def __init__(self, out: Path, suffix: str, manifest: Manifest) -> None:
        self.out, self.suffix = out, suffix
        there = {entry.name for entry in os.scandir(out)}
        manifest.keep(lambda file, _: file in there)

    def add(self, name: str, data: bytes, recipe: Recipe) -> dict[str, Any]:
        path = self.out / f"{name}{self.suffix}"
        if path.exists() and not has_recipe(path):
            raise FileExistsError(f"{path} is already there and was not made by sdjax; move it away")
        with new_file(path, force=True) as temporary:
            temporary.write_bytes(data)
        return {"file": path.name}

    def close(self) -> None:
        pass


class Shards:
    """WebDataset: NAME.png and NAME.json, `SHARD` pictures to a shard-000000.tar. One that is not full yet ends in
    .partial; its length after each picture is in the manifest, so that a kill in between is cut off.
    """

    def __init__(self, out: Path, suffix: str, manifest: Manifest) -> None:
        self.out, self.suffix = out, suffix
        ends: dict[str, list[int]] = {}
        for file, end in manifest.entries.values():
            ends.setdefault(file, []).append(end)
        lengths = {
            file: (self._partial(file) if self._partial(file).exists() else out / file).stat().st_size
            for file in ends
            if self._partial(file).exists() or (out / file).exists()
        }
        manifest.keep(lambda file, end: end <= lengths.get(file, -1))
        self.number = 1 + max((int(file[6:12]) for file in ends), default=-1)
        self.count, self.file = 0, cast(IO[bytes] | None, None)
        for file in sorted(ends):
            if self._partial(file).exists():
                self.number, self.count = int(file[6:12]), sum(end <= lengths[file] for end in ends[file])
                self.file = open(self._partial(file), "r+b")  # noqa: SIM115
                self.file.truncate(max((end for end in ends[file] if end <= lengths[file]), default=0))
                self.file.seek(0, os.SEEK_END)

    @property
    def name(self) -> str:
        return f"shard-{self.number:06d}.tar"

    def _partial(self, file: str) -> Path:
        return self.out / f"{file}.partial"

    def add(self, name: str, data: bytes, recipe: Recipe) -> dict[str, Any]:
        file = self.file = self.file or open(self._partial(self.name), "wb")  # noqa: SIM115
        members = {self.suffix: data, ".json": recipe.to_json().encode()}
        _append(file, b"".join(_member(name + suffix, content) for suffix, content in members.items()))
        self.count += 1
        added = {"file": self.name, "end": file.tell()}
        if self.count == SHARD:
            self.close()
        return added

    def close(self) -> None:
        if self.file is None:
            return
        _append(self.file, bytes(2 * tarfile.BLOCKSIZE))
        self.file.close()
        self._partial(self.name).rename(self.out / self.name)
        self.number, self.count, self.file = self.number + 1, 0, None


def _member(name: str, content: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info.tobuf() + content + bytes(-len(content) % tarfile.BLOCKSIZE)


# Running


def prepare(
    source: IO[str], kind: str, out: Path, settings: dict[str, Any], defaults: dict[str, Any], *, skip_bad: bool
) -> list[Rejected]:
    """Reads and checks a whole job file into OUT/jobs.jsonl, and returns the lines that are no requests.

    settings: what else the pictures depend on (model, dtype, file format); a folder is for one job and one of these.

    Raises:
        ValueError: `out` holds another job, or, without `skip_bad`, there are lines that are no requests.
    """
    partial, claim = out / ".jobs.jsonl.partial", out / "job.json"
    rejected: list[Rejected] = []
    digest = hashlib.sha256()
    try:
        with open(partial, "wb") as file:
            for line in read_lines(source, kind, defaults):
                if isinstance(line, Rejected):
                    rejected.append(line)
                    continue
                text = (_to_json(line) + "\n").encode()
                digest.update(text)
                file.write(text)
        if rejected and not skip_bad:
            shown = "; ".join(f"line {line.number}: {line.reason}" for line in rejected[:5])
            more = f"; and {len(rejected) - 5} more" if len(rejected) > 5 else ""
            raise ValueError(f"{len(rejected)} lines are no requests (--skip-bad goes on without them): {shown}{more}")
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
    with new_file(out / "rejected.jsonl", force=True) as temporary:
        lines = [json.dumps(line._asdict(), ensure_ascii=False) + "\n" for line in rejected]
        temporary.write_text("".join(lines), "utf-8")
    if not rejected:
        (out / "rejected.jsonl").unlink()
    return rejected


@contextmanager
def at_work(out: Path) -> Iterator[None]:
    """Holds a folder for this process alone, and clears away what a kill left. Makes the folder if need be.

    Raises:
        ValueError: another process is at work in it.
    """
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{out}: another process is at work in this folder") from None
        for left in out.glob(".*.partial"):
            left.unlink()
        yield


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
    report: Callable[[str, str], None] | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Makes all pictures of OUT/jobs.jsonl (`prepare`) that are not in OUT/manifest.jsonl, inside `at_work`.

    model, dtype: as they shall stand in the recipes. report: called with (id, reason) for what could not be made; the
    others are made. Pictures are encoded in threads while the device makes the next ones.
    """
    job, manifest = Job(out / "jobs.jsonl"), Manifest(out / "manifest.jsonl")
    writer = (Shards if shards else Files)(out, suffix, manifest)
    done = np.zeros(job.pictures, bool)
    done[list(manifest.entries)] = True
    before, failed = int(done.sum()), 0
    places: dict[str, tuple[int, int]] = {}  # id of a request under way -> picture, line

    def requests() -> Iterator[Request]:
        for index in job.order:
            line = job.line(index)
            for j, name in enumerate(line.names()):
                picture = int(job.first[index]) + j
                if not done[picture]:
                    places[name] = picture, line.number
                    yield dataclasses.replace(line.request, seed=line.request.seed + j, id=name)

    with open(out / "failed.jsonl", "wb") as failures, ThreadPoolExecutor() as pool:

        def fail(request: Request, error: Exception) -> None:
            nonlocal failed
            failed += 1
            reason, (_, number) = " ".join(str(error).split()), places.pop(request.id)
            if report is not None:
                report(request.id, reason)
            entry = {"id": request.id, "line": number, "seed": request.seed, "reason": reason}
            with suppress(OSError):  # a full disk; it was reported
                _append(failures, (json.dumps(entry, ensure_ascii=False) + "\n").encode())

        def write(request: Request, recipe: Recipe, data: Future[bytes]) -> None:
            picture, number = places[request.id]
            try:
                where = writer.add(request.id, data.result(), recipe)
                digest = hashlib.sha256(data.result()).hexdigest()
                entry = {"picture": picture, "id": request.id, "line": number, "seed": request.seed, "sha256": digest}
                manifest.add({**entry, **where, "settings": json.loads(recipe.to_json())})
                del places[request.id]
                done[picture] = True
            except (OSError, ValueError) as error:
                fail(request, error)
            if progress is not None:
                progress(int(done.sum()), job.pictures)

        encoding: deque[tuple[Request, Recipe, Future[bytes]]] = deque()
        hashed = lru_cache(maxsize=256)(file_hash)
        try:
            for request, picture in pipe.batch(requests(), batch=batch, on_error=fail):
                recipe = _recipe(pipe, request, picture, model, dtype, hashed)
                encoding.append((request, recipe, pool.submit(encoded, picture, recipe, suffix)))
                while encoding and (encoding[0][2].done() or len(encoding) > ENCODING):
                    write(*encoding.popleft())
        finally:  # after an interruption too
            for made in encoding:
                write(*made)
    writer.close()
    if not failed:
        (out / "failed.jsonl").unlink()
    return Summary(int(done.sum()) - before, before, failed)


def _recipe(
    pipe: Pipeline, request: Request, picture: Image.Image, model: str, dtype: str, hashed: Callable[[str], str]
) -> Recipe:
    full = filled_in(request, pipe.config.sampling)
    image, mask = (None if path is None else (str(path), hashed(str(path))) for path in (request.image, request.mask))
    return Recipe(
        task="txt2img" if image is None else "img2img" if mask is None else "inpaint",
        model=model,
        width=picture.width,
        height=picture.height,
        dtype=dtype,
        image=image,
        mask=mask,
        **{name: getattr(full, name) for name in IN_RECIPE},
        strength=None if image is None else full.strength,
    )


def described(pipe: Pipeline, out: Path, batch: int) -> str:
    """What `run` would do, as lines to print: pictures, batches and programs by shape, estimated memory."""
    job, manifest = Job(out / "jobs.jsonl"), Manifest(out / "manifest.jsonl")
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
    skips = sum(cells // 4**i * channels * (unet.res_blocks + 1) for i, channels in enumerate(unet.channels))
    widest = cells * unet.channels[0] * 16  # the gated feed-forward: 8 times the width, its input and output
    bytes_each = jax.tree.leaves(pipe.params["unet"])[0].dtype.itemsize
    return 2 * batch * (skips + widest) * bytes_each + 4 * width * height * vae.channels[0] * 4
