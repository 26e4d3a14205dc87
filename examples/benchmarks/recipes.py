"""What prompts, schedules and adapters cost, each beside the plain picture or the plain file in the same run.

    python examples/benchmarks/recipes.py [--model M] [--rounds 5] [--only steps|merging|loading] [--full]

Measures:
    steps     seconds of a step with live adapters by rank, with prompts of three chunks, with schedules that change
              their text at every step, with two prompts joined by AND, as ratios to the plain step
    merging   merging two adapters of rank 32 into the parameters, and the memory that it takes beyond them
    loading   reading an adapter of Stable Diffusion 1.5's layout, rank 128 in float16, beside reading its file

The model in the box is measured unless --model says another; --full measures `steps` and `merging` on random weights of
Stable Diffusion 1.5 (minutes, and 12 GB of memory), at --size.

The model in the box on two cores of an AMD EPYC with AVX-512, 2026-11-26, jax 0.10.2, --rounds 7. Its layers are 64 to
192 wide, so that a rank of 64 is as much as the layer itself; at full size it is a small part of it:

    a step of one guided picture, box:
        plain                                         5.2 ms   1.00
        weights                                       5.3 ms   1.03
        three chunks                                  5.4 ms   1.03
        a text for every step                         5.6 ms   1.08
        two prompts joined by AND                     7.5 ms   1.45
        live, rank up to 64                           6.6 ms   1.28
        live, rank up to 128                         10.1 ms   1.95
        live, rank up to 256                         11.6 ms   2.23
        live with convolutions, rank up to 64         9.8 ms   1.89
    with --full --size 256x256 --rounds 1, from two steps alone: weights 1.04, three chunks 1.08, a text for every step
        1.20, two prompts joined by AND 1.54 of a plain step of 1.04 s; live adapters were lost in the noise of making
        their banks, and have not been measured at full size
    merging two adapters of rank 32 into box: 0.02 s; 13 MB of parameters changed, 0 MB beyond them at most
    an adapter of 151 MB: 65 ms, 73 ms for reading its file: 0.89 times (beside other work 1.10 to 1.42)
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import sdjax
from convert.adapters import read_adapter, targets, write_adapter
from sdjax.config import SD15, ModelConfig
from sdjax.models.adapter_forms import Update
from sdjax.models.adapters import Adapter, Strength, merged
from sdjax.models.params import random_params
from sdjax.pipeline.adapters import Library
from sdjax.pipeline.pipeline import Pipeline
from sdjax.request import Request, parse_size
from sdjax.text.tokenizer import clip_tokenizer

STEPS = 8


def adapter(config: ModelConfig, rank: int, seed: int = 0, *, convolutions: bool = False) -> Adapter:
    """A LoRA of every module that kohya trains, in float16."""
    rng = np.random.default_rng(seed)
    updates = {}
    for target in targets(config).values():
        inside = target.kernel[0] == "text" or any(key.startswith("attention") for key in target.kernel)
        if target.kernel[-1] == "kernel" and (inside or convolutions):
            inner = int(np.prod(target.shape[1:]))
            down = (rng.standard_normal((rank, inner), np.float32) * inner**-0.5).astype(np.float16)
            up = (rng.standard_normal((target.shape[0], rank), np.float32) * 0.01).astype(np.float16)
            tensors = {
                "lora_down": down.reshape(rank, *target.shape[1:]),
                "lora_up": up.reshape(*up.shape, *[1] * (len(target.shape) - 2)),
                "alpha": np.float16(rank),
            }
            updates[target.kernel] = Update(
                "lora", tensors, target.shape, target.kernel, target.kernel_shape, target.bias
            )
    return Adapter(f"rank{rank}", updates)


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def medians(rounds: int, calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """The median seconds of each, every round running all of them, after one that does not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name in list(calls)[:: -1 if number % 2 else 1]:
            times[name].append(seconds(calls[name]))
    return {name: statistics.median(column[1:]) for name, column in times.items()}


