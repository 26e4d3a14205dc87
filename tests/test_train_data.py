"""Training data: every layout gives the same examples, what is broken is named, any place of the order is at hand."""

import io
import json
import tarfile
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sdjax.train import cache, dataset, stream
from tests.datasets import CAPTIONS, PICTURES, PNG, comma_separated, jsonl, write, write_tar


def beside(name, suffix):
    return str(Path(name).with_suffix(suffix))


TEXTS = {beside(name, ".txt"): text + "\n" for name, text in CAPTIONS.items()}
ROWS = [{"file_name": name, "text": text} for name, text in CAPTIONS.items()]
JSONS = {beside(name, ".json"): json.dumps({"width": 12, "caption": text}) for name, text in CAPTIONS.items()}
LAYOUTS = {
    "txt": lambda path: write(path, PICTURES | TEXTS),
    "jsonl": lambda path: write(path, PICTURES | {"metadata.jsonl": jsonl(ROWS)}),
    "jsonl, other line ends": lambda path: write(
        path, PICTURES | {"metadata.jsonl": b"\xef\xbb\xbf" + jsonl(ROWS).replace("\n", "\r\n\r\n").encode()}
    ),
    "csv": lambda path: write(path, PICTURES | {"metadata.csv": comma_separated(CAPTIONS.items())}),
    "csv, weight": lambda path: write(
        path,
        PICTURES
        | {"metadata.csv": comma_separated([(*row, "") for row in CAPTIONS.items()], ("file_name", "text", "weight"))},
    ),
    "tar": lambda path: write_tar(path / "data.tar", PICTURES | TEXTS),
    "tar, json": lambda path: write_tar(path / "data.tar", dict(sorted((PICTURES | JSONS).items()))),
    "tars": lambda path: (
        [
            write_tar(path / f"{n}.tar", {name: PICTURES[name], beside(name, ".txt"): CAPTIONS[name]})
            for n, name in enumerate(CAPTIONS)
        ]
        and path
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_examples(layout, tmp_path):
    found = dataset.open_dataset(LAYOUTS[layout](tmp_path))
    names = [f"{n}.tar/{name}" for n, name in enumerate(CAPTIONS)] if layout == "tars" else list(CAPTIONS)
    assert [example.name for example in found.examples] == names
    assert [example.captions for example in found.examples] == [(text,) for text in CAPTIONS.values()]
    assert found.weights.tolist() == [1, 1, 1]
    assert found.skipped == {}
    assert len(found) == 3
    for i, name in enumerate(CAPTIONS):
        expected = np.asarray(Image.open(io.BytesIO(PICTURES[name])).convert("RGB").resize((8, 8)))
        assert np.abs(found.picture(i, 8).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pictures_alone_need_no_captions(layout, tmp_path):
    path = LAYOUTS[layout](tmp_path)
    for text in tmp_path.rglob("*.txt"):
        text.write_bytes(b"\xff")
    found = dataset.open_dataset(path, captions=False)
    assert [example.captions for example in found.examples] == [(), (), ()]


def test_list_of_texts_and_weights_are_read(tmp_path):
    rows = [
        {"file_name": "./a.png", "text": ["one", " two "], "weight": 0.5},
        {"file_name": "b.jpg", "text": "b\u2028b"},
    ]
    found = dataset.open_dataset(write(tmp_path, PICTURES | {"metadata.jsonl": jsonl(rows)}))
    assert [(e.name, e.captions, e.weight) for e in found.examples] == [
        ("a.png", ("one", "two"), 0.5),
        ("b.jpg", ("b\u2028b",), 1.0),
    ]
    table = comma_separated([("a.png", "one", "0.25")], ("file_name", "text", "weight"))
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text(table)
    assert dataset.open_dataset(tmp_path).weights.tolist() == [0.25]


GOOD = {"file_name": "good.png", "text": "good"}
BROKEN = {  # what is added to one good example: files, the name that is reported, a part of the reason
    "no caption": ({"x.png": PNG}, "x.png", "no caption, x.txt is not there"),
    "empty caption": ({"x.png": PNG, "x.txt": " \n"}, "x.png", "empty caption"),
    "not UTF-8": ({"x.png": PNG, "x.txt": b"caf\xe9"}, "x.png", "not UTF-8"),
    "no picture": ({"x.png": b"hello", "x.txt": "x"}, "x.png", "not a picture of a known kind"),
    "no bytes": ({"x.png": b"", "x.txt": "x"}, "x.png", "not a picture of a known kind"),
    "cut short": ({"x.png": PNG[:50], "x.txt": "x"}, "x.png", ""),
}
BROKEN_LINES = (
    {  # a line of metadata.jsonl
        "line: not JSON": ("{file_name", "metadata.jsonl line 2", "not JSON"),
        "line: too deep": ("[" * 100_000, "metadata.jsonl line 2", "not JSON"),
        "line: no object": ("[1]", "metadata.jsonl line 2", "expected a JSON object, found [1]"),
        "line: no name": ('{"text": "x"}', "metadata.jsonl line 2", "no file_name"),
        "line: name is a number": ('{"file_name": 3, "text": "x"}', "metadata.jsonl line 2", "no file_name"),
        "line: leaves the folder": (
            '{"file_name": "sub/../../x.png", "text": "x"}',
            "metadata.jsonl line 2",
            "sub/../../x.png leads out of the folder",
        ),
        "line: absolute": ('{"file_name": "/x.png", "text": "x"}', "metadata.jsonl line 2", "leads out of the folder"),
        "line: twice": (
            '{"file_name": "./good.png", "text": "x"}',
            "metadata.jsonl line 2",
            "good.png was already named in metadata.jsonl line 1",
        ),
        "line: no such file": ('{"file_name": "y.png", "text": "x"}', "y.png", "line 2: no such picture file"),
        "line: no text": ('{"file_name": "x.png"}', "x.png", "line 2: no caption, text is missing"),
        "line: text is null": ('{"file_name": "x.png", "text": null}', "x.png", "line 2: a caption must be a string"),
        "line: one text is empty": ('{"file_name": "x.png", "text": ["x", " "]}', "x.png", "line 2: empty caption"),
        "line: no texts": ('{"file_name": "x.png", "text": []}', "x.png", "line 2: empty caption"),
    }
    | {
        f"line: weight {weight[:9]}": (
            f'{{"file_name": "x.png", "text": "x", "weight": {weight}}}',
            "x.png",
            "line 2: weight must be a positive finite number",
        )
        for weight in ("0", "-1", "NaN", "Infinity", '"much"', "true", "null", "1" + "0" * 400)
    }
)
BROKEN_MEMBERS = {
    "tar: no caption": ({"x.png": PNG}, "x.png", "neither .txt nor .json"),
    "tar: no picture": ({"x.txt": "x", "x.gif": "GIF"}, "x", "no pictures under this key"),
    "tar: two pictures": ({"x.png": PNG, "x.jpg": PICTURES["b.jpg"], "x.txt": "x"}, "x.png", "2 pictures"),
    "tar: json without text": ({"x.png": PNG, "x.json": "{}"}, "x.png", 'neither "text" nor "caption"'),
    "tar: bad json": ({"x.png": PNG, "x.json": "{"}, "x.png", "not JSON"),
    "tar: no picture in it": ({"x.png": b"hello", "x.txt": "x"}, "x.png", "not a picture of a known kind"),
}


def broken_set(case, folder):
    """Writes a set of one good example and the broken one of this case; its path, the name and the reason."""
    if case in BROKEN_LINES:
        line, name, reason = BROKEN_LINES[case]
        files = {"good.png": PNG, "x.png": PNG, "metadata.jsonl": jsonl([GOOD]) + "\n" + line}
        return write(folder, files), name, reason
    if case in BROKEN_MEMBERS:
        files, name, reason = BROKEN_MEMBERS[case]
        return write_tar(folder / "one.tar", {"good.png": PNG, "good.txt": "good"} | files), name, reason
    files, name, reason = BROKEN[case]
    return write(folder, {"good.png": PNG, "good.txt": "good"} | files), name, reason


@pytest.mark.parametrize("case", [*BROKEN, *BROKEN_LINES, *BROKEN_MEMBERS])
def test_broken_example_is_refused_by_name_or_skipped(case, tmp_path):
    path, name, reason = broken_set(case, tmp_path)
    with pytest.raises(ValueError) as refused:
        dataset.open_dataset(path)
    for part in (f"{path}: 1 broken of 2 examples: {name}: ", reason, "--skip-bad"):
        assert part in str(refused.value)
    assert "\n" not in str(refused.value)
    found = dataset.open_dataset(path, on_error="skip")
    assert [example.name for example in found.examples] == ["good.png"]
    assert list(found.skipped) == [name]
    assert reason in found.skipped[name]


def test_csv_row_with_an_unquoted_comma_is_named(tmp_path):
    table = "file_name,text\na.png,red, square\nb.jpg\nsub/c.webp,ok\n"
    found = dataset.open_dataset(write(tmp_path, PICTURES | {"metadata.csv": table}), on_error="skip")
    assert [example.name for example in found.examples] == ["sub/c.webp"]
    assert "more fields than columns" in found.skipped["metadata.csv line 2"]
    assert "text is missing" in found.skipped["b.jpg"]


def test_many_broken_examples_are_counted_and_the_first_named(tmp_path):
    write(tmp_path, {f"{n}.png": PNG for n in range(9)} | {"8.txt": "eight"})
    with pytest.raises(ValueError, match=r"8 broken of 9 examples: 0\.png: .*; 2\.png: .*; and 5 more\. Mend"):
        dataset.open_dataset(tmp_path)


@pytest.mark.parametrize("on_error", ["refuse", "skip"])
@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"readme.md": "nothing"}, "no picture to train on; expected .png"),
        ({"metadata.jsonl": "\n"}, "no picture to train on"),
        ({"metadata.csv": "name,text\na.png,x\n"}, "no column file_name"),
        ({"metadata.csv": "file_name,caption\na.png,x\n"}, "no column text"),
        ({"metadata.csv": ""}, "no column file_name"),
        ({"metadata.csv": 'file_name,text\na.png,"x\nb.jpg,y\n'}, "in the row after line 1: unexpected end of data"),
        ({"metadata.csv": b"file_name,text\na.png,\xff\n"}, r"metadata.csv line 2: the row: not UTF-8 text \(byte 0\)"),
        ({"metadata.csv": "", "metadata.jsonl": ""}, r"more than one kind of data set \(metadata.jsonl, metadata.csv"),
        ({"metadata.csv": "", "1.tar": ""}, "more than one kind of data set"),
        ({"1.tar": b"no archive" * 100}, "1.tar: not a folder, and not a .tar that can be read"),
    ],
)
def test_folder_that_is_no_data_set_is_refused_in_both_modes(files, reason, on_error, tmp_path):
    with pytest.raises(ValueError, match=reason):
        dataset.open_dataset(write(tmp_path, files), on_error=on_error)


