"""Our own checkpoint: bits kept, nothing half-written, nothing read that should not be."""

import dataclasses
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sdjax.config import TINY
from sdjax.models.params import DTYPES, cast, dtype_of, random_params
from sdjax.storage import checkpoint, files


@pytest.fixture(scope="module", params=[False, True], ids=["orbax", "one_file"])
def saved(request, tmp_path_factory, tiny_params):
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    checkpoint.save(path, TINY, tiny_params, one_file=request.param)
    return path


@pytest.fixture
def copied(saved, tmp_path):
    checkpoint.save(tmp_path / "m", TINY, random_params(TINY))
    return tmp_path / "m"


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


def test_restoring_gives_the_same_bits(saved, tiny_params):
    config, params = checkpoint.restore(saved)
    assert config == TINY
    assert jax.tree.structure(params) == jax.tree.structure(dict(tiny_params))
    assert_same(params, tiny_params)


@pytest.mark.parametrize("one_file", [False, True])
def test_what_was_checked_when_it_was_written_is_not_checked_again(tmp_path, one_file, tiny_params, monkeypatch):
    checkpoint.save(tmp_path / "m", TINY, tiny_params, one_file=one_file)
    whole, checked = (tmp_path / "m" / "seal").read_text(), []
    monkeypatch.setattr(checkpoint, "_check_tree", lambda *args: checked.append(args))

    def checks(seal):
        checked.clear()
        (tmp_path / "m" / "seal").write_text(seal)
        seen = []
        config, params = checkpoint.restore(tmp_path / "m", on_shapes=lambda *args: seen.append(args))
        assert_same(params, tiny_params)
        assert seen[0][0] == config
        assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, seen[0][1])
        return len(checked)

    assert checks(whole) == 0
    assert checks("something else") == 1
    (tmp_path / "m" / "config.json").write_text(dataclasses.replace(TINY, image_size=16).to_json())
    assert checks(whole) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_restoring_casts_by_the_policy(saved, dtype, tiny_params):
    _, params = checkpoint.restore(saved, dtype=dtype)
    assert_same(params, jax.tree.map(np.asarray, cast(tiny_params, dtype)))
    vae = "float32" if dtype == "float16" else dtype
    assert params["vae"]["quant_conv"]["bias"].dtype == vae
    assert params["unet"]["conv_in"]["bias"].dtype == dtype


def test_bfloat16_is_kept(tmp_path):
    params = random_params(TINY, dtype="bfloat16")
    checkpoint.save(tmp_path / "m", TINY, params)
    assert_same(checkpoint.restore(tmp_path / "m")[1], params)


def test_restoring_places_leaves_as_asked(saved):
    mesh = jax.make_mesh((4,), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec())
    _, params = checkpoint.restore(saved, sharding=lambda leaf: sharding)
    assert params["unet"]["conv_in"]["kernel"].sharding == sharding


