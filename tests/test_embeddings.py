"""Embeddings: files of every form, and triggers among the tokens of a prompt."""

import os
import pickle
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from convert.embeddings import read_embeddings, read_folder
from convert.files.picture import NoEmbedding, _noise
from convert.files.source import CheckpointError
from sdjax.text.embeddings import Embedding, Vocabulary
from sdjax.text.tokenizer import clip_tokenizer
from tests.checkpoint_files import peak_memory, pickled, write_raw_safetensors, write_safetensors, write_torch_zip
from tests.embedding_files import (
    FORMS,
    LARGE,
    TWO,
    WIDTH,
    generator_numbers,
    hidden,
    parameter_dict,
    picture_json,
    plain_picture,
    vectors,
    web_ui_state,
    write_cloneofsimo,
    write_lora,
    write_text_picture,
    write_torch,
    write_web_ui,
)

MB = 2**20
ENCODE = clip_tokenizer().encode


def refusal(path, width=WIDTH, **options):
    """The one line in which reading ends, with little memory held meanwhile."""
    lines = []

    def refused():
        with pytest.raises(CheckpointError) as caught:
            read_embeddings(path, width, **options)
        lines.append(str(caught.value))

    assert peak_memory(refused) < 64 * MB
    assert lines[0].startswith(f"{path}: ")
    assert lines[0].isprintable()
    assert len(lines[0]) < 400
    return lines[0]


# Forms


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_its_triggers_and_its_numbers_to_the_bit(tmp_path, form):
    name, write, expected = FORMS[form]
    write(tmp_path / name)
    found = {embedding.name: embedding for embedding in read_embeddings(tmp_path / name, WIDTH)}
    assert list(found) == list(expected)
    for trigger, array in expected.items():
        assert found[trigger].vectors.dtype == np.float32
        np.testing.assert_array_equal(found[trigger].vectors, array.astype(np.float32))
        assert found[trigger].source == str(tmp_path / name)


def test_the_name_within_a_file_is_kept(tmp_path):
    write_web_ui(tmp_path / "a.pt", TWO, "inner")
    write_web_ui(tmp_path / "b.pt", TWO, "*")
    assert [read_embeddings(tmp_path / name, WIDTH)[0].token for name in ("a.pt", "b.pt")] == ["inner", None]


def test_a_model_of_two_text_encoders_gets_the_vectors_of_both(tmp_path):
    write_safetensors(tmp_path / "xl.safetensors", {"clip_l": TWO, "clip_g": LARGE})
    found = read_embeddings(tmp_path / "xl.safetensors", (768, 1280))
    assert [(embedding.name, embedding.vectors.shape) for embedding in found] == [("xl", (2, 768)), ("xl", (2, 1280))]
    np.testing.assert_array_equal(found[1].vectors, LARGE)


def test_the_noise_over_the_strips_is_that_of_the_generator():
    assert generator_numbers(8) == [253, 242, 127, 44, 157, 27, 239, 133]
    assert _noise(1000).tolist() == [number & 15 for number in generator_numbers(1000)]


def test_the_strips_are_found_within_a_black_frame_and_next_to_black_columns(tmp_path):
    image = plain_picture()
    image.paste((0, 0, 0), (0, 0, 10, image.height))
    framed = np.pad(np.asarray(hidden(picture_json(TWO), image)), ((3, 5), (7, 2), (0, 0)))
    Image.fromarray(framed).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_embeddings(tmp_path / "a.png", WIDTH)[0].vectors, TWO)


# Folders


def test_a_folder_is_read_with_the_folders_in_it_and_what_is_left_out_is_named(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / ".cache").mkdir()
    write_web_ui(tmp_path / "b.pt", TWO)
    write_web_ui(tmp_path / ".hidden.pt", TWO)
    write_web_ui(tmp_path / ".cache" / "c.pt", TWO)
    write_torch(tmp_path / "deep" / "er" / "learned_embeds.bin", {"<a>": TWO})
    write_web_ui(tmp_path / "other.pt", vectors(2, 1024))
    (tmp_path / "damaged.pt").write_bytes(b"PK\x03\x04")
    (tmp_path / "notes.txt").write_text("x")
    plain_picture().save(tmp_path / "b.png")
    write_lora(tmp_path / "lora.safetensors", {})
    (tmp_path / "deep" / "loop").symlink_to(tmp_path)
    found, notes = read_folder(tmp_path, WIDTH)
    assert [embedding.name for embedding in found] == ["b", "<a>"]
    assert len(notes) == 3
    assert all("\n" not in note for note in notes)
    assert "damaged.pt" in notes[0]
    assert "other.pt" in notes[1]
    assert "Stable Diffusion 2" in notes[1]
    assert notes[2].endswith("hold no embedding: b.png, lora.safetensors, notes.txt")


