"""A base layer whose weight bitsandbytes keeps in 4 bits, as QLoRA's bases do.

The weight stays as it is. While an adapter is added its numbers are made whole, in float32, each time that something
asks for them: a check, the decomposition, the fingerprint, the scales of changes. Products of the compiled module for
CPUs make a part of them at a time, others all of them. No format holds the rest `W - (U0 * s) V0` beside it, so such a
layer has the implicit residual.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.errors import FastpeftError
from fastpeft.ops.dtypes import autocast_dtype
from fastpeft.ops.quantised_linear import BLOCK, Nested, dequantise, unnested
from fastpeft.support.four_bits import keep_form


def is_in_4_bits(layer: nn.Module) -> bool:
    """Whether the layer is bitsandbytes' `Linear4bit`."""
    return hasattr(getattr(layer, "weight", None), "quant_state")


class WeightIn4Bits:
    """The weight `(N, K)` of a `Linear4bit`, as products take it: what `QuantisedWeight` is to a residual.

    Args:
        layer: has the weight, which may be moved later.
        name: what error messages call the layer.

    Raises:
        FastpeftError: the weight is not in 4 bits yet, or in another form than nf4 with blocks of 64.
    """

    def __init__(self, layer: Any, name: str) -> None:
        self._layer = layer
        state = layer.weight.quant_state
        if state is None:
            raise FastpeftError(
                f"{name} is a {type(layer).__name__} whose weight is not in 4 bits yet. Move the model to its device "
                "first: bitsandbytes quantises it then."
            )
        if state.quant_type != "nf4" or state.blocksize != BLOCK:
            raise FastpeftError(
                f"{name} is in {state.quant_type} with blocks of {state.blocksize}; SiVA takes bases in nf4 with "
                f"blocks of {BLOCK}. Load the model with BitsAndBytesConfig(load_in_4bit=True, "
                "bnb_4bit_quant_type='nf4'), or unquantised with SivaConfig(residual_dtype='nf4')."
            )
        keep_form(layer, passes_gradients=True, name=name)
        self.shape = torch.Size((layer.out_features, layer.in_features))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the weight had."""
        dtype: torch.dtype = self._layer.weight.quant_state.dtype
        return dtype

    @property
    def codes(self) -> Tensor:
        codes: Tensor = self._layer.weight.data.view(torch.uint8)
        return codes

    @property
    def scales(self) -> Tensor:
        """Of blocks, in float32; in 8 bits where `nested` has their own scales."""
        scales: Tensor = self._layer.weight.quant_state.absmax
        return scales

    @property
    def nested(self) -> Nested | None:
        state = self._layer.weight.quant_state
        return (state.state2.absmax, state.state2.code, state.offset) if state.nested else None

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        """What the layer computes in: autocast's dtype, else that which its configuration names, else that of x."""
        return autocast_dtype(x.device) or self._layer.compute_dtype or x.dtype

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """`(N, K)` in `dtype`."""
        return dequantise(self.codes, unnested(self.scales, self.nested), self.shape, dtype)
