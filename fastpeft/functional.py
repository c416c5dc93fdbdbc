"""Checked, documented functions over the ops."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastpeft.errors import FastpeftError
from fastpeft.ops import backends  # noqa: F401  (declares ops, registers their implementations)
from fastpeft.ops.dtypes import compute_dtype, factors_dtype
from fastpeft.ops.frozen_head_cross_entropy import loss_of_head
from fastpeft.ops.int8_linear import multiply
from fastpeft.ops.noise import NOISE
from fastpeft.ops.packing import Packs, operand
from fastpeft.ops.siva_linear import SivaLinear
from fastpeft.ops.siva_linear_group import SivaLinearGroup
from fastpeft.ops.siva_linear_mixed import SivaLinearMixed


def siva_linear(
    x: Tensor,
    weight: Tensor,
    u: Tensor,
    s: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    packs: Packs | None = None,
) -> Tensor:
    r"""Linear layer whose weight is a frozen part and a trained product of rank r.

    `h = x W^T + ((x V^T) * s) U^T + b`

    Args:
        x: `(*, in_features)`, float16, bfloat16, float32 or float64.
        weight: `(out_features, in_features)`, frozen: it must not require a gradient.
        u: `(out_features, r)`, trained.
        s: `(r,)`, frozen.
        v: `(r, in_features)`, trained.
        bias: `(out_features,)` or None.
        packs: the weight's packs, from which the products on a CPU are computed. None packs nothing.

    All operands are brought to the dtype of `weight`, under autocast to autocast's dtype. But the factors u, s and v of
    a computation in half precision (on a CPU, in bfloat16) are brought to float32, and a weight that is packed is cast
    once, not at each call.

    Returns:
        `(*, out_features)` in that dtype.

    Raises:
        FastpeftError: shapes do not fit, an operand is no floating number or on another device, or `weight` or `s`
            requires a gradient.

    Notes:
        Saved for backward: x and `p = x V^T` `(*, r)`, both only where U and V need gradients. Differentiable in
        x, u, v and bias. Gradients are deterministic: nothing is summed by atomics.

    Example:
        >>> x, w = torch.randn(3, 8), torch.randn(5, 8)
        >>> u, s, v = torch.randn(5, 2), torch.ones(2), torch.randn(2, 8)
        >>> siva_linear(x, w, u, s, v).shape
        torch.Size([3, 5])
    """
    _check_siva_linear(x, weight, u, s, v, bias)
    dtype = compute_dtype(x, weight)
    of_factors = factors_dtype(dtype, x.device)
    if x.dtype is not dtype:
        x = x.to(dtype)
    if bias is not None and bias.dtype is not dtype:
        bias = bias.to(dtype)
    if not (u.dtype is s.dtype is v.dtype is of_factors):
        u, s, v = _cast(of_factors, u, s, v)
    if torch.is_grad_enabled() and not torch.compiler.is_exporting():  # a graph to export has the op
        h: Tensor = SivaLinear.apply(x, weight, u, s, v, bias, packs)
    else:
        h, _ = torch.ops.fastpeft.siva_linear.default(x, operand(weight, packs, x), u, s, v, bias)
    return h


def siva_linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    ss: Sequence[Tensor],
    vs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    packs: Sequence[Packs | None] | None = None,
) -> tuple[Tensor, ...]:
    r"""Several `siva_linear` that read the same x, such as the query, key and value of an attention.

    `h_i = x W_i^T + ((x V_i^T) * s_i) U_i^T + b_i`

    Args:
        x: `(*, in_features)`.
        weights, us, ss, vs, biases, packs: one of each per layer, as `siva_linear` takes them; ranks and out_features
            may differ, the weights' dtype not.

    Returns:
        One `(*, out_features)` per layer, in the order given.

    Raises:
        FastpeftError: the numbers of operands or the weights' dtypes differ, or as `siva_linear` does.

    Notes:
        Saved for backward: x once, and `p = x V^T` of all layers in one `(sum of r, rows)`. The gradient of x is summed
        in one tensor, where autograd would make one for each layer and add them. Where an op has no grouped
        implementation each layer runs by itself.

    Example:
        >>> x, w = torch.randn(3, 8), torch.randn(5, 8)
        >>> u, s, v = torch.randn(5, 2), torch.ones(2), torch.randn(2, 8)
        >>> query, key = siva_linear_group(x, [w, -w], [u, u], [s, s], [v, v], [None, None])
        >>> key.shape
        torch.Size([3, 5])
    """
    packs = [None] * len(weights) if packs is None else packs
    operands = weights, us, ss, vs, biases
    if (
        not weights
        or len({len(each) for each in (*operands, packs)}) > 1
        or len({weight.dtype for weight in weights}) > 1
    ):
        raise FastpeftError(
            "siva_linear_group takes one weight, u, s, v and bias (or None) for each layer, at least one, with weights "
            f"of one dtype; got {', '.join(str(len(each)) for each in operands)} of them and weights of "
            f"{', '.join(sorted({str(weight.dtype) for weight in weights})) or 'no dtype'}."
        )
    for weight, u, s, v, bias in zip(weights, us, ss, vs, biases, strict=True):
        _check_siva_linear(x, weight, u, s, v, bias)
    dtype = compute_dtype(x, weights[0])
    x, *biases = _cast(dtype, x, *biases)
    factors = _cast(factors_dtype(dtype, x.device), *us, *ss, *vs)
    hs: tuple[Tensor, ...] = SivaLinearGroup.apply(packs, x, *weights, *factors, *biases)
    return hs


def siva_linear_mixed(
    x: Tensor,
    weight: Tensor,
    us: Sequence[Tensor],
    ss: Sequence[Tensor],
    vs: Sequence[Tensor],
    sizes: Sequence[int],
    order: Tensor | None = None,
    bias: Tensor | None = None,
    packs: Packs | None = None,
) -> Tensor:
    r"""`siva_linear` for a batch whose rows take different factors, as where they belong to different adapters.

    `h[b] = x[b] W^T + ((x[b] V_i^T) * s_i) U_i^T + b`, where row b of the batch takes the factors i

    Args:
        x: `(B, *, in_features)`.
        weight, bias, packs: as `siva_linear` takes them.
        us, ss, vs: one of each per adapter, as `siva_linear` takes them; ranks may differ, and be 0.
        sizes: how many rows take the factors of each adapter, B together.
        order: int64 `(B,)`, the permutation that brings the rows into the order of the adapters:
            `order[:sizes[0]]` are the numbers of the rows of the first, and so on. None where they stand in it. On a
            card its values are read by the kernels alone, unchecked: what is no permutation has no defined result.

    Returns:
        `(B, *, out_features)`, in the order of x.

    Raises:
        FastpeftError: the numbers of operands or of rows do not fit, or as `siva_linear` does.

    Notes:
        The product with the weight runs once over all rows. Those of rank r are added where the rows lie, in C++ by
        one pass, in Triton by the same kernel. Without either they run over the rows of one adapter after the other,
        and rows in another order than the adapters' cost a copy of x and one of h. Saved for
        backward: x, and p of each adapter that trains. Gradients are deterministic.

    Example:
        >>> x, w = torch.randn(3, 8), torch.randn(5, 8)
        >>> u, s, v = torch.randn(5, 2), torch.ones(2), torch.randn(2, 8)
        >>> siva_linear_mixed(x, w, [u, -u], [s, s], [v, v], sizes=[1, 2], order=torch.tensor([2, 0, 1])).shape
        torch.Size([3, 5])
    """
    factors, rows = (us, ss, vs), x.shape[0] if x.dim() > 1 else -1
    fits = len(us) > 0 and {len(each) for each in factors} == {len(sizes)} and sum(sizes) == rows and min(sizes) >= 0
    of_order = (order.dtype, tuple(order.shape), order.device) if order is not None else None
    if not fits or of_order not in (None, (torch.int64, (rows,), x.device)):
        raise FastpeftError(
            "siva_linear_mixed takes x (B, *, K), one u, s, v and number of rows for each adapter, at least one, whose "
            f"sum is B, and an int64 order (B,) on the device of x, or None; got x {tuple(x.shape)}, {len(us)} u, "
            f"{len(ss)} s, {len(vs)} v, sizes {list(sizes)} and order {of_order}."
        )
    for u, s, v in zip(*factors, strict=True):
        _check_siva_linear(x, weight, u, s, v, bias)
    dtype = compute_dtype(x, weight)
    x, bias = _cast(dtype, x, bias)
    cast = _cast(factors_dtype(dtype, x.device), *us, *ss, *vs)
    h: Tensor = SivaLinearMixed.apply(packs, list(sizes), order, x, weight, bias, *cast)
    return h


def _cast(dtype: torch.dtype, *tensors: Any) -> list[Any]:
    return [t if t is None or t.dtype is dtype else t.to(dtype) for t in tensors]


def _check_siva_linear(x: Tensor, weight: Tensor, u: Tensor, s: Tensor, v: Tensor, bias: Tensor | None) -> None:
    n, k = weight.shape if weight.dim() == 2 else (-1, -1)
    r = s.shape[0] if s.dim() == 1 else -1
    fits = x.dim() > 0 and x.shape[-1] == k and u.shape == (n, r) and v.shape == (r, k)
    if not fits or (bias is not None and bias.shape != (n,)):
        raise FastpeftError(
            "siva_linear takes x (*, K), weight (N, K), u (N, r), s (r,), v (r, K) and bias (N,) or None; got x "
            f"{tuple(x.shape)}, weight {tuple(weight.shape)}, u {tuple(u.shape)}, s {tuple(s.shape)}, v "
            f"{tuple(v.shape)}, bias {None if bias is None else tuple(bias.shape)}."
        )
    _check_kinds("siva_linear", x.device, "x weight u s v bias", x, weight, u, s, v, bias)
    if weight.requires_grad or s.requires_grad:
        raise FastpeftError(
            "siva_linear: weight and s are frozen by definition but "
            f"{'weight' if weight.requires_grad else 's'} requires a gradient; call requires_grad_(False) on it."
        )


def int8_linear(x: Tensor, codes: Tensor, scales: Tensor, sums: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""A linear layer whose weight is codes of 8 bits, multiplied as integers; for what asks for no gradient.

    `h = a_m w_n (q codes^T - z_m sums) + b`, where row m of x is `a_m (q - z_m)` to rounding: 255 even steps from its
    smallest value to its largest, 0 among them.

    Args:
        x: `(*, in_features)`, a floating dtype.
        codes: int8 `(out_features, in_features)`; `codes * scales` is the weight.
        scales: float32 `(out_features,)` or `(out_features, 1)`.
        sums: int32 `(out_features,)`, the sums of the rows of codes.
        bias: `(out_features,)` or None.

    Returns:
        `(*, out_features)` in the dtype of x, under autocast in that of autocast. A row of x that is not finite gives
        NaN. No gradient flows through it.

    Raises:
        FastpeftError: shapes or dtypes do not fit, or operands are on several devices.

    Notes:
        Integers are added exactly, so every implementation gives the same bits. On a CPU PyTorch multiplies (oneDNN, by
        VNNI or AMX), and C++ makes codes of a block of rows and numbers of its sums while they are in cache.

    Example:
        >>> codes = torch.randint(-127, 128, (5, 8), dtype=torch.int8)
        >>> int8_linear(torch.randn(3, 8), codes, torch.ones(5), codes.sum(1, dtype=torch.int32)).shape
        torch.Size([3, 5])
    """
    n, k = codes.shape if codes.dim() == 2 else (-1, -1)
    kinds = codes.dtype, scales.dtype, sums.dtype
    fits = x.dim() > 0 and x.shape[-1] == k and scales.shape in ((n,), (n, 1)) and sums.shape == (n,)
    if not fits or (bias is not None and bias.shape != (n,)) or kinds != (torch.int8, torch.float32, torch.int32):
        raise FastpeftError(
            "int8_linear takes x (*, K), int8 codes (N, K), float32 scales (N,) or (N, 1), int32 sums (N,) and bias "
            f"(N,) or None; got x {tuple(x.shape)}, {codes.dtype} codes {tuple(codes.shape)}, {scales.dtype} scales "
            f"{tuple(scales.shape)}, {sums.dtype} sums {tuple(sums.shape)} and bias "
            f"{None if bias is None else tuple(bias.shape)}."
        )
    _check_kinds("int8_linear", x.device, "x scales bias", x, scales, bias)
    if codes.device != x.device or sums.device != x.device:
        raise FastpeftError(
            f"int8_linear: x is on the device {x.device}, codes on {codes.device} and sums on {sums.device}; put all "
            "on one."
        )
    return multiply(x, codes, scales, sums, bias)


