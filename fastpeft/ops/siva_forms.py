"""The forms of `fastpeft::siva_linear` that need nothing but PyTorch: its reference, and fused ATen calls.

`siva_linear` has the formula, the letters and the dtypes. Factors i are those of layer i or, with `sizes`, of adapter
i: then there is one layer, `sizes[i]` rows of the batch take the factors i, and the permutation `order` brings the rows
into the order of the adapters (None: they stand in it).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastpeft.errors import FastpeftError
from fastpeft.ops.packing import dense
from fastpeft.ops.products import as_matrix, lowered, multiplies_in_float32, product, raised, scaled, times
from fastpeft.ops.quantised_linear import dequantise


def whole(
    weights: list[Tensor], scales: list[Tensor | None], us: list[Tensor], vs: list[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """The weights, those that are quantised dequantised."""
    if not any(each is not None for each in scales):
        return weights
    return [
        weight if each is None else dequantise(weight, each, (u.shape[0], v.shape[1]), dtype)
        for weight, each, u, v in zip(weights, scales, us, vs, strict=False)
    ]


def p_shape(x: Tensor, factors: Sequence[Tensor], sizes: Sequence[int]) -> tuple[int, ...]:
    """The shape of p^T, for s `(R,)` or V `(R, K)`: `(sum of R, M)`; of adapters one after the other, `(R, M)` each."""
    ranks = [factor.shape[0] for factor in factors]
    if not sizes:
        return sum(ranks), math.prod(x.shape[:-1])
    return (math.prod(x.shape[1:-1]) * sum(size * rank for size, rank in zip(sizes, ranks, strict=True)),)


def parts_of(p: Tensor, x: Tensor, ss: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    """Each `p_i^T`, `(R_i, M_i)`, in a tensor of `p_shape`; x may be dh."""
    ranks = [s.shape[0] for s in ss]
    if not sizes:
        return list(p.split(ranks))
    rows = [size * math.prod(x.shape[1:-1]) for size in sizes]
    parts = p.split([rank * m for rank, m in zip(ranks, rows, strict=True)])
    return [part.view(rank, m) for part, rank, m in zip(parts, ranks, rows, strict=True)]


def siva_linear_reference(
    x: Tensor,
    weights: list[Tensor],
    scales: list[Tensor | None],
    us: list[Tensor],
    ss: list[Tensor],
    vs: list[Tensor],
    biases: list[Tensor | None],
    sizes: Sequence[int] = (),
    order: Tensor | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Each `h = x W^T + ((x V^T) * s) U^T + b`, and each `p^T = V x^T`, as `p_shape` says."""
    weights = whole(weights, scales, us, vs, x.dtype)
    xs = _sorted(x, order).split(list(sizes)) if sizes else [x] * len(us)
    ps = [F.linear(raised(each, v), v) for each, v in zip(xs, vs, strict=True)]
    terms = [F.linear(p * s, u) for p, s, u in zip(ps, ss, us, strict=True)]
    if sizes:
        terms = [_unsorted(torch.cat(terms), order)]
    hs = [
        (F.linear(x, dense(weight), bias) + term).to(x.dtype)
        for weight, bias, term in zip(weights, biases, terms, strict=True)
    ]
    parts = [as_matrix(p).t() for p in ps]
    return hs, torch.cat([part.reshape(-1) for part in parts] if sizes else parts)


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
    sizes: Sequence[int] = (),
    order: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
    """Gradients of `siva_linear`, with `dp = (dh U) * s` for each of the factors:

    `dx = sum of dh W + dp V`, `dU = dh^T (p * s)`, all `dV = dp^T x` below each other, `db = sum of dh over rows`.
    """
    own = _sorted(dhs[0], order).split(list(sizes)) if sizes else dhs
    wides = [raised(as_matrix(dh), u) for dh, u in zip(own, us, strict=True)]  # (M, N)
    dps = [(wide @ u) * s for wide, u, s in zip(wides, us, ss, strict=True)]  # (M, R)
    dx, dv = dhs[0].new_empty(0), vs[0].new_empty(0)
    if need_dx:
        weights = whole(weights, scales, us, vs, dhs[0].dtype)
        terms = [(dp @ v).view(*dh.shape[:-1], v.shape[1]) for dp, v, dh in zip(dps, vs, own, strict=True)]
        if sizes:
            terms = [_unsorted(torch.cat(terms), order)]
        dxs = [
            (dh @ (dense(weight).t() if weight.is_mkldnn else weight) + term).to(dh.dtype)
            for dh, weight, term in zip(dhs, weights, terms, strict=True)
        ]
        dx = sum(dxs[1:], dxs[0])
    if need_dv:
        xs = _sorted(x, order).split(list(sizes)) if sizes else [x] * len(us)
        dv = torch.cat([dp.t() @ raised(as_matrix(each), dp) for dp, each in zip(dps, xs, strict=True)])
    parts = parts_of(p, dhs[0], ss, sizes) if any(need_du) else [p] * len(ss)
    dus = [
        wide.t() @ (part.t() * s) if needed else wide.new_empty(0)
        for wide, part, s, needed in zip(wides, parts, ss, need_du, strict=True)
    ]
    dbiases = [as_matrix(dh).sum(0) if need else dh.new_empty(0) for dh, need in zip(dhs, need_dbias, strict=True)]
    return dx, dus, dv, dbiases


