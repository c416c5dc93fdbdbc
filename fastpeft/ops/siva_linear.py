"""`fastpeft::siva_linear`: a linear layer whose weight is a frozen part and a trained product of rank R.

Dimension letters: M rows of x (all leading dimensions together), K in_features, N out_features, R rank.

x, weight, h and bias have one dtype, and their gradients have it. The factors u, s and v have that dtype or
float32; p and the factors' gradients have theirs. On a CPU the weight may be a pack of it (`fastpeft.ops.packing`), in
backward one of its transpose.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastpeft.ops.define import check_first_derivative, define
from fastpeft.ops.packing import Packs, dense, operand
from fastpeft.ops.products import as_matrix, lowered, output, raised
from fastpeft.ops.siva_linear_group import siva_linear_group_backward_aten


def siva_linear_reference(
    x: Tensor, weight: Tensor, u: Tensor, s: Tensor, v: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`h = x W^T + ((x V^T) * s) U^T + b`, and `p = x V^T`."""
    p = F.linear(raised(x, v), v)
    h = F.linear(x, dense(weight), bias) + F.linear(p * s, u)
    return h.to(x.dtype), p


def siva_linear_backward_reference(
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
    """Gradients of `siva_linear`, with `dp = (dh U) * s`:

    `dx = dh W + dp V`, `dU = dh^T (p * s)`, `dV = dp^T x`, `db = sum of dh over rows`.
    """
    dx, du, dv, dbias = (like.new_empty(0) for like in (dh, u, v, dh))
    rows = as_matrix(dh)  # (M, N)
    wide = raised(rows, u)
    if need_dx or need_dv:
        dp = (wide @ u) * s  # (M, R)
    if need_dx:
        product = rows @ (dense(weight).t() if weight.is_mkldnn else weight)
        dx = (product + dp @ v).to(dh.dtype).view(*dh.shape[:-1], v.shape[1])
    if need_du:
        du = wide.t() @ (as_matrix(p) * s)
    if need_dv:
        dv = dp.t() @ raised(as_matrix(x), v)
    if need_dbias:
        dbias = rows.sum(0)
    return dx, du, dv, dbias


def siva_linear_aten(
    x: Tensor, weight: Tensor, u: Tensor, s: Tensor, v: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`h = x W^T + b`, then `h += p (U diag(s))^T` in place, with `p = x V^T`."""
    dtype = v.dtype
    u, s, v = lowered((u, s, v), x.dtype)
    p = F.linear(as_matrix(x), v)  # (M, R)
    return output(x, weight, u, s, p, bias), p.to(dtype).view(*x.shape[:-1], v.shape[0])


def siva_linear_backward_aten(
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
    """The gradients of a group of one layer."""
    p = as_matrix(p).t() if need_du else p
    dx, (du,), dv, (dbias,) = siva_linear_group_backward_aten(
        [dh], x, [weight], [u], [s], [v], p, need_dx, [need_du], need_dv, [need_dbias]
    )
    return dx, du, dv, dbias


def siva_linear_shapes(
    x: Tensor, weight: Tensor, u: Tensor, s: Tensor, v: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    return x.new_empty((*x.shape[:-1], weight.shape[0])), v.new_empty((*x.shape[:-1], v.shape[0]))


def siva_linear_backward_shapes(
    dh: Tensor, x: Tensor, weight: Tensor, u: Tensor, s: Tensor, v: Tensor, p: Tensor, *needs: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need_dx, need_du, need_dv, need_dbias = needs
    return (
        dh.new_empty((*dh.shape[:-1], v.shape[1]) if need_dx else (0,)),
        u.new_empty(u.shape if need_du else (0,)),
        v.new_empty(v.shape if need_dv else (0,)),
        dh.new_empty((u.shape[0],) if need_dbias else (0,)),
    )


# h (*, N) and the projection p = x V^T (*, R), which backward needs
define(
    "siva_linear",
    "(Tensor x, Tensor weight, Tensor u, Tensor s, Tensor v, Tensor? bias) -> (Tensor, Tensor)",
    shapes=siva_linear_shapes,
    reference=siva_linear_reference,
    aten=siva_linear_aten,
)


# dx (*, K), du (N, R), dv (R, K), dbias (N,); an output that is not needed is a tensor of 0 elements
define(
    "siva_linear_backward",
    "(Tensor dh, Tensor x, Tensor weight, Tensor u, Tensor s, Tensor v, Tensor p, bool need_dx, bool need_du, "
    "bool need_dv, bool need_dbias) -> (Tensor, Tensor, Tensor, Tensor)",
    shapes=siva_linear_backward_shapes,
    reference=siva_linear_backward_reference,
    aten=siva_linear_backward_aten,
)


class SivaLinear(torch.autograd.Function):
    """The autograd formula of `fastpeft::siva_linear`: `apply(x, weight, u, s, v, bias, packs)`.

    Not one of `register_autograd`, which takes twice as long. The weight has any dtype and gets no gradient, and s gets
    none; `functional.siva_linear` refuses those that require one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        u: Tensor,
        s: Tensor,
        v: Tensor,
        bias: Tensor | None,
        packs: Packs | None,
    ) -> Tensor:
        factor = operand(weight, packs, x)
        h, p = torch.ops.fastpeft.siva_linear(x, factor, u, s, v, bias)
        _, _, need_du, _, need_dv, _, _ = ctx.needs_input_grad
        ctx.packs = packs
        ctx.set_materialize_grads(False)
        # x is needed for dV and p for dU alone; what no gradient needs is not kept
        kept = weight if factor.is_mkldnn else factor
        ctx.save_for_backward(x if need_dv else None, kept, u, s, v, p if need_du else None)
        return h

    @staticmethod
    def backward(ctx: Any, dh: Tensor | None) -> tuple[Tensor | None, ...]:
        check_first_derivative("siva_linear")
        if dh is None:
            return (None,) * 7
        x, weight, u, s, v, p = ctx.saved_tensors
        need_dx, _, need_du, _, need_dv, need_dbias, _ = ctx.needs_input_grad
        if need_dx:
            weight = operand(weight, ctx.packs, dh, transposed=True)
        empty = dh.new_empty(0)
        dx, du, dv, dbias = torch.ops.fastpeft.siva_linear_backward(
            dh,
            empty if x is None else x,
            weight,
            u,
            s,
            v,
            empty if p is None else p,
            need_dx,
            need_du,
            need_dv,
            need_dbias,
        )
        return (
            dx if need_dx else None,
            None,
            du if need_du else None,
            None,
            dv if need_dv else None,
            dbias if need_dbias else None,
            None,
        )
