"""Training data: pictures with captions, and an endless order over them that can be entered anywhere.

A data set is opened once: its list of examples is made and checked, the pictures stay where they are. What is drawn
at a place of the stream is a function of (seed, place) alone, so nothing needs to be saved to go on in the middle.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import tarfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import count as numbers_from
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.ContainerIO import ContainerIO

from sdjax.hints import hint
from sdjax.image import fit, load_image
from sdjax.storage.files import new_file

T = TypeVar("T")
Groups = dict[str, dict[str, tarfile.TarInfo]]
"""Members of a shard: key -> suffix -> member."""

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
METADATA = ("metadata.jsonl", "metadata.csv")
CHUNK = 64
"""Rows that `cached` asks for at a time."""

UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, RuntimeError, Image.DecompressionBombError)
"""What Pillow raises on a damaged picture."""


@dataclass(frozen=True)
class Example:
    """One picture: `size` bytes at `offset` of `file`. Of several captions one is drawn each time."""

    name: str
    """Path within the data set, for messages."""
    captions: tuple[str, ...]
    file: Path
    size: int
    offset: int = 0
    weight: float = 1.0
    """How often it is drawn, relative to an example of weight 1."""


@dataclass(frozen=True)
class Dataset:
    """Examples in the order of their files; `skipped`: what was left out, name -> reason."""

    examples: tuple[Example, ...]
    skipped: dict[str, str]

    def __len__(self) -> int:
        return len(self.examples)

    @cached_property
    def weights(self) -> np.ndarray:
        """f64[examples]"""
        return np.array([example.weight for example in self.examples])

    def picture(self, i: int, size: int) -> np.ndarray:
        """Example i as u8[size, size, 3]: upright, transparency over white, scaled and cropped as `sdjax.image.fit`.

        Raises:
            ValueError: the picture cannot be decoded; its name is in the message.
        """
        example = self.examples[i]
        try:
            with _open(example) as image:
                return np.array(fit(load_image(image), (size, size)))
        except UNREADABLE as error:
            raise ValueError(f"{example.name}: {_reason(error)}") from None

    def pictures(self, index: Iterable[int], size: int) -> np.ndarray:
        """Several examples as u8[b, size, size, 3]. Raises as `picture`."""
        return np.stack([self.picture(int(i), size) for i in index])


@contextmanager
def _open(example: Example) -> Iterator[Image.Image]:
    """The picture, only its header decoded yet, read from its place in the file."""
    with example.file.open("rb") as file, Image.open(ContainerIO(file, example.offset, example.size)) as image:
        yield image


def _reason(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not a picture of a known kind"
    return str(error).removeprefix("this picture: ")


def open_dataset(path: str | Path, *, captions: bool = True, on_error: str = "refuse") -> Dataset:
    """Lists and checks a data set; nothing is unpacked or copied.

    path, one of:
      - a folder of .png .jpg .jpeg .webp, searched recursively, with a .txt of the same stem beside each;
      - a folder with metadata.jsonl, an object a line: file_name, text (a string, or a list of which one is drawn each
        time), weight (optional); or metadata.csv with these columns. Other pictures of the folder are not used;
      - a WebDataset .tar, or a folder of them: key.png (.jpg .jpeg .webp) with key.txt, or key.json that has "text" or
        "caption", where the key is the name up to the first dot.

    captions: False if pictures are all that is needed; no caption is read then. on_error: "refuse" broken examples or
    "skip" them. Of the pictures themselves the headers are checked, not every pixel.

    Raises:
        FileNotFoundError: no such path. ValueError: broken examples (with on_error="refuse"), no picture at all,
            or a folder, table or archive that cannot be read as one.
    """
    root = Path(path)
    if on_error not in ("refuse", "skip"):
        raise ValueError(f'on_error must be "refuse" or "skip", found {on_error!r}')
    skipped: dict[str, str] = {}
    listed = _list(root, captions, skipped)
    with ThreadPoolExecutor() as pool:
        flaws = list(pool.map(_flaw, listed))
    skipped |= {example.name: flaw for example, flaw in zip(listed, flaws, strict=True) if flaw}
    examples = tuple(example for example, flaw in zip(listed, flaws, strict=True) if not flaw)
    first = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3])
    if skipped and on_error == "refuse":
        rest = f"; and {len(skipped) - 3} more" if len(skipped) > 3 else ""
        raise ValueError(
            f"{root}: {len(skipped)} broken of {len(skipped) + len(examples)} examples: {first}{rest}. "
            f"Mend them, or leave them out with {hint('skip_bad')}"
        )
    if not examples:
        kinds = f"{', '.join(PICTURES)}, {' or '.join(METADATA)}, or .tar shards"
        raise ValueError(
            f"{root}: no picture to train on; " + (f"all are broken: {first}" if first else f"expected {kinds}")
        )
    return Dataset(examples, skipped)


def _flaw(example: Example) -> str | None:
    """What is wrong with the picture as far as its header tells, or None."""
    try:
        with _open(example) as image:
            image.verify()
    except UNREADABLE as error:
        return _reason(error)
    return None


def _list(root: Path, captions: bool, skipped: dict[str, str]) -> list[Example]:
    """Finds the layout of `root` and lists its examples; the broken ones go to `skipped`."""
    if root.is_file():
        return list(_shard(root, "", captions, skipped))
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder or .tar of training pictures")
    tables = [root / name for name in METADATA if (root / name).is_file()]
    shards = sorted(root.glob("*.tar"))
    if len(tables) + bool(shards) > 1:
        found = ", ".join(file.name for file in [*tables, *shards[:1]])
        raise ValueError(f"{root}: more than one kind of data set ({found}); keep one of them in this folder")
    if tables:
        return list(_table(tables[0], captions, skipped))
    if shards:
        return [example for shard in shards for example in _shard(shard, f"{shard.name}/", captions, skipped)]
    return list(_loose(root, captions, skipped))


def _loose(folder: Path, captions: bool, skipped: dict[str, str]) -> Iterator[Example]:
    """Pictures with a .txt beside each."""
    for file in sorted(file for file in folder.rglob("*") if file.suffix.lower() in PICTURES and file.is_file()):
        name, beside = file.relative_to(folder).as_posix(), file.with_suffix(".txt")
        try:
            if captions and not beside.is_file():
                raise ValueError(f"no caption, {beside.name} is not there")
            texts = _captions(_utf8(beside.read_bytes())) if captions else ()
        except ValueError as error:
            skipped[name] = str(error)
        else:
            yield Example(name, texts, file, file.stat().st_size)


def _table(file: Path, captions: bool, skipped: dict[str, str]) -> Iterator[Example]:
    """Pictures that a metadata.jsonl or metadata.csv names."""
    seen: dict[str, str] = {}
    for line, source in _jsonl(file) if file.suffix == ".jsonl" else _csv(file, captions):
        where = name = f"{file.name} line {line}"
        try:
            row = _object(source) if isinstance(source, str) else source
            known = _inner_name(row)
            if known in seen:
                raise ValueError(f"{known} was already named in {seen[known]}")
            seen[known], name = where, known
            if captions and "text" not in row:
                raise ValueError("no caption, text is missing")
            texts = _captions(row["text"]) if captions else ()
            weight, picture = _weight(row.get("weight", 1)), file.parent / known
            if not picture.is_file():
                raise ValueError("no such picture file")
        except ValueError as error:
            skipped[name] = str(error) if name == where else f"{where}: {error}"
        else:
            yield Example(name, texts, picture, picture.stat().st_size, weight=weight)


def _jsonl(file: Path) -> Iterator[tuple[int, str]]:
    """(line number, line), blank ones left out."""
    lines = _utf8(file.read_bytes(), file).split("\n")
    return ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def _csv(file: Path, captions: bool) -> Iterator[tuple[int, dict]]:
    """(number of its last line, row without its blank fields)."""
    rows = csv.DictReader(io.StringIO(_utf8(file.read_bytes(), file), newline=""), strict=True)
    try:
        for column in ("file_name", "text") if captions else ("file_name",):
            if column not in (rows.fieldnames or ()):
                raise ValueError(f"{file}: no column {column}; the first line must name file_name and text")
        for row in rows:
            yield rows.line_num, {column: value for column, value in row.items() if value}
    except csv.Error as error:
        raise ValueError(f"{file}: in the row after line {rows.line_num}: {error}") from None


def _object(text: str) -> dict:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise ValueError("not JSON (nested too deep)") from None
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, found {text.strip()[:40]}")
    return row


def _inner_name(row: dict) -> str:
    """The row's file_name, tidied; it must stay within the folder."""
    if None in row:
        raise ValueError("more fields than columns; put a caption that has commas in double quotes")
    name = row.get("file_name")
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError("no file_name")
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"file_name {name} leads out of the folder; name pictures within it")
    return path.as_posix()


