"""The forward process and its levels, against published values and the closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.config import ScheduleConfig
from sdjax.diffusion.schedule import noise_schedule, per_image, q_sample, q_step, start_step
from sdjax.diffusion.spacings import SPACINGS

SCHEDULE = noise_schedule(ScheduleConfig())
ZERO_SNR = noise_schedule(ScheduleConfig(zero_terminal_snr=True))


def test_values_are_the_published_ones():
    assert SCHEDULE.betas.dtype == np.float64
    np.testing.assert_allclose(SCHEDULE.betas[[0, 999]], [0.00085, 0.012], rtol=1e-12)
    np.testing.assert_allclose(SCHEDULE.alpha_bars[[0, 999]], [0.99915, 0.004660098513077238], rtol=1e-12)
    np.testing.assert_allclose(SCHEDULE.sigmas[[0, 999]], [0.02917, 14.6146], rtol=2e-4)


def test_the_linear_curve_is_that_of_ho_et_al():
    schedule = noise_schedule(ScheduleConfig(curve="linear", beta_start=1e-4, beta_end=0.02))
    np.testing.assert_allclose(schedule.betas, 1e-4 + np.arange(1000) * (0.02 - 1e-4) / 999, rtol=1e-12)
    np.testing.assert_allclose(schedule.alpha_bars[999], 4.0358e-5, rtol=1e-4)  # "almost no signal", section 4


def test_sigma_and_alpha_bar_are_two_views_of_one_level():
    np.testing.assert_allclose(1 / (1 + SCHEDULE.sigmas**2), SCHEDULE.alpha_bars, rtol=1e-12)


def test_both_draws_are_a_mean_and_a_deviation():
    x0, noise, t = jnp.ones((2, 3)), jnp.full((2, 3), 0.5), np.array([0, 300])
    alpha_bar, beta = SCHEDULE.alpha_bars[t], SCHEDULE.betas[t]
    found, one = q_sample(SCHEDULE, x0, t, noise), q_step(SCHEDULE, x0, t, noise)
    np.testing.assert_allclose(found[:, 0], np.sqrt(alpha_bar) + 0.5 * np.sqrt(1 - alpha_bar), rtol=1e-6)
    np.testing.assert_allclose(one[:, 0], np.sqrt(1 - beta) + 0.5 * np.sqrt(beta), rtol=1e-6)
    np.testing.assert_allclose(one[0], found[0], rtol=1e-6)  # the first step is both


@pytest.mark.parametrize("schedule", [SCHEDULE, ZERO_SNR], ids=["usual", "zero terminal SNR"])
@pytest.mark.parametrize("start", [-1, 400, 979])
def test_single_steps_compose_to_the_closed_form(schedule, start):
    """Twenty times q(x_t | x_{t-1}) behind q(x_s | x_0) is q(x_t | x_0).

    All of it is linear: row 0 is the response to x_0 = 1, every other row to one unit noise.
    """
    with jax.enable_x64(True):
        unit = jnp.eye(22)
        x = unit[0] if start < 0 else q_sample(schedule, unit[:1], jnp.array([start]), unit[1:2])[0]
        for k in range(20):
            x = q_step(schedule, x[None], jnp.array([start + 1 + k]), unit[2 + k][None])[0]
        x = np.asarray(x)
    alpha_bar = schedule.alpha_bars[start + 20]
    np.testing.assert_allclose(x[0], np.sqrt(alpha_bar), rtol=1e-9)
    np.testing.assert_allclose(np.sum(x[1:] ** 2), 1 - alpha_bar, rtol=1e-9)


def test_q_sample_of_real_noise_has_the_right_moments():
    noise = jax.random.normal(jax.random.key(0), (1, 200_000))
    x = q_sample(SCHEDULE, jnp.full((1, 200_000), 2.0), jnp.array([500]), noise)
    alpha_bar = SCHEDULE.alpha_bars[500]
    np.testing.assert_allclose(x.mean(), 2 * np.sqrt(alpha_bar), atol=0.01)
    np.testing.assert_allclose(x.std(), np.sqrt(1 - alpha_bar), rtol=0.01)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 25, 1000])
def test_levels_fall_to_zero(spacing, steps):
    """But for what other programs do by these names."""
    sigma = SCHEDULE.levels(steps, spacing)
    assert sigma.shape == (steps + 1,) or (spacing, steps) == ("beta", 1000)  # levels that fall together are dropped
    assert sigma[-1] == (SCHEDULE.sigmas[0] if spacing == "kl_optimal_a1111" else 0)
    assert (np.diff(sigma) < 0).all()
    assert sigma[0] <= SCHEDULE.sigmas[-1] * (1 + 1e-4 * spacing.startswith("ays") + 1e-12)  # a table of five digits


def test_karras_and_exponential_span_the_schedule_evenly_in_their_own_measure():
    for spacing, measure in (("karras", lambda sigma: sigma ** (1 / 7)), ("exponential", np.log)):
        sigma = SCHEDULE.levels(9, spacing)[:-1]
        np.testing.assert_allclose(sigma[[0, -1]], SCHEDULE.sigmas[[-1, 0]], rtol=1e-12)
        np.testing.assert_allclose(np.diff(measure(sigma), 2), 0, atol=1e-12)


def test_zero_terminal_snr_keeps_the_first_level_and_empties_the_last():
    """The shape is rescaled, not cut: sqrt(alpha_bar) is an affine function of the usual one (Lin et al. 2024)."""
    np.testing.assert_allclose(ZERO_SNR.alpha_bars[0], SCHEDULE.alpha_bars[0], rtol=1e-12)
    assert ZERO_SNR.sigmas[-1] == pytest.approx(4096, rel=1e-6)  # no signal to speak of, but finite
    assert (np.diff(ZERO_SNR.alpha_bars) < 0).all()
    usual, ours = np.sqrt(SCHEDULE.alpha_bars), np.sqrt(ZERO_SNR.alpha_bars)
    slope = np.diff(ours[:-1]) / np.diff(usual[:-1])
    np.testing.assert_allclose(slope, usual[0] / (usual[0] - usual[-1]), rtol=1e-8)
    np.testing.assert_allclose(np.cumprod(1 - ZERO_SNR.betas), ZERO_SNR.alpha_bars, rtol=1e-9)


def test_timesteps_invert_sigmas():
    np.testing.assert_allclose(SCHEDULE.timesteps(SCHEDULE.sigmas), np.arange(1000), atol=1e-9)
    between = np.sqrt(SCHEDULE.sigmas[500] * SCHEDULE.sigmas[501])  # half way in log sigma
    np.testing.assert_allclose(SCHEDULE.timesteps(between), 500.5, atol=1e-9)


def test_trailing_starts_at_the_last_timestep_and_leading_does_not():
    assert SCHEDULE.levels(10, "trailing")[0] == SCHEDULE.sigmas[-1]
    assert SCHEDULE.levels(10, "leading")[0] == SCHEDULE.sigmas[901]
    np.testing.assert_array_equal(SCHEDULE.levels(1000, "leading"), SCHEDULE.levels(1000, "trailing"))


@pytest.mark.parametrize(("steps", "spacing"), [(0, "karras"), (1001, "karras"), (2.5, "karras"), (10, "other")])
def test_wrong_steps_and_spacings_are_refused(steps, spacing):
    with pytest.raises(ValueError, match=r"steps must be|unknown spacing"):
        SCHEDULE.levels(steps, spacing)


def test_strength_says_how_many_steps_are_left():
    assert [start_step(10, strength) for strength in (0, 0.05, 0.75, 1)] == [10, 10, 3, 0]
    with pytest.raises(ValueError, match="strength"):
        start_step(10, 1.1)
    with pytest.raises(ValueError, match="strength"):
        start_step(10, float("nan"))


def test_values_per_image_multiply_whole_images():
    x = jnp.ones((2, 3, 3, 4))
    np.testing.assert_array_equal((per_image(jnp.array([1.0, 2.0]), x) * x)[:, 2, 2, 3], [1, 2])
    assert per_image(2.0, x).shape == ()
