"""The training loop: killed or not, a run comes to the same bits; its files are of use; what is wrong is refused."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import sdjax
from convert.__main__ import main as convert_main
from sdjax.models.params import random_params
from sdjax.pipeline.pipeline import Pipeline
from sdjax.storage import checkpoint
from sdjax.text.tokenizer import from_merges
from sdjax.train import loop
from sdjax.train.dataset import open_dataset
from sdjax.train.loop import claim, train
from sdjax.train.settings import Settings
from sdjax.train.tasks import unet
from sdjax.train.tasks.clip import clip_task
from sdjax.train.tasks.task import Task
from sdjax.train.tasks.unet import unet_task
from sdjax.train.tasks.vae import vae_task
from tests.small import MINI, mini
from tests.trainings import SETTINGS, VISION, write_pictures

KINDS = ("vae", "clip", "unet")


class Interrupted(Exception):
    pass


def run(kind, folder, out, progress=None):
    """One training of the eight pictures in `folder`."""
    data = open_dataset(folder)
    claim(out, SETTINGS)
    if kind == "clip":
        task = clip_task(mini(), VISION, data, SETTINGS, out / "cache")
    else:
        task = {"vae": vae_task, "unet": unet_task}[kind](mini(), data, SETTINGS, out / "cache")
    return train(task, SETTINGS, out, progress=progress)


def rows_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.fixture(scope="module", autouse=True)
def often():
    """A line of metrics every 4 updates."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "LOG_EVERY", 4)
        yield


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, pictures):
    """kind -> (folder, model) of a run from beginning to end."""

    @cache
    def finished(kind):
        out = tmp_path_factory.mktemp("whole") / kind
        return out, run(kind, pictures, out)

    return finished


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_run_comes_to_the_same_bits(kind, pictures, whole, tmp_path):
    out, model = whole(kind)

    def interrupt(done, total, metrics):
        if done == 17:
            raise Interrupted

    with pytest.raises(Interrupted):
        run(kind, pictures, tmp_path / "run", interrupt)
    assert not (tmp_path / "run" / "model").exists()
    (tmp_path / "run" / "metrics.jsonl").open("a").write('{"step": 16, "loss": 1}\n{"step": 17, "lo')
    calls = []
    again = run(kind, pictures, tmp_path / "run", lambda done, total, metrics: calls.append(done))
    assert calls == list(range(13, 25))
    assert_equal(again.params, model.params)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (out / "metrics.jsonl").read_bytes()
    _, stored = checkpoint.restore(tmp_path / "run" / "model")
    assert_equal(stored, model.params)


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.test_train_loop import run

def progress(done, total, metrics):
    if done == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

