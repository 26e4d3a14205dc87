"""Compiles full-size text to image for pods of TPUs on a machine without a TPU, and says what would fit.

    pip install . libtpu
    export TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu ALLOW_MULTIPLE_LIBTPU_LOAD=1
    python examples/benchmarks/tpu_compile.py [--topology v5e:2x2] [--batch 1 8]
    python examples/benchmarks/tpu_compile.py --check --topology v5e:2x2 --batch 1    (whether the bytes have grown)

The programs are those of `Pipeline.on`: Stable Diffusion 1.5 at 512x512 in bfloat16, guided, the batch split over all
chips and the parameters whole on each. XLA's own TPU compiler optimises them for chips that are described, not present.
Printed for each topology, batch (pictures at once on each chip) and program: seconds of compilation, bytes per chip of
arguments, results, temporaries and code, and GFLOP per picture by the compiler's count, to which a loop is its inside
once: that of `sample` is for one step, beside two rows of the UNet by its products and convolutions. A batch that does
not fit is refused by the compiler, which is printed, too: the largest batch is worked out by a straight line through
the two largest compiled, and then compiled, until that line leads no further. The exit status is 1 if a program holds a
collective, or a full score matrix (all queries and keys of one attention, above 256 x 256). Where the optimised text
cannot be read by this jaxlib, the text before optimisation is looked at instead.

With --check every program is compared with what is recorded of it (RECORDED, below: the one home of these figures), no
larger batch is looked for, and the exit status is 1, too, if any of its bytes are more, or nothing is recorded.

What this does not show: speed. It was compiled, not run.

Compiled 2026-11-21 and 22 with jax 0.10.2 and libtpu 0.0.52, each on one of two busy CPU cores of different machines, a
batch at a time; the guided step is 1,607.9 GFLOP, the kernel of attention counts what it pads. No collective, no
full score matrix in any of them.

The figures that follow are those of 2026-11-22, when the programs had other names (paint is now sample, develop decode;
begin is initial_latents; time_rows is part of condition) and other arguments; what was compiled since is in RECORDED.

v5e:2x2, 16,911,433,728 bytes for programs:

      program  at once  compile s  arguments, bytes  temporaries, bytes  GFLOP per picture
    condition        1        5.6       284,521,472                   0               32.6
    time_rows        1        1.1        55,789,056                   0                3.6
        begin        1        1.0           296,960             180,224                0.0
        paint        1      539.0     1,645,606,400         230,211,584            1,775.4
      develop        1      201.4        99,120,640         413,941,760            2,618.2
    condition        8      118.1       284,528,640                   0               32.7
    time_rows        8       25.6        55,861,248                   0                3.6
        begin        8       13.1         2,361,856                   0                0.0
        paint        8     1529.0     1,752,622,080       1,091,403,776            1,540.2
      develop        8     1490.4       100,038,144         414,023,680            2,618.4
        paint      104     2005.6     2,906,476,544      11,306,090,496            1,540.2
        paint      120      860.6     2,945,142,784      12,317,245,440            1,540.2
        paint      128      651.6     2,964,148,224      13,216,006,144            1,540.3
        paint      136   does not fit: 16.30G of temporaries alone, 15.75G there

v5e:16x16, on each of 256 chips: with 1 at once the same bytes but for 212,992 of temporaries in `begin`; `paint` in
1,803.1 s, `develop` in 194.5 s.

v6e:2x2, 33,543,694,581 bytes for programs:

      program  at once  compile s  arguments, bytes  temporaries, bytes  GFLOP per picture
    condition        1        7.4       284,521,472                   0                  -
    time_rows        1        0.9        55,789,056                   0                  -
        begin        1        0.8           296,960             212,992                  -
        paint        1     2675.8     1,645,606,400         222,576,640            1,774.9
      develop        1      513.9        99,120,640         823,705,600            2,618.4
    condition        8        8.7       284,528,640           7,323,648               32.9
    time_rows        8        1.1        55,861,248                   0                3.6
        begin        8        0.4         2,361,856                   0                0.0
        paint        8     1998.4     1,752,622,080       1,020,821,504            1,455.5
      develop        8      170.8       100,038,144         823,951,360            2,618.4
        paint      264     2356.2     5,332,966,912      26,545,864,704            1,540.8
        paint      272     1732.0     5,353,938,432      27,273,805,824            1,540.8
        paint      280   does not fit: 361 kB too much

So the largest batches are 128 pictures at once on a chip of v5e, 2x2 or 16x16, and 272 on one of v6e. They were
compiled by hand, with --batch, from where the line through 1 and 8 pointed. Without the kernel of attention `paint` of
one picture on v5e took 1,060.9 s and 664,289,280 bytes of temporaries, and counted 1,603.5 GFLOP.
"""

import argparse
import math
import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from gpu_compile import score_matrices
from jax.experimental import topologies

