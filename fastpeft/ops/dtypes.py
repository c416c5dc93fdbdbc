"""The dtype that an op computes in."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """What an op on x computes in: the dtype of `weight`, under autocast (but for float64) that of autocast."""
    if torch.is_autocast_enabled(x.device.type) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return weight.dtype
