"""`SivaLinear` by itself: identity, training, merging, saving, several adapters on one layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from peft.helpers import disable_input_dtype_casting
from siva_adapters import CLOSE, RESIDUALS, move
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import orthogonal, weight_norm
from torch.testing._internal.two_tensor import TwoTensor
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from fastpeft import FastpeftError, SivaConfig, SivaLinear, pack_frozen
from fastpeft.functional import siva_linear_group
from fastpeft.siva.decompose import decompose


def linear(kind: str = "linear", bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    if kind == "conv1d":
        layer = Conv1D(12, 20)
        nn.init.normal_(layer.bias)
        return layer
    return nn.Linear(20, 12, bias=bias)


def inputs() -> Tensor:
    return torch.randn(2, 7, 20, generator=torch.Generator().manual_seed(1))


@RESIDUALS
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("r", [1, 4, 12])
def test_starts_as_the_base_layer(residual: str, kind: str, r: int) -> None:
    base = linear(kind)
    expected = base(inputs())
    torch.testing.assert_close(SivaLinear.from_linear(base, r, residual=residual)(inputs()), expected, **CLOSE)


def test_frozen_replaces_the_weight_and_implicit_does_not() -> None:
    weight = linear().weight.detach().clone()
    frozen, implicit = (SivaLinear.from_linear(linear(), 4, residual=residual) for residual in ("frozen", "implicit"))
    assert implicit.base_layer.weight.equal(weight)
    u, s, v = (getattr(frozen, f"siva_{name}")["default"] for name in ("u0", "s", "v0"))
    torch.testing.assert_close(frozen.base_layer.weight, weight - u @ torch.diag(s) @ v, **CLOSE)


class Twice(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Named(nn.Linear):
    """As `nn.Linear` but for its name."""


def _patched(layer: nn.Linear) -> nn.Linear:
    layer.forward = Twice.forward.__get__(layer)  # type: ignore[method-assign]
    return layer


def _hooked(layer: nn.Linear, where: str) -> nn.Linear:
    getattr(layer, f"register_{where}")(lambda *_: None)
    return layer


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Twice(20, 12), "the layer is a Twice with a forward of its own"),
        (lambda: _patched(nn.Linear(20, 12)), "the layer is a Linear with a forward of its own"),
        (
            lambda: weight_norm(nn.Linear(20, 12)),
            "the layer has a weight that is computed from others, as by weight_norm",
        ),
        (
            lambda: orthogonal(nn.Linear(20, 12)),
            "the layer has a weight that is computed from others, as by weight_norm",
        ),
        (
            lambda: nn.utils.weight_norm(nn.Linear(20, 12)),
            "the layer has a weight that is computed from others, as by weight_norm",
        ),
        (lambda: _hooked(nn.Linear(20, 12), "forward_hook"), "the layer has hooks on its forward"),
        (lambda: _hooked(nn.Linear(20, 12), "forward_pre_hook"), "the layer has hooks on its forward"),
    ],
)
def test_a_layer_that_computes_more_is_refused(make: Callable[[], nn.Linear], words: str) -> None:
    base = make()
    weight = base.weight.clone()
    with pytest.raises(FastpeftError, match=rf"{words}; .* Leave the layer out with exclude_modules"):
        SivaLinear(base)
    assert base.weight.equal(weight)


COMPUTED_LATER: dict[str, Callable[[nn.Module], Any]] = {
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
    "weight_norm": weight_norm,
    "older weight_norm": nn.utils.weight_norm,
}


@RESIDUALS
@pytest.mark.parametrize("kind", COMPUTED_LATER)
def test_nothing_is_merged_into_a_weight_that_is_computed_by_now(kind: str, residual: str) -> None:
    """As where all linear layers of a model are pruned: what is merged would be overwritten at the next call."""
    layer, x = move(SivaLinear.from_linear(linear(), 4, residual=residual)), inputs()
    COMPUTED_LATER[kind](layer.base_layer)
    before = layer(x)
    with pytest.raises(FastpeftError, match="its weight is computed from others, as by pruning"):
        layer.merge()
    assert layer(x).equal(before)
    if residual == "frozen":
        with pytest.raises(FastpeftError, match="its weight is computed from others"):
            layer.restore()
    if kind == "pruned":
        prune.remove(layer.base_layer, "weight")
        layer.merge()
        torch.testing.assert_close(layer(x), before, **CLOSE)


@pytest.mark.parametrize("field", [{"bias": "siva_only"}, {"scaling": "spectral"}, {"rank_pattern": {"layer": 2}}])
def test_fields_that_say_nothing_of_one_layer_are_refused(field: dict[str, Any]) -> None:
    with pytest.raises(FastpeftError, match=f"the layer got {next(iter(field))}, .*; allowed are d, residual, "):
        SivaLinear.from_linear(linear(), 4, **field)


def test_weights_of_bitsandbytes_in_8_bits_are_refused() -> None:
    linear = type("Linear8bitLt", (nn.Linear,), {"forward": lambda layer, x: x})
    with pytest.raises(FastpeftError, match=r"8 bits of bitsandbytes.*residual_dtype='int8'"):
        SivaLinear(linear(20, 12))


def test_weights_of_torchao_are_refused() -> None:
    """A tensor that is made of others, as those are; PyTorch's own stands in for them."""
    layer: Any = linear()
    layer.weight = nn.Parameter(TwoTensor(layer.weight.data, layer.weight.data))
    with pytest.raises(FastpeftError, match=r"^q has a weight in the form of torchao \(TwoTensor\).*unquantised"):
        SivaLinear(layer, name="q")


