"""The training loop: batches in, a model out, and everything in between on disk.

    OUT/settings.json   what was asked for; the same command resumes it, another one is refused
    OUT/skipped.jsonl   examples that were left out, and why (`sdjax train --skip-bad`)
    OUT/state/          Orbax checkpoints of the whole `TrainState`, the last two
    OUT/flushed.txt     the newest of them that is on the disk for certain, also after a power cut
    OUT/cache/          latents and text states (UNet)
    OUT/metrics.jsonl   a line every `LOG_EVERY` updates; OUT/loss.png draws it
    OUT/samples/        a sheet every `sample_every` updates
    OUT/model/          at the end: our checkpoint with the averaged parameters, for `sdjax.load`
    OUT/beside.safetensors   at the end: what was learnt in addition to the model (CLIP: the image encoder)

Update n depends on the state before it and on n alone: batches and random keys are made from n. So a run that was
killed and started again gives bit for bit the parameters of one that was not.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from sdjax.devices.platform import pinned, seeded_keys
from sdjax.pipeline.pipeline import Pipeline
from sdjax.storage import checkpoint
from sdjax.storage.files import flush, flush_tree, new_file
from sdjax.text.tokenizer import clip_tokenizer
from sdjax.train.plots import curves
from sdjax.train.settings import Settings
from sdjax.train.step import (
    TrainState,
    batch_sharding,
    initial_state,
    jit_step,
    learning_rate,
    make_step,
    optimizer,
    scanned,
    state_sharding,
)
from sdjax.train.stream import prefetch
from sdjax.train.tasks.task import Task

FLUSHED = "flushed.txt"
"""Says which checkpoint is on the disk for certain."""

LOG_EVERY = 50
"""Updates between lines of metrics.jsonl; each is the mean over them."""

SLICE = 2**20
"""Bytes from which devices that hold the same array save a slice of it each; of small ones one saves the whole."""

Progress = Callable[[int, int, dict[str, float]], None]
"""Called with (updates done, updates in all, the last metrics)."""


@pinned
def train(
    task: Task,
    settings: Settings,
    out: str | Path,
    *,
    note: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> Pipeline:
    """Runs a training to its end, from where an earlier run in `out` stopped, and returns the model.

    note: what else must be the same for a run to go on (data, starting model); kept in settings.json. If the task's
    cache is to be in `out`, call `claim` with the same arguments before making the task. Uses every local device:
    batches are split over them, with `settings.shard` the state, too.

    Raises:
        ValueError: `out` holds another run, or the batch does not divide over devices and parts. FloatingPointError:
        the loss is no longer finite; the last checkpoint is from before.
    """
    from orbax.checkpoint import v1 as ocp

    out = Path(out).absolute()
    claim(out, settings, note)
    rate = learning_rate(settings.learning_rate, settings.steps, warmup=settings.warmup, decay=settings.decay)
    update = optimizer(rate, kind=settings.optimizer, weight_decay=settings.weight_decay, clip=settings.clip)
    step = make_step(task.loss, update, ema=settings.ema, accumulate=settings.accumulate, dtype=settings.dtype)
    mesh = jax.make_mesh((jax.local_device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    shapes = jax.eval_shape(lambda params: initial_state(params, update), task.params)
    placement = state_sharding(shapes, mesh, shard_params=settings.shard)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    frozen = jax.device_put(task.frozen, everywhere)
    key = jax.device_put(seeded_keys(settings.seed), everywhere)
    run = jit_step(step if settings.scan == 1 else scanned(step), placement)
    rows = batch_sharding(mesh, scanned=settings.scan > 1)

    flushed = _flushed(out)
    for folder in (out / "state").glob("[0-9]*"):
        if folder.name.isdecimal() and int(folder.name) > flushed:
            shutil.rmtree(folder)  # a power cut may have left it in parts
    context, policy = ocp.Context(), ocp.training.preservation_policies.LatestN(2)
    context.array.saving.min_slice_bytes_for_replica_parallel = SLICE
    with ocp.training.Checkpointer(
        out / "state", context=context, preservation_policy=policy, cleanup_tmp_directories=True
    ) as states:
        if states.latest is None:
            state = jax.device_put(initial_state(task.params, update), placement)
        else:
            like = jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, placement)
            state = TrainState(*states.load(states.latest.step, like))
        done = int(state.step)
        log = _Log(out, done, rate)
        stacks = prefetch(lambda i: _stack(task, i, settings.scan), done // settings.scan)
        try:
            while done < settings.steps:
                state, metrics = run(state, frozen, jax.device_put(next(stacks), rows), key)
                done += settings.scan
                log.add(metrics, done, settings.scan)
                if progress is not None:
                    progress(done, settings.steps, log.last)
                if done % settings.save_every == 0 or done == settings.steps:
                    log.flush(done)
                    states.save(done, state)
                    _flush(out, done)
                if done % settings.sample_every == 0 or done == settings.steps:
                    (out / "samples").mkdir(exist_ok=True)
                    task.sheet(jax.device_get(state.ema)).save(out / "samples" / f"{done:07d}.png")
                    log.plot()
        finally:
            stacks.close()  # type: ignore[attr-defined]
    average = jax.device_get(state.ema)
    model = task.finish(average)
    save_model(model, out / "model")
    if task.beside is not None:
        checkpoint.write_tensors(out / "beside.safetensors", task.beside(average), force=True)
    return model


def _flush(out: Path, step: int) -> None:
    """Writes the checkpoint of `step` through to the disk, then that it is there."""
    flush_tree(out / "state" / str(step))
    flush(out / "state")
    with new_file(out / FLUSHED, force=True) as temporary:
        temporary.write_text(f"{step}\n")


def _flushed(out: Path) -> float:
    """The newest update whose checkpoint is on the disk for certain; infinity for a run that did not note it yet."""
    try:
        return int((out / FLUSHED).read_text())
    except (OSError, ValueError):
        return math.inf


def save_model(model: Pipeline, path: Path, *, one_file: bool = False) -> None:
    """Writes our checkpoint (`checkpoint.save`), with the tokenizer if it is not CLIP's own; replaces an older one."""
    with tempfile.TemporaryDirectory() as folder:
        own = model.tokenizer.engine.to_str() != clip_tokenizer().engine.to_str()
        if own:
            model.tokenizer.engine.save(str(Path(folder) / "tokenizer.json"))
        options = dict(tokenizer=folder if own else None, one_file=one_file, force=True)
        checkpoint.save(path, model.config, model.params, **options)  # type: ignore[arg-type]


