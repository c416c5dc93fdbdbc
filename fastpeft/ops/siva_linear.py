"""`fastpeft::siva_linear`: a linear layer whose weight is a frozen part and a trained product of rank R.

Dimension letters: M rows of x (all leading dimensions together), K in_features, N out_features, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastpeft.ops.define import NAMESPACE, define
from fastpeft.ops.products import as_matrix, output
from fastpeft.ops.siva_linear_group import siva_linear_group_backward_aten


def siva_linear_reference(
    x: Tensor, weight: Tensor, u: Tensor, s: Tensor, v: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`h = x W^T + ((x V^T) * s) U^T + b`, and `p = x V^T`."""
    p = F.linear(x, v)
    h = F.linear(x, weight, bias) + F.linear(p * s, u)
    return h, p


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
    dx, du, dv, dbias = (dh.new_empty(0) for _ in range(4))
    rows = as_matrix(dh)  # (M, N)
    if need_dx or need_dv:
        dp = (rows @ u) * s  # (M, R)
    if need_dx:
        dx = (rows @ weight + dp @ v).view(*dh.shape[:-1], weight.shape[1])
    if need_du:
        du = rows.t() @ (as_matrix(p) * s)
    if need_dv:
        dv = dp.t() @ as_matrix(x)
    if need_dbias:
        dbias = rows.sum(0)
    return dx, du, dv, dbias


def siva_linear_aten(
    x: Tensor, weight: Tensor, u: Tensor, s: Tensor, v: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`h = x W^T + b`, then `h += p (U diag(s))^T` in place, with `p = x V^T`."""
    p = F.linear(as_matrix(x), v)  # (M, R)
    return output(x, weight, u, s, p, bias), p.view(*x.shape[:-1], v.shape[0])


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
    """Those of a group of one layer."""
    p = as_matrix(p).t() if need_du else p
    dx, (du,), dv, (dbias,) = siva_linear_group_backward_aten(
        [dh], x, [weight], [u], [s], [v], p, need_dx, [need_du], need_dv, [need_dbias]
    )
    return dx, du, dv, dbias


def _siva_linear_shapes(
    x: Tensor, weight: Tensor, u: Tensor, s: Tensor, v: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    return x.new_empty((*x.shape[:-1], weight.shape[0])), x.new_empty((*x.shape[:-1], v.shape[0]))


def _siva_linear_backward_shapes(
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
    return (
        x.new_empty(x.shape if need_dx else (0,)),
        x.new_empty(u.shape if need_du else (0,)),
        x.new_empty(v.shape if need_dv else (0,)),
        x.new_empty((weight.shape[0],) if need_dbias else (0,)),
    )


# h (*, N) and the projection p = x V^T (*, R), which backward needs
define(
    "siva_linear",
    "(Tensor x, Tensor weight, Tensor u, Tensor s, Tensor v, Tensor? bias) -> (Tensor, Tensor)",
    shapes=_siva_linear_shapes,
    reference=siva_linear_reference,
    aten=siva_linear_aten,
)


# dx (*, K), du (N, R), dv (R, K), dbias (N,); an output that is not needed is a tensor of 0 elements
define(
    "siva_linear_backward",
    "(Tensor dh, Tensor x, Tensor weight, Tensor u, Tensor s, Tensor v, Tensor p, bool need_dx, bool need_du, "
    "bool need_dv, bool need_dbias) -> (Tensor, Tensor, Tensor, Tensor)",
    shapes=_siva_linear_backward_shapes,
    reference=siva_linear_backward_reference,
    aten=siva_linear_backward_aten,
)


def _siva_linear_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, u, s, v, _ = inputs
    p = output[1]
    ctx.mark_non_differentiable(p)
    ctx.set_materialize_grads(False)
    # torch appends one input of its own
    _, ctx.need_dweight, need_du, ctx.need_ds, need_dv, _ = ctx.needs_input_grad[: len(inputs)]
    # x is needed for dV and p for dU alone; what no gradient needs is not kept
    ctx.save_for_backward(x if need_dv else None, weight, u, s, v, p if need_du else None)


def _siva_linear_gradients(ctx: Any, dh: Tensor | None, _dp: Tensor | None) -> tuple[Tensor | None, ...]:
    if ctx.need_dweight or ctx.need_ds:
        # functional.siva_linear refuses this with the reason; a silent None would be a wrong gradient
        raise RuntimeError("fastpeft::siva_linear has no gradient for weight and s: both are frozen by definition")
    if dh is None:
        return None, None, None, None, None, None
    x, weight, u, s, v, p = ctx.saved_tensors
    need_dx, _, need_du, _, need_dv, need_dbias = ctx.needs_input_grad[:6]
    empty = dh.new_empty(0)
    dx, du, dv, dbias = torch.ops.fastpeft.siva_linear_backward(
        dh,
        x if x is not None else empty,
        weight,
        u,
        s,
        v,
        p if p is not None else empty,
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
    )


torch.library.register_autograd(
    f"{NAMESPACE}::siva_linear", _siva_linear_gradients, setup_context=_siva_linear_setup_context
)
