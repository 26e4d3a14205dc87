"""Adapters (LoRA, LyCORIS) of every naming: read, written in kohya's names, and extracted from two checkpoints.

A name in a file is a module and an ending (`SUFFIXES`). Modules are looked up in a map made from the model's own list,
with dots and underscores alike and every known prefix taken off; nothing is guessed from a name. What is not found is
reported, and refused. The numbers stay as they are in the file until somebody asks for what they do.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from convert.diffusers import without_unused_layers
from convert.files.open import open_source
from convert.files.source import DTYPES, FLOATS, CheckpointError, Source
from convert.names import entries
from convert.read import Converted
from sdjax.config import SD15, SD21, ModelConfig
from sdjax.models.adapter_forms import Path, Update, expected_shapes, form_of, missing_of, to_theirs
from sdjax.models.adapters import Adapter, Change, Strength, Wanted, changed_leaf, touched
from sdjax.models.params import dtype_of
from sdjax.storage.files import new_file
from sdjax.text.syntax import check_strength, lora_of
from sdjax.types import Params

SUFFIXES = {f"{dot}lora_{end}.weight": f"lora_{end}" for end in ("down", "up", "mid") for dot in "._"}
"""Endings of names, and what the tensor is called in `sdjax.models.adapter_forms`."""

SUFFIXES |= {
    f"{before}.{end}.weight": f"lora_{end}"
    for before in ("_lora", ".lora", ".lora_linear_layer")
    for end in ("down", "up")
}
SUFFIXES |= {
    f".lora_{letter}{adapter}.weight": kind
    for letter, kind in (("A", "lora_down"), ("B", "lora_up"))
    for adapter in ("", ".default")
}
SUFFIXES |= {f".lora_{letter}{adapter}.bias": "lora_up.bias" for letter in ("B", "up") for adapter in ("", ".default")}
SUFFIXES |= {
    f".lora_magnitude_vector{adapter}{end}": "magnitude" for adapter in ("", ".default") for end in ("", ".weight")
}
SUFFIXES |= {
    f".{name}": name
    for name in (
        *("alpha", "dora_scale", "diff", "diff_b", "w_norm", "b_norm", "oft_blocks", "oft_diag", "rescale"),
        *("weight", "on_input", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
        *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    )
}
SUFFIXES |= {f".{name}.weight": name for name in ("a1", "a2", "b1", "b2")}

LONGEST = max(map(len, SUFFIXES))

NUMBERED = r"(unet|text_encoder):\d+:(up|down)"
"""Names of files that number their modules."""

PREFIXES = (
    *("base_model_model_", "lora_unet_", "lora_te_", "lora_te1_", "lycoris_", "oft_unet_", "oft_te_", "unet_"),
    *("model_diffusion_model_", "diffusion_model_", "text_encoder_", "text_encoders_clip_l_", "text_encoders_clip_h_"),
    *("cond_stage_model_", "transformer_", "text_model_"),
)
"""What may stand before a module's name, in any number, dots as underscores."""

NOT_APPLIED = (
    (r"bias_(indices|values|size)$", "a sparse bias of very old LyCORIS files"),
    (r"\.set_weight$", "set_weight, which replaces parameters"),
    (r"\.boft_|\.lora_embedding_[AB]", "BOFT or an embedding layer's LoRA"),
    (r"^(320|640|768|1280|2560)(\.|$)", "a hypernetwork"),
    (r"(^|\.)to_[kv]_ip\.|^(image_proj|ip_adapter)\.", "an IP-Adapter"),
    (r"^(control_model|controlnet|lora_controlnet)[._]", "a ControlNet"),
    (r"(^|\.)motion_modules\.", "an AnimateDiff motion module"),
)
"""Names of adapters that are known and not applied: a pattern, and what it is."""

OTHERS = (
    (r"lora_te2_|text_encoder_2|(^|[._])te2_|clip_g\.|add_embedding", "SDXL"),
    (r"double_blocks|single_blocks|single_transformer_blocks", "Flux"),
    (r"joint_blocks|lora_te3_|(^|[._])transformer[._]transformer_blocks", "Stable Diffusion 3 or another transformer"),
    (r"lora_prior|prior_", "Stable Cascade"),
)
"""Adapters of other models: a pattern for their names, and the model."""

FAMILIES = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "SDXL"}
"""The models by the width of the text that their cross-attention sees."""

