"""Side networks in the direct form compute what the library's form does, and go through a run as these do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backbones import ladder, logits, tiny, train_a_little, trainable
from side_networks import EXACT, LAYERS, MASK, features, network
from torch import Tensor

from bench.oracles.direct_run import DirectRun
from fastpeft import LadderModel
from fastpeft.ladder.side import SideRun


def output(run: SideRun, given: list[Tensor]) -> Tensor:
    for layer, feature in enumerate(given):
        run.feed(layer, feature)
    return run.output()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        {"window_size": 1},
        {"window_size": 3},
        {"window_size": 9},
        {"window_size": 3, "residual": True, "normalise_features": True},
        {"window_size": 3, "residual": "state"},
        {"window_size": 5, "share_projections": True},
        {"window_size": 3, "output_mix": "add"},
        {"window_size": 1, "fusion": "gated"},
        {"window_size": 1, "fusion": "gated", "share_projections": True},
        {"window_size": 3, "layers_per_block": 2},
        {"window_size": 3, "layers_per_block": LAYERS},
    ],
    ids=str,
)
def test_it_is_the_same_function(config: dict[str, Any], causal: bool) -> None:
    side = network(causal, **config)
    results = []
    for kind in (SideRun, DirectRun):
        given = [feature.requires_grad_() for feature in features()]
        made = output(kind(side, MASK, 0), given)
        seen = made[MASK]  # what padding has for a state nobody reads
        asked = [*side.parameters(), *given]
        results.append([seen, *torch.autograd.grad(seen.square().sum(), asked, allow_unused=True)])
    torch.testing.assert_close(results[1][0], results[0][0], **EXACT)
    for own, direct in zip(*results, strict=True):
        if own is None or direct is None:  # zeros outside the backbone meet some weight
            assert not any(each.any() for each in (own, direct) if each is not None)
        else:  # the library keeps its log-sum-exp in float32 for backward
            assert (direct - own).abs().max() <= 5e-6 * own.abs().max()


def test_it_drops_features_and_blocks_in_training() -> None:
    side = network(window_size=3, feature_dropout=0.5).train()
    torch.manual_seed(0)
    first, second = (output(DirectRun(side, MASK, 1), features()) for _ in range(2))
    assert not torch.equal(first, second)
    dropping = network(window_size=3, feature_dropout=0.0, layer_drop=0.5).train()
    found = [output(kind(dropping, MASK, 3), features()) for kind in (SideRun, DirectRun)]
    torch.testing.assert_close(found[1], found[0], **EXACT)
    assert not torch.allclose(found[1], output(DirectRun(dropping.eval(), MASK, 3), features()))


@pytest.mark.parametrize("config", [{"window_size": 3}, {"window_size": 1, "fusion": "gated"}], ids=str)
def test_a_model_that_computes_so_is_saved_and_loaded_as_ever(config: dict[str, Any], tmp_path) -> None:
    model = ladder(**config)
    model.side_run = DirectRun
    train_a_little(model, steps=1)
    assert all(parameter.grad is not None for parameter in trainable(model).values())
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(LadderModel.from_pretrained(tmp_path, base=tiny())), logits(model))
