"""The part of a SiVA adapter that trains: the change of its factors."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastpeft.ops.dtypes import keeping_dtypes

Start = Literal["zero", "random", "empty"]

_LEAST = 0.1  # of the largest singular value; smaller ones count as this, or the product dU dV would have no bound

_RANK = 4  # at which `SPECTRAL_STEP` was chosen; more triplets share it


class Change(nn.Module):
    """The trained change of a factor: `U = U0 + dU diag(a)`, or `V = V0 + diag(a) dV`.

    Args:
        initial: the factor that changes, U0 `(N, r)` or V0 `(r, K)`.
        start: `"zero"`; `"random"`, about as large as the factor itself; or `"empty"`, NaN until a file fills it.
        scale: a, float32, of a shape that multiplies `initial`; None for 1.

    Attributes:
        weight: the change, of the shape and dtype of `initial`; it trains.
        scale: a, which stays in float32 whatever dtype the module is cast to.

    Notes:
        It is a module that is called, not a tensor that is read, so that libraries that shard parameters and gather
        them for a module's call do so here too. Only `scale` is saved for backward.
    """

    scale: Tensor | None

    def __init__(self, initial: Tensor, start: Start, scale: Tensor | None) -> None:
        super().__init__()
        value = torch.zeros_like(initial)
        if start == "random":
            bound = max(initial.shape) ** -0.5  # the root mean square of an entry of a singular vector
            value.uniform_(-bound, bound)
            value = weight_of(initial + value, initial, scale)
        elif start == "empty":
            value.fill_(float("nan"))
        self.weight = nn.Parameter(value)
        self.register_buffer("scale", scale)

    def forward(self, initial: Tensor) -> Tensor:
        return plus(initial, self.weight, self.scale)

    def is_empty(self) -> bool:
        """Whether no file has filled it yet."""
        return self.weight.device.type != "meta" and bool(self.weight.isnan().all())

    def _apply(self, fn: Any, recurse: bool = True) -> Change:
        super()._apply(fn if self.scale is None else keeping_dtypes(fn, [self.scale]), recurse)
        return self

    def extra_repr(self) -> str:
        return " x ".join(map(str, self.weight.shape))


def changed(initial: Tensor, change: Change) -> Tensor:
    """`change(initial)`. Where nothing hooks into that call it is left out: it takes longer than what it calls."""
    state = change.__dict__
    if (
        type(change) is Change
        and not torch.compiler.is_compiling()
        and not (state["_forward_pre_hooks"] or state["_forward_hooks"])
        and not (state["_backward_pre_hooks"] or state["_backward_hooks"] or _has_any_global_hook())
        and "forward" not in state
    ):
        weight = state["_parameters"].get("weight")
        if weight is not None:
            return plus(initial, weight, state["_buffers"]["scale"])
    factor: Tensor = change(initial)
    return factor


def plus(initial: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """The factor that a `Change` with this weight and scale makes of `initial`."""
    return initial + weight if scale is None else torch.addcmul(initial, weight, scale)


def scales(s: Tensor, weight: Tensor, step: float) -> tuple[Tensor, Tensor]:
    """The scales of dU and dV with which an optimizer's step moves every triplet of a weight equally far.

    `a_U = min(step / sqrt(N), 1) min(4 / r, 1) q / s` and `a_V` likewise of K, where `q = |W0|_F / sqrt(min(N, K))` is
    the root mean square of the weight's singular values. When Adam moves every entry of dU by eta, each triplet's part
    of the weight moves by `eta step q min(4 / r, 1)` in the spectral norm where neither bound of 1 holds, and from rank
    4 on all together by as much at any r. A learning rate should fix that norm, by the condition for feature learning
    of Yang, Simon and Bernstein (2023). Plain SGD moves a triplet by `a^2` times its gradient, and would diverge where
    few narrow layers or few triplets make a large; so would Adam's first steps. Hence each 1.

    Args:
        s: singular values `(r,)`, the largest first.
        weight: the pretrained weight `(N, K)`.
        step: see above.

    Returns:
        `(r,)` and `(r, 1)`, float32.
    """
    shape = weight.shape
    q = torch.linalg.matrix_norm(weight.float()) / min(shape) ** 0.5
    a = torch.where(s[0] > 0, q / s.clamp_min(_LEAST * s[0]), 0)  # a weight of zeros trains nothing
    share = min(_RANK / len(s), 1.0)
    of_u, of_v = (share * min(step / size**0.5, 1.0) for size in shape)
    return of_u * a, (of_v * a)[:, None]


def weight_of(factor: Tensor, initial: Tensor, scale: Tensor | None) -> Tensor:
    """The weight of a `Change` with this scale that makes `factor` of `initial`."""
    change = factor.to(initial.dtype) - initial
    return change if scale is None else torch.where(scale > 0, change / scale, 0)
