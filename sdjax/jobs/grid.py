"""A grid: one prompt over two or three settings, each value of one with each of the others.

An axis is written NAME=V1,V2,... NAME is a setting by any of its names, `size`, `lora:NAME` for the weight of an
adapter, or `prompt:TEXT` for words that the values replace. The pictures of a grid are the lines of a job.
"""

from __future__ import annotations

import csv
import dataclasses
import difflib
import io
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from sdjax.config import ModelConfig
from sdjax.jobs.forms import Known, value_of
from sdjax.jobs.job_file import Line, Rejected, read_lines, seed_of
from sdjax.jobs.sheet import Texts, draw, layout_of
from sdjax.pipeline.pipeline import Pipeline
from sdjax.pipeline.recipe import labelled, recipe_class, recipe_of
from sdjax.request import (
    BATCH,
    Request,
    check_request,
    check_values,
    ours,
    parse_sides,
    parse_size,
    second_pass,
    size_of,
    with_defaults,
)
from sdjax.text.syntax import lora_of

PICTURES = 10_000
"""Most pictures of a grid."""

AXES = ("x", "y", "z")
"""Columns, rows, and blocks of them one below the other."""

NOT_ON_AXES = {
    "id": "ids are given by the grid",
    "count": "put the seeds on an axis, as seed=1-4",
    "model": "each model is loaded and compiled for itself; run the grid once for each, into folders of their own",
}
"""What cannot be on an axis, and what to do."""


class Axis(NamedTuple):
    """One axis of a grid.

    name: of what changes along it: a setting, "size", "lora:NAME" or "prompt:TEXT".
    labels: its values for people.
    changes: of each value, the fields of a job line that it sets; for a lora its weight, for words those instead.
    """

    name: str
    labels: tuple[str, ...]
    changes: tuple[Any, ...]


class Cell(NamedTuple):
    """One picture of a grid. place: its value's number on every axis; labels: "sampler=heun" of each."""

    place: tuple[int, ...]
    labels: tuple[str, ...]
    fields: dict[str, Any]


# What the command line says


class Written(NamedTuple):
    """An axis as it was written, its ranges not yet made. total: number of its values."""

    name: str
    total: int
    parts: list[tuple[int, Callable[[], list[Any]]]]
    kind: type[Request]

    def axis(self) -> Axis:
        """The axis itself. Raises ValueError as `axis`."""
        return axis(self.name, [value for _, make in self.parts for value in make()], self.kind)


def written(text: str, kind: type[Request] = Request) -> Written:
    """An axis from "NAME=V1,V2,...": values with commas in quotes, ranges 1-5, 1-10(+3) and 0-1[5] for numbers.

    Raises:
        ValueError: the name is not known, or a value is no value of it.
    """
    name, equals, rest = text.partition("=")
    if not equals or not name.strip():
        raise ValueError(f"expected NAME=VALUE,VALUE,... for an axis, found {text!r:.100}")
    name = name_of(name, kind)
    try:
        rows = list(csv.reader(io.StringIO(rest, newline=""), skipinitialspace=True, strict=True))
    except csv.Error as error:
        raise ValueError(f"{name}: the values cannot be read ({error})") from None
    cells = [cell.strip() for row in rows for cell in row]
    if not cells:
        raise ValueError(f"{name}: there are no values; write {name}=VALUE,VALUE,...")
    parts = [_values(name, cell, kind) for cell in cells]
    return Written(name, sum(count for count, _ in parts), parts, kind)


def name_of(text: str, kind: type[Request] = Request) -> str:
    """What may be on an axis by the name used here, from any of its names.

    Raises:
        ValueError: it is not known, or cannot be on an axis.
    """
    first, colon, rest = text.strip().partition(":")
    if colon and first.lower() in ("lora", "prompt") and rest.strip():
        return f"{first.lower()}:{rest.strip()}"
    known, plain = Known.of(kind), re.sub(r"[\s-]+", "_", text.strip().lower())  # type: ignore[arg-type]
    name = known.aliases.get(plain, plain)
    name = "model" if name in ("checkpoint", "checkpoint_name", "ckpt") else name
    if name in NOT_ON_AXES:
        raise ValueError(f"{text.strip()} cannot be on an axis of a grid: {NOT_ON_AXES[name]}")
    if name not in known.kinds:
        names = [each for each in (*known.kinds, *known.aliases) if each not in NOT_ON_AXES]
        near = known.ours(text) or next(iter(difflib.get_close_matches(plain, names, 1)), None)
        advice = f"did you mean {near}?" if near else f"there are {', '.join(names)}"
        raise ValueError(f"{text.strip()!r:.60} is no setting; {advice} (also lora:NAME and prompt:TEXT)")
    return name


