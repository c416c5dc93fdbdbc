"""SiVA in a sentence-transformers model, by its `add_adapter` and under its trainer."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers
from tokenizers_for_prompts import make_tokenizer

from fastpeft import SivaConfig

sentence_transformers = pytest.importorskip("sentence_transformers", reason="the extra `integrations` is not installed")

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = ["a great film", "a lovely story", "the plot is dull", "it was terrible"]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The folder of a tiny encoder with its tokenizer."""
    config = transformers.BertConfig(
        vocab_size=128,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(tmp_path / "base")
    make_tokenizer("word-piece").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_an_added_adapter_trains_is_saved_and_loads(base: Path, tmp_path: Path) -> None:
    model = sentence_transformers.SentenceTransformer(str(base), device="cpu")
    before = model.encode(TEXTS)
    model.add_adapter(SivaConfig(r=2, task_type="FEATURE_EXTRACTION"))
    np.testing.assert_allclose(model.encode(TEXTS), before, rtol=1e-5, atol=1e-5)

    settings = sentence_transformers.SentenceTransformerTrainingArguments(
        str(tmp_path / "out"), max_steps=3, learning_rate=0.1, use_cpu=True, report_to="none", save_strategy="no"
    )
    sentence_transformers.SentenceTransformerTrainer(
        model,
        settings,
        train_dataset=datasets.Dataset.from_dict({"anchor": TEXTS, "positive": [*TEXTS[1::-1], *TEXTS[:1:-1]]}),
        loss=sentence_transformers.sentence_transformer.losses.MultipleNegativesRankingLoss(model),
    ).train()
    after = model.encode(TEXTS)
    assert not np.allclose(after, before, atol=1e-3)

    model.save_pretrained(str(tmp_path / "adapter"))
    loaded = sentence_transformers.SentenceTransformer(str(tmp_path / "adapter"), device="cpu")
    np.testing.assert_array_equal(loaded.encode(TEXTS), after)
