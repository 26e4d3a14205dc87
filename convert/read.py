"""`read`: find the parts, decide the configuration, check every name both ways, then move the numbers over.

Nothing is read until all names and shapes fit. Then each tensor is read, checked, cast and laid out on its own
(`convert.tensors`), so that no more than the finished parameters and a tensor or two are in memory.
"""

from __future__ import annotations

import dataclasses
import glob
import math
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from convert import detect, diffusers, hub, maxdiffusion
from convert.detect import Located, infer_config, locate, matches, why_not_needed
from convert.diffusers_config import with_part_of
from convert.files.open import open_source
from convert.files.source import DTYPES, CheckpointError, Source
from convert.names import PARTS, Entry, Part, ema_name, known_names, spelled, undotted
from convert.names import Path as Keys
from convert.report import Report
from convert.tensors import Tensor, Zeros
from sdjax.config import PRESETS, ModelConfig
from sdjax.hints import hint
from sdjax.models.params import DTYPES as OUR_DTYPES
from sdjax.types import Params

WRITTEN_AS = {"text": "the text encoder", "vae": "the autoencoder (VAE)", "unet": "the UNet"}
WORKERS = 2
Job = tuple[Part, Entry, Source, str]  # read this name of this source, it is this entry of this part
OPTIONS = {"text": "text_encoder", "vae": "vae"}  # that give a part, by their names in `sdjax.hints`

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

    path: a .ckpt, a .safetensors or a diffusers folder (PyTorch's or Flax'); what it is, is found by its content. vae,
    text_encoder: files or folders to take these parts from instead. ema: "yes" takes the moving averages of the UNet,
    "no" the plain weights, "auto" the averages if all are there. prediction: "epsilon" or "v" if the file does not say.
    dtype: "float32", "bfloat16", "float16", or "keep" for the stored one. config: for a model that is no preset.
    ignore: patterns (as in fnmatch) of names that may be there unused. report: filled while reading, so that it can be
    looked at after an error.

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

    What writes one parameter after another needs no more memory than that (`storage.checkpoint.save`, `convert.write`).
    """
    _check_arguments(ema, prediction, dtype)
    report = Report(str(path), "") if report is None else report
    with ExitStack() as stack:
        asked = Asked(vae, text_encoder, ema, prediction, config, ignore)
        found, jobs, tokenizer = _prepare(Path(path), asked, report, stack)
        if not report.complete:
            raise CheckpointError(f"{path}: not a whole {found.name} model: {report.problem()}{_advice(report)}")
        params = _tree(jobs, dtype, report, progress)
        yield Converted(found, params, report, tokenizer)


@contextmanager
def lazy_part(
    path: str | Path,
    part: Part,
    config: ModelConfig,
    *,
    dtype: str = "float32",
    ignore: Sequence[str] = (),
    report: Report | None = None,
) -> Iterator[Converted]:
    """The same of one part alone, "text" or "vae", for a model of this configuration.

    path: a file of the part, a whole checkpoint, or a diffusers folder. What is yielded has the part's parameters
    alone, and the configuration with what a config.json next to the part says of it.

    Raises as `read`.
    """
    report = Report(str(path), "") if report is None else report
    with ExitStack() as stack:
        located = _open_other(Path(path), part, ignore, stack)
        described = _folder_of(Path(path), part) / "config.json"
        if described.is_file():
            config = with_part_of(config, part, described, report.notes)
        if part == "text":
            _check_width(config, located)
        jobs = _match(config, {part: located}, False, ignore, report)
        known = report.ignored.keys() | report.used
        for name in (name for names in located.names.values() for name in names if name not in known):
            if why_not_needed(name) is None and not matches(name, ignore):
                report.unexpected.append(name)
        if not report.complete:
            raise CheckpointError(f"{path}: not {WRITTEN_AS[part]} of {config.name}: {report.problem()}")
        yield Converted(config, _tree(jobs, dtype, report, None), report)


def inspect(
    path: str | Path,
    *,
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
    ema: str = "auto",
    prediction: str | None = None,
    config: ModelConfig | None = None,
    ignore: Sequence[str] = (),
) -> tuple[ModelConfig, Report]:
    """What `read` would find and take with these options, by names and shapes alone.

    Raises as `read`, but for what is in the report.
    """
    _check_arguments(ema, prediction, "keep")
    report = Report(str(path), "")
    with ExitStack() as stack:
        asked = Asked(vae, text_encoder, ema, prediction, config, ignore)
        found, _, _ = _prepare(Path(path), asked, report, stack)
    return found, report


def configuration(path: str | Path, **options: Any) -> ModelConfig:
    """The configuration that `read` would give for the same path and options (of `inspect`), by names and shapes alone.

    Raises as `read`, for everything that can be known before a number is read.
    """
    config, report = inspect(path, **options)
    if not report.complete:
        raise CheckpointError(f"{path}: not a whole {config.name} model: {report.problem()}{_advice(report)}")
    return config


class Asked(NamedTuple):
    """The options of `read` that say what is to be taken."""

    vae: str | Path | None
    text_encoder: str | Path | None
    ema: str
    prediction: str | None
    config: ModelConfig | None
    ignore: Sequence[str]


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
        why = error.strerror if isinstance(error, OSError) else error
        known = ", ".join(PRESETS)
        raise ValueError(
            f"{hint('config', str(given))}: no preset ({known}) and no config.json of ours ({why})"
        ) from None


def _check_arguments(ema: str, prediction: str | None, dtype: str) -> None:
    for name, value, known in (
        ("ema", ema, ("auto", "yes", "no")),
        ("prediction", prediction, (None, "epsilon", "v")),
        ("dtype", dtype, (*OUR_DTYPES, "keep")),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, found {value!r}")


def _prepare(path: Path, asked: Asked, report: Report, stack: ExitStack) -> tuple[ModelConfig, list[Job], Path | None]:
    """Everything but the numbers: the configuration, which tensor becomes what, and a tokenizer folder."""
    config, found, sources, tokenizer = _open(path, asked, report, stack)
    parts = dict(found)
    if asked.vae is not None:
        parts["vae"] = _open_other(Path(asked.vae), "vae", asked.ignore, stack)
    if asked.text_encoder is not None:
        parts["text"] = _open_other(Path(asked.text_encoder), "text", asked.ignore, stack)
    for part, located in parts.items():
        report.parts[part] = str(located.source.path)
    held = detect.contents(sources[0], found) if sources else "no weights"
    if "unet" not in parts:
        advice = [hint(OPTIONS[part]) for part in OPTIONS if part in found]
        this = f", and this file by {' or '.join(advice)}" if advice else ""
        raise CheckpointError(f"{path}: holds {held} and no UNet; give a whole checkpoint{this}")
    if config is None:
        config, notes = infer_config(parts["unet"], asked.prediction)
        report.notes += notes
    if asked.config is None:
        others: tuple[tuple[Part, str | Path | None], ...] = (("vae", asked.vae), ("text", asked.text_encoder))
        for part, other in others:
            described = None if other is None else _folder_of(Path(other), part) / "config.json"
            if described is not None and described.is_file():
                config = with_part_of(config, part, described, report.notes)
    for part in PARTS:
        if part not in parts:
            raise CheckpointError(
                f"{path}: holds {held}; {WRITTEN_AS[part]} is missing; give it by {hint(OPTIONS[part])}"
            )
    fitting = detect.without_unusable_layers(config, parts["text"])
    if fitting != config:
        config = detect.named(fitting, f"{config.name}-variant")
    report.model = config.name
    _check_width(config, parts["text"])
    averaged = _use_ema(parts["unet"], config, asked.ema, report)
    jobs = _match(config, parts, averaged, asked.ignore, report)
    _check_unexpected(config, parts, found, sources, asked.ignore, report)
    return config, jobs, tokenizer


def _open(
    path: Path, asked: Asked, report: Report, stack: ExitStack
) -> tuple[ModelConfig | None, dict[Part, Located], list[Source], Path | None]:
    """What is at `path`; the configuration is None where only the parts' shapes can tell."""
    path = hub.snapshot(path)
    if path.is_dir():
        options: dict[Part, Any] = {"vae": asked.vae, "text": asked.text_encoder}
        given = [part for part, option in options.items() if option is not None]
        step = maxdiffusion.step_folder(path)
        if step is not None:
            config, parts, notes = maxdiffusion.open_checkpoint(step, stack, without=given, ignore=asked.ignore)
            report.format = "maxdiffusion"
            report.notes += notes
            return asked.config or config, parts, [located.source for located in parts.values()], None
        diffusers.check_folder(path)
        config, parts, notes = diffusers.open_folder(path, stack, ema=asked.ema, without=given, ignore=asked.ignore)
        report.format = "diffusers"
        report.notes += notes
        tokenizer = path / "tokenizer"
        known = any((tokenizer / name).is_file() for name in ("vocab.json", "tokenizer.json"))
        sources = [located.source for located in parts.values()]
        return asked.config or config, parts, sources, tokenizer if known else None
    source = stack.enter_context(open_source(path))
    report.format = source.format
    parts = locate(source, asked.ignore)
    if source.skipped:
        report.notes.append(f"{len(source.skipped)} entries that are no tensors were left out")
    return asked.config, parts, [source], None


