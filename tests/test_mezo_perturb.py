"""mezo_perturb_: the reference and the compiled implementation, bit for bit, and the checked functions over them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastpeft import FastpeftError, backends, functional, noise, reference

GOLDEN = json.loads((Path(__file__).parent / "golden" / "noise.json").read_text())
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
ON_CPU = next(choice for choice in backends.choices() if (choice.op, choice.device) == ("mezo_perturb_", "cpu"))

Perturb = Callable[..., None]


def _op(*args: object) -> None:
    torch.ops.fastpeft.mezo_perturb_(*args)


needs_cpp = pytest.mark.skipif(ON_CPU.backend != "cpp", reason=f"the op runs on the reference: {ON_CPU.reason}")
implementations = pytest.mark.parametrize(
    "perturb", [pytest.param(reference.mezo_perturb_, id="reference"), pytest.param(_op, id="cpp", marks=needs_cpp)]
)


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(BITS[x.element_size()])


def _values(n: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Magnitudes from below float16's subnormals up."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, generator=generator) * torch.exp2(torch.empty(n).uniform_(-30, 3, generator=generator))).to(
        dtype
    )


@implementations
@pytest.mark.parametrize("case", GOLDEN["perturb"], ids=lambda c: f"{c['dtype']}-{c['noise']}-{c['rounding']}")
def test_golden_values(perturb: Perturb, case: dict) -> None:
    dtype = getattr(torch, case["dtype"])
    width = torch.finfo(dtype).bits
    integer = BITS[width // 8]
    before = [int(bits, 16) for bits in case["before"]]
    signed = [b - 2**width if b >= 2 ** (width - 1) else b for b in before]
    param = torch.tensor(signed, dtype=integer).view(dtype)
    perturb([param], [case["offset"]], case["seeds"], case["scales"], case["decay"], case["noise"], case["rounding"])
    after = [f"{bits & (2**width - 1):0{width // 4}x}" for bits in param.view(integer).tolist()]
    assert after == case["after"]


@needs_cpp
@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(tuple(noise.NOISE)),
    rounding=st.sampled_from(("nearest", "stochastic")),
    sizes=st.lists(st.integers(0, 300), max_size=3),
    offset=st.one_of(st.integers(0, 1000), st.integers(2**32 - 300, 2**32 + 300), st.integers(0, 2**62)),
    seeds=st.lists(st.integers(0, 2**63 - 1), max_size=3),
    scale=st.sampled_from((1e-3, -1.0, 1e-7, 0.0, 1e-42, 1e30)),
    decay=st.sampled_from((0.0, 0.01, 1.0)),
)
def test_cpp_has_the_bits_of_the_reference(
    dtype: torch.dtype,
    kind: str,
    rounding: str,
    sizes: list[int],
    offset: int,
    seeds: list[int],
    scale: float,
    decay: float,
) -> None:
    params = [_values(n, dtype, seed) for seed, n in enumerate(sizes)]
    offsets = [offset + 1000 * i for i in range(len(sizes))]
    scales = [scale / (i + 1) for i in range(len(seeds))]
    ours, theirs = ([p.clone() for p in params] for _ in range(2))
    _op(ours, offsets, seeds, scales, decay, kind, rounding)
    reference.mezo_perturb_(theirs, offsets, seeds, scales, decay, kind, rounding)
    for one, other in zip(ours, theirs):
        assert torch.equal(one.isnan(), other.isnan())  # which NaN it is, is nobody's promise
        assert torch.equal(_bits(one[~one.isnan()]), _bits(other[~other.isnan()]))


@implementations
def test_each_product_and_sum_is_rounded(perturb: Perturb) -> None:
    """Against numpy scalars, which know no fused operation."""
    param = _values(1001, torch.float32)
    z = noise.gaussian(5, 1001, 9).numpy()
    a, scale = np.float32(1 - 0.037), np.float32(0.123)
    expected = a * param.numpy() + scale * z
    perturb([param], [5], [9], [0.123], 0.037)
    assert np.array_equal(param.numpy(), expected)


@implementations
def test_double_precision_computes_in_double(perturb: Perturb) -> None:
    param = _values(100, torch.float64)
    z = noise.gaussian(0, 100, 9).double().numpy()
    expected = (1 - 0.037) * param.numpy() + 0.123 * z
    perturb([param], [0], [9], [0.123], 0.037)
    assert np.array_equal(param.numpy(), expected)


@implementations
@pytest.mark.parametrize("dtype", DTYPES)
def test_terms_are_separate_updates_and_decay_goes_with_the_first(perturb: Perturb, dtype: torch.dtype) -> None:
    at_once, one_by_one = (_values(500, dtype) for _ in range(2))
    perturb([at_once], [3], [1, 2, 3], [1e-2, -2e-2, 3e-2], 0.25, "gaussian", "stochastic")
    for seed, scale, decay in ((1, 1e-2, 0.25), (2, -2e-2, 0.0), (3, 3e-2, 0.0)):
        perturb([one_by_one], [3], [seed], [scale], decay, "gaussian", "stochastic")
    assert torch.equal(_bits(at_once), _bits(one_by_one))


@implementations
@pytest.mark.parametrize("kind", noise.NOISE)
def test_the_noise_follows_the_offset_not_the_tensor(perturb: Perturb, kind: str) -> None:
    """A tensor in one piece, in several, in another order, in another dtype: one z."""
    whole = torch.zeros(1000)
    perturb([whole], [2**32 - 500], [4], [1.0], 0.0, kind)
    parts = [torch.zeros(n, dtype=d) for n, d in ((601, torch.float64), (1, torch.float32), (398, torch.float32))]
    perturb(parts[::-1], [2**32 + 102, 2**32 + 101, 2**32 - 500], [4], [1.0], 0.0, kind)
    assert torch.equal(torch.cat([p.float() for p in parts]), whole)


STRIDED = {
    "transposed": lambda: _values(12 * 7, torch.float32).view(12, 7).t(),
    "permuted": lambda: _values(60, torch.float32).view(3, 4, 5).permute(2, 0, 1),
    "every other": lambda: _values(100, torch.float32)[::2],
    "columns": lambda: _values(100, torch.float32).view(10, 10)[:, 2:7],
    "channels last": lambda: _values(120, torch.float32).view(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "scalar": lambda: torch.tensor(0.5),
    "empty": lambda: torch.zeros(3, 0),
}


@implementations
@pytest.mark.parametrize("make", STRIDED.values(), ids=STRIDED)
def test_elements_are_counted_in_c_order_whatever_the_strides(perturb: Perturb, make: Callable[[], Tensor]) -> None:
    param = make()
    dense, strides = param.clone(memory_format=torch.contiguous_format), param.stride()
    perturb([param], [7], [1], [0.5], 0.1)
    perturb([dense], [7], [1], [0.5], 0.1)
    assert torch.equal(param, dense)
    assert param.stride() == strides


@implementations
def test_what_lies_between_the_elements_of_a_view_stays(perturb: Perturb) -> None:
    storage = torch.zeros(100)
    perturb([storage[1::2]], [0], [1], [1.0], 0.0)
    assert (storage[::2] == 0).all()
    assert (storage[1::2] != 0).all()


@implementations
def test_subnormals_are_kept(perturb: Perturb) -> None:
    smallest = 2.0**-149
    param = torch.full((64,), smallest)
    perturb([param], [0], [1], [smallest], 0.0, "rademacher")
    assert param.unique().tolist() == [0.0, 2 * smallest]


def test_the_reference_has_the_same_bits_in_any_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once, in_chunks = (_values(1000, torch.bfloat16) for _ in range(2))
    args = ([3], [1, 2], [0.1, 0.2], 0.1, "gaussian", "stochastic")
    reference.mezo_perturb_([at_once], *args)
    monkeypatch.setattr(reference, "NOISE_CHUNK", 37)
    reference.mezo_perturb_([in_chunks], *args)
    assert torch.equal(at_once, in_chunks)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_copying_form(dtype: torch.dtype) -> None:
    param = _values(60, dtype).view(6, 10).t()
    before = param.clone()
    out = functional.mezo_perturb(param, 3, [1, 2], [0.1, 0.2], 0.1)
    assert torch.equal(param, before)
    assert out.stride() == param.stride()
    functional.mezo_perturb_([param], [3], [1, 2], [0.1, 0.2], 0.1)
    assert torch.equal(out, param)


def test_autograd_notices_that_weights_changed() -> None:
    weight = torch.ones(3, requires_grad=True)
    loss = (weight * weight).sum()
    functional.mezo_perturb_([weight], [0], [1], [0.1])
    assert weight.requires_grad
    assert weight.grad_fn is None
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_opcheck() -> None:
    ops = torch.ops.fastpeft
    for dtype in (torch.float32, torch.bfloat16):
        params = [_values(12, dtype).view(3, 4), _values(5, dtype)]
        torch.library.opcheck(ops.mezo_perturb_.default, (params, [0, 12], [1, 2], [0.1, 0.2], 0.1))
        torch.library.opcheck(ops.mezo_perturb.default, (params[0].t(), 0, [1], [0.1], 0.0, "rademacher", "stochastic"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offsets": [0]}, "one offset per parameter"),
        ({"scales": [0.1, 0.2]}, "one scale per seed"),
        ({"offsets": [0, -1]}, "is -1; allowed are 0 to"),
        ({"seeds": [2**63]}, "allowed are 0 to"),
        ({"scales": [math.nan]}, "finite"),
        ({"scales": [1e39]}, "finite float32"),
        ({"decay": math.inf}, "finite"),
        ({"noise": "uniform"}, "'uniform'; allowed are gaussian, rademacher"),
        ({"rounding": "up"}, "'up'; allowed are nearest, stochastic"),
        ({"params": [torch.zeros(3), torch.zeros(3, dtype=torch.int64)]}, "torch.int64"),
        ({"params": [torch.zeros(3), torch.eye(3).to_sparse()]}, "torch.sparse_coo"),
        ({"params": [torch.zeros(3), torch.zeros(1).expand(3)]}, "parameter 1 .* twice"),
        ({"params": [torch.zeros(9).as_strided((3, 3), (1, 1)), torch.zeros(3)]}, "parameter 0 .* twice"),
    ],
)
def test_bad_input_is_refused(change: dict, message: str) -> None:
    arguments = {"params": [torch.zeros(3), torch.zeros(4)], "offsets": [0, 3], "seeds": [1], "scales": [0.1]} | change
    with pytest.raises(FastpeftError, match=message):
        functional.mezo_perturb_(**arguments)


def test_parameters_that_share_memory_are_refused() -> None:
    storage = torch.zeros(100)
    for one, other in ((storage, storage), (storage[:60], storage[50:]), (storage[::2], storage[1::2])):
        with pytest.raises(FastpeftError, match="share memory"):
            functional.mezo_perturb_([one, other], [0, 100], [1], [0.1])
    functional.mezo_perturb_([storage[50:], storage[:50]], [0, 100], [1], [0.1])
    assert (storage != 0).all()


@needs_cpp
def test_the_compiled_op_checks_what_could_reach_foreign_memory() -> None:
    for params, offsets, kind in (
        ([torch.zeros(3)], [], "gaussian"),
        ([torch.zeros(3)], [0], "uniform"),
        ([torch.zeros(3, dtype=torch.int32)], [0], "gaussian"),
    ):
        with pytest.raises(RuntimeError):
            _op(params, offsets, [1], [0.1], 0.0, kind)
