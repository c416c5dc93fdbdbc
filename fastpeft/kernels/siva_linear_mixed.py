"""SiVA for a batch whose rows belong to different adapters: one launch over all rows, in either direction.

    h = x W^T + ((x V_i^T) * s_i) U_i^T + b          p = x V_i^T, where i is the adapter of the row
    dx = dh W + ((dh U_i) * s_i) V_i                 q = dh U_i
    dU_i = (dh_i^T p_i) * s_i                        dV_i = s_i * (q_i^T x_i), over the rows of i

Letters are those of `fastpeft.kernels.siva_linear`. `order` sorts the rows of the batch, each of so many tokens, by
adapter. Blocks of BLOCK_M sorted rows do not reach from one adapter into the next; a table made on the host tells each
where its rows end, which factors it takes and where its p goes. The factors of all adapters stand in one tensor, a copy
of what has R columns. A program fetches its rows of x through `order` and puts those of h back, so nothing is sorted in
memory, and p is always computed inside. As for one layer, dx is h with dh, W^T, V^T and U^T in the places of x, W, U
and V. The table leaves page-locked memory without a wait, and is made once for the same numbers of rows.

Elements moved through memory, beside the weights and what has R columns, where a launch reads each operand once, and
launches for A adapters (here three of the first and of the second four put factors together):

                 here                           by fused ATen calls
    forward      M K + M N                      2 M K (to sort) + 2 M K + 3 M N + 2 M N (to sort back)
    dx           M N + M K                      2 M N (to sort) + 2 M N + 3 M K + 2 M K (to sort back)
    dU, dV       M N + M K                      M N + 3 M K (of which 2 to sort)
    launches     4, then 4 and 3                3 A + 3, then 3 A + 3 and 3 A + 1

All of it is counted, not measured, without the casts of factors. Rows without an adapter have rank 0, and their
programs multiply by zeros.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpeft.kernels import tiles
from fastpeft.kernels.siva_linear_parts import accumulate, add_low_rank, constants_of, lengths, pick, tile_of
from fastpeft.kernels.siva_linear_sums import add_up, rows_of, sum_over_rows
from fastpeft.ops.products import as_matrix

_BLOCK_FIELDS = tl.constexpr(6)  # of the table of row blocks
_ADAPTER_FIELDS = tl.constexpr(9)  # of the table of adapters


@triton.jit
def _siva_linear_mixed_kernel(
    x_ptr,
    w_ptr,
    u_ptr,
    s_ptr,
    v_ptr,
    bias_ptr,
    h_ptr,
    p_ptr,
    order_ptr,
    table_ptr,
    blocks_m,
    tokens,
    K,
    N,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_un,
    stride_ur,
    stride_vr,
    stride_vk,
    HAS_BIAS: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    APART: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    XCDS: tl.constexpr,
    STAGES: tl.constexpr,
):
    # 1. This program's tile, and what the table says of its rows: the first, the end of its adapter's, the adapter's
    #    first column of all factors and rank, and where p^T has the element of row 0 and how far its rows are apart.
    block_m, block_n = tile_of(tl.program_id(0), blocks_m, tl.maximum(tl.cdiv(N, BLOCK_N), 1), GROUP_M, XCDS)
    table_ptr += block_m * _BLOCK_FIELDS
    first_row = tl.load(table_ptr)
    last_row = tl.load(table_ptr + 1)
    first_r = tl.load(table_ptr + 2)
    R = tl.load(table_ptr + 3)
    p_ptr += tl.load(table_ptr + 4)
    stride_pr = tl.load(table_ptr + 5)

    # 2. Offsets, in 64 bits as the table: rows times stride can pass 2^31.
    offs_m = first_row + tl.arange(0, BLOCK_M)
    offs_n = block_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
    mask_m = offs_m < last_row
    mask_n = offs_n < N
    rows = rows_of(order_ptr, offs_m, mask_m, tokens, HAS_ORDER)

    # 3. Both products from one read of x; then the low-rank product on the accumulator.
    acc_h = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc_h, acc_p = accumulate(
        acc_h,
        x_ptr + rows[:, None] * stride_xm + offs_k[None, :] * stride_xk,
        w_ptr + offs_n[None, :] * stride_wn + offs_k[:, None] * stride_wk,
        v_ptr + (first_r + offs_r)[None, :] * stride_vr + offs_k[:, None] * stride_vk,
        mask_m,
        mask_n,
        offs_r < R,
        K,
        stride_xk,
        stride_wk,
        stride_vk,
        APART,
        BLOCK_M,
        BLOCK_K,
        BLOCK_R,
        STAGES,
    )
    acc_h = add_low_rank(
        acc_h,
        acc_p,
        p_ptr + offs_m[:, None] + offs_r[None, :] * stride_pr,
        s_ptr + first_r + offs_r,
        u_ptr + offs_n[None, :] * stride_un + (first_r + offs_r)[:, None] * stride_ur,
        mask_m,
        mask_n,
        offs_r < R,
        block_n == 0,
        x_ptr.dtype.element_ty,
    )

    # 4. The bias, and h in the order of x.
    if HAS_BIAS:
        acc_h += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    h_ptrs = h_ptr + rows[:, None] * N + offs_n[None, :]
    tl.store(h_ptrs, acc_h.to(h_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit
def _siva_linear_mixed_bwd_partials_kernel(
    dh_ptr,
    p_ptr,
    x_ptr,
    q_ptr,
    s_ptr,
    partial_ptr,
    order_ptr,
    table_ptr,
    tokens,
    K,
    N,
    rows,
    size,
    stride_dhm,
    stride_dhn,
    stride_xm,
    stride_xk,
    HAS_ORDER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    # 1. What the table says of this program's adapter, and its rows: those of its split, which may be none.
    table_ptr += tl.program_id(2) * _ADAPTER_FIELDS
    first_row = tl.load(table_ptr)
    last_row = tl.load(table_ptr + 1)
    first_r = tl.load(table_ptr + 2)
    R = tl.load(table_ptr + 3)
    stride_r = tl.load(table_ptr + 4)  # of p^T and q^T
    split = tl.program_id(1).to(tl.int64)
    first_row += split * rows
    last_row = tl.minimum(first_row + rows, last_row)

    # 2. The first blocks belong to dh^T p, the others to x^T q: the matrices, and where the sum goes, if it is needed.
    block = tl.program_id(0)
    blocks_n = tl.cdiv(N, BLOCK_C)
    is_v = (block >= blocks_n).to(tl.int32)
    block -= is_v * blocks_n
    narrow_ptr = pick((p_ptr, q_ptr), is_v) + tl.load(table_ptr + 5 + is_v)
    start = tl.load(table_ptr + 7 + is_v)
    columns = pick((N, K), is_v)
    stride_pc, stride_pr = tl.where(is_v == 1, 1, R), tl.where(is_v == 1, K, 1)  # dU (N, R), dV (R, K)

    # 3. The sum, times s.
    offs_c = block.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
    mask_c = offs_c < columns
    mask_r = offs_r < R
    if start >= 0:
        acc = sum_over_rows(
            pick((dh_ptr, x_ptr), is_v),
            narrow_ptr,
            order_ptr,
            tokens,
            offs_c,
            offs_r,
            mask_c,
            mask_r,
            first_row,
            last_row,
            pick((stride_dhm, stride_xm), is_v),
            pick((stride_dhn, stride_xk), is_v),
            1,
            stride_r,
            HAS_ORDER,
            BLOCK_M,
            BLOCK_C,
            BLOCK_R,
        )
        s = tl.load(s_ptr + first_r + offs_r, mask=mask_r, other=0.0).to(tl.float32)
        partial_ptrs = partial_ptr + split * size + start + offs_c[:, None] * stride_pc + offs_r[None, :] * stride_pr
        tl.store(partial_ptrs, acc * s[None, :], mask=mask_c[:, None] & mask_r[None, :])


def forward(
    x: Tensor,
    weight: Tensor,
    us: list[Tensor],
    ss: list[Tensor],
    vs: list[Tensor],
    bias: Tensor | None,
    sizes: Sequence[int],
    order: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """h `(B, *, N)` in the order of x, and p^T, as `fastpeft.kernels.siva_linear.siva_linear` says."""
    return _linear(x, weight, torch.cat(us, 1), torch.cat(ss), torch.cat(vs), bias, order, _rows(x, sizes), lengths(ss))


def backward(
    dh: Tensor,
    x: Tensor,
    weight: Tensor,
    us: list[Tensor],
    ss: list[Tensor],
    vs: list[Tensor],
    p: Tensor,
    need_dx: bool,
    need_du: list[bool],
    need_dv: bool,
    sizes: Sequence[int],
    order: Tensor | None,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """dx, each dU and all dV, as `fastpeft.kernels.siva_linear_backward.siva_linear_backward` says."""
    s, rows, ranks, shape = torch.cat(ss), _rows(dh, sizes), lengths(ss), (sum(lengths(ss)), weight.shape[1])
    dx, q, dv = dh.new_empty(0), s.new_empty(0), s.new_empty(0)
    dus = [u.new_empty(0) for u in us]
    if need_dx or need_dv:
        u, v = torch.cat(us, 1), torch.cat(vs)
        columns = weight.shape[1] if need_dx else 0  # of dx; none leave q
        found, q = _linear(dh, weight.t()[:columns], v.t()[:columns], s, u.t(), None, order, rows, ranks)
        dx = found if need_dx else dx
    if need_dv or any(need_du):
        n, k = weight.shape[0] if any(need_du) else 0, weight.shape[1] if need_dv else 0
        adapters = _Adapters(rows, ranks, tuple(need_du), need_dv, n, k)
        wide = as_matrix(dh), as_matrix(x) if k > 0 else as_matrix(dh)[:, :0]
        p = p.contiguous() if any(need_du) else q  # never read
        du, of_v = _factor_gradients(*wide, p, q, s, order, math.prod(dh.shape[1:-1]), adapters)
        dv = of_v.view(shape) if need_dv else dv
        needed = [i for i, need in enumerate(need_du) if need]
        for i, part in zip(needed, du.split([us[i].numel() for i in needed]), strict=True):
            dus[i] = part.view(us[i].shape)
    return dx, dus, dv


def _rows(x: Tensor, sizes: Sequence[int]) -> tuple[int, ...]:
    """Of each adapter, the number of its rows of x `(B, *, K)` as a matrix."""
    return tuple(size * math.prod(x.shape[1:-1]) for size in sizes)


def _linear(
    x: Tensor,
    weight: Tensor,
    u: Tensor,
    s: Tensor,
    v: Tensor,
    bias: Tensor | None,
    order: Tensor | None,
    rows: tuple[int, ...],
    ranks: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """h `(B, *, N)` and all p^T, one after the other, with the factors of all adapters in u, s and v."""
    matrix = as_matrix(x)
    n, k = weight.shape
    h = x.new_empty(*x.shape[:-1], n)
    p = v.new_empty(sum(m * rank for m, rank in zip(rows, ranks, strict=True)))
    v = v.to(x.dtype)  # which is read anew at each step along K
    tile = tiles.siva_linear_mixed(tiles.gpu(x.device).architecture, tiles.rank_block(max(ranks)), rows)
    table = _block_table(rows, ranks, tile.block_m, x.is_cuda)
    if len(table) == 0:
        return h, p
    with torch.cuda.device_of(x):
        _siva_linear_mixed_kernel[(len(table) * max(triton.cdiv(n, tile.block_n), 1),)](
            matrix,
            weight,
            u,
            s,
            v,
            x if bias is None else bias.contiguous(),  # never read: a kernel takes no None here
            h,
            p,
            table if order is None else order.contiguous(),  # nor this
            table.to(x.device, non_blocking=True),
            len(table),
            math.prod(x.shape[1:-1]),
            k,
            n,
            *matrix.stride(),
            *weight.stride(),
            *u.stride(),
            *v.stride(),
            HAS_BIAS=bias is not None,
            HAS_ORDER=order is not None,
            **constants_of(x, ranks),
            **tile.constants(),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return h, p


class _Adapters(NamedTuple):
    """What the sums over rows depend on beside their operands; a width of 0 where no adapter needs the gradient."""

    rows: tuple[int, ...]
    ranks: tuple[int, ...]
    need_du: tuple[bool, ...]
    need_dv: bool
    n: int
    k: int


def _factor_gradients(
    dh: Tensor,
    x: Tensor,
    p: Tensor,
    q: Tensor,
    s: Tensor,
    order: Tensor | None,
    tokens: int,
    adapters: _Adapters,
) -> tuple[Tensor, Tensor]:
    """All dU that are needed, one after the other, and all dV."""
    tile, block_r = tiles.SIVA_LINEAR_SUMS, tiles.rank_block(max(adapters.ranks))
    rows = tiles.siva_linear_bwd_rows(max(adapters.rows), block_r)
    splits = max(triton.cdiv(max(adapters.rows), rows), 1)
    table, size_u, size = _adapter_table(adapters, s.is_cuda)
    partial = s.new_empty(splits, size, dtype=torch.float32)
    blocks = triton.cdiv(adapters.n, tile.block_c) + triton.cdiv(adapters.k, tile.block_c)
    if size > 0:
        with torch.cuda.device_of(s):
            _siva_linear_mixed_bwd_partials_kernel[(blocks, splits, len(table))](
                dh,
                p,
                x,
                q,
                s,
                partial,
                table if order is None else order.contiguous(),  # never read
                table.to(s.device, non_blocking=True),
                tokens,
                adapters.k,
                adapters.n,
                rows,
                size,
                *dh.stride(),
                *x.stride(),
                HAS_ORDER=order is not None,
                BLOCK_M=tile.block_m,
                BLOCK_C=tile.block_c,
                BLOCK_R=block_r,
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
                enable_fp_fusion=True,
            )
    return add_up(partial, size_u, s.dtype)


@lru_cache(maxsize=256)
def _block_table(rows: tuple[int, ...], ranks: tuple[int, ...], block_m: int, pinned: bool) -> Tensor:
    """The fields of each block of sorted rows, int64 on the host, that `_siva_linear_mixed_kernel` reads."""
    table, first_row, first_r, start = [], 0, 0, 0
    for m, rank in zip(rows, ranks, strict=True):
        last_row = first_row + m
        table += [(row, last_row, first_r, rank, start - first_row, m) for row in range(first_row, last_row, block_m)]
        first_row, first_r, start = last_row, first_r + rank, start + rank * m
    return torch.tensor(table, dtype=torch.int64, pin_memory=pinned)


@lru_cache(maxsize=256)
def _adapter_table(adapters: _Adapters, pinned: bool) -> tuple[Tensor, int, int]:
    """The fields of each adapter that trains, as `_siva_linear_mixed_bwd_partials_kernel` reads them; sizes of dU, and
    of dU and dV together.

    -1 stands for where the sum goes if it is not needed.
    """
    n, k = adapters.n, adapters.k
    size_u = n * sum(rank for rank, need in zip(adapters.ranks, adapters.need_du, strict=True) if need)
    table, first_row, first_r, start, of_u, of_v = [], 0, 0, 0, 0, size_u  # start: of p and q
    for m, rank, need_du in zip(*adapters[:3], strict=True):
        where = start - first_row, start - first_row, of_u if need_du else -1, of_v if adapters.need_dv else -1
        if need_du or adapters.need_dv:
            table.append((first_row, first_row + m, first_r, rank, m, *where))
        first_row, first_r, start = first_row + m, first_r + rank, start + rank * m
        of_u, of_v = of_u + rank * n * need_du, of_v + rank * k * adapters.need_dv
    return torch.tensor(table, dtype=torch.int64, pin_memory=pinned), size_u, of_v
