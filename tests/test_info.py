"""`sdjax info` reads everything that sdjax writes, and says so in one line where it is damaged."""

import json
from pathlib import Path

import pytest

from sdjax import cli
from sdjax.models.params import random_params
from sdjax.storage import checkpoint
from tests.small import MINI, mini


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Pictures, shards and recipes as the commands write them, of a model that takes no time."""
    folder = tmp_path_factory.mktemp("info")
    mini().tokenizer.engine.save(str(folder / "tokenizer.json"))
    checkpoint.save(folder / "mini", MINI, random_params(MINI), tokenizer=folder, one_file=True)
    (folder / "jobs.txt").write_text("a red cat\na green cat\n")
    for name, options in (("files", []), ("shards", ["--shards", "--format", "webp"])):
        arguments = ["batch", folder / "jobs.txt", "-o", folder / name, "--model", folder / "mini", "--steps", 1]
        assert cli.main([str(argument) for argument in (*arguments, *options)]) == 0
    run = folder / "run"
    run.mkdir()
    (run / "settings.json").write_text(json.dumps({"steps": 7, "part": "vae"}))
    (run / "metrics.jsonl").write_text('{"step": 2, "loss": 1.0}\n{"step": 4, "loss": 0.5}\n{"step": 6, "lo')
    return folder


def info(capsys, path):
    status = cli.main(["info", str(path)])
    shown = capsys.readouterr()
    return status, shown.out, [line for line in shown.err.splitlines() if line.startswith("sdjax: error:")]


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("mini", ["model       mini: 8x8 pixels"]),
        ("files", ["job         2 requests, 2 pictures made, 0 failed", "format png"]),
        ("files/0000001.png", ["a red cat", '"prompt": "a red cat"']),
        ("shards", ["job         2 requests, 2 pictures made, 0 failed", "format webp"]),
        ("shards/shard-000000.tar", ["shard       2 pictures", '"prompt": "a red cat"']),
        ("files/job.json", ["job         2 requests, 2 pictures made, 0 failed"]),
        ("files/manifest.jsonl", ["manifest    2 pictures made", '"prompt": "a red cat"']),
        ("files/jobs.jsonl", ["job         2 requests", '"prompt": "a red cat"']),
        ("run/metrics.jsonl", ["training    3 lines of metrics", '"loss": 0.5']),
        ("run", ["training    4 of 7 updates", "part vae"]),
    ],
)
def test_what_sdjax_writes_is_shown(made, capsys, path, says):
    status, out, errors = info(capsys, made / path)
    assert (status, errors) == (0, [])
    assert all(text in out for text in says), out


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '"text"', "[" * 10000, "\0" * 100, '{"requests": ', "\ud800"], ids=repr
)
@pytest.mark.parametrize("name", ["job.json", "settings.json", "recipe.json", "manifest.jsonl"])
def test_damaged_files_of_ours_are_one_line(tmp_path, capsys, name, content):
    (tmp_path / name).write_bytes(content.encode("utf-8", "surrogatepass"))
    status, out, errors = info(capsys, tmp_path / name if name in ("recipe.json", "manifest.jsonl") else tmp_path)
    assert (status, out, len(errors)) == (2, "", 1)
    assert "fault of sdjax" not in errors[0]
    assert name in errors[0]


@pytest.mark.parametrize("cut", [0, 100, 512, 600, 1200, 5000])
def test_a_shard_that_is_cut_short_is_shown_or_one_line(made, capsys, tmp_path, cut):
    whole = (made / "shards" / "shard-000000.tar").read_bytes()
    Path(tmp_path / "cut.tar").write_bytes(whole[:cut])
    status, _, errors = info(capsys, tmp_path / "cut.tar")
    assert (status, len(errors)) in ((0, 0), (2, 1))
    assert not any("fault of sdjax" in line for line in errors)


def test_options_that_go_with_a_model_are_not_passed_over(capsys):
    for options in (["--dtype", "bfloat16"], ["--vae", "x.pt"]):
        assert cli.main(["selftest", *options]) == 2
        assert "go with a model, and none is given" in capsys.readouterr().err
