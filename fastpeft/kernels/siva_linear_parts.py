"""What SiVA's kernels of h and of dx have in common: the order of programs, the products of a tile, and operands.

Letters are those of `fastpeft.kernels.siva_linear`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastpeft.kernels import tiles


@triton.jit
def tile_of(program, blocks_m, blocks_n, GROUP_M: tl.constexpr, XCDS: tl.constexpr):
    """The row block and the column block of a program.

    Column blocks vary slowest inside a group of GROUP_M row blocks, so that a group reads each tile of W from cache.
    Programs go in turn to the XCDS dies of a card, which have a cache each, so every die is given a range of tiles.
    """
    if XCDS > 1:
        programs = blocks_m * blocks_n
        die = program % XCDS
        program = die * (programs // XCDS) + tl.minimum(die, programs % XCDS) + program // XCDS
    group = program // (GROUP_M * blocks_n)
    first_m = group * GROUP_M
    size_m = tl.minimum(blocks_m - first_m, GROUP_M)
    within = program % (GROUP_M * blocks_n)
    return first_m + within % size_m, within // size_m


@triton.jit
def pick(values, index):
    """An entry of a tuple whose number is known only to the program; a select keeps what is known of alignment."""
    found = values[0]
    for i in tl.static_range(1, len(values)):
        found = tl.where(index == i, values[i], found)
    return found


@triton.jit
def accumulate(
    acc_h,
    x_ptrs,
    w_ptrs,
    v_ptrs,
    mask_m,
    mask_n,
    mask_r,
    K,
    stride_xk,
    stride_wk,
    stride_vk,
    APART: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
):
    """`acc_h + x W^T` and `x V^T` from one read of x.

    The pointers are to the first tiles along K: (BLOCK_M, BLOCK_K) of x, (BLOCK_K, BLOCK_N) of W^T, (BLOCK_K, BLOCK_R)
    of V^T. What lies outside is 0.

    APART puts the second product into a branch that is always taken. Two that share x in one block get one arrangement
    of warps, a column; where warps read operands into registers, W would be read from shared memory twice as often.
    """
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    step = tl.full((), BLOCK_K, tl.int64)
    acc_p = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        mask_k = offs_k < K - k
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        acc_h = tl.dot(x, w, acc_h)
        v = tl.load(v_ptrs, mask=mask_k[:, None] & mask_r[None, :], other=0.0)
        if APART:
            if k < K:
                acc_p = tl.dot(x, v, acc_p)
        else:
            acc_p = tl.dot(x, v, acc_p)
        x_ptrs += step * stride_xk
        w_ptrs += step * stride_wk
        v_ptrs += step * stride_vk
    return acc_h, acc_p


@triton.jit
def add_low_rank(
    acc_h,
    acc_p,
    p_ptrs,
    s_ptrs,
    u_ptrs,
    mask_m,
    mask_n,
    mask_r,
    is_first,
    DTYPE: tl.constexpr,
):
    """`acc_h + (p * s) U^T`, multiplied in DTYPE; the programs of the first column block store p.

    The pointers are to (BLOCK_M, BLOCK_R) of p, (BLOCK_R,) of s, (BLOCK_R, BLOCK_N) of U^T.
    """
    if is_first:
        tl.store(p_ptrs, acc_p.to(p_ptrs.dtype.element_ty), mask=mask_m[:, None] & mask_r[None, :])
    s = tl.load(s_ptrs, mask=mask_r, other=0.0).to(tl.float32)
    u = tl.load(u_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0).to(DTYPE)
    return tl.dot((acc_p * s[None, :]).to(DTYPE), u, acc_h)


def lengths(tensors: list[Tensor]) -> tuple[int, ...]:
    """N of each weight `(N, K)`, R of each s `(R,)`."""
    return tuple(t.shape[0] for t in tensors)


def strides_of(matrices: list[Tensor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The strides of the rows of each, and of the columns."""
    return tuple(matrix.stride(0) for matrix in matrices), tuple(matrix.stride(1) for matrix in matrices)


def like(x: Tensor, factors: list[Tensor]) -> list[Tensor]:
    """The factors that are read anew at each step along K, contiguous and in the dtype of x."""
    return [t if t.dtype == x.dtype and t.is_contiguous() else x.new_empty(t.shape).copy_(t) for t in factors]


def dense(*operands: list[Tensor]) -> tuple[tuple[Tensor, ...], ...]:
    """The factors of all layers, each contiguous."""
    return tuple(tuple(t.contiguous() for t in each) for each in operands)


def constants_of(rows: Tensor, ranks: tuple[int, ...]) -> dict[str, int]:
    """What a launch is compiled with beside its tile."""
    dies = tiles.gpu(rows.device).dies
    return {"BLOCK_R": tiles.rank_block(max(ranks)), "GROUP_M": tiles.GROUP_M, "XCDS": dies, "enable_fp_fusion": True}
