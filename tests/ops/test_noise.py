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


ZEROS, ONES = ((0, 0, 0, 0), (0, 0)), ((ALL_ONES,) * 4, (ALL_ONES,) * 2)
PI = ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0))


@pytest.mark.parametrize(
    ("rounds", "given", "expected"),
    [
        (7, ZEROS, "5f6fb709 0d893f64 4f121f81 4f730a48"),
        (7, ONES, "5207ddc2 45165e59 4d8ee751 8c52f662"),
        (7, PI, "4dfccaba 190a87f0 c47362ba b6b5242a"),
        (10, ZEROS, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (10, ONES, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (10, PI, "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(rounds: int, given: tuple[tuple[int, ...], tuple[int, int]], expected: str) -> None:
    counter, key = given
    words = noise.philox(tuple(torch.tensor([c]) for c in counter), key, rounds)
    assert " ".join(f"{w:08x}" for w in words[0].tolist()) == expected


def test_counter_and_key_are_split_into_low_and_high_words() -> None:
    q, seed = 2**34 + 5, 2**40 + 9
    expected = noise.philox(tuple(torch.tensor([c]) for c in (5, 4, 1, 3)), (9, 2**8), 10)
    assert torch.equal(noise.random_words(q, 1, seed, noise.STREAM_ROUNDING, ordinal=3), expected)


def test_the_stream_of_the_noise_has_fewer_rounds_than_the_others() -> None:
    drawn = [noise.random_words(5, 1, 9, stream) for stream in range(3)]
    for stream, (words, rounds) in enumerate(zip(drawn, (7, 10, 10), strict=True)):
        counter = tuple(torch.tensor([c]) for c in (5, 0, stream, 0))
        assert torch.equal(words, noise.philox(counter, (9, 0), rounds))


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
    words = noise.random_words(index // 8, 1, seed, noise.STREAM_NOISE)[0].tolist()
    a, b = np.float32(noise.BEND_A), np.float32(noise.BEND_B)
    x = []
    for half in (half for word in words for half in (word & 0xFFFF, word >> 16)):
        g = np.float32((2 * (half - 2**16 * (half >> 15)) + 1) * 2**15)
        bent = abs(g) * a + b
        x.append(g * (bent * bent))  # a power may be rounded otherwise

    def lane(first: int, count: int, which: int) -> np.float32:
        """Of `count` x from `first` on the sum with the signs of row `which` of the matrix."""
        if count == 1:
            return x[first]
        one, other = (lane(at, count // 2, which % (count // 2)) for at in (first, first + count // 2))
        return one - other if which >= count // 2 else one + other

    return float(lane(0, 8, index % 8))


@few
@given(st.sampled_from([*noise.NOISE]), FIRST, st.integers(0, 300), SEED, st.data())
def test_any_stretch_of_the_noise(name: str, first: int, count: int, seed: int, data: st.DataObject) -> None:
    z = noise.NOISE[name](first, count, seed)
    assert z.dtype is torch.float32
    assert z.shape == (count,)
    assert (z.abs() < 8.33).all()
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
def every_x() -> np.ndarray:
    """x of each of the 2^16 halves."""
    return noise.bent(torch.arange(-(2**15), 2**15)).numpy()


def _digest(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def test_every_half_has_the_frozen_bits(every_x: np.ndarray) -> None:
    assert _digest(every_x) == GOLDEN["every_half"]


def test_another_noise_has_another_name() -> None:
    """Journals tell their noise by it: new golden values come with a new name."""
    assert GOLDEN["names"] == noise.NAMES


def test_mixing_is_by_a_hadamard_matrix() -> None:
    matrix = noise.hadamard(torch.eye(8))
    signs = [[(-1) ** (row & column).bit_count() for column in range(8)] for row in range(8)]
    assert matrix.tolist() == signs


def test_moments_of_all_lanes_are_those_of_independent_normal_numbers(every_x: np.ndarray) -> None:
    """A joint cumulant of n lanes is that of x times the sum over its eight columns of products of n signs."""
    x = every_x.astype(np.float64)
    assert np.array_equal(x, -x[::-1])  # so odd moments are exactly 0
    m2, m4, m6, m8 = (8 ** (power / 2) * (x**power).mean() for power in (2, 4, 6, 8))
    fourth = m4 - 3 * m2**2
    sixth = m6 - 15 * m4 * m2 + 30 * m2**3
    eighth = m8 - 28 * m6 * m2 - 35 * m4**2 + 420 * m4 * m2**2 - 630 * m2**4
    assert abs(m2 - 1) < 1e-8
    assert abs(fourth / 8) < 1.1e-7
    assert abs(sixth / 8**2 - 1.3e-4) < 1e-5
    assert abs(eighth / 8**3 + 0.021) < 1e-3


def test_the_distribution_is_normal_far_into_the_tails(every_x: np.ndarray) -> None:
    """That of the sum of eight x, by the eighth power of a Fourier transform over a grid of 2^-15.4."""
    size, step = 2**20, 24 / 2**20
    places = every_x / step
    below = np.floor(places)
    probability = np.zeros(size)
    for at, share in ((below, 1 - (places - below)), (below + 1, places - below)):
        np.add.at(probability, at.astype(int) % size, share / every_x.size)
    density = np.roll(np.fft.irfft(np.fft.rfft(probability) ** 8, size), size // 2)
    z = (np.arange(size) - size // 2) * step
    assert np.abs(np.cumsum(density) - density / 2 - stats.norm.cdf(z)).max() < 1.1e-5
    for tail, less in ((3, -0.001), (4, 0.003), (5, 0.055), (6, 0.26)):
        assert abs(1 - density[z > tail].sum() / stats.norm.sf(tail) - less) < 0.1 * abs(less) + 3e-4, tail
    assert 8.32 < 8 * every_x.max() < 8.33
    inside = np.abs(z) < 3.5
    smooth = density.reshape(-1, 64).mean(1) / step
    normal = stats.norm.pdf(z).reshape(-1, 64).mean(1)
    assert np.abs(smooth / normal - 1)[inside[::64]].max() < 1.6e-3


HARNESS = """
#include "normal.h"
extern "C" void every_half(float* x) {
    for (uint32_t h = 0; h < (1u << 16); ++h) x[h] = fastpeft::bent_half((h ^ 0x8000u) << 16);
}
"""


@pytest.mark.long(but="-O3 -mfma -mavx2")
@pytest.mark.parametrize("flags", [["-O0"], ["-O3", "-mfma", "-mavx2"]], ids=" ".join)
def test_every_half_has_the_frozen_bits_in_cpp(flags: list[str], tmp_path: Path) -> None:
    """Also where the compiler vectorises and could fuse a product with a sum."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    if "-mavx2" in flags and not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("this processor has no AVX2")
    source, library = tmp_path / "harness.cpp", tmp_path / "harness.so"
    source.write_text(HARNESS)
    common = ["-std=c++17", "-ffp-contract=off", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]
    subprocess.run(["c++", *common, *flags, str(source), "-o", str(library)], check=True)
    x = np.empty(2**16, np.float32)
    ctypes.CDLL(str(library)).every_half(ctypes.c_void_p(x.ctypes.data))
    assert _digest(x) == GOLDEN["every_half"]


def test_gaussian_statistics() -> None:
    n = 2**20
    z = noise.gaussian(12345, n, seed=2026).double()
    for moment, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(z.pow(moment).mean().item() - expected) < 5 * math.sqrt(variance / n), moment
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-4
    other = noise.gaussian(12345, n, seed=2027).double()
    neighbours = [(z * other).mean().item(), *((z[:-lag] * z[lag:]).mean().item() for lag in (1, 2, 3, 4, 8, 128))]
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
