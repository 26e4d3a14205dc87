"""Compiled programs are kept between processes, and made ahead of time."""

import dataclasses
import hashlib
import json
import os
import pickle
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from PIL import Image

from sdjax.devices.compilation import compilations, compile_in_background, keep_programs, kept_in
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


def environment(cache):
    """That of a process of its own, with the four devices that conftest.py simulates left out."""
    return {**os.environ, "SDJAX_CACHE": str(cache), "XLA_FLAGS": ""}


def command(cache, *arguments):
    """The command line in a process of its own."""
    full = [sys.executable, "-m", "sdjax.cli", *arguments]
    return subprocess.run(full, env=environment(cache), capture_output=True, text=True, check=True)


COUNTED = """
import json, sys
from sdjax.cli.run import run
from sdjax.devices.compilation import compilations
from sdjax.storage import checkpoint

restore, restored = checkpoint.restore, []
checkpoint.restore = lambda *given, **named: restored.append(1) or restore(*given, **named)
with compilations() as found:
    status = run(sys.argv[1:])
print(json.dumps({"status": status, "compiled": sorted(found), "restored": len(restored)}))
"""


def counted(cache, *arguments, **variables):
    """What the command line does in a process of its own; it ends well and says nothing."""
    full = [sys.executable, "-c", COUNTED, *arguments]
    process = subprocess.run(full, env=environment(cache) | variables, capture_output=True, text=True, check=True)
    said = json.loads(process.stdout.splitlines()[-1])
    assert said["status"] == 0
    assert process.stderr == "", "neither XLA nor we have anything to say about kept programs"
    return said


def compiled(cache, *arguments, **variables):
    """The programs that it compiles, by name."""
    return set(counted(cache, *arguments, **variables)["compiled"])


def executables(cache):
    """name of a program -> its files."""
    found: dict[str, list[Path]] = {}
    for path in sorted((cache / "programs").glob("*.executable")):
        found.setdefault(path.name.split("-")[0], []).append(path)
    return found


MADE = {"condition", "initial_latents", "sample", "decode", "to_bytes"}


@pytest.fixture(scope="module")
def kept(model, tmp_path_factory):
    """A folder with the programs of one command, that command, and the bytes of its picture."""
    cache = tmp_path_factory.mktemp("kept")
    settings = ["txt2img", "a cat", "--model", model, "--size", "16x16", "--steps", "3", "-o", str(cache / "cat.png")]
    assert compiled(cache, *settings) >= MADE
    return cache, settings, (cache / "cat.png").read_bytes()


@pytest.fixture
def copied(kept, tmp_path):
    """The same, to be spoilt."""
    cache, settings, picture = kept
    shutil.copytree(cache / "programs", tmp_path / "programs")
    return tmp_path, settings, picture


def test_a_later_process_compiles_nothing_and_gives_the_same_bytes(kept):
    cache, settings, picture = kept
    before = executables(cache)
    assert set(before) == MADE
    (cache / "cat.png").unlink()
    assert compiled(cache, *settings) == set()
    assert compiled(cache, *settings[:-1], str(cache / "dog.png"), "--steps", "9", "--sampler", "heun") == set()
    assert (cache / "cat.png").read_bytes() == picture
    assert executables(cache) == before
    assert stat.S_IMODE((cache / "programs").stat().st_mode) == 0o700


def test_warmup_makes_what_a_picture_needs(model, tmp_path):
    settings = ["--model", model, "--size", "16x16"]
    lines = command(tmp_path, "warmup", *settings).stdout.splitlines()
    assert any(line.endswith(" s  sample") for line in lines)
    assert any(line.endswith(" s  decode") for line in lines)
    assert lines[-1].endswith(f"programs; kept in {tmp_path / 'programs'}")
    picture = ["txt2img", "a cat", *settings, "--steps", "3", "-o", str(tmp_path / "cat.png")]
    assert compiled(tmp_path, *picture) == set()


def signed(body):
    """A file of ours with this content."""
    return hashlib.sha256(body).digest() + body


SPOILT = {
    "condition": lambda content: content[: len(content) // 2],
    "initial_latents": lambda content: b"",
    "sample": lambda content: content[:5000] + bytes([content[5000] ^ 1]) + content[5001:],
    "decode": lambda content: signed(pickle.dumps((None, b"?"))),
    "to_bytes": lambda content: signed(b"cno_such_module\nno_such_class\n."),
}


def test_damaged_programs_are_compiled_anew_and_replaced_without_a_word(copied):
    cache, settings, picture = copied
    for name, (path,) in executables(cache).items():
        path.write_bytes(SPOILT[name](path.read_bytes()))
    assert compiled(cache, *settings) >= MADE
    assert Path(settings[-1]).read_bytes() == picture
    assert compiled(cache, *settings) == set()


def test_another_configuration_is_another_program(copied):
    cache, settings, _ = copied
    variables = dict(XLA_FLAGS="--xla_cpu_multi_thread_eigen=true", JAX_DEFAULT_MATMUL_PRECISION="highest")
    for name, value in variables.items():
        assert compiled(cache, *settings, **{name: value}) >= MADE
    assert {len(files) for files in executables(cache).values()} == {3}


def test_programs_that_others_can_write_are_not_run(copied):
    cache, settings, _ = copied
    for mode in (0o770, 0o707):
        (cache / "programs").chmod(mode)
        with pytest.raises(PermissionError, match="others can write to it"):
            keep_programs(cache / "programs")
    process = command(cache, *settings)
    assert process.stderr.count("note: compiled programs are not kept: ") == 1
    (cache / "programs").chmod(0o700)
    (shared,) = executables(cache)["to_bytes"]
    shared.chmod(0o666)
    assert compiled(cache, *settings) == {"to_bytes"}
    assert stat.S_IMODE(shared.stat().st_mode) == 0o600, "replaced"


def test_programs_of_another_user_are_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(PermissionError, match="belongs to another user"):
        keep_programs(tmp_path)
    assert kept_in() is None


def test_what_nobody_used_for_long_is_deleted_when_a_program_is_written(copied):
    cache, settings, _ = copied
    old, young, foreign = (cache / "programs" / name for name in ("a-1.executable", "b-1.executable", "notes.txt"))
    for path in (old, young, foreign):
        path.write_bytes(b"")
    executables(cache)["to_bytes"][0].unlink()
    for path in (old, foreign, *(path for name in MADE - {"to_bytes"} for path in executables(cache)[name])):
        os.utime(path, (10**9, 10**9))
    assert compiled(cache, *settings) == {"to_bytes"}
    assert not old.exists()
    assert young.exists()
    assert foreign.exists()
    assert set(executables(cache)) == MADE | {"b"}, "what was loaded is in use"


def test_a_finished_job_neither_loads_nor_compiles(copied, model, tmp_path):
    cache, _, _ = copied
    (tmp_path / "jobs.jsonl").write_text('{"prompt": "a cat"}\n{"prompt": "a dog"}\n')
    out = tmp_path / "out"
    job = ["batch", str(tmp_path / "jobs.jsonl"), "-o", str(out), "--model", model, "--size", "16x16"]
    job += ["--steps", "2", "--batch", "2"]
    first = counted(cache, *job)
    assert set(first["compiled"]) >= MADE
    assert first["restored"] == 1
    shutil.rmtree(cache / "programs")
    assert counted(cache, *job) == {"status": 0, "compiled": [], "restored": 0}
    assert executables(cache) == {}
    next(out.glob("*.png")).unlink()
    assert counted(cache, *job)["restored"] == 1
    assert len(list(out.glob("*.png"))) == 2


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
