"""What a model is: frozen, hashable dataclasses (static under jit) and the presets of the published
families.

A variation is `dataclasses.replace(SD15, ...)`; a new family is a new preset, not new code.
`to_json` and `from_json` are exact inverses, and `from_json` accepts nothing that it does not
understand.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from dataclasses import dataclass, field
from typing import Any, Literal


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

    @property
    def downscale(self) -> int:
        """Pixels per latent cell along one axis."""
        return 2 ** (len(self.channels) - 1)


@dataclass(frozen=True)
class UNetConfig:
    """Denoising UNet with cross-attention (Rombach et al. 2022, section 3.3)."""

    in_channels: int = 4  # 4 plain, 8 with an image to follow, 9 with mask and masked image
    out_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    attention: tuple[bool, ...] = (True, True, True, False)  # levels that hold transformers
    heads: tuple[int, ...] = (8, 8, 8, 8)  # per level
    res_blocks: int = 2
    transformer_layers: int = 1
    context_width: int = 768
    groups: int = 32
    linear_projection: bool = False  # files store proj_in and proj_out as linear maps (SD 2) or as 1x1 convolutions


@dataclass(frozen=True)
class ScheduleConfig:
    """q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I) (Ho et al. 2020, eq. 4)."""

    steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    curve: Literal["scaled_linear", "linear"] = "scaled_linear"
    prediction: Literal["epsilon", "v"] = "epsilon"
    zero_terminal_snr: bool = False  # rescale so that alpha_bar_999 = 0 (Lin et al. 2024, algorithm 1)


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
    "dpmpp_sde",
    "unipc",
    "lcm",
]
Spacing = Literal["leading", "linspace", "trailing", "karras", "exponential"]


@dataclass(frozen=True)
class SamplingConfig:
    """The settings that a model gives its best with, for whoever names none."""

    steps: int = 25
    guidance: float = 7.5
    sampler: SamplerName = "dpmpp_2m"
    spacing: Spacing = "karras"


@dataclass(frozen=True)
class ModelConfig:
    """A whole model: three networks, their noise schedule, its training size in pixels, and its sampling defaults."""

    name: str
    clip: CLIPConfig = field(default_factory=CLIPConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    image_size: int = 512
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        check(self)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

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


def _parse(kind: Any, value: Any, where: str) -> Any:
    """`value`, as JSON gives it, as a `kind`; every mismatch is a ValueError naming its place."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be an object, found {type(value).__name__}")
        hints = typing.get_type_hints(kind)
        if set(value) != set(hints):
            missing, unknown = sorted(set(hints) - set(value)), sorted(set(value) - set(hints))
            raise ValueError(f"{where}: missing entries {missing}, unknown entries {unknown}")
        make: Any = kind
        return make(**{name: _parse(hint, value[name], f"{where}.{name}") for name, hint in hints.items()})
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
    if kind is float and type(value) is int and abs(value) < 2**53:
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{where} must be {kind.__name__}, found {type(value).__name__}")
    return value


def check(config: ModelConfig) -> None:
    """Raises ValueError, naming the entry, unless the numbers of `config` make a model."""
    clip, vae, unet, schedule = config.clip, config.vae, config.unet, config.schedule

    def need(condition: bool, message: str) -> None:
        if not condition:
            raise ValueError(f"{config.name}: {message}")

    for part in (clip, vae, unet):
        for name, value in dataclasses.asdict(part).items():
            numbers = value if isinstance(value, tuple) else (value,)
            for number in numbers:
                if type(number) is int and name not in ("skip", "pad_token"):
                    need(
                        0 < number <= 1_000_000,
                        f"{type(part).__name__}.{name} = {number} is out of range",
                    )
    need(
        clip.width % clip.heads == 0,
        f"clip.width {clip.width} is not a multiple of clip.heads {clip.heads}",
    )
    need(0 <= clip.skip < clip.layers, f"clip.skip {clip.skip} must lie in [0, {clip.layers})")
    need(
        0 <= clip.pad_token < clip.vocab_size,
        f"clip.pad_token {clip.pad_token} is not in the vocabulary",
    )
    need(
        unet.context_width == clip.width,
        f"unet.context_width {unet.context_width} is not clip.width {clip.width}",
    )
    need(unet.out_channels == vae.latent_channels, "unet.out_channels and vae.latent_channels differ")
    need(unet.in_channels >= unet.out_channels, "unet.in_channels is smaller than unet.out_channels")
    need(
        len(unet.channels) == len(unet.attention) == len(unet.heads),
        "unet.channels, unet.attention and unet.heads differ in length",
    )
    need(
        0 < len(vae.channels) <= 8 and 0 < len(unet.channels) <= 8,
        "vae.channels and unet.channels must have 1 to 8 entries",
    )
    for channels, heads in zip(unet.channels, unet.heads, strict=True):
        need(channels % heads == 0, f"unet: {channels} channels cannot be split into {heads} heads")
    for part, groups in ((unet, unet.groups), (vae, vae.groups)):
        for channels in part.channels:
            need(channels % groups == 0, f"{channels} channels cannot be split into {groups} groups")
    need(
        0 < vae.scaling_factor < 100,
        f"vae.scaling_factor {vae.scaling_factor} must lie in (0, 100)",
    )
    need(
        0 < schedule.beta_start < schedule.beta_end < 1,
        "schedule betas must satisfy 0 < start < end < 1",
    )
    need(1 < schedule.steps <= 100_000, f"schedule.steps {schedule.steps} must lie in (1, 100000]")
    need(
        0 < config.sampling.steps <= schedule.steps,
        f"sampling.steps {config.sampling.steps} must lie in [1, {schedule.steps}]",
    )
    need(abs(config.sampling.guidance) < 1000, f"sampling.guidance {config.sampling.guidance} is out of range")
    need(
        config.image_size > 0 and config.image_size % vae.downscale == 0,
        f"image_size {config.image_size} must be a positive multiple of {vae.downscale}",
    )


SD15 = ModelConfig(name="sd15")
"""Stable Diffusion 1.1 to 1.5."""

SD15_INPAINT = dataclasses.replace(SD15, name="sd15-inpainting", unet=UNetConfig(in_channels=9))
"""Stable Diffusion 1.5 inpainting: noisy latent (4), mask (1), masked image (4)."""

SD21 = ModelConfig(
    name="sd21",
    clip=CLIPConfig(
        width=1024,
        layers=24,
        heads=16,
        mlp_width=4096,
        activation="gelu",
        skip=1,
        projection=1024,
        pad_token=0,
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
    clip=CLIPConfig(width=64, layers=2, heads=2, mlp_width=256),
    vae=VAEConfig(channels=(16, 32, 32, 32), res_blocks=1, groups=8),
    unet=UNetConfig(channels=(32, 64, 64, 64), heads=(2, 2, 2, 2), res_blocks=1, context_width=64, groups=16),
    image_size=64,
)
"""A few million parameters of the same shape in small, for tests and for trying things out."""

BOX = ModelConfig(
    name="box",
    clip=CLIPConfig(
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
    vae=VAEConfig(latent_channels=16, channels=(16, 32, 64, 128), res_blocks=1, groups=8, scaling_factor=1.0),
    unet=UNetConfig(
        in_channels=16,
        out_channels=16,
        channels=(64, 128),
        attention=(True, True),
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
