"""Ops as the fewest fused ATen calls, with no temporary of the output's size: what a CPU runs.

Each product after the first is added to its target by the matrix product itself (`addmm_`), which saves writing it out,
reading it back and adding. Of a product with R rows or columns the layout decides: BLAS is up to seven times slower
where the narrow operand is not contiguous along the long side, so U is turned to `(R, N)` first, which costs little.
Forms and names are those of `fastpeft.reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastpeft.reference import as_matrix


def siva_linear(
    x: Tensor, weight: Tensor, u: Tensor, s: Tensor, v: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`h = x W^T + b`, then `h += p (U diag(s))^T` in place, with `p = x V^T`."""
    p = F.linear(as_matrix(x), v)  # (M, R)
    return _output(x, weight, u, s, p, bias), p.view(*x.shape[:-1], v.shape[0])


def siva_linear_backward(
    dh: Tensor,
    x: Tensor,
    weight: Tensor,
    u: Tensor,
    s: Tensor,
    v: Tensor,
    p: Tensor,
    need_dx: bool,
    need_du: bool,
    need_dv: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Those of a group of one layer."""
    p = as_matrix(p).t() if need_du else p
    dx, (du,), dv, (dbias,) = siva_linear_group_backward(
        [dh], x, [weight], [u], [s], [v], p, need_dx, [need_du], need_dv, [need_dbias]
    )
    return dx, du, dv, dbias


def siva_linear_group(
    x: Tensor,
    weights: list[Tensor],
    us: list[Tensor],
    ss: list[Tensor],
    vs: list[Tensor],
    biases: list[Tensor | None],
) -> tuple[list[Tensor], Tensor]:
    """`p^T = V x^T` for all layers at once; for each `h = x W^T + b`, then `h += p (U diag(s))^T` in place.

    Each layer has its product with W: one with all W below each other is no faster, and they would have to share a
    storage for it.
    """
    p = _stacked(vs) @ as_matrix(x).t()  # (sum of R, M)
    ps = p.split([s.shape[0] for s in ss])
    hs = [
        _output(x, weight, u, s, part.t(), bias)
        for weight, u, s, part, bias in zip(weights, us, ss, ps, biases, strict=True)
    ]
    return hs, p


def siva_linear_group_backward(
    dhs: list[Tensor],
    x: Tensor,
    weights: list[Tensor],
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
    dx, dv = (rows[0].new_empty(0) for _ in range(2))
    if need_dx or need_dv:
        dp = rows[0].new_empty(sum(ranks), rows[0].shape[0])  # (sum of R, M), as p
        for dh, u, s, part in zip(rows, us, ss, dp.split(ranks), strict=True):
            torch.mm(_scaled(u, s), dh.t(), out=part)
    if need_dx:
        dx = rows[0] @ weights[0]
        for dh, weight in zip(rows[1:], weights[1:], strict=True):
            dx.addmm_(dh, weight)
        dx = dx.addmm_(dp.t(), _stacked(vs)).view(*dhs[0].shape[:-1], dx.shape[1])
    if need_dv:
        dv = dp @ as_matrix(x)
    ps = p.split(ranks) if any(need_du) else [p] * len(ss)
    dus = [
        torch.mul((part @ dh).t(), s, out=u.new_empty(u.shape)) if needed else dh.new_empty(0)
        for dh, u, s, part, needed in zip(rows, us, ss, ps, need_du, strict=True)
    ]
    dbiases = [dh.sum(0) if needed else dh.new_empty(0) for dh, needed in zip(rows, need_dbias, strict=True)]
    return dx, dus, dv, dbiases


def _output(x: Tensor, weight: Tensor, u: Tensor, s: Tensor, p: Tensor, bias: Tensor | None) -> Tensor:
    """One h; no view of another tensor, for autograd allows no change in place of an output that is one."""
    h = x.new_empty(*x.shape[:-1], weight.shape[0])
    rows, target = as_matrix(x), as_matrix(h)
    if bias is None:
        torch.mm(rows, weight.t(), out=target)
    else:
        torch.addmm(bias, rows, weight.t(), out=target)
    target.addmm_(p, _scaled(u, s))
    return h


def _stacked(vs: list[Tensor]) -> Tensor:
    return vs[0] if len(vs) == 1 else torch.cat(vs)


def _scaled(u: Tensor, s: Tensor) -> Tensor:
    """`diag(s) U^T`, `(R, N)`, contiguous."""
    return torch.mul(u.t(), s[:, None], out=u.new_empty(s.shape[0], u.shape[0]))
