"""A power cut at any moment loses nothing that was reported as made.

Here the disk is the worst that POSIX allows: of a file it has what was there when it was last flushed, and of what came
later nothing, a part, or zeros; of a folder the names of its last flush, or those of now.
"""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdjax.jobs import outputs
from sdjax.jobs import run as batch
from sdjax.models.params import random_params
from sdjax.pipeline.recipe import encoded
from sdjax.storage import checkpoint, files
from tests.job_folders import RECIPE, check_whole
from tests.small import MINI

PICTURES = 5
DATA = [encoded(Image.new("RGB", (8, 8), (40 * i, 0, 0)), RECIPE, ".png") for i in range(PICTURES)]
TAILS = {
    "nothing": lambda rest: b"",
    "a part": lambda rest: rest[: len(rest) // 2],
    "all but a byte": lambda rest: rest[:-1],
    "zeros": lambda rest: bytes(len(rest)),
    "all": lambda rest: rest,
}


class Disk:
    """What of a folder's files is on the disk for certain, looked at before and after every flush.

    moments: (names now, names of the last flush of the folder, content by inode, flushed content by inode, reported).
    """

    def __init__(self, folder, patch):
        self.folder, self.reported = folder, 0
        self.named, self.content, self.flushed, self.moments = {}, {}, {}, []
        fsync = os.fsync

        def watched(number):
            self.look()
            fsync(number)
            path = Path(os.readlink(f"/proc/self/fd/{number}"))
            if path == folder:
                self.named = self.names()
            elif path.parent == folder:
                self.flushed[path.stat().st_ino] = path.read_bytes()
            self.look()

        patch.setattr(os, "fsync", watched)

    def names(self):
        return {path.name: path.stat().st_ino for path in self.folder.iterdir()}

    def look(self):
        names = self.names()
        self.content |= {inode: (self.folder / name).read_bytes() for name, inode in names.items()}
        self.moments.append((names, self.named, dict(self.content), dict(self.flushed), self.reported))

    def after_a_cut(self, moment, now, tail, folder):
        """Writes what may be left after a power cut at a moment."""
        folder.mkdir()
        names, named, content, flushed, _ = moment
        for name, inode in (names if now else named).items():
            safe, last = flushed.get(inode, b""), content[inode]
            rest = last[len(safe) :] if last.startswith(safe) else b""
            (folder / name).write_bytes(safe + TAILS[tail](rest))
        return folder


def work(folder, kind, disk=None):
    """Makes the pictures that are missing, as a job does; which were there."""
    with outputs.Manifest(folder) as lines:
        writer = kind(folder, ".png", lines)
        there = set(lines.entries)
        for i in range(PICTURES):
            if i not in there:
                entry = dict(picture=i, id=f"{i}", sha256=hashlib.sha256(DATA[i]).hexdigest())
                writer.add(entry, DATA[i], RECIPE)
                if disk is not None:
                    disk.reported = i + 1
        writer.close()
    return there


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("now", [True, False], ids=["names of now", "flushed names"])
@pytest.mark.parametrize("kind", [outputs.Files, outputs.Shards])
def test_pictures_that_were_reported_are_there_and_the_job_is_whole(tmp_path, monkeypatch, kind, now, tail):
    monkeypatch.setattr(outputs, "SHARD", 2)
    (tmp_path / "job").mkdir()
    with monkeypatch.context() as patch:
        disk = Disk(tmp_path / "job", patch)
        work(tmp_path / "job", kind, disk)
        disk.look()
    assert disk.moments[-1][-1] == PICTURES
    for i, moment in enumerate(disk.moments):
        folder = disk.after_a_cut(moment, now, tail, tmp_path / f"{i}")
        for left in folder.glob(".*.partial"):  # as the next start does (`batch.at_work`)
            left.unlink()
        assert work(folder, kind) >= set(range(moment[-1]))
        check_whole(folder, PICTURES)


def test_every_byte_of_what_was_not_flushed_may_be_missing(tmp_path, monkeypatch):
    """The manifest and the shard of the last picture, cut anywhere after their last flush but one."""
    (tmp_path / "job").mkdir()
    with monkeypatch.context() as patch:
        disk = Disk(tmp_path / "job", patch)
        work(tmp_path / "job", outputs.Shards, disk)
    names, _, content, flushed, reported = next(moment for moment in disk.moments if moment[-1] == PICTURES - 1)
    assert reported == PICTURES - 1
    last = disk.moments[-1][2]
    for name in names:
        safe, whole = flushed.get(names[name], b""), last[names[name]]
        for cut in range(len(safe), len(whole), 97):
            folder = tmp_path / f"{name}-{cut}"
            folder.mkdir()
            for other, inode in names.items():
                (folder / other).write_bytes(whole[:cut] if other == name else content[inode])
            assert work(folder, outputs.Shards) >= set(range(reported))
            check_whole(folder, PICTURES)


def events_of(monkeypatch):
    """Flushes and renames in their order, as ("flush", path) and ("rename", from, to)."""
    seen = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def flush(number):
        seen.append(("flush", os.readlink(f"/proc/self/fd/{number}")))
        fsync(number)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "rename", lambda a, b: (seen.append(("rename", str(a), str(b))), rename(a, b))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append(("rename", str(a), str(b))), replace(a, b))[1])
    return seen


