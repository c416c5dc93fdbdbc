"""The state of an adapter is a value in a layer's state dict: which of them fits which layer, and what it computes."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from siva_adapters import CLOSE, answers, move, tiny
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastpeft import FastpeftError, SivaConfig, SivaLinear
from fastpeft.siva.state import State

KINDS: dict[str, dict[str, Any]] = {
    "frozen": {"residual": "frozen"},
    "implicit": {"residual": "implicit"},
    "lossy": {"d": 8},
    "int8": {"residual_dtype": "int8"},
    **({"nf4": {"residual_dtype": "nf4-double"}} if importlib.util.find_spec("bitsandbytes") else {}),
}
X = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))


def layer_of(kind: str, form: str = "linear", **settings: Any) -> SivaLinear:
    torch.manual_seed(0)
    return SivaLinear.from_linear(
        Conv1D(12, 20) if form == "conv1d" else nn.Linear(20, 12), 4, **KINDS[kind], **settings
    )


def state_of(layer: SivaLinear) -> dict[str, Tensor]:
    return copy.deepcopy(layer.state_dict())


@pytest.mark.parametrize("target", ["same", "moved", "merged", "empty"])
@pytest.mark.parametrize("form", ["linear", "conv1d"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_state_dict_makes_any_layer_of_its_kind_the_same(kind: str, form: str, target: str) -> None:
    source = move(layer_of(kind, form), seed=1)
    layer = layer_of(kind, form, **({"init_weights": "saved"} if target == "empty" else {}))
    if target in ("moved", "merged"):
        move(layer, seed=2)
    if target == "merged":
        layer.merge()
    layer.load_state_dict(state_of(source))
    assert layer.adapters["default"].state is source.adapters["default"].state
    assert layer.states["default"] == source.states["default"]
    assert layer(X).equal(source(X))
    layer.merge()
    torch.testing.assert_close(layer(X), source(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_weight_is_known_by_its_state(kind: str) -> None:
    layer = move(layer_of(kind))
    apart, expected = state_of(layer), layer(X)
    layer.merge()
    merged = state_of(layer)
    assert merged["states.default"] == State.MERGED
    layer.load_state_dict(merged)
    assert layer.merged_adapters == ["default"]
    torch.testing.assert_close(layer(X), expected, **CLOSE)
    layer.load_state_dict(apart)
    assert not layer.merged
    torch.testing.assert_close(layer(X), expected, **CLOSE)
    with pytest.raises(FastpeftError, match=r"'default' is merged into the weight .* unmerge_adapter"):
        layer.load_state_dict(merged)


@pytest.mark.parametrize(("source", "target"), [("frozen", "implicit"), ("implicit", "frozen")])
def test_a_state_dict_serves_the_other_residual(source: str, target: str) -> None:
    given, layer = move(layer_of(source)), layer_of(target)
    layer.load_state_dict(state_of(given))
    torch.testing.assert_close(layer(X), given(X), **CLOSE)
    assert not torch.allclose(layer.base_layer.weight, given.base_layer.weight, atol=1e-4)
    torch.testing.assert_close(layer.pretrained(), given.pretrained(), **CLOSE)


@pytest.mark.parametrize("kind", ["frozen", "implicit"])
@pytest.mark.parametrize("merged", [False, True])
def test_a_weight_without_states_is_the_pretrained_one(kind: str, merged: bool) -> None:
    layer = move(layer_of(kind))
    expected, pretrained = layer(X), layer.pretrained().clone()
    if merged:
        layer.merge()
    layer.load_state_dict({"base_layer.weight": pretrained}, strict=False)
    assert not layer.merged
    torch.testing.assert_close(layer(X), expected, **CLOSE)
    if kind == "frozen":
        with pytest.raises(FastpeftError, match="not the one that the adapter was made from"):
            layer.load_state_dict({"base_layer.weight": 2 * pretrained}, strict=False)
        without = {key: each for key, each in state_of(layer).items() if not key.startswith("states.")}
        with pytest.raises(FastpeftError, match="not the one that the adapter was made from"):
            layer.load_state_dict(without, strict=False)  # W_r, which nothing tells


def test_an_adapter_that_is_empty_leaves_the_weight_to_the_others() -> None:
    given, layer = layer_of("frozen", init_weights="saved"), move(layer_of("frozen"))
    layer.load_state_dict(state_of(given))
    assert layer.adapters["default"].state is State.EMPTY
    assert layer.base_layer.weight.equal(given.base_layer.weight)
    with pytest.raises(FastpeftError, match="'default' was made with init_weights='saved'"):
        layer(X)


def test_files_of_adapters_have_no_states() -> None:
    model = move(get_peft_model(tiny(), SivaConfig(task_type="SEQ_CLS")).eval())
    assert not any("states" in key for key in get_peft_model_state_dict(model))
    expected = answers(model)
    model.load_state_dict(state_of(model))
    assert answers(model).equal(expected)
