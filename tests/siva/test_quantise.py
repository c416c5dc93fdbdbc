"""A residual in few bits: formats, the factors that fit it, the layer by itself and through PEFT."""

from __future__ import annotations

import copy
import importlib.util
import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate.utils import save
from safetensors.torch import load_file, load_model
from siva_adapters import CLOSE, answers, move, tiny
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastpeft import FastpeftError, SivaConfig, SivaLinear
from fastpeft.functional import siva_linear
from fastpeft.ops.quantise import QuantisedWeight
from fastpeft.siva.decompose import decompose, subtract
from fastpeft.siva.export import save_as_lora
from fastpeft.siva.quantise import decompose_quantised
from fastpeft.training.memory import simulate_training_step

NF4 = pytest.param(
    "nf4",
    marks=pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes"),
)
DOUBLE = pytest.param("nf4-double", marks=NF4.marks)
KINDS = pytest.mark.parametrize("kind", ["int8", NF4, DOUBLE])
ERROR = {
    "int8": 0.01,
    "nf4": 0.12,
    "nf4-double": 0.12,
}  # relative, of a quantised normal matrix; 0.006 and 0.09 are usual


def matrix(n: int = 48, k: int = 32, seed: int = 0) -> Tensor:
    """Normal values with a few large directions, as pretrained weights have."""
    generator = torch.Generator().manual_seed(seed)
    large = torch.randn(n, 3, generator=generator) @ torch.randn(3, k, generator=generator)
    return torch.randn(n, k, generator=generator) + large


def linear(kind: str = "linear") -> nn.Module:
    layer: Any = Conv1D(48, 32) if kind == "conv1d" else nn.Linear(32, 48)
    weight = matrix()
    layer.weight.data = weight.t().contiguous() if kind == "conv1d" else weight
    return layer


def inputs() -> Tensor:
    return torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1))


def relative(found: Tensor, true: Tensor) -> float:
    return float(((found - true).norm() / true.norm()).detach())


def quantised(kind: str, **arguments: Any) -> Any:
    return SivaLinear.from_linear(linear(), 4, residual_dtype=kind, **arguments)


def adapted(kind: str, **config: Any) -> Any:
    config = {"r": 2, "task_type": "SEQ_CLS", "residual_dtype": kind} | config
    return peft.get_peft_model(tiny(), SivaConfig(**config)).eval()


