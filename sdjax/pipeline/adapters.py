"""The adapters of requests: which files they name, and how pictures with different ones share batches.

Two ways with the same result. Merged: the parameters are changed, once for each set of adapters and weights; nothing is
compiled and no step is slower. Live: the parameters stay, and the adapters' low-rank factors stand beside them in a
`Bank`; every picture of a batch has its own weights (`sdjax.models.adapters.live`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from sdjax.config import ModelConfig
from sdjax.devices.placement import Placement
from sdjax.hints import hint
from sdjax.models.adapters import NO_GATES, Adapter, Strength, merged, sections, strength_at
from sdjax.models.params import abstract_params
from sdjax.request import Request
from sdjax.storage.cache import digest_of, digest_of_all
from sdjax.text.embeddings import Embedding
from sdjax.text.prompt import read
from sdjax.text.syntax import LoraTag, check_strength, lora_of, parse_blocks
from sdjax.types import Params

RANKS = 64
"""Ranks of the smallest bank; one that must hold more has twice as many, and so on."""

KEPT = 4
"""Banks, and sets of adapters to merge, that are kept for requests to come."""

READ_BYTES = 2**31
"""Bytes of adapters that are kept for requests to come."""

FILES = (".safetensors", ".pt", ".bin", ".ckpt")
"""How files of adapters are called."""


class Weights(Protocol):
    """Adapters that pictures have in common: equal ones can share a batch."""

    def params(self, base: Params) -> Params:
        """The parameters with these adapters."""


class Adapted(NamedTuple):
    """What adapters make of a request.

    weights: what it shares with others; None without adapters.
    gates: f32[sections, R], its own weights of their ranks.
    embeddings: that its adapters bring with them.
    """

    weights: Weights | None
    gates: np.ndarray
    embeddings: tuple[Embedding, ...] = ()


Wanted = list[tuple[Adapter, Strength]]


# Which files


def tags_of(request: Request) -> list[LoraTag]:
    """The adapters that a request names: by itself, then in its prompt. Raises ValueError if one cannot be read."""
    tags = [lora_of(text) for text in request.loras]
    if isinstance(request.prompt, str):
        tags += read(request.prompt, request.weighting).loras
    for tag in tags:
        check_strength(tag)
    return tags


def alias_of(path: Path) -> str | None:
    """The name that the program which trained an adapter gave it; None without."""
    from convert.files.open import open_source

    try:
        with open_source(path) as source:
            return source.metadata.get("ss_output_name")
    except (ValueError, OSError):
        return None


def names_of(path: Path) -> set[str]:
    """The names that prompts may call an adapter's file by."""
    return {name for name in (path.stem, path.name, str(path), alias_of(path)) if name}


def digest_of_adapter(path: Path) -> str:
    """The sha256 of an adapter: of its file, or of all files of its folder."""
    return digest_of(path) if path.is_file() else digest_of_all([path])


def read_learnt(paths: Sequence[str | Path], config: ModelConfig) -> tuple[list[Embedding], list[str]]:
    """The learnt words (textual inversion) of files and folders, and notes on what in folders is none.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it is no embedding, or one for another model.
    """
    from convert.embeddings import read_embeddings, read_folder

    found, notes, clip = list[Embedding](), list[str](), config.clip
    for path in (Path(given).expanduser() for given in paths):
        if path.is_dir():
            learnt, more = read_folder(path, clip.width, most=clip.length - 2)
            found, notes = found + learnt, notes + more
        else:
            found += read_embeddings(path, clip.width, most=clip.length - 2)
    return found, notes


