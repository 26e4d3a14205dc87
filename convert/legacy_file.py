"""Reading .ckpt files of torch before 1.6, which are no zip archives: through torch, if it is installed.

torch's own restricted loader reads them (`weights_only=True`), with a stand-in for the one class that Stable Diffusion
files name. Its versions before 2.10 have known holes and are not used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert.source import CheckpointError, Source, TensorInfo, unwrap
from convert.torch_file import TORCH_DTYPES

OLDEST_TORCH = (2, 10)
CLASSES = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.ModelCheckpoint",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
)
SPECIAL = {"BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}


class StandIn:
    """Takes the place of a class of which only the name is needed."""


def open_legacy(path: Path) -> Source:
    """Opens a legacy .ckpt, all of it in memory. Raises CheckpointError if torch is missing, too old, or refuses."""
    torch = _torch(path)
    try:
        with torch.serialization.safe_globals([(StandIn, name) for name in CLASSES]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises almost anything on a damaged file
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(f"{path}: torch refuses this old .ckpt ({type(error).__name__}: {reason})") from None
    found, skipped, metadata = unwrap(state, path, lambda value: isinstance(value, torch.Tensor))

    def dtype(tensor: Any) -> str:
        name = str(tensor.dtype).removeprefix("torch.")
        if name not in TORCH_DTYPES:
            raise CheckpointError(f"{path}: a tensor has the dtype {name}, which is not supported")
        return TORCH_DTYPES[name]

    tensors = {name: TensorInfo(dtype(tensor), tuple(tensor.shape)) for name, tensor in found.items()}

    def read(name: str) -> np.ndarray:
        tensor = found[name].detach().contiguous()
        special = SPECIAL.get(tensors[name].dtype)
        if special is None:
            return tensor.numpy().copy()
        bits = tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int8)
        return bits.numpy().copy().view(special)

    return Source(path, "ckpt-legacy", tensors, read, found.clear, skipped, metadata)


def _torch(path: Path) -> Any:
    try:
        import torch
    except ImportError:
        raise CheckpointError(
            f"{path}: a .ckpt from before torch 1.6 (or a bare pickle), which is read through torch; "
            "install it with pip install 'sdjax[legacy]'"
        ) from None
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < OLDEST_TORCH:
        raise CheckpointError(f"{path}: torch {torch.__version__} has known holes; install torch 2.10 or newer")
    return torch
