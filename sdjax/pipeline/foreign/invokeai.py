"""InvokeAI's metadata: "invokeai_metadata" since version 3, "sd-metadata" of version 2, "Dream" of the first ones."""

from __future__ import annotations

import json
import re
import shlex
from typing import Any

from sdjax.hints import hint
from sdjax.pipeline.foreign.findings import Findings, Foreign, decimal, real, short, whole
from sdjax.pipeline.foreign.names import BROWNIAN, INVOKE_SAMPLERS, put_sampler, put_spacing

KARRAS_BELOW = 29
"""Steps below which versions before 2.3 used Karras spacing for k-diffusion's samplers."""

HARMLESS = (
    *("app_version", "app_id", "generation_mode", "type", "rand_device", "model", "model_weights", "model_hash"),
    *("hrf_method", "hrf_strength", "board_id", "image_name", "created_by"),
)
"""What changes nothing here, or belongs to what has a line of its own."""

REASONS = {
    "controlnets": "left out; no control picture steers the result",
    "t2iAdapters": "left out; no control picture steers the result",
    "ipAdapters": "left out; no picture steers the result",
    "ref_images": "left out; no picture steers the result",
    "regions": "left out; the prompt holds for the whole picture",
    "canvas_v2_metadata": "left out; nothing of the canvas is used",
    "hrf_enabled": "left out; no second pass is made, since the text does not say its size",
    "hires_fix": "left out; no second pass is made, since the text does not say its size",
    "refiner_model": "left out; one model makes the whole picture",
    "init_image": "left out; the picture that it started from is not in the text",
    "init_image_path": "left out; the picture that it started from is not in the text",
    "mask": "left out; it is of inpainting",
    "positive_style_prompt": "left out; both text encoders read the same prompt",
    "negative_style_prompt": "left out; both text encoders read the same prompt",
    "threshold": "left out; latents are not clipped",
    "perlin": "left out; the first noise is the usual one",
    "postprocessing": "left out; it was done to the picture afterwards",
    "facetool_strength": "left out; it was done to the picture afterwards",
    "upscale": "left out; it was done to the picture afterwards",
}
"""What cannot be honoured, with what is done instead."""

FLAGS = {
    "s": "steps",
    "S": "seed",
    "W": "width",
    "H": "height",
    "C": "cfg_scale",
    "A": "sampler",
    "f": "strength",
    "I": "init_image_path",
    "U": "upscale",
    "G": "facetool_strength",
}
"""Options of the command in "Dream" by their letters; the long ones have the names themselves."""

LONG = (*FLAGS.values(), "perlin", "threshold")


def parse_invokeai(metadata_json: str) -> Foreign:
    """What InvokeAI's metadata asks for, in the words of a `Request`.

    Raises:
        ValueError: it is damaged, or of another kind of model.
    """
    try:
        said = json.loads(metadata_json)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"InvokeAI's metadata is damaged or cut off ({short(error)})") from None
    if isinstance(said, dict) and isinstance(said.get("image"), dict):
        return _second_version(said)
    known = ("positive_prompt", "seed", "steps", "scheduler")
    if not isinstance(said, dict) or not any(name in said for name in known):
        raise ValueError(f"InvokeAI's metadata has none of {', '.join(known)}; it is cut off or of another tool")
    return _third_version(said)


