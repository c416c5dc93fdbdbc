"""The kernels of layers that read the same x, against ATen in float64, with NaN wherever nothing belongs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from poison import in_nan, poisoned_memory
from siva_operands import assert_gradients, assert_outputs, each, expected_of, flat, in_order, operands
from torch import Tensor

from fastpeft.ops import aten

pytest.importorskip("triton")
from fastpeft.kernels import siva_linear as kernel
from fastpeft.kernels import siva_linear_backward as kernel_backward
from fastpeft.kernels import tiles

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def layers(m: int, k: int, ns: tuple[int, ...], ranks: tuple[int, ...], dtype: torch.dtype, device: str) -> list[Any]:
    """x, weights, scales, us, ss, vs, biases; every second layer has no bias."""
    found = [operands(m, k, n, r, dtype, device, bias=i % 2 == 0) for i, (n, r) in enumerate(zip(ns, ranks))]
    x, *_ = found[0]
    weights, *rest = map(list, zip(*(layer[1:] for layer in found)))
    return [x, weights, [None] * len(ns), *rest]


def check(*args: Any, needs: list[Any] | None = None) -> None:
    """Launch both directions on the forward's `args`, backward twice, and compare with float64."""
    check_forward(*args)
    check_backward(*args, needs=needs)


def check_forward(*args: Any) -> None:
    """Launch on `args` and compare with float64."""
    with poisoned_memory():
        actual = kernel.siva_linear(*args)
    assert_outputs(actual, expected_of(aten.siva_linear, args))


def check_backward(*args: Any, needs: list[Any] | None = None) -> None:
    """Launch twice on the forward's `args` and compare with float64."""
    x, weights, scales, us, ss, vs, biases = args
    p = in_nan(aten.siva_linear(*in_order(args))[-1])
    generator = torch.Generator().manual_seed(0)
    dhs = [in_nan(torch.randn(*x.shape[:-1], len(w), generator=generator).to(x)) for w in weights]
    needs = needs or [True, [True] * len(us), True, [bias is not None for bias in biases]]
    expected = expected_of(aten.siva_linear_backward, (dhs, x, weights, scales, us, ss, vs, p, *needs))
    unread = x.new_empty(0)  # what the autograd formula passes for an operand that no gradient needs
    args = (dhs, x if needs[2] else unread, weights, scales, us, ss, vs, p if any(needs[1]) else unread, *needs)
    with poisoned_memory():
        actual, again = (kernel_backward.siva_linear_backward(*args) for _ in range(2))
    assert_gradients(actual, again, needs, expected)


@pytest.mark.long(but="35-31-ns2-ranks2-torch.float16")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("m", "k", "ns", "ranks"),
    [(1, 1, (1, 1), (1, 1)), (17, 65, (63, 1, 130), (4, 1, 33)), (35, 31, (33, 17), (16, 64))],
)
def test_ragged_sizes(m, k, ns, ranks, dtype, device):
    check(*each(in_nan, layers(m, k, ns, ranks, dtype, device)))


@pytest.mark.long(but="(129, 15)-64-15-torch.bfloat16")
@pytest.mark.interp_full
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 15, 63, 65, 127])
@pytest.mark.parametrize("k", [17, 64, 131])
@pytest.mark.parametrize("ns", [(1, 127, 65), (129, 15), (16, 16, 16, 48)], ids=str)
def test_every_ragged_size(m, k, ns, dtype, device):
    ranks = tuple(1 + (m + 3 * k + 7 * i) % 64 for i in range(len(ns)))
    check(*each(in_nan, layers(m, k, ns, ranks, dtype, device)))


@pytest.mark.long(but="35")
@pytest.mark.interp_full
@pytest.mark.parametrize("r", range(1, 65))
def test_every_rank(r, device):
    check(*layers(19, 35, (37, 41), (r, 65 - r), torch.float32, device))


@pytest.mark.interp_full
def test_every_tile(tile, device, launched):
    launched(tile)
    rank = min(tile.shared_rank or 16, 33)
    ns = tile.block_n + 1, 2 * tile.block_n, 5
    args = layers(tile.block_m + 1, tile.block_k + 1, ns, (rank, 3, rank), torch.bfloat16, device)
    check(*each(in_nan, args))


def test_more_row_blocks_than_a_group(device, launched):
    tile = tiles.SIVA_LINEAR[tiles.ANY][0]
    launched(tile)
    args = layers(
        (tiles.GROUP_M + 1) * tile.block_m + 1, tile.block_n + 1, (tile.block_n + 1, 3), (2, 5), torch.float32, device
    )
    check(*args)


@pytest.mark.parametrize(
    "needs",
    [
        [True, [True, False], False, [False, False]],
        [True, [False, True], True, [False, True]],
        [False, [True, True], True, [True, True]],
        [False, [False, True], False, [False, False]],
        [True, [False, False], False, [False, False]],
        [False, [False, False], True, [True, False]],
    ],
    ids=str,
)
def test_only_what_is_needed(needs, device):
    check(*layers(23, 35, (29, 18), (3, 6), torch.float32, device), needs=needs)


