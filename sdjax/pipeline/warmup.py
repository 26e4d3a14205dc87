"""Programs ahead of time: what pictures of a shape need, compiled before they are asked for."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np

from sdjax.config import ModelConfig
from sdjax.devices.compilation import Ahead, compilations, compile_in_background
from sdjax.devices.placement import HERE, Placement
from sdjax.devices.platform import pinned
from sdjax.models.params import abstract_params, dtype_of
from sdjax.pipeline.batching import assemble, conditioned, initial, state_of
from sdjax.pipeline.functions import has_transformed
from sdjax.pipeline.pipeline import Pipeline
from sdjax.pipeline.prepare import Prepared, prepare
from sdjax.pipeline.programs import programs_of_kind
from sdjax.request import Request
from sdjax.text.prompt import Words
from sdjax.text.tokenizer import Tokenizer, clip_tokenizer
from sdjax.types import Params


@pinned
def programs_for(
    request: Request,
    config: ModelConfig,
    batch_size: int,
    *,
    dtype: str = "float32",
    placement: Placement = HERE,
    shapes: Params | None = None,
    tokenizer: Tokenizer | None = None,
    continuous: bool = True,
) -> dict[str, Ahead]:
    """The programs that make pictures of a request's shape, by name; each is lowered when it is called (`Ahead`).

    Those whose shapes the others need, and which are traced by now, come first: they are compiled while the next one is
    traced; then those that take longest. A second pass comes after the first. All is worked out from shapes: there
    need be no parameters, and the devices of `placement` may be described ones
    (`jax.experimental.topologies`).

    batch_size: pictures at once on each device.
    dtype: of the parameters.
    shapes: of the parameters, if they are known (`checkpoint.metadata`).
    tokenizer: by which prompts are divided into chunks; None: CLIP's own.
    continuous: whether a finished picture makes room for the next one (`Pipeline.batch` without `progress`).

    Raises:
        ValueError, FileNotFoundError: as `Pipeline.batch`.
    """

    def struct(part: str, leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, dtype_of(part, dtype), sharding=placement.sharding(leaf))

    known = shapes or abstract_params(config)
    params = {part: jax.tree.map(partial(struct, part), known[part]) for part in known}
    cell, latent = config.vae.downscale, config.vae.latent_channels

    def no_latents(picture: np.ndarray) -> np.ndarray:
        height, width = picture.shape[1] // cell, picture.shape[2] // cell
        return np.zeros((1, height, width, latent), np.float32)

    words = Words(tokenizer or clip_tokenizer(), config.clip.length, vocab_size=2**31)  # only their number counts
    one = prepare(request, config, config.name, words=words, encode=no_latents, sources={})
    passes = [one] if one.second is None else [one, one.second.one]
    found: dict[str, Ahead] = {}
    by_picture = one.second is not None and one.second.sees_picture
    for number, each in enumerate(passes):
        of_pass = _of_pass(each, config, params, batch_size, placement, continuous)
        if each.second is not None and not by_picture:
            del of_pass["decode"], of_pass["to_bytes"]  # the second pass starts from latents
        encodes = by_picture if number else request.image is not None
        if encodes or config.unet.in_channels == 9:
            width, height = each.source.size
            picture = jax.ShapeDtypeStruct((1, height, width, config.vae.image_channels), np.float32)
            of_model = programs_of_kind(config, placement, tiling=request.tiling)
            of_pass["encode"] = of_model.encode.ahead(params, picture)
        found |= {f"{name} of the second pass" if number else name: ahead for name, ahead in of_pass.items()}
    return found


def _of_pass(
    one: Prepared, config: ModelConfig, params: Params, batch_size: int, placement: Placement, continuous: bool
) -> dict[str, Ahead]:
    """The programs of one pass, but for that which encodes pictures."""
    request, uniform = one.request, placement.model_parallel > 1
    batch = assemble([one] * batch_size * placement.data_parallel, config, uniform=uniform)
    of_model = programs_of_kind(config, placement, tiling=request.tiling)
    start = initial(of_model.initial_latents.ahead, batch)
    condition = conditioned(of_model.condition(request.clip_skip).ahead, params, batch)
    state = state_of(batch, start.shapes(), condition.shapes())
    b, h, w, _ = state.carry.x.shape
    pixels = (b, h * config.vae.downscale, w * config.vae.downscale, config.vae.image_channels)
    found = {
        "condition": condition,
        "initial_latents": start,
        "sample": of_model.sample.ahead(params, state, np.int32(1)),
        "decode": of_model.decode.ahead(params, state.carry.x),
        "to_bytes": of_model.to_bytes.ahead(jax.ShapeDtypeStruct(pixels, np.float32)),
    }
    if of_model.transform is not None and has_transformed(state.carry.x):
        found = {"transform": of_model.transform.ahead(params, state.carry.x), **found}
    if continuous and not uniform:
        found["admit"] = of_model.admit.ahead(state, state, batch.calls)
        found["admit_latents"] = of_model.admit.ahead(state.carry.x, state.carry.x, batch.calls)
    return found


def warm_up(pipe: Pipeline, width: int, height: int, batch_size: int) -> dict[str, float]:
    """Compiles, or reads from the cache, all that pictures of a size need; returns seconds by program.

    batch_size: pictures at once on each device.
    """
    dtype = jax.tree.leaves(pipe.params["unet"])[0].dtype.name
    count = batch_size * pipe.placement.data_parallel
    requests = [Request("", seed=seed, width=width, height=height, steps=1 + seed % 2) for seed in range(2 * count)]
    with compilations() as seconds:
        with compile_in_background() as start:
            known: dict[str, Any] = dict(dtype=dtype, placement=pipe.placement, shapes=pipe.params)
            known |= dict(tokenizer=pipe.tokenizer)
            start(programs_for(requests[0], pipe.config, batch_size, **known).values())
        for _ in pipe.batch(requests, batch_size=batch_size):  # of one step and of two, so that places are taken anew
            pass
    return seconds
