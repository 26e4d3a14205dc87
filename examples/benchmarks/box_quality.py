"""How well the model in the box draws what it is told: one table, the same numbers at every run.

    python examples/make_emoji.py emoji
    python examples/benchmarks/box_quality.py emoji sdjax/assets/box [--out DIR] [--curves]

The model may be any that examples/train_box.py wrote; its figures stand in the README.

Pictures are compared pixel by pixel: the distance of two is the root of the summed squared differences of their RGB
values in [0, 1]. A picture's rank is the number of gallery pictures at least as near as the one that its caption names;
top-1 is the share of rank 0, top-5 of ranks below 5. The gallery is all base emoji, trained on or not; for skin tones
all pictures.

The colour of a picture is the median, per channel, of its pixels that are not white (a channel below 0.8), and it is
called by the nearest of the references: for each word of COLOURS the mean colour of the trained "<word> heart",
"<word> circle" and "<word> square", and white. The table also says how many of the true pictures this rule gets right.

--out writes quality.json, sheets of pictures and, with --curves, top-1 over guidance and over steps for every sampler.
On two CPU cores it takes five minutes, with --curves about forty.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

import sdjax
from sdjax.config import BOX_VISION
from sdjax.diffusion.samplers import SAMPLERS
from sdjax.image import from_uint8, to_uint8
from sdjax.models.clip import ImageEncoder, TextEncoder
from sdjax.pipeline.functions import decode, encode
from sdjax.pipeline.pipeline import Pipeline
from sdjax.storage.checkpoint import read_tensors
from sdjax.train.plots import curves, sheet

BATCH = 32
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black", "grey", "pink")
SHAPES = ("heart", "circle", "square")
COLOUR_SEEDS = 3
NOT_WHITE = 204  # of 255
EMPTY_PROMPTS = 32
CURVE_CAPTIONS = 64
CURVE_GUIDANCE = (1, 2, 3, 4, 6, 8, 10)
CURVE_STEPS = (2, 5, 10, 20, 50)

TABLE = (
    ("VAE PSNR on {unseen} base emoji never seen, dB", "{psnr:.1f}", "28", "30"),
    (
        "text-to-image retrieval R@1 / R@5, {queries} names over {gallery:,}",
        "{recall1:.3f} / {recall5:.3f}",
        "0.90 / 0.98",
        "0.95 / 0.99",
    ),
    (
        "generation, {captions} names x {seeds} seeds: nearest of {gallery:,} is the named one, top-1 / top-5",
        "{top1:.3f} / {top5:.3f}",
        "0.80 / 0.90",
        "0.95 / 0.98",
    ),
    ("mean squared error to the named picture in [0, 1]", "{error:.4f}", "0.02", "0.01"),
    ("the same at guidance 1: top-1 / top-5", "{plain_top1:.3f} / {plain_top5:.3f}", "reported", ""),
    (
        "held-out colour combinations, of {colour_pictures}: colour right / colour and shape right",
        "{colour_right} / {colour_and_shape}",
        "20 / reported",
        "22 / 12",
    ),
    ("held-out skin tones, {tones} names x {seeds} seeds: top-5 over {all:,}", "{tone_top5:.3f}", "0.5", "0.7"),
    ("seconds per picture, warm: batch 8 / one alone", "{seconds8:.2f} / {seconds1:.2f}", "0.6", "0.2"),
    (
        "seconds for the first picture of a fresh process, nothing compiled yet / programs kept",
        "{seconds_first:.1f} / {seconds_kept:.1f}",
        "15",
        "5",
    ),
    ("guard: top-1 with shuffled captions", "{shuffled_top1:.3f}", "chance, {chance:.3f}", ""),
    ("guard: mean distance between pictures of the empty prompt, per value", "{empty_spread:.3f}", "not 0", ""),
    ("guard: the same between the named emoji themselves", "{true_spread:.3f}", "", ""),
    ("guard: colour rule on the {unseen_colours} true pictures", "{true_colours}", "all", ""),
)
"""Measure, value, bar and aim of each row, filled in with the results."""


# Measures: arrays in, numbers out. Pictures are u8[n, H, W, 3], results in the unit of pixels in [0, 1].


def squared_distances(pictures: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """Summed squared differences of every picture to every one of the gallery, f64[n, g], without rounding."""
    a, b = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (pictures, gallery))
    return ((a * a).sum(1)[:, None] - 2 * a @ b.T + (b * b).sum(1)) / 255**2


def ranks(distances: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """How many of the others are at least as near as the true one, i64[n]; ties count against it.

    distances f[n, g]; truth i[n]: column of the true one.
    """
    own = distances[np.arange(len(truth)), truth]
    return (distances <= own[:, None]).sum(1) - 1


def top(places: np.ndarray, k: int) -> float:
    """The share of ranks below k."""
    return float((places < k).mean())


def squared_errors(pictures: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The mean squared error of each picture, f64[n]."""
    return np.square((pictures.astype(np.float64) - truth) / 255).mean((1, 2, 3))


