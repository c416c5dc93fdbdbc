"""The measured drift is that of the weights: none in exact mode, the same whether steps are deferred or not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bench.mezo_drift import WAYS, Case, drift

STEPS = 50


def drift_of(dtype: str, way: str) -> tuple[float, float]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).to(getattr(torch, dtype))
    return drift(model, torch.ones(2, 8, dtype=getattr(torch, dtype)), Case(dtype, way, STEPS))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_exact_restoring_alone_leaves_every_bit(dtype: str) -> None:
    assert set(WAYS) == {"in place", "in place, deferred", "exact"}
    assert drift_of(dtype, "exact") == (0, 0)
    moved, changed = drift_of(dtype, "in place")
    assert 0 < moved < 0.1
    assert 0 < changed <= 1
    assert drift_of(dtype, "in place, deferred") == (moved, changed)


def test_the_coarser_dtype_drifts_further() -> None:
    assert drift_of("float32", "in place")[0] < 0.01 * drift_of("bfloat16", "in place")[0]
