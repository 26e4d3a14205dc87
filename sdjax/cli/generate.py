"""`sdjax txt2img`, `img2img` and `inpaint`."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sdjax.cli.model import conversion_of, load_model, placement_of, progress_bars
from sdjax.cli.signals import begin_work
from sdjax.cli.terminal import note
from sdjax.config import ModelConfig
from sdjax.hints import hint
from sdjax.request import BATCH, STRENGTHS, Request, check_request, check_settings, parse_size
from sdjax.storage.files import refuse_long_names, refuse_unwritable

DEFAULTS: dict[str, Any] = {
    "prompt": None,
    "negative_prompt": "",
    "model": "",
    "seed": 0,
    "steps": None,
    "guidance": None,
    "guidance_rescale": 0.0,
    "guidance_interval": (0.0, 1.0),
    "sampler": None,
    "spacing": None,
    "eta": None,
    "clip_skip": None,
    "size": None,
    "dtype": "float32",
    "strength": None,
    "noise": "jax",
    "image": None,
    "mask": None,
    "conversion": {},
}
NAME_BYTES = 120
"""Most bytes of a file's name that come from the prompt."""


def generate(options: argparse.Namespace) -> int:
    """txt2img, img2img and inpaint."""
    from sdjax.pipeline.pipeline import pixels_of
    from sdjax.pipeline.recipe import file_hash, recipe_of, save_picture

    settings = _settings(options)
    given = settings.pop("size")
    size = None if given is None else parse_size(given)
    count, task = options.count, options.task
    if count < 1:
        raise ValueError(f"count must be 1 or more, found {count}")
    inputs = {name: settings.pop(name) for name in ("image", "mask")}
    prompt, model, dtype, conversion = (settings.pop(name) for name in ("prompt", "model", "dtype", "conversion"))
    if prompt is None:
        raise ValueError(f"a prompt is missing: sdjax {task} PROMPT ..., or {hint('recipe')}")
    hashes: dict[str, Any] = {"image": None, "mask": None}
    for name in {"txt2img": (), "img2img": ("image",), "inpaint": ("image", "mask")}[task]:
        hashes[name] = _checked_file(name, inputs[name], file_hash)
    check_settings(**{name: value for name, value in settings.items() if value is not None}, count=count)
    output = Output(options.output, prompt, range(settings["seed"], settings["seed"] + count))
    output.check()
    shape: dict[str, Any] = {} if size is None else {"width": size[0], "height": size[1]}
    image, mask = (None if hashes[name] is None else hashes[name][0] for name in ("image", "mask"))
    if task == "txt2img":
        settings.pop("strength")
    like = Request(prompt, **settings, **shape, image=image, mask=mask)

    def check(config: ModelConfig) -> None:
        check_request(like, config, model or config.name)
        pixels_of(like, config)

    with progress_bars(model) as (on_convert, on_step):
        placement = placement_of(options, count)
        named = dict(model=model, dtype=dtype, placement=placement, conversion=conversion, on_config=check)
        pipe = load_model(options, on_convert, like=like, batch=min(BATCH, -(-count // placement.shares)), **named)
        output.make_folder()
        begin_work()
        call = {
            "txt2img": lambda **k: pipe.text_to_image(prompt, **k),
            "img2img": lambda **k: pipe.image_to_image(prompt, image, **k),
            "inpaint": lambda **k: pipe.inpaint(prompt, image, mask, **k),
        }[task]
        first = settings.pop("seed")
        at_once = BATCH * placement.shares
        for start in range(0, count, at_once):
            part = min(at_once, count - start)
            step = on_step(f"{start + 1}-{start + part} of {count}" if count > 1 else "sampling")
            pictures = call(**settings, **shape, seed=first + start, count=part, progress=step)
            for seed, picture in enumerate(pictures, first + start):
                request = dataclasses.replace(like, seed=seed)
                said = dict(model=model, dtype=dtype, conversion=conversion, **hashes)
                save_picture(output.path(seed), picture, recipe_of(request, pipe.config.sampling, picture, **said))
                print(output.path(seed))
    return 0


@dataclasses.dataclass(frozen=True)
class Output:
    """Where the pictures of a prompt and some seeds go: one file, files with the seed in their name, or a folder.

    given: as the user wrote it. A folder that is there is one whatever it is called, and so is what ends in a slash or
    has no ending.
    """

    given: str
    prompt: str
    seeds: range

    @property
    def is_folder(self) -> bool:
        slash = self.given.endswith(("/", os.sep))
        return slash or Path(self.given).is_dir() or not Path(self.given).suffix

    def path(self, seed: int) -> Path:
        output = Path(self.given)
        if self.is_folder:
            return output / f"{_slug(self.prompt)}-{seed}.png"
        return output if len(self.seeds) == 1 else output.with_name(f"{output.stem}-{seed}{output.suffix}")

    def check(self) -> None:
        """Raises ValueError or OSError unless every picture can be written, as far as that shows beforehand."""
        from sdjax.pipeline.recipe import FORMATS, refuse_foreign

        output = Path(self.given)
        if "\0" in self.given:
            raise ValueError(f"{self.given!r}: a zero byte, which no name of a file can have")
        refuse_long_names((*output.parts, f"{output.name}-{self.seeds[-1]}" if len(self.seeds) > 1 else ""))
        if not self.is_folder and output.suffix.lower() not in FORMATS:
            endings = ", ".join(FORMATS)
            raise ValueError(f"{output}: expected a name that ends in {endings}, or a folder (end it with a slash)")
        if self.is_folder and output.exists() and not output.is_dir():
            raise ValueError(f"{output}: is there and is no folder; choose another name")
        folder = output if self.is_folder else output.parent
        if not self.is_folder and not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder to write {output.name} into; make it first")
        there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        if not there.is_dir():
            raise ValueError(f"{there}: is no folder, so {folder} cannot be made in it; choose another name")
        refuse_unwritable(there)
        refuse_long_names((*folder.parts, self.path(self.seeds[-1]).name), os.pathconf(there, "PC_NAME_MAX"))
        for seed in self.seeds if folder.is_dir() else ():
            refuse_foreign(self.path(seed))

    def make_folder(self) -> None:
        if self.is_folder:
            Path(self.given).mkdir(parents=True, exist_ok=True)


def _slug(prompt: str) -> str:
    """A name for files, from a prompt: its words joined by dashes, not longer than a file system takes."""
    words = "-".join(re.findall(r"\w+", prompt.lower()))[:60]
    return os.fsencode(words)[:NAME_BYTES].decode("utf-8", "ignore") or "picture"


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """Command line before recipe before defaults."""
    settings = dict(DEFAULTS)
    if options.recipe is not None:
        from sdjax.devices.platform import environment
        from sdjax.pipeline.recipe import read_recipe

        recipe = read_recipe(options.recipe)
        if recipe.task != options.task:
            raise ValueError(f"{options.recipe} was made by {recipe.task}; use sdjax {recipe.task} {hint('recipe')}")
        settings |= {name: value for name, value in dataclasses.asdict(recipe).items() if name in settings}
        settings["size"] = f"{recipe.width}x{recipe.height}" if recipe.task == "txt2img" else None
        if options.model is not None:
            settings["conversion"] = {}  # it belonged to the recipe's own model
        if recipe.environment != environment():
            was, now = (_listed(found) for found in (recipe.environment, environment()))
            note(
                f"the recipe was made with {was} in the environment, here it is {now}; the picture may differ a little"
            )
    given = {name: value for name, value in vars(options).items() if name in settings and value is not None}
    settings |= given
    settings["conversion"] = settings["conversion"] | conversion_of(options)
    if settings["strength"] is None:
        settings["strength"] = STRENGTHS.get(options.task)
    return settings


def _listed(found: dict[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in found.items()) or "nothing"


def _checked_file(name: str, given: Any, file_hash: Callable[[Any], str]) -> tuple[str, str]:
    """An input picture as (path, sha256); one named by a recipe must still be the same file."""
    if given is None:
        raise ValueError(f"the {name} is missing: give the path of a picture after the prompt")
    path, expected = (given, None) if isinstance(given, str) else given
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such picture file")
    found = file_hash(path)
    if expected is not None and found != expected:
        raise ValueError(f"{path}: not the {name} that the recipe was made with (its contents changed); give it anew")
    return str(path), found