def psnr(pictures: np.ndarray, truth: np.ndarray) -> float:
    """The mean over the pictures of -10 log10(mean squared error), in dB; infinite if one is reproduced exactly."""
    with np.errstate(divide="ignore"):
        return float((-10 * np.log10(squared_errors(pictures, truth))).mean())


def recall_ranks(text: np.ndarray, image: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Ranks by cosine: embeddings of texts f[n, d] and of a gallery of pictures f[g, d], truth i[n]."""
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (text, image))
    return ranks(-(a @ b.T), truth)


def main_colour(picture: np.ndarray) -> np.ndarray:
    """The median RGB f64[3] in [0, 1] of the pixels that are not white; white if there are none. u8[H, W, 3]."""
    coloured = picture[picture.min(-1) < NOT_WHITE]
    return np.median(coloured, axis=0) / 255 if len(coloured) else np.ones(3)


def reference_colours(names: Sequence[str], pictures: np.ndarray) -> dict[str, np.ndarray]:
    """Word of COLOURS -> mean colour of the pictures named "<word> <shape>"; and white.

    Raises:
        ValueError: no picture has a colour and a shape for its name.
    """
    found: dict[str, list[np.ndarray]] = {}
    for name, picture in zip(names, pictures, strict=True):
        if is_colour_and_shape(name):
            found.setdefault(name.split()[0], []).append(main_colour(picture))
    if not found:
        raise ValueError(f"no picture is named a colour and a shape ({', '.join(SHAPES)}); expected emoji of both")
    return {word: np.mean(colours, axis=0) for word, colours in found.items()} | {"white": np.ones(3)}


def is_colour_and_shape(name: str) -> bool:
    words = name.split()
    return len(words) == 2 and words[0] in COLOURS and words[1] in SHAPES


def colours_right(names: Sequence[str], pictures: np.ndarray, references: Mapping[str, np.ndarray]) -> np.ndarray:
    """Whether the reference nearest to each picture's colour is that of the first word of its name, bool[n]."""
    called = [
        min(references, key=lambda word: float(np.linalg.norm(references[word] - main_colour(picture))))
        for picture in pictures
    ]
    return np.array([word == name.split()[0] for word, name in zip(called, names, strict=True)])


def spread(pictures: np.ndarray) -> float:
    """The root mean squared difference of a value between two of the pictures, averaged over all pairs."""
    pairs = squared_distances(pictures, pictures)[np.triu_indices(len(pictures), 1)]
    return float(np.sqrt(pairs / pictures[0].size).mean())


# Running the model


@dataclass(frozen=True)
class Emoji:
    """All pictures u8[n, H, W, 3] of the data set with names, the `base` first ones without a skin tone."""

    names: list[str]
    pictures: np.ndarray
    trained: np.ndarray  # bool[n]
    base: int

    @property
    def gallery(self) -> np.ndarray:
        return self.pictures[: self.base]

    def named(self, index: np.ndarray) -> list[str]:
        return [self.names[i] for i in index]


def read_emoji(folder: Path, size: int) -> Emoji:
    """The data set that examples/make_emoji.py wrote.

    Raises:
        FileNotFoundError: it is not there. ValueError: pictures of another size than the model's.
    """
    found = []
    for part in ("train", "held_out"):
        for line in (folder / part / "metadata.jsonl").read_text("utf-8").splitlines():
            record = json.loads(line)
            with Image.open(folder / part / record["file_name"]) as image:
                picture = np.asarray(image.convert("RGB"))
            if picture.shape[:2] != (size, size):
                raise ValueError(
                    f"{record['file_name']} is {image.width}x{image.height}; the model draws {size}x{size}"
                )
            found.append((record["kind"] != "base", record["name"], picture, part == "train"))
    found.sort(key=lambda row: row[0])
    toned, names, pictures, trained = zip(*found, strict=True)
    return Emoji(list(names), np.stack(pictures), np.array(trained), toned.count(False))


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def draw(pipe: Pipeline, prompts: Sequence[str], count: int, **settings: Any) -> np.ndarray:
    """Pictures u8[prompts * count, H, W, 3], the seeds 0 .. count - 1 of the first prompt first."""
    total = len(prompts) * count
    say(f"drawing {total} pictures {settings or ''}")
    settings = {"weighting": "none"} | settings  # the names as they are, brackets included
    return np.stack([np.asarray(p) for p in pipe.text_to_image(prompts, count=count, batch_size=BATCH, **settings)])


def reconstruct(pipe: Pipeline, pictures: np.ndarray) -> np.ndarray:
    """The pictures through the autoencoder, by way of the posterior's mean, clipped and in 8 bit."""
    latents = encode(pipe.params, from_uint8(pictures), config=pipe.config)
    return np.asarray(to_uint8(decode(pipe.params, latents, config=pipe.config)))


def embed(pipe: Pipeline, folder: Path, names: list[str], pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the two encoders make of names and pictures, f32[n, d] and f32[g, d]."""
    clip = pipe.config.clip
    tower = jax.tree.map(np.float32, read_tensors(folder / "image_encoder.safetensors"))["image"]
    text = jax.jit(lambda ids: TextEncoder(clip).apply({"params": pipe.params["text"]}, ids).pooled)  # type: ignore
    image = jax.jit(partial(ImageEncoder(BOX_VISION).apply, {"params": tower}))
    ids = pipe.tokenizer(names, clip.length, clip.pad_token)
    parts = [image(from_uint8(pictures[i : i + 256])) for i in range(0, len(pictures), 256)]
    return np.asarray(text(ids)), np.concatenate(parts)  # type: ignore[arg-type]


def seconds_per_picture(pipe: Pipeline, batch: int) -> float:
    """The median of three runs, after one that compiles."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        pipe.text_to_image("red heart", count=batch, batch_size=batch)
        times.append((time.perf_counter() - start) / batch)
    return float(np.median(times[1:]))


def seconds_of_first_picture(folder: Path) -> list[float]:
    """Wall time of `sdjax txt2img "red heart"` in a process of its own, and in a second one, which finds the programs
    that the first has kept.
    """

    times = []
    with tempfile.TemporaryDirectory() as out:
        command = [
            sys.executable,
            "-m",
            "sdjax.cli",
            "txt2img",
            "red heart",
            "--model",
            str(folder),
            "-o",
            f"{out}/a.png",
        ]
        for _ in range(2):
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "SDJAX_CACHE": out})
            times.append(time.perf_counter() - start)
    return times


