"""The losses against PyTorch, diffusers and hand calculation, and by the identities that they must keep.

Networks here are functions of a line: one that says 0, so that a loss shows its target, or one that knows x_0 and errs
by a known amount. Losses run eagerly where a function notes what it was called with.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch.distributions import Normal, kl_divergence

from sdjax.config import ScheduleConfig
from sdjax.diffusion.schedule import noise_schedule
from sdjax.models.vae import Posterior
from sdjax.train.losses import (
    bits_per_dim,
    contrastive_loss,
    diffusion_loss,
    drop_prompts,
    gaussian_kl,
    vae_loss,
    variational_bound,
)
from tests.arrays import normal

CONFIG = ScheduleConfig()
SCHEDULE = noise_schedule(CONFIG)
DDPM = DDPMScheduler(1000, CONFIG.beta_start, CONFIG.beta_end, "scaled_linear")
ALPHA_BAR = DDPM.alphas_cumprod.double().numpy()
KEY = jax.random.key(7)
X0 = normal(0, 32, 4, 6, 3)
CONTEXT = normal(1, 32, 5, 8)


def torch64(x):
    return torch.from_numpy(np.array(x, np.float64))


def noted(predict):
    """The same network, and the list of what it is called with."""
    calls = []
    return lambda *inputs: calls.append(inputs) or predict(*inputs), calls


def silent(x, t, context):
    return jnp.zeros_like(x)


def noise_of(x_t, x0, t):
    a = ALPHA_BAR[np.asarray(t)][:, None, None, None]
    return (np.asarray(x_t, np.float64) - np.sqrt(a) * x0) / np.sqrt(1 - a)


def erring(x0, prediction, error):
    """A network that knows x0, and misses the noise or the velocity by `error`, a function of t."""
    roots = jnp.sqrt(jnp.asarray(SCHEDULE.alpha_bars, jnp.float32))
    rests = jnp.sqrt(jnp.asarray(1 - SCHEDULE.alpha_bars, jnp.float32))

    def predict(x_t, t, context):
        root, rest = (table[t][:, None, None, None] for table in (roots, rests))
        eps = (x_t - root * x0) / rest
        right = eps if prediction == "epsilon" else root * eps - rest * x0
        return right + error(t)[:, None, None, None]

    return predict


# ------------------------------------------------------------------------------------------------- noise


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_the_target_is_that_of_diffusers(prediction):
    predict, calls = noted(silent)
    loss, metrics = diffusion_loss(predict, SCHEDULE, X0, CONTEXT, KEY, prediction=prediction)
    x_t, t, context = calls[0]
    t = torch.from_numpy(np.array(t)).long()
    eps = torch.from_numpy(noise_of(x_t, X0, t)).float()
    np.testing.assert_allclose(DDPM.add_noise(torch.from_numpy(X0), eps, t), x_t, atol=1e-5)
    target = eps if prediction == "epsilon" else DDPM.get_velocity(torch.from_numpy(X0), eps, t)
    np.testing.assert_allclose(loss, target.square().mean(), rtol=1e-5)
    assert metrics["loss"] == metrics["mse"] == loss
    assert context is CONTEXT


def test_timesteps_are_uniform_and_the_noise_is_standard_normal():
    predict, calls = noted(silent)
    x0 = normal(2, 20_000, 1, 2, 2)
    diffusion_loss(predict, SCHEDULE, x0, CONTEXT, KEY)
    x_t, t, _ = calls[0]
    counts = np.bincount(np.asarray(t) // 50, minlength=20)  # 1000 of each expected, standard deviation 31
    assert counts.shape == (20,)
    assert (t.min(), t.max()) == (0, 999)
    assert abs(counts - 1000).max() < 150
    eps = noise_of(x_t, x0, t).reshape(len(x0), 4)
    assert abs(eps.mean(0)).max() < 0.04
    both = np.concatenate([eps, x0.reshape(len(x0), 4)], axis=1)
    np.testing.assert_allclose(np.cov(both.T)[:4], np.eye(4, 8), atol=0.05)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_is_the_published_weight(prediction, gamma):
    predict, calls = noted(silent)
    loss, metrics = diffusion_loss(predict, SCHEDULE, X0, CONTEXT, KEY, prediction=prediction, min_snr=gamma)
    x_t, t, _ = calls[0]
    snr = compute_snr(DDPM, torch.from_numpy(np.array(t))).double().numpy()
    a = ALPHA_BAR[np.asarray(t)]
    eps = noise_of(x_t, X0, t)
    if prediction == "epsilon":
        errors, weight = eps**2, np.minimum(snr, gamma) / snr
    else:
        root, rest = (np.sqrt(x)[:, None, None, None] for x in (a, 1 - a))
        errors, weight = (root * eps - rest * X0) ** 2, np.minimum(snr, gamma) / (snr + 1)
    errors = errors.mean((1, 2, 3))
    np.testing.assert_allclose(loss, (weight * errors).mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["mse"], errors.mean(), rtol=1e-5)
    assert (snr < gamma).any()
    assert (snr > gamma).any()


def test_one_belief_costs_the_same_under_min_snr_in_either_prediction():
    """An error e of the noise is an error e / sqrt(alpha_bar) of the velocity: (SNR + 1) / SNR in the squares."""
    roots = jnp.sqrt(jnp.asarray(SCHEDULE.alpha_bars, jnp.float32))
    networks = {
        "epsilon": erring(X0, "epsilon", lambda t: 0.1 + t / 1000),
        "v": erring(X0, "v", lambda t: (0.1 + t / 1000) / roots[t]),
    }
    weighted = [diffusion_loss(f, SCHEDULE, X0, CONTEXT, KEY, prediction=p, min_snr=5.0) for p, f in networks.items()]
    np.testing.assert_allclose(weighted[0][0], weighted[1][0], rtol=1e-5)
    one, text = X0[:1], CONTEXT[:1]
    plain = [diffusion_loss(f, SCHEDULE, one, text, KEY, prediction=p)[0] for p, f in networks.items()]
    predict, calls = noted(silent)
    diffusion_loss(predict, SCHEDULE, one, text, KEY)
    snr = compute_snr(DDPM, torch.from_numpy(np.array(calls[0][1]))).item()
    np.testing.assert_allclose(plain[1] / plain[0], (snr + 1) / snr, rtol=1e-4)


def test_noise_offset_moves_whole_channels():
    predict, calls = noted(silent)
    x0 = normal(3, 3000, 4, 4, 2)
    for offset in (0.0, 0.5):
        diffusion_loss(predict, SCHEDULE, x0, CONTEXT, KEY, noise_offset=offset)
    plain, moved = (noise_of(x_t, x0, t) for x_t, t, _ in calls)
    shift = moved - plain
    np.testing.assert_allclose(shift, np.broadcast_to(shift[:, :1, :1], shift.shape), atol=1e-3)
    np.testing.assert_allclose(np.cov(shift[:, 0, 0].T), 0.25 * np.eye(2), atol=0.03)


def test_a_network_in_bfloat16_is_judged_in_float32():
    latents = jnp.asarray(X0, jnp.bfloat16)
    half, calls = noted(lambda x, t, context: jnp.zeros(x.shape, jnp.bfloat16))
    full, expected_calls = noted(silent)
    loss, metrics = diffusion_loss(half, SCHEDULE, latents, CONTEXT, KEY)
    expected, _ = diffusion_loss(full, SCHEDULE, latents.astype(jnp.float32), CONTEXT, KEY)
    assert {loss.dtype, *(value.dtype for value in metrics.values())} == {jnp.dtype("float32")}
    np.testing.assert_array_equal(calls[0][0], expected_calls[0][0])
    assert loss == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"prediction": "x0"}, 'prediction must be "epsilon" or "v"'), ({"min_snr": 0.0}, "min_snr must be positive")],
)
def test_unknown_settings_of_the_noise_loss_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        diffusion_loss(silent, SCHEDULE, X0, CONTEXT, KEY, **settings)


# ------------------------------------------------------------------------------------------------- prompt dropout


def test_dropout_with_probability_0_and_1_is_certain():
    empty = normal(4, 5, 8)
    np.testing.assert_array_equal(drop_prompts(CONTEXT, empty, KEY, 0.0), CONTEXT)
    np.testing.assert_array_equal(drop_prompts(CONTEXT, empty, KEY, 1.0), np.broadcast_to(empty, CONTEXT.shape))


@pytest.mark.parametrize("kind", ["states", "ids"])
def test_dropout_replaces_whole_rows_at_its_rate(kind):
    rows = jnp.ones((5000, 4, 2), jnp.bfloat16) if kind == "states" else jnp.ones((5000, 4), jnp.int32)
    dropped = drop_prompts(rows, jnp.zeros(rows.shape[1:]), KEY, 0.1)
    assert dropped.dtype == rows.dtype
    kept = np.asarray(dropped, np.float32).reshape(5000, -1)
    assert set(kept.mean(1)) == {0.0, 1.0}
    assert abs(1 - kept.mean() - 0.1) < 0.02


def test_an_empty_prompt_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"empty must have the shape of one row, \(5, 8\), found \(8,\)"):
        drop_prompts(CONTEXT, CONTEXT[0, 0], KEY, 0.1)


# ------------------------------------------------------------------------------------------------- variational bound


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("timesteps", [None, [0, 10, 200, 201, 700]])
def test_the_terms_are_the_divergences_between_the_papers_gaussians(prediction, timesteps):
    """Each KL by torch.distributions, from the posterior of Ho et al. 2020, eq. 7; the network misses by 1 to 2."""
    x0 = X0[:2]
    predict = erring(x0, prediction, lambda t: 1 + t / 1000)
    terms = variational_bound(predict, SCHEDULE, x0, CONTEXT, KEY, prediction=prediction, timesteps=timesteps)
    visited = np.arange(1000) if timesteps is None else np.array(timesteps)
    chain = ALPHA_BAR[visited]
    before = np.append(1.0, chain[:-1])
    beta = 1 - chain / before
    miss = (1 + visited / 1000) * (np.sqrt((1 - chain) / chain) if prediction == "epsilon" else np.sqrt(1 - chain))
    x_t = 0.5  # both means move with it alike
    at_x_t = np.sqrt(1 - beta) * (1 - before) / (1 - chain) * x_t
    slope = np.sqrt(before) * beta / (1 - chain)
    expected = []
    for i in range(1, len(chain)):
        spread = math.sqrt((1 - before[i]) / (1 - chain[i]) * beta[i])
        true, told = (Normal(torch64(at_x_t[i] + slope[i] * x), spread) for x in (x0, x0 - miss[i]))
        expected.append(kl_divergence(true, told).mean((1, 2, 3)).numpy())
    np.testing.assert_allclose(terms["diffusion"], np.stack(expected, axis=1), rtol=2e-3, atol=1e-7)
    last = Normal(torch64(math.sqrt(chain[-1]) * x0), math.sqrt(1 - chain[-1]))
    prior = kl_divergence(last, Normal(0.0, 1.0)).mean((1, 2, 3))
    np.testing.assert_allclose(terms["prior"], prior, rtol=1e-4)
    reconstruction = -Normal(torch64(x0 - miss[0]), math.sqrt(beta[0])).log_prob(torch64(x0)).mean((1, 2, 3))
    np.testing.assert_allclose(terms["reconstruction"], reconstruction, rtol=1e-3)
    total = prior.numpy() + np.sum(expected, axis=0) + reconstruction.numpy()
    np.testing.assert_allclose(terms["total"], total, rtol=1e-3)


def test_knowing_the_picture_leaves_the_ends_of_the_bound():
    """At t = 0 the constant of the Gaussian, at t = T what is left of the picture; nothing between."""
    x0 = X0[:2]
    terms = variational_bound(erring(x0, "v", lambda t: 0.0 * t), SCHEDULE, x0, CONTEXT, KEY, prediction="v")
    assert terms["diffusion"].shape == (2, 999)
    np.testing.assert_allclose(terms["diffusion"], 0, atol=1e-6)
    constant = 0.5 * math.log(2 * math.pi * CONFIG.beta_start)
    np.testing.assert_allclose(terms["reconstruction"], constant, atol=1e-4)
    a = ALPHA_BAR[-1]
    squares = np.square(x0, dtype=np.float64).mean((1, 2, 3))
    np.testing.assert_allclose(terms["prior"], 0.5 * (a * squares - a - np.log(1 - a)), rtol=1e-4)


def test_the_bound_of_the_best_network_lies_above_the_entropy_by_what_the_fixed_variance_costs():
    """Data N(0, I): the best guess of the noise is sqrt(1 - alpha_bar) x_t, and every term is known in expectation.

    With r_t = (1 - alpha_bar_t) / (1 - alpha_bar_{t-1}) a step costs (r_t - 1) / 2 where log(r_t) / 2 would do.
    """
    x0 = normal(5, 64, 8, 8, 4)
    rests = jnp.sqrt(jnp.asarray(1 - SCHEDULE.alpha_bars, jnp.float32))
    terms = variational_bound(lambda x, t, _: rests[t[0]] * x, SCHEDULE, x0, CONTEXT, KEY)
    ratio = (1 - ALPHA_BAR[1:]) / (1 - ALPHA_BAR[:-1])
    entropy = 0.5 * math.log(2 * math.pi * math.e)
    cost = 0.5 * (ratio - 1 - np.log(ratio)).sum()
    assert cost > 0.25
    np.testing.assert_allclose(terms["total"].mean(), entropy + cost, rtol=0.01)


@pytest.mark.parametrize("timesteps", [[], [3, 3], [5, 2], [-1, 4], [10, 1000]])
def test_timesteps_that_make_no_chain_are_refused(timesteps):
    with pytest.raises(ValueError, match=r"timesteps must rise within \[0, 1000\)"):
        variational_bound(silent, SCHEDULE, X0, CONTEXT, KEY, timesteps=timesteps)


def test_a_bit_is_the_logarithm_of_2():
    np.testing.assert_allclose(bits_per_dim(jnp.log(jnp.float32([2, 8]))), [1, 3], rtol=1e-6)


# ------------------------------------------------------------------------------------------------- autoencoder


def test_the_divergence_from_the_standard_normal_is_pytorchs():
    mean, logvar = normal(6, 50), 3 * normal(7, 50)
    expected = kl_divergence(Normal(torch64(mean), torch64(np.exp(0.5 * np.float64(logvar)))), Normal(0.0, 1.0))
    np.testing.assert_allclose(gaussian_kl(mean, logvar), expected, rtol=1e-5, atol=1e-6)
    assert gaussian_kl(jnp.float32(0), jnp.float32(0)) == 0


IMAGES = np.tanh(normal(8, 3, 8, 8, 3))
POSTERIOR = Posterior(jnp.asarray(normal(9, 3, 2, 2, 4)), jnp.asarray(normal(10, 3, 2, 2, 4)))


@pytest.mark.parametrize(("sigma", "kl_weight", "l1"), [(1.0, 1.0, 0.0), (0.1, 1.0, 0.0), (0.5, 1e-3, 2.0)])
def test_the_autoencoder_loss_is_pytorchs_log_likelihood_and_divergence(sigma, kl_weight, l1):
    decode, calls = noted(lambda z: jnp.tile(jnp.repeat(jnp.repeat(z, 4, 1), 4, 2).sum(-1, keepdims=True), 3) / 4)
    settings = dict(sigma=sigma, kl_weight=kl_weight, l1=l1)
    loss, metrics = vae_loss(decode, POSTERIOR, IMAGES, KEY, **settings)
    (z,) = calls[0]
    np.testing.assert_array_equal(z, POSTERIOR.sample(KEY))
    decoded, x = torch64(decode(z)), torch64(IMAGES)
    reconstruction = -Normal(decoded, sigma).log_prob(x).mean()
    q = Normal(torch64(POSTERIOR.mean), torch64(np.exp(0.5 * np.float64(POSTERIOR.logvar))))
    kl = kl_divergence(q, Normal(0.0, 1.0)).sum() / x.numel()
    np.testing.assert_allclose(metrics["reconstruction"], reconstruction, rtol=1e-5)
    np.testing.assert_allclose(metrics["kl"], kl, rtol=1e-5)
    np.testing.assert_allclose(loss, reconstruction + kl_weight * kl + l1 * (decoded - x).abs().mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["mse"], F.mse_loss(decoded, x), rtol=1e-5)
    assert metrics["loss"] == loss


def test_psnr_is_20_dB_for_an_error_of_a_tenth_of_the_range():
    _, metrics = vae_loss(lambda z: IMAGES + 0.2, POSTERIOR, IMAGES, KEY)
    np.testing.assert_allclose(metrics["psnr"], 20.0, rtol=1e-5)


def test_psnr_is_the_mean_of_the_pictures():
    errors = jnp.array([0.2, 0.02, 2.0])[:, None, None, None]
    _, metrics = vae_loss(lambda z: IMAGES + errors, POSTERIOR, IMAGES, KEY)
    np.testing.assert_allclose(metrics["psnr"], (20 + 40 + 0) / 3, rtol=1e-4)


def test_the_bound_is_tight_where_the_posterior_is_exact():
    """z ~ N(0, 1) and x = z + sigma noise: the posterior is known, and so is p(x) = N(0, 1 + sigma^2)."""
    sigma = 0.5
    x = jnp.asarray(normal(11, 100, 16, 16, 3)) * 0.8
    shrink = 1 / (1 + sigma**2)
    posterior = Posterior(shrink * x, jnp.full(x.shape, math.log(shrink * sigma**2)))
    loss, _ = vae_loss(lambda z: z, posterior, x, KEY, sigma=sigma)
    exact = -Normal(0.0, math.sqrt(1 + sigma**2)).log_prob(torch64(x)).mean()
    np.testing.assert_allclose(loss, exact, rtol=0.01)
    wider = Posterior(posterior.mean, posterior.logvar + 1)
    assert vae_loss(lambda z: z, wider, x, KEY, sigma=sigma)[0] > exact.item() + 0.1


# ------------------------------------------------------------------------------------------------- contrast

IMAGE, TEXT = normal(12, 6, 10), normal(13, 6, 10)


def torch_contrast(image, text, logit_scale, right=None):
    """Both cross-entropies of the paper's figure 3, by PyTorch."""
    image, text = F.normalize(image), F.normalize(text)
    logits = logit_scale.exp().clamp(max=100) * image @ text.T
    right = torch.eye(len(logits), dtype=logits.dtype) if right is None else right
    rows, columns = (part / part.sum(1, keepdim=True) for part in (right, right.T))
    return (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, columns)) / 2


