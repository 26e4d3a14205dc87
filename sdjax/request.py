"""What can be asked for: one table of settings, and a `Request` for each picture.

A field of `Request` carries all that is known of a setting: its kind and bounds, its help, where it may be given, its
names in other tools. The options of the command line, the fields of job lines, the checks, the recipe in a picture and
the documentation are derived from it: adding a setting is adding one field.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import secrets
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from sdjax.config import ModelConfig, SamplingConfig
from sdjax.diffusion.plan import Plan, make_plan
from sdjax.diffusion.samplers import SAMPLERS
from sdjax.diffusion.schedule import SPACINGS
from sdjax.image import ImageLike, working_size
from sdjax.text import prompt as prompts
from sdjax.text.prompt import WEIGHTINGS
from sdjax.types import Array

BATCH = 8
"""Pictures made at once on each device; longer requests are worked through in batches of this size."""

NOISES = ("jax", "torch")
"""Where the initial noise may come from."""

STRENGTHS = {"img2img": 0.75, "inpaint": 1.0}
"""How much of a picture is changed when nothing is said."""

LARGEST_NUMBER = float(np.finfo(np.float32).max)
SEEDS = 2**32

TASKS = ("txt2img", "img2img", "inpaint")
WITH_PICTURE = ("img2img", "inpaint")

SAMPLER_NAMES = {
    "ddpm": "DDPM",
    "ddim": "DDIM",
    "plms": "PLMS",
    "euler": "Euler",
    "euler_a": "Euler a",
    "heun": "Heun",
    "dpm2": "DPM2",
    "dpm2_a": "DPM2 a",
    "lms": "LMS",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_sde": "DPM++ SDE",
    "unipc": "UniPC",
    "lcm": "LCM",
}
"""Samplers as other tools spell them; a spacing may follow, as in "DPM++ 2M Karras". One that is
not in it goes by our name.
"""


def is_int(value: Any, low: int | None = None, high: int | None = None) -> bool:
    """Whether a value is a whole number within bounds; True and False are none."""
    number = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return number and (low is None or value >= low) and (high is None or value <= high)


def is_real(value: Any, low: float = -np.inf, high: float = np.inf) -> bool:
    """Whether a value is a number within bounds that float32 can hold."""
    number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    return number and low <= value <= high and abs(value) <= LARGEST_NUMBER


def is_storable(text: str) -> bool:
    """Whether a text can be kept in a file: half a character, or bytes that are none, cannot."""
    return text.encode("utf-8", "replace").decode() == text


def _is_interval(value: Any) -> bool:
    pair = isinstance(value, tuple | list) and len(value) == 2 and all(is_real(end, 0, 1) for end in value)
    return pair and value[0] <= value[1]


def _is_prompt(value: Any) -> bool:
    return isinstance(value, str) or (hasattr(value, "shape") and len(value.shape) == 2)


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
        if is_int(self.seed, -1, -1):
            object.__setattr__(self, "seed", random_seed())  # as `dataclasses` sets fields of frozen classes

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
    "DPM++ 2M Karras" for a sampler with its spacing. A seed of -1 is replaced by a random one.
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
        kind="text",
        expected=f"one of {', '.join(SAMPLERS)}",
        accepts=lambda value: isinstance(value, str) and value in SAMPLERS,
        help=", ".join(SAMPLERS),
        usual="dpmpp_2m, or as the model says",
        metavar="S",
        aliases=("sampler_name",),
        similar=("sampling_method", "scheduler", "sampler_index"),
        label="Sampler",
        shown=lambda value: SAMPLER_NAMES.get(value, value),
        in_plan=True,
    )
    spacing: str | None = setting(
        None,
        kind="text",
        expected=f"one of {', '.join(SPACINGS)}",
        accepts=lambda value: isinstance(value, str) and value in SPACINGS,
        help=", ".join(SPACINGS),
        usual="karras, or as the model says",
        metavar="K",
        similar=("schedule", "schedule_type", "noise_schedule", "sigmas"),
        label="Schedule type",
        shown=str.capitalize,
        in_plan=True,
    )
    eta: float | None = setting(
        None,
        kind="float",
        expected="in [0, 1]",
        accepts=lambda value: is_real(value, 0, 1),
        help="noise of the sampler ddim, 0 to 1",
        usual="0",
        metavar="E",
        similar=("ddim_eta",),
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
    noise: str | Array | np.ndarray = setting(
        "jax",
        kind="noise",
        expected=f"one of {', '.join(NOISES)}, or an array",
        accepts=lambda value: not isinstance(value, str) or value in NOISES,
        help="where seeds' noise comes from: jax, or torch as diffusers draws it on a CPU",
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
    if isinstance(found.get("sampler"), str):
        sampler, spacing = sampler_of(found["sampler"])
        found["sampler"] = sampler
        if spacing is not None and found.get("spacing") is None:
            found["spacing"] = spacing
    return found


def sampler_of(name: str) -> tuple[str, str | None]:
    """Sampler, and spacing if it is in the name, from a name of ours or of other tools ("DPM++ 2M Karras")."""
    theirs = {spelling.lower(): here for here, spelling in SAMPLER_NAMES.items()}
    plain = " ".join(name.lower().split())
    first, _, last = plain.rpartition(" ")
    if name not in SAMPLERS and last in SPACINGS and (first in theirs or first in SAMPLERS):
        return theirs.get(first, first), last
    return theirs.get(plain, name), None


def random_seed(count: int = 1) -> int:
    """A seed that nobody chose, such that the `count` - 1 next ones are seeds too."""
    return secrets.randbelow(SEEDS - count + 1)


# Checks


def need(good: bool, name: str, expected: str, found: Any) -> None:
    """Raises ValueError, naming a setting, what was expected and what was found, unless it is good."""
    if not good:
        raise ValueError(f"{name} must be {expected}, found {found!r}")


def check_positive(**numbers: Any) -> None:
    """Raises ValueError unless all are whole numbers above 0."""
    for name, number in numbers.items():
        need(is_int(number, 1), name, "a whole number above 0", number)


def check_seeds(seed: Any, count: int) -> None:
    """Raises ValueError unless seed, seed + 1, ... are `count` seeds."""
    need(is_int(seed, 0, SEEDS - count), "seed", "a whole number in [0, 2^32 - count]", seed)


def check_values(values: Mapping[str, Any], kind: type[Request] | None = None) -> None:
    """Raises ValueError unless all settings that are given are usable. values: by name, defaults in their place."""
    kind = kind or Request
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    for name, known in settings(kind).items():
        value = values.get(name)
        if name in values and not (value is None and defaults[name] is None):
            need(known.accepts(value), name, known.expected, value)
            if known.kind in ("text", "texts"):
                expected = "text (half of a character, or bytes that are none, cannot be kept in a recipe)"
                texts: Any = [value] if isinstance(value, str) else value if known.kind == "texts" else []
                need(all(map(is_storable, texts)), name, expected, value)
    eta, sampler = values.get("eta"), values.get("sampler")
    need(eta is None or sampler in (None, "ddim"), "eta", f"left out for {sampler} (it belongs to ddim)", eta)


def check_request(request: Request, config: ModelConfig, name: str) -> Request:
    """The request with every default in its place, if a model can make it as far as that shows without its picture.

    name: of the model, for messages.

    Raises:
        TypeError: not a `Request`. ValueError: a setting is out of range, of the wrong kind, or not for this model.
    """
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
    if request.mask is not None and request.image is None:
        raise ValueError("a mask needs the image that it belongs to")
    for text in (request.prompt, request.negative_prompt):
        if isinstance(text, str):
            prompts.check(text, request.weighting, config.clip.length - 2)
    _check_travel(request, config)
    size_of(request, config, None if request.image is None else (8, 8))  # any picture: what was asked for counts
    return resolved


def _check_travel(request: Request, config: ModelConfig) -> None:
    """Raises ValueError unless there is something between a request's prompt and the one that it goes to."""
    if not request.to_prompt:
        need(request.travel == 0, "travel", "0 without a to_prompt to go to", request.travel)
        return
    if not isinstance(request.prompt, str):
        raise ValueError("to_prompt goes with a prompt that is text; sdjax.text.prompt.interpolated mixes encoded ones")
    prompts.check(request.to_prompt, request.weighting, config.clip.length - 2)
    prompts.single(request.prompt, request.weighting, "travel", networks=True)
    prompts.single(request.to_prompt, request.weighting, "travel")