def test_of_a_divided_leaf_each_device_gets_its_part(saved, tiny_params):
    mesh = jax.make_mesh((2,), ("model",))
    sharding = NamedSharding(mesh, PartitionSpec(None, None, None, "model"))
    whole = NamedSharding(mesh, PartitionSpec())

    def placed(leaf):
        return sharding if len(leaf.shape) == 4 and leaf.shape[-1] % 2 == 0 else whole

    _, params = checkpoint.restore(saved, sharding=placed)
    kernel = params["unet"]["conv_in"]["kernel"]
    assert [shard.data.shape[-1] for shard in kernel.addressable_shards] == [kernel.shape[-1] // 2] * 2
    assert_same(params, tiny_params)


def test_parameters_in_one_file_are_read_when_they_are_asked_for(tmp_path, tiny_params):
    checkpoint.save(tmp_path / "m", TINY, tiny_params, one_file=True)
    file = tmp_path / "m" / checkpoint.TENSORS
    later = checkpoint.later_tensors(file)
    assert_same(later, tiny_params)
    file.write_bytes(file.read_bytes()[:-1])
    last = max(jax.tree.leaves(later), key=lambda leaf: leaf.place.begin)
    with pytest.raises(ValueError, match=r"params\.safetensors: the parameters cannot be read \(the file is cut off\)"):
        np.asarray(last)
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoint.restore(tmp_path / "m")


def test_pieces_are_put_together(tmp_path, monkeypatch, tiny_params):
    monkeypatch.setattr(checkpoint, "PIECE", 2**21)
    checkpoint.save(tmp_path / "m", TINY, tiny_params)
    assert_same(checkpoint.restore(tmp_path / "m")[1], tiny_params)
    assert {path.name for path in (tmp_path / "m").iterdir()} == {"config.json", "params", "seal"}


def test_existing_checkpoints_are_kept_unless_forced(copied, tiny_params):
    (copied / "mine.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="--force"):
        checkpoint.save(copied, TINY, tiny_params)
    assert (copied / "mine.txt").read_text() == "precious"
    checkpoint.save(copied, TINY, tiny_params, force=True)
    assert not (copied / "mine.txt").exists()
    assert [path.name for path in copied.parent.iterdir()] == ["m"]


def test_failing_leaves_the_old_checkpoint_and_nothing_else(copied):
    class Broken:
        shape, dtype = (4,), np.dtype("float32")

        def __array__(self, dtype=None, copy=None):
            raise OSError("disk full")

    params = random_params(TINY)
    params["unet"]["conv_out"]["bias"] = Broken()
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(copied, TINY, params, force=True)
    assert [path.name for path in copied.parent.iterdir()] == ["m"]
    checkpoint.restore(copied)


def test_an_interruption_in_the_last_step_leaves_the_old_checkpoint_in_its_place(copied, monkeypatch):
    rename = Path.rename
    (copied / "mine.txt").touch()

    def interrupted(path, to):
        if path.name.endswith(".partial"):
            raise KeyboardInterrupt
        return rename(path, to)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), files.new_folder(copied, force=True):
        patch.setattr(Path, "rename", interrupted)
    assert [path.name for path in copied.parent.iterdir()] == ["m"]
    assert (copied / "mine.txt").exists()


def test_a_tree_of_another_model_is_refused(tmp_path, tiny_params):
    params = {part: dict(tree) for part, tree in tiny_params.items()}
    params["unet"] = {name: tree for name, tree in params["unet"].items() if name != "conv_in"}
    with pytest.raises(ValueError, match=r"2 differences; unet/conv_in/bias: expected \(32,\), found nothing"):
        checkpoint.save(tmp_path / "m", TINY, params)
    assert list(tmp_path.iterdir()) == []


def test_a_config_that_does_not_fit_is_refused(copied):
    wider = dataclasses.replace(TINY, unet=dataclasses.replace(TINY.unet, in_channels=9))
    (copied / "config.json").write_text(wider.to_json())
    with pytest.raises(ValueError, match="unet/conv_in/kernel"):
        checkpoint.restore(copied)


@pytest.mark.parametrize("content", ["{", "[]", '{"name": "x"}'])
def test_damaged_configs_are_named(copied, content):
    (copied / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        checkpoint.restore(copied)


def test_symbolic_links_are_refused(copied, tmp_path):
    (tmp_path / "secret").write_bytes(b"x" * 100)
    victim = next(path for path in sorted((copied / "params").rglob("*")) if path.is_file())
    victim.unlink()
    os.symlink(tmp_path / "secret", victim)
    with pytest.raises(ValueError, match="symbolic link"):
        checkpoint.restore(copied)


def test_damaged_data_is_named(copied):
    for path in (copied / "params").rglob("*"):
        if path.is_file() and path.stat().st_size > 100_000:
            path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoint.restore(copied)


def test_other_folders_are_no_checkpoints(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint here"):
        checkpoint.restore(tmp_path)
    with pytest.raises(ValueError, match="dtype must be one of"):
        dtype_of("unet", "int8")
