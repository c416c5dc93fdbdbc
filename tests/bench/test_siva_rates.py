"""The table of what one rate makes of several models."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import siva_rates
from bench.harness import read_rows


def test_a_cell_is_trained_once_and_gets_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []

    def train(command: list[str], check: bool) -> None:
        trained.append(command)
        folder = Path(command[command.index("--output") + 1])
        folder.mkdir(parents=True)
        metrics = '{"accuracy": 0.75, "loss": 0.5, "dev_rows": 872, "steps": 250, "versions": "", "labels": ["a"]}'
        (folder / "metrics.json").write_text(metrics)
        (folder / "run.json").write_text('{"fastpeft_version": "0.1.0"}')

    monkeypatch.setattr(siva_rates.subprocess, "run", train)
    monkeypatch.setattr(siva_rates, "FILE", tmp_path / "table.csv")
    for targets in ("query+key", "all-linear", "query+key"):
        siva_rates.measure("tiny", "demo", "demo", tmp_path / "runs", "plain", targets, "1e-3", "--bf16")
    assert ["all-linear" in command for command in trained] == [False, True]
    assert all({"scaling=plain", "1e-3", "--bf16"} <= set(command) for command in trained)
    rows = read_rows(tmp_path / "table.csv")
    assert [(row["targets"], row["accuracy"], row["dev_rows"]) for row in rows] == [
        ("query+key", "0.75", "872"),
        ("all-linear", "0.75", "872"),
    ]
    assert not any((tmp_path / "runs").iterdir())
