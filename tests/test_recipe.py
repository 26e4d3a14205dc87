"""The recipe in a PNG: written whole, read back strictly."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from sdjax.pipeline.recipe import KEY, Recipe, read_parameters, read_recipe, save_picture
from tests.job_folders import RECIPE

PICTURE = Image.new("RGB", (8, 8), "red")


@given(st.text(), st.text(), st.floats(allow_nan=False), st.integers(0, 2**32 - 1))
def test_json_round_trip(prompt, negative, guidance, seed):
    recipe = dataclasses.replace(RECIPE, prompt=prompt, negative_prompt=negative, guidance=guidance, seed=seed)
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_png_round_trip(tmp_path):
    save_picture(tmp_path / "p.png", PICTURE, RECIPE)
    assert read_recipe(tmp_path / "p.png") == RECIPE
    with Image.open(tmp_path / "p.png") as image:
        assert image.getpixel((0, 0)) == (255, 0, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["p.png"]


def test_parameters_are_the_lines_that_other_tools_read():
    lines = RECIPE.parameters().split("\n")
    assert lines[:3] == ["a red heart, 日本 😀", "second line", "Negative prompt: blurry"]
    settings = dict(item.split(": ") for item in lines[3].split(", "))
    expected = {"Steps": "20", "Sampler": "DPM++ 2M", "Schedule type": "Karras", "CFG scale": "7.5", "Seed": "7"}
    expected |= {"Size": "64x48", "Model": "sd15.ckpt", "Denoising strength": "0.8", "Clip skip": "2"}
    assert expected.items() <= settings.items()


def test_our_pictures_are_replaced_and_others_are_not(tmp_path):
    save_picture(tmp_path / "p.png", PICTURE, RECIPE)
    save_picture(tmp_path / "p.png", PICTURE, dataclasses.replace(RECIPE, seed=8))
    assert read_recipe(tmp_path / "p.png").seed == 8
    PICTURE.save(tmp_path / "photo.png")
    (tmp_path / "notes.png").write_text("not a picture")
    for name in ("photo.png", "notes.png"):
        before = (tmp_path / name).read_bytes()
        with pytest.raises(FileExistsError, match="was not made by sdjax"):
            save_picture(tmp_path / name, PICTURE, RECIPE)
        assert (tmp_path / name).read_bytes() == before


def test_pictures_of_other_tools_have_parameters_but_no_recipe(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "a cat\nSteps: 20")
    PICTURE.save(tmp_path / "p.png", pnginfo=info)
    assert read_parameters(tmp_path / "p.png") == "a cat\nSteps: 20"
    with pytest.raises(ValueError, match="no recipe of sdjax"):
        read_recipe(tmp_path / "p.png")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        "5",
        json.dumps(json.loads(RECIPE.to_json()) | {"extra": 1}),
        RECIPE.to_json().replace('["photo.jpg", "ab"]', "5"),
    ],
)
def test_damaged_recipes_are_named(tmp_path, text):
    info = PngImagePlugin.PngInfo()
    info.add_itxt(KEY, text)
    PICTURE.save(tmp_path / "p.png", pnginfo=info)
    with pytest.raises(ValueError, match=r"p\.png.*recipe"):
        read_recipe(tmp_path / "p.png")


def test_files_that_are_no_png_are_named(tmp_path):
    PICTURE.save(tmp_path / "p.bmp")
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    with pytest.raises(ValueError, match="a BMP picture; recipes are in PNG, WebP and JPEG files"):
        read_recipe(tmp_path / "p.bmp")
    with pytest.raises(ValueError, match="not a picture that can be read"):
        read_recipe(tmp_path / "x.png")
    with pytest.raises(FileNotFoundError):
        read_recipe(tmp_path / "absent.png")


ODD = [None, True, -1, 0, 2**64, 10**400, 3.5, "", "x", [], [1], [None, None], ["x", "y"], {}, {"a": 1}]


@given(st.dictionaries(st.sampled_from([field.name for field in dataclasses.fields(Recipe)]), st.sampled_from(ODD)))
def test_entries_of_any_kind_are_taken_or_named(changes):
    text = json.dumps(json.loads(RECIPE.to_json()) | changes)
    try:
        recipe, said = Recipe.from_json(text), None
    except ValueError as error:
        recipe, said = None, str(error)
    if recipe is None:
        assert any(repr(value)[:60] in said or name in said for name, value in changes.items())
    else:
        assert recipe.parameters()
        assert json.loads(recipe.to_json()) == json.loads(text)
