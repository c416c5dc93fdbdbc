"""Killed at random moments, a run goes on to the result of one that was left alone; see `kill`."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import SEED
from reliability import kill


def check(folder: Path, kind: str, kills: int) -> None:
    kill.prepare(folder)
    found = kill.attack(folder, kind, kills, seed=int(SEED))
    assert found.faults == []
    assert found.kills == kills


@pytest.mark.parametrize("kind", ["siva", "k-lst", "k-lst, features cached", "full", "mezo", kill.ONE_CELL])
def test_nothing_is_lost_at_one_moment(tmp_path: Path, kind: str) -> None:
    check(tmp_path, kind, kills=1)


@pytest.mark.kill
@pytest.mark.parametrize("kind", [*kill.RUNS, kill.COMPARE])
def test_nothing_is_lost(tmp_path: Path, kind: str) -> None:
    check(tmp_path, kind, kills=3)


def test_what_cannot_be_read_is_found(tmp_path: Path) -> None:
    """The harness itself: half of a file at its final name is a fault, one that is marked is none."""
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "model.safetensors").write_bytes(b"half")
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / ".metrics.json.a1b2.part").write_text("{")
    (fault,) = kill.unreadable(tmp_path)
    assert fault.startswith("checkpoint-1/model.safetensors: ")
    assert kill.half_written(tmp_path)
