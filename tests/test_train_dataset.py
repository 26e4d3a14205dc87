"""What people's folders of training pictures hold besides pictures: links, other kinds, other encodings, damage.

Nothing is passed over in silence, and one bad line, picture or member costs that one alone.
"""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sdjax import cli
from sdjax.config import SamplingConfig
from sdjax.pipeline.recipe import encoded, recipe_of
from sdjax.request import Request
from sdjax.train import cache, dataset
from tests.datasets import PNG, comma_separated, jsonl, write, write_tar

JPEG = io.BytesIO()
Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)).save(JPEG, "JPEG")
JPEG = JPEG.getvalue()
CUT = JPEG[: len(JPEG) // 2]
GOOD = {"good.png": PNG, "good.txt": "good"}


def opened(path):
    """The names of the examples, with what was left out."""
    found = dataset.open_dataset(path, on_error="skip")
    return [example.name for example in found.examples], found.skipped, found.passed_over


# links, and files of other kinds


def test_linked_folders_and_files_are_followed_and_dead_links_named(tmp_path):
    write(tmp_path / "real", {"x.jpg": JPEG, "x.txt": "x", "deeper/z.png": PNG, "deeper/z.txt": "z"})
    folder = write(tmp_path / "d", GOOD | {"y.txt": "y"})
    (folder / "cats").symlink_to("../real")
    (folder / "loop").symlink_to(".")
    (folder / "y.jpg").symlink_to("../gone.jpg")
    (folder / "one.jpg").symlink_to(tmp_path / "real" / "x.jpg")
    (folder / "one.txt").symlink_to(tmp_path / "real" / "x.txt")
    names, skipped, passed_over = opened(folder)
    assert names == ["cats/deeper/z.png", "cats/x.jpg", "good.png", "one.jpg"]
    assert skipped == {"y.jpg": "a link to nothing (../gone.jpg)"}
    assert passed_over["links to folders that were read already"] == 1
    with pytest.raises(ValueError, match=r"1 broken of 5 examples: y\.jpg: a link to nothing"):
        dataset.open_dataset(folder)


def test_of_a_folder_and_links_to_it_the_folder_itself_is_read(tmp_path):
    write(tmp_path, GOOD | {"z/deep/x.png": PNG, "z/deep/x.txt": "x"})
    (tmp_path / "a").symlink_to("z")
    (tmp_path / "b").symlink_to("z/deep")
    (tmp_path / "z" / "up").symlink_to("..")
    names, skipped, passed_over = opened(tmp_path)
    assert names == ["good.png", "z/deep/x.png"]
    assert (skipped, passed_over) == ({}, {"links to folders that were read already": 3})


def test_what_other_systems_hide_is_passed_over(tmp_path):
    """macOS writes ._x.png beside x.png onto foreign disks and into archives."""
    hidden = {"._good.png": b"\0", "._good.txt": b"\0", ".git/x.png": PNG, ".git/x.txt": "x", "__MACOSX/._x.png": b""}
    expected = (["good.png"], {}, {"hidden files": len(hidden)})
    assert opened(write(tmp_path / "folder", GOOD | hidden)) == expected
    names, skipped, _ = opened(
        write_tar(tmp_path / "1.tar", {k: v for k, v in (GOOD | hidden).items() if "git" not in k})
    )
    assert (names, skipped) == (["good.png"], {})


def test_captions_in_capitals_are_captions(tmp_path):
    names, skipped, passed_over = opened(write(tmp_path, {"A.PNG": PNG, "A.TXT": "x", "b.Jpg": JPEG, "b.txt": "y"}))
    assert (names, skipped, passed_over) == (["A.PNG", "b.Jpg"], {}, {})


def test_lines_may_end_in_carriage_returns(tmp_path):
    lines = [{"file_name": name, "text": "x"} for name in ("a.png", "b.png")]
    write(tmp_path, {"a.png": PNG, "b.png": PNG, "metadata.jsonl": jsonl(lines).replace("\n", "\r")})
    assert opened(tmp_path) == (["a.png", "b.png"], {}, {})


def test_what_is_no_file_is_named_and_nothing_hangs(tmp_path):
    os.mkfifo(write(tmp_path, GOOD) / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "good2.png").write_bytes(PNG)
    os.mkfifo(tmp_path / "good2.txt")
    names, skipped, _ = opened(tmp_path)
    assert names == ["good.png"]
    assert skipped["pipe.png"] == "not a file that can be read, but a device or pipe"
    assert "no caption" in skipped["good2.png"]


@pytest.mark.parametrize("suffix", [".jfif", ".bmp", ".gif", ".avif", ".tif", ".HEIC", ".jxl"])
def test_pictures_of_other_kinds_are_counted_and_named(tmp_path, suffix):
    write(tmp_path, GOOD | {f"a{suffix}": JPEG, "a.txt": "a", f"sub/b{suffix}": JPEG, "sub/b.txt": "b"})
    names, skipped, passed_over = opened(tmp_path)
    assert names == ["good.png"]
    assert skipped[f"*{suffix.lower()}"].startswith(f"2 of a kind of picture that is not read, such as a{suffix}; save")
    assert passed_over == {}
    with pytest.raises(ValueError, match="of a kind of picture that is not read"):
        dataset.open_dataset(tmp_path)


def test_other_files_are_counted_by_kind_and_stop_nothing(tmp_path):
    more = {"readme.txt": "hello", "notes.md": "", ".DS_Store": b"\0", "LICENSE": "", "sub/x.npz": b"", "x.NPZ": b""}
    found = dataset.open_dataset(write(tmp_path, GOOD | more))
    assert [example.name for example in found.examples] == ["good.png"]
    assert found.skipped == {}
    assert found.passed_over == {
        "captions (.txt) without a picture": 1,
        ".md files": 1,
        "hidden files": 1,
        "files without an ending": 1,
        ".npz files": 2,
    }


@pytest.mark.parametrize(
    ("files", "name"),
    [
        (GOOD | {"sub/metadata.jsonl": "{}", "sub/x.png": PNG, "sub/x.txt": "x"}, "sub/metadata.jsonl"),
        (GOOD | {"sub/metadata.csv": "file_name,text", "sub/x.png": PNG, "sub/x.txt": "x"}, "sub/metadata.csv"),
        (GOOD | {"shards/1.tar": b""}, "shards/1.tar"),
        (GOOD | {"1.tar.gz": b""}, "1.tar.gz"),
        (GOOD | {"1.tgz": b""}, "1.tgz"),
        (
            {"metadata.jsonl": '{"file_name": "good.png", "text": "x"}', "good.png": PNG, "sub/metadata.jsonl": ""},
            "sub/metadata.jsonl",
        ),
    ],
)
def test_a_second_data_set_below_the_first_is_named(tmp_path, files, name):
    names, skipped, _ = opened(write(tmp_path, files))
    assert "good.png" in names
    assert list(skipped) == [name]


def test_pictures_that_a_table_or_shards_leave_out_are_counted(tmp_path):
    table = jsonl([{"file_name": "good.png", "text": "x"}])
    write(tmp_path / "table", {"good.png": PNG, "a.png": PNG, "b.bmp": PNG, "notes.md": "", "metadata.jsonl": table})
    assert opened(tmp_path / "table")[1:] == ({}, {"pictures that metadata.jsonl does not name": 2, ".md files": 1})
    write_tar(write(tmp_path / "shards", {"a.png": PNG}) / "1.tar", GOOD)
    assert opened(tmp_path / "shards")[1:] == ({}, {"pictures beside the shards": 1})


# one bad line, picture or member


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (CUT, "truncated"),
        (b"", "not a picture of a known kind"),
        (b"version https://git-lfs.github.com/spec/v1", "not a picture of a known kind"),
        (PNG[:-30], "not a picture that can be read"),
    ],
)
@pytest.mark.parametrize("layout", ["loose", "table", "tar"])
def test_pictures_that_break_in_decoding_are_left_out_alone(tmp_path, content, reason, layout):
    files = GOOD | {"x.jpg": content, "x.txt": "x"}
    if layout == "tar":
        path = write_tar(tmp_path / "1.tar", files)
    else:
        path = write(tmp_path, files)
    if layout == "table":
        rows = [{"file_name": name, "text": "x"} for name in ("good.png", "x.jpg")]
        write(path, {"metadata.jsonl": jsonl(rows)})
    names, skipped, _ = opened(path)
    assert names == ["good.png"]
    assert list(skipped) == ["x.jpg"]
    assert reason in skipped["x.jpg"]
    with pytest.raises(ValueError, match=r"1 broken of 2 examples: x\.jpg: "):
        dataset.open_dataset(path)