FAMILY_NAMES = {"Stable Diffusion 1": "sd15", "Stable Diffusion 2": "sd21"}

MAY_LACK = 0.25
"""Share of an adapter's modules that a model may lack: the others act, and a note says which do not."""

HASH, PEFT = "sshs_model_hash", "lora_adapter_metadata"


class Target(NamedTuple):
    """A module of the model. name: in diffusers' spelling, with `unet.` or `text_encoder.` before it; shape: of its
    kernel in PyTorch's layout.
    """

    name: str
    shape: tuple[int, ...]
    kernel: Path
    kernel_shape: tuple[int, ...]
    bias: Path | None


@lru_cache(maxsize=16)
def targets(config: ModelConfig) -> dict[str, Target]:
    """Every module that an adapter may change, by all of its names, dots as underscores."""
    config = without_unused_layers(config)
    found: dict[str, Target] = {}
    for part, own in (("unet", "unet"), ("text", "text_encoder.text_model")):
        biases = {
            entry.name.removesuffix(".bias"): (part, *entry.leaves[0])
            for entry in entries(config, part, "diffusers")  # type: ignore[arg-type]
            if entry.name.endswith(".bias")
        }
        for entry in entries(config, part, "diffusers"):  # type: ignore[arg-type]
            if entry.name.endswith(".weight") and entry.leaves[0][-1] in ("kernel", "scale"):
                module = entry.name.removesuffix(".weight")
                kernel = (part, *entry.leaves[0])
                target = Target(f"{own}.{module}", entry.shape, kernel, entry.leaf_shape, biases.get(module))
                found[module.replace(".", "_")] = target
    by_kernel = {target.kernel: target for target in found.values()}
    for entry in entries(config, "unet", "compvis"):
        if ("unet", *entry.leaves[0]) in by_kernel:
            module = entry.name.removesuffix(".weight").replace(".", "_")
            found.setdefault(module, by_kernel["unet", *entry.leaves[0]])
    return found


def target_of(module: str, config: ModelConfig) -> Target | None:
    """The module that a name stands for, prefixes and spelling aside; None if the model has none."""
    plain = module.replace(".", "_").replace("_processor_", "_")
    known = targets(config)
    while True:
        if plain in known:
            return known[plain]
        if f"{plain}_0" in known and plain.endswith("to_out"):
            return known[f"{plain}_0"]
        as_text = re.sub(r"self_attn_to_(q|k|v|out)$", r"self_attn_\1_proj", plain)
        if as_text in known:
            return known[as_text]
        prefix = next((prefix for prefix in PREFIXES if plain.startswith(prefix)), None)
        if prefix is None:
            return None
        plain = plain.removeprefix(prefix)


# Reading


def read_adapter(path: str | FilePath, config: ModelConfig, *, rank_cut: int | None = None) -> Adapter:
    """An adapter's file, or a folder as peft writes it, for a model.

    rank_cut: the ranks of a DyLoRA to keep; None: all.

    Raises:
        FileNotFoundError: no such file. CheckpointError (a ValueError): it is damaged, unsafe, no adapter, or one for
        another model. ValueError: rank_cut is below 1.
    """
    if rank_cut is not None and rank_cut < 1:
        raise ValueError(f"rank_cut must be at least 1, found {rank_cut}")
    path = FilePath(path)
    folder_settings: dict[str, Any] = {}
    file = path
    if path.is_dir():
        file, folder_settings = _peft_folder(path)
    with open_source(file) as source:
        adapter = _read(source, path, config, folder_settings)
    return adapter if rank_cut is None else _cut(adapter, rank_cut, path)


