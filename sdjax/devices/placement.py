"""Pictures over devices: one function of a batch, spread so that every device works on pictures of its own.

No picture needs another one, so there is nothing for devices to tell each other: each runs the function as if it were
alone, on its share of the batch (`jax.shard_map`, or `jax.pmap`), and the compiled program holds no collective.
Parameters lie whole on every device; with `model` > 1 each is split over that many devices, and then the compiler puts
in the communication that the products need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, Literal, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sdjax.devices.platform import compiler_options, pinned, written_for
from sdjax.types import Params

DATA, MODEL = "data", "model"
"""Axes of the mesh: pictures are split over the first, parameters over the second."""


@dataclass(frozen=True)
class Placement:
    """Where and how pictures are made; hashable.

    devices: None for the default device, or those to use. parallel: "jit" or "pmap". model: devices that each parameter
    is split over, for models that do not fit on one; a divisor of the number of devices. exact: one picture at a time
    on every device. Compilers choose other kernels, which round differently, for other batch
    sizes: so the bits of a picture never depend on what it is made with, which else hold to about 1e-5.

    Raises:
        ValueError: a field is out of range; the message names it.
    """

    devices: tuple[jax.Device, ...] | None = None
    parallel: Literal["jit", "pmap"] = "jit"
    model: int = 1
    exact: bool = False

    def __post_init__(self) -> None:
        if self.parallel not in ("jit", "pmap"):
            raise ValueError(f"parallel must be jit or pmap, found {self.parallel!r}")
        if self.devices is not None and (not self.devices or len(set(self.devices)) < len(self.devices)):
            raise ValueError(f"devices must be at least one, each named once, found {self.devices}")
        devices = len(self.devices or (None,))
        if type(self.model) is not int or self.model < 1 or devices % self.model:
            raise ValueError(f"model must be a whole number that divides the {devices} devices, found {self.model!r}")
        if self.model > 1 and (self.parallel == "pmap" or self.exact):
            raise ValueError("parameters split over devices (model > 1) go neither with pmap nor with exact")

    @property
    def shares(self) -> int:
        """The number of parts that a batch is split into."""
        return 1 if self.devices is None else len(self.devices) // self.model

    @property
    def platform(self) -> str:
        """ "cpu", "gpu" or "tpu"."""
        return jax.default_backend() if self.devices is None else self.devices[0].platform

    @property
    def mesh(self) -> Mesh:
        """The devices as a mesh of `DATA` and `MODEL`."""
        assert self.devices is not None
        return Mesh(np.array(self.devices).reshape(self.shares, self.model), (DATA, MODEL))

    def put(self, params: Params) -> Params:
        """Parameters to where the programs expect them."""
        return params if self.devices is None else jax.device_put(params, jax.tree.map(self.sharding, params))

    def sharding(self, leaf: Any) -> jax.sharding.Sharding:
        """Where a parameter lies: on every device whole, or along its last axis that `model` divides."""
        if self.devices is None:
            return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shape = np.shape(leaf)
        fitting = [axis for axis, length in enumerate(shape) if self.model > 1 and length % self.model == 0]
        axes = (MODEL if axis == max(fitting, default=None) else None for axis in range(len(shape)))
        return NamedSharding(self.mesh, PartitionSpec(*axes))


HERE = Placement()
"""The default device."""


def over(devices: Sequence[jax.Device], **options: Any) -> Placement:
    """A `Placement` on these devices; the default device alone needs no mesh."""
    return Placement(None if list(devices) == jax.local_devices()[:1] else tuple(devices), **options)


class Program(Protocol):
    """A compiled function, as `jax.jit` makes them."""

    def __call__(self, *arguments: Any) -> Any: ...

    def lower(self, *arguments: Any) -> jax.stages.Lowered:
        """For arguments of which shapes are enough (`jax.ShapeDtypeStruct`); nothing is computed."""


def spread(function: Callable[..., Any], in_axes: tuple[Any, ...], out_axes: Any, placement: Placement) -> Program:
    """`function` compiled for a placement, its pictures split over the devices.

    in_axes, out_axes: for each argument the axis along which pictures lie, None where all share it, or a tree of these
    (as for `jax.vmap`). The function must treat each picture by itself. A batch must divide over `placement.shares`.
    """
    function = written_for(placement.platform, function, kernels=placement.model == 1)
    options = None if placement.exact else compiler_options(placement.platform)  # `jax.pmap` takes none
    if placement.exact:
        function = _one_by_one(function, in_axes, out_axes)
    if placement.devices is None:
        here = jax.jit(function, compiler_options=options)
        return _program(here, here.lower, here)
    if placement.parallel == "pmap":
        return _pmapped(function, in_axes, out_axes, placement)
    mesh = placement.mesh
    specs = _map_axes(_spec, in_axes)
    program = jax.jit(
        jax.shard_map(
            function,
            mesh=mesh,
            in_specs=specs,
            out_specs=_map_axes(_spec, out_axes),
            axis_names={DATA} if placement.model > 1 else {DATA, MODEL},
            check_vma=False,
        ),
        compiler_options=options,
    )

    def call(*arguments: Any) -> Any:
        return program(*place(*arguments))

    def place(*arguments: Any) -> list[Any]:
        """Batches split over the mesh; what all pictures share stays where it is."""
        return [
            argument if axes is None else jax.device_put(argument, _shardings(mesh, spec, argument))
            for argument, axes, spec in zip(arguments, in_axes, specs, strict=True)
        ]

    def lower(*arguments: Any) -> Any:
        """As `jax.jit`'s: nothing is moved, and batches may be shapes alone."""
        shapes = [
            argument if axes is None else jax.tree.map(_shape, argument, _shardings(mesh, spec, argument))
            for argument, axes, spec in zip(arguments, in_axes, specs, strict=True)
        ]
        return program.lower(*shapes)

    return _program(call, lower, program)


