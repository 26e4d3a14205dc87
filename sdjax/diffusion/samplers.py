"""Samplers by name. Each is a table of coefficients, worked out on the host (`sdjax.diffusion.tables`), that one short
step runs over (`sdjax.diffusion.rows`).

    name                 order  calls per step  noise     source
    ddim                 1      1               eta       Song et al. 2021, eq. 12
    ddpm                 1      1               yes       Ho et al. 2020, algorithm 2 (variance beta tilde)
    euler                1      1               s_churn   Karras et al. 2022, algorithm 1
    euler_a              1      1               yes       ancestral Euler, eta 1 (Song et al. 2021, eq. 16)
    euler_cfg_pp         1      1               no        Chung et al. 2024 (CFG++): guidance that depends on the step
    euler_a_cfg_pp       1      1               yes       the same, ancestral
    tcd                  1      1               yes       Zheng et al. 2024 (for distilled models)
    lcm                  1      1               yes       Luo et al. 2023, algorithm 3 (for distilled models)
    lms                  4      1               no        Adams-Bashforth on the sigma grid
    plms                 4      1, one more     no        Liu et al. 2022, algorithm 2 ("PNDM")
    ipndm                4      1               no        Zhang & Chen 2023, weights of even steps
    ipndm_v              4      1               no        the same, weights of the steps' own lengths
    deis                 3      1               no        Zhang & Chen 2023, "tab"
    gradient_estimation  1      1               no        Permenter & Yuan 2024
    dpmpp_2m             2      1               no        Lu et al. 2022, algorithm 2
    dpmpp_2m_sde         2      1               yes       Lu et al. 2022, section 5 (midpoint form)
    dpmpp_2m_sde_heun    2      1               yes       the same, Heun's form
    dpmpp_3m_sde         3      1               yes       k-diffusion's `sample_dpmpp_3m_sde`
    res_multistep        2      1               no        Zhang et al. 2023 (RES)
    res_multistep_a      1      1               yes       the same, ancestral
    unipc                3      1               no        Zhao et al. 2023, B(h) = e^h - 1, predictor and corrector
    sa_solver            3      1               yes       Xue et al. 2023, predictor and corrector
    er_sde               3      1               yes       Cui et al. 2023
    heun                 2      2               s_churn   Karras et al. 2022, algorithm 1
    heunpp2              2      3               no        Heun's rule with three slopes (ComfyUI)
    restart              2      2               yes       Xu et al. 2023, on levels of its own
    dpm2                 2      2               s_churn   Karras et al. 2022, eq. 3 with the geometric midpoint
    dpm2_a               1      2               yes       the same, ancestral
    dpmpp_2s_a           1      2               yes       Lu et al. 2022, algorithm 1, ancestral
    dpmpp_sde            1      2               yes       Lu et al. 2022, algorithm 1 on the SDE, r = 1/2
    seeds_2              1      2               yes       Gonzalez et al. 2023

In sigma space Euler is variance-preserving DDIM with eta 0, and ancestral Euler is DDIM with eta 1, which is DDPM:
three names, one table. The last level is sigma = 0 for all of them: the final picture is x0_hat. (DDIM with
`set_alpha_to_one=False` stops at the first training level instead and leaves 3 % noise in the latent.) The last step
of a sampler with more calls is an Euler step with one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from sdjax.diffusion import tables
from sdjax.diffusion.names import TRAITS, Traits
from sdjax.diffusion.rows import Rows, padded, rows_at
from sdjax.diffusion.schedule import NoiseSchedule
from sdjax.types import NoiseLevel


@dataclass(frozen=True, kw_only=True)
class Sampler(Traits):
    """What `SAMPLERS` lists: a sampler's traits and its table.

    table: sigma float64[s + 1], falling, the last may be 0, and options -> rows of float64 without timesteps; samplers
        with more calls per step have more rows than there are steps.
    """

    table: Callable[..., Rows]

    def rows(
        self,
        schedule: NoiseSchedule,
        sigma: np.ndarray,
        length: int | None = None,
        *,
        s_noise: float = 1.0,
        **options: Any,
    ) -> Rows:
        """The table for the levels `sigma`, with the timestep of every network call filled in.

        length: rows in all; those behind the sampler's own leave x as it is.
        s_noise: what all noise added on the way is multiplied by (Karras et al. 2022, algorithm 2).
        options: of its table, by name.
        """
        if self.of_schedule:
            options = {"sigmas": schedule.sigmas, **options}
        rows = self.table(sigma, **options) if len(sigma) > 1 else rows_at(sigma)
        visited = rows.levels.sigma
        rows = rows._replace(noise=s_noise * rows.noise, levels=NoiseLevel(visited, schedule.timesteps(visited)))
        return rows if length is None else padded(rows, length, NoiseLevel(schedule.sigmas[0], 0.0))


_EULER_A = partial(tables.euler_table, eta=1.0)

TABLES: Mapping[str, Callable[..., Rows]] = {
    "ddpm": _EULER_A,
    "ddim": tables.euler_table,
    "plms": tables.plms_table,
    "euler": tables.euler_table,
    "euler_a": _EULER_A,
    "heun": tables.heun_table,
    "dpm2": tables.dpm2_table,
    "dpm2_a": partial(tables.dpm2_table, eta=1.0),
    "lms": tables.lms_table,
    "dpmpp_2m": tables.dpmpp_2m_table,
    "dpmpp_2m_sde": tables.dpmpp_2m_sde_table,
    "dpmpp_2m_sde_heun": partial(tables.dpmpp_2m_sde_table, heun=True),
    "dpmpp_3m_sde": tables.dpmpp_3m_sde_table,
    "dpmpp_2s_a": tables.dpmpp_2s_table,
    "dpmpp_sde": tables.dpmpp_sde_table,
    "unipc": tables.unipc_table,
    "lcm": tables.lcm_table,
    "tcd": tables.tcd_table,
    "restart": tables.restart_table,
    "deis": tables.deis_table,
    "ipndm": tables.ipndm_table,
    "ipndm_v": tables.ipndm_v_table,
    "res_multistep": tables.res_multistep_table,
    "res_multistep_a": partial(tables.res_multistep_table, eta=1.0),
    "gradient_estimation": tables.gradient_estimation_table,
    "er_sde": tables.er_sde_table,
    "sa_solver": tables.sa_solver_table,
    "seeds_2": tables.seeds_2_table,
    "heunpp2": tables.heunpp2_table,
    "euler_cfg_pp": tables.euler_table,
    "euler_a_cfg_pp": _EULER_A,
}
"""The tables, by the sampler's name."""

SAMPLERS: Mapping[str, Sampler] = {name: Sampler(**vars(traits), table=TABLES[name]) for name, traits in TRAITS.items()}


def ddim(eta: float = 0.0) -> Sampler:
    """DDIM with the given eta in [0, 1]: 0 deterministic, 1 DDPM (Song et al. 2021, eq. 16).

    Raises:
        ValueError: eta is not in [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1], found {eta!r}")
    return replace(SAMPLERS["ddim"], table=partial(tables.euler_table, eta=eta), stochastic=eta > 0)
