"""MeZO as an optimizer: its estimate and its update, what it leaves alone, and what it saves."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from mezo_networks import close, equal, fit, network, weights
from torch import Tensor, nn

from fastpeft import MeZO
from fastpeft.mezo import SPSA, Exact, InPlace, Journal, step_seed
from fastpeft.mezo.in_place import Rule
from fastpeft.ops import noise

# -- the seed of a step ------------------------------------------------------------------------------------------------


def test_step_seeds_are_those_of_splitmix64() -> None:
    published = (6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431)
    assert [step_seed(1234567, step) for step in range(4)] == [number % 2**63 for number in published]
    assert step_seed(2**63 - 1, 10**9) < 2**63


# -- estimate and update -----------------------------------------------------------------------------------------------


def test_projected_grad_is_the_slope_along_the_noise() -> None:
    """On a quadratic the two-sided difference is the directional derivative itself."""
    theta = torch.linspace(-1, 1, 40, dtype=torch.float64).requires_grad_()
    scale = torch.linspace(0.5, 2, 40, dtype=torch.float64)
    before = theta.detach().clone()
    optimizer = MeZO([theta], lr=0.0, eps=1e-3, seed=5)
    loss = optimizer.step(lambda: (scale * theta**2).sum())
    z = noise.gaussian(0, 40, step_seed(5, 0)).double()
    slope = (2 * scale * before * z).sum().item()
    assert optimizer.projected_grad == pytest.approx(slope, rel=1e-9)
    # the mean of the two losses is above the loss by the curvature
    assert loss == pytest.approx((scale * (before**2 + 1e-6 * z**2)).sum().item(), rel=1e-12)


def test_it_descends_a_quadratic() -> None:
    theta = torch.full((10,), 2.0, requires_grad=True)
    optimizer = MeZO([theta], lr=2e-2)
    losses = [optimizer.step(lambda: 0.5 * (theta**2).sum()) for _ in range(300)]
    assert losses[0] == pytest.approx(20, rel=1e-3)
    assert losses[-1] < 0.2
    assert optimizer.steps_done == 300


def test_each_group_has_the_gradient_of_its_own_eps() -> None:
    """The loss reads one group only, so with the other's eps its g would be ten times too small."""
    one, other = torch.ones(8, requires_grad=True), torch.ones(8, requires_grad=True)
    optimizer = MeZO([{"params": [one], "eps": 1e-2}, {"params": [other], "eps": 1e-3}], lr=0.5)
    optimizer.step(lambda: other.double().sum())
    z = noise.gaussian(8, 8, step_seed(0, 0))  # the second group's part of the noise
    torch.testing.assert_close(other.detach(), 1 - 0.5 * z.sum() * z, rtol=0, atol=2e-3)
    assert optimizer.projected_grad == pytest.approx(0.1 * z.sum().item(), rel=1e-3)  # of the first group


def test_a_limit_holds_for_the_group_of_the_smallest_eps() -> None:
    one, other = (torch.ones(8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizer = MeZO(
        [{"params": [one], "eps": 1e-1}, {"params": [other], "eps": 1e-3}],
        lr=1.0,
        rule=InPlace(max_projected_grad=1e-2),
    )
    optimizer.step(lambda: 1e3 * (one.sum() + other.sum()))
    z = noise.gaussian(0, 16, step_seed(0, 0)).double()
    sign = math.copysign(1, optimizer.projected_grad)
    for param, own, size in ((one, z[:8], 1e-4), (other, z[8:], 1e-2)):
        torch.testing.assert_close(param.detach(), 1 - sign * size * own, rtol=0, atol=1e-7)


@pytest.mark.parametrize("first", [[], [torch.zeros(3)]], ids=["empty", "frozen"])
def test_a_first_group_without_parameters_changes_nothing(first: list[Tensor], tmp_path: Path) -> None:
    """Whatever its eps: the losses are taken over that of the first group with parameters, also in the journal."""
    ours, theirs, again = network(), network(), network()
    rest = lambda model: [  # noqa: E731
        {"params": model[0].parameters(), "weight_decay": 0.1},
        {"params": model[2].parameters(), "eps": 2e-3},
    ]
    optimizer = MeZO([{"params": first, "eps": 1.0}, *rest(ours)], lr=1e-2)
    optimizer.record(tmp_path / "run")
    plain = MeZO(rest(theirs), lr=1e-2)
    for step in range(3):
        assert optimizer.step(fit(ours, step)) == plain.step(fit(theirs, step))
        assert optimizer.projected_grad == plain.projected_grad
    assert equal(weights(ours), weights(theirs))
    Journal.open(tmp_path / "run").replay(list(again.parameters()))
    assert equal(weights(again), weights(ours))


# -- what is trained ---------------------------------------------------------------------------------------------------


def test_tied_weights_count_once_at_their_first_place() -> None:
    torch.manual_seed(0)
    shared, last = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(3))
    alone = copy.deepcopy([shared, last])
    x = torch.randn(2, 4)
    MeZO([shared, shared, last], lr=0.1).step(lambda: (x @ shared @ shared).sum() * last.sum())
    MeZO(alone, lr=0.1).step(lambda: (x @ alone[0] @ alone[0]).sum() * alone[1].sum())
    assert equal([shared, last], alone)


def test_frozen_parameters_are_left_alone() -> None:
    model = network()
    model[0].requires_grad_(False)
    before = weights(model)
    for params in (model, model.parameters(), list(model.named_parameters())):
        MeZO(params, lr=0.1).step(fit(model))
    changed = [not torch.equal(a, b) for a, b in zip(before, weights(model))]
    assert changed == [False, False, True, True]


# -- how the loss is computed ------------------------------------------------------------------------------------------


def test_no_graph_and_no_dropout() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.5), nn.Linear(7, 3))
    model[2].eval()
    seen = []

    def closure() -> Tensor:
        loss = fit(model)()
        seen.append((loss.requires_grad, torch.is_grad_enabled(), any(m.training for m in model.modules())))
        return loss

    optimizer = MeZO(model, lr=0.1)
    optimizer.step(closure)
    optimizer.step(closure)
    assert seen == [(False, False, False)] * 5  # the first step asks twice for one loss
    assert [module.training for module in model.modules()] == [True, True, True, False]