def assert_flushed_first(seen, path):
    """That everything of a file or folder was on the disk before it got its name, and the name was then."""
    (at,) = (i for i, event in enumerate(seen) if event[0] == "rename" and event[2] == str(path))
    temporary = seen[at][1]
    inside = [Path(), *(file.relative_to(path) for file in path.rglob("*"))] if path.is_dir() else [Path()]
    for name in inside:
        assert ("flush", str(Path(temporary) / name)) in seen[:at], name
    assert ("flush", str(path.parent)) in seen[at:]


@pytest.mark.parametrize("one_file", [True, False])
def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch, one_file):
    seen = events_of(monkeypatch)
    for force in (False, True):  # then in the place of another
        seen.clear()
        checkpoint.save(tmp_path / "model", MINI, random_params(MINI), one_file=one_file, force=force)
        assert_flushed_first(seen, tmp_path / "model")


def test_a_shard_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    seen = events_of(monkeypatch)
    work(tmp_path, outputs.Shards)
    assert_flushed_first(seen, tmp_path / "shard-000000.tar")


def test_files_are_on_the_disk_before_they_have_their_names(tmp_path, monkeypatch):
    seen = events_of(monkeypatch)
    with files.new_file(tmp_path / "a") as temporary:
        temporary.write_text("a")
    assert_flushed_first(seen, tmp_path / "a")
    (tmp_path / "b.partial").write_text("b")
    files.move(tmp_path / "b.partial", tmp_path / "b")
    assert_flushed_first(seen, tmp_path / "b")


def test_what_a_job_is_to_do_is_on_the_disk_before_it_begins(tmp_path, monkeypatch):
    seen = events_of(monkeypatch)
    (tmp_path / "jobs.txt").write_text("a\n\xff\n", "latin-1")
    out = tmp_path / "out"
    with batch.at_work(out), open(tmp_path / "jobs.txt", "rb") as file:
        batch.prepare(file, ".txt", out, {}, {}, skip_bad=True)
    for name in ("jobs.jsonl", "job.json", "rejected.jsonl"):
        assert_flushed_first(seen, out / name)
    assert ("flush", str(tmp_path)) in seen


def test_a_manifest_that_ends_in_zeros_is_gone_on_with(tmp_path):
    """As journals of file systems leave what was written and not flushed."""
    work(tmp_path, outputs.Files)
    whole = (tmp_path / "manifest.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    (tmp_path / "manifest.jsonl").write_bytes(b"".join(lines[:3]) + bytes(len(lines[3]) + 700))
    assert work(tmp_path, outputs.Files) == {0, 1, 2}
    check_whole(tmp_path, PICTURES)
    assert np.array_equal(sorted(whole.splitlines()), sorted((tmp_path / "manifest.jsonl").read_bytes().splitlines()))
