"""Packs of a frozen weight: what they compute, where there is none, and that a change of the weight is noticed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from instructions import PACKED_DTYPES
from torch import Tensor, nn

from fastpeft.ops.packing import Packs, can_pack, dense, operand, packed_linear

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
    x = torch.randn(3, 6)
    assert operand(weight, None, x) is weight
    assert operand(weight, Packs(enabled=False), x) is weight
    assert operand(weight, Packs(), x[0]) is weight  # one row in float32 gains nothing
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
