"""What each of the three networks is taught: losses as pure functions of arrays and of network functions.

Every loss returns (loss f32[], metrics dict of f32[]) and computes in float32 whatever the networks compute in; what is
random in it comes from `key`. Networks come in as functions, parameters already bound, so that nothing here knows how a
network looks inside.

The noise losses rest on one identity. Let x0_hat be what a prediction says about x_0, and SNR = alpha_bar / (1 -
alpha_bar). The mean squared error of x0_hat is that of the prediction times

    1 / SNR for epsilon, 1 / (SNR + 1) for v,

so min-SNR weights and the terms of the variational bound are one weight on the error of x0_hat: min(SNR, gamma), and
(SNR_{t-1} - SNR_t) / 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sdjax.diffusion.schedule import NoiseSchedule, per_image, q_sample
from sdjax.models.vae import Posterior
from sdjax.types import Array

Predict = Callable[[Array, Array, Array], Array]
"""x_t f[b, h, w, c], t i32[b], context f[b, l, d] -> the prediction f[b, h, w, c]."""

Metrics = dict[str, Array]

MAX_LOGIT_SCALE = 100.0
"""Largest factor on the cosines of a contrastive loss (Radford et al. 2021, section 2.5)."""


def diffusion_loss(
    predict: Predict,
    schedule: NoiseSchedule,
    latents: Array,
    context: Array,
    key: Array,
    *,
    prediction: str = "epsilon",
    min_snr: float | None = None,
    noise_offset: float = 0.0,
) -> tuple[Array, Metrics]:
    """The squared error of the predicted noise or velocity at a uniform t per image (Ho et al. 2020, eq. 14).

    latents f[b, h, w, c] are x_0, scaled as the network sees them. prediction: "epsilon", the noise, or "v", which is
    sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 (Salimans & Ho 2022, appendix D). min_snr: gamma of the weight
    min(SNR, gamma) on the error of x0_hat (Hang et al. 2023, section 3.4), None leaves the prediction's own error
    unweighted. noise_offset: this times N(0, 1), one draw per image and channel, is added to the noise, so that a
    network learns to change a picture's mean.

    Metrics: "loss", and "mse", the unweighted error.

    Raises:
        ValueError: an unknown prediction, or a min_snr that is not positive.
    """
    if min_snr is not None and not min_snr > 0:
        raise ValueError(f"min_snr must be positive, or None for no weight, found {min_snr!r}")
    t_key, noise_key, offset_key = jax.random.split(key, 3)
    b, _, _, c = latents.shape
    t = jax.random.randint(t_key, (b,), 0, len(schedule.alpha_bars))
    noise = jax.random.normal(noise_key, latents.shape)
    noise += noise_offset * jax.random.normal(offset_key, (b, 1, 1, c))
    mse = _prediction_error(predict, schedule, latents, context, t, noise, prediction)
    loss = mse
    if min_snr is not None:
        snr = _snr(schedule.alpha_bars)
        loss = mse * jnp.asarray(np.minimum(snr, min_snr) * _x0_factor(snr, prediction), jnp.float32)[t]
    return loss.mean(), {"loss": loss.mean(), "mse": mse.mean()}


def _prediction_error(
    predict: Predict,
    schedule: NoiseSchedule,
    latents: Array,
    context: Array,
    t: Array,
    noise: Array,
    prediction: str,
) -> Array:
    """The mean squared error of each image's prediction, f32[b], at t i32[b] with the given noise."""
    x0 = latents.astype(jnp.float32)
    if prediction == "epsilon":
        target = noise
    elif prediction == "v":
        alpha_bar = per_image(jnp.asarray(schedule.alpha_bars, jnp.float32)[t], x0)
        target = jnp.sqrt(alpha_bar) * noise - jnp.sqrt(1 - alpha_bar) * x0
    else:
        raise ValueError(f'prediction must be "epsilon" or "v", found {prediction!r}')
    output = predict(q_sample(schedule, x0, t, noise), t, context)
    return jnp.square(output.astype(jnp.float32) - target).mean(tuple(range(1, x0.ndim)))


