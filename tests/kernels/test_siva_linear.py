"""SiVA's Triton kernels against the reference in float64, with NaN wherever they must not read or leave a value."""

from __future__ import annotations

import itertools

import pytest
import torch
from poison import in_nan, poisoned_memory
from siva_operands import assert_gradients, assert_outputs, expected_of, in_order, operands
from torch import Tensor

from fastpeft.ops import aten, reference

pytest.importorskip("triton")
from fastpeft.kernels import siva_linear as kernel
from fastpeft.kernels import siva_linear_backward as kernel_backward
from fastpeft.kernels import siva_linear_plan, tiles
from fastpeft.kernels.launch import dot_kind, is_for_kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 15, 17, 63, 65, 127]


def check_forward(*args: Tensor | None) -> None:
    """Launch on `args` and compare h and p with the reference in float64."""
    with poisoned_memory():
        actual = kernel.siva_linear(*args)
    assert_outputs(actual, expected_of(reference.siva_linear, args))


def check_backward(dh: Tensor, *args: Tensor | None, needs: tuple[bool, ...] = (True,) * 4) -> None:
    """Launch on dh and the forward's `args` and compare the gradients, twice the same bits, with float64."""
    x, weight, u, s, v, _ = args
    p = in_nan(reference.siva_linear(*in_order(args))[1])
    expected = expected_of(reference.siva_linear_backward, (dh, x, weight, u, s, v, p, *needs))
    unread = dh.new_empty(0)  # what the autograd formula passes for an operand that no gradient needs
    args = (dh, x if needs[2] else unread, weight, u, s, v, p if needs[1] else unread, *needs)
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


@pytest.mark.long(only=("64x64x64-before", "128x128x32-before", "128x256x64-before", "128x256x64-inside"))
@pytest.mark.parametrize("project", [True, False], ids=["inside", "before"])
def test_every_tile_with_p_inside_or_before(tile, project, device, launched):
    launched(tile, project)
    rank = min(tile.max_rank, 33) if project else 33
    step = 8 if tile.tma else 1  # elements of 16 bits in 16 bytes
    args = operands(tile.block_m + 1, tile.block_k + step, tile.block_n + step, rank, torch.bfloat16, device)
    check(*(in_nan(a, step) for a in args), step=step)


@pytest.fixture
def with_tma(monkeypatch: pytest.MonkeyPatch, device: str) -> list[bool]:
    """On a GPU that has descriptors: of each launch, whether it had any."""
    gpu = tiles.gpu(torch.device(device, 0) if device == "cuda" else torch.device(device))
    if device == "cuda" and not any(tile.tma for tile in tiles.siva_linear_tiles(gpu.architecture)):
        pytest.skip("this GPU has no descriptors")
    if device == "cpu":
        monkeypatch.setattr(tiles, "gpu", lambda _: H100)
    found = []
    plan = siva_linear_plan.plan_of

    def planned(*args):
        found.append(plan(*args[:-1], ("fused tma", "split tma")))
        return found[-1]

    for module in (kernel, kernel_backward):
        monkeypatch.setattr(module, "plan_of", planned)
    return found


@pytest.mark.long(but="200-136-264-5")
@pytest.mark.parametrize(
    ("m", "k", "n", "r"), [(200, 136, 264, 5), (1, 8, 8, 1), (129, 64, 8, 16), (33, 72, 136, 17), (40, 80, 24, 64)]
)
def test_aligned_operands_have_descriptors(m, k, n, r, device, with_tma):
    args = operands(m, k, n, r, torch.bfloat16, device, bias=m != 33)
    check(*(None if a is None else in_nan(a, 8) for a in args), step=8)
    assert all(plan.tile.tma for plan in with_tma)
    assert with_tma


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", tiles.SPLIT_K, ids=["32", "64"])
def test_ranges_of_k(tile, dtype, device, launched):
    launched(tile, True, ranges=3)
    rank = tile.max_rank // 3
    check(*map(in_nan, operands(tile.block_m + 1, 2 * tile.block_k + 9, 3 * tile.block_k, rank, dtype, device)))


@pytest.mark.parametrize(
    ("m", "k", "n", "r"), [(1, 1, 1, 1), (33, 300, 64, 64), (70, 64, 230, 17), (0, 5, 7, 2), (3, 0, 7, 2), (3, 7, 0, 2)]
)
@pytest.mark.parametrize("ranges", [2, 16])
def test_ranges_of_a_sum_that_is_short_or_empty(ranges, m, k, n, r, device, launched):
    launched(tiles.SPLIT_K[0], True, ranges)
    check(*operands(m, k, n, r, torch.float32, device))


