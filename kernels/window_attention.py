"""Attention over a window of features: keys and values are one stream of tiles, and the window is never in memory.

    C~_i = dropout(C_i) + p_i      out = softmax(q C~^T) C~      lse = log sum exp(q C~^T)
    P = exp(q C~^T - lse)          dS = P * (dout C~^T - delta)  delta = row sums of dout * out
    dq = dS C~                     dC~ = P^T dout + dS^T q       dC_i = dC~_i * kept / (1 - dropout)
    dp_i = sum of dC~_i over sentences and tokens

    B  sentences     H  heads     T  tokens     D  width     k  slots of the window, of which S are real
    M  rows of queries, all heads of a sentence one after the other, H T of them
    N  keys          q, out, dq (B, H, T, D)    c, dc (B, S, T, D)    p, dp (k, D)    lse, delta (B, H, T)

Of one sentence, a program of the forward holds BLOCK_M queries, of any heads, and runs over the tiles of every real
slot; a tile of C~ is made once for all of them and serves as keys and as values. The slots that are not real are one
more tile: slot j is its key j, `p_j`, and its score gains the logarithm of how many tokens the query sees. The softmax
is online, in float32. Backward is two kernels without atomics. The one over queries makes delta, dq and the absent
slots' dp, the one over keys dC, where it adds up all heads, and the real slots' dp; both leave dp as partial sums, one
for each program, that PyTorch adds in a fixed order. Saved for backward are the operands, out and lse.

Dropout's words are drawn where a tile is made: four elements of C from one counter. Where D is not a multiple of four a
tile's elements do not begin at a counter's first word, and each draws its own.

What this should cost, beside `scaled_dot_product_attention` on a window that PyTorch stacks, drops out and shifts.
Counted in bytes for each element of C, in half precision, operands of width D alone:

                 here                           composed
    forward      2: C                           17: stack 4, dropout 5, + p 4, keys and values 4
    backward     6: C twice, dC                 25: keys and values 4, dK and dV 4, their sum 6, dropout 5, + p 2,
                                                    unstack 4
    kept         2: C                           3: the window, as keys and as values, and a byte of the mask

Multiply-adds for each element of C and each query of a head: 2 forward here and there, backward 7 here (the scores and
dP twice) and 5 there. Philox takes about 105 instructions a counter (by compiling the forward for sm_80 with it and
without), 26 an element; the kernel over keys draws once, the other two once for every BLOCK_M rows of H T. By the data
sheets an A100 or H100 issues instructions for 128 threads a clock and multiprocessor, and does 1,024 or 2,048
half-precision multiply-adds: with BLOCK_M = 64 a tile's words then take 1.6 or 3.3 times as long as its products in the
forward. Feature dropout bounds training where it is on, memory or the launches where it is off and T is short. All of
it is a prediction, not a measurement.

The accumulators take BLOCK_M D (out, dq) or BLOCK_N D (dC~) registers of 32 bits over a program's threads: 32 each with
64 rows, width 128 and 8 warps; `bench/data/static.csv` has what compiling gave.

Source: k-LST as described in `fastpeft.ladder.side`; FlashAttention-2 (Dao, 2023, arXiv 2307.08691) for the online
softmax and its backward.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpeft import noise as contract
from fastpeft import reference
from fastpeft.kernels import tiles
from fastpeft.kernels.launch import device_of, precision, products_of
from fastpeft.kernels.philox import in_order, random_words

_SLOT_BITS = tl.constexpr(4)  # of a slot's number, where a list of slots is one integer
_BLOCK_SLOTS = tl.constexpr(16)  # keys of the tile of absent slots, more than a window has
_LOG2_E = tl.constexpr(math.log2(math.e))
_LN_2 = tl.constexpr(math.log(2))
_DROPOUT = tl.constexpr(contract.STREAM_DROPOUT)
_UNSPECIALISED = ["slots", "absent", "seed", "ordinal", "last_dropped"]  # differ from block to block and step to step


@triton.jit
def _query_tile(ptr, strides, b, offs_m, H, T, D, BLOCK_D: tl.constexpr):
    """Rows offs_m of one sentence of q, or of what is shaped like it: (BLOCK_M, BLOCK_D)."""
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    ptrs = ptr + b * strides[0] + (offs_m // T).to(tl.int64) * strides[1] + (offs_m % T).to(tl.int64) * strides[2]
    mask = (offs_m < H * T)[:, None] & (offs_d < D)[None, :]
    return tl.load(ptrs[:, None] + offs_d[None, :] * strides[3], mask=mask, other=0.0)


@triton.jit
def _slot_of(slots, row):
    """Which slot a row of c is."""
    return (slots >> (row * _SLOT_BITS)) & (_BLOCK_SLOTS - 1)


@triton.jit
def _seen(mask_ptr, mask_strides, b, offs_n, T, HAS_MASK: tl.constexpr):
    """Which of the keys (BLOCK_N,) are tokens."""
    seen = offs_n < T
    if HAS_MASK:
        ptrs = mask_ptr + b * mask_strides[0] + offs_n.to(tl.int64) * mask_strides[1]
        seen = tl.load(ptrs, mask=seen, other=0) != 0
    return seen


@triton.jit
def _visible(seen, offs_n, offs_t, CAUSAL: tl.constexpr):
    """Which of the keys each query sees: (BLOCK_M, BLOCK_N)."""
    return seen[None, :] & ((offs_n[None, :] <= offs_t[:, None]) | (not CAUSAL))


@triton.jit
def _dropout_tile(noise, b, slot, offs_n, T, D, IS_ALIGNED: tl.constexpr, BLOCK_D: tl.constexpr):
    """What dropout multiplies a tile of C by, float32 (BLOCK_N, BLOCK_D): `1 / (1 - dropout)` or 0."""
    seed, ordinal, last_dropped, scale = noise
    first = (b * T + offs_n) * D  # index of each row's first element in the slot's (B, T, D), int64
    if IS_ALIGNED:
        counters = (first // 4)[:, None] + tl.arange(0, BLOCK_D // 4)[None, :]
        w0, w1, w2, w3 = random_words(counters, seed, ordinal + slot, _DROPOUT)
        words = in_order(w0, w1, w2, w3)
    else:
        e = first[:, None] + tl.arange(0, BLOCK_D)[None, :]
        w0, w1, w2, w3 = random_words(e // 4, seed, ordinal + slot, _DROPOUT)
        lane = e % 4
        words = tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))
    return tl.where(words > last_dropped, scale, 0.0)


@triton.jit
def _key_tile(
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
    DROPOUT: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """C~ of the keys offs_n of one slot, float32 (BLOCK_N, BLOCK_D), and what dropout multiplied C by."""
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask_d = offs_d < D
    c_ptrs = c_ptr + b * c_strides[0] + row.to(tl.int64) * c_strides[1]
    c_ptrs += offs_n.to(tl.int64)[:, None] * c_strides[2] + offs_d[None, :] * c_strides[3]
    c = tl.load(c_ptrs, mask=seen[:, None] & mask_d[None, :], other=0.0).to(tl.float32)
    p = tl.load(p_ptr + slot * p_strides[0] + offs_d * p_strides[1], mask=mask_d, other=0.0).to(tl.float32)
    kept = tl.full(c.shape, 1.0, tl.float32)
    if DROPOUT:
        kept = _dropout_tile(noise, b, slot, offs_n, T, D, IS_ALIGNED, BLOCK_D)
    return c * kept + p[None, :], kept


@triton.jit
def _number_seen(
    mask_ptr, mask_strides, b, offs_t, T, HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr
):
    """How many tokens each query sees, int32 (BLOCK_M,)."""
    number = tl.zeros(offs_t.shape, dtype=tl.int32)
    if HAS_MASK:
        for n in range(0, T, BLOCK_N):
            offs_n = n + tl.arange(0, BLOCK_N)
            seen = _seen(mask_ptr, mask_strides, b, offs_n, T, HAS_MASK)
            number += tl.sum(_visible(seen, offs_n, offs_t, CAUSAL).to(tl.int32), 1)
    else:
        number += offs_t + 1 if CAUSAL else T
    return number


@triton.jit
def _absent_tile(q, p_ptr, p_strides, absent, number, D, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr):
    """The absent slots' keys (_BLOCK_SLOTS, BLOCK_D), 0 in rows of other slots, and scores (BLOCK_M, _BLOCK_SLOTS).

    A key stands for as many as the query sees tokens.
    """
    offs_k = tl.arange(0, _BLOCK_SLOTS)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    is_absent = ((absent >> offs_k) & 1) != 0
    p_ptrs = p_ptr + offs_k.to(tl.int64)[:, None] * p_strides[0] + offs_d[None, :] * p_strides[1]
    keys = tl.load(p_ptrs, mask=is_absent[:, None] & (offs_d < D)[None, :], other=0.0).to(q.dtype)
    scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * _LOG2_E
    scores += tl.log2(tl.maximum(number, 1).to(tl.float32))[:, None]
    return keys, tl.where(is_absent[None, :] & (number > 0)[:, None], scores, -float("inf"))


@triton.jit
def _online_softmax(acc, highest, total, scores, keys, PRECISION: tl.constexpr):
    """One more tile of keys: the sum of weighted keys, the highest score and the sum of weights so far."""
    new = tl.maximum(highest, tl.max(scores, 1))
    base = tl.where(new == -float("inf"), 0.0, new)  # of a query that has seen nothing yet
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(highest - base)
    acc = tl.dot(weights.to(keys.dtype), keys, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new, total * shrink + tl.sum(weights, 1)


@triton.jit
def _dscores(scores, base, dout, keys, delta, PRECISION: tl.constexpr):
    """P and dS of the scores of a tile of keys, both (BLOCK_M, keys)."""
    weights = tl.exp2(scores - base[:, None])
    return weights, weights * (tl.dot(dout, tl.trans(keys), input_precision=PRECISION) - delta[:, None])


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _window_attention_fwd_kernel(
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
    H,
    T,
    D,
    S,
    slots,
    absent,
    seed,
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
    # 1. This program's queries: BLOCK_M rows of one sentence. What addresses are made of has 64 bits.
    noise = (seed.to(tl.int64), ordinal.to(tl.uint32), last_dropped.to(tl.uint32), scale)
    blocks_m = tl.cdiv(H * T, BLOCK_M)
    b = (tl.program_id(0) // blocks_m).to(tl.int64)
    first_m = tl.program_id(0) % blocks_m * BLOCK_M
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_t = offs_m % T
    q = _query_tile(q_ptr, q_strides, b, offs_m, H, T, D, BLOCK_D)
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    highest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)

    # 2. The absent slots, one key each.
    if HAS_ABSENT:
        number = _number_seen(mask_ptr, mask_strides, b, offs_t, T, HAS_MASK, CAUSAL, BLOCK_N)
        p_keys, p_scores = _absent_tile(q, p_ptr, p_strides, absent, number, D, PRECISION, BLOCK_D)
        acc, highest, total = _online_softmax(acc, highest, total, p_scores, p_keys, PRECISION)

    # 3. The real slots, tile by tile; one loop over all, so that the next tile is on its way across slots too. Of
    #    causal queries none sees beyond the last of the program.
    blocks_n = tl.cdiv(tl.minimum(first_m % T + BLOCK_M, T) if CAUSAL else T, BLOCK_N)
    for step in range(0, S * blocks_n):
        row = step // blocks_n
        offs_n = step % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
        slot = _slot_of(slots, row)
        seen = _seen(mask_ptr, mask_strides, b, offs_n, T, HAS_MASK)
        keys, _kept = _key_tile(
            c_ptr, c_strides, p_ptr, p_strides, noise, b, row, slot, offs_n, seen, T, D, DROPOUT, IS_ALIGNED, BLOCK_D
        )
        keys = keys.to(q.dtype)
        scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * _LOG2_E
        scores = tl.where(_visible(seen, offs_n, offs_t, CAUSAL), scores, -float("inf"))
        acc, highest, total = _online_softmax(acc, highest, total, scores, keys, PRECISION)

    # 4. The output, and the log-sum-exp; 0 and -inf where nothing was seen.
    saw = total > 0
    total = tl.where(saw, total, 1.0)
    out = acc / total[:, None]
    lse = tl.where(saw, (highest + tl.log2(total)) * _LN_2, -float("inf"))
    offs_out = b * H * T + offs_m
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < H * T
    mask = mask_m[:, None] & (offs_d < D)[None, :]
    tl.store(out_ptr + offs_out[:, None] * D + offs_d[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(lse_ptr + offs_out, lse, mask=mask_m)


@triton.jit(do_not_specialize=_UNSPECIALISED)
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
    seed,
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
    noise = (seed.to(tl.int64), ordinal.to(tl.uint32), last_dropped.to(tl.uint32), scale)
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
    dout = _query_tile(dout_ptr, dout_strides, b, offs_m, H, T, D, BLOCK_D)
    out = tl.load(out_ptr + offs_out, mask=mask, other=0.0)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + offs_lse, delta, mask=mask_m)

    # 3. What the weights follow from; those of a query that saw nothing are 0, for its scores are -inf.
    q = _query_tile(q_ptr, q_strides, b, offs_m, H, T, D, BLOCK_D)
    lse = tl.load(lse_ptr + offs_lse, mask=mask_m, other=0.0)
    base = tl.where(lse == -float("inf"), 0.0, lse * _LOG2_E)
    dq = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)

    # 4. The absent slots: their share of dq, and this program's part of their dp.
    if HAS_ABSENT:
        number = _number_seen(mask_ptr, mask_strides, b, offs_t, T, HAS_MASK, CAUSAL, BLOCK_N)
        p_keys, p_scores = _absent_tile(q, p_ptr, p_strides, absent, number, D, PRECISION, BLOCK_D)
        p_weights, p_dscores = _dscores(p_scores, base, dout, p_keys, delta, PRECISION)
        p_dscores = p_dscores.to(q.dtype)
        dq = tl.dot(p_dscores, p_keys, dq, input_precision=PRECISION)
        if NEED_DP:
            dp = tl.dot(tl.trans(p_weights.to(q.dtype)), dout, input_precision=PRECISION)
            dp = tl.dot(tl.trans(p_dscores), q, dp, input_precision=PRECISION)  # (_BLOCK_SLOTS, BLOCK_D)
            offs_k = tl.arange(0, _BLOCK_SLOTS)
            is_absent = ((absent >> offs_k) & 1) != 0
            offs_dp = (offs_k.to(tl.int64) * parts + tl.program_id(0))[:, None] * D + offs_d[None, :]
            tl.store(dp_ptr + offs_dp, dp, mask=is_absent[:, None] & mask_d[None, :])

    # 5. The real slots.
    if NEED_DQ:
        blocks_n = tl.cdiv(tl.minimum(first_m % T + BLOCK_M, T) if CAUSAL else T, BLOCK_N)
        for step in range(0, S * blocks_n):
            row = step // blocks_n
            offs_n = step % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
            slot = _slot_of(slots, row)
            seen = _seen(mask_ptr, mask_strides, b, offs_n, T, HAS_MASK)
            keys, _kept = _key_tile(
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
            scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * _LOG2_E
            scores = tl.where(_visible(seen, offs_n, offs_t, CAUSAL), scores, -float("inf"))
            _weights, dscores = _dscores(scores, base, dout, keys, delta, PRECISION)
            dq = tl.dot(dscores.to(q.dtype), keys, dq, input_precision=PRECISION)
        tl.store(dq_ptr + offs_out, dq.to(dq_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_UNSPECIALISED)
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
    seed,
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
    noise = (seed.to(tl.int64), ordinal.to(tl.uint32), last_dropped.to(tl.uint32), scale)
    blocks_n = tl.cdiv(T, BLOCK_N)
    b = (tl.program_id(0) // (S * blocks_n)).to(tl.int64)
    row = tl.program_id(0) // blocks_n % S
    block_n = tl.program_id(0) % blocks_n
    slot = _slot_of(slots, row)
    offs_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    seen = _seen(mask_ptr, mask_strides, b, offs_n, T, HAS_MASK)
    keys, kept = _key_tile(
        c_ptr, c_strides, p_ptr, p_strides, noise, b, row, slot, offs_n, seen, T, D, DROPOUT, IS_ALIGNED, BLOCK_D
    )
    keys = keys.to(q_ptr.dtype.element_ty)

    # 2. dC~ over the queries of all heads. Causal queries before the first key see none of these keys; those of the
    #    first head, which is the only one by default, are passed over.
    dkeys = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for m in range(block_n * BLOCK_N if CAUSAL else 0, H * T, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < H * T
        q = _query_tile(q_ptr, q_strides, b, offs_m, H, T, D, BLOCK_D)
        dout = _query_tile(dout_ptr, dout_strides, b, offs_m, H, T, D, BLOCK_D)
        lse = tl.load(lse_ptr + b * H * T + offs_m, mask=mask_m, other=0.0)
        delta = tl.load(delta_ptr + b * H * T + offs_m, mask=mask_m, other=0.0)
        base = tl.where(lse == -float("inf"), 0.0, lse * _LOG2_E)
        scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * _LOG2_E
        scores = tl.where(_visible(seen, offs_n, offs_m % T, CAUSAL), scores, -float("inf"))
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


def window_attention(
    q: Tensor,
    c: Tensor,
    p: Tensor,
    mask: Tensor | None,
    slots: list[int],
    causal: bool,
    dropout: float,
    seed: int,
    block: int,
) -> tuple[Tensor, Tensor]:
    """`softmax(q C~^T) C~` over the k T keys of a window, and its log-sum-exp; `C~_i = dropout(C_i) + p_i`.

    Args:
        q: `(B, H, T, D)`. Any strides, here and below.
        c: `(B, S, T, D)`, the features of the real slots.
        p: `(k, D)`, k at most 15.
        mask: bool `(B, T)`, True for tokens, or None where all are. What lies at the others is not read.
        slots: the slots that the rows of c are, ascending.
        causal: whether a query sees, in every slot, only the tokens up to its own.
        dropout: in [0, 1), of elements of c.
        seed: 0 to 2^63 - 1, of the dropout's noise.
        block: number of the side block, which with the slot selects the noise.

    Returns:
        out `(B, H, T, D)` of the dtype of q, 0 for a query that sees nothing, and lse `(B, H, T)` in float32, -inf
        there; contiguous.

    Notes:
        Tiles of C are multiplied in the dtype of q. The reference serves widths without a tile, above 256 and above 128
        for float32 outside matrix units; float64, because the kernels accumulate in float32; and 16-bit operands on
        cards before compute capability 8.0.
    """
    kind = _products(q)
    if kind is None:
        return reference.window_attention(q, c, p, mask, slots, causal, dropout, seed, block)
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    tile = tiles.window_attention("fwd", kind, q.shape[3])
    programs = q.shape[0] * triton.cdiv(q.shape[1] * q.shape[2], tile.block_m)
    with device_of(q):
        _window_attention_fwd_kernel[(programs,)](
            out_ptr=out,
            lse_ptr=lse,
            absent=_absent(slots, p),
            HAS_ABSENT=len(slots) < p.shape[0],
            **_operands(q, c, p, mask, slots, causal, dropout, seed, block),
            **_launch(tile, kind, q.shape[3]),
        )
    return out, lse


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
    seed: int,
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
    kind = _products(q)
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
    shared = _operands(q, c, p, mask, slots, causal, dropout, seed, block) | {
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
            absent=_absent(slots, p),
            HAS_ABSENT=len(slots) < p.shape[0],
            NEED_DQ=need_dq,
            **shared,
            **_launch(of_queries, kind, width),
        )
        if slots and (need_dc or need_dp):
            _window_attention_bwd_keys_kernel[(programs_n * len(slots),)](
                dc_ptr=dc,
                NEED_DC=need_dc,
                **shared,
                **_launch(of_keys, kind, width),
            )
    if need_dp:
        dp = partial.sum(1).to(p.dtype)
    return dq, dc, dp


def _products(q: Tensor) -> str | None:
    """`products_of` q; None for a width that the kernels do not hold."""
    kind = products_of(q)
    return kind if kind and 0 < q.shape[3] <= tiles.window_attention_width(kind) else None


def _absent(slots: list[int], p: Tensor) -> int:
    """The slots of the window that are not real, as bits."""
    return sum(1 << slot for slot in range(p.shape[0]) if slot not in slots)


def _operands(
    q: Tensor,
    c: Tensor,
    p: Tensor,
    mask: Tensor | None,
    slots: list[int],
    causal: bool,
    dropout: float,
    seed: int,
    block: int,
) -> dict[str, Any]:
    """The arguments that all kernels take, by name."""
    _, heads, tokens, width = q.shape
    dropped = round(dropout * 2**32)  # words below it
    some_mask = q.new_empty(0, 0) if mask is None else mask  # never read: a kernel takes no None here
    return {
        "q_ptr": q,
        "q_strides": q.stride(),
        "c_ptr": c,
        "c_strides": c.stride(),
        "p_ptr": p,
        "p_strides": p.stride(),
        "mask_ptr": some_mask,
        "mask_strides": some_mask.stride(),
        "H": heads,
        "T": tokens,
        "D": width,
        "S": len(slots),
        "slots": sum(slot << (row * _SLOT_BITS.value) for row, slot in enumerate(slots)),
        "seed": seed,
        "ordinal": 16 * block,
        "last_dropped": max(dropped - 1, 0),
        "scale": 1 / (1 - dropout),
        "HAS_MASK": mask is not None,
        "CAUSAL": causal,
        "DROPOUT": dropped > 0,
        "IS_ALIGNED": width % 4 == 0,
    }


def _launch(tile: tiles.WindowTile, kind: str, width: int) -> dict[str, Any]:
    """The constants and options that a tile stands for."""
    return {
        "PRECISION": precision(kind),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": tiles.width_block(width),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": True,
    }
