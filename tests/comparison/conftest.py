"""Cells that take no time."""

from __future__ import annotations

from pathlib import Path

import pytest
from compared import STAND_IN

from fastpeft.comparison import run
from fastpeft.data.examples import Examples, TextData
from fastpeft.data.problems import CLASSIFICATION
from fastpeft.training.estimates import Estimate


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells that take no time, in the folder `out` of the working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cell.py").write_text(STAND_IN)
    monkeypatch.setattr(run, "_arguments", lambda cell: ["-S", "cell.py", str(cell.config_file)])
    rows = Examples(["good", "bad"], [1, 0])
    data = TextData(rows, rows, ["negative", "positive"], "two words", CLASSIFICATION)
    monkeypatch.setattr(run, "data_for", lambda config: data)
    told = {"head": Estimate(100.0, 2.0, 0.5), "lora:learning_rate=0.25": Estimate(error="no such layers")}
    monkeypatch.setattr(run.Comparison, "estimates", lambda comparison, budget_mb: told)
