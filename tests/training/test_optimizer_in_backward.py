"""An optimizer that steps in backward, against the same optimizer after it."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fastpeft.errors import FastpeftError
from fastpeft.training.optimizer_in_backward import StepsInBackward


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 80), nn.Tanh(), nn.Linear(80, 1))


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def fused(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, fused=True)


def eight_bit(parameters: Any) -> torch.optim.Optimizer:
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("needs bitsandbytes")
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, lr=1e-2)


def trained(make: Callable[[Any], torch.optim.Optimizer], bucket: int | None) -> nn.Module:
    """The network after three steps whose rate falls; `bucket` None: the optimizer steps after backward."""
    model = network()
    optimizer = make(model.parameters())
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    if bucket is not None:
        StepsInBackward(optimizer, bucket=bucket)
    for seed in range(3):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(seed))
        model(x).square().mean().backward()
        if bucket == 1:
            assert all(p.grad is None for p in model.parameters())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("make", [adamw, fused, eight_bit])
@pytest.mark.parametrize("bucket", [1, 6000, 2**30])
def test_the_bits_are_those_of_steps_after_backward(make, bucket):
    within, after = trained(make, bucket), trained(make, None)
    for ours, theirs, start in zip(within.parameters(), after.parameters(), network().parameters()):
        assert torch.equal(ours, theirs)
        assert not torch.equal(ours, start)


def test_no_more_than_a_bucket_waits():
    model, seen = network(), []
    bucket = 4 * 80

    def check(gradients):
        seen.append([g.numel() for g in gradients])
        assert sum(p.grad is not None for p in model.parameters()) == len(gradients)

    StepsInBackward(adamw(model.parameters()), check, bucket)
    model(torch.ones(1, 16)).sum().backward()
    assert sorted(itertools.chain.from_iterable(seen)) == sorted(
        p.numel() for p in model.parameters() if p.grad is None
    )
    for waited in seen:
        assert 4 * (sum(waited) - waited[-1]) < bucket <= 4 * sum(waited)


def test_a_check_that_raises_leaves_what_it_saw_as_it_was():
    model = network()

    def check(gradients):
        if not all(g.isfinite().all() for g in gradients):
            raise FastpeftError("not finite")

    StepsInBackward(adamw(model.parameters()), check, 1)
    model[0].weight.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(FastpeftError, match="not finite"):
        model(torch.ones(1, 16)).sum().backward()
    assert torch.equal(model[0].weight, network()[0].weight)
    assert not torch.equal(model[4].weight, network()[4].weight)


def test_a_second_backward_before_the_step_is_refused():
    model = network()
    optimizer = adamw(model.parameters())
    StepsInBackward(optimizer)
    model(torch.ones(1, 16)).sum().backward()
    with pytest.raises(FastpeftError, match="twice"):
        model(torch.ones(1, 16)).sum().backward()
    optimizer.step()
    model(torch.ones(1, 16)).sum().backward()
