"""The "parameters" text that AUTOMATIC1111's web UI writes into its pictures, and all who write as it does.

A prompt of several lines, perhaps "Negative prompt: " with several more, and one line of "Name: value" pairs. A last
line with fewer than three pairs is no such line but text of the prompt, as in AUTOMATIC1111's own reader. Forge,
SD.Next, Civitai and sdjax itself write the same text with names of their own.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NamedTuple

from sdjax.diffusion.names import ALL_SPACINGS, TRAITS
from sdjax.hints import hint
from sdjax.pipeline.foreign.findings import Findings, Foreign, decimal, real, short, whole
from sdjax.pipeline.foreign.names import (
    A1111S_OWN,
    ALWAYS,
    AUTOMATIC,
    BROWNIAN,
    TWICE,
    put_sampler,
    put_spacing,
    put_upscaler,
)
from sdjax.request import settings

NEGATIVE = "Negative prompt:"
A1111_CFG_PP = 12.5  # what A1111 divides the guidance of CFG++ by
LEAST_PAIRS = 3
HASH = r"[0-9a-f]{8,64}"

HARMLESS = {
    *("Version", "App", "Backend", "Created Date", "Civitai metadata", "Time taken", "User", "Comment", "Index"),
    *("Operations", "Pipeline", "Batch", "Batch size", "Batch pos", "Hashes", "Lora hashes", "Styles", "Workflow"),
    *("Style Selector Enabled", "Style Selector Randomize", "Style Selector Style", "VAE hash", "Model hash"),
    *("Template", "Negative Template", "Wildcard prompt", "Wildcard negative prompt", "Hires negative template"),
    *("Hires template", "Diffusion in Low Bits", "Lora errors", "Template Generated Grid"),
}
"""What says how a picture came about but changes nothing here: prompts have their styles and wildcards filled in."""

PLAIN = {
    "CFG scale": ("guidance", real),
    "CFG Scale": ("guidance", real),
    "Steps": ("steps", whole),
    "CFG rescale": ("guidance_rescale", real),
    "Eta": ("eta", real),
    "Eta DDIM": ("eta", real),
    "Sigma churn": ("s_churn", real),
    "Sigma tmin": ("s_tmin", real),
    "Sigma tmax": ("s_tmax", real),
    "Sigma noise": ("s_noise", real),
    "Variation seed strength": ("variation_strength", real),
    "Variation strength": ("variation_strength", real),
}
"""Names that are one setting of ours with the same number."""

REASONS = {
    "ENSD": "left out; the noise added between steps has no seed of its own here",
    "Eta noise seed delta": "left out; the noise added between steps has no seed of its own here",
    "NGMS": "left out; the negative prompt takes part in every step",
    "NGMS all steps": "left out; the negative prompt takes part in every step",
    "Token merging ratio": "left out; tokens are not merged",
    "Token merging ratio hr": "left out; tokens are not merged",
    "Refiner": "left out; one model makes the whole picture",
    "Refiner switch at": "left out; one model makes the whole picture",
    "Face restoration": "left out; faces are not restored afterwards",
    "Discard penultimate sigma": "left out; no noise level is discarded",
    "Schedule max sigma": "left out; the model's own range of noise is used",
    "Schedule min sigma": "left out; the model's own range of noise is used",
    "Pad conds": "left out; prompts are padded as sdjax does",
    "Pad conds v0": "left out; prompts are padded as sdjax does",
    "Downcast alphas_cumprod": "left out; the noise levels are exact",
    "Noise Schedule": "left out; the model's own schedule is used",
    "SGM noise multiplier": "left out; the first noise is the usual one",
    "Noise multiplier": "left out; the noise is the usual one",
    "Extra noise": "left out; no noise is added before the second pass",
    "Distilled CFG Scale": "left out; it is for other kinds of models",
    "Hires Distilled CFG Scale": "left out; it is for other kinds of models",
    "Image CFG scale": "left out; it is for models that edit pictures",
    "Hires checkpoint": "left out; one model makes both passes",
    "Init image hash": "left out; the picture that it started from is not in the text",
    "Conditional mask weight": "left out; it is of inpainting",
    "Mask blur": "left out; it is of inpainting",
    "Mask mode": "left out; it is of inpainting",
    "Masked content": "left out; it is of inpainting",
    "Masked area padding": "left out; it is of inpainting",
    "Inpaint area": "left out; it is of inpainting",
    "Old prompt editing timelines": "left out; schedules in prompts count as in version 1.6 and later",
    "Sampler options": "left out; the sampler's usual options are used",
    "Prompt2": "left out; the second text encoder reads the same prompt",
    "Negative2": "left out; the second text encoder reads the same prompt",
    "Script": "left out; one picture is made, not the sheet of a script",
    "Beta schedule alpha": "left out; 0.6 is used",
    "Beta schedule beta": "left out; 0.6 is used",
    "Hires CFG Rescale": "left out; the second pass is guided as the first",
}
"""Names of what cannot be honoured, with what is done instead."""

EXTENSIONS = {
    "ADetailer": "left out; faces and hands are not done again",
    "ControlNet": "left out; no control picture steers the result",
    "Dynamic thresholding": "left out; guidance is not clipped",
    "FreeU": "left out; the model is used as it is",
    "IP-Adapter": "left out; no picture steers the result",
    "Kohya HRFix": "left out; the model is used as it is",
    "Perturbed-Attention": "left out; guidance is the usual one",
    "Postprocess": "left out; it was done to the picture afterwards",
    "Regional Prompter": "left out; the prompt holds for the whole picture",
    "RP ": "left out; the prompt holds for the whole picture",
    "SAG ": "left out; guidance is the usual one",
    "advanced_sampling": "left out; the model's own schedule is used",
    "dynthres_": "left out; guidance is not clipped",
    "sag_": "left out; guidance is the usual one",
    "sd3_": "left out; it is for other kinds of models",
    "Tiled Diffusion": "left out; the picture is made in one piece",
    "Ultimate SD upscale": "left out; it was done to the picture afterwards",
    "UniPC ": "left out; the usual options of UniPC are used",
}
"""What extensions say, by how the names begin; one line for each extension."""

SECOND_PASS = (
    *("Hires upscale", "Hires resize", "Hires steps", "Hires upscaler", "Hires sampler", "Hires schedule type"),
    *("Hires CFG Scale", "Hires prompt", "Hires negative prompt", "Denoising strength"),
)
"""What is said of hires-fix."""

NOTHING = ("", "None", "False", "0", "0.0", "Disable", "Disabled", "Automatic", "Built-in", "Use same choices")
"""Values that say that something was not used."""

PARSERS = {"a1111": "a1111", "compel": "compel", "fixed": "none", "full": "a1111", "native": "a1111"}
"""SD.Next's parsers of prompts, by their first word."""

