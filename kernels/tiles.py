"""Launch shapes of the kernels: tables for each architecture and a cost model that picks from them, no timing.

Every tile compiles for the architectures of `bench/static.py` that it is shipped to, without spilling; the registers,
shared memory and matrix instructions of each, and the Triton that made them, are in `bench/data/static.csv`.

The kinds of products: "half" is 16-bit operands and "tf32" float32 rounded to TF32, both on matrix units; "ieee" is
float32 outside them. SiVA's tiles are for the first; Triton's interpreter runs float32 by them too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator
from functools import cache, lru_cache
from typing import Literal, NamedTuple

import torch

from fastpeft.ops.dispatch import architecture, next_power_of_two


class Tile(NamedTuple):
    """One launch shape: elements a program computes (`block_m` x `block_n`), the step along K, warps and stages."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    max_rank: int = 64  # up to which p fits beside h, for one layer
    shared_rank: int = 64  # the same in the kernels of several layers or adapters, which hold more beside
    tma: bool = False  # whether x, W and V come by the tensor memory accelerator, for one layer at a time


class SumTile(NamedTuple):
    """A launch shape of sums over rows: rows a step, columns of dh or x a program, warps and stages."""

    block_m: int
    block_c: int
    num_warps: int
    num_stages: int


ANY = "any"  # architecture
DotKind = Literal["half", "tf32", "ieee"]  # how to multiply, as said above


class Gpu(NamedTuple):
    """What the choice of a tile depends on."""

    architecture: str  # as in bench/static.py, "sm_90" or "gfx942"
    multiprocessors: int


class Sheet(NamedTuple):
    """One GPU by its public data sheet."""

    multiprocessors: int
    megahertz: int  # at which it has these teraflops
    teraflops: float  # of 16-bit operands, dense, added up in float32
    memory: int  # gigabytes a second
    cached: int  # bytes a clock that all multiprocessors load through the second-level cache
    shared: int = 128  # bytes a clock that one reads from its shared memory: CUDA's programming guide, CDNA 3's paper


# NVIDIA has published the second-level cache's rate for the A100 alone; it stands for the later GPUs too. No sheet has
# the number of a B200's multiprocessors, which CUDA reports, nor its clock, which follows from the rate of each.
SHEETS = {
    "sm_80": Sheet(108, 1410, 312, 2039, 5120),  # A100 80 GB SXM: its data sheet and white paper
    "sm_89": Sheet(128, 2520, 165.2, 1008, 5120),  # RTX 4090: white paper of the Ada architecture
    "sm_90": Sheet(132, 1830, 989.4, 3350, 5120),  # H100 SXM: its data sheet and white paper
    "sm_100": Sheet(148, 1856, 2250, 8000, 5120),  # B200: data sheets of the DGX and HGX B200, an eighth
    "gfx942": Sheet(304, 2100, 1307.4, 5300, 8 * 2048),  # MI300X: its data sheet and the CDNA 3 white paper
}
_LIKE = {"sm_86": "sm_89", "sm_120": "sm_89"}  # others are taken for an A100
LAUNCH = 4e-6  # seconds that one more kernel takes: an estimate, which no sheet has
# rows of an instruction that reads its operands from shared memory; others read them from a warp's registers
_ROWS_AT_ONCE = {"sm_90": 64, "sm_100": 128}
_MULTIPROCESSORS_A_DIE = {"gfx942": 38}  # MI300X has 8 dies of these, MI300A 6

MAX_RANK = 64  # of SiVA's kernels; a wider tile of p spills beside the tile of h
# p inside, or by a product before; then how x and W are loaded, or that the sum over K is cut into ranges
WAYS = ("fused", "split", "fused tma", "split tma", "split-k")

