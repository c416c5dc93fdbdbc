"""The bench of the frozen head records each method, on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
from causal_models import causal_model

from bench import bench_frozen_head as bench
from bench import harness


@pytest.mark.parametrize("method", ["alone", "LST", "SiVA", "MeZO"])
def test_every_form_is_recorded(tmp_path: Path, method: str) -> None:
    def load() -> object:
        return causal_model("llama", vocab_size=3000)

    bench.record_times(load, method, tokens=20, rounds=2, file=tmp_path / "times.csv")
    rows = harness.read_rows(tmp_path / "times.csv")
    assert [row["candidate"] for row in rows] == ["frozen head", "logits"] * (2 if method == "alone" else 1)
    if method == "alone":
        return
    bench.record_memory(load, method, tokens=40, file=tmp_path / "memory.csv")
    rows = harness.read_rows(tmp_path / "memory.csv")
    assert [(row["dtype"], row["candidate"]) for row in rows] == [
        (dtype, form) for dtype in ("float32", "bfloat16") for form in ("frozen head", "logits")
    ]
    assert float(rows[1]["loss_apart"]) < 1e-5
