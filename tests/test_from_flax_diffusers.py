"""What `examples/from_flax_diffusers.md` says is now written is run from top to bottom, and its commands are parsed."""

import ast
import dataclasses
import importlib
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convert.__main__ import _parser as convert_parser
from convert.write import write_diffusers
from sdjax.cli.options import parser
from sdjax.config import SamplerName, Spacing
from sdjax.models.params import random_params
from sdjax.train.dataset import open_dataset
from tests.flax_files import MODEL, make_flax, write_run

SIMPLE = dataclasses.replace(
    MODEL,
    vae=dataclasses.replace(MODEL.vae, channels=(32,)),
    unet=dataclasses.replace(MODEL.unet, channels=(32,), transformer_layers=(1,), heads=(2,)),
)
"""With one level, which compiles in half the time."""

PAGE = Path(__file__).parent.parent / "examples" / "from_flax_diffusers.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
"""Language and text: py and bash are what was written then, python and sh what is written now."""

COMMANDS = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the models and pictures that the page names; the hub has one model, with a branch of Flax'."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SDJAX_CACHE", str(tmp_path / "cache"))
    write_diffusers("a-pytorch-model", SIMPLE, random_params(SIMPLE))
    make_flax(Path(shutil.copytree("a-pytorch-model", "my-flax-model")))
    write_run(
        tmp_path / "my_run" / "checkpoints", make_flax(Path(shutil.copytree("a-pytorch-model", "both")), keep=True)
    )
    loading = importlib.import_module("sdjax.load")  # not the function of that name
    monkeypatch.setattr(loading, "download", lambda name, revision: tmp_path / {"bf16": "my-flax-model"}[revision])
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save("photo.png")
    Image.fromarray(pixels[..., 0]).save("mask.png")
    Path("dreambooth").mkdir()
    for name in ("ohwx1", "ohwx2", *map(str, range(8))):
        Image.new("RGB", (16, 16), (200, 10, 10)).save(f"dreambooth/{name}.png")
    return tmp_path


def test_the_page_has_a_counterpart_for_each_block_of_then():
    kinds = [kind for kind, _ in BLOCKS]
    assert set(kinds) == {"py", "python", "bash", "sh"}
    for then, now in (("py", ("python",)), ("bash", ("sh",))):
        for at, kind in enumerate(kinds):
            if kind == then:
                rest = [other for other in kinds[at + 1 :] if other in (then, *now)]
                assert rest[0] in now, BLOCKS[at]


@pytest.mark.filterwarnings("ignore:.*CLIP's own tokenizer|.*training on was left out")
def test_what_is_written_now_runs_from_top_to_bottom(place):
    names = {}
    for kind, text in BLOCKS:
        if kind == "python":
            exec(compile(text, str(PAGE), "exec"), names)
    assert [picture.size for picture in names["same"]] == [(SIMPLE.image_size,) * 2]
    assert {path.name for path in place.glob("?.png")} == {"0.png", "1.png"}
    assert names["trained"].config.unet == SIMPLE.unet
    data = open_dataset(place / "dreambooth")
    assert len(data) == 10
    assert float(sum(data.weights[2:])) == pytest.approx(float(sum(data.weights[:2])))


@pytest.mark.parametrize("text", [text for kind, text in BLOCKS if kind == "py"])
def test_what_was_written_then_is_python(text):
    ast.parse(text)


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_is_understood(line):
    program, *arguments = shlex.split(line)
    {"sdjax": parser, "sdjax-convert": convert_parser}[program]().parse_args(arguments)


def test_every_sampler_and_spacing_of_the_table_is_there():
    rows = re.findall(r"^\| `Flax\w+Scheduler`[^|]*\| `(\w+)`, `(\w+)` \|$", PAGE.read_text(), re.MULTILINE)
    assert len(rows) == 6
    for sampler, spacing in rows:
        assert sampler in SamplerName.__args__
        assert spacing in Spacing.__args__
