"""Every op of the library: its schema, its shape function and its autograd formula, each written once.

Implementations are registered in `fastpeft.backends` (Python, Triton) or by the compiled modules (C++, CUDA), never
here, so that any of them may be absent. Users call the checked functions of `fastpeft.functional`.

Dimension letters: M rows of x (all leading dimensions together), K in_features, N out_features, R rank; B batch,
H heads, T tokens, D width of a side network, k slots of a window of which S are real.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "fastpeft"

SCHEMAS = {
    # h (*, N) and the projection p = x V^T (*, R), which backward needs
    "siva_linear": "(Tensor x, Tensor weight, Tensor u, Tensor s, Tensor v, Tensor? bias) -> (Tensor, Tensor)",
    # dx (*, K), du (N, R), dv (R, K), dbias (N,); an output that is not needed is a tensor of 0 elements
    "siva_linear_backward": (
        "(Tensor dh, Tensor x, Tensor weight, Tensor u, Tensor s, Tensor v, Tensor p, bool need_dx, bool need_du, "
        "bool need_dv, bool need_dbias) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    # layers that read the same x: each h (*, N), and all p^T in one (sum of R, M), which backward needs
    "siva_linear_group": (
        "(Tensor x, Tensor[] weights, Tensor[] us, Tensor[] ss, Tensor[] vs, Tensor?[] biases) -> (Tensor[], Tensor)"
    ),
    # dx (*, K), each du (N, R), all dv in one (sum of R, K), each dbias (N,)
    "siva_linear_group_backward": (
        "(Tensor[] dhs, Tensor x, Tensor[] weights, Tensor[] us, Tensor[] ss, Tensor[] vs, Tensor p, bool need_dx, "
        "bool[] need_du, bool need_dv, bool[] need_dbias) -> (Tensor, Tensor[], Tensor, Tensor[])"
    ),
    # out (B, H, T, D) in the dtype of q, and the log-sum-exp of the scores (B, H, T) in float32; the seed is a SymInt,
    # so that a compiled model does not compile again for each step's seed
    "window_attention": (
        "(Tensor q, Tensor c, Tensor p, Tensor? mask, int[] slots, bool causal, float dropout, SymInt seed, int block) "
        "-> (Tensor, Tensor)"
    ),
    # dq (B, H, T, D), dc (B, S, T, D), dp (k, D); an output that is not needed is a tensor of 0 elements
    "window_attention_backward": (
        "(Tensor dout, Tensor q, Tensor c, Tensor p, Tensor? mask, Tensor out, Tensor lse, int[] slots, bool causal, "
        "float dropout, SymInt seed, int block, bool need_dq, bool need_dc, bool need_dp) -> (Tensor, Tensor, Tensor)"
    ),
    # c (B, S, T, D) in float32 or float64, dense in T and D
    "feature_dropout_": "(Tensor(a!) c, int[] slots, float dropout, int seed, int block) -> ()",
    # rows of x that take different factors: `sizes[i]` of them take the i-th, in the order that the permutation `order`
    # (B,) brings them to, None where they stand in it. h (B, *, N) in the order of x, and each p^T (R, M)
    "siva_linear_mixed": (
        "(Tensor x, Tensor weight, Tensor[] us, Tensor[] ss, Tensor[] vs, int[] sizes, Tensor? order, Tensor? bias) -> "
        "(Tensor, Tensor[])"
    ),
    # dx (B, *, K), each du (N, R), each dv (R, K), dbias (N,)
    "siva_linear_mixed_backward": (
        "(Tensor dh, Tensor x, Tensor weight, Tensor[] us, Tensor[] ss, Tensor[] vs, Tensor[] ps, int[] sizes, Tensor? "
        "order, bool need_dx, bool[] need_du, bool[] need_dv, bool need_dbias) -> (Tensor, Tensor[], Tensor[], Tensor)"
    ),
    # terms (seed, scale) are applied in order; decay goes with the first
    "mezo_perturb_": (
        "(Tensor(a!)[] params, int[] offsets, int[] seeds, float[] scales, float decay, str noise='gaussian', "
        "str rounding='nearest') -> ()"
    ),
    # the same, with seeds (n,) int64 and scales (n,) float64 read from the device when the pass runs, so that a replay
    # of a captured CUDA graph takes what they hold by then
    "mezo_perturb_replay_": (
        "(Tensor(a!)[] params, int[] offsets, Tensor seeds, Tensor scales, float decay, str noise='gaussian', "
        "str rounding='nearest') -> ()"
    ),
    "mezo_perturb": (
        "(Tensor param, int offset, int[] seeds, float[] scales, float decay, str noise='gaussian', "
        "str rounding='nearest') -> Tensor"
    ),
}

for _name, _schema in SCHEMAS.items():
    torch.library.define(f"{NAMESPACE}::{_name}", _schema, tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.register_fake(f"{NAMESPACE}::siva_linear")
def _siva_linear_fake(
    x: Tensor, weight: Tensor, u: Tensor, s: Tensor, v: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    return x.new_empty((*x.shape[:-1], weight.shape[0])), x.new_empty((*x.shape[:-1], v.shape[0]))


@torch.library.register_fake(f"{NAMESPACE}::siva_linear_backward")
def _siva_linear_backward_fake(
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


def _siva_linear_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, u, s, v, _ = inputs
    p = output[1]
    ctx.mark_non_differentiable(p)
    ctx.set_materialize_grads(False)
    # torch appends one input of its own
    _, ctx.need_dweight, need_du, ctx.need_ds, need_dv, _ = ctx.needs_input_grad[: len(inputs)]
    # x is needed for dV and p for dU alone; what no gradient needs is not kept
    ctx.save_for_backward(x if need_dv else None, weight, u, s, v, p if need_du else None)


def _siva_linear_backward(ctx: Any, dh: Tensor | None, _dp: Tensor | None) -> tuple[Tensor | None, ...]:
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
    f"{NAMESPACE}::siva_linear", _siva_linear_backward, setup_context=_siva_linear_setup_context
)


@torch.library.register_fake(f"{NAMESPACE}::siva_linear_group")
def _siva_linear_group_fake(
    x: Tensor,
    weights: list[Tensor],
    us: list[Tensor],
    ss: list[Tensor],
    vs: list[Tensor],
    biases: list[Tensor | None],
) -> tuple[list[Tensor], Tensor]:
    hs = [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights]
    return hs, x.new_empty((sum(v.shape[0] for v in vs), math.prod(x.shape[:-1])))


@torch.library.register_fake(f"{NAMESPACE}::siva_linear_group_backward")
def _siva_linear_group_backward_fake(
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
    k = weights[0].shape[1]
    return (
        x.new_empty((*dhs[0].shape[:-1], k) if need_dx else (0,)),
        [x.new_empty(u.shape if needed else (0,)) for u, needed in zip(us, need_du, strict=True)],
        x.new_empty((sum(v.shape[0] for v in vs), k) if need_dv else (0,)),
        [x.new_empty((len(w),) if needed else (0,)) for w, needed in zip(weights, need_dbias, strict=True)],
    )


class SivaLinearGroup(torch.autograd.Function):
    """The autograd formula of `fastpeft::siva_linear_group`: `apply(layers, x, *weights, *us, *ss, *vs, *biases)`.

    Not one of `register_autograd`, which for lists of tensors takes three times as long as the call itself is worth.
    Weights and s get no gradient; `functional.siva_linear_group` refuses those that require one.
    """

    @staticmethod
    def forward(ctx: Any, layers: int, x: Tensor, *operands: Any) -> tuple[Tensor, ...]:
        weights, us, ss, vs, biases = _split(operands, layers)
        hs, p = torch.ops.fastpeft.siva_linear_group(x, weights, us, ss, vs, biases)
        _, _, *needs = ctx.needs_input_grad
        _, need_du, _, need_dv, _ = _split(needs, layers)
        # x is needed for dV and p for dU alone; what no gradient needs is not kept
        kept = x if any(need_dv) else None, p if any(need_du) else None
        ctx.layers = layers
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*kept, *weights, *us, *ss, *vs)
        return tuple(hs)

    @staticmethod
    def backward(ctx: Any, *dhs: Tensor | None) -> tuple[Tensor | None, ...]:
        used = [i for i, dh in enumerate(dhs) if dh is not None]
        if not used:
            return (None,) * len(ctx.needs_input_grad)

        def of_used(values: Sequence[Any]) -> list[Any]:
            return [values[i] for i in used]

        x, p, *operands = ctx.saved_tensors
        weights, us, ss, vs = map(of_used, _split(operands, ctx.layers))
        _, need_dx, *needs = ctx.needs_input_grad
        _, need_du, _, need_dv, need_dbias = map(of_used, _split(needs, ctx.layers))
        if p is not None and len(used) < ctx.layers:
            p = torch.cat(of_used(p.split([s.shape[0] for s in _split(operands, ctx.layers)[2]])))
        empty = weights[0].new_empty(0)
        dx, dus, dv, dbiases = torch.ops.fastpeft.siva_linear_group_backward(
            of_used(dhs),
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
        gradients: list[list[Tensor | None]] = [[None] * ctx.layers for _ in range(5)]  # weights, us, ss, vs, biases
        for place, values, needed in ((1, dus, need_du), (3, dvs, need_dv), (4, dbiases, need_dbias)):
            for i, value, need in zip(used, values, needed, strict=True):
                gradients[place][i] = value if need else None
        return None, dx if need_dx else None, *itertools.chain(*gradients)


@torch.library.register_fake(f"{NAMESPACE}::siva_linear_mixed")
def _siva_linear_mixed_fake(
    x: Tensor,
    weight: Tensor,
    us: list[Tensor],
    ss: list[Tensor],
    vs: list[Tensor],
    sizes: list[int],
    order: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    tokens = math.prod(x.shape[1:-1])
    ps = [x.new_empty((v.shape[0], size * tokens)) for v, size in zip(vs, sizes, strict=True)]
    return x.new_empty((*x.shape[:-1], weight.shape[0])), ps


@torch.library.register_fake(f"{NAMESPACE}::siva_linear_mixed_backward")
def _siva_linear_mixed_backward_fake(
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
    return (
        dh.new_empty((*dh.shape[:-1], weight.shape[1]) if need_dx else (0,)),
        [u.new_empty(u.shape if needed else (0,)) for u, needed in zip(us, need_du, strict=True)],
        [v.new_empty(v.shape if needed else (0,)) for v, needed in zip(vs, need_dv, strict=True)],
        dh.new_empty((weight.shape[0],) if need_dbias else (0,)),
    )


class SivaLinearMixed(torch.autograd.Function):
    """The autograd formula of `fastpeft::siva_linear_mixed`: `apply(sizes, order, x, weight, bias, *us, *ss, *vs)`.

    A function for the reason of `SivaLinearGroup`; s and the weight get no gradient here either.
    """

    @staticmethod
    def forward(
        ctx: Any, sizes: list[int], order: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, *factors: Any
    ) -> Tensor:
        us, ss, vs = _split(factors, len(sizes))
        h, ps = torch.ops.fastpeft.siva_linear_mixed(x, weight, us, ss, vs, sizes, order, bias)
        need_du, _, need_dv = _split(ctx.needs_input_grad[5:], len(sizes))
        # x is needed for dV and a p for its dU alone; what no gradient needs is not kept
        kept = [p if needed else None for p, needed in zip(ps, need_du, strict=True)]
        ctx.sizes = sizes
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if any(need_dv) else None, order, weight, *factors, *kept)
        return h

    @staticmethod
    def backward(ctx: Any, dh: Tensor | None) -> tuple[Tensor | None, ...]:
        if dh is None:
            return (None,) * len(ctx.needs_input_grad)
        x, order, weight, *rest = ctx.saved_tensors
        us, ss, vs, ps = _split(rest, len(ctx.sizes))
        _, _, need_dx, _, need_dbias, *needs = ctx.needs_input_grad
        need_du, need_ds, need_dv = _split(needs, len(ctx.sizes))
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
            *(None, None, dx if need_dx else None, None, dbias if need_dbias else None),
            *(du if needed else None for du, needed in zip(dus, need_du, strict=True)),
            *(None for _ in need_ds),
            *(dv if needed else None for dv, needed in zip(dvs, need_dv, strict=True)),
        )


def _split(values: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Lists of `size`, from one after the other."""
    return [values[start : start + size] for start in range(0, len(values), size)]


