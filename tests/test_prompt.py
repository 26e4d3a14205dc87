"""The prompt engine: what other programs make of the same prompts, and what ours makes of any."""

import json
import os
import re
from collections import Counter
from itertools import chain
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdjax.text import syntax
from sdjax.text.embeddings import Embedding, Vocabulary
from sdjax.text.prompt import (
    CHUNKS,
    LARGEST_WEIGHT,
    MODES,
    Prompts,
    Vectors,
    Words,
    check,
    chunks,
    interpolated,
    lay_out,
    read,
    token_count,
)
from sdjax.text.tokenizer import clip_tokenizer
from sdjax.text.weighting import weighted

FOLDER = Path(os.environ.get("SDJAX_GOLDEN") or Path(__file__).parent / "data" / "golden")
"""Golden values of AUTOMATIC1111's web UI, ComfyUI and compel, made by running these programs themselves."""

CASES = json.loads((FOLDER / "prompt_weights.json").read_text("utf-8"))["cases"]
WORDS = Words(clip_tokenizer(), 77, 49408)


def of_kind(*kinds: str) -> pytest.MarkDecorator:
    cases = [case for case in CASES if case["kind"] in kinds]
    return pytest.mark.parametrize("case", cases, ids=[str(case.get("input", ""))[:40] for case in cases])


def test_the_golden_file_has_cases_of_every_kind():
    kinds = Counter(case["kind"] for case in CASES)
    print(dict(kinds))
    assert set(kinds) >= {
        "attention",
        "comfy_weights",
        "compel",
        "schedule",
        "and",
        "extra_networks",
        "comments",
        "chunks",
    }


# What is written


@of_kind("attention")
def test_weights_are_those_of_a1111(case):
    found = syntax.a1111_pieces(case["input"])
    if "error" in case:
        assert "".join(piece.text for piece in found) in re.sub(r"[()]", "", case["input"])  # text, where it raises
        assert read(case["input"]).notes
        return
    expected = [
        ("BREAK", None) if text == "BREAK" and weight < 0 else (text, weight) for text, weight in case["output"]
    ]
    assert [(piece.text, None if piece.is_break else piece.weight) for piece in found] == expected


@of_kind("comfy_weights")
def test_weights_are_those_of_comfyui(case):
    assert [[piece.text, piece.weight] for piece in syntax.comfy_pieces(case["input"])] == case["output"]


@of_kind("compel")
def test_weights_are_those_of_compel(case):
    if re.search(r"\.(swap|blend)\(", case["input"]):
        with pytest.raises(ValueError, match=r"\.(swap|blend)\(\)"):
            syntax.compel_parts(case["input"])
        return
    parts = syntax.compel_parts(case["input"])
    assert [weight for _, weight in parts] == case["and_weights"]
    assert [[[p.text, p.weight] for p in syntax.compel_pieces(text)] for text, _ in parts] == case["output"]


@of_kind("schedule")
def test_schedules_are_those_of_a1111(case):
    steps, hires = case["steps"], case.get("hires_steps")
    found = syntax.schedule(
        case["input"], hires or steps, first_pass=hires and steps, old=case.get("old_scheduling", False)
    )
    assert [list(entry) for entry in found] == case["output"]
    used = case["used_at_0based_step"]
    assert [found[syntax.text_at(found, call)][1] for call in range(len(used))] == used


@of_kind("and")
def test_parts_are_those_of_a1111(case):
    assert [list(part) for part in syntax.parts(case["input"])] == case["output"]


@of_kind("comments")
def test_comments_are_those_of_a1111(case):
    assert syntax.without_comments(case["input"]) == case["output"]


@of_kind("extra_networks")
def test_networks_are_those_of_a1111(case):
    text, found = syntax.networks(case["input"])
    assert text == case["text"]
    for network, expected in zip(found, case["networks"], strict=True):
        assert [network.kind, list(network.items)] == [expected["type"], expected["items"]]
        assert [list(network.positional), network.named] == [expected["positional"], expected["named"]]
        if "lora" in expected:
            tag, lora = syntax.lora_tag(network), expected["lora"]
            assert [tag.name, tag.text, tag.unet, tag.rank] == [lora["name"], lora["te"], lora["unet"], lora["dyn"]]


# Tokens and chunks


def learnt(case) -> Words:
    known = case.get("embeddings_known", {})
    embeddings = [Embedding(name, np.zeros((count, 768), np.float32), name) for name, count in known.items()]
    return Words(WORDS.tokenizer, 77, 49408, Vocabulary.of(embeddings, WORDS.tokenizer.encode))


