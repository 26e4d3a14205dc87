"""The layers against PyTorch's functions, attention against a plain softmax in float64, and what programs hold."""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jax.experimental.pallas import tpu as pltpu

from sdjax.devices import platform as platform_module
from sdjax.devices.platform import use_gradients, use_kernels, use_platform
from sdjax.models import layers
from sdjax.models.layers import (
    ACTIVATIONS,
    CPU_FEW_POSITIONS,
    CPU_LARGE_MAP,
    SCORE_BOUND,
    TRANSFORMED,
    Conv,
    Dense,
    GroupNorm,
    LayerNorm,
    ResBlock,
    Upsample,
    attention,
    tile_rows,
    winograd,
    winograd_kernel,
)
from tests.arrays import equations, largest, normal

HALVES = {"bfloat16": 2.0**-8, "float16": 2.0**-11}  # the relative error of rounding once


def apply(module, params, *inputs):
    return np.asarray(module.apply({"params": params}, *inputs))


def random_tree(module, *inputs):
    """Parameters for a module, every leaf normal."""
    tree = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, [0.3 * normal(i, *leaf.shape) for i, leaf in enumerate(leaves)])


def nchw(x):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def nhwc(x):
    return np.moveaxis(x.numpy(), 1, -1)


def torch_conv(x, params, stride=1, padding=1):
    weight = torch.from_numpy(params["kernel"].transpose(3, 2, 0, 1).copy())
    return F.conv2d(x, weight, torch.from_numpy(params["bias"]), stride, padding)


# Attention


def plain_attention(q, k, v, causal=False, dtype=np.float64):
    """Vaswani et al. 2017, eq. 1."""
    q, k, v = (np.asarray(x, dtype) for x in (q, k, v))
    scores = np.einsum("blnd,bmnd->bnlm", q, k) / np.sqrt(q.shape[-1])
    if causal:
        scores[..., np.triu_indices(q.shape[1], 1)[0], np.triu_indices(q.shape[1], 1)[1]] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bnlm,bmnd->blnd", weights / weights.sum(-1, keepdims=True), v)


def assert_is_attention(found, q, k, v, causal=False):
    """To 2e-5, or to twice what the formula itself loses in float32, where scores of 100 are rounded."""
    expected = plain_attention(q, k, v, causal)
    lost = np.abs(plain_attention(q, k, v, causal, np.float32) - expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=max(2e-5, 2 * lost))