def model_of(options: argparse.Namespace) -> Pipeline:
    if options.full:
        return Pipeline(SD15, random_params(SD15), clip_tokenizer(), "random Stable Diffusion 1.5")
    return sdjax.load(options.model)


def steps(options: argparse.Namespace) -> None:
    pipe, count = model_of(options), STEPS
    width, height = (None, None) if options.size is None else parse_size(options.size)
    with tempfile.TemporaryDirectory() as folder:
        for rank in (32, 128, 256):
            write_adapter(Path(folder) / f"r{rank}.safetensors", adapter(pipe.config, rank), pipe.config)
        conv = adapter(pipe.config, 32, convolutions=True)
        write_adapter(Path(folder) / "conv.safetensors", conv, pipe.config)
        pipe = dataclasses.replace(pipe, library=Library(Path(folder)))
        prompts = {
            "plain": "red heart",
            "weights": "(red:1.3) heart, [small]",
            "three chunks": "red heart, " * (2 * (pipe.words.length // 3) + 2),
            "a text for every step": "[red|blue] heart",
            "two prompts joined by AND": "red heart AND blue star",
            "live, rank up to 64": "red heart <lora:r32:0.5>",
            "live, rank up to 128": "red heart <lora:r128:0.5>",
            "live, rank up to 256": "red heart <lora:r256:0.5>",
            "live with convolutions, rank up to 64": "red heart <lora:conv:0.5>",
        }

        def picture(prompt: str, steps: int) -> Callable[[], Any]:
            request = Request(prompt, steps=steps, sampler="euler", width=width, height=height)
            return lambda: list(pipe.batch([request], batch_size=1))

        calls = {name: picture(prompt, count) for name, prompt in prompts.items()}
        calls |= {f"{name}, one step": picture(prompt, 1) for name, prompt in prompts.items()}
        found = medians(options.rounds, calls)
    each = {name: (found[name] - found[f"{name}, one step"]) / (count - 1) for name in prompts}
    print(f"a step of one guided picture, {pipe.name}:")
    for name in prompts:
        print(f"    {name:40} {1000 * each[name]:8.1f} ms   {each[name] / each['plain']:.2f}", flush=True)


def merging(options: argparse.Namespace) -> None:
    pipe = model_of(options)
    wanted = [(adapter(pipe.config, 32, seed), Strength(0.7, 0.7)) for seed in (1, 2)]
    took = statistics.median(seconds(lambda: merged(pipe.params, wanted, pipe.config)) for _ in range(options.rounds))
    host = jax.tree.map(np.asarray, pipe.params)
    tracemalloc.start()
    result = merged(host, wanted, pipe.config)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    changed = sum(
        new.nbytes for new, old in zip(jax.tree.leaves(result), jax.tree.leaves(host), strict=True) if new is not old
    )
    print(
        f"merging two adapters of rank 32 into {pipe.name}: {took:.2f} s; {changed / 1e6:.0f} MB of parameters "
        f"changed, {(peak - changed) / 1e6:.0f} MB beyond them at most",
        flush=True,
    )


def loading(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "r128.safetensors"
        write_adapter(path, adapter(SD15, 128), SD15)
        read_adapter(path, SD15)  # the map of names is made once in a process
        size = path.stat().st_size
        found = medians(max(5, options.rounds), {"file": path.read_bytes, "adapter": lambda: read_adapter(path, SD15)})
    print(
        f"an adapter of {size / 1e6:.0f} MB: {1000 * found['adapter']:.0f} ms, {1000 * found['file']:.0f} ms for "
        f"reading its file: {found['adapter'] / found['file']:.2f} times",
        flush=True,
    )


MEASURES = {measure.__name__: measure for measure in (steps, merging, loading)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="anything that sdjax.load takes (the model in the box)")
    parser.add_argument("--full", action="store_true", help="random weights of Stable Diffusion 1.5")
    parser.add_argument("--size", metavar="WxH", help="of the pictures of steps (the model's own)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=list(MEASURES))
    options = parser.parse_args()
    for name, measure in MEASURES.items():
        if options.only in (None, name):
            measure(options)


if __name__ == "__main__":
    main()
