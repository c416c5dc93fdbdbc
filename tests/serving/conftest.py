"""Finished runs on one tiny model, and one on another."""

from __future__ import annotations

from pathlib import Path

import pytest
from samples import PROMPT, WORDS, pairs, reviews, save_tiny_model, scores, tagged, write_csv, write_jsonl

from fastpeft import TrainConfig, train


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs; what the side networks `a`, `b`, `words` and `mood` stand on is one backbone.

    In float32, in which the answers to a batch are those to each row alone to 1e-6.
    """
    place = tmp_path_factory.mktemp("served")
    model, other = save_tiny_model(place / "model"), save_tiny_model(place / "other", initializer_range=0.5)
    two = write_csv(place / "two.csv", reviews(40))
    three = write_csv(place / "three.csv", reviews(60, tuple(WORDS)))
    for name, method, data, given in (
        ("a", "k-lst", two, {}),
        ("b", "lst", three, {}),
        ("words", "k-lst", write_jsonl(place / "tagged.jsonl", tagged(40)), {}),
        ("mood", "k-lst", two, PROMPT),
        ("alone", "k-lst", two, {"model": str(other)}),
        ("pairs", "siva", write_jsonl(place / "pairs.jsonl", pairs(40)), {"targets": "query,key"}),
        ("number", "head", write_jsonl(place / "scores.jsonl", scores(40)), {}),
    ):
        values = {"model": str(model), "max_steps": 2, "learning_rate": 0.1, "max_length": 32, "bf16": False, **given}
        train(TrainConfig(output=str(place / "runs" / name), method=method, data=str(data), **values))
    return place / "runs"
