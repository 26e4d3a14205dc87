"""What a prompt says shows in the latents as it should, and compiles nothing."""

import dataclasses

import jax
import numpy as np
import pytest

from sdjax.devices.compilation import compilations
from sdjax.models.params import random_params
from sdjax.pipeline.functions import contexts, predict_noise, text_kv
from sdjax.pipeline.pipeline import Pipeline
from sdjax.request import Request
from sdjax.text.embeddings import Embedding
from sdjax.text.prompt import interpolated, lay_out, read
from tests.small import MINI, mini

SETTINGS = dict(width=8, height=8, steps=4, guidance=4.0, sampler="euler", seed=3)
FORMS = (
    "red disc",
    "(red:1.4) [disc]",
    "[red:blue:0.5] disc",
    "[red|blue|green] disc, [orange::2]",
    "red disc AND blue square :0.4",
    "[red:blue:2] :0.7 AND (green:0.5) AND orange :-0.3",
)
"""Prompts of one chunk that say everything that a prompt can say."""


def asked(prompt, **settings):
    return Request(prompt, **(SETTINGS | settings), id=str(len(str(prompt))) + str(sorted(settings.items()))[:40])


def assert_equal_to_rounding(found, expected):
    """To 1e-5 of the latents' size."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.fixture
def made(latents):
    """made(prompt, ...) -> latents of one picture."""

    def of(prompt, pipe=None, **settings):
        (found,) = latents(pipe or mini(), [asked(prompt, **settings)], 1).values()
        return found

    return of


def test_a_plain_prompt_is_the_same_bits_in_every_dialect(made):
    plain = made("red disc", weighting="none")
    for weighting in ("a1111", "comfy", "compel"):
        np.testing.assert_array_equal(made("red disc", weighting=weighting), plain)
    assert not np.allclose(made("(red:1.4) disc"), plain, atol=1e-4)


def test_a_text_until_the_last_step_is_the_text(made):
    np.testing.assert_array_equal(made("[red:blue:4] disc"), made("red disc"))
    np.testing.assert_array_equal(made("[red:blue:0] disc"), made("blue disc"))
    turned = made("[red:blue:2] disc")
    assert not np.allclose(turned, made("red disc"), atol=1e-4)
    assert not np.allclose(turned, made("blue disc"), atol=1e-4)


def test_texts_that_are_the_same_take_turns_without_a_trace(made):
    np.testing.assert_array_equal(made("[red|red] disc"), made("red disc"))
    np.testing.assert_array_equal(made("disc", negative_prompt="[red|red]"), made("disc", negative_prompt="red"))


def test_a_schedule_sees_its_texts_at_the_calls_that_it_says(made, monkeypatch):
    """By a sampler of our own, call by call, with the plain prompts' predictions."""
    from sdjax.pipeline import functions

    seen = []
    held = functions.MakeDenoiser.held

    def watched(self, params, given, kv, index):
        jax.debug.callback(lambda texts: seen.append(int(texts)), functions.at_rows(given.texts, index)[0, 1])
        return held(self, params, given, kv, index)

    monkeypatch.setattr(functions.MakeDenoiser, "held", watched)
    pipe = dataclasses.replace(mini(), config=dataclasses.replace(MINI, name="watched"))
    made("[red:blue:2] disc", pipe=pipe)
    assert seen == [1, 1, 1, 2]  # one call more than the number says


