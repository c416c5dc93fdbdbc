"""The backward of `window_attention.py`, whose formulas and letters hold here: a kernel over queries, one over keys."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpeft.kernels import tiles
from fastpeft.kernels.launch import device_of
from fastpeft.kernels.window import (
    BLOCK_SLOTS,
    LOG2_E,
    UNSPECIALISED,
    absent_slots,
    absent_tile,
    key_tile,
    kind_of,
    launch_options,
    number_seen,
    operands,
    query_tile,
    slot_of,
    tokens_seen,
    visible_keys,
)
from fastpeft.ops import reference


@triton.jit
def _dscores(scores, base, dout, keys, delta, PRECISION: tl.constexpr):
    """P and dS of the scores of a tile of keys, both (BLOCK_M, keys)."""
    weights = tl.exp2(scores - base[:, None])
    return weights, weights * (tl.dot(dout, tl.trans(keys), input_precision=PRECISION) - delta[:, None])


@triton.jit(do_not_specialize=UNSPECIALISED)
def _window_attention_bwd_queries_kernel(
    dout_ptr,
    dout_strides,
    q_ptr,
    q_strides,
    c_ptr,
    c_strides,
    p_ptr,
    p_strides,
    mask_ptr,
    mask_strides,
    out_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    dp_ptr,
    H,
    T,
    D,
    S,
    parts,
    slots,
    absent,
    seed_ptr,
    ordinal,
    last_dropped,
    scale,
    NEED_DQ: tl.constexpr,
    NEED_DP: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_ABSENT: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # 1. This program's queries, as in the forward.
    noise = (tl.load(seed_ptr), ordinal.to(tl.uint32), last_dropped.to(tl.uint32), scale)
    blocks_m = tl.cdiv(H * T, BLOCK_M)
    b = (tl.program_id(0) // blocks_m).to(tl.int64)
    first_m = tl.program_id(0) % blocks_m * BLOCK_M
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_t = offs_m % T
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < H * T
    mask_d = offs_d < D
    mask = mask_m[:, None] & mask_d[None, :]
    offs_lse = b * H * T + offs_m
    offs_out = offs_lse[:, None] * D + offs_d[None, :]

    # 2. delta, which the kernel over keys reads too.
    dout = query_tile(dout_ptr, dout_strides, b, offs_m, H, T, D, BLOCK_D)
    out = tl.load(out_ptr + offs_out, mask=mask, other=0.0)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + offs_lse, delta, mask=mask_m)

    # 3. What the weights follow from; those of a query that saw nothing are 0, for its scores are -inf.
    q = query_tile(q_ptr, q_strides, b, offs_m, H, T, D, BLOCK_D)
    lse = tl.load(lse_ptr + offs_lse, mask=mask_m, other=0.0)
    base = tl.where(lse == -float("inf"), 0.0, lse * LOG2_E)
    dq = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)

    # 4. The absent slots: their share of dq, and this program's part of their dp.
    if HAS_ABSENT:
        number = number_seen(mask_ptr, mask_strides, b, offs_t, T, HAS_MASK, CAUSAL, BLOCK_N)
        p_keys, p_scores = absent_tile(q, p_ptr, p_strides, absent, number, D, PRECISION, BLOCK_D)
        p_weights, p_dscores = _dscores(p_scores, base, dout, p_keys, delta, PRECISION)
        p_dscores = p_dscores.to(q.dtype)
        dq = tl.dot(p_dscores, p_keys, dq, input_precision=PRECISION)
        if NEED_DP:
            dp = tl.dot(tl.trans(p_weights.to(q.dtype)), dout, input_precision=PRECISION)
            dp = tl.dot(tl.trans(p_dscores), q, dp, input_precision=PRECISION)  # (BLOCK_SLOTS, BLOCK_D)
            offs_k = tl.arange(0, BLOCK_SLOTS)
            is_absent = ((absent >> offs_k) & 1) != 0
            offs_dp = (offs_k.to(tl.int64) * parts + tl.program_id(0))[:, None] * D + offs_d[None, :]
            tl.store(dp_ptr + offs_dp, dp, mask=is_absent[:, None] & mask_d[None, :])

    # 5. The real slots.
    if NEED_DQ:
        blocks_n = tl.cdiv(tl.minimum(first_m % T + BLOCK_M, T) if CAUSAL else T, BLOCK_N)
        for step in range(0, S * blocks_n):
            row = step // blocks_n
            offs_n = step % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
            slot = slot_of(slots, row)
            seen = tokens_seen(mask_ptr, mask_strides, b, offs_n, T, HAS_MASK)
            keys, _kept = key_tile(
                c_ptr,
                c_strides,
                p_ptr,
                p_strides,
                noise,
                b,
                row,
                slot,
                offs_n,
                seen,
                T,
                D,
                DROPOUT,
                IS_ALIGNED,
                BLOCK_D,
            )
            keys = keys.to(q.dtype)
            scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * LOG2_E
            scores = tl.where(visible_keys(seen, offs_n, offs_t, CAUSAL), scores, -float("inf"))
            _weights, dscores = _dscores(scores, base, dout, keys, delta, PRECISION)
            dq = tl.dot(dscores.to(q.dtype), keys, dq, input_precision=PRECISION)
        tl.store(dq_ptr + offs_out, dq.to(dq_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=UNSPECIALISED)
def _window_attention_bwd_keys_kernel(
    dout_ptr,
    dout_strides,
    q_ptr,
    q_strides,
    c_ptr,
    c_strides,
    p_ptr,
    p_strides,
    mask_ptr,
    mask_strides,
    lse_ptr,
    delta_ptr,
    dc_ptr,
    dp_ptr,
    H,
    T,
    D,
    S,
    parts,
    slots,
    seed_ptr,
    ordinal,
    last_dropped,
    scale,
    NEED_DC: tl.constexpr,
    NEED_DP: tl.constexpr,
    HAS_MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # 1. This program's keys: BLOCK_N tokens of one slot of one sentence. Sentences vary slowest, then slots.
    noise = (tl.load(seed_ptr), ordinal.to(tl.uint32), last_dropped.to(tl.uint32), scale)
    blocks_n = tl.cdiv(T, BLOCK_N)
    b = (tl.program_id(0) // (S * blocks_n)).to(tl.int64)
    row = tl.program_id(0) // blocks_n % S
    block_n = tl.program_id(0) % blocks_n
    slot = slot_of(slots, row)
    offs_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    seen = tokens_seen(mask_ptr, mask_strides, b, offs_n, T, HAS_MASK)
    keys, kept = key_tile(
        c_ptr, c_strides, p_ptr, p_strides, noise, b, row, slot, offs_n, seen, T, D, DROPOUT, IS_ALIGNED, BLOCK_D
    )
    keys = keys.to(q_ptr.dtype.element_ty)

    # 2. dC~ over the queries of all heads. Causal queries before the first key see none of these keys; those of the
    #    first head, which is the only one by default, are passed over. Passing over those of every head takes
    #    registers that the narrow float32 tiles do not have.
    dkeys = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for m in range(block_n * BLOCK_N if CAUSAL else 0, H * T, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < H * T
        q = query_tile(q_ptr, q_strides, b, offs_m, H, T, D, BLOCK_D)
        dout = query_tile(dout_ptr, dout_strides, b, offs_m, H, T, D, BLOCK_D)
        lse = tl.load(lse_ptr + b * H * T + offs_m, mask=mask_m, other=0.0)
        delta = tl.load(delta_ptr + b * H * T + offs_m, mask=mask_m, other=0.0)
        base = tl.where(lse == -float("inf"), 0.0, lse * LOG2_E)
        scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * LOG2_E
        scores = tl.where(visible_keys(seen, offs_n, offs_m % T, CAUSAL), scores, -float("inf"))
        weights, dscores = _dscores(scores, base, dout, keys, delta, PRECISION)
        dkeys = tl.dot(tl.trans(weights.to(q.dtype)), dout, dkeys, input_precision=PRECISION)
        dkeys = tl.dot(tl.trans(dscores.to(q.dtype)), q, dkeys, input_precision=PRECISION)

    # 3. dC, through dropout, and this program's part of dp.
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    if NEED_DC:
        offs_dc = ((b * S + row) * T + offs_n)[:, None] * D + offs_d[None, :]
        dc = (dkeys * kept).to(dc_ptr.dtype.element_ty)
        tl.store(dc_ptr + offs_dc, dc, mask=(offs_n < T)[:, None] & mask_d[None, :])
    if NEED_DP:
        part = slot.to(tl.int64) * parts + b * blocks_n + block_n
        tl.store(dp_ptr + part * D + offs_d, tl.sum(dkeys, 0), mask=mask_d)


def window_attention_backward(
    dout: Tensor,
    q: Tensor,
    c: Tensor,
    p: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    slots: list[int],
    causal: bool,
    dropout: float,
    seed: Tensor | None,
    block: int,
    need_dq: bool,
    need_dc: bool,
    need_dp: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `window_attention`, which draws the same dropout again.

    Args:
        dout: `(B, H, T, D)`, the gradient of out. Any strides, here and below.
        q, c, p, mask, slots, causal, dropout, seed, block: as in the forward.
        out, lse: what the forward returned.
        need_dq, need_dc, need_dp: which gradients to compute.

    Returns:
        dq `(B, H, T, D)`, dc `(B, S, T, D)` and dp `(k, D)`, contiguous, each of its operand's dtype; 0 elements in
        place of one that is not needed.

    Notes:
        No atomics: repeats are bit-equal. dp takes k D floats for each sentence and block of queries or keys, whichever
        are more, until they are added up. The reference serves what it serves in the forward.
    """
    kind = kind_of(q)
    if kind is None:
        return reference.window_attention_backward(
            dout, q, c, p, mask, out, lse, slots, causal, dropout, seed, block, need_dq, need_dc, need_dp
        )
    batch, heads, tokens, width = q.shape
    dq, dc, dp = q.new_empty(0), c.new_empty(0), p.new_empty(0)
    if lse.numel() == 0 or not (need_dq or need_dc or need_dp):
        return (
            q.new_zeros(q.shape) if need_dq else dq,
            c.new_zeros(c.shape) if need_dc else dc,
            p.new_zeros(p.shape) if need_dp else dp,
        )
    of_queries, of_keys = (tiles.window_attention(name, kind, width) for name in ("bwd_queries", "bwd_keys"))
    programs_m = batch * triton.cdiv(heads * tokens, of_queries.block_m)
    programs_n = batch * triton.cdiv(tokens, of_keys.block_n)  # for each slot
    parts = max(programs_m, programs_n)
    delta = torch.empty_like(lse, memory_format=torch.contiguous_format)
    dq = q.new_empty(q.shape) if need_dq else dq
    dc = c.new_empty(c.shape) if need_dc else dc
    # zeros, since a slot's parts come from one kernel and the other may have more programs
    partial = p.new_zeros((p.shape[0], parts, width) if need_dp else 0, dtype=torch.float32)
    lse = lse.contiguous()
    shared = operands(q, c, p, mask, slots, causal, dropout, seed, block) | {
        "dout_ptr": dout,
        "dout_strides": dout.stride(),
        "lse_ptr": lse,
        "delta_ptr": delta,
        "dp_ptr": partial,
        "parts": parts,
        "NEED_DP": need_dp,
    }
    with device_of(q):
        _window_attention_bwd_queries_kernel[(programs_m,)](
            out_ptr=out.contiguous(),
            dq_ptr=dq,
            absent=absent_slots(slots, p),
            HAS_ABSENT=len(slots) < p.shape[0],
            NEED_DQ=need_dq,
            **shared,
            **launch_options(of_queries, kind, width),
        )
        if slots and (need_dc or need_dp):
            _window_attention_bwd_keys_kernel[(programs_n * len(slots),)](
                dc_ptr=dc,
                NEED_DC=need_dc,
                **shared,
                **launch_options(of_keys, kind, width),
            )
    if need_dp:
        dp = partial.sum(1).to(p.dtype)
    return dq, dc, dp
