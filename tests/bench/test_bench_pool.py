"""Both works of the pool's bench run and are recorded, on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from backbones import tiny

from bench import bench_pool as bench
from bench import harness


@pytest.mark.parametrize(("work", "candidates"), [("answer", 3), ("train", 5)])
def test_every_candidate_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: str, candidates: int
) -> None:
    monkeypatch.setattr(bench, "ANSWER_TASKS", 4)
    monkeypatch.setattr(bench, "TRAIN_MEMBERS", 2)
    file = tmp_path / "pool.csv"
    bench.record(file, work, 3, torch.device("cpu"), rounds=2, make=lambda: tiny(vocab_size=1_000))
    rows = harness.read_rows(file)
    assert len(rows) == candidates
    assert rows[0]["ratio_p50"] == "1"
    assert {row["work"] for row in rows} == {work}
