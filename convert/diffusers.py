"""diffusers folders: which files of one to read. What its JSON files say is read by `convert.diffusers_config`.

No file outside the folder is opened because a file in it says so.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

from convert import hub
from convert.detect import Located, contents, locate
from convert.diffusers_config import folder_config, read_json, unet_folder
from convert.files.flax_msgpack import torch_name
from convert.files.open import open_source
from convert.files.orbax_tree import is_orbax
from convert.files.source import CheckpointError, Source
from convert.names import PARTS, Part
from sdjax.config import ModelConfig
from sdjax.hints import hint

FOLDERS: dict[Part, str] = {"text": "text_encoder", "vae": "vae", "unet": "unet"}
NETWORK = {
    ".safetensors": "diffusion_pytorch_model",
    ".bin": "diffusion_pytorch_model",
    ".msgpack": "diffusion_flax_model",
}
STEMS: dict[Part, dict[str, str]] = {
    "unet": NETWORK,
    "vae": NETWORK,
    "text": {".safetensors": "model", ".bin": "pytorch_model", ".msgpack": "flax_model"},
}
"""How weight files are called, those to take first before the others; diffusers' Flax classes wrote .msgpack."""

JSON_FILES = ("model_index.json", "config.json", "scheduler_config.json")
TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


VARIANTS = ("", "fp32", "fp16", "bf16", "ema", "non_ema")
"""Variants in names of weight files, the one to take first; others come behind them."""


SHARD = r"-\d+-of-\d+"


def joined(index: Path, files: dict[str, Source], weight_map: dict[str, str]) -> Source:
    """Several files that are one. weight_map: tensor -> the file that holds it."""
    owners = {tensor: files[file] for tensor, file in weight_map.items()}
    return Source(
        index,
        "diffusers",
        {tensor: owner.tensors[tensor] for tensor, owner in owners.items()},
        lambda name: owners[name].read(name),
        lambda: None,
        unusable={name: why for file in files.values() for name, why in file.unusable.items()},
        files=owners,
    )


def weight_files(names: Iterable[str], part: Part) -> list[str]:
    """The files that hold a part, the one to read first: in the order of `STEMS`, then of `VARIANTS`.

    names: the files of the part's folder. An index stands for its shards.
    """
    found = []
    for name in names:
        if re.search(SHARD, name):
            continue
        for rank, (extension, stem) in enumerate(STEMS[part].items()):
            match = re.fullmatch(_pattern(stem, extension), name)
            if match:
                variant = next((group for group in match.groups() if group), "")
                known = VARIANTS.index(variant) if variant in VARIANTS else len(VARIANTS)
                found.append(((rank, known, variant, name.endswith(".json"), name), name))
    return [name for _, name in sorted(found)]


def _pattern(stem: str, extension: str) -> str:
    """Names of a file or an index, of any variant, which may be said in several places."""
    stem, extension, variant = re.escape(stem), re.escape(extension), r"(?:\.([\w-]+))?"
    return rf"{stem}{variant}{extension}|{stem}{variant}{extension}\.index{variant}\.json"


def shards_of(index: str, names: Iterable[str]) -> list[str]:
    """The files among `names` that by their names are the shards of an index."""
    whole, _, rest = index.partition(".index")
    stem, _, extension = whole.rpartition(".")
    stem, dot, variant = stem.partition(".")
    variant = re.escape(dot + variant or rest.removesuffix(".json"))
    pattern = rf"{re.escape(stem)}(?:{variant}{SHARD}|{SHARD}{variant})\.{extension}"
    return [name for name in names if re.fullmatch(pattern, name)]


