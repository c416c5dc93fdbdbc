"""The screening of a side network's options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench import ladder_options
from bench.harness import read_rows, write_rows
from fastpeft.comparison.plan import CompareConfig


def test_every_variant_can_be_compared(tmp_path: Path) -> None:
    config = CompareConfig(output=str(tmp_path / "run"), methods=list(ladder_options.VARIANTS))
    assert [cell.variant for cell in config.cells()] == list(ladder_options.VARIANTS)


def test_a_finished_variant_gets_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compare(command: list[str], check: bool) -> None:
        chosen = command[command.index("--methods") + 1]
        figures = dict.fromkeys(ladder_options.COLUMNS, "1") | {"accuracy": "0.75", "dev_rows": "1200"}
        rows: list[dict[str, Any]] = [{"variant": name, "seed": "0", **figures} for name in ("another", chosen)]
        write_rows(tmp_path / "run" / "results.csv", rows)

    monkeypatch.setattr(ladder_options.subprocess, "run", compare)
    monkeypatch.setattr(ladder_options, "FILE", tmp_path / "table.csv")
    for source, variant in (("demo", "k-lst"), ("demo", "lst"), ("sst2", "k-lst"), ("demo", "k-lst")):
        ladder_options.screen(variant, source, tmp_path / "slice", tmp_path / "run")
    rows = read_rows(tmp_path / "table.csv")
    assert [(row["data"], row["variant"]) for row in rows] == [("demo", "k-lst"), ("demo", "lst"), ("sst2", "k-lst")]
    assert {row["standard_error"] for row in rows} == {"0.0125"}
