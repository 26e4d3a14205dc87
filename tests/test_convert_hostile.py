"""Files that are damaged or lie: each ends in one clear line that names it, and none costs much memory."""

import gzip
import json
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert.files.open import open_source
from tests.checkpoint_files import (
    CHANGES,
    FUZZ,
    MB,
    damage,
    refusal,
    survive,
    tensor_pickle,
    write_ckpt,
    write_raw_safetensors,
    write_safetensors,
)

WEIGHT = np.arange(3, dtype="f4")
GOOD = [("m/data.pkl", tensor_pickle()), ("m/data/0", WEIGHT.tobytes())]


# What is no checkpoint at all


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "only 0 bytes"),
        (b"1234567", "only 7 bytes"),
        (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "web page"),
        (b"\xef\xbb\xbf\r\n  <html><body>404 Not Found</body></html>", "web page"),
        (b'{"error": "Repository not found"}', "JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n", "git lfs pull"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(100), "7z"),
        (gzip.compress(b"x" * 100, mtime=0), "gzip"),
        (b"GGUF" + bytes(100), "GGUF"),
        (bytes(257) + b"ustar" + bytes(300), "tar"),
        (bytes(4096), "zeros"),
        (b"just some text that goes on for a while", "not a checkpoint"),
        (pickle.dumps({"w": [1.0] * 10}, 2), "bare pickle"),
        (pickle.dumps({"w": [1.0] * 10}, 5), "bare pickle"),
        (b"PK\x03\x04" + bytes(100), "zip directory"),
        (b"PK\x03\x04", "zip directory"),
    ],
)
def test_other_content_is_named(tmp_path, content, says):
    path = tmp_path / "m.ckpt"
    path.write_bytes(content)
    assert says in refusal(path)


def test_folders_pipes_and_dangling_links_are_named(tmp_path):
    assert "a folder" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refusal(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="symbolic link to nothing"):
        open_source(tmp_path / "link")
    with pytest.raises(FileNotFoundError, match="no such file"):
        open_source(tmp_path / "absent")


def write_all_formats(folder):
    """One small file of each format; sizes of some kB."""
    tensors = {"a": np.ones((16, 8), "f4"), "b.c": np.arange(9), "d": np.ones(5, "f2")}
    write_ckpt(folder / "m.ckpt", tensors)
    write_safetensors(folder / "m.safetensors", tensors, metadata={"format": "pt"})
    write_ckpt(folder / "old.ckpt", tensors, legacy=True)
    return sorted(folder.iterdir())


def test_every_shortened_file_is_refused(tmp_path):
    for path in write_all_formats(tmp_path):
        whole = path.read_bytes()
        for length in range(0, len(whole), 41 if path.name == "old.ckpt" else 7):
            path.write_bytes(whole[:length])
            refusal(path)
        path.write_bytes(whole[:-1])
        refusal(path)


def test_bytes_behind_the_end_are_refused(tmp_path):
    for path in write_all_formats(tmp_path)[:2]:
        path.write_bytes(path.read_bytes() + b"\0")
        refusal(path)


# Zip archives that lie


def write_zip(path, records, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records:
            archive.writestr(name, data)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("records", "says"),
    [
        ([*GOOD, GOOD[1]], "twice"),
        ([*GOOD, GOOD[0]], "twice"),
        ([*GOOD, ("other/data.pkl", b"x")], "2 data.pkl"),
        ([*GOOD, ("outside", b"x")], "outside"),
        ([*GOOD, ("m/../../evil", b"x")], "refused"),
        ([*GOOD, ("/etc/evil", b"x")], "refused"),
        ([*GOOD, ("m\\..\\evil", b"x")], "refused"),
        ([*GOOD, ("m/" + "x" * 5000, b"x")], "refused"),
        ([*GOOD, ("m/constants.pkl", b"x")], "TorchScript"),
        ([*GOOD, ("m/byteorder", b"middle")], "byte order"),
        ([*GOOD, ("m/byteorder", b"little" * 10 * MB)], "byte order"),
        ([GOOD[0]], "missing"),
        ([GOOD[0], ("m/data/0", b"1234")], "4 bytes"),
        ([("m/data.pkl", bytes(40 * MB)), GOOD[1]], "pickle of"),
        ([("m/readme.txt", b"x")], "0 data.pkl"),
        ([("data.pkl", GOOD[0][1]), ("data/0", GOOD[1][1])], "0 data.pkl"),
    ],
)
def test_hostile_archives_are_refused(tmp_path, records, says):
    write_zip(tmp_path / "m.ckpt", records)
    assert says in refusal(tmp_path / "m.ckpt")


def test_compressed_records_are_refused_before_they_are_inflated(tmp_path):
    write_zip(tmp_path / "m.ckpt", [GOOD[0], ("m/data/0", bytes(64 * MB))], zipfile.ZIP_DEFLATED)
    line = refusal(tmp_path / "m.ckpt")
    assert "compressed; load and save the file again with torch" in line


