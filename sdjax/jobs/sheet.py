"""The sheet of a grid: its pictures side by side, values above and beside them, what they share below."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from sdjax.image import LARGEST_SIDE
from sdjax.storage.files import new_file

SHEET_PIXELS = 2**26
"""Most pixels of a sheet; Pillow warns of pictures that have more by a third."""

READABLE = 96
"""Pixels: pictures with a shorter side are enlarged a whole number of times, so that labels have room."""

SMALLEST = 16
"""Pixels of the longer side of a picture that a sheet may shrink to."""

GAP = 4
HEAD_LINES, FOOT_LINES, BLOCK_LINES = 3, 8, 2
"""Most lines of a column's label, of the foot, and of a block's heading."""

KEY = "sdjax-grid"
"""The text entry of a PNG that says that it is a sheet of ours."""


class Texts(NamedTuple):
    """What stands on a sheet. axes: (name, labels) of each; prompt, negative_prompt, settings: what pictures share."""

    axes: list[tuple[str, tuple[str, ...]]]
    prompt: str
    negative_prompt: str
    settings: str

    def foot(self) -> list[str]:
        """The paragraphs below the pictures."""
        negative = f"Negative prompt: {self.negative_prompt}" if self.negative_prompt else ""
        return [text for text in (self.prompt, negative, self.settings) if text]

    def parameters(self) -> str:
        """The text that other tools read, with the axes as A1111's XYZ plot names them."""
        axes = ["Script: X/Y/Z plot"]
        for letter, (name, labels) in zip("XYZ", self.axes, strict=False):
            values = ", ".join(labels).replace('"', '\\"')
            axes += [f"{letter} Type: {name}", f'{letter} Values: "{values}"']
        negative = f"\nNegative prompt: {self.negative_prompt}" if self.negative_prompt else ""
        return f"{self.prompt}{negative}\n{', '.join([*([self.settings] if self.settings else []), *axes])}"


class Layout(NamedTuple):
    """Where everything is on a sheet, in pixels.

    axes: (name, labels) of columns, rows and blocks; a name is "" where there is no such axis.
    scale: by which pictures are enlarged, or made smaller. cell: (width, height) that each has.
    font: its size. left: the width of the rows' labels. title, head, block: heights of the columns' name, of their
    labels, and of a block's heading. foot: the height that the foot may have.
    """

    axes: tuple[tuple[str, tuple[str, ...]], ...]
    scale: float
    cell: tuple[int, int]
    font: int
    left: int
    title: int
    head: int
    block: int

    @property
    def counts(self) -> tuple[int, ...]:
        """Columns, rows, blocks."""
        return tuple(len(labels) for _, labels in self.axes)

    @property
    def foot_font(self) -> int:
        return max(10, round(0.8 * self.font))

    @property
    def block_height(self) -> int:
        return self.block + self.title + self.head + self.counts[1] * (self.cell[1] + GAP)

    @property
    def width(self) -> int:
        return GAP + self.left + self.counts[0] * (self.cell[0] + GAP)

    @property
    def height(self) -> int:
        """With the longest foot."""
        return GAP + self.counts[2] * self.block_height + FOOT_LINES * line_height(self.foot_font) + 2 * GAP


def layout_of(axes: Sequence[Any], sizes: Iterable[tuple[int, int]]) -> Layout:
    """The layout of a sheet whose pictures have these sizes, smaller than they are if need be.

    axes: with `name` and `labels`: of columns, rows, blocks.

    Raises:
        ValueError: there are so many columns or rows that nothing could be seen.
    """
    named = [(each.name, tuple(" ".join(label.split()) for label in each.labels)) for each in axes]
    named += [("", ("",))] * (3 - len(named))
    widths, heights = zip(*set(sizes), strict=True)
    largest = max(widths), max(heights)
    times = math.ceil(READABLE / min(largest))
    for scale in (times, 1):
        if scale >= 1 and _fits(found := _scaled(named, largest, scale)):
            return found
    low, high = SMALLEST / max(largest), 1.0
    if low >= 1 or not _fits(best := _scaled(named, largest, low)):
        columns, rows, blocks = (len(labels) for _, labels in named)
        what = f"{columns:,} columns and {rows * blocks:,} rows"
        raise ValueError(
            f"a sheet of {what} would have more than {LARGEST_SIDE:,} pixels on a side, or {SHEET_PIXELS:,} in all, "
            "however small the pictures are; give fewer values, or divide them over two axes"
        )
    for _ in range(12):
        middle = (low + high) / 2
        found = _scaled(named, largest, middle)
        low, high, best = (middle, high, found) if _fits(found) else (low, middle, best)
    return best