EMPHASES = {"original": "a1111", "none": "none"}
"""AUTOMATIC1111's kinds of emphasis that sdjax has."""


class Text(NamedTuple):
    """A text taken apart. strays: pieces of its settings that are no pair."""

    prompt: str
    negative: str
    pairs: dict[str, str]
    strays: list[str]
    after: list[str]


def parse_parameters(text: str) -> Foreign:
    """What AUTOMATIC1111's text asks for, in the words of a `Request`.

    Raises:
        ValueError: there is no text, or it is of another kind.
    """
    text = repaired(text)
    if not text.strip():
        raise ValueError("the text is empty; expected a prompt and a line of settings, as A1111 writes them")
    if text.lstrip().startswith("{"):
        raise ValueError("the text is JSON of a tool that is not known; expected that of A1111, ComfyUI or InvokeAI")
    taken, found = taken_apart(text), Findings()
    pairs, source = taken.pairs, source_of(taken.pairs)
    found.put_text("prompt", taken.prompt)
    found.put_text("negative_prompt", taken.negative)
    if not pairs:
        found.leave("the text", "it has no settings, only prompts; sdjax's own settings are used")
        return Foreign(source, found.settings, unhonoured=found.finish())
    model, networks = _model(found, pairs), _networks(found, pairs)
    _weighting(found, pairs, source)
    _noise(found, pairs, source)
    _sampling(found, pairs, source)
    _sizes(found, pairs)
    _rest(found, pairs)
    for piece in taken.strays:
        found.leave(piece, "not a name with a value; the text may be cut off or damaged here")
    for line in taken.after:
        found.leave(line, "left out; it stands after the settings")
    return Foreign(source, found.settings, *model, found.finish(), networks)