def test_pefts_helper_finds_that_inputs_are_not_cast() -> None:
    layer = SivaLinear(nn.Linear(20, 12))
    with disable_input_dtype_casting(layer):
        assert layer(torch.ones(1, 20)).shape == (1, 12)


@pytest.mark.parametrize("kind", [Named, FalconLinear, "pack_frozen", "accelerate", "accelerate no more"])
def test_a_layer_that_computes_the_same_is_taken(kind: Any) -> None:
    base: Any = nn.Linear(20, 12).requires_grad_(False) if isinstance(kind, str) else kind(20, 12)
    if kind == "pack_frozen":
        pack_frozen(base)
    elif isinstance(kind, str):
        add_hook_to_module(base, AlignDevicesHook("cpu"))
        if kind != "accelerate":
            remove_hook_from_module(base)
    expected = base(inputs())
    torch.testing.assert_close(SivaLinear(base)(inputs()), expected, **CLOSE)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((4, {}), (3, {})),
        ((4, {}), (4, {"residual": "implicit"})),
        ((4, {"residual": "implicit"}), (4, {})),
        ((4, {}), (4, {"d": 8})),
    ],
)
def test_adapters_that_cannot_share_a_frozen_residual_are_refused(first: tuple, second: tuple) -> None:
    layer = SivaLinear(linear(), "first", first[0], SivaConfig(**first[1]))
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(FastpeftError, match="residual='implicit'"):
        layer.update_layer("second", second[0], SivaConfig(**second[1]))
    assert layer.state_dict().keys() == before.keys()
    assert all(tensor.equal(before[name]) for name, tensor in layer.state_dict().items())


def test_a_lower_rank_is_lossy_on_purpose() -> None:
    base = linear()
    u, s, vh = torch.linalg.svd(base.weight.detach(), full_matrices=False)
    lossy = nn.functional.linear(inputs(), (u[:, :8] * s[:8]) @ vh[:8], base.bias)
    layer = SivaLinear.from_linear(base, 4, d=8)
    torch.testing.assert_close(layer(inputs()), lossy, **CLOSE)
    move(layer)
    trained, rest = layer(inputs()), layer.base_layer.weight.clone()
    layer.merge()
    torch.testing.assert_close(layer.base_layer(inputs()), trained, **CLOSE)
    layer.unmerge()
    assert layer.base_layer.weight.equal(rest)
    layer.enable_adapters(False)
    torch.testing.assert_close(layer(inputs()), lossy, **CLOSE)
    for refused in (layer.restore, lambda: layer.delete_adapter("default")):
        with pytest.raises(FastpeftError, match="cannot be given back"):
            refused()


def test_the_saved_residual_is_the_stored_weight_itself() -> None:
    layer = SivaLinear.from_linear(linear(), 4, d=8)
    for moved in (layer, layer.to(torch.float64), layer.to(torch.float32)):
        assert moved.siva_residual["default"].data_ptr() == moved.base_layer.weight.data_ptr()


