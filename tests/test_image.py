"""Pictures of every mode and format in, the same pixels out; masks; sizes; and what is no picture."""

import numpy as np
import pytest
import torch
from PIL import Image

from sdjax import image as images

RNG = np.random.default_rng(0)


def random_picture(width, height):
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), np.uint8))


def palette_picture(alpha=None):
    """One pixel of colour 3 in a palette of four; `alpha` makes the palette's entries transparent."""
    picture = Image.new("P", (1, 1), 3)
    picture.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 10, 20, 30])
    if alpha is not None:
        picture.info["transparency"] = alpha
    return picture


PIXELS = {
    "RGB": ("RGB", (10, 20, 30), (10, 20, 30)),
    "RGBA, opaque": ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
    "RGBA, clear": ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
    "RGBA, half": ("RGBA", (0, 100, 200, 51), (204, 224, 244)),  # a fifth of the colour, four fifths white
    "LA, opaque": ("LA", (77, 255), (77, 77, 77)),
    "LA, clear": ("LA", (77, 0), (255, 255, 255)),
    "L": ("L", 77, (77, 77, 77)),
    "1, white": ("1", 1, (255, 255, 255)),
    "1, black": ("1", 0, (0, 0, 0)),
    "CMYK": ("CMYK", (255, 0, 51, 0), (0, 255, 204)),
    "I;16, white": ("I;16", 65535, (255, 255, 255)),
    "I;16": ("I;16", 77 * 257, (77, 77, 77)),
    "I;16B": ("I;16B", 77 * 257, (77, 77, 77)),
    "I, 16 bit": ("I", 77 * 257, (77, 77, 77)),
    "I, 8 bit": ("I", 77, (77, 77, 77)),
    "F, to 1": ("F", 0.6, (153, 153, 153)),
    "F, to 255": ("F", 77.0, (77, 77, 77)),
    "F, to 65535": ("F", 77.0 * 257, (77, 77, 77)),
    "F, not a number": ("F", float("nan"), (0, 0, 0)),
}


@pytest.mark.parametrize("name", PIXELS)
def test_every_mode_becomes_the_same_rgb_colour(name):
    mode, value, expected = PIXELS[name]
    picture = images.load_image(Image.new(mode, (3, 2), value))
    assert picture.mode == "RGB"
    assert np.array_equal(np.asarray(picture), np.full((2, 3, 3), expected, np.uint8))


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [(None, (10, 20, 30)), (3, (255, 255, 255)), (0, (10, 20, 30)), (bytes([255, 0, 0, 51]), (206, 208, 210))],
)
def test_a_palette_is_looked_up_and_its_transparent_colours_are_white(alpha, expected):
    assert images.load_image(palette_picture(alpha)).getpixel((0, 0)) == expected


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("RGB", "png"), ("RGBA", "webp"), ("LA", "png"), ("L", "jp2"), ("P", "gif"), ("1", "png")]
    + [("CMYK", "tiff"), ("I;16", "png"), ("I;16", "tiff"), ("F", "tiff"), ("RGB", "bmp")],
)
def test_a_file_of_every_mode_loads_as_the_picture_it_holds(tmp_path, mode, suffix):
    grey = Image.fromarray(RNG.integers(0, 256, (5, 7), np.uint8))
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(grey, np.uint16) * 257)
    elif mode == "F":
        picture = Image.fromarray(np.asarray(grey, np.float32) / 255)
    elif mode == "LA":
        picture = Image.merge("LA", (grey, Image.new("L", grey.size, 255)))
    else:
        picture = random_picture(7, 5).convert(mode) if mode not in ("L", "1") else grey.convert(mode)
    path = tmp_path / f"picture.{suffix}"
    picture.save(path, **({"lossless": True} if suffix == "webp" else {}))
    loaded = images.load_image(path)
    expected = grey.convert("RGB") if mode in ("I;16", "F", "LA") else picture.convert("RGB")
    assert loaded.size == (7, 5)
    assert np.array_equal(np.asarray(loaded), np.asarray(expected))
    assert np.array_equal(np.asarray(images.load_image(str(path))), np.asarray(loaded))


