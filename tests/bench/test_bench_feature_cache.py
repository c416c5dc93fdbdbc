"""Every candidate of the feature cache's bench runs; the cached ones compute no feature."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import RobertaConfig, RobertaForSequenceClassification

from bench import bench_feature_cache as bench
from bench import harness

CPU = torch.device("cpu")


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return RobertaForSequenceClassification(
        RobertaConfig(
            vocab_size=8_000, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
        )
    )


def test_every_candidate_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.MODELS, "demo", tiny)
    monkeypatch.setattr(bench, "BATCHES", 2)
    file = tmp_path / "feature_cache.csv"
    harness.measure(file, bench.CASE, bench.candidates("demo", tmp_path / "kept", CPU), CPU, rounds=2)
    named = [row["candidate"] for row in harness.read_rows(file)]
    assert named == [bench.CACHED, bench.UNCACHED]
