"""Tile sizes of the kernels: frozen tables, no timing at run time.

Every tile compiles for the architectures of `bench/static.py` that it is shipped to, without spilling; the registers,
shared memory and matrix instructions of each, and the Triton that made them, are in `bench/data/static.csv`.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """One launch shape: elements a program computes (`block_m` x `block_n`), the step along K, warps and stages."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


_FEW_ROWS = 256  # up to here small tiles spread the work over more programs

# how operands are multiplied -> (tile for few rows, tile for many)
SIVA_LINEAR_FWD = {
    "half": (Tile(32, 64, 64, 4, 3), Tile(128, 128, 32, 8, 3)),  # 16-bit, on matrix units
    "tf32": (Tile(32, 64, 32, 4, 2), Tile(64, 64, 32, 4, 2)),  # float32 rounded to TF32, on matrix units
    "ieee": (Tile(32, 64, 16, 4, 2), Tile(64, 64, 16, 8, 2)),  # float32, outside them
}


def siva_linear_fwd_tile(rows: int, products: str) -> Tile:
    """The tile of the SiVA forward for this many rows of x and kind of products."""
    few, many = SIVA_LINEAR_FWD[products]
    return few if rows <= _FEW_ROWS else many


def rank_block(rank: int) -> int:
    """Columns of the tile that holds a rank: a power of two, at least the 16 that a matrix instruction takes."""
    return max(16, 1 << (rank - 1).bit_length())


class Strip(NamedTuple):
    """One launch shape of an elementwise kernel: counters of the noise a program draws, and warps."""

    block_q: int
    num_warps: int


MEZO_PERTURB = Strip(block_q=256, num_warps=4)  # 8 elements a thread
