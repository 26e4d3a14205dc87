"""How tests are compiled, and a small model that every test may share."""

import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from sdjax.config import TINY, ModelConfig
from sdjax.models.params import random_params
from sdjax.types import Params
from tests import OWNER

QUICK = "--xla_cpu_use_fusion_emitters=false"

LONGEST = (
    "train_loop",
    "train_step",
    "load",
    "walkthrough",
    "batch",
    "examples",
    "sharding",
    "train_command",
    "selftest",
    "compilation",
)
"""Tests that take longest, by what their file is called."""


def pytest_configure(config: pytest.Config) -> None:
    """Small models take longer to compile than to run: compile quickly, here and in processes that tests start, but for
    full-size runs.
    """
    if config.getoption("markexpr") == "not full":
        if jax.__version_info__ < (0, 11) and QUICK not in os.environ["XLA_FLAGS"]:
            os.environ["XLA_FLAGS"] += f" {QUICK}"  # later ones have no choice of emitters; these take twice as long
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
        jax.config.update("jax_disable_most_optimizations", True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, so that no worker is left alone with one at the end."""
    place = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def pytest_unconfigure() -> None:
    """The programs belong to this run alone: another version of a test must not find them."""
    if os.environ[OWNER] == str(os.getpid()):
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def no_compile_cache() -> Iterator[None]:
    """Tests that run the command line in their own process must not fill the user's cache, nor profit from it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sdjax.cli.model.keep_programs", lambda: None)
        yield


MAPPINGS = 25_000
"""Pieces of memory from which on programs are dropped: each has some, and Linux allows a process 65,530 of them."""


@pytest.fixture(scope="module", autouse=True)
def freeze() -> Iterator[None]:
    """What a module leaves (traces and programs, kept in caches) is not looked through for garbage by the next ones."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MAPPINGS:
        gc.unfreeze()
        jax.clear_caches()
        gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny() -> ModelConfig:
    return TINY


@pytest.fixture(scope="session")
def tiny_params(tiny: ModelConfig) -> Params:
    """Random float32 weights of the tiny preset; shared, so do not write into them."""
    return random_params(tiny, seed=0)


@pytest.fixture
def optimised():
    """Compiled as users do: it is the optimisations that treat another batch in another way."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def latents(monkeypatch):
    """latents(pipe, requests, batch_size) -> those of every request by its id."""
    from sdjax.pipeline.batching import Batches

    found = {}
    decoded = Batches._decoded

    def kept(self, places, latents):
        made = decoded(self, places, latents)
        rows = np.asarray(latents)
        for place, one in [pair for batch in made for pair in batch.requests]:
            assert one.request.id not in found, "made once"
            found[one.request.id] = rows[place]
        return made

    monkeypatch.setattr(Batches, "_decoded", kept)

    def of(pipe, requests, batch_size):
        found.clear()
        handed_out = [request.id for request, _ in pipe.batch(requests, batch_size=batch_size)]
        assert sorted(handed_out) == sorted(request.id for request in requests)
        return dict(found)

    return of
