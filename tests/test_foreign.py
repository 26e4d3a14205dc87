"""Other tools' texts: what is taken from them, what is named as not honoured, and that none ends in a traceback."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from sdjax import Request, cli
from sdjax.config import SamplingConfig
from sdjax.diffusion.samplers import SAMPLERS
from sdjax.diffusion.spacings import SPACINGS
from sdjax.pipeline.foreign import (
    Foreign,
    is_adapter,
    is_foreign,
    is_model,
    of_texts,
    parse_comfyui,
    parse_invokeai,
    parse_parameters,
    read_foreign,
)
from sdjax.pipeline.foreign.names import (
    A1111S_OWN,
    ALWAYS,
    AUTOMATIC,
    INVOKE_SAMPLERS,
)
from sdjax.pipeline.foreign.parameters import pairs_of
from sdjax.pipeline.recipe import COMMENT, COMMENT_CODE, EXIF_FOLDER, GRAPHS, recipe_of
from sdjax.request import SAMPLER_NAMES, check_values, settings

DATA = Path(__file__).parent / "data" / "foreign"
FILES = sorted(path for path in DATA.iterdir() if path.suffix in (".txt", ".json"))
LINE = "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512"


def read(name: str) -> Foreign:
    return read_foreign(DATA / name)


def made(line: str, **more: str) -> Foreign:
    """What a text with that line of settings says; more: pairs to add to it."""
    return parse_parameters("a cat\n" + ", ".join([line, *(f"{name}: {value}" for name, value in more.items())]))


def lines(found: Foreign, part: str) -> list[str]:
    return [line for line in found.unhonoured if part in line]


def has(found: Foreign, name: str, value: object, *, said: str) -> bool:
    """Whether a setting was taken, or a line says what was not if this version has no such setting or value."""
    if name in settings() and settings()[name].accepts(value):
        return found.settings.get(name) == value
    return name not in found.settings and bool(lines(found, said))


def spaced(found: Foreign, spacing: str) -> bool:
    if spacing in SPACINGS:
        return found.settings.get("spacing") == spacing
    return "spacing" not in found.settings and bool(lines(found, "no spacing of sdjax"))


# Real texts


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_setting_that_is_taken_can_be_used(path):
    found = read_foreign(path)
    assert set(found.settings) <= set(settings())
    check_values(found.settings)
    Request(**found.settings)
    assert found.settings["prompt"]
    assert all("\n" not in line and line for line in found.unhonoured)
    assert len(set(found.unhonoured)) == len(found.unhonoured)


def test_a_text_of_a1111_in_all_its_parts():
    found = read("a1111_1.3_karras.txt")
    expected = dict(
        prompt="masterpiece, best quality, 1girl, silver hair, garden,\nlooking at viewer, <lora:flower_style_v2:0.7>",
        negative_prompt="EasyNegative, (worst quality, low quality:1.4),\nbad hands",
        weighting="a1111",
        seed=2892782840,
        steps=28,
        sampler="dpmpp_2m",
        spacing="karras",
        guidance=7.5,
        clip_skip=1,
        width=512,
        height=768,
    )
    assert {name: found.settings.get(name) for name in expected} == expected
    assert (found.source, found.model, found.model_hash) == ("A1111", "dreamshaper_8", "879db523c3")
    assert found.networks == {"flower_style_v2": "3e1a2b4c5d6e"}
    assert has(found, "noise", "torch-cuda", said="noise of the graphics card")
    assert has(found, "hires_scale", 1.8, said="Hires upscale: 1.8")
    assert has(found, "hires_steps", 15, said="Hires steps: 15")
    assert has(found, "hires_strength", 0.45, said="Denoising strength: 0.45")
    assert lines(found, "Hires upscaler: R-ESRGAN 4x+ Anime6B")
    assert "strength" not in found.settings
    assert not lines(found, "Template")
    assert not lines(found, "ENSD")  # which changes nothing without noise on the way


def test_the_first_pass_of_early_versions_is_about_512_pixels_and_the_size_that_of_the_second():
    found = read("a1111_1.0_hires_old.txt")
    assert (found.settings["width"], found.settings["height"]) == (640, 448)
    assert has(found, "hires_size", "1024x768", said="Hires resize: 1024x768")
    assert found.model_hash == "45dee52b"


def test_what_cannot_be_honoured_has_a_line_each():
    found = read("a1111_1.6_refiner_cpu.txt")
    for part in ("NGMS", "Token merging ratio", "Refiner:", "Refiner switch at", "ControlNet", "VAE:", "Brownian"):
        assert len(lines(found, part)) == 1, part
    assert found.settings["noise"] == "torch"
    assert has(found, "variation_seed", 77, said="Variation seed: 77")
    assert has(found, "variation_strength", 0.15, said="Variation seed strength: 0.15")
    assert has(found, "seed_size", "512x768", said="Seed resize from")
    assert not lines(found, "Version")
    assert not lines(found, "hash")


def test_a_second_pass_with_a_sampler_and_a_prompt_of_its_own():
    found = read("a1111_1.9_automatic_latent.txt")
    assert has(found, "hires_sampler", "dpmpp_2m", said="Hires sampler")
    assert has(found, "hires_spacing", "karras", said="Hires schedule type")
    assert has(found, "hires_upscaler", "latent_bicubic", said="Hires upscaler")
    assert has(found, "hires_prompt", 'a lighthouse in a storm, sharp, "crisp": details', said="Hires prompt")
    assert found.settings["spacing"] == "exponential"


def test_sides_are_cut_to_multiples_of_8_and_extensions_named_once():
    found = read("a1111_1.10_adetailer.txt")
    assert (found.settings["width"], found.settings["height"], found.settings["clip_skip"]) == (568, 768, 0)
    assert len(lines(found, "ADetailer")) == 1
    assert lines(found, "Emphasis: No norm")
    assert lines(found, "easynegative")
    assert spaced(found, "sgm_uniform")


def test_forge_says_its_modules_and_nvidias_noise():
    found = read("forge_f2.txt")
    assert found.source == "A1111"
    assert spaced(found, "ays_a1111")
    assert has(found, "noise", "torch-cuda", said="RNG: NV")
    assert has(found, "hires_upscaler", "lanczos", said="Hires upscaler")
    assert has(found, "hires_guidance", 4.0, said="Hires CFG Scale")
    assert lines(found, "Module 1: sdxl_vae")
    assert not lines(found, "Hires Module")
    assert not lines(found, "Hashes")


def test_civitai_says_its_models_in_json_with_commas():
    found = read("civitai_onsite.txt")
    assert found.model == "DreamShaper"
    assert lines(found, "'Isometric, small worlds', weight 0.85")
    assert lines(found, "--lora FILE:0.85")
    assert lines(found, "embed 'negativeXL'")
    assert not lines(found, "Created Date")
    assert not lines(found, "Civitai metadata")


def test_sdnext_says_its_parser_and_its_rescaling():
    found = read("sdnext.txt")
    assert found.settings["guidance_rescale"] == 0.7
    assert lines(found, "Parser: Full parser")
    assert lines(found, "Sampler options")
    assert has(found, "tiling", True, said="Tiling")


def test_a_graph_of_comfyui_with_adapters_reroutes_and_values_from_other_nodes():
    found = read("comfyui_lora.json")
    assert (found.source, found.model) == ("ComfyUI", "SD1.5/dreamshaper_8.safetensors")
    expected = dict(
        prompt="(a red fox:1.2) in the snow, masterpiece",
        negative_prompt="blurry, text",
        weighting="comfy",
        noise="torch",
        clip_skip=1,
        steps=20,
        guidance=7.0,
        sampler="dpmpp_2m",
        spacing="karras",
        width=512,
        height=768,
    )
    assert {name: found.settings[name] for name in expected} == expected
    assert sorted(found.settings["loras"]) == ["add_detail.safetensors:0.5:0", "ink.safetensors:0.8:0.6"]
    assert lines(found, "seeds of sdjax are below 2^32")
    assert lines(found, "batch_size: 4")


def test_a_seed_of_64_bits_is_cut_to_the_32_that_torch_uses_on_the_cpu():
    seed = 987654321098765
    found = made(LINE.replace("Seed: 1,", f"Seed: {seed},"), RNG="CPU")
    cut = found.settings["seed"]
    noises = [torch.randn(64, generator=torch.Generator().manual_seed(one)) for one in (seed, cut)]
    assert cut < 2**32
    assert torch.equal(*noises)


def test_a_graph_with_a_second_sampler_is_hires_fix():
    found = read("comfyui_hires.json")
    assert (found.settings["seed"], found.settings["steps"], found.settings["sampler"]) == (42, 20, "euler_a")
    assert lines(found, "FreeU_V2")
    assert lines(found, "ImageUpscaleWithModel")
    assert lines(found, "vae-ft-mse-840000")
    if "hires_scale" not in settings():
        assert lines(found, "node 7 (KSampler)")
        return
    expected = dict(hires_scale=1.5, hires_strength=0.5, hires_steps=10, hires_guidance=7.0, hires_sampler="dpmpp_2m")
    assert {name: found.settings[name] for name in expected} == expected
    assert found.settings["hires_upscaler"] == "latent_nearest_exact"
    assert lines(found, "seed 43")


def test_a_graph_of_custom_sampling_and_a_sampler_that_cannot_be_run():
    found = read("comfyui_custom.json")
    assert (found.settings["guidance"], found.settings["steps"], found.settings["seed"]) == (5.0, 18, 7)
    assert found.settings["sampler"] == "dpmpp_2m"
    assert lines(found, "dpm_adaptive: cannot be run")
    assert lines(found, "linear_quadratic")


def test_a_workflow_as_the_editor_saves_it_is_the_same_graph():
    nodes = [
        {"id": 1, "type": "CheckpointLoaderSimple", "widgets_values": ["x.ckpt"], "inputs": []},
        {"id": 2, "type": "CLIPTextEncode", "widgets_values": ["a cat"], "inputs": [{"name": "clip", "link": 1}]},
        {"id": 3, "type": "CLIPTextEncode", "widgets_values": ["dog"], "inputs": [{"name": "clip", "link": 2}]},
        {"id": 4, "type": "EmptyLatentImage", "widgets_values": [512, 640, 1], "inputs": []},
        {
            "id": 5,
            "type": "KSampler",
            "widgets_values": [7, "randomize", 12, 6.5, "euler", "karras", 1.0],
            "inputs": [
                {"name": name, "link": link}
                for name, link in (("model", 3), ("positive", 4), ("negative", 5), ("latent_image", 6))
            ],
        },
        {"id": 6, "type": "VAEDecode", "inputs": [{"name": "samples", "link": 7}]},
        {"id": 7, "type": "SaveImage", "widgets_values": ["x"], "inputs": [{"name": "images", "link": 8}]},
        {"id": 8, "type": "Note", "widgets_values": ["hello"]},
    ]
    ends = [(1, 1, 2), (1, 1, 3), (1, 0, 5), (2, 0, 5), (3, 0, 5), (4, 0, 5), (5, 0, 6), (6, 0, 7)]
    links = [[at + 1, start, output, end, 0, "X"] for at, (start, output, end) in enumerate(ends)]
    found = parse_comfyui("", json.dumps({"nodes": nodes, "links": links}))
    expected = dict(prompt="a cat", negative_prompt="dog", seed=7, steps=12, guidance=6.5, width=512, height=640)
    assert {name: found.settings[name] for name in expected} == expected
    assert found.model == "x.ckpt"


def test_metadata_of_invokeai_since_version_3():
    found = read("invokeai_3.json")
    expected = dict(
        prompt="landscape with (mountains)1.2, mist++",
        weighting="compel",
        noise="torch",
        sampler="dpmpp_2m_sde",
        spacing="karras",
        clip_skip=1,
        loras=("ink:0.75",),
        seed=356120443,
    )
    assert {name: found.settings[name] for name in expected} == expected
    assert (found.source, found.model) == ("InvokeAI", "dreamshaper_8")
    assert lines(found, "controlnets")
    assert lines(found, "vae: sd-vae-ft-mse")
    assert not lines(found, "ipAdapters")
    other = read("invokeai_4.json")
    assert (other.model, other.model_hash) == ("Deliberate_v5", "")  # its hash is no sha256
    assert other.settings["guidance_rescale"] == 0.5
    assert other.settings["loras"] == ("moss:0.6",)
    assert has(other, "tiling", True, said="seamless")
    assert has(other, "noise", "torch-cuda", said="rand_device: cuda")
    assert lines(other, "hrf_enabled")


def test_metadata_of_invokeai_version_2_with_its_negative_prompt_in_brackets():
    found = read("invokeai_2.json")
    assert (found.settings["prompt"], found.settings["negative_prompt"]) == (
        "a lonely robot reading a book",
        "blurry, text",
    )
    assert (found.settings["sampler"], found.settings["spacing"]) == ("lms", "karras")  # few steps
    assert found.model_hash.startswith("cc6cb27103")
    assert has(found, "variation_seed", 5, said="variations")
    assert lines(found, "perlin")
    dream = of_texts({"Dream": '"a lonely robot [text]" -s50 -S 16 -W 512 -H 384 -C 7.5 -A k_euler'})
    expected = dict(prompt="a lonely robot", negative_prompt="text", steps=50, seed=16, height=384, sampler="euler")
    assert {name: dream.settings[name] for name in expected} == expected


# What single names mean


@pytest.mark.parametrize(
    ("line", "spacing"),
    [
        ("Sampler: DPM++ 2M, Version: v1.8.0", "normal"),
        ("Sampler: DPM++ 2M", "normal"),
        ("Sampler: DPM++ 2M, Version: v1.9.0", "karras"),
        ("Sampler: DPM++ 2M, Version: v1.10.1", "karras"),
        ("Sampler: DPM++ 2M, Version: f2.0.1v1.10.1-previous-669-gdfdcbab6", "karras"),
        ("Sampler: DPM++ 2M, Schedule type: Automatic", "karras"),
        ("Sampler: DPM++ 2M Karras, Version: v1.6.0", "karras"),
        ("Sampler: DPM++ 2M SDE Exponential, Version: v1.6.0", "exponential"),
        ("Sampler: DPM++ 2M SDE, Version: v1.9.4", "exponential"),
        ("Sampler: Euler a, Version: v1.9.4", "normal"),
        ("Sampler: DDIM", "leading"),
        ("Sampler: PLMS, Version: v1.10.0", "leading"),
        ("Sampler: Euler, Schedule type: Polyexponential", "polyexponential"),
        ("Sampler: Euler, Schedule type: karras, Version: v1.7.0", "karras"),
        ("Sampler: Euler, Schedule type: KL Optimal", "kl_optimal_a1111"),
        ("Sampler: Euler, Schedule type: Uniform", "normal"),
        ("Sampler: Euler, Schedule type: Turbo", "trailing"),
        ("Sampler: Euler SGM Uniform, Version: v1.9.0", "sgm_uniform"),
        ("Sampler: euler_karras, Version: ComfyUI", "karras"),
    ],
)
def test_spacings_are_a1111s_own_for_its_version(line, spacing):
    assert spaced(made(f"Steps: 20, {line}, CFG scale: 7, Seed: 1, Size: 512x512"), spacing)


@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_samplers_by_a1111s_names_are_taken(name):
    found = made(LINE.replace("Euler a", SAMPLER_NAMES[name]))
    assert found.settings["sampler"] == name
    assert not lines(found, "cannot be run")


@pytest.mark.parametrize(
    ("name", "sampler"),
    [("DPM fast", "dpmpp_2m"), ("DPM adaptive", "dpmpp_2m"), ("DPM fast Karras", "dpmpp_2m"), ("Eulerr a", "euler_a")],
)
def test_samplers_that_cannot_be_run_have_the_nearest_instead(name, sampler):
    found = made(LINE.replace("Euler a", name))
    assert found.settings["sampler"] == sampler
    assert lines(found, f"Sampler: {name}: cannot be run")


def test_names_in_the_tables_are_ours():
    spacings = {*A1111S_OWN.values(), *AUTOMATIC.values(), *(spacing for _, spacing in INVOKE_SAMPLERS.values())}
    assert spacings <= set(SPACINGS)
    assert {*AUTOMATIC, *ALWAYS, *(sampler for sampler, _ in INVOKE_SAMPLERS.values())} <= set(SAMPLERS)


@pytest.mark.parametrize(
    ("more", "settings_"),
    [
        ({"Clip skip": "2"}, {"clip_skip": 1}),
        ({"Clip skip": "1"}, {"clip_skip": 0}),
        ({"Denoising strength": "0.6"}, {"strength": 0.6}),
        ({"RNG": "CPU"}, {"noise": "torch"}),
        ({"Emphasis": "None"}, {"weighting": "none"}),
        ({"Parser": "Compel parser"}, {"weighting": "compel"}),
        ({"Version": "ComfyUI"}, {"weighting": "comfy", "noise": "torch"}),
        ({"Skip Early CFG": "0.2"}, {"guidance_interval": (0.2, 1.0)}),
        (
            {
                "AddNet Enabled": "True",
                "AddNet Module 1": "LoRA",
                "AddNet Model 1": "ink(ab12)",
                "AddNet Weight A 1": "0.7",
                "AddNet Weight B 1": "0.4",
            },
            {"prompt": "a cat <lora:ink:0.4:0.7>"},
        ),
    ],
)
def test_names_that_are_honoured(more, settings_):
    found = made(LINE, **more)
    assert {name: found.settings.get(name) for name in settings_} == settings_


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ENSD", "31337"),
        ("Face restoration", "CodeFormer"),
        ("Hypernet", "anime"),
        ("Discard penultimate sigma", "True"),
        ("Schedule max sigma", "10"),
        ("Pad conds", "True"),
        ("Mask blur", "4"),
        ("Something new", "x y"),
        ("Hires upscaler", "Latent"),
        ("Steps", "many"),
    ],
)
def test_names_that_are_not_honoured_have_a_line(name, value):
    line = LINE.replace("Steps: 20", f"Steps: 20, {name}: {value}") if name != "Steps" else f"{LINE}, Clip skip: many"
    assert lines(parse_parameters(f"a cat\n{line}"), name if name != "Steps" else "Clip skip: many")


@pytest.mark.parametrize("name", ["Version", "Created Date", "Styles", "Template", "VAE hash", "Batch pos", "Hashes"])
def test_harmless_names_have_none(name):
    assert made(LINE).unhonoured == made(LINE, **{"Version": "v1.2", name: "v1.2"}).unhonoured


def test_values_may_be_quoted_with_commas_colons_and_quotes_inside():
    pairs, strays = pairs_of(r'A: 1, Big name: "x, y: \"z\"\nw", J: [{"a": "b, c"}], K: [odd, L: "cut, M: 2')
    assert pairs == {"A": "1", "Big name": 'x, y: "z"\nw', "J": '[{"a": "b, c"}]', "K": "[odd", "M": "2"}
    assert strays == ['L: "cut']


@pytest.mark.parametrize(
    ("text", "prompt", "negative"),
    [
        ("a cat\nwith hat", "a cat\nwith hat", ""),
        ("a cat\nNegative prompt: dog\nmouse", "a cat", "dog\nmouse"),
        ("Mood: calm, Style: oil", "Mood: calm, Style: oil", ""),  # fewer than three pairs are no settings
        ("a: b, c: d, e: f", "a: b, c: d, e: f", ""),
        (f"a cat\nNegative prompt: dog\n{LINE}", "a cat", "dog"),
        (f"\nNegative prompt: dog\n{LINE}", "", "dog"),
        (f"a cat\r\nNegative prompt: dog\r\n{LINE}\r\n", "a cat", "dog"),
        (f"a cat Negative prompt: dog {LINE}", "a cat", "dog"),  # the line breaks are lost
        (f"a cat\n{LINE}\nTemplate: a {{cat|dog}}", "a cat", ""),
    ],
)
def test_prompts_end_where_a1111s_reader_ends_them(text, prompt, negative):
    found = parse_parameters(text)
    assert (found.settings["prompt"], found.settings["negative_prompt"]) == (prompt, negative)
    assert ("seed" in found.settings) == ("Steps" in text)
    assert bool(lines(found, "it has no settings")) == ("Steps" not in text)


@pytest.mark.parametrize(("source", "weighting"), [("A1111", "a1111"), ("sdjax", "a1111")])
def test_our_own_readable_text_gives_the_same_settings(source, weighting):
    request = Request(
        "a red fox, (snow:1.2)",
        "blurry, text",
        seed=77,
        steps=13,
        guidance=6.5,
        sampler="euler_a",
        spacing="exponential",
        clip_skip=1,
        width=64,
        height=48,
        loras=("ink.safetensors:0.5",),
    )
    recipe = recipe_of(request, SamplingConfig(), Image.new("RGB", (64, 48)), model="m/x.ckpt", dtype="float32")
    text = recipe.parameters()
    found = parse_parameters(text if source == "sdjax" else text.replace("Version: sdjax", "Version: v"))
    assert (found.source, found.model) == (source, "x.ckpt")
    names = ("negative_prompt", "seed", "steps", "guidance", "sampler", "spacing", "clip_skip", "width", "height")
    assert {name: found.settings[name] for name in names} == {name: getattr(request, name) for name in names}
    assert found.settings["prompt"] == f"{request.prompt} <lora:ink:0.5:0.5>"
    assert source == "A1111" or found.unhonoured == ()


@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_spacing_of_ours_comes_back_from_our_own_text(spacing):
    shown = settings()["spacing"].shown(spacing)
    same = [other for other in SPACINGS if settings()["spacing"].shown(other) == shown]
    found = parse_parameters(f"x\nSteps: 4, Sampler: Euler, Schedule type: {shown}, Seed: 1, Version: sdjax 1")
    assert found.settings["spacing"] in same


# Damaged texts, and what is no plain text-to-image


@pytest.mark.parametrize("written", ["latin-1", "utf-16-le", "utf-16-be"])
def test_a_text_in_the_wrong_encoding_is_read_as_it_was_meant(written):
    text = f"eine schöne Katze, 猫\nNegative prompt: Hund\n{LINE}"
    wrong = text.encode("utf-8").decode("latin-1") if written == "latin-1" else text.encode(written).decode("latin-1")
    assert parse_parameters(wrong).settings["prompt"] == "eine schöne Katze, 猫"
    swapped = text.encode("utf-16-le").decode("utf-16-be", "replace")
    if "\N{REPLACEMENT CHARACTER}" not in swapped:
        assert parse_parameters(swapped).settings["seed"] == 1


@pytest.mark.parametrize(
    ("cut", "says"),
    [
        ("Steps: 20, Sampler: Euler a, CFG sca", "CFG sca: not a name with a value; the text may be cut off"),
        ("Steps: 20, Sampler: Euler a", "Seed: missing from the text"),
        (f'{LINE}, Lora hashes: "ink: 7c0', 'Lora hashes: "ink: 7c0: not a name with a value'),
        ("Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5", "Size: missing from the text"),
        ("Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 51", "Size: 51: no size of a picture"),
        ("Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: -1, Size: 512x512", "Seed: -1: no seed"),
        ("Steps: 20, CFG scale: x, Seed: 5, Size: 512x512", "CFG scale: x: left out; guidance must be"),
    ],
)
def test_a_text_cut_in_the_middle_has_a_line_that_says_so(cut, says):
    assert lines(parse_parameters(f"a cat\n{cut}"), says)


def node(kind: str, **inputs: object) -> dict[str, object]:
    return {"class_type": kind, "inputs": inputs}


PLAIN = {
    "1": node("CheckpointLoaderSimple", ckpt_name="x.ckpt"),
    "2": node("CLIPTextEncode", text="a cat", clip=["1", 1]),
    "3": node("CLIPTextEncode", text="", clip=["1", 1]),
    "4": node("EmptyLatentImage", width=512, height=512, batch_size=1),
    "5": node(
        "KSampler",
        seed=1,
        steps=2,
        cfg=7,
        sampler_name="euler",
        scheduler="karras",
        denoise=1,
        model=["1", 0],
        positive=["2", 0],
        negative=["3", 0],
        latent_image=["4", 0],
    ),
    "6": node("VAEDecode", samples=["5", 0], vae=["1", 2]),
    "7": node("SaveImage", images=["6", 0]),
}


def graph(**changed: object) -> str:
    """A plain graph; changed: nodes by "n4" and inputs of the sampler by name."""
    nodes = {name: {**one, "inputs": dict(one["inputs"])} for name, one in PLAIN.items()}
    for name, value in changed.items():
        if re.fullmatch(r"n\d+", name):
            nodes[name[1:]] = value
        else:
            nodes["5"]["inputs"][name] = value
    return json.dumps(nodes)


def test_the_plain_graph_is_one():
    found = parse_comfyui(graph())
    assert (found.settings["prompt"], found.settings["steps"], found.unhonoured) == ("a cat", 2, ())


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"n4": node("VAEEncode", pixels=["8", 0]), "n8": node("LoadImage", image="x.png")}, r"node 8 \(LoadImage\)"),
        ({"n4": node("VAEEncodeForInpaint", pixels=["8", 0]), "n8": node("LoadImage", image="x")}, "inpainting"),
        ({"n2": node("ConditioningCombine", conditioning_1=["3", 0])}, r"node 2 \(ConditioningCombine\)"),
        ({"n2": node("CLIPTextEncode", text=["9", 0], clip=["1", 1]), "n9": node("Mixer", a=["3", 0])}, "put together"),
        ({"n4": node("EmptySD3LatentImage", width=512, height=512)}, "other kinds of models"),
        ({"n4": node("Unknown", samples=["5", 0])}, "not known what it does|made from itself"),
        ({"latent_image": ["5", 0]}, "node 5"),
        ({"latent_image": ["99", 0]}, "'latent_image' leads nowhere"),
        ({"n1": node("Magic")}, "not known which model"),
        (
            {"n8": node("SaveImage", images=["10", 0]), "n9": PLAIN["5"], "n10": node("VAEDecode", samples=["9", 0])},
            "2",
        ),
        ({"n5": node("KSamplerAdvanced", steps=20, end_at_step=10, latent_image=["4", 0])}, "before the last step"),
        ({"n5": node("MagicSampler")}, "no sampler that is known"),
    ],
)
def test_graphs_that_are_not_plain_are_refused_by_the_name_of_the_node(changed, says):
    with pytest.raises(ValueError, match=says) as error:
        parse_comfyui(graph(**changed))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("read_it", "text", "says"),
    [
        (parse_parameters, "  \n ", "the text is empty"),
        (parse_parameters, '{"prompt": "a cat"}', "JSON of a tool that is not known"),
        (parse_comfyui, '{"3": {"class_type": "KSam', "damaged or cut off"),
        (parse_comfyui, "[" * 100_000, "damaged or cut off"),
        (parse_comfyui, "[]", "has no nodes"),
        (parse_invokeai, '{"positive_prompt": "a', "damaged or cut off"),
        (parse_invokeai, "[1]", "none of positive_prompt"),
        (parse_invokeai, '{"seed": 1, "model": {"base": "flux"}}', "which sdjax does not run"),
    ],
)
def test_damaged_texts_are_refused_in_one_line(read_it, text, says):
    with pytest.raises(ValueError, match=says) as error:
        read_it(text)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.just(["5", 0])
    | st.just(["2", 1]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
pieces = st.sampled_from(
    [
        "Steps: ",
        "Negative prompt: ",
        "\n",
        ", ",
        ": ",
        '"',
        "Size: 512x",
        "Seed: ",
        "Sampler: ",
        "DPM",
        "9" * 30,
        "1e999",
    ]
    + [
        "{",
        "[",
        "Hires upscale: ",
        "Hires resize: 0x0",
        "First pass size: 1x1",
        "\0",
        "\ud800",
        "Civitai resources: [{}]",
    ]
    + ["Version: v", "Clip skip: ", "TI: ", "Denoising strength: nan", "Schedule type: ", "Karras", "Eta: 5", "RNG: x"]
)


def usable(read_it, text: str) -> None:
    """Passes if a text gives settings that can be used, or an error of one line."""
    said, found = "", None
    try:
        found = read_it(text)
    except ValueError as error:
        said = str(error)
    assert "\n" not in said
    if found is not None:
        check_values(found.settings)


@given(st.text() | st.lists(pieces | st.text(max_size=4), max_size=25).map("".join))
@example("Steps: 1, Size: 00001x00001, First pass size: 0x0, Hires resize: 0x9")
@example("a\nSteps: " + "9" * 5000)
def test_no_text_whatever_of_a1111_raises_anything_but_value_errors(text):
    usable(parse_parameters, text)


@given(st.sampled_from(sorted(PLAIN)), st.text(max_size=6) | st.sampled_from(["seed", "text", "model"]), values, values)
def test_no_graph_whatever_raises_anything_but_value_errors(name, key, value, other):
    inputs = {**json.loads(graph())[name]["inputs"], key: value}
    for one in inputs:
        for changed in ({**inputs, one: other}, {one: other}):
            usable(parse_comfyui, graph(**{f"n{name}": {**PLAIN[name], "inputs": changed}}))


@given(st.sampled_from([path.name for path in FILES if path.name.startswith("invoke")]), st.data())
def test_no_metadata_whatever_raises_anything_but_value_errors(name, data):
    said = json.loads((DATA / name).read_text())
    inner = said.get("image", said)
    inner[data.draw(st.sampled_from(sorted(inner)))] = data.draw(values)
    usable(parse_invokeai, json.dumps(said))


# Files


def picture(path: Path, **texts: str) -> Path:
    """A small picture with texts: of a PNG by their names; of other kinds "parameters", and ComfyUI's "prompt"."""
    image = Image.new("RGB", (16, 16))
    if path.suffix == ".png":
        info = PngImagePlugin.PngInfo()
        for name, text in texts.items():
            info.add_text(name.replace("_", "-") if name.startswith("sd_") else name, text)
        image.save(path, pnginfo=info)
        return path
    exif = Image.Exif()
    if "parameters" in texts:
        exif.get_ifd(EXIF_FOLDER)[COMMENT] = COMMENT_CODE + texts["parameters"].encode("utf-16-be")
    if "prompt" in texts:
        exif[GRAPHS[0]] = f"prompt:{texts['prompt']}"
    image.save(path, exif=exif)
    return path


