"""From arrays to arrays: the model and the sampler as pure functions, and as programs over devices.

`encode_text`, `encode_images`, `generate_latents` and `decode_latents` are what a picture takes. All three tasks are
the same `generate_latents`: a task only says where to start (noise, or a noised picture), what to hold fixed (the known
region) and what else to show the network (mask and masked picture).

A `Pipeline` runs them in five programs of one batch each, `condition`, `time_rows`, `begin`, `paint` (or `paint_row`,
row by row) and `develop`, every one of which treats each picture by itself: `programs` compiles them for a `Placement`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sdjax import image as images
from sdjax.config import ModelConfig
from sdjax.diffusion.denoiser import guided, keep_known, to_denoiser
from sdjax.diffusion.sample import initial_noise, sample, sample_row, with_time_table
from sdjax.diffusion.samplers import Carry, Rows
from sdjax.diffusion.schedule import per_image
from sdjax.models.clip import TextEncoder
from sdjax.models.unet import UNet
from sdjax.models.vae import VAE
from sdjax.types import Array, Denoiser, Latent, Level, Params


class Inputs(NamedTuple):
    """What the denoiser is made from: everything that may change without compiling anew.

    unet: the UNet's parameters. context_kv: `UNet.text_kv` of the negative prompts, then of the prompts, 2b rows.
    known f32[b, h, w, 4] and mask f32[b, h, w, 1]: the region to keep, where the mask is 0 (all 1: nothing is kept).
    concat f32[b, h, w, k]: channels behind the latent; k = 0 for models without.
    """

    unet: Params
    context_kv: Any
    known: Array
    mask: Array
    concat: Array


class Batch(NamedTuple):
    """`Inputs` without the parameters, pictures along one axis. kv: leaves f[2, b, ...], negative prompts first."""

    kv: Any
    known: Any
    mask: Any
    concat: Any

    def inputs(self, unet: Params) -> Inputs:
        kv = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), self.kv)
        return Inputs(unet, kv, self.known, self.mask, self.concat)


@partial(jax.jit, static_argnames="config")
def predict_noise(params: Params, x: Latent, time: Any, kv: Any, *, config: ModelConfig) -> Array:
    """`UNet.predict`; a function of its own so that it is traced once wherever a program calls it. params: "unet"."""
    return UNet(config.unet).apply({"params": params}, x, time, kv, method="predict")  # type: ignore


@dataclass(frozen=True)
class MakeDenoiser:
    """Inputs -> Denoiser; equal for equal fields, so that it can be static under jit."""

    config: ModelConfig

    def __call__(self, inputs: Inputs) -> Denoiser:
        def predict(kv: Any, x: Latent, level: Level) -> Any:
            x = jnp.concatenate([x, inputs.concat], axis=-1)
            return predict_noise(inputs.unet, x, level.time, kv, config=self.config)

        def one(index: Array | int, x: Latent, level: Level) -> Any:
            halves = jax.tree.map(lambda leaf: leaf.reshape(2, -1, *leaf.shape[1:]), inputs.context_kv)
            return predict(jax.tree.map(lambda leaf: leaf[index], halves), x, level)

        network = guided(partial(predict, inputs.context_kv), one)
        return keep_known(to_denoiser(network, self.config.schedule.prediction), inputs.known, inputs.mask)


@partial(jax.jit, static_argnames=("config", "skip"))
def encode_text(params: Params, ids: Array, *, config: ModelConfig, skip: int | None = None) -> Array:
    """Token ids i32[b, l] -> the context f[b, l, d] that the UNet attends to. params: the "text" tree."""
    return TextEncoder(config.clip).apply({"params": params}, ids, skip).last_hidden_state  # type: ignore


@partial(jax.jit, static_argnames="config")
def encode_images(params: Params, pictures: Array, *, config: ModelConfig) -> Latent:
    """Pictures f32[b, H, W, 3] in [-1, 1] -> scaled latents f32[b, h, w, 4], the posterior's mean, one at a time."""

    def encode(picture: Array) -> Array:
        posterior: Any = VAE(config.vae).apply({"params": params}, picture[None], method="encode")
        return posterior.mean[0] * config.vae.scaling_factor

    return jax.lax.map(encode, pictures)


@partial(jax.jit, static_argnames="config")
def decode_latents(params: Params, latents: Latent, *, config: ModelConfig) -> Array:
    """Scaled latents f32[b, h, w, 4] -> pictures u8[b, H, W, 3], one at a time so that memory stays bounded."""

    def decode(latent: Array) -> Array:
        z = latent[None] / config.vae.scaling_factor
        picture: Any = VAE(config.vae).apply({"params": params}, z, method="decode")
        return images.to_uint8(picture)[0]

    return jax.lax.map(decode, latents)


