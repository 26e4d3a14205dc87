"""Forms of job files: the fields of each line, whatever editor, spreadsheet or tool wrote it.

    .jsonl       an object in each line; a job's own jobs.jsonl and manifest.jsonl, too
    .csv, .tsv   a head line of field names; commas, semicolons or tabs between the values
    .txt         a prompt in each line, or a line of options as the prompt files of other tools have them

The text is UTF-8 or UTF-16, with a byte order mark or without. Lines end in LF, CR LF or CR. Where a line is wrong an
error stands in its place, and the lines after it are read.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
import shlex
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, Any, NamedTuple

from sdjax.pipeline.recipe import Recipe, file_hash
from sdjax.request import Request, aliases, settings
from sdjax.storage.files import each_once

MORE_KINDS = {"count": "int", "size": "text"}
"""What a line may say besides the settings of a request, and in what form."""

MORE_ALIASES = {"num_images_per_prompt": "count"}
MORE_SIMILAR = {
    "count": (
        *("n_iter", "batch_size", "batch_count", "n_samples", "num_images", "n", "samples"),
        *("num_outputs", "images", "number", "repeat"),
    ),
    "size": ("resolution", "dimensions", "aspect_ratio", "ar"),
}
"""The same of these: names of other tools that are accepted, and names that are refused with ours."""


@dataclass(frozen=True)
class Known:
    """What a line may say: the settings of a class of requests, and what concerns the job.

    kinds: of every field, by its name in lines. aliases: names of other tools -> ours, which are accepted. similar: the
    same of names that are refused.
    """

    kinds: dict[str, str]
    aliases: dict[str, str]
    similar: dict[str, str]

    @staticmethod
    @lru_cache
    def of(kind: Any) -> Known:
        kinds, similar = {"id": "text"}, dict[str, str]()
        for name, known in settings(kind).items():
            if known.in_lines is not None:
                here = known.in_lines or name
                kinds[here] = known.kind
                similar |= dict.fromkeys(known.similar, here)
        similar |= {name: here for here, names in MORE_SIMILAR.items() for name in names}
        return Known(kinds | MORE_KINDS, aliases(kind) | MORE_ALIASES, similar)

    @property
    def fields(self) -> str:
        """The names of all fields, for messages."""
        return ", ".join(self.kinds)

    def ours(self, name: str) -> str | None:
        """What a name is called here, however it is written; None if that is not known."""
        plain = re.sub(r"[\s-]+", "_", name.strip(' "').lower())
        return plain if plain in self.kinds else self.aliases.get(plain) or self.similar.get(plain)

    def called(self, name: str) -> str:
        """A name that is not known here, and what it is called here if that can be told."""
        here = self.ours(name)
        if here == "clip_skip":
            here = "clip_skip, counted from 0"
        return f"{name!r:.80}" + (f" (here it is called {here})" if here else "")

    def is_number(self, name: str) -> bool:
        return self.kinds.get(name) in ("int", "float")


KNOWN = Known.of(Request)
FIELDS = tuple(KNOWN.kinds)
"""What a line of a job may say, by name."""

LINE_MAX = 2**20
"""Bytes of the longest line that is read."""

DIGITS_MAX = 18
"""Digits of the longest whole number that is read."""

CHUNK = 2**16

OPTIONS = {"scale": "guidance", "n_iter": "count", "batch_size": "count"}
"""Options of other tools' prompt files that mean a field of ours there, in addition to names accepted anywhere."""

Fields = dict[str, Any]


class Entry(NamedTuple):
    """What a job file has from line `number` on. text: as it was given; fields: what it says, or what is wrong."""

    number: int
    text: str
    fields: Fields | ValueError


def entries(file: IO[bytes] | IO[str], kind: str, known: Known = KNOWN) -> Iterator[Entry]:
    """What each line of a job file says; empty ones are passed over.

    kind: ".jsonl", ".csv", ".tsv" or ".txt".
    known: what lines may say.

    Raises:
        ValueError: nothing of the file can be used: it is in an encoding that is not read, or the columns of a table
        are not named, or are named by other words than are known.
    """
    lines = ((number, line) for number, line in _lines(file) if line.strip() or kind in (".csv", ".tsv"))
    return _table(lines, kind, known) if kind in (".csv", ".tsv") else _line_by_line(lines, kind, known)


