"""The op `fastpeft::window_attention`: against loops over every key of the window, its gradients, its dropout, its
registration and the checks of the function over it."""

from __future__ import annotations

import itertools
import math
import os
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instructions import supported
from poison import in_nan, poisoned_memory
from tolerances import GRADIENT, assert_as_accurate
from torch import Tensor

from fastpeft import FastpeftError
from fastpeft.functional import window_attention
from fastpeft.ops import aten, noise, reference
from fastpeft.ops import window_attention as op
from fastpeft.training.memory import MemoryTracker

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
    out, lse = reference.window_attention(q, c, p, mask, slots, causal, 0.0, None, 0)
    expected, expected_lse = long_form(q, c, p, mask, slots, causal)
    torch.testing.assert_close(out, expected, **EXACT)
    torch.testing.assert_close(lse, expected_lse)
    torch.testing.assert_close(window_attention(q, c, p, mask, slots=slots, causal=causal), expected, **EXACT)


def test_no_mask_is_a_mask_of_ones() -> None:
    q, c, p = operands(2, 1, 4, 3, 3, 3)
    assert window_attention(q, c, p).equal(window_attention(q, c, p, torch.ones(2, 4, dtype=torch.bool)))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_vmap_is_a_loop(causal: bool, masked: bool) -> None:
    """Over networks with weights of their own, which differ in p too, and over others that share theirs."""
    q, c, p = (torch.stack(parts) for parts in zip(*(operands(3, 2, 4, 3, 5, 3, seed) for seed in range(4))))
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0]]).bool().expand(4, 3, 4) if masked else None

    def function(q: Tensor, c: Tensor, p: Tensor, mask: Tensor | None) -> Tensor:
        return window_attention(q, c, p, mask, slots=[1, 2, 4], causal=causal)

    in_dims = (0, 0, 0, 0 if masked else None)
    loop = [function(q[i], c[i], p[i], None if mask is None else mask[i]) for i in range(4)]
    torch.testing.assert_close(torch.vmap(function, in_dims)(q, c, p, mask), torch.stack(loop), **EXACT)
    shared = [function(q[i], c[i], p[0], None if mask is None else mask[i]) for i in range(4)]
    in_dims = (2, 0, None, in_dims[3])
    out = torch.vmap(function, in_dims)(q.movedim(0, 2), c, p[0], mask)
    torch.testing.assert_close(out, torch.stack(shared), **EXACT)
    with pytest.raises(NotImplementedError, match="no dropout"):
        torch.vmap(lambda q: window_attention(q, c[0], p[0], slots=[1, 2, 4], dropout=0.1))(q)


@pytest.mark.long(but="0.4-True")
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


MASKS = {
    "none": None,
    "all": torch.ones(3, 4).bool(),
    "padding": torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0]]).bool(),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("slots", "dropout"), [([1, 2, 4], 0.0), ([1, 2, 4], 0.3), ([0, 1, 2, 3, 4], 0.3)])
def test_fused_calls_equal_the_reference(mask: str, causal: bool, slots: list[int], dropout: float) -> None:
    q, c, p = operands(3, 2, 4, 6, 5, len(slots))
    c = c.transpose(0, 1).contiguous().transpose(0, 1)  # as slots that are stacked come
    fixed = (MASKS[mask], slots, causal, dropout, torch.tensor(7), 2)
    found, expected = (module.window_attention(q, c, p, *fixed) for module in (aten, reference))
    torch.testing.assert_close(found, expected, **EXACT)
    dout = torch.randn(q.shape, dtype=q.dtype, generator=torch.Generator().manual_seed(3)).transpose(1, 2)
    dout = dout.contiguous().transpose(1, 2)
    for needs in itertools.product((True, False), repeat=3):
        arguments = (dout, q, c, p, fixed[0], *expected, *fixed[1:], *needs)
        found, correct = (module.window_attention_backward(*arguments) for module in (aten, reference))
        torch.testing.assert_close(found, correct, **EXACT)


def forward_and_backward(module: ModuleType | Any, q: Tensor, c: Tensor, p: Tensor, *fixed: Any) -> list[Tensor]:
    """out, lse, dq, dc and dp."""
    out, lse = module.window_attention(q, c, p, *fixed)
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(3)).bfloat16().to(q.dtype)  # in any dtype
    return [
        out,
        lse,
        *module.window_attention_backward(dout, q, c, p, fixed[0], out, lse, *fixed[1:], True, True, True),
    ]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("tokens", "slots"), [(100, [0, 1, 2, 3, 4, 5]), (530, [1])])
