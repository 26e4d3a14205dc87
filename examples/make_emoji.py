"""Builds the emoji data set that the model in the box learns from: pictures drawn from Noto Color Emoji, captions from
Unicode.

    apt-get install fonts-noto-color-emoji unicode-data unicode-cldr-core
    python examples/make_emoji.py emoji

writes, in ten seconds, emoji/train and emoji/held_out: 64x64 PNGs and a metadata.jsonl each, the layout that
`sdjax train --data` reads. Everything is 1,608 base emoji (no country flags) and 1,485 with one skin tone; pictures
that the font draws twice are left out. The split is a fixed function of the names: eight colour-and-shape
combinations, one base emoji in forty and one toned emoji in ten are never trained on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
NAMES = Path("/usr/share/unicode/emoji/emoji-test.txt")
KEYWORDS = [Path(f"/usr/share/unicode/cldr/common/{folder}/en.xml") for folder in ("annotations", "annotationsDerived")]
FONT_SIZE = 109  # the only size of the font's bitmaps
CANVAS = 136  # pixels; the bitmaps are 136 x 128
SKIN_TONES = [chr(code) for code in range(0x1F3FB, 0x1F400)]
HELD_OUT_COLOURS = (
    "green heart",
    "purple heart",
    "brown heart",
    "blue circle",
    "orange circle",
    "red square",
    "yellow square",
    "green square",
)
TONE_WEIGHT = 0.15  # how often a toned picture is drawn, against 1 for a base picture
CAPTIONS = 20  # per picture: 60 % name, 25 % name and keywords, 15 % keywords


class Emoji(NamedTuple):
    text: str  # the characters
    name: str
    keywords: tuple[str, ...]
    kind: str  # "base" or "tone"


def read_emoji() -> Iterator[Emoji]:
    """All fully qualified emoji without flags of countries, with at most one skin tone, in Unicode's order.

    Raises:
        FileNotFoundError: a package is not installed.
    """
    for path in (FONT, NAMES, *KEYWORDS):
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing: apt-get install fonts-noto-color-emoji unicode-data unicode-cldr-core"
            )
    keywords: dict[str, tuple[str, ...]] = {}
    for path in KEYWORDS:
        for entry in ElementTree.parse(path).iter("annotation"):
            if "type" not in entry.attrib:
                keywords[entry.attrib["cp"]] = tuple((entry.text or "").split(" | "))
    subgroup = ""
    for line in NAMES.read_text("utf-8").splitlines():
        if line.startswith("# subgroup:"):
            subgroup = line.partition(": ")[2]
        match = re.fullmatch(r"([0-9A-F ]+?)\s*; fully-qualified\s+# \S+ E[\d.]+ (.+)", line)
        if match is None or subgroup in ("country-flag", "subdivision-flag"):
            continue
        text = "".join(chr(int(code, 16)) for code in match[1].split())
        tones = sum(character in SKIN_TONES for character in text)
        if tones <= 1:
            found = keywords.get(text.replace("\ufe0f", ""), ())
            yield Emoji(text, match[2], tuple(word for word in found if word != match[2]), "tone" if tones else "base")


def draw(text: str, size: int, font: ImageFont.FreeTypeFont) -> Image.Image:
    """The glyph on white, in the middle of a square of `size` pixels."""
    canvas = Image.new("RGB", (CANVAS, CANVAS), "white")
    left, top, right, bottom = font.getbbox(text)
    place = ((CANVAS - (right - left)) / 2 - left, (CANVAS - (bottom - top)) / 2 - top)
    ImageDraw.Draw(canvas).text(place, text, font=font, embedded_color=True)
    return canvas.resize((size, size), Image.Resampling.LANCZOS)


def is_held_out(emoji: Emoji) -> bool:
    """Whether an emoji is kept for the evaluation; depends on its name alone."""
    number = int.from_bytes(hashlib.sha256(emoji.name.encode()).digest()[:4], "big")
    return number % (10 if emoji.kind == "tone" else 40) == 0 or emoji.name in HELD_OUT_COLOURS


def captions(emoji: Emoji) -> list[str]:
    """`CAPTIONS` captions, of which training draws one each time."""
    rng = np.random.default_rng(list(emoji.name.encode()))

    def some_keywords() -> str:
        most = min(4, len(emoji.keywords))
        return ", ".join(rng.permutation(emoji.keywords)[: rng.integers(1, most + 1)])

    if not emoji.keywords:
        return [emoji.name]
    with_name = [f"{emoji.name}, {some_keywords()}" for _ in range(CAPTIONS * 25 // 100)]
    alone = [some_keywords() for _ in range(CAPTIONS * 15 // 100)]
    if emoji.kind == "tone":  # its keywords alone would not say the tone
        alone = []
    return [emoji.name] * (CAPTIONS - len(with_name) - len(alone)) + with_name + alone


def build(folder: Path, size: int = 64) -> dict[str, int]:
    """Writes the data set and returns how many pictures each part of it has.

    Raises:
        FileExistsError: `folder` is there. FileNotFoundError: a package is missing. RuntimeError: this Pillow cannot
        join emoji sequences.
    """
    if not features.check("raqm"):
        raise RuntimeError("this Pillow was built without Raqm, which draws emoji sequences; install Pillow from PyPI")
    emoji = list(read_emoji())
    font = ImageFont.truetype(FONT, FONT_SIZE, layout_engine=ImageFont.Layout.RAQM)
    for part in ("train", "held_out"):
        (folder / part).mkdir(parents=True)
    seen: set[bytes] = set()
    lines: dict[str, list[str]] = {"train": [], "held_out": []}
    counts: dict[str, int] = {}
    for entry in emoji:
        picture = draw(entry.text, size, font)
        if picture.tobytes() in seen:
            continue
        seen.add(picture.tobytes())
        part = "held_out" if is_held_out(entry) else "train"
        file_name = re.sub(r"\W+", "-", entry.name.lower()).strip("-") + f"-{len(seen):04d}.png"
        picture.save(folder / part / file_name)
        record = {
            "file_name": file_name,
            "text": captions(entry),
            "weight": TONE_WEIGHT if entry.kind == "tone" else 1.0,
            "name": entry.name,
            "keywords": entry.keywords,
            "kind": entry.kind,
        }
        lines[part].append(json.dumps(record, ensure_ascii=False))
        counts[f"{part} {entry.kind}"] = counts.get(f"{part} {entry.kind}", 0) + 1
    for part, records in lines.items():
        (folder / part / "metadata.jsonl").write_text("\n".join(records) + "\n", "utf-8")
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw the emoji data set.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=64, help="pixels (64)")
    options = parser.parse_args()
    print(build(options.folder, options.size))
