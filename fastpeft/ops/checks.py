"""What every function refuses."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpeft.errors import FastpeftError

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_kinds(op: str, device: torch.device, names: str, *operands: Tensor | None) -> None:
    """Refuse what a cast would cut to whole or real numbers in silence, and tensors that no kernel reads together."""
    for i, tensor in enumerate(operands):
        if tensor is not None and (tensor.dtype not in FLOATS or tensor.device != device):
            raise FastpeftError(
                f"{op}: {names.split()[i]} is {tensor.dtype} on {tensor.device}; allowed are float16, bfloat16, "
                f"float32 and float64, all on one device, here {device}. Cast it, dequantise it or move it."
            )
