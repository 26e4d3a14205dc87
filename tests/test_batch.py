"""Jobs: what a line may say, that every picture is made exactly once whatever happens, and what is reported."""

import dataclasses
import hashlib
import io
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sdjax import cli
from sdjax.jobs import job_file, outputs
from sdjax.jobs import processes as hosts
from sdjax.jobs import run as batch
from sdjax.models.params import random_params
from sdjax.pipeline.pipeline import Pipeline
from sdjax.pipeline.recipe import read_recipe
from sdjax.request import Request
from sdjax.storage.checkpoint import save
from sdjax.text.tokenizer import clip_tokenizer
from tests.job_folders import Full, check_whole
from tests.small import SMALL

ONE = dict(steps=2, width=16, height=16)
LINES = [
    dict(prompt="a cat", seed=3, **ONE),
    dict(prompt="a dog", seed=5, count=3, guidance=2, steps=1, width=16, height=16, id="dogs"),
    dict(prompt="a bird", negative_prompt="grey", size="24x16", steps=2, sampler="heun"),
    dict(prompt="a fish", steps=3, width=16, height=16, sampler="euler_a"),
]


@pytest.fixture(scope="module")
def pipe():
    return Pipeline(SMALL, random_params(SMALL), clip_tokenizer(), "small")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def text_of(lines):
    return "".join(json.dumps(line) + "\n" for line in lines)


def prepared(out, lines, **options):
    return batch.prepare(io.StringIO(text_of(lines)), ".jsonl", out, {}, {}, **{"skip_bad": False, **options})


def made(pipe, out, lines=LINES, **options):
    with batch.at_work(out):
        prepared(out, lines)
        return batch.run(pipe, out, model="small", dtype="float32", batch=2, **options)


def manifest(out):
    return [json.loads(text) for text in (out / "manifest.jsonl").read_text("utf-8").splitlines()]


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), np.int64)


# Lines


def read(text, kind=".jsonl", **defaults):
    return list(job_file.read_lines(io.StringIO(text, newline=""), kind, defaults))


def test_a_line_is_a_request_and_defaults_fill_what_it_lacks():
    first, second = read(
        text_of([dict(prompt="ä", size="24x16", count=2, guidance_interval=[0.1, 0.5]), dict(prompt="b")]), seed=7
    )
    assert first == job_file.Line(
        1, "0000001", 2, Request("ä", seed=7, width=24, height=16, guidance_interval=(0.1, 0.5), id="0000001")
    )
    assert [first.name(j) for j in range(2)] == ["0000001-7", "0000001-8"]
    assert (second.number, second.name(0)) == (2, "0000002")


def test_csv_and_txt_say_the_same_as_json_lines():
    expected = read(text_of([dict(prompt='a "red", cat', seed=1, guidance=2.5), dict(prompt="a dog", sampler="ddim")]))
    found = read('prompt,seed,guidance,sampler\r\n"a ""red"", cat",1,2.5,\r\na dog,,,ddim\r\n', ".csv")
    assert [line.request.prompt for line in found] == [line.request.prompt for line in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert dataclasses.replace(theirs.request, id=ours.id) == ours.request
    assert [line.request.prompt for line in read("a cat\n\n  a dog \n", ".txt")] == ["a cat", "a dog"]
    assert [line.number for line in read("a cat\n\n  a dog \n", ".txt")] == [1, 3]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not JSON"),
        ("[1]", r"expected an object \{...\}, found \[1\]"),
        ("{}", "the prompt is missing"),
        ('{"prompt": 3}', "prompt must be a string, or an encoded prompt"),
        ('{"prompt": "a", "stepz": 3}', "unknown field 'stepz'; the fields are id, prompt"),
        ('{"prompt": "a", "steps": 2.5}', "steps must be a whole number above 0, found 2.5"),
        ('{"prompt": "a", "guidance": NaN}', "guidance must be a finite number, found nan"),
        ('{"prompt": "a", "sampler": "eular"}', "sampler must be one of ddpm"),
        ('{"prompt": "a", "seed": 4294967295, "count": 2}', "seed must be a whole number in"),
        ('{"prompt": "a", "count": 0}', "count must be a whole number above 0"),
        ('{"prompt": "a", "size": "60x64"}', "width must be a multiple of 8, found 60"),
        ('{"prompt": "a", "size": 64}', "size must be WIDTHxHEIGHT such as 512x768, found 64"),
        ('{"prompt": "a", "height": true}', "height must be a multiple of 8, found True"),
        ('{"prompt": "a", "id": "../a"}', r"id must be up to 100 letters, digits"),
        ('{"prompt": "a", "id": ".a"}', r"id must be up to 100 letters, digits"),
        ('{"prompt": "a", "init_image": "no.png"}', "init_image: no.png: no such picture file"),
        ('{"prompt": "a", "init_image": 3}', "init_image must be the path of a picture, found 3"),
        ('{"prompt": "a", "mask": "tests/data/astronaut.png"}', "a mask needs an init_image"),
        ('{"prompt": "a", "strength": 0.5}', "strength needs an init_image"),
        ('{"prompt": "a", "guidance_interval": 3}', "guidance_interval must be two fractions"),
    ],
)
def test_a_line_that_is_no_request_is_rejected_with_its_number_and_reason(text, reason):
    good, bad = read('{"prompt": "a"}\n' + text + "\n")
    assert isinstance(good, job_file.Line)
    assert (bad.number, bad.text) == (2, text)
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(bad.reason)