@pytest.mark.parametrize("repeated", [False, True])
def test_the_contrastive_loss_and_its_gradients_are_pytorchs(repeated):
    same = None
    if repeated:
        same = np.zeros((6, 6), bool)
        same[0, 1] = same[1, 0] = same[2, 5] = True
    arrays = (IMAGE, TEXT, np.float32(2.5))
    gradient = jax.grad(lambda *inputs: contrastive_loss(*inputs, same)[0], argnums=(0, 1, 2))
    tensors = [torch64(x).requires_grad_() for x in arrays]
    right = None if same is None else torch64(same | np.eye(6, dtype=bool))
    expected = torch_contrast(*tensors, right)
    expected.backward()
    np.testing.assert_allclose(contrastive_loss(*map(jnp.asarray, arrays), same)[0], expected.item(), rtol=1e-5)
    for ours, theirs in zip(gradient(*map(jnp.asarray, arrays)), tensors, strict=True):
        np.testing.assert_allclose(ours, theirs.grad, rtol=1e-4, atol=1e-6)
        assert np.any(ours)


def test_a_perfect_diagonal_costs_nothing():
    loss, metrics = contrastive_loss(3 * jnp.eye(6), 0.5 * jnp.eye(6), jnp.log(100.0))
    np.testing.assert_allclose(loss, 0, atol=1e-6)
    assert metrics["accuracy"] == 1
    np.testing.assert_allclose(metrics["scale"], 100, rtol=1e-5)


