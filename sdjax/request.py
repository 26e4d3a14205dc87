"""What can be asked for: one table of settings, and a `Request` for each picture.

A field of `Request` carries all that is known of a setting: its kind and bounds, its help, where it may be given, its
names in other tools. The options of the command line, the fields of job lines, the checks, the recipe in a picture and
the documentation are derived from it: adding a setting is adding one field.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import secrets
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Rational, Real
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from sdjax.config import LARGEST_SIDE, ModelConfig, SamplingConfig
from sdjax.diffusion.names import (
    ALL_SPACINGS,
    CHURN,
    NOISES,
    RHO,
    SAMPLER_NAMES,
    SPACING_NAMES,
    TRAITS,
    UPSCALER_NAMES,
    UPSCALERS,
    nearest_sampler,
    nearest_spacing,
    sampler_of,
    spacing_of,
    upscaler_of,
)
from sdjax.text.syntax import WEIGHTINGS

if TYPE_CHECKING:
    import numpy as np

    from sdjax.diffusion.plan import Plan
    from sdjax.image import ImageLike, Sides
    from sdjax.types import Array

BATCH = 8
"""Pictures made at once on each device; longer requests are worked through in batches of this size."""

STRENGTHS = {"img2img": 0.75, "inpaint": 1.0}
"""How much of a picture is changed when nothing is said."""

HIRES_STRENGTH = 0.7
"""How much the second pass of hires-fix changes when nothing is said."""

CFG_PP_GUIDANCE = 0.6
"""Of samplers with CFG++ when nothing is said: theirs is of another scale, about a twelfth of the usual one."""

LARGEST_NUMBER = (2 - 2**-23) * 2.0**127
"""The largest that float32 can hold."""

SEEDS = 2**32

TASKS = ("txt2img", "img2img", "inpaint")
WITH_PICTURE = ("img2img", "inpaint")
DEPENDENT = ("eta", "rho", *CHURN, "s_noise")
"""Settings that only some samplers or spacings have."""

RANDOM = ("seed", "variation_seed")
"""Settings of which -1 stands for a random one."""

SIDES = {"left": "left", "right": "right", "top": "top", "bottom": "bottom", "up": "top", "down": "bottom"}
"""Sides of a picture, by the names that are understood."""

SOFT_MASKS = ("blend", "differential")
"""What grey values of a mask may mean: how much of the regenerated is mixed in, or for how many steps it is."""


def is_int(value: Any, low: int | None = None, high: int | None = None) -> bool:
    """Whether a value is a whole number within bounds; True and False are none."""
    number = isinstance(value, Integral) and not isinstance(value, bool)
    return number and (low is None or value >= low) and (high is None or value <= high)


def is_real(value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    """Whether a value is a number within bounds that float32 can hold."""
    floating = isinstance(value, Real) and not isinstance(value, Rational)
    return (floating or is_int(value)) and low <= value <= high and abs(value) <= LARGEST_NUMBER


def is_storable(text: str) -> bool:
    """Whether a text can be kept in a file: half a character, or bytes that are none, cannot."""
    return text.encode("utf-8", "replace").decode() == text


def _is_interval(value: Any) -> bool:
    pair = isinstance(value, tuple | list) and len(value) == 2 and all(is_real(end, 0, 1) for end in value)
    return pair and value[0] <= value[1]


def _is_outpaint(value: Any) -> bool:
    try:
        parse_sides(value)
        return True
    except ValueError:
        return False


def _is_prompt(value: Any) -> bool:
    return isinstance(value, str) or (hasattr(value, "shape") and len(value.shape) == 2)


def _is_size(value: Any) -> bool:
    match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", value) if isinstance(value, str) else None
    return match is not None and max(int(match[1]), int(match[2])) <= LARGEST_SIDE


def _are_loras(value: Any) -> bool:
    return isinstance(value, tuple | list) and all(isinstance(text, str) and text.strip() for text in value)


class Setting(NamedTuple):
    """What is known of one field of a `Request`.

    kind: of its values: "text", "texts" (a tuple of them), "int", "float", "flag" (true or false), "fractions" (two
        numbers), "picture", or "noise".
    expected: completes the sentence "NAME must be ...".
    accepts: whether a value is usable; None always is where it is the default.
    help: what it does, in a few words; usual: what holds when it is left out, for people.
    metavar: how the command line's help calls its value; None: no option of its own.
    tasks: the tasks that have it.
    in_lines: its name in job lines; None: it has none.
    aliases: names of other tools that mean exactly the same, and are accepted.
    similar: names of other tools that are refused with the name used here.
    label: its name in the "parameters" text that other tools read, and shown: its value there; None: it is left out.
    in_plan: whether the sampler's rows depend on it.
    nearest: what of it comes nearest to a text that is none, for errors.
    """

    kind: Literal["text", "texts", "int", "float", "flag", "fractions", "picture", "noise"]
    expected: str
    accepts: Callable[[Any], bool]
    help: str
    usual: str = ""
    metavar: str | None = None
    tasks: tuple[str, ...] = TASKS
    in_lines: str | None = ""
    aliases: tuple[str, ...] = ()
    similar: tuple[str, ...] = ()
    label: str | None = None
    shown: Callable[[Any], Any] = lambda value: value
    in_plan: bool = False
    nearest: Callable[[str], str] | None = None


A_SAMPLER: dict[str, Any] = dict(
    kind="text",
    expected=f"one of {', '.join(TRAITS)}",
    accepts=lambda value: isinstance(value, str) and value in TRAITS,
    shown=lambda value: SAMPLER_NAMES.get(value, value),
    nearest=nearest_sampler,
)
A_SPACING: dict[str, Any] = dict(
    kind="text",
    expected=f"one of {', '.join(ALL_SPACINGS)}",
    accepts=lambda value: isinstance(value, str) and value in ALL_SPACINGS,
    shown=lambda value: SPACING_NAMES.get(value, value),
    nearest=nearest_spacing,
)
"""What is known of settings that name a sampler, or a spacing."""

Kind = TypeVar("Kind", bound=type)


def setting(default: Any = dataclasses.MISSING, **known: Any) -> Any:
    """A field of a `Request`, with what is known of it (`Setting`)."""
    return dataclasses.field(default=default, metadata={"setting": Setting(**known)})


def settings(kind: type[Request] | None = None) -> dict[str, Setting]:
    """The table of settings, by name in the order of the fields. kind: `Request`, or a subclass with more fields."""
    fields = dataclasses.fields(kind or Request)
    return {field.name: field.metadata["setting"] for field in fields if "setting" in field.metadata}


def _documented(kind: Kind) -> Kind:
    """The class, with its settings in its documentation, and other tools' names accepted by its constructor."""
    made = kind.__init__  # type: ignore[misc]

    @functools.wraps(made)
    def construct(self: Any, *arguments: Any, **named: Any) -> None:
        made(self, *arguments, **ours(named, kind))
        for name in RANDOM:
            if is_int(getattr(self, name), -1, -1):
                object.__setattr__(self, name, random_seed())  # as `dataclasses` sets fields of frozen classes

    kind.__init__ = construct  # type: ignore[misc]
    lines = [
        f"    {name}: {known.help}" + (f" ({known.usual})" if known.usual else "") + f"; {known.expected}."
        for name, known in settings(kind).items()
    ]
    kind.__doc__ = "\n".join([(kind.__doc__ or "").rstrip(), "", *lines, "    "])
    return kind


