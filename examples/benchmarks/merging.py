"""Merging checkpoints against converting one of them: time and peak memory, all in one run, on the same disk.

    python examples/benchmarks/merging.py [--full] [--folder DIR] [--rounds 3]

Writes three synthetic models in float16, as most are shared, as .safetensors files into DIR: of a few million
parameters, or with --full of the size of Stable Diffusion 1.5 (2.3 GB each). Then, in turn, every round with the same
files in the page cache and a sync at its end: plain conversions of the first one, in float16, to .safetensors and to a
checkpoint of ours, which read and write one model; and merges to the same, a weighted sum (which reads two) and the two
differences (three). Prints the medians of the times and the highest peaks of resident memory, also as multiples of
those of the conversion to the same format. Starting Python and its libraries is in all of them; without --full there is
little else.

Two CPU cores of a virtual machine, shared with other work (load 5), ext4, 2026-11-26, --full --rounds 1:

                         seconds  times the conversion  peak memory  times its  times the file (2,299,934,100 bytes)
    conversion              18.5                  1.00      0.34 GB       1.00            0.15
    conversion to ours      21.1                  1.00      1.51 GB       1.00            0.66
    weighted-sum            23.8                  1.28      0.55 GB       1.61            0.24
    add-difference          33.2                  1.79      0.64 GB       1.88            0.28
    train-difference        29.6                  1.59      0.69 GB       2.01            0.30
    weighted-sum to ours    27.2                  1.29      1.63 GB       1.08            0.71

A conversion that changes no dtype copies bytes (8 to 18 s in other runs of the same hour); most of a merge is turning
float16 into float32 and back, number by number.
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

FILE, OURS = "out.safetensors", "ours"
PLAIN = {FILE: "conversion", OURS: "conversion to ours"}
MERGES = {
    "weighted-sum": ("weighted-sum", FILE),
    "add-difference": ("add-difference", FILE),
    "train-difference": ("train-difference", FILE),
    "weighted-sum to ours": ("weighted-sum", OURS),
}


def write_models(folder: Path, full: bool) -> None:
    """Three models of the same architecture, random weights in float16."""
    from convert.write import write_safetensors
    from sdjax.config import SD15, TINY
    from sdjax.models.params import cast, count_parameters, random_params

    config = SD15 if full else TINY
    print(f"{config.name}, {sum(count_parameters(config).values()):,} parameters", flush=True)
    for seed, name in enumerate("abc"):
        write_safetensors(folder / f"{name}.safetensors", config, cast(random_params(config, seed), "float16"))


def measure(command: list[str], folder: Path) -> tuple[float, int]:
    """Seconds until the command has ended and its output is on the disk, and its peak resident memory in bytes."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=folder)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    os.sync()
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="models of the size of Stable Diffusion 1.5")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where the files go (10 GB in full size)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--merges", nargs="+", choices=MERGES, default=list(MERGES), help="which of them (all)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        subprocess.run([sys.executable, __file__, "--write", name, *["full"] * options.full], check=True)
        files = [f"{letter}.safetensors" for letter in "abc"]
        size = (folder / files[0]).stat().st_size
        convert, written = [sys.executable, "-m", "convert"], ["--dtype", "float16"]
        commands = {title: ([*convert, files[0], output, *written], output) for output, title in PLAIN.items()}
        for title in options.merges:
            formula, output = MERGES[title]
            models = files[: 2 if formula == "weighted-sum" else 3]
            commands[title] = ([*convert, "merge", *models, "--formula", formula, "-o", output, *written], output)
        os.sync()
        results: dict[str, list[tuple[float, int]]] = {title: [] for title in commands}
        for _ in range(options.rounds):
            for title, (command, output) in commands.items():
                results[title].append(measure(command, folder))
                made = folder / output
                shutil.rmtree(made) if made.is_dir() else made.unlink()
                os.sync()
    print(f"{'':20} seconds  times the conversion  peak memory  times its  times the file ({size:,} bytes)")
    for title, found in results.items():
        own, peak = _figures(found)
        seconds, memory = _figures(results[PLAIN[commands[title][1]]])
        print(
            f"{title:20} {own:7.1f}  {own / seconds:20.2f}  {peak / 1e9:8.2f} GB  {peak / memory:9.2f}  "
            f"{peak / size:14.2f}"
        )


def _figures(found: list[tuple[float, int]]) -> tuple[float, int]:
    return statistics.median(seconds for seconds, _ in found), max(memory for _, memory in found)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        write_models(Path(sys.argv[2]), full="full" in sys.argv[3:])
    else:
        main()