def test_a_part_of_weight_0_changes_nothing_and_a_weight_is_a_guidance(made):
    plain = made("red disc")
    np.testing.assert_allclose(made("red disc AND blue square :0"), plain, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(made("red disc :2"), made("red disc", guidance=8.0), rtol=1e-4, atol=1e-5)
    halves = made("red disc :0.5 AND red disc :0.5")
    np.testing.assert_allclose(halves, plain, rtol=1e-4, atol=1e-5)
    assert not np.allclose(made("red disc AND blue square"), plain, atol=1e-4)


def test_parts_act_together_without_guidance_too(made):
    np.testing.assert_allclose(
        made("red disc :0.5 AND red disc :0.5", guidance=1.0), made("red disc", guidance=1.0), rtol=1e-4, atol=1e-5
    )
    assert not np.allclose(made("red AND blue", guidance=1.0), made("red", guidance=1.0), atol=1e-4)


def test_a_weight_on_the_whole_prompt_needs_the_negative_one_without_guidance_too(made):
    expected = made("red disc", guidance=2.0, negative_prompt="green square")
    found = made("red disc :2", guidance=1.0, negative_prompt="green square")
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_compel_weight_of_0_does_not_see_the_word(made):
    """Nearly: the word's place is there, and nobody attends to it."""
    without = made("red (blue)0", weighting="compel")
    other = made("red (green)0", weighting="compel")
    np.testing.assert_allclose(without, other, atol=2e-2)
    assert not np.allclose(made("red blue", weighting="compel"), made("red green", weighting="compel"), atol=2e-2)


@pytest.mark.parametrize("prompt", ["red disc", "(red:1.3) disc", "red, " * 5])
def test_an_encoded_prompt_makes_the_same_picture(made, prompt):
    encoded = mini().encode(prompt)
    assert encoded.shape[0] % MINI.clip.length == 0
    assert_equal_to_rounding(made(encoded), made(prompt))


def test_between_two_prompts_there_are_others(made):
    short, long = mini().encode(["red", "blue " * 8])
    middle = made(interpolated(short, long, 0.5))
    assert not np.allclose(middle, made(short), atol=1e-4)
    np.testing.assert_array_equal(made(interpolated(short, long, 0)), made(short))


@pytest.mark.parametrize("prompt", ["[a:b:0.5]", "a AND b", "a :2", "a <lora:x:1>"])
def test_what_is_more_than_one_text_cannot_be_encoded(prompt):
    with pytest.raises(ValueError, match="no single text"):
        mini().encode(prompt)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (np.zeros((16, 5), np.float32), r"must be f32\[rows, 16\]"),
        (np.zeros((17, 16), np.float32), "rows a multiple of 16"),
        (np.full((16, 16), np.nan, np.float32), "NaN or infinity"),
        (np.zeros((16 * 49, 16), np.float32), "expected 48 at most"),
    ],
)
def test_an_encoded_prompt_that_does_not_fit_is_refused(given, reason):
    with pytest.raises(ValueError, match=reason):
        mini().text_to_image(given, **SETTINGS)


def test_rows_that_are_no_keys_are_not_attended_to():
    """Two chunks in a program for three: the same as in one for two."""
    pipe, clip = mini(), MINI.clip
    laid = lay_out(read(""), read("red " * 10), pipe.words, rows=1, pad_token=clip.pad_token, width=clip.width)
    assert [laid.own[1], laid.ids.shape[1]] == [2, 3]
    found = contexts(pipe.params, jax.tree.map(lambda leaf: leaf[None], laid), config=MINI)[:, 1]
    x = np.random.default_rng(0).standard_normal((1, 8, 8, 4), np.float32)
    time = [[np.zeros((1, 16), np.float32)] * n for n in (1, 2, 2)]
    keys = np.arange(3 * clip.length)[None] < 2 * clip.length

    def predicted(context, keys):
        kv = text_kv(pipe.params["unet"], context, keys, config=MINI)
        return predict_noise(pipe.params["unet"], x, time, kv, config=MINI)

    exactly = predicted(found[:, : 2 * clip.length], None)
    np.testing.assert_allclose(predicted(found, keys), exactly, rtol=1e-5, atol=1e-6)
    assert not np.allclose(predicted(found, None), exactly, atol=1e-4)


