"""What the kernels of window attention share: tiles of its operands, and what their launchers pass.

The letters are those of `window_attention.py`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpeft.kernels import tiles
from fastpeft.kernels.launch import dot_kind_of, precision
from fastpeft.kernels.philox import in_order, random_words
from fastpeft.ops import noise as contract

LOG2_E = tl.constexpr(math.log2(math.e))
# arguments that differ from block to block and step to step
UNSPECIALISED = ["slots", "absent", "seed_ptr", "ordinal", "last_dropped"]
_SLOT_BITS = tl.constexpr(4)  # of a slot's number, where a list of slots is one integer
BLOCK_SLOTS = tl.constexpr(16)  # keys of the tile of absent slots, more than a window has
_DROPOUT = tl.constexpr(contract.STREAM_DROPOUT)


@triton.jit
def query_tile(ptr, strides, b, offs_m, M, D, BLOCK_D: tl.constexpr):
    """Rows offs_m of one sentence of q, or of what is shaped like it: (BLOCK_M, BLOCK_D)."""
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    ptrs = ptr + b * strides[0] + offs_m.to(tl.int64) * strides[1]
    mask = (offs_m < M)[:, None] & (offs_d < D)[None, :]
    return tl.load(ptrs[:, None] + offs_d[None, :] * strides[2], mask=mask, other=0.0)


@triton.jit
def slot_of(slots, row):
    """Which slot a row of c is."""
    return (slots >> (row * _SLOT_BITS)) & (BLOCK_SLOTS - 1)


@triton.jit
def tokens_seen(mask_ptr, b, offs_n, T, HAS_MASK: tl.constexpr):
    """Which of the keys (BLOCK_N,) are tokens."""
    seen = offs_n < T
    if HAS_MASK:
        seen = tl.load(mask_ptr + b * T + offs_n, mask=seen, other=0) != 0
    return seen


@triton.jit
def visible_keys(seen, offs_n, offs_t, CAUSAL: tl.constexpr):
    """Which of the keys each query sees: (BLOCK_M, BLOCK_N)."""
    return seen[None, :] & ((offs_n[None, :] <= offs_t[:, None]) | (not CAUSAL))


@triton.jit
def feature_tile(c_ptr, c_strides, b, row, offs_n, seen, D, BLOCK_D: tl.constexpr):
    """C of the keys offs_n of one slot, as it is in memory: (BLOCK_N, BLOCK_D), 0 where it is not seen."""
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    ptrs = c_ptr + b * c_strides[0] + row.to(tl.int64) * c_strides[1]
    ptrs += offs_n.to(tl.int64)[:, None] * c_strides[2] + offs_d[None, :] * c_strides[3]
    return tl.load(ptrs, mask=seen[:, None] & (offs_d < D)[None, :], other=0.0)


@triton.jit
def kept_tile(noise, b, slot, offs_n, T, D, IS_ALIGNED: tl.constexpr, BLOCK_D: tl.constexpr):
    """Which elements of a tile of C dropout keeps: (BLOCK_N, BLOCK_D)."""
    seed, ordinal, last_dropped = noise
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
    return words > last_dropped


@triton.jit
def position_tile(p_ptr, p_strides, K, D, BLOCK_D: tl.constexpr):
    """p of every slot: (BLOCK_SLOTS, BLOCK_D)."""
    offs_k = tl.arange(0, BLOCK_SLOTS).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    ptrs = p_ptr + offs_k[:, None] * p_strides[0] + offs_d[None, :] * p_strides[1]
    return tl.load(ptrs, mask=(offs_k < K)[:, None] & (offs_d < D)[None, :], other=0.0)


@triton.jit
def of_slot(by_slot, slot):
    """The column of one slot: (BLOCK_M,)."""
    return tl.sum(tl.where(tl.arange(0, BLOCK_SLOTS)[None, :] == slot, by_slot, 0.0), 1)


@triton.jit
def to_slot(values, slot):
    """The values (BLOCK_M,) in the column of one slot, beside zeros."""
    return tl.where(tl.arange(0, BLOCK_SLOTS)[None, :] == slot, values[:, None], 0.0)


@triton.jit
def number_seen(mask_ptr, b, offs_t, T, HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr):
    """How many tokens each query sees, int32 (BLOCK_M,)."""
    number = tl.zeros(offs_t.shape, dtype=tl.int32)
    if HAS_MASK:
        for n in range(0, T, BLOCK_N):
            offs_n = n + tl.arange(0, BLOCK_N)
            seen = tokens_seen(mask_ptr, b, offs_n, T, HAS_MASK)
            number += tl.sum(visible_keys(seen, offs_n, offs_t, CAUSAL).to(tl.int32), 1)
    else:
        number += offs_t + 1 if CAUSAL else T
    return number


@triton.jit
def absent_scores(scores, absent, number):
    """The absent slots' scores (BLOCK_M, BLOCK_SLOTS): a key stands for as many as the query sees tokens.

    -inf for other slots, and for a query that sees none.
    """
    is_absent = ((absent >> tl.arange(0, BLOCK_SLOTS)) & 1) != 0
    scores += tl.log2(tl.maximum(number, 1).to(tl.float32))[:, None]
    return tl.where(is_absent[None, :] & (number > 0)[:, None], scores, -float("inf"))


@triton.jit
def finite(highest):
    """What exponents are taken relative to: 0 for a query that has seen nothing."""
    return tl.where(highest == -float("inf"), 0.0, highest)


@triton.jit
def steps_of_split(steps, split, splits):
    """The range of the tiles of keys that are one split's."""
    size = tl.cdiv(steps, splits)
    return tl.minimum(split * size, steps), tl.minimum((split + 1) * size, steps)