def test_fused_calls_equal_the_reference_beyond_a_tile(tokens: int, slots: list[int], causal: bool) -> None:
    """PyTorch's are of up to 512 keys, all of which padding may hide."""
    operators = operands(2, 2, tokens, 4, 7, len(slots))
    mask = torch.arange(tokens) >= torch.tensor([[tokens - 7], [0]])
    fixed = mask, slots, causal, 0.2, torch.tensor(7), 2
    found, expected = (forward_and_backward(module, *operators, *fixed) for module in (aten, reference))
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.usefixtures("one_thread_after")
@pytest.mark.parametrize("slots", [[1, 2, 4], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_fused_calls_have_the_same_bits_on_any_number_of_threads(
    slots: list[int], dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of which as many sentences or more are done at a time. And no number is one that was in memory before."""
    operators = [t.float() for t in operands(5, 2, 20, 6, 5, len(slots))]
    mask = torch.arange(20) < torch.tensor([20, 3, 0, 20, 7])[:, None]
    found = []
    for threads, at_once in ((1, op._AT_ONCE), (1, 1), (2, 1), (3, 1), (1, 2 * 6 * 103)):
        torch.set_num_threads(threads)
        monkeypatch.setattr(op, "_AT_ONCE", at_once)
        with poisoned_memory():
            found.append(forward_and_backward(aten, *operators, mask, slots, True, dropout, torch.tensor(7), 2))
    assert found[0][2].isfinite().all()
    assert all(one.equal(first) for others in found[1:] for one, first in zip(others, found[0], strict=True))


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("masked", [False, True])
def test_fused_calls_have_no_scores_in_memory(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """But the window, beside what they return, and backward for a sentence a thread its gradients."""
    monkeypatch.setattr(op, "_AT_ONCE", 1)
    batch, heads, tokens, width, window = 8, 4, 32, 8, 9
    q, c, p = (t.float() for t in operands(batch, heads, tokens, width, window, window))
    mask = torch.arange(tokens) < torch.tensor([[tokens - 2]] * batch) if masked else None
    fixed = mask, list(range(window)), False, 0.2, torch.tensor(7), 2
    rows, keys = 4 * batch * heads * tokens, 4 * batch * window * tokens * width  # bytes of a number each, of all keys
    at_once = torch.get_num_threads() * 2 * keys // batch  # gradients as keys and as values
    few = keys // batch
    forward, backward = (keys + rows * (width + 1) + more for more in (2 * few, 2 * (at_once + few)))
    assert max(forward, backward) < rows * window * tokens / 2  # which scores would take
    with MemoryTracker() as tracker:
        tracker.add((q, c, p))
        before = tracker.current
        out, lse = aten.window_attention(q, c, p, *fixed)
        assert keys < tracker.peak - before <= forward
        before = tracker.current
        tracker.reset_peak()
        aten.window_attention_backward(torch.ones_like(q), q, c, p, mask, out, lse, *fixed[1:], True, True, True)
        assert keys < tracker.peak - before <= backward + rows * width  # and what is given, ones


@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (0, 2), (0, 1, 2)])
def test_only_requested_gradients_are_made(trained: tuple[int, ...]) -> None:
    tensors = operands(2, 1, 4, 3, 5, 3)
    for index in trained:
        tensors[index].requires_grad_()
    window_attention(*tensors, slots=[1, 2, 3]).sum().backward()
    assert [i for i, t in enumerate(tensors) if t.grad is not None] == list(trained)


def test_saves_operands_seed_output_and_one_number_for_each_query() -> None:
    q, c, p = (t.requires_grad_() for t in operands(2, 2, 16, 8, 9, 7))
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        window_attention(q, c, p, torch.ones(2, 16).bool(), slots=range(2, 9), dropout=0.2)
    assert sorted(shapes) == sorted([(2, 2, 16, 8), (2, 7, 16, 8), (9, 8), (2, 16), (2, 2, 16, 8), (2, 2, 16), ()])


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad: bool) -> None:
    q, c, p = (t.float().requires_grad_(requires_grad) for t in operands(3, 2, 4, 6, 5, 3))
    for mask, causal, dropout in ((None, False, 0.0), (MASKS["padding"], True, 0.3)):
        arguments = (q, c, p, mask, [1, 2, 4], causal, dropout, torch.tensor(7), 2)
        torch.library.opcheck(torch.ops.fastpeft.window_attention.default, arguments)


def test_opcheck_backward_and_dropout() -> None:
    q, c, p = (t.float() for t in operands(3, 2, 4, 6, 5, 3))
    fixed = ([1, 2, 4], False, 0.3, torch.tensor(7), 2)
    out, lse = reference.window_attention(q, c, p, MASKS["padding"], *fixed)
    for needs in [(True, True, True), (False, True, False), (True, False, True)]:
        arguments = (torch.ones_like(q), q, c, p, MASKS["padding"], out, lse, *fixed, *needs)
        torch.library.opcheck(torch.ops.fastpeft.window_attention_backward.default, arguments)
    torch.library.opcheck(torch.ops.fastpeft.feature_dropout_.default, (c, [1, 2, 4], 0.3, 7, 2))


def test_compiles_into_one_graph() -> None:
    tensors = [t.float().requires_grad_() for t in operands(2, 1, 4, 8, 5, 3)]

    def loss(q: Tensor, c: Tensor, p: Tensor) -> Tensor:
        return window_attention(q, c, p, slots=[1, 2, 3], dropout=0.2, seed=5).square().mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, expected = (torch.autograd.grad(function(*tensors), tensors) for function in (compiled, loss))
    torch.testing.assert_close(found, expected)


def test_a_new_seed_does_not_compile_again() -> None:
    tensors = [t.float() for t in operands(2, 1, 4, 8, 5, 3)]
    graphs = []

    def count(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    def drop(seed: int) -> Tensor:
        return window_attention(*tensors, slots=[1, 2, 3], dropout=0.2, seed=seed)

    compiled = torch.compile(drop, fullgraph=True, backend=count)
    for seed in (5, 2**62 + 1, 7, 2**40):
        torch.testing.assert_close(compiled(seed), drop(seed))
    assert len(graphs) <= 2  # one that knows its seed, one for all others


@pytest.mark.parametrize("instructions", supported())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (5, 7), (33, 16), (3, 700), (1, 256), (0, 8)])
def test_compiled_dropout_has_the_bits_of_the_reference(
    instructions: str, dtype: torch.dtype, tokens: int, width: int
) -> None:
    wide = torch.randn(3, 3 * tokens + 1, width, generator=torch.Generator().manual_seed(2)).to(dtype)
    for dropout, seed, block in ((0.2, 2**62 + 5, 3), (0.5, 1, 2**27), (1 - 2**-53, 9, 0), (2**-40, 9, 0)):
        found, expected = (x[:, : 3 * tokens].unflatten(1, (3, tokens)) for x in (wide.clone(), wide.clone()))
        with mock.patch.dict(os.environ, FASTPEFT_SIMD=instructions):
            torch.ops.fastpeft.feature_dropout_(found, [0, 4, 14], dropout, seed, block)
        reference.feature_dropout_(expected, [0, 4, 14], dropout, seed, block)
        assert found.equal(expected)


@pytest.mark.skipif(not supported(), reason="needs the compiled module")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"c": torch.ones(2, 3, 4, 5).bfloat16()}, "takes float32 and float64"),
        ({"c": torch.ones(2, 3, 4)}, "takes c"),
        ({"slots": [0, 1]}, "S slots"),
        ({"c": torch.ones(2, 3, 5, 4).mT}, "dense in its last two"),
        ({"c": torch.ones(1, 1, 4, 5).expand(2, 3, 4, 5)}, "reached twice"),
        ({"c": torch.ones(100).as_strided((2, 3, 4, 5), (20, 20, 5, 1))}, "reached twice"),
        ({"dropout": math.nan}, "dropout from 0 to 1"),
        ({"dropout": -0.1}, "dropout from 0 to 1"),
        ({"block": 2**28}, "block from 0"),
        ({"slots": [0, 1, 16]}, "slots from 0 to 15"),
    ],
)
def test_compiled_dropout_refuses_what_it_cannot_do(change: dict[str, object], message: str) -> None:
    arguments = {"c": torch.ones(2, 3, 4, 5), "slots": [0, 1, 2], "dropout": 0.5, "seed": 0, "block": 0}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastpeft.feature_dropout_(**(arguments | change))


@pytest.mark.skipif(not supported(), reason="needs the compiled module")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dropout": math.nan}, "dropout from 0 to 1"),
        ({"dropout": -0.1}, "dropout from 0 to 1"),
        ({"dropout": 1.1}, "dropout from 0 to 1"),
        ({"block": -1}, "block from 0"),
        ({"block": 2**28}, "block from 0"),
        ({"slots": [0, 1, 16]}, "slots from 0 to 15"),
    ],
)
def test_compiled_attention_refuses_the_same_dropout(change: dict[str, object], message: str) -> None:
    arguments = {"q": torch.ones(2, 1, 4, 5), "c": torch.ones(2, 3, 4, 5), "p": torch.ones(17, 5), "mask": None}
    arguments |= {"slots": [0, 1, 2], "causal": False, "dropout": 0.5, "seed": torch.tensor(0), "block": 0}
    with pytest.raises(RuntimeError, match=f"window_attention takes .*{message}"):
        torch.ops.fastpeft.window_attention(**(arguments | change))


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_are_as_accurate_as_plain_pytorch(dtype: torch.dtype) -> None:
    exact = [t.requires_grad_() for t in operands(2, 2, 16, 8, 3, 3)]
    low, plain = ([t.detach().to(dtype).requires_grad_() for t in exact] for _ in range(2))
    dout = torch.randn(exact[0].shape, generator=torch.Generator().manual_seed(3))
    keys = (plain[1] + plain[2][:, None]).flatten(1, 2)[:, None]
    by_formula = torch.autograd.grad((plain[0] @ keys.mT).softmax(-1) @ keys, plain, dout.to(dtype))
    ours, correct = (torch.autograd.grad(window_attention(*t), t, dout.to(t[0].dtype)) for t in (low, exact))
    for found, formula, expected in zip(ours, by_formula, correct):
        # probabilities are made again from a float32 lse, as in PyTorch's fused attention
        assert_as_accurate(found, formula, expected, expected.abs().max(), 2 * GRADIENT)


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
        ({"seed": 1.5}, r"seed 1\.5"),
        ({"block": 2**28}, "block"),
    ],
)
def test_arguments_out_of_range_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(FastpeftError, match=message):
        window_attention(torch.zeros(2, 1, 4, 8), torch.zeros(2, 3, 4, 8), torch.zeros(3, 8), **change)


def test_wider_windows_than_the_noise_can_tell_apart_are_refused() -> None:
    with pytest.raises(FastpeftError, match="at most 15"):
        window_attention(torch.zeros(1, 1, 2, 4), torch.zeros(1, 17, 2, 4), torch.zeros(17, 4))


SIZES = [
    (3, 2, 5, 6, 5, 3),
    (2, 3, 70, 40, 3, 3),  # several tiles of queries and blocks of keys, the last of them short
    (3, 1, 33, 16, 9, 5),
    (1, 1, 1, 1, 1, 1),
    (2, 1, 50, 97, 9, 9),
    (3, 1, 64, 64, 3, 3),  # no absent slot: the last sentence may see nothing
    (3, 2, 36, 128, 2, 1),
]
# what products rounded to float32 or bfloat16 leave of out, lse and the gradients, as shares
BOUNDS = {torch.float32: (1e-6, 2e-7, 2e-6), torch.bfloat16: (0.01, 0.01, 0.02)}
COMPILED = [*supported(), ""]  # the last is the processor's own, which may have products of bfloat16


@pytest.mark.parametrize("instructions", COMPILED)
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_compiled_is_as_accurate_as_its_products_in_any_size(
    sizes: tuple[int, int, int, int, int, int], masked: bool, causal: bool, dtype: torch.dtype, instructions: str
) -> None:
    """Against the reference in float64: relative errors of up to 5e-7 forward in float32 and 6e-7 of the gradients, as
    the reference's own of 3e-7 and 5e-7; in bfloat16 0.4 % and 0.6 %."""
    batch, _heads, tokens, width, window, real = sizes
    exact = operands(*sizes)
    exact = [x.to(dtype).double() for x in (exact[0] * width**-0.5, exact[1], exact[2])]
    mask = torch.arange(tokens) < torch.tensor([tokens, (tokens + 1) // 2, 0])[:batch, None] if masked else None
    fixed = mask, list(range(window - real, window)), causal, 0.3, torch.tensor(7), 2
    q, c, p = (x.to(dtype) for x in exact)
    q = in_nan(q.transpose(1, 2)).transpose(1, 2)  # heads beside each other, as a side block gives them
    with mock.patch.dict(os.environ, {"FASTPEFT_SIMD": instructions} if instructions else {}), poisoned_memory():
        found, again = (forward_and_backward(torch.ops.fastpeft, q, in_nan(c), p, *fixed) for _ in range(2))
    expected = forward_and_backward(reference, *exact, *fixed)
    assert all(one.equal(other) for one, other in zip(found, again, strict=True))
    assert [x.dtype for x in found] == [dtype, torch.float32, *[dtype] * 3]
    assert found[3].eq(0).equal(expected[3].eq(0))  # dropped or hidden
    largest = expected[2].norm() + expected[3].norm() + expected[4].norm()  # dq may cancel to nothing
    of_out, of_lse, of_gradient = BOUNDS[dtype]
    for one, correct, bound in zip(found, expected, (of_out, of_lse, *[of_gradient] * 3), strict=True):
        assert one.isinf().equal(correct.isinf())
        error = (one.double() - correct).nan_to_num(0.0).norm()  # infinities less each other
        norm = torch.where(correct.isinf(), 0.0, correct).norm()
        assert error <= bound * (norm if one is found[0] or one is found[1] else max(norm, 0.1 * largest))


@pytest.mark.parametrize("instructions", COMPILED)
@pytest.mark.parametrize("dtype", BOUNDS)
def test_compiled_lets_no_nan_vanish(dtype: torch.dtype, instructions: str) -> None:
    q, c, p = (x.to(dtype) for x in operands(1, 1, 20, 6, 3, 3))
    q[0, 0, 7] = torch.nan
    with mock.patch.dict(os.environ, {"FASTPEFT_SIMD": instructions} if instructions else {}):
        out, lse, dq, dc, dp = forward_and_backward(torch.ops.fastpeft, q, c, p, None, [0, 1, 2], False, 0.0, None, 2)
    assert out.isnan().all(-1).equal(lse.isnan())
    assert lse.isnan().sum() == lse[0, 0, 7].isnan().sum() == 1
    assert dq[0, 0, 7].isnan().all()
    assert dc.isnan().all()
    assert dp.isnan().all()


@pytest.mark.usefixtures("one_thread_after")
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_compiled_has_the_same_bits_on_any_number_of_threads(threads: int, dtype: torch.dtype) -> None:
    operators = [x.to(dtype) for x in operands(5, 2, 20, 6, 5, 5)]
    mask = torch.arange(20) < torch.tensor([20, 3, 0, 20, 7])[:, None]
    found = []
    for number in (1, threads):
        torch.set_num_threads(number)
        found.append(
            forward_and_backward(torch.ops.fastpeft, *operators, mask, list(range(5)), False, 0.3, torch.tensor(7), 2)
        )
    assert all(one.equal(other) for one, other in zip(*found, strict=True))


@pytest.mark.skipif(not supported(), reason="needs the compiled module")
@pytest.mark.parametrize("dtype", BOUNDS)
def test_compiled_makes_no_tensor_but_its_results(dtype: torch.dtype) -> None:
    """Neither keys nor scores, so that they are known to run in the compiled pass."""
    q, c, p = (x.to(dtype) for x in operands(2, 1, 20, 8, 3, 3))
    fixed = None, [0, 1, 2], False, 0.3, torch.tensor(7), 2
    with MemoryTracker() as tracker:
        tracker.add((q, c, p))
        before = tracker.current
        out, lse = torch.ops.fastpeft.window_attention(q, c, p, *fixed)
        assert tracker.peak - before == out.nbytes + lse.nbytes
        dout = torch.ones_like(q)
        before = tracker.current
        tracker.reset_peak()
        given = dout, q, c, p, None, out, lse, *fixed[1:]
        gradients = torch.ops.fastpeft.window_attention_backward(*given, True, True, True)
        assert tracker.peak - before == sum(x.nbytes for x in gradients)


@pytest.mark.parametrize("instructions", COMPILED)
@pytest.mark.parametrize("dtype", BOUNDS)
def test_opcheck_compiled(dtype: torch.dtype, instructions: str) -> None:
    q, c, p = (x.to(dtype).requires_grad_() for x in operands(3, 2, 4, 6, 5, 3))
    environment = {"FASTPEFT_SIMD": instructions} if instructions else {}
    with mock.patch.dict(os.environ, environment):
        arguments = (q, c, p, MASKS["padding"], [1, 2, 4], True, 0.3, torch.tensor(7), 2)
        torch.library.opcheck(torch.ops.fastpeft.window_attention.default, arguments)
