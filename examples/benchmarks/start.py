"""First and second start: seconds before the first picture, beside another version of this project in one run.

    python examples/benchmarks/start.py [--against DIR] [--rounds 7] [--full] [--folder DIR]

A first start finds no compiled programs, a second one those that the first has kept. Each is a process of its own with
a cache of its own, this checkout and the one in --against DIR (`git worktree add DIR COMMIT`) taking turns.

    picture     `sdjax txt2img "red heart"` with the model in the box, from the start of Python to its end
    full        with --full: the same for Stable Diffusion 1.5 at 512x512, random float32 weights in a checkpoint
                as each side writes it (8.6 GB in --folder, in the page cache), until the first step can begin
    imports     of what these commands import, alone

Medians of wall seconds, and of the processor's (a machine that others use has its waiting in the former alone).

Two CPU cores (AMD EPYC, AVX-512), one other process running, jax 0.10.2, 2026-11-27, --rounds 7, against c87bdd3;
seconds, and the processor's:

                               here           c87bdd3        ratio
    picture, first start       7.99 (8.49)    9.38 (10.02)   0.85
    picture, second start      1.42 (1.50)    3.05 (3.16)    0.46
    imports                    0.67 (0.70)    0.64 (0.69)    1.05

--rounds 0 --full, one round on the quiet machine; most of what is left of the second start is reading the weights:

    picture, first start       5.62 (9.21)    7.18 (11.40)   0.78
    picture, second start      1.47 (1.79)    3.06 (3.71)    0.48
    full, first start         19.54 (29.29)  12.89 (21.17)   1.52
    full, second start         5.55 (6.39)    7.79 (11.41)   0.71

On the quiet machine, two rounds: first start 5.1 beside 5.9, second 1.35 beside 2.65. What is left of a second start:
imports 0.65, reading executables 0.45 (Python waits meanwhile), sampling 0.2. So the bound of the second start is
missed by a hundredth for the picture and by more for the full model, whose first start takes longer, too, for the
loops of Winograd's convolutions; the box's programs take 6.7 s of the processor instead of 8.1.

Bounds: a second start at most 0.45 of that of c87bdd3, and compiling, which is a first start less a second one's
reading, at most 0.8.
"""

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]

IMPORTS = "import jax, sdjax.cli.generate, sdjax.load, sdjax.pipeline.recipe, sdjax.pipeline.warmup"

UNTIL_THE_FIRST_STEP = """
import os, sys
from sdjax.cli.run import run
from sdjax.pipeline.batching import Batches

def begin(*_):
    sys.stdout.flush()
    os._exit(0)

Batches._started = begin
run(sys.argv[1:])
sys.exit("the first step never came")
"""


def write_full_model(folder: Path) -> None:
    """Stable Diffusion 1.5 with random weights, as a checkpoint of ours in one file and as c87bdd3 wrote it."""
    from sdjax.config import SD15
    from sdjax.models.params import random_params
    from sdjax.storage import checkpoint

    params = random_params(SD15)
    folder.mkdir()
    checkpoint.save(folder / "here", SD15, params, one_file=True)
    checkpoint.save(folder / "against", SD15, params)


def measure(checkout: Path, cache: Path, arguments: list[str]) -> tuple[float, float]:
    """Wall and processor seconds of Python with these arguments, on the package of a checkout.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    environment = {**os.environ, "PYTHONPATH": str(checkout), "SDJAX_CACHE": str(cache)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package has its bytecode
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, *arguments]
    subprocess.run(command, env=environment, cwd=cache, check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, metavar="DIR", help="another checkout of this project")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--full", action="store_true", help="a full-size model, too")
    parser.add_argument("--folder", type=Path, help="for the full-size model (4.3 GB) and caches")
    options = parser.parse_args()
    checkouts = {"here": ROOT} | ({} if options.against is None else {"against": options.against.resolve()})
    picture = ["-m", "sdjax.cli", "txt2img", "red heart", "--seed", "1", "-o", "heart.png"]
    seconds: dict[tuple[str, str], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        commands = {"picture": picture}
        if options.full:
            write_full_model(folder / "sd15")
            asked = ["txt2img", "a photograph of an astronaut riding a horse", "--size", "512x512"]
            commands["full"] = ["-c", UNTIL_THE_FIRST_STEP, *asked]
        for number in range(options.rounds + 1):  # the first reads everything from the disk, and does not count
            for what, command in commands.items():
                for start in ("first start", "second start"):
                    for side, checkout in checkouts.items():
                        cache = folder / f"{what}-{side}"
                        if start == "first start":
                            shutil.rmtree(cache, ignore_errors=True)
                            cache.mkdir()
                        model = ["--model", str(folder / "sd15" / side)] if what == "full" else []
                        found = measure(checkout, cache, [*command, *model])
                        seconds.setdefault((f"{what}, {start}", side), []).append(found)
            for side, checkout in checkouts.items():
                found = measure(checkout, folder, ["-c", IMPORTS])
                seconds.setdefault(("imports", side), []).append(found)
            print(f"round {number} of {options.rounds}", file=sys.stderr)
    counted = {key: found[1:] or found for key, found in seconds.items()}
    medians = {
        key: [statistics.median(column) for column in zip(*found, strict=True)] for key, found in counted.items()
    }
    for what in dict.fromkeys(what for what, _ in medians):
        (wall, cpu), other = medians[what, "here"], medians.get((what, "against"))
        line = f"{what:24}{wall:8.2f} s wall {cpu:8.2f} s processor"
        if other is not None:
            line += f"   against {other[0]:8.2f} and {other[1]:8.2f}   {wall / other[0]:5.2f} and {cpu / other[1]:5.2f}"
        print(line)


if __name__ == "__main__":
    main()