def changed(data, at, layout, *values):
    data = bytearray(data)
    struct.pack_into(layout, data, at, *values)
    return bytes(data)


def test_headers_that_lie_are_refused(tmp_path):
    path = tmp_path / "m.ckpt"
    write_zip(path, GOOD)
    good = path.read_bytes()
    first, last, end = good.index(b"PK\x01\x02"), good.rindex(b"PK\x01\x02"), len(good) - 22
    lies = {
        "encrypted": [changed(good, first + 8, "<H", 1), changed(good, first + 8, "<H", 0x41)],
        "compressed": [changed(good, first + 10, "<H", 8), changed(good, last + 20, "<I", 5)],
        "by its own header": [
            changed(good, 30, "<10s", b"m/date.pkl"),
            changed(good, 6, "<H", 1),
            changed(good, 8, "<H", 8),
            changed(good, 18, "<I", 5),
            changed(good, 22, "<I", 5),
        ],
        "overlaps": [changed(good, last + 42, "<I", 5)],
        "missing or damaged": [
            changed(good, first + 42, "<I", 2**31),
            changed(good, last + 42, "<I", 2**32 - 1),
            changed(good, last + 20, "<II", 2**31, 2**31),
            changed(good, last + 20, "<II", 2**32 - 1, 2**32 - 1),
            changed(good, last + 20, "<II", first, first),
            changed(good, last + 34, "<H", 1),
            changed(good, 26, "<H", 60000),
            changed(good, 0, "<4s4s", b"PK\x03\x04", b"zzzz")[:-1],
            changed(good, end + 4, "<H", 1),
            changed(good, end + 8, "<HH", 3, 3),
            changed(good, end + 8, "<HH", 1, 1),
            changed(good, end + 8, "<HH", 2**16 - 1, 2**16 - 1),
            changed(good, end + 12, "<I", 2**32 - 1),
            changed(good, end + 16, "<I", 2**32 - 1),
            changed(good, end + 16, "<I", 5),
            changed(good, end + 20, "<H", 1),
        ],
    }
    for says, contents in lies.items():
        for content in contents:
            assert content != good
            path.write_bytes(content)
            assert says in refusal(path)


def test_two_ends_that_disagree_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "m.ckpt"
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1)
    write_zip(path, GOOD)
    good = path.read_bytes()
    wide, end = good.rindex(b"PK\x06\x06"), len(good) - 22
    for content in (
        changed(good, end + 8, "<HH", 1, 1),
        changed(good, end + 16, "<I", 7),
        changed(good, wide + 4, "<Q", 45),
        changed(good, wide + 24, "<QQ", 2**40, 2**40),
        changed(good, wide + 40, "<QQ", 2**63, 2**63),
        changed(good, wide + 56 + 8, "<Q", wide - 1),
        changed(good, wide + 56 + 8, "<Q", 2**63),
        changed(good, wide + 56 + 16, "<I", 2),
    ):
        path.write_bytes(content)
        assert "missing or damaged" in refusal(path)


def test_records_that_share_bytes_are_refused(tmp_path):
    """A record within another one: what is data for one is a header for the other."""
    path = tmp_path / "m.ckpt"
    inner = tmp_path / "inner"
    write_zip(inner, [("m/data/0", WEIGHT.tobytes())])
    hidden = inner.read_bytes()
    hidden = hidden[: hidden.index(b"PK\x01\x02")]
    write_zip(path, [GOOD[0], ("m/data/1", hidden), GOOD[1]])
    good = path.read_bytes()
    path.write_bytes(changed(good, good.rindex(b"PK\x01\x02") + 42, "<I", good.index(hidden)))
    assert "overlaps" in refusal(path)


def test_directory_of_a_huge_sparse_file_is_not_taken_into_memory(tmp_path):
    path = tmp_path / "m.ckpt"
    with open(path, "wb") as file:
        file.write(b"PK\x03\x04")
        file.truncate(3 * 2**30)
        file.seek(0, os.SEEK_END)
        file.write(struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 60000, 60000, 3 * 2**30 - 4, 4, 0))
    assert "zip directory" in refusal(path)


# .safetensors


