"""What a job leaves in its folder: whole at every moment, whatever fails."""

import errno
import hashlib
import itertools
import json
import resource
from contextlib import suppress
from pathlib import Path

import pytest

from sdjax.jobs import outputs
from sdjax.jobs.processes import Share
from tests.job_folders import Full, check_whole
from tests.test_recipe import RECIPE


@pytest.mark.parametrize("left", [b'{"picture": 2, "fi', b'{"picture": 2, "file": "c.png"}'])
def test_half_a_line_is_cut_off_in_every_manifest_that_a_process_looks_after(tmp_path, left):
    """Of two processes the first has the manifests 0 and 2, and leaves the second's alone."""
    lines = [json.dumps({"picture": i, "file": name}).encode() + b"\n" for i, name in enumerate(["a.png", "b.png"])]
    names = ["manifest.jsonl", "manifest-0001.jsonl", "manifest-0002.jsonl"]
    for name in names:
        (tmp_path / name).write_bytes(b"".join(lines) + left)
    with outputs.Manifest(tmp_path, Share(0, 2)) as found:
        assert found.entries == {0: ("a.png", 0), 1: ("b.png", 0)}
        found.keep(lambda file, _: file == "b.png")
        assert found.entries == {1: ("b.png", 0)}
    contents = [(tmp_path / name).read_bytes() for name in names]
    assert contents == [lines[1], b"".join(lines) + left, lines[1]]


def test_a_shard_without_a_line_is_cleared_away_by_the_process_that_looks_after_it(tmp_path):
    names = [f"shard{tag}-000000.tar.partial" for tag in ("", "-0001", "-0002")]
    for name in names:
        (tmp_path / name).write_bytes(b"a picture whose line was never written")
    with outputs.Manifest(tmp_path, Share(0, 2)) as manifest:
        outputs.Shards(tmp_path, ".png", manifest)
    assert [path.name for path in tmp_path.glob("shard*")] == [names[1]]


def entry_of(i):
    """The i-th picture of a job that stands for one, and its line."""
    data = bytes([i]) * 100
    return dict(picture=i, id=f"{i}", sha256=hashlib.sha256(data).hexdigest()), data


@pytest.mark.parametrize(("note", "limit"), [("", 3000), ("long" * 1000, 7000)], ids=["shard", "manifest"])
def test_what_does_not_fit_is_not_written_later(note, limit, tmp_path):
    """By the kernel's own limit of a file's size: as on a full disk, what fits is written and the rest refused."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def add(shards, i):
        entry, data = entry_of(i)
        shards.add(entry | {"note": note}, data, RECIPE)

    with outputs.Manifest(tmp_path) as lines:
        shards = outputs.Shards(tmp_path, ".png", lines)
        add(shards, 0)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                add(shards, 1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        add(shards, 2)
        add(shards, 1)
        shards.close()
    check_whole(tmp_path, 3)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("step", range(16))
@pytest.mark.parametrize("how", ["killed before", "killed in the middle", "disk full"])
def test_whatever_step_fails_every_picture_is_in_the_shards_once(how, step, tmp_path, monkeypatch):
    """The steps of five pictures, two to a shard: ten for pictures and their lines, two for the end of each shard."""
    steps, append, rename = itertools.count(), outputs.append, Path.rename

    def fails():
        if next(steps) != step:
            return False
        if how == "killed before":
            raise Killed
        return True

    def append_or_fail(file, data):
        if not fails():
            append(file, data)
        elif how == "disk full":
            append(Full(file), data)
        else:
            file.write(data[: len(data) // 2])
            raise Killed

    def rename_or_fail(path, to):
        if fails():
            raise OSError(errno.ENOSPC, "No space left on device") if how == "disk full" else Killed
        return rename(path, to)

    def work():
        with outputs.Manifest(tmp_path) as lines:
            shards = outputs.Shards(tmp_path, ".png", lines)
            for i in range(5):
                if i not in lines.entries:
                    with suppress(OSError):
                        shards.add(*entry_of(i), RECIPE)
            shards.close()

    monkeypatch.setattr(outputs, "SHARD", 2)
    with monkeypatch.context() as patch, suppress(OSError, Killed):
        patch.setattr(outputs, "append", append_or_fail)
        patch.setattr(Path, "rename", rename_or_fail)
        work()
    assert next(steps) >= step
    work()
    check_whole(tmp_path, 5)
    assert len(list(tmp_path.glob("shard-*.tar"))) == 3


@pytest.mark.parametrize("line", ['{"picture": "x", "file": "a"}', '{"picture": 1}', "[]", "[" * 5000, "5", "{}"])
def test_a_damaged_line_of_a_manifest_is_cut_off_and_what_is_lost_is_said(tmp_path, line):
    good = json.dumps({"picture": 0, "file": "a.png"}) + "\n"
    (tmp_path / "manifest.jsonl").write_text(good + line + "\n" + good * 1000)
    with pytest.warns(UserWarning, match="are no lines of a manifest"), outputs.Manifest(tmp_path) as found:
        assert found.entries == {0: ("a.png", 0)}
    assert (tmp_path / "manifest.jsonl").read_text() == good


def test_copies_that_somebody_made_of_a_manifest_are_left_alone(tmp_path):
    names = ["manifest-copy.jsonl", "manifest.old.jsonl", "manifest (1).jsonl", "manifests.jsonl"]
    for name in names:
        (tmp_path / name).write_text("half a li")
    with outputs.Manifest(tmp_path) as found:
        assert found.entries == {}
        found.keep(lambda *_: False)
    assert {(tmp_path / name).read_text() for name in names} == {"half a li"}
