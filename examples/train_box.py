"""Trains a small text-to-image model, all three parts, on emoji and their names.

    apt-get install fonts-noto-color-emoji unicode-data unicode-cldr-core
    python examples/train_box.py run

Everything is in run/: the data set, a training run for each part (loss.png and samples/ show how far it is), and at the
end run/box: `sdjax txt2img "red heart" --model run/box`. Interrupt it as you like; the same command resumes it. On two
CPU cores it takes two hours and a half; --scale 3 is for a night, --scale 0.01 a rehearsal of the whole way; --gpu is
for longer trainings in larger batches, and was not tried yet. What sdjax carries came from this command: its card is
sdjax/assets/box/README.md."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import time
from pathlib import Path

import jax
import numpy as np
from make_emoji import build

from sdjax.config import BOX, BOX_VISION
from sdjax.devices.platform import keep_memory
from sdjax.image import from_uint8
from sdjax.models.params import initial_params
from sdjax.models.vae import VAE
from sdjax.pipeline.pipeline import Pipeline
from sdjax.storage.checkpoint import read_tensors, write_tensors
from sdjax.text.tokenizer import from_merges, learn_merges
from sdjax.train.dataset import Dataset, open_dataset
from sdjax.train.loop import save_model, train
from sdjax.train.settings import Settings
from sdjax.train.tasks.clip import clip_task
from sdjax.train.tasks.unet import unet_task
from sdjax.train.tasks.vae import vae_task

CPU = {
    "vae": Settings(steps=3750, decay=1875, batch=8, learning_rate=1e-3, weight_decay=0.0, flip=True, kl_weight=0.01),
    "clip": Settings(steps=825, decay=412, batch=128, learning_rate=1e-3, weight_decay=0.1, ema=0.99),
    "unet": Settings(steps=10000, decay=3400, batch=48, learning_rate=1e-3, warmup=300),
}
GPU = {
    "vae": dataclasses.replace(CPU["vae"], steps=30000, decay=15000, batch=64, scan=10),
    "clip": dataclasses.replace(CPU["clip"], steps=4000, decay=2000, batch=512, scan=10),
    "unet": dataclasses.replace(CPU["unet"], steps=40000, decay=20000, batch=256, scan=10),
}


def scaled(settings: Settings, scale: float) -> Settings:
    """The same training with `scale` times its updates, in whole scans."""
    steps = max(1, round(settings.steps * scale / settings.scan)) * settings.scan
    decay = int(settings.decay * steps / settings.steps)
    return dataclasses.replace(settings, steps=steps, decay=decay, warmup=min(settings.warmup, steps // 4))


def standardised(model: Pipeline, data: Dataset) -> Pipeline:
    """The model with latents of mean 0 and variance 1 in every channel, by what it makes of the training pictures.

    The change is folded into the 1x1 convolutions on both sides, quant_conv and post_quant_conv: the autoencoder's
    pictures stay what they were.
    """
    config, vae = model.config, dict(model.params["vae"])
    encode = jax.jit(lambda params, x: VAE(config.vae).apply({"params": params}, x, method="encode").mean)
    pictures = from_uint8(data.pictures(range(len(data)), config.image_size))
    batches = [pictures[i : i + 64] for i in range(0, len(pictures), 64)]
    means = np.concatenate([np.asarray(encode(vae, batch)) for batch in batches])
    mean, std = means.mean((0, 1, 2), dtype=np.float64), means.std((0, 1, 2), dtype=np.float64)

    before, after = (jax.tree.map(np.array, vae[name]) for name in ("quant_conv", "post_quant_conv"))
    channels = config.vae.latent_channels
    kernel, bias = before["kernel"], before["bias"]  # rows of the mean, then of the log-variance
    kernel[..., :channels] /= std
    bias[:channels] = (bias[:channels] - mean) / std
    bias[channels:] -= 2 * np.log(std)
    after["bias"] = after["bias"] + np.einsum("hwio,i->o", after["kernel"], mean)
    after["kernel"] = after["kernel"] * std[:, None]
    to_f32 = jax.tree.map(lambda leaf: leaf.astype(np.float32), {"quant_conv": before, "post_quant_conv": after})
    return dataclasses.replace(model, params={**model.params, "vae": vae | to_f32})


def main(out: Path, settings: dict[str, Settings]) -> Path:
    """Runs all three trainings in `out`, or what is left of them, and returns the folder of the finished model."""
    if not (out / "emoji" / "done").exists():
        shutil.rmtree(out / "emoji", ignore_errors=True)  # what an interrupted start left
        print(build(out / "emoji", BOX.image_size))
        (out / "emoji" / "done").touch()
    data = open_dataset(out / "emoji" / "train")
    texts = [text for example in data.examples for text in example.captions]
    tokenizer = from_merges(learn_merges(texts, BOX.clip.vocab_size))
    model = Pipeline(BOX, initial_params(BOX, seed=0), tokenizer, "box")

    task = vae_task(model, data, settings["vae"], out / "cache")
    model = train(task, settings["vae"], out / "vae", progress=Lines("vae"))
    model = standardised(model, data)
    task = clip_task(model, BOX_VISION, data, settings["clip"], out / "cache")
    model = train(task, settings["clip"], out / "clip", progress=Lines("clip"))
    task = unet_task(model, data, settings["unet"], out / "cache")
    model = train(task, settings["unet"], out / "unet", progress=Lines("unet"))

    half = jax.tree.map(lambda leaf: np.asarray(leaf, np.float16), model.params)
    save_model(dataclasses.replace(model, params=half), out / "box", one_file=True)
    image_encoder = jax.tree.map(
        lambda leaf: leaf.astype(np.float16), read_tensors(out / "clip" / "beside.safetensors")
    )
    write_tensors(out / "box" / "image_encoder.safetensors", image_encoder)
    return out / "box"


class Lines:
    """A line about every minute: updates done, metrics, time left."""

    def __init__(self, title: str) -> None:
        self.title, self.start, self.said = title, None, 0.0

    def __call__(self, done: int, total: int, metrics: dict[str, float]) -> None:
        now = time.monotonic()
        if self.start is None:  # the first update, which compiled
            self.start = (now, done)
        if now - self.said < 60 and done < total:
            return
        self.said = now
        seconds = (now - self.start[0]) / max(1, done - self.start[1]) * (total - done)
        values = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if name != "step")
        print(f"{self.title} {done}/{total}, {seconds / 60:.0f} minutes left; {values}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the model in the box.")
    parser.add_argument("out", type=Path, help="folder of the run; the same folder again goes on")
    parser.add_argument("--gpu", action="store_true", help="the longer trainings that a GPU does in minutes")
    parser.add_argument("--scale", type=float, default=1.0, help="number of updates, relative to the full ones (1)")
    options = parser.parse_args()
    keep_memory()
    plans = {part: scaled(plan, options.scale) for part, plan in (GPU if options.gpu else CPU).items()}
    print(main(options.out, plans))