def _snr(alpha_bars: np.ndarray) -> np.ndarray:
    return alpha_bars / (1 - alpha_bars)


def _x0_factor(snr: np.ndarray, prediction: str) -> np.ndarray:
    """The squared error of x0_hat per squared error of the prediction."""
    return 1 / (snr + 1) if prediction == "v" else 1 / snr


def drop_prompts(context: Array, empty: Array, key: Array, probability: float) -> Array:
    """Each row replaced as a whole by the empty prompt, with this probability (Ho & Salimans 2022, algorithm 1).

    The network then learns the unconditional prediction, too, which guidance needs. context f[b, l, d] with empty
    f[l, d], the encoded empty prompt; or token ids i32[b, l] with empty i32[l].

    Raises:
        ValueError: `empty` has not the shape of a row.
    """
    if empty.shape != context.shape[1:]:
        raise ValueError(f"empty must have the shape of one row, {context.shape[1:]}, found {empty.shape}")
    dropped = jax.random.bernoulli(key, probability, context.shape[:1])
    return jnp.where(per_image(dropped, context), empty.astype(context.dtype), context)


def variational_bound(
    predict: Predict,
    schedule: NoiseSchedule,
    latents: Array,
    context: Array,
    key: Array,
    *,
    prediction: str = "epsilon",
    timesteps: Sequence[int] | None = None,
) -> Metrics:
    """The terms of the bound on -log p(x_0) in nats per latent dimension (Ho et al. 2020, eq. 5).

    The model that is scored: p(x_T) = N(0, I), then the chain over `timesteps` (rising; all T of the schedule by
    default, fewer make a shorter chain of the same network) with the posterior's mean at x0_hat and its variance,
    beta_tilde (eq. 7), which is zero for the last step, to x_0: there the variance is that step's beta (section 3.2).
    Each expectation over x_t is estimated by one draw of the noise per image and timestep; every timestep is visited,
    and the sum over them is exact. One timestep is computed at a time.

    latents f[b, h, w, c] ->
        "prior" f32[b]: KL(q(x_T | x_0) || p(x_T)), in closed form;
        "diffusion" f32[b, s - 1]: KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) of every step but the last to x_0,
            in the order of `timesteps[1:]`, (SNR_{t-1} - SNR_t) / 2 times the squared error of x0_hat;
        "reconstruction" f32[b]: -log p(x_0 | x_1), of a density, so that it may be negative;
        "total" f32[b]: their sum.

    Raises:
        ValueError: an unknown prediction, or timesteps that do not rise within [0, T).
    """
    total = len(schedule.alpha_bars)
    visited = np.arange(total) if timesteps is None else np.asarray(timesteps)
    if not (visited.size and visited[0] >= 0 and (np.diff(visited) > 0).all() and visited[-1] < total):
        raise ValueError(f"timesteps must rise within [0, {total}), found {timesteps!r}")
    alpha_bars = schedule.alpha_bars[visited]
    snr = _snr(alpha_bars)
    first = 1 - alpha_bars[0]  # beta of the step to x_0
    weights = np.append(1 / first, snr[:-1] - snr[1:]) / 2
    factors = jnp.asarray(weights * _x0_factor(snr, prediction), jnp.float32)

    def term(row: tuple[Array, Array, Array]) -> Array:
        t, factor, key = row
        noise = jax.random.normal(key, latents.shape)
        every = jnp.full(latents.shape[:1], t)
        return factor * _prediction_error(predict, schedule, latents, context, every, noise, prediction)

    rows = (jnp.asarray(visited, jnp.int32), factors, jax.random.split(key, len(visited)))
    terms = lax.map(term, rows).T
    mean = math.sqrt(alpha_bars[-1]) * latents.astype(jnp.float32)
    prior = gaussian_kl(mean, math.log1p(-alpha_bars[-1])).mean(tuple(range(1, latents.ndim)))
    reconstruction = terms[:, 0] + 0.5 * math.log(2 * math.pi * first)
    return {
        "prior": prior,
        "diffusion": terms[:, 1:],
        "reconstruction": reconstruction,
        "total": prior + terms[:, 1:].sum(1) + reconstruction,
    }