def _line_by_line(lines: Iterable[tuple[int, bytes]], kind: str, known: Known) -> Iterator[Entry]:
    said = {".txt": _prompt, ".jsonl": _object}[kind]
    for i, (number, line) in enumerate(lines):
        try:
            text = _text(line).strip()
            if i == 0 and kind == ".txt":
                _refuse_table(text, known)
            if text:
                yield Entry(number, _shown(line), said(text, known))
        except _WholeFileError:
            raise
        except ValueError as error:
            yield Entry(number, _shown(line), error)


# Bytes and lines


def _lines(file: IO[bytes] | IO[str]) -> Iterator[tuple[int, bytes]]:
    """Every line, its end included, in UTF-8 as far as it is text; of one above LINE_MAX, as much as shows that."""
    number, rest = 0, b""
    for data in _utf8(file):
        pieces = (rest + data).splitlines(keepends=True)
        rest = pieces.pop() if pieces and not pieces[-1].endswith(b"\n") else b""  # after CR, LF may follow
        for piece in pieces:
            number += 1
            yield number, piece
        if len(rest) > LINE_MAX + 1:
            rest = rest[: LINE_MAX + 1] + rest[-1:]
    if rest:
        yield number + 1, rest


def _utf8(file: IO[bytes] | IO[str]) -> Iterator[bytes]:
    """The bytes of a file without its byte order mark; of UTF-16 those of the same text in UTF-8."""

    def read() -> bytes:
        data = file.read(CHUNK)
        return data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data

    data = read()
    codec, mark = _encoding(data)
    data = data[mark:]
    decoder = None if codec == "utf-8" else codecs.getincrementaldecoder(codec)("surrogatepass")
    while data:
        yield data if decoder is None else decoder.decode(data).encode("utf-8", "surrogatepass")
        data = read()
    if decoder is not None and decoder.getstate()[0]:
        yield b"\xff"  # half a character, which is none in UTF-8 either


def _encoding(head: bytes) -> tuple[str, int]:
    """The encoding of a file that begins with `head`, and the length of its byte order mark."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        raise _WholeFileError("the file is in UTF-32, which is not read here; save it as UTF-8")
    for mark, codec in (
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
    ):
        if head.startswith(mark):
            return codec, len(mark)
    head = head[:1024]
    even, odd = head[::2].count(0), head[1::2].count(0)
    if 8 * min(even, odd) < max(even, odd) and 20 * max(even, odd) > len(head):  # zeros on one side: ASCII in UTF-16
        return ("utf-16-le" if odd > even else "utf-16-be"), 0
    return "utf-8", 0


def _text(line: bytes) -> str:
    """A line as text. Raises ValueError if it is none."""
    if len(line) > LINE_MAX:
        raise ValueError(f"longer than {LINE_MAX:,} bytes")
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        found = line[error.start : error.start + 1]
        raise ValueError(f"byte {error.start + 1} ({found!r}) is no UTF-8 text; save the file as UTF-8") from None
    if "\0" in text:
        raise ValueError("zeros between the letters; the file is damaged, or in another encoding than UTF-8 or UTF-16")
    return text.removeprefix("\ufeff")


def _shown(line: bytes) -> str:
    line = line if len(line) <= LINE_MAX else line[:1000]
    return line.rstrip(b"\r\n").decode("utf-8", "backslashreplace")


class _WholeFileError(ValueError):
    """What makes a file unusable as a whole."""


# JSON


def _object(text: str, known: Known) -> Fields:
    try:
        found = json.loads(text, object_pairs_hook=each_once, parse_int=_whole)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error}); each line must hold one whole object {{...}}") from None
    except RecursionError:
        raise ValueError("not a line of a job: brackets inside brackets, too deep to read") from None
    if isinstance(found, list):
        raise ValueError(
            f"expected an object {{...}}, found {text[:40]}; write each object of a list into its own line"
        )
    if not isinstance(found, dict):
        raise ValueError(f"expected an object {{...}}, found {text[:40]}")
    return _of_ours(found, known)


def _of_ours(found: Fields, known: Known) -> Fields:
    """The fields of a line that sdjax wrote itself, in a job's jobs.jsonl or manifest.jsonl; any other as it is."""
    if {"line", "id", "count", "prompt"} <= set(found):
        names = {"image": "init_image"}
        return {names.get(name, name): value for name, value in found.items() if name != "line"}
    if not {"picture", "id", "sha256", "settings"} <= set(found) or not isinstance(found["settings"], dict):
        return found
    recipe = Recipe.from_json(json.dumps(found["settings"]))
    fields = {name: getattr(recipe, name) for name in known.kinds if hasattr(recipe, name)}
    fields |= {"id": found["id"], "guidance_interval": list(recipe.guidance_interval)}
    for name, picture in (("init_image", recipe.image), ("mask", recipe.mask)):
        if picture is not None:
            fields[name], digest = picture
            if file_hash(fields[name]) != digest:
                raise ValueError(
                    f"{name}: {fields[name]}: not the picture that this was made from; its content changed"
                )
    if recipe.image is not None:
        fields["width"], fields["height"] = recipe.asked_size or (None, None)  # those of the picture
    return fields


