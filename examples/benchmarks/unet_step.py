"""One guided UNet step of Stable Diffusion 1.5 at 512x512, beside diffusers on the same machine in the same run.

    python examples/benchmarks/unet_step.py [--rounds 5] [--steps 4]
    python examples/benchmarks/unet_step.py --device gpu

Both sides hold the same random weights and see the same two rows (negative and positive prompt); their results are
compared before the clock starts, their steps take turns, and medians are printed. Needs the test extra.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # both sides share one device

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch

from convert.diffusers import diffusers_json
from convert.names import entries
from sdjax.config import SD15
from sdjax.diffusion.sample import image_keys
from sdjax.diffusion.samplers import SAMPLERS
from sdjax.diffusion.schedule import noise_schedule
from sdjax.models.params import random_params
from sdjax.pipeline import Inputs, MakeDenoiser, generate_latents, text_kv, time_tables
from sdjax.types import Level, Params

GUIDANCE = 7.5
LATENT = (64, 64, 4)
STEP_FLOP = 2 * 803.3e9  # of a guided step of one picture: 401.6 G multiply-adds a row, attention included

denoise = jax.jit(lambda make, inputs, x, level: make(inputs)(x, level), static_argnums=0)


def diffusers_unet(params: Params) -> torch.nn.Module:
    """diffusers' network with our weights."""

    def leaf(path: tuple[str, ...]) -> np.ndarray:
        tree = params
        for key in path:
            tree = tree[key]
        return np.asarray(tree)

    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(diffusers_json(SD15)["unet/config.json"])
    state = {
        entry.name: torch.from_numpy(entry.from_leaves([leaf(path) for path in entry.leaves]).copy())
        for entry in entries(SD15, "unet", "diffusers")
    }
    unet.load_state_dict(state, assign=True)
    return unet.eval().requires_grad_(False)


class Ours:
    """A guided step and a whole loop of sdjax; text keys and values and the time embeddings are computed beforehand."""

    def __init__(self, params: Params, x: np.ndarray, context: np.ndarray, steps: int) -> None:
        count = len(x)
        sampler = SAMPLERS["ddim"]
        schedule = noise_schedule(SD15.schedule)
        rows = sampler.rows(schedule, schedule.levels(steps))
        self.rows = time_tables(params, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), rows), config=SD15)
        self.level: Level = jax.tree.map(lambda leaf: leaf[0, 0], self.rows.levels)
        self.x = jnp.asarray(x)
        self.keys = image_keys(range(count))
        one, zero = jnp.float32(1), jnp.float32(0)
        kv = text_kv(params, jnp.asarray(context), config=SD15)
        self.inputs = Inputs(params, kv, GUIDANCE * one, zero, (zero, jnp.inf * one), None, None, None)
        self.method = sampler.method

    def step(self) -> jax.Array:
        """x0_hat f32[b, h, w, 4]."""
        return denoise(MakeDenoiser(SD15, guided=True), self.inputs, self.x, self.level).block_until_ready()

    def loop(self) -> jax.Array:
        return generate_latents(
            self.inputs, self.rows, self.x, self.keys, config=SD15, method=self.method, is_guided=True
        ).block_until_ready()


class Theirs:
    """The same step with diffusers' network."""

    def __init__(self, unet: Any, ours: Ours, x: np.ndarray, context: np.ndarray, device: str) -> None:
        dtype = next(unet.parameters()).dtype
        self.unet, self.device = unet, device
        self.sigma, self.t = float(ours.level.sigma), float(ours.level.t)
        self.x = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).to(device)
        self.context = torch.from_numpy(context).to(device, dtype)
        self.dtype = dtype

    @torch.inference_mode()
    def step(self) -> torch.Tensor:
        """x0_hat f32[b, 4, h, w]."""
        scaled = (self.x / (self.sigma**2 + 1) ** 0.5).to(self.dtype)
        output = self.unet(torch.cat([scaled, scaled]), self.t, encoder_hidden_states=self.context).sample.float()
        negative, positive = output.chunk(2)
        result = self.x - self.sigma * (negative + GUIDANCE * (positive - negative))
        if self.device == "cuda":
            torch.cuda.synchronize()
        return result


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, *LATENT), np.float32) * 14.6
    context = rng.standard_normal((2, 77, 768), np.float32)
    params = random_params(SD15)["unet"]
    unet = diffusers_unet(params)
    ours = Ours(jax.tree.map(jnp.asarray, params), x, context, options.steps)
    del params
    theirs = Theirs(unet, ours, x, context, "cpu")
    start = time.perf_counter()
    a, b = np.asarray(ours.step()), theirs.step().numpy().transpose(0, 2, 3, 1)
    print("compile+1", time.perf_counter() - start, flush=True)
    print("error", np.linalg.norm(a - b) / np.linalg.norm(b), flush=True)
    ours.loop()
    print("loop", time.perf_counter() - start, flush=True)
    times = []
    for _ in range(options.rounds):
        times.append((seconds(theirs.step), seconds(ours.step), seconds(ours.loop)))
        print(times[-1], flush=True)
    t, o, l = (statistics.median(v) for v in zip(*times))
    print(f"theirs {t:.2f} ours {o:.2f} ratio {o / t:.3f} loop ratio {l / o / options.steps:.3f}")


if __name__ == "__main__":
    main()
