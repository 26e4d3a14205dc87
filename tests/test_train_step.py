"""One training step: against PyTorch, against its own definition, and the same on any number of devices."""

import math
import platform
import subprocess
import sys
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from sdjax.config import TINY
from sdjax.devices.platform import use_gradients
from sdjax.diffusion.schedule import noise_schedule
from sdjax.models.layers import Conv, ResBlock, Upsample
from sdjax.models.params import abstract_params, initial_params
from sdjax.models.unet import Transformer, UNet
from sdjax.models.vae import VAE
from sdjax.train.losses import diffusion_loss
from sdjax.train.step import (
    TrainState,
    batch_sharding,
    initial_state,
    jit_step,
    learning_rate,
    make_step,
    optimizer,
    scanned,
    state_sharding,
)
from tests.arrays import normal
from tests.small import MINI, SMALL

KEY = jax.random.key(3)
PARAMS = {
    "dense": {"kernel": normal(0, 6, 4), "bias": normal(1, 4)},
    "norm": {"scale": 1 + 0.1 * normal(2, 4)},
}
BATCHES = {"x": normal(3, 8, 16, 6), "y": normal(4, 8, 16, 4)}
"""Eight batches of 16 rows."""


def batch(i):
    return {name: rows[i] for name, rows in BATCHES.items()}


def fit(params, frozen, batch, key):
    """A loss without randomness, whose gradient is longer than 1 at first and shorter later."""
    y = jnp.tanh(batch["x"] @ params["dense"]["kernel"] + params["dense"]["bias"]) * params["norm"]["scale"]
    loss = jnp.square(y - batch["y"]).mean()
    return loss, {"loss": loss}


def draw(params, frozen, batch, key):
    """`fit`, and what the key gives."""
    loss, metrics = fit(params, frozen, batch, key)
    return loss, metrics | {"draw": jax.random.uniform(key)}


def run(step, state, steps, key=KEY):
    """The states and metrics after each of so many steps."""
    step, states, metrics = jax.jit(step), [], []
    for i in range(steps):
        state, found = step(state, {}, batch(i % 8), key)
        states.append(state)
        metrics.append(found)
    return states, metrics


def assert_close(found, expected, **options):
    jax.tree.map(partial(np.testing.assert_allclose, **options), found, expected)


def assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_learning_rate_rises_holds_and_falls_as_a_cosine():
    rate = learning_rate(0.5, 100, warmup=10, decay=40)
    values = [float(rate(i)) for i in (0, 5, 10, 35, 60, 70, 80, 100)]
    expected = [0, 0.25, 0.5, 0.5, 0.5, 0.25 * (1 + math.cos(math.pi / 4)), 0.25, 0]
    np.testing.assert_allclose(values, expected, atol=1e-7)


@pytest.mark.parametrize(("warmup", "decay", "first", "last"), [(0, 0, 2, 2), (4, 4, 0, 1), (0, 8, 2, 0), (8, 0, 0, 2)])
def test_learning_rate_has_its_corners_where_they_are_put(warmup, decay, first, last):
    rate = learning_rate(2.0, 8, warmup=warmup, decay=decay)
    assert float(rate(0)) == first
    assert float(rate(warmup)) == pytest.approx(2)
    assert float(rate(8 - decay)) == pytest.approx(2)
    end = 8 if (warmup, decay) != (4, 4) else 6
    assert float(rate(end)) == pytest.approx(last, abs=1e-7)


@pytest.mark.parametrize(("warmup", "decay"), [(-1, 0), (0, -1), (60, 41)])
def test_learning_rate_must_fit_into_the_steps(warmup, decay):
    with pytest.raises(ValueError, match=f"warmup {warmup} and decay {decay}.*100 steps"):
        learning_rate(1.0, 100, warmup=warmup, decay=decay)


