"""What can be named in sampling, and what is known of it without its arithmetic: samplers, spacings, upscalers, noise.

Also what other tools call them, and what comes nearest to a name that nobody here can run. The arithmetic is in
`samplers`, `spacings`, `upscale` and `noise`; this module imports nothing large, so that a command line can be read and
checked before anything is loaded.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from sdjax.config import Spacing

CHURN = ("s_churn", "s_tmin", "s_tmax")
"""Settings of the samplers that can add noise before a step (Karras et al. 2022, algorithm 2)."""


@dataclass(frozen=True)
class Traits:
    """What is known of a sampler without its table.

    spelling: its name as A1111 and those who followed it spell it; a spacing may follow, as in "DPM++ 2M Karras".
    stochastic: whether it adds noise on the way, its options being as usual.
    options: the settings of a request that its table takes.
    of_schedule: whether its table takes the schedule's sigmas too.
    cfg_pp: whether the guidance at a row is the one asked for over what the row gives to x0_hat (CFG++, Chung et al.
        2024): x' = D + (sigma' / sigma) (x - D_u) is guidance of w / (1 - sigma' / sigma).
    """

    spelling: str
    stochastic: bool = False
    options: tuple[str, ...] = ()
    of_schedule: bool = False
    cfg_pp: bool = False

    @property
    def adds_noise(self) -> bool:
        """Whether it adds noise, or can be asked to."""
        return self.stochastic or bool(self.options)


TRAITS: Mapping[str, Traits] = {
    "ddpm": Traits("DDPM", stochastic=True),
    "ddim": Traits("DDIM", options=("eta",)),
    "plms": Traits("PLMS"),
    "euler": Traits("Euler", options=CHURN),
    "euler_a": Traits("Euler a", stochastic=True, options=("eta",)),
    "heun": Traits("Heun", options=CHURN),
    "dpm2": Traits("DPM2", options=CHURN),
    "dpm2_a": Traits("DPM2 a", stochastic=True, options=("eta",)),
    "lms": Traits("LMS"),
    "dpmpp_2m": Traits("DPM++ 2M"),
    "dpmpp_2m_sde": Traits("DPM++ 2M SDE", stochastic=True, options=("eta",)),
    "dpmpp_2m_sde_heun": Traits("DPM++ 2M SDE Heun", stochastic=True, options=("eta",)),
    "dpmpp_3m_sde": Traits("DPM++ 3M SDE", stochastic=True, options=("eta",)),
    "dpmpp_2s_a": Traits("DPM++ 2S a", stochastic=True, options=("eta",)),
    "dpmpp_sde": Traits("DPM++ SDE", stochastic=True, options=("eta",)),
    "unipc": Traits("UniPC"),
    "lcm": Traits("LCM", stochastic=True),
    "tcd": Traits("TCD", stochastic=True, options=("eta",), of_schedule=True),
    "restart": Traits("Restart", stochastic=True),
    "deis": Traits("DEIS"),
    "ipndm": Traits("IPNDM"),
    "ipndm_v": Traits("IPNDM_V"),
    "res_multistep": Traits("Res Multistep"),
    "res_multistep_a": Traits("Res Multistep a", stochastic=True, options=("eta",)),
    "gradient_estimation": Traits("Gradient Estimation"),
    "er_sde": Traits("ER SDE", stochastic=True),
    "sa_solver": Traits("SA Solver", stochastic=True, options=("eta",)),
    "seeds_2": Traits("SEEDS 2", stochastic=True, options=("eta",)),
    "heunpp2": Traits("HeunPP2"),
    "euler_cfg_pp": Traits("Euler CFG++", cfg_pp=True),
    "euler_a_cfg_pp": Traits("Euler a CFG++", stochastic=True, options=("eta",), cfg_pp=True),
}
"""Every sampler, in the order in which they are listed for people."""

SAMPLER_NAMES = {name: traits.spelling for name, traits in TRAITS.items()}
"""Samplers as A1111 and those who followed it spell them."""

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

ALL_SPACINGS: tuple[str, ...] = typing.get_args(Spacing)
"""Every spacing, in the order in which they are listed for people."""

RHO = {"karras": 7.0, "polyexponential": 1.0}
"""The usual exponents of the spacings that have one."""

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

UPSCALER_NAMES = {
    "latent": "Latent",
    "latent_antialiased": "Latent (antialiased)",
    "latent_bicubic": "Latent (bicubic)",
    "latent_bicubic_antialiased": "Latent (bicubic antialiased)",
    "latent_nearest": "Latent (nearest)",
    "latent_nearest_exact": "Latent (nearest-exact)",
    "lanczos": "Lanczos",
    "bicubic": "Bicubic",
    "nearest": "Nearest",
}
"""Every upscaler, in the order in which they are listed for people, as A1111 spells them."""

UPSCALERS = tuple(UPSCALER_NAMES)

NOISES = ("jax", "torch", "torch-cuda")
"""Where a seed's noise may come from (`sdjax.diffusion.noise.SOURCES`)."""

_SAMPLERS = {spelling.lower(): here for here, spelling in SAMPLER_NAMES.items()} | OTHER_SAMPLERS
_SPACINGS = {spelling.lower(): here for here, spelling in SPACING_NAMES.items()}


def sampler_of(name: str) -> tuple[str, str | None]:
    """Sampler, and spacing if it is in the name, from a name of ours or of other tools ("DPM++ 2M Karras").

    A name that nobody knows comes back as it is.
    """
    if name in TRAITS:
        return name, None
    plain = " ".join(name.lower().split())
    if plain in _SAMPLERS:
        return _SAMPLERS[plain], None
    ours = {spacing: spacing for spacing in ALL_SPACINGS}
    for spacings, samplers in ((_SPACINGS, _SAMPLERS), (ours, TRAITS), (ours, _SAMPLERS)):
        for ending, spacing in spacings.items():
            first = plain.removesuffix(f" {ending}").removesuffix(f"_{ending}")
            if first != plain and first in samplers:
                return _SAMPLERS.get(first, first), spacing
    return name, None


def spacing_of(name: str) -> str:
    """A spacing from a name of ours or as A1111 spells it ("Beta" is A1111's, "beta" ours); a name that nobody knows
    comes back as it is.
    """
    if name in ALL_SPACINGS:
        return name
    plain = " ".join(name.lower().split())
    return (_SPACINGS | OTHER_SPACINGS).get(plain, plain if plain in ALL_SPACINGS else name)


def upscaler_of(name: str) -> str:
    """An upscaler from a name of ours or as A1111 spells it; a name that nobody knows comes back as it is.

    A1111's "None" resizes the picture by Lanczos.
    """
    theirs = {spelled.lower(): ours for ours, spelled in UPSCALER_NAMES.items()} | {"none": "lanczos"}
    return name if name in UPSCALERS else theirs.get(name.strip().lower(), name)


def nearest_sampler(name: str) -> str:
    """The sampler that comes nearest to a name that cannot be run."""
    return _nearest(name, _SAMPLERS, TRAITS)


def nearest_spacing(name: str) -> str:
    """The spacing that comes nearest to a name that nobody knows."""
    return _nearest(name, _SPACINGS, ALL_SPACINGS)


def _nearest(name: str, spellings: dict[str, str], known: Collection[str]) -> str:
    plain = " ".join(str(name).lower().split())
    for beginning in sorted(INSTEAD, key=len, reverse=True):
        if plain.startswith(beginning) and INSTEAD[beginning] in known:
            return INSTEAD[beginning]
    names = {**spellings, **{each: each for each in known}}
    found = difflib.get_close_matches(plain, names, 1, cutoff=0)
    return names[found[0]]
