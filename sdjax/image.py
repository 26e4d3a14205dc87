"""Pictures and masks: from any file to the arrays that the networks take, and back to the size they had.

Pictures are f32[H, W, 3] in [-1, 1]; masks f32[H, W] in [0, 1], 1 = paint here. H and W are multiples of the
autoencoder's downscale, 8 for the published models.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageOps

from sdjax.types import Array

MAX_PIXELS = 1024 * 1024
"""Working size of a photograph when none was asked for: larger ones are worked on at this area."""

AnyArray = TypeVar("AnyArray", np.ndarray, Array)
ImageLike = str | Path | Image.Image


def open_image(source: ImageLike) -> Image.Image:
    """A picture of any mode, upright by its EXIF orientation, decoded; of an animation, the first frame.

    Raises:
        FileNotFoundError: no such file. ValueError: not a picture, damaged, empty, or too many pixels.
        TypeError: neither a path nor a PIL image.
    """
    if not isinstance(source, str | Path | Image.Image):
        raise TypeError(f"expected a path or a PIL image, found {type(source).__name__}")
    name = "this picture" if isinstance(source, Image.Image) else source
    if isinstance(source, str | Path) and not Path(source).is_file():
        raise FileNotFoundError(f"{name}: no such picture file")
    try:
        with nullcontext(source) if isinstance(source, Image.Image) else Image.open(source) as image:
            upright = ImageOps.exif_transpose(image)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}: {error}; shrink the picture first") from None
    except (OSError, ValueError, SyntaxError, EOFError, RuntimeError) as error:
        raise ValueError(f"{name}: not a picture that can be read ({error})") from None
    if 0 in upright.size:
        raise ValueError(f"{name}: empty, there are no pixels ({upright.width}x{upright.height})")
    return upright


def _scaled_grey(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bit, or floating point, brought to 8 bit by scaling, not by clipping."""
    values = np.nan_to_num(np.asarray(image, np.float64))
    if image.mode == "F":
        top = 1.0 if values.max(initial=0) <= 1 else 255.0 if values.max() <= 255 else 65535.0
    else:
        top = 255.0 if values.max(initial=0) <= 255 and image.mode == "I" else 65535.0
    return Image.fromarray(np.round(np.clip(values / top, 0, 1) * 255).astype(np.uint8))


def _flat(image: Image.Image, backdrop: str) -> Image.Image:
    """The picture in 8 bit, its transparent parts laid over a colour."""
    if image.mode.startswith(("I", "F")):
        return _scaled_grey(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, backdrop), image)
    return image


def load_image(source: ImageLike) -> Image.Image:
    """A picture as 8-bit RGB; transparent parts are laid over white. Errors as `open_image`."""
    return _flat(open_image(source), "white").convert("RGB")


def load_mask(source: ImageLike, size: tuple[int, int]) -> np.ndarray:
    """A mask of any mode as f32[H, W] in [0, 1] for a picture of `size` (width, height); white = paint.

    Grey values make a soft mask. A mask with transparency is laid over black. A mask of another size is
    scaled to the picture's if it has the same aspect (within 2 %).

    Raises:
        ValueError: another aspect than the picture's, or nothing to paint; else as `open_image`.
    """
    image = _flat(open_image(source), "black").convert("L")
    width, height = size
    if abs(math.log(image.width * height / (image.height * width))) > 0.02:
        raise ValueError(
            f"the mask is {image.width}x{image.height} and the picture {width}x{height}; "
            "make a mask of the picture's size or of the same shape"
        )
    if image.size != size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    mask = np.asarray(image, np.float32) / 255
    if not mask.any():
        raise ValueError("the mask is black everywhere; paint the part to be made anew white")
    return mask


def working_size(
    size: tuple[int, int],
    *,
    asked: tuple[int, int] | None = None,
    multiple: int = 8,
    max_pixels: int = MAX_PIXELS,
) -> tuple[int, int]:
    """The (width, height) to generate at: what was asked for, else the picture's own, rounded.

    Without `asked`: scaled down to `max_pixels` if larger, then each side to the nearest multiple.

    Raises:
        ValueError: a side that was asked for is no positive multiple of `multiple`.
    """
    if asked is not None:
        width, height = asked
        if not all(isinstance(side, int | np.integer) for side in asked):
            raise ValueError(f"width and height must be whole numbers of pixels, found {width!r} and {height!r}")
        if width < multiple or height < multiple or width % multiple or height % multiple:
            raise ValueError(
                f"width and height must be multiples of {multiple}, found {width}x{height}; "
                f"try {max(multiple, round(width / multiple) * multiple)}x"
                f"{max(multiple, round(height / multiple) * multiple)}"
            )
        return width, height
    shrink = min(1.0, math.sqrt(max_pixels / (size[0] * size[1])))
    width, height = (max(multiple, round(side * shrink / multiple) * multiple) for side in size)
    return width, height


def fit(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture at `size`: scaled to cover it, then cropped around the centre (Lanczos).

    Where the aspects differ by less than one part in 16 it is scaled alone, and nothing is cropped.
    """
    if image.size == size:
        return image
    ratio = (image.width * size[1]) / (image.height * size[0])
    if abs(math.log(ratio)) < 1 / 16:
        return image.resize(size, Image.Resampling.LANCZOS)
    return ImageOps.fit(image, size, Image.Resampling.LANCZOS)


def to_array(image: Image.Image) -> np.ndarray:
    """RGB picture -> f32[H, W, 3] in [-1, 1]."""
    return from_uint8(np.asarray(image))


def from_uint8(pixels: AnyArray) -> AnyArray:
    """u8[..., 3] -> f32[..., 3] in [-1, 1], numpy or JAX as it came; traceable."""
    return pixels.astype(np.float32) / 127.5 - 1


def to_uint8(images: Array) -> Array:
    """f[b, H, W, 3] in [-1, 1] -> u8[b, H, W, 3], clipped and rounded; traceable, so it runs on the device."""
    images = images.astype(jnp.float32)
    return jnp.round(jnp.clip(images / 2 + 0.5, 0, 1) * 255).astype(jnp.uint8)


def latent_mask(mask: Array, downscale: int) -> Array:
    """mask f[b, H, W, 1] -> f[b, h, w, 1], every `downscale`-th pixel (nearest, as diffusers takes it)."""
    return mask[:, ::downscale, ::downscale]


def paste_back(original: Image.Image, generated: Image.Image, mask: np.ndarray) -> Image.Image:
    """original where the mask f32[H, W] is 0 (to the byte), generated where it is 1, a blend between."""
    old, new = np.asarray(original, np.float32), np.asarray(generated, np.float32)
    blend = old + mask[..., None] * (new - old)
    return Image.fromarray(np.round(blend).astype(np.uint8))


def to_images(pixels: Array) -> list[Image.Image]:
    """u8[b, H, W, 3] on any device -> PIL pictures, in one transfer."""
    return [Image.fromarray(picture) for picture in np.asarray(jax.device_get(pixels))]
