"""Adapters against the programs that people train and use them with: diffusers + peft, and LyCORIS.

The last test runs over every file of the folder that the environment variable SDJAX_ADAPTERS names, or without it over
files that it writes in the layouts that people have. What their names mean is found here a second time, by generating
all names from the rows of `tests.adapter_files.NAMINGS`; what their tensors mean is left to peft and LyCORIS.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from lycoris.functional.diag_oft import diff_weight as turned
from lycoris.functional.general import weight_decompose
from lycoris.modules import get_module, make_module
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.lokr import LokrModule
from peft import LoraConfig
from peft.tuners.lora.layer import Conv2d, Linear
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from transformers import CLIPTextConfig, CLIPTextModel

from convert.adapters import read_adapter, write_adapter
from convert.diffusers import without_unused_layers
from convert.diffusers_config import diffusers_json
from convert.embeddings import read_embeddings
from convert.files.source import CheckpointError
from convert.names import entries
from sdjax.config import SD15, SD21, TINY, ModelConfig
from sdjax.models.adapters import Strength, merged
from sdjax.models.params import random_params
from tests import embedding_files
from tests.adapter_files import (
    FORMS,
    NAMINGS,
    Module,
    modules,
    numbered_modules,
    random_weight,
    write_adapter_file,
    write_described,
    write_listed,
    write_numbered,
    write_peft_folder,
)
from tests.small import SMALL

BAR = 1e-5
OLD = ("OFT, old", "GLoRA, old")
"""Forms that no program of today writes."""

Tensors = Mapping[str, np.ndarray]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads that wait for each other take longer than products of matrices this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# What LyCORIS and peft make of tensors


def torch_layer(weight: np.ndarray, shape: tuple[int, ...]) -> torch.nn.Module:
    """The module of PyTorch that has this weight."""
    if len(shape) == 1:
        layer: torch.nn.Module = torch.nn.LayerNorm(shape[0])
    elif len(shape) == 2:
        layer = torch.nn.Linear(shape[1], shape[0])
    else:
        layer = torch.nn.Conv2d(shape[1], shape[0], shape[2:])
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight.reshape(shape)))
    return layer


@torch.no_grad()
def by_lycoris(tensors: Tensors, weight: np.ndarray) -> np.ndarray:
    """D f32 by LyCORIS' module for these tensors.

    get_weight stands for LoHa and LoKr, to which get_diff_weight applies k twice.
    """
    state = {f"x.{end}": torch.tensor(np.asarray(array, np.float32)) for end, array in tensors.items()}
    state.setdefault("x.alpha", torch.tensor(float(_rank(tensors))))
    base, layer = torch.tensor(weight), torch_layer(weight, weight.shape)
    magnitude = state.pop("x.dora_scale", None)
    for end, ones in (("lora_down.weight", True), ("lora_up.weight", False)):
        if f"x.{end}" in state and "lora_mid.weight" not in tensors:  # a matrix for a 1x1 convolution, or the reverse
            pair = state[f"x.{end}"]
            kernel = weight.shape[2:] if ones else (1,) * (weight.ndim - 2)
            state[f"x.{end}"] = pair.reshape(len(pair), -1, *kernel)
    if "on_input" in tensors:
        scaled = IA3Module("x", layer, train_on_input=bool(tensors["on_input"]))
        scaled.weight.copy_(state["x.weight"])
        return scaled.get_diff_weight()[0].numpy()
    if "oft_blocks" in tensors:  # the module would choose the size of its blocks
        bound = float(state["x.alpha"]) * len(weight)
        return turned(base, state["x.oft_blocks"], state.get("x.rescale"), constraint=bound).numpy()
    if "lokr_w1" in tensors or "lokr_w1_a" in tensors:
        change = _kronecker(state, layer).get_weight(weight.shape)
    else:
        kind, values = get_module(state, "x")
        module = make_module(kind, values, "x", layer)
        if "hada_w1_a" in tensors:
            change = module.get_weight(weight.shape)
        else:
            change = module.get_diff_weight(shape=weight.shape)[0]
    if magnitude is not None:
        change = weight_decompose(base + change, magnitude, wd_on_out=magnitude.shape[0] != 1) - base
    return change.numpy()


def _rank(tensors: Tensors) -> int:
    return next((len(tensors[end]) for end in ("lora_down.weight", "hada_w1_b", "lokr_w2_b") if end in tensors), 1)


def _kronecker(state: Mapping[str, torch.Tensor], layer: torch.nn.Module) -> LokrModule:
    """A module with these factors, whose shapes it would choose otherwise."""
    own = {name.removeprefix("x."): tensor for name, tensor in state.items() if name.startswith("x.lokr")}
    whole = {"lokr_w1", "lokr_w2"} <= set(own)
    rank = 1 if whole else len(own.get("lokr_w2_b", own.get("lokr_w1_b")))
    module = LokrModule("x", layer, lora_dim=rank, alpha=float(state["x.alpha"]), full_matrix=whole)
    for name, tensor in own.items():
        setattr(module, name, torch.nn.Parameter(tensor))
    module.use_w1, module.use_w2, module.tucker = "lokr_w1" in own, "lokr_w2" in own, "lokr_t2" in own
    module.scale = module.scale if whole else float(state["x.alpha"]) / rank
    return module


@torch.no_grad()
def by_peft(tensors: Tensors, weight: np.ndarray, k: float) -> np.ndarray:
    """D f32 by peft's layer for a pair, and with dora_scale as its magnitudes."""
    down, up = tensors["lora_down.weight"], tensors["lora_up.weight"]
    magnitude = tensors.get("dora_scale")
    rank, dora = len(down), magnitude is not None
    config = LoraConfig(r=rank, lora_alpha=rank, use_dora=dora)
    kind = Linear if weight.ndim == 2 else Conv2d
    layer = kind(torch_layer(weight, weight.shape), "x", config, r=rank, lora_alpha=rank)
    layer.scaling["x"] = k
    for into, array in ((layer.lora_A, down), (layer.lora_B, up)):
        into["x"].weight.copy_(torch.tensor(np.asarray(array, np.float32)).reshape(into["x"].weight.shape))
    if magnitude is not None:
        own = layer.lora_magnitude_vector["x"].weight
        own.copy_(torch.tensor(np.asarray(magnitude, np.float32)).reshape(own.shape))
    if not dora:
        return layer.get_delta_weight("x").numpy()
    layer.merge()
    return layer.base_layer.weight.numpy() - weight


