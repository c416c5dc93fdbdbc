"""The op `fastpeft::frozen_head_cross_entropy`: forms, gradients, chunks and the checks of the function over it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from poison import in_nan, poisoned_memory
from tolerances import FORWARD, GRADIENT, assert_as_accurate
from torch import Tensor
from torch.nn import functional as F

import fastpeft
from fastpeft.functional import frozen_head_cross_entropy
from fastpeft.ops import aten, products, reference
from fastpeft.ops import frozen_head_cross_entropy as module
from fastpeft.training.memory import MemoryTracker

IGNORED = -100


def operands(
    rows: tuple[int, ...], k: int, v: int, bias: bool = True, ignored: float = 0.3
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(1000 * k + v)
    hidden = torch.randn(*rows, k, generator=generator, dtype=torch.float64)
    weight = torch.randn(v, k, generator=generator, dtype=torch.float64) / k**0.5
    labels = torch.randint(v, rows, generator=generator)
    labels = labels.masked_fill(torch.rand(rows, generator=generator) < ignored, IGNORED)
    return hidden, weight, labels, torch.randn(v, generator=generator, dtype=torch.float64) if bias else None


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
    """As transformers computes it."""
    logits = F.linear(hidden, weight, bias)
    logits = logits if logits.dtype is torch.float64 else logits.float()
    losses = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), **options)
    return losses.view(labels.shape) if losses.dim() else losses


@pytest.fixture(params=[1, 64, 2**22])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Chunks of one token, of several and of all; of float32 copies of the weight one word, several and all."""
    of_tokens: int = request.param
    monkeypatch.setattr(module, "CHUNK", of_tokens)
    monkeypatch.setattr(module, "FEWEST_TOKENS", {"cpu": 1})
    return of_tokens


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple),
    k=st.integers(1, 9),
    v=st.integers(1, 33),
    bias=st.booleans(),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
)
def test_equals_the_loss_of_logits(
    rows: tuple[int, ...], k: int, v: int, bias: bool, ignored: float, reduction: str
) -> None:
    hidden, weight, labels, b = operands(rows, k, v, bias, ignored)
    results = []
    for function in (frozen_head_cross_entropy, plain):
        x = hidden.clone().requires_grad_()
        loss = function(x, weight, labels, b, reduction=reduction)
        loss.backward(torch.arange(1, 1 + loss.numel(), dtype=loss.dtype).view(loss.shape))
        with torch.no_grad():
            without = function(hidden, weight, labels, b, reduction=reduction)
        results.append((loss, without, x.grad))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("rows", [(3,), (2, 5), ()])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(rows: tuple[int, ...], reduction: str, chunk: int) -> None:
    hidden, weight, labels, bias = operands(rows, 4, 7, ignored=0.3 if rows else 0.0)
    assert torch.autograd.gradcheck(
        lambda x: frozen_head_cross_entropy(x, weight, labels, bias, reduction=reduction), [hidden.requires_grad_()]
    )


