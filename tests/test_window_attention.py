"""`window_attention`: against loops over every key of the window, its gradients, its dropout and its checks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_as_accurate
from torch import Tensor

from fastpeft import FastpeftError, noise, reference
from fastpeft.functional import window_attention

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def operands(
    batch: int, heads: int, tokens: int, width: int, window: int, real: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return draw(batch, heads, tokens, width), draw(batch, real, tokens, width), draw(window, width)


def long_form(q: Tensor, c: Tensor, p: Tensor, mask: Tensor, slots: list[int], causal: bool) -> tuple[Tensor, Tensor]:
    """Every slot has T keys, those outside the backbone too, and each query looks at them one by one."""
    batch, heads, tokens, width = q.shape
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:3], -math.inf, dtype=q.dtype)
    for b in range(batch):
        keys = []  # (position, vector), slot after slot
        for slot in range(p.shape[0]):
            for t in range(tokens):
                feature = c[b, slots.index(slot), t] if slot in slots else torch.zeros(width, dtype=q.dtype)
                if mask[b, t]:
                    keys.append((t, feature + p[slot]))
        for h in range(heads):
            for t in range(tokens):
                seen = [key for position, key in keys if not causal or position <= t]
                if seen:
                    scores = torch.stack([q[b, h, t] @ key for key in seen])
                    lse[b, h, t] = scores.exp().sum().log()
                    weights = scores.exp() / scores.exp().sum()
                    out[b, h, t] = sum(weight * key for weight, key in zip(weights, seen))
    return out, lse


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(), window=st.integers(1, 9), heads=st.integers(1, 2), tokens=st.integers(1, 5), causal=st.booleans()
)
def test_equals_loops_over_every_key(data: st.DataObject, window: int, heads: int, tokens: int, causal: bool) -> None:
    slots = sorted(data.draw(st.sets(st.integers(0, window - 1), min_size=1)))
    bits = data.draw(st.lists(st.booleans(), min_size=2 * tokens, max_size=2 * tokens))
    mask = torch.tensor(bits).view(2, tokens)
    q, c, p = operands(2, heads, tokens, 3, window, len(slots))
    out, lse = reference.window_attention(q, c, p, mask, slots, causal, 0.0, 0, 0)
    expected, expected_lse = long_form(q, c, p, mask, slots, causal)
    torch.testing.assert_close(out, expected, **EXACT)
    torch.testing.assert_close(lse, expected_lse.float())
    torch.testing.assert_close(window_attention(q, c, p, mask, slots=slots, causal=causal), expected, **EXACT)


def test_no_mask_is_a_mask_of_ones() -> None:
    q, c, p = operands(2, 1, 4, 3, 3, 3)
    assert window_attention(q, c, p).equal(window_attention(q, c, p, torch.ones(2, 4, dtype=torch.bool)))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck_with_padding_and_a_row_of_nothing_else(causal: bool, dropout: float) -> None:
    operators = [t.requires_grad_() for t in operands(3, 2, 4, 3, 5, 3)]
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0]]).bool()

    def function(q: Tensor, c: Tensor, p: Tensor) -> Tensor:
        return window_attention(q, c, p, mask, slots=[1, 2, 4], causal=causal, dropout=dropout, seed=5)

    assert torch.autograd.gradcheck(function, operators)
    assert function(*operators)[2].eq(0).all()


def test_dropout_is_a_function_of_seed_block_slot_and_position() -> None:
    q, c, p = operands(2, 1, 6, 4, 9, 3)
    slots, dropout, seed, block = [0, 4, 8], 0.3, 2**40 + 7, 3
    kept = torch.empty_like(c, dtype=torch.bool)
    for row, slot in enumerate(slots):
        words = noise.random_words(0, 12, seed, 2, 16 * block + slot).flatten()  # stream 2, four words a counter
        kept[:, row] = (words >= round(dropout * 2**32)).view(2, 6, 4)
    assert 0 < kept.float().mean() < 1
    arguments = {"slots": slots, "block": block, "seed": seed}
    found = window_attention(q, c, p, dropout=dropout, **arguments)
    torch.testing.assert_close(found, window_attention(q, c * kept / 0.7, p, **arguments), **EXACT)
    for change in ({"seed": seed + 1}, {"block": block + 1}, {"slots": [0, 4, 7]}):
        assert not window_attention(q, c, p, dropout=dropout, **(arguments | change)).allclose(found)


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5])
def test_dropout_keeps_its_share(p: float) -> None:
    count = 200_001
    kept = noise.kept(count, p, seed=11, ordinals=[17, 18])
    deviation = math.sqrt(p * (1 - p) / count)
    assert kept.shape == (2, count)
    assert ((kept.double().mean(1) - (1 - p)).abs() < 5 * deviation).all()
    agreement = (kept[0] == kept[1]).double().mean()  # of two independent draws
    assert abs(agreement - (p * p + (1 - p) ** 2)) < 5 * 0.5 / math.sqrt(count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_is_as_accurate_as_plain_pytorch(dtype: torch.dtype) -> None:
    exact = operands(2, 2, 16, 8, 3, 3)
    q, c, p = (t.to(dtype) for t in exact)
    keys = (c + p[:, None]).flatten(1, 2)[:, None]
    plain = (q @ keys.mT).softmax(-1) @ keys
    assert_as_accurate(window_attention(q, c, p), plain, window_attention(*exact), exact[1].abs().max())


def test_autocast_rounds_the_operands_and_nothing_inside() -> None:
    q, c, p = (t.float().requires_grad_() for t in operands(2, 2, 16, 8, 3, 2))
    with torch.autocast("cpu", torch.bfloat16):
        found = window_attention(q, c, p, slots=[0, 2])
    assert found.equal(window_attention(q.bfloat16(), c.bfloat16(), p.bfloat16(), slots=[0, 2]))
    found.sum().backward()
    assert q.grad.dtype == c.grad.dtype == p.grad.dtype == torch.float32


@pytest.mark.parametrize(
    "change",
    [
        {"q": torch.zeros(2, 1, 4)},
        {"c": torch.zeros(2, 3, 5, 8)},
        {"c": torch.zeros(2, 2, 4, 8)},
        {"p": torch.zeros(3, 7)},
        {"mask": torch.ones(2, 5, dtype=torch.bool)},
        {"mask": torch.ones(2, 4)},
    ],
)
def test_shapes_that_do_not_fit_are_refused(change: dict[str, Tensor]) -> None:
    fitting = {"q": torch.zeros(2, 1, 4, 8), "c": torch.zeros(2, 3, 4, 8), "p": torch.zeros(3, 8)}
    with pytest.raises(FastpeftError, match=r"window_attention takes q \(B, H, T, D\).*got q"):
        window_attention(**(fitting | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": [0, 2, 1]}, r"slots \[0, 2, 1\] of 3"),
        ({"slots": [0, 1, 3]}, "different slots"),
        ({"slots": [0, 1, 1]}, "different slots"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"dropout": math.nan}, "dropout is nan"),
        ({"seed": -1}, "seed -1"),
        ({"block": 2**28}, "block"),
    ],
)
def test_arguments_out_of_range_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(FastpeftError, match=message):
        window_attention(torch.zeros(2, 1, 4, 8), torch.zeros(2, 3, 4, 8), torch.zeros(3, 8), **change)


def test_wider_windows_than_the_noise_can_tell_apart_are_refused() -> None:
    with pytest.raises(FastpeftError, match="at most 15"):
        window_attention(torch.zeros(1, 1, 2, 4), torch.zeros(1, 17, 2, 4), torch.zeros(17, 4))
