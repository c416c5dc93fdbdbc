"""Products with weights that never train: a linear layer in int8, and a head of words with its loss."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpeft.errors import FastpeftError
from fastpeft.functional.checks import check_kinds
from fastpeft.ops.frozen_head_cross_entropy import loss_of_head
from fastpeft.ops.int8_linear import MOST_FEATURES, multiply


def int8_linear(x: Tensor, codes: Tensor, scales: Tensor, sums: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""A linear layer whose weight is codes of 8 bits, multiplied as integers; for what asks for no gradient.

    `h = a_m w_n (q codes^T - z_m sums) + b`, where row m of x is `a_m (q - z_m)` to rounding: 255 even steps from its
    smallest value to its largest, 0 among them.

    Args:
        x: `(*, in_features)`, a floating dtype; a CPU computes others than float32 and bfloat16 in float32.
        codes: int8 `(out_features, in_features)`; `codes * scales` is the weight. At most 65793 in_features: of more,
            a sum may not fit into 32 bits.
        scales: float32 `(out_features,)` or `(out_features, 1)`.
        sums: int32 `(out_features,)`, the sums of the rows of codes.
        bias: `(out_features,)` or None.

    Returns:
        `(*, out_features)` in the dtype of x, under autocast in that of autocast. A row of x that is not finite gives
        NaN. No gradient flows through it.

    Raises:
        FastpeftError: shapes or dtypes do not fit, in_features are too many, or operands are on several devices.

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
    if k > MOST_FEATURES:
        raise FastpeftError(
            f"int8_linear: x has {k} features, whose sum may pass 32 bits; allowed are at most {MOST_FEATURES}. Add up "
            "the products of parts of x and codes, or multiply by `codes * scales`."
        )
    check_kinds("int8_linear", x.device, "x scales bias", x, scales, bias)
    if codes.device != x.device or sums.device != x.device:
        raise FastpeftError(
            f"int8_linear: x is on the device {x.device}, codes on {codes.device} and sums on {sums.device}; put all "
            "on one."
        )
    with torch.no_grad():
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
    r"""The cross entropy of an LM head that does not train, without its logits in memory.

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
        Works by chunks of tokens with all words: 2^22 logits, but at least 128 tokens on a CPU and 256 on a GPU, whose
        products need that many. Losses are in float32. Where hidden requires a gradient, this is made in the same pass
        and saved for backward, as many bytes as hidden; without gradients, as in MeZO, the losses alone. On a CPU
        without instructions for half precision the products run in float32, with a copy of 2^22 numbers of the weight
        at a time. A label outside the vocabulary raises on a CPU; on a GPU its loss is NaN or an assertion fails.
        Deterministic. Under a transform of `torch.func`, such as `jvp`, all logits exist.

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
    check_kinds("frozen_head_cross_entropy", hidden.device, "hidden weight bias", hidden, weight, bias)
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