def distance(found: np.ndarray, expected: np.ndarray, scale: np.ndarray | None = None) -> float:
    """|found - expected| by the length of `scale`, or of what is expected."""
    assert found.shape == expected.shape
    assert np.isfinite(found).all()
    assert np.isfinite(expected).all()
    length = np.linalg.norm(expected if scale is None else scale)
    return float(np.linalg.norm(found.astype(np.float64) - expected) / max(length, 1e-30))


@pytest.mark.parametrize("form", [form for form in FORMS if form not in OLD])
def test_every_form_is_what_lycoris_makes_of_it(tmp_path, measure, form):
    file = write_adapter_file(tmp_path / "x.safetensors", "kohya", form, SMALL)
    adapter, worst = read_adapter(file.path, SMALL), 0.0
    one_of_each_shape = {found.module.shape: path for path, found in file.expected.items()}
    for path in one_of_each_shape.values():
        module, _, tensors, *_ = file.expected[path]
        weight = random_weight(module)
        expected = by_lycoris(tensors, weight)
        worst = max(worst, distance(adapter.updates[path].change(weight), expected))
    measure(f"LyCORIS, {form}", worst, BAR)


# What diffusers makes of files


@pytest.fixture(scope="module")
def base():
    """(parameters of SMALL, the same in diffusers' and transformers' modules)."""
    params = random_params(SMALL, seed=2)
    said = diffusers_json(SMALL)
    unet = diffusers.UNet2DConditionModel.from_config(said["unet/config.json"])
    text = CLIPTextModel(CLIPTextConfig(**said["text_encoder/config.json"]))
    state = {}
    for part, network in (("unet", unet), ("text", text)):
        before = "text_model." if any(name.startswith("text_model.") for name in network.state_dict()) else ""
        arrays = {}
        for entry in entries(SMALL, part, "diffusers"):
            leaves = [leaf_of(params[part], leaf) for leaf in entry.leaves]
            name = entry.name if part == "unet" else before + entry.name
            arrays[name] = torch.from_numpy(entry.from_leaves(leaves).copy())
        missing, unexpected = network.load_state_dict(arrays, strict=False)
        assert not unexpected
        assert all("position_ids" in name for name in missing)
        state[part] = {name: tensor.clone() for name, tensor in arrays.items()}
    return params, unet, text, state