@pytest.mark.parametrize("rows", [(0,), (1,), (7, 9), ()])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ignored", [0.0, 0.4, 1.0])
def test_chunks_equal_the_reference(rows: tuple[int, ...], bias: bool, ignored: float, chunk: int) -> None:
    hidden, weight, labels, b = operands(rows, 6, 13, bias, ignored)
    for gradient in (True, False):
        arguments = hidden, weight, labels, b, IGNORED, gradient
        with poisoned_memory():
            found = aten.frozen_head_cross_entropy(*arguments)
        expected = reference.frozen_head_cross_entropy(*arguments)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quickly", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_is_as_accurate_as_plain_pytorch(
    dtype: torch.dtype, quickly: bool, autocast: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether or not the machine multiplies half precision quickly; in views between NaN."""
    monkeypatch.setattr(products, "multiplies_in", lambda asked: quickly)
    hidden, weight, labels, bias = operands((3, 9), 40, 61)
    hidden[0, 0] = 40 * weight[labels[0, 0].clamp_min(0)]  # a token whose word is certain
    low = [in_nan(t.to(dtype)) for t in (hidden, weight, bias)]
    exact_of = [t.double().requires_grad_(i == 0) for i, t in enumerate(low)]
    losses = {}
    gradients = {}
    for name, function, (x, w, b) in (
        ("exact", plain, exact_of),
        ("plain", plain, low),
        ("ours", frozen_head_cross_entropy, low),
    ):
        x = x.detach().requires_grad_()
        with torch.autocast("cpu", dtype, enabled=autocast and dtype is not torch.float32):
            losses[name] = function(x, w, labels, b, reduction="none", ignore_index=IGNORED)
        (gradients[name],) = torch.autograd.grad(losses[name].sum(), x)
    # losses are in float32, of logits that are rounded to the dtype
    terms = exact_of[0].abs() @ exact_of[1].abs().t() * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    assert_as_accurate(losses["ours"], losses["plain"], losses["exact"], terms, FORWARD)
    terms = 2 * exact_of[1].abs().amax(0)
    assert_as_accurate(gradients["ours"], gradients["plain"], gradients["exact"], terms, GRADIENT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_that_arrives_is_not_rounded(dtype: torch.dtype) -> None:
    """In float16 that of a mean over many tokens is subnormal."""
    hidden, weight, labels, _ = operands((5,), 8, 6, bias=False, ignored=0.0)
    x, weight = hidden.to(dtype).requires_grad_(), (300 * weight).to(dtype)
    losses = frozen_head_cross_entropy(x, weight, labels, reduction="none")
    (of_each,) = torch.autograd.grad(losses.sum(), x, retain_graph=True)
    (found,) = torch.autograd.grad(losses, x, torch.full((5,), 3.3e-6))
    assert torch.equal(found, (of_each * torch.tensor([3.3e-6])).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("quickly", [True, False])
def test_what_it_allocates_is_known(dtype: torch.dtype, quickly: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "multiplies_in", lambda asked: quickly)
    monkeypatch.setattr(module, "CHUNK", 2**14)
    hidden, weight, labels, _ = operands((500,), 16, 4000, bias=False, ignored=0.0)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    with MemoryTracker() as tracker:
        losses, dhidden = aten.frozen_head_cross_entropy(hidden, weight, labels, None, IGNORED, True)
    inside = tracker.peak - sum(t.nbytes for t in (hidden, weight, labels, losses, dhidden))
    assert inside == pytest.approx(module.bytes_of_chunk(hidden, weight), rel=0.03)


def test_is_deterministic() -> None:
    hidden, weight, labels, bias = (t.float() if t.is_floating_point() else t for t in operands((300,), 8, 500))
    first, second = (aten.frozen_head_cross_entropy(hidden, weight, labels, bias, IGNORED, True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_ignored_tokens_are_not_read() -> None:
    hidden, weight, labels, bias = operands((20,), 6, 13)
    spoiled = hidden.masked_fill((labels == IGNORED)[:, None], torch.nan)
    found, expected = (
        aten.frozen_head_cross_entropy(x, weight, labels, bias, IGNORED, True) for x in (spoiled, hidden)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_captured_pass_keeps_ignored_tokens_whose_results_are_0(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (*operands((20,), 6, 13), IGNORED, True)
    expected = aten.frozen_head_cross_entropy(*arguments)
    monkeypatch.setattr(module, "is_captured", lambda: True)
    monkeypatch.setattr(torch.Tensor, "nonzero", None)
    torch.testing.assert_close(aten.frozen_head_cross_entropy(*arguments), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("need_dhidden", [True, False])
def test_opcheck(dtype: torch.dtype, need_dhidden: bool) -> None:
    hidden, weight, labels, bias = operands((2, 3), 6, 5)
    hidden, weight, bias = (t.to(dtype) for t in (hidden, weight, bias))
    op = torch.ops.fastpeft.frozen_head_cross_entropy.default
    torch.library.opcheck(op, (hidden.requires_grad_(need_dhidden), weight, labels, bias, IGNORED, need_dhidden))


def test_compiles_into_one_graph() -> None:
    hidden, weight, labels, bias = operands((2, 3), 6, 5)
    compiled = torch.compile(frozen_head_cross_entropy, fullgraph=True, backend="aot_eager")
    hidden.requires_grad_()
    found, expected = (
        torch.autograd.grad(function(hidden, weight, labels, bias), hidden)
        for function in (compiled, frozen_head_cross_entropy)
    )
    torch.testing.assert_close(found, expected)


def test_autocast_computes_in_half_precision_and_returns_float32_gradients() -> None:
    hidden, weight, labels, bias = operands((4,), 8, 6)
    hidden, weight, bias = (t.float() for t in (hidden, weight, bias))
    hidden.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = frozen_head_cross_entropy(hidden, weight, labels, bias)
    assert loss.dtype is torch.float32
    assert loss == frozen_head_cross_entropy(*(t.bfloat16() for t in (hidden, weight)), labels, bias.bfloat16())
    loss.backward()
    assert hidden.grad.dtype is torch.float32


def test_saves_the_gradient_alone() -> None:
    hidden, weight, labels, bias = operands((4,), 8, 6)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        frozen_head_cross_entropy(hidden.requires_grad_(), weight, labels, bias, reduction="none")
    assert [t.shape for t in kept] == [hidden.shape]


def test_a_step_never_has_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 0)
    hidden, weight, labels, _ = operands((1000,), 4, 5000, bias=False)
    hidden, weight = hidden.float().requires_grad_(), weight.float()
    peaks = {}
    for function in (frozen_head_cross_entropy, plain):
        with MemoryTracker(estimate_inside=True) as tracker:
            function(hidden, weight, labels, None).backward()
        peaks[function] = tracker.peak
    logits = 1000 * 5000 * 4
    assert peaks[plain] > 2 * logits
    chunk = module.tokens_of_chunk(5000, hidden.device) / 1000
    assert chunk * logits < peaks[frozen_head_cross_entropy] < (chunk + 0.1) * logits


def test_a_second_derivative_is_refused() -> None:
    hidden, weight, labels, bias = operands((4,), 8, 6)
    loss = frozen_head_cross_entropy(hidden.requires_grad_(), weight, labels, bias)
    with pytest.raises(fastpeft.FastpeftError, match=r"no second derivative.*create_graph"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_a_decoder_that_trains_is_refused(trained: str) -> None:
    hidden, weight, labels, bias = operands((4,), 8, 6)
    {"weight": weight, "bias": bias}[trained].requires_grad_()
    with pytest.raises(fastpeft.FastpeftError, match=rf"but {trained} requires a gradient.*F\.cross_entropy"):
        frozen_head_cross_entropy(hidden, weight, labels, bias)


@pytest.mark.parametrize(("change", "shape"), [(0, (4, 7)), (1, (6, 7)), (1, (6,)), (2, (3,)), (3, (5,))])
def test_shapes_that_do_not_fit_are_refused(change: int, shape: tuple[int, ...]) -> None:
    tensors = list(operands((4,), 8, 6))
    tensors[change] = tensors[change].new_zeros(shape)
    with pytest.raises(fastpeft.FastpeftError, match=r"takes hidden \(\*, K\).*got hidden"):
        frozen_head_cross_entropy(*tensors)


def test_other_words_are_refused() -> None:
    with pytest.raises(fastpeft.FastpeftError, match=r"reduction is 'max'; allowed are"):
        frozen_head_cross_entropy(*operands((4,), 8, 6), reduction="max")


def test_a_label_outside_the_vocabulary_raises() -> None:
    hidden, weight, labels, bias = operands((4,), 8, 6, ignored=0.0)
    labels[2] = 6
    with pytest.raises(RuntimeError, match="out of bounds"):
        frozen_head_cross_entropy(hidden, weight, labels, bias)
