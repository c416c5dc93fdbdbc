"""mezo_perturb_: the reference and the compiled implementation, bit for bit, and the checked functions over them."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from bits import BITS, DTYPES, assert_same_bits, bits, values
from hypothesis import given, settings
from hypothesis import strategies as st
from instructions import supported
from torch import Tensor

from fastpeft import FastpeftError, functional
from fastpeft.ops import backends, noise, reference

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "noise.json").read_text())
ON_CPU = next(choice for choice in backends.choices() if (choice.op, choice.device) == ("mezo_perturb_", "cpu"))

Perturb = Callable[..., None]


def _op(*args: object) -> None:
    torch.ops.fastpeft.mezo_perturb_(*args)


needs_cpp = pytest.mark.skipif(ON_CPU.backend != "cpp", reason=f"the op runs on the reference: {ON_CPU.reason}")


def _compiled_for(instructions: str) -> Perturb:
    """The compiled op on its variant for these instructions."""

    def perturb(*args: object) -> None:
        with mock.patch.dict(os.environ, FASTPEFT_SIMD=instructions):
            _op(*args)

    return perturb


VARIANTS = [pytest.param(_compiled_for(name), id=name) for name in supported()]
compiled = pytest.mark.parametrize("perturb", VARIANTS)
implementations = pytest.mark.parametrize("perturb", [pytest.param(reference.mezo_perturb_, id="reference"), *VARIANTS])


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


@compiled
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
def test_compiled_variants_have_the_bits_of_the_reference(
    perturb: Perturb,
    dtype: torch.dtype,
    kind: str,
    rounding: str,
    sizes: list[int],
    offset: int,
    seeds: list[int],
    scale: float,
    decay: float,
) -> None:
    params = [values(n, dtype, seed) for seed, n in enumerate(sizes)]
    offsets = [offset + 1000 * i for i in range(len(sizes))]
    scales = [scale / (i + 1) for i in range(len(seeds))]
    ours, theirs = ([p.clone() for p in params] for _ in range(2))
    perturb(ours, offsets, seeds, scales, decay, kind, rounding)
    reference.mezo_perturb_(theirs, offsets, seeds, scales, decay, kind, rounding)
    for one, other in zip(ours, theirs):
        assert_same_bits(one, other)


@compiled
@pytest.mark.usefixtures("one_thread_after")
@pytest.mark.parametrize("kind", noise.NOISE)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_work_is_split_without_a_trace(perturb: Perturb, threads: int, kind: str) -> None:
    """Over tensors that span tiles, parts of threads and each other's ends, from an offset that no tile begins at."""
    sizes = (1, 70_001, 4096, 3, 31_000)
    offsets = [2**32 - 50_001, 5, 4096, 123_457, 2**40]
    dtypes = (torch.float32, torch.bfloat16, torch.float32, torch.float64, torch.float16)
    ours, theirs = ([values(n, d, seed=n) for n, d in zip(sizes, dtypes)] for _ in range(2))
    torch.set_num_threads(threads)
    perturb(ours, offsets, [1, 2], [1e-3, -2e-3], 0.01, kind, "stochastic")
    reference.mezo_perturb_(theirs, offsets, [1, 2], [1e-3, -2e-3], 0.01, kind, "stochastic")
    for one, other in zip(ours, theirs):
        assert_same_bits(one, other)