def _captions(text: object) -> tuple[str, ...]:
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"a caption must be a string or a list of strings, found {text!r:.40}")
    captions = tuple(text.strip() for text in texts)
    if not all(captions) or not captions:
        raise ValueError("empty caption")
    return captions


def _weight(value: object) -> float:
    try:
        weight = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        weight = math.nan
    if not 0 < weight < math.inf:
        raise ValueError(f"weight must be a positive finite number, found {value!r:.40}")
    return weight


def _utf8(data: bytes, file: Path | None = None) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file or 'the caption'}: not UTF-8 text (byte {error.start})") from None


def _shard(file: Path, prefix: str, captions: bool, skipped: dict[str, str]) -> Iterator[Example]:
    """Examples of a WebDataset shard, in the order of their first members. Names start with `prefix`."""
    groups: Groups = {}
    try:
        with tarfile.open(file, "r:") as tar:
            _index(tar, file, prefix, groups, skipped)
    except (tarfile.ReadError, OverflowError, MemoryError) as error:  # the last two: absurd sizes in a header
        if not groups:
            raise ValueError(f"{file}: not a folder, and not a .tar that can be read ({error})") from None
        skipped[file.name] = f"cut short or damaged ({error})"
    for key, members in groups.items():
        pictures = [suffix for suffix in PICTURES if suffix in members]
        name = prefix + (members[pictures[0]].name if pictures else key)
        try:
            if len(pictures) != 1:
                raise ValueError(f"{len(pictures) or 'no'} pictures under this key, expected one")
            texts = _shard_captions(file, members) if captions else ()
        except ValueError as error:
            skipped[name] = str(error)
        else:
            member = members[pictures[0]]
            yield Example(name, texts, file, member.size, member.offset_data)


