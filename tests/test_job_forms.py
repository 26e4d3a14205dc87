"""Job files as people's editors, spreadsheets and other tools write them, and what is wrong with one line of them."""

import io
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from sdjax import cli
from sdjax.config import SamplingConfig
from sdjax.jobs import job_file
from sdjax.jobs import run as batch
from sdjax.jobs.forms import FIELDS
from sdjax.models.params import random_params
from sdjax.pipeline.recipe import file_hash, recipe_of
from sdjax.request import Request
from sdjax.storage import checkpoint
from sdjax.train.dataset import open_dataset
from tests.small import MINI, mini


def read(data, kind=".jsonl", **defaults):
    return list(job_file.read_lines(io.BytesIO(data), kind, defaults))


def prompts(lines):
    return [line.request.prompt if isinstance(line, job_file.Line) else line.reason for line in lines]


def only(lines):
    """The reason of the only line."""
    (line,) = lines
    assert isinstance(line, job_file.Rejected), line
    return line.reason


TEXT = "a café, 日本 😀"
FORMS = {
    ".txt": f"{TEXT}\nb\n",
    ".jsonl": json.dumps({"prompt": TEXT}, ensure_ascii=False) + '\n{"prompt": "b"}\n',
    ".csv": f'prompt,steps\n"{TEXT}",5\nb,\n',
    ".tsv": f"prompt\tsteps\n{TEXT}\t5\nb\t\n",
}
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "marked utf-16-le", "marked utf-16-be"]


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_encodings_and_line_ends_of_editors_are_read(kind, encoding, end):
    text = FORMS[kind].replace("\n", end)
    data = ("\ufeff" if "marked" in encoding else "").encode(encoding.split()[-1]) + text.encode(encoding.split()[-1])
    assert prompts(read(data, kind)) == [TEXT, "b"]


@pytest.mark.parametrize("kind", FORMS)
def test_a_line_in_another_encoding_costs_that_line_alone(kind):
    lines = FORMS[kind].encode().splitlines(keepends=True)
    bad = {".jsonl": b'{"prompt": "caf\xe9"}\n', ".tsv": b"caf\xe9\t3\n"}.get(kind, b"caf\xe9\n")
    (first, rejected, last) = read(b"".join([*lines[:-1], bad, lines[-1]]), kind)
    assert (first.request.prompt, last.request.prompt) == (TEXT, "b")
    assert rejected.number == len(lines)
    assert "is no UTF-8 text; save the file as UTF-8" in rejected.reason
    assert r"caf\xe9" in rejected.text


@pytest.mark.parametrize("kind", FORMS)
def test_a_separator_of_unicode_is_no_line_end(kind):
    text = "a\u2028b\x85c" if kind == ".jsonl" else "a\u2028b\x85c\x0cd"
    assert prompts(read(FORMS[kind].replace(TEXT, text).encode(), kind)) == [text, "b"]