def _folder_of(path: Path, part: Part) -> Path:
    """The part's own folder in a diffusers folder, or `path`, which is one itself."""
    inside = path / diffusers.FOLDERS[part]
    return inside if inside.is_dir() else path


def _open_other(path: Path, part: Part, ignore: Sequence[str], stack: ExitStack) -> Located:
    """One part from another file or folder: a file of its own, a whole checkpoint, or a diffusers folder."""
    path = hub.snapshot(path)
    if path.is_dir():
        return diffusers.open_part(_folder_of(path, part), part, stack, ignore)[0]
    source = stack.enter_context(open_source(path))
    parts = locate(source, ignore)
    if part not in parts:
        raise CheckpointError(
            f"{path}: {WRITTEN_AS[part]} is not in this file, which holds {detect.contents(source, parts)}"
        )
    return parts[part]


def _check_width(config: ModelConfig, text: Located) -> None:
    """Raises CheckpointError if the text encoder is that of another family."""
    name = text.find("token_embedding.weight", "embeddings.token_embedding.weight")
    if name is None:
        return
    width = ([n for n in text.source.tensors[name].shape if n != 1] or [0])[-1]
    if width != config.clip.width:
        known = {768: "Stable Diffusion 1's", 1024: "Stable Diffusion 2's", 1280: "OpenCLIP bigG, SDXL's second"}
        raise CheckpointError(
            f"{text.source.path}: a text encoder {width} wide ({known.get(width, 'of an unknown family')}); "
            f"the UNet needs one of {config.clip.width}; give it by {hint('text_encoder')}"
        )


