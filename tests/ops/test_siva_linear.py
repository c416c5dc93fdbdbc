"""The op `fastpeft::siva_linear`: its reference, gradients, registration and the checks of the function over it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instructions import supported
from siva_operands import as_group, as_group_backward, flat
from torch import Tensor

import fastpeft
from fastpeft.functional import siva_linear, siva_linear_group
from fastpeft.ops import aten, backends, products, reference
from fastpeft.ops.packing import Packs, can_pack


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


@pytest.mark.parametrize("rows", [(0,), (3,), (2, 5), ()])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("k", "n", "r"), [(7, 5, 3), (7, 5, 1), (0, 5, 3), (7, 0, 3), (7, 5, 0)])
def test_fused_calls_equal_the_reference(rows: tuple[int, ...], bias: bool, k: int, n: int, r: int) -> None:
    x, weight, u, s, v, b = operands(rows, k, n, r, bias=bias)
    found, expected = (module.siva_linear(*as_group(x, weight, u, s, v, b)) for module in (aten, reference))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    dh = torch.randn(*rows, n, dtype=torch.float64)
    p = expected[1]
    for needs in itertools.product((True, False), repeat=4):
        arguments = as_group_backward(dh, x, weight, u, s, v, p, *needs)
        found, expected = (module.siva_linear_backward(*arguments) for module in (aten, reference))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    x, weight, u, s, v, b = operands((2, 3), 6, 5, 2, torch.float32)
    x, weight, b, dh = (t.to(dtype) for t in (x, weight, b, torch.randn(2, 3, 5)))
    torch.library.opcheck(torch.ops.fastpeft.siva_linear.default, as_group(x, weight, u, s, v, b))
    p = torch.randn(2, 6)
    for needs in [(True, True, True, True), (False, True, False, False), (True, False, False, True)]:
        arguments = as_group_backward(dh, x, weight, u, s, v, p, *needs)
        torch.library.opcheck(torch.ops.fastpeft.siva_linear_backward.default, arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_gradients_of_the_cpu() -> None:
    tensors = operands((3, 7), 33, 18, 4, torch.float32)
    trained = [index for index, tensor in enumerate(tensors) if index not in (1, 3)]
    gradients = []
    for device in ("cpu", "cuda"):
        placed = [tensor.to(device).requires_grad_(index in trained) for index, tensor in enumerate(tensors)]
        loss = siva_linear(*placed).square().sum()
        gradients.append([gradient.cpu() for gradient in torch.autograd.grad(loss, [placed[i] for i in trained])])
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    torch.library.opcheck(torch.ops.fastpeft.siva_linear.default, as_group(*(t.detach() for t in placed)))


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
    given = dh, x, weight, [u], [s], [v], [p], [8], None
    assert torch.equal(aten.siva_linear_mixed_backward(*given, False, [True], [False], False)[1][0], expected)


def test_half_precision_weight_with_float32_factors() -> None:
    x, weight, u, s, v, b = operands((4,), 8, 6, 2, torch.float32)
    h = siva_linear(x.bfloat16(), weight.bfloat16(), u.requires_grad_(), s, v, b.bfloat16())
    h.sum().backward()
    assert h.dtype == torch.bfloat16
    assert u.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "shape"), [(0, (3, 7)), (2, (5, 3)), (3, (2, 1)), (4, (2, 5)), (5, (6,)), (1, (5,))]
)
def test_shapes_that_do_not_fit_are_refused(change: int, shape: tuple[int, ...]) -> None:
    tensors = operands((3,), 6, 5, 2)
    tensors[change] = torch.zeros(shape, dtype=torch.float64)
    with pytest.raises(fastpeft.FastpeftError, match=r"siva_linear takes x .* got x"):
        siva_linear(*tensors)


@pytest.mark.parametrize(("index", "name"), [(1, "weight"), (3, "s")])
def test_a_gradient_for_a_frozen_operand_is_refused(index: int, name: str) -> None:
    tensors = operands((3,), 6, 5, 2)
    tensors[index].requires_grad_()
    with pytest.raises(fastpeft.FastpeftError, match=f"{name} requires a gradient"):
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


@pytest.mark.parametrize("implementation", [aten, reference], ids=["aten", "reference"])
@pytest.mark.parametrize("rows", [(0,), (3,), (2, 5), ()])
@pytest.mark.parametrize("k", [7, 0])
def test_a_group_gives_what_its_layers_give(implementation: Any, rows: tuple[int, ...], k: int) -> None:
    x, layers = group_operands(rows, k, (*LAYERS, (0, 2, True), (3, 0, True)))
    close = {"rtol": 1e-12, "atol": 1e-12}
    weights, us, ss, vs, biases = (list(each) for each in zip(*layers))
    hs, p = implementation.siva_linear(x, weights, [None] * len(us), us, ss, vs, biases)
    singles = [reference.siva_linear(*as_group(x, *layer)) for layer in layers]
    torch.testing.assert_close(hs, [h for (h,), _ in singles], **close)
    dhs = [torch.randn_like(h) for h in hs]
    for needs in itertools.product((True, False), repeat=4):
        of_x, of_u, of_v, of_bias = needs
        some = [of_u and i != 1 for i in range(len(layers))]
        dx, dus, dv, dbiases = implementation.siva_linear_backward(
            dhs, x, weights, [None] * len(us), us, ss, vs, p, of_x, some, of_v, [of_bias] * len(layers)
        )
        expected = [
            reference.siva_linear_backward(
                *as_group_backward(dh, x, *layer[:4], single[1], of_x, needed, of_v, of_bias)
            )
            for dh, layer, single, needed in zip(dhs, layers, singles, some)
        ]
        dxs, expected_dus, dvs, expected_dbiases = zip(*expected)
        torch.testing.assert_close(dx, sum(dxs), **close)
        torch.testing.assert_close(dus, flat(expected_dus), **close)
        torch.testing.assert_close(dv, torch.cat(dvs), **close)
        torch.testing.assert_close(dbiases, flat(expected_dbiases), **close)


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


def test_opcheck_of_a_group() -> None:
    x, layers = group_operands((2, 3), 7, dtype=torch.float32)
    weights, us, ss, vs, biases = (list(each) for each in zip(*layers))
    torch.library.opcheck(torch.ops.fastpeft.siva_linear.default, (x, weights, [None] * 3, us, ss, vs, biases))
    hs, p = torch.ops.fastpeft.siva_linear(x, weights, [None] * len(us), us, ss, vs, biases)
    for needs in [(True, [True] * 3, True, [True] * 3), (False, [False, True, False], False, [False] * 3)]:
        arguments = (hs, x, weights, [None] * 3, us, ss, vs, p, *needs)
        torch.library.opcheck(torch.ops.fastpeft.siva_linear_backward.default, arguments)


def test_autocast_of_a_group() -> None:
    x, layers = group_operands((3,), 7, dtype=torch.float32)
    trained(x, layers)
    with torch.autocast("cpu", torch.bfloat16):
        hs = grouped(x, layers)
    assert {h.dtype for h in hs} == {torch.bfloat16}
    sum(h.sum() for h in hs).backward()
    assert layers[0][1].grad.dtype == torch.float32


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


# -- the compiled module -------------------------------------------------------------------------------------------

compiled = pytest.mark.skipif(
    not any((choice.op, choice.backend) == ("siva_linear", "cpp") for choice in backends.choices()),
    reason="needs the compiled module",
)
RAGGED = [(1, 1, 1), (15, 17, 63), (63, 65, 15), (65, 63, 17), (17, 15, 65), (200, 97, 130)]  # rows, K, N
EMPTY = [(0, 7, 5), (5, 0, 7), (5, 7, 0)]
ALL = (True, True, True, True)


def single_and_gradients(
    implementation: Any, tensors: list[Tensor | None], dh: Tensor, packed: bool = False
) -> list[Tensor]:
    x, weight, *factors, bias = tensors
    weights = [weight, weight]
    if packed and can_pack(weight, x.dtype):
        weights = [Packs().of(weight, x.dtype, transposed) for transposed in (False, True)]
    hs, p = implementation.siva_linear(*as_group(x, weights[0], *factors, bias))
    gradients = implementation.siva_linear_backward(*as_group_backward(dh, x, weights[1], *factors, p, *ALL))
    return flat([hs, p, *gradients])


def lowered(tensors: list[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """x, weight and bias in `dtype`, the factors in float32."""
    return [t if t is None or i in (2, 3, 4) else t.to(dtype) for i, t in enumerate(tensors)]


@pytest.fixture
def poisoned() -> Iterator[None]:
    """New memory is NaN, so that what is not written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@compiled
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("simd", supported())
@pytest.mark.parametrize("rank", [0, 1, 3, 4, 5, 16, 33, 64])
def test_the_compiled_module_is_as_accurate_as_plain_pytorch(
    monkeypatch: pytest.MonkeyPatch, simd: str, rank: int, dtype: torch.dtype
) -> None:
    monkeypatch.setenv("FASTPEFT_SIMD", simd)
    for (rows, k, n), bias, packed in itertools.product(RAGGED + EMPTY, (True, False), (True, False)):
        tensors = lowered(operands((rows,), k, n, rank, torch.float32, bias), dtype)
        dh = torch.randn(rows, n, generator=torch.Generator().manual_seed(rows)).to(dtype)
        found = single_and_gradients(torch.ops.fastpeft, tensors, dh, packed)
        plain = single_and_gradients(reference, tensors, dh)
        doubles = [None if t is None else t.double() for t in tensors]
        exact = single_and_gradients(reference, doubles, dh.double())
        for factor, ours, theirs, true in zip((2, 2, 3, 3, 3, 3), found, plain, exact):
            assert ours.shape == true.shape
            assert ours.dtype is theirs.dtype
            if true.numel():
                chance = 2 if true.numel() == 1 else 1  # that plain PyTorch has the one number right
                rounding = chance * torch.finfo(ours.dtype).eps * true.abs().max()
                assert (ours - true).abs().max() <= factor * (theirs - true).abs().max() + rounding


