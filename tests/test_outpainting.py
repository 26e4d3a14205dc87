"""Outpainting, feathered masks and the masked region alone: what is extended, cut out and pasted, pixel by pixel."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdjax import cli
from sdjax import image as images
from sdjax.image import Box, Sides
from sdjax.jobs.job_file import Job, read_lines, to_json
from sdjax.load import load
from sdjax.models.params import random_params
from sdjax.pipeline.pipeline import Pipeline
from sdjax.pipeline.pixels import pixels_of
from sdjax.pipeline.recipe import read_recipe
from sdjax.request import Request, parse_sides, task_of
from sdjax.storage import checkpoint
from tests.small import MINI, SMALL, mini

RNG = np.random.default_rng(0)
INPAINTING = dataclasses.replace(SMALL, name="nine", unet=dataclasses.replace(SMALL.unet, in_channels=9))


def photo(width, height):
    return Image.fromarray(RNG.integers(0, 255, (height, width, 3), np.uint8))


def spot(width, height, box):
    mask = Image.new("L", (width, height))
    mask.paste(255, box)
    return mask


def white(request, config=SMALL):
    """What the pasting of a request makes of a picture that is white everywhere: shows where, and how much."""
    found = pixels_of(request, config)
    return found, np.asarray(found.finish(Image.new("RGB", found.size, "white")))


# Settings


@pytest.mark.parametrize(
    ("text", "sides"),
    [
        ("64", Sides(64, 64, 64, 64)),
        ("0", Sides()),
        ("left=128,right=64", Sides(left=128, right=64)),
        ("up=3, DOWN = 4", Sides(top=3, bottom=4)),
        ("top=3,bottom=16383", Sides(top=3, bottom=16383)),
    ],
)
def test_sides_are_read(text, sides):
    assert parse_sides(text) == sides


@pytest.mark.parametrize(
    "text",
    ["", "left", "left=", "west=3", "left=-3", "-3", "left=3,left=4", "64,left=3", "up=1,top=2", "16384", "1.5", 64],
)
def test_what_names_no_sides_is_refused(text):
    with pytest.raises(
        ValueError, match=r'outpaint must be pixels, as in "64" \(on all sides\) or "left=128,right=64"'
    ):
        parse_sides(text)
    with pytest.raises(ValueError, match="outpaint must be pixels"):
        mini().inpaint("a", photo(8, 8), outpaint=text)


def test_a_request_that_extends_its_picture_is_inpainting():
    assert task_of(Request("a", image=photo(8, 8), outpaint="8")) == "inpaint"
    assert task_of(Request("a", image=photo(8, 8), outpaint="0")) == "img2img"
    assert task_of(Request("a", image=photo(8, 8), mask=photo(8, 8))) == "inpaint"


@pytest.mark.parametrize(
    ("named", "says"),
    [
        (dict(outpaint="8"), "outpaint needs the image that it belongs to"),
        (dict(image=True, only_masked=8), "only_masked needs a mask, or outpaint"),
        (dict(image=True, feather=8, outpaint="0"), "feather needs a mask, or outpaint"),
        (dict(image=True, soft_mask="differential"), "soft_mask needs a mask, or outpaint"),
        (dict(image=True, mask=True, soft_mask="hard"), "soft_mask must be one of blend, differential, found 'hard'"),
        (dict(image=True, mask=True, feather=-1), "feather must be a whole number of pixels in"),
        (dict(image=True, mask=True, only_masked=1.5), "only_masked must be a whole number of pixels in"),
        (dict(image=True, mask=True, feather=13), "feather is 13 pixels, and the picture 20x12; take fewer"),
        (
            dict(image=True, outpaint="right=16383"),
            "the picture is 20x12 and would become 16403x12; it can be up to 16383",
        ),
        (dict(image=True, outpaint="8000"), "would become 16020x16012"),
    ],
)
def test_settings_that_do_not_fit_are_refused(named, says):
    given = dict(image=photo(20, 12), mask=spot(20, 12, (3, 3, 9, 9)))
    named = {name: given.get(name) if value is True else value for name, value in named.items()}
    with pytest.raises(ValueError, match=says):
        list(mini().batch([Request("a", **named)]))


@pytest.mark.parametrize("named", [{}, dict(outpaint="0"), dict(outpaint=None)])
def test_inpainting_without_mask_and_outpaint_is_refused(named):
    with pytest.raises(ValueError, match="inpaint needs a mask, or outpaint"):
        mini().inpaint("a", photo(8, 8), **named)


def test_a_picture_is_kept_for_the_settings_that_shape_it():
    old, mask, sources = photo(16, 16), spot(16, 16, (4, 4, 9, 9)), {}
    ways = [{}, dict(feather=2), dict(only_masked=2), dict(outpaint="2"), dict(soft_mask="differential")]
    for named in [*ways, *ways]:
        mini()._prepared(Request("a", image=old, mask=mask, **named), sources)
    assert len(sources) == len(ways)


# Masks


@pytest.mark.parametrize("width", [1, 2, 7, 8, 16])
def test_a_feathered_edge_falls_to_0_within_its_width_and_leaves_the_inside(width):
    mask = np.zeros((40, 60), np.float32)
    mask[:, :20] = 1
    soft = images.feathered(mask, width)
    assert soft.dtype == np.float32
    assert (soft == soft[:1]).all()  # the border of the picture is no border of the mask
    row = soft[0]
    assert (row[:20] == 1).all()
    assert (row[20 + width :] == 0).all()
    assert (np.diff(row[19 : 20 + width + 1]) < 0).all()
    if width % 2 == 0:
        np.testing.assert_allclose(row[20 : 20 + width], 1 - np.arange(1, width + 1) / (width + 1), atol=1e-6)


def test_feathering_is_growing_then_averaging_over_squares():
    mask = (RNG.random((23, 31)) > 0.97).astype(np.float32) * RNG.random((23, 31)).astype(np.float32)
    grown, width = np.zeros_like(mask), 6
    for y, x in np.ndindex(mask.shape):
        grown[y, x] = mask[max(0, y - 3) : y + 4, max(0, x - 3) : x + 4].max()
    padded = np.pad(grown, 3, mode="edge")
    expected = np.array([[padded[y : y + 7, x : x + 7].mean() for x in range(31)] for y in range(23)])
    np.testing.assert_allclose(images.feathered(mask, width), np.maximum(mask, expected), atol=1e-6)


def test_a_cell_with_something_to_regenerate_is_regenerated():
    mask = np.zeros((16, 24), np.float32)
    mask[7, 9], mask[8, 23] = 0.5, 1
    expected = np.kron([[0, 0.5, 0], [0, 0, 1]], np.ones((8, 8)))
    assert np.array_equal(images.whole_cells(mask, 8), expected)


# Outpainting


def test_the_picture_is_extended_with_its_colours_and_stays_as_it_was():
    old = Image.new("RGB", (40, 30), "red")
    old.paste("blue", (20, 0, 40, 30))
    new = images.extended(old, Sides(left=16, bottom=8))
    assert new.size == (56, 38)
    assert np.array_equal(np.asarray(new)[:30, 16:], np.asarray(old))
    assert np.array_equal(np.asarray(new)[:30, :10], np.broadcast_to([255, 0, 0], (30, 10, 3)))
    assert np.array_equal(np.asarray(new)[34, 50], [0, 0, 255])


@pytest.mark.parametrize(
    ("size", "sides", "feather", "band"),
    [((48, 40), "left=16,right=24", 8, 8), ((45, 30), "top=11,left=3", 0, 0), ((64, 64), "16", None, 8)],
)
def test_what_is_new_is_made_and_what_is_old_stays_outside_of_the_band(size, sides, feather, band):
    old = Image.new("RGB", size, "black")
    left, top, right, bottom = parse_sides(sides)
    found, pasted = white(Request("a", image=old, outpaint=sides, feather=feather))
    assert pasted.shape[:2] == (size[1] + top + bottom, size[0] + left + right)
    known = np.zeros(pasted.shape[:2], bool)
    known[top : top + size[1], left : left + size[0]] = True
    assert (pasted[~known] == 255).all()
    inner = np.zeros_like(known)
    inner[(top > 0) * (top + band) : top + size[1] - (bottom > 0) * band, :] = True
    inner[:, : (left > 0) * (left + band)] = False
    inner[:, left + size[0] - (right > 0) * band if right else pasted.shape[1] :] = False
    assert (pasted[inner] == 0).all()
    between = known & ~inner
    assert ((pasted[between] > 0) & (pasted[between] < 255)).all()
    assert set(np.unique(found.cells)) <= set(np.unique(found.mask))


def test_a_cell_of_the_latent_that_holds_a_new_pixel_is_free():
    found = pixels_of(Request("a", image=photo(36, 32), outpaint="right=28", feather=0), SMALL)
    assert found.size == (64, 32)
    assert (found.cells[0, :, :, 0] == [0, 0, 0, 0, 1, 1, 1, 1]).all()  # pixel 36 is in cell 4, which begins at 32


def test_a_given_mask_is_regenerated_too():
    mask = spot(32, 32, (0, 0, 8, 8))
    _, pasted = white(Request("a", image=Image.new("RGB", (32, 32)), mask=mask, outpaint="bottom=8", feather=0))
    expected = np.zeros((40, 32))
    expected[:8, :8] = expected[32:] = 255
    assert np.array_equal(pasted[..., 0], expected)


def test_an_outpainted_picture_is_the_old_one_to_the_byte_where_it_was():
    old = photo(20, 12)
    made = mini().inpaint("red disc", old, outpaint="left=6,bottom=3", steps=2, feather=1)
    other = mini().inpaint("red disc", old, outpaint="left=6,bottom=3", steps=2, feather=1, seed=1)
    new, again = np.asarray(made[0]), np.asarray(other[0])
    assert new.shape == (15, 26, 3)
    assert np.array_equal(new[:11, 7:], np.asarray(old)[:11, 1:])
    assert (new[:, :6] != again[:, :6]).any()
    assert (new[12:] != again[12:]).any()


def test_an_inpainting_model_sees_the_new_part_as_masked():
    pipe = Pipeline(INPAINTING, random_params(INPAINTING), mini().tokenizer, "nine")
    prepared = pipe._prepared(Request("a", image=photo(32, 32), outpaint="right=32", feather=0), {})
    assert (np.asarray(prepared.source.concat)[0, :, :, 0] == [0, 0, 0, 0, 1, 1, 1, 1]).all()


# The masked region alone


@pytest.mark.parametrize(
    ("box", "ratio", "within", "expected"),
    [
        (Box(10, 10, 20, 20), 1.0, (100, 100), Box(10, 10, 20, 20)),
        (Box(40, 10, 72, 18), 1.0, (100, 100), Box(40, 0, 72, 32)),
        (Box(0, 50, 8, 82), 1.0, (100, 100), Box(0, 50, 32, 82)),
        (Box(92, 50, 100, 82), 1.0, (100, 100), Box(68, 50, 100, 82)),
        (Box(50, 50, 60, 60), 2.0, (100, 100), Box(45, 50, 65, 60)),
        (Box(0, 0, 100, 40), 1.0, (100, 60), Box(0, 0, 100, 60)),
    ],
)
def test_a_box_grows_to_a_shape_inside_of_the_picture(box, ratio, within, expected):
    assert images.grown_to(box, ratio, within) == expected


def test_a_box_around_a_mask_has_padding_inside_of_the_picture():
    mask = np.zeros((50, 80), np.float32)
    mask[5:10, 70:78] = 0.1
    assert images.box_around(mask, 0) == Box(70, 5, 78, 10)
    assert images.box_around(mask, 8) == Box(62, 0, 80, 18)


@pytest.mark.parametrize(
    ("spot_box", "named", "size", "region"),
    [
        ((40, 40, 56, 56), dict(only_masked=8), (32, 32), (32, 32, 64, 64)),  # the model's own size
        ((40, 40, 56, 56), dict(only_masked=8, width=64, height=64), (64, 64), (32, 32, 64, 64)),
        ((40, 40, 72, 56), dict(only_masked=0), (48, 24), (40, 40, 72, 56)),
        ((10, 0, 170, 10), dict(only_masked=0), (48, 24), (10, 0, 170, 80)),  # at most twice as long
    ],
)
def test_the_region_around_the_mask_is_worked_on_at_the_size_of_the_model(spot_box, named, size, region):
    old = photo(200, 120)
    found = pixels_of(Request("a", image=old, mask=spot(200, 120, spot_box), **named), SMALL)
    assert found.size == size
    expected = old.crop(region).resize(size, Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(found.picture[0], images.to_array(expected))


def test_the_region_comes_back_at_full_resolution_and_the_rest_is_the_picture_to_the_byte():
    old, box = photo(203, 121), (150, 90, 190, 121)
    _, pasted = white(Request("a", image=old, mask=spot(203, 121, box), only_masked=4))
    expected = np.array(old)
    expected[90:121, 150:190] = 255
    np.testing.assert_array_equal(pasted, expected)


def test_a_region_that_is_the_whole_picture_is_plain_inpainting():
    old, mask = photo(16, 8), spot(16, 8, (3, 2, 9, 6))
    settings = dict(steps=3, width=16, height=8)
    (whole,) = mini().inpaint("red disc", old, mask, **settings)
    (region,) = mini().inpaint("red disc", old, mask, only_masked=16, **settings)
    np.testing.assert_array_equal(whole, region)


def test_a_region_is_inpainted_as_the_same_part_cut_out_by_hand():
    old, mask = photo(40, 32), spot(40, 32, (20, 10, 24, 14))
    (region,) = mini().inpaint("red disc", old, mask, only_masked=2, steps=3)
    box = (18, 8, 26, 16)
    (alone,) = mini().inpaint("red disc", old.crop(box), mask.crop(box), steps=3)
    by_hand = old.copy()
    by_hand.paste(alone, box)
    np.testing.assert_array_equal(region, by_hand)


def test_a_region_that_cannot_have_the_asked_shape_is_refused():
    request = Request("a", image=photo(200, 40), mask=spot(200, 40, (0, 0, 200, 8)), only_masked=0, width=64, height=64)
    with pytest.raises(
        ValueError, match="region around the mask is 200x40, and cannot have the shape of 64x64 inside a"
    ):
        pixels_of(request, SMALL)
    with pytest.raises(ValueError, match="width and height must be multiples of 8, found 60x64"):
        pixels_of(dataclasses.replace(request, width=60), SMALL)
    with pytest.raises(ValueError, match="the mask is 40x40 and the picture 200x40; make a mask of"):
        pixels_of(dataclasses.replace(request, mask=spot(40, 40, (0, 0, 8, 8))), SMALL)


def test_the_new_part_alone_can_be_worked_on():
    found, pasted = white(
        Request("a", image=Image.new("RGB", (200, 96)), outpaint="left=32", feather=0, only_masked=16)
    )
    assert found.size == (24, 48)
    assert pasted.shape == (96, 232, 3)
    assert (pasted[:, :32] == 255).all()
    assert (pasted[:, 32:] == 0).all()


# The command line, recipes and jobs


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mini().tokenizer.engine.save("tokenizer.json")
    checkpoint.save("mini", MINI, random_params(MINI), tokenizer=tmp_path, one_file=True)
    photo(20, 12).save("photo.png")
    spot(20, 12, (4, 4, 9, 9)).save("mask.png")
    return tmp_path


@pytest.mark.parametrize(
    "arguments",
    [
        "photo.png --outpaint left=6,down=3 --feather 1",
        "photo.png mask.png --only-masked 2 --size 10x10",
        "photo.png mask.png --outpaint 4 --soft-mask differential --strength 0.75",
        "photo.png mask.png --size 16x16",
    ],
)
def test_the_recipe_makes_the_picture_again(here, capsys, arguments):
    said = ["--model", "mini", "--steps", "3", "--seed", "5"]
    assert cli.main(["inpaint", "red disc", *arguments.split(), "-o", "one.png", *said]) == 0
    assert cli.main(["inpaint", "--recipe", "one.png", "-o", "two.png"]) == 0
    assert Path("one.png").read_bytes() == Path("two.png").read_bytes()
    recipe = read_recipe("one.png")
    assert recipe.task == "inpaint"
    assert ("Masked area padding: 2" in recipe.parameters()) == ("--only-masked" in arguments)
    assert cli.main(["info", "one.png"]) == 0
    assert all(word in capsys.readouterr().out for word in arguments.split() if "left" in word)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("photo.png", "the mask is missing: give the path of a picture after the prompt, or --outpaint left=64"),
        ("photo.png --outpaint west=3", "outpaint must be pixels"),
        ("photo.png --outpaint 0", "the mask is missing"),
        ("photo.png mask.png --only-masked -1", "only_masked must be a whole number of pixels"),
        ("photo.png mask.png --only-masked 0 --feather 99", "feather is 99 pixels, and the picture 20x12"),
        ("photo.png --outpaint right=16383", "would become 16403x12"),
    ],
)
def test_wrong_commands_end_in_one_line(here, capsys, arguments, says):
    assert cli.main(["inpaint", "a", *arguments.split(), "--model", "mini"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sdjax: error:")]
    assert says in line


def test_job_lines_have_the_same_settings(here):
    lines = [
        dict(prompt="a", init_image="photo.png", outpaint="left=6", feather=1),
        dict(prompt="a", init_image="photo.png", mask="mask.png", inpaint_full_res_padding=2),
        dict(prompt="a", init_image="photo.png", mask="mask.png", only_masked=2, size="8x8", soft_mask="differential"),
        dict(prompt="a", outpaint="left=6"),
        dict(prompt="a", init_image="photo.png", outpaint="left=six"),
        dict(prompt="a", init_image="photo.png", feather=3),
    ]
    Path("jobs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with open("jobs.jsonl", "rb") as file:
        found = list(read_lines(file, ".jsonl", {}))
    assert [line.request.only_masked for line in found[:3]] == [None, 2, 2]
    reasons = [line.reason for line in found[3:]]
    assert reasons[0] == "outpaint needs an init_image"
    assert reasons[1].startswith("outpaint must be pixels")
    assert reasons[2] == "feather needs a mask, or outpaint"
    Path("kept.jsonl").write_bytes(b"".join(map(to_json, found[:3])))
    with Job(Path("kept.jsonl"), MINI.sampling) as job:
        assert {size for size, *_ in job.shapes} == {(26, 12), "region", (8, 8)}


def test_a_job_makes_them_and_its_manifest_makes_them_again(here, capsys):
    lines = [
        dict(id="wide", prompt="red disc", init_image="photo.png", outpaint="left=6", feather=1),
        dict(id="part", prompt="red disc", init_image="photo.png", mask="mask.png", only_masked=2, size="8x8"),
        dict(id="near", prompt="red disc", init_image="photo.png", mask="mask.png", only_masked=1),
    ]
    Path("jobs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["batch", "jobs.jsonl", "-o", "out", "--model", "mini", "--steps", "2"]
    assert cli.main([*command, "--dry-run"]) == 0
    assert "masked regions of about 8x8, up to 64 UNet calls: 1 pictures in 1 batches of 8, one program for each" in (
        capsys.readouterr().out
    )
    assert cli.main(command) == 0
    assert cli.main(["batch", "out/manifest.jsonl", "-o", "again", "--model", "mini"]) == 0
    for name, size in (("wide", (26, 12)), ("part", (20, 12)), ("near", (20, 12))):
        pictures = [Image.open(f"{folder}/{name}.png") for folder in ("out", "again")]
        assert [picture.size for picture in pictures] == [size, size]
        assert np.array_equal(*map(np.asarray, pictures))


# The model in the box


def test_the_box_edits_a_part_of_a_large_picture_and_changes_it_gradually():
    pipe = load()
    (heart,) = pipe.text_to_image("a red heart", steps=10)
    large = Image.new("RGB", (300, 200), "white")
    large.paste(heart, (40, 60))
    mask = spot(300, 200, (200, 60, 264, 124))
    (two,) = pipe.inpaint("a blue circle", large, mask, only_masked=0, steps=10)
    new, old = np.asarray(two, int), np.asarray(large, int)
    black = np.asarray(mask) == 0
    assert np.array_equal(new[black], old[black])
    middle = new[80:104, 220:244].mean((0, 1))
    assert middle[2] > middle[0] + 50, "it is blue"

    ramp = Image.fromarray(np.tile(np.linspace(0, 255, 64).astype(np.uint8), (64, 1)))
    (mixed,) = pipe.inpaint("a blue circle", heart, ramp, soft_mask="differential", steps=10)
    change = np.abs(np.asarray(mixed, int) - np.asarray(heart, int)).mean((0, 2))
    left, middle, right = change[:16].mean(), change[24:40].mean(), change[44:60].mean()
    assert left < 8 < 16 < right
    assert left < middle < right
