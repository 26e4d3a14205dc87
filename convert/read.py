"""`read`: find the parts, decide the configuration, check every name both ways, then move the numbers over.

Nothing is read until all names and shapes fit. Then each tensor is read, checked, cast and laid out on its own, on two
threads, so that no more than the finished parameters and a tensor or two are in memory.
"""

from __future__ import annotations

import fnmatch
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from convert import diffusers
from convert.detect import Located, infer_config, locate, why_not_needed
from convert.names import PARTS, Entry, Part, ema_name, entries
from convert.report import Report
from convert.source import CheckpointError, Source, open_source
from sdjax.checkpoint import DTYPES, dtype_of
from sdjax.config import ModelConfig
from sdjax.types import Params

FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
KEPT = {"F32", "F16", "BF16"}  # what dtype "keep" leaves as it is; the other floats become float32
WRITTEN_AS = {"text": "the text encoder", "vae": "the autoencoder (VAE)", "unet": "the UNet"}
WORKERS = 2
OPTIONS = {"text": "--text-encoder", "vae": "--vae"}

Job = tuple[Part, Entry, Source, str]  # read this name of this source, it is this entry of this part

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all), from several threads."""


@dataclass(frozen=True)
class Converted:
    """config, params {"text", "vae", "unet"} (nested dicts of numpy arrays), report, tokenizer folder or None."""

    config: ModelConfig
    params: Params
    report: Report
    tokenizer: Path | None = None


def read(
    path: str | Path,
    *,
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
    ema: str = "auto",
    prediction: str | None = None,
    dtype: str = "float32",
    config: ModelConfig | None = None,
    ignore: Sequence[str] = (),
    progress: Progress | None = None,
    report: Report | None = None,
) -> Converted:
    """A checkpoint as a parameter tree.

    path: a .ckpt, a .safetensors or a diffusers folder; what it is, is found by its content. vae, text_encoder: files
    or folders to take these parts from instead. ema: "yes" takes the moving averages of the UNet, "no" the plain
    weights, "auto" the averages if all are there. prediction: "epsilon" or "v" if the file does not say. dtype:
    "float32", "bfloat16", "float16", or "keep" for the stored one. config: for a model that is no preset. ignore:
    patterns (as in fnmatch) of names that may be there unused. report: filled while reading, so that it can be looked
    at after an error.

    Raises:
        FileNotFoundError: no such path. CheckpointError (a ValueError): the file is damaged, unsafe, of another model,
        or its names and shapes are not exactly those of the configuration. ValueError: an argument is wrong.
    """
    _check_arguments(ema, prediction, dtype)
    report = Report(str(path), "") if report is None else report
    with ExitStack() as stack:
        found, jobs, tokenizer = _prepare(Path(path), vae, text_encoder, ema, prediction, config, ignore, report, stack)
        if not report.complete:
            raise CheckpointError(f"{path}: not a whole {found.name} model: {report.problem()}")
        params = _move(jobs, dtype, report, progress)
    return Converted(found, params, report, tokenizer)


def inspect(path: str | Path) -> tuple[ModelConfig, Report]:
    """What `read` would find at `path`, by names and shapes alone; raises as `read`, but for what is in the report."""
    report = Report(str(path), "")
    with ExitStack() as stack:
        config, _, _ = _prepare(Path(path), None, None, "auto", None, None, (), report, stack)
    return config, report


def _check_arguments(ema: str, prediction: str | None, dtype: str) -> None:
    for name, value, known in (
        ("ema", ema, ("auto", "yes", "no")),
        ("prediction", prediction, (None, "epsilon", "v")),
        ("dtype", dtype, (*DTYPES, "keep")),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, found {value!r}")


def _prepare(
    path: Path,
    vae: str | Path | None,
    text_encoder: str | Path | None,
    ema: str,
    prediction: str | None,
    config: ModelConfig | None,
    ignore: Sequence[str],
    report: Report,
    stack: ExitStack,
) -> tuple[ModelConfig, list[Job], Path | None]:
    """Everything but the numbers: the configuration, which tensor becomes what, and a tokenizer folder."""
    config, found, tokenizer = _open(path, config, report, stack)
    sources = list({id(located.source): located.source for located in found.values()}.values())
    parts = dict(found)
    if vae is not None:
        parts["vae"] = _open_other(Path(vae), "vae", stack)
    if text_encoder is not None:
        parts["text"] = _open_other(Path(text_encoder), "text", stack)
    if "unet" not in parts or config is None:
        config, notes = infer_config(path, parts, prediction)
        report.notes += notes
    for part in PARTS:
        if part not in parts:
            raise CheckpointError(f"{path}: {WRITTEN_AS[part]} is missing; give it by {OPTIONS[part]} FILE")
        report.parts[part] = f"{parts[part].source.path} ({parts[part].spelling} names)"
    report.model = config.name
    averaged = _use_ema(parts["unet"], config, ema, report)
    replaced = [located for part, located in found.items() if parts[part] is not located]
    jobs = _match(config, parts, replaced, averaged, report)
    _check_unexpected(parts, sources, ignore, report)
    return config, jobs, tokenizer


def _open(
    path: Path, config: ModelConfig | None, report: Report, stack: ExitStack
) -> tuple[ModelConfig | None, dict[Part, Located], Path | None]:
    """What lies at `path`; the configuration is None where only the parts' shapes can tell."""
    if path.is_dir():
        if not diffusers.is_diffusers_folder(path):
            raise CheckpointError(
                f"{path}: a folder without model_index.json; expected a .ckpt, a .safetensors or a diffusers folder"
            )
        found, parts, notes = diffusers.open_folder(path, stack)
        report.format = "diffusers"
        report.notes += notes
        tokenizer = path / "tokenizer"
        known = any((tokenizer / name).is_file() for name in ("vocab.json", "tokenizer.json"))
        return config or found, parts, tokenizer if known else None
    source = stack.enter_context(open_source(path))
    report.format = source.format
    parts = locate(source)
    if source.skipped:
        report.notes.append(f"{len(source.skipped)} entries that are no tensors were left out")
    return config, parts, None