from sdjax.config import SD15
from sdjax.devices.compilation import Ahead
from sdjax.devices.placement import Placement
from sdjax.models.params import abstract_params
from sdjax.models.unet import UNet
from sdjax.pipeline.warmup import programs_for
from sdjax.request import Request

COLLECTIVES = r"all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
SMALL_SCORES = 256 * 256
"""Of 16x16 positions a score matrix has the shape of the heads' own values, which the kernel takes 256 wide."""

RECORDED = """
topology  at once  program            arguments     results  temporaries        code  compiled
v5e:2x2         1  condition        340,696,576  17,046,528            0  25,295,872  2026-11-27
v5e:2x2         1  initial_latents      296,960   1,049,088      212,992   1,386,496  2026-11-27
v5e:2x2         1  admit             36,215,296  18,107,904            0   2,082,304  2026-11-27
v5e:2x2         1  decode            99,120,640           -  413,925,376           -  2026-11-27
v5e:2x2         1  sample         1,686,762,496           -  258,818,048           -  2026-11-27
"""
"""Bytes on each chip by jax 0.10.2 and libtpu 0.0.52; -: not recorded. Arguments and temporaries at commit c87bdd3,
results and code some commits later. `sample` took 2,168 s to compile on a third of a busy core, `decode` 227 s.
Whoever makes a program smaller records that.
"""

BYTES = ("arguments", "results", "temporaries", "code")
TOPOLOGIES = ("v5e:2x2", "v5e:16x16", "v6e:2x2")
NAMES = ("condition", "initial_latents", "sample", "admit", "decode")


def flops(jaxpr: Any) -> int:
    """Two for each multiplication and addition of all products and convolutions; of branches the largest."""
    total = 0
    for equation in jaxpr.eqns:
        inside = [flops(part) for part in jax.core.jaxprs_in_params(equation.params)]
        match equation.primitive.name:
            case "dot_general":
                ((contracted, _), _), left = equation.params["dimension_numbers"], equation.invars[0].aval
                total += 2 * equation.outvars[0].aval.size * math.prod(left.shape[axis] for axis in contracted)
            case "conv_general_dilated":
                kernel, numbers = equation.invars[1].aval, equation.params["dimension_numbers"]
                total += 2 * equation.outvars[0].aval.size * kernel.size // kernel.shape[numbers.rhs_spec[0]]
            case "scan":
                total += equation.params["length"] * sum(inside)
            case "cond":
                total += max(inside)
            case _:
                total += sum(inside)
    return total


def guided_step() -> int:
    """FLOPs of two rows of the UNet, one guided step of a picture."""
    side = SD15.image_size // SD15.vae.downscale
    params = {"params": abstract_params(SD15)["unet"]}
    x = jax.ShapeDtypeStruct((2, side, side, SD15.unet.in_channels), jnp.float32)
    context = jax.ShapeDtypeStruct((2, SD15.clip.length, SD15.unet.context_width), jnp.float32)
    return flops(
        jax.make_jaxpr(UNet(SD15.unet).apply)(params, x, jax.ShapeDtypeStruct((2,), jnp.float32), context).jaxpr
    )


def try_to_compile(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled | None, str]:
    """The compiled program; or None where the compiler refuses it for want of memory, and what it says."""
    try:
        return lowered.compile(), ""
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None, " ".join(str(error).split())


def memory_of(device: Any) -> int:
    """Bytes of a described chip's memory that programs may use: what the compiler says when it refuses too large a one.

    Raises:
        RuntimeError: it said something else.
    """
    huge = jax.ShapeDtypeStruct((2**36,), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(device))
    _, reason = try_to_compile(jax.jit(lambda x: x + 1).lower(huge))
    found = re.search(r"available HBM \(([\d.]+)([GM])\)", reason)
    if found is None:
        raise RuntimeError(f"the compiler does not say how much memory there is: {reason[:300]!r}")
    return int(float(found[1]) * 2 ** {"G": 30, "M": 20}[found[2]])


class Measured(NamedTuple):
    """What the compiler says of a program: bytes on each chip, and what is wrong with it."""

    arguments: int
    results: int
    temporaries: int
    code: int
    faults: list[str]


def recorded() -> dict[tuple[str, int, str], dict[str, int]]:
    """What RECORDED holds: bytes by kind, for each topology, pictures at once and program."""
    found = {}
    for line in RECORDED.strip().splitlines()[1:]:
        topology, batch, name, *sizes = line.split()[: 3 + len(BYTES)]
        known = {kind: int(size.replace(",", "")) for kind, size in zip(BYTES, sizes, strict=True) if size != "-"}
        found[topology, int(batch), name] = known
    return found


