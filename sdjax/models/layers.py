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

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from sdjax.devices.platform import platform, use_gradients, use_kernels
from sdjax.types import Array

SCORE_BOUND = 2**26
"""Most attention scores held at once (256 MiB in float32); more are worked through in chunks."""

CPU_QUERY_ROWS = 1024
"""Rows of queries per product on a CPU, where one head at a time stays in the cache."""

TPU_LANES = 128
"""What lengths and wide heads are multiples of in the kernel for TPUs."""

TPU_BLOCK = 512
"""Most queries, and keys, that it works on at once."""

CPU_FEW_POSITIONS = 2 * 16 * 16
"""Positions, of all pictures together, up to which a CPU convolves by one matrix product: 1.2 times as fast for two
full-size maps of 16x16, 2.6 times for 8x8; slower with more positions. With its gradients the product takes 1.0 to 1.2
times as long as the convolution with its own, for 128 to 1280 channels."""


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
    """f[features], broadcast to f[..., features] of that shape, as if by a product with a column of ones.

    The gradient is then a product, too: on a CPU a sum over rows would be fused with everything that computes the rows,
    and take longer than the layer itself.
    """
    ones = jnp.ones((math.prod(shape[:-1]), 1), vector.dtype)
    return jnp.dot(ones, vector[None], precision=lax.Precision.HIGHEST).reshape(shape)


class Dense(nn.Module):
    """A linear map f[..., in] -> f[..., features]."""

    features: int
    bias: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", fan_in_normal, (x.shape[-1], self.features))
        rows = x.astype(kernel.dtype).reshape(-1, x.shape[-1])  # the gradient is one product of two matrices
        y = jnp.dot(rows, kernel).reshape(*x.shape[:-1], self.features)
        return y + over_rows(self.param("bias", nn.initializers.zeros, (self.features,)), y.shape) if self.bias else y


class Conv(nn.Module):
    """f[b, h, w, in] -> f[b, h', w', features]; padding (before, after) on both axes.

    wrap: it is padded with what is at the opposite border, so that the map is a torus; else with zeros. With `doubled`
    the map is first made twice as high and wide, each value four times (size 3, stride 1).
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
        kernel = self.param("kernel", fan_in_normal, shape)
        x = x.astype(kernel.dtype)
        few = self.stride == 1 and math.prod(x.shape[:3]) <= CPU_FEW_POSITIONS
        if doubled:
            y = self.by_phases(x, kernel)
        elif few and platform() == "cpu" and not use_gradients.value:
            y = self.by_product(x, kernel)
        else:
            y = self.by_convolution(x, kernel)
        return y + over_rows(self.param("bias", nn.initializers.zeros, (self.features,)), y.shape) if self.bias else y

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
        """The same with stride 1: every position's neighbourhood in a row, times the kernel as a matrix."""
        x = self.padded(x)
        h, w = (length - self.size + 1 for length in x.shape[1:3])
        rows = [x[:, i : i + h, j : j + w] for i in range(self.size) for j in range(self.size)]
        return jnp.dot(jnp.concatenate(rows, axis=-1), kernel.reshape(-1, self.features))

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


def _scaled(y: Array, scale: Array, bias: Array) -> Array:
    """What follows every normalisation: y f32[..., c] times scale f[c] plus bias f[c], in float32."""
    return y * over_rows(scale.astype(y.dtype), y.shape) + over_rows(bias.astype(y.dtype), y.shape)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, in float32 (Ba et al. 2016)."""

    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
        return _scaled(y, scale, bias).astype(x.dtype)


class GroupNorm(nn.Module):
    """Group normalisation of f[b, h, w, c] in float32, two-pass variance (Wu & He 2018)."""

    groups: int
    epsilon: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        y = x.astype(jnp.float32).reshape(x.shape[0], -1, self.groups, x.shape[-1] // self.groups)
        y = y - y.mean((1, 3), keepdims=True)
        y = y * lax.rsqrt(jnp.square(y).mean((1, 3), keepdims=True) + self.epsilon)
        return _scaled(y.reshape(x.shape), scale, bias).astype(x.dtype)


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
        if shift is None or self.scales:
            h = self.norm2(h)
        else:
            h = self.norm2(h + shift)
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


def _per_head_attention(q: Array, k: Array, v: Array, keys: Array | None = None) -> Array:
    """Attention by plain matrix products, one head and `CPU_QUERY_ROWS` queries at a time.

    The division by the row sums comes after the second product: fewer values to divide, and no pass
    over the scores.
    """
    b, length, n, d = q.shape
    scale = d**-0.5
    rows_at_once = max(1, min(CPU_QUERY_ROWS, SCORE_BOUND // k.shape[1]))

    def heads_first(x: Array) -> Array:
        return x.swapaxes(1, 2).reshape(b * n, x.shape[1], d)

    def one_head(head: tuple[Array, Array, Array, Array | None]) -> Array:
        q, k, v, keys = head

        def some_rows(rows: Array) -> Array:
            scores = jnp.dot(rows, k.T, preferred_element_type=jnp.float32) * scale
            if keys is not None:
                scores = jnp.where(keys, scores, -jnp.inf)
            weights = jnp.exp(scores - scores.max(-1, keepdims=True))
            mixed = jnp.dot(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
            return (mixed / weights.sum(-1, keepdims=True)).astype(v.dtype)

        if length <= rows_at_once:
            return some_rows(q)
        return lax.map(some_rows, _split_queries(q, rows_at_once)).reshape(-1, d)[:length]

    own = None if keys is None else jnp.repeat(keys, n, axis=0)
    out = lax.map(one_head, (heads_first(q), heads_first(k), heads_first(v), own))
    return out.reshape(b, n, length, d).swapaxes(1, 2)