@_documented
@dataclass(frozen=True)
class Request:
    """One picture that is asked for; None stands for the model's own default (`config.sampling`).

    Names of other tools that mean the same are accepted, too, such as guidance_scale, num_inference_steps, and
    "DPM++ 2M Karras" for a sampler with its spacing. A seed or variation_seed of -1 is replaced by a random one.
    """

    prompt: str | np.ndarray = setting(
        kind="text",
        expected="a string, or an encoded prompt f32[rows, d]",
        accepts=_is_prompt,
        help="what the picture shows, weights, schedules and networks included",
        aliases=("positive_prompt",),
        similar=("text", "caption", "positive", "prompts"),
    )
    negative_prompt: str | np.ndarray = setting(
        "",
        kind="text",
        expected="a string, or an encoded prompt f32[rows, d]",
        accepts=_is_prompt,
        help="what the picture is steered away from",
        metavar="TEXT",
        similar=("negative", "negative_prompts", "neg_prompt", "neg", "uc", "unconditional_prompt"),
    )
    to_prompt: str = setting(
        "",
        kind="text",
        expected="a string",
        accepts=lambda value: isinstance(value, str),
        help="another prompt, towards which the prompt goes as far as travel says",
        metavar="TEXT",
        similar=("prompt_to", "target_prompt", "end_prompt"),
        label="To prompt",
        shown=lambda value: json.dumps(value, ensure_ascii=False) if value else None,
    )
    travel: float = setting(
        0.0,
        kind="float",
        expected="in [0, 1]",
        accepts=lambda value: is_real(value, 0, 1),
        help="how far the prompt has gone to to_prompt: 0 is the prompt, 1 the other, in between their encodings mix",
        usual="0",
        metavar="X",
        similar=("prompt_travel", "interpolation"),
        label="Travel",
        shown=lambda value: value or None,
    )
    weighting: str = setting(
        "a1111",
        kind="text",
        expected=f"one of {', '.join(WEIGHTINGS)}",
        accepts=lambda value: isinstance(value, str) and value in WEIGHTINGS,
        help=f"whose way of writing prompts: {', '.join(WEIGHTINGS)} (as it is written)",
        usual=WEIGHTINGS[0],
        metavar="W",
        similar=("prompt_weighting", "emphasis", "syntax", "parser"),
    )
    loras: tuple[str, ...] = setting(
        (),
        kind="texts",
        expected="FILE[:WEIGHT[:TEXT_WEIGHT]], once or several times",
        accepts=_are_loras,
        help="an adapter (LoRA, LyCORIS) and its weight; may be given several times",
        usual="none",
        metavar="FILE[:WEIGHT[:TEXT_WEIGHT]]",
        aliases=("lora",),
        similar=("adapters", "adapter", "lycoris", "lora_weights", "networks"),
    )
    seed: int = setting(
        0,
        kind="int",
        expected="a whole number in [0, 2^32), or -1 for a random one",
        accepts=lambda value: is_int(value, 0, SEEDS - 1),
        help="decides all randomness",
        usual="0",
        metavar="N",
        similar=("random_seed", "noise_seed", "seeds"),
        label="Seed",
    )
    variation_seed: int | None = setting(
        None,
        kind="int",
        expected="a whole number in [0, 2^32), or -1 for a random one",
        accepts=lambda value: is_int(value, 0, SEEDS - 1),
        help="the seed that a variation of the picture leans towards; with count it counts up, and seed stays",
        usual="none",
        metavar="N",
        aliases=("subseed",),
        similar=("variation_seeds", "variations_seed", "sub_seed"),
        label="Variation seed",
    )
    variation_strength: float = setting(
        0.0,
        kind="float",
        expected="in [0, 1]",
        accepts=lambda value: is_real(value, 0, 1),
        help="how far: 0 the noise of seed, 1 that of variation_seed, between them on the sphere",
        usual="0",
        metavar="X",
        aliases=("subseed_strength",),
        similar=("variation", "variation_amount", "variations"),
        label="Variation seed strength",
        shown=lambda value: value or None,
    )
    seed_size: str | None = setting(
        None,
        kind="text",
        expected=f"WIDTHxHEIGHT such as 512x768, in pixels, up to {LARGEST_SIDE}",
        accepts=_is_size,
        help="the size of the picture whose noise is put in the middle of this one's",
        usual="its own size",
        metavar="WxH",
        similar=("seed_resize_from", "seed_resize_from_w", "seed_resize_from_h", "seed_resize"),
        label="Seed resize from",
    )
    steps: int | None = setting(
        None,
        kind="int",
        expected="a whole number above 0",
        accepts=lambda value: is_int(value, 1),
        help="sampling steps",
        usual="25, or as the model says",
        metavar="N",
        aliases=("num_inference_steps", "sampling_steps"),
        similar=("ddim_steps", "num_steps", "inference_steps"),
        label="Steps",
        in_plan=True,
    )
    guidance: float | None = setting(
        None,
        kind="float",
        expected="a finite number",
        accepts=is_real,
        help="classifier-free guidance; 1 leaves the negative prompt out and halves the work",
        usual="7.5, or as the model says",
        metavar="G",
        aliases=("cfg_scale", "guidance_scale", "cfg"),
        similar=("scale", "unconditional_guidance_scale"),
        label="CFG scale",
        in_plan=True,
    )
    guidance_rescale: float = setting(
        0.0,
        kind="float",
        expected="in [0, 1]",
        accepts=lambda value: is_real(value, 0, 1),
        help="against overexposure",
        usual="0",
        metavar="R",
        similar=("rescale_cfg", "cfg_rescale"),
        in_plan=True,
    )
    guidance_interval: tuple[float, float] = setting(
        (0.0, 1.0),
        kind="fractions",
        expected="two fractions of the steps, 0 <= start <= stop <= 1",
        accepts=_is_interval,
        help="fractions of the steps that are guided; outside guidance is 1",
        usual="0 1",
        metavar="START STOP",
        in_plan=True,
    )
    sampler: str | None = setting(
        None,
        **A_SAMPLER,
        help=", ".join(TRAITS),
        usual="dpmpp_2m, or as the model says",
        metavar="S",
        aliases=("sampler_name",),
        similar=("sampling_method", "scheduler", "sampler_index"),
        label="Sampler",
        in_plan=True,
    )
    spacing: str | None = setting(
        None,
        **A_SPACING,
        help=", ".join(ALL_SPACINGS),
        usual="karras, or as the model says",
        metavar="K",
        similar=("schedule", "schedule_type", "noise_schedule", "sigmas"),
        label="Schedule type",
        in_plan=True,
    )
    rho: float | None = setting(
        None,
        kind="float",
        expected="above 0, 100 at most",
        accepts=lambda value: is_real(value, 1e-3, 100),
        help=f"exponent of the spacings {' and '.join(RHO)}",
        usual=", ".join(f"{value:g}" for value in RHO.values()),
        metavar="R",
        similar=("schedule_rho",),
        label="Schedule rho",
        in_plan=True,
    )
    eta: float | None = setting(
        None,
        kind="float",
        expected="in [0, 1]",
        accepts=lambda value: is_real(value, 0, 1),
        help="how much noise a sampler adds that adds any, 0 to 1",
        usual="1; of ddim 0, of tcd 0.3",
        metavar="E",
        similar=("ddim_eta",),
        label="Eta",
        in_plan=True,
    )
    s_churn: float = setting(
        0.0,
        kind="float",
        expected="a number from 0",
        accepts=lambda value: is_real(value, 0),
        help="noise added before steps of euler, heun and dpm2 (Karras et al. 2022)",
        usual="0",
        metavar="S",
        label="Sigma churn",
        in_plan=True,
    )
    s_tmin: float = setting(
        0.0,
        kind="float",
        expected="a number from 0",
        accepts=lambda value: is_real(value, 0),
        help="least sigma at which s_churn acts",
        usual="0",
        metavar="S",
        label="Sigma tmin",
        in_plan=True,
    )
    s_tmax: float | None = setting(
        None,
        kind="float",
        expected="a number from 0",
        accepts=lambda value: is_real(value, 0),
        help="greatest sigma at which s_churn acts",
        usual="no bound",
        metavar="S",
        label="Sigma tmax",
        in_plan=True,
    )
    s_noise: float = setting(
        1.0,
        kind="float",
        expected="a number from 0",
        accepts=lambda value: is_real(value, 0),
        help="what all noise that the sampler adds is multiplied by",
        usual="1",
        metavar="S",
        label="Sigma noise",
        in_plan=True,
    )
    clip_skip: int | None = setting(
        None,
        kind="int",
        expected="a whole number from 0",
        accepts=lambda value: is_int(value, 0),
        help="layers of the text encoder to leave out, counted from 0 (A1111 counts from 1)",
        usual="as trained",
        metavar="N",
        similar=("clip_stop_at_last_layers", "clipskip"),
        label="Clip skip",
        shown=lambda value: value + 1,
    )
    width: int | None = setting(
        None,
        kind="int",
        expected="a multiple of 8",
        accepts=lambda value: True,  # `size_of` knows the model's multiple
        help="in pixels",
        usual="the model's own, or the picture's",
        similar=("w",),
    )
    height: int | None = setting(
        None,
        kind="int",
        expected="a multiple of 8",
        accepts=lambda value: True,  # `size_of` knows the model's multiple
        help="in pixels",
        usual="the model's own, or the picture's",
        similar=("h",),
    )
    tiling: bool = setting(
        False,
        kind="flag",
        expected="true or false",
        accepts=lambda value: isinstance(value, bool),
        help="a picture that repeats without a seam: convolutions see the opposite border beyond each border",
        metavar="",
        similar=("tile", "tileable", "seamless", "circular"),
        label="Tiling",
        shown=lambda value: "True" if value else None,
    )
    image: ImageLike | None = setting(
        None,
        kind="picture",
        expected="a picture or its path",
        accepts=lambda value: True,
        help="the picture to start from",
        tasks=WITH_PICTURE,
        in_lines="init_image",
        similar=("image", "init_img", "init_images", "input_image", "start_image", "image_path"),
    )
    mask: ImageLike | None = setting(
        None,
        kind="picture",
        expected="a picture or its path",
        accepts=lambda value: True,
        help="white where the picture is to be regenerated",
        tasks=("inpaint",),
        similar=("mask_image", "mask_path", "inpaint_mask"),
    )
    outpaint: str | None = setting(
        None,
        kind="text",
        expected=f'pixels, as in "64" (on all sides) or "left=128,right=64" (left, right, top, bottom), '
        f"up to {LARGEST_SIDE}",
        accepts=_is_outpaint,
        help="extend the picture by so many pixels, and make what is there; a mask may be left out",
        usual="no",
        metavar="SIDE=N,...",
        tasks=("inpaint",),
        similar=("outpainting", "expand", "extend", "pixels_to_expand", "padding"),
    )
    feather: int | None = setting(
        None,
        kind="int",
        expected=f"a whole number of pixels in [0, {LARGEST_SIDE}]",
        accepts=lambda value: is_int(value, 0, LARGEST_SIDE),
        help="pixels around the mask over which old and new are blended",
        usual="0; in outpainting an eighth of the picture, up to 32",
        metavar="N",
        tasks=("inpaint",),
        similar=("mask_blur", "feathering", "mask_feather", "blur_factor"),
    )
    only_masked: int | None = setting(
        None,
        kind="int",
        expected=f"a whole number of pixels in [0, {LARGEST_SIDE}]",
        accepts=lambda value: is_int(value, 0, LARGEST_SIDE),
        help="work on the masked region alone, and so many pixels around it, at the model's own size or yours",
        usual="the whole picture",
        metavar="PADDING",
        tasks=("inpaint",),
        aliases=("inpaint_full_res_padding", "padding_mask_crop"),
        similar=("inpaint_full_res", "masked_padding", "inpaint_area", "crop_to_mask"),
        label="Masked area padding",
    )
    soft_mask: str = setting(
        "blend",
        kind="text",
        expected=f"one of {', '.join(SOFT_MASKS)}",
        accepts=lambda value: isinstance(value, str) and value in SOFT_MASKS,
        help="what grey in the mask means: blend mixes old and new, differential changes it in fewer steps",
        usual=SOFT_MASKS[0],
        metavar="|".join(SOFT_MASKS),
        tasks=("inpaint",),
        similar=("differential", "differential_diffusion", "soft_inpainting"),
        in_plan=True,
    )
    strength: float | None = setting(
        None,
        kind="float",
        expected="in [0, 1]",
        accepts=lambda value: is_real(value, 0, 1),
        help="how much of the picture to change, 0 to 1",
        usual=", ".join(f"{value:g} in {task}" for task, value in STRENGTHS.items()),
        metavar="X",
        tasks=WITH_PICTURE,
        aliases=("denoising_strength",),
        similar=("denoise", "denoising", "image_strength", "prompt_strength"),
        label="Denoising strength",
        in_plan=True,
    )
    hires_scale: float | None = setting(
        None,
        kind="float",
        expected="in [1, 16]",
        accepts=lambda value: is_real(value, 1, 16),
        help="make the picture at its size first, and again so many times as large (hires-fix)",
        usual="one pass",
        metavar="X",
        tasks=("txt2img",),
        aliases=("hr_scale",),
        similar=("enable_hr", "hires_upscale", "upscale"),
        label="Hires upscale",
    )
    hires_size: str | None = setting(
        None,
        kind="text",
        expected="WIDTHxHEIGHT such as 1024x1024",
        accepts=_is_size,
        help="the same at a size in pixels",
        usual="one pass",
        metavar="WxH",
        tasks=("txt2img",),
        similar=("hr_resize_x", "hr_resize_y", "hires_resize"),
        label="Hires resize",
    )
    hires_upscaler: str = setting(
        UPSCALERS[0],
        kind="text",
        expected=f"one of {', '.join(UPSCALERS)}",
        accepts=lambda value: isinstance(value, str) and value in UPSCALERS,
        help=f"what enlarges between the passes: {', '.join(UPSCALERS)}",
        usual=UPSCALERS[0],
        metavar="U",
        tasks=("txt2img",),
        aliases=("hr_upscaler",),
        similar=("upscaler",),
        label="Hires upscaler",
        shown=lambda value: UPSCALER_NAMES.get(value, value),
    )
    hires_steps: int | None = setting(
        None,
        kind="int",
        expected="a whole number above 0",
        accepts=lambda value: is_int(value, 1),
        help="steps that the second pass runs",
        usual="as the first",
        metavar="N",
        tasks=("txt2img",),
        aliases=("hr_second_pass_steps",),
        label="Hires steps",
    )
    hires_strength: float | None = setting(
        None,
        kind="float",
        expected="in [0, 1]",
        accepts=lambda value: is_real(value, 0, 1),
        help="how much the second pass changes, 0 to 1",
        usual=f"{HIRES_STRENGTH:g}",
        metavar="X",
        tasks=("txt2img",),
        similar=("hires_denoising_strength",),
        label="Denoising strength",
    )
    hires_sampler: str | None = setting(
        None,
        **A_SAMPLER,
        help="sampler of the second pass",
        usual="as the first",
        metavar="S",
        tasks=("txt2img",),
        aliases=("hr_sampler_name",),
        label="Hires sampler",
    )
    hires_spacing: str | None = setting(
        None,
        **A_SPACING,
        help="spacing of the second pass",
        usual="as the first",
        metavar="K",
        tasks=("txt2img",),
        aliases=("hr_scheduler",),
        label="Hires schedule type",
    )
    hires_guidance: float | None = setting(
        None,
        kind="float",
        expected="a finite number",
        accepts=is_real,
        help="guidance of the second pass",
        usual="as the first",
        metavar="G",
        tasks=("txt2img",),
        similar=("hr_cfg", "hires_cfg_scale"),
        label="Hires CFG Scale",
    )
    hires_prompt: str = setting(
        "",
        kind="text",
        expected="a string",
        accepts=lambda value: isinstance(value, str),
        help="prompt of the second pass",
        usual="as the first",
        metavar="TEXT",
        tasks=("txt2img",),
        aliases=("hr_prompt",),
        label="Hires prompt",
        shown=json.dumps,
    )
    hires_negative_prompt: str = setting(
        "",
        kind="text",
        expected="a string",
        accepts=lambda value: isinstance(value, str),
        help="negative prompt of the second pass",
        usual="as the first",
        metavar="TEXT",
        tasks=("txt2img",),
        aliases=("hr_negative_prompt",),
        label="Hires negative prompt",
        shown=json.dumps,
    )
    noise: str | Array | np.ndarray = setting(
        "jax",
        kind="noise",
        expected=f"one of {', '.join(NOISES)}, or an array",
        accepts=lambda value: not isinstance(value, str) or value in NOISES,
        help="where seeds' noise comes from: jax, torch as on a CPU, torch-cuda as on NVIDIA GPUs",
        usual="jax",
        metavar="|".join(NOISES),
    )
    id: str = setting(
        "",
        kind="text",
        expected="a string",
        accepts=lambda value: isinstance(value, str),
        help="yours, comes back with the picture",
        similar=("name", "filename", "file_name", "key"),
    )


