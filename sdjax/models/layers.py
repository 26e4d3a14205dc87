"""What two or more of the networks use, and the one home of their numeric conventions.

- The dtype of the parameters is the dtype of the computation: `Dense` and `Conv` cast their input
  to the dtype of their kernel. Cast the parameters (`sdjax.models.params.cast`) and the whole network
  follows.
- Norms and softmax compute in float32 whatever the dtype, and hand back the dtype they were given.
- Layout is NHWC; kernels are HWIO (convolutions) and [in, out] (linear maps).
- Where PyTorch and Flax differ by default, PyTorch's numbers are stated here: norm epsilons,
  exact GELU, padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sdjax.devices.platform import bfloat16_products, platform, use_gradients, use_kernels
from sdjax.types import Array

SCORE_BOUND = 2**26
"""Most attention scores held at once (256 MiB in float32); more are worked through in chunks."""

CPU_QUERY_ROWS = 512
"""Rows of queries per product on a CPU, where one head at a time stays in the cache."""

TPU_LANES = 128
"""What lengths and wide heads are multiples of in the kernel for TPUs."""

TPU_BLOCK = 512
"""Most queries, and keys, that it works on at once."""

CPU_FEW_POSITIONS = 2 * 16 * 16
"""Positions, of all pictures together, up to which a CPU convolves by one matrix product: 2.2 times as fast as XLA's
convolution for a full-size map of 16x16, 5 times for 8x8; slower with more positions. With its gradients the
product takes 1.0 to 1.2 times as long as the convolution with its own, for 128 to 1280 channels."""

CPU_CACHE = 8 * 2**20
"""Bytes of values that `winograd` and `convolution_by_products` work on at once: what a CPU's cores keep in their
cache."""

WINOGRAD_FEATURES = 64
"""Least features, in and out, from which a CPU convolves by `winograd`: with fewer its transforms take longest."""

WINOGRAD_KERNEL = 5
"""Most times that a transformed kernel may be as large as a picture's transformed map: it takes memory."""

CPU_LARGE_MAP = 2**19
"""Values of a picture's map from which a CPU's group norm is written for speed, not for few operations to compile."""

TRANSFORMED = "transformed"
"""The collection of kernels that were transformed beforehand (`Conv`)."""


def gelu(x: Array) -> Array:
    """The exact GELU, x * Phi(x) (Hendrycks & Gimpel 2016, eq. 1)."""
    return jax.nn.gelu(x, approximate=False)


