"""The softmax kernel of a frozen head against float64, with NaN wherever nothing belongs, and the op by it."""

from __future__ import annotations

import math

import pytest
import torch
from poison import in_nan, poisoned_memory
from tolerances import FORWARD, GRADIENT, assert_as_accurate

from fastpeft.ops import frozen_head_cross_entropy as module
from fastpeft.ops import products, reference

pytest.importorskip("triton")
from launches import Recording

from fastpeft.kernels import frozen_head_cross_entropy as kernel
from fastpeft.kernels import tiles

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=[16, 64], autouse=True)
def steps(request, monkeypatch):
    """Vocabularies of one step and of several."""
    monkeypatch.setattr(kernel, "SOFTMAX", tiles.Words(request.param, 4))


def operands(n, v, dtype, device, bias=True):
    generator = torch.Generator().manual_seed(n + v)
    logits = 3 * torch.randn(n, v, generator=generator)
    labels = torch.randint(v, (n,), generator=generator)
    logits[0, labels[0]] += 60  # a word that is certain
    bias = torch.randn(v, generator=generator).to(dtype).to(device) if bias else None
    return logits.to(dtype).to(device), labels.to(device), bias


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v", [1, 15, 16, 17, 63, 64, 65, 200])
@pytest.mark.parametrize("bias", [True, False])
def test_every_ragged_size(v, dtype, bias, device):
    logits, labels, bias = operands(5, v, dtype, device, bias)
    ours = []
    for gradient in (True, True, False):
        chunk = in_nan(logits)
        with poisoned_memory():
            losses = kernel.softmax(chunk, labels, None if bias is None else in_nan(bias), gradient)
        ours.append((losses, chunk))
        assert chunk._base.isnan().sum() == chunk._base.numel() - chunk.numel()
    assert torch.equal(ours[0][0], ours[1][0])
    assert torch.equal(ours[0][1], ours[1][1])
    assert torch.equal(ours[2][0], ours[0][0])
    assert torch.equal(ours[2][1], logits)
    plain, exact = logits.clone(), logits.double()
    plain_losses = module.softmax_in_place(plain, labels, bias, True)
    exact_losses = module.softmax_in_place(exact, labels, bias, True)
    terms = logits.double().abs() + (0 if bias is None else bias.double().abs())
    assert_as_accurate(ours[0][0], plain_losses, exact_losses, terms, FORWARD)
    assert_as_accurate(ours[0][1], plain, exact, torch.ones(1), GRADIENT)


@pytest.mark.parametrize("where", ["first", "last", "all"])
def test_words_that_cannot_be(where, device):
    logits, labels, _ = operands(3, 100, torch.float32, device)
    bias = torch.zeros(100, device=device)
    bias[{"first": slice(0, 70), "last": slice(30, 100), "all": slice(0, 100)}[where]] = -math.inf
    labels[:] = {"first": 80, "last": 20, "all": 3}[where]
    exact = logits.double()
    expected = module.softmax_in_place(exact, labels, bias.double(), True)
    losses = kernel.softmax(logits, labels, bias, True)
    torch.testing.assert_close(losses, expected.float(), equal_nan=True)
    torch.testing.assert_close(logits, exact.float(), equal_nan=True)


def test_what_is_not_finite_shows(device):
    logits, labels, bias = operands(4, 100, torch.float32, device)
    logits[0, 70], logits[1, 3], labels[2], labels[3] = math.nan, math.inf, 100, -5
    losses = kernel.softmax(logits, labels, bias, False)
    assert losses.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [(0,), (1,), (3, 11)])
@pytest.mark.parametrize("ignored", [0.0, 0.5, 1.0])
def test_the_op(tokens, ignored, dtype, device, monkeypatch):
    """In chunks of four tokens, with products in the dtype of the operands as on a GPU."""
    monkeypatch.setattr(module, "tokens_of_chunk", lambda vocabulary, device: 4)
    monkeypatch.setattr(products, "multiplies_in", lambda asked: True)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(*tokens, 24, generator=generator), torch.randn(77, 24, generator=generator) / 5
    labels = torch.randint(77, tokens, generator=generator)
    labels = labels.masked_fill(torch.rand(tokens, generator=generator) < ignored, -100).to(device)
    bias = torch.randn(77, generator=generator)
    low = [in_nan(t.to(dtype).to(device)) for t in (hidden, weight, bias)]
    for gradient in (True, False):
        rest = labels, low[2], -100, gradient
        with poisoned_memory():
            found = kernel.frozen_head_cross_entropy(*low[:2], *rest)
        plain = reference.frozen_head_cross_entropy(*low[:2], *rest)
        exact = reference.frozen_head_cross_entropy(
            *(t.double() for t in low[:2]), labels, low[2].double(), -100, gradient
        )
        # losses are in float32, of logits that are rounded to the dtype
        terms = (
            low[0].double().abs() @ low[1].double().abs().t() * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
        )
        assert_as_accurate(found[0], plain[0], exact[0], terms, FORWARD)
        assert_as_accurate(found[1], plain[1], exact[1], 2 * low[1].double().abs().amax(0), GRADIENT)


def test_a_chunk_takes_one_launch(device):
    given = operands(3, 40, torch.float32, device)
    with Recording() as recorded:
        kernel.softmax(*given, True)
    assert recorded.counted["_softmax_kernel"] == 1


def test_float64_is_left_to_aten(device):
    logits, labels, bias = operands(3, 40, torch.float64, device)
    other = logits.clone()
    found = kernel.softmax(logits, labels, bias, True)
    torch.testing.assert_close(found, module.softmax_in_place(other, labels, bias, True), rtol=0, atol=0)
    torch.testing.assert_close(logits, other, rtol=0, atol=0)
