"""`pack_frozen`: linear layers whose weight is packed once compute what they did, and notice when it changes."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from instructions import PACKED_DTYPES
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

import fastpeft
from fastpeft.ops import packing, products
from fastpeft.ops.frozen_linear import PackedLinear, pack_frozen, pack_layer, set_packing, unpack_frozen
from fastpeft.ops.packing import Packs, can_pack, pack
from fastpeft.ops.quantise import QuantisedLinear
from fastpeft.training.memory import MemoryTracker, simulate_training_step

DTYPES = [torch.float32, torch.bfloat16]
# of a sum of 40 products, which another order of additions changes; measured 2e-7 and 0.003
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


def frozen(kind: Callable[[int, int], nn.Module] = nn.Linear, n: int = 24, k: int = 40) -> nn.Module:
    layer = kind(k, n) if kind is nn.Linear else Conv1D(n, k)
    return layer.requires_grad_(False)


def assert_close(found: Tensor, expected: Tensor) -> None:
    scale = expected.abs().amax().item() if expected.numel() else 0
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE[found.dtype] * max(scale, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("rows", [(), (1,), (7,), (2, 5), (0,), (300,)])
def test_output_and_gradients_are_those_of_the_layer(rows: tuple[int, ...], kind: type, dtype: torch.dtype) -> None:
    layer = frozen(kind).to(dtype)
    layer.bias.requires_grad_()
    packed = pack_frozen(copy.deepcopy(layer))
    x = torch.randn(*rows, 40, dtype=dtype)
    results = []
    for each in (layer, packed):
        y = x.clone().requires_grad_()
        h = each(y)
        h.float().square().sum().backward()
        results.append((h.detach(), y.grad, each.bias.grad))
    for found, expected in zip(results[1], results[0], strict=True):
        assert found.dtype == dtype
        assert_close(found, expected)


def test_a_pack_holds_the_bits_of_the_weight() -> None:
    for dtype in PACKED_DTYPES:
        weight = torch.randn(33, 19).to(dtype)
        assert torch.equal(pack(weight).to_dense(), weight)


class Multiplied(TorchDispatchMode):
    """Notes the dtypes that matrix products multiply."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.dtypes.append(args[-1].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_where_half_precision_is_slow_float32_copies_are_multiplied(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, autocast: bool
) -> None:
    monkeypatch.setattr(products, "multiplies_in", lambda asked: asked is torch.float32)
    monkeypatch.setattr(packing, "multiplies_in", lambda asked: asked is torch.float32)
    layer = pack_frozen(frozen()).to(dtype)
    x = torch.randn(5, 40, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", dtype, enabled=autocast), Multiplied() as multiplied:
        h = layer(x)
        h.backward(torch.ones_like(h))
    assert multiplied.dtypes == [torch.float32] * 2
    with torch.no_grad():
        assert torch.equal(h, F.linear(x.float(), layer.weight.float(), layer.bias.float()).to(dtype))
        assert torch.equal(x.grad, (torch.ones_like(h).float() @ layer.weight.float()).to(dtype))


def test_repeats_are_bit_equal() -> None:
    layer, x = pack_frozen(frozen()), torch.randn(9, 40)
    assert all(torch.equal(layer(x), layer(x)) for _ in range(3))


def test_under_autocast_the_pack_is_the_one_cast_copy() -> None:
    layer = pack_frozen(frozen())
    x = torch.randn(5, 40, requires_grad=True)
    kept = []
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.dtype) or t, lambda t: t),
    ):
        h = layer(x)
    assert h.dtype == torch.bfloat16
    assert kept == [torch.float32]  # the weight itself, and no copy
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(h, F.linear(x, layer.weight, layer.bias))


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "in place": lambda layer: layer.weight.add_(1),
    "through data": lambda layer: layer.weight.data.add_(1),
    "a new tensor as data": lambda layer: setattr(layer.weight, "data", layer.weight.data + 1),
    "a new parameter": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight + 1, requires_grad=False)),
    "load_state_dict": lambda layer: layer.load_state_dict({k: v + 1 for k, v in layer.state_dict().items()}),
    "mezo": lambda layer: fastpeft.functional.mezo_perturb_([layer.weight], [0], [3], [0.5]),
}


