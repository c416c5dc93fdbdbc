"""Every method's training step changes what the method trains, and nothing else."""

from __future__ import annotations

import gc

import pytest
import torch

from bench.bench_training import CELLS, LIMIT, Cell, adapters, candidates, training_step


def test_the_default_is_what_ratios_are_taken_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.bench_training.training_step", lambda *_: lambda: None)
    assert next(iter(candidates(torch.device("cpu")))) == "siva-query-key"
    assert len(candidates(torch.device("cpu"))) == len(CELLS)


def test_siva_is_what_other_adapters_are_compared_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.bench_training.training_step", lambda *_: lambda: None)
    names = list(adapters("all linear", torch.device("cpu")))
    assert names[0] == "siva"
    assert {LIMIT, "lora-compiled", "lora-dora"} < set(names)


@pytest.mark.slow
@pytest.mark.parametrize(
    "cell", [*CELLS, Cell(LIMIT, "query, key"), Cell("lora", "all linear", "dora")], ids=lambda cell: cell.name
)
def test_a_step_moves_the_trained_parameters(cell: Cell) -> None:
    step = training_step(cell, torch.device("cpu"))
    model = next(value.cell_contents for value in step.__closure__ if isinstance(value.cell_contents, torch.nn.Module))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad or parameter.equal(before[name]), name
    moved = [name for name, p in model.named_parameters() if not p.equal(before[name])]
    assert moved
    gc.collect()
