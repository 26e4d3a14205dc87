"""Files of embeddings (textual inversion), in every form that people have.

    A1111, Gal et al.     .pt: "string_to_param" is a dict or ParameterDict of {"*": [n, d]}
    diffusers             learned_embeds.bin or .safetensors: {token: [d] or [n, d]}; cloneofsimo's .ti.pt has several
    kohya and others      .safetensors: one tensor "emb_params" or "*", or by text encoder "clip_l" and "clip_g" or
                          "text_encoders_0" and "text_encoders_1"
    lists of dicts        one for each text encoder
    within a LoRA         "<s1>" with "<embed>" in the metadata (cloneofsimo), "bundle_emb.NAME...." (OneTrainer)
    pictures              PNG and WebP of A1111 (`convert.files.picture`)

The trigger, by which prompts call an embedding, is the file's name without ending if the file names no token, and for
every .pt of A1111, whose inner name is often another's. It is the inner name in pictures, and where there are several.
Where a file holds one token and nothing else, both call it, unless the file has diffusers' default name
("learned_embeds").
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from convert.files.open import open_source
from convert.files.picture import NoEmbedding, is_picture, open_picture
from convert.files.source import FLOATS, CheckpointError, Source
from sdjax.text.embeddings import FILES, Embedding, same_trigger

MOST = 75
"""Vectors that fit between start and end of a text encoder's 77 places."""

FAMILIES = {
    768: "Stable Diffusion 1",
    1024: "Stable Diffusion 2",
    1280: "the larger text encoder of Stable Diffusion XL",
    2048: "both text encoders of Stable Diffusion XL",
    4096: "the T5 encoder of Stable Diffusion 3 and Flux",
}
"""Numbers of a vector -> whose they are."""

NAMELESS = {"emb_params", "clip_l", "clip_g", "text_encoders_0", "text_encoders_1"}
DEFAULT_NAME = r"learned_embeds([-_].*)?"
PARAM, BUNDLE = "string_to_param.", "bundle_emb."
OF_NETWORKS = r".*\.(weight|bias|alpha|diff|(lora|hada|lokr|oft)_\w+)|.*:(up|down)"
"""Names of parameters: what holds such is a model or an adapter."""

Terms = dict[str, list[str]]
"""Token, "" for none -> the names of its tensors."""


def read_embeddings(path: str | Path, width: int | tuple[int, ...], most: int = MOST) -> list[Embedding]:
    """The embeddings of one file, each under every trigger that it has.

    width: numbers of a vector that the text encoder takes; of a model with several, all of them, and a file with
        vectors for several gives an embedding for each.
    most: vectors that one embedding may have.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: it is damaged or unsafe, holds no embedding, one of another width, one that is not finite or
            all zeros, or one of too many vectors.
    """
    path = Path(path)
    widths = (width,) if isinstance(width, int) else width
    with _opened(path) as source:
        terms = _terms(source)
        if not terms:
            example = next(iter(source.tensors))
            raise NoEmbedding(f"{path}: holds no embedding, but tensors such as {example[:80]}")
        embeddings = []
        for token, names in terms.items():
            found = _read(source, token, names, widths, most)
            carried = (token or source.metadata.get("name", "")).strip()
            carried = "" if carried == "*" else carried
            for trigger in _triggers(source, token, carried, alone=len(names) == len(source.tensors)):
                embeddings += [Embedding(trigger, vectors, str(path), carried or None) for vectors in found]
        return embeddings


def read_folder(
    folder: str | Path, width: int | tuple[int, ...], most: int = MOST
) -> tuple[list[Embedding], list[str]]:
    """The embeddings in a folder and the folders in it, in the order of their paths, and notes of what is left out.

    Hidden files are passed over. A file that cannot be used, one of another width for instance, is left out.

    Raises:
        FileNotFoundError: no such folder. CheckpointError: it is no folder, or two files have the same trigger.
    """
    folder = Path(folder)
    if not folder.is_dir():
        if folder.exists():
            raise CheckpointError(f"{folder}: not a folder; expected one with files of embeddings")
        raise FileNotFoundError(f"{folder}: no such folder")
    found, notes, others = list[Embedding](), list[str](), list[str]()
    for path in _files(folder):
        if path.suffix.lower() not in FILES:
            others.append(str(path.relative_to(folder)))
            continue
        try:
            found += read_embeddings(path, width, most)
        except NoEmbedding:
            others.append(str(path.relative_to(folder)))
        except (OSError, CheckpointError) as error:
            notes.append(f"left out: {error}")
    _check_triggers(found)
    if others:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        notes.append(f"{folder}: left out, for they hold no embedding: {', '.join(others[:5])}{more}")
    return found, notes


