"""What is in a file: which parts, under which prefixes, in which spelling, of which model family.

Everything is decided by names and shapes; nothing is read but the few small tensors that only their values tell apart.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from convert.files.source import FLOATS, CheckpointError, Source
from convert.names import PARTS, Part, known_names, undotted
from sdjax.config import PRESETS, SD15, SD15_INPAINT, SD21, SD21_BASE, ModelConfig
from sdjax.hints import hint

CONFIG_KEY = "sdjax.config"  # in the metadata of .safetensors files that we wrote
V_PREDICTION_STD = 0.09  # of the bias named in `_prediction`, above it in v-prediction models

OTHER_MODELS = (
    (r"(^|\.)label_emb\.|^conditioner\.embedders\.1\.", "Stable Diffusion XL"),
    (r"(^|\.)joint_blocks\.0\.", "Stable Diffusion 3"),
    (r"(^|\.)(double_blocks|single_blocks|single_transformer_blocks)\.0\.", "Flux"),
    (r"^depth_model\.", "Stable Diffusion 2 depth-to-image"),
    (r"^noise_augmentor\.|^embedder\.model\.visual\.", "Stable unCLIP"),
    (r"(^|\.)(time_embed|time_embedding)\.cond_proj\.", "guidance-distilled (LCM) UNet"),
    (r"(^|\.)scaled_fp8$|\.scale_weight$", "scaled-float8 checkpoint"),
    (r"^(model\.diffusion_model\.)?transformer_blocks\.0\.", "diffusion transformer"),
)
"""What we can name but not use: a pattern for tensor names, and what it is."""

ADDITIONS = (
    (r"(^|\.)(control_model|zero_convs\.0|controlnet_cond_embedding|controlnet)\.", "ControlNet"),
    (
        r"(^|[._])lora_(unet|te\d?)_|\.(lora_down|lora_up|lora_A|lora_B|lora\.down|lora\.up|alpha)(\.|$)"
        r"|\.lora\.|_lora\.|[._](hada_w|lokr_w|oft_blocks)|^(unet|text_encoder):\d+:(up|down)$",
        "LoRA",
    ),
    (r"^(string_to_param|string_to_token|emb_params)(\.|$)", "textual inversion embedding"),
    (r"^taesd_(encoder|decoder)\.", "TAESD"),
    (r"^(body\.0|adapter|t2i_adapter)\.", "T2I-Adapter"),
    (r"^(image_proj|ip_adapter)\.|(^|\.)to_[kv]_ip\.", "IP-Adapter"),
    (r"(^|\.)(motion_modules|temporal_transformer)\.", "AnimateDiff motion module"),
    (r"(^|[._])hypernet(work)?\.", "hypernetwork"),
)
"""What comes as a file of its own, and is sometimes left in the file of a whole model; not used there either."""

GIVEN_BY = {"LoRA": "lora", "textual inversion embedding": "embeddings"}
"""By which option of `sdjax.hints` an addition is given."""

NOT_APPLIED = "which is not applied"

NOT_NEEDED = (
    (
        r"(.*_)?betas$|(.*_)?(log_)?(one_minus_)?alphas(_cumprod)?(_prev)?$|(log_)?sigmas$",
        "a schedule table, recomputed",
    ),
    (r"(.*\.)?posterior_\w+$|lvlb_weights$|logvar$|denoiser\.\w+$", "a schedule table, recomputed"),
    (r"(.*\.)?position_ids$", "always 0 to 76"),
    (r"(.*\.)?(causal_)?(attn|attention)_mask$", "a mask, recomputed"),
    (r"(.*\.)?model_ema\.(decay|num_updates)$", "training state"),
    (r"(.*[._])?ema[._](decay|num_updates|step)$", "training state"),
    (r"(.*\.)?model_ema\..*", "moving averages, not asked for"),
    (r"(.*\.)?(embedding_manager|loss|discriminator|perceptual_loss|lpips)\..*", "training state"),
    (r"(optimizers?(_states?)?|lr_schedulers?|ema_optimizer|grad_scaler|callbacks)\..*", "training state"),
    (r"opt_state\..*", "training state"),
    (r"(.*\.)?num_batches_tracked$|(global_step|epoch|step|iteration)$", "training state"),
    (r"(.*\.)?(text_projection(\.weight)?|logit_scale)$", "for comparing texts with pictures only"),
    (r"(.*\.)?(vision_model|visual|visual_projection)\..*", "CLIP's image tower"),
    (r"(safety_checker|feature_extractor)\..*", "the safety checker"),
    (r"(.*\.)?(scale_factor|scaling_factor)$", "a number that the configuration says"),
    (r"(ztsnr|v_pred|edm_\w+)$|edm_vpred\..*", "a flag"),
)
"""Names that a file may hold and we do not use, and why."""

OTHER_TEXT = (
    (r"(^|\.)(encoder|decoder)\.block\.\d+\.layer\.\d+\.SelfAttention\.|^text_encoders?\.t5", "T5"),
    (r"(^|\.)(roberta|xlm_roberta)\.", "XLM-RoBERTa (AltDiffusion's)"),
    (r"(^|\.)token_emb\.|(^|\.)attn_layers\.layers\.", "latent-diffusion's own BERT"),
    (r"(^|\.)embeddings\.word_embeddings\.|(^|\.)encoder\.layer\.\d+\.attention\.", "BERT"),
    (r"(^|\.)(model\.)?layers\.\d+\.self_attn\.q_proj\.|(^|\.)embed_tokens\.", "a language model"),
    (r"(^|\.)query_key_value\.", "ChatGLM"),
    (r"(^|\.)(vision_model|visual)\.", "CLIP's image encoder"),
)
"""Text encoders that are not CLIP's: a pattern for tensor names, and what it is."""

