"""SiVA linear layers: a frozen product and a low-rank one in a single kernel, and the gradients of both factors.

One layer is a group of one; several, such as query, key and value, read the same x.

    h_i = x W_i^T + ((x V_i^T) * s_i) U_i^T + b_i         p = x V^T, of all V_i below each other
    dx = sum over i of dh_i W_i + (q_i * s_i) V_i         q_i = dh_i U_i
    dU_i = (dh_i^T p_i) * s_i                             dV_i = s_i * (q_i^T x)

    M    rows of x (all leading dimensions together)    x (M, K)      W_i (N_i, K)  b_i (N_i,)      h_i (M, N_i)
    K    in_features                                    V_i (R_i, K)  s_i (R_i,)    U_i (N_i, R_i)  p_i, q_i (M, R_i)
    N_i  out_features
    R_i  rank

**h.** Every program owns a BLOCK_M x BLOCK_N tile of one h_i. The column blocks of all layers lie side by side, so that
those of one group of row blocks read x from cache whichever layer they belong to. Where PROJECT says so a program
accumulates its rows of p next to x W^T, from the same tiles of x: x is read once, and p makes no trip through memory
before it is used. The price is that every column of tiles computes p anew. At rank 16 or less, with tiles of 128 x 128
and of 128 x 256, that is for each program

                                                           128 x 128     128 x 256
    multiply-adds                                          12.5 %        6.3 %
    loads through the second-level cache                   6.3 %         4.2 %
    reads of shared memory, operands in registers (sm_80)  33 %
    the same, operands in shared memory (sm_90)            42 %          25 %

(`fastpeft.kernels.tiles.siva_linear_clocks`; the third line is also what the machine code for sm_80 has.) The other way
is a small product for p, which reads x once more and costs a launch. Which of them is the shorter depends on the GPU:
`fastpeft.kernels.tiles` estimates it for each launch from the data sheets.

Of few rows there are fewer tiles than multiprocessors; `fastpeft.kernels.siva_linear_split_k` then cuts K into ranges.

**TMA.** On sm_90 and sm_100 the kernels of one layer can read x, W and V by descriptors, in place of an address for
every 16 bytes. Rows must then be aligned and dense; what is not takes addresses. The descriptors are made on the host:
made by the programs, they would cost each of them two or three writes to memory and a fence before its first load, and
Triton an allocator, which is one for all of a process's kernels. A group is launched layer by layer then, since Triton
3.6 takes no tuple of descriptors; dx of a group takes addresses. What Triton 3.9 offers besides gains nothing here by
its machine code. Warp specialisation leaves sm_90's code as it is, fails to compile for sm_100 without p inside, and
spills on sm_120. Programs that go on to further tiles overlap nothing until both loops are one; then U is staged in
shared memory beside x and W, 232 KiB of the 227 that a program can have, and what comes out for sm_100 is empty.

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

A p that a product before the kernel makes costs one more M K in the forward of a group, n of them layer by layer. All
of it is counted, not measured, without the casts of factors. Accumulation is in float32 everywhere. On a GPU products
of float32 operands go to cuBLAS (`fastpeft.kernels.launch.is_for_kernels`).

Source: SiVA, the adaptation by singular vectors described in `fastpeft.siva`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from fastpeft.kernels import tiles
from fastpeft.kernels.launch import is_for_kernels
from fastpeft.kernels.siva_linear_parts import accumulate, add_low_rank, pick, tile_of
from fastpeft.kernels.siva_linear_plan import Plan, dense, lengths, like, plan_of, strides_of
from fastpeft.kernels.siva_linear_split_k import split_k
from fastpeft.ops import aten
from fastpeft.ops.products import as_matrix


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
    K,
    columns,
    ranks,
    biases,
    stride_xm,
    stride_xk,
    strides_wn,
    strides_wk,
    stride_pm,
    stride_pr,
    x_desc,
    w_desc,
    v_desc,
    PROJECT: tl.constexpr,
    APART: tl.constexpr,
    TMA: tl.constexpr,
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

    # 4. Both products from one read of x, or x W^T alone; then the low-rank product on the accumulator.
    acc_h = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc_h, acc_p = accumulate(
        acc_h,
        x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk,
        pick(w_ptrs, layer) + offs_n[None, :] * pick(strides_wn, layer) + offs_k[:, None] * stride_wk,
        pick(v_ptrs, layer) + offs_r[None, :] * K + offs_k[:, None],
        x_desc,
        w_desc,
        v_desc,
        block_m * BLOCK_M,
        block_n * BLOCK_N,
        mask_m,
        mask_n,
        mask_r,
        K,
        stride_xk,
        stride_wk,
        1,
        True,
        PROJECT,
        APART,
        TMA,
        BLOCK_M,
        BLOCK_K,
        BLOCK_R,
        STAGES,
    )
    acc_h = add_low_rank(
        acc_h,
        acc_p,
        p_ptr + offs_m[:, None] * stride_pm + (first_r + offs_r)[None, :] * stride_pr,
        pick(s_ptrs, layer) + offs_r,
        pick(u_ptrs, layer) + offs_n[None, :] * R + offs_r[:, None],
        mask_m,
        mask_n,
        R,
        stride_pr,
        1,
        1,
        block_n == 0,
        x_ptr.dtype.element_ty,
        PROJECT,
        BLOCK_R,
    )

    # 5. The bias, of which a layer without one has no columns, and h.
    mask_bias = offs_n < pick(biases, layer)
    acc_h += tl.load(pick(bias_ptrs, layer) + offs_n, mask=mask_bias, other=0.0).to(tl.float32)[None, :]
    h = pick(h_ptrs, layer) + offs_m[:, None] * N + offs_n[None, :]
    tl.store(h, acc_h.to(h.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


def siva_linear(
    x: Tensor,
    weight: Tensor,
    u: Tensor,
    s: Tensor,
    v: Tensor,
    bias: Tensor | None,
    ways: tuple[str, ...] = tiles.WAYS,
) -> tuple[Tensor, Tensor]:
    """`h = x W^T + ((x V^T) * s) U^T + b` and `p = x V^T`.

    Args:
        x: `(*, K)`, on the device of all operands. Any strides, here and below.
        weight: `(N, K)`, in the dtype of x, as the bias.
        u: `(N, R)`; factors have the dtype of x or float32, as p and their gradients then. What of them and of biases
            is not contiguous is copied.
        s: `(R,)`.
        v: `(R, K)`.
        bias: `(N,)` or None.
        ways: which of `tiles.WAYS` the model of costs picks from, here and below.

    Returns:
        h `(*, N)` and p `(*, R)`, contiguous.

    Notes:
        Fused ATen calls serve ranks above 64 (`tiles.MAX_RANK`); float64, because the kernels accumulate in float32;
        16-bit operands on GPUs before compute capability 8.0, whose matrix units Triton does not use but PyTorch does;
        and float32 on any GPU (`fastpeft.kernels.launch.is_for_kernels`).
    """
    if not is_for_kernels(x, len(s)):
        return aten.siva_linear(x, weight, u, s, v, bias)
    rows, (v_here,) = as_matrix(x), like(x, [v])
    plan = plan_of(rows, [weight], [v_here], (len(weight),), (len(s),), ways)
    p = v.new_empty(*x.shape[:-1], len(s)) if plan.project else F.linear(x, v_here).to(v.dtype)
    (h,) = _outputs(rows, [weight], [u], [s], [v_here], [bias], as_matrix(p), plan)
    return h.view(*x.shape[:-1], len(weight)), p


def siva_linear_group(
    x: Tensor,
    weights: list[Tensor],
    us: list[Tensor],
    ss: list[Tensor],
    vs: list[Tensor],
    biases: list[Tensor | None],
    ways: tuple[str, ...] = tiles.WAYS,
) -> tuple[list[Tensor], Tensor]:
    """Each `h_i = x W_i^T + ((x V_i^T) * s_i) U_i^T + b_i`, and p^T of all layers.

    Args:
        x: `(*, K)`, on the device of all operands; dtypes are as in `siva_linear`. Any strides, here and below.
        weights: `(N_i, K)` each.
        us: `(N_i, R_i)` each.
        ss: `(R_i,)` each.
        vs: `(R_i, K)` each.
        biases: `(N_i,)` each, or None.

    Returns:
        Each h `(*, N_i)`, and p^T `(sum of R_i, M)`, contiguous.

    Notes:
        Copies and calls of ATen are as in `siva_linear`.
    """
    ranks, columns = lengths(ss), lengths(weights)
    if not is_for_kernels(x, max(ranks)):
        return aten.siva_linear_group(x, weights, us, ss, vs, biases)
    rows, vs_here = as_matrix(x), like(x, vs)
    plan = plan_of(rows, weights, vs_here, columns, ranks, ways)
    p = vs[0].new_empty(sum(ranks), len(rows))
    if not plan.project:
        p.copy_(torch.cat(vs_here) @ rows.t())
    hs = _outputs(rows, weights, us, ss, vs_here, biases, p.t(), plan)
    return [h.view(*x.shape[:-1], n) for h, n in zip(hs, columns, strict=True)], p


def _outputs(
    rows: Tensor,
    weights: list[Tensor],
    us: list[Tensor],
    ss: list[Tensor],
    vs: list[Tensor],
    biases: list[Tensor | None],
    p: Tensor,
    plan: Plan,
) -> list[Tensor]:
    """Each h `(M, N_i)`; p `(M, sum of R_i)`, of any strides, is written where the plan computes it, else read."""
    if plan.tile.tma and len(weights) > 1:
        layers = zip(weights, us, ss, vs, biases, p.split(lengths(ss), 1), strict=True)
        return [_outputs(rows, [w], [u], [s], [v], [bias], part, plan)[0] for w, u, s, v, bias, part in layers]
    tile, (m, k), columns = plan.tile, rows.shape, lengths(weights)
    hs = [rows.new_empty(m, n) for n in columns]
    if plan.ranges > 1:
        bias = None if biases[0] is None else biases[0].contiguous()
        split_k(rows, weights[0], us[0], ss[0].contiguous(), vs[0], bias, hs[0], p, plan)
        return hs
    programs = triton.cdiv(m, tile.block_m) * sum(max(triton.cdiv(n, tile.block_n), 1) for n in columns)
    if programs > 0:
        with torch.cuda.device_of(rows):
            _siva_linear_fwd_kernel[(programs,)](
                rows,
                tuple(weights),
                *dense(us, ss, vs),
                tuple(rows if bias is None else bias.contiguous() for bias in biases),  # in its place, never read
                tuple(hs),
                p,
                m,
                k,
                columns,
                lengths(ss),
                tuple(0 if bias is None else len(bias) for bias in biases),
                *rows.stride(),
                *strides_of(weights),
                *p.stride(),
                *plan.descriptors(rows, weights[0], vs[0], (tile.block_n, tile.block_k)),
                **plan.constants,
            )
    return hs
