"""NaN wherever a kernel must not read, or must not leave, a value."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors are born full of NaN, so an element that no program writes shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # PyTorch then fills uninitialized memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def in_nan(values: Tensor, step: int = 1) -> Tensor:
    """A view with the same values inside a larger tensor of NaN: reading past an edge shows.

    Its rows begin at multiples of `step` elements.
    """
    sizes = [size + 19 for size in values.shape]
    sizes[-1:] = [-(-size // step) * step for size in sizes[-1:]]
    room = torch.full(sizes, torch.nan, dtype=values.dtype, device=values.device)
    first = -(-3 // step) * step
    view = room[tuple(slice(first, first + size) for size in values.shape)]
    return view.copy_(values)