def test_an_autocast_around_the_step_sees_the_perturbation() -> None:
    """Autocast keeps its casts of weights until it ends, whatever happens to the weights."""
    model = network()
    optimizer = MeZO(model, lr=0.1, eps=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = model(torch.ones(2, 5))
        optimizer.step(lambda: model(torch.ones(2, 5)).float().sum())
        assert abs(optimizer.projected_grad) > 1e-2
        assert not torch.equal(model(torch.ones(2, 5)), before)


def test_a_graph_from_before_the_step_is_refused() -> None:
    model = network()
    loss = fit(model)()
    MeZO(model, lr=0.1).step(fit(model))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_loss_in_half_precision_brings_one_warning(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    """Near 0.75 numbers are half of the dtype's eps apart, so over 2 eps = 0.5 the slope is a multiple of it."""
    model = network(dtype)

    def told(closure: Callable[[], Tensor]) -> list[str]:
        caplog.clear()
        with caplog.at_level("WARNING", logger="fastpeft"):
            optimizer = MeZO(model, lr=0.0, eps=0.25, rule=Exact())
            for _ in range(2):
                optimizer.step(closure)
        return caplog.messages

    near = lambda: model(torch.zeros(1, 5, dtype=dtype)).mean() * 0 + 0.75  # noqa: E731
    (warning,) = told(near)
    name, apart = str(dtype).removeprefix("torch."), torch.finfo(dtype).eps / 2
    assert f"in {name}, in which numbers near 0.75 are {apart:.2g} apart" in warning
    assert f"multiples of about {apart / 0.5:.2g}" in warning
    assert not told(lambda: near().float())


def test_two_halves_are_a_step() -> None:
    ours, theirs = network(), network()
    halves, whole = MeZO(ours, lr=0.1), MeZO(theirs, lr=0.1)
    assert halves.estimate(fit(ours)) == whole.step(fit(theirs))
    assert halves.step() is None
    assert equal(weights(ours), weights(theirs))
    before = weights(ours)
    halves.estimate(fit(ours))
    assert not close(weights(ours), before)
    halves.settle()
    assert close(weights(ours), before)
    assert halves.steps_done == 1


# -- saving ------------------------------------------------------------------------------------------------------------


def test_a_resumed_run_continues_to_the_bit() -> None:
    def run(model: nn.Module, optimizer: MeZO, schedule: torch.optim.lr_scheduler.LRScheduler, steps: range) -> None:
        for step in steps:
            optimizer.step(fit(model, step))
            schedule.step()

    def fresh(model: nn.Module, **options: float) -> tuple[MeZO, torch.optim.lr_scheduler.LRScheduler]:
        optimizer = MeZO(model, **options)
        return optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 20)

    whole = network()
    optimizer, schedule = fresh(whole, lr=0.1, eps=1e-2, weight_decay=0.1, seed=3)
    run(whole, optimizer, schedule, range(7))
    saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict(), schedule.state_dict()))
    run(whole, optimizer, schedule, range(7, 20))

    resumed = network()
    resumed.load_state_dict(saved[0])
    optimizer, schedule = fresh(resumed, lr=7.0)  # all that differs is in the state
    optimizer.load_state_dict(saved[1])
    schedule.load_state_dict(saved[2])
    assert (optimizer.seed, optimizer.steps_done) == (3, 7)
    run(resumed, optimizer, schedule, range(7, 20))
    assert equal(weights(resumed), weights(whole))


def test_numbers_of_numpy_are_recorded_and_saved(tmp_path: Path) -> None:
    """As a sweep over np.logspace gives them."""
    ours, theirs = network(), network()
    limit = np.float32(1e-3)
    optimizer = MeZO(ours, np.float32(1e-2), np.float64(1e-3), np.float32(0.5), rule=InPlace(max_projected_grad=limit))
    optimizer.record(tmp_path / "run")
    plain = MeZO(theirs, float(np.float32(1e-2)), 1e-3, 0.5, rule=InPlace(max_projected_grad=float(limit)))
    for step in range(2):
        assert optimizer.step(fit(ours, step)) == plain.step(fit(theirs, step))
        assert type(optimizer.projected_grad) is float
    torch.save(optimizer.state_dict(), tmp_path / "state")
    assert torch.load(tmp_path / "state", weights_only=True) == plain.state_dict()
    again = network()
    Journal.open(tmp_path / "run").replay(again)
    assert equal(weights(again), weights(theirs))


@pytest.mark.parametrize("rule", [InPlace(), Exact()])
def test_the_state_brings_estimator_and_noise(rule: Rule) -> None:
    ours, theirs = network(), network()
    optimizer = MeZO(ours, lr=0.1, estimator=SPSA(3, "rademacher"), rule=rule)
    other = MeZO(theirs, lr=0.1, rule=rule)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.step(fit(ours)) == other.step(fit(theirs))
    assert equal(weights(ours), weights(theirs))