@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg"])
def test_pictures_of_all_kinds_carry_the_text(suffix, tmp_path):
    text = (DATA / "a1111_1.3_karras.txt").read_text()
    path = picture(tmp_path / f"x{suffix}", parameters=text)
    assert is_foreign(path)
    assert read_foreign(path) == parse_parameters(text)


@pytest.mark.parametrize(
    ("texts", "source"),
    [
        ({"prompt": graph()}, "ComfyUI"),
        ({"prompt": graph(), "parameters": f"other\n{LINE}"}, "ComfyUI"),
        ({"parameters": graph()}, "ComfyUI"),
        ({"invokeai_metadata": (DATA / "invokeai_3.json").read_text()}, "InvokeAI"),
        ({"sd_metadata": (DATA / "invokeai_2.json").read_text()}, "InvokeAI"),
    ],
)
def test_the_text_tells_the_tool(texts, source, tmp_path):
    assert read_foreign(picture(tmp_path / "x.png", **texts)).source == source


def test_a_webp_of_comfyui_has_its_graph_in_exif(tmp_path):
    path = picture(tmp_path / "x.webp", prompt=graph())
    assert is_foreign(path)
    assert read_foreign(path).settings["prompt"] == "a cat"


def test_a_graph_that_is_not_plain_leaves_the_readable_text_beside_it(tmp_path):
    odd = graph(n4=node("VAEEncode", pixels=["8", 0]), n8=node("LoadImage", image="x.png"))
    found = read_foreign(picture(tmp_path / "x.png", prompt=odd, parameters=f"a dog\n{LINE}"))
    assert found.settings["prompt"] == "a dog"
    assert lines(found, "LoadImage")


