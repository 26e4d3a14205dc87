"""The sampling loop: one `lax.scan` over a sampler's rows, and the same step one at a time for
previews.

A denoiser comes as `make_denoiser`, a hashable function from its inputs (parameters, text, masks: a
pytree of arrays) to a `Denoiser`. So whatever can change from call to call is an argument of the
compiled program, and never a constant in it.

Randomness: image i has a key of its own, made from its own seed. Its starting noise comes from
fold_in(key, 0), the noise of row j from fold_in(key, j + 1): nothing depends on the batch that the
image is made in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sdjax.devices.platform import seeded_keys
from sdjax.diffusion.samplers import Carry, Rows, first_carry, step
from sdjax.types import Array, Denoiser, Latent

MakeDenoiser = Callable[[Any], Denoiser]


def image_keys(seeds: Any) -> Array:
    """seeds, a sequence of b whole numbers in [0, 2^32) -> one random key for each image, key[b].

    Raises:
        ValueError: a seed is not a whole number in that range.
    """
    for seed in seeds:
        if int(seed) != seed or not 0 <= seed < 2**32:
            raise ValueError(f"a seed must be a whole number in [0, 2^32), found {seed!r}")
    return seeded_keys([int(seed) for seed in seeds])


def draw(keys: Array, index: Array | int, shape: tuple[int, ...]) -> Array:
    """Unit normal noise f32[b, *shape], each image's from its own key and `index`.

    Drawn as one row of numbers: the same ones, and on a CPU compiled in a seventh of the time.
    """

    def one(key: Array) -> Array:
        row = jax.random.normal(jax.random.fold_in(key, index), (math.prod(shape),), jnp.float32)
        return row.reshape(shape)

    return jax.vmap(one)(keys)


def initial_noise(keys: Array, shape: tuple[int, ...]) -> Latent:
    """The unit normal noise f32[b, h, w, c] that sampling starts from; shape is (h, w, c)."""
    return draw(keys, 0, shape)


def with_time_table(rows: Any, time_table: Callable[[Array], Any]) -> Any:
    """The rows with what the network computes from t alone, for all of its calls at once."""
    return rows._replace(levels=rows.levels._replace(time=time_table(rows.levels.t)))


def sample_row(make_denoiser: MakeDenoiser, inputs: Any, keys: Array, carry: Carry, row: Rows, index: Array) -> Carry:
    """One row of `sample`; index: i32[], which one it is."""
    noise = draw(keys, 1 + index, carry.x.shape[1:]).astype(carry.x.dtype)
    return step(make_denoiser(inputs), carry, row, noise)


def sample(
    make_denoiser: MakeDenoiser, inputs: Any, rows: Rows, x: Latent, keys: Array, count: Array | None = None
) -> Latent:
    """Runs a sampler over its rows and returns the last x.

    rows: what `Sampler.rows` gave, leading axis s (s = 0 returns x), or [s, b] for a plan of its own for each picture.
    x: f32[b, h, w, c] at the first row's level, in sigma space. keys: key[b]. count: i32[] or i32[b], rows to run;
    those that no picture needs are skipped without a call of the network, so that one program serves every number of
    steps up to s. None: all of them. Pure and traceable: call it inside your own jit.
    """

    rows = jax.tree.map(jnp.asarray, rows)
    if not rows.scale.shape[0]:
        return x

    def body(carry: Carry, index: Array) -> tuple[Carry, None]:
        def run(carry: Carry) -> Carry:  # takes its row itself, so that a skipped one costs nothing
            return sample_row(make_denoiser, inputs, keys, carry, _row(rows, index), index)

        if count is None:
            return run(carry), None
        return jax.lax.cond(index < jnp.max(count), run, lambda carry: carry, carry), None

    carry, _ = jax.lax.scan(body, first_carry(x), jnp.arange(rows.scale.shape[0]))
    return carry.x


_jitted_row = jax.jit(sample_row, static_argnums=0)


def stream(
    make_denoiser: MakeDenoiser, inputs: Any, rows: Rows, x: Latent, keys: Array, count: int | None = None
) -> Iterator[tuple[Latent, Latent]]:
    """The rows of `sample` one by one: yields (x, x0_hat) after each, for progress and previews.

    The step is compiled once for all rows; stop iterating to stop sampling.
    """
    return row_by_row(partial(_jitted_row, make_denoiser, inputs, keys), rows, x, inputs, count)


def row_by_row(
    run: Callable[[Carry, Rows, Any], Carry], rows: Rows, x: Latent, inputs: Any, count: int | None = None
) -> Iterator[tuple[Latent, Latent]]:
    """`stream` for a compiled step: `run` takes (carry, row, index i32[]). inputs: what is bound in it."""
    rows = jax.tree.map(jnp.asarray, rows)  # to the device once
    carry = _bound_like(first_carry(x), inputs)
    for index in map(np.int32, range(rows.scale.shape[0] if count is None else count)):
        carry = run(carry, _row(rows, index), index)
        yield carry.x, carry.x0_hat


def _bound_like(carry: Any, inputs: Any) -> Any:
    """The first carry bound to the devices that the inputs are bound to, as every later one comes out of the step.

    For jit an array that is bound to its device is another kind of argument than one that is not: without this the
    step would be compiled twice.
    """
    bound = [leaf.sharding for leaf in jax.tree.leaves(inputs) if isinstance(leaf, jax.Array) and leaf.committed]
    if not bound:
        return carry
    if isinstance(bound[0], NamedSharding):
        return jax.device_put(carry, NamedSharding(bound[0].mesh, PartitionSpec()))
    return jax.device_put(carry, bound[0])


@jax.jit
def _row(rows: Rows, index: Array | np.int32) -> Rows:
    return jax.tree.map(lambda leaf: leaf[index], rows)
