"""Packs of a frozen weight: what they compute, where there is none, and that a change of the weight is noticed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from instructions import PACKED_DTYPES
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastpeft.functional import siva_linear, siva_linear_group, siva_linear_mixed
from fastpeft.ops import aten
from fastpeft.ops import packing as packing_module
from fastpeft.ops.frozen_linear import pack_layer
from fastpeft.ops.frozen_weight import Dense
from fastpeft.ops.packing import Packs, can_pack, dense, is_faster_packed, operand, pack, packed_linear, quantise_rows

packing = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")


def weight_of(n: int, k: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(n, k, generator=torch.Generator().manual_seed(n * k)), requires_grad=False)


@packing
@pytest.mark.parametrize("dtype", PACKED_DTYPES)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (17, 33), (64, 48)])
def test_a_pack_holds_the_weight_and_multiplies_by_it(n: int, k: int, dtype: torch.dtype) -> None:
    weight, packs = weight_of(n, k), Packs()
    for matrix in (weight, weight.t().contiguous().t()):
        for transposed in (False, True):
            packed = packs.of(matrix, dtype, transposed)
            assert packed is not None
            held = weight.t() if transposed else weight
            assert torch.equal(dense(packed), held.to(dtype))
            x = torch.randn(5, held.shape[1]).to(dtype)
            exact = x.double() @ dense(packed).double().t()
            plain = x @ dense(packed).t()
            rounding = torch.finfo(dtype).eps * exact.abs().max()
            error, allowed = ((found.double() - exact).abs().max() for found in (packed_linear(x, packed, None), plain))
            assert error <= 2 * allowed + rounding
    assert packs.nbytes == 2 * n * k * dtype.itemsize


@packing
@pytest.mark.parametrize("dtype", PACKED_DTYPES)
@pytest.mark.parametrize("function", ["siva_linear", "siva_linear_group", "siva_linear_mixed", "frozen_linear"])
def test_outputs_may_be_changed_in_place(function: str, dtype: torch.dtype) -> None:
    """As models do that add a bias or scale their queries; autograd refuses it for an output that is a view."""
    weight, packs = weight_of(24, 16).to(dtype), Packs()
    u, s, v = torch.randn(24, 2, requires_grad=True), torch.ones(2), torch.randn(2, 16)
    x = torch.randn(3, 5, 16, dtype=dtype, requires_grad=True)  # of three dimensions, which a product makes two
    bias = torch.randn(24, dtype=dtype)
    calls: dict[str, Callable[[], Tensor]] = {
        "siva_linear": lambda: siva_linear(x, weight, u, s, v, bias, packs),
        "siva_linear_group": lambda: siva_linear_group(x, *([each] * 2 for each in (weight, u, s, v, bias, packs)))[1],
        "siva_linear_mixed": lambda: siva_linear_mixed(x, weight, [u], [s], [v], [3], None, bias, packs),
        "frozen_linear": lambda: Dense(weight, packs).product(x, bias),
    }
    h = calls[function]()
    assert packs.nbytes > 0 or not is_faster_packed(15, dtype)
    h += 1
    h.sum().backward()
    assert x.grad is not None


@packing
def test_a_packed_product_is_no_view_without_the_compiled_module() -> None:
    packed, x = pack(weight_of(24, 16)), torch.randn(3, 5, 16)
    u, s, v = torch.randn(24, 2), torch.ones(2), torch.randn(2, 16)
    assert not aten.siva_linear(x, [packed], [None], [u], [s], [v], [None])[0][0]._is_view()


@packing
@pytest.mark.parametrize("dtype", PACKED_DTYPES)
def test_a_packed_product_takes_a_bias_of_any_strides(dtype: torch.dtype) -> None:
    packed, x = pack(weight_of(24, 16).to(dtype)), torch.randn(5, 16, dtype=dtype)
    for bias in (torch.randn(24, 3, dtype=dtype)[:, 1], torch.randn(1, dtype=dtype).expand(24)):
        assert torch.equal(packed_linear(x, packed, bias), packed_linear(x, packed, bias.contiguous()))


@packing
def test_a_pack_is_made_once() -> None:
    weight, packs = weight_of(6, 5), Packs()
    for dtype in PACKED_DTYPES:
        assert packs.of(weight, dtype) is packs.of(weight, dtype)


def add_to_data(weight: Tensor) -> None:
    weight.data += torch.full_like(weight, 0.5)


def add_in_place(weight: Tensor) -> None:
    with torch.no_grad():
        weight[0, 0] += 1  # one entry: the version tells


def replace_data(weight: Tensor) -> None:
    weight.data = weight.data + 1


def transpose_data(weight: Tensor) -> None:
    weight.data = weight.data.t()


def make_nan(weight: Tensor) -> None:
    weight.data.fill_(torch.nan)


@packing
@pytest.mark.parametrize("change", [add_to_data, add_in_place, replace_data, transpose_data, make_nan])
def test_a_change_of_the_weight_is_noticed(change: Callable[[Tensor], None]) -> None:
    weight, packs = weight_of(9, 9), Packs()
    before = packs.of(weight, torch.float32)
    change(weight)
    after = packs.of(weight, torch.float32)
    assert after is not None
    assert after is not before
    torch.testing.assert_close(dense(after), weight.detach(), rtol=0, atol=0, equal_nan=True)
    assert packs.of(weight, torch.float32) is after  # NaN is no change


@pytest.mark.parametrize("change", [add_to_data, add_in_place, replace_data, transpose_data])
def test_a_change_of_the_weight_makes_other_codes(change: Callable[[Tensor], None]) -> None:
    weight, packs = weight_of(9, 9), Packs()
    before = packs.codes(weight)
    assert packs.codes(weight) is before
    change(weight)
    for found, expected in zip(packs.codes(weight), quantise_rows(weight.detach())):
        assert torch.equal(found, expected)


@packing
def test_a_change_that_another_thread_notices_first_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, packs = weight_of(8, 16), Packs()
    holds, others = Packs._holds, iter([True])

    def late(self: Packs, weight: Tensor) -> bool:
        if next(others, False):
            self.of(weight, torch.float32)  # as if by another thread, while this one has not asked yet
        return holds(self, weight)

    packs.of(weight, torch.float32)
    weight.data.mul_(2)
    monkeypatch.setattr(Packs, "_holds", late)
    packed = packs.of(weight, torch.float32)
    assert packed is not None
    assert torch.equal(packed.to_dense(), weight)


@packing
def test_a_weight_whose_memory_was_given_back_is_not_read() -> None:
    weight, packs = weight_of(64, 64), Packs()
    packs.of(weight, torch.float32)
    old = weight.data
    weight.data = torch.ones(64, 64)
    old.untyped_storage().resize_(0)
    packed = packs.of(weight, torch.float32)
    assert packed is not None
    assert torch.equal(dense(packed), torch.ones(64, 64))


@packing
def test_what_cannot_be_packed_is_read_as_it_is() -> None:
    weight = weight_of(4, 6)
    half, x = weight.bfloat16(), torch.randn(3, 6)
    assert operand(weight, None, x) is weight
    assert operand(weight, Packs(enabled=False), x) is weight
    assert operand(weight, Packs(), x[0]) is weight  # one row gains nothing
    assert operand(half, Packs(), half[0]) is half
    assert operand(weight, Packs(), x.bfloat16()[0]).is_mkldnn is (torch.bfloat16 in PACKED_DTYPES)
    assert operand(weight, Packs(), x).is_mkldnn
    for other in (torch.float16, torch.float64):
        assert torch.equal(operand(weight, Packs(), x.to(other)), weight.to(other))
    assert not can_pack(weight.to("meta"), torch.float32)
    assert not can_pack(torch.empty(0, 6), torch.float32)
    assert not can_pack(torch.randn(8, 12)[::2, ::2], torch.float32)


@packing
def test_copies_and_pickles_of_packs_are_empty() -> None:
    packs = Packs()
    packs.of(weight_of(4, 6), torch.float32)
    for other in (copy.deepcopy(packs), pickle.loads(pickle.dumps(packs))):
        assert other.nbytes == 0
        assert other.enabled
    packs.drop()
    assert packs.nbytes == 0


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight on the CPU is treated as one on a GPU."""
    monkeypatch.setattr(packing_module, "can_lower", lambda weight, dtype: weight.dtype is not dtype)