_SMALL = Tile(32, 64, 64, 4, 3), Tile(64, 64, 64, 4, 3, max_rank=16, shared_rank=16)
_LARGE = Tile(128, 128, 64, 8, 3, shared_rank=16), Tile(128, 256, 64, 8, 4, max_rank=16, shared_rank=0)
_TMA = Tile(128, 128, 64, 8, 3, tma=True), Tile(128, 256, 64, 8, 4, max_rank=16, tma=True)
SIVA_LINEAR = {  # architecture -> tiles of the forward and of dx; ANY where an architecture has no line
    ANY: (*_SMALL, Tile(128, 128, 32, 8, 3, shared_rank=16)),
    "sm_90": (*_SMALL, *_TMA, *_LARGE),
    "gfx942": (  # 64 KiB of shared memory; a stage more than two is kept in registers, which a wave of 64 has
        Tile(32, 64, 64, 4, 2),
        Tile(64, 64, 64, 4, 2),
        Tile(128, 128, 64, 4, 2),
        Tile(256, 128, 64, 8, 2, max_rank=16, shared_rank=0),
    ),
    "sm_100": (_SMALL[0], _SMALL[1]._replace(shared_rank=0), *_TMA, *_LARGE),
}
# of its ranges of K; as much is loaded ahead as by three stages of 64, which spill here
SPLIT_K = Tile(32, 64, 128, 4, 2), Tile(64, 64, 128, 4, 2, max_rank=16)
RANK_STEP = 16  # columns of p a step where it is not computed inside; the least that a matrix instruction takes
GROUP_M = 8  # row blocks that share the tiles of W in cache

SIVA_LINEAR_SUMS = SumTile(32, 64, 4, 3)  # of the partial sums of dU and dV
SUM_BLOCK, SUM_WARPS = 256, 4  # elements of a program that adds partial sums
_MOST_SPLITS = 32
_MOST_RANGES = 16  # of K
_LEAST_RANGE = 256  # elements along K: two steps, of which the first finds no tile loaded


class Choice(NamedTuple):
    """How `siva_linear` is launched: whether programs compute p too, else a product before; and ranges of K."""

    tile: Tile
    project: bool
    ranges: int = 1

    @property
    def way(self) -> str:
        """Which of `WAYS` it is."""
        if self.ranges > 1:
            return "split-k"
        return ("fused" if self.project else "split") + (" tma" if self.tile.tma else "")


class Clocks(NamedTuple):
    """Clocks of a multiprocessor for one element along K: of its multiply-adds and of both memories beside it."""

    multiplying: float
    shared: float  # reads of shared memory
    cached: float  # loads through the second-level cache

    @property
    def together(self) -> float:
        """The longest, and a quarter of the others, which do not wholly overlap: an estimate."""
        return max(self) + (sum(self) - max(self)) / 4


def siva_linear_tiles(arch: str) -> tuple[Tile, ...]:
    """The tiles that `siva_linear` picks from."""
    return SIVA_LINEAR.get(arch) or SIVA_LINEAR[ANY]


def siva_linear_clocks(tile: Tile, block_r: int, arch: str) -> Clocks:
    """Of a program that computes block_r columns of p beside its tile of h; of a bare product with 0 columns."""
    sheet = _sheet(arch)
    rate = sheet.teraflops * 1e12 / 2 / sheet.multiprocessors / (sheet.megahertz * 1e6)
    reads = _reads(tile, tile.block_n, arch) + (_reads(tile, block_r, arch) if block_r else 0)
    return Clocks(
        multiplying=tile.block_m * (tile.block_n + block_r) / rate,
        shared=2 * reads / sheet.shared,
        cached=2 * (tile.block_m + tile.block_n + block_r) / (sheet.cached / sheet.multiprocessors),
    )


