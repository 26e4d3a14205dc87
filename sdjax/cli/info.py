"""`sdjax info` and `sdjax selftest`."""

from __future__ import annotations

import argparse
import json
import re
import tarfile
from pathlib import Path
from typing import Any

from sdjax.cli.model import conversion_of, load_model, progress_bars
from sdjax.cli.terminal import note


def show_info(options: argparse.Namespace) -> int:
    """Prints a picture's recipe or a model's contents."""
    path = Path(options.path).expanduser()
    if path.is_file() and _is_tar(path):
        print(_shard_text(path), end="")
    elif path.is_file() and path.suffix.lower() == ".jsonl":
        print(_lines_text(path), end="")
    elif path.is_file() and path.name in ("job.json", "settings.json"):
        print((_job_text if path.name == "job.json" else _training_text)(path.parent), end="")
    elif path.is_file() and path.suffix.lower() in (".json", ".txt"):
        print(_recipe_text(path), end="")
    elif path.is_file() and _is_picture(path):
        print(_picture_text(path), end="")
    elif path.is_dir() and (path / "job.json").is_file():
        print(_job_text(path), end="")
    elif path.is_dir() and (path / "settings.json").is_file() and not (path / "config.json").is_file():
        print(_training_text(path), end="")
    elif path.exists() and (text := _adapter_text(path)) is not None:
        print(text, end="")
    else:
        from sdjax.load import describe, find

        print(describe(find(options.path), **conversion_of(options)), end="")
    return 0


def _adapter_text(path: Path) -> str | None:
    """What an adapter (LoRA, LyCORIS) holds; None for anything else, which others say more of."""
    from convert.adapters import described

    try:
        return described(path)
    except (ValueError, OSError):
        return None


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(512)


def _is_tar(path: Path) -> bool:
    return _head(path)[257:262] == b"ustar"


def _is_picture(path: Path) -> bool:
    """By its first bytes, or by a name that says so."""
    from PIL import Image

    if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".gif"):
        return True
    try:
        with Image.open(path):
            return True
    except Exception:  # Pillow raises almost anything on what is no picture
        return False


def _picture_text(path: Path) -> str:
    from sdjax.pipeline.foreign import described, is_foreign, read_foreign
    from sdjax.pipeline.recipe import KEY, read_parameters, read_recipe

    parameters = read_parameters(path)
    foreign = is_foreign(path)
    if parameters is None and not foreign:
        raise ValueError(f"{path}: no recipe in this picture")
    shown = "" if parameters is None else f"{parameters}\n"
    try:
        own = "" if foreign else f"{KEY}: {read_recipe(path).to_json()}\n"
        return f"{shown}{described(read_foreign(path)) if foreign else own}"
    except ValueError as error:
        if not shown:
            raise
        note(str(error))
        return shown


def _recipe_text(path: Path) -> str:
    """A recipe out of a shard, or another tool's."""
    from sdjax.pipeline.foreign import described, is_foreign, read_foreign
    from sdjax.pipeline.recipe import KEY, read_recipe

    if is_foreign(path):
        return described(read_foreign(path))
    recipe = read_recipe(path)
    return f"{recipe.parameters()}\n{KEY}: {recipe.to_json()}\n"


def _shard_text(path: Path) -> str:
    """How many pictures a shard holds, and the first one's recipe."""
    from sdjax.pipeline.recipe import KEY, Recipe

    first, pictures = None, 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.name.endswith(".json"):
                    pictures += 1
                elif first is None and (file := tar.extractfile(member)) is not None:
                    first = Recipe.from_json(file.read().decode("utf-8", "replace"))
    except tarfile.TarError as error:
        raise ValueError(f"{path}: not a shard that can be read ({error})") from None
    shown = "" if first is None else f"the first one:\n{first.parameters()}\n{KEY}: {first.to_json()}\n"
    return f"shard       {pictures} pictures\n{shown}"


def _object(path: Path) -> dict[str, Any]:
    """What one of our small JSON files says. Raises ValueError, naming it, if it is damaged."""
    try:
        said = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged, not the JSON that sdjax writes ({error})") from None
    if not isinstance(said, dict):
        raise ValueError(f"{path}: damaged, expected a JSON object")
    return said


LINES = {
    "picture": ("manifest", "pictures made"),
    "reason": ("left out", "lines or pictures that could not be made"),
    "step": ("training", "lines of metrics"),
    "prompt": ("job", "requests"),
}
"""What a line-by-line file of ours is, by an entry of its lines."""


def _lines_text(path: Path) -> str:
    """How many lines a manifest, a job or another .jsonl of ours has, and the first three."""
    with open(path, "rb") as file:
        lines = [text.decode("utf-8", "replace") for text in file if text.strip()]
    try:
        first = json.loads(lines[0]) if lines else {}
    except (ValueError, RecursionError):
        first = None
    kind = next((LINES[name] for name in LINES if isinstance(first, dict) and name in first), None)
    if kind is None:
        expected = "a manifest, a job, its failed or rejected lines, or the metrics of a training"
        raise ValueError(f"{path}: not one of the .jsonl files that sdjax writes; expected {expected}")
    return f"{kind[0]:11} {len(lines)} {kind[1]}; the first:\n" + "".join(f"{line.rstrip()}\n" for line in lines[:3])


def _job_text(folder: Path) -> str:
    """What a job's folder says of the job and of how far it is."""
    said = _object(folder / "job.json")
    lines = sum(1 for _ in open(folder / "jobs.jsonl", "rb")) if (folder / "jobs.jsonl").is_file() else 0  # noqa: SIM115
    made = sum(file.read_bytes().count(b"\n") for file in folder.glob("manifest*.jsonl"))
    failed = sum(file.read_bytes().count(b"\n") for file in folder.glob("failed*.jsonl"))
    shown = {
        name: value for name, value in said.items() if name not in ("requests", "content") and value not in ("", {})
    }
    settings = ", ".join(f"{name} {value}" for name, value in shown.items())
    return f"job         {lines} requests, {made} pictures made, {failed} failed\nsettings    {settings}\n"


def _training_text(folder: Path) -> str:
    """What a training's folder says of its settings and of how far it is."""
    said = _object(folder / "settings.json")
    metrics = folder / "metrics.jsonl"
    rows = re.findall(rb'^\{.*"step": (\d+).*\}$', metrics.read_bytes(), re.MULTILINE) if metrics.is_file() else []
    done = int(rows[-1]) if rows else 0
    settings = ", ".join(f"{name} {value}" for name, value in said.items())
    return f"training    {done} of {said.get('steps')} updates\nsettings    {settings}\n"


def selftest(options: argparse.Namespace) -> int:
    """Runs the self-test; exit status 1 if a check failed."""
    from sdjax.selftest import run

    pipe = None
    if options.model is None and (options.dtype != "float32" or conversion_of(options)):
        raise ValueError("a dtype and options for foreign files go with a model, and none is given; name one")
    if options.model is not None:
        with progress_bars(options.model) as (on_convert, _):
            pipe = load_model(options, on_convert)
    return 0 if run(pipe) else 1