def qkv(queries, keys, heads=2, width=8, batch=2, dtype="float32"):
    shapes = [(batch, queries, heads, width), (batch, keys, heads, width), (batch, keys, heads, width)]
    return [jnp.asarray(4 * normal(i, *shape), dtype) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("platform", ["tpu", "cpu"])
@pytest.mark.parametrize(
    ("queries", "keys"), [(7, 5), (300, 77), (300, 300), (257, 129)], ids=lambda length: str(length)
)
def test_every_kind_of_attention_is_a_plain_softmax(platform, queries, keys, monkeypatch):
    monkeypatch.setattr(layers, "SCORE_BOUND", 4 * keys * 64)  # chunks of 64 queries, the last one not full
    monkeypatch.setattr(layers, "CPU_QUERY_ROWS", 64)
    q, k, v = qkv(queries, keys)
    with use_platform(platform):
        found = attention(q, k, v)
    assert_is_attention(found, q, k, v)


@pytest.mark.parametrize("width", [40, 160])
@pytest.mark.parametrize(("queries", "keys"), [(300, 77), (257, 640), (1024, 1024)], ids=lambda length: str(length))
def test_flash_attention_is_a_plain_softmax_too(queries, keys, width):
    """JAX's kernel for TPUs, interpreted, with everything that has to be padded or masked."""
    q, k, v = qkv(queries, keys, width=width, dtype="bfloat16")

    def kernels(*inputs):
        traced = jax.make_jaxpr(attention)(*inputs)
        return sum(equation.primitive.name == "pallas_call" for equation in equations(traced.jaxpr))

    with use_platform("tpu"), use_kernels(True), pltpu.force_tpu_interpret_mode():
        found = attention(q, k, v)
        assert kernels(q, k, v) == 1
    assert found.dtype == "bfloat16"
    expected = plain_attention(q, k, v)
    assert np.abs(np.asarray(found, np.float64) - expected).max() < 3 * HALVES["bfloat16"] * np.abs(v).max()
    with use_platform("tpu"), use_kernels(True):
        single = [x.astype(np.float32) for x in (q, k, v)]
        assert attention(*single).dtype == np.float32
        assert kernels(*single) == 0, "bfloat16 alone"
    with use_platform("tpu"):
        assert kernels(q, k, v) == 0, "only where they are allowed"


def test_kinds_without_chunks_agree_too():
    q, k, v = qkv(200, 130)
    for platform in ("tpu", "cpu"):
        with use_platform(platform):
            assert_is_attention(attention(q, k, v), q, k, v)


def test_causal_attention_sees_no_later_token():
    q, k, v = qkv(77, 77)
    assert_is_attention(attention(q, k, v, causal=True), q, k, v, causal=True)


@pytest.mark.parametrize("platform", ["tpu", "cpu"])
@pytest.mark.parametrize("dtype", HALVES)
def test_softmax_is_in_float32_whatever_the_dtype(platform, dtype):
    """Half precision may round the weights and the result, one unit each, but not the scores, which reach 100."""
    q, k, v = qkv(200, 200, dtype=dtype)
    q = q * 4
    with use_platform(platform):
        found = attention(q, k, v)
    assert found.dtype == dtype
    expected = plain_attention(q, k, v)
    assert np.abs(np.asarray(found, np.float64) - expected).max() < 3 * HALVES[dtype] * np.abs(v).max()


@pytest.mark.parametrize("platform", ["tpu", "cpu"])
def test_huge_scores_do_not_overflow(platform):
    q, k, v = qkv(200, 200)
    with use_platform(platform):
        assert np.isfinite(attention(1000 * q, 1000 * k, v)).all()


@pytest.mark.parametrize("platform", ["tpu", "cpu"])
@pytest.mark.parametrize(
    ("batch", "length", "heads", "width"),
    [(2, 64 * 64, 8, 40), (16, 64 * 64, 8, 40), (2, 128 * 128, 5, 64), (1, 512 * 512, 1, 16)],
    ids=["512 px", "512 px, 8 guided", "1024 px", "autoencoder, 4096 px"],
)
def test_no_score_matrix_is_larger_than_the_bound(platform, batch, length, heads, width):
    x = jax.ShapeDtypeStruct((batch, length, heads, width), jnp.float32)
    with use_platform(platform):
        assert largest(lambda q, k, v: attention(q, k, v), x, x, x) <= SCORE_BOUND
    assert batch * heads * length**2 > SCORE_BOUND


def test_a_compiled_program_follows_the_platform():
    traces = []

    @jax.jit
    def program(q, k, v):
        traces.append(largest(lambda q, k, v: attention(q, k, v), q, k, v))
        return attention(q, k, v)

    inputs = qkv(200, 200)
    usual = program(*inputs)
    with use_platform("tpu"):
        np.testing.assert_allclose(program(*inputs), usual, atol=2e-5)
    np.testing.assert_array_equal(program(*inputs), usual)
    assert traces == [200 * 200, 4 * 200 * 200]  # one head at a time on a CPU, then all four at once


# Norms


def test_layer_norm_is_pytorchs():
    x, scale, bias = 5 + 3 * normal(0, 2, 7, 48), normal(1, 48), normal(2, 48)
    found = apply(LayerNorm(), dict(scale=scale, bias=bias), x)
    expected = F.layer_norm(torch.from_numpy(x), (48,), torch.from_numpy(scale), torch.from_numpy(bias), 1e-5)
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("epsilon", [1e-5, 1e-2])
def test_group_norm_is_pytorchs(epsilon):
    x, scale, bias = 5 + 3 * normal(0, 2, 5, 3, 48), normal(1, 48), normal(2, 48)
    found = apply(GroupNorm(8, epsilon), dict(scale=scale, bias=bias), x)
    expected = F.group_norm(nchw(x), 8, torch.from_numpy(scale), torch.from_numpy(bias), epsilon)
    np.testing.assert_allclose(found, nhwc(expected), atol=2e-5)


@pytest.mark.parametrize("norm", [LayerNorm(), GroupNorm(4, 1e-5)], ids=["layer", "group"])
@pytest.mark.parametrize("dtype", HALVES)
def test_norms_compute_in_float32_and_round_once(norm, dtype):
    """Values whose squares float16 cannot hold, around a mean that costs half precision most of its digits."""
    x = jnp.asarray(2000 + 300 * normal(0, 2, 6, 6, 32), dtype)
    params = {name: jnp.asarray(1 + 0.1 * normal(i, 32), dtype) for i, name in enumerate(("scale", "bias"))}
    found = norm.apply({"params": params}, x)
    assert found.dtype == dtype
    wide, scale, bias = (np.asarray(value, np.float64) for value in (x, params["scale"], params["bias"]))
    groups = wide if isinstance(norm, LayerNorm) else wide.reshape(2, 36, 4, 8)
    axes = (-1,) if isinstance(norm, LayerNorm) else (1, 3)
    normed = (groups - groups.mean(axes, keepdims=True)) / np.sqrt(groups.var(axes, keepdims=True) + 1e-5)
    expected = normed.reshape(x.shape) * scale + bias
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=1.01 * HALVES[dtype], atol=2e-5)


