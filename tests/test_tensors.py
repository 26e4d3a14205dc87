"""Files of tensors: the bytes that the safetensors package writes, whatever the file system can; damage is refused."""

import errno
import fcntl
import os
import threading

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sdjax.storage import tensors
from sdjax.storage.tensors import Tensor

BLOCK = 2**13


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(tensors, "BLOCK", BLOCK)


def some_arrays():
    generator = np.random.default_rng(0)
    shapes = {"b/kernel": (3, 3, 70, 41), "a/kernel": (1000,), "a/bias": (), "none": (0, 4), "c/kernel": (BLOCK // 4,)}
    dtypes = (np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.uint8)
    return {
        f"{np.dtype(dtype).name}/{name}": np.asarray(generator.integers(0, 100, shape), dtype)
        for dtype in dtypes
        for name, shape in shapes.items()
    }


def listed(arrays):
    return tensors.sorted_by_dtype(
        Tensor(name, array.dtype, array.shape, lambda array=array: array) for name, array in arrays.items()
    )


def assert_same(found, arrays):
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("metadata", [None, {"made": "here"}])
def test_a_file_has_the_bytes_of_the_safetensors_package(tmp_path, metadata):
    arrays = some_arrays()
    tensors.write(tmp_path / "ours", listed(arrays), metadata)
    save_file(arrays, tmp_path / "theirs", metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_what_was_written_is_read_tensor_by_tensor(tmp_path):
    arrays = some_arrays()
    tensors.write(tmp_path / "m", listed(arrays))
    assert_same(load_file(tmp_path / "m"), arrays)
    found = {name: tensors.read(tmp_path / "m", place) for name, place in tensors.places(tmp_path / "m").items()}
    assert_same(found, arrays)
    assert not any(array.ctypes.data % tensors.ALIGNED for array in found.values() if array.size)


def refuse_to_open(monkeypatch):
    """As file systems in memory of older kernels do."""
    whole = os.open

    def opened(path, flags, *rest, **named):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return whole(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", opened)


def refuse_to_write(monkeypatch):
    """As one whose sectors are larger than a page."""
    whole = os.pwrite

    def written(handle, data, at):
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return whole(handle, data, at)

    monkeypatch.setattr(os, "pwrite", written)


def write_a_part(monkeypatch):
    """As one may at any time."""
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, data, at: whole(handle, data[: len(data) // 2 + 1], at))


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 9 * BLOCK, 10 * BLOCK + 4095])
@pytest.mark.parametrize("system", [lambda _: None, refuse_to_open, refuse_to_write, write_a_part])
def test_parts_of_any_size_are_written_whole(tmp_path, monkeypatch, system, size):
    data = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    cuts = sorted(np.random.default_rng(1).integers(0, size + 1, 7))
    system(monkeypatch)
    tensors.write_parts(tmp_path / "m", np.split(data, cuts))
    assert (tmp_path / "m").read_bytes() == data.tobytes()


def test_a_longer_file_of_the_same_name_leaves_nothing_behind(tmp_path):
    (tmp_path / "m").write_bytes(b"x" * 3 * BLOCK)
    tensors.write_parts(tmp_path / "m", [np.zeros(BLOCK + 1, np.uint8)])
    assert (tmp_path / "m").read_bytes() == bytes(BLOCK + 1)


def test_a_full_disk_is_an_error(tmp_path, monkeypatch):
    whole = os.pwrite

    def written(handle, data, at):
        if at >= 2 * BLOCK:
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(handle, data, at)

    monkeypatch.setattr(os, "pwrite", written)
    for size in (2 * BLOCK + 1, 9 * BLOCK):  # in the rest, and in a whole block
        with pytest.raises(OSError, match="No space left"):
            tensors.write_parts(tmp_path / "m", [np.zeros(size, np.uint8)])


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("ahead", [0, 10, 35])
def test_no_more_is_made_ahead_than_was_said(ahead, workers):
    sizes = [10, 3, 40, 1, 1, 1, 20, 20, 5] * 5
    made, lock = [], threading.Lock()

    def make(at):
        with lock:
            made.append(at)
        return at

    calls = ((size, lambda at=at: make(at)) for at, size in enumerate(sizes))
    for expected, at in enumerate(tensors.in_order(calls, workers, ahead)):
        assert at == expected
        with lock:
            waiting = [sizes[i] for i in made if i > at]
        assert len(waiting) <= 1 or sum(waiting) <= ahead * workers
    assert sorted(made) == list(range(len(sizes)))


def test_the_rest_is_not_made_after_an_error(tmp_path):
    made = []

    def fail():
        raise ValueError("too large")

    later = [Tensor(f"t{i}", np.dtype("f4"), (2**23,), lambda i=i: made.append(i)) for i in range(20)]
    with pytest.raises(ValueError, match="too large"):
        tensors.write(tmp_path / "m", [Tensor("first", np.dtype("f4"), (1,), fail), *later])
    assert len(made) <= tensors.AHEAD // 2**25


def test_a_tensor_that_is_not_what_was_said_is_refused(tmp_path):
    for array in (np.zeros(3, "f4"), np.zeros(2, "f2")):
        with pytest.raises(ValueError, match="t: float"):
            tensors.write(tmp_path / "m", [Tensor("t", np.dtype("f4"), (2,), lambda array=array: array)])


def test_damage_is_refused(tmp_path):
    file = tmp_path / "m"
    save_file({"a": np.ones(1000, "f4"), "b": np.ones(3, "f4")}, file)
    place, whole = tensors.places(file)["b"], file.read_bytes()
    for damaged in (b"", whole[:7], whole[:50], whole[:-1], whole + b"x", b"\xff" * 8 + whole[8:]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError):
            tensors.places(file)
    file.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="cut off"):
        tensors.read(file, place)
