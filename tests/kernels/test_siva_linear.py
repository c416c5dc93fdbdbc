"""The Triton SiVA forward against the reference in float64, with NaN wherever it must not read or leave a value."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from tolerances import assert_as_accurate
from torch import Tensor

from fastpeft import reference

pytest.importorskip("triton")
from fastpeft.kernels import siva_linear as kernel
from fastpeft.kernels.tiles import rank_block, siva_linear_fwd_tile

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 15, 17, 63, 65, 127]


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors are born full of NaN, so an element that no program writes shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # PyTorch then fills uninitialized memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def in_nan(values: Tensor) -> Tensor:
    """A view with the same values inside a larger tensor of NaN: reading past an edge shows."""
    room = torch.full([size + 19 for size in values.shape], torch.nan, dtype=values.dtype, device=values.device)
    view = room[tuple(slice(3, 3 + size) for size in values.shape)]
    return view.copy_(values)


def operands(m: int, k: int, n: int, r: int, dtype: torch.dtype, device: str, bias: bool = True) -> list[Tensor | None]:
    """x, weight, u, s, v, bias, of the size that layers have: h is about 1 and the low-rank part is half of it."""
    generator = torch.Generator().manual_seed(m + 1_000 * k + 1_000_000 * n + r)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator)).to(device, dtype)

    root_k, root_r = max(k, 1) ** -0.5, max(r, 1) ** -0.5
    return [
        normal(m, k),
        normal(n, k, scale=root_k),
        normal(n, r, scale=root_r),
        normal(r).abs(),
        normal(r, k, scale=root_k),
        normal(n) if bias else None,
    ]


def check(*args: Tensor | None) -> None:
    """Launch on `args` and compare h and p with the reference in float64."""
    with poisoned_memory():
        actual = kernel.siva_linear_fwd(*args)
    plain = reference.siva_linear(*args)
    double = [None if a is None else a.double() for a in args]
    exact = reference.siva_linear(*double)
    terms = reference.siva_linear(*(None if a is None else a.abs() for a in double))
    for ours, *others in zip(actual, plain, exact, terms):
        assert_as_accurate(ours, *others)
        assert ours.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("m", "k", "n", "r"),
    [(1, 1, 1, 1), (17, 65, 63, 4), (65, 127, 17, 16), (33, 31, 129, 17), (37, 97, 101, 64), (257, 33, 131, 5)],
)
def test_ragged_sizes(m, k, n, r, dtype, device):
    args = operands(m, k, n, r, dtype, device)
    check(*(in_nan(a) for a in args))


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


@pytest.mark.parametrize("m", [256, 257], ids=["few-rows", "many-rows"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_tiles_of_a_dtype(m, dtype, device):
    tile = siva_linear_fwd_tile(m, kernel.products(dtype, matrix_units=True))
    check(*operands(m, tile.block_k + 1, tile.block_n + 1, 4, dtype, device))


def test_more_row_blocks_than_a_group(device):
    tile = siva_linear_fwd_tile(10_000, "ieee")
    check(*operands(9 * tile.block_m + 1, 8, 2 * tile.block_n + 1, 2, torch.float32, device))


@pytest.mark.parametrize(("m", "k", "n", "r"), [(0, 5, 7, 2), (3, 0, 7, 2), (3, 5, 0, 2), (3, 5, 7, 0), (0, 0, 0, 0)])
def test_empty_sizes(m, k, n, r, device):
    check(*operands(m, k, n, r, torch.float32, device))


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


def test_offsets_pass_32_bits(device):
    """The last of 5 rows starts at element 2^31 of a storage of which only these rows are touched."""
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 5 GB of GPU memory")
    x, *rest = operands(5, 8, 16, 2, torch.float16, device)
    far = torch.empty(2**31 + 8, dtype=torch.float16, device=device).as_strided((5, 8), (2**29, 1))
    check(far.copy_(x), *rest)


def test_what_the_kernel_leaves_to_the_reference(device):
    for args in (
        operands(5, 6, 7, 2, torch.float64, device),
        operands(5, 6, 7, kernel.MAX_RANK + 1, torch.float32, device),
    ):
        for ours, theirs in zip(kernel.siva_linear_fwd(*args), reference.siva_linear(*args)):
            assert torch.equal(ours, theirs)


def test_products_follow_pytorch_and_the_card():
    setting = torch.backends.cuda.matmul.fp32_precision
    try:
        for choice, expected in (("ieee", "ieee"), ("tf32", "tf32")):
            torch.backends.cuda.matmul.fp32_precision = choice
            assert kernel.products(torch.float32, matrix_units=True) == expected
            assert kernel.products(torch.float32, matrix_units=False) == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = setting
    for dtype in (torch.float16, torch.bfloat16):
        assert kernel.products(dtype, matrix_units=True) == "half"
        assert kernel.products(dtype, matrix_units=False) is None
    assert kernel.products(torch.float64, matrix_units=True) is None


@pytest.mark.parametrize(("rank", "expected"), [(0, 16), (1, 16), (16, 16), (17, 32), (32, 32), (33, 64), (64, 64)])
def test_rank_block(rank, expected):
    assert rank_block(rank) == expected
