"""`fastpeft::siva_linear`: linear layers whose weights are a frozen part and a trained product of rank R.

    h_i = x W_i^T + ((x V_i^T) * s_i) U_i^T + b_i

All layers of a call read the same x, as the query, key and value of an attention; one layer is a group of one.

Dimension letters: M rows of x (all leading dimensions together), K in_features, N out_features, R rank.

x, weights, h and biases have one dtype, and their gradients have it. The factors u, s and v have that dtype or
float32; p and the factors' gradients have theirs. On a CPU a weight may be a pack of it (`fastpeft.ops.packing`), in
backward one of its transpose. A weight with scales is quantised (`fastpeft.ops.quantised_linear`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastpeft.ops.define import check_first_derivative, define
from fastpeft.ops.packing import Packs, dense, operand
from fastpeft.ops.products import (
    as_matrix,
    lowered,
    multiplies_in_float32,
    output,
    raised,
    scaled,
    split,
    stacked,
    times,
)
from fastpeft.ops.quantised_linear import Nested, dequantise, unnested


class Scales(NamedTuple):
    """What the codes of a quantised weight are multiplied by, as they are stored."""

    values: Tensor
    nested: Nested | None


Frozen = Packs | Scales | None  # of a weight, beside it


def whole(
    weights: list[Tensor], scales: list[Tensor | None], us: list[Tensor], vs: list[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """The weights, those that are quantised dequantised."""
    if not any(each is not None for each in scales):
        return weights
    return [
        weight if each is None else dequantise(weight, each, (u.shape[0], v.shape[1]), dtype)
        for weight, each, u, v in zip(weights, scales, us, vs, strict=True)
    ]


def siva_linear_reference(
    x: Tensor,
    weights: list[Tensor],
    scales: list[Tensor | None],
    us: list[Tensor],
    ss: list[Tensor],
    vs: list[Tensor],
    biases: list[Tensor | None],
) -> tuple[list[Tensor], Tensor]:
    """Each `h = x W^T + ((x V^T) * s) U^T + b`, and all `p^T = V x^T` in one `(sum of R, M)`."""
    hs, ps = [], []
    weights = whole(weights, scales, us, vs, x.dtype)
    for weight, u, s, v, bias in zip(weights, us, ss, vs, biases, strict=True):
        p = F.linear(raised(x, v), v)
        hs.append((F.linear(x, dense(weight), bias) + F.linear(p * s, u)).to(x.dtype))
        ps.append(as_matrix(p).t())
    return hs, torch.cat(ps)


def siva_linear_backward_reference(
    dhs: list[Tensor],
    x: Tensor,
    weights: list[Tensor],
    scales: list[Tensor | None],
    us: list[Tensor],
    ss: list[Tensor],
    vs: list[Tensor],
    p: Tensor,
    need_dx: bool,
    need_du: list[bool],
    need_dv: bool,
    need_dbias: list[bool],
) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
    """Gradients of `siva_linear`, with `dp = (dh U) * s` of each layer:

    `dx = sum of dh W + dp V`, `dU = dh^T (p * s)`, all `dV = dp^T x` below each other, `db = sum of dh over rows`.
    """
    dxs, dus, dvs, dbiases = [], [], [], []
    weights = whole(weights, scales, us, vs, dhs[0].dtype) if need_dx else weights
    ps = p.split([s.shape[0] for s in ss]) if any(need_du) else [p] * len(ss)
    for i, (dh, weight, u, s, v) in enumerate(zip(dhs, weights, us, ss, vs, strict=True)):
        rows = as_matrix(dh)  # (M, N)
        wide = raised(rows, u)
        dp = (wide @ u) * s  # (M, R)
        if need_dx:
            product = rows @ (dense(weight).t() if weight.is_mkldnn else weight)
            dxs.append((product + dp @ v).to(dh.dtype).view(*dh.shape[:-1], v.shape[1]))
        if need_dv:
            dvs.append(dp.t() @ raised(as_matrix(x), v))
        dus.append(wide.t() @ (ps[i].t() * s) if need_du[i] else u.new_empty(0))
        dbiases.append(rows.sum(0) if need_dbias[i] else dh.new_empty(0))
    return (
        sum(dxs[1:], dxs[0]) if need_dx else dhs[0].new_empty(0),
        dus,
        torch.cat(dvs) if need_dv else vs[0].new_empty(0),
        dbiases,
    )


def siva_linear_aten(
    x: Tensor,
    weights: list[Tensor],
    scales: list[Tensor | None],
    us: list[Tensor],
    ss: list[Tensor],
    vs: list[Tensor],
    biases: list[Tensor | None],
) -> tuple[list[Tensor], Tensor]:
    """`p^T = V x^T` for all layers at once; for each `h = x W^T + b`, then `h += p (U diag(s))^T` in place.

    Each layer has its product with W: one with all W below each other is no faster, and they would have to share a
    storage for it.
    """
    dtype = vs[0].dtype
    weights = whole(weights, scales, us, vs, x.dtype)
    us, ss, vs = (lowered(each, x.dtype) for each in (us, ss, vs))
    p = stacked(vs) @ as_matrix(x).t()  # (sum of R, M)
    ps = p.split([s.shape[0] for s in ss])
    hs = [
        output(x, weight, u, s, part.t(), bias)
        for weight, u, s, part, bias in zip(weights, us, ss, ps, biases, strict=True)
    ]
    return hs, p.to(dtype)


def siva_linear_backward_aten(
    dhs: list[Tensor],
    x: Tensor,
    weights: list[Tensor],
    scales: list[Tensor | None],
    us: list[Tensor],
    ss: list[Tensor],
    vs: list[Tensor],
    p: Tensor,
    need_dx: bool,
    need_du: list[bool],
    need_dv: bool,
    need_dbias: list[bool],
) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
    """As the reference, with `dp^T = diag(s) U^T dh^T`, one sum `dx` of all `dh W` and of `dp V`, and one `dV`."""
    ranks = [s.shape[0] for s in ss]
    rows = [as_matrix(dh) for dh in dhs]  # (M, N)
    dtype, of_factors = rows[0].dtype, vs[0].dtype
    weights = whole(weights, scales, us, vs, dtype) if need_dx else weights
    of_du = ss  # which may pass the range of float16
    us, ss, vs, (p,) = (lowered(each, dtype) for each in (us, ss, vs, [p]))
    dx, dv = rows[0].new_empty(0), rows[0].new_empty(0, dtype=of_factors)
    if need_dx or need_dv:
        dp = rows[0].new_empty(sum(ranks), rows[0].shape[0])  # (sum of R, M), as p
        for dh, u, s, part in zip(rows, us, ss, dp.split(ranks), strict=True):
            torch.mm(scaled(u, s), dh.t(), out=part)
    if need_dx:
        dx = times(rows[0], weights[0])
        for dh, weight in zip(rows[1:], weights[1:], strict=True):
            is_apart = weight.is_mkldnn or multiplies_in_float32(dh, most=0)
            dx = dx.add_(times(dh, weight)) if is_apart else dx.addmm_(dh, weight)
        dx = dx.addmm_(dp.t(), stacked(vs)).view(*dhs[0].shape[:-1], dx.shape[1])
    if need_dv:
        dv = (dp @ as_matrix(x)).to(of_factors)
    ps = p.split(ranks) if any(need_du) else [p] * len(ss)
    dus = [
        torch.mul((part @ dh).t(), s, out=u.new_empty(u.shape if needed else (0,), dtype=of_factors))
        if needed
        else dh.new_empty(0, dtype=of_factors)
        for dh, u, s, part, needed in zip(rows, us, of_du, ps, need_du, strict=True)
    ]
    dbiases = [dh.sum(0) if needed else dh.new_empty(0) for dh, needed in zip(rows, need_dbias, strict=True)]
    return dx, dus, dv, dbiases


def _siva_linear_shapes(
    x: Tensor, weights: list[Tensor], scales: Any, us: list[Tensor], ss: list[Tensor], vs: list[Tensor], *rest: Any
) -> tuple[list[Tensor], Tensor]:
    hs = [x.new_empty((*x.shape[:-1], u.shape[0])) for u in us]
    return hs, vs[0].new_empty((sum(v.shape[0] for v in vs), math.prod(x.shape[:-1])))


def _siva_linear_backward_shapes(
    dhs: list[Tensor], x: Tensor, weights: list[Tensor], scales: Any, us: list[Tensor], ss: list[Tensor], *rest: Any
) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
    vs, _, need_dx, need_du, need_dv, need_dbias = rest
    k = vs[0].shape[1]
    return (
        dhs[0].new_empty((*dhs[0].shape[:-1], k) if need_dx else (0,)),
        [u.new_empty(u.shape if needed else (0,)) for u, needed in zip(us, need_du, strict=True)],
        vs[0].new_empty((sum(v.shape[0] for v in vs), k) if need_dv else (0,)),
        [dh.new_empty((len(u),) if needed else (0,)) for dh, u, needed in zip(dhs, us, need_dbias, strict=True)],
    )


# layers that read the same x: each h (*, N), and all p^T in one (sum of R, M), which backward needs
define(
    "siva_linear",
    "(Tensor x, Tensor[] weights, Tensor?[] scales, Tensor[] us, Tensor[] ss, Tensor[] vs, Tensor?[] biases) "
    "-> (Tensor[], Tensor)",
    shapes=_siva_linear_shapes,
    reference=siva_linear_reference,
    aten=siva_linear_aten,
)


# dx (*, K), each du (N, R), all dv in one (sum of R, K), each dbias (N,)
define(
    "siva_linear_backward",
    "(Tensor[] dhs, Tensor x, Tensor[] weights, Tensor?[] scales, Tensor[] us, Tensor[] ss, Tensor[] vs, Tensor p, "
    "bool need_dx, bool[] need_du, bool need_dv, bool[] need_dbias) -> (Tensor, Tensor[], Tensor, Tensor[])",
    shapes=_siva_linear_backward_shapes,
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
    """The autograd formula of `fastpeft::siva_linear`: `apply(frozen, x, *weights, *us, *ss, *vs, *biases)`.

    `frozen` has for each layer the packs of its weight, or None, or its `Scales`: the weight is codes then. Codes are
    saved for backward as weights are; scales, which nothing changes, are held. Not one of `register_autograd`, which
    takes twice as long. Weights have any dtype and get no gradient, and s gets none; `functional.siva_linear` refuses
    those that require one.
    """

    @staticmethod
    def forward(ctx: Any, frozen: Sequence[Frozen], x: Tensor, *operands: Any) -> tuple[Tensor, ...]:
        layers = len(frozen)
        weights, us, ss, vs, biases = split(operands, layers)
        factors, scales = products_of(weights, frozen, x)
        hs, p = torch.ops.fastpeft.siva_linear.default(x, factors, scales, us, ss, vs, biases)
        needs = ctx.needs_input_grad
        ctx.frozen = frozen
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            x if True in needs[2 + 3 * layers : 2 + 4 * layers] else None,  # for dV
            p if True in needs[2 + layers : 2 + 2 * layers] else None,  # for dU
            *(weight if each.is_mkldnn else each for weight, each in zip(weights, factors, strict=True)),
            *operands[layers : 4 * layers],
        )
        return tuple(hs)

    @staticmethod
    def backward(ctx: Any, *dhs: Tensor | None) -> tuple[Tensor | None, ...]:
        check_first_derivative("siva_linear")
        used = [i for i, dh in enumerate(dhs) if dh is not None]
        gradients: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        if not used:
            return tuple(gradients)
        layers = len(dhs)
        x, p, *saved = ctx.saved_tensors
        _, need_dx, *needs = ctx.needs_input_grad
        of_layers = [dhs, ctx.frozen, *split(saved, layers), *split(needs, layers)]
        if len(used) < layers:
            if p is not None:
                parts = p.split([s.shape[0] for s in of_layers[4]])
                p = torch.cat([parts[i] for i in used])
            of_layers = [[each[i] for i in used] for each in of_layers]
        given, frozen, weights, us, ss, vs, _, need_du, _, need_dv, need_dbias = of_layers
        scales: list[Tensor | None] = [None] * len(used)
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
        )
        dvs = dv.split([v.shape[0] for v in vs]) if True in need_dv else [dv] * len(used)
        gradients[1] = dx if need_dx else None
        for place, values, needed in ((1, dus, need_du), (3, dvs, need_dv), (4, dbiases, need_dbias)):
            for i, value, need in zip(used, values, needed, strict=True):
                gradients[2 + place * layers + i] = value if need else None
        return tuple(gradients)
