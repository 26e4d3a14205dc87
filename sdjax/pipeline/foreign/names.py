"""Other tools' names of samplers, spacings and upscalers, in one table each."""

from __future__ import annotations

import difflib

from sdjax.diffusion.samplers import SAMPLERS
from sdjax.diffusion.schedule import SPACINGS
from sdjax.pipeline.foreign.findings import Findings
from sdjax.request import SAMPLER_NAMES, sampler_of

A1111_SPACINGS = {
    "karras": "karras",
    "exponential": "exponential",
    "polyexponential": "polyexponential",
    "uniform": "normal",
    "normal": "normal",
    "sgm uniform": "sgm_uniform",
    "sgmuniform": "sgm_uniform",
    "sgm_uniform": "sgm_uniform",
    "turbo": "sgm_uniform",
    "simple": "simple",
    "ddim": "ddim_uniform",
    "ddim_uniform": "ddim_uniform",
    "ddim uniform": "ddim_uniform",
    "beta": "beta_a1111",
    "kl optimal": "kl_optimal_a1111",
    "kl_optimal": "kl_optimal_a1111",
    "align your steps": "ays_a1111",
    "align_your_steps": "ays_a1111",
}
"""AUTOMATIC1111's "Schedule type", in small letters, in ours."""

COMFY_SPACINGS = {
    "normal": "normal",
    "karras": "karras",
    "exponential": "exponential",
    "sgm_uniform": "sgm_uniform",
    "simple": "simple",
    "ddim_uniform": "ddim_uniform",
    "beta": "beta",
    "kl_optimal": "kl_optimal",
}
"""ComfyUI's schedulers in ours; linear_quadratic and those of extensions cannot be had."""

AUTOMATIC = {
    "dpmpp_2m": "karras",
    "dpmpp_sde": "karras",
    "dpmpp_2s_a": "karras",
    "dpm2": "karras",
    "dpm2_a": "karras",
    "restart": "karras",
    "dpmpp_2m_sde": "exponential",
    "dpmpp_2m_sde_heun": "exponential",
    "dpmpp_3m_sde": "exponential",
    "ddim": "leading",
    "plms": "leading",
    "unipc": "leading",
}
"""The spacings that AUTOMATIC1111 takes by itself since version 1.9; of all other samplers "normal"."""

ALWAYS = ("restart", "ddim", "plms", "unipc")
"""Samplers of `AUTOMATIC` that had theirs in earlier versions, too."""

COMFY_SAMPLERS = {
    "euler": "euler",
    "euler_cfg_pp": "euler_cfg_pp",
    "euler_ancestral": "euler_a",
    "euler_ancestral_cfg_pp": "euler_a_cfg_pp",
    "heun": "heun",
    "heunpp2": "heunpp2",
    "dpm_2": "dpm2",
    "dpm_2_ancestral": "dpm2_a",
    "lms": "lms",
    "dpmpp_2s_ancestral": "dpmpp_2s_a",
    "dpmpp_sde": "dpmpp_sde",
    "dpmpp_sde_gpu": "dpmpp_sde",
    "dpmpp_2m": "dpmpp_2m",
    "dpmpp_2m_sde": "dpmpp_2m_sde",
    "dpmpp_2m_sde_gpu": "dpmpp_2m_sde",
    "dpmpp_2m_sde_heun": "dpmpp_2m_sde_heun",
    "dpmpp_2m_sde_heun_gpu": "dpmpp_2m_sde_heun",
    "dpmpp_3m_sde": "dpmpp_3m_sde",
    "dpmpp_3m_sde_gpu": "dpmpp_3m_sde",
    "ddpm": "ddpm",
    "ddim": "ddim",
    "lcm": "lcm",
    "uni_pc": "unipc",
    "uni_pc_bh2": "unipc",
    "ipndm": "ipndm",
    "ipndm_v": "ipndm_v",
    "deis": "deis",
    "res_multistep": "res_multistep",
    "res_multistep_ancestral": "res_multistep_a",
    "gradient_estimation": "gradient_estimation",
    "er_sde": "er_sde",
    "sa_solver": "sa_solver",
    "seeds_2": "seeds_2",
}
"""ComfyUI's samplers in ours."""

INVOKE_SAMPLERS = {
    "ddim": ("ddim", "leading"),
    "ddpm": ("ddpm", "leading"),
    "plms": ("plms", "leading"),
    "pndm": ("plms", "leading"),
    "lcm": ("lcm", "lcm"),
    "tcd": ("tcd", "lcm"),
    "deis": ("deis", "linspace"),
    "lms": ("lms", "linspace"),
    "heun": ("heun", "linspace"),
    "euler": ("euler", "linspace"),
    "euler_a": ("euler_a", "linspace"),
    "kdpm_2": ("dpm2", "linspace"),
    "kdpm_2_a": ("dpm2_a", "linspace"),
    "dpmpp_2m": ("dpmpp_2m", "linspace"),
    "dpmpp_2m_sde": ("dpmpp_2m_sde", "linspace"),
    "dpmpp_sde": ("dpmpp_sde", "linspace"),
    "er_sde": ("er_sde", "linspace"),
    "unipc": ("unipc", "linspace"),
    "k_euler": ("euler", "normal"),
    "k_euler_a": ("euler_a", "normal"),
    "k_heun": ("heun", "normal"),
    "k_lms": ("lms", "normal"),
    "k_dpm_2": ("dpm2", "normal"),
    "k_dpm_2_a": ("dpm2_a", "normal"),
    "k_dpmpp_2": ("dpmpp_2m", "normal"),
    "k_dpmpp_2_a": ("dpmpp_2s_a", "normal"),
}
"""InvokeAI's schedulers, without the "_k" of Karras spacing, and the spacing that each has by itself: since version 2.3
diffusers' for that scheduler, before k-diffusion's."""

