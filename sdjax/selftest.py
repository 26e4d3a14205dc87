"""`sdjax selftest`: this device's numbers against numbers made from PyTorch.

`assets/selftest.npz` holds what PyTorch (diffusers, transformers) computed for the tiny model with seeded random
weights, and for every sampler on a fixed stand-in network with fixed noise; `tests/data/make_selftest.py` made it. The
networks of another model are compared with themselves in float32 on the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from importlib import resources
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from sdjax.config import TINY, ModelConfig, ScheduleConfig
from sdjax.devices.platform import pinned
from sdjax.diffusion.denoiser import to_denoiser
from sdjax.diffusion.rows import first_carry, step
from sdjax.diffusion.samplers import SAMPLERS
from sdjax.diffusion.schedule import noise_schedule
from sdjax.models.clip import TextEncoder
from sdjax.models.params import cast, random_params
from sdjax.models.unet import UNet
from sdjax.models.vae import VAE
from sdjax.pipeline.pipeline import Pipeline
from sdjax.text.tokenizer import clip_tokenizer
from sdjax.types import Array, NoiseLevel, Params

PROMPTS = ("a photograph of an astronaut riding a horse", "Crème brûlée & 3 “curly” quotes — it's 日本 😀", "")
TIMESTEPS = (1, 500, 999)
LATENT = (1, 12, 8, 4)  # not square
SAMPLED: tuple[str, ...] = (
    "ddpm",
    "ddim",
    "plms",
    "euler",
    "euler_a",
    "heun",
    "dpm2",
    "dpm2_a",
    "lms",
    "dpmpp_2m",
    "dpmpp_2m_sde",
)
SAMPLED += ("dpmpp_sde", "unipc", "lcm")  # samplers that diffusers has; the others are tables for the same step
TOY_SHAPE = (2, 4, 4, 3)
BOUNDS = {"float32": 2e-5, "bfloat16": 5e-2, "float16": 1e-2}
TF32_BOUND = 5e-3  # float32 on a GPU or TPU, whose matrix units round the factors
SAMPLER_BOUND = 1e-4


class Check(NamedTuple):
    """One line of the result: what was compared, its relative error and the most that it may be."""

    name: str
    error: float
    bound: float

    @property
    def good(self) -> bool:
        return bool(self.error <= self.bound)


def noise(index: int, shape: tuple[int, ...] = TOY_SHAPE) -> np.ndarray:
    """Fixed unit normal noise f32[shape], numpy's own generator, so equal on every machine."""
    return np.random.default_rng(1000 + index).standard_normal(shape).astype(np.float32)


def toy_network(x: Any, t: Any, xp: Any = jnp) -> Any:
    """A smooth stand-in for a UNet, in jax or torch (xp): nonlinear in x, dependent on t and on the channel beside."""
    mixed = 0.8 * x + 0.3 * xp.roll(x, 1, -1)
    return xp.tanh(mixed) * (0.9 + 0.1 * xp.cos(t / 300)) + 0.1 * xp.sin(3 * x + t / 500)


def run_toy(rows: Any, x: np.ndarray, prediction: str = "epsilon") -> np.ndarray:
    """A sampler's rows on the stand-in network, from x f32[TOY_SHAPE]; its noises are `noise(0)`, `noise(1)`, ..."""
    used = np.asarray(rows.noise) != 0
    eps = np.zeros((len(used), *x.shape), np.float32)
    eps[used] = [noise(index) for index in range(used.sum())] if used.any() else 0
    rows = jax.tree.map(jnp.asarray, rows)
    return np.asarray(_run_toy(prediction, rows, jnp.asarray(x), jnp.asarray(eps)))


@partial(jax.jit, static_argnums=0)
def _run_toy(prediction: str, rows: Any, x: Array, eps: Array) -> Array:
    denoise = to_denoiser(lambda scaled, level: toy_network(scaled, level.t), prediction)

    def body(carry: Any, row_and_eps: Any) -> tuple[Any, None]:
        return step(denoise, carry, *row_and_eps), None

    return jax.lax.scan(body, first_carry(x), (rows, eps))[0].x


