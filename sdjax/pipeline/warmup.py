"""Programs ahead of time: what pictures of a shape need, compiled before they are asked for."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.config import ModelConfig
from sdjax.devices.compilation import Lower, compilations, meanwhile
from sdjax.devices.placement import HERE, Placement
from sdjax.devices.platform import pinned
from sdjax.diffusion.sample import image_keys
from sdjax.diffusion.samplers import first_carry
from sdjax.image import load_image
from sdjax.models.params import abstract_params, dtype_of
from sdjax.pipeline import functions
from sdjax.pipeline.pipeline import Pipeline
from sdjax.pipeline.programs import programs
from sdjax.request import Request, plan, size_of, stacked
from sdjax.types import Params


@pinned
def programs_for(
    request: Request,
    config: ModelConfig,
    batch: int,
    *,
    dtype: str = "float32",
    placement: Placement = HERE,
    shapes: Params | None = None,
) -> dict[str, Lower]:
    """The programs that make pictures of a request's shape, by name; each is traced when it is called. paint is the
    whole loop, paint_row one step of it, for progress. Those that take longest to compile come first.

    batch: pictures at once on each device. shapes: of the parameters, if they are known (`checkpoint.metadata`). All is
    worked out from shapes: there need be no parameters, and the devices of `placement` may be described ones
    (`jax.experimental.topologies`).

    Raises:
        ValueError, FileNotFoundError: as `Pipeline.batch`.
    """
    width, height = size_of(request, config, None if request.image is None else load_image(request.image).size)
    total, cell = batch * placement.shares, config.vae.downscale

    def of_part(part: str, known: Params) -> Params:
        to = dtype_of(part, dtype)
        return jax.tree.map(lambda leaf: _struct(leaf.shape, to, placement.sharding(leaf)), known)

    def bound(tree: Any) -> Any:
        """What was computed with the parameters stays on their device."""
        if placement.devices is not None:
            return tree  # the programs say themselves where their arguments lie
        return jax.tree.map(lambda leaf: _struct(leaf.shape, leaf.dtype, placement.sharding(leaf)), tree)

    of_model = programs(config, placement)
    params = {part: of_part(part, known) for part, known in (shapes or abstract_params(config)).items()}
    text, unet = params["text"], params["unet"]
    ids = _struct((2, total, config.clip.length), jnp.int32)
    condition = partial(functions.condition, config=config, skip=request.clip_skip)
    kv = bound(jax.eval_shape(condition, text, unet, ids))
    rows, counts = stacked([plan(request, config)] * total)
    timed = bound(jax.eval_shape(partial(functions.time_tables, config=config), unet, rows))
    row = jax.tree.map(lambda leaf: _struct(leaf.shape[1:], leaf.dtype, leaf.sharding), timed)
    keys = jax.eval_shape(lambda: image_keys(range(total)))
    noise = _struct((total, height // cell, width // cell, config.vae.latent_channels))
    x = noise if request.image is None else bound(noise)  # like the encoded picture
    mask = _struct((*x.shape[:3], 1))
    extra = config.unet.in_channels - config.unet.out_channels
    concat = _struct((*x.shape[:3], extra))
    inputs = functions.Batch(kv, x, mask, bound(concat) if extra else concat)
    each, yes = _struct((total,)), _struct((total,), bool)
    carry, index = bound(jax.eval_shape(first_carry, x)), _struct((), jnp.int32)
    return {
        "paint": partial(of_model.paint.lower, unet, inputs, timed, counts, x, keys),
        "paint_row": partial(of_model.paint_row.lower, unet, inputs, keys, carry, row, index),
        "develop": partial(of_model.develop.lower, params["vae"], bound(x)),
        "condition": partial(of_model.condition(request.clip_skip).lower, text, unet, ids),
        "begin": partial(of_model.begin.lower, keys, noise, yes, each, x, mask, yes),
        "time_rows": partial(of_model.time_rows.lower, unet, rows),
    }


def _struct(shape: tuple[int, ...], dtype: Any = np.float32, sharding: Any = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def warm_up(pipe: Pipeline, width: int, height: int, batch: int) -> dict[str, float]:
    """Compiles, or reads from the cache, all that pictures of a size need, `batch` at a time on each device; seconds by
    program.

    For the whole loop (`Pipeline.batch`, and calls without progress) and for single steps (calls with progress).
    """
    count, dtype = batch * pipe.placement.shares, jax.tree.leaves(pipe.params["unet"])[0].dtype.name
    settings: dict[str, Any] = dict(width=width, height=height, steps=1, count=count, batch=batch)
    with compilations() as seconds:
        with meanwhile() as start:
            request = Request("", width=width, height=height)
            known = dict(dtype=dtype, placement=pipe.placement, shapes=pipe.params)
            start(programs_for(request, pipe.config, batch, **known).values())
        pipe.text_to_image("", **settings)
        pipe.text_to_image("", progress=lambda *_: None, **settings)
    return seconds
