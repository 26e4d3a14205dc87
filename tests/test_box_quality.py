"""The evaluation of the model in the box: its measures on made-up pictures whose scores are known beforehand."""

import json
import math
from string import Formatter

import numpy as np
import pytest
from PIL import Image

from examples.benchmarks import box_quality as quality

COUNT = 100
RGB = {
    "red": (221, 46, 68),
    "orange": (244, 144, 12),
    "yellow": (253, 203, 88),
    "green": (120, 177, 89),
    "blue": (85, 172, 238),
    "purple": (170, 142, 214),
    "brown": (193, 105, 79),
    "black": (49, 55, 61),
}


@pytest.fixture(scope="module")
def gallery():
    return np.random.default_rng(0).integers(0, 256, (COUNT, 8, 8, 3), np.uint8)


def drawn(colour, inside=slice(2, 14)):
    """A square of one colour on white."""
    picture = np.full((16, 16, 3), 255, np.uint8)
    picture[inside, inside] = colour
    return picture


def test_a_perfect_model_is_always_first(gallery):
    distances = quality.squared_distances(gallery, gallery)
    places = quality.ranks(distances, np.arange(COUNT))
    assert quality.top(places, 1) == quality.top(places, 5) == 1.0
    assert (np.diag(distances) == 0).all()
    assert quality.squared_errors(gallery, gallery).max() == 0


def test_a_model_that_draws_at_random_scores_at_chance(gallery):
    rng = np.random.default_rng(1)
    pictures = rng.integers(0, 256, (4000, 8, 8, 3), np.uint8)
    places = quality.ranks(quality.squared_distances(pictures, gallery), rng.integers(0, COUNT, 4000))
    for k in (1, 5):
        chance = k / COUNT
        assert abs(quality.top(places, k) - chance) < 4 * math.sqrt(chance * (1 - chance) / 4000)


def test_shuffled_captions_take_a_perfect_model_to_chance(gallery):
    shuffled = np.random.default_rng(2).permutation(COUNT)
    places = quality.ranks(quality.squared_distances(gallery, gallery), shuffled)
    assert quality.top(places, 1) == (shuffled == np.arange(COUNT)).mean() < 0.05


def test_distance_is_the_summed_squared_difference_in_unit_pixels(gallery):
    found = quality.squared_distances(gallery[:3], gallery[3:7])
    expected = [[((a / 255.0 - b / 255.0) ** 2).sum() for b in gallery[3:7]] for a in gallery[:3]]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_ranks_count_what_is_nearer_and_ties():
    distances = np.array([[3.0, 1.0, 2.0], [1.0, 1.0, 5.0], [7.0, 7.0, 7.0]])
    assert quality.ranks(distances, np.array([0, 0, 2])).tolist() == [2, 1, 2]
    assert quality.top(np.array([0, 1, 4, 5]), 1) == 0.25
    assert quality.top(np.array([0, 1, 4, 5]), 5) == 0.75


def test_a_constant_encoder_finds_nothing():
    same = np.ones((COUNT, 4))
    assert quality.top(quality.recall_ranks(same, same, np.arange(COUNT)), 5) == 0.0


def test_recall_ranks_by_cosine_not_by_length():
    image = np.array([[1.0, 0.0], [100.0, 100.0], [0.0, 1.0]])
    text = np.array([[5.0, 0.1], [0.1, 0.1], [-0.1, 0.2]])
    assert quality.recall_ranks(text, image, np.array([0, 1, 2])).tolist() == [0, 0, 0]
    assert quality.recall_ranks(text, image, np.array([1, 0, 0])).tolist() == [1, 2, 2]


def test_psnr_is_the_mean_of_the_decibels():
    truth = np.zeros((2, 4, 4, 3), np.uint8)
    off = truth.copy()
    off[0] += 51  # 0.2: mean squared error 0.04
    off[1, 0] += 51  # a quarter of the pixels: 0.01
    np.testing.assert_allclose(quality.squared_errors(off, truth), [0.04, 0.01])
    assert quality.psnr(off, truth) == pytest.approx((-10 * math.log10(0.04) + 20) / 2)
    assert quality.psnr(truth, truth) == math.inf


