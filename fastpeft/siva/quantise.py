"""A frozen residual in 8 or 4 bits: `W0 = Q + (U * s) V` to rounding, Q being what the format makes of the rest.

- `int8`: every row of the rest divided by its largest magnitude, in 255 even steps. 1 byte a weight.
- `nf4`: blocks of 64 values, each divided by its largest magnitude, to the nearest of the 16 quantiles of a normal
  distribution (Dettmers, Pagnoni, Holtzman, Zettlemoyer 2023), by bitsandbytes. 0.5625 bytes a weight.

The factors take the large directions away, so that what is left spans less and is rounded finer (QPiSSA: Meng, Wang,
Zhang 2024). Given Q, the best factors are the top triplets of `W0 - Q`, and given those the rest is another: the two
are made in turns, as LoftQ does from factors of zero (Li, Yu, Liang, He, Karampatziakis, Chen, Zhao 2023). A turn ends
with Q, which is therefore a function of the pretrained weight and of the factors that a file holds, and no file holds
it. What this gains is in `bench/data/siva_quantised.csv`.
"""

from __future__ import annotations

import importlib.util
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastpeft import functional  # noqa: F401  (registers the ops)
from fastpeft.errors import FastpeftError
from fastpeft.siva.decompose import Factors, decompose, subtract, top_triplets

Format = Literal["int8", "nf4"]
ITERATIONS = 5

_BLOCK = 64  # values of nf4 that share a scale


def check_format(residual_dtype: str | None) -> None:
    """Raise `FastpeftError` unless the format exists, and with it the library that it needs."""
    if residual_dtype is not None and residual_dtype not in get_args(Format):
        raise FastpeftError(
            f"residual_dtype={residual_dtype!r}; allowed are {' and '.join(map(repr, get_args(Format)))}, or None for "
            "the dtype of the base model."
        )
    if residual_dtype == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        raise FastpeftError(
            "residual_dtype='nf4' needs the library bitsandbytes, which is not installed. Run pip install "
            "'fastpeft[nf4]', or use residual_dtype='int8'."
        )


def _quantise_int8(matrix: Tensor) -> tuple[Tensor, Tensor]:
    scales = matrix.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return (matrix / scales).round().to(torch.int8), scales


