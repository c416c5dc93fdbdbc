"""MeZO as an optimizer: its estimate and its update, what it leaves alone, and how it fails."""

from __future__ import annotations

import copy
import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import RobertaConfig, RobertaForMaskedLM

from fastpeft import FastpeftError, MeZO, SivaConfig, noise
from fastpeft.mezo import Journal, perturbing, step_seed

pytestmark = pytest.mark.usefixtures("one_thread")


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def fit(model: nn.Module, step: int = 0) -> Callable[[], Tensor]:
    """The closure of one step on a batch of its own."""
    generator = torch.Generator().manual_seed(step)
    dtype = next(model.parameters()).dtype
    x, y = torch.randn(6, 5, generator=generator).to(dtype), torch.randn(6, 3, generator=generator).to(dtype)
    return lambda: F.mse_loss(model(x), y)


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def close(one: list[Tensor], other: list[Tensor]) -> bool:
    """Equal to the roundings of a step that did nothing: three of values near 1, perturbed by 1e-3."""
    return all((a - b).abs().max() <= 4 * torch.finfo(a.dtype).eps for a, b in zip(one, other, strict=True))


def plain_step(groups: list[dict], closure: Callable[[], Tensor], seed: int) -> float:
    """One step written straight from the method, z as large as each tensor, for groups of one eps; returns g."""

    def add(scale_of: Callable[[dict], float], decay_of: Callable[[dict], float] = lambda _: 0.0) -> None:
        offset = 0
        for group in groups:
            for p in group["params"]:
                z = noise.gaussian(offset, p.numel(), seed).view(p.shape)
                a, scale = (torch.tensor(x, dtype=torch.float32) for x in (1 - decay_of(group), scale_of(group)))
                p.data = (a * p.data.float() + scale * z).to(p.dtype)
                offset += p.numel()

    eps = groups[0]["eps"]
    with torch.no_grad():
        add(lambda _: eps)
        plus = closure().item()
        add(lambda _: -2 * eps)
        minus = closure().item()
    g = (plus - minus) / (2 * eps)
    kept = lambda group: 1 - group["lr"] * group["weight_decay"]  # noqa: E731
    add(lambda group: kept(group) * eps - group["lr"] * g, lambda group: group["lr"] * group["weight_decay"])
    return g


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_hundred_steps_are_those_of_a_plain_loop(dtype: torch.dtype) -> None:
    """Bit for bit: the same noise, the same roundings, decay before the step, two groups, a schedule."""
    ours, theirs = network(dtype), network(dtype)
    settings = ({"lr": 3e-2, "weight_decay": 0.1}, {"lr": 1e-2})
    optimizer = MeZO([{"params": layer.parameters(), **s} for layer, s in zip((ours[0], ours[2]), settings)], lr=1.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)
    start = weights(ours)
    for step in range(100):
        groups = [
            {"weight_decay": 0.0, "eps": 1e-3, **s, "params": list(layer.parameters()), "lr": group["lr"]}
            for layer, s, group in zip((theirs[0], theirs[2]), settings, optimizer.param_groups)
        ]
        optimizer.step(fit(ours, step))
        schedule.step()
        assert optimizer.projected_grad == plain_step(groups, fit(theirs, step), step_seed(0, step))
        assert equal(weights(ours), weights(theirs))
    assert not any(torch.equal(a, b) for a, b in zip(start, weights(ours)))
    assert optimizer.param_groups[1]["lr"] == pytest.approx(1e-2 * 0.98**100)


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
        [{"params": [one], "eps": 1e-1}, {"params": [other], "eps": 1e-3}], lr=1.0, max_projected_grad=1e-2
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


def test_lr_0_returns_to_within_rounding() -> None:
    model = network()
    before = weights(model)
    optimizer = MeZO(model, lr=0.0, weight_decay=0.5)
    optimizer.step(fit(model))
    assert close(weights(model), before)


def test_double_precision_returns_closer() -> None:
    model = network(torch.float64)
    before = weights(model)
    MeZO(model, lr=0.0).step(fit(model))
    assert close(weights(model), before)


# -- several directions, other noise, FZOO -----------------------------------------------------------------------------

