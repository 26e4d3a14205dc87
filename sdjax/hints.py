"""Advice in errors and notes: every option that a message tells the user to add, in one table.

A message takes its advice from `hint`, and never spells an option out, so that a test can parse all that is ever
advised with the real parsers.
"""

from __future__ import annotations

import shlex
from typing import NamedTuple

PICTURES = ("sdjax txt2img", "sdjax img2img", "sdjax inpaint")
JOBS = ("sdjax batch", "sdjax grid")
TRAININGS = ("sdjax train vae", "sdjax train clip", "sdjax train unet")
CONVERT = ("sdjax-convert", "sdjax-convert merge")
WITH_MODEL = (*PICTURES, *JOBS, *TRAININGS, "sdjax warmup", "sdjax info", "sdjax selftest", *CONVERT)
"""Commands that open a model, in any of the formats that people have."""


class Hint(NamedTuple):
    """An option as it is typed, the value that stands for the user's own if it has one, and who may advise it."""

    option: str
    value: str | None
    commands: tuple[str, ...]


HINTS = {
    "vae": Hint("--vae", "FILE", WITH_MODEL),
    "text_encoder": Hint("--text-encoder", "FILE", WITH_MODEL),
    "ema": Hint("--ema", "no", tuple(command for command in WITH_MODEL if command not in TRAININGS)),
    "prediction": Hint("--prediction", "epsilon", WITH_MODEL),
    "ignore": Hint("--ignore", "NAME", WITH_MODEL),
    "config": Hint("--config", "FILE", WITH_MODEL),
    "dtype": Hint("--dtype", "bfloat16", (*PICTURES, *JOBS, *TRAININGS, "sdjax warmup", "sdjax selftest")),
    "force": Hint("--force", None, CONVERT),
    "tokenizer": Hint("--tokenizer", "DIR", TRAININGS),
    "preset": Hint("--preset", "sd15", TRAININGS),
    "lora": Hint("--lora", "FILE", (*PICTURES, *JOBS, "sdjax-convert")),
    "lora_dir": Hint("--lora-dir", "DIR", (*PICTURES, *JOBS)),
    "embeddings": Hint("--embeddings", "DIR", (*PICTURES, *JOBS)),
    "model": Hint("--model", "FILE", PICTURES),
    "recipe": Hint("--recipe", "PICTURE", PICTURES),
    "outpaint": Hint("--outpaint", "left=64", ("sdjax inpaint",)),
    "skip_bad": Hint("--skip-bad", None, ("sdjax batch", *TRAININGS)),
}


def hint(name: str, value: str | None = None) -> str:
    """The advice of that name in `HINTS`, ready to be typed. value: instead of the one in the table."""
    option, usual, _ = HINTS[name]
    value = usual if value is None else value
    return option if value is None else f"{option} {shlex.quote(value)}"
