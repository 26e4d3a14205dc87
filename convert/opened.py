"""Any model, in whatever format, as parameters that are read when they are asked for: our own checkpoints as well."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from convert.files.source import CheckpointError
from convert.names import Part
from convert.read import WRITTEN_AS, Converted, Progress, lazy, lazy_part
from convert.report import Report
from sdjax.config import ModelConfig
from sdjax.storage import checkpoint
from sdjax.types import Params

Keys = tuple[str, ...]
TOGETHER = 2**25  # bytes of a checkpoint of ours that are read together at least


@contextmanager
def opened(
    path: str | Path,
    *,
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
    ema: str = "auto",
    prediction: str | None = None,
    config: ModelConfig | None = None,
    ignore: Sequence[str] = (),
    progress: Progress | None = None,
    report: Report | None = None,
) -> Iterator[Converted]:
    """As `convert.lazy` with dtype "keep", and of checkpoints of ours too: as a model, and as vae and text_encoder.

    Of a model of ours, which says everything, ema, prediction and config are not looked at.

    Raises as `convert.read`.
    """
    report = Report(str(path), "") if report is None else report
    parts: dict[Part, str | Path | None] = {"text": text_encoder, "vae": vae}
    ours = checkpoint.is_checkpoint(path)
    later = {part: other for part, other in parts.items() if other and (ours or checkpoint.is_checkpoint(other))}
    with ExitStack() as stack:
        if ours:
            converted = _our_checkpoint(Path(path), report)
        else:
            now = {part: None if part in later else other for part, other in parts.items()}
            options = dict(vae=now["vae"], text_encoder=now["text"], ema=ema, prediction=prediction, config=config)
            converted = stack.enter_context(
                lazy(path, dtype="keep", ignore=ignore, progress=progress, report=report, **options)  # type: ignore[arg-type]
            )
        for part, other in later.items():
            converted = _with_part(converted, part, Path(other), ignore, stack)
        yield converted


def _with_part(converted: Converted, part: Part, other: Path, ignore: Sequence[str], stack: ExitStack) -> Converted:
    """The model with one part of another file, folder or checkpoint of ours."""
    report = converted.report
    if not checkpoint.is_checkpoint(other):
        reader = lazy_part(other, part, converted.config, dtype="keep", ignore=ignore, report=report)
        return _replaced(converted, part, stack.enter_context(reader))
    report.parts[part] = str(other)
    return _replaced(converted, part, _our_checkpoint(other, Report(str(other), "")))


def _replaced(converted: Converted, part: Part, given: Converted) -> Converted:
    """The model with a part of another one.

    Raises:
        CheckpointError: the part has other shapes, or does not go with the rest.
    """
    field = "text" if part == "text" else "vae"
    path = given.report.parts.get(part, given.report.source)
    try:
        config = dataclasses.replace(converted.config, **{field: getattr(given.config, field)})
    except ValueError as error:
        raise CheckpointError(f"{path}: {WRITTEN_AS[part]} does not go with the rest of the model ({error})") from None
    return dataclasses.replace(converted, config=config, params={**converted.params, part: given.params[part]})


def _our_checkpoint(path: Path, report: Report) -> Converted:
    """A checkpoint of ours; raises as `sdjax.storage.checkpoint.restore`."""
    path = path.absolute()
    stored, config = checkpoint.metadata(path), checkpoint.read_config(path)
    report.format, report.model = "sdjax", config.name
    report.parts = {part: str(path) for part in stored}
    tokenizer = path / "tokenizer"
    if (path / checkpoint.TENSORS).is_file():
        params = checkpoint.later_tensors(path / checkpoint.TENSORS)
    else:
        params = _read_later(path, stored)
    return Converted(config, params, report, tokenizer if tokenizer.is_dir() else None)


def _read_later(path: Path, stored: Params) -> Params:
    """`stored`, the names and shapes, with leaves that `np.asarray` reads."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(stored)
    group, size = _Group(path, stored), 0
    later = []
    for keys, leaf in leaves:
        if size >= TOGETHER:
            group, size = _Group(path, stored), 0
        at = tuple(key.key for key in keys)
        group.paths.append(at)
        later.append(_Later(group, at, tuple(leaf.shape), np.dtype(leaf.dtype)))
        size += math.prod(leaf.shape) * leaf.dtype.itemsize
    return jax.tree.unflatten(tree, later)


@dataclass(eq=False)
class _Group:
    """Parameters of a checkpoint of ours that are read together: to open it for each takes longer than to read it."""

    folder: Path
    stored: Params
    paths: list[Keys] = field(default_factory=list)
    held: dict[Keys, np.ndarray] = field(default_factory=dict)
    lock: Any = field(default_factory=threading.Lock)

    def take(self, path: Keys) -> np.ndarray:
        """One of them; the others are held until they are taken."""
        with self.lock:
            if path not in self.held:
                self.held = self.read()
            return self.held.pop(path)

    def read(self) -> dict[Keys, np.ndarray]:
        from orbax.checkpoint import v1 as ocp  # 0.3 s to import

        def wanted(keys: Any, leaf: Any) -> Any:
            return leaf if tuple(key.key for key in keys) in self.paths else ocp.PLACEHOLDER

        try:
            tree = ocp.load(self.folder / "params", jax.tree_util.tree_map_with_path(wanted, self.stored))
        except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"{self.folder}: the parameters cannot be read ({reason}); copy it again") from None
        found = {}
        for path in self.paths:
            leaf = tree
            for key in path:
                leaf = leaf[key]
            found[path] = np.asarray(leaf)
        return found


@dataclass(frozen=True, eq=False)
class _Later:
    """A parameter of a checkpoint of ours that `np.asarray` reads."""

    group: _Group
    path: Keys
    shape: tuple[int, ...]
    dtype: np.dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.group.take(self.path).astype(dtype or self.dtype, copy=False)