def _fits(layout: Layout) -> bool:
    width, height = layout.width, layout.height
    return max(width, height) <= LARGEST_SIDE and width * height <= SHEET_PIXELS


def _scaled(named: list[tuple[str, tuple[str, ...]]], largest: tuple[int, int], scale: float) -> Layout:
    width, height = (max(1, round(scale * side)) for side in largest)
    (_, x_labels), (y_name, y_labels), (z_name, z_labels) = named
    size = min(28, max(11, min(width, height) // 14))
    line = line_height(size)
    left = 0
    if y_name:
        longest = max(length_of(text, size) for text in (y_name, *y_labels))
        left = GAP + min(math.ceil(longest) + 1, max(9 * size, 3 * width // 4))
    head = line * max(len(wrapped(label, size, width, HEAD_LINES)) for label in x_labels) + GAP
    across = left + len(x_labels) * (width + GAP) - GAP
    block = 0
    if z_name:
        block = 2 * GAP + line * max(
            len(wrapped(f"{z_name}: {label}", size, across, BLOCK_LINES)) for label in z_labels
        )
    return Layout(tuple(named), scale, (width, height), size, left, line, head, block)


# Text


@lru_cache
def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def line_height(size: int) -> int:
    """Pixels from one line of text to the next."""
    return math.ceil(1.3 * size)


@lru_cache(maxsize=4096)
def length_of(text: str, size: int) -> float:
    """Pixels that a line of text is wide."""
    return float(_font(size).getlength(text))


@lru_cache(maxsize=4096)
def wrapped(text: str, size: int, width: int, lines: int) -> tuple[str, ...]:
    """A text in lines that are not wider than `width` pixels; what is more than so many lines is cut with "..."."""
    found, rest = list[str](), " ".join(text.split())
    while rest and len(found) < lines:
        end = _fitting(rest, size, width)
        if end < len(rest):
            if len(found) == lines - 1:
                keep = _fitting(rest, size, width - math.ceil(length_of("...", size)))
                found.append(f"{rest[:keep].rstrip()}...")
                break
            space = rest.rfind(" ", 0, end + 1)
            end = space if space > 0 else max(1, end)
        found.append(rest[:end].rstrip())
        rest = rest[end:].lstrip()
    return tuple(found) or ("",)


def _fitting(text: str, size: int, width: float) -> int:
    """How many letters of a text fit into so many pixels."""
    low, high = 0, min(len(text), 1 + 2 * max(0, int(width)))
    if high == len(text) and _font(size).getlength(text) <= width:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _font(size).getlength(text[:middle]) <= width else (low, middle - 1)
    return low


# Drawing


def draw(layout: Layout, texts: Texts, pictures: Iterable[Image.Image | None]) -> Image.Image:
    """The sheet. pictures: block by block, row by row, each in the order of the columns; None: it is not there."""
    foot_line, across = line_height(layout.foot_font), layout.width - 2 * GAP
    foot = [line for text in texts.foot() for line in wrapped(text, layout.foot_font, across, FOOT_LINES)]
    if len(foot) > FOOT_LINES:
        foot = list(wrapped(" | ".join(texts.foot()), layout.foot_font, across, FOOT_LINES))
    height = GAP + layout.counts[2] * layout.block_height + len(foot) * foot_line + 2 * GAP
    sheet = Image.new("RGB", (layout.width, height), "white")
    pen = ImageDraw.Draw(sheet)
    (x_name, x_labels), (y_name, y_labels), (z_name, z_labels) = layout.axes
    (cell_w, cell_h), line = layout.cell, line_height(layout.font)

    def write(at: tuple[int, int], lines: Sequence[str], anchor: str = "la", fill: str = "black") -> None:
        for number, text in enumerate(lines):
            pen.text((at[0], at[1] + number * line), text, fill=fill, font=_font(layout.font), anchor=anchor)

    given = iter(pictures)
    start = GAP + layout.left
    columns = [start + i * (cell_w + GAP) for i in range(len(x_labels))]
    for number, z_label in enumerate(z_labels):
        top = GAP + number * layout.block_height
        if z_name:
            pen.line((GAP, top, layout.width - GAP, top), fill="silver")
            write((GAP, top + GAP), wrapped(f"{z_name}: {z_label}", layout.font, across, BLOCK_LINES))
        top += layout.block
        over = columns[-1] + cell_w - start
        write((start + over // 2, top), wrapped(x_name, layout.font, over, 1), "ma", "gray")
        top += layout.title
        for x, label in zip(columns, x_labels, strict=True):
            lines = wrapped(label, layout.font, cell_w, HEAD_LINES)
            write((x + cell_w // 2, top + layout.head - GAP - len(lines) * line), lines, "ma")
        top += layout.head
        if y_name:
            write((GAP, top - GAP - line), wrapped(y_name, layout.font, layout.left - GAP, 1), fill="gray")
        for row, label in enumerate(y_labels):
            y = top + row * (cell_h + GAP)
            if y_name:
                lines = wrapped(label, layout.font, layout.left - GAP, max(1, cell_h // line))
                write((GAP, y + max(0, cell_h - len(lines) * line) // 2), lines)
            for x in columns:
                _paste(sheet, pen, next(given), (x, y), layout)
    foot_top = GAP + layout.counts[2] * layout.block_height + GAP
    for number, text in enumerate(foot):
        pen.text((GAP, foot_top + number * foot_line), text, fill="gray", font=_font(layout.foot_font))
    return sheet


def _paste(
    sheet: Image.Image, pen: ImageDraw.ImageDraw, picture: Image.Image | None, at: tuple[int, int], layout: Layout
) -> None:
    """A picture in the middle of its cell, or a grey cell that says that there is none."""
    (x, y), (width, height) = at, layout.cell
    if picture is None:
        pen.rectangle((x, y, x + width - 1, y + height - 1), fill="gainsboro")
        text = wrapped("not made", layout.font, width, 1)[0]
        pen.text((x + width // 2, y + height // 2), text, fill="gray", font=_font(layout.font), anchor="mm")
        return
    picture = picture.convert("RGB")
    factor = min(layout.scale, width / picture.width, height / picture.height)
    if factor != 1:
        how = Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS
        fitted = (max(1, round(factor * side)) for side in picture.size)
        picture = picture.resize((next(fitted), next(fitted)), how)
    sheet.paste(picture, (x + (width - picture.width) // 2, y + (height - picture.height) // 2))


# Files


def save_sheet(path: Path, sheet: Image.Image, texts: Texts) -> None:
    """Writes a sheet as PNG, with what it shows as texts.

    Raises:
        FileExistsError: `path` is there and no sheet of ours. OSError: it could not be written.
    """
    refuse_other(path)
    info = PngImagePlugin.PngInfo()
    info.add_itxt("parameters", texts.parameters())
    info.add_itxt(KEY, "x".join(str(len(labels)) for _, labels in texts.axes))
    with new_file(path, force=True) as temporary:
        sheet.save(temporary, "PNG", pnginfo=info)


def refuse_other(path: Path) -> None:
    """Raises FileExistsError if a file is there that is no sheet of ours."""
    if not path.exists():
        return
    try:
        with Image.open(path) as image:
            is_ours = KEY in image.info
    except Exception:  # Pillow raises almost anything on what is no picture
        is_ours = False
    if not is_ours:
        raise FileExistsError(f"{path} is already there and is no sheet of a grid; move it away")
