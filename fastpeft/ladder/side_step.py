"""A pass of a side network over one new token of each text, of whose earlier tokens a cache keeps what is needed.

A decoder's own step takes few microseconds an operation, so a side network beside it is paid for by the number of its
operations. So a feature's projections and the block that they complete are one, `fastpeft::side_step_`. What depends on
weights alone is made when the first token comes: a block's weights one after the other, with `Wk^T Wq` of its
cross-attention. The vectors `p` of a window's slots are biases of its projections.

Dimension letters as in `side.py`; H heads of the cross-attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpeft.ladder.config import STATE
from fastpeft.ladder.side import TINY, SideNetwork, SideRun
from fastpeft.ladder.side_blocks import GatedFusion, SideBlock
from fastpeft.ladder.side_cache import SideCache
from fastpeft.ops.side_step import ACTIVATIONS, weights_of


class StepWeights:
    """The weights of a side network as `fastpeft::side_step_` takes them.

    Attributes:
        blocks: of each block its weights, and the numbers after `visible`.
        projections: of each layer weight and bias of its projections, and where they go.
        outside: `(N, k, D)`, the vectors p of all slots, which are the keys of those outside the backbone.
        nothing: the weight, bias and places where no feature is read.
    """

    def __init__(self, side: SideNetwork) -> None:
        blocks: Any = side.blocks
        size, width = side.config.window_size, side.width
        self.outside: Tensor = side.up.weight.new_empty(len(blocks), size, width)
        for row, block in zip(self.outside, blocks):
            if not isinstance(block.fusion, GatedFusion):
                row.copy_(block.fusion.positions)
        activation = ACTIVATIONS[str(side.activation)]
        self.blocks = [_weights_of(block, activation) for block in blocks]
        self.nothing: tuple[Tensor, Tensor, list[int]] = (self.outside.new_empty(0), self.outside.new_empty(0), [])
        self.projections = {}
        for layer, readers in side.readers.items():
            weight, bias = side.projection(layer)
            places = [(block - 1) * size + slot for block, slot in readers]
            if bias is None:
                bias = self.outside.flatten(0, 1)[places].flatten()  # the vectors p of their slots
            self.projections[layer] = weight, bias, places


def _weights_of(block: SideBlock, activation: int) -> tuple[Tensor, tuple[Any, ...]]:
    fusion: Any = block.fusion
    matrices: list[Tensor] = []
    heads, own, gate = 0, -1, 0.0
    if isinstance(fusion, GatedFusion):
        gate = float(fusion.gate())
    else:
        value, heads = fusion.value.weight, 1
        matrices = [fusion.folded(), value, value.new_zeros(len(value))]
        own = fusion.middle if fusion.config.residual else -1
        gate = float(fusion.config.residual == STATE)
    linears = block.qkv, block.attention_output, block.feed_forward_in, block.feed_forward_out
    norms = block.attention_norm, block.feed_forward_norm
    weights = weights_of(matrices, [each for module in (*linears, *norms) for each in (module.weight, module.bias)])
    hidden = block.feed_forward_in.out_features
    return weights, (hidden, heads, own, gate, block.num_heads, *(norm.eps for norm in norms), activation)


def run_of(
    side: SideNetwork,
    mask: Tensor | None,
    cache: SideCache | None,
    step: bool,
    keep_states: bool = False,
    seed: int | Tensor = 0,
    blocks_seed: int = 0,
    kind: type[SideRun] = SideRun,
) -> SideRun:
    """A pass of a side network: a `SideStep` where it can be one.

    Args:
        side: the side network.
        mask: bool `(B, T)` of all tokens, or None.
        cache: of the tokens so far; None for a pass over whole texts.
        step: whether the pass is over one token of each text, and others came before.
        keep_states, seed, blocks_seed: as of `SideRun`.
        kind: the class of other passes; one that is not `SideRun` makes all of them.
    """
    if step and cache is not None and kind is SideRun and SideStep.takes(side):
        return SideStep(side, mask, cache, keep_states)
    if cache is not None:
        cache.step_weights = None  # weights may have changed
    return kind(side, mask, seed, keep_states, blocks_seed, None if cache is None else cache.layers)


class SideStep(SideRun):
    """A `SideRun` over one token of each text, of a network that it takes; mask and cache are of all tokens so far."""

    def __init__(self, side: SideNetwork, mask: Tensor | None, cache: SideCache, keep_states: bool) -> None:
        super().__init__(side, mask, 0, keep_states, cache=cache.layers)
        self._weights = cache.step_weights = cache.step_weights or StepWeights(side)
        self._layers = cache.layers
        self._eps = TINY if side.config.normalise_features else 0.0
        self._dtype = side.up.weight.dtype
        self._parts: Tensor  # (B, N, k, D), the windows of all blocks

    @staticmethod
    def takes(side: SideNetwork) -> bool:
        """Whether such a pass computes what this network does, as it is now."""
        return getattr(side, "activation", None) in ACTIVATIONS and not torch.is_grad_enabled()

    def feed(self, layer: int, feature: Tensor) -> None:
        """Read a feature, as `SideRun.feed` does."""
        side, own, eps = self.side, self._weights, self._eps
        if layer == 0 or layer == side.num_layers or layer != self._next or feature.dtype is not self._dtype:
            feature, eps = self._accept(layer, feature), 0.0
        else:
            self._next += 1
        batch = feature.shape[0]
        if layer == 0:
            self._parts = own.outside.repeat(batch, 1, 1, 1)
        if layer not in own.projections:
            return
        feature, reads = feature.view(batch, -1), own.projections[layer]
        # one call projects the feature and runs the first block that it completes, others one each. Where none is
        # complete the number is -1, and of what a block reads and keeps only shapes are looked at
        for number in [block - 1 for block in side.completes.get(layer, [])] or [-1]:
            weights, numbers = own.blocks[number]
            runs, attends = number >= 0, numbers[1] > 0  # heads of the cross-attention: a gate keeps no window
            cache: Any = self._layers[max(number, 0)]
            window = cache.extend("values") if runs and attends else cache.values
            keys = cache.extend("keys") if runs else cache.keys
            theta = torch.ops.fastpeft.side_step_.default(
                *(feature, self._theta.view(batch, -1), self._parts, *reads, eps),
                *(number, weights, window, keys, self._visible, *numbers),
            )
            reads = own.nothing  # for it is projected now
            if runs:
                self._advance(theta.unsqueeze(1))
