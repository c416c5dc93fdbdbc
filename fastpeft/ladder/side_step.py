"""A pass of a side network over one new token of each text, of whose earlier tokens a cache keeps what is needed.

A decoder's own step takes few microseconds an operation, so a side network beside it is paid for by the number of its
operations. What can be is multiplied once, when the first token comes: `Wk^T Wq` of a cross-attention, and `[Wv; W Wv]`
with W of the self-attention's queries, keys and values, where nothing stands between the two. The vectors `p` of a
window's slots are biases of its projections.

Dimension letters as in `side.py`; H heads of the cross-attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastpeft.ladder.generation import SideCache, SideLayer
from fastpeft.ladder.side import GatedFusion, SideBlock, SideNetwork, SideRun


class BlockStep:
    """A side block for one token: its matrices, multiplied where that saves an operation, and what it keeps.

    Args:
        block: the side block.
        kept: of the tokens so far.
    """

    def __init__(self, block: SideBlock, kept: SideLayer) -> None:
        fusion: Any = block.fusion
        self._kept, self._activation, self._heads = kept, block.activation, block.num_heads
        self._gate: float | None = None
        width = block.qkv.in_features
        weight: Tensor = block.qkv.weight
        bias: Tensor = block.qkv.bias
        output_bias: Tensor = block.attention_output.bias
        if isinstance(fusion, GatedFusion):
            self._gate = float(fusion.gate())
        else:
            self._slots = len(fusion.positions)
            # the keys of slots outside the backbone, below and above it
            self._outside = (
                fusion.positions[: fusion.slots[0]].flatten(),
                fusion.positions[fusion.slots[-1] + 1 :].flatten(),
            )
            self._fused_heads = fusion.num_heads
            self._query = fusion.folded()
            value = fusion.value.weight
            out_bias = value.new_zeros(width)
            if fusion.output is not None:  # (D, H D): what each head's values become
                parts = zip(fusion.output.weight.chunk(fusion.num_heads, 1), value.chunk(fusion.num_heads))
                value, out_bias = torch.cat([out @ part for out, part in parts], dim=1), fusion.output.bias
            self._value = value.t()
            self._own = fusion.slots.index(fusion.middle) if fusion.config.residual else None
            bias = torch.addmv(bias, weight, out_bias)
            if self._own is None:
                weight, bias = torch.cat((value, weight @ value)), torch.cat((out_bias, bias))
            else:
                output_bias = output_bias + out_bias
        self._qkv = weight, bias
        self._output = block.attention_output.weight, output_bias
        self._inner = block.feed_forward_in.weight, block.feed_forward_in.bias
        self._outer = block.feed_forward_out.weight, block.feed_forward_out.bias
        norms = block.attention_norm, block.feed_forward_norm
        self._norms = [((width,), norm.weight, norm.bias, norm.eps) for norm in norms]

    def __call__(self, theta: Tensor, parts: list[Tensor], visible: Tensor | None) -> Tensor:
        """theta `(B, D)`, the projections of S slots `(B, D)`, visible `(B or 1, 1, 1, T)` -> `(B, D)`."""
        batch, width = theta.shape
        if self._gate is not None:
            x = torch.lerp(parts[0].to(theta.dtype), theta, self._gate)
            q, states = F.linear(x, *self._qkv).split((width, 2 * width), dim=1)
        else:
            attended = self._attend(theta, parts, visible)
            if self._own is None:
                x, q, states = F.linear(attended, *self._qkv).split((width, width, 2 * width), dim=1)
            else:
                x = torch.addmm(parts[self._own], attended, self._value)  # without the output's bias, added later
                q, states = F.linear(x, *self._qkv).split((width, 2 * width), dim=1)
        k, v = self._kept.append("keys", states.view(batch, 1, 1, -1)).split(width, dim=-1)  # each (B, 1, T, D)
        q = q.view(batch, self._heads, 1, -1)
        if self._heads > 1:
            k, v = (part.view(batch, -1, self._heads, width // self._heads).transpose(1, 2) for part in (k, v))
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=visible).reshape(x.shape)
        y = torch.layer_norm(x + F.linear(seen, *self._output), *self._norms[0])
        return torch.layer_norm(
            y + F.linear(self._activation(F.linear(y, *self._inner)), *self._outer), *self._norms[1]
        )

    def _attend(self, theta: Tensor, parts: list[Tensor], visible: Tensor | None) -> Tensor:
        """The cross-attention, before the values' matrix: `(B, H D)`."""
        batch, width = theta.shape
        if len(parts) < self._slots:
            below, above = (keys.expand(batch, -1) for keys in self._outside)
            parts = [below, *parts, above]
        keys = self._kept.append("values", torch.cat(parts, dim=-1).view(batch, 1, 1, -1))  # (B, 1, T, k D)
        rows = keys.view(batch, 1, -1, width)
        if self._fused_heads > 1:
            rows = rows.expand(-1, self._fused_heads, -1, -1)
        if visible is not None:
            visible = visible[..., None].expand(*visible.shape, self._slots).flatten(-2)
        q = F.linear(theta, self._query).view(batch, self._fused_heads, 1, -1)
        return F.scaled_dot_product_attention(q, rows, rows, attn_mask=visible, scale=1.0).reshape(batch, -1)


class SideStep(SideRun):
    """A `SideRun` over one token of each text, without gradients.

    Args:
        side: the side network.
        mask: bool `(B, T)` of all tokens, or None.
        cache: of the tokens so far.
        keep_states: as of `SideRun`.
    """

    def __init__(self, side: SideNetwork, mask: Tensor | None, cache: SideCache, keep_states: bool = False) -> None:
        super().__init__(side, mask, 0, keep_states, kept=cache.layers)
        if not cache.steps:
            blocks: Any = side.blocks
            cache.steps = [BlockStep(block, kept) for block, kept in zip(blocks, cache.layers)]
            cache.projections = {layer: _projection(side, layer) for layer in side.readers}
        self._steps, self._projections = cache.steps, cache.projections
        self._size = side.config.window_size

    def feed(self, layer: int, feature: Tensor) -> None:
        """As that of `SideRun`."""
        side, size, batch = self.side, self._size, feature.shape[0]
        feature = self._accept(layer, feature).view(batch, -1)
        if readers := side.readers.get(layer):
            projected = F.linear(feature, *self._projections[layer])
            parts = projected.chunk(len(readers), dim=-1) if len(readers) > 1 else (projected,)
            for (block, _), part in zip(readers, parts):
                self._windows.setdefault(block, []).append(part)
        last = layer - size // 2 if layer < side.num_layers else side.num_layers
        for block in range(max(1, layer - size // 2), last + 1):
            theta = self._steps[block - 1](self._theta.view(batch, -1), self._windows.pop(block), self._visible)
            self._advance(theta.unsqueeze(1))


def _projection(side: SideNetwork, layer: int) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the projections of `B_layer`, to which the vectors of their slots belong here."""
    weight, bias = side.projection(layer)
    fusions: list[Any] = [(side.blocks[block - 1].fusion, slot) for block, slot in side.readers[layer]]
    if not isinstance(fusions[0][0], GatedFusion):
        bias = torch.cat([fusion.positions[slot] for fusion, slot in fusions])
    return weight, bias
