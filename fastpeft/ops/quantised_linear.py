"""`fastpeft::quantised_linear` and `fastpeft::siva_linear_quantised`: products with a weight in 8 or 4 bits.

`h = x W~^T + b`, without and with the factors of SiVA, where W~ is what the codes stand for. Dimension letters are as
in `siva_linear`. Codes of int8 are those of the format int8, and bytes those of nf4: `fastpeft.ops.quantise`.

The references make all of W~ for a product, which is then PyTorch's, or `siva_linear`'s. The compiled module for CPUs
makes 256 of its rows, or backward of its columns, at a time, so that they stay in cache: in float32 4 MB of a weight
with 4096 columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastpeft.ops.define import check_first_derivative, define
from fastpeft.ops.products import as_matrix

BLOCK = 64  # values of nf4 that share a scale
COARSE = 256  # scales that share a scale of their own

Nested = tuple[Tensor, Tensor, Tensor]  # of scales in 8 bits: their scales, what each code stands for, their mean


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


def siva_linear_quantised_reference(
    x: Tensor, codes: Tensor, scales: Tensor, u: Tensor, s: Tensor, v: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`siva_linear` with W~ `(N, K)`, on what that runs on."""
    weight = dequantise(codes, scales, (len(u), v.shape[1]), x.dtype)
    (h,), p = torch.ops.fastpeft.siva_linear(x, [weight], [u], [s], [v], [bias])
    return h, p.t().reshape(*x.shape[:-1], len(s))


