"""Readers of single files: what people have is read, and bad files end in one clear line with nothing run."""

import contextlib
import gzip
import json
import os
import pickle
import resource
import struct
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convert.source import CheckpointError, open_source
from tests.checkpoint_files import (
    write_ckpt,
    write_raw_safetensors,
    write_safetensors,
    write_torch_zip,
)

RNG = np.random.default_rng(0)
TENSORS = {
    "a.weight": RNG.standard_normal((3, 4)).astype("f4"),
    "b.half": RNG.standard_normal((2, 2, 1)).astype("f2"),
    "c.bf16": RNG.standard_normal(5).astype(ml_dtypes.bfloat16),
    "d.double": RNG.standard_normal((2, 3)),
    "e.ids": np.arange(7).reshape(1, 7),
    "f.scalar": np.float32(3.5).reshape(()),
}


def read_all(path):
    with open_source(path) as source:
        return {name: source.read(name) for name in source.tensors}


def assert_equal(found, expected):
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        np.testing.assert_array_equal(
            found[name].view("u1") if array.ndim else found[name], array.view("u1") if array.ndim else array
        )
        assert found[name].flags.c_contiguous
        assert found[name].flags.owndata or found[name].base is not None


def refusal(path):
    """The one line that opening or reading `path` ends in."""
    with pytest.raises(CheckpointError) as caught:
        read_all(path)
    line = str(caught.value)
    assert "\n" not in line
    assert path.name in line
    assert len(line) < 600
    return line


# What people have


@pytest.mark.parametrize("lightning", [True, False])
def test_ckpt_is_read_without_torch_semantics(tmp_path, lightning):
    write_ckpt(tmp_path / "m.ckpt", TENSORS, lightning=lightning)
    assert_equal(read_all(tmp_path / "m.ckpt"), TENSORS)
    with open_source(tmp_path / "m.ckpt") as source:
        assert source.format == "ckpt"
        assert source.metadata == ({"global_step": "840000"} if lightning else {})


def test_legacy_ckpt_is_read_through_torch(tmp_path):
    write_ckpt(tmp_path / "m.ckpt", TENSORS, legacy=True)
    assert_equal(read_all(tmp_path / "m.ckpt"), TENSORS)


def test_safetensors_is_read_aligned_or_not(tmp_path):
    extra = TENSORS | {"g.f8": RNG.standard_normal(4).astype(ml_dtypes.float8_e4m3fn)}
    for old_writer in (False, True):
        write_safetensors(tmp_path / "m.safetensors", extra, old_writer=old_writer, metadata={"format": "pt"})
        assert_equal(read_all(tmp_path / "m.safetensors"), extra)


def test_content_and_not_the_name_says_what_a_file_is(tmp_path):
    write_safetensors(tmp_path / "m.ckpt", TENSORS)
    write_ckpt(tmp_path / "m.safetensors", TENSORS)
    assert_equal(read_all(tmp_path / "m.ckpt"), TENSORS)
    assert_equal(read_all(tmp_path / "m.safetensors"), TENSORS)


def test_views_shared_storages_and_parameters_are_read_as_torch_reads_them(tmp_path):
    base = torch.arange(60.0).reshape(5, 12)
    state = OrderedDict(
        transposed=base.T,
        row=base[2],
        strided=base[1:4, ::3],
        whole=base,
        parameter=torch.nn.Parameter(base[:1].clone()),
        empty=torch.zeros(0, 3),
    )
    state._metadata = {"": {"version": 1}}
    torch.save(state, tmp_path / "m.ckpt")
    expected = torch.load(tmp_path / "m.ckpt", weights_only=True)
    found = read_all(tmp_path / "m.ckpt")
    assert list(found) == list(expected)
    for name in found:
        np.testing.assert_array_equal(found[name], expected[name].detach().numpy())


def test_float8_and_untyped_storages_are_read(tmp_path):
    torch.save({"x": torch.arange(4.0).to(torch.float8_e4m3fn)}, tmp_path / "m.ckpt")
    np.testing.assert_array_equal(read_all(tmp_path / "m.ckpt")["x"].astype("f4"), np.arange(4.0))


