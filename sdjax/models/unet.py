"""The denoising UNet with cross-attention (Rombach et al. 2022, section 3.3; Ho et al. 2020,
appendix B).

`UNet(config).apply({"params": p}, x, t, context)` is the network as the papers write it. A sampler
calls the same three parts apart, so that nothing is computed twice: `time_table(t)` for all of its
steps at once, `text_kv(context)` once per prompt, and `predict(x, time, kv)` in the loop.

Fewer latents than prompts: `predict` takes x f[b, ...] with keys and values of k*b rows, and
repeats x where the text first enters (row i of x meets rows i, i+b, ...). Everything before that
point is common to the rows, so classifier-free guidance pays for it once.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from sdjax.config import UNetConfig
from sdjax.models.layers import (
    Conv,
    Dense,
    GroupNorm,
    LayerNorm,
    ResBlock,
    Upsample,
    attention,
    gelu,
    tile_rows,
)
from sdjax.types import Array

RES_EPSILON = 1e-5
TRANSFORMER_EPSILON = 1e-6


def timestep_embedding(t: Array, width: int) -> Array:
    """t f|i32[...] -> f32[..., width], cosines then sines (Vaswani et al. 2017, section 3.5).

    The angles are t * 10000^(-i / (width / 2)) for i in [0, width / 2).
    """
    half = width // 2
    frequencies = jnp.exp(-jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.asarray(t, jnp.float32)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class Attention(nn.Module):
    """Multi-head attention of x f[b, l, d] to keys and values that `kv` projected beforehand."""

    width: int
    heads: int

    def setup(self) -> None:
        self.q = Dense(self.width, bias=False)
        self.k = Dense(self.width, bias=False)
        self.v = Dense(self.width, bias=False)
        self.out = Dense(self.width)

    def split(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], self.heads, -1)

    def kv(self, context: Array) -> tuple[Array, Array]:
        """context f[b, l, d] -> keys and values, each f[b, l, n, d/n]."""
        return self.split(self.k(context)), self.split(self.v(context))

    def __call__(self, x: Array, kv: tuple[Array, Array]) -> Array:
        return self.out(attention(self.split(self.q(x)), *kv).reshape(x.shape))


class TransformerLayer(nn.Module):
    """Self-attention, cross-attention to the text, gated feed-forward, each around a residual."""

    width: int
    heads: int

    def setup(self) -> None:
        self.norm1 = LayerNorm()
        self.self_attention = Attention(self.width, self.heads)
        self.norm2 = LayerNorm()
        self.cross_attention = Attention(self.width, self.heads)
        self.norm3 = LayerNorm()
        self.ff_in = Dense(8 * self.width)
        self.ff_out = Dense(self.width)

    def __call__(self, x: Array, text_kv: tuple[Array, Array]) -> Array:
        y = self.norm1(x)
        x = x + self.self_attention(y, self.self_attention.kv(y))
        x = tile_rows(x, text_kv[0].shape[0])
        x = x + self.cross_attention(self.norm2(x), text_kv)
        value, gate = jnp.split(self.ff_in(self.norm3(x)), 2, axis=-1)  # GEGLU (Shazeer 2020)
        return x + self.ff_out(value * gelu(gate))


class Transformer(nn.Module):
    """Transformer layers over the h*w positions of a feature map, around a residual."""

    width: int
    heads: int
    layers: int
    groups: int

    def setup(self) -> None:
        self.norm = GroupNorm(self.groups, TRANSFORMER_EPSILON)
        self.proj_in = Dense(self.width)
        self.layer = [TransformerLayer(self.width, self.heads) for _ in range(self.layers)]
        self.proj_out = Dense(self.width)

    def text_kv(self, context: Array) -> list[tuple[Array, Array]]:
        return [layer.cross_attention.kv(context) for layer in self.layer]

    def __call__(self, x: Array, text_kv: list[tuple[Array, Array]]) -> Array:
        b, h, w, c = x.shape
        y = self.proj_in(self.norm(x).reshape(b, h * w, c))
        for layer, kv in zip(self.layer, text_kv, strict=True):
            y = layer(y, kv)
        y = self.proj_out(y).reshape(-1, h, w, c)
        return tile_rows(x, y.shape[0]) + y


def _blocks(remat: bool) -> tuple[Any, Any]:
    """ResBlock and Transformer; with `remat`, such that the backward pass recomputes what is inside them."""
    return (nn.remat(ResBlock), nn.remat(Transformer)) if remat else (ResBlock, Transformer)


class Level(nn.Module):
    """Residual blocks at one resolution, each with a transformer behind it where the level has
    them, then a change of resolution.
    """

    config: UNetConfig
    in_features: tuple[int, ...]  # of every residual block, skip connection included
    features: int
    heads: int
    attends: bool
    resample: str | None  # "down", "up" or None
    remat: bool = False

    def setup(self) -> None:
        groups = self.config.groups
        res_block, transformer = _blocks(self.remat)
        self.res = [
            res_block(self.features, groups, RES_EPSILON, skip=before != self.features, time=True)
            for before in self.in_features
        ]
        if self.attends:
            transformers = len(self.in_features)
            self.attention = [
                transformer(self.features, self.heads, self.config.transformer_layers, groups)
                for _ in range(transformers)
            ]
        if self.resample == "down":
            self.downsample = Conv(self.features, stride=2)
        elif self.resample == "up":
            self.upsample = Upsample(self.features)

    def time_shifts(self, embedding: Array) -> list[Array]:
        return [block.time_shift(embedding) for block in self.res]

    def text_kv(self, context: Array) -> list[Any]:
        return [transformer.text_kv(context) for transformer in self.attention] if self.attends else []

    def block(self, i: int, x: Array, time: list[Array], kv: list[Any]) -> Array:
        x = self.res[i](x, time[i])
        return self.attention[i](x, kv[i]) if self.attends else x


class Middle(nn.Module):
    config: UNetConfig
    remat: bool = False

    def setup(self) -> None:
        width, groups = self.config.channels[-1], self.config.groups
        res_block, transformer = _blocks(self.remat)
        self.res = [res_block(width, groups, RES_EPSILON, skip=False, time=True) for _ in range(2)]
        self.attention = transformer(width, self.config.heads[-1], self.config.transformer_layers, groups)

    def time_shifts(self, embedding: Array) -> list[Array]:
        return [block.time_shift(embedding) for block in self.res]

    def text_kv(self, context: Array) -> list[tuple[Array, Array]]:
        return self.attention.text_kv(context)

    def __call__(self, x: Array, time: list[Array], kv: list[tuple[Array, Array]]) -> Array:
        return self.res[1](self.attention(self.res[0](x, time[0]), kv), time[1])


class UNet(nn.Module):
    """x f[b, h, w, in_channels], t f|i32[b], context f[b, l, d] -> the prediction (epsilon or v)
    f[b, h, w, 4].

    Any h and w: a size that does not halve evenly is rounded up on the way down and cropped on the
    way up. `remat`: training keeps only what lies between the blocks, and computes the rest anew for the gradient.
    """

    config: UNetConfig
    remat: bool = False

    def setup(self) -> None:
        config, remat = self.config, self.remat
        channels, blocks, last = config.channels, config.res_blocks, len(config.channels) - 1
        self.time_fc1 = Dense(4 * channels[0])
        self.time_fc2 = Dense(4 * channels[0])
        self.conv_in = Conv(channels[0])

        width, skips, down = channels[0], [channels[0]], []
        for i, features in enumerate(channels):
            ins = (width, *[features] * (blocks - 1))
            resample = "down" if i < last else None
            down.append(Level(config, ins, features, config.heads[i], config.attention[i], resample, remat))
            skips += [features] * (blocks + (i < last))
            width = features
        self.down = down
        self.mid = Middle(config, remat)

        up = []
        for i in range(last, -1, -1):
            features = channels[i]
            ins = (width + skips.pop(), *[features + skips.pop() for _ in range(blocks)])
            resample = "up" if i > 0 else None
            up.append(Level(config, ins, features, config.heads[i], config.attention[i], resample, remat))
            width = features
        self.up = up
        self.norm_out = GroupNorm(config.groups, RES_EPSILON)
        self.conv_out = Conv(config.out_channels)

    def time_table(self, t: Array) -> Any:
        """t f|i32[...] -> the shift of every residual block, a pytree of f[..., c]."""
        embedding = self.time_fc2(nn.silu(self.time_fc1(timestep_embedding(t, self.config.channels[0]))))
        return [part.time_shifts(embedding) for part in (*self.down, self.mid, *self.up)]

    def text_kv(self, context: Array) -> Any:
        """context f[b, l, d] -> keys and values of every cross-attention, each f[b, l, n, d/n]."""
        return [part.text_kv(context) for part in (*self.down, self.mid, *self.up)]

    def predict(self, x: Array, time: Any, kv: Any) -> Array:
        """One evaluation from what `time_table` and `text_kv` gave.

        x f[b, h, w, in_channels]; time shifts f[c] or f[b, c]; keys and values of k*b rows ->
        f[k*b, h, w, out_channels].
        """
        levels = len(self.down)
        x = self.conv_in(x)
        skips = [x]
        for level, shifts, text in zip(self.down, time[:levels], kv[:levels], strict=True):
            for i in range(len(level.in_features)):
                x = level.block(i, x, shifts, text)
                skips.append(x)
            if level.resample:
                x = level.downsample(x)
                skips.append(x)
        x = self.mid(x, time[levels], kv[levels])
        for level, shifts, text in zip(self.up, time[levels + 1 :], kv[levels + 1 :], strict=True):
            for i in range(len(level.in_features)):
                x = jnp.concatenate([x, tile_rows(skips.pop(), x.shape[0])], axis=-1)
                x = level.block(i, x, shifts, text)
            if level.resample:
                x = level.upsample(x, skips[-1].shape[1:3])
        return self.conv_out(nn.silu(self.norm_out(x)))

    def __call__(self, x: Array, t: Array, context: Array) -> Array:
        return self.predict(x, self.time_table(t), self.text_kv(context))