# Taking the text apart


def repaired(text: str) -> str:
    """The text as it was meant, where it was written in one encoding and read in another."""
    marks = ("Steps: ", NEGATIVE)
    readings = [("latin-1", "utf-8"), ("latin-1", "utf-16-le"), ("latin-1", "utf-16-be"), ("utf-16-le", "utf-16-be")]
    for written, meant in readings:
        try:
            other = text.encode(written).decode(meant).lstrip("\N{ZERO WIDTH NO-BREAK SPACE}")
        except UnicodeError:
            continue
        was, now = (any(mark in reading for mark in marks) for reading in (text, other))
        if other != text and now and (meant == "utf-8" or not was):
            return other
    return text.strip("\0\N{ZERO WIDTH NO-BREAK SPACE}")


def taken_apart(text: str) -> Text:
    """Prompts and settings of a text."""
    text = text.strip()
    if not re.search(r"^\s*Steps: *[0-9]", text, re.MULTILINE) and re.search(r"\sSteps: *[0-9]+, *Sampler: ", text):
        text = re.sub(r"\s(Steps: *[0-9]+, *Sampler: )", r"\n\1", text)  # some sites lose the line breaks
        text = re.sub(rf"\s({NEGATIVE})", r"\n\1", text)
    lines = [line.strip() for line in text.split("\n")]
    at = _settings_line(lines)
    pairs, strays = pairs_of(lines[at]) if at is not None else ({}, [])
    after = [] if at is None else lines[at + 1 :]
    prompts: dict[bool, list[str]] = {False: [], True: []}
    negative = False
    for line in lines[:at]:
        if line.startswith(NEGATIVE):
            negative, line = True, line.removeprefix(NEGATIVE).strip()
        prompts[negative].append(line)
    after = [line for line in after if line and line.partition(":")[0] not in HARMLESS]
    return Text("\n".join(prompts[False]), "\n".join(prompts[True]), pairs, strays, after)


def _settings_line(lines: list[str]) -> int | None:
    """Which line holds the settings: the last that begins with "Steps: ", or the last of all if it has enough pairs."""
    for at in reversed(range(len(lines))):
        if re.match(r"Steps: *[0-9]", lines[at]):
            return at
    last, known = pairs_of(lines[-1])[0], {*PLAIN, *HARMLESS, *REASONS, "Sampler", "Seed", "Size", "Model"}
    return len(lines) - 1 if len(last) >= LEAST_PAIRS and known & {*last} else None


def pairs_of(line: str) -> tuple[dict[str, str], list[str]]:
    """The "Name: value" pairs of a line, and what is none. Values may be JSON: quoted texts, lists and objects."""
    pairs, strays, at = dict[str, str](), list[str](), 0
    name = re.compile(r"\s*(\w[\w \-/+.()]*?)\s*:\s*")
    while at < len(line):
        match = name.match(line, at)
        comma = line.find(",", at)
        comma = len(line) if comma < 0 else comma
        if match is None or match.end() > comma + 1:
            strays += [line[at:comma].strip()]
        else:
            value, comma = _value(line, match.end())
            if value.startswith('"'):
                strays.append(f"{match[1]}: {value}")
            else:
                pairs.setdefault(match[1], value)
        at = comma + 1
    return pairs, [stray for stray in strays if stray]


