"""Sigma lists and whole loops of other programs, run in float64 by these programs themselves.

tests/data/golden/spacings_samplers.json: k-diffusion, ComfyUI, A1111 and diffusers on a toy denoiser of two Gaussians,
with every call of the network listed. SDJAX_GOLDEN names another folder of such files.
"""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from sdjax.config import ScheduleConfig
from sdjax.diffusion.plan import make_plan
from sdjax.diffusion.rows import HISTORY
from sdjax.diffusion.samplers import SAMPLERS
from sdjax.diffusion.schedule import noise_schedule

FOLDER = Path(os.environ.get("SDJAX_GOLDEN") or Path(__file__).parent / "data" / "golden")
FILE = FOLDER / "spacings_samplers.json"
GOLDEN = json.loads((FILE if FILE.is_file() else Path(__file__).parent / "data" / "golden" / FILE.name).read_bytes())
SCHEDULE = noise_schedule(ScheduleConfig())

SPACINGS = {
    "ddim_uniform_comfy": "ddim_uniform",
    "beta_comfy": "beta",
    "kl_optimal_comfy": "kl_optimal",
    "ays_sd1_comfy": "ays",
    "ays_sd1_a1111": "ays_a1111",
    "ays_sdxl_comfy": "ays_sdxl",
}
"""Names in the file that are not ours."""

TIMESTEPS = {"lcm_50": "lcm", "tcd (default, grid of 50)": "lcm", "trailing": "trailing"}

LOOPS = {
    "dpmpp_2s_a (k-diffusion)": ("dpmpp_2s_a", {}),
    "dpmpp_2s (eta 0)": ("dpmpp_2s_a", {"eta": 0.0}),
    "dpmpp_3m_sde (k-diffusion)": ("dpmpp_3m_sde", {}),
    "dpmpp_3m_sde (eta 0)": ("dpmpp_3m_sde", {"eta": 0.0}),
    "deis_tab3 (ComfyUI)": ("deis", {}),
    "res_multistep_ancestral": ("res_multistep_a", {}),
    "gradient_estimation (gamma 2)": ("gradient_estimation", {}),
    "er_sde (3 stages)": ("er_sde", {}),
    "sa_solver (3,4, tau 1 on percent 0.2..0.8)": ("sa_solver", {}),
    "sa_solver (3,4, tau 0)": ("sa_solver", {"eta": 0.0}),
    "ddpm (ComfyUI)": ("ddpm", {}),
    "tcd (eta 0.3)": ("tcd", {}),
}
"""Names in the file that are not ours; those with a guidance are read from their name."""

TWO_OUTPUTS = ("dpmpp_2m_cfg_pp", "dpmpp_2s_ancestral_cfg_pp", "res_multistep_cfg_pp")
"""Multistep rules that need the guided and the unguided output apart, which is no table of rows."""

USUAL = dict(steps=6, spacing="karras", eta=None, strength=1.0, guidance=1.0)
USUAL |= dict(guidance_rescale=0.0, guidance_interval=(0.0, 1.0))
"""The settings of a plan in the tests below."""

TOLERANCES = {"deis": 1e-4, "er_sde": 1e-6}
"""DEIS in ComfyUI sums ten thousand points where ours is the integral; ER-SDE's sums differ in their order."""


def denoise(x, sigma, shift=0.0):
    """Half N(-1, 0.25) + half N(1, 0.25), moved by `shift`."""
    x = x - shift
    return shift + (0.25 * x + sigma**2 * np.tanh(x / (0.25 + sigma**2))) / (0.25 + sigma**2)


def run(rows, x, noises, guidance=None):
    """The rule of `sdjax.diffusion.rows.step` in numpy float64. guidance: of every row; None: without."""
    history, previous = [np.zeros_like(x)] * HISTORY, np.zeros_like(x)
    drawn = iter(noises)
    for i in range(len(rows.scale)):
        sigma = rows.levels.sigma[i]
        x0_hat = denoise(x, sigma)
        if guidance is not None:
            negative, positive = denoise(x, sigma, -0.2), denoise(x, sigma, 0.3)
            x0_hat = negative + guidance[i] * (positive - negative)
        history = [rows.direction[i] @ [x, x0_hat], *history[:-1]]
        x = rows.correct[i] @ [x, previous] + rows.correct_history[i] @ history
        previous = x
        x = rows.scale[i] * x + rows.history[i] @ history
        if rows.noise[i] != 0:
            x = x + rows.noise[i] * np.array(next(drawn))
    return x


def levels_of(loop):
    """The levels of a loop in the file; one given in timesteps ends at timestep 0."""
    return np.array(loop["sigmas"]) if "sigmas" in loop else SCHEDULE.sigmas[np.array([*loop["timesteps"], 0])]


@pytest.mark.parametrize("name", sorted({name for lists in GOLDEN["spacings"].values() for name in lists}))
def test_levels_are_those_of_the_program_that_has_the_spacing(name):
    spacing, _, rho = SPACINGS.get(name, name).partition("_rho")
    for steps, lists in GOLDEN["spacings"].items():
        if name in lists:
            found = SCHEDULE.levels(int(steps), spacing, float(rho) if rho else None)
            np.testing.assert_allclose(found, lists[name], rtol=0, atol=1e-6, err_msg=f"{steps} steps")


@pytest.mark.parametrize("name", [name for name in GOLDEN["timesteps"] if name in TIMESTEPS])
def test_timesteps_are_those_of_the_program_that_has_the_spacing(name):
    for steps, expected in GOLDEN["timesteps"][name].items():
        sigma = SCHEDULE.levels(int(steps), TIMESTEPS[name])[:-1]
        np.testing.assert_allclose(SCHEDULE.timesteps(sigma), expected, atol=1e-6)


