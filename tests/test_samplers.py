"""One conformance suite for every sampler. Adding a sampler is a row in `SAMPLERS` and a row in `ORDERS`.

Gaussian data N(0, S^2) has the denoiser D(x, sigma) = S^2 / (S^2 + sigma^2) x, and the exact flow keeps
x / sqrt(S^2 + sigma^2) constant. Every sampler is linear in its start and its noises here, so the variance of its
result follows from its response to each of them alone: no statistics are needed.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.config import ScheduleConfig
from sdjax.diffusion.sample import image_keys, initial_noise, sample, stream
from sdjax.diffusion.samplers import SAMPLERS, ddim
from sdjax.diffusion.schedule import SPACINGS, noise_schedule

SCHEDULE = noise_schedule(ScheduleConfig())
S = 0.7
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
    "unipc": 2,
    "lcm": None,
}
DETERMINISTIC = [name for name, sampler in SAMPLERS.items() if not sampler.stochastic]
STOCHASTIC = [name for name, sampler in SAMPLERS.items() if sampler.stochastic and name != "lcm"]


def gaussian(x, level):
    return S**2 / (S**2 + level.sigma**2) * x


def responses(sampler, sigma, denoise=gaussian):
    """In float64: the result for a unit start without noise, and for every unit noise alone from a start at 0."""
    with jax.enable_x64(True):
        rows = jax.tree.map(jnp.asarray, sampler.rows(SCHEDULE, sigma))
        count, draws = len(rows.levels.sigma), sampler.method.draws
        inputs = np.eye(1 + count * draws)  # one image for each input
        eps = jnp.asarray(inputs[:, 1:].T.reshape(count, draws, len(inputs), 1))

        def body(carry, row_and_eps):
            row, drawn = row_and_eps
            return sampler.method.step(denoise, carry, row, tuple(drawn)), None

        start = sampler.method.init(jnp.asarray(inputs[:, :1]))
        return np.asarray(jax.lax.scan(body, start, (rows, eps))[0].x)[:, 0]


def grid(steps, high=10.0, low=0.1):
    """Levels evenly in log sigma, not down to 0, where the exact solution is known at both ends."""
    return np.geomspace(high, low, steps + 1)


def test_every_sampler_has_a_stated_order():
    assert set(ORDERS) == set(SAMPLERS)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_result_converges_to_the_exact_flow_with_the_stated_order(name):
    def error(steps):
        # Adams-Bashforth has its order on even steps in sigma
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
        found = responses(SAMPLERS[name], sigma)
        variance = found[0] ** 2 * (S**2 + sigma[0] ** 2) + np.sum(found[1:] ** 2)
        return abs(variance / (S**2 + sigma[-1] ** 2) - 1)

    coarse, fine = error(50), error(100)
    assert fine < 0.15
    order = np.log2(coarse / fine)
    assert order > ORDERS[name] - 0.35, f"order {order:.2f}"


def test_lcm_is_exact_for_a_consistency_function():
    sigma = grid(4)
    found = responses(SAMPLERS["lcm"], sigma, lambda x, level: S / jnp.sqrt(S**2 + level.sigma**2) * x)
    variance = found[0] ** 2 * (S**2 + sigma[0] ** 2) + np.sum(found[1:] ** 2)
    np.testing.assert_allclose(variance, S**2 + sigma[-1] ** 2, rtol=1e-12)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_perfect_denoiser_is_reproduced(name):
    """If D is the same picture at every level, that picture is the result, whatever the noise."""
    sigma = SCHEDULE.levels(6, "karras")
    found = responses(SAMPLERS[name], sigma, lambda x, level: jnp.full_like(x, 0.3))
    np.testing.assert_allclose(found, 0.3, rtol=1e-9)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("name", SAMPLERS)
def test_tables_are_finite_for_every_spacing_and_length(name, zero_terminal_snr):
    schedule = noise_schedule(ScheduleConfig(zero_terminal_snr=zero_terminal_snr))
    for spacing in SPACINGS:
        for steps in (1, 2, 3, 7):
            sigma = schedule.levels(steps, spacing)
            with np.errstate(all="raise", under="ignore"):
                rows = SAMPLERS[name].rows(schedule, sigma)
            for leaf in jax.tree.leaves(rows):
                assert np.isfinite(np.asarray(leaf, np.float64)).all()
                assert np.isfinite(np.asarray(leaf, np.float32)).all()
            assert rows.levels.t.min() >= 0
            assert rows.levels.t.max() <= 999


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_step_is_the_denoiser(name):
    sigma = np.array([5.0, 0.0])
    found = responses(SAMPLERS[name], sigma)[0]
    np.testing.assert_allclose(found, S**2 / (S**2 + 25), rtol=1e-9)


def test_ddim_with_eta_is_between_ddim_and_ddpm():
    sigma = grid(10)
    np.testing.assert_allclose(responses(ddim(0.0), sigma), responses(SAMPLERS["euler"], sigma))
    np.testing.assert_allclose(responses(ddim(1.0), sigma), responses(SAMPLERS["ddpm"], sigma))
    noise = [np.abs(responses(ddim(eta), sigma)[1:]).sum() for eta in (0.0, 0.5, 1.0)]
    assert noise[0] == 0 < noise[1] < noise[2]
    with pytest.raises(ValueError, match=r"eta must lie in \[0, 1\]"):
        ddim(1.5)


def test_first_step_of_2m_is_euler():
    sigma = grid(1)
    np.testing.assert_allclose(responses(SAMPLERS["dpmpp_2m"], sigma), responses(SAMPLERS["euler"], sigma))


# The drivers

TRACES = []


def make_denoiser(strength):
    TRACES.append(1)

    def denoise(x, level):
        return strength * jnp.tanh(x) / (1 + level.sigma) + 0.01 * level.t / 1000

    return denoise


def run(name, seeds, steps=5, spacing="karras", driver=sample):
    sampler = SAMPLERS[name]
    sigma = SCHEDULE.levels(steps, spacing)
    rows = jax.tree.map(jnp.asarray, sampler.rows(SCHEDULE, sigma))
    keys = image_keys(seeds)
    x = initial_noise(keys, (4, 4, 2)) * sigma[0]
    return driver(make_denoiser, jnp.float32(0.9), sampler.method, rows, x, keys)


@pytest.fixture(scope="module")
def jitted():
    def driver(*arguments):
        make, inputs, method, *rest = arguments
        return compiled(make, inputs, method, *rest)

    compiled = jax.jit(sample, static_argnums=(0, 2))
    return driver


@pytest.mark.parametrize("name", SAMPLERS)
def test_result_depends_on_its_own_seed_alone(name, jitted):
    together = run(name, [3, 5, 4], driver=jitted)
    again = run(name, [9, 3, 5], driver=jitted)
    np.testing.assert_array_equal(together[0], again[1])
    np.testing.assert_array_equal(together[1], again[2])
    assert np.abs(together[0] - together[1]).max() > 1e-3


@pytest.mark.parametrize("name", SAMPLERS)
def test_streaming_gives_what_scanning_gives(name, jitted):
    steps = list(run(name, [1, 2], driver=stream))
    np.testing.assert_allclose(steps[-1][0], run(name, [1, 2], driver=jitted), rtol=2e-5, atol=2e-6)
    assert len(steps) == 5 + (name == "plms")
    if ORDERS[name] != 4:  # these extrapolate
        np.testing.assert_allclose(steps[-1][0], steps[-1][1], atol=1e-6)


def test_other_seeds_spacings_and_samplers_of_a_method_compile_nothing(jitted):
    run("euler", [0, 1], driver=jitted)
    before = len(TRACES)
    for name in ("euler", "ddim", "ddpm", "dpmpp_2m", "lms", "unipc", "dpmpp_2m_sde", "lcm", "euler_a"):
        for spacing in SPACINGS:
            run(name, [7, 8], spacing=spacing, driver=jitted)
    assert len(TRACES) == before


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5])
def test_seeds_out_of_range_are_refused(seed):
    with pytest.raises(ValueError, match="a seed must be a whole number"):
        image_keys([seed])
