"""What the model believes: from the network's output to x0_hat, and the wrappers that change that
belief.

Functions of functions, composed inside the jitted sampler:
network -> `guided` -> `to_denoiser` -> `keep_known`. Values such as the guidance are traced, f32[]
or one per image f32[b], so that changing them compiles nothing.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from sdjax.diffusion.schedule import per_image
from sdjax.types import Array, Denoiser, Latent, Level, Predictor


def to_denoiser(predict: Predictor, prediction: str) -> Denoiser:
    """x0_hat from a network that predicts "epsilon" or "v" at the scaled input x / sqrt(sigma^2 +
    1).

    epsilon: x0_hat = x - sigma eps (Ho et al. 2020, eq. 15 in sigma space).
    v: x0_hat = x / (sigma^2 + 1) - sigma / sqrt(sigma^2 + 1) v (Salimans & Ho 2022, appendix D).
    The result has the dtype of x, float32 in every sampler, whatever the network computes in.
    """

    def denoise(x: Latent, level: Level) -> Latent:
        sigma = per_image(level.sigma, x)
        scale = jnp.reciprocal(jnp.sqrt(sigma**2 + 1))
        output = predict(x * scale, level).astype(x.dtype)
        if prediction == "v":
            return x * scale**2 - sigma * scale * output
        return x - sigma * output

    return denoise


def guided(pair: Predictor, positive: Predictor) -> Predictor:
    """Classifier-free guidance: negative + scale (positive - negative) (Ho & Salimans 2022, eq. 6).

    pair: x f[b, ...] -> f[2b, ...], the rows of the negative prompt, then of the positive one; positive: -> f[b, ...],
    these alone. Where `level.guidance` says that no picture is steered, only `positive` is evaluated, at half the work
    (Kynkaanniemi et al. 2024, section 3). rescale pulls the standard deviation of the result back to the positive
    prediction's (Lin et al. 2024, eq. 14-16).
    """

    def steered(x: Latent, level: Level) -> Latent:
        negative, own = jnp.split(pair(x, level).astype(x.dtype), 2)
        scale = per_image(level.guidance.scale, x)  # type: ignore[union-attr]
        output = negative + scale * (own - negative)
        axes = tuple(range(1, x.ndim))
        ratio = own.std(axes, keepdims=True) / output.std(axes, keepdims=True)
        output *= 1 + per_image(level.guidance.rescale, x) * (ratio - 1)  # type: ignore[union-attr]
        return jnp.where(scale == 1, own, output)

    def predict(x: Latent, level: Level) -> Latent:
        if level.guidance is None:
            return positive(x, level)
        used = jnp.any(level.guidance.used)
        return lax.cond(used, steered, lambda x, level: positive(x, level).astype(x.dtype), x, level)

    return predict


def keep_known(denoise: Denoiser, known: Latent, mask: Array) -> Denoiser:
    """Inpainting with a model that has never seen a mask: where the mask is 0, x0 is known.

    x0_hat = mask x0_hat + (1 - mask) known, mask f[b, h, w, 1] in [0, 1], 1 = paint. A
    deterministic sampler that starts at known + sigma noise then passes through known + sigma'
    noise at every later level, which is what renoising and pasting the known region at each step
    does (Lugmayr et al. 2022, eq. 8).
    """

    def denoise_unknown(x: Latent, level: Level) -> Latent:
        x0_hat = denoise(x, level)
        return jnp.where(mask == 1, x0_hat, known + mask * (x0_hat - known))

    return denoise_unknown