def _whole(digits: str) -> int:
    if len(digits) > DIGITS_MAX:
        raise ValueError(f"a number of {len(digits)} digits is too large")
    return int(digits)


# Tables


def _table(lines: Iterator[tuple[int, bytes]], kind: str, known: Known) -> Iterator[Entry]:
    delimiter, lines = _delimiter(lines, kind, known)
    names: list[str] | None = None
    for number, text, cells in _rows(lines, delimiter):
        if names is None:
            names = _columns(cells, known)
            continue
        if isinstance(cells, ValueError):
            yield Entry(number, text, cells)
        elif any(cells):
            try:
                yield Entry(number, text, _from_row(names, cells, delimiter, known))
            except ValueError as error:
                yield Entry(number, text, error)
    if names is None:
        _columns([], known)


def _delimiter(lines: Iterator[tuple[int, bytes]], kind: str, known: Known) -> tuple[str, Iterator[tuple[int, bytes]]]:
    """What stands between the values, and the lines from the head line on."""
    usual = "\t,;" if kind == ".tsv" else ",;\t"
    for number, line in lines:
        text = line[:LINE_MAX].decode("utf-8", "replace").strip()
        if match := re.fullmatch(r'"?sep=(.)"?[,;\t]*', text.removeprefix("\ufeff"), re.IGNORECASE):  # of Excel
            return match[1], lines
        if text:
            words = {each: sum(known.ours(word) is not None for word in text.split(each)) for each in usual}
            return max(usual, key=lambda each: words[each]), _chained((number, line), lines)
    return usual[0], lines


