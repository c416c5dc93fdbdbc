"""The backward of `window_attention.py`, whose formulas and letters hold here, in three kernels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpeft.kernels import tiles
from fastpeft.kernels.window import (
    BLOCK_SLOTS,
    LOG2_E,
    UNSPECIALISED,
    absent_scores,
    feature_tile,
    finite,
    kept_tile,
    kind_of,
    launch,
    launch_options,
    number_seen,
    operands,
    position_tile,
    query_tile,
    slot_of,
    splits_of,
    steps_of_split,
    to_slot,
    tokens_seen,
    visible_keys,
)
from fastpeft.ops import aten


@triton.jit(do_not_specialize=UNSPECIALISED)
def _window_attention_bwd_bases_kernel(
    dout_ptr,
    dout_strides,
    q_ptr,
    q_strides,
    p_ptr,
    p_strides,
    mask_ptr,
    out_ptr,
    lse_ptr,
    base_ptr,
    delta_ptr,
    dp_ptr,
    M,
    T,
    D,
    K,
    parts,
    absent,
    NEED_DP: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_ABSENT: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # 1. This program's queries, as in the forward.
    blocks_m = tl.cdiv(M, BLOCK_M)
    b = (tl.program_id(0) // blocks_m).to(tl.int64)
    offs_m = tl.program_id(0) % blocks_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_k = tl.arange(0, BLOCK_SLOTS)
    mask_m = offs_m < M
    mask_d = offs_d < D
    offs_lse = b * M + offs_m
    dout = query_tile(dout_ptr, dout_strides, b, offs_m, M, D, BLOCK_D)
    out = tl.load(out_ptr + offs_lse[:, None] * D + offs_d[None, :], mask=mask_m[:, None] & mask_d[None, :], other=0.0)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    q = query_tile(q_ptr, q_strides, b, offs_m, M, D, BLOCK_D)
    base = finite(tl.load(lse_ptr + offs_lse, mask=mask_m, other=float("inf"))) * LOG2_E

    # 2. What of a slot's scores is the same in all keys, since q C~^T = q C^T + q p^T, and so for dout:
    #    (BLOCK_M, BLOCK_SLOTS).
    p = position_tile(p_ptr, p_strides, K, D, BLOCK_D).to(q.dtype)
    bases = base[:, None] - tl.dot(q, tl.trans(p), input_precision=PRECISION) * LOG2_E
    deltas = delta[:, None] - tl.dot(dout, tl.trans(p), input_precision=PRECISION)

    # 3. An absent slot is one key: its dS takes the place of its delta, and this program has a part of its dp.
    if HAS_ABSENT:
        number = number_seen(mask_ptr, b, offs_m % T, T, HAS_MASK, CAUSAL, BLOCK_N)
        is_absent = ((absent >> offs_k) & 1) != 0
        weights = tl.exp2(absent_scores(-bases, absent, number))
        deltas = tl.where(is_absent[None, :], -weights * deltas, deltas)
        if NEED_DP:
            dp = tl.dot(tl.trans(weights.to(q.dtype)), dout, input_precision=PRECISION)
            dp = tl.dot(tl.trans(deltas.to(q.dtype)), q, dp, input_precision=PRECISION)
            offs_dp = (offs_k.to(tl.int64) * parts + tl.program_id(0))[:, None] * D + offs_d[None, :]
            tl.store(dp_ptr + offs_dp, dp, mask=is_absent[:, None] & mask_d[None, :])
    offs_base = (b * K + offs_k)[None, :] * M + offs_m[:, None]
    mask_base = mask_m[:, None] & (offs_k < K)[None, :]
    tl.store(base_ptr + offs_base, bases, mask=mask_base)
    tl.store(delta_ptr + offs_base, deltas, mask=mask_base)


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
    base_ptr,
    delta_ptr,
    dq_ptr,
    rows,
    M,
    T,
    D,
    K,
    S,
    slots,
    absent,
    seed_ptr,
    ordinal,
    last_dropped,
    scale,
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
    noise = (tl.load(seed_ptr), ordinal.to(tl.uint32), last_dropped.to(tl.uint32))
    split = tl.program_id(1)
    blocks_m = tl.cdiv(M, BLOCK_M)
    b = (tl.program_id(0) // blocks_m).to(tl.int64)
    first_m = tl.program_id(0) % blocks_m * BLOCK_M
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_t = offs_m % T
    mask_m = offs_m < M
    dout = query_tile(dout_ptr, dout_strides, b, offs_m, M, D, BLOCK_D)
    q = query_tile(q_ptr, q_strides, b, offs_m, M, D, BLOCK_D)
    dq = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)  # dS C
    sums = tl.zeros((BLOCK_M, BLOCK_SLOTS), dtype=tl.float32)  # of dS by slot

    # 2. The real slots.
    blocks_n = tl.cdiv(tl.minimum(first_m % T + BLOCK_M, T) if CAUSAL else T, BLOCK_N)
    first, end = steps_of_split(S * blocks_n, split, tl.num_programs(1))
    for step in range(first, end):
        row = step // blocks_n
        offs_n = step % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
        slot = slot_of(slots, row)
        first_base = (b * K + slot) * M
        base = tl.load(base_ptr + first_base + offs_m, mask=mask_m, other=float("inf"))
        delta = tl.load(delta_ptr + first_base + offs_m, mask=mask_m, other=0.0)
        seen = tokens_seen(mask_ptr, b, offs_n, T, HAS_MASK)
        c = feature_tile(c_ptr, c_strides, b, row, offs_n, seen, D, BLOCK_D).to(q.dtype)
        if DROPOUT:
            c = tl.where(kept_tile(noise, b, slot, offs_n, T, D, IS_ALIGNED, BLOCK_D), c, 0.0)
        scores = tl.dot(q, tl.trans(c), input_precision=PRECISION)
        scores = tl.where(visible_keys(seen, offs_n, offs_t, CAUSAL), scores, -float("inf"))
        weights = tl.exp2(scores * (scale * LOG2_E) - base[:, None])
        dweights = tl.dot(dout, tl.trans(c), input_precision=PRECISION)
        dscores = weights * (dweights * scale - delta[:, None])
        dq = tl.dot(dscores.to(q.dtype), c, dq, input_precision=PRECISION)
        sums += to_slot(tl.sum(dscores, 1), slot)

    # 3. dq = dS C~ = dS C + (sums of dS by slot) p, of which the absent slots' belong to the first split.
    if HAS_ABSENT:
        offs_k = tl.arange(0, BLOCK_SLOTS)
        is_absent = (((absent >> offs_k) & 1) != 0)[None, :] & mask_m[:, None]
        dscores = tl.load(delta_ptr + (b * K + offs_k)[None, :] * M + offs_m[:, None], mask=is_absent, other=0.0)
        sums += tl.where(split == 0, dscores, 0.0)
    p = position_tile(p_ptr, p_strides, K, D, BLOCK_D).to(q.dtype)
    dq = tl.dot(sums.to(q.dtype), p, dq * scale, input_precision=PRECISION)
    first_dq = (split.to(tl.int64) * rows + b * M + first_m) * D
    offs_d = tl.arange(0, BLOCK_D)
    offs_dq = tl.arange(0, BLOCK_M)[:, None] * D + offs_d[None, :]
    mask = mask_m[:, None] & (offs_d < D)[None, :]
    tl.store(dq_ptr + first_dq + offs_dq, dq.to(dq_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=UNSPECIALISED)
def _window_attention_bwd_keys_kernel(
    dout_ptr,
    dout_strides,
    q_ptr,
    q_strides,
    c_ptr,
    c_strides,
    mask_ptr,
    base_ptr,
    delta_ptr,
    dc_ptr,
    dp_ptr,
    M,
    T,
    D,
    K,
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
    noise = (tl.load(seed_ptr), ordinal.to(tl.uint32), last_dropped.to(tl.uint32))
    blocks_n = tl.cdiv(T, BLOCK_N)
    b = (tl.program_id(0) // (S * blocks_n)).to(tl.int64)
    row = tl.program_id(0) // blocks_n % S
    block_n = tl.program_id(0) % blocks_n
    slot = slot_of(slots, row)
    offs_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    seen = tokens_seen(mask_ptr, b, offs_n, T, HAS_MASK)
    c = feature_tile(c_ptr, c_strides, b, row, offs_n, seen, D, BLOCK_D).to(q_ptr.dtype.element_ty)
    if DROPOUT:
        kept = kept_tile(noise, b, slot, offs_n, T, D, IS_ALIGNED, BLOCK_D)
        c = tl.where(kept, c, 0.0)

    # 2. dC~ over the queries of all heads; scores are keys by queries, so that they multiply from registers. Causal
    #    queries before the first key see none of these keys; those of the first head, which is the only one by
    #    default, are passed over.
    dc = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    first_base = (b * K + slot) * M
    for m in range(block_n * BLOCK_N if CAUSAL else 0, M, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        q = query_tile(q_ptr, q_strides, b, offs_m, M, D, BLOCK_D)
        dout = query_tile(dout_ptr, dout_strides, b, offs_m, M, D, BLOCK_D)
        base = tl.load(base_ptr + first_base + offs_m, mask=mask_m, other=float("inf"))
        delta = tl.load(delta_ptr + first_base + offs_m, mask=mask_m, other=0.0)
        visible = seen[:, None] & ((offs_n[:, None] <= (offs_m % T)[None, :]) | (not CAUSAL))
        scores = tl.where(visible, tl.dot(c, tl.trans(q), input_precision=PRECISION), -float("inf"))
        weights = tl.exp2(scores * (scale * LOG2_E) - base[None, :])
        dweights = tl.dot(c, tl.trans(dout), input_precision=PRECISION) * scale
        dscores = weights * (dweights - delta[None, :])
        dc = tl.dot(weights.to(q.dtype), dout, dc, input_precision=PRECISION)
        dc = tl.dot(dscores.to(q.dtype), q, dc, input_precision=PRECISION)

    # 3. This program's part of dp, and dC, through dropout.
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    if NEED_DP:
        part = slot.to(tl.int64) * parts + b * blocks_n + block_n
        tl.store(dp_ptr + part * D + offs_d, tl.sum(dc, 0), mask=mask_d)
    if NEED_DC:
        if DROPOUT:
            dc = tl.where(kept, dc * scale, 0.0)
        offs_dc = ((b * S + row) * T + offs_n)[:, None] * D + offs_d[None, :]
        mask = (offs_n < T)[:, None] & mask_d[None, :]
        tl.store(dc_ptr + offs_dc, dc.to(dc_ptr.dtype.element_ty), mask=mask)


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
        are more, until they are added up, and split dq as many floats for each split. What is left to the ATen form is
        what the forward leaves to it.
    """
    kind = kind_of(q)
    if kind is None:
        return aten.window_attention_backward(
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
    gpu = tiles.gpu(q.device)
    of_bases, of_queries, of_keys = (
        tiles.window_attention(f"bwd_{name}", kind, width, dropout > 0, gpu.architecture)
        for name in ("bases", "queries", "keys")
    )
    parts_m = batch * triton.cdiv(heads * tokens, of_bases.block_m)
    parts_n = batch * triton.cdiv(tokens, of_keys.block_n)  # for each slot
    parts = max(parts_m, parts_n)
    bases = q.new_empty((batch, p.shape[0], heads, tokens), dtype=torch.float32)
    deltas = torch.empty_like(bases)
    dc = c.new_empty(c.shape) if need_dc else dc
    # zeros, since a slot's parts come from one kernel and the other may have more programs
    partial = p.new_zeros((p.shape[0], parts, width) if need_dp else 0, dtype=torch.float32)
    douts = dout.flatten(1, 2)
    shared = operands(q, c, p, mask, slots, causal, dropout, seed, block) | {
        "dout_ptr": douts,
        "dout_strides": douts.stride(),
        "base_ptr": bases,
        "delta_ptr": deltas,
    }
    with torch.cuda.device_of(q):
        launch(
            _window_attention_bwd_bases_kernel,
            (parts_m,),
            shared | {"out_ptr": out.contiguous(), "lse_ptr": lse.contiguous()},
            {"dp_ptr": partial, "parts": parts, "NEED_DP": need_dp},
            launch_options(of_bases, kind, width),
        )
        if need_dq:
            programs = batch * triton.cdiv(heads * tokens, of_queries.block_m)
            splits = splits_of(programs, len(slots) * triton.cdiv(tokens, of_queries.block_n), gpu)
            dq = q.new_empty((splits, *q.shape), dtype=torch.float32 if splits > 1 else q.dtype)
            launch(
                _window_attention_bwd_queries_kernel,
                (programs, splits),
                shared,
                {"dq_ptr": dq, "rows": lse.numel()},
                launch_options(of_queries, kind, width),
            )
            dq = dq.sum(0).to(q.dtype) if splits > 1 else dq[0]
        if slots and (need_dc or need_dp):
            launch(
                _window_attention_bwd_keys_kernel,
                (parts_n * len(slots),),
                shared,
                {"dc_ptr": dc, "dp_ptr": partial, "parts": parts, "NEED_DC": need_dc, "NEED_DP": need_dp},
                launch_options(of_keys, kind, width),
            )
    if need_dp:
        dp = partial.sum(1).to(p.dtype)
    return dq, dc, dp