@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
def test_text_files_may_be_of_any_encoding(codec, tmp_path):
    (tmp_path / "x.txt").write_bytes(f"schöne Katze\n{LINE}".encode(codec))
    assert read_foreign(tmp_path / "x.txt").settings["prompt"] == "schöne Katze"


@pytest.mark.parametrize(
    ("name", "text"), [("a.txt", " "), ("b.json", "{}"), ("c.json", "[[["), ("d.png", "no picture")]
)
def test_files_that_hold_no_text_are_named_in_one_line(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / name))) as error:
        read_foreign(tmp_path / name)
    assert "\n" not in str(error.value)


def test_models_are_told_apart_by_the_hash_of_their_file(tmp_path):
    path = tmp_path / "m.ckpt"
    path.write_bytes(bytes(2**20) + b"weights" * 20_000)
    whole = hashlib.sha256(path.read_bytes()).hexdigest()
    early = hashlib.sha256(path.read_bytes()[0x100000:0x110000]).hexdigest()
    for digest, same in ((whole[:10], True), (early[:8], True), ("0" * 10, False), ("0" * 8, False), ("", None)):
        assert is_model(Foreign("A1111", {}, "m", digest), path) is same
    assert is_model(Foreign("A1111", {}, "m", whole[:10]), tmp_path) is None