def siva_linear_aten(
    x: Tensor,
    weights: list[Tensor],
    scales: list[Tensor | None],
    us: list[Tensor],
    ss: list[Tensor],
    vs: list[Tensor],
    biases: list[Tensor | None],
    sizes: Sequence[int] = (),
    order: Tensor | None = None,
) -> tuple[list[Tensor], Tensor]:
    """`p^T = V x^T` for all layers at once; for each `h = x W^T + b`, then `h += p (U diag(s))^T` in place.

    Each layer has its product with W: one with all W below each other is no faster, and they would have to share a
    storage for it. The rows of an adapter are a slice of h. Rows in another order are brought into it before, and h
    back after: two copies.
    """
    check_order(x, order)
    dtype = vs[0].dtype
    weights = whole(weights, scales, us, vs, x.dtype)
    us, ss, vs = (lowered(each, x.dtype) for each in (us, ss, vs))
    x = _sorted(x, order)
    if sizes:
        p = x.new_empty(p_shape(x, ss, sizes))
        for rows, v, part in zip(x.split(list(sizes)), vs, parts_of(p, x, ss, sizes), strict=True):
            torch.mm(v, as_matrix(rows).t(), out=part)
    else:
        p = _stacked(vs) @ as_matrix(x).t()  # (sum of R, M)
    hs = [product(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    targets = hs[0].split(list(sizes)) if sizes else hs
    for target, u, s, part in zip(targets, us, ss, parts_of(p, x, ss, sizes), strict=True):
        as_matrix(target).addmm_(part.t(), scaled(u, s))
    return [_unsorted(h, order) for h in hs], p.to(dtype)


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
    sizes: Sequence[int] = (),
    order: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
    """As the reference, with `dp^T = diag(s) U^T dh^T`, one sum `dx` of all `dh W` and of `dp V`, and one `dV`."""
    dhs = [_sorted(dh, order) for dh in dhs]
    rows = [as_matrix(dh) for dh in dhs]  # (M, N)
    own = [as_matrix(dh) for dh in dhs[0].split(list(sizes))] if sizes else rows
    dtype, of_factors = rows[0].dtype, vs[0].dtype
    of_du = ss  # which may pass the range of float16
    weights = whole(weights, scales, us, vs, dtype) if need_dx else weights
    us, ss, vs, (p,) = (lowered(each, dtype) for each in (us, ss, vs, [p]))
    dx, dv, dps = rows[0].new_empty(0), rows[0].new_empty(0, dtype=of_factors), []
    if need_dx or need_dv:
        dp = dx.new_empty(p_shape(dhs[0], ss, sizes))
        dps = parts_of(dp, dhs[0], ss, sizes)
        for dh, u, s, part in zip(own, us, ss, dps, strict=True):
            torch.mm(scaled(u, s), dh.t(), out=part)
    if need_dx:
        dx = times(rows[0], weights[0])
        for dh, weight in zip(rows[1:], weights[1:], strict=True):
            is_apart = weight.is_mkldnn or multiplies_in_float32(dh, most=0)
            dx = dx.add_(times(dh, weight)) if is_apart else dx.addmm_(dh, weight)
        if not sizes:
            dx = dx.addmm_(dp.t(), _stacked(vs))
        for target, part, v in zip(dx.split([len(dh) for dh in own]), dps, vs, strict=True) if sizes else ():
            target.addmm_(part.t(), v)
        dx = _unsorted(dx.view(*dhs[0].shape[:-1], dx.shape[1]), order)
    if need_dv and sizes:
        xs = _sorted(x, order).split(list(sizes))
        dv = torch.cat([part @ as_matrix(each) for part, each in zip(dps, xs, strict=True)]).to(of_factors)
    elif need_dv:
        dv = (dp @ as_matrix(x)).to(of_factors)
    parts = parts_of(p, dhs[0], ss, sizes) if any(need_du) else [p] * len(ss)
    dus = [
        torch.mul((part @ dh).t(), s, out=u.new_empty(u.shape if needed else (0,), dtype=of_factors))
        if needed
        else dh.new_empty(0, dtype=of_factors)
        for dh, u, s, part, needed in zip(own, us, of_du, parts, need_du, strict=True)
    ]
    dbiases = [dh.sum(0) if needed else dh.new_empty(0) for dh, needed in zip(rows, need_dbias, strict=True)]
    return dx, dus, dv, dbiases


def check_order(x: Tensor, order: Tensor | None) -> None:
    if order is not None and order.is_cpu and sorted(order.tolist()) != list(range(len(x))):
        raise FastpeftError(
            f"siva_linear_mixed: order is {order.tolist()}, so some rows of h would stay unwritten; allowed is each of "
            f"0 to {len(x) - 1} once. Give the permutation that sorts the rows by adapter."
        )


def _stacked(vs: list[Tensor]) -> Tensor:
    return vs[0] if len(vs) == 1 else torch.cat(vs)


def _sorted(x: Tensor, order: Tensor | None) -> Tensor:
    return x if order is None else x.index_select(0, order)


def _unsorted(x: Tensor, order: Tensor | None) -> Tensor:
    return x if order is None else torch.empty_like(x).index_copy_(0, order, x)