def _dequantise_int8(codes: Tensor, scales: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return torch.mul(codes, scales, out=torch.empty(shape, dtype=dtype, device=codes.device))  # no float32 copy


def _quantise_nf4(matrix: Tensor) -> tuple[Tensor, Tensor]:
    from bitsandbytes.functional import quantize_4bit

    whole_blocks = F.pad(matrix.flatten(), (0, -matrix.numel() % _BLOCK))
    codes, state = quantize_4bit(whole_blocks, blocksize=_BLOCK, quant_type="nf4")
    return codes, state.absmax


def _dequantise_nf4(codes: Tensor, scales: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    # As one row: on a CPU bitsandbytes 0.50 mistakes the scales of rows that are not whole blocks
    row = torch.Size((1, len(scales) * _BLOCK))
    known = torch.float32 if dtype == torch.float64 else dtype
    state = QuantState(scales, shape=row, dtype=known, blocksize=_BLOCK, quant_type="nf4")
    weight: Tensor = dequantize_4bit(codes, state)
    return weight.flatten()[: shape.numel()].view(shape).to(dtype)


_QUANTISE = {"int8": _quantise_int8, "nf4": _quantise_nf4}
_DEQUANTISE = {"int8": _dequantise_int8, "nf4": _dequantise_nf4}


class QuantisedWeight(nn.Module):
    """A frozen weight `(N, K)` in a format of few bits.

    Args:
        weight: `(N, K)`, any floating dtype; rounded from float32.
        kind: the format.

    Its `codes` and `scales` are parameters that never train, so that whatever moves, shards or counts a model's weights
    does so with these too. The scales stay in float32 whatever dtype the model is cast to.
    """

    def __init__(self, weight: Tensor, kind: Format) -> None:
        super().__init__()
        self.kind, self.shape = kind, weight.shape
        codes, scales = _QUANTISE[kind](weight.detach().float())
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)

    def _apply(self, fn: Any, recurse: bool = True) -> QuantisedWeight:
        scales = self.scales.data
        super()._apply(fn, recurse)
        if self.scales.dtype != scales.dtype:
            self.scales.data = scales.to(self.codes.device)
        return self

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """`(N, K)` in `dtype`."""
        return _DEQUANTISE[self.kind](self.codes.data, self.scales.data, self.shape, dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, {self.kind}"


def decompose_quantised(
    weight: Tensor, r: int, kind: Format, iterations: int = ITERATIONS, name: str = "weight"
) -> tuple[Factors, QuantisedWeight]:
    """Split `weight` into factors of rank r that train and a quantised rest.

    Args:
        weight: `(N, K)`, any floating dtype.
        r: 1 to min(N, K).
        kind: the format of the rest.
        iterations: how often the factors are made again from what the quantised rest leaves of the weight. 0: they are
            the top triplets of the weight.
        name: what error messages call the weight.

    Returns:
        Factors in float32, and the rest `quant(W0 - (U * s) V)`.

    Raises:
        FastpeftError: as `decompose` does.
    """
    factors = decompose(weight, r, name=name).factors
    exact = weight.detach().float()
    rest = QuantisedWeight(subtract(exact, factors), kind)
    for _ in range(iterations if weight.device.type != "meta" else 0):
        factors = top_triplets(exact - rest.dequantise(torch.float32), r, name)
        rest = QuantisedWeight(subtract(exact, factors), kind)
    return factors, rest


def quantised_siva_linear(
    x: Tensor, rest: QuantisedWeight, u: Tensor, s: Tensor, v: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`siva_linear` with a quantised weight.

    Args:
        x, u, s, v, bias: as in `siva_linear`.
        rest: the weight.
        dtype: what all is brought to.

    Notes:
        Saved for backward: what `siva_linear` saves, the weight as its codes. It is dequantised for the time of a
        product, in forward and again in backward, so a training step holds one layer's at a time.
    """
    u, s, v = (factor.to(dtype) for factor in (u, s, v))
    bias = None if bias is None else bias.to(dtype)
    h: Tensor = _SivaLinear.apply(x.to(dtype), rest.codes, rest.scales, u, s, v, bias, rest.kind, rest.shape)
    return h


class _SivaLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        codes: Tensor,
        scales: Tensor,
        u: Tensor,
        s: Tensor,
        v: Tensor,
        bias: Tensor | None,
        kind: Format,
        shape: torch.Size,
    ) -> Tensor:
        h, p = torch.ops.fastpeft.siva_linear(x, _DEQUANTISE[kind](codes, scales, shape, x.dtype), u, s, v, bias)
        _, _, _, need_du, _, need_dv, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if need_dv else None, codes, scales, u, s, v, p if need_du else None)
        ctx.kind, ctx.shape = kind, shape
        return h

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> Any:
        x, codes, scales, u, s, v, p = ctx.saved_tensors
        need_dx, _, _, need_du, _, need_dv, need_dbias, *_ = ctx.needs_input_grad
        weight = _DEQUANTISE[ctx.kind](codes, scales, ctx.shape, dh.dtype)
        x, p = (dh.new_empty(0) if saved is None else saved for saved in (x, p))
        dx, du, dv, dbias = torch.ops.fastpeft.siva_linear_backward(
            dh, x, weight, u, s, v, p, need_dx, need_du, need_dv, need_dbias
        )
        return (
            dx if need_dx else None,
            None,
            None,
            du if need_du else None,
            None,
            dv if need_dv else None,
            dbias if need_dbias else None,
            None,
            None,
        )
