"""SiVA and side networks in a sentence-transformers model, under its trainer and its evaluator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
from samples import add_adapter, load_adapter
from tokenizers_for_prompts import make_tokenizer

from fastpeft import LadderConfig, LadderModel, SivaConfig

sentence_transformers = pytest.importorskip("sentence_transformers", reason="the extra `integrations` is not installed")

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


def train(model: Any, folder: Path, steps: int) -> None:
    settings = sentence_transformers.SentenceTransformerTrainingArguments(
        str(folder / "out"), max_steps=steps, learning_rate=0.1, use_cpu=True, report_to="none", save_strategy="no"
    )
    sentence_transformers.SentenceTransformerTrainer(
        model,
        settings,
        train_dataset=datasets.Dataset.from_dict({"anchor": TEXTS, "positive": [*TEXTS[1::-1], *TEXTS[:1:-1]]}),
        loss=sentence_transformers.sentence_transformer.losses.MultipleNegativesRankingLoss(model),
    ).train()


@add_adapter
@load_adapter
def test_an_added_adapter_trains_is_saved_and_loads(base: Path, tmp_path: Path) -> None:
    model = sentence_transformers.SentenceTransformer(str(base), device="cpu")
    before = model.encode(TEXTS)
    model.add_adapter(SivaConfig(r=2, task_type="FEATURE_EXTRACTION"))
    np.testing.assert_allclose(model.encode(TEXTS), before, rtol=1e-5, atol=1e-5)

    train(model, tmp_path, steps=3)
    after = model.encode(TEXTS)
    assert not np.allclose(after, before, atol=1e-3)

    model.save_pretrained(str(tmp_path / "adapter"))
    loaded = sentence_transformers.SentenceTransformer(str(tmp_path / "adapter"), device="cpu")
    np.testing.assert_array_equal(loaded.encode(TEXTS), after)


def test_a_side_network_trains_is_saved_and_loads(base: Path, tmp_path: Path) -> None:
    model = sentence_transformers.SentenceTransformer(str(base), device="cpu")
    before = model.encode(TEXTS)
    config = LadderConfig(window_size=3, reduction_factor=2, output_mix="add")
    model[0].model = LadderModel(model[0].model, config)
    np.testing.assert_allclose(model.encode(TEXTS), before, rtol=1e-5, atol=1e-5)  # packed weights round differently
    frozen = {name: value.clone() for name, value in model[0].model.base.encoder.state_dict().items()}
    train(model, tmp_path, steps=6)
    after = model.encode(TEXTS)
    assert not np.allclose(after, before, atol=1e-3)
    assert all(value.equal(frozen[name]) for name, value in model[0].model.base.encoder.state_dict().items())

    evaluation = pytest.importorskip("sentence_transformers.sentence_transformer.evaluation")
    score = evaluation.EmbeddingSimilarityEvaluator(["a great film"] * 3, TEXTS[1:], [1.0, 0.0, 0.0])
    assert score(model)["spearman_cosine"] > 0.8
    model.save_pretrained(str(tmp_path / "saved"))
    loaded = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert type(loaded[0].model) is LadderModel
    np.testing.assert_array_equal(loaded.encode(TEXTS), after)


def test_a_saved_side_network_alone_is_taken(base: Path, tmp_path: Path) -> None:
    ladder = LadderModel(transformers.AutoModel.from_pretrained(base), LadderConfig(reduction_factor=2))
    ladder.save_pretrained(tmp_path / "side")
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "side")
    model = sentence_transformers.SentenceTransformer(str(tmp_path / "side"), device="cpu")
    assert model.get_embedding_dimension() == 16
    assert model.encode(TEXTS).shape == (4, 16)
