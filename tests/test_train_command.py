"""`sdjax train`, as a person uses it."""

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convert.write import write_safetensors
from sdjax import cli
from sdjax.cli import train as command
from sdjax.config import TINY
from sdjax.models.params import random_params
from sdjax.train.settings import Settings
from tests.small import MINI

FEW = ["--steps", "2", "--batch", "4", "--warmup", "0", "--save-every", "1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("train") / "small.safetensors"
    config = dataclasses.replace(MINI, text=(dataclasses.replace(MINI.clip, vocab_size=TINY.clip.vocab_size),))
    write_safetensors(path, config, random_params(config))
    return str(path)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a data set of five pictures, the last one broken, and a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SDJAX_CACHE", str(tmp_path / "cache"))
    Path("data").mkdir()
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(f"data/{i}.png")
        Path(f"data/{i}.txt").write_text(f"picture number {i}")
    Path("data/broken.png").write_bytes(b"no picture")
    Path("data/broken.txt").write_text("a caption")
    return tmp_path


def fails(capsys, *arguments) -> str:
    assert cli.main(["train", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("sdjax: error: ")
    return error


def test_a_model_from_a_foreign_file_is_tuned_and_drawn_with(here, model, capsys):
    words = ["train", "unet", "--data", "data", "--out", "run", "--model", model, "--skip-bad", "--remat", *FEW]
    assert cli.main(words) == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == str(Path("run/model"))
    assert "left out broken.png: not a picture of a known kind" in captured.err
    first = Path("run/metrics.jsonl").read_text()
    assert [json.loads(line)["step"] for line in first.splitlines()] == [1, 2]
    assert cli.main(words) == 0
    assert Path("run/metrics.jsonl").read_text() == first
    assert cli.main(["txt2img", "picture number 1", "-o", "p.png", "--model", "run/model", "--steps", "1"]) == 0
    Path("data/broken.png").unlink()
    Path("data/broken.txt").unlink()
    capsys.readouterr()
    assert "other settings (seed" in fails(capsys, *words[1:], "--seed", "3")


def test_a_preset_starts_from_nothing():
    model = command._start(argparse.Namespace(model=None, preset="tiny", tokenizer=None), Settings(seed=1), {})
    assert model.config == TINY
    assert not np.asarray(model.params["unet"]["conv_out"]["kernel"]).any()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--data", "nowhere"], "nowhere: no such folder"),
        (["--data", "data"], "1 broken of 5 examples: broken.png: not a picture of a known kind"),
        (["--steps", "50"], "warmup must be at most steps, 50"),
        (["--batch", "0"], "batch must be a whole number above 0"),
        (["--preset", "box"], "give one of that size with --tokenizer"),
        (["--preset", "tiny", "--tokenizer", "nowhere"], "nowhere: no tokenizer here"),
        (["--model", "nothing"], "no such file or folder"),
        (["--out", "data"], "is not empty and holds no training run"),
    ],
)
def test_every_mistake_is_one_line(arguments, says, here, capsys):
    if "--data" not in arguments:
        Path("data/broken.png").unlink()
        Path("data/broken.txt").unlink()
    words = ["unet", "--data", "data", "--out", "run", *arguments]
    if "--model" not in arguments and "--preset" not in arguments:
        words += ["--preset", "tiny"]
    assert says in fails(capsys, *words)
    assert not Path("run/state").exists()


def test_every_setting_has_its_option(capsys):
    shown = ""
    for part in ("vae", "clip", "unet"):
        with pytest.raises(SystemExit):
            cli.main(["train", part, "--help"])
        shown += capsys.readouterr().out
    for name in Settings.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in shown
