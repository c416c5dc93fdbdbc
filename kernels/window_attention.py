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

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpeft.kernels import tiles
from fastpeft.kernels.launch import device_of
from fastpeft.kernels.window import (
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

_LN_2 = tl.constexpr(math.log(2))


@triton.jit
def _online_softmax(acc, highest, total, scores, keys, PRECISION: tl.constexpr):
    """One more tile of keys: the sum of weighted keys, the highest score and the sum of weights so far."""
    new = tl.maximum(highest, tl.max(scores, 1))
    base = tl.where(new == -float("inf"), 0.0, new)  # of a query that has seen nothing yet
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(highest - base)
    acc = tl.dot(weights.to(keys.dtype), keys, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new, total * shrink + tl.sum(weights, 1)


@triton.jit(do_not_specialize=UNSPECIALISED)
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
    # 1. This program's queries: BLOCK_M rows of one sentence. What addresses are made of has 64 bits.
    noise = (tl.load(seed_ptr), ordinal.to(tl.uint32), last_dropped.to(tl.uint32), scale)
    blocks_m = tl.cdiv(H * T, BLOCK_M)
    b = (tl.program_id(0) // blocks_m).to(tl.int64)
    first_m = tl.program_id(0) % blocks_m * BLOCK_M
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_t = offs_m % T
    q = query_tile(q_ptr, q_strides, b, offs_m, H, T, D, BLOCK_D)
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    highest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)

    # 2. The absent slots, one key each.
    if HAS_ABSENT:
        number = number_seen(mask_ptr, mask_strides, b, offs_t, T, HAS_MASK, CAUSAL, BLOCK_N)
        p_keys, p_scores = absent_tile(q, p_ptr, p_strides, absent, number, D, PRECISION, BLOCK_D)
        acc, highest, total = _online_softmax(acc, highest, total, p_scores, p_keys, PRECISION)

    # 3. The real slots, tile by tile; one loop over all, so that the next tile is on its way across slots too. Of
    #    causal queries none sees beyond the last of the program.
    blocks_n = tl.cdiv(tl.minimum(first_m % T + BLOCK_M, T) if CAUSAL else T, BLOCK_N)
    for step in range(0, S * blocks_n):
        row = step // blocks_n
        offs_n = step % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
        slot = slot_of(slots, row)
        seen = tokens_seen(mask_ptr, mask_strides, b, offs_n, T, HAS_MASK)
        keys, _kept = key_tile(
            c_ptr, c_strides, p_ptr, p_strides, noise, b, row, slot, offs_n, seen, T, D, DROPOUT, IS_ALIGNED, BLOCK_D
        )
        keys = keys.to(q.dtype)
        scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * LOG2_E
        scores = tl.where(visible_keys(seen, offs_n, offs_t, CAUSAL), scores, -float("inf"))
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


def window_attention(
    q: Tensor,
    c: Tensor,
    p: Tensor,
    mask: Tensor | None,
    slots: list[int],
    causal: bool,
    dropout: float,
    seed: Tensor | None,
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
    kind = kind_of(q)
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
            absent=absent_slots(slots, p),
            HAS_ABSENT=len(slots) < p.shape[0],
            **operands(q, c, p, mask, slots, causal, dropout, seed, block),
            **launch_options(tile, kind, q.shape[3]),
        )
    return out, lse
