"""`fastpeft::side_step_`: a side block for one token of each text, which appends to what its attentions keep.

    a   = softmax(theta Q^T C^T) C     of each head, C the window's keys of all tokens, T k rows of D
    x   = V a + c + C_own              with a gate in place of it: x = B + gate (theta - B)
    y   = norm_1(x + W_o SelfAttention(W x + b) + b_o)
    out = norm_2(y + W_2 activation(W_1 y + b_1) + b_2)

A block has a dozen products, of matrices of some hundred columns. One at a time their calls take several times as long
as their numbers; on a CPU, C++ computes a block in one call.
"""

from __future__ import annotations

from collections.abc import Callable
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
    theta: Tensor,
    parts: list[Tensor],
    window: Tensor,
    keys: Tensor,
    visible: Tensor | None,
    fusion: list[Tensor],
    encoder: list[Tensor],
    own: int,
    gate: float,
    heads: int,
    eps_1: float,
    eps_2: float,
    activation: int,
) -> Tensor:
    """The new state `(B, D)`.

    Args:
        theta: `(B, D)`, the state before the block.
        parts: the projections of the window's slots, each `(B, D)`; those of slots outside the backbone may come
            together.
        window: `(B, 1, T, k D)`, the window's keys of all tokens; those of the last token are written. With a gate it
            has no elements.
        keys: `(B, 1, T, 2 D)`, keys and values of the self-attention, likewise.
        visible: bool `(B or 1, 1, 1, T)`, which tokens the new one sees; None is all.
        fusion: Q `(H D, D)`, V `(D, H D)` and c `(D,)` of the cross-attention; empty with a gate.
        encoder: weight and bias of W, W_o, W_1, W_2 and of both norms.
        own: the place among `parts` of the token's own key of the middle slot, -1 where it is not added.
        gate: how far x is from the feature to the state.
        heads: of the self-attention.
        eps_1, eps_2: of the norms.
        activation: a value of `ACTIVATIONS`.
    """
    batch, width = theta.shape
    if fusion:
        query, value, bias = fusion
        window[:, 0, -1] = torch.cat([part.expand(batch, -1) for part in parts], dim=-1)
        slots = window.shape[-1] // width
        rows = window.reshape(batch, 1, -1, width).expand(-1, len(query) // width, -1, -1)
        shown = None if visible is None else visible[..., None].expand(*visible.shape, slots).flatten(-2)
        q = F.linear(theta, query).view(batch, -1, 1, width)
        attended = F.scaled_dot_product_attention(q, rows, rows, attn_mask=shown, scale=1.0)
        x = F.linear(attended.reshape(batch, -1), value, bias)
        x = x if own < 0 else x + parts[own]
    else:
        x = torch.lerp(parts[0].to(theta.dtype), theta, gate)
    q, states = F.linear(x, *encoder[:2]).split((width, 2 * width), dim=1)
    keys[:, 0, -1] = states
    k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in keys[:, 0].split(width, dim=-1))
    seen = F.scaled_dot_product_attention(q.view(batch, heads, 1, -1), k, v, attn_mask=visible).reshape(batch, width)
    y = F.layer_norm(x + F.linear(seen, *encoder[2:4]), (width,), encoder[8], encoder[9], eps_1)
    inner = _FUNCTIONS[activation](F.linear(y, *encoder[4:6]))
    return F.layer_norm(y + F.linear(inner, *encoder[6:8]), (width,), encoder[10], encoder[11], eps_2)


def _shapes(theta: Tensor, *_: object) -> Tensor:
    return theta.new_empty(theta.shape)


define(
    "side_step_",
    "(Tensor theta, Tensor[] parts, Tensor(a!) window, Tensor(b!) keys, Tensor? visible, Tensor[] fusion, "
    "Tensor[] encoder, int own, float gate, int heads, float eps_1, float eps_2, int activation) -> Tensor",
    shapes=_shapes,
    reference=side_step_reference,
    aten=side_step_reference,
)
