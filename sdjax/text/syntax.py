"""What is written in a prompt: comments, networks, parts joined by AND, schedules and weights.

All of it is plain text to plain data, in the order in which it is taken apart: `without_comments`, `networks`, `parts`,
`schedule`, and last `pieces`, the weighted texts that are tokenised. Three dialects have weights of their own: that of
AUTOMATIC1111's web UI (`a1111_pieces`), of ComfyUI (`comfy_pieces`) and of compel (`compel_pieces`). No function takes
much longer than reading the text, however its brackets are nested.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from numbers import Real
from typing import NamedTuple

WEIGHTINGS = ("a1111", "comfy", "compel", "none")
"""Ways of weighting, the usual one first."""

ROUND, SQUARE = 1.1, 1 / 1.1
"""What a pair of brackets without a number multiplies by."""

NESTING = 100
"""Most brackets within brackets."""


class Piece(NamedTuple):
    """A part of a prompt with one weight; `is_break` marks where a chunk ends, and has no text of its own."""

    text: str
    weight: float = 1.0
    is_break: bool = False


BREAK = Piece("BREAK", 1.0, True)


# Comments and networks


def without_comments(text: str) -> str:
    """The text without what follows a `#` in each line; of a line that begins with it a line break is left."""
    text = re.sub(r"(^|\n)#[^\n]*(\n|$)", "\n", text)
    return re.sub(r"#[^\n]*(\n|$)", "\n", text)


class Network(NamedTuple):
    """A `<kind:item:item>` in a prompt. positional: items without "="; named: those with one."""

    kind: str
    items: tuple[str, ...]
    positional: tuple[str, ...]
    named: dict[str, str]

    def __str__(self) -> str:
        return f"<{':'.join([self.kind, *self.items])}>"


def networks(text: str) -> tuple[str, list[Network]]:
    """The text without its `<word:anything>`, and these; white space around them stays.

    Raises:
        ValueError: an item has more than one "=".
    """
    found: list[Network] = []

    def cut(match: re.Match[str]) -> str:
        items = tuple(match[2].split(":"))
        pairs = [item.split("=") for item in items]
        wrong = next((item for item, pair in zip(items, pairs, strict=True) if len(pair) > 2), None)
        if wrong is not None:
            raise ValueError(f"{match[0]:.100} has {wrong!r:.60} with more than one '='; write NAME=VALUE")
        positional = tuple(pair[0] for pair in pairs if len(pair) == 1)
        found.append(Network(match[1], items, positional, {pair[0]: pair[1] for pair in pairs if len(pair) == 2}))
        return ""

    return re.sub(r"<(\w+):([^>]+)>", cut, text), found


class LoraTag(NamedTuple):
    """A `<lora:name:text:unet>`: a file's name, its weights, and the rank to cut it to (None: whole).

    blocks: the weights of blocks as they were written ("1,0,0,..."), or None.
    """

    name: str
    text: float
    unet: float
    rank: int | None = None
    blocks: str | None = None


LORA_KINDS = ("lora", "lyco")
LARGEST_STRENGTH = 100


def lora_tag(network: Network) -> LoraTag:
    """What a `<lora:name:te:unet:dyn>` says; te, unet, dyn and lbw may be named.

    Raises:
        ValueError: the name is missing, a weight is no number, or an item is not known.
    """
    positional, named = list(network.positional), dict(network.named)
    names = ("te", "unet", "dyn")
    if not positional or not positional[0] or len(positional) > 1 + len(names):
        raise ValueError(f"{network!s:.100}: expected <{network.kind}:NAME:WEIGHT>")
    said = dict(zip(names, positional[1:], strict=False)) | named
    unknown = sorted(set(said) - {*names, "lbw"})
    if unknown:
        raise ValueError(f"{network!s:.100}: {unknown[0]!r:.40} is not known; there are te, unet, dyn and lbw")

    def number(name: str, default: float) -> float:
        try:
            return float(said[name]) if name in said else default
        except ValueError:
            raise ValueError(f"{network!s:.100}: {said[name]!r:.40} is no weight; expected a number") from None

    text = number("te", 1.0)
    rank = number("dyn", 0)
    if rank != int(rank if abs(rank) < 1e9 else -1) or rank < 0 or ("dyn" in said and rank < 1):
        raise ValueError(f"{network!s:.100}: dyn must be a whole number from 1, found {said['dyn']!r:.40}")
    return LoraTag(positional[0], text, number("unet", text), int(rank) or None, said.get("lbw"))


def lora_of(text: str) -> LoraTag:
    """The adapter that "FILE", "FILE:WEIGHT" or "FILE:WEIGHT:TEXT_WEIGHT" names. The text encoder's weight is the other
    one if it is left out.

    Raises:
        ValueError: there is no file's name in it.
    """
    number = r"[+-]?(?:\d+\.?\d*|\.\d+)"
    match = re.fullmatch(rf"(.*?)(?::({number}))?(?::({number}))?", text, re.DOTALL)
    if match is None or not match[1].strip():
        raise ValueError(f"expected FILE[:WEIGHT[:TEXT_WEIGHT]], found {text!r:.200}")
    unet = 1.0 if match[2] is None else float(match[2])
    return LoraTag(match[1], unet if match[3] is None else float(match[3]), unet)


def check_strength(tag: LoraTag) -> LoraTag:
    """The tag. Raises ValueError if its weights are no numbers, or too large to mean anything."""
    for weight in (tag.unet, tag.text):
        good = isinstance(weight, Real) and not isinstance(weight, bool) and abs(weight) <= LARGEST_STRENGTH
        if not good:
            bounds = f"[-{LARGEST_STRENGTH}, {LARGEST_STRENGTH}]"
            raise ValueError(f"the weight of the adapter {tag.name!r:.100} must lie in {bounds}, found {weight!r}")
    return tag


def parse_blocks(text: str) -> tuple[float, ...]:
    """The weights of blocks "1,0,0.5,...". Raises ValueError if one is no number."""
    try:
        found = tuple(float(number) for number in text.split(","))
    except ValueError:
        raise ValueError(f"block weights must be numbers with commas between them, found {text!r:.100}") from None
    if not all(abs(number) <= LARGEST_STRENGTH for number in found):
        raise ValueError(f"block weights must lie in [-{LARGEST_STRENGTH}, {LARGEST_STRENGTH}], found {text!r:.100}")
    return found


# Parts joined by AND


def parts(text: str) -> list[tuple[str, float]]:
    """The texts between the words AND, each with the weight behind its last colon (1 where there is none)."""
    found = []
    for part in re.split(r"\bAND\b", text):
        part = part.rstrip()
        weight = re.search(r"\s*:\s*([-+]?(?:\d+\.?|\d*\.\d+))\Z", part)
        found.append((part[: weight.start()], float(weight[1])) if weight else (part, 1.0))
    return found


# Schedules


@dataclass
class Group:
    """Brackets that are open, or a schedule or alternation that was found; at the top, a whole prompt.

    options: the texts between its bars or colons, each a list of strings and schedules.
    """

    opening: str
    options: list[list[str | Switch]] = field(default_factory=lambda: [[]])
    separators: list[str] = field(default_factory=list)

    def add(self, item: str | Switch) -> None:
        self.options[-1].append(item)


class Switch(NamedTuple):
    """Texts that take turns: the first until a step, then the second (`until`), or one after the other (None)."""

    options: list[list[str | Switch]]
    until: int | None


_NUMBER = re.compile(r"\s*([+-]?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][+-]?\d+)?)\s*")


def schedule(
    text: str, steps: int, *, first_pass: int | None = None, old: bool = False, notes: list[str] | None = None
) -> list[tuple[int, str]]:
    """A prompt's texts over the steps of a sampler: (last step, text), steps counted from 1.

    `[a:b:n]` is a until step n, then b; `[a|b|c]` takes turns. A number with a dot is a fraction of the steps. What is
    no schedule stays as it is, and so does the whole text if it has a bar or a lone backslash outside of one.

    steps: of the sampler. first_pass: steps of the pass before, in a second pass (fractions 1 to 2 are of the second).
    old: numbers below 1 are fractions, all others steps, as before AUTOMATIC1111 1.6.
    notes: numbers outside of the steps, which switch at once or never, are added to it.
    """

    def until(number: str) -> int:
        value, offset = float(number), 0 if first_pass is None else 1
        if old:
            value = value * steps if value < 1 else value
        elif "." in number:
            value = (value - offset) * steps
        else:
            value -= first_pass or 0
        if notes is not None and not 0 <= value <= steps:
            when = "from the start" if value < 0 else "never"
            notes.append(f"the schedule step {number} is outside of the {steps} steps: it switches {when}")
        return int(min(steps, max(value, -1)))

    tree = _schedule_tree(text, until)
    if tree is None:
        return [(steps, text)]
    ends = {steps}
    _collect_ends(tree, steps, ends)
    return [(step, _text_at(tree, step)) for step in sorted(ends)]


def text_at(texts: list[tuple[int, str]], call: int) -> int:
    """Which of a schedule's texts a call of the model sees, calls counted from 0.

    An entry "until step n" is in use for calls 0 to n, one more than its number says, as in AUTOMATIC1111's web UI.
    """
    return next((i for i, (last, _) in enumerate(texts) if call <= last), len(texts) - 1)


def _schedule_tree(text: str, until: Callable[[str], int]) -> list[str | Switch] | None:
    """The text with its schedules found; None if it is none as a whole."""
    if re.search(r"(?<!\\)(?:\\\\)*\\(\n|\Z)", text):
        return None
    stack = [Group("")]
    for token in re.findall(r"(?:[^\\\[\]():|]|\\.)+|[\[\]():|]", text):
        if token in "[(":
            stack.append(Group(token))
        elif token in ":|":
            if len(stack) == 1 and token == "|":
                return None
            if len(stack) == 1:
                stack[-1].add(token)
            else:
                stack[-1].separators.append(token)
                stack[-1].options.append([])
        elif token in "])":
            group = stack[-1]
            closed = _closed(group, until) if len(stack) > 1 and group.opening == {"]": "[", ")": "("}[token] else None
            if closed is not None:
                stack.pop()
                for item in closed:
                    stack[-1].add(item)
            elif not _flatten(stack):
                return None
            else:
                stack[-1].add(token)
        else:
            stack[-1].add(token)
    return stack[0].options[0] if _flatten(stack) else None


def _closed(group: Group, until: Callable[[str], int]) -> list[str | Switch] | None:
    """What a pair of brackets means, or None if it is neither a schedule nor brackets around a text."""
    options, separators = group.options, group.separators
    if group.opening == "(":
        if "|" in separators or len(separators) > 1:
            return None
        inner = options[0] if not separators else [*options[0], ":", *options[1]]
        return ["(", *inner, ")"]
    if not separators:
        return ["[", *options[0], "]"]
    if ":" not in separators:
        return [Switch(options, None)]
    number = "".join(item if isinstance(item, str) else "|" for item in options[-1])
    match = _NUMBER.fullmatch(number)
    if "|" in separators or len(separators) > 2 or match is None:
        return None
    return [Switch([[], *options[:-1]][-2:], until(match[1]))]


def _flatten(stack: list[Group]) -> bool:
    """Makes text of all brackets that are still open; False if a bar is among it."""
    while len(stack) > 1:
        group = stack.pop(1)
        if "|" in group.separators:
            return False
        stack[0].add(group.opening)
        for i, option in enumerate(group.options):
            if i:
                stack[0].add(group.separators[i - 1])
            stack[0].options[0] += option
    return True


def _collect_ends(items: list[str | Switch], steps: int, ends: set[int]) -> None:
    for item in items:
        if isinstance(item, Switch):
            if item.until is None:
                ends.update(range(1, steps + 1))
            elif item.until >= 1:
                ends.add(item.until)
            for option in item.options:
                _collect_ends(option, steps, ends)


def _text_at(items: list[str | Switch], step: int) -> str:
    found = []
    for item in items:
        if isinstance(item, str):
            found.append(item)
        elif item.until is None:
            found.append(_text_at(item.options[(step - 1) % len(item.options)], step))
        else:
            found.append(_text_at(item.options[0 if step <= item.until else 1], step))
    return "".join(found)


def nesting(text: str) -> int:
    """The most brackets that are open at once in a text, escaped ones aside."""
    depth = deepest = 0
    for token in re.findall(r"\\.|[\[\]()]", text):
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(token, 0)
        depth = max(depth, 0)
        deepest = max(deepest, depth)
    return deepest


# Weights

_A1111 = re.compile(
    r"\\(?P<escaped>[()\[\]\\]?)|(?P<open>[(\[])|:\s*(?P<weight>[+-]?[\d.]+)\s*\)|(?P<close>[)\]])|(?P<text>[^\\()\[\]:]+|:)"
)


def a1111_pieces(text: str) -> list[Piece]:
    """The weighted texts of a prompt in the way of AUTOMATIC1111's web UI.

    `(x)` is 1.1, `[x]` 1/1.1, `(x:w)` w; nesting multiplies; `\\(` is a bracket. Neighbours of equal weight become one.
    The word BREAK ends a chunk, also within brackets, whose weight goes on behind it. `(x:1.2.3)` has no number, and
    counts as 1.1.
    """
    found: list[tuple[str, bool]] = []  # texts, and whether they are a BREAK
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def multiply(start: int, by: float) -> None:
        for i in range(start, len(weights)):
            weights[i] *= by

    def add(text: str) -> None:
        for i, part in enumerate(re.split(r"\s*\bBREAK\b\s*", text)):
            if i:
                found.append(("BREAK", True))
                weights.append(1.0)
            found.append((part, False))
            weights.append(1.0)

    for match in _A1111.finditer(text):
        if match["open"]:
            opened[match["open"]].append(len(found))
        elif match["weight"] and opened["("]:
            weight = _number(match["weight"])
            if weight is None:
                add(match[0][:-1])
            multiply(opened["("].pop(), ROUND if weight is None else weight)
        elif match["close"] and opened[{")": "(", "]": "["}[match["close"]]]:
            multiply(opened[{")": "(", "]": "["}[match["close"]]].pop(), ROUND if match["close"] == ")" else SQUARE)
        elif match["escaped"] is not None:
            add(match["escaped"])
        else:
            add(match[0])
    for kind, by in (("(", ROUND), ("[", SQUARE)):
        for start in opened[kind]:
            multiply(start, by)
    pieces = [
        BREAK if is_break else Piece(text, weight) for (text, is_break), weight in zip(found, weights, strict=True)
    ]
    return _joined(pieces) or [Piece("")]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _joined(pieces: list[Piece]) -> list[Piece]:
    """The pieces, neighbours of equal weight as one."""
    groups: list[tuple[list[str], Piece]] = []
    for piece in pieces:
        if groups and not piece.is_break and not groups[-1][1].is_break and groups[-1][1].weight == piece.weight:
            groups[-1][0].append(piece.text)
        else:
            groups.append(([piece.text], piece))
    return [piece._replace(text="".join(texts)) for texts, piece in groups]


def comfy_pieces(text: str) -> list[Piece]:
    """The weighted texts of a prompt in the way of ComfyUI: `(x)` is 1.1, `(x:w)` is w, whatever is around it.

    Square brackets and BREAK are text; `\\(` is a bracket.
    """
    found: list[Piece] = []
    work = [(text, 1.0, True)]  # texts, and whether brackets in them are still to be looked for
    while work:
        text, weight, is_whole = work.pop()
        if not is_whole:
            found.append(Piece(re.sub(r"\\([()])", r"\1", text), weight))
            continue
        inside = []
        for part in _outer_brackets(text):
            if not re.fullmatch(r"\(.*(?<!\\)\)", part, re.DOTALL):
                inside.append((part, weight, False))
                continue
            part, own = part[1:-1], weight * ROUND
            at = part.rfind(":")
            if at > 0 and (number := _number(part[at + 1 :])) is not None:
                part, own = part[:at], number
            inside.append((part, own, True))
        work += reversed(inside)
    return found


def _outer_brackets(text: str) -> Iterator[str]:
    """The text, divided into its outermost pairs of round brackets and what is between them."""
    begin = depth = 0
    for match in re.finditer(r"\\[()]|[()]", text):
        if match[0] == "(":
            if depth == 0 and begin < match.start():
                yield text[begin : match.start()]
                begin = match.start()
            depth += 1
        elif match[0] == ")":
            depth -= 1
            if depth == 0:
                yield text[begin : match.end()]
                begin = match.end()
    if begin < len(text):
        yield text[begin:]


COMPEL = 1.1, 0.9
"""What each + and - multiplies by in compel's way."""

