"""Folders of diffusers' Flax classes: the same numbers as PyTorch's folders, and one clear line for what is damaged."""

import csv
import dataclasses
import gzip
import io
import json
import shutil
from pathlib import Path

import flax.serialization
import flax.traverse_util
import jax
import ml_dtypes
import msgpack
import numpy as np
import pytest
from hypothesis import given

import convert
import sdjax
from convert.__main__ import main
from convert.diffusers import needed_files
from convert.files.flax_msgpack import torch_name
from convert.files.open import open_source
from convert.files.source import CheckpointError
from convert.names import entries
from convert.write import write_diffusers
from sdjax.config import SD15, SD21
from sdjax.models.params import random_params
from tests.checkpoint_files import CHANGES, FUZZ, MB, damage, peak_memory, refusal, survive
from tests.flax_files import LINEAR, MODEL, WEIGHTS, flax_path, flax_tree, make_flax, read_tensors, tree_of, write_tree

PARTS = {"unet": "unet", "vae": "vae", "text_encoder": "text"}
UNET = "unet/diffusion_flax_model.msgpack"
TEXT = "text_encoder/flax_model.msgpack"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """config, dtype -> the same model as PyTorch's folder and as Flax'."""
    made = {}

    def make(config=MODEL, dtype="float32"):
        if (config.name, dtype) not in made:
            top = tmp_path_factory.mktemp("flax")
            write_diffusers(top / "torch", config, jax.tree.map(lambda a: a.astype(dtype), random_params(config)))
            made[config.name, dtype] = top / "torch", make_flax(shutil.copytree(top / "torch", top / "flax"))
        return made[config.name, dtype]

    return make


@pytest.fixture
def copied(folders, tmp_path):
    return Path(shutil.copytree(folders()[1], tmp_path / "model"))


def assert_same(found, expected):
    """Equal trees of equal bits."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert a.tobytes() == b.tobytes()


def published():
    """model, part, keys and shape of every parameter that diffusers' Flax classes have at full size."""
    text = gzip.decompress((Path(__file__).parent / "data" / "flax_names.tsv.gz").read_bytes()).decode()
    for row in csv.DictReader(io.StringIO(text), delimiter="\t"):
        yield row["model"], row["part"], tuple(row["name"].split("/")), tuple(map(int, row["shape"].split("x")))


# The numbers


@pytest.mark.parametrize(
    ("model", "part", "config", "count"),
    [
        ("sd15", "unet", SD15, 686),
        ("sd15", "vae", SD15, 248),
        ("sd15", "text_encoder", SD15, 196),
        ("sd21", "unet", SD21, 686),
    ],
)
def test_every_published_name_is_one_of_ours_at_full_size(model, part, config, count):
    """By name and shape, with nothing read."""
    theirs = {keys: shape for of, inside, keys, shape in published() if (of, inside) == (model, part)}
    assert len(theirs) == count
    ours = {entry.name: entry for entry in entries(config, PARTS[part], "diffusers")}
    for keys, shape in theirs.items():
        entry = ours.pop(torch_name(keys).removeprefix("text_model."))
        axes = {2: (1, 0), 4: (3, 2, 0, 1)}.get(len(shape)) if keys[-1] == "kernel" else None
        assert entry.accepts(tuple(shape[axis] for axis in axes) if axes else shape), keys
    assert not ours


def test_the_helper_that_writes_flax_folders_writes_the_published_names():
    for part in PARTS:
        theirs = {keys for model, inside, keys, _ in published() if (model, inside) == ("sd15", part)}
        prefix = "text_model." if part == "text_encoder" else ""
        written = {
            flax_path(prefix + entry.name, np.empty([1] * len(entry.shape)), part)
            for entry in entries(SD15, PARTS[part], "diffusers")
        }
        assert written == theirs


