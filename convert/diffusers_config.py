"""The JSON files of a diffusers folder <-> our configuration.

Numbers come from the files after type and range checks; nothing named in them is ever imported.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from convert.detect import named
from convert.source import CheckpointError
from sdjax.config import CLIPConfig, ModelConfig, ScheduleConfig, UNetConfig, VAEConfig
from sdjax.tokenizer import Tokenizer

JSON_BOUND = 16 * 2**20  # bytes


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError, naming the file, if it is none or too large."""
    try:
        if not path.is_file():
            raise CheckpointError(f"{path}: missing; this is not a whole diffusers folder")
        if path.stat().st_size > JSON_BOUND:
            raise CheckpointError(f"{path}: larger than {JSON_BOUND} bytes; not a configuration")
        data = json.loads(path.read_text("utf-8"))
    except (OSError, RecursionError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


class _Fields:
    """Typed look-ups in one JSON file; every mismatch is a CheckpointError naming file and entry."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = read_json(path)

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        value = self.data.get(name, default)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise CheckpointError(f"{self.path}: {name} must be {kind.__name__}, found {value!r}"[:300])
        return value

    def ints(self, name: str, count: int | None = None, default: Any = None) -> tuple[int, ...]:
        """A list of whole numbers; one number stands for `count` of them."""
        value = self.data.get(name, default)
        if type(value) is int and count is not None:
            return (value,) * count
        if not isinstance(value, list) or not all(type(item) is int for item in value) or len(value) > 16:
            raise CheckpointError(f"{self.path}: {name} must be a list of whole numbers, found {value!r}"[:300])
        return tuple(value)

    def only(self, name: str, allowed: tuple[Any, ...]) -> None:
        """Refuses a model that needs something we do not have."""
        if self.data.get(name, allowed[0]) not in allowed:
            raise CheckpointError(
                f"{self.path}: {name} = {self.data[name]!r} is not supported; expected {allowed[0]!r}"
            )


def _unet_config(fields: _Fields) -> UNetConfig:
    fields.only("_class_name", ("UNet2DConditionModel",))
    for name in ("class_embed_type", "addition_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim"):
        fields.only(name, (None,))
    for name in ("dual_cross_attention", "only_cross_attention", "class_embeddings_concat"):
        fields.only(name, (False, None))
    fields.only("act_fn", ("silu",))
    channels = fields.ints("block_out_channels")
    blocks = fields.data.get("down_block_types")
    kinds = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
    if not isinstance(blocks, list) or len(blocks) != len(channels) or not all(b in kinds for b in blocks):
        raise CheckpointError(f"{fields.path}: down_block_types must be {len(channels)} of {', '.join(kinds)}")
    # diffusers' attention_head_dim of these models is the number of heads, whatever its name says
    heads = "attention_head_dim" if fields.data.get("num_attention_heads") is None else "num_attention_heads"
    return UNetConfig(
        in_channels=fields.get("in_channels", int),
        out_channels=fields.get("out_channels", int),
        channels=channels,
        attention=tuple(kinds[block] for block in blocks),
        heads=fields.ints(heads, len(channels), 8),
        res_blocks=fields.get("layers_per_block", int, 2),
        transformer_layers=fields.get("transformer_layers_per_block", int, 1),
        context_width=fields.get("cross_attention_dim", int),
        groups=fields.get("norm_num_groups", int, 32),
        linear_projection=fields.get("use_linear_projection", bool, False),
    )


def _vae_config(fields: _Fields) -> VAEConfig:
    fields.only("_class_name", ("AutoencoderKL",))
    fields.only("act_fn", ("silu",))
    for name, needed in (("use_quant_conv", True), ("use_post_quant_conv", True), ("mid_block_add_attention", True)):
        fields.only(name, (needed, None))
    for name in ("shift_factor", "latents_mean", "latents_std"):
        fields.only(name, (None,))
    return VAEConfig(
        image_channels=fields.get("in_channels", int, 3),
        latent_channels=fields.get("latent_channels", int, 4),
        channels=fields.ints("block_out_channels"),
        res_blocks=fields.get("layers_per_block", int, 2),
        groups=fields.get("norm_num_groups", int, 32),
        scaling_factor=fields.get("scaling_factor", float, 0.18215),
    )


def _clip_config(fields: _Fields, tokenizer: Path) -> CLIPConfig:
    fields.only("hidden_act", ("quick_gelu", "gelu"))
    fields.only("layer_norm_eps", (1e-5,))
    activation = fields.get("hidden_act", str, "quick_gelu")
    return CLIPConfig(
        vocab_size=fields.get("vocab_size", int, 49408),
        length=fields.get("max_position_embeddings", int, 77),
        width=fields.get("hidden_size", int),
        layers=fields.get("num_hidden_layers", int),
        heads=fields.get("num_attention_heads", int),
        mlp_width=fields.get("intermediate_size", int),
        activation=activation,
        pad_token=_pad_token(tokenizer, 0 if activation == "gelu" else 49407),
    )


def _pad_token(tokenizer: Path, otherwise: int) -> int:
    """The id that the tokenizer pads with; text_encoder/config.json has a wrong one in the published models."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (tokenizer / name).is_file():
            token = read_json(tokenizer / name).get("pad_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                try:
                    found = Tokenizer.from_folder(tokenizer).engine.token_to_id(token)
                except (ValueError, FileNotFoundError) as error:
                    raise CheckpointError(str(error)) from None
                return otherwise if found is None else found
    return otherwise


def _schedule_config(fields: _Fields) -> ScheduleConfig:
    predictions = {"epsilon": "epsilon", "v_prediction": "v"}
    curves = {"scaled_linear": "scaled_linear", "linear": "linear"}
    prediction = fields.get("prediction_type", str, "epsilon")
    curve = fields.get("beta_schedule", str, "scaled_linear")
    for name, value, known in (("prediction_type", prediction, predictions), ("beta_schedule", curve, curves)):
        if value not in known:
            raise CheckpointError(f"{fields.path}: {name} {value!r} is not supported; expected {' or '.join(known)}")
    return ScheduleConfig(
        steps=fields.get("num_train_timesteps", int, 1000),
        beta_start=fields.get("beta_start", float, 0.00085),
        beta_end=fields.get("beta_end", float, 0.012),
        curve=curves[curve],  # type: ignore[arg-type]
        prediction=predictions[prediction],  # type: ignore[arg-type]
        zero_terminal_snr=fields.get("rescale_betas_zero_snr", bool, False),
    )


def folder_config(folder: Path) -> ModelConfig:
    """The configuration that the JSON files of a diffusers folder describe.

    Raises:
        CheckpointError: a file is missing or damaged, or the model needs something that is not supported.
    """
    index = read_json(folder / "model_index.json")
    for name in index:
        other = name.endswith("_2") or name in ("transformer", "controlnet", "prior", "image_noising_scheduler")
        if other and index[name] not in (None, [None, None]):
            kind = str(index.get("_class_name"))[:60]
            raise CheckpointError(f"{folder}: a {kind} with a part {name}; expected Stable Diffusion 1.x or 2.x")
    unet = _Fields(folder / "unet" / "config.json")
    vae = _vae_config(_Fields(folder / "vae" / "config.json"))
    size = unet.get("sample_size", int, 64)
    try:
        config = ModelConfig(
            name=folder.name or "diffusers",
            clip=_clip_config(_Fields(folder / "text_encoder" / "config.json"), folder / "tokenizer"),
            vae=vae,
            unet=_unet_config(unet),
            schedule=_schedule_config(_Fields(folder / "scheduler" / "scheduler_config.json")),
            image_size=size * vae.downscale,
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{folder}: the config files make no model ({error})") from None
    return named(config, config.name)


def diffusers_json(config: ModelConfig) -> dict[str, dict[str, Any]]:
    """The JSON files of a diffusers folder for `config`: path in the folder -> content."""
    unet, vae, clip, schedule = config.unet, config.vae, config.clip, config.schedule
    inpainting = unet.in_channels == 9
    down = ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in unet.attention]
    up = ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(unet.attention)]
    clip_index = ["transformers", "CLIPTextModel"]
    return {
        "model_index.json": {
            "_class_name": "StableDiffusionInpaintPipeline" if inpainting else "StableDiffusionPipeline",
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": clip_index,
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
        "unet/config.json": {
            "_class_name": "UNet2DConditionModel",
            "in_channels": unet.in_channels,
            "out_channels": unet.out_channels,
            "block_out_channels": list(unet.channels),
            "down_block_types": down,
            "up_block_types": up,
            "attention_head_dim": list(unet.heads),
            "layers_per_block": unet.res_blocks,
            "transformer_layers_per_block": unet.transformer_layers,
            "cross_attention_dim": unet.context_width,
            "norm_num_groups": unet.groups,
            "use_linear_projection": unet.linear_projection,
            "sample_size": config.image_size // vae.downscale,
            "act_fn": "silu",
            "flip_sin_to_cos": True,
            "freq_shift": 0,
        },
        "vae/config.json": {
            "_class_name": "AutoencoderKL",
            "in_channels": vae.image_channels,
            "out_channels": vae.image_channels,
            "latent_channels": vae.latent_channels,
            "block_out_channels": list(vae.channels),
            "down_block_types": ["DownEncoderBlock2D"] * len(vae.channels),
            "up_block_types": ["UpDecoderBlock2D"] * len(vae.channels),
            "layers_per_block": vae.res_blocks,
            "norm_num_groups": vae.groups,
            "sample_size": config.image_size,
            "scaling_factor": vae.scaling_factor,
            "act_fn": "silu",
        },
        "text_encoder/config.json": {
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            "hidden_act": clip.activation,
            "hidden_size": clip.width,
            "intermediate_size": clip.mlp_width,
            "layer_norm_eps": 1e-5,
            "max_position_embeddings": clip.length,
            "num_attention_heads": clip.heads,
            "num_hidden_layers": clip.layers,
            "vocab_size": clip.vocab_size,
            "bos_token_id": clip.vocab_size - 2,
            "eos_token_id": clip.vocab_size - 1,
            "pad_token_id": clip.pad_token,
        },
        "scheduler/scheduler_config.json": {
            "_class_name": "DDIMScheduler",
            "num_train_timesteps": schedule.steps,
            "beta_start": schedule.beta_start,
            "beta_end": schedule.beta_end,
            "beta_schedule": schedule.curve,
            "prediction_type": "v_prediction" if schedule.prediction == "v" else "epsilon",
            "rescale_betas_zero_snr": schedule.zero_terminal_snr,
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
        },
    }
