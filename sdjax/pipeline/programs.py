"""The functions of a batch as compiled programs, for one model on the devices of one placement."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from sdjax.config import ModelConfig, tiled
from sdjax.devices.placement import Placement, Program, jitted, parallelize
from sdjax.diffusion import sample as loop
from sdjax.diffusion.rows import Carry
from sdjax.diffusion.sample import State
from sdjax.image import to_uint8
from sdjax.models.layers import TRANSFORMED
from sdjax.pipeline import functions
from sdjax.types import Array, Params


class Programs(NamedTuple):
    """The programs that make pictures. Parameters are arguments, so that another checkpoint compiles nothing.

    encode: (params, pictures f32[1, H, W, 3]) -> latents, a picture at a time.
    condition: clip_skip -> (params, prompts, rows, gates, known, mask, concat) -> (`Conditioning`, keys and values).
    initial_latents: (key, noise, drawn, sigma, pure, known, mask) -> carry.
    sample: (params, state, ticks i32[]) -> (carry, index, held), what has changed of the state.
    admit: (state, fresh, places) -> state, with the pictures of `fresh` in some places.
    decode: (params, latents) -> pictures f32[b, H, W, 3].
    to_bytes: pictures -> u8[b, H, W, 3], and whether each is finite, bool[b].
    transform: (params, latents) -> the kernels that `sample` calls for; None where they are made inside of it.
    """

    encode: Program
    condition: Callable[[int | None], Program]
    initial_latents: Program
    sample: Program
    admit: Program
    decode: Program
    to_bytes: Program
    transform: Program | None


def sample(params: Params, state: State, ticks: Array, *, config: ModelConfig) -> tuple[Carry, Array, Any]:
    """`functions.sample`, and of the state what has changed: the rest need not be copied."""
    after = functions.sample(params, state, ticks, config=config)
    return after.carry, after.index, after.held


@lru_cache(maxsize=64)
def programs(config: ModelConfig, placement: Placement) -> Programs:
    """The programs of a model on a placement; each is compiled when it is first called with arguments of a shape."""

    def of_params(parts: tuple[str, ...], function: Callable[..., Any], per_picture: Sequence[bool]) -> Program:
        program = parallelize(partial(function, config=config), (False, *per_picture), placement)
        return _taking(parts, program)

    @lru_cache
    def condition(skip: int | None) -> Program:
        return of_params(("text", "unet", "adapters"), partial(functions.condition, skip=skip), [True] * 6)

    transform = None
    steps = of_params(("unet", "adapters", TRANSFORMED), sample, [True, False])
    if placement.platform == "cpu" and placement.devices is None:
        transform = _taking(("unet",), jitted(partial(functions.transformed_kernels, config=config), placement))
        steps = _with_kernels(steps, transform)
    return Programs(
        encode=_taking(("vae",), jitted(partial(functions.encode, config=config), placement)),
        condition=condition,
        initial_latents=parallelize(functions.initial_latents, [True] * 7, placement),
        sample=steps,
        admit=parallelize(loop.admit, [True] * 3, dataclasses.replace(placement, batch_invariant=False)),
        decode=of_params(("vae",), functions.decode, [True]),
        to_bytes=parallelize(to_bytes, [True], dataclasses.replace(placement, batch_invariant=False)),
        transform=transform,
    )


def programs_of_kind(config: ModelConfig, placement: Placement, *, tiling: bool = False) -> Programs:
    """The programs for pictures that are tiled, or are not; what has no convolutions in it is the same program."""
    usual = programs(config, placement)
    if not tiling:
        return usual
    wrapped = programs(tiled(config), placement)
    return usual._replace(
        encode=wrapped.encode, sample=wrapped.sample, decode=wrapped.decode, transform=wrapped.transform
    )


@lru_cache(maxsize=64)
def encoder(config: ModelConfig, placement: Placement, skip: int | None) -> Program:
    """(params, prompts) -> their texts as the UNet attends to them (`functions.contexts`), for `Pipeline.encode`."""
    return _taking(("text",), jitted(partial(functions.contexts, config=config, skip=skip), placement))


def _taking(parts: Sequence[str], program: Program) -> Program:
    """The program, called with all parameters and given those parts of them that it uses."""

    def of(params: Params) -> Params:
        return {part: params[part] for part in parts if part in params}

    def call(params: Params, *arguments: Any) -> Any:
        return program(of(params), *arguments)

    call.lower = lambda params, *arguments: program.lower(of(params), *arguments)  # type: ignore[attr-defined]
    call.ahead = lambda params, *arguments: program.ahead(of(params), *arguments)  # type: ignore[attr-defined]
    call.program = program.program  # type: ignore[attr-defined]
    return cast(Program, call)


def _with_kernels(program: Program, transform: Program) -> Program:
    """`sample`, given the kernels that a CPU convolves by in another form (`functions.transformed_kernels`).

    They are made when parameters are first sampled with, and anew when these or the pictures' size change: not in every
    call, of which there is one for each step where progress is shown. They are let go with the parameters. Where there
    are several devices, `sample` makes them itself.
    """
    latest: list[Any] = []  # height and width, references to the parameters, the kernels

    def made(params: Params, x: Array) -> Any:
        leaves = jax.tree.leaves(params["unet"])
        known = latest and latest[0] == x.shape[1:3] and len(latest[1]) == len(leaves)
        if not known or any(kept() is not leaf for kept, leaf in zip(latest[1], leaves, strict=True)):
            references = [weakref.ref(leaf, lambda _: latest.clear()) for leaf in leaves]
            latest[:] = x.shape[1:3], references, transform(params, x)
        return latest[2]

    def ready(params: Params, x: Array, make: Callable[..., Any]) -> Params:
        return {**params, TRANSFORMED: make(params, x)} if functions.has_transformed(x) else params

    def call(params: Params, state: State, ticks: Any) -> Any:
        return program(ready(params, state.carry.x, made), state, ticks)

    def ahead(params: Params, state: State, ticks: Any) -> Any:
        return program.ahead(ready(params, state.carry.x, lambda *of: transform.ahead(*of).shapes()), state, ticks)

    call.lower = lambda *arguments: ahead(*arguments)()  # type: ignore[attr-defined]
    call.ahead, call.program = ahead, program.program  # type: ignore[attr-defined]
    return cast(Program, call)


def to_bytes(pictures: Array) -> tuple[Array, Array]:
    """Pictures f32[b, H, W, 3] -> u8[b, H, W, 3], and whether each is finite, bool[b]."""
    return to_uint8(pictures), jnp.isfinite(pictures).all((1, 2, 3))
