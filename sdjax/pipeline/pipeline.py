"""A model ready for use: requests in, pictures out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from PIL import Image

from sdjax import image as images
from sdjax.config import ModelConfig
from sdjax.devices.placement import HERE, Placement, placement_on
from sdjax.devices.platform import pinned
from sdjax.pipeline.batching import Batches, Made, Progress
from sdjax.pipeline.prepare import Prepared, Sources, prepare
from sdjax.pipeline.programs import programs
from sdjax.request import BATCH, Request, check_positive, check_request, requests_for
from sdjax.text.tokenizer import Tokenizer
from sdjax.types import Params


@dataclass(frozen=True)
class Pipeline:
    """A model ready for use. It has no other state than

    config: what the model is.
    params: {"text", "vae", "unet"}, trees of arrays.
    tokenizer: of its text encoder.
    name: for messages.
    placement: the devices that it runs on (`on`).

    The three tasks take the settings of `Request` by keyword, and
        count: pictures of each prompt, with seeds seed, seed + 1, ...;
        batch_size: pictures made at once on each device;
        progress: called after every row of the sampler.
    Results come prompt by prompt, seeds in order within a prompt. A picture depends on its own prompt, settings and
    seed alone, not on what else is in the batch, nor on the devices: up to rounding, or to the bit (`batch_invariant`).
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
        model_parallel: int = 1,
        batch_invariant: bool = False,
        **earlier: Any,
    ) -> Pipeline:
        """The same pipeline over several devices; it puts the parameters there.

        devices: all local ones if left out.
        parallel, model_parallel, batch_invariant: see `Placement`.
        earlier: `model` and `exact`, the names that the last two had.

        Raises:
            ValueError: as `Placement`. TypeError: an option that is not known.
        """
        options = dict(parallel=parallel, model_parallel=model_parallel, batch_invariant=batch_invariant)
        options |= _renamed(earlier, {"model": "model_parallel", "exact": "batch_invariant"}, "on")
        placement = placement_on(jax.local_devices() if devices is None else devices, **options)
        return dataclasses.replace(self, params=placement.put(self.params), placement=placement)

    def text_to_image(
        self, prompt: str | Sequence[str], negative_prompt: str = "", **settings: Any
    ) -> list[Image.Image]:
        """Pictures for one prompt or several.

        settings: those of `Request`, and of `Pipeline` as above. noise may also be unit normal f32[b, h, w, c], a row
        for each picture.

        Raises:
            ValueError, TypeError: a setting is out of range or of the wrong kind; the message says what was expected.
        """
        for name in ("image", "mask", "strength"):
            if name in settings:
                raise TypeError(f"text_to_image starts from noise and has no {name}; see image_to_image and inpaint")
        return self._pictures(prompt, negative_prompt=negative_prompt, **settings)

    def image_to_image(
        self, prompt: str | Sequence[str], image: images.ImageLike, negative_prompt: str = "", **settings: Any
    ) -> list[Image.Image]:
        """Pictures that start from `image`, noised to `strength` (0: only through the autoencoder; 1: noise alone).

        Without width and height the results have the size of `image`. Raises as `text_to_image`, and FileNotFoundError.
        """
        return self._pictures(prompt, negative_prompt=negative_prompt, image=images.load_image(image), **settings)

    def inpaint(
        self,
        prompt: str | Sequence[str],
        image: images.ImageLike,
        mask: images.ImageLike,
        negative_prompt: str = "",
        **settings: Any,
    ) -> list[Image.Image]:
        """Pictures in which the white part of `mask` is regenerated; where it is black they are `image` to the byte.

        A model with 9 input channels sees the mask; with any other the known region is held at every step.
        Without width and height the results have the size of `image`. Raises as `image_to_image`.
        """
        settings |= dict(negative_prompt=negative_prompt, image=images.load_image(image), mask=mask)
        return self._pictures(prompt, **settings)

    def batch(
        self,
        requests: Iterable[Request],
        *,
        batch_size: int = BATCH,
        progress: Progress | None = None,
        on_error: Callable[[Request, Exception], None] | None = None,
        **earlier: Any,
    ) -> Iterator[tuple[Request, Image.Image]]:
        """Each request with its picture, as they become ready.

        Requests may differ in everything; those of one shape (size, clip_skip, up to 64 rows of a sampler, then up to
        128, ...) share one compiled program and run together. Each picture equals the one made alone. One that needs
        few steps does not wait for one with many: its place is taken by the next request. Requests are taken as they
        are needed: memory stays bounded over any number of them.

        batch_size: pictures at once on each device.
        progress: called after every row of the sampler; batches then run one after the other, each to its end.
        on_error: called for a request that cannot be made, and the others are; without it, and where `requests` itself
            fails, no more are taken, and the error is raised when those before it have been handed out.
        earlier: `batch`, the name that batch_size had.

        Raises:
            ValueError, TypeError, FileNotFoundError: as `text_to_image`.
            FloatingPointError: a picture came out as NaN or infinity.
        """
        batch_size = _batch_size(batch_size, earlier)
        _renamed(earlier, {}, "batch")
        return self._batch(requests, batch_size, progress, on_error, {})

    def _batch(
        self,
        requests: Iterable[Request],
        batch_size: int,
        progress: Progress | None,
        on_error: Callable[[Request, Exception], None] | None,
        sources: Sources,
    ) -> Iterator[tuple[Request, Image.Image]]:
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

        parts = self.placement.data_parallel
        batches = Batches(
            self.config,
            self.params,
            programs(self.config, self.placement),
            size=batch_size * parts,
            parts=parts,
            uniform=self.placement.model_parallel > 1,
            progress=progress,
        ).make(ready())
        before: Made | None = None
        while True:
            try:
                made = next(batches, None)  # under way while the batch before is handed out
            except Exception as error:  # too little memory, above all; what was made before is handed out all the same
                failed, made = failed or error, None
            if before is not None:
                yield from self._finished(before, fail)
            if made is None:
                break
            before = made
            if progress is not None:  # the batch is done: nothing else is under way
                yield from self._finished(made, fail)
                before = None
        if failed is not None:
            raise failed

    def _pictures(
        self,
        prompt: str | Sequence[str],
        *,
        count: int = 1,
        batch_size: int = BATCH,
        progress: Progress | None = None,
        **settings: Any,
    ) -> list[Image.Image]:
        """One request for each prompt and seed, all checked before the first is made."""
        count = settings.pop("num_images_per_prompt", count)
        batch_size = _batch_size(batch_size, settings)
        requests = requests_for(prompt, count=count, **settings)
        sources: Sources = {}
        self._prepared(requests[0], sources)  # all but prompt, seed and noise is the same in the others
        for request in requests[1:]:
            check_request(request, self.config, self.name)
        at_once = min(batch_size, -(-len(requests) // self.placement.data_parallel))
        made = {id(request): picture for request, picture in self._batch(requests, at_once, progress, None, sources)}
        return [made[id(request)] for request in requests]

    @pinned
    def _prepared(self, request: Request, sources: Sources) -> Prepared:
        """Checks a request and does all that can be done for it alone. sources: pictures that were encoded before."""
        config, clip, encode = self.config, self.config.clip, programs(self.config, self.placement).encode
        return prepare(
            request,
            config,
            self.name,
            tokenize=lambda texts: self.tokenizer(texts, clip.length, clip.pad_token),
            encode=lambda picture: encode(self.params, picture),
            sources=sources,
        )

    def _finished(
        self, made: Made, fail: Callable[[Request, Exception], None]
    ) -> Iterator[tuple[Request, Image.Image]]:
        """The pictures of a batch, fetched from the devices and fitted to what was asked for."""
        pictures, finite = images.to_images(made.pixels), np.asarray(made.finite)
        for place, one in made.requests:
            if finite[place]:
                yield one.request, one.source.finish(pictures[place])
                continue
            dtype = jax.tree.leaves(self.params["unet"])[0].dtype
            error = FloatingPointError(
                f"the picture of seed {one.request.seed} came out as NaN or infinity in {dtype}; try "
                f"{'float32' if dtype != np.float32 else 'less guidance, or another file of the model'}"
            )
            fail(one.request, error)


def _batch_size(batch_size: int, named: dict[str, Any]) -> int:
    """The size of batches, also under its earlier name `batch`, which is taken out of what is named."""
    name = "batch" if "batch" in named else "batch_size"
    batch_size = named.pop("batch", batch_size)
    check_positive(**{name: batch_size})
    return batch_size


def _renamed(given: dict[str, Any], names: dict[str, str], where: str) -> dict[str, Any]:
    """Options by their present names, where earlier ones were given. Raises TypeError for any other."""
    for name in given:
        if name not in names:
            raise TypeError(f"{where} has no option {name!r}")
    return {names[name]: value for name, value in given.items()}
