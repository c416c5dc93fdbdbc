"""The window of `fastpeft::window_attention`: what its forms are told beside their operands.

The letters are those of `window_attention.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastpeft.ops.feature_dropout import feature_dropout_reference


class Window(NamedTuple):
    """Arguments of the op, by their names in its schema.

    Attributes:
        mask: bool `(B, T)`, None where every token is seen.
        slots: the real ones.
        causal: whether a query sees only the tokens up to its own.
        dropout: the probability with which an element of c is dropped.
        seed: of the dropout, one int64 on the device of q; None where nothing is dropped.
        block: the side block, which chooses the noise too.
    """

    mask: Tensor | None
    slots: Sequence[int]
    causal: bool
    dropout: float
    seed: Tensor | None
    block: int

    def visible(self, q: Tensor) -> Tensor:
        """Which tokens each query of q sees: bool `(B, T, T)`, where sizes that make no difference are 1."""
        tokens = q.shape[2]
        seen = q.new_ones(1, 1, tokens, dtype=torch.bool) if self.mask is None else self.mask[:, None]
        return seen.expand(-1, tokens, -1).tril() if self.causal else seen

    def absent(self, p: Tensor) -> list[int]:
        """The slots that are not real; p `(k, D)` has a vector for every slot."""
        return [slot for slot in range(p.shape[0]) if slot not in self.slots]

    def drop_(self, c: Tensor) -> None:
        """Drop elements of c `(B, S, T, D)` in place."""
        feature_dropout_reference(c, self.slots, self.dropout, self.seed, self.block)


Needs = tuple[bool, bool, bool]  # whether dq, dc and dp are needed