def test_when_all_is_broken_nothing_is_left_to_skip(tmp_path):
    with pytest.raises(ValueError, match=r"all are broken: a\.png: no caption"):
        dataset.open_dataset(write(tmp_path, {"a.png": PNG}), on_error="skip")


def test_wrong_arguments_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none: no such folder or \.tar"):
        dataset.open_dataset(tmp_path / "none")
    with pytest.raises(ValueError, match='on_error must be "refuse" or "skip", found \'ignore\''):
        dataset.open_dataset(tmp_path, on_error="ignore")
    with pytest.raises(ValueError, match=r"not a folder, and not a \.tar"):
        dataset.open_dataset(write(tmp_path, {"a.png": PNG}) / "a.png")


def test_damage_in_a_shard_is_reported_with_what_comes_before_it_kept(tmp_path):
    whole = write_tar(tmp_path / "1.tar", {f"{n}{s}": c for n in range(3) for s, c in ((".png", PNG), (".txt", "x"))})
    with tarfile.open(whole) as tar:
        members = tar.getmembers()
    headers = [member.offset for member in members]
    members[4].size = 2**64
    content = whole.read_bytes()
    overwritten, too_long = (
        content[: headers[4]] + header + content[headers[4] + 512 :]
        for header in (b"\xff" * 512, members[4].tobuf(tarfile.GNU_FORMAT))
    )
    for damaged in (
        content[: headers[4]],
        content[: headers[4] + 100],
        content[: headers[5] + 512],
        overwritten,
        too_long,
    ):
        whole.write_bytes(damaged)
        found = dataset.open_dataset(tmp_path, on_error="skip")
        assert [example.name for example in found.examples] == ["1.tar/0.png", "1.tar/1.png"]
        assert "cut short or damaged" in found.skipped["1.tar"]
        with pytest.raises(ValueError, match=r"1\.tar: cut short or damaged"):
            dataset.open_dataset(tmp_path)


