"""The ways to approximate a weight that the table of quantised residuals compares."""

from __future__ import annotations

import torch

from bench.siva_quantised import ways


def test_factors_and_iterations_bring_the_weight_nearer() -> None:
    weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    error = {way: float((approximation(weight) - weight).norm()) for way, _, approximation in ways("int8", 8)}
    assert error["siva"] < min(error["qpissa"], error["loftq"])
    assert max(error["qpissa"], error["loftq"]) < error["plain"]
