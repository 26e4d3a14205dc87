"""ComfyUI's graphs: from the node that saves the picture back to the sampler, and along all of its inputs.

A plain text-to-image graph is one sampler on an empty latent picture, with prompts, adapters and a checkpoint; a second
sampler behind a scaling of the first one's result is hires-fix. What acts on the model or on the finished picture is
listed and passed over; what makes another kind of picture is refused by the name of its node.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NamedTuple, NoReturn

from sdjax.hints import hint
from sdjax.pipeline.foreign.findings import Findings, Foreign, decimal, real, short, whole
from sdjax.pipeline.foreign.names import (
    BROWNIAN,
    put_sampler,
    put_spacing,
    put_upscaler,
)

SAMPLING = ("KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced")
VALUES = ("value", "text", "string", "prompt", "seed", "noise_seed", "int", "float", "number", "Value")
"""Inputs that hold the value of a node which is nothing but a value."""

SIGMAS = {
    "KarrasScheduler": "karras",
    "ExponentialScheduler": "exponential",
    "PolyexponentialScheduler": "polyexponential",
    "AlignYourStepsScheduler": "ays",
    "SDTurboScheduler": "trailing",
    "BetaSamplingScheduler": "beta",
}
"""Nodes that make noise levels, and our spacings."""

WIDGETS = {
    "KSampler": ("seed", None, "steps", "cfg", "sampler_name", "scheduler", "denoise"),
    "KSamplerAdvanced": (
        *("add_noise", "noise_seed", None, "steps", "cfg", "sampler_name", "scheduler"),
        *("start_at_step", "end_at_step", "return_with_leftover_noise"),
    ),
    "CLIPTextEncode": ("text",),
    "EmptyLatentImage": ("width", "height", "batch_size"),
    "CheckpointLoaderSimple": ("ckpt_name",),
    "LoraLoader": ("lora_name", "strength_model", "strength_clip"),
    "LoraLoaderModelOnly": ("lora_name", "strength_model"),
    "CLIPSetLastLayer": ("stop_at_clip_layer",),
    "VAELoader": ("vae_name",),
    "LatentUpscale": ("upscale_method", "width", "height", "crop"),
    "LatentUpscaleBy": ("upscale_method", "scale_by"),
    "PrimitiveNode": ("value",),
}
"""The order of the values of nodes in a workflow as the editor saves it; None: what only the editor uses."""

OUTPUTS = ("SaveImage", "PreviewImage", "SaveImageWebsocket", "SaveAnimatedWEBP", "SaveAnimatedPNG")
IMAGE_INPUTS = ("images", "image", "pixels")


class Node(NamedTuple):
    """A node of a graph. inputs: values, and links [id, output] to other nodes."""

    id: str
    kind: str
    inputs: dict[str, Any]

    def __str__(self) -> str:
        return f"node {short(self.id)} ({short(self.kind)})"


class Pass(NamedTuple):
    """What a sampler does."""

    node: Node
    seed: Any
    steps: Any
    guidance: Any
    sampler: Any
    scheduler: str | None
    spacing: str | None
    denoise: float
    model: Any
    positive: Any
    negative: Any
    latent: Any


def parse_comfyui(prompt_json: str, workflow_json: str | None = None) -> Foreign:
    """What ComfyUI's graph asks for, in the words of a `Request`.

    prompt_json: the graph as it is run, the text "prompt" of its pictures. workflow_json: as the editor saves it, for
    when the other is empty.

    Raises:
        ValueError: it is no graph, or not that of a plain picture from a text.
    """
    graph = Graph(graph_of(prompt_json if prompt_json.strip() or not workflow_json else workflow_json))
    return graph.read()


def graph_of(text: str) -> dict[str, Node]:
    """The nodes of a graph's JSON, by id, or of a workflow as the editor saves it. Raises ValueError if it is none."""
    try:
        said = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"ComfyUI's graph is damaged or cut off ({short(error)})") from None
    if isinstance(said, dict) and isinstance(said.get("prompt"), dict):
        said = said["prompt"]
    if isinstance(said, dict) and isinstance(said.get("nodes"), list):
        said = _of_editor(said)
    nodes = {}
    for name, node in said.items() if isinstance(said, dict) else ():
        if isinstance(node, dict) and isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), dict):
            nodes[name] = Node(name, node["class_type"], node["inputs"])
    if not nodes:
        raise ValueError(
            "ComfyUI's graph has no nodes; expected the JSON in its pictures, or as it exports for its API"
        )
    return nodes


