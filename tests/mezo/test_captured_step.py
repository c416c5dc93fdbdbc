"""The step of MeZO for CUDA graphs, as it runs without one; what a replay does is in test_graphs.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mezo_networks import close, equal, network, weights
from torch import nn

from fastpeft import FastpeftError, MeZO
from fastpeft.mezo import CapturedStep

X = torch.linspace(-1, 1, 30).view(6, 5)


def needs_gpus(count: int) -> pytest.MarkDecorator:
    return pytest.mark.skipif(torch.cuda.device_count() < count, reason=f"needs {count} CUDA devices")


def optimizer_of(model: nn.Module, **settings: Any) -> MeZO:
    first, *others = model.parameters()
    groups = [{"params": [first], "eps": 1e-2}, {"params": others, "lr": 3e-2}]
    return MeZO(groups, lr=1e-2, eps=1e-3, model=model, on_nonfinite="skip", **settings)


@pytest.mark.parametrize(
    "settings",
    [{}, {"weight_decay": 0.1}, {"num_estimates": 3, "max_projected_grad": 0.05}, {"noise": "rademacher", "seed": 7}],
    ids=str,
)
def test_it_makes_the_steps_of_the_optimizer(settings: dict[str, Any]) -> None:
    """Of several groups, with learning rates that change."""
    ours, theirs = network(), network()
    one, other = optimizer_of(ours, **settings), optimizer_of(theirs, **settings)
    step = CapturedStep(one, lambda: ours(X).square().mean())
    for number in range(4):
        for optimizer in (one, other):
            optimizer.param_groups[1]["lr"] = 1e-2 / (1 + number)
        loss, expected = step(), other.step(lambda: theirs(X).square().mean())
        assert loss.item() == pytest.approx(expected, rel=1e-12)
        assert step.projected_grad.item() == other.projected_grad
        assert equal(weights(ours), weights(theirs))
    assert one.steps_done == other.steps_done == 4
    assert one.step(lambda: ours(X).square().mean()) == other.step(lambda: theirs(X).square().mean())


def test_what_is_not_finite_adds_nothing() -> None:
    model = network()
    before = weights(model)
    step = CapturedStep(optimizer_of(model), lambda: model(X).sum() * torch.inf)
    step()
    assert step.projected_grad.isnan()
    assert close(weights(model), before)


def test_after_an_exception_the_weights_are_those_before() -> None:
    model = network()
    before = weights(model)

    def fails() -> torch.Tensor:
        raise KeyboardInterrupt

    step = CapturedStep(optimizer_of(model), fails)
    with pytest.raises(KeyboardInterrupt):
        step()
    assert close(weights(model), before)


def test_a_captured_weight_decay_cannot_change(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    optimizer = optimizer_of(model, weight_decay=0.1)
    step = CapturedStep(optimizer, lambda: model(X).square().mean())
    step()
    monkeypatch.setattr(step, "_graph", object())
    optimizer.param_groups[0]["lr"] = 1.0
    with pytest.raises(FastpeftError, match="learning rate times weight decay is"):
        step()


def test_it_captures_and_replays_on_the_device_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the current one, whose stream would see nothing of the step. CUDA is a stand-in here."""
    model = network()
    step = CapturedStep(optimizer_of(model), lambda: model(X).square().mean())
    step()
    current, seen = ["cuda:0"], []

    @contextmanager
    def device(chosen: torch.device) -> Iterator[None]:
        current.append(str(chosen))
        yield
        current.pop()

    @contextmanager
    def graph(_: Any, stream: str = "of no device") -> Iterator[None]:
        seen.append(("capture", current[-1], stream))
        yield

    made = SimpleNamespace(replay=lambda: seen.append(("replay", current[-1])))
    for name, value in {"device": device, "graph": graph, "Stream": str, "CUDAGraph": lambda: made}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(step, "_device", torch.device("cuda:1"))
    step()
    assert seen == [("capture", "cuda:1", "cuda:1"), ("replay", "cuda:1")]


@pytest.mark.gpu
@pytest.mark.parametrize("index", [pytest.param(index, marks=needs_gpus(index + 1)) for index in range(2)])
def test_a_gpu_replays_steps_also_where_it_is_not_the_current_one(index: int) -> None:
    model = network().to(f"cuda:{index}")
    x = X.to(f"cuda:{index}")
    step = CapturedStep(optimizer_of(model), lambda: model(x).square().mean())
    for _ in range(4):
        before = weights(model)
        step()
        assert not equal(weights(model), before)


@pytest.mark.parametrize(
    "settings",
    [{"on_nonfinite": "stop"}, {"estimator": "fzoo", "num_estimates": 2}, {"restore": "exact"}],
    ids=str,
)
def test_what_asks_for_numbers_is_refused(settings: dict[str, Any]) -> None:
    optimizer = MeZO(network(), lr=1e-2, **{"on_nonfinite": "skip", **settings})
    with pytest.raises(FastpeftError, match="CapturedStep takes a MeZO with"):
        CapturedStep(optimizer, lambda: torch.zeros(()))


def test_another_optimizer_is_refused() -> None:
    with pytest.raises(FastpeftError, match="takes a MeZO, and the optimizer is a SGD"):
        CapturedStep(torch.optim.SGD(network().parameters()), lambda: torch.zeros(()))  # type: ignore[arg-type]


def test_a_journal_that_begins_later_is_refused(tmp_path: Path) -> None:
    """The step writes no records, so a replay of the journal would give other weights."""
    model = network()
    optimizer = optimizer_of(model)
    step = CapturedStep(optimizer, lambda: model(X).square().mean())
    step()
    optimizer.record(tmp_path / "journal")
    before = weights(model)
    with pytest.raises(FastpeftError, match="without a journal"):
        step()
    assert equal(weights(model), before)
    assert optimizer.steps_done == 1
