"""The KL-regularised autoencoder (Rombach et al. 2022, section 3.1; Kingma & Welling 2014).

Pictures f[b, H, W, 3] in [-1, 1] to a Gaussian over latents f[b, H/8, W/8, 4], and back. Latents
here are unscaled: multiply by `config.scaling_factor` before the UNet, divide by it before
`decode`.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sdjax.config import VAEConfig
from sdjax.models.layers import Conv, Dense, GroupNorm, ResBlock, Upsample, attention
from sdjax.types import Array

EPSILON = 1e-6  # of every norm in this network


class Posterior(NamedTuple):
    """q(z | x) = N(mean, exp(logvar)), both f32[b, h, w, c]; logvar is clipped to [-30, 20]."""

    mean: Array
    logvar: Array

    def sample(self, key: Array) -> Array:
        """One draw, f32[b, h, w, c], by the reparameterisation z = mean + std * noise."""
        return self.mean + jnp.exp(0.5 * self.logvar) * jax.random.normal(key, self.mean.shape, jnp.float32)


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions, around a residual."""

    features: int
    groups: int

    def setup(self) -> None:
        self.norm = GroupNorm(self.groups, EPSILON)
        self.q = Dense(self.features)
        self.k = Dense(self.features)
        self.v = Dense(self.features)
        self.out = Dense(self.features)

    def __call__(self, x: Array) -> Array:
        b, h, w, c = x.shape
        y = self.norm(x).reshape(b, h * w, 1, c)
        y = attention(self.q(y), self.k(y), self.v(y))
        return x + self.out(y).reshape(b, h, w, c)


class Middle(nn.Module):
    config: VAEConfig

    def setup(self) -> None:
        config, features = self.config, self.config.channels[-1]
        options: dict[str, Any] = dict(skip=False, activation=config.activation, wrap=config.wraps)
        block = partial(ResBlock, features, config.groups, EPSILON, **options)
        self.res = [block() for _ in range(2)]
        if config.middle_attention:
            self.attention = AttentionBlock(features, config.groups)

    def __call__(self, x: Array) -> Array:
        x = self.res[0](x)
        return self.res[1](self.attention(x) if self.config.middle_attention else x)


class Block(nn.Module):
    """Residual blocks at one resolution."""

    in_features: int
    features: int
    blocks: int
    config: VAEConfig
    resample: bool  # whether the resolution changes after it

    def setup(self) -> None:
        widths = [self.in_features] + [self.features] * self.blocks
        options: dict[str, Any] = dict(activation=self.config.activation, wrap=self.config.wraps)
        block = partial(ResBlock, groups=self.config.groups, epsilon=EPSILON, **options)
        self.res = [block(features=after, skip=before != after) for before, after in pairwise(widths)]

    def __call__(self, x: Array) -> Array:
        for block in self.res:
            x = block(x)
        return x


class DownBlock(Block):
    """A block of the encoder; after it the resolution is halved."""

    def setup(self) -> None:
        super().setup()
        if self.resample:  # pads right and bottom only
            self.downsample = Conv(self.features, stride=2, padding=(0, 1), wrap=self.config.wraps)

    def __call__(self, x: Array) -> Array:
        x = super().__call__(x)
        return self.downsample(x) if self.resample else x


class UpBlock(Block):
    """A block of the decoder; after it the resolution is doubled."""

    def setup(self) -> None:
        super().setup()
        if self.resample:
            self.upsample = Upsample(self.features, wrap=self.config.wraps)

    def __call__(self, x: Array) -> Array:
        x = super().__call__(x)
        return self.upsample(x) if self.resample else x


class Encoder(nn.Module):
    config: VAEConfig

    def setup(self) -> None:
        config = self.config
        widths = (config.channels[0], *config.channels)
        last = len(config.channels) - 1
        self.conv_in = Conv(config.channels[0], wrap=config.wraps)
        self.down = [
            DownBlock(
                widths[i],
                widths[i + 1],
                config.res_blocks,
                config,
                i < last,
            )
            for i in range(last + 1)
        ]
        self.mid = Middle(config)
        self.norm_out = GroupNorm(config.groups, EPSILON)
        self.conv_out = Conv(2 * config.latent_channels, wrap=config.wraps)

    def __call__(self, x: Array) -> Array:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(nn.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    config: VAEConfig

    def setup(self) -> None:
        config = self.config
        channels = config.channels[::-1]
        widths = (channels[0], *channels)
        last = len(channels) - 1
        self.conv_in = Conv(channels[0], wrap=config.wraps)
        self.mid = Middle(config)
        self.up = [
            UpBlock(
                widths[i],
                widths[i + 1],
                config.res_blocks + 1,
                config,
                i < last,
            )
            for i in range(last + 1)
        ]
        self.norm_out = GroupNorm(config.groups, EPSILON)
        self.conv_out = Conv(config.image_channels, wrap=config.wraps)

    def __call__(self, z: Array) -> Array:
        x = self.mid(self.conv_in(z))
        for level in self.up:
            x = level(x)
        return self.conv_out(nn.silu(self.norm_out(x)))


class VAE(nn.Module):
    """`encode`: images f[b, H, W, 3] in [-1, 1] -> Posterior; `decode`: latents f[b, h, w, c] ->
    images f[b, H, W, 3].

    H and W are multiples of `config.downscale`. Decoded values are not clipped.
    """

    config: VAEConfig

    def setup(self) -> None:
        self.encoder = Encoder(self.config)
        if self.config.quant_conv:
            self.quant_conv = Conv(2 * self.config.latent_channels, size=1, padding=(0, 0))
        if self.config.post_quant_conv:
            self.post_quant_conv = Conv(self.config.latent_channels, size=1, padding=(0, 0))
        self.decoder = Decoder(self.config)

    def encode(self, images: Array) -> Posterior:
        moments = self.encoder(images)
        moments = (self.quant_conv(moments) if self.config.quant_conv else moments).astype(jnp.float32)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return Posterior(mean, jnp.clip(logvar, -30.0, 20.0))

    def decode(self, latents: Array) -> Array:
        return self.decoder(self.post_quant_conv(latents) if self.config.post_quant_conv else latents)

    def __call__(self, images: Array) -> Array:
        """The reconstruction through the posterior's mean."""
        return self.decode(self.encode(images).mean)
