"""Attention over a window of features: keys and values are one stream of tiles, and the window is never in memory.

    C~_i = dropout(C_i) + p_i      out = softmax(q C~^T) C~      lse = log sum exp(q C~^T)
    P = exp(q C~^T - lse)          dS = P * (dout C~^T - delta)  delta = row sums of dout * out
    dq = dS C~                     dC~ = P^T dout + dS^T q       dC_i = dC~_i * kept / (1 - dropout)
    dp_i = sum of dC~_i over sentences and tokens

    B  sentences     H  heads     T  tokens     D  width     K  slots of the window, of which S are real
    M  rows of queries, all heads of a sentence one after the other, H T of them
    N  keys          q, out, dq (B, H, T, D)    c, dc (B, S, T, D)    p, dp (K, D)    lse (B, H, T)

p never meets a tile of C, for all keys of a slot have the same:

    q (C + p)^T = q C^T + q p^T    P (C + p) = P C + (row sums of P) p    and so for dout and dS

So C is multiplied as it was loaded. It goes from memory to the matrix units through shared memory and no registers, and
serves as keys and as values. With dropout its dropped elements become 0 on the way, and the products are multiplied by
1 / (1 - dropout) instead of C.

Of one sentence, a program of the forward holds BLOCK_M queries, of any heads, and runs over the tiles of every real
slot. The slots that are not real are one key each, whose score q p^T gains the logarithm of how many tokens the query
sees. The softmax is online, in float32. Where the programs are fewer than the GPU's multiprocessors, each is split: a
part of the tiles to each split, whose outputs and lse another kernel puts together in their order.

Backward has no atomics. One kernel makes what a slot's scores have in common, lse - q p^T and delta - dout p^T, and the
absent slots' dp; one over queries makes dq, split as the forward; one over keys dC, where it adds up all heads, and the
real slots' dp. dp and the parts of dq are sums that PyTorch adds in a fixed order. Saved for backward are the operands,
out and lse.

Dropout's words are drawn where a tile is loaded: four elements of C from one counter. Where D is not a multiple of four
a tile's elements do not begin at a counter's first word, and each draws its own.

What this should cost, beside `scaled_dot_product_attention` on a window that PyTorch stacks, drops out and shifts.
Counted in bytes for each element of C, in half precision, operands of width D alone:

                 here                           composed
    forward      2: C                           17: stack 4, dropout 5, + p 4, keys and values 4
    backward     6: C twice, dC                 25: keys and values 4, dK and dV 4, their sum 6, dropout 5, + p 2,
                                                    unstack 4
    kept         2: C                           3: the window, as keys and as values, and a byte of the mask

A split adds 8 bytes for each element of out, 4.4 for each of C with 5 splits and 9 slots; an H100's second-level cache
holds them.

Multiply-adds for each element of C and each query of a head: 2 forward here and there, backward 7 here (the scores and
dP twice) and 5 there. Clocks that a multiprocessor needs for a step of the loop with D = 128 and no mask: to issue its
instructions, counted in machine code, four a clock; and for its multiply-adds by data sheets, 1,024 a clock on an A100
and 2,048 on an H100:

                 A100: queries x keys, issue, products     H100
    forward      128 x 32    920   1,024                   64 x 64    587     512
    queries      128 x 32    894   1,536                   64 x 64    608     768
    keys         16 x 128    448   1,024                   64 x 64    568   1,024

An H100 holds two programs of four warps, an A100 one of eight, so that some warps multiply while others issue. Then
instructions bound an H100's forward at 0.87 of the rate of products, and products the rest. No product of a program is
in flight beside its own softmax: each waits for its result. Two or three stages differ in nothing there, and Triton 3.9
does not compile this loop with `warp_specialize` for sm_90. Written so that q C^T of the next tile comes before this
one's softmax, half of the exponentials run beside it. But C is keys and values: that tile is needed twice. Read again,
it makes a step 757 instructions, and 669 where it stays in registers, of 255 that a thread has: both more than the
587 which bound it already.

Dropout takes about 19 instructions an element of C on sm_90 and 34 on sm_80 (the forward with it and without). With
BLOCK_M = 128 the words of a tile take 1.2 times as long to issue as its products take on an H100, 1.1 times on an A100.
So feature dropout bounds training where it is on, memory or the launches where it is off and T is short. All of it is a
prediction, not a measurement. `bench/data/static.csv` has what compiling gave.

Source: k-LST as described in `fastpeft.ladder.side`; FlashAttention-2 (Dao, 2023, arXiv 2307.08691) for the online
softmax and its backward; Flash-Decoding (Dao et al., 2023) for the splits.
"""