def test_prompts_of_every_form_share_batches_and_each_is_as_if_made_alone(latents):
    pipe = mini()
    requests = [
        Request(
            prompt,
            negative_prompt=negative,
            seed=i,
            steps=2 + i % 5,
            sampler=("euler", "heun", "dpmpp_2m")[i % 3],
            guidance=(4.0, 1.0)[i % 4 == 3],
            weighting=("a1111", "a1111", "comfy", "compel")[(i // 6) % 4],
            width=8,
            height=8,
            id=str(i),
        )
        for i, (prompt, negative) in enumerate(
            (prompt, negative) for negative in ("", "(ugly:1.2)", "[bad|worse]", "no") for prompt in FORMS
        )
    ]
    requests = [
        dataclasses.replace(one, prompt="(red)1.5 disc") if one.weighting == "compel" else one for one in requests
    ]
    together = latents(pipe, requests, 5)
    for one in requests[::3]:
        (alone,) = latents(pipe, [one], 1).values()
        assert_equal_to_rounding(together[one.id], alone)


def test_no_form_of_prompt_compiles_anything():
    pipe = mini()
    pipe.text_to_image("red disc", **SETTINGS)
    with compilations() as found:
        for prompt in (*FORMS, "(blue:1.2) (disc"):
            pipe.text_to_image(prompt, "[bad|worse]", **SETTINGS)
        for weighting in ("comfy", "compel", "none"):
            pipe.text_to_image("(red)0.5 (disc:1.2)", **SETTINGS, weighting=weighting)
        pipe.text_to_image("red, blue", **SETTINGS)
    assert not found
    assert len(pipe.tokenizer.encode("red")) == 2
    pipe.text_to_image("red " * 10, **SETTINGS)
    with compilations() as found:
        for words in (8, 15, 20):
            pipe.text_to_image("red " * words, "blue, " * 3, **SETTINGS)
    assert not found


# Learnt words


def with_embedding(*embeddings: Embedding) -> Pipeline:
    pipe = mini()
    return dataclasses.replace(pipe, embeddings=pipe.words.with_embeddings(embeddings).learnt)


def test_a_learnt_word_equal_to_a_word_makes_the_same_picture(made):
    pipe = mini()
    ids = pipe.tokenizer.encode("red disc")
    vectors = np.asarray(pipe.params["text"]["token_embedding"])[ids]
    learnt = with_embedding(Embedding("green", vectors))
    for before, prompt, theirs in (
        ("", "blue green", "blue red disc"),
        ("green", "blue", "blue"),
        ("", "blue (green:1.3)", "blue (red disc:1.3)"),
    ):
        negative = "red disc" if before else ""
        found = made(prompt, pipe=learnt, negative_prompt=before)
        assert_equal_to_rounding(found, made(theirs, negative_prompt=negative))


def test_pictures_with_other_learnt_words_share_a_batch(latents):
    rng = np.random.default_rng(1)
    embeddings = [
        Embedding(name, rng.standard_normal((n, 16), np.float32)) for name, n in (("red", 1), ("blue", 3), ("green", 5))
    ]
    learnt = with_embedding(*embeddings)
    requests = [
        Request(f"{name} disc", **(SETTINGS | dict(seed=i)), id=str(i))
        for i, name in enumerate(("red", "blue", "green", "orange"))
    ]
    together = latents(learnt, requests, 4)
    for one in requests:
        (alone,) = latents(learnt, [one], 1).values()
        assert_equal_to_rounding(together[one.id], alone)


def test_weights_are_applied_at_every_number_of_devices(latents):
    pipe = mini()
    requests = [Request(prompt, **(SETTINGS | dict(seed=i)), id=str(i)) for i, prompt in enumerate(FORMS)]
    here = latents(pipe, requests, 3)
    for options in (dict(), dict(parallel="pmap")):
        there = latents(pipe.on(jax.local_devices()[:2], **options), requests, 3)
        for name, found in there.items():
            assert_equal_to_rounding(found, here[name])


def test_random_parameters_of_the_text_encoder_matter():
    """The tests above would pass for a model that does not see its prompt; this one does."""
    assert random_params(MINI)["text"]["token_embedding"].std() > 0
    one, other = mini().text_to_image(["red disc", "blue square"], **SETTINGS)
    assert np.asarray(one).tobytes() != np.asarray(other).tobytes()
