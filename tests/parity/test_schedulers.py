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
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sdjax.config import ScheduleConfig
from sdjax.diffusion.denoiser import to_denoiser
from sdjax.diffusion.samplers import SAMPLERS, ddim
from sdjax.diffusion.schedule import noise_schedule
from sdjax.types import Level

COMMON = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
SCHEDULE = noise_schedule(ScheduleConfig())
SHAPE = (2, 4, 4, 3)
STEPS = (10, 25, 50)


def network(x, t, xp):
    """A smooth stand-in for a UNet: bounded, nonlinear in x, dependent on t and on neighbouring
    channels.
    """
    mixed = 0.8 * x + 0.3 * xp.roll(x, 1, -1)
    return xp.tanh(mixed) * (0.9 + 0.1 * xp.cos(t / 300)) + 0.1 * xp.sin(3 * x + t / 500)


def torch_network(x, t):
    return network(x, torch.as_tensor(float(t)), torch)


def jax_predict(x, level):
    return network(x, level.t, jnp)


def noise(index):
    return np.random.default_rng(1000 + index).standard_normal(SHAPE).astype(np.float32)


def run_diffusers(scheduler, x, monkeypatch):
    """x at the scheduler's own scale -> the last sample; the k-th noise it asks for is noise(k)."""
    module = sys.modules[type(scheduler).__module__]
    drawn = iter(range(10_000))
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: torch.tensor(noise(next(drawn))))
    x = torch.tensor(x)
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        x = scheduler.step(torch_network(scaled, t), t, x).prev_sample
    return x.numpy()


def run_sdjax(sampler, rows, x, prediction="epsilon", draws=lambda index, k: noise(index)):
    denoise = to_denoiser(jax_predict, prediction)
    method = sampler.method

    @jax.jit
    def step(carry, row, eps):
        return method.step(denoise, carry, row, eps)

    carry = method.init(jnp.asarray(x))
    for i in range(len(rows.levels.sigma)):
        row = jax.tree.map(lambda leaf, i=i: jnp.asarray(leaf[i]), rows)
        carry = step(carry, row, tuple(jnp.asarray(draws(i, k)) for k in range(method.draws)))
    return np.asarray(carry.x)


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def unique(values):
    """The values without immediate repeats (second-order schedulers list each level twice)."""
    values = np.asarray(values, np.float64)
    return values[np.append(True, np.diff(values) != 0)]


X_T = noise(-1)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("name", ["ddim", "ddim_eta", "ddim_v", "ddpm", "plms"])
def test_variance_preserving_samplers_agree_with_diffusers(name, spacing, steps, monkeypatch):
    prediction = "v_prediction" if name == "ddim_v" else "epsilon"
    offset = 1 if spacing == "leading" else 0
    common = COMMON | dict(timestep_spacing=spacing, steps_offset=offset, prediction_type=prediction)
    if name == "ddpm":
        scheduler = diffusers.DDPMScheduler(**common, clip_sample=False)
    elif name == "plms":
        scheduler = diffusers.PNDMScheduler(**common, skip_prk_steps=True, set_alpha_to_one=True)
    else:
        scheduler = diffusers.DDIMScheduler(**common, clip_sample=False, set_alpha_to_one=True)
    if name == "ddim_eta":
        original = scheduler.step
        scheduler.step = lambda *args: original(*args, eta=0.6)
    scheduler.set_timesteps(steps)
    expected = run_diffusers(scheduler, X_T, monkeypatch)

    t = unique(scheduler.timesteps)
    sigma = np.append(SCHEDULE.sigmas[t.astype(int)], 0.0)
    sampler = ddim(0.6) if name == "ddim_eta" else SAMPLERS[name.removesuffix("_v")]
    rows = sampler.rows(SCHEDULE, sigma)
    ours = run_sdjax(
        sampler,
        rows,
        X_T * np.float32(np.sqrt(1 + sigma[0] ** 2)),
        prediction[0].replace("e", "epsilon"),
    )
    assert relative(ours, expected) < 1e-4


SIGMA_SCHEDULERS = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", dict(algorithm_type="dpmsolver++")),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", dict(algorithm_type="sde-dpmsolver++")),
    "unipc": ("UniPCMultistepScheduler", dict(solver_type="bh2")),
}
VARIANCE_PRESERVING = ("dpmpp_2m", "dpmpp_2m_sde", "unipc")  # diffusers holds x_t, not x, in these


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing", "karras", "exponential"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SIGMA_SCHEDULERS)
def test_sigma_space_samplers_agree_with_diffusers(name, prediction, spacing, steps, monkeypatch):
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
    start = np.float32(np.sqrt(1 + sigma[0] ** 2))
    if name in VARIANCE_PRESERVING:
        expected = run_diffusers(scheduler, X_T, monkeypatch)
    else:
        expected = run_diffusers(scheduler, X_T * start, monkeypatch)

    rows = SAMPLERS[name].rows(SCHEDULE, sigma)
    if name in VARIANCE_PRESERVING:
        t = np.asarray(scheduler.timesteps, np.float64)[:, None]
        assert np.abs(rows.levels.t - t).max() <= 1 + 1e-3  # whole numbers there
        rows = rows._replace(levels=Level(rows.levels.sigma, t))
    ours = run_sdjax(SAMPLERS[name], rows, X_T * start, "v" if prediction[0] == "v" else "epsilon")
    assert relative(ours, expected) < 1e-4


def test_dpmpp_sde_agrees_with_diffusers(monkeypatch):
    """The one scheduler that needs torchsde: its Brownian tree is replaced by our own increments."""
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
                return torch.tensor(noise(2 * index + 1))
            rho2 = (sigma - self.middle) / (sigma - sigma_next)
            eps_1, eps_0 = torch.tensor(noise(2 * index + 1)), torch.tensor(noise(2 * index))
            return rho2.sqrt() * eps_1 + (1 - rho2).sqrt() * eps_0

    monkeypatch.setattr(module, "BrownianTreeNoiseSampler", Increments)
    for steps in STEPS:
        scheduler = module.DPMSolverSDEScheduler(**COMMON, use_karras_sigmas=True, timestep_spacing="linspace")
        scheduler.set_timesteps(steps)
        sigma = unique(scheduler.sigmas)
        start = np.float32(np.sqrt(1 + sigma[0] ** 2))
        expected = run_diffusers(scheduler, X_T * start, monkeypatch)
        sampler = SAMPLERS["dpmpp_sde"]
        ours = run_sdjax(
            sampler,
            sampler.rows(SCHEDULE, sigma),
            X_T * start,
            draws=lambda index, k: noise(2 * index + k),
        )
        assert relative(ours, expected) < 1e-4


@pytest.mark.parametrize("steps", STEPS)
def test_lcm_agrees_with_diffusers(steps, monkeypatch):
    scheduler = diffusers.LCMScheduler(**COMMON, set_alpha_to_one=True, clip_sample=False)
    scheduler.set_timesteps(steps, original_inference_steps=50)
    expected = run_diffusers(scheduler, X_T, monkeypatch)
    sigma = np.append(SCHEDULE.sigmas[np.asarray(scheduler.timesteps)], 0.0)
    rows = SAMPLERS["lcm"].rows(SCHEDULE, sigma)
    ours = run_sdjax(SAMPLERS["lcm"], rows, X_T * np.float32(np.sqrt(1 + sigma[0] ** 2)))
    assert relative(ours, expected) < 1e-4


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
