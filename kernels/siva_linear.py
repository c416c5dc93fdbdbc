"""SiVA linear layer: a frozen product and a low-rank one in a single kernel, and the gradients of both factors.

    h = x W^T + ((x V^T) * s) U^T + b        p = x V^T
    dx = dh W + ((dh U) * s) V               q = dh U
    dU = (dh^T p) * s                        dV = s * (q^T x)

    M  rows of x (all leading dimensions together)      x (M, K)    W (N, K)    b (N,)     h (M, N)
    K  in_features                                      V (R, K)    s (R,)      U (N, R)   p, q (M, R)
    N  out_features
    R  rank

dx is h with dh, W^T, V^T and U^T in the places of x, W, U and V, and q is then p: one kernel serves both directions.
Each of its programs owns one BLOCK_M x BLOCK_N tile of h. Where PROJECT says so it accumulates its rows of p next to
x W^T, from the same tiles of x: x is read once, and p makes no trip through memory before it is used. The price is that
every column of tiles computes p anew, BLOCK_R / BLOCK_N more multiply-adds (an eighth at rank 16 or less and 128
columns). The other way is a small product for p, which reads x once more and costs a launch. By the data sheets of an
A100 or H100 (150 or 300 half-precision multiply-adds in the time of one element from memory) the first pays up to 1,200
or 2,400 columns of h at rank 16, and for any width while all extra work is shorter than a launch; the second beyond.
`fastpeft.kernels.tiles` makes this estimate for each launch; it is a prediction, not a measurement.

dU and dV sum over rows. Every program adds up a range of rows for some columns of dh or x; the partial sums, in
float32, are then added in a fixed order. The ranges depend on sizes alone, so repeats are bit-equal. Accumulation is in
float32 everywhere. Products of float32 operands follow `torch.backends.cuda.matmul.fp32_precision`, as PyTorch's own
do: TF32 where it says "tf32" and the card has it, else exact (`ieee`, PyTorch's default).

Source: SiVA, the adaptation by singular vectors described in `fastpeft.siva`.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from fastpeft.kernels import tiles
from fastpeft.kernels.launch import device_of, precision, products_within
from fastpeft.kernels.siva_linear_tile import GROUP_M
from fastpeft.ops import aten


@triton.jit
def _siva_linear_kernel(
    x_ptr,
    w_ptr,
    u_ptr,
    s_ptr,
    v_ptr,
    bias_ptr,
    h_ptr,
    p_ptr,
    M,
    K,
    N,
    R,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_un,
    stride_ur,
    stride_s,
    stride_vr,
    stride_vk,
    stride_bias,
    stride_hm,
    stride_pm,
    HAS_BIAS: tl.constexpr,
    PROJECT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # 1. This program's tile: column blocks vary slowest inside a group of GROUP_M row blocks, so that a group reads
    #    each tile of W from cache.
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_n = tl.maximum(tl.cdiv(N, BLOCK_N), 1)
    group = tl.program_id(0) // (GROUP_M * blocks_n)
    first_m = group * GROUP_M
    size_m = tl.minimum(blocks_m - first_m, GROUP_M)
    within = tl.program_id(0) % (GROUP_M * blocks_n)
    block_m = first_m + within % size_m
    block_n = within // size_m

    # 2. Offsets, in 64 bits: rows times stride can pass 2^31.
    offs_m = block_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = block_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
    mask_m = offs_m < M
    mask_n = offs_n < N
    mask_r = offs_r < R
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk  # (BLOCK_M, BLOCK_K)
    w_ptrs = w_ptr + offs_n[None, :] * stride_wn + offs_k[:, None] * stride_wk  # (BLOCK_K, BLOCK_N)
    v_ptrs = v_ptr + offs_r[None, :] * stride_vr + offs_k[:, None] * stride_vk  # (BLOCK_K, BLOCK_R)
    step = tl.full((), BLOCK_K, tl.int64)

    # 3. Both products from one read of x, or x W^T alone.
    acc_h = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc_p = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        acc_h = tl.dot(x, w, acc_h, input_precision=PRECISION)
        if PROJECT:
            v = tl.load(v_ptrs, mask=mask_k[:, None] & mask_r[None, :], other=0.0)
            acc_p = tl.dot(x, v, acc_p, input_precision=PRECISION)
            v_ptrs += step * stride_vk
        x_ptrs += step * stride_xk
        w_ptrs += step * stride_wk

    # 4. The low-rank product on the accumulator: with all of p at once, stored by the programs of the first column
    #    block, or in steps of BLOCK_R columns of the p that a product before this kernel stored.
    p_ptrs = p_ptr + offs_m[:, None] * stride_pm + offs_r[None, :]  # (BLOCK_M, BLOCK_R)
    s_ptrs = s_ptr + offs_r * stride_s
    u_ptrs = u_ptr + offs_n[None, :] * stride_un + offs_r[:, None] * stride_ur  # (BLOCK_R, BLOCK_N)
    if PROJECT:
        if block_n == 0:
            tl.store(p_ptrs, acc_p.to(p_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_r[None, :])
        s = tl.load(s_ptrs, mask=mask_r, other=0.0).to(tl.float32)
        u = tl.load(u_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0)
        acc_h = tl.dot((acc_p * s[None, :]).to(u.dtype), u, acc_h, input_precision=PRECISION)
    else:
        for r in tl.range(0, R, BLOCK_R, num_stages=1):  # few steps, which pipelining would only make spill
            mask_r = offs_r < R - r
            p = tl.load(p_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0).to(tl.float32)
            s = tl.load(s_ptrs, mask=mask_r, other=0.0).to(tl.float32)
            u = tl.load(u_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0)
            acc_h = tl.dot((p * s[None, :]).to(u.dtype), u, acc_h, input_precision=PRECISION)
            p_ptrs += BLOCK_R
            s_ptrs += tl.full((), BLOCK_R, tl.int64) * stride_s
            u_ptrs += tl.full((), BLOCK_R, tl.int64) * stride_ur

    # 5. The bias, and h.
    if HAS_BIAS:
        acc_h += tl.load(bias_ptr + offs_n * stride_bias, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    h_ptrs = h_ptr + offs_m[:, None] * stride_hm + offs_n[None, :]
    tl.store(h_ptrs, acc_h.to(h_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit
def _siva_linear_bwd_partial(
    a_ptr,
    b_ptr,
    partial_ptr,
    block,
    columns,
    first_row,
    last_row,
    R,
    stride_am,
    stride_ac,
    stride_bm,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Sum of `a^T b` over a range of rows for one block of a's columns: a (M, columns), b (M, R) -> (columns, R)."""
    # 1. Offsets.
    offs_c = block.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_m = first_row + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
    mask_c = offs_c < columns
    mask_r = offs_r < R
    a_ptrs = a_ptr + offs_c[:, None] * stride_ac + offs_m[None, :] * stride_am  # (BLOCK_C, BLOCK_M)
    b_ptrs = b_ptr + offs_m[:, None] * stride_bm + offs_r[None, :]  # (BLOCK_M, BLOCK_R)
    step = tl.full((), BLOCK_M, tl.int64)

    # 2. The sum.
    acc = tl.zeros((BLOCK_C, BLOCK_R), dtype=tl.float32)
    for m in range(first_row, last_row, BLOCK_M):
        mask_m = m + tl.arange(0, BLOCK_M) < last_row
        a = tl.load(a_ptrs, mask=mask_c[:, None] & mask_m[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        a_ptrs += step * stride_am
        b_ptrs += step * stride_bm

    # 3. Store it.
    tl.store(partial_ptr + offs_c[:, None] * R + offs_r[None, :], acc, mask=mask_c[:, None] & mask_r[None, :])


@triton.jit
def _siva_linear_bwd_partials_kernel(
    dh_ptr,
    p_ptr,
    x_ptr,
    q_ptr,
    partial_ptr,
    M,
    N,
    K,
    R,
    rows,
    stride_dhm,
    stride_dhn,
    stride_pm,
    stride_xm,
    stride_xk,
    stride_qm,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    # 1. This program's rows and, of the (splits, N + K, R) partial sums, its slice.
    split = tl.program_id(1).to(tl.int64)
    first_row = split * rows
    last_row = tl.minimum(first_row + rows, M)
    partial_ptr += split * (N + K) * R

    # 2. The first blocks belong to dh^T p, the others to x^T q. N or K is 0 where that gradient is not needed.
    block = tl.program_id(0)
    blocks_n = tl.cdiv(N, BLOCK_C)
    if block < blocks_n:
        _siva_linear_bwd_partial(
            dh_ptr,
            p_ptr,
            partial_ptr,
            block,
            N,
            first_row,
            last_row,
            R,
            stride_dhm,
            stride_dhn,
            stride_pm,
            PRECISION,
            BLOCK_M,
            BLOCK_C,
            BLOCK_R,
        )
    else:
        _siva_linear_bwd_partial(
            x_ptr,
            q_ptr,
            partial_ptr + tl.full((), 1, tl.int64) * N * R,
            block - blocks_n,
            K,
            first_row,
            last_row,
            R,
            stride_xm,
            stride_xk,
            stride_qm,
            PRECISION,
            BLOCK_M,
            BLOCK_C,
            BLOCK_R,
        )


@triton.jit
def _siva_linear_bwd_sum_kernel(
    partial_ptr,
    s_ptr,
    du_ptr,
    dv_ptr,
    N,
    K,
    R,
    splits,
    stride_s,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    # 1. Offsets into the N + K columns: those of dh, then those of x.
    offs_c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
    mask_r = offs_r[None, :] < R
    mask = (offs_c < N + K)[:, None] & mask_r
    step = tl.full((), 1, tl.int64) * (N + K) * R

    # 2. The sum over splits, in order, times s.
    acc = tl.zeros((BLOCK_C, BLOCK_R), dtype=tl.float32)
    partial_ptrs = partial_ptr + offs_c[:, None] * R + offs_r[None, :]
    for _ in range(splits):
        acc += tl.load(partial_ptrs, mask=mask, other=0.0)
        partial_ptrs += step
    acc *= tl.load(s_ptr + offs_r * stride_s, mask=offs_r < R, other=0.0).to(tl.float32)[None, :]

    # 3. Columns of dh are rows of dU (N, R), columns of x are columns of dV (R, K).
    acc = acc.to(du_ptr.dtype.element_ty)
    tl.store(du_ptr + offs_c[:, None] * R + offs_r[None, :], acc, mask=(offs_c < N)[:, None] & mask_r)
    tl.store(dv_ptr + offs_r[None, :] * K + (offs_c - N)[:, None], acc, mask=(offs_c >= N)[:, None] & mask)


def siva_linear_fwd(
    x: Tensor, weight: Tensor, u: Tensor, s: Tensor, v: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`h = x W^T + ((x V^T) * s) U^T + b` and `p = x V^T`.

    Args:
        x: `(*, K)`; all operands share its dtype and device. Any strides, here and below.
        weight: `(N, K)`.
        u: `(N, R)`.
        s: `(R,)`.
        v: `(R, K)`.
        bias: `(N,)` or None.

    Returns:
        h `(*, N)` and p `(*, R)`, contiguous.

    Notes:
        Fused ATen calls serve ranks above 64 (`tiles.MAX_RANK`); float64, because the kernels accumulate in float32;
        and 16-bit operands on cards before compute capability 8.0, whose matrix units Triton does not use but PyTorch
        does.
    """
    kind = products_within(x, v.shape[0])
    if kind is None:
        return aten.siva_linear(x, weight, u, s, v, bias)
    n, k = weight.shape
    h, p = _linear(x.reshape(math.prod(x.shape[:-1]), k), weight, u, s, v, bias, kind)
    return h.view(*x.shape[:-1], n), p.view(*x.shape[:-1], v.shape[0])


def siva_linear_bwd(
    dh: Tensor,
    x: Tensor,
    weight: Tensor,
    u: Tensor,
    s: Tensor,
    v: Tensor,
    p: Tensor,
    need_dx: bool,
    need_du: bool,
    need_dv: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `siva_linear_fwd`: `dx = dh W + (q * s) V`, `dU = (dh^T p) * s`, `dV = s * (q^T x)`, `q = dh U`.

    Args:
        dh: `(*, N)`, the gradient of h. Any strides, here and below.
        x: `(*, K)`; not read without `need_dv`, and may then have 0 elements.
        weight: `(N, K)`.
        u: `(N, R)`.
        s: `(R,)`.
        v: `(R, K)`.
        p: `(*, R)` of the forward; not read without `need_du`, and may then have 0 elements.
        need_dx, need_du, need_dv, need_dbias: which gradients to compute.

    Returns:
        dx `(*, K)`, dU `(N, R)`, dV `(R, K)` and db `(N,)`, contiguous; 0 elements in place of one that is not needed.

    Notes:
        q is computed once, with dx where that is needed. No atomics: repeats are bit-equal. ATen serves what it serves
        in the forward, and db.
    """
    kind = products_within(dh, v.shape[0])
    if kind is None:
        return aten.siva_linear_backward(dh, x, weight, u, s, v, p, need_dx, need_du, need_dv, need_dbias)
    dx, du, dv, dbias = (dh.new_empty(0) for _ in range(4))
    n, k = weight.shape
    m = math.prod(dh.shape[:-1])
    rows = dh.reshape(m, n)
    q = None
    if need_dx:
        dx, q = _linear(rows, weight.t(), v.t(), s, u.t(), None, kind)
        dx = dx.view(*dh.shape[:-1], k)
    elif need_dv:
        q = rows @ u
    if need_du or need_dv:
        of_u = (rows, p.reshape(m, s.shape[0])) if need_du else None
        of_v = (x.reshape(m, k), q) if need_dv else None
        du, dv = _factors(of_u, of_v, s, kind)
    if need_dbias:
        dbias = rows.sum(0)
    return dx, du, dv, dbias


def _linear(
    x: Tensor, weight: Tensor, u: Tensor, s: Tensor, v: Tensor, bias: Tensor | None, kind: str
) -> tuple[Tensor, Tensor]:
    """h `(M, N)` and p `(M, R)` of x `(M, K)`, both contiguous."""
    m, k = x.shape
    n, rank = u.shape
    h = x.new_empty(m, n)
    if m == 0:
        return h, x.new_empty(m, rank)
    tile, project = tiles.siva_linear((m,), k, (n,), rank, kind, tiles.card(x.device))
    p = x.new_empty(m, rank) if project else F.linear(x, v)
    grid = (triton.cdiv(m, tile.block_m) * max(triton.cdiv(n, tile.block_n), 1),)
    with device_of(x):
        _siva_linear_kernel[grid](
            x,
            weight,
            u,
            s,
            v,
            bias if bias is not None else x,  # never read: a kernel takes no None here
            h,
            p,
            m,
            k,
            n,
            rank,
            *x.stride(),
            *weight.stride(),
            *u.stride(),
            *s.stride(),
            *v.stride(),
            0 if bias is None else bias.stride(0),
            n,
            rank,
            HAS_BIAS=bias is not None,
            PROJECT=project,
            PRECISION=precision(kind),
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            BLOCK_R=tiles.rank_block(rank) if project else tiles.RANK_STEP,
            GROUP_M=GROUP_M,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=True,
        )
    return h, p


def _factors(
    of_u: tuple[Tensor, Tensor] | None, of_v: tuple[Tensor, Tensor] | None, s: Tensor, kind: str
) -> tuple[Tensor, Tensor]:
    """dU `(N, R)` from dh `(M, N)` and p `(M, R)`, dV `(R, K)` from x `(M, K)` and q `(M, R)`, or one of them."""
    rank = s.shape[0]
    wide, narrow = of_u or of_v
    nothing = wide[:, :0], narrow  # has no columns, so no program reads it
    (dh, p), (x, q) = of_u or nothing, of_v or nothing
    p, q = p.contiguous(), q.contiguous()
    (m, n), k = dh.shape, x.shape[1]
    tile = tiles.SIVA_LINEAR_BWD[kind]
    block_r = tiles.rank_block(rank)
    rows = tiles.siva_linear_bwd_rows(m, block_r)
    splits = max(triton.cdiv(m, rows), 1)
    partial = s.new_empty(splits, n + k, rank, dtype=torch.float32)
    du, dv = s.new_empty((n, rank) if of_u else 0), s.new_empty((rank, k) if of_v else 0)
    with device_of(s):
        _siva_linear_bwd_partials_kernel[(triton.cdiv(n, tile.block_c) + triton.cdiv(k, tile.block_c), splits)](
            dh,
            p,
            x,
            q,
            partial,
            m,
            n,
            k,
            rank,
            rows,
            *dh.stride(),
            rank,
            *x.stride(),
            rank,
            PRECISION=precision(kind),
            BLOCK_M=tile.block_m,
            BLOCK_C=tile.block_c,
            BLOCK_R=block_r,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=True,
        )
        _siva_linear_bwd_sum_kernel[(triton.cdiv(n + k, tiles.SUM_COLUMNS),)](
            partial,
            s,
            du,
            dv,
            n,
            k,
            rank,
            splits,
            *s.stride(),
            BLOCK_C=tiles.SUM_COLUMNS,
            BLOCK_R=block_r,
            num_warps=tiles.SUM_WARPS,
            num_stages=1,
            enable_fp_fusion=True,
        )
    return du, dv
