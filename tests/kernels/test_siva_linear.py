"""SiVA's Triton kernels against the reference in float64, with NaN wherever they must not read or leave a value."""

from __future__ import annotations

import itertools

import pytest
import torch
from poison import in_nan, poisoned_memory
from siva_operands import (
    as_group,
    as_group_backward,
    assert_gradients,
    assert_outputs,
    expected_of,
    flat,
    in_order,
    operands,
)
from torch import Tensor

from fastpeft.ops import aten, dispatch, reference

pytest.importorskip("triton")
from fastpeft.kernels import siva_linear as kernel
from fastpeft.kernels import siva_linear_backward as kernel_backward
from fastpeft.kernels import tiles
from fastpeft.kernels.launch import dot_kind, is_for_kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 15, 17, 63, 65, 127]


def check_forward(*args: Tensor | None) -> None:
    """Launch on `args` and compare h and p with the reference in float64."""
    with poisoned_memory():
        actual = kernel.siva_linear(*as_group(*args))
    assert_outputs(actual, expected_of(reference.siva_linear, as_group(*args)))


def check_backward(dh: Tensor, *args: Tensor | None, needs: tuple[bool, ...] = (True,) * 4) -> None:
    """Launch on dh and the forward's `args` and compare the gradients, twice the same bits, with float64."""
    x, weight, u, s, v, _ = args
    p = in_nan(reference.siva_linear(*as_group(*in_order(args)))[1])
    expected = expected_of(reference.siva_linear_backward, as_group_backward(dh, x, weight, u, s, v, p, *needs))
    unread = dh.new_empty(0)  # what the autograd formula passes for an operand that no gradient needs
    x, p = x if needs[2] else unread, p if needs[1] else unread
    args = as_group_backward(dh, x, weight, u, s, v, p, *needs)
    with poisoned_memory():
        actual, again = kernel_backward.siva_linear_backward(*args), kernel_backward.siva_linear_backward(*args)
    assert_gradients(actual, again, needs, expected)


def check(*args: Tensor | None, step: int = 1) -> None:
    """Both directions, with a gradient of h that lies in NaN, its rows at multiples of `step`."""
    check_forward(*args)
    x, weight, *_ = args
    generator = torch.Generator().manual_seed(0)
    dh = torch.randn(*x.shape[:-1], weight.shape[0], generator=generator).to(x)
    check_backward(in_nan(dh, step), *args)


@pytest.mark.long(
    only=(
        "37-97-101-64-torch.float32",
        "257-33-131-5-torch.float32",
        "257-33-131-5-torch.float16",
        "257-33-131-5-torch.bfloat16",
        "37-97-101-64-torch.bfloat16",
        "65-127-17-16-torch.float32",
    )
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("m", "k", "n", "r"),
    [(1, 1, 1, 1), (17, 65, 63, 4), (65, 127, 17, 16), (33, 31, 129, 17), (37, 97, 101, 64), (257, 33, 131, 5)],
)
def test_ragged_sizes(m, k, n, r, dtype, device):
    args = operands(m, k, n, r, dtype, device)
    check(*(in_nan(a) for a in args))


@pytest.mark.long(
    but=(
        "1-1-1-bias-torch.float16",
        "1-17-17-bias-torch.bfloat16",
        "17-17-15-no-bias-torch.float32",
        "17-63-17-no-bias-torch.float16",
        "17-65-1-bias-torch.float32",
        "63-1-17-bias-torch.bfloat16",
        "65-15-15-no-bias-torch.float32",
        "65-65-65-bias-torch.float16",
        "127-1-15-no-bias-torch.float16",
    )
)
@pytest.mark.interp_full
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("m", SIZES)
@pytest.mark.parametrize("k", SIZES)
@pytest.mark.parametrize("n", SIZES)
def test_every_ragged_size(m, k, n, bias, dtype, device):
    r = 1 + (m + 3 * k + 5 * n) % 64
    args = operands(m, k, n, r, dtype, device, bias)
    check(*(None if a is None else in_nan(a) for a in args))


@pytest.mark.interp_full
@pytest.mark.parametrize("r", range(1, 65))
def test_every_rank(r, device):
    check(*map(in_nan, operands(19, 67, 71, r, torch.float32, device)))


def test_every_tile(tile, device, launched):
    launched(tile)
    rank = min(tile.max_rank, 33)
    args = operands(tile.block_m + 1, tile.block_k + 1, tile.block_n + 1, rank, torch.bfloat16, device)
    check(*map(in_nan, args))


@pytest.mark.parametrize("dies", [6, 8])
def test_programs_are_dealt_to_dies_in_ranges_of_tiles(dies, device, monkeypatch):
    monkeypatch.setattr(tiles, "gpu", lambda _: tiles.Gpu("gfx942", 38 * dies))
    check(*operands(300, 20, 200, 3, torch.float32, device))