def comparison(names: Sequence[str], truth: np.ndarray, drawn: np.ndarray, across: int) -> Image.Image:
    """Each true picture with those drawn for its name at its right, `across` names in a row."""
    per_name = len(drawn) // len(names)
    pictures, labels = [], []
    for i, name in enumerate(names):
        pictures += [truth[i], *drawn[i * per_name : (i + 1) * per_name]]
        labels += [name] + [""] * per_name
    enlarged = [Image.fromarray(p).resize((96, 96), Image.Resampling.LANCZOS) for p in pictures]
    return sheet(enlarged, across * (1 + per_name), labels)


def evaluate(
    pipe: Pipeline, folder: Path, emoji: Emoji, captions: int, seeds: int
) -> tuple[dict[str, float], dict[str, Image.Image]]:
    """All numbers of the table but the first picture's time, and sheets, by name."""
    index, is_base = np.arange(len(emoji.names)), np.arange(len(emoji.names)) < emoji.base
    trained = index[emoji.trained & is_base]
    unseen, tones = index[~emoji.trained & is_base], index[~emoji.trained & ~is_base]
    chosen = np.random.default_rng(0).choice(trained, captions, replace=False)
    repeated = np.repeat(chosen, seeds)
    results: dict[str, float] = dict(
        gallery=emoji.base, all=len(index), captions=captions, seeds=seeds, unseen=len(unseen), queries=len(trained)
    )

    say("the autoencoder and the two encoders")
    results["psnr"] = psnr(reconstruct(pipe, emoji.pictures[unseen]), emoji.pictures[unseen])
    places = recall_ranks(*embed(pipe, folder, emoji.named(trained), emoji.gallery), trained)
    results |= {"recall1": top(places, 1), "recall5": top(places, 5)}

    pictures = draw(pipe, emoji.named(chosen), seeds)
    distances = squared_distances(pictures, emoji.gallery)
    places = ranks(distances, repeated)
    results |= {"top1": top(places, 1), "top5": top(places, 5)}
    results["error"] = float(squared_errors(pictures, emoji.pictures[repeated]).mean())
    shuffled = np.repeat(np.random.default_rng(1).permutation(chosen), seeds)
    results |= {"shuffled_top1": top(ranks(distances, shuffled), 1), "chance": 1 / captions}
    plain = ranks(squared_distances(draw(pipe, emoji.named(chosen), seeds, guidance=1), emoji.gallery), repeated)
    results |= {"plain_top1": top(plain, 1), "plain_top5": top(plain, 5)}

    coloured = np.array([i for i in unseen if is_colour_and_shape(emoji.names[i])])
    asked = np.repeat(coloured, COLOUR_SEEDS)
    references = reference_colours(emoji.named(trained), emoji.pictures[trained])
    in_colour = draw(pipe, emoji.named(coloured), COLOUR_SEEDS)
    right = colours_right(emoji.named(asked), in_colour, references)
    exact = right & (ranks(squared_distances(in_colour, emoji.gallery), asked) == 0)
    results |= {"colour_pictures": len(asked), "colour_right": int(right.sum()), "colour_and_shape": int(exact.sum())}
    results["unseen_colours"] = len(coloured)
    true_colours = colours_right(emoji.named(coloured), emoji.pictures[coloured], references)
    results["true_colours"] = int(true_colours.sum())

    toned = draw(pipe, emoji.named(tones), seeds)
    places = ranks(squared_distances(toned, emoji.pictures), np.repeat(tones, seeds))
    results |= {"tones": len(tones), "tone_top5": top(places, 5)}

    empty = draw(pipe, [""], EMPTY_PROMPTS, guidance=1)
    results |= {"empty_spread": spread(empty), "true_spread": spread(emoji.pictures[chosen])}
    say("seconds per picture")
    results |= {f"seconds{batch}": seconds_per_picture(pipe, batch) for batch in (8, 1)}

    few = 32
    sheets = {
        "names": comparison(emoji.named(chosen[:few]), emoji.pictures[chosen], pictures[: few * seeds], 4),
        "colours": comparison(emoji.named(coloured), emoji.pictures[coloured], in_colour, 2),
        "tones": comparison(emoji.named(tones[:few]), emoji.pictures[tones], toned[: few * seeds], 4),
        "empty": sheet([Image.fromarray(picture) for picture in empty], 8),
    }
    return results, sheets