HEADS: dict[Part, str] = {
    "unet": r"(?:(?:input_blocks|output_blocks|middle_block)\.\d+\.|time_embed(?:ding)?\.(?:0|2|linear_1|linear_2)\."
    r"|(?:(?:down_blocks|up_blocks)\.\d+|mid_block)\.(?:resnets|attentions|downsamplers|upsamplers)\.)",
    "vae": r"(?:encoder|decoder)\.(?:mid|mid_block|(?:down|up|down_blocks|up_blocks)\.\d+)"
    r"\.(?:block|resnets|attn|attentions|downsample|upsample)[\w.]*\.",
    "text": r"(?:text_model\.)?(?:(?:transformer\.resblocks|encoder\.layers)\.\d+\."
    r"(?:ln_|layer_norm|attn|self_attn|mlp)|(?:embeddings\.)?(?:token_embedding|positional_embedding|position_embedding)(?:\.weight)?$)",
}
"""How names begin that each part has and nothing else has; what stands before is the prefix."""

LIKELY: dict[Part, str] = {
    "unet": r"model\.diffusion_model\.|unet\.",
    "vae": r"first_stage_model\.|vae\.",
    "text": r"cond_stage_model\.|text_encoder\.|conditioner\.embedders\.0\.",
}
"""Prefixes under which nothing but this part is stored, whatever it is."""

AVERAGES = (
    r"(?:.*?[._])?(?:model_ema\.diffusion_model|(?:unet_ema|ema_unet|ema_model|ema)\.)"
    r"(?=\.?(?:input_blocks|middle_block|output_blocks|time_embed|out\.?[02]|down_blocks|mid_block|up_blocks|conv_))"
)
"""Prefixes of the moving averages of a UNet, whose names often go on without dots."""


@dataclass(frozen=True)
class Located:
    """One part of a model in a file.

    names: its tensors by the name that `convert.names` knows -> the names in the file, where two spellings of one name
    may both be. averages: the UNet's moving averages, by their names without dots. prefixes: before its names.
    """

    part: Part
    source: Source
    prefixes: frozenset[str]
    names: dict[str, list[str]]
    averages: dict[str, list[str]]

    def find(self, *names: str) -> str | None:
        """The name in the file of a tensor that may have any of these; its average where there is nothing else."""
        found = [self.names[name] for name in names if name in self.names]
        found += [self.averages[undotted(name)] for name in names if not self.names and undotted(name) in self.averages]
        return found[0][0] if found else None