# Names and values of other tools


def aliases(kind: type[Request] | None = None) -> dict[str, str]:
    """Names of other tools that are accepted -> the name used here."""
    return {alias: name for name, known in settings(kind).items() for alias in known.aliases}


def ours(named: Mapping[str, Any], kind: type[Request] | None = None) -> dict[str, Any]:
    """Settings by the names and values used here, where other tools' were given.

    Raises:
        TypeError: one setting is given under two names.
    """
    known, found = aliases(kind), dict[str, Any]()
    for name, value in named.items():
        here = known.get(name, name)
        if here in found:
            raise TypeError(f"{here} is given twice, once as {name if here != name else 'another name'}")
        found[here] = value
    if isinstance(found.get("loras"), str):
        found["loras"] = tuple(text.strip() for text in found["loras"].split(";") if text.strip())
    elif isinstance(found.get("loras"), list):
        found["loras"] = tuple(found["loras"])
    for of_pass in ("", "hires_"):
        sampler, spacing = of_pass + "sampler", of_pass + "spacing"
        if isinstance(found.get(sampler), str):
            found[sampler], in_name = sampler_of(found[sampler])
            if in_name is not None and found.get(spacing) is None:
                found[spacing] = in_name
        if isinstance(found.get(spacing), str):
            found[spacing] = spacing_of(found[spacing])
    if isinstance(found.get("hires_upscaler"), str):
        found["hires_upscaler"] = upscaler_of(found["hires_upscaler"])
    return found