def measure_curves(pipe: Pipeline, emoji: Emoji) -> tuple[dict[str, Any], dict[str, Image.Image]]:
    """Top-1 over guidance with the model's sampler, and over steps with every sampler; one seed a caption."""
    trained = np.flatnonzero(emoji.trained[: emoji.base])
    chosen = np.random.default_rng(0).choice(trained, min(CURVE_CAPTIONS, len(trained)), replace=False)

    def score(**settings: Any) -> float:
        return top(ranks(squared_distances(draw(pipe, emoji.named(chosen), 1, **settings), emoji.gallery), chosen), 1)

    own = pipe.config.sampling
    guidance: dict[str, list[float]] = {own.sampler: [score(guidance=value) for value in CURVE_GUIDANCE]}
    plots = {"guidance": _plot(guidance, CURVE_GUIDANCE, "guidance", f"Top-1 over guidance, {own.steps} steps")}
    steps: dict[str, list[float]] = {}
    for kind, stochastic in (("deterministic", False), ("stochastic", True)):
        names = [name for name in SAMPLERS if SAMPLERS[name].stochastic == stochastic]
        found = {name: [score(sampler=name, steps=value) for value in CURVE_STEPS] for name in names}
        title = f"Top-1 over steps, {kind} samplers, guidance {own.guidance:g}"
        plots[f"steps-{kind}"] = _plot(found, CURVE_STEPS, "steps", title)
        steps |= found
    numbers: dict[str, Any] = {
        "over_guidance": {"guidance": CURVE_GUIDANCE, **guidance},
        "over_steps": {"steps": CURVE_STEPS, **steps},
    }
    return {"captions": len(chosen), **numbers}, plots


