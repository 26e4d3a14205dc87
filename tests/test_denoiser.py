"""What the wrappers around a network must be, by identities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.diffusion.denoiser import guided, keep_known, to_denoiser
from sdjax.types import Level

X0 = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
EPS = jax.random.normal(jax.random.key(1), (2, 4, 4, 3))
NEGATIVE = jax.random.normal(jax.random.key(2), (2, 4, 4, 3))
EVERYWHERE = (jnp.float32(-1), jnp.float32(jnp.inf))


def pair(x, level):
    return jnp.concatenate([NEGATIVE, EPS])


@pytest.mark.parametrize("sigma", [0.03, 1.0, 14.6])
def test_a_network_that_knows_the_noise_gives_back_the_picture(sigma):
    level = Level(jnp.float32(sigma), None)
    x = X0 + sigma * EPS
    scale = 1 / np.sqrt(1 + sigma**2)
    np.testing.assert_allclose(to_denoiser(lambda x, level: EPS, "epsilon")(x, level), X0, atol=1e-5)
    v = scale * EPS - sigma * scale * X0  # sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0
    np.testing.assert_allclose(to_denoiser(lambda x, level: v, "v")(x, level), X0, atol=2e-5)


def test_the_network_sees_the_variance_preserving_view():
    seen = []
    to_denoiser(lambda x, level: seen.append(x) or x, "epsilon")(X0 * 5, Level(jnp.float32(2.0), None))
    np.testing.assert_allclose(seen[0], X0 * np.sqrt(5), rtol=1e-6)


def test_levels_may_differ_from_picture_to_picture():
    sigma = jnp.array([0.5, 3.0])
    both = to_denoiser(lambda x, level: EPS, "epsilon")(X0, Level(sigma, None))
    for i in range(2):
        one = to_denoiser(lambda x, level: EPS, "epsilon")(X0, Level(sigma[i], None))
        np.testing.assert_allclose(both[i], one[i], rtol=1e-6)


def test_guidance_one_is_the_conditional_model_and_zero_the_negative_one():
    level = Level(jnp.float32(1.0), None)
    for guidance, expected in ((1.0, EPS), (0.0, NEGATIVE), (3.0, NEGATIVE + 3 * (EPS - NEGATIVE))):
        predict = guided(pair, jnp.float32(guidance), jnp.float32(0), EVERYWHERE)
        np.testing.assert_allclose(predict(X0, level), expected, atol=1e-5)


def test_guidance_may_differ_from_picture_to_picture():
    found = guided(pair, jnp.array([1.0, 4.0]), jnp.float32(0), EVERYWHERE)(X0, Level(jnp.float32(1.0), None))
    np.testing.assert_allclose(found[0], EPS[0], atol=1e-6)
    np.testing.assert_allclose(found[1], (NEGATIVE + 4 * (EPS - NEGATIVE))[1], atol=1e-5)


def test_full_rescale_has_the_spread_of_the_conditional_model():
    level = Level(jnp.float32(1.0), None)
    found = guided(pair, jnp.float32(7.5), jnp.float32(1), EVERYWHERE)(X0, level)
    np.testing.assert_allclose(found.std((1, 2, 3)), EPS.std((1, 2, 3)), rtol=1e-5)
    plain = guided(pair, jnp.float32(7.5), jnp.float32(0), EVERYWHERE)(X0, level)
    ratio = found / plain
    np.testing.assert_allclose(ratio, jnp.broadcast_to(ratio[:, :1, :1, :1], ratio.shape), rtol=1e-4)


def test_outside_the_interval_guidance_is_one():
    predict = guided(pair, jnp.float32(7.5), jnp.float32(1), (jnp.float32(1.0), jnp.float32(5.0)))
    for sigma, inside in ((1.0, False), (1.01, True), (5.0, True), (5.01, False)):
        found = predict(X0, Level(jnp.float32(sigma), None))
        assert np.allclose(found, EPS, atol=1e-6) != inside


def test_the_known_region_is_known_and_soft_masks_blend():
    mask = jnp.zeros((2, 4, 4, 1)).at[:, 2:].set(1.0).at[:, 1].set(0.25)
    found = keep_known(lambda x, level: EPS, X0, mask)(X0, Level(jnp.float32(1.0), None))
    np.testing.assert_array_equal(found[:, 0], X0[:, 0])
    np.testing.assert_allclose(found[:, 2:], EPS[:, 2:], atol=1e-6)
    np.testing.assert_allclose(found[:, 1], 0.75 * X0[:, 1] + 0.25 * EPS[:, 1], atol=1e-6)
