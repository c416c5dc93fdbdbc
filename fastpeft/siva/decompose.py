"""The singular value decomposition that SiVA starts from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastpeft.errors import FastpeftError


class Factors(NamedTuple):
    """The top-r singular triplets of a weight, in float32: `u (N, r)`, `s (r,)`, `v (r, K)`."""

    u: Tensor
    s: Tensor
    v: Tensor

    def product(self) -> Tensor:
        """`(u * s) v`, `(N, K)`."""
        return (self.u * self.s) @ self.v


class Decomposition(NamedTuple):
    """A weight split in two: the factors that train, and the rest `(N, K)` in the dtype of the weight."""

    factors: Factors
    residual: Tensor


def decompose(weight: Tensor, r: int, d: int | None = None, name: str = "weight") -> Decomposition:
    r"""Split `weight` into its top-r singular triplets and the rest.

    `W0 = U0 diag(S0) V0`; the triplets 1..r become the factors. With `d` None the rest is `W0 - (U0 * s) V0`,
    otherwise it is made of the triplets r+1..d alone, which loses those above d on purpose.

    Args:
        weight: `(N, K)`, any floating dtype.
        r: 1 to min(N, K).
        d: r to min(N, K), or None for the full rank.
        name: what error messages call the weight.

    Returns:
        Factors in float32, ordered by singular value, the largest-magnitude entry of each column of u positive;
        and the rest in the dtype of `weight`, computed in float32 (float64 for float64) and rounded once.

    Raises:
        FastpeftError: the weight is not a finite floating matrix, or r or d is out of range.
    """
    check_decomposable(weight, r, d, name)
    precision = torch.promote_types(weight.dtype, torch.float32)
    u, s, vh = torch.linalg.svd(weight.detach().to(precision), full_matrices=False)
    if not is_lossy(weight, d):
        factors = _fix_signs(u[:, :r], s[:r], vh[:r])
        return Decomposition(factors, subtract(weight.detach(), factors))
    rest = (u[:, r:d] * s[r:d]) @ vh[r:d]
    return Decomposition(_fix_signs(u[:, :r], s[:r], vh[:r]), rest.to(weight.dtype))


def is_lossy(weight: Tensor, d: int | None) -> bool:
    """Whether a decomposition of rank d leaves out a part of the weight."""
    return d is not None and d < min(weight.shape)


def subtract(weight: Tensor, factors: Factors) -> Tensor:
    """`weight - (u * s) v`, computed in float32 (float64 for float64) and rounded once to the dtype of `weight`.

    Creating an adapter and loading it both pass here: on one machine their results are equal bit by bit.
    """
    precision = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(precision) - factors.product().to(precision)).to(weight.dtype)


def add(weight: Tensor, factors: Factors) -> Tensor:
    """`weight + (u * s) v`, with the roundings of `subtract`."""
    return subtract(weight, factors._replace(s=-factors.s))


def check_decomposable(weight: Tensor, r: int, d: int | None, name: str) -> None:
    """Raise `FastpeftError`, naming the weight, unless `decompose` can split it."""
    if weight.dim() != 2 or not weight.is_floating_point():
        raise FastpeftError(
            f"{name} is a {weight.dim()}-d {weight.dtype} tensor; SiVA decomposes 2-d floating-point weights. Load the "
            "model unquantised, or leave the layer out with exclude_modules."
        )
    full = min(weight.shape)
    if not 1 <= r <= full:
        raise FastpeftError(
            f"r={r} for {name} of shape {tuple(weight.shape)}; allowed are 1 to {full}. Choose another r, or set this "
            "layer's own with rank_pattern."
        )
    if d is not None and not r <= d <= full:
        raise FastpeftError(
            f"d={d} for {name} of shape {tuple(weight.shape)} with r={r}; allowed are {r} to {full}, or None for the "
            "full rank."
        )
    if weight.device.type != "meta" and not torch.isfinite(weight).all():
        raise FastpeftError(
            f"{name} holds NaN or infinite values and has no singular value decomposition. Check the model file, or "
            "leave the layer out with exclude_modules."
        )


def _fix_signs(u: Tensor, s: Tensor, v: Tensor) -> Factors:
    """Make the largest-magnitude entry of each column of u positive: an SVD leaves each pair's sign open."""
    largest = u.gather(0, u.abs().argmax(0, keepdim=True))
    signs = torch.where(largest < 0, -1, 1).to(u.dtype)
    return Factors((u * signs).float().contiguous(), s.float().contiguous(), (v * signs.t()).float().contiguous())
