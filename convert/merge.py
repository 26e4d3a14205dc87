"""The algebra of checkpoints: a weighted sum of two models, or what was learnt between two of them added to a third.

    weighted-sum      (1 - m) A + m B
    add-difference    A + m (B - C)
    train-difference  A + 1.8 m s (B - C),  s = |B - A| / (|B - C| + |B - A|), number by number, 0 where both are 0

The last is the calculation "trainDifference" of SuperMerger (github.com/hako-mikan/sd-webui-supermerger: the formula is
in scripts/mergers/mergers.py, its use in calcmode_en.md): where A is near B already, little is added, as in training,
which slows down near its goal.

The weight m may differ from block to block of the UNet (`BLOCKS`). Every model is read tensor by tensor, as
`convert.opened` gives it; what is yielded has parameters that are computed when `np.asarray` asks for them, in float32,
and rounded once, so that no more than a few tensors are ever in memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert import command
from convert.diffusers import without_unused_layers
from convert.files.source import CheckpointError
from convert.names import PARTS, Entry, Part, spelled
from convert.opened import opened
from convert.read import Converted, Progress
from convert.report import Report
from convert.tensors import Laid, Leaf
from convert.write import laid_out
from sdjax.config import ModelConfig
from sdjax.models.params import DTYPES, abstract_params, dtype_of
from sdjax.storage import checkpoint
from sdjax.types import Params

BLOCKS = (*(f"IN{i:02}" for i in range(12)), "M00", *(f"OUT{i:02}" for i in range(12)))
"""The blocks of a UNet that weights are given for, in the order that people give them in; BASE may come before them,
for the text encoder and the autoencoder. The embedding of timesteps goes with IN00, the output with OUT11.
"""

SLICE = 2**18  # numbers that are computed together: they stay in the processor's cache
WORKERS = min(8, os.cpu_count() or 1)
INPAINTING = "an inpainting model can only be A, in add-difference and train-difference"
NO_NUMBERS = ("text.pad_token", "text.end_token", "unet.linear_projection")
"""Entries of a configuration that may differ: no parameter means something else by them."""

Formula = Callable[..., np.ndarray]


def weighted_sum(m: float, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Between A and B."""
    return a * (1 - m) + b * m


