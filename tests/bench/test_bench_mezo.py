"""What is timed is a step: the weights move, and as often as the case says the model is asked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from bench import bench_mezo
from bench.bench_mezo import CASES, Case, candidates


class Tiny(torch.nn.Module):
    """Stands in for the prompted model, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(4, 1)
        self.calls = 0

    def forward(self, **batch: Any) -> Any:
        self.calls += 1
        loss = self.inner(batch["input_ids"].float()).square().mean()
        return type("Output", (), {"loss": loss})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_candidate_makes_its_forwards(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    models: list[Tiny] = []

    def prompted(device: torch.device) -> Tiny:
        models.append(Tiny())
        return models[-1]

    monkeypatch.setattr(bench_mezo, "prompted", prompted)
    made = candidates(replace(case, batch=2, tokens=4), torch.device("cpu"))
    assert next(iter(made)) == "forwards"
    assert ("reference's loop" in made) == (case.estimator == "spsa" and case.noise == "gaussian")
    for model, run in zip(models, made.values()):
        before, model.calls = model.inner.weight.clone(), 0
        run()
        assert model.calls == case.forwards
        assert model.inner.weight.equal(before) == (model is models[0])