def kind_of(q: Tensor) -> tiles.DotKind | None:
    """`dot_kind_of` q; None for a width that the kernels do not hold."""
    kind = dot_kind_of(q)
    return kind if kind and 0 < q.shape[3] <= tiles.window_attention_width(kind) else None


def operands(
    q: Tensor,
    c: Tensor,
    p: Tensor,
    mask: Tensor | None,
    slots: list[int],
    causal: bool,
    dropout: float,
    seed: Tensor | None,
    block: int,
) -> dict[str, Any]:
    """The arguments that several kernels take, by name."""
    _, heads, tokens, width = q.shape
    queries = q.flatten(1, 2)
    p = p.contiguous()  # at most 15 rows; slots times a stride are 32 bits in the kernels
    dropped = round(dropout * 2**32)  # words below it
    # Triton lays C out for the narrowest of what it is loaded by, and bytes would cost it ldmatrix and cp.async
    words = q.new_empty(0, dtype=torch.int32) if mask is None else mask.to(torch.int32).contiguous()
    return {
        "q_ptr": queries,
        "q_strides": queries.stride(),
        "c_ptr": c,
        "c_strides": c.stride(),
        "p_ptr": p,
        "p_strides": p.stride(),
        "mask_ptr": words,
        "M": heads * tokens,
        "T": tokens,
        "D": width,
        "K": p.shape[0],
        "S": len(slots),
        "absent": sum(1 << slot for slot in range(p.shape[0]) if slot not in slots),
        "HAS_ABSENT": len(slots) < p.shape[0],
        "slots": sum(slot << (row * _SLOT_BITS.value) for row, slot in enumerate(slots)),
        "seed_ptr": q.new_empty(1, dtype=torch.int64) if seed is None else seed,  # read where there is dropout
        "ordinal": 16 * block,
        "last_dropped": max(dropped - 1, 0),
        "scale": 1 / (1 - dropout),
        "HAS_MASK": mask is not None,
        "CAUSAL": causal,
        "DROPOUT": dropped > 0,
        "IS_ALIGNED": width % 4 == 0,
    }


def splits_of(programs: int, steps: int, gpu: tiles.Gpu) -> int:
    """In how many splits programs of so many tiles of keys fill the GPU; no split is empty."""
    size = max(1, steps * programs // gpu.multiprocessors)  # tiles of one
    return max(1, math.ceil(steps / size))


def launch(
    kernel: Any, grid: tuple[int, ...], shared: dict[str, Any], own: dict[str, Any], how: dict[str, Any]
) -> None:
    """Launch a kernel with what it takes of the arguments that several share, its own and its constants."""
    kernel[grid](**{name: value for name, value in shared.items() if name in kernel.arg_names}, **own, **how)


def launch_options(tile: tiles.WindowTile, kind: tiles.DotKind, width: int) -> dict[str, Any]:
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
