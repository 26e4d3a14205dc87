"""Reading the pictures in which AUTOMATIC1111's web UI stores an embedding, as text or in the pixels.

As text: a PNG has a chunk tEXt of the key "sd-ti-embedding" with the base64 of JSON, the dict of a .pt file in which
{"TORCHTENSOR": nested list} is a tensor. In the pixels, for pictures that lost their text: left and right of the
picture, apart from it by a black column, is a strip. Their lowest 4 bits, in the order of rows, columns and colours,
are the low and the high halves of the bytes of the JSON, packed by zlib; each strip is hidden by the noise of a
generator.
"""

from __future__ import annotations

import base64
import json
import warnings
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from convert.files.source import CheckpointError, Source, TensorInfo, unwrap

KEY = b"sd-ti-embedding"
FILE_BOUND = 64 * 2**20  # bytes
JSON_BOUND = 16 * 2**20  # bytes; 75 vectors of 1280 numbers have about 2 MB
VALUE_BOUND = 500_000  # brackets and commas in the JSON
PIXEL_BOUND = 4096 * 4096
STRIP_BOUND = 4 * 2**20  # bytes of the packed JSON; 75 vectors of 1280 numbers have about 1 MB
ZLIB = 0x78  # the first byte
FACTOR, INCREMENT = 1664525, 1013904223  # of the generator, modulo 2^32
DAMAGED = "the embedding in this picture is damaged"


class NoEmbedding(CheckpointError):
    """A sound file that holds no embedding."""


def is_picture(head: bytes) -> bool:
    """Whether a file that begins like this is a PNG or WebP picture."""
    return head.startswith(b"\x89PNG\r\n\x1a\n") or (head.startswith(b"RIFF") and head[8:12] == b"WEBP")


def open_picture(path: Path) -> Source:
    """The embedding in a picture, as a file of tensors; its name is in the metadata.

    Raises:
        NoEmbedding: the picture holds none. CheckpointError: it is damaged or too large.
    """
    size = path.stat().st_size
    if size > FILE_BOUND:
        raise CheckpointError(f"{path}: a picture of {size} bytes; one with an embedding has at most {FILE_BOUND}")
    data = path.read_bytes()
    text = _text(path, data)
    state = _parsed(path, _from_pixels(path, data) if text is None else text)
    found, skipped, metadata = unwrap(state, path, lambda value: isinstance(value, np.ndarray))
    tensors = {name: TensorInfo("F32", array.shape) for name, array in found.items()}
    return Source(path, "picture", tensors, found.__getitem__, found.clear, skipped, metadata)


def _parsed(path: Path, text: bytes) -> Any:
    """The JSON with its tensors as arrays f32."""
    if sum(map(text.count, (b"[", b"{", b","))) > VALUE_BOUND:
        raise CheckpointError(f"{path}: the embedding in this picture has more than {VALUE_BOUND} values; refused")

    def with_tensor(entry: dict[str, Any]) -> Any:
        if "TORCHTENSOR" not in entry:
            return entry
        with np.errstate(over="ignore"):
            return np.array(entry["TORCHTENSOR"], np.float64).astype(np.float32)

    try:
        return json.loads(text.decode("utf-8"), object_hook=with_tensor)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path}: {DAMAGED} ({ascii(str(error)[:80])[1:-1]}); get the file again") from None


# As text


def _text(path: Path, data: bytes) -> bytes | None:
    """The JSON in the chunk of a PNG; None if there is no such chunk."""
    at = 8
    while data.startswith(b"\x89PNG") and at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        kind, content = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        if kind == b"tEXt" and content.startswith(KEY + b"\0"):
            try:
                return base64.b64decode(content[len(KEY) + 1 :], validate=True)
            except ValueError:
                raise CheckpointError(f"{path}: {DAMAGED} or cut off; get the file again") from None
        at += size + 12
    return None


# In the pixels


def _from_pixels(path: Path, data: bytes) -> bytes:
    """The JSON in the strips next to a picture."""
    halves = _strips(_pixels(path, data))
    if halves is None:
        raise NoEmbedding(f"{path}: a picture without an embedding")
    packed = halves[0] | halves[1] << 4
    decoder = zlib.decompressobj()
    try:
        text = decoder.decompress(packed.tobytes(), JSON_BOUND)
    except zlib.error:
        raise CheckpointError(f"{path}: {DAMAGED}; get the file itself, not a copy in another size") from None
    if not decoder.eof:
        raise CheckpointError(f"{path}: {DAMAGED}, it has no end or more than {JSON_BOUND} bytes; refused")
    return text


def _pixels(path: Path, data: bytes) -> np.ndarray:
    """u8[H, W, 3]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            with Image.open(BytesIO(data)) as image:
                width, height = image.size
                if width * height <= PIXEL_BOUND:
                    return np.asarray(image.convert("RGB"))
        except Image.DecompressionBombError:
            raise CheckpointError(f"{path}: a picture of too many pixels to look for an embedding; refused") from None
        except Exception as error:  # Pillow raises almost anything on a damaged file
            raise CheckpointError(f"{path}: not a picture that can be read ({type(error).__name__})") from None
    raise CheckpointError(f"{path}: a picture of {width}x{height}, too many pixels to look for an embedding; refused")


def _strips(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """The lowest 4 bits of both strips, u8[n], without the noise; None if there are no strips."""
    lit: np.ndarray = np.all(pixels, axis=2)
    rows, columns = np.flatnonzero(lit.any(1)), np.flatnonzero(lit.any(0))
    if not len(rows):
        return None
    nibbles = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] & 15
    black = np.flatnonzero(~np.any(nibbles, axis=(0, 2)))
    if len(black) < 2:
        return None
    left, right = nibbles[:, : black[0]].reshape(-1), nibbles[:, black[-1] + 1 :].reshape(-1)
    if left.size != right.size or not 0 < left.size <= STRIP_BOUND:
        return None
    first = _noise(1)
    if (left[:1] ^ first | (right[:1] ^ first) << 4) != ZLIB:
        return None
    noise = _noise(left.size)
    return left ^ noise, right ^ noise


def _noise(count: int) -> np.ndarray:
    """The generator's numbers, u8[count]: the lowest 4 bits of s_i mod 255.

    s_i = (FACTOR s_(i-1) + INCREMENT) mod 2^32 with s_0 = 0. From n of them the next n follow at once:
    s_(i+n) = (FACTOR^n s_i + s_n) mod 2^32.
    """
    numbers, power = np.array([INCREMENT], np.uint64), FACTOR
    while len(numbers) < count:
        further = (numbers * np.uint64(power) + numbers[-1]) % np.uint64(2**32)
        numbers, power = np.concatenate([numbers, further]), power * power % 2**32
    return (numbers[:count] % np.uint64(255)).astype(np.uint8) & 15
