"""What the wrappers around a network must be, by identities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.devices.platform import use_platform
from sdjax.diffusion.denoiser import guided, keep_known, to_denoiser
from sdjax.types import Guidance, NoiseLevel

X0 = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
EPS = jax.random.normal(jax.random.key(1), (2, 4, 4, 3))
NEGATIVE = jax.random.normal(jax.random.key(2), (2, 4, 4, 3))


def pair(x, level):
    return jnp.concatenate([NEGATIVE, EPS])


def one(index, x, level):
    return jnp.where(index == 1, EPS, NEGATIVE)


@pytest.fixture(params=["cpu", "gpu"], autouse=True)
def platform(request):
    """Guidance as it is on CPUs, and as it is everywhere else."""
    with use_platform(request.param):
        yield request.param


def steered(scale, rescale=0.0, used=True):
    """A level at which a prompt steers."""
    return NoiseLevel(jnp.float32(1.0), None, Guidance(jnp.float32(scale), jnp.float32(rescale), jnp.bool_(used)))


@pytest.mark.parametrize("sigma", [0.03, 1.0, 14.6])
def test_a_network_that_knows_the_noise_gives_back_the_picture(sigma):
    level = NoiseLevel(jnp.float32(sigma), None)
    x = X0 + sigma * EPS
    scale = 1 / np.sqrt(1 + sigma**2)
    np.testing.assert_allclose(to_denoiser(lambda x, level: EPS, "epsilon")(x, level), X0, atol=1e-5)
    v = scale * EPS - sigma * scale * X0  # sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0
    np.testing.assert_allclose(to_denoiser(lambda x, level: v, "v")(x, level), X0, atol=2e-5)


def test_the_network_sees_the_variance_preserving_view():
    seen = []
    to_denoiser(lambda x, level: seen.append(x) or x, "epsilon")(X0 * 5, NoiseLevel(jnp.float32(2.0), None))
    np.testing.assert_allclose(seen[0], X0 * np.sqrt(5), rtol=1e-6)


@pytest.mark.parametrize("sigma", [0.03, 1.0, 14.6, 4096.0])
def test_epsilon_and_v_are_two_names_of_one_belief(sigma):
    """Whatever eps a network believes in, the v of that belief (Salimans & Ho 2022, eq. 10) denoises to the same."""
    level = NoiseLevel(jnp.float32(sigma), None)
    signal, noise = 1 / np.sqrt(1 + sigma**2), sigma / np.sqrt(1 + sigma**2)

    def as_v(x, level):
        x0_hat = (x - noise * EPS) / signal  # x is variance preserving here
        return signal * EPS - noise * x0_hat

    x = X0 + sigma * NEGATIVE
    expected = to_denoiser(lambda x, level: EPS, "epsilon")(x, level)
    np.testing.assert_allclose(to_denoiser(as_v, "v")(x, level), expected, atol=3e-6 * (1 + sigma))


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_the_state_stays_float32_whatever_the_network_computes_in(prediction):
    level = NoiseLevel(jnp.float32(1.0), None)
    for dtype in (jnp.bfloat16, jnp.float16):
        found = to_denoiser(lambda x, level, dtype=dtype: EPS.astype(dtype), prediction)(X0, level)
        assert found.dtype == jnp.float32
        for used in (True, False):
            both = guided(
                lambda x, level, dtype=dtype: pair(x, level).astype(dtype),
                lambda *given, dtype=dtype: one(*given).astype(dtype),
            )(X0, steered(3, 0.5, used))
            assert both.dtype == jnp.float32


def test_levels_may_differ_from_picture_to_picture():
    sigma = jnp.array([0.5, 3.0])
    both = to_denoiser(lambda x, level: EPS, "epsilon")(X0, NoiseLevel(sigma, None))
    for i in range(2):
        one = to_denoiser(lambda x, level: EPS, "epsilon")(X0, NoiseLevel(sigma[i], None))
        np.testing.assert_allclose(both[i], one[i], rtol=1e-6)


def test_guidance_one_is_the_conditional_model_and_zero_the_negative_one():
    for guidance, expected in ((1.0, EPS), (0.0, NEGATIVE), (3.0, NEGATIVE + 3 * (EPS - NEGATIVE))):
        np.testing.assert_allclose(guided(pair, one)(X0, steered(guidance)), expected, atol=1e-5)
    np.testing.assert_array_equal(guided(pair, one)(X0, steered(1)), EPS)


def test_guidance_may_differ_from_picture_to_picture():
    found = guided(pair, one)(X0, steered(jnp.array([1.0, 4.0])))
    np.testing.assert_allclose(found[0], EPS[0], atol=1e-6)
    np.testing.assert_allclose(found[1], (NEGATIVE + 4 * (EPS - NEGATIVE))[1], atol=1e-5)


def test_full_rescale_has_the_spread_of_the_conditional_model():
    found = guided(pair, one)(X0, steered(7.5, 1))
    np.testing.assert_allclose(found.std((1, 2, 3)), EPS.std((1, 2, 3)), rtol=1e-5)
    plain = guided(pair, one)(X0, steered(7.5, 0))
    ratio = found / plain
    np.testing.assert_allclose(ratio, jnp.broadcast_to(ratio[:, :1, :1, :1], ratio.shape), rtol=1e-4)


def test_rescale_is_the_formula_of_lin_et_al():
    """Equations 14 to 16: the standard deviation of each picture over all of its pixels and channels."""
    found = guided(pair, one)(X0, steered(7.5, 0.7))
    plain = np.asarray(NEGATIVE + 7.5 * (EPS - NEGATIVE))
    for i in range(2):
        rescaled = plain[i] * np.std(EPS[i]) / np.std(plain[i])
        np.testing.assert_allclose(found[i], 0.7 * rescaled + 0.3 * plain[i], rtol=1e-4, atol=1e-5)


def test_rescale_at_guidance_one_changes_nothing():
    found = guided(pair, one)(X0, steered(1, 1))
    np.testing.assert_allclose(found, EPS, atol=1e-5)


def test_where_no_picture_is_steered_the_negative_prompt_is_not_evaluated(platform):
    calls = []

    def pair_counted(x, level):
        jax.debug.callback(lambda: calls.append("both"))
        return pair(x, level)

    def one_counted(index, x, level):
        jax.debug.callback(lambda index: calls.append(int(index)), index)
        return one(index, x, level)

    for used in (False, True):
        calls.clear()
        found = jax.jit(lambda level: guided(pair_counted, one_counted)(X0, level))(steered(7.5, used=used))
        jax.effects_barrier()
        assert sorted(calls) == ([1] if not used else [0, 1] if platform == "cpu" else ["both"])
        assert np.array_equal(found, EPS) != used


def test_gradients_go_through_guidance():
    """A network that says x of the negative prompt and 2 x of the positive one: x + 3 (2 x - x)."""
    network = guided(lambda x, level: jnp.concatenate([x, 2 * x]), lambda index, x, level: x * (index + 1))
    gradient = jax.grad(lambda x: network(x, steered(3.0)).sum())(X0)
    np.testing.assert_allclose(gradient, jnp.full_like(X0, 4), rtol=1e-5)


def test_the_known_region_is_known_and_soft_masks_blend():
    mask = jnp.zeros((2, 4, 4, 1)).at[:, 2:].set(1.0).at[:, 1].set(0.25)
    found = keep_known(lambda x, level: EPS, X0, mask)(X0, NoiseLevel(jnp.float32(1.0), None))
    np.testing.assert_array_equal(found[:, 0], X0[:, 0])
    np.testing.assert_allclose(found[:, 2:], EPS[:, 2:], atol=1e-6)
    np.testing.assert_allclose(found[:, 1], 0.75 * X0[:, 1] + 0.25 * EPS[:, 1], atol=1e-6)
