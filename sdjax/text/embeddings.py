"""Learnt words (textual inversion): vectors that stand in a prompt where their trigger is written.

A trigger is found in the tokens of a prompt and not in its letters, as in AUTOMATIC1111's web UI: capitals and spaces
next to punctuation do not matter, and what follows a trigger without a space is a word of its own if the tokenizer
divides there. Where several triggers begin, the one of most tokens is taken.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath

import numpy as np

FILES = (".safetensors", ".pt", ".bin", ".png", ".webp")
"""How files of embeddings are called."""


@dataclass(frozen=True, eq=False)
class Embedding:
    """Vectors with the name that calls them.

    name: the trigger, as it is written in prompts.
    vectors: f32[n, d], one for each place that it takes among the tokens.
    source: the file, for messages.
    token: the name that the file itself carries, None if it carries none.
    """

    name: str
    vectors: np.ndarray
    source: str = ""
    token: str | None = None


@dataclass(frozen=True)
class Vocabulary:
    """Embeddings of one text encoder, found by the tokens of their triggers. Those with equal content are equal.

    digest: of all that it holds.
    by_ids: the embeddings by the ids of their triggers.
    lengths: first id -> how many ids the triggers have that begin with it, the longest first.
    by_name: the embeddings by their names in small letters.
    """

    digest: str = ""
    by_ids: Mapping[tuple[int, ...], Embedding] = field(default_factory=dict, compare=False, repr=False)
    lengths: Mapping[int, tuple[int, ...]] = field(default_factory=dict, compare=False, repr=False)
    by_name: Mapping[str, Embedding] = field(default_factory=dict, compare=False, repr=False)

    @staticmethod
    def of(embeddings: Iterable[Embedding], encode: Callable[[str], list[int]]) -> Vocabulary:
        """The vocabulary of these embeddings; one that is given twice counts once.

        encode: a text -> its ids, without start and end.

        Raises:
            ValueError: a trigger has no token, or two embeddings have the same one.
        """
        by_ids: dict[tuple[int, ...], Embedding] = {}
        lengths: dict[int, set[int]] = {}
        for embedding in embeddings:
            ids = tuple(encode(embedding.name))
            if not ids:
                raise ValueError(f"{embedding.source}: the trigger {embedding.name!r} has no tokens; rename the file")
            other = by_ids.setdefault(ids, embedding)
            if other is not embedding and not _same(other, embedding):
                raise ValueError(same_trigger(other, embedding))
            lengths.setdefault(ids[0], set()).add(len(ids))
        longest_first = {first: tuple(sorted(found, reverse=True)) for first, found in lengths.items()}
        by_name = {embedding.name.casefold(): embedding for embedding in by_ids.values()}
        return Vocabulary(_digest(by_ids) if by_ids else "", by_ids, longest_first, by_name)

    @property
    def names(self) -> list[str]:
        """All triggers."""
        return [embedding.name for embedding in self.by_ids.values()]

    def match(self, ids: Sequence[int], at: int) -> tuple[Embedding, int] | None:
        """The embedding with the longest trigger that stands at `ids[at:]`, and how many ids it takes."""
        for length in self.lengths.get(ids[at], ()):
            found = tuple(ids[at : at + length])
            if found in self.by_ids:
                return self.by_ids[found], len(found)
        return None

    def named(self, name: str) -> Embedding | None:
        """The embedding of this name, which may have the folder and the ending of a file."""
        name = name.casefold()
        path = PurePath(name.replace("\\", "/"))
        bare = path.stem if path.suffix in FILES else path.name
        return self.by_name.get(name) or self.by_name.get(bare)


def same_trigger(one: Embedding, other: Embedding) -> str:
    """What to say of two embeddings of which a prompt could not mean one alone."""
    names = f"{one.name!r}" if one.name == other.name else f"{one.name!r} and {other.name!r}"
    return f"{one.source} and {other.source}: both are called {names} in prompts; rename or leave out one of them"


def _same(one: Embedding, other: Embedding) -> bool:
    return os.path.realpath(one.source) == os.path.realpath(other.source) and np.array_equal(one.vectors, other.vectors)


def _digest(by_ids: Mapping[tuple[int, ...], Embedding]) -> str:
    digest = hashlib.sha256()
    for ids, embedding in sorted(by_ids.items(), key=lambda item: item[0]):
        vectors = np.ascontiguousarray(embedding.vectors, np.float32)
        digest.update(repr((ids, embedding.name.casefold(), vectors.shape)).encode())
        digest.update(vectors.tobytes())
    return digest.hexdigest()