def test_ranges_honour_strides_and_go_without_bias(device, launched):
    launched(tiles.SPLIT_K[0], True, ranges=2)
    x, weight, u, s, v, _ = operands(24, 233, 198, 4, torch.float16, device, bias=False)
    s = s.repeat_interleave(2)[::2]
    check(x.t().contiguous().t(), weight.t().contiguous().t(), u.t().contiguous().t(), s, v.t().contiguous().t(), None)


def test_k_is_cut_where_rows_fill_no_gpu():
    few, many, short = (
        tiles.siva_linear((m,), k, (1024,), 16, H100) for m, k in ((32, 4096), (4096, 4096), (32, 1024))
    )
    assert (few.way, few.tile.block_m) == ("split-k", 32)
    assert few.ranges * 1024 // few.tile.block_n <= H100.multiprocessors
    assert many.ranges == short.ranges == 1
    assert tiles.siva_linear((32,), 4096, (1024, 1024), 16, H100, shared=True).ranges == 1
    assert tiles.siva_linear((32,), 256, (1024,), 16, H100, ("split-k",)).way == "fused"


@pytest.mark.parametrize("way", tiles.WAYS)
def test_a_caller_names_the_way(way, device, monkeypatch):
    found = []
    plan = siva_linear_plan.plan_of
    for module in (kernel, kernel_backward):
        monkeypatch.setattr(module, "plan_of", lambda *args: found.append(plan(*args)) or found[-1])
    if device == "cpu":
        monkeypatch.setattr(tiles, "gpu", lambda _: H100)
    x, weight, u, s, v, _ = operands(40, 512, 512, 3, torch.bfloat16, device, bias=False)
    h, p = kernel.siva_linear(x, weight, u, s, v, None, ways=(way,))
    kernel_backward.siva_linear_backward(h, x, weight, u, s, v, p, True, True, True, False, ways=(way,))
    assert [tiles.Choice(*each[:3]).way for each in found] == [way] * 2
    torch.testing.assert_close(
        h.float(), reference.siva_linear(x, weight, u, s, v, None)[0].float(), rtol=0.02, atol=0.1
    )


@pytest.mark.parametrize("what", ["width", "pitch", "beginning", "turned", "repeated"])
def test_others_take_addresses(what, device, with_tma):
    x, *rest = operands(20, 9 if what == "width" else 16, 24, 3, torch.bfloat16, device)
    if what == "pitch":
        x = in_nan(x)
    elif what == "beginning":
        x = x.new_empty(20, 24)[:, 4:20].copy_(x)
    elif what == "turned":
        x = x.t().contiguous().t()
    elif what == "repeated":
        x = x[:1].expand(20, 16)
    check_forward(x, *rest)
    assert [plan.tile.tma for plan in with_tma] == [False]


def test_a_gpu_without_descriptors_takes_addresses(device):
    x, weight, _, _, v, _ = operands(16, 16, 16, 3, torch.bfloat16, device)
    plan = siva_linear_plan.plan_of(x, [weight], [v], (16,), (3,), ("fused tma",))
    assert plan.project
    assert not plan.tile.tma or device == "cuda"


@pytest.mark.parametrize("dies", [6, 8])
def test_programs_are_dealt_to_dies_in_ranges_of_tiles(dies, device, monkeypatch):
    constants = tiles.siva_linear_constants
    gpu = tiles.Gpu("gfx942", 38 * dies)
    assert constants(tiles.SIVA_LINEAR["gfx942"][0], True, 3, gpu)["XCDS"] == dies
    monkeypatch.setattr(tiles, "siva_linear_constants", lambda *args: {**constants(*args), "XCDS": dies})
    check(*operands(300, 20, 200, 3, torch.float32, device))


def test_more_row_blocks_than_a_group(device, launched):
    tile = tiles.SIVA_LINEAR[tiles.ANY][0]
    launched(tile, True)
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
    p, dh = x.new_ones(m, r), x.new_ones(m, n)
    with poisoned_memory():
        gradients = kernel_backward.siva_linear_backward(dh, x, weight, u, s, v, p, True, True, True, True)
    expected = dh @ weight, torch.zeros_like(u), torch.zeros_like(v), torch.full_like(bias, m)
    if r > 0:
        expected = expected[0] + (dh @ u * s) @ v, dh.t() @ p * s, (dh @ u * s).t() @ x, expected[3]
    for ours, theirs in zip(gradients, expected):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("project", [True, False], ids=["inside", "before"])
