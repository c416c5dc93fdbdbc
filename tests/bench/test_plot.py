"""What is drawn is what pages show, and it is of all measurements."""

from __future__ import annotations

import re
from pathlib import Path

from bench import plot

ROOT = Path(plot.__file__).parents[1]


def test_pages_show_every_picture_and_no_other() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").rglob("*.md"))
    shown = set(re.findall(r"\]\((?:\.\./)+bench/data/(\w+)\.png\)", pages))
    assert shown == set(plot.PICTURES)
    assert shown == {file.stem for file in plot.DATA.glob("*.png")}


def test_the_evidence_is_drawn(tmp_path: Path) -> None:
    plot.plot_evidence(tmp_path / "drawn.svg")
    drawn = (tmp_path / "drawn.svg").read_text(encoding="utf-8")
    assert all(f"<title>{name}</title>" in drawn for _, _, name in plot.EVIDENCE)
