"""What a training computes once and keeps: rows of arrays in memory-mapped files, known by what they were made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np

from sdjax.storage.cache import signature
from sdjax.storage.files import new_file
from sdjax.train.dataset import Dataset

CHUNK = 64
"""Rows that `cached` asks for at a time."""


def cached(path: str | Path, key: str, make: Callable[[int, int], np.ndarray], count: int) -> np.ndarray:
    """Rows that are computed once and kept on disk: [count, ...], memory-mapped, read only.

    path: a .npy, with a .json next to it that holds `key`. With another key, or without the files, rows are computed
    by make(first, last) -> [last - first, ...], at most `CHUNK` at a time, and replace the old ones when all are there.

    Raises:
        ValueError: count < 1, or `make` gave rows of another number, shape or dtype than asked for or than before.
        TypeError: rows of a dtype that .npy does not know (bfloat16). FileNotFoundError: no folder to write into.
    """
    path = Path(path)
    note = path.with_suffix(".json")
    if count < 1:
        raise ValueError(f"{path}: count must be at least 1, found {count}")
    if (kept := _kept(path, note, key, count)) is not None:
        return kept
    with new_file(path, force=True) as temporary:
        _fill(temporary, make, count)
        note.unlink(missing_ok=True)  # until the new one is there, the rows on disk have no key
    with new_file(note, force=True) as temporary:
        temporary.write_text(json.dumps({"key": key}))
    return np.load(path, mmap_mode="r")


def _kept(path: Path, note: Path, key: str, count: int) -> np.ndarray | None:
    """The rows on disk if they are whole and of this key."""
    try:
        if json.loads(note.read_text()) != {"key": key}:
            return None
        rows = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return rows if len(rows) == count else None


def _fill(file: Path, make: Callable[[int, int], np.ndarray], count: int) -> None:
    """Writes rows 0 .. count - 1 as .npy."""
    out: np.ndarray | None = None
    for first in range(0, count, CHUNK):
        last = min(first + CHUNK, count)
        rows = np.asarray(make(first, last))
        if out is None:
            if rows.dtype.kind == "V":
                raise TypeError(f".npy cannot hold {rows.dtype}; cast the rows to float32 or float16")
            out = np.lib.format.open_memmap(file, "w+", rows.dtype, (count, *rows.shape[1:]))
        if rows.shape != (last - first, *out.shape[1:]) or rows.dtype != out.dtype:
            raise ValueError(
                f"rows {first} to {last} must be {out.dtype}{[last - first, *out.shape[1:]]}, "
                f"found {rows.dtype}{list(rows.shape)}"
            )
        out[first:last] = rows


def fingerprint(dataset: Dataset) -> str:
    """sha256 over names, captions, weights, and sizes, places, inodes and times of change of the files."""
    signed = lru_cache(maxsize=None)(signature)
    digest = hashlib.sha256()
    for example in dataset.examples:
        found = signed(example.file)
        row = (example.name, example.captions, example.weight, example.offset, example.size)
        digest.update(json.dumps([*row, *found]).encode())
    return digest.hexdigest()
