"""SiVA linear layer, forward: a frozen product and a low-rank one in a single pass over x.

    h = x W^T + ((x V^T) * s) U^T + b        p = x V^T

    M  rows of x (all leading dimensions together)      x (M, K)    W (N, K)    b (N,)     h (M, N)
    K  in_features                                      V (R, K)    s (R,)      U (N, R)   p (M, R)
    N  out_features
    R  rank

Each program owns one BLOCK_M x BLOCK_N tile of h. It accumulates its rows of p next to x W^T, from the same tiles of x,
so x is read once and neither p nor the low-rank product makes a trip through memory before it is used. Accumulation is
in float32. Products of float32 operands follow `torch.backends.cuda.matmul.fp32_precision`, as PyTorch's own do: TF32
where it says "tf32" and the card has it, else exact (`ieee`, PyTorch's default).

Source: SiVA, the adaptation by singular vectors described in `fastpeft.siva`.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpeft import reference
from fastpeft.kernels.tiles import rank_block, siva_linear_fwd_tile

MAX_RANK = 64  # a wider tile of p spills beside the tile of h
GROUP_M = 8  # row blocks that share the tiles of W in cache


@triton.jit
def _siva_linear_fwd_kernel(
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

    # 3. Both products from one read of x.
    acc_h = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc_p = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        v = tl.load(v_ptrs, mask=mask_k[:, None] & mask_r[None, :], other=0.0)
        acc_h = tl.dot(x, w, acc_h, input_precision=PRECISION)
        acc_p = tl.dot(x, v, acc_p, input_precision=PRECISION)
        x_ptrs += step * stride_xk
        w_ptrs += step * stride_wk
        v_ptrs += step * stride_vk

    # 4. The programs of the first column block store p.
    if block_n == 0:
        p_ptrs = p_ptr + offs_m[:, None] * stride_pm + offs_r[None, :]
        tl.store(p_ptrs, acc_p.to(p_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_r[None, :])

    # 5. Low-rank product and bias on the accumulator.
    s = tl.load(s_ptr + offs_r * stride_s, mask=mask_r, other=0.0).to(tl.float32)
    u_ptrs = u_ptr + offs_n[None, :] * stride_un + offs_r[:, None] * stride_ur  # (BLOCK_R, BLOCK_N)
    u = tl.load(u_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0)
    acc_h = tl.dot((acc_p * s[None, :]).to(u.dtype), u, acc_h, input_precision=PRECISION)
    if HAS_BIAS:
        acc_h += tl.load(bias_ptr + offs_n * stride_bias, mask=mask_n, other=0.0).to(tl.float32)[None, :]

    # 6. Store h.
    h_ptrs = h_ptr + offs_m[:, None] * stride_hm + offs_n[None, :]
    tl.store(h_ptrs, acc_h.to(h_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


def products(dtype: torch.dtype, matrix_units: bool) -> str | None:
    """How the kernel multiplies operands of this dtype: a key of the tile table; None where it should not."""
    if dtype in (torch.float16, torch.bfloat16):
        return "half" if matrix_units else None
    if dtype is torch.float32:
        return "tf32" if matrix_units and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    return None


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
        The reference serves ranks above `MAX_RANK`; float64, because the kernel accumulates in float32; and 16-bit
        operands on cards before compute capability 8.0, whose matrix units Triton does not use but PyTorch does.
    """
    rank = v.shape[0]
    kind = products(x.dtype, matrix_units=not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (8, 0))
    if kind is None or rank > MAX_RANK:
        return reference.siva_linear(x, weight, u, s, v, bias)
    n, k = weight.shape
    m = math.prod(x.shape[:-1])
    h = x.new_empty((*x.shape[:-1], n))
    p = x.new_empty((*x.shape[:-1], rank))
    if m == 0:
        return h, p
    rows = x.reshape(m, k)
    tile = siva_linear_fwd_tile(m, kind)
    grid = (triton.cdiv(m, tile.block_m) * max(triton.cdiv(n, tile.block_n), 1),)
    with torch.cuda.device_of(x) if x.is_cuda else nullcontext():
        _siva_linear_fwd_kernel[grid](
            rows,
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
            *rows.stride(),
            *weight.stride(),
            *u.stride(),
            *s.stride(),
            *v.stride(),
            0 if bias is None else bias.stride(0),
            n,
            rank,
            HAS_BIAS=bias is not None,
            PRECISION="tf32" if kind == "tf32" else "ieee",
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            BLOCK_R=rank_block(rank),
            GROUP_M=GROUP_M,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return h, p
