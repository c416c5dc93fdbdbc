"""What is drawn is what pages show, and it is of all measurements."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib.container import BarContainer

from bench import plot

ROOT = Path(plot.__file__).parents[1]


def test_pages_show_every_picture_and_no_other() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").rglob("*.md"))
    shown = set(re.findall(r"\]\((?:\.\./)+bench/data/(\w+)\.png\)", pages))
    assert shown == set(plot.TIMINGS)
    assert shown == {file.stem for file in plot.DATA.glob("*.png")}


def test_a_candidate_has_one_colour_in_every_panel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The legend names the bars of all panels, which have other candidates and in another order."""
    figures: list[Any] = []
    monkeypatch.setattr(plot.plt, "close", figures.append)
    rows = plot.read_rows(plot.DATA / "siva_training.csv")
    plot.plot_timings(rows, tmp_path / "drawn.png")
    (figure,) = figures
    (legend,) = figure.legends
    named = {text.get_text(): bar.get_facecolor() for text, bar in zip(legend.get_texts(), legend.get_patches())}
    assert named.keys() == {row["candidate"] for row in rows} - {"siva"}
    drawn = [bars for axes in figure.axes for bars in axes.containers if isinstance(bars, BarContainer)]
    assert len(drawn) > len(named), "several panels have the same candidates"
    for bars in drawn:
        assert {bar.get_facecolor() for bar in bars} == {named[bars.get_label()]}


def test_the_evidence_is_drawn(tmp_path: Path) -> None:
    plot.plot_evidence(tmp_path / "drawn.svg")
    drawn = (tmp_path / "drawn.svg").read_text(encoding="utf-8")
    assert all(f">{name}</text>" in drawn for _, _, name in plot.EVIDENCE)
