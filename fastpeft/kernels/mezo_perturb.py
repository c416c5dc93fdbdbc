"""MeZO's perturbation, `p <- round(fl(fl(a p) + fl(scale z)))`: z is drawn where it is added and never stored.

    Q  counters of the noise in a program, of eight elements each        E = 8 Q elements, in C order

The bits are those of `fastpeft.ops.noise`, which states the contract; the lines follow `csrc/normal.h` and
`csrc/storage.h` in the same order. Every float32 operation is rounded by itself: the compiler's contraction is off.
bfloat16 goes as its bits, since casts in Triton's interpreter truncate and lose subnormals.

All tensors of a dtype take one launch: a table in the GPU's memory has their addresses and places in the noise, and
another the tensor of each program. Both are made once for a list of tensors, and kept as long as these lie where they
lay. A thread moves 16 bytes at once where all that its program moves lies inside the tensor and on 16 bytes.

For sm_90 the Gaussian pass is compiled to 26 (float16), 28 (float32) and 34 instructions (bfloat16) an element.

Source: MeZO (Malladi et al., 2023, arXiv 2305.17333); Philox (Salmon et al., 2011).
"""

from __future__ import annotations

import itertools
import struct
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpeft.kernels.philox import eight_in_order, random_words
from fastpeft.kernels.tiles import MEZO_PERTURB
from fastpeft.ops import noise as contract

# a kernel reads numbers of its module only in this form
_A, _B = tl.constexpr(contract.BEND_A), tl.constexpr(contract.BEND_B)
_NOISE, _ROUNDING = tl.constexpr(contract.STREAM_NOISE), tl.constexpr(contract.STREAM_ROUNDING)


@triton.jit
def _bent(half):
    """x, float32, of the halves (Q,) in the upper 16 bits of words."""
    g = (half | 0x8000).to(tl.int32, bitcast=True).to(tl.float32)
    s = tl.abs(g) * _A + _B
    s = s * s
    return s * g


@triton.jit
def _gaussian(q, seed):
    """z (E,) of the counters q (Q,): x of each half of the words, mixed by a Hadamard matrix."""
    w0, w1, w2, w3 = random_words(q, seed, 0, _NOISE)
    a, b = _bent(w0 << 16), _bent(w0 & 0xFFFF0000)
    c, d = _bent(w1 << 16), _bent(w1 & 0xFFFF0000)
    e, f = _bent(w2 << 16), _bent(w2 & 0xFFFF0000)
    g, h = _bent(w3 << 16), _bent(w3 & 0xFFFF0000)
    a, b, c, d, e, f, g, h = a + b, a - b, c + d, c - d, e + f, e - f, g + h, g - h
    a, b, c, d, e, f, g, h = a + c, b + d, a - c, b - d, e + g, f + h, e - g, f - h
    return eight_in_order(a + e, b + f, c + g, d + h, a - e, b - f, c - g, d - h)


@triton.jit
def _rademacher(q, seed):
    """z (E,) of the octets q (Q,): eight of the 128 bits of counter q // 16."""
    w0, w1, w2, w3 = random_words(q >> 4, seed, 0, _NOISE)
    place = (q & 15).to(tl.int32)
    word = tl.where(place < 8, tl.where(place < 4, w0, w1), tl.where(place < 12, w2, w3))
    bits = (word >> ((place & 3) * 8).to(tl.uint32)).to(tl.int32)
    lower = bits & 1, (bits >> 1) & 1, (bits >> 2) & 1, (bits >> 3) & 1
    upper = (bits >> 4) & 1, (bits >> 5) & 1, (bits >> 6) & 1, (bits >> 7) & 1
    return tl.where(eight_in_order(*lower, *upper) == 1, -1.0, 1.0)


@triton.jit
def _rounding_words(q, seed):
    """The words (E,) by which the elements of the octets q (Q,) are rounded: of the counters 2 q and 2 q + 1."""
    return eight_in_order(*random_words(2 * q, seed, 0, _ROUNDING), *random_words(2 * q + 1, seed, 0, _ROUNDING))


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