def relative_error(found: Any, expected: Any) -> float:
    """|found - expected| / |expected| in float64; infinite if a value is not finite."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    return float(error) if np.isfinite(error) else float("inf")


def networks(config: ModelConfig, params: Params, ids: np.ndarray) -> dict[str, Array]:
    """Every network's output on fixed inputs, by name, in float32."""
    context = noise(1, (1, config.clip.length, config.unet.context_width))
    latent = noise(2, (*LATENT[:3], config.unet.in_channels))
    picture = np.tanh(noise(3, (1, LATENT[1] * config.vae.downscale, LATENT[2] * config.vae.downscale, 3)))
    text = jax.jit(lambda p: TextEncoder(config.clip).apply({"params": p}, ids))
    unet = jax.jit(lambda p, t: UNet(config.unet).apply({"params": p}, latent, t, context))
    encode = jax.jit(lambda p: VAE(config.vae).apply({"params": p}, picture, method="encode"))
    decode = jax.jit(
        lambda p: VAE(config.vae).apply(
            {"params": p}, noise(4, (*LATENT[:3], config.vae.latent_channels)), method="decode"
        )
    )
    found: dict[str, Any] = {"text encoder": text(params["text"]).last_hidden_state}
    for t in TIMESTEPS:
        found[f"unet, t = {t}"] = unet(params["unet"], jnp.full((1,), t, jnp.float32))
    posterior = encode(params["vae"])
    found |= {"vae encoder, mean": posterior.mean, "vae encoder, log-variance": posterior.logvar}
    found["vae decoder"] = decode(params["vae"])
    return {name: output.astype(jnp.float32) for name, output in found.items()}


def checks(params: Params) -> Iterator[Check]:
    """The tokenizer, the tiny model's networks with `params`, and samplers against the reference."""
    file = resources.files("sdjax.assets").joinpath("selftest.npz")
    with resources.as_file(file) as path, np.load(path) as reference:
        ids = clip_tokenizer()(PROMPTS)
        yield Check("tokenizer", float(np.mean(ids != reference["ids"])), 0.0)
        with jax.default_matmul_precision("float32"):
            for name, output in networks(TINY, params, ids).items():
                yield Check(name, relative_error(output, reference[name]), BOUNDS["float32"])
        schedule = noise_schedule(ScheduleConfig())
        for name in SAMPLED:
            rows = SAMPLERS[name].rows(schedule, reference[f"{name} sigma"])
            rows = rows._replace(levels=NoiseLevel(rows.levels.sigma, reference[f"{name} t"]))
            found = run_toy(rows, reference[f"{name} start"])
            yield Check(f"sampler {name}", relative_error(found, reference[f"{name} end"]), SAMPLER_BOUND)


def model_checks(pipeline: Pipeline) -> Iterator[Check]:
    """A model's networks on this device in its dtype against float32 on the CPU.

    Raises:
        ValueError: JAX was told to leave the CPU out.
    """
    try:
        cpu = jax.devices("cpu")[0]
    except RuntimeError:
        asked = os.environ.get("JAX_PLATFORMS")
        raise ValueError(
            f"the CPU is needed to compare with, and JAX_PLATFORMS is {asked!r}; set it to {asked},cpu"
        ) from None
    config, params = pipeline.config, pipeline.params
    dtype = str(jax.tree.leaves(params["unet"])[0].dtype)
    bound = BOUNDS[dtype]
    if dtype == "float32" and jax.default_backend() != "cpu":
        bound = TF32_BOUND
    ids = pipeline.tokenizer(PROMPTS, config.clip.length, config.clip.pad_token)
    found = jax.device_get(networks(config, params, ids))
    with jax.default_device(cpu):
        expected = networks(config, jax.device_put(cast(params, "float32"), cpu), ids)
    for name, output in found.items():
        yield Check(f"{pipeline.name}: {name}", relative_error(output, expected[name]), bound)


@pinned
def run(pipeline: Pipeline | None = None) -> bool:
    """Prints a table of all checks and returns whether all are within their bounds. pipeline: a model to check too."""
    device = jax.devices()[0]
    table = Table(title=f"sdjax selftest on {device.device_kind} ({device.platform}), jax {jax.__version__}")
    for column in ("check", "relative error", "bound", ""):
        table.add_column(column, justify="left" if column in ("check", "") else "right")
    results = list(checks(random_params(TINY)))
    if pipeline is not None:
        results += model_checks(pipeline)
    for check in results:
        table.add_row(check.name, f"{check.error:.1e}", f"{check.bound:.0e}", "ok" if check.good else "FAILED")
    Console().print(table)
    failed = sum(not check.good for check in results)
    print(f"{len(results)} checks, {failed} failed" if failed else f"{len(results)} checks, all good")
    return failed == 0
