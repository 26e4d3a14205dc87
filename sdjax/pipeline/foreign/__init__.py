"""Other tools' pictures as recipes: their text is read, and settings of a `Request` are made of it.

`read_foreign` reads a file; `parse_parameters`, `parse_comfyui` and `parse_invokeai` read the texts of AUTOMATIC1111's
web UI and its relatives, of ComfyUI, and of InvokeAI. What cannot be honoured is listed, one line each.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from sdjax.pipeline.foreign.comfyui import parse_comfyui
from sdjax.pipeline.foreign.findings import Foreign, short
from sdjax.pipeline.foreign.invokeai import parse_dream, parse_invokeai
from sdjax.pipeline.foreign.parameters import parse_parameters
from sdjax.pipeline.recipe import KEY, texts_of
from sdjax.storage.cache import digest_of

__all__ = [
    "Foreign",
    "described",
    "is_adapter",
    "is_foreign",
    "is_model",
    "parse_comfyui",
    "parse_invokeai",
    "parse_parameters",
    "read_foreign",
    "told",
]

NAMES = ("parameters", "prompt", "workflow", "invokeai_metadata", "sd-metadata", "Sd-metadata", "Dream")
"""Texts in pictures that are read, by name."""

LARGEST = 2**24
"""Most bytes of a .txt or .json."""


def is_foreign(path: str | Path) -> bool:
    """Whether a file holds another tool's text and no recipe of ours. Errors as `read_foreign`."""
    path = Path(path)
    if path.suffix.lower() == ".txt":
        return True
    if path.suffix.lower() == ".json":
        return path.is_file() and _is_foreign_json(_file_text(path))
    texts = texts_of(path)
    return KEY not in texts and any(name in texts for name in NAMES)


def _is_foreign_json(text: str) -> bool:
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return False
    if not isinstance(said, dict):
        return False
    graphs = any(isinstance(node, dict) and "class_type" in node for node in said.values())
    return (
        graphs
        or "positive_prompt" in said
        or any(isinstance(said.get(name), list | dict) for name in ("nodes", "image"))
    )


def read_foreign(path: str | Path) -> Foreign:
    """What a picture of another tool was made from, in the words of a `Request`.

    path: a PNG, WebP or JPEG; a .txt with A1111's text; or a .json with ComfyUI's graph or InvokeAI's metadata.

    Raises:
        FileNotFoundError: no such file. ValueError: no text that can be read, or not that of a picture from a text.
    """
    path = Path(path)
    try:
        if path.suffix.lower() == ".txt":
            return parse_parameters(_file_text(path))
        if path.suffix.lower() == ".json":
            text = _file_text(path)
            return parse_invokeai(text) if '"class_type"' not in text and '"nodes"' not in text else parse_comfyui(text)
        return of_texts(texts_of(path))
    except ValueError as error:
        said = str(error)
        raise ValueError(said if said.startswith(str(path)) else f"{path}: {said}") from None


def of_texts(texts: dict[str, str]) -> Foreign:
    """What the texts of a picture say. The graph of a picture says more than its readable text.

    Raises:
        ValueError: there is none that can be read.
    """
    for name in ("invokeai_metadata", "sd-metadata", "Sd-metadata"):
        if name in texts:
            return parse_invokeai(texts[name])
    parameters = texts.get("parameters", "").strip()
    graph = texts.get("prompt") or (parameters if '"class_type"' in parameters else "")
    if graph or texts.get("workflow"):
        try:
            return parse_comfyui(graph, texts.get("workflow"))
        except ValueError as error:
            if not parameters or parameters.startswith("{"):
                raise
            found = parse_parameters(parameters)
            line = f"ComfyUI's graph: {short(error)}; the readable text beside it is used"
            return found._replace(unhonoured=(line, *found.unhonoured))
    if "Dream" in texts:
        return parse_dream(texts["Dream"])
    if "parameters" not in texts:
        raise ValueError("no text of A1111, ComfyUI or InvokeAI in this picture")
    return parse_parameters(texts["parameters"])


# Models


def told(found: Foreign) -> str:
    """Which model a text names, for people."""
    name = f"the model {found.model}" if found.model else "a model that its text does not name"
    return f"{name} (hash {found.model_hash[:10]})" if found.model_hash else name


def is_model(found: Foreign, path: Path) -> bool | None:
    """Whether a file is the model that a text names, by its hash; None if that cannot be said.

    Hashes are the first digits of the file's sha256. Eight digits are those of early versions of A1111: the sha256 of
    64 KiB from the second MiB on.
    """
    if not found.model_hash or not path.is_file():
        return None
    if len(found.model_hash) == 8:
        with open(path, "rb") as file:
            file.seek(2**20)
            early = hashlib.sha256(file.read(2**16)).hexdigest()
        return early.startswith(found.model_hash)
    return digest_of(path).startswith(found.model_hash)


def is_adapter(digest: str, path: Path) -> bool:
    """Whether a file is the adapter with that hash: the first digits of the sha256 of a .safetensors file behind its
    header, as A1111 and kohya's trainer count it, or of the whole file.
    """
    if not path.is_file() or digest_of(path).startswith(digest):
        return path.is_file()
    with open(path, "rb") as file:
        header = int.from_bytes(file.read(8), "little")
        if not 0 < header < path.stat().st_size:
            return False
        file.seek(8 + header)
        return hashlib.file_digest(file, "sha256").hexdigest().startswith(digest)


def described(found: Foreign) -> str:
    """What a text says, for people: what is taken from it, and what is not."""
    taken = ", ".join(f"{name} {value}" for name, value in found.settings.items() if "prompt" not in name)
    lines = [f"{found.source:11} {told(found)}", f"taken       {taken}"]
    lines += [f"not         {line}" for line in found.unhonoured]
    return "".join(f"{line}\n" for line in lines)


def _file_text(path: Path) -> str:
    """A text file's text, in whatever encoding it was saved."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, which is no recipe; at most {LARGEST} are read")
    data = path.read_bytes()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", "replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")