def _plot(series: Mapping[str, Sequence[float]], xs: Sequence[float], x_label: str, title: str) -> Image.Image:
    return curves({name: (xs, ys) for name, ys in series.items()}, title=title, x_label=x_label, log_x=True)


def table(results: Mapping[str, float]) -> str:
    """The results as Markdown."""
    rows = [[cell.format(**results) for cell in row] for row in TABLE]
    lines = [["measure", "value", "bar", "aim"], ["---"] * 4, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder that examples/make_emoji.py wrote")
    parser.add_argument("model", type=Path, help="folder that examples/train_box.py wrote, run/box")
    parser.add_argument("--out", type=Path, help="folder for quality.json, sheets and plots (default: none written)")
    parser.add_argument("--captions", type=int, default=200, help="names of trained base emoji to draw (200)")
    parser.add_argument("--seeds", type=int, default=2, help="pictures of each (2)")
    parser.add_argument("--curves", action="store_true", help="also top-1 over guidance and over steps")
    options = parser.parse_args()
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)

    say("the first picture of a fresh process")
    first, kept = seconds_of_first_picture(options.model)  # before this process takes the device
    pipe = sdjax.load(options.model)
    emoji = read_emoji(options.data, pipe.config.image_size)
    most = int(emoji.trained[: emoji.base].sum())
    if not 1 <= options.captions <= most or options.seeds < 1:
        parser.error(f"--captions must be 1 to {most} and --seeds 1 or more")
    results, images = evaluate(pipe, options.model, emoji, options.captions, options.seeds)
    results["seconds_first"], results["seconds_kept"] = first, kept
    device = jax.devices()[0].device_kind
    print(f"{device}, {os.cpu_count()} cores, jax {jax.__version__}, {datetime.date.today()}, {pipe.config.sampling}\n")
    print(table(results), flush=True)
    report: dict[str, Any] = {"device": device, "cores": os.cpu_count(), "jax": jax.__version__, **results}
    if options.curves:
        report["curves"], plots = measure_curves(pipe, emoji)
        images |= plots
        print(json.dumps(report["curves"]))
    if options.out is not None:
        (options.out / "quality.json").write_text(json.dumps(report, indent=2) + "\n")
        for name, image in images.items():
            image.save(options.out / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