def test_wrappers_are_opened_and_other_values_are_left_out(tmp_path):
    x = torch.ones(2)
    for state in (
        {"state_dict": {"w": x, "state_dict": {}}, "epoch": 3},
        {"model": {"w": x}},
        {"state_dict": {"state_dict": {"w": x}}},
    ):
        torch.save(state, tmp_path / "m.ckpt")
        with open_source(tmp_path / "m.ckpt") as source:
            assert list(source.tensors) == ["w"]
    torch.save(
        {"w": x, "step": 5, "name": "x", "none": None, "scale": np.float64(2), "inner": {"v": x}}, tmp_path / "m.ckpt"
    )
    with open_source(tmp_path / "m.ckpt") as source:
        assert list(source.tensors) == ["w", "inner.v"]
        assert set(source.skipped) == {"step", "name", "none", "scale"}


def test_flattened_state_dict_prefix_is_stripped(tmp_path):
    write_safetensors(tmp_path / "m.safetensors", {f"state_dict.{name}": array for name, array in TENSORS.items()})
    assert_equal(read_all(tmp_path / "m.safetensors"), TENSORS)


def test_big_endian_records_are_swapped(tmp_path):
    write_ckpt(tmp_path / "m.ckpt", {"w": TENSORS["a.weight"]}, lightning=False)
    with zipfile.ZipFile(tmp_path / "m.ckpt") as archive:
        pickled = archive.read("m/data.pkl")
    write_torch_zip(tmp_path / "big.ckpt", pickled, {"0": TENSORS["a.weight"].astype(">f4").tobytes()}, byteorder="big")
    np.testing.assert_array_equal(read_all(tmp_path / "big.ckpt")["w"], TENSORS["a.weight"])


# Groups 1 to 7: not a checkpoint at all


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "0 bytes"),
        (b"1234567", "7 bytes"),
        (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n", "git lfs pull"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(100), "7z"),
        (gzip.compress(b"x" * 100), "gzip"),
        (b"GGUF" + bytes(100), "GGUF"),
        (bytes(257) + b"ustar" + bytes(300), "tar"),
        (bytes(4096), "zeros"),
        (b"just some text that goes on for a while", "not a checkpoint"),
    ],
)
def test_other_content_is_named(tmp_path, content, says):
    path = tmp_path / "m.ckpt"
    path.write_bytes(content)
    assert says in refusal(path)


def test_folders_pipes_and_dangling_links_are_named(tmp_path):
    assert "folder" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "regular" in refusal(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="symbolic link to nothing"):
        open_source(tmp_path / "link")
    with pytest.raises(FileNotFoundError, match="no such file"):
        open_source(tmp_path / "absent")


@pytest.mark.parametrize("share", [0.3, 0.66, 0.99])
def test_truncated_files_are_refused(tmp_path, share):
    big = {"w": np.ones((64, 64), "f4")}
    write_ckpt(tmp_path / "m.ckpt", big)
    write_safetensors(tmp_path / "m.safetensors", big)
    write_ckpt(tmp_path / "old.ckpt", big, legacy=True)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
        refusal(path)


# Group 8 and 9: hostile pickles


class Gadget:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def hostile_pickles(marker):
    command = f"touch {marker}"
    yield "os.system", pickle.dumps({"w": Gadget(os.system, (command,))}, 2)
    yield "eval", pickle.dumps({"w": Gadget(eval, (f"open({str(marker)!r}, 'w')",))}, 2)
    yield "exec", pickle.dumps({"w": Gadget(exec, (f"open({str(marker)!r}, 'w')",))}, 4)
    yield "getattr", b"\x80\x02c__builtin__\ngetattr\nq\x00."
    yield "posix", b"\x80\x02cposix\nsystem\nq\x00X\x04\x00\x00\x00true\x85R."
    yield "stack global", b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R."
    yield "torch callable", b"\x80\x02ctorch.hub\nload\nX\x01\x00\x00\x00x\x85R."
    yield "pkgutil", b"\x80\x02cpkgutil\nresolve_name\nX\x09\x00\x00\x00os:system\x85R."
    yield "inst", b"\x80\x02(X\x04\x00\x00\x00trueios\nsystem\n."
    yield "ext", b"\x80\x02\x82\x01."


@pytest.mark.parametrize("legacy", [False, True])
def test_hostile_pickles_never_run(tmp_path, legacy):
    marker = tmp_path / "ran"
    for name, pickled in hostile_pickles(marker):
        path = tmp_path / f"{name.replace(' ', '')}.ckpt"
        if legacy:
            path.write_bytes(pickled)
        else:
            write_torch_zip(path, pickled)
        refusal(path)
        assert not marker.exists(), name


