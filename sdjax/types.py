"""Types shared by every module: array aliases, the noise level, and what a sampling loop is conditioned on.

Axis letters, the same everywhere: b pictures (always the first axis), s rows of a sampler, h w latent grid, H W pixels,
c channels, l tokens, d width, n heads.
Units: sigma in latent standard deviations, t in training timesteps [0, 999], pictures in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

Array = jax.Array
Params = Mapping[str, Any]  # nested dicts of arrays
Latent = Array  # f32[b, h, w, c]


class Guidance(NamedTuple):
    """How a prompt steers at one noise level.

    scale: f32[] or f32[b], of classifier-free guidance; 1 leaves the negative prompt out. rescale: f32[] or f32[b] in
    [0, 1], against overexposure. used: bool[] or bool[b], whether the scale is not 1: where it is for no picture, the
    negative prompt is not evaluated.
    """

    scale: Any
    rescale: Any
    used: Any


class NoiseLevel(NamedTuple):
    """One noise level in both views, so that x = x0 + sigma * eps, and what is steered and held there.

    sigma: f32[] or f32[b], noise standard deviation in latent units.
    t: f32[] or f32[b], the training timestep that the network is told, in [0, 999] (fractions allowed).
    guidance: of the prompt at this level, or None for a network that knows nothing of it.
    threshold: f32[] or f32[b], the value of a soft mask from which pixels are free at this level; below 0, or None: the
    mask blends, at every level alike.
    """

    sigma: Any
    t: Any
    guidance: Guidance | None = None
    threshold: Any = None


class Conditioning(NamedTuple):
    """All that the networks in the sampling loop see besides x and the noise level, pictures along the first axis.

    contexts: f[b, V, l, d], the encoded texts of each picture; keys: i32[b, V], the rows of them that are attended to.
    texts: i32[b, s, 1 + P], which of them every row of the sampler sees: negative prompt, then parts joined by AND.
    changed: bool[b, s], where these are others than a row before.
    strengths: f32[b, P], the weight of each part; parts: i32[b], how many there are.
    shifts: {"unet": the timestep's shift of every residual block at every row of the sampler, f[b, s, c]}.
    gates: f[b, sections, R], each picture's weight of every rank of the live adapters; R = 0 without.
    known: f[b, h, w, c], scaled latents of a picture to keep parts of.
    mask: f[b, h, w, 1], 0 where `known` is kept (1 everywhere: nothing is kept).
    concat: f[b, h, w, k], channels behind the latent; k = 0 for models without.
    """

    contexts: Any
    keys: Any
    texts: Any
    changed: Any
    strengths: Any
    parts: Any
    shifts: Any
    gates: Any
    known: Any
    mask: Any
    concat: Any


Predictor = Callable[[Latent, NoiseLevel], Latent]  # (scaled latent, level) -> the network's output (epsilon or v)
Denoiser = Callable[[Latent, NoiseLevel], Latent]  # (x, level) -> x0_hat