def torch_steps(rate, steps, weight_decay, clip):
    """The parameters after so many steps of torch's AdamW, and the norms of the gradients."""
    names = {"kernel": ("dense", "kernel"), "bias": ("dense", "bias"), "scale": ("norm", "scale")}
    p = {name: torch.nn.Parameter(torch.tensor(PARAMS[a][b])) for name, (a, b) in names.items()}
    decayed = {"params": [p["kernel"]], "weight_decay": weight_decay}
    update = torch.optim.AdamW([decayed, {"params": [p["bias"], p["scale"]], "weight_decay": 0.0}])
    norms = []
    for i in range(steps):
        x, y = (torch.tensor(rows[i]) for rows in BATCHES.values())
        update.zero_grad()
        (torch.tanh(x @ p["kernel"] + p["bias"]) * p["scale"] - y).square().mean().backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(p.values(), clip)))
        for group in update.param_groups:
            group["lr"] = float(rate(i))
        update.step()
    tree = {part: {} for part, _ in names.values()}
    for name, (a, b) in names.items():
        tree[a][b] = p[name].detach().numpy()
    return tree, norms


def test_adamw_is_torchs_with_clipping_and_without_decay_of_biases_and_scales():
    rate = learning_rate(0.05, 8, warmup=2, decay=3)
    step = make_step(fit, optimizer(rate, weight_decay=0.3, clip=0.7))
    states, metrics = run(step, initial_state(PARAMS, optimizer(rate)), 8)
    expected, norms = torch_steps(rate, 8, 0.3, 0.7)
    assert min(norms) < 0.7 < max(norms)
    np.testing.assert_allclose([m["gradient_norm"] for m in metrics], norms, rtol=1e-5)
    assert_close(states[-1].params, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["adamw", "adafactor"])
def test_weight_decay_shrinks_kernels_alone_by_rate_times_decay(kind):
    params = {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}
    update = optimizer(0.1, kind=kind, weight_decay=0.5)
    zeros = jax.tree.map(jnp.zeros_like, params)
    change, _ = update.update(zeros, update.init(params), params)
    assert_close(change, {"kernel": np.full((4, 4), -0.05), "bias": np.zeros(4)}, rtol=1e-6)


def test_adafactor_learns_and_keeps_less_than_a_copy_of_the_parameters():
    params = {"kernel": normal(5, 256, 256)}

    def size(tree):
        return sum(leaf.size for leaf in jax.tree.leaves(tree))

    def loss(params, frozen, batch, key):
        value = jnp.square(params["kernel"]).mean()
        return value, {"loss": value}

    update = optimizer(0.05, kind="adafactor")
    assert size(update.init(params)) < 0.02 * size(params)
    assert size(optimizer(0.05).init(params)) >= 2 * size(params)
    _, metrics = run(make_step(loss, update), initial_state(params, update), 8)
    assert metrics[-1]["loss"] < 0.7 * metrics[0]["loss"]


def test_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="adamw or adafactor, found 'sgd'"):
        optimizer(0.1, kind="sgd")


def test_accumulated_parts_give_the_step_of_the_whole_batch():
    update = optimizer(0.1)
    whole, metrics = run(make_step(fit, update), initial_state(PARAMS, update), 3)
    parts, metrics_of_parts = run(make_step(fit, update, accumulate=2), initial_state(PARAMS, update), 3)
    assert_close(parts[-1].params, whole[-1].params, rtol=1e-5, atol=1e-6)
    assert_close(metrics_of_parts, metrics, rtol=1e-5)


def test_every_update_and_part_draws_its_own_numbers_and_a_state_draws_the_same_again():
    update = optimizer(0.1)
    states, metrics = run(make_step(draw, update), initial_state(PARAMS, update), 3)
    draws = [float(m["draw"]) for m in metrics]
    assert len(set(draws)) == 3
    _, again = run(make_step(draw, update), states[1], 1)
    assert float(again[0]["draw"]) == draws[2]
    _, parts = run(make_step(draw, update, accumulate=2), states[1], 1)
    own = [jax.random.uniform(jax.random.fold_in(jax.random.fold_in(KEY, 2), i)) for i in range(2)]
    assert own[0] != own[1]
    np.testing.assert_allclose(parts[0]["draw"], np.mean(own), rtol=1e-6)


def test_average_follows_its_formula_from_the_early_ramp_on():
    update = optimizer(0.1)
    states, _ = run(make_step(fit, update, ema=0.5), initial_state(PARAMS, update), 12)
    expected = np.asarray(PARAMS["dense"]["kernel"], np.float64)
    for n, state in enumerate(states):
        decay = min(0.5, (1 + n) / (10 + n))  # 0.1, 0.18, ..., 0.5 from the ninth on
        expected = decay * expected + (1 - decay) * np.asarray(state.params["dense"]["kernel"])
        np.testing.assert_allclose(state.ema["dense"]["kernel"], expected, rtol=1e-5, atol=1e-6)
    assert int(states[-1].step) == 12


