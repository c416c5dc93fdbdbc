"""The op `fastpeft::siva_linear`: its reference, gradients, registration and the checks of the function over it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from siva_operands import as_group_backward
from torch import Tensor

import fastpeft
from fastpeft.functional import siva_linear, siva_linear_group
from fastpeft.ops import aten, products
from fastpeft.ops.packing import Packs


def operands(
    rows: tuple[int, ...], k: int, n: int, r: int, dtype: torch.dtype = torch.float64, bias: bool = True
) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(k * n + r)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return [draw(*rows, k), draw(n, k), draw(n, r), draw(r).abs() + 0.1, draw(r, k), draw(n) if bias else None]


def dense_weight(weight: Tensor, u: Tensor, s: Tensor, v: Tensor) -> Tensor:
    return weight + u @ torch.diag(s) @ v


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(st.integers(0, 5), min_size=0, max_size=3).map(tuple),
    k=st.integers(1, 17),
    n=st.integers(1, 17),
    r=st.integers(1, 9),
    bias=st.booleans(),
)
def test_equals_the_product_with_the_dense_weight(rows: tuple[int, ...], k: int, n: int, r: int, bias: bool) -> None:
    x, weight, u, s, v, b = operands(rows, k, n, r, bias=bias)
    expected = x @ dense_weight(weight, u, s, v).t() + (b if b is not None else 0)
    torch.testing.assert_close(siva_linear(x, weight, u, s, v, b), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [(3,), (2, 5), ()])
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(rows: tuple[int, ...], bias: bool) -> None:
    x, weight, u, s, v, b = operands(rows, 7, 5, 3, bias=bias)
    trained = [t.requires_grad_() for t in (x, u, v)] + ([b.requires_grad_()] if bias else [])
    assert torch.autograd.gradcheck(lambda x, u, v, *b: siva_linear(x, weight, u, s, v, b[0] if b else None), trained)


def test_gradients_equal_an_independent_formula() -> None:
    """Those of the dense weight W, by the chain rule: dU = dW V^T diag(s), dV = diag(s) U^T dW."""
    x, weight, u, s, v, b = operands((4, 6), 11, 9, 3)
    dh = torch.randn(4, 6, 9, dtype=torch.float64)
    for tensor in (x, u, v, b):
        tensor.requires_grad_()
    siva_linear(x, weight, u, s, v, b).backward(dh)
    with torch.no_grad():
        dw = torch.einsum("abn,abk->nk", dh, x)
        close = {"rtol": 1e-11, "atol": 1e-11}
        torch.testing.assert_close(x.grad, torch.einsum("abn,nk->abk", dh, dense_weight(weight, u, s, v)), **close)
        torch.testing.assert_close(u.grad, dw @ v.t() * s, **close)
        torch.testing.assert_close(v.grad, s[:, None] * (u.t() @ dw), **close)
        torch.testing.assert_close(b.grad, dh.sum((0, 1)), **close)


@pytest.mark.parametrize("trained", [(0,), (2,), (4,), (2, 4), (0, 2, 4, 5)])
def test_only_requested_gradients_are_made(trained: tuple[int, ...]) -> None:
    tensors = operands((3,), 6, 5, 2)
    for index in trained:
        tensors[index].requires_grad_()
    siva_linear(*tensors).sum().backward()
    assert [i for i, t in enumerate(tensors) if t.grad is not None] == list(trained)


def test_saves_x_and_the_projection_only_where_they_are_needed() -> None:
    x, weight, u, s, v, b = operands((3,), 6, 5, 2)

    def saved_shapes(*needs: Tensor) -> set[tuple[int, ...]]:
        shapes = set()
        for tensor in (x, u, v):
            tensor.requires_grad_(any(tensor is need for need in needs))
        with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.add(tuple(t.shape)) or t, lambda t: t):
            siva_linear(x, weight, u, s, v, b)
        return shapes

    parameters = {(5, 6), (5, 2), (2,), (2, 6)}
    assert saved_shapes(u, v) == parameters | {(3, 6), (2, 3)}
    assert saved_shapes(x) == parameters
    assert saved_shapes(u) == parameters | {(2, 3)}


def test_compiles_into_one_graph() -> None:
    tensors = operands((4,), 8, 6, 2, torch.float32)
    for index in (0, 2, 4):
        tensors[index].requires_grad_()

    def loss(*tensors: Tensor) -> Tensor:
        return siva_linear(*tensors).square().mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(*tensors), [tensors[i] for i in (0, 2, 4)])
    found = torch.autograd.grad(compiled(*tensors), [tensors[i] for i in (0, 2, 4)])
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_accurate_as_plain_pytorch(dtype: torch.dtype) -> None:
    x, weight, u, s, v, b = operands((64,), 96, 80, 4)
    weight, u, v = weight / 10, u / 3, v / 10
    exact = x @ dense_weight(weight, u, s, v).t() + b
    low = [t.to(dtype) for t in (x, weight, u, s, v, b)]
    plain = low[0] @ low[1].t() + ((low[0] @ low[4].t()) * low[3]) @ low[2].t() + low[5]
    error, plain_error = ((h.double() - exact).abs().max() for h in (siva_linear(*low), plain))
    assert error <= 2 * plain_error


def test_autocast_computes_in_half_precision_and_returns_float32_gradients() -> None:
    x, weight, u, s, v, b = operands((4,), 8, 6, 2, torch.float32)
    u.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        h = siva_linear(x, weight, u, s, v, b)
    assert h.dtype == torch.bfloat16
    h.sum().backward()
    assert u.grad.dtype == torch.float32


def test_autocast_leaves_float64_as_it_is() -> None:
    """As PyTorch's linear layers do."""
    given = operands((4,), 8, 6, 2, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        found = siva_linear(*given)
    assert found.equal(siva_linear(*given))


@pytest.mark.parametrize("training", [False, True])
def test_autocast_with_packs_casts_a_weight_once_and_keeps_no_copy_for_backward(training: bool) -> None:
    x, weight, u, s, v, b = operands((4,), 8, 6, 2, torch.float32)
    x.requires_grad_(training)
    u.requires_grad_(training)
    packs = Packs()
    kept: list[Tensor] = []
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        h = siva_linear(x, weight, u, s, v, b, packs)
        plain = siva_linear(x.detach(), weight, u.detach(), s, v, b)
    assert h.dtype is torch.bfloat16
    torch.testing.assert_close(h, plain, rtol=2e-2, atol=2e-2)
    if packs.of(weight, torch.bfloat16) is None:
        pytest.skip("no oneDNN")
    assert packs.nbytes == 2 * weight.numel()
    if training:
        assert not [t for t in kept if t.shape == weight.shape and t.data_ptr() != weight.data_ptr()]
        h.sum().backward()
        assert x.grad.dtype is torch.float32
        assert u.grad.dtype is torch.float32
        assert packs.nbytes == 4 * weight.numel()  # of W^T too, for the gradient of x


def test_fused_calls_give_gradients_of_u_beyond_the_range_of_float16() -> None:
    """To factors in float32: the sum over rows, in float16, is multiplied by s in their dtype."""
    weight, u, s, v = torch.zeros(3, 5).half(), torch.ones(3, 2), torch.tensor([100.0, 3.0]), torch.ones(2, 5)
    dh, x, p = torch.full((8, 3), 10.0).half(), torch.ones(8, 5).half(), torch.full((2, 8), 50.0)
    expected = torch.tensor([4e5, 1.2e4]).expand(3, 2)
    given = as_group_backward(dh, x, weight, u, s, v, p, False, True, False, False)
    assert torch.equal(aten.siva_linear_backward(*given)[1][0], expected)
    assert torch.equal(aten.siva_linear_backward(*given[:7], p.flatten(), *given[8:], [8], None)[1][0], expected)


@pytest.mark.parametrize(
    ("change", "shape"), [(0, (3, 7)), (2, (5, 3)), (3, (2, 1)), (4, (2, 5)), (5, (6,)), (1, (5,))]
)
def test_shapes_that_do_not_fit_are_refused(change: int, shape: tuple[int, ...]) -> None:
    tensors = operands((3,), 6, 5, 2)
    tensors[change] = torch.zeros(shape, dtype=torch.float64)
    with pytest.raises(fastpeft.FastpeftError, match=r"siva_linear takes x .* got x"):
        siva_linear(*tensors)


@pytest.mark.parametrize("index", [1, 3], ids=["weight", "s"])
def test_a_gradient_for_a_frozen_operand_is_refused(index: int) -> None:
    tensors = operands((3,), 6, 5, 2)
    tensors[index].requires_grad_()
    with pytest.raises(fastpeft.FastpeftError, match="weight or an s requires a gradient"):
        siva_linear(*tensors)


# -- groups --------------------------------------------------------------------------------------------------------

LAYERS = ((5, 3, True), (4, 1, False), (6, 2, True))  # out_features, rank, bias


def group_operands(
    rows: tuple[int, ...],
    k: int,
    layers: tuple[tuple[int, int, bool], ...] = LAYERS,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, list[list[Tensor | None]]]:
    """x, and for each layer weight, u, s, v and bias."""
    found = [operands(rows, k, n, r, dtype, bias) for n, r, bias in layers]
    return found[0][0], [each[1:] for each in found]


def trained(x: Tensor, layers: list[list[Tensor | None]]) -> list[Tensor]:
    return [
        x,
        *(t.requires_grad_() for layer in layers for i, t in enumerate(layer) if i in (1, 3, 4) and t is not None),
    ]


def grouped(x: Tensor, layers: list[list[Tensor | None]]) -> tuple[Tensor, ...]:
    return siva_linear_group(x, *zip(*layers))


def test_gradcheck_of_a_group() -> None:
    x, layers = group_operands((2, 3), 7)
    inputs = trained(x.requires_grad_(), layers)
    assert torch.autograd.gradcheck(lambda *_: grouped(x, layers), inputs)


def test_a_group_makes_only_requested_gradients_and_none_of_an_unused_output() -> None:
    x, layers = group_operands((3,), 7)
    u, v = layers[0][1].requires_grad_(), layers[2][3].requires_grad_()
    layers[1][1].requires_grad_()
    first, _, last = grouped(x, layers)
    expected = torch.autograd.grad(siva_linear(x, *layers[0]).sum() + siva_linear(x, *layers[2]).sum(), [u, v])
    found = torch.autograd.grad(first.sum() + last.sum(), [u, v])
    torch.testing.assert_close(found, expected)
    first, second, _ = grouped(x, layers)
    assert torch.autograd.grad(first.sum() + second.sum(), [u, v], allow_unused=True)[1] is None
    assert not grouped(x, [layer[:1] + [t.detach() for t in layer[1:4]] + layer[4:] for layer in layers])[
        0
    ].requires_grad


def test_a_group_saves_x_once_and_one_projection() -> None:
    x, layers = group_operands((3,), 7)
    trained(x, layers)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        grouped(x, layers)
    known = {t.data_ptr() for layer in layers for t in layer[:4]}
    activations = [t for t in kept if t.data_ptr() not in known]
    assert [tuple(t.shape) for t in activations] == [(3, 7), (6, 3)]  # x and p^T, for ranks 3 + 1 + 2
    assert activations[0].data_ptr() == x.data_ptr()


def test_outputs_may_be_changed_in_place() -> None:
    x, layers = group_operands((3,), 7)
    inputs = trained(x.requires_grad_(), layers)
    hs = grouped(x, layers)
    hs[0].mul_(2)
    loss = sum(h.square().sum() for h in hs)
    plain = [siva_linear(x, *layer) for layer in layers]
    expected = (2 * plain[0]).square().sum() + plain[1].square().sum() + plain[2].square().sum()
    torch.testing.assert_close(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs))
    siva_linear(x, *layers[0]).mul_(2).sum().backward()