def _value(line: str, at: int) -> tuple[str, int]:
    """The value that begins there, and where the comma after it is."""
    if line[at : at + 1] in ('"', "[", "{") and at < len(line):
        try:
            value, end = json.JSONDecoder(strict=False).raw_decode(line, at)
        except (ValueError, RecursionError):
            end = -1
        after = re.compile(r"\s*(,|$)").match(line, end) if end >= 0 else None
        if after is not None:
            return (value if isinstance(value, str) else line[at:end]), after.start(1)
    comma = line.find(",", at)
    comma = len(line) if comma < 0 else comma
    return line[at:comma].strip(), comma


def source_of(pairs: dict[str, str]) -> str:
    """Whose text it is: "sdjax", "ComfyUI", or "A1111" and all who are like it."""
    version = pairs.get("Version", "")
    return next((source for source in ("sdjax", "ComfyUI") if version.startswith(source)), "A1111")


def is_automatic(version: str) -> bool:
    """Whether a version of AUTOMATIC1111 chooses spacings by itself: 1.9 and later, and all of Forge."""
    match = re.match(r"v?([0-9]{1,4})\.([0-9]{1,4})", version)
    return version.startswith("f") or (match is not None and (int(match[1]), int(match[2])) >= (1, 9))


# What the settings mean


def _model(found: Findings, pairs: dict[str, str]) -> tuple[str, str]:
    """The model's name and hash; a line about other files that belong to it."""
    name, digest = pairs.pop("Model", ""), pairs.get("Model hash", "").lower()
    digest = digest if re.fullmatch(r"[0-9a-f]{8,64}", digest) else ""
    for label in [label for label in pairs if label == "VAE" or re.fullmatch(r"(Hires )?Module [0-9]+", label)]:
        file = pairs.pop(label)
        if file not in NOTHING:
            found.leave(f"{label}: {file}", f"not looked for; if it is an autoencoder, give it with {hint('vae')}")
    for resource in _resources(pairs.pop("Civitai resources", "")):
        kind, title = str(resource.get("type", "")).lower(), short(resource.get("modelName") or "")
        if kind == "checkpoint" and title:
            name = name or title
        elif kind:
            weight = real(resource.get("weight"))
            said = f"Civitai resources: {kind} {title!r}" + ("" if weight is None else f", weight {weight:g}")
            given = hint("embeddings") if kind.startswith("embed") else hint("lora", f"FILE:{weight or 1:g}")
            found.leave(said, f"its file is not named in the text; give it with {given}")
    return name, digest


def _resources(text: str) -> list[dict[str, Any]]:
    try:
        said = json.loads(text) if text else []
    except (ValueError, RecursionError):
        said = []
    return [one for one in said if isinstance(one, dict)] if isinstance(said, list) else []


def _networks(found: Findings, pairs: dict[str, str]) -> dict[str, str]:
    """Hashes of adapters by name; lines about learnt words and hypernetworks; tags of an old extension's adapters."""
    hashes = dict[str, str]()
    for part in pairs.get("Lora hashes", "").split(","):
        name, colon, digest = part.rpartition(":")
        if colon and re.fullmatch(HASH, digest.strip().lower()):
            hashes[name.strip()] = digest.strip().lower()
    for name in re.findall(r"<(?:lora|lyco):([^:>]+)", found.settings.get("prompt", "")):
        if re.fullmatch(HASH, pairs.get(name, "")):  # as some sites write them, without the quotes around
            hashes[name] = pairs.pop(name)
    learnt = [part.rpartition(":")[0].strip() or part.strip() for part in pairs.pop("TI hashes", "").split(",")]
    learnt += [part.strip() for part in pairs.pop("TI", "").split(",")]
    learnt += [part.rpartition("[")[0].strip() or part.strip() for part in pairs.pop("Used embeddings", "").split(",")]
    if words := ", ".join(dict.fromkeys(word for word in learnt if word)):
        found.leave(f"learnt words {words}", f"read only from files that are given with {hint('embeddings')}")
    if hypernet := pairs.pop("Hypernet", ""):
        found.leave(f"Hypernet: {hypernet}", "left out; hypernetworks cannot be used")
        pairs.pop("Hypernet strength", None)
    _additional_networks(found, pairs)
    return hashes


