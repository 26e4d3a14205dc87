"""Training data: pictures with captions, listed and checked once, and read in place.

Nothing is passed over in silence: what is broken or cannot be used is named (`Dataset.skipped`), and files of other
kinds are counted (`Dataset.passed_over`).
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import PIL

from sdjax.hints import hint
from sdjax.image import fit, load_image, open_bytes
from sdjax.pipeline.recipe import Recipe, has_recipe, read_recipe
from sdjax.storage.cache import remembered
from sdjax.storage.files import each_once

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
OTHER_PICTURES = (
    *(".jfif", ".jpe", ".jif", ".apng", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif", ".jxl"),
    *(".jp2", ".j2k", ".tga", ".ico", ".ppm", ".pgm", ".pbm", ".psd", ".svg", ".exr", ".hdr", ".dng", ".cr2", ".nef"),
    *(".arw", ".raw", ".qoi", ".dds"),
)
"""Kinds of pictures that are not read. They are named, since somebody meant them to be used."""

METADATA = ("metadata.jsonl", "metadata.csv")
SHARDS = (".tar", ".tgz", ".gz", ".zst", ".zip")
WEIGHT_MAX = 1_000_000
"""Most times that an example is drawn for one of weight 1."""

TEXT_MAX = 2**20
"""Bytes of the longest caption file."""

Groups = dict[str, dict[str, tarfile.TarInfo]]
"""Members of a shard: key -> suffix -> member."""


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
    """Examples in the order of their files. skipped: what was left out, name -> reason; passed_over: files of other
    kinds, kind -> how many.
    """

    examples: tuple[Example, ...]
    skipped: dict[str, str]
    passed_over: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.examples)

    @cached_property
    def weights(self) -> np.ndarray:
        """f64[examples]"""
        return np.array([example.weight for example in self.examples])

    @cached_property
    def listing(self) -> str:
        """sha256 over names, captions, weights and sizes: what a training's data set is known by, wherever it is."""
        rows = [[example.name, example.captions, example.weight, example.size] for example in self.examples]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def picture(self, i: int, size: int) -> np.ndarray:
        """Example i as u8[size, size, 3]: upright, transparency over white, scaled and cropped as `sdjax.image.fit`.

        Raises:
            ValueError: the picture cannot be decoded; its name is in the message.
        """
        example = self.examples[i]
        try:
            return np.array(fit(load_image(open_bytes(_content(example), "")), (size, size)))
        except (OSError, ValueError) as error:
            raise ValueError(f"{example.name}: {_reason(error)}") from None

    def pictures(self, index: Iterable[int], size: int) -> np.ndarray:
        """Several examples as u8[b, size, size, 3]. Raises as `picture`."""
        return np.stack([self.picture(int(i), size) for i in index])


def _content(example: Example) -> bytes:
    with example.file.open("rb") as file:
        file.seek(example.offset)
        return file.read(example.size)


def _reason(error: Exception) -> str:
    reason = str(error).removeprefix(": ")
    return "not a picture of a known kind" if "cannot identify image file" in reason else reason


def _is_hidden(name: str) -> bool:
    """Whether a file or a folder on the way to it has a name with a dot in front, as macOS and version control have."""
    return any(part.startswith(".") for part in Path(name).parts)


class _Found:
    """What listing a data set comes upon besides its examples. skipped, passed_over: as in `Dataset`."""

    def __init__(self) -> None:
        self.skipped: dict[str, str] = {}
        self.passed_over: dict[str, int] = {}
        self.unread: dict[str, list[str]] = {}

    def other(self, name: str) -> None:
        """A file that is no example and belongs to none."""
        suffix = Path(name).suffix.lower()
        if _is_hidden(name):
            self.count("hidden files")
        elif suffix in OTHER_PICTURES:
            self.unread.setdefault(suffix, []).append(name)
        else:
            self.count(f"{suffix} files" if suffix else "files without an ending")

    def count(self, kind: str) -> None:
        self.passed_over[kind] = self.passed_over.get(kind, 0) + 1

    def all_skipped(self) -> dict[str, str]:
        """Everything that was left out; pictures of one unread kind in one entry."""
        many = {
            f"*{suffix}": f"{len(names)} of a kind of picture that is not read, such as {names[0]}; "
            f"save as {', '.join(PICTURES)}"
            for suffix, names in self.unread.items()
        }
        return self.skipped | many


