"""`fastpeft::quantised_linear`: a product with a weight in 8 or 4 bits, `h = x W~^T + b`.

W~ is what the codes stand for; letters are as in `siva_linear`, which takes such weights too. Codes of int8 are those
of the format int8, and bytes those of nf4: `fastpeft.ops.quantise`.

The references make all of W~ for a product. The compiled module for CPUs makes 256 of its rows, or backward of its
columns, at a time, so that they stay in cache: in float32 4 MB of a weight with 4096 columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastpeft.ops.define import define

BLOCK = 64  # values of nf4 that share a scale
COARSE = 256  # scales that share a scale of their own

Nested = tuple[Tensor, Tensor, Tensor]  # of scales in 8 bits: their scales, what each code stands for, their mean


class Scales(NamedTuple):
    """What the codes of a quantised weight are multiplied by, as they are stored."""

    values: Tensor
    nested: Nested | None


def unnested(scales: Tensor, nested: Nested | None) -> Tensor:
    """Scales in float32, of those that are quantised themselves too (double quantisation, Dettmers et al. 2023)."""
    if nested is None:
        return scales
    from bitsandbytes.functional import dequantize_blockwise

    coarse, code, mean = nested
    return dequantize_blockwise(scales, absmax=coarse, code=code, blocksize=COARSE) + mean


def dequantise(codes: Tensor, scales: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The weight of `shape` in `dtype` that codes and scales represent."""
    if codes.dtype is torch.int8:
        return torch.mul(codes, scales, out=torch.empty(shape, dtype=dtype, device=codes.device))  # no float32 copy
    return _dequantise_nf4(codes, scales, torch.Size(shape), dtype)


def _dequantise_nf4(codes: Tensor, scales: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    # as one row, since on a CPU bitsandbytes 0.50 reads wrong scales for rows that are not whole blocks
    row = torch.Size((1, 2 * codes.numel()))
    known = torch.float32 if dtype == torch.float64 else dtype
    state = QuantState(scales.contiguous(), shape=row, dtype=known, blocksize=BLOCK, quant_type="nf4")
    weight: Tensor = dequantize_4bit(codes, state)
    return weight.flatten()[: shape.numel()].view(shape).to(dtype)


def quantised_linear_reference(
    x: Tensor, codes: Tensor, scales: Tensor, out_features: int, bias: Tensor | None
) -> Tensor:
    """`h = x W~^T + b`, for W~ `(out_features, K)`."""
    return F.linear(x, dequantise(codes, scales, (out_features, x.shape[-1]), x.dtype), bias)


def quantised_linear_backward_reference(dh: Tensor, codes: Tensor, scales: Tensor, in_features: int) -> Tensor:
    """`dx = dh W~`, for W~ `(N, in_features)`."""
    return dh @ dequantise(codes, scales, (dh.shape[-1], in_features), dh.dtype)


# h (*, N)
define(
    "quantised_linear",
    "(Tensor x, Tensor codes, Tensor scales, SymInt out_features, Tensor? bias) -> Tensor",
    shapes=lambda x, codes, scales, out_features, _: x.new_empty((*x.shape[:-1], out_features)),
    reference=quantised_linear_reference,
    aten=quantised_linear_reference,
)


# dx (*, K)
define(
    "quantised_linear_backward",
    "(Tensor dh, Tensor codes, Tensor scales, SymInt in_features) -> Tensor",
    shapes=lambda dh, codes, scales, in_features: dh.new_empty((*dh.shape[:-1], in_features)),
    reference=quantised_linear_backward_reference,
    aten=quantised_linear_backward_reference,
)
