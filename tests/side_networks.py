"""Small side networks and features for them to read."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpeft import LadderConfig
from fastpeft.ladder.side import SideNetwork

LAYERS, WIDTH, NARROW = 3, 16, 8
EXACT = {"rtol": 1e-9, "atol": 1e-9}
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0]]).bool()


def network(causal: bool = False, **config: object) -> SideNetwork:
    torch.manual_seed(0)
    side = SideNetwork(LadderConfig(reduction_factor=2, **config), WIDTH, LAYERS, causal=causal).double().eval()
    for parameter in side.parameters():  # no term is 0 or 1
        parameter.data += 0.3 * torch.randn_like(parameter)
    return side


def features(batch: int = 3, tokens: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, tokens, WIDTH, generator=generator, dtype=torch.float64) for _ in range(LAYERS + 1)]
