"""Writing a model for other programs: .safetensors in the original (CompVis) names, or a diffusers folder.

The inverse of `convert.read` by the same table, so a round trip gives the same bits. Tensors are laid out and written
one by one; the result appears under its final name only when it is whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np

from convert.detect import CONFIG_KEY
from convert.diffusers import FOLDERS, STEMS, TOKENIZER_FILES, without_unused_layers
from convert.diffusers_config import diffusers_json
from convert.names import PARTS, Entry, entries, text_spelling
from convert.tensors import Leaf
from sdjax.config import ModelConfig
from sdjax.storage.files import new_file, new_folder
from sdjax.storage.tensors import Tensor
from sdjax.storage.tensors import write as write_file
from sdjax.text.tokenizer import END, START, clip_tokenizer
from sdjax.types import Params

Named = tuple[str, Entry, Params]  # a tensor's name in the file, what it is, and the part's tree


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
    with new_file(Path(path), force) as temporary:
        _write(temporary, tensors, header)


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
            _write(folder / FOLDERS[part] / f"{STEMS[part]['.safetensors']}.safetensors", tensors, {"format": "pt"})


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


def _leaves(entry: Entry, params: Params) -> list[Any]:
    found = []
    for path in entry.leaves:
        leaf: Any = params
        for key in path:
            leaf = leaf[key]
        found.append(leaf)
    return found


def _write(file: Path, named: list[Named], metadata: dict[str, str]) -> None:
    """A file of these tensors, laid out one by one."""
    tensors = []
    for name, entry, params in named:
        leaves = _leaves(entry, params)
        tensors.append(Tensor(name, jnp.dtype(leaves[0].dtype), entry.shape, partial(laid_out, entry, leaves)))
    write_file(file, tensors, metadata)


def laid_out(entry: Entry, leaves: list[Any]) -> np.ndarray:
    """The tensor that `entry` makes of these parameters, as a file has it."""
    stored = leaves[0].tensor if isinstance(leaves[0], Leaf) else None
    if stored is not None and (stored.entry.layout, stored.entry.leaves) == (entry.layout, entry.leaves):
        return stored.array().reshape(entry.shape)  # it is stored in its file as it is to be in this one
    return entry.from_leaves([np.asarray(leaf) for leaf in leaves])