def _of_editor(workflow: dict[str, Any]) -> dict[str, Any]:
    """A workflow as the editor saves it, in the form of a graph; values of nodes that are not known are missing."""
    links, made = dict[Any, list[Any]](), dict[str, Any]()
    for link in workflow.get("links") if isinstance(workflow.get("links"), list) else ():  # type: ignore[union-attr]
        if isinstance(link, list) and len(link) >= 3 and isinstance(link[0], int | str):
            links[link[0]] = [str(link[1]), link[2]]
    for node in workflow["nodes"]:
        if not isinstance(node, dict) or not isinstance(node.get("type"), str) or node.get("mode", 0) not in (0, None):
            continue  # switched off
        names, values, inputs = WIDGETS.get(node["type"], ()), node.get("widgets_values"), dict[str, Any]()
        if isinstance(values, list):
            inputs = {name: value for name, value in zip(names, values, strict=False) if name is not None}
        for one in node.get("inputs") if isinstance(node.get("inputs"), list) else ():  # type: ignore[union-attr]
            link = one.get("link") if isinstance(one, dict) else None
            if isinstance(link, int | str) and link in links:
                inputs[str(one.get("name", ""))] = links[link]
        made[str(node.get("id"))] = {"class_type": node["type"], "inputs": inputs}
    return made


