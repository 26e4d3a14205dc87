"""The forward process and its levels, against published values and the closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.config import ScheduleConfig
from sdjax.diffusion.schedule import SPACINGS, noise_schedule, q_sample, q_step, start_step

SCHEDULE = noise_schedule(ScheduleConfig())


def test_values_are_the_published_ones():
    assert SCHEDULE.betas.dtype == np.float64
    np.testing.assert_allclose(SCHEDULE.betas[[0, 999]], [0.00085, 0.012], rtol=1e-12)
    np.testing.assert_allclose(SCHEDULE.alpha_bars[[0, 999]], [0.99915, 0.004660098513077238], rtol=1e-12)
    np.testing.assert_allclose(SCHEDULE.sigmas[[0, 999]], [0.02917, 14.6146], rtol=2e-4)


def test_sigma_and_alpha_bar_are_two_views_of_one_level():
    np.testing.assert_allclose(1 / (1 + SCHEDULE.sigmas**2), SCHEDULE.alpha_bars, rtol=1e-12)


def test_steps_compose_to_the_closed_form():
    """q(x_t | x_{t-1}) applied from 0 to t has the mean and variance of q(x_t | x_0)."""
    t = 300
    mean, variance = 1.0, 0.0
    for i in range(t + 1):
        mean, variance = mean * np.sqrt(1 - SCHEDULE.betas[i]), variance * (1 - SCHEDULE.betas[i]) + SCHEDULE.betas[i]
    np.testing.assert_allclose(mean**2, SCHEDULE.alpha_bars[t], rtol=1e-9)
    np.testing.assert_allclose(variance, 1 - SCHEDULE.alpha_bars[t], rtol=1e-9)
    x0, noise = jnp.ones((2, 3)), jnp.full((2, 3), 0.5)
    ts = jnp.array([0, t])
    found = q_sample(SCHEDULE, x0, ts, noise)
    alpha_bar = SCHEDULE.alpha_bars[[0, t]]
    np.testing.assert_allclose(found[:, 0], np.sqrt(alpha_bar) + 0.5 * np.sqrt(1 - alpha_bar), rtol=1e-6)
    one = q_step(SCHEDULE, x0, ts, noise)
    beta = SCHEDULE.betas[[0, t]]
    np.testing.assert_allclose(one[:, 0], np.sqrt(1 - beta) + 0.5 * np.sqrt(beta), rtol=1e-6)
    np.testing.assert_allclose(one[0], found[0], rtol=1e-6)  # the first step is both


def test_q_sample_of_real_noise_has_the_right_moments():
    noise = jax.random.normal(jax.random.key(0), (1, 200_000))
    x = q_sample(SCHEDULE, jnp.full((1, 200_000), 2.0), jnp.array([500]), noise)
    alpha_bar = SCHEDULE.alpha_bars[500]
    np.testing.assert_allclose(x.mean(), 2 * np.sqrt(alpha_bar), atol=0.01)
    np.testing.assert_allclose(x.std(), np.sqrt(1 - alpha_bar), rtol=0.01)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 25, 1000])
def test_levels_fall_to_zero(spacing, steps):
    sigma = SCHEDULE.levels(steps, spacing)
    assert sigma.shape == (steps + 1,)
    assert sigma[-1] == 0
    assert (np.diff(sigma) < 0).all() or spacing == "leading"
    assert sigma[0] <= SCHEDULE.sigmas[-1] * (1 + 1e-12)


def test_timesteps_invert_sigmas():
    np.testing.assert_allclose(SCHEDULE.timesteps(SCHEDULE.sigmas), np.arange(1000), atol=1e-9)


def test_trailing_starts_at_the_last_timestep_and_leading_does_not():
    assert SCHEDULE.levels(10, "trailing")[0] == SCHEDULE.sigmas[-1]
    assert SCHEDULE.levels(10, "leading")[0] == SCHEDULE.sigmas[901]


@pytest.mark.parametrize(("steps", "spacing"), [(0, "karras"), (1001, "karras"), (2.5, "karras"), (10, "other")])
def test_wrong_steps_and_spacings_are_refused(steps, spacing):
    with pytest.raises(ValueError, match=r"steps must be|unknown spacing"):
        SCHEDULE.levels(steps, spacing)


def test_strength_says_how_many_steps_are_left():
    assert [start_step(10, strength) for strength in (0, 0.05, 0.75, 1)] == [10, 10, 3, 0]
    with pytest.raises(ValueError, match="strength"):
        start_step(10, 1.1)
