"""`fastpeft::siva_linear`: linear layers whose weights are a frozen part and a trained product of rank R.

    h_i = x W_i^T + ((x V_i^T) * s_i) U_i^T + b_i

All layers of a call read the same x, as the query, key and value of an attention; one layer is a group of one. Or there
is one layer, and the rows of x take the factors of different adapters.

Dimension letters: M rows of x (all leading dimensions together), K in_features, N out_features, R rank.

x, weights, h and biases have one dtype, and their gradients have it. The factors u, s and v have that dtype or
float32; p and the factors' gradients have theirs. On a CPU a weight may be a pack of it (`fastpeft.ops.packing`), in
backward one of its transpose. A weight with scales is quantised (`fastpeft.ops.quantised_linear`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpeft.errors import FastpeftError
from fastpeft.ops.define import check_first_derivative, define, is_transformed
from fastpeft.ops.dtypes import check_kinds, compute_dtype, factors_dtype
from fastpeft.ops.packing import Packs, operand
from fastpeft.ops.quantised_linear import Nested, unnested
from fastpeft.ops.siva_forms import (
    check_order,
    p_shape,
    siva_linear_aten,
    siva_linear_backward_aten,
    siva_linear_backward_reference,
    siva_linear_reference,
)


class Scales(NamedTuple):
    """What the codes of a quantised weight are multiplied by, as they are stored."""

    values: Tensor
    nested: Nested | None


Frozen = Packs | Scales | None  # of a weight, beside it


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
        (h,) = SivaLinear.apply((packs,), (), None, x, weight, u, s, v, bias)
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
    us, ss, vs = (_cast(factors_dtype(dtype, x.device), *each) for each in (us, ss, vs))
    if torch.is_grad_enabled() and not torch.compiler.is_exporting():
        hs: tuple[Tensor, ...] = SivaLinear.apply(packs, (), None, x, *weights, *us, *ss, *vs, *biases)
        return hs
    frozen = products_of(weights, packs, x)
    found, _ = torch.ops.fastpeft.siva_linear.default(x, *frozen, us, ss, vs, biases)
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
    h: Tensor
    (h,) = SivaLinear.apply((packs,), list(sizes), order, x, weight, *cast, bias)
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


def _shapes(
    x: Tensor,
    weights: list[Tensor],
    scales: Any,
    us: list[Tensor],
    ss: list[Tensor],
    vs: list[Tensor],
    biases: Any,
    sizes: Sequence[int] = (),
    order: Any = None,
) -> tuple[list[Tensor], Tensor]:
    hs = [x.new_empty((*x.shape[:-1], u.shape[0])) for u, _ in zip(us, weights, strict=False)]
    return hs, vs[0].new_empty(p_shape(x, vs, sizes))


def _backward_shapes(
    dhs: list[Tensor],
    x: Tensor,
    weights: Any,
    scales: Any,
    us: list[Tensor],
    ss: Any,
    vs: list[Tensor],
    p: Any,
    need_dx: bool,
    need_du: list[bool],
    need_dv: bool,
    need_dbias: list[bool],
    *rest: Any,
) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
    k = vs[0].shape[1]
    return (
        dhs[0].new_empty((*dhs[0].shape[:-1], k) if need_dx else (0,)),
        [u.new_empty(u.shape if needed else (0,)) for u, needed in zip(us, need_du, strict=True)],
        vs[0].new_empty((sum(v.shape[0] for v in vs), k) if need_dv else (0,)),
        [dh.new_empty((dh.shape[-1],) if needed else (0,)) for dh, needed in zip(dhs, need_dbias, strict=True)],
    )


# each h (*, N), and each p^T (R, M), which backward needs, as `p_shape` says. Of a mixed batch x is (B, *, K), `sizes`
# has the rows of each adapter, and `order` (B,) sorts the rows by adapter
define(
    "siva_linear",
    "(Tensor x, Tensor[] weights, Tensor?[] scales, Tensor[] us, Tensor[] ss, Tensor[] vs, Tensor?[] biases, "
    "int[] sizes=[], Tensor? order=None) -> (Tensor[], Tensor)",
    shapes=_shapes,
    reference=siva_linear_reference,
    aten=siva_linear_aten,
)


# dx (*, K), each du (N, R), all dv in one (sum of R, K), each dbias (N,)
define(
    "siva_linear_backward",
    "(Tensor[] dhs, Tensor x, Tensor[] weights, Tensor?[] scales, Tensor[] us, Tensor[] ss, Tensor[] vs, Tensor p, "
    "bool need_dx, bool[] need_du, bool need_dv, bool[] need_dbias, int[] sizes=[], Tensor? order=None) "
    "-> (Tensor, Tensor[], Tensor, Tensor[])",
    shapes=_backward_shapes,
    reference=siva_linear_backward_reference,
    aten=siva_linear_backward_aten,
)


def products_of(
    weights: Sequence[Tensor], frozen: Sequence[Frozen], x: Tensor, transposed: bool = False
) -> tuple[list[Tensor], list[Tensor | None]]:
    """What the op takes of frozen weights beside x, or beside dh in backward: each weight, and its scales or None."""
    factors: list[Tensor] = []
    scales: list[Tensor | None] = []
    for weight, each in zip(weights, frozen, strict=True):
        if isinstance(each, Scales):
            factors.append(weight)
            scales.append(unnested(*each))
        else:
            factors.append(operand(weight, each, x, transposed))
            scales.append(None)
    return factors, scales


class SivaLinear(torch.autograd.Function):
    """The autograd formula: `apply(frozen, sizes, order, x, *weights, *us, *ss, *vs, *biases)`.

    `frozen` has for each weight its packs, or None, or its `Scales`: the weight is codes then. Codes are saved for
    backward as weights are; scales, which nothing changes, are held. Not one of `register_autograd`, which takes twice
    as long. Weights have any dtype and get no gradient, and s gets none; the functions refuse those that require one.
    """

    @staticmethod
    def forward(
        ctx: Any, frozen: Sequence[Frozen], sizes: Sequence[int], order: Tensor | None, x: Tensor, *operands: Any
    ) -> tuple[Tensor, ...]:
        layers = len(frozen)
        weights, us, ss, vs, biases = _split(operands, layers, len(sizes))
        factors, scales = products_of(weights, frozen, x)
        try:
            hs, p = torch.ops.fastpeft.siva_linear.default(x, factors, scales, us, ss, vs, biases, sizes, order)
        except RuntimeError:
            check_order(x, order)  # what the compiled module raises is no FastpeftError
            raise
        _, need_du, _, need_dv, _ = _split(ctx.needs_input_grad[4:], layers, len(sizes))
        ctx.frozen, ctx.sizes = frozen, sizes
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            x if True in need_dv else None,
            p if True in need_du else None,
            order,
            *(weight if each.is_mkldnn else each for weight, each in zip(weights, factors, strict=True)),
            *operands[layers:-layers],
        )
        return tuple(hs)

    @staticmethod
    def backward(ctx: Any, *dhs: Tensor | None) -> tuple[Tensor | None, ...]:
        check_first_derivative("siva_linear")
        used = [i for i, dh in enumerate(dhs) if dh is not None]
        if not used:
            return (None,) * len(ctx.needs_input_grad)
        sizes, layers = ctx.sizes, len(dhs)
        x, p, order, *saved = ctx.saved_tensors
        of_layers = [dhs, ctx.frozen, *_split(saved, layers, len(sizes))[:-1]]
        of_layers += _split(ctx.needs_input_grad[4:], layers, len(sizes))
        if len(used) < layers:
            if p is not None:
                parts = p.split([len(s) for s in of_layers[4]])
                p = torch.cat([parts[i] for i in used])
            of_layers = [[each[i] for i in used] for each in of_layers]
        given, frozen, weights, us, ss, vs, _, need_du, _, need_dv, need_dbias = of_layers
        need_dx = ctx.needs_input_grad[3]
        scales: list[Tensor | None] = [None] * len(weights)
        if need_dx:
            weights, scales = products_of(weights, frozen, given[0], transposed=True)
        empty = given[0].new_empty(0)
        dx, dus, dv, dbiases = torch.ops.fastpeft.siva_linear_backward.default(
            given,
            empty if x is None else x,
            weights,
            scales,
            us,
            ss,
            vs,
            empty if p is None else p,
            need_dx,
            need_du,
            True in need_dv,
            need_dbias,
            sizes,
            order,
        )
        dvs = dv.split([len(v) for v in vs]) if True in need_dv else [dv] * len(vs)
        gradients: list[list[Tensor | None]]
        gradients = [[None] * len(each) for each in _split(ctx.needs_input_grad[4:], layers, len(sizes))]
        for place, values, needs in ((1, dus, need_du), (3, dvs, need_dv), (4, dbiases, need_dbias)):
            for i, value, need in zip(range(len(values)) if sizes else used, values, needs, strict=True):
                gradients[place][i] = value if need else None
        return None, None, None, dx if need_dx else None, *(one for each in gradients for one in each)


def _split(values: Sequence[Any], layers: int, adapters: int) -> list[Sequence[Any]]:
    """Weights, us, ss, vs and biases, from one after the other."""
    factors = adapters or layers
    ends = layers, layers + factors, layers + 2 * factors, layers + 3 * factors, len(values)
    return [values[start:end] for start, end in zip((0, *ends), ends, strict=False)]
