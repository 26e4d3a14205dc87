"""The pictures that people make: hires-fix, grids and random recipes, each measure with both of its sides in one run.

    python examples/benchmarks/hires_and_grids.py [--only recompiles|hires|grid] [--model M] [--rounds 3]

Measures:
    recompiles   compilations while 60 random recipes are made that differ in sampler, spacing, eta, churn, source of
                 the noise, variations, prompt travel, masks (blend and differential), outpainting, hires-fix (upscaler,
                 steps, strength, sampler, prompt), tiling and everything else, after the first of each kind of shape:
                 plain or tiled, noise drawn in the program or before it, from a picture, and noise of another size
    hires        a picture of two passes beside the sum of its two passes made by themselves (bar: 1.05 at the most)
    grid         64 pictures by `sdjax grid` beside making them one by one, files included (bar: 1.5 times as fast)

The model in the box on two cores of an AMD EPYC, 2026-11-27, jax 0.10.2, --rounds 9; no GPU was lent:

    recompiles: 9 programs in the first of each kind (36.3 s); then 0 in 60 random recipes (6.5 s)
    hires: 0.27 s for 64x64 and 128x128 by latent, 0.12 + 0.16 s for its passes by themselves: ratio 0.967
    hires: 0.26 s for 64x64 and 128x128 by lanczos, 0.10 + 0.15 s for its passes by themselves: ratio 1.015
    grid: 3.33 s for 64 pictures and their sheet by sdjax grid, loading the model included, 5.89 s one by one: 1.77
        times as fast

The run before, on the same machine, gave 0.93 and 1.00 for `hires` and 1.52 for `grid`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import sdjax
from sdjax.cli.run import run as command_line
from sdjax.devices.compilation import compilations
from sdjax.diffusion.names import CHURN, UPSCALERS
from sdjax.diffusion.samplers import SAMPLERS
from sdjax.diffusion.spacings import SPACINGS
from sdjax.diffusion.upscale import upscaled_picture
from sdjax.pipeline.pipeline import Pipeline
from sdjax.pipeline.recipe import recipe_of, save_picture
from sdjax.request import Request

sys.path.insert(0, str(Path(__file__).parent))
from batch_generation import in_turns, seconds


def random_recipe(draw: random.Random, pipe: Pipeline, *, tiling: bool, drawn: bool) -> Request:
    """A recipe of one kind of shape. drawn: whether the noise of its sampler is drawn before the program runs."""
    words = ("red heart", "blue star", "(grey:1.3) cat", "[red:blue:0.5] heart", "cat AND star :0.4")
    side = pipe.config.image_size
    sampler = draw.choice([name for name, one in SAMPLERS.items() if one.stochastic or not drawn])
    if drawn and sampler == "restart":  # which adds noise from 20 steps on
        sampler = "euler_a"
    said: dict[str, Any] = dict(
        prompt=draw.choice(words),
        negative_prompt=draw.choice(["", "ugly", "(bad:1.2)"]),
        seed=draw.randrange(2**32 - 2),
        steps=draw.randint(3, 12),
        sampler=sampler,
        spacing=draw.choice(list(SPACINGS)),
        guidance=draw.uniform(1, 10),
        guidance_interval=draw.choice([(0.0, 1.0), (0.2, 0.8)]),
        tiling=tiling,
        noise=draw.choice(["torch", "torch-cuda"]) if drawn else "jax",
    )
    if "eta" in SAMPLERS[sampler].options and sampler != "ddim":
        said["eta"] = draw.uniform(0.5, 1)
    if "s_churn" in SAMPLERS[sampler].options:
        said |= dict(zip(CHURN, (draw.uniform(0, 5), 0.1, 10.0), strict=True))
    if said["spacing"] in ("karras", "polyexponential"):
        said["rho"] = draw.uniform(1, 8)
    if draw.random() < 0.3:
        said |= dict(variation_seed=draw.randrange(2**31), variation_strength=draw.random())
    if draw.random() < 0.2:
        said["seed_size"] = f"{side}x{side // 2}"
    if draw.random() < 0.2:
        said |= dict(prompt="red heart", to_prompt="blue star", travel=draw.random())
    which = draw.random()
    if which < 0.4:
        said |= dict(
            hires_scale=2,
            hires_upscaler=draw.choice(UPSCALERS),
            hires_steps=draw.randint(2, 8),
            hires_strength=draw.uniform(0.2, 1),
            hires_sampler=sampler if drawn else draw.choice(["euler", "dpmpp_2m", "heun"]),
            hires_spacing=draw.choice(list(SPACINGS)),
            hires_prompt=draw.choice(["", "a heart"]) if "to_prompt" not in said else "",
        )
    elif which < 0.8:
        pixels = np.random.default_rng(draw.randrange(99)).integers(0, 256, (side, side, 3), np.uint8)
        said |= dict(image=Image.fromarray(pixels), strength=draw.uniform(0.3, 1), width=side, height=side)
        if which < 0.7:
            ramp = np.tile(np.linspace(0, 255, side).astype(np.uint8), (side, 1))
            said |= dict(mask=Image.fromarray(ramp), soft_mask=draw.choice(["blend", "differential"]))
        if which < 0.5:
            said |= dict(outpaint=draw.choice(["left=16", "top=8,right=8"]), feather=draw.randint(0, 8))
    if said["guidance"] and sampler.endswith("cfg_pp"):
        said["guidance"] = draw.uniform(0.3, 1)
    return Request(**said)


def recompiles(pipe: Pipeline, options: argparse.Namespace) -> None:
    draw = random.Random(0)
    kinds = [dict(tiling=tiling, drawn=drawn) for tiling in (False, True) for drawn in (False, True)]

    def made(requests: list[Request]) -> int:
        return sum(1 for _ in pipe.batch(requests, batch_size=2))

    warm = []
    for kind in kinds:  # each kind of program, once: two passes, a picture to start from, places that are filled again
        for upscaler, steps in (("latent", 3), ("lanczos", 5), ("latent", 4), ("lanczos", 3), ("latent", 6)):
            noise = dict(noise="torch", sampler="euler_a") if kind["drawn"] else {}
            warm.append(
                Request(
                    "red heart", steps=steps, hires_scale=2, hires_upscaler=upscaler, tiling=kind["tiling"], **noise
                )
            )
    side = pipe.config.image_size
    photo = Image.new("RGB", (side, side), "red")
    for tiling in (False, True):
        warm += [Request("red heart", image=photo, strength=0.5 + 0.1 * i, steps=4, tiling=tiling) for i in range(2)]
    warm.append(
        Request("red heart", steps=2, variation_seed=1, variation_strength=0.5, seed_size=f"{side}x{side // 2}")
    )
    for more in ({}, {"hires_scale": 2}):
        warm.append(Request("red heart", steps=2, variation_seed=1, variation_strength=0.5, **more))
    with compilations() as first:
        took_first = seconds(lambda: made(warm))
    with compilations() as later:
        took = seconds(lambda: made([random_recipe(draw, pipe, **draw.choice(kinds)) for _ in range(60)]))
    print(
        f"recompiles: {len(first)} programs in the first of each kind ({took_first:.1f} s); then {len(later)} in 60 "
        f"random recipes ({took:.1f} s){': ' if later else ''}{', '.join(later)}",
        flush=True,
    )


def hires(pipe: Pipeline, options: argparse.Namespace) -> None:
    side = pipe.config.image_size
    for upscaler in ("latent", "lanczos"):
        both = dict(hires_scale=2, hires_upscaler=upscaler, hires_strength=0.5, hires_steps=10)

        def first() -> Image.Image:
            return pipe.text_to_image("red heart", seed=1, steps=20)[0]

        picture = upscaled_picture(first(), (2 * side, 2 * side), "lanczos")

        def second(picture: Image.Image = picture) -> Image.Image:
            return pipe.image_to_image("red heart", picture, seed=1, steps=20, strength=0.5)[0]

        calls = (lambda both=both: pipe.text_to_image("red heart", seed=1, steps=20, **both), first, second)
        whole, one, two = in_turns(options.rounds, *calls)
        print(
            f"hires: {whole:.2f} s for {side}x{side} and {2 * side}x{2 * side} by {upscaler}, {one:.2f} + {two:.2f} s "
            f"for its passes by themselves: ratio {whole / (one + two):.3f}",
            flush=True,
        )


def grid(pipe: Pipeline, options: argparse.Namespace) -> None:
    axes = ["--x", "guidance=2,3,4,5,6,7,8,9", "--y", "sampler=ddim,euler,euler_a,heun,dpmpp_2m,dpmpp_2m_sde,unipc,lcm"]
    samplers, scales = axes[3].partition("=")[2].split(","), [float(x) for x in axes[1].partition("=")[2].split(",")]
    requests = [Request("red heart", seed=1, steps=15, sampler=name, guidance=g) for name in samplers for g in scales]

    def by_grid() -> None:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            command_line(["grid", "red heart", "--seed", "1", "--steps", "15", *axes, "-o", f"{folder}/grid"])
            assert len(list(Path(folder, "grid").rglob("*.png"))) >= 65

    def one_by_one() -> None:
        with tempfile.TemporaryDirectory() as folder:
            for i, request in enumerate(requests):
                (_, picture), *_ = pipe.batch([request], batch_size=1)
                recipe = recipe_of(request, pipe.config.sampling, picture, model="", dtype="float32")
                save_picture(Path(folder) / f"{i}.png", picture, recipe)

    together, alone = in_turns(options.rounds, by_grid, one_by_one)
    print(
        f"grid: {together:.2f} s for 64 pictures and their sheet by sdjax grid, loading the model included, "
        f"{alone:.2f} s one by one: {alone / together:.2f} times as fast",
        flush=True,
    )


MEASURES = {"recompiles": recompiles, "hires": hires, "grid": grid}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=MEASURES)
    parser.add_argument("--model", help="the one in the box")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    pipe = sdjax.load(options.model, dtype=options.dtype)
    for name in [options.only] if options.only else MEASURES:
        MEASURES[name](pipe, options)


if __name__ == "__main__":
    main()
