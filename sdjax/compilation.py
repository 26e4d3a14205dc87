"""Compiled programs: kept on disk between processes, and made ahead of time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax import functions
from sdjax.checkpoint import dtype_of
from sdjax.config import ModelConfig
from sdjax.diffusion.sample import image_keys
from sdjax.diffusion.samplers import first_carry
from sdjax.image import load_image
from sdjax.models.params import abstract_params
from sdjax.pipeline import Pipeline
from sdjax.request import Request, plan, size_of, stacked
from sdjax.sharding import HERE, Placement
from sdjax.storage.files import refuse_unwritable
from sdjax.target import pinned
from sdjax.types import Params

COMPILED = "/jax/core/compile/backend_compile_duration"
"""JAX's event for a program that was compiled, or read from the cache."""

WORTH_KEEPING = 0.2
"""Seconds of compilation from which a program is kept."""


def keep_programs(folder: Path) -> None:
    """From here on this process reads compiled programs from `folder`, and puts new ones there.

    Programs are found by what they compute, JAX's version and the device; a changed one is compiled anew.

    Raises:
        OSError: the folder is not there and cannot be made, or cannot be written into.
    """
    folder.mkdir(parents=True, exist_ok=True)
    refuse_unwritable(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH_KEEPING)


def drop_damaged(warning: str) -> str:
    """What to tell of a warning. If it is JAX's of a kept program that cannot be read, one that a kill cut off while it
    was written, all of that name are thrown away, since JAX neither says which it was nor writes over it.
    """
    found = re.search(r"Error reading persistent compilation cache entry for '(\w+)'", warning)
    if found is None:
        return warning
    folder = Path(jax.config.values["jax_compilation_cache_dir"])
    for path in folder.glob(f"{found[1]}-*-cache"):
        path.unlink(missing_ok=True)
    return f"a compiled program in {folder} was damaged; it is compiled and kept anew"


Lower = Callable[[], jax.stages.Lowered]
"""Traces a program, for arguments that are fixed."""


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

    of_model = functions.programs(config, placement)
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


@contextmanager
def meanwhile() -> Iterator[Callable[[Iterable[Lower]], None]]:
    """Compiles programs at the side, all at once, while the inside does something else; at the end waits for them.

    A call of the program then finds it compiled. What cannot be compiled says so there. Tracing is Python, of which one
    thread runs at a time: programs are traced one after the other, the first before `start` returns, so that nothing
    holds up its compilation.
    """
    with ThreadPoolExecutor() as pool, ThreadPoolExecutor(1) as tracer:

        def trace(lower: Lower) -> None:
            with suppress(Exception):
                pool.submit(lower().compile)

        def start(programs: Iterable[Lower]) -> None:
            first, *others = programs
            trace(first)
            for lower in others:
                tracer.submit(trace, lower)

        yield start


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


@contextmanager
def compilations() -> Iterator[dict[str, float]]:
    """Seconds of every program that is compiled inside, by its name; of several with one name, the sum."""
    found: dict[str, float] = {}
    listening = True

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if listening and event == COMPILED:
            name = str(kwargs.get("fun_name", "unnamed")).removeprefix("jit(").removesuffix(")")
            found[name] = found.get(name, 0.0) + duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        listening = False  # JAX offers no way to take a listener back