@dataclass(frozen=True, eq=False)
class Library:
    """Where the adapters that requests name are.

    folder: of adapters, with the folders in it; None: only files that are named by their path.
    files: paths by name, which come before the folder.
    """

    folder: Path | None = None
    files: Mapping[str, Path] = field(default_factory=dict)
    read_before: dict[Any, Adapter] = field(default_factory=dict, repr=False)
    found_before: dict[str, Path] = field(default_factory=dict, repr=False)

    def find(self, name: str) -> Path:
        """The file of a name: its path, or its name in the folder with or without its ending, or its alias.

        Raises:
            FileNotFoundError: there is none. ValueError: there are several.
        """
        found = self.found_before.get(name)
        if found is None or not found.exists():
            found = self.found_before[name] = self._found(name)
        return found

    def _found(self, name: str) -> Path:
        if name in self.files:
            return self.files[name]
        given = Path(name).expanduser()
        if given.is_file():
            return given
        there = self._there()
        found = [path for path in there if name in (path.stem, path.name, str(path.relative_to(self.folder or path)))]
        found = found or [path for path in there if alias_of(path) == name]
        if len(found) > 1:
            listed = " and ".join(str(path) for path in found[:2])
            raise ValueError(f"the adapter {name!r:.100} could be {listed}; rename one of them, or give a path")
        if found or given.is_dir():
            return found[0] if found else given
        names = ", ".join(sorted(path.stem for path in there)[:10])
        where = f"{self.folder} has {names or 'none'}" if self.folder else f"give their folder by {hint('lora_dir')}"
        raise FileNotFoundError(f"the adapter {name!r:.100} is not there; {where}")

    def _there(self) -> list[Path]:
        if self.folder is None:
            return []
        files = (path for path in sorted(self.folder.rglob("*")) if path.suffix.lower() in FILES)
        return [path for path in files if not path.name.startswith(".") and path.is_file()]

    def adapter(self, tag: LoraTag, config: ModelConfig) -> Adapter:
        """The adapter that a tag names, read once. Raises as `find`, and ValueError if the file cannot be used."""
        from convert.adapters import read_adapter

        path = self.find(tag.name)
        status = path.stat()
        key = (path.resolve(), status.st_mtime_ns, status.st_size, tag.rank, config)
        if key not in self.read_before:
            while self.read_before and sum(map(size_of, self.read_before.values())) > READ_BYTES:
                del self.read_before[next(iter(self.read_before))]
            adapter = read_adapter(path, config, rank_cut=tag.rank)
            for note in adapter.notes:
                warnings.warn(f"{path}: {note}", stacklevel=2)
            self.read_before[key] = adapter
        return self.read_before[key]

    def wanted(self, tags: Sequence[LoraTag], config: ModelConfig) -> Wanted:
        """The adapters of a request with their weights; of one that is named twice the last weights hold."""
        found: dict[int, tuple[Adapter, Strength]] = {}
        for tag in tags:
            adapter = self.adapter(tag, config)
            if id(adapter) in found:
                warnings.warn(f"the adapter {tag.name!r:.100} is named twice; the last weights hold", stacklevel=2)
            blocks = None if tag.blocks is None else parse_blocks(tag.blocks)
            strength = Strength(tag.unet, tag.text, blocks)
            strength_at(strength, next(iter(adapter.updates)), config)  # the number of blocks is checked there
            found[id(adapter)] = adapter, strength
        return list(found.values())


def size_of(adapter: Adapter) -> int:
    """The bytes of an adapter's numbers."""
    return sum(array.nbytes for update in adapter.updates.values() for array in update.tensors.values())


# Merged


@dataclass(eq=False)
class Merged:
    """Parameters with a set of adapters in them, made when they are asked for; of all sets one alone is in memory.

    in_memory: the set that is, common to all.
    """

    wanted: Wanted
    config: ModelConfig
    in_memory: list[tuple[Merged, Params]]

    def params(self, base: Params) -> Params:
        if not self.in_memory or self.in_memory[0][0] is not self:
            self.in_memory.clear()
            self.in_memory.append((self, merged(base, self.wanted, self.config)))
        return self.in_memory[0][1]


# Live


def modules_of(config: ModelConfig, *, convolutions: bool) -> dict[str, dict[str, tuple[int, ...]]]:
    """The kernels that a bank has factors for: part -> module -> the kernel's shape.

    convolutions: those outside of the transformers, too.
    """
    found: dict[str, dict[str, tuple[int, ...]]] = {"text": {}, "unet": {}}
    for part, modules in found.items():
        for path, leaf in jax.tree_util.tree_flatten_with_path(abstract_params(config)[part])[0]:
            names = [key.key for key in path]
            inside = part == "text" or any(name.startswith("attention") for name in names)
            if names[-1] == "kernel" and names[0] != "projection" and (inside or convolutions):
                modules["/".join(names[:-1])] = leaf.shape
    return found