def random_seed(count: int = 1) -> int:
    """A seed that nobody chose, such that the `count` - 1 next ones are seeds too."""
    return secrets.randbelow(SEEDS - count + 1)


# Checks


def need(good: bool, name: str, expected: str, found: Any, advice: str = "") -> None:
    """Raises ValueError, naming a setting, what was expected and what was found, unless it is good."""
    if not good:
        raise ValueError(f"{name} must be {expected}, found {found!r}{advice}")


def check_positive(**numbers: Any) -> None:
    """Raises ValueError unless all are whole numbers above 0."""
    for name, number in numbers.items():
        need(is_int(number, 1), name, "a whole number above 0", number)


def counted(values: Mapping[str, Any]) -> str:
    """The setting that counts up over the pictures of a request: seed, or variation_seed where that has a strength."""
    return "variation_seed" if values.get("variation_strength") else "seed"


def check_seeds(values: Mapping[str, Any], count: int) -> None:
    """Raises ValueError unless there are `count` seeds from the one that is counted up. values: settings by name."""
    _check_variation(values)
    name = counted(values)
    seed = values.get(name, 0)
    need(is_int(seed, 0, SEEDS - count), name, "a whole number in [0, 2^32 - count]", seed)


def _check_variation(values: Mapping[str, Any]) -> None:
    """Raises ValueError unless what is said of a variation, and of the noise of another size, goes together."""
    strength, seed_size, noise = (values.get(name) for name in ("variation_strength", "seed_size", "noise"))
    if strength and values.get("variation_seed") is None:
        raise ValueError("variation_strength needs a variation_seed: a whole number, or -1 for a random one")
    if noise is not None and not isinstance(noise, str) and (strength or seed_size is not None):
        name = "variation_strength" if strength else "seed_size"
        raise ValueError(f"{name} is for the noise of seeds, and noise is given as an array; leave one of them out")


