"""Every method's training step changes what the method trains, and nothing else."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from backbones import tiny
from torch import nn

from bench.bench_training import CELLS, DTYPES, LIMIT, MODELS, Cell, adapters, candidates, training_step
from fastpeft.ops.frozen_linear import Packed
from fastpeft.siva.layer import SivaLinear

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model stands in for the bundled one: a step is made of the same parts."""
    shape = {"vocab_size": 8_000, "hidden_size": 64, "intermediate_size": 128}
    monkeypatch.setitem(MODELS, "demo", lambda: tiny(**shape))


def test_the_default_is_what_ratios_are_taken_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.bench_training.training_step", lambda *_: lambda: None)
    assert next(iter(candidates(CPU))) == "siva-query-key"
    assert len(candidates(CPU)) == len(CELLS)


def test_siva_is_what_other_adapters_are_compared_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.bench_training.training_step", lambda *_: lambda: None)
    names = list(adapters("all linear", CPU))
    assert names[0] == "siva"
    assert {LIMIT, "lora-compiled", "lora-dora"} < set(names)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["siva", LIMIT, "lora"])
def test_a_dtype_is_that_of_the_base(dtype: str, name: str) -> None:
    step = adapters("query, key", CPU, names=[name], dtype=dtype)[name]
    model = _model(step)
    expected = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {expected}
    seen = []
    model.register_forward_hook(lambda _module, _inputs, output: seen.append(output.logits.dtype))
    step()
    assert seen == [torch.float32 if dtype == "float32" else torch.bfloat16]
    if name != LIMIT:
        adapted = [p for n, p in model.named_parameters() if p.requires_grad and "classifier" not in n]
        assert {p.dtype for p in adapted} == {torch.float32}


def test_every_method_packs_what_is_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As its run does: packs in some alone would make those faster."""
    cells = [Cell("siva", "query, key"), Cell("lora", "query, key"), Cell("bitfit"), Cell("lst")]
    monkeypatch.setattr("bench.bench_training.CELLS", cells)
    for step in candidates(CPU).values():
        layers = [module for module in _model(step).modules() if isinstance(module, nn.Linear)]
        plain = [layer for layer in layers if not isinstance(layer, (Packed, SivaLinear))]
        assert len(plain) < len(layers)
        assert all(layer.weight.requires_grad for layer in plain)


@pytest.mark.parametrize(("targets", "count"), [("query, key", 6), ("all linear", 18)])
def test_the_limit_packs_the_layers_that_siva_packs(targets: str, count: int) -> None:
    """And no other; without these packs SiVA could be faster than its limit."""
    siva, limit = (_model(step) for step in adapters(targets, CPU, names=["siva", LIMIT]).values())
    assert sum(isinstance(module, SivaLinear) and module.packs.enabled for module in siva.modules()) == count
    assert sum(isinstance(module, Packed) for module in limit.modules()) == count


def _model(step: Any) -> torch.nn.Module:
    cells = (cell.cell_contents for cell in step.__closure__)
    return next(value for value in cells if isinstance(value, torch.nn.Module))


@pytest.mark.slow
@pytest.mark.parametrize(
    "cell", [*CELLS, Cell(LIMIT, "query, key"), Cell("lora", "all linear", "dora")], ids=lambda cell: cell.name
)
def test_a_step_moves_the_trained_parameters(cell: Cell) -> None:
    step = training_step(cell, CPU)
    model = _model(step)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad or parameter.equal(before[name]), name
    moved = [name for name, p in model.named_parameters() if not p.equal(before[name])]
    assert all(parameter.grad is None for parameter in model.parameters()), "or they would not count as its memory"
    beside_head = [name for name in moved if "classifier" not in name]
    assert bool(beside_head) is (cell.method not in ("head", LIMIT))
    assert len(moved) > len(beside_head)
    gc.collect()
