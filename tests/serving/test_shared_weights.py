"""Served models hold equal weights once, and answer as before."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import numpy as np
import torch
from samples import reviews
from torch import nn

from fastpeft.ops.frozen_linear import set_packing
from fastpeft.ops.packing import Packs
from fastpeft.serving.server import described
from fastpeft.serving.shared_weights import share_weights
from fastpeft.serving.tasks import Tasks
from fastpeft.training.prediction import Predictor

TEXTS = [text for text, _ in reviews(3)]


def network() -> nn.Module:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 7, bias=False))
    model[3].weight = model[0].weight
    return model.requires_grad_(False).eval()


def test_equal_tensors_are_those_of_the_other_model_and_tied_ones_stay_tied() -> None:
    first = network()
    own = copy.deepcopy(first)
    own[1].weight[3, 2] += 1  # no entry by which weights are looked up
    held = share_weights(nn.ModuleDict({"under_another_name": own, "head": nn.Linear(4, 2)}), [nn.Linear(3, 3), first])
    assert own[0].weight is own[3].weight is first[0].weight
    assert own[1].bias is first[1].bias
    assert own[1].weight is not first[1].weight, "one entry differs"
    assert own[2].running_var is first[2].running_var
    norm = sum(tensor.nbytes for tensor in first[2].state_dict().values())
    assert held == first[0].weight.nbytes + first[1].bias.nbytes + norm


def test_what_is_equal_in_value_alone_is_not_shared() -> None:
    first = nn.ParameterList([torch.full((3, 2), float("nan")), torch.ones(2, 3), torch.ones(2, 2)])
    second = nn.ParameterList([torch.full((3, 2), float("nan")), torch.ones(3, 2).t(), torch.ones(2, 2).bfloat16()])
    before = list(second)
    assert share_weights(second, [first]) == 0
    assert all(one is other for one, other in zip(second, before))


def test_packs_are_shared_with_their_weight() -> None:
    first = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).requires_grad_(False)
    second = copy.deepcopy(first)
    second[1].weight[0, 0] += 1
    for model in (first, second):
        set_packing(model)
    share_weights(second, [first])
    assert isinstance(second[0].packs, Packs)
    assert second[0].packs is first[0].packs
    assert second[1].packs is not first[1].packs


def test_a_run_that_packs_nothing_gets_no_packs() -> None:
    first = nn.Sequential(nn.Linear(8, 8)).requires_grad_(False)
    second = copy.deepcopy(first)
    for model in (first, second):
        set_packing(model)
    first[0].packs.enabled = False
    packs = [model[0].packs for model in (first, second)]
    share_weights(second, [first])
    share_weights(first, [second])
    assert second[0].weight is first[0].weight
    assert [model[0].packs for model in (first, second)] == packs


def test_a_model_holds_what_others_hold_and_answers_to_the_same_bits(runs: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(runs / "number", other)
    tasks = Tasks({"a": runs / "a", "number": runs / "number", "pairs": runs / "pairs", "other": other})
    beside, number, pairs, again = tasks
    size = sum(each.nbytes for each in again.run.loaded.model.state_dict().values())
    assert beside.held == number.held == 0, "a side network, and the first of the others"
    assert 0.3 * size < pairs.held < again.held, "with a head alone it shares what it does not adapt"
    assert again.held > 0.9 * size, "all but what was made when it was loaded"
    assert described(tasks)[3] == "other: a model of its own (head has no side network); 0 MB of its weights are shared"
    predictor = Predictor(other)
    expected = predictor.scores([predictor.encode(text) for text in TEXTS])
    tasks.remove("number")
    ((_, found),) = tasks.answer([("other", TEXTS)])
    np.testing.assert_array_equal(found, expected)