def _use_ema(unet: Located, config: ModelConfig, ema: str, report: Report) -> bool:
    """Whether to read the UNet's moving averages."""
    leaves = spelled(config, "unet", True)
    there = {
        leaf
        for name, entry in known_names(config, "unet").items()
        for average in unet.averages.get(undotted(name), ())
        if not unet.names or unet.source.misfit(average, entry.shape, entry.accepts) is None
        for leaf in entry.leaves
    }
    held = f"{len(there)} of {len(leaves)} moving averages (EMA) of the UNet"
    if not unet.names:
        if ema == "no":
            raise CheckpointError(
                f"{unet.source.path}: holds {held} and no plain weights; use {hint('ema', 'yes')} to take them"
            )
        report.notes.append(f"the file holds {held} and no plain weights; the averages were taken")
        return True
    if ema == "yes" and len(there) < len(leaves):
        raise CheckpointError(f"{unet.source.path}: {held} are there; use {hint('ema', 'no')}")
    averaged = ema != "no" and len(there) == len(leaves)
    if there:
        taken = "the moving averages (EMA)" if averaged else "the plain weights"
        report.notes.append(f"the file holds {held}; {taken} were taken")
    return averaged


def _match(
    config: ModelConfig, parts: dict[Part, Located], averaged: bool, ignore: Sequence[str], report: Report
) -> list[Job]:
    """Every parameter's tensor; fills the report's lists but for `unexpected`."""
    jobs: list[Job] = []
    for part in (part for part in PARTS if part in parts):
        located = parts[part]
        source = located.source
        known = known_names(config, part)
        taken: dict[Keys, tuple[Entry, str]] = {}
        found = located.names
        if part == "unet" and averaged:
            report.ignored |= {name: "the moving average was taken" for names in found.values() for name in names}
            found = located.averages
            known = {undotted(name): entry for name, entry in reversed(known.items())}
        pairs = [(own, name) for own, names in found.items() if own in known for name in names]
        for own, name in sorted(pairs, key=lambda pair: matches(pair[1], ignore)):  # those to be ignored come last
            entry = known[own]
            held = {leaf: taken[leaf] for leaf in entry.leaves if leaf in taken}
            if held and (matches(name, ignore) or _is_copy(source, held, entry, name, report)):
                continue
            taken |= dict.fromkeys(entry.leaves, (entry, name))
            jobs.append((part, entry, source, name))
            why = source.misfit(name, entry.shape, entry.accepts)
            if why is not None:
                report.mismatched.append(f"{name} ({why})")
        report.used += dict.fromkeys(name for _, name in taken.values())
        spelling = _spelling(config, part, (own for own, _ in pairs))
        report.parts[part] = f"{source.path} ({spelling} names)"
        for leaf, name in spelled(config, part, spelling in ("compvis", "openclip")).items():
            if leaf not in taken and f"{part} {name}" not in report.missing:
                report.missing.append(f"{part} {ema_name(name) if part == 'unet' and averaged else name}")
    return jobs


def _tree(jobs: list[Job], dtype: str, report: Report, progress: Progress | None) -> Params:
    """The parameters that these tensors become, none of them read yet."""
    count = _counter(jobs, progress)
    files = {id(file): file for _, _, source, name in jobs for file in (source.file_of(name),)}
    zeros = {
        at: Zeros(file, [(entry, name) for _, entry, source, name in jobs if source.file_of(name) is file])
        for at, file in files.items()
    }
    for each in zeros.values():
        each.check_end()
    params: dict[str, Any] = {part: {} for part, *_ in jobs}
    for part, entry, source, name in jobs:
        tensor = Tensor(entry, part, source, name, dtype, report, count, zeros[id(source.file_of(name))])
        for keys, leaf in tensor.leaves().items():
            _put(params[part], keys, leaf)
    return params