def test_ids_are_unique_down_to_the_pictures():
    first, second, third = read(
        text_of([dict(prompt="a", id="a", count=2, seed=4), dict(prompt="b", id="a-5"), dict(prompt="c", id="a")])
    )
    assert isinstance(first, job_file.Line)
    assert "the id 'a-5' is taken" in second.reason
    assert isinstance(third, job_file.Line)  # a-4 and a-5 are not a


def test_a_csv_file_without_a_head_line_is_refused():
    with pytest.raises(ValueError, match=r"the first line must name the columns, prompt and others of .*: a cat"):
        read("a cat\na dog\n", ".csv")
    assert "more values than there are columns" in read("prompt\na,b\n", ".csv")[0].reason
    assert "seed must be a number, found 'x'" in read("prompt,seed\na,x\n", ".csv")[0].reason


def test_bad_lines_stop_the_job_or_are_left_out(here):
    lines = [dict(prompt="a"), dict(prompt="b", steps=0), dict(prompt="c")]
    with pytest.raises(ValueError, match=r"1 lines are invalid .*line 2: steps must be"):
        prepared(here, lines)
    assert not list(here.iterdir())
    assert [line.number for line in prepared(here, lines, skip_bad=True)] == [2]
    assert json.loads((here / "rejected.jsonl").read_text())["number"] == 2
    assert len((here / "jobs.jsonl").read_text().splitlines()) == 2


def test_a_folder_is_for_one_job(here):
    prepared(here, LINES)
    prepared(here, LINES)
    before = (here / "jobs.jsonl").read_bytes()
    with pytest.raises(ValueError, match="holds another job"):
        prepared(here, LINES[:-1])
    with pytest.raises(ValueError, match="there is no request in this job"):
        prepared(here / "..", [])
    assert (here / "jobs.jsonl").read_bytes() == before
    with batch.at_work(here), pytest.raises(ValueError, match="another process is at work"), batch.at_work(here):
        pass


# Pictures