@pytest.mark.parametrize("config", [MODEL, LINEAR], ids=["sd1", "sd2"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_flax_folders_give_the_bits_of_pytorchs_folders(folders, config, dtype):
    torch_folder, flax_folder = folders(config, dtype)
    found, expected = convert.read(flax_folder, dtype="keep"), convert.read(torch_folder, dtype="keep")
    assert_same(found.params, expected.params)
    assert dataclasses.replace(found.config, name="") == dataclasses.replace(expected.config, name="")
    assert found.report.notes == []
    assert found.report.ignored == {}
    assert found.tokenizer == flax_folder / "tokenizer"


def test_load_takes_a_flax_folder_and_makes_the_picture_of_pytorchs(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("SDJAX_CACHE", str(tmp_path))
    pictures = [
        np.asarray(sdjax.load(folder).text_to_image("a lighthouse", steps=2, seed=3)[0]) for folder in folders()
    ]
    np.testing.assert_array_equal(*pictures)


def test_the_command_converts_a_flax_folder(folders, tmp_path):
    torch_folder, flax_folder = folders()
    for folder, name in ((torch_folder, "one"), (flax_folder, "two")):
        assert main([str(folder), str(tmp_path / f"{name}.safetensors"), "--to", "safetensors"]) == 0
    one, two = (read_tensors(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(one[name].tobytes() == two[name].tobytes() for name in one)


@pytest.mark.parametrize(
    "scheduler",
    ["FlaxDDIMScheduler", "FlaxDDPMScheduler", "FlaxDPMSolverMultistepScheduler", "FlaxLMSDiscreteScheduler"],
)
def test_every_flax_scheduler_of_this_diffusion_process_is_known(folders, tmp_path, scheduler):
    folder = make_flax(Path(shutil.copytree(folders()[0], tmp_path / "model")), scheduler)
    assert convert.configuration(folder).schedule == MODEL.schedule
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(file.read_text().replace(scheduler, "FlaxScoreSdeVeScheduler"))
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace(scheduler, "FlaxScoreSdeVeScheduler"))
    with pytest.raises(CheckpointError, match="ScoreSdeVeScheduler"):
        convert.configuration(folder)


def test_arrays_that_flax_stored_in_chunks_are_joined(folders, copied, monkeypatch):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 5000)
    write_tree(copied / UNET, tree_of(folders()[0], "unet"))
    assert b"__msgpack_chunked_array__" in (copied / UNET).read_bytes()
    assert_same(convert.read(copied).params, random_params(MODEL))


def test_the_state_of_a_training_gives_its_parameters(folders, copied):
    """`TrainState` of the training scripts: step, params, and an optimiser's moments of the same names."""
    tree = tree_of(folders()[0], "unet")
    moments = {"0": {"mu": tree, "count": np.int32(3)}}
    write_tree(copied / UNET, {"step": 3, "params": tree, "opt_state": moments})
    assert_same(convert.read(copied).params, random_params(MODEL))


def shard(folder, tree):
    """Writes a text encoder as transformers does with max_shard_size: an index with names joined by "/"."""
    flat = flax.traverse_util.flatten_dict(tree, sep="/")
    files = [f"flax_model-{place:05}-of-00002.msgpack" for place in (1, 2)]
    weight_map = {name: files[place % 2] for place, name in enumerate(flat)}
    for file in files:
        held = {name: array for name, array in flat.items() if weight_map[name] == file}
        write_tree(folder / file, flax.traverse_util.unflatten_dict(held, sep="/"))
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "flax_model.msgpack.index.json").write_text(json.dumps(index))
    return files


def test_shards_come_through_their_index(folders, copied):
    (copied / TEXT).unlink()
    files = shard(copied / "text_encoder", tree_of(folders()[0], "text_encoder"))
    assert_same(convert.read(copied).params, random_params(MODEL))
    there = [file.relative_to(copied).as_posix() for file in copied.rglob("*") if file.is_file()]
    assert {f"text_encoder/{name}" for name in ("flax_model.msgpack.index.json", *files)} <= set(
        needed_files("o/n", there)
    )
    (copied / "text_encoder" / files[1]).unlink()
    with pytest.raises(CheckpointError, match=f"the shard {files[1]} is missing"):
        convert.read(copied)


def test_where_pytorchs_weights_are_too_they_are_taken_and_flax_named_as_not(folders, tmp_path):
    folder = make_flax(Path(shutil.copytree(folders()[0], tmp_path / "model")), keep=True)
    for part, (_, flax_file) in WEIGHTS.items():
        tree = jax.tree.map(np.zeros_like, tree_of(folder, part))
        write_tree(folder / part / flax_file, tree)
    found = convert.read(folder)
    assert_same(found.params, random_params(MODEL))
    note = "unet: read diffusion_pytorch_model.safetensors; Flax' weights were not taken: diffusion_flax_model.msgpack"
    assert note in found.report.notes


def test_the_safety_checker_is_left_out(copied):
    (copied / "safety_checker").mkdir()
    (copied / "safety_checker" / "flax_model.msgpack").write_bytes(b"nobody reads this")
    index = json.loads((copied / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "FlaxStableDiffusionSafetyChecker"]
    (copied / "model_index.json").write_text(json.dumps(index))
    assert_same(convert.read(copied).params, random_params(MODEL))


def test_opening_holds_no_array_and_reading_one_at_a_time(copied):
    size = (copied / UNET).stat().st_size
    assert size > MB

    def opened():
        with open_source(copied / UNET) as source:
            for name in source.tensors:
                source.read(name)

    largest = 64 * 128 * 9 * 4
    assert peak_memory(opened) < 4 * largest < size


# What is damaged, or something else


def changed(tree, keys, value):
    """The tree with another value at these keys; None takes it out."""
    flat = flax.traverse_util.flatten_dict(tree)
    flat[keys] = value
    return flax.traverse_util.unflatten_dict({name: leaf for name, leaf in flat.items() if leaf is not None})


CONV = ("conv_in", "kernel")


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, "missing"),
        (np.zeros((3, 3, 4, 31), np.float32), r"expected \(32, 4, 3, 3\), found \(31, 4, 3, 3\)"),
        (np.zeros((32, 4, 3, 3), np.float32), r"expected \(32, 4, 3, 3\), found \(3, 3, 32, 4\)"),
        (np.zeros((3, 3, 4, 32), np.int32), "expected floating point, found I32"),
        (np.zeros((3, 3, 4, 32), np.complex64), "has the dtype complex64, which is not supported"),
        (np.zeros((3, 3, 4, 32), ml_dtypes.float8_e4m3b11fnuz), "has the dtype float8_e4m3b11fnuz"),
        (7, "missing"),
    ],
    ids=["missing", "shape", "PyTorch's layout", "int", "complex", "unknown", "number"],
)
def test_a_parameter_that_does_not_fit_is_named(copied, value, says):
    tree = flax.serialization.msgpack_restore((copied / UNET).read_bytes())
    write_tree(copied / UNET, changed(tree, CONV, value))
    with pytest.raises(CheckpointError, match=rf"conv_in\.weight.*{says}|{says}.*conv_in\.weight"):
        convert.read(copied)