def test_one_embedding_for_all_costs_the_logarithm_of_the_batch():
    loss, metrics = contrastive_loss(jnp.ones((6, 4)), jnp.ones((6, 4)), jnp.float32(3.0))
    np.testing.assert_allclose(loss, math.log(6), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], 1 / 6, rtol=1e-6)


def test_accuracy_counts_the_pictures_that_find_their_text():
    """Both texts lie nearest to picture 0, but each picture lies nearest to its own."""
    image, text = jnp.array([[1.0, 0.0], [0.6, 0.8]]), jnp.array([[1.0, -0.2], [1.0, 0.3]])
    angles = image @ text.T / jnp.linalg.norm(text, axis=1)
    assert list(angles.argmax(1)) == [0, 1]
    assert list(angles.argmax(0)) == [0, 0]
    assert contrastive_loss(image, text, jnp.float32(1.0))[1]["accuracy"] == 1
    assert contrastive_loss(text, image, jnp.float32(1.0))[1]["accuracy"] == 0.5


def test_pictures_and_texts_may_trade_places():
    scale = jnp.float32(2.0)
    one, other = contrastive_loss(IMAGE, TEXT, scale)[0], contrastive_loss(TEXT, IMAGE, scale)[0]
    np.testing.assert_allclose(one, other, rtol=1e-6)


