"""Ops as the fewest fused ATen calls, with no temporary of the output's size: what a CPU runs.

Each product after the first is added to its target by the matrix product itself (`addmm_`), which saves writing it out,
reading it back and adding. Forms and names are those of `fastpeft.reference`.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def siva_linear(
    x: Tensor, weight: Tensor, u: Tensor, s: Tensor, v: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`h = x W^T + b`, then `h += (p * s) U^T` in place, with `p = x V^T`."""
    rows = x.reshape(-1, weight.shape[1])  # (M, K)
    p = F.linear(rows, v)
    h = F.linear(rows, weight, bias).addmm_(p * s, u.t())
    return h.view(*x.shape[:-1], weight.shape[0]), p.view(*x.shape[:-1], v.shape[0])


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
    """As the reference, with `dx = dh W`, then `dx += dp V` in place."""
    dx, du, dv, dbias = (dh.new_empty(0) for _ in range(4))
    rows = dh.reshape(-1, dh.shape[-1])  # (M, N)
    if need_dx or need_dv:
        dp = (rows @ u) * s  # (M, R)
    if need_dx:
        dx = (rows @ weight).addmm_(dp, v).view(*dh.shape[:-1], weight.shape[1])
    if need_du:
        du = rows.t() @ (p.reshape(-1, s.shape[0]) * s)
    if need_dv:
        dv = dp.t() @ x.reshape(-1, weight.shape[1])
    if need_dbias:
        dbias = rows.sum(0)
    return dx, du, dv, dbias
