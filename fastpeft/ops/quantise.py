"""Frozen weights in 8 or 4 bits, for the residual of SiVA and for the linear layers of a side network's backbone.

- `int8`: each row is divided by its largest magnitude and rounded to 255 even steps. 1 byte a weight.
- `nf4`: each block of 64 values is divided by its largest magnitude and rounded to the 16 quantiles of a normal
  distribution (Dettmers, Pagnoni, Holtzman, Zettlemoyer 2023), by bitsandbytes. 0.5625 bytes a weight.
- `nf4-double`: the same, with the magnitudes in 8 bits, in blocks of 256 with a scale of their own, as QLoRA has them
  (double quantisation). 0.516 bytes a weight.

In a side network's backbone, where nothing needs a gradient and the processor has instructions for it, int8 codes are
multiplied as they are, with activations in 8 bits too (`fastpeft/ops/int8_linear.py`). Else a product dequantises them
to the dtype of its input (`fastpeft/ops/quantised_linear.py`).
"""

from __future__ import annotations

import importlib.util
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from fastpeft.errors import FastpeftError, install
from fastpeft.ops.define import asks_for_gradients, is_transformed
from fastpeft.ops.dtypes import compute_dtype, keeping_dtypes
from fastpeft.ops.frozen_weight import Coded
from fastpeft.ops.int8_linear import can_multiply_int8, multiply
from fastpeft.ops.packing import quantise_rows, samples, version_of
from fastpeft.ops.quantised_linear import BLOCK, COARSE, Nested, Scales

Format = Literal["int8", "nf4", "nf4-double"]

_BLOCKS_IN_CACHE = 8_192  # 2 MB of float32
_NESTED = ("coarse", "table", "mean")  # parameters that only scales in 8 bits have


def check_format(argument: str, kind: str | None, *others: str) -> None:
    """Raise `FastpeftError` unless `kind`, the value of `argument`, is None, one of `others` or an installed format."""
    allowed = (*others, *get_args(Format))
    if kind is not None and kind not in allowed:
        raise FastpeftError(
            f"{argument}={kind!r}; allowed are {', '.join(map(repr, allowed))}, or None for the base model's own dtype."
        )
    if kind in ("nf4", "nf4-double") and importlib.util.find_spec("bitsandbytes") is None:
        raise FastpeftError(
            f"{argument}={kind!r} needs the library bitsandbytes, which is not installed. Run "
            f"{install('nf4')}, or use {argument}='int8'."
        )


def _quantise(matrix: Tensor, kind: Format) -> tuple[Tensor, Tensor, Nested | None]:
    """Codes, scales, and what scales in 8 bits stand for."""
    if kind == "int8":
        codes, scales, _ = quantise_rows(matrix)
        return codes, scales, None
    from bitsandbytes.functional import quantize_4bit, quantize_blockwise

    whole_blocks = F.pad(matrix.flatten(), (0, -matrix.numel() % BLOCK))
    if matrix.device.type == "cpu":
        codes, scales = _nf4_on_cpu(whole_blocks.view(-1, BLOCK))
    else:
        codes, state = quantize_4bit(whole_blocks, blocksize=BLOCK, quant_type="nf4")
        scales = state.absmax
    if kind == "nf4":
        return codes, scales, None
    mean = scales.mean()
    scales, state = quantize_blockwise(scales - mean, blocksize=COARSE)
    return codes, scales, (state.absmax, state.code.clone(), mean)


