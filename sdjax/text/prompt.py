"""The prompt engine: from what people write to tokens with weights, laid out for the text encoder.

    read      a prompt -> its parts, each with a weight and with texts over the steps, and the networks that it names
    chunks    a text -> chunks of tokens with weights, as long as the text encoder's window
    lay_out   the prompts of a picture -> `Prompts`: arrays of the same shapes for all, so that one program serves them

Whatever a prompt says is data: a schedule is a table of which text each call of the UNet sees, parts joined by AND are
further rows of it. What `sdjax.text.syntax` says of each dialect holds for the four ways of weighting:

    a1111   AUTOMATIC1111's web UI: tokens are scaled, then the mean over each chunk is restored
    comfy   ComfyUI: away from, or towards, the encoding of the empty prompt
    compel  compel: the same, and for weights below 1 mixed with encodings that do not see these tokens
    none    the prompt as it is written, without weights, schedules, parts or networks
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from sdjax.hints import hint
from sdjax.text import syntax
from sdjax.text.embeddings import Embedding, Vocabulary
from sdjax.text.syntax import LoraTag, Piece
from sdjax.text.tokenizer import Tokenizer

MODES = {"none": 0, "a1111": 1, "comfy": 2, "compel": 2}
"""The arithmetic of each (`sdjax.text.weighting`)."""

COMMA_REACH = 20
"""Tokens that move to the next chunk at most, so that it begins after a comma (AUTOMATIC1111's usual setting)."""

WORD_GROUP = 8
"""ComfyUI divides what has one weight between two chunks if it has as many tokens or more."""

CHUNKS = (1, 3, 6, 12, 24, 48)
"""Chunks of a program: a prompt of 2 runs in the program for 3, and so on."""

TEXTS, PARTS, VECTORS = 16, 8, 64
"""Texts, parts joined by AND, and learnt vectors that every program has a place for; more of them double it."""

LARGEST_WEIGHT = 1000.0


class Part(NamedTuple):
    """One of the texts joined by AND. texts: (last step, text), steps counted from 1."""

    texts: tuple[tuple[int, str], ...]
    weight: float = 1.0


class Reading(NamedTuple):
    """A prompt, read.

    parts: joined by AND; one of weight 1 for most prompts.
    loras: the networks that it names.
    notes: what to tell of it: what is left out, or has no effect.
    """

    parts: tuple[Part, ...]
    loras: tuple[LoraTag, ...] = ()
    notes: tuple[str, ...] = ()


def read(
    text: str, weighting: str = "a1111", *, steps: int = 1, first_pass: int | None = None, negative: bool = False
) -> Reading:
    """A prompt's parts, their texts over the steps of a sampler, and its networks.

    steps: calls of the UNet that its schedules count. first_pass: those of the pass before, in a second pass.
    negative: whether it is a negative prompt, in which AND is a word and networks are text.

    Raises:
        ValueError: brackets are nested too deep, or a network or weight cannot be read.
    """
    if weighting == "none":
        return Reading((Part(((steps, text),)),))
    depth = syntax.nesting(text)
    if depth > syntax.NESTING:
        raise ValueError(f"the prompt has {depth} brackets within brackets; expected {syntax.NESTING} at most")
    notes: list[str] = []
    if weighting == "a1111":
        text = syntax.without_comments(text)
    loras: list[LoraTag] = []
    plain, networks = syntax.networks(text)
    if negative and networks:
        notes.append(f"{networks[0]!s:.100} in a negative prompt is text there; write it into the prompt")
    elif networks:
        text = plain
        for network in networks:
            if network.kind in syntax.LORA_KINDS:
                loras.append(syntax.lora_tag(network))
            else:
                notes.append(f"{network!s:.100} is left out: {network.kind!r:.40} is not known, lora is")
    if weighting == "a1111":
        weighted = [(text, 1.0)] if negative else syntax.parts(text)
        parts = tuple(
            Part(tuple(syntax.schedule(part, steps, first_pass=first_pass, notes=notes)), _usable(weight, part))
            for part, weight in weighted
        )
        if wrong := re.search(r"\([^()]*:\s*([+-]?[\d.]*\.\d*\.[\d.]*)\s*\)", text):
            notes.append(f"{wrong[0]:.60}: {wrong[1]} is no number, so the brackets count 1.1")
        return Reading(parts, tuple(loras), tuple(notes))
    return Reading((Part(((steps, text),)),), tuple(loras), tuple(notes))


def single(text: str, weighting: str, what: str, *, networks: bool = False) -> Reading:
    """A prompt that is one text from the first step to the last, read.

    what: takes no other, for the message. networks: whether it may name adapters.

    Raises:
        ValueError: it has a schedule or parts, which numbers cannot say, or networks.
    """
    found = read(text, weighting, steps=1000)
    parts, texts = len(found.parts), len(found.parts[0].texts)
    if weighting == "compel":
        parts = len(syntax.compel_parts(text))
    if parts > 1 or texts > 1 or found.parts[0].weight != 1 or (found.loras and not networks):
        also = "" if networks else " or <lora:...>"
        raise ValueError(f"{text!r:.100} is no single text: {what} takes no schedule, AND{also}")
    return found


def check(text: str, weighting: str, length: int) -> None:
    """Raises ValueError if it shows without a tokenizer that a prompt cannot be used: brackets, weights, length.

    length: tokens of a chunk.
    """
    for part in read(text, weighting).parts:
        for _, each in part.texts:
            pieces = [_checked(piece) for piece in _pieces(each, weighting)]
            count = sum(len(re.findall(r"[^\W\d_]+|\d|_", piece.text)) for piece in pieces)
            if count > (most := CHUNKS[-1] * length):
                raise ValueError(f"the prompt has {count:,} words; expected {most:,} tokens at most")


def _usable(weight: float, text: str) -> float:
    if not abs(weight) <= LARGEST_WEIGHT:  # nor NaN
        raise ValueError(
            f"the weight {weight:g} of {text.strip()[:60]!r} must lie within {LARGEST_WEIGHT:g} and minus that"
        )
    return weight


# Chunks of tokens


@dataclass
class Chunk:
    """Tokens with their weights, without start and end; an id from the vocabulary's size on is a learnt vector."""

    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    fragments: list[int] = field(default_factory=list)  # which piece of the prompt each token comes from
    is_closed: bool = False  # by BREAK, or because no more fits


@dataclass(frozen=True)
class Words:
    """What texts become tokens by.

    tokenizer: of the text encoder.
    window: tokens of a chunk, start and end included.
    vocab_size: of the text encoder; ids from there on stand for learnt vectors.
    learnt: embeddings by their triggers.
    """

    tokenizer: Tokenizer
    window: int
    vocab_size: int
    learnt: Vocabulary | None = None

    @property
    def length(self) -> int:
        """The tokens of a text that fit into a chunk."""
        return self.window - 2

    def with_embeddings(self, embeddings: Sequence[Embedding]) -> Words:
        """The same with further embeddings."""
        if not embeddings:
            return self
        there = list(self.learnt.by_ids.values()) if self.learnt else []
        return replace(self, learnt=Vocabulary.of([*there, *embeddings], self.tokenizer.encode))


class Vectors:
    """Learnt vectors that a picture's prompts use, each embedding once; its first vector's id comes from `place`."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.places: dict[int, int] = {}
        self.used: dict[str, Embedding] = {}
        self.rows: list[np.ndarray] = []

    def place(self, embedding: Embedding) -> list[int]:
        """The ids that stand for an embedding's vectors."""
        key = id(embedding.vectors)  # a file's token and its name have the same ones
        self.used[embedding.name] = embedding
        if key not in self.places:
            self.places[key] = sum(map(len, self.rows))
            self.rows.append(np.asarray(embedding.vectors, np.float32))
        first = self.vocab_size + self.places[key]
        return list(range(first, first + len(embedding.vectors)))


Token = tuple[list[int], float, int, bool]
"""Ids that stay together, their weight, the piece that they come from, and whether it is a comma."""


def chunks(
    text: str, words: Words, vectors: Vectors, weighting: str = "a1111", *, comma_reach: int = COMMA_REACH
) -> list[Chunk]:
    """A text's chunks of tokens; at least one.

    comma_reach: tokens that move to the next chunk at most, so that it begins after a comma.

    Raises:
        ValueError: a weight is too large, or there are too many chunks.
    """
    pieces = [_checked(piece) for piece in _pieces(text, weighting)]
    if weighting == "comfy":
        found = _comfy_chunks(pieces, words, vectors)
    else:
        found = _comma_chunks(pieces, words, vectors, comma_reach)
    if len(found) > CHUNKS[-1]:
        tokens = sum(len(chunk.ids) for chunk in found)
        raise ValueError(
            f"the prompt has {tokens:,} tokens in {len(found)} chunks of {words.length}; "
            f"expected {CHUNKS[-1]} chunks at most, {CHUNKS[-1] * words.length:,} tokens"
        )
    return found


def _pieces(text: str, weighting: str) -> list[Piece]:
    if weighting == "a1111":
        return syntax.a1111_pieces(text)
    if weighting == "comfy":
        return syntax.comfy_pieces(text)
    if weighting == "compel":
        return syntax.compel_pieces(text)
    return [Piece(text)]


def _checked(piece: Piece) -> Piece:
    return piece._replace(weight=_usable(piece.weight, piece.text))


def _tokens(piece: Piece, number: int, words: Words, vectors: Vectors) -> list[Token]:
    """The tokens of a piece; an embedding's stay together."""
    ids, found, at = words.tokenizer.encode(piece.text), list[Token](), 0
    comma = words.tokenizer.comma
    while at < len(ids):
        match = None if words.learnt is None else words.learnt.match(ids, at)
        if match is None and ids[at] >= words.vocab_size:
            raise ValueError(
                f"the tokenizer has tokens up to {ids[at]} and the model {words.vocab_size}; "
                "use the tokenizer that belongs to the model"
            )
        if match is None:
            found.append(([ids[at]], piece.weight, number, ids[at] == comma))
            at += 1
        else:
            embedding, taken = match
            if len(embedding.vectors) > words.length:
                raise ValueError(
                    f"the embedding {embedding.name!r:.60} has {len(embedding.vectors)} vectors; "
                    f"expected {words.length} at most, what fits into a chunk"
                )
            found.append((vectors.place(embedding), piece.weight, number, False))
            at += taken
    return found


class _Filling:
    """Chunks that are being filled."""

    def __init__(self) -> None:
        self.done: list[Chunk] = []
        self.chunk = Chunk()
        self.last_comma = -1

    def add(self, ids: list[int], weight: float, fragment: int) -> None:
        self.chunk.ids += ids
        self.chunk.weights += [weight] * len(ids)
        self.chunk.fragments += [fragment] * len(ids)

    def close(self, keep: int | None = None) -> None:
        """Ends the chunk; tokens from place `keep` on move to the next one."""
        full, self.chunk, self.last_comma = self.chunk, Chunk(), -1
        if keep is not None:
            self.chunk = Chunk(full.ids[keep:], full.weights[keep:], full.fragments[keep:])
            full = Chunk(full.ids[:keep], full.weights[:keep], full.fragments[:keep])
        full.is_closed = True
        self.done.append(full)

    def finished(self) -> list[Chunk]:
        """All chunks, the last as it is; one that would be empty is left out unless it is the only one."""
        return [*self.done, self.chunk] if self.chunk.ids or not self.done else self.done


def _comma_chunks(pieces: Sequence[Piece], words: Words, vectors: Vectors, reach: int) -> list[Chunk]:
    """Chunks in the way of AUTOMATIC1111's web UI: one that is full ends after its last comma, if that is near."""
    filling, length = _Filling(), words.length
    for number, piece in enumerate(pieces):
        if piece.is_break:
            filling.close()
            continue
        for ids, weight, fragment, is_comma in _tokens(piece, number, words, vectors):
            full = len(filling.chunk.ids)
            if is_comma:
                filling.last_comma = full
            elif full == length and filling.last_comma >= 0 and full - filling.last_comma <= reach:
                filling.close(keep=filling.last_comma + 1)
            if len(filling.chunk.ids) == length or len(filling.chunk.ids) + len(ids) > length:
                filling.close()
            filling.add(ids, weight, fragment)
    return filling.finished()


def _comfy_chunks(pieces: Sequence[Piece], words: Words, vectors: Vectors) -> list[Chunk]:
    """Chunks in the way of ComfyUI: what has one weight stays together if it is short."""
    filling, length = _Filling(), words.length
    for number, piece in enumerate(pieces):
        for group in _comfy_groups(piece.text, words, vectors):
            divisible = len(group) >= WORD_GROUP
            while group:
                room = length - len(filling.chunk.ids)
                if len(group) <= room:
                    filling.add(group, piece.weight, number)
                    break
                taken = room if divisible else 0
                filling.add(group[:taken], piece.weight, number)
                filling.close()
                group = group[taken:]
    return filling.finished()


def _comfy_groups(text: str, words: Words, vectors: Vectors) -> list[list[int]]:
    """The ids of a text, those of each `embedding:NAME` apart."""
    first, *rest = re.split(r"(?:^|(?<=[ \n]))embedding:", text)
    groups = [words.tokenizer.encode(first.rstrip(" \n") if rest else first)]
    for part in rest:
        name, _, after = re.match(r"(\S*)(\s*)(.*)", part, re.DOTALL).groups()  # type: ignore[union-attr]
        learnt = words.learnt
        embedding = None if learnt is None else learnt.named(name) or learnt.named(name.rstrip(","))
        if embedding is None:
            raise ValueError(f"embedding:{name:.60} is not known; {_known(learnt)}")
        groups.append(vectors.place(embedding))
        tail = "," if name.endswith(",") and learnt is not None and learnt.named(name) is None else ""
        groups.append(words.tokenizer.encode(f"{tail} {after}"))
    return [group for group in groups if group]


def _known(learnt: Vocabulary | None) -> str:
    names = [] if learnt is None else learnt.names
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return f"there are {', '.join(names[:10])}{more}" if names else f"give it by {hint('embeddings')}"


def token_count(found: Sequence[Chunk], words: Words) -> int:
    """What other tools' token counter shows: a chunk that is closed counts as full."""
    return sum(words.length if chunk.is_closed else len(chunk.ids) for chunk in found)


# The arrays of one picture


class Prompts(NamedTuple):
    """What a picture's prompts are to the text encoder; in a batch every leaf has pictures as its first axis.

    V texts (the first: negative prompt, then prompt) of L chunks of l tokens each; `count` of them are in use.

    ids: i32[V, L, l], start, tokens, end, padding; from the vocabulary's size on they stand for `vectors`.
    weights: f32[V, L, l], 1 for start, end and padding.
    seen: bool[V, L, l], tokens that others may attend to.
    own: i32[V], chunks of each text. keys: i32[V], its rows that the UNet attends to, its last row repeated up to them.
    group: i32[V], and repeats: f32[V]: texts whose mean is restored together, and how often each counts.
    empty: i32[], the empty prompt's text, where weights are relative to it. mode: i32[], the arithmetic (`MODES`).
    mix: f32[V, V], each text as a sum of the encoded ones, where `mixed` bool[].
    count: i32[].
    vectors: f32[n, d], learnt ones.
    given: f32[V or 0, L * l, d], texts that are already encoded, where is_given bool[V or 0].
    texts: i32[s, 1 + P], which text every row of the sampler sees: negative prompt, then parts joined by AND.
    changed: bool[s], where these are others than a row before.
    strengths: f32[P], the weight of each part; 0 for none. parts: i32[], how many there are.
    """

    ids: Any
    weights: Any
    seen: Any
    own: Any
    keys: Any
    group: Any
    repeats: Any
    empty: Any
    mode: Any
    mix: Any
    mixed: Any
    count: Any
    vectors: Any
    given: Any
    is_given: Any
    texts: Any
    changed: Any
    strengths: Any
    parts: Any

    @property
    def is_plain(self) -> bool:
        """Whether there is one part of weight 1 in every row, so that guidance alone says how it steers."""
        return bool(self.parts == 1 and self.strengths[0] == 1)


class Text(NamedTuple):
    """One text of a picture. chunks: of tokens; given: f32[rows, d] instead, if it is already encoded.

    masked: fragments that are not seen (compel).
    """

    chunks: list[Chunk]
    group: int
    repeats: int = 1
    given: np.ndarray | None = None
    masked: int | None = None


def lay_out(
    negative: Reading | np.ndarray,
    positive: Reading | np.ndarray,
    words: Words,
    *,
    rows: int,
    weighting: str = "a1111",
    pad_token: int,
    width: int,
    toward: tuple[Reading, float] | None = None,
) -> Prompts:
    """The arrays of a picture's prompts.

    negative, positive: as `read`, or already encoded, f32[rows, d].
    rows: of the sampler's table.
    pad_token: what follows the end of a text.
    width: of the text encoder.
    toward: a single text that the prompt goes to, and how far it has gone: (1 - fraction) of the one's encoding and
        fraction of the other's, weights applied, both in as many chunks as the longer one has.

    Raises:
        ValueError: as `chunks`.
    """
    vectors = Vectors(words.vocab_size)
    parts = [_part_of(negative), *_parts_of(positive, weighting)]
    columns = [_texts_of(part, group, words, vectors, weighting) for group, part in enumerate(parts)]
    further: list[Text] = []
    if toward is not None:
        [start], seen = columns[1]
        [end], _ = _texts_of(_parts_of(toward[0], weighting)[0], len(parts), words, vectors, weighting)
        longest = max(len(start.chunks), len(end.chunks))
        columns[1], further = ([_padded(start, longest)], seen), [_padded(end, longest)]

    # Every part's first text, then the others, and which of them each row sees
    texts = [found[0] for found, _ in columns] + [text for found, _ in columns for text in found[1:]] + further
    places = {id(text): i for i, text in enumerate(texts)}
    table = np.zeros((rows, 1 + _doubled(PARTS, len(parts) - 1)), np.int32)
    for i, (found, seen) in enumerate(columns):
        seen = seen[:rows] + seen[-1:] * (rows - len(seen))
        table[:, i] = np.array([places[id(text)] for text in found])[seen]
    table[:, len(parts) :] = table[:, 1:2]

    # What the arithmetic of the weights needs besides
    mixes = _without_fragments(texts) if weighting == "compel" else {}
    if toward is not None:
        ends = ((1, 1 - toward[1]), (places[id(further[0])], toward[1]))
        mixes[1] = [(at, part * share) for i, share in ends for at, part in mixes.get(i, [(i, 1.0)])]
    is_weighted = any(weight != 1 for text in texts for chunk in text.chunks for weight in chunk.weights)
    empty = 0
    if is_weighted and MODES[weighting] == MODES["comfy"]:
        empty = len(texts)
        texts.append(Text([Chunk()], -1))
    strengths = np.zeros(table.shape[1] - 1, np.float32)
    strengths[: len(parts) - 1] = [part.weight for part in parts[1:]]
    return _arrays(texts, vectors, words, weighting, pad_token, width)._replace(
        empty=np.int32(empty),
        texts=table,
        changed=np.any(table != np.concatenate([table[:1], table[:-1]]), axis=1),
        strengths=strengths,
        parts=np.int32(len(parts) - 1),
        **_mixing(mixes, len(texts)),
    )


@dataclass(frozen=True)
class _Given:
    """A prompt that is already encoded, f32[rows, d], in the place of a part."""

    context: np.ndarray
    weight: float = 1.0


def _part_of(prompt: Reading | np.ndarray) -> Part | _Given:
    return prompt.parts[0] if isinstance(prompt, Reading) else _Given(np.asarray(prompt, np.float32))


def _parts_of(prompt: Reading | np.ndarray, weighting: str) -> list[Part | _Given]:
    if not isinstance(prompt, Reading):
        return [_part_of(prompt)]
    if weighting == "compel":
        ((_, text),) = prompt.parts[0].texts
        return [Part(((1, part),), _usable(weight, part)) for part, weight in syntax.compel_parts(text)]
    return list(prompt.parts)


def _texts_of(
    part: Part | _Given, group: int, words: Words, vectors: Vectors, weighting: str
) -> tuple[list[Text], list[int]]:
    """The different texts of a part, and which of them each call of the UNet sees."""
    if isinstance(part, _Given):
        return [Text([], group, given=part.context)], [0]
    names = list(dict.fromkeys(text for _, text in part.texts))
    entries = [text for _, text in part.texts]
    found = [chunks(text, words, vectors, weighting) for text in names]
    longest = max(map(len, found))
    texts = [_padded(Text(each, group, entries.count(text)), longest) for text, each in zip(names, found, strict=True)]
    last = part.texts[-1][0]
    steps = [names.index(part.texts[syntax.text_at(list(part.texts), call)][1]) for call in range(last)]
    return texts, steps or [0]


def _padded(text: Text, chunks: int) -> Text:
    """The text with empty chunks at its end, up to so many."""
    return text._replace(chunks=[*text.chunks, *(Chunk() for _ in range(chunks - len(text.chunks)))])


def _without_fragments(texts: list[Text]) -> dict[int, list[tuple[int, float]]]:
    """compel's further encodings, added to `texts`, and what each text is mixed from: (text, coefficient)."""
    mixes: dict[int, list[tuple[int, float]]] = {}
    for i in range(len(texts)):
        found: dict[int, float] = {}
        for chunk in texts[i].chunks:
            found |= {f: w for f, w in zip(chunk.fragments, chunk.weights, strict=True) if w < 1}
        if found:
            terms = [(i, 1.0)]
            for fragment, weight in found.items():
                terms.append((len(texts), math.tan((1 - max(weight, 1e-5)) * math.pi / 2)))
                texts.append(texts[i]._replace(masked=fragment))
            total = sum(coefficient for _, coefficient in terms)
            mixes[i] = [(at, coefficient / total) for at, coefficient in terms]
    return mixes


def _mixing(mixes: dict[int, list[tuple[int, float]]], count: int) -> dict[str, Any]:
    mix = np.eye(_doubled(TEXTS, count), dtype=np.float32)
    for i, terms in mixes.items():
        mix[i] = 0
        for at, coefficient in terms:
            mix[i, at] = coefficient
    return {"mix": mix, "mixed": np.bool_(bool(mixes))}


def _arrays(
    texts: Sequence[Text], vectors: Vectors, words: Words, weighting: str, pad_token: int, width: int
) -> Prompts:
    """The texts laid out; what belongs to the table of steps is left for `lay_out`."""
    window, count = words.window, _doubled(TEXTS, len(texts))
    own = [max(1, len(text.chunks)) if text.given is None else -(-len(text.given) // window) for text in texts]
    longest = next((size for size in CHUNKS if size >= max(own)), 0)
    if not longest:
        raise ValueError(f"a prompt has {max(own)} chunks of {words.length} tokens; expected {CHUNKS[-1]} at most")
    shape = (count, longest, window)
    ids = np.full(shape, pad_token, np.int32)
    ids[:, :, 0], ids[:, :, 1] = words.tokenizer.start, words.tokenizer.end
    weights, seen = np.ones(shape, np.float32), np.ones(shape, bool)
    any_given = any(text.given is not None for text in texts)
    given = np.zeros((count if any_given else 0, longest * window, width), np.float32)
    is_given = np.zeros(len(given), bool)
    keys = np.full(count, window, np.int32)
    joined = max([n for n, text in zip(own, texts, strict=True) if text.group > 0], default=1)
    for i, text in enumerate(texts):
        for chunk, row, weight, sees in zip(text.chunks, ids[i], weights[i], seen[i], strict=False):
            n = len(chunk.ids)
            row[1 : n + 2] = [*chunk.ids, words.tokenizer.end]
            weight[1 : n + 1] = chunk.weights
            sees[1 : n + 1] = [fragment != text.masked for fragment in chunk.fragments]
        keys[i] = window * (joined if text.group > 0 else own[i])
        if text.given is not None:
            given[i, : len(text.given)], is_given[i], keys[i] = text.given, True, len(text.given)
    learnt = np.zeros((_doubled(VECTORS, sum(map(len, vectors.rows))), width), np.float32)
    if vectors.rows:
        stacked = np.concatenate(vectors.rows)
        learnt[: len(stacked)] = stacked
    rest = count - len(texts)
    return Prompts(
        ids=ids,
        weights=weights,
        seen=seen,
        own=np.array([*own, *[1] * rest], np.int32),
        keys=keys,
        group=np.array([*(text.group for text in texts), *[-1] * rest], np.int32),
        repeats=np.array([*(text.repeats for text in texts), *[1] * rest], np.float32),
        empty=np.int32(0),
        mode=np.int32(MODES[weighting]),
        mix=np.eye(count, dtype=np.float32),
        mixed=np.bool_(False),
        count=np.int32(len(texts)),
        vectors=learnt,
        given=given,
        is_given=is_given,
        texts=np.zeros((1, 1 + PARTS), np.int32),
        changed=np.zeros(1, bool),
        strengths=np.zeros(PARTS, np.float32),
        parts=np.int32(1),
    )


def _doubled(size: int, count: int) -> int:
    """The smallest of size, 2 size, 4 size, ... that holds a count."""
    return size * (1 << max(0, math.ceil(math.log2(max(1, count) / size))))


def shape_of(prompts: Prompts) -> tuple[Any, ...]:
    """What must be equal for pictures to share a program: chunks, places for texts, parts, vectors and given texts."""
    sizes = prompts.ids.shape[:2], len(prompts.strengths), len(prompts.vectors), len(prompts.given)
    return (*sizes[0], *sizes[1:])


def interpolated(first: np.ndarray, last: np.ndarray, fraction: float) -> np.ndarray:
    """A prompt between two that are encoded (`Pipeline.encode`), f32[rows, d]. fraction: 0 is the first, 1 the last.

    Raises:
        ValueError: they are of different length; encode them together.
    """
    if first.shape != last.shape:
        raise ValueError(f"prompts of {first.shape} and {last.shape} have nothing between them; encode them together")
    return (first + fraction * (last - first)).astype(np.float32)