def _values(name: str, cell: str, kind: type[Request]) -> tuple[int, Callable[[], list[Any]]]:
    """How many values one piece between commas stands for, and what makes them."""
    known = Known.of(kind)  # type: ignore[arg-type]
    whole, number = known.kinds.get(name) == "int", name.startswith("lora:") or known.is_number(name)
    if name.startswith("lora:"):
        try:
            weight = float(cell)
            return 1, lambda: [weight]
        except ValueError:
            pass
    elif name.startswith("prompt:") or not number:
        value = cell if name.startswith("prompt:") else value_of(name, cell, known)
        return 1, lambda: [value]
    else:
        try:
            value = value_of(name, cell, known)
            return 1, lambda: [value]
        except ValueError:
            pass
    found = range_of(cell, whole)
    if found is None:
        what = "a whole number" if whole else "a number"
        raise ValueError(f"{name} must be {what}, or a range as 1-5, 1-10(+3) or 0-1[5], found {cell!r:.60}")
    return found


NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"
RANGE = re.compile(rf"({NUMBER})\s*-\s*({NUMBER})\s*(?:\(\s*({NUMBER})\s*\)|\[\s*(\d{{1,12}})\s*\])?")


def range_of(text: str, whole: bool) -> tuple[int, Callable[[], list[Any]]] | None:
    """A range as A1111's XYZ plot writes it: how many numbers it has, and what makes them; None if it is none.

    1-5: every whole step; 1-10(+3): steps of 3; 0-1[5]: 5 numbers from end to end. Both ends belong to it.
    whole: whether its numbers are whole.
    """
    match = RANGE.fullmatch(text)
    if match is None or (whole and any(end and not re.fullmatch(r"[+-]?\d+", end) for end in match.groups()[:3])):
        return None
    low, high = float(match[1]), float(match[2])
    if not all(map(math.isfinite, (low, high))):
        return None
    if match[4] is not None:
        count = int(match[4])
        step = (high - low) / max(1, count - 1)
    else:
        step = float(match[3]) if match[3] else (1.0 if high >= low else -1.0)
        count = 0 if step == 0 else 1 + math.floor((high - low) / step + 1e-6)
    if count < 1:
        raise ValueError(f"the range {text} has no numbers in it; a step goes from its first end to the other")

    def make() -> list[Any]:
        numbers = [low + step * i for i in range(count)]
        return [int(x + math.copysign(1e-6, x)) for x in numbers] if whole else [float(f"{x:.10g}") for x in numbers]

    return count, make


# Axes


def axis(name: str, values: Sequence[Any], kind: type[Request] = Request) -> Axis:
    """An axis from values as Python has them, each checked for itself.

    Raises:
        ValueError: a value is not usable, or there twice.
    """
    name = name_of(name, kind)
    if isinstance(values, str) or not len(values):
        raise ValueError(f"{name}: expected a list of at least one value, found {values!r:.60}")
    changes = tuple(_change(name, value, kind) for value in values)
    labels = _labels(values)
    for i, change in enumerate(changes):
        if change in changes[:i]:
            first = labels[changes.index(change)]
            as_which = "" if first == labels[i] else f", also as {first!r}"
            raise ValueError(f"{name}: {labels[i]!r:.60} is there twice{as_which}; leave one out")
    return Axis(name, labels, changes)


def _labels(values: Sequence[Any]) -> tuple[str, ...]:
    """Values for people; long fractions are rounded if they can be told apart then."""
    rounded = tuple(_label(value, 4) for value in values)
    return rounded if len(set(rounded)) == len(values) else tuple(_label(value, 10) for value in values)


def _label(value: Any, digits: int) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        exact = f"{value:.10g}"
        return exact if len(exact) <= 7 else f"{value:.{digits}g}"
    if isinstance(value, tuple | list):
        return ", ".join(_label(each, digits) for each in value) or "none"
    return str(value) or "none"


def _change(name: str, value: Any, kind: type[Request]) -> Any:
    """What a value does to a job line: its fields; a weight; or words."""
    if name.startswith("lora:"):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{name}: a weight is a number, found {value!r:.60}")
        return float(value)
    if name.startswith("prompt:"):
        if not isinstance(value, str):
            raise ValueError(f"{name}: expected words, found {value!r:.60}")
        return value
    if name == "size":
        return dict(zip(("width", "height"), parse_size(value), strict=True))
    if name == "seed" and value == -1:
        raise ValueError("seed: -1 stands for a random one, which has no place on an axis; give numbers, as seed=1-4")
    fields = ours({name: value}, kind)
    check_values(fields, kind)
    return {field: list(each) if isinstance(each, tuple) else each for field, each in fields.items()}