def _additional_networks(found: Findings, pairs: dict[str, str]) -> None:
    """AddNet, the extension before tags: its adapters are appended to the prompt as tags."""
    enabled = pairs.pop("AddNet Enabled", "False") == "True"
    for slot in range(1, 6):
        kind, file, unet, text = (
            pairs.pop(f"AddNet {label} {slot}", "") for label in ("Module", "Model", "Weight A", "Weight B")
        )
        weights = [weight for weight in (real(text or unet or "1"), real(unet or "1")) if weight is not None]
        name = re.sub(r"\([0-9a-f]+\)$", "", file).strip()
        if enabled and kind == "LoRA" and name and len(weights) == 2 and not set(name) & set("<>:="):
            found.settings["prompt"] += f" <lora:{name}:{decimal(weights[0])}:{decimal(weights[1])}>"
        elif enabled and kind:
            found.leave(f"AddNet Model {slot}: {file}", "left out; its kind or weights are not known")


def _weighting(found: Findings, pairs: dict[str, str], source: str) -> None:
    """Whose way of writing prompts it is."""
    weighting = "comfy" if source == "ComfyUI" else "a1111"
    emphasis, parser = pairs.pop("Emphasis", "Original"), pairs.pop("Parser", "")
    if emphasis.lower() in EMPHASES:
        weighting = weighting if emphasis == "Original" else EMPHASES[emphasis.lower()]
    else:
        found.leave(f"Emphasis: {emphasis}", "no way of weighting that sdjax has; A1111's usual one is used")
    first = parser.lower().split(" ")[0]
    if first in PARSERS:
        weighting = PARSERS[first]
    if parser and first not in ("a1111", "compel"):
        found.leave(f"Parser: {parser}", f"its weights are read as {weighting} does")
    if source != "sdjax" or weighting != "a1111":
        found.put("weighting", weighting, f"Emphasis: {emphasis}")


def _noise(found: Findings, pairs: dict[str, str], source: str) -> None:
    """Where the noise came from, and the seeds."""
    civitai = "Created Date" in pairs and "Version" not in pairs
    usual = {"sdjax": "jax", "ComfyUI": "CPU"}.get(source, "CPU" if civitai else "GPU")
    if civitai and "RNG" not in pairs:
        found.leave("noise", "the text does not say where it came from; that of torch on the CPU is used")
    words = f"RNG: {pairs['RNG']}" if "RNG" in pairs else "noise of the graphics card, since no RNG is said"
    said = pairs.pop("RNG", usual)
    noise = {"CPU": "torch", "GPU": "torch-cuda", "NV": "torch-cuda", "jax": "jax"}.get(said)
    if noise is None:
        found.leave(words, "not known where this noise comes from; jax's is used")
    elif noise != "jax":
        found.put("noise", noise, words)
    for label, name in (("Seed", "seed"), ("Variation seed", "variation_seed")):
        if label in pairs:
            text = pairs.pop(label)
            if name in found.known:
                found.put_seed(whole(text), f"{label}: {text}", name)
            else:
                found.put(name, whole(text), f"{label}: {text}")
        elif label == "Seed":
            found.leave("Seed", "missing from the text, which may be cut off; 0 is used")
    text = pairs.pop("Seed resize from", "-1x-1")
    if not text.startswith(("-1x", "0x")):  # which say that it was not used
        size = size_in(text)
        found.put("seed_size", None if size is None else f"{size[0]}x{size[1]}", f"Seed resize from: {text}")


