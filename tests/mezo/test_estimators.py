"""MeZO by several directions, by other noise and as FZOO."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from networks import SETTINGS, close, equal, fit, network, weights
from torch import Tensor, nn

from fastpeft import MeZO
from fastpeft.mezo import step_seed
from fastpeft.ops import noise

pytestmark = pytest.mark.usefixtures("one_thread")


def plain_run(model: nn.Module, steps: int, lr: float, wd: float, **settings: Any) -> list[float]:
    """Steps written straight from the methods, each addition with a z as large as the tensor; returns each step's g."""
    n, eps = settings.get("num_estimates", 1), 1e-3
    kind, limit = settings.get("noise", "gaussian"), settings.get("max_projected_grad", math.inf)
    found = []

    def add(seed: int, scale: float, decay: float = 0.0) -> None:
        offset = 0
        for p in model.parameters():
            z = noise.NOISE[kind](offset, p.numel(), seed, "cpu").view(p.shape)
            a, s = (torch.tensor(x, dtype=torch.float32) for x in (1 - decay, scale))
            p.data = (a * p.data.float() + s * z).to(p.dtype)
            offset += p.numel()

    for step in range(steps):
        seeds = [step_seed(0, step * n + draw) for draw in range(n)]
        with torch.no_grad():
            loss_of = lambda step=step: fit(model, step)().item()  # noqa: E731
            if settings.get("estimator") == "fzoo":
                at_home, losses = loss_of(), []
                for draw, seed in enumerate(seeds):
                    if draw:
                        add(seeds[draw - 1], -eps)
                    add(seed, eps)
                    losses.append(loss_of())
                slopes = [(loss - at_home) / (eps * n * statistics.stdev(losses)) for loss in losses]
                away = eps
            else:
                slopes = []
                for draw, seed in enumerate(seeds):
                    if draw:
                        add(seeds[draw - 1], eps)
                    add(seed, eps)
                    plus = loss_of()
                    add(seed, -2 * eps)
                    slopes.append(max(-limit, min(limit, (plus - loss_of()) / (2 * eps))) / n)
                away = -eps
            add(seeds[-1], -away * (1 - lr * wd) - lr * slopes[-1], lr * wd)
            for seed, slope in zip(seeds[:-1], slopes):
                add(seed, -lr * slope)
        found.append(sum(slopes))
    return found


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_every_estimator_is_its_plain_loop(settings: dict[str, Any]) -> None:
    ours, theirs = network(), network()
    optimizer = MeZO(ours, lr=1e-3, weight_decay=0.1, **settings)
    slopes = []
    for step in range(10):
        optimizer.step(fit(ours, step))
        slopes.append(optimizer.projected_grad)
    assert slopes == plain_run(theirs, 10, 1e-3, 0.1, **settings)
    assert equal(weights(ours), weights(theirs))
    assert not equal(weights(ours), weights(network()))


@pytest.mark.long(but="{'noise': 'rademacher'}")
@pytest.mark.parametrize("settings", [{}, {"noise": "rademacher"}, {"num_estimates": 3}], ids=str)
def test_the_estimate_is_unbiased_on_a_quadratic(settings: dict[str, Any]) -> None:
    """The mean step of 3,000 seeds lies within 4.5 standard errors of the gradient, in each coordinate."""
    curvature = torch.linspace(0.5, 2, 6, dtype=torch.float64)
    start = torch.linspace(-1, 1, 6, dtype=torch.float64)
    steps = []
    for seed in range(3_000):
        theta = start.clone().requires_grad_()
        optimizer = MeZO([theta], lr=1.0, seed=seed, **settings)
        optimizer.step(lambda theta=theta: 0.5 * (curvature * theta**2).sum())
        steps.append(start - theta.detach())
    estimates = torch.stack(steps)
    error = (estimates.mean(0) - curvature * start).abs()
    assert (error <= 4.5 * estimates.std(0) / len(steps) ** 0.5).all()
    assert (estimates.std(0) / len(steps) ** 0.5 < 0.06).all()  # so a bias of a tenth of the gradient shows


def test_fzoo_steps_do_not_depend_on_the_scale_of_the_loss() -> None:
    def trained(scale: float) -> list[Tensor]:
        model = network(torch.float64)
        optimizer = MeZO(model, lr=1e-4, estimator="fzoo", num_estimates=4)
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
        settings = {"estimator": "fzoo", "num_estimates": 8, "noise": "rademacher", "max_projected_grad": limit}
        MeZO([theta], lr=1e-6, seed=1, **settings).step(lambda: 0.5 * (theta**2).sum())
        return (theta.detach() - before).abs().max().item()

    assert moved(10 / 1e-3) <= 10 * 1e-6 / 1e-3 * 1.001
    assert moved(None) > 1


def test_fzoo_makes_no_step_where_the_losses_are_equal() -> None:
    model = network()
    before = weights(model)
    MeZO(model, lr=1.0, estimator="fzoo", num_estimates=2).step(lambda: 1.0)
    assert close(weights(model), before)


def test_fzoo_looks_at_theta_and_then_at_one_side() -> None:
    model = network()
    seen = []
    optimizer = MeZO(model, lr=0.1, estimator="fzoo", num_estimates=2)
    loss = optimizer.step(lambda: seen.append(weights(model)) or fit(model)())
    assert len(seen) == 4  # the first loss is asked for twice
    assert equal(seen[0], weights(network()))
    assert loss == fit(network())().item()
    for draw in (0, 1):
        z = noise.gaussian(0, 35, step_seed(0, draw)).view(7, 5)
        torch.testing.assert_close(seen[2 + draw][0] - seen[0][0], 1e-3 * z, rtol=0, atol=1e-6)