# -- formats -----------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("shape", [(48, 32), (20, 64), (3, 160), (7, 13), (64, 1)])
def test_a_quantised_weight_is_near(kind: Any, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    held = QuantisedWeight(weight, kind)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        found = held.dequantise(dtype)
        assert (found.dtype, found.shape) == (dtype, weight.shape)
        assert relative(found.float(), weight) < ERROR[kind]
    parts = {name: p.numel() * p.element_size() for name, p in held.named_parameters()}
    assert parts.pop("table", 0) <= 1024
    assert sum(parts.values()) <= 1.2 * weight.numel() + max(4 * shape[0], 48)


@KINDS
def test_bits_of_a_weight(kind: Any) -> None:
    held = QuantisedWeight(torch.randn(512, 256), kind)
    scales = {"int8": 32 / 256, "nf4": 32 / 64, "nf4-double": 8 / 64 + 32 / (64 * 256)}[kind]
    parts = {name: 8 * p.numel() * p.element_size() for name, p in held.named_parameters()}
    assert parts["codes"] / (512 * 256) == (8 if kind == "int8" else 4)
    assert (parts["scales"] + parts.get("coarse", 0)) / (512 * 256) == scales


@KINDS
def test_a_replica_of_data_parallel_stands_for_the_same_weight(kind: Any) -> None:
    held = QuantisedWeight(matrix(), kind)
    replica = held._replicate_for_data_parallel()
    for name, each in held.named_parameters():
        setattr(replica, name, each.data)  # as torch.nn.parallel.replicate does
    assert torch.equal(replica.dequantise(torch.float32), held.dequantise(torch.float32))


def test_int8_is_the_nearest_of_255_steps_of_a_row() -> None:
    weight = matrix()
    step = weight.abs().amax(1, keepdim=True) / 127
    error = (QuantisedWeight(weight, "int8").dequantise(torch.float32) - weight).abs()
    assert (error <= 0.5001 * step).all()


@pytest.mark.parametrize("kind", ["int8", NF4])
def test_a_row_of_zeros_stays_zero(kind: Any) -> None:
    weight = torch.cat([torch.zeros(64, 2), torch.ones(64, 2)], 1).t().contiguous()
    assert QuantisedWeight(weight, kind).dequantise(torch.float32).equal(weight)


@KINDS
def test_scales_stay_in_float32_in_a_model_of_half_precision(kind: Any) -> None:
    held = QuantisedWeight(matrix(), kind)
    before = held.dequantise(torch.float32)
    assert copy.deepcopy(held).bfloat16().dequantise(torch.float32).equal(before)


# -- factors -----------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_residual_is_made_of_the_weight_and_the_factors(kind: Any, dtype: torch.dtype) -> None:
    weight = matrix().to(dtype)
    factors, rest = decompose_quantised(weight, 4, kind)
    again = QuantisedWeight(weight.float() - factors.product(), kind)
    assert rest.codes.equal(again.codes)
    assert rest.scales.equal(again.scales)


@KINDS
def test_each_iteration_fits_better_and_none_takes_the_weights_own_triplets(kind: Any) -> None:
    weight = matrix(64, 64)

    def error(iterations: int) -> float:
        factors, rest = decompose_quantised(weight, 8, kind, iterations)
        return relative(rest.dequantise(torch.float32) + factors.product(), weight)

    plain = relative(QuantisedWeight(weight, kind).dequantise(torch.float32), weight)
    assert plain > error(0) > error(1) > error(5)
    found, own = decompose_quantised(weight, 8, kind, 0)[0].u, decompose(weight, 8).factors.u
    assert found.equal(own if kind == "int8" else own.bfloat16().float())


@KINDS
def test_factors_that_follow_each_other_fit_as_those_of_whole_decompositions(kind: Any) -> None:
    weight = matrix(128, 96)
    factors, rest = decompose_quantised(weight, 8, kind, 5)
    best = decompose(weight, 8).factors
    for _ in range(5):
        best = decompose(weight - QuantisedWeight(weight - best.product(), kind).dequantise(torch.float32), 8).factors
    best_rest = QuantisedWeight(weight - best.product(), kind)
    found, least = (
        relative(held.dequantise(torch.float32) + parts.product(), weight)
        for held, parts in ((rest, factors), (best_rest, best))
    )
    assert found < 1.05 * least


# -- the layer ---------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("form", ["linear", "conv1d"])
def test_starts_near_the_base_layer_and_computes_what_its_weight_says(kind: Any, form: str) -> None:
    base = linear(form)
    expected = base(inputs())
    layer = move(SivaLinear.from_linear(base, 4, residual_dtype=kind), size=0.1)
    assert layer.base_layer.weight.numel() == 0
    weight = layer.weight.t() if form == "conv1d" else layer.weight
    torch.testing.assert_close(layer(inputs()), inputs() @ weight.t() + layer.bias, **CLOSE)
    layer.enable_adapters(False)
    assert relative(layer(inputs()), expected) < ERROR[kind]


@KINDS
def test_gradients_are_those_of_the_dequantised_layer(kind: Any) -> None:
    layer = move(quantised(kind), size=0.1)
    x, copied = inputs().requires_grad_(), inputs().requires_grad_()
    u, s, v = (factor.detach().requires_grad_(factor.requires_grad) for factor in layer._trained("default"))
    du, dv = (change.weight for change in layer.changes("default"))
    expected = siva_linear(copied, layer.quantised.dequantise(torch.float32), u, s, v, layer.bias)
    found = layer(x)
    weights = torch.randn(found.shape)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    assert found.equal(expected)
    for gradient, same in ((x.grad, copied.grad), (du.grad, u.grad), (dv.grad, v.grad)):
        torch.testing.assert_close(gradient, same)


@KINDS
def test_each_of_several_active_adapters_gets_its_gradients(kind: Any) -> None:
    layer = move(quantised(kind), size=0.1)
    layer.update_layer("second", 4, SivaConfig(residual_dtype=kind))
    layer.set_adapter(["default", "second"])
    changes = [change.weight for name in layer.active_adapters for change in layer.changes(name)]
    outputs = layer(inputs()), nn.functional.linear(inputs(), layer.weight, layer.bias)
    weights = torch.randn(outputs[0].shape)
    found, expected = (torch.autograd.grad((output * weights).sum(), changes) for output in outputs)
    for gradient, same in zip(found, expected):
        torch.testing.assert_close(gradient, same, rtol=1e-4, atol=1e-4)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_evaluated_is_what_trains(kind: Any, dtype: torch.dtype) -> None:
    """Also where the processor would multiply int8 codes as they are, with activations in 8 bits."""
    layer = move(quantised(kind), size=0.1).to(dtype)
    trained = layer(inputs().to(dtype).requires_grad_())
    with torch.no_grad():
        assert layer(inputs().to(dtype)).equal(trained)


@KINDS
def test_backward_keeps_no_dequantised_weight(kind: Any) -> None:
    layer, saved = quantised(kind), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(inputs().requires_grad_())
    assert any(tensor.dtype == layer.quantised.codes.dtype for tensor in saved)
    assert all(tensor.shape != (48, 32) for tensor in saved if tensor.is_floating_point())


@KINDS
def test_autocast_and_half_precision_decide_what_is_computed_in(kind: Any) -> None:
    layer = quantised(kind)
    expected = layer(inputs())
    with torch.autocast("cpu", torch.bfloat16):
        cast = layer(inputs())
    assert cast.dtype == torch.bfloat16
    assert relative(cast.float(), expected) < 0.01
    half = copy.deepcopy(layer).bfloat16()(inputs().bfloat16())
    assert half.dtype == torch.bfloat16
    assert relative(half.float(), expected) < 0.01


@KINDS
def test_merging_gives_a_plain_layer_and_unmerging_the_same_codes(kind: Any) -> None:
    layer = move(quantised(kind), size=0.1)
    codes, expected = layer.quantised.codes.clone(), layer(inputs())
    layer.merge()
    torch.testing.assert_close(layer.base_layer(inputs()), expected, **CLOSE)
    torch.testing.assert_close(layer(inputs()), expected, **CLOSE)
    layer.unmerge()
    assert layer.quantised.codes.equal(codes)
    assert layer(inputs()).equal(expected)


def initial_dtypes(layer: SivaLinear) -> set[torch.dtype]:
    return {tensors["default"].dtype for tensors in (layer.siva_u0, layer.siva_v0)}


@pytest.mark.parametrize("kind", [NF4, DOUBLE])
def test_initial_factors_beside_4_bits_are_kept_in_bfloat16_and_saved_in_float32(kind: Any) -> None:
    layer = quantised(kind)
    state = layer.state_dict()
    blank = SivaLinear(nn.Linear(32, 48), r=4, residual_dtype=kind, init_weights="saved")
    blank.load_state_dict(state)
    for each in layer, blank, copy.deepcopy(layer).float():
        assert initial_dtypes(each) == {torch.bfloat16}
    assert state["siva_u0.default"].dtype == state["siva_v0.default"].dtype == torch.float32


@KINDS
def test_initial_factors_that_bfloat16_would_round_stay_as_they_are(kind: Any) -> None:
    """As those of a PiSSA adapter may be."""
    base, exact = linear(), decompose(matrix(), 4).factors
    state = quantised(kind).state_dict() | {"siva_u0.default": exact.u, "siva_v0.default": exact.v}
    of_adapter = {name: tensor for name, tensor in state.items() if "siva" in name} | {"siva_s.default": exact.s}
    layer = SivaLinear(base, r=4, residual_dtype=kind, init_weights="saved")
    layer.load_state_dict(of_adapter, strict=False)
    whole = quantised(kind)
    whole.load_state_dict(layer.state_dict())
    for each in layer, whole:
        assert initial_dtypes(each) == {torch.float32}
        assert each.siva_u0["default"].equal(exact.u)
        assert each.quantised.codes.equal(QuantisedWeight(subtract(matrix(), exact), kind).codes)


@KINDS
def test_a_model_that_accelerate_saved_loads(kind: Any, tmp_path: Path) -> None:
    """Its `save_state` takes all tensors without memory for one, and saves that of the first layer alone."""
    model, blank = move(adapted(kind), size=0.1), adapted(kind)
    save(model.state_dict(), tmp_path / "model.safetensors", safe_serialization=True)
    load_model(blank, tmp_path / "model.safetensors")
    assert answers(blank).equal(answers(model))


def test_codes_that_are_loaded_later_have_sums_of_their_own() -> None:
    layer, other = (QuantisedWeight(matrix(seed=seed), "int8") for seed in (0, 1))
    with torch.no_grad():
        layer.multiply(inputs(), None)
        layer.load_state_dict(other.state_dict())
        expected = other.multiply(inputs(), None)
        assert layer.multiply(inputs(), None).equal(expected)
        layer = QuantisedWeight(matrix(seed=0), "int8")
        layer.multiply(inputs(), None)
        for name, parameter in layer.named_parameters():
            parameter.data.copy_(other.get_parameter(name))  # which leaves place and version alone
        assert layer.multiply(inputs(), None).equal(expected)
    with torch.inference_mode():  # where tensors have no versions
        assert QuantisedWeight(matrix(seed=1), "int8").multiply(inputs(), None).equal(expected)


def test_adapters_share_a_quantised_residual_if_all_have_it() -> None:
    layer = quantised("int8")
    expected = layer(inputs())
    move(layer)
    layer.update_layer("second", 4, SivaConfig(residual_dtype="int8"))
    layer.set_adapter("second")
    torch.testing.assert_close(layer(inputs()), expected, **CLOSE)
    with pytest.raises(FastpeftError, match="residual_dtype=None"):
        layer.update_layer("third", 4, SivaConfig())
    layer.set_adapter(["default", "second"])
    both = layer(inputs())
    for name in ("default", "second"):
        layer.merge(adapter_names=[name])
    torch.testing.assert_close(layer(inputs()), both, **CLOSE)


def test_the_pretrained_weight_is_not_given_back() -> None:
    layer = quantised("int8")
    for action in (layer.restore, lambda: layer.delete_adapter("default")):
        with pytest.raises(FastpeftError, match=r"residual_dtype='int8'.*Merge"):
            action()


@KINDS
def test_a_compiled_layer_is_one_graph(kind: Any) -> None:
    layer = quantised(kind)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x, same = inputs().requires_grad_(), inputs().requires_grad_()
    compiled(x).sum().backward()
    layer(same).sum().backward()
    torch.testing.assert_close(x.grad, same.grad)


# -- through PEFT ------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("iterations", [0, 2])
def test_a_saved_adapter_makes_its_residual_again(tmp_path: Path, kind: Any, iterations: int) -> None:
    model = move(adapted(kind, quant_iterations=iterations, target_modules="all-linear"), size=0.1)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert all(".siva_" in key or ".classifier." in key for key in saved), "factors and the head alone"
    loaded = peft.PeftModel.from_pretrained(tiny(), tmp_path).eval()
    assert answers(loaded).equal(answers(model))
    assert "residual_dtype" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_factors_that_do_not_fit_the_codes_in_place_are_refused() -> None:
    layer = quantised("int8")
    state = {key: value for key, value in quantised("int8", quant_iterations=0).state_dict().items() if "siva" in key}
    before = layer(inputs())
    with pytest.raises(FastpeftError, match="fresh base model"):
        layer.load_state_dict(state, strict=False)
    assert layer(inputs()).equal(before)


def test_an_exported_lora_carries_the_change_to_the_exact_weights(tmp_path: Path, caplog: Any) -> None:
    model = move(adapted("int8", target_modules="all-linear"), size=0.1)
    with caplog.at_level(logging.WARNING):
        save_as_lora(model, tmp_path)
    assert "residual_dtype='int8'" in caplog.text
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert all(".lora_" in key or ".classifier." in key for key in saved)
    lora = peft.PeftModel.from_pretrained(tiny(), tmp_path).eval()
    assert 0 < relative(answers(lora), answers(model)) < 0.05


def test_a_pissa_adapter_can_go_on_with_a_quantised_residual(tmp_path: Path) -> None:
    pissa = peft.LoraConfig(r=2, init_lora_weights="pissa", task_type="SEQ_CLS", target_modules=["query", "key"])
    trained = move(peft.get_peft_model(tiny(), pissa), size=0.1).eval()
    trained.save_pretrained(tmp_path)
    config = SivaConfig.from_pissa(tmp_path, residual_dtype="int8")
    model = peft.get_peft_model(tiny(), config).eval()
    assert 0 < relative(answers(model), answers(trained)) < 0.05


@pytest.mark.long(but="nf4")
@KINDS
def test_a_simulated_step_counts_the_codes(kind: Any) -> None:
    ids = torch.ones(2, 5, dtype=torch.long)
    batch = {"input_ids": ids, "labels": ids[:, 0]}
    few, all_bits = (
        simulate_training_step(adapted(each, target_modules="all-linear"), batch).weights for each in (kind, None)
    )
    assert few < all_bits


def test_nf4_without_its_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "bitsandbytes" else find(name))
    with pytest.raises(FastpeftError, match="pip install 'bitsandbytes>="):
        SivaConfig(residual_dtype="nf4")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"residual_dtype": "int4"}, "residual_dtype='int4'; allowed are 'int8', 'nf4', 'nf4-double', or None"),
        ({"residual_dtype": "int8", "residual": "implicit"}, "with residual='implicit'"),
        ({"residual_dtype": "int8", "d": 8}, "with d=8"),
        ({"quant_iterations": -1}, "quant_iterations=-1; give a whole number from 0"),
        ({"quant_iterations": True}, "quant_iterations=True"),
        ({"svd_niter": -1}, "svd_niter=-1; give a whole number from 0, or None"),
        ({"svd_niter": True}, "svd_niter=True"),
        ({"svd_niter": 4, "d": 8}, "svd_niter=4 with d=8: a lower d drops triplets"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(FastpeftError, match=words):
        SivaConfig(**given)