def frozen_head_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r"""The cross entropy of a decoder to words that does not train, without its logits in memory.

    `F.cross_entropy(hidden W^T + b, labels)`, of which N x V logits and their gradient never exist at one time.

    Args:
        hidden: `(*, K)`, the states that the decoder reads.
        weight: `(V, K)`, frozen: it requires no gradient, but under `torch.no_grad` it may. Not a quantised one, which
            has no rows to multiply by.
        labels: int64 `(*)`, 0 to V - 1, or `ignore_index`. A label for the next token is shifted by the caller.
        bias: `(V,)` or None; frozen.
        ignore_index: the label of tokens without a loss. They are left out before the first product.
        reduction: "mean" over the tokens that are not ignored (NaN where all are), "sum" or "none".

    All operands are brought to the dtype of `weight`, under autocast to autocast's dtype.

    Returns:
        float32, float64 for float64: a scalar, or with "none" the losses `(*)`, 0 where the label is ignored.

    Raises:
        FastpeftError: shapes do not fit, an operand is of another kind or on another device, `weight` or `bias`
            requires a gradient, or a second derivative is asked for.

    Notes:
        Works by chunks of tokens with all words: 2^22 logits, but at least 128 tokens on a CPU and 256 on a card, whose
        products need that many. Losses are in float32. Where hidden requires a gradient, this is made in the same pass
        and saved for backward, as many bytes as hidden; without gradients, as in MeZO, the losses alone. On a CPU
        without instructions for half precision the products run in float32, with a copy of 2^22 numbers of the weight
        at a time. A label outside the vocabulary raises on a CPU; on a card its loss is NaN or an assertion fails.
        Deterministic.

    Example:
        >>> hidden, weight = torch.randn(2, 5, 8), torch.randn(100, 8)
        >>> labels = torch.randint(100, (2, 5))
        >>> frozen_head_cross_entropy(hidden, weight, labels).shape
        torch.Size([])
    """
    v, k = weight.shape if weight.dim() == 2 else (-1, -1)
    fits = hidden.dim() > 0 and hidden.shape[-1] == k and labels.shape == hidden.shape[:-1]
    if not fits or labels.dtype != torch.int64 or (bias is not None and bias.shape != (v,)):
        raise FastpeftError(
            "frozen_head_cross_entropy takes hidden (*, K), weight (V, K), int64 labels (*) and bias (V,) or None; got "
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, {labels.dtype} labels {tuple(labels.shape)} "
            f"and bias {None if bias is None else tuple(bias.shape)}."
        )
    if reduction not in ("mean", "sum", "none"):
        raise FastpeftError(
            f"frozen_head_cross_entropy: reduction is {reduction!r}; allowed are 'mean', 'sum' and 'none'."
        )
    _check_kinds("frozen_head_cross_entropy", hidden.device, "hidden weight bias", hidden, weight, bias)
    if labels.device != hidden.device:
        raise FastpeftError(
            f"frozen_head_cross_entropy: labels are on the device {labels.device} and hidden on {hidden.device}; put "
            "them on one."
        )
    trained = [name for name, t in (("weight", weight), ("bias", bias)) if t is not None and t.requires_grad]
    if trained and torch.is_grad_enabled():
        raise FastpeftError(
            f"frozen_head_cross_entropy: weight and bias are frozen by definition but {trained[0]} requires a "
            "gradient; call requires_grad_(False) on it, or take F.cross_entropy of the logits."
        )
    return loss_of_head(hidden, weight, labels, bias, ignore_index, reduction)


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _check_kinds(op: str, device: torch.device, names: str, *operands: Tensor | None) -> None:
    """Refuse what a cast would cut to whole or real numbers in silence, and tensors that no kernel reads together."""
    for i, tensor in enumerate(operands):
        if tensor is not None and (tensor.dtype not in _FLOATS or tensor.device != device):
            raise FastpeftError(
                f"{op}: {names.split()[i]} is {tensor.dtype} on {tensor.device}; allowed are float16, bfloat16, "
                f"float32 and float64, all on one device, here {device}. Cast it, dequantise it or move it."
            )


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
        makes again. The dropped elements are a function of (seed, block, slot, position) alone.

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
    is_seed = _is_seed_on(seed, q.device) if isinstance(seed, Tensor) else 0 <= seed < 2**63
    if not 0 <= dropout < 1 or not is_seed or not 0 <= block < 2**28:
        raise FastpeftError(
            f"window_attention: dropout is {dropout}, seed {seed} and block {block}; allowed are 0 <= dropout < 1, "
            "0 <= seed < 2^63 or an int64 tensor of one element on the device of q, and 0 <= block < 2^28."
        )
    _check_kinds("window_attention", q.device, "q c p", q, c, p)
    if mask is not None and mask.device != q.device:
        raise FastpeftError(f"window_attention: mask is on {mask.device} and q on {q.device}; put them on one device.")
    dtype = compute_dtype(q, q)
    noise = None
    if dropout > 0:
        noise = seed if isinstance(seed, Tensor) else torch.full((), seed, dtype=torch.int64, device=q.device)
    with torch.autocast(q.device.type, enabled=False):  # which would undo the accumulation in float32
        out, _ = torch.ops.fastpeft.window_attention(
            q.to(dtype), c.to(dtype), p.to(dtype), mask, list(slots), causal, dropout, noise, block
        )
    return out


