"""Cells are paired by seed, and those that are there are not run again."""

from __future__ import annotations

from pathlib import Path

import pytest
from samples import reviews, save_tiny_model, write_csv

from bench.frozen_accuracy import CELLS, measure
from bench.harness import read_rows


@pytest.mark.parametrize("method", CELLS)
def test_cells_of_a_seed_are_paired(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_tiny_model(tmp_path / "model")
    data = write_csv(tmp_path / "reviews.csv", reviews(60))
    file = tmp_path / "table.csv"
    for dtype in CELLS[method]:
        measure(file, str(model), str(data), tmp_path / "runs", method, dtype, 1, max_steps=4)
    rows = read_rows(file)
    assert [(row["method"], row["dtype"], row["seed"]) for row in rows] == [(method, d, "1") for d in CELLS[method]]
    first = float(rows[0]["accuracy"])
    assert rows[0]["difference"] == "+0.0000"
    assert all(float(row["difference"]) == pytest.approx(float(row["accuracy"]) - first, abs=2e-4) for row in rows)
    assert not any((tmp_path / "runs").iterdir())
    monkeypatch.setattr("bench.frozen_accuracy.train", None)
    assert measure(file, str(model), str(data), tmp_path / "runs", method, "float32", 1) == rows[0]