@triton.jit(do_not_specialize=["keep_bits"])
def _mezo_perturb_kernel(
    table_ptr,
    tensor_ptr,
    seeds_ptr,
    scales_ptr,
    keep_bits,
    num_terms,
    dtype: tl.constexpr,
    IS_RADEMACHER: tl.constexpr,
    IS_STOCHASTIC: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    # 1. This program's tensor, its counters, and where their elements lie: the first may begin before the tensor.
    IS_BF16: tl.constexpr = dtype == tl.int16
    compute: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    row = table_ptr + 4 * tl.load(tensor_ptr + tl.program_id(0)).to(tl.int64)
    address, offset, numel, first_program = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    first_q = offset // 8 + (tl.program_id(0) - first_program) * BLOCK_Q
    first_e = first_q * 8 - offset
    q = first_q + tl.arange(0, BLOCK_Q)
    p_ptr = address.to(tl.pointer_type(dtype), bitcast=True) + first_e
    is_wide = (first_e >= 0) & (first_e + 8 * BLOCK_Q <= numel) & (p_ptr.to(tl.int64, bitcast=True) % 16 == 0)
    if is_wide:
        p = tl.load(tl.multiple_of(p_ptr, 16) + tl.arange(0, 8 * BLOCK_Q))
    else:
        offs_e = first_e + tl.arange(0, 8 * BLOCK_Q)
        p = tl.load(p_ptr + tl.arange(0, 8 * BLOCK_Q), mask=(offs_e >= 0) & (offs_e < numel), other=0)

    # 2. Term after term, each rounded to storage; what a decay leaves goes with the first.
    keep = keep_bits.to(tl.int64).to(tl.float64, bitcast=True).to(compute)
    for term in range(num_terms):
        seed = tl.load(seeds_ptr + term)
        scale = tl.load(scales_ptr + term).to(compute)
        z = _rademacher(q, seed) if IS_RADEMACHER else _gaussian(q, seed)
        kept = _widen(p, IS_BF16) * tl.where(term == 0, keep, 1.0)
        value = kept + z.to(compute) * scale
        if IS_STOCHASTIC:
            value = _round_stochastic(value, _rounding_words(q, seed), IS_BF16)
        p = _narrow(value, dtype, IS_BF16)
    if is_wide:
        tl.store(tl.multiple_of(p_ptr, 16) + tl.arange(0, 8 * BLOCK_Q), p)
    else:
        offs_e = first_e + tl.arange(0, 8 * BLOCK_Q)
        tl.store(p_ptr + tl.arange(0, 8 * BLOCK_Q), p, mask=(offs_e >= 0) & (offs_e < numel))


_ELEMENTS = {torch.float16: tl.float16, torch.bfloat16: tl.int16, torch.float32: tl.float32, torch.float64: tl.float64}
_MOST_TABLES = 512  # of lists of tensors; with `restore="exact"` MeZO has one for each module


class _Table(NamedTuple):
    """Where the tensors of a launch lie.

    Attributes:
        tensors: `(n, 4)` int64: of each its address, its offset in the noise, its elements and its first program.
        of_program: `(programs,)` int32: the tensor of each program.
    """

    tensors: Tensor
    of_program: Tensor


@lru_cache(maxsize=_MOST_TABLES)
def _table(places: tuple[tuple[int, int, int], ...], device: torch.device) -> _Table:
    """The table of tensors that lie at `places`: address, offset and elements of each."""
    octets = [(offset + numel + 7) // 8 - offset // 8 for _, offset, numel in places]
    programs = [triton.cdiv(count, MEZO_PERTURB.block_q) for count in octets]
    firsts = itertools.accumulate(programs[:-1], initial=0)
    of_program = torch.arange(len(places), dtype=torch.int32).repeat_interleave(torch.tensor(programs))
    tensors = torch.tensor([(*place, first) for place, first in zip(places, firsts)], dtype=torch.int64)
    return _Table(tensors.to(device), of_program.to(device))


def _bits(*numbers: float) -> tuple[int, ...]:
    """Doubles as integers of the same bits: a launcher of Triton rounds a number to float32."""
    return struct.unpack(f"{len(numbers)}q", struct.pack(f"{len(numbers)}d", *numbers))


def mezo_perturb_(
    params: list[Tensor],
    offsets: list[int],
    seeds: list[int],
    scales: list[float],
    decay: float,
    noise: str = "gaussian",
    rounding: str = "nearest",
) -> None:
    """Terms (seed, scale) in order on each tensor, in place; any strides.

    Args:
        params: float16, bfloat16, float32 or float64.
        offsets: flat index of each tensor's first element.
        seeds, scales: one of each a term; they go to each device in one copy.
        decay: a = 1 - decay for the first term, 1 for the others.
        noise: "gaussian" or "rademacher".
        rounding: "nearest" or "stochastic"; float32 and float64 are stored as computed.

    Notes:
        One launch for each device and dtype, and a copy to and from for each tensor that is not contiguous.
    """
    terms = torch.tensor([seeds, _bits(*scales)], dtype=torch.int64)
    # C order of the logical tensor: itself, or a copy that is written back
    dense = [param.contiguous() for param in params]
    for device, dtype in dict.fromkeys((flat.device, flat.dtype) for flat in dense if flat.numel()):
        places = tuple(
            (flat.data_ptr(), offset, flat.numel())
            for flat, offset in zip(dense, offsets, strict=True)
            if flat.device == device and flat.dtype == dtype and flat.numel()
        )
        table, on_device = _table(places, device), terms.to(device, non_blocking=True)
        with torch.cuda.device_of(on_device):
            _mezo_perturb_kernel[(table.of_program.numel(),)](
                table.tensors,
                table.of_program,
                on_device[0],
                on_device[1].view(torch.float64),
                *_bits(1.0 - decay),
                len(seeds),
                dtype=_ELEMENTS[dtype],
                IS_RADEMACHER=noise == "rademacher",
                IS_STOCHASTIC=rounding == "stochastic" and dtype.itemsize == 2,
                BLOCK_Q=MEZO_PERTURB.block_q,
                num_warps=MEZO_PERTURB.num_warps,
                enable_fp_fusion=False,
            )
    for param, flat in zip(params, dense):
        if flat is not param and not param.is_contiguous():
            param.copy_(flat)


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
