"""The compiled `siva_linear_mixed` against float64. What all implementations share is in siva/test_mixed_batch.py."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from instructions import supported
from poison import in_nan, poisoned_memory
from siva_operands import absolute, batch, each, flat, in_double, in_order
from tolerances import GRADIENT, assert_as_accurate
from torch import Tensor

from fastpeft import FastpeftError
from fastpeft.functional import siva_linear_mixed
from fastpeft.ops import aten, backends, reference
from fastpeft.ops.packing import Packs, can_pack

pytestmark = pytest.mark.skipif(
    not any((choice.op, choice.backend) == ("siva_linear_mixed", "cpp") for choice in backends.choices()),
    reason="needs the compiled module",
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
SHAPES: dict[str, tuple[Any, ...]] = {  # of x, out_features, ranks, sizes
    "one token": ((70, 33), 18, (5, 4, 1), (1, 69, 0)),
    "one token in three dimensions": ((9, 1, 7), 5, (3, 0), (4, 5)),
    "ragged": ((9, 7, 65), 33, (3, 0, 7, 16, 1), (3, 2, 0, 3, 1)),
    "long sentences": ((3, 67, 15), 17, (2, 9), (2, 1)),
    "two dimensions of tokens": ((4, 2, 3, 24), 40, (4, 8), (1, 3)),
    "high ranks": ((5, 9, 31), 63, (64, 5, 33), (1, 2, 2)),
    "no rows": ((0, 5), 7, (2, 1), (0, 0)),
    "no tokens": ((3, 0, 5), 7, (2, 1), (2, 1)),
    "no columns": ((3, 0), 7, (2, 1), (2, 1)),
    "no outputs": ((3, 5), 0, (2, 1), (2, 1)),
}


def mixed(
    shape: tuple[int, ...],
    n: int,
    ranks: tuple[int, ...],
    sizes: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    sort: bool = True,
) -> list[Any]:
    """Operands whose factors are float32 in any dtype."""
    x, weight, us, ss, vs, *rest, bias = batch(shape, n, ranks, sizes, dtype, sort=sort)
    us, ss, vs = ([factor.float() for factor in each] for each in (us, ss, vs))
    return [x, weight, us, ss, vs, *rest, bias]


def both(
    module: Any, args: list[Any], dh: Tensor, needs: list[Any] | None = None, packed: bool = False
) -> list[Tensor]:
    """h, each p, and what backward gives."""
    x, weight, us, ss, vs, sizes, order, bias = args
    weights = [weight, weight]
    if packed and can_pack(weight, x.dtype):
        weights = [Packs().of(weight, x.dtype, transposed) for transposed in (False, True)]
    h, ps = module.siva_linear_mixed(x, weights[0], us, ss, vs, sizes, order, bias)
    needs = needs or [True, [True] * len(us), [True] * len(us), True]
    grads = module.siva_linear_mixed_backward(dh, x, weights[1], us, ss, vs, ps, sizes, order, *needs)
    return flat([h, ps, *grads])


def gradient(args: list[Any]) -> Tensor:
    x, weight, *_ = args
    generator = torch.Generator().manual_seed(7)
    return torch.randn(*x.shape[:-1], len(weight), generator=generator).to(x.dtype)


@DTYPES
@pytest.mark.parametrize("simd", supported())
@pytest.mark.parametrize("name", SHAPES)
def test_as_accurate_as_plain_pytorch(
    monkeypatch: pytest.MonkeyPatch, name: str, simd: str, dtype: torch.dtype
) -> None:
    monkeypatch.setenv("FASTPEFT_SIMD", simd)
    for sort, packed, bias in itertools.product((True, False), repeat=3):
        args = mixed(*SHAPES[name], dtype, sort)
        args[-1] = args[-1] if bias else None
        dh = gradient(args)
        with poisoned_memory():
            found = both(torch.ops.fastpeft, args if packed else each(in_nan, args), in_nan(dh), packed=packed)
        plain = both(reference, in_order(args), dh)
        exact, terms = (
            both(reference, make(args), *make([dh])) for make in (in_double, lambda a: absolute(in_double(a)))
        )
        forward = 1 + len(args[2])
        for i, (ours, *others) in enumerate(zip(found, plain, exact, terms, strict=True)):
            assert_as_accurate(ours, *others, factor=2 if i < forward else GRADIENT)


NEEDS: list[list[Any]] = [
    [True, [True, False, True], [False] * 3, False],
    [True, [False] * 3, [False, False, True], True],
    [False, [True, False, False], [False, True, False], False],
    [False, [False] * 3, [True] * 3, False],
    [True, [False] * 3, [False] * 3, False],
    [False, [False] * 3, [False] * 3, False],
]


@pytest.mark.parametrize("needs", NEEDS, ids=str)
def test_only_what_is_needed(needs: list[Any]) -> None:
    args = mixed((60, 5, 35), 29, (3, 6, 2), (20, 30, 10))
    x, weight, us, ss, vs, sizes, order, _ = args
    dh, empty = gradient(args), torch.empty(0)
    whole = both(torch.ops.fastpeft, args, dh)
    ps = [p if needed else empty for p, needed in zip(whole[1:4], needs[1])]
    x = x if any(needs[2]) else empty
    found = torch.ops.fastpeft.siva_linear_mixed_backward(dh, x, weight, us, ss, vs, ps, sizes, order, *needs)
    for ours, expected, needed in zip(flat(found), whole[4:], flat(needs), strict=True):
        assert torch.equal(ours, expected) if needed else ours.shape == (0,)


def test_strides() -> None:
    x, weight, us, ss, vs, sizes, order, bias = args = mixed((6, 11, 33), 18, (5, 2), (2, 4))
    dh = gradient(args)
    expected = both(reference, args, dh)
    turned = [x.transpose(0, 2).contiguous().transpose(0, 2), weight.t().contiguous().t()]
    turned += [[t.t().contiguous().t() for t in us], [s.repeat_interleave(2)[::2] for s in ss]]
    turned += [[t.t().contiguous().t() for t in vs], sizes, order.repeat_interleave(2)[::2]]
    found = both(
        torch.ops.fastpeft, [*turned, bias.repeat_interleave(3)[::3]], dh.transpose(0, 1).contiguous().transpose(0, 1)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    one = torch.ones(()).expand(6, 11, 18)  # what a sum passes back
    found, expected = (both(module, args, one) for module in (torch.ops.fastpeft, reference))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@DTYPES
@pytest.mark.usefixtures("one_thread_after")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", [(4200, 65), (150, 40, 65)])
def test_repeats_and_threads_are_bit_equal(shape: tuple[int, ...], packed: bool, dtype: torch.dtype) -> None:
    """With several tiles in a chunk and several chunks of an adapter."""
    number = shape[0]
    args = mixed(shape, 33, (5, 4, 2), (number // 2, 3, number - number // 2 - 3), dtype)
    dh, runs = gradient(args), []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        runs.append(both(torch.ops.fastpeft, args, dh, packed=packed))
    for run in runs[1:]:  # each p, dU and dV; h and dx hold a product by BLAS
        assert all(map(torch.equal, [*run[1:4], *run[5:11]], [*runs[0][1:4], *runs[0][5:11]]))
    assert all(map(torch.equal, runs[1], runs[3]))


@pytest.mark.parametrize("shape", [(150, 65), (30, 7, 65)])
def test_sorted_rows_have_the_same_bits(shape: tuple[int, ...]) -> None:
    number = shape[0]
    args = mixed(shape, 33, (5, 2), (number - 5, 5))
    x, *operands, order, bias = args
    dh = gradient(args)
    found = both(torch.ops.fastpeft, args, dh)
    in_sorted = both(torch.ops.fastpeft, [x[order], *operands, None, bias], dh[order])
    torch.testing.assert_close(found[0][order], in_sorted[0])
    torch.testing.assert_close(found[3][order], in_sorted[3])
    for i in (1, 2, 4, 5, 6, 7):
        assert torch.equal(found[i], in_sorted[i])


@pytest.mark.parametrize("sort", [True, False])
def test_opcheck_of_bfloat16_rows(sort: bool) -> None:
    args = mixed((5, 3, 7), 6, (3, 0, 1), (2, 1, 2), torch.bfloat16, sort)
    torch.library.opcheck(torch.ops.fastpeft.siva_linear_mixed.default, tuple(args))
    h, ps = torch.ops.fastpeft.siva_linear_mixed(*args)
    for needs in [(True, [True] * 3, [True] * 3, True), (False, [False, True, True], [False] * 3, False)]:
        backward = (h, *args[:5], ps, *args[5:7], *needs)
        torch.library.opcheck(torch.ops.fastpeft.siva_linear_mixed_backward.default, backward)


@pytest.mark.parametrize(("dtype", "rank"), [(torch.float64, 3), (torch.float16, 3), (torch.float32, 65)], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_other_dtypes_and_high_ranks_are_left_to_aten(packed: bool, dtype: torch.dtype, rank: int) -> None:
    args = batch((5, 3, 80), 70, (rank, 2), (2, 3), dtype)
    dh = gradient(args)
    found, expected = (both(module, args, dh, packed=packed) for module in (torch.ops.fastpeft, aten))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("wrong", [[0, 0, 1], [0, 1, 3], [-1, 0, 1]], ids=str)
def test_what_is_no_permutation_is_refused(wrong: list[int], dtype: torch.dtype) -> None:
    *operands, _, bias = args = batch((3, 5), 4, (2, 1), (1, 2), dtype)
    x, weight, us, ss, vs, sizes = operands
    order = torch.tensor(wrong)
    message = r"siva_linear_mixed: order is \[" + ", ".join(map(str, wrong)) + r"\], .* each of 0 to 2 once\. Give the"
    with pytest.raises(FastpeftError, match=message):
        siva_linear_mixed(*operands, order, bias)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastpeft.siva_linear_mixed(*operands, order, bias)
    if dtype is torch.float32:
        ps = [torch.ones(2, 1), torch.ones(1, 2)]
        needs = True, [True] * 2, [True] * 2, True
        with pytest.raises(RuntimeError, match=message):
            torch.ops.fastpeft.siva_linear_mixed_backward(
                gradient(args), x, weight, us, ss, vs, ps, sizes, order, *needs
            )


def test_what_does_not_fit_is_refused() -> None:
    args = mixed((3, 2, 5), 4, (2, 1), (1, 2))
    x, weight, us, ss, vs, sizes, order, bias = args
    changes: list[tuple[int, Any]] = [
        (0, x[..., :4]),
        (0, x[0, 0]),
        (1, weight[:3]),
        (2, us[:1]),
        (2, [us[0], us[1][:3]]),
        (3, [ss[1], ss[0]]),
        (4, [vs[0], vs[1][:, :4]]),
        (5, [1, 1]),
        (5, [4, -1]),
        (5, [3]),
        (6, order[:2]),
        (6, order.int()),
        (7, bias[:3]),
    ]
    for place, changed in changes:
        with pytest.raises(RuntimeError, match="shapes fit together"):
            torch.ops.fastpeft.siva_linear_mixed(*args[:place], changed, *args[place + 1 :])
    h, ps = torch.ops.fastpeft.siva_linear_mixed(*args)
    whole = [h, *args[:5], ps, sizes, order, True, [True] * 2, [True] * 2, True]
    changes = [
        (0, h[..., :3]),
        (1, x[:, :1]),
        (2, weight[:, :4]),
        (6, ps[:1]),
        (6, [ps[0], ps[1][:, :1]]),
        (7, [2, 2]),
        (10, [True]),
        (11, [True]),
    ]
    for place, changed in changes:
        with pytest.raises(RuntimeError, match="shapes fit together"):
            torch.ops.fastpeft.siva_linear_mixed_backward(*whole[:place], changed, *whole[place + 1 :])
