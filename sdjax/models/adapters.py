"""Adapters (LoRA and its relatives) on a model: merged into its parameters, or live beside them.

Merged: W' = W + sum_i s_i D_i, each D_i from the untouched W (`merged`); the shapes stay, so nothing is compiled, and
no step costs more. Live, for those of low rank: y = W x + up (gate * (down x)) for every `Dense` and `Conv` that an
adapter is for (Hu et al. 2021, eq. 3), with gates of its own for every picture of a batch (`live`): no model file knows
of it. The ranks of all adapters stand side by side in one pair (down, up); a picture's gate is its weight of each rank,
0 for adapters that are not its own, and what is gated by 0 adds exactly 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sdjax.config import ModelConfig
from sdjax.models.adapter_forms import Path, Update
from sdjax.models.layers import Conv, Dense
from sdjax.models.params import abstract_params
from sdjax.types import Array, Params


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter, read.

    name: of its file, without ending.
    updates: by the kernel (or norm scale) that each changes.
    embeddings: learnt words that the file brings with it, f32[n, d] by their triggers.
    metadata: of the file.
    notes: what to tell of it.
    source: the file.
    """

    name: str
    updates: Mapping[Path, Update]
    embeddings: Mapping[str, np.ndarray] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    source: FilePath | None = None


class Strength(NamedTuple):
    """How strongly an adapter acts: on the UNet, on the text encoder, and on each block (None: all alike).

    blocks: numbers for the text encoder, then for the blocks on the way in, the middle, and out: all of them, or those
        with transformers alone (of Stable Diffusion 1: 26 or 17).
    """

    unet: float
    text: float
    blocks: tuple[float, ...] | None = None


Wanted = Sequence[tuple[Adapter, Strength]]

Change = tuple[Update, Strength, bool]
"""An update with its strength, and whether it is that of the bias."""


# Strengths


@lru_cache(maxsize=16)
def block_names(config: ModelConfig) -> dict[tuple[str, ...], str]:
    """The UNet's modules at the first two levels of its tree -> their block, as "IN04", "M00" or "OUT11"."""
    unet, found = config.unet, dict[tuple[str, ...], str]()
    found[("conv_in",)], index = "IN00", 1
    last = len(unet.channels) - 1
    for i in range(last + 1):
        for j in range(unet.level_res_blocks[i]):
            for kind in ("res", "attention"):
                found[f"down_{i}", f"{kind}_{j}"] = f"IN{index:02}"
            index += 1
        if i < last:
            found[f"down_{i}", "downsample"] = f"IN{index:02}"
            index += 1
    found[("mid",)], index = "M00", 0
    for i in range(last + 1):
        for j in range(unet.level_res_blocks[last - i] + 1):
            for kind in ("res", "attention"):
                found[f"up_{i}", f"{kind}_{j}"] = f"OUT{index:02}"
            index += 1
        found[f"up_{i}", "upsample"] = f"OUT{index - 1:02}"
    found[("norm_out",)] = found[("conv_out",)] = f"OUT{index - 1:02}"
    return found


@lru_cache(maxsize=16)
def block_orders(config: ModelConfig) -> tuple[tuple[str, ...], ...]:
    """The orders that numbers for blocks may come in: all blocks, and those with transformers alone."""
    unet, names = config.unet, block_names(config)
    every = tuple(dict.fromkeys(names.values()))
    ways = (("down", unet.down_transformers), ("up", unet.up_transformers))
    with_layers = {f"{way}_{i}" for way, layers in ways for i, count in enumerate(layers) if count}
    with_layers |= {"mid"} if unet.middle_transformers else set()
    some = {
        block
        for (first, *inner), block in names.items()
        if first in with_layers and not set(inner) & {"downsample", "upsample"}
    }
    return every, tuple(block for block in every if block in some)


def strength_at(strength: Strength, path: Path, config: ModelConfig) -> float:
    """How strongly an adapter acts on the parameters below a path of the tree.

    Raises:
        ValueError: the number of blocks is none that the model has.
    """
    own = strength.text if path[0] == "text" else strength.unet
    if strength.blocks is None:
        return own
    orders = block_orders(config)
    order = next((order for order in orders if len(strength.blocks) == 1 + len(order)), None)
    if order is None:
        expected = " or ".join(str(1 + len(order)) for order in dict.fromkeys(orders))
        raise ValueError(
            f"{len(strength.blocks)} block weights; expected {expected}: the text encoder's, then those of "
            f"{', '.join(orders[0])}"
        )
    names = block_names(config)
    block = None if path[0] == "text" else names.get(path[1:3]) or names.get(path[1:2])
    if block is None:
        return own * strength.blocks[0]
    return own * dict(zip(order, strength.blocks[1:], strict=True)).get(block, 0.0)