@pytest.mark.parametrize("keeps_weight", [True, False])
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_change_of_the_weight_is_noticed(change: str, keeps_weight: bool) -> None:
    layer, x = frozen(), torch.randn(6, 40)
    pack_layer(layer, keeps_weight=keeps_weight)
    before = layer(x)
    CHANGES[change](layer)
    assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    assert not torch.allclose(layer(x), before)


def test_another_dtype_and_device_are_noticed() -> None:
    layer, x = pack_frozen(frozen()), torch.randn(6, 40)
    layer(x)
    layer.to(torch.bfloat16)
    assert_close(layer(x.bfloat16()), F.linear(x.bfloat16(), layer.weight, layer.bias))
    layer.to(torch.float64)
    assert torch.equal(layer(x.double()), F.linear(x.double(), layer.weight, layer.bias))
    with pytest.raises(RuntimeError, match="dtype"):
        layer(x)


def test_merging_and_unmerging_of_lora_are_noticed() -> None:
    base = nn.Sequential(nn.Linear(40, 24), nn.Linear(24, 24))
    model = pack_frozen(get_peft_model(base, LoraConfig(target_modules=["0"], init_lora_weights=False)))
    layer = model.base_model.model[0]
    assert type(layer.base_layer) is PackedLinear
    x = torch.randn(6, 40)
    with torch.no_grad():
        expected = model(x)
        model.merge_adapter()
        torch.testing.assert_close(model(x), expected)
        model.unmerge_adapter()
        torch.testing.assert_close(model(x), expected)
        plain = model.unload()
        assert not torch.allclose(plain(x), expected)


def test_gradients_of_lora_on_a_frozen_model_are_those_on_a_plain_one() -> None:
    base = nn.Sequential(nn.Linear(40, 24), nn.GELU(), nn.Linear(24, 24))
    model = get_peft_model(base, LoraConfig(target_modules=["0", "2"], init_lora_weights=False))
    x = torch.randn(6, 40)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(x).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    expected = gradients()
    pack_frozen(model)
    torch.testing.assert_close(gradients(), expected)


def test_a_weight_that_is_made_to_train_trains() -> None:
    layer, x = pack_frozen(frozen()), torch.randn(6, 40)
    layer(x)
    layer.requires_grad_()
    layer(x).sum().backward()
    assert_close(layer.weight.grad, x.sum(0).expand(24, 40))


def test_a_change_between_forward_and_backward_is_an_error() -> None:
    layer = pack_frozen(frozen())
    h = layer(torch.randn(6, 40, requires_grad=True))
    layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()


def test_unpacking_leaves_what_was_there() -> None:
    model = nn.Sequential(nn.Linear(40, 24), nn.Sequential(Conv1D(8, 24))).requires_grad_(False)
    before = {id(p) for p in model.parameters()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    kinds, attributes = [type(m) for m in model.modules()], [set(m.__dict__) for m in model.modules()]
    pack_frozen(model)(torch.randn(3, 40))
    unpack_frozen(model)
    assert [type(m) for m in model.modules()] == kinds
    assert [set(m.__dict__) for m in model.modules()] == attributes
    assert {id(p) for p in model.parameters()} == before
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


def test_what_trains_or_is_of_another_kind_stays() -> None:
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Own(4, 4).requires_grad_(False), nn.Linear(4, 4).requires_grad_(False))
    assert [type(m) for m in pack_frozen(model)] == [nn.Linear, Own, PackedLinear]
    assert [type(m) for m in pack_frozen(model)] == [nn.Linear, Own, PackedLinear]  # twice is once


