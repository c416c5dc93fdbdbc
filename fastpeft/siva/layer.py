"""The linear layer of SiVA: a PEFT layer that can also be used on its own."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.errors import FastpeftError
from fastpeft.functional import siva_linear, siva_linear_mixed
from fastpeft.ops.dtypes import autocast_dtype
from fastpeft.ops.quantise import QuantisedWeight
from fastpeft.siva import grouping
from fastpeft.siva.config import Residual, SivaConfig
from fastpeft.siva.decompose import Factors
from fastpeft.siva.four_bits import WeightIn4Bits
from fastpeft.siva.frozen import Operands, as_group, can_call_directly
from fastpeft.siva.lazy_weight import LazyWeight
from fastpeft.siva.loading import LoadableLinear
from fastpeft.siva.quantise import quantised_siva_linear
from fastpeft.siva.rows import AdapterRows

# the fields of SivaConfig that concern a layer by itself, beside r
_OF_ONE_LAYER = ("d", "residual", "residual_dtype", "quant_iterations", "svd_niter", "init_weights", "pack_weights")


class SivaLinear(LoadableLinear):
    r"""A linear layer whose top-r singular triplets train while the rest of its weight is frozen.

    `h = x W_r^T + ((x V^T) * s) U^T + b` with `U = U0 + dU` and `V = V0 + dV`

    An adapter has the changes `siva_du (N, r)` and `siva_dv (r, K)`, which train and start at 0, and the initial
    factors `siva_s (r,)`, `siva_u0` and `siva_v0`, which do not train. All are float32, but the last two in bfloat16
    beside a residual in 4 bits, which is made with their rounded values. So weight decay pulls towards the pretrained
    weight, and an optimizer makes the steps that it would make on U and V.

    With `residual="frozen"` the wrapped layer's weight is `W_r`. Adapters share it, so their initial factors must
    agree. With `"implicit"` it stays the pretrained `W0`, and `((x V0^T) * s) U0^T` is subtracted at run time.

    Args:
        base_layer: `nn.Linear` or transformers' `Conv1D`. It is taken over: its weight changes in place.
        adapter_name: Name of the first adapter.
        r: Number of singular triplets that train. None: that of `config`.
        config: What of `SivaConfig` concerns one layer: r, d, residual, residual_dtype, quant_iterations, svd_niter,
            init_weights (`"saved"` leaves the factors to `load_state_dict`) and pack_weights. None: the defaults of
            `SivaConfig`.
        step: How far each triplet's part of the weight moves, in the spectral norm and as a share of the weight's, when
            an optimizer moves every trained entry by 1, see `fastpeft.siva.change.scales`. None: in proportion to the
            triplet's singular value.
        name: What error messages call the layer.
        settings: Those fields of `SivaConfig`, in place of `config`.

    Raises:
        FastpeftError: The weight cannot be decomposed so, `config` and `settings` are both given, or `settings` has
            other fields.

    Notes:
        Several active adapters add their changes: `W0 + sum_i (U_i diag(s_i) V_i - U0_i diag(s_i) V0_i)`.
        No adapter has dropout: the low-rank path carries the largest part of the pretrained weight.

    Example:
        >>> layer = SivaLinear.from_linear(nn.Linear(16, 8), r=2)
        >>> layer(torch.randn(3, 16)).shape
        torch.Size([3, 8])
    """

    rows: AdapterRows | None = None  # while the model runs with an adapter for each row of the batch

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str = "default",
        r: int | None = None,
        config: SivaConfig | None = None,
        *,
        step: float | None = None,
        name: str = "the layer",
        **settings: Any,
    ) -> None:
        if config is not None and settings:
            raise FastpeftError(
                f"{name} got a config and {', '.join(settings)} beside it. Write these into the config."
            )
        if strange := settings.keys() - set(_OF_ONE_LAYER):
            raise FastpeftError(
                f"{name} got {', '.join(sorted(strange))}, which would do nothing for one layer; allowed are "
                f"{', '.join(_OF_ONE_LAYER)}. Others take effect in a SivaConfig for get_peft_model."
            )
        config = SivaConfig(**settings) if config is None else config
        super().__init__(base_layer, name, config.pack_weights)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config.r if r is None else r, config, step)

    @classmethod
    def from_linear(
        cls, linear: nn.Module, r: int = 8, d: int | None = None, residual: Residual = "frozen", **arguments: Any
    ) -> SivaLinear:
        """Take over `linear` (which is changed in place) and make its top-r singular triplets trainable.

        The arguments are those of the class, but for `config`, whose fields are given by their names.
        """
        return cls(linear, r=r, d=d, residual=residual, **arguments)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.rows is not None and not self._disable_adapters:
            return self._mixed(x, self.rows.of(x, self.name))
        taken = grouping.take(self, x)
        if taken is not None:
            return taken
        factors = self._acting()  # first: an adapter taken in only now may bring a quantised residual
        parts: Any = self._modules  # as in `_trained`
        base = parts["base_layer"]
        if factors is None:
            return base(x, *args, **kwargs)
        quantised = self._quantised_weight
        if quantised is not None:
            return self._quantised_forward(x, quantised, factors)
        operands = (self.stored, *factors, base.bias, self.packs)
        if can_call_directly(x, operands):
            (h,), _ = torch.ops.fastpeft.siva_linear.default(x, *as_group(operands))
            return h
        return siva_linear(x, *operands)

    def _mixed(self, x: Tensor, rows: AdapterRows) -> Tensor:
        """Compute each row of x by its adapter, or by the pretrained weight if this layer has no such adapter."""
        factors = [self._low_rank([name] if name in self.siva_du else []) or self._blank(0) for name in rows.sizes]
        quantised = self._quantised_weight
        if quantised is not None:  # one adapter after another: each product dequantises the weight
            return rows.each(
                x,
                [partial(self._quantised_forward, quantised=quantised, factors=each) for each in factors],
            )
        us, ss, vs = zip(*factors, strict=True)
        order = None if rows.order is None else rows.order.to(x.device)
        bias, sizes = self.base_layer.bias, list(rows.sizes.values())
        return siva_linear_mixed(x, self.stored, us, ss, vs, sizes, order, bias, self.packs)

    def _quantised_forward(self, x: Tensor, quantised: QuantisedWeight | WeightIn4Bits, factors: Factors) -> Tensor:
        """Compute with the factors of `_low_rank`."""
        h = quantised_siva_linear(x, quantised, *factors, bias=self.base_layer.bias, dtype=self._compute_dtype(x))
        return h if self.in_4_bits is None or autocast_dtype(x.device) else h.to(x.dtype)

    def operands(self) -> Operands | None:
        factors = self._acting()
        if factors is None or self._quantised_weight is not None:
            return None
        return (self.stored, *factors, self.base_layer.bias, self.packs)

    @property
    def weight(self) -> Tensor:
        """The weight with which the layer computes, differentiable in the factors, in the base layer's layout.

        Modules such as `nn.MultiheadAttention` read it instead of calling the layer. It is computed when its values are
        used, see `LazyWeight`.

        Raises:
            FastpeftError: At its use, if each row of the batch has an adapter of its own.
        """
        if torch.compiler.is_compiling():  # the compiler leaves out what nothing uses
            return self._compute_weight()
        shape = (self.in_features, self.out_features) if self.fan_in_fan_out else (self.out_features, self.in_features)
        like = self.base_layer.weight
        if self.in_4_bits is not None:
            like = like.new_empty(0, dtype=self._dtype)
        return LazyWeight(self._compute_weight, like, shape)

    def _compute_weight(self) -> Tensor:
        if self.rows is not None and not self.disable_adapters:
            raise FastpeftError(
                f"{self.name}: adapter_names needs layers that are called, but a module reads this layer's weight. Run "
                "the model once for each adapter."
            )
        factors = self._acting()
        if factors is None:
            merged: Tensor = self.base_layer.weight if self.in_4_bits is None else self._weight.to(self._dtype)
            return merged
        weight = (self._weight + factors.product()).to(self._dtype)
        return weight.t() if self.fan_in_fan_out else weight

    def _acting(self) -> Factors | None:
        """What must be added to the stored weight now; None if nothing."""
        if self._disable_adapters:
            if self.merged:
                self.unmerge()
            return self._low_rank([])
        if self.merged_adapters:
            return None
        active = self._active_adapter
        names = [active] if isinstance(active, str) else active
        if len(names) == 1 and self.residual.get(names[0]) == "frozen" and not self._waiting:
            return self._trained(names[0])  # as `_low_rank` would, of which it is the most common case
        return self._low_rank([name for name in names if name in self.siva_du])
