"""What SiVA's kernels of h and of dx have in common: the order of programs, and the two products of a tile.

Letters are those of `fastpeft.kernels.siva_linear`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of(program, blocks_m, blocks_n, GROUP_M: tl.constexpr, XCDS: tl.constexpr):
    """The row block and the column block of a program.

    Column blocks vary slowest inside a group of GROUP_M row blocks, so that a group reads each tile of W from cache.
    Programs go in turn to the XCDS dies of a card, which have a cache each, so every die is given a range of tiles.
    """
    if XCDS > 1:
        programs = blocks_m * blocks_n
        die = program % XCDS
        program = die * (programs // XCDS) + tl.minimum(die, programs % XCDS) + program // XCDS
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
    x_ptrs,
    w_ptrs,
    v_ptrs,
    x_desc,
    w_desc,
    v_desc,
    first_m,
    first_n,
    mask_m,
    mask_n,
    mask_r,
    K,
    stride_xk,
    stride_wk,
    stride_vk,
    N_FIRST: tl.constexpr,
    PROJECT: tl.constexpr,
    APART: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
):
    """`acc_h + x W^T` and, where PROJECT says so, `x V^T`, from one read of x.

    The pointers are to the first tiles along K: (BLOCK_M, BLOCK_K) of x, (BLOCK_K, BLOCK_N) of W^T, (BLOCK_K, BLOCK_R)
    of V^T. With TMA the descriptors' blocks are read instead, beginning at row first_m of x and row first_n of W, which
    lies (N, K) where N_FIRST says so, else at column first_n of W^T; V lies (R, K). What lies outside is 0.

    APART puts the second product into a branch that is always taken. Two that share x in one block get one arrangement
    of warps, a column; where warps read operands into registers, W would be read from shared memory twice as often.
    """
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    step = tl.full((), BLOCK_K, tl.int64)
    acc_p = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        mask_k = offs_k < K - k
        if TMA:
            x = x_desc.load([first_m, k])
            w = tl.trans(w_desc.load([first_n, k])) if N_FIRST else w_desc.load([k, first_n])
        else:
            x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        acc_h = tl.dot(x, w, acc_h)
        if PROJECT:
            if TMA:
                v = tl.trans(v_desc.load([0, k]))
            else:
                v = tl.load(v_ptrs, mask=mask_k[:, None] & mask_r[None, :], other=0.0)
            if APART:
                if k < K:
                    acc_p = tl.dot(x, v, acc_p)
            else:
                acc_p = tl.dot(x, v, acc_p)
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
        acc_h = tl.dot((acc_p * s[None, :]).to(DTYPE), u, acc_h)
    else:
        step = tl.full((), BLOCK_R, tl.int64)
        for r in tl.range(0, R, BLOCK_R, num_stages=1):  # few steps, which pipelining would only make spill
            mask_r = offs_r < R - r
            p = tl.load(p_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0).to(tl.float32)
            s = tl.load(s_ptrs, mask=mask_r, other=0.0).to(tl.float32)
            u = tl.load(u_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0).to(DTYPE)
            acc_h = tl.dot((p * s[None, :]).to(DTYPE), u, acc_h)
            p_ptrs += step * stride_pr
            s_ptrs += step * stride_s
            u_ptrs += step * stride_ur
    return acc_h