def shard_names(index: Path) -> dict[str, str]:
    """tensor -> file name from an index file.

    Raises:
        CheckpointError: it is no index, or names a file that is not in the same folder.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map; this is not an index of shards")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", "..") or not file.isprintable():
            raise CheckpointError(f"{index}: names the shard {file!r}, which is not a plain file name; refused"[:600])
        if not (index.parent / file).is_file():
            raise CheckpointError(f"{index}: the shard {file} is missing; download the folder again"[:600])
    return weight_map


def open_part(folder: Path, part: Part, stack: ExitStack, ignore: Sequence[str] = ()) -> tuple[Located, str]:
    """The weights of one part in its own folder, and a note if they are not the usual file. Closed with `stack`.

    Raises:
        CheckpointError: no weights, or not those of this part.
    """
    there = sorted(file.name for file in folder.iterdir())
    names = weight_files(there, part)
    if not names:
        expected = " or ".join(stem + extension for extension, stem in STEMS[part].items())
        raise CheckpointError(
            f"{folder}: no weights here; expected {expected}, found {_few(there)}{hub.advice(folder)}"
        )
    name = names[0]
    if name.endswith(".json"):
        weight_map = shard_names(folder / name)
        if ".msgpack.index" in name:
            weight_map = {torch_name(tensor.split("/")): file for tensor, file in weight_map.items()}
        opened = {file: stack.enter_context(open_source(folder / file)) for file in dict.fromkeys(weight_map.values())}
        for file, shard in opened.items():
            foreign = [tensor for tensor in shard.tensors if weight_map.get(tensor) != file]
            if foreign:
                raise CheckpointError(f"{folder / file}: holds {foreign[0]}, which {name} does not say")
        for tensor, file in weight_map.items():
            if tensor not in opened[file].tensors:
                raise CheckpointError(f"{folder / file}: lacks {ascii(tensor[:100])[1:-1]}, which {name} says is in it")
        source = joined(folder / name, opened, weight_map)
    else:
        source = stack.enter_context(open_source(folder / name))
    parts = locate(source, ignore)
    if part not in parts:
        raise CheckpointError(
            f"{folder / name}: not the weights of the {FOLDERS[part]}; this file holds {contents(source, parts)}"
        )
    plain = {stem + end for extension, stem in STEMS[part].items() for end in (extension, f"{extension}.index.json")}
    flax = [other for other in names[1:] if ".msgpack" in other]
    if name in plain and flax and ".msgpack" not in name:
        return parts[part], f"{folder.name}: read {name}; Flax' weights were not taken: {', '.join(flax[:3])}"
    if name in plain:
        return parts[part], ""
    left = f"; not taken: {', '.join(names[1:4])}" if len(names) > 1 else ""
    return parts[part], f"{folder.name}: read {name}, a variant{left}"


def _few(names: Sequence[str]) -> str:
    """The first of the files in a folder, as shown in errors."""
    return (", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else ""))[:300] or "nothing"


def is_diffusers_folder(path: Path) -> bool:
    return (path / "model_index.json").is_file()


def check_folder(path: Path) -> None:
    """Raises CheckpointError, saying what is there, if `path` is no diffusers folder."""
    index = path / "model_index.json"
    if index.is_file():
        return
    if index.is_symlink():
        raise CheckpointError(f"{index}: a link to nothing; the download is not complete, get it again")
    there = sorted(file.name for file in path.iterdir())
    whole = [name for name in there if name.endswith((".ckpt", ".safetensors", ".pt", ".bin"))]
    if any(re.search(r"lora|^adapter_(config|model)\.", name) for name in there):
        advice = f"it is a LoRA; give the model that it was made for, and this by {hint('lora', str(path))}"
    elif (path.parent / "model_index.json").is_file():
        advice = f"it is a part of {path.parent}; give that one"
    elif is_orbax(path):
        raise CheckpointError(
            f"{path}: an Orbax checkpoint of another program, which holds {_few(there)}; of those, maxdiffusion's of "
            "Stable Diffusion 1.x and 2.x are read; save the model there as a diffusers folder (save_pretrained), and "
            "give that"
        )
    elif whole:
        advice = f"give the file itself, such as {path / whole[0]}"
    else:
        advice = "expected a .ckpt, a .safetensors or a diffusers folder"
    raise CheckpointError(
        f"{path}: a folder without model_index.json, which holds {_few(there)}; {advice}{hub.advice(path)}"
    )


def open_folder(
    folder: Path, stack: ExitStack, *, ema: str = "auto", without: Collection[Part] = (), ignore: Sequence[str] = ()
) -> tuple[ModelConfig, dict[Part, Located], list[str]]:
    """A diffusers folder: its configuration, its parts, and notes on what is unusual.

    ema: "yes" takes the UNet in unet_ema, where training scripts keep the moving averages; so does "auto" if there is
    no other. without: parts that are not wanted.
    """
    for file in (folder / "tokenizer" / name for name in TOKENIZER_FILES):
        if file.is_symlink() and not file.exists():
            raise CheckpointError(f"{file}: a link to nothing{hub.advice(file.parent)}")
    config, notes = folder_config(folder, ema)
    parts: dict[Part, Located] = {}
    for part in PARTS:
        inside = unet_folder(folder, ema) if part == "unet" else folder / FOLDERS[part]
        if part in without or not inside.is_dir():
            continue
        parts[part], note = open_part(inside, part, stack, ignore)
        notes += [note] if note else []
        if inside.name.endswith("_ema") and ema == "auto":
            notes.append(f"{inside.name}: the moving averages were taken, there are no other weights")
    return config, parts, notes


def without_unused_layers(config: ModelConfig) -> ModelConfig:
    """`config` with the text encoder cut to the layers in use, as diffusers stores it."""
    clip = dataclasses.replace(config.clip, layers=config.clip.layers - config.clip.skip, skip=0, projection=None)
    return dataclasses.replace(config, text=(clip,))


def needed_files(name: str, files: list[str]) -> list[str]:
    """Of the files of a hub model, those that converting it reads."""
    if "model_index.json" not in files:
        whole = [file for file in files if file.endswith((".safetensors", ".ckpt")) and "/" not in file]
        advice = f"; download {' or '.join(whole[:3])} of it, and give the file" if whole else ""
        raise NotADiffusersModel(f"{name}: no diffusers model on the hub (model_index.json is missing){advice}")
    needed = [file for file in files if file.rpartition("/")[2] in JSON_FILES]
    needed += [f"tokenizer/{file}" for file in TOKENIZER_FILES if f"tokenizer/{file}" in files]
    for part, folder in FOLDERS.items():
        inside = [file.removeprefix(f"{folder}/") for file in files if file.startswith(f"{folder}/")]
        weights = weight_files(inside, part)
        if not weights:
            raise NotADiffusersModel(f"{name}: no weights for {folder} on the hub")
        needed.append(f"{folder}/{weights[0]}")
        if weights[0].endswith(".json"):
            needed += [f"{folder}/{file}" for file in shards_of(weights[0], inside)]
    return needed


class NotADiffusersModel(FileNotFoundError):
    """A hub model without the files of a diffusers folder."""
