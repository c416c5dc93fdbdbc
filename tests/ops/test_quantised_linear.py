"""Products with a quantised weight: each form against float64, without and with the factors of SiVA."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instructions import supported
from poison import poisoned_memory
from siva_operands import as_group, as_group_backward
from torch import Tensor, nn
from torch.nn import functional as F

from fastpeft.ops import reference
from fastpeft.ops.quantise import Format, QuantisedLinear, QuantisedWeight

# nf4's codes are made by bitsandbytes
KINDS = ["int8", *(["nf4"] if importlib.util.find_spec("bitsandbytes") else [])]
DTYPES = [torch.float32, torch.bfloat16]
ERROR = {torch.float32: 2e-6, torch.bfloat16: 8e-3}  # of the norm; 1e-6 and 5e-3 are the largest that was seen
ops = torch.ops.fastpeft


def held(n: int, k: int, kind: Any) -> QuantisedWeight:
    return QuantisedWeight(torch.randn(n, k, generator=torch.Generator().manual_seed(n * k)), kind)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def is_near(found: Tensor, exact: Tensor, dtype: torch.dtype) -> bool:
    # a sum of few products may cancel
    room = 1e-3 if dtype is torch.float32 else 1.0
    return float((found.double() - exact).norm()) <= ERROR[dtype] * float(exact.norm() + room)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.integers(0, 9), max_size=2).map(tuple),
    n=st.one_of(st.integers(1, 70), st.integers(250, 270)),
    k=st.one_of(st.integers(1, 70), st.integers(250, 270)),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
)
def test_products_are_those_of_the_weight_as_numbers(
    rows: tuple[int, ...], n: int, k: int, kind: str, dtype: torch.dtype, bias: bool
) -> None:
    weight = held(n, k, kind)
    exact = weight.dequantise(torch.float64)
    x, dh, b = draw(*rows, k, dtype=dtype), draw(*rows, n, dtype=dtype), draw(n, dtype=dtype) if bias else None
    with poisoned_memory():
        h = ops.quantised_linear(x, weight.codes, weight.scales, n, b)
        dx = ops.quantised_linear_backward(dh, weight.codes, weight.scales, k)
    assert (h.dtype, h.shape, dx.dtype, dx.shape) == (dtype, (*rows, n), dtype, (*rows, k))
    assert is_near(h, x.double() @ exact.t() + (0 if b is None else b.double()), dtype)
    assert is_near(dx, dh.double() @ exact, dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("simd", supported())
@pytest.mark.parametrize("shape", [(300, 64), (300, 65), (65, 300), (3, 1), (1, 7), (520, 130)])
def test_numbers_are_the_references_bits(
    monkeypatch: pytest.MonkeyPatch, kind: str, simd: str, shape: tuple[int, int]
) -> None:
    """Rows of the identity pick single numbers, and adding zeros to a number changes no bit."""
    monkeypatch.setenv("FASTPEFT_SIMD", simd)
    n, k = shape
    weight = held(n, k, kind)
    found = ops.quantised_linear(torch.eye(k), weight.codes, weight.scales, n, None)
    assert torch.equal(found.t(), weight.dequantise(torch.float32))
    found = ops.quantised_linear_backward(torch.eye(n), weight.codes, weight.scales, k)
    assert torch.equal(found, weight.dequantise(torch.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_threads_change_no_bit(kind: str, two_threads: None) -> None:
    weight, x = held(700, 130, kind), draw(50, 130)
    several = ops.quantised_linear(x, weight.codes, weight.scales, 700, None)
    torch.set_num_threads(1)
    alone = ops.quantised_linear(x, weight.codes, weight.scales, 700, None)
    torch.testing.assert_close(several, alone, rtol=1e-6, atol=1e-5)  # BLAS may share out the sums
    numbers = ops.quantised_linear(torch.eye(130), weight.codes, weight.scales, 700, None)
    assert torch.equal(numbers.t(), weight.dequantise(torch.float32))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("rows", [(0,), (5,), (3, 90)])
def test_layers_of_siva_agree_with_the_reference(kind: str, dtype: torch.dtype, rows: tuple[int, ...]) -> None:
    n, k, r = 70, 130, 5
    weight = held(n, k, kind)
    factors = torch.float64 if dtype is torch.float64 else torch.float32
    u, s, v = draw(n, r, dtype=factors), draw(r, dtype=factors).abs(), draw(r, k, dtype=factors)
    x, dh, bias = draw(*rows, k, dtype=dtype), draw(*rows, n, dtype=dtype), draw(n, dtype=dtype)
    with poisoned_memory():
        layer = [weight.codes], [weight.scales], [u], [s], [v]
        (h,), p = ops.siva_linear(x, *layer, [bias])
        dx, (du,), dv, (dbias,) = ops.siva_linear_backward([dh], x, *layer, p, True, [True], True, [True])
    found = dx, du, dv, dbias
    given = [each.double() for each in (x, weight.dequantise(torch.float64), u, s, v, bias)]
    (exact_h,), exact_p = reference.siva_linear(*as_group(*given))
    backward = as_group_backward(dh.double(), *given[:-1], exact_p, True, True, True, True)
    dx, (du,), dv, (dbias,) = reference.siva_linear_backward(*backward)
    exact = dx, du, dv, dbias
    allowed = 2e-2 if dtype is torch.bfloat16 else 1e-5
    for ours, theirs in zip((h, p, *found), (exact_h, exact_p, *exact)):
        assert ours.shape == theirs.shape
        assert float((ours.double() - theirs).norm()) <= allowed * float(theirs.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_passes_gradients_and_keeps_its_codes_alone(kind: Any) -> None:
    layer = nn.Linear(130, 70)
    few = QuantisedLinear(layer, kind)
    x, same, saved = draw(3, 130).requires_grad_(), draw(3, 130).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        h = few(x)
    expected = nn.functional.linear(same, few.weight, layer.bias)
    torch.testing.assert_close(h, expected)
    gradients = torch.autograd.grad((h**2).sum(), (x, few.bias))
    torch.testing.assert_close(gradients, torch.autograd.grad((expected**2).sum(), (same, layer.bias)))
    assert sum(tensor.numel() * tensor.element_size() for tensor in saved) < 2 * 130 * 70


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("op", ["quantised_linear", "quantised_linear_backward"])
def test_opcheck(kind: str, op: str) -> None:
    weight = held(17, 5, kind)
    x, size, *bias = (draw(2, 3, 5), 17, draw(17)) if op == "quantised_linear" else (draw(2, 3, 17), 5)
    torch.library.opcheck(getattr(ops, op).default, (x, weight.codes.data, weight.scales.data, size, *bias))


@pytest.mark.skipif("nf4" not in KINDS, reason="needs bitsandbytes")
@pytest.mark.parametrize("kind", ["nf4", "nf4-double"])
def test_nf4_on_a_cpu_is_that_of_bitsandbytes(kind: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitsandbytes.functional import get_4bit_type, quantize_4bit

    monkeypatch.setattr("fastpeft.ops.quantise._BLOCKS_IN_CACHE", 5)  # of 13, the last in part
    weight = torch.randn(13, 60, generator=torch.Generator().manual_seed(0))
    quantiles = get_4bit_type("nf4", device="cpu")
    weight.view(-1)[:64] = 0  # a block whose scale is 0
    weight.view(-1)[64:128] = F.pad((quantiles[1:] + quantiles[:-1]) / 2, (1, 48), value=1.0)  # where codes change
    found = QuantisedWeight(weight, kind)
    padded = F.pad(weight.flatten(), (0, -weight.numel() % 64))
    codes, state = quantize_4bit(padded, blocksize=64, quant_type="nf4", compress_statistics=kind == "nf4-double")
    assert found.codes.equal(codes)
    assert found.scales.equal(state.absmax)
    if kind == "nf4-double":
        assert found.coarse.equal(state.state2.absmax)
        assert found.table.equal(state.state2.code)
        assert found.mean.equal(state.offset)