# Merged


def touched(wanted: Wanted) -> dict[Path, list[Change]]:
    """The leaves that adapters change -> by what."""
    found: dict[Path, list[Change]] = {}
    for adapter, strength in wanted:
        for update in adapter.updates.values():
            if update.form != "full" or "diff" in update.tensors:
                found.setdefault(update.kernel, []).append((update, strength, False))
            if update.bias is not None and update.change_of_bias() is not None:
                found.setdefault(update.bias, []).append((update, strength, True))
    return found


def changed_leaf(leaf: np.ndarray, changes: Sequence[Change], config: ModelConfig, dtype: Any = None) -> np.ndarray:
    """A leaf with what adapters change of it (`touched`), worked out in float32 and rounded once.

    dtype: to round to; None: the leaf's own.
    """
    before = np.asarray(leaf, np.float32)
    after = before.copy()
    for update, strength, is_bias in changes:
        s = np.float32(strength_at(strength, update.kernel, config))
        if s:
            change = update.change_of_bias() if is_bias else update.change_in_our_layout(before)
            assert change is not None
            after += s * change.reshape(after.shape)
    return after.astype(leaf.dtype if dtype is None else dtype)


def merged(params: Params, wanted: Wanted, config: ModelConfig) -> Params:
    """The parameters with adapters in them; leaves that none changes are shared with `params`."""
    changes = touched(wanted)

    def change(path: Any, leaf: Any) -> Any:
        of_leaf = changes.get(tuple(key.key for key in path))
        if of_leaf is None:
            return leaf
        new = changed_leaf(np.asarray(leaf), of_leaf, config)
        if not isinstance(leaf, jax.Array):
            return new
        return jax.device_put(new, leaf.sharding) if leaf.committed else jnp.asarray(new)

    return jax.tree_util.tree_map_with_path(change, params)


# Live


LiveFactors = dict[str, dict[str, tuple[Any, Any]]]
"""{"unet", "text"}: module, "down_0/attention_0/proj_in" -> down f[..., in, R] as the kernel has it, up f[R, out]."""


@lru_cache(maxsize=16)
def sections(config: ModelConfig) -> dict[tuple[str, ...], int]:
    """The parts of a model that an adapter may have a weight of its own for -> their places along a gate's second axis.

    ("text",), and of the UNet what stands at the first two levels of its tree: ("unet", "down_0", "attention_1"), ...
    """
    found: dict[tuple[str, ...], int] = {("text",): 0}
    for name, inside in abstract_params(config)["unet"].items():
        for inner, leaf in inside.items():
            found.setdefault(("unet", name, inner) if isinstance(leaf, dict) else ("unet", name), len(found))
    return found


def section_of(config: ModelConfig, part: str, module: tuple[str, ...]) -> int:
    """Where the gates of a module are. module: its path in the tree of the part."""
    known = sections(config)
    return 0 if part == "text" else known.get(("unet", *module[:2]), known.get(("unet", module[0]), -1))


NO_GATES = np.zeros((1, 0), np.float32)
"""The gates of a picture without live adapters."""


@contextmanager
def live(
    factors: LiveFactors | None, gates: Array | None, config: ModelConfig, part: str, *, by_picture: bool = True
) -> Iterator[None]:
    """Within it modules of linen that are applied have the adapters beside them.

    factors: or None, for none.
    gates: f[b, sections, R], of b pictures.
    part: "text" or "unet", whose modules are applied.
    by_picture: where a module sees k b rows, whether those of one picture stand together; else all pictures' first rows
        are followed by all pictures' second ones.
    """
    own = (factors or {}).get(part)
    if not own or gates is None:
        yield
        return
    sections(config)  # which applies modules itself when it is first called: not within the interceptor

    def beside(call: Callable[..., Any], arguments: Any, named: Any, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        y = call(*arguments, **named)
        path = "/".join(module.path)
        if context.method_name != "__call__" or path not in own or not isinstance(module, Dense | Conv):
            return y
        (x,), (down, up) = arguments, own[path]
        gate = gates[:, section_of(config, part, module.path)].astype(down.dtype)
        repeats = x.shape[0] // gate.shape[0]
        gate = jnp.repeat(gate, repeats, axis=0) if by_picture else jnp.tile(gate, (repeats, 1))
        gate = gate.reshape(gate.shape[0], *[1] * (x.ndim - 2), gate.shape[-1])
        x = x.astype(down.dtype)
        inner = module.by_convolution(x, down) if isinstance(module, Conv) else jnp.dot(x, down)
        return y + jnp.dot(inner * gate, up).astype(y.dtype)

    with nn.intercept_methods(beside):
        yield