UPRIGHT = {  # stored pixels -> the picture as it is to be seen (EXIF 2.32, tag 0x0112)
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: stored[::-1].swapaxes(0, 1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: stored[:, ::-1].swapaxes(0, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_a_photograph_is_turned_upright_by_its_exif_orientation(tmp_path, orientation):
    stored = random_picture(6, 4)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "turned.png", exif=exif)
    upright = images.load_image(tmp_path / "turned.png")
    assert np.array_equal(np.asarray(upright), UPRIGHT[orientation](np.asarray(stored)))
    with Image.open(tmp_path / "turned.png") as opened:
        mask = images.load_mask(opened.convert("L"), upright.size)  # masks are turned too
    grey = np.asarray(stored.convert("L"), np.float32) / 255
    assert np.array_equal(mask, UPRIGHT[orientation](grey))


def test_the_first_frame_of_an_animation_is_taken(tmp_path):
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "green", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert images.load_image(tmp_path / "moving.gif").getcolors() == [(48, (255, 0, 0))]


def test_a_picture_that_was_passed_in_is_not_changed():
    picture = Image.new("RGBA", (3, 2), (1, 2, 3, 4))
    images.load_image(picture)
    assert picture.mode == "RGBA"
    assert picture.getpixel((2, 1)) == (1, 2, 3, 4)


def damaged(folder, kind):
    """A path that holds no good picture."""
    path = folder / "bad.png"
    random_picture(64, 64).save(path)
    whole = path.read_bytes()
    if kind == "cut off":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "broken inside":
        path.write_bytes(whole[:60] + bytes(200) + whole[260:])
    elif kind == "empty file":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("not a picture")
    elif kind == "no pixels":
        path.write_bytes(b"P6 0 0 255\n")
    else:  # a picture inside that fails in the decoder itself
        path = folder / "bad.avif"
        random_picture(64, 64).save(path)
        whole = bytearray(path.read_bytes())
        start = whole.index(b"mdat") + 4
        whole[start:] = bytes(len(whole) - start)
        path.write_bytes(whole)
    return path


@pytest.mark.parametrize("kind", ["cut off", "broken inside", "empty file", "text", "no pixels", "broken AVIF"])
def test_a_damaged_file_is_one_clear_error_that_names_it(tmp_path, kind):
    path = damaged(tmp_path, kind)
    with pytest.raises(ValueError, match="not a picture that can be read") as caught:
        images.load_image(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_picture_opened_by_the_caller_is_the_same_error(tmp_path):
    with (
        Image.open(damaged(tmp_path, "cut off")) as picture,
        pytest.raises(ValueError, match="this picture: not a pic"),
    ):
        images.load_image(picture)


@pytest.mark.parametrize("size", [(0, 0), (0, 4), (4, 0)])
def test_an_empty_picture_is_refused(size):
    with pytest.raises(ValueError, match="there are no pixels"):
        images.load_image(Image.new("RGB", size))


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for path in (tmp_path / "no.png", tmp_path):
        with pytest.raises(FileNotFoundError, match="no such picture file") as caught:
            images.load_image(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("source", [None, 3, b"picture.png", np.zeros((4, 4, 3), np.uint8)])
def test_what_is_neither_path_nor_picture_is_refused(source):
    with pytest.raises(TypeError, match="expected a path or a PIL image, found"):
        images.load_image(source)


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    random_picture(30, 30).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    with pytest.raises(ValueError, match="shrink the picture first"):
        images.load_image(tmp_path / "bomb.png")


SQUARE = np.zeros((8, 8), np.uint8)
SQUARE[2:6, 2:6] = 255


def test_a_hard_mask_is_0_and_1():
    for picture in (
        Image.fromarray(SQUARE),
        Image.fromarray(SQUARE).convert("1"),
        Image.fromarray(SQUARE).convert("RGB"),
    ):
        mask = images.load_mask(picture, (8, 8))
        assert mask.dtype == np.float32
        assert np.array_equal(mask, SQUARE / 255)


def test_a_soft_mask_keeps_its_grey_values():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(images.load_mask(Image.fromarray(ramp), (16, 16)), ramp.astype(np.float32) / 255)
    deep = Image.fromarray(ramp.astype(np.uint16) * 257)  # 16 bit
    assert np.array_equal(images.load_mask(deep, (16, 16)), ramp.astype(np.float32) / 255)


def test_the_clear_part_of_a_mask_is_black():
    white = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    white.putalpha(Image.fromarray(SQUARE))
    assert np.array_equal(images.load_mask(white, (8, 8)), SQUARE / 255)


def test_a_mask_of_another_size_is_scaled():
    mask = images.load_mask(Image.fromarray(SQUARE), (80, 80))
    assert mask.shape == (80, 80)
    assert mask[40, 40] == 1
    assert mask[:10].max() == 0
    assert images.load_mask(Image.new("L", (100, 51), 255), (64, 32)).shape == (32, 64)  # 2 % is no other aspect


@pytest.mark.parametrize("size", [(8, 4), (4, 8), (100, 97)])
def test_a_mask_of_another_aspect_is_refused(size):
    with pytest.raises(ValueError, match=f"mask is 8x8 and the picture {size[0]}x{size[1]}; make a mask"):
        images.load_mask(Image.fromarray(SQUARE), size)


def test_a_black_mask_is_refused():
    with pytest.raises(ValueError, match="black everywhere; paint the part"):
        images.load_mask(Image.new("L", (8, 8)), (8, 8))


def test_the_latent_mask_is_that_of_nearest_interpolation():
    mask = RNG.random((2, 40, 24, 1), np.float32)
    expected = torch.nn.functional.interpolate(torch.tensor(mask).permute(0, 3, 1, 2), size=(5, 3))
    assert np.array_equal(images.latent_mask(mask, 8), expected.permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((512, 512), (512, 512)),
        ((511, 333), (512, 336)),
        ((1, 1), (8, 8)),
        ((3, 1000), (8, 1000)),
        ((4096, 4096), (1024, 1024)),
        ((6000, 4000), (1256, 840)),
        ((100_000, 10), (100_000, 8)),
    ],
)
def test_a_picture_is_worked_on_at_its_own_size_rounded_or_a_bounded_area(size, expected):
    assert images.working_size(size) == expected


def test_the_size_that_was_asked_for_is_taken():
    assert images.working_size((333, 500), asked=(2048, 64)) == (2048, 64)


@pytest.mark.parametrize(
    ("asked", "advice"),
    [((501, 512), "try 504x512"), ((0, 64), "try 8x64"), ((-8, 64), "try 8x64"), ((64, 3), "try 64x8")]
    + [((64.0, 64), "whole numbers"), (("64", 64), "whole numbers"), ((64, None), "whole numbers")],
)
def test_a_size_that_cannot_be_made_is_refused_with_advice(asked, advice):
    with pytest.raises(ValueError, match=advice):
        images.working_size((64, 64), asked=asked)


def test_fit_crops_around_the_centre_only_where_the_aspect_differs():
    wide = Image.new("RGB", (96, 32), "red")
    wide.paste("blue", (32, 0, 64, 32))
    assert images.fit(wide, (16, 16)).getpixel((8, 8)) == (0, 0, 255)
    assert images.fit(wide, (16, 16)).getpixel((1, 8))[2] > 200  # red was cropped away
    assert images.fit(wide, (97, 32)).getpixel((1, 16)) == (255, 0, 0)
    assert images.fit(wide, (97, 32)).size == (97, 32)
    assert images.fit(wide, wide.size) is wide


def test_paste_back_is_exact_outside_the_mask_and_inside_it():
    old, new = random_picture(31, 17), random_picture(31, 17)
    mask = RNG.random((17, 31), np.float32)
    mask[:5], mask[12:] = 0, 1
    result = np.asarray(images.paste_back(old, new, mask), np.float64)
    old, new = np.asarray(old, np.float64), np.asarray(new, np.float64)
    assert np.array_equal(result[:5], old[:5])
    assert np.array_equal(result[12:], new[12:])
    blend = (1 - mask[..., None]) * old + mask[..., None] * new
    assert np.abs(result - blend).max() < 0.5 + 1e-4


def test_all_256_values_survive_the_way_to_the_network_and_back():
    every = Image.fromarray(np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3))
    array = images.to_array(every)
    assert array.dtype == np.float32
    assert (array.min(), array.max()) == (-1, 1)
    (back,) = images.to_images(images.to_uint8(np.asarray(array)[None]))
    assert np.array_equal(np.asarray(back), np.asarray(every))


def test_values_outside_the_range_are_clipped_and_others_rounded():
    values = np.array([-3.0, -1.0, 0.001, 1.0, 7.0], np.float32).reshape(1, 1, 5, 1).repeat(3, -1)
    assert np.asarray(images.to_uint8(values))[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]
