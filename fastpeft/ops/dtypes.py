"""The dtype that an op computes in, and tensors that keep theirs when a module is cast."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

HALVES = torch.float16, torch.bfloat16


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """What an op on x computes in: the dtype of `weight`, under autocast (but for float64) that of autocast."""
    if torch.is_autocast_enabled(x.device.type) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return weight.dtype


def factors_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of the factors of an op that computes in `dtype`: float32 for half precision, on a CPU for bfloat16."""
    halves = (torch.bfloat16,) if device.type == "cpu" else HALVES
    return torch.float32 if dtype in halves else dtype


def keeping_dtypes(fn: Callable[[Tensor], Tensor], kept: Iterable[Tensor]) -> Callable[[Tensor], Tensor]:
    """`fn`, as `nn.Module._apply` gets it, by which the tensors `kept` move with the module but are not cast."""
    identities = {id(tensor) for tensor in kept}

    def move(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        return tensor.to(moved.device) if id(tensor) in identities and moved.dtype != tensor.dtype else moved

    return move
