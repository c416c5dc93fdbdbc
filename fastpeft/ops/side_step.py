"""`fastpeft::side_step_`: what a side network does with a feature of one token: its projections, and a side block.

    C   = W f + b                      for each block that reads the feature f, which may come over its root mean square
    a   = softmax(theta Q^T K^T) K     of each head; K are the window's C of all tokens, T k rows of D
    x   = V a + c + C_own + gate theta    with a gate in place of attention: x = C + gate (theta - C)
    y   = norm_1(x + W_o SelfAttention(W x + b) + b_o)
    out = norm_2(y + W_2 activation(W_1 y + b_1) + b_2)

Dimension letters are as in `fastpeft.ladder.side`.

A block has a dozen products, of matrices of some hundred columns. One at a time their calls take several times as long
as their numbers; on a CPU, C++ computes all in one call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fastpeft.ops.define import define

# by the names that transformers has for them; the op takes their numbers
ACTIVATIONS = {"relu": 0, "silu": 1, "swish": 1, "gelu": 2, "gelu_new": 3, "gelu_pytorch_tanh": 3}
_FUNCTIONS: tuple[Callable[[Tensor], Tensor], ...] = (F.relu, F.silu, F.gelu, partial(F.gelu, approximate="tanh"))


@torch.no_grad()
def side_step_reference(
    feature: Tensor,
    theta: Tensor,
    parts: Tensor,
    weight: Tensor,
    bias: Tensor,
    places: Sequence[int],
    eps: float,
    number: int,
    block: Tensor,
    window: Tensor,
    keys: Tensor,
    visible: Tensor | None,
    hidden: int,
    fused_heads: int,
    own: int,
    gate: float,
    heads: int,
    eps_1: float,
    eps_2: float,
    activation: int,
) -> Tensor:
    """The state after the block, `(B, D)`; that before it where there is none.

    Args:
        feature: `(B, d)`.
        theta: `(B, D)`, the state before the block.
        parts: `(B, N, k, D)`, the projections of the windows of all blocks, slot by slot; those of the feature are
            written.
        weight, bias: `(R D, d)` and `(R D,)`, of the R projections of the feature.
        places: where each of them goes, as `block k + slot`.
        eps: beside the feature's mean square; 0 takes the feature as it is.
        number: of the block, from 0; -1 runs none.
        block: its weights one after the other, `weights_of`.
        window: `(B, 1, T, k D)`, the window's keys of all tokens; those of the last token are written. Not read with a
            gate.
        keys: `(B, 1, T, 2 D)`, keys and values of the self-attention, likewise.
        visible: bool `(B or 1, 1, 1, T)`, which tokens the new one sees; None is all.
        hidden: the width of the feed-forward part.
        fused_heads: of the cross-attention; 0 is a gate.
        own: the slot whose projection is added, -1 where none is.
        gate: how far x is from the feature to the state; beside attention, how often the state is added.
        heads: of the self-attention.
        eps_1, eps_2: of the norms.
        activation: a value of `ACTIVATIONS`.
    """
    batch, width = theta.shape
    if places:
        shown = F.rms_norm(feature, feature.shape[-1:], eps=eps) if eps > 0 else feature
        for place, part in zip(places, F.linear(shown, weight, bias).split(width, dim=1)):
            parts[:, place // parts.shape[2], place % parts.shape[2]] = part
    if number < 0:
        return theta.clone()
    own_parts, fused = parts[:, number], fused_heads * width
    fusion = [(fused, width), (width, fused), (width,)] if fused_heads else []
    linears = [(3 * width, width), (width, width), (hidden, width), (width, hidden)]
    shapes = [*fusion, *(shape for n, k in linears for shape in ((n, k), (n,))), *4 * [(width,)]]
    matrices = [each.view(shape) for each, shape in zip(block.split([torch.Size(s).numel() for s in shapes]), shapes)]
    encoder = matrices[-12:]
    if fused_heads:
        query, value, out_bias = matrices[:3]
        window[:, 0, -1] = own_parts.flatten(1)
        slots = parts.shape[2]
        rows = window.reshape(batch, 1, window.shape[2] * slots, width).expand(-1, fused_heads, -1, -1)
        seen = None if visible is None else visible[..., None].expand(*visible.shape, slots).flatten(-2)
        q = F.linear(theta, query).view(batch, fused_heads, 1, width)
        attended = F.scaled_dot_product_attention(q, rows.to(q.dtype), rows.to(q.dtype), attn_mask=seen, scale=1.0)
        x = F.linear(attended.reshape(batch, fused), value, out_bias)
        x = x if own < 0 else x + own_parts[:, own]
        x = x + gate * theta
    else:
        x = torch.lerp(own_parts[:, 0].to(theta.dtype), theta, gate)
    q, states = F.linear(x, *encoder[:2]).split((width, 2 * width), dim=1)
    keys[:, 0, -1] = states
    shape = heads, width // heads
    k, v = (part.unflatten(-1, shape).transpose(1, 2) for part in keys[:, 0].to(q.dtype).split(width, dim=-1))
    attended = F.scaled_dot_product_attention(q.unflatten(-1, shape)[:, :, None], k, v, attn_mask=visible)
    y = F.linear(attended.reshape(batch, width), *encoder[2:4])
    y = F.layer_norm(x + y, (width,), encoder[8], encoder[9], eps_1)
    inner = _FUNCTIONS[activation](F.linear(y, *encoder[4:6]))
    return F.layer_norm(y + F.linear(inner, *encoder[6:8]), (width,), encoder[10], encoder[11], eps_2)


def weights_of(fusion: Sequence[Tensor], encoder: Sequence[Tensor]) -> Tensor:
    """The weights of a block, as the op takes them.

    Args:
        fusion: Q `(H D, D)`, V `(D, H D)` and c `(D,)` of the cross-attention; empty with a gate.
        encoder: weight and bias of W, W_o, W_1, W_2 and of both norms.
    """
    return torch.cat([each.flatten() for each in (*fusion, *encoder)])


define(
    "side_step_",
    "(Tensor feature, Tensor theta, Tensor(a!) parts, Tensor weight, Tensor bias, int[] places, float eps, int number, "
    "Tensor block, Tensor(b!) window, Tensor(c!) keys, Tensor? visible, int hidden, int fused_heads, int own, "
    "float gate, int heads, float eps_1, float eps_2, int activation) -> Tensor",
    shapes=lambda feature, theta, *_: theta.new_empty(theta.shape),
    reference=side_step_reference,
    aten=side_step_reference,
)