def test_factors_in_float32_are_read_as_they_are(project, device, launched):
    """The same bits as with factors in float16, but for what is then not rounded to it.

    Not in bfloat16, to which Triton's interpreter truncates.
    """
    dtype = torch.float16
    launched(tiles.SIVA_LINEAR[tiles.ANY][1], project)
    halves = operands(70, 35, 66, 5, dtype, device)
    wide = [a.float() if i in (2, 3, 4) else a for i, a in enumerate(halves)]
    dh = torch.randn(70, 66).to(halves[0])
    found = []
    for x, weight, u, s, v, bias in (halves, wide):
        with poisoned_memory():
            h, p = kernel.siva_linear(x, weight, u, s, v, bias)
            found.append(
                [h, p, *kernel_backward.siva_linear_backward(dh, x, weight, u, s, v, p, True, True, True, True)]
            )
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
        forward, expected = kernel.siva_linear(*args), aten.siva_linear(*args)
        args = (args[0].new_ones(5, 7), *args[:5], expected[1], True, True, True, True)
        for ours, theirs in zip(
            forward + kernel_backward.siva_linear_backward(*args),
            expected + aten.siva_linear_backward(*args),
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


A100, H100 = tiles.Gpu("sm_80", 108), tiles.Gpu("sm_90", 132)


def test_p_is_computed_inside_until_that_costs_more_than_reading_x_again():
    inside = {
        (m, n): tiles.siva_linear((m,), 1024, (n,), 4, A100)[1] for m, n in ((512, 1024), (2048, 1024), (16384, 8192))
    }
    assert inside == {(512, 1024): True, (2048, 1024): True, (16384, 8192): False}
    assert not tiles.siva_linear((8192,), 4096, (4096,), 64, H100)[1]


@pytest.mark.parametrize("architecture", tiles.SHEETS)
def test_sheets_agree_with_whole_multiply_adds_a_clock(architecture):
    sheet = tiles.SHEETS[architecture]
    rate = sheet.teraflops * 1e6 / sheet.megahertz / sheet.multiprocessors / 2
    assert round(rate / 256) * 256 == pytest.approx(rate, rel=2e-3)


@pytest.mark.parametrize("architecture", [*tiles.SHEETS, "interpreter"])
def test_few_rows_take_small_tiles_and_many_take_large_ones(architecture):
    gpu = tiles.Gpu(architecture, 128)
    few, many = (tiles.siva_linear((m,), 1024, (1024,), 4, gpu)[0] for m in (17, 65536))
    sizes = [tile.block_m * tile.block_n for tile in tiles.siva_linear_tiles(architecture)]
    assert (few.block_m * few.block_n, many.block_m * many.block_n) == (min(sizes), max(sizes))


@pytest.mark.parametrize("ways", [tiles.WAYS, ("fused", "fused tma")], ids=["chosen", "fused"])
def test_on_an_h100_the_forward_waits_for_memories_hardly_longer_than_a_bare_product(ways):
    """4096 x 4096 x 4096 at rank 16: reads of shared memory, and loads through the second-level cache."""
    size, rank, sheet = 4096, 16, tiles.SHEETS["sm_90"]
    tile, project, _ = tiles.siva_linear((size,), size, (size,), rank, H100, ways)
    ours, bare = (tiles.siva_linear_clocks(tile, block_r, "sm_90") for block_r in (rank * project, 0))
    programs = size / tile.block_m * size / tile.block_n / H100.multiprocessors
    x = 0 if project else 2 * size**2  # bytes that a product for p reads before
    shared = ours.shared + x / H100.multiprocessors / sheet.shared / programs / size
    cached = ours.cached + x / sheet.cached / programs / size
    assert max(shared, cached) <= 1.05 * max(bare.shared, bare.cached)
    assert cached <= 1.05 * bare.cached
    if not project:
        assert shared <= 1.05 * bare.shared


def test_an_architecture_without_a_line_takes_the_tiles_of_any():
    assert tiles.siva_linear_tiles("sm_89") == tiles.SIVA_LINEAR[tiles.ANY]


def test_p_is_computed_inside_only_where_it_fits():
    for rank in range(1, tiles.MAX_RANK + 1):
        for way in ("fused", "fused tma"):
            choice = tiles.siva_linear((17,), 64, (64,), rank, H100, (way,))
            assert choice.project
            assert rank <= choice.tile.max_rank


@pytest.mark.parametrize("block_r", [16, 64])
def test_ranges_of_rows_are_whole_steps_and_not_too_many(block_r):
    for m in (0, 1, 255, 257, 8191, 8193, 10**6, 2**31):
        rows = tiles.siva_linear_bwd_rows(m, block_r)
        assert rows % tiles.SIVA_LINEAR_SUMS.block_m == 0
        assert m <= 32 * rows
