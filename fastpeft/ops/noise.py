"""The noise contract in plain PyTorch: z is a function of (seed, flat index) alone, to the last bit, on every device.

Integers come from Philox4x32 with counter `(lo32(q), hi32(q), stream, ordinal)` and key `(lo32(seed), hi32(seed))`: 7
rounds for the noise's stream, the fewest that pass BigCrush (Salmon et al., 2011), and 10 for the others. One counter q
makes four words.

- Gaussian: element i is lane `i % 8` of `q = i // 8`. The lower half of word k, as a signed number, is h_2k, its upper
  half h_2k+1. Each is a uniform number `u = (2 h + 1) / 2^16` between -1 and 1, bent by an odd function,
  `x = g (|g| A + B)^2` with `g = 2^31 u`. A Hadamard matrix of order 8 mixes the eight x: lane l is the sum over j of
  `(-1)^popcount(j & l) x_j`, added in three rounds, of neighbours 1, 2 and 4 apart.
- Rademacher: element i reads bit `i % 32` of word `(i % 128) // 32` of `q = i // 128`; 0 is +1, 1 is -1.
- Rounding and feature dropout: element i reads word `i % 4` of `q = i // 4`. Feature dropout of a side network keeps it
  where the word is at least `round(p * 2^32)`.

A and B are chosen for the moments of x: its cumulants of odd order are exactly 0, and those of even order give z a
variance of 1 to 1e-8, a fourth cumulant of 0 to 1e-7, a sixth of 0.00013 and an eighth of -0.021, where the normal
distribution has 0. No joint cumulant of the eight lanes is larger, so up to order 5 they are those of independent
normal numbers. The distribution function of z is within 1.1e-5 of the normal one. |z| is at most 8.33; beyond 4, 5 and
6 lie 0.3, 5 and 26 % less than there should. Along eight directions, the rows of the matrix, an octet is not normal:
there it is sqrt(8) x, of size 2.95 at most. `tests/ops/test_noise.py` computes all of this from the 2^16 values of x.

Every addition and multiplication below is one float32 operation, rounded by itself, in the order written here and in
`csrc/normal.h`. Never fuse two of them (`addcmul`, `add(alpha=...)`, fused multiply-add): that changes bits, and
`tests/golden` notices. A change of the numbers is a change of `NAMES`, by which a journal of MeZO tells its noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

STREAM_NOISE = 0
STREAM_ROUNDING = 1
STREAM_DROPOUT = 2

_MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)

ROUNDS = {STREAM_NOISE: 7, STREAM_ROUNDING: 10, STREAM_DROPOUT: 10}
NAMES = {"gaussian": "philox7-hadamard8", "rademacher": "philox7-bits"}  # of the kinds of noise as they are drawn here

# of x; exact in float32, repeated in csrc/normal.h
BEND_A = float.fromhex("0x1.1e301cp-45")
BEND_B = float.fromhex("-0x1.83b82ep-15")


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low words of the product of two 32-bit words, held in int64: it may wrap, its bits stay right."""
    product = a * b
    return (product >> 32) & _MASK, product & _MASK


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int | Tensor, int | Tensor], rounds: int
) -> Tensor:
    """Philox4x32: four int64 tensors `(n,)` of 32-bit words to `(n, 4)` random words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        high0, low0 = _multiply(c0, MULTIPLIERS[0])
        high1, low1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & _MASK, (k1 + WEYL[1]) & _MASK
    return torch.stack((c0, c1, c2, c3), dim=1)


def random_words(
    first: int, count: int, seed: int, stream: int, ordinal: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """The words `(count, 4)`, int64, of the counters q = first .. first + count - 1."""
    q = torch.arange(first, first + count, device=device)
    counter = (q & _MASK, q >> 32, torch.full_like(q, stream), torch.full_like(q, ordinal))
    return philox(counter, (seed & _MASK, (seed >> 32) & _MASK), ROUNDS[stream])


def bent(halves: Tensor) -> Tensor:
    """x of the halves h, integers from -2^15 to 2^15 - 1: float32, 8^-1/2 in standard deviation."""
    g = ((2 * halves + 1) << 15).to(torch.float32)  # exact
    s = g.abs() * BEND_A
    s = s + BEND_B
    s = s * s
    return s * g


def hadamard(x: Tensor) -> Tensor:
    """The mixed lanes `(n, 8)` of x `(n, 8)`."""
    for apart in (1, 2, 4):
        pairs = x.view(-1, 8 // (2 * apart), 2, apart)
        a, b = pairs.unbind(2)
        x = torch.stack((a + b, a - b), dim=2)
    return x.view(-1, 8)


def gaussian(first: int, count: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """z of the flat indices first .. first + count - 1: float32 `(count,)`, standard normal."""
    words = random_words(first // 8, (first + count + 7) // 8 - first // 8, seed, STREAM_NOISE, device=device)
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=2).view(-1, 8)
    halves = halves - ((halves & 0x8000) << 1)
    return hadamard(bent(halves)).flatten()[first % 8 : first % 8 + count]


def rademacher(first: int, count: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """z of the flat indices first .. first + count - 1: float32 `(count,)`, +1 or -1."""
    words = random_words(first // 128, (first + count + 127) // 128 - first // 128, seed, STREAM_NOISE, device=device)
    bits = (words.unsqueeze(2) >> torch.arange(32, device=device)) & 1
    signs = 1.0 - 2.0 * bits.flatten().to(torch.float32)
    return signs[first % 128 : first % 128 + count]


NOISE = {"gaussian": gaussian, "rademacher": rademacher}
ROUNDINGS = "stochastic", "nearest"  # of weights in fewer bits


def kept(
    count: int, p: float, seed: int | Tensor, ordinals: Sequence[int], device: torch.device | str = "cpu"
) -> Tensor:
    """Which of `count` elements dropout with probability p keeps, for each ordinal: bool `(len(ordinals), count)`.

    The seed may be an int64 tensor of one element.
    """
    counters = (count + 3) // 4
    q = torch.arange(counters, device=device).repeat(len(ordinals))
    ordinal = torch.tensor(ordinals, dtype=torch.long, device=device).repeat_interleave(counters)
    counter = (q & _MASK, q >> 32, torch.full_like(q, STREAM_DROPOUT), ordinal)
    words = philox(counter, (seed & _MASK, (seed >> 32) & _MASK), ROUNDS[STREAM_DROPOUT])
    return words.view(len(ordinals), 4 * counters)[:, :count] >= round(p * 2**32)


def round_stochastic(x: Tensor, dtype: torch.dtype, first: int, seed: int) -> Tensor:
    """Round float32 `x`, the flat indices from `first` on, to one of its two neighbours in `dtype`, unbiased.

    The magnitude, as a fixed-point number in units of the storage format's spacing there, gains the element's word
    of stream 1 as a fraction and is truncated:

    - bfloat16: the upper 16 bits of the word are added to the float32's bit pattern, whose lower 16 bits are dropped;
    - float16 from its smallest normal 2^-14 on: the upper 13 bits likewise, 13 bits are dropped;
    - float16 below that, where the spacing is 2^-24: `(trunc(|x| * 2^56) + w) >> 32` is the multiple of 2^-24.

    What has a neighbour on one side only (a value that is exact) stays; beyond the largest finite number the neighbour
    is infinity, as it is for rounding to nearest. Infinities and NaN pass, float32 and float64 are not rounded.
    """
    if dtype in (torch.float32, torch.float64):
        return x.to(dtype)
    words = random_words(first // 4, (first + x.numel() + 3) // 4 - first // 4, seed, STREAM_ROUNDING, device=x.device)
    words = words.flatten()[first % 4 : first % 4 + x.numel()]
    dropped = 16 if dtype == torch.bfloat16 else 13
    bits = x.view(torch.int32).to(torch.int64) & _MASK
    bits = ((bits + (words >> (32 - dropped))) >> dropped) << dropped
    rounded = bits.to(torch.int32).view(torch.float32)
    if dtype == torch.float16:
        small = x.abs() < 2.0**-14
        units = ((torch.where(small, x.abs(), 0.0) * 2.0**56).to(torch.int64) + words) >> 32
        rounded = torch.where(small, (units.to(torch.float32) * 2.0**-24).copysign(x), rounded)
    return torch.where(x.isfinite(), rounded, x).to(dtype)
