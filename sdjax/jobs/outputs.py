"""What a job leaves in its folder: the manifest, and pictures as files or in WebDataset shards.

All of it is written such that a crash or a power cut at any moment leaves nothing that the next start cannot tell from
a whole: a picture is on the disk before its line in the manifest is, and with the line it counts as made.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tarfile
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from io import FileIO
from pathlib import Path
from typing import Any, cast

from sdjax.jobs.processes import ALONE, Share
from sdjax.pipeline.recipe import Recipe, has_recipe
from sdjax.storage.files import flush, json_line, new_file

LINE = 2**14
"""Bytes that a manifest's line does not exceed by far; a crash may leave as much of one without its end."""

SHARD = 1000
"""Pictures in one .tar."""


class Manifest(AbstractContextManager["Manifest"]):
    """The list of pictures that are made, OUT/manifest.jsonl: one line each, never half a line.

    Every process writes a file of its own (`manifest-0001.jsonl` and so on after the first) and reads all of them. If a
    job is resumed by fewer processes, the file of number i is looked after by process i modulo their number.

    entries: picture -> (the file that it is in, where it ends in that file).
    """

    def __init__(self, out: Path, share: Share = ALONE) -> None:
        self.share = share
        self.own = out / f"manifest{share.tag}.jsonl"
        self.entries: dict[int, tuple[str, int]] = {}
        for path in self._all():
            whole = 0
            with open(path, "rb") as file:
                for text in file:
                    try:
                        entry = json.loads(text)
                        picture, where = int(entry["picture"]), (str(entry["file"]), int(entry.get("end", 0)))
                    except (ValueError, TypeError, KeyError, RecursionError):
                        break
                    if not text.endswith(b"\n"):
                        break
                    self.entries[picture] = where
                    whole += len(text)
            if self._is_ours(path):
                left = path.stat().st_size - whole
                if left > LINE:
                    what = f"{left} bytes at its end are no lines of a manifest; their pictures are made again"
                    warnings.warn(f"{path}: {what}", stacklevel=2)
                os.truncate(path, whole)
        self.file = open(self.own, "ab", buffering=0)  # noqa: SIM115

    def _all(self) -> list[Path]:
        """The manifests of all processes, and no copies that somebody made of them."""
        return [path for path in self.own.parent.iterdir() if re.fullmatch(r"manifest(-\d{4,})?\.jsonl", path.name)]

    def _is_ours(self, path: Path) -> bool:
        """Whether this process looks after a file: its own, or one of a process that is no longer there."""
        return number_of(path.stem) % self.share.process_count == self.share.process_index

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def keep(self, there: Callable[[str, int], bool]) -> None:
        """Forgets the pictures whose file is gone."""
        gone = {picture for picture, (file, end) in self.entries.items() if not there(file, end)}
        if not gone:
            return
        self.file.close()
        for path in self._all():
            if not self._is_ours(path):
                continue
            with new_file(path, force=True) as temporary, open(path, "rb") as old, open(temporary, "wb") as new:
                new.writelines(text for text in old if json.loads(text)["picture"] not in gone)
        self.entries = {picture: entry for picture, entry in self.entries.items() if picture not in gone}
        self.file = open(self.own, "ab", buffering=0)  # noqa: SIM115

    def add(self, entry: dict[str, Any], recipe: Recipe) -> None:
        """A picture's line: `entry` and the settings of its recipe."""
        append(self.file, json_line(entry | {"settings": dataclasses.asdict(recipe)}))


def number_of(stem: str) -> int:
    """The process that a file belongs to, by the first number in its name: manifest-0003, shard-0003-000000."""
    numbers = re.findall(r"\d+", stem)
    return int(numbers[0]) if len(numbers) > ("shard" in stem) else 0


def append(file: FileIO, data: bytes) -> None:
    """All of `data` at the end of a file and on the disk, or none of it and an OSError.

    The file is unbuffered: a buffer would write later what did not fit now.
    """
    before, rest = file.seek(0, os.SEEK_END), memoryview(data)
    try:
        while rest:
            rest = rest[file.write(rest) :]
        os.fsync(file.fileno())
    except OSError:
        file.truncate(before)
        raise