def siva_linear_quantised_backward_reference(
    dh: Tensor,
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    u: Tensor,
    s: Tensor,
    v: Tensor,
    p: Tensor,
    need_dx: bool,
    need_du: bool,
    need_dv: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`siva_linear_backward` with W~ `(N, K)`, on what that runs on; dU and dV of the first triplets, as many as p has.

    The others act and do not train, as those that an implicit residual subtracts.
    """
    shape = (len(u), v.shape[1])
    weight = dequantise(codes, scales, shape, dh.dtype) if need_dx else dh.new_empty(1, 1).expand(shape)
    trained = p.shape[-1] if need_du or need_dv else len(s)

    def backward(
        u: Tensor, s: Tensor, v: Tensor, need_dx: bool, need_du: bool, need_dv: bool, need_dbias: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        turned = as_matrix(p).t() if need_du else p
        dx, (du,), dv, (dbias,) = torch.ops.fastpeft.siva_linear_backward(
            [dh], x, [weight], [u], [s], [v], turned, need_dx, [need_du], need_dv, [need_dbias]
        )
        return dx, du, dv, dbias

    if trained == len(s):
        return backward(u, s, v, need_dx, need_du, need_dv, need_dbias)
    dx, _, _, dbias = backward(u, s, v, need_dx, False, False, need_dbias)
    _, du, dv, _ = backward(u[:, :trained], s[:trained], v[:trained], False, need_du, need_dv, False)
    return dx, du, dv, dbias


def _siva_linear_quantised_shapes(
    x: Tensor, codes: Tensor, scales: Tensor, u: Tensor, s: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    return x.new_empty((*x.shape[:-1], u.shape[0])), v.new_empty((*x.shape[:-1], v.shape[0]))


def _siva_linear_quantised_backward_shapes(
    dh: Tensor, x: Tensor, codes: Tensor, scales: Tensor, u: Tensor, s: Tensor, v: Tensor, p: Tensor, *needs: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need_dx, need_du, need_dv, need_dbias = needs
    (n, _), (_, k), trained = u.shape, v.shape, p.shape[-1]
    return (
        dh.new_empty((*dh.shape[:-1], k) if need_dx else (0,)),
        u.new_empty((n, trained) if need_du else (0,)),
        v.new_empty((trained, k) if need_dv else (0,)),
        dh.new_empty((n,) if need_dbias else (0,)),
    )


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


# h (*, N) and p (*, R), as siva_linear
define(
    "siva_linear_quantised",
    "(Tensor x, Tensor codes, Tensor scales, Tensor u, Tensor s, Tensor v, Tensor? bias) -> (Tensor, Tensor)",
    shapes=_siva_linear_quantised_shapes,
    reference=siva_linear_quantised_reference,
    aten=siva_linear_quantised_reference,
)


# dx (*, K), du (N, T), dv (T, K), dbias (N,), as siva_linear_backward, for p (*, T) of the first T of R triplets
define(
    "siva_linear_quantised_backward",
    "(Tensor dh, Tensor x, Tensor codes, Tensor scales, Tensor u, Tensor s, Tensor v, Tensor p, bool need_dx, "
    "bool need_du, bool need_dv, bool need_dbias) -> (Tensor, Tensor, Tensor, Tensor)",
    shapes=_siva_linear_quantised_backward_shapes,
    reference=siva_linear_quantised_backward_reference,
    aten=siva_linear_quantised_backward_reference,
)


class QuantisedProduct(torch.autograd.Function):
    """The autograd formula of `fastpeft::quantised_linear`: `apply(x, codes, scales, nested, out_features, bias)`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        codes: Tensor,
        scales: Tensor,
        nested: Nested | None,
        out_features: int,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(codes, scales, *(nested or ()))
        ctx.in_features = x.shape[-1]
        h: Tensor = torch.ops.fastpeft.quantised_linear(x, codes, unnested(scales, nested), out_features, bias)
        return h

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivative("quantised_linear")
        codes, scales, *nested = ctx.saved_tensors
        need_dx, _, _, _, _, need_dbias = ctx.needs_input_grad
        dx = None
        if need_dx:
            scales = unnested(scales, tuple(nested) or None)
            dx = torch.ops.fastpeft.quantised_linear_backward(dh, codes, scales, ctx.in_features)
        return dx, None, None, None, None, as_matrix(dh).sum(0) if need_dbias else None


class SivaLinearQuantised(torch.autograd.Function):
    """The autograd of `fastpeft::siva_linear_quantised`: `apply(x, codes, scales, nested, u, s, v, bias, trained)`.

    The first `trained` triplets train: of the others dU and dV are 0. Saved for backward: as by `SivaLinear`, with
    codes and scales, as they are stored, instead of the weight.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        codes: Tensor,
        scales: Tensor,
        nested: Nested | None,
        u: Tensor,
        s: Tensor,
        v: Tensor,
        bias: Tensor | None,
        trained: int,
    ) -> Tensor:
        h, p = torch.ops.fastpeft.siva_linear_quantised(x, codes, unnested(scales, nested), u, s, v, bias)
        _, _, _, _, need_du, _, need_dv, *_ = ctx.needs_input_grad
        kept = x if need_dv else None, p[..., :trained] if need_du or need_dv else None
        ctx.save_for_backward(*kept, codes, u, s, v, scales, *(nested or ()))
        return h

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivative("siva_linear_quantised")
        x, p, codes, u, s, v, scales, *nested = ctx.saved_tensors
        need_dx, _, _, _, need_du, _, need_dv, need_dbias, _ = ctx.needs_input_grad
        x, p = (dh.new_empty(0) if saved is None else saved for saved in (x, p))
        if need_dx:
            scales = unnested(scales, tuple(nested) or None)
        dx, du, dv, dbias = torch.ops.fastpeft.siva_linear_quantised_backward(
            dh, x, codes, scales, u, s, v, p, need_dx, need_du, need_dv, need_dbias
        )
        if others := len(s) - p.shape[-1]:
            du = F.pad(du, (0, others)) if need_du else du
            dv = F.pad(dv, (0, 0, 0, others)) if need_dv else dv
        return (
            dx if need_dx else None,
            None,
            None,
            None,
            du if need_du else None,
            None,
            dv if need_dv else None,
            dbias if need_dbias else None,
            None,
        )
