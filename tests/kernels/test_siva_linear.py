"""SiVA's Triton kernels: their tiles, and operands in float32 or far apart. The rest: ops/test_siva_linear_kit.py."""

from __future__ import annotations

import pytest
import torch
from poison import in_nan, poisoned_memory
from siva_operands import assert_outputs, backward_of, each, expected_of, flat, gradients_of, layers
from torch import Tensor

from fastpeft.ops import aten, dispatch, reference

pytest.importorskip("triton")
from fastpeft.kernels import siva_linear as kernel
from fastpeft.kernels import siva_linear_backward as kernel_backward
from fastpeft.kernels import siva_linear_mixed, tiles
from fastpeft.kernels.launch import dot_kind, is_for_kernels

OUTPUTS = {"a layer": (1, ()), "three layers": (3, ()), "adapters": (1, (4, 3))}  # number, rows of the adapters


def check(*args: object, dhs: list[Tensor] | None = None) -> None:
    """Launch both directions and compare with float64."""
    with poisoned_memory():
        actual = kernel.siva_linear(*args)
    assert_outputs(actual, expected_of(aten.siva_linear, args))
    whole = backward_of(dhs or gradients_of(args), args, actual[1])
    with poisoned_memory():
        gradients = kernel_backward.siva_linear_backward(*whole)
    assert_outputs(gradients, expected_of(aten.siva_linear_backward, whole))


@pytest.mark.parametrize("of", OUTPUTS)
def test_every_tile(of, tile, device, launched):
    launched(tile)
    number, sizes = OUTPUTS[of]
    rank = min(tile.max_rank if of == "a layer" else tile.shared_rank or 16, 33)
    ns = (tile.block_n + 1, 2 * tile.block_n, 5)[:number]
    shape = (7, tile.block_m // 2 + 1) if sizes else (tile.block_m + 1,)
    ranks = (rank, 3) if sizes else (rank, 3, rank)[:number]
    args = layers((*shape, tile.block_k + 1), ns, ranks, sizes, torch.bfloat16, device)
    check(*each(in_nan, args))


@pytest.mark.parametrize("dies", [6, 8])
def test_programs_are_dealt_to_dies_in_ranges_of_tiles(dies, device, monkeypatch):
    monkeypatch.setattr(tiles, "gpu", lambda _: tiles.Gpu("gfx942", 38 * dies))
    check(*layers((300, 20), (200,), (3,), device=device))


def test_more_row_blocks_than_a_group(device, launched):
    tile = tiles.SIVA_LINEAR[tiles.ANY][0]
    launched(tile)
    rows = (tiles.GROUP_M + 2) * tile.block_m + 1
    check(*layers((rows, tile.block_n + 1), (2 * tile.block_n + 1, 3), (2, 5), device=device))
    check(*layers((rows, 8), (70,), (2, 1), (rows - 33, 33), device=device))


def test_factors_in_float32_are_read_as_they_are(device, launched):
    """The same bits as with factors in float16, but for what is then not rounded to it.

    Not in bfloat16, to which Triton's interpreter truncates.
    """
    launched(tiles.SIVA_LINEAR[tiles.ANY][1])
    x, weights, scales, us, ss, vs, biases = layers((70, 35), (66, 17), (5, 3), dtype=torch.float16, device=device)
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


@pytest.mark.parametrize("far", ["x", "dh"])
def test_offsets_pass_32_bits(far, device):
    """The last of 5 rows starts at element 2^31 of a storage of which only these rows are touched."""
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 5 GB of GPU memory")

    def apart(values: Tensor) -> Tensor:
        room = torch.empty(2**31 + values.shape[1], dtype=values.dtype, device=device)
        return room.as_strided(values.shape, (2**29, 1)).copy_(values)

    x, *rest = layers((5, 8), (16,), (2,), dtype=torch.float16, device=device)
    dh = torch.ones(5, 16, dtype=torch.float16, device=device)
    check(apart(x) if far == "x" else x, *rest, dhs=[apart(dh) if far == "dh" else dh])


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
    for number in (1, 3):
        found = [tiles.siva_linear(arch, rank, number) for rank in (16, 32, tiles.MAX_RANK)]
        assert all(found)
        assert len(found[0]) > 1
        assert found[0][0] == found[-1][0]  # what runs where nothing may be timed


@pytest.fixture
def tuning(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All tiles for the forward, timed as if each were faster than those before; which were."""
    tuner, timed = kernel._siva_linear_fwd_kernel.tuner, []

    def bench(call, quantiles):
        call()
        timed.append(tuner.nargs["rows"])
        return [1 / len(timed)] * 3

    every = [tile.config() for tile in tiles.SIVA_LINEAR[tiles.ANY]]
    monkeypatch.setattr(tuner, "configs", every)
    monkeypatch.setattr(tuner, "cache", {})
    monkeypatch.setattr(tuner, "_do_bench", bench)
    monkeypatch.setattr(tuner, "do_bench", bench)
    monkeypatch.setattr(tiles, "current_architecture", lambda: tiles.ANY)
    return timed


def launch(m: int, r: int = 3) -> str:
    """The tile of a forward that gives what the reference does."""
    args = layers((m, 40), (48,), (r,), dtype=torch.float16)
    assert_outputs(kernel.siva_linear(*args), expected_of(reference.siva_linear, args))
    return str(kernel._siva_linear_fwd_kernel.tuner.best_config)


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
def test_where_a_run_is_deterministic_the_first_tile_runs(tuning, monkeypatch):
    launch(20)  # which is timed
    timed, shapes = len(tuning), []
    run = type(kernel._siva_linear_fwd_kernel.fn).run
    monkeypatch.setattr(
        type(kernel._siva_linear_fwd_kernel.fn),
        "run",
        lambda *args, **kwargs: shapes.append(kwargs) or run(*args, **kwargs),
    )
    torch.use_deterministic_algorithms(True)
    try:
        launch(20)
    finally:
        torch.use_deterministic_algorithms(False)
    assert [each["BLOCK_N"] for each in shapes] == [tiles.SIVA_LINEAR[tiles.ANY][0].block_n]
    assert len(tuning) == timed
    launch(20, r=17)
    assert len(tuning) == timed + 2  # of these ranks one tile has no room


@pytest.mark.parametrize("block_r", [16, 64])
def test_ranges_of_rows_are_whole_steps_and_not_too_many(block_r):
    for m in (0, 1, 255, 257, 8191, 8193, 10**6, 2**31):
        rows = tiles.siva_linear_bwd_rows(m, block_r)
        assert rows % tiles.SIVA_LINEAR_SUMS.block_m == 0
        assert m <= 32 * rows


def test_blocks_of_rows_end_with_their_adapter():
    table = siva_linear_mixed._block_table((5, 0, 2), (3, 1, 2), 4, pinned=False)
    # first row, end, first column of the factors, rank, where p^T of row 0 would be, rows of p^T
    assert table.tolist() == [[0, 5, 0, 3, 0, 5], [4, 5, 0, 3, 0, 5], [5, 7, 4, 2, 10, 2]]


def test_many_short_adapters_take_small_tiles():
    """Blocks of rows do not reach from one adapter into the next, so a large tile would be mostly empty."""
    many, one = (tiles.siva_linear_mixed("sm_80", 16, rows) for rows in ((16,) * 256, (4096,)))
    assert many.block_m < one.block_m
