"""The tokenizer against OpenAI's own code and against transformers, on 301 hard prompts."""

import json
from pathlib import Path

import numpy as np
import pytest

from sdjax.text.tokenizer import Tokenizer, clip_tokenizer

ROWS = json.loads((Path(__file__).parent / "data" / "prompt_ids.json").read_text())


@pytest.mark.parametrize("clean", ["openai", "hf"])
def test_ids_are_those_of_the_reference_on_every_hard_prompt(clean):
    tokenizer = clip_tokenizer(clean)
    assert len(ROWS) > 300
    assert [r["prompt"] for r in ROWS if tokenizer.encode(r["prompt"]) != r[clean]] == []


def test_the_two_cleanings_differ_where_the_references_do():
    assert sum(r["openai"] != r["hf"] for r in ROWS) > 30


@pytest.mark.parametrize("pad_token", [49407, 0])
def test_ids_are_padded_to_77(pad_token):
    ids = clip_tokenizer()(["a cat", ""], pad_token=pad_token)
    assert ids.shape == (2, 77)
    assert ids.dtype == np.int32
    assert list(ids[0]) == [49406, 320, 2368, 49407] + [pad_token] * 73
    assert list(ids[1]) == [49406, 49407] + [pad_token] * 75


def test_a_long_prompt_warns_and_says_what_was_cut():
    prompt = "cat " * 75 + "Dog and Horse"
    with pytest.warns(UserWarning, match=r"78 tokens and only 75 fit.*'dog and horse'"):
        ids = clip_tokenizer()([prompt])
    assert ids[0, 0] == 49406
    assert ids[0, -1] == 49407
    assert list(ids[0, 1:-1]) == [2368] * 75


@pytest.mark.parametrize("prompt", [None, 3, b"cat", ["cat"]])
def test_a_prompt_that_is_no_string_is_refused(prompt):
    with pytest.raises(TypeError, match="a prompt must be a string"):
        clip_tokenizer()([prompt])


def test_an_unknown_cleaning_is_refused():
    with pytest.raises(ValueError, match="clean must be one of openai, hf"):
        clip_tokenizer("none")


def test_a_lone_surrogate_does_not_break_it():
    assert clip_tokenizer().encode("a \ud800 b")


@pytest.fixture(scope="module")
def transformers_folder(tmp_path_factory):
    """The same vocabulary as transformers writes it: vocab.json and merges.txt, and tokenizer.json."""
    from transformers import CLIPTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    engine = clip_tokenizer().engine
    engine.model.save(str(folder))
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    new = folder / "new"
    CLIPTokenizer(str(vocab), str(merges)).save_pretrained(new)
    return folder


def test_both_forms_of_a_tokenizer_folder_give_the_same_ids(transformers_folder):
    old = Tokenizer.from_folder(transformers_folder)
    new = Tokenizer.from_folder(transformers_folder / "new")
    assert (transformers_folder / "new" / "tokenizer.json").is_file()
    for row in ROWS:
        assert old.encode(row["prompt"]) == new.encode(row["prompt"]) == row["openai"]


def test_added_tokens_of_a_folder_are_whole_tokens(transformers_folder, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((transformers_folder / name).read_bytes())
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<my-cat>": 49408}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.vocab_size == 49409
    assert 49408 in tokenizer.encode("a photo of <my-cat>")


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", "[" * 100_000, '{"a": 1}', '{"model": {"merges": 3}}', "null", "\x00"],
)
@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json"])
def test_a_broken_tokenizer_folder_gives_one_clear_error(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    if name == "vocab.json":
        (tmp_path / "merges.txt").write_text("a b\n")
    with pytest.raises(ValueError, match="not a CLIP tokenizer"):
        Tokenizer.from_folder(tmp_path)


def test_an_empty_folder_is_not_a_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected vocab\.json and merges\.txt"):
        Tokenizer.from_folder(tmp_path)


def test_the_merges_file_is_what_its_script_says():
    import gzip
    from importlib import resources

    packed = resources.files("sdjax.assets").joinpath("clip_merges.txt.gz").read_bytes()
    assert len(gzip.decompress(packed).decode().split("\n")) == 49152 - 256 - 2
