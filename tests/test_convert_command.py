"""`sdjax-convert`: what can be known is told before the work; whoever reads or interrupts it, no file suffers."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from convert.__main__ import main
from convert.write import write_diffusers
from sdjax.models.params import random_params
from sdjax.storage import checkpoint
from tests.children import interruptible
from tests.small import MINI


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The model as a diffusers folder."""
    path = tmp_path_factory.mktemp("mini") / "mini"
    write_diffusers(path, MINI, random_params(MINI))
    return path


@pytest.fixture
def model(folder, tmp_path, monkeypatch):
    """The same in the working folder, with a checkpoint of ours and other people's files beside it."""
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(folder)
    Path("model.safetensors").write_bytes(b"{}")
    checkpoint.save(Path("ours"), MINI, random_params(MINI))
    Path("mini.json").write_text(MINI.to_json())
    Path("picture.png").write_bytes(b"mine")
    Path("there").mkdir()
    return "model"


def everything(path):
    return {file: file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["model", "picture.png"], "is already there; choose another name"),
        (["model", "there"], "is already there; choose another name"),
        (["model", "no/such/folder"], "no such folder to write folder into; make it first"),
        (["model", "picture.png/out"], "no such folder"),
        (["model", "/proc/out"], "cannot be written"),
        (["model", "/dev/full/out"], "no such folder"),
        (["model", "x" * 300], "File name too long"),
        (["model", "ü" * 200], "File name too long"),
        (["model", "out.bin"], "pickles are not written"),
        (["model", "out", "--report", "there"], "a folder; expected the name of a file"),
        (["model", "out", "--report", "no/such/r.txt"], "no such folder"),
        (["model", "out", "--report", "/proc/r.txt"], "cannot be written"),
        (["model", "out", "--report", "y" * 300], "File name too long"),
        (["model", "out", "--report", "out"], "the same"),
        (["model", "out", "--report", "./there/../out"], "the same"),
        (["model", "there", "--force", "--report", "there/r.txt"], "inside there; choose a place outside"),
        (["model", "out", "--report", "model"], "a folder"),
        (["model.safetensors", "out", "--report", "model.safetensors"], "the same"),
        (["model.safetensors", "model.safetensors", "--force"], "the same"),
        (["model", "model", "--force"], "the same"),
        (["ours", "there/../ours", "--force"], "the same"),
        (["ours", "ours/new"], "inside ours; choose a place outside"),
        (["model", "model/new"], "inside model; choose a place outside"),
        (["model", "model/unet", "--force"], "inside model; choose a place outside"),
        (["ours/params", "ours", "--force"], "and would be replaced; choose another name"),
        (["model", "there", "--force", "--vae", "there/vae.pt"], "and would be replaced"),
        (["model", "out", "--vae", "out"], "the same"),
        (["model", "out", "--text-encoder", "out"], "the same"),
        (["model", "mini.json", "--force", "--config", "mini.json"], "the same"),
        (["model", "there", "--force", "--to", "safetensors"], "a folder"),
        (["model", "out", "--dtype", "int4"], "dtype must be one of"),
        (["model", "out", "--ema", "maybe"], "ema must be one of"),
        (["model", "out", "--prediction", "x0"], "prediction must be one of"),
        (["ours", "out", "--vae", "picture.png", "--ignore", "x"], "leave out --vae, --ignore"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_what_cannot_be_is_told_before_a_number_is_read(model, tmp_path, capsys, monkeypatch, arguments, says):
    monkeypatch.setattr("convert.files.source.Source.read", lambda *_: pytest.fail("a tensor was read"))
    monkeypatch.setattr("sdjax.storage.checkpoint.restore", lambda *_, **__: pytest.fail("a checkpoint was read"))
    before = everything(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("sdjax-convert: error: ")
    assert says in captured.err
    assert everything(tmp_path) == before


def test_a_folder_whose_name_begins_alike_is_another_one(model, tmp_path):
    assert main(["model", "model2"]) == 0
    assert main(["model2", "model2b.safetensors", "--report", "model2b.txt"]) == 0
    assert main(["model2b.safetensors", "there", "--force"]) == 0
    assert checkpoint.read_config(tmp_path / "there").clip == MINI.clip


def test_a_report_goes_where_it_is_asked_for(model, tmp_path, capsys):
    (tmp_path / "r.json").write_text("old")
    assert main(["model", "one", "--report", "r.json"]) == 0
    assert json.loads((tmp_path / "r.json").read_text())["format"] == "diffusers"
    capsys.readouterr()
    assert main(["model", "two", "--report", "-"]) == 0
    assert "tensors used, 0 ignored" in capsys.readouterr().out


class Deaf(io.StringIO):
    """A stream that nobody reads."""

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("closed", [("stdout",), ("stderr",), ("stdout", "stderr")])
def test_nobody_needs_to_listen(model, tmp_path, monkeypatch, closed):
    vae = tmp_path / "model" / "vae" / "config.json"
    text = vae.read_text()
    for name in closed:
        monkeypatch.setattr(sys, name, Deaf())
    try:
        vae.write_text(json.dumps(json.loads(text) | {"unheard_of": 1}))  # there is a note to tell
        assert main(["model", "out", "--report", "-"]) == 0
    finally:
        vae.write_text(text)
    assert checkpoint.read_config(tmp_path / "out").clip == MINI.clip
    assert main(["absent", "out2"]) == 2


def test_a_stream_without_letters_gets_what_it_has(model, tmp_path, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["model", "ü"]) == 0
    assert out.buffer.getvalue() == b"\\xfc: model, sdjax\n"


def test_names_that_are_no_text_are_taken(model, tmp_path, capsys):
    odd = os.fsdecode(b"m\xff")
    Path("model").rename(odd)
    assert main([odd, "two", "--report", odd + ".json"]) == 0
    assert json.loads(Path(odd + ".json").read_text())["source"] == odd
    assert main(["two", odd + ".safetensors"]) == 0
    assert main(["two", odd + " folder", "--to", "diffusers"]) == 0
    for source in (odd + ".safetensors", odd + " folder"):
        assert main([source, "three", "--force", "--report", "r.txt"]) == 0
        assert checkpoint.read_config(tmp_path / "three").clip == MINI.clip
    capsys.readouterr()
    assert main([odd + ".absent", "out"]) == 2
    assert "m\\udcff.absent: no such file" in capsys.readouterr().err
    assert main([odd + " folder", odd + " ours"]) == 0
    assert main([odd + " ours", "out"]) == 0
    checkpoint.save(Path("orbax"), MINI, random_params(MINI))
    Path("orbax").rename(odd + " orbax")
    assert main([odd + " orbax", "out", "--force"]) == 2
    assert "a name that is not UTF-8" in capsys.readouterr().err


def test_streams_that_are_closed_never_end_in_a_file(model, tmp_path):
    """Native libraries print to the numbers 1 and 2, whatever is there."""
    assert main(["model", "quiet.safetensors"]) == 0
    code = (
        "import os, sys\n"
        "from convert.__main__ import main\n"
        "import sdjax.storage.tensors as w\n"
        "whole = w.in_order\n"
        "def noisy(*options):\n"
        "    for array in whole(*options):\n"
        "        os.write(1, b'noise'); os.write(2, b'noise'); yield array\n"
        "w.in_order = noisy\n"
        "sys.exit(main(['model', 'noisy.safetensors']))\n"
    )
    run = subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", code])
    assert run.returncode == 0
    assert Path("noisy.safetensors").read_bytes() == Path("quiet.safetensors").read_bytes()


@pytest.mark.parametrize("module", ["sdjax.storage.files", "convert.command", "jax", "convert.read"])
def test_an_interrupt_while_libraries_load_is_one_line(model, module):
    code = (
        "import os, signal, sys\n"
        "import convert.__main__\n"
        "class Finder:\n"
        "    def find_spec(name, *_):\n"
        f"        if name == {module!r}: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder)\n"
        "sys.exit(convert.__main__.main(['model', 'out']))\n"
    )
    run = subprocess.run(interruptible("-c", code), capture_output=True, text=True)
    assert run.returncode == 130
    assert run.stderr == "sdjax-convert: interrupted; nothing was written\n"
    assert run.stdout == ""
    assert not Path("out").exists()


def test_an_ignored_interrupt_stays_ignored(model):
    code = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "import convert.__main__ as m\n"
        "parser = m._parser\n"
        "def late():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    return parser()\n"
        "m._parser = late\n"
        "sys.exit(m.main(['absent', 'out']))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 2
    assert "absent: no such file" in run.stderr
