"""What can be known beforehand is told beforehand: before parameters are read, programs compiled, or networks run."""

import dataclasses
import os
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convert.write import write_safetensors
from sdjax import cli
from sdjax.load import load
from sdjax.models.params import random_params
from sdjax.request import Request
from sdjax.storage import checkpoint
from tests.small import MINI, mini

EIGHT = dataclasses.replace(MINI, name="eight", unet=dataclasses.replace(MINI.unet, in_channels=8))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    mini().tokenizer.engine.save(str(folder / "tokenizer.json"))
    for config in (MINI, EIGHT):
        params = random_params(config)
        checkpoint.save(folder / config.name, config, params, tokenizer=folder, one_file=True)
        write_safetensors(folder / f"{config.name}.safetensors", config, params)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in, where nothing may be loaded, converted or compiled."""

    def never(*_, **__):
        pytest.fail("slow work was begun")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SDJAX_CACHE", str(tmp_path / "cache"))
    for slow in (
        "sdjax.storage.checkpoint.restore",
        "sdjax.storage.checkpoint.save",
        "sdjax.pipeline.warmup.programs_for",
    ):
        monkeypatch.setattr(slow, never)
    Image.new("RGB", (8, 8)).save("photo.png")
    Path("photo.jpg").write_bytes(Path("photo.png").read_bytes())
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)).save("broken.png")
    os.truncate("broken.png", 90)
    Image.new("L", (8, 8)).save("black.png")
    Image.new("L", (8, 16), 255).save("tall.png")
    Path("file").touch()
    Path("a.folder").mkdir()
    return tmp_path


def refused(capsys, *arguments):
    assert cli.main([str(argument) for argument in arguments]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sdjax: error:")]
    return line


OUTPUTS = [
    (["-o", "photo.png"], "was not made by sdjax"),
    (["-o", "photo.jpg"], "was not made by sdjax"),
    (["-o", "photo.png", "--count", "1", "--seed", "3"], "was not made by sdjax"),
    (["-o", "x.bmp"], "expected a name that ends in .png"),
    (["-o", "results.v2"], "or a folder (end it with a slash)"),
    (["-o", "file"], "is there and is no folder"),
    (["-o", "file/x.png"], "no such folder"),
    (["-o", "file/x"], "is no folder"),
    (["-o", "no/such/x.png"], "no such folder"),
    (["-o", "x" * 300 + ".png"], "a name of 304 bytes"),
    (["-o", "x" * 300], "a name of 300 bytes"),
    (["-o", "\U0001d4d0" * 70 + ".png"], "a name of 284 bytes"),
    (["-o", "/proc/x.png"], "cannot be written into"),
    (["-o", "/proc/pictures/"], "cannot be written into"),
    (["-o", "x\0.png"], "a zero byte"),
]


@pytest.mark.parametrize(("output", "says"), OUTPUTS)
@pytest.mark.parametrize("model", ["mini", "mini.safetensors"])
def test_an_output_that_cannot_be_written_is_refused(here, models, capsys, output, says, model):
    before = sorted(os.listdir())
    assert says in refused(capsys, "txt2img", "x", "--model", models / model, *output)
    assert sorted(os.listdir()) == before


def test_a_picture_of_somebody_else_in_the_folder_is_found_before(here, models, capsys):
    Image.new("RGB", (8, 8)).save("a.folder/a-cat-7.png")
    arguments = ["txt2img", "a cat", "--model", models / "mini", "-o", "a.folder", "--count", "5", "--seed", "4"]
    assert "a-cat-7.png is already there" in refused(capsys, *arguments)


REQUESTS = [
    (["txt2img", "x", "--steps", "1001"], "steps must be a whole number in [1, 1000]"),
    (["txt2img", "x", "--clip-skip", "9"], "skip must lie in [0, 1)"),
    (["txt2img", "x", "--size", "0x8"], "multiples of"),
    (["txt2img", "x", "--size", "16384x8"], "up to 16383 pixels wide and high"),
    (["txt2img", "x", "--guidance", "1e400"], "guidance must be a finite number"),
    (["txt2img", "x", "--size", "16384x8"], "up to 16383 pixels wide and high"),
    (["txt2img", "x", "--guidance", "1e400"], "guidance must be a finite number"),
    (["txt2img", "\udcff"], "bytes that are none"),
    (["img2img", "x", "broken.png"], "not a picture that can be read"),
    (["img2img", "x", "photo.png", "--size", "8x0"], "multiples of"),
    (["inpaint", "x", "photo.png", "broken.png"], "not a picture that can be read"),
    (["inpaint", "x", "photo.png", "black.png"], "the mask is black everywhere"),
    (["inpaint", "x", "photo.png", "tall.png"], "make a mask of the picture's size"),
    (["warmup", "--count", "0"], "count must be"),
]


@pytest.mark.parametrize(("arguments", "says"), REQUESTS)
@pytest.mark.parametrize("model", ["mini", "mini.safetensors"])
def test_what_cannot_be_made_is_refused(here, models, capsys, arguments, says, model):
    assert says in refused(capsys, *arguments, "--model", models / model)


@pytest.mark.parametrize("task", [["txt2img", "x"], ["img2img", "x", "photo.png"], ["warmup"]])
@pytest.mark.parametrize("model", ["eight", "eight.safetensors"])
def test_a_model_that_cannot_run_the_task_is_refused(here, models, capsys, task, model):
    line = refused(capsys, *task, "--model", models / model)
    assert "8 input channels; text-to-image, image-to-image and inpainting are for models with 4 or 9" in line


TRAININGS = [
    (["unet", "--model", "{models}/eight"], "its UNet has 8 input channels; training makes models with 4"),
    (["unet", "--model", "{models}/eight.safetensors"], "its UNet has 8 input channels"),
    (["vae", "--model", "{models}/mini", "--tokenizer", "t"], "goes with a preset (--preset sd15)"),
    (["clip", "--model", "absent.ckpt"], "absent.ckpt: no such file"),
    (["clip", "--preset", "sd15", "--vae", "x.pt"], "--vae FILE: for foreign files"),
    (["clip", "--preset", "tiny", "--tokenizer", "{models}/mini/tokenizer"], "give one of that size with --tokenizer"),
]


@pytest.mark.parametrize(("arguments", "says"), TRAININGS)
def test_a_training_that_cannot_start_is_refused_before_its_pictures_are_looked_at(
    here, models, capsys, monkeypatch, arguments, says
):
    monkeypatch.setattr("sdjax.train.stream.open_dataset", lambda *_, **__: pytest.fail("slow work was begun"))
    part, *options = (argument.format(models=models) for argument in arguments)
    assert says in refused(capsys, "train", part, "--data", here, "--out", "run", *options)
    assert not Path("run").exists()


def test_a_tokenizer_of_another_model_is_refused(here, models, capsys):
    shutil.copytree(models / "mini", "other")
    shutil.rmtree("other/tokenizer")
    assert "the tokenizer has tokens up to 49407 and the model 530" in refused(
        capsys, "txt2img", "x", "--model", "other"
    )


def test_what_on_config_raises_ends_the_loading(here, models):
    def no(config):
        raise ValueError(f"not {config.name}")

    for model in ("mini", "mini.safetensors"):
        with pytest.raises(ValueError, match="not mini"):
            load(models / model, on_config=no)


@pytest.mark.parametrize("given", ["a.folder", "new/", "a.folder/deeper/still", "ends.with.slash/"])
def test_a_folder_that_is_there_or_ends_in_a_slash_is_a_folder(tmp_path, monkeypatch, given):
    from sdjax.cli.generate import Output

    monkeypatch.chdir(tmp_path)
    Path("a.folder").mkdir()
    output = Output(given, "Red heart!", range(5, 6))
    output.check()
    output.make_folder()
    assert output.path(5) == Path(given) / "red-heart-5.png"
    assert stat.S_ISDIR(Path(given).stat().st_mode)


@pytest.mark.parametrize("prompt", ["\U0001d4d0" * 80, "日本" * 80, "é" * 80, "x" * 300, "...", ""])
def test_a_picture_is_named_after_any_prompt(tmp_path, prompt):
    from sdjax.cli.generate import Output

    output = Output(str(tmp_path), prompt, range(2**32 - 1, 2**32))
    output.check()
    name = output.path(2**32 - 1)
    name.touch()
    assert len(os.fsencode(name.name)) <= 140
    assert name.name.endswith("-4294967295.png")


def test_pictures_are_made_when_nothing_is_wrong(tmp_path, monkeypatch, models, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a.folder").mkdir()
    assert cli.main(["txt2img", "x", "--model", str(models / "mini"), "-o", "a.folder", "--steps", "1"]) == 0
    with Image.open("a.folder/x-0.png") as picture:
        assert np.asarray(picture).shape == (8, 8, 3)


@pytest.mark.parametrize("wrong", [dict(guidance=10**400), dict(image=5), dict(image=np.zeros((8, 8))), dict(mask=b"")])
def test_values_of_any_kind_are_refused_in_python_too(wrong):
    request = Request("x", **({"image": Image.new("RGB", (8, 8))} | wrong))
    with pytest.raises((ValueError, TypeError), match=r"guidance must be a finite number|expected a path or a PIL"):
        list(mini().batch([request]))
