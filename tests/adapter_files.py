"""Writers of adapter files: every form that people have, in every naming, and what each file does to the weights.

A form is a row of `FORMS`: how its tensors are made, by the names that LyCORIS gives them, and the change D of W that
they mean, worked out in float64 on its own. A naming is a row of `NAMINGS`: how a file calls those tensors.
`write_adapter_file` puts the two together.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import torch

from convert.names import Part, entries
from sdjax.config import ModelConfig
from tests.checkpoint_files import to_torch, write_safetensors

Tensors = Mapping[str, np.ndarray]
TreePath = tuple[str, ...]

RANK = 4


# The modules of a model


class Module(NamedTuple):
    """A module that adapters change.

    part: "unet" or "text". name: in diffusers' spelling, without its part. old: in CompVis' spelling (UNet).
    kind: "linear", "pointwise" (a 1x1 convolution in files), "conv" or "norm". shape: of its weight in PyTorch.
    path, bias: the leaves of the tree.
    """

    part: str
    name: str
    old: str
    kind: str
    shape: tuple[int, ...]
    path: TreePath
    bias: TreePath | None


@lru_cache(maxsize=8)
def modules(config: ModelConfig) -> tuple[Module, ...]:
    """Every module of the UNet and the text encoder, in the order of the tree's names."""
    found = []
    parts: tuple[Part, ...] = ("unet", "text")
    for part in parts:
        new = {entry.leaves[0]: entry for entry in entries(config, part, "diffusers")}
        old = {
            entry.leaves[0]: entry.name for entry in entries(config, part, "compvis" if part == "unet" else "diffusers")
        }
        for leaf, entry in new.items():
            if leaf[-1] not in ("kernel", "scale"):
                continue
            kind = {1: "norm", 2: "linear"}.get(len(entry.shape), "pointwise" if entry.shape[2:] == (1, 1) else "conv")
            bias = (part, *leaf[:-1], "bias") if (*leaf[:-1], "bias") in new else None
            names = (entry.name.removesuffix(".weight"), old[leaf].removesuffix(".weight"))
            found.append(Module(part, *names, kind, entry.shape, (part, *leaf), bias))
    return tuple(found)


def is_attention(module: Module) -> bool:
    """Whether it is one of the four linear maps of an attention layer in a transformer."""
    return ".attn" in module.name or "self_attn" in module.name


def numbered_modules(config: ModelConfig, part: str) -> list[Module]:
    """The modules that cloneofsimo's files count, in their order: see his `inject_trainable_lora`.

    UNet: the transformers on the way down, on the way up and then the one in the middle, in each the first attention,
    the first linear map of the feed-forward part, the second attention. Text: k, v, q, out of every layer.
    """
    if part == "text":
        by_name = {module.name: module for module in modules(config) if module.part == "text"}
        ends = ("k_proj", "v_proj", "q_proj", "out_proj")
        return [by_name[f"encoder.layers.{i}.self_attn.{end}"] for i in range(config.clip.layers) for end in ends]
    in_layer = [f"attn1.to_{x}" for x in ("q", "k", "v", "out.0")] + ["ff.net.0.proj"]
    in_layer += [f"attn2.to_{x}" for x in ("q", "k", "v", "out.0")]
    by_name = {module.name: module for module in modules(config) if module.part == "unet"}
    layers: dict[str, list[str]] = {"down_blocks": [], "up_blocks": [], "mid_block": []}
    for name in by_name:
        before, dot, rest = name.partition(".attn1.to_q")
        if dot and not rest:
            layers[name.partition(".")[0]].append(before)
    return [by_name[f"{layer}.{name}"] for group in layers.values() for layer in group for name in in_layer]


# Forms: tensors, and the change that they mean