def check_values(values: Mapping[str, Any], kind: type[Request] | None = None) -> None:
    """Raises ValueError unless all settings that are given are usable. values: by name, defaults in their place."""
    kind = kind or Request
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    for name, known in settings(kind).items():
        value = values.get(name)
        if name in values and not (value is None and defaults[name] is None):
            good, advice = known.accepts(value), ""
            if not good and known.nearest is not None and isinstance(value, str):
                advice = f"; nearest to it is {known.nearest(value)}"
            need(good, name, known.expected, value, advice)
            if known.kind in ("text", "texts"):
                expected = "text (half of a character, or bytes that are none, cannot be kept in a recipe)"
                texts: Any = [value] if isinstance(value, str) else value if known.kind == "texts" else []
                need(all(map(is_storable, texts)), name, expected, value)
    _check_sampler(values, [name for name in DEPENDENT if values.get(name) not in (None, defaults[name])])
    hires = [name for name in values if name.startswith("hires_")]
    _check_hires(values, [name for name in hires if values[name] not in (None, defaults[name])])
    _check_variation(values)


def _check_hires(values: Mapping[str, Any], given: Sequence[str]) -> None:
    """Raises ValueError where settings of a second pass are given without one, or twice, or with a picture."""
    both = [name for name in ("hires_scale", "hires_size") if name in given]
    if given and not both:
        raise ValueError(f"{given[0]} is of a second pass; give hires_scale or hires_size too")
    if len(both) > 1:
        raise ValueError("hires_scale and hires_size say the same; give one of them")
    if both and values.get("image") is not None:
        raise ValueError(f"{both[0]} is for pictures from a prompt alone; leave the image out, or {both[0]}")


