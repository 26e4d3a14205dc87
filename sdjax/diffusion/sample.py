"""The sampling loop: one step, and two drivers of it: one `lax.scan` over the rows, and a stream of single steps.

A `State` is pictures under way, each at a row of its own: a batch, a stream of previews, and the places of a job that
takes in the next picture when one is finished are all the same thing.

A denoiser comes as `make_denoiser`, a hashable function from its inputs to a `Denoiser`: `make_denoiser(params, given,
index)`, where params are shared, `given` is a pytree of arrays f[b, ...] for each picture, and index i32[b] is the row
that each picture is at. So whatever can change from call to call is an argument of the compiled program, and never a
constant in it. One with a method `held(params, given, held, index)` keeps what is worked out for several rows in
`State.held`, and is called with it: `make_denoiser(params, given, held, index)`.

Randomness: picture i has a key of its own, made from its own seed. Its initial noise comes from fold_in(key, 0), the
noise of row j from fold_in(key, j + 1): nothing depends on the batch that the picture is made in. Where a `State` has
`noises`, row j takes what was drawn for it beforehand (`sdjax.diffusion.noise`), and the key is not used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sdjax.devices.platform import seeded_keys
from sdjax.diffusion.rows import Carry, Rows, first_carry, step
from sdjax.diffusion.schedule import per_image
from sdjax.types import Array, Denoiser, Latent

MakeDenoiser = Callable[..., Denoiser]


class State(NamedTuple):
    """Pictures under way; every leaf has them along its first axis.

    carry: what the last step left, of which `carry.x` f[b, h, w, c] are the latents.
    index: i32[b], the row that each picture takes next.
    rows: each picture's own table, leaves [b, s, ...].
    calls: i32[b], the first rows, those that run; a picture is finished when its index has reached it.
    key: key[b], the source of each picture's randomness.
    given: what its denoiser sees besides, a pytree of f[b, ...] (`Conditioning`).
    held: what it keeps from row to row, such as keys and values of the texts; None where it keeps nothing.
    noises: f32[b, s, h, w, c], the unit normal noise of each row, drawn beforehand; None: drawn from the keys.
    """

    carry: Carry
    index: Any
    rows: Rows
    calls: Any
    key: Array
    given: Any
    held: Any = None
    noises: Any = None


def first_state(
    rows: Rows, calls: Any, x: Latent, key: Array, given: Any, held: Any = None, noises: Any = None
) -> State:
    """The state before the first row; x: f32[b, h, w, c] at the first row's level, in sigma space."""
    return State(first_carry(x), jnp.zeros(len(x), jnp.int32), rows, calls, key, given, held, noises)


def image_keys(seeds: Any) -> Array:
    """seeds, a sequence of b whole numbers in [0, 2^32) -> one random key for each picture, key[b].

    Raises:
        ValueError: a seed is not a whole number in that range.
    """
    for seed in seeds:
        if int(seed) != seed or not 0 <= seed < 2**32:
            raise ValueError(f"a seed must be a whole number in [0, 2^32), found {seed!r}")
    return seeded_keys([int(seed) for seed in seeds])


def draw(keys: Array, index: Any, shape: tuple[int, ...]) -> Array:
    """Unit normal noise f32[b, *shape], each picture's from its own key and index, i32[] or i32[b].

    Drawn as one row of numbers: the same ones, and on a CPU compiled in a seventh of the time.
    """

    def one(key: Array, index: Any) -> Array:
        row = jax.random.normal(jax.random.fold_in(key, index), (math.prod(shape),), jnp.float32)
        return row.reshape(shape)

    return jax.vmap(one)(keys, jnp.broadcast_to(jnp.asarray(index), keys.shape))


def initial_noise(keys: Array, shape: tuple[int, ...]) -> Latent:
    """The unit normal noise f32[b, h, w, c] that sampling starts from; shape is (h, w, c)."""
    return draw(keys, 0, shape)


