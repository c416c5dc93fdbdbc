"""The peer of k-LST's bench computes what the library does, and every candidate runs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import RobertaConfig, RobertaForSequenceClassification

from bench import bench_ladder as bench
from bench import harness
from bench.direct_ladder import DirectLadder
from fastpeft import LadderConfig, LadderModel

CPU = torch.device("cpu")


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return RobertaForSequenceClassification(
        RobertaConfig(
            vocab_size=8_000, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32
        )
    )


@pytest.mark.parametrize("window", [1, 3, 9])
def test_the_direct_formulation_is_the_same_function(window: int) -> None:
    config = LadderConfig(window_size=window, reduction_factor=2, feature_dropout=0.0)
    ladder = LadderModel(tiny(), config).eval()
    direct = DirectLadder(copy.deepcopy(ladder)).eval()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    batch = {"input_ids": torch.randint(5, 60, (2, 5)), "attention_mask": mask, "labels": torch.tensor([0, 1])}
    losses = [model(**batch).loss for model in (ladder, direct)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for name in ("base.classifier.dense.weight", "side.down.weight", "side.blocks.1.fusion.positions"):
        torch.testing.assert_close(
            *(model.get_parameter(name).grad for model in (ladder, direct)), rtol=1e-4, atol=1e-6
        )
    number = window // 2  # the slot of block 1 that reads B_1
    rows = ladder.side.readers[1].index((1, number)) * ladder.side.width
    ours = ladder.side.projections["1"].weight.grad[rows : rows + ladder.side.width]
    theirs = direct.side.blocks[0].fusion.projections[number].grad
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_direct_lst_is_the_same_function() -> None:
    ladder = LadderModel(tiny(), LadderConfig(window_size=1, fusion="gated", reduction_factor=2)).eval()
    for block in ladder.side.blocks:
        nn.init.constant_(block.fusion.alpha, 0.1)
    direct = DirectLadder(copy.deepcopy(ladder)).eval()
    batch = {"input_ids": torch.randint(5, 60, (2, 5)), "attention_mask": torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])}
    losses = [model(**batch, labels=torch.tensor([0, 1])).loss for model in (ladder, direct)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    ours = ladder.side.projections["1"], ladder.side.blocks[0].fusion
    theirs = direct.side.blocks[0].fusion.projection, direct.side.blocks[0].fusion.gate
    for mine, other in zip(ours, theirs):
        for parameter, same in zip(mine.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, same.grad, rtol=1e-4, atol=1e-6)


def test_every_candidate_is_recorded(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.MODELS, "demo", tiny)
    file = tmp_path / "ladder.csv"
    harness.measure(file, bench.CASE, bench.candidates("demo", CPU), CPU, rounds=2)
    assert [row["candidate"] for row in harness.read_rows(file)] == [*bench.METHODS, bench.FORWARD]
    assert next(row["ratio_p50"] for row in harness.read_rows(file)) == "1"
