"""What is known of a frozen model: whether its weights were converted, and its layers compiled one by one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastpeft.ladder.config import BackboneDtype

CONVERSION = "fastpeft_conversion"  # an attribute of the model, which a copy of the model has too


class Conversion(NamedTuple):
    """What a model's backbone was brought to, and the fingerprints of its weights before that."""

    dtype: BackboneDtype
    fingerprints: dict[str, str]


def conversion_of(core: nn.Module) -> Conversion | None:
    """What `convert` did to a model; None where nothing."""
    found: Conversion | None = getattr(core, CONVERSION, None)
    return found


def is_quantised(tensor: Tensor) -> bool:
    """Whether a weight is stored in few bits, by itself or, as one of torchao, by the tensors that it is made of."""
    return not tensor.is_floating_point() or is_traceable_wrapper_subclass(tensor)


class CompiledForward:
    """The forward of a layer, compiled when it is first called: hooks on the layer are called around it.

    It belongs to its layer: a copy of the model, unpickled or not, compiles anew for the layer that it holds.

    Args:
        layer: whose `forward` it takes the place of.
        options: as `torch.compile` takes them.
    """

    def __init__(self, layer: nn.Module, options: Mapping[str, Any]) -> None:
        own = vars(layer).get("forward")
        self._forward: Any = own._forward if isinstance(own, CompiledForward) else layer.forward
        self._options = options
        self._compiled: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._compiled is None:
            self._compiled = torch.compile(self._forward, **self._options)
        return self._compiled(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_compiled": None}
