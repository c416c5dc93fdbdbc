"""The profile's parts are a step's time, told apart by what operations are for."""

from __future__ import annotations

import pytest
import torch

from bench.siva_profile import BETWEEN, OTHERS, kind_of, spent


@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        ("fastpeft::siva_linear", "layers of SiVA"),
        ("GeneratedBackwardFor_fastpeft_siva_linear_default", "layers of SiVA"),
        ("aten::addmm", "matrix products"),
        ("mkldnn::_linear_pointwise", "matrix products"),  # by a packed weight
        ("aten::_fused_adamw_", "optimizer"),
        ("aten::add_", "sums, products, copies"),
        ("aten::native_layer_norm_backward", "norms, activations, dropout"),
        ("aten::empty", OTHERS),
    ],
)
def test_kinds(operation: str, kind: str) -> None:
    assert kind_of(operation) == kind


def test_calls_of_a_step_are_counted() -> None:
    a = torch.randn(64, 64)
    parts = spent(lambda: (a @ a).add_(a), steps=2)
    assert parts["matrix products"][1] == 1
    assert parts["matrix products"][0] > 0
    assert parts["sums, products, copies"][1] == 1
    assert parts["attention"] == (0, 0)
    assert BETWEEN in parts
