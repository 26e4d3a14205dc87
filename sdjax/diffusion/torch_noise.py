"""PyTorch's normal noise without PyTorch: `torch.randn` on a CPU, for seeds that people know from other tools.

PyTorch seeds a Mersenne Twister (Matsumoto & Nishimura 1998), makes uniform numbers of 24 bits and turns 16 of them
at a time into 16 normal ones (Box & Muller 1958): number j of the first eight is the radius, number j + 8 the angle.
A rest of fewer than 16 is filled by drawing the last 16 numbers anew. Below 16 numbers in all it works in float64,
pair by pair, from uniform numbers of 53 bits.
"""

from __future__ import annotations

import math

import numpy as np

BLOCK = 16


def torch_noise(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """torch.randn(shape, generator=torch.Generator().manual_seed(seed)), f32[shape], up to rounding."""
    count = math.prod(shape)
    words = np.random.RandomState(seed)._bit_generator.random_raw  # type: ignore[attr-defined]
    if count < BLOCK:
        pairs = words(4 * -(-count // 2)).reshape(-1, 2, 2)
        high, low = pairs[..., 0].astype(np.uint64), pairs[..., 1].astype(np.uint64)
        uniform = ((high << np.uint64(32) | low) & np.uint64(2**53 - 1)) * 2.0**-53
        radius, angle = np.sqrt(-2 * np.log1p(-uniform[:, 1])), 2 * np.pi * uniform[:, 0]
        normal = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()[:count]
        return normal.astype(np.float32).reshape(shape)

    def drawn(count: int) -> np.ndarray:
        return (words(count) & 0xFFFFFF).astype(np.float32) * np.float32(2.0**-24)

    def in_blocks(uniform: np.ndarray) -> np.ndarray:
        first, second = np.moveaxis(uniform.reshape(-1, 2, BLOCK // 2), 1, 0)
        radius, angle = np.sqrt(-2 * np.log(1 - first)), np.float32(2 * np.pi) * second
        return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()

    normal, whole = drawn(count), count // BLOCK * BLOCK
    normal[:whole] = in_blocks(normal[:whole])
    if whole < count:
        normal[-BLOCK:] = in_blocks(drawn(BLOCK))
    return normal.reshape(shape)
