"""Reading .ckpt files of torch before 1.6, which are no zip archives: through torch, if it is installed.

torch's own restricted loader reads them (`weights_only=True`), with a stand-in for the few classes that such files name
next to the weights. Its versions before 2.10 have known holes and are not used. Our interpreter goes first, for some
pickles that it refuses would crash torch or fill the memory.
"""

from __future__ import annotations

import re
import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from convert.files.source import DTYPES, CheckpointError, Source, TensorInfo, unwrap
from convert.files.torch_zip import CALLS, INERT, PICKLE_BOUND, TORCH_DTYPES, storage_of
from convert.files.unpickle import PickleError, load

OLDEST_TORCH = (2, 10)
PICKLES = 5  # magic number, version, system, the state itself, keys of the storages; the numbers follow
CLASSES = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
)


class StandIn:
    """Takes the place of a class of which only the name is needed."""


def open_legacy(path: Path) -> Source:
    """Opens a legacy .ckpt, all of it in memory. Raises CheckpointError if torch is missing, too old, or refuses."""
    torch = _torch(path)
    try:
        with open(path, "rb") as file:
            pickles = BytesIO(file.read(min(path.stat().st_size, PICKLE_BOUND)))
        for _ in range(PICKLES):
            load(pickles, CALLS, INERT, storage_of)
    except PickleError as error:
        raise CheckpointError(f"{path}: {error}") from None
    try:
        with torch.serialization.safe_globals([(StandIn, name) for name in CLASSES]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd numbers in damaged files
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises almost anything on a damaged file
        line = str(error).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"the pickle names {named[1]}, which no checkpoint of weights needs" if named else line
        advice = "" if named else "; if it is damaged, get the file again"
        raise CheckpointError(
            f"{path}: torch refuses this old .ckpt, nothing was run ({type(error).__name__}: {ascii(what[:160])[1:-1]})"
            f"{advice}"
        ) from None
    found, skipped, metadata = unwrap(state, path, lambda value: isinstance(value, torch.Tensor))
    size = path.stat().st_size
    tensors, unusable = {}, {}
    for name, tensor in found.items():
        tensors[name], wrong = _info(tensor, size)
        if wrong:
            unusable[name] = wrong

    def read(name: str) -> np.ndarray:
        dtype = DTYPES[tensors[name].dtype]
        own = found[name].detach().clone(memory_format=torch.contiguous_format)
        return own.reshape(-1).view(torch.uint8).numpy().view(dtype).reshape(tensors[name].shape)

    return Source(path, "ckpt-legacy", tensors, read, found.clear, skipped, metadata, unusable)


def _info(tensor: Any, file_size: int) -> tuple[TensorInfo, str]:
    """A tensor's description, and what makes it unusable ("" if nothing does)."""
    dtype, layout = (str(kind).removeprefix("torch.") for kind in (tensor.dtype, tensor.layout))
    info = TensorInfo(TORCH_DTYPES.get(dtype, dtype), tuple(tensor.shape))
    if dtype not in TORCH_DTYPES or layout != "strided" or tensor.device.type != "cpu":
        return info, f"is a {layout} tensor of {dtype}, which is not supported"
    if tensor.numel() * tensor.element_size() > file_size:
        return info, f"has the shape {tuple(tensor.shape)}, more than the whole file could hold"
    return info, ""


def _torch(path: Path) -> Any:
    try:
        import torch
    except ImportError:
        raise CheckpointError(
            f"{path}: a .ckpt from before torch 1.6, which is read through torch; "
            "install it with pip install 'sdjax[legacy]'"
        ) from None
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < OLDEST_TORCH:
        raise CheckpointError(
            f"{path}: torch {torch.__version__} has known holes; update it with pip install 'torch>=2.10'"
        )
    return torch
