"""The checked functions over the ops, for any shapes and values: what the formula says, or an error that says why."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

from fastpeft import FastpeftError, functional
from fastpeft.functional import mezo_perturb, mezo_perturb_, siva_linear, siva_linear_group, siva_linear_mixed
from fastpeft.ops import reference
from fastpeft.ops.quantise import QuantisedWeight
from fastpeft.ops.siva_linear import siva_products

few = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SIZE = st.integers(0, 5)
INTEGER = st.integers(-2, 20) | st.integers() | st.sampled_from([2**31, 2**32 - 1, 2**63 - 1, 2**63])
NUMBER = st.floats() | st.sampled_from([0.0, -0.0, 1.0, 1e-300, -3.5e38, math.nan, math.inf])


@st.composite
def tensors(draw: st.DrawFn, *shape: int) -> Tensor:
    """Values of one magnitude, of any floating dtype, dense or not."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    values = torch.randn(shape, generator=generator, dtype=torch.float64) * draw(st.sampled_from([1e-3, 0.5, 1.0]))
    values = values.to(draw(st.sampled_from(FLOATS)))
    if shape and draw(st.booleans()):
        values = values.movedim(0, -1).contiguous().movedim(-1, 0)
    return values


@st.composite
def spoilt(draw: st.DrawFn, tensor: Tensor) -> Tensor:
    """A tensor that is something else now."""
    change = draw(st.integers(0, 5))
    if change == 0:
        return tensor.new_zeros((*tensor.shape, draw(SIZE)))
    if change == 1 and tensor.dim():
        return tensor.new_zeros(tensor.shape[1:])
    if change == 2:
        return tensor.to(draw(st.sampled_from([torch.int64, torch.complex64, torch.bool, torch.float8_e5m2])))
    if change == 3:
        return tensor.to("meta")
    if change == 4:
        return tensor.clone().requires_grad_()
    sizes = list(tensor.shape) or [1]
    sizes[draw(st.integers(0, len(sizes) - 1))] += draw(st.integers(1, 3))
    return tensor.new_zeros(sizes)


def in_double(*given: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.double() for tensor in given]


def check(found: Tensor, formula: Any, *operands: Tensor | None) -> None:
    """Within roundings of the formula in float64, of operands that were brought to the dtype of the second first."""
    dtype = found.dtype
    cast = [None if tensor is None else tensor.to(dtype) for tensor in operands]
    exact = formula(*in_double(*cast))
    terms = formula(*(None if tensor is None else tensor.abs() for tensor in in_double(*cast)))
    assert found.shape == exact.shape
    # each of a few sums of a few terms, products of up to three
    allowed = 16 * torch.finfo(dtype).eps * terms + 16 * torch.finfo(dtype).smallest_normal
    assert ((found.double() - exact).abs() <= allowed).all()