def _open_other(path: Path, part: Part, stack: ExitStack) -> Located:
    """One part from another file or folder: a file of its own, a whole checkpoint, or a diffusers folder."""
    if path.is_dir():
        inside = path / diffusers.FOLDERS[part]
        return diffusers.open_part(inside if inside.is_dir() else path, part, stack)[0]
    located = locate(stack.enter_context(open_source(path))).get(part)
    if located is None:
        raise CheckpointError(f"{path}: {WRITTEN_AS[part]} is not in this file")
    return located


def _use_ema(unet: Located, config: ModelConfig, ema: str, report: Report) -> bool:
    """Whether to read the UNet's moving averages."""
    shadows = {ema_name(entry.name) for entry in entries(config, "unet", "compvis")}
    there = sum(name in unet.source.tensors for name in shadows)
    if ema == "yes" and there < len(shadows):
        raise CheckpointError(
            f"{unet.source.path}: {there} of {len(shadows)} moving averages (EMA) of the UNet are there; use --ema no"
        )
    averaged = ema != "no" and there == len(shadows)
    if there:
        taken = "the moving averages (EMA)" if averaged else "the plain weights"
        report.notes.append(f"the file holds {there} of {len(shadows)} moving averages; {taken} of the UNet were taken")
    return averaged


def _match(
    config: ModelConfig, parts: dict[Part, Located], replaced: list[Located], averaged: bool, report: Report
) -> list[Job]:
    """Every parameter's tensor; fills the report's lists but for `unexpected`."""
    jobs: list[Job] = []
    for part in PARTS:
        located = parts[part]
        tensors = located.source.tensors
        for entry in entries(config, part, located.spelling):
            name = ema_name(entry.name) if part == "unet" and averaged else located.names.get(entry.name)
            if name is None and entry.name in ("text_projection", "logit_scale"):  # no part of the encoder proper
                name = next((full for full in tensors if full.endswith(entry.name)), None)
            if name is None:
                report.missing.append(f"{part} {entry.name}")
                continue
            report.used.append(name)
            info = tensors[name]
            if not entry.accepts(info.shape):
                report.mismatched.append(f"{name} (expected {entry.shape}, found {info.shape})")
            elif info.dtype not in FLOATS:
                report.mismatched.append(f"{name} (expected floating point, found {info.dtype})")
            jobs.append((part, entry, located.source, name))
    for located in replaced:
        report.ignored |= dict.fromkeys(located.names.values(), "replaced by the file given for it")
    if averaged:
        report.ignored |= dict.fromkeys(parts["unet"].names.values(), "the moving average was taken")
    return jobs