def test_member_that_is_twice_in_a_shard_is_reported(tmp_path):
    with tarfile.open(tmp_path / "1.tar", "w") as tar:
        for name, content in (("a.png", PNG), ("a.txt", b"first"), ("a.txt", b"second")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    found = dataset.open_dataset(tmp_path / "1.tar", on_error="skip")
    assert found.examples[0].captions == ("first",)
    assert list(found.skipped.values()) == ["the name is there twice; the first was kept"]


def test_picture_that_breaks_later_is_named(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    noise.save(tmp_path / "cut.jpg")
    write(tmp_path, {"gone.png": PNG})
    found = dataset.open_dataset(tmp_path, captions=False)
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:-1500])
    with pytest.raises(ValueError, match=r"1 broken of 2 examples: cut\.jpg: not a picture that can be read"):
        dataset.open_dataset(tmp_path, captions=False)
    (tmp_path / "gone.png").unlink()
    with pytest.raises(ValueError, match=r"^cut\.jpg: not a picture that can be read \(.*truncated"):
        found.picture(0, 8)
    with pytest.raises(ValueError, match=r"^gone\.png: .*No such file"):
        found.picture(1, 8)


def test_shard_is_read_in_place(tmp_path):
    """Nothing is written, and each example's bytes are where its offset says."""
    path = write_tar(tmp_path / "1.tar", PICTURES | TEXTS)
    found = dataset.open_dataset(path)
    assert list(tmp_path.iterdir()) == [path]
    content = path.read_bytes()
    for example in found.examples:
        assert content[example.offset : example.offset + example.size] == PICTURES[example.name]