def bits_per_dim(nats: Array) -> Array:
    """Nats per dimension as bits per dimension."""
    return nats / math.log(2)


def gaussian_kl(mean: Array, logvar: Array | float) -> Array:
    """KL(N(mean, exp(logvar)) || N(0, 1)) of every entry, in nats (Kingma & Welling 2014, appendix B)."""
    return 0.5 * (jnp.square(mean) + jnp.expm1(logvar) - logvar)


def vae_loss(
    decode: Callable[[Array], Array],
    posterior: Posterior,
    images: Array,
    key: Array,
    *,
    sigma: float = 1.0,
    kl_weight: float = 1.0,
    l1: float = 0.0,
) -> tuple[Array, Metrics]:
    """-ELBO of the pictures in nats per dimension, H * W * 3 of them (Kingma & Welling 2014, eq. 10).

    decode: latents f[b, h, w, c] -> images f[b, H, W, 3]; the likelihood is N(decode(z), sigma^2 I) with z one draw of
    the posterior, q(z | x). images f[b, H, W, 3] in [-1, 1]; sigma in the same units. kl_weight other than 1 makes it
    the beta-VAE's (Higgins et al. 2017, eq. 4); l1 > 0 adds this times the mean absolute error.

    Metrics: "loss"; "reconstruction", -log p(x | z), and "kl", both in nats per dimension of the picture; "mse"; and
    "psnr", the mean over images of each one's 10 log10(2^2 / mse) in dB.
    """
    x = images.astype(jnp.float32)
    error = decode(posterior.sample(key)).astype(jnp.float32) - x
    mse = jnp.square(error).mean((1, 2, 3))
    reconstruction = 0.5 * (mse.mean() / sigma**2 + math.log(2 * math.pi * sigma**2))
    kl = gaussian_kl(posterior.mean, posterior.logvar).sum() / x.size
    loss = reconstruction + kl_weight * kl + l1 * jnp.abs(error).mean()
    psnr = (10 * jnp.log10(4 / mse)).mean()
    return loss, {"loss": loss, "reconstruction": reconstruction, "kl": kl, "mse": mse.mean(), "psnr": psnr}


def contrastive_loss(image: Array, text: Array, logit_scale: Array, same: Array | None = None) -> tuple[Array, Metrics]:
    """The symmetric cross-entropy of matching pictures with their texts (Radford et al. 2021, figure 3).

    image and text f[b, d], row i of one belongs to row i of the other; logits are their cosines times
    exp(logit_scale), at most MAX_LOGIT_SCALE. Above it the gradient passes as if it were not limited, so that the scale
    can come down again. same bool[b, b]: further right answers, same[i, j] = picture i with text j, where captions or
    pictures repeat; the target is then uniform over the right ones, and the loss of a perfect match is the entropy of
    the targets instead of 0.

    Metrics: "loss"; "accuracy", the part of the pictures whose nearest text of the batch is right; "scale", the factor.
    """
    image, text = (unit(x.astype(jnp.float32)) for x in (image, text))
    logit_scale = logit_scale.astype(jnp.float32)
    excess = jnp.maximum(logit_scale - math.log(MAX_LOGIT_SCALE), 0)
    scale = jnp.exp(logit_scale - lax.stop_gradient(excess))
    logits = scale * jnp.matmul(image, text.T, precision=lax.Precision.HIGHEST)
    right = jnp.eye(len(logits), dtype=bool) if same is None else same | jnp.eye(len(logits), dtype=bool)
    loss = (_cross_entropy(logits, right) + _cross_entropy(logits.T, right.T)) / 2
    accuracy = jnp.take_along_axis(right, logits.argmax(1)[:, None], axis=1).mean()
    return loss, {"loss": loss, "accuracy": accuracy, "scale": scale}


def unit(x: Array) -> Array:
    """f[..., d] at length 1."""
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def _cross_entropy(logits: Array, right: Array) -> Array:
    """The mean over rows of the cross-entropy with a uniform target over the right columns."""
    target = right / right.sum(1, keepdims=True)
    return -(target * jax.nn.log_softmax(logits)).sum(1).mean()
