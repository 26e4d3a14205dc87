"""The normal noise that PyTorch draws on an NVIDIA GPU, made on the host: a counter, enciphered, then Box & Muller.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") turns a counter of four words under a
key of two into four random words. CUDA's threads have a counter each, (call, 0, thread, 0), and the seed is the key.
Up to as many numbers as a GPU runs threads at once, each thread makes one normal number, of its first two words:

    u = (x + 1/2) / 2^32,  v = 2 pi (y + 1/2) / 2^32,  sqrt(-2 ln u) sin v.

That is so for the latents of pictures: an H100 runs 270,336 threads, a T4 40,960 (from 816 x 816 pixels on it draws
others). The GPU works in float32; here it is float64, rounded once, so that numbers agree up to the GPU's own rounding:
to about 1e-6, to 3e-4 for a few near 0. Tools for pictures call this source "NV".
"""

from __future__ import annotations

import math

import numpy as np

ROUNDS = 10
MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
WEYL = 0x9E3779B9, 0xBB67AE85  # the key grows by these from round to round: golden ratio and sqrt(3) - 1, times 2^32
WORD = 2**32
LOW, HALF = np.uint64(WORD - 1), np.uint64(32)
STEP = 2.0**-32
TURN = float(np.float32(2 * np.pi)) * STEP  # of a whole circle, as CUDA rounds it


def philox(counter: tuple[np.ndarray | int, ...], key: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Philox4x32-10 of counters, four words each, in one key: four random words each, u64[...] below 2^32.

    counter: four arrays that broadcast together; key: two words. Words are whole numbers in [0, 2^32).
    """
    a, b, c, d = np.broadcast_arrays(*(np.asarray(word, np.uint64) for word in counter))
    for i in range(ROUNDS):
        first, second = (np.uint64((word + i * weyl) % WORD) for word, weyl in zip(key, WEYL, strict=True))
        left, right = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a, b, c, d = (right >> HALF) ^ b ^ first, right & LOW, (left >> HALF) ^ d ^ second, left & LOW
    return a, b, c, d


class TorchCuda:
    """`torch.Generator("cuda")` with a seed in [0, 2^64)."""

    def __init__(self, seed: int) -> None:
        self.key, self.calls = (seed % WORD, seed // WORD), 0

    def randn(self, shape: tuple[int, ...]) -> np.ndarray:
        """The next torch.randn(shape, device="cuda", generator=...), f32[shape], up to rounding."""
        x, y, _, _ = philox((self.calls, 0, np.arange(math.prod(shape)), 0), self.key)
        self.calls += 1
        u, v = x * STEP + STEP / 2, y * TURN + TURN / 2
        return (np.sqrt(-2 * np.log(u)) * np.sin(v)).astype(np.float32).reshape(shape)
