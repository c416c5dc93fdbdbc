"""A person at the command line: a working folder with a model and data, and what is typed there."""

from __future__ import annotations

from pathlib import Path

import pytest
from samples import reviews, save_tiny_model, write_csv
from typer.testing import CliRunner, Result

import fastpeft
from fastpeft.cli import app

ENVIRONMENT = {
    "PYTHONPATH": str(Path(fastpeft.__file__).parents[1]),
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PATH": "",
    "FASTPEFT_BF16": "0",  # these two as in this process, whose bits some tests compare
}
TRAIN = ("train", "--model", "model", "--data", "reviews.csv", "--label-column", "stars", "--max-steps", "4")


def go_to_work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a model and data into a folder, and make it the working folder."""
    save_tiny_model(folder / "model")
    write_csv(folder / "reviews.csv", reviews(60), ("review", "stars"))
    monkeypatch.chdir(folder)
    return folder


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result
