"""Job files: what a line may say, and the lines of a job by number.

A job comes as .jsonl, .csv, .tsv or .txt (`read_lines`, in the forms of `sdjax.jobs.forms`), and is kept as .jsonl
(`to_json`, `Job`).
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import Image

from sdjax.config import SamplingConfig
from sdjax.diffusion.plan import calls_of, row_bound
from sdjax.diffusion.samplers import SAMPLERS
from sdjax.image import LARGEST_SIDE
from sdjax.jobs.forms import Known, entries
from sdjax.jobs.processes import Share
from sdjax.request import (
    RANDOM,
    SEEDS,
    Request,
    check_mask_settings,
    check_positive,
    check_seeds,
    check_values,
    need,
    numbered,
    ours,
    parse_sides,
    parse_size,
    seeds_of,
    with_defaults,
)
from sdjax.storage.files import json_line
from sdjax.text.syntax import lora_of

LINE_PICTURES, JOB_PICTURES = 1_000_000, 10_000_000
"""Most pictures of one line, and of a whole job."""

SHOWN = 300
"""Most letters of a reason."""


@dataclass(frozen=True)
class Line:
    """One line of a job: `count` pictures (`numbered`). number: where it stands in its file, from 1."""

    number: int
    id: str
    count: int
    request: Request

    def name(self, j: int) -> str:
        """The id of its picture number j, from 0."""
        return self.id if self.count == 1 else f"{self.id}-{seeds_of(numbered(self.request, j))}"


class Rejected(NamedTuple):
    """An invalid line. text: as it was given; reason: what is wrong with it."""

    number: int
    text: str
    reason: str


def read_lines(
    file: IO[bytes] | IO[str],
    kind: str,
    defaults: dict[str, Any],
    check: Callable[[Request], object] | None = None,
    *,
    ignores_case: bool = False,
    request_class: type[Request] = Request,
) -> Iterator[Line | Rejected]:
    """Every request of a job file, checked as far as it can be without making its picture.

    kind: ".jsonl", ".csv", ".tsv" or ".txt" (`sdjax.jobs.forms`).
    defaults: fields for lines that lack them.
    check: raises ValueError for a request that the model cannot make.
    ignores_case: ids that differ in capitals alone are the same.
    request_class: what lines are of; its settings are what they may say.

    Raises:
        ValueError: nothing of the file can be used.
    """
    names, pictures = _Names(ignores_case), 0
    for number, text, fields in entries(file, kind, Known.of(request_class)):  # type: ignore[arg-type]
        try:
            if isinstance(fields, ValueError):
                raise fields
            line = _line(number, {**defaults, **fields}, request_class)
            if pictures + line.count > JOB_PICTURES:
                raise ValueError(f"with this line the job has more than {JOB_PICTURES:,} pictures; divide it")
            if check is not None:
                check(line.request)
            if not names.take(line):
                raise ValueError(f"the id {line.id!r} is taken by a line before; ids must be unique")
            pictures += line.count
            yield line
        except (ValueError, TypeError, OSError, RecursionError) as error:
            reason = " ".join(str(error).encode("utf-8", "backslashreplace").decode().split())
            yield Rejected(number, text, reason if len(reason) <= SHOWN else f"{reason[:SHOWN]} ...")


class _Names:
    """The ids of pictures that are taken; those of a line with many pictures as a range, however many there are.

    single: ids that stand alone, hashed; numbered: those that end in -NUMBER, as the pictures of a line with a count
    do, by what stands before it; ranges: of each such beginning [start, stop), sorted, none of which overlap.
    """

    def __init__(self, ignores_case: bool) -> None:
        self.ignores_case = ignores_case
        self.single: set[bytes] = set()
        self.numbered: dict[str, set[int]] = {}
        self.ranges: dict[str, list[tuple[int, int]]] = {}

    def take(self, line: Line) -> bool:
        """Whether the ids of a line were free; they are taken then."""
        name = line.id.lower() if self.ignores_case else line.id
        if line.count > 1:
            stem, _, first = f"{name}-{seeds_of(line.request)}".rpartition("-")  # the last number counts up
            return self._take_range(stem, int(first), int(first) + line.count)
        if match := re.fullmatch(r"(.+)-(0|[1-9]\d*)", name):
            stem, number = match[1], int(match[2])
            numbers = self.numbered.setdefault(stem, set())
            if number in numbers or self._overlapped(stem, number, number + 1):
                return False
            numbers.add(number)
            return True
        digest = hashlib.blake2b(name.encode(), digest_size=12).digest()
        if digest in self.single:
            return False
        self.single.add(digest)
        return True

    def _take_range(self, stem: str, start: int, stop: int) -> bool:
        numbers = self.numbered.get(stem, set())
        if len(numbers) < stop - start:
            met = any(start <= number < stop for number in numbers)
        else:
            met = any(number in numbers for number in range(start, stop))
        if met or self._overlapped(stem, start, stop):
            return False
        bisect.insort(self.ranges.setdefault(stem, []), (start, stop))
        return True

    def _overlapped(self, stem: str, start: int, stop: int) -> bool:
        ranges = self.ranges.get(stem, [])
        after = bisect.bisect_left(ranges, (stop, stop))
        return after > 0 and ranges[after - 1][1] > start


def _line(number: int, fields: dict[str, Any], kind: type[Request]) -> Line:
    """One line, checked as far as it can be without the model and the pictures."""
    known = Known.of(kind)  # type: ignore[arg-type]
    fields = {name: value for name, value in fields.items() if value is not None}

    # Names
    for alias, name in known.aliases.items():
        if alias in fields:
            if name in fields:
                raise ValueError(f"{name} is there twice, once as {alias}")
            fields[name] = fields.pop(alias)
    unknown = [name for name in fields if name not in known.kinds]
    if unknown:
        raise ValueError(f"unknown field {known.called(unknown[0])}; the fields are {known.fields}")

    # Texts and files
    if "prompt" not in fields:
        raise ValueError("the prompt is missing")
    for key, value in fields.items():
        if isinstance(value, str) and "\0" in value:
            raise ValueError(f"{key} holds a zero character; leave it out")
        if known.kinds[key] == "noise":
            need(isinstance(value, str), key, "a string", value)
    name = fields.pop("id", f"{number:07d}")
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]{0,99}", name, re.ASCII):
        raise ValueError(f"id must be up to 100 letters, digits, '.', '_' and '-', found {name!r}")
    if "size" in fields:
        width, height = parse_size(fields.pop("size"))
        fields |= dict(width=width, height=height)
    count, image, mask = fields.pop("count", 1), fields.pop("init_image", None), fields.pop("mask", None)
    for key, path in (("init_image", image), ("mask", mask)):
        if path is not None:
            _refuse_no_file(key, path)
    if image is None and "strength" in fields:
        raise ValueError("strength needs an init_image")

    # Numbers
    for side in ("width", "height"):
        length = fields.get(side, 8)
        if not isinstance(length, int) or isinstance(length, bool) or length < 8 or length % 8:
            raise ValueError(f"{side} must be a multiple of 8, found {length!r}")
        if length > LARGEST_SIDE:
            raise ValueError(f"{side} must be {LARGEST_SIDE} at most, found {length}")
    if isinstance(count, int) and count > LINE_PICTURES:
        raise ValueError(f"count must be {LINE_PICTURES:,} at most, found {count}; divide the line")
    check_positive(count=count)
    for seed in RANDOM:
        if fields.get(seed) == -1:
            fields[seed] = seed_of(number, fields, count)
    fields = ours(fields, kind)
    check_values(fields, kind)
    check_mask_settings({**fields, "image": image, "mask": mask}, "an init_image")
    check_seeds(fields, count)
    if "guidance_interval" in fields:
        fields["guidance_interval"] = tuple(fields["guidance_interval"])
    return Line(number, name, count, kind(**fields, image=image, mask=mask, id=name))


def seed_of(number: int, fields: dict[str, Any], count: int) -> int:
    """A seed that nobody chose, for a line that asks for it: the same whenever the job is read again, so that a job
    resumes, and several processes agree.
    """
    said = json.dumps([number, fields], sort_keys=True, default=str).encode()
    return int.from_bytes(hashlib.blake2b(said, digest_size=8).digest()) % (SEEDS - count + 1)


def _refuse_no_file(key: str, path: Any) -> None:
    """Raises ValueError unless `path` is the path of a file that can be read."""
    if not isinstance(path, str):
        raise ValueError(f"{key} must be the path of a picture, found {path!r}")
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        link = "; it is a link to nothing" if os.path.islink(path) else ""
        raise ValueError(f"{key}: {path:.200}: no such picture file{link}") from None
    if not stat.S_ISREG(mode):
        raise ValueError(
            f"{key}: {path:.200}: no such picture file; it is {'a folder' if stat.S_ISDIR(mode) else 'no file'}"
        )
    if not os.access(path, os.R_OK):
        raise ValueError(f"{key}: {path:.200}: may not be read; give yourself the permission")


def to_json(line: Line) -> bytes:
    """The line as a job is kept: what is not the default, and the number it had; in UTF-8, its end included."""
    given = {
        field.name: getattr(line.request, field.name)
        for field in dataclasses.fields(line.request)
        if getattr(line.request, field.name) != field.default
    }
    return json_line({"line": line.number, "id": line.id, "count": line.count, **given})


def from_json(text: str | bytes, request_class: type[Request] = Request) -> Line:
    """What `to_json` wrote. request_class: the class of its request."""
    fields = json.loads(text)
    fields |= {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    return Line(fields.pop("line"), fields["id"], fields.pop("count"), request_class(**fields))


class Job(AbstractContextManager["Job"]):
    """The lines of a job by number, none of them in memory.

    sampling: the model's own settings. request_class: what the lines are of.
    first: each line's first picture, i64[lines + 1].
    order: the lines, those of one shape together, and of these those with the same adapters.
    shapes: pictures of each shape.
    """

    def __init__(self, path: Path, sampling: SamplingConfig, request_class: type[Request] = Request) -> None:
        self.request_class = request_class
        self.file = open(path, "rb")  # noqa: SIM115
        offsets: list[int] = []
        counts: list[int] = []
        shapes: list[int] = []
        adapters: list[int] = []
        shape_ids: dict[tuple[Any, ...], int] = {}
        adapter_ids: dict[tuple[str, ...], int] = {}
        offset = 0
        for text in self.file:
            line = from_json(text, request_class)
            shape = _shape(with_defaults(line.request, sampling))
            offsets.append(offset)
            counts.append(line.count)
            shapes.append(shape_ids.setdefault(shape, len(shape_ids)))
            adapters.append(adapter_ids.setdefault(_adapters(line.request), len(adapter_ids)))
            offset += len(text)
        self.offsets, self.counts = np.array(offsets, np.int64), np.array(counts, np.int64)
        self.first = np.concatenate([[0], np.cumsum(self.counts)])
        self.order = np.lexsort((adapters, shapes))
        pictures = np.bincount(shapes, self.counts)
        self.shapes = {shape: int(pictures[number]) for shape, number in shape_ids.items()}

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def line(self, index: int) -> Line:
        self.file.seek(self.offsets[index])
        return from_json(self.file.readline(), self.request_class)

    @property
    def pictures(self) -> int:
        return int(self.first[-1])

    def share(self, share: Share) -> tuple[np.ndarray, np.ndarray]:
        """The share's pictures, every so many-th in `order`, and the line of each, i64[n] both."""
        lines = np.repeat(self.order, self.counts[self.order])
        starts = np.cumsum(self.counts[self.order]) - self.counts[self.order]
        pictures = self.first[lines] + np.arange(self.pictures) - np.repeat(starts, self.counts[self.order])
        mine = slice(share.process_index, None, share.process_count)
        return pictures[mine], lines[mine]


