"""Whether padding beside a text changes what a decoder says, so that each is given alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from causal_models import causal_model
from torch import Tensor

from fastpeft.training.generation import depends_on_padding


@pytest.mark.parametrize(
    ("kind", "minds"), [("rwkv", True), ("bart", True), ("mamba", False), ("llama", False), ("bloom", False)]
)
def test_whether_a_decoder_depends_on_padding(kind: str, minds: bool) -> None:
    assert depends_on_padding(causal_model(kind, initializer_range=0.5).eval()) is minds


def test_a_decoder_may_heed_the_mask_of_several_rows_alone() -> None:
    """As Mamba-2 does in transformers 5.0."""

    def generate(tokens: Tensor, attention_mask: Tensor, **_: Any) -> SimpleNamespace:
        read = tokens * attention_mask if len(tokens) > 1 else tokens
        return SimpleNamespace(logits=[read.sum(1, keepdim=True)])

    assert not depends_on_padding(SimpleNamespace(device="cpu", generate=generate))
