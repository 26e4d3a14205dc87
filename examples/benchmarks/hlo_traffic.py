"""What one step of a compiled loop reads and writes in a GPU's memory, fusion by fusion, and how much of it is surplus.

    python examples/benchmarks/hlo_traffic.py PROGRAM.txt [--rows 40]

PROGRAM.txt is the text of an optimised program (`compiled.as_text()`); `gpu_compile.py` does it for the sampler's.

XLA's own count (`cost_analysis()`) is not to be had for a device that is only described, so it is worked out from the
optimised program's text. An instruction's traffic is what it reads of its operands and what it writes. It *needs* to
read every element that it looks at once, and to write its results once, in the network's 16 bits. The rest is surplus:

- `again`: the same elements read through several paths of one fusion, as a sum and then as the values themselves. Paths
  that differ in nothing but arithmetic are one reading: x * sigmoid(x) reads x once. Neighbours that share a value
  (a bias) read it once, and Triton's kernels (kind kCustom) keep their tile, so that they read every operand once.
- `moved`: all traffic of an instruction that computes nothing: copies, transposes, slices, concatenations, broadcasts.
  In a fusion that computes as well, results that are only moved operands are its surplus (a concatenation stored beside
  the sum over it).
- `float32`: the upper half of every float32 array in a program of 16 bits, wherever it is written or read.
- `splits`: partial sums of a matrix product that was split along what it sums over, beyond one result in 16 bits.
- `norm`: the third and every later reading of an array by one normalisation; one for the sums and one for the values
  are enough.

Arrays of up to SMALL bytes stay on the chip and are no surplus; nor is float32 with the shape of a float32 argument of
the program (the sampler's latents). A surplus cannot always be avoided: cuDNN's convolutions and attention take whole,
contiguous arrays, so what prepares them has to be stored by someone.

What cannot be seen this way: what the caches save (operands of products and convolutions count once, though their
tiles are read many times, and an array that fits in the second-level cache may never reach the memory), how well
accesses are coalesced, workspace, and what the device's autotuner would choose instead: splits above all.
"""

import argparse
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

SMALL = 233_472
"""Bytes of shared memory of one multiprocessor of an H200."""

WIDTHS = {"pred": 1, "bf16": 2, "c64": 8, "c128": 16}
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota", "partition-id"}
MOVES = FREE | {"copy", "transpose", "reshape", "broadcast", "slice", "dynamic-slice", "concatenate", "pad", "reverse"}
KINDS = ("again", "moved", "float32", "splits", "norm")