class Graph:
    """A graph that is being read. Every walk along links ends, since none is longer than the graph."""

    def __init__(self, nodes: dict[str, Node]) -> None:
        self.nodes = nodes
        self.found = Findings()
        self.loras: dict[str, tuple[str, float, float]] = {}  # by node: file, weight of the UNet, of the text encoder

    def read(self) -> Foreign:
        first, second, scaling = self._passes()
        found = self.found
        found.put("weighting", "comfy", "weighting")
        found.put("noise", "torch", "noise")
        found.put_text("prompt", self._prompt(first.positive, "positive"))
        found.put_text("negative_prompt", self._prompt(first.negative, "negative"))
        found.put_seed(whole(self._value(first.seed)), f"seed: {short(self._value(first.seed))}")
        self._numbers(first)
        size = self._size(first)
        if first.denoise < 1:
            found.leave(f"denoise: {first.denoise:g}", "left out; without a picture to start from all is noise")
        model = self._model(first.model)
        self._put_loras()
        if second is not None:
            self._second(first, second, scaling, size)
        return Foreign("ComfyUI", found.settings, model, "", found.finish())

    # Finding the way

    def refuse(self, node: Node, why: str) -> NoReturn:
        raise ValueError(f"{node}: {why}; only plain text-to-image graphs of ComfyUI can be recipes")

    def _node(self, link: Any) -> Node | None:
        """The node that a link comes from, reroutes passed over."""
        for _ in self.nodes:
            node = self.nodes.get(str(link[0])) if isinstance(link, list) and len(link) == 2 else None
            if node is None or "reroute" not in node.kind.lower():
                return node
            link = next((value for value in node.inputs.values() if isinstance(value, list)), None)
        return None

    def _needed(self, link: Any, node: Node, name: str) -> Node:
        found = self._node(link)
        if found is None:
            self.refuse(node, f"its input {name!r} leads nowhere")
        return found

    def _value(self, value: Any) -> Any:
        """A value as it stands, or that of the node that it comes from; None if that is more than a value."""
        for _ in self.nodes:
            if not isinstance(value, list):
                return value
            node = self._node(value)
            if node is None:
                return None
            value = next((node.inputs[name] for name in VALUES if name in node.inputs), None)
        return None

    def _passes(self) -> tuple[Pass, Pass | None, list[Node]]:
        """The sampler, or two with the nodes that scale between them, the last one first."""
        last = self._last_sampler()
        final = self._pass(last)
        latent = self._needed(final.latent, last, "latent_image")
        scaling, node = list[Node](), latent
        for _ in self.nodes:
            if node.kind in SAMPLING:
                break
            step = self._before(node)
            if step is None:
                return final, None, []
            scaling += [node] if "scale" in node.kind.lower() else []
            node = step
        if not scaling:
            self.refuse(last, "it goes on from another sampler's result at the same size")
        first = self._pass(node)
        start = self._needed(first.latent, node, "latent_image")
        if start.kind in SAMPLING or self._before(start) is not None:
            self.refuse(start, "there are more than two samplers in a row")
        return first, final, scaling

    def _before(self, node: Node) -> Node | None:
        """Where the picture comes from that a node scales, encodes or decodes; None at an empty picture."""
        if "width" in node.inputs and "samples" not in node.inputs and not self._links(node, *IMAGE_INPUTS):
            return None
        link = next(iter(self._links(node, "samples", *IMAGE_INPUTS, "upscale_image")), None)
        if node.kind == "VAEEncodeForInpaint" or "mask" in node.inputs:
            self.refuse(node, "the graph is one of inpainting")
        if link is None:
            self.refuse(node, "the picture does not begin from an empty one")
        if node.kind == "ImageUpscaleWithModel":
            self.found.leave(str(node), "an upscaling model, which cannot be run; Lanczos is used instead")
        known = ("Latent", "Image", "VAEDecode", "VAEEncode")
        if not node.kind.startswith(known) or node.kind.startswith("LatentFrom"):
            self.refuse(node, "not known what it does to the picture")
        return self._needed(link, node, "samples")

    def _links(self, node: Node, *names: str) -> list[Any]:
        return [node.inputs[name] for name in names if isinstance(node.inputs.get(name), list)]

    def _last_sampler(self) -> Node:
        """The sampler whose result is saved, the last in its row."""
        ends = [node for node in self.nodes.values() if node.kind in OUTPUTS]
        ends = ends or [node for node in self.nodes.values() if "save" in node.kind.lower()]
        made = {node.id: node for end in ends if (node := self._sampler_of(end)) is not None}
        made = made or {node.id: node for node in self.nodes.values() if node.kind in SAMPLING}
        if not made:
            kinds = ", ".join(sorted({short(node.kind) for node in self.nodes.values()})[:6])
            raise ValueError(f"ComfyUI's graph has no sampler that is known, only {kinds}; expected a KSampler")
        earlier = {before.id for node in made.values() for before in self._earlier(node)}
        last = [node for name, node in made.items() if name not in earlier]
        if len(last) != 1:
            self.refuse(next(iter(made.values())), f"the graph makes {len(made)} pictures, not one")
        return last[0]

    def _sampler_of(self, end: Node) -> Node | None:
        """The sampler that made what a node saves; a line about everything that was done to the picture afterwards."""
        node: Node | None = end
        for _ in self.nodes:
            if node is None or node.kind in SAMPLING:
                return node
            vae = self._node(node.inputs.get("vae"))
            if vae is not None and vae.kind == "VAELoader":
                name = short(self._value(vae.inputs.get("vae_name")))
                self.found.leave(f"{vae}: {name}", f"not looked for; give it with {hint('vae')}")
            if node is not end and not node.kind.startswith(("VAEDecode", "VAEEncode")):
                self.found.leave(str(node), "left out; it was done to the picture afterwards")
            node = self._node(next(iter(self._links(node, "samples", *IMAGE_INPUTS)), None))
        return None

    def _earlier(self, node: Node) -> list[Node]:
        """All samplers before one."""
        seen, left = dict[str, Node](), [node]
        while left:
            for value in left.pop().inputs.values():
                before = self._node(value)
                if before is not None and before.id not in seen:
                    seen[before.id] = before
                    left.append(before)
        if node.id in seen:
            self.refuse(node, "its picture is made from itself")
        return [one for one in seen.values() if one.kind in SAMPLING]

    # Samplers

    def _pass(self, node: Node) -> Pass:
        given = node.inputs
        shared = (given.get("model"), given.get("positive"), given.get("negative"), given.get("latent_image"))
        if node.kind == "KSampler":
            denoise = real(self._value(given.get("denoise", 1)))
            values = (given.get("seed"), given.get("steps"), given.get("cfg"), given.get("sampler_name"))
            return Pass(node, *values, self._value(given.get("scheduler")), None, _denoise(denoise), *shared)
        if node.kind == "KSamplerAdvanced":
            return self._advanced(node, shared)
        sampler, sigmas = (self._needed(given.get(name), node, name) for name in ("sampler", "sigmas"))
        scheduler, spacing, steps, denoise = self._sigmas(sigmas)
        name = sampler.inputs.get("sampler_name", sampler.kind.removeprefix("Sampler").lower())
        if node.kind == "SamplerCustom":
            self._has_noise(node)
            values = (given.get("noise_seed"), steps, given.get("cfg"), name)
            return Pass(node, *values, scheduler, spacing, denoise, *shared)
        noise, guider = (self._needed(given.get(name), node, name) for name in ("noise", "guider"))
        inputs = guider.inputs
        if guider.kind not in ("CFGGuider", "BasicGuider"):
            self.refuse(guider, "a kind of guidance that sdjax does not have")
        guidance = inputs.get("cfg") if guider.kind == "CFGGuider" else 1.0
        if noise.kind != "RandomNoise":
            self.refuse(noise, "the picture does not begin from noise")
        positive = inputs.get("positive", inputs.get("conditioning"))
        ends = (inputs.get("model"), positive, inputs.get("negative"), given.get("latent_image"))
        values = (noise.inputs.get("noise_seed"), steps, guidance, name)
        return Pass(node, *values, scheduler, spacing, denoise, *ends)

    def _advanced(self, node: Node, shared: tuple[Any, Any, Any, Any]) -> Pass:
        given = node.inputs
        self._has_noise(node)
        steps, start, end = (whole(self._value(given.get(name))) for name in ("steps", "start_at_step", "end_at_step"))
        steps, start = steps or 0, start or 0
        if (end is not None and end < steps) or self._value(given.get("return_with_leftover_noise")) == "enable":
            self.refuse(node, "it stops before the last step")
        denoise = 1 - min(start, steps) / max(steps, 1)
        values = (given.get("noise_seed"), steps - start, given.get("cfg"), given.get("sampler_name"))
        return Pass(node, *values, self._value(given.get("scheduler")), None, denoise, *shared)

    def _has_noise(self, node: Node) -> None:
        if self._value(node.inputs.get("add_noise", "enable")) in ("disable", False):
            self.refuse(node, "it goes on from another sampler's result without noise")

    def _sigmas(self, node: Node) -> tuple[str | None, str | None, Any, float]:
        """Of a node that makes noise levels: ComfyUI's name of them, or our spacing, then steps and denoise."""
        steps, denoise = node.inputs.get("steps"), _denoise(real(self._value(node.inputs.get("denoise", 1))))
        if node.kind == "BasicScheduler":
            return self._value(node.inputs.get("scheduler")), None, steps, denoise
        if node.kind not in SIGMAS:
            self.refuse(node, "noise levels of a kind that sdjax does not have")
        for name in ("sigma_max", "sigma_min"):
            if name in node.inputs:
                said = f"{node}, {name} {short(self._value(node.inputs[name]))}"
                self.found.leave(said, "left out; the model's own range of noise is used")
        if "rho" in node.inputs:
            self.found.put("rho", real(self._value(node.inputs["rho"])), f"{node}, rho")
        return None, SIGMAS[node.kind], steps, denoise

    def _numbers(self, one: Pass, prefix: str = "") -> None:
        """Steps, guidance, sampler and spacing of a pass."""
        found, values = (
            self.found,
            {"steps": whole(self._value(one.steps)), "guidance": real(self._value(one.guidance))},
        )
        for name, value in values.items():
            found.put(f"{prefix}{name}", value, f"{one.node}, {name}")
        name = short(self._value(one.sampler))
        sampler, _ = put_sampler(found, name, f"sampler_name: {name}", prefix)
        if sampler in BROWNIAN:
            found.leave(
                f"sampler_name: {name}", "its noise comes from a Brownian tree there; here each step has its own"
            )
        elif sampler is not None and any(part in name for part in ("ancestral", "lcm", "ddpm", "sde", "sa_", "seeds")):
            found.leave(f"sampler_name: {name}", "the noise that it adds between steps is another one here")
        if one.scheduler is not None or one.spacing is None:
            name = short(one.scheduler)
            put_spacing(found, name, f"scheduler: {name}", prefix)
        else:
            put_spacing(found, one.spacing, str(one.node), prefix)

    # What samplers get

    def _prompt(self, link: Any, which: str) -> str:
        """The text of a prompt; lines about control pictures, and the adapters and layers of its text encoder."""
        output = link[1] if isinstance(link, list) and len(link) == 2 else 0
        node = self._node(link)
        for _ in self.nodes:
            if node is None:
                return ""
            if node.kind in ("ConditioningZeroOut",):
                self.found.leave(str(node), "zeros instead of an encoded prompt; the empty prompt is used")
                return ""
            texts = [name for name in ("text", "text_g", "positive_prompt", "prompt") if name in node.inputs]
            if "textencode" in node.kind.lower() and texts:
                return self._text(node, texts[0])
            which = ("positive", "negative")[output] if "positive" in node.inputs and output in (0, 1) else which
            links = self._links(node, "conditioning", which)
            if node.kind.startswith(("ConditioningCombine", "ConditioningConcat", "ConditioningAverage")) or not links:
                self.refuse(node, "it makes a prompt of several, or of something else than a text")
            why = "left out; no control picture steers the result" if "Control" in node.kind else "left out"
            self.found.leave(str(node), f"{why}; the prompt behind it is used as it is")
            output, node = links[0][1] if len(links[0]) == 2 else 0, self._node(links[0])
        return ""

    def _text(self, node: Node, name: str) -> str:
        text = self._value(node.inputs[name])
        if not isinstance(text, str):
            self.refuse(node, "its text is put together by other nodes")
        if "text_l" in node.inputs and self._value(node.inputs["text_l"]) != text:
            self.found.leave(f"{node}, text_l", "left out; both text encoders read the same prompt")
        if self._value(node.inputs.get("parser")) in ("A1111", "full"):  # an extension's
            self.found.put("weighting", "a1111", f"{node}, parser")
        self._clip(node.inputs.get("clip"))
        return text

    def _clip(self, link: Any) -> None:
        """Adapters and the last layer, on the way from a prompt back to the checkpoint."""
        node = self._node(link)
        for _ in self.nodes:
            if node is None or "clip" not in node.inputs:
                break
            if node.kind == "CLIPSetLastLayer":
                layer = whole(self._value(node.inputs.get("stop_at_clip_layer")))
                self.found.put("clip_skip", None if layer is None else -layer - 1, f"{node}: {layer}")
            else:
                self._lora(node, clip=True)
            node = self._node(node.inputs["clip"])
        if node is not None and "CLIPLoader" in node.kind:
            name = short(self._value(node.inputs.get("clip_name", node.inputs.get("clip_name1"))))
            self.found.leave(f"{node}: {name}", f"not looked for; give it with {hint('text_encoder')}")

    def _model(self, link: Any) -> str:
        """The checkpoint's name; adapters and lines about all else that acts on the model."""
        node = self._node(link)
        for _ in self.nodes:
            if node is None:
                return ""
            for name in ("ckpt_name", "unet_name", "model_name", "model_path"):
                if name in node.inputs and "model" not in node.inputs:
                    return short(self._value(node.inputs[name])).replace("\\", "/")
            if "model" not in node.inputs:
                self.refuse(node, "not known which model it loads")
            if node.kind == "RescaleCFG":
                self.found.put("guidance_rescale", real(self._value(node.inputs.get("multiplier"))), str(node))
            elif not self._lora(node, model=True):
                self.found.leave(str(node), "left out; the model is used as it is")
            node = self._node(node.inputs["model"])
        return ""

    def _lora(self, node: Node, *, model: bool = False, clip: bool = False) -> bool:
        """Notes the adapters of a node, for the part of the model that is on the way. Whether it has any."""
        found = list[tuple[str, Any, Any]]()
        if "lora_name" in node.inputs:
            strengths = (node.inputs.get("strength_model", 1.0), node.inputs.get("strength_clip", 0.0))
            found.append((node.inputs["lora_name"], *strengths))
        for value in node.inputs.values():  # several adapters in one node of an extension
            if isinstance(value, dict) and "lora" in value and value.get("on", True):
                unet = value.get("strength", 1.0)
                text = unet if value.get("strengthTwo") is None else value["strengthTwo"]
                found.append((value["lora"], unet, text))
        for at, (file, *weights) in enumerate(found):
            unet, text = (real(self._value(weight)) for weight in weights)
            name, key = short(self._value(file)).replace("\\", "/").rpartition("/")[2], f"{node.id} {at}"
            if unet is None or text is None or not name:
                self.refuse(node, "its weights are no numbers")
            _, unet_was, text_was = self.loras.get(key, (name, 0.0, 0.0))  # the same node is met on both ways
            self.loras[key] = (name, unet if model else unet_was, text if clip else text_was)
        return bool(found)

    def _put_loras(self) -> None:
        """Adapters as settings, those nearest to the checkpoint first."""
        used = [(name, unet, text) for name, unet, text in self.loras.values() if unet or text]
        if used:
            texts = tuple(f"{name}:{decimal(unet)}:{decimal(text)}" for name, unet, text in reversed(used))
            self.found.put("loras", texts, f"adapters {', '.join(texts)}")

    def _size(self, one: Pass) -> tuple[int, int] | None:
        node = self._needed(one.latent, one.node, "latent_image")
        given = {name: whole(self._value(node.inputs.get(name))) for name in ("width", "height", "batch_size")}
        if "SD3" in node.kind or "Flux" in node.kind:
            self.refuse(node, "an empty picture for other kinds of models")
        if given["width"] is None or given["height"] is None:
            self.refuse(node, "not known which size its picture has")
        if (given["batch_size"] or 1) > 1:
            self.found.leave(f"batch_size: {given['batch_size']}", "left out; the first picture of the batch is made")
        size = given["width"], given["height"]
        return self.found.put_size(size, f"{node}, {size[0]}x{size[1]}")

    def _scaled(self, scaling: list[Node], size: tuple[int, int] | None) -> None:
        """How much is scaled between two passes, and how."""
        found, last = self.found, scaling[0]
        wide, high = (whole(self._value(last.inputs.get(name))) or 0 for name in ("width", "height"))
        if size is not None and (wide > 0 or high > 0):
            wide, high = wide or high * size[0] // size[1], high or wide * size[1] // size[0]
            found.put("hires_size", f"{wide - wide % 8}x{high - high % 8}", str(last))
        else:
            scales = [self._scale(node) for node in scaling]
            if None in scales:
                self.refuse(last, "not known how much it scales")
            found.put("hires_scale", math.prod(scale for scale in scales if scale is not None), str(last))
        method = short(self._value(last.inputs.get("upscale_method", "lanczos")))
        if any(node.kind.startswith("Latent") for node in scaling):
            method = "Latent" if method == "bilinear" else f"Latent ({method})"
        put_upscaler(found, method, f"{last}, {method}")

    def _scale(self, node: Node) -> float | None:
        """The factor of a node that scales; of an upscaling model that in its file's name, as in 4x-UltraSharp."""
        if node.kind != "ImageUpscaleWithModel":
            return real(self._value(node.inputs.get("scale_by")))
        loader = self._node(node.inputs.get("upscale_model"))
        name = "" if loader is None else short(self._value(loader.inputs.get("model_name")))
        match = re.search(r"([1-9])x|x([1-9])", name.lower())
        return None if match is None else float(match[1] or match[2])

    def _second(self, first: Pass, second: Pass, scaling: list[Node], size: tuple[int, int] | None) -> None:
        """Hires-fix: a second sampler on the scaled result of the first."""
        found = self.found
        if "hires_scale" not in found.known:
            found.leave(str(second.node), "left out; this version of sdjax makes no second pass")
            return
        self._scaled(scaling, size)
        found.put("hires_strength", second.denoise, f"{second.node}, denoise")
        seeds = [self._value(one.seed) for one in (first, second)]
        if seeds[0] != seeds[1]:
            found.leave(f"{second.node}, seed {short(seeds[1])}", "left out; the second pass has the first one's seed")
        self._numbers(second, "hires_")
        for which, link, was in (
            ("prompt", second.positive, first.positive),
            ("negative_prompt", second.negative, first.negative),
        ):
            if link != was and (text := self._prompt(link, "positive")) != found.settings[which]:
                found.put(f"hires_{which}", text, f"{second.node}, {which}")
        if second.model != first.model:
            found.leave(f"{second.node}, model", "left out; both passes have the same model and adapters")


def _denoise(value: float | None) -> float:
    return 1.0 if value is None else min(max(value, 0.0), 1.0)
