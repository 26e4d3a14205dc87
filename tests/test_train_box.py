"""examples/train_box.py from beginning to end, with networks small enough for a test, and sheets of what comes out."""

import dataclasses
import importlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import sdjax
from sdjax.models.clip import ImageEncoder
from sdjax.storage.checkpoint import read_tensors
from tests.small import MINI
from tests.trainings import SETTINGS, VISION, write_pictures

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def examples(monkeypatch):
    """The two scripts, with small networks."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    train_box = importlib.import_module("train_box")
    monkeypatch.setattr(train_box, "BOX", dataclasses.replace(MINI, name="box"))
    monkeypatch.setattr(train_box, "BOX_VISION", VISION)
    return train_box, importlib.import_module("box_sheets")


def test_all_three_parts_are_trained_into_a_model_that_draws(examples, tmp_path, capsys):
    train_box, box_sheets = examples
    (tmp_path / "emoji" / "train").mkdir(parents=True)
    write_pictures(tmp_path / "emoji" / "train")
    (tmp_path / "emoji" / "done").touch()
    settings = dict.fromkeys(("vae", "clip", "unet"), SETTINGS)

    box = train_box.main(tmp_path, settings)
    before = {file.name: file.read_bytes() for file in box.rglob("*") if file.is_file()}
    assert json.loads(before["config.json"])["name"] == "box"
    pipe = sdjax.load(box)
    stored = jax.tree.leaves(read_tensors(box / "params.safetensors"))
    assert {leaf.dtype for leaf in stored} == {np.dtype("float16")}
    tower = read_tensors(box / "image_encoder.safetensors")["image"]
    embedded = ImageEncoder(VISION).apply({"params": tower}, np.zeros((1, 16, 16, 3), np.float32))
    assert np.isfinite(embedded).all()

    again = train_box.main(tmp_path, settings)  # nothing is left to do, and the result is the same
    assert {file.name: file.read_bytes() for file in again.rglob("*") if file.is_file()} == before

    assert box_sheets.drawn(pipe).width == 8 * (2 * MINI.image_size + 4) + 4
    assert box_sheets.prompts(pipe).width == 4 * (3 * MINI.image_size + 4) + 4
    box_sheets.inpainting(pipe)
    said = capsys.readouterr().out
    assert "the known half is kept to the byte" in said
    assert "CHANGED" not in said
