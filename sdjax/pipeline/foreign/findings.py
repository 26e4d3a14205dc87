"""What was found in another tool's text: settings that sdjax has, and a line for each thing that it cannot honour."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from sdjax.request import DEPENDENT, SEEDS, Request, check_values, is_storable, settings

LONGEST = 120
"""Most characters of a foreign value that a line repeats."""


class Foreign(NamedTuple):
    """What another tool's text says of a picture, in the words of a `Request`.

    source: whose text it is: "A1111", "ComfyUI", "InvokeAI", "sdjax" (the readable half of a recipe of ours).
    settings: of a `Request`, by name.
    model: its name in the text, "" if there is none.
    model_hash: the first digits of its file's sha256 (A1111: 10, before 2023 8 of an older kind), "" if there is none.
    unhonoured: one plain line for each thing that cannot be honoured, with what is done instead.
    networks: hashes of adapters (LoRA) by their names, as far as the text says them.
    """

    source: str
    settings: dict[str, Any]
    model: str = ""
    model_hash: str = ""
    unhonoured: tuple[str, ...] = ()
    networks: Mapping[str, str] = MappingProxyType({})


class Findings:
    """Collects settings and lines; every value that is put in has been checked against the table of settings."""

    def __init__(self, kind: type[Request] | None = None) -> None:
        self.known = settings(kind)
        self.settings: dict[str, Any] = {}
        self.lines: list[str] = []

    def leave(self, said: str, why: str) -> None:
        """A line: what the text says, and why it is not honoured or what is done instead."""
        line = f"{short(said)}: {why}"
        if line not in self.lines:
            self.lines.append(line)

    def accepts(self, name: str, value: Any) -> bool:
        """Whether there is a setting of that name that can have that value."""
        return name in self.known and self.known[name].accepts(value)

    def put(self, name: str, value: Any, said: str) -> bool:
        """Takes a setting, or writes a line about `said`, the words of the text, if sdjax has none such."""
        if name not in self.known:
            self.leave(said, f"left out; this version of sdjax has no {name}")
        elif not self.known[name].accepts(value):
            self.leave(said, f"left out; {name} must be {self.known[name].expected}")
        else:
            self.settings[name] = value
            return True
        return False

    def put_text(self, name: str, text: str) -> None:
        """Takes a prompt. What no file can keep in it (half a character) is replaced."""
        if not is_storable(text):
            text = text.encode("utf-8", "replace").decode()
            self.leave(name, "some of its characters are damaged in the text; '?' stands for them")
        elif "\N{REPLACEMENT CHARACTER}" in text:
            self.leave(name, "some of its characters are damaged in the text")
        self.settings[name] = text

    def put_seed(self, seed: Any, said: str, name: str = "seed") -> None:
        """Takes a seed of 64 bits; sdjax has 32."""
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            self.leave(said, f"no seed that can be had again; {self.known['seed'].usual} is used")
            return
        if seed >= SEEDS:
            same = "torch on the CPU draws the same noise from both" if self.settings.get("noise") == "torch" else ""
            why = f"seeds of sdjax are below 2^32; its last 32 bits are used, {seed % SEEDS}"
            self.leave(said, f"{why} ({same})" if same else f"{why}, which gives another picture")
        self.put(name, seed % SEEDS, said)

    def put_size(self, size: tuple[int, int] | None, said: str) -> tuple[int, int] | None:
        """Takes width and height, cut to multiples of 8 as other tools do; gives back what was taken."""
        if size is None or not all(8 <= side < 2**16 for side in size):
            self.leave(said, "no size of a picture; the model's own is used")
            return None
        width, height = (side - side % 8 for side in size)
        if (width, height) != size:
            self.leave(said, f"sides must be multiples of 8; {width}x{height} is used")
        self.settings |= {"width": width, "height": height}
        return width, height

    def finish(self) -> tuple[str, ...]:
        """Drops settings that the sampler and the spacing found do not have. All lines."""
        chosen = {name: self.settings[name] for name in ("sampler", "spacing") if name in self.settings}
        for name in DEPENDENT:
            if name in self.settings:
                try:
                    check_values(chosen | {name: self.settings[name]})
                except ValueError:  # each value by itself is usable
                    owner = chosen["spacing" if name == "rho" else "sampler"]
                    self.leave(f"{name} {self.settings.pop(name):g}", f"left out; {owner} has no {name}")
        return tuple(self.lines)


def short(text: Any) -> str:
    """A foreign value in one line, not too long."""
    line = " ".join(str(text).encode("utf-8", "replace").decode().split())
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}..."


def whole(text: Any) -> int | None:
    """A whole number from a text or from JSON, or None."""
    if isinstance(text, bool):
        return None
    if isinstance(text, int):
        return text
    if isinstance(text, float):
        return int(text) if text.is_integer() and abs(text) < 2**53 else None
    match = re.fullmatch(r"\s*([+-]?[0-9]{1,20})(?:\.0*)?\s*", text) if isinstance(text, str) else None
    return None if match is None else int(match[1])


def real(text: Any) -> float | None:
    """A finite number from a text or from JSON, or None."""
    if isinstance(text, bool) or not isinstance(text, int | float | str):
        return None
    try:
        number = float(text)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def decimal(number: float) -> str:
    """A weight as it is written in prompts and options, without an exponent."""
    return f"{number:.6f}".rstrip("0").rstrip(".")
