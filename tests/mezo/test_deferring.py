"""MeZO that leaves the end of a step to the next one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mezo_networks import ESTIMATES, equal, fit, network, weights
from torch import Tensor, nn

from fastpeft import FastpeftError, MeZO
from fastpeft.mezo import FZOO, InPlace, in_place
from fastpeft.mezo.estimator import Estimator


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("estimator", "limit"), ESTIMATES, ids=str)
def test_deferring_changes_no_bit(estimator: Estimator, limit: float | None, dtype: torch.dtype) -> None:
    """Whenever it is settled: after step 3, in `settled`, by saving, at the end."""

    def groups(model: nn.Module) -> list[dict]:
        return [{"params": model[0].parameters(), "weight_decay": 0.1}, {"params": model[2].parameters(), "eps": 2e-3}]

    ours, theirs = network(dtype), network(dtype)
    lr = 1e-5 if isinstance(estimator, FZOO) else 1e-2
    deferred = MeZO(groups(ours), lr, estimator=estimator, rule=InPlace(defer=True, max_projected_grad=limit))
    at_once = MeZO(groups(theirs), lr, estimator=estimator, rule=InPlace(max_projected_grad=limit))
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
    perturb = in_place.mezo_perturb_

    def count(params: list[Tensor], offsets: list[int], seeds: list[int], *args: Any, **kwargs: Any) -> None:
        passes.append(seeds)
        perturb(params, offsets, seeds, *args, **kwargs)

    monkeypatch.setattr(in_place, "mezo_perturb_", count)
    model = network()
    counts = {}
    for defer in (False, True):
        optimizer = MeZO(model, lr=1e-2, rule=InPlace(defer=defer))
        optimizer.step(fit(model))
        passes.clear()
        for step in range(5):
            optimizer.step(fit(model, step))
        counts[defer] = len(passes)
    assert counts == {False: 15, True: 10}
    assert [len(seeds) for seeds in passes] == [2, 1] * 5


def test_no_step_inside_settled() -> None:
    model = network()
    optimizer = MeZO(model, lr=1e-2, rule=InPlace(defer=True))
    optimizer.step(fit(model))
    with pytest.raises(FastpeftError, match="no step inside"), optimizer.settled():
        optimizer.step(fit(model))
    optimizer.step(fit(model))
    assert optimizer.steps_done == 2


def test_a_group_that_comes_later_finds_settled_weights() -> None:
    ours, theirs = network(), network()
    for model, defer in ((ours, True), (theirs, False)):
        optimizer = MeZO(model[0].parameters(), lr=0.1, rule=InPlace(defer=defer))
        optimizer.step(fit(model))
        optimizer.add_param_group({"params": model[2].bias, "lr": 0.05})
        optimizer.step(fit(model))
        optimizer.settle()
    assert equal(weights(ours), weights(theirs))
