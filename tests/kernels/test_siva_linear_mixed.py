"""The kernels of rows with different factors, against ATen in float64, with NaN wherever nothing belongs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from poison import in_nan, poisoned_memory
from siva_operands import assert_gradients, assert_outputs, batch, each, expected_of, flat
from torch import Tensor

from fastpeft.ops import aten

pytest.importorskip("triton")
from fastpeft.kernels import siva_linear_mixed as kernel
from fastpeft.kernels import tiles

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(*args: Any, needs: list[Any] | None = None) -> None:
    """Launch both directions on the forward's `args`, backward twice, and compare with float64."""
    x, weight, us, ss, vs, sizes, order, bias = args
    with poisoned_memory():
        actual = kernel.siva_linear_mixed(*args)
    expected = expected_of(aten.siva_linear_mixed, args)
    assert_outputs(actual, expected)

    generator = torch.Generator().manual_seed(0)
    dh = in_nan(torch.randn(*x.shape[:-1], len(weight), generator=generator).to(x))
    needs = needs or [True, [True] * len(us), [True] * len(us), bias is not None]
    ps = each(in_nan, expected[0][1:])
    expected = expected_of(aten.siva_linear_mixed_backward, (dh, x, weight, us, ss, vs, ps, sizes, order, *needs))
    unread = x.new_empty(0)  # what the autograd formula passes for an operand that no gradient needs
    ps = [p if need else unread for p, need in zip(ps, needs[1])]
    args = (dh, x if any(needs[2]) else unread, weight, us, ss, vs, ps, sizes, order, *needs)
    with poisoned_memory():
        actual, again = (kernel.siva_linear_mixed_backward(*args) for _ in range(2))
    assert_gradients(actual, again, needs, expected)


@pytest.mark.long(but="in any order-torch.float16")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sort", [True, False], ids=["in any order", "in order"])
def test_ragged_sizes_empty_adapters_and_rows_without_one(sort, dtype, device):
    args = batch((9, 7, 65), 33, (3, 0, 7, 16, 1), (3, 2, 0, 3, 1), dtype, device, sort)
    check(*each(in_nan, args))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_ranks_above_a_step(dtype, device):
    check(*each(in_nan, batch((5, 9, 31), 63, (64, 5, 33), (1, 2, 2), dtype, device)))


@pytest.mark.long(but="1-1-15-torch.bfloat16")
@pytest.mark.interp_full
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 15, 17, 64])
@pytest.mark.parametrize("k", [1, 63, 65])
@pytest.mark.parametrize("n", [1, 17, 129])
def test_every_ragged_size(tokens, k, n, dtype, device):
    ranks = tuple((tokens + 3 * k + 7 * n + 5 * i) % (tiles.MAX_RANK + 1) for i in range(4))
    check(*each(in_nan, batch((8, tokens, k), n, ranks, (1, 4, 0, 3), dtype, device)))


@pytest.mark.interp_full
@pytest.mark.parametrize("r", range(1, 65))
def test_every_rank(r, device):
    check(*batch((6, 3, 35), 37, (r, 65 - r), (4, 2), torch.bfloat16, device))