def quick_gelu(x: Array) -> Array:
    """x * sigmoid(1.702 x), as CLIP was trained with (Hendrycks & Gimpel 2016, section 2)."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": nn.silu,
    "gelu": gelu,
    "quick_gelu": quick_gelu,
    "mish": jax.nn.mish,
    "relu": nn.relu,
}


@partial(jax.jit, static_argnums=1)
def fan_in_normal(key: Array, shape: tuple[int, ...]) -> Array:
    """Initial kernels f32[..., in, out]: normal with variance 1 / fan_in (LeCun et al. 1998, section 4.6)."""
    return jax.random.normal(key, shape) * math.prod(shape[:-1]) ** -0.5


def tile_rows(x: Array, rows: int) -> Array:
    """x, f[b, ...], repeated as a whole along the batch to `rows` rows (a multiple of b)."""
    return x if x.shape[0] == rows else jnp.tile(x, (rows // x.shape[0],) + (1,) * (x.ndim - 1))


def over_rows(vector: Array, shape: tuple[int, ...]) -> Array:
    """f[features], broadcast to f[..., features] of that shape.

    Where gradients are taken (`use_gradients`), as if by a product with a column of ones: the gradient is then a
    product, too. On a CPU a sum over rows would be fused with everything that computes the rows, and take longer than
    the layer itself.
    """
    if not use_gradients.value:
        return jnp.broadcast_to(vector, shape)
    ones = jnp.ones((math.prod(shape[:-1]), 1), vector.dtype)
    return jnp.dot(ones, vector[None], precision=lax.Precision.HIGHEST).reshape(shape)


def product(rows: Array, matrix: Array) -> Array:
    """rows f[m, in] times matrix f[in, out] -> f[m, out] in their dtype, summed in float32.

    On CPUs with instructions for bfloat16, a product in it is asked for in float32 and then rounded, in the gradient,
    too: jax 0.10 uses the instructions for such products only (2 to 4 times as fast); jax 0.12 for all.
    """
    return _rounded_product(rows, matrix) if bfloat16_products(rows.dtype) else jnp.dot(rows, matrix)


@jax.custom_vjp
def _rounded_product(rows: Array, matrix: Array) -> Array:
    return jnp.dot(rows, matrix, preferred_element_type=jnp.float32).astype(rows.dtype)


def _rounded_product_forward(rows: Array, matrix: Array) -> tuple[Array, tuple[Array, Array]]:
    return _rounded_product(rows, matrix), (rows, matrix)


def _rounded_product_backward(kept: tuple[Array, Array], change: Array) -> tuple[Array, Array]:
    rows, matrix = kept
    return _rounded_product(change, matrix.T), _rounded_product(rows.T, change)


_rounded_product.defvjp(_rounded_product_forward, _rounded_product_backward)


class Layer(nn.Module):
    """What has parameters of its own."""

    def parameter(self, name: str, initial: Callable[..., Array], shape: tuple[int, ...]) -> Array:
        """The parameter f[*shape] of that name: `param`, but that a known one is not made again to compare shapes,
        which took a third of tracing a network.

        Raises:
            ValueError: the one that was given has another shape.
        """
        if not self.has_variable("params", name):
            return self.param(name, initial, shape)
        value: Array = self.get_variable("params", name)
        if value.shape != shape:
            where = "/".join((*self.path, name))
            raise ValueError(f"parameter {where} has the shape {value.shape}, the configuration says {shape}")
        return value

    def with_bias(self, y: Array) -> Array:
        """y f[..., features] plus the parameter "bias" f[features]."""
        return y + over_rows(self.parameter("bias", nn.initializers.zeros, y.shape[-1:]), y.shape)


class Dense(Layer):
    """A linear map f[..., in] -> f[..., features]."""

    features: int
    bias: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.parameter("kernel", fan_in_normal, (x.shape[-1], self.features))
        rows = x.astype(kernel.dtype).reshape(-1, x.shape[-1])  # the gradient is one product of two matrices
        y = product(rows, kernel).reshape(*x.shape[:-1], self.features)
        return self.with_bias(y) if self.bias else y


class Conv(Layer):
    """f[b, h, w, in] -> f[b, h', w', features]; padding (before, after) on both axes.

    wrap: it is padded with what is at the opposite border, so that the map is a torus; else with zeros. With `doubled`
    the map is first made twice as high and wide, each value four times (size 3, stride 1).

    Where it convolves by `winograd`, it takes the transformed kernel from the collection `TRANSFORMED` if it is there:
    a loop that calls the network many times has it made once. Applied with that collection mutable, it puts it there.
    """

    features: int
    size: int = 3
    stride: int = 1
    padding: tuple[int, int] = (1, 1)
    bias: bool = True
    wrap: bool = False

    @nn.compact
    def __call__(self, x: Array, doubled: bool = False) -> Array:
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.parameter("kernel", fan_in_normal, shape)
        x = x.astype(kernel.dtype)
        simply = platform() == "cpu" and not use_gradients.value
        if doubled:
            y = self.by_phases(x, kernel)
        elif simply and self.stride == 1 and math.prod(x.shape[:3]) <= CPU_FEW_POSITIONS:
            y = self.by_product(x, kernel)
        elif simply and bfloat16_products(x.dtype):
            y = convolution_by_products(self.padded(x), kernel, self.stride)
        elif simply and self.by_winograd(x):
            asked = self.is_mutable_collection(TRANSFORMED) and not self.is_initializing()
            kept = asked or self.has_variable(TRANSFORMED, "kernel")
            made = self.variable(TRANSFORMED, "kernel", winograd_kernel, kernel).value if kept else None
            y = winograd(self.padded(x), kernel, made)
        else:
            y = self.by_convolution(x, kernel)
        return self.with_bias(y) if self.bias else y

    def by_winograd(self, x: Array) -> bool:
        """Whether `winograd` computes this, and pays on a CPU."""
        _, h, w, c = x.shape
        same_size = self.size == 3 and self.stride == 1 and self.padding == (1, 1) and h % 2 == w % 2 == 0
        fits = WINOGRAD_FEATURES <= min(c, self.features) <= WINOGRAD_KERNEL * (h * w // 4)
        return same_size and fits and x.dtype == jnp.float32

    def padded(self, x: Array) -> Array:
        around = ((0, 0), self.padding, self.padding, (0, 0))
        return jnp.pad(x, around, mode="wrap") if self.wrap else jnp.pad(x, around)

    def by_convolution(self, x: Array, kernel: Array) -> Array:
        zeros = (0, 0) if self.wrap else self.padding
        return lax.conv_general_dilated(
            self.padded(x) if self.wrap else x,
            kernel,
            window_strides=(self.stride, self.stride),
            padding=(zeros, zeros),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    def by_product(self, x: Array, kernel: Array) -> Array:
        """The same with stride 1, as one product."""
        rows = _neighbourhoods(self.padded(x), self.size, 1)
        y = product(rows.reshape(-1, rows.shape[-1]), kernel.reshape(-1, self.features))
        return y.reshape(*rows.shape[:-1], self.features)

    def by_phases(self, x: Array, kernel: Array) -> Array:
        """The map doubled, then convolved: four 2x2 convolutions of the map as it was, 16 products instead of 36.

        Of three rows of the doubled map, two are the same row of x: their kernels are added. f[b, h, w, in] ->
        f[b, 2h, 2w, features].
        """
        b, h, w, _ = x.shape
        x = self.padded(x)

        def halved(kernel: Array, phase: int) -> Array:
            first, middle, last = kernel
            return jnp.stack([first, middle + last] if phase == 0 else [first + middle, last])

        def convolved(row: int, column: int) -> Array:
            part = halved(halved(kernel, row).swapaxes(0, 1), column).swapaxes(0, 1)
            seen = x[:, row : row + h + 1, column : column + w + 1]
            return lax.conv_general_dilated(seen, part, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

        rows = [jnp.stack([convolved(row, column) for column in (0, 1)], axis=3) for row in (0, 1)]
        return jnp.stack(rows, axis=2).reshape(b, 2 * h, 2 * w, self.features)


def _neighbourhoods(x: Array, size: int, stride: int) -> Array:
    """x f[b, h, w, c] -> f[b, h', w', size * size * c]: what a kernel sees at every position, in a row."""
    height, width = (length - size + 1 for length in x.shape[1:3])
    columns = jnp.concatenate([x[:, :, j : width + j : stride] for j in range(size)], axis=-1)
    return jnp.concatenate([columns[:, i : height + i : stride] for i in range(size)], axis=-1)


def _largest_divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is at most `most`; 1 if that is less than 1."""
    return next(divisor for divisor in range(max(1, min(number, most)), 0, -1) if number % divisor == 0)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolution_by_products(x: Array, kernel: Array, stride: int = 1) -> Array:
    """Convolution as products of matrices, every position's neighbourhood in a row, with one rounding of the result.

    x bf16[b, h, w, in], padded already; kernel bf16[k, k, in, out] -> bf16[b, h', w', out].

    XLA's own convolution computes bfloat16 in float32 on a CPU; products use the instructions for bfloat16, where there
    are any. Rows, 9 times as many values as the picture has, are made for one strip of it after the other: as many as
    stay in the cache, but no fewer than the kernel has, which is read anew for each. The gradient is that of a plain
    convolution.
    """
    b, height, width, c = x.shape
    size, features = kernel.shape[0], kernel.shape[-1]
    h, w = ((length - size) // stride + 1 for length in (height, width))
    most = max(CPU_CACHE, kernel.size * kernel.dtype.itemsize)
    rows = _largest_divisor(h, most // (w * size * size * c * x.dtype.itemsize))

    def strip(i: Array) -> Array:
        start = (i // (h // rows), i % (h // rows) * rows * stride, 0, 0)
        part = lax.dynamic_slice(x, start, (1, (rows - 1) * stride + size, width, c))
        return product(_neighbourhoods(part, size, stride).reshape(rows * w, -1), kernel.reshape(-1, features))

    return lax.map(strip, jnp.arange(b * h // rows)).reshape(b, h, w, features)


def _by_products_forward(x: Array, kernel: Array, stride: int) -> tuple[Array, tuple[Array, Array]]:
    return convolution_by_products(x, kernel, stride), (x, kernel)


def _by_products_backward(stride: int, kept: tuple[Array, Array], change: Array) -> tuple[Array, ...]:
    return jax.vjp(partial(_plain_convolution, stride=stride), *kept)[1](change)


convolution_by_products.defvjp(_by_products_forward, _by_products_backward)


@jax.custom_vjp
def winograd(x: Array, kernel: Array, transformed: Array | None = None) -> Array:
    """Convolution with 3x3 kernels in 2.25 times fewer multiplications (Lavin & Gray 2016, section 4.1, F(2x2, 3x3)).

    x f32[b, h + 2, w + 2, in], padded already, with h and w even; kernel f32[3, 3, in, out] -> f32[b, h, w, out].
    transformed: f32[16, in, out], `winograd_kernel` of the kernel, if it was made beforehand.

    Every 2x2 outputs are a tile: its 4x4 inputs and the kernel are transformed to 16 values each, whose products are
    transformed back. For all tiles that is 16 products of matrices [tiles, in] and [in, out], at which CPUs are as good
    as at anything. It pays only while transformed values stay in the cache: strips of rows are done one after the
    other. Costs about twice the rounding error of a plain convolution (1e-6 of the result), and 16/9 of the kernel's
    memory for the transformed one. The gradient is that of a plain convolution.
    """
    return _by_strips(x, kernel, transformed)


@jax.jit
def _by_strips(x: Array, kernel: Array, transformed: Array | None) -> Array:
    """`winograd`; a function of its own so that it is traced once for all convolutions of a shape."""
    b, h, w, c = x.shape[0], x.shape[1] - 2, x.shape[2] - 2, x.shape[3]
    features, tile = kernel.shape[-1], 16 * x.dtype.itemsize * max(c, kernel.shape[-1])  # in bytes, transformed
    if transformed is None:
        x, kernel = lax.optimization_barrier((x, kernel))  # else all of a network's kernels would be transformed first
        transformed = winograd_kernel(kernel)
    rows = 2 * _largest_divisor(h // 2, CPU_CACHE // (tile * (w // 2)))

    def strip(i: Array, y: Array) -> Array:
        start = (i // (h // rows), i % (h // rows) * rows, 0, 0)
        inputs = _winograd_inputs(lax.dynamic_slice(x, start, (1, rows + 2, w + 2, c)))
        return lax.dynamic_update_slice(y, _winograd_outputs(inputs, transformed, rows, w)[None], start)

    # What it begins with is overwritten; were it zeros, all layers' would be made, and kept, from the beginning.
    begin = jnp.broadcast_to(x[0, 0, 0, 0], (b, h, w, features))
    return lax.fori_loop(0, b * h // rows, strip, begin)


def _plain_convolution(x: Array, kernel: Array, stride: int = 1) -> Array:
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (stride, stride), "VALID", dimension_numbers=layout)


def _winograd_forward(x: Array, kernel: Array, transformed: Array | None) -> tuple[Array, tuple[Any, ...]]:
    return _by_strips(x, kernel, transformed), (x, kernel, transformed)


def _winograd_backward(kept: tuple[Any, ...], change: Array) -> tuple[Any, ...]:
    x, kernel, transformed = kept
    return *jax.vjp(_plain_convolution, x, kernel)[1](change), jax.tree.map(jnp.zeros_like, transformed)


winograd.defvjp(_winograd_forward, _winograd_backward)


def winograd_kernel(kernel: Array) -> Array:
    """G g G^T of every 3x3 kernel g: f[3, 3, in, out] -> f[16, in, out], as one product."""
    each = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], kernel.dtype)
    values = jnp.dot(np.kron(each, each), kernel.reshape(9, -1), precision=lax.Precision.HIGHEST)
    return values.reshape(16, *kernel.shape[2:])


def _winograd_inputs(x: Array) -> Array:
    """B^T d B of every tile d: x f[1, h + 2, w + 2, c] -> f[16, h/2 * w/2, c]."""

    def transform(first: Array, second: Array, third: Array, fourth: Array) -> list[Array]:
        return [first - third, second + third, third - second, second - fourth]

    _, height, width, c = x.shape
    rows = jnp.stack(transform(*(x[:, i : height - 3 + i : 2] for i in range(4))))
    both = jnp.stack(transform(*(rows[:, :, :, j : width - 3 + j : 2] for j in range(4))), axis=1)
    return both.reshape(16, -1, c)


def _winograd_outputs(inputs: Array, kernel: Array, h: int, w: int) -> Array:
    """A^T m A of the products m of inputs f[16, h/2 * w/2, in] and kernel f[16, in, out] -> f[h, w, out]."""

    def transform(first: Array, second: Array, third: Array, fourth: Array) -> list[Array]:
        return [first + second + third, second - third - fourth]

    products = lax.dot_general(inputs, kernel, (((2,), (1,)), ((0,), (0,)))).reshape(4, 4, h // 2, w // 2, -1)
    columns = jnp.stack(transform(*products.swapaxes(0, 1)))  # [2, 4, h/2, w/2, out]
    both = jnp.stack(transform(*columns.swapaxes(0, 1)))  # [2, 2, h/2, w/2, out]
    return both.transpose(2, 0, 3, 1, 4).reshape(h, w, -1)


def _scaled(y: Array, scale: Array, bias: Array) -> Array:
    """What follows every normalisation: y f32[..., c] times scale f[c] plus bias f[c], in float32."""
    return y * over_rows(scale.astype(y.dtype), y.shape) + over_rows(bias.astype(y.dtype), y.shape)


class LayerNorm(Layer):
    """Layer normalisation over the last axis, in float32 (Ba et al. 2016)."""

    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.parameter("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.parameter("bias", nn.initializers.zeros, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
        return _scaled(y, scale, bias).astype(x.dtype)


class GroupNorm(Layer):
    """Group normalisation of f[b, h, w, c] in float32, two-pass variance (Wu & He 2018).

    shift: f[b, 1, 1, c], added to x before; None: nothing. In bfloat16 on GPUs both sums are taken in one reading of x
    (`by_moments`).
    """

    groups: int
    epsilon: float

    @nn.compact
    def __call__(self, x: Array, shift: Array | None = None) -> Array:
        scale = self.parameter("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.parameter("bias", nn.initializers.zeros, (x.shape[-1],))
        if platform() == "gpu" and x.dtype == jnp.bfloat16:
            return self.by_moments(x, shift, scale, bias)
        x = x if shift is None else x + shift
        y = x.astype(jnp.float32)
        if platform() == "cpu" and math.prod(x.shape[1:]) >= CPU_LARGE_MAP:
            y = y - self.mean(y)
            y = y * lax.rsqrt(self.mean(jnp.square(y)) + self.epsilon)
        else:
            y = y.reshape(x.shape[0], -1, self.groups, x.shape[-1] // self.groups)
            y = y - y.mean((1, 3), keepdims=True)
            y = y * lax.rsqrt(jnp.square(y).mean((1, 3), keepdims=True) + self.epsilon)
        return _scaled(y.reshape(x.shape), scale, bias).astype(x.dtype)

    def mean(self, y: Array) -> Array:
        """The mean of every group of y f32[b, h, w, c], at each of its channels: f32[b, 1, 1, c].

        The channels' means are put together by products with the matrix of which channel is in which group: on a CPU
        what else does it would be fused with, and repeated for, every position, and take 3 times as long as the norm.
        """
        b, c, size = y.shape[0], y.shape[-1], y.shape[-1] // self.groups
        member = jnp.repeat(jnp.eye(self.groups, dtype=y.dtype), size, axis=0)  # [c, groups]
        dot = partial(jnp.dot, precision=lax.Precision.HIGHEST)
        return dot(dot(y.mean(2).mean(1), member / size), member.T).reshape(b, 1, 1, c)

    def by_moments(self, x: Array, shift: Array | None, scale: Array, bias: Array) -> Array:
        """The same from the means of x and x^2 of every channel, to which the shift is added afterwards.

        x is read twice and written once; two-pass, XLA's GPU compiler reads it three times, stores differences from the
        mean in float32 where rows are few, and x + shift beside x (`examples/benchmarks/gpu_compile.py`). The variance
        E[x^2] - E[x]^2 loses (mean / deviation)^2 * 2^-24 of itself in float32. In bfloat16 x has lost more: a
        deviation of mean / 256 is its last bit.
        """
        scale, bias = scale.astype(jnp.float32), bias.astype(jnp.float32)
        y = x.astype(jnp.float32)
        first, second = y.mean((1, 2)), jnp.square(y).mean((1, 2))  # [b, c]
        moved = jnp.zeros_like(first) if shift is None else shift[:, 0, 0].astype(jnp.float32)
        second += moved * (2 * first + moved)
        first += moved

        def grouped(channels: Array) -> Array:
            return channels.reshape(x.shape[0], self.groups, -1)

        mean = grouped(first).mean(-1, keepdims=True)
        variance = jnp.maximum(grouped(second).mean(-1, keepdims=True) - jnp.square(mean), 0)
        factor = (lax.rsqrt(variance + self.epsilon) * scale.reshape(self.groups, -1)).reshape(first.shape)
        offset = (grouped(moved) - mean).reshape(first.shape) * factor + bias
        return (y * factor[:, None, None] + offset[:, None, None]).astype(x.dtype)


class ResBlock(nn.Module):
    """Two 3x3 convolutions around a residual; with `time`, the time embedding shifts the middle (He
    et al. 2016).

    `shift` is the projected embedding, f[features] or f[b or 1, features]: `time_shift` computes
    it, apart from the block itself, so that a sampler can do it for all of its steps at once. With `scales` it is
    twice as wide, and scales and shifts what the second norm gives (Dhariwal & Nichol 2021, section 3.2).
    """

    features: int
    groups: int
    epsilon: float
    skip: bool  # in and out channels differ
    time: bool = False
    activation: str = "silu"
    scales: bool = False
    divisor: float = 1.0  # of the result
    wrap: bool = False  # as `Conv`

    def setup(self) -> None:
        self.norm1 = GroupNorm(self.groups, self.epsilon)
        self.conv1 = Conv(self.features, wrap=self.wrap)
        self.norm2 = GroupNorm(self.groups, self.epsilon)
        self.conv2 = Conv(self.features, wrap=self.wrap)
        if self.time:
            self.time_proj = Dense((1 + self.scales) * self.features)
        if self.skip:
            self.conv_skip = Conv(self.features, size=1, padding=(0, 0))

    def time_shift(self, embedding: Array) -> Array:
        return self.time_proj(ACTIVATIONS[self.activation](embedding))

    def __call__(self, x: Array, shift: Array | None = None) -> Array:
        activation = ACTIVATIONS[self.activation]
        h = self.conv1(activation(self.norm1(x)))
        if shift is not None:
            shift = tile_rows(jnp.atleast_2d(shift), h.shape[0])[:, None, None, :]
        h = self.norm2(h, None if self.scales else shift)
        if shift is not None and self.scales:
            scale, shift = jnp.split(shift, 2, axis=-1)
            h = h * (1 + scale) + shift
        h = self.conv2(activation(h)) + (self.conv_skip(x) if self.skip else x)
        return h if self.divisor == 1 else h / self.divisor


class Upsample(nn.Module):
    """Nearest-neighbour x2, or to `size` (height, width) if given, then a 3x3 convolution.

    A size smaller than twice the input's crops: for sizes that halve upwards, that is the nearest neighbour.
    """

    features: int
    wrap: bool = False  # as `Conv`

    def setup(self) -> None:
        self.conv = Conv(self.features, wrap=self.wrap)

    def __call__(self, x: Array, size: tuple[int, ...] | None = None) -> Array:
        b, h, w, c = x.shape
        if use_gradients.value and platform() == "cpu" and size in (None, (2 * h, 2 * w)):
            return self.conv(x, doubled=True)
        x = jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c))
        x = x.reshape(b, 2 * h, 2 * w, c)
        if size is not None and (size[0] > 2 * h or size[1] > 2 * w):  # from sizes that halve downwards
            x = x[:, 2 * (jnp.arange(size[0]) * h // size[0])][:, :, 2 * (jnp.arange(size[1]) * w // size[1])]
        return self.conv(x if size is None else x[:, : size[0], : size[1]])


def attention(q: Array, k: Array, v: Array, keys: Array | None = None, *, causal: bool = False) -> Array:
    """softmax(q k^T / sqrt(d)) v per head, softmax in float32 (Vaswani et al. 2017, eq. 1).

    q f[b, l, n, d], k and v f[b, m, n, d] -> f[b, l, n, d]. keys: bool[b, m], those that are attended to, the first
    ones of each row unless `causal`; None: all. Never holds more than SCORE_BOUND
    scores. On NVIDIA GPUs in 16 bit the fused cuDNN kernel is used where it takes the head size; on TPUs in bfloat16
    JAX's flash attention where kernels are allowed (`sdjax.devices.platform`); on CPUs one head at a time.
    """
    small = q.shape[1] * k.shape[1] <= 128 * 128
    if causal or small:
        return _scores_attention(q, k, v, keys, causal=causal)
    if platform() == "gpu" and q.dtype.itemsize == 2 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256:
        lengths = None if keys is None else keys.sum(1, dtype=jnp.int32)
        return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, implementation="cudnn")
    if platform() == "tpu" and use_kernels.value and q.dtype == jnp.bfloat16:
        return _flash_attention(q, k, v, keys)
    return _per_head_attention(q, k, v, keys) if platform() == "cpu" else _chunked_attention(q, k, v, keys)


def _scores_attention(q: Array, k: Array, v: Array, keys: Array | None = None, *, causal: bool = False) -> Array:
    """Attention that holds every score at once."""
    scores = jnp.einsum("blnd,bmnd->bnlm", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if causal:
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf)
    if keys is not None:
        scores = jnp.where(keys[:, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bnlm,bmnd->blnd", weights, v)


def _flash_attention(q: Array, k: Array, v: Array, counted: Array | None = None) -> Array:
    """Attention by JAX's kernel for TPUs, which holds no scores outside of the chip (Dao et al. 2022).

    It takes lengths in blocks, and heads of up to 128 or multiples of that: the rest is padded with zeros, and the
    keys that are none are masked.
    """
    from jax.experimental.pallas.ops.tpu.flash_attention import BlockSizes, SegmentIds, flash_attention

    b, length, _, d = q.shape
    keys, wider = k.shape[1], -d % TPU_LANES if d > TPU_LANES else 0

    def padded(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % TPU_LANES), (0, 0), (0, wider))).swapaxes(1, 2)

    q, k, v = padded(q), padded(k), padded(v)
    block_q, block_k = (math.gcd(x.shape[2], TPU_BLOCK) for x in (q, k))
    is_key = jnp.broadcast_to(jnp.arange(k.shape[2]) < keys, (b, k.shape[2]))
    if counted is not None:
        is_key &= jnp.pad(counted, ((0, 0), (0, k.shape[2] - keys)))
    masked = SegmentIds(jnp.ones((b, q.shape[2]), jnp.int32), is_key.astype(jnp.int32))
    out = flash_attention(
        q,
        k,
        v,
        segment_ids=masked if keys < k.shape[2] or counted is not None else None,
        sm_scale=d**-0.5,
        block_sizes=BlockSizes(block_q=block_q, block_k_major=block_k, block_k=block_k, block_b=1),
    )
    return out.swapaxes(1, 2)[:, :length, :, :d]


def _split_queries(q: Array, rows: int) -> Array:
    """q f[l, ...] -> f[chunks, rows, ...], zero rows appended where they do not divide."""
    chunks = -(-q.shape[0] // rows)
    padded = jnp.pad(q, ((0, chunks * rows - q.shape[0]),) + ((0, 0),) * (q.ndim - 1))
    return padded.reshape(chunks, rows, *q.shape[1:])


def _chunked_attention(q: Array, k: Array, v: Array, keys: Array | None = None) -> Array:
    """Attention by chunks of queries, all heads together."""
    b, length, n, d = q.shape
    rows = max(1, SCORE_BOUND // (b * n * k.shape[1]))
    if rows >= length:
        return _scores_attention(q, k, v, keys)
    chunks = _split_queries(q.swapaxes(0, 1), rows)  # [chunks, rows, b, n, d]
    out = lax.map(lambda part: _scores_attention(part.swapaxes(0, 1), k, v, keys), chunks)  # [chunks, b, rows, n, d]
    return out.swapaxes(0, 1).reshape(b, -1, n, d)[:, :length]


@jax.jit
def _per_head_attention(q: Array, k: Array, v: Array, keys: Array | None = None) -> Array:
    """Attention by plain matrix products, one head and `CPU_QUERY_ROWS` queries at a time.

    The keys are transposed once, before the loop. The division by the row sums comes after the second product: fewer
    values to divide, and no pass over the scores.
    """
    b, length, n, d = q.shape
    scale = d**-0.5
    rows_at_once = max(1, min(CPU_QUERY_ROWS, SCORE_BOUND // k.shape[1]))

    def heads_first(x: Array) -> Array:
        return x.swapaxes(1, 2).reshape(b * n, x.shape[1], d)

    def one_head(head: tuple[Array, Array, Array, Array | None]) -> Array:
        q, transposed, v, keys = head

        def some_rows(rows: Array) -> Array:
            scores = jnp.dot(rows, transposed, preferred_element_type=jnp.float32) * scale
            if keys is not None:
                scores = jnp.where(keys, scores, -jnp.inf)
            weights = jnp.exp(scores - scores.max(-1, keepdims=True))
            mixed = jnp.dot(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
            return (mixed / weights.sum(-1, keepdims=True)).astype(v.dtype)

        if length <= rows_at_once:
            return some_rows(q)
        return lax.map(some_rows, _split_queries(q, rows_at_once)).reshape(-1, d)[:length]

    own = None if keys is None else jnp.repeat(keys, n, axis=0)
    transposed = k.transpose(0, 2, 3, 1).reshape(b * n, d, k.shape[1])
    out = lax.map(one_head, (heads_first(q), transposed, heads_first(v), own))
    return out.reshape(b, n, length, d).swapaxes(1, 2)
