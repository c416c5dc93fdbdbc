"""Launch shapes of the kernels: short lists for each architecture, of which SiVA's are timed at the first call.

Every tile compiles for the architectures of `bench/static.py` that it is shipped to, without spilling; the registers,
shared memory and matrix instructions of each, and the Triton that made them, are in `bench/data/static.csv`.

The kinds of products: "half" is 16-bit operands and "tf32" float32 rounded to TF32, both on matrix units; "ieee" is
float32 outside them. SiVA's tiles are for the first; Triton's interpreter runs float32 by them too.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import torch
import triton
from triton.testing import do_bench

from fastpeft.ops.dispatch import architecture, current_architecture, next_power_of_two, tuners


class Tile(NamedTuple):
    """One launch shape: elements a program computes (`block_m` x `block_n`), the step along K, warps and stages."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    max_rank: int = 64  # up to which p fits beside h, for one layer
    shared_rank: int = 64  # the same in the kernels of several layers or adapters, which hold more beside
    apart: bool = True  # whether p is multiplied in a branch of its own, see `siva_linear_parts.accumulate`

    def constants(self) -> dict[str, int]:
        """What SiVA's kernels are compiled with, beside warps and stages."""
        blocks = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k}
        return {**blocks, "APART": self.apart, "STAGES": self.num_stages}

    def config(self) -> triton.Config:
        """As `triton.autotune` takes it."""
        return triton.Config(self.constants(), num_warps=self.num_warps, num_stages=self.num_stages)


class SumTile(NamedTuple):
    """A launch shape of sums over rows: rows a step, columns of dh or x a program, warps and stages."""

    block_m: int
    block_c: int
    num_warps: int
    num_stages: int


ANY = "any"  # architecture
DotKind = Literal["half", "tf32", "ieee"]  # how to multiply, as said above


class Gpu(NamedTuple):
    """What a launch depends on."""

    architecture: str  # as in bench/static.py, "sm_90" or "gfx942"
    multiprocessors: int

    @property
    def dies(self) -> int:
        """That have a second-level cache each."""
        per_die = {"gfx942": 38}.get(self.architecture)  # MI300X has 8 dies of these, MI300A 6
        return self.multiprocessors // per_die if per_die else 1


MAX_RANK = 64  # of SiVA's kernels; a wider tile of p spills beside the tile of h
GROUP_M = 8  # row blocks that share the tiles of W in cache

# The first of a list runs where nothing may be timed. Tiles of 64 rows and more are multiplied from shared memory on
# sm_90 and sm_100, by instructions that are no faster apart.
_SMALL = Tile(32, 64, 64, 4, 3), Tile(64, 64, 64, 4, 3, max_rank=16, shared_rank=16)
_FROM_SHARED = (
    _SMALL[1]._replace(apart=False),
    Tile(128, 128, 64, 8, 3, shared_rank=16, apart=False),
    Tile(128, 256, 64, 8, 4, max_rank=16, shared_rank=0, apart=False),
)
SIVA_LINEAR = {  # architecture -> tiles of the forward and of dx; ANY where an architecture has no line
    ANY: (*_SMALL, Tile(128, 128, 32, 8, 3, shared_rank=16)),
    "sm_90": (_SMALL[0], *_FROM_SHARED),
    "gfx942": (  # 64 KiB of shared memory; a stage more than two is kept in registers, which a wave of 64 has
        Tile(32, 64, 64, 4, 2, apart=False),
        Tile(64, 64, 64, 4, 2, apart=False),
        Tile(128, 128, 64, 4, 2, apart=False),
        Tile(256, 128, 64, 8, 2, max_rank=16, shared_rank=0, apart=False),
    ),
    "sm_100": (_SMALL[0], _FROM_SHARED[0]._replace(shared_rank=0), *_FROM_SHARED[1:]),
}

SIVA_LINEAR_SUMS = SumTile(32, 64, 4, 3)  # of the partial sums of dU and dV
SUM_BLOCK, SUM_WARPS = 256, 4  # elements of a program that adds partial sums
_MOST_SPLITS = 32
_ROWS_OF_LARGE = 256  # rows of each adapter, on average, that fill a large tile well


def siva_linear(arch: str, rank: int, layers: int = 1) -> list[Tile]:
    """The tiles that hold a rank, of the kernels of so many layers."""
    found = SIVA_LINEAR.get(arch) or SIVA_LINEAR[ANY]
    return [tile for tile in found if rank <= (tile.max_rank if layers == 1 else tile.shared_rank)]


def siva_linear_mixed(arch: str, rank: int, rows: tuple[int, ...]) -> Tile:
    """The tile for rows of several adapters. Nothing is timed: the table of row blocks depends on it."""
    found = siva_linear(arch, rank, layers=2)
    large = [tile for tile in found if tile.block_m == 128]
    return large[0] if large and sum(rows) >= _ROWS_OF_LARGE * len(rows) else found[0]


class Tuned:
    """A kernel with `triton.autotune` over the tiles of `SIVA_LINEAR`, for each class of rows, K, columns and rank.

    Where only deterministic algorithms are allowed the first tile runs, and under Triton's interpreter some tile. What
    was found is kept with a run (`fastpeft.ops.dispatch`), so that a resumed one computes the same bits.
    """

    def __init__(self, kernel: Any) -> None:
        every = [tile.config() for tile in dict.fromkeys(itertools.chain(*SIVA_LINEAR.values()))]
        self.fn = kernel
        self.tuner = tuners[kernel.__name__] = triton.autotune(
            configs=every[:1] if triton.knobs.runtime.interpret else every,
            key=["rows", "K", "columns", "BLOCK_R"],
            prune_configs_by={
                "early_config_prune": lambda _, operands, **constants: [
                    tile.config() for tile in self._allowed(operands["columns"], constants["BLOCK_R"])
                ]
            },
            do_bench=partial(do_bench, warmup=5, rep=25),
        )(kernel)
        self._lock = threading.Lock()  # of the tuner, which keeps the operands of a call in itself

    def __getitem__(self, grid: Callable[[dict[str, int]], tuple[int, ...]]) -> Callable[..., None]:
        return partial(self._launch, grid)

    def _launch(self, grid: Callable[[dict[str, int]], tuple[int, ...]], *operands: Any, **constants: Any) -> None:
        if torch.are_deterministic_algorithms_enabled() and len(self.tuner.configs) > 1:
            named = dict(zip(self.tuner.arg_names, operands, strict=False))
            first, *_ = self._allowed(named["columns"], constants["BLOCK_R"])
            self.fn[grid](*operands, **constants, **first.config().all_kwargs())
        else:
            with self._lock:
                self.tuner[grid](*operands, **constants)

    @staticmethod
    def _allowed(columns: tuple[int, ...], rank: int) -> list[Tile]:
        return siva_linear(current_architecture(), rank, len(columns))


def siva_linear_bwd_rows(m: int, block_r: int) -> int:
    """Rows that one program of the partial sums adds up, a multiple of 64.

    Enough that the partial sums are few bytes beside the operands. It depends on no GPU, so neither does the order
    of the sum.
    """
    return 64 * math.ceil(max(256, 8 * block_r, m / _MOST_SPLITS) / 64)


def rank_block(rank: int) -> int:
    """Columns of the tile that holds a rank: a power of two, at least the 16 that a matrix instruction takes."""
    return next_power_of_two(rank, 16)


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