def test_every_layer_of_a_group_multiplies_float32_copies_where_half_precision_is_slow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(products, "multiplies_in", lambda dtype: dtype is torch.float32)
    dhs, weights = ([torch.randn(5, 24).half() for _ in range(2)], [torch.randn(24, 40).half() for _ in range(2)])
    us, ss, vs = ([torch.zeros(shape).half()] * 2 for shape in ((24, 1), (1,), (1, 40)))
    empty = torch.empty(0).half()
    operands = dhs, empty, weights, [None] * 2, us, ss, vs, empty, True, [False] * 2, False, [False] * 2
    one, other = ((dh.float() @ weight.float()).half() for dh, weight in zip(dhs, weights, strict=True))
    assert torch.equal(aten.siva_linear_backward(*operands)[0], one + other)


def test_groups_that_do_not_fit_are_refused() -> None:
    x, layers = group_operands((3,), 7)
    weights, us, ss, vs, biases = zip(*layers)
    for refused, message in (
        ((weights[:2], us, ss, vs, biases), "got 2, 3, 3, 3, 3 of them"),
        (((), (), (), (), ()), "at least one"),
        (((weights[0].float(), *weights[1:]), us, ss, vs, biases), r"torch\.float32, torch\.float64"),
        ((weights, us[::-1], ss, vs, biases), r"siva_linear takes x .* got x"),
    ):
        with pytest.raises(fastpeft.FastpeftError, match=message):
            siva_linear_group(x, *refused)
