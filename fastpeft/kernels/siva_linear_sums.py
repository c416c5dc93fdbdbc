"""SiVA's gradients of factors: sums over rows, `wide^T narrow * s`, added up in a fixed order.

Letters are those of `fastpeft.kernels.siva_linear`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpeft.kernels import tiles
from fastpeft.kernels.siva_linear_parts import pick


@triton.jit
def rows_of(order_ptr, offs_m, mask_m, tokens, HAS_ORDER: tl.constexpr):
    """Where the rows stand that sorting brings to offs_m: `order` sorts the batch, whose rows have so many tokens."""
    if HAS_ORDER:
        offs_m = tl.load(order_ptr + offs_m // tokens, mask=mask_m, other=0) * tokens + offs_m % tokens
    return offs_m


@triton.jit
def sum_over_rows(
    wide_ptr,
    narrow_ptr,
    order_ptr,
    tokens,
    offs_c,
    offs_r,
    mask_c,
    mask_r,
    first_row,
    last_row,
    stride_wm,
    stride_wc,
    stride_nm,
    stride_nr,
    HAS_ORDER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """`wide^T narrow` over a range of rows, (BLOCK_C, BLOCK_R), in float32; narrow is sorted, `order` sorts wide."""
    acc = tl.zeros((BLOCK_C, BLOCK_R), dtype=tl.float32)
    for m in range(first_row, last_row, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M).to(tl.int64)
        mask_m = offs_m < last_row
        rows = rows_of(order_ptr, offs_m, mask_m, tokens, HAS_ORDER)
        wide_ptrs = wide_ptr + offs_c[:, None] * stride_wc + rows[None, :] * stride_wm  # (BLOCK_C, BLOCK_M)
        narrow_ptrs = narrow_ptr + offs_m[:, None] * stride_nm + offs_r[None, :] * stride_nr  # (BLOCK_M, BLOCK_R)
        wide = tl.load(wide_ptrs, mask=mask_c[:, None] & mask_m[None, :], other=0.0)
        narrow = tl.load(narrow_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0).to(wide.dtype)
        acc = tl.dot(wide, narrow, acc)
    return acc


@triton.jit
def _siva_linear_bwd_partials_kernel(
    wide_ptrs,
    narrow_ptrs,
    s_ptrs,
    partial_ptr,
    M,
    rows,
    columns,
    ranks,
    strides_wm,
    strides_wc,
    strides_nm,
    strides_nr,
    strides_s,
    strides_pc,
    strides_pr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    # 1. The term that this program belongs to, its first block, and where the partial sums of one range of rows begin.
    block = tl.program_id(0)
    term, first_block, blocks = 0, 0, 0
    start, size = tl.zeros((), tl.int64), tl.zeros((), tl.int64)
    for i in tl.static_range(len(columns)):
        reached = block >= blocks
        term = tl.where(reached, i, term)
        first_block = tl.where(reached, blocks, first_block)
        start = tl.where(reached, size, start)
        blocks += tl.cdiv(columns[i], BLOCK_C) * tl.cdiv(ranks[i], BLOCK_R)
        size += tl.full((), 1, tl.int64) * columns[i] * ranks[i]
    C, R = pick(columns, term), pick(ranks, term)
    blocks_c = tl.cdiv(C, BLOCK_C)
    block -= first_block

    # 2. Its rows, and its columns of both matrices.
    split = tl.program_id(1).to(tl.int64)
    first_row = split * rows
    offs_c = (block % blocks_c).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_r = (block // blocks_c).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_c = offs_c < C
    mask_r = offs_r < R

    # 3. The sum, times s.
    wide_ptr = pick(wide_ptrs, term)
    acc = sum_over_rows(
        wide_ptr,
        pick(narrow_ptrs, term),
        wide_ptr,  # in place of an order
        1,
        offs_c,
        offs_r,
        mask_c,
        mask_r,
        first_row,
        tl.minimum(first_row + rows, M),
        pick(strides_wm, term),
        pick(strides_wc, term),
        pick(strides_nm, term),
        pick(strides_nr, term),
        False,
        BLOCK_M,
        BLOCK_C,
        BLOCK_R,
    )
    s = tl.load(pick(s_ptrs, term) + offs_r * pick(strides_s, term), mask=mask_r, other=0.0).to(tl.float32)

    # 4. Store it as the gradient will lie: dU (C, R), dV (R, C).
    offsets = offs_c[:, None] * pick(strides_pc, term) + offs_r[None, :] * pick(strides_pr, term)
    tl.store(partial_ptr + split * size + start + offsets, acc * s[None, :], mask=mask_c[:, None] & mask_r[None, :])


@triton.jit
def _siva_linear_bwd_sum_kernel(partial_ptr, du_ptr, dv_ptr, splits, size_u, size, BLOCK_E: tl.constexpr):
    # 1. The sum over splits, in order.
    offs = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    mask = offs < size
    acc = tl.zeros((BLOCK_E,), dtype=tl.float32)
    partial_ptrs = partial_ptr + offs
    for _ in range(splits):
        acc += tl.load(partial_ptrs, mask=mask, other=0.0)
        partial_ptrs += tl.full((), 1, tl.int64) * size

    # 2. All dU come first, then all dV.
    acc = acc.to(du_ptr.dtype.element_ty)
    tl.store(du_ptr + offs, acc, mask=offs < size_u)
    tl.store(dv_ptr + (offs - size_u), acc, mask=(offs >= size_u) & mask)


class Term(NamedTuple):
    """`wide^T narrow * s`, of wide `(M, C)`, narrow `(M, R)` and s `(R,)`, all of any strides."""

    wide: Tensor
    narrow: Tensor
    s: Tensor


def factor_gradients(of_us: list[Term], of_v: Term | None) -> tuple[list[Tensor], Tensor]:
    """Each dU `(C, R)`, slices of one tensor, and dV `(R, C)`, 0 elements where it has no term; at least one term."""
    terms = [*of_us, of_v] if of_v else of_us
    wides, narrows, ss = zip(*terms, strict=True)
    m = wides[0].shape[0]
    columns, ranks = (tuple(t.shape[1] for t in each) for each in (wides, narrows))
    sizes = [c * r for c, r in zip(columns, ranks, strict=True)]
    strides = [(r, 1) for r in ranks[: len(of_us)]] + [(1, c) for c in columns[len(of_us) :]]
    tile, block_r = tiles.SIVA_LINEAR_SUMS, tiles.rank_block(min(max(ranks), tiles.MAX_RANK))
    rows = tiles.siva_linear_bwd_rows(m, block_r)
    splits = max(triton.cdiv(m, rows), 1)
    blocks = sum(triton.cdiv(c, tile.block_c) * triton.cdiv(r, block_r) for c, r in zip(columns, ranks, strict=True))
    partial = ss[0].new_empty(splits, sum(sizes), dtype=torch.float32)
    if blocks > 0:
        with torch.cuda.device_of(partial):
            _siva_linear_bwd_partials_kernel[(blocks, splits)](
                wides,
                narrows,
                ss,
                partial,
                m,
                rows,
                columns,
                ranks,
                *zip(*(wide.stride() for wide in wides), strict=True),
                *zip(*(narrow.stride() for narrow in narrows), strict=True),
                tuple(s.stride(0) for s in ss),
                *zip(*strides, strict=True),
                BLOCK_M=tile.block_m,
                BLOCK_C=tile.block_c,
                BLOCK_R=block_r,
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
                enable_fp_fusion=True,
            )
    du, dv = add_up(partial, sum(sizes[: len(of_us)]), ss[0].dtype)
    dus = [part.view(c, r) for part, c, r in zip(du.split(sizes[: len(of_us)]), columns, ranks, strict=False)]
    return dus, dv.view(ranks[-1], columns[-1]) if of_v else dv


def add_up(partial: Tensor, size_u: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The sum of partial sums `(splits, size)`, cut in two: the first `size_u` elements, and the rest."""
    splits, size = partial.shape
    du, dv = partial.new_empty(size_u, dtype=dtype), partial.new_empty(size - size_u, dtype=dtype)
    if size > 0:
        with torch.cuda.device_of(partial):
            _siva_linear_bwd_sum_kernel[(triton.cdiv(size, tiles.SUM_BLOCK),)](
                partial,
                du,
                dv,
                splits,
                size_u,
                size,
                BLOCK_E=tiles.SUM_BLOCK,
                num_warps=tiles.SUM_WARPS,
                num_stages=1,
                enable_fp_fusion=True,
            )
    return du, dv