def tensor_pickle(size=(3,), stride=(1,), offset=0, numel=3, storage="FloatStorage"):
    """A hand-made pickle of {"w": tensor} over storage "0"."""

    def number(value):
        if isinstance(value, str):
            return b"X" + struct.pack("<I", len(value)) + value.encode()
        data = value.to_bytes(9, "little", signed=True)
        return b"\x8a\x09" + data

    def numbers(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    pid = (
        b"("
        + number("storage")
        + b"ctorch\n"
        + storage.encode()
        + b"\n"
        + number("0")
        + number("cpu")
        + number(numel)
        + b"tQ"
    )
    arguments = b"(" + pid + number(offset) + numbers(size) + numbers(stride) + b"\x89" + b"}" + b"t"
    return b"\x80\x02}" + number("w") + b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"Rs."


def test_hand_made_pickle_is_right_to_begin_with(tmp_path):
    write_torch_zip(tmp_path / "m.ckpt", tensor_pickle(), {"0": np.arange(3, dtype="f4").tobytes()})
    np.testing.assert_array_equal(read_all(tmp_path / "m.ckpt")["w"], np.arange(3))


@pytest.mark.parametrize(
    "wrong",
    [
        dict(size=("a",)),
        dict(size=(3, 3)),
        dict(stride=(1, 1)),
        dict(offset=1),
        dict(offset=-1),
        dict(size=(-3,)),
        dict(stride=(-1,)),
        dict(stride=(2,)),
        dict(size=(2**40,), stride=(0,)),
        dict(size=(2**62, 2**62), stride=(1, 1)),
        dict(numel=2**31 - 1),
        dict(numel=2),
        dict(numel=-1),
        dict(storage="QInt8Storage"),
    ],
)
def test_wrong_tensors_are_refused_without_using_memory(tmp_path, wrong):
    write_torch_zip(tmp_path / "m.ckpt", tensor_pickle(**wrong), {"0": np.arange(3, dtype="f4").tobytes()})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refusal(tmp_path / "m.ckpt")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


# Groups 11 to 14: hostile zip archives


def write_zip(path, records, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records:
            archive.writestr(name, data)


GOOD = [("m/data.pkl", tensor_pickle()), ("m/data/0", np.arange(3, dtype="f4").tobytes())]


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("records", "says"),
    [
        ([*GOOD, GOOD[1]], "twice"),
        ([*GOOD, ("other/data.pkl", b"x")], "data.pkl"),
        ([*GOOD, ("outside", b"x")], "outside"),
        ([*GOOD, ("m/../../evil", b"x")], "refused"),
        ([*GOOD, ("m/constants.pkl", b"x")], "TorchScript"),
        ([*GOOD, ("m/byteorder", b"middle")], "byte order"),
        ([GOOD[0]], "missing"),
        ([GOOD[0], ("m/data/0", b"1234")], "4 bytes"),
        ([("m/readme.txt", b"x")], "data.pkl"),
    ],
)
def test_hostile_archives_are_refused(tmp_path, records, says):
    write_zip(tmp_path / "m.ckpt", records)
    assert says in refusal(tmp_path / "m.ckpt")


def test_compressed_records_are_refused_before_they_are_inflated(tmp_path):
    write_zip(tmp_path / "m.ckpt", [GOOD[0], ("m/data/0", bytes(2**28))], zipfile.ZIP_DEFLATED)
    assert (tmp_path / "m.ckpt").stat().st_size < 2**20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "compressed" in refusal(tmp_path / "m.ckpt")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_encrypted_and_lying_records_are_refused(tmp_path):
    path = tmp_path / "m.ckpt"
    write_zip(path, GOOD)
    good = bytearray(path.read_bytes())
    directory = good.index(b"PK\x01\x02")
    encrypted = bytearray(good)
    encrypted[directory + 8] |= 1
    path.write_bytes(encrypted)
    assert "encrypted" in refusal(path)
    renamed = bytearray(good)
    at = renamed.index(b"m/data.pkl")
    renamed[at : at + 10] = b"m/date.pkl"
    path.write_bytes(renamed)
    assert "another name" in refusal(path)
    far = bytearray(good)
    far[directory + 42 : directory + 46] = struct.pack("<I", 2**31)
    path.write_bytes(far)
    refusal(path)
    last = good.rindex(b"PK\x01\x02")
    longer = bytearray(good)
    longer[last + 20 : last + 28] = struct.pack("<II", 2**31, 2**31)
    path.write_bytes(longer)
    refusal(path)


# Group 15: pickles that are bombs or nonsense


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".",
        b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.",  # a dict that holds itself
        b"\x80\x02h\x05.",
        b"\x80\x02R.",
        b"\x80\x02t.",
        b"\x80\x02}",
        b"\x80\x02X\xff\xff\xff\x7fabc.",
        b"\x80\x02X\x02\x00\x00\x00\xff\xfe.",
        b"\x80\x02\x8c\x02a",
        b"\x80\x02r\xff\xff\xff\x7f}.",
        b"\x80\x02K\x05.",
        b"\x80\x02].",
        b"\x80\x02}].",
        b"\x80\x02}(]K\x01u.",  # a list as a key
        b"",
        b"\xff" * 40,
        b"\x80\x02" + b"}X\x01\x00\x00\x00a" * 30 + b"K\x01" + b"s" * 30 + b".",
    ],
)
def test_nonsense_pickles_are_refused(tmp_path, pickled):
    write_torch_zip(tmp_path / "m.ckpt", pickled)
    refusal(tmp_path / "m.ckpt")


