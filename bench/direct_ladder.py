"""k-LST and LST written directly from their equations: the peers that `bench_ladder` times the library's against.

Each side block projects its k features one by one, drops out, adds positions, concatenates them along the tokens to a
window, makes keys and values of it and attends to all k * T of them, by PyTorch's fused attention; a feature outside
the backbone is zeros, projected like the others. Of LST a block projects its one feature. The backbone keeps all its
features until the side network runs. What comes after the attention, and LST's gate, are the library's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import SequenceClassifierOutput

from fastpeft import LadderModel
from fastpeft.ladder.side import GatedFusion, SideBlock, SideNetwork, WindowFusion


class DirectFusion(nn.Module):
    """Cross-attention of one head over a concatenated window.

    Args:
        fusion: the library's, whose weights it takes over.
        weights: `D_i` `(D, d)` for each slot of the window.
    """

    def __init__(self, fusion: WindowFusion, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.query, self.key, self.value = fusion.query, fusion.key, fusion.value
        self.positions, self.dropout = fusion.positions, fusion.dropout
        self.projections = nn.ParameterList(weight.detach().clone() for weight in weights)

    def forward(self, theta: Tensor, window: list[Tensor], mask: Tensor, seed: int) -> Tensor:
        """theta `(B, T, D)`, k features `(B, T, d)` -> `(B, T, D)`; PyTorch draws the dropout, without the seed."""
        c = torch.cat(
            [
                F.dropout(F.linear(feature, weight), self.dropout, self.training) + position
                for feature, weight, position in zip(window, self.projections, self.positions)
            ],
            dim=1,
        )  # (B, k T, D)
        visible = mask.repeat(1, len(window))[:, None]  # (B, 1, k T)
        return F.scaled_dot_product_attention(self.query(theta), self.key(c), self.value(c), attn_mask=visible)


class DirectGate(nn.Module):
    """LST's gate on one feature.

    Args:
        fusion: the library's.
        projection: of the feature.
    """

    def __init__(self, fusion: GatedFusion, projection: nn.Module) -> None:
        super().__init__()
        self.gate, self.projection = fusion, projection

    def forward(self, theta: Tensor, window: list[Tensor], mask: Tensor, seed: int) -> Tensor:
        """theta `(B, T, D)`, one feature `(B, T, d)` -> `(B, T, D)`."""
        c = self.projection(window[0])
        fused: Tensor = self.gate(theta, c[:, None], mask, seed)
        return fused


class DirectLadder(nn.Module):
    """A RoBERTa classifier with a side network of the direct form, which has the weights of a `LadderModel`.

    Args:
        model: of one head, without residual and not causal. It is taken over.
        backbone_in_training: whether `train()` reaches the backbone, whose own dropout then works, as it does where
            nobody sees to it.
    """

    def __init__(self, model: LadderModel, backbone_in_training: bool = False) -> None:
        super().__init__()
        self.base, self.side, self.backbone_in_training = model.base, model.side, backbone_in_training
        for number, block in enumerate(self.side.blocks, 1):
            if isinstance(block.fusion, GatedFusion):
                block.fusion = DirectGate(block.fusion, self.side.projections[str(number)])
            else:
                block.fusion = DirectFusion(block.fusion, _weights(self.side, number))
        self.side.projections = nn.ModuleDict()

    def train(self, mode: bool = True) -> DirectLadder:
        """Set the side network, the head and, where that is asked for, the backbone to training mode."""
        super().train(mode)
        self.base.base_model.train(mode and self.backbone_in_training)
        return self

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> SequenceClassifierOutput:
        """Loss and logits."""
        with torch.no_grad():
            body = self.base.base_model(input_ids, attention_mask=attention_mask, output_hidden_states=True)
        mask, features = attention_mask.bool(), body.hidden_states  # B_0 .. B_L
        reach = self.side.config.window_size // 2
        theta = self.side.down(features[0])
        visible = mask[:, None, None, :]
        block: SideBlock
        for number, block in enumerate(self.side.blocks, 1):
            layers = range(number - reach, number + reach + 1)
            window = [features[n] if 0 <= n < len(features) else torch.zeros_like(features[0]) for n in layers]
            theta = block(theta, window, mask, visible, 0)
        logits = self.base.classifier(self.side.up(theta))
        return SequenceClassifierOutput(loss=F.cross_entropy(logits, labels), logits=logits)


def _weights(side: SideNetwork, block: int) -> list[Tensor]:
    """`D_{block, i}` for each slot i; any for a feature of zeros."""
    found = []
    for slot in range(side.config.window_size):
        layer = block - side.config.window_size // 2 + slot
        if 0 <= layer <= side.num_layers:
            row = side.readers[layer].index((block, slot)) * side.width
            found.append(side.projections[str(layer)].weight[row : row + side.width])
        else:
            found.append(torch.zeros(side.width, side.up.out_features))
    return found