@partial(jax.jit, static_argnames="config")
def text_kv(params: Params, context: Array, *, config: ModelConfig) -> Any:
    """The context's keys and values for every cross-attention, computed once per prompt."""
    return UNet(config.unet).apply({"params": params}, context, method="text_kv")


@partial(jax.jit, static_argnames="config")
def time_tables(params: Params, rows: Any, *, config: ModelConfig) -> Any:
    """A sampler's rows with the UNet's time shifts for all steps at once."""
    return with_time_table(rows, lambda t: UNet(config.unet).apply({"params": params}, t, method="time_table"))


@partial(jax.jit, static_argnames="config")
def generate_latents(
    inputs: Inputs, rows: Rows, count: Array, x: Latent, keys: Array, *, config: ModelConfig
) -> Latent:
    """The whole sampling loop as one program: x f32[b, h, w, 4] at the first row's level -> latents f32[b, h, w, 4].

    rows: `request.stacked` plans through `time_tables`, [s, b, ...]; count: i32[] or i32[b], those that run. keys:
    key[b], one for each picture.
    """
    return sample(MakeDenoiser(config), inputs, rows, x, keys, count)


@jax.jit
def start(unit: Array, sigma: Array, known: Latent, mask: Array, from_noise: Array) -> Latent:
    """Where sampling starts, f32[b, h, w, c] in sigma space. unit: unit normal noise; sigma f32[b]; from_noise bool[b].

    Pure noise is the prior N(0, I) of the variance-preserving view: sqrt(sigma^2 + 1) noise. A picture starts at
    known + sigma noise, and so does the known region of inpainting (mask 0) even where the rest is pure noise.
    """
    noised = known + per_image(sigma, unit) * unit
    pure = per_image(jnp.sqrt(sigma**2 + 1), unit) * unit
    weight = per_image(from_noise, unit) * mask
    return jnp.where(weight == 1, pure, noised + weight * (pure - noised))


def inpainting_channels(params: Params, pictures: Array, mask: Array, *, config: ModelConfig) -> Array:
    """What a 9-channel model sees besides the latent: mask, then the latent of the picture with the mask cut out.

    params: the "vae" tree. pictures f32[b, H, W, 3], mask f32[b, H, W, 1], 1 = paint; a soft mask cuts from 0.5 up.
    """
    masked = jnp.where(mask < 0.5, pictures, 0.0)
    small = images.latent_mask(mask, config.vae.downscale)
    hard = (small >= 0.5).astype(jnp.float32)
    return jnp.concatenate([hard, encode_images(params, masked, config=config)], axis=-1)


# The programs of a batch. Pictures lie along axis 0, but for what says otherwise; prompts as [2, b], negative first.


def condition(text: Params, unet: Params, ids: Array, *, config: ModelConfig, skip: int | None) -> Any:
    """Token ids i32[2, b, l] -> `text_kv` of them, leaves f[2, b, ...]."""
    context = encode_text(text, ids.reshape(-1, ids.shape[-1]), config=config, skip=skip)
    return jax.tree.map(lambda leaf: leaf.reshape(2, -1, *leaf.shape[1:]), text_kv(unet, context, config=config))


def begin(
    keys: Array, given: Latent, own: Array, sigma: Array, known: Latent, mask: Array, from_noise: Array
) -> Latent:
    """`start`, from each seed's own noise where own bool[b] says so, or else from the given, f32[b, h, w, c]."""
    unit = jnp.where(per_image(own, given), initial_noise(keys, given.shape[1:]), given)
    return start(unit, sigma, known, mask, from_noise)


def paint(
    unet: Params, batch: Batch, rows: Rows, counts: Array, x: Latent, keys: Array, *, config: ModelConfig
) -> Latent:
    """`generate_latents` of a batch. rows: leaves [s, b, ...]; counts i32[b]."""
    return generate_latents(batch.inputs(unet), rows, counts, x, keys, config=config)


def paint_row(
    unet: Params, batch: Batch, keys: Array, carry: Carry, row: Rows, index: Array, *, config: ModelConfig
) -> Carry:
    """One row of the same, for progress. row: leaves [b, ...]; index i32[], which row it is."""
    return sample_row(MakeDenoiser(config), batch.inputs(unet), keys, carry, row, index)


def develop(vae: Params, latents: Latent, *, config: ModelConfig) -> tuple[Array, Array]:
    """Latents -> pictures u8[b, H, W, 3], and whether each picture's latents were finite, bool[b]."""
    return decode_latents(vae, latents, config=config), jnp.isfinite(latents).all((1, 2, 3))