ADDED = ("conversion", "content", "listing")
"""Entries of settings.json that older runs lack."""


def claim(out: Path, settings: Settings, note: dict[str, Any] | None = None) -> None:
    """Makes `out` the folder of this run, by its settings.json, or checks that it is.

    Raises:
        ValueError: it holds another run, or other files; or the batch does not divide over devices and parts.
    """
    devices = jax.local_device_count()
    if settings.batch % (devices * settings.accumulate):
        raise ValueError(
            f"batch {settings.batch} cannot be split over {devices} devices in {settings.accumulate} parts; "
            f"make it a multiple of {devices * settings.accumulate}"
        )
    file = out / "settings.json"
    wanted = json.loads(json.dumps({**asdict(settings), **(note or {})}))
    if not file.exists():
        if out.is_dir() and any(out.iterdir()):
            raise ValueError(f"{out} is not empty and holds no training run; name a new folder")
        out.mkdir(parents=True, exist_ok=True)
        with new_file(file) as temporary:
            temporary.write_text(json.dumps(wanted, indent=2) + "\n")
        return
    try:
        found = {name: wanted[name] for name in ADDED if name in wanted} | json.loads(file.read_text("utf-8"))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: damaged ({error}); name a new folder") from None
    changed = [name for name in sorted(found | wanted) if found.get(name) != wanted.get(name)]
    if changed:
        first = changed[0]
        raise ValueError(
            f"{out} holds a run with other settings ({', '.join(changed)}; {first} was {found.get(first)!r}, now "
            f"{wanted.get(first)!r}); repeat its command to go on, or name a new folder"
        )


def _stack(task: Task, index: int, scan: int) -> dict[str, np.ndarray]:
    """The batches of `scan` updates, with a leading axis if there are several."""
    batches = [task.batch(index * scan + i) for i in range(scan)]
    return batches[0] if scan == 1 else jax.tree.map(lambda *rows: np.stack(rows), *batches)


class _Log:
    """metrics.jsonl: means over the updates since the line before. Lines after a restored state are made again."""

    def __init__(self, out: Path, done: int, rate: optax.Schedule) -> None:
        self.file, self.rate = out / "metrics.jsonl", rate
        self.window: list[Any] = []
        self.rows = [row for row in _rows(self.file) if row["step"] <= done]
        with new_file(self.file, force=True) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        self.last: dict[str, float] = self.rows[-1] if self.rows else {}

    def add(self, metrics: Any, done: int, scan: int) -> None:
        self.window.append(metrics)
        if done // LOG_EVERY > (done - scan) // LOG_EVERY:
            self.flush(done)

    def flush(self, done: int) -> None:
        """Writes a line; waits for the device."""
        if not self.window:
            return
        every = jax.tree.map(
            lambda *values: np.concatenate([np.atleast_1d(v) for v in values]), *jax.device_get(self.window)
        )
        self.window = []
        self.last = {"step": done} | {name: float(values.mean()) for name, values in every.items()}
        for name in ("loss", "gradient_norm"):  # a finite loss may come with a gradient that spoils the parameters
            if not np.isfinite(self.last[name]):
                raise FloatingPointError(f"{name} is {self.last[name]} at update {done}; lower the learning rate")
        self.last["learning_rate"] = float(self.rate(done - 1))
        self.rows.append(self.last)
        with self.file.open("a") as file:
            file.write(json.dumps(self.last) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def plot(self) -> None:
        if self.rows:
            steps = [row["step"] for row in self.rows]
            lines = {"loss": (steps, [row["loss"] for row in self.rows])}
            curves(lines, title="loss", x_label="updates", log_y=all(row["loss"] > 0 for row in self.rows)).save(
                self.file.with_name("loss.png")
            )


def _rows(file: Path) -> Iterator[dict[str, float]]:
    """The lines of a metrics.jsonl, up to one that a crash or a power cut left in parts."""
    if not file.exists():
        return
    for line in file.read_text("utf-8", "replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            return
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            return
        yield row
