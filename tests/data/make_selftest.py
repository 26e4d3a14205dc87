"""Makes sdjax/assets/selftest.npz: what PyTorch computes for the inputs of `sdjax.selftest`.

python -m tests.data.make_selftest        # from the checkout, with the test extra installed
"""

import tempfile
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from transformers import CLIPTextModel

import sdjax.assets
from convert.write import write_diffusers
from sdjax.config import TINY
from sdjax.diffusion.samplers import SAMPLERS
from sdjax.models.params import random_params
from sdjax.selftest import LATENT, PROMPTS, SAMPLED, TIMESTEPS, noise
from sdjax.text.tokenizer import clip_tokenizer
from tests.parity import test_schedulers as parity

STEPS = 10


@torch.no_grad()
def networks(folder):
    """diffusers' and transformers' outputs for the tiny model; names and layouts as `sdjax.selftest.networks`."""
    text = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet").eval()
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae").eval()

    def nchw(array):
        return torch.from_numpy(array).permute(0, 3, 1, 2)

    def nhwc(tensor):
        return tensor.permute(0, 2, 3, 1).numpy()

    ids = clip_tokenizer()(PROMPTS)
    context = torch.from_numpy(noise(1, (1, TINY.clip.length, TINY.unet.context_width)))
    latent = nchw(noise(2, LATENT))
    picture = nchw(np.tanh(noise(3, (1, LATENT[1] * 8, LATENT[2] * 8, 3))))
    found = {"ids": ids, "text encoder": text(torch.from_numpy(ids).long()).last_hidden_state.numpy()}
    for t in TIMESTEPS:
        found[f"unet, t = {t}"] = nhwc(unet(latent, t, context).sample)
    posterior = vae.encode(picture).latent_dist
    found |= {"vae encoder, mean": nhwc(posterior.mean), "vae encoder, log-variance": nhwc(posterior.logvar)}
    found["vae decoder"] = nhwc(vae.decode(nchw(noise(4, LATENT))).sample)
    return found


def samplers(monkeypatch):
    """diffusers' result for the samplers that it has, on the stand-in network, with its levels and start."""
    found = {}
    for name in SAMPLED:
        t = None
        if name in parity.SIGMA_SCHEDULERS:
            sigma, rows, end = parity.sigma_reference(name, "linspace", STEPS, monkeypatch)
            t = rows.levels.t
        elif name == "dpmpp_sde":
            sigma, end = parity.dpmpp_sde_reference(STEPS, monkeypatch)
        elif name == "lcm":
            sigma, end = parity.lcm_reference(STEPS, monkeypatch)
        else:
            sigma, end = parity.variance_preserving_reference(name, "leading", STEPS, monkeypatch)
        t = SAMPLERS[name].rows(parity.SCHEDULE, sigma).levels.t if t is None else t
        found |= {f"{name} sigma": sigma, f"{name} t": t, f"{name} start": parity.prior(sigma), f"{name} end": end}
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as monkeypatch:
        write_diffusers(Path(folder) / "tiny", TINY, random_params(TINY))
        arrays = networks(Path(folder) / "tiny") | samplers(monkeypatch)
    target = Path(sdjax.assets.__file__).parent / "selftest.npz"
    np.savez_compressed(target, **arrays)
    print(f"{target}: {len(arrays)} arrays, {target.stat().st_size} bytes")
