"""SiVA on bases whose linear layers bitsandbytes keeps in 4 bits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from siva_adapters import CLOSE, SHAPE, answers, move
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaForSequenceClassification

from fastpeft import FastpeftError, SivaConfig, SivaLinear
from fastpeft.siva.decompose import decompose
from fastpeft.siva.export import save_as_lora
from fastpeft.training.memory import simulate_training_step

bnb = pytest.importorskip("bitsandbytes")

NESTED = pytest.mark.parametrize("nested", [False, True], ids=["scales", "nested scales"])


def in_4_bits(layer: nn.Linear, nested: bool = True, kind: str = "nf4", **arguments: Any) -> Any:
    n, k = layer.weight.shape
    found = bnb.nn.Linear4bit(k, n, layer.bias is not None, quant_type=kind, device="meta", **arguments)
    weight = bnb.nn.Params4bit(
        layer.weight.data, requires_grad=False, quant_type=kind, compress_statistics=nested, module=found
    )
    found.weight, found.bias = weight.to("cpu"), layer.bias
    return found


def base_layer(nested: bool = True, n: int = 48, k: int = 128, **arguments: Any) -> Any:
    torch.manual_seed(0)
    layer = nn.Linear(k, n)
    layer.weight.data = (torch.randn(n, k) + torch.randn(n, 3) @ torch.randn(3, k)) / 8
    return in_4_bits(layer, nested, **arguments)


def numbers(layer: Any) -> Tensor:
    return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def inputs(k: int = 128) -> Tensor:
    return torch.randn(2, 7, k, generator=torch.Generator().manual_seed(1))


def unquantised(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = {**SHAPE, "hidden_size": 64, "intermediate_size": 128}  # rows of whole blocks, as bitsandbytes needs them
    return RobertaForSequenceClassification(RobertaConfig(**config)).eval()


def classifier(nested: bool = True, seed: int = 0) -> Any:
    model = unquantised(seed)
    for name, layer in list(model.base_model.named_modules()):
        if type(layer) is nn.Linear:
            parent, _, child = name.rpartition(".")
            setattr(model.base_model.get_submodule(parent), child, in_4_bits(layer, nested))
    return model.eval()


def adapted(**config: Any) -> Any:
    config = {"r": 2, "task_type": "SEQ_CLS", "target_modules": "all-linear"} | config
    return peft.get_peft_model(classifier(), SivaConfig(**config)).eval()


# -- the layer -----------------------------------------------------------------------------------------------------


@NESTED
def test_starts_as_the_base_and_keeps_its_weight(nested: bool) -> None:
    base = base_layer(nested)
    expected, codes, weight = base(inputs()), base.weight.data.clone(), numbers(base)
    layer = SivaLinear(base, r=4, residual="implicit")
    torch.testing.assert_close(layer(inputs()), expected, **CLOSE)
    initial = layer.initial("default")
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(initial, decompose(weight, 4).factors))
    move(layer, size=0.1)
    change = layer._trained("default").product() - initial.product()
    torch.testing.assert_close(layer(inputs()), expected + inputs() @ change.t(), **CLOSE)
    torch.testing.assert_close(layer.weight @ torch.eye(128), weight + change, **CLOSE)
    layer.enable_adapters(False)
    assert torch.equal(layer(inputs()), expected)
    assert base.weight.data.equal(codes)


@NESTED
def test_gradients_are_those_of_the_weight_as_numbers(nested: bool) -> None:
    base = base_layer(nested)
    weight = numbers(base)
    layer = move(SivaLinear(base, r=4, residual="implicit"), size=0.1)
    x, same = inputs().requires_grad_(), inputs().requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        found = layer(x)
    changes = [change.weight for change in layer.changes("default")]
    ours = torch.autograd.grad((found**2).sum(), [x, *changes])
    change = layer._trained("default").product() - layer.initial("default").product()
    expected = nn.functional.linear(same, weight + change, base.bias)
    theirs = torch.autograd.grad((expected**2).sum(), [same, *changes])
    for gradient, other in zip(ours, theirs):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))
    assert any(tensor.data_ptr() == base.weight.data_ptr() for tensor in saved)
    assert all(tensor.numel() < weight.numel() for tensor in saved if tensor.is_floating_point())


def test_rows_that_are_no_whole_blocks() -> None:
    base = base_layer(n=30, k=40)
    expected = numbers(base).flatten()  # bitsandbytes reads its scales wrong by rows, not as one
    state = copy.deepcopy(base.weight.quant_state)
    state.shape = torch.Size((1, 1200))
    expected = bnb.functional.dequantize_4bit(base.weight.data, state).view(30, 40)
    layer = SivaLinear(base, r=4, residual="implicit")
    torch.testing.assert_close(layer(inputs(40)), inputs(40) @ expected.t() + base.bias, **CLOSE)


def test_computes_in_the_dtype_of_its_configuration_of_autocast_or_of_x() -> None:
    layer = SivaLinear(base_layer(), r=4, residual="implicit")
    expected = layer(inputs())
    with torch.autocast("cpu", torch.bfloat16):
        cast = layer(inputs())
    by_configuration = SivaLinear(base_layer(compute_dtype=torch.bfloat16), r=4, residual="implicit")(inputs())
    half = layer(inputs().bfloat16())
    assert (cast.dtype, by_configuration.dtype, half.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
    for found in (cast, by_configuration, half):
        assert 0 < float((found.float() - expected).norm() / expected.norm()) < 0.01
    assert by_configuration.bfloat16().float().equal(by_configuration)


def test_adapters_share_the_base_and_leave_it() -> None:
    base = base_layer()
    expected, codes = base(inputs()), base.weight.data.clone()
    layer = move(SivaLinear(base, r=4, residual="implicit"), size=0.1)
    alone = layer(inputs())
    layer.update_layer("second", 2, SivaConfig(residual="implicit"))
    layer.set_adapter("second")
    torch.testing.assert_close(layer(inputs()), expected, **CLOSE)
    layer.set_adapter("default")
    layer.delete_adapter("second")
    assert torch.equal(layer(inputs()), alone)
    assert torch.equal(copy.deepcopy(layer)(inputs()), alone)
    assert layer.unload_and_optionally_merge_module(merge=False) is base
    assert base.weight.data.equal(codes)


def test_a_compiled_layer_is_one_graph() -> None:
    layer = SivaLinear(base_layer(nested=False), r=4, residual="implicit")
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(inputs()), layer(inputs()))


@pytest.mark.parametrize(
    ("make", "arguments", "words"),
    [
        (lambda: base_layer(kind="fp4"), {}, "bnb_4bit_quant_type='nf4'"),
        (lambda: bnb.nn.Linear4bit(8, 8, quant_type="nf4"), {}, "Move the model to its device first"),
        (base_layer, {"residual": "frozen"}, "Use residual='implicit'"),
        (base_layer, {"residual_dtype": "nf4"}, "with residual='implicit'"),
    ],
    ids=["fp4", "not quantised", "frozen", "residual_dtype"],
)
def test_what_cannot_be_is_refused(make: Any, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(FastpeftError, match=words):
        SivaLinear(make(), **{"r": 4, "residual": "implicit"} | arguments)


# -- through PEFT --------------------------------------------------------------------------------------------------


def test_a_model_in_4_bits_starts_as_it_is_with_the_implicit_residual() -> None:
    expected = answers(classifier())
    model = adapted()
    assert model.peft_config["default"].residual == "implicit"
    assert sum(isinstance(module, SivaLinear) for module in model.modules()) == 12
    torch.testing.assert_close(answers(model), expected, **CLOSE)


def test_a_saved_adapter_is_loaded_onto_the_base_in_4_bits(tmp_path: Path) -> None:
    model = move(adapted(), size=0.1)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(classifier(), tmp_path).eval()
    assert torch.equal(answers(loaded), answers(model))


def test_an_adapter_of_another_base_is_refused_and_one_of_the_same_in_more_bits_is_not(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path / "few")
    config = SivaConfig(r=2, task_type="SEQ_CLS", target_modules="all-linear", residual="implicit")
    peft.get_peft_model(unquantised(), config).save_pretrained(tmp_path / "all")
    for saved, base in (("few", unquantised), ("few", classifier), ("all", classifier)):
        with pytest.raises(FastpeftError, match="trained on another weight"):
            peft.PeftModel.from_pretrained(base(seed=1), tmp_path / saved)
        peft.PeftModel.from_pretrained(base(), tmp_path / saved)


def test_rows_of_a_batch_have_their_own_adapters() -> None:
    model = move(adapted(), size=0.1)
    model.add_adapter("second", SivaConfig(r=3, task_type="SEQ_CLS", target_modules="all-linear"))
    ids = torch.arange(5, 29).view(2, 12)
    with torch.no_grad():
        both = model(input_ids=ids, adapter_names=["default", "__base__"]).logits
        first = model(input_ids=ids[:1]).logits
        with model.disable_adapter():
            base = model(input_ids=ids[1:]).logits
    torch.testing.assert_close(both, torch.cat([first, base]), **CLOSE)


def test_merging_is_refused_before_anything_changes_and_done_on_the_base_before_quantising(tmp_path: Path) -> None:
    model = move(adapted(), size=0.1)
    expected = answers(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(FastpeftError, match="load it onto the base model as it is before quantising"):
            merge()
    assert torch.equal(answers(model), expected)
    model.save_pretrained(tmp_path)
    name = "roberta.encoder.layer.1.output.dense"
    change = model.get_base_model().get_submodule(name).get_delta_weight("default")
    merged = peft.PeftModel.from_pretrained(unquantised(), tmp_path).merge_and_unload()
    wanted = unquantised().get_submodule(name).weight + change
    torch.testing.assert_close(merged.get_submodule(name).weight, wanted, **CLOSE)
    left = model.unload().get_submodule(name)
    assert type(left) is bnb.nn.Linear4bit
    assert left.weight.equal(classifier().get_submodule(name).weight)


def test_an_exported_lora_computes_the_same_on_the_same_base(tmp_path: Path) -> None:
    model = move(adapted(), size=0.1)
    save_as_lora(model, tmp_path)
    lora = peft.PeftModel.from_pretrained(classifier(), tmp_path).eval()
    for module in lora.modules():  # bitsandbytes would multiply in bfloat16 where the processor has it
        module.support_avx512bf16_for_cpu = False
    torch.testing.assert_close(answers(lora), answers(model), **CLOSE)


def test_a_step_trains_the_factors_alone_and_is_simulated() -> None:
    model = adapted().train()
    ids = torch.arange(5, 29).view(2, 12)
    batch = {"input_ids": ids, "labels": torch.tensor([0, 1])}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    model(**batch).loss.backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p.detach(), before[name])}
    assert changed
    assert all(".siva_d" in name or ".classifier." in name for name in changed)
    assert simulate_training_step(model, batch).weights > 0


def test_a_decoder_that_transformers_loads_in_4_bits(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")

    def load() -> Any:
        quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantised, device_map="cpu")

    ids = torch.arange(6).view(2, 3)
    base = peft.prepare_model_for_kbit_training(load(), use_gradient_checkpointing=False)
    with torch.no_grad():  # in training: to evaluate bitsandbytes would arrange the weights, where it has bfloat16
        expected = base.train()(input_ids=ids).logits
    model = peft.get_peft_model(base, SivaConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0.0, atol=2e-2)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if ".siva_d" in name)