def test_bfloat16_is_what_the_loss_sees_and_the_masters_stay_float32():
    seen = []

    def loss(params, frozen, batch, key):
        seen.extend(leaf.dtype for leaf in jax.tree.leaves(params))
        return fit(params, frozen, batch, key)

    update = optimizer(1e-5)
    start = initial_state(jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), PARAMS), update)
    states, metrics = run(make_step(loss, update, dtype="bfloat16"), start, 4)
    assert set(seen) == {jnp.dtype("bfloat16")}
    floats = [leaf for leaf in jax.tree.leaves(states[-1]) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert {leaf.dtype for leaf in floats} == {jnp.dtype("float32")}
    moved = states[-1].params["norm"]["scale"] - start.params["norm"]["scale"]
    assert (jnp.abs(moved) > 0).all()  # 4e-5 at most, which bfloat16 would round away from 1
    assert jnp.abs(moved).max() < 5e-5
    exact, _ = jax.grad(fit, has_aux=True)(start.params, {}, batch(0), KEY)
    np.testing.assert_allclose(metrics[0]["gradient_norm"], optax.tree.norm(exact), rtol=0.02)


def test_scanned_steps_are_the_steps():
    update = optimizer(0.1)
    states, metrics = run(make_step(draw, update), initial_state(PARAMS, update), 8)
    state, stacked = jax.jit(scanned(make_step(draw, update)))(initial_state(PARAMS, update), {}, BATCHES, KEY)
    assert_close(state, states[-1], rtol=1e-5, atol=1e-6)
    assert_close(stacked, jax.tree.map(lambda *values: np.stack(values), *metrics), rtol=1e-5)


def test_state_is_donated_and_its_leaves_share_no_memory():
    update = optimizer(0.1)
    state = initial_state(PARAMS, update)
    jit_step(make_step(fit, update))(state, {}, batch(0), KEY)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert np.isfinite(PARAMS["dense"]["kernel"]).all()  # the caller's own are still there


SCHEDULE = noise_schedule(MINI.schedule)
UNET_BATCH = {"latents": normal(5, 4, 8, 8, 4), "context": normal(6, 4, 6, 16)}


def noise_loss(params, frozen, batch, key, unet):
    def predict(x, t, context):
        return unet.apply({"params": params}, x, t, context)

    return diffusion_loss(predict, SCHEDULE, batch["latents"], batch["context"], key)


@pytest.fixture(scope="module")
def initial():
    return initial_params(MINI, 0, ("vae", "unet"))


@pytest.fixture(scope="module")
def unet_params(initial):
    """Where training starts, with the zeros moved a little, so that every leaf has a gradient."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: leaf + 0.02 * rng.standard_normal(leaf.shape, np.float32), initial["unet"])


def on_devices(params, count=1, shard=False, remat=False):
    """The state after one step of the UNet on so many devices, and its metrics."""
    update = optimizer(1e-2)
    mesh = jax.make_mesh((count,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:count])
    state = initial_state(params, update)
    placement = state_sharding(state, mesh, shard_params=shard)
    loss = partial(noise_loss, unet=UNet(MINI.unet, remat=remat))
    step = jit_step(make_step(loss, update), placement)
    rows = jax.device_put(UNET_BATCH, batch_sharding(mesh))
    return step(jax.device_put(state, placement), {}, rows, KEY)


@pytest.fixture(scope="module")
def on_one(unet_params):
    return jax.device_get(on_devices(unet_params))


def assert_same_step(found, expected):
    """Up to the order of sums. Adam's first moment is a tenth of the clipped gradient."""
    (state, metrics), (one, metrics_of_one) = found, expected
    assert_close(metrics, metrics_of_one, rtol=1e-5)
    moment, moment_of_one = (optax.tree.get(tree.optimizer, "mu") for tree in (state, one))
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(moment_of_one))
    assert_close(moment, moment_of_one, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize(("count", "shard"), [(2, False), (4, True)])
def test_number_of_devices_does_not_change_the_step(count, shard, unet_params, on_one):
    state, metrics = on_devices(unet_params, count, shard)
    assert_same_step((state, metrics), on_one)

    def far(params):  # Adam's first change is the gradient's sign: where that is near 0, it may go either way
        return sum(np.abs(a - b).sum() for a, b in zip(*map(jax.tree.leaves, (params, on_one[0].params)), strict=True))

    assert far(state.params) < 1e-3 * far(unet_params)
    for leaf in jax.tree.leaves(state):
        assert len(leaf.sharding.device_set) == count
        if leaf.size >= 1024:
            assert leaf.addressable_shards[0].data.size == leaf.size // (count if shard else 1)


def test_leaves_are_split_along_their_longest_axis_that_divides():
    mesh = jax.make_mesh((4,), ("data",), (jax.sharding.AxisType.Auto,))
    shapes = {"a": (3, 3, 8, 16), "b": (6, 8), "c": (6,), "d": (), "e": (2, 4)}
    tree = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    found = {name: tuple(s.spec) for name, s in state_sharding(tree, mesh, shard_params=True).items()}
    assert found == {"a": (None, None, None, "data"), "b": (None, "data"), "c": (), "d": (), "e": (None, "data")}
    assert {tuple(s.spec) for s in state_sharding(tree, mesh).values()} == {()}
    assert tuple(batch_sharding(mesh, scanned=True).spec) == (None, "data")


def test_rematerialisation_does_not_change_the_step(unet_params, on_one):
    assert_same_step(on_devices(unet_params, remat=True), on_one)


def test_rematerialisation_keeps_less_for_the_backward_pass():
    """Bytes between the two passes, by shapes alone: what the function that `jax.vjp` returns holds."""
    params = abstract_params(SMALL)["unet"]
    rows = {"latents": normal(7, 4, 16, 16, 4), "context": normal(8, 4, 77, 64)}

    def kept(remat):
        loss = partial(noise_loss, unet=UNet(SMALL.unet, remat=remat))
        backward = jax.eval_shape(lambda p: jax.vjp(lambda q: loss(q, {}, rows, KEY)[0], p)[1], params)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))

    of_params = sum(4 * leaf.size for leaf in jax.tree.leaves(params))
    assert kept(True) - of_params < 0.3 * (kept(False) - of_params)