def test_a_gpu_keeps_one_copy_of_a_weight_for_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        weight, packs = nn.Parameter(torch.empty(9, 8, device="cuda"), requires_grad=False), Packs()
        for dtype in (torch.bfloat16, torch.float16):
            copy_of = packs.of(weight, dtype)
            assert copy_of is not None
            assert (copy_of.dtype, copy_of.shape) == (dtype, (9, 8))
            assert packs.of(weight, dtype) is copy_of
        assert packs.of(weight, torch.float32) is None  # a product reads it as it lies
        monkeypatch.setattr(packing_module, "is_captured", lambda: True)
        assert packs.of(weight, torch.bfloat16) is None  # a graph would read it after the weight has changed
        monkeypatch.undo()
        assert Packs(enabled=False).of(weight, torch.bfloat16) is None


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("change", [add_in_place, replace_data, transpose_data])
def test_a_change_of_a_weight_on_a_gpu_is_noticed(change: Callable[[Tensor], None]) -> None:
    """But for what writes through `weight.data` alone, which only a look at the entries shows."""
    weight, packs = weight_of(9, 9), Packs()
    before = packs.of(weight, torch.bfloat16)
    change(weight)
    after = packs.of(weight, torch.bfloat16)
    assert after is not None
    assert after is not before
    assert torch.equal(after, weight.bfloat16())
    add_to_data(weight)
    packs.drop()
    assert torch.equal(operand(weight, packs, torch.ones(2, 9).bfloat16()), weight.bfloat16())


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_copy_that_was_made_for_inference_serves_training() -> None:
    weight, packs = weight_of(6, 5), Packs()
    with torch.inference_mode():
        packs.of(weight, torch.bfloat16)
    x = torch.randn(3, 5, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        Dense(weight, packs).product(x, None).sum().backward()
    assert x.grad is not None
    assert not operand(weight, packs, x.bfloat16()).is_inference()


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_frozen_layer_on_a_gpu_computes_by_its_copy() -> None:
    weight, x = weight_of(6, 5), torch.randn(3, 5, requires_grad=True)
    packs, bias = Packs(), torch.randn(6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = Dense(weight, packs).product(x, bias), nn.functional.linear(x, weight, bias)
    assert torch.equal(found, expected)
    for one, other in zip(*(torch.autograd.grad(h.sum(), (x, bias)) for h in (found, expected))):
        torch.testing.assert_close(one, other)
    assert packs.nbytes == 2 * 6 * 5


def test_who_reads_the_weight_of_a_layer_on_a_gpu_may_change_it() -> None:
    """As PEFT's merge does, by `layer.weight.data += delta`."""
    with FakeTensorMode():
        layer = nn.Linear(8, 9, device="cuda").requires_grad_(False)
        assert pack_layer(layer)
        assert layer.packs.of(layer._parameters["weight"], torch.bfloat16) is not None
        layer.weight.data += 1
        assert layer.packs.nbytes == 0