@of_kind("chunks", "chunks_embeddings", "comfy_chunks")
def test_chunks_are_theirs(case):
    said = dict(case.get("settings", {}))
    weighting = "comfy" if case["kind"] == "comfy_chunks" else {"None": "none"}.get(said.pop("emphasis", None), "a1111")
    reach = said.pop("comma_padding_backtrack", 20)
    assert not said, "settings that the test does not know"
    words, vectors = learnt(case), Vectors(49408)
    too_long = {name for name, count in case.get("embeddings_known", {}).items() if count > 75}
    if any(name in case["input"] for name in too_long):
        with pytest.raises(ValueError, match="vectors; expected 75 at most"):
            chunks(case["input"], words, vectors, weighting, comma_reach=reach)
        return
    found = chunks(case["input"], words, vectors, weighting, comma_reach=reach)
    ids = [[id if id < 49408 else 0 for id in chunk.ids] for chunk in found]
    (word,) = words.tokenizer.encode("break")
    theirs = [id for chunk in case["chunks"] for id in chunk["ids"]]
    if weighting == "a1111" and syntax.BREAK in syntax.a1111_pieces(case["input"]) and word in theirs:
        assert len(found) > case["n_chunks"]  # BREAK inside brackets is a word there, and ends the chunk here
        assert list(chain(*ids)) == [id for id in theirs if id != word]
        return
    assert [len(found), ids] == [case["n_chunks"], [chunk["ids"] for chunk in case["chunks"]]]
    assert [chunk.weights for chunk in found] == [chunk["weights"] for chunk in case["chunks"]]
    if "token_count" in case:
        assert token_count(found, words) == case["token_count"]
    for chunk, expected in zip(found, case["chunks"], strict=True):
        for offset, name, count in expected.get("embeddings", []):
            first = vectors.place(vectors.used[name])[0]
            assert chunk.ids[offset : offset + count] == list(range(first, first + count))


@of_kind("batch")
def test_prompts_of_different_length_have_their_own_chunks(case):
    prompts = laid_out(*case["input"][::-1])
    assert [int(prompts.own[1]), int(prompts.own[0])] == case["n_chunks"]


# The arithmetic


def one_text(weights: np.ndarray, mode: str) -> Prompts:
    """Two texts: the weighted one, and the empty prompt."""
    chunked = np.atleast_2d(np.array(weights, np.float32))
    laid = laid_out("", "")
    return jax.tree.map(
        lambda leaf: np.asarray(leaf)[None],
        laid._replace(
            weights=np.stack([chunked, np.ones_like(chunked)]),
            group=np.array([1, -1]),
            repeats=np.ones(2, np.float32),
            empty=np.int32(1),
            mode=np.int32(MODES[mode]),
            mix=np.eye(2, dtype=np.float32),
        ),
    )


@of_kind("emphasis", "emphasis_two_chunks")
@pytest.mark.parametrize(
    ("theirs", "mode"), [("Original", "a1111"), ("ComfyUI", "comfy"), ("None", "none"), ("Ignore", "none")]
)
def test_weights_change_the_encoding_as_theirs_do(case, theirs, mode):
    if theirs not in case:
        return
    z, empty = np.array(case["z"], np.float32), np.array(case["z_empty"], np.float32)
    z = z.reshape(-1, *z.shape[-2:])
    weights = case["weights"] if mode != "none" else np.ones_like(case["weights"])
    texts = np.stack([z, np.broadcast_to(empty, z.shape)])[None]
    found = np.asarray(weighted(texts, one_text(weights, mode)))[0, 0].reshape(-1, 3)
    np.testing.assert_allclose(found, np.array(case[theirs]).reshape(-1, 3), rtol=2e-5, atol=2e-6)


def test_texts_that_take_turns_restore_their_mean_together():
    rng = np.random.default_rng(0)
    laid = laid_out("", "[(a:1.5):b:0.5]", steps=10)
    z = rng.normal(0.3, 1, (len(laid.ids), 1, 77, 5)).astype(np.float32)
    found = np.asarray(weighted(z[None], jax.tree.map(lambda leaf: np.asarray(leaf)[None], laid)))[0]
    scaled = z * laid.weights[..., None]
    first, second = 1, 2
    ratio = (z[first].mean() + z[second].mean()) / (scaled[first].mean() + scaled[second].mean())
    for i in (first, second):
        np.testing.assert_allclose(found[i], scaled[i] * ratio, rtol=2e-5, atol=1e-6)
    np.testing.assert_array_equal(found[0], z[0])