class Instruction(NamedTuple):
    """One line of a computation. arrays: the element type and shape of each result."""

    name: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    op: str
    operands: tuple[str, ...]
    rest: str
    root: bool = False

    @property
    def size(self) -> int:
        """Elements of its results."""
        return sum(math.prod(shape) for _, shape in self.arrays)

    @property
    def bytes(self) -> int:
        return sum(width(dtype) * math.prod(shape) for dtype, shape in self.arrays)

    def attribute(self, name: str) -> str:
        """The computation that an attribute names, or ""."""
        found = re.search(rf"\b{name}=%([\w.-]+)", self.rest)
        return found[1] if found else ""

    @property
    def source(self) -> str:
        """Where in our own code it comes from: the path of modules, without what drives the loop."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        path = found[1].split(";")[0] if found else ""
        return re.sub(r"^.*(closed_call|UNet\.predict|branch_\d+_fun)(/|$)", "", path)


Computation = dict[str, Instruction]
Readers = dict[tuple[str, str], int]
"""How many instructions of a normalisation have read an array so far, by the array's and the normalisation's name."""


class Use(NamedTuple):
    """What an instruction does with memory, in bytes. surplus: by kind, as in KINDS."""

    instruction: Instruction
    read: int
    written: int
    needed: int
    surplus: dict[str, int]


def width(dtype: str) -> int:
    """Bytes of an element."""
    return WIDTHS.get(dtype) or max(1, int(re.sub(r"\D.*", "", dtype.lstrip("fsu")) or 0) // 8)


def parsed(hlo: str) -> tuple[dict[str, Computation], str]:
    """The computations of an optimised program by name, and the name of the first one to run."""
    found: dict[str, Computation] = {}
    entry, inside = "", None
    line_of = re.compile(r"\s+(ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
    for line in hlo.splitlines():
        if opened := re.match(r"(ENTRY )?%([\w.-]+) \(.*\{$", line):
            inside = found[opened[2]] = {}
            entry = opened[2] if opened[1] else entry
        elif line.startswith("}"):
            inside = None
        elif inside is not None and (one := line_of.match(re.sub(r"/\*index=\d+\*/", "", line))):
            root, name, types, op, rest = one.groups()
            arrays = tuple(
                (dtype, tuple(int(n) for n in dims.split(",") if n))
                for dtype, dims in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", types)
            )
            operands, _, rest = rest.partition(")")
            names = re.findall(r"%([\w.-]+)", operands)
            inside[name] = Instruction(name, arrays, op, tuple(names), operands + ")" + rest, bool(root))
    return found, entry


def step(program: dict[str, Computation], entry: str) -> Iterator[tuple[Computation, Instruction]]:
    """Every instruction of one round of the program's loop that touches memory, with the computation that it is in.

    Of branches the one with most convolutions is followed, or the smallest where none has any; inner loops count once.
    """

    def weight(name: str) -> tuple[int, int]:
        everything = list(walk(name))
        convolutions = sum("dim_labels=" in one.rest for _, one in everything)
        traffic = sum(one.bytes for _, one in everything)
        return (convolutions, traffic if convolutions else -traffic)

    def walk(name: str) -> Iterator[tuple[Computation, Instruction]]:
        for one in program[name].values():
            if one.op == "while":
                yield from walk(one.attribute("body"))
            elif one.op == "conditional":
                branches = [one.attribute(f"{way}_computation") for way in ("true", "false")]
                if listed := re.search(r"branch_computations=\{(.*?)\}", one.rest):
                    branches = re.findall(r"%([\w.-]+)", listed[1])
                yield from walk(max(branches, key=weight))
            elif one.op == "call":
                yield from walk(one.attribute("to_apply"))
            elif one.op not in FREE:
                yield program[name], one

    loops = [one for one in program[entry].values() if one.op == "while"]
    return walk(loops[0].attribute("body") if loops else entry)


def results(fused: Computation) -> Sequence[str]:
    """The names of what a fusion stores."""
    (root,) = [one for one in fused.values() if one.root]
    return root.operands if root.op == "tuple" else [root.name]


def readings(fused: Computation, tiled: bool) -> dict[int, tuple[float, float]]:
    """How often a fusion reads each of its operands, and how often it needs to (once, or the share that it looks at).

    Walked from the results backwards. A path is what lies between a result and an instruction besides arithmetic: the
    broadcasts, transposes and slices. A sum over something that is broadcast again is one more pass.
    tiled: whatever is read stays in the kernel's registers.
    """
    paths: dict[str, dict[tuple[str, ...], float]] = defaultdict(dict)
    for name in results(fused):
        paths[name][()] = 1.0
    found: dict[int, tuple[float, float]] = {}
    for one in reversed(fused.values()):
        if one.op == "parameter":
            shares: dict[tuple[str, ...], float] = {}
            for path, share in paths[one.name].items():
                looked_at = tuple(part for part in path if part.startswith("slice"))
                shares[looked_at] = max(share, shares.get(looked_at, 0))
            needed = min(1.0, sum(shares.values()))
            number = int(one.rest.split(")")[0])
            found[number] = (needed if tiled else sum(paths[one.name].values()), needed)
            continue
        for place, operand in enumerate(one.operands):
            if operand not in fused:
                continue
            for path, share in paths[one.name].items():
                inside, part = path, share
                if one.op in ("slice", "dynamic-slice", "gather") and place == 0:
                    inside = (*path, "slice " + one.rest.split(", metadata")[0].partition(")")[2])
                    part = share * one.size / max(1, fused[operand].size)
                elif one.op in ("broadcast", "transpose"):
                    inside = (*path, one.name)
                paths[operand][inside] = max(part, paths[operand].get(inside, 0.0))
    return found


def moved_results(fused: Computation) -> list[bool]:
    """Of each result of a fusion, whether it is only moved operands: nothing between was computed."""
    moved: dict[str, bool] = {}
    for one in fused.values():
        from_operands = all(moved.get(operand, True) for operand in one.operands)
        moved[one.name] = from_operands and one.op in MOVES - {"constant", "iota", "tuple"}
    return [moved[name] for name in results(fused)]


def norms_of(fused: Computation) -> set[str]:
    """The normalisations, as paths of modules, that a fusion computes a part of."""
    return {found[1] for one in fused.values() if (found := re.search(r'op_name="([^"]*/norm\w*)[./]', one.rest))}


def use(
    program: dict[str, Computation],
    around: Computation,
    one: Instruction,
    own: set[tuple[int, ...]],
    readers: Readers,
) -> Use:
    """What one instruction of `around` reads, writes and needs. own: shapes that are float32 on purpose.

    readers: of the instructions before it; this one is added.
    """
    fused = program.get(one.attribute("calls"), {}) if one.op == "fusion" else {}
    often = readings(fused, "kind=kCustom" in one.rest) if fused else {}
    if one.op in ("dynamic-slice", "slice", "gather"):
        share = min(1.0, one.size / max(1, around[one.operands[0]].size))
        often = {0: (share, share)}
    surplus = dict.fromkeys(KINDS, 0)
    read, written, norms = 0, 0, norms_of(fused)
    moved = moved_results(fused) if fused else [one.op in MOVES] * len(one.arrays)

    def add(dtype: str, shape: tuple[int, ...], times: float, needs: float, by: Instruction, moves: bool) -> int:
        size = math.prod(shape)
        total, least = round(times * size * width(dtype)), round(needs * size * width(dtype))
        if size * width(dtype) <= SMALL:
            return least
        surplus["again"] += total - least
        if moves:
            surplus["moved"] += least
        elif dtype == "f32" and is_split(by, shape):
            surplus["splits"] += least - least // (2 * shape[0])
        elif dtype == "f32" and shape not in own:
            surplus["float32"] += least // 2
        return total

    for place, operand in enumerate(one.operands):
        producer, later = producer_of(around, operand), False
        for norm in norms:
            array = stored(around, operand)
            readers[array, norm] = 1 + readers.get((array, norm), 0)
            later |= readers[array, norm] > 2
        for dtype, shape in around[operand].arrays[:1]:
            before = sum(surplus.values())
            read += add(dtype, shape, *often.get(place, (1.0, 1.0)), producer, all(moved))
            if later and math.prod(shape) * width(dtype) > SMALL:
                needs = often.get(place, (1.0, 1.0))[1]
                surplus["norm"] += round(needs * math.prod(shape) * width(dtype)) - (sum(surplus.values()) - before)
    for (dtype, shape), moves in zip(one.arrays, moved or [False], strict=False):
        written += add(dtype, shape, 1.0, 1.0, one, moves)
    return Use(one, read, written, read + written - sum(surplus.values()), surplus)


def producer_of(around: Computation, name: str) -> Instruction:
    """The instruction of the same computation that computes an operand."""
    one = around[stored(around, name)]
    return around[stored(around, one.operands[0])] if one.op == "get-tuple-element" else one


def stored(around: Computation, name: str) -> str:
    """The name of the array that an operand is, under whatever shape it is seen."""
    while around[name].op == "bitcast":
        (name,) = around[name].operands
    return name


def is_split(product: Instruction, shape: tuple[int, ...]) -> bool:
    """Whether it is a matrix product whose first axis is parts of one sum: XLA then gives float32, to be added up."""
    split = product.op == "fusion" and product.name.startswith("gemm_fusion") and product.arrays[0][0] == "f32"
    return split and len(shape) > 2 and "bnlm" not in product.rest


def uses(hlo: str) -> list[Use]:
    """What every instruction of one step does with memory, those with the largest surplus first."""
    program, entry = parsed(hlo)
    own = {shape for one in program[entry].values() if one.op == "parameter" for t, shape in one.arrays if t == "f32"}
    readers: Readers = {}
    found = [use(program, around, one, own, readers) for around, one in step(program, entry)]
    return sorted(found, key=lambda each: -sum(each.surplus.values()))


def table(found: Iterable[Use], most: int | None = None) -> list[str]:
    """Lines to print: fusions with a surplus, alike ones together, and the totals below. Bytes in millions."""
    found = list(found)
    groups: dict[tuple[str, str, str], list[Use]] = defaultdict(list)
    for each in found:
        kinds = "+".join(kind for kind in KINDS if each.surplus[kind])
        name = re.sub(r"[.\d]+$", "", each.instruction.name)
        if kinds:
            groups[kinds, name, re.sub(r"\d+", "*", each.instruction.source)].append(each)

    def million(one: Iterable[int]) -> str:
        return f"{sum(one) / 1e6:9.1f}"

    lines = ["  surplus       read    written     needs  ratio  times  kind, fusion, source"]
    ranked = sorted(groups.items(), key=lambda group: -sum(sum(each.surplus.values()) for each in group[1]))
    for (kinds, name, source), group in ranked[:most]:
        surplus = [sum(each.surplus.values()) for each in group]
        moved, needs = sum(each.read + each.written for each in group), sum(each.needed for each in group)
        ratio = f"{moved / needs:5.2f}" if needs > moved / 100 else "    -"
        columns = (surplus, [each.read for each in group], [each.written for each in group], [needs])
        lines.append(f"{'  '.join(map(million, columns))}  {ratio}  {len(group):5}  {kinds}, {name}, {source}")
    if most is not None and len(ranked) > most:
        lines.append(f"... and {len(ranked) - most} more rows")
    read, written = sum(each.read for each in found), sum(each.written for each in found)
    by_kind = {kind: sum(each.surplus[kind] for each in found) for kind in KINDS}
    lines.append(
        f"a step: {len(found)} kernels, {read / 1e6:,.1f} MB read, {written / 1e6:,.1f} MB written, of which surplus "
        f"{sum(by_kind.values()) / 1e6:,.1f} MB: " + ", ".join(f"{kind} {n / 1e6:,.1f}" for kind, n in by_kind.items())
    )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=Path, help="the text of an optimised program")
    parser.add_argument("--rows", type=int, default=40, help="fusions to name; -1: all")
    options = parser.parse_args()
    most = None if options.rows < 0 else options.rows
    print("\n".join(table(uses(options.program.read_text()), most)))


if __name__ == "__main__":
    main()
