"""The op `fastpeft::int8_linear`: every form gives the same bits, close to the product that it stands for."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instructions import supported
from poison import poisoned_memory
from torch import Tensor, nn
from torch.nn import functional as F

from fastpeft import FastpeftError, functional, pack_frozen
from fastpeft.ops import aten, reference
from fastpeft.ops.int8_linear import MOST_FEATURES
from fastpeft.ops.packing import quantise_rows
from fastpeft.ops.quantise import QuantisedLinear

DTYPES = [torch.float32, torch.bfloat16]
int8_linear = torch.ops.fastpeft.int8_linear


def operands(rows: tuple[int, ...], k: int, n: int, dtype: torch.dtype, bias: bool = True) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(k * n)
    x = torch.randn(*rows, k, generator=generator) * 3 + 1
    weight = torch.randn(n, k, generator=generator)
    return [x.to(dtype), *quantise_rows(weight), torch.randn(n, generator=generator) if bias else None]


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(st.integers(0, 9), max_size=2).map(tuple),
    k=st.integers(1, 70),
    n=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
)
def test_all_forms_give_the_same_bits(rows: tuple[int, ...], k: int, n: int, dtype: torch.dtype, bias: bool) -> None:
    given = operands(rows, k, n, dtype, bias)
    expected = reference.int8_linear(*given)
    assert torch.equal(aten.int8_linear(*given), expected)
    with poisoned_memory():
        assert torch.equal(int8_linear(*given), expected)


@pytest.mark.usefixtures("one_thread_after")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("simd", supported())
@pytest.mark.parametrize("threads", [1, 2])
def test_instructions_and_threads_change_no_bit(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, simd: str, threads: int
) -> None:
    given = operands((333,), 130, 77, dtype)  # several blocks of rows, the last one ragged
    monkeypatch.setenv("FASTPEFT_SIMD", simd)
    torch.set_num_threads(threads)
    assert torch.equal(int8_linear(*given), reference.int8_linear(*given))


@pytest.mark.parametrize("k", [64, 768, 3072])
def test_is_close_to_the_exact_product(k: int) -> None:
    """Errors of 255 even steps in a normal sample: 0.010 of the product's norm, measured."""
    generator = torch.Generator().manual_seed(k)
    x, weight = torch.randn(50, k, generator=generator), torch.randn(40, k, generator=generator)
    exact = F.linear(x.double(), weight.double())
    error = (int8_linear(x, *quantise_rows(weight), None) - exact).norm() / exact.norm()
    assert 0.002 < error < 0.02


def test_a_row_is_quantised_by_itself_and_zero_stays_zero() -> None:
    x, codes, scales, sums, _ = operands((4,), 32, 8, torch.float32)
    x[0] *= 1e4
    x[1] = 0
    h = int8_linear(x, codes, scales, sums, None)
    assert torch.equal(h[2:], int8_linear(x[2:], codes, scales, sums, None))
    assert not h[1].any()


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows(wrong: float) -> None:
    given = operands((5,), 33, 7, torch.float32)
    given[0][2, 30] = wrong
    for form in (int8_linear, reference.int8_linear, aten.int8_linear):
        assert form(*given).isnan().any(1).tolist() == [False, False, True, False, False]


def test_reads_any_layout() -> None:
    x, *others = operands((6,), 20, 9, torch.bfloat16)
    expected = int8_linear(x, *others)
    assert torch.equal(int8_linear(x.t().contiguous().t(), *others), expected)
    assert torch.equal(int8_linear(F.pad(x, (3, 3))[:, 3:-3], *others), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_are_computed_in_float32(dtype: torch.dtype) -> None:
    x, *others = operands((6,), 20, 9, torch.float32)
    expected = int8_linear(x.to(dtype).float(), *others).to(dtype)
    found = functional.int8_linear(x.to(dtype).requires_grad_(), *others)
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad


@pytest.mark.parametrize(
    "wrap", [lambda layer: pack_frozen(layer, "int8"), lambda layer: QuantisedLinear(layer, "int8")]
)
def test_layers_in_int8_compute_under_float16_autocast(wrap: Callable[[nn.Linear], nn.Module]) -> None:
    layer, x = nn.Linear(32, 16).requires_grad_(False), torch.randn(4, 32)
    expected = layer(x)
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        found = wrap(layer)(x)
    assert found.dtype is torch.float16
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("value", [127, -128])
def test_the_largest_sums_fit_into_32_bits(value: int) -> None:
    """All terms of one sign: a row of x whose codes are as far from its zero as can be."""
    x, codes = torch.full((2, MOST_FEATURES), 255.0), torch.full((3, MOST_FEATURES), value, dtype=torch.int8)
    given = x, codes, torch.ones(3), codes.sum(1, dtype=torch.int32)
    expected = reference.int8_linear(*given, None)
    torch.testing.assert_close(expected, torch.full((2, 3), 255.0 * value * MOST_FEATURES))
    assert torch.equal(aten.int8_linear(*given, None), expected)
    assert torch.equal(functional.int8_linear(*given), expected)


def test_more_features_than_32_bits_add_up_are_refused() -> None:
    x, codes = torch.ones(2, MOST_FEATURES + 1), torch.ones(3, MOST_FEATURES + 1, dtype=torch.int8)
    with pytest.raises(FastpeftError, match=r"x has 65794 features.* at most 65793"):
        functional.int8_linear(x, codes, torch.ones(3), codes.sum(1, dtype=torch.int32))


@pytest.mark.parametrize(
    "wrap", [lambda layer: pack_frozen(layer, "int8"), lambda layer: QuantisedLinear(layer, "int8")]
)
def test_a_layer_of_more_features_is_multiplied_otherwise(wrap: Callable[[nn.Linear], nn.Module]) -> None:
    layer, x = nn.Linear(70000, 2, bias=False).requires_grad_(False), torch.ones(3, 70000)
    layer.weight.data.fill_(0.01)
    with torch.no_grad():
        torch.testing.assert_close(wrap(layer)(x), torch.full((3, 2), 700.0), rtol=1e-3, atol=0)  # sums of 70,000


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    torch.library.opcheck(int8_linear.default, tuple(operands((2, 3), 17, 5, dtype)))
