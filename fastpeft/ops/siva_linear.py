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
from typing import Any

import torch
from torch import Tensor

from fastpeft.errors import FastpeftError
from fastpeft.ops.define import check_first_derivative, define, is_transformed
from fastpeft.ops.dtypes import check_kinds, compute_dtype, factors_dtype
from fastpeft.ops.frozen_weight import Dense, FrozenWeight
from fastpeft.ops.packing import Packs, operand
from fastpeft.ops.quantised_linear import Scales, unnested
from fastpeft.ops.siva_forms import (
    check_order,
    p_shape,
    siva_linear_aten,
    siva_linear_backward_aten,
    siva_linear_backward_reference,
    siva_linear_reference,
)


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
            requires a gradient where gradients are recorded.

    Notes:
        Saved for backward: weight, u, s and v; x only if v needs a gradient; `p = x V^T` `(*, r)` only if u does.
        Differentiable in x, u, v and bias. Gradients are deterministic: nothing is summed by atomics.

    Example:
        >>> x, w = torch.randn(3, 8), torch.randn(5, 8)
        >>> u, s, v = torch.randn(5, 2), torch.ones(2), torch.randn(2, 8)
        >>> siva_linear(x, w, u, s, v).shape
        torch.Size([3, 5])
    """
    (h,) = siva_linear_group(x, [weight], [u], [s], [v], [bias], [packs])
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
    frozen = [Dense(weight, each) for weight, each in zip(weights, packs, strict=True)]
    return tuple(siva_products(x, compute_dtype(x, weights[0]), frozen, us, ss, vs, biases))


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
    (h,) = siva_products(x, compute_dtype(x, weight), [Dense(weight, packs)], us, ss, vs, [bias], list(sizes), order)
    return h


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


def siva_products(
    x: Tensor,
    dtype: torch.dtype,
    weights: Sequence[FrozenWeight],
    us: Sequence[Tensor],
    ss: Sequence[Tensor],
    vs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    sizes: Sequence[int] = (),
    order: Tensor | None = None,
) -> Sequence[Tensor]:
    """`siva_linear_group`, or with `sizes` `siva_linear_mixed`, of factors that were checked when they were made.

    Args:
        x, us, ss, vs, biases, sizes, order: as those functions take them.
        dtype: in which all is computed but the factors, which may be in float32.
        weights: one a layer, in any form.

    Raises:
        FastpeftError: x does not fit the weights, or a gradient is asked for of what is frozen.
    """
    device, v = x.device, vs[0]
    if x.shape[-1:] != v.shape[1:] or device != v.device:
        raise FastpeftError(
            f"a layer of SiVA takes x (*, {v.shape[1]}) on the device of its weight, here {v.device}; got "
            f"{tuple(x.shape)} on {device}."
        )
    if x.dtype is not dtype:
        check_kinds("siva_linear", device, "x", x)
        x = x.to(dtype)
    of_factors = factors_dtype(dtype, device)
    us, ss, vs = _cast(of_factors, us), _cast(of_factors, ss), _cast(of_factors, vs)
    biases = _cast(dtype, biases)
    if is_transformed():  # which does not take our autograd formula
        dense = [weight.dense(dtype) for weight in weights]
        hs, _ = siva_linear_reference(x, dense, [None] * len(dense), [*us], [*ss], [*vs], [*biases], sizes, order)
        return hs
    stored, forms = [weight.stored for weight in weights], [weight.form for weight in weights]
    if torch.is_grad_enabled() and not torch.compiler.is_exporting():  # a graph to export has the op
        found: tuple[Tensor, ...] = SivaLinear.apply(forms, sizes, order, x, *stored, *us, *ss, *vs, *biases)
        return found
    hs, _ = _forward(x, *_products_of(stored, forms, x), us, ss, vs, biases, sizes, order)
    return hs


def _cast(dtype: torch.dtype, tensors: Sequence[Any]) -> Sequence[Any]:
    for tensor in tensors:
        if not (tensor is None or tensor.dtype is dtype):
            return [t if t is None else t.to(dtype) for t in tensors]
    return tensors


def _products_of(
    weights: Sequence[Tensor], forms: Sequence[Packs | Scales | None], x: Tensor, transposed: bool = False
) -> tuple[list[Tensor], list[Tensor | None]]:
    """What the op takes of frozen weights beside x, or beside dh in backward: each weight, and its scales or None."""
    coded = [type(form) is Scales for form in forms]
    factors = [
        weight if is_coded else operand(weight, form, x, transposed)  # type: ignore[arg-type]
        for weight, form, is_coded in zip(weights, forms, coded)
    ]
    return factors, [unnested(*form) if is_coded else None for form, is_coded in zip(forms, coded)]  # type: ignore[misc]


def _forward(x: Tensor, *operands: Any) -> tuple[list[Tensor], Tensor]:
    try:
        found: tuple[list[Tensor], Tensor] = torch.ops.fastpeft.siva_linear.default(x, *operands)
    except RuntimeError:
        check_order(x, operands[-1])  # what the compiled module raises is no FastpeftError
        raise
    return found


class SivaLinear(torch.autograd.Function):
    """The autograd formula: `apply(forms, sizes, order, x, *weights, *us, *ss, *vs, *biases)`.

    A form is what `FrozenWeight` has beside the stored tensor. Codes are saved for backward as weights are; scales,
    which nothing changes, are held. Not one of `register_autograd`, which takes twice as long.
    """

    @staticmethod
    def forward(
        ctx: Any,
        forms: Sequence[Packs | Scales | None],
        sizes: Sequence[int],
        order: Tensor | None,
        x: Tensor,
        *operands: Any,
    ) -> tuple[Tensor, ...]:
        layers, needs = len(forms), ctx.needs_input_grad
        weights, us, ss, vs, biases = _split(operands, layers, len(sizes))
        of_s = 4 + layers + len(us)
        if True in needs[4 : 4 + layers] or True in needs[of_s : of_s + len(ss)]:
            raise FastpeftError(
                "siva_linear: a weight or an s requires a gradient, but both are frozen by definition; call "
                "requires_grad_(False) on them."
            )
        factors, scales = _products_of(weights, forms, x)
        hs, p = _forward(x, factors, scales, us, ss, vs, biases, sizes, order)
        ctx.forms, ctx.sizes = forms, sizes
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            x if True in needs[of_s + len(ss) : len(needs) - layers] else None,
            p if True in needs[4 + layers : of_s] else None,
            order,
            *[weight if factor.is_mkldnn else factor for weight, factor in zip(weights, factors)],
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
        adapters = len(sizes) or layers
        of_layers = [dhs, ctx.forms, *_split(saved, layers, len(sizes))[:-1]]
        of_layers += _split(ctx.needs_input_grad[4:], layers, len(sizes))
        if len(used) < layers:
            if p is not None:
                parts = p.split([len(s) for s in of_layers[4]])
                p = torch.cat([parts[i] for i in used])
            of_layers = [[each[i] for i in used] for each in of_layers]
        given, forms, weights, us, ss, vs, _, need_du, _, need_dv, need_dbias = of_layers
        need_dx, needs_dv = ctx.needs_input_grad[3], True in need_dv
        scales: list[Tensor | None] = [None] * len(weights)
        if need_dx:
            weights, scales = _products_of(weights, forms, given[0], transposed=True)
        empty = given[0].new_empty(0)
        x, p = (empty if saved is None else saved for saved in (x, p))
        needs = need_dx, need_du, needs_dv, need_dbias
        dx, dus, dv, dbiases = torch.ops.fastpeft.siva_linear_backward.default(
            given, x, weights, scales, us, ss, vs, p, *needs, sizes, order
        )
        dvs = dv.split([len(v) for v in vs]) if needs_dv else [dv] * len(vs)
        gradients: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        gradients[3] = dx if need_dx else None
        places = range(adapters) if sizes else used
        for first, values, wanted in ((layers, dus, need_du), (layers + 2 * adapters, dvs, need_dv)):
            for i, value, need in zip(places, values, wanted, strict=True):
                gradients[4 + first + i] = value if need else None
        for i, value, need in zip(used, dbiases, need_dbias, strict=True):
            gradients[i - layers] = value if need else None
        return tuple(gradients)


def _split(values: Sequence[Any], layers: int, adapters: int) -> tuple[Sequence[Any], ...]:
    """Weights, us, ss, vs and biases, from one after the other."""
    if layers == 1 and adapters < 2:
        return values[:1], values[1:2], values[2:3], values[3:4], values[4:]
    factors = adapters or layers
    a, b, c, d = (layers + i * factors for i in range(4))
    return values[:a], values[a:b], values[b:c], values[c:d], values[d:]
