"""Checkpoints of maxdiffusion, written by Orbax as its source writes them; other folders of Orbax are called that."""

import os
import shutil
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import convert
import sdjax
from convert.__main__ import main
from convert.files.source import CheckpointError
from convert.write import write_diffusers
from sdjax.models.params import random_params
from tests.flax_files import LINEAR, MODEL, make_flax, write_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    top = tmp_path_factory.mktemp("maxdiffusion")
    write_diffusers(top / "model", MODEL, random_params(MODEL))
    return make_flax(top / "model", "FlaxDDIMScheduler", keep=True)


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run") / "checkpoints", folder)


@pytest.fixture
def copied(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "checkpoints"))


def assert_same(found, expected):
    """Equal trees of equal bits."""
    assert jax.tree.structure(found) == jax.tree.structure(dict(expected))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert np.array_equal(a, b)


@pytest.mark.parametrize("inside", ["checkpoints", "checkpoints/800"])
def test_a_run_gives_the_bits_of_its_parameters(run, inside, monkeypatch):
    monkeypatch.chdir(run.parent)
    found = convert.read(inside)
    assert_same(found.params, random_params(MODEL))
    assert found.config.unet == MODEL.unet
    assert found.config.schedule == MODEL.schedule
    assert found.report.format == "maxdiffusion"
    assert "what is for training on was left out: opt_state, step" in found.report.notes
    assert "maxdiffusion's checkpoint of step 800; prompts are read with CLIP's own tokenizer" in found.report.notes


def test_stable_diffusion_2_and_bfloat16_come_through(tmp_path):
    params = jax.tree.map(lambda a: a.astype("bfloat16"), random_params(LINEAR))
    write_diffusers(tmp_path / "model", LINEAR, params)
    run = write_run(tmp_path / "a run#1", make_flax(tmp_path / "model", "FlaxDDIMScheduler", keep=True))
    found = convert.read(run, dtype="keep")
    assert_same(found.params, convert.read(tmp_path / "model", dtype="keep").params)
    assert found.config.schedule.prediction == "v"


def test_of_several_steps_the_latest_is_taken(folder, tmp_path):
    run = write_run(tmp_path / "run", folder, steps=(9, 10))
    assert_same(convert.read(run).params, jax.tree.map(lambda a: a * 2, random_params(MODEL)))
    assert_same(convert.read(run / "9").params, random_params(MODEL))


def test_load_and_the_command_take_a_run(run, tmp_path, monkeypatch):
    monkeypatch.setenv("SDJAX_CACHE", str(tmp_path / "cache"))
    with pytest.warns(UserWarning, match="CLIP's own tokenizer"):
        pipe = sdjax.load(run)
    assert_same(jax.tree.map(np.asarray, pipe.params), random_params(MODEL))
    assert main([str(run), str(tmp_path / "model.safetensors"), "--to", "safetensors"]) == 0


def test_parts_may_come_from_elsewhere(folder, copied):
    shutil.rmtree(copied / "800" / "vae_state")
    with pytest.raises(CheckpointError, match="vae_state: missing; this is not a whole checkpoint of maxdiffusion"):
        convert.read(copied)
    assert_same(convert.read(copied, vae=folder / "vae").params, random_params(MODEL))


@pytest.mark.parametrize(
    ("damaged", "says"),
    [
        ("unet_state/_METADATA", "Orbax cannot read it|missing"),
        ("unet_state/manifest.ocdbt", "Orbax cannot read it"),
        ("vae_config/metadata", "vae_config/metadata: missing"),
    ],
)
def test_a_damaged_run_ends_in_one_line(copied, damaged, says):
    (copied / "800" / damaged).unlink()
    with pytest.raises(CheckpointError, match=says) as caught:
        convert.read(copied)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_data_that_is_cut_off_ends_in_one_line(copied):
    for file in (copied / "800" / "unet_state").rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="Orbax cannot read it") as caught:
        convert.read(copied)
    assert "\n" not in str(caught.value)


def test_links_inside_a_run_are_refused(copied, tmp_path):
    file = next((copied / "800" / "unet_state").rglob("d/*"))
    file.rename(tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", file)
    with pytest.raises(CheckpointError, match="a symbolic link or special file"):
        convert.read(copied)


def test_stable_diffusion_xl_is_named(folder, tmp_path):
    run = write_run(tmp_path / "run", folder, more={"text_encoder_2_state": ocp.args.PyTreeSave({"a": np.ones(3)})})
    with pytest.raises(CheckpointError, match="maxdiffusion's Stable Diffusion XL; expected Stable Diffusion 1"):
        convert.read(run)


@pytest.mark.parametrize("kind", ["tree", "manager", "flux"])
def test_orbax_folders_of_other_programs_get_one_line_with_a_way_out(tmp_path, capsys, kind):
    tree = {"params": {"dense": {"kernel": np.ones((3, 4), np.float32)}}}
    if kind == "tree":
        ocp.PyTreeCheckpointer().save(tmp_path / "model", tree)
    else:
        name = "flux_state" if kind == "flux" else "default"
        with ocp.CheckpointManager(tmp_path / "model", item_names=(name,)) as manager:
            manager.save(3, args=ocp.args.Composite(**{name: ocp.args.PyTreeSave(tree)}))
            manager.wait_until_finished()
    assert main([str(tmp_path / "model"), str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "an Orbax checkpoint of another program" in line
    assert "save the model there as a diffusers folder (save_pretrained)" in line
