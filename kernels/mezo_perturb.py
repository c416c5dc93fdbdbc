"""MeZO's perturbation, `p <- round(fl(fl(a p) + fl(scale z)))`: z is drawn where it is added and never stored.

    Q  counters of the noise in a program, of four elements each        E = 4 Q elements, in C order

The bits are those of `fastpeft.ops.noise`, which states the contract; the lines follow `csrc/normal.h` and
`csrc/storage.h` in the same order. Every float32 operation is rounded by itself: the compiler's contraction is off and
the square root is the rounded one. bfloat16 goes as its bits, since casts in Triton's interpreter truncate and lose
subnormals. One launch for each tensor; the compiled module `fastpeft._C_cuda`, where it was built, takes one for all.

Source: MeZO (Malladi et al., 2023, arXiv 2305.17333); Philox (Salmon et al., 2011).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpeft.kernels.launch import device_of
from fastpeft.kernels.philox import in_order, random_words
from fastpeft.kernels.tiles import MEZO_PERTURB
from fastpeft.ops import noise as contract

# a kernel reads numbers of its module only in this form
_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7 = (tl.constexpr(number) for number in contract.LOG)
_S0, _S1, _S2, _S3 = (tl.constexpr(number) for number in contract.SIN)
_C0, _C1, _C2, _C3 = (tl.constexpr(number) for number in contract.COS)
_LN2 = tl.constexpr(contract.LN2)
_SQRT_HALF_BITS = tl.constexpr(contract.SQRT_HALF_BITS)
_NOISE, _ROUNDING = tl.constexpr(contract.STREAM_NOISE), tl.constexpr(contract.STREAM_ROUNDING)


@triton.jit
def _radius(word):
    """`sqrt(-2 ln u)`, float32, with `u = ((w >> 8) + 1) 2^-24`."""
    u = ((word >> 8) + 1).to(tl.int32).to(tl.float32) * (1.0 / (1 << 24))
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - _SQRT_HALF_BITS) >> 23
    t = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    p = t * _L7 + _L6
    p = p * t + _L5
    p = p * t + _L4
    p = p * t + _L3
    p = p * t + _L2
    p = p * t + _L1
    p = p * t + _L0
    logarithm = t + (t * t) * p
    logarithm = logarithm + exponent.to(tl.float32) * _LN2
    return tl.sqrt_rn(logarithm * -2.0)


@triton.jit
def _cos_sin(word):
    """`cos(2 pi v)` and `sin(2 pi v)`, float32, with `v = (w >> 8) 2^-24`."""
    turned = ((word >> 8) + (1 << 21)).to(tl.int32)
    quadrant = (turned >> 22) & 3
    t = ((turned & 0x3FFFFF) - (1 << 21)).to(tl.float32) * (1.0 / (1 << 21))
    square = t * t
    sin = square * _S3 + _S2
    sin = sin * square + _S1
    sin = sin * square + _S0
    sin = t * sin
    cos = square * _C3 + _C2
    cos = cos * square + _C1
    cos = cos * square + _C0
    swap = (quadrant & 1) == 1
    cos, sin = tl.where(swap, sin, cos), tl.where(swap, cos, sin)
    return tl.where(((quadrant + 1) & 2) == 2, -cos, cos), tl.where((quadrant & 2) == 2, -sin, sin)


@triton.jit
def _gaussian(q, seed):
    """z (E,) of the counters q (Q,)."""
    w0, w1, w2, w3 = random_words(q, seed, 0, _NOISE)
    r0, r2 = _radius(w0), _radius(w2)
    cos1, sin1 = _cos_sin(w1)
    cos3, sin3 = _cos_sin(w3)
    return in_order(r0 * cos1, r0 * sin1, r2 * cos3, r2 * sin3)


@triton.jit
def _rademacher(q, seed):
    """z (E,) of the quads q (Q,): four of the 128 bits of counter q // 32."""
    w0, w1, w2, w3 = random_words(q >> 5, seed, 0, _NOISE)
    place = (q & 31).to(tl.int32)
    word = tl.where(place < 16, tl.where(place < 8, w0, w1), tl.where(place < 24, w2, w3))
    bits = (word >> ((place & 7) * 4).to(tl.uint32)).to(tl.int32)
    odd = in_order(bits & 1, (bits >> 1) & 1, (bits >> 2) & 1, (bits >> 3) & 1)
    return tl.where(odd == 1, -1.0, 1.0)


@triton.jit
def _round_stochastic(x, word, IS_BF16: tl.constexpr):
    """float32 x (E,) to one of its two neighbours in the storage format, as float32."""
    bits = x.to(tl.uint32, bitcast=True)
    DROPPED: tl.constexpr = 16 if IS_BF16 else 13
    added = tl.add(bits, word >> (32 - DROPPED), sanitize_overflow=False)
    rounded = ((added >> DROPPED) << DROPPED).to(tl.float32, bitcast=True)
    rounded = tl.where((bits & 0x7F800000) == 0x7F800000, x, rounded)
    if not IS_BF16:
        # below 2^-14 the spacing is 2^-24 throughout: whole ones, and a fraction of 32 bits
        magnitude = tl.abs(x)
        small = magnitude < 1.0 / (1 << 14)
        units = tl.where(small, magnitude, 0.0) * (1.0 * (1 << 24))
        whole = units.to(tl.int32)
        upper = (units - whole.to(tl.float32)) * 65536.0
        lower = (upper - upper.to(tl.int32).to(tl.float32)) * 65536.0
        fraction = (upper.to(tl.int32).to(tl.uint32) << 16) | lower.to(tl.int32).to(tl.uint32)
        carried = (whole + (fraction > (word ^ 0xFFFFFFFF)).to(tl.int32)).to(tl.float32) * (1.0 / (1 << 24))
        signed = (carried.to(tl.uint32, bitcast=True) | (bits & 0x80000000)).to(tl.float32, bitcast=True)
        rounded = tl.where(small, signed, rounded)
    return rounded


