"""Compiled programs are kept between processes, and made ahead of time."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from PIL import Image

from sdjax.devices.compilation import compilations, compile_in_background
from sdjax.devices.placement import HERE, Placement
from sdjax.models.params import random_params
from sdjax.pipeline.programs import programs
from sdjax.pipeline.warmup import programs_for
from sdjax.request import Request
from sdjax.storage import checkpoint
from tests.small import MINI, SMALL, mini


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("compilation") / "small"
    checkpoint.save(path, SMALL, random_params(SMALL))
    return str(path)


def command(cache, *arguments):
    """The command line in a process of its own, with the four devices that conftest.py simulates left out."""
    environment = {**os.environ, "SDJAX_CACHE": str(cache), "XLA_FLAGS": ""}
    full = [sys.executable, "-m", "sdjax.cli", *arguments]
    return subprocess.run(full, env=environment, capture_output=True, text=True, check=True)


def kept_programs(cache):
    """name of a program -> the files of that name."""
    found = sorted(path.name for path in (cache / "programs").glob("*-cache"))
    return {
        name.split("-")[0]: [other for other in found if other.split("-")[0] == name.split("-")[0]] for name in found
    }


def test_the_second_process_compiles_only_what_is_damaged(model, tmp_path):
    settings = ["--model", model, "--size", "16x16"]
    warm = command(tmp_path, "warmup", *settings)
    lines = warm.stdout.splitlines()
    assert any(line.endswith(" s  sample") for line in lines)
    assert any(line.endswith(" s  decode") for line in lines)
    assert lines[-1].endswith(f"programs; kept in {tmp_path / 'programs'}")
    kept = kept_programs(tmp_path)
    assert {"jit_sample", "jit_decode"} <= set(kept)
    picture = command(tmp_path, "txt2img", "a cat", *settings, "--steps", "3", "-o", str(tmp_path / "cat.png"))
    assert picture.stderr == "", "XLA has nothing to say about programs from the cache"
    after = kept_programs(tmp_path)
    assert {name: after[name] for name in kept} == kept, "on a busy machine small ones, too, may become worth keeping"
    assert Path(tmp_path / "cat.png").is_file()
    (step,) = (tmp_path / "programs").glob("jit_sample-*-cache")
    size = step.stat().st_size
    os.truncate(step, size // 2)  # as a crash leaves it
    again = command(tmp_path, "txt2img", "a cat", *settings, "--steps", "3", "-o", str(tmp_path / "cat.png"))
    assert "was damaged; it is compiled again" in again.stderr
    assert step.stat().st_size > size // 2


def test_the_cache_can_be_left_out(model, tmp_path):
    settings = ["--model", model, "--size", "16x16", "--steps", "1", "-o", str(tmp_path / "cat.png")]
    command(tmp_path / "cache", "txt2img", "a cat", *settings, "--no-compile-cache")
    assert not (tmp_path / "cache").exists()


TWO = Placement(tuple(jax.local_devices()[:2]))
SIZE = dict(width=16, height=24, clip_skip=0)


@pytest.mark.parametrize(
    ("placement", "asked"),
    [
        (HERE, SIZE),
        (HERE, dict(image="photo", steps=66)),
        (TWO, SIZE),
        (HERE, SIZE | dict(tiling=True)),
        (HERE, SIZE | dict(hires_scale=2)),
        (HERE, SIZE | dict(hires_scale=2, hires_upscaler="bicubic")),
    ],
)
def test_what_is_compiled_ahead_is_what_runs(placement, asked, tmp_path):
    if "image" in asked:
        Image.new("RGB", (24, 16)).save(tmp_path / "photo.png")
        asked = asked | dict(image=tmp_path / "photo.png")
    params = jax.device_put(mini().params, jax.tree.map(placement.sharding, mini().params))  # as `load` does
    pipe = dataclasses.replace(mini(), params=params, placement=placement)
    request = Request("a cat", **asked)
    programs.cache_clear()
    with compilations() as ahead, compile_in_background() as start:
        start(programs_for(request, MINI, 2, placement=placement).values())
    names = {"condition", "initial_latents", "sample", "admit", "decode"}
    names |= {"encode"} if "image" in asked or "hires_upscaler" in asked else set()
    assert names <= set(ahead)
    with compilations() as then:
        requests = [dataclasses.replace(request, seed=seed, steps=1 + seed % 3) for seed in range(9)]
        assert len(list(pipe.batch(requests, batch_size=2))) == 9
        shown = pipe.image_to_image if "image" in asked else pipe.text_to_image
        shown("a cat", count=2 * placement.data_parallel, progress=lambda *_: None, **asked)
    assert not names & set(then)