def test_more_row_blocks_than_a_group(device, launched):
    tile = tiles.SIVA_LINEAR[tiles.ANY][0]
    launched(tile)
    check(*operands((tiles.GROUP_M + 1) * tile.block_m + 1, 8, 2 * tile.block_n + 1, 2, torch.float32, device))


@pytest.mark.parametrize("needs", list(itertools.product((True, False), repeat=4)), ids=str)
def test_only_what_is_needed(needs, device):
    args = operands(23, 35, 29, 3, torch.float32, device)
    check_backward(args[0].new_ones(23, 29), *args, needs=needs)


@pytest.mark.long(but="torch.float16")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_ranges_of_rows(dtype, device):
    rows = tiles.siva_linear_bwd_rows(1, 16)
    m = 2 * rows + 5
    assert tiles.siva_linear_bwd_rows(m, 16) == rows
    args = operands(m, 70, 5, 4, dtype, device)
    check_backward(in_nan(torch.randn(m, 5).to(args[0])), *map(in_nan, args))


@pytest.mark.parametrize(("m", "k", "n", "r"), [(0, 5, 7, 2), (3, 0, 7, 2), (3, 5, 0, 2), (3, 5, 7, 0), (0, 0, 0, 0)])
def test_empty_sizes(m, k, n, r, device):
    x, weight, u, s, v, bias = args = operands(m, k, n, r, torch.float32, device)
    check_forward(*args)
    p, dh = x.new_ones(r, m), x.new_ones(m, n)
    with poisoned_memory():
        gradients = flat(kernel_backward.siva_linear_backward(*as_group_backward(dh, *args[:5], p, *[True] * 4)))
    expected = dh @ weight, torch.zeros_like(u), torch.zeros_like(v), torch.full_like(bias, m)
    if r > 0:
        expected = expected[0] + (dh @ u * s) @ v, dh.t() @ p.t() * s, (dh @ u * s).t() @ x, expected[3]
    for ours, theirs in zip(gradients, expected):
        torch.testing.assert_close(ours, theirs)


def test_factors_in_float32_are_read_as_they_are(device, launched):
    """The same bits as with factors in float16, but for what is then not rounded to it.

    Not in bfloat16, to which Triton's interpreter truncates.
    """
    dtype = torch.float16
    launched(tiles.SIVA_LINEAR[tiles.ANY][1])
    halves = operands(70, 35, 66, 5, dtype, device)
    wide = [a.float() if i in (2, 3, 4) else a for i, a in enumerate(halves)]
    dh = torch.randn(70, 66).to(halves[0])
    found = []
    for args in (halves, wide):
        with poisoned_memory():
            (h,), p = kernel.siva_linear(*as_group(*args))
            gradients = kernel_backward.siva_linear_backward(*as_group_backward(dh, *args[:5], p, *[True] * 4))
            found.append(flat([h, p, *gradients]))
    for i, (plain, ours) in enumerate(zip(*found, strict=True)):
        assert ours.dtype is (torch.float32 if i in (1, 3, 4) else dtype)
        assert torch.equal(ours.to(dtype), plain)


def test_no_bias(device):
    check(*operands(21, 34, 55, 8, torch.bfloat16, device, bias=False))


def test_leading_dimensions(device):
    x, *rest = operands(24, 33, 18, 4, torch.float32, device)
    check(x.view(2, 3, 4, 33), *rest)
    check(x[0], *rest)  # a single row, without a leading dimension


def test_strides_are_honoured(device):
    x, weight, u, s, v, bias = operands(24, 33, 18, 4, torch.float32, device)
    check(
        x.view(4, 6, 33).transpose(0, 1),
        weight.t().contiguous().t(),  # what Conv1D stores
        u.t().contiguous().t(),
        s.repeat_interleave(2)[::2],
        v.t().contiguous().t(),
        bias.repeat_interleave(3)[::3],
    )
    check(x.t().contiguous().t(), weight, u, s, v, bias)
    check(x[:1].expand(9, 33), weight, u, s, v, bias)
    args = x, weight, u, s, v, bias
    check_backward(x.new_ones(1, 1).expand(24, 18), *args)  # what `h.sum().backward()` passes
    check_backward(torch.randn(18, 24).to(x).t(), *args)


@pytest.mark.parametrize("far", ["x", "dh"])
def test_offsets_pass_32_bits(far, device):
    """The last of 5 rows starts at element 2^31 of a storage of which only these rows are touched."""
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 5 GB of GPU memory")

    def apart(values: Tensor) -> Tensor:
        room = torch.empty(2**31 + values.shape[1], dtype=values.dtype, device=device)
        return room.as_strided(values.shape, (2**29, 1)).copy_(values)

    x, *rest = operands(5, 8, 16, 2, torch.float16, device)
    dh = torch.ones(5, 16, dtype=torch.float16, device=device)
    if far == "x":
        x = apart(x)
        check_forward(x, *rest)
    check_backward(apart(dh) if far == "dh" else dh, x, *rest)