def _is_seed_on(seed: Tensor, device: torch.device) -> bool:
    return seed.dtype == torch.int64 and seed.numel() == 1 and seed.device == device


def mezo_perturb_(
    params: Sequence[Tensor],
    offsets: Sequence[int],
    seeds: Sequence[int] | Tensor,
    scales: Sequence[float] | Tensor,
    decay: float = 0.0,
    noise: str = "gaussian",
    rounding: str = "nearest",
) -> None:
    r"""Add seeded noise to parameters in place; z is made where it is used and never stored.

    For each term (seed, scale) in order: `p <- (1 - decay) * p + scale * z(seed, offset + e)`, decay with the first
    term only. e counts the parameter's elements in C order of its shape, whatever its strides.

    Args:
        params: float16, bfloat16, float32 or float64, any strides, no two sharing memory.
        offsets: one per parameter, from 0: where its elements stand in the noise.
        seeds: one per term, 0 to 2^63 - 1.
        scales: one per term; rounded once to float32 (not for float64 parameters).
        decay: weight decay of this update, for instance learning rate times weight decay; default 0.
        noise: "gaussian" (standard normal) or "rademacher" (+1 or -1, each with probability a half).
        rounding: to the storage dtype, "nearest" (even) or "stochastic" (unbiased; half precision only, float32 and
            float64 are stored as computed).

    Seeds and scales may be tensors on the parameters' device, int64 and float64 `(n,)`, both or neither. They are read
    when the pass runs, unchecked: replaying a CUDA graph that captured it takes the values they hold by then.

    Raises:
        FastpeftError: lengths differ, an argument is out of its range, or tensors overlap in memory.

    Notes:
        z depends on (seed, flat index) alone: the same bits on every device, in every dtype, whatever the threads or
        the order of the parameters. Each term is rounded to storage before the next. Autograd sees new versions of the
        parameters and no gradient.

    Example:
        >>> weight = torch.zeros(2, 3)
        >>> mezo_perturb_([weight], [0], seeds=[7], scales=[1e-3])
        >>> mezo_perturb_([weight], [0], seeds=[7], scales=[-1e-3])
        >>> weight.abs().max().item()
        0.0
    """
    if isinstance(seeds, Tensor) or isinstance(scales, Tensor):
        _check_terms_on_device(params, seeds, scales)
        _check_perturbation(params, offsets, [0] * len(seeds), [0.0] * len(scales), decay, noise, rounding)
        _check_no_overlap(params, seeds, scales)  # type: ignore[arg-type]
        perturb, terms = torch.ops.fastpeft.mezo_perturb_replay_, (seeds, scales)
    else:
        _check_perturbation(params, offsets, seeds, scales, decay, noise, rounding)
        _check_no_overlap(params)
        perturb, terms = torch.ops.fastpeft.mezo_perturb_, (list(seeds), list(scales))
    with torch.no_grad():
        # a list goes to what is registered for one of its kinds of devices, which may pass over the others
        kinds = dict.fromkeys(param.device.type for param in params)
        for kind in kinds:
            here = [i for i, param in enumerate(params) if len(kinds) == 1 or param.device.type == kind]
            perturb([params[i] for i in here], [offsets[i] for i in here], *terms, decay, noise, rounding)
    torch.autograd.graph.increment_version(params)