def test_a_repeated_caption_is_right_for_each_of_its_pictures():
    """Pictures 0 and 1 share one caption: both are found, and the loss is the entropy of a choice of two."""
    image = text = jnp.asarray(np.eye(4, dtype=np.float32)[[0, 0, 1, 2]])
    same = jnp.zeros((4, 4), bool).at[0, 1].set(True).at[1, 0].set(True)
    scale = jnp.log(100.0)
    loss, metrics = contrastive_loss(image, text, scale, same)
    np.testing.assert_allclose(loss, math.log(2) / 2, rtol=1e-5)
    assert metrics["accuracy"] == 1
    assert contrastive_loss(image, text, scale)[1]["accuracy"] == 0.75


def test_the_scale_stops_at_100_and_can_come_down_again():
    high = jnp.float32(6.0)
    loss, metrics = contrastive_loss(IMAGE, TEXT, high)
    np.testing.assert_allclose(metrics["scale"], 100, rtol=1e-5)
    np.testing.assert_allclose(loss, contrastive_loss(IMAGE, TEXT, jnp.log(100.0))[0], rtol=1e-5)
    assert jax.grad(lambda s: contrastive_loss(IMAGE, TEXT, s)[0])(high) > 0  # random pairs: a lower scale is better


def test_embeddings_in_bfloat16_are_compared_in_float32():
    halves = [jnp.asarray(x, jnp.bfloat16) for x in (IMAGE, TEXT)]
    loss, metrics = contrastive_loss(*halves, jnp.bfloat16(2.5))
    assert {loss.dtype, *(value.dtype for value in metrics.values())} == {jnp.dtype("float32")}
    expected = contrastive_loss(*(x.astype(jnp.float32) for x in halves), jnp.float32(2.5))[0]
    assert loss == expected