def _nf4_on_cpu(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of blocks `(B, 64)` in float32, those of bitsandbytes to the bit, in a third of its time.

    A code is the number of midpoints between neighbouring quantiles that a value is above. bitsandbytes searches for
    it value by value.
    """
    from bitsandbytes.functional import get_4bit_type

    quantiles = get_4bit_type("nf4", device="cpu")
    midpoints = ((quantiles[:-1] + quantiles[1:]) / 2).tolist()
    scales = blocks.abs().amax(1)
    codes = torch.empty(len(blocks), BLOCK // 2, dtype=torch.uint8)
    for some, scale, packed in zip(*(each.split(_BLOCKS_IN_CACHE) for each in (blocks, scales, codes))):
        x = (some * (1.0 / scale.clamp(min=1e-38))[:, None]).clamp_(-1, 1)
        code = torch.zeros(x.shape, dtype=torch.uint8)
        for midpoint in midpoints:
            code += (x > midpoint).view(torch.uint8)
        packed.copy_(code[:, ::2] << 4 | code[:, 1::2])
    return codes.view(-1, 1), scales


class QuantisedWeight(nn.Module):
    """A frozen weight `(N, K)`, quantised.

    Its `codes` and `scales` are parameters that never train, so that code which moves, shards or counts the weights of
    a model includes them; so are `coarse`, `table` and `mean`, for scales in 8 bits. What is in float32 stays so when
    the model is cast. A weight of any floating dtype is rounded from float32.
    """

    def __init__(self, weight: Tensor, kind: Format) -> None:
        super().__init__()
        self.kind, self.shape = kind, weight.shape
        codes, scales, nested = _quantise(weight.detach().float().contiguous(), kind)
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        for name, each in zip(_NESTED, nested or ()):
            self.register_parameter(name, nn.Parameter(each, requires_grad=False))
        self._sums: Tensor | None = None  # of the rows of codes, for the product in int8
        self._summed: object = None  # which codes those are of

    @property
    def nested(self) -> Nested | None:
        """What scales in 8 bits stand for, see `fastpeft.ops.quantised_linear.unnested`."""
        # a replica of nn.DataParallel has them as plain attributes
        return (self.coarse, self.table, self.mean) if self.kind == "nf4-double" else None  # type: ignore[return-value]

    @property
    def frozen(self) -> Coded:
        """The weight as products take it."""
        return Coded(self.codes, Scales(self.scales, self.nested), self.shape)

    def can_multiply(self, x: Tensor, bias: Tensor | None) -> bool:
        """Whether `multiply` is there for x: a product in int8 that asks for no gradient."""
        is_plain = not asks_for_gradients(x, bias) and not torch.compiler.is_compiling()
        return self.kind == "int8" and is_plain and can_multiply_int8(x)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`x W^T + b` with each row of x in 8 bits, `(*, K)` -> `(*, N)`, in the dtype of x or that of autocast."""
        codes = self.codes.data_ptr(), version_of(self.codes), self.codes.device, samples(self.codes).tolist()
        if self._sums is None or self._summed != codes:
            self._sums, self._summed = self.codes.data.sum(1, dtype=torch.int32), codes
        return multiply(x, self.codes.data, self.scales.data, self._sums, bias)

    def _apply(self, fn: Any, recurse: bool = True) -> QuantisedWeight:
        super()._apply(keeping_dtypes(fn, [self.scales, *(self.nested or ())]), recurse)
        return self

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """`(N, K)` in `dtype`."""
        with torch.no_grad():
            return self.frozen.dense(dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, {self.kind}"


class QuantisedLinear(nn.Module):
    """A frozen linear layer with a quantised weight: `h = x W~^T + b`, with the bias of the layer that it replaces.

    Notes:
        It computes in the dtype of x, or that of autocast; where int8 codes are multiplied, activations are rounded to
        8 bits. Backward keeps codes and scales.
    """

    def __init__(self, layer: nn.Linear | Conv1D, kind: Format) -> None:
        super().__init__()
        weight = layer.weight.t() if isinstance(layer, Conv1D) else layer.weight
        self.out_features: int = weight.shape[0]
        self.in_features: int = weight.shape[1]
        self.quantised = QuantisedWeight(weight, kind)
        self.bias: nn.Parameter | None = layer.bias

    @property
    def weight(self) -> Tensor:
        """The dequantised weight `(N, K)`, for code that reads it, such as `nn.TransformerEncoderLayer`."""
        return self.quantised.dequantise(torch.float32 if self.bias is None else self.bias.dtype)

    def forward(self, x: Tensor) -> Tensor:
        held, dtype = self.quantised, compute_dtype(x, x)
        if is_transformed():
            return F.linear(x.to(dtype), held.dequantise(dtype), None if self.bias is None else self.bias.to(dtype))
        if held.can_multiply(x, self.bias):
            return held.multiply(x, self.bias)
        bias = None if self.bias is None else self.bias.to(dtype)
        return held.frozen.product(x.to(dtype), bias)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Numbers of trained and of all values. A quantised weight counts as the values that its codes stand for."""
    counts: dict[int, tuple[int, bool]] = {}
    for module in model.modules():
        if isinstance(module, QuantisedWeight):
            counts[id(module)] = module.shape.numel(), False
            continue
        for each in module.parameters(recurse=False):
            # bitsandbytes packs a weight in 4 bits, and only its state knows its shape
            counts[id(each)] = (getattr(each, "quant_state", None) or each).shape.numel(), each.requires_grad
    return sum(n for n, trains in counts.values() if trains), sum(n for n, _ in counts.values())