def test_adapters_are_told_apart_by_the_hash_behind_their_header(tmp_path):
    path = tmp_path / "a.safetensors"
    header, data = b'{"__metadata__":{}}', b"numbers"
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    assert is_adapter(hashlib.sha256(data).hexdigest()[:12], path)
    assert is_adapter(hashlib.sha256(path.read_bytes()).hexdigest()[:10], path)
    assert not is_adapter("0" * 12, path)


# The command line


@pytest.fixture
def theirs(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return picture(
        Path("theirs.png"),
        parameters="red heart\nNegative prompt: blue\nSteps: 3, Sampler: Euler, Schedule type: Karras, CFG scale: 4, "
        "Seed: 5, Size: 64x64, Model hash: 0123456789, Model: heartMix, Face restoration: GFPGAN, Version: v1.9.0",
    )


def test_their_picture_is_a_recipe_and_options_come_first(theirs, capsys):
    from sdjax.pipeline.recipe import read_recipe

    assert cli.main(["txt2img", "--recipe", "theirs.png", "--model", "", "-o", "x.png", "--seed", "9"]) == 0
    recipe = read_recipe("x.png")
    found = {name: getattr(recipe, name) for name in ("prompt", "negative_prompt", "seed", "steps", "sampler")}
    assert found == dict(prompt="red heart", negative_prompt="blue", seed=9, steps=3, sampler="euler")
    assert (recipe.guidance, recipe.spacing, recipe.width) == (4, "karras", 64)
    said = capsys.readouterr().err.splitlines()
    assert any("theirs.png was made by A1111" in line for line in said)
    assert any("Face restoration: GFPGAN: left out" in line for line in said)
    assert any("the model heartMix (hash 0123456789); the model in the box is another" in line for line in said)


def test_adapters_that_are_not_there_are_left_out_with_a_line_each(tmp_path, monkeypatch, capsys):
    from sdjax.pipeline.recipe import read_recipe

    monkeypatch.chdir(tmp_path)
    prompt = "red heart <lora:ink:0.7><lora:odd:1,0,1><hypernet:x:1>"
    Path("x.txt").write_text(f"{prompt}\nSteps: 2, Sampler: Euler, CFG scale: 1, Seed: 5, Size: 64x64, Model: m")
    assert cli.main(["txt2img", "--recipe", "x.txt", "--model", "", "-o", "x.png"]) == 0
    said = capsys.readouterr().err
    assert "<lora:ink:0.7>: left out; the adapter 'ink' is not there; give their folder by --lora-dir DIR" in said
    assert "<lora:odd:1,0,1>: left out; '1,0,1' is no weight; expected a number" in said
    assert read_recipe("x.png").prompt == "red heart <hypernet:x:1>"
    own = ["txt2img", "red heart <lora:ink:0.7>", "--recipe", "x.txt", "--model", "", "-o", "y.png"]
    assert cli.main(own) != 0, "what one asks for oneself is an error"
    assert "error: the adapter 'ink' is not there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--recipe", "theirs.png"], "made with the model heartMix (hash 0123456789); give it with --model FILE"),
        (["--recipe", "absent.txt", "--model", ""], "absent.txt: no such file"),
        (["--recipe", "odd.json", "--model", ""], "odd.json: node 4 (VAEEncode)"),
        (["--recipe", "cut.png", "--model", ""], "cut.png: ComfyUI's graph is damaged or cut off"),
    ],
)
def test_recipes_that_cannot_be_used_are_one_line_and_leave_nothing(arguments, says, theirs, capsys):
    Path("odd.json").write_text(graph(n4=node("VAEEncode", pixels=["99", 0])))
    picture(Path("cut.png"), prompt=graph()[:100])
    before = sorted(Path().iterdir())
    assert cli.main(["txt2img", *arguments, "-o", "new.png"]) != 0
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("sdjax: error: ")
    assert says in error
    assert sorted(Path().iterdir()) == before


def test_what_a_task_does_not_have_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("x.txt").write_text(
        "red heart\nSteps: 2, Sampler: Euler, CFG scale: 4, Seed: 5, Size: 64x64, Denoising strength: 0.5"
    )
    assert cli.main(["txt2img", "--recipe", "x.txt", "--model", "", "-o", "x.png"]) == 0
    assert "strength 0.5: left out; txt2img does not have it" in capsys.readouterr().err


def test_info_shows_what_would_be_taken_and_what_not(theirs, capsys):
    assert cli.main(["info", "theirs.png"]) == 0
    out = capsys.readouterr().out
    assert "Negative prompt: blue" in out
    assert "taken       " in out
    assert "sampler euler" in out
    assert "not         Face restoration: GFPGAN" in out