def _adapters(request: Request) -> tuple[str, ...]:
    """The adapters that a request names, whatever their weights."""
    tagged = re.findall(r"<(?:lora|lyco):([^:>]+)", request.prompt) if isinstance(request.prompt, str) else []
    return tuple(sorted({*tagged, *(lora_of(text).name for text in request.loras)}))


def _shape(request: Request) -> tuple[Any, ...]:
    """What must be equal for requests to share a batch, as far as it shows without the model: size, "region" (of a
    mask, in a size that the model decides) or "unreadable", clip_skip, the UNet calls, rounded up, whether the noise
    that the sampler adds is drawn beforehand, and whether it is tiled.
    """
    size: Any = (request.width, request.height)
    if size == (None, None) and request.only_masked is not None:
        size = "region"
    elif size == (None, None) and request.image is not None:
        sides = parse_sides(request.outpaint)
        try:
            with Image.open(str(request.image)) as image:
                size = image.width + sides.left + sides.right, image.height + sides.top + sides.bottom
        except Exception:  # Pillow raises almost anything on a damaged file
            size = "unreadable"  # named when it is its turn
    assert request.steps is not None
    assert request.sampler is not None
    adds = request.eta > 0 if request.eta is not None else SAMPLERS[request.sampler].stochastic
    rows = row_bound(calls_of(request.sampler, request.steps))
    return size, request.clip_skip, rows, adds and request.noise != "jax", request.tiling