def test_metadata_of_a_picture_never_stops_its_use(tmp_path):
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\xff\xff\xff\xff\xff\xff\xff\x7f"
    odd = JPEG[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + JPEG[2:]
    found = dataset.open_dataset(write(tmp_path, {"x.jpg": odd, "x.txt": "x"}))
    assert found.picture(0, 8).shape == (8, 8, 3)


LINES = {
    "another encoding": b'{"file_name": "x.png", "text": "caf\xe9"}',
    "half a character": b'{"file_name": "x.png", "text": "\\ud800"}',
    "half a character in the name": b'{"file_name": "\\udc80.png", "text": "x"}',
    "a long name": json.dumps({"file_name": "x" * 300 + ".png", "text": "x"}).encode(),
    "a long path": json.dumps({"file_name": "x/" * 3000 + ".png", "text": "x"}).encode(),
    "a zero byte": b'{"file_name": "x\\u0000.png", "text": "x"}',
    "zero bytes": b"\0" * 40,
    "twice the same entry": b'{"file_name": "x.png", "text": "x", "text": "y"}',
    "too many digits": b'{"file_name": "x.png", "text": "x", "weight": ' + b"9" * 5000 + b"}",
    "a folder": b'{"file_name": "sub", "text": "x"}',
    "a dead link": b'{"file_name": "dead.png", "text": "x"}',
}


@pytest.mark.parametrize("case", LINES)
def test_a_bad_line_of_a_table_costs_that_line_alone(tmp_path, case):
    write(tmp_path, {"good.png": PNG, "last.png": PNG, "x.png": PNG, "sub/y.md": ""})
    (tmp_path / "dead.png").symlink_to("gone")
    lines = [b'{"file_name": "good.png", "text": "x"}', LINES[case], b'{"file_name": "last.png", "text": "x"}']
    (tmp_path / "metadata.jsonl").write_bytes(b"\n".join(lines))
    found = dataset.open_dataset(tmp_path, on_error="skip")
    assert [example.name for example in found.examples] == ["good.png", "last.png"]
    assert sum("line 2" in name + reason for name, reason in found.skipped.items()) == 1
    with pytest.raises(ValueError, match="line 2"):
        dataset.open_dataset(tmp_path)


ROWS = {
    "another encoding": (b"x.png,caf\xe9", "not UTF-8 text"),
    "text after a quote": (b'x.png,"x"y', "expected after"),
    "too many values": (b"x.png,red, round", "more fields than columns"),
}


@pytest.mark.parametrize("case", ROWS)
def test_a_bad_row_of_a_table_costs_that_row_alone(tmp_path, case):
    row, reason = ROWS[case]
    write(tmp_path, {"good.png": PNG, "last.png": PNG, "x.png": PNG})
    (tmp_path / "metadata.csv").write_bytes(b"file_name,text\ngood.png,x\n" + row + b"\nlast.png,x\n")
    names, skipped, _ = opened(tmp_path)
    assert names == ["good.png", "last.png"]
    assert list(skipped) == ["metadata.csv line 3"]
    assert reason in skipped["metadata.csv line 3"]


def test_two_columns_of_one_name_are_refused(tmp_path):
    write(tmp_path, {"good.png": PNG, "metadata.csv": "file_name,text,text\ngood.png,x,y\n"})
    with pytest.raises(ValueError, match="two columns are called 'text'"):
        dataset.open_dataset(tmp_path, on_error="skip")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le with mark", "utf-16-be with mark"])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "csv ;", "csv tab", "tar"])
def test_text_comes_in_the_encodings_that_editors_write(tmp_path, encoding, kind):
    text = "Ein grüner Kreis 日本 😀"

    def bytes_of(content):
        mark = "\ufeff" if "with mark" in encoding else ""
        return (mark + content).encode(encoding.removesuffix(" with mark"))

    rows = [("good.png", text)]
    if kind == "tar":
        path = write_tar(tmp_path / "1.tar", {"good.png": PNG, "good.txt": bytes_of(text)})
    elif kind == "txt":
        path = write(tmp_path, {"good.png": PNG, "good.txt": bytes_of(text + "\r\n")})
    elif kind == "jsonl":
        path = write(
            tmp_path, {"good.png": PNG, "metadata.jsonl": bytes_of(jsonl([dict(file_name="good.png", text=text)]))}
        )
    else:
        table = comma_separated(rows).replace(",", {"csv": ",", "csv ;": ";", "csv tab": "\t"}[kind])
        path = write(tmp_path, {"good.png": PNG, "metadata.csv": bytes_of(table)})
    (example,) = dataset.open_dataset(path).examples
    assert example.captions == (text,)


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        (b"caf\xe9", "x.txt: not UTF-8 text (byte 3)"),
        (b"x" * 2**21, "longer than"),
        (b"\xff\xfex", "x.txt: not UTF-8 text (byte 0)"),
    ],
)
def test_a_bad_caption_costs_its_picture_alone(tmp_path, caption, reason):
    names, skipped, _ = opened(write(tmp_path, GOOD | {"x.png": PNG, "x.txt": caption}))
    assert names == ["good.png"]
    assert reason in skipped["x.png"]


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"no archive" * 100, b"\x1f\x8b" + b"x" * 600])
def test_a_shard_that_is_none_costs_that_shard_alone(tmp_path, content):
    write_tar(tmp_path / "1.tar", GOOD)
    (tmp_path / "0.tar").write_bytes(content)
    names, skipped, _ = opened(tmp_path)
    assert names == ["1.tar/good.png"]
    assert list(skipped) == ["0.tar"]
    with pytest.raises(ValueError, match=r"1 broken of 2 examples: 0\.tar: "):
        dataset.open_dataset(tmp_path)


