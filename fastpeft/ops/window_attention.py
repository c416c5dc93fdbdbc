"""`fastpeft::window_attention`: attention of a side network's queries to a window of k backbone features.

Dimension letters: B batch, H heads, T tokens, D width of a side network, k slots of a window; S of them are real, which
means inside the backbone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastpeft.errors import FastpeftError
from fastpeft.ops.define import NAMESPACE, check_first_derivative, define, is_differentiated
from fastpeft.ops.dtypes import check_kinds, compute_dtype, no_autocast
from fastpeft.ops.window import Needs, Window
from fastpeft.ops.window_composed import composed_holds, window_attention_backward_composed, window_attention_composed


def window_attention_reference(q: Tensor, c: Tensor, p: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """`softmax(q (C + p)^T) (C + p)` over the k * T keys of a window, and its log-sum-exp.

    q `(B, H, T, D)`, c `(B, S, T, D)`, p `(k, D)`, mask `(B, T)` -> out `(B, H, T, D)`, lse `(B, H, T)`, float32 or,
    of float64, float64.
    A slot outside the backbone has T equal keys `p_i`, computed as one key: the logarithm of the number of visible
    tokens is added to its score.
    """
    keys = _window_keys(q, c, p, window)
    scores, nothing = _window_scores(q, keys, window)
    out = (scores.softmax(-1) @ keys).masked_fill(nothing[..., None], 0)
    return out.to(q.dtype), scores.logsumexp(-1).masked_fill(nothing, -torch.inf)


def window_attention_backward_reference(
    dout: Tensor, q: Tensor, c: Tensor, p: Tensor, out: Tensor, lse: Tensor, window: Window, needs: Needs
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `window_attention`. Keys and probabilities are computed again.

    `K = C + p`, `P = exp(q K^T - lse)`, `dS = P (dout K^T - sum of dout * out over D)`, `dq = dS K`, and
    `dK = P^T dout + dS^T q`, summed over heads. dC is dK where dropout kept it, dp its sum over sentences and tokens.
    """
    need_dq, need_dc, need_dp = needs
    slots = list(window.slots)
    keys = _window_keys(q, c, p, window)
    scores, nothing = _window_scores(q, keys, window)
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
        dp[slots] = dreal.sum((0, 2)).to(p.dtype)
        dp[window.absent(p)] = dabsent.sum(0).to(p.dtype)
    if need_dc:
        dc = dreal.contiguous()
        window.drop_(dc)
        dc = dc.to(c.dtype)
    return dq, dc, dp


def _hidden_tokens(q: Tensor, window: Window) -> tuple[Tensor, ...]:
    """The tokens hidden from a query, bool `(B, T, T)`; the number it sees, `(B, T)`; whether it sees none, `(B, T)`.

    A query that sees none is computed on all tokens, so that its values are finite, and set to 0 later.
    """
    batch, _, tokens, _ = q.shape
    visible = window.visible(q).expand(batch, tokens, tokens)
    number = visible.sum(-1)
    nothing = number == 0
    return ~(visible | nothing[..., None]), number.clamp(min=1), nothing


def _window_keys(q: Tensor, c: Tensor, p: Tensor, window: Window) -> Tensor:
    """The keys of all heads, which are also the values: `(B, 1, S T + k - S, D)`, those of absent slots last."""
    compute = torch.promote_types(q.dtype, torch.float32)
    real, p = c.to(compute, copy=True, memory_format=torch.contiguous_format), p.to(compute)
    window.drop_(real)
    real = real + p[list(window.slots), None]
    return torch.cat((real.flatten(1, 2), p[window.absent(p)].expand(c.shape[0], -1, -1)), dim=1)[:, None]