def _check_sampler(values: Mapping[str, Any], given: Sequence[str]) -> None:
    """Raises ValueError where a setting is given that the sampler or the spacing does not have."""
    sampler, spacing = TRAITS.get(values.get("sampler") or ""), values.get("spacing")
    if sampler is not None:
        for name in ("eta", *CHURN):
            if name in given and name not in sampler.options:
                owners = ", ".join(each for each, one in TRAITS.items() if name in one.options)
                need(False, name, f"left out for {values['sampler']} (it belongs to {owners})", values[name])
        good = "s_noise" not in given or sampler.adds_noise
        need(good, "s_noise", f"left out for {values['sampler']}, which adds no noise", values.get("s_noise"))
    if spacing is not None:
        good = spacing in RHO or "rho" not in given
        need(good, "rho", f"left out for {spacing} (it belongs to {', '.join(RHO)})", values.get("rho"))


def check_mask_settings(values: Mapping[str, Any], image: str = "the image that it belongs to") -> None:
    """Raises ValueError if settings of a mask are given without what they need.

    values: settings by name; image: what the picture to start from is called.
    """
    is_extended = any(parse_sides(values.get("outpaint")))
    for name, its_name in (("mask", "a mask"), ("outpaint", "outpaint")):
        if values.get(name) is not None and values.get("image") is None:
            raise ValueError(f"{its_name} needs {image}")
    for name, usual in (("feather", None), ("only_masked", None), ("soft_mask", SOFT_MASKS[0])):
        if values.get(name, usual) != usual and values.get("mask") is None and not is_extended:
            raise ValueError(f"{name} needs a mask, or outpaint")


