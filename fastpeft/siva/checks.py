"""What an adapter may be called, what it may be put on, and by what it knows its base."""

from __future__ import annotations

from typing import Any

from peft.tuners._buffer_dict import BufferDict
from torch import nn
from transformers.pytorch_utils import Conv1D

from fastpeft.errors import FastpeftError
from fastpeft.files import fingerprint
from fastpeft.siva.rows import BASE


def check_name(adapter_name: str) -> None:
    """Raise `FastpeftError` unless the tensors of an adapter can have its name."""
    taken = adapter_name == BASE or any(hasattr(kind(), adapter_name) for kind in (nn.ParameterDict, BufferDict))
    if not adapter_name or "." in adapter_name or taken:
        raise FastpeftError(
            f"adapter name {adapter_name!r}; give one that is not empty, has no dot and is no attribute of modules, as "
            f"'keys' and 'train' are ({BASE!r} is the pretrained model)."
        )


def check_kind(base_layer: nn.Module, name: str) -> None:
    """Raise `FastpeftError` unless SiVA knows the kind of layer."""
    if not isinstance(base_layer, (nn.Linear, Conv1D)):
        raise FastpeftError(
            f"{name} is a {type(base_layer).__name__}; SiVA adapts nn.Linear and transformers' Conv1D. Leave it "
            "out of target_modules."
        )


def original_fingerprint(base_layer: Any) -> str | None:
    """The fingerprint of a pretrained weight, also where an unloaded adapter left it equal to rounding.

    None where the weight is not there yet (meta device).
    """
    weight = base_layer.weight.data.t() if isinstance(base_layer, Conv1D) else base_layer.weight.data
    if weight.device.type == "meta":
        return None
    found = fingerprint(weight)
    restored: dict[str, str] = getattr(base_layer, "siva_restored", {})
    return restored.get(found) or found