def at_rows(table: Any, index: Array) -> Any:
    """Of a table with leaves [b, s, ...], each picture's row at its own index, leaves [b, ...]."""

    def row(leaf: Array) -> Array:
        places = jnp.minimum(index, leaf.shape[1] - 1).reshape(-1, *[1] * (leaf.ndim - 1))
        return jnp.take_along_axis(jnp.asarray(leaf), places, axis=1)[:, 0]

    return jax.tree.map(row, table)


def sample_step(make_denoiser: MakeDenoiser, params: Any, state: State) -> State:
    """One row of every picture's own sampler; a picture that is finished stays as it is."""
    carry, index, held = state.carry, state.index, state.held
    if state.noises is None:
        noise = draw(state.key, 1 + index, carry.x.shape[1:])
    else:
        noise = at_rows(state.noises, index)
    if hasattr(make_denoiser, "held"):
        held = make_denoiser.held(params, state.given, held, index)
        denoise = make_denoiser(params, state.given, held, index)
    else:
        denoise = make_denoiser(params, state.given, index)
    after = step(denoise, carry, at_rows(state.rows, index), noise.astype(carry.x.dtype))
    running = index < state.calls
    kept = jax.tree.map(lambda new, old: jnp.where(per_image(running, new), new, old), after, carry)
    return state._replace(carry=kept, index=index + running, held=held)


def sample(make_denoiser: MakeDenoiser, params: Any, state: State, ticks: Any = None) -> State:
    """Runs the samplers of all pictures together and returns the state after; `.carry.x` are the latents.

    ticks: i32[], the number of steps; None: until every picture is finished. Steps that no picture needs are skipped
    without a call of the network, so that one program serves every number of steps up to s. Pure and traceable: call it
    inside your own jit, and differentiate through it.
    """
    rows, noises = jax.tree.map(jnp.asarray, (state.rows, state.noises))
    state = state._replace(rows=rows, noises=noises, calls=jnp.asarray(state.calls))

    def one(moving: tuple[Carry, Array, Any], tick: Array) -> tuple[tuple[Carry, Array, Any], None]:
        def run(moving: tuple[Carry, Array, Any]) -> tuple[Carry, Array, Any]:
            carry, index, held = moving
            after = sample_step(make_denoiser, params, state._replace(carry=carry, index=index, held=held))
            return after.carry, after.index, after.held

        needed = jnp.any(moving[1] < state.calls)
        if ticks is not None:
            needed &= tick < ticks
        return jax.lax.cond(needed, run, lambda moving: moving, moving), None

    moving = state.carry, state.index, state.held
    (carry, index, held), _ = jax.lax.scan(one, moving, jnp.arange(state.rows.scale.shape[1]))
    return state._replace(carry=carry, index=index, held=held)


_jitted_step = jax.jit(sample_step, static_argnums=0)


def stream(make_denoiser: MakeDenoiser, params: Any, state: State) -> Iterator[State]:
    """`sample` one step at a time: yields the state after each, for progress and previews (`.carry.x0_hat`).

    The step is compiled once for all rows; stop iterating to stop sampling.
    """
    count = int(np.max(state.calls - state.index, initial=0))
    state = _bound_like(state, params)
    for _ in range(count):
        state = _jitted_step(make_denoiser, params, state)
        yield state


def _bound_like(state: State, params: Any) -> State:
    """The state bound to the devices that the parameters are bound to, as every later one comes out of the step.

    For jit an array that is bound to its device is another kind of argument than one that is not: without this the
    step would be compiled twice.
    """
    bound = [leaf.sharding for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array) and leaf.committed]
    if not bound:
        return state
    where = bound[0]
    return jax.device_put(
        state, NamedSharding(where.mesh, PartitionSpec()) if isinstance(where, NamedSharding) else where
    )


def admit(state: Any, fresh: Any, places: Array) -> Any:
    """The state with some of its pictures replaced: leaves [b, ...] of both.

    places: i32[b], for each place the picture of `fresh` that takes it, or -1 where the one under way stays.
    """

    def mixed(old: Array, new: Array) -> Array:
        taken = jnp.take(new, jnp.maximum(places, 0), axis=0)
        return jnp.where(per_image(places >= 0, old), taken, old)

    return jax.tree.map(mixed, state, fresh)