def _chained(first: tuple[int, bytes], rest: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    yield first
    yield from rest


def _rows(lines: Iterator[tuple[int, bytes]], delimiter: str) -> Iterator[tuple[int, str, list[str] | ValueError]]:
    """Each row of a table: the number of its first line, its text and its values. A row that is none costs its first
    line alone: after a quote that is never closed, the next line is read as a row of its own.
    """
    waiting: deque[tuple[int, bytes]] = deque()
    while True:
        taken: list[tuple[int, bytes]] = []

        def feed(taken: list[tuple[int, bytes]] = taken) -> Iterator[str]:
            size = 0
            while (line := waiting.popleft() if waiting else next(lines, None)) is not None:
                taken.append(line)
                size += len(line[1])
                if size > LINE_MAX:
                    raise csv.Error("it is too long, or a quote is not closed")
                yield line[1].decode("utf-8", "surrogateescape").removeprefix("\ufeff")

        try:
            cells = next(csv.reader(feed(), delimiter=delimiter, strict=True), None)
            if cells is None:
                return
            for _, line in taken:
                _text(line)
        except csv.Error as error:
            waiting.extendleft(reversed(taken[1:]))
            taken = taken[:1]
            yield taken[0][0], _shown(taken[0][1]), ValueError(f"no line of a table ({error})")
        except ValueError as error:
            yield taken[0][0], _joined(taken), error
        else:
            yield taken[0][0], _joined(taken), cells


def _joined(lines: list[tuple[int, bytes]]) -> str:
    return _shown(b"".join(line for _, line in lines))


def _columns(cells: list[str] | ValueError, known: Known) -> list[str]:
    """The names of the columns. Raises ValueError if they are not."""
    if isinstance(cells, ValueError):
        raise _WholeFileError(f"the first line must name the columns: {cells}")
    names = [known.aliases.get(name.strip(), name.strip()) for name in cells]
    unknown = [name for name in names if name and name not in known.kinds]
    allowed = known.fields
    if unknown and (len(unknown) < len(names) or known.ours(unknown[0])):
        raise _WholeFileError(f"unknown column {known.called(unknown[0])}; the columns may be {allowed}")
    if "prompt" not in names:
        found = ", ".join(names)[:200] or "nothing"
        raise _WholeFileError(f"the first line must name the columns, prompt and others of {allowed}: {found}")
    if twice := [name for name in names if name and names.count(name) > 1]:
        raise _WholeFileError(f"two columns are called {twice[0]}; which one counts?")
    return names


def _from_row(names: list[str], cells: list[str], delimiter: str, known: Known) -> Fields:
    if any(cells[len(names) :]):
        raise ValueError("more values than there are columns; a text that holds a separator needs quotes")
    if [known.aliases.get(cell.strip(), cell.strip()) for cell in cells] == names:
        raise ValueError("the head line again")
    fields: Fields = {}
    for name, cell in zip(names, cells, strict=False):
        if cell and not name:
            raise ValueError(f"{cell!r:.80} stands in a column without a name")
        if cell:
            comma = delimiter == ";" and known.is_number(name)
            fields[name] = value_of(name, cell.replace(",", ".") if comma else cell, known)
    return fields


def value_of(name: str, text: str, known: Known) -> Any:
    """A field's value from text. Raises ValueError if it should be a number and is none."""
    try:
        if known.kinds.get(name) == "int":
            match = re.fullmatch(r"([+-]?[0-9]+)(?:\.0+)?", text.strip())  # 3.0: spreadsheets and pandas
            if match is None:
                raise ValueError
            return _whole(match[1])
        if known.is_number(name):
            return float(text)
        if known.kinds.get(name) == "flag":
            return _flag(text)
        return [float(end) for end in text.split()] if known.kinds.get(name) == "fractions" else text
    except ValueError as error:
        reason = f"{error}" if "digits" in str(error) else f"found {text!r:.80}"
        raise ValueError(f"{name} must be a number, {reason}") from None


FLAGS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def _flag(text: str) -> bool | str:
    """True or False; text that is neither stays as it is, for the check of the setting to name."""
    return FLAGS.get(text.strip().lower(), text)


# Prompts, and options as other tools write them


def _prompt(text: str, known: Known) -> Fields:
    if text.startswith("--"):
        return _options(text, known)
    if found := re.search(r"\s(--[A-Za-z][\w-]*)", text):
        raise ValueError(
            f"{found[1]} after a prompt is not understood; options stand first in their line, and a .jsonl file can "
            "hold any prompt"
        )
    if text.startswith("{") and text.endswith("}"):
        try:
            found_object = isinstance(json.loads(text), dict)
        except (ValueError, RecursionError):
            found_object = False  # {red|blue} heart
        if found_object:
            raise ValueError("a JSON object is no prompt; a file of them ends in .jsonl")
    return {"prompt": text}


def _refuse_table(text: str, known: Known) -> None:
    for delimiter in "\t,;":
        names = [name.strip(' "') for name in text.split(delimiter)]
        if (
            len(names) > 1
            and "prompt" in names
            and {known.aliases.get(name, name) for name in names} <= set(known.kinds)
        ):
            ending = ".tsv" if delimiter == "\t" else ".csv"
            raise _WholeFileError(f"the first line names columns ({', '.join(names)}); a table's name ends in {ending}")


def _options(text: str, known: Known) -> Fields:
    """A line such as --prompt "a cat" --steps 5, as AUTOMATIC1111's script "prompts from file" takes it."""
    try:
        words = deque(shlex.split(text))
    except ValueError as error:
        raise ValueError(f"options that cannot be read ({error})") from None
    fields: Fields = {}
    while words:
        option, equals, value = words.popleft().partition("=")
        values = [value] if equals else []
        while words and not words[0].startswith("--"):
            values.append(words.popleft())
        said = option.removeprefix("--").replace("-", "_")
        name = said if said in known.kinds else OPTIONS.get(said) or known.aliases.get(said)
        if name is None:
            raise ValueError(f"the option {option:.80} is not known here; those of a line are {known.fields}")
        if not values and known.kinds[name] == "flag":
            values = ["true"]
        if not values:
            raise ValueError(f"the option {option} lacks its value")
        found = value_of(name, " ".join(values), known)
        if said in ("n_iter", "batch_size") and isinstance(fields.get("count"), int):
            found *= fields.pop("count")  # so many times so many at once
        if name in fields:
            raise ValueError(f"{name} is there twice")
        fields[name] = found
    return fields
