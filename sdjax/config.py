"""What a model is: frozen, hashable dataclasses (static under jit) and the presets of the published
families.

A variation is `dataclasses.replace(SD15, ...)`; a new family is a new preset, not new code.
`to_json` and `from_json` are exact inverses, and `from_json` accepts nothing that it does not
understand. Entries that came later (`LATER`) are written where they are not the usual ones alone: older
checkpoints stay readable, and what is hashed over a configuration stays the same.
"""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from types import UnionType
from typing import Any, Literal

LEAST_ALPHA_BAR = 1e-14
"""Signal left at the last timestep; 0.005 in Stable Diffusion, 2e-9 of the cosine schedule."""

MOST_LAYERS = 512
"""Transformer layers of a network; the largest published ones have 140."""

MOST_BLOCKS = 16
"""Residual blocks of a level."""

LARGEST_SIDE = 16383
"""Pixels along a side of a picture; the most that WebP can hold."""

Activation = Literal["silu", "gelu", "mish", "relu"]

Padding = Literal["zeros", "wrap"]
"""What convolutions see beyond the border: nothing, or the opposite border, so that pictures repeat without a seam."""


LATER = {"later": True}
"""Marks an entry that the first checkpoints did not have: absent from config.json, it has its usual value."""


@dataclass(frozen=True)
class CLIPConfig:
    """CLIP text transformer (Radford et al. 2021, section 2.4)."""

    vocab_size: int = 49408
    length: int = 77
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    skip: int = 0  # layers left out at the end: 0 = last hidden state, 1 = penultimate (SD 2)
    projection: int | None = None  # width of the joint text-image space, if the matrix is there
    pad_token: int = 49407
    epsilon: float = field(default=1e-5, metadata=LATER)  # of every layer norm
    end_token: int | None = field(default=None, metadata=LATER)  # the end of text; None: the last of the vocabulary

    @property
    def end(self) -> int:
        """The id that ends every text."""
        return self.vocab_size - 1 if self.end_token is None else self.end_token


@dataclass(frozen=True)
class CLIPVisionConfig:
    """CLIP vision transformer (Radford et al. 2021, section 2.4); ViT-L/14 at 224 pixels by default.

    It teaches a text encoder, and is no part of a `ModelConfig`.

    Raises:
        ValueError: the picture is not a whole number of patches, or the width of heads.
    """

    image_size: int = 224
    patch: int = 14  # pixels along one side
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_width: int = 4096
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    projection: int = 768  # width of the joint text-image space

    def __post_init__(self) -> None:
        if self.image_size % self.patch:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch {self.patch}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")


@dataclass(frozen=True)
class VAEConfig:
    """KL-regularised autoencoder (Rombach et al. 2022, section 3.1 and appendix G)."""

    image_channels: int = 3
    latent_channels: int = 4
    channels: tuple[int, ...] = (128, 256, 512, 512)  # every level but the last halves the size
    res_blocks: int = 2
    groups: int = 32
    scaling_factor: float = 0.18215  # latents are multiplied by this before the UNet sees them
    activation: Activation = field(
        default="silu", metadata=LATER
    )  # of the residual blocks; before the last convolutions it is always silu
    middle_attention: bool = field(default=True, metadata=LATER)
    quant_conv: bool = field(default=True, metadata=LATER)  # a 1x1 convolution behind the encoder
    post_quant_conv: bool = field(default=True, metadata=LATER)  # and one before the decoder
    padding: Padding = field(default="zeros", metadata=LATER)

    @property
    def wraps(self) -> bool:
        """Whether convolutions are padded with what is at the opposite border."""
        return self.padding == "wrap"

    @property
    def downscale(self) -> int:
        """Pixels per latent cell along one axis."""
        return 2 ** (len(self.channels) - 1)


