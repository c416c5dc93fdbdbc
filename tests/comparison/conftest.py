"""Cells that take no time."""

from __future__ import annotations

from pathlib import Path

import pytest
from compared import STAND_IN
from samples import reviews, save_tiny_model, write_csv

import fastpeft
from fastpeft.comparison import run
from fastpeft.data.examples import Examples, TextData
from fastpeft.data.problems import CLASSIFICATION
from fastpeft.training.estimates import Estimate

ROOT = Path(fastpeft.__file__).parents[1]


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


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a person with a model and data."""
    save_tiny_model(tmp_path / "model")
    write_csv(tmp_path / "reviews.csv", reviews(60))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path