def check_request(request: Request, config: ModelConfig, name: str) -> Request:
    """The request with every default in its place, if a model can make it as far as that shows without its picture.

    name: of the model, for messages.

    Raises:
        TypeError: not a `Request`. ValueError: a setting is out of range, of the wrong kind, or not for this model.
    """
    from sdjax.text import prompt as prompts

    if not isinstance(request, Request):
        raise TypeError(f"expected a sdjax.Request, found {type(request).__name__}; write Request(prompt, seed=1, ...)")
    resolved = with_defaults(request, config.sampling)
    check_values({name: getattr(resolved, name) for name in settings(type(request))}, type(request))
    channels, latent = config.unet.in_channels, config.unet.out_channels
    if channels not in (latent, 9):
        raise ValueError(
            f"{name} has {channels} input channels; text-to-image, image-to-image and inpainting are for models with "
            f"{latent} or 9"
        )
    if resolved.steps is not None and resolved.steps > config.schedule.steps:
        raise ValueError(f"steps must be a whole number in [1, {config.schedule.steps}], found {resolved.steps}")
    if request.clip_skip is not None and request.clip_skip >= config.clip.layers:
        raise ValueError(f"clip_skip must lie in [0, {config.clip.layers}), found {request.clip_skip}")
    check_mask_settings({name: getattr(request, name) for name in settings()})
    if request.soft_mask == "differential" and channels == 9:
        raise ValueError(
            f"{name} is an inpainting model, which sees the mask in black and white; soft_mask differential is for "
            f"models with {latent} input channels: leave it out, or take another model"
        )
    for text in (request.prompt, request.negative_prompt):
        if isinstance(text, str):
            prompts.check(text, request.weighting, config.clip.length - 2)
    _check_travel(request, config)
    size_of(request, config, None if request.image is None else (8, 8))  # any picture: what was asked for counts
    if resolved.hires_scale is not None or resolved.hires_size is not None:
        try:
            if (second := second_pass(resolved, config)) is not None:
                check_request(second.request, config, name)
        except ValueError as error:
            raise ValueError(f"in the second pass {error}") from None
    if request.seed_size is not None and any(side % config.vae.downscale for side in parse_size(request.seed_size)):
        raise ValueError(f"seed_size must be multiples of {config.vae.downscale}, found {request.seed_size}")
    return resolved


def _check_travel(request: Request, config: ModelConfig) -> None:
    """Raises ValueError unless there is something between a request's prompt and the one that it goes to."""
    from sdjax.text import prompt as prompts

    if not request.to_prompt:
        need(request.travel == 0, "travel", "0 without a to_prompt to go to", request.travel)
        return
    if not isinstance(request.prompt, str):
        raise ValueError("to_prompt goes with a prompt that is text; sdjax.text.prompt.interpolated mixes encoded ones")
    prompts.check(request.to_prompt, request.weighting, config.clip.length - 2)
    prompts.single(request.prompt, request.weighting, "travel", networks=True)
    prompts.single(request.to_prompt, request.weighting, "travel")


# What follows from a request


def task_of(request: Request) -> str:
    """Which of `TASKS` a request is."""
    if request.image is None:
        return "txt2img"
    return "img2img" if request.mask is None and not any(parse_sides(request.outpaint)) else "inpaint"


def with_defaults(request: Request, defaults: SamplingConfig) -> Request:
    """The request with every default in its place. defaults: the model's own."""
    missing = ("steps", "guidance", "sampler", "spacing")
    found = {name: getattr(defaults, name) for name in missing if getattr(request, name) is None}
    chosen = TRAITS.get(request.sampler) if isinstance(request.sampler, str) else None
    if "guidance" in found and chosen is not None and chosen.cfg_pp:
        found["guidance"] = CFG_PP_GUIDANCE
    if request.strength is None:
        found["strength"] = STRENGTHS.get(task_of(request), 1.0)  # without a picture all is made from noise
    return dataclasses.replace(request, **found)


class SecondPass(NamedTuple):
    """The second pass of hires-fix, as a request of its own at the larger size; and how many steps of it run."""

    request: Request
    steps: int


def second_pass(resolved: Request, config: ModelConfig) -> SecondPass | None:
    """The second pass of a request with every default in its place; None: it has one pass.

    As in A1111 its schedule has steps / strength steps, of which the last ones run.

    Raises:
        ValueError: the size is none that a picture can have, or smaller than that of the first pass.
    """
    from sdjax.image import working_size

    if resolved.hires_scale is None and resolved.hires_size is None:
        return None
    first, cell = size_of(resolved, config, None), config.vae.downscale
    if resolved.hires_size is None:
        width, height = (int(side * (resolved.hires_scale or 1)) // cell * cell for side in first)
    else:
        width, height = parse_size(resolved.hires_size)
    width, height = working_size((width, height), asked=(width, height), multiple=cell)
    if width < first[0] or height < first[1]:
        raise ValueError(
            f"the picture would be {width}x{height}, smaller than in the first, {first[0]}x{first[1]}; make "
            "hires_size larger, or leave it out"
        )
    strength = HIRES_STRENGTH if resolved.hires_strength is None else resolved.hires_strength
    steps = min(resolved.hires_steps or resolved.steps or 1, config.schedule.steps)
    sampler, spacing = resolved.hires_sampler or resolved.sampler, resolved.hires_spacing or resolved.spacing
    chosen, was = TRAITS[sampler or ""], TRAITS[resolved.sampler or ""]
    guidance = resolved.hires_guidance
    if guidance is None and chosen.cfg_pp == was.cfg_pp:
        guidance = resolved.guidance
    defaults: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(resolved)}
    changed = {name: defaults[name] for name in settings(type(resolved)) if name.startswith("hires_")}
    changed |= {name: defaults[name] for name in ("eta", *CHURN) if name not in chosen.options}
    if not chosen.adds_noise:
        changed["s_noise"] = defaults["s_noise"]
    if spacing not in RHO:
        changed["rho"] = None
    if resolved.hires_prompt:  # which goes nowhere else
        changed |= dict(to_prompt="", travel=0.0)
    changed |= dict(
        prompt=resolved.hires_prompt or resolved.prompt,
        negative_prompt=resolved.hires_negative_prompt or resolved.negative_prompt,
        width=width,
        height=height,
        sampler=sampler,
        spacing=spacing,
        guidance=guidance,
        steps=max(1, min(int(steps / max(strength, 1e-3)), config.schedule.steps)),
        noise=resolved.noise if isinstance(resolved.noise, str) else "jax",
    )
    return SecondPass(dataclasses.replace(resolved, **changed), steps if strength > 0 else 0)


