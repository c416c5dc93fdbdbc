"""Checked, documented functions over the ops."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpeft import _ops, backends  # noqa: F401  (declares the ops and registers their implementations)
from fastpeft.errors import FastpeftError


def siva_linear(x: Tensor, weight: Tensor, u: Tensor, s: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""Linear layer whose weight is a frozen part and a trained product of rank r.

    `h = x W^T + ((x V^T) * s) U^T + b`

    Args:
        x: `(*, in_features)`, float16, bfloat16, float32 or float64.
        weight: `(out_features, in_features)`, frozen: it must not require a gradient.
        u: `(out_features, r)`, trained.
        s: `(r,)`, frozen.
        v: `(r, in_features)`, trained.
        bias: `(out_features,)` or None.

    All operands are brought to the dtype of `weight`, under autocast to autocast's dtype.

    Returns:
        `(*, out_features)` in that dtype.

    Raises:
        FastpeftError: shapes do not fit, or `weight` or `s` requires a gradient.

    Notes:
        Saved for backward: x and `p = x V^T` `(*, r)`, both only where U and V need gradients. Differentiable in
        x, u, v and bias. Gradients are deterministic: nothing is summed by atomics.

    Example:
        >>> x, w = torch.randn(3, 8), torch.randn(5, 8)
        >>> u, s, v = torch.randn(5, 2), torch.ones(2), torch.randn(2, 8)
        >>> siva_linear(x, w, u, s, v).shape
        torch.Size([3, 5])
    """
    r = s.shape[0] if s.dim() == 1 else -1
    if (
        weight.dim() != 2
        or x.dim() < 1
        or x.shape[-1] != weight.shape[1]
        or u.shape != (weight.shape[0], r)
        or v.shape != (r, weight.shape[1])
        or (bias is not None and bias.shape != weight.shape[:1])
    ):
        raise FastpeftError(
            "siva_linear takes x (*, K), weight (N, K), u (N, r), s (r,), v (r, K) and bias (N,) or None; got x "
            f"{tuple(x.shape)}, weight {tuple(weight.shape)}, u {tuple(u.shape)}, s {tuple(s.shape)}, v "
            f"{tuple(v.shape)}, bias {None if bias is None else tuple(bias.shape)}."
        )
    if weight.requires_grad or s.requires_grad:
        raise FastpeftError(
            "siva_linear: weight and s are frozen by definition but "
            f"{'weight' if weight.requires_grad else 's'} requires a gradient; call requires_grad_(False) on it."
        )
    dtype = weight.dtype
    if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    h, _ = torch.ops.fastpeft.siva_linear(
        x.to(dtype), weight.to(dtype), u.to(dtype), s.to(dtype), v.to(dtype), None if bias is None else bias.to(dtype)
    )
    return h
