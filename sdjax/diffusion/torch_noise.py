"""PyTorch's normal noise without PyTorch: what `torch.randn` draws from a generator on a CPU, one call after another.

PyTorch seeds a Mersenne Twister (Matsumoto & Nishimura 1998), makes uniform numbers of 24 bits and turns 16 of them
at a time into 16 normal ones (Box & Muller 1958): number j of the first eight is the radius, number j + 8 the angle.
A rest of fewer than 16 is filled by drawing the last 16 numbers anew. Below 16 numbers in all it works in float64,
pair by pair, from uniform numbers of 53 bits; the second of a pair that nobody has taken is kept for the next call.
`sdjax.diffusion.philox` has the numbers of its CUDA generator.
"""

from __future__ import annotations

import math

import numpy as np

BLOCK = 16


class TorchCpu:
    """`torch.Generator("cpu")` with a seed in [0, 2^32)."""

    def __init__(self, seed: int) -> None:
        self._words = np.random.RandomState(seed)._bit_generator.random_raw  # type: ignore[attr-defined]
        self._left: list[float] = []  # the second number of the last pair

    def randn(self, shape: tuple[int, ...]) -> np.ndarray:
        """The next torch.randn(shape, generator=...), f32[shape], up to rounding."""
        count = math.prod(shape)
        if count < BLOCK:
            return self._few(count).reshape(shape)
        normal, whole = self._uniform(count), count // BLOCK * BLOCK
        normal[:whole] = _in_blocks(normal[:whole])
        if whole < count:
            normal[-BLOCK:] = _in_blocks(self._uniform(BLOCK))
        return normal.reshape(shape)

    def _uniform(self, count: int) -> np.ndarray:
        return (self._words(count) & 0xFFFFFF).astype(np.float32) * np.float32(2.0**-24)

    def _few(self, count: int) -> np.ndarray:
        """Fewer than a block of numbers, f32[count]."""
        found = self._left[:count]
        pairs = self._words(4 * -(-(count - len(found)) // 2)).reshape(-1, 2, 2)
        high, low = pairs[..., 0].astype(np.uint64), pairs[..., 1].astype(np.uint64)
        uniform = ((high << np.uint64(32) | low) & np.uint64(2**53 - 1)) * 2.0**-53
        radius, angle = np.sqrt(-2 * np.log1p(-uniform[:, 1])), 2 * np.pi * uniform[:, 0]
        drawn = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()
        every = [*self._left, *drawn.tolist()]
        self._left = every[count:]
        return np.array(every[:count], np.float32)


def _in_blocks(uniform: np.ndarray) -> np.ndarray:
    """Uniform numbers f32[n], n a multiple of `BLOCK` -> as many normal ones."""
    first, second = np.moveaxis(uniform.reshape(-1, 2, BLOCK // 2), 1, 0)
    radius, angle = np.sqrt(-2 * np.log(1 - first)), np.float32(2 * np.pi) * second
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()


def torch_noise(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """torch.randn(shape, generator=torch.Generator().manual_seed(seed)), f32[shape], up to rounding."""
    return TorchCpu(seed).randn(shape)