def plan(request: Request, config: ModelConfig, last: int | None = None) -> Plan:
    """The sampler's rows for one picture's settings, read-only. last: how many steps run (`make_plan`)."""
    from sdjax.diffusion.plan import make_plan

    resolved = with_defaults(request, config.sampling)
    values = {name: getattr(resolved, name) for name, known in settings().items() if known.in_plan}
    return make_plan(
        config.schedule, **(values | {"guidance_interval": tuple(resolved.guidance_interval), "last": last})
    )


def parse_size(text: Any) -> tuple[int, int]:
    """Width and height from a text such as "512x768".

    Raises:
        ValueError: it is something else.
    """
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text) if isinstance(text, str) else None
    if match is None:
        raise ValueError(f"size must be WIDTHxHEIGHT such as 512x768, found {text!r}")
    return int(match[1]), int(match[2])


def parse_sides(text: Any) -> Sides:
    """Pixels on each side of a picture from a text such as "left=128,right=64", or "64" for all four; None: none.

    Raises:
        ValueError: it is something else.
    """
    from sdjax.image import Sides

    found: dict[str, int] = {}
    if text is None:
        return Sides()
    for part in text.split(",") if isinstance(text, str) else [""]:
        match = re.fullmatch(r"(?:([a-z]+)\s*=\s*)?([0-9]{1,5})", part.strip().lower())
        names = [] if match is None else {*SIDES.values()} if match[1] is None else [SIDES.get(match[1], "")]
        if match is None or "" in names or int(match[2]) > LARGEST_SIDE or found.keys() & {*names}:
            raise ValueError(f"outpaint must be {settings()['outpaint'].expected}, found {text!r}")
        found |= dict.fromkeys(names, int(match[2]))
    return Sides(**found)


def size_of(request: Request, config: ModelConfig, given: tuple[int, int] | None) -> tuple[int, int]:
    """The (width, height) to work at: what was asked for, else near the given picture's, else the model's own.

    given: (width, height) of the picture to start from, if there is one.

    Raises:
        ValueError: not a multiple of the latent cell, or one side of a picture's alone. Of a tiled picture: not a
        multiple of the UNet's coarsest cell, where the wrapped borders would not meet.
    """
    from sdjax.image import working_size

    sides = request.width, request.height
    multiple = config.vae.downscale
    if request.tiling:
        multiple *= 2 ** (len(config.unet.channels) - 1)
        uneven = [side for side in sides if is_int(side, 1) and side % multiple]
        need(not uneven, "the sides of a tiled picture", f"multiples of {multiple}", uneven[0] if uneven else None)
    if given is None:
        width, height = (config.image_size if side is None else side for side in sides)
        return working_size((width, height), asked=(width, height), multiple=multiple)
    if sides == (None, None):
        return working_size(given, multiple=multiple)
    if request.width is None or request.height is None:
        raise ValueError("give both width and height, or neither")
    return working_size(given, asked=(request.width, request.height), multiple=multiple)


def numbered(request: Request, j: int) -> Request:
    """Picture number j, from 0, of several: with the next seeds, or where it is a variation the next of these."""
    if not j:
        return request
    name = counted(vars(request))
    return dataclasses.replace(request, **{name: getattr(request, name) + j})


def seeds_of(request: Request) -> str:
    """What tells the pictures of a request apart in names of files: "SEED", or "SEED-VARIATION" for variations."""
    seed = f"{request.seed}"
    return f"{seed}-{request.variation_seed}" if request.variation_strength else seed


def requests_for(
    prompts: str | np.ndarray | Sequence[str | np.ndarray],
    *,
    count: int = 1,
    noise: str | Array | np.ndarray = "jax",
    **named: Any,
) -> list[Request]:
    """A request for each prompt and each of `count` seeds: seed, seed + 1, ..., or of as many variations (`numbered`).

    noise: as in `Request`, or an array f32[b, h, w, c] with a row for each.
    named: the other settings, by any of their names.

    Raises:
        ValueError, TypeError: a setting that all share is not usable.
    """
    import numpy as np

    texts: Any = [prompts] if _is_prompt(prompts) else prompts
    good = isinstance(texts, Sequence) and len(texts) > 0 and all(map(_is_prompt, texts))
    need(good, "prompt", "a string, or a list of at least one string", prompts)
    check_positive(count=count)
    shared = ours(named)
    for name in RANDOM:
        if is_int(shared.get(name), -1, -1):
            shared[name] = random_seed(count)
            warnings.warn(f"{name} -1 stands for a random one, which is {shared[name]}", stacklevel=4)
    check_seeds({**shared, "noise": noise}, count)
    total = len(texts) * count
    if not isinstance(noise, str) and (np.ndim(noise) != 4 or len(noise) != total):
        raise ValueError(f"noise must have the shape ({total}, h, w, c), found {np.shape(noise)}")
    noises: list[Any] = [noise] * total if isinstance(noise, str) else list(noise)
    return [
        numbered(Request(text, noise=noises[i * count + j], **shared), j)
        for i, text in enumerate(texts)
        for j in range(count)
    ]
