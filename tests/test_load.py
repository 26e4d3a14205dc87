"""`sdjax.load`: every kind of model, converted once; the hub through a small one served on this machine."""

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest

import convert
import sdjax
from convert.diffusers import needed_files
from convert.write import write_diffusers, write_safetensors
from sdjax.config import BOX, TINY
from sdjax.load import BOX_FOLDER, SHORT_NAMES, converted, describe, find, load
from sdjax.models.params import random_params
from sdjax.storage import checkpoint
from sdjax.text.tokenizer import clip_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("load") / "tiny"
    write_diffusers(path, TINY, random_params(TINY))
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SDJAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "converted"


def assert_tiny(pipe):
    assert pipe.config == TINY
    for a, b in zip(jax.tree.leaves(pipe.params), jax.tree.leaves(random_params(TINY)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_no_model_is_the_one_in_the_box():
    pipe = load()
    assert pipe.config == BOX
    assert pipe.name == "box"
    assert pipe.tokenizer.vocab_size == BOX.clip.vocab_size
    assert {leaf.dtype for leaf in jax.tree.leaves(pipe.params)} == {np.dtype("float32")}
    size = sum(file.stat().st_size for file in BOX_FOLDER.rglob("*") if file.is_file())
    assert size <= 21 * 10**6, "the whole box; its parameters alone must stay below 20 MB"
    assert (BOX_FOLDER / "params.safetensors").stat().st_size <= 20 * 10**6


def test_every_kind_of_model_is_loaded(folder, tmp_path):
    write_safetensors(tmp_path / "m.safetensors", TINY, random_params(TINY))
    checkpoint.save(tmp_path / "ours", TINY, random_params(TINY))
    for model in (folder, tmp_path / "m.safetensors", tmp_path / "ours", str(tmp_path / "ours")):
        assert_tiny(load(model))


def test_a_foreign_model_is_converted_once(folder, cache, monkeypatch):
    assert_tiny(load(folder))
    assert len(list(cache.iterdir())) == 1

    def fail(*_, **__):
        raise AssertionError("converted again")

    with monkeypatch.context() as patch:
        patch.setattr(convert, "lazy", fail)
        assert_tiny(load(folder))
        assert load(folder, dtype="bfloat16").params["unet"]["conv_in"]["bias"].dtype == "bfloat16"
        os.utime(folder / "unet" / "config.json")
        assert_tiny(load(folder))
    assert len(list(cache.iterdir())) == 1


def test_a_model_is_known_by_its_content_whatever_its_times_say(folder, cache, tmp_path):
    """Also where a copy keeps size and time of change."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    file = copy / "vae" / "diffusion_pytorch_model.safetensors"
    times = file.stat()
    assert_tiny(load(copy))
    data = bytearray(file.read_bytes())
    data[-4:] = np.float32(2.0).tobytes()
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(AssertionError):
        assert_tiny(load(copy))
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("damage", ["config.json", "params.safetensors", "tokenizer/vocab.json"])
def test_a_kept_conversion_that_is_damaged_is_regenerated(folder, cache, damage):
    load(folder)
    (kept,) = cache.iterdir()
    for file in [kept / damage] if (kept / damage).is_file() else (kept / damage).rglob("*"):
        if file.is_file():
            os.truncate(file, file.stat().st_size // 2)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert_tiny(load(folder))
    assert damage == "config.json" or "an earlier conversion is damaged; converting again" in str(seen[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_tiny(load(folder))


def test_what_is_to_know_of_a_conversion_is_told(cache, tmp_path):
    params = random_params(TINY)
    params["vae"]["quant_conv"]["bias"] = np.full_like(params["vae"]["quant_conv"]["bias"], np.nan)
    write_safetensors(tmp_path / "m.safetensors", TINY, params)
    with pytest.warns(UserWarning, match="quant_conv.bias holds NaN"):
        load(tmp_path / "m.safetensors")


@pytest.mark.filterwarnings("ignore:.*models are read whole at every start")
def test_a_cache_that_cannot_be_written_is_named(folder, monkeypatch):
    monkeypatch.setenv("SDJAX_CACHE", "/proc/sdjax")
    with pytest.raises(OSError, match="/proc/sdjax"):
        load(folder)


def test_of_several_processes_one_converts_and_clears_away_what_a_killed_one_left(folder, cache, monkeypatch):
    """Threads stand for processes: the lock is that of an open file."""
    for ending in ("partial", "old"):
        (cache / f".other.ckpt-0123.abcd.{ending}" / "params").mkdir(parents=True)
    started, conversions, lazy = threading.Barrier(2), [], convert.lazy

    def slowly(*arguments, **options):
        conversions.append(arguments)
        time.sleep(0.5)
        return lazy(*arguments, **options)

    def convert_it(_):
        started.wait()
        return converted(folder)

    monkeypatch.setattr(convert, "lazy", slowly)
    with ThreadPoolExecutor(2) as pool, pytest.warns(UserWarning, match="another process is converting a model"):
        first, second = pool.map(convert_it, range(2))
    assert first == second
    assert len(conversions) == 1
    assert list(cache.iterdir()) == [first]


def test_a_failed_conversion_leaves_no_cache(folder, cache, tmp_path):
    write_safetensors(tmp_path / "m.safetensors", TINY, random_params(TINY))
    data = (tmp_path / "m.safetensors").read_bytes()
    (tmp_path / "m.safetensors").write_bytes(data[:-8])
    with pytest.raises(convert.CheckpointError):
        load(tmp_path / "m.safetensors")
    assert not cache.exists() or list(cache.iterdir()) == []


def test_a_tokenizer_folder_takes_precedence(folder, tmp_path):
    converted_ = converted(folder)
    assert (converted_ / "tokenizer" / "vocab.json").is_file()
    vocab = json.loads((converted_ / "tokenizer" / "vocab.json").read_text())
    vocab["heart</w>"], vocab["cat</w>"] = vocab["cat</w>"], vocab["heart</w>"]
    (converted_ / "tokenizer" / "vocab.json").write_text(json.dumps(vocab))
    assert load(converted_).tokenizer.encode("heart") == clip_tokenizer().encode("cat")


def test_a_missing_part_may_be_given(folder, tmp_path):
    write_safetensors(tmp_path / "m.safetensors", TINY, random_params(TINY))
    other = random_params(TINY, seed=1)
    write_diffusers(tmp_path / "other", TINY, other)
    pipe = load(tmp_path / "m.safetensors", vae=tmp_path / "other")
    np.testing.assert_array_equal(pipe.params["vae"]["quant_conv"]["bias"], other["vae"]["quant_conv"]["bias"])
    checkpoint.save(tmp_path / "ours", TINY, other)
    with pytest.raises(ValueError, match="whole checkpoint"):
        load(tmp_path / "ours", vae=tmp_path / "other")


def test_wrong_names_and_dtypes_are_refused_before_anything_slow(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder; expected a checkpoint, a hub id"):
        load("nothing-here")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load("models/missing.ckpt")
    with pytest.raises(ValueError, match="dtype"):
        load(dtype="int8")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"model_index\.json"):
        load(tmp_path / "empty")


def test_describing_tells_what_a_model_holds(folder, tmp_path):
    checkpoint.save(tmp_path / "ours", TINY, random_params(TINY, dtype="bfloat16"))
    assert "bfloat16" in describe(tmp_path / "ours")
    for path in (folder, tmp_path / "ours"):
        assert "2,174,852 parameters, 4 input channels" in describe(path)


def test_of_a_hub_model_only_what_is_needed_is_downloaded():
    files = ["model_index.json", "README.md", "big.ckpt", "unet/config.json", "vae/config.json", "vae/x.msgpack"]
    files += [
        "text_encoder/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer/vocab.json",
        "safety_checker/model.safetensors",
    ]
    files += [f"unet/diffusion_pytorch_model{end}" for end in (".bin", ".safetensors", ".fp16.safetensors")]
    files += ["vae/diffusion_pytorch_model.bin", "text_encoder/model.safetensors.index.json"]
    files += [f"text_encoder/model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert set(needed_files("x/y", files)) == set(files) - {
        "README.md",
        "big.ckpt",
        "vae/x.msgpack",
        "safety_checker/model.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
    }
    with pytest.raises(FileNotFoundError, match="no diffusers model"):
        needed_files("x/y", ["README.md"])
    with pytest.raises(FileNotFoundError, match="no weights for"):
        needed_files("x/y", ["model_index.json"])


class Hub(http.server.BaseHTTPRequestHandler):
    """The two requests of the hub's protocol that a download makes: what a model has, and one file of it."""

    folder: Path
    model = SHORT_NAMES["sd15"]
    served: list[str]
    branches: list[str]

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        path = self.path.split("?")[0]
        commit, headers = "0" * 40, {}
        files = {str(file.relative_to(self.folder)): file for file in self.folder.rglob("*") if file.is_file()}
        names = [*files, "README.md", "huge.ckpt"]
        if path.startswith(f"/api/models/{self.model}/tree/"):
            data = json.dumps([{"type": "file", "path": name, "size": 1, "oid": "0"} for name in names]).encode()
        elif path.startswith(f"/api/models/{self.model}"):
            _, _, branch = path.partition("/revision/")
            self.branches.append(branch)
            siblings = [{"rfilename": name} for name in names]
            data = json.dumps({"id": self.model, "sha": commit, "siblings": siblings}).encode()
        elif path.startswith(f"/{self.model}/resolve/"):
            name = path.split("/", 5)[5]
            data = files[name].read_bytes()
            headers = {"X-Repo-Commit": commit, "ETag": f'"{hash(data) & 0xFFFFFFFF:08x}"'}
            if body:
                self.served.append(name)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        for header, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(header, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_):
        pass


def test_hub_models_are_downloaded_converted_and_found_again(folder, tmp_path):
    handler = type("Handler", (Hub,), {"folder": folder, "served": [], "branches": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }

    def run(model):
        code = f"import sdjax; pipe = sdjax.load({model!r}); print(pipe.config.name, pipe.name)"
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)

    first = run("sd15")
    assert first.stdout.split() == ["tiny", "sd15"], first.stderr
    assert "unet/diffusion_pytorch_model.safetensors" in handler.served
    assert not {"README.md", "huge.ckpt"} & set(handler.served)
    branch = run(f"{SHORT_NAMES['sd15']}@bf16")
    assert branch.stdout.split() == ["tiny", f"{SHORT_NAMES['sd15']}@bf16"], branch.stderr
    assert "" in handler.branches
    assert "bf16" in handler.branches
    missing = run("nobody/nothing")
    assert missing.stderr.strip().splitlines()[-1].startswith("FileNotFoundError: nobody/nothing: not on the hub")
    server.shutdown()
    server.server_close()
    again = run("sd15")  # the hub is gone; its cache and ours are there
    assert again.stdout.split() == ["tiny", "sd15"], again.stderr
    unreachable = run("somebody/else")
    assert "ConnectionError: somebody/else: the hub cannot be reached" in unreachable.stderr


def test_public_names_are_there():
    for name in sdjax.__all__:
        assert getattr(sdjax, name) is not None
    assert sdjax.models.clip.TextEncoder is not None
    assert find(".") == Path(".")


def test_whoever_compiles_while_parameters_are_read_is_given_the_models_own_tokenizer():
    given = []
    pipe = load(on_shapes=lambda config, shapes, tokenizer: given.append((config, tokenizer)))
    assert given == [(pipe.config, pipe.tokenizer)]
    assert pipe.tokenizer.vocab_size < clip_tokenizer().vocab_size