@lru_cache(maxsize=1024)
def siva_linear(
    rows: tuple[int, ...],
    k: int,
    columns: tuple[int, ...],
    rank: int,
    gpu: Gpu,
    ways: Collection[str] = WAYS,
    shared: bool = False,
) -> Choice:
    """How to make h from x `(M, k)`.

    Tiles do not reach across `rows`, which M is the sum of, nor across `columns`, which the width of h is the sum of.
    The time of a program is that of its `Clocks`; the programs run in waves of one a multiprocessor, and no faster than
    W comes from memory; p by a product of its own costs one more reading of x from memory and one more launch. By TMA
    the layers are launched one by one. Ranges of K have programs each; their sums are written and read again, in one
    more launch.

    Args:
        ways: which of `WAYS` to pick from; "fused" stands for "split-k" where there are no ranges.
        shared: in the kernels of several layers or adapters, which have none.
    """
    sheet = _sheet(gpu.architecture)

    def time(choice: Choice) -> float:
        tile, project, ranges = choice
        blocks_m = sum(math.ceil(m / tile.block_m) for m in rows)
        blocks_n = [math.ceil(n / tile.block_n) for n in columns]
        launches = blocks_n if tile.tma else [sum(blocks_n)]
        waves = sum(math.ceil(blocks_m * n * ranges / gpu.multiprocessors) for n in launches)
        clocks = siva_linear_clocks(tile, rank_block(rank) if project else 0, gpu.architecture).together
        weight = 2 * k * sum(columns) / (sheet.memory * 1e9)
        seconds = max(waves * k / ranges * clocks / (sheet.megahertz * 1e6), weight) + (len(launches) - 1) * LAUNCH
        if not project:
            seconds += 2 * sum(rows) * k / (sheet.memory * 1e9) + LAUNCH
        if ranges > 1:
            seconds += 8 * ranges * sum(rows) * (sum(columns) + rank) / (sheet.memory * 1e9) + LAUNCH
        return seconds

    choices = list(siva_linear_choices(k, rank, gpu.architecture, shared))
    found = [each for each in choices if each.way in ways]
    return min(found or [each for each in choices if each.way == "fused"], key=time)