INSTEAD = {
    "dpm fast": "dpmpp_2m",
    "dpm_fast": "dpmpp_2m",
    "dpm adaptive": "dpmpp_2m",
    "dpm_adaptive": "dpmpp_2m",
    "dpmpp_2s": "dpmpp_2m",
    "dpmpp_3m": "dpmpp_2m",
    "seeds_3": "seeds_2",
    "sa_solver_pece": "sa_solver",
}
"""What comes nearest to samplers that cannot be run."""

BROWNIAN = ("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde")
"""Samplers whose noise other tools draw from a Brownian tree."""

TWICE = ("dpm2", "dpm2_a")
"""Samplers for which AUTOMATIC1111 leaves out the level before the last."""

UPSCALERS = {
    "latent": "latent",
    "latent (antialiased)": "latent_antialiased",
    "latent (bicubic)": "latent_bicubic",
    "latent (bicubic antialiased)": "latent_bicubic_antialiased",
    "latent (nearest)": "latent_nearest",
    "latent (nearest-exact)": "latent_nearest_exact",
    "lanczos": "lanczos",
    "bicubic": "bicubic",
    "none": "lanczos",
    "nearest": "nearest",
    "nearest-exact": "nearest",
}
"""Names of upscalers, in small letters, in ours."""

SCALINGS = ("area", "bilinear", "bislerp", "box", "hamming")
"""Ways of scaling without a model that sdjax does not have."""


def put_sampler(found: Findings, name: str, said: str, prefix: str = "") -> tuple[str | None, str | None]:
    """Takes a sampler by A1111's or our name; gives it back with the spacing in its name.

    prefix: of the settings, "hires_" for the second pass.
    """
    sampler, spacing = _split(name)
    if sampler not in SAMPLERS:
        sampler = nearest(name)
        found.leave(said, f"cannot be run; the nearest is used instead, {SAMPLER_NAMES.get(sampler, sampler)}")
    return (sampler if found.put(f"{prefix}sampler", sampler, said) else None), spacing


def _split(name: str) -> tuple[str, str | None]:
    """Sampler and spacing; a sampler that nobody knows comes back by its own name."""
    plain = " ".join(name.lower().split())
    if plain in COMFY_SAMPLERS:
        return COMFY_SAMPLERS[plain], None
    sampler, spacing = sampler_of(name)
    if sampler in SAMPLERS:
        return sampler, spacing
    for table, join in ((A1111_SPACINGS, " "), (COMFY_SPACINGS, "_")):
        for ending, ours in table.items():
            first = plain.removesuffix(f"{join}{ending}")
            sampler = COMFY_SAMPLERS.get(first) or sampler_of(first)[0]
            if first != plain and (sampler in SAMPLERS or first in INSTEAD):
                return (sampler if sampler in SAMPLERS else first), ours
    return name, None


def nearest(name: str) -> str:
    """The sampler that comes nearest to a name that cannot be run."""
    plain = " ".join(name.lower().split())
    for known, sampler in INSTEAD.items():
        if plain.startswith(known):
            return sampler if sampler in SAMPLERS else "dpmpp_2m"
    spellings = {spelling.lower(): ours for ours, spelling in SAMPLER_NAMES.items()}
    spellings = {name: ours for name, ours in (COMFY_SAMPLERS | spellings).items() if ours in SAMPLERS}
    return spellings[difflib.get_close_matches(plain[:80], spellings, 1, cutoff=0)[0]]


def put_spacing(found: Findings, spacing: str | None, said: str, prefix: str = "") -> None:
    """Takes a spacing by our name; None is one that the tables do not have."""
    if spacing in SPACINGS:
        found.put(f"{prefix}spacing", spacing, said)
    else:
        found.leave(said, "no spacing of sdjax; the model's own is used")


def put_upscaler(found: Findings, name: str, said: str) -> None:
    """Takes the upscaler of a second pass; models that upscale are out, and Lanczos stands for them."""
    plain = " ".join(name.lower().split())
    wanted, latent = UPSCALERS.get(plain, ""), plain.startswith("latent")
    if found.accepts("hires_upscaler", wanted):
        found.settings["hires_upscaler"] = wanted
        return
    instead = "latent" if latent else "lanczos"
    if found.put("hires_upscaler", instead, said):
        what = "a way of scaling that sdjax does not have" if latent or plain in SCALINGS else "an upscaling model"
        found.leave(said, f"{what}; {instead} is used instead")
