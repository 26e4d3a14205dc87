"""The noise of one picture, drawn on the host: from which source, in which order, and between two seeds.

A source is a generator with a seed and a method randn(shape) that draws the next unit normal numbers. The order is that
of tools that have one generator a picture (A1111, diffusers with a `torch.Generator`): first what it starts from, then,
for a sampler that adds noise, once for each row that does. Samplers of SDEs (dpmpp_sde, dpmpp_2m_sde) take theirs from
a Brownian tree in those tools: here they draw in order too, so their pictures are others.

Two more settings come from A1111: a variation of a seed lies on the way to another seed's noise, and a picture of
another size lends its noise to the middle of this one's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import jax
import numpy as np

from sdjax.diffusion.philox import TorchCuda
from sdjax.diffusion.sample import image_keys, initial_noise
from sdjax.diffusion.torch_noise import TorchCpu

ALIKE = 0.9995
"""The mean cosine from which on two noises count as the same, and a straight line goes from one to the other."""


class Generator(Protocol):
    """Where numbers come from."""

    def randn(self, shape: tuple[int, ...]) -> np.ndarray:
        """The next unit normal numbers, f32[shape]; shape is (c, h, w)."""


_initial_noise = jax.jit(initial_noise, static_argnums=1)


class JaxNoise:
    """The source of pictures in this library, of which only the first draw is made on the host."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def randn(self, shape: tuple[int, ...]) -> np.ndarray:
        """The noise f32[c, h, w] that the seed's picture starts from (`initial_noise`)."""
        channels, height, width = shape
        return np.asarray(_initial_noise(image_keys([self.seed]), (height, width, channels)))[0].transpose(2, 0, 1)


SOURCES: dict[str, Callable[[int], Generator]] = {"jax": JaxNoise, "torch": TorchCpu, "torch-cuda": TorchCuda}
"""The sources by name. All but jax draw on for the sampler; with jax the sampler draws in its program."""


def slerp(share: float, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The noise f32[c, h, w] between two: 0 is the first, 1 the second; unit normal all the way.

    Spherical interpolation (Shoemake 1985), as A1111 takes it for variation seeds: along the axis h alone, so that
    every column of every channel turns by an angle of its own,

        sin((1 - share) omega) / sin(omega) first + sin(share omega) / sin(omega) second,  omega their angle.

    A straight line where the two are the same noise, or a column has no angle to turn by (omega 0 or pi).
    """

    def unit(noise: np.ndarray) -> np.ndarray:
        return noise / np.linalg.norm(noise, axis=1, keepdims=True)

    cosine = np.clip((unit(first) * unit(second)).sum(axis=1, keepdims=True), -1, 1)
    omega = np.arccos(cosine)
    straight = (np.sin(omega) < 1e-6) | (cosine.mean() > ALIKE)
    safe = np.where(straight, np.float32(np.pi / 2), omega)
    before = np.where(straight, 1 - share, np.sin((1 - share) * safe) / np.sin(safe))
    after = np.where(straight, share, np.sin(share * safe) / np.sin(safe))
    return np.float32(before) * first + np.float32(after) * second


def centred(inner: np.ndarray, outer: np.ndarray) -> np.ndarray:
    """The noise `outer` f32[c, h, w] with `inner` f32[c, h', w'] in its middle, cut where it is larger.

    With an odd number of cells over, the middle lies towards the top and the left, as in A1111.
    """
    found = outer.copy()
    of_inner, of_outer = [slice(None)], [slice(None)]
    for own, other in zip(inner.shape[1:], outer.shape[1:], strict=True):
        start = (other - own) // 2
        length = own if start >= 0 else own + 2 * start
        of_outer.append(slice(max(start, 0), max(start, 0) + length))
        of_inner.append(slice(max(-start, 0), max(-start, 0) + length))
    found[tuple(of_outer)] = inner[tuple(of_inner)]
    return found


def picture_noise(
    source: str,
    seed: int,
    shape: tuple[int, int, int],
    *,
    variation: tuple[int, float] | None = None,
    of_size: tuple[int, int] | None = None,
    adds: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """The unit normal noise f32[h, w, c] that a picture starts from, and f32[s, h, w, c] that its sampler adds.

    source: one of `SOURCES`.
    shape: (h, w, c) of its latents.
    variation: another seed, and how far to go towards its noise, in [0, 1].
    of_size: (h, w) of the picture whose noise is put in the middle; None: its own.
    adds: bool[s], the sampler's rows that add noise; None: none is drawn for them. Those that do not have zeros.
    """
    height, width, channels = shape
    whole, make = (channels, height, width), SOURCES[source]
    part = whole if of_size is None else (channels, *of_size)
    own = make(seed)
    noise = (own if part == whole else make(seed)).randn(part)
    if variation is not None:
        noise = slerp(variation[1], noise, make(variation[0]).randn(part))
    if part != whole:
        noise = centred(noise, own.randn(whole))
    if adds is None:
        return noise.transpose(1, 2, 0), None
    added = np.zeros((len(adds), *shape), np.float32)
    for row in np.flatnonzero(adds):
        added[row] = own.randn(whole).transpose(1, 2, 0)
    return noise.transpose(1, 2, 0), added
