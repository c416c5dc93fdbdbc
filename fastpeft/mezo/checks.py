"""What MeZO refuses: settings out of their range, frozen parameters, and losses that no slope can be read from."""

from __future__ import annotations

import logging
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastpeft.errors import FastpeftError
from fastpeft.support.processes import Ranks

logger = logging.getLogger(__name__)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise a FastpeftError unless `value` is one of `choices`."""
    if value not in choices:
        raise FastpeftError(f"MeZO: {name} is {value!r}; allowed are {', '.join(choices)}.")


def check_positive(name: str, value: Any, *, or_zero: bool = False) -> None:
    """Raise a FastpeftError unless `value` is a finite number above 0, or a tensor of one as torch allows for rates."""
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    fits = isinstance(number, numbers.Real) and not isinstance(number, bool) and math.isfinite(number)
    if not fits or number < 0 or (number == 0 and not or_zero):
        allowed = "0 or more" if or_zero else "above 0"
        raise FastpeftError(f"MeZO: {name} is {value!r}; allowed is a finite number, {allowed}.")


def check_group(group: Mapping[str, Any]) -> None:
    """Raise a FastpeftError unless the settings of a group are numbers in their ranges."""
    check_positive("lr", group["lr"], or_zero=True)
    check_positive("eps", group["eps"])
    check_positive("weight_decay", group["weight_decay"], or_zero=True)


def check_trained(params: Sequence[Tensor]) -> None:
    """Raise a FastpeftError if parameters were frozen after the optimizer was made."""
    if frozen := [param for param in params if not param.requires_grad]:
        raise FastpeftError(
            f"MeZO: {len(frozen)} of its {len(params)} parameters (one of shape {tuple(frozen[0].shape)}) require no "
            "gradient any more, but a step would change them. Make a new optimizer for those that train, or let all "
            "require a gradient."
        )


def check_repeated(first: Sequence[float], second: Sequence[float], ranks: Ranks) -> None:
    """Raise a FastpeftError if the losses of two calls at equal weights, one a process, differ."""
    for rank, (one, other) in enumerate(zip(first, second)):
        if math.isfinite(other) and one != other:
            raise FastpeftError(
                f"MeZO: the closure returned {one!r} and then {other!r} for the same weights"
                f"{ranks.on(rank)}. A step reads a slope from the small difference of two losses, and would "
                "take this difference for one. Turn dropout off (pass the model to MeZO, or call model.eval()), let "
                "every call see the same batch, and use deterministic kernels "
                "(torch.use_deterministic_algorithms(True))."
            )


def warn_of_rounding(loss: Any, eps: float) -> bool:
    """Whether a loss is in half precision, where the difference of two is mostly rounding; a warning says so."""
    if not isinstance(loss, Tensor) or loss.dtype not in (torch.float16, torch.bfloat16) or not loss.isfinite():
        return False
    size = abs(float(loss))
    apart = torch.finfo(loss.dtype).eps * 2.0 ** math.floor(math.log2(size)) if size else 0.0
    logger.warning(
        "MeZO: the loss is in %s, in which numbers near %.3g are %.2g apart, so with eps %g the projected gradient is "
        "rounded to multiples of about %.2g. Compute the loss in float32: under torch.autocast (bf16=True of "
        "MeZOConfig), or from the logits as F.cross_entropy(logits.float(), labels).",
        str(loss.dtype).removeprefix("torch."),
        size,
        apart,
        eps,
        apart / (2 * eps),
    )
    return True
