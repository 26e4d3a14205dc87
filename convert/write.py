"""Writing a model for other programs: .safetensors in the original (CompVis) names, or a diffusers folder.

The inverse of `convert.read` by the same table, so a round trip gives the same bits. Tensors are laid out and written
one by one; the result appears under its final name only when it is whole.
"""

from __future__ import annotations

import json
import math
import shutil
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from convert.detect import CONFIG_KEY
from convert.diffusers import FOLDERS, STEMS, TOKENIZER_FILES, without_unused_layers
from convert.diffusers_config import diffusers_json
from convert.names import PARTS, Entry, entries, text_spelling
from convert.tensors import Leaf
from sdjax.config import ModelConfig
from sdjax.storage.files import new_file, new_folder
from sdjax.text.tokenizer import END, START, clip_tokenizer
from sdjax.types import Params

DTYPE_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
SLICE = 2**18  # bytes per write; larger ones make Linux look for large free pages, which can be 3 times slower
AHEAD = 2  # tensors prepared before they are written
Tensor = tuple[str, Entry, Params]  # its name in the file, what it is, and the part's tree


def write_safetensors(
    path: str | Path,
    config: ModelConfig,
    params: Params,
    *,
    metadata: Mapping[str, str] = MappingProxyType({}),
    force: bool = False,
) -> None:
    """One .safetensors file in the names of the original code, as other programs take it.

    The configuration goes into the file's metadata, so that reading it back needs no guess. metadata: what else goes
    there.

    Raises:
        FileExistsError: `path` is there and `force` is not given. OSError: it could not be written; nothing is left.
    """
    spelling = text_spelling(config.clip)
    spellings = {"text": spelling, "vae": "compvis", "unet": "compvis"}
    text = "cond_stage_model.model." if spelling == "openclip" else "cond_stage_model.transformer.text_model."
    prefixes = {"text": text, "vae": "first_stage_model.", "unet": "model.diffusion_model."}
    tensors = [
        (prefixes[part] + entry.name, entry, params[part])
        for part in PARTS
        for entry in entries(config, part, spellings[part])
    ]
    header = {**metadata, "format": "pt", CONFIG_KEY: config.to_json()}
    with new_file(Path(path), force) as temporary, open(temporary, "wb") as file:
        _write(file, tensors, header)


def write_diffusers(
    path: str | Path,
    config: ModelConfig,
    params: Params,
    *,
    tokenizer: str | Path | None = None,
    force: bool = False,
) -> None:
    """A folder that diffusers' `StableDiffusionPipeline.from_pretrained` loads. tokenizer: a folder to copy, or None.

    Layers of the text encoder that are never used (the last of Stable Diffusion 2's) have no place there and are left
    out. Raises as `write_safetensors`.
    """
    config = without_unused_layers(config)
    with new_folder(Path(path), force) as folder:
        for name, content in diffusers_json(config).items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")
        (folder / "tokenizer").mkdir()
        write_tokenizer(folder / "tokenizer", config, None if tokenizer is None else Path(tokenizer))
        for part in PARTS:
            prefix = "text_model." if part == "text" else ""
            tensors = [(prefix + entry.name, entry, params[part]) for entry in entries(config, part, "diffusers")]
            with open(folder / FOLDERS[part] / f"{STEMS[part]['.safetensors']}.safetensors", "wb") as file:
                _write(file, tensors, {"format": "pt"})


def write_tokenizer(folder: Path, config: ModelConfig, own: Path | None) -> None:
    """The model's own tokenizer files, or CLIP's."""
    if own is not None:
        for name in TOKENIZER_FILES:
            if (own / name).is_file():
                shutil.copyfile(own / name, folder / name)
        return
    engine = clip_tokenizer().engine
    model = json.loads(engine.to_str())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    pad = engine.id_to_token(config.clip.pad_token)
    (folder / "vocab.json").write_text(json.dumps(engine.get_vocab(), ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "CLIPTokenizer",
                "bos_token": START,
                "eos_token": END,
                "unk_token": END,
                "pad_token": pad,
                "model_max_length": config.clip.length,
                "do_lower_case": True,
            },
            indent=2,
        )
        + "\n"
    )


def _leaves(tensor: Tensor) -> list[Any]:
    found = []
    for path in tensor[1].leaves:
        leaf: Any = tensor[2]
        for key in path:
            leaf = leaf[key]
        found.append(leaf)
    return found


def _write(file: BinaryIO, tensors: list[Tensor], metadata: dict[str, str]) -> None:
    """The format: the header's length (8 bytes, little endian), the header as JSON, the tensors one after another."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for tensor in tensors:
        name, entry, _ = tensor
        dtype = jnp.dtype(_leaves(tensor)[0].dtype)
        size = math.prod(entry.shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype.name], "shape": entry.shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for array in _arrays(tensors):
        data = array.reshape(-1).view(np.uint8).data
        for begin in range(0, len(data), SLICE):
            file.write(data[begin : begin + SLICE])


def _arrays(tensors: list[Tensor]) -> Iterator[np.ndarray]:
    """Every tensor, laid out for the file; the next ones are prepared while one is written."""
    with ThreadPoolExecutor(1) as pool:
        ahead: deque[Future[np.ndarray]] = deque()
        try:
            for tensor in tensors:
                ahead.append(pool.submit(laid_out, tensor[1], _leaves(tensor)))
                if len(ahead) > AHEAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def laid_out(entry: Entry, leaves: list[Any]) -> np.ndarray:
    """The tensor that `entry` makes of these parameters, as a file has it."""
    stored = leaves[0].tensor if isinstance(leaves[0], Leaf) else None
    if stored is not None and (stored.entry.layout, stored.entry.leaves) == (entry.layout, entry.leaves):
        return stored.array().reshape(entry.shape)  # it is stored in its file as it is to be in this one
    return entry.from_leaves([np.asarray(leaf) for leaf in leaves])
