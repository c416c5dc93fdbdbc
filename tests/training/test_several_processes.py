"""What several processes that a launcher started are not for: one message, exit code 2, nothing written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from samples import save_finished_run, snapshot
from transformers import TrainingArguments
from typer.testing import CliRunner

from fastpeft import CompareConfig, FastpeftError, compare
from fastpeft.cli import app

TRAIN = ("train", "--method", "lora", "--model", "model", "--data", "good.csv", "--output", "new")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data and a finished run."""
    place = tmp_path_factory.mktemp("place")
    save_finished_run(place)
    return place


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--batch-size", "16"], "--batch-size is 16, which 3 processes cannot share"),
        (["--batch-size", "6", "--optimizer-in-backward"], "--optimizer-in-backward with 3 processes"),
    ],
)
def test_a_run_in_several_processes(
    place: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], part: str
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(TrainingArguments, "world_size", 3)
    before = snapshot(place)
    result = CliRunner().invoke(app, [*TRAIN, *arguments])
    assert result.exit_code == 2
    assert f"Error: {part}" in re.sub(r"\s+", " ", result.stderr), "as it is, without other advice"
    assert snapshot(place) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["compare", "--model", "model", "--data", "good.csv", "--methods", "head", "--output", "new"],
        ["eval", "run"],
        ["predict", "run", "a lovely film", "--output", "new.csv"],
        ["export", "run", "new"],
        ["serve", "run"],
    ],
)
def test_a_launcher_is_for_training_alone(place: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    """Each process would answer the same texts, and all would write into one file."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("WORLD_SIZE", "2")
    before = snapshot(place)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert f"`fastpeft {arguments[0]}` runs in one process, but a launcher such as torchrun started 2" in re.sub(
        r"\s+", " ", result.stderr
    )
    assert snapshot(place) == before


def test_a_comparison_in_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(FastpeftError, match="a comparison runs in one process, but a launcher such as torchrun"):
        compare(CompareConfig(output="new", methods=["head"]))