SETTINGS = [
    {},
    {"noise": "rademacher"},
    {"num_estimates": 3},
    {"num_estimates": 2, "noise": "rademacher", "max_projected_grad": 0.05},
    {"estimator": "fzoo", "num_estimates": 4, "noise": "rademacher"},
]


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


# -- deferring the end of a step ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_deferring_changes_no_bit(settings: dict[str, Any], dtype: torch.dtype) -> None:
    """Whenever it is settled: after step 3, in `settled`, by saving, at the end."""

    def groups(model: nn.Module) -> list[dict]:
        return [{"params": model[0].parameters(), "weight_decay": 0.1}, {"params": model[2].parameters(), "eps": 2e-3}]

    ours, theirs = network(dtype), network(dtype)
    lr = 1e-5 if settings.get("estimator") == "fzoo" else 1e-2
    deferred = MeZO(groups(ours), lr, defer=True, **settings)
    at_once = MeZO(groups(theirs), lr, **settings)
    for step in range(12):
        assert deferred.step(fit(ours, step)) == at_once.step(fit(theirs, step))
        assert not equal(weights(ours), weights(theirs))
        if step == 3:
            deferred.settle()
            assert equal(weights(ours), weights(theirs))
        elif step == 5:
            with deferred.settled():
                assert equal(weights(ours), weights(theirs))
        elif step == 7:
            deferred.state_dict()
            assert equal(weights(ours), weights(theirs))
    deferred.settle()
    assert equal(weights(ours), weights(theirs))


def test_a_deferred_step_makes_one_pass_less(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    perturb = perturbing.mezo_perturb_

    def count(params: list[Tensor], offsets: list[int], seeds: list[int], *args: Any, **kwargs: Any) -> None:
        passes.append(seeds)
        perturb(params, offsets, seeds, *args, **kwargs)

    monkeypatch.setattr(perturbing, "mezo_perturb_", count)
    model = network()
    counts = {}
    for defer in (False, True):
        optimizer = MeZO(model, lr=1e-2, defer=defer)
        optimizer.step(fit(model))
        passes.clear()
        for step in range(5):
            optimizer.step(fit(model, step))
        counts[defer] = len(passes)
    assert counts == {False: 15, True: 10}
    assert [len(seeds) for seeds in passes] == [2, 1] * 5


def test_no_step_inside_settled() -> None:
    model = network()
    optimizer = MeZO(model, lr=1e-2, defer=True)
    optimizer.step(fit(model))
    with pytest.raises(FastpeftError, match="no step inside"), optimizer.settled():
        optimizer.step(fit(model))
    optimizer.step(fit(model))
    assert optimizer.steps_done == 2


def test_a_group_that_comes_later_finds_settled_weights() -> None:
    ours, theirs = network(), network()
    for model, defer in ((ours, True), (theirs, False)):
        optimizer = MeZO(model[0].parameters(), lr=0.1, defer=defer)
        optimizer.step(fit(model))
        optimizer.add_param_group({"params": model[2].parameters()})
        optimizer.step(fit(model))
        optimizer.settle()
    assert equal(weights(ours), weights(theirs))


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


def test_a_group_can_come_later() -> None:
    model = network()
    optimizer = MeZO(model[0].parameters(), lr=0.1)
    optimizer.step(fit(model))
    optimizer.add_param_group({"params": model[2].bias, "lr": 0.0})
    before = weights(model)
    optimizer.step(fit(model))
    assert optimizer.param_groups[1]["eps"] == 1e-3
    changed = [(a - b).abs().max() > 1e-5 for a, b in zip(before, weights(model))]
    assert changed == [True, True, False, False]


def test_siva_factors_of_a_roberta() -> None:
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        initializer_range=0.3,
    )
    model = peft.get_peft_model(RobertaForMaskedLM(config), SivaConfig(r=2, target_modules="all-linear"))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = torch.randint(3, 30, (4, 9), generator=torch.Generator().manual_seed(0))
    model.train()  # dropout is on but for the losses of a step
    optimizer = MeZO(model, lr=1e-3)
    losses = [optimizer.step(lambda: model(ids, labels=ids).loss) for _ in range(20)]
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert changed == names
    assert all("siva_" in name for name in changed)
    assert losses[-1] < losses[0]
    assert all(p.grad is None for p in model.parameters())


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


