"""The model that a command asked for, on the devices that it asked for."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdjax.cli.terminal import console, note
from sdjax.config import ModelConfig
from sdjax.request import Request

if TYPE_CHECKING:
    from sdjax.text.tokenizer import Tokenizer
    from sdjax.types import Params


def add_conversion(command: argparse.ArgumentParser, *, ema: bool = True) -> None:
    """The options that say how a foreign model's file is to be read, the same for every command that opens one.

    ema: False for trainings, where --ema is that of the training.
    """
    add = command.add_argument_group("for models that are no checkpoint of ours").add_argument
    add("--vae", metavar="FILE", help="take the autoencoder from this file or folder")
    add("--text-encoder", metavar="FILE", help="take the text encoder from this file or folder")
    if ema:
        add("--ema", choices=("auto", "yes", "no"), help="the UNet's moving averages (auto: if all are there)")
    add("--prediction", choices=("epsilon", "v"), help="for Stable Diffusion 2 files, which do not say")
    add("--config", metavar="FILE", help="a config.json of ours or a preset's name, for models of another kind")
    add("--ignore", metavar="PATTERN", action="append", help="names that may be there unused, such as loss.*")


def add_folders(command: argparse.ArgumentParser) -> None:
    """The options that say where the files are that prompts name."""
    add = command.add_argument
    add("--lora-dir", metavar="DIR", help="where <lora:NAME:WEIGHT> in prompts finds NAME, folders in it included")
    text = "learnt words (textual inversion): a file or a folder of them; may be given several times"
    add("--embeddings", metavar="FILE|DIR", action="append", default=[], help=text)


def folders_of(options: argparse.Namespace) -> dict[str, Any]:
    """What of `add_folders` was given."""
    return {name: value for name in ("lora_dir", "embeddings") if (value := getattr(options, name, None))}


def conversion_of(options: argparse.Namespace, *, ema: bool = True) -> dict[str, Any]:
    """What of `add_conversion` was given, as `sdjax.load` takes it and recipes keep it."""
    names = ("vae", "text_encoder", "prediction", "config", "ignore", *(("ema",) if ema else ()))
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def load_model(
    options: argparse.Namespace,
    on_convert: Callable[[int, int], None],
    *,
    like: Request | None = None,
    batch_size: int = 1,
    continuous: bool = True,
    on_config: Callable[[ModelConfig], None] | None = None,
    **given: Any,
) -> Any:
    """The model that was asked for. given: what does not come from the options as they are.

    like: a request to come; while the parameters are read, its programs are compiled for `batch_size` at a time on each
    device. continuous: see `programs_for`. on_config: see `sdjax.load`.
    """
    from sdjax.devices.compilation import compile_in_background
    from sdjax.devices.placement import HERE
    from sdjax.load import load
    from sdjax.pipeline.warmup import programs_for

    named = {"model": options.model, "dtype": options.dtype, "placement": HERE} | given
    conversion = named.pop("conversion", None)
    conversion = conversion_of(options) if conversion is None else conversion
    with compile_in_background() as start:

        def on_shapes(config: ModelConfig, shapes: Params, tokenizer: Tokenizer) -> None:
            if like is None or named["placement"].parallel == "pmap":
                return
            if like.loras or "<lora:" in str(like.prompt):
                return  # its programs are others, for adapters that are not read yet
            with suppress(ValueError, OSError):  # a request that cannot be made; it says so when its turn comes
                options = dict(dtype=named["dtype"], placement=named["placement"], shapes=shapes, continuous=continuous)
                programs = programs_for(like, config, batch_size, tokenizer=tokenizer, **options)
                start(programs.values())

        hooks: dict[str, Any] = dict(progress=on_convert, on_config=on_config, on_shapes=on_shapes)
        return load(named.pop("model") or None, **hooks, **named, **folders_of(options), **conversion)


def keep_programs() -> None:
    """Keeps compiled programs on disk, if there is a place for them."""
    from sdjax.devices import compilation
    from sdjax.storage.cache import programs_folder
    from sdjax.storage.files import refuse_unwritable

    try:
        folder = programs_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        refuse_unwritable(folder)
        compilation.keep_programs(folder)
    except OSError as failure:
        note(f"compiled programs are not kept: {' '.join(str(failure).split())}")


def placement_of(options: argparse.Namespace, pictures: int | None = None) -> Any:
    """The devices that were asked for: all of the machine, but no more than there are pictures.

    From here on compiled programs are kept, unless the options say otherwise: what is asked for has been checked, and
    JAX is needed now.

    Several devices of a CPU are one CPU; of these only as many are used as were asked for.
    """
    import jax

    from sdjax.devices.placement import placement_on

    if not options.no_compile_cache:
        keep_programs()
    there = jax.local_devices()
    if options.devices is not None and not 1 <= options.devices <= len(there):
        raise ValueError(f"devices must be between 1 and the {len(there)} of this machine, found {options.devices}")
    devices = options.devices or (1 if there[0].platform == "cpu" else len(there))
    if pictures is not None:
        devices = min(devices, pictures * max(1, options.model_parallel))
    return placement_on(
        there[:devices],
        parallel=options.parallel,
        model_parallel=options.model_parallel,
        batch_invariant=options.exact,
    )


@contextmanager
def progress_bars(model: str) -> Iterator[tuple[Callable[[int, int], None], Callable[[str], Callable[..., None]]]]:
    """Bars on the error stream: one while a file is converted, one for each batch of pictures."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(), transient=True, disable=not console().is_terminal) as bars:
        conversion: list[Any] = []

        def on_convert(done: int, total: int) -> None:
            if not conversion:
                conversion.append(bars.add_task(f"converting {Path(model).name} (MB)"))
            bars.update(conversion[0], completed=done // 10**6, total=total // 10**6)

        def on_step(title: str) -> Callable[..., None]:
            bar = bars.add_task(title, total=None)

            def step(done: int, total: int, _: Any) -> None:
                bars.update(bar, completed=done, total=total)

            return step

        yield on_convert, on_step