# Cells


def cells(fields: dict[str, Any], axes: Sequence[Axis]) -> Iterator[Cell]:
    """Every picture of a grid: blocks, in them rows, in them columns.

    fields: of a job line, what all pictures share. axes: columns, rows, blocks.

    Raises:
        ValueError: two axes say the same, or words to be replaced are not in the prompt.
    """
    _refuse_overlap(axes)
    digits = [len(str(len(each.labels))) for each in axes]
    fields = dict(fields)
    if fields.get("seed") == -1:
        fields["seed"] = seed_of(0, fields, 1)  # one for all of them
    for numbers in itertools.product(*(range(len(each.labels)) for each in reversed(axes))):
        place = numbers[::-1]
        labels = tuple(f"{each.name}={each.labels[i]}" for each, i in zip(axes, place, strict=True))
        name = "-".join(f"{x}{i + 1:0{n}d}" for x, i, n in zip(AXES, place, digits, strict=False))
        changes = [(each.name, each.changes[i]) for each, i in zip(axes, place, strict=True)]
        yield Cell(place, labels, {**_changed(fields, changes), "id": name})


def _refuse_overlap(axes: Sequence[Axis]) -> None:
    if not 1 <= len(axes) <= len(AXES):
        raise ValueError(f"a grid has one to {len(AXES)} axes, found {len(axes)}")
    for one, other in itertools.combinations(axes, 2):
        said = [
            {each.name} if ":" in each.name else {name for change in each.changes for name in change}
            for each in (one, other)
        ]
        if both := said[0] & said[1]:
            raise ValueError(f"two axes of the grid say {sorted(both)[0]}: {one.name} and {other.name}")


