"""Ops as the fewest fused ATen calls, with no temporary of the output's size.

They are what a CPU runs where the compiled module is not, or leaves an op to them.

Each product after the first is added to its target by the matrix product itself (`addmm_`, `baddbmm_`), which saves
writing it out, reading it back and adding; what is elementwise works in place. Of a product with R rows or columns the
layout decides: BLAS is up to seven times slower where the narrow operand is not contiguous along the long side, so U is
turned to `(R, N)` first, which costs little. Forms and names are those of `fastpeft.reference`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastpeft.errors import FastpeftError
from fastpeft.reference import absent_slots, as_matrix, visibility


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


def siva_linear_mixed(
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
    if order is not None and order.is_cpu and sorted(order.tolist()) != list(range(len(x))):
        raise FastpeftError(
            f"siva_linear_mixed: order is {order.tolist()}, so some rows of h would stay unwritten; allowed is each of "
            f"0 to {len(x) - 1} once. Give the permutation that sorts the rows by adapter."
        )
    x = _sorted(x, order)
    h, ps = _product(x, weight, bias), []
    for part, target, u, s, v in zip(x.split(sizes), h.split(sizes), us, ss, vs, strict=True):
        ps.append(v @ as_matrix(part).t())  # (R, M)
        as_matrix(target).addmm_(ps[-1].t(), _scaled(u, s))
    return _unsorted(h, order), ps


def siva_linear_mixed_backward(
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
    dx = (rows @ weight).view(*dh.shape[:-1], weight.shape[1]) if need_dx else dh
    dus, dvs = ([t.new_empty(0) for t in each] for each in (us, vs))
    parts = zip(dh.split(sizes), x.split(sizes), dx.split(sizes), us, ss, vs, ps, strict=True)
    for i, (of_h, of_x, target, u, s, v, p) in enumerate(parts):
        own = as_matrix(of_h)
        if need_dx or need_dv[i]:
            dp = _scaled(u, s) @ own.t()  # (R, M)
        if need_dx:
            as_matrix(target).addmm_(dp.t(), v)
        if need_du[i]:
            dus[i] = torch.mul((p @ own).t(), s, out=u.new_empty(u.shape))
        if need_dv[i]:
            dvs[i] = dp @ as_matrix(of_x)
    dbias = rows.sum(0) if need_dbias else dh.new_empty(0)
    return _unsorted(dx, order) if need_dx else dh.new_empty(0), dus, dvs, dbias


def _sorted(x: Tensor, order: Tensor | None) -> Tensor:
    return x if order is None else x.index_select(0, order)


def _unsorted(x: Tensor, order: Tensor | None) -> Tensor:
    return x if order is None else torch.empty_like(x).index_copy_(0, order, x)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x W^T + b`; no view of another tensor, for autograd allows no change in place of an output that is one."""
    h = x.new_empty(*x.shape[:-1], weight.shape[0])
    rows, target = as_matrix(x), as_matrix(h)
    if bias is None:
        torch.mm(rows, weight.t(), out=target)
    else:
        torch.addmm(bias, rows, weight.t(), out=target)
    return h


def _output(x: Tensor, weight: Tensor, u: Tensor, s: Tensor, p: Tensor, bias: Tensor | None) -> Tensor:
    """One h."""
    h = _product(x, weight, bias)
    as_matrix(h).addmm_(p, _scaled(u, s))
    return h


def _stacked(vs: list[Tensor]) -> Tensor:
    return vs[0] if len(vs) == 1 else torch.cat(vs)


def _scaled(u: Tensor, s: Tensor) -> Tensor:
    """`diag(s) U^T`, `(R, N)`, contiguous."""
    return torch.mul(u.t(), s[:, None], out=u.new_empty(s.shape[0], u.shape[0]))


def window_attention(
    q: Tensor,
    c: Tensor,
    p: Tensor,
    mask: Tensor | None,
    slots: Sequence[int],
    causal: bool,
    dropout: float,
    seed: int,
    block: int,
) -> tuple[Tensor, Tensor]:
    """As the reference: one product over all slots for the scores and one for the output, the softmax in place."""
    keys = _window_keys(q, c, p, slots, dropout, seed, block)
    if keys.shape[1] == 0:  # of which there is no largest
        return torch.zeros_like(q), q.new_full(q.shape[:-1], -torch.inf, dtype=torch.float32)
    scores, nothing = _window_scores(q, keys, mask, causal, len(slots))
    top = scores.amax(-1, keepdim=True)
    weights = scores.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    out = torch.bmm(weights, keys).div_(total).view(q.shape)
    lse = total.log_().add_(top).view(q.shape[:-1])
    if nothing is not None:
        out.masked_fill_(nothing[:, None, :, None], 0)
        lse.masked_fill_(nothing[:, None], -torch.inf)
    return out.to(q.dtype), lse.to(torch.float32)