def _check_unexpected(parts: dict[Part, Located], sources: list[Source], ignore: Sequence[str], report: Report) -> None:
    """Sorts every name that was not used into ignored and unexpected."""
    used = set(report.used)
    names = [name for source in sources for name in source.tensors]
    names += [name for part in parts.values() if part.source not in sources for name in part.names.values()]
    for name in names:
        if name in used or name in report.ignored:
            continue
        why = why_not_needed(name)
        if why is None and any(fnmatch.fnmatchcase(name, pattern) for pattern in ignore):
            why = "as asked"
        if why is None:
            report.unexpected.append(name)
        else:
            report.ignored[name] = why


def _move(jobs: list[Job], dtype: str, report: Report, progress: Progress | None) -> Params:
    """The numbers themselves, as nested dicts."""
    sizes = [_bytes(source, name) for _, _, source, name in jobs]
    total, done = sum(sizes), 0
    lock = threading.Lock()

    def move(job: Job, size: int) -> tuple[dict[tuple[str, ...], np.ndarray], str | None]:
        nonlocal done
        part, entry, source, name = job
        array = source.read(name)
        if dtype != "keep":
            to = jnp.dtype(dtype_of(part, dtype))
        else:
            to = array.dtype if source.tensors[name].dtype in KEPT else jnp.dtype("float32")
        finite = math.isfinite(_sum(array))
        note = None if finite or np.isfinite(array).all() else f"{name} holds NaN or infinite values"
        if array.ndim > 1 and not array.any():
            note = f"{name} is zero everywhere"
        if array.dtype != to:
            with np.errstate(over="ignore"):
                array = array.astype(to)
            if finite and not math.isfinite(_sum(array)) and not np.isfinite(array).all():
                raise CheckpointError(f"{source.path}: {name} is too large for {to}; convert to float32 or bfloat16")
        leaves = entry.to_leaves(array)
        if progress is not None:
            with lock:
                done += size
                progress(done, total)
        return leaves, note

    params: dict[str, Any] = {part: {} for part in PARTS}
    with ThreadPoolExecutor(WORKERS) as pool:
        futures = [pool.submit(move, job, size) for job, size in zip(jobs, sizes, strict=True)]
        try:
            for (part, *_), future in zip(jobs, futures, strict=True):
                leaves, note = future.result()
                for path, leaf in leaves.items():
                    _put(params[part], path, leaf)
                if note:
                    report.notes.append(note)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return params


def _sum(array: np.ndarray) -> float:
    """The sum in float32: finite unless a value is not, or the values are absurdly large; cheap to look at first."""
    with np.errstate(all="ignore"):
        return float(np.sum(array, dtype=np.float32))


def _bytes(source: Source, name: str) -> int:
    info = source.tensors[name]
    return math.prod(info.shape) * {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}.get(info.dtype, 1)


def _put(tree: dict[str, Any], path: tuple[str, ...], leaf: np.ndarray) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf
