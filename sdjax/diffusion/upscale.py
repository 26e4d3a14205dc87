"""Latents and pictures brought to a larger size between two passes (hires-fix).

Every way is linear and works along one axis at a time, so it is two matrices: x' = R x C^T. The matrices of latents are
those of torch.nn.functional.interpolate without aligned corners, which A1111 uses; pictures go by Pillow's filters.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

Kernel = Callable[[np.ndarray], np.ndarray]


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(1 - np.abs(x), 0.0)


def _cubic(a: float) -> Kernel:
    """The cubic convolution kernel (Keys 1981, eq. 4) with its free parameter."""

    def kernel(x: np.ndarray) -> np.ndarray:
        x = np.abs(x)
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
        return np.where(x <= 1, near, np.where(x < 2, far, 0.0))

    return kernel


def _clamped(count: int, size: int, kernel: Kernel, reach: int) -> np.ndarray:
    """f64[size, count]: each value from the `2 reach` nearest ones; beyond the edge the last one is repeated."""
    at = (np.arange(size) + 0.5) * count / size - 0.5
    if reach == 1:
        at = np.maximum(at, 0.0)
    matrix = np.zeros((size, count))
    for offset in range(1 - reach, 1 + reach):
        place = np.floor(at).astype(int) + offset
        np.add.at(matrix, (np.arange(size), np.clip(place, 0, count - 1)), kernel(at - place))
    return matrix


def _antialiased(count: int, size: int, kernel: Kernel, reach: int) -> np.ndarray:
    """f64[size, count]: the kernel, widened where the size shrinks, over what lies within the edges."""
    wide = max(count / size, 1.0)
    at = (np.arange(size) + 0.5) * count / size
    matrix = kernel((np.arange(count)[None] + 0.5 - at[:, None]) / wide)
    return matrix / matrix.sum(axis=1, keepdims=True)


def _nearest(count: int, size: int, shift: float) -> np.ndarray:
    matrix = np.zeros((size, count))
    matrix[np.arange(size), ((np.arange(size) + shift) * count / size).astype(int)] = 1
    return matrix


LATENT_UPSCALERS: dict[str, Callable[[int, int], np.ndarray]] = {
    "latent": lambda count, size: _clamped(count, size, _triangle, 1),
    "latent_antialiased": lambda count, size: _antialiased(count, size, _triangle, 1),
    "latent_bicubic": lambda count, size: _clamped(count, size, _cubic(-0.75), 2),
    "latent_bicubic_antialiased": lambda count, size: _antialiased(count, size, _cubic(-0.5), 2),
    "latent_nearest": lambda count, size: _nearest(count, size, 0.0),
    "latent_nearest_exact": lambda count, size: _nearest(count, size, 0.5),
}
"""Upscalers of latents: (cells there are, cells wanted) -> a matrix f64[wanted, there]."""

PICTURE_UPSCALERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "nearest": Image.Resampling.NEAREST,
}
"""Upscalers of pictures, between decoding and encoding."""


def covering(size: tuple[int, int], wanted: tuple[int, int]) -> tuple[int, int]:
    """The least size of the same shape that covers `wanted`; both (width, height). What is beyond is cut off evenly."""
    scale = max(wanted[0] / size[0], wanted[1] / size[1])
    width, height = (max(round(side * scale), least) for side, least in zip(size, wanted, strict=True))
    return width, height


def upscaled_latents(latents: np.ndarray, size: tuple[int, int], upscaler: str) -> np.ndarray:
    """Latents f32[h, w, c] at `size` (cells wide, high), by one of `LATENT_UPSCALERS`; of another shape the centre."""
    height, width = latents.shape[:2]
    matrix = LATENT_UPSCALERS[upscaler]
    wide, high = covering((width, height), size)
    larger = np.einsum("Hh,Ww,hwc->HWc", matrix(height, high), matrix(width, wide), latents, optimize=True)
    left, top = (wide - size[0]) // 2, (high - size[1]) // 2
    return larger[top : top + size[1], left : left + size[0]].astype(np.float32)


def upscaled_picture(picture: Image.Image, size: tuple[int, int], upscaler: str) -> Image.Image:
    """A picture at `size` (width, height) in pixels, by one of `PICTURE_UPSCALERS`; the centre of another shape."""
    wide, high = covering(picture.size, size)
    larger = picture.resize((wide, high), PICTURE_UPSCALERS[upscaler])
    left, top = (wide - size[0]) // 2, (high - size[1]) // 2
    return larger.crop((left, top, left + size[0], top + size[1]))
