"""MeZO by several directions, by other noise and as FZOO."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mezo_networks import ESTIMATES, close, equal, fit, network, weights
from torch import Tensor

from fastpeft import MeZO
from fastpeft.mezo import FZOO, SPSA, InPlace, step_seed
from fastpeft.mezo.estimator import Estimator
from fastpeft.ops import noise


def plain_step(
    groups: list[dict[str, Any]], loss_of: Callable[[], Tensor], step: int, estimator: Estimator, limit: float | None
) -> float:
    """A step written straight from the methods, each addition with a z as large as the tensor; returns its g."""
    n, kind, eps = estimator.num_estimates, estimator.noise, 1e-3
    limit = math.inf if limit is None else limit
    seeds = [step_seed(0, step * n + draw) for draw in range(n)]
    none = [0.0] * len(groups)

    def add(seed: int, *scales: float, decays: list[float] = none) -> None:
        offset = 0
        for group, scale, decay in zip(groups, scales * (len(groups) // len(scales)), decays):
            for p in group["params"]:
                z = noise.NOISE[kind](offset, p.numel(), seed, "cpu").view(p.shape)
                a, s = (torch.tensor(x, dtype=torch.float32) for x in (1 - decay, scale))
                p.data = (a * p.data.float() + s * z).to(p.dtype)
                offset += p.numel()

    slopes, losses = [], []
    with torch.no_grad():
        if isinstance(estimator, FZOO):
            at_home = loss_of().item()
            for draw, seed in enumerate(seeds):
                if draw:
                    add(seeds[draw - 1], -eps)
                add(seed, eps)
                losses.append(loss_of().item())
            scale = eps * n * statistics.stdev(losses)
            slopes = [(loss - at_home) / scale if scale else 0.0 for loss in losses]
            away = eps
        else:
            for draw, seed in enumerate(seeds):
                if draw:
                    add(seeds[draw - 1], eps)
                add(seed, eps)
                plus = loss_of().item()
                add(seed, -2 * eps)
                slopes.append(max(-limit, min(limit, (plus - loss_of().item()) / (2 * eps))) / n)
            away = -eps
        decays = [group["lr"] * group["weight_decay"] for group in groups]
        last = [-away * (1 - decay) - group["lr"] * slopes[-1] for group, decay in zip(groups, decays)]
        add(seeds[-1], *last, decays=decays)
        for seed, slope in zip(seeds[:-1], slopes):
            add(seed, *(-group["lr"] * slope for group in groups))
    return sum(slopes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("estimator", "limit"), ESTIMATES, ids=str)
def test_steps_are_those_of_a_plain_loop(estimator: Estimator, limit: float | None, dtype: torch.dtype) -> None:
    """Bit for bit: the same noise, the same roundings, decay before the step, two groups, a schedule."""
    ours, theirs = network(dtype), network(dtype)
    own = ({"lr": 3e-2, "weight_decay": 0.1}, {"lr": 1e-2, "weight_decay": 0.0})
    if isinstance(estimator, FZOO):
        own = tuple({**each, "lr": each["lr"] / 100} for each in own)
    given = [{"params": layer.parameters(), **s} for layer, s in zip(ours[::2], own)]
    optimizer = MeZO(given, lr=1.0, estimator=estimator, rule=InPlace(max_projected_grad=limit))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)
    for step in range(12):
        groups = [
            {**s, "params": list(layer.parameters()), "lr": group["lr"]}
            for layer, s, group in zip(theirs[::2], own, optimizer.param_groups)
        ]
        optimizer.step(fit(ours, step))
        schedule.step()
        assert optimizer.projected_grad == plain_step(groups, fit(theirs, step), step, estimator, limit)
        assert equal(weights(ours), weights(theirs))
    assert not any(torch.equal(a, b) for a, b in zip(weights(network(dtype)), weights(ours)))


@pytest.mark.long(but="rademacher")
@pytest.mark.parametrize("estimator", [SPSA(), SPSA(noise="rademacher"), SPSA(3)], ids=["one", "rademacher", "three"])
def test_the_estimate_is_unbiased_on_a_quadratic(estimator: Estimator) -> None:
    """The mean step of 3,000 seeds lies within 4.5 standard errors of the gradient, in each coordinate."""
    curvature = torch.linspace(0.5, 2, 6, dtype=torch.float64)
    start = torch.linspace(-1, 1, 6, dtype=torch.float64)
    steps = []
    for seed in range(3_000):
        theta = start.clone().requires_grad_()
        optimizer = MeZO([theta], lr=1.0, seed=seed, estimator=estimator)
        optimizer.step(lambda theta=theta: 0.5 * (curvature * theta**2).sum())
        steps.append(start - theta.detach())
    estimates = torch.stack(steps)
    error = (estimates.mean(0) - curvature * start).abs()
    assert (error <= 4.5 * estimates.std(0) / len(steps) ** 0.5).all()
    assert (estimates.std(0) / len(steps) ** 0.5 < 0.06).all()  # so a bias of a tenth of the gradient shows


def test_fzoo_steps_do_not_depend_on_the_scale_of_the_loss() -> None:
    def trained(scale: float) -> list[Tensor]:
        model = network(torch.float64)
        optimizer = MeZO(model, lr=1e-4, estimator=FZOO(4, "gaussian"))
        for step in range(5):
            optimizer.step(lambda step=step: scale * fit(model, step)())
        return weights(model)

    for one, other in zip(trained(1.0), trained(1000.0)):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


def test_fzoo_near_a_minimum_is_bounded_by_its_limit_only() -> None:
    """There sigma vanishes, but not what the curvature adds to each loss."""

    def moved(limit: float | None) -> float:
        theta = torch.full((1000,), 1e-6, dtype=torch.float64, requires_grad=True)
        before = theta.detach().clone()
        optimizer = MeZO([theta], lr=1e-6, seed=1, estimator=FZOO(8), rule=InPlace(max_projected_grad=limit))
        optimizer.step(lambda: 0.5 * (theta**2).sum())
        return (theta.detach() - before).abs().max().item()

    assert moved(10 / 1e-3) <= 10 * 1e-6 / 1e-3 * 1.001
    assert moved(None) > 1


def test_fzoo_makes_no_step_where_the_losses_are_equal() -> None:
    model = network()
    before = weights(model)
    MeZO(model, lr=1.0, estimator=FZOO(2, "gaussian")).step(lambda: 1.0)
    assert close(weights(model), before)


def test_fzoo_looks_at_theta_and_then_at_one_side() -> None:
    model = network()
    seen = []
    optimizer = MeZO(model, lr=0.1, estimator=FZOO(2, "gaussian"))
    loss = optimizer.step(lambda: seen.append(weights(model)) or fit(model)())
    assert len(seen) == 4  # the first loss is asked for twice
    assert equal(seen[0], weights(network()))
    assert loss == fit(network())().item()
    for draw in (0, 1):
        z = noise.gaussian(0, 35, step_seed(0, draw)).view(7, 5)
        torch.testing.assert_close(seen[2 + draw][0] - seen[0][0], 1e-3 * z, rtol=0, atol=1e-6)
