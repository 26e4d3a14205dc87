"""Compiles the full-size guided sampling loop for an H200 on a machine without a GPU, and looks at what is left in it.

    pip install . jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc nvidia-nvvm    (the plugins in jax's own version)
    JAX_PLATFORMS=cpu python examples/benchmarks/gpu_compile.py [--batch 1 8 32] [--rows 15]

The program is the loop of `Pipeline.batch`: Stable Diffusion 1.5 at 512x512 in bfloat16, guided, one scan over the
steps. XLA's own GPU compiler optimises it for the device described in h200_target.txtpb. Printed are compile time and
the bytes of arguments and temporaries; the exit status is 1 if the optimised program still has

- a full score matrix: an array with all queries and all keys of one attention, above 128 x 128;
- a convolution that reads or writes anything but bfloat16;
- a text or time projection in a usual step: a weight of those layers that it reads. The branch for pictures whose text
  changes from one step to the next does project, and is not followed.

Then come the fusions of one usual guided step that read or write more than they need, alike ones together, those with
the largest surplus first, and the sums of the whole step: what is needed, and what cannot be seen this way, is said in
`hlo_traffic.py`.

What this does not show: speed (kernels are not tuned without the device), that cuDNN accepts the fused attention
kernels, and their workspace (they count as 0 bytes). JAX asks the device at hand whether fused attention is possible;
here the target answers instead, for tracing only.

Compiled 2026-11-27 with jax 0.10.2 for an H200 (none present), nothing of the above left, 132 convolutions and 60 fused
attentions (half of them in the branch without guidance). Commit c87bdd3 and the one that wrote this:

                               1 picture, before        and now  8 pictures, before        and now
    temporaries, bytes             1,228,132,768  1,228,181,920       1,924,943,520  1,925,002,656
    kernels of a step                        888            730                 890            720
    MB read and written                    7,358          6,292              36,788         33,755
    MB surplus                             1,331            671               3,253            657
      moved                                  357             53               2,071            637
      float32                                484              1                 193              5
      splits                                 484            618                  16             16
      norm                                     7              0                 973              0

Two changes did that: group norms in bfloat16 take their sums in one reading (`GroupNorm.by_moments`, alone 34,463 MB
and 729 kernels for 8 pictures), and queries, keys and values are no longer one product that is copied apart
(`GPU_OPTIONS` in `sdjax/devices/platform.py`). What is left, for 8 pictures in MB: copies of the texts' keys and
values, which the loop carries (254), and their transposition to rows of the UNet (123); skip connections stored beside
what they are joined to (225), which the 1x1 convolution around the block takes whole; the map doubled by the nearest
neighbour (13). No fusion reads an operand again. For 1 picture most is splits of products, which the device's autotuner
decides anew; they are more than before because the products are smaller. 32 pictures were not compiled again: on
2026-11-22 they took 4,103,691,856 bytes of temporaries.

1,128,494,080 of the temporaries are the convolution kernels in cuDNN's layout, copied once per call, before the scan.
"""

import argparse
import re
import time
from pathlib import Path
from typing import Any

import jax
import jax._src.cudnn.fused_attention_stablehlo as fused_attention
from hlo_traffic import parsed, step, table, uses
from jax.experimental import topologies

from sdjax.config import SD15
from sdjax.devices.placement import Placement
from sdjax.pipeline.warmup import programs_for
from sdjax.request import Request

TARGET = Path(__file__).with_name("h200_target.txtpb")
COMPUTE_CAPABILITY = 9.0  # as in TARGET
CUDNN_VERSION = 91000
SMALL_SCORES = 128 * 128


def answer_for_target() -> None:
    """Makes JAX's private checks for fused attention see the target rather than this machine's CPU."""
    fused_attention.check_cudnn_version = lambda: CUDNN_VERSION
    fused_attention.check_compute_capability = lambda least: float(least) <= COMPUTE_CAPABILITY
    fused_attention.is_cuda_compute_capability_equal = lambda asked: float(asked) == COMPUTE_CAPABILITY


