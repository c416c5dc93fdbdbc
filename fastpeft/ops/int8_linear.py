"""`fastpeft::int8_linear`: a product with a weight of int8 codes, in int8 instructions.

Dimension letters: M rows of x (all leading dimensions together), K in_features, N out_features.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fastpeft.ops.define import define
from fastpeft.ops.dtypes import compute_dtype
from fastpeft.ops.products import as_matrix
from fastpeft.support.processor import has_int8

_DTYPES = (torch.float32, torch.bfloat16)  # of x, on a CPU
_STEPS = 255  # between the smallest and the largest code
_LEAST = 1e-30  # a range below which a row is taken for zeros
MOST_FEATURES = (2**31 - 1) // (_STEPS * 128)  # of a row of x whose sum with codes, the least of which is -128, fits


def int8_linear_reference(x: Tensor, codes: Tensor, scales: Tensor, sums: Tensor, bias: Tensor | None) -> Tensor:
    """`h = a_m w_n (q codes^T - z_m sums) + b`, where each row of x is `a_m (q - z_m)` to rounding.

    A row is divided into 255 even steps from its smallest value to its largest, 0 among them. A row that is not finite
    gives NaN.

    Args:
        x: `(*, K)`, a float dtype.
        codes: int8 `(N, K)`.
        scales: float32 `(N,)` or `(N, 1)`, by which a row of codes is multiplied.
        sums: int32 `(N,)`, those of the rows of codes.
        bias: `(N,)` or None.

    Returns:
        `(*, N)` in the dtype of x.
    """
    q, scale, zero = _quantise_rows(as_matrix(x).float())
    product = q.double() @ codes.t().double()  # exact
    return _as_numbers(x, product - zero * sums.double(), scale, scales, bias)


def int8_linear_aten(x: Tensor, codes: Tensor, scales: Tensor, sums: Tensor, bias: Tensor | None) -> Tensor:
    """As the reference, with PyTorch's product of integers."""
    q, scale, zero = _quantise_rows(as_matrix(x).float())
    product = torch._int_mm(q.to(torch.int8), codes.t())
    return _as_numbers(x, product - zero.int() * sums, scale, scales, bias)


def _quantise_rows(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes as whole numbers in float32 `(M, K)`, scales `(M, 1)`, zeros `(M, 1)`."""
    if rows.numel() == 0:
        return rows, rows.new_zeros(len(rows), 1), rows.new_zeros(len(rows), 1)
    low, high = rows.amin(1, keepdim=True).clamp(max=0), rows.amax(1, keepdim=True).clamp(min=0)
    extent = high - low
    extent = extent.masked_fill(~extent.isfinite(), torch.nan)
    steps = extent.new_full((), _STEPS)  # a number would be multiplied by the reciprocal, which rounds twice
    inverse = torch.where(extent > _LEAST, steps / extent, 0)
    scale = torch.where(extent <= _LEAST, 0, extent / steps)
    zero = (-128 - (low * inverse).round()).nan_to_num()
    q = ((rows * inverse).round() + zero).clamp(-128, 127).nan_to_num()
    return q, scale, zero


def _as_numbers(x: Tensor, sums: Tensor, scale: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    h = sums.float() * scale * scales.flatten()
    if bias is not None:
        h += bias.float()
    return h.to(x.dtype).view(*x.shape[:-1], sums.shape[1])


# h (*, N); no gradient flows through it
define(
    "int8_linear",
    "(Tensor x, Tensor codes, Tensor scales, Tensor sums, Tensor? bias) -> Tensor",
    shapes=lambda x, codes, *_: x.new_empty((*x.shape[:-1], codes.shape[0])),
    reference=int8_linear_reference,
    aten=int8_linear_aten,
)


def can_multiply_int8(x: Tensor) -> bool:
    """Whether the processor multiplies in int8 faster than it dequantises: in float32 or bfloat16 on such a CPU.

    A fake tensor simulates a GPU. Sums of more than `MOST_FEATURES` products may not fit into 32 bits.
    """
    fits = x.device.type == "cpu" and compute_dtype(x, x) in _DTYPES and not isinstance(x, FakeTensor)
    return fits and x.shape[-1] <= MOST_FEATURES and has_int8()


def multiply(x: Tensor, codes: Tensor, scales: Tensor, sums: Tensor, bias: Tensor | None) -> Tensor:
    """The op, under autocast in its dtype, outside of autograd; on a CPU other dtypes are computed in float32."""
    dtype = compute_dtype(x, x)
    inside = torch.float32 if x.device.type == "cpu" and dtype not in _DTYPES else dtype
    h: Tensor = torch.ops.fastpeft.int8_linear(x.to(inside), codes, scales, sums, bias)
    return h.to(dtype)