_COMPEL = re.compile(
    r"\\(?P<escaped>[()+-])|(?P<open>\()|(?P<close>\))(?P<after>\++|-+|[+-]?(?:\d+\.?\d*|\.\d+))?"
    r"|(?P<comma>,)|(?P<dot>\.)|(?P<space>\s+)|(?P<word>(?:\\.|[^\s(),.+\\-]|[+-](?=[^\s(),.+-]))+)(?P<signs>\++|-+)?|(?P<other>.)"
)
_CALL = re.compile(
    r"""\s*\((?P<texts>\s*(?:"[^"]*"|'[^']*')(?:\s*,\s*(?:"[^"]*"|'[^']*'))*)\s*\)\.(?P<name>\w+)\((?P<args>[^()]*)\)\s*"""
)


def compel_parts(text: str) -> list[tuple[str, float]]:
    """The texts of a prompt in the way of compel, with their weights: `("a", "b").and(1, 0.5)` are two.

    Raises:
        ValueError: `.blend()` or `.swap()`, which are not supported, or weights of `.and()` that do not fit.
    """
    call = _CALL.fullmatch(text)
    if call and call["name"] == "and":
        texts = [found[1:-1] for found in re.findall(r"\"[^\"]*\"|'[^']*'", call["texts"])]
        weights = (
            [_number(number) for number in call["args"].split(",")] if call["args"].strip() else [1.0] * len(texts)
        )
        if len(weights) != len(texts) or None in weights:
            raise ValueError(f"{text[:100]!r}: .and() has {len(texts)} texts; expected as many numbers, or none")
        return [(part, weight or 0.0) for part, weight in zip(texts, weights, strict=True)]
    if method := re.search(r"\.(blend|swap|and)\(", text):
        advice = {
            "blend": "give a prompt as numbers, interpolated in Python",
            "swap": "write [a:b:0.5] in the way of a1111",
            "and": 'write ("a", "b").and(1, 1)',
        }[method[1]]
        raise ValueError(f"the prompt has compel's .{method[1]}() where it is not supported; {advice}")
    return [(text, 1.0)]


