"""How to train: one frozen dataclass, whose fields are the options of `sdjax train`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Settings:
    """How to train. Steps count updates of the parameters; learning rates are per update.

    steps: updates in all. batch: pictures per update, over all devices. learning_rate: at its height. warmup: steps of
    its linear rise. decay: steps of its cosine fall to 0, at the end. accumulate: parts that a batch is worked through
    in. ema: decay of the running average that becomes the model. dtype: of the computation; the parameters stay
    float32. remat: recompute activations in the backward pass instead of keeping them. shard: split parameters and
    optimiser over the devices. scan: updates in one compiled program; 1 on a CPU, whose convolutions are
    slow inside loops. flip: mirror every other picture at random.
    UNet: prompt_dropout, min_snr, noise_offset (`losses.diffusion_loss`). Autoencoder: sigma, kl_weight, l1
    (`losses.vae_loss`).

    Raises:
        ValueError: a setting is out of range; the message names it.
    """

    steps: int = 10_000
    batch: int = 16
    learning_rate: float = 1e-4
    warmup: int = 100
    decay: int = 0
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.999
    accumulate: int = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False
    shard: bool = False
    scan: int = 1
    seed: int = 0
    flip: bool = False
    prompt_dropout: float = 0.1
    min_snr: float | None = None
    noise_offset: float = 0.0
    sigma: float = 0.1
    kl_weight: float = 1.0
    l1: float = 0.0
    save_every: int = 500
    sample_every: int = 500

    def __post_init__(self) -> None:
        def need(good: bool, name: str, expected: str) -> None:
            if not good:
                raise ValueError(f"{name} must be {expected}, found {getattr(self, name)!r}")

        for name in ("steps", "batch", "accumulate", "scan", "save_every", "sample_every"):
            need(type(getattr(self, name)) is int and getattr(self, name) > 0, name, "a whole number above 0")
        for name in ("warmup", "decay", "seed"):
            need(type(getattr(self, name)) is int and getattr(self, name) >= 0, name, "a whole number from 0")
        need(self.seed < 2**32, "seed", "below 2^32")
        need(self.optimizer in ("adamw", "adafactor"), "optimizer", "adamw or adafactor")
        need(self.dtype in ("float32", "bfloat16"), "dtype", "float32 or bfloat16")
        need(self.batch % self.accumulate == 0, "batch", f"a multiple of accumulate, {self.accumulate}")
        need(self.steps % self.scan == 0, "steps", f"a multiple of scan, {self.scan}")
        for name in ("save_every", "sample_every"):
            need(getattr(self, name) % self.scan == 0, name, f"a multiple of scan, {self.scan}")
        for name in ("learning_rate", "clip", "sigma"):
            need(0 < getattr(self, name) < math.inf, name, "a positive number")
        for name in ("weight_decay", "kl_weight", "l1", "noise_offset"):
            need(0 <= getattr(self, name) < math.inf, name, "0 or more")
        need(0 <= self.prompt_dropout <= 1, "prompt_dropout", "in [0, 1]")
        need(0 <= self.ema < 1, "ema", "in [0, 1)")
        need(self.min_snr is None or self.min_snr > 0, "min_snr", "positive, or left out")
        need(self.warmup <= self.steps, "warmup", f"at most steps, {self.steps}")
        need(self.warmup + self.decay <= self.steps, "decay", f"at most steps - warmup, {self.steps - self.warmup}")