ODD = {  # how it is saved, and the colour of its left and right half as shown
    "EXIF turned half round": ("RGB", (9, 99, 200), (250, 250, 250), dict(suffix=".png", orientation=3)),
    "EXIF mirrored": ("RGB", (9, 99, 200), (250, 250, 250), dict(suffix=".webp", orientation=2, lossless=True)),
    "RGBA": ("RGBA", (255, 255, 255), (0, 100, 200), dict(suffix=".png")),
    "RGBA, webp": ("RGBA", (255, 255, 255), (0, 100, 200), dict(suffix=".webp", lossless=True)),
    "grey": ("L", (0, 0, 0), (77, 77, 77), dict(suffix=".png")),
    "16 bit": ("I;16", (0, 0, 0), (77, 77, 77), dict(suffix=".png")),
    "palette": ("P", (0, 0, 0), (77, 77, 77), dict(suffix=".png")),
}
HALVES = {  # the colours stored left and right
    "RGB": ((250, 250, 250), (9, 99, 200)),
    "RGBA": ((9, 9, 9, 0), (0, 100, 200, 255)),
    "L": (0, 77),
    "I;16": (0, 77 * 257),
    "P": (0, 77),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("in_tar", [False, True])
def test_every_mode_is_shown_upright_in_rgb_over_white(kind, in_tar, tmp_path):
    mode, left, right, options = ODD[kind]
    options = dict(options)
    suffix, orientation = options.pop("suffix"), options.pop("orientation", 1)
    image = Image.new(mode, (16, 16), HALVES[mode][0])
    if mode == "P":
        image.putpalette([level for n in range(256) for level in (n, n, n)])
    image.paste(HALVES[mode][1], (8, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, Image.registered_extensions()[suffix], exif=exif, **options)
    files = {f"first{suffix}": buffer.getvalue(), f"x{suffix}": buffer.getvalue()}
    found = dataset.open_dataset(
        write_tar(tmp_path / "1.tar", files) if in_tar else write(tmp_path, files), captions=False
    )
    expected = np.repeat([[left] * 8 + [right] * 8], 16, axis=0)
    assert np.array_equal(found.picture(1, 16), expected)
    assert found.picture(1, 16).dtype == np.uint8


def test_wide_picture_is_cropped_around_its_centre(tmp_path):
    image = Image.new("RGB", (40, 10), "red")
    image.paste("blue", (15, 0, 25, 10))
    image.save(tmp_path / "a.png")
    found = dataset.open_dataset(tmp_path, captions=False)
    assert np.array_equal(found.picture(0, 10), np.full((10, 10, 3), (0, 0, 255)))
    assert found.picture(0, 20).shape == (20, 20, 3)


def test_each_epoch_visits_every_example_once_in_another_order():
    epochs = stream.order(np.ones(50), 3, 0, 200).reshape(4, 50)
    assert np.array_equal(np.sort(epochs, axis=1), np.tile(np.arange(50), (4, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert not np.array_equal(epochs[0], stream.order(np.ones(50), 4, 0, 50))


weights = st.lists(st.floats(0.05, 5), min_size=1, max_size=12)


@settings(deadline=None, max_examples=60)
@given(weights, st.integers(0, 2**40), st.integers(0, 200), st.integers(0, 60))
def test_any_window_is_the_slice_of_the_whole_stream(weights, seed, first, count):
    window = stream.order(weights, seed, first, count)
    assert window.dtype == np.int64
    assert np.array_equal(window, stream.order(weights, seed, 0, 260)[first : first + count])


@settings(deadline=None, max_examples=60)
@given(weights, st.integers(0, 2**40), st.integers(0, 9))
def test_in_an_epoch_an_example_comes_in_proportion_to_its_weight(weights, seed, epoch):
    length = max(1, int(np.floor(np.sum(weights))))
    counts = np.bincount(stream.order(weights, seed, epoch * length, length), minlength=len(weights))
    share = np.array(weights) * length / np.sum(weights)
    assert counts.sum() == length
    assert (counts >= np.floor(share - 1e-9)).all()
    assert (counts <= np.ceil(share + 1e-9)).all()


def test_repeats_of_an_example_are_spread_over_the_epoch():
    assert len({tuple(epoch) for epoch in stream.order([5, 5], 0, 0, 200).reshape(20, 10)}) > 10


def test_whole_weights_are_exact_counts_and_small_ones_hold_on_average():
    assert Counter(stream.order([1, 2, 5], 0, 8, 8).tolist()) == {0: 1, 1: 2, 2: 5}
    drawn = np.bincount(stream.order([1, 0.1, 0.9], 0, 0, 4000)) / 2000
    np.testing.assert_allclose(drawn, [1, 0.1, 0.9], atol=0.02)  # three standard deviations of 2000 draws of 0.1
    assert Counter(stream.order([0.1] * 10, 0, 0, 1).tolist()).total() == 1


@pytest.mark.parametrize("wrong", [[], [1, 0], [1, -1], [np.nan], [np.inf]])
def test_weights_that_are_no_weights_are_refused(wrong):
    with pytest.raises(ValueError, match="weights must be positive finite numbers"):
        stream.order(wrong, 0, 0, 1)


def test_caption_depends_on_the_place_alone_and_every_one_comes():
    example = dataset.Example("a", ("one", "two", "three"), Path("a"), 0)
    drawn = [stream.caption(example, 7, position) for position in range(3000)]
    assert drawn[1234] == stream.caption(example, 7, 1234)
    assert drawn != [stream.caption(example, 8, position) for position in range(3000)]
    assert all(850 < number < 1150 for number in Counter(drawn).values())  # 1000, six standard deviations
    assert len(Counter(drawn)) == 3
    with pytest.raises(ValueError, match="a: no caption to draw from"):
        stream.caption(replace(example, captions=()), 7, 0)


def test_prefetch_yields_in_order_from_one_thread_that_works_ahead():
    made, threads, ahead = [], set(), threading.Event()

    def make(number):
        made.append(number)
        threads.add(threading.current_thread())
        if number == 7:
            ahead.set()
        return number * 10

    taken = stream.prefetch(make, 5, depth=2)
    assert made == []
    assert next(taken) == 50
    assert ahead.wait(30)  # 5 is out, 6 and 7 are made while the consumer is busy
    assert made == [5, 6, 7]
    assert [next(taken) for _ in range(4)] == [60, 70, 80, 90]
    taken.close()
    assert len(threads) == 1
    assert not threads.pop().is_alive()
    assert len(made) <= 7  # nothing after the two ahead of the last one taken


def test_prefetch_raises_in_the_place_of_the_result_and_its_thread_ends():
    threads = []

    def make(number):
        threads.append(threading.current_thread())
        if number == 3:
            raise KeyError("three")
        return number

    taken = stream.prefetch(make, 0)
    assert [next(taken) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError, match="three"):
        next(taken)
    assert not threads[0].is_alive()


def test_closing_prefetch_cancels_what_has_not_begun():
    made = []

    def make(number):
        made.append(number)
        time.sleep(0.005 if number else 0)

    taken = stream.prefetch(make, 0, depth=1000)
    next(taken)
    taken.close()
    assert len(made) < 1000


def table(calls, count=150, shift=0.0):
    whole = np.random.default_rng(0).normal(size=(count, 3, 2)).astype(np.float16) + np.float16(shift)

    def make(first, last):
        calls.append((first, last))
        return whole[first:last]

    return whole, make


def test_cached_computes_once_in_chunks_and_maps_the_file(tmp_path):
    calls = []
    whole, make = table(calls)
    for _ in range(2):
        rows = cache.cached(tmp_path / "latents.npy", "key", make, 150)
        assert isinstance(rows, np.memmap)
        assert rows.dtype == np.float16
        assert np.array_equal(rows, whole)
        assert not rows.flags.writeable
    assert calls == [(0, 64), (64, 128), (128, 150)]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["latents.json", "latents.npy"]


def test_cached_computes_again_for_another_key_number_or_damaged_file(tmp_path):
    path, calls = tmp_path / "latents.npy", []
    cache.cached(path, "key", table(calls)[1], 150)
    whole, make = table(calls, shift=1.0)
    assert np.array_equal(cache.cached(path, "other", make, 150), whole)
    assert np.array_equal(cache.cached(path, "other", make, 100), whole[:100])
    assert len(calls) == 8
    path.write_bytes(path.read_bytes()[:-10])
    assert np.array_equal(cache.cached(path, "other", make, 100), whole[:100])
    (tmp_path / "latents.json").write_text("{")
    assert np.array_equal(cache.cached(path, "other", make, 100), whole[:100])
    assert len(calls) == 12


def test_cached_leaves_nothing_behind_and_the_old_rows_as_they_were_when_make_fails(tmp_path):
    path, calls = tmp_path / "latents.npy", []
    whole, make = table(calls)

    def fails(first, last):
        if first == 64:
            raise RuntimeError("out of memory")
        return make(first, last) + np.float16(1)

    with pytest.raises(RuntimeError, match="out of memory"):
        cache.cached(path, "key", fails, 150)
    assert list(tmp_path.iterdir()) == []
    cache.cached(path, "key", make, 150)
    with pytest.raises(RuntimeError, match="out of memory"):
        cache.cached(path, "other", fails, 150)
    calls.clear()
    assert np.array_equal(cache.cached(path, "key", make, 150), whole)
    assert calls == []


def test_new_rows_never_stand_beside_an_old_key(tmp_path, monkeypatch):
    """Killed between the two files, the next run computes again."""
    path, calls = tmp_path / "latents.npy", []
    cache.cached(path, "key", table(calls)[1], 10)

    def killed(self, text):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            cache.cached(path, "other", table(calls, shift=1.0)[1], 10)
    whole, make = table(calls)
    assert np.array_equal(cache.cached(path, "key", make, 10), whole[:10])


@pytest.mark.parametrize(
    ("make", "count", "error", "message"),
    [
        (lambda first, last: np.zeros((1, 4)), 100, ValueError, r"rows 0 to 64 must be float64\[64, 4\], found"),
        (lambda first, last: np.zeros((last - first, 4 + first)), 100, ValueError, r"found float64\[36, 68\]"),
        (lambda first, last: np.zeros(last - first, "f4" if first else "f8"), 100, ValueError, "found float32"),
        (lambda first, last: np.zeros(last - first, ml_dtypes.bfloat16), 9, TypeError, "cannot hold bfloat16"),
        (lambda first, last: np.zeros(0), 0, ValueError, "count must be at least 1, found 0"),
    ],
)
def test_rows_that_are_not_what_was_asked_for_are_refused(make, count, error, message, tmp_path):
    with pytest.raises(error, match=message):
        cache.cached(tmp_path / "a.npy", "key", make, count)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layout", ["txt", "tar"])
def test_fingerprint_changes_with_names_captions_weights_and_files(layout, tmp_path):
    path = LAYOUTS[layout](tmp_path)
    found = dataset.open_dataset(path)
    original = cache.fingerprint(found)
    assert original == cache.fingerprint(dataset.open_dataset(path))
    first, *rest = found.examples
    changed = [
        cache.fingerprint(dataset.Dataset((replace(first, **change), *rest), {}))
        for change in (dict(name="z"), dict(captions=("z",)), dict(weight=2.0))
    ]
    changed.append(cache.fingerprint(dataset.Dataset(tuple(rest), {})))
    first.file.touch()
    changed.append(cache.fingerprint(found))
    assert len({original, *changed}) == 6
