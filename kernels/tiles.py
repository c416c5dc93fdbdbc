"""Launch shapes of the kernels: tables for each architecture and a cost model that picks from them, no timing.

Every tile compiles for the architectures of `bench/static.py` that it is shipped to, without spilling; the registers,
shared memory and matrix instructions of each, and the Triton that made them, are in `bench/data/static.csv`.

The kinds of products: "half" is 16-bit operands and "tf32" float32 rounded to TF32, both on matrix units; "ieee" is
float32 outside them.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """One launch shape: elements a program computes (`block_m` x `block_n`), the step along K, warps and stages."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    max_rank: int = 64  # up to which p fits beside h, for one layer
    shared_rank: int = 64  # the same in the kernels of several layers or adapters, which hold more beside


class SumTile(NamedTuple):
    """A launch shape of sums over rows: rows a step, columns of dh or x a program, warps and stages."""

    block_m: int
    block_c: int
    num_warps: int
    num_stages: int


ANY = "any"  # architecture


class Card(NamedTuple):
    """What the choice of a tile depends on."""

    architecture: str  # as in bench/static.py, "sm_90" or "gfx942"
    multiprocessors: int


class Costs(NamedTuple):
    """Prices in multiply-adds of one multiprocessor, between those of an A100 and an H100 by their data sheets."""

    cached: int  # loading an element through the second-level cache
    memory: int  # loading an element from memory, while all multiprocessors do
    launch: int  # starting one more kernel, some microseconds


MAX_RANK = 64  # of SiVA's kernels; a wider tile of p spills beside the tile of h

_SMALL = Tile(32, 64, 64, 4, 3), Tile(64, 64, 64, 4, 3, max_rank=16, shared_rank=16)
_LARGE = Tile(128, 128, 64, 8, 3, shared_rank=16), Tile(128, 256, 64, 8, 3, max_rank=16, shared_rank=0)
SIVA_LINEAR = {  # (architecture, products) -> tiles of the forward and of dx; ANY where an architecture has no line
    (ANY, "half"): (*_SMALL, Tile(128, 128, 32, 8, 3, shared_rank=16)),
    (ANY, "tf32"): (Tile(32, 64, 32, 4, 2), Tile(64, 64, 32, 4, 2, max_rank=16, shared_rank=16)),
    (ANY, "ieee"): (
        Tile(32, 64, 32, 4, 2, max_rank=16, shared_rank=16),
        Tile(64, 64, 16, 8, 2, max_rank=16, shared_rank=16),
    ),
    ("sm_90", "half"): (*_SMALL, *_LARGE),
    ("sm_100", "half"): (_SMALL[0], _SMALL[1]._replace(shared_rank=0), *_LARGE),
}
RANK_STEP = 16  # columns of p a step where it is not computed inside; the least that a matrix instruction takes
COSTS = {"half": Costs(64, 200, 10_000_000), "tf32": Costs(64, 200, 5_000_000), "ieee": Costs(8, 25, 500_000)}

SIVA_LINEAR_SUMS = {  # products -> tile of the partial sums of dU and dV
    "half": SumTile(32, 64, 4, 3),
    "tf32": SumTile(32, 32, 4, 2),
    "ieee": SumTile(16, 32, 8, 2),
}
SUM_BLOCK, SUM_WARPS = 256, 4  # elements of a program that adds partial sums
_MOST_SPLITS = 32


def siva_linear_tiles(architecture: str, products: str) -> tuple[Tile, ...]:
    """The tiles that `siva_linear` picks from."""
    return SIVA_LINEAR.get((architecture, products)) or SIVA_LINEAR[ANY, products]


@lru_cache(maxsize=1024)
def siva_linear(
    rows: tuple[int, ...],
    k: int,
    columns: tuple[int, ...],
    rank: int,
    products: str,
    card: Card,
    shared: bool = False,
    before: bool = True,
) -> tuple[Tile, bool]:
    """The tile for h from x `(M, k)`, and whether its programs also compute p (else a product before them).

    Tiles do not reach across `rows`, which M is the sum of, nor across `columns`, which the width of h is the sum of.
    The time of a program is that of its multiply-adds and its loads; the programs run in waves of one a
    multiprocessor; p by a product of its own costs one more reading of x and one more launch.

    `shared` tells the kernels of several layers or adapters. Those that have no p `before` them take ranks up to
    `siva_linear_shared_rank`.
    """
    costs, block_r = COSTS[products], rank_block(rank)

    def time(choice: tuple[Tile, bool]) -> float:
        tile, project = choice
        blocks = sum(math.ceil(m / tile.block_m) for m in rows) * sum(math.ceil(n / tile.block_n) for n in columns)
        waves = math.ceil(blocks / card.multiprocessors)
        multiplying = tile.block_m * (tile.block_n + block_r * project)
        loading = costs.cached * (tile.block_m + tile.block_n + block_r * project)
        apart = 0 if project else costs.memory * sum(rows) * k / card.multiprocessors + costs.launch
        return waves * k * (multiplying + loading) + apart

    ways = []
    for tile in siva_linear_tiles(card.architecture, products):
        if rank <= (tile.shared_rank if shared else tile.max_rank):
            ways.append((tile, True))
        if before:
            ways.append((tile, False))
    return min(ways, key=time)