def test_full_rank_d_is_not_lossy() -> None:
    layer = SivaLinear.from_linear(linear(), 4, d=12)
    assert not layer.siva_residual
    layer.restore()


def test_factors_of_another_decomposition_refit_the_weight() -> None:
    """As when a checkpoint made on another machine is loaded, whose SVD differs in the last bits."""
    layer = SivaLinear.from_linear(linear(), 4)
    state = {name: t.clone() for name, t in layer.state_dict().items() if not name.startswith("base_layer")}
    state["siva_u0.default"] += 1e-6
    layer.load_state_dict(state, strict=False)
    assert layer.siva_u0["default"].equal(state["siva_u0.default"])
    torch.testing.assert_close(layer(inputs()), linear()(inputs()), **CLOSE)


@RESIDUALS
def test_factors_of_another_weight_are_refused_and_change_nothing(residual: str) -> None:
    layer = SivaLinear.from_linear(linear(), 4, residual=residual)
    other = SivaLinear.from_linear(nn.Linear(20, 12), 4, residual=residual)
    state = {name: t for name, t in other.state_dict().items() if not name.startswith("base_layer")}
    expected = layer(inputs())
    with pytest.raises(FastpeftError, match="another weight"):
        layer.load_state_dict(state, strict=False)
    assert layer(inputs()).equal(expected)


def test_a_lossy_adapter_brings_its_residual_along() -> None:
    layer = SivaLinear.from_linear(linear(), 4, d=8)
    state = {name: t.clone() for name, t in layer.state_dict().items() if not name.startswith("base_layer")}
    for name in ("siva_u0.default", "siva_residual.default"):
        state[name] += 1e-6
    layer.load_state_dict(state, strict=False)
    assert layer.base_layer.weight.equal(state["siva_residual.default"])


@RESIDUALS
def test_merging_in_inference_mode_leaves_a_weight_that_trains(residual: str) -> None:
    """As where text is written by the merged model between steps."""
    layer, x = SivaLinear.from_linear(linear(), 4, residual=residual), inputs().requires_grad_()
    move(layer)
    expected = layer(x)
    with torch.inference_mode():
        layer.merge()
        layer.unmerge()
    layer(x).sum().backward()
    with torch.inference_mode():
        layer.merge()
        layer.enable_adapters(False)
        layer(x)  # takes the merge back
    layer.enable_adapters(True)
    layer(x).sum().backward()
    torch.testing.assert_close(layer(x), expected, **CLOSE)


@RESIDUALS
def test_torch_func_differentiates_by_row(residual: str) -> None:
    layers = nn.ModuleList([SivaLinear.from_linear(linear(), 4, residual=residual) for _ in range(2)])
    move(layers)
    names = [name for name, parameter in layers.named_parameters() if parameter.requires_grad]

    def loss(trained: dict[str, Tensor], x: Tensor) -> Tensor:
        with torch.nn.utils.stateless._reparametrize_module(layers, trained):
            alone = layers[0](x)
            operands = [(layer.stored, *layer.acting(), layer.base_layer.bias) for layer in layers]
            grouped = siva_linear_group(x, *zip(*operands, strict=True))
        return (alone * grouped[0] + grouped[1].square()).sum()

    trained = {name: layers.get_parameter(name).detach() for name in names}
    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(trained, inputs())
    for row, x in enumerate(inputs()):
        layers.zero_grad()
        loss({}, x).backward()
        expected = {name: layers.get_parameter(name).grad for name in names}
        torch.testing.assert_close({name: found[name][row] for name in names}, expected, rtol=1e-4, atol=1e-4)


@RESIDUALS
def test_a_name_given_again_starts_anew(residual: str) -> None:
    layer = SivaLinear.from_linear(linear(), 4, residual=residual)
    move(layer)
    layer.update_layer("default", 3, SivaConfig(residual=residual))
    assert layer.active_adapters == ["default"]
    torch.testing.assert_close(layer(inputs()), linear()(inputs()), **CLOSE)


@RESIDUALS
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_weight_is_the_one_that_acts(residual: str, kind: str) -> None:
    base = linear(kind)
    pretrained = base.weight.clone()
    layer = SivaLinear.from_linear(base, 4, residual=residual)
    move(layer)
    x, expected = inputs(), layer(inputs())
    weight = layer.weight if kind == "conv1d" else layer.weight.t()
    torch.testing.assert_close(x @ weight + layer.bias, expected, **CLOSE)
    weight.sum().backward()
    assert layer.siva_du["default"].weight.grad is not None
    layer.enable_adapters(False)
    torch.testing.assert_close(layer.weight.detach(), pretrained, **CLOSE)


