"""From arrays to arrays: the model and the sampler as pure functions.

All three tasks are the same loop: a task only says where to start (noise, or a noised picture), what to hold fixed (the
known region) and what else to show the network (mask and masked picture). A batch takes

    encode            pictures -> latents, for tasks that start from a picture
    condition         prompts, and the sampler's rows -> all that the networks in the loop see (`Conditioning`)
    initial_latents   keys, and the noise level to start at -> where sampling starts
    sample            pictures under way (`State`) -> the state after some steps, or all
    decode            latents -> pictures

Pictures are along the first axis of every array; each is treated by itself. `params` is the whole tree {"text", "vae",
"unet"}, with live adapters as "adapters" (`sdjax.models.adapters`) and, for `sample`, `transformed_kernels` as
`TRANSFORMED` if they are made already. `sdjax.pipeline.programs` compiles these for a `Placement`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax

from sdjax.config import ModelConfig
from sdjax.devices.platform import platform, use_platform
from sdjax.diffusion import sample as loop
from sdjax.diffusion.denoiser import guided, keep_known, to_denoiser
from sdjax.diffusion.rows import Carry, Rows, first_carry
from sdjax.diffusion.sample import State, at_rows, initial_noise
from sdjax.diffusion.schedule import per_image
from sdjax.image import latent_mask
from sdjax.models.adapters import live
from sdjax.models.clip import TextEncoder
from sdjax.models.layers import CPU_FEW_POSITIONS, TRANSFORMED, winograd_kernel
from sdjax.models.params import abstract_params
from sdjax.models.unet import UNet
from sdjax.models.vae import VAE
from sdjax.text.prompt import Prompts
from sdjax.text.weighting import weighted
from sdjax.types import Array, Conditioning, Denoiser, Latent, NoiseLevel, Params

# The networks


@partial(jax.jit, static_argnames=("config", "skip"))
def encode_text(
    params: Params,
    ids: Array,
    vectors: Array | None = None,
    seen: Array | None = None,
    adapters: Any = None,
    gates: Array | None = None,
    *,
    config: ModelConfig,
    skip: int | None = None,
) -> Array:
    """Token ids i32[b, l] -> the context f[b, l, d] that the UNet attends to. params: the "text" tree.

    vectors, seen: see `TextEncoder`. adapters, gates: see `live`.
    """
    with live(adapters, gates, config, "text"):
        encoder = TextEncoder(config.clip)
        found: Any = encoder.apply({"params": params}, ids, skip, vectors=vectors, seen=seen)
    return found.last_hidden_state


@partial(jax.jit, static_argnames="config")
def predict_noise(
    params: Params,
    x: Latent,
    time: Any,
    kv: Any,
    adapters: Any = None,
    gates: Array | None = None,
    transformed: Any = None,
    *,
    config: ModelConfig,
) -> Array:
    """`UNet.predict`; a function of its own so that it is traced once wherever a program calls it. params: "unet".

    transformed: `transformed_kernels`, or None.
    """
    with live(adapters, gates, config, "unet", by_picture=False):
        variables = {"params": params, TRANSFORMED: transformed or {}}
        return UNet(config.unet).apply(variables, x, time, kv, method="predict")  # type: ignore


@lru_cache(maxsize=64)
def _winograd_convolutions(config: ModelConfig, height: int, width: int) -> tuple[tuple[str, ...], ...]:
    """The kernels of the UNet, by their paths, that a CPU convolves latents of this size with by `winograd`."""
    struct = jax.ShapeDtypeStruct
    x = struct((1, height, width, config.unet.in_channels), jnp.float32)
    context = struct((1, 1, config.unet.context_width), jnp.float32)
    apply = partial(UNet(config.unet).apply, mutable=[TRANSFORMED])
    with use_platform("cpu"):
        _, found = jax.eval_shape(
            apply, {"params": abstract_params(config)["unet"]}, x, struct((1,), jnp.int32), context
        )
    return tuple(flatten_dict(found.get(TRANSFORMED, {})))


def has_transformed(latents: Any) -> bool:
    """Whether latents f[b, h, w, c] have so many positions that a CPU may convolve them by transformed kernels."""
    return latents.shape[1] * latents.shape[2] > CPU_FEW_POSITIONS


def transformed_kernels(params: Params, x: Latent, *, config: ModelConfig) -> Any:
    """The UNet's kernels that a CPU convolves latents x f[b, h, w, c] by in another form (`winograd`), in that form.

    To be made once, outside of the loop over steps.
    """
    if platform() != "cpu" or not has_transformed(x) or params["unet"]["conv_in"]["kernel"].dtype != jnp.float32:
        return {}
    leaves = flatten_dict(params["unet"])
    return unflatten_dict(
        {path: winograd_kernel(leaves[path]) for path in _winograd_convolutions(config, *x.shape[1:3])}
    )


@partial(jax.jit, static_argnames="config")
def text_kv(
    params: Params,
    context: Array,
    keys: Array | None = None,
    adapters: Any = None,
    gates: Array | None = None,
    *,
    config: ModelConfig,
) -> Any:
    """The context's keys and values for every cross-attention, computed once per prompt. params: "unet"."""
    with live(adapters, gates, config, "unet"):
        return UNet(config.unet).apply({"params": params}, context, keys, method="text_kv")