def compile_loop(batch: int) -> Any:
    """The sampling loop for `batch` pictures, compiled for the target."""
    topology = topologies.get_topology_desc(platform="cuda", target_config=TARGET.read_text(), topology="1x1x1")
    placement = Placement(tuple(topology.devices))
    return programs_for(Request(""), SD15, batch, dtype="bfloat16", placement=placement)["sample"]().compile()


def score_matrices(hlo: str, pictures: int, small: int = SMALL_SCORES) -> list[str]:
    """Array types that hold a score for every query and key of one attention, if those are more than `small`. A first
    axis over the heads of all pictures is no axis of queries, which may be as many.
    """
    side = SD15.image_size // SD15.vae.downscale
    queries = [(side >> i) ** 2 for i in range(len(SD15.unet.channels))]
    heads = {rows * count for rows in (pictures, 2 * pictures) for count in SD15.unet.heads}
    found = set()
    for dtype, dims in set(re.findall(r"\b(f32|bf16)\[([\d,]+)\]", hlo)):
        sizes = [int(size) for size in dims.split(",")]
        if len(sizes) > 2 and sizes[0] in heads:
            del sizes[0]
        for q in queries:
            for k in (q, SD15.clip.length):
                if q * k > small and all(sizes.count(n) >= (q, k).count(n) for n in (q, k)):
                    found.add(f"{dtype}[{dims}]")
    return sorted(found)


def convolutions(hlo: str) -> list[set[str]]:
    """The element types that each convolution reads and writes."""
    types = dict(re.findall(r"^\s*(?:ROOT )?(%\S+) = (.*?) [\w-]+\(", hlo, re.MULTILINE))
    calls = re.findall(r"^\s*(?:ROOT )?(%\S+) = .*? (?:convolution|custom-call)\((.*?)\), (.*)$", hlo, re.MULTILINE)
    found = []
    for name, operands, rest in calls:
        if "dim_labels=" in rest:
            arrays = types[name] + "".join(types[operand] for operand in re.findall(r"%[\w.-]+", operands))
            found.append(set(re.findall(r"\b([a-z]+\d+)\[", arrays)) - {"u8"})  # u8: cuDNN's workspace
    return found


def projections(hlo: str) -> list[str]:
    """Weights with the shape of a text projection's or of the time embedding's first one that a usual step reads."""
    width, channels = SD15.unet.context_width, SD15.unet.channels
    weights = {(width, features) for features in channels} | {(channels[0], 4 * channels[0])}
    read = {
        shape for around, one in step(*parsed(hlo)) for operand in one.operands for _, shape in around[operand].arrays
    }
    return [",".join(map(str, shape)) for shape in sorted(weights & read)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], help="pictures")
    parser.add_argument("--rows", type=int, default=15, help="of each table of fusions; -1: all (15)")
    options = parser.parse_args()
    answer_for_target()
    print(f"jax {jax.__version__}, NVIDIA H200 (described, not present), {SD15.name}")
    print("pictures  compile s  arguments, bytes  temporaries, bytes  convolutions  fused attentions")
    bad: list[str] = []
    for batch in options.batch:
        start = time.perf_counter()
        compiled = compile_loop(batch)
        elapsed = time.perf_counter() - start
        memory, hlo = compiled.memory_analysis(), compiled.as_text()
        kinds = convolutions(hlo)
        faults = [f"score matrix {array}" for array in score_matrices(hlo, batch)]
        faults += [f"convolution in {' and '.join(sorted(kind))}" for kind in kinds if kind != {"bf16"}]
        faults += [f"projection with a weight [{shape}]" for shape in projections(hlo)]
        bad += [f"{batch} pictures: {fault}" for fault in faults]
        fused = hlo.count('custom_call_target="__cudnn$fmhaSoftmax"')
        print(
            f"{batch:8}  {elapsed:9.1f}  {memory.argument_size_in_bytes:16,}  {memory.temp_size_in_bytes:18,}  "
            f"{len(kinds):12}  {fused:16}",
            flush=True,
        )
        print("\n".join(table(uses(hlo), None if options.rows < 0 else options.rows)), flush=True)
    print("\n".join(bad) or "no full score matrix, no convolution outside bfloat16, no text or time projection left")
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