def described(path: str | FilePath) -> str | None:
    """What an adapter is and for which of the known models, in a few lines; None for what is no adapter.

    Raises:
        FileNotFoundError, CheckpointError: as `read_adapter`, if it is one and cannot be used with any of them.
    """
    path = FilePath(path)
    file = path
    if path.is_dir():
        if not any(path.glob("adapter_model.*")):
            return None
        file, _ = _peft_folder(path)
    with open_source(file) as source:
        if not _modules(source)[0] and not all(re.fullmatch(rf"{NUMBERED}|<.*>|\d+", name) for name in source.tensors):
            return None
    refused: CheckpointError | None = None
    for config in (SD15, SD21):
        try:
            adapter = read_adapter(path, config)
        except CheckpointError as error:
            refused = refused or error
            continue
        updates = adapter.updates.values()
        forms = Counter("DoRA" if update.is_dora else update.form for update in updates)
        ranks = sorted({update.rank for update in updates if update.rank is not None})
        parts = Counter(kernel[0] for kernel in adapter.updates)
        counted = ", ".join(f"{form} of {count} modules" for form, count in forms.items())
        lines = [
            f"adapter     {counted}, for {config.name}",
            f"modules     {parts['unet']} of the UNet, {parts['text']} of the text encoder",
            f"ranks       {', '.join(map(str, ranks)) or 'none'}",
        ]
        lines += [f"brings      the learnt word {name}, {len(v)} vectors" for name, v in adapter.embeddings.items()]
        known = ("ss_output_name", "ss_base_model_version", "modelspec.title", HASH)
        lines += [f"{key:11} {adapter.metadata[key]:.200}" for key in known if key in adapter.metadata]
        return "".join(f"{line}\n" for line in [*lines, *(f"note        {note}" for note in adapter.notes)])
    assert refused is not None
    raise refused


