"""Whatever a picture's metadata holds, the picture is used; and what a mask means where that has to be guessed."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from sdjax import image as images
from sdjax.pipeline.recipe import COMMENT, EXIF_FOLDER, KEY, decoded_comment, has_recipe, read_parameters

PIXELS = np.random.default_rng(0).integers(0, 255, (6, 9, 3), np.uint8)
PICTURE = Image.fromarray(PIXELS)
TYPES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 99: 4}
"""Bytes of a value of every type that TIFF 6.0 and BigTIFF know, and of one that nobody does."""

TAGS = (0x010E, 0x0112, 0x011A, 0x011B, 0x0128, 0x0213, 0x8298, 0x8769, 0x8825, 0x9286, 0xA005, 0x0201, 0x02BC)


def exif_of(entries, order="<", first_orientation=None):
    """An EXIF block of (tag, type, count, value bytes), well formed but for what these say."""
    if first_orientation is not None:
        entries = [(0x0112, 3, 1, struct.pack(f"{order}H", first_orientation)), *entries]
    place, data = 8 + 2 + 12 * len(entries) + 4, b""
    out = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(entries))
    for tag, kind, count, value in entries:
        if len(value) <= 4:
            out += struct.pack(f"{order}HHI", tag, kind, count) + value.ljust(4, b"\0")
        else:
            out += struct.pack(f"{order}HHII", tag, kind, count, place + len(data))
            data += value
    return b"Exif\0\0" + out + struct.pack(f"{order}I", 0) + data


def file_of(kind, exif):
    file = io.BytesIO()
    options = {"lossless": True} if kind == "WEBP" else {}
    PICTURE.save(file, kind, exif=exif, **options)
    return file.getvalue()


ENTRIES = st.lists(
    st.builds(
        lambda tag, kind, count, value: (tag, kind, count, value),
        st.sampled_from(TAGS),
        st.sampled_from(list(TYPES)),
        st.one_of(st.integers(0, 4), st.just(2**31), st.just(2**32 - 1)),
        st.binary(min_size=0, max_size=24),
    ),
    max_size=4,
)


@pytest.mark.filterwarnings("ignore")
@given(ENTRIES, st.sampled_from("<>"), st.sampled_from(["JPEG", "PNG", "WEBP"]))
def test_a_picture_is_used_whatever_its_exif_says(tmp_path_factory, entries, order, kind):
    data = file_of(kind, exif_of(entries, order))
    path = tmp_path_factory.getbasetemp() / "odd.png"
    path.write_bytes(data)
    found = images.load_image(path)
    assert sorted(found.size) == [6, 9]  # some of them say that it lies on its side
    assert not has_recipe(path)
    read_parameters(path)


@pytest.mark.filterwarnings("ignore")
@given(st.binary(max_size=200), st.sampled_from(["JPEG", "PNG", "WEBP"]))
def test_a_picture_is_used_whatever_stands_where_exif_belongs(exif, kind):
    with Image.open(io.BytesIO(file_of(kind, b"Exif\0\0" + exif))) as opened:
        assert sorted(images.load_image(opened).size) == [6, 9]


@pytest.mark.parametrize(
    ("kind", "value"),
    [(2, b"6\0"), (9, struct.pack("<i", 6)), (4, struct.pack("<I", 6)), (8, struct.pack("<h", 6)), (3, b"\6\0")],
)
def test_an_orientation_of_another_type_is_understood(kind, value):
    with Image.open(
        io.BytesIO(file_of("JPEG", exif_of([(0x0112, kind, len(value) if kind == 2 else 1, value)])))
    ) as im:
        assert images.load_image(im).size == (6, 9)


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_that_is_none_leaves_the_picture_as_it_is(value):
    with Image.open(io.BytesIO(file_of("PNG", exif_of([], first_orientation=value)))) as opened:
        np.testing.assert_array_equal(np.asarray(images.load_image(opened)), PIXELS)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


BAD_CHUNKS = {
    "a text that unpacks to too much": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**27), 9)),
    "a text that does not unpack": chunk(b"iTXt", b"Comment\0\1\0\0\0broken"),
    "a size of pixels cut short": chunk(b"pHYs", b"\0"),
    "a gamma cut short": chunk(b"gAMA", b"\0"),
    "colours cut short": chunk(b"cHRM", b"\0\0"),
    "an empty profile": chunk(b"iCCP", b""),
    "an animation of no frames": chunk(b"acTL", b"\0"),
    "an intent cut short": chunk(b"sRGB", b""),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BAD_CHUNKS)
@pytest.mark.parametrize("place", ["before the pixels", "after the pixels"])
def test_metadata_of_a_png_that_cannot_be_read_does_not_stop_its_use(tmp_path, name, place):
    file = io.BytesIO()
    PICTURE.save(file, "PNG")
    data, at = file.getvalue(), 33 if place == "before the pixels" else -12
    (tmp_path / "p.png").write_bytes(data[:at] + BAD_CHUNKS[name] + data[at:])
    np.testing.assert_array_equal(np.asarray(images.load_image(tmp_path / "p.png")), PIXELS)
    assert not has_recipe(tmp_path / "p.png")


def test_what_is_left_out_with_the_metadata_changes_no_pixel():
    for kind, exif in (("PNG", exif_of([], first_orientation=1)), ("JPEG", exif_of([])), ("WEBP", exif_of([]))):
        data = file_of(kind, exif)
        bare = images.without_metadata(data)
        assert b"Exif" not in bare
        assert len(bare) < len(data)
        with Image.open(io.BytesIO(bare)) as one, Image.open(io.BytesIO(data)) as other:
            assert one.format == kind
            np.testing.assert_array_equal(np.asarray(one.convert("RGB")), np.asarray(other.convert("RGB")))
    assert images.without_metadata(b"GIF89a") is None


@pytest.mark.parametrize("mode", ["L", "RGB", "P"])
@pytest.mark.parametrize("transparency", [b"\0" * 300, (1, 2), -5, "red", 10**9])
def test_a_transparency_that_makes_no_sense_is_passed_over(mode, transparency):
    picture = PICTURE.convert(mode)
    picture.info["transparency"] = transparency
    assert images.load_image(picture).size == PICTURE.size


TEXT = "a red cat, 日本\nSteps: 20, Sampler: Euler a, Seed: 1"


@pytest.mark.parametrize(
    ("comment", "order"),
    [
        (b"UNICODE\0" + TEXT.encode("utf-16-be"), "be"),
        (b"UNICODE\0" + TEXT.encode("utf-16-be"), "le"),
        (b"UNICODE\0" + TEXT.encode("utf-16-le"), "be"),
        (b"UNICODE\0" + TEXT.encode("utf-16-le"), "le"),
        (b"UNICODE\0" + TEXT.encode("utf-16"), "be"),
        (b"UNICODE\0" + TEXT.encode("utf-16-le") + b"\0\0", "le"),
        (b"UNICODE\0" + TEXT.encode(), "le"),
        (b"ASCII\0\0\0" + TEXT.encode(), "le"),
        (bytes(8) + TEXT.encode(), "be"),
        (b"JIS\0\0\0\0\0" + TEXT.encode("iso2022_jp"), "be"),
        (TEXT.encode(), "le"),
        (TEXT, "le"),
    ],
)
def test_a_comment_is_read_in_every_way_that_tools_write_it(comment, order):
    assert decoded_comment(comment, order) == TEXT


@pytest.mark.parametrize("order", ["be", "le"])
def test_a_comment_without_latin_letters_is_read_in_the_order_that_its_file_says(order):
    assert decoded_comment(b"UNICODE\0" + "日本語".encode(f"utf-16-{order}"), order) == "日本語"


@given(
    st.one_of(st.binary(max_size=64), st.integers(), st.tuples(st.integers()), st.none()), st.sampled_from(["be", "le"])
)
def test_any_comment_is_text_or_nothing(comment, order):
    assert isinstance(decoded_comment(comment, order), str | None)


@pytest.mark.parametrize("kind", ["jpg", "webp", "png"])
def test_the_texts_of_a_file_are_found_through_its_exif(tmp_path, kind):
    exif = Image.Exif()
    exif[0x010E] = "a cat"
    exif.get_ifd(EXIF_FOLDER)[COMMENT] = b"UNICODE\0" + TEXT.encode("utf-16-le")
    PICTURE.save(tmp_path / f"p.{kind}", exif=exif)
    assert read_parameters(tmp_path / f"p.{kind}") == TEXT


@pytest.mark.parametrize("texts", [{KEY: "not JSON"}, {"parameters": "\ud800"}, {"x" * 70: "y"}])
def test_odd_texts_of_a_png_do_not_stop_its_use(tmp_path, texts):
    info = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        info.add(b"tEXt", name.encode() + b"\0" + text.encode("utf-8", "surrogatepass"))
    PICTURE.save(tmp_path / "p.png", pnginfo=info)
    np.testing.assert_array_equal(np.asarray(images.load_image(tmp_path / "p.png")), PIXELS)
    read_parameters(tmp_path / "p.png")


HOLE = np.zeros((6, 9), bool)
HOLE[2:4, 3:7] = True


@pytest.mark.parametrize("photo", ["colours", "one colour", "greys"])
def test_the_hole_in_a_photograph_is_what_is_painted(photo):
    rng, rgb = np.random.default_rng(1), np.full((60, 90, 3), (200, 60, 40), np.uint8)
    if photo != "one colour":
        rgb = rng.integers(0, 255, (60, 90, 3 if photo == "colours" else 1), np.uint8) + np.zeros((1, 1, 3), np.uint8)
    hole = HOLE.repeat(10, 0).repeat(10, 1)
    rgba = np.dstack([rgb, np.where(hole, 0, 255).astype(np.uint8)])
    with pytest.warns(UserWarning, match="a transparent part; that part is regenerated"):
        mask = images.load_mask(Image.fromarray(rgba), (90, 60))
    np.testing.assert_array_equal(mask == 1, hole)


@pytest.mark.parametrize("strokes", ["white", "soft white"])
def test_white_strokes_on_nothing_are_what_is_painted(strokes, recwarn):
    hole = HOLE.repeat(10, 0).repeat(10, 1)
    alpha = np.where(hole, 255 if strokes == "white" else 200, 0).astype(np.uint8)
    mask = images.load_mask(Image.fromarray(np.dstack([np.full((60, 90, 3), 255, np.uint8), alpha])), (90, 60))
    np.testing.assert_array_equal(mask > 0, hole)
    assert not recwarn.list


def test_a_coloured_mask_deserves_a_note():
    pixels = np.zeros((6, 9, 3), np.uint8)
    pixels[HOLE] = (255, 0, 0)
    with pytest.warns(UserWarning, match="the mask has colours; their brightness counts"):
        images.load_mask(Image.fromarray(pixels), (9, 6))


def test_pictures_are_known_by_their_content(tmp_path):
    PICTURE.save(tmp_path / "a.png")
    first = images.content_hash(tmp_path / "a.png")
    Image.new("RGB", PICTURE.size).save(tmp_path / "a.png")
    assert images.content_hash(tmp_path / "a.png") != first
    changed = PICTURE.copy()
    before = images.content_hash(changed)
    assert before == images.content_hash(PICTURE)
    changed.putpixel((0, 0), (1, 2, 3))
    assert images.content_hash(changed) != before
    turned = PICTURE.copy()
    turned.getexif()[0x0112] = 6
    assert images.content_hash(turned) != before