def _program(call: Callable[..., Any], lower: Callable[..., Any], program: Any) -> Program:
    """A program that is run and lowered inside `numerics`, so that what is compiled ahead is what runs. program: the
    jitted function itself.
    """
    pinned_call = pinned(call)
    pinned_call.lower, pinned_call.program = pinned(lower), program  # type: ignore[attr-defined]
    return cast(Program, pinned_call)


def _shape(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _is_axis(node: Any) -> bool:
    return node is None or isinstance(node, int)


def _map_axes(function: Callable[[Any], Any], axes: Any) -> Any:
    return jax.tree.map(function, axes, is_leaf=_is_axis)


def _spec(axis: int | None) -> PartitionSpec:
    return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, DATA)


def _shardings(mesh: Mesh, specs: Any, tree: Any) -> Any:
    """`specs`, a tree that is a prefix of `tree`, as shardings of all its leaves."""
    return jax.tree.map(
        lambda spec, part: jax.tree.map(lambda _: NamedSharding(mesh, spec), part),
        specs,
        tree,
        is_leaf=lambda node: isinstance(node, PartitionSpec),
    )


def _along(function: Callable[[Any, int], Any], axes: Any, tree: Any) -> Any:
    """function(leaf, axis) of the leaves of `tree` that have an axis of pictures; `axes` is a prefix of it."""
    return jax.tree.map(
        lambda axis, part: part if axis is None else jax.tree.map(lambda leaf: function(leaf, axis), part),
        axes,
        tree,
        is_leaf=_is_axis,
    )


def _one_by_one(function: Callable[..., Any], in_axes: tuple[Any, ...], out_axes: Any) -> Callable[..., Any]:
    """The same function, which sees a single picture at a time, in a loop that is compiled alike for any number.

    A loop over one picture would be taken apart, and its inside fused with what lies around it: so there are always
    two, and how many of them are made is hidden from the compiler.
    """

    @wraps(function)
    def call(*arguments: Any) -> Any:
        lengths: list[int] = []
        _along(lambda leaf, axis: lengths.append(leaf.shape[axis]), in_axes, arguments)
        count = lengths[0]
        if count == 1:
            arguments = _along(lambda leaf, axis: jnp.concatenate([leaf, leaf], axis), in_axes, arguments)

        def one(index: Any) -> Any:
            sliced = _along(lambda leaf, axis: lax.dynamic_slice_in_dim(leaf, index, 1, axis), in_axes, arguments)
            return function(*sliced)

        def put(index: Any, every: Any) -> Any:
            return jax.tree.map(lambda rows, row: rows.at[index].set(row), every, one(index))

        shapes = jax.eval_shape(one, jnp.int32(0))
        empty = jax.tree.map(lambda leaf: jnp.zeros((max(count, 2), *leaf.shape), leaf.dtype), shapes)
        every = lax.fori_loop(0, lax.optimization_barrier(jnp.int32(count)), put, empty)  # leaves [b, ...1...]
        made = jax.tree.map(lambda leaf: leaf[:count], every)
        return _along(lambda leaf, axis: jnp.moveaxis(jnp.squeeze(leaf, axis + 1), 0, axis), out_axes, made)

    return call


def _pmapped(function: Callable[..., Any], in_axes: tuple[Any, ...], out_axes: Any, placement: Placement) -> Program:
    """The same function by `jax.pmap`: pictures as [devices, pictures of each] while it runs."""
    shares = placement.shares
    program = jax.pmap(function, in_axes=in_axes, out_axes=out_axes, devices=placement.devices)

    def split(leaf: Any, axis: int) -> Any:
        leaf = jnp.asarray(leaf)
        return leaf.reshape(*leaf.shape[:axis], shares, leaf.shape[axis] // shares, *leaf.shape[axis + 1 :])

    def call(*arguments: Any) -> Any:
        result = program(*_along(split, in_axes, arguments))
        return _along(lambda leaf, axis: jax.lax.collapse(leaf, axis, axis + 2), out_axes, result)

    def lower(*arguments: Any) -> Any:
        return program.lower(*jax.eval_shape(lambda *leaves: _along(split, in_axes, leaves), *arguments))

    return _program(call, lower, program)
