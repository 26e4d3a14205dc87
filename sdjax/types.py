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


class Level(NamedTuple):
    """One noise level in both views, so that x = x0 + sigma * eps.

    sigma: f32[] or f32[b], noise standard deviation in latent units.
    t: f32[] or f32[b], the training timestep that the network is told, in [0, 999] (fractions
    allowed).
    time: whatever the network has precomputed from t (`UNet.time_table`), or None.
    """

    sigma: Any
    t: Any
    time: Any = None


Predictor = Callable[[Latent, Level], Latent]  # (scaled latent, level) -> the network's output (epsilon or v)
Denoiser = Callable[[Latent, Level], Latent]  # (x, level) -> x0_hat
