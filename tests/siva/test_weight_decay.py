"""Decaying SiVA's factors shrinks the pretrained weight: it is said, once."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fastpeft import SivaLinear
from fastpeft.siva import weight_decay


@pytest.fixture(autouse=True)
def fresh_hook(monkeypatch: pytest.MonkeyPatch):
    """The warning comes once in a process: give each test its own hook."""
    weight_decay._handle.remove()
    handle = register_optimizer_step_pre_hook(weight_decay._check)
    monkeypatch.setattr(weight_decay, "_handle", handle)
    yield
    handle.remove()


def steps(module: nn.Module, decay: float, count: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.1, weight_decay=decay)
    for _ in range(count):
        module(torch.ones(2, 6)).sum().backward()
        optimizer.step()


def test_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    layers = [SivaLinear.from_linear(nn.Linear(6, 5), r=2) for _ in range(2)]
    with caplog.at_level(logging.WARNING, logger="fastpeft"):
        for layer in layers:
            steps(layer, 0.01)
    assert [record.getMessage()[:17] for record in caplog.records] == ["weight_decay=0.01"]


def test_is_silent_without_decay_and_for_other_layers(caplog: pytest.LogCaptureFixture) -> None:
    layer = SivaLinear.from_linear(nn.Linear(6, 5), r=2)
    with caplog.at_level(logging.WARNING, logger="fastpeft"):
        steps(layer, 0.0)
        steps(nn.Linear(6, 5), 0.1)
    assert not caplog.records


def test_copies_are_watched_too(caplog: pytest.LogCaptureFixture) -> None:
    layer = copy.deepcopy(SivaLinear.from_linear(nn.Linear(6, 5), r=2))
    with caplog.at_level(logging.WARNING, logger="fastpeft"):
        steps(layer, 0.01)
    assert len(caplog.records) == 1
