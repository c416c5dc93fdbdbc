"""Weights `(N, K)` that never train, in the form in which they are stored: numbers, or codes in 8 or 4 bits.

Both forms have `product`, `transposed_product` and `dense`, and `form`: what `siva_linear` takes beside `stored`.

A product is `h = x W^T + b`, backward `dx = dh W` and the gradient of the bias; the weight has none.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastpeft.ops.define import asks_for_gradients, check_first_derivative
from fastpeft.ops.dtypes import autocast_dtype, compute_dtype
from fastpeft.ops.packing import Packs, num_rows, packed_linear
from fastpeft.ops.products import as_matrix, multiplies_in_float32, product, times
from fastpeft.ops.quantised_linear import Scales, dequantise, unnested


class Dense(NamedTuple):
    """A weight that is stored as numbers; products read a pack of it where that is faster.

    Attributes:
        stored: `(N, K)`.
        form: the packs of it.
    """

    stored: Tensor
    form: Packs | None

    @property
    def shape(self) -> torch.Size:
        return self.stored.shape

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.stored.to(dtype)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """In the dtype of x, which is that of the weight unless autocast is on; then in that of autocast."""
        dtype = compute_dtype(x, self.stored)
        if autocast_dtype(x.device):
            x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        packed = None
        if self.form is not None and x.dtype == dtype:
            packed = self.form.of(self.stored, dtype, rows=num_rows(x))
        if packed is None and not multiplies_in_float32(x):
            return F.linear(x, self.stored, bias)
        return _differentiable(self, x, bias, packed)

    def plain_product(self, x: Tensor, bias: Tensor | None, packed: Tensor | None) -> Tensor:
        """`product` outside of autograd."""
        return product(x, self.stored.to(x.dtype), bias) if packed is None else packed_linear(x, packed, bias)

    def transposed_product(self, dh: Tensor) -> Tensor:
        packed = None
        if self.form is not None:
            packed = self.form.of(self.stored, dh.dtype, transposed=True, rows=num_rows(dh))
        return times(dh, self.stored.to(dh.dtype)) if packed is None else packed_linear(dh, packed, None)


class Coded(NamedTuple):
    """A weight in int8 or nf4, see `fastpeft.ops.quantise`; each product dequantises the codes again.

    On a CPU it makes some rows of the weight at a time, on a GPU all.

    Attributes:
        stored: the codes.
        form: their scales.
        shape: `(N, K)`.
    """

    stored: Tensor
    form: Scales
    shape: torch.Size

    def dense(self, dtype: torch.dtype) -> Tensor:
        return dequantise(self.stored, unnested(*self.form), self.shape, dtype)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """In the dtype of x, which the bias has too."""
        return _differentiable(self, x, bias)

    def plain_product(self, x: Tensor, bias: Tensor | None, _packed: None) -> Tensor:
        scales = unnested(*self.form)
        h: Tensor = torch.ops.fastpeft.quantised_linear(x, self.stored, scales, self.shape[0], bias)
        return h

    def transposed_product(self, dh: Tensor) -> Tensor:
        scales = unnested(*self.form)
        dx: Tensor = torch.ops.fastpeft.quantised_linear_backward(dh, self.stored, scales, self.shape[1])
        return dx


FrozenWeight = Dense | Coded


def _differentiable(weight: Any, x: Tensor, bias: Tensor | None, packed: Tensor | None = None) -> Tensor:
    h: Tensor
    if asks_for_gradients(x, bias):
        h = _FrozenProduct.apply(x, weight.stored, bias, weight, packed)
    else:
        h = weight.plain_product(x, bias, packed)
    return h


class _FrozenProduct(torch.autograd.Function):
    """The gradients of a product, of x and of the bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stored: Tensor, bias: Tensor | None, weight: Any, packed: Tensor | None) -> Tensor:
        ctx.kind, ctx.rest = type(weight), weight[1:]
        ctx.save_for_backward(stored)  # so that a change before backward is an error, as it is for F.linear
        h: Tensor = weight.plain_product(x, bias, packed)
        return h

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivative("a product with a frozen weight")
        (stored,) = ctx.saved_tensors
        need_dx, _, need_dbias, _, _ = ctx.needs_input_grad
        dx = ctx.kind(stored, *ctx.rest).transposed_product(dh) if need_dx else None
        return dx, None, as_matrix(dh).sum(0) if need_dbias else None, None, None