# Laid out for a program


def with_embedding(name: str, vectors: np.ndarray) -> Words:
    return WORDS.with_embeddings([Embedding(name, vectors, f"{name}.pt")])


def laid_out(negative: str, positive: str, *, steps: int = 20, weighting: str = "a1111") -> Prompts:
    readings = read(negative, weighting, steps=steps, negative=True), read(positive, weighting, steps=steps)
    return lay_out(*readings, WORDS, rows=64, weighting=weighting, pad_token=49407, width=768)


def shapes(prompts: Prompts):
    return [np.shape(leaf) for leaf in prompts]


def test_a_plain_prompt_is_the_tokenizers_own_ids():
    prompts = laid_out("dog", "a cat, (not) dog", weighting="none")
    assert prompts.is_plain
    np.testing.assert_array_equal(prompts.ids[:2, 0], WORDS.tokenizer(["dog", "a cat, (not) dog"]))
    np.testing.assert_array_equal(prompts.texts, np.tile([0] + [1] * 8, (64, 1)))


@pytest.mark.parametrize(
    "prompt",
    [
        "(cat:1.2) and [dog]",
        "[cat:dog:0.5]",
        "[a|b|c|d]",
        "a AND b :0.5 AND [c:d:3]",
        "(weight:1.5), [(a:0.5)::10] # comment",
    ],
)
@pytest.mark.parametrize("weighting", ["a1111", "comfy", "compel", "none"])
def test_whatever_a_prompt_says_its_arrays_have_the_same_shapes(prompt, weighting):
    assert shapes(laid_out("ugly, (bad:1.3)", prompt, weighting=weighting)) == shapes(laid_out("", "a"))


def test_prompts_of_two_and_three_chunks_share_a_program():
    assert shapes(laid_out("", "a " * 100)) == shapes(laid_out("b " * 170, "a " * 200)) != shapes(laid_out("", "a"))
    assert laid_out("", "a " * 100).ids.shape[1] == CHUNKS[1]


def test_a_schedule_is_a_table_of_which_text_each_call_sees():
    prompts = laid_out("[x|y]", "[cat:dog:10]")
    assert prompts.texts[:12, 1].tolist() == [1] * 11 + [3]
    assert prompts.texts[:5, 0].tolist() == [0, 0, 2, 0, 2]
    assert prompts.changed[:4].tolist() == [False, False, True, True]
    assert prompts.count == 4


def test_parts_of_different_length_repeat_the_last_row_of_the_shorter():
    prompts = laid_out("", "a AND " + "b " * 100)
    assert prompts.own[:3].tolist() == [1, 1, 2]
    assert prompts.keys[:3].tolist() == [77, 154, 154]
    assert prompts.strengths[:3].tolist() == [1, 1, 0]
    assert not prompts.is_plain


def test_padding_of_stable_diffusion_2_follows_the_first_end():
    readings = read(""), read("a cat")
    prompts = lay_out(*readings, WORDS, rows=64, pad_token=0, width=1024)
    assert prompts.ids[1, 0, :6].tolist() == [49406, 320, 2368, 49407, 0, 0]


def test_an_embedding_is_laid_out_once_however_often_it_is_named():
    vectors = np.arange(2 * 768, dtype=np.float32).reshape(2, 768)
    words = with_embedding("foo", vectors)
    prompts = lay_out(read("foo"), read("(foo:1.3), foo"), words, rows=64, pad_token=49407, width=768)
    assert prompts.ids[1, 0, 1:6].tolist() == [49408, 49409, 267, 49408, 49409]
    assert prompts.ids[0, 0, 1:3].tolist() == [49408, 49409]
    assert prompts.weights[1, 0, 1:4].tolist() == [np.float32(1.3), np.float32(1.3), 1]
    np.testing.assert_array_equal(prompts.vectors[:2], vectors)


def test_comfyui_names_embeddings_with_a_prefix():
    vectors = np.ones((3, 768), np.float32)
    words = Words(
        WORDS.tokenizer, 77, 49408, Vocabulary.of([Embedding("foo-neg", vectors, "f")], WORDS.tokenizer.encode)
    )
    (chunk,) = chunks("a embedding:foo-neg.pt, (embedding:foo-neg:1.2)", words, Vectors(49408), "comfy")
    assert chunk.ids == [320, 49408, 49409, 49410, 267, 49408, 49409, 49410]
    with pytest.raises(ValueError, match="embedding:bar is not known; there are foo-neg"):
        chunks("embedding:bar", words, Vectors(49408), "comfy")