def compel_pieces(text: str) -> list[Piece]:
    """The weighted texts of a prompt in the way of compel.

    `x+` and `(x)+` are 1.1, each further + multiplies; each - is 0.9; `(x)1.5` is 1.5; what is in brackets multiplies.
    Words are joined by one space.
    """
    words: list[list[str]] = []
    weights: list[float] = []
    opened: list[int] = []

    def signs(text: str) -> float:
        return COMPEL[text[0] == "-"] ** len(text)

    def add(word: str, weight: float = 1.0) -> None:
        words.append([word])
        weights.append(weight)

    for match in _COMPEL.finditer(text):
        if match["open"]:
            opened.append(len(words))
        elif match["close"] and opened:
            after, start = match["after"], opened.pop()
            by = 1.0 if not after else signs(after) if after.strip("+-") == "" else float(after)
            for i in range(start, len(weights)):
                weights[i] *= by
        elif match["close"]:
            add(match["close"] + (match["after"] or ""))
        elif match["word"]:
            add(re.sub(r"\\(.)", r"\1", match["word"]), signs(match["signs"]) if match["signs"] else 1.0)
        elif not match["space"]:
            add(match["escaped"] or match[0])
    merged: list[tuple[list[str], float]] = []
    for (word,), weight in zip(words, weights, strict=True):
        if merged and merged[-1][1] == weight:
            merged[-1][0].append(word)
        else:
            merged.append(([word], weight))
    return [Piece(re.sub(r" ([,)])", r"\1", " ".join(texts)), weight) for texts, weight in merged] or [Piece("")]