def test_a_parametrised_layer_computes_by_what_its_weight_became() -> None:
    layer, x = pack_frozen(frozen()), torch.randn(3, 40)
    expected = F.linear(x, 2 * layer.weight, layer.bias)
    before = layer(x)

    class Twice(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    parametrize.register_parametrization(layer, "weight", Twice())
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(unpack_frozen(layer)(x), expected)
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    torch.testing.assert_close(layer(x), before)


def test_refuses_a_model_without_frozen_layers_and_unknown_words() -> None:
    with pytest.raises(fastpeft.FastpeftError, match=r"no frozen linear layer.*requires_grad_"):
        pack_frozen(nn.Linear(4, 4))
    with pytest.raises(fastpeft.FastpeftError, match="'int4'; allowed are 'int8'"):
        pack_frozen(frozen(), computation="int4")


@pytest.mark.parametrize("keeps_weight", [True, False])
def test_copies_pickles_and_files_have_the_weight_and_no_pack(keeps_weight: bool) -> None:
    layer, x = frozen(), torch.randn(6, 40)
    pack_layer(layer, keeps_weight=keeps_weight)
    weight = layer.weight.clone()
    with torch.no_grad():
        expected = layer(x)
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert torch.equal(layer.state_dict()["weight"], weight)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.packs.nbytes == 0
        assert torch.equal(other.weight, weight)
        assert torch.equal(other(x), expected)
    torch.save(layer.state_dict(), file := io.BytesIO())
    file.seek(0)
    assert torch.equal(torch.load(file)["weight"], weight)


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@torch.no_grad()
def test_a_pack_in_the_place_of_the_weight(kind: type) -> None:
    layer, x = frozen(kind), torch.randn(6, 40)
    weight = layer.weight.clone()
    pack_layer(layer, keeps_weight=False)
    expected = layer(x)
    stored = layer._parameters["weight"]
    assert stored.is_mkldnn
    assert layer.packs.nbytes == 0  # not kept twice
    assert sum(p.numel() for p in layer.parameters()) == 40 * 24 + 24
    assert torch.equal(layer(x), expected)
    held = layer.weight  # whoever reads the values gets them, and may write
    assert torch.equal(held, weight)
    layer(x)
    assert layer._parameters["weight"] is held
    held.mul_(2)
    assert not torch.allclose(layer(x), expected)
    del held
    layer(x)
    assert layer._parameters["weight"].is_mkldnn
    with torch.enable_grad():
        y = x.clone().requires_grad_()
        layer(y).sum().backward()
    assert_close(y.grad, (2 * weight if kind is nn.Linear else 2 * weight.t()).sum(0).expand(6, 40))
    unpack_frozen(layer)
    assert torch.equal(layer.weight, 2 * weight)


def test_int8_is_for_what_asks_for_no_gradient() -> None:
    layer = pack_frozen(frozen(), computation="int8")
    x = torch.randn(6, 40)
    exact = F.linear(x, layer.weight, layer.bias)
    with_gradient = layer(x.clone().requires_grad_())
    assert_close(with_gradient.detach(), exact)
    error = (layer(x) - exact).norm() / exact.norm()
    assert error < 0.02
    layer.weight.data.mul_(2)
    assert (layer(x) - F.linear(x, layer.weight, layer.bias)).norm() < 0.05 * exact.norm()


def in_form(layer: nn.Linear, form: str) -> nn.Module:
    """The layer as its weight is kept, or multiplied."""
    if form == "weight in int8":
        return QuantisedLinear(layer, "int8")
    if form == "pack without weight":
        pack_layer(layer, keeps_weight=False)
    else:
        pack_frozen(layer, computation="int8" if form == "products in int8" else None)
    return layer


@pytest.mark.parametrize("form", ["products in int8", "weight in int8", "pack without weight"])
def test_a_bias_that_trains_gets_its_gradient(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Also where x asks for none, as in the first layer of a model whose biases train alone."""
    monkeypatch.setattr(packing, "is_faster_packed", lambda *_: True)
    layer, x = frozen(), torch.randn(6, 40)
    layer.bias.requires_grad_()
    expected = layer(x)
    layer = in_form(layer, form)
    with torch.no_grad():
        assert (layer(x) - expected).norm() < 0.02 * expected.norm()
    layer(x).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((24,), 6.0))


@pytest.mark.parametrize("form", ["pack beside weight", "products in int8", "weight in int8"])
def test_derivatives_by_torch_func(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Forward ones too: no product of ours has a formula for these, so they would vanish."""
    monkeypatch.setattr(packing, "is_faster_packed", lambda *_: True)
    layer, x = in_form(frozen(), form), torch.randn(6, 40)
    weight = layer.weight.detach().clone()
    with torch.no_grad():
        layer(x)
    assert_close(torch.func.jvp(layer, (x,), (x,))[1], x @ weight.t())
    with torch.no_grad(), forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x))).tangent
    assert_close(tangent, x @ weight.t())
    expected = weight.sum(0).expand(6, 40)
    assert_close(torch.func.grad(lambda x: layer(x).sum())(x), expected)
    assert_close(torch.func.grad(lambda x: torch.func.vmap(layer)(x).sum())(x), expected)


