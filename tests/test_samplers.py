"""One conformance suite for every sampler. Adding a sampler is a row in `TRAITS`, in `TABLES` and in `ORDERS`.

Gaussian data N(0, S^2) has the denoiser D(x, sigma) = S^2 / (S^2 + sigma^2) x, and the exact flow keeps
x / sqrt(S^2 + sigma^2) constant. Every sampler is linear in its start and its noises here, so the variance of its
result follows from its response to each of them alone: no statistics are needed. All of it runs in float64.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.config import ScheduleConfig
from sdjax.diffusion.rows import first_carry, step
from sdjax.diffusion.samplers import SAMPLERS, ddim
from sdjax.diffusion.schedule import noise_schedule
from sdjax.diffusion.spacings import SPACINGS

SCHEDULE = noise_schedule(ScheduleConfig())
ZERO_SNR = noise_schedule(ScheduleConfig(zero_terminal_snr=True))
S = 0.7
TO_ZERO = [spacing for spacing in SPACINGS if spacing != "kl_optimal_a1111"]
"""As A1111 has it that one ends at the least sigma."""

ORDERS = {
    "ddpm": 1,
    "ddim": 1,
    "plms": 4,
    "euler": 1,
    "euler_a": 1,
    "heun": 2,
    "dpm2": 2,
    "dpm2_a": 1,
    "lms": 4,
    "dpmpp_2m": 2,
    "dpmpp_2m_sde": 2,
    "dpmpp_sde": 1,
    "unipc": 3,
    "lcm": None,  # exact for a consistency function, and for nothing else
    "tcd": None,
    "dpmpp_2m_sde_heun": 2,
    "dpmpp_3m_sde": 2,
    "dpmpp_2s_a": 1,
    "restart": None,  # below 20 steps it is heun
    "deis": 3,
    "ipndm": 1,  # its weights are those of even steps
    "ipndm_v": 2,
    "res_multistep": 2,
    "res_multistep_a": 1,
    "gradient_estimation": 1,
    "er_sde": 2,
    "sa_solver": 1,
    "seeds_2": 1,
    "heunpp2": 1,
    "euler_cfg_pp": 1,
    "euler_a_cfg_pp": 1,
}
DETERMINISTIC = [name for name, sampler in SAMPLERS.items() if not sampler.stochastic]
TWO_CALLS = ("heun", "dpm2", "dpm2_a", "dpmpp_sde", "dpmpp_2s_a", "seeds_2", "restart")
STOCHASTIC = [name for name, sampler in SAMPLERS.items() if sampler.stochastic and ORDERS[name]]


def gaussian(x, level):
    return S**2 / (S**2 + level.sigma**2) * x


def shifted_gaussian(x, level):
    return 2 + gaussian(x - 2, level)


def consistency(x, level):
    return S / jnp.sqrt(S**2 + level.sigma**2) * x


def constant(x, level):
    return jnp.full_like(x, 0.3)


def nothing(x, level):
    return jnp.zeros_like(x)


@partial(jax.jit, static_argnums=0)
def scanned(denoise, rows, x, eps):
    """x[b, 1] and eps[s, b, 1] -> x after every row, [s, b, 1]."""

    def body(carry, row_and_eps):
        carry = step(denoise, carry, *row_and_eps)
        return carry, carry.x

    return jax.lax.scan(body, first_carry(x), (rows, eps))[1]


def run(sampler, sigma, denoise, start, eps=0.0, schedule=SCHEDULE, length=None):
    """x after every row, float64[s, b], from start[b], with eps[s, b] or the same noise everywhere."""
    with jax.enable_x64(True):
        rows = jax.tree.map(jnp.asarray, sampler.rows(schedule, sigma, length))
        eps = jnp.asarray(np.broadcast_to(eps, (len(rows.scale), len(start))))[..., None]
        return np.asarray(scanned(denoise, rows, jnp.asarray(start)[:, None], eps))[..., 0]


def responses(sampler, sigma, denoise=gaussian, shift=0.0):
    """The result for a unit start without noise, then for every unit noise alone from a start at 0."""
    count = len(sampler.rows(SCHEDULE, sigma).scale)
    inputs = np.eye(1 + count)  # one image for each
    return run(sampler, sigma, denoise, inputs[0] + shift, inputs[1:])[-1]


def grid(steps, high=10.0, low=0.1):
    """Levels evenly in log sigma, not down to 0, where the exact solution is known at both ends."""
    return np.geomspace(high, low, steps + 1)


def variance(found, before, after):
    """The variance of the result, over its exact value, if the start has the exact variance at `before`."""
    return (found[0] ** 2 * (S**2 + before**2) + np.sum(found[1:] ** 2)) / (S**2 + after**2)


def test_every_sampler_has_a_stated_order():
    assert set(ORDERS) == set(SAMPLERS)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_result_converges_to_the_exact_flow_with_the_stated_order(name):
    """Adams-Bashforth has its order on even steps in sigma; from 10 on, its start of low order costs little."""

    def error(steps):
        sigma = np.linspace(10, 1, 2 * steps + 1) if ORDERS[name] == 4 else grid(steps)
        exact = np.sqrt((S**2 + sigma[-1] ** 2) / (S**2 + sigma[0] ** 2))
        return abs(responses(SAMPLERS[name], sigma)[0] / exact - 1)

    coarse, fine = error(40), error(80)
    assert fine < 0.05
    order = np.log2(coarse / fine)
    assert order > ORDERS[name] - 0.4, f"order {order:.2f}"


@pytest.mark.parametrize("name", STOCHASTIC)
def test_variance_converges_to_the_exact_marginal_with_the_stated_order(name):
    def error(steps):
        sigma = grid(steps)
        return abs(variance(responses(SAMPLERS[name], sigma), sigma[0], sigma[-1]) - 1)

    coarse, fine = error(50), error(100)
    assert fine < 0.15
    order = np.log2(coarse / fine)
    assert order > ORDERS[name] - 0.35, f"order {order:.2f}"


def test_lcm_is_exact_for_a_consistency_function():
    sigma = grid(4)
    found = responses(SAMPLERS["lcm"], sigma, consistency)
    np.testing.assert_allclose(variance(found, sigma[0], sigma[-1]), 1, rtol=1e-12)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_mean_of_the_data_is_carried_through_exactly(name):
    """Data around 2, a start around 2: the same responses around 2, so the mean of the result is exact."""
    sigma = grid(7)
    found = responses(SAMPLERS[name], sigma, shifted_gaussian, shift=2.0)
    np.testing.assert_allclose(found - 2, responses(SAMPLERS[name], sigma), atol=1e-11)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_perfect_denoiser_is_reproduced_at_sigma_0(name):
    """If D is the same picture at every level, that picture is the result, whatever the spacing, length and noise."""
    for schedule in (SCHEDULE, ZERO_SNR):
        for spacing in TO_ZERO:
            for steps in (1, 2, 5):
                sigma = schedule.levels(steps, spacing)
                found = run(SAMPLERS[name], sigma, constant, np.array([-sigma[0], sigma[0]]), 1.0, schedule)
                np.testing.assert_allclose(found[-1], 0.3, atol=1e-7, err_msg=f"{spacing}, {steps} steps")


@pytest.mark.parametrize("name", [name for name in DETERMINISTIC if name != "ipndm_v"])  # its weights sum to almost 1
def test_what_is_known_keeps_the_noise_that_it_started_with(name):
    """With D constant, x = D + sigma eps at every level: a known region needs no renoising and pasting."""
    sigma = SCHEDULE.levels(6, "karras")
    eps = np.array([-1.0, 0.5])
    path = run(SAMPLERS[name], sigma, constant, 0.3 + sigma[0] * eps)
    if name == "plms":
        path = np.delete(path, 0, axis=0)  # its first two rows are one step
    elif name in TWO_CALLS:
        path = np.append(path[1:-1:2], path[-1:], axis=0)
    elif name == "heunpp2":  # three calls, but for the last two steps
        path = np.concatenate([path[2:-3:3], path[-2:]])
    np.testing.assert_allclose(path, 0.3 + sigma[1:, None] * eps, atol=1e-10)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_single_picture_is_noised_to_exactly_the_last_level(name):
    """Data of no width: the variance is sigma^2 at every level, however few the steps."""
    sigma = grid(3)
    found = responses(SAMPLERS[name], sigma, nothing)
    np.testing.assert_allclose(found[0] ** 2 * sigma[0] ** 2 + np.sum(found[1:] ** 2), sigma[-1] ** 2, rtol=1e-9)


@pytest.mark.parametrize("schedule", [SCHEDULE, ZERO_SNR], ids=["usual", "zero terminal SNR"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_tables_are_finite_for_every_spacing_and_length(name, schedule):
    for spacing in SPACINGS:
        for steps in (1, 2, 3, 7, 1000) if spacing == "leading" else (1, 2, 3, 7):  # 1000 of them have no room to shift
            sigma = schedule.levels(steps, spacing)
            with np.errstate(all="raise", under="ignore"):
                rows = SAMPLERS[name].rows(schedule, sigma)
            for leaf in jax.tree.leaves(rows):
                assert np.isfinite(np.asarray(leaf, np.float32)).all()
            assert rows.levels.t.min() >= 0
            assert rows.levels.t.max() <= 999


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_step_to_sigma_0_is_the_denoiser(name):
    found = responses(SAMPLERS[name], np.array([5.0, 0.0]))
    np.testing.assert_allclose(found[0], S**2 / (S**2 + 25), rtol=1e-9)
    np.testing.assert_array_equal(found[1:], 0)  # no noise is left in a picture


@pytest.mark.parametrize("name", SAMPLERS)
def test_noise_enters_where_the_table_says_so(name):
    noise = responses(SAMPLERS[name], grid(5))[1:]
    if name == "sa_solver":  # between two levels alone
        assert 0 < (noise != 0).sum() < len(noise)
    elif SAMPLERS[name].stochastic and name != "restart":  # which adds some from 20 steps on
        used = np.ones(len(noise), bool)
        used[::2] = name not in ("dpm2_a", "dpmpp_2s_a")  # one noise for two calls
        assert ((np.abs(noise) > 1e-6) == used).all()
    else:
        assert (noise == 0).all()


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_network_is_called_as_often_as_the_table_of_samplers_says(name):
    calls = len(SAMPLERS[name].rows(SCHEDULE, SCHEDULE.levels(9, "karras")).scale)
    assert calls == (17 if name in TWO_CALLS else {"plms": 10, "heunpp2": 24}.get(name, 9))


@pytest.mark.parametrize("name", SAMPLERS)
def test_rows_behind_the_last_leave_the_picture_as_it_is(name):
    """Whatever the network says there, and whatever noise is drawn."""
    for sigma in (SCHEDULE.levels(4, "karras"), SCHEDULE.levels(1), np.zeros(1)):
        own = len(SAMPLERS[name].rows(SCHEDULE, sigma).scale) if len(sigma) > 1 else 0
        path = run(SAMPLERS[name], sigma, gaussian, np.array([3.0, -5.0]), 1.0, length=12)
        assert len(path) == 12
        expected = path[own - 1] if own else [3.0, -5.0]
        np.testing.assert_array_equal(path[own:], np.broadcast_to(expected, (12 - own, 2)))


def test_ddim_with_eta_is_between_ddim_and_ddpm():
    sigma = grid(10)
    np.testing.assert_allclose(responses(ddim(0.0), sigma), responses(SAMPLERS["euler"], sigma))
    np.testing.assert_allclose(responses(ddim(1.0), sigma), responses(SAMPLERS["ddpm"], sigma))
    noise = [np.abs(responses(ddim(eta), sigma)[1:]).sum() for eta in (0.0, 0.5, 1.0)]
    assert noise[0] == 0 < noise[1] < noise[2]
    half = responses(ddim(0.5), sigma, nothing)
    np.testing.assert_allclose(half[0] ** 2 * sigma[0] ** 2 + np.sum(half[1:] ** 2), sigma[-1] ** 2, rtol=1e-9)


@pytest.mark.parametrize("eta", [-0.1, 1.5, float("nan")])
def test_eta_out_of_range_is_refused(eta):
    with pytest.raises(ValueError, match=r"eta must lie in \[0, 1\]"):
        ddim(eta)


def test_ddpm_is_the_posterior_of_the_forward_process():
    """One step from t to t - 1 is q(x_{t-1} | x_t, x0_hat) of Ho et al. 2020, eq. 6 and 7, in the other view."""
    t = 500
    alpha_bar, before, beta = SCHEDULE.alpha_bars[t], SCHEDULE.alpha_bars[t - 1], SCHEDULE.betas[t]
    rows = SAMPLERS["ddpm"].rows(SCHEDULE, SCHEDULE.sigmas[[t, t - 1]])
    of_x0 = np.sqrt(before) * beta / (1 - alpha_bar)
    of_x_t = np.sqrt(1 - beta) * (1 - before) / (1 - alpha_bar)
    deviation = np.sqrt((1 - before) / (1 - alpha_bar) * beta)
    np.testing.assert_allclose(rows.history[0, 0] * np.sqrt(before), of_x0, rtol=1e-9)
    np.testing.assert_allclose(rows.scale[0] * np.sqrt(before / alpha_bar), of_x_t, rtol=1e-9)
    np.testing.assert_allclose(rows.noise[0] * np.sqrt(before), deviation, rtol=1e-9)


@pytest.mark.parametrize("name", ["dpmpp_2m", "lms"])
def test_a_multistep_rule_starts_with_euler(name):
    sigma = grid(1)
    np.testing.assert_allclose(responses(SAMPLERS[name], sigma), responses(SAMPLERS["euler"], sigma))


def test_plms_starts_with_heun():
    sigma = grid(4)
    plms, heun = (run(SAMPLERS[name], sigma, gaussian, np.ones(1)) for name in ("plms", "heun"))
    np.testing.assert_allclose(plms[1], heun[1], rtol=1e-12)  # two rows for the first step


def test_both_noises_of_dpmpp_sde_are_one_brownian_motion():
    """W(sigma) - W(middle) and W(sigma) - W(sigma') have the correlation of nested increments."""
    for sigma in ([9.0, 4.0], [4.0, 1.0]):
        before, after = sigma
        of_middle, of_rest = responses(SAMPLERS["dpmpp_sde"], np.array(sigma), nothing)[1:]
        middle = np.sqrt(before * after)
        correlation = np.sqrt((before - middle) / (before - after))
        np.testing.assert_allclose(of_middle / np.hypot(of_middle, of_rest), correlation, rtol=1e-12)
