"""Every example runs as its docstring says, on a model small enough for a test."""

import importlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdjax.models.params import random_params
from sdjax.pipeline.programs import Programs
from sdjax.storage import checkpoint
from sdjax.train.loop import save_model
from tests.small import SMALL, mini

EXAMPLES = Path(__file__).parent.parent / "examples"
PHOTO = Path(__file__).parent / "data" / "astronaut.png"
SIZES = {"text_to_image": (4 * 32, 32), "pure_functions": (32, 32), "edit_photo": (7 * 40 + 60, 32)}
ELSEWHERE = {"devices", "draw_programs"} | {
    "make_emoji",
    "train_box",
    "box_sheets",
    "walkthrough",
    "make_notebook",
}  # below, test_make_emoji.py, test_train_box.py, test_walkthrough.py


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SIZES) | ELSEWHERE


@pytest.mark.parametrize("name", SIZES)
def test_example_runs(name, tmp_path):
    checkpoint.save(tmp_path / "model", SMALL, random_params(SMALL))
    arguments = ["--model", str(tmp_path / "model"), "--steps", "2", "--output", str(tmp_path / "out.png")]
    if name == "edit_photo":
        with Image.open(PHOTO) as photo:
            photo.resize((40, 32)).save(tmp_path / "photo.png")
        arguments.insert(0, str(tmp_path / "photo.png"))
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    with Image.open(tmp_path / "out.png") as image:
        assert image.size == SIZES[name]


@pytest.mark.parametrize("parallel", ["jit", "pmap"])
def test_devices_example_runs_on_every_device(parallel, tmp_path):
    save_model(mini(), tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model"), "--steps", "2", "--parallel", parallel]
    command = [sys.executable, str(EXAMPLES / "devices.py"), *arguments]
    result = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    assert result.stdout.startswith("4 x ")  # simulated by conftest.py
    with Image.open(tmp_path / "pictures.png") as image:
        assert image.size == (4 * 12 + 4, 2 * 12 + 4)


def test_the_drawing_shows_every_program_with_the_pictures_along_the_first_axis(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    draw_programs = importlib.import_module("draw_programs")
    rows = draw_programs.steps()
    drawn = Programs._fields[:-2]  # the last ones only make bytes of pictures, and other forms of kernels
    assert tuple(name for name, *_ in rows) == drawn
    said = dict(zip(drawn, rows, strict=True))
    assert said["encode"][1::2] == ("pictures f32[b, 512, 512, 3]", "latents f32[b, 64, 64, 4]")
    assert said["decode"][1::2] == ("latents f32[b, 64, 64, 4]", "pictures f32[b, 512, 512, 3]")
    assert "[b, 2, 77, 8, 40]" in said["condition"][3]
    assert draw_programs.drawn(rows).width == draw_programs.WIDTH


def test_processes_of_the_launch_script_share_a_job(tmp_path):
    save_model(mini(), tmp_path / "model")
    (tmp_path / "jobs.jsonl").write_text('{"prompt": "red disc", "count": 6, "steps": 2}\n')
    sdjax = tmp_path / "bin" / "sdjax"
    sdjax.parent.mkdir()
    sdjax.write_text(f'#!/bin/sh\nexec {sys.executable} -m sdjax.cli "$@"\n')
    sdjax.chmod(0o755)
    command = [str(EXAMPLES / "several_processes.sh"), "2", "jobs.jsonl", "out", "--model", "model"]
    path = f"{sdjax.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {
        "PATH": path,
        "PYTHONPATH": str(EXAMPLES.parent),
        "SDJAX_CACHE": str(tmp_path / "cache"),
    }
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("3 pictures made, 0 were there before, 0 failed") == 2
    pictures = [(tmp_path / "out" / f"0000001-{seed}.png").read_bytes() for seed in range(6)]
    assert len(set(pictures)) == 6
    alone = mini().text_to_image("red disc", count=6, steps=2)
    for data, picture in zip(pictures, alone, strict=True):
        with Image.open(io.BytesIO(data)) as made:
            assert np.abs(np.asarray(made, int) - np.asarray(picture, int)).max() <= 1


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.py")), ids=lambda path: path.stem)
def test_every_script_shows_its_command_and_its_help(path):
    text = path.read_text()
    assert re.search(rf"^    .*python {path.relative_to(EXAMPLES.parent)}", text, re.MULTILINE)
    result = subprocess.run([sys.executable, str(path), "--help"], capture_output=True, text=True, cwd=EXAMPLES.parent)
    assert result.returncode == 0, result.stderr