def dense(x: Tensor, weight: Tensor, u: Tensor, s: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    h = torch.einsum("...k,nk->...n", x, weight) + torch.einsum("...k,rk,r,nr->...n", x, v, s, u)
    return h if bias is None else h + bias


def factors(data: st.DataObject, n: int, k: int) -> list[Tensor]:
    r = data.draw(SIZE)
    return [data.draw(tensors(n, r)), data.draw(tensors(r)), data.draw(tensors(r, k))]


@few
@given(st.data())
def test_siva_linear(data: st.DataObject) -> None:
    n, k = data.draw(SIZE), data.draw(SIZE)
    x, weight = data.draw(tensors(*data.draw(st.lists(SIZE, max_size=3)), k)), data.draw(tensors(n, k))
    bias = data.draw(tensors(n)) if data.draw(st.booleans()) else None
    operands = [x, weight, *factors(data, n, k), bias]
    check(siva_linear(*operands), dense, *operands)
    at = data.draw(st.sampled_from([i for i, tensor in enumerate(operands) if tensor is not None]))
    operands[at] = data.draw(spoilt(operands[at]))
    try:
        found = siva_linear(*operands)
    except FastpeftError:
        return
    check(found.detach(), dense, *(None if tensor is None else tensor.detach() for tensor in operands))


@few
@given(st.data())
def test_siva_linear_group(data: st.DataObject) -> None:
    k, dtype = data.draw(SIZE), data.draw(st.sampled_from(FLOATS))
    x = data.draw(tensors(*data.draw(st.lists(SIZE, max_size=2)), k))
    layers = []
    for _ in range(data.draw(st.integers(1, 3))):
        n = data.draw(SIZE)
        bias = data.draw(tensors(n)) if data.draw(st.booleans()) else None
        layers.append([data.draw(tensors(n, k)).to(dtype), *factors(data, n, k), bias])
    columns = [list(column) for column in zip(*layers)]
    for h, layer in zip(siva_linear_group(x, *columns), layers, strict=True):
        check(h, dense, x, *layer)
    column = columns[data.draw(st.integers(0, 4))]
    column.pop() if data.draw(st.booleans()) else column.append(column[0])
    with pytest.raises(FastpeftError, match=r"siva_linear_group takes .* got \d"):
        siva_linear_group(x, *columns)


@few
@given(st.data())
def test_siva_linear_mixed(data: st.DataObject) -> None:
    n, k, sizes = data.draw(SIZE), data.draw(SIZE), data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=3))
    rows = sum(sizes)
    x, weight = data.draw(tensors(rows, *data.draw(st.lists(SIZE, max_size=1)), k)), data.draw(tensors(n, k))
    bias = data.draw(tensors(n)) if data.draw(st.booleans()) else None
    own = [factors(data, n, k) for _ in sizes]
    columns = [list(column) for column in zip(*own)]
    order = torch.tensor(data.draw(st.permutations(range(rows))), dtype=torch.int64)
    given_order = order if data.draw(st.booleans()) else None
    h = siva_linear_mixed(x, weight, *columns, sizes, given_order, bias)
    placed = torch.arange(rows) if given_order is None else order
    for chosen, part in zip(placed.split(sizes), own, strict=True):
        check(h[chosen], dense, x[chosen], weight, *part, bias)
    wrong = data.draw(
        st.sampled_from(
            [
                {"sizes": [*sizes, 1]},
                {"sizes": [-1, *sizes[1:], sizes[0] + 1]},
                {"sizes": []},
                {"order": order.float()},
                {"order": torch.cat((order, order[:1])) if rows else order[None]},
                {"order": torch.full_like(order, rows) if rows else order[None]},
                {"order": order.to("meta")},
            ]
        )
    )
    names = {"sizes": sizes, "order": given_order} | wrong
    with pytest.raises(FastpeftError):
        siva_linear_mixed(x, weight, *columns, names["sizes"], names["order"], bias)