def leaf_of(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


@pytest.fixture
def pipe(base):
    """A pipeline of diffusers with the base weights, whatever the test before did to it."""
    _, unet, text, state = base
    made = diffusers.StableDiffusionPipeline(
        vae=None,
        text_encoder=text,
        tokenizer=None,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    yield made
    made.unload_lora_weights()
    for part, network in (("unet", unet), ("text", text)):
        network.load_state_dict(state[part], strict=False)


def fused(pipe, config: ModelConfig = SMALL) -> dict[tuple[str, ...], np.ndarray]:
    """Every kernel of a pipeline with its adapters fused into it, by our paths, in PyTorch's layout."""
    pipe.fuse_lora(components=["unet", "text_encoder"])
    found = {}
    states = {}
    for part, network in (("unet", pipe.unet), ("text", pipe.text_encoder)):
        states[part] = {
            name.replace(".base_layer.", ".").removeprefix("text_model."): tensor
            for name, tensor in network.state_dict().items()
            if ".lora_" not in name
        }
    for module in modules(config):
        tensor = states[module.part][f"{module.name}.weight"]
        found[module.path] = tensor.numpy().reshape(module.shape).copy()
    return found


def compare(measure, name, pipe, params, wanted) -> None:
    """diffusers' weights and ours, by the length of what the adapters change."""
    theirs = fused(pipe)
    ours = merged(params, wanted, SMALL)
    worst, changed = 0.0, set()
    for module in modules(SMALL):
        before, after = (in_torch_layout(leaf_of(tree, module.path), module.shape) for tree in (params, ours))
        if np.array_equal(before, theirs[module.path]):
            np.testing.assert_array_equal(before, after, err_msg=f"{module.name}, which diffusers leaves as it is")
        else:
            changed.add(module.path)
            worst = max(worst, distance(after, theirs[module.path], theirs[module.path] - before))
    assert changed == {path for adapter, _ in wanted for path in adapter.updates}
    measure(name, worst, BAR)


def in_torch_layout(leaf: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    axes = (3, 2, 0, 1) if leaf.ndim == 4 else tuple(range(leaf.ndim))[::-1]
    return leaf.transpose(axes).reshape(shape)


# of alphas that differ between the modules of a file by kohya, diffusers 0.42 takes the most frequent, with a warning
READ_BY_DIFFUSERS = (
    ("kohya", "LoRA, one alpha"),
    ("kohya", "LoRA, without alpha"),
    ("kohya, te1", "LoRA, one alpha"),
    ("diffusers 0.15", "LoRA, without alpha"),
    ("diffusers 0.18", "LoRA, without alpha"),
    ("diffusers, peft", "LoRA, without alpha"),
)


@pytest.mark.parametrize(("naming", "form"), READ_BY_DIFFUSERS)
def test_merged_weights_are_those_of_diffusers(tmp_path, measure, base, pipe, naming, form):
    file = write_adapter_file(tmp_path / "x.safetensors", naming, form, SMALL)
    pipe.load_lora_weights(str(tmp_path), weight_name="x.safetensors")
    adapter = read_adapter(file.path, SMALL)
    compare(measure, f"diffusers, {naming}, {form}", pipe, base[0], [(adapter, Strength(1.0, 1.0))])


# transformers 5 leaves the magnitudes of a text encoder as they are initialised
@pytest.mark.parametrize("how", [{}, {"rslora": True}, {"dora": True, "parts": ("unet",)}], ids=str)
def test_files_that_describe_themselves_are_merged_as_by_diffusers(tmp_path, measure, base, pipe, how):
    file = write_described(tmp_path / "x.safetensors", SMALL, **how)
    pipe.load_lora_weights(str(tmp_path), weight_name="x.safetensors")
    adapter = read_adapter(file.path, SMALL)
    name = f"diffusers, described{''.join(f', {key}' for key in how)}"
    compare(measure, name, pipe, base[0], [(adapter, Strength(1.0, 1.0))])


def test_two_adapters_of_their_own_weights_are_merged_as_by_diffusers(tmp_path, measure, base, pipe):
    wanted = []
    for n, (form, weight) in enumerate((("LoRA, one alpha", 0.7), ("LoRA, without alpha", -0.3))):
        file = write_adapter_file(tmp_path / f"{n}.safetensors", "kohya", form, SMALL, seed=n)
        pipe.load_lora_weights(str(tmp_path), weight_name=file.path.name, adapter_name=f"n{n}")
        wanted.append((read_adapter(file.path, SMALL), Strength(weight, weight)))
    pipe.set_adapters(["n0", "n1"], [0.7, -0.3])
    compare(measure, "diffusers, two adapters", pipe, base[0], wanted)


@pytest.mark.parametrize("naming", ["diffusers 0.11", "hand-made", "generic"])
def test_what_we_write_is_read_by_diffusers_wherever_it_came_from(tmp_path, measure, base, pipe, naming):
    file = write_adapter_file(tmp_path / "x.safetensors", naming, "LoRA, without alpha", SMALL)
    adapter = read_adapter(file.path, SMALL)
    write_adapter(tmp_path / "y.safetensors", adapter, SMALL)
    pipe.load_lora_weights(str(tmp_path), weight_name="y.safetensors")
    compare(measure, f"diffusers, written from {naming}", pipe, base[0], [(adapter, Strength(1.0, 1.0))])


# A folder of files


FOLDER = os.environ.get("SDJAX_ADAPTERS")
FILES = (".safetensors", ".pt", ".bin", ".ckpt", ".png", ".webp")
CONFIGS = (SD15, without_unused_layers(SD21), TINY, SMALL)
"""The models that a file may be for; the first that it fits."""

READS_WEIGHT = ("oft_blocks", "oft_diag", "weight", "a1.weight", "dora_scale")
"""Tensors of the forms whose change depends on W."""


def _embedding(write, array):
    return lambda path: write(path, array)


VECTORS = embedding_files.vectors(2, 64)

WRITTEN = {
    **{
        f"{re.sub('[^a-z0-9]+', '_', f'{naming} {form}'.lower())}.safetensors": (
            lambda path, naming=naming, form=form: write_adapter_file(path, naming, form, SMALL, dtype=np.float16)
        )
        for naming, rule in NAMINGS.items()
        for form in (rule.forms if naming == "kohya" else rule.forms[:1])
        if form not in OLD and "1e10" not in form
    },
    "described.safetensors": lambda path: write_described(path, SMALL),
    "described_rslora.safetensors": lambda path: write_described(path, SMALL, rslora=True),
    "described_dora.safetensors": lambda path: write_described(path, SMALL, dora=True),
    "peft_folder": lambda path: write_peft_folder(path, SMALL, "unet"),
    "peft_folder_text": lambda path: write_peft_folder(path, SMALL, "text", rslora=True),
    "peft_folder_pickled": lambda path: write_peft_folder(path, SMALL, "unet", dora=True, pickled=True),
    "numbered.safetensors": lambda path: write_numbered(path, SMALL, {"<s1>": VECTORS[0]}),
    "listed.pt": lambda path: write_listed(path, SMALL, "unet"),
    "listed.text_encoder.pt": lambda path: write_listed(path, SMALL, "text"),
    "embedding_a1111.pt": _embedding(embedding_files.write_web_ui, VECTORS),
    "embedding_diffusers.bin": lambda path: embedding_files.write_torch(path, {"<frog>": VECTORS[0]}),
    "embedding_picture.png": lambda path: embedding_files.write_text_picture(
        path, embedding_files.picture_json(VECTORS)
    ),
}


def found_files() -> list[str]:
    """The names of the files to be read."""
    if FOLDER is None:
        return list(WRITTEN)
    paths = sorted(Path(FOLDER).iterdir())
    return [
        path.name
        for path in paths
        if (path / "adapter_config.json").is_file() or (path.is_file() and path.suffix.lower() in FILES)
    ]


def load(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """All tensors of a file as f32, and its metadata, by the libraries that wrote it."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    else:
        state, metadata = torch.load(path, weights_only=True, map_location="cpu"), {}
        tensors = dict(enumerate(state)) if isinstance(state, list) else state
    arrays = {str(name): t.detach().float().numpy() for name, t in tensors.items() if isinstance(t, torch.Tensor)}
    return arrays, metadata


@lru_cache(maxsize=8)
def all_names(config: ModelConfig) -> dict[str, tuple[Module, str]]:
    """Every name that a tensor may have in a file that is no list -> its module, and LyCORIS' ending."""
    ends = {"alpha", "dora_scale", "diff", "diff_b", "w_norm", "b_norm", "weight", "on_input", "rescale"}
    ends |= {"lora_down.weight", "lora_up.weight", "lora_mid.weight", "oft_blocks", "oft_diag"}
    ends |= {f"hada_{x}" for x in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")}
    ends |= {f"lokr_{x}" for x in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")}
    ends |= {f"{x}.weight" for x in ("a1", "a2", "b1", "b2")}
    found = {}
    for rule in NAMINGS.values():
        pairs_only = rule.forms[0] == "LoRA, without alpha"
        for module in modules(config):
            for end in ("lora_down.weight", "lora_up.weight") if pairs_only else ends:
                if module.part in rule.parts and rule.only(module):
                    found[rule.name(module, end)] = module, end
    for module in modules(config):
        for part, prefix in (("unet", ""), ("text", "text_model."), ("text", "")):
            if part == module.part:
                for kind, end in (("lora_A", "lora_down.weight"), ("lora_B", "lora_up.weight")):
                    for adapter in ("", ".default"):
                        found[f"base_model.model.{prefix}{module.name}.{kind}{adapter}.weight"] = module, end
        names = ("unet.",) if module.part == "unet" else ("text_encoder.text_model.", "text_encoder.")
        names += ("base_model.model.", "base_model.model.text_model.")
        for name in names:
            for adapter in ("", ".default", ".weight", ".default.weight"):
                found[f"{name}{module.name}.lora_magnitude_vector{adapter}"] = module, "dora_scale"
    return found


def grouped(tensors: Tensors, config: ModelConfig) -> dict[Module, dict[str, np.ndarray]]:
    """The tensors of each module by LyCORIS' endings, those left out that are no module's."""
    known = all_names(config)
    counted = {part: numbered_modules(config, part) for part in ("unet", "text")}
    found: dict[Module, dict[str, np.ndarray]] = {}
    listed = all(name.isdigit() for name in tensors)
    for name, array in tensors.items():
        number = re.fullmatch(r"(unet|text_encoder):(\d+):(up|down)", name)
        if number and int(number[2]) >= len(counted["unet" if number[1] == "unet" else "text"]):
            return {}
        if name in known:
            module, end = known[name]
        elif number:
            module = counted["unet" if number[1] == "unet" else "text"][int(number[2])]
            end = f"lora_{number[3]}.weight"
        elif listed:
            part = next((part for part in counted if len(tensors) == 2 * len(counted[part])), None)
            if part is None:
                return {}
            module, end = counted[part][int(name) // 2], ("lora_up.weight", "lora_down.weight")[int(name) % 2]
        else:
            continue
        found.setdefault(module, {})[end] = array
    return found


def said_of(path: Path, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """peft's configuration for each part, from the folder or the header."""
    if path.is_dir():
        settings = json.loads((path / "adapter_config.json").read_text())
        return {"unet": settings, "text": settings}
    found: dict[str, dict[str, Any]] = {}
    for key, value in json.loads(metadata.get("lora_adapter_metadata", "{}")).items():
        part, _, name = key.partition(".")
        found.setdefault("text" if part == "text_encoder" else part, {})[name] = value
    return found


def k_of(module: Module, tensors: Tensors, settings: dict[str, Any] | None) -> float:
    """What a pair is multiplied by: alpha's tensor, or what peft's own rules say."""
    rank = len(tensors["lora_down.weight"])
    if "alpha" in tensors:
        return float(tensors["alpha"].ravel()[0]) / rank
    if not settings:
        return 1.0
    pattern = settings.get("alpha_pattern") or {}
    alpha = pattern.get(get_pattern_key(pattern, module.name), settings["lora_alpha"])
    return alpha / (rank**0.5 if settings.get("use_rslora") else rank)


def expected_change(
    module: Module, tensors: Tensors, weight: np.ndarray, settings: dict[str, Any] | None
) -> np.ndarray:
    """D by peft for what it has a layer for, else by LyCORIS."""
    from_peft = (
        "dora_scale" in tensors and "alpha" not in tensors and tensors["dora_scale"].shape[:2] != (module.shape[0], 1)
    )
    if (
        "lora_down.weight" in tensors
        and "lora_mid.weight" not in tensors
        and ("dora_scale" not in tensors or from_peft)
    ):
        return by_peft(tensors, weight, k_of(module, tensors, settings))
    return by_lycoris(tensors, weight)


@pytest.mark.parametrize("name", found_files())
def test_files_that_people_have_mean_what_peft_and_lycoris_make_of_them(tmp_path, measure, name):
    if FOLDER is None:
        path = tmp_path / name
        WRITTEN[name](path)
    else:
        path = Path(FOLDER) / name
    inside = ("adapter_model.safetensors", "adapter_model.bin")
    file = next(path / own for own in inside if (path / own).is_file()) if path.is_dir() else path
    adapter, config, reason = None, None, ""
    for config in CONFIGS:
        try:
            adapter = read_adapter(path, config)
            break
        except CheckpointError as error:
            reason = reason or str(error)
    if adapter is None:
        check_embedding(path, reason, measure)
        return
    tensors, metadata = load(file)
    expected, said = grouped(tensors, config), said_of(path, metadata)
    assert {module.path for module in expected} == set(adapter.updates)
    forms, worst = {}, 0.0
    for module, own in expected.items():
        update = adapter.updates[module.path]
        forms[update.form] = forms.get(update.form, 0) + 1
        reads = any(end in own for end in READS_WEIGHT)
        weight = random_weight.__wrapped__(module) if reads else np.zeros(module.shape, np.float32)
        if set(own) <= {"diff_b"}:
            continue
        change = expected_change(module, own, weight, said.get(module.part))
        worst = max(worst, distance(update.change(weight), change, weight if reads else None))
    listed = ", ".join(f"{form} {count}" for form, count in forms.items())
    embeddings = f", textual inversion {len(adapter.embeddings)}" if adapter.embeddings else ""
    print(f"{name}: {config.name}, {listed} modules{embeddings}, error {worst:.1e}")
    measure(f"{name[:26]}: {listed}{embeddings}", worst, BAR)


def check_embedding(path: Path, reason: str, measure) -> None:
    """A file that is no adapter: learnt words, or refused in one line."""
    widths = tuple({config.clip.width for config in CONFIGS})
    try:
        found = read_embeddings(path, widths)
    except CheckpointError:
        tensors, _ = load(path)
        for config in CONFIGS:
            fitting = sum(len(own) for own in grouped(tensors, config).values())
            assert fitting < len(tensors), f"{path.name}: {config.name} has all of its modules, but {reason}"
        print(f"{path.name}: refused: {reason}")
        return
    print(f"{path.name}: textual inversion, {', '.join(f'{e.name} {e.vectors.shape}' for e in found)}")
    measure(f"{path.name[:26]}: textual inversion", 0.0, BAR)