run("vae", Path(sys.argv[1]), Path(sys.argv[2]), progress)
"""


def test_killed_process_started_again_comes_to_the_same_bits(pictures, whole, tmp_path):
    _, model = whole("vae")

    def process(at):
        command = [sys.executable, "-c", KILLED, str(pictures), str(tmp_path / "run"), str(at)]
        return subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True).returncode

    assert process(17) == -signal.SIGKILL
    assert process(-1) == 0
    _, stored = checkpoint.restore(tmp_path / "run" / "model")
    assert_equal(stored, model.params)


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_loss(kind, whole):
    out, _ = whole(kind)
    rows = rows_of(out)
    assert [row["step"] for row in rows] == [4, 8, 12, 16, 20, 24]
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert rows[1]["learning_rate"] == pytest.approx(1e-2)
    assert 0 < rows[-1]["learning_rate"] < 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_run_leaves_sheets_a_plot_and_two_states(kind, whole):
    out, _ = whole(kind)
    assert sorted(path.name for path in (out / "samples").iterdir()) == ["0000024.png"]
    for path in (*(out / "samples").iterdir(), out / "loss.png"):
        with Image.open(path) as image:
            assert len(image.convert("RGB").getcolors(2**16)) > 10
    assert {path.name for path in (out / "state").iterdir() if path.name.isdigit()} == {"12", "24"}
    assert json.loads((out / "settings.json").read_text()) == dataclasses.asdict(SETTINGS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_alone_is_trained_and_the_rest_stays(kind, whole):
    _, model = whole(kind)
    part = {"vae": "vae", "clip": "text", "unet": "unet"}[kind]
    for name in model.params:
        if name != part:
            assert_equal(model.params[name], mini().params[name])
    before = mini().params[part]
    for name in before:
        pairs = zip(*(jax.tree.leaves(tree[name]) for tree in (before, model.params[part])), strict=True)
        assert any(not np.array_equal(old, new) for old, new in pairs), name


def test_finished_model_opens_and_draws(whole):
    out, model = whole("unet")
    opened = sdjax.load(out / "model")
    assert opened.config == MINI
    prompts = ["red disc", "a blue square"]
    first, second = (m.text_to_image(prompts, steps=3) for m in (opened, model))
    assert [a.tobytes() for a in first] == [b.tobytes() for b in second]
    assert first[0].size == (8, 8)
    assert first[0].tobytes() != first[1].tobytes()


def test_finished_model_converts_to_a_safetensors_file_and_back(whole, tmp_path):
    out, model = whole("unet")
    file, back = tmp_path / "model.safetensors", tmp_path / "back"
    assert convert_main([str(out / "model"), str(file)]) == 0
    assert convert_main([str(file), str(back), "--config", str(out / "model" / "config.json")]) == 0
    _, params = checkpoint.restore(back)
    assert_equal(params, model.params)


def test_image_encoder_lies_beside_the_text_encoder(pictures, whole):
    out, model = whole("clip")
    beside = checkpoint.read_tensors(out / "beside.safetensors")
    task = clip_task(mini(), VISION, open_dataset(pictures), SETTINGS, out / "cache")
    assert set(beside) == {"image"}
    assert jax.tree.map(np.shape, beside["image"]) == jax.tree.map(np.shape, task.params["image"])
    kernel = beside["image"]["patch_embedding"]["kernel"]
    assert np.abs(kernel - task.params["image"]["patch_embedding"]["kernel"]).max() > 1e-3
    assert model.config.clip.projection == VISION.projection
    assert {"projection", "logit_scale"} <= set(model.params["text"])
    assert rows_of(out)[-1]["accuracy"] > rows_of(out)[0]["accuracy"]


# A training that needs no compiler's patience, for what does not depend on the network.

TRUTH = np.arange(12, dtype=np.float32).reshape(4, 3) / 10


def toy(bad=None, at=10**9):
    """A linear fit; from update `at` on the loss ("loss") or its gradient alone ("gradient") is not a number."""

    def loss(params, frozen, batch, key):
        noise = 0.01 * jax.random.normal(key, batch["y"].shape)
        value = jnp.square(batch["x"] @ params["w"] - batch["y"] + noise).mean()
        value += 1e-3 * jnp.sqrt(jnp.square(params["w"] * batch["z"].mean()).sum())  # no derivative at 0
        return value, {"loss": value}

    def batch(step):
        x = np.random.default_rng(step).standard_normal((8, 4)).astype(np.float32)
        z = np.ones(8, np.float32)
        if step >= at:
            x, z = (x * np.nan, z) if bad == "loss" else (x, 0 * z)
        return {"x": x, "y": x @ TRUTH, "z": z}

    start = {"w": np.full((4, 3), 0.5, np.float32)}
    picture = Image.new("RGB", (8, 8))
    model = Pipeline(MINI, random_params(MINI), from_merges([]))
    return Task(start, {}, loss, batch, lambda params: picture, lambda params: model, lambda params: params)


def toy_settings(**changes):
    settings = Settings(steps=12, batch=8, learning_rate=0.05, warmup=0, ema=0.5, save_every=4, sample_every=12)
    return dataclasses.replace(settings, **changes)


def result(out):
    return checkpoint.read_tensors(out / "beside.safetensors")["w"]


@pytest.mark.parametrize("changes", [{"scan": 2}, {"accumulate": 2}, {"shard": True}], ids=str)
def test_how_the_work_is_cut_does_not_change_the_result(changes, tmp_path):
    settings = toy_settings(steps=12)
    task = toy()
    if "accumulate" in changes:  # each part draws its own noise
        silent = task.loss
        task = dataclasses.replace(task, loss=lambda p, f, b, key: silent(p, f, b, jax.random.key(0)))
    train(task, settings, tmp_path / "one")
    train(task, dataclasses.replace(settings, **changes), tmp_path / "cut")
    tolerance = 1e-2 if "accumulate" in changes else 1e-5
    np.testing.assert_allclose(result(tmp_path / "cut"), result(tmp_path / "one"), rtol=tolerance, atol=tolerance)
    for a, b in zip(rows_of(tmp_path / "one"), rows_of(tmp_path / "cut"), strict=True):
        assert a == pytest.approx(b, rel=0.2 if "accumulate" in changes else 1e-4)


@pytest.mark.parametrize("changes", [{"optimizer": "adafactor"}, {"dtype": "bfloat16"}], ids=str)
def test_other_optimizers_and_dtypes_learn_and_write_float32(changes, tmp_path):
    train(toy(), toy_settings(steps=40, save_every=40, **changes), tmp_path / "run")
    assert result(tmp_path / "run").dtype == np.float32
    rows = rows_of(tmp_path / "run")
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_what_is_not_a_number_stops_the_run_before_it_is_saved(bad, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(FloatingPointError, match=r"(loss|gradient_norm) is nan at update 8.*learning rate"):
        train(toy(bad, at=5), toy_settings(), out)
    assert {path.name for path in (out / "state").iterdir() if path.name.isdigit()} == {"4"}
    assert [row["step"] for row in rows_of(out)] == [4]
    train(toy(), toy_settings(), out)  # goes on as if nothing had been
    train(toy(), toy_settings(), tmp_path / "whole")
    assert_equal(result(out), result(tmp_path / "whole"))


def test_learning_rate_without_measure_stops_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        train(toy(), toy_settings(learning_rate=1e30), tmp_path / "run")


def test_finished_run_started_again_does_nothing_but_write_the_model(tmp_path):
    train(toy(), toy_settings(), tmp_path / "run")
    calls = []
    before = result(tmp_path / "run")
    train(toy(), toy_settings(), tmp_path / "run", progress=lambda *arguments: calls.append(arguments))
    assert calls == []
    assert_equal(result(tmp_path / "run"), before)


def test_what_is_set_around_a_training_changes_no_bit_of_it(pictures, tmp_path):
    """The generator and its settings, double precision, and rules of promotion."""
    train(toy(), toy_settings(), tmp_path / "usual")
    tower = clip_task(mini(), VISION, open_dataset(pictures), SETTINGS, tmp_path).params["image"]
    contexts = (
        *(jax.default_prng_impl("rbg"), jax.threefry_partitionable(False), jax.enable_x64(True)),
        *(jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict")),
    )
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        train(toy(), toy_settings(), tmp_path / "other")
        again = clip_task(mini(), VISION, open_dataset(pictures), SETTINGS, tmp_path).params["image"]
    assert_equal(result(tmp_path / "other"), result(tmp_path / "usual"))
    assert_equal(again, tower)


def test_a_checkpoint_that_a_power_cut_left_in_parts_is_made_again(tmp_path):
    """What was not noted as flushed is not trusted, whatever it looks like; nor is a line of metrics in parts."""
    train(toy(), toy_settings(), tmp_path / "whole")
    train(toy(), toy_settings(), tmp_path / "run")
    (tmp_path / "run" / "flushed.txt").write_text("8\n")
    for file in (tmp_path / "run" / "state" / "12").rglob("*"):
        if file.is_file():
            file.write_bytes(bytes(file.stat().st_size))
    with (tmp_path / "run" / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 12, "lo' + bytes(100) + b"\n[]\n")
    calls = []
    train(toy(), toy_settings(), tmp_path / "run", progress=lambda done, *_: calls.append(done))
    assert calls == [9, 10, 11, 12]
    for file in ("beside.safetensors", "metrics.jsonl", "flushed.txt"):
        assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_a_checkpoint_is_flushed_before_it_is_counted(tmp_path, monkeypatch):
    """Every file of it, then its folder, then the note that it is there."""
    order = []
    fsync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda number: (order.append(os.readlink(f"/proc/self/fd/{number}")), fsync(number))
    )
    train(toy(), toy_settings(), tmp_path / "run")
    state = tmp_path / "run" / "state" / "12"
    notes = [i for i, path in enumerate(order) if ".flushed.txt" in path]
    assert len(notes) == 3
    for path in (*(file for file in state.rglob("*")), state, state.parent):
        assert any(order[i] == str(path) for i in range(notes[-2], notes[-1])), path


def test_damaged_settings_are_named(tmp_path):
    claim(tmp_path / "run", toy_settings())
    for content in ("", "[", "5", "\0" * 50):
        (tmp_path / "run" / "settings.json").write_text(content)
        with pytest.raises(ValueError, match=r"settings\.json: damaged .*; name a new folder"):
            claim(tmp_path / "run", toy_settings())


def test_runs_of_before_go_on(tmp_path):
    claim(tmp_path / "run", toy_settings(), {"data": "here"})
    claim(tmp_path / "run", toy_settings(), {"data": "here", "listing": "5", "conversion": {}, "content": "6"})
    claim(tmp_path / "new", toy_settings(), {"data": "here", "listing": "5"})
    with pytest.raises(ValueError, match="listing was '5', now '6'"):
        claim(tmp_path / "new", toy_settings(), {"data": "here", "listing": "6"})


def test_other_settings_and_notes_are_refused_by_name(tmp_path):
    claim(tmp_path / "run", toy_settings(), {"data": "here"})
    claim(tmp_path / "run", toy_settings(), {"data": "here"})
    with pytest.raises(ValueError, match=r"learning_rate, steps; learning_rate was 0.05, now 0.1"):
        claim(tmp_path / "run", toy_settings(steps=16, learning_rate=0.1), {"data": "here"})
    with pytest.raises(ValueError, match="data was 'here', now 'there'"):
        claim(tmp_path / "run", toy_settings(), {"data": "there"})
    with pytest.raises(ValueError, match="steps was 12, now 24"):
        train(toy(), toy_settings(steps=24), tmp_path / "run", note={"data": "here"})


def test_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "letter.txt").write_text("dear reader")
    with pytest.raises(ValueError, match="is not empty and holds no training run"):
        train(toy(), toy_settings(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize(("batch", "accumulate", "multiple"), [(6, 1, 4), (12, 2, 8)])
def test_batch_that_does_not_divide_over_the_devices_is_refused_and_the_folder_stays_free(
    batch, accumulate, multiple, tmp_path
):
    with pytest.raises(ValueError, match=rf"batch {batch} cannot be split over 4 devices.*multiple of {multiple}"):
        train(toy(), toy_settings(batch=batch, accumulate=accumulate), tmp_path / "run")
    claim(tmp_path / "run", toy_settings())


def test_inpainting_model_is_refused(pictures, tmp_path):
    config = dataclasses.replace(MINI, unet=dataclasses.replace(MINI.unet, in_channels=9))
    model = dataclasses.replace(mini(), config=config, name="painter")
    with pytest.raises(ValueError, match="painter has 9 input channels"):
        unet_task(model, open_dataset(pictures), SETTINGS, tmp_path)


def test_projections_of_both_encoders_must_agree(pictures, tmp_path):
    config = dataclasses.replace(MINI, text=(dataclasses.replace(MINI.clip, projection=8),))
    with pytest.raises(ValueError, match="projects to 8 and the image encoder to 16"):
        clip_task(dataclasses.replace(mini(), config=config), VISION, open_dataset(pictures), SETTINGS, tmp_path)


def test_latents_and_text_states_are_computed_once_and_again_when_their_encoder_changes(
    pictures, tmp_path, monkeypatch
):
    made = []
    real = unet.cached

    def counted(path, key, make, count):
        def noted(first, last):
            made.append(path.name)
            return make(first, last)

        return real(path, key, noted, count)

    monkeypatch.setattr(unet, "cached", counted)
    data, model = open_dataset(pictures), mini()

    def batch(part=None):
        """The first batch, after every parameter of one part has changed."""
        changed = {part: jax.tree.map(lambda leaf: 1.1 * leaf + 0.1, model.params[part])} if part else {}
        other = dataclasses.replace(model, params={**model.params, **changed})
        made.clear()
        return unet_task(other, data, SETTINGS, tmp_path / "cache").batch(0)

    first = batch()
    assert made == ["latents.npy", "text.npy"]
    assert_equal(batch(), first)
    assert made == []
    assert not np.array_equal(batch("vae")["moments"], first["moments"])
    assert made == ["latents.npy"]
    batch()
    assert not np.array_equal(batch("text")["context"], first["context"])
    assert made == ["text.npy"]
    batch("unet")
    assert made == ["text.npy"]  # back to the first text encoder's; the UNet is no matter


def test_mirrored_pictures_are_the_pictures_mirrored(pictures, tmp_path):
    data = open_dataset(pictures)
    plain, mirrored = (
        vae_task(mini(), data, dataclasses.replace(SETTINGS, flip=flip), tmp_path).batch(3)["pictures"]
        for flip in (False, True)
    )
    same = (plain == mirrored).all((1, 2, 3))
    turned = (plain[:, :, ::-1] == mirrored).all((1, 2, 3))
    assert (same | turned).all()


BAD = [
    *((name, value) for name in ("steps", "batch", "accumulate", "scan", "save_every") for value in (0, -1, 2.0)),
    ("sample_every", 0),
    *(
        (name, value)
        for name in ("learning_rate", "clip", "sigma")
        for value in (0.0, -1.0, float("inf"), float("nan"))
    ),
    *((name, value) for name in ("weight_decay", "kl_weight", "l1", "noise_offset") for value in (-0.1, float("nan"))),
    *(("prompt_dropout", value) for value in (-0.1, 1.1, float("nan"))),
    *(("ema", value) for value in (-0.1, 1.0, float("nan"))),
    *(("min_snr", value) for value in (0.0, -1.0, float("nan"))),
    *(("seed", value) for value in (-1, 2**32, 0.5)),
    *((name, value) for name in ("warmup", "decay") for value in (-1, 0.5, 10**9)),
    ("optimizer", "sgd"),
    ("dtype", "float16"),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_bad_setting_is_refused_by_its_name(name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be .*, found {value!r}$"):
        Settings(**{name: value})


@pytest.mark.parametrize("name", ["steps", "save_every", "sample_every"])
def test_steps_must_be_whole_scans(name):
    with pytest.raises(ValueError, match=f"{name} must be a multiple of scan, 4, found 1002"):
        Settings(**{"steps": 2000, "scan": 4, name: 1002})


def test_batch_must_be_whole_parts():
    with pytest.raises(ValueError, match="batch must be a multiple of accumulate, 3, found 16"):
        Settings(accumulate=3)
