"""What other tools mean by samplers, spacings and upscalers beyond their names (`sdjax.diffusion.names`)."""

from __future__ import annotations

from sdjax.diffusion.names import (
    ALL_SPACINGS,
    SAMPLER_NAMES,
    TRAITS,
    nearest_sampler,
    nearest_spacing,
    sampler_of,
    spacing_of,
    upscaler_of,
)
from sdjax.pipeline.foreign.findings import Findings

A1111S_OWN = {"beta": "beta_a1111", "kl_optimal": "kl_optimal_a1111", "ddim": "ddim_uniform"}
"""Names in small letters that mean something else in a text of A1111 than with us."""

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

BROWNIAN = ("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde")
"""Samplers whose noise other tools draw from a Brownian tree."""

TWICE = ("dpm2", "dpm2_a", "dpmpp_3m_sde")
"""Samplers for which AUTOMATIC1111 leaves out the level before the last."""

SCALINGS = ("area", "bilinear", "bislerp", "box", "hamming")
"""Ways of scaling without a model that sdjax does not have."""


def put_sampler(found: Findings, name: str, said: str, prefix: str = "") -> tuple[str | None, str | None]:
    """Takes a sampler by A1111's or our name; gives it back with the spacing in its name.

    prefix: of the settings, "hires_" for the second pass.
    """
    sampler, spacing = sampler_of(name)
    if sampler not in TRAITS:
        sampler = nearest_sampler(name)
        found.leave(said, f"cannot be run; the nearest is used instead, {SAMPLER_NAMES.get(sampler, sampler)}")
    return (sampler if found.put(f"{prefix}sampler", sampler, said) else None), spacing


def put_spacing(found: Findings, name: str, said: str, prefix: str = "") -> None:
    """Takes a spacing by A1111's or our name."""
    spacing = spacing_of(name)
    if spacing not in ALL_SPACINGS:
        spacing = nearest_spacing(name)
        found.leave(said, f"no spacing of sdjax; the nearest is used instead, {spacing}")
    found.put(f"{prefix}spacing", spacing, said)


def put_upscaler(found: Findings, name: str, said: str) -> None:
    """Takes the upscaler of a second pass; models that upscale are out, and Lanczos stands for them."""
    plain = " ".join(name.lower().split())
    wanted, latent = upscaler_of(name), plain.startswith("latent")
    if found.accepts("hires_upscaler", wanted):
        found.settings["hires_upscaler"] = wanted
        return
    instead = "latent" if latent else "lanczos"
    if found.put("hires_upscaler", instead, said):
        what = "a way of scaling that sdjax does not have" if latent or plain in SCALINGS else "an upscaling model"
        found.leave(said, f"{what}; {instead} is used instead")
