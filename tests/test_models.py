"""How many tokens a model reads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import transformers

from fastpeft.models import Classifier

SIZE = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 8,
    "vocab_size": 20,
    "max_position_embeddings": 40,
}


@pytest.mark.parametrize(("told", "read"), [(30, 30), (39, 38), (100_000, 38), (int(1e30), 38)])
@pytest.mark.parametrize("kind", ["Roberta", "MPNet"])
def test_places_of_padding_are_not_for_tokens(kind: str, told: int, read: int) -> None:
    assert most(kind, told) == read


@pytest.mark.parametrize(("told", "read"), [(30, 30), (40, 40), (100_000, 40), (int(1e30), 40)])
@pytest.mark.parametrize("kind", ["Bert", "Llama"])
def test_no_more_than_there_are_positions(kind: str, told: int, read: int) -> None:
    assert most(kind, told) == read


T5 = transformers.T5Config(d_model=8, num_layers=1, num_heads=1, d_ff=8, d_kv=8, vocab_size=20)
XLNET = transformers.XLNetConfig(d_model=8, n_layer=1, n_head=1, d_inner=8, vocab_size=20)


@pytest.mark.parametrize("told", [30, int(1e30)])
@pytest.mark.parametrize("config", [T5, XLNET], ids=["T5", "XLNet"])
def test_a_model_of_relative_positions_reads_what_its_tokenizer_says(config: Any, told: int) -> None:
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    assert Classifier(model, SimpleNamespace(model_max_length=told), ()).max_length == told


def most(kind: str, told: int) -> int:
    """The longest input of a model whose tokenizer tells a limit."""
    config = getattr(transformers, f"{kind}Config")(**SIZE)
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config)
    return Classifier(model, SimpleNamespace(model_max_length=told), ()).max_length
