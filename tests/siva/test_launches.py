"""How many kernels a layer would launch on a GPU, counted where its Triton kernels are interpreted."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

pytest.importorskip("triton")
from launches import Recording

from fastpeft import SivaLinear
from fastpeft.ops import packing

pytestmark = pytest.mark.usefixtures("interpreter")
FORWARD, BACKWARD = 4, 5  # of a SiVA layer; a frozen layer has one each
OF_SCALES = 4  # more in backward where dU and dV have scales: of each PyTorch multiplies twice


def launched(layer: nn.Module, dtype: torch.dtype) -> tuple[Counter[str], Counter[str]]:
    """What forward and backward launch, once what is made once is made."""
    x = torch.randn(24, 32, dtype=dtype, requires_grad=True)
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    for _ in range(2):
        with Recording() as forward:
            h = layer(x)
        dh = torch.ones_like(h)
        with Recording() as backward:
            torch.autograd.grad(h, leaves, dh)
    return forward.counted, backward.counted


def linear(dtype: torch.dtype) -> nn.Linear:
    return nn.Linear(32, 48, dtype=dtype).requires_grad_(False)


@pytest.mark.parametrize(("step", "backward"), [(None, BACKWARD), (0.1, BACKWARD + OF_SCALES)])
def test_launches_of_a_layer_with_a_base_in_bfloat16(step: float | None, backward: int) -> None:
    """Its factors are float32, of which the one is cast that the inner loop reads.

    U0 + dU, V0 + dV, V in bfloat16 and h; in backward U in bfloat16, dx, the partial sums of dU and dV, and these sums.
    """
    assert [found.total() for found in launched(linear(torch.bfloat16), torch.bfloat16)] == [1, 1]
    siva = SivaLinear.from_linear(linear(torch.bfloat16), r=4, step=step, pack_weights=False)
    for found, most in zip(launched(siva, torch.bfloat16), (FORWARD, backward)):
        assert found["_to_copy"] == 0
        assert found.total() <= most, found


def test_autocast_casts_a_frozen_weight_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a call x, the bias and h's gradients are cast, but no weight."""
    monkeypatch.setattr(packing, "can_lower", lambda weight, dtype: weight.dtype is not dtype)  # as on a GPU
    monkeypatch.setattr(packing, "can_pack", lambda weight, dtype: False)  # as there, whatever this processor has
    siva = SivaLinear.from_linear(linear(torch.float32), r=4, step=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        kept, _ = launched(siva, torch.float32)
        siva.packs.enabled = False
        siva.packs.drop()
        cast, _ = launched(siva, torch.float32)
    assert kept["_to_copy"] == cast["_to_copy"] - 1 == 2
