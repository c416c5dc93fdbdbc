"""SiVA linear layers: a frozen product and a low-rank one in a single kernel, and the gradients of both factors.

One layer is a group of one; several, such as query, key and value, read the same x. Rows of different adapters have
kernels of their own, in `fastpeft.kernels.siva_linear_mixed`.

    h_i = x W_i^T + ((x V_i^T) * s_i) U_i^T + b_i         p = x V^T, of all V_i below each other
    dx = sum over i of dh_i W_i + (q_i * s_i) V_i         q_i = dh_i U_i
    dU_i = (dh_i^T p_i) * s_i                             dV_i = s_i * (q_i^T x)

    M    rows of x (all leading dimensions together)    x (M, K)      W_i (N_i, K)  b_i (N_i,)      h_i (M, N_i)
    K    in_features                                    V_i (R_i, K)  s_i (R_i,)    U_i (N_i, R_i)  p_i, q_i (M, R_i)
    N_i  out_features
    R_i  rank

**h.** Every program owns a BLOCK_M x BLOCK_N tile of one h_i. The column blocks of all layers lie side by side, so that
those of one group of row blocks read x from cache whichever layer they belong to. A program accumulates its rows of p
next to x W^T, from the same tiles of x: x is read once, and p makes no trip through memory before it is used. The price
is that every column of tiles computes p anew: at rank 16 or less 12.5 % more multiply-adds with tiles of 128 x 128, and
6.3 % with tiles of 128 x 256.

**dx.** Every program owns a tile of dx and runs through the layers in order, adding all their terms up in one
accumulator.

**dU, dV.** Each is a term `wide^T narrow * s`, with columns of a wide matrix (dh_i or x) against the R columns of a
narrow one (p_i or q). Every program adds up a range of rows for BLOCK_C columns of one term; the partial sums, in
float32, are then added in a fixed order. The ranges depend on sizes alone and there are no atomics, so repeats are
bit-equal. A program holds up to BLOCK_R columns of the narrow matrix, so dV of a group, whose q stand beside each
other, reads x once as long as their ranks add up to 64.

Elements moved through memory, beside the weights and what has R columns, where a launch reads each operand once:

                 a group                      layer by layer
    forward      M K + sum of M N_i           n M K + sum of M N_i       n layers
    dx           sum of M N_i + M K           sum of M N_i + (4 n - 3) M K, for autograd adds the n dx up two by two
    dV           M K                          n M K
    launches     1, then 4                    n, then 4 n - 1

All of it is counted, not measured, without the casts of factors. Accumulation is in float32 everywhere. On a GPU
products of float32 operands go to cuBLAS (`fastpeft.kernels.launch.is_for_kernels`).

Source: SiVA, the adaptation by singular vectors described in `fastpeft.siva`.
"""

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
from fastpeft.ops import aten
from fastpeft.ops.dispatch import next_power_of_two
from fastpeft.ops.products import as_matrix
from fastpeft.ops.siva_forms import whole


