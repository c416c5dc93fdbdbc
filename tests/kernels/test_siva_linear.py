"""SiVA's Triton kernels against ATen in float64, with NaN wherever they must not read or leave a value."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from poison import in_nan, poisoned_memory
from siva_operands import assert_gradients, assert_outputs, each, expected_of, flat, in_order, operands
from torch import Tensor

from fastpeft.ops import aten, dispatch, reference

pytest.importorskip("triton")
from fastpeft.kernels import siva_linear as kernel
from fastpeft.kernels import siva_linear_backward as kernel_backward
from fastpeft.kernels import tiles
from fastpeft.kernels.launch import dot_kind, is_for_kernels
from fastpeft.ops.quantise import QuantisedWeight

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
    x, _, _, us, *_ = args
    generator = torch.Generator().manual_seed(0)
    dhs = [in_nan(torch.randn(*x.shape[:-1], len(u), generator=generator).to(x)) for u in us]
    check_backward(dhs, *args, needs=needs)


def check_forward(*args: Any) -> None:
    """Launch on `args` and compare with float64."""
    with poisoned_memory():
        actual = kernel.siva_linear(*args)
    assert_outputs(actual, expected_of(aten.siva_linear, args))


def check_backward(dhs: list[Tensor], *args: Any, needs: list[Any] | None = None) -> None:
    """Launch twice on dhs and the forward's `args`, and compare with float64; the bits are the same."""
    x, weights, scales, us, ss, vs, biases = args
    p = in_nan(aten.siva_linear(*in_order(args))[-1])
    needs = needs or [True, [True] * len(us), True, [bias is not None for bias in biases]]
    layers = weights, scales, us, ss, vs
    expected = expected_of(aten.siva_linear_backward, (dhs, x, *layers, p, *needs))
    unread = x.new_empty(0)  # what the autograd formula passes for an operand that no gradient needs
    args = dhs, x if needs[2] else unread, *layers, p if any(needs[1]) else unread, *needs
    with poisoned_memory():
        actual, again = (kernel_backward.siva_linear_backward(*args) for _ in range(2))
    assert_gradients(actual, again, needs, expected)


@pytest.mark.long(
    only=(
        "37-97-(101,)-(64,)-torch.float32",
        "257-33-(131,)-(5,)-torch.float32",
        "257-33-(131,)-(5,)-torch.float16",
        "257-33-(131,)-(5,)-torch.bfloat16",
        "37-97-(101,)-(64,)-torch.bfloat16",
        "35-31-(33, 17)-(16, 64)-torch.float16",
    )
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("m", "k", "ns", "ranks"),
    [
        (1, 1, (1,), (1,)),
        (17, 65, (63, 1, 130), (4, 1, 33)),
        (65, 127, (17,), (16,)),
        (35, 31, (33, 17), (16, 64)),
        (37, 97, (101,), (64,)),
        (257, 33, (131,), (5,)),
    ],
    ids=str,
)
def test_ragged_sizes(m, k, ns, ranks, dtype, device):
    check(*each(in_nan, layers(m, k, ns, ranks, dtype, device)))


@pytest.mark.long(but=("65-64-(1,)-torch.float16", "127-17-(63,)-torch.bfloat16", "63-131-(129, 15)-torch.bfloat16"))
@pytest.mark.interp_full
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 15, 17, 63, 65, 127], ids=str)
@pytest.mark.parametrize("k", [1, 17, 64, 131], ids=str)
@pytest.mark.parametrize("ns", [(1,), (63,), (129,), (1, 127, 65), (129, 15), (16, 16, 16, 48)], ids=str)
def test_every_ragged_size(m, k, ns, dtype, device):
    ranks = tuple(1 + (m + 3 * k + 7 * i) % 64 for i in range(len(ns)))
    check(*each(in_nan, layers(m, k, ns, ranks, dtype, device)))


@pytest.mark.long(but="35")
@pytest.mark.interp_full
@pytest.mark.parametrize("r", range(1, 65))
def test_every_rank(r, device):
    check(*each(in_nan, layers(19, 35, (37, 41), (r, 65 - r), torch.float32, device)))


@pytest.mark.parametrize("number", [1, 3])
def test_every_tile(number, tile, device, launched):
    launched(tile)
    rank = min(tile.max_rank if number == 1 else tile.shared_rank or 16, 33)
    ns = (tile.block_n + 1, 2 * tile.block_n, 5)[:number]
    args = layers(tile.block_m + 1, tile.block_k + 1, ns, (rank, 3, rank)[:number], torch.bfloat16, device)
    check(*each(in_nan, args))


@pytest.mark.parametrize("dies", [6, 8])
def test_programs_are_dealt_to_dies_in_ranges_of_tiles(dies, device, monkeypatch):
    monkeypatch.setattr(tiles, "gpu", lambda _: tiles.Gpu("gfx942", 38 * dies))
    check(*layers(300, 20, (200,), (3,), torch.float32, device))


def test_more_row_blocks_than_a_group(device, launched):
    tile = tiles.SIVA_LINEAR[tiles.ANY][0]
    launched(tile)
    rows = (tiles.GROUP_M + 1) * tile.block_m + 1
    check(*layers(rows, tile.block_n + 1, (2 * tile.block_n + 1, 3), (2, 5), torch.float32, device))


@pytest.mark.parametrize("needs", list(itertools.product((True, False), repeat=4)), ids=str)
def test_only_what_a_layer_needs(needs, device):
    of_x, of_u, of_v, of_bias = needs
    check(*layers(23, 35, (29,), (3,), torch.float32, device), needs=[of_x, [of_u], of_v, [of_bias]])


