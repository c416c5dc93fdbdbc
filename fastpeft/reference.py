"""Each op in plain PyTorch: the oracle of the tests, the fallback where nothing faster runs, and the baseline of the
benches.

Dimension letters: M rows of x (all leading dimensions together), K in_features, N out_features, R rank; B batch,
H heads, T tokens, D width of a side network, k slots of a window of which S are real.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastpeft import noise as noise_contract

NOISE_CHUNK = 2**20  # elements whose noise exists at one time


def as_matrix(x: Tensor) -> Tensor:
    """`(*, K)` as `(M, K)`; a -1 in its place could not be told where K is 0."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def siva_linear(
    x: Tensor, weight: Tensor, u: Tensor, s: Tensor, v: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`h = x W^T + ((x V^T) * s) U^T + b`, and `p = x V^T`."""
    p = F.linear(x, v)
    h = F.linear(x, weight, bias) + F.linear(p * s, u)
    return h, p


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


def siva_linear_group(
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
    """Gradients of each layer by itself; those of x are added up, those of V stand below each other."""
    ranks = [s.shape[0] for s in ss]
    ps = [part.t() for part in p.split(ranks)] if any(need_du) else [p] * len(ss)
    found = [
        torch.ops.fastpeft.siva_linear_backward(dh, x, *operands, need_dx, of_u, need_dv, of_bias)
        for dh, *operands, of_u, of_bias in zip(dhs, weights, us, ss, vs, ps, need_du, need_dbias, strict=True)
    ]
    dxs, dus, dvs, dbiases = zip(*found, strict=True)
    return sum(dxs[1:], dxs[0]), list(dus), torch.cat(dvs), list(dbiases)


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
    """`h[b] = x[b] W^T + ((x[b] V_i^T) * s_i) U_i^T + b` for the rows b of each i, and each `p_i^T = V_i x[b]^T`."""
    h, ps = F.linear(x, weight, bias), []
    for rows, u, s, v in zip(_rows(x, sizes, order), us, ss, vs, strict=True):
        p = F.linear(x[rows], v)
        h[rows] += F.linear(p * s, u)
        ps.append(as_matrix(p).t())
    return h, ps


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
    """For each i the gradients of `siva_linear` over its rows alone; dx of all."""
    dx = dh @ weight if need_dx else dh.new_empty(0)
    dus, dvs = ([t.new_empty(0) for t in each] for each in (us, vs))
    for i, (rows, u, s, v) in enumerate(zip(_rows(dh, sizes, order), us, ss, vs, strict=True)):
        own = as_matrix(dh[rows])  # (M, N)
        dp = (own @ u) * s  # (M, R)
        if need_dx:
            dx[rows] += (dp @ v).view(dx[rows].shape)
        if need_du[i]:
            dus[i] = own.t() @ (ps[i].t() * s)
        if need_dv[i]:
            dvs[i] = dp.t() @ as_matrix(x[rows])
    return dx, dus, dvs, as_matrix(dh).sum(0) if need_dbias else dh.new_empty(0)


def _rows(x: Tensor, sizes: list[int], order: Tensor | None) -> tuple[Tensor, ...]:
    """The indices of the rows of x that take each of the factors."""
    return (torch.arange(len(x), device=x.device) if order is None else order).split(sizes)


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
    """`softmax(q (C + p)^T) (C + p)` over the k * T keys of a window, and its log-sum-exp.

    q `(B, H, T, D)`, c `(B, S, T, D)`, p `(k, D)`, mask `(B, T)` -> out `(B, H, T, D)`, lse `(B, H, T)` in float32.
    A slot that is not real has T equal keys `p_i`: one key whose score gains the logarithm of how many are visible.
    """
    keys = _window_keys(q, c, p, slots, dropout, seed, block)
    scores, nothing = _window_scores(q, keys, mask, causal, len(slots))
    out = (scores.softmax(-1) @ keys).masked_fill(nothing[..., None], 0)
    return out.to(q.dtype), scores.logsumexp(-1).masked_fill(nothing, -torch.inf).to(torch.float32)


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
    """Gradients of `window_attention`, with the keys `K = C + p`, `P = exp(q K^T - lse)` made again and
    `dS = P (dout K^T - sum of dout * out over D)`:

    `dq = dS K`, and of `dK = P^T dout + dS^T q`, added up over heads, dC is what dropout kept and dp the sums over
    sentences and tokens.
    """
    keys = _window_keys(q, c, p, slots, dropout, seed, block)
    scores, nothing = _window_scores(q, keys, mask, causal, len(slots))
    weights = (scores - lse[..., None]).exp().masked_fill(nothing[..., None], 0)  # P
    dout, rows = dout.to(keys.dtype), q.to(keys.dtype)
    dscores = weights * (dout @ keys.mT - (dout * out).sum(-1, keepdim=True))
    dq, dc, dp = q.new_empty(0), c.new_empty(0), p.new_empty(0)
    if need_dq:
        dq = (dscores @ keys).to(q.dtype)
    dkeys = (weights.mT @ dout + dscores.mT @ rows).sum(1)  # (B, S T + k - S, D)
    dreal, dabsent = dkeys.split((len(slots) * c.shape[2], p.shape[0] - len(slots)), dim=1)
    dreal = dreal.reshape(c.shape)
    if need_dp:
        dp = torch.empty_like(p)
        dp[list(slots)] = dreal.sum((0, 2)).to(p.dtype)
        dp[absent_slots(p, slots)] = dabsent.sum(0).to(p.dtype)
    if need_dc:
        dc = dreal.contiguous()
        feature_dropout_(dc, slots, dropout, seed, block)
        dc = dc.to(c.dtype)
    return dq, dc, dp


def absent_slots(p: Tensor, slots: Sequence[int]) -> list[int]:
    """Slots of a window, with a vector each in p `(k, D)`, that are not real."""
    return [slot for slot in range(p.shape[0]) if slot not in slots]


def visibility(mask: Tensor | None, batch: int, tokens: int, causal: bool, device: torch.device) -> tuple[Tensor, ...]:
    """Which tokens a query does not see, bool `(B, T, T)`; how many it sees, `(B, T)`; where that is none, `(B, T)`.

    A query that sees none is computed on all tokens, so that its numbers are finite, and set to 0 later.
    """
    if mask is None:
        mask = torch.ones(batch, tokens, dtype=torch.bool, device=device)
    visible = mask[:, None].expand(batch, tokens, tokens)  # (B, T queries, T keys)
    if causal:
        visible = visible.tril()
    number = visible.sum(-1)
    nothing = number == 0
    return ~(visible | nothing[..., None]), number.clamp(min=1), nothing


def _window_keys(
    q: Tensor, c: Tensor, p: Tensor, slots: Sequence[int], dropout: float, seed: int, block: int
) -> Tensor:
    """The keys, which are the values, of all heads: `(B, 1, S T + k - S, D)`, those of absent slots last."""
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    real, p = c.to(compute, copy=True, memory_format=torch.contiguous_format), p.to(compute)
    feature_dropout_(real, slots, dropout, seed, block)
    real += p[list(slots), None]
    return torch.cat((real.flatten(1, 2), p[absent_slots(p, slots)].expand(c.shape[0], -1, -1)), dim=1)[:, None]


def _window_scores(q: Tensor, keys: Tensor, mask: Tensor | None, causal: bool, real: int) -> tuple[Tensor, Tensor]:
    """The scores `(B, H, T, S T + k - S)`, and which queries see nothing, `(B, 1, T)`."""
    batch, _, tokens, _ = q.shape
    hidden, number, nothing = visibility(mask, batch, tokens, causal, q.device)
    scores = q.to(keys.dtype) @ keys.mT
    of_real = scores[..., : real * tokens].masked_fill(hidden.repeat(1, 1, real)[:, None], -torch.inf)
    of_absent = scores[..., real * tokens :] + number.to(keys.dtype).log()[:, None, :, None]
    return torch.cat((of_real, of_absent), dim=-1), nothing[:, None]


@torch.no_grad()
def feature_dropout_(c: Tensor, slots: Sequence[int], dropout: float, seed: int, block: int) -> None:
    """Set dropped elements of c `(B, S, T, D)` to 0 and multiply the others by `1 / (1 - dropout)`, in place."""
    if dropout > 0:
        batch, real, tokens, width = c.shape
        ordinals = [16 * block + slot for slot in slots]
        kept = noise_contract.kept(batch * tokens * width, dropout, seed, ordinals, c.device)
        c *= kept.view(real, batch, tokens, width).transpose(0, 1).to(c.dtype) * (1 / (1 - dropout))


@torch.no_grad()
def mezo_perturb_(
    params: list[Tensor],
    offsets: list[int],
    seeds: list[int],
    scales: list[float],
    decay: float,
    noise: str = "gaussian",
    rounding: str = "nearest",
) -> None:
    """`p <- round(fl(fl(a p) + fl(scale z)))` for each (seed, scale) in order, `a = 1 - decay` with the first only.

    `fl` is float32 (float64 for float64 parameters, with z widened), `round` is to the storage dtype.
    """
    draw = noise_contract.NOISE[noise]
    for param, offset in zip(params, offsets):
        flat = param.reshape(-1)  # C order of the logical tensor: a view, or a copy that is written back
        compute = torch.float64 if param.dtype == torch.float64 else torch.float32
        for start in range(0, flat.numel(), NOISE_CHUNK):
            chunk = flat[start : start + NOISE_CHUNK]
            first, a = offset + start, 1.0 - decay
            for seed, scale in zip(seeds, scales):
                z = draw(first, chunk.numel(), seed, param.device).to(compute)
                value = chunk.to(compute) * a + z * scale
                if rounding == "stochastic":
                    value = noise_contract.round_stochastic(value, param.dtype, first, seed)
                chunk.copy_(value)
                a = 1.0
        if not param.is_contiguous():
            param.copy_(flat.view(param.shape))


def mezo_perturb_replay_(
    params: list[Tensor],
    offsets: list[int],
    seeds: Tensor,
    scales: Tensor,
    decay: float,
    noise: str = "gaussian",
    rounding: str = "nearest",
) -> None:
    """`mezo_perturb_` with its terms in tensors, int64 `(n,)` and float64 `(n,)`."""
    mezo_perturb_(params, offsets, seeds.tolist(), scales.tolist(), decay, noise, rounding)


def mezo_perturb(
    param: Tensor,
    offset: int,
    seeds: list[int],
    scales: list[float],
    decay: float,
    noise: str = "gaussian",
    rounding: str = "nearest",
) -> Tensor:
    """`mezo_perturb_` on a copy of `param`."""
    out = param.detach().clone()
    mezo_perturb_([out], [offset], seeds, scales, decay, noise, rounding)
    return out