BAD_JSON = [
    (b"{", "not JSON"),
    (b"[" * 100_000, "too deep"),
    (b'{"prompt": ' + b"[" * 100_000, "too deep"),
    (b'[{"prompt": "a"}]', "write each object of a list into its own line"),
    (b'"a"', "expected an object"),
    (b"5", "expected an object"),
    (b'{"prompt": "a", "prompt": "b"}', "'prompt' is there twice"),
    (b'{"prompt": "\\ud800"}', "half of a character"),
    (b'{"prompt": "a\\u0000"}', "holds a zero character"),
    (b"\0" * 50, "zeros between the letters"),
    (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "a number of 5000 digits is too large"),
    (b'{"prompt": "a", "seed": NaN}', "seed must be a whole number"),
    (b'{"prompt": "a", "guidance": Infinity}', "guidance must be a finite number"),
    (b'{"prompt": "a", "guidance": 1e999}', "guidance must be a finite number"),
    (b'{"prompt": "a", "steps": true}', "steps must be a whole number"),
    (b'{"prompt": "a", "steps": 2.5}', "steps must be a whole number"),
    (b'{"prompt": "a", "seed": -2}', "seed must be a whole number"),
    (b'{"prompt": "a", "seed": 4294967296}', "seed must be a whole number"),
    (b'{"prompt": "a", "count": 4000000000}', "count must be 1,000,000 at most"),
    (b'{"prompt": "a", "count": 0}', "count must be a whole number above 0"),
    (b'{"prompt": "a", "count": "5"}', "count must be a whole number"),
    (b'{"prompt": "a", "width": 1000000000}', "width must be 16383 at most"),
    (b'{"prompt": "a", "size": "99992x8"}', "width must be 16383 at most"),
    (b'{"prompt": "a", "size": [8, 8]}', "size must be WIDTHxHEIGHT"),
    (b'{"prompt": "a", "id": "../x"}', "id must be up to 100 letters"),
    (b'{"prompt": "a", "id": "' + b"x" * 300 + b'"}', "id must be up to 100 letters"),
    (b'{"prompt": "a", "id": 5}', "id must be up to 100 letters"),
    (b'{"prompt": ["a"]}', "prompt must be a string"),
    (b'{"prompt": "' + b"a" * 2**20 + b'"}', "longer than 1,048,576 bytes"),
    (b'{"prompt": "a", "init_image": "' + b"x" * 5000 + b'"}', "no such picture file"),
    (b'{"prompt": "a", "init_image": "/"}', "no such picture file; it is a folder"),
    (b'{"prompt": "a", "init_image": "/dev/null"}', "no such picture file; it is no file"),
    (b'{"prompt": "a", "cfg_scale": 5, "guidance": 5}', "guidance is there twice, once as cfg_scale"),
    (b'{"prompt": "a", "scale": 5}', "unknown field 'scale' (here it is called guidance)"),
    (b'{"prompt": "a", "Seed": 5}', "unknown field 'Seed' (here it is called seed)"),
    (b'{"prompt": "a", "num_steps": 5}', "(here it is called steps)"),
    (b'{"prompt": "a", "clip_stop_at_last_layers": 2}', "(here it is called clip_skip, counted from 0)"),
    (b'{"prompt": "a", "denoising_strength": 0.5}', "strength needs an init_image"),
    (b'{"prompt": "a", "noise": [1, 2]}', "noise must be a string"),
    (b'{"prompt": "a", "lora": 5}', "loras must be FILE[:WEIGHT[:TEXT_WEIGHT]], once or several times, found 5"),
    (b'{"prompt": "a", "hypernetwork": 5}', "unknown field 'hypernetwork'; the fields are"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_JSON, ids=range(len(BAD_JSON)))
def test_a_bad_line_costs_itself_and_says_why(line, reason):
    first, rejected, last = read(b'{"prompt": "a"}\n' + line + b'\n{"prompt": "b"}')
    assert (first.request.prompt, last.request.prompt, rejected.number) == ("a", "b", 2)
    assert reason in rejected.reason
    assert len(rejected.reason) < 400
    assert "\n" not in rejected.reason


# tables


@pytest.mark.parametrize(
    "table",
    [
        "prompt,guidance\na,2.5\n",
        "prompt;guidance\na;2,5\n",
        "sep=;\nprompt;guidance\na;2,5\n",
        "\n\nprompt,guidance\n\na,2.5\n\n",
        "guidance,prompt,\n2.5,a,\n",
        '"prompt" , "guidance"\n"a","2.5"\n'.replace(" ", ""),
    ],
)
def test_tables_of_spreadsheets_are_read(table):
    (line,) = read(table.encode(), ".csv")
    assert (line.request.prompt, line.request.guidance) == ("a", 2.5)


@pytest.mark.parametrize(
    ("head", "says"),
    [
        ("prompt,seed,seed", "two columns are called seed"),
        ("prompt,scale", "unknown column 'scale' (here it is called guidance)"),
        ("prompt,guidance,cfg_scale", "two columns are called guidance"),
        ("prompt,Sampler name", "(here it is called sampler)"),
        ("prompt,hypernetwork", "unknown column 'hypernetwork'; the columns may be id, prompt"),
        ("seed,steps", "the first line must name the columns"),
        ("a red cat", "the first line must name the columns"),
        ("", "the first line must name the columns"),
    ],
)
def test_columns_that_are_not_known_are_refused_by_name(head, says):
    with pytest.raises(ValueError) as refused:
        read(f"{head}\na,b\n".encode() if head else b"", ".csv")
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("a,1,2", "more values than there are columns"),
        ('"a"b,1', "no line of a table"),
        ("a,one", "seed must be a number, found 'one'"),
        ("a,1.5", "seed must be a number"),
        ('"a,1', "a quote is not closed"),
        ("prompt,seed", "the head line again"),
    ],
)
def test_a_bad_row_costs_itself_and_the_next_ones_are_read(row, reason):
    first, rejected, last = read(f"prompt,seed\na,1\n{row}\nb,2\n".encode(), ".csv")
    assert (first.request.seed, last.request.seed, rejected.number) == (1, 2, 3)
    assert reason in rejected.reason or reason == "a quote is not closed"


