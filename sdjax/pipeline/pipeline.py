"""A model ready for use: requests in, pictures out."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from PIL import Image

from sdjax import image as images
from sdjax.config import ModelConfig
from sdjax.devices.placement import HERE, Placement, placement_on
from sdjax.devices.platform import pinned
from sdjax.models.adapters import merged
from sdjax.pipeline.adapters import Adapting, Library, digest_of_adapter, read_learnt
from sdjax.pipeline.batching import Batches, Made, Progress
from sdjax.pipeline.prepare import Prepared, Sources, prepare
from sdjax.pipeline.programs import encoder, programs_of_kind
from sdjax.request import BATCH, Request, check_positive, check_request, need, parse_sides, requests_for
from sdjax.storage.cache import digest_of
from sdjax.text.embeddings import Embedding, Vocabulary
from sdjax.text.prompt import Vectors, Words, chunks, lay_out, read, single
from sdjax.text.syntax import LoraTag, check_strength, lora_of
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
    library: where adapters are found that requests name.
    embeddings: learnt words that prompts may hold.

    The three tasks take the settings of `Request` by keyword, and
        count: pictures of each prompt, with seeds seed, seed + 1, ..., or with as many variations of one seed;
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
    library: Library = field(default_factory=Library)
    embeddings: Vocabulary | None = None

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

    def with_adapters(self, adapters: Mapping[str | Path, float | tuple[float, float] | Sequence[float]]) -> Pipeline:
        """The same pipeline with adapters (LoRA, LyCORIS) merged into its parameters: nothing is compiled anew.

        adapters: file -> its weight, or (weight of the UNet, weight of the text encoder).

        Raises:
            FileNotFoundError: there is no such file. ValueError: it is no adapter, or one for another model.
        """
        tags = []
        for file, weights in adapters.items():
            pair = weights if isinstance(weights, tuple | list) else (weights, weights)
            need(len(pair) == 2, f"the weight of {file}", "a number, or (of the UNet, of the text encoder)", weights)
            unet, text = pair
            tags.append(check_strength(LoraTag(str(file), text, unet)))
        wanted = self.library.wanted(tags, self.config)
        learnt = [Embedding(name, v, str(one.source)) for one, _ in wanted for name, v in one.embeddings.items()]
        words = self.words.with_embeddings(learnt)
        return dataclasses.replace(self, params=merged(self.params, wanted, self.config), embeddings=words.learnt)

    def with_embeddings(self, *paths: str | Path) -> Pipeline:
        """The same pipeline with learnt words (textual inversion), each called by its trigger in prompts.

        paths: files, or folders of them.

        Raises:
            FileNotFoundError: there is no such file. ValueError: it is no embedding, or one for another model.
        """
        found, notes = read_learnt(paths, self.config)
        for note in notes:
            warnings.warn(note, stacklevel=2)
        return dataclasses.replace(self, embeddings=self.words.with_embeddings(found).learnt)

    @property
    def words(self) -> Words:
        """What prompts become tokens by."""
        return Words(self.tokenizer, self.config.clip.length, self.config.clip.vocab_size, self.embeddings)

    def encode(self, prompts: str | Sequence[str], *, weighting: str = "a1111", clip_skip: int | None = None) -> Any:
        """Prompts as the UNet attends to them, f32[rows, d] each; as a request's prompt they give the same picture.

        prompts: one, or several that are encoded to the same length, so that there is something between them
            (`sdjax.text.prompt.interpolated`).
        weighting, clip_skip: as in `Request`.

        Raises:
            ValueError: a prompt has a schedule, parts or networks, which numbers cannot say.
        """
        clip, encoded = self.config.clip, []
        need(isinstance(prompts, str) or len(prompts) > 0, "prompts", "a string, or a list of at least one", prompts)
        for text in [prompts] if isinstance(prompts, str) else prompts:
            check_request(Request(text, weighting=weighting, clip_skip=clip_skip), self.config, self.name)
            found = single(text, weighting, "encode")
            laid = lay_out(
                read(""), found, self.words, rows=1, weighting=weighting, pad_token=clip.pad_token, width=clip.width
            )
            prompts_of_one = jax.tree.map(lambda leaf: leaf[None], laid)
            contexts = encoder(self.config, self.placement, clip_skip)(self.params, prompts_of_one)
            encoded.append(np.asarray(contexts[0, :2], np.float32)[:, : int(laid.own[1]) * clip.length])
        longest = max(len(pair[1]) for pair in encoded)
        empty = [np.tile(pair[0, : clip.length], ((longest - len(pair[1])) // clip.length, 1)) for pair in encoded]
        rows = [np.concatenate([pair[1], rest]) for pair, rest in zip(encoded, empty, strict=True)]
        return rows[0] if isinstance(prompts, str) else rows

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
        mask: images.ImageLike | None = None,
        negative_prompt: str = "",
        **settings: Any,
    ) -> list[Image.Image]:
        """Pictures in which the white part of `mask` is regenerated; where it is black they are `image` to the byte.

        With `outpaint` the picture is extended, and the mask may be left out.
        A model with 9 input channels sees the mask; with any other the known region is held at every step.
        Without width and height the results have the size of `image`, extended. Raises as `image_to_image`.
        """
        if mask is None and not any(parse_sides(settings.get("outpaint"))):
            raise ValueError("inpaint needs a mask, or outpaint")
        settings |= dict(negative_prompt=negative_prompt, image=images.load_image(image), mask=mask)
        return self._pictures(prompt, **settings)

    def batch(
        self,
        requests: Iterable[Request],
        *,
        batch_size: int = BATCH,
        progress: Progress | None = None,
        on_error: Callable[[Request, Exception], None] | None = None,
        live_adapters: bool = True,
        **earlier: Any,
    ) -> Iterator[tuple[Request, Image.Image]]:
        """Each request with its picture, as they become ready.

        Requests may differ in everything; those of one shape (size, clip_skip, up to 64 rows of a sampler, then up to
        128, ..., and whether these add PyTorch's noise) share one compiled program and run together. Each picture
        equals the one made alone. One that needs few steps does not wait for one with many: its place is taken by the
        next request. Requests are taken as they are needed: memory stays bounded over any number of them.

        batch_size: pictures at once on each device.
        progress: called after every row of the sampler; batches then run one after the other, each to its end.
        on_error: called for a request that cannot be made, and the others are; without it, and where `requests` itself
            fails, no more are taken, and the error is raised when those before it have been handed out.
        live_adapters: whether pictures with different adapters share batches; else each set of adapters is merged into
            the parameters for the pictures that have it, and no step costs more (always so with `batch_invariant`).
        earlier: `batch`, the name that batch_size had.

        Raises:
            ValueError, TypeError, FileNotFoundError: as `text_to_image`.
            FloatingPointError: a picture came out as NaN or infinity.
        """
        batch_size = _batch_size(batch_size, earlier)
        _renamed(earlier, {}, "batch")
        return self._batch(requests, batch_size, progress, on_error, {}, self._adapting(live_adapters))

    def _batch(
        self,
        requests: Iterable[Request],
        batch_size: int,
        progress: Progress | None,
        on_error: Callable[[Request, Exception], None] | None,
        sources: Sources,
        adapting: Adapting,
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
                    yield self._prepared(request, sources, adapting)
                except (ValueError, TypeError, OSError) as error:
                    fail(request, error)

        parts = self.placement.data_parallel
        batches = Batches(
            self.config,
            self.params,
            partial(programs_of_kind, self.config, self.placement),
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
        adapting = self._adapting(False)
        self._prepared(requests[0], sources, adapting)  # all but prompt, seed and noise is the same in the others
        for request in requests[1:]:
            check_request(request, self.config, self.name)
        at_once = min(batch_size, -(-len(requests) // self.placement.data_parallel))
        pictures = self._batch(requests, at_once, progress, None, sources, adapting)
        made = {id(request): picture for request, picture in pictures}
        return [made[id(request)] for request in requests]

    def files_of(self, request: Request) -> dict[str, dict[str, str]]:
        """The adapters and embeddings that a request uses: {"adapters", "embeddings"}, each path -> sha256."""
        prompt, negative = request.prompt, request.negative_prompt
        if not isinstance(prompt, str) or not isinstance(negative, str):
            return {"adapters": {}, "embeddings": {}}
        wanted = (prompt, request.to_prompt, request.hires_prompt)
        unwanted = (negative, request.hires_negative_prompt)
        return _files_of(self.library, self.words, wanted, unwanted, request.weighting, tuple(request.loras))

    def _adapting(self, live: bool) -> Adapting:
        """Whoever came first has the first ranks of a bank, which rounds in another way: to the bit they are merged."""
        return Adapting(self.config, self.placement, self.library, live and not self.placement.batch_invariant)

    @pinned
    def _prepared(self, request: Request, sources: Sources, adapting: Adapting | None = None) -> Prepared:
        """Checks a request and does all that can be done for it alone.

        sources: pictures that were encoded before. adapting: adapters that are in use; None: it is alone.
        """

        def encode(picture: np.ndarray) -> Any:
            of_kind = programs_of_kind(self.config, self.placement, tiling=request.tiling)
            return of_kind.encode(self.params, picture)

        return prepare(
            request,
            self.config,
            self.name,
            words=self.words,
            encode=encode,
            sources=sources,
            adapt=adapting or self._adapting(True),
        )

    def _finished(
        self, made: Made, fail: Callable[[Request, Exception], None]
    ) -> Iterator[tuple[Request, Image.Image]]:
        """The pictures of a batch, fetched from the devices and fitted to what was asked for."""
        pictures, finite = images.to_images(made.pixels), np.asarray(made.finite)
        for place, one in made.requests:
            request = one.request if one.origin is None else one.origin
            if finite[place]:
                yield request, one.source.finish(pictures[place])
                continue
            dtype = jax.tree.leaves(self.params["unet"])[0].dtype
            error = FloatingPointError(
                f"the picture of seed {request.seed} came out as NaN or infinity in {dtype}; try "
                f"{'float32' if dtype != np.float32 else 'less guidance, or another file of the model'}"
            )
            fail(request, error)


@lru_cache(maxsize=1024)
def _files_of(
    library: Library,
    words: Words,
    wanted: tuple[str, ...],
    unwanted: tuple[str, ...],
    weighting: str,
    loras: tuple[str, ...],
) -> dict[str, dict[str, str]]:
    """The same of prompts, and of negative prompts; empty ones use nothing."""
    tags, vectors = [*map(lora_of, loras)], Vectors(words.vocab_size)
    texts = [(text, negative) for negative, group in ((False, wanted), (True, unwanted)) for text in group if text]
    for text, negative in texts if words.learnt or any("<" in text for text in wanted) else ():
        found = read(text, weighting, steps=1000, negative=negative)
        tags += found.loras
        for part in found.parts if words.learnt else ():
            for each in dict.fromkeys(each for _, each in part.texts):
                chunks(each, words, vectors, weighting)
    paths = {str(path): path for path in (library.find(tag.name) for tag in tags)}
    learnt = dict.fromkeys(embedding.source for embedding in vectors.used.values() if embedding.source)
    return {
        "adapters": {name: digest_of_adapter(path) for name, path in paths.items()},
        "embeddings": {name: digest_of(Path(name)) for name in learnt},
    }


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
