"""Readers of single files: what people have is read as torch reads it, in whatever container."""

import os
import sys
import zipfile
from argparse import Namespace
from collections import OrderedDict, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from types import ModuleType
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from convert.files.open import open_source
from convert.files.source import CheckpointError
from tests.checkpoint_files import (
    lightning_class,
    peak_memory,
    read_all,
    tensor_pickle,
    to_torch,
    write_ckpt,
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
    "g.float8": RNG.standard_normal(4).astype(ml_dtypes.float8_e4m3fn),
    "h.empty": np.zeros((0, 3), "f4"),
    "i.mask": np.array([True, False]),
    "j.bytes": np.arange(3, dtype="u1"),
    "k.uint16": np.arange(3, dtype="u2"),
}
OLD_TENSORS = {name: array for name, array in TENSORS.items() if name not in ("g.float8", "k.uint16")}
WEIGHT = np.arange(3, dtype="f4")


def assert_equal(found, expected):
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()
        assert found[name].flags.c_contiguous
        assert found[name].flags.writeable


def assert_as_torch_reads(path):
    expected = torch.load(path, weights_only=True, map_location="cpu")
    found = read_all(path)
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(to_torch(found[name]), tensor.detach()), name
        assert found[name].flags.c_contiguous


@pytest.fixture(params=["ckpt", "ckpt-legacy", "safetensors"])
def any_format(request, tmp_path):
    """The format, a file in it, and what it holds."""
    path = tmp_path / "model.bin"
    tensors = OLD_TENSORS if request.param == "ckpt-legacy" else TENSORS
    if request.param == "safetensors":
        write_safetensors(path, tensors)
    else:
        write_ckpt(path, tensors, legacy=request.param == "ckpt-legacy")
    return request.param, path, tensors


def test_every_format_gives_every_dtype_bit_for_bit(any_format):
    name, path, tensors = any_format
    assert_equal(read_all(path), tensors)
    with open_source(path) as source:
        assert source.format == name
        assert source.path == path
        assert source.tensors["c.bf16"] == ("BF16", (5,))
        assert [info.shape for info in source.tensors.values()] == [array.shape for array in tensors.values()]


def test_content_and_not_the_name_says_what_a_file_is(tmp_path):
    write_safetensors(tmp_path / "m.ckpt", TENSORS)
    write_ckpt(tmp_path / "m.safetensors", TENSORS)
    assert_equal(read_all(tmp_path / "m.ckpt"), TENSORS)
    assert_equal(read_all(tmp_path / "m.safetensors"), TENSORS)


def test_threads_read_the_same_as_one(any_format):
    _, path, tensors = any_format
    with open_source(path) as source, ThreadPoolExecutor(8) as pool:
        names = list(source.tensors) * 50
        for name, array in zip(names, pool.map(source.read, names), strict=True):
            assert array.tobytes() == tensors[name].tobytes()


def test_arrays_are_the_readers_own(any_format):
    _, path, _ = any_format
    before = path.read_bytes()
    with open_source(path) as source:
        first = source.read("a.weight")
        first[:] = 0
        second = source.read("a.weight")
        with pytest.raises(KeyError):
            source.read("no such name")
    np.testing.assert_array_equal(second, TENSORS["a.weight"])
    assert path.read_bytes() == before


@pytest.mark.parametrize("write", [write_ckpt, write_safetensors])
def test_closing_twice_is_safe_and_reading_afterwards_is_refused(tmp_path, write):
    write(tmp_path / "m", TENSORS)
    with open_source(tmp_path / "m") as source:
        pass
    other = os.open(tmp_path / "m", os.O_RDONLY)  # takes the number that the closed file had
    source.close()
    os.close(other)
    with pytest.raises(ValueError, match="closed"):
        source.read("a.weight")


@pytest.mark.parametrize("write", [write_ckpt, write_safetensors])
def test_reading_holds_one_tensor_at_a_time(tmp_path, write):
    write(tmp_path / "m", {f"w{i}": np.full((256, 1024), i, "f4") for i in range(8)})  # 1 MB each

    def read_one_by_one():
        with open_source(tmp_path / "m") as source:
            for i, name in enumerate(source.tensors):
                assert source.read(name)[0, 0] == i

    assert peak_memory(read_one_by_one) < 2.5 * 2**20


def test_a_file_that_gets_shorter_while_it_is_open_is_named(tmp_path):
    path = tmp_path / "m.safetensors"
    write_safetensors(path, {"w": np.ones(1000, "f4")})
    with open_source(path) as source:
        os.truncate(path, 1000)
        with pytest.raises(CheckpointError, match=r"m\.safetensors: ends before"):
            source.read("w")


# .ckpt


