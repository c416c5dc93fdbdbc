"""The op `fastpeft::siva_linear` by every implementation: ATen's calls, C++ by each instruction set, Triton.

Each case is one layer, a group or a batch of several adapters. Wherever nothing may be read there is NaN, and new
memory is NaN too, so that what no program writes shows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from instructions import supported
from poison import in_nan, poisoned_memory
from siva_operands import (
    absolute,
    assert_gradients,
    assert_outputs,
    backward_of,
    each,
    flat,
    gradients_of,
    in_double,
    in_order,
    layers,
)
from torch import Tensor

from fastpeft.ops import aten, reference
from fastpeft.ops.packing import Packs, can_pack
from fastpeft.ops.quantise import QuantisedWeight

HALVES = torch.bfloat16, torch.float16
DTYPES = {"aten": (torch.float32, torch.float64), "triton": (torch.float32, *HALVES)}  # C++: float32, bfloat16
COMPILED = [f"cpp-{simd}" for simd in supported()]
IMPLEMENTATIONS = ["aten", "triton", *COMPILED]

# shape of x, out_features of the layers, ranks, rows of the adapters
CASES: dict[str, tuple[Any, ...]] = {
    "ones": ((1, 1), (1,), (1,)),
    "no leading dimension": ((33,), (18, 5), (4, 3)),
    "a row more than a tile": ((65, 127), (17,), (16,)),
    "a column more": ((63, 65), (129, 15), (5, 33)),
    "the highest rank": ((37, 97), (101,), (64,)),
    "two leading dimensions": ((2, 18, 31), (33, 17), (16, 64)),
    "three layers": ((17, 65), (63, 1, 130), (4, 1, 33)),
    "many rows": ((517, 33), (31,), (5,)),
    "four equal layers": ((15, 64), (16, 16, 16, 48), (8, 8, 8, 8)),
    "adapters": ((9, 7, 65), (33,), (3, 0, 7, 16, 1), (3, 2, 0, 3, 1)),
    "adapters of high ranks": ((5, 9, 31), (63,), (64, 5, 33), (1, 2, 2)),
    "adapters of single rows": ((70, 33), (18,), (5, 4, 1), (1, 69, 0)),
    "adapters of long rows": ((3, 67, 15), (17,), (2, 9), (2, 1)),
    "adapters, two dimensions": ((4, 2, 3, 24), (40,), (4, 8), (1, 3)),
    "adapters of many rows": ((520, 20), (5,), (4, 2), (3, 517)),
    "adapters without ranks": ((3, 2, 5), (7,), (0, 0), (1, 2)),
}
EMPTY: dict[str, tuple[Any, ...]] = {
    "no rows": ((0, 5), (7, 3), (2, 1)),
    "no columns": ((3, 0), (7, 3), (2, 1)),
    "no outputs": ((3, 5), (0, 3), (2, 1)),
    "no output of one": ((3, 5), (0,), (2,)),
    "no ranks": ((3, 5), (7, 3), (0, 0)),
    "adapters, no rows": ((0, 5), (7,), (2, 1), (0, 0)),
    "adapters, no tokens": ((3, 0, 5), (7,), (2, 1), (2, 1)),
    "adapters, no columns": ((3, 0), (7,), (2, 1), (2, 1)),
    "adapters, no outputs": ((3, 5), (0,), (2, 1), (2, 1)),
}


def combinations() -> Iterator[Any]:
    """Case, implementation and dtype; of Triton, whose interpreter is slow, one dtype of each case is short."""
    for number, name in enumerate(CASES):
        for implementation in IMPLEMENTATIONS:
            dtypes = DTYPES.get(implementation, (torch.float32, torch.bfloat16))
            for place, dtype in enumerate(dtypes):
                is_short = implementation != "triton" or number % 3 == place
                marks = () if is_short else (pytest.mark.long, pytest.mark.interp_full)
                yield pytest.param(name, implementation, dtype, id=f"{name}-{implementation}-{dtype}", marks=marks)


class Runner:
    """The op and its gradients by one implementation."""

    def __init__(self, implementation: str, request: pytest.FixtureRequest) -> None:
        self.name = implementation
        self.device = "cpu"
        if implementation == "triton":
            pytest.importorskip("triton")
            from fastpeft.kernels.siva_linear import siva_linear
            from fastpeft.kernels.siva_linear_backward import siva_linear_backward

            self.device = request.getfixturevalue("device")
            request.getfixturevalue("bfloat16_products")
            self.forward, self.backward = siva_linear, siva_linear_backward
            return
        module = aten if implementation == "aten" else torch.ops.fastpeft
        if module is not aten:
            request.getfixturevalue("monkeypatch").setenv("FASTPEFT_SIMD", implementation.removeprefix("cpp-"))
        self.forward, self.backward = module.siva_linear, module.siva_linear_backward

    def operands(self, *case: Any, dtype: torch.dtype = torch.float32, sort: bool = True) -> list[Any]:
        """C++ takes factors in float32 alone."""
        args = layers(*case[:3], case[3] if len(case) > 3 else (), dtype, self.device, sort)
        if self.name in COMPILED:
            args[3:6] = [[factor.float() for factor in factors] for factors in args[3:6]]
        return args

    def both(self, args: Sequence[Any], dhs: list[Tensor], packed: bool = False) -> list[Any]:
        """What the op gives, and its gradients."""
        args, weights = list(args), None
        if packed:
            weights, dtype = args[1], args[0].dtype
            args[1], weights = ([Packs().of(w, dtype, turned) for w in weights] for turned in (False, True))
        hs, p = self.forward(*args)
        return flat([hs, p, *self.backward(*backward_of(dhs, args, p, weights=weights))])


@pytest.fixture
def runner(implementation: str, request: pytest.FixtureRequest) -> Runner:
    return Runner(implementation, request)


every = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
compiled = pytest.mark.parametrize("implementation", COMPILED[:1])


def check(runner: Runner, args: list[Any], needs: list[Any] | None = None, dhs: Any = None) -> None:
    """Run both directions, backward twice, and compare with float64: as accurate as plain PyTorch, the same bits."""
    dhs = [in_nan(dh) for dh in gradients_of(args)] if dhs is None else dhs
    plain = reference if runner.name in COMPILED else aten
    with poisoned_memory():
        actual = runner.forward(*args)
    makers = in_order, in_double, lambda given: absolute(in_double(given))
    expected = [flat(plain.siva_linear(*make(args))) for make in makers]
    assert_outputs(actual, expected)

    needs = needs or [True, [True] * len(args[3]), True, [bias is not None for bias in args[6]]]
    whole = backward_of(dhs, args, in_nan(expected[0][-1]), needs)
    expected = [flat(plain.siva_linear_backward(*make(whole))) for make in makers]
    unread = args[0].new_empty(0)  # what the autograd formula passes for an operand that no gradient needs
    whole[1] = whole[1] if needs[2] else unread
    whole[7] = whole[7] if any(needs[1]) else unread
    with poisoned_memory():
        actual, again = (runner.backward(*whole) for _ in range(2))
    assert_gradients(actual, again, needs, expected)


@pytest.mark.parametrize(("name", "implementation", "dtype"), list(combinations()))
def test_as_accurate_as_plain_pytorch(name: str, runner: Runner, dtype: torch.dtype) -> None:
    for sort in (True, False) if len(CASES[name]) > 3 else (True,):
        check(runner, each(in_nan, runner.operands(*CASES[name], dtype=dtype, sort=sort)))


@every
@pytest.mark.parametrize("name", EMPTY)
def test_sizes_of_0(name: str, runner: Runner) -> None:
    args = runner.operands(*EMPTY[name])
    dhs = gradients_of(args)
    with poisoned_memory():
        found = runner.both(args, dhs)
    hs, p = reference.siva_linear(*args)
    expected = flat([hs, p, *reference.siva_linear_backward(*backward_of(dhs, args, p))])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("implementation", COMPILED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [0, 1, 3, 4, 5, 16, 33, 64])
def test_every_rank_of_the_compiled_module(rank: int, runner: Runner, dtype: torch.dtype) -> None:
    for (m, k, n), adapters in itertools.product([(15, 17, 63), (65, 63, 17), (200, 97, 130)], (False, True)):
        ns, ranks, sizes = ((n,), (rank, 64 - rank), (m - 3, 3)) if adapters else ((n, 5), (rank, 3), ())
        check(runner, each(in_nan, runner.operands((m, k), ns, ranks, sizes, dtype=dtype)))


@pytest.mark.parametrize("implementation", ["triton"])
@pytest.mark.long(but="35-triton")
@pytest.mark.interp_full
@pytest.mark.parametrize("rank", range(1, 65))
def test_every_rank_of_triton(rank: int, runner: Runner) -> None:
    check(runner, each(in_nan, runner.operands((19, 35), (37, 41), (rank, 65 - rank))))
    check(runner, runner.operands((6, 3, 35), (37,), (rank, 65 - rank), (4, 2), dtype=torch.bfloat16))


@pytest.mark.parametrize("implementation", ["triton"])
@pytest.mark.long(but=("65-64-(1,)-bfloat16-triton", "127-17-(63,)-float16-triton"))
@pytest.mark.interp_full
@pytest.mark.parametrize("dtype", HALVES, ids=("bfloat16", "float16"))
@pytest.mark.parametrize("m", [1, 15, 17, 63, 65, 127])
@pytest.mark.parametrize("k", [1, 17, 64, 131])
@pytest.mark.parametrize("ns", [(1,), (63,), (129,), (1, 127, 65), (129, 15)], ids=str)
def test_every_ragged_size(m: int, k: int, ns: tuple[int, ...], runner: Runner, dtype: torch.dtype) -> None:
    ranks = tuple(1 + (m + 3 * k + 7 * i) % 64 for i in range(len(ns)))
    check(runner, each(in_nan, runner.operands((m, k), ns, ranks, dtype=dtype)))
    check(runner, each(in_nan, runner.operands((8, m, k), ns[:1], (*ranks[:1], 0, 9), (1, 4, 3), dtype=dtype)))


NEEDS: list[tuple[tuple[Any, ...], list[Any]]] = [
    *((((23, 35), (29,), (3,)), [x, [u], v, [b]]) for x, u, v, b in itertools.product((True, False), repeat=4)),
    (((23, 35), (29, 18), (3, 6)), [True, [True, False], False, [False, False]]),
    (((23, 35), (29, 18), (3, 6)), [True, [False, True], True, [False, True]]),
    (((23, 35), (29, 18), (3, 6)), [False, [False, True], False, [False, False]]),
    (((23, 35), (29, 18), (3, 6)), [False, [False, False], True, [True, False]]),
    (((6, 5, 35), (29,), (3, 6, 2), (2, 3, 1)), [True, [True, False, True], False, [False]]),
    (((6, 5, 35), (29,), (3, 6, 2), (2, 3, 1)), [True, [False] * 3, True, [True]]),
    (((6, 5, 35), (29,), (3, 6, 2), (2, 3, 1)), [False, [False, True, False], False, [False]]),
    (((6, 5, 35), (29,), (3, 6, 2), (2, 3, 1)), [False, [False] * 3, True, [False]]),
    (((6, 5, 35), (29,), (3, 6, 2), (2, 3, 1)), [True, [False] * 3, False, [False]]),
]


@every
def test_only_what_is_needed(runner: Runner) -> None:
    for case, needs in NEEDS:
        check(runner, runner.operands(*case), needs)


def turned(t: Tensor) -> Tensor:
    return t.transpose(0, -1).contiguous().transpose(0, -1)


@every
def test_strides(runner: Runner) -> None:
    for case in (((2, 3, 4, 33), (18, 20), (4, 3)), ((6, 4, 33), (18,), (4, 2), (2, 4))):
        x, weights, scales, us, ss, vs, biases, *rows = args = runner.operands(*case)
        if rows:
            rows = [rows[0], rows[1].repeat_interleave(2)[::2]]
        ss, biases = ([None if t is None else t.repeat_interleave(3)[::3] for t in ts] for ts in (ss, biases))
        weights, us, vs = ([turned(t) for t in ts] for ts in (weights, us, vs))  # as Conv1D stores its weight
        rest = weights, scales, us, ss, vs, biases, *rows
        check(runner, [turned(x), *rest], dhs=[turned(dh) for dh in gradients_of(args)])
        check(runner, [x[:1].expand(x.shape), *rest])
        # what `h.sum().backward()` passes
        check(runner, [x, *rest], dhs=[dh.new_ones(()).expand(dh.shape) for dh in gradients_of(args)])


@every
def test_a_quantised_weight_beside_a_dense_one(runner: Runner) -> None:
    for kind in ("int8", "nf4"):
        args = runner.operands((24, 33), (18, 20), (4, 3))
        held = QuantisedWeight(args[1][1].cpu(), kind)  # type: ignore[arg-type]
        args[1][1], args[2][1] = (t.data.to(runner.device) for t in (held.codes, held.scales))
        check(runner, args)
        args = runner.operands((4, 3, 33), (20,), (4, 3), (3, 1))
        held = QuantisedWeight(args[1][0].cpu(), kind)  # type: ignore[arg-type]
        args[1][0], args[2][0] = (t.data.to(runner.device) for t in (held.codes, held.scales))
        check(runner, args)


@pytest.mark.parametrize("implementation", ["aten", *COMPILED[:1]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["three layers", "adapters", "many rows"])
def test_packed_weights(name: str, runner: Runner, dtype: torch.dtype) -> None:
    args = runner.operands(*CASES[name], dtype=dtype)
    args[3:6] = [[factor.float() for factor in factors] for factors in args[3:6]]
    if not can_pack(args[1][0], dtype):
        pytest.skip("no oneDNN")
    dhs, close = gradients_of(args), 1e-5 if dtype is torch.float32 else 3e-2
    with poisoned_memory():
        found = runner.both(args, dhs, packed=True)
    for ours, plain in zip(found, runner.both(args, dhs), strict=True):
        assert ours.dtype is plain.dtype
        if plain.numel() == 0:
            continue
        torch.testing.assert_close(ours, plain, rtol=close, atol=close * max(1.0, plain.abs().max().item()))


@compiled
@pytest.mark.usefixtures("one_thread_after")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_repeats_and_threads_are_bit_equal(runner: Runner, dtype: torch.dtype, packed: bool) -> None:
    """With several tiles in a chunk and several chunks of an adapter."""
    for case in (((4200, 65), (33,), (5,)), ((4200, 65), (33,), (5, 4, 2), (2100, 3, 2097))):
        args, runs = runner.operands(*case, dtype=dtype), []
        if packed and not can_pack(args[1][0], dtype):
            pytest.skip("no oneDNN")
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            runs.append(runner.both(args, gradients_of(args), packed))
        for run in runs[1:]:  # p, each dU and dV; h, dx and db hold sums by BLAS and ATen
            assert all(map(torch.equal, [run[1], *run[3:-1]], [runs[0][1], *runs[0][3:-1]]))
        assert all(map(torch.equal, runs[1], runs[3]))


@compiled
def test_sorted_rows_have_the_same_bits(runner: Runner) -> None:
    args = runner.operands((30, 7, 65), (33,), (5, 2), (25, 5))
    order, dhs = args[8], gradients_of(args)
    found = runner.both(args, dhs)
    in_sorted = runner.both([args[0][order], *args[1:8], None], [dh[order] for dh in dhs])
    for i, (ours, theirs) in enumerate(zip(found, in_sorted, strict=True)):
        if i in (0, 2):  # h and dx
            torch.testing.assert_close(ours[order], theirs)
        elif i < len(found) - 1:
            assert torch.equal(ours, theirs)


@every
def test_what_is_left_to_aten(runner: Runner) -> None:
    for dtype, rank in ((torch.float64, 3), (torch.float16, 3), (torch.float32, 65)):
        if runner.name == "triton" and dtype is torch.float16:
            continue
        for case in (((5, 80), (70, 6), (rank, 2)), ((5, 3, 80), (70,), (rank, 2), (2, 3))):
            sizes = case[3] if len(case) > 3 else ()  # type: ignore[misc]
            args = layers(*case[:3], sizes, dtype, runner.device)
            dhs = gradients_of(args)
            hs, p = aten.siva_linear(*args)
            expected = flat([hs, p, *aten.siva_linear_backward(*backward_of(dhs, args, p))])
            assert all(map(torch.equal, runner.both(args, dhs), expected))


@every
def test_outputs_share_no_storage(runner: Runner) -> None:
    """As the schema says."""
    for name in ("three layers", "adapters"):
        args = runner.operands(*CASES[name])
        hs, p = runner.forward(*args)
        dx, dus, dv, dbiases = runner.backward(*backward_of(gradients_of(args), args, p))
        assert p.untyped_storage().data_ptr() not in {h.untyped_storage().data_ptr() for h in hs}
        storages = [{t.untyped_storage().data_ptr() for t in ts if t.numel()} for ts in ([dx], dus, [dv], dbiases)]
        assert all(one.isdisjoint(other) for one, other in itertools.combinations(storages, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["no leading dimension", "two leading dimensions", "adapters"])
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    args = layers(*CASES[name][:3], *CASES[name][3:], dtype=dtype)
    args[3:6] = [[factor.float() for factor in factors] for factors in args[3:6]]
    torch.library.opcheck(torch.ops.fastpeft.siva_linear.default, tuple(args))
    hs, p = torch.ops.fastpeft.siva_linear(*args)
    number, outputs = len(args[3]), len(hs)
    some = [i == 1 for i in range(number)]
    for needs in ([True, [True] * number, True, [True] * outputs], [False, some, False, [False] * outputs]):
        torch.library.opcheck(torch.ops.fastpeft.siva_linear_backward.default, tuple(backward_of(hs, args, p, needs)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["two leading dimensions", "adapters"])
def test_a_gpu_gives_what_the_cpu_gives(name: str) -> None:
    found = []
    for device in ("cpu", "cuda"):
        args = layers(*CASES[name][:3], *CASES[name][3:], device=device)
        hs, p = torch.ops.fastpeft.siva_linear(*args)
        dhs = gradients_of(args)
        found.append(
            [t.cpu() for t in flat([hs, p, *torch.ops.fastpeft.siva_linear_backward(*backward_of(dhs, args, p))])]
        )
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@compiled
def test_the_compiled_module_refuses_what_does_not_fit(runner: Runner) -> None:
    args = runner.operands((3, 2, 5), (4,), (2, 1), (1, 2))
    x, (weight,), _, us, ss, vs, (bias,), _, order = args
    of_forward: list[tuple[int, Any]] = [
        *((0, t) for t in (x[..., :4], x[0, 0], x[0])),
        *((1, [t]) for t in (weight[:3], weight[:, 0], weight.double())),
        *((3, t) for t in (us[:1], [us[0], us[1][:3]])),
        *((4, t) for t in (ss[::-1], ss[:1])),
        *((5, t) for t in ([vs[0], vs[1][:, :4]], vs[:1])),
        *((6, [t]) for t in (bias[:3], bias.bfloat16())),
        *((7, t) for t in ([1, 1], [4, -1], [3])),
        *((8, t) for t in (order[:2], order.int())),
    ]
    for place, changed in of_forward:
        with pytest.raises(RuntimeError, match="shapes fit together"):
            runner.forward(*args[:place], changed, *args[place + 1 :])
    hs, p = runner.forward(*args)
    whole = backward_of(hs, args, p)
    of_backward: list[tuple[int, Any]] = [
        (0, [hs[0][..., :3]]),
        (1, x[:, :1]),
        (2, [weight[:, :4]]),
        (7, p[:1]),
        (7, p.view(2, -1)),
        (9, [True]),
        (11, []),
        (12, [2, 2]),
    ]
    for place, changed in of_backward:
        with pytest.raises(RuntimeError, match="shapes fit together"):
            runner.backward(*whole[:place], changed, *whole[place + 1 :])
    one = runner.operands((3, 5), (4,), (2,))
    for place, changed in [(0, one[0][:, :4]), (3, [one[3][0][:3]]), (5, [one[5][0][:1]]), (6, [one[6][0][:2]])]:
        with pytest.raises(RuntimeError, match="shapes fit together"):
            runner.forward(*one[:place], changed, *one[place + 1 :])


@compiled
@pytest.mark.parametrize("wrong", [[0, 0, 1], [0, 1, 3], [-1, 0, 1]], ids=str)
def test_what_is_no_permutation_is_refused(wrong: list[int], runner: Runner) -> None:
    args = runner.operands((3, 5), (4,), (2, 1), (1, 2))
    _, p = runner.forward(*args)
    args[8] = torch.tensor(wrong)
    for call in (lambda: runner.forward(*args), lambda: runner.backward(*backward_of(gradients_of(args), args, p))):
        with pytest.raises(RuntimeError, match=r"order is \[.*each of 0 to 2 once"):
            call()
