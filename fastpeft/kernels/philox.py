"""The random words of the noise contract, `fastpeft.ops.noise`, for kernels that draw them where they are used."""

from __future__ import annotations

import triton
import triton.language as tl

from fastpeft.ops import noise as contract

# a kernel reads numbers of its module only in this form
_M0, _M1 = (tl.constexpr(number) for number in contract.MULTIPLIERS)
_K0, _K1 = (tl.constexpr(number) for number in contract.WEYL)
_NOISE = tl.constexpr(contract.STREAM_NOISE)
_NOISE_ROUNDS = tl.constexpr(contract.ROUNDS[contract.STREAM_NOISE])
_ROUNDS = tl.constexpr(contract.ROUNDS[contract.STREAM_ROUNDING])  # of dropout too


@triton.jit
def random_words(q, seed, ordinal, STREAM: tl.constexpr):
    """Philox4x32 of the counters q int64, of any shape: four tensors of that shape of uint32."""
    c0 = (q & 0xFFFFFFFF).to(tl.uint32)
    c1 = (q >> 32).to(tl.uint32)
    c2 = tl.full(q.shape, STREAM, tl.uint32)
    c3 = tl.full(q.shape, ordinal, tl.uint32)
    k0 = tl.full(q.shape, 0, tl.uint32) + (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = tl.full(q.shape, 0, tl.uint32) + (seed >> 32).to(tl.uint32)
    m0 = tl.full(q.shape, _M0, tl.uint32)
    m1 = tl.full(q.shape, _M1, tl.uint32)
    w0 = tl.full(q.shape, _K0, tl.uint32)
    w1 = tl.full(q.shape, _K1, tl.uint32)
    ROUNDS: tl.constexpr = _NOISE_ROUNDS if STREAM == _NOISE else _ROUNDS
    for _ in tl.static_range(ROUNDS):
        high0, low0 = tl.umulhi(m0, c0), tl.mul(m0, c0, sanitize_overflow=False)
        high1, low1 = tl.umulhi(m1, c2), tl.mul(m1, c2, sanitize_overflow=False)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = tl.add(k0, w0, sanitize_overflow=False)
        k1 = tl.add(k1, w1, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def in_order(a, b, c, d):
    """Four lanes (*, Q) of each counter to the elements (*, 4 Q) they belong to."""
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def eight_in_order(a, b, c, d, e, f, g, h):
    """Eight lanes (Q,) of each counter to the elements (8 Q,) they belong to."""
    return tl.interleave(in_order(a, c, e, g), in_order(b, d, f, h))