@pytest.mark.parametrize("restore", ["in_place", "exact"])
def test_the_state_brings_estimator_and_noise(restore: str) -> None:
    ours, theirs = network(), network()
    optimizer = MeZO(ours, lr=0.1, num_estimates=3, noise="rademacher", restore=restore)
    other = MeZO(theirs, lr=0.1, restore=restore)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.step(fit(ours)) == other.step(fit(theirs))
    assert equal(weights(ours), weights(theirs))


def test_the_seed_decides_the_noise() -> None:
    def trained(seed: int) -> list[Tensor]:
        model = network()
        MeZO(model, lr=0.1, seed=seed).step(fit(model))
        return weights(model)

    assert equal(trained(1), trained(1))
    assert not equal(trained(1), trained(2))


# -- bad input and bad luck --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1e-3}, r"lr is -0\.001; allowed is a finite number, 0 or more"),
        ({"lr": math.nan}, "lr is nan"),
        ({"lr": 0.1, "eps": 0.0}, r"eps is 0\.0; .*above 0"),
        ({"lr": 0.1, "eps": -1.0}, r"eps is -1\.0"),
        ({"lr": 0.1, "weight_decay": -0.1}, r"weight_decay is -0\.1"),
        ({"lr": math.inf}, "lr is inf"),
        ({"lr": 0.1, "seed": -1}, "seed is -1"),
        ({"lr": 0.1, "seed": 2**63}, "seed is 9223372036854775808"),
        ({"lr": 0.1, "noise": "uniform"}, "noise is 'uniform'; allowed are gaussian, rademacher"),
        ({"lr": 0.1, "on_nonfinite": "go on"}, "on_nonfinite is 'go on'; allowed are stop, skip"),
        ({"lr": 0.1, "estimator": "adam"}, "estimator is 'adam'; allowed are spsa, fzoo"),
        ({"lr": 0.1, "num_estimates": 0}, "num_estimates is 0; allowed are 1 to 255"),
        ({"lr": 0.1, "estimator": "fzoo"}, "num_estimates is 1; allowed are 2 to 255"),
        ({"lr": 0.1, "max_projected_grad": 0.0}, r"max_projected_grad is 0\.0; .* above 0"),
        ({"lr": 0.1, "max_projected_grad": "1"}, "max_projected_grad is '1'; .* above 0"),
        ({"lr": 0.1, "seed": 1.5}, r"seed is 1\.5; allowed are whole numbers"),
        ({"lr": None}, "lr is None"),
        ({"lr": 0.1, "eps": "1e-3"}, "eps is '1e-3'"),
        ({"lr": 0.1, "model": 3}, "model is a int"),
    ],
)
def test_numbers_out_of_range(options: dict[str, float], message: str) -> None:
    with pytest.raises(FastpeftError, match=message):
        MeZO(network(), **options)


def frozen() -> nn.Module:
    return network().requires_grad_(False)


def views_that_overlap() -> list[Tensor]:
    memory = torch.zeros(10)
    return [memory[:6].requires_grad_(), memory[4:].requires_grad_()]


