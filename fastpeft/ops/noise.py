"""The noise contract in plain PyTorch: z is a function of (seed, flat index) alone, to the last bit, on every device.

Integers come from Philox4x32-10 with counter `(lo32(q), hi32(q), stream, ordinal)` and key `(lo32(seed), hi32(seed))`.
One counter q makes four words, so element i reads word `i % 4` of `q = i // 4`.

- Gaussian: word pairs (0, 1) and (2, 3) go through Box-Muller, `u = ((w >> 8) + 1) * 2^-24` of the first word for the
  radius `R = sqrt(-2 ln u)`, `v = (w >> 8) * 2^-24` of the second for the angle; the lanes are `R cos(2 pi v)` and
  `R sin(2 pi v)`.
- Rademacher: element i reads bit `i % 32` of word `(i % 128) // 32` of `q = i // 128`; 0 is +1, 1 is -1.
- Feature dropout of a side network keeps element i where its word is at least `round(p * 2^32)`.

Logarithm, sine and cosine are polynomials behind an exact integer range reduction. Every addition, multiplication and
square root below is one float32 operation, rounded by itself, in the order written here and in `csrc/normal.h`. Never
fuse two of them (`addcmul`, `add(alpha=...)`, fused multiply-add): that changes bits, and `tests/golden` notices.
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

# lowest power first; all exact in float32, all repeated in csrc/normal.h
LOG = (  # ln(1 + t) = t + t^2 P(t) on [sqrt(1/2) - 1, sqrt(2) - 1)
    -0.5,
    float.fromhex("0x1.5556d8p-2"),
    float.fromhex("-0x1.000380p-2"),
    float.fromhex("0x1.98d824p-3"),
    float.fromhex("-0x1.5382a4p-3"),
    float.fromhex("0x1.3172fap-3"),
    float.fromhex("-0x1.242fd0p-3"),
    float.fromhex("0x1.645e52p-4"),
)
LN2 = float.fromhex("0x1.62e430p-1")
SQRT_HALF_BITS = 0x3F3504F3
SIN = (  # sin(pi/4 t) = t P(t^2) on [-1, 1)
    float.fromhex("0x1.921fb6p-1"),
    float.fromhex("-0x1.4abc24p-4"),
    float.fromhex("0x1.4680a4p-9"),
    float.fromhex("-0x1.33198ep-15"),
)
COS = (  # cos(pi/4 t) = P(t^2) on [-1, 1)
    1.0,
    float.fromhex("-0x1.3bd3a2p-2"),
    float.fromhex("0x1.03b18ep-6"),
    float.fromhex("-0x1.4eb112p-12"),
)


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low words of the product of two 32-bit words, held in int64: it may wrap, its bits stay right."""
    product = a * b
    return (product >> 32) & _MASK, product & _MASK


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> Tensor:
    """Philox4x32-10: four int64 tensors `(n,)` of 32-bit words to `(n, 4)` random words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
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
    return philox(counter, (seed & _MASK, (seed >> 32) & _MASK))


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    """Horner's rule, each product and each sum rounded to float32."""
    result = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        result = result * x
        result = result + coefficient
    return result


def radius(words: Tensor) -> Tensor:
    """`sqrt(-2 ln u)`, float32, with `u = ((w >> 8) + 1) * 2^-24`."""
    u = ((words >> 8) + 1).to(torch.float32) * 2.0**-24
    bits = u.view(torch.int32)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    t = (bits - (exponent << 23)).view(torch.float32) - 1.0  # u = (1 + t) 2^exponent
    logarithm = t + (t * t) * _polynomial(LOG, t)
    logarithm = logarithm + exponent.to(torch.float32) * LN2
    # through float64: float32 sqrt on a CPU may come from a vector library that is free in its last bit, while a
    # float64 root, even one that is an ulp off, lies on the right side of every float32 midpoint
    return (logarithm * -2.0).to(torch.float64).sqrt().to(torch.float32)


def cos_sin(words: Tensor) -> tuple[Tensor, Tensor]:
    """`cos(2 pi v)` and `sin(2 pi v)`, float32, with `v = (w >> 8) * 2^-24`."""
    turned = (words >> 8) + (1 << 21)  # an eighth of a turn, so that truncating finds the nearest quadrant
    quadrant = (turned >> 22) & 3
    t = ((turned & ((1 << 22) - 1)) - (1 << 21)).to(torch.float32) * 2.0**-21
    square = t * t
    sin = t * _polynomial(SIN, square)
    cos = _polynomial(COS, square)
    swap = (quadrant & 1) == 1
    cos, sin = torch.where(swap, sin, cos), torch.where(swap, cos, sin)
    return torch.where(((quadrant + 1) & 2) == 2, -cos, cos), torch.where((quadrant & 2) == 2, -sin, sin)


def gaussian(first: int, count: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """z of the flat indices first .. first + count - 1: float32 `(count,)`, standard normal."""
    words = random_words(first // 4, (first + count + 3) // 4 - first // 4, seed, STREAM_NOISE, device=device)
    r = radius(words[:, 0::2])
    cos, sin = cos_sin(words[:, 1::2])
    lanes = torch.stack((r * cos, r * sin), dim=2).flatten()
    return lanes[first % 4 : first % 4 + count]


def rademacher(first: int, count: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """z of the flat indices first .. first + count - 1: float32 `(count,)`, +1 or -1."""
    words = random_words(first // 128, (first + count + 127) // 128 - first // 128, seed, STREAM_NOISE, device=device)
    bits = (words.unsqueeze(2) >> torch.arange(32, device=device)) & 1
    signs = 1.0 - 2.0 * bits.flatten().to(torch.float32)
    return signs[first % 128 : first % 128 + count]


NOISE = {"gaussian": gaussian, "rademacher": rademacher}


def kept(count: int, p: float, seed: int, ordinals: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Which of `count` elements dropout with probability p keeps, for each ordinal: bool `(len(ordinals), count)`."""
    q = torch.arange((count + 3) // 4, device=device).repeat(len(ordinals))
    ordinal = torch.tensor(ordinals, dtype=torch.long, device=device).repeat_interleave((count + 3) // 4)
    counter = (q & _MASK, q >> 32, torch.full_like(q, STREAM_DROPOUT), ordinal)
    words = philox(counter, (seed & _MASK, (seed >> 32) & _MASK)).view(len(ordinals), 4 * ((count + 3) // 4))
    return words[:, :count] >= round(p * 2**32)


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
