"""`sdjax train vae|clip|unet --data D --out O`: the options, and a readable account of one training."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdjax.cli.model import add_conversion, conversion_of
from sdjax.cli.signals import begin_work
from sdjax.cli.terminal import console, note
from sdjax.config import BOX_VISION, PRESETS, CLIPVisionConfig
from sdjax.hints import hint
from sdjax.storage.files import json_line, new_file
from sdjax.train.settings import Settings

if TYPE_CHECKING:
    from rich.progress import Progress

PARTS = {
    "vae": "the autoencoder, by the evidence lower bound; needs pictures",
    "clip": "the text encoder, by contrast with pictures; needs captions",
    "unet": "the UNet, by the prediction of noise; needs captions, and the other two parts trained",
}
VISION = {"small-64": BOX_VISION, "vit-l-14": CLIPVisionConfig()}
SKIPPED = "skipped.jsonl"

NOTES = 20
"""Most examples that are named of those that were left out."""

ONLY = {  # settings that are not for every part
    "prompt_dropout": ("unet",),
    "min_snr": ("unet",),
    "noise_offset": ("unet",),
    "remat": ("unet",),
    "sigma": ("vae",),
    "kl_weight": ("vae",),
    "l1": ("vae",),
    "flip": ("vae", "clip"),
}


def add_parser(commands: Any) -> None:
    """Adds `train` and its three parts to the command line."""
    train = commands.add_parser("train", help="train a part of a model", description="Train a part of a model.")
    parts = train.add_subparsers(required=True, metavar="vae|clip|unet")
    for part, text in PARTS.items():
        command = parts.add_parser(part, help=text, description=f"Train {text}. The same command again resumes it.")
        add = command.add_argument
        add("--data", required=True, metavar="D", help="a folder of pictures with captions, or WebDataset .tar shards")
        add("--out", required=True, metavar="O", help="folder of the run; the finished model is O/model")
        start = command.add_mutually_exclusive_group(required=True)
        start.add_argument("--model", metavar="M", help="start from this model, anything that txt2img takes")
        start.add_argument("--preset", choices=sorted(PRESETS), help="start from nothing, with these networks")
        add("--tokenizer", metavar="DIR", help="with --preset: vocab.json and merges.txt (CLIP's own)")
        add("--skip-bad", action="store_true", help="leave out broken pictures and captions instead of refusing")
        if part == "clip":
            add("--vision", choices=sorted(VISION), default="vit-l-14", help="the image encoder (vit-l-14)")
        _add_settings(command, part)
        add_conversion(command, ema=False)
        command.set_defaults(run=run, part=part)


def _add_settings(command: argparse.ArgumentParser, part: str) -> None:
    """An option for each field of `Settings` that `part` has a use for."""
    hints = typing.get_type_hints(Settings)
    for field in dataclasses.fields(Settings):
        if part not in ONLY.get(field.name, (part,)):
            continue
        flag, kind = f"--{field.name.replace('_', '-')}", hints[field.name]
        if kind is bool:
            command.add_argument(flag, action="store_true")
        elif typing.get_origin(kind) is typing.Literal:
            command.add_argument(flag, choices=typing.get_args(kind), default=field.default, help=f"({field.default})")
        else:
            kind = int if kind is int else float
            shown = "off" if field.default is None else field.default
            command.add_argument(flag, type=kind, default=field.default, metavar="X", help=f"({shown})")


def run(options: argparse.Namespace) -> int:
    """One training, from the options to the finished model."""
    names = {field.name for field in dataclasses.fields(Settings)}
    settings = Settings(**{name: value for name, value in vars(options).items() if name in names})

    import jax

    from sdjax.devices.platform import keep_memory
    from sdjax.load import identity
    from sdjax.train.dataset import open_dataset
    from sdjax.train.loop import claim, train
    from sdjax.train.tasks.clip import clip_task
    from sdjax.train.tasks.unet import unet_task
    from sdjax.train.tasks.vae import vae_task

    part, out, conversion = options.part, Path(options.out), conversion_of(options, ema=False)
    _check_start(options, conversion)
    with _bars() as bars:
        looking = bars.add_task("looking at pictures")
        data = open_dataset(
            options.data,
            captions=part != "vae",
            on_error="skip" if options.skip_bad else "refuse",
            progress=lambda done, total: bars.update(looking, completed=done, total=total),
        )
    for line in _left_out(data, out):
        note(line)
    said = {
        "part": part,
        "data": str(Path(options.data).resolve()),
        "examples": len(data),
        "model": options.model or options.preset,
        "vision": getattr(options, "vision", None),
        "listing": data.listing,
    }
    if options.model is not None:
        said |= {"conversion": conversion, "content": identity(options.model, **conversion)}
    keep_memory()
    jax.local_devices()
    begin_work()
    claim(out, settings, said)
    _write_skipped(data, out)
    model = _start(options, settings, conversion)
    cache = out / "cache"
    if part == "vae":
        task = vae_task(model, data, settings, cache)
    elif part == "clip":
        task = clip_task(model, VISION[options.vision], data, settings, cache)
    else:
        task = unet_task(model, data, settings, cache)

    with _bars() as bars:
        bar = bars.add_task(f"training {part}", total=settings.steps)

        def progress(done: int, total: int, metrics: dict[str, float]) -> None:
            loss = f", loss {metrics['loss']:.4g}" if "loss" in metrics else ""
            bars.update(bar, completed=done, description=f"training {part}{loss}")

        train(task, settings, out, note=said, progress=progress)
    print(out / "model")
    return 0


def _bars() -> Progress:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console(), disable=not console().is_terminal)


def _write_skipped(data: Any, out: Path) -> None:
    """OUT/skipped.jsonl: what was left out and why, a line each; absent if there is nothing of the kind."""
    file = out / SKIPPED
    if not data.skipped:
        file.unlink(missing_ok=True)
        return
    with new_file(file, force=True) as temporary:
        lines = (json_line({"name": name, "reason": reason}) for name, reason in data.skipped.items())
        temporary.write_bytes(b"".join(lines))


def _left_out(data: Any, out: Path) -> list[str]:
    """What of a data set is not used, as lines to print, not more than a screen of them."""
    lines = [f"left out {name}: {reason}" for name, reason in data.skipped.items()]
    if len(lines) > NOTES:
        lines[NOTES:] = [f"left out {len(lines) - NOTES} more, in {out / SKIPPED}"]
    return lines + [f"passed over {count} {kind}" for kind, count in data.passed_over.items()]


def _check_start(options: argparse.Namespace, conversion: dict[str, Any]) -> None:
    """Raises ValueError or OSError if the model to start from cannot be trained; it looks at headers alone."""
    from sdjax.load import configuration

    if options.model is not None:
        if options.tokenizer is not None:
            raise ValueError(
                f"a tokenizer ({hint('tokenizer', options.tokenizer)}) goes with a preset ({hint('preset')}); "
                "a model brings its own, leave the tokenizer out"
            )
        config = configuration(options.model, **conversion)
    else:
        if conversion:
            raise ValueError(f"{', '.join(map(hint, conversion))}: for foreign files; a preset is started from nothing")
        config = PRESETS[options.preset]
        tokenizer = _tokenizer(options)
        if tokenizer.vocab_size != config.clip.vocab_size:
            raise ValueError(
                f"the preset {config.name} has a vocabulary of {config.clip.vocab_size} tokens and the tokenizer "
                f"{tokenizer.vocab_size}; give one of that size with {hint('tokenizer')}"
            )
    if options.part == "unet" and config.unet.in_channels != config.vae.latent_channels:
        raise ValueError(
            f"{config.name}: its UNet has {config.unet.in_channels} input channels; training makes models with "
            f"{config.vae.latent_channels}, start from one of these"
        )


def _tokenizer(options: argparse.Namespace) -> Any:
    """The tokenizer that goes with a preset."""
    from sdjax.text.tokenizer import Tokenizer, clip_tokenizer

    return clip_tokenizer() if options.tokenizer is None else Tokenizer.from_folder(options.tokenizer)


def _start(options: argparse.Namespace, settings: Settings, conversion: dict[str, Any]) -> Any:
    """The model that training starts from (`_check_start`)."""
    from sdjax.load import load
    from sdjax.models.params import initial_params
    from sdjax.pipeline.pipeline import Pipeline

    if options.model is not None:
        return load(options.model, **conversion)
    config = PRESETS[options.preset]
    return Pipeline(config, initial_params(config, settings.seed), _tokenizer(options), config.name)
