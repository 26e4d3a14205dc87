"""`sdjax txt2img`, `img2img` and `inpaint`."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sdjax.cli.job import check_of
from sdjax.cli.model import conversion_of, load_model, placement_of, progress_bars
from sdjax.cli.signals import begin_work
from sdjax.cli.terminal import note
from sdjax.config import ModelConfig
from sdjax.hints import hint
from sdjax.request import (
    BATCH,
    RANDOM,
    Request,
    check_seeds,
    check_values,
    numbered,
    ours,
    parse_sides,
    parse_size,
    random_seed,
    seeds_of,
    settings,
)
from sdjax.storage.files import refuse_long_names, refuse_unwritable
from sdjax.text.syntax import lora_of

if TYPE_CHECKING:
    from sdjax.pipeline.adapters import Library
    from sdjax.pipeline.foreign import Foreign

FOREIGN_PROMPTS = ("prompt", "hires_prompt")
"""Texts of another tool's recipe that may name adapters."""

NAME_BYTES = 120
"""Most bytes of a file's name that come from the prompt."""


def generate(options: argparse.Namespace) -> int:
    """txt2img, img2img and inpaint."""
    from sdjax.pipeline.recipe import file_hash, recipe_of, save_picture

    # What is asked for, as far as that can be checked before JAX is imported
    asked, count = _asked(options), options.count
    if count < 1:
        raise ValueError(f"count must be 1 or more, found {count}")
    values, conversion = asked.values, asked.conversion
    if values["prompt"] is None:
        raise ValueError(f"a prompt is missing: sdjax {options.task} PROMPT ..., or {hint('recipe')}")
    hashes: dict[str, Any] = {"image": None, "mask": None}
    for name in hashes:
        given, values[name] = values[name], None
        may_lack = name == "mask" and given is None and any(parse_sides(values["outpaint"]))
        if options.task in settings()[name].tasks and not may_lack:
            hashes[name] = _checked_file(name, given, file_hash)
            values[name] = hashes[name][0]
    for name in RANDOM:
        if values[name] == -1:
            values[name] = random_seed(count)
    check_values(values, options.request)
    check_seeds(values, count)

    # The adapters, and where the pictures go
    from sdjax.load import library_of
    from sdjax.pipeline.adapters import tags_of
    from sdjax.pipeline.pixels import pixels_of

    library = dataclasses.replace(library_of(options.lora_dir), files=asked.adapters)
    if asked.foreign is not None:
        for name in FOREIGN_PROMPTS:
            if values[name] == asked.foreign.settings.get(name):
                values[name] = _without_missing(values[name], library)
        if values["loras"] == asked.foreign.settings.get("loras"):
            values["loras"] = tuple(text for text in values["loras"] if _is_there(text, library))
    first = options.request(**values)
    requests = [numbered(first, j) for j in range(count)]
    output = Output(options.output, first.prompt, [seeds_of(request) for request in requests])
    output.check()
    model, dtype = asked.model, asked.dtype
    _tell_other_model(asked.foreign, model)
    if asked.foreign is not None:
        _tell_other_adapters(asked.foreign, {tag.name: library.find(tag.name) for tag in tags_of(first)})

    def check(config: ModelConfig) -> None:
        check_of(model, config, library)(first)
        pixels_of(first, config)

    # The model, and the pictures
    with progress_bars(model) as (on_convert, on_step):
        placement = placement_of(options, count)
        at_once = min(BATCH, -(-count // placement.data_parallel))
        named = dict(model=model, dtype=dtype, placement=placement, conversion=conversion, on_config=check)
        pipe = load_model(options, on_convert, like=first, batch_size=at_once, continuous=False, **named)
        pipe = dataclasses.replace(pipe, library=library)  # which has read the adapters
        output.make_folder()
        begin_work()
        each, begun, cells = at_once * placement.data_parallel, 0, None
        step: Callable[..., None] = print

        def progress(done: int, total: int, x0_hat: Any) -> None:
            nonlocal step, begun, cells
            cells = cells or x0_hat.shape[1:]  # of the first pass
            if done == 1 and (begun == count or x0_hat.shape[1:] != cells):
                step = on_step("second pass")
            elif done == 1:
                last = min(begun + each, count)
                step = on_step(f"{begun + 1}-{last} of {count}" if count > 1 else "sampling")
                begun = last
            step(done, total, x0_hat)

        making = pipe.batch(requests, batch_size=at_once, progress=progress, live_adapters=False)
        for request, picture in making:
            said = dict(model=model, dtype=dtype, conversion=conversion, **hashes, **pipe.files_of(request))
            path = output.path(seeds_of(request))
            recipe = recipe_of(request, pipe.config.sampling, picture, image_size=pipe.config.image_size, **said)
            save_picture(path, picture, recipe)
            print(path)
    return 0


@dataclasses.dataclass(frozen=True)
class Output:
    """Where the pictures of a prompt and some seeds go: one file, files with the seed in their name, or a folder.

    seeds: of each picture, as names have it (`seeds_of`).
    given: as the user wrote it. A folder that is there is one whatever it is called, and so is what ends in a slash or
    has no ending.
    """

    given: str
    prompt: str
    seeds: Sequence[int | str]

    @property
    def is_folder(self) -> bool:
        slash = self.given.endswith(("/", os.sep))
        return slash or Path(self.given).is_dir() or not Path(self.given).suffix

    def path(self, seed: int | str) -> Path:
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


class Asked(NamedTuple):
    """What a command asks for: the values of a request by name, the model, and a recipe's adapters by name.

    foreign: the recipe, if it is another tool's.
    """

    values: dict[str, Any]
    model: str
    dtype: str
    conversion: dict[str, Any]
    adapters: dict[str, Path]
    foreign: Foreign | None = None


def _asked(options: argparse.Namespace) -> Asked:
    """The command line before the recipe, the recipe before the defaults."""
    kind: type[Request] = options.request
    values: dict[str, Any] = {"prompt": None}
    values |= {field.name: field.default for field in dataclasses.fields(kind) if field.name != "prompt"}
    model, dtype, conversion, adapters = "", "float32", {}, dict[str, Path]()
    foreign = _foreign(options)
    if foreign is not None:
        values |= {name: value for name, value in foreign.settings.items() if name in values}
    elif options.recipe is not None:
        from sdjax.devices.platform import environment
        from sdjax.pipeline.recipe import read_recipe

        recipe = read_recipe(options.recipe, kind)
        if recipe.task != options.task:
            raise ValueError(f"{options.recipe} was made by {recipe.task}; use sdjax {recipe.task} {hint('recipe')}")
        values |= {name: value for name, value in dataclasses.asdict(recipe).items() if name in values}
        if recipe.task != "txt2img":
            values["width"], values["height"] = recipe.asked_size or (None, None)  # those of the picture
        adapters = _find_again(options, recipe)
        model, dtype = recipe.model, recipe.dtype
        if options.model is None:  # else it belonged to the recipe's own model
            conversion = recipe.conversion
        if recipe.environment != environment():
            was, now = (_listed(found) for found in (recipe.environment, environment()))
            note(
                f"the recipe was made with {was} in the environment, here it is {now}; the picture may differ a little"
            )
    given = {name: value for name, value in vars(options).items() if name in values and value is not None}
    if options.size is not None:
        given["width"], given["height"] = parse_size(options.size)
    given = ours(given, kind)
    model, dtype = model if options.model is None else options.model, options.dtype or dtype
    return Asked(values | given, model, dtype, conversion | conversion_of(options), adapters, foreign)


def _foreign(options: argparse.Namespace) -> Foreign | None:
    """The recipe of another tool's picture for the task at hand, with a note for all that cannot be honoured.

    Raises:
        ValueError: its text cannot be read, or no model is given.
    """
    if options.recipe is None:
        return None
    from sdjax.pipeline.foreign import is_foreign, read_foreign, told

    if not is_foreign(options.recipe):
        return None
    found = read_foreign(options.recipe)
    known = settings(options.request)
    lacking = [name for name in found.settings if name in known and options.task not in known[name].tasks]
    lines = [f"{name} {found.settings[name]}: left out; {options.task} does not have it" for name in lacking]
    note(f"{options.recipe} was made by {found.source}; sdjax makes the nearest that it can")
    for line in (*found.unhonoured, *lines):
        note(line)
    if options.model is None and not (found.source == "sdjax" and found.model == "built-in"):
        box = f"or {hint('model', '')} for the model in the box"
        raise ValueError(f"{options.recipe} was made with {told(found)}; give it with {hint('model')}, {box}")
    left = {name: value for name, value in found.settings.items() if name not in lacking}
    return found._replace(settings=left)


def _tell_other_model(foreign: Foreign | None, model: str) -> None:
    """A note if the model at hand is not the one that another tool's recipe names, or if that cannot be said."""
    if foreign is None or not (foreign.model or foreign.model_hash):
        return
    from sdjax.pipeline.foreign import is_model, told

    same = is_model(foreign, Path(model).expanduser()) if model else False
    if same is None:
        note(f"the recipe was made with {told(foreign)}; whether {model} is the same cannot be said")
    elif not same:
        note(f"the recipe was made with {told(foreign)}; {model or 'the model in the box'} is another model")


def _without_missing(prompt: str, library: Library) -> str:
    """Another tool's prompt without the adapters that are not there or whose tags cannot be read; a note for each."""
    from sdjax.text.syntax import LORA_KINDS, lora_tag, networks

    def kept(match: re.Match[str]) -> str:
        try:
            (network,) = networks(match[0])[1]
            if network.kind in LORA_KINDS:
                library.find(lora_tag(network).name)
            return match[0]
        except (ValueError, OSError) as error:
            said = str(error).removeprefix(f"{match[0]}: ")
            note(f"{match[0]:.100}: left out; {said}")
            return ""

    return re.sub(r"<(\w+):([^>]+)>", kept, prompt)


def _is_there(lora: str, library: Library) -> bool:
    """Whether an adapter of another tool's recipe is there; a note if not."""
    try:
        library.find(lora_of(lora).name)
        return True
    except (ValueError, OSError) as error:
        note(f"{lora:.100}: left out; {error}")
        return False


def _tell_other_adapters(foreign: Foreign, files: dict[str, Path]) -> None:
    """A note for each adapter that is not the one whose hash another tool's recipe says. files: by name."""
    from sdjax.pipeline.foreign import is_adapter

    for name, path in files.items():
        digest = foreign.networks.get(name)
        if digest is not None and not is_adapter(digest, path):
            note(f"{path}: not the adapter {name} that the recipe was made with, whose hash is {digest}")


def _find_again(options: argparse.Namespace, recipe: Any) -> dict[str, Path]:
    """A recipe's adapters by name; its embeddings are added to those that were given. All must still be the same.

    Raises:
        FileNotFoundError: one is gone. ValueError: one is another now.
    """
    from sdjax.pipeline.adapters import digest_of_adapter, names_of

    for kind in ("adapters", "embeddings"):
        for name, digest in getattr(recipe, kind).items():
            path = Path(name)
            if not path.exists():
                raise FileNotFoundError(f"{path}: gone; it is one of the {kind} that the recipe was made with")
            if digest_of_adapter(path) != digest:
                raise ValueError(f"{path}: not what the recipe was made with (its contents changed); give it again")
    options.embeddings = [*options.embeddings, *(name for name in recipe.embeddings if name not in options.embeddings)]
    return {name: path for path in map(Path, recipe.adapters) for name in names_of(path)}


def _listed(found: dict[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in found.items()) or "nothing"


def _checked_file(name: str, given: Any, file_hash: Callable[[Any], str]) -> tuple[str, str]:
    """An input picture as (path, sha256); one named by a recipe must still be the same file."""
    if given is None:
        instead = f", or {hint('outpaint')}" if name == "mask" else ""
        raise ValueError(f"the {name} is missing: give the path of a picture after the prompt{instead}")
    path, expected = (given, None) if isinstance(given, str) else given
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such picture file")
    found = file_hash(path)
    if expected is not None and found != expected:
        raise ValueError(f"{path}: not the {name} that the recipe was made with (its contents changed); give it again")
    return str(path), found
