"""The self-test passes on a good model, sees every kind of damage, and its reference is what PyTorch computes today."""

import dataclasses
from importlib import resources

import jax
import numpy as np
import pytest

from convert.write import write_diffusers
from sdjax import selftest
from sdjax.config import TINY
from sdjax.diffusion.samplers import SAMPLERS
from sdjax.models.params import random_params
from sdjax.pipeline.pipeline import Pipeline
from sdjax.text.tokenizer import clip_tokenizer
from tests.data import make_selftest

NETWORKS = {"text encoder", "vae encoder, mean", "vae encoder, log-variance", "vae decoder"}
NETWORKS |= {f"unet, t = {t}" for t in selftest.TIMESTEPS}
CHECKS = {"tokenizer"} | NETWORKS | {f"sampler {name}" for name in selftest.SAMPLED}


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def results(printed):
    """The table that was printed: name of the check -> its verdict."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line.startswith("│")]
    return {name: verdict for name, _, _, verdict in rows}


def test_a_good_installation_passes_every_check(capsys):
    assert selftest.run() is True
    printed = capsys.readouterr().out
    assert results(printed) == dict.fromkeys(CHECKS, "ok")
    assert f"{len(CHECKS)} checks, all good" in printed


def test_one_wrong_weight_one_wrong_sampler_and_a_wrong_tokenizer_are_seen(monkeypatch, capsys, tiny_params):
    damaged = jax.tree.map(np.array, tiny_params)
    damaged["unet"]["down_0"]["res_0"]["conv1"]["kernel"][0, 0, 0, 0] += 0.5
    monkeypatch.setattr(selftest, "random_params", lambda config: damaged)
    monkeypatch.setitem(SAMPLERS, "lms", SAMPLERS["euler"])
    monkeypatch.setattr(selftest, "clip_tokenizer", lambda: clip_tokenizer("hf"))
    assert selftest.run() is False
    printed = capsys.readouterr().out
    failed = {name for name, verdict in results(printed).items() if verdict == "FAILED"}
    text = {"tokenizer", "text encoder"}  # the encoder sees other ids
    assert failed == text | {f"unet, t = {t}" for t in selftest.TIMESTEPS} | {"sampler lms"}
    assert f"{len(CHECKS)} checks, {len(failed)} failed" in printed


def test_another_model_is_compared_with_itself_in_float32():
    unet = dataclasses.replace(TINY.unet, channels=(32,), transformer_layers=(1,), heads=(2,))
    config = dataclasses.replace(TINY, unet=unet, vae=dataclasses.replace(TINY.vae, channels=(16, 32)))
    pipe = Pipeline(config, random_params(config, dtype="bfloat16"), clip_tokenizer(), "mine")
    checks = list(selftest.model_checks(pipe))
    assert {check.name for check in checks} == {f"mine: {name}" for name in NETWORKS}
    assert all(check.good for check in checks)
    assert all(check.error > 1e-4 for check in checks)  # bfloat16 was used on the one side alone


def test_what_is_not_finite_is_no_small_error():
    assert selftest.relative_error([1.0, float("nan")], [1.0, 1.0]) == float("inf")
    assert not selftest.Check("x", float("inf"), 1e9).good
    assert selftest.relative_error([1.0, 1.1], [1.0, 1.0]) == pytest.approx(0.1 / 2**0.5)


@pytest.mark.filterwarnings("ignore:__array_wrap__")
def test_the_reference_is_what_pytorch_computes(tmp_path, monkeypatch, tiny_params):
    write_diffusers(tmp_path / "tiny", TINY, tiny_params)
    made = make_selftest.networks(tmp_path / "tiny") | make_selftest.samplers(monkeypatch)
    with np.load(resources.files("sdjax.assets") / "selftest.npz") as stored:
        assert set(stored) == set(made)
        for name, values in made.items():
            np.testing.assert_allclose(stored[name], values, rtol=1e-5, atol=1e-5, err_msg=name)