def _sampling(found: Findings, pairs: dict[str, str], source: str) -> None:
    """Sampler, spacing, and the numbers that belong to them."""
    version, schedule = pairs.get("Version", ""), pairs.pop("Schedule type", pairs.pop("Scheduler", ""))
    sampler, inside = None, None
    name = pairs.pop("Sampler", "")
    if name:
        sampler, inside = put_sampler(found, name, f"Sampler: {name}")
    else:
        found.leave("Sampler", "missing from the text; the model's usual one is used")
    said = f"Schedule type: {schedule}" if schedule else f"Sampler: {name}"
    if schedule and schedule.lower() != "automatic":
        put_spacing(found, spacing_in(schedule, source), said)
    elif inside is not None:
        put_spacing(found, inside, said)
    elif sampler is not None and source != "sdjax":
        chosen = is_automatic(version) or schedule.lower() == "automatic" or sampler in ALWAYS
        put_spacing(found, AUTOMATIC.get(sampler, "normal") if chosen else "normal", f"{said}, spacing of its own")
    if sampler is not None and TRAITS[sampler].cfg_pp and source == "A1111":
        guidance = real(pairs.pop("CFG scale", pairs.pop("CFG Scale", "")))
        if guidance is not None:  # its scale there is that of the other samplers
            found.put("guidance", guidance / A1111_CFG_PP, f"CFG scale: {guidance:g}")
    if source == "A1111":
        if sampler in BROWNIAN:
            found.leave(f"Sampler: {name}", "its noise comes from a Brownian tree there; here each step has its own")
        if sampler is not None and not TRAITS[sampler].stochastic:  # it would have changed nothing
            pairs.pop("ENSD", None)
            pairs.pop("Eta noise seed delta", None)
        if sampler in TWICE:
            found.leave(f"Sampler: {name}", "the noise level before the last is left out there, and is not here")
    for label, (setting, number) in PLAIN.items():
        if label in pairs:
            text = pairs.pop(label)
            found.put(setting, number(text), f"{label}: {text}")
        elif label in ("Steps", "CFG scale") and "CFG Scale" not in pairs and PLAIN[label][0] not in found.settings:
            found.leave(label, "missing from the text; the model's usual number is used")
    if "Schedule rho" in pairs and (text := pairs.pop("Schedule rho")) not in NOTHING:
        found.put("rho", real(text), f"Schedule rho: {text}")
    if "Clip skip" in pairs:
        text = pairs.pop("Clip skip")
        layers = whole(text)
        found.put("clip_skip", None if layers is None else max(layers - 1, 0), f"Clip skip: {text}")
        if layers is None:
            found.leave(f"Clip skip: {text}", "no whole number; the model's own is used")
    early, end = pairs.pop("Skip Early CFG", ""), pairs.pop("CFG end", "")
    if early or end:
        found.put("guidance_interval", (real(early or "0"), real(end or "1")), f"Skip Early CFG: {early or end}")


def spacing_in(schedule: str, source: str) -> str:
    """The name of a "Schedule type" in a text of a tool, such that A1111's and our own do not mix."""
    plain = " ".join(schedule.lower().split())
    if source == "sdjax":
        shown = settings()["spacing"].shown
        return next((name for name in ALL_SPACINGS if shown(name) == schedule), schedule)
    return plain if source == "ComfyUI" else A1111S_OWN.get(plain, schedule)


def size_in(text: str) -> tuple[int, int] | None:
    """Width and height from "512x768"; a side may be 0."""
    match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", text)
    return None if match is None else (int(match[1]), int(match[2]))


def first_pass(width: int, height: int) -> tuple[int, int]:
    """Sides of the first pass that early versions chose: about 512x512 pixels, multiples of 64."""
    scale = math.sqrt(512 * 512 / (width * height))
    return math.ceil(scale * width / 64) * 64, math.ceil(scale * height / 64) * 64


def _sizes(found: Findings, pairs: dict[str, str]) -> None:
    """The size, and the second pass if there was one."""
    text = pairs.pop("Size", "")
    size = size_in(text)
    if not text:
        found.leave("Size", "missing from the text; the model's own is used")
    elif "First pass size" in pairs and size is not None and min(size) >= 8:  # before hires-fix had its own size
        first = size_in(pairs.pop("First pass size"))
        pairs |= {"Hires resize": text, "Hires upscaler": pairs.pop("Hires upscaler", "Lanczos")}
        size = found.put_size(first_pass(*size) if first is None or 0 in first else first, f"Size: {text}")
    else:
        size = found.put_size(size, f"Size: {text}")
    _second_pass(found, pairs, size)