def test_ckpt_of_lightning_is_read_without_torch(tmp_path, monkeypatch):
    write_ckpt(tmp_path / "m.ckpt", TENSORS, lightning=True)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert_equal(read_all(tmp_path / "m.ckpt"), TENSORS)
    with open_source(tmp_path / "m.ckpt") as source:
        assert source.metadata == {"global_step": "840000"}
        assert source.skipped == {
            "epoch": "840",
            "global_step": "840000",
            "pytorch-lightning_version": "'1.4.2'",
            "callbacks": "dict",
            "lr_schedulers": "list",
        }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_of_torch_is_read(tmp_path, protocol):
    with lightning_class() as model_checkpoint:
        state = OrderedDict((name, to_torch(array)) for name, array in TENSORS.items())
        torch.save({"state_dict": state, "callbacks": {model_checkpoint: 1}}, tmp_path / "m", pickle_protocol=protocol)
    assert_equal(read_all(tmp_path / "m"), TENSORS)


def test_views_shared_storages_and_parameters_are_read_as_torch_reads_them(tmp_path):
    base = torch.arange(60.0).reshape(5, 12)
    attributed = torch.nn.Parameter(base[2:3].clone())
    attributed.note = "x"
    noted = base[3:4].clone()
    noted.note = "x"
    state = OrderedDict(
        transposed=base.T,
        row=base[2],
        strided=base[1:4, ::3],
        diagonal=base.diagonal(),
        permuted=base.reshape(5, 3, 4).permute(2, 0, 1),
        channels_last=base.reshape(1, 5, 3, 4).contiguous(memory_format=torch.channels_last),
        last=base[-1, -1],
        whole=base,
        expanded=torch.ones(2, 1).expand(2, 3),
        parameter=torch.nn.Parameter(base[:1].clone()),
        attributed=attributed,
        noted=noted,
        empty=torch.zeros(0, 3),
        empty_view=base[5:, ::2],
    )
    state._metadata = {"": {"version": 1}}
    torch.save(state, tmp_path / "m.ckpt")
    assert_as_torch_reads(tmp_path / "m.ckpt")
    torch.save(state, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    assert_as_torch_reads(tmp_path / "old.ckpt")


def test_only_the_part_of_a_storage_that_a_view_needs_is_read(tmp_path):
    base = torch.arange(2.0**20)
    torch.save({"w": base[1000:1003]}, tmp_path / "m.ckpt")
    assert (tmp_path / "m.ckpt").stat().st_size > 2**22
    assert peak_memory(lambda: read_all(tmp_path / "m.ckpt")) < 2**20
    np.testing.assert_array_equal(read_all(tmp_path / "m.ckpt")["w"], [1000, 1001, 1002])


def test_tensors_saved_on_a_gpu_are_read(tmp_path):
    torch.save({"w": torch.arange(3.0)}, tmp_path / "m.ckpt")
    with zipfile.ZipFile(tmp_path / "m.ckpt") as archive:
        pickle = archive.read("m/data.pkl").replace(b"\x03\0\0\0cpu", b"\x06\0\0\0cuda:0")
    write_torch_zip(tmp_path / "m.ckpt", pickle, {"0": WEIGHT.tobytes()})
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(tmp_path / "m.ckpt", weights_only=True)
    assert_as_torch_reads(tmp_path / "m.ckpt")


def test_big_endian_records_are_swapped(tmp_path):
    write_torch_zip(tmp_path / "m.ckpt", tensor_pickle(), {"0": WEIGHT.astype(">f4").tobytes()}, byteorder="big")
    np.testing.assert_array_equal(read_all(tmp_path / "m.ckpt")["w"], WEIGHT)


@pytest.mark.parametrize("folder", ["archive", "модель", "a b.c"])
@pytest.mark.parametrize("zip64", [False, True])
def test_zip64_fields_and_any_folder_name_are_read(tmp_path, monkeypatch, folder, zip64):
    if zip64:
        monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1)  # so that every number goes into the wide fields
    write_torch_zip(tmp_path / "m.ckpt", tensor_pickle(), {"0": WEIGHT.tobytes()}, folder=folder)
    assert (b"PK\x06\x06" in (tmp_path / "m.ckpt").read_bytes()) == zip64
    np.testing.assert_array_equal(read_all(tmp_path / "m.ckpt")["w"], WEIGHT)


def test_archive_packed_again_without_compression_is_read(tmp_path):
    write_ckpt(tmp_path / "m.ckpt", TENSORS)
    with zipfile.ZipFile(tmp_path / "m.ckpt") as old, zipfile.ZipFile(tmp_path / "again.ckpt", "w") as new:
        new.mkdir("m")
        for name in sorted(old.namelist()):
            new.writestr(name, old.read(name))
    assert_equal(read_all(tmp_path / "again.ckpt"), TENSORS)


# What lies around the tensors


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tensors: tensors,
        lambda tensors: {"state_dict": tensors},
        lambda tensors: {"state_dict": {**tensors, "state_dict": {}}, "epoch": 3},
        lambda tensors: {"model": tensors},
        lambda tensors: {"params": OrderedDict(tensors)},
        lambda tensors: {"state_dict": {"state_dict": tensors}},
        lambda tensors: {"state_dict": {"module": tensors}, "global_step": 7},
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_wrappers_are_opened(tmp_path, wrap, legacy):
    state = wrap({"w": torch.ones(2), "b.c": torch.ones(3)})
    torch.save(state, tmp_path / "m.ckpt", _use_new_zipfile_serialization=not legacy)
    with open_source(tmp_path / "m.ckpt") as source:
        assert list(source.tensors) == ["w", "b.c"]
        assert source.metadata == ({"global_step": "7"} if "global_step" in state else {})