@pytest.mark.parametrize(("mean", "deviation"), [(0, 1), (30, 1), (200, 1), (2000, 300), (0, 0)])
@pytest.mark.parametrize("shifted", [False, True])
def test_group_norm_in_one_reading_on_gpus_rounds_once_too(mean, deviation, shifted):
    """Beyond 200 deviations bfloat16 could not tell the values from their mean."""
    x = jnp.asarray(mean + deviation * normal(0, 2, 6, 6, 32), jnp.bfloat16)
    params = {name: jnp.asarray(1 + 0.1 * normal(i, 32), jnp.bfloat16) for i, name in enumerate(("scale", "bias"))}
    shift = jnp.asarray(deviation * normal(3, 2, 1, 1, 32), jnp.bfloat16) if shifted else None
    with use_platform("gpu"):
        found = GroupNorm(4, 1e-5).apply({"params": params}, x, shift)
        program = equations(jax.make_jaxpr(GroupNorm(4, 1e-5).apply)({"params": params}, x, shift))
    assert found.dtype == jnp.bfloat16
    assert sum(each.primitive.name == "reduce_sum" and each.invars[0].aval.size == x.size for each in program) == 2
    wide, scale, bias = (np.asarray(value, np.float64) for value in (x, params["scale"], params["bias"]))
    groups = (wide + (np.asarray(shift, np.float64) if shifted else 0)).reshape(2, 36, 4, 8)
    normed = (groups - groups.mean((1, 3), keepdims=True)) / np.sqrt(groups.var((1, 3), keepdims=True) + 1e-5)
    expected = normed.reshape(x.shape) * scale + bias
    lost = (mean / (deviation or 1)) ** 2 * 2.0**-20  # at most, of the variance in float32
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=1.01 * 2.0**-8, atol=2e-5 + lost)


@pytest.mark.parametrize("where", ["cpu", "gpu", "tpu"])
def test_a_norms_shift_is_added_before_it(where):
    x, shift, params = normal(0, 2, 6, 6, 32), normal(1, 2, 1, 1, 32), dict(scale=np.ones(32), bias=np.zeros(32))
    norm, params = GroupNorm(4, 1e-5), {"params": {name: leaf.astype(np.float32) for name, leaf in params.items()}}
    with use_platform(where):
        np.testing.assert_array_equal(norm.apply(params, x, shift), norm.apply(params, x + shift))