def refuse_other_models(source: Source, ignore: Sequence[str], alone: bool) -> None:
    """Raises CheckpointError naming the model if the file is for something that is not a Stable Diffusion 1 or 2.

    alone: whether additions are all that the file could hold.
    """
    for pattern, model in OTHER_MODELS + (ADDITIONS if alone else ()):
        for name in source.tensors:
            if re.search(pattern, name) and not matches(name, ignore):
                expected = "expected Stable Diffusion 1.x, its inpainting model, or 2.x"
                if model in GIVEN_BY:
                    expected = f"give a model, and this by {hint(GIVEN_BY[model], str(source.path))}"
                raise CheckpointError(f"{source.path}: this is a {model} file (it holds {name}); {expected}")


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name fits one of the patterns (as in fnmatch)."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def locate(source: Source, ignore: Sequence[str] = ()) -> dict[Part, Located]:
    """The parts in a file, whole or not. ignore: patterns of names that say nothing about what the file is.

    Raises:
        CheckpointError: the file belongs to a model that is not supported.
    """
    prefixes: dict[str, set[Part]] = {}
    averages: dict[str, list[str]] = {}
    for name in source.tensors:
        if found := re.match(AVERAGES, name):
            averages.setdefault(undotted(name[found.end() :]), []).append(name)
        elif why_not_needed(name) is None and not matches(name, ignore):
            for part, prefix in _heads(name):
                prefixes.setdefault(prefix, set()).add(part)
    names: dict[Part, dict[str, list[str]]] = {part: {} for parts in prefixes.values() for part in parts}
    for name in source.tensors:
        for at in [0, *(found.end() for found in re.finditer(r"\.", name))] if names else ():
            for part in prefixes.get(name[:at], ()):
                own = name[at:].removeprefix("text_model.") if part == "text" else name[at:]
                names[part].setdefault(own, []).append(name)
    if averages:
        names.setdefault("unet", {})
    whole = any(re.match(r"(output|up)_blocks", own) for own in [*names.get("unet", ()), *averages])
    refuse_other_models(source, ignore, alone=not (whole or set(names) & {"vae", "text"}))
    return {
        part: Located(
            part,
            source,
            frozenset(prefix for prefix, parts in prefixes.items() if part in parts),
            names[part],
            averages if part == "unet" else {},
        )
        for part in PARTS
        if part in names
    }


def _heads(name: str) -> Iterator[tuple[Part, str]]:
    for part, head in HEADS.items():
        found = re.match(rf"((?:.*?\.)?){head}", name)
        if found and not (part == "unet" and re.search(r"(^|\.)(encoder|decoder)\.$", found[1])):
            yield part, found[1]


def why_not_needed(name: str) -> str | None:
    """Why a name of `NOT_NEEDED` or `ADDITIONS` is not used; None for any other."""
    for pattern, why in NOT_NEEDED:
        if re.fullmatch(pattern, name):
            return why
    what = next((what for pattern, what in ADDITIONS if re.search(pattern, name)), None)
    return what and f"of a {what}, {NOT_APPLIED}"


def contents(source: Source, parts: Iterable[Part]) -> str:
    """What a file holds, in words; a text encoder of another family is named."""
    held = [_WORDS[part] for part in PARTS[::-1] if part in parts]
    if "text" not in parts and (other := other_text_encoder(source)):
        held.append(f"another text encoder, {other}")
    if held:
        return " and ".join(held)
    if len(source.tensors) == 1 and [n for n in next(iter(source.tensors.values())).shape if n != 1][-1:] in _WIDTHS:
        return "a textual inversion embedding"
    if all(name.isdigit() for name in source.tensors):
        return f"a list of {len(source.tensors)} tensors and nothing of a Stable Diffusion model"
    few = ", ".join(list(source.tensors)[:3])
    return f"nothing of a Stable Diffusion model (its tensors are called {few})"[:300]


def other_text_encoder(source: Source) -> str | None:
    """Which text encoder that is not CLIP's a file holds."""
    for pattern, what in OTHER_TEXT:
        for name in source.tensors:
            if re.search(pattern, name):
                return f"{what} ({name})"
    return None