from __future__ import annotations

import math

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
    of_slot,
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

_LN_2 = tl.constexpr(math.log(2))


@triton.jit(do_not_specialize=UNSPECIALISED)
def _window_attention_fwd_kernel(
    q_ptr,
    q_strides,
    c_ptr,
    c_strides,
    p_ptr,
    p_strides,
    mask_ptr,
    out_ptr,
    lse_ptr,
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
    # 1. This program's queries: BLOCK_M rows of one sentence. What addresses are made of has 64 bits.
    noise = (tl.load(seed_ptr), ordinal.to(tl.uint32), last_dropped.to(tl.uint32))
    split = tl.program_id(1)
    blocks_m = tl.cdiv(M, BLOCK_M)
    b = (tl.program_id(0) // blocks_m).to(tl.int64)
    first_m = tl.program_id(0) % blocks_m * BLOCK_M
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_t = offs_m % T
    q = query_tile(q_ptr, q_strides, b, offs_m, M, D, BLOCK_D)

    # 2. q p^T, to the base of 2 as all scores, and the absent slots, which are keys of the first split.
    p = position_tile(p_ptr, p_strides, K, D, BLOCK_D).to(q.dtype)
    of_positions = tl.dot(q, tl.trans(p), input_precision=PRECISION) * LOG2_E
    highest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    by_slot = tl.zeros((BLOCK_M, BLOCK_SLOTS), dtype=tl.float32)  # sums of weights
    if HAS_ABSENT:
        number = number_seen(mask_ptr, b, offs_t, T, HAS_MASK, CAUSAL, BLOCK_N)
        p_scores = absent_scores(of_positions, absent, tl.where(split == 0, number, 0))
        highest = tl.max(p_scores, 1)
        by_slot = tl.exp2(p_scores - finite(highest)[:, None])

    # 3. The real slots, tile by tile; one loop over all, so that the next tile is on its way across slots too. Of
    #    causal queries none sees beyond the last of the program.
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)  # P C
    unit = scale * LOG2_E  # of q C^T, which are of C before it is scaled
    blocks_n = tl.cdiv(tl.minimum(first_m % T + BLOCK_M, T) if CAUSAL else T, BLOCK_N)
    first, end = steps_of_split(S * blocks_n, split, tl.num_programs(1))
    for step in range(first, end):
        row = step // blocks_n
        offs_n = step % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
        slot = slot_of(slots, row)
        seen = tokens_seen(mask_ptr, b, offs_n, T, HAS_MASK)
        c = feature_tile(c_ptr, c_strides, b, row, offs_n, seen, D, BLOCK_D).to(q.dtype)
        if DROPOUT:
            c = tl.where(kept_tile(noise, b, slot, offs_n, T, D, IS_ALIGNED, BLOCK_D), c, 0.0)
        scores = tl.dot(q, tl.trans(c), input_precision=PRECISION)
        scores = tl.where(visible_keys(seen, offs_n, offs_t, CAUSAL), scores, -float("inf"))
        shift = of_slot(of_positions, slot)  # q p of this slot
        new = tl.maximum(highest, tl.max(scores, 1) * unit + shift)
        base = finite(new)
        weights = tl.exp2(scores * unit - (base - shift)[:, None])
        shrink = tl.exp2(highest - base)
        acc = tl.dot(weights.to(q.dtype), c, acc * shrink[:, None], input_precision=PRECISION)
        by_slot = by_slot * shrink[:, None] + to_slot(tl.sum(weights, 1), slot)
        highest = new

    # 4. The output, P C~ = P C + (P's sums by slot) p, and the log-sum-exp; 0 and -inf where nothing was seen.
    total = tl.sum(by_slot, 1)
    saw = total > 0
    total = tl.where(saw, total, 1.0)
    by_slot = by_slot / total[:, None]
    out = tl.dot(by_slot.to(q.dtype), p, acc * (scale / total)[:, None], input_precision=PRECISION)
    lse = tl.where(saw, (highest + tl.log2(total)) * _LN_2, -float("inf"))
    first_out = split.to(tl.int64) * rows + b * M + first_m
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < M
    mask = mask_m[:, None] & (offs_d < D)[None, :]
    offs_out = tl.arange(0, BLOCK_M)[:, None] * D + offs_d[None, :]
    tl.store(out_ptr + first_out * D + offs_out, out.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(lse_ptr + first_out + tl.arange(0, BLOCK_M), lse, mask=mask_m)


@triton.jit
def _window_attention_combine_kernel(
    parts_ptr,
    part_lse_ptr,
    out_ptr,
    lse_ptr,
    rows,
    D,
    splits,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The output of all splits from those of each, in their order: sum of exp(lse of split - lse) out of split."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < rows
    mask = mask_m[:, None] & (offs_d < D)[None, :]
    highest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    offs = offs_m  # of a split
    for _split in range(0, splits):
        highest = tl.maximum(highest, tl.load(part_lse_ptr + offs, mask=mask_m, other=-float("inf")))
        offs += rows
    base = finite(highest)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    offs = offs_m
    for _split in range(0, splits):
        weight = tl.exp(tl.load(part_lse_ptr + offs, mask=mask_m, other=-float("inf")) - base)
        acc += weight[:, None] * tl.load(parts_ptr + offs[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
        total += weight
        offs += rows
    saw = total > 0
    total = tl.where(saw, total, 1.0)
    tl.store(
        out_ptr + offs_m[:, None] * D + offs_d[None, :], (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=mask
    )
    tl.store(lse_ptr + offs_m, tl.where(saw, base + tl.log(total), -float("inf")), mask=mask_m)


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
        seed: int64, one element on the device of q, of the dropout's noise; None where nothing is dropped.
        block: number of the side block, which with the slot selects the noise.

    Returns:
        out `(B, H, T, D)` of the dtype of q, 0 for a query that sees nothing, and lse `(B, H, T)` in float32, -inf
        there; contiguous.

    Notes:
        Tiles of C are multiplied in the dtype of q. The ATen form serves widths without a tile, above 256 and above 128
        for float32 outside matrix units; float64, because the kernels accumulate in float32; and 16-bit operands on
        GPUs before compute capability 8.0. The number of splits, and with it the last bits, depends on the sizes and
        on the number of the GPU's multiprocessors. Heads that do not follow each other in memory are copied.
    """
    kind = kind_of(q)
    if kind is None:
        return aten.window_attention(q, c, p, mask, slots, causal, dropout, seed, block)
    batch, heads, tokens, width = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    gpu = tiles.gpu(q.device)
    tile = tiles.window_attention("fwd", kind, width, dropout > 0, gpu.architecture)
    programs = batch * triton.cdiv(heads * tokens, tile.block_m)
    splits = splits_of(programs, len(slots) * triton.cdiv(tokens, tile.block_n), gpu)
    shared = operands(q, c, p, mask, slots, causal, dropout, seed, block)
    parts, part_lse = out, lse
    if splits > 1:
        parts, part_lse = (q.new_empty((splits, *x.shape), dtype=torch.float32) for x in (out, lse))
    with torch.cuda.device_of(q):
        launch(
            _window_attention_fwd_kernel,
            (programs, splits),
            shared,
            {"out_ptr": parts, "lse_ptr": part_lse, "rows": lse.numel()},
            launch_options(tile, kind, width),
        )
        if splits > 1:
            _window_attention_combine_kernel[(triton.cdiv(lse.numel(), tiles.WINDOW_COMBINE_ROWS),)](
                parts,
                part_lse,
                out,
                lse,
                lse.numel(),
                width,
                splits,
                BLOCK_M=tiles.WINDOW_COMBINE_ROWS,
                BLOCK_D=tiles.width_block(width),
                enable_fp_fusion=True,
            )
    return out, lse
