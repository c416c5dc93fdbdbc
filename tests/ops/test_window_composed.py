"""Window attention composed for GPUs, on a CPU: beside the reference in float64, over a stand-in for PyTorch's kernels
that asks for what they do."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastpeft.ops import aten, reference
from fastpeft.ops import window_composed as composed
from fastpeft.ops.window import Window

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def check_alignment(*operands: Tensor) -> None:
    """What PyTorch's kernels for 16 bits ask for: rows of 16 bytes."""
    for x in operands:
        assert x.stride(-1) == 1
        assert all(size == 1 or stride % 8 == 0 for size, stride in zip(x.shape[:-1], x.stride()[:-1]))


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, with_lse: bool, *, scale: float) -> tuple[Tensor, ...]:
    check_alignment(q, k, v)
    scores = q @ k.mT * scale
    if bias is not None:
        assert bias.dtype == q.dtype
        assert bias.shape == scores.shape
        check_alignment(bias)
        scores = scores + bias
    lse = scores.logsumexp(-1)
    lse = torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=torch.nan)
    return scores.softmax(-1) @ v, lse, torch.empty(()), torch.empty(())


def attend_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    _seed: Tensor,
    _offset: Tensor,
    dropout: float,
    needs: list[bool],
    *,
    scale: float,
) -> tuple[Tensor | None, ...]:
    check_alignment(dout, q, k, v, out)
    assert lse.shape[2] % 32 == 0
    assert dropout == 0
    scores = q @ k.mT * scale + (0 if bias is None else bias)
    weights = (scores - lse[:, :, : q.shape[2], None]).exp()
    dscores = weights * (dout @ v.mT - (dout * out).sum(-1, keepdim=True))
    found = (dscores @ k * scale, dscores.mT @ q * scale, weights.mT @ dout, None)
    return tuple(x if needed else None for x, needed in zip(found, needs))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composed, "_attend", attend)
    monkeypatch.setattr(composed, "_attend_backward", attend_backward)


MASKS = {
    "none": None,
    "padding": torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]]).bool(),
}


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("slots", "dropout"), [([1, 2, 4], 0.0), ([0, 2], 0.3), ([0, 1, 2, 3, 4], 0.3), ([], 0.0)])
@pytest.mark.parametrize(("heads", "width"), [(1, 8), (2, 5)])
def test_equals_the_reference(mask, causal, slots, dropout, heads, width):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, dout = (draw(3, 5, heads, width).transpose(1, 2) for _ in range(2))
    c, p = draw(len(slots), 3, 5, width).transpose(0, 1), draw(5, width)
    fixed = (MASKS[mask], slots, causal, dropout, torch.tensor(7), 2)
    expected = reference.window_attention(q, c, p, *fixed)
    found = composed.window_attention_composed(q, c, p, Window(*fixed))
    # dropout is in float32 in it, and so are the gradients of the window
    torch.testing.assert_close(found, expected, **(EXACT if dropout == 0 else {"rtol": 1e-5, "atol": 1e-5}))
    for needs in itertools.product((True, False), repeat=3):
        found = composed.window_attention_backward_composed(dout, q, c, p, *expected, Window(*fixed), needs)
        correct = reference.window_attention_backward(dout, q, c, p, fixed[0], *expected, *fixed[1:], *needs)
        torch.testing.assert_close(found, correct, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("shape", [(0, 1, 3), (2, 0, 3), (2, 1, 0)], ids=str)
def test_empty_sizes(shape):
    q = torch.zeros(*shape, 8)
    c, p = torch.zeros(shape[0], 2, shape[2], 8), torch.zeros(3, 8)
    window = Window(None, [0, 1], False, 0.0, None, 0)
    out, lse = composed.window_attention_composed(q, c, p, window)
    assert out.shape == q.shape
    assert lse.shape == shape
    found = composed.window_attention_backward_composed(out, q, c, p, out, lse, window, (True, True, True))
    for gradient, operand in zip(found, (q, c, p)):
        assert gradient.equal(torch.zeros_like(operand))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_pytorch_takes_what_it_passes(causal, dtype):
    """By the shape functions of its kernels, without a GPU."""
    with FakeTensorMode():
        q = torch.empty(2, 2, 20, 13, device="cuda", dtype=dtype)
        c, p = torch.empty(2, 3, 20, 13, device="cuda", dtype=dtype), torch.empty(5, 13, device="cuda", dtype=dtype)
        mask = torch.ones(2, 20, device="cuda", dtype=torch.bool)
        for some in (mask, None):
            window = Window(some, [0, 1, 3], causal, 0.0, None, 2)
            out, lse = composed.window_attention_composed(q, c, p, window)
            assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, dtype, q.shape[:3], torch.float32)
            for needs in itertools.product((True, False), repeat=3):
                found = composed.window_attention_backward_composed(out, q, c, p, out, lse, window, needs)
                for gradient, operand, needed in zip(found, (q, c, p), needs):
                    assert gradient.shape == (operand.shape if needed else (0,))
                    assert gradient.dtype == dtype


def test_without_a_kernel_for_the_dtype_the_reference_serves(monkeypatch):
    monkeypatch.setattr(Tensor, "is_cuda", True)
    q, c, p = torch.randn(2, 1, 3, 8).double(), torch.randn(2, 2, 3, 8).double(), torch.randn(3, 8).double()
    fixed = (None, [0, 2], True, 0.0, None, 0)
    found, expected = (form.window_attention(q, c, p, *fixed) for form in (aten, reference))
    for ours, theirs in zip(found, expected):
        assert ours.equal(theirs)
