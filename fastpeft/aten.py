"""Ops as the fewest fused ATen calls, with no temporary of the output's size.

They are what a CPU runs where the compiled module is not, or leaves an op to them.

Each product after the first is added to its target by the matrix product itself (`addmm_`, `baddbmm_`), which saves
writing it out, reading it back and adding; what is elementwise works in place. Of a product with R rows or columns the
layout decides: BLAS is up to seven times slower where the narrow operand is not contiguous along the long side, so U is
turned to `(R, N)` first, which costs little. Forms and names are those of `fastpeft.reference`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastpeft.errors import FastpeftError
from fastpeft.reference import absent_slots, as_matrix


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


_AT_ONCE = 2**18  # numbers in keys: with fewer, a call costs as much as what it does


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
    """As the reference, by PyTorch's fused attention, which has one tile of the scores at a time."""
    keys = _window_keys(q, c, p, slots, dropout, seed, block)
    rows = _rows(q, keys.dtype)
    if 0 in (rows.shape[2], keys.shape[2]):  # by which PyTorch divides
        return torch.zeros_like(q), q.new_full(q.shape[:-1], -torch.inf, dtype=torch.float32)
    bias, nothing = _window_bias(q, p, mask, slots, causal, keys.dtype)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(rows, keys, keys, attn_mask=bias, scale=1.0)
    lse = lse.view(q.shape[:-1]).to(torch.float32)
    if nothing is not None:  # where PyTorch's out is 0, and its lse too
        lse.masked_fill_(nothing, -torch.inf)
    return out.view(q.shape).to(q.dtype), lse


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
    """As the reference, for a few sentences at a time, of which each thread takes some.

    PyTorch makes the gradients of keys and those of values apart. For a few sentences both are small, and their sums
    take the place of keys that are done with: fresh memory costs more time than what is done there.
    """
    keys = _window_keys(q, c, p, slots, dropout, seed, block)
    rows, drows, of_out = (_rows(x, keys.dtype) for x in (q, dout, out))
    needs = need_dq, need_dc, need_dp
    if 0 in (*rows.shape, *keys.shape):  # by some of which PyTorch divides
        dq, dc, dp = (x.new_zeros(x.shape if needed else (0,)) for x, needed in zip((q, c, p), needs, strict=True))
        return dq, dc, dp
    bias, _ = _window_bias(q, p, mask, slots, causal, keys.dtype)
    lse = lse.masked_fill(lse.isneginf(), 0).to(keys.dtype).reshape(rows.shape[:3])  # PyTorch's: 0 if it sees none
    dq = torch.empty_like(rows)
    dreal = keys.view(-1)[: c.numel()].view(c.shape)  # a sentence's lie in its keys or before
    last = len(slots) * c.shape[2]  # of the real keys
    dabsent = keys.new_empty(len(q), keys.shape[2] - last, keys.shape[3])
    threads = torch.get_num_threads()
    at_once = threads * max(1, _AT_ONCE // (threads * keys[0].numel()))
    for start in range(0, len(q), at_once):
        some = slice(start, start + at_once)
        dq[some], dkeys, dvalues = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(x[some] for x in (drows, rows, keys, keys, of_out, lse)),
            0.0,
            False,
            attn_mask=bias if bias is None or len(bias) == 1 else bias[some],
            scale=1.0,
        )
        torch.add(*(x[:, 0, :last].unflatten(1, c.shape[1:3]) for x in (dkeys, dvalues)), out=dreal[some])
        torch.add(dkeys[:, 0, last:], dvalues[:, 0, last:], out=dabsent[some])
    dq = dq.view(q.shape).to(q.dtype) if need_dq else q.new_empty(0)
    dc, dp = c.new_empty(0), p.new_empty(0)
    if need_dp:
        dp = torch.empty_like(p)
        dp[list(slots)] = dreal.sum(2).sum(0).to(p.dtype)  # much faster than both dimensions at once
        dp[absent_slots(p, slots)] = dabsent.sum(0).to(p.dtype)
    if need_dc:
        if dropout > 0:
            torch.ops.fastpeft.feature_dropout_(dreal, slots, dropout, seed, block)
        dc = dreal.to(c.dtype)
    return dq, dc, dp


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x `(B, H, T, D)` as `(B, 1, H T, D)`, dense: as all heads see the same keys, they are one with the rows of all.

    A -1 could not be told where another size is 0.
    """
    batch, heads, tokens, width = x.shape
    return x.to(dtype).reshape(batch, 1, heads * tokens, width).contiguous()


def _window_keys(
    q: Tensor, c: Tensor, p: Tensor, slots: Sequence[int], dropout: float, seed: int, block: int
) -> Tensor:
    """The keys, which are the values: `(B, 1, S T + k - S, D)`, made where they stay, those of absent slots last."""
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, real, tokens, width = c.shape
    absent, p = absent_slots(p, slots), p.to(compute)
    keys = c.new_empty(batch, 1, real * tokens + len(absent), width, dtype=compute)
    window = keys[:, 0, : real * tokens].unflatten(1, (real, tokens))
    if dropout > 0:
        c = window.copy_(c)
        torch.ops.fastpeft.feature_dropout_(c, slots, dropout, seed, block)
    torch.add(c, p[list(slots), None], out=window)
    keys[:, 0, real * tokens :] = p[absent]
    return keys


def _window_bias(
    q: Tensor, p: Tensor, mask: Tensor | None, slots: Sequence[int], causal: bool, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """What is added to scores, `(B, 1, H T, S T + k - S)`: the logarithm of how many of the tokens that a query sees a
    key stands for. And which queries see none, `(B, H, T)`.

    A size is 1 where it makes no difference. Both are None where the logarithms are 0.
    """
    absent = p.shape[0] - len(slots)
    if mask is not None and mask.all():  # a CPU knows what its masks say
        mask = None
    if mask is None and not causal and absent == 0:
        return None, None
    heads, tokens = q.shape[1:3]
    visible = q.new_ones(1, 1, tokens, dtype=torch.bool) if mask is None else mask[:, None]
    if causal:
        visible = visible.expand(-1, tokens, -1).tril()
    number = visible.sum(-1, keepdim=True)
    of_real, of_absent = (count.to(dtype).log() for count in (visible, number))
    bias = torch.cat((*[of_real] * len(slots), of_absent.expand(-1, -1, absent)), dim=-1)[:, None]
    if bias.shape[2] > 1:
        bias = bias.expand(-1, heads, -1, -1).flatten(1, 2)[:, None]
    return bias, (number == 0).mT