@pytest.mark.parametrize("inside", ["unet", "vae", "text_encoder"])
def test_a_missing_file_is_named(copied, inside):
    (copied / inside / WEIGHTS[inside][1]).unlink()
    with pytest.raises(CheckpointError, match=rf"{inside}: no weights here; expected .*{WEIGHTS[inside][1]}, found"):
        convert.read(copied)


def test_a_single_file_is_called_the_part_that_it_is(copied, capsys, tmp_path):
    for file, says in (
        (UNET, "text width 16 is unknown"),
        ("vae/diffusion_flax_model.msgpack", "holds an autoencoder (VAE) and no UNet; give a whole checkpoint"),
        (TEXT, "holds a text encoder and no UNet; give a whole checkpoint"),
    ):
        assert main([str(copied / file), str(tmp_path / "out")]) == 2
        line = capsys.readouterr().err
        assert says in line
        assert line.count("\n") == 1
    with pytest.raises(CheckpointError, match=r"holds a UNet; the text encoder is missing; give it by --text-encoder"):
        convert.read(copied / UNET, config=MODEL)
    parts = dict(vae=copied / "vae", text_encoder=copied / TEXT)
    assert_same(convert.read(copied / UNET, config=MODEL, **parts).params, random_params(MODEL))


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.3, 0.7, 0.999])
def test_a_file_that_is_cut_off_is_refused(copied, tmp_path, share):
    data = (copied / UNET).read_bytes()
    file = tmp_path / "cut.msgpack"
    file.write_bytes(data[: max(int(len(data) * share), 20)])
    assert "the file is cut off" in refusal(file)


@pytest.mark.parametrize("share", [0.4, 0.9])
def test_a_file_whose_end_is_zeros_is_refused(copied, share):
    data = (copied / UNET).read_bytes()
    keep = int(len(data) * share)
    (copied / UNET).write_bytes(data[:keep] + bytes(len(data) - keep))
    with pytest.raises(CheckpointError, match=r"at byte \d+|zeros|cut off"):
        convert.read(copied)


def array(shape=(2,), dtype="float32", data=bytes(8), code=1):
    """An array as Flax packs it, right or wrong."""
    return msgpack.ExtType(code, msgpack.packb([list(shape), dtype, data], use_bin_type=True))


def names(depth):
    return {"a": names(depth - 1)} if depth else array()