@partial(jax.jit, static_argnames="config")
def embed_timesteps(
    params: Params, t: Array, adapters: Any = None, gates: Array | None = None, *, config: ModelConfig
) -> Any:
    """Timesteps f[...] -> the shift of every residual block, f[..., c], for all steps at once. params: "unet"."""
    with live(adapters, gates, config, "unet"):
        return UNet(config.unet).apply({"params": params}, t, method="embed_timesteps")


# What a batch takes


@partial(jax.jit, static_argnames="config")
def encode(params: Params, pictures: Array, *, config: ModelConfig) -> Latent:
    """Pictures f32[b, H, W, 3] in [-1, 1] -> scaled latents f32[b, h, w, c], the posterior's mean, one at a time."""

    def one(picture: Array) -> Array:
        posterior: Any = VAE(config.vae).apply({"params": params["vae"]}, picture[None], method="encode")
        return (posterior.mean[0] * config.vae.scaling_factor).astype(jnp.float32)

    return jax.lax.map(one, pictures)


def inpainting_channels(encode: Callable[[Any], Latent], pictures: Any, mask: Any, *, downscale: int) -> Array:
    """What a 9-channel model sees besides the latent: mask, then the latent of the picture with the mask cut out.

    encode: pictures -> latents. pictures: f32[b, H, W, 3]. mask: f32[b, H, W, 1], 1 = regenerate; a soft mask cuts from
    0.5 up. downscale: pixels per latent cell along one axis.
    """
    hard = (latent_mask(mask, downscale) >= 0.5).astype(np.float32)
    return jnp.concatenate([hard, encode(pictures * (mask < 0.5))], axis=-1)