# What follows from a request


def with_defaults(request: Request, defaults: SamplingConfig) -> Request:
    """The request with every default in its place. defaults: the model's own."""
    missing = ("steps", "guidance", "sampler", "spacing")
    found = {name: getattr(defaults, name) for name in missing if getattr(request, name) is None}
    if request.strength is None:
        task = "img2img" if request.image is not None and request.mask is None else "inpaint"
        found["strength"] = STRENGTHS[task]  # without a picture all is made from noise, too
    return dataclasses.replace(request, **found)


def plan(request: Request, config: ModelConfig) -> Plan:
    """The sampler's rows for one picture's settings, read-only."""
    resolved = with_defaults(request, config.sampling)
    values = {name: getattr(resolved, name) for name, known in settings().items() if known.in_plan}
    return make_plan(config.schedule, **(values | {"guidance_interval": tuple(resolved.guidance_interval)}))


def parse_size(text: Any) -> tuple[int, int]:
    """Width and height from a text such as "512x768".

    Raises:
        ValueError: it is something else.
    """
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text) if isinstance(text, str) else None
    if match is None:
        raise ValueError(f"size must be WIDTHxHEIGHT such as 512x768, found {text!r}")
    return int(match[1]), int(match[2])


def size_of(request: Request, config: ModelConfig, given: tuple[int, int] | None) -> tuple[int, int]:
    """The (width, height) to work at: what was asked for, else near the given picture's, else the model's own.

    given: (width, height) of the picture to start from, if there is one.

    Raises:
        ValueError: not a multiple of the latent cell, or one side of a picture's alone. Of a tiled picture: not a
        multiple of the UNet's coarsest cell, where the wrapped borders would not meet.
    """
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


