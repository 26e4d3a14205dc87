"""Over devices: a picture is the same on any number of them, and they have nothing to tell each other."""

import re
from dataclasses import replace

import jax
import numpy as np
import pytest

from sdjax.devices.placement import HERE, Placement
from sdjax.pipeline.batching import assemble, conditioned, initial, state_of
from sdjax.pipeline.programs import programs
from sdjax.request import Request
from tests.small import MINI, mini

DEVICES = jax.local_devices()
SIZE = dict(width=8, height=8)
REQUESTS = [
    Request("red disc", seed=3, steps=3, **SIZE),
    Request("blue disc", "grey", seed=4, steps=2, sampler="euler_a", **SIZE),
    Request("blue square", seed=5, guidance=1, steps=4, **SIZE),
    Request("green disc", seed=6, steps=3, sampler="dpmpp_sde", noise="torch", **SIZE),
    Request("orange", seed=7, steps=1, **SIZE),
]
COLLECTIVES = r"all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast"


@pytest.fixture(scope="module")
def pipe():
    return mini()


def drawn(pipe, batch):
    """Pictures by seed, i32[h, w, 3]."""
    made = {request.seed: np.asarray(image).astype(int) for request, image in pipe.batch(REQUESTS, batch_size=batch)}
    return [made[request.seed] for request in REQUESTS]


@pytest.fixture(scope="module")
def alone(pipe):
    return drawn(pipe, len(REQUESTS))


@pytest.mark.parametrize(
    "placement",
    [dict(), dict(devices=DEVICES[:2], parallel="pmap"), dict(model_parallel=2)],
    ids=["four devices", "pmap over two", "parameters over two, pictures over two"],
)
def test_pictures_are_those_of_one_device(pipe, alone, placement):
    """Five requests of other lengths, samplers and guidance in batches that do not come out even."""
    for own, other in zip(alone, drawn(pipe.on(**placement), batch=2), strict=True):
        assert np.abs(own - other).max() <= 1


def latents(pipe, requests, placement):
    """float32, before they are made into pictures."""
    of_model, params = programs(MINI, placement), placement.put(pipe.params)
    carry, *_ = of_model.sample(params, state_for(pipe, requests, placement, params), np.int32(64))
    return np.asarray(carry.x)


FOUR = [Request(str(i), seed=i, steps=2 + i, sampler="dpmpp_2m_sde", **SIZE) for i in range(4)]


def test_exact_latents_have_the_same_bits_in_any_batch_on_any_device(pipe, optimised):
    """A stochastic sampler: alone, and third of four on two devices."""
    together = latents(pipe, FOUR, Placement(tuple(DEVICES[:2]), batch_invariant=True))
    np.testing.assert_array_equal(together[2], latents(pipe, FOUR[2:3], Placement(batch_invariant=True))[0])


def test_latents_are_the_same_in_any_batch_on_any_device_up_to_rounding(pipe):
    together, single = latents(pipe, FOUR, Placement(tuple(DEVICES[:2]))), latents(pipe, FOUR[2:3], HERE)
    np.testing.assert_allclose(together[2], single[0], rtol=0, atol=1e-5 * np.abs(single).max())


def state_for(pipe, requests, placement, params):
    """The pictures before the first step."""
    of_model = programs(MINI, placement)
    batch = assemble([replace(pipe, placement=placement, params=params)._prepared(one, {}) for one in requests], MINI)
    given = conditioned(of_model.condition(None), params, batch)
    return state_of(batch, initial(of_model.initial_latents, batch), given)


@pytest.mark.parametrize("parallel", ["jit", "pmap"])
def test_programs_hold_no_collective(pipe, parallel):
    placement = Placement(tuple(DEVICES[:2]), parallel)
    of_model, params = programs(MINI, placement), placement.put(pipe.params)
    state = state_for(pipe, REQUESTS[:2], placement, params)
    lowered = (
        of_model.sample.lower(params, state, np.int32(64)),
        of_model.admit.lower(state, state, np.array([-1, 0], np.int32)),
        of_model.decode.lower(params, state.carry.x),
    )
    for text in (one.compile().as_text() for one in lowered):
        assert "num_partitions=2" in text or "replica_count=2" in text
        assert not re.search(COLLECTIVES, text)


def test_parameters_are_split_where_they_can_be(pipe):
    placement = Placement(tuple(DEVICES), model_parallel=2)
    params = placement.put(pipe.params)
    whole, part = (
        sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
        sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(params)),
    )
    assert 0.5 <= part / whole < 0.52
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), jax.device_get(pipe.params))


def test_progress_shows_the_same_rows_on_devices(pipe):
    seen = {}
    for name, place in (("one", pipe), ("two", pipe.on(DEVICES[:2]))):
        seen[name] = []
        settings = dict(steps=2, count=2, progress=lambda *row, name=name: seen[name].append(row), **SIZE)
        seen[name, "picture"] = [np.asarray(p).astype(int) for p in place.text_to_image("red disc", **settings)]
    assert [row[:2] for row in seen["one"]] == [row[:2] for row in seen["two"]] == [(1, 2), (2, 2)]
    for one, two in zip(seen["one"], seen["two"], strict=True):
        np.testing.assert_allclose(one[2], two[2], rtol=0, atol=1e-5 * np.abs(one[2]).max())
    assert np.abs(np.subtract(seen["one", "picture"], seen["two", "picture"])).max() <= 1


def test_nothing_is_compiled_anew_for_other_settings(pipe):
    placed = pipe.on(DEVICES[:2])
    first = placed.text_to_image("red disc", steps=2, count=2, **SIZE)
    sizes = [function._cache_size() for function in compiled(placed.placement)]
    other = placed.text_to_image(["blue disc", "blue square"], steps=5, sampler="heun", guidance=3, seed=9, **SIZE)
    assert [function._cache_size() for function in compiled(placed.placement)] == sizes
    assert len({image.tobytes() for image in (*first, *other)}) == 4


def compiled(placement):
    of_model = programs(MINI, placement)
    return [of_model.condition(None).program, of_model.initial_latents.program, of_model.sample.program]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (dict(parallel="both"), "jit or pmap"),
        (dict(devices=()), "at least one"),
        (dict(devices=(DEVICES[0],) * 2), "named once"),
        (dict(devices=tuple(DEVICES), model_parallel=3), "divides the 4 devices"),
        (dict(devices=tuple(DEVICES), model_parallel=2, parallel="pmap"), "neither with pmap"),
        (dict(devices=tuple(DEVICES), model_parallel=2, batch_invariant=True), "nor with exact"),
    ],
)
def test_impossible_placements_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        Placement(**wrong)


def test_the_default_device_needs_no_mesh_and_another_is_used(pipe):
    assert pipe.on(DEVICES[:1]).placement == HERE
    other = pipe.on(DEVICES[3:])
    assert {leaf.devices() == {DEVICES[3]} for leaf in jax.tree.leaves(other.params)} == {True}


def test_options_under_their_earlier_names_still_work(pipe):
    four = tuple(DEVICES)
    assert pipe.on(DEVICES, model=2).placement == Placement(four, model_parallel=2)
    assert pipe.on(DEVICES, exact=True).placement == Placement(four, batch_invariant=True)
    with pytest.raises(TypeError, match="on has no option 'axact'"):
        pipe.on(DEVICES, axact=True)
    asked = [Request("red disc", steps=1, **SIZE)]
    assert len(list(pipe.batch(asked, batch=1))) == 1
    with pytest.raises(TypeError, match="batch has no option 'bach'"):
        pipe.batch(asked, bach=1)
