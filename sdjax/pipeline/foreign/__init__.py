"""Other tools' pictures as recipes: their text is read, and settings of a `Request` are made of it.

`read_foreign` reads a file; `parse_parameters`, `parse_comfyui` and `parse_invokeai` read the texts of AUTOMATIC1111's
web UI and its relatives, of ComfyUI, and of InvokeAI. What cannot be honoured is listed, one line each.
"""

from __future__ import annotations

import json
from pathlib import Path

from sdjax.pipeline.foreign.comfyui import parse_comfyui
from sdjax.pipeline.foreign.findings import Foreign, short
from sdjax.pipeline.foreign.invokeai import parse_dream, parse_invokeai
from sdjax.pipeline.foreign.parameters import parse_parameters
from sdjax.pipeline.recipe import KEY, texts_of

__all__ = ["Foreign", "is_foreign", "parse_comfyui", "parse_invokeai", "parse_parameters", "read_foreign"]

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
