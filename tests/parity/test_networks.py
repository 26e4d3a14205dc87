"""The networks and whole pictures against diffusers and transformers, through a .ckpt of the public layout.

PyTorch's models get random weights (nothing at zero or one), go into a Lightning .ckpt, are converted, and both sides
compute the same inputs. The tiny model runs always, the full-size Stable Diffusion 1.5 with `-m full`.

Two conventions of diffusers differ and are brought to ours: it samples the posterior of a picture's latent where we
take the mean; and inpainting at strength 1 starts the known region at pure noise where we start it, as the original
code does, at the noised picture (so strength is 0.8 here).
"""

import csv
import gc
import json
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import convert
from convert.diffusers_config import diffusers_json
from convert.names import PARTS, entries
from convert.write import write_tokenizer
from sdjax.config import SD15, TINY
from sdjax.models.clip import TextEncoder
from sdjax.models.params import cast
from sdjax.models.unet import UNet
from sdjax.models.vae import VAE
from sdjax.pipeline.pipeline import Pipeline
from sdjax.selftest import noise, relative_error
from sdjax.text.tokenizer import clip_tokenizer
from tests.checkpoint_files import write_ckpt

DATA = Path(__file__).parent.parent / "data"
PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text": "cond_stage_model.transformer.text_model.",
}
BARS = {"float32": 2e-5, "bfloat16": 2e-2}  # of the full size; PyTorch's own bfloat16 misses the tiny UNet by 2.0e-2
TIMESTEPS = (1, 401, 999)
PROMPTS = ["a photograph of an astronaut riding a horse", ""]
STEPS = {"tiny": 4, "sd15": 3}
SIZES = {"tiny": (64, 48), "sd15": (256, 320)}  # pictures, width and height


def torch_models(config):
    """diffusers' and transformers' modules with random weights: kernels by fan-in, scales around 1, biases around 0."""
    described = diffusers_json(config)
    models = {
        "unet": diffusers.UNet2DConditionModel.from_config(described["unet/config.json"]),
        "vae": diffusers.AutoencoderKL.from_config(described["vae/config.json"]),
        "text": CLIPTextModel(CLIPTextConfig(**described["text_encoder/config.json"])),
    }
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for model in models.values():
            model.eval()
            for name, parameter in model.named_parameters():
                values = torch.randn(parameter.shape, generator=generator)
                if parameter.ndim > 1:
                    scale = 0.02 if "embedding" in name else parameter[0].numel() ** -0.5
                    parameter.copy_(values * scale)
                else:
                    parameter.copy_(1 + 0.1 * values if "norm" in name and name.endswith("weight") else 0.02 * values)
    return models


def ckpt_names(config):
    """name in the .ckpt -> (part, name in PyTorch's model), in the file's order; the published table at full size."""
    if config == SD15:
        folders = {"unet": "unet", "vae": "vae", "text_encoder": "text"}
        with open(DATA / "sd15_ckpt_keys.tsv") as file:
            rows = [row for row in csv.DictReader(file, delimiter="\t") if row["diffusers_name"] != "-"]
        places = [row["diffusers_name"].split("/") for row in rows]
        return {row["name"]: (folders[folder], name) for row, (folder, name) in zip(rows, places, strict=True)}
    old = {"unet": "compvis", "vae": "compvis", "text": "diffusers"}
    return {
        PREFIXES[part] + before.name: (part, after.name)
        for part in PARTS
        for before, after in zip(entries(config, part, old[part]), entries(config, part, "diffusers"), strict=True)
    }


def write_public_layout(path, config, models):
    """The .ckpt: the models' weights, the schedule's buffers, EMA's counters and position_ids, Lightning's metadata."""
    states = {part: model.state_dict() for part, model in models.items()}
    tensors = {}
    with open(DATA / "sd15_ckpt_keys.tsv") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            if row["diffusers_name"] == "-":
                dtype = {"F32": "f4", "I64": "i8", "I32": "i4"}[row["dtype"]]
                tensors[row["name"]] = np.zeros(json.loads(row["shape"]), dtype)
    for name, (part, own) in ckpt_names(config).items():
        state = states[part]
        tensor = state[own] if own in state else state[own.removeprefix("text_model.")]
        if ".attn_1." in name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        tensors[name] = tensor.numpy()
    write_ckpt(path, tensors)


@pytest.fixture(scope="module", params=["tiny", pytest.param("sd15", marks=pytest.mark.full)])
def both(request, tmp_path_factory):
    """(config, PyTorch's modules, the converted parameters)."""
    config = {"tiny": TINY, "sd15": SD15}[request.param]
    folder = tmp_path_factory.mktemp("parity")
    models = torch_models(config)
    write_public_layout(folder / "model.ckpt", config, models)
    known = None if config == SD15 else config
    converted = convert.read(folder / "model.ckpt", config=known)
    (folder / "model.ckpt").unlink()
    assert converted.config == config
    yield config, models, converted.params
    models.clear()
    gc.collect()


def nchw(array):
    return torch.from_numpy(np.ascontiguousarray(array)).permute(0, 3, 1, 2)


def nhwc(tensor):
    return tensor.permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def ours(request, both):
    """(config, PyTorch's modules, parameters in a dtype, the bar, the dtype)."""
    config, models, params = both
    bar = 3e-2 if config == TINY and request.param == "bfloat16" else BARS[request.param]
    return config, models, cast(params, request.param), bar, request.param