def test_rows_of_several_lines_have_the_number_of_their_first():
    lines = read(b'prompt,seed\n"a\nb",1\nc,x\n', ".csv")
    assert [line.number for line in lines] == [2, 4]
    assert lines[0].request.prompt == "a\nb"


# prompts


def test_options_of_other_tools_are_understood():
    text = (
        '--prompt "a cat" --negative_prompt "bad, ugly" --steps 5 --width 64 --height 48 --cfg_scale 7 --seed 3 '
        '--sampler_name "DPM++ 2M Karras" --n_iter 2 --batch_size 3'
    )
    (line,) = read(text.encode(), ".txt")
    expected = dict(negative_prompt="bad, ugly", steps=5, width=64, height=48, guidance=7.0, seed=3)
    assert line.request == Request("a cat", sampler="dpmpp_2m", spacing="karras", id="0000001", **expected)
    assert line.count == 6


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("--prompt cat --restore_faces true", "the option --restore_faces is not known here"),
        ("--prompt cat --steps", "the option --steps lacks its value"),
        ("--prompt cat --steps five", "steps must be a number"),
        ("--prompt cat --steps 5 --steps 6", "steps is there twice"),
        ('--prompt "cat', "options that cannot be read"),
        ("--steps 5", "the prompt is missing"),
        ("a cat --ar 16:9", "--ar after a prompt is not understood"),
        ("a cat --no dogs", "--no after a prompt is not understood"),
        ('{"prompt": "a"}', "a file of them ends in .jsonl"),
    ],
)
def test_a_line_of_options_that_is_not_understood_is_named(text, reason):
    assert reason in only(read(text.encode(), ".txt"))


@pytest.mark.parametrize("prompt", ["a - b -- c", "{red|blue} heart", "a cat, (masterpiece:1.2)", "well--known", "#1"])
def test_prompts_with_odd_letters_are_prompts(prompt):
    assert prompts(read(prompt.encode(), ".txt")) == [prompt]


def test_a_table_that_is_called_txt_is_named():
    with pytest.raises(ValueError, match=r"a table's name ends in \.csv"):
        read(b"prompt,seed\na,1\n", ".txt")


# numbers of pictures, and names


def test_absurd_numbers_are_refused_at_once_and_large_ones_are_quick():
    start = time.process_time()
    lines = [{"prompt": "a", "count": 1_000_000}] * 11
    found = read("\n".join(map(json.dumps, lines)).encode())
    assert [isinstance(line, job_file.Line) for line in found] == [True] * 10 + [False]
    assert "more than 10,000,000 pictures; divide it" in found[-1].reason
    assert time.process_time() - start < 30, "it must not look at every picture"