@triton.jit
def _widen(p, IS_BF16: tl.constexpr):
    """Stored elements to float32 or float64."""
    if IS_BF16:
        return (p.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return p if p.dtype == tl.float64 else p.to(tl.float32)


@triton.jit
def _narrow(x, dtype: tl.constexpr, IS_BF16: tl.constexpr):
    """To the nearest stored elements, ties to even."""
    if IS_BF16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = tl.add(bits, 0x7FFF + ((bits >> 16) & 1), sanitize_overflow=False)
        return (tl.where(x == x, nearest, bits | 0x400000) >> 16).to(tl.uint16).to(dtype, bitcast=True)
    return x.to(dtype)


@triton.jit
def _mezo_perturb_kernel(
    p_ptr,
    seeds_ptr,
    scales_ptr,
    keep_ptr,
    offset,
    numel,
    num_terms,
    IS_BF16: tl.constexpr,
    IS_RADEMACHER: tl.constexpr,
    IS_STOCHASTIC: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    # 1. This program's counters, and where their elements lie in the tensor: the first may begin before it.
    element_type: tl.constexpr = p_ptr.dtype.element_ty
    compute: tl.constexpr = tl.float64 if element_type == tl.float64 else tl.float32
    first_q = offset // 4 + tl.program_id(0).to(tl.int64) * BLOCK_Q
    q = first_q + tl.arange(0, BLOCK_Q)
    offs_e = first_q * 4 - offset + tl.arange(0, 4 * BLOCK_Q)
    mask_e = (offs_e >= 0) & (offs_e < numel)

    # 2. Term after term, each rounded to storage; what a decay leaves goes with the first.
    p = tl.load(p_ptr + offs_e, mask=mask_e, other=0)
    keep = tl.load(keep_ptr).to(compute)
    for term in range(num_terms):
        seed = tl.load(seeds_ptr + term)
        scale = tl.load(scales_ptr + term).to(compute)
        z = _rademacher(q, seed) if IS_RADEMACHER else _gaussian(q, seed)
        kept = _widen(p, IS_BF16) * keep
        value = kept + z.to(compute) * scale
        if IS_STOCHASTIC:
            w0, w1, w2, w3 = random_words(q, seed, 0, _ROUNDING)
            value = _round_stochastic(value, in_order(w0, w1, w2, w3), IS_BF16)
        p = _narrow(value, element_type, IS_BF16)
        keep = tl.full((), 1.0, compute)
    tl.store(p_ptr + offs_e, p, mask=mask_e)


def mezo_perturb_replay_(
    params: list[Tensor],
    offsets: list[int],
    seeds: Tensor,
    scales: Tensor,
    decay: float,
    noise: str = "gaussian",
    rounding: str = "nearest",
) -> None:
    """Terms (seed, scale) in order on each tensor, in place; any strides.

    Args:
        params: float16, bfloat16, float32 or float64, on one device.
        offsets: flat index of each tensor's first element.
        seeds: `(n,)` int64 on that device, read when the kernel runs, as are
        scales: `(n,)` float64.
        decay: a = 1 - decay for the first term, 1 for the others.
        noise: "gaussian" or "rademacher".
        rounding: "nearest" or "stochastic"; float32 and float64 are stored as computed.
    """
    keep = torch.full((), 1.0 - decay, dtype=torch.float64, device=seeds.device)
    for param, offset in zip(params, offsets):
        if param.numel() == 0:
            continue
        # C order of the logical tensor: a view, or a copy that is written back; a reshape may be a view with gaps
        flat = param.contiguous().view(-1)
        quads = (offset + flat.numel() + 3) // 4 - offset // 4
        with device_of(param):
            _mezo_perturb_kernel[(triton.cdiv(quads, MEZO_PERTURB.block_q),)](
                flat.view(torch.int16) if param.dtype == torch.bfloat16 else flat,
                seeds,
                scales,
                keep,
                offset,
                flat.numel(),
                seeds.numel(),
                IS_BF16=param.dtype == torch.bfloat16,
                IS_RADEMACHER=noise == "rademacher",
                IS_STOCHASTIC=rounding == "stochastic" and param.element_size() == 2,
                BLOCK_Q=MEZO_PERTURB.block_q,
                num_warps=MEZO_PERTURB.num_warps,
                enable_fp_fusion=False,
            )
        if not param.is_contiguous():
            param.copy_(flat.view(param.shape))


def mezo_perturb_(
    params: list[Tensor],
    offsets: list[int],
    seeds: list[int],
    scales: list[float],
    decay: float,
    noise: str = "gaussian",
    rounding: str = "nearest",
) -> None:
    """`mezo_perturb_replay_` with the terms as numbers, which are copied to the device."""
    for device in dict.fromkeys(param.device for param in params):
        here = [(param, offset) for param, offset in zip(params, offsets) if param.device == device]
        terms = (torch.tensor(seeds, dtype=torch.int64), torch.tensor(scales, dtype=torch.float64))
        mezo_perturb_replay_(
            [param for param, _ in here],
            [offset for _, offset in here],
            *(term.to(device) for term in terms),
            decay,
            noise,
            rounding,
        )


def mezo_perturb(
    param: Tensor,
    offset: int,
    seeds: list[int],
    scales: list[float],
    decay: float,
    noise: str = "gaussian",
    rounding: str = "nearest",
) -> Tensor:
    """`mezo_perturb_` on a copy of `param`."""
    out = param.detach().clone()
    mezo_perturb_([out], [offset], seeds, scales, decay, noise, rounding)
    return out