def open_dataset(
    path: str | Path,
    *,
    captions: bool = True,
    on_error: str = "refuse",
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Lists and checks a data set; nothing is unpacked or copied.

    path, one of:
      - a folder of .png .jpg .jpeg .webp, searched recursively, with a .txt of the same stem next to each; a picture by
        sdjax without one brings its own prompt;
      - a folder with metadata.jsonl, an object a line: file_name, text (a string, or a list of which one is drawn each
        time), weight (optional); or metadata.csv with these columns. Other pictures of the folder are not used;
      - a WebDataset .tar, or a folder of them: key.png (.jpg .jpeg .webp) with key.txt, or key.json that has "text",
        "caption" or "prompt", where the key is the name up to the first dot.

    Links are followed. Text is UTF-8, or UTF-16 with a byte order mark.

    captions: False if pictures are all that is needed; no caption is read then.
    on_error: "refuse" broken examples or "skip" them. Every picture is decoded once, to know of those that cannot be;
    of files that did not change since this is remembered (`sdjax.storage.cache`).
    progress: called with (pictures decoded, pictures in all).

    Raises:
        FileNotFoundError: no such path. ValueError: broken examples (with on_error="refuse"), no picture at all,
            or a folder or table that cannot be read as one.
    """
    root = Path(path)
    if on_error not in ("refuse", "skip"):
        raise ValueError(f'on_error must be "refuse" or "skip", found {on_error!r}')
    found = _Found()
    listed = _list(root, captions, found)
    flaws = _flaws(listed, progress)
    skipped = found.all_skipped()
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
    return Dataset(examples, skipped, found.passed_over)


def _flaws(examples: list[Example], progress: Callable[[int, int], None] | None) -> list[str | None]:
    """What is wrong with each picture, or None; remembered until one of their files changes."""
    errors: list[Exception | None] = []

    def decode_all() -> list[str | None]:
        with ThreadPoolExecutor() as pool:
            for error in pool.map(_error, examples):
                errors.append(error)
                if progress is not None:
                    progress(len(errors), len(examples))
        return [None if error is None else _reason(error) for error in errors]

    def lasting() -> bool:
        return not any(isinstance(error, OSError) for error in errors)

    places = json.dumps([[example.offset, example.size] for example in examples])
    files = dict.fromkeys(example.file for example in examples)
    return remembered("pictures", f"{PIL.__version__} {places}", files, decode_all, lasting)


def _error(example: Example) -> Exception | None:
    """What is raised when a picture is decoded, or None."""
    try:
        open_bytes(_content(example), "")
    except (OSError, ValueError) as error:
        return error
    return None


def _list(root: Path, captions: bool, found: _Found) -> list[Example]:
    """Finds the layout of `root` and lists its examples; the broken ones go to `found`."""
    if root.is_file():
        return list(_shard(root, "", captions, found))
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder or .tar of training pictures")
    tables = [root / name for name in METADATA if (root / name).is_file()]
    shards = sorted(file for file in root.glob("*.tar") if file.is_file())
    if len(tables) + bool(shards) > 1:
        names = ", ".join(file.name for file in [*tables, *shards[:1]])
        raise ValueError(f"{root}: more than one kind of data set ({names}); keep one of them in this folder")
    files = list(_walk(root, found))
    if tables:
        examples = list(_table(tables[0], captions, found))
        used = {os.path.realpath(example.file) for example in examples} | {os.path.realpath(tables[0])}
        unnamed = f"pictures that {tables[0].name} does not name"
    elif shards:
        examples = [example for shard in shards for example in _shard(shard, f"{shard.name}/", captions, found)]
        used, unnamed = {os.path.realpath(shard) for shard in shards}, "pictures beside the shards"
    else:
        return list(_loose(root, files, captions, found))
    for name in files:
        if os.path.realpath(root / name) in used or name in found.skipped or _skips_layout(name, found):
            continue
        if Path(name).suffix.lower() in (*PICTURES, *OTHER_PICTURES):
            found.count(unnamed)
        else:
            found.other(name)
    return examples


def _walk(root: Path, found: _Found) -> Iterator[str]:
    """Files below a folder, links followed, by their paths in it; dead links and what is no file are skipped."""
    starts, visited = [os.fspath(root)], set[str]()  # links to folders after all that is below the folder itself
    names: list[Path] = []

    def unreadable(error: OSError) -> None:
        found.skipped[os.path.relpath(error.filename, root)] = f"a folder that cannot be read ({error.strerror})"

    while starts:
        for place, folders, files in os.walk(starts.pop(0), onerror=unreadable):
            if (real := os.path.realpath(place)) in visited:
                folders.clear()
                found.count("links to folders that were read already")
                continue
            visited.add(real)
            folders.sort()
            starts += [path for name in folders if os.path.islink(path := os.path.join(place, name))]
            names += [Path(place, name).relative_to(root) for name in files]
    for inside in sorted(names):
        name = inside.as_posix()
        if (root / inside).is_file():
            yield name
        elif (root / inside).is_symlink():
            found.skipped[name] = f"a link to nothing ({os.readlink(root / inside)})"
        else:
            found.skipped[name] = "not a file that can be read, but a device or pipe"


def _skips_layout(name: str, found: _Found) -> bool:
    """Whether a file below is a table or shard of its own, which is skipped then."""
    path = Path(name)
    if path.name in METADATA:
        reason = "a table below another layout is not read; name its folder, or put its lines into one table"
        found.skipped[name] = reason
    elif path.suffix.lower() in SHARDS:
        found.skipped[name] = "shards are read from the folder itself, as uncompressed .tar; unpack it there"
    else:
        return False
    return True


def _loose(folder: Path, files: list[str], captions: bool, found: _Found) -> Iterator[Example]:
    """Pictures with a .txt next to each."""
    stems = {Path(name).with_suffix(""): name for name in files if Path(name).suffix.lower() == ".txt"}
    texts = {name for name in stems.values() if not _is_hidden(name)}
    unused = set(texts)
    for name in files:
        file, beside = folder / name, stems.get(Path(name).with_suffix(""))
        if file.suffix.lower() not in PICTURES or _is_hidden(name):
            if name not in texts and not _skips_layout(name, found):
                found.other(name)
            continue
        unused -= {beside}
        try:
            if not captions:
                own: tuple[str, ...] = ()
            elif beside is not None:
                own = _captions(_caption_file(folder / beside))
            elif has_recipe(file):
                own = _captions(read_recipe(file).prompt)
            else:
                raise ValueError(f"no caption, {file.with_suffix('.txt').name} is not there")
            size = file.stat().st_size
        except (ValueError, OSError) as error:
            found.skipped[name] = str(error)
        else:
            yield Example(name, own, file, size)
    pictures = {Path(name).with_suffix("") for names in found.unread.values() for name in names}
    for name in unused - set(found.skipped) if captions else ():
        if Path(name).with_suffix("") not in pictures:
            found.count("captions (.txt) without a picture")


def _caption_file(path: Path) -> str:
    with path.open("rb") as file:
        data = file.read(TEXT_MAX + 1)
    if len(data) > TEXT_MAX:
        raise ValueError(f"{path.name}: longer than {TEXT_MAX} bytes, so no caption")
    return _whole_text(_decoded(data), path.name)


def _table(file: Path, captions: bool, found: _Found) -> Iterator[Example]:
    """Pictures that a metadata.jsonl or metadata.csv names."""
    seen: dict[str, str] = {}
    for line, source in _jsonl(file) if file.suffix == ".jsonl" else _csv(file, captions):
        where = name = f"{file.name} line {line}"
        try:
            if isinstance(source, ValueError):
                raise source
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
            size = picture.stat().st_size
        except (ValueError, OSError) as error:
            found.skipped[name] = str(error) if name == where else f"{where}: {error}"
        else:
            yield Example(name, texts, picture, size, weight=weight)


def _decoded(data: bytes) -> str:
    """UTF-8, or UTF-16 with a byte order mark; bytes that are none become half characters (`_whole_text`)."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data[: len(data) // 2 * 2].decode("utf-16", "surrogatepass") + "\udcff" * (len(data) % 2)
    return data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")


def _whole_text(text: str, where: str = "the text") -> str:
    """`text`. Raises ValueError if not all of it was text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: not UTF-8 text (byte {len(text[: error.start].encode())})") from None
    return text


def _jsonl(file: Path) -> Iterator[tuple[int, str | ValueError]]:
    """(line number, line), blank ones left out."""
    text = _decoded(file.read_bytes())
    for number, line in enumerate(text.split("\n" if "\n" in text else "\r"), 1):
        try:
            if line.strip():
                yield number, _whole_text(line, "the line")
        except ValueError as error:
            yield number, error


def _csv(file: Path, captions: bool) -> Iterator[tuple[int, dict | ValueError]]:
    """(number of its last line, row without its blank fields). Columns are divided by commas, semicolons or tabs."""
    text = _decoded(file.read_bytes())
    head = text.splitlines()[0] if text else ""
    delimiter = max(",;\t", key=head.count)
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    try:
        names = list(rows.fieldnames or ())
    except csv.Error as error:
        raise ValueError(f"{file}: in the first line: {error}") from None
    for column in ("file_name", "text") if captions else ("file_name",):
        if column not in names:
            raise ValueError(f"{file}: no column {column}; the first line must name file_name and text")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{file}: two columns are called {twice!r}; keep one of them")
    while True:
        before = rows.line_num
        try:
            row = next(rows)
            for value in row.values():
                for part in value if isinstance(value, list) else [value]:
                    _whole_text(part or "", "the row")
            yield rows.line_num, {column: value for column, value in row.items() if value}
        except StopIteration:
            return
        except csv.Error as error:
            yield max(rows.line_num, before + 1), ValueError(f"in the row after line {before}: {error}")
        except ValueError as error:
            yield rows.line_num, error


def _object(text: str) -> dict:
    try:
        row = json.loads(text, object_pairs_hook=each_once)
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
    _whole_text(name, "file_name")
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"file_name {name} leads out of the folder; name pictures within it")
    return path.as_posix()


def _captions(text: object) -> tuple[str, ...]:
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"a caption must be a string or a list of strings, found {text!r:.40}")
    captions = tuple(_whole_text(text, "the caption").strip() for text in texts)
    if not all(captions) or not captions:
        raise ValueError("empty caption")
    return captions


def _weight(value: object) -> float:
    try:
        weight = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        weight = math.nan
    if not 0 < weight <= WEIGHT_MAX:
        raise ValueError(f"weight must be a positive finite number up to {WEIGHT_MAX:,}, found {value!r:.40}")
    return weight


def _shard(file: Path, prefix: str, captions: bool, found: _Found) -> Iterator[Example]:
    """Examples of a WebDataset shard, in the order of their first members. Names start with `prefix`."""
    groups: Groups = {}
    try:
        with tarfile.open(file, "r:") as tar:
            _index(tar, file, prefix, groups, found)
    except Exception as error:  # tarfile raises almost anything on a damaged header
        reason = " ".join(str(error).split()) or type(error).__name__
        whole = "cut short or damaged" if groups else "not a folder, and not a .tar that can be read"
        found.skipped[file.name] = f"{whole} ({reason[:200]})"
    for key, members in groups.items():
        pictures = [suffix for suffix in PICTURES if suffix in members]
        name = prefix + (members[pictures[0]].name if pictures else key)
        try:
            if len(pictures) != 1:
                unread = [members[suffix].name for suffix in members if suffix in OTHER_PICTURES]
                more = f"; {unread[0]} is of a kind that is not read" if unread else ""
                raise ValueError(f"{len(pictures) or 'no'} pictures under this key, expected one{more}")
            texts = _shard_captions(file, members) if captions else ()
        except (ValueError, OSError) as error:
            found.skipped[name] = str(error)
        else:
            member = members[pictures[0]]
            yield Example(name, texts, file, member.size, member.offset_data)


def _index(tar: tarfile.TarFile, file: Path, prefix: str, groups: Groups, found: _Found) -> None:
    """Reads the headers of a shard into `groups`."""
    end = file.stat().st_size
    dotted: Groups = {}
    for member in tar:
        if not 0 <= member.size <= end - member.offset_data:
            raise tarfile.ReadError(f"{member.name} is longer than the archive")
        folder, _, base = member.name.rpartition("/")
        stem, _, suffix = base.partition(".")
        suffix, home = f".{suffix.lower()}", groups
        last = Path(base).suffix.lower()
        if member.isdir():
            continue
        if base.startswith("."):
            found.count("hidden files")
            continue
        if not member.isreg() or member.issparse():
            found.skipped[f"{prefix}{member.name}"] = "a link or another special member; put the file itself in"
            continue
        if suffix not in (*PICTURES, *OTHER_PICTURES, ".txt", ".json"):
            if last not in (*PICTURES, ".txt", ".json") or not stem:
                found.other(member.name)
                continue
            stem, suffix, home = base.removesuffix(Path(base).suffix), last, dotted
        group = home.setdefault(f"{folder}/{stem}" if folder else stem, {})
        if suffix in group:
            found.skipped[f"{prefix}{member.name} at byte {member.offset}"] = (
                "the name is there twice; the first was kept"
            )
        group.setdefault(suffix, member)
    for key, members in dotted.items():
        if _is_ours(file, members):
            groups[key] = members
        elif any(suffix in members for suffix in PICTURES):
            name = next(members[suffix].name for suffix in PICTURES if suffix in members)
            found.skipped[prefix + name] = "a name with several dots: the key ends at the first one; rename the members"
        else:
            found.count("members with several dots in their names")
    with file.open("rb") as raw:  # tarfile takes a damaged header for the end of the archive
        raw.seek(tar.offset)
        if raw.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
            raise tarfile.ReadError(f"no header and no end mark at byte {tar.offset}")


def _is_ours(file: Path, members: dict[str, tarfile.TarInfo]) -> bool:
    """Whether a picture's members were written by sdjax, whose names may have dots."""
    if ".json" not in members or not any(suffix in members for suffix in PICTURES):
        return False
    try:
        return bool(Recipe.from_json(_text_of(file, members[".json"])))
    except (ValueError, OSError):
        return False


def _text_of(file: Path, member: tarfile.TarInfo) -> str:
    if member.size > TEXT_MAX:
        raise ValueError(f"{member.name}: longer than {TEXT_MAX} bytes, so no caption")
    with file.open("rb") as raw:
        raw.seek(member.offset_data)
        return _whole_text(_decoded(raw.read(member.size)), member.name)


def _shard_captions(file: Path, members: dict[str, tarfile.TarInfo]) -> tuple[str, ...]:
    member = members.get(".txt") or members.get(".json")
    if member is None:
        raise ValueError("no caption, neither .txt nor .json under this key")
    text = _text_of(file, member)
    if ".txt" in members:
        return _captions(text)
    row = _object(text)
    names = [name for name in ("text", "caption", "prompt") if name in row]
    if not names:
        raise ValueError(f'no caption, {member.name} has neither "text" nor "caption" nor "prompt"')
    return _captions(row[names[0]])