HOSTILE = {
    "a map of two thousand million": (b"\x81\xa1a\xdf\x7f\xff\xff\xff" + bytes(8), "more than 100000 entries"),
    "a list of two thousand million": (b"\x81\xa1a\xdd\x7f\xff\xff\xff" + bytes(8), "more than 100000 entries"),
    "an array of 4 GB": (b"\x81\xa1a\xc9\xff\xff\xff\xff\x01\x93\x91\x01\xa7float32\xc6\xff\xff\xff\xf0", "cut off"),
    "maps in maps": (names(40), "nested more than 16 deep"),
    "lists in lists": (b"\x81\xa1a" + b"\x91" * 5000 + b"\xc0", "nested more than 16 deep"),
    "one name twice": (b"\x82\xa1a\xc0\xa1a\xc0", "is there twice"),
    "a number for a name": (b"\x82\xa1a\xc0\x01\xc0", "something else than a name"),
    "no UTF-8": (b"\x81\xa1\xff\xc0" + bytes(20), "not UTF-8"),
    "a code that does not exist": (b"\x81\xa1a\xc1" + bytes(20), "the code 0xc1"),
    "bytes behind": (msgpack.packb({"a": array()}) + b"more", "4 bytes behind"),
    "too few numbers": ({"a": array((3,))}, "has 8 bytes; the shape (3,) in float32 needs 12"),
    "a shape without end": ({"a": array((2**40, 2**40))}, "which is too large"),
    "a shape below zero": ({"a": array((-2,))}, "something else than sizes"),
    "no dtype": ({"a": array(dtype=7)}, "something else than a name"),
    "no bytes": ({"a": array(data=[1, 2])}, "an array without bytes"),
    "something behind an array": (
        {"a": msgpack.ExtType(1, msgpack.packb([[2], "float32", bytes(8)]) + b"\x00")},
        "longer or shorter",
    ),
    "chunks that are missing": (
        {"a": {"__msgpack_chunked_array__": True, "shape": {"0": 4}, "chunks": {"1": array()}}},
        "chunks that do not fit together",
    ),
    "no arrays": ({"step": 3, "name": "x"}, "holds no tensors, but step (int), name (str)"),
    "a line break in a name": ({"a\nb": array()}, "refused, no tensor has such a name"),
    "two of one name": ({"a": {"kernel": array(), "scale": array()}}, "two tensors are called 'a.weight'"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_end_in_one_line_and_little_memory(tmp_path, kind):
    content, says = HOSTILE[kind]
    file = tmp_path / "x.msgpack"
    file.write_bytes(content if isinstance(content, bytes) else msgpack.packb(content))
    assert says in refusal(file, memory=24 * MB)


SMALL_FILE = msgpack.packb(
    {
        "conv_in": {"kernel": array((1, 2, 1, 1)), "bias": array((4,), "bfloat16")},
        "list": [1, 2.0, None, True, "text", b"bytes", -70000, 2**40],
        "chunks": {"__msgpack_chunked_array__": True, "shape": {"0": 4}, "chunks": {"0": array(), "1": array()}},
        "other": msgpack.ExtType(2, b"complex"),
    }
)


@FUZZ
@given(CHANGES)
def test_no_damage_ends_in_anything_but_arrays_or_a_refusal(tmp_path, changes):
    file = tmp_path / "x.msgpack"
    file.write_bytes(damage(SMALL_FILE, changes))
    survive(file)


def test_what_is_no_array_is_passed_over_and_named(tmp_path):
    file = tmp_path / "x.msgpack"
    file.write_bytes(SMALL_FILE)
    with open_source(file) as source:
        assert source.format == "flax"
        assert list(source.tensors) == ["conv_in.weight", "conv_in.bias", "chunks"]
        assert source.skipped == {"list": "a list of 8", "other": "complex"}
        assert source.tensors["conv_in.weight"] == ("F32", (1, 1, 1, 2))


def test_a_scalar_is_an_array_without_axes(tmp_path):
    file = tmp_path / "x.msgpack"
    write_tree(file, {"logit_scale": np.float32(2.5), "count": np.asarray(3)})
    with open_source(file) as source:
        assert source.read("logit_scale") == np.float32(2.5)
        assert source.read("count") == 3


def test_the_order_of_names_makes_no_difference(folders, copied):
    tensors = dict(reversed(read_tensors(folders()[0] / "vae" / WEIGHTS["vae"][0]).items()))
    write_tree(copied / "vae" / WEIGHTS["vae"][1], flax_tree(tensors, "vae"))
    assert_same(convert.read(copied).params, random_params(MODEL))