def tensor_in_two_groups() -> list[dict]:
    tensor = nn.Parameter(torch.zeros(3))
    return [{"params": [tensor]}, {"params": [tensor], "lr": 1.0}]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (frozen, "no parameter that requires a gradient"),
        (lambda: frozen().parameters(), "no parameter that requires a gradient"),
        (list, "no parameter that requires a gradient"),
        (lambda: nn.Parameter(torch.zeros(3)), "got one tensor"),
        (lambda: ["weight"], "among the parameters is a str"),
        (views_that_overlap, "share memory"),
        (tensor_in_two_groups, "share memory"),
        (lambda: [torch.zeros(3, dtype=torch.complex64, requires_grad=True)], "complex64"),
        (lambda: [{"params": [torch.zeros(3, requires_grad=True)], "eps": 0}], "eps is 0"),
        (lambda: nn.Linear(3, 3, device="meta"), "'weight' is on the meta device"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_cannot_be_trained(params: Callable[[], object], message: str) -> None:
    with pytest.raises(FastpeftError, match=message):
        MeZO(params(), lr=0.1)


@pytest.mark.parametrize("bad_call", [1, 2, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_with_the_weights_restored(bad_call: int, value: float) -> None:
    model = network()
    before = weights(model)
    optimizer = MeZO(model, lr=0.1)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        return fit(model)() if calls != bad_call else torch.tensor(value)

    sign = r"\+" if bad_call < 3 else "-"
    with pytest.raises(FastpeftError, match=rf"theta {sign} eps z is {value} at step 1 \(noise seed {step_seed(0, 0)}"):
        optimizer.step(closure)
    assert close(weights(model), before)
    assert optimizer.steps_done == 0
    optimizer.step(fit(model))  # it can go on


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_step_that_is_not_finite_can_be_skipped(settings: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """With the weights as before, to rounding, the noise of the next step, and a log entry."""
    model = network()
    optimizer = MeZO(model, lr=1e-3, on_nonfinite="skip", defer=True, **settings)
    optimizer.step(fit(model, 0))
    optimizer.settle()
    before = weights(model)
    calls = 0

    def second_is_nan() -> Tensor:
        nonlocal calls
        calls += 1
        return fit(model)() * (math.nan if calls == 2 else 1)

    with caplog.at_level("WARNING", logger="fastpeft"):
        assert math.isnan(optimizer.step(second_is_nan))
    assert calls == 2
    assert optimizer.steps_done == 2
    assert math.isnan(optimizer.projected_grad)
    assert close(weights(model), before)
    (message,) = caplog.messages
    seeds = [step_seed(0, settings.get("num_estimates", 1) + draw) for draw in (0, 1)]
    assert re.search(rf"is nan at step 2 \(noise seed ({seeds[0]}|{seeds[1]})\); the step is skipped", message)
    optimizer.step(fit(model, 2))
    assert math.isfinite(optimizer.projected_grad)


def test_an_update_that_is_not_finite_can_be_skipped() -> None:
    model = network()
    before = weights(model)
    optimizer = MeZO(model, lr=1e300, on_nonfinite="skip")
    optimizer.step(fit(model))
    assert close(weights(model), before)
    assert optimizer.steps_done == 1


def test_any_exception_leaves_the_weights_restored() -> None:
    model = network()
    before = weights(model)

    def closure() -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        MeZO(model, lr=0.1).step(closure)
    assert close(weights(model), before)


def test_an_update_that_is_not_finite_leaves_every_group_restored() -> None:
    model = network()
    before = weights(model)
    groups = [{"params": model[0].parameters(), "lr": 1e-3}, {"params": model[2].parameters(), "lr": 1e300}]
    with pytest.raises(FastpeftError, match=r"update is not finite .* at step 1"):
        MeZO(groups, lr=0.1).step(fit(model))
    assert close(weights(model), before)


def test_a_loss_that_differs_at_equal_weights_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.5), nn.Linear(7, 3))
    before = weights(model)
    optimizer = MeZO(model.parameters(), lr=0.1)  # without the model it cannot turn dropout off
    with pytest.raises(FastpeftError, match=r"for the same weights.*dropout"):
        optimizer.step(fit(model))
    assert close(weights(model), before)
    model.eval()
    optimizer.step(fit(model))
    MeZO(model.train(), lr=0.1).step(fit(model))


@pytest.mark.parametrize(
    ("loss", "message"),
    [(None, "returned a NoneType"), (torch.zeros(3), r"a tensor of shape \(3,\)"), ("0.5", "returned a str")],
)
def test_a_closure_that_returns_no_loss(loss: object, message: str) -> None:
    with pytest.raises(FastpeftError, match=message):
        MeZO(network(), lr=0.1).step(lambda: loss)


def test_a_step_without_closure_or_estimate() -> None:
    optimizer = MeZO(network(), lr=0.1)
    with pytest.raises(FastpeftError, match="needs a closure"):
        optimizer.step()


def test_perturbed_weights_are_not_saved() -> None:
    model = network()
    optimizer = MeZO(model, lr=0.1)
    optimizer.estimate(fit(model))
    with pytest.raises(FastpeftError, match="weights are perturbed"):
        optimizer.state_dict()


def test_the_state_of_another_optimizer_is_refused() -> None:
    model = network()
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(FastpeftError, match="another optimizer wrote it"):
        MeZO(model, lr=0.1).load_state_dict(other.state_dict())
