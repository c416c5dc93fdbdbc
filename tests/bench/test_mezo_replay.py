"""What is timed as a replay makes the weights of as many steps as are timed beside it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import mezo_replay
from bench.bench_mezo import CASES, Case
from bench.mezo_replay import candidates
from fastpeft.mezo import Journal
from fastpeft.mezo.journal import FILE_NAME

STEPS = 4


class Model(torch.nn.Module):
    """Stands in for the prompted model."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(-1, 1, 5))

    def forward(self, **batch: Any) -> Any:
        return SimpleNamespace(loss=self.weight.square().sum())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_replay_makes_the_trained_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, case: Case) -> None:
    monkeypatch.setattr(mezo_replay, "LR", 1e-2)
    trained, again = models = [Model(), Model()]
    monkeypatch.setattr(mezo_replay, "prompted", lambda device: models.pop(0))
    made = candidates(case, torch.device("cpu"), tmp_path, STEPS)
    after = trained.weight.detach().clone()
    assert not torch.equal(after, Model().weight)
    again.load_state_dict(Model().state_dict())
    made["replay"]()
    assert torch.equal(again.weight, after)
    made["training"]()
    assert Journal.open(tmp_path / FILE_NAME).steps == 2 * STEPS
    assert not torch.equal(trained.weight, after)
