"""k-LST and LST written directly from their equations, to compare the library's form of a side network with.

All features are kept until the side network runs. Each side block projects the k features of its window one by one,
applies dropout, adds positions, concatenates them along the tokens, computes keys and values and attends to all k * T
by PyTorch's fused attention. A feature outside the backbone is zeros, projected like the others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastpeft.errors import FastpeftError
from fastpeft.ladder.side import SideRun, visibility
from fastpeft.ladder.side_blocks import GatedFusion, WindowFusion


class DirectRun(SideRun):
    """One pass of a side network in the direct form, with the same weights as the library's form.

    `model.side_run = DirectRun` makes a `LadderModel` use it; training, saving and loading stay the same. PyTorch draws
    its dropout. What follows the fusion of a block is the library's code. Arguments are those of `SideRun`.

    Example:
        >>> from fastpeft import LadderConfig, SideNetwork
        >>> side, features = SideNetwork(LadderConfig(window_size=3), 64, 2).eval(), torch.randn(3, 1, 5, 64)
        >>> run = DirectRun(side, mask=None, seed=0)
        >>> for layer, feature in enumerate(features):
        ...     run.feed(layer, feature)
        >>> torch.testing.assert_close(run.output(), side(features))
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.cache is not None:
            raise FastpeftError(
                "the direct form of a side network keeps nothing of earlier tokens. Give use_cache=False."
            )
        self._features: list[Tensor] = []
        self._projections = {layer: self._split(layer) for layer in self.side.readers}

    def _split(self, layer: int) -> dict[tuple[int, int], tuple[Tensor, Tensor | None]]:
        """Weight `(D, d)` and bias of the projection of `B_layer` for each block and slot."""
        weight, bias = self.side.projection(layer)
        width, readers = self.side.width, self.side.readers[layer]
        biases = len(readers) * [None] if bias is None else bias.split(width)
        return dict(zip(readers, zip(weight.split(width), biases)))

    def feed(self, layer: int, feature: Tensor) -> None:
        self._features.append(self._accept(layer, feature))

    def output(self) -> Tensor:
        self._check_complete()
        with self._products():
            for number, block in enumerate(self.side.blocks, 1):
                self._advance(self._theta if number in self._dropped else self._block(number, block))
        return super().output()

    def _block(self, number: int, block: Any) -> Tensor:
        """The state after a `SideBlock`."""
        fusion: GatedFusion | WindowFusion = block.fusion
        window = self._window(number)
        first = window[0][:, None]
        x = fusion(self._theta, first) if isinstance(fusion, GatedFusion) else self._attend(fusion, window)
        encoded: Tensor = block.encode(x, self._visible)
        return encoded

    def _window(self, number: int) -> list[Tensor]:
        """The projection of each feature in the window of a block, `(B, T, D)` by slot."""
        first = self.side.places[number - 1] - self.side.config.window_size // 2
        some = next(iter(self._projections))
        nothing = torch.zeros_like(self._features[some])
        found = []
        for slot in range(self.side.config.window_size):
            layer = first + slot
            inside = 0 <= layer <= self.side.num_layers
            own = self._projections[layer][number, slot] if inside else next(iter(self._projections[some].values()))
            found.append(F.linear(self._features[layer] if inside else nothing, *own))
        return found

    def _attend(self, fusion: WindowFusion, window: list[Tensor]) -> Tensor:
        """Cross-attention of the side state over the concatenated window."""
        theta = self._theta
        c = torch.cat(
            [fusion.dropout(part) + position for part, position in zip(window, fusion.positions)],
            dim=1,
        )  # (B, k T, D)
        q, k, v = (
            part[:, None] for part in (fusion.query(theta), fusion.key(c), fusion.value(c))
        )  # (B, 1, T or k T, D)
        mask = None if self.mask is None else self.mask[:, None, None, :]  # (B, 1, 1, T)
        visible = visibility(self.mask, theta.shape[-2], True, theta.device) if fusion.causal else mask
        if visible is not None:
            visible = visible.repeat(1, 1, 1, len(window))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible).transpose(1, 2).flatten(2)
        return fusion.finish(theta, window[fusion.middle], attended)
