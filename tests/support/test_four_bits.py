"""Models whose base bitsandbytes keeps in 4 bits: to evaluate or to save them changes nothing, on any CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from siva_adapters import move, tiny, token_ids, trained
from torch import Tensor, nn

from fastpeft import FastpeftError, LadderConfig, LadderModel, LadderPool, MeZO, SivaConfig
from fastpeft.support.four_bits import keep_form

bnb = pytest.importorskip("bitsandbytes")

LORA = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def decoder() -> Any:
    """A decoder with layers without bias, which bitsandbytes arranges for inference on CPUs with bfloat16."""
    model = tiny("Llama", "ForCausalLM", hidden_size=64, intermediate_size=128, max_position_embeddings=64)
    for name, layer in list(model.model.named_modules()):
        if type(layer) is nn.Linear:
            found = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, quant_type="nf4")
            found.load_state_dict({"weight": 5 * layer.weight.data})
            model.model.set_submodule(name, found.to("cpu").eval())
    model.is_loaded_in_4bit = True
    return model


def siva() -> Any:
    return peft.get_peft_model(decoder(), SivaConfig(r=2, target_modules=["q_proj", "k_proj"]))


def beside_siva() -> Any:
    return LadderModel(siva(), LadderConfig(window_size=1, reduction_factor=4, train_adapters=True))


def beside() -> Any:
    return LadderModel(decoder(), LadderConfig(window_size=1, reduction_factor=4))


def in_pool() -> Any:
    return LadderPool(decoder()).add("task", LadderConfig(window_size=1, reduction_factor=4))


def loss(model: nn.Module) -> Tensor:
    found: Tensor = model(input_ids=token_ids(), labels=token_ids()).loss
    return found


@pytest.mark.parametrize("make", [siva, beside_siva])
def test_gradients_pass_after_an_evaluation(make: Any) -> None:
    found = []
    for evaluated in (False, True):
        model = move(make())
        if evaluated:
            with torch.no_grad():
                loss(model.eval())
        loss(model.train()).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if ".siva_d" in name})
    assert len(found[0]) == 8
    for name, gradient in found[0].items():
        assert gradient.abs().max() > 0
        assert found[1][name].equal(gradient)


@pytest.mark.parametrize("make", [siva, beside, in_pool])
def test_saving_changes_no_answer(make: Any, tmp_path: Path) -> None:
    model = make().eval()
    with torch.no_grad():
        before = loss(model)
        model.save_pretrained(tmp_path)
        assert loss(model).equal(before)
        if make is beside:
            assert loss(LadderModel.from_pretrained(tmp_path, base=decoder())).equal(before)


def test_saving_changes_no_step_of_mezo(tmp_path: Path) -> None:
    losses = []
    for saves in (False, True):
        model = peft.get_peft_model(decoder(), LORA)
        optimizer = MeZO([p for p in model.parameters() if p.requires_grad], lr=1e-4, model=model)
        losses.append([])
        for _ in range(3):
            losses[-1].append(optimizer.step(lambda: loss(model)))  # noqa: B023
            if saves:
                model.save_pretrained(tmp_path)
    assert losses[0] == losses[1]


def test_what_is_arranged_is_refused_where_gradients_would_pass() -> None:
    model = decoder()
    model.model.layers[1].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    keep_form(model)
    assert not any(getattr(module, "support_avx512bf16_for_cpu", False) for module in model.modules())
    with pytest.raises(FastpeftError, match=r"model.layers.1.mlp.up_proj: bitsandbytes has arranged .* Load the model"):
        peft.get_peft_model(model, SivaConfig(r=2, target_modules=["q_proj"]))
    assert not any("siva" in name for name in trained(model))
