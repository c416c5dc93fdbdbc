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
before it is used. The price is that every column of tiles computes p anew, BLOCK_R / BLOCK_N more multiply-adds (an
eighth at rank 16 or less and 128 columns). The other way is a small product for p, which reads x once more and costs a
launch. By the data sheets of an A100 or H100 (150 or 300 half-precision multiply-adds in the time of one element from
memory) the first pays up to 1,200 or 2,400 columns of h at rank 16, and for any width while all extra work is shorter
than a launch; the second beyond. `fastpeft.kernels.tiles` makes this estimate for each launch.

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
of it is counted, not measured. Accumulation is in float32 everywhere. Operands in float32, which
`fastpeft.ops.candidates` leaves to cuBLAS, are multiplied as `torch.backends.cuda.matmul.fp32_precision` says: in TF32,
or exactly (`ieee`, PyTorch's default).

Source: SiVA, the adaptation by singular vectors described in `fastpeft.siva`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from fastpeft.kernels import tiles
from fastpeft.kernels.launch import device_of, precision, products_within
from fastpeft.ops import aten
from fastpeft.ops.products import as_matrix

GROUP_M = 8  # row blocks that share the tiles of W in cache


@triton.jit
def tile_of(program, blocks_m, blocks_n, GROUP_M: tl.constexpr):
    """The row block and the column block of a program.

    Column blocks vary slowest inside a group of GROUP_M row blocks, so that a group reads each tile of W from cache.
    """
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
    acc_p,
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
    PROJECT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`acc_h + x W^T` and, where PROJECT says so, `acc_p + x V^T`, from one read of x.

    The pointers are to the first tiles along K: (BLOCK_M, BLOCK_K) of x, (BLOCK_K, BLOCK_N) of W^T, (BLOCK_K, BLOCK_R)
    of V^T.
    """
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    step = tl.full((), BLOCK_K, tl.int64)
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
    R,
    stride_pr,
    stride_s,
    stride_ur,
    is_first,
    DTYPE: tl.constexpr,
    PROJECT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """`acc_h + (p * s) U^T`, multiplied in DTYPE.

    With all of p at once where it was computed inside, which the programs of the first column block store; else in
    steps of BLOCK_R columns of the p that a product before this kernel stored. The pointers are to the first tiles
    along R: (BLOCK_M, BLOCK_R) of p, (BLOCK_R,) of s, (BLOCK_R, BLOCK_N) of U^T.
    """
    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
    if PROJECT:
        mask_r = offs_r < R
        if is_first:
            tl.store(p_ptrs, acc_p.to(p_ptrs.dtype.element_ty), mask=mask_m[:, None] & mask_r[None, :])
        s = tl.load(s_ptrs, mask=mask_r, other=0.0).to(tl.float32)
        u = tl.load(u_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0).to(DTYPE)
        acc_h = tl.dot((acc_p * s[None, :]).to(DTYPE), u, acc_h, input_precision=PRECISION)
    else:
        step = tl.full((), BLOCK_R, tl.int64)
        for r in tl.range(0, R, BLOCK_R, num_stages=1):  # few steps, which pipelining would only make spill
            mask_r = offs_r < R - r
            p = tl.load(p_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0).to(tl.float32)
            s = tl.load(s_ptrs, mask=mask_r, other=0.0).to(tl.float32)
            u = tl.load(u_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0).to(DTYPE)
            acc_h = tl.dot((p * s[None, :]).to(DTYPE), u, acc_h, input_precision=PRECISION)
            p_ptrs += step * stride_pr
            s_ptrs += step * stride_s
            u_ptrs += step * stride_ur
    return acc_h


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
    PRECISION: tl.constexpr,
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
        acc = tl.dot(wide, narrow, acc, input_precision=PRECISION)
    return acc


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
        PRECISION,
        BLOCK_R,
    )

    # 5. The bias, of which a layer without one has no columns, and h.
    mask_bias = offs_n < pick(biases, layer)
    acc_h += tl.load(pick(bias_ptrs, layer) + offs_n, mask=mask_bias, other=0.0).to(tl.float32)[None, :]
    h = pick(h_ptrs, layer) + offs_m[:, None] * N + offs_n[None, :]
    tl.store(h, acc_h.to(h.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


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
            dx_ptr.dtype.element_ty,
            PROJECT,
            PRECISION,
            BLOCK_R,
        )
        q_ptr += stride_qr * R

    # 4. dx.
    dx_ptrs = dx_ptr + offs_m[:, None] * K + offs_k[None, :]
    tl.store(dx_ptrs, acc.to(dx_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_k[None, :])


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
    PRECISION: tl.constexpr,
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
        PRECISION,
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


def siva_linear_fwd(
    x: Tensor, weight: Tensor, u: Tensor, s: Tensor, v: Tensor, bias: Tensor | None
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

    Returns:
        h `(*, N)` and p `(*, R)`, contiguous.

    Notes:
        Fused ATen calls serve ranks above 64 (`tiles.MAX_RANK`); float64, because the kernels accumulate in float32;
        and 16-bit operands on cards before compute capability 8.0, whose matrix units Triton does not use but PyTorch
        does.
    """
    kind = products_within(x, len(s))
    if kind is None:
        return aten.siva_linear(x, weight, u, s, v, bias)
    rows = as_matrix(x)
    plan = _plan(len(rows), weight.shape[1], (len(weight),), (len(s),), kind, x.device)
    p = v.new_empty(*x.shape[:-1], len(s)) if plan.project else F.linear(x, v.to(x.dtype)).to(v.dtype)
    (h,) = _outputs(rows, [weight], [u], [s], [v], [bias], as_matrix(p), plan)
    return h.view(*x.shape[:-1], len(weight)), p


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
    """Gradients of `siva_linear_fwd`: those of a group of one.

    Args:
        dh: `(*, N)`, the gradient of h. Any strides, here and below.
        x: `(*, K)`; not read without `need_dv`, and may then have 0 elements.
        weight, u, s, v: as in the forward.
        p: `(*, R)` of the forward; not read without `need_du`, and may then have 0 elements.
        need_dx, need_du, need_dv, need_dbias: which gradients to compute.

    Returns:
        dx `(*, K)`, dU `(N, R)`, dV `(R, K)` and db `(N,)`, contiguous; 0 elements in place of one that is not needed.
    """
    if products_within(dh, len(s)) is None:
        return aten.siva_linear_backward(dh, x, weight, u, s, v, p, need_dx, need_du, need_dv, need_dbias)
    turned = as_matrix(p).t() if need_du else p
    dx, (du,), dv, (dbias,) = siva_linear_group_backward(
        [dh], x, [weight], [u], [s], [v], turned, need_dx, [need_du], need_dv, [need_dbias]
    )
    return dx, du, dv, dbias


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
        x: `(*, K)`, on the device of all operands; dtypes are as in `siva_linear_fwd`. Any strides, here and below.
        weights: `(N_i, K)` each.
        us: `(N_i, R_i)` each.
        ss: `(R_i,)` each.
        vs: `(R_i, K)` each.
        biases: `(N_i,)` each, or None.

    Returns:
        Each h `(*, N_i)`, and p^T `(sum of R_i, M)`, contiguous.

    Notes:
        Copies and calls of ATen are as in `siva_linear_fwd`.
    """
    ranks, columns = _sizes(ss), _sizes(weights)
    kind = products_within(x, max(ranks))
    if kind is None:
        return aten.siva_linear_group(x, weights, us, ss, vs, biases)
    rows = as_matrix(x)
    plan = _plan(len(rows), weights[0].shape[1], columns, ranks, kind, x.device)
    of_all = torch.cat(vs)
    p = of_all.new_empty(sum(ranks), len(rows)) if plan.project else (of_all.to(x.dtype) @ rows.t()).to(of_all.dtype)
    hs = _outputs(rows, weights, us, ss, vs, biases, p.t(), plan)
    return [h.view(*x.shape[:-1], n) for h, n in zip(hs, columns, strict=True)], p


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
        q is computed once, with dx where that is needed. No atomics: repeats are bit-equal. ATen serves what it serves
        in the forward, and db.
    """
    ranks, columns = _sizes(ss), _sizes(weights)
    kind = products_within(dhs[0], max(ranks))
    if kind is None:
        return aten.siva_linear_group_backward(dhs, x, weights, us, ss, vs, p, need_dx, need_du, need_dv, need_dbias)
    rows = [as_matrix(dh) for dh in dhs]
    m, k = len(rows[0]), weights[0].shape[1]
    dx, dv = rows[0].new_empty(0), vs[0].new_empty(0)
    plan = _plan(m, sum(columns), (k,), ranks, kind, dx.device)
    if need_dx or need_dv:
        us_here = [u.to(dx.dtype) for u in us]  # read anew at each step along N
        q = dv.new_empty(sum(ranks), m)  # transposed, as p
        if not (plan.project and need_dx):
            for dh, u, part in zip(rows, us_here, q.split(ranks), strict=True):
                part.copy_(u.t() @ dh.t())
    if need_dx:
        dx = dx.new_empty(*dhs[0].shape[:-1], k)
        if dx.numel() > 0:
            with device_of(dx):
                _siva_linear_bwd_dx_kernel[(triton.cdiv(m, plan.block_m) * triton.cdiv(k, plan.block_n),)](
                    tuple(rows),
                    tuple(weights),
                    *_dense(us_here, ss, vs),
                    dx,
                    q,
                    m,
                    k,
                    columns,
                    ranks,
                    *_strides(rows),
                    *_strides(weights),
                    **plan.constants,
                )
    dus = [u.new_empty(0) for u in us]
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


class _Plan(NamedTuple):
    """How a launch is cut into programs, and whether they compute p."""

    block_m: int
    block_n: int
    project: bool
    constants: dict[str, object]  # of the kernels of h and of dx


def _plan(m: int, k: int, columns: tuple[int, ...], ranks: tuple[int, ...], kind: str, device: torch.device) -> _Plan:
    """Of products that sum over k, into `(m, columns)`, for layers of these ranks."""
    tile, project = tiles.siva_linear((m,), k, columns, max(ranks), kind, tiles.card(device), len(ranks) > 1)
    constants = {
        "PROJECT": project,
        "PRECISION": precision(kind),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "BLOCK_R": tiles.rank_block(max(ranks)) if project else tiles.RANK_STEP,
        "GROUP_M": GROUP_M,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": True,
    }
    return _Plan(tile.block_m, tile.block_n, project, constants)


def _outputs(
    rows: Tensor,
    weights: list[Tensor],
    us: list[Tensor],
    ss: list[Tensor],
    vs: list[Tensor],
    biases: list[Tensor | None],
    p: Tensor,
    plan: _Plan,
) -> list[Tensor]:
    """Each h `(M, N_i)`; p `(M, sum of R_i)`, of any strides, is written where the plan computes it, else read."""
    m, k = rows.shape
    columns = _sizes(weights)
    hs = [rows.new_empty(m, n) for n in columns]
    programs = triton.cdiv(m, plan.block_m) * sum(max(triton.cdiv(n, plan.block_n), 1) for n in columns)
    if programs > 0:
        with device_of(rows):
            _siva_linear_fwd_kernel[(programs,)](
                rows,
                tuple(weights),
                *_dense(us, ss, [v.to(rows.dtype) for v in vs]),  # V is read anew at each step along K
                tuple(rows if bias is None else bias.contiguous() for bias in biases),  # in its place, never read
                tuple(hs),
                p,
                m,
                k,
                columns,
                _sizes(ss),
                tuple(0 if bias is None else len(bias) for bias in biases),
                *rows.stride(),
                *_strides(weights),
                *p.stride(),
                **plan.constants,
            )
    return hs


def _sizes(tensors: list[Tensor]) -> tuple[int, ...]:
    return tuple(t.shape[0] for t in tensors)


def _strides(matrices: list[Tensor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The strides of the rows of each, and of the columns."""
    return tuple(matrix.stride(0) for matrix in matrices), tuple(matrix.stride(1) for matrix in matrices)


def _dense(*operands: list[Tensor]) -> tuple[tuple[Tensor, ...], ...]:
    """The factors of all layers, each contiguous."""
    return tuple(tuple(t.contiguous() for t in each) for each in operands)


class Term(NamedTuple):
    """`wide^T narrow * s`, of wide `(M, C)`, narrow `(M, R)` and s `(R,)`, all of any strides."""

    wide: Tensor
    narrow: Tensor
    s: Tensor


def factors(of_us: list[Term], of_v: Term | None, kind: str) -> tuple[list[Tensor], Tensor]:
    """Each dU `(C, R)`, slices of one tensor, and dV `(R, C)`, 0 elements where it has no term; at least one term."""
    terms = [*of_us, of_v] if of_v else of_us
    wides, narrows, ss = zip(*terms, strict=True)
    m = wides[0].shape[0]
    columns, ranks = (tuple(t.shape[1] for t in each) for each in (wides, narrows))
    sizes = [c * r for c, r in zip(columns, ranks, strict=True)]
    strides = [(r, 1) for r in ranks[: len(of_us)]] + [(1, c) for c in columns[len(of_us) :]]
    tile, block_r = tiles.SIVA_LINEAR_SUMS[kind], tiles.rank_block(min(max(ranks), tiles.MAX_RANK))
    rows = tiles.siva_linear_bwd_rows(m, block_r)
    splits = max(triton.cdiv(m, rows), 1)
    blocks = sum(triton.cdiv(c, tile.block_c) * triton.cdiv(r, block_r) for c, r in zip(columns, ranks, strict=True))
    partial = ss[0].new_empty(splits, sum(sizes), dtype=torch.float32)
    if blocks > 0:
        with device_of(partial):
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
                PRECISION=precision(kind),
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
        with device_of(partial):
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
