"""What a dry run said, read from its text, beside what a comparison's cells took."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from bench import dry_run as bench
from fastpeft import CompareConfig
from fastpeft.comparison.cells import Cell
from fastpeft.comparison.plan import Plan
from fastpeft.support import files

PLAN = """\
reviews.csv: 60 rows, texts from column 'text'
┏━━━━━━━━━━━━┳━━━━━━━━━┳━━━━━━━━━━━━┳━━━━━━┳━━━━━━━━┓
┃ cell       ┃ state   ┃ memory, MB ┃ fits ┃ time   ┃
┡━━━━━━━━━━━━╇━━━━━━━━━╇━━━━━━━━━━━━╇━━━━━━╇━━━━━━━━┩
│ full-seed0 │ waiting │ 1,330      │ yes  │ 2 min  │
│ mezo-prom… │ waiting │ 72         │ yes  │ 50 s   │
│ siva-seed0 │ waiting │ -          │ -    │ rank   │
│            │         │            │      │ is 99  │
└────────────┴─────────┴────────────┴──────┴────────┘
0 of 3 finished, about 3 min for the cells with an estimated time; nothing was written
"""


def test_a_plan_is_read_as_it_was_printed() -> None:
    assert bench.planned(PLAN) == [
        {"memory_mb": "1330", "seconds": "120"},
        {"memory_mb": "72", "seconds": "50"},
        {"memory_mb": "-", "seconds": ""},
    ]
    assert (
        bench.planned(PLAN.replace(" ┃ fits", "").replace(" │ yes ", "").replace(" │ -   ", ""))[0]["seconds"] == "120"
    )


@pytest.fixture
def cells(tmp_path: Path) -> list[Cell]:
    """Of a comparison whose second cell ran first."""
    config = CompareConfig(output=str(tmp_path / "compared"), methods=["full", "mezo"])
    Plan.make(config, "command").save()
    for cell, start, seconds in zip(config.cells(), (1_000, 500), (80, 100)):
        with cell.folder.held():
            cell.folder.open(cell.values, "rows", overwrite=False, recipe={})
        files.write_json(cell.config_file, cell.values)
        metrics: dict[str, Any] = {
            "peak_memory_mb": 1400.2,
            "peak_memory_source": "CUDA allocator",
            "device": "card",
            "threads": 2,
        }
        metrics |= {"peak_rss_mb": 2000.0, "versions": {"torch": "2.15.0"}}
        files.write_json(cell.folder.path / "metrics.json", metrics)
        os.utime(cell.config_file, (start, start))
        os.utime(cell.folder.path / "metrics.json", (start + seconds, start + seconds))
    return bench.cells_of(tmp_path / "compared")


def test_what_was_said_beside_what_it_took(cells: list[Cell]) -> None:
    first, second = bench.compared([{"memory_mb": "1330", "seconds": "120"}, {"memory_mb": "-", "seconds": ""}], cells)
    assert (first["variant"], first["took_s"], first["time_ratio"], first["peak_mb"]) == ("mezo", "100", "1.20", "1400")
    assert (second["variant"], second["took_s"], second["time_ratio"]) == ("full", "80", "")


def test_what_is_of_another_comparison_is_refused(cells: list[Cell]) -> None:
    with pytest.raises(SystemExit, match="the plan has 1 cells and the folder 2"):
        bench.compared([{"memory_mb": "1", "seconds": "1"}], cells)
