"""Every candidate of the bench passes over the model's weights, and is recorded."""

from __future__ import annotations

import pytest
import torch

from bench import bench_mezo_perturb as bench
from bench import harness

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_are_recorded(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "VOCABULARY", 50)
    case = bench.Case("tiny", layers=1, features=16, dtype=dtype, pass_threads=1)
    runs = bench.candidates(case, CPU)
    file = tmp_path / "mezo_perturb.csv"
    harness.measure(file, {name: str(value) for name, value in vars(case).items()}, runs, CPU, rounds=3)
    assert [row["candidate"] for row in harness.read_rows(file)] == list(runs)
    assert any(name.startswith("gaussian") for name in runs)


def test_shapes_are_those_of_the_model():
    params = bench.Case("large", 24, 1024, "float32", 1).params(torch.device("meta"))
    assert sum(param.numel() for param in params) == 354_310_144  # RoBERTa-large without pooler and head
