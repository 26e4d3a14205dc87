"""One guided UNet step of Stable Diffusion 1.5 at 512x512, beside diffusers on the same machine in the same run.

    python examples/benchmarks/unet_step.py [--rounds 7] [--steps 3]
    python examples/benchmarks/unet_step.py --dtype bfloat16
    python examples/benchmarks/unet_step.py --device gpu

Both sides hold the same random weights and see the same noise and the same two rows of text; their results are compared
before the clock starts, then diffusers' step, ours, and our whole loop (`functions.sample`, a scan of --steps steps)
take turns, and the medians are printed. Ours gets the text's keys and values, the time embeddings and on a CPU the
kernels transformed for Winograd's convolutions ready made, as in the loop. Needs the test extra, 12 GiB of memory, and
for the GPU jax[cuda13].

cpu: float32, one picture. Bounds: our step at most 0.9 of diffusers' (1.0 with AVX-512), the loop at most 1.02 times
its steps alone, memory at most 1.3 times that of commit c87bdd3 (3192 + 159 MiB).
cpu, --dtype bfloat16: diffusers in bfloat16, channels last. Bounds: our step at most 1.2 times diffusers' where the
processor has AMX or AVX512-BF16, relative difference at most 3e-2. Where it has neither, bfloat16 is no faster.
gpu: bfloat16, 1, 8 and 32 pictures, diffusers under torch.compile (max-autotune, channels last); also the share of the
matrix product peak, measured in the same run.

CPU, 2026-11-27, two cores of an AMD EPYC (Zen 5, AVX-512), jax 0.10.2, torch 2.13.0, --rounds 7 --steps 3, another
process running for half of the time:

    diffusers' step  6.87 s    our step  5.27 s, 0.77 times it    a step in our loop  4.72 s, 0.69 times diffusers'
    memory of our loop: 3193 MiB of arguments, 782 MiB more while it runs

Three rounds of the loop alone with nothing else running: 4.17 to 4.33 s beside 6.81 to 7.11 s, 0.61 times it; that of
commit c87bdd3 took 8.9 s there. Before (2026-11-21 and 22): 1.05 times diffusers' on an AMD EPYC (Zen 3), 1.21 on an
Intel Xeon with AVX-512. Not measured: a processor without AVX-512.

bfloat16, 2026-11-27, two cores of an AMD EPYC (Zen 5, AVX512-BF16, no AMX), jax 0.12.0.1 on Python 3.13, --rounds 7
--steps 2, other work running (load 3):

    diffusers' step  4.23 s    our step  3.91 s, 0.92 times it    relative difference 5.8e-3

Nothing was measured on a GPU.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two frameworks share the memory of one device

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch

from convert.diffusers_config import diffusers_json
from convert.names import entries
from sdjax.config import SD15
from sdjax.devices.platform import bfloat16_instructions
from sdjax.diffusion.plan import stack_plans
from sdjax.diffusion.sample import State, first_state, image_keys
from sdjax.models.layers import TRANSFORMED
from sdjax.models.params import random_params
from sdjax.pipeline.functions import MakeDenoiser, embed_timesteps, sample, text_kv, transformed_kernels
from sdjax.request import Request, plan
from sdjax.types import Conditioning, NoiseLevel, Params

GUIDANCE = 7.5
STEP_FLOP = 2 * 803.3e9  # of a guided step of one picture: 401.6 G multiply-adds a row, attention included


def one_step(make: MakeDenoiser, params: Params, state: State, level: NoiseLevel) -> jax.Array:
    """x0_hat f32[b, h, w, 4] of the pictures as they are."""
    return make(params, state.given, state.held, state.index)(state.carry.x, level)


denoise = jax.jit(one_step, static_argnums=0)
product = jax.jit(jnp.dot)


def leaf_of(params: Params, path: tuple[str, ...]) -> np.ndarray:
    """The parameter at a path of a tree."""
    tree = params
    for key in path:
        tree = tree[key]
    return np.asarray(tree, np.float32)


def diffusers_part(kind: Any, part: str, params: Params, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """diffusers' network of that class with our weights of Stable Diffusion 1.5's "unet" or "vae", in this dtype."""
    with torch.device("meta"):
        network = kind.from_config(diffusers_json(SD15)[f"{part}/config.json"])
    state = {}
    for entry in entries(SD15, part, "diffusers"):
        leaves = [leaf_of(params, path) for path in entry.leaves]
        state[entry.name] = torch.from_numpy(entry.from_leaves(leaves).copy()).to(dtype)
    network.load_state_dict(state, assign=True)
    return network.eval().requires_grad_(False)


class Ours:
    """A guided step and a whole loop of sdjax; text keys and values and the time embeddings are computed beforehand."""

    def __init__(self, params: Params, x: np.ndarray, context: np.ndarray, steps: int) -> None:
        request = Request("", steps=steps, guidance=GUIDANCE, sampler="ddim", spacing="leading")
        rows, calls = stack_plans([plan(request, SD15)] * len(x))
        self.level: NoiseLevel = jax.tree.map(lambda leaf: leaf[:, 0], rows.levels)
        self.params, known = {"unet": params}, jnp.zeros(x.shape)
        kv = text_kv(params, context, config=SD15)
        kv = jax.tree.map(lambda leaf: jnp.swapaxes(leaf.reshape(2, -1, *leaf.shape[1:]), 0, 1), kv)
        shifts = embed_timesteps(params, rows.levels.t, config=SD15)
        mask, concat = jnp.ones_like(known[..., :1]), known[..., :0]
        b, s = calls.shape[0], rows.scale.shape[1]
        given = Conditioning(
            contexts=jnp.swapaxes(context.reshape(2, b, *context.shape[1:]), 0, 1),
            keys=jnp.full((b, 2), context.shape[1], jnp.int32),
            texts=jnp.tile(jnp.arange(2, dtype=jnp.int32), (b, s, 1)),
            changed=jnp.zeros((b, s), bool),
            strengths=jnp.ones((b, 1)),
            parts=jnp.ones(b, jnp.int32),
            shifts={"unet": shifts},
            gates=jnp.zeros((b, 1, 0)),
            known=known,
            mask=mask,
            concat=concat,
        )
        state = first_state(rows, calls, jnp.asarray(x), image_keys(range(len(x))), given)
        self.state = state._replace(held={"unet": kv})
        made = jax.jit(transformed_kernels, static_argnames="config")(self.params, state.carry.x, config=SD15)
        self.ready = {**self.params, TRANSFORMED: made}

    def step(self) -> jax.Array:
        """x0_hat f32[b, h, w, 4]."""
        return denoise(MakeDenoiser(SD15), self.ready, self.state, self.level)

    def loop(self) -> jax.Array:
        """The latents f32[b, h, w, 4] after all steps."""
        return sample(self.params, self.state, config=SD15).carry.x


class Theirs:
    """The same step with diffusers' network."""

    def __init__(self, unet: Any, level: NoiseLevel, x: np.ndarray, context: np.ndarray) -> None:
        self.unet, self.sigma, self.t = unet, float(level.sigma[0]), torch.tensor(float(level.t[0]), device=unet.device)
        self.x = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).to(unet.device)
        self.context = torch.from_numpy(context).to(unet.device, unet.dtype)

    @torch.no_grad()
    def step(self) -> torch.Tensor:
        """x0_hat f32[b, 4, h, w]."""
        pair = torch.cat([self.x, self.x]).div((self.sigma**2 + 1) ** 0.5).to(self.unet.dtype)
        output = self.unet(pair, self.t, encoder_hidden_states=self.context).sample.float()
        negative, positive = output.chunk(2)
        return self.x - self.sigma * (negative + GUIDANCE * (positive - negative))


