"""The ways to approximate a weight that the table of quantised residuals compares, and what is timed."""

from __future__ import annotations

import pytest
import torch

from bench.siva_quantised import products, ways


def test_factors_and_iterations_bring_the_weight_nearer() -> None:
    weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    error = {way: float((approximation(weight) - weight).norm()) for way, _, approximation in ways("int8", 8)}
    assert error["siva"] < min(error["qpissa"], error["loftq"])
    assert max(error["qpissa"], error["loftq"]) < error["plain"]


@pytest.mark.parametrize("backward", [False, True])
def test_what_is_timed_is_the_same_product(backward: bool) -> None:
    pytest.importorskip("bitsandbytes")
    blocks, whole, dense = (product() for product in products((48, 32), 5, backward).values())
    torch.testing.assert_close(blocks, dense)
    torch.testing.assert_close(whole, dense)