def test_links_in_a_shard_are_named(tmp_path):
    with tarfile.open(write_tar(tmp_path / "1.tar", GOOD), "a") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            member = tarfile.TarInfo(f"x{kind.decode()}.png")
            member.type, member.linkname = kind, "good.png"
            tar.addfile(member)
        member = tarfile.TarInfo("folder")
        member.type = tarfile.DIRTYPE
        tar.addfile(member)
    names, skipped, _ = opened(tmp_path / "1.tar")
    assert names == ["good.png"]
    assert set(skipped) == {"x2.png", "x1.png", "x6.png"}


def test_names_with_dots_and_other_members_of_a_shard_are_named(tmp_path):
    files = GOOD | {"22.05.jpg": JPEG, "22.05.txt": "b", "c.cls": "1", "d.gif": b"GIF", "v1.5.json": "{}"}
    names, skipped, passed_over = opened(write_tar(tmp_path / "1.tar", files))
    assert names == ["good.png"]
    assert "the key ends at the first one" in skipped["22.05.jpg"]
    assert "d.gif is of a kind that is not read" in skipped["d"]
    assert passed_over == {".cls files": 1, "members with several dots in their names": 1}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_shard_that_is_damaged_anywhere_is_read_as_far_as_it_goes_or_named(tmp_path_factory, data_):
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    content = bytearray(write_tar(folder / "1.tar", GOOD | {"b.jpg": JPEG, "b.txt": "b"}).read_bytes())
    for _ in range(data_.draw(st.integers(1, 4))):
        place = data_.draw(st.integers(0, 4 * 512 + len(JPEG)))
        content[place : place + 1] = data_.draw(st.binary(max_size=6))
    (folder / "1.tar").write_bytes(content)
    try:
        found, said = dataset.open_dataset(folder / "1.tar", on_error="skip"), ""
    except ValueError as error:
        found, said = (), str(error)
    assert "\n" not in said
    assert len(found) in ((0,) if said else (1, 2))
    assert all(found.picture(i, 8).shape == (8, 8, 3) for i in range(len(found)))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from(["file_name", "text", "weight", "x"]), json_values), max_size=4))
