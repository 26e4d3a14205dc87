"""Checkpoints of maxdiffusion, Google's trainer for TPUs: Orbax folders whose layout its source says.

    run/checkpoints/800/                 the step, of which the latest is taken
        unet_config/metadata             JSON: the config.json of a diffusers folder, in a file of this name
        vae_config/  text_encoder_config/  scheduler_config/       the same
        tokenizer_config/metadata        {"path": the hub id or folder whose tokenizer was used}
        unet_state/  vae_state/  text_encoder_state/               Orbax: the state of a training, with `params`

(`checkpointing/base_stable_diffusion_checkpointer.py` of https://github.com/AI-Hypercomputer/maxdiffusion, 2026.) The
networks are those of diffusers' Flax code, and so are the names of their parameters. Prompts are read with CLIP's own
tokenizer, since the folder has none.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from pathlib import Path

from convert.detect import Located, contents, locate
from convert.diffusers_config import config_from
from convert.files.orbax_tree import open_orbax
from convert.files.source import CheckpointError
from convert.names import PARTS, Part
from sdjax.config import ModelConfig

ITEMS: dict[Part, str] = {"text": "text_encoder", "vae": "vae", "unet": "unet"}


def step_folder(path: Path) -> Path | None:
    """The step to read of a checkpoint of maxdiffusion: `path` itself, or the latest within; None if it is none."""
    if (path / "unet_state").is_dir() and (path / "unet_config").is_dir():
        return path
    steps = [child for child in path.iterdir() if child.name.isdecimal() and len(child.name) < 20]
    steps = [child for child in steps if (child / "unet_state").is_dir() and (child / "unet_config").is_dir()]
    return max(steps, key=lambda child: int(child.name), default=None)


def open_checkpoint(
    step: Path, stack: ExitStack, *, without: Collection[Part] = (), ignore: Sequence[str] = ()
) -> tuple[ModelConfig, dict[Part, Located], list[str]]:
    """The checkpoint of one step: its configuration, its parts, and notes. without: parts that are not wanted.

    Raises:
        CheckpointError: it is not whole, damaged, or of another model.
    """
    if (step / "text_encoder_2_state").is_dir():
        raise CheckpointError(f"{step}: maxdiffusion's Stable Diffusion XL; expected Stable Diffusion 1.x or 2.x")
    described = {name: step / f"{name}_config" / "metadata" for name in ("unet", "vae", "text_encoder", "scheduler")}
    config, notes = config_from(
        step.parent.name if step.name.isdecimal() else step.name,
        unet=described["unet"],
        vae=described["vae"],
        text=described["text_encoder"],
        scheduler=described["scheduler"],
    )
    parts: dict[Part, Located] = {}
    left_out: dict[str, None] = {}
    for part in (part for part in PARTS if part not in without):
        folder = step / f"{ITEMS[part]}_state"
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: missing; this is not a whole checkpoint of maxdiffusion, copy it again")
        source = stack.enter_context(open_orbax(folder))
        found = locate(source, ignore)
        if part not in found:
            raise CheckpointError(f"{folder}: not the weights of the {ITEMS[part]}, but {contents(source, found)}")
        parts[part] = found[part]
        left_out |= dict.fromkeys(source.skipped)
    notes.append(f"maxdiffusion's checkpoint of step {step.name}; prompts are read with CLIP's own tokenizer")
    if left_out:
        notes.append(f"what is for training on was left out: {', '.join(list(left_out)[:6])}")
    return config, parts, notes