@tiles.Tuned
@triton.jit
def _siva_linear_fwd_kernel(
    x_ptr,
    w_ptrs,
    u_ptrs,
    s_ptrs,
    v_ptrs,
    bias_ptrs,
    h_ptrs,
    p_ptr,
    M,
    rows,
    K,
    columns,
    ranks,
    biases,
    stride_xm,
    stride_xk,
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
    # 1. This program's tile: the layers' column blocks side by side, of each at least one, which stores its p.
    blocks_n = 0
    for i in tl.static_range(len(columns)):
        blocks_n += tl.maximum(tl.cdiv(columns[i], BLOCK_N), 1)
    block_m, block_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), blocks_n, GROUP_M, XCDS)

    # 2. The layer it belongs to, and that layer's first block and first column of p.
    layer, first_block, first_r, blocks, ranks_before = 0, 0, 0, 0, 0
    for i in tl.static_range(len(columns)):
        reached = block_n >= blocks
        layer = tl.where(reached, i, layer)
        first_block = tl.where(reached, blocks, first_block)
        first_r = tl.where(reached, ranks_before, first_r)
        blocks += tl.maximum(tl.cdiv(columns[i], BLOCK_N), 1)
        ranks_before += ranks[i]
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
    stride_pr = tl.full((), 1, tl.int64) * M  # of p^T

    # 4. Both products from one read of x; then the low-rank product on the accumulator.
    acc_h = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc_h, acc_p = accumulate(
        acc_h,
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
        APART,
        BLOCK_M,
        BLOCK_K,
        BLOCK_R,
        STAGES,
    )
    acc_h = add_low_rank(
        acc_h,
        acc_p,
        p_ptr + offs_m[:, None] + (first_r + offs_r)[None, :] * stride_pr,
        pick(s_ptrs, layer) + offs_r,
        pick(u_ptrs, layer) + offs_n[None, :] * R + offs_r[:, None],
        mask_m,
        mask_n,
        mask_r,
        block_n == 0,
        x_ptr.dtype.element_ty,
    )

    # 5. The bias, of which a layer without one has no columns, and h.
    mask_bias = offs_n < pick(biases, layer)
    acc_h += tl.load(pick(bias_ptrs, layer) + offs_n, mask=mask_bias, other=0.0).to(tl.float32)[None, :]
    h = pick(h_ptrs, layer) + offs_m[:, None] * N + offs_n[None, :]
    tl.store(h, acc_h.to(h.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


def siva_linear(
    x: Tensor,
    weights: list[Tensor],
    scales: list[Tensor | None],
    us: list[Tensor],
    ss: list[Tensor],
    vs: list[Tensor],
    biases: list[Tensor | None],
    sizes: Sequence[int] = (),
    order: Tensor | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Each `h_i = x W_i^T + ((x V_i^T) * s_i) U_i^T + b_i`, and p^T of all layers, or adapters.

    Args:
        x: `(*, K)`, on the device of all operands. Any strides, here and below.
        weights: `(N_i, K)` each, in the dtype of x, as the biases; or codes, of which the kernel's weight is made.
        scales: of each weight that is codes, else None.
        us: `(N_i, R_i)` each; factors have the dtype of x or float32, as p and their gradients then. What of them and
            of biases is not contiguous is copied.
        ss: `(R_i,)` each.
        vs: `(R_i, K)` each.
        biases: `(N_i,)` each, or None.
        sizes: empty, or of a batch x `(B, *, K)` of one layer how many rows take each of the factors.
        order: int64 `(B,)`, the permutation that sorts these rows by adapter; None where they are sorted.

    Returns:
        Each h `(*, N_i)`, and p^T `(sum of R_i, M)`, contiguous, or of adapters each `(R_i, rows of it)`, sorted, one
        after the other in one dimension.

    Notes:
        Fused ATen calls serve ranks above 64 (`tiles.MAX_RANK`); float64, because the kernels accumulate in float32;
        16-bit operands on GPUs before compute capability 8.0, whose matrix units Triton does not use but PyTorch does;
        and float32 on any GPU (`fastpeft.kernels.launch.is_for_kernels`).
    """
    ranks, columns = lengths(ss), lengths(us)
    if not is_for_kernels(x, max(ranks), bool(sizes)):
        return aten.siva_linear(x, weights, scales, us, ss, vs, biases, sizes, order)
    weights = whole(weights, scales, us, vs, x.dtype)
    if sizes:
        h, p = siva_linear_mixed.forward(x, *weights, us, ss, vs, *biases, sizes, order)
        return [h], p
    rows = as_matrix(x)
    m, k = rows.shape
    hs = [x.new_empty(*x.shape[:-1], n) for n in columns]
    p = vs[0].new_empty(sum(ranks), m)
    if m == 0:
        return hs, p
    with torch.cuda.device_of(rows):
        _siva_linear_fwd_kernel[
            lambda tile: (
                triton.cdiv(m, tile["BLOCK_M"]) * sum(max(triton.cdiv(n, tile["BLOCK_N"]), 1) for n in columns),
            )
        ](
            rows,
            tuple(weights),
            *dense(us, ss, like(rows, vs)),
            tuple(rows if bias is None else bias.contiguous() for bias in biases),  # in its place, never read
            tuple(hs),
            p,
            m,
            next_power_of_two(m, 16),
            k,
            columns,
            ranks,
            tuple(0 if bias is None else len(bias) for bias in biases),
            *rows.stride(),
            *strides_of(weights),
            **constants_of(rows, ranks),
        )
    return hs, p