class Bank:
    """Live adapters, side by side: a batch's pictures differ in their weights of them.

    ranks: that it has a place for. modules: as `modules_of`.
    """

    def __init__(self, config: ModelConfig, placement: Placement, ranks: int, *, convolutions: bool) -> None:
        self.config, self.placement, self.ranks, self.convolutions = config, placement, ranks, convolutions
        self.modules = modules_of(config, convolutions=convolutions)
        self.places: dict[int, tuple[int, Adapter]] = {}  # id of an adapter -> its first rank
        self.used = 0
        self.on_devices: Any = None

    def take(self, wanted: Wanted) -> bool:
        """Takes in the adapters that are not there yet, if all of them fit."""
        new = [adapter for adapter, _ in wanted if id(adapter) not in self.places]
        if self.used + sum(map(rank_of, new)) > self.ranks:
            return False
        if not self.convolutions and any(needs_convolutions(adapter, self.config) for adapter in new):
            return False
        for adapter in new:
            self.places[id(adapter)] = self.used, adapter
            self.used += rank_of(adapter)
            self.on_devices = None
        return True

    def gates(self, wanted: Wanted) -> np.ndarray:
        """A picture's weights of every rank, f32[sections, R]."""
        gates = np.zeros((len(sections(self.config)), self.ranks), np.float32)
        for adapter, strength in wanted:
            start = self.places[id(adapter)][0]
            for section, row in sections(self.config).items():
                gates[row, start : start + rank_of(adapter)] = strength_at(strength, section, self.config)
        return gates

    def params(self, base: Params) -> Params:
        if self.on_devices is None:
            dtypes = {part: jax.tree.leaves(base[part])[0].dtype for part in self.modules}
            self.on_devices = self.placement.put({"adapters": self._factors(dtypes)})["adapters"]
        return {**base, "adapters": self.on_devices}

    def _factors(self, dtypes: dict[str, Any]) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
        factors = {
            part: {
                name: (np.zeros((*shape[:-1], self.ranks), np.float32), np.zeros((self.ranks, shape[-1]), np.float32))
                for name, shape in modules.items()
            }
            for part, modules in self.modules.items()
        }
        for start, adapter in self.places.values():
            for (part, *module, _), update in adapter.updates.items():
                low_rank = update.low_rank()
                assert low_rank is not None, "only such are taken in"
                down, up = low_rank
                into_down, into_up = factors[part]["/".join(module)]
                into_down[..., start : start + down.shape[-1]] = down
                into_up[start : start + len(up)] = up
        return jax.tree_util.tree_map_with_path(lambda path, leaf: leaf.astype(dtypes[path[0].key]), factors)


def rank_of(adapter: Adapter) -> int:
    """The places for ranks that an adapter takes."""
    return max(len(factors[1]) for update in adapter.updates.values() if (factors := update.low_rank()) is not None)


def can_live(adapter: Adapter) -> bool:
    """Whether all that an adapter changes has a low rank."""
    return all(update.low_rank() is not None for update in adapter.updates.values())


def needs_convolutions(adapter: Adapter, config: ModelConfig) -> bool:
    """Whether an adapter changes what stands outside of the transformers."""
    few = modules_of(config, convolutions=False)
    return any("/".join(module) not in few[part] for part, *module, _ in adapter.updates)


@dataclass
class Adapting:
    """Finds for each request which adapters it has, and whom it can share a batch with.

    live: whether pictures with different adapters may share batches; else each set is merged into the parameters.
    """

    config: ModelConfig
    placement: Placement
    library: Library
    live: bool = True
    banks: list[Bank] = field(default_factory=list)
    sets: dict[Any, Merged] = field(default_factory=dict)
    in_memory: list[tuple[Merged, Params]] = field(default_factory=list)

    def __call__(self, request: Request) -> Adapted:
        """What adapters make of a request.

        Raises:
            FileNotFoundError, ValueError: as `Library.wanted`.
        """
        wanted = self.library.wanted(tags_of(request), self.config)
        embeddings = tuple(
            Embedding(name, vectors, str(adapter.source))
            for adapter, _ in wanted
            for name, vectors in adapter.embeddings.items()
        )
        wanted = [(adapter, strength) for adapter, strength in wanted if strength.unet or strength.text]
        if not wanted:
            return Adapted(None, NO_GATES, embeddings)
        if not self.live or not all(can_live(adapter) for adapter, _ in wanted):
            return Adapted(self._set_of(wanted), NO_GATES, embeddings)
        bank = self._bank_for(wanted)
        return Adapted(bank, bank.gates(wanted), embeddings)

    def _set_of(self, wanted: Wanted) -> Merged:
        key = tuple((id(adapter), strength) for adapter, strength in wanted)
        if key not in self.sets:
            while len(self.sets) >= KEPT:
                del self.sets[next(iter(self.sets))]
            self.sets[key] = Merged(wanted, self.config, self.in_memory)
        return self.sets[key]

    def _bank_for(self, wanted: Wanted) -> Bank:
        for bank in self.banks:
            if bank.take(wanted):
                return bank
        ranks = RANKS * 2 ** max(0, math.ceil(math.log2(sum(rank_of(adapter) for adapter, _ in wanted) / RANKS)))
        convolutions = any(needs_convolutions(adapter, self.config) for adapter, _ in wanted)
        bank = Bank(self.config, self.placement, ranks, convolutions=convolutions)
        bank.take(wanted)
        self.banks = [*self.banks[1 - KEPT :], bank]
        return bank