def infer_config(unet: Located, prediction: str | None) -> tuple[ModelConfig, list[str]]:
    """The configuration that the shapes of a UNet tell, and notes on what was decided by less than a shape.

    prediction: "epsilon" or "v" to say it; None to decide as well as can be.

    Raises:
        CheckpointError: a UNet of an unknown size.
    """
    source = unet.source
    if CONFIG_KEY in source.metadata:
        try:
            return ModelConfig.from_json(source.metadata[CONFIG_KEY]), []
        except ValueError as error:
            raise CheckpointError(f"{source.path}: the metadata entry {CONFIG_KEY} is damaged ({error})") from None
    first = _shape(unet, "input_blocks.0.0.weight", "conv_in.weight")
    cross, inner = (
        _shape(unet, f"input_blocks.1.1.{name}", f"down_blocks.0.attentions.0.{name}")
        for name in ("transformer_blocks.0.attn2.to_k.weight", "proj_in.weight")
    )
    channels, width = first[1], cross[1]
    if width not in (768, 1024):
        known = "768 is Stable Diffusion 1.x and 1024 is 2.x" + (", 2048 is XL" if width == 2048 else "")
        raise CheckpointError(
            f"{source.path}: text width {width} is unknown ({known}); for another model give {hint('config')}"
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
    linear = len(inner) == 2
    changed = dataclasses.replace(config.unet, in_channels=channels, linear_projection=linear)
    config = dataclasses.replace(config, unet=changed)
    if width == 768 and (prediction == "v" or "v_pred" in source.tensors):
        config = dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, prediction="v"))
    if "ztsnr" in source.tensors:
        config = dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, zero_terminal_snr=True))
        notes.append("zero terminal SNR: the file says so (ztsnr)")
    return named(config, f"{config.name}-variant"), notes


_WIDTHS = ([768], [1024], [1280])  # of the text encoders that embeddings are for
_WORDS = {"unet": "a UNet", "vae": "an autoencoder (VAE)", "text": "a text encoder"}


def named(config: ModelConfig, otherwise: str) -> ModelConfig:
    """The preset that equals `config` but for its name; else `config` under the name `otherwise`."""
    for preset in PRESETS.values():
        if dataclasses.replace(config, name=preset.name) == preset:
            return preset
    return dataclasses.replace(config, name=otherwise)


def _shape(unet: Located, *names: str) -> tuple[int, ...]:
    """The shape of the UNet's matrix or kernel that has one of these names."""
    found = unet.find(*names)
    shape = () if found is None else unet.source.tensors[found].shape
    if len(shape) < 2:
        raise CheckpointError(f"{unet.source.path}: a UNet without {names[0]}; this is no Stable Diffusion 1.x or 2.x")
    return shape


def _prediction(unet: Located, channels: int) -> tuple[str, str]:
    """Epsilon or v for a Stable Diffusion 2 file, which does not say: the two public rules of thumb, and the reason."""
    if channels == 9:
        return "epsilon", "the inpainting model predicts epsilon"
    if unet.source.metadata.get("global_step") == "875000":
        return "epsilon", "global_step 875000 is the 512-pixel base model"
    last = "transformer_blocks.0.norm1.bias"
    name = unet.find(f"output_blocks.11.1.{last}", f"up_blocks.3.attentions.2.{last}")
    if name is None or unet.source.tensors[name].dtype not in FLOATS:
        return "epsilon", f"output_blocks.11.1.{last} is missing"
    std = float(np.std(unet.source.read(name).astype(np.float32)))
    sign, kind = (">", "v") if std > V_PREDICTION_STD else ("<=", "epsilon")
    other = hint("prediction", "epsilon" if kind == "v" else "v")
    return kind, f"std {std:.3f} of {name} {sign} {V_PREDICTION_STD}; {other} says otherwise"


def without_unusable_layers(config: ModelConfig, text: Located) -> ModelConfig:
    """`config` without the last layers and the projection of the text encoder, where no output needs them and the file
    does not hold them all.
    """
    clip = config.clip
    whole = {
        leaf
        for name, entry in known_names(config, "text").items()
        for found in text.names.get(name, ())
        if text.source.misfit(found, entry.shape, entry.accepts) is None
        for leaf in entry.leaves
    }
    wanted = {leaf for entry in known_names(config, "text").values() for leaf in entry.leaves}
    missing = {leaf[0] for leaf in wanted - whole}
    if missing & {"projection", "logit_scale"}:
        clip = dataclasses.replace(clip, projection=None)
    used = clip.layers - clip.skip
    if any(f"layer_{i}" in missing for i in range(used, clip.layers)):
        clip = dataclasses.replace(clip, layers=used, skip=0, projection=None)
    return dataclasses.replace(config, text=(clip,))
