"""One training step: a pure function from a state and a batch to the next state.

Everything that a training needs to resume is in `TrainState`; randomness is `fold_in(key, step)`, so that a state and a
batch always give the same next state, whether the run was interrupted in between or not. Parameters and optimiser are
float32 masters; the loss may compute in bfloat16. Over devices it is the same function: shard the batch and the state
(`state_sharding`, `batch_sharding`), and jit does the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sdjax.devices.platform import use_gradients
from sdjax.train.losses import Metrics
from sdjax.types import Array, Params

UPDATE_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": ""}
"""On a CPU: turns off one of XLA's libraries, whose gradients of convolutions take 1.5 times as long as XLA's own."""

Loss = Callable[[Params, Any, Any, Array], tuple[Array, Metrics]]
"""(parameters, frozen parameters, batch, key) -> (f32[], metrics f32[] by name)."""


class TrainState(NamedTuple):
    """step: i32[], steps done. params: float32 masters. optimizer: optax' state. ema: the running average of params."""

    step: Array
    params: Params
    optimizer: Any
    ema: Params


def learning_rate(peak: float, steps: int, *, warmup: int = 0, decay: int = 0) -> optax.Schedule:
    """Rises linearly for `warmup` steps, stays at `peak`, and falls as a half cosine to 0 over the last `decay` steps.

    Raises:
        ValueError: warm-up and decay do not fit into `steps`.
    """
    if warmup < 0 or decay < 0 or warmup + decay > steps:
        raise ValueError(f"warmup {warmup} and decay {decay} must be 0 or more and fit into {steps} steps")
    parts = [optax.linear_schedule(0.0, peak, warmup), optax.constant_schedule(peak)]
    if decay:
        parts.append(optax.cosine_decay_schedule(peak, decay))
    return optax.join_schedules(parts, [warmup, steps - decay][: len(parts) - 1])


def optimizer(
    rate: optax.Schedule | float,
    *,
    kind: str = "adamw",
    weight_decay: float = 0.01,
    clip: float = 1.0,
    b2: float = 0.999,
) -> optax.GradientTransformation:
    """Gradients clipped to the global norm `clip`, then "adamw" (Loshchilov & Hutter 2019) or "adafactor" (Shazeer &
    Stern 2018), whose second moments take rows and columns instead of a copy of the parameters.

    Weight decay is for kernels and embeddings alone: not for biases, norm scales and the temperature.

    Raises:
        ValueError: `kind` is neither.
    """

    def decays(params: Params) -> Params:
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    if kind == "adamw":
        update = optax.adamw(rate, b2=b2, weight_decay=weight_decay, mask=decays)
    elif kind == "adafactor":
        whole = optax.adafactor(weight_decay_rate=weight_decay or None, weight_decay_mask=decays)
        update = optax.chain(whole, optax.scale_by_learning_rate(rate, flip_sign=False))  # decay included, as in AdamW
    else:
        raise ValueError(f"the optimizer must be adamw or adafactor, found {kind!r}")
    return optax.chain(optax.clip_by_global_norm(clip), update)


def initial_state(params: Params, update: optax.GradientTransformation) -> TrainState:
    """Step 0, from parameters of any dtype. No two leaves share memory, so that the state may be donated."""
    masters = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), params)
    return TrainState(jnp.int32(0), masters, update.init(masters), jax.tree.map(jnp.copy, masters))


