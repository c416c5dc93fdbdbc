"""`Backbone`: passes without its layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from backbones import IDS, MASK, tiny
from torch import Tensor, nn

from fastpeft.ladder.backbone import Backbone

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("Roberta", "DistilBert", "ModernBert", "Electra", "DebertaV2", "GPT2")


def last_feature(model: Any) -> Tensor:
    """What the last layer of `model` gives for the samples, as any model computes it."""
    kept = []
    backbone = Backbone(model)
    with torch.no_grad(), backbone.listen(lambda layer, feature: None, lambda feature: kept.append(feature) or feature):
        model(IDS, attention_mask=MASK)
    return kept[0]


@pytest.mark.parametrize("learnt", [False, True], ids=["first pass", "after a whole pass"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_pass_without_layers_computes_the_rest_of_the_model(kind: str, learnt: bool) -> None:
    model = tiny(kind)
    model.config.pad_token_id = 0
    backbone = Backbone(model)
    if learnt:
        with backbone.listen(lambda layer, feature: None, lambda feature: feature):
            model(IDS, attention_mask=MASK)
    with backbone.skip_layers(last_feature(model)):
        skipped = model(IDS, attention_mask=MASK).logits
    assert torch.equal(skipped, model(IDS, attention_mask=MASK).logits)


def test_layers_are_skipped_and_are_themselves_again_afterwards() -> None:
    model = tiny()
    model.roberta.encoder.layer[1].forward = own = model.roberta.encoder.layer[1].forward  # as some libraries do
    backbone, output = Backbone(model), torch.zeros(3, 9, 16)
    seen: list[nn.Module] = []
    hooks = [layer.attention.register_forward_hook(lambda module, *_: seen.append(module)) for layer in backbone.layers]
    with backbone.skip_layers(output):
        model(IDS)
        seen.clear()  # the first layer runs once, to learn what layers return
        model(IDS)
    assert not seen
    for hook in hooks:
        hook.remove()
    assert vars(backbone.layers[1])["forward"] is own
    assert "forward" not in vars(backbone.layers[0])


def test_gradients_reach_the_output_given() -> None:
    model, output = tiny(), torch.randn(3, 9, 16, requires_grad=True)
    assert isinstance(model, transformers.RobertaForSequenceClassification)
    with Backbone(model).skip_layers(output):
        model(IDS).logits.sum().backward()
    assert output.grad is not None
    assert output.grad.abs().sum() > 0