@torch.library.register_fake(f"{NAMESPACE}::window_attention")
def _window_attention_fake(
    q: Tensor,
    c: Tensor,
    p: Tensor,
    mask: Tensor | None,
    slots: list[int],
    causal: bool,
    dropout: float,
    seed: int,
    block: int,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)


@torch.library.register_fake(f"{NAMESPACE}::window_attention_backward")
def _window_attention_backward_fake(
    dout: Tensor,
    q: Tensor,
    c: Tensor,
    p: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    slots: list[int],
    causal: bool,
    dropout: float,
    seed: int,
    block: int,
    need_dq: bool,
    need_dc: bool,
    need_dp: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        q.new_empty(q.shape if need_dq else (0,)),
        c.new_empty(c.shape if need_dc else (0,)),
        p.new_empty(p.shape if need_dp else (0,)),
    )


def _window_attention_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, c, p, mask, ctx.slots, ctx.causal, ctx.dropout, ctx.seed, ctx.block = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, c, p, mask, out, lse)


def _window_attention_backward(ctx: Any, dout: Tensor | None, _dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 9
    needs = ctx.needs_input_grad[:3]
    gradients = torch.ops.fastpeft.window_attention_backward(
        dout, *ctx.saved_tensors, ctx.slots, ctx.causal, ctx.dropout, ctx.seed, ctx.block, *needs
    )
    return (*(gradient if need else None for gradient, need in zip(gradients, needs)), *(None,) * 6)


torch.library.register_autograd(
    f"{NAMESPACE}::window_attention", _window_attention_backward, setup_context=_window_attention_setup_context
)


@torch.library.register_vmap(f"{NAMESPACE}::window_attention")
def _window_attention_vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    q: Tensor,
    c: Tensor,
    p: Tensor,
    mask: Tensor | None,
    slots: list[int],
    causal: bool,
    dropout: float,
    seed: int,
    block: int,
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """G attentions are one over G B rows, where every slot is a real one that has its own p added.

    An absent slot is T equal keys. The noise of dropout depends on a row's place in the batch, so there must be none.
    """
    if dropout > 0:
        raise NotImplementedError("window_attention: torch.vmap takes no dropout. Set the networks to eval().")

    def stacked(x: Tensor, dim: int | None) -> Tensor:
        return x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)

    q, c, p = (stacked(x, dim) for x, dim in zip((q, c, p), in_dims))
    groups, batch, _, tokens, width = q.shape
    number = p.shape[1]
    window = p[:, None, :, None].expand(groups, batch, number, tokens, width).clone()
    window[:, :, slots] += c
    out, lse = torch.ops.fastpeft.window_attention(
        q.flatten(0, 1),
        window.flatten(0, 1),
        torch.zeros_like(p[0]),
        None if mask is None else stacked(mask, in_dims[3]).flatten(0, 1),
        list(range(number)),
        causal,
        0.0,
        seed,
        block,
    )
    return (out.unflatten(0, (groups, batch)), lse.unflatten(0, (groups, batch))), (0, 0)


@torch.library.register_fake(f"{NAMESPACE}::feature_dropout_")
def _feature_dropout__fake(c: Tensor, slots: list[int], dropout: float, seed: int, block: int) -> None:
    return None


@torch.library.register_fake(f"{NAMESPACE}::mezo_perturb_")
def _mezo_perturb__fake(
    params: list[Tensor],
    offsets: list[int],
    seeds: list[int],
    scales: list[float],
    decay: float,
    noise: str = "gaussian",
    rounding: str = "nearest",
) -> None:
    return None


@torch.library.register_fake(f"{NAMESPACE}::mezo_perturb_replay_")
def _mezo_perturb_replay__fake(
    params: list[Tensor],
    offsets: list[int],
    seeds: Tensor,
    scales: Tensor,
    decay: float,
    noise: str = "gaussian",
    rounding: str = "nearest",
) -> None:
    return None


@torch.library.register_fake(f"{NAMESPACE}::mezo_perturb")
def _mezo_perturb_fake(
    param: Tensor,
    offset: int,
    seeds: list[int],
    scales: list[float],
    decay: float,
    noise: str = "gaussian",
    rounding: str = "nearest",
) -> Tensor:
    return torch.empty_like(param)