@few
@given(st.data())
def test_window_attention(data: st.DataObject) -> None:
    batch, heads, tokens, width, window = (data.draw(SIZE) for _ in range(5))
    slots = sorted(data.draw(st.sets(st.integers(0, window - 1)))) if window else []
    q, c = data.draw(tensors(batch, heads, tokens, width)), data.draw(tensors(batch, len(slots), tokens, width))
    p = data.draw(tensors(window, width))
    bits = st.lists(st.booleans(), min_size=batch * tokens, max_size=batch * tokens)
    mask = torch.tensor(data.draw(bits), dtype=torch.bool).view(batch, tokens) if data.draw(st.booleans()) else None
    options = {
        "slots": slots,
        "causal": data.draw(st.booleans()),
        "dropout": data.draw(st.sampled_from([0.0, 0.3, 1 - 2**-53])),
        "seed": data.draw(st.sampled_from([0, 2**63 - 1])),
        "block": data.draw(st.sampled_from([0, 2**28 - 1])),
    }
    found = functional.window_attention(q, c, p, mask, **options)
    low = [tensor.to(q.dtype).double() for tensor in (q, c, p)]
    exact, _ = reference.window_attention(*low, mask, *options.values())
    assert found.dtype is q.dtype
    assert found.shape == exact.shape
    # roundings of scores, which are the larger of the numbers, in the dtype in which they are summed up
    summed = torch.finfo(torch.float64 if q.dtype is torch.float64 else torch.float32).eps
    largest = max([1.0, *(tensor.abs().max().item() for tensor in low if tensor.numel())])
    allowed = (4 * torch.finfo(q.dtype).eps + 256 * summed) * largest
    assert ((found.double() - exact).abs() <= allowed).all()
    wrong = {
        "slots": st.lists(st.integers(-2, 20), max_size=4),
        "dropout": NUMBER,
        "seed": INTEGER,
        "block": INTEGER,
    }
    name = data.draw(st.sampled_from([*wrong]))
    options[name] = data.draw(wrong[name])
    operands = [q, c, p]
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, 2))
        operands[at] = data.draw(spoilt(operands[at]))
    try:
        found = functional.window_attention(*operands, mask, **options)
    except FastpeftError:
        return
    assert found.shape == operands[0].shape
    assert options["slots"] == sorted(set(options["slots"]))
    assert 0 <= options["dropout"] < 1
    assert 0 <= options["seed"] < 2**63
    assert 0 <= options["block"] < 2**28


@few
@given(st.data())
def test_mezo_perturb(data: st.DataObject) -> None:
    """In place and as a copy: the reference's bits, or nothing is changed."""
    shapes = data.draw(st.lists(st.lists(SIZE, max_size=3), max_size=3))
    params = [data.draw(tensors(*shape)) for shape in shapes]
    if params and data.draw(st.integers(0, 3)) == 0:
        at = data.draw(st.integers(0, len(params) - 1))
        params[at] = data.draw(spoilt(params[at])).detach()
    offsets = [data.draw(st.integers(0, 2**62) | INTEGER) for _ in params]
    terms = data.draw(st.lists(st.tuples(st.integers(0, 2**63 - 1) | INTEGER, st.floats(-1, 1) | NUMBER), max_size=3))
    seeds, scales = [seed for seed, _ in terms], [scale for _, scale in terms]
    how = (
        data.draw(st.sampled_from([0.0, 0.1]) | NUMBER),
        data.draw(st.sampled_from(["gaussian", "rademacher", "uniform"])),
        data.draw(st.sampled_from(["nearest", "stochastic", "up"])),
    )
    fits = (
        all(param.dtype in FLOATS for param in params)
        and all(0 <= number < 2**63 for number in (*offsets, *seeds))
        and all(abs(number) <= torch.finfo(torch.float32).max for number in (*scales, how[0]))
        and (seeds or how[0] == 0)
        and how[1] != "uniform"
        and how[2] != "up"
    )
    before = [param.clone() for param in params]  # which a copy is made of later
    if not fits:
        with pytest.raises(FastpeftError):
            mezo_perturb_(params, offsets, seeds, scales, *how)
        assert all(param.is_meta or torch.equal(raw(param), raw(copy)) for param, copy in zip(params, before))
        return
    mezo_perturb_(params, offsets, seeds, scales, *how)
    here = [i for i, param in enumerate(before) if not param.is_meta]
    expected = [before[i].clone() for i in here]
    reference.mezo_perturb_(expected, [offsets[i] for i in here], seeds, scales, *how)
    assert all(map(same, [params[i] for i in here], expected))
    for i, wanted in zip(here, expected):
        assert same(mezo_perturb(before[i], offsets[i], seeds, scales, *how), wanted)


def same(one: Tensor, other: Tensor) -> bool:
    """Equal bits, but for which NaN it is; tensors without values always."""
    if one.is_meta or other.is_meta:
        return one.shape == other.shape
    nan = one.isnan()
    return torch.equal(nan, other.isnan()) and torch.equal(raw(one[~nan]), raw(other[~nan]))


def raw(tensor: Tensor) -> Tensor:
    return tensor.flatten().view(torch.uint8)


