"""What other tools call samplers and spacings, and what comes nearest to a name that nobody here can run."""

from __future__ import annotations

import difflib
from collections.abc import Collection

from sdjax.diffusion.samplers import SAMPLERS
from sdjax.diffusion.spacings import SPACINGS

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
    "dpmpp_2m_sde_heun": "DPM++ 2M SDE Heun",
    "dpmpp_3m_sde": "DPM++ 3M SDE",
    "dpmpp_2s_a": "DPM++ 2S a",
    "dpmpp_sde": "DPM++ SDE",
    "unipc": "UniPC",
    "lcm": "LCM",
    "tcd": "TCD",
    "restart": "Restart",
    "deis": "DEIS",
    "ipndm": "IPNDM",
    "ipndm_v": "IPNDM_V",
    "res_multistep": "Res Multistep",
    "res_multistep_a": "Res Multistep a",
    "gradient_estimation": "Gradient Estimation",
    "er_sde": "ER SDE",
    "sa_solver": "SA Solver",
    "seeds_2": "SEEDS 2",
    "heunpp2": "HeunPP2",
    "euler_cfg_pp": "Euler CFG++",
    "euler_a_cfg_pp": "Euler a CFG++",
}
"""Samplers as A1111 and those who followed it spell them; a spacing may follow, as in "DPM++ 2M Karras"."""

OTHER_SAMPLERS = {
    "ddim cfg++": "euler_cfg_pp",
    "euler_ancestral": "euler_a",
    "euler ancestral": "euler_a",
    "euler_ancestral_cfg_pp": "euler_a_cfg_pp",
    "euler_pp": "euler_cfg_pp",
    "euler_ancestral_pp": "euler_a_cfg_pp",
    "dpm_2": "dpm2",
    "dpm_2_ancestral": "dpm2_a",
    "dpmpp_2s": "dpmpp_2s_a",
    "dpmpp_2s_ancestral": "dpmpp_2s_a",
    "dpm++ 2s ancestral": "dpmpp_2s_a",
    "dpmpp_sde_gpu": "dpmpp_sde",
    "dpmpp_2m_sde_gpu": "dpmpp_2m_sde",
    "dpmpp_2m_sde_heun_gpu": "dpmpp_2m_sde_heun",
    "dpmpp_3m_sde_gpu": "dpmpp_3m_sde",
    "dpm++ 2m sde gpu": "dpmpp_2m_sde",
    "dpm++ 3m sde gpu": "dpmpp_3m_sde",
    "res_multistep_ancestral": "res_multistep_a",
    "uni_pc": "unipc",
    "uni_pc_bh2": "unipc",
    "pndm": "plms",
    "lms discrete": "lms",
    "k_euler": "euler",
    "k_euler_a": "euler_a",
    "k_euler_ancestral": "euler_a",
    "k_heun": "heun",
    "k_lms": "lms",
    "k_dpm_2": "dpm2",
    "k_dpm_2_a": "dpm2_a",
    "k_dpm_2_ancestral": "dpm2_a",
    "k_dpmpp_2m": "dpmpp_2m",
    "k_dpmpp_2s_a": "dpmpp_2s_a",
    "k_dpmpp_sde": "dpmpp_sde",
}
"""Further names, in small letters: ComfyUI's, InvokeAI's, k-diffusion's."""

INSTEAD = {
    "dpm fast": "dpmpp_2m",
    "dpm_fast": "dpmpp_2m",
    "dpm adaptive": "dpmpp_2m",
    "dpm_adaptive": "dpmpp_2m",
    "dpmpp_2m_cfg_pp": "euler_cfg_pp",
    "dpmpp_2s_ancestral_cfg_pp": "euler_a_cfg_pp",
    "res_multistep_cfg_pp": "euler_cfg_pp",
    "res_multistep_ancestral_cfg_pp": "euler_a_cfg_pp",
    "gradient_estimation_cfg_pp": "euler_cfg_pp",
    "sa_solver_pece": "sa_solver",
    "seeds_3": "seeds_2",
    "exp_heun_2_x0": "heun",
    "exp_heun_2_x0_sde": "dpmpp_sde",
    "gits": "ays",
    "linear_quadratic": "sgm_uniform",
    "laplace": "karras",
}
"""What is nearest to samplers and spacings whose rule is not a table of rows, or that few ask for."""

SPACING_NAMES = {
    "karras": "Karras",
    "exponential": "Exponential",
    "polyexponential": "Polyexponential",
    "normal": "Normal",
    "sgm_uniform": "SGM Uniform",
    "simple": "Simple",
    "ddim_uniform": "DDIM",
    "beta_a1111": "Beta",
    "kl_optimal_a1111": "KL Optimal",
    "ays_a1111": "Align Your Steps",
    "trailing": "Turbo",
}
"""Spacings as A1111 and those who followed it spell them."""

OTHER_SPACINGS = {"uniform": "normal", "align_your_steps": "ays_a1111"}
"""Further names, in small letters."""

_SAMPLERS = {spelling.lower(): here for here, spelling in SAMPLER_NAMES.items()} | OTHER_SAMPLERS
_SPACINGS = {spelling.lower(): here for here, spelling in SPACING_NAMES.items()}


def sampler_of(name: str) -> tuple[str, str | None]:
    """Sampler, and spacing if it is in the name, from a name of ours or of other tools ("DPM++ 2M Karras").

    A name that nobody knows comes back as it is.
    """
    if name in SAMPLERS:
        return name, None
    plain = " ".join(name.lower().split())
    if plain in _SAMPLERS:
        return _SAMPLERS[plain], None
    ours = {spacing: spacing for spacing in SPACINGS}
    for spacings, samplers in ((_SPACINGS, _SAMPLERS), (ours, SAMPLERS), (ours, _SAMPLERS)):
        for ending, spacing in spacings.items():
            first = plain.removesuffix(f" {ending}").removesuffix(f"_{ending}")
            if first != plain and first in samplers:
                return _SAMPLERS.get(first, first), spacing
    return name, None


def spacing_of(name: str) -> str:
    """A spacing from a name of ours or as A1111 spells it ("Beta" is A1111's, "beta" ours); a name that nobody knows
    comes back as it is.
    """
    if name in SPACINGS:
        return name
    plain = " ".join(name.lower().split())
    return (_SPACINGS | OTHER_SPACINGS).get(plain, plain if plain in SPACINGS else name)


def nearest_sampler(name: str) -> str:
    """The sampler that comes nearest to a name that cannot be run."""
    return _nearest(name, _SAMPLERS, SAMPLERS)


def nearest_spacing(name: str) -> str:
    """The spacing that comes nearest to a name that nobody knows."""
    return _nearest(name, _SPACINGS, SPACINGS)


def _nearest(name: str, spellings: dict[str, str], known: Collection[str]) -> str:
    plain = " ".join(str(name).lower().split())
    for beginning in sorted(INSTEAD, key=len, reverse=True):
        if plain.startswith(beginning) and INSTEAD[beginning] in known:
            return INSTEAD[beginning]
    names = {**spellings, **{each: each for each in known}}
    found = difflib.get_close_matches(plain, names, 1, cutoff=0)
    return names[found[0]]