def test_many_ranges_of_rows(device):
    m = 2 * tiles.siva_linear_bwd_rows(1, 16) + 5
    check(*layers(m, 20, (5, 7), (4, 2), torch.bfloat16, device))


@pytest.mark.parametrize(
    ("m", "k", "ns", "ranks"),
    [
        (0, 5, (7, 3), (2, 1)),
        (3, 0, (7, 3), (2, 1)),
        (3, 5, (0, 3), (2, 1)),
        (3, 5, (7, 3), (0, 0)),
        (3, 5, (7,), (2,)),
    ],
)
def test_empty_sizes_and_a_single_layer(m, k, ns, ranks, device):
    x, weights, scales, us, ss, vs, _ = args = layers(m, k, ns, ranks, torch.float32, device)
    dhs = [torch.ones(m, n).to(x) for n in ns]
    p = x.new_ones(sum(ranks), m)
    backward = dhs, x, weights, scales, us, ss, vs, p, True, [True] * len(ns), True, [False] * len(ns)
    with poisoned_memory():
        found = kernel.siva_linear(*args), kernel_backward.siva_linear_backward(*backward)
    expected = aten.siva_linear(*args), aten.siva_linear_backward(*backward)
    for ours, theirs in zip(flat(map(flat, found)), flat(map(flat, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_leading_dimensions_and_strides(device):
    x, weights, scales, us, ss, vs, biases = layers(24, 33, (18, 20), (4, 3), torch.float32, device)
    turned = [weight.t().contiguous().t() for weight in weights]  # what Conv1D stores
    us = [u.t().contiguous().t() for u in us]
    ss = [s.repeat_interleave(2)[::2] for s in ss]
    check(x.view(4, 6, 33).transpose(0, 1), turned, scales, us, ss, vs, biases)
    check(x[0], [weights[0], turned[1]], scales, us, ss, vs, biases)
    dhs = [x.new_ones(1, 1).expand(24, 18), torch.randn(20, 24).to(x).t()]
    args = dhs, x, weights, scales, us, ss, vs, aten.siva_linear(x, weights, scales, us, ss, vs, biases)[1]
    found, expected = (
        flat(each.siva_linear_backward(*args, True, [True] * 2, True, [True] * 2)) for each in (kernel_backward, aten)
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_what_the_kernels_leave_to_aten(device):
    for ranks, dtype in (((2, 3), torch.float64), ((2, tiles.MAX_RANK + 1), torch.float32)):
        x, weights, scales, us, ss, vs, _ = args = layers(5, 6, (7, 8), ranks, dtype, device)
        found, expected = kernel.siva_linear(*args), aten.siva_linear(*args)
        args = ([x.new_ones(5, 7), x.new_ones(5, 8)], x, weights, scales, us, ss, vs, expected[1])
        args += (True, [True] * 2, True, [True] * 2)
        found += kernel_backward.siva_linear_backward(*args)
        expected += aten.siva_linear_backward(*args)
        for ours, theirs in zip(flat(found), flat(expected), strict=True):
            assert torch.equal(ours, theirs)


def test_factors_in_float32_are_read_as_they_are(device):
    """The same bits as with factors in float16, but for what is then not rounded to it."""
    x, weights, scales, us, ss, vs, biases = layers(70, 35, (66, 17), (5, 3), torch.float16, device)
    dhs = [torch.randn(70, n).to(x) for n in (66, 17)]
    found = []
    for factors in ((us, ss, vs), each(Tensor.float, (us, ss, vs))):
        with poisoned_memory():
            hs, p = kernel.siva_linear(x, weights, scales, *factors, biases)
            needs = True, [True, True], True, [True, True]
            gradients = kernel_backward.siva_linear_backward(dhs, x, weights, scales, *factors, p, *needs)
            found.append(flat([hs, p, *gradients]))
    for plain, ours in zip(*found, strict=True):
        assert torch.equal(ours.half(), plain)
    assert [t.dtype for t in found[1]].count(torch.float32) == 4  # p, two dU and dV


def test_gradients_of_u_share_no_storage_with_those_of_v(device):
    """The schema says that outputs of the op do not alias each other."""
    x, weights, scales, us, ss, vs, _ = layers(6, 5, (7, 8), (2, 1), torch.float32, device)
    dhs: list[Tensor] = [x.new_ones(6, len(weight)) for weight in weights]
    p = x.new_ones(3, 6)
    _, dus, dv, _ = kernel_backward.siva_linear_backward(
        dhs, x, weights, scales, us, ss, vs, p, False, [True] * 2, True, [False] * 2
    )
    assert {du.untyped_storage().data_ptr() for du in dus}.isdisjoint({dv.untyped_storage().data_ptr()})
