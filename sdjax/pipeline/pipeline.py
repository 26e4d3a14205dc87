"""A model ready for use: requests in, pictures out.

`Pipeline` checks what it is given, prepares it on the host, groups it into batches, and has them made by the programs
of `sdjax.pipeline.functions`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from sdjax import image as images
from sdjax.config import ModelConfig
from sdjax.devices.placement import HERE, Placement, over
from sdjax.devices.platform import pinned
from sdjax.diffusion.sample import image_keys, row_by_row
from sdjax.diffusion.torch_noise import torch_noise
from sdjax.pipeline.functions import Batch, encode_images, inpainting_channels
from sdjax.pipeline.programs import programs
from sdjax.request import (
    BATCH,
    STRENGTHS,
    Plan,
    Request,
    check_request,
    check_settings,
    plan,
    size_of,
    stacked,
)
from sdjax.text.tokenizer import Tokenizer
from sdjax.types import Array, Latent, Params

SOURCES = 64
"""Prepared pictures that are kept for later requests with the same one."""

WAITING = 8
"""Batches of requests that may wait for others of their shape."""


Progress = Callable[[int, int, Latent], None]
"""Called after every row of the sampler with (rows done, rows in all, x0_hat f32[b, h, w, 4])."""


class Source(NamedTuple):
    """What a request's picture has become, one row each. known: its scaled latents, or zeros; mask: ones where nothing
    is kept; concat: what an inpainting model sees besides. finish: from what the model made to what was asked for.
    """

    size: tuple[int, int]
    known: Any
    mask: Any
    concat: Any
    finish: Callable[[Image.Image], Image.Image]


Sources = dict[Any, Source]
"""Prepared pictures by the content of picture and mask, and the size asked for."""


class Prepared(NamedTuple):
    """A request that is ready to run. shape: only jobs of one shape can run together."""

    request: Request
    plan: Plan
    source: Source
    texts: tuple[str, str]  # negative, positive
    from_noise: bool
    shape: tuple[Any, ...]


@dataclass(frozen=True)
class Pipeline:
    """A model ready for use: configuration, parameters {"text", "vae", "unet"}, tokenizer, name, and where it runs. No
    other state.

    Settings that all three tasks share are the fields of `Request`, by keyword, and besides
        count: pictures of each prompt, with seeds seed, seed + 1, ...; batch: pictures made at once on each device;
        progress: called after every row of the sampler.
    Results come prompt by prompt, seeds in order within a prompt. A picture depends on its own prompt, settings and
    seed alone, not on what else is in the batch, nor on the devices: up to rounding, or to the bit (`on`).
    """

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer
    name: str = "unnamed"
    placement: Placement = HERE

    def on(
        self,
        devices: Sequence[jax.Device] | None = None,
        *,
        parallel: Literal["jit", "pmap"] = "jit",
        model: int = 1,
        exact: bool = False,
    ) -> Pipeline:
        """The same pipeline over several devices, all local ones if left out; it puts the parameters there.

        parallel: "jit" (`jax.shard_map` inside) or "pmap". model: devices to split each parameter over. exact: the bits
        of a picture depend neither on its batch nor on the number of devices (`sharding.Placement`).

        Raises:
            ValueError: as `Placement`.
        """
        chosen = jax.local_devices() if devices is None else devices
        placement = over(chosen, parallel=parallel, model=model, exact=exact)
        return dataclasses.replace(self, params=placement.put(self.params), placement=placement)

    def text_to_image(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str = "",
        *,
        width: int | None = None,
        height: int | None = None,
        noise: str | Array = "jax",
        **settings: Any,
    ) -> list[Image.Image]:
        """Pictures for one prompt or several. width, height: multiples of 8, the model's own size if left out.

        noise: "jax", "torch" (PyTorch's for the same seeds), or unit normal f32[b, h, w, 4] to start from.

        Raises:
            ValueError, TypeError: a setting is out of range or of the wrong kind; the message says what was expected.
        """
        for name in ("image", "mask", "strength"):
            if name in settings:
                raise TypeError(f"text_to_image starts from noise and has no {name}; see image_to_image and inpaint")
        return self._pictures(prompt, negative_prompt, noise, width=width, height=height, **settings)

    def image_to_image(
        self,
        prompt: str | Sequence[str],
        image: images.ImageLike,
        negative_prompt: str = "",
        *,
        strength: float = STRENGTHS["img2img"],
        width: int | None = None,
        height: int | None = None,
        noise: str | Array = "jax",
        **settings: Any,
    ) -> list[Image.Image]:
        """Pictures that start from `image` noised to `strength` (0: only through the autoencoder; 1: noise alone).

        Without width and height the results have the size of `image`. Raises as `text_to_image`, and FileNotFoundError.
        """
        settings |= dict(image=images.load_image(image), strength=strength, width=width, height=height)
        return self._pictures(prompt, negative_prompt, noise, **settings)

    def inpaint(
        self,
        prompt: str | Sequence[str],
        image: images.ImageLike,
        mask: images.ImageLike,
        negative_prompt: str = "",
        *,
        strength: float = STRENGTHS["inpaint"],
        width: int | None = None,
        height: int | None = None,
        noise: str | Array = "jax",
        **settings: Any,
    ) -> list[Image.Image]:
        """Pictures in which the white part of `mask` is made anew; where it is black they are `image` to the byte.

        A model with 9 input channels sees the mask; with any other the known region is held at every step.
        Without width and height the results have the size of `image`. Raises as `image_to_image`.
        """
        settings |= dict(image=images.load_image(image), mask=mask, strength=strength, width=width, height=height)
        return self._pictures(prompt, negative_prompt, noise, **settings)

    def batch(
        self,
        requests: Iterable[Request],
        *,
        batch: int = BATCH,
        on_error: Callable[[Request, Exception], None] | None = None,
    ) -> Iterator[tuple[Request, Image.Image]]:
        """Each request with its picture, as they become ready: requests of one size run together, `batch` at a time on
        each device.

        Requests may differ in everything; those of one shape (size, clip_skip, up to 64 rows of a sampler, then up to
        128, ...) share one compiled program, and each picture equals the one made alone. Requests are taken as they are
        needed: memory stays bounded over any number of them. What is left at the end runs in batches filled up with
        copies. on_error: called for a request that cannot be made, and the others go on; without it, and where
        `requests` itself fails, no more are taken, and the error is raised when those before it have been handed out.

        Raises:
            ValueError, TypeError, FileNotFoundError: as `text_to_image`.
            FloatingPointError: a picture came out as NaN or infinity.
        """
        check_settings(batch=batch)
        batch *= self.placement.shares
        waiting: dict[tuple[Any, ...], list[Prepared]] = {}
        sources: Sources = {}

        failed: Exception | None = None

        def fail(request: Request, error: Exception) -> None:
            nonlocal failed
            if on_error is None:
                failed = failed or error
            else:
                on_error(request, error)

        def ready() -> Iterator[Prepared]:
            """The requests, prepared, up to the first error that nobody takes."""
            nonlocal failed
            taken = iter(requests)
            while failed is None:
                try:
                    request = next(taken)
                except StopIteration:
                    return
                except Exception as error:  # of whoever gives the requests
                    failed = error
                    return
                try:
                    yield self._prepared(request, sources)
                except (ValueError, TypeError, OSError) as error:
                    fail(request, error)

        def batches() -> Iterator[list[Prepared]]:
            for one in ready():
                same = waiting.setdefault(one.shape, [])
                same.append(one)
                if len(same) == batch:
                    yield waiting.pop(one.shape)
                elif sum(map(len, waiting.values())) >= WAITING * batch:
                    yield waiting.pop(max(waiting, key=lambda shape: len(waiting[shape])))
            yield from waiting.values()

        before: tuple[list[Prepared], tuple[Array, Array]] | None = None
        for part in batches():
            try:
                result = self._run(part, batch, None)  # under way while the batch before is handed out
            except Exception as error:  # too little memory, above all; what was made before is handed out all the same
                failed = failed or error
                break
            if before is not None:
                yield from self._finished(*before, fail)
            before = part, result
        if before is not None:
            yield from self._finished(*before, fail)
        if failed is not None:
            raise failed

    def _pictures(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str,
        noise: str | Array,
        /,
        *,
        seed: int = 0,
        count: int = 1,
        batch: int = BATCH,
        progress: Progress | None = None,
        **settings: Any,
    ) -> list[Image.Image]:
        """One request for each prompt and seed, in batches."""
        check_settings(prompts=[prompt] if isinstance(prompt, str) else prompt, seed=seed, count=count, batch=batch)
        prompts = [prompt] if isinstance(prompt, str) else prompt
        total = len(prompts) * count
        if not isinstance(noise, str) and (np.ndim(noise) != 4 or len(noise) != total):
            raise ValueError(f"noise must have the shape ({total}, h, w, c), found {np.shape(noise)}")
        own: list[Any] = [noise] * total if isinstance(noise, str) else list(noise)
        requests = [
            Request(text, negative_prompt, seed + j, noise=own[i * count + j], **settings)
            for i, text in enumerate(prompts)
            for j in range(count)
        ]
        sources: Sources = {}
        ready = [self._prepared(request, sources) for request in requests]
        shares = self.placement.shares
        batch = min(batch, -(-total // shares)) * shares
        results: list[Image.Image] = []
        for first in range(0, total, batch):
            part = ready[first : first + batch]
            results += [picture for _, picture in self._finished(part, self._run(part, batch, progress), _raise)]
        return results

    @pinned
    def _prepared(self, request: Request, sources: Sources) -> Prepared:
        """Checks a request and does all that can be done for it alone. sources: pictures that were prepared before."""
        config = self.config
        full = check_request(request, config, self.name)
        worked_out = plan(full, config)
        files = (request.image, request.mask)
        key = (*(None if file is None else images.content_hash(file) for file in files), request.width, request.height)
        if key not in sources:
            if len(sources) >= SOURCES:
                del sources[next(iter(sources))]
            sources[key] = self._source(request)
        source = sources[key]
        latent = source.known.shape[1:]
        if not isinstance(request.noise, str) and np.shape(request.noise) != latent:
            raise ValueError(f"noise must have the shape {latent} for each picture, found {np.shape(request.noise)}")
        texts = ("" if full.guidance == 1 else request.negative_prompt, request.prompt)
        shape = (source.size, request.clip_skip, len(worked_out.rows.scale))
        return Prepared(request, worked_out, source, texts, request.image is None or full.strength == 1, shape)

    def _source(self, request: Request) -> Source:
        """The picture and mask of a request, encoded, or what stands for them in text to image."""
        config, params = self.config, self.params["vae"]
        pixels = pixels_of(request, config)
        shape = (1, pixels.size[1] // config.vae.downscale, pixels.size[0] // config.vae.downscale)
        known: Any = np.zeros((*shape, config.vae.latent_channels), np.float32)
        concat: Any = np.zeros((*shape, 0), np.float32)
        if request.image is not None:
            known = encode_images(params, jnp.asarray(pixels.picture), config=config)
        if config.unet.in_channels == 9:
            arrays = jnp.asarray(pixels.picture), jnp.asarray(pixels.mask)
            concat = inpainting_channels(params, *arrays, config=config)
        return Source(pixels.size, known, pixels.cells, concat, pixels.finish)

    @pinned
    def _run(self, part: list[Prepared], batch: int, progress: Progress | None) -> tuple[Array, Array]:
        """Requests of one shape -> pictures u8[batch, H, W, 3], and whether each is finite, bool[batch].

        A short batch is filled up with copies of the last.
        """
        config, params = self.config, self.params
        whole = part + part[-1:] * (batch - len(part))
        texts = [one.texts[0] for one in whole] + [one.texts[1] for one in whole]
        ids = self.tokenizer(texts, config.clip.length, config.clip.pad_token)
        if ids.max() >= config.clip.vocab_size:
            raise ValueError(
                f"the tokenizer has tokens up to {ids.max()} and the model {config.clip.vocab_size}; "
                "use the tokenizer that belongs to the model"
            )
        of_model = programs(config, self.placement)
        condition = of_model.condition(whole[0].request.clip_skip)
        kv = condition(params["text"], params["unet"], ids.reshape(2, len(whole), -1))
        rows, counts = stacked([one.plan for one in whole], alike=self.placement.model > 1)
        rows = of_model.time_rows(params["unet"], rows)
        known, mask, concat = (
            _joined([getattr(one.source, name) for one in whole]) for name in ("known", "mask", "concat")
        )
        keys = image_keys([one.request.seed for one in whole])
        own = np.array([isinstance(one.request.noise, str) and one.request.noise == "jax" for one in whole])
        given = np.zeros(known.shape, np.float32)
        for i in np.flatnonzero(~own):
            given[i] = _noise(whole[i].request, given.shape[1:])
        sigma = np.array([one.plan.sigma for one in whole], np.float32)
        x = of_model.begin(keys, given, own, sigma, known, mask, np.array([one.from_noise for one in whole]))
        free = config.unet.in_channels == 9  # a model that sees the mask
        held = np.ones(mask.shape, np.float32) if free else mask
        inputs = Batch(kv, known, held, concat)
        if progress is None:
            latents = of_model.paint(params["unet"], inputs, rows, counts, x, keys)
        else:
            latents, count = x, int(counts.max())
            run = partial(of_model.paint_row, params["unet"], inputs, keys)
            for done, (after, x0_hat) in enumerate(row_by_row(run, rows, x, inputs, count), 1):
                progress(done, count, x0_hat)
                latents = after
        return of_model.develop(params["vae"], latents)

    def _finished(
        self,
        part: list[Prepared],
        result: tuple[Array, Array],
        fail: Callable[[Request, Exception], None],
    ) -> Iterator[tuple[Request, Image.Image]]:
        pictures, finite = images.to_images(result[0]), np.asarray(result[1])
        for ready, picture, good in zip(part, pictures, finite, strict=False):  # without what filled the batch up
            if good:
                yield ready.request, ready.source.finish(picture)
                continue
            dtype = jax.tree.leaves(self.params["unet"])[0].dtype
            error = FloatingPointError(
                f"the picture of seed {ready.request.seed} came out as NaN or infinity in {dtype}; try "
                f"{'float32' if dtype != np.float32 else 'less guidance, or another file of the model'}"
            )
            fail(ready.request, error)


def _raise(_: Request, error: Exception) -> None:
    raise error


class Pixels(NamedTuple):
    """A request's picture and mask on the host, as the networks will see them. size: (width, height) to work at.

    picture: f32[1, H, W, 3], zeros without one; mask: f32[1, H, W, 1], and cells: f32[1, h, w, 1], of the latent's
    grid; ones without a mask. finish: from what the model made to what was asked for.
    """

    size: tuple[int, int]
    picture: np.ndarray
    mask: np.ndarray
    cells: np.ndarray
    finish: Callable[[Image.Image], Image.Image]


def pixels_of(request: Request, config: ModelConfig) -> Pixels:
    """Opens and fits the picture and the mask of a request; no network is needed for it.

    Raises:
        FileNotFoundError: no such file. ValueError: it cannot be read, or the mask does not fit or paints nothing.
    """
    cell = config.vae.downscale
    if request.image is None:
        size = size_of(request, config, None)
        empty = np.zeros((1, size[1], size[0], config.vae.image_channels), np.float32)
        whole = np.ones((1, size[1], size[0], 1), np.float32)
        return Pixels(size, empty, whole, images.latent_mask(whole, cell), lambda result: result)
    original = images.load_image(request.image)
    size = size_of(request, config, original.size)
    asked, picture = request.width is not None, images.fit(original, size)
    array, whole = images.to_array(picture)[None], np.ones((1, size[1], size[0], 1), np.float32)
    if request.mask is None:
        return Pixels(
            size,
            array,
            whole,
            images.latent_mask(whole, cell),
            lambda result: result if asked else _resized(result, original.size),
        )
    given = images.load_mask(request.mask, original.size)
    fitted = images.load_mask(images.fit(Image.fromarray(np.round(given * 255).astype(np.uint8)), size), size)
    whole = fitted[None, ..., None]
    cells = images.latent_mask(whole, cell)
    if not cells.any():
        raise ValueError(f"the mask is too fine and would paint nothing; make it {cell} pixels wide or more")

    def finish(result: Image.Image) -> Image.Image:
        if asked:
            return images.paste_back(picture, result, fitted)
        return images.paste_back(original, _resized(result, original.size), given)

    return Pixels(size, array, whole, cells, finish)


def _joined(arrays: list[Any]) -> Any:
    """Along the first axis; numpy arrays on the host, which takes no program."""
    numpy = all(isinstance(array, np.ndarray) for array in arrays)
    return np.concatenate(arrays) if numpy else jnp.concatenate(arrays)


def _noise(request: Request, shape: tuple[int, ...]) -> Any:
    """Unit normal noise f32[h, w, c] that does not come from JAX: the request's own, or PyTorch's."""
    if not isinstance(request.noise, str):
        return request.noise
    height, width, channels = shape
    return torch_noise(request.seed, (channels, height, width)).transpose(1, 2, 0)


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)
