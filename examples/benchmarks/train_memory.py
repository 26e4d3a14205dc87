"""What one training step of the full-size UNet holds in memory, and, with --run, the step itself.

    python examples/benchmarks/train_memory.py                            # compile only: four ways to train
    python examples/benchmarks/train_memory.py --run --optimizer adafactor --remat

The UNet of Stable Diffusion 1.5 on 512x512 pictures (latents 64x64) from random parameters, one picture a step, text
states and latents given, as `sdjax train unet` has them from its cache. "state" are parameters, their average and the
optimiser's moments in float32; "gradient" is another copy of the parameters; "temporaries" is what the compiler sets
aside for all intermediate results, gradient included.

Two CPU cores, 2026-11-21, jax 0.10.2 (each compiles for three minutes or more):

    | optimiser | computes in | remat | state | gradient | temporaries | state + temporaries |
    | adamw | float32 | no | 13.8 GB | 3.4 GB | 9.8 GB | 23.5 GB |
    | adamw | float32 | yes | 13.8 GB | 3.4 GB | 9.8 GB | 23.5 GB |
    | adafactor | float32 | yes | 6.9 GB | 3.4 GB | 10.4 GB | 17.2 GB |

    step 1: 123.6 s, loss 0.9915; step 2: 116.5 s, loss 0.9998 (adafactor, remat; other work on the machine)
    peak memory of the process: 20.9 GB

XLA's CPU compiler merges what remat recomputes with what it was to replace, so that the temporaries are the same; what
JAX itself hands from the forward to the backward pass is a quarter (tests/test_train_step.py). Not measured on a GPU.
"""

from __future__ import annotations

import argparse
import resource
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.config import SD15
from sdjax.diffusion.schedule import noise_schedule
from sdjax.models.params import abstract_params, initial_params
from sdjax.models.unet import UNet
from sdjax.train.losses import diffusion_loss
from sdjax.train.step import initial_state, jit_step, make_step, optimizer
from sdjax.types import Array, Params

WAYS = [  # optimiser, dtype of the computation, remat
    ("adamw", "float32", False),
    ("adamw", "float32", True),
    ("adafactor", "float32", True),
    ("adafactor", "bfloat16", True),
]


def step_and_shapes(kind: str, dtype: str, remat: bool, batch: int, size: int) -> tuple[Any, Any, Any]:
    """The jitted step, the shapes of its state, and those of a batch."""
    unet, schedule = UNet(SD15.unet, remat=remat), noise_schedule(SD15.schedule)

    def loss(params: Params, frozen: Params, batch: Any, key: Array) -> Any:
        def predict(x: Array, t: Array, context: Array) -> Any:
            return unet.apply({"params": params}, x, t, context)

        return diffusion_loss(predict, schedule, batch["latents"], batch["context"], key)

    update = optimizer(1e-5, kind=kind)
    state = jax.eval_shape(lambda params: initial_state(params, update), abstract_params(SD15)["unet"])
    shapes = {
        "latents": jax.ShapeDtypeStruct((batch, size // 8, size // 8, 4), jnp.float32),
        "context": jax.ShapeDtypeStruct((batch, 77, 768), jnp.float32),
    }
    return jit_step(make_step(loss, update, dtype=dtype)), state, shapes


def gigabytes(tree: Any) -> float:
    return sum(np.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory of a full-size training step.")
    parser.add_argument("--optimizer", choices=("adamw", "adafactor"), help="one way instead of the table")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--remat", action="store_true")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=512, help="pixels (512)")
    parser.add_argument("--run", action="store_true", help="run the step twice; needs --optimizer")
    options = parser.parse_args()
    if options.run and options.optimizer is None:
        parser.error("--run needs --optimizer, and memory for it")
    ways = WAYS if options.optimizer is None else [(options.optimizer, options.dtype, options.remat)]
    print("| optimiser | computes in | remat | state | gradient | temporaries | state + temporaries |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for kind, dtype, remat in ways:
        step, state, batch = step_and_shapes(kind, dtype, remat, options.batch, options.size)
        key = jax.eval_shape(lambda: jax.random.key(0))
        compiled = step.lower(state, {}, batch, key).compile()
        held, gradient = gigabytes(state), gigabytes(state.params)
        temporaries = compiled.memory_analysis().temp_size_in_bytes / 1e9
        sizes = " | ".join(f"{value:.1f} GB" for value in (held, gradient, temporaries, held + temporaries))
        print(f"| {kind} | {dtype} | {'yes' if remat else 'no'} | {sizes} |", flush=True)
        if options.run:
            run(compiled, kind, batch)


def run(compiled: Any, kind: str, batch: Any) -> None:
    """Two steps from random parameters: seconds, losses, peak memory of the process."""
    params = initial_params(SD15, parts=("unet",))["unet"]
    state = initial_state(params, optimizer(1e-5, kind=kind))
    del params
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(leaf.shape, np.float32) for name, leaf in batch.items()}
    for number in (1, 2):
        start = time.perf_counter()
        state, metrics = compiled(state, {}, arrays, jax.random.key(0))
        loss = float(metrics["loss"])
        print(
            f"step {number}: {time.perf_counter() - start:.1f} s, loss {loss:.4f}, {int(state.step)} done", flush=True
        )
    print(f"peak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB")


if __name__ == "__main__":
    main()
