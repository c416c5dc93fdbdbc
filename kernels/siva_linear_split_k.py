"""Split-K: h, or dx, of a layer whose few rows make fewer tiles than a GPU has multiprocessors.

Letters are those of `fastpeft.kernels.siva_linear`. Of 32 rows a layer with 1,024 outputs has 16 tiles of 32 x 64, for
132 multiprocessors of an H100. So the sum over K is cut into ranges, each with programs of its own:

    1. A program multiplies its tile of x by that of W, and by V, over its range. Both partial sums are in float32.
    2. A program for each tile adds the ranges up, in order, and adds `(p * s) U^T` and the bias.

Two launches then, and `8 S M (N + R)` bytes written and read again for S ranges; `fastpeft.kernels.tiles` weighs them
against the programs that stand still. There are no atomics, so repeats are bit-equal. Layers that share x have more
tiles together, and do not split.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpeft.kernels.siva_linear_parts import accumulate, add_low_rank
from fastpeft.kernels.siva_linear_plan import Plan


@triton.jit
def _siva_linear_split_k_ranges_kernel(
    x_ptr,
    w_ptr,
    v_ptr,
    sums_ptr,
    p_sums_ptr,
    M,
    N,
    K,
    R,
    range_k,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    APART: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
):
    # 1. This program's tile, and its range of K. Offsets are in 64 bits: rows times stride can pass 2^31.
    block_m, block_n = tl.program_id(0), tl.program_id(1)
    first_k = tl.program_id(2).to(tl.int64) * range_k
    offs_m = block_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = block_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
    mask_m = offs_m < M
    mask_n = offs_n < N
    mask_r = offs_r < R

    # 2. Both products over it, from one read of x. V (R, K) is contiguous.
    acc_h, acc_p = accumulate(
        tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32),
        x_ptr + first_k * stride_xk + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk,
        w_ptr + first_k * stride_wk + offs_n[None, :] * stride_wn + offs_k[:, None] * stride_wk,
        v_ptr + first_k + offs_r[None, :] * K + offs_k[:, None],
        None,
        None,
        None,
        0,
        0,
        mask_m,
        mask_n,
        mask_r,
        tl.minimum(K - tl.program_id(2) * range_k, range_k),
        stride_xk,
        stride_wk,
        1,
        True,
        True,
        APART,
        False,
        BLOCK_M,
        BLOCK_K,
        BLOCK_R,
        STAGES,
    )

    # 3. The partial sums, whole tiles one after the other; those of p are the same in all column blocks.
    rows = (tl.program_id(2) * tl.num_programs(0) + block_m).to(tl.int64)
    tile = (rows * tl.num_programs(1) + block_n) * (BLOCK_M * BLOCK_N)
    at_m = tl.arange(0, BLOCK_M)[:, None]
    tl.store(sums_ptr + tile + at_m * BLOCK_N + tl.arange(0, BLOCK_N)[None, :], acc_h)
    if block_n == 0:
        tile_p = rows * (BLOCK_M * BLOCK_R)
        tl.store(p_sums_ptr + tile_p + at_m * BLOCK_R + tl.arange(0, BLOCK_R)[None, :], acc_p)


@triton.jit
def _siva_linear_split_k_join_kernel(
    sums_ptr,
    p_sums_ptr,
    u_ptr,
    s_ptr,
    bias_ptr,
    h_ptr,
    p_ptr,
    M,
    N,
    R,
    ranges,
    stride_un,
    stride_ur,
    stride_pm,
    stride_pr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    # 1. This program's tile.
    block_m, block_n, blocks_m, blocks_n = tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.num_programs(1)
    offs_m = block_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = block_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
    mask_m = offs_m < M
    mask_n = offs_n < N

    # 2. The sums over the ranges, in order.
    acc_h = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc_p = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    at_m = tl.arange(0, BLOCK_M)[:, None]
    for number in range(ranges):
        rows = (number * blocks_m + block_m).to(tl.int64)
        tile, tile_p = (rows * blocks_n + block_n) * (BLOCK_M * BLOCK_N), rows * (BLOCK_M * BLOCK_R)
        acc_h += tl.load(sums_ptr + tile + at_m * BLOCK_N + tl.arange(0, BLOCK_N)[None, :])
        acc_p += tl.load(p_sums_ptr + tile_p + at_m * BLOCK_R + tl.arange(0, BLOCK_R)[None, :])

    # 3. The low-rank product, the bias, and h.
    acc_h = add_low_rank(
        acc_h,
        acc_p,
        p_ptr + offs_m[:, None] * stride_pm + offs_r[None, :] * stride_pr,
        s_ptr + offs_r,
        u_ptr + offs_n[None, :] * stride_un + offs_r[:, None] * stride_ur,
        mask_m,
        mask_n,
        R,
        stride_pr,
        1,
        stride_ur,
        block_n == 0,
        h_ptr.dtype.element_ty,
        True,
        BLOCK_R,
    )
    if HAS_BIAS:
        acc_h += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    h_ptrs = h_ptr + offs_m[:, None] * N + offs_n[None, :]
    tl.store(h_ptrs, acc_h.to(h_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


_OF_JOIN = ("BLOCK_M", "BLOCK_N", "BLOCK_R", "num_warps", "enable_fp_fusion")  # of a plan's constants
_OF_RANGES = (*_OF_JOIN, "APART", "BLOCK_K", "STAGES", "num_stages")


def split_k(
    x: Tensor, weight: Tensor, u: Tensor, s: Tensor, v: Tensor, bias: Tensor | None, h: Tensor, p: Tensor, plan: Plan
) -> None:
    """Write `h = x W^T + ((x V^T) * s) U^T + b` and `p = x V^T`; or dx and q, of dh, W^T, V^T and U^T.

    Args:
        x: `(M, K)`. Any strides but where said.
        weight: `(N, K)`, as the bias in the dtype of x.
        u: `(N, R)`.
        s: `(R,)`, contiguous.
        v: `(R, K)`, contiguous and in the dtype of x.
        bias: `(N,)`, contiguous, or None.
        h: `(M, N)`, contiguous; written.
        p: `(M, R)`; written.
        plan: of one layer, with more than one range.
    """
    (m, k), n, r, tile = x.shape, len(weight), len(s), plan.tile
    if m == 0:
        return
    range_k = tile.block_k * max(triton.cdiv(k, tile.block_k * plan.ranges), 1)
    ranges = max(triton.cdiv(k, range_k), 1)
    blocks_m, blocks_n = triton.cdiv(m, tile.block_m), max(triton.cdiv(n, tile.block_n), 1)
    of_ranges, of_join = ({name: plan.constants[name] for name in names} for names in (_OF_RANGES, _OF_JOIN))
    rows = ranges * blocks_m * tile.block_m
    sums, p_sums = (
        x.new_empty(rows * columns, dtype=torch.float32) for columns in (blocks_n * tile.block_n, of_join["BLOCK_R"])
    )
    with torch.cuda.device_of(x):
        _siva_linear_split_k_ranges_kernel[(blocks_m, blocks_n, ranges)](
            x, weight, v, sums, p_sums, m, n, k, r, range_k, *x.stride(), *weight.stride(), **of_ranges
        )
        _siva_linear_split_k_join_kernel[(blocks_m, blocks_n)](
            sums,
            p_sums,
            u,
            s,
            s if bias is None else bias,  # in its place, never read
            h,
            p,
            m,
            n,
            r,
            ranges,
            *u.stride(),
            *p.stride(),
            HAS_BIAS=bias is not None,
            **of_join,
            num_stages=1,
        )