@dataclass(frozen=True)
class UNetConfig:
    """Denoising UNet with cross-attention (Rombach et al. 2022, section 3.3).

    Where one value or a tuple may stand, a tuple has one value for each level, the finest first.
    """

    in_channels: int = 4  # 4 plain, 8 with an image to follow, 9 with mask and masked image
    out_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    heads: tuple[int, ...] = (8, 8, 8, 8)  # per level
    res_blocks: int | tuple[int, ...] = 2
    transformer_layers: tuple[int, ...] = (1, 1, 1, 0)  # of each transformer, per level; 0: the level has none
    context_width: int = 768
    groups: int = 32
    linear_projection: bool = False  # files store proj_in and proj_out as linear maps (SD 2) or as 1x1 convolutions
    up_transformer_layers: tuple[int, ...] | None = field(
        default=None, metadata=LATER
    )  # the coarsest first, 0: no attention; None: as down
    middle: Literal["attention", "plain", "none"] = field(
        default="attention", metadata=LATER
    )  # plain: one residual block
    middle_scale: float = field(default=1.0, metadata=LATER)  # the residual blocks in the middle are divided by this
    only_cross_attention: bool | tuple[bool, ...] = field(
        default=False, metadata=LATER
    )  # both attentions of a layer look at the text
    activation: Activation = field(default="silu", metadata=LATER)
    epsilon: float = field(default=1e-5, metadata=LATER)  # of the group norms outside transformers
    cosine_first: bool = field(default=True, metadata=LATER)  # in the embedding of timesteps
    frequency_shift: float = field(default=0.0, metadata=LATER)  # there, too: 10000^(-i / (half - shift))
    time_width: int | None = field(default=None, metadata=LATER)  # None: four times the first level's
    time_activations: tuple[Activation, ...] = field(
        default=(), metadata=LATER
    )  # behind the embedding's second linear map
    time_scales: bool = field(
        default=False, metadata=LATER
    )  # the embedding scales and shifts after the second norm; else it shifts before
    center_input: bool = field(default=False, metadata=LATER)  # the input is 2 x - 1
    even_downsampling: bool = field(default=True, metadata=LATER)  # pads all around; else below and to the right only
    conv_in_size: int = field(default=3, metadata=LATER)
    conv_out_size: int = field(default=3, metadata=LATER)
    middle_transformer_layers: int | None = field(
        default=None, metadata=LATER
    )  # where the last level has none; None: as in the deepest level that has any
    padding: Padding = field(default="zeros", metadata=LATER)

    @property
    def wraps(self) -> bool:
        """Whether convolutions are padded with what is at the opposite border."""
        return self.padding == "wrap"

    @property
    def attention(self) -> tuple[bool, ...]:
        """The levels that hold transformers."""
        return tuple(n > 0 for n in self.transformer_layers)

    @property
    def level_res_blocks(self) -> tuple[int, ...]:
        """Residual blocks of every level on the way down; on the way up there is one more."""
        return _per_level(self.res_blocks, len(self.channels))

    @property
    def down_transformers(self) -> tuple[int, ...]:
        """Layers of each transformer on the way down, the finest level first; 0 where there is none."""
        return self.transformer_layers

    @property
    def up_transformers(self) -> tuple[int, ...]:
        """The same on the way up, the coarsest level first."""
        given = self.up_transformer_layers
        return self.down_transformers[::-1] if given is None else given

    @property
    def middle_transformers(self) -> int:
        """Layers of the transformer in the middle, 0 if there is none."""
        return self.filled_layers[-1] if self.middle == "attention" else 0

    @property
    def filled_layers(self) -> tuple[int, ...]:
        """`transformer_layers`, with the number of the middle where a level has none, as other formats write it."""
        deepest = next((n for n in reversed(self.transformer_layers) if n), 1)
        fill = deepest if self.middle_transformer_layers is None else self.middle_transformer_layers
        return tuple(n or fill for n in self.transformer_layers)

    @property
    def level_only_cross(self) -> tuple[bool, ...]:
        """`only_cross_attention` of every level; the middle has self-attention in any case."""
        return _per_level(self.only_cross_attention, len(self.channels))


def _per_level(value: Any, levels: int) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,) * levels


@dataclass(frozen=True)
class ScheduleConfig:
    """q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I) (Ho et al. 2020, eq. 4)."""

    steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    curve: Literal["scaled_linear", "linear", "squared_cosine"] = "scaled_linear"
    prediction: Literal["epsilon", "v"] = "epsilon"
    zero_terminal_snr: bool = False  # rescale so that alpha_bar_999 = 0 (Lin et al. 2024, algorithm 1)
    trained_betas: tuple[float, ...] | None = field(default=None, metadata=LATER)  # every beta, in place of a curve


