"""Converting a full-size .ckpt against copying it: time and peak memory, both in one run, on the same disk.

    python examples/benchmarks/conversion.py [--folder DIR] [--rounds 3]

Writes a synthetic Stable Diffusion 1.5 .ckpt of the public layout (4.3 GB, random weights; needs the test extra) into
DIR, then copies and converts it in turn, every round with the same files in the page cache and a sync at its end, and
prints the medians. The conversions: to a checkpoint of ours, and to .safetensors.

Bounds: time at most 2 times the copy, peak resident memory at most 1.3 times the file.

Two CPU cores of a virtual machine, ext4, 2026-11-21, medians of 2:

                             seconds  times the copy  peak memory  times the file (4,265,262,285 bytes)
    copy (cp)                    4.1            1.00
    to an sdjax checkpoint      20.8            5.08      1.74 GB            0.41
    to .safetensors              9.7            2.36      0.41 GB            0.10

The bound on memory is met, the one on time is not. Starting up takes 3.5 s of it (two thirds are Flax tracing the
networks for their shapes), and turning the kernels to our layout 5 s; the rest of a checkpoint of ours is the kernel
handing out pages for buffers and files, 12 s of system time.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from convert.names import PARTS, entries
from sdjax.config import SD15
from sdjax.models.params import abstract_params

PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}
PREFIXES["text"] = "cond_stage_model.transformer.text_model."


def write_checkpoint(path: Path) -> None:
    """Random float32 weights under the public names, saved by torch as training does."""
    import torch

    generator = torch.Generator().manual_seed(0)
    spellings = {"unet": "compvis", "vae": "compvis", "text": "diffusers"}
    state = {
        PREFIXES[part] + entry.name: torch.randn(entry.shape, generator=generator) * 0.02
        for part in PARTS
        for entry in entries(SD15, part, spellings[part])
    }
    torch.save({"global_step": 840000, "state_dict": state}, path)


def measure(command: list[str]) -> tuple[float, int]:
    """Seconds until the command has ended and its output is on the disk, and its peak resident memory in bytes."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    os.sync()
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where the files go (15 GB are needed)")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(abstract_params(SD15)))
    print(f"Stable Diffusion 1.5, {count:,} parameters, {os.cpu_count()} cores", flush=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        checkpoint = folder / "model.ckpt"
        subprocess.run([sys.executable, __file__, "--write", str(checkpoint)], check=True)
        size = checkpoint.stat().st_size
        convert = [sys.executable, "-m", "convert", str(checkpoint)]
        commands = {
            "copy (cp)": (["cp", str(checkpoint), str(folder / "copy.ckpt")], folder / "copy.ckpt"),
            "to an sdjax checkpoint": ([*convert, str(folder / "ours")], folder / "ours"),
            "to .safetensors": ([*convert, str(folder / "out.safetensors")], folder / "out.safetensors"),
        }
        os.sync()
        results: dict[str, list[tuple[float, int]]] = {title: [] for title in commands}
        for _ in range(options.rounds):
            for title, (command, output) in commands.items():
                results[title].append(measure(command))
                shutil.rmtree(output) if output.is_dir() else output.unlink()
                os.sync()
        copy = statistics.median(seconds for seconds, _ in results["copy (cp)"])
        print(f"{'':24} seconds  times the copy  peak memory  times the file ({size:,} bytes)")
        for title, figures in results.items():
            seconds = statistics.median(seconds for seconds, _ in figures)
            line = f"{title:24} {seconds:7.1f}  {seconds / copy:14.2f}"
            if title != "copy (cp)":  # a child's figure starts at that of this process, which says nothing of cp
                memory = max(memory for _, memory in figures)
                line += f"  {memory / 1e9:8.2f} GB  {memory / size:14.2f}"
            print(line)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        write_checkpoint(Path(sys.argv[2]))
    else:
        main()
