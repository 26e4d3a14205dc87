"""Every sampler against diffusers' scheduler of the same name: same noise and network, whole loops.

The network is a fixed smooth function of the scaled input and t, so that any difference in levels,
timesteps or coefficients shows. Both sides walk the sigmas that the scheduler chose; that our own
spacings choose the same ones is a test of its own below. Where diffusers differs from us, both are
brought to one convention:

- DDIM, PNDM, last level: the first training level, unless set_alpha_to_one=True. Ours is sigma = 0;
  the tests set that option.
- DDIM, DDPM, PNDM with linspace (DDIM if T is no multiple of the steps): they step from t
  to t - T // steps, not to the next timestep of their list. That is wrong there, so these three are
  compared on leading and trailing.
- linspace: DPMSolver and UniPC take steps + 1 points and leave out the last. Ours is Euler's, LMS's
  and Heun's: evenly from T - 1 to 0.
- Karras and exponential: diffusers spans the timestep spacing in use, we span the whole schedule;
  the same for timestep_spacing="linspace". DPMSolver and UniPC round the timesteps or cut them to
  whole numbers; ours are fractional, as in k-diffusion. The tests take diffusers' timesteps.
- DPMSolverSDE draws from a Brownian tree over sigma, ours are increments of the same Brownian motion
  from the image's key; the test feeds diffusers our increments.
- LCM's c_skip and c_out: ours are 0 and 1, which differs by 1e-4 at the most for t >= 5.
"""

import sys
import types

import diffusers
import numpy as np
import pytest
import torch

from sdjax.config import ScheduleConfig
from sdjax.diffusion.samplers import SAMPLERS, ddim
from sdjax.diffusion.schedule import noise_schedule
from sdjax.selftest import noise, relative_error, run_toy, toy_network
from sdjax.types import NoiseLevel

COMMON = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
SCHEDULE = noise_schedule(ScheduleConfig())
STEPS = (10, 25, 50)
X_T = noise(-1)


def run_diffusers(scheduler, x, monkeypatch):
    """x at the scheduler's own scale -> the last sample; the k-th noise it asks for is noise(k)."""
    module = sys.modules[type(scheduler).__module__]
    drawn = iter(range(10_000))
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: torch.tensor(noise(next(drawn))))
    x = torch.tensor(x)
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        x = scheduler.step(toy_network(scaled, torch.as_tensor(float(t)), torch), t, x).prev_sample
    return x.numpy()


def unique(values):
    """The values without immediate repeats (second-order schedulers list each level twice)."""
    values = np.asarray(values, np.float64)
    return values[np.append(True, np.diff(values) != 0)]


def prior(sigma):
    """X_T as a start in sigma space."""
    return X_T * np.float32(np.sqrt(1 + sigma[0] ** 2))


def variance_preserving_reference(name, spacing, steps, monkeypatch, prediction="epsilon", eta=0.0):
    """diffusers' DDIM, DDPM or PNDM: (sigmas, its result)."""
    offset = 1 if spacing == "leading" else 0
    common = COMMON | dict(timestep_spacing=spacing, steps_offset=offset, prediction_type=prediction)
    if name == "ddpm":
        scheduler = diffusers.DDPMScheduler(**common, clip_sample=False)
    elif name == "plms":
        scheduler = diffusers.PNDMScheduler(**common, skip_prk_steps=True, set_alpha_to_one=True)
    else:
        scheduler = diffusers.DDIMScheduler(**common, clip_sample=False, set_alpha_to_one=True)
        original = scheduler.step
        scheduler.step = lambda *args: original(*args, eta=eta)
    scheduler.set_timesteps(steps)
    expected = run_diffusers(scheduler, X_T, monkeypatch)
    sigma = np.append(SCHEDULE.sigmas[unique(scheduler.timesteps).astype(int)], 0.0)
    return sigma, expected


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("name", ["ddim", "ddim_eta", "ddim_v", "ddpm", "plms"])
def test_variance_preserving_samplers_agree_with_diffusers(name, spacing, steps, monkeypatch):
    base = name.split("_")[0]
    prediction = "v_prediction" if name == "ddim_v" else "epsilon"
    eta = 0.6 if name == "ddim_eta" else 0.0
    sigma, expected = variance_preserving_reference(base, spacing, steps, monkeypatch, prediction, eta)
    rows = (ddim(eta) if eta else SAMPLERS[base]).rows(SCHEDULE, sigma)
    ours = run_toy(rows, prior(sigma), prediction[0].replace("e", "epsilon"))
    assert relative_error(ours, expected) < 1e-4