SamplerName = Literal[
    "ddpm",
    "ddim",
    "plms",
    "euler",
    "euler_a",
    "heun",
    "dpm2",
    "dpm2_a",
    "lms",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_2m_sde_heun",
    "dpmpp_3m_sde",
    "dpmpp_2s_a",
    "dpmpp_sde",
    "unipc",
    "lcm",
    "tcd",
    "restart",
    "deis",
    "ipndm",
    "ipndm_v",
    "res_multistep",
    "res_multistep_a",
    "gradient_estimation",
    "er_sde",
    "sa_solver",
    "seeds_2",
    "heunpp2",
    "euler_cfg_pp",
    "euler_a_cfg_pp",
]
Spacing = Literal[
    "leading",
    "linspace",
    "trailing",
    "karras",
    "exponential",
    "polyexponential",
    "normal",
    "sgm_uniform",
    "simple",
    "ddim_uniform",
    "lcm",
    "beta",
    "beta_a1111",
    "kl_optimal",
    "kl_optimal_a1111",
    "ays",
    "ays_sdxl",
    "ays_a1111",
    "ays_sdxl_a1111",
]


@dataclass(frozen=True)
class SamplingConfig:
    """The settings that a model gives its best with, for whoever names none."""

    steps: int = 25
    guidance: float = 7.5
    sampler: SamplerName = "dpmpp_2m"
    spacing: Spacing = "karras"