@pytest.mark.interp_full
@pytest.mark.parametrize("tile", tiles.SIVA_LINEAR[tiles.ANY], ids=str)
def test_every_tile(tile, device, launched):
    launched(tile)
    ranks = min(tile.shared_rank, 33), 3
    args = batch((7, tile.block_m // 2 + 1, tile.block_k + 1), tile.block_n + 1, ranks, (4, 3), torch.bfloat16, device)
    check(*each(in_nan, args))


def test_more_row_blocks_than_a_group(device):
    rows = (tiles.GROUP_M + 2) * 32
    check(*batch((rows, 8), 70, (2, 1), (rows - 33, 33), torch.float32, device))


def test_many_ranges_of_rows_of_one_adapter(device):
    rows = 2 * tiles.siva_linear_bwd_rows(1, 16) + 5
    check(*batch((rows + 3, 20), 5, (4, 2), (3, rows), torch.bfloat16, device))


@pytest.mark.parametrize(
    "needs",
    [
        [True, [True, False, True], [False] * 3, False],
        [True, [False] * 3, [False, False, True], True],
        [False, [True, False, False], [False, True, False], False],
        [False, [False] * 3, [True] * 3, False],
        [True, [False] * 3, [False] * 3, False],
    ],
    ids=str,
)
def test_only_what_is_needed(needs, device):
    check(*batch((6, 5, 35), 29, (3, 6, 2), (2, 3, 1), torch.float32, device), needs=needs)


@pytest.mark.parametrize(
    ("shape", "n", "ranks"),
    [((0, 5), 7, (2, 1)), ((3, 0, 5), 7, (2, 1)), ((3, 0), 7, (2, 1)), ((3, 5), 0, (2, 1)), ((3, 5), 7, (0, 0))],
)
def test_empty_sizes(shape, n, ranks, device):
    x, weight, us, ss, vs, sizes, order, _ = args = batch(shape, n, ranks, (shape[0], 0), torch.float32, device)
    forward = aten.siva_linear_mixed(*args)
    dh = torch.ones_like(forward[0])
    backward = dh, x, weight, us, ss, vs, forward[1], sizes, order, True, [True] * 2, [True] * 2, False
    with poisoned_memory():
        found = kernel.siva_linear_mixed(*args), kernel.siva_linear_mixed_backward(*backward)
    expected = forward, aten.siva_linear_mixed_backward(*backward)
    for ours, theirs in zip(flat(map(flat, found)), flat(map(flat, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_strides(device):
    x, weight, us, ss, vs, sizes, order, bias = batch((6, 4, 33), 18, (4, 2), (2, 4), torch.float32, device)
    turned = weight.t().contiguous().t()  # what Conv1D stores
    us = [u.t().contiguous().t() for u in us]
    check(x.transpose(0, 1).contiguous().transpose(0, 1), turned, us, ss, vs, sizes, order, bias)
    check(x, weight, us, ss, vs, sizes, order.repeat_interleave(2)[::2], None)


def test_what_the_kernels_leave_to_aten(device):
    for rank, dtype in ((2, torch.float64), (tiles.MAX_RANK + 1, torch.float32)):
        x, weight, us, ss, vs, sizes, order, _ = args = batch((5, 6), 7, (1, rank), (3, 2), dtype, device)
        found, expected = kernel.siva_linear_mixed(*args), aten.siva_linear_mixed(*args)
        args = (x.new_ones(5, 7), x, weight, us, ss, vs, expected[1], sizes, order, True, [True] * 2, [True] * 2, True)
        found += kernel.siva_linear_mixed_backward(*args)
        expected += aten.siva_linear_mixed_backward(*args)
        for ours, theirs in zip(flat(found), flat(expected), strict=True):
            assert torch.equal(ours, theirs)


def test_outputs_of_the_op_share_no_storage_with_each_other(device):
    x, weight, us, ss, vs, sizes, order, _ = args = batch((5, 6), 7, (1, 2), (3, 2), torch.float32, device)
    h, ps = kernel.siva_linear_mixed(*args)
    _, dus, dvs, _ = kernel.siva_linear_mixed_backward(
        h, x, weight, us, ss, vs, ps, sizes, order, False, [True] * 2, [True] * 2, False
    )

    def storages(tensors: list[Tensor]) -> set[int]:
        return {tensor.untyped_storage().data_ptr() for tensor in tensors}

    assert storages([h]).isdisjoint(storages(ps))
    assert storages(dus).isdisjoint(storages(dvs))


def test_blocks_of_rows_end_with_their_adapter():
    table = kernel._block_table((5, 0, 2), (3, 1, 2), 4, pinned=False)
    # first row, end, first column of the factors, rank, where p^T of row 0 would be, rows of p^T
    assert table.tolist() == [[0, 5, 0, 3, 0, 5], [4, 5, 0, 3, 0, 5], [5, 7, 4, 2, 10, 2]]


def test_many_short_adapters_take_small_tiles():
    """Blocks of rows do not reach from one adapter into the next, so a large tile would be mostly empty."""
    many, one = (tiles.siva_linear_mixed("sm_80", 16, rows) for rows in ((16,) * 256, (4096,)))
    assert many.block_m < one.block_m