def parse_dream(text: str) -> Foreign:
    """What "Dream" says, a prompt and options as in "a robot -s 50 -S 7". Raises ValueError if it is damaged."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"InvokeAI's text Dream is damaged or cut off ({error})") from None
    said, prompt = dict[str, Any](), list[str]()
    left = iter(words)
    for word in left:
        flag = re.fullmatch(r"-([A-Za-z])(.*)", word)
        if flag is not None and flag[1] in FLAGS:
            said[FLAGS[flag[1]]] = flag[2] or next(left, "")
        elif word.removeprefix("--") in LONG and word.startswith("--"):
            said[word.removeprefix("--")] = next(left, "")
        elif re.match(r"--?[A-Za-z]", word):
            said[word] = True
        else:
            prompt.append(word)
    if not prompt:
        raise ValueError("InvokeAI's text Dream has no prompt; it is damaged")
    return _second_version({"image": {"prompt": " ".join(prompt), **said}})


def _third_version(said: dict[str, Any]) -> Foreign:
    found = Findings()
    _refuse_other_models(said)
    _text(found, "prompt", said.pop("positive_prompt", ""))
    _text(found, "negative_prompt", said.pop("negative_prompt", ""))
    found.put("weighting", "compel", "weighting")
    device = short(said.get("rand_device") or "cpu")
    found.put("noise", {"cpu": "torch", "cuda": "torch-cuda"}.get(device, device), f"rand_device: {device}")
    _numbers(found, said, "scheduler", version=(3, 0))
    skip = said.pop("clip_skip", None)
    if skip:
        found.put("clip_skip", whole(skip), f"clip_skip: {short(skip)}")
    rescale = said.pop("cfg_rescale_multiplier", None)
    if rescale:
        found.put("guidance_rescale", real(rescale), f"cfg_rescale_multiplier: {short(rescale)}")
    _loras(found, said.pop("loras", None))
    _tiling(found, said)
    if vae := _name_of(said.pop("vae", None)):
        found.leave(f"vae: {vae}", f"not looked for; give it with {hint('vae')}")
    for prompt in ("positive", "negative"):  # SDXL's second prompt, mostly the same
        if said.get(f"{prompt}_style_prompt") in ("", found.settings["prompt"], found.settings["negative_prompt"]):
            said.pop(f"{prompt}_style_prompt")
    if "init_image" not in said and "img2img" not in str(said.get("generation_mode")):
        said.pop("strength", None)
    _rest(found, said)
    return Foreign("InvokeAI", found.settings, _name_of(said.get("model")), _hash(said.get("model")), found.finish())


def _refuse_other_models(said: dict[str, Any]) -> None:
    model = said.get("model") if isinstance(said.get("model"), dict) else {}
    base = str(model.get("base") or model.get("base_model") or "sd-1")  # type: ignore[union-attr]
    if not base.startswith(("sd-", "sdxl", "any")):
        raise ValueError(f"InvokeAI's metadata is for a model of the kind {short(base)}, which sdjax does not run")


def _second_version(said: dict[str, Any]) -> Foreign:
    found, image = Findings(), dict(said["image"])
    version = str(said.get("app_version", "2.0")).lstrip("v")
    match = re.match(r"([0-9]{1,4})\.([0-9]{1,4})", version)
    prompt, negative = _old_prompt(found, image.pop("prompt", ""))
    _text(found, "prompt", prompt)
    _text(found, "negative_prompt", negative)
    found.put("weighting", "compel", "weighting")
    found.put("noise", "torch-cuda", "noise of the graphics card")
    _numbers(found, image, "sampler", version=(int(match[1]), int(match[2])) if match else (2, 0))
    _variations(found, image.pop("variations", None))
    _tiling(found, image)
    _rest(found, image)
    digest = str(said.get("model_hash") or "").lower()
    digest = digest if re.fullmatch(r"[0-9a-f]{64}", digest) else ""
    return Foreign("InvokeAI", found.settings, short(said.get("model_weights") or ""), digest, found.finish())


def _old_prompt(found: Findings, said: Any) -> tuple[str, str]:
    """Prompt and negative prompt, which stood in square brackets."""
    if isinstance(said, list):
        parts = [part for part in said if isinstance(part, dict)]
        if len(parts) > 1:
            found.leave("prompt", "several with weights; they are joined by spaces")
        said = " ".join(str(part.get("prompt", "")) for part in parts)
    text = str(said)
    negative = " ".join(part.strip() for part in re.findall(r"\[([^\[\]]*)\]", text))
    return " ".join(re.sub(r"\[[^\[\]]*\]", " ", text).split()), negative


def _text(found: Findings, name: str, text: Any) -> None:
    if not isinstance(text, str):
        found.leave(name, "no text; an empty one is used")
    found.put_text(name, text if isinstance(text, str) else "")


def _numbers(found: Findings, said: dict[str, Any], scheduler: str, version: tuple[int, int]) -> None:
    """Seed, steps, guidance, size, sampler and spacing."""
    seed = said.pop("seed", None)
    found.put_seed(whole(seed), f"seed: {short(seed)}")
    for theirs, ours, number in (("steps", "steps", whole), ("cfg_scale", "guidance", real)):
        if theirs in said:
            value = said.pop(theirs)
            found.put(ours, number(value), f"{theirs}: {short(value)}")  # type: ignore[operator]
    width, height = (whole(said.pop(name, None)) for name in ("width", "height"))
    found.put_size(None if width is None or height is None else (width, height), f"width x height: {width}x{height}")
    name = short(said.pop(scheduler, "k_lms" if scheduler == "sampler" else "euler"))
    plain = name.removesuffix("_k")
    sampler, spacing = INVOKE_SAMPLERS.get(plain, (plain, "linspace"))
    if name != plain:
        spacing = "karras"
    elif name.startswith("k_"):
        steps = found.settings.get("steps", 50)
        spacing = "linspace" if version >= (2, 3) else "karras" if steps < KARRAS_BELOW else spacing
    taken, _ = put_sampler(found, sampler, f"{scheduler}: {name}")
    put_spacing(found, spacing, f"{scheduler}: {name}, spacing")
    if taken in BROWNIAN or taken in ("euler_a", "dpm2_a", "dpmpp_2s_a", "lcm", "tcd", "ddpm", "er_sde"):
        found.leave(f"{scheduler}: {name}", "the noise that it adds between steps is another one here")


def _name_of(model: Any) -> str:
    """The name of a model, adapter or autoencoder, in the forms of all versions."""
    if isinstance(model, dict):
        return short(model.get("model_name") or model.get("name") or "")
    return short(model) if isinstance(model, str) else ""


def _hash(model: Any) -> str:
    """A model's sha256, where it is one; InvokeAI mostly writes another kind."""
    text = str(model.get("hash") or "") if isinstance(model, dict) else ""
    digest = text.removeprefix("sha256:").lower()
    return digest if re.fullmatch(r"[0-9a-f]{64}", digest) else ""