def test_int8_takes_a_weight_that_is_not_dense() -> None:
    layer, strided, x = nn.Linear(16, 4, bias=False), nn.Linear(16, 4, bias=False), torch.randn(6, 16)
    strided.weight = nn.Parameter(torch.randn(4, 32)[:, ::2])
    layer.weight = nn.Parameter(strided.weight.detach().contiguous())
    for each in (layer, strided):
        pack_frozen(each.requires_grad_(False), computation="int8")
    for _ in range(2):
        torch.testing.assert_close(strided(x), layer(x))  # with AVX2 a product's bits depend on the layout
        for each in (layer, strided):
            each.weight.data.mul_(2)


def test_packs_are_for_dense_weights_on_a_cpu() -> None:
    weight = torch.randn(4, 4)
    assert can_pack(weight, torch.float32)
    assert not can_pack(weight.to("meta"), torch.float32)
    assert not can_pack(weight, torch.float64)
    assert not can_pack(weight[:0], torch.float32)
    assert Packs(enabled=False).of(weight, torch.float32) is None


def test_a_compiled_model_computes_the_same_in_one_graph() -> None:
    model = pack_frozen(nn.Sequential(nn.Linear(40, 24), nn.ReLU()).requires_grad_(False))
    x = torch.randn(6, 40)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_a_simulated_step_counts_the_packs() -> None:
    """One of the weight and one of its transpose, where a gradient passes through; one where none does."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(512, 512).requires_grad_(False), nn.Linear(512, 512)
            self.second.weight.requires_grad_(False)
            self.first.bias.requires_grad_()

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x)).square().mean()

    model, matrix = Two(), 512 * 512 * 4
    before = simulate_training_step(model, {"x": torch.zeros(4, 512)}).peak
    after = simulate_training_step(pack_frozen(model), {"x": torch.zeros(4, 512)}).peak
    assert 2.9 * matrix < after - before < 3.1 * matrix
    one = {"x": torch.zeros(1, 512)}
    alone, with_more = (simulate_training_step(model, one, measured=m).peak for m in (None, {"x": torch.zeros(4, 512)}))
    assert 1.9 * matrix < with_more - alone < 2.1 * matrix, "what only more rows ask for stays"


def test_a_tracker_counts_the_packs() -> None:
    layer = pack_frozen(nn.Linear(512, 512).requires_grad_(False))
    with MemoryTracker() as tracker:
        layer(torch.zeros(4, 512))
    assert 0 <= tracker.current - 2 * layer.packs.nbytes < 1000  # the weight is known too, from a view of it


def test_all_layers_of_a_model_follow_one_switch() -> None:
    base = nn.Sequential(nn.Linear(40, 24), nn.Linear(24, 24))
    model = get_peft_model(base, fastpeft.SivaConfig(r=2, target_modules=["0"]))
    assert set_packing(model) == 2
    with torch.no_grad():
        expected = model(torch.ones(3, 40))
    layer = model.base_model.model[0]
    assert layer.packs.nbytes > 0
    assert set_packing(model, False) == 0
    assert type(model.base_model.model[1]) is nn.Linear
    assert not layer.packs.enabled
    layer.packs.drop()
    with torch.no_grad():
        assert_close(model(torch.ones(3, 40)), expected)
    assert layer.packs.nbytes == 0
