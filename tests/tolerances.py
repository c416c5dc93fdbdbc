"""How far a result may be from the exact one: judged by what plain PyTorch reaches in the same dtype."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FORWARD, GRADIENT = 3.0, 3.0  # times PyTorch's own error; of all sizes the largest that was seen is 2.6, forward


def assert_as_accurate(actual: Tensor, plain: Tensor, exact: Tensor, terms: Tensor, factor: float = FORWARD) -> None:
    """`actual` errs at most `factor` times as much as `plain`, both against `exact` in float64.

    One rounding of the largest of `terms`, the formula of `exact` on absolute values, is granted on top: where `plain`
    happens to be exact, or terms cancel, the same roundings in another order are still right.
    """
    assert actual.shape == exact.shape, f"shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert actual.dtype is plain.dtype, f"dtype {actual.dtype}, expected {plain.dtype}"
    if exact.numel() == 0:
        return
    error, allowed = (x.double().sub(exact).abs().max().item() for x in (actual, plain))
    allowed = factor * allowed + torch.finfo(actual.dtype).eps * terms.max().item()
    assert math.isfinite(allowed), "the reference overflowed"
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"  # NaN fails