@compiled
@pytest.mark.parametrize("needs", list(itertools.product((True, False), repeat=4)))
def test_the_compiled_module_makes_only_what_is_needed(needs: tuple[bool, ...]) -> None:
    x, *layer, _ = operands((70,), 33, 18, 5, torch.float32)
    dh, p, empty = torch.randn(70, 18), torch.randn(5, 70), torch.empty(0)
    _, of_u, of_v, _ = needs

    def call(*arguments: Any) -> list[Tensor]:
        return flat(torch.ops.fastpeft.siva_linear_backward(*as_group_backward(*arguments)))

    found = call(dh, x if of_v else empty, *layer, p if of_u else empty, *needs)
    for ours, whole, needed in zip(found, call(dh, x, *layer, p, *ALL), needs):
        assert torch.equal(ours, whole) if needed else ours.numel() == 0


@compiled
def test_the_compiled_module_takes_any_strides() -> None:
    x, weight, u, s, v, b = operands((6, 11), 33, 18, 5, torch.float32)
    dh = torch.randn(6, 11, 18)
    expected = single_and_gradients(reference, [x, weight, u, s, v, b], dh)
    wide = torch.full((6, 11, 40), torch.nan)
    wide[..., :33] = x
    strided = [weight.t().contiguous().t(), u.t().contiguous().t(), s.repeat_interleave(2)[::2]]
    strided += [v.t().contiguous().t(), b.repeat_interleave(3)[::3]]
    for other in (wide[..., :33], x.transpose(0, 2).contiguous().transpose(0, 2)):
        found = single_and_gradients(
            torch.ops.fastpeft, [other, *strided], dh.transpose(0, 1).contiguous().transpose(0, 1)
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    one = torch.ones(()).expand(6, 11, 18)  # what a sum passes back
    found, expected = (single_and_gradients(m, [x, *strided], one) for m in (torch.ops.fastpeft, reference))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@compiled
@pytest.mark.usefixtures("one_thread_after")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeats_and_threads_of_the_compiled_module_are_bit_equal(dtype: torch.dtype, packed: bool) -> None:
    tensors = lowered(operands((4200,), 65, 33, 5, torch.float32), dtype)  # more than one tile of rows in a chunk
    dh = torch.randn(4200, 33).to(dtype)
    runs = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        runs.append(single_and_gradients(torch.ops.fastpeft, tensors, dh, packed))
    for run in runs[1:]:
        assert all(torch.equal(run[i], runs[0][i]) for i in (1, 3, 4))  # p, dU, dV; h and dx hold a product by BLAS
    assert all(map(torch.equal, runs[1], runs[3]))


@compiled
@pytest.mark.parametrize("implementation", [torch.ops.fastpeft, aten, reference], ids=["compiled", "aten", "reference"])
def test_a_packed_group_gives_what_a_plain_one_gives(implementation: Any) -> None:
    x, layers = group_operands((3, 30), 37, dtype=torch.float32)
    dhs = [torch.randn(3, 30, n) for n, *_ in LAYERS]
    for dtype, close in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        weights, us, ss, vs, biases = (list(each) for each in zip(*layers))
        weights, biases, rows = ([t if t is None else t.to(dtype) for t in each] for each in (weights, biases, dhs))
        packs = [Packs() for _ in layers]
        results = []
        for packed in (False, True):
            forward, backward = (
                [each.of(w, dtype, turned) if packed and can_pack(w, dtype) else w for each, w in zip(packs, weights)]
                for turned in (False, True)
            )
            hs, p = implementation.siva_linear(x.to(dtype), forward, [None] * 3, us, ss, vs, biases)
            found = implementation.siva_linear_backward(
                rows, x.to(dtype), backward, [None] * 3, us, ss, vs, p, True, [True] * 3, True, [True] * 3
            )
            results.append([*hs, p, found[0], *found[1], found[2], *found[3]])
        for plain, ours in zip(*results):
            assert plain.dtype is ours.dtype
            torch.testing.assert_close(ours, plain, rtol=close, atol=close * plain.abs().max().item())


@compiled
@pytest.mark.parametrize(("dtype", "rank"), [(torch.float64, 3), (torch.bfloat16, 3), (torch.float32, 65)])
def test_the_compiled_module_leaves_other_dtypes_and_high_ranks_to_aten(dtype: torch.dtype, rank: int) -> None:
    tensors, dh = operands((3,), 80, 70, rank, dtype), torch.randn(3, 70).to(dtype)
    found, expected = (single_and_gradients(m, tensors, dh) for m in (torch.ops.fastpeft, aten))
    assert all(map(torch.equal, found, expected))
    x, layers = group_operands((3,), 80, ((70, rank, True), (6, 2, False)), dtype)
    weights, us, ss, vs, biases = (list(each) for each in zip(*layers))
    pairs = []
    for module in (torch.ops.fastpeft, aten):
        hs, p = module.siva_linear(x, weights, [None] * len(us), us, ss, vs, biases)
        dx, dus, dv, dbiases = module.siva_linear_backward(
            hs, x, weights, [None] * 2, us, ss, vs, p, True, [True, False], True, [False, True]
        )
        pairs.append([*hs, p, dx, *dus, dv, *dbiases])
    assert all(map(torch.equal, *pairs))


@compiled
@pytest.mark.parametrize("rows", [(0,), (3,), (2, 65), ()])
@pytest.mark.parametrize("k", [37, 0])
@pytest.mark.usefixtures("poisoned")
def test_a_compiled_group_gives_what_its_layers_give(rows: tuple[int, ...], k: int) -> None:
    layers_of = (*LAYERS, (0, 2, True), (30, 0, True), (19, 17, False))
    x, layers = group_operands(rows, k, layers_of, torch.float32)
    weights, us, ss, vs, biases = (list(each) for each in zip(*layers))
    results = []
    for module in (torch.ops.fastpeft, aten):
        hs, p = module.siva_linear(x, weights, [None] * len(us), us, ss, vs, biases)
        dhs = [torch.ones_like(h) for h in hs]
        some = [i != 1 for i in range(len(layers))]
        dx, dus, dv, dbiases = module.siva_linear_backward(
            dhs, x, weights, [None] * len(us), us, ss, vs, p, True, some, True, some[::-1]
        )
        results.append([*hs, p, dx, *dus, dv, *dbiases])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@compiled
@pytest.mark.parametrize(("change", "shape"), [(0, (3, 7)), (2, (5, 3)), (4, (2, 5)), (5, (6,)), (1, (5,))])
def test_the_compiled_module_refuses_shapes_that_do_not_fit(change: int, shape: tuple[int, ...]) -> None:
    tensors = operands((3,), 6, 5, 2, torch.float32)
    tensors[change] = torch.zeros(shape)
    with pytest.raises(RuntimeError, match="shapes fit together"):
        torch.ops.fastpeft.siva_linear(*as_group(*tensors))
