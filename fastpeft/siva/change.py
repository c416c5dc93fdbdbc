"""What trains of a SiVA adapter: the change of its factors."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Start = Literal["zero", "random", "empty"]


class Change(nn.Module):
    """The change of a factor, `dU` of `U = U0 + dU` say.

    Args:
        initial: the factor that it is added to, U0 `(N, r)` or V0 `(r, K)`.
        start: `"zero"`; `"random"`, as large as the factor itself; or `"empty"`, NaN until a file fills it.

    Attributes:
        weight: the change, of the shape and dtype of `initial`; it trains.

    Notes:
        It is a module that is called, and not a tensor that is read, so that what shards parameters and gathers them
        for a module's call does so with it too. Nothing is saved for backward.
    """

    def __init__(self, initial: Tensor, start: Start) -> None:
        super().__init__()
        value = torch.zeros_like(initial)
        if start == "random":
            bound = max(initial.shape) ** -0.5  # the root mean square of an entry of a singular vector
            value.uniform_(-bound, bound)
        elif start == "empty":
            value.fill_(float("nan"))
        self.weight = nn.Parameter(value)

    def forward(self, initial: Tensor) -> Tensor:
        return initial + self.weight

    def is_empty(self) -> bool:
        """Whether it still waits for a file."""
        return self.weight.device.type != "meta" and bool(self.weight.isnan().all())

    def extra_repr(self) -> str:
        return " x ".join(map(str, self.weight.shape))
