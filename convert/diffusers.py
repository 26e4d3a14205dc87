"""diffusers folders: which files of one to read. What its JSON files say is read by `convert.diffusers_config`.

No file outside the folder is opened because a file in it says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from convert.detect import Located, locate
from convert.diffusers_config import folder_config, read_json
from convert.names import PARTS, Part
from convert.source import CheckpointError, Source, TensorInfo, open_source
from sdjax.config import ModelConfig

FOLDERS: dict[Part, str] = {"text": "text_encoder", "vae": "vae", "unet": "unet"}
STEMS: dict[Part, dict[str, str]] = {
    part: {".safetensors": "diffusion_pytorch_model", ".bin": "diffusion_pytorch_model"} for part in ("unet", "vae")
} | {"text": {".safetensors": "model", ".bin": "pytorch_model"}}
JSON_FILES = ("model_index.json", "config.json", "scheduler_config.json")
TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


class Shards:
    """Several files that are one: the same interface as `Source`."""

    def __init__(self, path: Path, parts: list[Source], owner: dict[str, Source]) -> None:
        self.path = path
        self.format = "diffusers"
        self.parts = parts
        self.owner = owner
        self.tensors: dict[str, TensorInfo] = {name: owner[name].tensors[name] for name in owner}
        self.metadata: dict[str, str] = {}
        self.skipped: dict[str, str] = {}

    def read(self, name: str) -> Any:
        return self.owner[name].read(name)


def weight_file(names: Iterable[str], part: Part) -> str | None:
    """The file to read for a part: .safetensors before .bin, the plain one before fp16; an index stands for its shards.

    names: the files of the part's folder. None if there is none.
    """
    there = set(names)
    for extension, stem in STEMS[part].items():
        for variant in ("", ".fp16"):
            for name in (
                f"{stem}{variant}{extension}",
                f"{stem}{extension}.index{variant}.json",
                f"{stem}{variant}{extension}.index.json",
            ):
                if name in there:
                    return name
    return None


def shard_names(index: Path) -> dict[str, str]:
    """tensor -> file name from an index file.

    Raises:
        CheckpointError: it is no index, or names a file that is not in the same folder.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map; this is not an index of shards")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise CheckpointError(f"{index}: names the shard {file!r}, which is not a plain file name; refused")
        if not (index.parent / file).is_file():
            raise CheckpointError(f"{index}: the shard {file} is missing; download the folder again")
    return weight_map


def open_part(folder: Path, part: Part, stack: ExitStack) -> tuple[Located, str]:
    """The weights of one part in its own folder, and the name of the file taken. Closed with `stack`.

    Raises:
        CheckpointError: no weights, or not those of this part.
    """
    name = weight_file((file.name for file in folder.iterdir()), part)
    if name is None:
        expected = " or ".join(stem + extension for extension, stem in STEMS[part].items())
        raise CheckpointError(f"{folder}: no weights here; expected {expected}")
    source: Any
    if name.endswith(".json"):
        weight_map = shard_names(folder / name)
        opened = {file: stack.enter_context(open_source(folder / file)) for file in dict.fromkeys(weight_map.values())}
        for file, shard in opened.items():
            foreign = [tensor for tensor in shard.tensors if weight_map.get(tensor) != file]
            if foreign:
                raise CheckpointError(f"{folder / file}: holds {foreign[0]}, which {name} does not say")
        for tensor, file in weight_map.items():
            if tensor not in opened[file].tensors:
                raise CheckpointError(f"{folder / file}: lacks {tensor}, which {name} says is in it")
        source = Shards(folder / name, list(opened.values()), {t: opened[file] for t, file in weight_map.items()})
    else:
        source = stack.enter_context(open_source(folder / name))
    located = locate(source).get(part)
    if located is None:
        raise CheckpointError(f"{folder / name}: not the weights of the {FOLDERS[part]}")
    return located, name


def is_diffusers_folder(path: Path) -> bool:
    return (path / "model_index.json").is_file()


def open_folder(folder: Path, stack: ExitStack) -> tuple[ModelConfig, dict[Part, Located], list[str]]:
    """A diffusers folder: its configuration, its parts, and notes on which files were taken."""
    config, notes = folder_config(folder)
    parts: dict[Part, Located] = {}
    for part in PARTS:
        if not (folder / FOLDERS[part]).is_dir():
            continue
        parts[part], name = open_part(folder / FOLDERS[part], part, stack)
        notes.append(f"{FOLDERS[part]}: read {name}")
    return config, parts, notes


def without_unused_layers(config: ModelConfig) -> ModelConfig:
    """`config` with the text encoder cut to the layers in use, as diffusers stores it."""
    clip = dataclasses.replace(config.clip, layers=config.clip.layers - config.clip.skip, skip=0, projection=None)
    return dataclasses.replace(config, clip=clip)