def test_compel_mixes_in_encodings_that_do_not_see_what_weighs_less():
    prompts = laid_out("", "a (cat)0.5 dog", weighting="compel")
    assert prompts.mixed
    assert prompts.count == 4  # negative, prompt, without the cat, empty
    np.testing.assert_allclose(prompts.mix[1, :3], [0, 0.5, 0.5], atol=1e-7)  # tan(pi / 4) = 1
    assert (~prompts.seen[2, 0]).nonzero()[0].tolist() == [2]


def test_a_prompt_between_two_is_their_mean():
    one, other = np.zeros((77, 4), np.float32), np.ones((77, 4), np.float32)
    np.testing.assert_array_equal(interpolated(one, other, 0.25), np.full((77, 4), 0.25, np.float32))
    with pytest.raises(ValueError, match="encode them together"):
        interpolated(one, np.ones((154, 4), np.float32), 0.5)


# What cannot be used, and what is told


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("(" * 10_000 + "a" + ")" * 10_000, "10000 brackets within brackets"),
        ("[" * 10_000, "10000 brackets within brackets"),
        ("(a:1e9)" + "[" * 200, "200 brackets within brackets"),
        ("(a:1000000000)", "weight 1e[+]09 of 'a' must lie within"),
        ("a AND b :99999", "weight 99999 of 'b'"),
        ("word " * 5000, "5,000 words; expected 3,600 tokens"),
        ("<lora:a:b>", "'b' is no weight"),
        ("<lora:a:te=1=2>", "more than one '='"),
        ("<lora::1>", "expected <lora:NAME:WEIGHT>"),
        ("<lora:a:1:1:2.5>", "dyn must be a whole number"),
        ("<lora:a:start=3>", "'start' is not known"),
    ],
)
def test_a_prompt_that_cannot_be_used_says_why(prompt, reason):
    with pytest.raises(ValueError, match=reason) as error:
        check(prompt, "a1111", 75)
    assert len(str(error.value)) < 300
    assert "\n" not in str(error.value)


def test_many_tokens_without_spaces_are_refused_when_they_are_counted():
    with pytest.raises(ValueError, match=r"tokens in .* chunks of 75; expected 48 chunks at most"):
        chunks("," + "ab1" * 5000, WORDS, Vectors(49408))


@pytest.mark.parametrize("weighting", ["comfy", "compel"])
def test_weights_of_other_dialects_have_bounds_too(weighting):
    with pytest.raises(ValueError, match="must lie within"):
        check("(a:1e9)" if weighting == "comfy" else "(a)1000000", weighting, 75)


@pytest.mark.parametrize(
    ("prompt", "note"),
    [
        ("a <hypernet:x:1>", "<hypernet:x:1> is left out"),
        ("[a:b:50]", "schedule step 50 is outside of the 20 steps: it switches never"),
        ("[a:b:-3]", "it switches from the start"),
        ("(a:1.2.3) b", "1.2.3 is no number"),
    ],
)
def test_what_has_no_effect_is_told(prompt, note):
    assert any(note in found for found in read(prompt, steps=20).notes)


def test_networks_in_a_negative_prompt_are_text_and_told():
    found = read("a <lora:x:1>", negative=True)
    assert found.parts[0].texts[0][1] == "a <lora:x:1>"
    assert not found.loras
    assert "in a negative prompt is text" in found.notes[0]


@given(st.text(alphabet="ab ,:.()[]|\\<>#0123456789ANDBREK\n\t", max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_text_is_read_or_refused_in_one_line(text):
    for weighting in ("a1111", "comfy", "compel", "none"):
        reason = ""
        try:
            found = read(text, weighting, steps=7)
            for part in found.parts:
                for last, each in part.texts:
                    assert 1 <= last <= 7
                    assert chunks(each, WORDS, Vectors(49408), weighting)
        except ValueError as error:
            reason = str(error)
        assert len(reason) < 300


@given(st.text(alphabet="ab ()[]", max_size=40))
@settings(max_examples=200, deadline=None)
def test_brackets_weigh_by_how_deep_a_letter_stands(text):
    depth_known = all(text.count(o) == text.count(c) for o, c in ("()", "[]"))
    pieces = syntax.a1111_pieces(text)
    assert "".join(piece.text for piece in pieces).count("a") == text.count("a")
    if not depth_known or ")(" in text or "][" in text:
        return
    assert all(0 < piece.weight < LARGEST_WEIGHT for piece in pieces)