def _is_copy(source: Source, held: dict[Keys, tuple[Entry, str]], entry: Entry, name: str, report: Report) -> bool:
    """Whether a tensor says again what others say; it is then ignored. held: which tensor has each of its parameters.

    Raises:
        CheckpointError: it says something else, or more.
    """
    before = next(iter(held.values()))[1]
    found = _leaves_of(source, entry, name)
    others = {leaf: _leaves_of(source, *holder).get(leaf) for leaf, holder in held.items()}
    if found.keys() == held.keys() and all(_same_bits(found[leaf], others[leaf]) for leaf in found):
        report.ignored[name] = f"the same numbers as {before}"
        return True
    raise CheckpointError(
        f"{source.path}: two names for one thing, {before} and {name}; "
        f"keep one of the two, or leave one out by {hint('ignore', glob.escape(name))}"
    )


def _leaves_of(source: Source, entry: Entry, name: str) -> dict[Keys, np.ndarray]:
    """What a tensor becomes; nothing if it does not fit."""
    fits = source.misfit(name, entry.shape, entry.accepts) is None
    return entry.to_leaves(source.read(name)) if fits else {}


def _same_bits(one: np.ndarray, other: np.ndarray | None) -> bool:
    return other is not None and one.dtype == other.dtype and one.tobytes() == other.tobytes()


def _spelling(config: ModelConfig, part: Part, names: Iterable[str]) -> str:
    """Which spelling these names are in, as it is shown."""
    old, new = (set(spelled(config, part, old).values()) for old in (True, False))
    if part == "unet":
        old, new = ({undotted(name) for name in names} | names for names in (old, new))
    held = set(names)
    if held <= old:
        return "openclip" if part == "text" else "compvis"
    return "diffusers" if held <= new else "mixed"


def _check_unexpected(
    config: ModelConfig,
    parts: dict[Part, Located],
    found: dict[Part, Located],
    sources: list[Source],
    ignore: Sequence[str],
    report: Report,
) -> None:
    """Sorts every name that was not used into ignored and unexpected. found: what was in the file itself."""
    replaced = {part: located for part, located in found.items() if parts[part] is not located}
    given = [part for part in PARTS if parts[part] is not found.get(part)]
    remains = {
        name
        for part, located in replaced.items()
        for own, names in located.names.items()
        for name in names
        if name != own or own in known_names(config, part)
    }
    last = rf"(encoder\.layers|transformer\.resblocks)\.{config.clip.layers}\."
    unused = {name for own, names in parts["text"].names.items() if re.match(last, own) for name in names}
    names = [name for source in sources for name in source.tensors]
    for located in parts.values():
        if located.source not in sources:
            names += [name for held in located.names.values() for name in held]
    averages = {name for names in parts["unet"].averages.values() for name in names}
    used, additions = set(report.used), 0
    for name in names:
        if name in used or name in report.ignored:
            continue
        why = "moving averages, not asked for" if name in averages else why_not_needed(name)
        additions += why is not None and why.endswith(detect.NOT_APPLIED)
        if name in remains or any(re.match(detect.LIKELY[part], name) for part in given):
            why = "replaced by the file given for it"
        elif why is None and name in unused and config.clip.activation == "gelu":
            why = "the last layer, whose output is not used"
        elif why is None and matches(name, ignore):
            why = "as asked"
        if why is None:
            report.unexpected.append(name)
        else:
            report.ignored[name] = why
    if additions:
        report.notes.append(f"of a LoRA or the like, which change nothing here, tensors were left out: {additions}")


def _advice(report: Report) -> str:
    """What helps where names are missing or unexpected, as it is typed."""
    advice = [f"give it whole by {hint(OPTIONS[part])}" for part in OPTIONS if report.lacks(part)]
    if report.unexpected:
        patterns = dict.fromkeys(_pattern(name, report.used) for name in report.unexpected)
        few = patterns if len(patterns) <= 3 else ("*",)
        advice.append("what is not needed is left out by " + " ".join(hint("ignore", pattern) for pattern in few))
    return "".join(f"; {each}" for each in advice)


def _pattern(name: str, used: Sequence[str]) -> str:
    """A pattern that fits this name and its like, but none that is used."""
    head, dot, _ = name.partition(".")
    if dot and not any(other.startswith(head + dot) for other in used):
        return f"{glob.escape(head)}.*"
    return glob.escape(name)


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