def _files(folder: Path) -> Iterator[Path]:
    """All files that are not hidden; links to folders are followed, each folder is entered once."""
    entered = set[str]()
    for place, folders, files in os.walk(folder, followlinks=True):
        entered.add(os.path.realpath(place))
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and os.path.realpath(os.path.join(place, name)) not in entered
        )
        yield from (Path(place, name) for name in sorted(files) if not name.startswith("."))


def _check_triggers(embeddings: Iterable[Embedding]) -> None:
    known: dict[tuple[str, int], Embedding] = {}
    for embedding in embeddings:
        other = known.setdefault((embedding.name.casefold(), embedding.vectors.shape[1]), embedding)
        if other is not embedding:
            raise CheckpointError(same_trigger(other, embedding))


def _opened(path: Path) -> Source:
    if path.is_file():
        with open(path, "rb") as file:
            if is_picture(file.read(16)):
                return open_picture(path)
    return open_source(path)


# Which tensors


def _terms(source: Source) -> Terms:
    """The tensors that are learnt vectors, by their tokens."""
    names = [name for name in source.tensors if not name.startswith("string_to_token.")]
    bundled = [name for name in names if name.startswith(BUNDLE)]
    embedded = [name for name in names if source.metadata.get(name) == "<embed>"]
    if bundled or embedded:
        return _bundled(bundled) | {name: [name] for name in embedded}
    if any(re.fullmatch(OF_NETWORKS, name) for name in names):
        return {}
    params = [name for name in names if name.startswith(PARAM)]
    floats = [name for name in names if name in source.unusable or source.tensors[name].dtype in FLOATS]
    terms = Terms()
    for name in params or floats:
        token = re.sub(r"^(\d+\.)?(string_to_param\.)?", "", name)
        terms.setdefault("" if token == "*" or token in NAMELESS else token, []).append(name)
    if params and len(terms) == 1:
        return {"": params}
    if "" in terms and not params:
        return {"": terms[""]}
    return terms


def _bundled(names: list[str]) -> Terms:
    """Of "bundle_emb.NAME.string_to_param.*", or of another tensor of NAME."""
    terms = Terms()
    for name in names:
        token = name.removeprefix(BUNDLE)
        token = token.partition(f".{PARAM}")[0] if f".{PARAM}" in token else token.rpartition(".")[0]
        terms.setdefault(token, []).append(name)
    return terms


def _triggers(source: Source, token: str, carried: str, alone: bool) -> list[str]:
    """The names that call an embedding. carried: the one in the file. alone: whether the file holds nothing else."""
    stem = source.path.stem
    if not token:
        return [carried if carried and source.format == "picture" else stem]
    same = stem.casefold() == token.casefold()
    return [token, stem] if alone and not same and not re.fullmatch(DEFAULT_NAME, stem) else [token]


# Their numbers


def _read(source: Source, token: str, names: list[str], widths: tuple[int, ...], most: int) -> list[np.ndarray]:
    """The vectors for every width that there are any of, f32[n, width]."""
    shapes = {name: _shape(source, name) for name in names}
    found = []
    for width in widths:
        fitting = [name for name in names if shapes[name][1] == width]
        count = sum(shapes[name][0] for name in fitting)
        if count > most:
            raise CheckpointError(
                f"{source.path}: an embedding of {count} vectors; the text encoder has places for {most}"
            )
        if fitting:
            found.append(_vectors(source, fitting))
    if not found:
        others = sorted({width for _, width in shapes.values()})
        named = f" of {token}" if token else ""
        raise CheckpointError(
            f"{source.path}: the vectors{named} have {_with_family(others)}; this model takes {_with_family(widths)}"
        )
    return found


def _shape(source: Source, name: str) -> tuple[int, int]:
    """The number of vectors, at least 1, and of the numbers of each."""
    dtype, shape = source.tensors[name]
    if name in source.unusable:
        raise CheckpointError(f"{source.path}: {name} {source.unusable[name]}")
    if len(shape) not in (1, 2) or 0 in shape or dtype not in FLOATS:
        raise CheckpointError(
            f"{source.path}: {name} is {dtype} of shape {shape}; an embedding is floating point [vectors, width]"
        )
    return (1, shape[0]) if len(shape) == 1 else (shape[0], shape[1])


def _vectors(source: Source, names: list[str]) -> np.ndarray:
    arrays = [source.read(name) for name in names]
    with np.errstate(over="ignore", invalid="ignore"):
        vectors = np.concatenate([np.atleast_2d(array).astype(np.float32) for array in arrays])
    if not np.isfinite(vectors).all():
        raise CheckpointError(f"{source.path}: {names[0]} holds NaN or infinite values; get the file again")
    if not vectors.any():
        raise CheckpointError(f"{source.path}: {names[0]} is zero everywhere; it was never trained, or is damaged")
    vectors.flags.writeable = False
    return vectors


def _with_family(widths: Iterable[int]) -> str:
    return " or ".join(f"{width} numbers ({FAMILIES.get(width, 'another model')})" for width in widths)
