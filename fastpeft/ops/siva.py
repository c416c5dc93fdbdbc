"""A frozen product and its low-rank factors: one layer, several that share x, and rows of several adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastpeft.errors import FastpeftError
from fastpeft.ops.checks import check_kinds
from fastpeft.ops.define import is_transformed
from fastpeft.ops.dtypes import compute_dtype, factors_dtype
from fastpeft.ops.packing import Packs, operand
from fastpeft.ops.products import split
from fastpeft.ops.siva_linear import SivaLinear, products_of, siva_linear_reference
from fastpeft.ops.siva_linear_mixed import SivaLinearMixed


def siva_linear(
    x: Tensor,
    weight: Tensor,
    u: Tensor,
    s: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    packs: Packs | None = None,
) -> Tensor:
    r"""Linear layer whose weight is a frozen part and a trained product of rank r.

    `h = x W^T + ((x V^T) * s) U^T + b`

    Args:
        x: `(*, in_features)`, float16, bfloat16, float32 or float64.
        weight: `(out_features, in_features)`, frozen: it must not require a gradient.
        u: `(out_features, r)`, trained.
        s: `(r,)`, frozen.
        v: `(r, in_features)`, trained.
        bias: `(out_features,)` or None.
        packs: the weight's packs, from which the products on a CPU are computed. None packs nothing.

    All operands are brought to the dtype of `weight`, under autocast to autocast's dtype. But the factors u, s and v of
    a computation in half precision (on a CPU, in bfloat16) are brought to float32, and a weight that is packed is cast
    once, not at each call.

    Returns:
        `(*, out_features)` in that dtype.

    Raises:
        FastpeftError: shapes do not fit, an operand is no floating number or on another device, or `weight` or `s`
            requires a gradient.

    Notes:
        Saved for backward: weight, u, s and v; x only if v needs a gradient; `p = x V^T` `(*, r)` only if u does.
        Differentiable in x, u, v and bias. Gradients are deterministic: nothing is summed by atomics.

    Example:
        >>> x, w = torch.randn(3, 8), torch.randn(5, 8)
        >>> u, s, v = torch.randn(5, 2), torch.ones(2), torch.randn(2, 8)
        >>> siva_linear(x, w, u, s, v).shape
        torch.Size([3, 5])
    """
    _check_siva_linear(x, weight, u, s, v, bias)
    dtype = compute_dtype(x, weight)
    of_factors = factors_dtype(dtype, x.device)
    if x.dtype is not dtype:
        x = x.to(dtype)
    if bias is not None and bias.dtype is not dtype:
        bias = bias.to(dtype)
    if not (u.dtype is s.dtype is v.dtype is of_factors):
        u, s, v = _cast(of_factors, u, s, v)
    h: Tensor
    if is_transformed():  # which does not take our autograd formula
        (h,), _ = siva_linear_reference(x, [weight.to(dtype)], [None], [u], [s], [v], [bias])
    elif torch.is_grad_enabled() and not torch.compiler.is_exporting():  # a graph to export has the op
        (h,) = SivaLinear.apply((packs,), x, weight, u, s, v, bias)
    else:
        weight = operand(weight, packs, x)
        (h,), _ = torch.ops.fastpeft.siva_linear.default(x, [weight], [None], [u], [s], [v], [bias])
    return h


def siva_linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    ss: Sequence[Tensor],
    vs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    packs: Sequence[Packs | None] | None = None,
) -> tuple[Tensor, ...]:
    r"""Several `siva_linear` that read the same x, such as the query, key and value of an attention.

    `h_i = x W_i^T + ((x V_i^T) * s_i) U_i^T + b_i`

    Args:
        x: `(*, in_features)`.
        weights, us, ss, vs, biases, packs: one of each per layer, as `siva_linear` takes them; ranks and out_features
            may differ, the weights' dtype not.

    Returns:
        One `(*, out_features)` per layer, in the order given.

    Raises:
        FastpeftError: the numbers of operands or the weights' dtypes differ, or as `siva_linear` does.

    Notes:
        Saved for backward: as by `siva_linear`, but x once, and `p` of all layers in one `(sum of r, rows)`. The
        gradient of x is summed in one tensor, where autograd would make one for each layer and add them.

    Example:
        >>> x, w = torch.randn(3, 8), torch.randn(5, 8)
        >>> u, s, v = torch.randn(5, 2), torch.ones(2), torch.randn(2, 8)
        >>> query, key = siva_linear_group(x, [w, -w], [u, u], [s, s], [v, v], [None, None])
        >>> key.shape
        torch.Size([3, 5])
    """
    packs = [None] * len(weights) if packs is None else packs
    operands = weights, us, ss, vs, biases
    if (
        not weights
        or len({len(each) for each in (*operands, packs)}) > 1
        or len({weight.dtype for weight in weights}) > 1
    ):
        raise FastpeftError(
            "siva_linear_group takes one weight, u, s, v and bias (or None) for each layer, at least one, with weights "
            f"of one dtype; got {', '.join(str(len(each)) for each in operands)} of them and weights of "
            f"{', '.join(sorted({str(weight.dtype) for weight in weights})) or 'no dtype'}."
        )
    for weight, u, s, v, bias in zip(weights, us, ss, vs, biases, strict=True):
        _check_siva_linear(x, weight, u, s, v, bias)
    if is_transformed():
        return tuple(siva_linear(x, *each) for each in zip(*operands, strict=True))
    dtype = compute_dtype(x, weights[0])
    x, *biases = _cast(dtype, x, *biases)
    factors = _cast(factors_dtype(dtype, x.device), *us, *ss, *vs)
    if torch.is_grad_enabled() and not torch.compiler.is_exporting():
        hs: tuple[Tensor, ...] = SivaLinear.apply(packs, x, *weights, *factors, *biases)
        return hs
    frozen = products_of(weights, packs, x)
    found, _ = torch.ops.fastpeft.siva_linear.default(x, *frozen, *split(factors, len(weights)), biases)
    return tuple(found)


def siva_linear_mixed(
    x: Tensor,
    weight: Tensor,
    us: Sequence[Tensor],
    ss: Sequence[Tensor],
    vs: Sequence[Tensor],
    sizes: Sequence[int],
    order: Tensor | None = None,
    bias: Tensor | None = None,
    packs: Packs | None = None,
) -> Tensor:
    r"""`siva_linear` for a batch whose rows take different factors, as where they belong to different adapters.

    `h[b] = x[b] W^T + ((x[b] V_i^T) * s_i) U_i^T + b`, where row b of the batch takes the factors i

    Args:
        x: `(B, *, in_features)`.
        weight, bias, packs: as `siva_linear` takes them.
        us, ss, vs: one of each per adapter, as `siva_linear` takes them; ranks may differ, and be 0.
        sizes: how many rows take the factors of each adapter, B together.
        order: int64 `(B,)`, the permutation that brings the rows into the order of the adapters:
            `order[:sizes[0]]` are the numbers of the rows of the first, and so on. None where they stand in it. On a
            GPU its values are read by the kernels alone, unchecked: what is no permutation has no defined result.

    Returns:
        `(B, *, out_features)`, in the order of x.

    Raises:
        FastpeftError: the numbers of operands or of rows do not fit, or as `siva_linear` does.

    Notes:
        The product with the weight runs once over all rows. Those of rank r are added where the rows lie, in C++ by
        one pass, in Triton by the same kernel. Without either they run over the rows of one adapter after the other,
        and rows in another order than the adapters' cost a copy of x and one of h. Saved for backward: as by
        `siva_linear`, with p of each adapter whose u needs a gradient. Gradients are deterministic.

    Example:
        >>> x, w = torch.randn(3, 8), torch.randn(5, 8)
        >>> u, s, v = torch.randn(5, 2), torch.ones(2), torch.randn(2, 8)
        >>> siva_linear_mixed(x, w, [u, -u], [s, s], [v, v], sizes=[1, 2], order=torch.tensor([2, 0, 1])).shape
        torch.Size([3, 5])
    """
    factors, rows = (us, ss, vs), x.shape[0] if x.dim() > 1 else -1
    fits = len(us) > 0 and {len(each) for each in factors} == {len(sizes)} and sum(sizes) == rows and min(sizes) >= 0
    of_order = (order.dtype, tuple(order.shape), order.device) if order is not None else None
    if not fits or of_order not in (None, (torch.int64, (rows,), x.device)):
        raise FastpeftError(
            "siva_linear_mixed takes x (B, *, K), one u, s, v and number of rows for each adapter, at least one, whose "
            f"sum is B, and an int64 order (B,) on the device of x, or None; got x {tuple(x.shape)}, {len(us)} u, "
            f"{len(ss)} s, {len(vs)} v, sizes {list(sizes)} and order {of_order}."
        )
    for u, s, v in zip(*factors, strict=True):
        _check_siva_linear(x, weight, u, s, v, bias)
    dtype = compute_dtype(x, weight)
    x, bias = _cast(dtype, x, bias)
    cast = _cast(factors_dtype(dtype, x.device), *us, *ss, *vs)
    h: Tensor = SivaLinearMixed.apply(packs, list(sizes), order, x, weight, bias, *cast)
    return h


def _cast(dtype: torch.dtype, *tensors: Any) -> list[Any]:
    return [t if t is None or t.dtype is dtype else t.to(dtype) for t in tensors]


def _check_siva_linear(x: Tensor, weight: Tensor, u: Tensor, s: Tensor, v: Tensor, bias: Tensor | None) -> None:
    n, k = weight.shape if weight.dim() == 2 else (-1, -1)
    r = s.shape[0] if s.dim() == 1 else -1
    fits = x.dim() > 0 and x.shape[-1] == k and u.shape == (n, r) and v.shape == (r, k)
    if not fits or (bias is not None and bias.shape != (n,)):
        raise FastpeftError(
            "siva_linear takes x (*, K), weight (N, K), u (N, r), s (r,), v (r, K) and bias (N,) or None; got x "
            f"{tuple(x.shape)}, weight {tuple(weight.shape)}, u {tuple(u.shape)}, s {tuple(s.shape)}, v "
            f"{tuple(v.shape)}, bias {None if bias is None else tuple(bias.shape)}."
        )
    check_kinds("siva_linear", x.device, "x weight u s v bias", x, weight, u, s, v, bias)
    if weight.requires_grad or s.requires_grad:
        raise FastpeftError(
            "siva_linear: weight and s are frozen by definition but "
            f"{'weight' if weight.requires_grad else 's'} requires a gradient; call requires_grad_(False) on it."
        )