def contexts(
    params: Params, prompts: Prompts, gates: Array | None = None, *, config: ModelConfig, skip: int | None = None
) -> Array:
    """The texts of pictures as the UNet attends to them, f[b, V, L * l, d], weights applied.

    prompts: leaves [b, ...]. gates: as `Conditioning`. skip: layers of the text encoder to leave out; None: as trained.

    Texts are encoded two by two, and no more of them than some picture has.
    """
    b, places, chunks, length = prompts.ids.shape

    def two(i: Array, done: Array) -> Array:
        def rows(leaf: Array) -> Array:
            return lax.dynamic_slice_in_dim(leaf, 2 * i, 2, axis=1).reshape(-1, length)

        found = encode_text(
            params["text"],
            rows(prompts.ids),
            prompts.vectors,
            rows(prompts.seen),
            params.get("adapters"),
            gates,
            config=config,
            skip=skip,
        ).reshape(b, 2, chunks, length, -1)
        return lax.dynamic_update_slice_in_dim(done, found.astype(done.dtype), 2 * i, axis=1)

    dtype = params["text"]["token_embedding"].dtype
    nothing = jnp.zeros((b, places, chunks, length, config.clip.width), dtype)
    encoded = lax.fori_loop(0, (jnp.max(prompts.count) + 1) // 2, two, nothing)
    found = weighted(encoded, prompts).reshape(b, places, chunks * length, -1)
    last = jnp.minimum(jnp.arange(chunks * length), prompts.own[..., None] * length - 1)
    found = jnp.take_along_axis(found, last[..., None], axis=2)  # the last row again, for parts of different length
    if prompts.given.shape[1]:
        found = jnp.where(prompts.is_given[..., None, None], prompts.given.astype(dtype), found)
    return found


def condition(
    params: Params,
    prompts: Prompts,
    rows: Rows,
    gates: Array,
    known: Latent,
    mask: Array,
    concat: Array,
    *,
    config: ModelConfig,
    skip: int | None = None,
) -> tuple[Conditioning, Any]:
    """All that the UNet sees besides x and the noise level, and the keys and values of the first row's texts.

    prompts: leaves [b, ...]. rows: leaves [b, s, ...], for the timesteps of every call. gates, known, mask, concat: see
    `Conditioning`. skip: layers of the text encoder to leave out; None: as trained.
    """
    found = contexts(params, prompts, gates, config=config, skip=skip)
    shifts = embed_timesteps(params["unet"], rows.levels.t, params.get("adapters"), gates, config=config)
    given = Conditioning(
        contexts=found,
        keys=prompts.keys,
        texts=prompts.texts,
        changed=prompts.changed,
        strengths=prompts.strengths,
        parts=prompts.parts,
        shifts={"unet": shifts},
        gates=gates,
        known=known,
        mask=mask,
        concat=concat,
    )
    return given, kv_of(params, given, prompts.texts[:, 0, :2], config=config)


def kv_of(params: Params, given: Conditioning, texts: Array, *, config: ModelConfig) -> Any:
    """Keys and values of some texts of every picture, i32[b, n], pictures first: leaves f[b, n, l, heads, d]."""
    b, count = texts.shape
    length = given.contexts.shape[2]
    context = jnp.take_along_axis(given.contexts, texts[..., None, None], axis=1).reshape(b * count, length, -1)
    keys = None
    if length > config.clip.length:
        keys = jnp.arange(length) < jnp.take_along_axis(given.keys, texts, axis=1).reshape(-1, 1)
    kv = text_kv(params["unet"], context, keys, params.get("adapters"), given.gates, config=config)
    return {"unet": jax.tree.map(lambda leaf: leaf.reshape(b, count, *leaf.shape[1:]), kv)}


@jax.jit
def start_from(noise: Latent, sigma: Array, known: Latent, mask: Array, pure: Array) -> Latent:
    """Where sampling starts, f32[b, h, w, c] in sigma space.

    noise: unit normal. sigma: f32[b]. pure: bool[b], whether from noise alone.

    Pure noise is the prior N(0, I) of the variance-preserving view: sqrt(sigma^2 + 1) noise. A picture starts at
    known + sigma noise, and so does the known region of inpainting (mask 0) even where the rest is pure noise.
    """
    noised = known + per_image(sigma, noise) * noise
    prior = per_image(jnp.sqrt(sigma**2 + 1), noise) * noise
    weight = per_image(pure, noise) * mask
    return jnp.where(weight == 1, prior, noised + weight * (prior - noised))


def initial_latents(
    key: Array, noise: Latent, drawn: Array, sigma: Array, pure: Array, known: Latent, mask: Array
) -> Carry:
    """`start_from`, as the loop's carry.

    key: key[b], from which unit noise is drawn where drawn bool[b] says so.
    noise: f32[b, h, w, c], taken where it does not.
    """
    unit = jnp.where(per_image(drawn, noise), initial_noise(key, noise.shape[1:]), noise)
    return first_carry(start_from(unit, sigma, known, mask, pure))


@dataclass(frozen=True)
class MakeDenoiser:
    """(params, `Conditioning`, kv, rows) -> Denoiser; equal for equal fields, so that it can be static under jit."""

    config: ModelConfig

    def held(self, params: Params, given: Conditioning, kv: Any, index: Array) -> Any:
        """The keys and values of the texts that pictures see at their rows; worked out anew where one has changed."""
        texts = at_rows(given.texts, index)[:, :2]
        changed = at_rows(given.changed, index)
        return lax.cond(jnp.any(changed), lambda: kv_of(params, given, texts, config=self.config), lambda: kv)

    def __call__(self, params: Params, given: Conditioning, kv: Any, index: Array) -> Denoiser:
        shifts, texts = at_rows(given.shifts["unet"], index), at_rows(given.texts, index)

        def predict(kv: Any, x: Latent) -> Any:
            x = jnp.concatenate([x, given.concat], axis=-1)
            live = params.get("adapters"), given.gates, params.get(TRANSFORMED)
            return predict_noise(params["unet"], x, shifts, kv, *live, config=self.config)

        def pair(x: Latent, level: NoiseLevel) -> Any:
            def halves(leaf: Array) -> Array:  # [b, 2, ...] -> the negative prompts', then the prompts' [2b, ...]
                return jnp.swapaxes(leaf, 0, 1).reshape(-1, *leaf.shape[2:])

            return predict(jax.tree.map(halves, kv["unet"]), x)

        def one(which: Array | int, x: Latent, level: NoiseLevel) -> Any:
            def first_two() -> Any:
                return jax.tree.map(lambda leaf: jnp.take(leaf, jnp.minimum(which, 1), axis=1), kv["unet"])

            def further() -> Any:
                text = jnp.take(texts, which, axis=1)[:, None]
                found = kv_of(params, given, text, config=self.config)
                return jax.tree.map(lambda leaf: leaf[:, 0], found["unet"])

            return predict(first_two() if isinstance(which, int) else lax.cond(which < 2, first_two, further), x)

        denoise = to_denoiser(guided(pair, one, given.strengths, given.parts), self.config.schedule.prediction)
        return keep_known(denoise, given.known, given.mask)


def sample_step(params: Params, state: State, *, config: ModelConfig) -> State:
    """One row of every picture's own sampler."""
    return loop.sample_step(MakeDenoiser(config), params, state)


@partial(jax.jit, static_argnames="config")
def sample(params: Params, state: State, ticks: Array | None = None, *, config: ModelConfig) -> State:
    """The sampling loop as one program: the state after `ticks` steps i32[], or when all are finished.

    The latents f32[b, h, w, c] are its `.carry.x`.
    """
    if TRANSFORMED not in params:
        params = {**params, TRANSFORMED: transformed_kernels(params, state.carry.x, config=config)}
    return loop.sample(MakeDenoiser(config), params, state, ticks)


@partial(jax.jit, static_argnames="config")
def decode(params: Params, latents: Latent, *, config: ModelConfig) -> Array:
    """Scaled latents f32[b, h, w, c] -> pictures f32[b, H, W, 3], about [-1, 1], one at a time to bound the memory."""

    def one(latent: Array) -> Array:
        z = latent[None] / config.vae.scaling_factor
        picture: Any = VAE(config.vae).apply({"params": params["vae"]}, z, method="decode")
        return picture[0].astype(jnp.float32)

    return jax.lax.map(one, latents)