def grown(topology: str, batch: int, name: str, now: Measured) -> list[str]:
    """In words, what a program needs more of than is recorded of it."""
    known = recorded().get((topology, batch, name))
    if known is None:
        return [f"{name}: nothing is recorded of it"]
    more = [(kind, getattr(now, kind), size) for kind, size in known.items() if getattr(now, kind) > size]
    return [f"{name}: {now:,} bytes of {kind}, {size:,} recorded" for kind, now, size in more]


def to_hlo(found: re.Match[str]) -> str:
    """An array type as XLA writes it: tensor<2x77xf32> as f32[2,77]."""
    return f"{found[2]}[{found[1].replace('x', ',')}]"


def measured(name: str, lower: Ahead, pictures: int) -> Measured | None:
    """Compiles a program and prints its line; None if it does not fit. pictures: that the compiler counts FLOPs of."""
    lowered = lower()
    start = time.perf_counter()
    program, refusal = try_to_compile(lowered)
    if program is None:
        print(f"{name:>15}  does not fit: {refusal[:200]}", flush=True)
        return None
    seconds, memory = time.perf_counter() - start, program.memory_analysis()
    counted = program.cost_analysis()["flops"] / pictures / 1e9
    sizes = (
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.generated_code_size_in_bytes,
    )
    columns = "  ".join(f"{size:14,}" for size in sizes)
    print(f"{name:>15}  {seconds:9.1f}  {columns}  {counted:17,.1f}", flush=True)
    try:
        hlo = program.as_text()
    except jax.errors.JaxRuntimeError as error:  # a libtpu that is newer than jaxlib
        print(f"           its text cannot be read, so looked at before optimisation: {str(error)[:90]}", flush=True)
        hlo = re.sub(r"tensor<([\dx]+)x(\w+)>", to_hlo, lowered.as_text().replace("_", "-"))
    matrices = score_matrices(hlo, pictures, SMALL_SCORES)
    faults = [f"score matrix {array}" for array in matrices] + sorted(set(re.findall(COLLECTIVES, hlo)))
    return Measured(*sizes, [f"{name}: {one}" for one in faults])


def next_batch(loops: dict[int, Measured], memory: int) -> int:
    """The most pictures at once whose loop fits by a straight line through the two largest batches, a multiple of 8."""
    (first, a), (last, b) = sorted(loops.items())[-2:]
    need = [one.arguments + one.temporaries for one in (a, b)]
    each = (need[1] - need[0]) / (last - first)
    return int(last + (memory - need[1]) / each) // 8 * 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", nargs="+", default=TOPOLOGIES, help=f"chips ({' '.join(TOPOLOGIES)})")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="pictures at once on each chip (1 8)")
    parser.add_argument("--program", nargs="+", choices=NAMES, default=NAMES, help="of these alone")
    parser.add_argument("--check", action="store_true", help="compare the bytes with those recorded in this file")
    options = parser.parse_args()
    print(f"jax {jax.__version__}, {SD15.name}; a guided step is {guided_step() / 1e9:,.1f} GFLOP")
    bad: list[str] = []

    def measure(topology: str, devices: tuple[Any, ...], batch: int, names: Sequence[str]) -> dict[str, Measured]:
        print(f"{topology}, {len(devices)} x {devices[0].device_kind}, {batch} at once on each (not present)")
        columns = "  ".join(f"{kind:>14}" for kind in BYTES)
        print(f"{'program':>15}  compile s  {columns}  GFLOP per picture", flush=True)
        programs = programs_for(Request(""), SD15, batch, dtype="bfloat16", placement=Placement(devices))
        found = {name: measured(name, programs[name], 1 if name == "decode" else batch) for name in names}
        for name, one in found.items():
            faults = one.faults if one is not None else [f"{name}: does not fit"] if options.check else []
            if one is not None and options.check:
                faults = faults + grown(topology, batch, name, one)
            bad.extend(f"{topology}, {batch} at once: {fault}" for fault in faults)
        return {name: one for name, one in found.items() if one is not None}

    for topology in options.topology:
        devices = tuple(topologies.get_topology_desc(topology, platform="tpu").devices)
        memory = memory_of(devices[0])
        print(f"{topology}: {memory:,} bytes of memory for programs on each chip")
        found = {batch: measure(topology, devices, batch, options.program) for batch in options.batch}
        loops = {batch: programs["sample"] for batch, programs in found.items() if "sample" in programs}
        if len(loops) > 1 and not options.check:
            refused = math.inf
            while (batch := min(next_batch(loops, memory), refused - 8)) > max(loops):
                fits = measure(topology, devices, batch, ["sample"])
                if fits:
                    loops[batch] = fits["sample"]
                else:
                    refused = batch
            print(f"{topology}: {max(loops)} pictures at once on each chip fit", flush=True)
    smaller = ", no program larger than recorded" if options.check else ""
    print("\n".join(bad) or f"no collective, no full score matrix{smaller}")
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