def entry(begin=0, end=4, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        ({"w": entry()}, b"", "cut off"),
        ({"w": entry()}, b"123", "cut off"),
        ({"w": entry()}, b"12345", "behind the last tensor"),
        ({"w": entry(0, 8)}, b"12345678", "w has 8 bytes"),
        ({"w": entry(4, 0)}, b"1234", "w has -4 bytes"),
        ({"w": entry(4, 8)}, b"12345678", "hole"),
        ({"a": entry(), "b": entry()}, b"1234", "overlaps"),
        ({"a": entry(), "b": entry(2, 6)}, b"123456", "overlaps"),
        ({"a": entry(), "b": entry(8, 12)}, bytes(12), "hole"),
        ({"w": entry(shape=(2**40, 2**40))}, b"1234", "too large"),
        ({"w": entry(0, 0, (0, 2**62, 2**62))}, b"", "too large"),
        ({"w": entry(shape=(2**63,))}, b"1234", "whole numbers"),
        ({"w": entry(shape=(-1, -1))}, b"1234", "whole numbers"),
        ({"w": entry(shape=(1.0,))}, b"1234", "whole numbers"),
        ({"w": entry(shape=("1",))}, b"1234", "whole numbers"),
        ({"w": entry(shape=(True,))}, b"1234", "whole numbers"),
        ({"w": entry(shape=(1,) * 70)}, b"1234", "whole numbers"),
        ({"w": entry() | {"shape": 1}}, b"1234", "whole numbers"),
        ({"w": entry() | {"data_offsets": [0, 4, 8]}}, b"1234", "whole numbers"),
        ({"w": entry(dtype="C64", end=8)}, bytes(8), "dtype 'C64'"),
        ({"w": entry(dtype="F4", end=8)}, bytes(8), "dtype 'F4'"),
        ({"w": entry(dtype="NEW")}, b"1234", "dtype 'NEW'"),
        ({"w": entry(dtype=["F32"])}, b"1234", "dtype list"),
        ({"w": entry() | {"extra": 1}}, b"1234", "must have dtype"),
        ({"w": {"dtype": "F32", "shape": [1]}}, b"1234", "must have dtype"),
        ({"w": 5}, b"", "must have dtype"),
        ({}, b"", "0 tensors"),
        ({"__metadata__": {"a": "b"}}, b"", "0 tensors"),
        ({"__metadata__": {"a": 1}, "w": entry()}, b"1234", "strings"),
        ({"__metadata__": "text", "w": entry()}, b"1234", "strings"),
        ({"__metadata__": None, "w": entry()}, b"1234", "strings"),
        ({"two\nlines": entry()}, b"1234", "no tensor has such a name"),
        ({"\ud800": entry()}, b"1234", "no tensor has such a name"),
        (
            b'{"w":' + json.dumps(entry()).encode() + b',"w":' + json.dumps(entry(4, 8)).encode() + b"}",
            bytes(8),
            "twice",
        ),
        (
            b'{"w":' + json.dumps(entry()).encode() + b',"\\u0077":' + json.dumps(entry()).encode() + b"}",
            b"1234",
            "twice",
        ),
        (b'{"w":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"1234", "twice"),
        (b'{"__metadata__":{"a":"b","a":"c"}}', b"", "twice"),
        (b"{not json", b"", "not JSON"),
        (b'{"w": NaN}', b"", "must have dtype"),
        (b'{"w": 1' + b"0" * 5000 + b"}", b"", "not JSON"),
        (b'{"\xff\xfe": 1}', b"", "not JSON"),
        (b'{"a":' * 50_000, b"", "not JSON"),
        (b'{"a":' + b"[" * 100_000, b"", "not JSON"),
        (b'{"a":[' + b"{}," * 5_000_000 + b"{}]}", b"", "more than"),
        (b" []", b"", "JSON object"),
        (b"   ", b"", "not JSON"),
    ],
)
def test_wrong_safetensors_are_refused(tmp_path, header, data, says):
    path = tmp_path / "m.safetensors"
    write_raw_safetensors(path, header, data)
    assert says in refusal(path, 32 * MB)


@pytest.mark.parametrize("length", [0, 1, 10**6, 100_000_001, 2**63, 2**64 - 1])
def test_wrong_header_lengths_are_refused(tmp_path, length):
    path = tmp_path / "m.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}" + bytes(100))
    assert "header" in refusal(path)


def test_many_equal_names_are_found_quickly(tmp_path):
    """A search for the name that is there twice must not compare all with all."""
    names = [f'"{i}":0' for i in range(100_000)]
    write_raw_safetensors(tmp_path / "m", ("{" + ",".join([*names, names[-1]]) + "}").encode())
    assert "'99999' twice" in refusal(tmp_path / "m", 64 * MB)


# Random damage: a refusal or sound arrays, and never anything else


@pytest.fixture(scope="module")
def small_files(tmp_path_factory):
    return [path.read_bytes() for path in write_all_formats(tmp_path_factory.mktemp("small"))[:2]]


@FUZZ
@given(which=st.integers(0, 1), changes=CHANGES, cut=st.integers(0, 50))
def test_damaged_files_are_refused_or_sound(small_files, tmp_path, which, changes, cut):
    data = damage(small_files[which], changes)
    (tmp_path / "m").write_bytes(data[: len(data) - max(0, cut - 40)])
    survive(tmp_path / "m")