SIGMA_SCHEDULERS = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", dict(algorithm_type="dpmsolver++")),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", dict(algorithm_type="sde-dpmsolver++")),
    "dpmpp_2m_sde_heun": (
        "DPMSolverMultistepScheduler",
        dict(algorithm_type="sde-dpmsolver++", solver_type="heun"),
    ),
    "unipc": ("UniPCMultistepScheduler", dict(solver_type="bh2")),
}
VARIANCE_PRESERVING = ("dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "unipc")  # diffusers holds x_t, not x, in these


def sigma_reference(name, spacing, steps, monkeypatch, prediction="epsilon"):
    """A scheduler of `SIGMA_SCHEDULERS`: (our rows on its sigmas, its result)."""
    kind, extra = SIGMA_SCHEDULERS[name]
    options = COMMON | extra | dict(prediction_type=prediction)
    if spacing in ("karras", "exponential"):
        if name == "euler_a":
            spacing_options = dict(timestep_spacing="linspace")  # it has neither
        else:
            spacing_options = {f"use_{spacing}_sigmas": True, "timestep_spacing": "linspace"}
    else:
        spacing_options = dict(timestep_spacing=spacing, steps_offset=int(spacing == "leading"))
    scheduler = getattr(diffusers, kind)(**options, **spacing_options)
    scheduler.set_timesteps(steps)
    sigma = unique(scheduler.sigmas)
    rows = SAMPLERS[name].rows(SCHEDULE, sigma)
    if name in VARIANCE_PRESERVING:
        t = np.asarray(scheduler.timesteps, np.float64)
        assert np.abs(rows.levels.t - t).max() <= 1 + 1e-3  # whole numbers there
        return sigma, rows._replace(levels=NoiseLevel(rows.levels.sigma, t)), run_diffusers(scheduler, X_T, monkeypatch)
    return sigma, rows, run_diffusers(scheduler, prior(sigma), monkeypatch)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing", "karras", "exponential"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SIGMA_SCHEDULERS)
def test_sigma_space_samplers_agree_with_diffusers(name, prediction, spacing, steps, monkeypatch):
    sigma, rows, expected = sigma_reference(name, spacing, steps, monkeypatch, prediction)
    ours = run_toy(rows, prior(sigma), "v" if prediction[0] == "v" else "epsilon")
    assert relative_error(ours, expected) < 1e-4


def dpmpp_sde_reference(steps, monkeypatch):
    """The one scheduler that needs torchsde; its Brownian tree is replaced by our own increments: (sigmas, result)."""
    monkeypatch.setitem(sys.modules, "torchsde", types.ModuleType("torchsde"))
    from diffusers.schedulers import scheduling_dpmsolver_sde as module

    class Increments:
        """Brownian motion over sigma: eps_1 moves sigma to s, eps_0 moves s to sigma'."""

        def __init__(self, *args, **kwargs):
            self.calls = 0

        def __call__(self, sigma, sigma_next):
            index, part = divmod(self.calls, 2)
            self.calls += 1
            if part == 0:
                self.middle = sigma_next
                return torch.tensor(noise(2 * index))
            rho2 = (sigma - self.middle) / (sigma - sigma_next)
            eps_1, eps_0 = torch.tensor(noise(2 * index)), torch.tensor(noise(2 * index + 1))
            return rho2.sqrt() * eps_1 + (1 - rho2).sqrt() * eps_0

    monkeypatch.setattr(module, "BrownianTreeNoiseSampler", Increments)
    scheduler = module.DPMSolverSDEScheduler(**COMMON, use_karras_sigmas=True, timestep_spacing="linspace")
    scheduler.set_timesteps(steps)
    sigma = unique(scheduler.sigmas)
    return sigma, run_diffusers(scheduler, prior(sigma), monkeypatch)


@pytest.mark.parametrize("steps", STEPS)
def test_dpmpp_sde_agrees_with_diffusers(steps, monkeypatch):
    sigma, expected = dpmpp_sde_reference(steps, monkeypatch)
    rows = SAMPLERS["dpmpp_sde"].rows(SCHEDULE, sigma)
    ours = run_toy(rows, prior(sigma))
    assert relative_error(ours, expected) < 1e-4


def lcm_reference(steps, monkeypatch):
    """(sigmas, diffusers' result)."""
    scheduler = diffusers.LCMScheduler(**COMMON, set_alpha_to_one=True, clip_sample=False)
    scheduler.set_timesteps(steps, original_inference_steps=50)
    expected = run_diffusers(scheduler, X_T, monkeypatch)
    return np.append(SCHEDULE.sigmas[np.asarray(scheduler.timesteps)], 0.0), expected


@pytest.mark.parametrize("steps", STEPS)
def test_lcm_agrees_with_diffusers(steps, monkeypatch):
    sigma, expected = lcm_reference(steps, monkeypatch)
    ours = run_toy(SAMPLERS["lcm"].rows(SCHEDULE, sigma), prior(sigma))
    assert relative_error(ours, expected) < 1e-4


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing", "karras", "exponential"])
def test_spacings_choose_the_levels_of_diffusers(spacing, steps):
    if spacing in ("karras", "exponential"):
        options = {f"use_{spacing}_sigmas": True, "timestep_spacing": "linspace"}
    else:
        options = dict(timestep_spacing=spacing, steps_offset=int(spacing == "leading"))
    scheduler = diffusers.EulerDiscreteScheduler(**COMMON, **options)
    scheduler.set_timesteps(steps)
    sigma = SCHEDULE.levels(steps, spacing)
    np.testing.assert_allclose(sigma, scheduler.sigmas.numpy(), rtol=2e-5)
    t = SCHEDULE.timesteps(sigma[:-1])
    np.testing.assert_allclose(t, scheduler.timesteps.numpy(), atol=0.06)


def test_zero_terminal_snr_rescale_agrees_with_diffusers():
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    config = ScheduleConfig(zero_terminal_snr=True)
    betas = rescale_zero_terminal_snr(torch.tensor(SCHEDULE.betas))
    expected = torch.cumprod(1 - betas, 0).numpy()
    ours = noise_schedule(config).alpha_bars
    np.testing.assert_allclose(ours[:-1], expected[:-1], rtol=1e-9)
    assert expected[-1] == 0
    assert 0 < ours[-1] < 1e-7
