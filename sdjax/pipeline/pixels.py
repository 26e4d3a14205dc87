"""The picture and the mask of a request as the networks see them, and the way back to the picture that was asked for.

A picture is extended (outpainting), a mask is softened, the region around it is cut out, and both are fitted to the
size to work at; what the model makes of them is then pasted where it belongs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

from sdjax import image as images
from sdjax.config import ModelConfig
from sdjax.image import Box
from sdjax.request import Request, parse_sides, size_of, task_of

OUTPAINT_FEATHER = 32
"""Most pixels over which outpainting blends into the picture when nothing is said."""

LONGEST = 2.0
"""How many times as long as high, or as high as long, a region around a mask is at most, where the picture allows."""

NEARLY_KEPT = 1 / 8
"""Values of a differential mask below this change little, and are blended with the picture."""


class Pixels(NamedTuple):
    """A request's picture and mask on the host, as the networks will see them. size: (width, height) to work at.

    picture: f32[1, H, W, 3], zeros without one; mask: f32[1, H, W, 1], and cells: f32[1, h, w, 1], of the latent's
    grid; ones without a mask. finish: from what the model made to what was asked for.
    """

    size: tuple[int, int]
    picture: np.ndarray
    mask: np.ndarray
    cells: np.ndarray
    finish: Callable[[Image.Image], Image.Image]


def pixels_of(request: Request, config: ModelConfig) -> Pixels:
    """Opens and fits the picture and the mask of a request; no network is needed for it.

    Raises:
        FileNotFoundError: no such file. ValueError: it cannot be read or extended, or the mask does not fit,
            regenerates nothing, or lies in a region that has not the shape that was asked for.
    """
    if request.image is None:
        size = size_of(request, config, None)
        empty = np.zeros((1, size[1], size[0], config.vae.image_channels), np.float32)
        return _pixels(size, empty, np.ones(empty.shape[1:3], np.float32), config, lambda result: result)
    original = images.load_image(request.image)
    if task_of(request) == "inpaint":
        return _inpainted(request, config, original)
    size = size_of(request, config, original.size)
    asked, array = request.width is not None, images.to_array(images.fit(original, size))[None]
    whole = np.ones(array.shape[1:3], np.float32)
    return _pixels(
        size, array, whole, config, lambda result: result if asked else images.resized(result, original.size)
    )


def _pixels(
    size: tuple[int, int],
    array: np.ndarray,
    mask: np.ndarray,
    config: ModelConfig,
    finish: Callable[[Image.Image], Image.Image],
) -> Pixels:
    """With the latent's grid. array: f32[1, H, W, 3]. mask: f32[H, W]."""
    whole = mask[None, ..., None]
    return Pixels(size, array, whole, images.latent_mask(whole, config.vae.downscale), finish)


def _inpainted(request: Request, config: ModelConfig, given: Image.Image) -> Pixels:
    """The same where a part is regenerated: of the picture, of a region of it, or around it."""
    original, mask = _with_mask(request, given)

    # The region to work on, and its size there
    only = request.only_masked is not None
    whole = Box(0, 0, *original.size)
    box, size = _region(request, config, mask) if only else (whole, size_of(request, config, original.size))
    part, part_mask = original.crop(box), mask[box.top : box.bottom, box.left : box.right]
    picture = images.resized(part, size) if only else images.fit(part, size)
    levels = Image.fromarray(np.round(part_mask * 255).astype(np.uint8))
    fitted = images.load_mask(images.resized(levels, size) if only else images.fit(levels, size), size)

    # What the networks see
    cell = config.vae.downscale
    is_soft = request.outpaint is not None or bool(request.feather)
    pixels = _pixels(size, images.to_array(picture)[None], fitted, config, lambda result: result)
    if is_soft:
        pixels = _pixels(size, pixels.picture, images.whole_cells(fitted, cell), config, pixels.finish)
    if not pixels.cells.any():
        raise ValueError(f"the mask is too fine and would regenerate nothing; make it {cell} pixels wide or more")

    def share(mask: np.ndarray) -> np.ndarray:
        """How much of what was made is in the result."""
        return mask if request.soft_mask == "blend" else np.minimum(1, mask / NEARLY_KEPT)

    def finish(result: Image.Image) -> Image.Image:
        if request.width is not None and not only:
            return images.paste_back(picture, result, share(fitted))
        pasted = images.paste_back(part, images.resized(result, part.size), share(part_mask))
        if box == whole:
            return pasted
        finished = original.copy()
        finished.paste(pasted, (box.left, box.top))
        return finished

    return pixels._replace(finish=finish)


def _with_mask(request: Request, given: Image.Image) -> tuple[Image.Image, np.ndarray]:
    """The picture, extended, and its mask f32[H, W], softened, in its own pixels."""
    sides, feather = parse_sides(request.outpaint), request.feather
    if feather is not None and feather > min(given.size):
        raise ValueError(f"feather is {feather} pixels, and the picture {given.width}x{given.height}; take fewer")
    mask = np.zeros((given.height, given.width), np.float32)
    if request.mask is not None:
        mask = images.load_mask(request.mask, given.size)
    if any(sides):
        original = images.extended(given, sides)
        mask = np.pad(mask, ((sides.top, sides.bottom), (sides.left, sides.right)), constant_values=1)
        feather = min(OUTPAINT_FEATHER, min(given.size) // 8) if feather is None else feather
    else:
        original = given
    return original, images.feathered(mask, feather) if feather else mask


def _region(request: Request, config: ModelConfig, mask: np.ndarray) -> tuple[Box, tuple[int, int]]:
    """The box around a mask f32[H, W] that is worked on alone, and the (width, height) to work at.

    What was asked for, else about the area that the model was trained at, in the box's shape.
    """
    assert request.only_masked is not None
    within = mask.shape[1], mask.shape[0]
    box = images.box_around(mask, request.only_masked)
    if request.width is None and request.height is None:
        width, height = box.size
        box = images.grown_to(box, min(max(width / height, 1 / LONGEST), LONGEST), within)
        size = _near_own_area(box, config)
        return images.grown_to(box, size[0] / size[1], within), size
    size = size_of(request, config, within)
    box, ratio = images.grown_to(box, size[0] / size[1], within), size[0] / size[1]
    width, height = box.size
    if width + 1 < height * ratio * 15 / 16 or height + 1 < width / ratio * 15 / 16:
        raise ValueError(
            f"the region around the mask is {width}x{height}, and cannot have the shape of {size[0]}x{size[1]} inside "
            f"a picture of {within[0]}x{within[1]}; ask for no size, or for one of its shape"
        )
    return box, size


def _near_own_area(box: Box, config: ModelConfig) -> tuple[int, int]:
    """A size in the shape of a box, of about the area that a model makes: of few sizes, so that few are compiled."""
    width, height = box.size
    cell, side = config.vae.downscale, config.image_size
    step = max(cell, side // 8 // cell * cell)
    longer = math.sqrt(width / height)
    width, height = (max(step, round(length / step) * step) for length in (side * longer, side / longer))
    return images.working_size((width, height), asked=(width, height), multiple=cell)
