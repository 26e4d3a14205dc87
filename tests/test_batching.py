"""Continuous batching: a finished picture makes room for the next one, and none is changed by that."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from PIL import Image

from sdjax.devices import placement as devices
from sdjax.diffusion.plan import calls_of
from sdjax.diffusion.samplers import SAMPLERS as ALL_SAMPLERS
from sdjax.models.params import random_params
from sdjax.pipeline import functions, programs
from sdjax.pipeline.batching import Batches, Waiting
from sdjax.request import Request, plan
from tests.small import MINI, mini

SIZE = dict(width=8, height=8)
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8))
SAMPLERS = ("dpmpp_2m", "heun", "euler_a", "unipc", "plms", "dpmpp_sde", "lms", "lcm")
MIXED = [
    Request(
        f"{colour} disc",
        seed=seed,
        steps=1 + 5 * seed % 7,
        sampler=SAMPLERS[seed % len(SAMPLERS)],
        guidance=(1, 4, 7.5)[seed % 3],
        id=str(seed),
        **SIZE,
    )
    for seed, colour in zip(range(13), itertools.cycle(("red", "green", "blue")))
]
MIXED += [  # of no step at all, and of few
    Request("red disc", seed=20, image=PHOTO, strength=0, steps=3, id="20"),
    Request("red disc", seed=21, image=PHOTO, strength=0.7, steps=5, id="21"),
]


DEVICES = jax.local_devices()
PLACES = {
    "one": {},
    "two": dict(devices=DEVICES[:2]),
    "four": dict(devices=DEVICES),
    "pmap": dict(devices=DEVICES[:2], parallel="pmap"),
}


@pytest.fixture(scope="module")
def alone():
    return {}


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("place", PLACES)
def test_pictures_of_a_mixed_job_are_those_made_alone_up_to_rounding(latents, alone, place, batch_size):
    if not alone:
        for request in MIXED:
            alone.update(latents(mini(), [request], 1))
    pipe = mini().on(**PLACES[place]) if PLACES[place] else mini()
    for name, found in latents(pipe, MIXED, batch_size).items():
        np.testing.assert_allclose(found, alone[name], rtol=0, atol=1e-5 * np.abs(alone[name]).max())


@pytest.mark.parametrize(("devices", "batch_size"), [(1, 4), (2, 2)])
def test_their_bits_are_those_of_the_picture_alone_in_batch_invariant_mode(latents, optimised, devices, batch_size):
    lonely = mini().on(DEVICES[:1], batch_invariant=True)
    together = latents(mini().on(DEVICES[:devices], batch_invariant=True), MIXED, batch_size)
    for request in MIXED[2:14:3]:
        np.testing.assert_array_equal(together[request.id], latents(lonely, [request], 1)[request.id])


def test_a_picture_with_few_steps_does_not_wait_for_one_with_many(monkeypatch):
    """Of 2 places one holds 12 steps; in the other one six pictures of 2 steps are made meanwhile: 12 ticks in all."""
    ticks = []
    sampled = Batches._sampled
    monkeypatch.setattr(
        Batches, "_sampled", lambda self, one, state, n: ticks.append(n) or sampled(self, one, state, n)
    )
    long = Request("red disc", steps=12, id="long", **SIZE)
    short = [Request("blue disc", seed=i, steps=2, id=str(i), **SIZE) for i in range(6)]
    found = [request.id for request, _ in mini().batch([long, *short], batch_size=2)]
    assert sorted(found) == sorted([*"012345", "long"])
    assert sum(ticks) == 12
    assert found[:2] == ["0", "1"], "handed out as they become ready"


def test_with_progress_batches_come_one_after_the_other_in_the_order_of_the_requests():
    seen = []
    found = [request.id for request, _ in mini().batch(MIXED[:6], batch_size=4, progress=lambda *s: seen.append(s[:2]))]
    assert found == [request.id for request in MIXED[:6]]
    assert [total for done, total in seen if done == 1] == [
        max(r.steps for r in MIXED[:4]) * 2 - 1,
        seen[-1][1],
    ] or seen
    assert [done for done, _ in seen] == [*range(1, seen[0][1] + 1), *range(1, seen[-1][1] + 1)]


def test_progress_of_all_tasks_runs_the_same_programs():
    """One compiled loop, whether it is taken a row at a time or as a whole."""
    from sdjax.pipeline.programs import programs

    program = programs(mini().config, mini().placement).sample.program
    mini().text_to_image("red disc", steps=2, **SIZE)
    before = program._cache_size()
    mini().text_to_image("red disc", steps=3, progress=lambda *_: None, **SIZE)
    mini().image_to_image("red disc", PHOTO, steps=3, progress=lambda *_: None)
    mini().inpaint("red disc", PHOTO, Image.new("L", (8, 8), 255), steps=2)
    assert program._cache_size() == before


@pytest.mark.parametrize("name", ALL_SAMPLERS)
def test_the_calls_of_a_sampler_are_known_without_its_plan(name):
    """So that a job knows which of its lines can share a batch."""
    for steps in (1, 2, 10, 33):
        planned = plan(Request("", sampler=name, steps=steps), mini().config)
        assert calls_of(name, steps) == planned.calls


# Waiting


class One:
    """Stands for a prepared request."""

    def __init__(self, shape, calls):
        self.shape, self.plan = shape, self
        self.calls = calls

    def __repr__(self):
        return f"{self.shape}{self.calls}"


def test_requests_wait_for_others_of_their_shape_and_no_more_than_may_wait():
    taken = []

    def endless():
        for i in itertools.count():
            taken.append(One("ab"[i % 3 == 2], i))
            yield taken[-1]

    waiting = Waiting(endless(), bound=6)
    assert waiting.next_shape(2) == "a"
    assert [one.calls for one in waiting.take("a", 2)] == [0, 1]
    assert len(taken) == 2
    assert [one.calls for one in waiting.take("b", 3)] == [2, 5], "of six that may wait the others are of another shape"
    assert len(taken) == 8


def test_of_the_last_ones_those_with_most_steps_come_first_and_else_their_order_is_kept():
    waiting = Waiting(iter([One("a", calls) for calls in (5, 1, 9, 2, 7)]), bound=100)
    assert [one.calls for one in waiting.take("a", 2)] == [5, 1]
    assert [one.calls for one in waiting.take("a", 2, ahead=2)] == [9, 7]
    assert [one.calls for one in waiting.take("a", 2)] == [2]
    assert waiting.next_shape(1) is None


def test_kernels_are_transformed_once_for_a_checkpoint_and_size(monkeypatch):
    unet = dataclasses.replace(MINI.unet, channels=(64,))
    config = dataclasses.replace(MINI, name="wide", unet=unet, image_size=32)
    calls = []

    def counted(function, placement):
        program = devices.jitted(function, placement)
        if function.func is not functions.transformed_kernels:
            return program

        def call(params, x):
            calls.append(x.shape)
            return program(params, x)

        call.ahead, call.lower, call.program = program.ahead, program.lower, program.program
        return call

    monkeypatch.setattr(programs, "jitted", counted)
    programs.programs.cache_clear()
    try:
        pipe = dataclasses.replace(mini(), config=config, params=random_params(config))
        request = dict(seed=3, steps=3)
        shown = pipe.text_to_image("red disc", progress=lambda *_: None, **request)[0]
        assert len(calls) == 1
        assert np.abs(np.asarray(shown, int) - np.asarray(pipe.text_to_image("red disc", **request)[0])).max() <= 1
        assert len(calls) == 1
        pipe.text_to_image("red disc", width=48, height=32, **request)
        pipe = dataclasses.replace(pipe, params=random_params(config, seed=1))
        pipe.text_to_image("red disc", width=48, height=32, **request)
        assert calls == [(1, 32, 32, 4), (1, 32, 48, 4), (1, 32, 48, 4)]
    finally:
        programs.programs.cache_clear()
