"""Folders as diffusers' `FlaxStableDiffusionPipeline.save_pretrained` wrote them, made from PyTorch's ones.

The names and the entries of the JSON files are those that diffusers 0.31 and transformers 4.46 wrote when they were run
(`tests/data/flax_names.tsv.gz`); the files are written by flax itself.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.serialization
import flax.traverse_util
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax.training.train_state import TrainState

from convert.files.open import open_source
from sdjax.config import ScheduleConfig
from tests.checkpoint_files import to_torch
from tests.small import MINI

MODEL = dataclasses.replace(
    MINI,
    name="flax",
    text=(dataclasses.replace(MINI.clip, vocab_size=49408, pad_token=49407),),
    vae=dataclasses.replace(MINI.vae, channels=(32, 64), groups=32),
    unet=dataclasses.replace(MINI.unet, channels=(32, 64), transformer_layers=(1, 0), heads=(2, 2), groups=32),
)
"""With the 32 groups that the Flax UNet always has."""

LINEAR = dataclasses.replace(
    MODEL,
    name="flax-2",
    text=(dataclasses.replace(MODEL.clip, activation="gelu", pad_token=0),),
    unet=dataclasses.replace(MODEL.unet, linear_projection=True),
    schedule=ScheduleConfig(prediction="v"),
)
"""The same in the manner of Stable Diffusion 2."""

WEIGHTS = {
    "unet": ("diffusion_pytorch_model.safetensors", "diffusion_flax_model.msgpack"),
    "vae": ("diffusion_pytorch_model.safetensors", "diffusion_flax_model.msgpack"),
    "text_encoder": ("model.safetensors", "flax_model.msgpack"),
}
CLASSES = {"unet": "FlaxUNet2DConditionModel", "vae": "FlaxAutoencoderKL"}
ENTRIES = {
    "unet": (
        *("attention_head_dim", "block_out_channels", "cross_attention_dim", "down_block_types", "flip_sin_to_cos"),
        *("freq_shift", "in_channels", "layers_per_block", "mid_block_type", "only_cross_attention", "out_channels"),
        *("sample_size", "transformer_layers_per_block", "up_block_types", "use_linear_projection"),
    ),
    "vae": (
        *("act_fn", "block_out_channels", "down_block_types", "in_channels", "latent_channels", "layers_per_block"),
        *("norm_num_groups", "out_channels", "sample_size", "scaling_factor", "up_block_types"),
    ),
}
"""What the Flax classes wrote; the group norms of their UNet have 32 groups, which is not written."""

OWN = {
    "addition_embed_type": None,
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": None,
    "dropout": 0.0,
    "num_attention_heads": None,
    "projection_class_embeddings_input_dim": None,
    "split_head_dim": False,
    "use_memory_efficient_attention": False,
}
"""What else they wrote for a UNet."""


def flax_path(name: str, tensor: np.ndarray, part: str) -> tuple[str, ...]:
    """The keys under which Flax keeps the tensor that PyTorch's files call `name`."""
    *modules, leaf = name.split(".")
    if part == "text_encoder":
        if modules[-1].endswith("embedding"):
            leaf = "embedding"
    else:
        text = re.sub(r"\.(\d+)(?=\.|$)", r"_\1", ".".join(modules))
        if part == "vae" and "attentions" in text:
            for old, new in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out_0", "proj_attn")):
                text = re.sub(rf"\.{old}$", f".{new}", text)
        modules = text.split(".")
    if leaf == "weight":
        leaf = "kernel" if tensor.ndim > 1 else "scale"
    return (*modules, leaf)


def flax_tree(tensors: Mapping[str, np.ndarray], part: str) -> dict[str, Any]:
    """PyTorch's tensors as Flax' tree of one part, kernels [in, out] and HWIO."""
    flat = {}
    for name, tensor in tensors.items():
        path = flax_path(name, tensor, part)
        if path[-1] == "kernel":
            tensor = to_torch(tensor).permute((2, 3, 1, 0) if tensor.ndim == 4 else (1, 0)).contiguous()
            tensor = tensor.numpy() if tensor.dtype.is_floating_point and tensor.dtype.itemsize > 2 else _bits(tensor)
        flat[path] = tensor
    return flax.traverse_util.unflatten_dict(flat)