@pytest.mark.parametrize("norm", [LayerNorm(), GroupNorm(4, 1e-5)], ids=["layer", "group"])
def test_a_large_mean_costs_the_variance_nothing(norm):
    """Two passes: the mean of the squares less the square of the mean would leave no digit here."""
    x = 10_000 + normal(0, 1, 6, 6, 32)
    params = dict(scale=np.ones(32, np.float32), bias=np.zeros(32, np.float32))
    np.testing.assert_allclose(apply(norm, params, x), apply(norm, params, x - 10_000), atol=5e-3)


# Linear maps, convolutions, activations


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_of_the_parameters_is_the_dtype_of_the_computation(dtype):
    x = normal(0, 1, 4, 4, 8)
    for module in (Dense(6), Conv(6), GroupNorm(4, 1e-5), LayerNorm()):
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), random_tree(module, x))
        cast = x if isinstance(module, Dense | Conv) else x.astype(dtype)  # norms hand back what they were given
        assert module.apply({"params": params}, cast).dtype == dtype


@pytest.mark.parametrize("height", [8, 28], ids=["few positions", "many"])
@pytest.mark.parametrize(
    ("size", "stride", "padding"), [(3, 1, (1, 1)), (3, 2, (1, 1)), (3, 2, (0, 1)), (1, 1, (0, 0))], ids=str
)
def test_convolutions_are_pytorchs(size, stride, padding, height):
    x, params = normal(0, 2, height, 10, 5), dict(kernel=normal(1, size, size, 5, 7), bias=normal(2, 7))
    assert (2 * height * 10 <= CPU_FEW_POSITIONS) == (height == 8)
    expected = torch_conv(F.pad(nchw(x), 2 * padding), params, stride, padding=0)
    np.testing.assert_allclose(apply(Conv(7, size, stride, padding), params, x), nhwc(expected), atol=1e-4)


SHAPES = {  # b, h, w, in, out
    "square": (1, 32, 32, 64, 64),
    "several strips of a few rows": (2, 64, 96, 128, 72),
    "three pictures, wider than high": (3, 10, 48, 96, 64),
    "one row of tiles": (1, 2, 320, 64, 80),
}


