"""Our own checkpoint: a folder with `config.json`, the parameters, and its tokenizer if any.

    model/config.json         `ModelConfig.to_json`
    model/params.safetensors  the leaves of {"text", "vae", "unet"} in one file (`write_tensors`); conversions write it
    model/params/             or this: one array for each leaf in Orbax' format, uncompressed
    model/tokenizer/          vocab.json and merges.txt, or tokenizer.json; absent: CLIP's own tokenizer
    model/seal                says that names and shapes were checked against config.json (`_seal`); may be absent

A checkpoint is written under a temporary name next to its final one and renamed when it is whole. The dtype policy is
that of `sdjax.models.params`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.config import ModelConfig
from sdjax.devices.placement import HERE
from sdjax.models.params import abstract_params, dtype_of
from sdjax.storage import tensors
from sdjax.storage.files import new_file, new_folder
from sdjax.types import Params

PIECE = 2**29  # bytes of parameters that are written together
TENSORS = "params.safetensors"
WORKERS = 2  # threads that read parameters, or lay them out
SEAL = "seal"
STORED = {np.dtype(np.float32), np.dtype(np.float16), np.dtype(jnp.bfloat16)}
LAYOUT = 1  # changes when the networks' parameters change their names or shapes; tests/test_models.py watches them
CONFIG_BOUND = 2**20  # bytes; a real config.json has 1.5 kB


def is_checkpoint(path: str | Path) -> bool:
    """Whether `path` is a folder laid out as above; what is in it is not looked at."""
    path = Path(path)
    return (path / "config.json").is_file() and ((path / "params").is_dir() or (path / TENSORS).is_file())


def save(
    path: str | Path,
    config: ModelConfig,
    params: Params,
    *,
    tokenizer: str | Path | None = None,
    one_file: bool = False,
    force: bool = False,
) -> None:
    """Writes a checkpoint.

    params: {"text", "vae", "unet"} of arrays. tokenizer: a folder to copy in, or None. one_file: the parameters as
    params.safetensors instead of Orbax' folder. A full-size model is written and read in half the time then, with half
    the memory (examples/benchmarks/conversion.py), but every array must be in this process.

    Leaves may also be anything with shape and dtype that `np.asarray` takes (`convert.lazy`): each is asked for once.

    Raises:
        FileExistsError: `path` is there and `force` is not given. ValueError: the tree is not that of `config`.
        OSError: it could not be written; nothing is left behind then.
    """
    path = Path(path).absolute()
    _check_tree(params, config, str(path))
    if not one_file:
        _refuse_odd_name(path)
    with new_folder(path, force) as folder:
        (folder / "config.json").write_text(config.to_json())
        (folder / SEAL).write_text(_seal(config, params))
        if tokenizer is not None:
            (folder / "tokenizer").mkdir()
            for file in sorted(Path(tokenizer).iterdir()):
                if file.is_file() and file.suffix in (".json", ".txt"):
                    shutil.copyfile(file, folder / "tokenizer" / file.name)
        if one_file:
            write_tensors(folder / TENSORS, params)
            return
        from orbax.checkpoint import v1 as ocp  # 0.3 s to import

        context = ocp.Context()
        context.array.saving.use_compression = False
        context.memory.deepcopy_host_arrays = False  # nobody changes them in the meantime
        with context:
            saved = None
            for piece in _pieces(params):
                arrays = [_array(leaf) for leaf in piece.values()]  # while the piece before is written
                if saved is not None:
                    saved.result()
                saved = ocp.partial.save_async(folder / "params", _nested(dict(zip(piece, arrays, strict=True))))
            if saved is not None:
                saved.result()
            ocp.partial.finalize(folder / "params")


def _pieces(params: Params) -> Iterator[dict[tuple[str, ...], Any]]:
    """The leaves by their paths, in groups of some `PIECE` bytes."""
    piece: dict[tuple[str, ...], Any] = {}
    size = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        piece[tuple(key.key for key in path)] = leaf
        size += math.prod(leaf.shape) * leaf.dtype.itemsize
        if size >= PIECE:
            yield piece
            piece, size = {}, 0
    if piece:
        yield piece


def _array(leaf: Any) -> Any:
    """Arrays as they are; anything else, such as a parameter still in its file, as a numpy array."""
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def _nested(leaves: dict[tuple[str, ...], Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def write_tensors(file: Path, params: Params, force: bool = False) -> None:
    """Writes a tree of arrays as one .safetensors file, names joined by "/". Raises as `save`."""
    flat = [
        tensors.Tensor(_name(path), np.dtype(leaf.dtype), np.shape(leaf), partial(np.asarray, leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ]
    with new_file(file, force) as temporary:
        tensors.write(temporary, tensors.sorted_by_dtype(flat), workers=WORKERS)


def read_tensors(file: Path) -> Params:
    """The tree that `write_tensors` wrote, as numpy arrays.

    Raises:
        ValueError: the file is damaged.
    """
    return jax.tree.map(np.asarray, later_tensors(file))


def later_tensors(file: Path) -> Params:
    """The tree that `write_tensors` wrote, with leaves that `np.asarray` reads when they are asked for (`InFile`).

    Raises:
        ValueError: the file is damaged.
    """
    try:
        found = tensors.places(file)
    except (ValueError, OSError) as error:
        raise ValueError(f"{file}: {_damaged(error)}") from None
    return _nested({tuple(name.split("/")): InFile(file, place) for name, place in found.items()})


@dataclass(frozen=True)
class InFile:
    """A parameter in a file of tensors, which `np.asarray` reads. Raises ValueError if the file is damaged."""

    file: Path
    place: tensors.Place

    @property
    def shape(self) -> tuple[int, ...]:
        return self.place.shape

    @property
    def dtype(self) -> np.dtype:
        return self.place.dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        try:
            array = tensors.read(self.file, self.place)
        except (ValueError, OSError) as error:
            raise ValueError(f"{self.file}: {_damaged(error)}") from None
        return array.astype(dtype or self.dtype, copy=False)


def _read_header(file: Path) -> Params:
    """Shapes and dtypes of what `read_tensors` would read; raises as that, also if parameters have no such dtypes."""
    stored = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), later_tensors(file))
    for path, leaf in jax.tree_util.tree_leaves_with_path(stored):
        if leaf.dtype not in STORED:
            raise ValueError(f"{file}: {_damaged(f'{_name(path)} has the dtype {leaf.dtype}')}")
    return stored


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def restore(
    path: str | Path,
    *,
    dtype: str | None = None,
    sharding: Callable[[Any], jax.sharding.Sharding] = HERE.sharding,
    on_shapes: Callable[[ModelConfig, Params], None] | None = None,
) -> tuple[ModelConfig, Params]:
    """A checkpoint's configuration and parameters, put on the device.

    dtype: "float32", "bfloat16" or "float16" to cast on the way (None: as stored). sharding: leaf -> where it goes (the
    default device); of a leaf that goes to devices in parts, each device gets its part alone. on_shapes: called
    with the configuration and what `metadata` gives, before anything large is read.

    Raises:
        FileNotFoundError: no checkpoint at `path`. ValueError: it is damaged, holds symbolic links (which could read
        files elsewhere), or does not fit its own config.json.
    """
    path = Path(path).absolute()
    if not is_checkpoint(path):
        raise FileNotFoundError(f"{path}: no checkpoint here; expected a folder with config.json and params/")
    config, stored = read_config(path), metadata(path)
    if on_shapes is not None:
        on_shapes(config, stored)

    def target(part: str) -> Params:
        def like(leaf: Any) -> jax.ShapeDtypeStruct:
            to = leaf.dtype if dtype is None else jnp.dtype(dtype_of(part, dtype))
            return jax.ShapeDtypeStruct(leaf.shape, to, sharding=sharding(leaf))

        return jax.tree.map(like, stored[part])

    targets = {part: target(part) for part in stored}
    if (path / TENSORS).is_file():
        return config, _placed(later_tensors(path / TENSORS), targets)
    from orbax.checkpoint import v1 as ocp

    try:
        params = ocp.load(path / "params", targets)
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: {_damaged(error)}") from None
    return config, params


def _placed(stored: Params, targets: Params) -> Params:
    """Parameters, read leaf by leaf, in the dtypes and places of `targets`; raises as `restore`."""

    def cast(leaf: InFile, like: Any) -> np.ndarray:
        return np.asarray(leaf).astype(like.dtype, copy=False)

    leaves, tree = jax.tree.flatten(stored)
    likes = jax.tree.leaves(targets)
    calls = [(leaf.place.nbytes, partial(cast, leaf, like)) for leaf, like in zip(leaves, likes, strict=True)]
    arrays = tensors.in_order(calls, WORKERS)
    return jax.tree.unflatten(
        tree,
        [
            jax.make_array_from_callback(like.shape, like.sharding, array.__getitem__)
            for like, array in zip(likes, arrays, strict=True)
        ],
    )


def metadata(path: str | Path) -> Params:
    """Shape and dtype of every parameter of a checkpoint, checked against its config.json; raises as `restore`."""
    path = Path(path).absolute()
    if (path / TENSORS).is_file():
        stored = _read_header(path / TENSORS)
        _check_stored(stored, path)
        return stored
    from orbax.checkpoint import v1 as ocp

    refuse_links(path / "params")
    _refuse_odd_name(path)
    try:
        stored = ocp.metadata(path / "params").metadata
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: {_damaged(error)}") from None
    if stored is None:
        raise ValueError(f"{path}: {_damaged('no metadata')}")
    _check_stored(stored, path)
    return stored


def _seal(config: ModelConfig, params: Params) -> str:
    """A hash of the configuration and of every name and shape. Where it is the one that was written when they were
    checked, they need not be checked again, which takes two seconds.
    """
    shapes = {_name(path): list(np.shape(leaf)) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    sealed = json.dumps([LAYOUT, config.to_json(), shapes], sort_keys=True)
    return hashlib.sha256(sealed.encode()).hexdigest()


def _damaged(error: object) -> str:
    reason = " ".join(str(error).split())[:300]
    return f"the parameters cannot be read ({reason}); convert the model or copy the folder again"


def read_config(path: Path) -> ModelConfig:
    """The configuration in a checkpoint folder. Raises ValueError, naming the file, if it is none."""
    file = path / "config.json"
    if file.stat().st_size > CONFIG_BOUND:
        raise ValueError(f"{file}: larger than {CONFIG_BOUND} bytes, so no configuration of ours")
    try:
        return ModelConfig.from_json(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _refuse_odd_name(path: Path) -> None:
    """Raises ValueError for a name that Orbax would write to, and not read from."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        shown = os.fsencode(path).decode(errors="backslashreplace")
        raise ValueError(
            f"{shown}: a name that is not UTF-8, where no parameters can be stored; choose another"
        ) from None


