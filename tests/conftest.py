"""Four simulated CPU devices for the whole suite, and a small model that every test may share."""

import os
from collections.abc import Iterator

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"

import jax
import pytest

from sdjax.config import TINY, ModelConfig
from sdjax.models.params import random_params
from sdjax.types import Params


def pytest_configure(config: pytest.Config) -> None:
    """Small models take longer to compile than to run: compile quickly, here and in processes that tests start, but for
    full-size runs.
    """
    if config.getoption("markexpr") == "not full":
        if jax.__version_info__ < (0, 11):  # later ones have no choice of emitters; these take twice as long to compile
            os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
        jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session", autouse=True)
def no_compile_cache() -> Iterator[None]:
    """Tests that run the command line in their own process must not fill the user's cache, nor profit from it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sdjax.cli.run.keep_programs", lambda: None)
        yield


@pytest.fixture(scope="session")
def tiny() -> ModelConfig:
    return TINY


@pytest.fixture(scope="session")
def tiny_params(tiny: ModelConfig) -> Params:
    """Random float32 weights of the tiny preset; shared, so do not write into them."""
    return random_params(tiny, seed=0)
