"""Grids: what an axis may say, that each picture is the one made alone, resuming, and what a sheet shows."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from sdjax import cli
from sdjax.jobs import grid as grids
from sdjax.jobs.grid import axis, cells, grid, lines_of, written
from sdjax.jobs.sheet import GAP, KEY, Texts, draw, layout_of, wrapped
from sdjax.models.params import random_params
from sdjax.pipeline.recipe import read_recipe, recipe_of
from sdjax.request import Request
from sdjax.storage import checkpoint
from tests.small import MINI, mini


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grid")
    mini().tokenizer.engine.save(str(folder / "tokenizer.json"))
    checkpoint.save(folder / "mini", MINI, random_params(MINI), tokenizer=folder, one_file=True)
    return str(folder / "mini")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def values(text):
    """What the axis sets in each line."""
    return [next(iter(change.values())) for change in written(text).axis().changes]


# Axes


@pytest.mark.parametrize(
    ("text", "expected"),
    [  # the ranges as in the help of A1111's XYZ plot
        ("steps=1-5", [1, 2, 3, 4, 5]),
        ("steps=1-5 (+2)", [1, 3, 5]),
        ("steps=10-5 (-3)", [10, 7]),
        ("guidance=1-3 (+0.5)", [1, 1.5, 2, 2.5, 3]),
        ("seed=1-10 [5]", [1, 3, 5, 7, 10]),
        ("guidance=0.0-1.0 [6]", [0, 0.2, 0.4, 0.6, 0.8, 1]),
        ("guidance=-2--1(+0.5)", [-2, -1.5, -1]),
        ("steps=5-3", [5, 4, 3]),
        ("steps=1,3-5, 9", [1, 3, 4, 5, 9]),
        ("seed=4294967290-4294967292", [4294967290, 4294967291, 4294967292]),
        ("cfg=7.5,1e1", [7.5, 10]),
        ("CFG Scale=7", [7]),
        ("clip skip=0", [0]),
        ('sampler=Euler a,"DPM++ 2M",dpmpp_sde', ["euler_a", "dpmpp_2m", "dpmpp_sde"]),
        ('negative_prompt="red, blue",,green', ["red, blue", "", "green"]),
        ("guidance_interval=0 1,0.2 0.8", [[0, 1], [0.2, 0.8]]),
        ("loras=,a:0.5;b", [[], ["a:0.5", "b"]]),
    ],
)
def test_values_are_read_as_people_write_them(text, expected):
    assert values(text) == pytest.approx(expected) if isinstance(expected[0], float) else values(text) == expected


def test_a_sampler_with_its_spacing_sets_both_whatever_spacing_the_others_have():
    found = [
        cell.fields
        for cell in cells({"prompt": "a", "spacing": "simple"}, [written("sampler=DPM++ 2M Karras,ddim").axis()])
    ]
    assert [(line["sampler"], line["spacing"]) for line in found] == [("dpmpp_2m", "karras"), ("ddim", "simple")]


def test_labels_are_short_where_they_can_be():
    assert axis("cfg", [1 / 3, 2 / 3, 1.0]).labels == ("0.3333", "0.6667", "1")
    assert axis("cfg", [1 / 3, 0.33334444, 7.12345678]).labels == ("0.3333333333", "0.33334444", "7.12345678")
    assert axis("loras", [[], ["a:0.5", "b"]]).labels == ("none", "a:0.5, b")
    assert axis("seed", [4294967295, 0]).labels == ("4294967295", "0")


def test_sizes_are_widths_and_heights():
    assert written("size=8x16,16x8").axis().changes == ({"width": 8, "height": 16}, {"width": 16, "height": 8})


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"prompt": "a <lora:mine:1> b"}, {"prompt": "a <lora:mine:0.5> b"}),
        ({"prompt": "a <lyco:mine:1:0.2>"}, {"prompt": "a <lyco:mine:0.5>"}),
        (
            {"prompt": "a", "loras": ["styles/mine.safetensors:1", "b:2"]},
            {"loras": ["styles/mine.safetensors:0.5", "b:2"]},
        ),
        ({"prompt": "a <lora:other:1>"}, {"loras": ["mine:0.5"]}),
        ({"prompt": "a <lora:mine:1>", "weighting": "none"}, {"loras": ["mine:0.5"]}),
    ],
)
def test_the_weight_of_an_adapter_is_set_where_it_stands_or_the_adapter_is_added(fields, expected):
    (cell,) = cells(fields, [written("lora:mine=0.5").axis()])
    assert {name: value for name, value in cell.fields.items() if name != "id"} == fields | expected


def test_words_are_replaced_in_both_prompts_and_all_at_once():
    fields = {"prompt": "a cat and a dog", "negative_prompt": "old dog"}
    axes = [written("prompt:cat=cat,dog").axis(), written("prompt:dog=dog,fox").axis()]
    found = [(cell.fields["prompt"], cell.fields["negative_prompt"]) for cell in cells(fields, axes)]
    assert found == [
        ("a cat and a dog", "old dog"),
        ("a dog and a dog", "old dog"),
        ("a cat and a fox", "old fox"),
        ("a dog and a fox", "old fox"),
    ]


def test_a_random_seed_is_the_same_for_all_pictures_and_whenever_the_command_is_given():
    _, lines = lines_of({"prompt": "a", "seed": -1}, [written("steps=1-3").axis()])
    _, again = lines_of({"prompt": "a", "seed": -1}, [written("steps=1-3").axis()])
    assert len({line.request.seed for line in lines}) == 1
    assert [line.request for line in lines] == [line.request for line in again]


def test_every_setting_that_a_line_may_have_can_be_on_an_axis():
    for name in grids.Known.of(Request).kinds:
        if name not in grids.NOT_ON_AXES:
            assert grids.name_of(name) == name


# Bad input: one line each, before anything is loaded


BAD = [
    (["--x", "stepz=1,2"], "'stepz' is no setting; did you mean steps?"),
    (["--x", "scale=1,2"], "'scale' is no setting; did you mean guidance?"),
    (["--x", "qqq=1"], "'qqq' is no setting; there are prompt, negative_prompt"),
    (["--x", "steps"], "expected NAME=VALUE,VALUE,... for an axis, found 'steps'"),
    (["--x", "steps="], "steps: there are no values"),
    (["--x", "steps=1,,2"], "steps must be a whole number, or a range as 1-5, 1-10(+3) or 0-1[5], found ''"),
    (["--x", "steps=1.5"], "steps must be a whole number"),
    (["--x", "steps=1-2(+0.5)"], "steps must be a whole number"),
    (["--x", "guidance=much"], "guidance must be a number, or a range"),
    (["--x", "guidance=1-5(-1)"], "the range 1-5(-1) has no numbers in it"),
    (["--x", "guidance=1-5(+0)"], "the range 1-5(+0) has no numbers in it"),
    (["--x", "guidance_rescale=0-2"], "guidance_rescale must be in [0, 1], found 2"),
    (["--x", "seed=1,-1"], "-1 stands for a random one, which has no place on an axis"),
    (["--x", "steps=1,2,1"], "steps: '1' is there twice; leave one out"),
    (["--x", "seed=1-3[9]"], "seed: '1' is there twice"),
    (["--x", "sampler=Euler a,euler_a"], "sampler: 'euler_a' is there twice, also as 'Euler a'"),
    (["--x", "sampler=eular"], "sampler must be one of"),
    (["--x", 'prompt="a'], "prompt: the values cannot be read"),
    (["--x", "model=a,b"], "run the grid once for each"),
    (["--x", "checkpoint=a,b"], "run the grid once for each"),
    (["--x", "count=1,2"], "put the seeds on an axis, as seed=1-4"),
    (["--x", "prompt:dog=dog,cat"], "prompt:dog: these words are in neither the prompt nor the negative prompt"),
    (["--x", "lora:a=x"], "lora:a must be a number"),
    (["--x", "lora:gone=1"], "the picture of lora:gone=1: the adapter 'gone' is not there"),
    (["--x", "steps=1", "--y", "steps=2"], "two axes of the grid say steps: steps and steps"),
    (["--x", "size=8x8", "--y", "width=8"], "two axes of the grid say width: size and width"),
    (["--x", "sampler=Euler Karras", "--y", "spacing=trailing"], "two axes of the grid say spacing"),
    (["--x", "steps=1", "--z", "seed=2"], "a grid with z needs y, too"),
    (["--x", "size=9x8"], "the picture of size=9x8: width must be a multiple of 8, found 9"),
    (["--x", "size=big"], "size must be WIDTHxHEIGHT"),
    (["--x", "strength=0.5"], "the picture of strength=0.5: strength needs an init_image"),
    (["--x", "eta=1", "--y", "sampler=ddim,heun"], "the picture of eta=1, sampler=heun: eta must be left out for heun"),
    (["--x", "seed=1", "--image", "no.png"], "init_image: no.png: no such picture file"),
    (["--x", "seed=1", "--batch", "0"], "batch must be a whole number above 0"),
    (["--x", "seed=1-1000", "--y", "guidance=1-1000"], "1,000,000 pictures of 8x8 (1,000 x 1,000), up to 192.0 MB"),
    (["--x", "guidance=0-1[999999999999]"], "999,999,999,999 pictures of 8x8"),
    (["--x", "seed=1-5000"], "a sheet of 5,000 columns and 1 rows would have more than 16,383 pixels on a side"),
]


@pytest.mark.parametrize(("arguments", "says"), BAD)
def test_a_grid_that_cannot_be_made_is_one_line_before_anything_is_loaded(
    here, model, capsys, monkeypatch, arguments, says
):
    monkeypatch.setattr("sdjax.storage.checkpoint.restore", lambda *_, **__: pytest.fail("slow work was begun"))
    assert cli.main(["grid", "a cat", "-o", "out", "--model", model, *arguments]) == 2
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert says in line
    assert said.out == ""
    assert not Path("out").exists()


def test_a_sheet_that_is_somebody_elses_is_not_written_over(here, model, capsys):
    Path("out").mkdir()
    Image.new("RGB", (8, 8)).save("out/grid.png")
    assert cli.main(["grid", "a", "-o", "out", "--model", model, "--x", "seed=1-2"]) == 2
    assert "out/grid.png is already there and is no sheet of a grid; move it away" in capsys.readouterr().err


# Pictures


def test_every_cell_is_the_picture_made_alone():
    pipe = mini()
    shared = dict(steps=2, negative_prompt="red")
    sheet = grid(
        pipe,
        "blue disc",
        x=("cfg", [1.5, 3.0, 4.5]),
        y=("sampler", ["Euler a", "DPM++ 2M Karras"]),
        z=("prompt:disc", ["disc", "square"]),
        **shared,
    )
    axes = [axis("cfg", [1.5, 3.0, 4.5]), axis("sampler", ["Euler a", "DPM++ 2M Karras"])]
    layout = layout_of([*axes, axis("prompt:disc", ["disc", "square"])], [(8, 8)])
    assert (layout.scale, layout.cell) == (12, (96, 96))
    found = np.asarray(sheet)
    for (z, shape), (y, sampler), (x, guidance) in itertools.product(
        enumerate(("disc", "square")), enumerate(("Euler a", "DPM++ 2M Karras")), enumerate((1.5, 3.0, 4.5))
    ):
        (alone,) = pipe.text_to_image(f"blue {shape}", guidance=guidance, sampler=sampler, **shared)
        top = GAP + z * layout.block_height + layout.block + layout.title + layout.head + y * (96 + GAP)
        left = GAP + layout.left + x * (96 + GAP)
        cell = found[top : top + 96, left : left + 96].astype(int)
        assert np.abs(cell[::12, ::12] - np.asarray(alone, int)).max() <= 1
        assert (cell == cell[::12, ::12].repeat(12, 0).repeat(12, 1)).all()


def test_the_command_makes_pictures_with_recipes_and_a_sheet_and_resumes(here, model, capsys):
    command = ["grid", "blue disc", "-o", "out", "--model", model, "--x", "sampler=Euler a,heun", "--y", "guidance=2-4"]
    command += ["--steps", "1", "--size", "16x8"]
    assert cli.main([*command, "--dry-run"]) == 0
    plan = capsys.readouterr().out.splitlines()
    assert plan[0].startswith("6 pictures (2 sampler x 3 guidance), up to 2.3 kB; grid.png ")
    assert plan[1] == "6 requests, 6 pictures, 0 of them made"
    assert not list(Path("out").glob("*.png"))
    assert cli.main(command) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == plan[0]
    assert said[1:] == ["6 pictures made, 0 were there before, 0 failed", "out/grid.png"]
    recipe = read_recipe("out/x2-y3.png")
    assert (recipe.prompt, recipe.sampler, recipe.guidance, recipe.width) == ("blue disc", "heun", 4, 16)
    whole = Path("out/grid.png").read_bytes()

    Path("out/x1-y2.png").unlink()
    Path("out/grid.png").unlink()
    assert cli.main(command) == 0
    assert "1 pictures made, 5 were there before, 0 failed" in capsys.readouterr().out
    assert Path("out/grid.png").read_bytes() == whole

    other = [*command[:6], "--x", "seed=1-3"]
    assert cli.main(other) == 2
    assert "out holds another job" in capsys.readouterr().err


def test_a_sheet_says_in_words_what_it_shows(here, model, capsys):
    command = ["grid", "blue disc", "-o", "out", "--model", model, "--negative-prompt", "red", "--steps", "1"]
    assert cli.main([*command, "--x", "seed=3,4", "--y", "prompt:disc=disc,square"]) == 0
    capsys.readouterr()
    assert cli.main(["info", "out/grid.png"]) == 0
    first, second, settings, *_ = capsys.readouterr().out.splitlines()
    assert (first, second) == ("blue disc", "Negative prompt: red")
    assert settings.startswith("Steps: 1, ") or "Steps: 1, " in settings
    assert "Seed" not in settings.split("Script")[0]
    assert settings.endswith(
        'Script: X/Y/Z plot, X Type: seed, X Values: "3, 4", Y Type: prompt:disc, Y Values: "disc, square"'
    )


def test_a_picture_that_failed_leaves_a_grey_cell_and_the_next_run_tries_again(here, model, capsys, monkeypatch):
    Image.new("RGB", (8, 8), "red").save("a.png")
    command = ["grid", "disc", "-o", "out", "--model", model, "--x", "init_image=a.png,b.png", "--steps", "1"]
    Image.new("RGB", (8, 8), "blue").save("b.png")
    Path("c.png").write_bytes(Path("b.png").read_bytes()[:60])
    from sdjax.pipeline import prepare

    real = prepare.images.load_image

    def broken(source):
        if str(source) == "b.png":
            raise ValueError("b.png: not a picture that can be read")
        return real(source)

    with monkeypatch.context() as patch:
        patch.setattr(prepare.images, "load_image", broken)
        assert cli.main(command) == 1
    said = capsys.readouterr()
    assert "x2: b.png: not a picture that can be read" in said.err
    assert "1 pictures made, 0 were there before, 1 failed" in said.out
    grey = np.array([220, 220, 220])
    assert (pixels("out/grid.png") == grey).all(-1).mean() > 0.1
    assert cli.main(command) == 0
    assert (pixels("out/grid.png") == grey).all(-1).mean() < 0.01


# Sheets


LONG = "a very long value that goes on and on, with words and aWordThatIsTooLongForAnyLineOfAnyLabelWhateverItsSize"
SHEETS = [
    (1, 0, 0, (8, 8), ""),
    (2, 2, 0, (64, 64), ""),
    (8, 8, 0, (64, 64), ""),
    (3, 2, 2, (64, 64), LONG),
    (2, 2, 0, (64, 512), LONG),
    (2, 3, 2, (512, 64), LONG),
    (2, 2, 2, (512, 512), LONG),
    (1, 1, 1, (8, 8), LONG),
    (60, 40, 0, (512, 512), ""),
    (100, 100, 0, (64, 64), LONG),
]


@pytest.mark.parametrize(("columns", "rows", "blocks", "size", "words"), SHEETS)
def test_nothing_on_a_sheet_overlaps_or_leaves_it(monkeypatch, columns, rows, blocks, size, words):
    class Named(tuple):
        name = property(lambda self: self[0])
        labels = property(lambda self: self[1])

    counts = [count for count in (columns, rows, blocks) if count]
    axes = [
        Named((f"{name}{words}", tuple(f"{i} {words}" for i in range(n))))
        for name, n in zip("xyz", counts, strict=False)
    ]
    layout = layout_of(axes, [size])
    boxes = []
    text, paste = ImageDraw.ImageDraw.text, Image.Image.paste

    def seen_text(self, at, words, **options):
        boxes.append(("text", words, self.textbbox(at, words, font=options["font"], anchor=options.get("anchor"))))
        text(self, at, words, **options)

    def seen_paste(self, picture, at, *rest):
        if isinstance(picture, Image.Image):
            boxes.append(("picture", "", (*at, at[0] + picture.width, at[1] + picture.height)))
        paste(self, picture, at, *rest)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", seen_text)
    monkeypatch.setattr(Image.Image, "paste", seen_paste)
    texts = Texts([(each.name, each.labels) for each in axes], f"a prompt {words}", words, "Steps: 20")
    count = int(np.prod(counts))
    sheet = draw(layout, texts, [Image.new("RGB", size)] * count)
    assert sum(kind == "picture" for kind, *_ in boxes) == count
    assert max(sheet.size) <= 16383
    assert sheet.width == layout.width
    assert sheet.height <= layout.height
    taken = np.zeros((sheet.height, sheet.width), bool)
    for kind, said, (left, top, right, bottom) in sorted(boxes, key=lambda box: box[0]):
        left, top, right, bottom = int(np.floor(left)), int(np.floor(top)), int(np.ceil(right)), int(np.ceil(bottom))
        assert 0 <= left <= right <= sheet.width, said
        assert 0 <= top <= bottom <= sheet.height, said
        assert not taken[top:bottom, left:right].any(), (kind, said)
        taken[top:bottom, left:right] = True


def test_a_label_is_wrapped_between_words_and_cut_with_dots():
    assert wrapped("one two", 12, 500, 3) == ("one two",)
    lines = wrapped("one two three four five six", 12, 60, 2)
    assert lines[0] in ("one two", "one two three")
    assert lines[-1].endswith("...")
    assert all(len(line) <= 14 for line in lines)
    assert wrapped("x" * 50, 12, 60, 99)[0] == "x" * len(wrapped("x" * 50, 12, 60, 99)[0])


def test_a_sheet_that_would_be_too_large_shows_smaller_pictures(here, model, capsys):
    layout = layout_of([axis("seed", range(60))], [(1024, 768)])
    assert 0 < layout.scale < 1
    assert layout.width <= 16383
    assert layout.cell[0] / layout.cell[1] == pytest.approx(1024 / 768, rel=0.02)


def test_pictures_of_several_sizes_share_a_scale_and_are_in_the_middle_of_their_cells():
    layout = layout_of([axis("size", ["64x128", "128x64"])], [(64, 128), (128, 64)])
    assert (layout.scale, layout.cell) == (1, (128, 128))
    sheet = draw(layout, Texts([], "", "", ""), [Image.new("RGB", size, "red") for size in ((64, 128), (128, 64))])
    red = (np.asarray(sheet) == (255, 0, 0)).all(-1)
    assert red[:, GAP : GAP + 128].sum() == red[:, 2 * GAP + 128 :].sum() == 64 * 128
    assert np.flatnonzero(red[layout.title + layout.head + GAP + 64, : GAP + 128])[0] == GAP + 32


def test_sheets_are_known_by_their_text(here, model, capsys):
    assert cli.main(["grid", "a", "-o", "out", "--model", model, "--x", "seed=1-2", "--steps", "1"]) == 0
    with Image.open("out/grid.png") as image:
        assert image.info[KEY] == "2"
    entries = [json.loads(line) for line in Path("out/manifest.jsonl").read_text().splitlines()]
    assert sorted(entry["id"] for entry in entries) == ["x1", "x2"]


def test_the_foot_of_a_sheet_says_nothing_of_what_is_as_usual():
    picture = Image.new("RGB", (8, 8))
    recipes = [
        dataclasses.asdict(recipe_of(Request("a", guidance=g, s_churn=1.0), MINI.sampling, picture, model="", dtype=""))
        for g in (2, 3)
    ]
    said = grids.shared_texts(recipes, [axis("guidance", [2, 3])]).settings
    assert "Sigma churn: 1.0" in said
    assert "Size: 8x8" in said
    for absent in ("CFG scale", "Hires", "Sigma tmin", "Tiling", "Variation"):
        assert absent not in said


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({}, (8, 8)),
        ({"width": 16, "height": 24}, (16, 24)),
        ({"hires_scale": 2}, (16, 16)),
        ({"hires_size": "16x24"}, (16, 24)),
        ({"image": True}, (20, 12)),
        ({"image": True, "width": 16, "height": 8}, (16, 8)),
        ({"image": True, "outpaint": "left=4,top=8"}, (24, 20)),
    ],
)
def test_the_size_of_a_picture_is_known_before_it_is_made(settings, size, tmp_path):
    Image.new("RGB", (20, 12)).save(tmp_path / "photo.png")
    if "image" in settings:
        settings = settings | {"image": tmp_path / "photo.png"}
    assert grids.picture_size(Request("a", **settings), MINI) == size