def make_step(
    loss: Loss,
    update: optax.GradientTransformation,
    *,
    ema: float = 0.999,
    accumulate: int = 1,
    dtype: str = "float32",
) -> Callable[[TrainState, Params, Any, Array], tuple[TrainState, Metrics]]:
    """(state, frozen, batch, key) -> (state, metrics): one update of the parameters. Pure; jit and donate the state.

    batch: a pytree with a leading axis b. accumulate: the batch is worked through in so many parts, one after another,
    and their gradients averaged. ema: decay of the running average, held down to (1 + step) / (10 + step) at first.
    dtype: what the loss computes in. metrics: the loss's own, averaged over the parts, and "gradient_norm".
    """
    compute = jnp.dtype(dtype)

    def in_dtype(tree: Params) -> Params:
        return jax.tree.map(lambda leaf: leaf.astype(compute), tree)

    def gradients(params: Params, frozen: Params, batch: Any, key: Array) -> tuple[Params, Metrics]:
        def objective(params: Params) -> tuple[Array, Metrics]:
            return loss(in_dtype(params), frozen, batch, key)

        with use_gradients(True):
            gradient, metrics = jax.grad(objective, has_aux=True)(params)
        return gradient, metrics

    def step(state: TrainState, frozen: Params, batch: Any, key: Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        if accumulate == 1:
            gradient, metrics = gradients(state.params, frozen, batch, key)
        else:
            parts = jax.tree.map(lambda x: x.reshape(accumulate, x.shape[0] // accumulate, *x.shape[1:]), batch)

            def add(total: Any, part: Any) -> tuple[Any, None]:
                index, rows = part
                found = gradients(state.params, frozen, rows, jax.random.fold_in(key, index))
                return jax.tree.map(lambda a, b: a + b / accumulate, total, found), None

            first = jax.tree.map(lambda x: x[0], parts)
            shapes = jax.eval_shape(gradients, state.params, frozen, first, key)
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            (gradient, metrics), _ = jax.lax.scan(add, zeros, (jnp.arange(accumulate), parts))
        change, optimizer_state = update.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, change)
        decay = jnp.minimum(ema, (1 + state.step) / (10 + state.step))
        average = optax.incremental_update(params, state.ema, 1 - decay)
        metrics |= {"gradient_norm": optax.tree.norm(gradient)}
        return TrainState(state.step + 1, params, optimizer_state, average), metrics

    return step


def scanned(step: Callable[..., tuple[TrainState, Metrics]]) -> Callable[..., tuple[TrainState, Metrics]]:
    """The same step for a stack of batches with a leading axis n, in one program; metrics come as f32[n]."""

    def steps(state: TrainState, frozen: Params, batches: Any, key: Array) -> tuple[TrainState, Metrics]:
        return jax.lax.scan(lambda state, batch: step(state, frozen, batch, key), state, batches)

    return steps


def state_sharding(state: Any, mesh: Mesh, *, shard_params: bool = False, axis: str = "data") -> Any:
    """Where each leaf of a state (or of its shapes) is stored: on every device, or, with `shard_params`, divided over
    `axis`.

    Split is the longest axis of a leaf that the number of devices divides; a leaf without one is replicated (fully
    sharded data parallelism: Rajbhandari et al. 2020, ZeRO stage 3).
    """
    devices = mesh.shape[axis]

    def place(leaf: Any) -> NamedSharding:
        shape = np.shape(leaf)
        fitting = [i for i, length in enumerate(shape) if length % devices == 0 and length >= devices]
        if not shard_params or not fitting:
            return NamedSharding(mesh, PartitionSpec())
        longest = max(fitting, key=lambda i: shape[i])
        return NamedSharding(mesh, PartitionSpec(*(axis if i == longest else None for i in range(len(shape)))))

    return jax.tree.map(place, state)


def batch_sharding(mesh: Mesh, *, scanned: bool = False, axis: str = "data") -> NamedSharding:
    """Of a batch: its leading axis split over the devices; of the batches of `scanned` steps: the second."""
    return NamedSharding(mesh, PartitionSpec(None, axis) if scanned else PartitionSpec(axis))


def jit_step(step: Callable[..., tuple[TrainState, Metrics]], sharding: Any = None) -> Any:
    """`step` compiled, its state donated and, with `sharding` from `state_sharding`, kept where it is."""
    placed = None if sharding is None else (sharding, None)
    options = UPDATE_OPTIONS if jax.default_backend() == "cpu" else None
    return jax.jit(step, donate_argnums=0, out_shardings=placed, compiler_options=options)