def _window_scores(q: Tensor, keys: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """The scores `(B, H, T, S T + k - S)`, and whether a query sees no token, `(B, 1, T)`."""
    real = len(window.slots)
    hidden, number, nothing = _hidden_tokens(q, window)
    scores = q.to(keys.dtype) @ keys.mT
    of_real = scores[..., : real * q.shape[2]].masked_fill(hidden.repeat(1, 1, real)[:, None], -torch.inf)
    of_absent = scores[..., real * q.shape[2] :] + number.to(keys.dtype).log()[:, None, :, None]
    return torch.cat((of_real, of_absent), dim=-1), nothing[:, None]


_AT_ONCE = 2**18  # values of the keys of one call: with fewer, the overhead of a call is as large as its work


def window_attention_aten(q: Tensor, c: Tensor, p: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """As the reference, by PyTorch's fused attention, which holds one tile of the scores at a time."""
    if q.is_cuda:
        form = window_attention_composed if composed_holds(q) else window_attention_reference
        return form(q, c, p, window)
    keys = _fused_keys(q, c, p, window)
    rows = _rows(q, keys.dtype)
    if 0 in (rows.shape[2], keys.shape[2]):  # PyTorch divides by these
        return torch.zeros_like(q), q.new_full(q.shape[:-1], -torch.inf, dtype=keys.dtype)
    bias, nothing = _fused_bias(q, p, window, keys.dtype)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(rows, keys, keys, attn_mask=bias, scale=1.0)
    lse = lse.view(q.shape[:-1]).to(keys.dtype)
    if nothing is not None:  # PyTorch's out is 0 there, but so is its lse
        lse.masked_fill_(nothing, -torch.inf)
    return out.view(q.shape).to(q.dtype), lse


def window_attention_backward_aten(
    dout: Tensor, q: Tensor, c: Tensor, p: Tensor, out: Tensor, lse: Tensor, window: Window, needs: Needs
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference, on a CPU for a few sentences at a time, shared among threads.

    PyTorch returns the gradients of keys and of values in two tensors. For a few sentences both are small, and their
    sums overwrite keys that are no longer needed: allocating memory costs more time than this computation.
    """
    if q.is_cuda:
        form = window_attention_backward_composed if composed_holds(q) else window_attention_backward_reference
        return form(dout, q, c, p, out, lse, window, needs)
    keys = _fused_keys(q, c, p, window)
    rows, drows, of_out = (_rows(x, keys.dtype) for x in (q, dout, out))
    need_dq, need_dc, need_dp = needs
    slots = list(window.slots)
    if 0 in (*rows.shape, *keys.shape):  # PyTorch divides by some of these
        dq, dc, dp = (x.new_zeros(x.shape if needed else (0,)) for x, needed in zip((q, c, p), needs, strict=True))
        return dq, dc, dp
    bias, _ = _fused_bias(q, p, window, keys.dtype)
    lse = lse.masked_fill(lse.isneginf(), 0).to(keys.dtype).reshape(rows.shape[:3])  # as PyTorch's: 0 if none is seen
    dq = torch.empty_like(rows)
    dreal = keys.view(-1)[: c.numel()].view(c.shape)  # those of a sentence overwrite its own keys or earlier ones
    last = len(slots) * c.shape[2]  # the number of real keys
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
        dp[slots] = dreal.sum(2).sum(0).to(p.dtype)  # much faster than both dimensions at once
        dp[window.absent(p)] = dabsent.sum(0).to(p.dtype)
    if need_dc:
        _drop_(dreal, window)
        dc = dreal.to(c.dtype)
    return dq, dc, dp


def _drop_(c: Tensor, window: Window) -> None:
    """As `Window.drop_`, by whatever computes the op here."""
    if window.dropout > 0:
        assert window.seed is not None
        torch.ops.fastpeft.feature_dropout_(c, window.slots, window.dropout, int(window.seed), window.block)


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x `(B, H, T, D)` as `(B, 1, H T, D)`, dense: all heads see the same keys, so they are one head with more rows.

    The size H T is written out, since a -1 is ambiguous if another size is 0.
    """
    batch, heads, tokens, width = x.shape
    return x.to(dtype).reshape(batch, 1, heads * tokens, width).contiguous()


def _fused_keys(q: Tensor, c: Tensor, p: Tensor, window: Window) -> Tensor:
    """The keys, which are also the values: `(B, 1, S T + k - S, D)`, those of absent slots last, without a copy."""
    compute = torch.promote_types(q.dtype, torch.float32)
    batch, real, tokens, width = c.shape
    absent, p = window.absent(p), p.to(compute)
    keys = c.new_empty(batch, 1, real * tokens + len(absent), width, dtype=compute)
    of_real = keys[:, 0, : real * tokens].unflatten(1, (real, tokens))
    if window.dropout > 0:
        c = of_real.copy_(c)
        _drop_(c, window)
    torch.add(c, p[list(window.slots), None], out=of_real)
    keys[:, 0, real * tokens :] = p[absent]
    return keys


def _fused_bias(q: Tensor, p: Tensor, window: Window, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """The bias of the scores `(B, 1, H T, S T + k - S)`, and whether a query sees no token, `(B, H, T)`.

    The bias is the logarithm of the number of visible tokens that a key stands for. Sizes that make no difference are
    1. Both are None if all logarithms are 0.
    """
    real = len(window.slots)
    absent = p.shape[0] - real
    if window.mask is not None and window.mask.all():  # on a CPU this costs little
        window = window._replace(mask=None)
    if window.mask is None and not window.causal and absent == 0:
        return None, None
    visible = window.visible(q)
    number = visible.sum(-1, keepdim=True)
    of_real, of_absent = (count.to(dtype).log() for count in (visible, number))
    bias = torch.cat((*[of_real] * real, of_absent.expand(-1, -1, absent)), dim=-1)[:, None]
    if bias.shape[2] > 1:
        bias = bias.expand(-1, q.shape[1], -1, -1).flatten(1, 2)[:, None]
    return bias, (number == 0).mT


def _window_attention_shapes(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))


def _window_attention_backward_shapes(_: Tensor, q: Tensor, c: Tensor, p: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape if needed else (0,)) for x, needed in zip((q, c, p), others[-3:]))


def _forward(form: Callable[..., Any]) -> Callable[..., Any]:
    """A form of the op with the arguments of its schema."""

    def call(q: Tensor, c: Tensor, p: Tensor, *window: Any) -> Any:
        return form(q, c, p, Window(*window))

    return call


def _backward(form: Callable[..., Any]) -> Callable[..., Any]:
    """A form of the backward op with the arguments of its schema."""

    def call(
        dout: Tensor, q: Tensor, c: Tensor, p: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor, *others: Any
    ) -> Any:
        *window, need_dq, need_dc, need_dp = others
        return form(dout, q, c, p, out, lse, Window(mask, *window), (need_dq, need_dc, need_dp))

    return call


# out (B, H, T, D) in the dtype of q, and the log-sum-exp of the scores (B, H, T) in float32 or float64; the seed is one
# int64 on the device of q, which a replayed CUDA graph reads anew, None where nothing is dropped
define(
    "window_attention",
    "(Tensor q, Tensor c, Tensor p, Tensor? mask, int[] slots, bool causal, float dropout, Tensor? seed, int block) "
    "-> (Tensor, Tensor)",
    shapes=_window_attention_shapes,
    reference=_forward(window_attention_reference),
    aten=_forward(window_attention_aten),
)


# dq (B, H, T, D), dc (B, S, T, D), dp (k, D); an output that is not needed is a tensor of 0 elements
define(
    "window_attention_backward",
    "(Tensor dout, Tensor q, Tensor c, Tensor p, Tensor? mask, Tensor out, Tensor lse, int[] slots, bool causal, "
    "float dropout, Tensor? seed, int block, bool need_dq, bool need_dc, bool need_dp) -> (Tensor, Tensor, Tensor)",
    shapes=_window_attention_backward_shapes,
    reference=_backward(window_attention_backward_reference),
    aten=_backward(window_attention_backward_aten),
)


def _window_attention_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, c, p, mask, ctx.slots, ctx.causal, ctx.dropout, seed, ctx.block = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, c, p, mask, out, lse, seed)


def _window_attention_gradients(ctx: Any, dout: Tensor | None, _dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 9
    check_first_derivative("window_attention")
    needs = ctx.needs_input_grad[:3]
    *saved, seed = ctx.saved_tensors
    gradients = torch.ops.fastpeft.window_attention_backward(
        dout, *saved, ctx.slots, ctx.causal, ctx.dropout, seed, ctx.block, *needs
    )
    return (*(gradient if need else None for gradient, need in zip(gradients, needs)), *(None,) * 6)


torch.library.register_autograd(
    f"{NAMESPACE}::window_attention", _window_attention_gradients, setup_context=_window_attention_setup_context
)


@torch.library.register_vmap(f"{NAMESPACE}::window_attention")
def _window_attention_vmap(
    info: Any, in_dims: tuple[int | None, ...], q: Tensor, c: Tensor, p: Tensor, *arguments: Any
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """G attentions as one over G B rows, in which every slot is real and holds its own p.

    An absent slot becomes T equal keys. There is no dropout, since its noise depends on a row's place in the batch.
    """
    given = Window(*arguments)
    if given.dropout > 0:
        raise NotImplementedError("window_attention: torch.vmap supports no dropout. Set the networks to eval().")

    def stacked(x: Tensor, dim: int | None) -> Tensor:
        return x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)

    q, c, p = (stacked(x, dim) for x, dim in zip((q, c, p), in_dims))
    groups, batch, _, tokens, width = q.shape
    number = p.shape[1]
    window = p[:, None, :, None].expand(groups, batch, number, tokens, width).clone()
    window[:, :, given.slots] += c
    out, lse = torch.ops.fastpeft.window_attention(
        q.flatten(0, 1),
        window.flatten(0, 1),
        torch.zeros_like(p[0]),
        None if given.mask is None else stacked(given.mask, in_dims[3]).flatten(0, 1),
        list(range(number)),
        given.causal,
        0.0,
        None,
        given.block,
    )
    return (out.unflatten(0, (groups, batch)), lse.unflatten(0, (groups, batch))), (0, 0)


MAX_WINDOW = 15  # slots that the dropout's counters can tell apart, odd


def window_attention(
    q: Tensor,
    c: Tensor,
    p: Tensor,
    mask: Tensor | None = None,
    *,
    slots: Sequence[int] | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    seed: int | Tensor = 0,
    block: int = 0,
) -> Tensor:
    r"""Attention of T queries over the k * T keys of a window of features, without that window in memory.

    Keys and values are the same, `C~_i = dropout(C_i) + p_i` for the slots i = 0 .. k - 1, one after the other along
    the tokens: `out = softmax(q C~^T) C~`. A slot that is not in `slots` lies outside the backbone: its C is 0 before
    and after dropout, so its T keys all equal `p_i`.

    Args:
        q: `(B, H, T, D)`, scaled and, with projections of keys, folded: `theta Wq Wk^T / sqrt(head_dim)`.
        c: `(B, S, T, D)`, the projected features of the S real slots.
        p: `(k, D)`, a vector for every slot, real or not; k at most 15.
        mask: bool `(B, T)`, True for tokens and False for padding, which no query sees in any slot. None is all True.
        slots: which of the k slots the rows of c are, ascending. None where all are real (S = k).
        causal: whether a query sees, in every slot, only the tokens up to its own.
        dropout: probability in [0, 1) with which an element of c is dropped; what is kept is scaled by `1/(1 - p)`.
        seed: 0 to 2^63 - 1, of the dropout's noise. It may be an int64 tensor of one element on the device of q, read
            when the kernels run, unchecked: replaying a CUDA graph that captured them takes the value it holds by then.
        block: number of the side block, from 0, which with the slot selects the noise.

    All operands are brought to the dtype of q, under autocast to autocast's dtype.

    Returns:
        `(B, H, T, D)` in that dtype; 0 for a query that sees no token.

    Raises:
        FastpeftError: shapes do not fit, an operand is no floating number or on another device, or an argument is out
            of its range.

    Notes:
        Accumulates in float32 (float64 for float64). Differentiable in q, c and p. Saved for backward: the operands,
        the output and a log-sum-exp for each query; neither the T x k T scores nor what is dropped, which backward
        makes again. The dropped elements are a function of (seed, block, slot, position) alone. Where derivatives are
        taken forward or by `torch.func`, plain PyTorch computes, and a dropout above 0 is refused.

    Example:
        >>> q, c, p = torch.randn(2, 1, 5, 8), torch.randn(2, 3, 5, 8), torch.randn(3, 8)
        >>> window_attention(q, c, p).shape
        torch.Size([2, 1, 5, 8])
    """
    slots = range(p.shape[0]) if slots is None else slots
    if (
        q.dim() != 4
        or p.dim() != 2
        or c.shape != (q.shape[0], len(slots), *q.shape[2:])
        or p.shape[1] != q.shape[3]
        or (mask is not None and (mask.shape != (q.shape[0], q.shape[2]) or mask.dtype != torch.bool))
    ):
        raise FastpeftError(
            "window_attention takes q (B, H, T, D), c (B, S, T, D) with one row per real slot, p (k, D) and a bool "
            f"mask (B, T) or None; got q {tuple(q.shape)}, c {tuple(c.shape)}, p {tuple(p.shape)}, mask "
            f"{None if mask is None else (tuple(mask.shape), mask.dtype)} and {len(slots)} real slots."
        )
    if p.shape[0] > MAX_WINDOW or list(slots) != sorted({slot for slot in slots if 0 <= slot < p.shape[0]}):
        raise FastpeftError(
            f"window_attention: slots {list(slots)} of {p.shape[0]}; allowed are different slots of at most "
            f"{MAX_WINDOW}, from 0 and in ascending order."
        )
    if not 0 <= dropout < 1 or not _is_seed(seed, q.device) or not 0 <= block < 2**28:
        raise FastpeftError(
            f"window_attention: dropout is {dropout}, seed {seed} and block {block}; allowed are 0 <= dropout < 1, "
            "0 <= seed < 2^63 or an int64 tensor of one element on the device of q, and 0 <= block < 2^28."
        )
    check_kinds("window_attention", q.device, "q c p", q, c, p)
    if mask is not None and mask.device != q.device:
        raise FastpeftError(f"window_attention: mask is on {mask.device} and q on {q.device}; put them on one device.")
    dtype = compute_dtype(q, q)
    noise = None
    if dropout > 0:
        noise = seed if isinstance(seed, Tensor) else torch.full((), seed, dtype=torch.int64, device=q.device)
    by_torch_func = is_differentiated()  # for which the op has no formula
    if by_torch_func and dropout > 0:
        raise FastpeftError(
            f"window_attention: dropout is {dropout} where derivatives are taken forward or by torch.func; "
            "allowed is 0. Set the network to eval()."
        )
    q, c, p = (operand.to(dtype) for operand in (q, c, p))
    with no_autocast(q.device):  # which would undo the accumulation in float32
        if by_torch_func:
            return window_attention_reference(q, c, p, Window(mask, slots, causal, dropout, noise, block))[0]
        out, _ = torch.ops.fastpeft.window_attention(q, c, p, mask, list(slots), causal, dropout, noise, block)
    return out


def _is_seed(seed: int | Tensor, device: torch.device) -> bool:
    if isinstance(seed, Tensor):
        return seed.dtype == torch.int64 and seed.numel() == 1 and seed.device == device
    return not isinstance(seed, float) and 0 <= seed < 2**63
