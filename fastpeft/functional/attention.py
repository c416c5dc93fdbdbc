"""Attention of queries over a window of features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastpeft.errors import FastpeftError
from fastpeft.functional.checks import check_kinds
from fastpeft.ops.define import is_differentiated
from fastpeft.ops.dtypes import compute_dtype, no_autocast
from fastpeft.ops.window import Window
from fastpeft.ops.window_attention import window_attention_reference

MAX_WINDOW = 15  # slots that the dropout's counters can tell apart, odd


def window_attention(
    q: Tensor,
    c: Tensor,
    p: Tensor,
    mask: Tensor | None = None,
    *,
    slots: Sequence[int] | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    seed: int | Tensor = 0,
    block: int = 0,
) -> Tensor:
    r"""Attention of T queries over the k * T keys of a window of features, without that window in memory.

    Keys and values are the same, `C~_i = dropout(C_i) + p_i` for the slots i = 0 .. k - 1, one after the other along
    the tokens: `out = softmax(q C~^T) C~`. A slot that is not in `slots` lies outside the backbone: its C is 0 before
    and after dropout, so its T keys all equal `p_i`.

    Args:
        q: `(B, H, T, D)`, scaled and, with projections of keys, folded: `theta Wq Wk^T / sqrt(head_dim)`.
        c: `(B, S, T, D)`, the projected features of the S real slots.
        p: `(k, D)`, a vector for every slot, real or not; k at most 15.
        mask: bool `(B, T)`, True for tokens and False for padding, which no query sees in any slot. None is all True.
        slots: which of the k slots the rows of c are, ascending. None where all are real (S = k).
        causal: whether a query sees, in every slot, only the tokens up to its own.
        dropout: probability in [0, 1) with which an element of c is dropped; what is kept is scaled by `1/(1 - p)`.
        seed: 0 to 2^63 - 1, of the dropout's noise. It may be an int64 tensor of one element on the device of q, read
            when the kernels run, unchecked: replaying a CUDA graph that captured them takes the value it holds by then.
        block: number of the side block, from 0, which with the slot selects the noise.

    All operands are brought to the dtype of q, under autocast to autocast's dtype.

    Returns:
        `(B, H, T, D)` in that dtype; 0 for a query that sees no token.

    Raises:
        FastpeftError: shapes do not fit, an operand is no floating number or on another device, or an argument is out
            of its range.

    Notes:
        Accumulates in float32 (float64 for float64). Differentiable in q, c and p. Saved for backward: the operands,
        the output and a log-sum-exp for each query; neither the T x k T scores nor what is dropped, which backward
        makes again. The dropped elements are a function of (seed, block, slot, position) alone. Where derivatives are
        taken forward or by `torch.func`, plain PyTorch computes, and a dropout above 0 is refused.

    Example:
        >>> q, c, p = torch.randn(2, 1, 5, 8), torch.randn(2, 3, 5, 8), torch.randn(3, 8)
        >>> window_attention(q, c, p).shape
        torch.Size([2, 1, 5, 8])
    """
    slots = range(p.shape[0]) if slots is None else slots
    if (
        q.dim() != 4
        or p.dim() != 2
        or c.shape != (q.shape[0], len(slots), *q.shape[2:])
        or p.shape[1] != q.shape[3]
        or (mask is not None and (mask.shape != (q.shape[0], q.shape[2]) or mask.dtype != torch.bool))
    ):
        raise FastpeftError(
            "window_attention takes q (B, H, T, D), c (B, S, T, D) with one row per real slot, p (k, D) and a bool "
            f"mask (B, T) or None; got q {tuple(q.shape)}, c {tuple(c.shape)}, p {tuple(p.shape)}, mask "
            f"{None if mask is None else (tuple(mask.shape), mask.dtype)} and {len(slots)} real slots."
        )
    if p.shape[0] > MAX_WINDOW or list(slots) != sorted({slot for slot in slots if 0 <= slot < p.shape[0]}):
        raise FastpeftError(
            f"window_attention: slots {list(slots)} of {p.shape[0]}; allowed are different slots of at most "
            f"{MAX_WINDOW}, from 0 and in ascending order."
        )
    if not 0 <= dropout < 1 or not _is_seed(seed, q.device) or not 0 <= block < 2**28:
        raise FastpeftError(
            f"window_attention: dropout is {dropout}, seed {seed} and block {block}; allowed are 0 <= dropout < 1, "
            "0 <= seed < 2^63 or an int64 tensor of one element on the device of q, and 0 <= block < 2^28."
        )
    check_kinds("window_attention", q.device, "q c p", q, c, p)
    if mask is not None and mask.device != q.device:
        raise FastpeftError(f"window_attention: mask is on {mask.device} and q on {q.device}; put them on one device.")
    dtype = compute_dtype(q, q)
    noise = None
    if dropout > 0:
        noise = seed if isinstance(seed, Tensor) else torch.full((), seed, dtype=torch.int64, device=q.device)
    by_torch_func = is_differentiated()  # for which the op has no formula
    if by_torch_func and dropout > 0:
        raise FastpeftError(
            f"window_attention: dropout is {dropout} where derivatives are taken forward or by torch.func; "
            "allowed is 0. Set the network to eval()."
        )
    q, c, p = (operand.to(dtype) for operand in (q, c, p))
    with no_autocast(q.device):  # which would undo the accumulation in float32
        if by_torch_func:
            return window_attention_reference(q, c, p, Window(mask, slots, causal, dropout, noise, block))[0]
        out, _ = torch.ops.fastpeft.window_attention(q, c, p, mask, list(slots), causal, dropout, noise, block)
    return out


def _is_seed(seed: int | Tensor, device: torch.device) -> bool:
    if isinstance(seed, Tensor):
        return seed.dtype == torch.int64 and seed.numel() == 1 and seed.device == device
    return not isinstance(seed, float) and 0 <= seed < 2**63
