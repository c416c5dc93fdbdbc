"""The packs of an adapted layer's frozen weight: they change no result, follow the weight and are nowhere saved."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import peft
import pytest
import torch
from instructions import PACKED_DTYPES
from siva_adapters import CLOSE, RESIDUALS, move, tiny, token_ids
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastpeft import SivaConfig, SivaLinear
from fastpeft.mezo import MeZO

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")


def layer_of(kind: str = "linear", residual: str = "frozen", pack_weights: bool = True) -> SivaLinear:
    torch.manual_seed(0)
    base = Conv1D(12, 20) if kind == "conv1d" else nn.Linear(20, 12)
    return move(SivaLinear.from_linear(base, 3, residual=residual, pack_weights=pack_weights), size=0.1)


def inputs() -> Tensor:
    return torch.randn(2, 7, 20, generator=torch.Generator().manual_seed(1))


def without_packs(layer: SivaLinear, x: Tensor) -> Tensor:
    other = copy.deepcopy(layer)
    other.packs.enabled = False
    found: Tensor = other(x)
    assert other.packs.nbytes == 0
    return found


@RESIDUALS
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_packs_change_neither_output_nor_gradients(kind: str, residual: str) -> None:
    found = []
    for pack_weights in (False, True):
        layer, x = layer_of(kind, residual, pack_weights), inputs().requires_grad_()
        h = layer(x)
        size = 4 * 12 * 20 if pack_weights else 0
        assert layer.packs.nbytes == size
        h.square().sum().backward()
        assert layer.packs.nbytes == 2 * size  # of W^T too, once there is a gradient of x
        found.append([h, x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)])
    torch.testing.assert_close(*found, **CLOSE)


def test_without_a_gradient_of_x_its_weight_is_not_packed() -> None:
    layer = layer_of()
    layer(inputs()).sum().backward()
    assert layer.packs.nbytes == 4 * 12 * 20


def merge(layer: SivaLinear) -> None:
    layer.merge()
    layer.unmerge()
    layer.siva_du["default"].weight.data.zero_()


def load(layer: SivaLinear) -> None:
    other = layer_of(residual=layer.adapters["default"].residual)
    with torch.no_grad():
        other.base_layer.weight.mul_(1.5)
    state = {key: value for key, value in other.state_dict().items() if "base_layer" in key}
    if layer.adapters["default"].residual == "frozen":
        with torch.no_grad():  # as a checkpoint of the whole layer does
            layer.base_layer.load_state_dict({key.removeprefix("base_layer."): value for key, value in state.items()})
    else:
        layer.load_state_dict(state, strict=False)


def add_to_data(layer: SivaLinear) -> None:
    layer.base_layer.weight.data += 0.1


def perturb(layer: SivaLinear) -> None:
    layer.base_layer.weight.requires_grad_()
    MeZO([layer.base_layer.weight], lr=0.1, eps=0.1).step(lambda: layer.base_layer.weight.detach().square().sum())
    layer.base_layer.weight.requires_grad_(False)


def to_double_and_back(layer: SivaLinear) -> None:
    layer.double()
    layer.base_layer.weight.data *= 2
    layer.float()


@RESIDUALS
@pytest.mark.parametrize("change", [merge, load, add_to_data, perturb, to_double_and_back])
def test_a_change_of_the_weight_is_noticed(change: Callable[[SivaLinear], None], residual: str) -> None:
    layer, x = layer_of(residual=residual), inputs()
    before = layer(x)
    change(layer)
    after = layer(x)
    assert (after - before).abs().max() > 1e-3
    assert layer.packs.nbytes > 0
    torch.testing.assert_close(after, without_packs(layer, x), **CLOSE)


def test_a_merged_weight_and_a_moved_module_hold_no_old_pack() -> None:
    layer = layer_of()
    layer(inputs())
    layer.merge()
    assert layer.packs.nbytes == 0
    layer.unmerge()
    layer(inputs())
    layer.to(torch.float64)
    assert layer.packs.nbytes == 0


def test_packs_are_neither_copied_nor_saved() -> None:
    layer = layer_of()
    keys = set(layer.state_dict())
    layer(inputs())
    assert set(layer.state_dict()) == keys
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert other.packs.nbytes == 0
        assert torch.equal(other(inputs()), layer(inputs()))


@RESIDUALS
@pytest.mark.parametrize("pack_weights", [True, False])
def test_starts_in_bfloat16_as_the_base_to_its_own_rounding(residual: str, pack_weights: bool) -> None:
    """Two roundings more than the base's one: of W_r as it is stored, and of the product before the factors' part."""
    torch.manual_seed(0)
    base = nn.Linear(192, 160).bfloat16()
    x = torch.randn(64, 192).bfloat16()
    exact = x.double() @ base.weight.double().t() + base.bias.double()
    plain = base(x)
    layer = SivaLinear.from_linear(base, 8, residual=residual, pack_weights=pack_weights)
    h = layer(x)
    assert h.dtype is torch.bfloat16
    assert layer.siva_du["default"].weight.dtype is torch.float32
    errors = [(found.double() - exact).square().mean().sqrt() for found in (h, plain)]
    assert errors[0] <= 2 * errors[1]
    rounding = torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert (h.double() - plain.double()).abs().max() <= 2 * rounding
    h.float().square().sum().backward()
    assert layer.siva_dv["default"].weight.grad.dtype is torch.float32


def test_autocast_packs_in_its_dtype() -> None:
    layer, x = layer_of(), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        h = layer(x)
        expected = without_packs(layer, x)
    assert h.dtype is torch.bfloat16
    assert layer.packs.nbytes == (2 * 12 * 20 if torch.bfloat16 in PACKED_DTYPES else 0)
    torch.testing.assert_close(h, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("pack_weights", [True, False])
def test_a_model_packs_or_does_not_and_its_file_says_only_that_it_does_not(pack_weights: bool) -> None:
    config = SivaConfig(r=2, target_modules=["query", "key", "dense"], pack_weights=pack_weights, task_type="SEQ_CLS")
    assert config.to_dict().get("pack_weights", True) is pack_weights
    assert ("pack_weights" in config.to_dict()) is not pack_weights
    assert SivaConfig(**config.to_dict()).pack_weights is pack_weights
    expected = tiny()(token_ids()).logits
    model = peft.get_peft_model(tiny(), config).eval()
    torch.testing.assert_close(model(token_ids()).logits, expected, **CLOSE)
    layers = [module for module in model.modules() if isinstance(module, SivaLinear)]
    assert all((layer.packs.nbytes > 0) is pack_weights for layer in layers)


def test_a_layer_with_packs_compiles_into_one_graph() -> None:
    layer, x = layer_of(), inputs().requires_grad_()
    expected = torch.autograd.grad(layer(x).square().sum(), x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x).square().sum(), x), expected, **CLOSE)
    program = torch.export.export(layer.eval(), (inputs(),), strict=False)
    torch.testing.assert_close(program.module()(inputs()), layer(inputs()), **CLOSE)