def _bits(tensor: Any) -> np.ndarray:
    """A torch tensor of 16 bits as numpy has it, bfloat16 included."""
    import ml_dtypes
    import torch

    dtype = ml_dtypes.bfloat16 if tensor.dtype == torch.bfloat16 else np.float16
    return tensor.view(torch.int16).numpy().view(dtype)


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    with open_source(path) as source:
        return {name: source.read(name) for name in source.tensors}


def tree_of(folder: Path, part: str) -> dict[str, Any]:
    """What Flax would keep of a part of a PyTorch folder."""
    return flax_tree(read_tensors(folder / part / WEIGHTS[part][0]), part)


def write_tree(path: Path, tree: Any) -> None:
    path.write_bytes(flax.serialization.to_bytes(tree))


def make_flax(folder: Path, scheduler: str = "FlaxPNDMScheduler", keep: bool = False) -> Path:
    """Changes a PyTorch folder into Flax'. keep: leaves PyTorch's weights next to Flax'."""
    for part, (torch_file, flax_file) in WEIGHTS.items():
        write_tree(folder / part / flax_file, tree_of(folder, part))
        if not keep:
            (folder / part / torch_file).unlink()
    for part, entries in ENTRIES.items():
        file = folder / part / "config.json"
        data = json.loads(file.read_text())
        said = {name: value for name, value in data.items() if name in entries}
        own = OWN if part == "unet" else {}
        said |= {"_class_name": CLASSES[part], "_diffusers_version": "0.31.0"} | own
        file.write_text(json.dumps(said, indent=2))
    index = json.loads((folder / "model_index.json").read_text())
    index |= {
        "_class_name": "FlaxStableDiffusionPipeline",
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "FlaxCLIPTextModel"],
        **{part: ["diffusers", name] for part, name in CLASSES.items()},
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    file = folder / "scheduler" / "scheduler_config.json"
    data = json.loads(file.read_text()) | {"_class_name": scheduler}
    data.pop("rescale_betas_zero_snr", None)
    file.write_text(json.dumps(data, indent=2))
    return folder


def write_run(run: Path, folder: Path, steps: tuple[int, ...] = (800,), more: dict[str, Any] | None = None) -> Path:
    """maxdiffusion's checkpoints of a run, from a Flax folder that has PyTorch's weights, too.

    Later steps have the weights times 2, 3, ...

    With the items, handlers and options of `create_orbax_checkpoint_manager` and `save_checkpoint`: the UNet in
    training with AdamW, the others without an optimiser.
    """
    items = [f"{part}_{kind}" for kind in ("config", "state") for part in ("unet", "vae", "text_encoder")]
    items += ["scheduler_config", "tokenizer_config", *(more or {})]
    options = ocp.CheckpointManagerOptions(create=True, save_interval_steps=1, enable_async_checkpointing=True)
    configs = {part: folder / part / "config.json" for part in ("unet", "vae", "text_encoder")}
    configs["scheduler"] = folder / "scheduler" / "scheduler_config.json"
    with ocp.CheckpointManager(run, item_names=tuple(items), options=options) as manager:
        for times, step in enumerate(steps, 1):
            saved = {
                f"{name}_config": ocp.args.JsonSave(json.loads(file.read_text())) for name, file in configs.items()
            }
            saved["tokenizer_config"] = ocp.args.JsonSave({"path": "stable-diffusion-v1-5/stable-diffusion-v1-5"})
            for part in ("unet", "vae", "text_encoder"):
                params = jax.tree.map(lambda a, times=times: jax.numpy.asarray(a * times), tree_of(folder, part))
                tx = optax.adamw(1e-5) if part == "unet" else optax.identity()
                state = TrainState.create(apply_fn=None, params=params, tx=tx)
                saved[f"{part}_state"] = ocp.args.PyTreeSave(state)
            manager.save(step, args=ocp.args.Composite(**saved, **(more or {})))
        manager.wait_until_finished()
    return run