def test_lines_of_any_json_are_taken_or_named(tmp_path_factory, rows):
    folder = tmp_path_factory.getbasetemp() / "any"
    write(folder, {"good.png": PNG})
    lines = [json.dumps({"file_name": "good.png", "text": "x"}), *(json.dumps(row) for row in rows)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    found = dataset.open_dataset(folder, on_error="skip")
    assert len(found) + len(found.skipped) == len(lines)


# what sdjax writes


@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg"])
@pytest.mark.parametrize("name", ["0000001", "v1.5-night"])
def test_our_own_pictures_and_shards_bring_their_captions(tmp_path, suffix, name):
    picture = Image.new("RGB", (12, 8), "red")
    recipe = recipe_of(Request("a red field, dusk"), SamplingConfig(), picture, model="m", dtype="float32")
    files = {name + suffix: encoded(picture, recipe, suffix), name + ".json": recipe.to_json()}
    own = {"manifest.jsonl": "{}", "job.json": "{}", ".lock": "", "jobs.jsonl": "{}"}
    folder = write(tmp_path / "pictures", {name + suffix: files[name + suffix]} | own)
    shard = write_tar(tmp_path / "shard-000000.tar", files)
    for path in (folder, shard):
        found = dataset.open_dataset(path)
        assert [(example.name, example.captions) for example in found.examples] == [
            (name + suffix, ("a red field, dusk",))
        ]
        assert found.skipped == {}


def test_a_picture_without_a_prompt_still_needs_a_caption(tmp_path):
    picture = Image.new("RGB", (12, 8), "red")
    recipe = recipe_of(Request(""), SamplingConfig(), picture, model="m", dtype="float32")
    names, skipped, _ = opened(write(tmp_path, GOOD | {"x.png": encoded(picture, recipe, ".png")}))
    assert (names, skipped) == (["good.png"], {"x.png": "empty caption"})


# what is said


def test_the_command_says_what_is_not_used(tmp_path, capsys, monkeypatch):
    write(tmp_path / "d", {f"{i:02}.png": b"" for i in range(30)} | GOOD | {"notes.md": "", "x.md": ""})
    monkeypatch.setattr("sdjax.cli.train._start", lambda *_: (_ for _ in ()).throw(ValueError("enough")))
    arguments = ["train", "vae", "--data", tmp_path / "d", "--out", tmp_path / "run", "--preset", "tiny", "--skip-bad"]
    assert cli.main([str(argument) for argument in arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "sdjax: note: left out 00.png: not a picture of a known kind"
    assert lines[20:] == [
        f"sdjax: note: left out 10 more, in {tmp_path / 'run' / 'skipped.jsonl'}",
        "sdjax: note: passed over 2 .md files",
        "sdjax: error: enough",
    ]
    written = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert written == [{"name": f"{i:02}.png", "reason": "not a picture of a known kind"} for i in range(30)]


def test_progress_counts_every_picture(tmp_path):
    seen = []
    dataset.open_dataset(write(tmp_path, GOOD | {"x.png": PNG, "x.txt": "x"}), progress=lambda *step: seen.append(step))
    assert seen == [(1, 2), (2, 2)]
    assert dataset.open_dataset is dataset.open_dataset


def test_pictures_are_not_decoded_again_until_one_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("SDJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sdjax.storage.cache.UNSETTLED", -(10**12))
    folder, seen = write(tmp_path / "d", GOOD | {"x.png": PNG, "x.txt": "x"}), []
    error = dataset._error
    monkeypatch.setattr(dataset, "_error", lambda example: (seen.append(example.name), error(example))[1])
    for count in (2, 2):
        assert len(dataset.open_dataset(folder)) == 2
        assert len(seen) == count
    (folder / "x.png").write_bytes(CUT)
    for count in (4, 4):
        assert opened(folder)[0] == ["good.png"]
        assert len(seen) == count


def test_what_may_pass_by_is_not_remembered(tmp_path, monkeypatch):
    """A disk that cannot be read now may be there again the next time."""
    monkeypatch.setenv("SDJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sdjax.storage.cache.UNSETTLED", -(10**12))
    folder = write(tmp_path / "d", GOOD | {"x.png": PNG, "x.txt": "x"})
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "_content", lambda example: (_ for _ in ()).throw(OSError("stale handle")))
        with pytest.raises(ValueError, match=r"all are broken: good\.png: stale handle"):
            dataset.open_dataset(folder, on_error="skip")
    assert len(dataset.open_dataset(folder)) == 2


def test_members_whose_names_are_no_text_are_read_or_named(tmp_path, capsys):
    odd = os.fsdecode(b"m\xff")
    with tarfile.open(tmp_path / "1.tar", "w", encoding="utf-8", errors="surrogateescape") as tar:
        for name, content in {f"{odd}.png": PNG, f"{odd}.txt": b"m", f"{odd}2.png": b"", f"{odd}2.txt": b"m"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    found = dataset.open_dataset(tmp_path / "1.tar", on_error="skip")
    assert ([example.name for example in found.examples], list(found.skipped)) == ([f"{odd}.png"], [f"{odd}2.png"])
    assert len(found.listing) == len(cache.fingerprint(found)) == 64
    arguments = ["train", "vae", "--data", tmp_path / "1.tar", "--out", tmp_path / "run", "--preset", "tiny"]
    assert cli.main([str(argument) for argument in arguments]) == 2
    assert "m\\udcff2.png: not a picture of a known kind" in capsys.readouterr().err.replace(odd, "m\\udcff")


@pytest.mark.parametrize("weight", [1e7, 1e300, 10**400])
def test_weights_that_would_make_an_epoch_endless_are_named(tmp_path, weight):
    lines = [{"file_name": "good.png", "text": "x"}, {"file_name": "x.png", "text": "x", "weight": weight}]
    write(tmp_path, {"good.png": PNG, "x.png": PNG, "metadata.jsonl": jsonl(lines)})
    assert "up to 1,000,000" in opened(tmp_path)[1]["x.png"]


def test_a_data_set_is_known_by_what_it_holds_wherever_it_lies(tmp_path):
    one, two = (dataset.open_dataset(write(tmp_path / name, GOOD)) for name in "ab")
    assert one.listing == two.listing
    Path(tmp_path / "a" / "good.txt").write_text("other")
    assert dataset.open_dataset(tmp_path / "a").listing != two.listing
