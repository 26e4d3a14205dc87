"""Sheets of pictures with captions, curves, points and matrices; drawn with Pillow alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f", "#e377c2", "#bcbd22")
TEXT_HEIGHT = 14  # pixels of a line of labels


def sheet(pictures: Sequence[Image.Image], columns: int, labels: Sequence[str] | None = None) -> Image.Image:
    """Pictures of one size in rows of `columns`, each with its label below, cut to the picture's width."""
    width, height = pictures[0].size
    below = 0 if labels is None else TEXT_HEIGHT
    rows = math.ceil(len(pictures) / columns)
    gap = 4
    whole = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + below + gap) + gap), "white")
    draw = ImageDraw.Draw(whole)
    for i, picture in enumerate(pictures):
        x, y = gap + i % columns * (width + gap), gap + i // columns * (height + below + gap)
        whole.paste(picture, (x, y))
        if labels is not None:
            draw.text((x, y + height + 1), _cut(labels[i], width), fill="black", font=_font())
    return whole


def curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str,
    x_label: str,
    log_x: bool = False,
    log_y: bool = False,
    size: tuple[int, int] = (640, 400),
) -> Image.Image:
    """One line for each of `series`, name -> (xs, ys), with axes, ticks and a legend.

    Raises:
        ValueError: there is nothing to draw.
    """
    points = {name: _finite(xs, ys, log_x, log_y) for name, (xs, ys) in series.items()}
    points = {name: found for name, found in points.items() if len(found)}
    if not points:
        raise ValueError(f"{title}: no finite values to draw")
    every = np.concatenate(list(points.values()))
    low, high = every.min(0), every.max(0)
    span = np.where(high > low, high - low, 1.0)
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = 64, 24, size[0] - 12, size[1] - 36

    def place(values: np.ndarray) -> list[tuple[float, float]]:
        unit = (values - low) / span
        return [(left + x * (right - left), bottom - y * (bottom - top)) for x, y in unit]

    draw.rectangle((left, top, right, bottom), outline="grey")
    for fraction in np.linspace(0, 1, 5):
        x_value, y_value = low + fraction * span
        x, y = left + fraction * (right - left), bottom - fraction * (bottom - top)
        draw.line((x, bottom, x, bottom + 4), fill="grey")
        draw.line((left - 4, y, left, y), fill="grey")
        draw.text((x, bottom + 6), _number(x_value, log_x), fill="black", font=_font(), anchor="ma")
        draw.text((left - 6, y), _number(y_value, log_y), fill="black", font=_font(), anchor="rm")
    draw.text((left, 6), title, fill="black", font=_font())
    draw.text((right, size[1] - 4), x_label, fill="black", font=_font(), anchor="rd")
    for i, found in enumerate(points.values()):
        colour = COLOURS[i % len(COLOURS)]
        line = place(found)
        if len(line) > 1:
            draw.line(line, fill=colour, width=2)
        else:
            draw.circle(line[0], 3, fill=colour)
    lines = [place(found) for found in points.values()]
    x, y = _emptiest(lines, list(points), (left, top, right, bottom))
    for i, name in enumerate(points):
        draw.text((x, y - i * TEXT_HEIGHT), name, fill=COLOURS[i % len(COLOURS)], font=_font(), anchor="ld")
    return image


def _emptiest(
    lines: Sequence[Sequence[tuple[float, float]]], names: Sequence[str], axes: tuple[int, int, int, int]
) -> tuple[float, float]:
    """The place of a legend's lowest line, in that corner of the axes which the lines cross least."""
    left, top, right, bottom = axes
    width, height = max(_font().getlength(name) for name in names) + 12, len(names) * TEXT_HEIGHT + 8
    at = []
    for line in lines:
        xs, ys = np.array(line).T
        along = np.linspace(0, len(line) - 1, 400)
        at.append([np.interp(along, np.arange(len(line)), values) for values in (xs, ys)])

    def crossed(corner: tuple[float, float]) -> int:
        x, y = corner
        inside = [(x <= xs) & (xs <= x + width) & (y - height <= ys) & (ys <= y) for xs, ys in at]
        return int(np.sum(inside))

    corners = [(x, y) for x in (left, right - width) for y in (bottom, top + height)]
    x, y = min(corners, key=crossed)
    return x + 6, y - 4


def scatter(
    groups: Mapping[str, np.ndarray],
    *,
    title: str,
    limit: float,
    size: tuple[int, int] = (320, 340),
) -> Image.Image:
    """A dot for each point f[n, 2] of each of `groups`; both axes go from -limit to limit, others are left out."""
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = 8, 24, size[0] - 8, size[1] - 12
    draw.rectangle((left, top, right, bottom), outline="grey")
    draw.text((left, 6), title, fill="black", font=_font())
    for i, (name, points) in enumerate(groups.items()):
        colour = COLOURS[i % len(COLOURS)]
        for x, y in np.asarray(points, np.float64):
            if max(abs(x), abs(y)) < limit:
                at = (left + (x / limit + 1) / 2 * (right - left), bottom - (y / limit + 1) / 2 * (bottom - top))
                draw.circle(at, 1.5, fill=colour)
        draw.text((left + 6, bottom - 4 - i * TEXT_HEIGHT), name, fill=colour, font=_font(), anchor="ld")
    return image


def matrix(
    values: np.ndarray,
    *,
    title: str,
    rows: Sequence[str],
    columns: Sequence[Image.Image] = (),
    cell: int = 32,
) -> Image.Image:
    """f[n, m] as squares with their numbers, the darker the larger; a name for each row, a picture for each column."""
    values = np.asarray(values, np.float64)
    low, span = values.min(), np.ptp(values) or 1.0
    left = 8 + int(max(_font().getlength(name) for name in rows)) + 8
    top = 24 + (cell if columns else 0)
    image = Image.new("RGB", (left + cell * values.shape[1] + 8, top + cell * values.shape[0] + 8), "white")
    draw, small = ImageDraw.Draw(image), ImageFont.load_default(10)
    draw.text((8, 6), title, fill="black", font=_font())
    for j, picture in enumerate(columns):
        image.paste(picture.resize((cell - 2, cell - 2)), (left + j * cell + 1, 24))
    for i, name in enumerate(rows):
        draw.text((left - 8, top + (i + 0.5) * cell), name, fill="black", font=_font(), anchor="rm")
        for j, value in enumerate(values[i]):
            dark = (value - low) / span
            colour = tuple(round(255 + dark * (end - 255)) for end in (31, 75, 130))
            x, y = left + j * cell, top + i * cell
            draw.rectangle((x, y, x + cell - 1, y + cell - 1), fill=colour)
            ink = "white" if dark > 0.5 else "black"
            draw.text((x + cell / 2, y + cell / 2), f"{value:.2f}", fill=ink, font=small, anchor="mm")
    return image


def _finite(xs: Sequence[float], ys: Sequence[float], log_x: bool, log_y: bool) -> np.ndarray:
    """The points as f64[n, 2], in the axes' own scale; what has no place there is left out."""
    points = np.stack([np.asarray(xs, np.float64), np.asarray(ys, np.float64)], axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        for axis, log in enumerate((log_x, log_y)):
            if log:
                points[:, axis] = np.log10(points[:, axis])
    return points[np.isfinite(points).all(1)]


def _number(value: float, log: bool) -> str:
    return f"{10**value if log else value:.3g}"


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(11)


def _cut(text: str, width: int) -> str:
    while text and _font().getlength(text) > width:
        text = text[:-1]
    return text
