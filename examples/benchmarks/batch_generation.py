"""What batches, one program for all settings, and devices are worth: each measure has both of its sides in one run.

    python examples/benchmarks/batch_generation.py [--model M] [--dtype float32] [--steps 20] [--rounds 3]
    XLA_FLAGS=--xla_force_host_platform_device_count=4 python examples/benchmarks/batch_generation.py --only devices

Every line is the median over rounds that take turns. Measures (--only takes one of these names):
    recompiles   compilations while 60 random recipes are made that differ in prompts (weights, schedules, AND, one
                 chunk or up to three), learnt words, adapters and their weights, and every setting, after the first of
                 each kind of shape
    loop         `functions.sample`, bounded at 64 rows, beside a scan of exactly as many rows as the pictures need
    exact        `pipe.on(batch_invariant=True)` beside the default
    devices      all devices beside one of them, as many pictures on each; simulated ones share the cores of one CPU
    job          `sdjax batch` beside a loop over single pictures in the same process, files included; and beside
                 `Pipeline.batch` without files, which tells how long the device is idle
    mixed        `sdjax batch` on a job of 10 to 60 steps, where a finished picture makes room for the next one, beside
                 batches that run to their end
    flush        `sdjax batch` beside itself without flushing anything to the disk (of the working folder)
    start        the first picture of a fresh process, with nothing kept and with programs kept, and one more picture
    full         pictures a second of Stable Diffusion 1.5 at 512x512 with random weights, --batch at once (1 8 32); for
                 a GPU, with --dtype bfloat16, and run only when named

The model in the box on two cores of an AMD EPYC (Zen 3), 2026-11-22, jax 0.10.2, --rounds 3, `loop` with 24 and
`devices` with four simulated ones; a noisy machine, where the same thing twice differed by up to 12 %:

    recompiles: 8 programs in the first 11.9 s; then 0 in 50 settings (11.3 s)
    loop: 0.388 s for 20 of 64 rows, 0.401 s for a scan of 20, pictures at once 1: ratio 0.968
    loop: 1.246 s for 20 of 64 rows, 1.276 s for a scan of 20, pictures at once 8: ratio 0.976
    exact: 3.51 s for 8 pictures, 1.81 s freely: ratio 1.94
    devices: 5.97 pictures a second on one, 10.54 on 4: 1.77 times as many
    job: 5.22 pictures a second by sdjax batch, 2.78 one after another: 1.87 times as many; 5.62 without recipes and
        files, so that the device waits 7.1% of the time for them
    start: first picture after 14.2 s, with programs kept 7.3 s, one more takes 0.37 s: 39 and 20 times that

On two cores of an Intel Xeon with AVX-512, 2026-11-22, --rounds 3:

    recompiles: 8 programs in the first 5.8 s; then 0 in 50 settings (7.0 s)
    loop: 0.174 s for 20 of 64 rows, 0.175 s for a scan of 20, pictures at once 1: ratio 0.995
    loop: 0.813 s for 20 of 64 rows, 0.804 s for a scan of 20, pictures at once 8: ratio 1.011
    exact: 1.47 s for 8 pictures, 0.90 s freely: ratio 1.64
    devices: 7.98 pictures a second on one, 15.17 on 4: 1.90 times as many
    job: 8.53 pictures a second by sdjax batch, 4.92 one after another: 1.74 times as many; 8.43 without recipes and
        files, so that the device waits 0.0% of the time for them
    start: first picture after 7.6 s, with programs kept 3.5 s, one more takes 0.20 s: 38 and 17 times that

    full: 0.0326 pictures a second, 1 at once (float32, 2 steps, 30.71 s)   [--only full --batch 1 --steps 2 --rounds 1]

On two cores of an AMD EPYC with AVX-512, 2026-11-26, --only recompiles, --only mixed --rounds 2 and --only flush
--rounds 6 (the lines on recompiles above are of 50 random settings with plain prompts, as they were then):

    recompiles: 7 programs in the first 60.0 s; then 0 in 60 random recipes (6.4 s)

    mixed: 10.15 pictures a second, 6.88 in batches that run to their end: 1.48 times as many

    flush: 3.65 s for 64 pictures in files that survive a power cut, 3.62 s for those that may not: +0.8%; the flushes
        themselves take 0.06 s, 1.5%, beside the device's work
    flush: 3.62 s for 64 pictures in shards that survive a power cut, 3.66 s for those that may not: -1.0%; the flushes
        themselves take 0.05 s, 1.3%, beside the device's work

The bound of `loop` is 1.02; four rounds before gave 1.002 and 1.006, three rounds in between 0.94 and 1.08 (Zen 3).
Simulated devices share the cores; what they gain is that one device alone leaves the second core idle at times.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np

import sdjax
from convert.adapters import write_adapter
from sdjax.config import SD15
from sdjax.devices.compilation import compilations
from sdjax.diffusion.samplers import SAMPLERS
from sdjax.diffusion.spacings import SPACINGS
from sdjax.jobs import run as jobs
from sdjax.models.params import cast, random_params
from sdjax.pipeline.adapters import Library
from sdjax.pipeline.batching import Batches, assemble, conditioned, initial, state_of
from sdjax.pipeline.functions import condition, initial_latents, sample
from sdjax.pipeline.pipeline import Pipeline
from sdjax.pipeline.recipe import recipe_of, save_picture
from sdjax.request import BATCH, Request, plan
from sdjax.text.embeddings import Embedding
from sdjax.text.tokenizer import clip_tokenizer

sys.path.insert(0, str(Path(__file__).parent))
from recipes import adapter


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def in_turns(rounds: int, *calls: Callable[[], Any]) -> list[float]:
    """The median seconds of each, every round running all of them, after one that does not count; every second round
    backwards, so that none always follows the same other.
    """
    times: list[list[float]] = [[] for _ in calls]
    for number in range(rounds + 1):
        for i in range(len(calls))[:: -1 if number % 2 else 1]:
            times[i].append(seconds(calls[i]))
    return [statistics.median(column[1:]) for column in times]


def recompiles(pipe: Pipeline, options: argparse.Namespace) -> None:
    """60 random recipes, after pictures of each kind of shape: one chunk and three, without adapters and with them."""
    draw, words = random.Random(0), ("red", "blue", "heart", "star", "grey", "cat", "learnt", "two words")
    with tempfile.TemporaryDirectory() as folder:
        names = []
        for i, rank in enumerate((4, 8, 16)):
            write_adapter(Path(folder) / f"lora{i}.safetensors", adapter(pipe.config, rank, i), pipe.config)
            names.append(f"lora{i}")
        rng = np.random.default_rng(0)
        width = pipe.config.clip.width
        learnt = [
            Embedding(word, rng.standard_normal((n, width), np.float32))
            for n, word in ((1, "learnt"), (4, "two words"))
        ]
        pipe = dataclasses.replace(
            pipe, library=Library(Path(folder)), embeddings=pipe.words.with_embeddings(learnt).learnt
        )

        def text(count: int) -> str:
            found = []
            for i in range(count):
                word, other = draw.choice(words), draw.choice(words)
                forms = [word, f"({word}:{draw.uniform(0.2, 1.6):.2f})", f"[{word}]"]
                turns = [f"[{word}:{other}:{draw.random():.2f}]", f"[{word}|{other}]"]
                found.append(draw.choice(forms + turns if i < 3 else forms))
            return ", ".join(found)

        def recipe(is_long: bool, with_loras: bool) -> dict[str, Any]:
            room = pipe.words.length
            prompt = text(draw.randint(room // 4, room // 2) if is_long else draw.randint(1, room // 8))
            if not is_long and draw.random() < 0.3:
                prompt += f" AND {draw.choice(words)} :{draw.uniform(-1, 1):.2f}"
            if with_loras:
                chosen = draw.sample(names, draw.randint(1, 3))
                prompt += "".join(f"<lora:{name}:{draw.uniform(-1, 1):.2f}:{draw.random():.2f}>" for name in chosen)
            return dict(
                prompt=prompt,
                negative_prompt=draw.choice(["", "grey", "(ugly:1.3), [bad|worse]"]),
                seed=draw.randrange(2**32 - 2),
                steps=draw.randint(1, 12),
                sampler=draw.choice(list(SAMPLERS)),
                spacing=draw.choice(list(SPACINGS)),
                guidance=draw.choice([1.0, draw.uniform(0, 12)]),
                guidance_rescale=draw.choice([0.0, draw.random()]),
                weighting=draw.choice(["a1111", "a1111", "comfy", "compel"]),
            )

        def made(recipes: list[dict[str, Any]]) -> None:
            requests = [Request(**one) for one in recipes]
            for picture in pipe.batch(requests, batch_size=2):
                del picture

        kinds = [(is_long, with_loras) for is_long in (False, True) for with_loras in (False, True)]
        with compilations() as first:
            seconds_of_first = seconds(lambda: made([recipe(*kind) for kind in kinds for _ in range(5)]))
        start = time.perf_counter()
        with compilations() as later:
            made([recipe(*draw.choice(kinds)) for _ in range(60)])
        took = time.perf_counter() - start
    print(
        f"recompiles: {len(first)} programs in the first {seconds_of_first:.1f} s; "
        f"then {len(later)} in 60 random recipes ({took:.1f} s)",
        flush=True,
    )


def loop(pipe: Pipeline, options: argparse.Namespace) -> None:
    config, request = pipe.config, Request("red heart", steps=options.steps, sampler="dpmpp_2m")
    planned = plan(request, config)
    for count in (1, BATCH):
        batch = assemble([pipe._prepared(request, {})] * count, config)
        given, kv = conditioned(partial(condition, config=config), pipe.params, batch)
        bounded = state_of(batch, initial(initial_latents, batch), (given, kv))
        by_row = dict(shifts=given.shifts, texts=given.texts, changed=given.changed)
        needed, fewer = jax.tree.map(lambda leaf: leaf[:, : planned.calls], (batch.rows, by_row))
        exactly = bounded._replace(rows=needed, given=given._replace(**fewer))
        bounded_seconds, static_seconds = in_turns(
            options.rounds,
            lambda state=bounded: sample(pipe.params, state, config=config).carry.x,
            lambda state=exactly: sample(pipe.params, state, config=config).carry.x,
        )
        print(
            f"loop: {bounded_seconds:.3f} s for {planned.calls} of {len(planned.rows.scale)} rows, "
            f"{static_seconds:.3f} s for a scan of {planned.calls}, pictures at once {count}: "
            f"ratio {bounded_seconds / static_seconds:.3f}",
            flush=True,
        )


def exact(pipe: Pipeline, options: argparse.Namespace) -> None:
    settings = dict(count=BATCH, steps=options.steps)
    one_by_one = pipe.on(jax.local_devices()[:1], batch_invariant=True)
    exact_seconds, free = in_turns(
        options.rounds,
        lambda: one_by_one.text_to_image("red heart", **settings) and None,
        lambda: pipe.text_to_image("red heart", **settings) and None,
    )
    print(
        f"exact: {exact_seconds:.2f} s for {BATCH} pictures, {free:.2f} s freely: ratio {exact_seconds / free:.2f}",
        flush=True,
    )


def devices(pipe: Pipeline, options: argparse.Namespace) -> None:
    there = jax.local_devices()
    everywhere = pipe.on(there)
    one, every = in_turns(
        options.rounds,
        lambda: pipe.text_to_image("red heart", count=BATCH, steps=options.steps) and None,
        lambda: everywhere.text_to_image("red heart", count=BATCH * len(there), steps=options.steps) and None,
    )
    print(
        f"devices: {BATCH / one:.2f} pictures a second on one, {BATCH * len(there) / every:.2f} on {len(there)}: "
        f"{one * len(there) / every:.2f} times as many",
        flush=True,
    )


def job(pipe: Pipeline, options: argparse.Namespace) -> None:
    count = 8 * BATCH

    def plain() -> None:
        with tempfile.TemporaryDirectory() as folder:
            for seed in range(count):
                request = Request("red heart", seed=seed, steps=options.steps)
                picture = pipe.text_to_image(request.prompt, seed=seed, steps=options.steps)[0]
                recipe = recipe_of(request, pipe.config.sampling, picture, model="", dtype="")
                save_picture(Path(folder) / f"{seed}.png", picture, recipe)

    def whole() -> None:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            lines = io.StringIO(json.dumps({"prompt": "red heart", "count": count, "steps": options.steps}))
            with jobs.at_work(out):
                jobs.prepare(lines, ".jsonl", out, {}, {}, skip_bad=False)
                jobs.run(pipe, out, model="", dtype="float32")

    def pictures_alone() -> None:
        requests = [Request("red heart", seed=seed, steps=options.steps) for seed in range(count)]
        for _ in pipe.batch(requests):
            pass

    in_job, alone, bare = in_turns(options.rounds, whole, plain, pictures_alone)
    print(
        f"job: {count / in_job:.2f} pictures a second by sdjax batch, {count / alone:.2f} one after another: "
        f"{alone / in_job:.2f} times as many; {count / bare:.2f} without recipes and files, so that the device waits "
        f"{max(0.0, 1 - bare / in_job):.1%} of the time for them",
        flush=True,
    )


def mixed(pipe: Pipeline, options: argparse.Namespace) -> None:
    """A job of 10 to 60 steps, with places taken anew and with batches that run to their end."""
    draw, count = random.Random(0), 32 * BATCH
    text = "".join(
        json.dumps({"prompt": "red heart", "seed": i, "steps": draw.randint(10, 60)}) + "\n" for i in range(count)
    )

    def whole() -> None:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            with jobs.at_work(out):
                jobs.prepare(io.StringIO(text), ".jsonl", out, {}, {}, skip_bad=False)
                jobs.run(pipe, out, model="", dtype="float32")

    def to_the_end() -> None:
        def together(batches: Batches, waiting: Any, shape: Any) -> Any:
            yield batches._together(waiting.take(shape, batches.size))

        with mock.patch.object(Batches, "_continuously", together):
            whole()

    anew, ended = in_turns(options.rounds, whole, to_the_end)
    print(
        f"mixed: {count / anew:.2f} pictures a second, {count / ended:.2f} in batches that run to their end: "
        f"{ended / anew:.2f} times as many",
        flush=True,
    )


def flush(pipe: Pipeline, options: argparse.Namespace) -> None:
    count, fsync = 8 * BATCH, os.fsync
    spent = 0.0

    def timed(number: int) -> None:
        nonlocal spent
        before = time.perf_counter()
        fsync(number)
        spent += time.perf_counter() - before

    def made(shards: bool, flushed: bool) -> None:
        os.fsync = timed if flushed else lambda number: None
        try:
            with tempfile.TemporaryDirectory(dir=".") as folder:
                out = Path(folder) / "out"
                lines = io.StringIO(json.dumps({"prompt": "red heart", "count": count, "steps": options.steps}))
                with jobs.at_work(out):
                    jobs.prepare(lines, ".jsonl", out, {}, {}, skip_bad=False)
                    jobs.run(pipe, out, model="", dtype="float32", shards=shards)
        finally:
            os.fsync = fsync

    for shards in (False, True):
        spent = 0.0
        calls = (partial(made, shards, flushed) for flushed in (True, False))
        with_it, without = in_turns(options.rounds, *calls)
        own = spent / (options.rounds + 1)
        print(
            f"flush: {with_it:.2f} s for {count} pictures in {'shards' if shards else 'files'} that survive a power "
            f"cut, {without:.2f} s for those that may not: {with_it / without - 1:+.1%}; the flushes themselves take "
            f"{own:.2f} s, {own / with_it:.1%}, beside the device's work",
            flush=True,
        )


def start(pipe: Pipeline, options: argparse.Namespace) -> None:
    settings = ["--steps", str(options.steps), "--dtype", options.dtype]
    settings += ["--model", options.model] if options.model else []
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "sdjax.cli", "txt2img", "red heart", *settings, "-o", f"{folder}/heart.png"]
        environment = {**os.environ, "SDJAX_CACHE": folder}

        def picture() -> None:
            subprocess.run(command, env=environment, check=True, capture_output=True)

        cold, kept = seconds(picture), min(seconds(picture) for _ in range(2))
    (steady,) = in_turns(options.rounds, lambda: pipe.text_to_image("red heart", steps=options.steps) and None)
    print(
        f"start: first picture after {cold:.1f} s, with programs kept {kept:.1f} s, one more takes {steady:.2f} s: "
        f"{cold / steady:.0f} and {kept / steady:.0f} times that"
    )


def full(_: Pipeline, options: argparse.Namespace) -> None:
    params = jax.device_put(cast(random_params(SD15), options.dtype))
    pipe = Pipeline(SD15, params, clip_tokenizer(), "sd15")
    for count in options.batch:
        settings = dict(count=count, batch_size=count, steps=options.steps)
        (took,) = in_turns(options.rounds, lambda settings=settings: pipe.text_to_image("a cat", **settings) and None)
        print(
            f"full: {count / took:.4f} pictures a second, {count} at once ({options.dtype}, {options.steps} steps, "
            f"{took:.2f} s)",
            flush=True,
        )


MEASURES = {measure.__name__: measure for measure in (recompiles, loop, exact, devices, job, mixed, flush, start, full)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="anything that sdjax.load takes (the model in the box)")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=list(MEASURES))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], help="of full: pictures at once (1 8 32)")
    options = parser.parse_args()
    pipe = sdjax.load(options.model, dtype=options.dtype)
    device = jax.local_devices()[0]
    print(f"{pipe.name} on {device.device_kind}, load {os.getloadavg()[0]:.1f}", flush=True)
    for name, measure in MEASURES.items():
        if options.only == name or (options.only is None and measure is not full):
            measure(pipe, options)


if __name__ == "__main__":
    main()