def _index(tar: tarfile.TarFile, file: Path, prefix: str, groups: Groups, skipped: dict[str, str]) -> None:
    """Reads the headers of a shard into `groups`."""
    end = file.stat().st_size
    for member in tar:
        if not 0 <= member.size <= end - member.offset_data:
            raise tarfile.ReadError(f"{member.name} is longer than the archive")
        folder, _, base = member.name.rpartition("/")
        stem, _, suffix = base.partition(".")
        suffix = f".{suffix.lower()}"
        if not member.isreg() or suffix not in (*PICTURES, ".txt", ".json"):
            continue
        group = groups.setdefault(f"{folder}/{stem}" if folder else stem, {})
        if suffix in group:
            skipped[f"{prefix}{member.name} at byte {member.offset}"] = "the name is there twice; the first was kept"
        group.setdefault(suffix, member)
    with file.open("rb") as raw:  # tarfile takes a damaged header for the end of the archive
        raw.seek(tar.offset)
        if raw.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
            raise tarfile.ReadError(f"no header and no end mark at byte {tar.offset}")


def _shard_captions(file: Path, members: dict[str, tarfile.TarInfo]) -> tuple[str, ...]:
    member = members.get(".txt") or members.get(".json")
    if member is None:
        raise ValueError("no caption, neither .txt nor .json under this key")
    with file.open("rb") as raw:
        raw.seek(member.offset_data)
        text = _utf8(raw.read(member.size))
    if ".txt" in members:
        return _captions(text)
    row = _object(text)
    found = [row[field] for field in ("text", "caption") if field in row]
    if not found:
        raise ValueError(f'no caption, {member.name} has neither "text" nor "caption"')
    return _captions(found[0])