def window_attention_backward(
    dout: Tensor,
    q: Tensor,
    c: Tensor,
    p: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    slots: Sequence[int],
    causal: bool,
    dropout: float,
    seed: int,
    block: int,
    need_dq: bool,
    need_dc: bool,
    need_dp: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference, the heads one after the other as rows, so that products add them up."""
    keys = _window_keys(q, c, p, slots, dropout, seed, block)
    scores, nothing = _window_scores(q, keys, mask, causal, len(slots))
    if nothing is not None:
        lse = lse.masked_fill(nothing[:, None], torch.inf)  # no weight at all
    weights = scores.sub_(lse.reshape(*scores.shape[:2], 1)).exp_()  # P
    rows, drows = _rows(q, keys.dtype), _rows(dout, keys.dtype)
    delta = (drows * _rows(out, keys.dtype)).sum(-1, keepdim=True)
    dscores = torch.bmm(drows, keys.mT).sub_(delta).mul_(weights)
    dq, dc, dp = q.new_empty(0), c.new_empty(0), p.new_empty(0)
    if need_dq:
        dq = torch.bmm(dscores, keys).view(q.shape).to(q.dtype)
    if need_dc or need_dp:
        last = len(slots) * c.shape[2]  # of the real keys
        dreal = torch.bmm(weights[..., :last].mT, drows).baddbmm_(dscores[..., :last].mT, rows).view(c.shape)
    if need_dp:
        dp = torch.empty_like(p)
        dp[list(slots)] = dreal.sum((0, 2)).to(p.dtype)
        if absent := absent_slots(p, slots):
            dabsent = weights[..., last:].flatten(0, 1).t() @ drows.flatten(0, 1)
            dp[absent] = dabsent.addmm_(dscores[..., last:].flatten(0, 1).t(), rows.flatten(0, 1)).to(p.dtype)
    if need_dc:
        if dropout > 0:
            torch.ops.fastpeft.feature_dropout_(dreal, slots, dropout, seed, block)
        dc = dreal.to(c.dtype)
    return dq, dc, dp


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x `(B, H, T, D)` as `(B, H T, D)`; a -1 could not be told where another size is 0."""
    batch, heads, tokens, width = x.shape
    return x.to(dtype).reshape(batch, heads * tokens, width)


def _window_keys(
    q: Tensor, c: Tensor, p: Tensor, slots: Sequence[int], dropout: float, seed: int, block: int
) -> Tensor:
    """The keys `(B, S T + k - S, D)`, made where they stay; those of absent slots come last."""
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, real, tokens, width = c.shape
    absent = absent_slots(p, slots)
    keys = c.new_empty(batch, real * tokens + len(absent), width, dtype=compute)
    window = keys[:, : real * tokens].unflatten(1, (real, tokens)).copy_(c)
    if dropout > 0:
        torch.ops.fastpeft.feature_dropout_(window, slots, dropout, seed, block)
    window += p[list(slots), None]
    if absent:
        keys[:, real * tokens :] = p[absent]
    return keys


def _window_scores(
    q: Tensor, keys: Tensor, mask: Tensor | None, causal: bool, real: int
) -> tuple[Tensor, Tensor | None]:
    """The scores `(B, H T, S T + k - S)`, and which queries see nothing, `(B, T)`, or None where all see all."""
    batch, heads, tokens, _ = q.shape
    scores = torch.bmm(_rows(q, keys.dtype), keys.mT)
    by_head = scores.view(batch, heads, tokens, keys.shape[1])
    of_real = by_head[..., : real * tokens].unflatten(-1, (real, tokens))
    of_absent = by_head[..., real * tokens :]
    if not causal and (mask is None or mask.all()):  # a CPU knows what its masks say
        of_absent += math.log(max(tokens, 1))  # without tokens there is no query either
        return scores, None
    hidden, number, nothing = visibility(mask, batch, tokens, causal, q.device)
    of_real.masked_fill_(hidden[:, None, :, None], -torch.inf)
    of_absent += number.to(keys.dtype).log()[:, None, :, None]
    return scores, nothing