def test_doubling_dicts_do_not_explode(tmp_path):
    pickled = b"\x80\x02}q\x00"
    for level in range(40):
        inner = b"h" + bytes([level])
        pickled += b"}q" + bytes([level + 1]) + b"X\x01\x00\x00\x00a" + inner + b"sX\x01\x00\x00\x00b" + inner + b"s"
    write_torch_zip(tmp_path / "m.ckpt", pickled + b".")
    refusal(tmp_path / "m.ckpt")


# Groups 16 to 20: hostile .safetensors


def entry(begin=0, end=4, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ({"w": entry()}, b""),
        ({"w": entry()}, b"123"),
        ({"w": entry()}, b"12345"),
        ({"w": entry(0, 8)}, b"12345678"),
        ({"w": entry(4, 0)}, b"1234"),
        ({"w": entry(4, 8)}, b"12345678"),
        ({"a": entry(), "b": entry()}, b"1234"),
        ({"a": entry(), "b": entry(8, 12)}, bytes(12)),
        ({"w": entry(shape=(2**40, 2**40))}, b"1234"),
        ({"w": entry(shape=(-1, -1))}, b"1234"),
        ({"w": entry(shape=(1.0,))}, b"1234"),
        ({"w": entry(shape=("1",))}, b"1234"),
        ({"w": entry(dtype="C64", end=8)}, bytes(8)),
        ({"w": entry(dtype="NEW")}, b"1234"),
        ({"w": entry(dtype=["F32"])}, b"1234"),
        ({"w": entry() | {"extra": 1}}, b"1234"),
        ({"w": 5}, b""),
        ({}, b""),
        ({"__metadata__": {"a": 1}, "w": entry()}, b"1234"),
        ({"__metadata__": "text", "w": entry()}, b"1234"),
        (b'{"w":' + json.dumps(entry()).encode() + b',"w":' + json.dumps(entry(4, 8)).encode() + b"}", bytes(8)),
        (b"{not json", b""),
        (b'{"\xff\xfe": 1}', b""),
        (b"[" * 100_000, b""),
        (b"{" + b'"a":{' * 50_000, b""),
        (b"[]", b""),
        (b"  ", b""),
    ],
)
def test_wrong_safetensors_are_refused(tmp_path, header, data):
    path = tmp_path / "m.safetensors"
    write_raw_safetensors(path, header, data)
    refusal(path)


@pytest.mark.parametrize("length", [0, 1, 10**6, 100_000_001, 2**63, 2**64 - 1])
def test_wrong_header_lengths_are_refused(tmp_path, length):
    path = tmp_path / "m.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}" + bytes(100))
    refusal(path)


# Random damage


@pytest.fixture(scope="module")
def small_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    write_ckpt(folder / "m.ckpt", TENSORS)
    write_safetensors(folder / "m.safetensors", TENSORS)
    return [(folder / "m.ckpt").read_bytes(), (folder / "m.safetensors").read_bytes()]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    which=st.integers(0, 1),
    flips=st.lists(st.tuples(st.integers(0, 2**30), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_random_damage_never_escapes(small_files, tmp_path, which, flips):
    data = bytearray(small_files[which])
    for at, value in flips:
        data[at % len(data)] = value
    path = tmp_path / "m.bin"
    path.write_bytes(data)
    with contextlib.suppress(CheckpointError):
        read_all(path)
