"""The JSON files of a diffusers folder <-> our configuration.

Numbers come from the files after type and range checks; nothing named in them is ever imported. What every entry means
to us is in the tables of `convert.diffusers_fields`.
"""

from __future__ import annotations

import dataclasses
import json
import re
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convert import hub
from convert.detect import named
from convert.diffusers_fields import ALWAYS, EARLIER, SCHEDULER, SCHEDULERS, TEXT, TOKENIZER, UNET, VAE, Table
from convert.files.open import what_it_is
from convert.files.source import CheckpointError
from sdjax.config import (
    MOST_BLOCKS,
    MOST_LAYERS,
    CLIPConfig,
    ModelConfig,
    ScheduleConfig,
    UNetConfig,
    VAEConfig,
    keeps_signal,
)
from sdjax.text.tokenizer import Tokenizer

JSON_BOUND = 16 * 2**20  # bytes
MOST = 1_000_000  # of any whole number
LEVELS = 8

ACTIVATIONS = (("silu", "silu"), ("swish", "silu"), ("mish", "mish"), ("gelu", "gelu"), ("relu", "relu"))
DOWN_BLOCKS = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
UP_BLOCKS = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}
MIDDLES = (("UNetMidBlock2DCrossAttn", "attention"), ("UNetMidBlock2D", "plain"), (None, "none"))
CURVES = (("scaled_linear", "scaled_linear"), ("linear", "linear"), ("squaredcos_cap_v2", "squared_cosine"))
KERNELS = tuple((size, size) for size in range(1, 16, 2))
PREDICTIONS = (("epsilon", "epsilon"), ("v_prediction", "v"))

COMPONENTS = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "scheduler": tuple(SCHEDULERS),
}
"""Parts of a pipeline, and the classes that we know them by."""

OTHER_PARTS = (
    *("transformer", "controlnet", "prior", "adapter", "depth_estimator", "low_res_scheduler", "image_normalizer"),
    *("image_noising_scheduler", "decoder", "movq", "vqvae", "bert", "audio_encoder", "motion_adapter", "qformer"),
)
"""Parts by which pipelines of other families are known, besides those whose names end in a number."""

