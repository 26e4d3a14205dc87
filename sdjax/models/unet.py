"""The denoising UNet with cross-attention (Rombach et al. 2022, section 3.3; Ho et al. 2020,
appendix B).

`UNet(config).apply({"params": p}, x, t, context)` is the network as the papers write it. A sampler
calls the same three parts apart, so that nothing is computed twice: `embed_timesteps(t)` for all of its
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
    ACTIVATIONS,
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

TRANSFORMER_EPSILON = 1e-6


def timestep_embedding(t: Array, width: int, *, cosine_first: bool = True, shift: float = 0.0) -> Array:
    """t f|i32[...] -> f32[..., width], cosines then sines, or the other way round (Vaswani et al. 2017, section 3.5).

    The angles are t * 10000^(-i / (width / 2 - shift)) for i in [0, width / 2). An odd width ends in a zero.
    """
    half = width // 2
    frequencies = jnp.exp(-jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / (half - shift))
    angles = jnp.asarray(t, jnp.float32)[..., None] * frequencies
    waves = [jnp.cos(angles), jnp.sin(angles)]
    embedding = jnp.concatenate(waves if cosine_first else waves[::-1], axis=-1)
    return jnp.pad(embedding, [(0, 0)] * (embedding.ndim - 1) + [(0, 1)]) if width % 2 else embedding


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

    def kv(self, context: Array, keys: Array | None = None) -> tuple[Array, ...]:
        """context f[b, l, d] -> keys and values, each f[b, l, n, d/n], and which of them count, bool[b, l] or none."""
        kv = self.split(self.k(context)), self.split(self.v(context))
        return kv if keys is None else (*kv, keys)

    def __call__(self, x: Array, kv: tuple[Array, ...]) -> Array:
        return self.out(attention(self.split(self.q(x)), *kv).reshape(x.shape))


class TransformerLayer(nn.Module):
    """Self-attention, cross-attention to the text, gated feed-forward, each around a residual.

    only_cross: the first attention looks at the text, too; `text_kv` then gives the keys and values of both.
    """

    width: int
    heads: int
    only_cross: bool = False

    def setup(self) -> None:
        self.norm1 = LayerNorm()
        self.self_attention = Attention(self.width, self.heads)
        self.norm2 = LayerNorm()
        self.cross_attention = Attention(self.width, self.heads)
        self.norm3 = LayerNorm()
        self.ff_in = Dense(8 * self.width)
        self.ff_out = Dense(self.width)

    def text_kv(self, context: Array, keys: Array | None = None) -> Any:
        kv = self.cross_attention.kv(context, keys)
        return (self.self_attention.kv(context, keys), kv) if self.only_cross else kv

    def __call__(self, x: Array, text_kv: Any) -> Array:
        if self.only_cross:
            first_kv, text_kv = text_kv
            x = tile_rows(x, text_kv[0].shape[0])
        y = self.norm1(x)
        x = x + self.self_attention(y, first_kv if self.only_cross else self.self_attention.kv(y))
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
    only_cross: bool = False

    def setup(self) -> None:
        self.norm = GroupNorm(self.groups, TRANSFORMER_EPSILON)
        self.proj_in = Dense(self.width)
        self.layer = [TransformerLayer(self.width, self.heads, self.only_cross) for _ in range(self.layers)]
        self.proj_out = Dense(self.width)

    def text_kv(self, context: Array, keys: Array | None = None) -> list[Any]:
        return [layer.text_kv(context, keys) for layer in self.layer]

    def __call__(self, x: Array, text_kv: list[Any]) -> Array:
        b, h, w, c = x.shape
        y = self.proj_in(self.norm(x).reshape(b, h * w, c))
        for layer, kv in zip(self.layer, text_kv, strict=True):
            y = layer(y, kv)
        y = self.proj_out(y).reshape(-1, h, w, c)
        return tile_rows(x, y.shape[0]) + y


def _res_block(config: UNetConfig, features: int, remat: bool, *, skip: bool, divisor: float = 1.0) -> Any:
    """A residual block; with `remat`, one whose backward pass recomputes what is inside it."""
    kind = nn.remat(ResBlock) if remat else ResBlock
    return kind(
        features,
        config.groups,
        config.epsilon,
        skip,
        time=True,
        activation=config.activation,
        scales=config.time_scales,
        divisor=divisor,
        wrap=config.wraps,
    )


def _transformer(remat: bool) -> Any:
    return nn.remat(Transformer) if remat else Transformer


class Block(nn.Module):
    """Residual blocks at one resolution, each followed by a transformer where the level has them."""

    config: UNetConfig
    in_features: tuple[int, ...]  # of every residual block, skip connection included
    features: int
    heads: int
    transformer_layers: int  # 0: no transformers
    only_cross: bool
    resample: bool  # whether the resolution changes after it
    remat: bool = False

    def setup(self) -> None:
        config = self.config
        self.res = [
            _res_block(config, self.features, self.remat, skip=before != self.features) for before in self.in_features
        ]
        if self.transformer_layers:
            transformer = _transformer(self.remat)
            self.attention = [
                transformer(self.features, self.heads, self.transformer_layers, config.groups, self.only_cross)
                for _ in self.in_features
            ]

    def timestep_shifts(self, embedding: Array) -> list[Array]:
        return [block.time_shift(embedding) for block in self.res]

    def text_kv(self, context: Array, keys: Array | None = None) -> list[Any]:
        return [transformer.text_kv(context, keys) for transformer in self.attention] if self.transformer_layers else []

    def block(self, i: int, x: Array, time: list[Array], kv: list[Any]) -> Array:
        x = self.res[i](x, time[i])
        return self.attention[i](x, kv[i]) if self.transformer_layers else x


class DownBlock(Block):
    """A block on the way down; after it the resolution is halved."""

    def setup(self) -> None:
        super().setup()
        if self.resample:
            padding = (1, 1) if self.config.even_downsampling else (0, 1)
            self.downsample = Conv(self.features, stride=2, padding=padding, wrap=self.config.wraps)


class UpBlock(Block):
    """A block on the way up; after it the resolution is doubled."""

    def setup(self) -> None:
        super().setup()
        if self.resample:
            self.upsample = Upsample(self.features, wrap=self.config.wraps)


class Middle(nn.Module):
    """Between the two ways: a transformer between two residual blocks, one residual block alone, or nothing."""

    config: UNetConfig
    remat: bool = False

    def setup(self) -> None:
        config, remat = self.config, self.remat
        width, layers = config.channels[-1], config.middle_transformers
        blocks = {"attention": 2, "plain": 1, "none": 0}[config.middle]
        divisor = config.middle_scale
        self.res = [_res_block(config, width, remat, skip=False, divisor=divisor) for _ in range(blocks)]
        if layers:
            self.attention = _transformer(remat)(width, config.heads[-1], layers, config.groups)

    def timestep_shifts(self, embedding: Array) -> list[Array]:
        return [block.time_shift(embedding) for block in self.res]

    def text_kv(self, context: Array, keys: Array | None = None) -> list[Any]:
        return self.attention.text_kv(context, keys) if self.config.middle_transformers else []

    def __call__(self, x: Array, time: list[Array], kv: list[Any]) -> Array:
        for i, block in enumerate(self.res):
            if i == 1:
                x = self.attention(x, kv)
            x = block(x, time[i])
        return x


def _same_size_conv(features: int, size: int, wrap: bool) -> Conv:
    return Conv(features, size=size, padding=(size // 2, size // 2), wrap=wrap)


class UNet(nn.Module):
    """x f[b, h, w, in_channels], t f|i32[b], context f[b, l, d] -> the prediction (epsilon or v)
    f[b, h, w, 4].

    Any h and w: a size that does not halve evenly is rounded up on the way down and cropped on the
    way up. `remat`: training keeps only what is between the blocks, and recomputes the rest for the gradient.
    """

    config: UNetConfig
    remat: bool = False

    def setup(self) -> None:
        config, remat = self.config, self.remat
        channels, blocks, last = config.channels, config.level_res_blocks, len(config.channels) - 1
        time_width = config.time_width or 4 * channels[0]
        self.time_fc1 = Dense(time_width)
        self.time_fc2 = Dense(time_width)
        self.conv_in = _same_size_conv(channels[0], config.conv_in_size, config.wraps)

        def block(kind: Any, i: int, ins: tuple[int, ...], layers: int, resample: bool) -> Any:
            only_cross = config.level_only_cross[i]
            return kind(config, ins, channels[i], config.heads[i], layers, only_cross, resample, remat)

        width, skips, down = channels[0], [channels[0]], []
        for i, features in enumerate(channels):
            ins = (width, *[features] * (blocks[i] - 1))
            down.append(block(DownBlock, i, ins, config.down_transformers[i], i < last))
            skips += [features] * (blocks[i] + (i < last))
            width = features
        self.down = down
        self.mid = Middle(config, remat)

        up = []
        for i in range(last, -1, -1):
            features = channels[i]
            ins = (width + skips.pop(), *[features + skips.pop() for _ in range(blocks[i])])
            up.append(block(UpBlock, i, ins, config.up_transformers[last - i], i > 0))
            width = features
        self.up = up
        self.norm_out = GroupNorm(config.groups, config.epsilon)
        self.conv_out = _same_size_conv(config.out_channels, config.conv_out_size, config.wraps)

    def embed_timesteps(self, t: Array) -> Any:
        """t f|i32[...] -> the shift of every residual block, a pytree of f[..., c]."""
        config = self.config
        embedding = timestep_embedding(
            t, config.channels[0], cosine_first=config.cosine_first, shift=config.frequency_shift
        )
        embedding = self.time_fc2(ACTIVATIONS[config.activation](self.time_fc1(embedding)))
        for name in config.time_activations:
            embedding = ACTIVATIONS[name](embedding)
        return [part.timestep_shifts(embedding) for part in (*self.down, self.mid, *self.up)]

    def text_kv(self, context: Array, keys: Array | None = None) -> Any:
        """context f[b, l, d] -> keys and values of every cross-attention, each f[b, l, n, d/n].

        keys: bool[b, l], positions of the context that are attended to; None: all.
        """
        return [part.text_kv(context, keys) for part in (*self.down, self.mid, *self.up)]

    def predict(self, x: Array, time: Any, kv: Any) -> Array:
        """One evaluation from what `embed_timesteps` and `text_kv` gave.

        x f[b, h, w, in_channels]; time shifts f[c] or f[b, c]; keys and values of k*b rows ->
        f[k*b, h, w, out_channels].
        """
        levels = len(self.down)
        x = self.conv_in(2 * x - 1 if self.config.center_input else x)
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
        return self.conv_out(ACTIVATIONS[self.config.activation](self.norm_out(x)))

    def __call__(self, x: Array, t: Array, context: Array) -> Array:
        return self.predict(x, self.embed_timesteps(t), self.text_kv(context))
