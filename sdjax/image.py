"""Pictures and masks: from any file to the arrays that the networks take, and back to the size they had.

Pictures are f32[H, W, 3] in [-1, 1]; masks f32[H, W] in [0, 1], 1 = regenerate here. H and W are multiples of the
autoencoder's downscale, 8 for the published models.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from sdjax.config import LARGEST_SIDE

if TYPE_CHECKING:
    from sdjax.types import Array

MAX_PIXELS = 1024 * 1024
"""Working size of a photograph when none was asked for: larger ones are worked on at this area."""

AnyArray = TypeVar("AnyArray", np.ndarray, "Array")
ImageLike = str | Path | Image.Image


UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What sets a picture upright, by its EXIF orientation (EXIF 2.3, section 4.6.4)."""

ORIENTATION = 0x0112


def open_image(source: ImageLike) -> Image.Image:
    """A picture of any mode, upright by its EXIF orientation, decoded; of an animation, the first frame.

    Metadata never stops its use: what cannot be read of it is passed over.

    Raises:
        FileNotFoundError: no such file. ValueError: not a picture, damaged, empty, or too many pixels.
        TypeError: neither a path nor a PIL image.
    """
    _refuse_missing(source)
    if isinstance(source, Image.Image):
        return _explained("this picture", lambda: _decoded(source))
    return open_bytes(Path(source).read_bytes(), str(source))


def open_bytes(data: bytes, name: str) -> Image.Image:
    """The content of a picture's file as `open_image` gives it, and errors as there. name: for messages."""
    return _explained(name, lambda: _opened(data))


def _explained(name: str, decode: Callable[[], Image.Image]) -> Image.Image:
    try:
        upright = decode()
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}: {error}; shrink the picture first") from None
    except MemoryError:
        raise ValueError(f"{name}: too large for the memory of this machine; shrink the picture first") from None
    except Exception as error:  # Pillow raises almost anything on a damaged file
        reason = re.sub(r"<_io.BytesIO object at \w+>", "", str(error))
        reason = " ".join(reason.split()) or type(error).__name__
        raise ValueError(f"{name}: not a picture that can be read ({reason})") from None
    if 0 in upright.size:
        raise ValueError(f"{name}: empty, there are no pixels ({upright.width}x{upright.height})")
    return upright


def _refuse_missing(source: ImageLike) -> None:
    if not isinstance(source, str | Path | Image.Image):
        raise TypeError(f"expected a path or a PIL image, found {type(source).__name__}")
    if not isinstance(source, Image.Image) and not Path(source).is_file():
        raise FileNotFoundError(f"{source}: no such picture file")


def _opened(data: bytes) -> Image.Image:
    """A picture file, decoded; without its metadata if that is what cannot be read."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return _decoded(image)
    except Image.DecompressionBombError:
        raise
    except Exception:
        bare = without_metadata(data)
        if bare is None:
            raise
        with Image.open(io.BytesIO(bare)) as image:
            return _decoded(image)


def _decoded(image: Image.Image) -> Image.Image:
    """A copy of a picture with its pixels there, upright, and of its metadata the transparency alone."""
    image.load()
    turn = UPRIGHT.get(_orientation(image))
    upright = image.copy() if turn is None else image.transpose(turn)
    upright.info = {name: value for name, value in image.info.items() if name == "transparency"}
    return upright


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 if nothing of the kind can be read."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # whatever a damaged EXIF makes of the tag
        return 1


def without_metadata(data: bytes) -> bytes | None:
    """A PNG, JPEG or WebP file with its pixels and colours alone; None for another kind, or if nothing is left out."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        bare = _png_chunks(data)
    elif data.startswith(b"\xff\xd8"):
        bare = _jpeg_segments(data)
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        bare = _webp_chunks(data)
    else:
        return None
    return None if bare == data else bare


def _png_chunks(data: bytes) -> bytes:
    """The chunks that decide the pixels (PNG specification, section 5.3), transparency among them."""
    kept, at = [data[:8]], 8
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


