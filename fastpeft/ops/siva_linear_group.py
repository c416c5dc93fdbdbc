"""`fastpeft::siva_linear_group`: layers of SiVA that read the same x, in one call.

Dimension letters: M rows of x (all leading dimensions together), K in_features, N out_features, R rank. Dtypes and
packs are as in `siva_linear`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastpeft.ops.define import check_first_derivative, define
from fastpeft.ops.packing import Packs, operand
from fastpeft.ops.products import as_matrix, lowered, multiplies_in_float32, output, scaled, split, stacked, times


def siva_linear_group_reference(
    x: Tensor,
    weights: list[Tensor],
    us: list[Tensor],
    ss: list[Tensor],
    vs: list[Tensor],
    biases: list[Tensor | None],
) -> tuple[list[Tensor], Tensor]:
    """Layers that read the same x, each by itself: their outputs, and all `p^T = V x^T` in one `(sum of R, M)`.

    Each layer runs on what `siva_linear` runs on: a device without a grouped kernel keeps its kernel of one layer.
    """
    layers = zip(weights, us, ss, vs, biases, strict=True)
    found = [torch.ops.fastpeft.siva_linear(x, *operands) for operands in layers]
    return [h for h, _ in found], torch.cat([as_matrix(p).t() for _, p in found])


def siva_linear_group_backward_reference(
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
    """Gradients of each layer by itself; those of x are added up, those of V stand below each other."""
    ranks = [s.shape[0] for s in ss]
    ps = [part.t() for part in p.split(ranks)] if any(need_du) else [p] * len(ss)
    found = [
        torch.ops.fastpeft.siva_linear_backward(dh, x, *operands, need_dx, of_u, need_dv, of_bias)
        for dh, *operands, of_u, of_bias in zip(dhs, weights, us, ss, vs, ps, need_du, need_dbias, strict=True)
    ]
    dxs, dus, dvs, dbiases = zip(*found, strict=True)
    return sum(dxs[1:], dxs[0]), list(dus), torch.cat(dvs), list(dbiases)


def siva_linear_group_aten(
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
    dtype = vs[0].dtype
    us, ss, vs = (lowered(each, x.dtype) for each in (us, ss, vs))
    p = stacked(vs) @ as_matrix(x).t()  # (sum of R, M)
    ps = p.split([s.shape[0] for s in ss])
    hs = [
        output(x, weight, u, s, part.t(), bias)
        for weight, u, s, part, bias in zip(weights, us, ss, ps, biases, strict=True)
    ]
    return hs, p.to(dtype)


def siva_linear_group_backward_aten(
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
    dtype, of_factors = rows[0].dtype, vs[0].dtype
    scales = ss  # of dU, which may pass the range of float16
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
        for dh, u, s, part, needed in zip(rows, us, scales, ps, need_du, strict=True)
    ]
    dbiases = [dh.sum(0) if needed else dh.new_empty(0) for dh, needed in zip(rows, need_dbias, strict=True)]
    return dx, dus, dv, dbiases


def _siva_linear_group_shapes(
    x: Tensor, weights: list[Tensor], us: list[Tensor], ss: list[Tensor], vs: list[Tensor], *rest: Any
) -> tuple[list[Tensor], Tensor]:
    hs = [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights]
    return hs, vs[0].new_empty((sum(v.shape[0] for v in vs), math.prod(x.shape[:-1])))


def _siva_linear_group_backward_shapes(
    dhs: list[Tensor], x: Tensor, weights: list[Tensor], us: list[Tensor], ss: list[Tensor], *rest: Any
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
    "siva_linear_group",
    "(Tensor x, Tensor[] weights, Tensor[] us, Tensor[] ss, Tensor[] vs, Tensor?[] biases) -> (Tensor[], Tensor)",
    shapes=_siva_linear_group_shapes,
    reference=siva_linear_group_reference,
    aten=siva_linear_group_aten,
)


# dx (*, K), each du (N, R), all dv in one (sum of R, K), each dbias (N,)
define(
    "siva_linear_group_backward",
    "(Tensor[] dhs, Tensor x, Tensor[] weights, Tensor[] us, Tensor[] ss, Tensor[] vs, Tensor p, bool need_dx, "
    "bool[] need_du, bool need_dv, bool[] need_dbias) -> (Tensor, Tensor[], Tensor, Tensor[])",
    shapes=_siva_linear_group_backward_shapes,
    reference=siva_linear_group_backward_reference,
    aten=siva_linear_group_backward_aten,
)


class SivaLinearGroup(torch.autograd.Function):
    """The autograd formula of `fastpeft::siva_linear_group`: `apply(packs, x, *weights, *us, *ss, *vs, *biases)`.

    `packs` has one for each layer, or None. A function for the reason of `SivaLinear`; weights and s get no gradient
    here either.
    """

    @staticmethod
    def forward(ctx: Any, packs: Sequence[Packs | None], x: Tensor, *operands: Any) -> tuple[Tensor, ...]:
        layers = len(packs)
        weights, us, ss, vs, biases = split(operands, layers)
        factors = [operand(weight, each, x) for weight, each in zip(weights, packs, strict=True)]
        hs, p = torch.ops.fastpeft.siva_linear_group(x, factors, us, ss, vs, biases)
        _, _, *needs = ctx.needs_input_grad
        _, need_du, _, need_dv, _ = split(needs, layers)
        # x is needed for dV and p for dU alone; what no gradient needs is not kept
        kept = x if any(need_dv) else None, p if any(need_du) else None
        weights = [weight if each.is_mkldnn else each for weight, each in zip(weights, factors, strict=True)]
        ctx.packs = packs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*kept, *weights, *us, *ss, *vs)
        return tuple(hs)

    @staticmethod
    def backward(ctx: Any, *dhs: Tensor | None) -> tuple[Tensor | None, ...]:
        check_first_derivative("siva_linear_group")
        used = [i for i, dh in enumerate(dhs) if dh is not None]
        given = [dh for dh in dhs if dh is not None]
        if not used:
            return (None,) * len(ctx.needs_input_grad)

        def of_used(values: Sequence[Any]) -> list[Any]:
            return [values[i] for i in used]

        layers = len(ctx.packs)
        x, p, *operands = ctx.saved_tensors
        weights, us, ss, vs = map(of_used, split(operands, layers))
        _, need_dx, *needs = ctx.needs_input_grad
        _, need_du, _, need_dv, need_dbias = map(of_used, split(needs, layers))
        if p is not None and len(used) < layers:
            p = torch.cat(of_used(p.split([s.shape[0] for s in split(operands, layers)[2]])))
        if need_dx:
            pairs = zip(weights, of_used(ctx.packs), strict=True)
            weights = [operand(weight, packs, given[0], transposed=True) for weight, packs in pairs]
        empty = given[0].new_empty(0)
        dx, dus, dv, dbiases = torch.ops.fastpeft.siva_linear_group_backward(
            given,
            x if x is not None else empty,
            weights,
            us,
            ss,
            vs,
            p if p is not None else empty,
            need_dx,
            need_du,
            any(need_dv),
            need_dbias,
        )
        dvs = dv.split([v.shape[0] for v in vs]) if any(need_dv) else [empty] * len(used)
        gradients: list[list[Tensor | None]] = [[None] * layers for _ in range(5)]  # weights, us, ss, vs, biases
        for place, values, needed in ((1, dus, need_du), (3, dvs, need_dv), (4, dbiases, need_dbias)):
            for i, value, need in zip(used, values, needed, strict=True):
                gradients[place][i] = value if need else None
        return None, dx if need_dx else None, *itertools.chain(*gradients)