@pytest.mark.parametrize(
    ("first", "second", "free"),
    [
        (dict(id="a", count=5, seed=3), dict(id="a-3"), False),
        (dict(id="a", count=5, seed=3), dict(id="a-7"), False),
        (dict(id="a", count=5, seed=3), dict(id="a-8"), True),
        (dict(id="a", count=5, seed=3), dict(id="a-07"), True),
        (dict(id="a-7"), dict(id="a", count=5, seed=3), False),
        (dict(id="a", count=5, seed=3), dict(id="a", count=5, seed=8), True),
        (dict(id="a", count=5, seed=3), dict(id="a", count=5, seed=7), False),
        (dict(id="a"), dict(id="a", count=5), True),
        (dict(id="a"), dict(id="a"), False),
        (dict(id="a"), dict(id="A"), True),
    ],
)
def test_ids_are_unique_down_to_the_pictures_of_a_range(first, second, free):
    found = read("\n".join(json.dumps({"prompt": "x"} | line) for line in (first, second)).encode())
    assert isinstance(found[1], job_file.Line) is free


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["a", "a-1", "b"]), st.integers(0, 9), st.integers(1, 6)), max_size=8))
def test_ids_are_taken_as_if_every_picture_had_been_looked_at(lines):
    texts = [json.dumps({"prompt": "x", "id": name, "seed": seed, "count": n}) for name, seed, n in lines]
    taken = set()
    for found, (name, seed, n) in zip(read("\n".join(texts).encode()), lines, strict=True):
        names = {name if n == 1 else f"{name}-{seed + j}" for j in range(n)}
        assert isinstance(found, job_file.Line) is taken.isdisjoint(names)
        taken |= names if isinstance(found, job_file.Line) else set()


# any bytes and any JSON


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(FORMS)), st.binary(max_size=200))
@example(".csv", b"\xef\xbb\xbf")
def test_any_bytes_are_lines_or_one_error(kind, data):
    try:
        lines, said = read(data, kind), ""
    except ValueError as error:
        lines, said = [], str(error)
    assert "\n" not in said
    for line in lines:
        assert isinstance(line, job_file.Line) or line.reason


values = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.lists(st.integers(), max_size=3)
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=4), values, max_size=5))
def test_any_object_is_a_line_that_comes_back_or_is_rejected(fields):
    (found,) = read(json.dumps({"prompt": "x"} | fields).encode())
    if isinstance(found, job_file.Line):
        assert job_file.from_json(job_file.to_json(found)) == found


# what sdjax wrote itself


def test_the_lines_of_a_job_and_of_its_manifest_are_lines(tmp_path):
    photo = tmp_path / "photo.png"
    Image.new("RGB", (16, 8), "red").save(photo)
    kept = job_file.Line(5, "x", 3, Request("a", seed=7, image=str(photo), strength=0.5, id="x"))
    (again,) = read(job_file.to_json(kept))
    assert (again.id, again.count, again.request) == ("x", 3, kept.request)
    recipe = recipe_of(
        *(Request("a", seed=9, image=str(photo), strength=0.5), SamplingConfig(), Image.new("RGB", (16, 8))),
        model="m",
        dtype="float32",
        image=(str(photo), file_hash(photo)),
    )
    line = {"picture": 0, "id": "x-9", "line": 5, "seed": 9, "sha256": "0", "file": "x-9.png"}
    entry = json.dumps(line | {"settings": json.loads(recipe.to_json())}).encode()
    (again,) = read(entry)
    assert again.id == "x-9"
    assert again.request.seed == 9
    assert (again.request.strength, again.request.image, again.request.steps) == (0.5, str(photo), recipe.steps)
    Image.new("RGB", (16, 8), "blue").save(photo)
    assert "its content changed" in only(read(entry))


# the command


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mini().tokenizer.engine.save(str(tmp_path / "tokenizer.json"))
    checkpoint.save(tmp_path / "mini", MINI, random_params(MINI), tokenizer=tmp_path, one_file=True)
    (tmp_path / "tokenizer.json").unlink()
    return ["--model", "mini", "--steps", "1"]


def command(capsys, *arguments):
    status = cli.main(["batch", *arguments])
    return status, capsys.readouterr()


