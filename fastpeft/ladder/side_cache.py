"""What a side network keeps of the tokens that it has read, as a part of transformers' caches.

Block j keeps of a token

- the keys and values of its self-attention, 2 D numbers, and
- the keys of its window, `C_i + p_i` for the k slots, k D numbers, which are the values too. A slot outside the
  backbone keeps `p_i`, so that all blocks read k T keys. A gate reads a token's own feature only, and keeps nothing.

So a token takes (2 + k) D numbers more for each block, for LST 2 D. None is computed twice.

Dimension letters as in `side.py`; T counts all tokens so far, N those of this pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

_SPARE = 8  # where a tensor of T tokens is full, room is made for T / 8 more, and at least 64
_LEAST_SPARE = 64


class GrowingLayer(DynamicLayer):
    """A layer of a cache to which tokens are added in place: most steps copy none of those that are there."""

    def __init__(self) -> None:
        super().__init__()
        self._rooms: dict[str, Tensor] = {}

    def append(self, name: str, new: Tensor) -> Tensor:
        """Append tokens in place while there is room; a copy with the old ones in it makes more.

        Args:
            name: `"keys"` or `"values"`.
            new: `(B, H, N, ...)`, of the attribute of that name.

        Returns:
            The attribute, `(B, H, T, ...)`.
        """
        old: Tensor | None = getattr(self, name)
        if old is None:
            self.dtype, self.device = new.dtype, new.device
            both = new
        elif torch.is_grad_enabled():  # an earlier pass may need its tokens for backward
            both = torch.cat((old, new), dim=-2)
        else:
            both = self._with_room(name, old, new.shape[-2])
            both.narrow(-2, old.shape[-2], new.shape[-2]).copy_(new)
        setattr(self, name, both)
        return both

    def extend(self, name: str) -> Tensor:
        """The attribute with one token more, `(B, H, T + 1, ...)`, which the caller fills, without gradients."""
        both = self._with_room(name, getattr(self, name), 1)
        setattr(self, name, both)
        return both

    def _with_room(self, name: str, old: Tensor, added: int) -> Tensor:
        before = old.shape[-2]
        tokens = before + added
        room = self._rooms.get(name)
        # a cache that was reordered or repeated holds other tensors by now; one that was cropped starts where it did
        if (
            room is None
            or room.data_ptr() != old.data_ptr()
            or room.shape[0] != old.shape[0]
            or room.shape[-2] < tokens
            or (room.is_inference() and not torch.is_inference_mode_enabled())  # which may not be written to here
        ):
            size = tokens + max(_LEAST_SPARE, tokens // _SPARE)
            room = self._rooms[name] = old.new_empty(*old.shape[:-2], size, old.shape[-1])
            room.narrow(-2, 0, before).copy_(old)
        return room.narrow(-2, 0, tokens)


class SideLayer(GrowingLayer):
    """What a side block keeps, as a layer of transformers' caches, which reorder, select, repeat and crop it.

    Attributes:
        keys: `(B, 1, T, 2 D)`, the keys and values of the self-attention.
        values: `(B, 1, T, k D)`, those of the window; `(B, 1, 0, 0)` with a gate.
    """

    def add_window(self, window: Tensor) -> Tensor:
        """Append the window's keys of new tokens, `(B, N, k D)`, and return those of all, `(B, T, k D)`."""
        return self.append("values", window[:, None])[:, 0]

    def add_states(self, states: Tensor) -> Tensor:
        """Append the keys and values of new tokens, `(B, N, 2 D)`, and return those of all, `(B, T, 2 D)`."""
        self.is_initialized = True
        if getattr(self, "values", None) is None:  # a gate has no window
            self.values = states.new_empty(len(states), 1, 0, 0)
        return self.append("keys", states[:, None])[:, 0]


class SideCache:
    """What one side network keeps of the tokens it has read.

    Args:
        num_layers: L, the most blocks that it may have; the layers of those that it has not stay empty.

    Attributes:
        layers: of each block.
        step_weights: the network's, as passes over one token take them; None before the first.
    """

    def __init__(self, num_layers: int) -> None:
        self.layers = [SideLayer() for _ in range(num_layers)]
        self.step_weights: Any = None  # a `fastpeft.ladder.side_step.StepWeights`

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "step_weights": None}  # a copy needs no copy of the weights
