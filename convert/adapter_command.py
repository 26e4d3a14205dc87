"""What `sdjax-convert extract` and `sdjax-convert adapter` do."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from convert import command
from convert.adapters import extract, read_adapter, write_adapter
from convert.files.source import CheckpointError
from convert.opened import opened
from convert.read import Converted, named_config
from sdjax.config import ModelConfig
from sdjax.models.adapters import Adapter
from sdjax.models.params import DTYPES
from sdjax.storage.files import refuse_existing


def run_extract(options: argparse.Namespace) -> None:
    """Writes the LoRA that makes one model of another. Raises ValueError or OSError."""
    destination = _adapter_place(options, [options.base, options.tuned])
    if options.dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, found {options.dtype!r}")
    with ExitStack() as stack, command.progress_bar("comparing", of_bytes=False) as bar:
        base, tuned = (stack.enter_context(opened(path)) for path in (options.base, options.tuned))
        _check_same(base, tuned, options)
        adapter = extract(
            base.params,
            tuned.params,
            base.config,
            rank=options.rank,
            convolutions=not options.linear,
            dtype=options.dtype,
            progress=bar,
        )
        write_adapter(destination, adapter, base.config, force=options.force)
    _tell(options, adapter)


def _check_same(base: Converted, tuned: Converted, options: argparse.Namespace) -> None:
    one, other = (dataclasses.replace(model.config, name="", vae=base.config.vae) for model in (base, tuned))
    if (one.text, one.unet) != (other.text, other.unet):
        raise CheckpointError(
            f"{options.tuned}: {tuned.config.name} is not of the same shapes as {options.base} ({base.config.name}); "
            "a LoRA is the difference of two models of one kind"
        )


def run_adapter(options: argparse.Namespace) -> None:
    """Writes an adapter in the names that other programs read. Raises ValueError or OSError."""
    destination = _adapter_place(options, [options.source])
    config: ModelConfig = named_config(options.config)
    adapter = read_adapter(options.source, config)
    write_adapter(destination, adapter, config, force=options.force)
    _tell(options, adapter)


def _adapter_place(options: argparse.Namespace, inputs: Sequence[str]) -> Path:
    """Where an adapter goes. Raises ValueError or OSError if it cannot be written there."""
    destination = Path(options.destination).absolute()
    if destination.suffix != ".safetensors":
        raise ValueError(f"{options.destination}: an adapter is written as .safetensors; give it such a name")
    refuse_existing(destination, options.force)
    command.check_output(destination, [Path(path) for path in inputs])
    return destination


def _tell(options: argparse.Namespace, adapter: Adapter) -> None:
    for note in adapter.notes:
        command.say(f"note: {note}\n", "stderr")
    forms = ", ".join(sorted({update.form for update in adapter.updates.values()}))
    command.say(f"{options.destination}: {forms}, {len(adapter.updates)} modules\n")