def _second_pass(found: Findings, pairs: dict[str, str], size: tuple[int, int] | None) -> None:
    """Hires-fix; without it a denoising strength is that of image-to-image."""
    said = {label: pairs.pop(label, "") for label in SECOND_PASS}
    strength = said.pop("Denoising strength")
    if not said["Hires upscale"] and not said["Hires resize"]:
        if strength:
            found.put("strength", real(strength), f"Denoising strength: {strength}")
        for label, text in said.items():
            if text not in NOTHING:
                found.leave(f"{label}: {text}", "left out; the text names no size of a second pass")
        return
    if "hires_scale" not in found.known:
        for label, text in {**said, "Denoising strength": strength}.items():
            if text:
                found.leave(f"{label}: {text}", "left out; this version of sdjax makes no second pass")
        return
    resize = size_in(said["Hires resize"])
    if resize is not None and size is not None and any(resize):
        wide, high = resize[0] or resize[1] * size[0] // size[1], resize[1] or resize[0] * size[1] // size[0]
        wide, high = wide - wide % 8, high - high % 8
        found.put("hires_size", f"{wide}x{high}", f"Hires resize: {said['Hires resize']}")
    else:
        found.put("hires_scale", real(said["Hires upscale"]), f"Hires upscale: {said['Hires upscale']}")
    if strength:
        found.put("hires_strength", real(strength), f"Denoising strength: {strength}")
    put_upscaler(found, said["Hires upscaler"] or "Latent", f"Hires upscaler: {said['Hires upscaler'] or 'Latent'}")
    if said["Hires steps"] not in NOTHING:
        found.put("hires_steps", whole(said["Hires steps"]), f"Hires steps: {said['Hires steps']}")
    _second_sampler(found, said["Hires sampler"], said["Hires schedule type"])
    if said["Hires CFG Scale"] not in NOTHING:
        found.put("hires_guidance", real(said["Hires CFG Scale"]), f"Hires CFG Scale: {said['Hires CFG Scale']}")
    for label, name in (("Hires prompt", "hires_prompt"), ("Hires negative prompt", "hires_negative_prompt")):
        if said[label]:
            found.put(name, said[label], f"{label}: {said[label]}")


def _second_sampler(found: Findings, name: str, schedule: str) -> None:
    """The sampler and spacing of the second pass."""
    inside = None
    if name and not name.lower().startswith("use same"):
        _, inside = put_sampler(found, name, f"Hires sampler: {name}", "hires_")
    if schedule and schedule.lower() != "automatic" and not schedule.lower().startswith("use same"):
        put_spacing(found, spacing_in(schedule, "A1111"), f"Hires schedule type: {schedule}", "hires_")
    elif inside is not None:
        put_spacing(found, inside, f"Hires sampler: {name}", "hires_")


def _rest(found: Findings, pairs: dict[str, str]) -> None:
    """A line for all that is left, but what is harmless or was not used."""
    labels = {known.label: (name, known.kind) for name, known in found.known.items() if known.label is not None}
    readers = {"int": whole, "float": real, "text": str}
    if pairs.get("Tiling", "") == "True":
        value = next((value for value in (True, "both", "xy") if found.accepts("tiling", value)), "both")
        found.put("tiling", value, f"Tiling: {pairs.pop('Tiling')}")
    for label, text in pairs.items():
        extension = next((name for name in EXTENSIONS if label.startswith(name)), None)
        if label in HARMLESS or (text in NOTHING and label not in labels):
            continue
        if label in labels and labels[label][1] in readers and labels[label][0] not in found.settings:
            name, kind = labels[label]
            found.put(name, readers[kind](text), f"{label}: {text}")  # type: ignore[operator]
        elif extension is not None:
            found.leave(extension.strip(), EXTENSIONS[extension])
        else:
            found.leave(f"{label}: {text}", REASONS.get(label, "left out; not known"))