@dataclass(frozen=True)
class ModelConfig:
    """A whole model: its networks, their noise schedule, its training size in pixels, and its sampling defaults.

    text: its text encoders; Stable Diffusion 1 and 2 have one, and no more is supported yet.
    """

    name: str
    text: tuple[CLIPConfig, ...] = (CLIPConfig(),)
    vae: VAEConfig = field(default_factory=VAEConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    image_size: int = 512
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        check(self)

    @property
    def clip(self) -> CLIPConfig:
        """The first text encoder."""
        return self.text[0]

    def to_json(self) -> str:
        return json.dumps(_plain(self), indent=2) + "\n"

    @staticmethod
    def from_json(text: str) -> ModelConfig:
        """The inverse of `to_json`.

        Raises:
            ValueError: not JSON, an unknown, missing or wrongly typed entry, or numbers that make
            no model.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"config.json is not valid JSON ({error})") from None
        return _parse(ModelConfig, data, "config")


def tiled(config: ModelConfig) -> ModelConfig:
    """The same model on a torus: what it makes repeats without a seam. Its parameters are the same."""
    vae, unet = dataclasses.replace(config.vae, padding="wrap"), dataclasses.replace(config.unet, padding="wrap")
    return dataclasses.replace(config, vae=vae, unet=unet)


def _is_usual(owner: Any, entry: dataclasses.Field) -> bool:
    """Whether this is an entry that came later and has its usual value."""
    return "later" in entry.metadata and getattr(owner, entry.name) == entry.default


def _plain(value: Any) -> Any:
    """A configuration as JSON's own types."""
    if not dataclasses.is_dataclass(value):
        return value
    kept = [entry.name for entry in dataclasses.fields(value) if not _is_usual(value, entry)]
    return {name: _plain(entry) for name, entry in _stored({name: getattr(value, name) for name in kept}, value)}


def _stored(entries: dict[str, Any], owner: Any) -> Iterator[tuple[str, Any]]:
    """The entries as config.json has had them from the first checkpoint on, so that all of them stay readable, and what
    is hashed over a configuration stays the same.
    """
    for name, value in entries.items():
        if isinstance(owner, ModelConfig) and name == "text" and len(value) == 1:
            yield "clip", value[0]
        elif isinstance(owner, UNetConfig) and name == "heads":
            yield "attention", owner.attention
            yield name, value
        elif isinstance(owner, UNetConfig) and name == "transformer_layers":
            layers = owner.filled_layers
            yield name, layers[0] if len(set(layers)) == 1 else layers
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            yield name, [_plain(item) for item in value]
        elif name != "middle_transformer_layers":  # the last of `filled_layers`
            yield name, value


def _restored(kind: Any, entries: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `_stored`."""
    if kind is ModelConfig and "clip" in entries:
        entries["text"] = (entries.pop("clip"),)
    if kind is UNetConfig:
        attention = entries.pop("attention")
        layers = _per_level(entries["transformer_layers"], len(attention))
        if len(layers) == len(attention):
            layers, last = tuple(n if attends else 0 for n, attends in zip(layers, attention, strict=True)), layers[-1]
            deepest = next((n for n in reversed(layers) if n), 1)
            if layers and not layers[-1] and last != deepest:
                entries["middle_transformer_layers"] = last
        entries["transformer_layers"] = layers
    return entries


def unusual(config: ModelConfig) -> list[str]:
    """What no shape of a parameter tells and few models have: one line for each such entry, "unet.middle none"."""
    found = []
    for part, owner in (
        ("clip", config.clip),
        ("vae", config.vae),
        ("unet", config.unet),
        ("schedule", config.schedule),
    ):
        for entry in dataclasses.fields(owner):
            if "later" in entry.metadata and not _is_usual(owner, entry):
                value = getattr(owner, entry.name)
                long = isinstance(value, tuple) and len(value) > 8
                found.append(f"{part}.{entry.name} {f'of {len(value)} values' if long else value}")
    return found


def _parse(kind: Any, value: Any, where: str) -> Any:
    """`value`, as JSON gives it, as a `kind`; every mismatch is a ValueError naming its place."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be an object, found {type(value).__name__}")
        hints = typing.get_type_hints(kind)
        needed = {entry.name for entry in dataclasses.fields(kind) if "later" not in entry.metadata}
        if kind is ModelConfig and "text" not in value:
            hints, needed = hints | {"clip": CLIPConfig}, needed - {"text"} | {"clip"}
        if kind is UNetConfig:
            hints |= {"attention": tuple[bool, ...], "transformer_layers": int | tuple[int, ...]}
            needed = needed | {"attention"}
        missing, unknown = sorted(needed - set(value)), sorted(set(value) - set(hints))
        if missing or unknown:
            raise ValueError(f"{where}: missing entries {missing}, unknown entries {unknown}")
        make: Any = kind
        entries = {name: _parse(hints[name], given, f"{where}.{name}") for name, given in value.items()}
        return make(**_restored(kind, entries))
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{where} must be one of {', '.join(map(repr, args))}, found {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} must be a list, found {type(value).__name__}")
        return tuple(_parse(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if type(None) in args:
        return None if value is None else _parse(args[0], value, where)
    if origin is UnionType:  # one value, or a list of them
        return _parse(args[isinstance(value, list)], value, where)
    if kind is float and type(value) is int and abs(value) < 2**53:
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{where} must be {kind.__name__}, found {type(value).__name__}")
    return value


def check(config: ModelConfig) -> None:
    """Raises ValueError, naming the entry, unless the numbers of `config` make a model."""

    def need(condition: bool, message: str) -> None:
        if not condition:
            raise ValueError(f"{config.name}: {message}")

    need(len(config.text) == 1, f"a model with {len(config.text)} text encoders is not supported; expected one")
    clip, vae, unet, schedule = config.clip, config.vae, config.unet, config.schedule
    for part in (clip, vae, unet):
        for name, value in dataclasses.asdict(part).items():
            if name in ("skip", "pad_token", "end_token", "transformer_layers", "up_transformer_layers"):
                continue
            numbers = value if isinstance(value, tuple) else (value,)
            for number in numbers:
                if type(number) is int:
                    need(0 < number <= 1_000_000, f"{type(part).__name__}.{name} = {number} is out of range")
    need(
        clip.width % clip.heads == 0,
        f"clip.width {clip.width} is not a multiple of clip.heads {clip.heads}",
    )
    need(0 <= clip.skip < clip.layers, f"clip.skip {clip.skip} must lie in [0, {clip.layers})")
    need(
        0 <= clip.pad_token < clip.vocab_size,
        f"clip.pad_token {clip.pad_token} is not in the vocabulary",
    )
    need(0 <= clip.end < clip.vocab_size, f"clip.end_token {clip.end_token} is not in the vocabulary")
    need(clip.layers <= MOST_LAYERS, f"clip.layers {clip.layers} is out of range")
    need(
        unet.context_width == clip.width,
        f"unet.context_width {unet.context_width} is not clip.width {clip.width}",
    )
    need(unet.out_channels == vae.latent_channels, "unet.out_channels and vae.latent_channels differ")
    _check_blocks(vae, unet, need)
    need(
        0 < vae.scaling_factor < 100,
        f"vae.scaling_factor {vae.scaling_factor} must lie in (0, 100)",
    )
    for where, epsilon in (("clip", clip.epsilon), ("unet", unet.epsilon)):
        need(0 < epsilon < 1, f"{where}.epsilon {epsilon} must lie in (0, 1)")
    need(
        0 < schedule.beta_start < schedule.beta_end < 1,
        "schedule betas must satisfy 0 < start < end < 1",
    )
    need(1 < schedule.steps <= 100_000, f"schedule.steps {schedule.steps} must lie in (1, 100000]")
    if schedule.trained_betas is not None:
        given = len(schedule.trained_betas)
        need(given == schedule.steps, f"schedule.trained_betas has {given} values for {schedule.steps} steps")
        need(all(0 < beta < 1 for beta in schedule.trained_betas), "schedule.trained_betas must lie in (0, 1)")
    need(keeps_signal(schedule), "schedule: these betas leave no signal at the last steps")
    need(
        0 < config.sampling.steps <= schedule.steps,
        f"sampling.steps {config.sampling.steps} must lie in [1, {schedule.steps}]",
    )
    need(abs(config.sampling.guidance) < 1000, f"sampling.guidance {config.sampling.guidance} is out of range")
    need(
        config.image_size > 0 and config.image_size % vae.downscale == 0,
        f"image_size {config.image_size} must be a positive multiple of {vae.downscale}",
    )


@lru_cache(maxsize=16)
def keeps_signal(schedule: ScheduleConfig) -> bool:
    """Whether float32 can tell the noisiest level from pure noise, or that level is rescaled anyway."""
    n, low, high = schedule.steps, schedule.beta_start, schedule.beta_end
    betas: Iterable[float] = (low + (high - low) * i / (n - 1) for i in range(n))
    if schedule.trained_betas is not None:
        betas = schedule.trained_betas
    elif schedule.curve == "scaled_linear":
        betas = ((low**0.5 + (high**0.5 - low**0.5) * i / (n - 1)) ** 2 for i in range(n))
    if schedule.zero_terminal_snr or (schedule.trained_betas is None and schedule.curve == "squared_cosine"):
        return True
    return sum(math.log1p(-beta) for beta in betas) > math.log(LEAST_ALPHA_BAR)


def _check_blocks(vae: VAEConfig, unet: UNetConfig, need: Callable[[bool, str], None]) -> None:
    """The part of `check` about levels and what is in them."""
    levels = len(unet.channels)
    need(unet.in_channels >= unet.out_channels, "unet.in_channels is smaller than unet.out_channels")
    need(
        levels == len(unet.transformer_layers) == len(unet.heads),
        "unet.channels, unet.attention (or transformer_layers) and unet.heads differ in length",
    )
    need(0 < len(vae.channels) <= 8 and 0 < levels <= 8, "vae.channels and unet.channels must have 1 to 8 entries")
    for name in ("res_blocks", "only_cross_attention", "up_transformer_layers"):
        value = getattr(unet, name)
        need(not isinstance(value, tuple) or len(value) == levels, f"unet.{name} must have {levels} entries")
    for channels, heads in zip(unet.channels, unet.heads, strict=True):
        need(channels % heads == 0, f"unet: {channels} channels cannot be split into {heads} heads")
    for part, groups in ((unet, unet.groups), (vae, vae.groups)):
        for channels in part.channels:
            need(channels % groups == 0, f"{channels} channels cannot be split into {groups} groups")
    down, up = unet.down_transformers, unet.up_transformers
    need(all(0 <= n <= MOST_LAYERS for n in unet.filled_layers), "unet.transformer_layers is out of range")
    need(all(0 <= n <= MOST_LAYERS for n in up), "unet.up_transformer_layers is out of range")
    need(any((*down, unet.middle_transformers, *up)), "unet: nowhere attends to the text (unet.attention, unet.middle)")
    blocks = unet.level_res_blocks
    for where, most in (("unet", max(blocks)), ("vae", vae.res_blocks)):
        need(most <= MOST_BLOCKS, f"{where}.res_blocks {most} is out of range")
    rising = zip(up[::-1], blocks, strict=True)
    layers = sum(n * b for n, b in zip(down, blocks, strict=True)) + sum(n * (b + 1) for n, b in rising)
    need(layers <= MOST_LAYERS, f"unet.transformer_layers: {layers} layers in all are out of range")
    need(0 < unet.middle_scale < 1000, f"unet.middle_scale {unet.middle_scale} must lie in (0, 1000)")
    need(
        unet.frequency_shift == 0 or abs(unet.frequency_shift) < unet.channels[0] // 2,
        f"unet.frequency_shift {unet.frequency_shift} must be smaller than half of unet.channels",
    )
    for name in ("conv_in_size", "conv_out_size"):
        size = getattr(unet, name)
        need(size % 2 == 1 and size < 16, f"unet.{name} {size} must be odd and below 16")
    need(len(unet.time_activations) <= 2, "unet.time_activations must have at most 2 entries")


SD15 = ModelConfig(name="sd15")
"""Stable Diffusion 1.1 to 1.5."""

SD15_INPAINT = dataclasses.replace(SD15, name="sd15-inpainting", unet=UNetConfig(in_channels=9))
"""Stable Diffusion 1.5 inpainting: noisy latent (4), mask (1), masked image (4)."""

SD21 = ModelConfig(
    name="sd21",
    text=(
        CLIPConfig(
            width=1024,
            layers=24,
            heads=16,
            mlp_width=4096,
            activation="gelu",
            skip=1,
            projection=1024,
            pad_token=0,
        ),
    ),
    unet=UNetConfig(context_width=1024, heads=(5, 10, 20, 20), linear_projection=True),
    schedule=ScheduleConfig(prediction="v"),
    image_size=768,
)
"""Stable Diffusion 2.1 at 768 pixels: OpenCLIP ViT-H text tower, v-prediction."""

SD21_BASE = dataclasses.replace(SD21, name="sd21-base", schedule=ScheduleConfig(), image_size=512)
"""Stable Diffusion 2.1 base at 512 pixels: the same networks, epsilon prediction."""

TINY = ModelConfig(
    name="tiny",
    text=(CLIPConfig(width=64, layers=2, heads=2, mlp_width=256),),
    vae=VAEConfig(channels=(16, 32, 32, 32), res_blocks=1, groups=8),
    unet=UNetConfig(channels=(32, 64, 64, 64), heads=(2, 2, 2, 2), res_blocks=1, context_width=64, groups=16),
    image_size=64,
)
"""A few million parameters of the same shape in small, for tests and for trying things out."""

BOX = ModelConfig(
    name="box",
    text=(
        CLIPConfig(
            vocab_size=3072,
            length=32,
            width=192,
            layers=3,
            heads=4,
            mlp_width=768,
            activation="gelu",
            projection=192,
            pad_token=3071,
        ),
    ),
    vae=VAEConfig(latent_channels=16, channels=(16, 32, 64, 128), res_blocks=1, groups=8, scaling_factor=1.0),
    unet=UNetConfig(
        in_channels=16,
        out_channels=16,
        channels=(64, 128),
        transformer_layers=(1, 1),
        heads=(2, 4),
        res_blocks=1,
        context_width=192,
    ),
    schedule=ScheduleConfig(prediction="v"),
    image_size=64,
    sampling=SamplingConfig(steps=20, guidance=4.0),
)
"""The model in the box: 64x64 pictograms, learnt by examples/train_box.py from emoji and their names."""

BOX_VISION = CLIPVisionConfig(
    image_size=64, patch=8, width=128, layers=4, heads=4, mlp_width=512, activation="gelu", projection=192
)
"""The image encoder that the box's text encoder is learnt with."""

PRESETS = {config.name: config for config in (SD15, SD15_INPAINT, SD21, SD21_BASE, TINY, BOX)}