PUBLISHED = [
    pytest.param(group, name, loop, id=f"{group}-{name}")
    for group, loops in GOLDEN["samplers"].items()
    for name, loop in loops.items()
    if not name.startswith(TWO_OUTPUTS)
]


@pytest.mark.parametrize(("group", "name", "loop"), PUBLISHED)
def test_loops_come_to_the_result_of_the_program_that_has_the_sampler(group, name, loop):
    guided = re.fullmatch(r"(\w+) \(guidance ([\d.]+)\)", name)
    ours, options = ("restart", {}) if group == "restart" else LOOPS.get(name, (name, {}))
    if guided:
        ours = guided[1].replace("ancestral", "a")
    rows = SAMPLERS[ours].rows(SCHEDULE, levels_of(loop), **options)
    guidance = float(guided[2]) / rows.history[:, 0] if guided else None
    assert len(rows.scale) == len(loop["calls"])
    np.testing.assert_allclose(rows.levels.sigma, [call["sigma"] for call in loop["calls"]], rtol=1e-9)
    found = run(rows, np.array(loop["x_init"]), loop["noise_used"], guidance)
    np.testing.assert_allclose(found, loop["result"], rtol=0, atol=TOLERANCES.get(ours, 1e-9))


def test_cfg_pp_is_guidance_that_depends_on_the_row():
    """What the loops above are run with stands in the plan of a picture (Chung et al. 2024, algorithm 1)."""
    plan = make_plan(ScheduleConfig(), sampler="euler_cfg_pp", **USUAL | dict(guidance=0.8))
    sigma = SCHEDULE.levels(6, "karras")
    np.testing.assert_allclose(plan.rows.levels.guidance.scale[:6], 0.8 / (1 - sigma[1:] / sigma[:-1]), rtol=1e-12)
    assert plan.rows.levels.guidance.used[:6].all()


def euler_with_churn(sigma, x, noises, s_churn, s_noise, s_tmin, s_tmax):
    """Karras et al. 2022, algorithm 2 without its second order, as k-diffusion has it."""
    drawn = iter(noises)
    for i in range(len(sigma) - 1):
        gamma = min(s_churn / (len(sigma) - 1), 2**0.5 - 1) if s_tmin <= sigma[i] <= s_tmax else 0.0
        higher = sigma[i] * (gamma + 1)
        if gamma > 0:
            x = x + next(drawn) * s_noise * (higher**2 - sigma[i] ** 2) ** 0.5
        x = x + (x - denoise(x, higher)) / higher * (sigma[i + 1] - higher)
    return x


def heun_with_churn(sigma, x, noises, s_churn, s_noise, s_tmin, s_tmax, middle=lambda a, b: b):
    """The same with its second order (k-diffusion's sample_heun; with the geometric middle, sample_dpm_2)."""
    drawn = iter(noises)
    for i in range(len(sigma) - 1):
        gamma = min(s_churn / (len(sigma) - 1), 2**0.5 - 1) if s_tmin <= sigma[i] <= s_tmax else 0.0
        higher = sigma[i] * (gamma + 1)
        if gamma > 0:
            x = x + next(drawn) * s_noise * (higher**2 - sigma[i] ** 2) ** 0.5
        d = (x - denoise(x, higher)) / higher
        if sigma[i + 1] == 0:
            x = x + d * (sigma[i + 1] - higher)
            continue
        second = middle(higher, sigma[i + 1])
        y = x + d * (second - higher)
        d_y = (y - denoise(y, second)) / second
        x = x + (d_y if second != sigma[i + 1] else (d + d_y) / 2) * (sigma[i + 1] - higher)
    return x


REFERENCES = {
    "euler": euler_with_churn,
    "heun": heun_with_churn,
    "dpm2": lambda *given: heun_with_churn(*given, middle=lambda a, b: (a * b) ** 0.5),
}


@pytest.mark.parametrize(("s_churn", "s_tmin", "s_tmax"), [(0.0, 0.0, np.inf), (3.0, 0.0, np.inf), (40.0, 0.5, 5.0)])
@pytest.mark.parametrize("name", REFERENCES)
def test_churn_is_that_of_karras_et_al(name, s_churn, s_tmin, s_tmax):
    sigma = SCHEDULE.levels(8, "karras")
    churn = dict(s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax)
    rows = SAMPLERS[name].rows(SCHEDULE, sigma, s_noise=1.003, **churn)
    draw = np.random.default_rng(0)
    noises, x = draw.normal(size=(8, 4)), sigma[0] * draw.normal(size=4)
    expected = REFERENCES[name](sigma, x, noises, s_churn, 1.003, s_tmin, s_tmax)
    first = rows.levels.sigma[0]
    if first > sigma[0]:  # the noise before the first step belongs to where sampling starts
        x, noises = x + noises[0] * 1.003 * np.sqrt(first**2 - sigma[0] ** 2), noises[1:]
    assert (rows.noise != 0).any() == (s_churn > 0)
    np.testing.assert_allclose(run(rows, x, noises), expected, rtol=1e-9)


def test_noise_before_the_first_step_is_part_of_the_initial_noise():
    plain, churned, louder = (
        make_plan(ScheduleConfig(), s_churn=s_churn, s_noise=s_noise, sampler="heun", **USUAL)
        for s_churn, s_noise in ((0.0, 1.0), (2.0, 1.0), (2.0, 1.1))
    )
    assert churned.sigma == pytest.approx(plain.sigma * (1 + 2 / 6))
    assert churned.sigma == churned.rows.levels.sigma[0]
    added = churned.sigma**2 - plain.sigma**2
    assert louder.sigma == pytest.approx(np.sqrt(plain.sigma**2 + 1.1**2 * added))