@pytest.fixture(scope="module")
def whole(pipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    assert made(pipe, out) == (6, 0, 0)
    return out


def test_every_picture_is_the_one_made_alone_and_carries_its_recipe(pipe, whole):
    names = {"0000001": 3, "dogs-5": 5, "dogs-6": 6, "dogs-7": 7, "0000003": 0, "0000004": 0}
    assert {entry["id"]: entry["seed"] for entry in manifest(whole)} == names
    assert sorted(path.name for path in whole.glob("*.png")) == sorted(f"{name}.png" for name in names)
    for entry in manifest(whole):
        path = whole / entry["file"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == entry["sha256"]
        recipe = read_recipe(path)
        assert json.loads(recipe.to_json()) == entry["settings"]
        settings = {name: getattr(recipe, name) for name in ("seed", "steps", "guidance", "sampler", "width", "height")}
        (alone,) = pipe.text_to_image(recipe.prompt, recipe.negative_prompt, **settings)
        assert np.abs(pixels(path) - np.asarray(alone, np.int64)).max() <= 1
    assert pixels(whole / "0000003.png").shape == (16, 24, 3)


def test_a_finished_job_makes_nothing_again_and_a_lost_picture_only_itself(pipe, whole, tmp_path):
    out = tmp_path / "copy"
    out.mkdir()
    for file in whole.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    assert made(pipe, out) == (0, 6, 0)
    (out / "dogs-6.png").unlink()
    assert made(pipe, out) == (1, 5, 0)
    assert sorted(entry["id"] for entry in manifest(out)) == sorted(entry["id"] for entry in manifest(whole))
    assert np.abs(pixels(out / "dogs-6.png") - pixels(whole / "dogs-6.png")).max() <= 1


def test_shards_hold_the_same_pictures(pipe, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(outputs, "SHARD", 4)
    assert made(pipe, tmp_path, shards=True) == (6, 0, 0)
    shards = sorted(tmp_path.glob("shard-*"))
    assert [shard.name for shard in shards] == ["shard-000000.tar", "shard-000001.tar"]
    found = {}
    for shard in shards:
        with tarfile.open(shard) as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar}
    assert len(found) == 12
    for entry in manifest(tmp_path):
        data = found[f"{entry['id']}.png"]
        assert hashlib.sha256(data).hexdigest() == entry["sha256"]
        assert json.loads(found[f"{entry['id']}.json"]) == entry["settings"]
        assert np.abs(pixels(io.BytesIO(data)) - pixels(whole / f"{entry['id']}.png")).max() <= 1


@pytest.mark.parametrize("suffix", [".webp", ".jpg"])
def test_other_kinds_of_pictures_carry_recipes_too(pipe, whole, tmp_path, suffix):
    assert made(pipe, tmp_path, LINES[:1], suffix=suffix) == (1, 0, 0)
    (path,) = tmp_path.glob(f"*{suffix}")
    assert read_recipe(path) == read_recipe(whole / "0000001.png")
    assert np.abs(pixels(path) - pixels(whole / "0000001.png")).mean() < 40  # they lose some of the noise


# What can go wrong


def test_a_picture_that_cannot_be_made_is_reported_and_the_rest_is_made(pipe, here):
    (here / "torn.png").write_bytes(b"no picture")
    lines = [LINES[0], dict(prompt="x", init_image="torn.png", id="torn", **ONE), LINES[3]]
    reports = []
    assert made(pipe, here / "out", lines, report=lambda *report: reports.append(report)) == (2, 0, 1)
    assert len(reports) == 1
    assert reports[0][0] == "torn"
    assert "torn.png: not a picture that can be read" in reports[0][1]
    (failed,) = (json.loads(text) for text in (here / "out" / "failed.jsonl").read_text().splitlines())
    assert (failed["id"], failed["line"]) == ("torn", 2)
    Image.new("RGB", (16, 16), "red").save(here / "torn.png")
    assert made(pipe, here / "out", lines) == (1, 2, 0)
    assert not (here / "out" / "failed.jsonl").exists()


def test_a_picture_of_nan_is_reported_and_not_written(pipe, here):
    """One seed's noise is NaN; its neighbours in the batch are as they were."""
    noise = np.zeros((2, 2, 4), np.float32)
    requests = [Request("a", seed=seed, steps=2, width=16, height=16) for seed in (1, 2)]
    bad = Request("a", noise=noise * np.nan, steps=2, width=16, height=16, id="bad")
    errors = []
    found = list(pipe.batch([requests[0], bad, requests[1]], batch=3, on_error=lambda *e: errors.append(e)))
    assert [request for request, _ in found] == requests
    ((request, error),) = errors
    assert request.id == "bad"
    assert "came out as NaN or infinity in float32; try less guidance" in str(error)
    for request, picture in found:
        (alone,) = pipe.text_to_image("a", seed=request.seed, steps=2, width=16, height=16)
        assert np.abs(np.asarray(picture, int) - np.asarray(alone, int)).max() <= 1
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        list(pipe.batch([bad]))


@pytest.mark.parametrize("shards", [False, True])
def test_a_full_disk_costs_only_what_did_not_fit(pipe, here, monkeypatch, shards):
    appends = itertools.count()
    append = outputs.append
    monkeypatch.setattr(outputs, "append", lambda file, data: append(Full(file) if next(appends) == 3 else file, data))
    reports = []
    assert made(pipe, here, report=lambda *r: reports.append(r), shards=shards) == (5, 0, 1)
    assert "No space left on device" in reports[0][1]
    assert made(pipe, here, shards=shards) == (1, 5, 0)
    check_whole(here, 6)


@pytest.mark.parametrize("at", [0, 1])
def test_an_interruption_leaves_no_picture_without_its_line(at, pipe, here, monkeypatch):
    """Ctrl-C while a picture is appended to a shard, and while its line is to the manifest; others wait behind it."""
    appends, append, encoded = itertools.count(), outputs.append, batch.encoded

    def interrupted(file, data):
        if next(appends) == at:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            time.sleep(0.2)
        append(file, data)

    def slowly(*arguments):
        time.sleep(0.2)
        return encoded(*arguments)

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(outputs, "append", interrupted)
            patch.setattr(batch, "encoded", slowly)
            patch.setattr(batch, "ENCODING", 1)
            with pytest.raises(KeyboardInterrupt):
                made(pipe, here, shards=True)
    finally:
        signal.signal(signal.SIGINT, handler)
    done = len(manifest(here))
    assert 2 <= done < 6
    assert made(pipe, here, shards=True) == (6 - done, done, 0)
    check_whole(here, 6)


def test_foreign_files_are_not_replaced(pipe, here):
    (here / "0000001.png").write_bytes(b"mine")
    assert made(pipe, here, LINES[:1]) == (0, 0, 1)
    assert (here / "0000001.png").read_bytes() == b"mine"


WORKER = """
import sys, time
from pathlib import Path
from PIL import Image
from sdjax.jobs import run as batch
from sdjax.jobs import outputs
from sdjax.jobs.processes import ALONE, initialize
from tests.small import SMALL


class Painter:  # stands for a Pipeline: the files are what is tested
    config = SMALL

    def files_of(self, request):
        return {}

    def batch(self, requests, batch_size, on_error):
        for request in requests:
            time.sleep(0.002)
            while share.process_index == 0 and share.process_count > 1 and not Path(sys.argv[7]).exists():
                time.sleep(0.01)
            yield request, Image.new("RGB", (16, 16), (request.seed % 256, 0, 0))


outputs.SHARD = 25
out = Path(sys.argv[1])
share = initialize(sys.argv[4], int(sys.argv[5]), int(sys.argv[6])) if sys.argv[4:] else ALONE
with batch.at_work(out, share), open(sys.argv[2]) as jobs:
    batch.prepare(jobs, ".jsonl", out, {}, {}, skip_bad=False, share=share)
    print("at work", flush=True)
    print(batch.run(Painter(), out, model="", dtype="float32", shards=sys.argv[3] == "shards", share=share))
"""


def worker(tmp_path, kind, *share):
    """A process at work on tmp_path/jobs.jsonl."""
    command = [sys.executable, "-c", WORKER, str(tmp_path / "out"), str(tmp_path / "jobs.jsonl"), kind, *share]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def free_address():
    """HOST:PORT of this machine where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def until_at_work(process):
    for line in process.stdout:
        if line == "at work\n":
            return
    pytest.fail("the process ended before it began")


@pytest.mark.parametrize("kind", ["files", "shards"])
def test_a_job_that_is_killed_ten_times_makes_every_picture_exactly_once(tmp_path, kind):
    count, dice, kills = 400, random.Random(0), 0
    (tmp_path / "jobs.jsonl").write_text(text_of([dict(prompt="a", seed=i * 4, count=4) for i in range(count // 4)]))
    while True:
        process = worker(tmp_path, kind)
        if kills < 10:
            until_at_work(process)
            time.sleep(dice.uniform(0, 0.12))
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            continue
        output, _ = process.communicate()
        assert process.returncode == 0, output
        break
    assert "failed=0" in output
    assert 0 < int(output.split("before=")[1].split(",")[0]) < count, "the kills struck in the middle"
    check_whole(tmp_path / "out", count)


@pytest.mark.parametrize(("processes", "kind"), [(2, "files"), (4, "shards")])
def test_processes_share_a_job_and_one_that_is_killed_may_come_back(tmp_path, processes, kind):
    """Under `jax.distributed`; then one process alone finds nothing left to do."""
    count = 600
    (tmp_path / "jobs.jsonl").write_text(text_of([dict(prompt="a", seed=i * 7, count=7) for i in range(count // 7)]))
    count = count // 7 * 7
    address = free_address()

    def start(process):
        return worker(tmp_path, kind, address, str(processes), str(process), str(tmp_path / "all are here"))

    workers = [start(process) for process in range(processes)]
    until_at_work(workers[1])
    workers[1].send_signal(signal.SIGKILL)
    workers[1].wait()
    workers[1] = start(1)
    until_at_work(workers[1])
    (tmp_path / "all are here").touch()  # process 0 waits for it, and so has not ended
    for process in workers:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
        assert "failed=0" in output
    check_whole(tmp_path / "out", count)
    assert len(list((tmp_path / "out").glob("manifest*.jsonl"))) == processes
    output, _ = worker(tmp_path, kind).communicate()
    assert f"made=0, before={count}, failed=0" in output


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--num-processes", "2"], "belong together"),
        (["--coordinator", "h:1", "--num-processes", "2", "--process-id", "2"], "process-id must be from 0 to 1"),
        (["--coordinator", "here", "--num-processes", "2", "--process-id", "0"], "HOST:PORT of process 0"),
        (["--coordinator", "h:99999", "--num-processes", "2", "--process-id", "0"], "HOST:PORT of process 0"),
        (["--distributed"], "the processes could not be joined"),
        (["--devices", "9"], "devices must be between 1 and the 4 of this machine"),
        (["--devices", "3", "--split-params", "2"], "model_parallel must be a whole number that divides the 3 devices"),
    ],
)
def test_impossible_processes_and_devices_are_one_clear_error(here, capsys, options, says):
    (here / "jobs.txt").write_text("a cat\n")
    assert cli.main(["batch", "jobs.txt", "-o", "out", *options]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_a_process_waits_for_the_first_one_and_says_so(here, capsys, monkeypatch):
    monkeypatch.setattr(hosts, "PATIENCE", 1.0)
    monkeypatch.setattr(hosts, "NOTE_AFTER", 0.3)
    (here / "jobs.txt").write_text("a cat\n")
    address = free_address()
    processes = ["--coordinator", address, "--num-processes", "2", "--process-id", "1"]
    assert cli.main(["batch", "jobs.txt", "-o", "out", *processes]) == 2
    note, error = capsys.readouterr().err.splitlines()
    assert note.startswith(f"sdjax: note: waiting for process 0 at {address}")
    assert error.startswith(f"sdjax: error: the processes could not be joined: no answer from process 0 at {address}")
    assert not (here / "out").exists()


# From Python, and one program for all


def test_requests_that_differ_in_everything_share_batches_and_each_is_the_one_made_alone(pipe):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8))
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 16, 8))
    size = dict(width=16, height=16)
    requests = [
        Request("a cat", "a dog", seed=1, steps=3, guidance=4, **size),
        Request("a bird", seed=2, steps=1, guidance=1, sampler="euler_a", **size),
        Request("a fish", seed=3, steps=4, sampler="heun", spacing="trailing", guidance_interval=(0, 0.5), **size),
        Request("a tree", seed=4, steps=4, image=photo, strength=0.5, sampler="dpmpp_sde", **size),
        Request("a rose", seed=5, steps=3, image=photo, mask=mask, sampler="unipc", guidance_rescale=0.7, **size),
    ]
    found = list(pipe.batch(iter(requests), batch=5))
    assert [request for request, _ in found] == requests
    for request, picture in found:
        ((_, alone),) = pipe.batch([request], batch=1)
        assert np.abs(np.asarray(picture, int) - np.asarray(alone, int)).max() <= 1
    assert len({picture.tobytes() for _, picture in found}) == 5


def test_requests_are_taken_only_as_they_are_needed(pipe):
    taken = []

    def endless():
        for seed in itertools.count():
            taken.append(seed)
            yield Request("a", seed=seed, steps=1, guidance=1, width=16, height=16)

    stream = pipe.batch(endless(), batch=2)
    seeds = [request.seed for request, _ in itertools.islice(stream, 5)]
    assert seeds == [0, 1, 2, 3, 4]
    assert len(taken) <= 8


def test_fifty_random_settings_compile_each_program_once(pipe):
    """The first call compiles; then nothing, whatever changes but the size and the number of pictures."""
    dice = random.Random(0)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 24, 3), np.uint8))
    samplers, spacings = ("ddpm", "plms", "heun", "unipc", "dpmpp_sde", "lms"), ("leading", "karras", "trailing")
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if name == "/jax/core/compile/backend_compile_duration" else None
    )
    other = jax.tree.map(lambda leaf: jnp.asarray(leaf) * 1.01, pipe.params)
    models = [pipe, Pipeline(SMALL, other, pipe.tokenizer, "other")]

    def draw(task):
        start = dice.uniform(0, 0.5)
        settings = dict(
            seed=dice.randrange(2**32),
            steps=dice.randrange(1, 20),
            guidance=dice.choice([1, 2.5, 7.5, dice.uniform(0, 10)]),
            guidance_rescale=dice.choice([0.0, 0.7]),
            guidance_interval=(start, dice.uniform(start, 1)),
            sampler=dice.choice(samplers),
            spacing=dice.choice(spacings),
        )
        prompt, model = (
            " ".join(dice.choices(["cat", "red", "two", "sea"], k=dice.randrange(1, 9))),
            dice.choice(models),
        )
        size = dict(width=24, height=16)
        if task == "text":
            return model.text_to_image(prompt, "grey", **settings, **size)
        strength = dice.uniform(0, 1)
        if task == "image":
            return model.image_to_image(prompt, photo, "grey", strength=strength, **settings, **size)
        mask = Image.new("L", (24, 16))
        mask.paste(255, (0, 0, 8 * dice.randrange(1, 4), 16))
        return model.inpaint(prompt, photo, mask, "grey", strength=strength, **settings, **size)

    for task in ("text", "image", "inpaint"):
        draw(task)
    assert compiled
    compiled.clear()
    for _ in range(50):
        draw(dice.choice(("text", "image", "inpaint")))
    assert compiled == []


# The command


def test_the_command_makes_a_job_reports_and_goes_on(here, capsys):
    save("small", SMALL, random_params(SMALL))
    Path("jobs.txt").write_text("a cat\na dog\n")
    command = ["batch", "jobs.txt", "-o", "out", "--model", "small", "--size", "16x16", "--steps", "1", "--batch", "2"]
    assert cli.main([*command, "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert "2 requests, 2 pictures, 0 of them made" in plan
    assert "16x16, up to 64 UNet calls: 2 pictures in 1 batches of 2, one program; about" in plan
    assert not list(Path("out").glob("*.png"))
    assert cli.main(command) == 0
    assert "2 pictures made, 0 were there before, 0 failed" in capsys.readouterr().out
    assert cli.main(command) == 0
    assert "0 pictures made, 2 were there before, 0 failed" in capsys.readouterr().out
    assert cli.main(["batch", "jobs.txt", "-o", "out", "--model", "small"]) == 2
    assert "out holds another job" in capsys.readouterr().err
    assert cli.main(["batch", "no.jsonl", "-o", "new", "--model", "small"]) == 2
    assert "no.jsonl: no such job file" in capsys.readouterr().err
    assert cli.main(["batch", "jobs.xml", "-o", "new", "--model", "small"]) == 2
    assert "expected a job file that ends in .jsonl, .csv, .tsv or .txt, or -" in capsys.readouterr().err