def test_what_the_kernels_leave_to_aten(device):
    for args in (
        operands(5, 6, 7, 2, torch.float64, device),
        operands(5, 6, 7, tiles.MAX_RANK + 1, torch.float32, device),
    ):
        forward, expected = (module.siva_linear(*as_group(*args)) for module in (kernel, aten))
        args = as_group_backward(args[0].new_ones(5, 7), *args[:5], expected[1], *[True] * 4)
        for ours, theirs in zip(
            flat(forward + kernel_backward.siva_linear_backward(*args)),
            flat(expected + aten.siva_linear_backward(*args)),
            strict=True,
        ):
            assert torch.equal(ours, theirs)


def test_products_follow_pytorch_and_the_gpu():
    setting = torch.backends.cuda.matmul.fp32_precision
    try:
        for choice, expected in (("ieee", "ieee"), ("tf32", "tf32")):
            torch.backends.cuda.matmul.fp32_precision = choice
            assert dot_kind(torch.float32, matrix_units=True) == expected
            assert dot_kind(torch.float32, matrix_units=False) == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = setting
    for dtype in (torch.float16, torch.bfloat16):
        assert dot_kind(dtype, matrix_units=True) == "half"
        assert dot_kind(dtype, matrix_units=False) is None
    assert dot_kind(torch.float64, matrix_units=True) is None


def test_float32_on_a_gpu_is_for_aten(device):
    x = torch.ones(16, 3, device=device)
    assert is_for_kernels(x, 1) is (device == "cpu")


@pytest.mark.parametrize(("rank", "expected"), [(0, 16), (1, 16), (16, 16), (17, 32), (32, 32), (33, 64), (64, 64)])
def test_rank_block(rank, expected):
    assert tiles.rank_block(rank) == expected


@pytest.mark.parametrize("arch", [*tiles.SIVA_LINEAR, "sm_89"])
def test_every_rank_has_tiles(arch):
    """An architecture without a line takes those of any."""
    for layers in (1, 3):
        found = [tiles.siva_linear(arch, rank, layers) for rank in (16, 32, tiles.MAX_RANK)]
        assert all(found)
        assert len(found[0]) > 1
        assert found[0][0] == found[-1][0]  # what runs where nothing may be timed


@pytest.fixture
def tuning(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All tiles for the forward, timed as if each were faster than those before; which were."""
    tuner, timed = kernel._siva_linear_fwd_kernel, []

    def bench(call, quantiles):
        call()
        timed.append(tuner.nargs["rows"])
        return [1 / len(timed)] * 3

    every = [tile.config() for tile in tiles.SIVA_LINEAR[tiles.ANY]]
    monkeypatch.setattr(tuner, "configs", every)
    monkeypatch.setattr(tuner, "cache", {})
    monkeypatch.setattr(tuner, "_do_bench", bench)
    monkeypatch.setattr(tuner, "do_bench", bench)
    monkeypatch.setattr(tiles, "architecture", lambda _: tiles.ANY)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return timed


def launch(m: int, r: int = 3) -> str:
    """The tile of a forward that gives what the reference does."""
    args = as_group(*operands(m, 40, 48, r, torch.float16, "cpu"))
    assert_outputs(kernel.siva_linear(*args), expected_of(reference.siva_linear, args))
    return str(kernel._siva_linear_fwd_kernel.best_config)


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands for a GPU")
def test_tiles_are_timed_once_for_a_class_of_rows_and_kept_with_a_run(tuning):
    first, *_, last = (str(tile.config()) for tile in tiles.SIVA_LINEAR[tiles.ANY])
    assert [launch(rows) for rows in (17, 32, 20, 33)] == [last] * 4
    assert tuning == [32] * 3 + [64] * 3
    kept = {name: found for name, found in dispatch.chosen()["tiles"].items() if "_fwd_" in name}
    assert [*kept.values()] == [last] * 2
    dispatch.take_over({"tiles": dict.fromkeys(kept, first)})
    assert launch(20) == first
    assert len(tuning) == 6
    dispatch.take_over({})


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands for a GPU")
def test_where_a_run_is_deterministic_the_first_tile_runs(tuning):
    torch.use_deterministic_algorithms(True)
    try:
        assert launch(20) == str(tiles.SIVA_LINEAR[tiles.ANY][0].config())
    finally:
        torch.use_deterministic_algorithms(False)
    assert tuning == []
    launch(20, r=17)
    assert len(tuning) == 2  # of these ranks one tile has no room


@pytest.mark.parametrize("block_r", [16, 64])
def test_ranges_of_rows_are_whole_steps_and_not_too_many(block_r):
    for m in (0, 1, 255, 257, 8191, 8193, 10**6, 2**31):
        rows = tiles.siva_linear_bwd_rows(m, block_r)
        assert rows % tiles.SIVA_LINEAR_SUMS.block_m == 0
        assert m <= 32 * rows