def test_bad_lines_and_pictures_are_skipped_counted_and_written_down(model, capsys):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8))
    noise.save("photo.png")
    Path("cut.png").write_bytes(Path("photo.png").read_bytes()[:-60])
    Path("empty.png").touch()
    lines = [
        b'{"prompt": "good"}',
        b'{"prompt": "caf\xe9"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "clip_skip": 9}',
        b'{"prompt": "a", "init_image": "cut.png"}',
        b'{"prompt": "a", "init_image": "empty.png"}',
        b'{"prompt": "a", "init_image": "photo.png", "id": "last"}',
    ]
    Path("j.jsonl").write_bytes(b"\n".join(lines))
    status, shown = command(capsys, "j.jsonl", "-o", "out", *model)
    assert status == 2
    assert "j.jsonl: 3 lines are invalid (--skip-bad goes on without them): line 2: byte 16" in shown.err
    status, shown = command(capsys, "j.jsonl", "-o", "out", "--skip-bad", *model)
    assert status == 1
    assert "2 pictures made, 0 were there before, 2 failed" in shown.out
    assert shown.err.count("left out: ") == 3
    rejected = [json.loads(line) for line in Path("out/rejected.jsonl").read_text().splitlines()]
    assert [line["number"] for line in rejected] == [2, 3, 4]
    failed = [json.loads(line) for line in Path("out/failed.jsonl").read_text().splitlines()]
    assert sorted(line["line"] for line in failed) == [5, 6]
    assert sorted(path.name for path in Path("out").glob("*.png")) == ["0000001.png", "last.png"]


def test_with_only_bad_lines_the_reasons_are_shown(model, capsys):
    Path("j.jsonl").write_text("{\n[]\n")
    for options in ([], ["--skip-bad"]):
        status, shown = command(capsys, "j.jsonl", "-o", "out", *options, *model)
        assert status == 2
        assert "there is no request in this job: line 1: not JSON" in shown.err
    Path("empty.jsonl").touch()
    assert "empty.jsonl: there is no request in this job" in command(capsys, "empty.jsonl", "-o", "out", *model)[1].err


def test_of_many_bad_lines_twenty_are_named(model, capsys):
    Path("j.jsonl").write_text('{"prompt": "a"}\n' + "{\n" * 50)
    status, shown = command(capsys, "j.jsonl", "-o", "out", "--skip-bad", *model)
    assert status == 0
    assert shown.err.count("left out: ") == 20
    assert "and 30 more, in out/rejected.jsonl" in shown.err


