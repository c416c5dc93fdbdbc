"""What the settings of MeZO may be."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fastpeft.errors import FastpeftError
from fastpeft.ops.noise import NOISE, ROUNDINGS

CHOICES = {
    "noise": tuple(NOISE),
    "on_nonfinite": ("stop", "skip"),
    "restore": ("in_place", "exact"),
    "rounding": ROUNDINGS,
}


def check_settings(seed: Any, max_projected_grad: Any, **choices: Any) -> None:
    """Raise a FastpeftError unless a run's settings are in their ranges, and each choice is one of `CHOICES`."""
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise FastpeftError(f"MeZO: seed is {seed!r}; allowed are whole numbers from 0 to 2^63 - 1.")
    for name, value in choices.items():
        if value not in CHOICES[name]:
            raise FastpeftError(f"MeZO: {name} is {value!r}; allowed are {', '.join(CHOICES[name])}.")
    if max_projected_grad is not None and not (_is_number(max_projected_grad) and max_projected_grad > 0):
        raise FastpeftError(
            f"MeZO: max_projected_grad is {max_projected_grad!r}; allowed are a number above 0 and None, which "
            "sets no limit."
        )


def check_group(group: Mapping[str, Any]) -> None:
    """Raise a FastpeftError unless the settings of a group are numbers in their ranges."""
    for name, allowed, fits in (
        ("lr", "0 or more", operator.ge),
        ("eps", "above 0", operator.gt),
        ("weight_decay", "0 or more", operator.ge),
    ):
        value = group[name]
        if name == "lr" and isinstance(value, Tensor) and value.numel() == 1:  # as torch allows
            value = value.item()
        if not (_is_number(value) and fits(value, 0) and math.isfinite(value)):
            raise FastpeftError(f"MeZO: {name} is {value!r}; allowed is a finite number, {allowed}.")


def check_trained(params: Sequence[Tensor]) -> None:
    """Raise a FastpeftError if parameters were frozen after the optimizer was made."""
    if frozen := [param for param in params if not param.requires_grad]:
        raise FastpeftError(
            f"MeZO: {len(frozen)} of its {len(params)} parameters (one of shape {tuple(frozen[0].shape)}) require no "
            "gradient any more, but a step would change them. Make a new optimizer for those that train, or let all "
            "require a gradient."
        )


def _is_number(value: Any) -> bool:
    """Whether it is a real number; True and False are not."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