BESIDE = ("safety_checker", "feature_extractor", "image_encoder", "requires_safety_checker")
"""What else a pipeline may have; nothing that we compute."""

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60
_short.maxlevel = 2


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError, naming the file, if it is none or too large."""
    try:
        if not path.is_file():
            what = "a link to nothing" if path.is_symlink() else "missing"
            raise CheckpointError(f"{path}: {what}; this is not a whole diffusers folder{hub.advice(path.parent)}")
        if path.stat().st_size > JSON_BOUND:
            raise CheckpointError(f"{path}: larger than {JSON_BOUND} bytes; not a configuration")
        content = path.read_bytes()
        data = json.loads(content)  # in any Unicode encoding
        json.dumps(data, ensure_ascii=False).encode()  # raises where half of a surrogate pair could not be shown
    except CheckpointError:
        raise
    except (OSError, RecursionError, ValueError) as error:
        kind = None if isinstance(error, OSError) else what_it_is(content)
        raise CheckpointError(f"{path}: {kind or f'not readable as JSON ({error})'}"[:600]) from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


class _Fields:
    """Typed look-ups in one JSON file; every mismatch is a CheckpointError naming file and entry.

    An entry that is absent has its usual value. On opening, what is refused is refused, and what deserves a note is
    added to `notes`.
    """

    def __init__(self, path: Path, data: dict[str, Any], table: Table, notes: list[str]) -> None:
        self.path, self.data, self.table = path, data, table
        for name, entry in table.items():
            value, allowed = self.value(name), (entry.usual, *entry.others)
            if entry.kind in ("honoured", "harmless") or value in allowed:
                continue
            what = f"{path}: {name} = {_short.repr(value)}"
            if entry.kind == "refused":
                expected = " or ".join(dict.fromkeys(map(repr, allowed)))
                raise CheckpointError(f"{what} is not supported; expected {expected} ({entry.why})")
            notes.append(f"{what} has no effect: {entry.why}")
        unknown = [n for n in data if n not in table and not n.startswith("_") and data[n] is not None]
        if unknown:
            first = ", ".join(f"{_short.repr(name)[1:-1]} = {_short.repr(data[name])}" for name in unknown[:3])
            more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
            notes.append(f"{path}: entries that sdjax does not know were passed over: {first}{more}")

    def value(self, name: str) -> Any:
        """As in the file; a tuple among the usual values is a list, as JSON has it."""
        value = self.data.get(name, self.table[name].usual)
        return list(value) if isinstance(value, tuple) else value

    def wrong(self, name: str, expected: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {name} must be {expected}, found {_short.repr(self.value(name))}")

    def flag(self, name: str) -> bool:
        if type(self.value(name)) is not bool:
            raise self.wrong(name, "true or false")
        return self.value(name)

    def whole(self, name: str, most: int = MOST) -> int:
        """A whole number of at least 1."""
        value = self.value(name)
        if type(value) is not int:
            raise self.wrong(name, "a whole number")
        return self._in_range(name, value, most)

    def divisor(self, name: str, channels: tuple[int, ...]) -> int:
        """A whole number that divides them all."""
        value = self.whole(name)
        if any(width % value for width in channels):
            raise self.wrong(name, f"a divisor of block_out_channels, {list(channels)}")
        return value

    def _in_range(self, name: str, value: int, most: int) -> int:
        if not 1 <= value <= most:
            raise CheckpointError(f"{self.path}: {name} = {_short.repr(value)} is out of range; expected 1 to {most}")
        return value

    def number(self, name: str, low: float = -(2.0**53), high: float = 2.0**53) -> float:
        """A finite number between two others, which it is not."""
        value = self.value(name)
        if type(value) not in (int, float):
            raise self.wrong(name, "float")
        if not low < value < high:  # nor NaN
            raise self.wrong(name, f"between {low:g} and {high:g}")
        return float(value)

    def choice(self, name: str, known: Sequence[tuple[Any, Any]]) -> Any:
        """What `known` gives for the value."""
        value = self.value(name)
        for theirs, ours in known:
            if type(value) is type(theirs) and value == theirs:
                return ours
        listed = " or ".join(repr(theirs) for theirs, _ in known)
        raise CheckpointError(f"{self.path}: {name} = {_short.repr(value)} is not supported; expected {listed}")

    def activation(self, name: str) -> Any:
        value = self.value(name)
        lower = value.lower() if isinstance(value, str) else value
        return self.choice(name, [(value, ours) for theirs, ours in ACTIVATIONS if theirs == lower] or ACTIVATIONS)

    def wholes(self, name: str, levels: int | None = None, most: int = MOST) -> tuple[int, ...]:
        """A list of whole numbers from 1: one for each level."""
        value = self.value(name)
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise self.wrong(name, "a list of whole numbers")
        if len(value) != levels if levels else not 1 <= len(value) <= LEVELS:
            raise self.wrong(name, f"a list of {levels or f'1 to {LEVELS}'} numbers")
        return tuple(self._in_range(name, item, most) for item in value)

    def per_level(self, name: str, levels: int, most: int = MOST) -> Any:
        """A whole number; or, where a list has different ones, a tuple of one for each level."""
        if not isinstance(self.value(name), list):
            return self.whole(name, most)
        found = self.wholes(name, levels, most)
        return found[0] if len(set(found)) == 1 else found

    def flags(self, name: str, levels: int) -> Any:
        """The same of true and false."""
        value = self.value(name)
        if not isinstance(value, list):
            return self.flag(name)
        if len(value) != levels or not all(type(item) is bool for item in value):
            raise self.wrong(name, f"true, false or a list of {levels} of them")
        return value[0] if len(set(value)) == 1 else tuple(value)

    def blocks(self, name: str, kinds: Sequence[str], levels: int) -> tuple[str, ...]:
        """Names of blocks, one for each level; diffusers' oldest ones begin with UNetRes."""
        value = self.value(name)
        plain = [str(block).removeprefix("UNetRes") for block in value] if isinstance(value, list) else []
        if len(plain) != levels or not set(plain) <= set(kinds):
            raise self.wrong(name, f"a list of {levels} of {', '.join(kinds)}")
        return tuple(plain)