@pytest.mark.parametrize("op", ["one layer", "a group", "a mixed batch", "a quantised layer", "a window"])
def test_a_second_derivative_is_refused(op: str) -> None:
    """What kernels made has no graph: such a term would be missing in silence."""
    x, weight, u, s, v = (torch.randn(*shape, requires_grad=True) for shape in ((2, 6), (4, 6), (4, 1), (1,), (1, 6)))
    weight, s = weight.detach(), s.detach()
    if op == "one layer":
        out = siva_linear(x, weight, u, s, v)
    elif op == "a group":
        (out,) = siva_linear_group(x, [weight], [u], [s], [v], [None])
    elif op == "a mixed batch":
        out = siva_linear_mixed(x, weight, [u], [s], [v], [2])
    elif op == "a quantised layer":
        rest = QuantisedWeight(weight, "int8")
        (out,) = siva_products(x, x.dtype, [rest.frozen], [u], [s], [v], [None])
    else:
        out = functional.window_attention(x.view(1, 1, 2, 6), x.view(1, 1, 2, 6), x[:1])
    with pytest.raises(FastpeftError, match=r"no second derivative.*create_graph"):
        torch.autograd.grad(torch.autograd.grad(out.square().sum(), x, create_graph=True)[0].square().sum(), x)


@pytest.mark.parametrize("records", [True, False])
@pytest.mark.parametrize("op", ["one layer", "a group", "a window", "a head"])
def test_a_derivative_that_is_taken_forward_does_not_vanish(op: str, records: bool) -> None:
    """An op of ours has no formula for it, and PyTorch then goes on without a word."""
    x, weight, u, s, v, change = (torch.randn(*shape) for shape in ((2, 6), (4, 6), (4, 1), (1,), (1, 6), (2, 6)))

    def function(x: Tensor) -> Tensor:
        if op == "one layer":
            return siva_linear(x, weight, u, s, v)
        if op == "a group":
            return siva_linear_group(x, [weight, weight], [u, u], [s, s], [v, v], [None, None])[1]
        if op == "a window":
            return functional.window_attention(x.view(1, 1, 2, 6), x.view(1, 1, 2, 6), v.expand(3, 6), slots=[1])
        return functional.frozen_head_cross_entropy(x, weight, torch.tensor([3, -100]), u[:, 0])

    step = 1e-2
    expected = (function(x + step * change) - function(x - step * change)) / (2 * step)
    with torch.set_grad_enabled(records):
        _, found = torch.func.jvp(function, (x,), (change,))
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
        with forward_ad.dual_level():
            found = forward_ad.unpack_dual(function(forward_ad.make_dual(x, change))).tangent
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


def test_torch_func_differentiates_a_window_by_row() -> None:
    q, c, p = torch.randn(3, 1, 2, 6), torch.randn(3, 2, 2, 6), torch.randn(3, 6)

    def loss(q: Tensor, c: Tensor, p: Tensor) -> Tensor:
        return functional.window_attention(q[None], c[None], p, slots=[0, 2]).square().sum()

    found = torch.func.vmap(torch.func.grad(loss, (0, 1, 2)), (0, 0, None))(q, c, p)
    for row, own in enumerate(zip(q, c)):
        operands = [each.clone().requires_grad_() for each in (*own, p)]
        expected = torch.autograd.grad(loss(*operands), operands)
        torch.testing.assert_close([each[row] for each in found], list(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("transform", ["jvp", "vjp"])
def test_a_derivative_of_dropout_by_torch_func_is_refused(transform: str) -> None:
    q, p = torch.randn(1, 1, 2, 6), torch.randn(1, 6)

    def function(q: Tensor) -> Tensor:
        return functional.window_attention(q, q, p, dropout=0.1)

    with pytest.raises(FastpeftError, match=r"dropout is 0.1 .* torch.func; allowed is 0"):
        torch.func.vjp(function, q) if transform == "vjp" else torch.func.jvp(function, (q,), (q,))
