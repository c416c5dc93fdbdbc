"""What is timed as a replay makes the weights of the steps that are timed beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_bench_mezo import Tiny

from bench import mezo_replay
from bench.bench_mezo import CASES, Case
from bench.mezo_replay import candidates


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_replay_makes_the_trained_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, case: Case) -> None:
    monkeypatch.setattr(mezo_replay, "LR", 1e-2)
    trained, again = models = [Tiny(), Tiny()]
    again.load_state_dict(trained.state_dict())
    start = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    monkeypatch.setattr(mezo_replay, "prompted", lambda device: models.pop(0))
    made = candidates(case, torch.device("cpu"), tmp_path, steps=4)
    after = trained.inner.weight.clone()
    assert not torch.equal(after, start["inner.weight"])
    again.load_state_dict(start)
    made["replay"]()
    assert torch.equal(again.inner.weight, after)
    trained.calls = 0
    made["training"]()
    assert trained.calls == 4 * case.forwards
    assert not torch.equal(trained.inner.weight, after)