def test_colour_is_the_median_of_what_is_not_white():
    picture = drawn(RGB["green"])
    picture[2, 2:14] = 0  # an outline does not count
    picture[13, 13] = 230  # nor do faint edges
    np.testing.assert_allclose(quality.main_colour(picture), np.array(RGB["green"]) / 255)
    np.testing.assert_array_equal(quality.main_colour(drawn((255, 255, 255))), [1, 1, 1])


def test_references_are_the_means_over_shapes_of_a_colour():
    names = ["red heart", "red circle", "broken heart", "hollow red circle", "red apple", "black square"]
    pictures = [drawn((200, 0, 0)), drawn((100, 100, 0)), *[drawn((0, 255, 0))] * 3, drawn((0, 0, 0))]
    found = quality.reference_colours(names, np.stack(pictures))
    assert set(found) == {"red", "black", "white"}
    np.testing.assert_allclose(found["red"], np.array([150, 50, 0]) / 255)
    with pytest.raises(ValueError, match="a colour and a shape"):
        quality.reference_colours(names[2:5], np.stack(pictures[2:5]))


def test_a_colour_is_recognised_in_another_shape_and_a_little_off():
    names = [f"{colour} heart" for colour in RGB]
    references = quality.reference_colours(names, np.stack([drawn(rgb) for rgb in RGB.values()]))
    rng = np.random.default_rng(3)
    noisy = np.stack(
        [drawn(np.clip(np.array(rgb) + rng.integers(-12, 13, 3), 0, 255), slice(4, 9)) for rgb in RGB.values()]
    )
    squares = [f"{colour} square" for colour in RGB]
    assert quality.colours_right(squares, noisy, references).all()
    assert not quality.colours_right(squares[1:] + squares[:1], noisy, references).any()
    blank = np.stack([drawn((255, 255, 255))] * len(squares))
    assert not quality.colours_right(squares, blank, references).any()


def test_spread_is_zero_for_one_picture_repeated_and_one_for_black_and_white(gallery):
    assert quality.spread(gallery[[0, 0, 0]]) == 0
    assert quality.spread(np.stack([np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)])) == 1
    assert quality.spread(gallery) == pytest.approx(math.sqrt(1 / 6), rel=0.05)  # of independent uniform values


def test_data_set_is_read_with_the_base_emoji_first(tmp_path):
    rows = {"train": [("toned hand", "tone"), ("red heart", "base")], "held_out": [("green heart", "base")]}
    for part, entries in rows.items():
        (tmp_path / part).mkdir()
        lines = []
        for i, (name, kind) in enumerate(entries):
            Image.fromarray(drawn((i, 7, 7))).save(tmp_path / part / f"{i}.png")
            lines.append(json.dumps({"file_name": f"{i}.png", "name": name, "kind": kind}))
        (tmp_path / part / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    emoji = quality.read_emoji(tmp_path, 16)
    assert emoji.names == ["red heart", "green heart", "toned hand"]
    assert emoji.trained.tolist() == [True, False, True]
    assert emoji.base == len(emoji.gallery) == 2
    np.testing.assert_array_equal(emoji.pictures[0], drawn((1, 7, 7)))
    with pytest.raises(ValueError, match="16x16; the model draws 64x64"):
        quality.read_emoji(tmp_path, 64)


def test_table_fills_in_every_number():
    fields = {name for row in quality.TABLE for cell in row for _, name, _, _ in Formatter().parse(cell) if name}
    lines = quality.table(dict.fromkeys(fields, 0.5)).splitlines()
    assert len(lines) == len(quality.TABLE) + 2
    assert all(line.count("|") == 5 and "{" not in line for line in lines)
