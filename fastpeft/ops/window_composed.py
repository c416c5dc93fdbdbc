"""Window attention composed of the whole window, as keys and as values, and PyTorch's fused attention for GPUs.

It serves what no kernel of ours does, in the dtype of the operands. The letters are those of `window_attention.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_efficient_attention
from torch.nn import functional as F

from fastpeft.ops.window import Needs, Window

_attend = torch.ops.aten._scaled_dot_product_efficient_attention
_attend_backward = torch.ops.aten._scaled_dot_product_efficient_attention_backward
_WIDTHS = 8  # D is filled up to a multiple of it, and with it the address of every row of 16-bit operands is aligned
_BIASES = 16  # the same of a row of the bias
_LSES = 1 if torch.version.hip else 32  # of the log-sum-exp
_NEVER = 1e30  # a log-sum-exp beside which all weights are 0


def composed_holds(q: Tensor) -> bool:
    """Whether PyTorch's fused attention takes such operands on this GPU."""
    rows = q.new_empty(1, 1, 1, _WIDTHS)
    return can_use_efficient_attention(SDPAParams(rows, rows, rows, None, 0.0, False, False))


def window_attention_composed(q: Tensor, c: Tensor, p: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """As the reference; an absent slot has T equal keys."""
    of_lse = torch.promote_types(q.dtype, torch.float32)
    if 0 in q.shape:
        return torch.zeros_like(q), q.new_full(q.shape[:-1], -torch.inf, dtype=of_lse)
    rows, keys = _rows(q), _keys(q, c, p, window)
    bias, nothing = _bias(q, p, window)
    out, lse, *_ = _attend(rows, keys, keys, bias, True, scale=1.0)
    out = out.view(*q.shape[:3], -1)[..., : q.shape[3]].contiguous()
    lse = lse[:, 0, : rows.shape[2]].reshape(q.shape[:3]).to(of_lse)
    if nothing is not None:
        out.masked_fill_(nothing[..., None], 0)
        lse.masked_fill_(nothing, -torch.inf)
    return out, lse


def window_attention_backward_composed(
    dout: Tensor, q: Tensor, c: Tensor, p: Tensor, out: Tensor, lse: Tensor, window: Window, needs: Needs
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference. PyTorch returns the gradients of keys and of values in two tensors.

    Where few queries meet many keys it adds up dq in no fixed order, unless deterministic algorithms are asked for.
    """
    need_dq, need_dc, need_dp = needs
    if 0 in q.shape or not any(needs):
        dq, dc, dp = (x.new_zeros(x.shape if needed else (0,)) for x, needed in zip((q, c, p), needs, strict=True))
        return dq, dc, dp
    keys = _keys(q, c, p, window)
    drows, rows, of_out = (_rows(x.to(q.dtype)) for x in (dout, q, out))
    bias, _ = _bias(q, p, window)
    lse = lse.masked_fill(lse.isneginf(), _NEVER).view(len(q), 1, -1)
    lse = F.pad(lse, (0, -lse.shape[2] % _LSES))
    none = torch.empty((), dtype=torch.int64, device=q.device)  # of its dropout
    wanted = [need_dq, *[need_dc or need_dp] * 2, False]
    drows, dkeys, dvalues, _ = _attend_backward(
        drows, rows, keys, keys, bias, of_out, lse, none, none, 0.0, wanted, scale=1.0
    )
    dq = drows.view(*q.shape[:3], -1)[..., : q.shape[3]].contiguous() if need_dq else q.new_empty(0)
    dc, dp = c.new_empty(0), p.new_empty(0)
    if need_dc or need_dp:
        dwindow = dkeys.to(torch.float32).add_(dvalues).view(len(q), len(p), q.shape[2], -1)[..., : q.shape[3]]
        if need_dp:
            dp = dwindow.sum((0, 2)).to(p.dtype)
        if need_dc:
            dc = dwindow[:, list(window.slots)].contiguous()
            window.drop_(dc)
            dc = dc.to(c.dtype)
    return dq, dc, dp


def _rows(x: Tensor) -> Tensor:
    """x `(B, H, T, D)` as `(B, 1, H T, W)`, dense: all heads see the same keys, so they are one head with more rows."""
    return F.pad(x.reshape(len(x), 1, -1, x.shape[3]), (0, -x.shape[3] % _WIDTHS)).contiguous()


def _keys(q: Tensor, c: Tensor, p: Tensor, window: Window) -> Tensor:
    """The window `(B, 1, k T, W)`, keys and values."""
    batch, _, tokens, width = q.shape
    keys, slots = q.new_zeros(batch, len(p), tokens, width + -width % _WIDTHS), list(window.slots)
    keys[..., :width] = p[:, None]
    if window.dropout > 0:
        c = c.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        window.drop_(c)
    keys[:, slots, :, :width] = (c + p[slots, None]).to(q.dtype)
    return keys.view(batch, 1, len(p) * tokens, -1)


def _bias(q: Tensor, p: Tensor, window: Window) -> tuple[Tensor | None, Tensor | None]:
    """The bias of the scores `(B, 1, H T, k T)`, 0 or -inf, and which queries see no token `(B or 1, 1, T or 1)`.

    Both are None if every query sees all. The scores of a query that sees none have no bias, so that they are finite.
    """
    if window.mask is None and not window.causal:
        return None, None
    batch, heads, tokens, _ = q.shape
    visible = window.visible(q)
    nothing = ~visible.any(-1)
    hidden = ~(visible | nothing[..., None]).repeat(1, heads if window.causal else 1, len(p))  # (B or 1, H T or 1, k T)
    bias = q.new_zeros(*hidden.shape[:2], hidden.shape[2] + -hidden.shape[2] % _BIASES)[..., : hidden.shape[2]]
    bias = bias.masked_fill_(hidden, -torch.inf)[:, None]
    return bias.expand(batch, 1, heads * tokens, -1), nothing[:, None]