def test_untrained_unet_predicts_zero_and_each_of_its_blocks_is_the_identity(initial):
    blocks = []

    def check(next_function, args, kwargs, context):
        output = next_function(*args, **kwargs)
        module = context.module
        if context.method_name == "__call__" and isinstance(module, ResBlock | Transformer):
            skips = isinstance(module, ResBlock) and module.skip
            blocks.append(jnp.abs(output - (module.conv_skip(args[0]) if skips else args[0])).max())
        return output

    def apply(params, x):
        blocks.clear()
        with nn.intercept_methods(check):
            output = UNet(MINI.unet).apply({"params": params}, x, jnp.array([5, 900]), normal(7, 2, 6, 16))
        return output, jnp.stack(blocks)

    output, differences = jax.jit(apply)(initial["unet"], normal(8, 2, 8, 8, 4))
    assert output.shape == (2, 8, 8, 4)
    assert (np.asarray(output) == 0).all()
    assert len(differences) == 9  # down 1, middle 2, up 2 residual blocks, and 1, 1, 2 transformers
    assert (np.asarray(differences) == 0).all()


def test_initial_parameters_are_those_of_the_model_and_follow_the_seed(initial):
    expected = {part: abstract_params(MINI)[part] for part in ("vae", "unet")}
    assert jax.tree.map(jnp.shape, initial) == jax.tree.map(jnp.shape, expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(initial)} == {jnp.dtype("float32")}
    vae = initial_params(MINI, 0, ("vae",))
    assert_equal(vae, {"vae": initial["vae"]})  # a part does not depend on what else is asked for
    other = initial_params(MINI, 1, ("vae",))["vae"]
    name = ("encoder", "conv_in", "kernel")
    kernels = [tree[name[0]][name[1]][name[2]] for tree in (initial["vae"], other)]
    assert not np.array_equal(*kernels)
    deep = np.asarray(initial["unet"]["mid"]["res_0"]["conv1"]["kernel"])
    assert np.var(deep) == pytest.approx(1 / np.prod(deep.shape[:-1]), rel=0.2)


