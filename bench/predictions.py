"""How long SiVA's kernels should take on cards that nobody here has had, written down before one is seen.

`python -m bench.predictions` compiles each tile of the forward for an A100, an H100 and an RTX 4090, counts what a step
of its loop executes, and writes `bench/data/predictions.csv`: for 24 shapes the microseconds of each way, and what
bounds it. With `--against` it compares them with what `bench.tune` measured on this card, or with a file of its times.

A step of the loop takes the longest of: its multiply-adds on the tensor cores, its reads of shared memory, its loads
through the second-level cache (all of `fastpeft.kernels.tiles`, by data sheets), and its instructions, of which a
multiprocessor issues four a clock. Programs run in waves of as many as registers and shared memory let run at once. No
way is faster than its bytes through memory. ATen's way is two products and an addition in place, each by the same
model with the tiles of a bare product.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from scipy.stats import spearmanr

from bench import static
from bench.harness import DATA, Row, option_parser, read_rows, write_rows
from fastpeft.kernels import tiles
from fastpeft.ops.autotune import TUNED
from fastpeft.ops.dispatch import architecture
from fastpeft.support.files import read_json

FILE = DATA / "predictions.csv"
CARDS = ("sm_80", "sm_90", "sm_89")  # A100, H100, RTX 4090
LAYERS = ((768, 768), (1024, 4096), (4096, 1024), (4096, 4096))  # in_features, out_features
ROWS = (64, 256, 512, 2048, 8192, 16384)
RANK = 16
_BYTES = 2  # of an element
_REGISTERS = 65536  # of a multiprocessor, on all three
_SHARED = {"sm_80": 164, "sm_90": 228, "sm_89": 100}  # KiB of a multiprocessor: CUDA's programming guide
_ISSUED = 4  # instructions a clock
_LABEL, _BRANCH = re.compile(r"^\.(L_x_\d+):"), re.compile(r"BRA\S* `\(\.(L_x_\d+)\)")
_INSTRUCTION, _MATRIX = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s"), re.compile(r"\bH?G?MMA\.")


class Loop(NamedTuple):
    """What was compiled: instructions of a step of the main loop, for one warp, and what a program takes."""

    instructions: int
    registers: int
    shared: int


class Time(NamedTuple):
    """Seconds, and what bounds them."""

    seconds: float
    bound: str


def loop_instructions(code: str) -> int:
    """Instructions in the main loop: the loop that has the largest share of matrix instructions.

    Others hold it, or begin in it and end where the code waits for a load.
    """
    lines, labels, loops = code.splitlines(), {}, []
    for number, line in enumerate(lines):
        if found := _LABEL.match(line):
            labels[found[1]] = number
        elif (found := _BRANCH.search(line)) and found[1] in labels:
            loops.append([each for each in lines[labels[found[1]] : number + 1] if _INSTRUCTION.match(each)])
    return len(max(loops, key=lambda loop: sum(bool(_MATRIX.search(each)) for each in loop) / len(loop)))


@cache
def compiled(arch: str, tile: tiles.Tile, project: bool, is_split_k: bool) -> Loop:
    """The forward of one layer by this tile."""
    wanted = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
    wanted |= {"BLOCK_R": tiles.rank_block(RANK)} if project else {}
    wanted |= {} if is_split_k else {"PROJECT": project, "TMA": tile.tma}
    kernel = "siva_linear_split_k_ranges" if is_split_k else "siva_linear_fwd"
    for variant in static.siva_linear_variants(arch):
        if variant.kernel == kernel and wanted.items() <= variant.constants.items():
            made = static.compile_variant(variant)
            registers, _stack, code = static._read_cubin(made.asm)
            return Loop(loop_instructions(code), registers, made.metadata.shared)
    raise LookupError(f"{wanted} is not compiled for {arch}")


def by_kernel(arch: str, m: int, k: int, n: int, choice: tiles.Choice) -> Time:
    """The forward, with p computed inside or read; ranges of K are added up by one launch more."""
    tile, project, ranges = choice
    sheet, loop = tiles.SHEETS[arch], compiled(arch, tile, project, ranges > 1)
    block_r = tiles.rank_block(RANK) if project else 0
    of_model = tiles.siva_linear_clocks(tile, block_r, arch)
    clocks = {
        "tensor cores": of_model.multiplying * tile.block_k,
        "shared memory": of_model.shared * tile.block_k,
        "cache": of_model.cached * tile.block_k,
        "instructions": loop.instructions * tile.num_warps / _ISSUED,
    }
    bound = max(clocks, key=lambda name: clocks[name])
    programs = math.ceil(m / tile.block_m) * math.ceil(n / tile.block_n) * ranges
    together = min(_REGISTERS // (loop.registers * 32 * tile.num_warps), _SHARED[arch] * 1024 // max(loop.shared, 1))
    together = max(1, min(together, math.ceil(programs / sheet.multiprocessors)))
    waves = math.ceil(programs / (sheet.multiprocessors * together))
    seconds = waves * together * math.ceil(k / tile.block_k / ranges) * clocks[bound] / (sheet.megahertz * 1e6)
    time = _bounded(arch, seconds, bound, m * k + k * n + m * n)
    join = tiles.LAUNCH + 8 * ranges * m * (n + RANK) / (sheet.memory * 1e9) if ranges > 1 else 0
    return time._replace(seconds=time.seconds + join)


def by_product(arch: str, m: int, k: int, n: int, added: bool = False) -> Time:
    """A bare product, by the best of the tiles that read their operands alone; `added` reads its target too."""
    sheet = tiles.SHEETS[arch]

    def seconds(tile: tiles.Tile) -> float:
        clocks = max(tiles.siva_linear_clocks(tile, 0, arch)[:3])
        programs = math.ceil(m / tile.block_m) * math.ceil(n / tile.block_n)
        return math.ceil(programs / sheet.multiprocessors) * k * clocks / (sheet.megahertz * 1e6)

    best = min(map(seconds, tiles.siva_linear_tiles(arch)))
    return _bounded(arch, best, "product", m * k + k * n + m * n * (2 if added else 1))


def _bounded(arch: str, seconds: float, bound: str, elements: int) -> Time:
    memory = _BYTES * elements / (tiles.SHEETS[arch].memory * 1e9)
    return Time(seconds, bound) if seconds > memory else Time(memory, "memory")


def ways(arch: str, m: int, k: int, n: int) -> Iterator[tuple[str, Time]]:
    """Each way with its time: of the kernels by the tile that is the fastest."""
    p = by_product(arch, m, k, RANK)
    choices = list(tiles.siva_linear_choices(k, RANK, arch))
    for way in tiles.WAYS:
        times = [by_kernel(arch, m, k, n, each) for each in choices if each.way == way]
        if times:
            seconds, bound = min(times)
            yield way, Time(seconds + (p.seconds + tiles.LAUNCH if way in ("split", "split tma") else 0), bound)
    parts = p, by_product(arch, m, k, n), by_product(arch, m, RANK, n, added=True)
    yield "aten", Time(sum(part.seconds for part in parts) + 2 * tiles.LAUNCH, parts[1].bound)


def rows() -> Iterator[Row]:
    for arch in CARDS:
        for (k, n), m in ((layer, rows) for layer in LAYERS for rows in ROWS):
            for way, (seconds, bound) in ways(arch, m, k, n):
                shape = {"arch": arch, "rows": str(m), "in_features": str(k), "out_features": str(n), "rank": str(RANK)}
                yield {**shape, "way": way, "microseconds": f"{1e6 * seconds:.2f}", "bound": bound}


def against(file: Path) -> Iterator[tuple[str, float, int]]:
    """Of each kind of question that was measured, the rank correlation of the times and how many there are.

    `file` is what `bench.tune` wrote: milliseconds of each way, by question. "all" is over shapes and ways, "ways" the
    mean over shapes of that among the ways of one: whether the right one would have been picked.
    """
    measured: dict[str, dict[str, float]] = read_json(file)
    pairs: dict[str, list[tuple[float, float]]] = {}
    for row in read_rows(FILE):
        shape = f"{row['out_features']}x{row['in_features']} rank {row['rank']} rows {row['rows']}"
        times = measured.get(f"siva_linear bfloat16 {shape} on {row['arch']}", {})
        if row["way"] in times:
            pairs.setdefault(shape, []).append((float(row["microseconds"]), times[row["way"]]))
    every = [pair for of_shape in pairs.values() for pair in of_shape]
    if len(every) < 3:
        return
    yield "all", _correlation(every), len(every)
    within = [_correlation(of_shape) for of_shape in pairs.values() if len(of_shape) > 2]
    if within:
        yield "ways", sum(within) / len(within), len(within)


def _correlation(pairs: Sequence[tuple[float, float]]) -> float:
    return float(spearmanr(*zip(*pairs, strict=True)).statistic)


def main() -> None:
    parser = option_parser(__doc__)
    parser.add_argument("--against", nargs="?", const="", help="times that bench.tune measured (default: on this card)")
    given = parser.parse_args()
    if given.against is None:
        write_rows(FILE, list(rows()))
        return
    file = Path(given.against or TUNED / f"{architecture(torch.device('cuda', 0))}.json")
    found = list(against(file))
    for what, correlation, count in found:
        print(f"rank correlation of predicted and measured times, {what}: {correlation:.2f} ({count})")
    if not found:
        print(f"{file} has no time of a shape in {FILE.name}")


if __name__ == "__main__":
    main()