def _peft_folder(path: FilePath) -> tuple[FilePath, dict[str, Any]]:
    """The weights of a folder that peft wrote, and what its adapter_config.json says."""
    names = (
        "adapter_model.safetensors",
        "adapter_model.bin",
        "pytorch_lora_weights.safetensors",
        "pytorch_lora_weights.bin",
    )
    file = next((path / name for name in names if (path / name).is_file()), None)
    if file is None:
        raise CheckpointError(f"{path}: a folder without an adapter; expected {names[0]} in it")
    described = path / "adapter_config.json"
    if not described.is_file():
        if file.name.startswith("adapter_model"):
            raise CheckpointError(f"{path}: adapter_config.json is missing, which says how strong {file.name} is")
        return file, {}
    try:
        settings = json.loads(described.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{described}: cannot be read ({error})") from None
    if not isinstance(settings, dict) or settings.get("peft_type", "LORA") != "LORA":
        kind = settings.get("peft_type") if isinstance(settings, dict) else "no object"
        raise CheckpointError(f"{described}: {kind!r:.40} of peft is not applied; LORA is")
    return file, settings


def _read(source: Source, path: FilePath, config: ModelConfig, settings: dict[str, Any]) -> Adapter:
    modules, rest = _modules(source)
    _refuse_others(source, path)
    if rest and all(re.fullmatch(NUMBERED, name) or _is_embedding(name, source) for name in rest) and not modules:
        modules = _numbered(source, rest, path, config)
        rest = [name for name in rest if _is_embedding(name, source)]
    if not modules and rest and all(name.isdigit() for name in rest):
        modules, rest = _listed(source, rest, path, config), []
    learnt = [name for name in rest if _is_embedding(name, source)]
    strange = [name for name in rest if name not in learnt]
    if not modules:
        listed = ", ".join(list(source.tensors)[:3])
        raise CheckpointError(
            f"{path}: no adapter (LoRA, LyCORIS) is in this file; its tensors are called {listed:.200}"
        )
    if strange:
        raise CheckpointError(
            f"{path}: {len(strange)} tensors that are not known in an adapter: {', '.join(strange[:3]):.200}"
        )
    found = {module: target_of(module, config) for module in modules}
    unused = _unused_layers(config)
    unknown = [module for module, target in found.items() if target is None and not unused(module)]
    notes = []
    if unknown:
        said, is_other = _not_of_this_model(unknown, modules, source, config)
        if is_other or len(unknown) > MAY_LACK * len(modules):
            raise CheckpointError(f"{path}: {said}")
        notes.append(f"{said}; they are left out")
    scale_of = _scales(settings or _described(source), path)
    updates: dict[Path, Update] = {}
    first_names: dict[Path, str] = {}
    for module, names in modules.items():
        target = found[module]
        if target is None:
            continue
        if target.kernel in updates:
            raise CheckpointError(
                f"{path}: {module} and {first_names[target.kernel]} are the same module; keep one of them"
            )
        updates[target.kernel] = _update(source, path, module, names, target, scale_of)
        first_names[target.kernel] = module
    if not any(np.any(array) for update in updates.values() for array in update.tensors.values()):
        raise CheckpointError(f"{path}: filled with zeros; the download is not complete, get it again")
    if left := len(modules) - len(unknown) - len(updates):
        notes.append(f"{left} modules of the text encoder's last layer, which is not used, are left out")
    return Adapter(path.stem, updates, _embeddings(path, learnt, config), dict(source.metadata), notes, path)


def _modules(source: Source) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Modules -> kind of tensor -> its name in the file; and the names that have no known ending."""
    modules: dict[str, dict[str, str]] = {}
    rest = []
    for name in source.tensors:
        ending = _ending(name)
        if ending is None or _is_embedding(name, source):
            rest.append(name)
        else:
            names = modules.setdefault(name.removesuffix(ending), {})
            other = names.setdefault(SUFFIXES[ending], name)
            if other != name:
                raise CheckpointError(f"{source.path}: {other} and {name} are the same tensor; keep one of them")
    plain = [module for module, names in modules.items() if set(names) == {"weight"}]  # of a model, not of (IA)3
    return modules, [*rest, *(modules.pop(module)["weight"] for module in plain)]


def _ending(name: str) -> str | None:
    """The longest ending of a name that is known; None if there is none."""
    begins = (found.start() for found in re.finditer(r"\.|_lora", name[-LONGEST:]))
    return next((end for begin in begins if (end := name[-LONGEST:][begin:]) in SUFFIXES), None)


def _is_embedding(name: str, source: Source) -> bool:
    return name.startswith("bundle_emb.") or source.metadata.get(name) == "<embed>"


def _refuse_others(source: Source, path: FilePath) -> None:
    any_of_them = re.compile("|".join(f"(?:{pattern})" for pattern, _ in NOT_APPLIED))
    for name in filter(any_of_them.search, source.tensors):
        for pattern, what in NOT_APPLIED:
            if re.search(pattern, name):
                raise CheckpointError(f"{path}: {what} ({name:.100}), which is not applied; expected LoRA or LyCORIS")


def _unused_layers(config: ModelConfig) -> Callable[[str], bool]:
    """Whether a module belongs to the layers of the text encoder whose output nothing sees."""
    left = range(without_unused_layers(config).clip.layers, 64)
    return lambda module: (
        any(f"encoder_layers_{i}_" in module.replace(".", "_") for i in left)
        and ("te2_" not in module and config.clip.skip > 0)
    )


def _not_of_this_model(
    unknown: list[str], modules: Mapping[str, Mapping[str, str]], source: Source, config: ModelConfig
) -> tuple[str, bool]:
    """What to say of modules that the model does not have, and whether they are those of a model of another family."""
    family = next((model for pattern, model in OTHERS for module in unknown if re.search(pattern, module)), None)
    family = family or _family_of(modules, source)
    guess = f"this is an adapter for {family}, the model is {config.name}" if family else f"the model is {config.name}"
    kinds = Counter(re.sub(r"\d+", "N", module) for module in unknown)
    shown = ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common(3))
    said = f"{len(unknown)} of {len(modules)} modules are not in the model; {guess}: {shown:.300}"
    return said, family is not None and not config.name.startswith(FAMILY_NAMES.get(family, "-"))


def _family_of(modules: Mapping[str, Mapping[str, str]], source: Source) -> str | None:
    """The family that an adapter is for, by the width of the text in its cross-attention; None if it does not show."""
    for module, names in modules.items():
        if re.search(r"attn2[._](processor[._])?to_[kv]$", module) and "lora_down" in names:
            shape = source.tensors[names["lora_down"]].shape
            return FAMILIES.get(shape[1] if len(shape) > 1 else 0)
    return None


Scales = Callable[[str, int], float | None]
"""(module, rank) -> k, where a file says it apart from the tensors; None where it does not."""


def _described(source: Source) -> dict[str, Any]:
    """What the header of a file by diffusers says of its peft adapters, or nothing."""
    try:
        found = json.loads(source.metadata.get(PEFT, "{}"))
    except ValueError:
        raise CheckpointError(f"{source.path}: its metadata {PEFT} is damaged; get the file again") from None
    return found if isinstance(found, dict) else {}


def _scales(settings: Mapping[str, Any], path: FilePath) -> Scales:
    if not settings:
        return lambda module, rank: None
    by_part = {"": settings} if "lora_alpha" in settings else {}
    for key, value in settings.items():
        part, dot, name = key.partition(".")
        if dot and part in ("unet", "text_encoder"):
            by_part.setdefault(part, {})  # type: ignore[arg-type]
            by_part[part] = {**by_part[part], name: value}

    def scale(module: str, rank: int) -> float | None:
        part = next((part for part in by_part if module.startswith(f"{part}.")), "")
        said = by_part.get(part)
        if said is None:
            return None
        alpha = said.get("lora_alpha", rank)
        patterns = said.get("alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise CheckpointError(f"{path}: alpha_pattern is {patterns!r:.40}; expected an object")
        if wild := next((pattern for pattern in patterns if not _is_plain(pattern)), None):
            raise CheckpointError(f"{path}: alpha_pattern has {wild!a:.60}; expected names of modules")
        inside = module.removeprefix("base_model.model.").removeprefix(f"{part}.")  # as the part's own code names it
        alpha = next((own for pattern, own in patterns.items() if _fits(pattern, inside)), alpha)
        if not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise CheckpointError(f"{path}: lora_alpha is {alpha!r:.40}; expected a number")
        return float(alpha) / (math.sqrt(rank) if said.get("use_rslora") else rank)

    return scale


def _is_plain(pattern: str) -> bool:
    """Whether a name or expression of peft's is matched in little time: two repetitions at most, none of a group."""
    own = re.sub(r"^\^?\((\?:)?\.\*\\\.\)\?", "", pattern)  # what stands before a module's own name
    return len(re.findall(r"[*+?{]", own)) <= 2 and not re.search(r"\)[*+?{]", own)


def _fits(pattern: str, module: str) -> bool:
    """Whether a module is meant by a name or expression of peft's."""
    try:
        return re.fullmatch(rf"(.*\.)?({pattern})", module) is not None
    except re.error:
        return module == pattern or module.endswith(f".{pattern}")


def _update(
    source: Source, path: FilePath, module: str, names: Mapping[str, str], target: Target, scale_of: Scales
) -> Update:
    """What a file says of one module, checked."""
    kinds = {"dora_scale" if kind == "magnitude" else kind for kind in names}
    form = form_of(kinds)
    if form is None:
        lacking = missing_of(kinds)
        there = ", ".join(sorted(kinds))
        raise CheckpointError(
            f"{path}: {module} has {there}"
            + (f" and lacks {lacking}" if lacking else ", which is no form that is known")
        )
    tensors: dict[str, np.ndarray] = {}
    for kind, name in names.items():
        info = source.tensors[name]
        if name in source.unusable or (info.dtype not in FLOATS and kind not in ("alpha", "on_input")):
            what = source.unusable.get(name, f"has the dtype {info.dtype}, expected floating point")
            raise CheckpointError(f"{path}: {name} {what}")
        array = source.read(name)
        if info.dtype in FLOATS and kind != "alpha" and not is_finite(array):
            raise CheckpointError(f"{path}: {name} holds NaN or infinity; the file is broken, get another one")
        if not array.size:
            raise CheckpointError(f"{path}: {name} has the shape {array.shape}, which holds nothing")
        if kind == "magnitude":  # peft's, one for each row
            kind, array = "dora_scale", array.reshape(-1, *[1] * (len(target.shape) - 1))
        tensors[kind] = array
    update = Update(form, tensors, target.shape, target.kernel, target.kernel_shape, target.bias)
    wrong = expected_shapes(update)
    if wrong is not None:
        raise CheckpointError(f"{path}: {module}: {wrong}{_other_width(names, source, target)}")
    if not math.isfinite(update.k):
        raise CheckpointError(f"{path}: {names['alpha']} holds NaN or infinity; the file is broken, get another one")
    if update.change_of_bias() is not None and target.bias is None:
        raise CheckpointError(f"{path}: {module} changes a bias, and the model has none there")
    if form == "lora" and "alpha" not in tensors and (scale := scale_of(module, len(tensors["lora_down"]))) is not None:
        update = Update(form, tensors, target.shape, target.kernel, target.kernel_shape, target.bias, scale)
    return update


def _other_width(names: Mapping[str, str], source: Source, target: Target) -> str:
    """Whose adapter it is, if a width of the text says so."""
    shape = source.tensors[names["lora_down"]].shape if "lora_down" in names else ()
    other = FAMILIES.get(shape[1]) if len(shape) > 1 and "cross_attention" in target.kernel else None
    return f"; this is an adapter for {other}" if other and shape[1] != target.shape[1] else ""


def is_finite(array: np.ndarray) -> bool:
    """Whether no number is NaN or infinite, by the bits of their exponents; block by block, as the cache holds them."""
    bits = {2: (np.uint16, 0x7FFF), 4: (np.uint32, 0x7FFFFFFF), 8: (np.uint64, 0x7FFFFFFFFFFFFFFF)}
    size = array.dtype.itemsize
    if size not in bits:
        return bool(np.isfinite(np.asarray(array, np.float32)).all())
    kind, mask = bits[size]
    infinity = np.asarray(np.inf, array.dtype).view(kind)
    flat, block = array.reshape(-1).view(kind), 2**16
    return all((flat[i : i + block] & kind(mask)).max() < infinity for i in range(0, len(flat), block))


def _embeddings(path: FilePath, names: list[str], config: ModelConfig) -> dict[str, np.ndarray]:
    """The learnt words that an adapter's file brings with it."""
    if not names:
        return {}
    from convert.embeddings import read_embeddings

    return {embedding.name: embedding.vectors for embedding in read_embeddings(path, config.clip.width)}


# Files that number their modules (cloneofsimo/lora)


def _numbered(source: Source, names: list[str], path: FilePath, config: ModelConfig) -> dict[str, dict[str, str]]:
    """Modules of `unet:17:up`, by the order in which that program goes through a model."""
    known = {"unet": {"CrossAttention", "Attention", "GEGLU"}, "text_encoder": {"CLIPAttention"}}
    for part, classes in known.items():
        said = source.metadata.get(part)
        if said is not None and not set(_json_list(said)) <= classes:
            raise CheckpointError(f"{path}: numbers modules of {said:.100}; expected {', '.join(sorted(classes))}")
    order = {"unet": list(_unet_order(config)), "text_encoder": list(_text_order(config))}
    modules: dict[str, dict[str, str]] = {}
    for name in names:
        match = re.fullmatch(r"(unet|text_encoder):(\d+):(up|down)", name)
        if match is None:
            continue
        part, number = match[1], int(match[2])
        if number >= len(order[part]):
            raise CheckpointError(
                f"{path}: {name} is number {number} of the modules of {part}, and the model has {len(order[part])}; "
                "this is an adapter for another model"
            )
        modules.setdefault(f"{part}.{order[part][number]}", {})[f"lora_{match[3]}"] = name
    return modules


def _json_list(text: str) -> list[str]:
    try:
        found = json.loads(text)
    except ValueError:
        return [text]
    return [str(item) for item in found] if isinstance(found, list) else [text]


def _unet_order(config: ModelConfig) -> Iterator[str]:
    """The linear maps of the UNet's transformers, those on the way down, up, and in the middle."""
    unet = config.unet
    levels = range(len(unet.channels))
    blocks = unet.level_res_blocks
    ways = [("down", i, blocks[i], unet.down_transformers[i]) for i in levels]
    ways += [("up", i, blocks[-1 - i] + 1, unet.up_transformers[i]) for i in levels]
    places = [(f"{way}_blocks.{i}.attentions.{j}", layers) for way, i, count, layers in ways for j in range(count)]
    places += [("mid_block.attentions.0", unet.middle_transformers)]
    for place, layers in places:
        for layer in range(layers):
            at = f"{place}.transformer_blocks.{layer}"
            for name in ("attn1", "ff", "attn2"):
                ends = ["net.0.proj"] if name == "ff" else ["to_q", "to_k", "to_v", "to_out.0"]
                yield from (f"{at}.{name}.{end}" for end in ends)


def _text_order(config: ModelConfig) -> Iterator[str]:
    for i in range(config.clip.layers):
        yield from (f"text_model.encoder.layers.{i}.self_attn.{name}_proj" for name in ("k", "v", "q", "out"))


def _listed(source: Source, names: list[str], path: FilePath, config: ModelConfig) -> dict[str, dict[str, str]]:
    """Modules of a plain list [up, down, up, down, ...], as the same program wrote it at first."""
    part = "text_encoder" if ".text_encoder" in path.name else "unet"
    order = list(_text_order(config) if part == "text_encoder" else _unet_order(config))
    if len(names) != 2 * len(order):
        raise CheckpointError(
            f"{path}: a list of {len(names)} tensors; expected {2 * len(order)}, a pair for each module of the {part}"
        )
    modules: dict[str, dict[str, str]] = {}
    for name in names:
        number = int(name)
        modules.setdefault(f"{part}.{order[number // 2]}", {})["lora_down" if number % 2 else "lora_up"] = name
    return modules


def _cut(adapter: Adapter, ranks: int, path: FilePath) -> Adapter:
    """The adapter with its first ranks alone, as DyLoRA means it; its strength stays that of the whole."""
    updates = {}
    for kernel, update in adapter.updates.items():
        if update.form != "lora" or "lora_mid" in update.tensors:
            raise CheckpointError(f"{path}: holds {update.form}, of which no rank can be cut off; leave out dyn")
        tensors = dict(update.tensors)
        tensors["lora_down"], tensors["lora_up"] = tensors["lora_down"][:ranks], tensors["lora_up"][:, :ranks]
        updates[kernel] = replace(update, tensors=tensors, scale=update.k)
    return replace(adapter, updates=updates)


# Baking


@dataclass(frozen=True, eq=False)
class Baked:
    """A parameter with adapters in it, worked out when `np.asarray` asks for it and rounded once."""

    leaf: Any
    changes: list[Change]
    config: ModelConfig
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.leaf.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        leaf = np.asarray(self.leaf)
        found = changed_leaf(leaf, self.changes, self.config, self.dtype) if self.changes else leaf.astype(self.dtype)
        return found if dtype is None else found.astype(dtype)


def baked(params: Params, wanted: Wanted, config: ModelConfig, dtype: str = "keep") -> Params:
    """The parameters with adapters in them, worked out one by one when they are asked for.

    dtype: to round to; "keep" for the one that each has.
    """
    changes = touched(wanted)

    def bake(path: Any, leaf: Any) -> Baked:
        keys = tuple(key.key for key in path)
        own = np.dtype(leaf.dtype) if dtype == "keep" else jnp.dtype(dtype_of(keys[0], dtype))
        return Baked(leaf, changes.get(keys, []), config, own)

    return jax.tree_util.tree_map_with_path(bake, params)


def with_loras(converted: Converted, loras: Sequence[str], dtype: str) -> Converted:
    """A model that is read with dtype "keep", with adapters in its parameters.

    loras: "FILE[:WEIGHT[:TEXT_WEIGHT]]". dtype: of the result.

    Raises:
        ValueError, FileNotFoundError: a file or weight cannot be used.
    """
    config, wanted = converted.config, []
    for tag in map(check_strength, map(lora_of, loras)):
        adapter = read_adapter(tag.name, config)
        converted.report.notes += [f"{tag.name}: {note}" for note in adapter.notes]
        wanted.append((adapter, Strength(tag.unet, tag.text)))
    return replace(converted, params=baked(converted.params, wanted, config, dtype))


# Writing


def write_adapter(path: str | FilePath, adapter: Adapter, config: ModelConfig, *, force: bool = False) -> None:
    """An adapter as a .safetensors in kohya's names, which other programs read; tensors keep every bit.

    Raises:
        FileExistsError: `path` is there and `force` is not given. OSError: it could not be written; nothing is left.
    """
    endings = {kind: ending for ending, kind in reversed(SUFFIXES.items()) if ending[0] == "."}
    endings |= {kind: f".{kind}.weight" for kind in ("lora_down", "lora_up", "lora_mid")} | {
        "dora_scale": ".dora_scale"
    }
    names = {target.kernel: target.name for target in targets(config).values()}
    arrays: dict[str, np.ndarray] = {}
    for kernel, update in adapter.updates.items():
        before, _, module = names[kernel].partition(".")
        prefix = "lora_unet_" if before == "unet" else "lora_te_"
        for kind, array in update.tensors.items():
            arrays[f"{prefix}{module.replace('.', '_')}{endings[kind]}"] = array
        if update.scale is not None and update.rank is not None:
            arrays[f"{prefix}{module.replace('.', '_')}.alpha"] = np.asarray(update.scale * update.rank, np.float32)
    for name, vectors in adapter.embeddings.items():
        arrays[f"bundle_emb.{name}.string_to_param.*"] = np.asarray(vectors)
    own = rf"{HASH}|{PEFT}|unet|text_encoder|(unet|text_encoder):\d+:rank"  # true of this file, or of no other
    ours = {k: v for k, v in adapter.metadata.items() if not re.fullmatch(own, k) and v != "<embed>"}
    with new_file(FilePath(path), force) as temporary:
        _write(temporary, arrays, {"format": "pt", **ours})


def _write(path: FilePath, arrays: Mapping[str, np.ndarray], metadata: dict[str, str]) -> None:
    dtypes = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {}
    digest, end = hashlib.sha256(), 0
    ordered = {name: np.ascontiguousarray(arrays[name]).reshape(arrays[name].shape) for name in sorted(arrays)}
    for name, array in ordered.items():
        header[name] = {"dtype": dtypes[array.dtype], "shape": array.shape, "data_offsets": [end, end + array.nbytes]}
        digest.update(array.reshape(-1).view(np.uint8).data)
        end += array.nbytes
    metadata[HASH] = digest.hexdigest()
    text = json.dumps({"__metadata__": metadata, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in ordered.values():
            file.write(array.reshape(-1).view(np.uint8).data)


# Extraction


def extract(
    base: Params,
    tuned: Params,
    config: ModelConfig,
    *,
    rank: int,
    convolutions: bool = True,
    dtype: str = "float32",
    progress: Callable[[int, int], None] | None = None,
) -> Adapter:
    """The LoRA that makes one model of another, as nearly as its rank allows: the changes' first singular vectors.

    base, tuned: parameters of the same configuration; leaves may be read when they are asked for.
    rank: of every module that changed.
    convolutions: whether 3x3 ones are in it, too (LoCon).
    dtype: of the factors.
    progress: called with (modules done, modules in all).

    Raises:
        ValueError: rank is no whole number from 1, or nothing changed that an adapter could say.
    """
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"rank must be a whole number from 1, found {rank!r}")
    known = {target.kernel: target for target in targets(config).values()}
    wanted = {
        kernel: target
        for kernel, target in known.items()
        if kernel[-1] == "kernel" and (convolutions or len(target.kernel_shape) == 2)
    }
    updates: dict[Path, Update] = {}
    errors: dict[str, float] = {}
    for done, (kernel, target) in enumerate(wanted.items()):
        before, after = (_leaf(params, kernel) for params in (base, tuned))
        change = to_theirs(after - before, target.shape)
        if change.any():
            down, up, error = _factors(change.reshape(len(change), -1), rank)
            errors[target.name] = error
            tensors = {
                "lora_down": down.reshape(-1, *target.shape[1:]).astype(dtype),
                "lora_up": up.reshape(*up.shape, *[1] * (len(target.shape) - 2)).astype(dtype),
                "alpha": np.asarray(len(down), np.float32),
            }
            updates[kernel] = Update("lora", tensors, target.shape, kernel, target.kernel_shape, target.bias)
        if progress is not None:
            progress(done + 1, len(wanted))
    if not updates:
        raise ValueError("the two models do not differ in any matrix; there is nothing to extract")
    worst = max(errors, key=lambda name: errors[name])
    notes = [f"what rank {rank} leaves out of the changes: {errors[worst]:.1%} at most ({worst})"]
    others = _other_changes(base, tuned, set(wanted))
    if others:
        notes.append(f"{len(others)} other parameters changed, which a LoRA cannot say: {', '.join(others[:3])}")
    metadata = {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(rank)}
    return Adapter("extracted", updates, metadata=metadata, notes=notes)


def _leaf(params: Params, path: Path) -> np.ndarray:
    leaf: Any = params
    for key in path:
        leaf = leaf[key]
    return np.asarray(leaf).astype(np.float32)


def _factors(change: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, float]:
    """down f32[r, in], up f32[out, r] of the first singular vectors, and what they leave out, relative to the whole.

    By the eigenvectors of the smaller of the two squares, in float64.
    """
    wide = change.shape[0] <= change.shape[1]
    matrix = np.asarray(change if wide else change.T, np.float64)
    values, vectors = np.linalg.eigh(matrix @ matrix.T)
    r = min(rank, len(values))
    left = vectors[:, ::-1][:, :r]
    right = left.T @ matrix
    size = np.sqrt(np.linalg.norm(right, axis=1, keepdims=True)) + 1e-30
    left, right = left * size.T, right / size
    rest = float(np.linalg.norm(matrix - left @ right) / np.linalg.norm(matrix))
    down, up = (right, left) if wide else (left.T, right.T)
    return np.ascontiguousarray(down, np.float32), np.ascontiguousarray(up, np.float32), rest


def _other_changes(base: Params, tuned: Params, seen: set[Path]) -> list[str]:
    """Parameters of the UNet and the text encoder that differ and are no matrix."""
    found = []
    for part in ("unet", "text"):
        paths = [tuple(key.key for key in path) for path, _ in jax.tree_util.tree_flatten_with_path(base[part])[0]]
        for path in paths:
            whole = (part, *path)
            if whole not in seen and not np.array_equal(_leaf(base, whole), _leaf(tuned, whole)):
                found.append("/".join(whole))
    return found
