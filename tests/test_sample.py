"""The drivers: what a result may depend on, what compiles, and that streaming is scanning, for every sampler."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.config import ScheduleConfig
from sdjax.diffusion.sample import draw, image_keys, initial_noise, sample, stream, with_time_table
from sdjax.diffusion.samplers import SAMPLERS
from sdjax.diffusion.schedule import SPACINGS, noise_schedule

SCHEDULE = noise_schedule(ScheduleConfig())
STEPS, SHAPE = 5, (4, 4, 2)
TRACES = []
jitted = jax.jit(sample, static_argnums=(0, 2))


def make_denoiser(strength):
    TRACES.append(1)

    def denoise(x, level):
        return strength * jnp.tanh(x) / (1 + level.sigma) + 0.01 * level.t / 1000

    return denoise


def rows_of(name, spacing="karras", schedule=SCHEDULE):
    return SAMPLERS[name].rows(schedule, schedule.levels(STEPS, spacing))


def run(name, seeds, driver=jitted, spacing="karras", x=None, strength=0.9, schedule=SCHEDULE):
    keys = image_keys(seeds)
    rows = jax.tree.map(np.float32, rows_of(name, spacing, schedule))
    x = initial_noise(keys, SHAPE) * rows.levels.sigma[0, 0] if x is None else x
    return driver(make_denoiser, jnp.float32(strength), SAMPLERS[name].method, rows, x, keys)


@pytest.mark.parametrize("name", SAMPLERS)
def test_result_depends_on_its_own_seed_alone(name):
    together = run(name, [3, 5, 4])
    np.testing.assert_array_equal(together, run(name, [3, 5, 4]))
    again = run(name, [9, 3, 5])
    np.testing.assert_array_equal(together[0], again[1])
    np.testing.assert_array_equal(together[1], again[2])
    assert np.abs(together[0] - together[1]).max() > 1e-3


def test_result_does_not_depend_on_the_size_of_the_batch():
    for name in ("euler_a", "dpmpp_sde"):  # both methods, with noise
        np.testing.assert_allclose(run(name, [3, 5, 4])[1], run(name, [5])[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
def test_other_keys_matter_to_the_stochastic_samplers_alone(name):
    x = 10 * initial_noise(image_keys([0, 1, 2]), SHAPE)
    difference = np.abs(run(name, [3, 5, 4], x=x) - run(name, [6, 7, 8], x=x)).max((1, 2, 3))
    assert (difference > 1e-3).all() if SAMPLERS[name].stochastic else (difference == 0).all()


@pytest.mark.parametrize("name", SAMPLERS)
def test_streaming_gives_what_scanning_gives(name):
    states = list(run(name, [3, 5, 4], driver=stream))
    assert len(states) == STEPS + (name == "plms")
    np.testing.assert_allclose(states[-1][0], run(name, [3, 5, 4]), rtol=2e-5, atol=2e-6)
    if name not in ("plms", "lms"):  # these extrapolate
        np.testing.assert_allclose(states[-1][0], states[-1][1], atol=1e-6)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_spacing_works(name, zero_terminal_snr):
    schedule = noise_schedule(ScheduleConfig(zero_terminal_snr=zero_terminal_snr))
    results = [run(name, [3, 5, 4], spacing=spacing, schedule=schedule) for spacing in SPACINGS]
    assert np.isfinite(results).all()
    assert np.std(results, axis=0).max() > 1e-6, "the spacing is used"


def test_nothing_but_another_method_or_shape_compiles():
    names = [name for name in SAMPLERS if name != "plms"]  # it has one row more
    for name in names:
        run(name, [0, 1, 2])
        list(run(name, [0, 1, 2], driver=stream))
    before = len(TRACES)
    for name in names:
        for spacing in SPACINGS:
            run(name, [7, 8, 9], spacing=spacing, strength=0.5)
        list(run(name, [7, 8, 9], driver=stream, spacing="trailing", strength=0.5))
    assert len(TRACES) == before


def test_every_step_of_a_stream_is_the_same_program():
    steps = run("heun", [1, 2], driver=stream)  # two pictures: shapes that no other test has
    before = len(TRACES)
    next(steps)
    assert len(TRACES) > before
    before = len(TRACES)
    assert len(list(steps)) == STEPS - 1
    assert len(TRACES) == before


def test_no_rows_are_no_steps():
    x = jnp.ones((1, *SHAPE))
    rows = jax.tree.map(lambda leaf: leaf[:0], rows_of("euler"))
    arguments = make_denoiser, jnp.float32(0.9), SAMPLERS["euler"].method, rows, x, image_keys([0])
    np.testing.assert_array_equal(jitted(*arguments), x)
    assert not list(stream(*arguments))


# Randomness


def test_noise_of_an_image_comes_from_its_seed_and_the_index_alone():
    keys = image_keys([0, 7, 2**32 - 1])
    for index, found in ((0, initial_noise(keys, SHAPE)), (3, draw(keys, 3, SHAPE))):
        for i, seed in enumerate([0, 7, 2**32 - 1]):
            key = jax.random.fold_in(jax.random.key(np.uint32(seed)), index)
            np.testing.assert_array_equal(found[i], jax.random.normal(key, SHAPE))


def test_noise_is_unit_normal_and_independent_between_seeds_and_draws():
    keys = image_keys(range(8))
    noise = np.stack([draw(keys, index, (16, 16, 4)) for index in range(8)]).reshape(64, -1)
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    correlation = np.corrcoef(noise) - np.eye(64)
    assert np.abs(correlation).max() < 0.16  # 5 standard deviations of 1/32


@pytest.mark.parametrize("device", [None, 0, 1])
def test_streaming_compiles_one_step_wherever_the_parameters_lie(device, caplog):
    """Restored parameters are bound to their device, random ones are not."""
    scale = np.float32(0.8) if device is None else jax.device_put(jnp.float32(0.8), jax.devices()[device])
    rows = jax.tree.map(np.float32, rows_of("euler"))
    x = jnp.ones((1, 3, 5 + (device or -1), 2))  # a shape that no other test has compiled
    with jax.log_compiles(), caplog.at_level("WARNING"):
        results = list(stream(make_denoiser, scale, SAMPLERS["euler"].method, rows, x, image_keys([4])))
    assert len(results) == STEPS
    assert len([record for record in caplog.records if "Compiling jit(_step)" in record.getMessage()]) == 1


@pytest.mark.parametrize("name", ["euler", "dpm2_a", "dpmpp_sde"])
def test_every_step_and_every_call_has_noise_of_its_own(name):
    """Draw k of step j is draw 1 + j draws + k of the image's key, number 0 being the start."""
    method = SAMPLERS[name].method
    seen = []

    class Recording(type(method)):
        def step(self, denoise, carry, row, noise):
            jax.debug.callback(lambda *noise: seen.extend(np.asarray(noise)), *noise, ordered=True)
            return super().step(denoise, carry, row, noise)

    keys = image_keys([4])
    rows = jax.tree.map(np.float32, rows_of(name))
    recording = Recording(**dataclasses.asdict(method))
    sample(make_denoiser, jnp.float32(0.9), recording, rows, jnp.ones((1, *SHAPE)), keys)
    jax.effects_barrier()
    expected = [draw(keys, 1 + index, SHAPE) for index in range(STEPS * method.draws)]
    np.testing.assert_array_equal(seen, expected)


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5])
def test_seeds_out_of_range_are_refused(seed):
    with pytest.raises(ValueError, match=r"a seed must be a whole number in \[0, 2\^32\), found"):
        image_keys([0, seed])


def test_the_time_table_is_filled_in_for_all_calls_at_once():
    rows = rows_of("heun")
    filled = with_time_table(rows, lambda t: {"double": 2 * t})
    np.testing.assert_array_equal(filled.levels.time["double"], 2 * rows.levels.t)
    assert filled.levels.time["double"].shape == (STEPS, 2)
    np.testing.assert_array_equal(filled.levels.sigma, rows.levels.sigma)
