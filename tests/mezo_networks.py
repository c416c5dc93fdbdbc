"""A small network, a batch for each step and ways to step, for the tests of MeZO."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastpeft.mezo import FZOO, SPSA
from fastpeft.mezo.estimator import Estimator

# estimators, with a limit of g
ESTIMATES: list[tuple[Estimator, float | None]] = [
    (SPSA(), None),
    (SPSA(noise="rademacher"), None),
    (SPSA(3), None),
    (SPSA(2, "rademacher"), 0.05),
    (FZOO(4), None),
]


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def fit(model: nn.Module, step: int = 0) -> Callable[[], Tensor]:
    """The closure of one step on a batch of its own."""
    generator = torch.Generator().manual_seed(step)
    dtype = next(model.parameters()).dtype
    x, y = torch.randn(6, 5, generator=generator).to(dtype), torch.randn(6, 3, generator=generator).to(dtype)
    return lambda: F.mse_loss(model(x), y)


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def close(one: list[Tensor], other: list[Tensor]) -> bool:
    """Equal to the roundings of a step that did nothing: three of values near 1, perturbed by 1e-3."""
    return all((a - b).abs().max() <= 4 * torch.finfo(a.dtype).eps for a, b in zip(one, other, strict=True))
