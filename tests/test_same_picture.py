"""The same picture, whatever was remembered before or is set around it."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convert.write import write_safetensors
from sdjax.diffusion.schedule import noise_schedule
from sdjax.load import _identity, configuration, identity, load
from sdjax.models.params import random_params
from sdjax.request import Request, plan
from sdjax.storage import cache, checkpoint
from tests.small import MINI, mini

CODE = """
import hashlib, sys
import numpy as np
from sdjax.request import Request
from tests.small import mini
pictures = [picture for _, picture in mini().batch([Request("red disc", seed=3, sampler="euler_a", image=sys.argv[1]),
    Request("red disc", seed=4, steps=3)], batch=2)]
print(hashlib.sha256(b"".join(np.asarray(picture).tobytes() for picture in pictures)).hexdigest())
"""
SETTINGS = {
    "JAX_DEFAULT_PRNG_IMPL": "rbg",
    "JAX_THREEFRY_PARTITIONABLE": "0",
    "JAX_RANDOM_SEED_OFFSET": "7",
    "JAX_ENABLE_X64": "1",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "JAX_TRANSFER_GUARD": "disallow",
}
"""What JAX reads from its environment and what changes numbers or random streams."""


def test_what_is_set_around_a_process_changes_no_picture(tmp_path):
    """Each in a process of its own, since JAX reads its environment once."""
    Image.new("RGB", (8, 8), "red").save(tmp_path / "photo.png")
    root = Path(__file__).parent.parent
    usual = {name: value for name, value in os.environ.items() if name not in SETTINGS} | {"PYTHONPATH": str(root)}
    found = []
    for setting in ({}, SETTINGS):
        command = [sys.executable, "-c", CODE, str(tmp_path / "photo.png")]
        run = subprocess.run(command, env=usual | setting, capture_output=True, text=True, check=True, cwd=root)
        found.append(run.stdout)
    assert len(set(found)) == 1


def pictures_of(requests):
    return [np.asarray(picture) for _, picture in mini().batch(requests, batch=1)]


@pytest.mark.parametrize("kind", ["path", "same time and size", "PIL"])
def test_a_picture_that_changes_between_requests_is_read_again(tmp_path, kind):
    path = tmp_path / "photo.bmp"  # every picture of a size has as many bytes
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    source = red.copy() if kind == "PIL" else path

    def show(picture):
        if kind == "PIL":
            source.paste(picture)
            return
        picture.save(path)
        if kind != "path":
            os.utime(path, ns=(1, 1))

    def requests():
        for picture in (red, blue, red):
            show(picture)
            yield Request("x", image=source, strength=0.0)

    first, second, third = pictures_of(requests())
    assert (first != second).any()
    np.testing.assert_array_equal(first, third)
    (alone,) = pictures_of([Request("x", image=blue, strength=0.0)])
    np.testing.assert_array_equal(second, alone)


def foreign(path, seed, config=MINI):
    write_safetensors(path, config, random_params(config, seed), force=True)
    os.utime(path, ns=(1, 1))


def parameter(pipe):
    return np.asarray(pipe.params["unet"]["conv_in"]["kernel"])


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setenv("SDJAX_CACHE", str(tmp_path / "cache"))
    mini().tokenizer.engine.save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setattr(sys.modules["sdjax.load"], "clip_tokenizer", lambda clean: mini().tokenizer)
    return tmp_path


def test_another_model_of_the_same_name_size_and_time_is_converted_anew(kept):
    foreign(kept / "m.safetensors", 0)
    first = parameter(load(kept / "m.safetensors"))
    foreign(kept / "m.safetensors", 1)
    second = parameter(load(kept / "m.safetensors"))
    np.testing.assert_array_equal(second, random_params(MINI, 1)["unet"]["conv_in"]["kernel"])
    assert (first != second).any()


def test_the_same_model_elsewhere_is_converted_once(kept, monkeypatch):
    foreign(kept / "m.safetensors", 0)
    load(kept / "m.safetensors")
    (kept / "moved").mkdir()
    (kept / "m.safetensors").rename(kept / "moved" / "m.safetensors")
    monkeypatch.setattr(checkpoint, "save", lambda *_, **__: pytest.fail("converted again"))
    load(kept / "moved" / "m.safetensors")


def test_how_a_model_is_read_belongs_to_its_identity(kept):
    foreign(kept / "m.safetensors", 0)
    foreign(kept / "vae.safetensors", 1)
    whole = kept / "m.safetensors"
    ways = [{}, {"prediction": "v"}, {"vae": kept / "vae.safetensors"}, {"ema": "no"}, {"ignore": ["x.*"]}]
    assert len({identity(whole, **way) for way in ways}) == len(ways)
    assert identity(whole, ema="auto", ignore=[], vae=None) == identity(whole)
    assert _identity(whole, {}) == identity(whole)
    assert configuration(whole) == MINI
    foreign(kept / "vae.safetensors", 2)
    assert identity(whole, vae=kept / "vae.safetensors") not in {identity(whole, **way) for way in ways[:2]}


def test_options_for_foreign_files_are_checked(kept):
    checkpoint.save(kept / "ours", MINI, random_params(MINI), tokenizer=kept, one_file=True)
    with pytest.raises(ValueError, match="is a whole checkpoint; vae are for foreign files alone"):
        load(kept / "ours", vae=kept / "x")
    with pytest.raises(TypeError, match="load has no option 'vea'"):
        load(kept / "ours", vea=kept / "x")
    with pytest.raises(ValueError, match="no preset"):
        load(kept / "ours", config="sd99")


def test_tables_that_are_remembered_cannot_be_written_into():
    for table in noise_schedule(MINI.schedule):
        with pytest.raises(ValueError, match="read-only"):
            table[0] = 0
    with pytest.raises(ValueError, match="read-only"):
        plan(Request("x"), MINI).rows.scale[0] = 0


def test_digests_of_a_large_model_are_remembered(kept, monkeypatch):
    foreign(kept / "m.safetensors", 0)
    monkeypatch.setattr(cache, "LARGE", 1)
    monkeypatch.setattr(cache, "UNSETTLED", -(10**12))
    first = identity(kept / "m.safetensors")
    reading = hashlib.file_digest
    monkeypatch.setattr(cache.hashlib, "file_digest", lambda *_: pytest.fail("read again"))
    assert identity(kept / "m.safetensors") == first
    monkeypatch.setattr(cache.hashlib, "file_digest", reading)