def add_difference(m: float, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """A with what B has more than C."""
    return a - abs(m) * _backwards(m, b, c)


def train_difference(m: float, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """A with what it lacks of that."""
    learnt, lacking = np.abs(b - c), np.abs(b - a)
    total = learnt + lacking
    scale = np.divide(lacking, total, out=np.zeros_like(total), where=total != 0)
    return a - abs(1.8 * m) * scale * _backwards(m, b, c)


def _backwards(m: float, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """What is to be subtracted: where b = c it is +0, which leaves every bit of a, the sign of a zero too."""
    return c - b if m > 0 else b - c


FORMULAS: dict[str, tuple[Formula, int]] = {
    "weighted-sum": (weighted_sum, 2),
    "add-difference": (add_difference, 3),
    "train-difference": (train_difference, 3),
}
"""By name: the function of m and of as many models as the number says."""


@dataclass(frozen=True)
class Recipe:
    """What is done with the models: the name of a formula, m of each of `BLOCKS`, and m of everything else.

    Raises:
        ValueError: no such formula, or weights that it cannot have.
    """

    formula: str = "weighted-sum"
    base: float = 0.5
    blocks: tuple[float, ...] = (0.5,) * len(BLOCKS)

    def __post_init__(self) -> None:
        if self.formula not in FORMULAS:
            raise ValueError(f"unknown formula {self.formula!r}; expected one of {', '.join(FORMULAS)}")
        for name, m in zip(("BASE", *BLOCKS), (self.base, *self.blocks), strict=True):
            if not math.isfinite(m):
                raise ValueError(f"the weight {m} of {name} is not finite; expected numbers such as 0.5")
            if self.formula == "weighted-sum" and not 0 <= m <= 1:
                raise ValueError(f"the weight {m} of {name} lies outside [0, 1], where a weighted sum has its weights")

    def weight(self, config: ModelConfig, part: Part, path: tuple[str, ...]) -> float:
        """m of one parameter."""
        if part != "unet" or set(self.blocks) == {self.base}:
            return self.base
        return self.blocks[block_of(spelled(config, "unet", True)[path])]


def recipe_of(formula: str, weight: float | None = None, blocks: Sequence[float] | None = None) -> Recipe:
    """The recipe that people write.

    weight: m; if it is not given, 0.5 in a weighted sum, 1 before a difference. blocks: m of each of `BLOCKS` (`weight`
    is then that of the text encoder and the autoencoder alone), or of BASE, which is the same, and each of `BLOCKS`.

    Raises:
        ValueError: no such formula, or weights that it cannot have.
    """
    base = weight if weight is not None else 0.5 if formula == "weighted-sum" else 1.0
    if blocks is None:
        return Recipe(formula, base, (base,) * len(BLOCKS))
    if len(blocks) not in (len(BLOCKS), len(BLOCKS) + 1):
        raise ValueError(
            f"{len(blocks)} block weights; expected {len(BLOCKS)} (IN00 to IN11, M00, OUT00 to OUT11), "
            f"or {len(BLOCKS) + 1} with BASE before them"
        )
    if len(blocks) > len(BLOCKS):
        if weight is not None:
            raise ValueError(f"the first of {len(blocks)} block weights, BASE, is the weight; leave one of the two out")
        base, *blocks = blocks
    return Recipe(formula, base, tuple(blocks))


def block_of(name: str) -> int:
    """Which of `BLOCKS` a tensor of the UNet belongs to. name: the original one, "input_blocks.1.0.in_layers.0.weight".

    Raises:
        ValueError: the UNet has more blocks than that.
    """
    first, number, *_ = name.split(".")
    block = {
        "time_embed": "IN00",
        "input_blocks": f"IN{number:0>2}",
        "middle_block": "M00",
        "output_blocks": f"OUT{number:0>2}",
        "out": "OUT11",
    }[first]
    if block not in BLOCKS:
        raise ValueError(f"the UNet has a block {block}, for which there is no weight; leave the block weights out")
    return BLOCKS.index(block)


@contextmanager
def merged(
    models: Sequence[str | Path],
    recipe: Recipe,
    *,
    dtype: str = "float32",
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
    ema: str = "auto",
    prediction: str | None = None,
    config: ModelConfig | None = None,
    ignore: Sequence[str] = (),
    progress: Progress | None = None,
    reports: Sequence[Report] | None = None,
) -> Iterator[Converted]:
    """What the recipe makes of two or three models, computed parameter by parameter inside the `with` block.

    models: A, B and C where the formula has it, each of any format. dtype: "float32", "bfloat16" or "float16", where
    the autoencoder stays in float32, or "keep" for those of A. vae, text_encoder: what to take these parts from, as
    they are. The others are options of `convert.read` for every model that is no checkpoint of ours. reports: one for
    each model, filled while it is read.

    The models must be of one architecture. To an inpainting model A, which has more input channels, a difference of
    models without them may be added; those channels stay as they are.

    Raises as `convert.read`, and:
        ValueError: the models or the recipe do not fit together. CheckpointError, when a parameter is asked for: it
        would be NaN or infinite.
    """
    if dtype not in (*DTYPES, "keep"):
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, keep, found {dtype!r}")
    _, count = FORMULAS[recipe.formula]
    if len(models) != count:
        raise ValueError(f"{recipe.formula} is of {count} models, {', '.join('ABC'[:count])}; found {len(models)}")
    reports = [Report(str(model), "") for model in models] if reports is None else reports
    options: Any = dict(
        ema=ema, prediction=prediction, config=config, ignore=ignore, vae=vae, text_encoder=text_encoder
    )
    bars = _together(progress, count)
    with ExitStack() as stack:
        found = [
            stack.enter_context(opened(model, progress=bar, report=report, **options))
            for model, bar, report in zip(models, bars, reports, strict=True)
        ]
        configs = [each.config for each in found]
        if len({each.clip for each in configs}) > 1:
            configs = [without_unused_layers(each) for each in configs]
        _check_alike(models, configs)
        given = {"vae": vae, "text": text_encoder, "unet": None}
        trees = [each.params for each in found]
        params: dict[str, Any] = {
            part: _part(part, configs[0], models, trees, None if given[part] else recipe, dtype) for part in PARTS
        }
        yield Converted(configs[0], params, found[0].report, found[0].tokenizer)


def _together(progress: Progress | None, count: int) -> list[Progress | None]:
    """What the readers of so many models call, for one bar over all of them."""
    if progress is None:
        return [None] * count
    told = [(0, 0)] * count

    def tell(at: int, done: int, total: int) -> None:
        told[at] = done, total
        progress(sum(done for done, _ in told), sum(total for _, total in told))

    return [partial(tell, at) for at in range(count)]


def _check_alike(models: Sequence[str | Path], configs: list[ModelConfig]) -> None:
    """Raises CheckpointError unless all models are of one architecture, but for the channels of an inpainting model."""
    first, *others = (_entries(config) for config in configs)
    channels = [config.unet.in_channels for config in configs]
    widened = len(models) == 3 and channels[0] > channels[1] == channels[2]
    for model, other in zip(models[1:], others, strict=True):
        for name, value in first.items():
            if other[name] == value or (widened and name == "unet.in_channels"):
                continue
            advice = f"; {INPAINTING}" if name == "unet.in_channels" else ""
            raise CheckpointError(
                f"{model}: {name} is {other[name]}, and {value} in {models[0]}; "
                f"models of one architecture can be merged{advice}"
            )


def _entries(config: ModelConfig) -> dict[str, Any]:
    """The entries of a configuration that say what the parameters are and mean."""
    owners: dict[str, Any] = {"text": config.clip, "vae": config.vae, "unet": config.unet, "schedule": config.schedule}
    return {
        f"{part}.{entry.name}": getattr(owner, entry.name)
        for part, owner in owners.items()
        for entry in dataclasses.fields(owner)
        if f"{part}.{entry.name}" not in NO_NUMBERS
    }


def _part(
    part: Part,
    config: ModelConfig,
    models: Sequence[str | Path],
    trees: list[Params],
    recipe: Recipe | None,
    dtype: str,
) -> Params:
    """The merged parameters of one part, or without a recipe those of A. trees: the parameters of the models."""
    expected, tree = jax.tree_util.tree_flatten_with_path(abstract_params(config)[part])
    found: dict[tuple[str, ...], Leaf] = {}
    for keys, _ in expected:
        path = tuple(key.key for key in keys)
        if path in found:
            continue
        leaf = _leaf(trees[0][part], path)
        entry = leaf.tensor.entry if isinstance(leaf, Leaf) else Entry("/".join(path), leaf.shape, "same", (path,))
        m = 0.0 if recipe is None else recipe.weight(config, part, path)
        formula: Formula
        if recipe is None or m == 0:
            used, formula = [0], _same
        elif recipe.formula == "weighted-sum" and m == 1:
            used, formula = [1], _same
        else:
            function, count = FORMULAS[recipe.formula]
            used, formula = list(range(count)), partial(function, m)
        operands = [(str(models[at]), [_leaf(trees[at][part], each) for each in entry.leaves]) for at in used]
        name = "/".join((part, *path))
        target = leaf.dtype if dtype == "keep" else jnp.dtype(dtype_of(part, dtype))
        found |= Merged(entry, name, formula, operands, target).leaves()
    return jax.tree.unflatten(tree, [found[tuple(key.key for key in keys)] for keys, _ in expected])


def _same(a: np.ndarray) -> np.ndarray:
    return a


def _leaf(tree: Params, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


@dataclass(eq=False)
class Merged(Laid):
    """A tensor that is computed of the same one of several models: its name, and each model with its parameters."""

    name: str
    formula: Formula
    operands: list[tuple[str, list[Any]]]
    dtype: np.dtype

    @property
    def target(self) -> np.dtype:
        """The dtype that the result is rounded to."""
        return self.dtype

    def array(self) -> np.ndarray:
        """The result, as the first model lays it out.

        Raises:
            CheckpointError: a number of it is NaN or infinite.
        """
        first, *others = (laid_out(_fitted(self.entry, leaves[0].shape), leaves) for _, leaves in self.operands)
        flat = [array.reshape(-1) for array in (first, *(_padded(other, first.shape) for other in others))]
        out, most = np.empty(first.size, self.dtype), float(jnp.finfo(self.dtype).max)

        def compute(begin: int) -> None:
            part = slice(begin, begin + SLICE)
            with np.errstate(all="ignore"):
                numbers = self.formula(*(array[part].astype(np.float32, copy=False) for array in flat))
                out[part] = numbers
                within = numbers.max() <= most and numbers.min() >= -most  # much faster than to look at every half
            if not within and not np.isfinite(out[part]).all():
                raise CheckpointError(self._why(flat, bool(np.isfinite(numbers).all())))

        with ThreadPoolExecutor(WORKERS) as pool:
            list(pool.map(compute, range(0, out.size, SLICE)))
        return out.reshape(self.entry.shape)

    def _why(self, arrays: list[np.ndarray], finite: bool) -> str:
        """Why the result is not finite. finite: whether it was in float32."""
        names = [getattr(getattr(leaves[0], "tensor", None), "name", self.name) for _, leaves in self.operands]
        for (model, _), name, array in zip(self.operands, names, arrays, strict=True):
            if not np.isfinite(array).all():
                return f"{model}: {name} holds NaN or infinite values, which cannot be merged"
        where = f"{self.operands[0][0]}: {names[0]}"
        if finite:
            return f"{where} becomes too large for {self.dtype}; merge to float32 or bfloat16"
        return f"{where} becomes infinite; choose smaller weights"


def _padded(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """With zeros for the input channels that it lacks, whose differences are 0."""
    if array.shape == shape:
        return array
    return np.pad(array, [(0, n - k) for n, k in zip(shape, array.shape, strict=True)])


def _fitted(entry: Entry, shape: tuple[int, ...]) -> Entry:
    """The entry with fewer input channels, if this is the shape of such a parameter."""
    if shape == entry.leaf_shape:
        return entry
    h, w, i, o = shape
    return dataclasses.replace(entry, shape=(o, i, h, w) if entry.layout == "conv" else shape)


def run(options: argparse.Namespace) -> None:
    """Merges as the options of `convert.__main__` say.

    Raises:
        ValueError, OSError: it could not be done; nothing is left under the name of the destination.
    """
    blocks = None if options.blocks is None else [_number(text) for text in re.split(r"[\s,]+", options.blocks.strip())]
    recipe = recipe_of(options.formula, None if options.weight is None else _number(options.weight), blocks)
    models = [model for model in (options.a, options.b, options.c) if model is not None]
    command.check_destination(options, models)
    if all(checkpoint.is_checkpoint(model) for model in models):
        command.refuse_useless(options, models[0], ("ema", "prediction", "config"))
    reports = [Report(model, "") for model in models]
    given = command.foreign_options(options)
    with (
        command.progress_bar("merging") as bar,
        merged(models, recipe, dtype=options.dtype, progress=bar, reports=reports, **given) as converted,
    ):
        notes = command.write(options, converted, {"sd_merge_recipe": _recorded(recipe, models, options)})
    notes += [f"{report.source}: {note}" for report in reports for note in report.notes]
    command.tell(options, converted.config, notes)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"the weight {text!r} is no number") from None


def _recorded(recipe: Recipe, models: list[str], options: argparse.Namespace) -> str:
    """What was merged of what, for the file's metadata; under the name where other programs have it."""
    names = {letter: Path(model).name for letter, model in zip("ABC", models, strict=False)}
    swapped = {name: Path(other).name for name in ("vae", "text_encoder") if (other := getattr(options, name))}
    blocks = dict(zip(("BASE", *BLOCKS), (recipe.base, *recipe.blocks), strict=True))
    weight = {"weight": recipe.base} if set(recipe.blocks) == {recipe.base} else {"blocks": blocks}
    return json.dumps({"type": "sdjax", "formula": recipe.formula, **weight, "models": names, **swapped})
