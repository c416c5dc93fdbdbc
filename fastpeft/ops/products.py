"""What the ops of SiVA share: rows as a matrix, and products that are written where they stay.

Each product after the first is added to its target by the matrix product itself (`addmm_`), which saves writing it out,
reading it back and adding; what is elementwise works in place. Of a product with R rows or columns the layout decides:
BLAS is up to seven times slower where the narrow operand is not contiguous along the long side, so U is turned to
`(R, N)` first, which costs little.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastpeft.ops.dtypes import HALVES
from fastpeft.ops.packing import multiplies_in, num_rows, packed_linear


def as_matrix(x: Tensor) -> Tensor:
    """`(*, K)` as `(M, K)`; a -1 in its place could not be told where K is 0."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x W^T + b`; no view of another tensor, for autograd allows no change in place of an output that is one."""
    if weight.is_mkldnn:
        return packed_linear(x, weight, bias)
    if multiplies_in_float32(x):
        return _product_in_float32(x, weight, bias)
    h = x.new_empty(*x.shape[:-1], weight.shape[0])
    rows, target = as_matrix(x), as_matrix(h)
    if bias is None:
        torch.mm(rows, weight.t(), out=target)
    else:
        torch.addmm(bias, rows, weight.t(), out=target)
    return h


def times(rows: Tensor, weight: Tensor) -> Tensor:
    """`rows W`; what is packed is W^T."""
    if weight.is_mkldnn:
        return packed_linear(rows, weight, None)
    return _product_in_float32(rows, weight.t(), None) if multiplies_in_float32(rows, most=0) else rows @ weight


def _product_in_float32(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):  # which would cast the copies back
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def multiplies_in_float32(x: Tensor, most: int = 2) -> bool:
    """Whether a product in half precision multiplies float32 copies: for more than `most` rows, where that is faster.

    This holds on CPUs for which oneDNN has no kernel in the dtype, such as bfloat16 without AVX-512: in half precision
    AVX2 takes 7 times as long forward and up to 75 times backward.
    """
    is_half = x.dtype in HALVES and x.device.type == "cpu"
    return is_half and not multiplies_in(x.dtype) and num_rows(x) > most and not torch.compiler.is_compiling()


def lowered(factors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Factors in the dtype of the rows; what may differ is float32, any other is left for a product to refuse."""
    return [factor.to(dtype) if factor.dtype is torch.float32 else factor for factor in factors]


def raised(rows: Tensor, factor: Tensor) -> Tensor:
    """Rows in half precision in the dtype of a factor that is in float32."""
    return rows.float() if factor.dtype is torch.float32 and rows.dtype in HALVES else rows


def scaled(u: Tensor, s: Tensor) -> Tensor:
    """`diag(s) U^T`, `(R, N)`, contiguous."""
    return torch.mul(u.t(), s[:, None], out=u.new_empty(s.shape[0], u.shape[0]))
