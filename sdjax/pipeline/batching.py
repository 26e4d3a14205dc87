"""Many pictures at once: prepared requests become the arguments of the programs, and take places side by side.

`assemble` alone puts arguments together: what is compiled ahead of time is made from the same function, so the two
cannot drift. `make` runs the programs. A picture that needs few steps does not wait for one with many: when it is
finished its place is taken by the next request of the same shape (continuous batching).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from sdjax.config import ModelConfig
from sdjax.devices.platform import pinned
from sdjax.diffusion.plan import stack_plans
from sdjax.diffusion.rows import Carry, Rows
from sdjax.diffusion.sample import State, image_keys
from sdjax.pipeline.prepare import Prepared, noise_of
from sdjax.pipeline.programs import Programs
from sdjax.text.prompt import Prompts
from sdjax.types import Array, Conditioning, Latent, Params

T = TypeVar("T")

WAITING = 8
"""Batches of requests that may wait for others of their shape."""

Progress = Callable[[int, int, Latent], None]
"""Called after every row of the sampler with (rows done, rows in all, x0_hat f32[b, h, w, c])."""


class Arguments(NamedTuple):
    """What the programs take for a batch, on the host; pictures along the first axis of every leaf.

    prompts: of each picture.
    gates: f[b, sections, R], each picture's weights of the ranks of live adapters.
    rows: each picture's sampler, leaves [b, s, ...]; calls: i32[b], how many of them run.
    key: key[b]. noise: f32[b, h, w, c], to start from where drawn bool[b] is false.
    sigma: f32[b], the level to start at; pure: bool[b], whether from noise alone.
    known, concat: f32[b, h, w, ...], as `Conditioning`. mask: f32[b, h, w, 1], where to start from noise; held: the
    same, where the known region is held at every step (for a model that sees the mask, nowhere).
    noises: f32[b, s, h, w, c], what each row adds; None: drawn from the keys (`State`).
    """

    prompts: Prompts
    gates: Any
    rows: Rows
    calls: Any
    key: Array
    noise: Any
    drawn: Any
    sigma: Any
    pure: Any
    known: Any
    mask: Any
    held: Any
    concat: Any
    noises: Any = None


def assemble(prepared: Sequence[Prepared], config: ModelConfig, *, uniform: bool = False) -> Arguments:
    """Requests of one shape -> the arguments of a batch of them. uniform: see `stack_plans`."""
    rows, calls = stack_plans([one.plan for one in prepared], uniform=uniform)
    known, mask, concat = (
        _joined([getattr(one.source, name) for one in prepared]) for name in ("known", "mask", "concat")
    )
    given = {id(one): noise_of(one) for one in prepared}  # once for all copies of a picture that fill up a batch
    first, added = zip(*(given[id(one)] for one in prepared), strict=True)
    noise = np.zeros(known.shape, np.float32)
    for row, own in zip(noise, first, strict=True):
        row[:] = 0 if own is None else own
    return Arguments(
        prompts=_stacked([one.prompts for one in prepared], uniform=uniform),
        gates=np.stack([one.gates for one in prepared]),
        rows=rows,
        calls=calls,
        key=image_keys([one.request.seed for one in prepared]),
        noise=noise,
        drawn=np.array([own is None for own in first]),
        sigma=np.array([one.plan.sigma for one in prepared], np.float32),
        pure=np.array([one.pure for one in prepared]),
        known=known,
        mask=_at_start(mask, rows),
        held=np.ones(mask.shape, np.float32) if config.unet.in_channels == 9 else mask,
        concat=concat,
        noises=None if added[0] is None else np.stack(added),
    )


def _at_start(mask: Any, rows: Rows) -> Any:
    """Where pictures start from noise: of a differential mask, where it is free at the first level."""
    threshold = rows.levels.threshold[:, 0, None, None, None]
    return np.where(threshold < 0, mask, mask >= threshold).astype(np.float32)


def _stacked(prompts: Sequence[Prompts], *, uniform: bool) -> Prompts:
    """The prompts of a batch. uniform: as `stack_plans`, pictures take the same branches."""
    stacked: Prompts = jax.tree.map(lambda *leaves: np.stack(leaves), *prompts)
    if uniform:
        stacked.changed[:] = stacked.changed.any(axis=0, keepdims=True)
        stacked.count[:] = stacked.count.max()
        stacked.mixed[:] = stacked.mixed.any()
        stacked.parts[:] = stacked.parts.max()
    return stacked


def conditioned(condition: Callable[..., T], params: Params, batch: Arguments) -> T:
    """What a `condition` program, or the lowering of one, makes of a batch."""
    return condition(params, batch.prompts, batch.rows, batch.gates, batch.known, batch.held, batch.concat)


def initial(initial_latents: Callable[..., T], batch: Arguments) -> T:
    """The same of `initial_latents`."""
    return initial_latents(batch.key, batch.noise, batch.drawn, batch.sigma, batch.pure, batch.known, batch.mask)


def state_of(batch: Arguments, carry: Carry, given: tuple[Conditioning, Any]) -> State:
    """The state before the first step. given: what a `condition` program made."""
    conditioning, kv = given
    index = np.zeros(len(batch.calls), np.int32)
    return State(carry, index, batch.rows, batch.calls, batch.key, conditioning, kv, batch.noises)


def _joined(arrays: list[Any]) -> Any:
    """Along the first axis, on the host, which takes no program."""
    return np.concatenate([np.asarray(array) for array in arrays])


class Waiting:
    """Prepared requests that wait for others of their shape; no more are taken in than `bound` at a time."""

    def __init__(self, ready: Iterator[Prepared], bound: int) -> None:
        self.ready, self.bound = ready, bound
        self.by_shape: dict[tuple[Any, ...], list[Prepared]] = {}
        self.is_last = False

    def _take_in(self) -> bool:
        """One more, if there is one and a place for it."""
        if self.is_last or sum(map(len, self.by_shape.values())) >= self.bound:
            return False
        one = next(self.ready, None)
        self.is_last = one is None
        if one is not None:
            self.by_shape.setdefault(one.shape, []).append(one)
        return one is not None

    def add(self, one: Prepared) -> None:
        """A second pass, whose first one is done. While many wait, no further requests are taken in."""
        self.by_shape.setdefault(one.shape, []).append(one)

    def next_shape(self, enough: int) -> tuple[Any, ...] | None:
        """The first shape of which there are enough, else the one of which there are most; None at the end."""
        while True:
            for shape, same in self.by_shape.items():
                if len(same) >= enough:
                    return shape
            if not self._take_in():
                return max(self.by_shape, key=lambda shape: len(self.by_shape[shape]), default=None)

    def take(self, shape: tuple[Any, ...], count: int, ahead: int = 0) -> list[Prepared]:
        """The next `count` of a shape, or as many as can be had; of the last ones those that need most steps, so that
        they do not come to an end alone.

        ahead: number of further requests that are looked at, so that the end is seen before it comes.
        """
        while len(self.by_shape.get(shape, ())) < count + ahead and self._take_in():
            pass
        same = self.by_shape.pop(shape, [])
        chosen = list(range(len(same)))
        if self.is_last:
            chosen = sorted(sorted(chosen, key=lambda i: -same[i].plan.calls)[:count])
        taken = [same[i] for i in chosen[:count]]
        if rest := [one for i, one in enumerate(same) if i not in set(chosen[:count])]:
            self.by_shape[shape] = rest
        return taken


class Made(NamedTuple):
    """Pictures that are finished, or will be when the devices have come to them.

    requests: each with its place in the batch, in the order in which they came.
    pixels: u8[b, H, W, 3]. finite: bool[b].
    """

    requests: list[tuple[int, Prepared]]
    pixels: Array
    finite: Array


@dataclass
class Batches:
    """Makes pictures on a model's programs, many at once.

    programs: called with `tiling`, the programs for such pictures.
    size: places for pictures on all devices together.
    parts: parts that the places are divided into, one for each device (or group of devices that share parameters).
    uniform: every batch runs to its end, all parts taking the same branches (`stack_plans`).
    progress: called after every row; every batch then runs to its end. Without these two a picture that is finished
        makes room for the next one.
    order: the places in the order in which they are filled, one after the other on each part.
    """

    config: ModelConfig
    params: Params
    programs: Callable[..., Programs]
    size: int
    parts: int = 1
    uniform: bool = False
    progress: Progress | None = None
    order: list[int] = field(init=False)
    waiting: Waiting = field(init=False)

    def __post_init__(self) -> None:
        each = self.size // self.parts
        self.order = [part * each + place for place in range(each) for part in range(self.parts)]

    def make(self, ready: Iterator[Prepared]) -> Iterator[Made]:
        """Pictures of all requests, in batches as they become ready; memory stays bounded over any number of them."""
        waiting = self.waiting = Waiting(ready, WAITING * self.size)
        while (shape := waiting.next_shape(self.size)) is not None:
            if self.uniform or self.progress is not None:
                yield from self._together(waiting.take(shape, self.size))
            else:
                yield from self._continuously(waiting, shape)

    def _at_places(self, requests: Sequence[Prepared], free: Sequence[int]) -> list[Prepared | None]:
        """Requests at the free places, one after the other on each part of the devices."""
        places: list[Prepared | None] = [None] * self.size
        for place, one in zip((place for place in self.order if place in free), requests, strict=False):
            places[place] = one
        return places

    @pinned
    def _started(self, places: Sequence[Prepared | None]) -> State:
        """The state before the first step; places without a request are filled with a copy that never runs."""
        some = next(one for one in places if one is not None)
        batch = assemble([one or some for one in places], self.config, uniform=self.uniform)
        batch.calls[[one is None for one in places]] = batch.calls.max() if self.uniform else 0
        given = conditioned(self.programs().condition(some.request.clip_skip), self._params(some), batch)
        return state_of(batch, initial(self.programs().initial_latents, batch), given)

    def _programs(self, one: Prepared) -> Programs:
        """The programs for pictures of one shape."""
        return self.programs(tiling=one.request.tiling)

    def _params(self, one: Prepared) -> Params:
        """The parameters for pictures of one shape: with the adapters that these share."""
        return self.params if one.weights is None else one.weights.params(self.params)

    def _sampled(self, one: Prepared, state: State, ticks: int) -> State:
        """The state of pictures of the same shape as `one`, after some steps."""
        carry, index, held = self._programs(one).sample(self._params(one), state, np.int32(ticks))
        return state._replace(carry=carry, index=index, held=held)

    @pinned
    def _decoded(self, places: Sequence[Prepared | None], latents: Latent) -> list[Made]:
        """The finished pictures, decoded; of those with a second pass none, which goes to the requests that wait."""
        requests = [(place, one) for place in self.order if (one := places[place]) is not None]
        again = [(place, one.second) for place, one in requests if one.second is not None]
        last = [(place, one) for place, one in requests if one.second is None]
        made = None
        if last or any(second.sees_picture for _, second in again):
            of_model = self._programs(requests[0][1])
            made = Made(last, *of_model.to_bytes(of_model.decode(self.params, latents)))
        if again:
            on_host = np.asarray(latents)
            pixels = None if made is None else np.asarray(made.pixels)
            for place, second in again:
                self.waiting.add(second.started(on_host[place], None if pixels is None else pixels[place]))
        return [made] if made is not None and last else []

    def _together(self, requests: Sequence[Prepared]) -> Iterator[Made]:
        """A batch that runs to its end."""
        places = self._at_places(requests, range(self.size))
        state = self._started(places)
        calls = max(one.plan.calls for one in requests)
        for done in range(1, calls + 1) if self.progress is not None else ():
            state = self._sampled(requests[0], state, 1)
            self.progress(done, calls, state.carry.x0_hat)  # type: ignore[misc]
        if self.progress is None:
            state = self._sampled(requests[0], state, calls)
        yield from self._decoded(places, state.carry.x)

    def _continuously(self, waiting: Waiting, shape: tuple[Any, ...]) -> Iterator[Made]:
        """All requests of a shape that can be had, each on its place as soon as one is free.

        Three sets of places: pictures under way; those that are conditioned and wait for a place; and those that are
        finished and wait to be decoded. A picture stays on its part of the devices.
        """
        each = self.size // self.parts
        nobody: list[Prepared | None] = [None] * self.size
        under, left = list(nobody), np.zeros(self.size, int)
        fresh, fresh_state = list(nobody), None
        done, latents = list(nobody), None
        queue: list[Prepared] = []

        def moves(what: Sequence[int], free: Sequence[int]) -> dict[int, int]:
            """Place -> free place, on the same part of the devices, as far as there are any."""
            pairs: dict[int, int] = {}
            for part in range(self.parts):
                of_part = [[place for place in places if place // each == part] for places in (what, free)]
                pairs |= dict(zip(*of_part, strict=False))
            return pairs

        def local(pairs: dict[int, int]) -> np.ndarray:
            """The same as `admit` takes it: for each place which one comes there, counted within its part."""
            places = np.full(self.size, -1, np.int32)
            for source, target in pairs.items():
                places[target] = source % each
            return places

        state = None
        while True:
            # Nothing is under way: the next batch starts as a whole
            if state is None:
                queue += waiting.take(shape, self.size - len(queue))
                if not queue:
                    break
                under, queue = self._at_places(queue, range(self.size)), []
                state = self._started(under)
                left = np.array([0 if one is None else one.plan.calls for one in under])

            # Finished pictures make room
            finished = [place for place in self.order if under[place] is not None and left[place] == 0]
            if finished and not left.any() and not any(done) and not any(fresh):
                yield from self._decoded([one if left[i] == 0 else None for i, one in enumerate(under)], state.carry.x)
                under, state = list(nobody), None
                continue
            while finished:
                pairs = moves(finished, [place for place in self.order if done[place] is None])
                if pairs:
                    if latents is None:
                        latents = state.carry.x
                    latents = self.programs().admit(latents, state.carry.x, local(pairs))
                    for source, target in pairs.items():
                        done[target], under[source] = under[source], None
                    finished = [place for place in finished if place not in pairs]
                if finished or all(done):
                    assert latents is not None
                    yield from self._decoded(done, latents)
                    done, latents = list(nobody), None

            # The next requests take the free places
            while True:
                free = [place for place in self.order if under[place] is None]
                pairs = moves([place for place in self.order if fresh[place] is not None], free)
                if pairs:
                    state = self.programs().admit(state, fresh_state, local(pairs))
                    for source, target in pairs.items():
                        one = fresh[source]
                        assert one is not None
                        under[target], left[target], fresh[source] = one, one.plan.calls, None
                starved = {place // each for place in self.order if under[place] is None}
                starved -= {place // each for place in self.order if fresh[place] is not None}
                if starved and not queue:
                    queue = waiting.take(shape, self.size, ahead=self.size)
                if not starved or not queue:
                    break
                if waiting.is_last:
                    queue.sort(key=lambda one: -one.plan.calls)
                places = [place for place in self.order if fresh[place] is None]
                added = self._at_places(queue, places)
                fresh = [old or new for old, new in zip(fresh, added, strict=True)]
                queue = queue[len(places) :]
                fresh_state = self._started(fresh)

            # On to the next picture that will be finished, or to the end if nobody waits for its place
            if not any(under):
                break
            running = left[left > 0]
            if len(running):
                ticks = int(running.max())
                if running.min() < ticks:
                    queue = queue or waiting.take(shape, self.size, ahead=self.size)
                    if queue or any(fresh):
                        ticks = int(running.min())
                state = self._sampled(next(one for one in under if one is not None), state, ticks)
                left = np.maximum(left - ticks, 0)
        if any(done):
            assert latents is not None
            yield from self._decoded(done, latents)
