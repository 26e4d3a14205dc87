"""What is in a file: which parts, under which prefixes, in which spelling, of which model family.

Everything is decided by names and shapes; nothing is read but the few small tensors that only their values tell apart.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from convert.names import Part, other_names
from convert.source import CheckpointError, Source, TensorInfo
from sdjax.config import PRESETS, SD15, SD15_INPAINT, SD21, SD21_BASE, CLIPConfig, ModelConfig

CONFIG_KEY = "sdjax.config"  # in the metadata of .safetensors files that we wrote
V_PREDICTION_STD = 0.09  # of the bias named in `_prediction`, above it in v-prediction models

OTHER_MODELS = (
    (r"(^|\.)label_emb\.|^conditioner\.embedders\.1\.", "Stable Diffusion XL"),
    (r"(^|\.)(control_model|zero_convs\.0|controlnet_cond_embedding)\.", "ControlNet"),
    (r"^lora_(unet|te\d?)_|\.(lora_down|lora_up|lora_A|lora_B|lora\.down|lora\.up)\.|[._](hada_w|lokr_w)", "LoRA"),
    (r"^(string_to_param|string_to_token|emb_params)(\.|$)", "textual inversion embedding"),
    (r"^taesd_(encoder|decoder)\.", "TAESD"),
    (r"(^|\.)joint_blocks\.0\.", "Stable Diffusion 3"),
    (r"(^|\.)(double_blocks|single_blocks|single_transformer_blocks)\.0\.", "Flux"),
    (r"^depth_model\.", "Stable Diffusion 2 depth-to-image"),
    (r"^noise_augmentor\.|^embedder\.model\.visual\.", "Stable unCLIP"),
    (r"(^|\.)(time_embed|time_embedding)\.cond_proj\.", "guidance-distilled (LCM) UNet"),
    (r"(^|\.)scaled_fp8$|\.scale_weight$", "scaled-float8 checkpoint"),
    (r"^(body\.0|adapter)\.", "T2I-Adapter"),
    (r"^(model\.diffusion_model\.)?transformer_blocks\.0\.", "diffusion transformer"),
)
"""What we can name but not use: a pattern for tensor names, and what it is."""

NOT_NEEDED = (
    (r"betas$|(.*_)?alphas_cumprod(_prev)?$|posterior_\w+$|lvlb_weights$|logvar$", "a schedule table, computed anew"),
    (r".*\bposition_ids$", "always 0 to 76"),
    (r"model_ema\.(decay|num_updates)$", "training state"),
    (r"model_ema\..*", "moving averages, not asked for"),
    (r"(embedding_manager|loss|denoiser|optimizer_states)\..*", "training state"),
    (r".*\b(text_projection(\.weight)?|logit_scale)$", "for comparing texts with pictures only"),
    (r"(.*\.)?(vision_model|visual|visual_projection)\..*", "CLIP's image tower"),
    (r"(ztsnr|v_pred|global_step)$", "a flag"),
)
"""Names that a file may hold and we do not use, and why."""

SIGNATURES: dict[Part, dict[str, str]] = {
    "unet": {"compvis": "input_blocks.0.0.weight", "diffusers": "time_embedding.linear_1.weight"},
    "vae": {
        "compvis": "encoder.down.0.block.0.norm1.weight",
        "diffusers": "encoder.down_blocks.0.resnets.0.norm1.weight",
    },
    "text": {"openclip": "positional_embedding", "diffusers": "embeddings.token_embedding.weight"},
}
"""A tensor that each part has in each spelling and nothing else has; what stands before it is the prefix."""


@dataclass(frozen=True)
class Located:
    """One part of a model in a file. names: its tensors by the name of `convert.names` -> the name in the file."""

    part: Part
    spelling: str
    source: Source
    names: dict[str, str]

    def info(self, name: str) -> TensorInfo:
        return self.source.tensors[self.names[name]]


def refuse_other_models(source: Source) -> None:
    """Raises CheckpointError naming the model if the file is for something that is not a Stable Diffusion 1 or 2."""
    for pattern, model in OTHER_MODELS:
        for name in source.tensors:
            if re.search(pattern, name):
                raise CheckpointError(
                    f"{source.path}: this is a {model} file (it holds {name}); "
                    "expected Stable Diffusion 1.x, its inpainting model, or 2.x"
                )


def locate(source: Source) -> dict[Part, Located]:
    """The parts in a file.

    Raises:
        CheckpointError: a part is there twice, or the file belongs to a model that is not supported.
    """
    refuse_other_models(source)
    found: dict[Part, tuple[str, str]] = {}
    for part, spelling, prefix in _signatures(source):
        if part in found and found[part] != (spelling, prefix):
            raise CheckpointError(
                f"{source.path}: two names for one thing, {found[part][1] + SIGNATURES[part][found[part][0]]} and "
                f"{prefix + SIGNATURES[part][spelling]}; keep one of the two"
            )
        found[part] = (spelling, prefix)
    parts: dict[Part, dict[str, str]] = {part: {} for part in found}
    by_length = sorted(found, key=lambda part: len(found[part][1]), reverse=True)
    for name in source.tensors:
        owners = [part for part in by_length if name.startswith(found[part][1])]
        if not owners or why_not_needed(name):
            continue
        names = parts[owners[0]]
        own = other_names(name.removeprefix(found[owners[0]][1]))
        if owners[0] == "text":
            own = own.removeprefix("text_model.")
        if own in names:
            raise CheckpointError(
                f"{source.path}: two names for one thing, {names[own]} and {name}; keep one of the two"
            )
        names[own] = name
    return {part: Located(part, found[part][0], source, names) for part, names in parts.items()}


def _signatures(source: Source) -> Iterator[tuple[Part, str, str]]:
    for name in source.tensors:
        for part, spellings in SIGNATURES.items():
            for spelling, signature in spellings.items():
                prefix = name.removesuffix(signature)
                if prefix != name and (not prefix or prefix.endswith(".")) and not why_not_needed(name):
                    if part == "text":
                        prefix = prefix.removesuffix("text_model.")
                    yield part, spelling, prefix


def why_not_needed(name: str) -> str | None:
    """Why a name of `NOT_NEEDED` is not used; None for any other."""
    return next((why for pattern, why in NOT_NEEDED if re.fullmatch(pattern, name)), None)


def infer_config(path: Path, parts: dict[Part, Located], prediction: str | None) -> tuple[ModelConfig, list[str]]:
    """The configuration that the shapes tell, and notes on what was decided by less than a shape.

    prediction: "epsilon" or "v" to say it; None to decide as well as can be.

    Raises:
        CheckpointError: no UNet, or one of an unknown size.
    """
    if "unet" not in parts:
        held = " and ".join(_WORDS[part] for part in parts) or "nothing of a Stable Diffusion model"
        raise CheckpointError(
            f"{path}: holds {held} and no UNet; give a whole checkpoint, and this file by --vae or --text-encoder"
        )
    unet = parts["unet"]
    source = unet.source
    if CONFIG_KEY in source.metadata:
        try:
            return ModelConfig.from_json(source.metadata[CONFIG_KEY]), []
        except ValueError as error:
            raise CheckpointError(f"{source.path}: the metadata entry {CONFIG_KEY} is damaged ({error})") from None
    old = unet.spelling == "compvis"
    first = "input_blocks.0.0.weight" if old else "conv_in.weight"
    block = "input_blocks.1.1" if old else "down_blocks.0.attentions.0"
    cross = f"{block}.transformer_blocks.0.attn2.to_k.weight"
    for name in (first, cross, f"{block}.proj_in.weight"):
        if name not in unet.names or len(unet.info(name).shape) < 2:
            raise CheckpointError(f"{source.path}: a UNet without {name}; this is no Stable Diffusion 1.x or 2.x")
    channels, width = unet.info(first).shape[1], unet.info(cross).shape[1]
    if width not in (768, 1024):
        known = "768 is Stable Diffusion 1.x and 1024 is 2.x" + (", 2048 is XL" if width == 2048 else "")
        raise CheckpointError(
            f"{source.path}: text width {width} is unknown ({known}); for another model give --config"
        )
    if channels not in (4, 8, 9):
        known = {5: "depth-to-image", 7: "the upscaler"}.get(channels, "an unknown model")
        raise CheckpointError(f"{source.path}: a UNet with {channels} input channels is {known}; expected 4, 8 or 9")
    notes: list[str] = []
    if width == 768:
        config = SD15_INPAINT if channels == 9 else SD15
    else:
        kind, reason = _prediction(unet, channels) if prediction is None else (prediction, "as asked")
        notes.append(f"prediction {kind}: {reason}")
        config = SD21 if kind == "v" else SD21_BASE
        config = dataclasses.replace(config, clip=_openclip(parts.get("text"), config))
    linear = len(unet.info(f"{block}.proj_in.weight").shape) == 2
    changed = dataclasses.replace(config.unet, in_channels=channels, linear_projection=linear)
    config = dataclasses.replace(config, unet=changed)
    if width == 768 and (prediction == "v" or "v_pred" in source.tensors):
        config = dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, prediction="v"))
    if "ztsnr" in source.tensors:
        config = dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, zero_terminal_snr=True))
        notes.append("zero terminal SNR: the file says so (ztsnr)")
    return named(config, f"{config.name}-variant"), notes


_WORDS = {"unet": "a UNet", "vae": "an autoencoder (VAE)", "text": "a text encoder"}


def named(config: ModelConfig, otherwise: str) -> ModelConfig:
    """The preset that equals `config` but for its name; else `config` under the name `otherwise`."""
    for preset in PRESETS.values():
        if dataclasses.replace(config, name=preset.name) == preset:
            return preset
    return dataclasses.replace(config, name=otherwise)


def _prediction(unet: Located, channels: int) -> tuple[str, str]:
    """Epsilon or v for a Stable Diffusion 2 file, which does not say: the two public rules of thumb, and the reason."""
    if channels == 9:
        return "epsilon", "the inpainting model predicts epsilon"
    if unet.source.metadata.get("global_step") == "875000":
        return "epsilon", "global_step 875000 is the 512-pixel base model"
    name = "output_blocks.11.1.transformer_blocks.0.norm1.bias"
    if unet.spelling != "compvis":
        name = "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias"
    if name not in unet.names:
        return "epsilon", f"{name} is missing"
    std = float(np.std(unet.source.read(unet.names[name]).astype(np.float32)))
    sign, kind = (">", "v") if std > V_PREDICTION_STD else ("<=", "epsilon")
    return kind, f"std {std:.3f} of {name} {sign} {V_PREDICTION_STD}; --prediction says otherwise"


def _openclip(text: Located | None, config: ModelConfig) -> CLIPConfig:
    """The text configuration for the layers that are there: 24 of which the last is not used, or the 23 used."""
    if text is None:
        return config.clip
    pattern = r"(?:transformer\.resblocks|encoder\.layers)\.(\d+)\."
    numbers = [int(match[1]) for name in text.names if (match := re.match(pattern, name))]
    layers = max(numbers, default=-1) + 1
    projected = text.spelling == "openclip" and all(
        any(name.endswith(end) for name in text.source.tensors) for end in ("text_projection", "logit_scale")
    )
    if layers == 23:
        return dataclasses.replace(config.clip, layers=23, skip=0, projection=None)
    return dataclasses.replace(config.clip, projection=config.clip.projection if projected else None)
