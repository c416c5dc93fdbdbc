"""Where what only Linux has is hidden, runs train, answer and are measured."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.long
def test_commands_call_nothing_of_linux_without_a_guard(tmp_path: Path) -> None:
    place = Path(__file__).parents[1]
    start = "--model=demo --data=demo --max-steps=3"
    commands = [
        *(f"train {start} --method={name} --output='{tmp_path / name}'" for name in ("siva", "k-lst", "mezo")),
        f"eval '{tmp_path / 'siva'}'",
        f"predict '{tmp_path / 'k-lst'}' 'a fine film'",
        "info",
    ]
    given = [sys.executable, "-m", "reliability.other_machine", *commands]
    done = subprocess.run(given, cwd=place, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "a fine film" in done.stdout
    assert all((tmp_path / name / "metrics.json").exists() for name in ("siva", "k-lst", "mezo"))
