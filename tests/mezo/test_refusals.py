"""MeZO against bad input and bad luck: what it refuses, and the weights that a failure leaves."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from mezo_networks import ESTIMATES, close, fit, network, weights
from torch import Tensor, nn

from fastpeft import FastpeftError, MeZO
from fastpeft.mezo import FZOO, SPSA, Exact, InPlace, step_seed
from fastpeft.mezo.estimator import Estimator


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
        ({"lr": 0.1, "seed": 1.5}, r"seed is 1\.5; allowed are whole numbers"),
        ({"lr": 0.1, "seed": True}, "seed is True; allowed are whole numbers"),
        ({"lr": None}, "lr is None"),
        ({"lr": 0.1, "eps": "1e-3"}, "eps is '1e-3'"),
    ],
)
def test_numbers_out_of_range(options: dict[str, float], message: str) -> None:
    with pytest.raises(FastpeftError, match=message):
        MeZO(network(), **options)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (SPSA, {"noise": "uniform"}, "noise is 'uniform'; allowed are gaussian, rademacher"),
        (SPSA, {"num_estimates": 0}, "num_estimates is 0; allowed are 1 to 255"),
        (FZOO, {"num_estimates": 1}, "num_estimates is 1; allowed are 2 to 255"),
        (InPlace, {"on_nonfinite": "go on"}, "on_nonfinite is 'go on'; allowed are stop, skip"),
        (InPlace, {"max_projected_grad": 0.0}, r"max_projected_grad is 0\.0; .* above 0"),
        (Exact, {"max_projected_grad": "1"}, "max_projected_grad is '1'; .* above 0"),
        (Exact, {"rounding": "up"}, "rounding is 'up'; allowed are stochastic, nearest"),
    ],
)
def test_settings_of_estimators_and_rules(kind: type, options: dict[str, Any], message: str) -> None:
    with pytest.raises(FastpeftError, match=message):
        kind(**options)


def frozen() -> nn.Module:
    return network().requires_grad_(False)


def views_that_overlap() -> list[Tensor]:
    memory = torch.zeros(10)
    return [memory[:6].requires_grad_(), memory[4:].requires_grad_()]


def tensor_in_two_groups() -> list[dict]:
    tensor = nn.Parameter(torch.zeros(3))
    return [{"params": [tensor]}, {"params": [tensor], "lr": 1.0}]


def test_a_parameter_that_was_frozen_since_is_not_changed() -> None:
    model = network()
    optimizer = MeZO(model, lr=0.1)
    first = next(model.parameters()).requires_grad_(False)
    before = first.clone()
    with pytest.raises(FastpeftError, match=r"1 of its 4 parameters .*Make a new optimizer"):
        optimizer.step(lambda: model(torch.ones(1, 4)).sum())
    assert first.equal(before)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (frozen, "no parameter that requires a gradient"),
        (lambda: frozen().parameters(), "no parameter that requires a gradient"),
        (list, "no parameter that requires a gradient"),
        (views_that_overlap, "share memory"),
        (tensor_in_two_groups, "share memory"),
        (lambda: [torch.zeros(3, dtype=torch.complex64, requires_grad=True)], "complex64"),
        (lambda: [{"params": [torch.zeros(3, requires_grad=True)], "eps": 0}], "eps is 0"),
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


@pytest.mark.parametrize(("estimator", "limit"), ESTIMATES, ids=str)
def test_a_step_that_is_not_finite_can_be_skipped(
    estimator: Estimator, limit: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    """With the weights as before, to rounding, the noise of the next step, and a log entry."""
    model = network()
    rule = InPlace(on_nonfinite="skip", defer=True, max_projected_grad=limit)
    optimizer = MeZO(model, lr=1e-3, estimator=estimator, rule=rule)
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
    seeds = [step_seed(0, estimator.num_estimates + draw) for draw in (0, 1)]
    assert re.search(rf"is nan at step 2 \(noise seed ({seeds[0]}|{seeds[1]})\); the step is skipped", message)
    optimizer.step(fit(model, 2))
    assert math.isfinite(optimizer.projected_grad)


def test_an_update_that_is_not_finite_can_be_skipped() -> None:
    model = network()
    before = weights(model)
    optimizer = MeZO(model, lr=1e300, rule=InPlace(on_nonfinite="skip"))
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


@pytest.mark.parametrize("loss", [np.float32(0.5), np.float64(0.5), np.int64(1), 1, torch.tensor([0.5])], ids=type)
def test_a_loss_is_a_number_of_any_kind(loss: Any) -> None:
    assert MeZO(network(), lr=1e-2).step(lambda: loss) == float(loss)


def test_a_step_without_closure_or_estimate() -> None:
    optimizer = MeZO(network(), lr=0.1)
    with pytest.raises(FastpeftError, match=r"closure .* use fastpeft\.MeZOTrainer.* take its own state_dict\(\)"):
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


def test_the_state_of_parameters_in_another_order_is_refused() -> None:
    model = nn.Linear(4, 4)
    state = MeZO(model, lr=1e-2).state_dict()
    other = MeZO([*reversed([*model.named_parameters()])], lr=1e-2)
    with pytest.raises(FastpeftError, match="where the optimizer has the parameter bias, the state has weight"):
        other.load_state_dict(state)


def test_a_setting_that_was_changed_is_checked() -> None:
    model = nn.Linear(4, 1)
    optimizer = MeZO(model, lr=1e-2)
    optimizer.param_groups[0]["eps"] = 0
    with pytest.raises(FastpeftError, match="MeZO: eps is 0; allowed is a finite number, above 0"):
        optimizer.step(lambda: model(torch.ones(2, 4)).square().mean())


def test_the_state_of_other_noise_is_refused() -> None:
    state = MeZO(network(), lr=0.1).state_dict()
    state["drawn_by"] = "philox10-box-muller"
    with pytest.raises(FastpeftError, match=r"drawn by 'philox10-box-muller'.*begin anew"):
        MeZO(network(), lr=0.1).load_state_dict(state)