def double_precision(x, kernel):
    """PyTorch's convolution in float64, of what is padded already."""
    x, kernel = (torch.from_numpy(np.asarray(value, np.float64)) for value in (x, kernel))
    return F.conv2d(x.permute(0, 3, 1, 2), kernel.permute(3, 2, 0, 1)).permute(0, 2, 3, 1).numpy()


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("beforehand", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_winograds_convolution_is_pytorchs_to_a_few_roundings(shape, beforehand):
    b, h, w, ins, out = shape
    x, kernel = normal(0, b, h + 2, w + 2, ins), normal(1, 3, 3, ins, out)
    found = jax.jit(winograd)(x, kernel, winograd_kernel(kernel) if beforehand else None)
    assert found.shape == (b, h, w, out)
    assert relative(found, double_precision(x, kernel)) < 2e-6


@pytest.mark.parametrize("beforehand", [False, True])
def test_winograds_gradient_is_that_of_a_plain_convolution(beforehand):
    x, kernel = normal(0, 2, 10, 12, 64), normal(1, 3, 3, 64, 64)
    known = winograd_kernel(kernel) if beforehand else None

    def loss(convolve):
        return lambda x, kernel: jnp.sum(jnp.sin(0.05 * convolve(x, kernel)))

    plain = loss(lambda x, kernel: Conv(64, padding=(0, 0), bias=False).by_convolution(x, kernel))
    expected = jax.grad(plain, (0, 1))(x, kernel)
    found = jax.grad(loss(lambda x, kernel: winograd(x, kernel, known)), (0, 1))(x, kernel)
    assert relative(found[0], expected[0]) < 1e-5
    assert relative(found[1], expected[1]) < 1e-5


def names(module, params, x):
    """The jitted functions that applying a module calls."""
    traced = jax.make_jaxpr(lambda x: module.apply({"params": params}, x))(x)
    return {equation.params["name"] for equation in equations(traced.jaxpr) if "name" in equation.params}


@pytest.mark.parametrize(
    ("module", "shape", "where", "expected"),
    [
        (Conv(64), (1, 32, 32, 64), "cpu", True),
        (Conv(64, wrap=True), (1, 32, 32, 64), "cpu", True),
        (Conv(64), (1, 31, 32, 64), "cpu", False),
        (Conv(64, stride=2, padding=(0, 1)), (1, 48, 48, 64), "cpu", False),
        (Conv(64, size=1, padding=(0, 0)), (1, 32, 32, 64), "cpu", False),
        (Conv(16), (1, 32, 32, 64), "cpu", False),
        (Conv(64), (1, 16, 16, 64), "cpu", False),
        (Conv(64), (1, 32, 32, 64), "gpu", False),
        (Conv(64), (1, 32, 32, 64), "tpu", False),
    ],
    ids=["usual", "torus", "odd", "stride", "size 1", "few features", "few positions", "gpu", "tpu"],
)
def test_a_cpu_convolves_large_even_maps_of_many_features_by_winograd(module, shape, where, expected):
    x = normal(0, *shape)
    params = random_tree(module, x)
    with use_platform(where):
        assert ("_by_strips" in names(module, params, x)) == expected
    if where == "cpu":
        with use_gradients(True):
            plain = apply(module, params, x)
            assert "_by_strips" not in names(module, params, x)
        assert relative(apply(module, params, x), plain) < 2e-6


def test_a_kernel_transformed_beforehand_is_taken():
    module, x = Conv(64), normal(0, 1, 32, 32, 64)
    params = random_tree(module, x)
    expected, made = module.apply({"params": params}, x, mutable=[TRANSFORMED])
    np.testing.assert_allclose(made[TRANSFORMED]["kernel"], winograd_kernel(params["kernel"]), rtol=1e-6)
    twice = {TRANSFORMED: {"kernel": 2 * made[TRANSFORMED]["kernel"]}}
    bias = params["bias"]
    np.testing.assert_allclose(
        module.apply({"params": params, **twice}, x) - bias, 2 * (expected - bias), rtol=1e-4, atol=1e-4
    )
    assert TRANSFORMED not in module.init(jax.random.key(0), x)


def test_a_kernel_of_another_shape_is_refused_by_name():
    x = normal(0, 1, 4, 4, 8)
    with pytest.raises(
        ValueError, match=r"kernel has the shape \(3, 3, 8, 4\), the configuration says \(3, 3, 8, 16\)"
    ):
        Conv(16).apply({"params": {"kernel": normal(1, 3, 3, 8, 4), "bias": normal(2, 16)}}, x)


def test_group_norm_of_large_maps_is_pytorchs_too():
    x = 3 + normal(0, 2, 96, 64, 96)
    assert x[0].size >= CPU_LARGE_MAP
    norm = GroupNorm(32, 1e-5)
    params = random_tree(norm, x)
    scale, bias = (torch.from_numpy(np.asarray(params[name])) for name in ("scale", "bias"))
    expected = F.group_norm(torch.from_numpy(np.array(x)).permute(0, 3, 1, 2), 32, scale, bias, 1e-5)
    np.testing.assert_allclose(apply(norm, params, x), expected.permute(0, 2, 3, 1), rtol=1e-4, atol=1e-5)


def test_linear_maps_are_x_times_kernel():
    x, kernel, bias = normal(0, 2, 3, 5), normal(1, 5, 7), normal(2, 7)
    np.testing.assert_allclose(apply(Dense(7), dict(kernel=kernel, bias=bias), x), x @ kernel + bias, rtol=2e-5)
    np.testing.assert_allclose(apply(Dense(7, bias=False), dict(kernel=kernel), x), x @ kernel, rtol=2e-5)


@pytest.mark.parametrize("size", [None, (8, 6), (7, 5)])
def test_upsampling_is_nearest_neighbour_cropped(size):
    x, params = normal(0, 2, 4, 3, 5), dict(kernel=normal(1, 3, 3, 5, 5), bias=normal(2, 5))
    expected = torch_conv(F.interpolate(nchw(x), size=size or (8, 6), mode="nearest"), params)
    np.testing.assert_allclose(apply(Upsample(5), dict(conv=params), x, size), nhwc(expected), atol=1e-4)


def test_activations_are_pytorchs():
    x = np.linspace(-8, 8, 1001, dtype=np.float32)
    np.testing.assert_allclose(ACTIVATIONS["gelu"](x), F.gelu(torch.from_numpy(x)), atol=1e-6)
    np.testing.assert_allclose(ACTIVATIONS["quick_gelu"](x), x / (1 + np.exp(-1.702 * x)), atol=1e-6)


@pytest.mark.parametrize("skip", [False, True])
def test_residual_blocks_are_two_convolutions_of_pytorchs_around_a_residual(skip):
    x, shift, embedding = normal(0, 2, 4, 4, 8), normal(1, 2, 12 if skip else 8), normal(2, 2, 5)
    block = ResBlock(12 if skip else 8, 4, 1e-5, skip=skip, time=True)
    params = random_tree(block, x)
    projection = dict(kernel=normal(3, 5, shift.shape[1]), bias=normal(4, shift.shape[1]))
    found = block.apply({"params": {"time_proj": projection}}, embedding, method="time_shift")
    silu = embedding / (1 + np.exp(-embedding))
    np.testing.assert_allclose(found, silu @ projection["kernel"] + projection["bias"], atol=1e-5)

    def half(y, i):
        norm = [torch.from_numpy(params[f"norm{i}"][name]) for name in ("scale", "bias")]
        return torch_conv(F.silu(F.group_norm(y, 4, *norm, 1e-5)), params[f"conv{i}"])

    y = half(half(nchw(x), 1) + torch.from_numpy(shift)[:, :, None, None], 2)
    residual = torch_conv(nchw(x), params["conv_skip"], padding=0) if skip else nchw(x)
    np.testing.assert_allclose(apply(block, params, x, shift), nhwc(y + residual), atol=1e-4)


def test_time_shifts_may_be_common_to_all_images_or_differ():
    x, shifts = normal(0, 4, 4, 4, 8), normal(1, 2, 8)
    block = ResBlock(8, 4, 1e-5, skip=False, time=True)
    params = random_tree(block, x)
    common, other = apply(block, params, x, shifts[0]), apply(block, params, x, shifts[1])
    np.testing.assert_array_equal(common, apply(block, params, x, shifts[:1]))
    tiled = apply(block, params, x, shifts)  # rows 0, 1, 0, 1
    np.testing.assert_allclose(tiled, np.stack([common[0], other[1], common[2], other[3]]), atol=1e-5)
    assert np.abs(common - other).max() > 0.1


def test_rows_are_repeated_as_a_whole():
    x = jnp.arange(4).reshape(2, 2)
    np.testing.assert_array_equal(tile_rows(x, 6), [[0, 1], [2, 3]] * 3)
    assert tile_rows(x, 2) is x


# bfloat16 on CPUs


@pytest.fixture
def instructions(monkeypatch):
    """Says that the processor has instructions for bfloat16, or none."""

    def say(*names):
        monkeypatch.setattr(platform_module, "bfloat16_instructions", lambda: names)

    return say


@pytest.mark.parametrize(
    ("size", "stride", "padding"), [(3, 1, (1, 1)), (3, 2, (1, 1)), (3, 2, (0, 1)), (1, 1, (0, 0))]
)
@pytest.mark.parametrize("cache", [2**9, 2**23], ids=["rows", "whole"])
def test_convolution_by_products_rounds_once(monkeypatch, instructions, size, stride, padding, cache):
    """Strips of single rows and whole pictures alike: what float32 gives, rounded."""
    instructions("AVX512-BF16")
    monkeypatch.setattr(layers, "CPU_CACHE", cache)
    monkeypatch.setattr(layers, "CPU_FEW_POSITIONS", 0)
    module = Conv(5, size=size, stride=stride, padding=padding, bias=False)
    x = jnp.asarray(normal(0, 2, 12, 10, 6), jnp.bfloat16)
    params = {"kernel": jnp.asarray(normal(1, size, size, 6, 5), jnp.bfloat16)}
    with use_platform("cpu"):
        program = jax.make_jaxpr(lambda p, x: module.apply({"params": p}, x))(params, x)
        found = module.apply({"params": params}, x)
    assert not [e for e in equations(program.jaxpr) if e.primitive.name == "conv_general_dilated"]
    wide = jnp.pad(x.astype(jnp.float32), ((0, 0), padding, padding, (0, 0)))
    kernel = params["kernel"].astype(jnp.float32)
    expected = layers._plain_convolution(wide, kernel, stride)
    assert found.dtype == jnp.bfloat16
    assert found.shape == expected.shape
    np.testing.assert_allclose(found.astype(np.float32), expected, rtol=1.01 * HALVES["bfloat16"], atol=1e-4)


@pytest.mark.parametrize("stride", [1, 2])
def test_the_gradient_of_convolution_by_products_is_that_of_the_convolution(stride):
    x = jnp.asarray(normal(0, 2, 9, 9, 4), jnp.bfloat16)
    kernel = jnp.asarray(normal(1, 3, 3, 4, 6), jnp.bfloat16)
    change = jnp.asarray(normal(2, 2, *(2 * [(9 - 3) // stride + 1]), 6), jnp.bfloat16)
    found = jax.vjp(lambda x, k: layers.convolution_by_products(x, k, stride), x, kernel)[1](change)
    wide = jax.vjp(
        lambda x, k: layers._plain_convolution(x, k, stride), x.astype(jnp.float32), kernel.astype(jnp.float32)
    )[1](change.astype(jnp.float32))
    for one, other in zip(found, wide, strict=True):
        assert one.dtype == jnp.bfloat16
        assert np.abs(one.astype(np.float32) - other).max() < 2 * HALVES["bfloat16"] * np.abs(other).max()


def test_products_in_bfloat16_and_their_gradients_round_once(instructions):
    instructions("AMX")
    a, b, change = (jnp.asarray(normal(i, *shape), jnp.bfloat16) for i, shape in enumerate([(7, 40), (40, 9), (7, 9)]))
    with use_platform("cpu"):
        found, back = jax.vjp(layers.product, a, b)
        found = (found, *back(change))
    a, b, change = (np.asarray(x, np.float64) for x in (a, b, change))
    for one, other in zip(found, (a @ b, change @ b.T, a.T @ change), strict=True):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(one, np.float64), other, rtol=HALVES["bfloat16"], atol=1e-5)


@pytest.mark.parametrize(("names", "products"), [((), 0), (("AVX512-BF16",), 1)], ids=["without", "with"])
def test_bfloat16_convolves_by_products_only_where_the_processor_has_instructions_for_it(instructions, names, products):
    instructions(*names)
    x, kernel = jnp.zeros((1, 32, 32, 4), jnp.bfloat16), jnp.zeros((3, 3, 4, 4), jnp.bfloat16)
    with use_platform("cpu"):
        program = jax.make_jaxpr(lambda x, k: Conv(4, bias=False).apply({"params": {"kernel": k}}, x))(x, kernel)
    found = [e.primitive.name for e in equations(program.jaxpr)]
    assert found.count("dot_general") == products
    assert found.count("conv_general_dilated") == 1 - products


def test_the_processor_s_instructions_are_read_from_its_flags(tmp_path):
    file = tmp_path / "cpuinfo"
    for flags, expected in (
        ("fpu avx512f avx512_bf16 amx_bf16", ("AMX", "AVX512-BF16")),
        ("fpu avx512_bf16", ("AVX512-BF16",)),
        ("fpu avx2 amx_bf16x", ()),
    ):
        file.write_text(f"processor\t: 0\nflags\t\t: {flags}\n\nprocessor\t: 1\nflags\t\t: amx_bf16\n")
        platform_module.bfloat16_instructions.cache_clear()
        assert platform_module.bfloat16_instructions(str(file)) == expected
    assert platform_module.bfloat16_instructions(str(tmp_path / "nothing")) == ()