@RESIDUALS
def test_modules_that_read_the_weight_get_the_right_one(residual: str) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    expected, _ = attention(x, x, x)
    attention.out_proj = SivaLinear.from_linear(attention.out_proj, 4, residual=residual)
    torch.testing.assert_close(attention(x, x, x)[0], expected, **CLOSE)


@RESIDUALS
def test_a_weight_that_is_computed_is_not_changed_in_place(residual: str) -> None:
    """As RWKV does on its way to eval mode: the change would be lost, and the outputs wrong."""
    layer = SivaLinear.from_linear(linear(), 4, residual=residual)
    changes: list[Callable[[Any], Any]] = [
        *(lambda w: w.div_(2), lambda w: w.__imul__(2), lambda w: w.__setitem__(0, 1.0)),
        *(lambda w: w.data.div_(2), lambda w: nn.init.zeros_(w.data), lambda w: setattr(w, "data", w.div(2))),
    ]
    with torch.no_grad():
        for change in changes:
            with pytest.raises(FastpeftError, match="in place"):
                change(layer.weight)
    assert layer.weight.div(2).shape == layer.weight.shape
    assert layer.weight.data.equal(layer.weight)
    assert not layer.weight.data.div(2).requires_grad


def test_a_cast_leaves_the_initial_factors_whole() -> None:
    layer = SivaLinear.from_linear(linear(), 4)
    initial = layer.siva_u0["default"].clone()
    layer.to(torch.bfloat16)
    assert layer.siva_du["default"].weight.dtype == torch.bfloat16
    assert layer.siva_u0["default"].equal(initial)
    assert layer(inputs().bfloat16()).dtype == torch.bfloat16


def test_an_empty_adapter_says_so() -> None:
    layer = SivaLinear(linear(), init_weights="saved")
    with pytest.raises(FastpeftError, match="holds nothing yet"):
        layer(inputs())


@RESIDUALS
def test_an_empty_adapter_beside_another_says_so(residual: str) -> None:
    layer = SivaLinear.from_linear(linear(), 4, residual=residual)
    expected = move(layer)(inputs())
    layer.update_layer("second", 4, SivaConfig(residual=residual, init_weights="saved"))
    assert layer(inputs()).equal(expected), "while it waits, the other acts"
    layer.set_adapter("second")
    for use in (lambda: layer(inputs()), lambda: layer.merge(adapter_names=["second"])):
        with pytest.raises(FastpeftError, match="'second' was made with init_weights='saved' and holds nothing yet"):
            use()
    layer.set_adapter("default")
    layer.delete_adapter("second")
    assert layer(inputs()).equal(expected)


@RESIDUALS
def test_an_adapter_beside_an_empty_one_starts_from_the_weight(residual: str) -> None:
    base = linear()
    expected, factors = base(inputs()), decompose(base.weight, 4).factors
    layer = SivaLinear.from_linear(base, 4, residual=residual, init_weights="saved")
    layer.update_layer("second", 4, SivaConfig(residual=residual))
    layer.set_adapter("second")
    assert layer.siva_s["second"].equal(factors.s)
    torch.testing.assert_close(layer(inputs()), expected, **CLOSE)


def test_the_rank_of_a_configuration_is_taken() -> None:
    config = SivaConfig(r=3, residual="implicit")
    assert SivaLinear(nn.Linear(12, 8), config=config).siva_s["default"].shape == (3,)
    assert SivaLinear(nn.Linear(12, 8), r=2, config=config).siva_s["default"].shape == (2,)
    with pytest.raises(FastpeftError, match=r"got a config and residual beside it\. Write"):
        SivaLinear(nn.Linear(12, 8), config=config, residual="frozen")


@pytest.mark.parametrize("bad", [nn.Embedding(4, 3), nn.Conv2d(3, 4, 1)])
def test_other_layers_are_refused(bad: nn.Module) -> None:
    with pytest.raises(FastpeftError, match=r"nn\.Linear and transformers' Conv1D"):
        SivaLinear.from_linear(bad)