def mezo_perturb(
    param: Tensor,
    offset: int,
    seeds: Sequence[int],
    scales: Sequence[float],
    decay: float = 0.0,
    noise: str = "gaussian",
    rounding: str = "nearest",
) -> Tensor:
    """A perturbed copy of one parameter, which itself stays as it is.

    Args and Raises are those of `mezo_perturb_`. The copy has the parameter's shape, dtype and, where they are dense,
    strides; no gradient flows through it.

    Example:
        >>> weight = torch.zeros(2, 3)
        >>> mezo_perturb(weight, 0, seeds=[7], scales=[1.0]).shape
        torch.Size([2, 3])
    """
    _check_perturbation([param], [offset], seeds, scales, decay, noise, rounding)
    with torch.no_grad():
        return torch.ops.fastpeft.mezo_perturb(param, offset, list(seeds), list(scales), decay, noise, rounding)


_ROUNDINGS = ("nearest", "stochastic")


def _check_perturbation(
    params: Sequence[Tensor],
    offsets: Sequence[int],
    seeds: Sequence[int],
    scales: Sequence[float],
    decay: float,
    noise: str,
    rounding: str,
) -> None:
    if len(params) != len(offsets) or len(seeds) != len(scales):
        raise FastpeftError(
            f"mezo_perturb takes one offset per parameter and one scale per seed; got {len(params)} parameters with "
            f"{len(offsets)} offsets, and {len(seeds)} seeds with {len(scales)} scales."
        )
    for param in params:
        if param.dtype not in _FLOATS or param.layout != torch.strided:
            raise FastpeftError(
                f"mezo_perturb got a parameter of {param.dtype} and {param.layout}; allowed are dense float16, "
                "bfloat16, float32 and float64. Leave quantised and integer tensors out of the trained parameters."
            )
    for integer in (*offsets, *seeds):
        if not 0 <= integer < 2**63:
            raise FastpeftError(f"mezo_perturb: an offset or seed is {integer}; allowed are 0 to 2^63 - 1.")
    for number in (*scales, decay):
        if not abs(number) <= torch.finfo(torch.float32).max:  # NaN fails this too
            raise FastpeftError(
                f"mezo_perturb: a scale or decay is {number}; allowed are finite float32 numbers. A loss that is not "
                "finite gives such a step: skip it or lower the learning rate."
            )
    if decay and not seeds:
        raise FastpeftError(
            f"mezo_perturb: decay is {decay} and there is no term, with the first of which it goes. Give a term; one "
            "of scale 0 adds nothing."
        )
    if noise not in NOISE:
        raise FastpeftError(f"mezo_perturb: noise is {noise!r}; allowed are {', '.join(NOISE)}.")
    if rounding not in _ROUNDINGS:
        raise FastpeftError(f"mezo_perturb: rounding is {rounding!r}; allowed are {', '.join(_ROUNDINGS)}.")


