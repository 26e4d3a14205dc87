"""Writers of embedding files in every layout that people have."""

from __future__ import annotations

import base64
import json
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from tests.checkpoint_files import to_torch, write_safetensors

WIDTH = 768


def vectors(count: int = 2, width: int = WIDTH, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
    """Numbers of the size that learnt vectors have, [count, width]."""
    return (np.random.default_rng(seed).standard_normal((count, width)) * 0.03).astype(dtype)


# Files of torch


def web_ui_state(array: np.ndarray, name: str = "another name", param: Any = None) -> dict[str, Any]:
    """The dict of A1111's .pt files."""
    return {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": to_torch(array)} if param is None else param,
        "name": name,
        "step": 3000,
        "sd_checkpoint": "81761151",
        "sd_checkpoint_name": "v1-5-pruned-emaonly",
    }


def write_web_ui(path: Path, array: np.ndarray, name: str = "another name", *, legacy: bool = False) -> None:
    """As A1111 saves them."""
    torch.save(web_ui_state(array, name), path, _use_new_zipfile_serialization=not legacy)


def parameter_dict(arrays: Mapping[str, np.ndarray], old: bool = False) -> torch.nn.ParameterDict:
    """A torch.nn.ParameterDict; `old`: with the state that torch 1.10 wrote, without `_keys`."""
    parameters = {name: torch.nn.Parameter(to_torch(array)) for name, array in arrays.items()}
    result = torch.nn.ParameterDict(parameters)
    if old:
        hooks = ("_backward_hooks", "_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks")
        result.__dict__.clear()
        result.__dict__.update({"training": True, "_parameters": OrderedDict(parameters), "_buffers": OrderedDict()})
        result.__dict__.update({"_non_persistent_buffers_set": set(), "_modules": OrderedDict()})
        result.__dict__.update({name: OrderedDict() for name in hooks})
    return result


def write_original(path: Path, arrays: Mapping[str, np.ndarray], *, old_torch: bool = True) -> None:
    """As the code of Gal et al. saves them: a ParameterDict, and tensors as tokens."""
    state = {
        "string_to_token": {name: torch.tensor(265 + place) for place, name in enumerate(arrays)},
        "string_to_param": parameter_dict(arrays, old_torch),
    }
    torch.save(state, path)


def write_torch(path: Path, arrays: Mapping[str, np.ndarray] | Sequence[Mapping[str, np.ndarray]]) -> None:
    """{token: vectors} as diffusers and cloneofsimo save it, or a list of such."""
    if isinstance(arrays, Mapping):
        torch.save({name: to_torch(array) for name, array in arrays.items()}, path)
    else:
        torch.save([{name: to_torch(array) for name, array in part.items()} for part in arrays], path)


def write_lora(path: Path, embeddings: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """A LoRA of one module with embeddings in it."""
    pair = {
        "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": vectors(1, 16),
        "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": vectors(16, 1),
    }
    write_safetensors(path, pair | dict(embeddings), metadata=metadata)


def write_cloneofsimo(path: Path, embeddings: Mapping[str, np.ndarray]) -> None:
    """A LoRA of cloneofsimo's with the tokens beside it."""
    pair = {"unet:0:up": vectors(16, 4), "unet:0:down": vectors(4, 16)}
    metadata = {"unet": '["CrossAttention"]', "unet:0:rank": "4"} | dict.fromkeys(embeddings, "<embed>")
    write_safetensors(path, pair | dict(embeddings), metadata=metadata)


# Pictures


def picture_json(array: np.ndarray, name: str | None = "rick") -> bytes:
    """What is in a picture: the dict of the .pt as JSON."""
    state = web_ui_state(array, param={"*": {"TORCHTENSOR": array.tolist()}})
    state = {key: value for key, value in state.items() if key != "name"} | ({} if name is None else {"name": name})
    return json.dumps(state).encode()


def plain_picture(width: int = 96, height: int = 64) -> Image.Image:
    """A picture in bright colours, with a black square."""
    ramp = np.add.outer(np.arange(height), np.arange(width))
    image = Image.fromarray(np.stack([ramp, ramp[::-1], ramp], 2).astype(np.uint8) | 64)
    ImageDraw.Draw(image).rectangle((20, 20, 40, 40), fill=(0, 0, 0))
    return image


def write_text_picture(path: Path, text: bytes, image: Image.Image | None = None) -> None:
    """A PNG with the JSON in its text."""
    info = PngInfo()
    info.add_text("sd-ti-embedding", base64.b64encode(text).decode())
    (image or plain_picture()).save(path, pnginfo=info)


def hidden(text: bytes, image: Image.Image | None = None) -> Image.Image:
    """The picture between two strips that hold the packed JSON, one half of each byte left and one right.

    The upper four bits of the strips are an ornament that has no meaning.
    """
    image = image or plain_picture()
    height = image.height
    packed = np.frombuffer(zlib.compress(text, 9), np.uint8)
    columns = len(packed) // (3 * height) + 1
    packed = np.resize(packed, (height, columns, 3))
    noise = np.array(generator_numbers(packed.size), np.uint8).reshape(packed.shape) & 15
    ornament = Image.new("RGB", (columns, height))
    for row in range(0, height, 8):
        ImageDraw.Draw(ornament).ellipse((0, row, 6, row + 6), fill=(200, 200, 200))
    drawn = np.asarray(ornament) & 0xF0
    black = np.zeros((height, 1, 3), np.uint8)
    halves = [half ^ noise ^ drawn for half in (packed & 15, packed >> 4)]
    return Image.fromarray(np.concatenate([halves[0], black, np.asarray(image), black, halves[1]], 1))


def generator_numbers(count: int) -> list[int]:
    """The numbers that hide the strips, one after another."""
    numbers, state = [], 0
    for _ in range(count):
        state = (1664525 * state + 1013904223) % 2**32
        numbers.append(state % 255)
    return numbers


# All of them

ONE, TWO, THREE = vectors(1), vectors(2, seed=1), vectors(3, seed=2)
HALF = vectors(2, dtype=np.float16)
LARGE = vectors(2, 1280)


def _saved_picture(path: Path, image: Image.Image, **options: Any) -> None:
    image.save(path, **options)


Form = tuple[str, Callable[[Path], None], dict[str, np.ndarray]]
FORMS: dict[str, Form] = {
    "a1111": ("neg.pt", lambda path: write_web_ui(path, TWO), {"neg": TWO}),
    "a1111 in half precision": ("neg.pt", lambda path: write_web_ui(path, HALF), {"neg": HALF}),
    "gal": ("cat.pt", lambda path: write_original(path, {"*": TWO}), {"cat": TWO}),
    "gal, today's torch": ("cat.pt", lambda path: write_original(path, {"*": TWO}, old_torch=False), {"cat": TWO}),
    "a1111, torch before 1.6": ("cat.pt", lambda path: write_web_ui(path, TWO, legacy=True), {"cat": TWO}),
    "gal, two words": ("cat.pt", lambda path: write_original(path, {"*": ONE, "@": TWO}), {"cat": ONE, "@": TWO}),
    "diffusers": ("learned_embeds.bin", lambda path: write_torch(path, {"<birb>": ONE[0]}), {"<birb>": ONE}),
    "diffusers, renamed": ("bird.bin", lambda path: write_torch(path, {"<birb>": TWO}), {"<birb>": TWO, "bird": TWO}),
    "diffusers, safetensors": (
        "learned_embeds-steps-500.safetensors",
        lambda path: write_safetensors(path, {"<birb>": THREE}),
        {"<birb>": THREE},
    ),
    "token of the file's name": ("Birb.bin", lambda path: write_torch(path, {"birb": ONE}), {"birb": ONE}),
    "kohya": ("easy.safetensors", lambda path: write_safetensors(path, {"emb_params": HALF}), {"easy": HALF}),
    "kohya .pt": ("easy.pt", lambda path: write_torch(path, {"emb_params": TWO}), {"easy": TWO}),
    "star": ("easy.v2.safetensors", lambda path: write_safetensors(path, {"*": TWO}), {"easy.v2": TWO}),
    "sdxl": (
        "xl.safetensors",
        lambda path: write_safetensors(path, {"clip_g": LARGE, "clip_l": TWO, "clip_l_out": THREE}),
        {"xl": TWO},
    ),
    "pivotal tuning": (
        "xl.safetensors",
        lambda path: write_safetensors(path, {"text_encoders_0": TWO, "text_encoders_1": LARGE}),
        {"xl": TWO},
    ),
    "list of dicts": (
        "xl.pt",
        lambda path: write_torch(path, [{"<a>": TWO}, {"<a>": LARGE}]),
        {"<a>": TWO, "xl": TWO},
    ),
    "cloneofsimo .ti.pt": (
        "x.ti.pt",
        lambda path: write_torch(path, {"<s1>": ONE[0], "<s2>": TWO[0]}),
        {"<s1>": ONE, "<s2>": TWO[:1]},
    ),
    "cloneofsimo LoRA": (
        "style.safetensors",
        lambda path: write_cloneofsimo(path, {"<s1>": ONE[0], "<s2>": TWO[1]}),
        {"<s1>": ONE, "<s2>": TWO[1:]},
    ),
    "bundle": (
        "style.safetensors",
        lambda path: write_lora(
            path,
            {
                "bundle_emb.one.string_to_param.*": TWO,
                "bundle_emb.v1.5.clip_l": THREE,
                "bundle_emb.v1.5.clip_g": LARGE,
            },
        ),
        {"one": TWO, "v1.5": THREE},
    ),
    "picture with text": ("7.png", lambda path: write_text_picture(path, picture_json(TWO)), {"rick": TWO}),
    "picture, nameless": ("7.png", lambda path: write_text_picture(path, picture_json(TWO, "*")), {"7": TWO}),
    "pixels": ("7.png", lambda path: _saved_picture(path, hidden(picture_json(TWO))), {"rick": TWO}),
    "pixels, nameless": ("7.png", lambda path: _saved_picture(path, hidden(picture_json(ONE, None))), {"7": ONE}),
    "pixels of a WebP": (
        "7.webp",
        lambda path: _saved_picture(path, hidden(picture_json(TWO)), lossless=True),
        {"rick": TWO},
    ),
}
"""Form -> the file's name, who writes it, and what is in it for a text encoder of width 768."""