def _changed(fields: dict[str, Any], changes: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The fields of a job line with some changes: settings first, then weights of adapters, then words."""
    made = dict(fields)
    for name, change in changes:
        if ":" not in name:
            made |= change
    for name, change in changes:
        if name.startswith("lora:"):
            made |= _with_weight(made, name.removeprefix("lora:"), change)
    words = {name.removeprefix("prompt:"): change for name, change in changes if name.startswith("prompt:")}
    return made | _with_words(made, words)


def _with_weight(fields: dict[str, Any], name: str, weight: float) -> dict[str, Any]:
    """An adapter's weight set where the prompt or `loras` has it; else the adapter is added to `loras`."""
    prompt, found = re.subn(
        rf"<(lora|lyco):{re.escape(name)}(?::[^>]*)?>",
        lambda tag: f"<{tag[1]}:{name}:{weight:.10g}>",
        fields["prompt"],
    )
    if found and fields.get("weighting") != "none":
        return {"prompt": prompt}
    loras = list(fields.get("loras") or ())
    is_it = [name in (lora_of(text).name, Path(lora_of(text).name).stem) for text in loras]
    named = [f"{lora_of(text).name if same else name}:{weight:.10g}" for text, same in zip(loras, is_it, strict=True)]
    if any(is_it):
        return {"loras": [new if same else old for old, new, same in zip(loras, named, is_it, strict=True)]}
    return {"loras": [*loras, f"{name}:{weight:.10g}"]}


def _with_words(fields: dict[str, Any], words: dict[str, str]) -> dict[str, str]:
    """The prompts with words replaced, all at once, so that what one brings in the other does not replace."""
    texts = {name: fields.get(name) or "" for name in ("prompt", "negative_prompt")}
    for text in words:
        if not any(text in prompt for prompt in texts.values()):
            raise ValueError(f"prompt:{text:.60}: these words are in neither the prompt nor the negative prompt")
    if not words:
        return {}
    pattern = "|".join(re.escape(text) for text in sorted(words, key=len, reverse=True))
    replaced = {name: re.sub(pattern, lambda found: words[found[0]], prompt) for name, prompt in texts.items()}
    return {name: prompt for name, prompt in replaced.items() if prompt or name in fields}


def lines_of(
    fields: dict[str, Any],
    axes: Sequence[Axis],
    check: Callable[[Request], object] | None = None,
    kind: type[Request] = Request,
) -> tuple[str, list[Line]]:
    """The job of a grid as JSON lines, and its lines read and checked.

    Raises:
        ValueError: one of its pictures cannot be made; the message says which, and why. As `cells`, too.
    """
    all_cells = list(cells(fields, axes))
    text = "".join(json.dumps(cell.fields) + "\n" for cell in all_cells)
    lines: list[Line] = []
    for cell, line in zip(
        all_cells, read_lines(io.StringIO(text), ".jsonl", {}, check, request_class=kind), strict=True
    ):
        if isinstance(line, Rejected):
            raise ValueError(f"the picture of {', '.join(cell.labels)}: {line.reason}")
        lines.append(line)
    return text, lines


# Sizes


def refuse_too_many(counts: Sequence[int], size: tuple[int, int]) -> None:
    """Raises ValueError if a grid would have too many pictures; it says how many, and their bytes.

    size: (width, height) of a picture.
    """
    total = math.prod(counts)
    if total > PICTURES:
        what = f"{total:,} pictures of {size[0]}x{size[1]} ({' x '.join(f'{n:,}' for n in counts)})"
        weight = in_bytes(3 * size[0] * size[1] * total)
        raise ValueError(f"the grid has {what}, up to {weight}; expected {PICTURES:,} at most, give fewer values")


def in_bytes(count: int) -> str:
    """A number of bytes for people: "3.2 MB"."""
    size, units = float(count), ["bytes", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{count} bytes" if units[0] == "bytes" else f"{size:.1f} {units[0]}"


def picture_size(request: Request, config: ModelConfig) -> tuple[int, int]:
    """(width, height) of a request's picture. Raises ValueError or OSError as `size_of` and Pillow."""
    second = second_pass(with_defaults(request, config.sampling), config)
    if second is not None:
        return size_of(second.request, config, None)
    if request.image is None or (request.only_masked is None and (request.width, request.height) != (None, None)):
        return size_of(request, config, None if request.image is None else (8, 8))
    sides = parse_sides(request.outpaint)
    with Image.open(str(request.image)) as image:
        return image.width + sides.left + sides.right, image.height + sides.top + sides.bottom


def shared_size(fields: dict[str, Any], config: ModelConfig) -> tuple[int, int]:
    """(width, height) of pictures as far as what they share says it."""
    if "size" in fields:
        return parse_size(fields["size"])
    if "init_image" in fields and Path(fields["init_image"]).is_file():
        return picture_size(Request("", image=fields["init_image"]), config)
    width, height = (fields.get(side) or config.image_size for side in ("width", "height"))
    return width, height


def shared_texts(recipes: Sequence[dict[str, Any]], axes: Sequence[Axis], kind: type[Request] = Request) -> Texts:
    """What all pictures have in common, for the foot of the sheet and its metadata.

    Of prompts in which words are replaced it is the first.

    recipes: of the pictures, as JSON.
    """
    said = [labelled(recipe, recipe_class(kind)) for recipe in recipes]  # type: ignore[arg-type]
    alike = {label: value for label, value in (said or [{}])[0].items() if all(one.get(label) == value for one in said)}
    whole = {each.name for each in axes}
    prompt, negative = (
        "" if not recipes or name in whole else recipes[0][name] for name in ("prompt", "negative_prompt")
    )
    named = [(each.name, each.labels) for each in axes]
    return Texts(named, prompt, negative, ", ".join(f"{label}: {value}" for label, value in alike.items()))


# From Python


def grid(
    pipe: Pipeline,
    prompt: str,
    *,
    x: tuple[str, Sequence[Any]],
    y: tuple[str, Sequence[Any]] | None = None,
    z: tuple[str, Sequence[Any]] | None = None,
    batch_size: int = BATCH,
    **shared: Any,
) -> Image.Image:
    """The sheet of a grid: `grid(pipe, "a cat", x=("sampler", ["euler", "heun"]), y=("guidance", [2, 4]))`.

    x, y, z: what changes along the columns, rows and blocks, and its values.
    batch_size: pictures at once on each device.
    shared: what all pictures share, as the fields of a job line.

    Raises:
        ValueError, TypeError, OSError: a picture cannot be made, or the sheet would be too large.
    """
    axes = [axis(name, values) for name, values in (each for each in (x, y, z) if each is not None)]
    refuse_too_many([len(each.labels) for each in axes], shared_size(shared, pipe.config))
    _, lines = lines_of(
        {"prompt": prompt, **shared}, axes, lambda request: check_request(request, pipe.config, pipe.name)
    )
    layout_of(axes, [picture_size(line.request, pipe.config) for line in lines])  # or it is refused
    making = pipe.batch((line.request for line in lines), batch_size=batch_size)
    made = {request.id: picture for request, picture in making}
    said: dict[str, Any] = dict(model=pipe.name, dtype="float32", image_size=pipe.config.image_size)
    recipes = [recipe_of(line.request, pipe.config.sampling, made[line.id], **said) for line in lines]
    texts = shared_texts([dataclasses.asdict(recipe) for recipe in recipes], axes)
    pictures = [made[line.id] for line in lines]
    return draw(layout_of(axes, [picture.size for picture in pictures]), texts, pictures)