def refuse_links(tree: Path) -> None:
    """Raises ValueError if there is anything but files and folders in a folder of Orbax."""
    for folder, folders, files in os.walk(tree):
        for name in (*folders, *files):
            mode = os.lstat(os.path.join(folder, name)).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise ValueError(
                    f"{os.path.join(folder, name)}: a symbolic link or special file inside a checkpoint; "
                    "refused, because it could read any file of this machine"
                )


def _check_stored(stored: Any, path: Path) -> None:
    """`_check_tree` of a checkpoint, unless its seal says that it was made when that was written."""
    config, seal = read_config(path), path / SEAL
    if not (seal.is_file() and seal.read_bytes() == _seal(config, stored).encode()):
        _check_tree(stored, config, str(path))


def _check_tree(params: Any, config: ModelConfig, where: str) -> None:
    """Raises ValueError with the first differences unless the leaves have the names and shapes of `config`."""
    expected = {_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(config))}
    found = {_name(path): tuple(np.shape(leaf)) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    differences = [
        f"{name}: expected {expected.get(name, 'nothing')}, found {found.get(name, 'nothing')}"
        for name in sorted(expected | found)
        if expected.get(name) != found.get(name)
    ]
    if differences:
        raise ValueError(
            f"{where}: the parameters are not those of {config.name} ({len(differences)} differences; "
            f"{'; '.join(differences[:3])})"
        )
