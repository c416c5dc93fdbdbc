"""MeZO's usual loop: its four passes, its noise, what it refuses."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import PROMPT, Interrupt
from torch import Tensor, nn

from fastpeft import FastpeftError, MeZO, TrainConfig, train
from fastpeft.mezo import step_seed
from fastpeft.mezo.loop import LoopWeights, MeZOLoop
from fastpeft.training.evaluation import evaluate
from fastpeft.training.export import export

LR, EPS = 1e-2, 1e-3


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()


def loss_of(model: nn.Module) -> Any:
    x = torch.linspace(-1, 1, 20, dtype=torch.float64).view(5, 4)
    return lambda: model(x).square().sum()


def noise(seed: int, params: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.normal(0.0, 1.0, p.shape, generator=generator, dtype=p.dtype) for p in params]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("num_estimates", [1, 3])
def test_a_step_is_that_of_the_paper(weight_decay: float, num_estimates: int) -> None:
    model = layers()
    start = [p.detach().clone() for p in model.parameters()]
    closure = loss_of(model)

    def loss_at(z: list[Tensor], scale: float) -> Tensor:
        other = copy.deepcopy(model)
        with torch.no_grad():
            for p, at, direction in zip(other.parameters(), start, z):
                p.copy_(at + scale * direction)
        return loss_of(other)().detach()

    expected = [(1 - LR * weight_decay) * at for at in start]
    for draw in range(num_estimates):
        z = noise(step_seed(5, draw), start)
        g = (loss_at(z, EPS) - loss_at(z, -EPS)) / (2 * EPS) / num_estimates
        expected = [value - LR * g * direction for value, direction in zip(expected, z)]
    MeZOLoop(model, LR, EPS, weight_decay, 5, num_estimates=num_estimates).step(closure)
    torch.testing.assert_close(list(model.parameters()), expected, rtol=1e-9, atol=1e-11)


def test_a_step_goes_over_the_weights_four_times(monkeypatch: pytest.MonkeyPatch) -> None:
    model = layers()
    optimizer = MeZOLoop(model, LR, EPS, defer=True)
    optimizer.step(loss_of(model))  # the first looks twice
    scales: list[float] = []
    usual = LoopWeights.perturb

    def counted(tensors: Any, offsets: Any, seeds: Any, given: Any, *others: Any) -> None:
        scales.extend(given)
        usual(tensors, offsets, seeds, given, *others)

    monkeypatch.setattr(LoopWeights, "perturb", staticmethod(counted))
    optimizer.step(loss_of(model))
    assert scales == [EPS, -2 * EPS, EPS, -LR * optimizer.projected_grad]
    assert not optimizer.defer


def test_it_descends_and_leaves_torchs_random_state_alone() -> None:
    model = layers()
    closure = loss_of(model)
    optimizer = MeZOLoop(model, LR, EPS)
    state = torch.get_rng_state()
    losses = [optimizer.step(closure) for _ in range(200)]
    assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(torch.get_rng_state(), state)


def test_groups_have_noise_of_their_own_and_a_state_goes_on_to_the_bit() -> None:
    model = layers()
    params = list(model.parameters())
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 2 * LR}]
    optimizer = MeZOLoop(groups, LR, EPS)
    closure = loss_of(model)
    before = [p.detach().clone() for p in params]
    optimizer.step(closure)
    first, second = ((p.detach() - at).flatten() for p, at in zip(params[:2], before))
    assert not torch.allclose(2 * first[: len(second)], second)
    state, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    optimizer.step(closure)
    ended = copy.deepcopy(model.state_dict())
    model.load_state_dict(weights)
    resumed = MeZOLoop(groups, LR, EPS)
    resumed.load_state_dict(state)
    resumed.step(closure)
    assert all(torch.equal(value, ended[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"noise": "rademacher"}, "allows noise 'gaussian' alone; got 'rademacher'"),
        ({"restore": "exact"}, "allows restore 'in_place' alone; got 'exact'"),
    ],
)
def test_other_settings_are_refused(given: dict[str, str], message: str) -> None:
    with pytest.raises(FastpeftError, match=message):
        MeZOLoop(layers(), LR, **given)


def test_it_keeps_no_journal(tmp_path) -> None:
    optimizer = MeZOLoop(layers(), LR)
    for call in (optimizer.record, optimizer.resume):
        with pytest.raises(FastpeftError, match="keeps no journal"):
            call(tmp_path / "mezo.journal")
    assert isinstance(optimizer, MeZO)


def test_a_run_keeps_checkpoints_in_the_place_of_a_journal(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, method="mezo-loop", **PROMPT, max_steps=6, save_steps=2, learning_rate=1e-4)
    whole = train(replace(config, output=str(tmp_path / "whole")))
    with pytest.raises(KeyboardInterrupt):
        train(config, callbacks=[Interrupt(5)])
    resumed = train(config, resume=True)
    weights = [(result.folder / "model.safetensors").read_bytes() for result in (whole, resumed)]
    assert weights[0] == weights[1]
    assert not (whole.folder / "mezo.journal").exists()
    assert evaluate(whole.folder)["accuracy"] == whole.metrics["accuracy"]
    with pytest.raises(FastpeftError, match="made by MeZO by its usual loop: only the journal of"):
        export(whole.folder, tmp_path / "out", step=2)