class Files:
    """A file for each picture."""

    def __init__(self, out: Path, suffix: str, manifest: Manifest) -> None:
        self.out, self.suffix, self.manifest = out, suffix, manifest
        there = {entry.name for entry in os.scandir(out)}
        manifest.keep(lambda file, _: file in there)

    def add(self, entry: dict[str, Any], data: bytes, recipe: Recipe) -> None:
        """Writes a picture, then its line."""
        path = self.out / f"{entry['id']}{self.suffix}"
        if path.exists() and not has_recipe(path):
            raise FileExistsError(f"{path} is already there and was not made by sdjax; move it away")
        with new_file(path, force=True) as temporary:
            temporary.write_bytes(data)
        self.manifest.add(entry | {"file": path.name}, recipe)

    def close(self) -> None:
        pass


class Shards:
    """WebDataset: NAME.png and NAME.json, `SHARD` pictures to a shard-000000.tar. Its name ends in .partial until it is
    full and the last picture's line is written; its length after each picture is in the manifest, so that what a kill
    left after that is cut off.
    """

    def __init__(self, out: Path, suffix: str, manifest: Manifest) -> None:
        self.out, self.suffix, self.manifest, self.tag = out, suffix, manifest, manifest.share.tag
        ends: dict[str, list[int]] = {}
        for file, end in manifest.entries.values():
            ends.setdefault(file, []).append(end)
        lengths = {file: self._length(file) for file in ends}
        manifest.keep(lambda file, end: end <= lengths[file])
        own = [file for file in ends if file.startswith(f"shard{self.tag}-") and len(file) == len(self._name(0))]
        self.number = 1 + max((int(file[-10:-4]) for file in own), default=-1)
        self.count, self.file = 0, cast(FileIO | None, None)
        left = [path.stem for path in out.glob("shard*.tar.partial")]
        for file in sorted(left, key=lambda file: (file in own, file)):  # the last one of its own it goes on with
            if number_of(file) % manifest.share.process_count != manifest.share.process_index:
                continue
            self.close()
            if file not in ends:
                self._partial(file).unlink()
                continue
            self.at, self.count = file, sum(end <= lengths[file] for end in ends[file])
            self.file = open(self._partial(file), "r+b", buffering=0)  # noqa: SIM115
            self.file.truncate(max((end for end in ends[file] if end <= lengths[file]), default=0))
            if file not in own:
                self.close()

    def _name(self, number: int) -> str:
        return f"shard{self.tag}-{number:06d}.tar"

    def _partial(self, file: str) -> Path:
        return self.out / f"{file}.partial"

    def _length(self, file: str) -> int:
        """Bytes of a shard, -1 if it is gone. Another process may give it its final name at any moment."""
        for path in (self._partial(file), self.out / file):
            with suppress(FileNotFoundError):
                return path.stat().st_size
        return -1

    def add(self, entry: dict[str, Any], data: bytes, recipe: Recipe) -> None:
        """Writes a picture, then its line; without the line the picture is taken back."""
        if self.count == SHARD:
            self.close()
        if self.file is None:
            self.at, self.number = self._name(self.number), self.number + 1
            self.file = open(self._partial(self.at), "wb", buffering=0)  # noqa: SIM115
            flush(self.out)
        before = self.file.seek(0, os.SEEK_END)
        members = {self.suffix: data, ".json": recipe.to_json().encode()}
        append(self.file, b"".join(_member(entry["id"] + suffix, content) for suffix, content in members.items()))
        try:
            self.manifest.add(entry | {"file": self.at, "end": self.file.tell()}, recipe)
        except OSError:
            self.file.truncate(before)
            raise
        self.count += 1

    def close(self) -> None:
        if self.file is None:
            return
        append(self.file, bytes(2 * tarfile.BLOCKSIZE))
        self._partial(self.at).rename(self.out / self.at)
        flush(self.out)
        self.file.close()
        self.count, self.file = 0, None


def _member(name: str, content: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info.tobuf() + content + bytes(-len(content) % tarfile.BLOCKSIZE)
