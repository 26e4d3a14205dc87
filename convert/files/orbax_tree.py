"""Reading a tree of arrays that another program wrote with Orbax: Orbax says what is there, TensorStore reads it.

An array is stored under its keys, joined by dots, in Zarr's format: in a database of TensorStore's (manifest.ocdbt), or
in a folder of its own. Asking Orbax for one array after another takes some 70 ms for each of them.

Names and layouts of Flax' networks are given as PyTorch's files have them, see `convert.files.flax_msgpack`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from convert.files.flax_msgpack import FLAX_DTYPES, kernel_order, torch_name
from convert.files.source import DTYPES, MAX_TENSORS, CheckpointError, Source, TensorInfo, check_name
from sdjax.storage.checkpoint import refuse_links

MARKS = ("_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt")
"""Files by which a folder of Orbax is known."""


def is_orbax(folder: Path) -> bool:
    """Whether Orbax wrote this folder, or the numbered steps within it."""
    inside = [child for child in folder.iterdir() if child.name.isdigit() and child.is_dir()]
    return any((place / mark).is_file() for place in (folder, *inside) for mark in MARKS)


def open_orbax(folder: Path) -> Source:
    """Opens a tree of arrays, or the `params` of a training's state, where what else it holds is named as skipped.

    Raises:
        CheckpointError: it is damaged, or holds symbolic links, which could read files elsewhere.
    """
    try:
        refuse_links(folder)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    import orbax.checkpoint as ocp  # 0.3 s

    try:
        found: Any = ocp.PyTreeCheckpointHandler().metadata(folder.absolute())
        tree, zarr3 = found.tree, bool(found.use_zarr3)
    except Exception as error:  # Orbax and tensorstore raise almost anything on damaged files
        raise _damaged(folder, error) from None
    skipped: dict[str, str] = {}
    prefix: tuple[str, ...] = ()
    if isinstance(tree, dict) and "params" in tree:
        skipped = {str(name): "training state" for name in tree if name != "params"}
        prefix, tree = ("params",), tree["params"]
    tensors: dict[str, TensorInfo] = {}
    keys: dict[str, tuple[str, ...]] = {}
    for path, leaf in _leaves(tree):
        dtype, shape = getattr(leaf, "dtype", None), getattr(leaf, "shape", None)
        name = torch_name(path)
        check_name(folder, name)
        if dtype is None or shape is None:
            skipped[name] = type(leaf).__name__
            continue
        if name in tensors:
            raise CheckpointError(f"{folder}: two tensors are called {name[:60]!a}")
        order = kernel_order(path[-1], len(shape))
        named = np.dtype(dtype).name
        tensors[name] = TensorInfo(
            FLAX_DTYPES.get(named, named), tuple(shape[axis] for axis in order or range(len(shape)))
        )
        keys[name] = path
    if not 0 < len(tensors) <= MAX_TENSORS:
        raise CheckpointError(f"{folder}: {len(tensors)} tensors; expected 1 to {MAX_TENSORS}")
    unusable = {
        name: f"has the dtype {info.dtype}, which is not supported"
        for name, info in tensors.items()
        if info.dtype not in DTYPES
    }
    stored = partial(_stored, folder.absolute(), "zarr3" if zarr3 else "zarr")

    def read(name: str) -> np.ndarray:
        path = keys[name]
        try:
            array = stored(".".join((*prefix, *path)))
        except Exception as error:
            raise _damaged(folder, error) from None
        order = kernel_order(path[-1], array.ndim)
        array = array if order is None else array.transpose(order)
        if array.shape != tensors[name].shape or array.dtype != DTYPES[tensors[name].dtype]:
            raise CheckpointError(f"{folder}: {name} is not what the folder's metadata say; copy the folder again")
        return array

    return Source(folder, "orbax", tensors, read, lambda: None, skipped, unusable=unusable)


def _stored(folder: Path, driver: str, name: str) -> np.ndarray:
    """An array of a folder as it is stored. driver: "zarr" or "zarr3"."""
    import tensorstore

    place: dict[str, Any] = {"driver": "file", "path": f"{folder / name}/"}
    if (folder / "manifest.ocdbt").is_file():
        place = {"driver": "ocdbt", "base": f"file://{quote(str(folder))}/", "path": f"{name}/"}
    spec = {"driver": driver, "kvstore": place}
    return np.asarray(tensorstore.open(spec, read=True, open=True).result().read().result())


def _leaves(tree: Any, at: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    if not isinstance(tree, dict):
        return [(at, tree)] if at else []
    return [leaf for key, value in tree.items() for leaf in _leaves(value, (*at, str(key)))]


def _damaged(folder: Path, error: Exception) -> CheckpointError:
    reason = ascii(" ".join(str(error).split())[:200])[1:-1]
    return CheckpointError(f"{folder}: Orbax cannot read it ({type(error).__name__}: {reason}); copy the folder again")