def _jpeg_segments(data: bytes) -> bytes:
    """Without the segments of applications and comments before the picture; JFIF's and Adobe's say what colours are."""
    kept, at = [data[:2]], 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if not (0xE1 <= data[at + 1] <= 0xED or data[at + 1] in (0xEF, 0xFE)):
            kept.append(data[at:end])
        at = end
    return b"".join([*kept, data[at:]])


def _webp_chunks(data: bytes) -> bytes:
    """Without EXIF and XMP, and without the flags that announce them (WebP container specification)."""
    kept, at = [], 12
    while at + 8 <= len(data):
        kind, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        end = at + 8 + size + size % 2
        if kind == b"VP8X":
            kept.append(data[at : at + 8] + bytes([data[at + 8] & ~0b1100]) + data[at + 9 : end])
        elif kind not in (b"EXIF", b"XMP "):
            kept.append(data[at:end])
        at = end
    body = b"WEBP" + b"".join(kept)
    return b"RIFF" + len(body).to_bytes(4, "little") + body


def _scaled_grey(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bit, or floating point, brought to 8 bit by scaling, not by clipping."""
    values = np.nan_to_num(np.asarray(image, np.float64))
    if image.mode == "F":
        top = 1.0 if values.max(initial=0) <= 1 else 255.0 if values.max() <= 255 else 65535.0
    else:
        top = 255.0 if values.max(initial=0) <= 255 and image.mode == "I" else 65535.0
    return Image.fromarray(np.round(np.clip(values / top, 0, 1) * 255).astype(np.uint8))


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info


def _rgba(image: Image.Image) -> Image.Image:
    """With its transparency; without it, where a file says nonsense of it."""
    try:
        return image.convert("RGBA")
    except (ValueError, TypeError, OSError, SystemError):
        image.info.pop("transparency", None)
        return image.convert("RGBA")


def _flat(image: Image.Image, backdrop: str) -> Image.Image:
    """The picture in 8 bit, its transparent parts laid over a colour."""
    if image.mode.startswith(("I", "F")):
        return _scaled_grey(image)
    if _has_alpha(image):
        image = _rgba(image)
        return Image.alpha_composite(Image.new("RGBA", image.size, backdrop), image)
    return image


def content_hash(source: ImageLike) -> str:
    """What a picture is known by: the sha256 of its file, or of its pixels. Errors as `open_image`."""
    _refuse_missing(source)
    if not isinstance(source, Image.Image):
        with open(source, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    said = (source.mode, source.size, source.getpalette(), str(source.info.get("transparency")), _orientation(source))
    return hashlib.sha256(repr(said).encode() + source.tobytes()).hexdigest()


def load_image(source: ImageLike) -> Image.Image:
    """A picture as 8-bit RGB; transparent parts are laid over white. Errors as `open_image`."""
    return _flat(open_image(source), "white").convert("RGB")


def load_mask(source: ImageLike, size: tuple[int, int]) -> np.ndarray:
    """A mask of any mode as f32[H, W] in [0, 1] for a picture of `size` (width, height); white = regenerate.

    Grey values make a soft mask. A mask with transparency is laid over black; but of a photograph with a hole in it the
    hole is what is regenerated, with a warning that says so. Of colours the brightness counts, with a warning, too. A
    mask of another size is scaled to the picture's if it has the same aspect (within 2 %).

    Raises:
        ValueError: another aspect than the picture's, or nothing to regenerate; else as `open_image`.
    """
    image = _mask_of(open_image(source))
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
        raise ValueError("the mask is black everywhere; paint the part to be regenerated white")
    return mask


COLOURFUL = 32
"""Difference between the channels of a pixel, of 255, from which it counts as coloured."""

DRAWN_COLOURS = 24
"""Most colours (of 64 levels a channel) in what somebody drew as a mask."""


def _mask_of(image: Image.Image) -> Image.Image:
    """The grey picture that a mask means, "L"; says what had to be guessed."""
    if _has_alpha(image) and _is_photo_with_hole(pixels := np.asarray(_rgba(image))):
        warnings.warn(
            "the mask is a picture with a transparent part; that part is regenerated. For the other one, draw a mask "
            "in black and white",
            stacklevel=3,
        )
        return Image.fromarray(255 - pixels[..., 3])
    flat = _flat(image, "black")
    if flat.mode not in ("1", "L"):
        channels = np.asarray(flat.convert("RGB")).astype(np.int16)
        if (np.ptp(channels, axis=-1) > COLOURFUL).mean() > 0.01:
            warnings.warn(
                "the mask has colours; their brightness counts: white is regenerated, black is kept", stacklevel=3
            )
    return flat.convert("L")


def _is_photo_with_hole(pixels: np.ndarray) -> bool:
    """Whether u8[H, W, 4] is a picture with a part erased, and not strokes of black and white on nothing.

    A picture has colours or greys, many of them, or reaches to the edges.
    """
    opaque = pixels[..., 3] > 127
    if opaque.all() or not opaque.any():
        return False
    solid = pixels[opaque][:, :3].astype(np.int16)
    between = (solid.max(-1) > COLOURFUL) & (solid.min(-1) < 255 - COLOURFUL)
    edge = np.concatenate([opaque[0], opaque[-1], opaque[:, 0], opaque[:, -1]])
    many = len(np.unique(solid // 4, axis=0)) > DRAWN_COLOURS
    return bool(between.mean() > 0.25 and (many or edge.mean() > 0.5))


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
        ValueError: a side that was asked for is no positive multiple of `multiple`, or longer than `LARGEST_SIDE`.
    """
    if asked is not None:
        width, height = asked
        if not all(isinstance(side, int | np.integer) for side in asked):
            raise ValueError(f"width and height must be whole numbers of pixels, found {width!r} and {height!r}")
        if max(asked) > LARGEST_SIDE:
            raise ValueError(f"a picture can be up to {LARGEST_SIDE} pixels wide and high, found {width}x{height}")
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


def resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture at `size`, whatever its shape was (Lanczos)."""
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def to_array(image: Image.Image) -> np.ndarray:
    """RGB picture -> f32[H, W, 3] in [-1, 1]."""
    return from_uint8(np.asarray(image))


def from_uint8(pixels: AnyArray) -> AnyArray:
    """u8[..., 3] -> f32[..., 3] in [-1, 1], numpy or JAX as it came; traceable."""
    return pixels.astype(np.float32) / 127.5 - 1


def to_uint8(images: Array) -> Array:
    """f[b, H, W, 3] in [-1, 1] -> u8[b, H, W, 3], clipped and rounded; traceable, so it runs on the device."""
    import jax.numpy as jnp

    images = images.astype(jnp.float32)
    return jnp.round(jnp.clip(images / 2 + 0.5, 0, 1) * 255).astype(jnp.uint8)


def latent_mask(mask: AnyArray, downscale: int) -> AnyArray:
    """mask f[b, H, W, 1] -> f[b, h, w, 1], every `downscale`-th pixel (nearest, as diffusers takes it)."""
    return mask[:, ::downscale, ::downscale]


def paste_back(original: Image.Image, generated: Image.Image, mask: np.ndarray) -> Image.Image:
    """original where the mask f32[H, W] is 0 (to the byte), generated where it is 1, a blend between."""
    old, new = np.asarray(original, np.float32), np.asarray(generated, np.float32)
    blend = old + mask[..., None] * (new - old)
    return Image.fromarray(np.round(blend).astype(np.uint8))


# Regions: what lies around a picture, around a mask


class Sides(NamedTuple):
    """Pixels on each side of a picture."""

    left: int = 0
    top: int = 0
    right: int = 0
    bottom: int = 0


class Box(NamedTuple):
    """A part of a picture in pixels, from left and top up to right and bottom, as Pillow has it."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def size(self) -> tuple[int, int]:
        return self.right - self.left, self.bottom - self.top


def extended(image: Image.Image, sides: Sides) -> Image.Image:
    """An RGB picture with room around it: its edges, continued and blurred, so that the colours go on.

    Raises:
        ValueError: the whole would be longer than `LARGEST_SIDE`, or have more pixels than Pillow opens.
    """
    width, height = image.width + sides.left + sides.right, image.height + sides.top + sides.bottom
    most = Image.MAX_IMAGE_PIXELS or width * height
    if max(width, height) > LARGEST_SIDE or width * height > max(most, image.width * image.height):
        raise ValueError(
            f"the picture is {image.width}x{image.height} and would become {width}x{height}; it can be up to "
            f"{LARGEST_SIDE} pixels wide and high, and have {most:,} in all"
        )
    edges = ((sides.top, sides.bottom), (sides.left, sides.right), (0, 0))
    whole = Image.fromarray(np.pad(np.asarray(image), edges, mode="edge"))
    whole = whole.filter(ImageFilter.GaussianBlur(max(sides) / 8))
    whole.paste(image, (sides.left, sides.top))
    return whole


def feathered(mask: np.ndarray, width: int) -> np.ndarray:
    """A mask f32[H, W] that falls to 0 over `width` pixels outside of what it was; inside it stays as it is.

    It is grown by half of the width, and averaged over squares of the width: a straight edge becomes a linear ramp.
    """
    grow, blur = width // 2, (width + 1) // 2
    soft = mask.astype(np.float64)
    for axis in (0, 1):
        soft = _grown(soft, grow, axis)
    for axis in (0, 1):
        soft = _averaged(soft, blur, axis)
    return np.maximum(mask, np.round(soft, 6).astype(np.float32))


def _grown(values: np.ndarray, radius: int, axis: int) -> np.ndarray:
    """The largest value up to `radius` places away along an axis."""
    values = np.moveaxis(values, axis, 0)
    whole = np.pad(values, ((radius, radius), (0, 0)))
    covered = 1  # places that each value is the largest of; doubled as long as that fits
    while covered < 2 * radius + 1:
        more = min(covered, 2 * radius + 1 - covered)
        whole, covered = np.maximum(whole[:-more], whole[more:]), covered + more
    return np.moveaxis(whole, 0, axis)


def _averaged(values: np.ndarray, radius: int, axis: int) -> np.ndarray:
    """The mean up to `radius` places away along an axis; at the ends the last value goes on."""
    values = np.moveaxis(values, axis, 0)
    sums = np.cumsum(np.pad(np.pad(values, ((radius, radius), (0, 0)), mode="edge"), ((1, 0), (0, 0))), axis=0)
    return np.moveaxis((sums[2 * radius + 1 :] - sums[: -2 * radius - 1]) / (2 * radius + 1), 0, axis)


def whole_cells(mask: np.ndarray, downscale: int) -> np.ndarray:
    """A mask f32[H, W] with every cell of the latent filled with its largest value: what has a part to regenerate is
    regenerated.
    """
    height, width = (side // downscale for side in mask.shape)
    cells = mask.reshape(height, downscale, width, downscale).max((1, 3))
    return cells.repeat(downscale, 0).repeat(downscale, 1)


def box_around(mask: np.ndarray, padding: int) -> Box:
    """The smallest box around what a mask f32[H, W] regenerates, with `padding` pixels more inside the picture."""
    height, width = mask.shape
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    left, top = max(0, int(columns[0]) - padding), max(0, int(rows[0]) - padding)
    return Box(left, top, min(width, int(columns[-1]) + 1 + padding), min(height, int(rows[-1]) + 1 + padding))


def grown_to(box: Box, ratio: float, within: tuple[int, int]) -> Box:
    """The box with its shorter side grown, evenly where there is room, until width / height is `ratio`.

    within: (width, height) of the picture, which it stays inside of, even if the ratio cannot be had then.
    """
    width, height = box.size
    width, height = max(width, round(height * ratio)), max(height, round(width / ratio))
    left, right = _grown_side(box.left, box.right, width, within[0])
    top, bottom = _grown_side(box.top, box.bottom, height, within[1])
    return Box(left, top, right, bottom)


def _grown_side(start: int, stop: int, length: int, most: int) -> tuple[int, int]:
    length = min(length, most)
    start = min(max(0, start - (length - (stop - start)) // 2), most - length)
    return start, start + length


def to_images(pixels: Array) -> list[Image.Image]:
    """u8[b, H, W, 3] on any device -> PIL pictures, in one transfer."""
    import jax

    return [Image.fromarray(picture) for picture in np.asarray(jax.device_get(pixels))]
