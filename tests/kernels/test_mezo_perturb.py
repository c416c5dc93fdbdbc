"""The Triton perturbation against the golden values and, bit for bit, the reference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bits import BITS, DTYPES, assert_same_bits, bits, values
from torch import Tensor

from fastpeft.ops import noise, reference

pytest.importorskip("triton")
from launches import Recording

from fastpeft.kernels import mezo_perturb as kernel

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "noise.json").read_text())
FIRST, N = 8 * kernel.MEZO_PERTURB.block_q - 5, 8 * kernel.MEZO_PERTURB.block_q + 9  # three programs, ragged ends


def _values(n: int, dtype: torch.dtype, device: str) -> Tensor:
    """Magnitudes from below float16's subnormals up, then what is not finite."""
    generator = torch.Generator().manual_seed(n)
    exponents = torch.empty(n).uniform_(-30, 3, generator=generator)
    values = (torch.randn(n, generator=generator) * torch.exp2(exponents)).to(dtype)
    values[-3:] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    return values.to(device)


@pytest.mark.parametrize("case", GOLDEN["noise"], ids=lambda c: f"{c['noise']}-{c['seed']}-{c['first']}")
def test_golden_noise(case: dict, device: str) -> None:
    z = torch.zeros(len(case["bits"]), device=device)
    kernel.mezo_perturb_([z], [case["first"]], [case["seed"]], [1.0], 0.0, case["noise"])
    assert [f"{bits & 0xFFFFFFFF:08x}" for bits in z.view(torch.int32).tolist()] == case["bits"]


@pytest.mark.parametrize("case", GOLDEN["perturb"], ids=lambda c: f"{c['dtype']}-{c['noise']}-{c['rounding']}")
def test_golden_perturbations(case: dict, device: str) -> None:
    dtype = getattr(torch, case["dtype"])
    width = torch.finfo(dtype).bits
    before = [int(bits, 16) for bits in case["before"]]
    signed = [bits - 2**width if bits >= 2 ** (width - 1) else bits for bits in before]
    param = torch.tensor(signed, dtype=BITS[width // 8]).view(dtype).to(device)
    kernel.mezo_perturb_(
        [param], [case["offset"]], case["seeds"], case["scales"], case["decay"], case["noise"], case["rounding"]
    )
    after = [f"{bits & (2**width - 1):0{width // 4}x}" for bits in param.view(BITS[width // 8]).tolist()]
    assert after == case["after"]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("kind", noise.NOISE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_of_the_reference(dtype: torch.dtype, kind: str, rounding: str, device: str) -> None:
    for offset in (FIRST, 2**32 - FIRST, 2**40 + 3):
        ours, theirs = (_values(N, dtype, device) for _ in range(2))
        for perturb, param in ((kernel.mezo_perturb_, ours), (reference.mezo_perturb_, theirs)):
            perturb([param], [offset], [7, 2**62 + 1], [1e-3, -2e-5], 0.3, kind, rounding)
        assert_same_bits(ours, theirs)


@pytest.mark.long(but="torch.bfloat16-nearest")
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_precision_number(dtype: torch.dtype, rounding: str, device: str) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).to(device)
    for decay in (0.3, -0.7, 1 - 2.0**-9):
        ours, theirs = every.clone(), every.clone()
        kernel.mezo_perturb_([ours], [3], [1], [0.0], decay, "gaussian", rounding)
        reference.mezo_perturb_([theirs], [3], [1], [0.0], decay, "gaussian", rounding)
        assert_same_bits(ours, theirs)


def test_nothing_around_a_tensor_is_touched(device: str) -> None:
    room = torch.full((60,), torch.nan, device=device)
    view = room[7:30].fill_(1.0)
    kernel.mezo_perturb_([view], [5], [1], [0.1], 0.0)
    assert room[:7].isnan().all()
    assert room[30:].isnan().all()
    assert not view.isnan().any()


def test_strides_several_tensors_and_none(device: str) -> None:
    make = (lambda: torch.ones(6, 10, device=device).t(), lambda: torch.ones(3, 0, device=device))
    ours, theirs = ([*(f() for f in make), torch.ones((), device=device)] for _ in range(2))
    for perturb, params in ((kernel.mezo_perturb_, ours), (reference.mezo_perturb_, theirs)):
        perturb(params, [7, 67, 67], [1, 2], [0.5, 0.25], 0.1)
    for one, other in zip(ours, theirs):
        assert torch.equal(one, other)
    assert ours[0].stride() == (1, 10)


def test_all_tensors_of_a_dtype_take_one_launch(device: str) -> None:
    """Less and more than a program's elements, on 16 bytes and off, whole programs among ragged ones."""
    sizes, starts, offsets = (1, 5, 5000, 0, 4100, 2060, 64), (0, 3, 0, 1, 8, 2, 1), (0, 1, 6, 6, 2**40, 4_105, 7)
    room = [values(n + 9, dtype, seed=n).to(device) for n in sizes for dtype in DTYPES]
    places = [(start, n, offset) for start, n, offset in zip(starts, sizes, offsets) for _ in DTYPES]
    ours = [storage[start : start + n] for storage, (start, n, _) in zip(room, places)]
    around, theirs = [storage.clone() for storage in room], [param.clone() for param in ours]
    args = ([offset for *_, offset in places], [7, 2**62 + 1], [1e-3, -2e-5], 0.3, "gaussian", "stochastic")
    kernel.mezo_perturb_(ours, *args)
    with Recording() as recorded:
        kernel.mezo_perturb_(ours, *args)
    assert recorded.counted.pop("_to_copy", 0) <= 1, "the terms of all launches go to the GPU together"
    assert recorded.counted == {"_mezo_perturb_kernel": len(DTYPES)}
    for _ in range(2):
        reference.mezo_perturb_(theirs, *args)
    for storage, before, (start, n, _), param, expected in zip(room, around, places, ours, theirs):
        assert_same_bits(param, expected)
        assert torch.equal(bits(storage)[:start], bits(before)[:start])
        assert torch.equal(bits(storage)[start + n :], bits(before)[start + n :])


def test_the_table_is_made_once_and_follows_tensors_that_move(device: str) -> None:
    ours, theirs = [torch.zeros(n, device=device) for n in (9, 40)], [torch.zeros(n, device=device) for n in (9, 40)]
    kernel._table.cache_clear()
    for step in range(4):
        if step == 2:
            ours[0].data = ours[0].clone()
        for perturb, params in ((kernel.mezo_perturb_, ours), (reference.mezo_perturb_, theirs)):
            perturb(params, [0, 9], [step], [1.0], 0.0)
    assert kernel._table.cache_info().misses == 2
    for one, other in zip(ours, theirs):
        assert torch.equal(one, other)


def test_no_terms_leave_a_tensor_as_it_is(device: str) -> None:
    param = _values(20, torch.bfloat16, device)
    before = param.clone()
    kernel.mezo_perturb_([param], [0], [], [], 0.5)
    assert_same_bits(param, before)


def test_the_copying_form(device: str) -> None:
    param = _values(60, torch.float32, device)[:54].view(6, 9).t()
    before = param.clone()
    out = kernel.mezo_perturb(param, 3, [1], [0.1], 0.1)
    assert torch.equal(param, before)
    assert torch.equal(out, reference.mezo_perturb(param, 3, [1], [0.1], 0.1))
