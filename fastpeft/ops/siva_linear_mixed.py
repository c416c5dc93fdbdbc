"""`fastpeft::siva_linear_mixed`: one layer of SiVA whose rows take the factors of different adapters.

Dimension letters: M rows of x (all leading dimensions together), K in_features, N out_features, R rank. Dtypes and
packs are as in `siva_linear`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastpeft.errors import FastpeftError
from fastpeft.ops.define import check_first_derivative, define
from fastpeft.ops.packing import Packs, dense, operand
from fastpeft.ops.products import as_matrix, lowered, product, raised, scaled, split, times


def siva_linear_mixed_reference(
    x: Tensor,
    weight: Tensor,
    us: list[Tensor],
    ss: list[Tensor],
    vs: list[Tensor],
    sizes: list[int],
    order: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    """`h[b] = x[b] W^T + ((x[b] V_i^T) * s_i) U_i^T + b` for the rows b of each i, and each `p_i^T = V_i x[b]^T`."""
    h, ps = F.linear(x, dense(weight), bias), []
    for rows, u, s, v in zip(_rows(x, sizes, order), us, ss, vs, strict=True):
        p = F.linear(raised(x[rows], v), v)
        h[rows] += F.linear(p * s, u)
        ps.append(as_matrix(p).t())
    return h, ps


def siva_linear_mixed_backward_reference(
    dh: Tensor,
    x: Tensor,
    weight: Tensor,
    us: list[Tensor],
    ss: list[Tensor],
    vs: list[Tensor],
    ps: list[Tensor],
    sizes: list[int],
    order: Tensor | None,
    need_dx: bool,
    need_du: list[bool],
    need_dv: list[bool],
    need_dbias: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """For each i the gradients of `siva_linear` over its rows alone; dx of all."""
    dx = dh @ (dense(weight).t() if weight.is_mkldnn else weight) if need_dx else dh.new_empty(0)
    dus, dvs = ([t.new_empty(0) for t in each] for each in (us, vs))
    for i, (rows, u, s, v) in enumerate(zip(_rows(dh, sizes, order), us, ss, vs, strict=True)):
        own = raised(as_matrix(dh[rows]), u)  # (M, N)
        dp = (own @ u) * s  # (M, R)
        if need_dx:
            dx[rows] += (dp @ v).view(dx[rows].shape)
        if need_du[i]:
            dus[i] = own.t() @ (ps[i].t() * s)
        if need_dv[i]:
            dvs[i] = dp.t() @ raised(as_matrix(x[rows]), v)
    return dx, dus, dvs, as_matrix(dh).sum(0) if need_dbias else dh.new_empty(0)


def _rows(x: Tensor, sizes: list[int], order: Tensor | None) -> tuple[Tensor, ...]:
    """The indices of the rows of x that take each of the factors."""
    return (torch.arange(len(x), device=x.device) if order is None else order).split(sizes)


def siva_linear_mixed_aten(
    x: Tensor,
    weight: Tensor,
    us: list[Tensor],
    ss: list[Tensor],
    vs: list[Tensor],
    sizes: list[int],
    order: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    """`h = x W^T + b` over all rows, then `h += p (U diag(s))^T` in place on the rows of each adapter, a slice of h.

    Rows in another order are brought into it before, and h back after: two copies, and none where they stand in it.
    """
    _check_order(x, order)
    x = _sorted(x, order)
    dtypes = [v.dtype for v in vs]
    us, ss, vs = (lowered(each, x.dtype) for each in (us, ss, vs))
    h, ps = product(x, weight, bias), []
    for part, target, u, s, v in zip(x.split(sizes), h.split(sizes), us, ss, vs, strict=True):
        ps.append(v @ as_matrix(part).t())  # (R, M)
        as_matrix(target).addmm_(ps[-1].t(), scaled(u, s))
    return _unsorted(h, order), [p.to(dtype) for p, dtype in zip(ps, dtypes, strict=True)]


def siva_linear_mixed_backward_aten(
    dh: Tensor,
    x: Tensor,
    weight: Tensor,
    us: list[Tensor],
    ss: list[Tensor],
    vs: list[Tensor],
    ps: list[Tensor],
    sizes: list[int],
    order: Tensor | None,
    need_dx: bool,
    need_du: list[bool],
    need_dv: list[bool],
    need_dbias: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """As the reference on sorted rows, with `dp^T = diag(s) U^T dh^T`, and `dx = dh W`, then `dx += dp V` in place."""
    dh = _sorted(dh, order)
    x = _sorted(x, order) if any(need_dv) else dh  # of which no row is read then
    rows = as_matrix(dh)  # (M, N)
    dtypes = [v.dtype for v in vs]
    scales = ss  # of dU, which may pass the range of float16
    us, ss, vs, ps = (lowered(each, dh.dtype) for each in (us, ss, vs, ps))
    dx = times(rows, weight).view(*dh.shape[:-1], vs[0].shape[1]) if need_dx else dh
    dus, dvs = ([t.new_empty(0, dtype=of) for t, of in zip(each, dtypes, strict=True)] for each in (us, vs))
    parts = zip(dh.split(sizes), x.split(sizes), dx.split(sizes), us, ss, vs, ps, strict=True)
    for i, (of_h, of_x, target, u, s, v, p) in enumerate(parts):
        own = as_matrix(of_h)
        if need_dx or need_dv[i]:
            dp = scaled(u, s) @ own.t()  # (R, M)
        if need_dx:
            as_matrix(target).addmm_(dp.t(), v)
        if need_du[i]:
            dus[i] = torch.mul((p @ own).t(), scales[i], out=u.new_empty(u.shape, dtype=dtypes[i]))
        if need_dv[i]:
            dvs[i] = (dp @ as_matrix(of_x)).to(dtypes[i])
    dbias = rows.sum(0) if need_dbias else dh.new_empty(0)
    return _unsorted(dx, order) if need_dx else dh.new_empty(0), dus, dvs, dbias


def _check_order(x: Tensor, order: Tensor | None) -> None:
    if order is not None and order.is_cpu and sorted(order.tolist()) != list(range(len(x))):
        raise FastpeftError(
            f"siva_linear_mixed: order is {order.tolist()}, so some rows of h would stay unwritten; allowed is each of "
            f"0 to {len(x) - 1} once. Give the permutation that sorts the rows by adapter."
        )


def _sorted(x: Tensor, order: Tensor | None) -> Tensor:
    return x if order is None else x.index_select(0, order)


def _unsorted(x: Tensor, order: Tensor | None) -> Tensor:
    return x if order is None else torch.empty_like(x).index_copy_(0, order, x)


def _siva_linear_mixed_shapes(
    x: Tensor, weight: Tensor, us: list[Tensor], ss: list[Tensor], vs: list[Tensor], sizes: list[int], *rest: Any
) -> tuple[Tensor, list[Tensor]]:
    tokens = math.prod(x.shape[1:-1])
    ps = [v.new_empty((v.shape[0], size * tokens)) for v, size in zip(vs, sizes, strict=True)]
    return x.new_empty((*x.shape[:-1], weight.shape[0])), ps


def _siva_linear_mixed_backward_shapes(
    dh: Tensor, x: Tensor, weight: Tensor, us: list[Tensor], ss: list[Tensor], vs: list[Tensor], *rest: Any
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    *_, need_dx, need_du, need_dv, need_dbias = rest
    return (
        dh.new_empty((*dh.shape[:-1], vs[0].shape[1]) if need_dx else (0,)),
        [u.new_empty(u.shape if needed else (0,)) for u, needed in zip(us, need_du, strict=True)],
        [v.new_empty(v.shape if needed else (0,)) for v, needed in zip(vs, need_dv, strict=True)],
        dh.new_empty((dh.shape[-1],) if need_dbias else (0,)),
    )


# rows of x that take different factors: `sizes[i]` of them take the i-th, in the order that the permutation `order`
# (B,) brings them to, None where they stand in it. h (B, *, N) in the order of x, and each p^T (R, M)
define(
    "siva_linear_mixed",
    "(Tensor x, Tensor weight, Tensor[] us, Tensor[] ss, Tensor[] vs, int[] sizes, Tensor? order, Tensor? bias) -> "
    "(Tensor, Tensor[])",
    shapes=_siva_linear_mixed_shapes,
    reference=siva_linear_mixed_reference,
    aten=siva_linear_mixed_aten,
)


# dx (B, *, K), each du (N, R), each dv (R, K), dbias (N,)
define(
    "siva_linear_mixed_backward",
    "(Tensor dh, Tensor x, Tensor weight, Tensor[] us, Tensor[] ss, Tensor[] vs, Tensor[] ps, int[] sizes, Tensor? "
    "order, bool need_dx, bool[] need_du, bool[] need_dv, bool need_dbias) -> (Tensor, Tensor[], Tensor[], Tensor)",
    shapes=_siva_linear_mixed_backward_shapes,
    reference=siva_linear_mixed_backward_reference,
    aten=siva_linear_mixed_backward_aten,
)


class SivaLinearMixed(torch.autograd.Function):
    """The formula of `fastpeft::siva_linear_mixed`: `apply(packs, sizes, order, x, weight, bias, *us, *ss, *vs)`.

    A function for the reason of `SivaLinear`; s and the weight get no gradient here either.
    """

    @staticmethod
    def forward(
        ctx: Any,
        packs: Packs | None,
        sizes: list[int],
        order: Tensor | None,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *factors: Any,
    ) -> Tensor:
        us, ss, vs = split(factors, len(sizes))
        factor = operand(weight, packs, x)
        try:
            h, ps = torch.ops.fastpeft.siva_linear_mixed(x, factor, us, ss, vs, sizes, order, bias)
        except RuntimeError:
            _check_order(x, order)  # what the compiled module raises is no FastpeftError
            raise
        need_du, _, need_dv = split(ctx.needs_input_grad[6:], len(sizes))
        # x is needed for dV and a p for its dU alone; what no gradient needs is not kept
        kept = [p if needed else None for p, needed in zip(ps, need_du, strict=True)]
        ctx.sizes, ctx.packs = sizes, packs
        weight = weight if factor.is_mkldnn else factor
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if any(need_dv) else None, order, weight, *factors, *kept)
        return h

    @staticmethod
    def backward(ctx: Any, dh: Tensor | None) -> tuple[Tensor | None, ...]:
        check_first_derivative("siva_linear_mixed")
        if dh is None:
            return (None,) * len(ctx.needs_input_grad)
        x, order, weight, *rest = ctx.saved_tensors
        us, ss, vs, ps = split(rest, len(ctx.sizes))
        _, _, _, need_dx, _, need_dbias, *needs = ctx.needs_input_grad
        if need_dx:
            weight = operand(weight, ctx.packs, dh, transposed=True)
        need_du, need_ds, need_dv = split(needs, len(ctx.sizes))
        empty = dh.new_empty(0)
        dx, dus, dvs, dbias = torch.ops.fastpeft.siva_linear_mixed_backward(
            dh,
            x if x is not None else empty,
            weight,
            us,
            ss,
            vs,
            [p if p is not None else empty for p in ps],
            ctx.sizes,
            order,
            need_dx,
            need_du,
            need_dv,
            need_dbias,
        )
        return (
            *(None, None, None, dx if need_dx else None, None, dbias if need_dbias else None),
            *(du if needed else None for du, needed in zip(dus, need_du, strict=True)),
            *(None for _ in need_ds),
            *(dv if needed else None for dv, needed in zip(dvs, need_dv, strict=True)),
        )