def wait(result: Any) -> None:
    if isinstance(result, jax.Array):
        result.block_until_ready()
    elif result.is_cuda:
        torch.cuda.synchronize()


def seconds(run: Callable[[], Any], calls: int) -> float:
    """The time of one of `calls` calls in a row."""
    start = time.perf_counter()
    for _ in range(calls):
        result = run()
    wait(result)
    return (time.perf_counter() - start) / calls


def matmul_peak() -> float:
    """FLOP/s of a bfloat16 product of 8192 x 8192 matrices."""
    a = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16)
    wait(product(a, a))
    return 2 * 8192**3 / min(seconds(lambda: product(a, a), 20) for _ in range(5))


def compare(params: Params, unet: Any, batch: int, steps: int, rounds: int, calls: int) -> tuple[float, ...]:
    """Relative error, then the medians in seconds: diffusers' step, our step, a step of our loop."""
    rng = np.random.default_rng(0)
    side = SD15.image_size // SD15.vae.downscale
    x = 14.6 * rng.standard_normal((batch, side, side, SD15.vae.latent_channels), np.float32)  # about sigma_max
    context = rng.standard_normal((2 * batch, SD15.clip.length, SD15.unet.context_width), np.float32)
    ours = Ours(params, x, context, steps)
    theirs = Theirs(unet, ours.level, x, context)
    for _ in range(min(calls, 3)):  # compiling; CUDA graphs are recorded in the second and third call
        wait(ours.loop())
        found, answer = np.asarray(ours.step()), theirs.step()
    expected = answer.cpu().numpy().transpose(0, 2, 3, 1)
    memory = sample.lower(ours.params, ours.state, config=SD15).compile().memory_analysis()
    size = memory.argument_size_in_bytes / 2**20, memory.temp_size_in_bytes / 2**20
    print(f"memory of our loop: arguments {size[0]:.0f} MiB, while it runs {size[1]:.0f} MiB more", flush=True)
    times = [
        (seconds(theirs.step, calls), seconds(ours.step, calls), seconds(ours.loop, 1) / steps) for _ in range(rounds)
    ]
    error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    return error, *(statistics.median(column) for column in zip(*times, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on the cpu; gpu: bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, help="steps of the loop (default: 3 on the cpu, 20 on the gpu)")
    options = parser.parse_args()
    gpu = options.device == "gpu"
    dtype = options.dtype or ("bfloat16" if gpu else "float32")
    if gpu and dtype != "bfloat16":
        parser.error("--device gpu measures bfloat16 only")
    if gpu and not torch.cuda.is_available():
        raise SystemExit("GPU: not measured, PyTorch sees no NVIDIA GPU on this machine")
    if gpu and jax.default_backend() != "gpu":
        raise SystemExit("GPU: not measured, JAX sees no GPU; pip install '.[cuda]' and unset JAX_PLATFORMS")
    if not gpu:
        jax.config.update("jax_platforms", "cpu")
    steps, calls = options.steps or (20 if gpu else 3), 20 if gpu else 1
    device = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    flags = os.environ.get("XLA_FLAGS", "none")
    print(f"{device}; jax {jax.__version__}, torch {torch.__version__}, diffusers {diffusers.__version__}")
    print(f"XLA_FLAGS {flags}, load {os.getloadavg()[0]:.1f}", flush=True)

    half = not gpu and dtype == "bfloat16"
    if half:
        has = " and ".join(bfloat16_instructions())
        print(has or "bfloat16 is no faster here: the processor has neither AMX nor AVX512-BF16", flush=True)

    weights = random_params(SD15, dtype=dtype)["unet"]
    unet = diffusers_part(diffusers.UNet2DConditionModel, "unet", weights, getattr(torch, dtype))
    params = jax.tree.map(jnp.asarray, weights)
    del weights
    peak = 0.0
    if half:
        unet = unet.to(memory_format=torch.channels_last)
    if gpu:
        unet = unet.to("cuda").to(memory_format=torch.channels_last)
        unet.compile(mode="max-autotune", dynamic=False)
        peak = matmul_peak()
        print(f"matrix product in bfloat16: {peak / 1e12:.0f} TFLOP/s")
    print("pictures  diffusers, s  ours, s  ratio  step in our loop, s  to our step  TFLOP/s  relative difference")
    for batch in (1, 8, 32) if gpu else (1,):
        error, theirs, ours, loop = compare(params, unet, batch, steps, options.rounds, calls)
        rate = batch * STEP_FLOP / loop
        share = f" ({rate / peak:.0%} of the peak)" if gpu else ""
        print(
            f"{batch:8}  {theirs:12.4f}  {ours:7.4f}  {ours / theirs:5.2f}  {loop:19.4f}  {loop / ours:11.3f}  "
            f"{rate / 1e12:7.3f}{share}  {error:.1e}",
            flush=True,
        )
    if not gpu:
        print("GPU: not measured in this run")


if __name__ == "__main__":
    main()
