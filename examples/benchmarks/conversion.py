"""Converting a full-size .ckpt beside PyTorch: time and peak memory, both in one run, on the same disk.

    python examples/benchmarks/conversion.py [--folder DIR] [--rounds 7] [--restore]

Writes a synthetic Stable Diffusion 1.5 .ckpt of the public layout (4.3 GB, random weights; needs the test extra) into
DIR, then converts it in turn with PyTorch (`torch.load` and `safetensors.torch.save_file`, to the same names), to a
checkpoint of ours and to .safetensors, each in a process of its own, and prints the medians. What is written is flushed
to the disk within the time, by every side; the source is in the page cache. A copy of the file (cp) is the last row.
--restore: also what reading a checkpoint of ours takes, as conversions write it and from Orbax' folder.

Bounds: a checkpoint of ours in 0.6 of PyTorch's time, .safetensors in 0.5.

Two CPU cores of a virtual machine (AMD EPYC, AVX-512), ext4, 2026-11-27, --rounds 5, one other process running:

                             seconds  (from - to)    of the first  CPU s  peak memory  of the file (4,265,262,285 bytes)
    PyTorch to .safetensors     12.0  (11.5 - 12.5)          1.00   11.1      4.50 GB         1.06
    to an sdjax checkpoint       5.9  (4.9 - 7.7)            0.49    5.2      0.64 GB         0.15
    to .safetensors              4.7  (3.8 - 6.0)            0.39    3.3      0.44 GB         0.10
    copy (cp, sync)              2.4  (2.0 - 2.7)            0.20    1.4      0.01 GB         0.00

With 8 to 13 processes waiting for the two cores the ratios were 0.63 and 0.51 in one run, 1.04 and 0.88 in another.
Reading, there, --rounds 3:

    reading an Orbax folder     23.3  (22.0 - 24.7)          1.00   10.9      6.44 GB         1.51
    reading an sdjax checkpoint 11.3  (10.6 - 13.8)          0.49    4.7      4.45 GB         1.04

Of our seconds of processors 2.4 are starting up: 1.5 of them Flax tracing the networks for their shapes.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# What is imported here counts as memory of every process that is started from here.


def write_checkpoint(path: Path) -> None:
    """Random float32 weights under the public names, saved by torch as training does."""
    import torch

    from convert.names import PARTS, entries
    from sdjax.config import SD15

    prefixes = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}
    prefixes["text"] = "cond_stage_model.transformer.text_model."
    generator = torch.Generator().manual_seed(0)
    spellings = {"unet": "compvis", "vae": "compvis", "text": "diffusers"}
    state = {
        prefixes[part] + entry.name: torch.randn(entry.shape, generator=generator) * 0.02
        for part in PARTS
        for entry in entries(SD15, part, spellings[part])
    }
    torch.save({"global_step": 840000, "state_dict": state}, path)
    print(f"Stable Diffusion 1.5, {sum(tensor.numel() for tensor in state.values()):,} parameters")


def convert_with_torch(source: Path, destination: Path) -> None:
    """What people do with PyTorch at hand; flushed, as ours is."""
    import torch
    from safetensors.torch import save_file

    save_file(torch.load(source, map_location="cpu", weights_only=True)["state_dict"], destination)
    with open(destination, "rb") as written:
        os.fsync(written.fileno())


def restore(folder: Path) -> None:
    """Parameters to the default device."""
    import jax

    from sdjax import restore

    jax.block_until_ready(restore(folder))


def save_with_orbax(source: Path, destination: Path) -> None:
    from sdjax import restore, save

    save(destination, *restore(source))


WORK: dict[str, Callable[..., None]] = {
    "write": write_checkpoint,
    "torch": convert_with_torch,
    "restore": restore,
    "orbax": save_with_orbax,
}
"""What this file does in a process of its own: `conversion.py --do NAME PATH ...`."""


def doing(name: str, *paths: Path) -> list[str]:
    return [sys.executable, __file__, "--do", name, *map(str, paths)]


def measure(command: list[str]) -> tuple[float, float, int]:
    """Seconds until a command has ended, those of processors at work for it, and its peak resident memory in bytes."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def compare(commands: dict[str, tuple[list[str], Path | None]], rounds: int, size: int) -> None:
    """Prints the medians of commands that run in turn, beside the first one's. Their outputs, if any, are removed."""
    results: dict[str, list[tuple[float, float, int]]] = {title: [] for title in commands}
    for _ in range(rounds):
        for title, (command, output) in commands.items():
            results[title].append(measure(command))
            if output is not None:
                shutil.rmtree(output) if output.is_dir() else output.unlink()
                os.sync()
    first, *_ = results
    base = statistics.median(seconds for seconds, _, _ in results[first])
    print(f"{'':28} seconds  (from - to)    of the first  CPU s  peak memory  of the file ({size:,} bytes)")
    for title, figures in results.items():
        seconds, processors, memory = zip(*figures, strict=True)
        median, spread = statistics.median(seconds), f"({min(seconds):.1f} - {max(seconds):.1f})"
        print(
            f"{title:28} {median:7.1f}  {spread:13}  {median / base:12.2f}  {statistics.median(processors):5.1f}  "
            f"{max(memory) / 1e9:8.2f} GB  {max(memory) / size:11.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where the files go (15 GB are needed)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--restore", action="store_true", help="also measure reading a checkpoint of ours")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        checkpoint = folder / "model.ckpt"
        subprocess.run(doing("write", checkpoint), check=True)
        size = checkpoint.stat().st_size
        ours, out, torch, copy = (folder / name for name in ("ours", "out.safetensors", "torch.safetensors", "copy"))
        convert = [sys.executable, "-m", "convert", str(checkpoint)]
        os.sync()
        commands: dict[str, tuple[list[str], Path | None]] = {
            "PyTorch to .safetensors": (doing("torch", checkpoint, torch), torch),
            "to an sdjax checkpoint": ([*convert, str(ours)], ours),
            "to .safetensors": ([*convert, str(out)], out),
            "copy (cp, sync)": (["sh", "-c", 'cp "$1" "$2" && sync "$2"', "sh", str(checkpoint), str(copy)], copy),
        }
        compare(commands, options.rounds, size)
        if options.restore:
            subprocess.run([*convert, str(ours)], check=True)
            subprocess.run(doing("orbax", ours, folder / "orbax"), check=True)
            titles = {"reading an Orbax folder": folder / "orbax", "reading an sdjax checkpoint": ours}
            compare({title: (doing("restore", path), None) for title, path in titles.items()}, options.rounds, size)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--do"]:
        WORK[sys.argv[2]](*map(Path, sys.argv[3:]))
    else:
        main()