def _open(path: Path, part: str, table: Table, notes: list[str]) -> _Fields:
    data = read_json(path)
    if part == "text" and isinstance(data.get("text_config"), dict):  # of a whole CLIP
        data = data["text_config"]
    found = data.get("_class_name")
    if part in ("unet", "vae") and found is not None and str(found).removeprefix("Flax") not in COMPONENTS[part]:
        raise CheckpointError(f"{path}: _class_name = {_short.repr(found)}; expected {COMPONENTS[part][0]}")
    return _Fields(path, data, table | EARLIER[part] | ALWAYS, notes)


def _unet_config(fields: _Fields) -> UNetConfig:
    channels = fields.wholes("block_out_channels")
    levels, half = len(channels), max(channels[0] // 2, 1)
    layers = fields.per_level("transformer_layers_per_block", levels, MOST_LAYERS)
    layers = layers if isinstance(layers, tuple) else (layers,) * levels
    attention = tuple(DOWN_BLOCKS[block] for block in fields.blocks("down_block_types", tuple(DOWN_BLOCKS), levels))
    rising = [UP_BLOCKS[block] for block in fields.blocks("up_block_types", tuple(UP_BLOCKS), levels)]
    if fields.value("reverse_transformer_layers_per_block") is not None:
        up_layers = fields.wholes("reverse_transformer_layers_per_block", levels, MOST_LAYERS)
    else:
        up_layers = layers[::-1]
    heads = fields.per_level("attention_head_dim", levels)
    heads = heads if isinstance(heads, tuple) else (heads,) * levels
    if any(width % count for width, count in zip(channels, heads, strict=True)):
        raise fields.wrong("attention_head_dim", f"numbers of heads that divide block_out_channels, {list(channels)}")
    context = fields.per_level("cross_attention_dim", levels)
    if isinstance(context, tuple):
        raise fields.wrong("cross_attention_dim", "the same for all levels")
    behind_time = [name for name in ("timestep_post_act", "time_embedding_act_fn") if fields.value(name) is not None]
    config = UNetConfig(
        in_channels=fields.whole("in_channels"),
        out_channels=fields.whole("out_channels"),
        channels=channels,
        heads=heads,
        res_blocks=fields.per_level("layers_per_block", levels, MOST_BLOCKS),
        transformer_layers=tuple(n if attends else 0 for n, attends in zip(layers, attention, strict=True)),
        context_width=context,
        groups=fields.divisor("norm_num_groups", channels),
        linear_projection=fields.flag("use_linear_projection"),
        middle=fields.choice("mid_block_type", MIDDLES),
        middle_scale=fields.number("mid_block_scale_factor", 0, 1000),
        only_cross_attention=fields.flags("only_cross_attention", levels),
        activation=fields.activation("act_fn"),
        epsilon=fields.number("norm_eps", 0, 1),
        cosine_first=fields.flag("flip_sin_to_cos"),
        frequency_shift=fields.number("freq_shift", -half, half),
        time_width=None if fields.value("time_embedding_dim") is None else fields.whole("time_embedding_dim"),
        time_activations=tuple(fields.activation(name) for name in behind_time),
        time_scales=fields.choice("resnet_time_scale_shift", (("default", False), ("scale_shift", True))),
        center_input=fields.flag("center_input_sample"),
        even_downsampling=fields.choice("downsample_padding", ((1, True), (0, False))),
        conv_in_size=fields.choice("conv_in_kernel", KERNELS),
        conv_out_size=fields.choice("conv_out_kernel", KERNELS),
    )
    if config.filled_layers[-1] != layers[-1]:
        config = dataclasses.replace(config, middle_transformer_layers=layers[-1])
    up = tuple(n if attends else 0 for n, attends in zip(up_layers, rising, strict=True))
    return config if up == config.up_transformers else dataclasses.replace(config, up_transformer_layers=up)


def _vae_config(path: Path, notes: list[str]) -> VAEConfig:
    fields = _open(path, "vae", VAE, notes)
    channels = fields.wholes("block_out_channels")
    fields.blocks("down_block_types", ("DownEncoderBlock2D",), len(channels))
    fields.blocks("up_block_types", ("UpDecoderBlock2D",), len(channels))
    image_channels = fields.whole("in_channels")
    if fields.whole("out_channels") != image_channels:
        raise fields.wrong("out_channels", f"in_channels, {image_channels}")
    return VAEConfig(
        image_channels=image_channels,
        latent_channels=fields.whole("latent_channels"),
        channels=channels,
        res_blocks=fields.whole("layers_per_block", MOST_BLOCKS),
        groups=fields.divisor("norm_num_groups", channels),
        scaling_factor=fields.number("scaling_factor", 0, 100),
        activation=fields.activation("act_fn"),
        middle_attention=fields.flag("mid_block_add_attention"),
        quant_conv=fields.flag("use_quant_conv"),
        post_quant_conv=fields.flag("use_post_quant_conv"),
    )


def _clip_config(path: Path, notes: list[str]) -> CLIPConfig:
    """The text encoder; padding as in the published models, whose files here have a wrong id."""
    fields = _open(path, "text", TEXT, notes)
    activation = fields.choice("hidden_act", (("quick_gelu", "quick_gelu"), ("gelu", "gelu")))
    return CLIPConfig(
        vocab_size=fields.whole("vocab_size"),
        length=fields.whole("max_position_embeddings"),
        width=fields.whole("hidden_size"),
        layers=fields.whole("num_hidden_layers", MOST_LAYERS),
        heads=fields.whole("num_attention_heads"),
        mlp_width=fields.whole("intermediate_size"),
        activation=activation,
        pad_token=0 if activation == "gelu" else 49407,
        epsilon=fields.number("layer_norm_eps", 0, 1),
    )


def _pad_token(folder: Path, clip: CLIPConfig, notes: list[str]) -> int | None:
    """The id that the tokenizer pads with; None without tokenizer files. Its other entries are checked on the way."""
    settings, special = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
    data = read_json(settings) if settings.is_file() else {}
    if special.is_file() and "added_tokens_decoder" not in data:  # as transformers has it: the latter file wins
        data |= read_json(special)
    elif not settings.is_file():
        return None
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        if isinstance(data.get(name), dict):  # a token with its settings
            data[name] = data[name].get("content")
    fields = _Fields(settings, data, TOKENIZER | EARLIER["tokenizer"] | ALWAYS, notes)
    most = fields.value("model_max_length")
    if type(most) is int and most < clip.length:
        raise fields.wrong("model_max_length", f"the length of the text encoder, {clip.length}")
    token = fields.value("pad_token")
    try:
        engine = Tokenizer.from_folder(folder).engine
    except (ValueError, FileNotFoundError) as error:
        raise CheckpointError(f"{error}{hub.advice(folder)}") from None
    pad = engine.token_to_id(token) if isinstance(token, str) else None
    if pad is None:
        raise fields.wrong("pad_token", "a token of the vocabulary")
    added = data.get("added_tokens_decoder")
    contents = (
        [new.get("content") for new in added.values() if isinstance(new, dict)] if isinstance(added, dict) else []
    )
    lost = [token for token in contents if isinstance(token, str) and engine.token_to_id(token) is None]
    if lost:
        names = ", ".join(map(_short.repr, lost[:3]))
        notes.append(f"{settings}: {len(lost)} added tokens are not in the vocabulary and read as plain text: {names}")
    return pad


def _check_tokenizer(folder: Path) -> None:
    """Raises CheckpointError if one of its files is something else, or the list of merges was cut off."""
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    for file in (vocabulary, merges, folder / "tokenizer.json"):
        head = file.read_bytes()[:512] if file.is_file() else b"{"
        kind = None if head.lstrip().startswith(b"{") else what_it_is(head)
        if kind is not None:
            raise CheckpointError(f"{file}: {kind}")
    if vocabulary.is_file() and merges.is_file():
        words = sum(len(word.removesuffix("</w>")) > 1 and word[:2] != "<|" for word in read_json(vocabulary))
        lines = merges.read_bytes().count(b"\n")
        if lines < 0.99 * words:
            raise CheckpointError(f"{merges}: {lines} lines for {words} words; the file is cut off, get it again")


def _schedule_config(path: Path, kind: str | None, notes: list[str]) -> ScheduleConfig:
    """kind: the scheduler's class, of which the usual values are; None if only the file says it."""
    kind = (kind or str(read_json(path).get("_class_name", "DDIMScheduler"))).removeprefix("Flax")
    if kind not in SCHEDULERS:
        raise CheckpointError(
            f"{path}: the scheduler {_short.repr(kind)} is not supported; expected one of diffusion with betas"
        )
    own = {name: SCHEDULER[name]._replace(usual=usual) for name, usual in SCHEDULERS[kind].items()}
    fields = _open(path, "scheduler", SCHEDULER | own, notes)
    betas = fields.value("trained_betas")
    if betas is not None:
        if not isinstance(betas, list) or not all(type(beta) in (int, float) and 0 < beta < 1 for beta in betas):
            raise fields.wrong("trained_betas", "a list of numbers between 0 and 1")
        betas = tuple(map(float, betas))
    config = ScheduleConfig(
        steps=fields.whole("num_train_timesteps", 100_000),
        beta_start=fields.number("beta_start", 0, 1),
        beta_end=fields.number("beta_end", 0, 1),
        curve=fields.choice("beta_schedule", CURVES),
        prediction=fields.choice("prediction_type", PREDICTIONS),
        zero_terminal_snr=fields.flag("rescale_betas_zero_snr"),
        trained_betas=betas,
    )
    if config.steps < 2:
        raise fields.wrong("num_train_timesteps", "at least 2")
    if config.beta_start >= config.beta_end:
        raise fields.wrong("beta_start", f"smaller than beta_end, {config.beta_end}")
    if betas is not None and len(betas) != config.steps:
        raise CheckpointError(f"{path}: trained_betas has {len(betas)} values for {config.steps} num_train_timesteps")
    if not keeps_signal(config):
        raise CheckpointError(f"{path}: these betas leave no signal at the last timesteps; see beta_end, beta_schedule")
    return config


def _sample_size(fields: _Fields, notes: list[str]) -> int:
    """The side of the latents that the model is for; 64 where nothing says it."""
    value = fields.value("sample_size")
    if value is None:
        return 64
    if isinstance(value, list):
        height, width = fields.wholes("sample_size", 2)
        if height != width:
            notes.append(f"{fields.path}: sample_size {value} is not square; the smaller side was taken for both")
        return min(height, width)
    size = fields.whole("sample_size", 4096)
    early = re.match(r"0\.[0-8]\.", str(fields.data.get("_diffusers_version")))
    return 64 if early and size < 64 else size  # as the reference: those versions wrote a wrong one


def _check_components(path: Path, index: dict[str, Any], notes: list[str]) -> None:
    """Refuses pipelines with parts of other families."""
    kind = _short.repr(index.get("_class_name"))
    for name, value in index.items():
        if name.startswith("_") or name in BESIDE or not isinstance(value, list) or value in ([], [None, None]):
            continue
        found = str(value[-1]).removeprefix("Flax")
        if name in OTHER_PARTS or re.search(r"_\d$", name) or name.startswith("prior_"):
            raise CheckpointError(
                f"{path}: a {kind} with a part {_short.repr(name)}; expected Stable Diffusion 1.x or 2.x"
            )
        if name not in COMPONENTS:
            notes.append(f"{path}: the part {_short.repr(name)}, a {_short.repr(found)}, was passed over")
        elif found not in COMPONENTS[name]:
            expected = " or ".join(COMPONENTS[name])
            raise CheckpointError(
                f"{path}: {name} is a {_short.repr(found)}, which is not supported; expected {expected}"
            )


def unet_folder(folder: Path, ema: str) -> Path:
    """Where a diffusers folder keeps the UNet to take; training scripts keep moving averages in unet_ema.

    ema: "yes" takes the averages, "auto" if there is nothing else.
    """
    plain, averages = folder / "unet", folder / "unet_ema"
    return averages if averages.is_dir() and (ema == "yes" or (ema == "auto" and not plain.is_dir())) else plain


def folder_config(folder: Path, ema: str = "auto") -> tuple[ModelConfig, list[str]]:
    """The configuration that the JSON files of a diffusers folder describe, and notes on what in them has no effect.

    ema: which UNet's, see `unet_folder`.

    Raises:
        CheckpointError: a file is missing or damaged, or the model needs something that is not supported.
    """
    notes: list[str] = []
    path = folder / "model_index.json"
    index = read_json(path)
    _check_components(path, index, notes)
    scheduler = index.get("scheduler")
    kind = scheduler[-1] if isinstance(scheduler, list) and scheduler and isinstance(scheduler[-1], str) else None
    config, more = config_from(
        folder.name.encode(errors="replace").decode() or "diffusers",  # file names need not be text
        unet=unet_folder(folder, ema) / "config.json",
        vae=folder / "vae" / "config.json",
        text=folder / "text_encoder" / "config.json",
        scheduler=folder / "scheduler" / "scheduler_config.json",
        tokenizer=folder / "tokenizer",
        kind=kind,
    )
    return config, notes + more


def config_from(
    name: str,
    *,
    unet: Path,
    vae: Path,
    text: Path,
    scheduler: Path,
    tokenizer: Path | None = None,
    kind: str | None = None,
) -> tuple[ModelConfig, list[str]]:
    """The configuration that these JSON files describe, and notes on what in them has no effect.

    name: of the model, if it is no preset. tokenizer: a folder, or None. kind: the scheduler's class; None if only its
    file says it. Raises as `folder_config`.
    """
    notes: list[str] = []
    fields = _open(unet, "unet", UNET, notes)
    unet_config, vae_config = _unet_config(fields), _vae_config(vae, notes)
    clip = _clip_config(text, notes)
    if tokenizer is not None:
        _check_tokenizer(tokenizer)
        pad_token = _pad_token(tokenizer, clip, notes)
        clip = clip if pad_token is None else dataclasses.replace(clip, pad_token=pad_token)
    schedule = _schedule_config(scheduler, kind, notes)
    size = _sample_size(fields, notes) * vae_config.downscale
    try:
        config = ModelConfig(name, (clip,), vae_config, unet_config, schedule, size)
    except ValueError as error:
        raise CheckpointError(f"{unet.parent.parent}: the config files make no model ({error})") from None
    return named(config, config.name), notes


def with_part_of(config: ModelConfig, part: str, path: Path, notes: list[str]) -> ModelConfig:
    """`config` with the autoencoder ("vae") or text encoder ("text") that another folder's config.json describes.

    The prompts are still padded as `config` says: its tokenizer stays.
    """
    try:
        if part == "vae":
            return dataclasses.replace(config, vae=_vae_config(path, notes))
        clip = dataclasses.replace(_clip_config(path, notes), pad_token=config.clip.pad_token)
        return dataclasses.replace(config, text=(clip,))
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: does not go with the rest of the model ({error})") from None


def diffusers_json(config: ModelConfig) -> dict[str, dict[str, Any]]:
    """The JSON files of a diffusers folder for `config`: path in the folder -> content."""
    inpainting = config.unet.in_channels == 9
    return {
        "model_index.json": {
            "_class_name": "StableDiffusionInpaintPipeline" if inpainting else "StableDiffusionPipeline",
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
        "unet/config.json": _unet_json(config.unet, config.image_size // config.vae.downscale),
        "vae/config.json": _vae_json(config.vae, config.image_size),
        "text_encoder/config.json": _text_json(config.clip),
        "scheduler/scheduler_config.json": _scheduler_json(config.schedule),
    }


def _theirs(known: Sequence[tuple[Any, Any]], ours: Any) -> Any:
    return next(theirs for theirs, value in known if value == ours)


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _unet_json(unet: UNetConfig, sample_size: int) -> dict[str, Any]:
    filled, up = unet.filled_layers, unet.up_transformers
    as_down = all(found in (0, usual) for found, usual in zip(up, filled[::-1], strict=True))
    behind_time: list[str | None] = [*unet.time_activations, None, None]
    return {
        "_class_name": "UNet2DConditionModel",
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "block_out_channels": list(unet.channels),
        "down_block_types": [_theirs(tuple(DOWN_BLOCKS.items()), attends) for attends in unet.attention],
        "mid_block_type": _theirs(MIDDLES, unet.middle),
        "mid_block_scale_factor": unet.middle_scale,
        "up_block_types": [_theirs(tuple(UP_BLOCKS.items()), layers > 0) for layers in up],
        "only_cross_attention": _listed(unet.only_cross_attention),
        "attention_head_dim": list(unet.heads),
        "layers_per_block": _listed(unet.res_blocks),
        "transformer_layers_per_block": filled[0] if len(set(filled)) == 1 else list(filled),
        "reverse_transformer_layers_per_block": None if as_down else [max(layers, 1) for layers in up],
        "cross_attention_dim": unet.context_width,
        "norm_num_groups": unet.groups,
        "norm_eps": unet.epsilon,
        "use_linear_projection": unet.linear_projection,
        "sample_size": sample_size,
        "act_fn": unet.activation,
        "flip_sin_to_cos": unet.cosine_first,
        "freq_shift": int(unet.frequency_shift) if unet.frequency_shift.is_integer() else unet.frequency_shift,
        "time_embedding_dim": unet.time_width,
        "timestep_post_act": behind_time[0],
        "time_embedding_act_fn": behind_time[1],
        "resnet_time_scale_shift": "scale_shift" if unet.time_scales else "default",
        "center_input_sample": unet.center_input,
        "downsample_padding": int(unet.even_downsampling),
        "conv_in_kernel": unet.conv_in_size,
        "conv_out_kernel": unet.conv_out_size,
    }


def _vae_json(vae: VAEConfig, sample_size: int) -> dict[str, Any]:
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": vae.image_channels,
        "out_channels": vae.image_channels,
        "latent_channels": vae.latent_channels,
        "block_out_channels": list(vae.channels),
        "down_block_types": ["DownEncoderBlock2D"] * len(vae.channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(vae.channels),
        "layers_per_block": vae.res_blocks,
        "norm_num_groups": vae.groups,
        "sample_size": sample_size,
        "scaling_factor": vae.scaling_factor,
        "act_fn": vae.activation,
        "mid_block_add_attention": vae.middle_attention,
        "use_quant_conv": vae.quant_conv,
        "use_post_quant_conv": vae.post_quant_conv,
    }


def _text_json(clip: CLIPConfig) -> dict[str, Any]:
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_act": clip.activation,
        "hidden_size": clip.width,
        "intermediate_size": clip.mlp_width,
        "layer_norm_eps": clip.epsilon,
        "max_position_embeddings": clip.length,
        "num_attention_heads": clip.heads,
        "num_hidden_layers": clip.layers,
        "vocab_size": clip.vocab_size,
        "bos_token_id": clip.vocab_size - 2,
        "eos_token_id": clip.end,
        "pad_token_id": clip.pad_token,
    }


def _scheduler_json(schedule: ScheduleConfig) -> dict[str, Any]:
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": schedule.steps,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "beta_schedule": _theirs(CURVES, schedule.curve),
        "trained_betas": _listed(schedule.trained_betas),
        "prediction_type": _theirs(PREDICTIONS, schedule.prediction),
        "rescale_betas_zero_snr": schedule.zero_terminal_snr,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
