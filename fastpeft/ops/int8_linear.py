"""`fastpeft::int8_linear`: a product with a weight of int8 codes, in int8 instructions.

Dimension letters: M rows of x (all leading dimensions together), K in_features, N out_features.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fastpeft.errors import FastpeftError
from fastpeft.ops.define import define
from fastpeft.ops.dtypes import check_kinds, compute_dtype
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


def int8_linear(x: Tensor, codes: Tensor, scales: Tensor, sums: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""A linear layer whose weight is codes of 8 bits, multiplied as integers; for what asks for no gradient.

    `h = a_m w_n (q codes^T - z_m sums) + b`, where row m of x is `a_m (q - z_m)` to rounding: 255 even steps from its
    smallest value to its largest, 0 among them.

    Args:
        x: `(*, in_features)`, a floating dtype; a CPU computes others than float32 and bfloat16 in float32.
        codes: int8 `(out_features, in_features)`; `codes * scales` is the weight. At most 65793 in_features: of more,
            a sum may not fit into 32 bits.
        scales: float32 `(out_features,)` or `(out_features, 1)`.
        sums: int32 `(out_features,)`, the sums of the rows of codes.
        bias: `(out_features,)` or None.

    Returns:
        `(*, out_features)` in the dtype of x, under autocast in that of autocast. A row of x that is not finite gives
        NaN. No gradient flows through it.

    Raises:
        FastpeftError: shapes or dtypes do not fit, in_features are too many, or operands are on several devices.

    Notes:
        Integers are added exactly, so every implementation gives the same bits. On a CPU PyTorch multiplies (oneDNN, by
        VNNI or AMX), and C++ makes codes of a block of rows and numbers of its sums while they are in cache.

    Example:
        >>> codes = torch.randint(-127, 128, (5, 8), dtype=torch.int8)
        >>> int8_linear(torch.randn(3, 8), codes, torch.ones(5), codes.sum(1, dtype=torch.int32)).shape
        torch.Size([3, 5])
    """
    n, k = codes.shape if codes.dim() == 2 else (-1, -1)
    kinds = codes.dtype, scales.dtype, sums.dtype
    fits = x.dim() > 0 and x.shape[-1] == k and scales.shape in ((n,), (n, 1)) and sums.shape == (n,)
    if not fits or (bias is not None and bias.shape != (n,)) or kinds != (torch.int8, torch.float32, torch.int32):
        raise FastpeftError(
            "int8_linear takes x (*, K), int8 codes (N, K), float32 scales (N,) or (N, 1), int32 sums (N,) and bias "
            f"(N,) or None; got x {tuple(x.shape)}, {codes.dtype} codes {tuple(codes.shape)}, {scales.dtype} scales "
            f"{tuple(scales.shape)}, {sums.dtype} sums {tuple(sums.shape)} and bias "
            f"{None if bias is None else tuple(bias.shape)}."
        )
    if k > MOST_FEATURES:
        raise FastpeftError(
            f"int8_linear: x has {k} features, whose sum may pass 32 bits; allowed are at most {MOST_FEATURES}. Add up "
            "the products of parts of x and codes, or multiply by `codes * scales`."
        )
    check_kinds("int8_linear", x.device, "x scales bias", x, scales, bias)
    if codes.device != x.device or sums.device != x.device:
        raise FastpeftError(
            f"int8_linear: x is on the device {x.device}, codes on {codes.device} and sums on {sums.device}; put all "
            "on one."
        )
    with torch.no_grad():
        return multiply(x, codes, scales, sums, bias)