def test_two_files_of_one_trigger_are_refused_by_their_names(tmp_path):
    (tmp_path / "x").mkdir()
    write_web_ui(tmp_path / "neg.pt", TWO)
    write_web_ui(tmp_path / "x" / "Neg.pt", TWO)
    with pytest.raises(CheckpointError, match=r"neg\.pt and .*x/Neg\.pt"):
        read_folder(tmp_path, WIDTH)


def test_default_file_names_in_several_folders_do_not_clash(tmp_path):
    for token in ("<a>", "<b>"):
        (tmp_path / token).mkdir()
        write_torch(tmp_path / token / "learned_embeds.bin", {token: TWO})
    assert [embedding.name for embedding in read_folder(tmp_path, WIDTH)[0]] == ["<a>", "<b>"]


def test_a_missing_folder_or_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none: no such folder"):
        read_folder(tmp_path / "none", WIDTH)
    with pytest.raises(FileNotFoundError, match=r"none\.pt: no such file"):
        read_embeddings(tmp_path / "none.pt", WIDTH)
    write_web_ui(tmp_path / "a.pt", TWO)
    with pytest.raises(CheckpointError, match=r"a\.pt: not a folder"):
        read_folder(tmp_path / "a.pt", WIDTH)


# Bad input


@pytest.mark.parametrize(
    ("width", "family"),
    [
        (1024, "Stable Diffusion 2"),
        (1280, "the larger text encoder of Stable Diffusion XL"),
        (2048, "both text encoders of Stable Diffusion XL"),
        (320, "another model"),
    ],
)
def test_another_width_is_refused_with_the_family_it_is_of(tmp_path, width, family):
    write_web_ui(tmp_path / "a.pt", vectors(2, width))
    line = refusal(tmp_path / "a.pt")
    assert f"have {width} numbers ({family}" in line or f"have {width} numbers (the {family}" in line.replace(
        "of", "of"
    )
    assert line.endswith("this model takes 768 numbers (Stable Diffusion 1)")


def test_vectors_for_the_larger_text_encoder_alone_are_refused(tmp_path):
    write_safetensors(tmp_path / "xl.safetensors", {"clip_g": LARGE})
    assert "1280 numbers" in refusal(tmp_path / "xl.safetensors")


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.where(np.arange(768) == 700, np.nan, TWO), "NaN or infinite"),
        (np.where(np.arange(768) == 3, np.inf, TWO), "NaN or infinite"),
        (np.full((1, 768), 1e300), "NaN or infinite"),
        (np.zeros((2, 768), np.float32), "zero everywhere"),
        (np.zeros((0, 768), np.float32), "[vectors, width]"),
        (np.zeros((2, 0), np.float32), "[vectors, width]"),
        (vectors(1, 768)[None], "[vectors, width]"),
        (vectors(76), "an embedding of 76 vectors; the text encoder has places for 75"),
    ],
)
def test_numbers_that_cannot_be_used_are_refused(tmp_path, array, reason):
    write_torch(tmp_path / "a.bin", {"<a>": array})
    assert reason in refusal(tmp_path / "a.bin")


def test_one_row_that_is_said_to_be_a_million_is_refused(tmp_path):
    torch.save({"<a>": torch.ones(1, 768).expand(10**6, 768)}, tmp_path / "a.bin")
    assert "more than the whole file could hold" in refusal(tmp_path / "a.bin")


def test_the_most_vectors_fit_and_one_more_does_not(tmp_path):
    write_web_ui(tmp_path / "a.pt", vectors(14))
    assert read_embeddings(tmp_path / "a.pt", WIDTH, most=14)[0].vectors.shape == (14, 768)
    assert "14 vectors" in refusal(tmp_path / "a.pt", most=13)


