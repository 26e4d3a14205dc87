"""Names shared by every module: array aliases, the axis letters, and the noise level that travels through sampling.

Axis letters, the same everywhere: b images, h w latent grid, H W pixels, c channels, l tokens, d
width, n heads, s steps.
Units: sigma in latent standard deviations, t in training timesteps [0, 999], images in [-1, 1].
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


class Level(NamedTuple):
    """One noise level in both views, so that x = x0 + sigma * eps, and what holds there.

    sigma: f32[] or f32[b], noise standard deviation in latent units.
    t: f32[] or f32[b], the training timestep that the network is told, in [0, 999] (fractions
    allowed).
    time: whatever the network has precomputed from t (`UNet.time_table`), or None.
    guidance: of the prompt at this level, or None for a network that knows nothing of it.
    """

    sigma: Any
    t: Any
    time: Any = None
    guidance: Guidance | None = None


Predictor = Callable[[Latent, Level], Latent]  # (scaled latent, level) -> the network's output (epsilon or v)
Denoiser = Callable[[Latent, Level], Latent]  # (x, level) -> x0_hat