Make = Callable[[np.random.Generator, tuple[int, ...]], dict[str, np.ndarray]]
Change = Callable[[Tensors, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Form:
    """One form of adapter.

    form: as the reader calls it. kinds: of modules that can have it. make: (generator, shape of W) -> tensors by
    LyCORIS' names. change: (tensors f64, W f64) -> D.
    """

    form: str
    kinds: tuple[str, ...]
    make: Make
    change: Change


def _normal(rng: np.random.Generator, *shape: int, size: float = 0.1) -> np.ndarray:
    return (rng.standard_normal(shape) * size).astype(np.float32)


def _scalar(value: float) -> np.ndarray:
    return np.array(value, np.float32)


def _k(t: Tensors, rank: int) -> float:
    return float(np.ravel(t["alpha"])[0]) / rank if "alpha" in t else 1.0


def _rows(array: np.ndarray) -> np.ndarray:
    return array.reshape(array.shape[0], -1)


def _lora_change(t: Tensors, w: np.ndarray) -> np.ndarray:
    down, up = _rows(t["lora_down.weight"]), _rows(t["lora_up.weight"])
    return _k(t, len(down)) * (up @ down).reshape(w.shape)


def _tucker_change(t: Tensors, w: np.ndarray) -> np.ndarray:
    down, up = _rows(t["lora_down.weight"]), _rows(t["lora_up.weight"])
    d = np.zeros(w.shape)
    for y, x in np.ndindex(w.shape[2:]):
        d[:, :, y, x] = up @ t["lora_mid.weight"][:, :, y, x] @ down
    return _k(t, len(down)) * d


def _core(t: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """C[o, i, y, x] = sum_pq t[p, q, y, x] a[p, o] b[q, i]."""
    d = np.zeros((a.shape[1], b.shape[1], *t.shape[2:]))
    for y, x in np.ndindex(t.shape[2:]):
        d[:, :, y, x] = a.T @ t[:, :, y, x] @ b
    return d


def _loha_change(t: Tensors, w: np.ndarray) -> np.ndarray:
    halves = []
    for n in "12":
        a, b = t[f"hada_w{n}_a"], t[f"hada_w{n}_b"]
        halves.append(_core(t[f"hada_t{n}"], a, b) if f"hada_t{n}" in t else (a @ b).reshape(w.shape))
    return _k(t, len(t["hada_w1_b"])) * halves[0] * halves[1]


def _lokr_change(t: Tensors, w: np.ndarray) -> np.ndarray:
    w1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    if "lokr_t2" in t:
        w2 = _core(t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
    else:
        w2 = t["lokr_w2"] if "lokr_w2" in t else t["lokr_w2_a"] @ t["lokr_w2_b"]
    w2 = w2.reshape(w.shape[0] // w1.shape[0], w.shape[1] // w1.shape[1], *w.shape[2:])
    d = np.zeros(w.shape)
    if w.ndim == 2:
        d = np.kron(w1, w2)
    else:
        for y, x in np.ndindex(w.shape[2:]):
            d[:, :, y, x] = np.kron(w1, w2[:, :, y, x])
    factored = next((t[name] for name in ("lokr_w2_b", "lokr_w1_b") if name in t), None)
    return d if factored is None else _k(t, len(factored)) * d


def _ia3_change(t: Tensors, w: np.ndarray) -> np.ndarray:
    d = w.copy()
    for n, factor in enumerate(t["weight"].ravel()):
        if t["on_input"]:
            d[:, n] *= factor
        else:
            d[n] *= factor
    return d


def _full_change(t: Tensors, w: np.ndarray) -> np.ndarray:
    return t["diff"].reshape(w.shape) if "diff" in t else np.zeros(w.shape)


def _oft_change(t: Tensors, w: np.ndarray) -> np.ndarray:
    d = np.empty(w.shape)
    if "oft_diag" in t:
        rotations = t["oft_diag"]
    else:
        q = t["oft_blocks"] - t["oft_blocks"].transpose(0, 2, 1)
        bound = float(np.ravel(t["alpha"])[0]) * w.shape[0]
        length = np.sqrt(np.sum(q * q)) + 1e-8
        if 0 < bound < length:
            q = q * bound / length
        one = np.eye(q.shape[1])
        rotations = np.stack([(one + block) @ np.linalg.inv(one - block) for block in q])
    size = rotations.shape[1]
    for k, rotation in enumerate(rotations):
        rows = slice(k * size, (k + 1) * size)
        d[rows] = (rotation.T @ w[rows].reshape(size, -1)).reshape(w[rows].shape)
    if "rescale" in t:
        d *= t["rescale"].reshape(-1, *[1] * (w.ndim - 1))
    return d - w


def _glora_change(t: Tensors, w: np.ndarray) -> np.ndarray:
    a1, a2, b1, b2 = (t[f"{name}.weight"] for name in ("a1", "a2", "b1", "b2"))
    flat = _rows(w)
    if a1.shape == (flat.shape[1], RANK):
        d = b1 @ b2 + flat @ a1 @ a2
    else:
        d = b2 @ b1 + flat @ a2 @ a1
    return _k(t, RANK) * d.reshape(w.shape)


def _dora(change: Change) -> Change:
    """The norm of each row, or of each column, of W + D becomes dora_scale's."""

    def normalised(t: Tensors, w: np.ndarray) -> np.ndarray:
        v = w + change(t, w)
        m = t["dora_scale"]
        for n in range(v.shape[0] if m.shape[0] != 1 else v.shape[1]):
            row = v[n] if m.shape[0] != 1 else v[:, n]
            row *= m.ravel()[n] / length(row)
        return v - w

    return normalised


def _lora(flat: bool | None = None, alphas: Sequence[float] = (1, 3, 8)) -> Make:
    """flat: whether the pair is 2-D on a 1x1 convolution, or 4-D on a linear map; None: as W is. alphas: any."""

    def make(rng: np.random.Generator, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        kernel = shape[2:] if flat is None else () if flat else (1, 1)
        ones = (1,) * len(kernel)
        found = {
            "lora_down.weight": _normal(rng, RANK, shape[1], *kernel),
            "lora_up.weight": _normal(rng, shape[0], RANK, *ones),
        }
        return found | ({"alpha": _scalar(rng.choice(alphas))} if alphas else {})

    return make


def _tucker(rng: np.random.Generator, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {
        "lora_down.weight": _normal(rng, RANK, shape[1], 1, 1),
        "lora_up.weight": _normal(rng, shape[0], RANK, 1, 1),
        "lora_mid.weight": _normal(rng, RANK, RANK, *shape[2:]),
        "alpha": _scalar(2),
    }


def _loha(rng: np.random.Generator, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    inner = int(np.prod(shape[1:]))
    found = {}
    for n in "12":
        found[f"hada_w{n}_a"] = _normal(rng, shape[0], RANK)
        found[f"hada_w{n}_b"] = _normal(rng, RANK, inner, size=1)
    return found | {"alpha": _scalar(1)}


def _loha_tucker(rng: np.random.Generator, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    found = {}
    for n in "12":
        found[f"hada_t{n}"] = _normal(rng, RANK, RANK, *shape[2:], size=0.3)
        found[f"hada_w{n}_a"] = _normal(rng, RANK, shape[0], size=1)
        found[f"hada_w{n}_b"] = _normal(rng, RANK, shape[1], size=1)
    return found | {"alpha": _scalar(1)}


def _lokr(first: str, second: str, alpha: float = 2) -> Make:
    """first, second: how the two factors are stored: "whole", "pair" or "tucker". The first is [4, 2]."""

    def make(rng: np.random.Generator, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        o1, i1 = 4, 2
        o2, i2 = shape[0] // o1, shape[1] // i1
        inner = int(np.prod(shape[2:], dtype=int))
        found = (
            {"lokr_w1": _normal(rng, o1, i1, size=1)}
            if first == "whole"
            else {"lokr_w1_a": _normal(rng, o1, 2, size=1), "lokr_w1_b": _normal(rng, 2, i1, size=1)}
        )
        if second == "whole":
            found["lokr_w2"] = _normal(rng, o2, i2, *shape[2:])
        elif second == "pair":
            found |= {"lokr_w2_a": _normal(rng, o2, RANK), "lokr_w2_b": _normal(rng, RANK, i2 * inner)}
        else:
            found["lokr_t2"] = _normal(rng, RANK, RANK, *shape[2:])
            found |= {"lokr_w2_a": _normal(rng, RANK, o2, size=1), "lokr_w2_b": _normal(rng, RANK, i2, size=1)}
        return found | {"alpha": _scalar(alpha)}

    return make


def _ia3(on_input: bool, flag: Any = bool) -> Make:
    """flag: the dtype of on_input. LyCORIS' weight for a convolution is [1, n, 1, 1], of outputs and inputs alike."""

    def make(rng: np.random.Generator, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        size = shape[1 if on_input else 0]
        axes = (size,) if len(shape) == 2 else (1, size, *[1] * (len(shape) - 2))
        return {"weight": _normal(rng, *axes), "on_input": np.array(on_input, flag)}

    return make


def _full(weight: bool, bias: bool) -> Make:
    def make(rng: np.random.Generator, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        found = {"diff": _normal(rng, *shape)} if weight else {}
        return found | ({"diff_b": _normal(rng, shape[0])} if bias else {})

    return make


def _norm(rng: np.random.Generator, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {"w_norm": _normal(rng, *shape), "b_norm": _normal(rng, *shape)}


def _with_magnitude(make: Make, by_input: bool) -> Make:
    def normalised(rng: np.random.Generator, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        ones = (1,) * (len(shape) - 2)
        size = (1, shape[1], *ones) if by_input else (shape[0], 1, *ones)
        return make(rng, shape) | {"dora_scale": rng.uniform(0.5, 2, size).astype(np.float32)}

    return normalised


def _oft(constraint: float, rescale: bool = False) -> Make:
    def make(rng: np.random.Generator, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        found = {"oft_blocks": _normal(rng, shape[0] // 4, 4, 4, size=0.2), "alpha": _scalar(constraint)}
        if rescale:
            found["rescale"] = 1 + _normal(rng, shape[0], *[1] * (len(shape) - 1))
        return found

    return make


def _oft_diag(rng: np.random.Generator, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    turned = np.linalg.qr(rng.standard_normal((shape[0] // 4, 4, 4)))[0]
    return {"oft_diag": turned.astype(np.float32), "alpha": _scalar(0)}


def _glora(old: bool) -> Make:
    def make(rng: np.random.Generator, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        o, i = shape[:2]
        sizes = {"a1": (i, RANK), "a2": (RANK, i), "b1": (o, RANK), "b2": (RANK, i)}
        if old:
            sizes = {"a1": (RANK, i), "a2": (i, RANK), "b1": (RANK, i), "b2": (o, RANK)}
        return {f"{name}.weight": _normal(rng, *size) for name, size in sizes.items()} | {"alpha": _scalar(2)}

    return make


FLAT, ALL = ("linear", "pointwise"), ("linear", "pointwise", "conv")

FORMS: dict[str, Form] = {
    "LoRA, linear": Form("lora", ("linear",), _lora(), _lora_change),
    "LoRA, without alpha": Form("lora", ALL, _lora(alphas=()), _lora_change),
    "LoRA, one alpha": Form("lora", ALL, _lora(alphas=(3,)), _lora_change),
    "LoRA, 1x1 convolution": Form("lora", ("pointwise",), _lora(), _lora_change),
    "LoRA, 1x1 convolution as a matrix": Form("lora", ("pointwise",), _lora(flat=True), _lora_change),
    "LoRA, linear as a 1x1 convolution": Form("lora", ("linear",), _lora(flat=False), _lora_change),
    "LoCon": Form("lora", ("conv",), _lora(), _lora_change),
    "LoCon, Tucker": Form("lora", ("conv",), _tucker, _tucker_change),
    "LoHa": Form("loha", ALL, _loha, _loha_change),
    "LoHa, Tucker": Form("loha", ("conv",), _loha_tucker, _loha_change),
    "LoKr, both whole": Form("lokr", ALL, _lokr("whole", "whole"), _lokr_change),
    "LoKr, both whole, alpha 1e10": Form("lokr", FLAT, _lokr("whole", "whole", 1e10), _lokr_change),
    "LoKr, second factored": Form("lokr", ALL, _lokr("whole", "pair"), _lokr_change),
    "LoKr, first factored": Form("lokr", ALL, _lokr("pair", "whole"), _lokr_change),
    "LoKr, both factored": Form("lokr", ALL, _lokr("pair", "pair"), _lokr_change),
    "LoKr, Tucker": Form("lokr", ("conv",), _lokr("whole", "tucker"), _lokr_change),
    "(IA)3 on outputs": Form("ia3", ALL, _ia3(False), _ia3_change),
    "(IA)3 on inputs": Form("ia3", ALL, _ia3(True), _ia3_change),
    "(IA)3, the flag a number": Form("ia3", ALL, _ia3(True, np.int64), _ia3_change),
    "full": Form("full", ALL, _full(True, False), _full_change),
    "full with bias": Form("full", ALL, _full(True, True), _full_change),
    "norm": Form("norm", ("norm",), _norm, lambda t, w: t["w_norm"]),
    "DoRA by outputs": Form("lora", ALL, _with_magnitude(_lora(), False), _dora(_lora_change)),
    "DoRA by inputs": Form("lora", ALL, _with_magnitude(_lora(), True), _dora(_lora_change)),
    "DoRA, Tucker": Form("lora", ("conv",), _with_magnitude(_tucker, False), _dora(_tucker_change)),
    "DoRA of LoHa": Form("loha", ALL, _with_magnitude(_loha, False), _dora(_loha_change)),
    "DoRA of LoKr": Form("lokr", ALL, _with_magnitude(_lokr("whole", "pair"), True), _dora(_lokr_change)),
    "OFT": Form("oft", ALL, _oft(0), _oft_change),
    "OFT, constrained": Form("oft", ALL, _oft(1e-2), _oft_change),
    "OFT, rescaled": Form("oft", ALL, _oft(0, rescale=True), _oft_change),
    "OFT, old": Form("oft", ALL, _oft_diag, _oft_change),
    "GLoRA": Form("glora", ("linear",), _glora(False), _glora_change),
    "GLoRA, old": Form("glora", ("linear",), _glora(True), _glora_change),
}
"""Every form of files by LyCORIS and kohya."""


# Namings


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _kohya(
    unet: str = "lora_unet_", text: str = "lora_te_text_model_", old: bool = False
) -> Callable[[Module, str], str]:
    def name(module: Module, end: str) -> str:
        own = module.old if old else module.name
        return f"{unet if module.part == 'unet' else text}{_flat(own)}.{end}"

    return name


def _processor(unet: str) -> Callable[[Module, str], str]:
    """diffusers 0.11 to 0.17: no .0 after to_out, and UNet's names of q, k, v, out in the text encoder."""

    def name(module: Module, end: str) -> str:
        before, _, own = module.name.removesuffix(".0").rpartition(".")
        end = end.removeprefix("lora_")
        if module.part == "unet":
            return f"{unet}{before}.processor.{own}_lora.{end}"
        return f"text_encoder.text_model.{before}.to_{own.removesuffix('_proj')}_lora.{end}"

    return name


def _layers(module: Module, end: str) -> str:
    """diffusers 0.18 to 0.20."""
    end = end.removeprefix("lora_")
    if module.part == "unet":
        return f"unet.{module.name}.lora.{end}"
    return f"text_encoder.text_model.{module.name}.lora_linear_layer.{end}"


PEFT = {
    "lora_down.weight": "lora_A.weight",
    "lora_up.weight": "lora_B.weight",
    "dora_scale": "lora_magnitude_vector",
}


def _peft(unet: str, text: str, adapter: str = "") -> Callable[[Module, str], str]:
    """adapter: its name within peft, which files saved by hand still have."""

    def name(module: Module, end: str) -> str:
        kind, dot, weight = PEFT[end].partition(".")
        inside = f"{kind}{adapter}{dot}{weight}" + (".weight" if adapter and not dot else "")
        return f"{unet if module.part == 'unet' else text}{module.name}.{inside}"

    return name


def _generic(module: Module, end: str) -> str:
    if module.part == "unet":
        return f"diffusion_model.{module.old}.{end}"
    return f"text_encoders.clip_l.transformer.text_model.{module.name}.{end}"


def _hand_made(module: Module, end: str) -> str:
    """Somebody's converter replaced the dots of `_layers`."""
    own = _layers(module, end).replace(".lora.", ".lora_")
    own, _, weight = own.rpartition(".")
    return f"lora_unet_{_flat(own)}.{weight}"


@dataclass(frozen=True)
class Naming:
    """How a file calls its tensors.

    name: (module, LyCORIS' ending) -> the tensor's name. forms: names of `FORMS` that files of this kind hold.
    parts: of the model. only: which modules. metadata: of the header.
    """

    name: Callable[[Module, str], str]
    forms: tuple[str, ...]
    parts: tuple[str, ...] = ("unet", "text")
    only: Callable[[Module], bool] = lambda module: True
    metadata: Mapping[str, str] = field(default_factory=dict)


EVERY = tuple(FORMS)
PAIRS = ("LoRA, without alpha",)
KOHYA = {"ss_network_module": "networks.lora", "ss_network_dim": "4", "ss_network_alpha": "2"}
PLAIN = {"format": "pt"}

NAMINGS: dict[str, Naming] = {
    "kohya": Naming(_kohya(), EVERY, metadata=KOHYA),
    "kohya, CompVis names": Naming(_kohya(old=True), EVERY, metadata=KOHYA),
    "kohya, te1": Naming(_kohya(text="lora_te1_text_model_"), EVERY, metadata=KOHYA),
    "generic": Naming(_generic, EVERY),
    "SimpleTuner": Naming(
        _kohya("lycoris_"), tuple(name for name in EVERY if FORMS[name].form != "lora"), parts=("unet",), metadata=PLAIN
    ),
    "SD-scripts OFT": Naming(_kohya("oft_unet_"), ("OFT", "OFT, constrained"), parts=("unet",), metadata=KOHYA),
    "diffusers 0.11": Naming(_processor(""), PAIRS, parts=("unet",), only=is_attention, metadata=PLAIN),
    "diffusers 0.15": Naming(_processor("unet."), PAIRS, only=is_attention, metadata=PLAIN),
    "diffusers 0.18": Naming(_layers, PAIRS, only=is_attention, metadata=PLAIN),
    "diffusers, peft": Naming(_peft("unet.", "text_encoder.text_model."), PAIRS, metadata=PLAIN),
    "diffusers, transformers 5": Naming(_peft("unet.", "text_encoder."), PAIRS, metadata=PLAIN),
    "peft in memory": Naming(_peft("unet.", "text_encoder.text_model.", ".default"), PAIRS),
    "hand-made": Naming(_hand_made, PAIRS, parts=("unet",), only=is_attention),
}
"""Those of single files whose names say what each tensor is."""


# Files


class Expected(NamedTuple):
    """What a file does to one module. change: W f64, in PyTorch's layout -> D. bias: what is added to the bias."""

    module: Module
    form: str
    tensors: Mapping[str, np.ndarray]
    change: Callable[[np.ndarray], np.ndarray]
    bias: np.ndarray | None


@dataclass(frozen=True)
class AdapterFile:
    """A file that was written, and what it does. expected: by the kernel's leaf."""

    path: Path
    expected: dict[TreePath, Expected]
    tensors: dict[str, np.ndarray]


def expected_of(module: Module, form: Form, tensors: Tensors, k: float | None = None) -> Expected:
    """k: where the file says the scale by other means than alpha."""
    exact = {name: np.asarray(array).astype(np.float64) for name, array in tensors.items()}
    if k is not None:
        exact["alpha"] = np.array(k * RANK)
    bias = next((exact[name] for name in ("diff_b", "b_norm") if name in exact), None)
    return Expected(module, form.form, tensors, lambda w: form.change(exact, w), bias)


def stored(tensors: Tensors, dtype: Any) -> dict[str, np.ndarray]:
    """Tensors in a file's dtype, flags aside."""
    return {name: array if array.dtype.kind in "bi" else array.astype(dtype) for name, array in tensors.items()}


def made(
    form: str, config: ModelConfig, *, seed: int = 0, dtype: Any = np.float32, naming: Naming | None = None
) -> dict[Module, dict[str, np.ndarray]]:
    """The tensors of a form for every module that can have it, by LyCORIS' names."""
    found, rng = {}, np.random.default_rng(seed)
    for module in modules(config):
        taken = naming is None or (module.part in naming.parts and naming.only(module))
        if taken and module.kind in FORMS[form].kinds:
            tensors = FORMS[form].make(rng, module.shape)
            if module.bias is None:
                tensors.pop("diff_b", None)
            found[module] = stored(tensors, dtype)
    return found


def write_adapter_file(
    path: Path, naming: str, form: str, config: ModelConfig, *, seed: int = 0, dtype: Any = np.float32
) -> AdapterFile:
    """A .safetensors with one form in every module that can have it."""
    rule = NAMINGS[naming]
    tensors: dict[str, np.ndarray] = {}
    expected = {}
    for module, own in made(form, config, seed=seed, dtype=dtype, naming=rule).items():
        tensors |= {rule.name(module, end): array for end, array in own.items()}
        expected[module.path] = expected_of(module, FORMS[form], own)
    write_safetensors(path, tensors, metadata=dict(rule.metadata) or None)
    return AdapterFile(path, expected, tensors)


def every_file() -> list[tuple[str, str]]:
    """All pairs of naming and form."""
    return [(naming, form) for naming, rule in NAMINGS.items() for form in rule.forms]


# Files of diffusers and peft that say k by themselves


class Described(NamedTuple):
    """What peft's configuration says: of all modules, and of some by patterns."""

    config: dict[str, Any]
    k: Callable[[Module], float]
    rank: Callable[[Module], int]


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
CONVOLUTIONS = ("conv1", "conv2", "conv", "conv_shortcut", "conv_in", "conv_out", "proj_in", "proj_out")


def described(rslora: bool = False, dora: bool = False) -> Described:
    """Rank 4 and alpha 2; rank 2 for to_v and v_proj, alpha 6 for the second attention's to_k, 1 for other to_k."""
    rank_pattern = {"to_v": 2, "v_proj": 2}
    alpha_pattern = {"attn2.to_k": 6, "to_k": 1}

    def rank(module: Module) -> int:
        return 2 if module.name.endswith(("to_v", "v_proj")) else RANK

    def k(module: Module) -> float:
        alpha = 6 if module.name.endswith("attn2.to_k") else 1 if module.name.endswith("to_k") else 2
        return alpha / (rank(module) ** 0.5 if rslora else rank(module))

    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 2,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "use_rslora": rslora,
        "use_dora": dora,
        "target_modules": [*ATTENTION, *(CONVOLUTIONS if dora else ())],
        "bias": "none",
        "lora_bias": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }
    return Described(config, k, rank)


def _peft_tensors(
    config: ModelConfig, said: Described, parts: Sequence[str], seed: int, dora: bool
) -> dict[Module, tuple[dict[str, np.ndarray], Expected]]:
    """Pairs of every attention layer, and with `dora` of every convolution, too."""
    rng, found = np.random.default_rng(seed), {}
    for module in modules(config):
        wanted = is_attention(module) or (dora and module.kind in ("conv", "pointwise"))
        if module.part not in parts or not wanted or module.kind == "norm":
            continue
        r = said.rank(module)
        tensors = {
            "lora_down.weight": _normal(rng, r, module.shape[1], *module.shape[2:]),
            "lora_up.weight": _normal(rng, module.shape[0], r, *[1] * len(module.shape[2:])),
        }
        exact = {name: array.astype(np.float64) for name, array in tensors.items()}
        exact["alpha"] = np.array(said.k(module) * r)
        change: Change = _lora_change
        if dora:
            m = rng.uniform(0.5, 2, module.shape[0]).astype(np.float32)
            exact["dora_scale"] = m.astype(np.float64).reshape(-1, *[1] * (len(module.shape) - 1))
            tensors["dora_scale"] = m.reshape(1, -1, 1, 1) if len(module.shape) == 4 else m  # as peft transposes it
            change = _dora(_lora_change)
        found[module] = tensors, Expected(module, "lora", tensors, partial(change, exact), None)
    return found


def write_described(
    path: Path,
    config: ModelConfig,
    *,
    rslora: bool = False,
    dora: bool = False,
    text_model: bool = True,
    parts: Sequence[str] = ("unet", "text"),
    seed: int = 0,
) -> AdapterFile:
    """What diffusers saves since 0.34: peft's names, and peft's configuration in the header."""
    said = described(rslora, dora)
    name = _peft("unet.", "text_encoder.text_model." if text_model else "text_encoder.")
    found = _peft_tensors(config, said, parts, seed, dora)
    tensors = {name(module, end): array for module, (own, _) in found.items() for end, array in own.items()}
    owners = ["unet" if part == "unet" else "text_encoder" for part in parts]
    prefixed = {f"{part}.{key}": value for part in owners for key, value in said.config.items()}
    described_as = json.dumps(prefixed, indent=2, sort_keys=False)
    write_safetensors(path, tensors, metadata={"format": "pt", "lora_adapter_metadata": described_as})
    return AdapterFile(path, {module.path: expected for module, (_, expected) in found.items()}, tensors)


def write_peft_folder(
    path: Path,
    config: ModelConfig,
    part: str,
    *,
    rslora: bool = False,
    dora: bool = False,
    adapter: str = "",
    pickled: bool = False,
    seed: int = 0,
) -> AdapterFile:
    """What `PeftModel.save_pretrained` leaves for one network. adapter: `.default` where the names still have it."""
    path.mkdir()
    said = described(rslora, dora)
    (path / "adapter_config.json").write_text(json.dumps(said.config, indent=2))
    name = _peft("base_model.model.", "base_model.model.text_model.", adapter)
    found = _peft_tensors(config, said, (part,), seed, dora)
    tensors = {name(module, end): array for module, (own, _) in found.items() for end, array in own.items()}
    if pickled:
        torch.save({key: to_torch(array) for key, array in tensors.items()}, path / "adapter_model.bin")
    else:
        write_safetensors(path / "adapter_model.safetensors", tensors, metadata={"format": "pt"})
    return AdapterFile(path, {module.path: expected for module, (_, expected) in found.items()}, tensors)


# cloneofsimo's files, which count modules


def _counted(config: ModelConfig, part: str, seed: int, dtype: Any) -> list[tuple[Module, dict[str, np.ndarray]]]:
    rng = np.random.default_rng(seed)
    make = FORMS["LoRA, without alpha"].make
    return [(module, stored(make(rng, module.shape), dtype)) for module in numbered_modules(config, part)]


def write_numbered(
    path: Path, config: ModelConfig, embeddings: Mapping[str, np.ndarray] | None = None, *, seed: int = 0
) -> AdapterFile:
    """A .safetensors with `unet:17:up`, and embeddings under their tokens."""
    tensors: dict[str, np.ndarray] = {}
    expected = {}
    metadata = {
        "unet": json.dumps(["CrossAttention", "Attention", "GEGLU"]),
        "text_encoder": json.dumps(["CLIPAttention"]),
    }
    for own, part in (("unet", "unet"), ("text_encoder", "text")):
        for n, (module, pair) in enumerate(_counted(config, part, seed, np.float32)):
            tensors[f"{own}:{n}:up"], tensors[f"{own}:{n}:down"] = pair["lora_up.weight"], pair["lora_down.weight"]
            metadata[f"{own}:{n}:rank"] = str(RANK)
            expected[module.path] = expected_of(module, FORMS["LoRA, without alpha"], pair)
    for token, vector in (embeddings or {}).items():
        tensors[token], metadata[token] = vector, "<embed>"
    write_safetensors(path, tensors, metadata=metadata)
    return AdapterFile(path, expected, tensors)


def write_listed(path: Path, config: ModelConfig, part: str, *, seed: int = 0, legacy: bool = False) -> AdapterFile:
    """A .pt with a list [up, down, up, down, ...] in f16, each of which still wants a gradient, as they were saved."""
    listed, expected = [], {}
    for module, pair in _counted(config, part, seed, np.float16):
        listed += [to_torch(pair[end]).requires_grad_() for end in ("lora_up.weight", "lora_down.weight")]
        expected[module.path] = expected_of(module, FORMS["LoRA, without alpha"], pair)
    torch.save(listed, path, _use_new_zipfile_serialization=not legacy)
    return AdapterFile(path, expected, {str(n): tensor.detach().numpy() for n, tensor in enumerate(listed)})


# Numbers


def length(array: np.ndarray) -> float:
    """The Euclidean norm; np.linalg.norm's waits for threads where there are many small arrays."""
    return float(np.sqrt(np.sum(np.square(array, dtype=np.float64))))


@lru_cache(maxsize=256)
def random_weight(module: Module, seed: int = 0) -> np.ndarray:
    """W f32 of a module in PyTorch's layout, of the size that trained weights have."""
    rng = np.random.default_rng([seed, *module.name.encode()])
    if module.kind == "norm":
        weight = 1 + 0.1 * rng.standard_normal(module.shape)
    else:
        weight = rng.standard_normal(module.shape) / np.sqrt(np.prod(module.shape[1:]))
    weight = weight.astype(np.float32)
    weight.flags.writeable = False
    return weight


def to_leaf(weight: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A weight of PyTorch's as a leaf of this shape."""
    if len(shape) == 4:
        return weight.transpose(2, 3, 1, 0)
    return weight.reshape(weight.shape[:2]).T if len(shape) == 2 else weight


BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
