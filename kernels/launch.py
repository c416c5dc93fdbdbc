"""What the launchers of the kernels share: how to multiply, and where."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from fastpeft.kernels import tiles


def products(dtype: torch.dtype, matrix_units: bool) -> str | None:
    """How the kernels multiply operands of this dtype: a key of the tile tables; None where they should not."""
    if dtype in (torch.float16, torch.bfloat16):
        return "half" if matrix_units else None
    if dtype is torch.float32:
        return "tf32" if matrix_units and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    return None


def products_of(x: Tensor) -> str | None:
    """`products` of x on the device that it is on."""
    return products(x.dtype, matrix_units=not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (8, 0))


def is_for_kernels(x: Tensor, rank: int) -> bool:
    """Whether SiVA's kernels take x and factors of this rank.

    Not float32 on a GPU: in it cuBLAS's tiles are larger than those that Triton compiles without spilling.
    """
    kind = products_of(x)
    return rank <= tiles.MAX_RANK and kind is not None and (kind == "half" or not x.is_cuda)


def precision(kind: str) -> str:
    """What `tl.dot` is told; it matters to float32 operands only."""
    return "tf32" if kind == "tf32" else "ieee"


def device_of(x: Tensor) -> AbstractContextManager[object]:
    """Makes the device of x the current one, on which Triton launches."""
    return torch.cuda.device_of(x) if x.is_cuda else nullcontext()
