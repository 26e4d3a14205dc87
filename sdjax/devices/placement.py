"""Pictures over devices: which devices there are, and functions of a batch run in parallel on them.

No picture needs another one, so devices have nothing to tell each other: each runs the function as if it were alone, on
its part of the batch (`jax.shard_map`, or `jax.pmap`), and the compiled program holds no collective. Parameters are
stored whole on every device; with `model_parallel` > 1 each is split over that many devices, and then the compiler puts
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

from sdjax.devices.compilation import Ahead, Kept, identity_of
from sdjax.devices.platform import compiler_options, pinned, written_for
from sdjax.types import Params

DATA, MODEL = "data", "model"
"""Axes of the mesh: pictures are split over the first, parameters over the second."""


@dataclass(frozen=True)
class Placement:
    """The devices that pictures are made on, and how the work is divided between them. Hashable.

    devices: those to use, or None for the default device.
    parallel: "jit" (`jax.shard_map` inside) or "pmap".
    model_parallel: number of devices that each parameter is split over, for models that do not fit on one; a divisor of
        the number of devices.
    batch_invariant: one picture at a time on every device. Compilers choose other kernels, which round differently, for
        other batch sizes: with it the bits of a picture never depend on what it is made with, without it they agree to
        about 1e-5.

    Raises:
        ValueError: a field is out of range; the message names it.
    """

    devices: tuple[jax.Device, ...] | None = None
    parallel: Literal["jit", "pmap"] = "jit"
    model_parallel: int = 1
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        if self.parallel not in ("jit", "pmap"):
            raise ValueError(f"parallel must be jit or pmap, found {self.parallel!r}")
        if self.devices is not None and (not self.devices or len(set(self.devices)) < len(self.devices)):
            raise ValueError(f"devices must be at least one, each named once, found {self.devices}")
        devices, split = len(self.devices or (None,)), self.model_parallel
        if type(split) is not int or split < 1 or devices % split:
            raise ValueError(
                f"model_parallel must be a whole number that divides the {devices} devices, found {split!r}"
            )
        if split > 1 and (self.parallel == "pmap" or self.batch_invariant):
            raise ValueError("parameters split over devices (model_parallel > 1) go neither with pmap nor with exact")

    @property
    def data_parallel(self) -> int:
        """The number of parts that a batch is divided into."""
        return 1 if self.devices is None else len(self.devices) // self.model_parallel

    @property
    def platform(self) -> str:
        """ "cpu", "gpu" or "tpu"."""
        return jax.default_backend() if self.devices is None else self.devices[0].platform

    @property
    def mesh(self) -> Mesh:
        """The devices as a mesh of `DATA` and `MODEL`."""
        assert self.devices is not None
        return Mesh(np.array(self.devices).reshape(self.data_parallel, self.model_parallel), (DATA, MODEL))

    def put(self, params: Params) -> Params:
        """Parameters to where the programs expect them."""
        return params if self.devices is None else jax.device_put(params, jax.tree.map(self.sharding, params))

    def sharding(self, leaf: Any) -> jax.sharding.Sharding:
        """Where a parameter is stored: whole on every device, or divided along its last axis that can be."""
        if self.devices is None:
            return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shape = np.shape(leaf)
        fitting = [
            axis for axis, length in enumerate(shape) if self.model_parallel > 1 and length % self.model_parallel == 0
        ]
        axes = (MODEL if axis == max(fitting, default=None) else None for axis in range(len(shape)))
        return NamedSharding(self.mesh, PartitionSpec(*axes))


HERE = Placement()
"""The default device."""


def placement_on(devices: Sequence[jax.Device], **options: Any) -> Placement:
    """A `Placement` on these devices; the default device alone needs no mesh."""
    return Placement(None if list(devices) == jax.local_devices()[:1] else tuple(devices), **options)


class Program(Protocol):
    """A compiled function, as `jax.jit` makes them."""

    def __call__(self, *arguments: Any) -> Any: ...

    def lower(self, *arguments: Any) -> jax.stages.Lowered:
        """For arguments of which shapes are enough (`jax.ShapeDtypeStruct`); nothing is computed."""

    def ahead(self, *arguments: Any) -> Ahead:
        """The same, to be made ready before it is called."""

    program: Any  # the jitted function itself


def parallelize(function: Callable[..., Any], per_picture: Sequence[bool], placement: Placement) -> Program:
    """The function, compiled to run on the devices of a placement.

    function: returns leaves f[b, ...], pictures along the first axis.
    per_picture: for each argument whether its leaves have pictures along the first axis, a whole number of them for
        each part of the batch; other arguments are shared by all.
    """
    inside = written_for(placement.platform, function, kernels=placement.model_parallel == 1)
    options = None if placement.batch_invariant else compiler_options(placement.platform)  # `jax.pmap` takes none
    said = _identity(function, f"parallelize {list(per_picture)} {options}", placement)
    if placement.batch_invariant:
        inside = _one_by_one(inside, per_picture)
    if placement.devices is None:
        return _placed(Kept(jax.jit(inside, compiler_options=options), said, None), per_picture, placement)
    if placement.parallel == "pmap":
        return _pmapped(inside, per_picture, placement)
    specs = tuple(PartitionSpec(DATA) if divided else PartitionSpec() for divided in per_picture)
    mapped = jax.shard_map(
        inside,
        mesh=placement.mesh,
        in_specs=specs,
        out_specs=PartitionSpec(DATA),
        axis_names={DATA} if placement.model_parallel > 1 else {DATA, MODEL},
        check_vma=False,
    )
    return _placed(Kept(jax.jit(mapped, compiler_options=options), said, placement.devices), per_picture, placement)


def jitted(function: Callable[..., Any], placement: Placement) -> Program:
    """The function, compiled for a single picture: it runs where its arguments are."""
    inside = written_for(placement.platform, function, kernels=placement.devices is None)
    options = compiler_options(placement.platform)
    kept = Kept(
        jax.jit(inside, compiler_options=options),
        _identity(function, f"jitted {options}", placement),
        placement.devices,
    )
    return _program(kept, kept.ahead, kept.jitted)


def _identity(function: Callable[..., Any], how: str, placement: Placement) -> str | None:
    """What a program is and how it is placed, for processes to come; its devices are named elsewhere."""
    said = identity_of(function)
    fields = (placement.platform, placement.model_parallel, placement.batch_invariant)
    return said and f"{said} {how} {fields} {placement.devices and len(placement.devices)}"


def _placed(kept: Kept, per_picture: Sequence[bool], placement: Placement) -> Program:
    """A jitted function whose per-picture arguments are put on the devices of a placement first, so that they are the
    same kind of argument wherever they come from: else jit would compile for each.
    """
    if placement.devices is None:
        where: jax.sharding.Sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    else:
        where = NamedSharding(placement.mesh, PartitionSpec(DATA))

    def put(leaf: Any) -> Any:
        there = isinstance(leaf, jax.Array) and leaf.committed and leaf.sharding == where
        return leaf if there else jax.device_put(leaf, where)

    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    def call(*arguments: Any) -> Any:
        return kept(*_per_picture(put, per_picture, arguments))

    def ahead(*arguments: Any) -> Ahead:
        return kept.ahead(*_per_picture(shape, per_picture, arguments))

    return _program(call, ahead, kept.jitted)


def _program(call: Callable[..., Any], ahead: Callable[..., Ahead], program: Any) -> Program:
    """A program that is run and lowered inside `numerics`, so that what is compiled ahead is what runs. program: the
    jitted function itself.
    """
    pinned_call = pinned(call)
    pinned_call.lower, pinned_call.program = lambda *arguments: ahead(*arguments)(), program  # type: ignore[attr-defined]
    pinned_call.ahead = pinned(ahead)  # type: ignore[attr-defined]
    return cast(Program, pinned_call)


def _per_picture(function: Callable[[Any], Any], per_picture: Sequence[bool], arguments: Sequence[Any]) -> list[Any]:
    """The arguments, with `function` applied to the leaves of those that have pictures along the first axis."""
    pairs = zip(per_picture, arguments, strict=True)
    return [jax.tree.map(function, argument) if divided else argument for divided, argument in pairs]


def _one_by_one(function: Callable[..., Any], per_picture: Sequence[bool]) -> Callable[..., Any]:
    """The same function in a loop over the pictures, so that it sees one at a time, however many there are.

    The loop has to be compiled alike for any number. A loop over one picture would be taken apart and fused with what
    is around it: so there are always two at least, and how many of them are made is hidden from the compiler.
    """

    @wraps(function)
    def call(*arguments: Any) -> Any:
        (count, *_) = (
            leaf.shape[0]
            for divided, argument in zip(per_picture, arguments, strict=True)
            if divided
            for leaf in jax.tree.leaves(argument)
        )
        if count == 1:
            arguments = tuple(_per_picture(lambda leaf: jnp.concatenate([leaf, leaf]), per_picture, arguments))

        def one(index: Any) -> Any:
            return function(
                *_per_picture(lambda leaf: lax.dynamic_slice_in_dim(leaf, index, 1), per_picture, arguments)
            )

        def put(index: Any, every: Any) -> Any:
            return jax.tree.map(lambda rows, row: rows.at[index].set(row[0]), every, one(index))

        shapes = jax.eval_shape(one, jnp.int32(0))
        empty = jax.tree.map(lambda leaf: jnp.zeros((max(count, 2), *leaf.shape[1:]), leaf.dtype), shapes)
        every = lax.fori_loop(0, lax.optimization_barrier(jnp.int32(count)), put, empty)
        return jax.tree.map(lambda leaf: leaf[:count], every)

    return call


def _pmapped(function: Callable[..., Any], per_picture: Sequence[bool], placement: Placement) -> Program:
    """The same function by `jax.pmap`: pictures as [devices, pictures of each] while it runs."""
    parts = placement.data_parallel
    in_axes = tuple(0 if divided else None for divided in per_picture)
    program = jax.pmap(function, in_axes=in_axes, devices=placement.devices)

    def split(leaf: Any) -> Any:
        if not np.size(leaf):  # comes back from pmap without its sharding
            return np.zeros((parts, leaf.shape[0] // parts, *leaf.shape[1:]), leaf.dtype)
        if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and leaf.sharding.is_fully_replicated:
            leaf = jax.device_get(leaf)  # was made where the parameters are, which pmap does not accept
        leaf = jnp.asarray(leaf)
        return leaf.reshape(parts, leaf.shape[0] // parts, *leaf.shape[1:])

    def call(*arguments: Any) -> Any:
        result = program(*_per_picture(split, per_picture, arguments))
        return jax.tree.map(lambda leaf: jax.lax.collapse(leaf, 0, 2), result)

    def ahead(*arguments: Any) -> Ahead:
        shapes = jax.eval_shape(lambda *leaves: _per_picture(split, per_picture, leaves), *arguments)
        return Ahead(program, shapes, shapes=lambda: jax.eval_shape(call, *arguments))

    return _program(call, ahead, program)