@compiled
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_precision_number_is_read_and_rounded_as_by_pytorch(
    perturb: Perturb, dtype: torch.dtype, rounding: str
) -> None:
    """Infinities, NaN and subnormals among them; the factors round in every exponent, and overflow."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    for decay, scale in ((0.0, 0.0), (0.3, 0.0), (-0.7, 1e-8), (1 - 2.0**-9, 0.0)):
        ours, theirs = every.clone(), every.clone()
        perturb([ours], [3], [1], [scale], decay, "gaussian", rounding)
        reference.mezo_perturb_([theirs], [3], [1], [scale], decay, "gaussian", rounding)
        assert_same_bits(ours, theirs)


@implementations
@pytest.mark.parametrize("change", [{"offsets": [0]}, {"scales": [0.1]}])
def test_lists_of_other_lengths_are_refused(perturb: Perturb, change: dict[str, list]) -> None:
    lists = {"params": [torch.zeros(3)] * 2, "offsets": [0, 3], "seeds": [1, 2], "scales": [0.1, 0.2]} | change
    with pytest.raises((ValueError, RuntimeError), match=r"shorter|one (offset|scale)"):
        perturb(*lists.values(), 0.0, "gaussian", "nearest")


@implementations
def test_each_product_and_sum_is_rounded(perturb: Perturb) -> None:
    """Against numpy scalars, which know no fused operation."""
    param = values(1001, torch.float32)
    z = noise.gaussian(5, 1001, 9).numpy()
    a, scale = np.float32(1 - 0.037), np.float32(0.123)
    expected = a * param.numpy() + scale * z
    perturb([param], [5], [9], [0.123], 0.037)
    assert np.array_equal(param.numpy(), expected)


@implementations
def test_double_precision_computes_in_double(perturb: Perturb) -> None:
    param = values(100, torch.float64)
    z = noise.gaussian(0, 100, 9).double().numpy()
    expected = (1 - 0.037) * param.numpy() + 0.123 * z
    perturb([param], [0], [9], [0.123], 0.037)
    assert np.array_equal(param.numpy(), expected)


@implementations
@pytest.mark.parametrize("dtype", DTYPES)
def test_terms_are_separate_updates_and_decay_goes_with_the_first(perturb: Perturb, dtype: torch.dtype) -> None:
    at_once, one_by_one = (values(500, dtype) for _ in range(2))
    perturb([at_once], [3], [1, 2, 3], [1e-2, -2e-2, 3e-2], 0.25, "gaussian", "stochastic")
    for seed, scale, decay in ((1, 1e-2, 0.25), (2, -2e-2, 0.0), (3, 3e-2, 0.0)):
        perturb([one_by_one], [3], [seed], [scale], decay, "gaussian", "stochastic")
    assert torch.equal(bits(at_once), bits(one_by_one))


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
    "transposed": lambda: values(12 * 7, torch.float32).view(12, 7).t(),
    "permuted": lambda: values(60, torch.float32).view(3, 4, 5).permute(2, 0, 1),
    "every other": lambda: values(100, torch.float32)[::2],
    "columns": lambda: values(100, torch.float32).view(10, 10)[:, 2:7],
    "more than a tile": lambda: values(90 * 130, torch.float32).view(90, 130).t(),
    "channels last": lambda: values(120, torch.float32).view(2, 3, 4, 5).to(memory_format=torch.channels_last),
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


@compiled
def test_a_mode_that_flushes_subnormals_is_put_aside_and_restored(perturb: Perturb) -> None:
    smallest = 2.0**-149
    param, other = torch.full((10,), 8 * smallest), torch.full((10,), 8 * smallest)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush subnormals")
    try:
        perturb([param], [0], [1], [smallest], 0.0, "rademacher")
        still_flushed = other * 1.0
    finally:
        torch.set_flush_denormal(False)
    assert set(param.tolist()) == {7 * smallest, 9 * smallest}
    assert (still_flushed == 0).all()


def test_the_reference_has_the_same_bits_in_any_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once, in_chunks = (values(1000, torch.bfloat16) for _ in range(2))
    args = ([3], [1, 2], [0.1, 0.2], 0.1, "gaussian", "stochastic")
    reference.mezo_perturb_([at_once], *args)
    monkeypatch.setattr("fastpeft.ops.mezo_perturb.NOISE_CHUNK", 37)
    reference.mezo_perturb_([in_chunks], *args)
    assert torch.equal(at_once, in_chunks)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_copying_form(dtype: torch.dtype) -> None:
    param = values(60, dtype).view(6, 10).t()
    before = param.clone()
    out = functional.mezo_perturb(param, 3, [1, 2], [0.1, 0.2], 0.1)
    assert torch.equal(param, before)
    assert out.stride() == param.stride()
    functional.mezo_perturb_([param], [3], [1, 2], [0.1, 0.2], 0.1)
    assert torch.equal(out, param)


def test_the_copy_of_a_repeated_row_is_whole() -> None:
    row = values(5, torch.float32)
    out = functional.mezo_perturb(row.expand(3, 5), 2, [1], [0.5])
    whole = row.repeat(3, 1)
    functional.mezo_perturb_([whole], [2], [1], [0.5])
    assert torch.equal(out, whole)


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
        params = [values(12, dtype).view(3, 4), values(5, dtype)]
        torch.library.opcheck(ops.mezo_perturb_.default, (params, [0, 12], [1, 2], [0.1, 0.2], 0.1))
        torch.library.opcheck(ops.mezo_perturb.default, (params[0].t(), 0, [1], [0.1], 0.0, "rademacher", "stochastic"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offsets": [0]}, "one offset per parameter"),
        ({"scales": [0.1, 0.2]}, "one scale per seed"),
        ({"offsets": [0, -1]}, "is -1; allowed are whole numbers"),
        ({"seeds": [2**63]}, "allowed are .* 0 to"),
        ({"seeds": [1.5]}, r"is 1\.5; allowed are whole numbers"),
        ({"offsets": torch.tensor([0, 3])}, r"is tensor\(0\); allowed are whole numbers"),
        ({"scales": [math.nan]}, "finite"),
        ({"scales": [1e39]}, "finite float32"),
        ({"decay": math.inf}, "finite"),
        ({"decay": 0.1, "seeds": [], "scales": []}, r"decay is 0\.1\. .* no term was given"),
        ({"noise": "uniform"}, "'uniform'; allowed are gaussian, rademacher"),
        ({"rounding": "up"}, "'up'; allowed are stochastic, nearest"),
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
    for params, offsets, kind, message in (
        ([torch.zeros(3)], [], "gaussian", "takes one offset per parameter"),
        ([torch.zeros(3)], [0], "uniform", "noise is 'uniform'; allowed are"),
        ([torch.zeros(3, dtype=torch.int32)], [0], "gaussian", "takes float16, bfloat16, float32 and float64"),
    ):
        with pytest.raises(RuntimeError, match=message):
            _op(params, offsets, [1], [0.1], 0.0, kind)


@needs_cpp
def test_instructions_that_are_not_known_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"FASTPEFT_SIMD is 'mmx'; allowed on this processor are .*baseline"):
        _compiled_for("mmx")([torch.zeros(3)], [0], [1], [0.1], 0.0)


PEAK = """
import resource, torch, fastpeft.functional
op = torch.ops.fastpeft.mezo_perturb_
params = [torch.zeros(2**22), torch.zeros(2**11, 2**11).t(), torch.zeros(2**22, dtype=torch.bfloat16)]
op([p[:1] for p in params], [0, 0, 0], [1], [1.0], 0.0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
op(params, [0, 0, 0], [1, 2], [1.0, 1.0], 0.0, "gaussian", "stochastic")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.long
@needs_cpp
@pytest.mark.skipif(sys.platform != "linux", reason="counts KiB as Linux does")
def test_a_pass_in_place_needs_no_memory_to_speak_of() -> None:
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True)
    assert int(done.stdout) < 1024, done.stderr