def test_state_is_a_tree_of_float32_copies():
    state = initial_state(PARAMS, optimizer(0.1))
    assert isinstance(state, TrainState)
    assert int(state.step) == 0
    assert_equal(state.params, PARAMS)
    assert_equal(state.ema, PARAMS)


def with_gradients(module, params, *inputs, written=True, **options):
    """What a module gives, and its gradients, in programs written for gradients or not."""

    def outputs(params, x):
        return module.apply({"params": params}, x, *inputs[1:], **options)

    with use_gradients(written):
        y, pull = jax.vjp(outputs, params, inputs[0])
        return y, pull(normal(9, *y.shape))


def assert_near(found, expected, bound):
    """Every leaf up to rounding; what is 0 but for rounding, such as a key's bias, has the rounding of the others."""
    pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True))
    largest = max(np.linalg.norm(b) for _, b in pairs)
    for a, b in pairs:
        assert np.linalg.norm(a - b) <= bound * max(np.linalg.norm(b), 0.01 * largest)


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("shape", [(2, 5, 7, 6), (1, 1, 3, 6), (8, 16, 16, 6)])
def test_a_doubled_map_convolved_in_four_phases_is_the_convolution_of_the_doubled_map(shape, wrap):
    module, x = Upsample(4, wrap=wrap), normal(1, *shape)
    params = {"conv": {"kernel": normal(2, 3, 3, 6, 4), "bias": normal(3, 4)}}
    plain = with_gradients(module, params, x, written=False)
    assert_near(with_gradients(module, params, x), plain, 2e-6)
    direct = Conv(4, wrap=wrap).apply({"params": params["conv"]}, x.repeat(2, 1).repeat(2, 2))
    assert_near(plain[0], direct, 2e-6)


def test_a_map_that_is_doubled_and_cropped_is_cropped_in_training_too():
    module, x = Upsample(4), normal(1, 2, 4, 4, 6)
    params = {"conv": {"kernel": normal(2, 3, 3, 6, 4), "bias": normal(3, 4)}}
    found = with_gradients(module, params, x, size=(7, 8))
    assert found[0].shape == (2, 7, 8, 4)
    assert_near(found, with_gradients(module, params, x, written=False, size=(7, 8)), 2e-6)


def test_programs_written_for_gradients_give_the_networks_and_their_gradients(unet_params):
    vae, params, pictures = VAE(TINY.vae), initial_params(TINY, 1, ("vae",))["vae"], normal(0, 2, 32, 32, 3)
    expected = with_gradients(vae, params, pictures, written=False)
    assert_near(with_gradients(vae, params, pictures), expected, 2e-5)
    unet, inputs = (
        UNet(MINI.unet),
        (normal(1, 2, 8, 8, 4), np.array([5, 900]), normal(2, 2, 6, MINI.unet.context_width)),
    )
    expected = with_gradients(unet, unet_params, *inputs, written=False)
    assert_near(with_gradients(unet, unet_params, *inputs), expected, 2e-5)


def test_the_step_is_written_for_gradients_and_nothing_after_it_is():
    seen = []

    def loss(params, frozen, batch, key):
        seen.append(use_gradients.value)
        return params["w"].sum(), {}

    update = optimizer(0.1)
    make_step(loss, update)(initial_state({"w": np.ones(3)}, update), {}, batch(0), KEY)
    assert seen == [True]
    assert not use_gradients.value


KEPT = """
import resource, sys
from sdjax.devices.platform import keep_memory
if sys.argv[1] == "keep":
    assert keep_memory()
import jax, jax.numpy as jnp
run = jax.jit(lambda x: jnp.cumsum(jnp.sort(x)[::-1]).sum())  # 96 MiB of intermediate results
x = jnp.ones(2**23)
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
counts = [faults()]
for _ in range(12):
    run(x).block_until_ready()
    counts.append(faults())
print(min(after - before for before, after in zip(counts[4:], counts[5:])))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_a_process_that_keeps_its_memory_is_given_no_new_pages():
    def pages(how):
        run = subprocess.run([sys.executable, "-c", KEPT, how], capture_output=True, text=True, check=True)
        return int(run.stdout)

    assert pages("keep") < 100 < 10_000 < pages("return")
