"""`fastpeft::feature_dropout_`: dropout of backbone features in place; seed and index decide what is dropped."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastpeft.ops import noise as noise_contract
from fastpeft.ops.define import define


@torch.no_grad()
def feature_dropout_reference(
    c: Tensor, slots: Sequence[int], dropout: float, seed: int | Tensor | None, block: int
) -> None:
    """Set dropped elements of c `(B, S, T, D)` to 0 and multiply the others by `1 / (1 - dropout)`, in place.

    The seed is a number or a tensor that has one, None where nothing is dropped.
    """
    if dropout > 0:
        assert seed is not None
        batch, real, tokens, width = c.shape
        ordinals = [16 * block + slot for slot in slots]
        kept = noise_contract.kept(batch * tokens * width, dropout, seed, ordinals, c.device)
        c *= kept.view(real, batch, tokens, width).transpose(0, 1).to(c.dtype) * (1 / (1 - dropout))


# c (B, S, T, D) in float32 or float64, dense in T and D
define(
    "feature_dropout_",
    "(Tensor(a!) c, int[] slots, float dropout, int seed, int block) -> ()",
    shapes=lambda *_: None,
    reference=feature_dropout_reference,
)
