"""The README's pictures of the model in the box: what it draws, image to image, inpainting.

    python examples/box_sheets.py run/box sheets

writes sheets/drawn.png, sheets/image_to_image.png and sheets/inpainting.png, and prints how far each picture of image
to image is from its input: the root mean squared difference of a value in [0, 1]. Some minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

import sdjax
from sdjax.pipeline.pipeline import Pipeline
from sdjax.train.plots import sheet

PROMPTS = (
    *("red heart", "grinning face", "face with tears of joy", "smiling face with sunglasses"),
    *("skull", "ghost", "alien", "robot"),
    *("cat face", "dog face", "fox", "tiger face", "koala", "frog", "owl", "parrot"),
    *("octopus", "butterfly", "honeybee", "spouting whale", "tropical fish", "snail", "unicorn", "dragon"),
    *("rose", "sunflower", "cactus", "mushroom", "red apple", "banana", "strawberry", "watermelon"),
    *("pizza", "hamburger", "doughnut", "birthday cake", "ice cream", "hot beverage", "house", "castle"),
    *("rocket", "sailboat", "bicycle", "police car", "guitar", "rainbow", "green heart", "astronaut"),
)
"""48 for the sheet; the model has never seen a "green heart"."""

CHANGES = (
    ("red heart", "green apple"),
    ("grinning face", "jack-o-lantern"),
    ("sun", "sunflower"),
    ("cat face", "tiger face"),
)
"""Image to image: the picture drawn for the first prompt is changed by the second."""

HALVES = (("red heart", "blue heart"), ("cat face", "dog face"), ("red apple", "green apple"), ("sun", "full moon"))
"""Inpainting: the right half of the first prompt's picture is painted anew by the second."""

STRENGTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Of image to image, with 20 steps."""


def distance(picture: Image.Image, other: Image.Image) -> float:
    """The root mean squared difference of two pictures of one size, for values in [0, 1]."""
    a, b = (np.asarray(p, np.float64) / 255 for p in (picture, other))
    return float(np.sqrt(np.square(a - b).mean()))


def enlarged(pictures: Sequence[Image.Image]) -> list[Image.Image]:
    return [p.resize((2 * p.width, 2 * p.height), Image.Resampling.LANCZOS) for p in pictures]


def save(path: Path, image: Image.Image) -> None:
    """As PNG with 256 colours: half to a third of the bytes."""
    image.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {image.width}x{image.height}, {path.stat().st_size / 1000:.0f} kB")


def drawn(pipe: Pipeline) -> Image.Image:
    return sheet(enlarged(pipe.text_to_image(PROMPTS, batch=16)), 8, PROMPTS)


def image_to_image(pipe: Pipeline) -> Image.Image:
    """A row for each change: the input, then the strengths with another seed; prints the distances to the input."""
    starts = pipe.text_to_image([start for start, _ in CHANGES])
    pictures, labels, distances = [], [], []
    for start, (name, prompt) in zip(starts, CHANGES, strict=True):
        results = [pipe.image_to_image(prompt, start, strength=strength, seed=1)[0] for strength in STRENGTHS]
        distances.append([distance(result, start) for result in results])
        pictures += [start, *results]
        labels += [name, *(f"{prompt}, {strength:g}" for strength in STRENGTHS)]
        print(f"{name} -> {prompt}: distance to the input", *(f"{value:.3f}" for value in distances[-1]))
    means = np.mean(distances, axis=0)
    print("strength", *(f"{value:g}" for value in STRENGTHS), "| mean distance", *(f"{value:.3f}" for value in means))
    print("the mean distance grows with strength:", "yes" if (np.diff(means) > 0).all() else "NO")
    return sheet(enlarged(pictures), 1 + len(STRENGTHS), labels)


def inpainting(pipe: Pipeline) -> Image.Image:
    """Three pictures for each pair: the input, the mask, the result; prints whether the known half is kept."""
    starts = pipe.text_to_image([start for start, _ in HALVES])
    width, height = starts[0].size
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, (width // 2, 0, width, height))
    left = (0, 0, width // 2, height)
    pictures, labels = [], []
    for start, (name, prompt) in zip(starts, HALVES, strict=True):
        [result] = pipe.inpaint(prompt, start, mask, seed=1)
        kept = distance(result.crop(left), start.crop(left)) == 0
        print(f"{name} | {prompt}: the known half is {'kept to the byte' if kept else 'CHANGED'}")
        pictures += [start, mask.convert("RGB"), result]
        labels += [name, "mask", prompt]
    return sheet(enlarged(pictures), 6, labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="what examples/train_box.py wrote, or anything else that sdjax.load takes")
    parser.add_argument("out", type=Path, help="folder for the sheets")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    pipe = sdjax.load(options.model)
    for make in (drawn, image_to_image, inpainting):
        save(options.out / f"{make.__name__}.png", make(pipe))


if __name__ == "__main__":
    main()