def siva_linear_shared_rank(products: str, card: Card) -> int:
    """Up to which rank programs for several adapters can compute p beside h."""
    return max(tile.shared_rank for tile in siva_linear_tiles(card.architecture, products))


def siva_linear_bwd_rows(m: int, block_r: int) -> int:
    """Rows that one program of the partial sums adds up, a multiple of 64.

    Enough that the partial sums are few bytes beside the operands. It depends on no card, so neither does the order
    of the sum.
    """
    return 64 * math.ceil(max(256, 8 * block_r, m / _MOST_SPLITS) / 64)


def rank_block(rank: int) -> int:
    """Columns of the tile that holds a rank: a power of two, at least `RANK_STEP`."""
    return max(RANK_STEP, 1 << (rank - 1).bit_length())


@cache
def card(device: torch.device) -> Card:
    """The card behind `device`; for a CPU, whose tensors Triton's interpreter runs on, some card."""
    if device.type != "cuda":
        return Card("interpreter", 108)
    properties = torch.cuda.get_device_properties(device)
    name = properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"
    return Card(name, properties.multi_processor_count)


class WindowTile(NamedTuple):
    """A launch shape of window attention: queries and keys a program multiplies at a time, warps and stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# Outside matrix units a thread holds whole rows of both operands, which spill beyond 128 columns. Multiplied in parts
# of 64, 256 columns fit the forward and the kernel over keys; the one over queries then takes 69 KiB of shared memory,
# more than sm_75 has for a program, and spills on sm_120.
WINDOW_ATTENTION = {  # (kernel, products) -> widest D -> tile
    ("fwd", "half"): {64: WindowTile(64, 32, 8, 2), 128: WindowTile(64, 32, 8, 2), 256: WindowTile(32, 32, 8, 2)},
    ("fwd", "tf32"): {64: WindowTile(16, 16, 4, 1), 128: WindowTile(32, 32, 8, 1), 256: WindowTile(16, 16, 8, 1)},
    ("fwd", "ieee"): {64: WindowTile(16, 16, 4, 1), 128: WindowTile(16, 16, 8, 1)},
    ("bwd_queries", "half"): {
        64: WindowTile(64, 32, 8, 2),
        128: WindowTile(64, 32, 8, 2),
        256: WindowTile(32, 16, 8, 1),
    },
    ("bwd_queries", "tf32"): {
        64: WindowTile(32, 32, 4, 2),
        128: WindowTile(32, 16, 8, 1),
        256: WindowTile(16, 16, 4, 1),
    },
    ("bwd_queries", "ieee"): {64: WindowTile(16, 16, 4, 1), 128: WindowTile(16, 16, 8, 1)},
    ("bwd_keys", "half"): {64: WindowTile(32, 64, 4, 1), 128: WindowTile(64, 32, 8, 1), 256: WindowTile(32, 32, 8, 1)},
    ("bwd_keys", "tf32"): {64: WindowTile(32, 32, 4, 1), 128: WindowTile(16, 32, 8, 1), 256: WindowTile(16, 16, 8, 1)},
    ("bwd_keys", "ieee"): {64: WindowTile(16, 16, 4, 1), 128: WindowTile(16, 16, 8, 1)},
}


def window_attention(kernel: str, products: str, width: int) -> WindowTile:
    """The tile of one of its kernels, "fwd", "bwd_queries" or "bwd_keys", for operands of this width."""
    found = WINDOW_ATTENTION[kernel, products]
    return found[min(limit for limit in found if width <= limit)]


def window_attention_width(products: str) -> int:
    """The widest D that has a tile."""
    return max(WINDOW_ATTENTION["fwd", products])


def width_block(width: int) -> int:
    """Columns of a tile that holds the width: a power of two, at least the 16 that a matrix instruction takes."""
    return max(16, 1 << (width - 1).bit_length())


class Strip(NamedTuple):
    """One launch shape of an elementwise kernel: counters of the noise a program draws, and warps."""

    block_q: int
    num_warps: int


MEZO_PERTURB = Strip(block_q=256, num_warps=4)  # 8 elements a thread
