"""`read`: find the parts, decide the configuration, check every name both ways, then move the numbers over.

Nothing is read until all names and shapes fit. Then each tensor is read, checked, cast and laid out on its own
(`convert.tensors`), so that no more than the finished parameters and a tensor or two are in memory.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from convert import diffusers
from convert.detect import Located, infer_config, locate, why_not_needed
from convert.diffusers_config import with_part_of
from convert.names import PARTS, Entry, Part, ema_name, entries
from convert.report import Report
from convert.source import DTYPES, CheckpointError, Source, open_source
from convert.tensors import Tensor
from sdjax import checkpoint
from sdjax.config import PRESETS, ModelConfig
from sdjax.types import Params

FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
WRITTEN_AS = {"text": "the text encoder", "vae": "the autoencoder (VAE)", "unet": "the UNet"}
WORKERS = 2
Job = tuple[Part, Entry, Source, str]  # read this name of this source, it is this entry of this part
OPTIONS = {"text": "--text-encoder", "vae": "--vae"}

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
    options = dict(vae=vae, text_encoder=text_encoder, ema=ema, prediction=prediction, dtype=dtype, config=config)
    with lazy(path, ignore=ignore, progress=progress, report=report, **options) as converted:  # type: ignore[arg-type]
        leaves, tree = jax.tree.flatten(converted.params)
        with ThreadPoolExecutor(WORKERS) as pool:
            try:
                arrays = list(pool.map(np.asarray, leaves))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return dataclasses.replace(converted, params=jax.tree.unflatten(tree, arrays))


@contextmanager
def lazy(
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
) -> Iterator[Converted]:
    """As `read`, but each parameter is read when `np.asarray` asks for it, inside the `with` block and once.

    What writes one parameter after another needs no more memory than that (`sdjax.checkpoint.save`, `convert.write`).
    """
    _check_arguments(ema, prediction, dtype)
    report = Report(str(path), "") if report is None else report
    with ExitStack() as stack:
        found, jobs, tokenizer = _prepare(Path(path), vae, text_encoder, ema, prediction, config, ignore, report, stack)
        if not report.complete:
            raise CheckpointError(f"{path}: not a whole {found.name} model: {report.problem()}")
        count = _counter(jobs, progress)
        params: dict[str, Any] = {part: {} for part in PARTS}
        for part, entry, source, name in jobs:
            for keys, leaf in Tensor(part, entry, source, name, dtype, report, count).leaves().items():
                _put(params[part], keys, leaf)
        yield Converted(found, params, report, tokenizer)


def inspect(path: str | Path, **options: Any) -> tuple[ModelConfig, Report]:
    """What `read` would find at `path`, by names and shapes alone; raises as `read`, but for what is in the report."""
    report = Report(str(path), "")
    arguments = dict(vae=None, text_encoder=None, ema="auto", prediction=None, config=None, ignore=()) | options
    with ExitStack() as stack:
        config, _, _ = _prepare(Path(path), **arguments, report=report, stack=stack)
    return config, report


def configuration(path: str | Path, **options: Any) -> ModelConfig:
    """The configuration that `read` would find, from headers alone. Options and errors as `read`."""
    report = Report(str(path), "")
    arguments = dict(vae=None, text_encoder=None, ema="auto", prediction=None, config=None, ignore=()) | options
    with ExitStack() as stack:
        found, _, _ = _prepare(Path(path), **arguments, report=report, stack=stack)
    if not report.complete:
        raise CheckpointError(f"{path}: not a whole {found.name} model: {report.problem()}")
    return found


def named_config(given: str | Path) -> ModelConfig:
    """A preset by its name, or the configuration in a config.json of ours.

    Raises:
        ValueError: neither.
    """
    if str(given) in PRESETS:
        return PRESETS[str(given)]
    try:
        return ModelConfig.from_json(Path(given).read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{given}: no preset ({', '.join(PRESETS)}) and no config.json of ours ({error})") from None


def _check_arguments(ema: str, prediction: str | None, dtype: str) -> None:
    for name, value, known in (
        ("ema", ema, ("auto", "yes", "no")),
        ("prediction", prediction, (None, "epsilon", "v")),
        ("dtype", dtype, (*checkpoint.DTYPES, "keep")),
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
    asked = config
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
    if asked is None:
        others: tuple[tuple[Part, str | Path | None], ...] = (("vae", vae), ("text", text_encoder))
        for part, other in others:
            described = None if other is None else _folder_of(Path(other), part) / "config.json"
            if described is not None and described.is_file():
                config = with_part_of(config, part, described, report.notes)
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


def _folder_of(path: Path, part: Part) -> Path:
    """The part's own folder in a diffusers folder, or `path`, which is one itself."""
    inside = path / diffusers.FOLDERS[part]
    return inside if inside.is_dir() else path


def _open_other(path: Path, part: Part, stack: ExitStack) -> Located:
    """One part from another file or folder: a file of its own, a whole checkpoint, or a diffusers folder."""
    if path.is_dir():
        return diffusers.open_part(_folder_of(path, part), part, stack)[0]
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


def _counter(jobs: list[Job], progress: Progress | None) -> Callable[[int], None]:
    """What adds up the bytes read and tells `progress`."""
    total = sum(
        math.prod(source.tensors[name].shape) * DTYPES[source.tensors[name].dtype].itemsize for *_, source, name in jobs
    )
    done, lock = 0, threading.Lock()

    def count(size: int) -> None:
        nonlocal done
        with lock:
            done += size
            if progress is not None:
                progress(done, total)

    return count


def _put(tree: dict[str, Any], path: tuple[str, ...], leaf: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf
