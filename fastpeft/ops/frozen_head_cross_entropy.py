"""`fastpeft::frozen_head_cross_entropy`: the cross entropy of a frozen LM head, without its logits in memory.

Dimension letters: N tokens (all leading dimensions together), K hidden size, V words of the vocabulary.

    logits = hidden W^T + b        losses = log sum of exp(logits) - logits[label]
    dhidden = (softmax(logits) - onehot(label)) W, the gradient of each token's loss by its own hidden state

The weight is frozen, so dhidden is all that backward needs. It is made in the same pass, while a chunk of the logits is
there, and backward only multiplies it by what arrives. A chunk is a few hundred tokens with all words: both products
then run once, 4 N K V operations, as those of the plain form do. Chunks of words too would need all words' sums before
the first gradient, and so the logits twice: 6 N K V.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastpeft.errors import FastpeftError
from fastpeft.ops.define import NAMESPACE, check_first_derivative, define, is_captured, is_transformed
from fastpeft.ops.dtypes import check_kinds, compute_dtype, no_autocast
from fastpeft.ops.products import as_matrix, multiplies_in_float32

# Numbers of a chunk of logits, but it has at least so many tokens. With fewer, reading the weight takes longer than the
# product: an H100 does 295 operations while it reads one byte, a consumer's GPU about 200, one core of a CPU 10.
CHUNK = 2**22
FEWEST_TOKENS = {"cpu": 128, "cuda": 256}


def loss_of_head(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, ignore_index: int, reduction: str
) -> Tensor:
    """`functional.frozen_head_cross_entropy` of operands that fit."""
    dtype = compute_dtype(hidden, weight)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    need_dhidden = torch.is_grad_enabled() and hidden.requires_grad
    with no_autocast(hidden.device):  # which would undo the sums in float32
        losses: Tensor
        if is_transformed():  # what the op has no formula for
            losses, _ = frozen_head_cross_entropy_reference(hidden, weight, labels, bias, ignore_index, False)
        else:
            losses, _ = torch.ops.fastpeft.frozen_head_cross_entropy(
                hidden, weight.detach(), labels, None if bias is None else bias.detach(), ignore_index, need_dhidden
            )
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    count = (labels != ignore_index).sum()
    # of no token NaN, as F.cross_entropy, with a gradient of 0
    return torch.where(count > 0, losses.sum() / count.clamp_min(1), torch.nan)


# (logits (n, V), labels (n,), bias, gradient) -> losses (n,); with gradient it overwrites logits by softmax - onehot
Softmax = Callable[[Tensor, Tensor, Tensor | None, bool], Tensor]


def frozen_head_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, ignore_index: int, need_dhidden: bool
) -> tuple[Tensor, Tensor]:
    """Losses `(*)` in float32 or wider, 0 where the label is ignored, and dhidden `(*, K)`."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = F.linear(as_matrix(hidden), weight, bias).to(wide)  # (N, V)
    flat = labels.reshape(-1)
    losses = F.cross_entropy(logits, flat, reduction="none", ignore_index=ignore_index)
    dhidden = hidden.new_empty(0)
    if need_dhidden:
        counted = flat != ignore_index
        onehot = torch.arange(logits.shape[1], device=flat.device) == flat[:, None]
        dlogits = logits.softmax(1).sub_(onehot.to(wide)).masked_fill(~counted[:, None], 0)
        dhidden = (dlogits.to(weight.dtype) @ weight).view(hidden.shape)
    return losses.view(labels.shape), dhidden


def frozen_head_cross_entropy_aten(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, ignore_index: int, need_dhidden: bool
) -> tuple[Tensor, Tensor]:
    """By chunks, whose softmax works in place."""
    return in_chunks(hidden, weight, labels, bias, ignore_index, need_dhidden, softmax_in_place)


def in_chunks(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    need_dhidden: bool,
    softmax: Softmax,
) -> tuple[Tensor, Tensor]:
    """The op, with `softmax` for what is between its two products. Tokens whose label is ignored are left out."""
    rows, flat = as_matrix(hidden), labels.reshape(-1)
    losses = rows.new_zeros(len(flat), dtype=torch.promote_types(rows.dtype, torch.float32))
    dhidden = torch.zeros_like(rows, memory_format=torch.contiguous_format) if need_dhidden else rows.new_empty(0)
    ignored = flat == ignore_index
    kept = None  # all: a captured graph has the same tokens at each replay
    if is_captured():
        flat = flat.masked_fill(ignored, 0)
    else:
        kept = ignored.logical_not_().nonzero().squeeze(1)
        if len(kept) == len(flat):
            kept = None
    in_float32 = multiplies_in_float32(rows, most=0)
    dtype = torch.float32 if in_float32 else rows.dtype
    chunks = list(_chunks(rows, weight.shape[0], kept))
    logits = rows.new_empty(len(flat[chunks[0]]) if chunks else 0, weight.shape[0], dtype=dtype)
    for chunk in chunks:
        of_chunk = rows[chunk].to(dtype)
        z = logits[: len(of_chunk)]
        for words, block in _blocks(weight, in_float32):
            torch.mm(of_chunk, block.t(), out=z[:, words])
        losses[chunk] = softmax(z, flat[chunk], bias, need_dhidden)
        if need_dhidden:
            dx = torch.zeros_like(of_chunk)
            for words, block in _blocks(weight, in_float32):
                dx.addmm_(z[:, words], block)
            dhidden[chunk] = dx.to(rows.dtype)
    if kept is None and is_captured():
        losses.masked_fill_(ignored, 0)
        dhidden = dhidden.masked_fill_(ignored[:, None], 0) if need_dhidden else dhidden
    return losses.view(labels.shape), dhidden.view(hidden.shape) if need_dhidden else dhidden


def tokens_of_chunk(vocabulary: int, device: torch.device) -> int:
    """How many tokens have their logits in memory at one time."""
    return max(FEWEST_TOKENS.get(device.type, 256), CHUNK // max(vocabulary, 1))


def bytes_of_chunk(hidden: Tensor, weight: Tensor) -> int:
    """What the op allocates inside itself: the logits of a chunk, and copies in float32.

    Triton makes none. ATen copies the logits of a chunk, or where it multiplies in float32 two blocks of the weight.
    """
    tokens = min(hidden.shape[:-1].numel(), tokens_of_chunk(len(weight), hidden.device))
    logits = tokens * len(weight)
    if multiplies_in_float32(hidden, most=0):
        return 4 * (logits + min(weight.numel(), 2 * max(CHUNK, weight.shape[1])))
    dtypes = {hidden.dtype} if hidden.is_cuda else {hidden.dtype, torch.promote_types(hidden.dtype, torch.float32)}
    return logits * sum(dtype.itemsize for dtype in dtypes)


def _chunks(rows: Tensor, vocabulary: int, kept: Tensor | None) -> Iterator[slice | Tensor]:
    """Indices of tokens: slices where all are kept."""
    size = tokens_of_chunk(vocabulary, rows.device)
    for start in range(0, len(rows) if kept is None else len(kept), size):
        yield slice(start, start + size) if kept is None else kept[start : start + size]


def _blocks(weight: Tensor, in_float32: bool) -> Iterator[tuple[slice, Tensor]]:
    """The weight's rows as they are multiplied: all, or float32 copies of one block after the other."""
    if not in_float32:
        yield slice(None), weight
        return
    size = max(1, CHUNK // max(weight.shape[1], 1))
    for start in range(0, weight.shape[0], size):
        words = slice(start, start + size)
        yield words, weight[words].float()


def softmax_in_place(logits: Tensor, labels: Tensor, bias: Tensor | None, gradient: bool) -> Tensor:
    """`Softmax` by calls of ATen, in float32 or wider."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if bias is not None:
        z.add_(bias)
    at = labels[:, None]
    z.sub_(z.amax(1, keepdim=True))
    of_label = z.gather(1, at)
    z.exp_()
    total = z.sum(1, keepdim=True)
    if gradient:
        z.div_(total)
        z.scatter_(1, at, z.gather(1, at) - 1)
        if z is not logits:
            logits.copy_(z)
    return (total.log_() - of_label).squeeze(1)


def _shapes(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, ignore_index: int, need_dhidden: bool
) -> tuple[Tensor, Tensor]:
    losses = hidden.new_empty(labels.shape, dtype=torch.promote_types(hidden.dtype, torch.float32))
    return losses, hidden.new_empty(hidden.shape if need_dhidden else (0,))


# losses (*), float32 or wider, and dhidden (*, K), without an element where it is not needed
define(
    "frozen_head_cross_entropy",
    "(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, int ignore_index, bool need_dhidden) "
    "-> (Tensor, Tensor)",
    shapes=_shapes,
    reference=frozen_head_cross_entropy_reference,
    aten=frozen_head_cross_entropy_aten,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, dhidden = output
    ctx.is_made = inputs[-1]
    ctx.mark_non_differentiable(dhidden)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(dhidden)


def _gradients(ctx: Any, dlosses: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dlosses is None:
        return (None,) * 6
    check_first_derivative("frozen_head_cross_entropy")
    assert ctx.is_made, "frozen_head_cross_entropy was called with need_dhidden=False"
    (dhidden,) = ctx.saved_tensors
    # dlosses are float32 or wider: rounded to half precision 1 / N may be subnormal
    return torch.mul(dhidden, dlosses[..., None], out=torch.empty_like(dhidden)), *(None,) * 5


torch.library.register_autograd(f"{NAMESPACE}::frozen_head_cross_entropy", _gradients, setup_context=_setup_context)


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
