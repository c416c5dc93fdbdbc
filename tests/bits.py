"""Tensors compared bit by bit, and values on which every rounding shows."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(x: Tensor) -> Tensor:
    """The elements as integers of the same bits."""
    return x.contiguous().view(BITS[x.element_size()])


def assert_same_bits(one: Tensor, other: Tensor) -> None:
    assert torch.equal(one.isnan(), other.isnan())  # which NaN it is, is nobody's promise
    assert torch.equal(bits(one[~one.isnan()]), bits(other[~other.isnan()]))


def values(n: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Magnitudes from below float16's subnormals up."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, generator=generator) * torch.exp2(torch.empty(n).uniform_(-30, 3, generator=generator))).to(
        dtype
    )
