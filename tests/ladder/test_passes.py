"""`Backbone`: passes without its layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from backbones import IDS, MASK, ladder, moved, tiny
from causal_models import causal_model
from torch import nn

from fastpeft import FastpeftError, unfuse_head
from fastpeft.ladder.backbone import Backbone
from fastpeft.ladder.inputs import check_positions
from fastpeft.ladder.passes import listen, skip_layers


def test_layers_are_skipped_and_are_themselves_again_afterwards() -> None:
    model = tiny()
    model.roberta.encoder.layer[1].forward = own = model.roberta.encoder.layer[1].forward  # as some libraries do
    backbone, output = Backbone(model), torch.zeros(3, 9, 16)
    seen: list[nn.Module] = []
    hooks = [layer.attention.register_forward_hook(lambda module, *_: seen.append(module)) for layer in backbone.layers]
    with skip_layers(backbone, output, {"input_ids": IDS}):
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
    with skip_layers(Backbone(model), output, {"input_ids": IDS}):
        model(IDS).logits.sum().backward()
    assert output.grad is not None
    assert output.grad.abs().sum() > 0


def test_features_must_have_the_shape_of_the_input() -> None:
    model = tiny()
    seen: list[int] = []
    with (
        pytest.raises(FastpeftError, match=r"layer 0 is float32 \(3, 9, 16\); .* here \(3, 8, 16\)\. Load the base"),
        listen(Backbone(model), lambda layer, feature: seen.append(layer), lambda feature: feature, (3, 8)),
    ):
        model(IDS)
    assert not seen


@pytest.mark.parametrize("kind", ["causal", "questions"])
def test_no_cache_is_made_that_nobody_asked_for(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a model takes `use_cache` among other arguments, without a name for it."""
    base = causal_model("granitemoe") if kind == "causal" else tiny("Llama", "ForQuestionAnswering")
    model, kept = ladder(base).train(), []
    monkeypatch.setattr(transformers.DynamicCache, "update", lambda *args, **_: kept.append(args) or args[1:3])
    output = model(IDS, attention_mask=MASK)
    assert not kept
    assert output.get("past_key_values") is None


@pytest.mark.long(but="llama-3-LST")
@pytest.mark.parametrize("network", [{}, {"window_size": 1, "fusion": "gated"}], ids=["3-LST", "LST"])
@pytest.mark.parametrize("kind", ["llama", "Roberta"])
def test_a_whole_model_is_one_graph(kind: str, network: dict[str, Any]) -> None:
    base = causal_model(kind) if kind == "llama" else tiny(kind, "ForMaskedLM")
    model = unfuse_head(moved(base, **network)).train()  # a compiled one makes its logits
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    losses, gradients = [], []
    for each in (model, compiled, compiled):
        model.zero_grad()
        loss = each(input_ids=IDS, attention_mask=MASK, labels=IDS).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: part.grad for name, part in model.named_parameters() if part.grad is not None})
    assert losses[1:] == losses[:1] * 2
    for later in gradients[1:]:
        assert later.keys() == gradients[0].keys()
        assert all(gradient.equal(later[name]) for name, gradient in gradients[0].items())


def test_a_compiled_pass_refuses_joined_texts() -> None:
    compiled: Any = torch.compile(check_positions, backend="eager", fullgraph=True)
    places = torch.arange(6).expand(2, -1)
    compiled(places, None)
    with pytest.raises(RuntimeError, match="position_ids begin anew within a row"):
        compiled(places % 3, None)
    compiled(places % 3, MASK)