@pytest.mark.parametrize(
    ("jobs", "out", "says"),
    [
        ("j.jsonl", "file", "file: is there and is no folder"),
        ("j.jsonl", "file/x", "is there and is no folder"),
        ("j.jsonl", "/proc/x", "/proc: cannot be written into"),
        ("j.jsonl", "x" * 300, "a name of 300 bytes"),
        ("j.jsonl", "dead", "dead: a link to nothing"),
        ("out/jobs.jsonl", "out", "is what out keeps of its job"),
        ("out/manifest.jsonl", "out", "is what out keeps of its job"),
        ("mini", "out", "mini: a folder; expected a job file"),
        ("j.xlsx", "out", "expected a job file that ends in"),
        ("dead.csv", "out", "dead.csv: a link to nothing"),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_model_is_read(model, capsys, monkeypatch, jobs, out, says):
    monkeypatch.setattr("sdjax.storage.checkpoint.restore", lambda *_, **__: pytest.fail("slow work was begun"))
    Path("j.jsonl").write_text('{"prompt": "a"}')
    Path("file").touch()
    Path("j.xlsx").touch()
    for name in ("dead", "dead.csv"):
        Path(name).symlink_to("gone")
    Path("out").mkdir()
    for name in ("jobs", "manifest"):
        Path(f"out/{name}.jsonl").write_text('{"prompt": "a"}')
    before = Path("out/jobs.jsonl").read_bytes()
    status, shown = command(capsys, jobs, "-o", out, *model)
    assert status == 2
    assert says in shown.err
    assert Path("out/jobs.jsonl").read_bytes() == before


def test_lines_that_the_model_cannot_make_are_found_before_it_is_read(model, capsys, monkeypatch):
    monkeypatch.setattr("sdjax.storage.checkpoint.restore", lambda *_, **__: pytest.fail("slow work was begun"))
    Path("j.jsonl").write_text('{"prompt": "a"}\n{"prompt": "a", "steps": 1001}\n{"prompt": "a", "clip_skip": 5}')
    status, shown = command(capsys, "j.jsonl", "-o", "out", *model)
    assert status == 2
    assert "2 lines are invalid" in shown.err
    assert "line 2: steps must be" in shown.err


def test_a_job_is_of_one_model_whatever_it_is_called(model, capsys):
    Path("j.txt").write_text("a cat")
    assert command(capsys, "j.txt", "-o", "out", *model)[0] == 0
    kept = json.loads(Path("out/job.json").read_text())
    Path("out/job.json").write_text(json.dumps({k: v for k, v in kept.items() if k not in ("content", "conversion")}))
    assert command(capsys, "j.txt", "-o", "out", *model)[0] == 0, "a job of before"
    changed = random_params(MINI, seed=1)
    checkpoint.save("mini", MINI, changed, tokenizer="mini/tokenizer", one_file=True, force=True)
    status, shown = command(capsys, "j.txt", "-o", "out", *model)
    assert status == 2
    assert "out holds another job, or this one with other settings (content" in shown.err


def test_a_job_folder_of_somebody_else_is_left_alone(model, capsys):
    Path("out").mkdir()
    Path("out/manifest.jsonl").write_text("my notes\n")
    Path("j.txt").write_text("a cat")
    status, shown = command(capsys, "j.txt", "-o", "out", *model)
    assert status == 2
    assert "out/manifest.jsonl: is there, and of no job of sdjax" in shown.err
    assert Path("out/manifest.jsonl").read_text() == "my notes\n"


def test_a_job_is_made_again_from_its_own_files(model, capsys):
    Path("j.jsonl").write_text('{"prompt": "a cat", "count": 2, "seed": 5}\n{"prompt": "b", "id": "x.1"}')
    assert command(capsys, "j.jsonl", "-o", "out", *model)[0] == 0
    for number, name in enumerate(("jobs", "manifest")):
        assert command(capsys, f"out/{name}.jsonl", "-o", f"again{number}", *model)[0] == 0
        for path in Path("out").glob("*.png"):
            assert (Path(f"again{number}") / path.name).read_bytes() == path.read_bytes()


def test_standard_input_is_read_as_bytes(model, capsys, monkeypatch):
    text = io.TextIOWrapper(io.BytesIO(b'\xef\xbb\xbf{"prompt": "a"}\n{"prompt": "caf\xe9"}\n'))
    monkeypatch.setattr("sys.stdin", text)
    status, shown = command(capsys, "-", "-o", "out", "--skip-bad", *model)
    assert status == 0
    assert "line 2 left out: byte 16" in shown.err


def test_ids_with_dots_in_shards_get_a_note_and_are_read_by_our_own_trainer(model, capsys):
    Path("j.jsonl").write_text('{"prompt": "a cat", "id": "v1.5"}\n{"prompt": "b", "id": "v1.6"}')
    status, shown = command(capsys, "j.jsonl", "-o", "out", "--shards", *model)
    assert status == 0
    assert shown.err.count("the id 'v1.5' has a dot") == 1
    assert "v1.6" not in shown.err
    assert [example.captions for example in open_dataset("out").examples] == [("a cat",), ("b",)]


def test_pipes_and_devices_do_not_hang(model, capsys):
    os.mkfifo("pipe.png")
    Path("j.jsonl").write_text('{"prompt": "a", "init_image": "pipe.png"}')
    assert "it is no file" in command(capsys, "j.jsonl", "-o", "out", *model)[1].err
    os.mkfifo("j.txt")
    assert "no such job file" in command(capsys, "j.txt", "-o", "out", *model)[1].err


def test_shown_says_how_many_more_there_are():
    assert batch.shown(["a", "b"], 2) == ["a", "b"]
    assert batch.shown(["a", "b", "c"], 1, " there") == ["a", "and 2 more there"]