@torch.no_grad()
def test_text_encoder(ours, measure):
    config, models, params, bar, dtype = ours
    ids = clip_tokenizer()(PROMPTS)
    expected = models["text"](torch.from_numpy(ids).long(), output_hidden_states=True)
    found = jax.jit(lambda p: TextEncoder(config.clip).apply({"params": p}, ids))(params["text"])
    error = relative_error(found.last_hidden_state.astype(jnp.float32), expected.last_hidden_state)
    measure(f"{config.name} text encoder, {dtype}", error, bar)
    for ours_, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert relative_error(ours_.astype(jnp.float32), theirs) < bar


@torch.no_grad()
def test_unet(ours, measure):
    config, models, params, bar, dtype = ours
    size = config.image_size // config.vae.downscale
    context = noise(1, (1, config.clip.length, config.unet.context_width))
    run = jax.jit(lambda p, x, t: UNet(config.unet).apply({"params": p}, x, t, context))
    for h, w in ((size, size), (size // 2, size * 3 // 4)):
        latent = noise(2, (1, h, w, 4))
        for t in TIMESTEPS if h == w else TIMESTEPS[1:2]:
            expected = nhwc(models["unet"](nchw(latent), t, torch.from_numpy(context)).sample)
            found = run(params["unet"], latent, jnp.full(1, t, jnp.float32)).astype(jnp.float32)
            measure(f"{config.name} UNet {h}x{w}, t = {t}, {dtype}", relative_error(found, expected), bar)


@torch.no_grad()
def test_vae(ours, measure):
    config, models, params, bar, dtype = ours
    width, height = SIZES[config.name]
    picture, latent = np.tanh(noise(3, (1, height, width, 3))), noise(4, (1, height // 8, width // 8, 4))
    posterior = models["vae"].encode(nchw(picture)).latent_dist
    run = jax.jit(lambda p, x: VAE(config.vae).apply({"params": p}, x, method="encode"))
    found = run(params["vae"], picture)
    measure(f"{config.name} VAE encoder mean, {dtype}", relative_error(found.mean, nhwc(posterior.mean)), bar)
    error = relative_error(found.logvar, nhwc(posterior.logvar))
    measure(f"{config.name} VAE encoder log-variance, {dtype}", error, bar)
    decode = jax.jit(lambda p, z: VAE(config.vae).apply({"params": p}, z, method="decode"))
    error = relative_error(
        decode(params["vae"], latent).astype(jnp.float32), nhwc(models["vae"].decode(nchw(latent)).sample)
    )
    measure(f"{config.name} VAE decoder, {dtype}", error, bar)


TASKS = {
    "txt2img": diffusers.StableDiffusionPipeline,
    "img2img": diffusers.StableDiffusionImg2ImgPipeline,
    "inpaint": diffusers.StableDiffusionInpaintPipeline,
}


@pytest.mark.parametrize("task", TASKS)
def test_pictures(task, both, measure, monkeypatch, tmp_path):
    config, models, params = both
    width, height = SIZES[config.name]
    photo = Image.open(DATA / "astronaut.png").convert("RGB").resize((width, height))
    mask = Image.new("L", (width, height))
    mask.paste(255, (width // 4, height // 4, width * 3 // 4, height))
    start = noise(5, (1, height // 8, width // 8, 4))
    steps, guidance = STEPS[config.name], 5.0

    expected = reference_picture(task, config, models, photo, mask, start, steps, guidance, monkeypatch, tmp_path)
    pipe = Pipeline(config, jax.tree.map(jnp.asarray, params), clip_tokenizer())
    settings = dict(steps=steps, guidance=guidance, sampler="ddim", spacing="leading", noise=start)
    if task == "txt2img":
        found = pipe.text_to_image(PROMPTS[0], "blurry", width=width, height=height, **settings)
    elif task == "img2img":
        found = pipe.image_to_image(PROMPTS[0], photo, "blurry", strength=0.8, **settings)
    else:
        found = pipe.inpaint(PROMPTS[0], photo, mask, "blurry", strength=0.8, **settings)
        keep = np.asarray(mask)[..., None] == 0
        expected = np.where(keep, np.asarray(photo) / 255, expected)
    difference = np.abs(np.asarray(found[0]) / 255 - expected)
    assert expected.std() > 0.02, "a picture worth comparing"
    measure(f"{config.name} {task} picture, mean (in 1/255)", 255 * float(difference.mean()), 1)
    measure(f"{config.name} {task} picture, largest (in 1/255)", 255 * float(difference.max()), 3)


def reference_picture(task, config, models, photo, mask, start, steps, guidance, monkeypatch, folder):
    """diffusers' picture, f[H, W, 3] in [0, 1], from the same noise, with the posterior's mean for its sample."""
    module = __import__(TASKS[task].__module__, fromlist=["_"])
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: nchw(start))
    if task != "txt2img":
        monkeypatch.setattr(module, "retrieve_latents", lambda output, **_: output.latent_dist.mode())
    (folder / "tokenizer").mkdir()
    write_tokenizer(folder / "tokenizer", config, None)
    scheduler = diffusers.DDIMScheduler.from_config(
        diffusers_json(config)["scheduler/scheduler_config.json"] | dict(set_alpha_to_one=True)
    )
    pipe = TASKS[task](
        vae=models["vae"],
        text_encoder=models["text"],
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=models["unet"],
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    inputs = {"txt2img": dict(width=photo.width, height=photo.height), "img2img": dict(image=photo, strength=0.8)}
    inputs["inpaint"] = dict(image=photo, mask_image=mask, strength=0.8, width=photo.width, height=photo.height)
    return pipe(
        PROMPTS[0],
        negative_prompt="blurry",
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="np",
        **inputs[task],
    ).images[0]
