"""What the tests of comparisons share."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from fastpeft.comparison import plan
from fastpeft.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class ChainedConfig(TrainConfig):
    """A configuration that can start from another run."""

    init_from: str | None = None


@pytest.fixture
def chains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans alone are under test, so that a chain needs no more of a run than the field."""
    monkeypatch.setattr(plan, "TrainConfig", ChainedConfig)
