"""What the model believes: from the network's output to x0_hat, and the wrappers that change that
belief.

Functions of functions, composed inside the jitted sampler:
network -> `guided` -> `to_denoiser` -> `keep_known`. Values such as the guidance are traced, f32[]
or one per image f32[b], so that changing them compiles nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import lax

from sdjax.devices.platform import platform
from sdjax.diffusion.schedule import per_image
from sdjax.types import Array, Denoiser, Guidance, Latent, NoiseLevel, Predictor


def to_denoiser(predict: Predictor, prediction: str) -> Denoiser:
    """x0_hat from a network that predicts "epsilon" or "v" at the scaled input x / sqrt(sigma^2 +
    1).

    epsilon: x0_hat = x - sigma eps (Ho et al. 2020, eq. 15 in sigma space).
    v: x0_hat = x / (sigma^2 + 1) - sigma / sqrt(sigma^2 + 1) v (Salimans & Ho 2022, appendix D).
    The result has the dtype of x, float32 in every sampler, whatever the network computes in.
    """

    def denoise(x: Latent, level: NoiseLevel) -> Latent:
        sigma = per_image(level.sigma, x)
        scale = jnp.reciprocal(jnp.sqrt(sigma**2 + 1))
        output = predict(x * scale, level).astype(x.dtype)
        if prediction == "v":
            return x * scale**2 - sigma * scale * output
        return x - sigma * output

    return denoise


def guided(
    pair: Predictor,
    one: Callable[[Array | int, Latent, NoiseLevel], Latent],
    strengths: Array | None = None,
    parts: Array | None = None,
) -> Predictor:
    """Classifier-free guidance: negative + scale (positive - negative) (Ho & Salimans 2022, eq. 6).

    pair: x f[b, ...] -> f[2b, ...], the rows of the negative prompt, then of the positive one; one: with 0 or 1 before
    its arguments, -> f[b, ...], either of these alone, or with 2, 3, ... further prompts. Where `level.guidance` says
    that no picture is steered, only the positive ones are evaluated, at half the work (Kynkaanniemi et al. 2024,
    section 3). rescale pulls the standard deviation of the result back to the positive prediction's (Lin et al. 2024,
    eq. 14-16).

    strengths: f[b, P], of positive prompts that act together: negative + scale sum_k strength_k (positive_k - negative)
    (Liu et al. 2022, eq. 11); parts: i32[b], how many of the P are there. None: one prompt of strength 1.

    On a CPU, where two calls are as fast as one of twice the rows, `one` is called in a loop: a program with one copy
    of the network compiles in half the time. So is everywhere what has more than one positive prompt.
    """

    weights = jnp.ones((1, 1)) if strengths is None else strengths
    count = jnp.ones(1, jnp.int32) if parts is None else parts

    def steer(negative: Latent, positive: Sequence[Latent], guidance: Guidance) -> Latent:
        own, scale = positive[0], per_image(guidance.scale, negative)
        together = jnp.zeros_like(own)
        for k, output in enumerate(positive):
            there, weight = per_image(k < count, own), per_image(weights[:, k], own)
            together += jnp.where(there, weight * (output - negative), 0)
        alone = per_image((weights[:, 0] == 1) & (count == 1), own)
        output = negative + scale * together
        reference = jnp.where(alone, own, negative + together)
        axes = tuple(range(1, own.ndim))
        ratio = reference.std(axes, keepdims=True) / output.std(axes, keepdims=True)
        output *= 1 + per_image(guidance.rescale, own) * (ratio - 1)
        return jnp.where((scale == 1) & alone, own, output)

    def at_once(x: Latent, level: NoiseLevel, guidance: Guidance) -> Latent:
        def both() -> Latent:
            negative, own = jnp.split(pair(x, level).astype(x.dtype), 2)
            return steer(negative, [own], guidance)

        together = jnp.any(guidance.used) & (jnp.max(count) == 1)
        return lax.cond(together, both, lambda: in_turn(x, level, guidance))

    def in_turn(x: Latent, level: NoiseLevel, guidance: Guidance) -> Latent:
        used = jnp.any(guidance.used)

        def each(index: Array) -> Latent:
            called = jnp.where(index == 0, used, index <= jnp.max(count))
            return lax.cond(called, lambda: one(index, x, level).astype(x.dtype), lambda: jnp.zeros_like(x))

        negative, *positive = lax.map(each, jnp.arange(1 + weights.shape[1]))
        return jnp.where(used, steer(negative, positive, guidance), positive[0])

    def predict(x: Latent, level: NoiseLevel) -> Latent:
        if level.guidance is None:
            return one(1, x, level)
        return (in_turn if platform() == "cpu" else at_once)(x, level, level.guidance)

    return predict


def keep_known(denoise: Denoiser, known: Latent, mask: Array) -> Denoiser:
    """Inpainting with a model that has never seen a mask: where the mask is 0, x0 is known.

    x0_hat = mask x0_hat + (1 - mask) known, mask f[b, h, w, 1] in [0, 1], 1 = regenerate. A
    deterministic sampler that starts at known + sigma noise then passes through known + sigma'
    noise at every later level, which is what renoising and pasting the known region at each step
    does (Lugmayr et al. 2022, eq. 8).

    A level with a threshold has a mask of its own, 1 where the given one reaches the threshold and 0 elsewhere: a
    pixel of value m is free in the last fraction m of the steps (Levin & Fried 2023, "Differential Diffusion",
    algorithm 1).
    """

    def denoise_unknown(x: Latent, level: NoiseLevel) -> Latent:
        x0_hat, here = denoise(x, level), mask
        if level.threshold is not None:
            threshold = per_image(level.threshold, x)
            here = jnp.where(threshold < 0, mask, (mask >= threshold).astype(mask.dtype))
        return jnp.where(here == 1, x0_hat, known + here * (x0_hat - known))

    return denoise_unknown