def order(weights: Sequence[float] | np.ndarray, seed: int, first: int, count: int) -> np.ndarray:
    """Entries first .. first + count - 1 of the endless shuffled stream of examples, as i64[count].

    An epoch has floor(sum of weights) entries, at least 1; in it, an example comes floor or ceil of
    weight x entries / sum of weights times: with weights of 1, once each. Epoch e depends on (seed, e) alone.

    Raises:
        ValueError: no weights, or one that is not positive and finite; a negative seed.
    """
    key = np.asarray(weights, np.float64).tobytes()
    length = _epoch_length(key)
    epochs = range(first // length, (first + count - 1) // length + 1) if count else range(0)
    stream = np.concatenate([np.zeros(0, np.int64), *(_epoch(key, length, seed, epoch) for epoch in epochs)])
    return stream[first % length :][:count]


@lru_cache(maxsize=4)
def _epoch_length(weights: bytes) -> int:
    values = np.frombuffer(weights, np.float64)
    if not values.size or not (np.isfinite(values).all() and (values > 0).all()):
        raise ValueError("weights must be positive finite numbers, at least one")
    return max(1, math.floor(math.fsum(values)))


@lru_cache(maxsize=4)
def _epoch(weights: bytes, length: int, seed: int, epoch: int) -> np.ndarray:
    """One epoch: systematic sampling (`length` marks one apart on the shuffled weights laid end to end), shuffled."""
    rng = np.random.default_rng([seed, epoch])
    values = np.frombuffer(weights, np.float64)
    shuffled = rng.permutation(len(values))
    ends = np.cumsum(values[shuffled])
    marks = np.arange(length) + rng.random()
    drawn = np.searchsorted(ends * (length / ends[-1]), marks, side="right")
    return rng.permutation(shuffled[np.minimum(drawn, len(values) - 1)])


def caption(example: Example, seed: int, position: int) -> str:
    """The caption drawn for place `position` of the stream.

    Raises:
        ValueError: the example has no captions.
    """
    if not example.captions:
        raise ValueError(f"{example.name}: no caption to draw from; open the data set with captions")
    if len(example.captions) == 1:
        return example.captions[0]
    return example.captions[np.random.default_rng([seed, position, 1]).integers(len(example.captions))]


def prefetch(make: Callable[[int], T], first: int, *, depth: int = 2) -> Iterator[T]:
    """Yields make(first), make(first + 1), ... without end; one thread works `depth` results ahead of the consumer.

    An exception of `make` is raised in the place of its result. Closing the generator ends the thread.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    ahead: deque[Future[T]] = deque()
    try:
        for number in numbers_from(first):
            ahead.append(pool.submit(make, number))
            if len(ahead) > depth:
                yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def cached(path: str | Path, key: str, make: Callable[[int, int], np.ndarray], count: int) -> np.ndarray:
    """Rows that are computed once and kept on disk: [count, ...], memory-mapped, read only.

    path: a .npy, with a .json beside it that holds `key`. With another key, or without the files, rows are computed
    by make(first, last) -> [last - first, ...], at most `CHUNK` at a time, and replace the old ones when all are there.

    Raises:
        ValueError: count < 1, or `make` gave rows of another number, shape or dtype than asked for or than before.
        TypeError: rows of a dtype that .npy does not know (bfloat16). FileNotFoundError: no folder to write into.
    """
    path = Path(path)
    note = path.with_suffix(".json")
    if count < 1:
        raise ValueError(f"{path}: count must be at least 1, found {count}")
    if (kept := _kept(path, note, key, count)) is not None:
        return kept
    with new_file(path, force=True) as temporary:
        _fill(temporary, make, count)
        note.unlink(missing_ok=True)  # until the new one is there, the rows on disk have no key
    with new_file(note, force=True) as temporary:
        temporary.write_text(json.dumps({"key": key}))
    return np.load(path, mmap_mode="r")


def _kept(path: Path, note: Path, key: str, count: int) -> np.ndarray | None:
    """The rows on disk if they are whole and of this key."""
    try:
        if json.loads(note.read_text()) != {"key": key}:
            return None
        rows = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return rows if len(rows) == count else None


def _fill(file: Path, make: Callable[[int, int], np.ndarray], count: int) -> None:
    """Writes rows 0 .. count - 1 as .npy."""
    out: np.ndarray | None = None
    for first in range(0, count, CHUNK):
        last = min(first + CHUNK, count)
        rows = np.asarray(make(first, last))
        if out is None:
            if rows.dtype.kind == "V":
                raise TypeError(f".npy cannot hold {rows.dtype}; cast the rows to float32 or float16")
            out = np.lib.format.open_memmap(file, "w+", rows.dtype, (count, *rows.shape[1:]))
        if rows.shape != (last - first, *out.shape[1:]) or rows.dtype != out.dtype:
            raise ValueError(
                f"rows {first} to {last} must be {out.dtype}{[last - first, *out.shape[1:]]}, "
                f"found {rows.dtype}{list(rows.shape)}"
            )
        out[first:last] = rows


def fingerprint(dataset: Dataset) -> str:
    """sha256 over names, captions, weights, and sizes, places and times of change of the files."""
    stat = lru_cache(maxsize=None)(Path.stat)
    digest = hashlib.sha256()
    for example in dataset.examples:
        found = stat(example.file)
        row = (example.name, example.captions, example.weight, example.offset, example.size)
        digest.update(json.dumps([*row, found.st_size, found.st_mtime_ns]).encode())
    return digest.hexdigest()
