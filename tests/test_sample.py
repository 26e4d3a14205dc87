"""The two drivers of a step: what a result may depend on, what compiles, and that streaming is scanning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.config import ScheduleConfig
from sdjax.diffusion.plan import calls_of
from sdjax.diffusion.sample import admit, at_rows, draw, first_state, image_keys, initial_noise, sample, stream
from sdjax.diffusion.samplers import SAMPLERS
from sdjax.diffusion.schedule import noise_schedule, per_image
from sdjax.diffusion.spacings import SPACINGS

SCHEDULE = noise_schedule(ScheduleConfig())
STEPS, SHAPE = 5, (4, 4, 2)
TRACES = []
jitted = jax.jit(sample, static_argnums=0)


def make_denoiser(strength, given, index):
    TRACES.append(1)

    def denoise(x, level):
        sigma, t = (per_image(value, x) for value in (level.sigma, level.t))
        return strength * jnp.tanh(x) / (1 + sigma) + 0.01 * t / 1000

    return denoise


def rows_of(name, spacing="karras", schedule=SCHEDULE):
    return SAMPLERS[name].rows(schedule, schedule.levels(STEPS, spacing))


def state(rows, x, keys, calls=None):
    """Pictures that all have the same rows; calls: None for all of them."""
    count = len(x)
    rows = jax.tree.map(lambda leaf: np.repeat(np.float32(leaf)[None], count, 0), rows)
    calls = np.full(count, rows.scale.shape[1] if calls is None else calls, np.int32)
    return first_state(rows, calls, x, keys, ())


def run(name, seeds, spacing="karras", x=None, strength=0.9, schedule=SCHEDULE):
    first = start(name, seeds, spacing, x, schedule)
    return jitted(make_denoiser, jnp.float32(strength), first).carry.x


def start(name, seeds, spacing="karras", x=None, schedule=SCHEDULE):
    keys = image_keys(seeds)
    rows = rows_of(name, spacing, schedule)
    return state(rows, initial_noise(keys, SHAPE) * np.float32(rows.levels.sigma[0]) if x is None else x, keys)


@pytest.mark.parametrize("name", SAMPLERS)
def test_result_depends_on_its_own_seed_alone(name):
    together = run(name, [3, 5, 4])
    np.testing.assert_array_equal(together, run(name, [3, 5, 4]))
    again = run(name, [9, 3, 5])
    np.testing.assert_array_equal(together[0], again[1])
    np.testing.assert_array_equal(together[1], again[2])
    assert np.abs(together[0] - together[1]).max() > 1e-3


def test_result_does_not_depend_on_the_size_of_the_batch():
    for name in ("euler_a", "dpmpp_sde"):  # one call per step and two, with noise
        np.testing.assert_allclose(run(name, [3, 5, 4])[1], run(name, [5])[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
def test_other_keys_matter_to_the_stochastic_samplers_alone(name):
    x = 10 * initial_noise(image_keys([0, 1, 2]), SHAPE)
    difference = np.abs(run(name, [3, 5, 4], x=x) - run(name, [6, 7, 8], x=x)).max((1, 2, 3))
    stochastic = SAMPLERS[name].stochastic and name != "restart"  # from 20 steps on
    assert (difference > 1e-3).all() if stochastic else (difference == 0).all()


@pytest.mark.parametrize("name", SAMPLERS)
def test_streaming_gives_what_scanning_gives(name):
    states = [found.carry for found in stream(make_denoiser, jnp.float32(0.9), start(name, [3, 5, 4]))]
    assert len(states) == calls_of(name, STEPS)
    np.testing.assert_allclose(states[-1].x, run(name, [3, 5, 4]), rtol=2e-5, atol=2e-6)
    if name not in ("plms", "lms"):  # these extrapolate
        np.testing.assert_allclose(states[-1].x, states[-1].x0_hat, atol=1e-6)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_spacing_works(name, zero_terminal_snr):
    schedule = noise_schedule(ScheduleConfig(zero_terminal_snr=zero_terminal_snr))
    results = [run(name, [3, 5, 4], spacing=spacing, schedule=schedule) for spacing in SPACINGS]
    assert np.isfinite(results).all()
    assert np.std(results, axis=0).max() > 1e-6, "the spacing is used"


def filled(name, spacing="karras", steps=STEPS):
    return jax.tree.map(np.float32, SAMPLERS[name].rows(SCHEDULE, SCHEDULE.levels(steps, spacing), 3 * STEPS))


def test_another_sampler_spacing_or_number_of_steps_compiles_nothing():
    keys, x = image_keys([0, 1, 2]), jnp.ones((3, *SHAPE))
    before = len(TRACES)
    for name in SAMPLERS:
        for spacing in SPACINGS:
            for steps in (1, 3, STEPS):
                count = len(SAMPLERS[name].rows(SCHEDULE, SCHEDULE.levels(steps, spacing)).scale)
                rows = filled(name, spacing, steps)
                found = jitted(make_denoiser, jnp.float32(0.5), state(rows, x, keys, count)).carry.x
                assert len(TRACES) == before + 1
        own = jax.tree.map(lambda leaf, count=count: leaf[:count], rows)
        np.testing.assert_allclose(
            found, sample(make_denoiser, jnp.float32(0.5), state(own, x, keys)).carry.x, rtol=2e-5, atol=2e-6
        )
        before += len(TRACES) - before - 1


def test_rows_that_do_not_run_never_call_the_network():
    calls = []

    def make_counting(params, given, index):
        def denoise(x, level):
            jax.debug.callback(lambda: calls.append(1))
            return 0.5 * x

        return denoise

    x = jnp.ones((1, *SHAPE))
    for count in (0, 1, 4):
        calls.clear()
        jax.jit(sample, static_argnums=0)(make_counting, (), state(filled("euler"), x, image_keys([0]), count))
        jax.effects_barrier()
        assert len(calls) == count


def test_every_picture_of_a_batch_may_have_a_sampler_and_a_number_of_steps_of_its_own():
    names = ("euler_a", "heun", "unipc", "dpmpp_sde", "plms")
    steps = (5, 2, 4, 3, 1)
    plans = [filled(name, steps=n) for name, n in zip(names, steps, strict=True)]
    keys = image_keys(range(len(names)))
    x = 10 * initial_noise(keys, SHAPE)
    rows, calls = jax.tree.map(lambda *rows: np.stack(rows), *plans), np.full(len(plans), 2 * STEPS, np.int32)
    together = jitted(make_denoiser, jnp.float32(0.9), first_state(rows, calls, x, keys, ())).carry.x
    for i, (name, n) in enumerate(zip(names, steps, strict=True)):
        own = jax.tree.map(np.float32, SAMPLERS[name].rows(SCHEDULE, SCHEDULE.levels(n, "karras")))
        alone = jitted(make_denoiser, jnp.float32(0.9), state(own, x[i : i + 1], keys[i : i + 1])).carry.x
        np.testing.assert_allclose(together[i], alone[0], rtol=2e-5, atol=2e-6)


def test_every_step_of_a_stream_is_the_same_program():
    steps = stream(
        make_denoiser, jnp.float32(0.9), start("heun", [1, 2])
    )  # two pictures: shapes that no other test has
    before = len(TRACES)
    next(steps)
    assert len(TRACES) > before
    before = len(TRACES)
    assert len(list(steps)) == 2 * STEPS - 2
    assert len(TRACES) == before


def test_no_rows_are_no_steps():
    x = jnp.ones((1, *SHAPE))
    rows = jax.tree.map(lambda leaf: leaf[:0], rows_of("euler"))
    arguments = make_denoiser, jnp.float32(0.9), state(rows, x, image_keys([0]))
    np.testing.assert_array_equal(jitted(*arguments).carry.x, x)
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
    x = jnp.ones((1, 3, 5 + (device or -1), 2))  # a shape that no other test has compiled
    with jax.log_compiles(), caplog.at_level("WARNING"):
        results = list(stream(make_denoiser, scale, state(rows_of("euler"), x, image_keys([4]))))
    assert len(results) == STEPS
    assert len([record for record in caplog.records if "Compiling jit(sample_step)" in record.getMessage()]) == 1


def test_every_row_has_noise_of_its_own():
    """Row j takes draw 1 + j of the image's key, number 0 being the start: with x' = x + eps they add up."""
    rows = jax.tree.map(np.float32, rows_of("euler"))
    rows = rows._replace(scale=np.ones(STEPS), history=np.zeros_like(rows.history), noise=2.0 ** np.arange(STEPS))
    keys, x = image_keys([4]), jnp.ones((1, *SHAPE))
    found = sample(make_denoiser, jnp.float32(0.9), state(rows, x, keys)).carry.x
    expected = x + sum(2.0**j * draw(keys, 1 + j, SHAPE) for j in range(STEPS))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5])
def test_seeds_out_of_range_are_refused(seed):
    with pytest.raises(ValueError, match=r"a seed must be a whole number in \[0, 2\^32\), found"):
        image_keys([0, seed])


def test_every_picture_takes_the_row_that_it_is_at():
    table = {"a": np.arange(12).reshape(3, 4), "b": np.arange(24.0).reshape(3, 4, 2)}
    found = at_rows(table, jnp.array([0, 3, 9]))  # the last one is past the end, where nothing runs
    np.testing.assert_array_equal(found["a"], [0, 7, 11])
    np.testing.assert_array_equal(found["b"], [[0, 1], [14, 15], [22, 23]])


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_picture_that_enters_later_than_its_neighbours_has_the_same_bits(name):
    """Two of "heun" are under way when a third of another sampler takes a place, after one tick and after three."""
    rows = [filled("heun"), filled("heun"), filled(name)]
    calls = np.array([len(rows_of(own).scale) for own in ("heun", "heun", name)], np.int32)
    keys = image_keys([1, 2, 3])
    x = 10 * initial_noise(keys, SHAPE)
    fresh = first_state(jax.tree.map(lambda *leaves: np.stack(leaves), *rows), calls, x, keys, ())
    strength = jnp.float32(0.9)
    together = jitted(make_denoiser, strength, fresh)
    for before in (1, 3):
        under = jitted(make_denoiser, strength, fresh._replace(calls=calls * [1, 1, 0]), np.int32(before))
        under = admit(under, fresh, np.array([-1, -1, 2], np.int32))
        np.testing.assert_array_equal(under.index, [before, before, 0])
        found = jitted(make_denoiser, strength, under, np.int32(100))
        np.testing.assert_array_equal(found.carry.x, together.carry.x)
        np.testing.assert_array_equal(found.index, calls)


@pytest.mark.parametrize("name", ["dpmpp_2m", "heun"])
def test_the_loop_cut_into_pieces_is_the_loop(name):
    whole, cut = start(name, [3, 5]), start(name, [3, 5])
    for ticks in (1, 2, 0, 100):
        cut = jitted(make_denoiser, jnp.float32(0.9), cut, np.int32(ticks))
    np.testing.assert_array_equal(cut.carry.x, jitted(make_denoiser, jnp.float32(0.9), whole, np.int32(100)).carry.x)


def test_gradients_go_through_the_loop():
    first = start("dpmpp_2m", [3])

    def loss(strength):
        return sample(make_denoiser, strength, first).carry.x.sum()

    at, step = jnp.float32(0.9), 1e-2
    slope = (loss(at + step) - loss(at - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(loss)(at), slope, rtol=1e-2)
