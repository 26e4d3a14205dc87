"""Sheets and curves: every picture in its place, every line where its numbers are."""

import numpy as np
import pytest
from PIL import Image

from sdjax.train.plots import COLOURS, TEXT_HEIGHT, curves, matrix, scatter, sheet

RED, BLUE = (214, 39, 40), (31, 119, 180)


def where(image, colour):
    """The columns and rows of the pixels of one colour inside the axes, left of the legend."""
    pixels = np.asarray(image)[26:-38, 66:-60]
    rows, columns = np.nonzero((pixels == colour).all(-1))
    return columns, rows


def test_sheet_lays_pictures_in_rows_with_room_for_labels():
    colours = [(i * 40, 255 - i * 40, 100) for i in range(5)]
    pictures = [Image.new("RGB", (20, 10), colour) for colour in colours]
    for labels, below in ((None, 0), (["a", "b", "", "d", "e" * 99], TEXT_HEIGHT)):
        whole = sheet(pictures, 3, labels)
        assert whole.size == (3 * 24 + 4, 2 * (14 + below) + 4)
        for i, colour in enumerate(colours):
            x, y = 4 + i % 3 * 24, 4 + i // 3 * (14 + below)
            assert (np.asarray(whole)[y : y + 10, x : x + 20] == colour).all()


def test_label_is_drawn_below_its_own_picture_and_cut_to_its_width():
    pictures = [Image.new("RGB", (20, 10), "red")] * 3
    ink = (np.asarray(sheet(pictures, 3, ["", "W" * 50, ""])).sum(-1) < 3 * 128)[14:]
    columns = np.nonzero(ink)[1]
    assert len(columns) > 0
    assert columns.min() >= 4 + 24
    assert columns.max() < 4 + 24 + 20


def test_curves_are_where_their_numbers_are():
    image = curves({"up": ([0, 1, 2], [0, 1, 2]), "flat": ([0, 1, 2], [2, 2, 2])}, title="t", x_label="x")
    assert image.size == (640, 400)
    columns, rows = where(image, BLUE)
    assert np.corrcoef(columns, rows)[0, 1] < -0.99  # rows count downwards
    assert np.ptp(rows) > 250
    _, rows = where(image, RED)
    assert len(rows) == 0  # on the frame itself, at the top
    frame = np.asarray(image)[24, 66:-60]
    assert (frame == RED).all(-1).mean() > 0.9


def test_logarithmic_axis_makes_powers_straight_and_leaves_out_what_has_no_place():
    xs = [1, 10, 100, 1000]
    line = curves({"a": (xs, xs)}, title="t", x_label="x", log_x=True, log_y=True)
    also = curves({"a": ([0, *xs, 5], [7, *xs, float("nan")])}, title="t", x_label="x", log_x=True, log_y=True)
    assert line.tobytes() == also.tobytes()
    columns, rows = where(line, BLUE)
    assert np.corrcoef(columns, rows)[0, 1] < -0.99


def test_single_point_and_many_series_are_drawn():
    series = {f"s{i}": ([i], [i]) for i in range(len(COLOURS) + 1)}
    pixels = {tuple(pixel) for pixel in np.asarray(curves(series, title="t", x_label="x")).reshape(-1, 3)}
    assert RED in pixels
    assert BLUE in pixels


def test_nothing_to_draw_is_an_error_that_names_the_plot():
    with pytest.raises(ValueError, match="loss: no finite values"):
        curves({"a": ([1, 2], [float("nan"), -1]), "b": ([], [])}, title="loss", x_label="x", log_y=True)


def test_a_legend_is_where_no_line_is():
    line = curves({"falls": ([0, 0.01, 1], [1, 0, 0])}, title="t", x_label="x")  # through three corners
    legend = (np.asarray(line).astype(int)[26:46, 560:620].sum(-1) < 700).sum()
    assert legend > 20


def test_points_are_where_their_numbers_are_and_those_outside_are_left_out():
    image = scatter({"a": np.array([[0.9, 0.9], [3.0, 0.0]])}, title="t", limit=1, size=(216, 236))
    rows, columns = np.nonzero((np.asarray(image) == BLUE).all(-1)[25:-40, 9:-9])
    assert rows.max() < 20  # 95 % of the height
    assert columns.min() > 180


def test_a_matrix_is_darkest_where_its_number_is_largest():
    values = np.array([[0.0, 1.0, 0.2], [0.1, 0.3, 0.5]])
    pictures = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    image = matrix(values, title="t", rows=["first", "second"], columns=pictures, cell=40)
    pixels = np.asarray(image).astype(int)
    left, top = image.width - 8 - 3 * 40, image.height - 8 - 2 * 40
    corners = np.array([[pixels[top + 40 * i + 3, left + 40 * j + 3].sum() for j in range(3)] for i in range(2)])
    assert (np.argsort(-corners, axis=None) == np.argsort(values, axis=None)).all()
    assert [tuple(pixels[top - 20, left + 40 * j + 20]) for j in range(3)] == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