@pytest.mark.parametrize(
    "needs",
    [
        [True, [True, False], False, [False, False]],
        [True, [False, True], True, [False, True]],
        [False, [False, True], False, [False, False]],
        [False, [False, False], True, [True, False]],
    ],
    ids=str,
)
def test_only_what_some_layers_need(needs, device):
    check(*layers(23, 35, (29, 18), (3, 6), torch.float32, device), needs=needs)


@pytest.mark.long(but="torch.float16")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_ranges_of_rows(dtype, device):
    m = 2 * tiles.siva_linear_bwd_rows(1, 16) + 5
    check(*each(in_nan, layers(m, 20, (5, 7), (4, 2), dtype, device)))


@pytest.mark.parametrize(
    ("m", "k", "ns", "ranks"),
    [
        (0, 5, (7, 3), (2, 1)),
        (3, 0, (7, 3), (2, 1)),
        (3, 5, (0, 3), (2, 1)),
        (3, 5, (7, 3), (0, 0)),
        (3, 5, (0,), (2,)),
    ],
)
def test_empty_sizes(m, k, ns, ranks, device):
    x, *rest, biases = args = layers(m, k, ns, ranks, torch.float32, device)
    dhs, p = [torch.ones(m, n).to(x) for n in ns], x.new_ones(sum(ranks), m)
    backward = dhs, x, *rest, p, True, [True] * len(ns), True, [bias is not None for bias in biases]
    with poisoned_memory():
        found = kernel.siva_linear(*args), kernel_backward.siva_linear_backward(*backward)
    expected = aten.siva_linear(*args), aten.siva_linear_backward(*backward)
    for ours, theirs in zip(flat(map(flat, found)), flat(map(flat, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_factors_in_float32_are_read_as_they_are(device, launched):
    """The same bits as with factors in float16, but for what is then not rounded to it.

    Not in bfloat16, to which Triton's interpreter truncates.
    """
    launched(tiles.SIVA_LINEAR[tiles.ANY][1])
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


def test_a_quantised_weight_beside_a_dense_one(device):
    x, weights, scales, *rest = layers(24, 33, (18, 20), (4, 3), torch.float32, device)
    held = QuantisedWeight(weights[1], "int8")
    weights[1], scales[1] = held.codes.data, held.scales.data
    check(x, weights, scales, *rest)


def test_leading_dimensions_and_strides(device):
    x, weights, scales, us, ss, vs, biases = layers(24, 33, (18, 20), (4, 3), torch.float32, device)
    turned = [weight.t().contiguous().t() for weight in weights]  # what Conv1D stores
    check(
        x.view(2, 3, 4, 33).transpose(0, 1),
        turned,
        scales,
        [u.t().contiguous().t() for u in us],
        [s.repeat_interleave(2)[::2] for s in ss],
        [v.t().contiguous().t() for v in vs],
        [None if bias is None else bias.repeat_interleave(3)[::3] for bias in biases],
    )
    rest = scales, us, ss, vs, biases
    check(x[0], [weights[0], turned[1]], *rest)  # a single row, without a leading dimension
    check(x.t().contiguous().t(), weights, *rest)
    check(x[:1].expand(9, 33), weights, *rest)
    # what `h.sum().backward()` passes
    check_backward([x.new_ones(1, 1).expand(24, 18), torch.randn(20, 24).to(x).t()], x, weights, *rest)


@pytest.mark.parametrize("far", ["x", "dh"])
def test_offsets_pass_32_bits(far, device):
    """The last of 5 rows starts at element 2^31 of a storage of which only these rows are touched."""
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 5 GB of GPU memory")

    def apart(values: Tensor) -> Tensor:
        room = torch.empty(2**31 + values.shape[1], dtype=values.dtype, device=device)
        return room.as_strided(values.shape, (2**29, 1)).copy_(values)

    x, *rest = layers(5, 8, (16,), (2,), torch.float16, device)
    dh = torch.ones(5, 16, dtype=torch.float16, device=device)
    if far == "x":
        x = apart(x)
        check_forward(x, *rest)
    check_backward([apart(dh) if far == "dh" else dh], x, *rest)


def test_what_the_kernels_leave_to_aten(device):
    for ranks, dtype in (((2, 3), torch.float64), ((2, tiles.MAX_RANK + 1), torch.float32)):
        x, *rest, _ = args = layers(5, 6, (7, 8), ranks, dtype, device)
        found, expected = kernel.siva_linear(*args), aten.siva_linear(*args)
        args = ([x.new_ones(5, 7), x.new_ones(5, 8)], x, *rest, expected[1], True, [True] * 2, True, [True] * 2)
        found += kernel_backward.siva_linear_backward(*args)
        expected += aten.siva_linear_backward(*args)
        for ours, theirs in zip(flat(found), flat(expected), strict=True):
            assert torch.equal(ours, theirs)


def test_gradients_of_u_share_no_storage_with_those_of_v(device):
    """The schema says that outputs of the op do not alias each other."""
    x, *rest, _ = layers(6, 5, (7, 8), (2, 1), torch.float32, device)
    dhs, p = [x.new_ones(6, n) for n in (7, 8)], x.new_ones(3, 6)
    _, dus, dv, _ = kernel_backward.siva_linear_backward(dhs, x, *rest, p, False, [True] * 2, True, [False] * 2)
    assert {du.untyped_storage().data_ptr() for du in dus}.isdisjoint({dv.untyped_storage().data_ptr()})


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
    args = layers(m, 40, (48,), (r,), torch.float16, "cpu")
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
