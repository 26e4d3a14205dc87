"""What is kept between processes is known by its content, and what appears is whole and on the disk."""

import os
import threading
from pathlib import Path

import pytest

from sdjax.storage import cache, files


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setenv("SDJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "LARGE", 4)
    return tmp_path


def aged(path: Path) -> Path:
    """As if it had been written long ago; the time of change of its inode cannot be set, so the clock is."""
    os.utime(path, ns=(1, 1))
    return path


def test_a_file_is_read_once_while_it_stays_the_same(kept, monkeypatch):
    file = kept / "model"
    file.write_bytes(b"content")
    monkeypatch.setattr(cache, "UNSETTLED", -(10**12))
    first = cache.digest_of(file)
    monkeypatch.setattr(cache.hashlib, "file_digest", lambda *_: pytest.fail("read again"))
    assert cache.digest_of(file) == first


def test_other_content_of_the_same_name_size_and_time_is_noticed(kept, monkeypatch):
    monkeypatch.setattr(cache, "UNSETTLED", -(10**12))
    file = kept / "model"
    file.write_bytes(b"content")
    aged(file)
    first = cache.digest_of(file)
    before = file.stat()
    while file.stat().st_ctime_ns == before.st_ctime_ns:  # the file system's clock ticks every few milliseconds
        file.write_bytes(b"CONTENT")
        aged(file)
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert cache.digest_of(file) != first


def test_what_has_just_changed_is_not_trusted(kept):
    file = kept / "model"
    file.write_bytes(b"content")
    cache.digest_of(file)
    assert not (kept / "cache" / "digests.json").exists()


@pytest.mark.parametrize("content", ["", "[]", '{"x": 3}', "{", '{"x": []}'])
def test_a_damaged_index_is_regenerated(kept, content, monkeypatch):
    monkeypatch.setattr(cache, "UNSETTLED", -(10**12))
    file = kept / "model"
    file.write_bytes(b"content")
    expected = cache.digest_of(file)
    (kept / "cache" / "digests.json").write_text(content)
    assert cache.digest_of(file) == expected


def test_names_in_a_folder_count(kept):
    for name in ("a", "b"):
        (kept / name).mkdir()
        (kept / name / f"{name}.txt").write_text("the same")
    assert cache.digest_of_all([kept / "a"]) != cache.digest_of_all([kept / "b"])


def test_a_user_without_a_home_has_a_folder_of_temporary_files(kept, monkeypatch):
    monkeypatch.delenv("SDJAX_CACHE")
    monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: str(kept))

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    folder = cache.cache_folder()
    assert folder.parent == kept
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.rmdir()
    (kept / "elsewhere").mkdir()
    folder.symlink_to(kept / "elsewhere")
    with pytest.raises(PermissionError, match="belongs to another user"):
        cache.cache_folder()


@pytest.mark.parametrize("name", ["x" * 255, "\U0001d4d0" * 63, "é" * 127, "\udcff" * 200])
def test_the_longest_names_can_be_written(tmp_path, name):
    with files.new_file(tmp_path / name) as temporary:
        temporary.write_text("whole")
    assert (tmp_path / name).read_text() == "whole"
    with files.new_folder(tmp_path / name[:-1]):
        pass
    assert len(list(tmp_path.iterdir())) == 2


def test_several_threads_may_write_the_same_file(tmp_path):
    def write(text: str) -> None:
        with files.new_file(tmp_path / "one", force=True) as temporary:
            temporary.write_text(text * 1000)

    threads = [threading.Thread(target=write, args=(text,)) for text in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set((tmp_path / "one").read_text())) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_what_was_found_of_files_is_remembered_as_long_as_they_stay_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("SDJAX_CACHE", str(tmp_path / "cache"))
    made, paths = [], [tmp_path / name for name in "ab"]
    for path in paths:
        path.write_text("x")

    def make():
        made.append(1)
        return [None, "broken"]

    for count in (1, 2):  # they have just changed, so nothing is trusted
        assert cache.remembered("kind", "key", paths, make) == [None, "broken"]
        assert len(made) == count
    monkeypatch.setattr(cache, "UNSETTLED", -(10**12))
    for key, count in (("key", 3), ("key", 3), ("other", 4), ("key", 4)):
        assert cache.remembered("kind", key, paths, make) == [None, "broken"]
        assert len(made) == count
    times = paths[0].stat()
    paths[0].write_text("y")
    os.utime(paths[0], ns=(times.st_atime_ns, times.st_mtime_ns))
    cache.remembered("kind", "key", paths, make)
    assert len(made) == 5
    monkeypatch.setenv("SDJAX_CACHE", "/proc/x")
    assert cache.remembered("kind", "key", paths, make) == [None, "broken"]