def requests_for(
    prompts: str | np.ndarray | Sequence[str | np.ndarray],
    *,
    count: int = 1,
    noise: str | Array | np.ndarray = "jax",
    **named: Any,
) -> list[Request]:
    """A request for each prompt and each of `count` seeds: seed, seed + 1, ...

    noise: as in `Request`, or an array f32[b, h, w, c] with a row for each.
    named: the other settings, by any of their names.

    Raises:
        ValueError, TypeError: a setting that all share is not usable.
    """
    texts: Any = [prompts] if _is_prompt(prompts) else prompts
    good = isinstance(texts, Sequence) and len(texts) > 0 and all(map(_is_prompt, texts))
    need(good, "prompt", "a string, or a list of at least one string", prompts)
    check_positive(count=count)
    shared = ours(named)
    seed = shared.pop("seed", 0)
    if is_int(seed, -1, -1):
        seed = random_seed(count)
        warnings.warn(f"seed -1 stands for a random one, which is {seed}", stacklevel=4)
    check_seeds(seed, count)
    total = len(texts) * count
    if not isinstance(noise, str) and (np.ndim(noise) != 4 or len(noise) != total):
        raise ValueError(f"noise must have the shape ({total}, h, w, c), found {np.shape(noise)}")
    noises: list[Any] = [noise] * total if isinstance(noise, str) else list(noise)
    return [
        Request(text, seed=seed + j, noise=noises[i * count + j], **shared)
        for i, text in enumerate(texts)
        for j in range(count)
    ]