def test_nested_dicts_become_dotted_names_and_other_values_are_named(tmp_path):
    state = {
        "w": torch.ones(2),
        "step": 5,
        "name": "x",
        "none": None,
        "scale": 0.5,
        "list": [torch.ones(2)],
        "numpy": np.float64(2),
        "array": np.ones(3),
        "inner": {"v": torch.ones(2), 7: {"u": torch.ones(2)}},
    }
    torch.save(state, tmp_path / "m.ckpt")
    with open_source(tmp_path / "m.ckpt") as source:
        assert list(source.tensors) == ["w", "inner.v", "inner.7.u"]
        assert source.skipped == {
            "step": "5",
            "name": "'x'",
            "none": "None",
            "scale": "0.5",
            "list": "list",
            "numpy": f"{np.float64.__reduce__(np.float64(2))[0].__module__}.scalar",
            "array": f"{np.ndarray.__reduce__(np.ones(3))[0].__module__}._reconstruct",
        }


def test_objects_of_a_training_run_beside_the_weights_do_no_harm(tmp_path):
    config = type("DictConfig", (dict,), {"__module__": "omegaconf.dictconfig"})
    modules = {name: ModuleType(name) for name in ("omegaconf", "omegaconf.dictconfig")}
    modules["omegaconf.dictconfig"].DictConfig = config
    state = {
        "state_dict": {"w": torch.ones(2)},
        "hyper_parameters": {
            "arguments": Namespace(rate=1e-4),
            "config": config(a=config(b=1)),
            "path": PurePosixPath("/x"),
            "counts": defaultdict(int, a=1),
            "seen": {1, 2},
            "frozen": frozenset({1}),
            "numbers": (1, -1, 2**40, -(2**70), 1.5, True, b"x", bytearray(b"y"), "z" * 300),
            "device": torch.device("cpu"),
            "size": torch.Size([1, 2]),
            "dtype": torch.float16,
            "scalar": np.float32(1),
            "array": np.arange(4),
        },
        "optimizer_states": [
            {"state": {0: {"step": 1, "exp_avg": torch.ones(2)}}, "param_groups": [{"betas": (0, 1)}]}
        ],
    }
    with mock.patch.dict(sys.modules, modules):
        for protocol in (2, 4):
            torch.save(state, tmp_path / "m.ckpt", pickle_protocol=protocol)
            with open_source(tmp_path / "m.ckpt") as source:
                assert list(source.tensors) == ["w"]
                assert source.skipped == {"hyper_parameters": "dict", "optimizer_states": "list"}


# .ckpt from before torch 1.6


def test_legacy_ckpt_without_torch_says_how_to_get_it(tmp_path, monkeypatch):
    write_ckpt(tmp_path / "m.ckpt", OLD_TENSORS, legacy=True)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch", None)
        with pytest.raises(CheckpointError, match=r"m\.ckpt: .*pip install"):
            open_source(tmp_path / "m.ckpt")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(CheckpointError, match=r"torch 2\.9\.1\+cpu has known holes.*pip install"):
        open_source(tmp_path / "m.ckpt")
    monkeypatch.setattr(torch, "__version__", "2.10.0a0+git1")
    assert_equal(read_all(tmp_path / "m.ckpt"), OLD_TENSORS)


# .safetensors


@pytest.mark.parametrize("old_writer", [False, True])
def test_safetensors_is_read_aligned_or_not(tmp_path, old_writer):
    tensors = {"odd": np.arange(3, dtype="u1"), **TENSORS}  # so that what follows is not aligned
    write_safetensors(tmp_path / "m", tensors, old_writer=old_writer, metadata={"format": "pt", "note": "ü"})
    assert_equal(read_all(tmp_path / "m"), tensors)
    with open_source(tmp_path / "m") as source:
        assert source.metadata == {"format": "pt", "note": "ü"}


def test_safetensors_of_its_own_library_is_read(tmp_path):
    tensors = {name: to_torch(array) for name, array in TENSORS.items()}
    save_file(tensors, tmp_path / "m.safetensors", metadata={"format": "pt"})
    found = read_all(tmp_path / "m.safetensors")
    assert_equal({name: found[name] for name in TENSORS}, TENSORS)
    assert list(found) == list(load_file(tmp_path / "m.safetensors"))


def test_flattened_state_dict_prefix_is_stripped(tmp_path):
    write_safetensors(tmp_path / "m", {f"state_dict.{name}": array for name, array in TENSORS.items()})
    assert_equal(read_all(tmp_path / "m"), TENSORS)


def test_header_may_begin_with_a_space(tmp_path):
    write_safetensors(tmp_path / "m", TENSORS)
    data = (tmp_path / "m").read_bytes()
    length = int.from_bytes(data[:8], "little")
    (tmp_path / "m").write_bytes((length + 1).to_bytes(8, "little") + b" " + data[8:])
    assert_equal(read_all(tmp_path / "m"), TENSORS)
