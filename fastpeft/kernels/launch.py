"""What the launchers of the kernels share: whether to launch, and how to multiply."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpeft.kernels import tiles
from fastpeft.kernels.tiles import DotKind
from fastpeft.ops.define import is_captured
from fastpeft.ops.dtypes import HALVES


def dot_kind(dtype: torch.dtype, matrix_units: bool) -> DotKind | None:
    """How the kernels multiply operands of this dtype: a key of the tile tables; None where they should not."""
    if dtype in HALVES:
        return "half" if matrix_units else None
    if dtype is torch.float32:
        return "tf32" if matrix_units and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    return None


def dot_kind_of(x: Tensor) -> DotKind | None:
    """`dot_kind` of x on the device that it is on."""
    return dot_kind(x.dtype, matrix_units=not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (8, 0))


def is_for_kernels(x: Tensor, rank: int, is_mixed: bool = False) -> bool:
    """Whether SiVA's kernels take x and factors of this rank.

    Not float32 on a GPU: in it cuBLAS's tiles are larger than those that Triton compiles without spilling. Not rows of
    several adapters in a CUDA graph being captured: a replay would read their table from the host again.
    """
    kind = dot_kind_of(x)
    is_kind = kind is not None and (kind == "half" or not x.is_cuda)
    return rank <= tiles.MAX_RANK and is_kind and not (is_mixed and is_captured())


def precision(kind: DotKind) -> str:
    """What `tl.dot` is told; it matters to float32 operands only."""
    return "tf32" if kind == "tf32" else "ieee"
