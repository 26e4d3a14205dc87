"""Compiled programs are kept between processes, and made ahead of time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sdjax import checkpoint
from sdjax.models.params import random_params
from tests.small import SMALL


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


def test_the_second_process_compiles_nothing(model, tmp_path):
    settings = ["--model", model, "--size", "16x16"]
    warm = command(tmp_path, "warmup", *settings)
    lines = warm.stdout.splitlines()
    assert any(line.endswith(" s  paint") for line in lines)
    assert any(line.endswith(" s  paint_row") for line in lines)
    assert lines[-1].endswith(f"programs; kept in {tmp_path / 'programs'}")
    kept = {path.name for path in (tmp_path / "programs").glob("*-cache")}
    assert kept
    picture = command(tmp_path, "txt2img", "a cat", *settings, "--steps", "3", "-o", str(tmp_path / "cat.png"))
    assert picture.stderr == "", "XLA has nothing to say about programs from the cache"
    assert {path.name for path in (tmp_path / "programs").glob("*-cache")} == kept
    assert Path(tmp_path / "cat.png").is_file()


def test_the_cache_can_be_left_out(model, tmp_path):
    settings = ["--model", model, "--size", "16x16", "--steps", "1", "-o", str(tmp_path / "cat.png")]
    command(tmp_path / "cache", "txt2img", "a cat", *settings, "--no-compile-cache")
    assert not (tmp_path / "cache").exists()