def siva_linear_choices(k: int, rank: int, arch: str, shared: bool = False) -> Iterator[Choice]:
    """What `siva_linear` picks from."""
    for tile in siva_linear_tiles(arch):
        yield Choice(tile, project=False)
        if rank <= (tile.shared_rank if shared and not tile.tma else tile.max_rank):
            yield Choice(tile, project=True)
    most = 1 if shared else min(_MOST_RANGES, k // _LEAST_RANGE)
    for tile, power in itertools.product(SPLIT_K, range(1, most.bit_length())):
        if rank <= tile.max_rank:
            yield Choice(tile, True, 1 << power)


def siva_linear_constants(tile: Tile, project: bool, rank: int, gpu: Gpu) -> dict[str, int]:
    """What the kernels of h and dx are compiled with, and those of mixed rows."""
    per_die = _MULTIPROCESSORS_A_DIE.get(gpu.architecture)
    return {
        "APART": project and gpu.architecture[:3] != "gfx" and not _is_from_shared(tile, gpu.architecture),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "BLOCK_R": rank_block(rank) if project else RANK_STEP,
        "GROUP_M": GROUP_M,
        "XCDS": gpu.multiprocessors // per_die if per_die else 1,
        "STAGES": tile.num_stages,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": True,
    }


def _sheet(arch: str) -> Sheet:
    return SHEETS.get(_LIKE.get(arch, arch)) or SHEETS["sm_80"]


def _is_from_shared(tile: Tile, arch: str) -> bool:
    """Whether its instructions read both operands from shared memory."""
    return tile.block_m >= 64 and arch in _ROWS_AT_ONCE


def _reads(tile: Tile, columns: int, arch: str) -> int:
    """Elements of shared memory that a program reads to multiply block_m rows by so many columns, for one along K.

    An instruction on shared memory reads all columns for its rows. Else a warp reads its rows and its columns, by that
    arrangement of the warps which reads the least.
    """
    m, warps = tile.block_m, tile.num_warps
    if _is_from_shared(tile, arch):
        return m + math.ceil(m / _ROWS_AT_ONCE[arch]) * columns
    return min(m * warps // along + columns * along for along in (1, 2, 4, 8) if along <= warps)


def siva_linear_bwd_rows(m: int, block_r: int) -> int:
    """Rows that one program of the partial sums adds up, a multiple of 64.

    Enough that the partial sums are few bytes beside the operands. It depends on no GPU, so neither does the order
    of the sum.
    """
    return 64 * math.ceil(max(256, 8 * block_r, m / _MOST_SPLITS) / 64)


def rank_block(rank: int) -> int:
    """Columns of the tile that holds a rank: a power of two, at least `RANK_STEP`."""
    return next_power_of_two(rank, RANK_STEP)


@cache
def gpu(device: torch.device) -> Gpu:
    """The GPU behind `device`; for a CPU, whose tensors Triton's interpreter runs on, some GPU."""
    if device.type != "cuda":
        return Gpu("interpreter", 108)
    return Gpu(architecture(device), torch.cuda.get_device_properties(device).multi_processor_count)


class WindowTile(NamedTuple):
    """A launch shape of window attention: queries and keys a program multiplies at a time, warps and stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def _same(*shape: int) -> tuple[WindowTile, WindowTile]:
    return WindowTile(*shape), WindowTile(*shape)


# A warp has 16 rows of a product. On sm_90 four warps multiply together, 64 rows, and a multiprocessor holds two
# programs of 64 queries; with dropout it holds one of 128, because words are drawn for each program. Elsewhere Triton
# gives each warp rows of its own only in tiles with no fewer queries than columns, hence 128 queries. The registers of
# the accumulator bound the rest, and 64 KiB of shared memory on gfx942. Outside matrix units a thread holds whole rows
# of both operands, which spill beyond 128 columns.
_WINDOW_SMALL = {64: _same(16, 16, 4, 1), 128: _same(16, 16, 8, 1)}
WINDOW_ATTENTION = {  # (architecture, kernel, dot kind) -> widest D -> tile without dropout, and with; ANY as above
    (ANY, "fwd", "half"): {
        64: (WindowTile(128, 64, 8, 2), WindowTile(128, 32, 8, 3)),
        128: _same(128, 32, 8, 2),
        256: (WindowTile(32, 16, 8, 1), WindowTile(32, 32, 8, 2)),
    },
    (ANY, "fwd", "tf32"): {64: _same(32, 16, 4, 1), 128: _same(128, 16, 8, 2), 256: _same(16, 16, 8, 1)},
    (ANY, "fwd", "ieee"): _WINDOW_SMALL,
    (ANY, "bwd_bases", "half"): {128: _same(64, 64, 4, 1), 256: _same(32, 64, 8, 1)},
    (ANY, "bwd_bases", "tf32"): {128: _same(32, 32, 4, 1), 256: _same(16, 64, 8, 1)},
    (ANY, "bwd_bases", "ieee"): {64: _same(16, 16, 8, 1), 128: _same(32, 16, 8, 1)},
    (ANY, "bwd_queries", "half"): {
        64: (WindowTile(128, 32, 8, 2), WindowTile(64, 32, 4, 2)),
        128: _same(128, 32, 8, 2),
        256: _same(32, 16, 8, 1),
    },
    (ANY, "bwd_queries", "tf32"): {64: _same(32, 32, 4, 2), 128: _same(32, 16, 4, 1), 256: _same(16, 16, 4, 1)},
    (ANY, "bwd_queries", "ieee"): {
        64: (WindowTile(16, 16, 4, 2), WindowTile(16, 16, 4, 1)),
        128: _same(16, 16, 8, 1),
    },
    (ANY, "bwd_keys", "half"): {
        64: (WindowTile(64, 64, 4, 2), WindowTile(64, 64, 4, 1)),
        128: _same(16, 128, 8, 2),
        256: (WindowTile(32, 32, 8, 2), WindowTile(16, 32, 8, 1)),
    },
    (ANY, "bwd_keys", "tf32"): {
        64: _same(32, 64, 4, 1),
        128: _same(16, 32, 4, 1),
        256: (WindowTile(16, 16, 4, 1), WindowTile(16, 16, 8, 1)),
    },
    (ANY, "bwd_keys", "ieee"): _WINDOW_SMALL,
    ("sm_90", "fwd", "half"): {
        128: (WindowTile(64, 64, 4, 2), WindowTile(128, 64, 8, 2)),
        256: (WindowTile(64, 16, 4, 2), WindowTile(32, 32, 8, 2)),
    },
    ("sm_90", "bwd_queries", "half"): {
        128: (WindowTile(64, 64, 4, 2), WindowTile(128, 64, 8, 2)),
        256: _same(32, 16, 8, 1),
    },
    ("sm_90", "bwd_keys", "half"): {
        64: (WindowTile(64, 64, 4, 2), WindowTile(64, 64, 4, 1)),
        128: (WindowTile(64, 64, 4, 2), WindowTile(32, 128, 8, 2)),
        256: _same(32, 32, 8, 1),
    },
    ("sm_100", "bwd_queries", "half"): {64: _same(64, 64, 4, 2), 128: _same(128, 64, 8, 2), 256: _same(32, 16, 8, 1)},
    ("sm_100", "bwd_keys", "half"): {
        64: _same(64, 64, 4, 2),
        128: _same(16, 128, 8, 2),
        256: (WindowTile(32, 32, 8, 2), WindowTile(16, 32, 8, 1)),
    },
    ("sm_120", "bwd_queries", "half"): {64: _same(64, 32, 4, 2), 128: _same(128, 32, 8, 1), 256: _same(32, 16, 8, 1)},
    ("gfx942", "fwd", "tf32"): {64: _same(16, 16, 4, 1), 128: _same(32, 32, 4, 1), 256: _same(16, 16, 8, 1)},
    ("gfx942", "fwd", "half"): {64: _same(64, 64, 4, 2), 128: _same(64, 32, 4, 2), 256: _same(32, 16, 8, 1)},
    ("gfx942", "bwd_queries", "half"): {128: _same(64, 32, 4, 2), 256: _same(32, 16, 8, 1)},
    ("gfx942", "bwd_keys", "half"): {64: _same(64, 64, 4, 1), 128: _same(32, 64, 4, 1), 256: _same(16, 32, 8, 1)},
}
WINDOW_COMBINE_ROWS = 16  # that a program puts together from their splits


def window_attention(kernel: str, dot_kind: DotKind, width: int, dropout: bool, arch: str) -> WindowTile:
    """The tile of "fwd", "bwd_bases", "bwd_queries" or "bwd_keys", for operands of this width."""
    found = WINDOW_ATTENTION.get((arch, kernel, dot_kind)) or WINDOW_ATTENTION[ANY, kernel, dot_kind]
    return found[min(limit for limit in found if width <= limit)][dropout]


def window_attention_width(dot_kind: DotKind) -> int:
    """The widest D that has a tile."""
    return max(WINDOW_ATTENTION[ANY, "fwd", dot_kind])


def width_block(width: int) -> int:
    """Columns of a tile that holds the width: a power of two, at least the 16 that a matrix instruction takes."""
    return next_power_of_two(width, 16)


class Strip(NamedTuple):
    """One launch shape of an elementwise kernel: counters of the noise a program draws, and warps."""

    block_q: int
    num_warps: int


MEZO_PERTURB = Strip(block_q=256, num_warps=4)  # 8 elements a thread


class Words(NamedTuple):
    """One launch shape of a softmax over the vocabulary: words a step, and warps."""

    block_v: int
    num_warps: int


SOFTMAX = Words(block_v=8192, num_warps=16)  # 16 bits a word: 32 bytes a thread in flight, and two programs hide a read
