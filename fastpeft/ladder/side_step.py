"""A pass of a side network over one new token of each text, of whose earlier tokens a cache keeps what is needed.

A decoder's own step takes few microseconds an operation, so a side network beside it is paid for by the number of its
operations. So a block is one, `fastpeft::side_step_`, and what depends on weights alone is made when the first token
comes: `Wk^T Wq` of a cross-attention. The vectors `p` of a window's slots are biases of its projections.

Dimension letters as in `side.py`; H heads of the cross-attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastpeft.ladder.generation import SideCache, SideLayer
from fastpeft.ladder.side import GatedFusion, SideBlock, SideNetwork, SideRun
from fastpeft.ops.side_step import ACTIVATIONS


class BlockStep:
    """A side block for one token: its matrices, and what it keeps.

    Args:
        block: the side block.
        kept: of the tokens so far.
        activation: a value of `ACTIVATIONS`.
    """

    def __init__(self, block: SideBlock, kept: SideLayer, activation: int) -> None:
        fusion: Any = block.fusion
        self._kept = kept
        self._fusion: list[Tensor] = []
        # the keys of slots outside the backbone, below and above it
        self._below: list[Tensor] = []
        self._above: list[Tensor] = []
        own, gate = -1, 0.0
        if isinstance(fusion, GatedFusion):
            gate = float(fusion.gate())
        else:
            p, first, last = fusion.positions, fusion.slots[0], fusion.slots[-1] + 1
            self._below = [p[:first].flatten()[None]] if first > 0 else []
            self._above = [p[last:].flatten()[None]] if last < len(p) else []
            value = fusion.value.weight
            bias = value.new_zeros(len(value))
            if fusion.output is not None:  # (D, H D): what each head's values become
                pairs = zip(fusion.output.weight.chunk(fusion.num_heads, 1), value.chunk(fusion.num_heads))
                value, bias = torch.cat([out @ part for out, part in pairs], dim=1), fusion.output.bias
            self._fusion = [fusion.folded(), value, bias]
            if fusion.config.residual:
                own = len(self._below) + fusion.slots.index(fusion.middle)
        linears = block.qkv, block.attention_output, block.feed_forward_in, block.feed_forward_out
        norms = block.attention_norm, block.feed_forward_norm
        self._encoder = [each for module in (*linears, *norms) for each in (module.weight, module.bias)]
        self._numbers = own, gate, block.num_heads, *(norm.eps for norm in norms), activation

    def __call__(self, theta: Tensor, parts: list[Tensor], visible: Tensor | None) -> Tensor:
        """theta `(B, D)`, the projections of S slots `(B, D)`, visible `(B or 1, 1, 1, T)` -> `(B, D)`."""
        if self._below or self._above:
            parts = [part.expand(len(theta), -1) for part in (*self._below, *parts, *self._above)]
        kept = self._kept
        window: Any = kept.extend("values") if self._fusion else kept.values
        state: Tensor = torch.ops.fastpeft.side_step_.default(
            theta, parts, window, kept.extend("keys"), visible, self._fusion, self._encoder, *self._numbers
        )
        return state


class SideStep(SideRun):
    """A `SideRun` over one token of each text, of a network that it takes.

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
            activation = ACTIVATIONS[str(side.activation)]
            cache.steps = [BlockStep(block, kept, activation) for block, kept in zip(blocks, cache.layers)]
            cache.projections = {layer: _projection(side, layer) for layer in side.readers}
        self._steps, self._projections = cache.steps, cache.projections
        self._size = side.config.window_size

    @staticmethod
    def takes(side: SideNetwork) -> bool:
        """Whether such a pass computes what this network does, as it is now."""
        return side.activation in ACTIVATIONS and not torch.is_grad_enabled()

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
