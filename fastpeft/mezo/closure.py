"""What a closure that computes a loss must do: return one number, the same for the same weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fastpeft.errors import FastpeftError
from fastpeft.support.processes import Ranks

logger = logging.getLogger(__name__)


def loss_of(closure: Callable[[], Any], eps: float | None = None) -> float:
    """Call the closure; its loss as a double, in which a float32 or half precision loss is exact.

    Args:
        closure: of the user.
        eps: of the perturbation, for a warning where the loss is too coarse for it; None: no warning.

    Raises:
        FastpeftError: the closure is no function, asks for gradients, or returned anything but one number.
    """
    if not callable(closure):
        raise FastpeftError(
            f"MeZO: a step asks for several losses, but got a {type(closure).__name__}. Give it a function, as "
            "optimizer.step(lambda: model(**batch).loss)."
        )
    try:
        loss = closure()
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
        raise FastpeftError(
            f"MeZO: the closure asks for gradients ({error}), and a step makes none. Leave out loss.backward(). If the "
            "loss is made of derivatives, compute it under torch.enable_grad()."
        ) from error
    if not isinstance(loss, Real) and not (isinstance(loss, Tensor) and loss.numel() == 1):
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise FastpeftError(f"MeZO: the closure returned {what}; it must return the loss, one number.")
    if eps is not None:
        warn_of_rounding(loss, eps)
    return float(loss)


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


def warn_of_gradients(params: Sequence[Tensor], ranks: Ranks) -> None:
    """Warn if what is trained has gradients after a loss, as where Lightning calls backward for each of them."""
    if ranks.is_first and any(param.grad is not None for param in params):
        logger.warning(
            "MeZO: parameters have gradients, which no step uses and which take memory. If the closure calls backward, "
            "leave that out (in Lightning by its manual optimization); else call zero_grad()"
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
