"""Job files: what a line may say, and the lines of a job by number.

A job comes as .jsonl, .csv or .txt (`read_lines`), and is kept as .jsonl (`to_json`, `Job`).
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import Image

from sdjax.config import SamplingConfig
from sdjax.hosts import Share
from sdjax.request import Request, check_settings, filled_in, parse_size, row_bound

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

    def name(self, j: int) -> str:
        """The id of its picture number j, from 0."""
        return self.id if self.count == 1 else f"{self.id}-{self.request.seed + j}"


class Rejected(NamedTuple):
    """A line that is no request. text: as it was given; reason: what is wrong with it."""

    number: int
    text: str
    reason: str


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
            digests = [
                hashlib.blake2b(name.encode(), digest_size=12).digest() for name in map(line.name, range(line.count))
            ]
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
    if not isinstance(fields["prompt"], str):
        raise ValueError(f"prompt must be a string, found {fields['prompt']!r}")
    name = fields.pop("id", f"{number:07d}")
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]{0,99}", name, re.ASCII):
        raise ValueError(f"id must be up to 100 letters, digits, '.', '_' and '-', found {name!r}")
    if "size" in fields:
        width, height = parse_size(fields.pop("size"))
        fields |= dict(width=width, height=height)
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


def to_json(line: Line) -> str:
    """The line as a job is kept: what is not the default, and the number it had."""
    given = {
        field.name: getattr(line.request, field.name)
        for field in dataclasses.fields(Request)
        if getattr(line.request, field.name) != field.default
    }
    return json.dumps({"line": line.number, "id": line.id, "count": line.count, **given}, ensure_ascii=False)


def from_json(text: str) -> Line:
    """What `to_json` wrote."""
    fields = json.loads(text)
    if "guidance_interval" in fields:
        fields["guidance_interval"] = tuple(fields["guidance_interval"])
    return Line(fields.pop("line"), fields["id"], fields.pop("count"), Request(**fields))


class Job(AbstractContextManager["Job"]):
    """The lines of a job by number, none of them in memory.

    sampling: the model's own settings. first: each line's first picture, i64[lines + 1]. order: the lines, those of one
    shape together; shapes: pictures of each shape.
    """

    def __init__(self, path: Path, sampling: SamplingConfig) -> None:
        self.file = open(path, "rb")  # noqa: SIM115
        offsets: list[int] = []
        counts: list[int] = []
        shapes: list[int] = []
        shape_ids: dict[tuple[Any, ...], int] = {}
        offset = 0
        for text in self.file:
            line = from_json(text.decode())
            shape = _shape(filled_in(line.request, sampling))
            offsets.append(offset)
            counts.append(line.count)
            shapes.append(shape_ids.setdefault(shape, len(shape_ids)))
            offset += len(text)
        self.offsets, self.counts = np.array(offsets, np.int64), np.array(counts, np.int64)
        self.first = np.concatenate([[0], np.cumsum(self.counts)])
        self.order = np.argsort(shapes, kind="stable")
        pictures = np.bincount(shapes, self.counts)
        self.shapes = {shape: int(pictures[number]) for shape, number in shape_ids.items()}

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def line(self, index: int) -> Line:
        self.file.seek(self.offsets[index])
        return from_json(self.file.readline().decode())

    @property
    def pictures(self) -> int:
        return int(self.first[-1])

    def share(self, share: Share) -> tuple[np.ndarray, np.ndarray]:
        """The share's pictures, every so many-th in `order`, and the line of each, i64[n] both."""
        lines = np.repeat(self.order, self.counts[self.order])
        starts = np.cumsum(self.counts[self.order]) - self.counts[self.order]
        pictures = self.first[lines] + np.arange(self.pictures) - np.repeat(starts, self.counts[self.order])
        mine = slice(share.process, None, share.processes)
        return pictures[mine], lines[mine]


def _shape(request: Request) -> tuple[Any, ...]:
    """What must be equal for requests to share a batch, as far as it shows without the model: size or "unreadable",
    clip_skip, and the most UNet calls.
    """
    size: Any = (request.width, request.height)
    if size == (None, None) and request.image is not None:
        try:
            with Image.open(str(request.image)) as image:
                size = image.size
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            size = "unreadable"  # named when it is its turn
    assert request.steps is not None
    return size, request.clip_skip, row_bound(2 * request.steps)
