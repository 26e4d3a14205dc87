"""Seconds until the command line answers what needs no network: help, wrong options, wrong values, a picture's recipe.

    python examples/benchmarks/answers.py [--rounds 10] [--beside CHECKOUT]

Every round runs each command once in a new process, from this checkout and, given one, from another; printed are the
medians of the wall time and of the processor's time, and the packages of some size that were imported. The exit status
is 1 if help or a wrong option takes more than `BAR` seconds of wall time from this checkout.

2026-11-27, 2 cores of an AMD EPYC (AVX-512), one other process running, jax 0.10.2, Python 3.11, beside the commit
before help needed no JAX (c87bdd3), wall time:

                              here      c87bdd3
    --help                    0.065 s   0.711 s
    txt2img --help            0.063 s   0.681 s
    txt2img heart --nonsense  0.060 s   0.603 s
    txt2img heart --steps 0   0.169 s   0.809 s
    info picture.png          0.090 s   0.597 s

With the compiled modules not kept (PYTHONDONTWRITEBYTECODE) --help takes 0.10 s. What `sdjax txt2img` imports before it
samples takes 0.65 s instead of 0.68 s: jax 0.43, flax 0.15, all else 0.07; nothing of optax, orbax, scipy or the hub is
among it, before or after.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from sdjax.config import BOX
from sdjax.pipeline.recipe import recipe_of, save_picture
from sdjax.request import Request

BAR = 0.3
"""Seconds of wall time for help and wrong options, of a warm disk."""

LARGE = {"jax", "flax", "numpy", "scipy", "PIL", "rich", "tokenizers", "optax", "orbax", "torch", "huggingface_hub"}
"""Packages whose import takes time worth naming."""

COMMANDS = {
    "--help": True,
    "txt2img --help": True,
    "txt2img heart --nonsense": True,
    "txt2img heart --steps 0": False,
    "info picture.png": False,
}
"""What is run, and whether `BAR` holds for it."""

LISTED = "import atexit, sys; atexit.register(lambda: print('imported', *{name.split('.')[0] for name in sys.modules}))"
"""What makes a process print the packages that it has imported when it ends."""


def run(checkout: Path, command: str, folder: Path) -> tuple[float, float]:
    """Seconds of wall time and of the processor, of one new process."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    words = [sys.executable, "-m", "sdjax.cli", *command.split()]
    subprocess.run(words, cwd=folder, env={**os.environ, "PYTHONPATH": str(checkout)}, capture_output=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def imported(checkout: Path, command: str, folder: Path) -> list[str]:
    """Which of `LARGE` a command imports."""
    words = [sys.executable, "-c", f"{LISTED}; from sdjax.cli import script; sys.exit(script())", *command.split()]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    return sorted(LARGE & {*done.stdout.splitlines()[-1].split()})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--beside", type=Path, help="another checkout, measured in the same rounds")
    options = parser.parse_args()
    here = Path(__file__).parents[2]
    checkouts = [here] if options.beside is None else [here, options.beside.absolute()]
    slow = 0
    with tempfile.TemporaryDirectory() as name:
        folder, picture = Path(name), Image.new("RGB", (64, 64))
        recipe = recipe_of(Request("red heart"), BOX.sampling, picture, model="", dtype="float32")
        save_picture(folder / "picture.png", picture, recipe)
        for command, has_bar in COMMANDS.items():
            seconds: dict[Path, list[tuple[float, float]]] = {checkout: [] for checkout in checkouts}
            for number in range(options.rounds + 1):
                for checkout in checkouts:
                    found = run(checkout, command, folder)
                    if number:  # the first warms the disk
                        seconds[checkout].append(found)
            for checkout in checkouts:
                wall, processor = (statistics.median(times) for times in zip(*seconds[checkout], strict=True))
                packages = ", ".join(imported(checkout, command, folder)) or "nothing large"
                print(f"{command:25} {wall:6.3f} s, processor {processor:6.3f} s  {checkout}: {packages}", flush=True)
                slow += has_bar and checkout == here and wall > BAR
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
