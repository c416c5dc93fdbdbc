"""The gradients of `fastpeft.kernels.siva_linear`, whose letters and reasons these are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpeft.kernels import siva_linear_mixed, tiles
from fastpeft.kernels.launch import is_for_kernels
from fastpeft.kernels.siva_linear_parts import (
    accumulate,
    add_low_rank,
    constants_of,
    dense,
    lengths,
    like,
    pick,
    strides_of,
    tile_of,
)
from fastpeft.kernels.siva_linear_sums import Term, factor_gradients
from fastpeft.ops import aten
from fastpeft.ops.dispatch import next_power_of_two
from fastpeft.ops.products import as_matrix
from fastpeft.ops.siva_forms import whole


@tiles.Tuned
@triton.jit
def _siva_linear_bwd_dx_kernel(
    dh_ptrs,
    w_ptrs,
    u_ptrs,
    s_ptrs,
    v_ptrs,
    dx_ptr,
    q_ptr,
    M,
    rows,
    K,
    columns,
    ranks,
    strides_dhm,
    strides_dhn,
    strides_wn,
    strides_wk,
    APART: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    XCDS: tl.constexpr,
    STAGES: tl.constexpr,
):
    # 1. This program's tile: columns of dx are K, and the products sum over the N_i.
    blocks_k = tl.maximum(tl.cdiv(K, BLOCK_N), 1)
    block_m, block_k = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), blocks_k, GROUP_M, XCDS)

    # 2. Offsets, in 64 bits: rows times stride can pass 2^31. U^T (R, N) and V (R, K) are contiguous.
    offs_m = block_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = block_k.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_n = tl.arange(0, BLOCK_K).to(tl.int64)
    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
    mask_m = offs_m < M
    mask_k = offs_k < K
    stride_qr = tl.full((), 1, tl.int64) * M

    # 3. The terms of all layers, in order, on one accumulator. The loop stays one: unrolled, its copies take
    #    more registers than there are.
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for layer in tl.range(len(columns)):
        N, R = pick(columns, layer), pick(ranks, layer)
        stride_dhn, stride_wn = pick(strides_dhn, layer), pick(strides_wn, layer)
        dh_ptrs_m = pick(dh_ptrs, layer) + offs_m[:, None] * pick(strides_dhm, layer)
        acc, acc_q = accumulate(
            acc,
            dh_ptrs_m + offs_n[None, :] * stride_dhn,
            pick(w_ptrs, layer) + offs_n[:, None] * stride_wn + offs_k[None, :] * pick(strides_wk, layer),
            pick(u_ptrs, layer) + offs_r[None, :] * N + offs_n[:, None],
            mask_m,
            mask_k,
            offs_r < R,
            N,
            stride_dhn,
            stride_wn,
            1,
            APART,
            BLOCK_M,
            BLOCK_K,
            BLOCK_R,
            STAGES,
        )
        acc = add_low_rank(
            acc,
            acc_q,
            q_ptr + offs_m[:, None] + offs_r[None, :] * stride_qr,
            pick(s_ptrs, layer) + offs_r,
            pick(v_ptrs, layer) + offs_r[:, None] * K + offs_k[None, :],
            mask_m,
            mask_k,
            offs_r < R,
            block_k == 0,
            dx_ptr.dtype.element_ty,
        )
        q_ptr += stride_qr * R

    # 4. dx.
    dx_ptrs = dx_ptr + offs_m[:, None] * K + offs_k[None, :]
    tl.store(dx_ptrs, acc.to(dx_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_k[None, :])


def siva_linear_backward(
    dhs: list[Tensor],
    x: Tensor,
    weights: list[Tensor],
    scales: list[Tensor | None],
    us: list[Tensor],
    ss: list[Tensor],
    vs: list[Tensor],
    p: Tensor,
    need_dx: bool,
    need_du: list[bool],
    need_dv: bool,
    need_dbias: list[bool],
    sizes: Sequence[int] = (),
    order: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
    """Gradients of `siva_linear`.

    Args:
        dhs: `(*, N_i)` each, the gradients of h. Any strides, here and below.
        x: `(*, K)`; not read without `need_dv`, and may then have 0 elements.
        weights, scales, us, ss, vs, sizes, order: as in the forward.
        p: p^T of the forward; not read where no dU is needed, and may then have 0 elements.
        need_dx, need_du, need_dv, need_dbias: which gradients to compute.

    Returns:
        dx `(*, K)`, each dU `(N_i, R_i)`, dV of all `(sum of R_i, K)` and each db `(N_i,)`, contiguous; 0 elements in
        place of one that is not needed.

    Notes:
        q is computed once, with dx where that is needed. No atomics: repeats are bit-equal. ATen serves what it serves
        in the forward, and db.
    """
    ranks, columns = lengths(ss), lengths(us)
    if not is_for_kernels(dhs[0], max(ranks), bool(sizes)):
        return aten.siva_linear_backward(
            dhs, x, weights, scales, us, ss, vs, p, need_dx, need_du, need_dv, need_dbias, sizes, order
        )
    rows = [as_matrix(dh) for dh in dhs]
    dbiases = [dh.sum(0) if need else dh.new_empty(0) for dh, need in zip(rows, need_dbias, strict=True)]
    weights = whole(weights, scales, us, vs, dhs[0].dtype) if need_dx else weights
    if sizes:
        gradients = siva_linear_mixed.backward(
            *dhs, x, *weights, us, ss, vs, p, need_dx, need_du, need_dv, sizes, order
        )
        return *gradients, dbiases
    m, k = len(rows[0]), vs[0].shape[1]
    dx, dv = rows[0].new_empty(0), vs[0].new_empty(0)
    if need_dx or need_dv:
        turned = like(dx, [u.t() for u in us])
        q = dv.new_empty(sum(ranks), m)  # transposed, as p
        if not need_dx:
            for dh, u, part in zip(rows, turned, q.split(ranks), strict=True):
                part.copy_(u @ dh.t())
    if need_dx:
        dx = dx.new_empty(*dhs[0].shape[:-1], k)
        if dx.numel() > 0:
            with torch.cuda.device_of(dx):
                _siva_linear_bwd_dx_kernel[
                    lambda tile: (triton.cdiv(m, tile["BLOCK_M"]) * triton.cdiv(k, tile["BLOCK_N"]),)
                ](
                    tuple(rows),
                    tuple(weights),
                    *dense(turned, ss, vs),
                    dx,
                    q,
                    m,
                    next_power_of_two(m, 16),
                    k,
                    columns,
                    ranks,
                    *strides_of(rows),
                    *strides_of(weights),
                    **constants_of(dx, ranks),
                )
    dus = [u.new_empty(0) for u in us]
    needed = [i for i, need in enumerate(need_du) if need]
    if needed or need_dv:
        parts = p.split(ranks) if needed else ()
        of_us = [Term(rows[i], parts[i].t(), ss[i]) for i in needed]
        of_v = Term(as_matrix(x), q.t(), torch.cat(ss)) if need_dv else None
        found, dv = factor_gradients(of_us, of_v)
        for i, du in zip(needed, found, strict=True):
            dus[i] = du
    return dx, dus, dv, dbiases