def _check_terms_on_device(params: Sequence[Tensor], seeds: object, scales: object) -> None:
    for name, given, dtype in (("seeds", seeds, torch.int64), ("scales", scales, torch.float64)):
        if not isinstance(given, Tensor) or given.dtype != dtype or given.dim() != 1 or not given.is_contiguous():
            what = f"{given.dtype} of shape {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
            raise FastpeftError(
                f"mezo_perturb_: {name} is {what}; where a term is in tensors, allowed are int64 seeds and float64 "
                "scales, both contiguous and of one dimension."
            )
        if any(param.device != given.device for param in params):
            raise FastpeftError(
                f"mezo_perturb_: {name} is on {given.device} and a parameter is not; put terms and parameters on one "
                "device."
            )
    if seeds.shape != scales.shape:  # type: ignore[attr-defined]
        raise FastpeftError("mezo_perturb_ takes one scale per seed; the tensors of seeds and scales differ in length.")


def _check_no_overlap(params: Sequence[Tensor], *terms: Tensor) -> None:
    """An element reached twice would be perturbed twice, by two values of z; a term must stay what it is."""
    ranges: dict[torch.device, list[tuple[int, int, int]]] = {}
    for index, param in enumerate((*params, *terms)):
        if param.numel() == 0 or param.is_meta:
            continue
        extent = 1  # elements from the first to the last in memory
        for stride, size in sorted(zip(param.stride(), param.shape)):
            if size > 1 and stride < extent:
                raise FastpeftError(
                    f"mezo_perturb_: parameter {index} of shape {tuple(param.shape)} and strides {param.stride()} "
                    "reaches some of its own elements twice; pass a contiguous copy."
                )
            extent += (size - 1) * stride
        start = param.data_ptr()
        ranges.setdefault(param.device, []).append((start, start + extent * param.element_size(), index))
    for spans in ranges.values():
        spans.sort()
        for (_, end, one), (start, _, other) in itertools.pairwise(spans):
            if start < end:
                if max(one, other) >= len(params):
                    raise FastpeftError(
                        "mezo_perturb_: seeds, scales and parameters share memory; pass copies of the terms."
                    )
                raise FastpeftError(
                    f"mezo_perturb_: parameters {one} and {other} share memory or interleave in it; pass tied weights "
                    "once, and of a tensor either the whole or its views that do not cross."
                )
