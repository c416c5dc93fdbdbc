"""The noise contract: known answers, frozen bits, accuracy over every input, statistics."""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import shutil
import subprocess
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fastpeft.ops import noise

ROOT = Path(__file__).parents[2]
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "noise.json").read_text())
ALL_ONES = 2**32 - 1


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((ALL_ONES,) * 4, (ALL_ONES,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, int], expected: str) -> None:
    words = noise.philox(tuple(torch.tensor([c]) for c in counter), key)
    assert " ".join(f"{w:08x}" for w in words[0].tolist()) == expected


def test_counter_and_key_are_split_into_low_and_high_words() -> None:
    q, seed = 2**34 + 5, 2**40 + 9
    expected = noise.philox(tuple(torch.tensor([c]) for c in (5, 4, 1, 3)), (9, 2**8))
    assert torch.equal(noise.random_words(q, 1, seed, noise.STREAM_ROUNDING, ordinal=3), expected)


@pytest.mark.parametrize("case", GOLDEN["noise"], ids=lambda c: f"{c['noise']}-{c['seed']}-{c['first']}")
def test_golden_noise(case: dict) -> None:
    z = noise.NOISE[case["noise"]](case["first"], len(case["bits"]), case["seed"])
    assert [f"{bits & ALL_ONES:08x}" for bits in z.view(torch.int32).tolist()] == case["bits"]


@pytest.mark.parametrize("name", noise.NOISE)
@pytest.mark.parametrize("first", [0, 1, 2, 3, 127, 2**32 - 2, 2**50 + 3])
def test_any_part_of_the_noise_is_the_same_noise(name: str, first: int) -> None:
    whole = noise.NOISE[name](first, 300, 11)
    for start, count in ((0, 1), (1, 2), (5, 0), (126, 4), (250, 50)):
        assert torch.equal(noise.NOISE[name](first + start, count, 11), whole[start : start + count])


few = settings(max_examples=60, deadline=None)
AROUND = (300, 2**32, 2**34, 2**62)  # where a word or a counter ends
FIRST = st.tuples(st.sampled_from(AROUND), st.integers(-300, 300)).map(sum)
SEED = st.integers(0, 2**63 - 1) | st.sampled_from([0, 2**32 - 1, 2**32, 2**63 - 1])


def element(name: str, index: int, seed: int) -> float:
    """z of one flat index, by what the contract says of it alone."""
    if name == "rademacher":
        word = noise.random_words(index // 128, 1, seed, noise.STREAM_NOISE)[0, index % 128 // 32].item()
        return 1.0 - 2.0 * (word >> index % 32 & 1)
    words = noise.random_words(index // 4, 1, seed, noise.STREAM_NOISE)[0]
    pair = words[index % 4 // 2 * 2 :][:2]
    r, (cos, sin) = noise.radius(pair[:1]), noise.cos_sin(pair[1:])
    return (r * (cos, sin)[index % 2]).item()


@few
@given(st.sampled_from([*noise.NOISE]), FIRST, st.integers(0, 300), SEED, st.data())
def test_any_stretch_of_the_noise(name: str, first: int, count: int, seed: int, data: st.DataObject) -> None:
    z = noise.NOISE[name](first, count, seed)
    assert z.dtype is torch.float32
    assert z.shape == (count,)
    assert (z.abs() < 5.8).all()  # sqrt(-2 ln 2^-24)
    if count:
        at = data.draw(st.integers(0, count - 1))
        assert z[at].item() == element(name, first + at, seed)


@few
@given(st.integers(0, 50), st.floats(0, 1, exclude_max=True), SEED, st.lists(st.integers(0, 2**32 - 1), max_size=4))
def test_any_elements_are_kept_by_their_words(count: int, p: float, seed: int, ordinals: list[int]) -> None:
    kept = noise.kept(count, p, seed, ordinals)
    assert kept.shape == (len(ordinals), count)
    for row, ordinal in zip(kept, ordinals):
        words = noise.random_words(0, (count + 3) // 4, seed, noise.STREAM_DROPOUT, ordinal).flatten()[:count]
        assert row.tolist() == [word >= round(p * 2**32) for word in words.tolist()]


@few
@given(
    st.sampled_from([torch.bfloat16, torch.float16]),
    st.lists(st.floats(width=32) | st.sampled_from([65504.0, 65520.0, 2.0**-14, 2.0**-25, 1e-45]), max_size=8),
    FIRST,
    SEED,
)
def test_any_number_is_rounded_to_a_neighbour(dtype: torch.dtype, values: list[float], first: int, seed: int) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    found = noise.round_stochastic(x, dtype, first, seed)
    assert found.dtype is dtype
    nearest = x.to(dtype)
    apart = (_in_order(found) - _in_order(nearest)).abs().tolist()
    for value, rounded, near, steps in zip(x.tolist(), found.tolist(), nearest.tolist(), apart):
        if math.isnan(value):
            assert math.isnan(rounded)
        elif rounded != near:  # the neighbour on the other side
            assert steps == 1
            assert near != value
            assert (rounded > value) != (near > value)


def _in_order(half: torch.Tensor) -> torch.Tensor:
    """Numbers of a format with 16 bits as whole numbers in the same order, neighbours beside each other."""
    bits = half.view(torch.int16).to(torch.int32)
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


@pytest.fixture(scope="module")
def every_value() -> dict[str, torch.Tensor]:
    """What each of the 2^24 values of a word becomes."""
    parts = []
    for start in range(0, 2**24, 2**18):
        words = torch.arange(start, start + 2**18) << 8
        parts.append((noise.radius(words), *noise.cos_sin(words)))
    return {name: torch.cat(values) for name, values in zip(("radius", "cos", "sin"), zip(*parts))}


def _digest(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def test_every_value_has_the_frozen_bits(every_value: dict[str, torch.Tensor]) -> None:
    assert {name: _digest(values.numpy()) for name, values in every_value.items()} == GOLDEN["every_word"]


def test_every_value_is_within_the_contract(every_value: dict[str, torch.Tensor]) -> None:
    u = torch.arange(1, 2**24 + 1, dtype=torch.float64) * 2.0**-24
    exact_radius = (-2 * u.log()).sqrt()
    angle = 2 * math.pi * (u - 2.0**-24)
    error = {
        name: (every_value[name].double() - exact).abs().max().item()
        for name, exact in (("radius", exact_radius), ("cos", angle.cos()), ("sin", angle.sin()))
    }
    # z = R cos: the error of R times |cos| <= 1, of cos times R, and half an ulp (R < 8) of the product
    worst = error["radius"] + exact_radius.max().item() * max(error["cos"], error["sin"]) + 2.0**-22
    assert worst <= 2e-6, error


HARNESS = """
#include "normal.h"
extern "C" void every_word(float* radius, float* cos, float* sin) {
    for (uint32_t m = 0; m < (1u << 24); ++m) {
        radius[m] = fastpeft::radius(m << 8);
        const auto angle = fastpeft::cos_sin(m << 8);
        cos[m] = angle.cos;
        sin[m] = angle.sin;
    }
}
"""


@pytest.mark.long(but="-O3 -mfma -mavx2")
@pytest.mark.parametrize("flags", [["-O0"], ["-O3", "-mfma", "-mavx2"]], ids=" ".join)
def test_every_value_has_the_frozen_bits_in_cpp(flags: list[str], tmp_path: Path) -> None:
    """Also where the compiler vectorises and could fuse a product with a sum."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    if "-mavx2" in flags and not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("this processor has no AVX2")
    source, library = tmp_path / "harness.cpp", tmp_path / "harness.so"
    source.write_text(HARNESS)
    common = ["-std=c++17", "-ffp-contract=off", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]
    subprocess.run(["c++", *common, *flags, str(source), "-o", str(library)], check=True)
    values = {name: np.empty(2**24, np.float32) for name in ("radius", "cos", "sin")}
    ctypes.CDLL(str(library)).every_word(*(ctypes.c_void_p(v.ctypes.data) for v in values.values()))
    assert {name: _digest(v) for name, v in values.items()} == GOLDEN["every_word"]


def test_gaussian_statistics() -> None:
    n = 2**20
    z = noise.gaussian(12345, n, seed=2026).double()
    for moment, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(z.pow(moment).mean().item() - expected) < 5 * math.sqrt(variance / n), moment
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-4
    other = noise.gaussian(12345, n, seed=2027).double()
    neighbours = [(z * other).mean().item(), *((z[:-lag] * z[lag:]).mean().item() for lag in (1, 2, 3, 4, 128))]
    assert max(map(abs, neighbours)) < 5 / math.sqrt(n)


def test_rademacher_statistics() -> None:
    n = 2**20
    z = noise.rademacher(7, n, seed=2026)
    assert set(z.unique().tolist()) == {-1.0, 1.0}
    other = noise.rademacher(7, n, seed=2027)
    means = [z.mean().item(), (z * other).mean().item(), *((z[:-lag] * z[lag:]).mean().item() for lag in (1, 32, 128))]
    assert max(map(abs, means)) < 5 / math.sqrt(n)


def _spacing(magnitude: Fraction, dtype: torch.dtype) -> Fraction:
    """The distance of neighbouring numbers of `dtype` from `magnitude` on upwards."""
    bits, smallest = (7, -126) if dtype == torch.bfloat16 else (10, -14)
    exponent = smallest
    while magnitude >= Fraction(2) ** (exponent + 1):
        exponent += 1
    return Fraction(2) ** (exponent - bits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_by_definition(dtype: torch.dtype) -> None:
    """Against exact fractions: down to the multiple of the spacing below, one more if the word carries."""
    first, seed = 2**33 + 1, 5
    generator = torch.Generator().manual_seed(0)
    magnitudes = torch.exp2(torch.empty(400).uniform_(-30, 15, generator=generator))
    x = magnitudes * torch.where(torch.rand(400, generator=generator) < 0.5, -1.0, 1.0)
    x[:4] = torch.tensor([0.0, -0.0, 2.0**-14, 2.0**-24])
    words = noise.random_words(first // 4, 102, seed, noise.STREAM_ROUNDING).flatten()[1:401]
    dropped = 16 if dtype == torch.bfloat16 else 13
    actual = noise.round_stochastic(x, dtype, first, seed)
    for value, word, result in zip(x.tolist(), words.tolist(), actual.tolist()):
        spacing = _spacing(abs(Fraction(value)), dtype)
        units = abs(Fraction(value)) / spacing
        subnormal = dtype == torch.float16 and abs(value) < 2.0**-14
        fraction = Fraction(word, 2**32) if subnormal else Fraction(word >> (32 - dropped), 2**dropped)
        # float32 keeps more bits of a float16 subnormal than the 2^-56 that count
        kept = Fraction(math.floor(units * 2**32), 2**32) if subnormal else units
        expected = math.floor(kept + fraction) * spacing
        assert result == math.copysign(float(expected), value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [1 + 0.3 * 2**-10, -(0.625 + 0.3 * 2**-11), 5.3 * 2**-24])
def test_stochastic_rounding_is_unbiased(dtype: torch.dtype, value: float) -> None:
    n = 2**16
    x = torch.full((n,), value)
    rounded = noise.round_stochastic(x, dtype, 3, seed=1).double()
    below, above = rounded.min().item(), rounded.max().item()
    assert below < x[0].item() < above
    error = (rounded.mean().item() - x[0].item()) / (above - below)
    assert abs(error) < 5 * 0.5 / math.sqrt(n)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_keeps_what_is_exact_or_not_finite(dtype: torch.dtype) -> None:
    exact = torch.tensor(
        [0.0, -0.0, 1.0, -1.5, 2.0**-24, 3 * 2.0**-20, torch.finfo(dtype).max, torch.finfo(dtype).tiny]
    )
    for first in range(0, 400, 8):
        assert torch.equal(noise.round_stochastic(exact, dtype, first, seed=3).float(), exact)
    rounded = noise.round_stochastic(torch.tensor([math.inf, -math.inf, math.nan]), dtype, 0, seed=3)
    assert rounded[:2].tolist() == [math.inf, -math.inf]
    assert rounded[2].isnan()


def test_stochastic_rounding_overflows_to_infinity() -> None:
    largest = torch.finfo(torch.float16).max
    x = torch.full((1000,), largest + 8.0)  # a quarter of the way to 65536
    rounded = noise.round_stochastic(x, torch.float16, 0, seed=3)
    assert set(rounded.tolist()) == {largest, math.inf}


def test_single_and_double_precision_are_not_rounded() -> None:
    x = torch.tensor([0.1, -3.0])
    assert torch.equal(noise.round_stochastic(x, torch.float32, 0, seed=3), x)
    assert noise.round_stochastic(x.double(), torch.float64, 0, seed=3).dtype is torch.float64


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", noise.NOISE)
def test_a_gpu_draws_the_same_bits(name: str) -> None:
    draw = noise.NOISE[name]
    assert torch.equal(draw(2**33 + 1, 2**20, 9, device="cuda").cpu(), draw(2**33 + 1, 2**20, 9))