def test_whole_numbers_are_no_embedding(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", {"<a>": np.ones((2, 768), np.int32)})
    with pytest.raises(NoEmbedding, match="holds no embedding"):
        read_embeddings(tmp_path / "a.safetensors", WIDTH)
    write_safetensors(tmp_path / "b.safetensors", {"emb_params": np.ones((2, 768), np.int32), "x": TWO})
    assert "x" in [embedding.name for embedding in read_embeddings(tmp_path / "b.safetensors", WIDTH)]


@pytest.mark.parametrize(
    "tensors",
    [
        {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": vectors(4)},
        {"cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": vectors(10)},
        {"unet:0:up": vectors(320, 4), "unet:0:down": vectors(4, 768)},
        {"768.0.linear.0.bias": vectors(1)},
    ],
)
def test_adapters_and_models_are_no_embeddings(tmp_path, tensors):
    write_safetensors(tmp_path / "a.safetensors", tensors)
    with pytest.raises(NoEmbedding, match=f"holds no embedding, but tensors such as {next(iter(tensors))[:80]}"):
        read_embeddings(tmp_path / "a.safetensors", WIDTH)


def test_an_embedding_in_an_adapter_is_checked_too(tmp_path):
    write_cloneofsimo(tmp_path / "a.safetensors", {"<s1>": vectors(1, 1024)[0]})
    assert "the vectors of <s1> have 1024 numbers" in refusal(tmp_path / "a.safetensors")


class Gadget:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def with_gadget(place, gadget):
    """The dict of a .pt with something hostile in it."""
    if place == "entry":
        return web_ui_state(TWO) | {"string_to_token": gadget}
    param = parameter_dict({"*": TWO})
    param.__dict__[place] = {"*": gadget}
    return web_ui_state(TWO, param=param)


@pytest.mark.parametrize("place", ["entry", "_parameters", "_hooks"])
def test_hostile_pickles_are_refused_by_name_and_never_run(tmp_path, place):
    torch.save(with_gadget(place, Gadget(os.system, (f"touch {tmp_path}/ran",))), tmp_path / "a.pt")
    assert "posix.system" in refusal(tmp_path / "a.pt")
    assert not (tmp_path / "ran").exists()


def test_hostile_pickles_of_old_torch_are_never_run(tmp_path):
    gadget = Gadget(os.system, (f"touch {tmp_path}/ran",))
    for place, reason in (("entry", "posix.system"), ("_hooks", "ParameterDict as torch before 1.6 wrote it")):
        torch.save(with_gadget(place, gadget), tmp_path / "a.pt", _use_new_zipfile_serialization=False)
        assert reason in refusal(tmp_path / "a.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("state", [{"_parameters": [1]}, {"_parameters": {"*": 5}}, {}, [1], None])
def test_a_parameter_dict_whose_state_is_something_else_holds_nothing(tmp_path, state):
    made = b"ctorch.nn.modules.container\nParameterDict\n)\x81" + pickle.dumps(state, 2)[2:-1] + b"b"
    write_torch_zip(tmp_path / "a.pt", b"\x80\x02}" + pickled("string_to_param") + made + b"s.")
    assert "holds no tensors" in refusal(tmp_path / "a.pt")


def test_a_parameter_dict_by_itself_is_read(tmp_path):
    torch.save(parameter_dict({"*": TWO}), tmp_path / "a.pt")
    np.testing.assert_array_equal(read_embeddings(tmp_path / "a.pt", WIDTH)[0].vectors, TWO)


@pytest.mark.parametrize("form", ["a1111", "diffusers, safetensors", "picture with text", "pixels", "pixels of a WebP"])
def test_files_that_are_cut_off_are_refused_wherever_they_end(tmp_path, form):
    name, write, _ = FORMS[form]
    write(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    for part in (0.1, 0.5, 0.9):
        (tmp_path / name).write_bytes(data[: int(len(data) * part)])
        refusal(tmp_path / name)
    (tmp_path / name).write_bytes(b"")
    assert "empty" in refusal(tmp_path / name)


def test_other_files_are_refused_by_what_they_are(tmp_path):
    for data, what in ((b"<html>", "web page"), (b'{"a": 1}', "JSON"), (b"version https://git-lfs", "git lfs pull")):
        (tmp_path / "a.pt").write_bytes(data)
        assert what in refusal(tmp_path / "a.pt")
    write_raw_safetensors(tmp_path / "a.safetensors", b"[" * 100_000)
    refusal(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"not JSON",
        b"\xff\xfe",
        b"[" * 100_000,
        b"[" + b"[]," * 10**6 + b"[]]",
        b'{"a":' * 100_000,
        b"[1, 2]",
        b'{"string_to_param": {"*": {"TORCHTENSOR": "x"}}}',
        b'{"string_to_param": {"*": {"TORCHTENSOR": [[1, 2], [3]]}}}',
        b'{"string_to_param": {"*": {"TORCHTENSOR": ' + b"[" * 90 + b"1" + b"]" * 90 + b"}}}",
        b'{"string_to_param": {"*": {"TORCHTENSOR": [[' + b"9" * 5000 + b"]]}}}",
        b'{"string_to_param": {"*": {"TORCHTENSOR": {"a": 1}}}}',
        b'{"string_to_param": {"*": [[1.0, 2.0]]}}',
        picture_json(np.full((1, 768), np.nan)),
        picture_json(np.full((1, 768), 1e300)),
        picture_json(vectors(2, 1024)),
        picture_json(vectors(76)),
    ],
    ids=range(17),
)
def test_pictures_with_other_data_are_refused_in_text_and_in_pixels(tmp_path, text):
    write_text_picture(tmp_path / "text.png", text)
    assert "without an embedding" not in refusal(tmp_path / "text.png")
    if len(text) < MB:
        hidden(text).save(tmp_path / "pixels.png")
        assert "without an embedding" not in refusal(tmp_path / "pixels.png")


def test_pictures_without_an_embedding_say_so(tmp_path):
    black = Image.new("RGB", (40, 40))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8))
    for image in (plain_picture(), black, noise, Image.new("L", (1, 1), 255)):
        image.save(tmp_path / "a.png")
        with pytest.raises(NoEmbedding, match="a picture without an embedding"):
            read_embeddings(tmp_path / "a.png", WIDTH)


def test_a_picture_that_was_changed_after_it_was_made_is_refused(tmp_path):
    pixels = np.asarray(hidden(picture_json(TWO))).copy()
    pixels[30, 3:8] ^= 5
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert "damaged" in refusal(tmp_path / "a.png")


def png_chunk(kind, content):
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


def test_bombs_are_refused_before_they_fill_the_memory(tmp_path):
    hidden(b" " * (200 * MB)).save(tmp_path / "zlib.png")
    assert "more than 16777216 bytes" in refusal(tmp_path / "zlib.png")
    Image.new("1", (20_000, 8_000)).save(tmp_path / "pixels.png")
    assert "too many pixels" in refusal(tmp_path / "pixels.png")
    header = png_chunk(b"IHDR", (60_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0")
    data = b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", b"")
    (tmp_path / "header.png").write_bytes(data)
    assert "too many pixels" in refusal(tmp_path / "header.png")
    with open(tmp_path / "large.png", "wb") as file:
        file.write(data)
        file.truncate(65 * MB)
    assert "a picture of 68157440 bytes" in refusal(tmp_path / "large.png")


def test_text_that_is_no_base64_is_refused(tmp_path):
    plain_picture().save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    for text in (b"e30=!", b"e30", b"\xff"):
        chunk = png_chunk(b"tEXt", b"sd-ti-embedding\0" + text)
        (tmp_path / "a.png").write_bytes(data[:33] + chunk + data[33:])
        assert "damaged" in refusal(tmp_path / "a.png")


# Triggers among the tokens of a prompt

SIZES = {"easynegative": 8, "badhand": 2, "foo": 1, "foo bar": 3, "bad-artist": 4, "huge": 75, "1e": 1}
KNOWN = Vocabulary.of([Embedding(name, vectors(n), f"{name}.pt") for name, n in SIZES.items()], ENCODE)


def places(ids, known=KNOWN):
    """The tokens with vectors as 0, and [place, name] of the embeddings."""
    found, names, at = [], [], 0
    while at < len(ids):
        match = known.match(ids, at)
        if match is None:
            found.append(ids[at])
            at += 1
        else:
            embedding, taken = match
            names.append([len(found), embedding.name])
            found += [0] * len(embedding.vectors)
            at += taken
    return found, names


@pytest.mark.parametrize(
    ("text", "ids", "names"),
    [
        ("easynegative", [0] * 8, [[0, "easynegative"]]),
        ("EasyNegative", [0] * 8, [[0, "easynegative"]]),
        ("easynegative, a", [*[0] * 8, 267, 320], [[0, "easynegative"]]),
        ("easynegative2", [*[0] * 8, 273], [[0, "easynegative"]]),
        ("foo bar baz", [0, 0, 0, 25268], [[0, "foo bar"]]),
        ("foo baz", [0, 25268], [[0, "foo"]]),
        ("foo", [0], [[0, "foo"]]),
        ("foobar", [1183, 2411], []),
        ("bad - artist", [0] * 4, [[0, "bad-artist"]]),
        ("embedding:foo", [19703, 796, 281, 0], [[3, "foo"]]),
        ("foo foo bar foo", [0] * 5, [[0, "foo"], [1, "foo bar"], [4, "foo"]]),
        ("x huge", [343, *[0] * 75], [[1, "huge"]]),
        ("", [], []),
    ],
)
def test_the_longest_trigger_is_found_at_any_token(text, ids, names):
    assert places(ENCODE(text)) == (ids, names)
    assert places(np.array(ENCODE(text), np.int32)) == (ids, names)


def test_a_weight_within_a_trigger_hides_it():
    assert places(ENCODE("f") + ENCODE("oo")) == ([325, 2822], [])


def test_the_end_of_a_prompt_does_not_make_a_trigger_longer():
    known = Vocabulary.of([Embedding("foo", TWO, "a"), Embedding("foo bar baz", TWO, "b")], ENCODE)
    assert known.match(ENCODE("foo"), 0)[1] == len(ENCODE("foo"))
    assert known.match(ENCODE("foo bar"), 0)[0].name == "foo"


def test_an_empty_vocabulary_matches_nothing():
    assert Vocabulary().match([1, 2], 0) is None
    assert Vocabulary.of([], ENCODE) == Vocabulary()


def test_a_trigger_without_tokens_is_refused():
    with pytest.raises(ValueError, match=r"a\.pt: the trigger ' ' has no tokens"):
        Vocabulary.of([Embedding(" ", TWO, "a.pt")], ENCODE)


def test_two_embeddings_of_one_trigger_are_refused_with_both_files():
    one, other = Embedding("bad-artist", TWO, "a.pt"), Embedding("Bad - Artist", TWO, "b.pt")
    with pytest.raises(ValueError, match=r"a\.pt and b\.pt: both are called 'bad-artist' and 'Bad - Artist'"):
        Vocabulary.of([one, other], ENCODE)


def test_a_file_given_twice_counts_once(tmp_path):
    write_web_ui(tmp_path / "a.pt", TWO)
    twice = [read_embeddings(path, WIDTH)[0] for path in (tmp_path / "a.pt", tmp_path / ".." / tmp_path.name / "a.pt")]
    assert Vocabulary.of(twice, ENCODE).names == ["a"]


def test_vocabularies_are_equal_by_what_they_hold():
    one, same = (Vocabulary.of([Embedding("a", TWO, path), Embedding("b", LARGE, path)], ENCODE) for path in "xy")
    turned = Vocabulary.of([Embedding("b", LARGE), Embedding("a", TWO)], ENCODE)
    others = [
        Vocabulary.of([Embedding("a", TWO)], ENCODE),
        Vocabulary.of([Embedding("a", TWO), Embedding("b", LARGE + 1)], ENCODE),
        Vocabulary.of([Embedding("a", TWO), Embedding("c", LARGE)], ENCODE),
        Vocabulary(),
    ]
    assert one == same == turned
    assert hash(one) == hash(same)
    assert len({one, *others}) == 5


def test_an_embedding_is_found_by_its_name_as_a_file_too():
    for name in ("easynegative", "EasyNegative", "easynegative.pt", "a/easynegative.safetensors", "a\\easynegative"):
        assert KNOWN.named(name).name == "easynegative"
    assert KNOWN.named("easynegative2") is None
    assert Vocabulary().named("a") is None


def test_many_embeddings_and_a_long_prompt_take_no_time():
    many = Vocabulary.of([Embedding(f"bad{n} x", TWO, str(n)) for n in range(2000)], ENCODE)
    assert max(map(len, many.lengths.values())) < 10
    ids = ENCODE("bad1999 x bad ") * 1000
    assert sum(many.match(ids, at) is not None for at in range(len(ids))) == 1000