def _loras(found: Findings, said: Any) -> None:
    """Adapters by their names; they act on the UNet and on the text encoder with the same weight."""
    texts = list[str]()
    for one in said if isinstance(said, list) else ():
        name = _name_of(one.get("lora") or one.get("model")) if isinstance(one, dict) else ""
        weight = real(one.get("weight", 1)) if isinstance(one, dict) else None
        if name and weight is not None:
            texts.append(f"{name}:{decimal(weight)}")
        else:
            found.leave(f"loras: {short(one)}", "left out; its name or its weight is missing")
    if texts:
        found.put("loras", tuple(texts), f"loras: {', '.join(texts)}")


def _tiling(found: Findings, said: dict[str, Any]) -> None:
    """Pictures that repeat: InvokeAI's "seamless"."""
    along = {axis for axis in "xy" if said.pop(f"seamless_{axis}", None)}
    along |= {"x", "y"} if said.pop("seamless", None) else set()
    if along:
        both = (True, "both", "xy") if len(along) == 2 else (next(iter(along)),)
        value = next((value for value in both if found.accepts("tiling", value)), both[0])
        found.put("tiling", value, f"seamless: {', '.join(sorted(along))}")


def _variations(found: Findings, said: Any) -> None:
    """One variation is a second seed with a weight."""
    if not said:
        return
    one = said[0] if isinstance(said, list) else None
    pair = (one.get("seed"), one.get("weight")) if isinstance(one, dict) else one
    if not isinstance(said, list) or len(said) > 1 or not isinstance(pair, tuple | list) or len(pair) != 2:
        found.leave(f"variations: {short(said)}", "left out; only one variation can be had")
        return
    found.put("variation_seed", whole(pair[0]), f"variations: {short(said)}")
    found.put("variation_strength", real(pair[1]), f"variations: {short(said)}")


def _rest(found: Findings, said: dict[str, Any]) -> None:
    """A line for all that is left and says something."""
    if (strength := said.pop("strength", None)) is not None:
        found.put("strength", real(strength), f"strength: {short(strength)}")
    mode = str(said.get("generation_mode") or said.get("type") or "txt2img")
    if "txt2img" not in mode:
        found.leave(f"generation_mode: {short(mode)}", "the picture that it started from is not in the text")
    for name, value in said.items():
        if name.startswith("refiner_") and name != "refiner_model":
            continue
        if name not in HARMLESS and value not in (None, False, 0, "", "none") and value != [] and value != {}:
            found.leave(f"{name}: {short(value)}", REASONS.get(name, "left out; not known"))
