"""SiVA layers that read the same x, such as query, key and value: one launch for all, forward and for dx.

    h_i = x W_i^T + ((x V_i^T) * s_i) U_i^T + b_i         p = x V^T, of all V_i below each other
    dx = sum over i of dh_i W_i + (q_i * s_i) V_i         q_i = dh_i U_i
    dU_i = (dh_i^T p_i) * s_i                             dV_i = s_i * (q_i^T x)

Letters are those of `fastpeft.kernels.siva_linear`; N_i and R_i differ from layer to layer, p^T and q^T are
(sum of R_i, M). In the forward every program owns a tile of one h_i, and the column blocks of all layers lie side by
side, so that those of one group of row blocks read x from cache whichever layer they belong to. In the backward every
program owns a tile of dx and runs through the layers in order, adding all their terms up in one accumulator.

Elements moved through memory, beside the weights and what has R columns, where a launch reads each operand once:

                 here                             layer by layer
    forward      M K + sum of M N_i               n M K + sum of M N_i       n layers
    dx           sum of M N_i + M K               sum of M N_i + (4 n - 3) M K, for autograd adds the n dx up two by two
    dV           M K                              n M K
    launches     1, then 4                        n, then 4 n - 1

A p that a product before the kernel makes (see `fastpeft.kernels.siva_linear` for when) costs one more M K in the
forward here, n of them there. All of it is counted, not measured.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpeft.kernels import tiles
from fastpeft.kernels.launch import device_of, precision, products_within
from fastpeft.kernels.siva_linear_factors import Term, factors
from fastpeft.kernels.siva_linear_tile import GROUP_M, accumulate, add_low_rank, pick, tile_of
from fastpeft.ops import aten
from fastpeft.ops.products import as_matrix


@triton.jit
def _siva_linear_group_fwd_kernel(
    x_ptr,
    w_ptrs,
    u_ptrs,
    s_ptrs,
    v_ptrs,
    bias_ptrs,
    h_ptrs,
    p_ptr,
    M,
    K,
    columns,
    ranks,
    biases,
    stride_xm,
    stride_xk,
    strides_wn,
    strides_wk,
    PROJECT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # 1. This program's tile: the layers' column blocks side by side, of each at least one, which stores its p.
    blocks_n = 0
    for i in tl.static_range(len(columns)):
        blocks_n += tl.maximum(tl.cdiv(columns[i], BLOCK_N), 1)
    block_m, block_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), blocks_n, GROUP_M)

    # 2. The layer it belongs to, and that layer's first block and first row of p^T.
    layer, first_block, first_r, blocks, rows_r = 0, 0, 0, 0, 0
    for i in tl.static_range(len(columns)):
        reached = block_n >= blocks
        layer = tl.where(reached, i, layer)
        first_block = tl.where(reached, blocks, first_block)
        first_r = tl.where(reached, rows_r, first_r)
        blocks += tl.maximum(tl.cdiv(columns[i], BLOCK_N), 1)
        rows_r += ranks[i]
    N, R = pick(columns, layer), pick(ranks, layer)
    block_n -= first_block

    # 3. Offsets, in 64 bits: rows times stride can pass 2^31. U (N, R) and V (R, K) are contiguous.
    offs_m = block_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = block_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
    mask_m = offs_m < M
    mask_n = offs_n < N
    mask_r = offs_r < R
    stride_wk = pick(strides_wk, layer)

    # 4. Both products from one read of x, or x W^T alone; then the low-rank product on the accumulator.
    acc_h = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc_p = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    acc_h, acc_p = accumulate(
        acc_h,
        acc_p,
        x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk,
        pick(w_ptrs, layer) + offs_n[None, :] * pick(strides_wn, layer) + offs_k[:, None] * stride_wk,
        pick(v_ptrs, layer) + offs_r[None, :] * K + offs_k[:, None],
        mask_m,
        mask_n,
        mask_r,
        K,
        stride_xk,
        stride_wk,
        1,
        PROJECT,
        PRECISION,
        BLOCK_K,
    )
    stride_pr = tl.full((), 1, tl.int64) * M
    acc_h = add_low_rank(
        acc_h,
        acc_p,
        p_ptr + offs_m[:, None] + (first_r + offs_r)[None, :] * stride_pr,
        pick(s_ptrs, layer) + offs_r,
        pick(u_ptrs, layer) + offs_n[None, :] * R + offs_r[:, None],
        mask_m,
        mask_n,
        R,
        stride_pr,
        1,
        1,
        block_n == 0,
        PROJECT,
        PRECISION,
        BLOCK_R,
    )

    # 5. The bias, of which a layer without one has no columns, and h.
    mask_bias = offs_n < pick(biases, layer)
    acc_h += tl.load(pick(bias_ptrs, layer) + offs_n, mask=mask_bias, other=0.0).to(tl.float32)[None, :]
    h = pick(h_ptrs, layer) + offs_m[:, None] * N + offs_n[None, :]
    tl.store(h, acc_h.to(h.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit
def _siva_linear_group_bwd_dx_kernel(
    dh_ptrs,
    w_ptrs,
    u_ptrs,
    s_ptrs,
    v_ptrs,
    dx_ptr,
    q_ptr,
    M,
    K,
    columns,
    ranks,
    strides_dhm,
    strides_dhn,
    strides_wn,
    strides_wk,
    PROJECT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # 1. This program's tile: columns of dx are K, and the products sum over the N_i.
    blocks_k = tl.maximum(tl.cdiv(K, BLOCK_N), 1)
    block_m, block_k = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), blocks_k, GROUP_M)

    # 2. Offsets, in 64 bits: rows times stride can pass 2^31. U (N, R) and V (R, K) are contiguous.
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
        R = pick(ranks, layer)
        stride_dhn, stride_wn = pick(strides_dhn, layer), pick(strides_wn, layer)
        dh_ptrs_m = pick(dh_ptrs, layer) + offs_m[:, None] * pick(strides_dhm, layer)
        acc_q = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        acc, acc_q = accumulate(
            acc,
            acc_q,
            dh_ptrs_m + offs_n[None, :] * stride_dhn,
            pick(w_ptrs, layer) + offs_n[:, None] * stride_wn + offs_k[None, :] * pick(strides_wk, layer),
            pick(u_ptrs, layer) + offs_n[:, None] * R + offs_r[None, :],
            mask_m,
            mask_k,
            offs_r < R,
            pick(columns, layer),
            stride_dhn,
            stride_wn,
            R,
            PROJECT,
            PRECISION,
            BLOCK_K,
        )
        acc = add_low_rank(
            acc,
            acc_q,
            q_ptr + offs_m[:, None] + offs_r[None, :] * stride_qr,
            pick(s_ptrs, layer) + offs_r,
            pick(v_ptrs, layer) + offs_r[:, None] * K + offs_k[None, :],
            mask_m,
            mask_k,
            R,
            stride_qr,
            1,
            K,
            block_k == 0,
            PROJECT,
            PRECISION,
            BLOCK_R,
        )
        q_ptr += stride_qr * R

    # 4. dx.
    dx_ptrs = dx_ptr + offs_m[:, None] * K + offs_k[None, :]
    tl.store(dx_ptrs, acc.to(dx_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_k[None, :])


def siva_linear_group(
    x: Tensor,
    weights: list[Tensor],
    us: list[Tensor],
    ss: list[Tensor],
    vs: list[Tensor],
    biases: list[Tensor | None],
) -> tuple[list[Tensor], Tensor]:
    """Each `h_i = x W_i^T + ((x V_i^T) * s_i) U_i^T + b_i`, and p^T of all layers.

    Args:
        x: `(*, K)`; all operands share its dtype and device. Any strides, here and below.
        weights: `(N_i, K)` each.
        us: `(N_i, R_i)` each; factors and biases that are not contiguous are copied.
        ss: `(R_i,)` each.
        vs: `(R_i, K)` each.
        biases: `(N_i,)` each, or None.

    Returns:
        Each h `(*, N_i)`, and p^T `(sum of R_i, M)`, contiguous.

    Notes:
        Fused ATen calls serve what they serve in `siva_linear_fwd`.
    """
    ranks, columns = _sizes(ss), _sizes(weights)
    kind = products_within(x, max(ranks))
    if kind is None:
        return aten.siva_linear_group(x, weights, us, ss, vs, biases)
    rows = as_matrix(x)
    m, k = rows.shape
    hs = [x.new_empty(*x.shape[:-1], n) for n in columns]
    tile, project = tiles.siva_linear((m,), k, columns, max(ranks), kind, tiles.card(x.device), shared=True)
    p = x.new_empty(sum(ranks), m) if project else torch.cat(vs) @ rows.t()
    programs = triton.cdiv(m, tile.block_m) * sum(max(triton.cdiv(n, tile.block_n), 1) for n in columns)
    if programs > 0:
        with device_of(x):
            _siva_linear_group_fwd_kernel[(programs,)](
                rows,
                tuple(weights),
                *_dense(us, ss, vs),
                tuple(x if bias is None else bias.contiguous() for bias in biases),  # x in its place is never read
                tuple(hs),
                p,
                m,
                k,
                columns,
                ranks,
                tuple(0 if bias is None else len(bias) for bias in biases),
                *rows.stride(),
                *_strides(weights),
                **_launch(tile, project, max(ranks), kind),
            )
    return hs, p


def siva_linear_group_backward(
    dhs: list[Tensor],
    x: Tensor,
    weights: list[Tensor],
    us: list[Tensor],
    ss: list[Tensor],
    vs: list[Tensor],
    p: Tensor,
    need_dx: bool,
    need_du: list[bool],
    need_dv: bool,
    need_dbias: list[bool],
) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
    """Gradients of `siva_linear_group`.

    Args:
        dhs: `(*, N_i)` each, the gradients of h. Any strides, here and below.
        x: `(*, K)`; not read without `need_dv`, and may then have 0 elements.
        weights, us, ss, vs: as in the forward.
        p: p^T of the forward; not read where no dU is needed, and may then have 0 elements.
        need_dx, need_du, need_dv, need_dbias: which gradients to compute.

    Returns:
        dx `(*, K)`, each dU `(N_i, R_i)`, dV of all `(sum of R_i, K)` and each db `(N_i,)`, contiguous; 0 elements in
        place of one that is not needed.

    Notes:
        No atomics: repeats are bit-equal. ATen serves what it serves in the forward, and db.
    """
    ranks, columns = _sizes(ss), _sizes(weights)
    kind = products_within(dhs[0], max(ranks))
    if kind is None:
        return aten.siva_linear_group_backward(dhs, x, weights, us, ss, vs, p, need_dx, need_du, need_dv, need_dbias)
    rows = [as_matrix(dh) for dh in dhs]
    m, k = rows[0].shape[0], weights[0].shape[1]
    dx, dv = (rows[0].new_empty(0) for _ in range(2))
    tile, project = tiles.siva_linear((m,), sum(columns), (k,), max(ranks), kind, tiles.card(dx.device), shared=True)
    if need_dx or need_dv:
        q = dx.new_empty(sum(ranks), m)  # transposed, as p
        if not (project and need_dx):
            for dh, u, part in zip(rows, us, q.split(ranks), strict=True):
                torch.mm(u.t(), dh.t(), out=part)
    if need_dx:
        dx = dx.new_empty(*dhs[0].shape[:-1], k)
        programs = triton.cdiv(m, tile.block_m) * max(triton.cdiv(k, tile.block_n), 1)
        if programs > 0:
            with device_of(dx):
                _siva_linear_group_bwd_dx_kernel[(programs,)](
                    tuple(rows),
                    tuple(weights),
                    *_dense(us, ss, vs),
                    dx,
                    q,
                    m,
                    k,
                    columns,
                    ranks,
                    *_strides(rows),
                    *_strides(weights),
                    **_launch(tile, project, max(ranks), kind),
                )
    dus = [dx.new_empty(0) for _ in us]
    needed = [i for i, need in enumerate(need_du) if need]
    if needed or need_dv:
        parts = p.split(ranks) if needed else ()
        of_us = [Term(rows[i], parts[i].t(), ss[i]) for i in needed]
        of_v = Term(as_matrix(x), q.t(), torch.cat(ss)) if need_dv else None
        found, dv = factors(of_us, of_v, kind)
        for i, du in zip(needed, found, strict=True):
            dus[i] = du
    dbiases = [dh.sum(0) if need else dh.new_empty(0) for dh, need in zip(rows, need_dbias, strict=True)]
    return dx, dus, dv, dbiases


def _sizes(tensors: list[Tensor]) -> tuple[int, ...]:
    return tuple(t.shape[0] for t in tensors)


def _strides(matrices: list[Tensor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The strides of the rows of each, and of the columns."""
    return tuple(matrix.stride(0) for matrix in matrices), tuple(matrix.stride(1) for matrix in matrices)


def _dense(*operands: list[Tensor]) -> tuple[tuple[Tensor, ...], ...]:
    """The factors of all layers, each contiguous."""
    return tuple(tuple(t.contiguous() for t in each) for each in operands)


def _launch(tile: tiles.Tile, project: bool, rank: int, kind: str) -> dict[str, object]:
    """The constants that both kernels take."""
    return {
        "PROJECT": project,
        "PRECISION": precision(kind),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "BLOCK_R": tiles.rank_block(rank) if project else tiles.RANK_STEP,
        "GROUP_M": GROUP_M,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": True,
    }
