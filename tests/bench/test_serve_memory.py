"""The memory of a server is measured with shared weights and without."""

from __future__ import annotations

from pathlib import Path

from samples import save_tiny_model

from bench import serve_memory
from bench.harness import read_rows


def test_a_row_for_each_way_to_serve(tmp_path: Path) -> None:
    file = tmp_path / "serve_memory.csv"
    rows = serve_memory.record(file, str(save_tiny_model(tmp_path / "model")), ["implicit"])
    assert read_rows(file) == rows
    assert [row["weights"] for row in rows] == ["shared", "alone"]
    assert all(float(row["first_mb"]) > 100 for row in rows), "its libraries alone take more"


def test_what_is_shared_is_counted(tmp_path: Path) -> None:
    runs = serve_memory.made_runs(str(save_tiny_model(tmp_path / "model")), "implicit", tmp_path)
    (_, first), *others = serve_memory.memory_after_each(runs, shares=True)
    assert first == 0
    assert all(held > 0 for _, held in others)
