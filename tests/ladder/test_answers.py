"""A base must answer by the output of its last layer alone, or a side network in its place would be passed by."""

from __future__ import annotations

import pytest
import transformers
from backbones import IDS, SPECIAL, TINY, moved, tiny
from torch import nn

from fastpeft import FastpeftError

XLM = {"vocab_size": 50, "emb_dim": 16, "n_layers": 3, "n_heads": 2, "num_labels": 3}
CHARACTERS = {**SPECIAL, "local_transformer_stride": 8}


def xlm(kind: str) -> nn.Module:
    model = getattr(transformers, f"{kind}ForSequenceClassification")
    return model(getattr(transformers, f"{kind}Config")(**XLM)).eval()


@pytest.mark.parametrize("causal", [None, False])
@pytest.mark.parametrize("kind", ["XLM", "Flaubert"])
def test_parts_of_layers_are_refused(kind: str, causal: bool | None) -> None:
    """Their lists of modules hold parts of layers, whose outputs are added to the backbone's stream."""
    with pytest.raises(FastpeftError, match=r"comes not from the output of transformer\.ffns\.2 alone"):
        moved(xlm(kind), causal=causal)
    model = moved(xlm(kind), feature_modules="transformer.layer_norm2")  # which ends each layer
    before = model(IDS).logits
    nn.init.zeros_(model.side.up.weight)
    assert not model(IDS).logits.allclose(before)
    assert model(IDS).logits.std(0).max() < 1e-6  # nothing else tells one text from another


def test_layers_that_the_head_does_not_read_are_refused() -> None:
    """The classes of CANINE come from its molecules of characters, and its tags from what follows them."""
    named = {"feature_modules": "canine.final_char_encoder.layer"}
    with pytest.raises(FastpeftError, match=r"comes not from the output of canine\.final_char_encoder\.layer\.0 alone"):
        moved(tiny("Canine", **CHARACTERS), **named)
    tags = moved(tiny("Canine", "ForTokenClassification", **CHARACTERS), **named)
    assert tags(IDS).logits.shape == (*IDS.shape, TINY["num_labels"])
