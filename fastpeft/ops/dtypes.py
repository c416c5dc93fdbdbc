"""The dtypes that ops take and compute in, and tensors that keep theirs when a module is cast."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastpeft.errors import FastpeftError

HALVES = torch.float16, torch.bfloat16
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of autocast; None where it is off, and on the meta device, which autocast does not know."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """What turns autocast off on a device."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """What an op on x computes in: the dtype of `weight`, under autocast (but for float64) that of autocast."""
    return weight.dtype if weight.dtype == torch.float64 else autocast_dtype(x.device) or weight.dtype


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


def check_kinds(op: str, device: torch.device, names: str, *operands: Tensor | None) -> None:
    """Refuse what a cast would cut to whole or real numbers in silence, and tensors that no kernel reads together."""
    for i, tensor in enumerate(operands):
        if tensor is not None and (tensor.dtype not in FLOATS or tensor.device != device):
            raise FastpeftError(
                f"{op}: {names.split()[i]} is {tensor.dtype} on {tensor.device}; allowed are float16, bfloat16, "
                f"float32 and float64, all on one device, here {device}. Cast it, dequantise it or move it."
            )
