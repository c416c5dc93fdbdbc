"""The linear layer that SiVA takes over: which kinds there are, and how its frozen weight is stored."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.pytorch_utils import Conv1D

from fastpeft.errors import FastpeftError
from fastpeft.ops.define import is_transformed
from fastpeft.ops.dtypes import compute_dtype
from fastpeft.ops.frozen_linear import Packed
from fastpeft.ops.packing import Packs, is_token
from fastpeft.ops.quantise import Format, QuantisedWeight
from fastpeft.siva.decompose import Factors, subtract
from fastpeft.siva.four_bits import WeightIn4Bits, is_in_4_bits
from fastpeft.support.fingerprints import fingerprint
from fastpeft.support.processes import is_held_by_fsdp

if dist.is_available():  # some builds of torch come without
    from torch.distributed.tensor import DTensor

_PLAIN = ("FalconLinear",)  # layers that compute x W^T + b in a forward of their own
# weight, u, s, v, bias and packs, as `siva_linear` takes them
Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Packs | None]


class BaseWeightLayer(nn.Module, BaseTunerLayer):
    """A linear layer whose stored weight does not train: the pretrained W0, or the rest of it, W_r.

    Args:
        base_layer: `nn.Linear` or transformers' `Conv1D`.
        name: What error messages call the layer.
        pack_weights: As in `SivaConfig`.

    Attributes:
        packs: The stored weight as a product on a CPU reads it fastest.
        quantised: W_r, quantised; the stored weight is then empty, unless adapters are merged into it.
        in_4_bits: The stored weight where bitsandbytes keeps it in 4 bits; it is W0 then, and never changes.
        fan_in_fan_out: Whether the base layer stores its weight as `(in_features, out_features)`.
        base_fingerprint: Of the pretrained weight; None until an adapter is added, and on the meta device.

    Raises:
        FastpeftError: The layer is of another kind.
    """

    def __init__(self, base_layer: nn.Module, name: str, pack_weights: bool) -> None:
        super().__init__()
        check_kind(base_layer, name)
        self.base_layer: Any = base_layer.requires_grad_(False)  # nn.Linear or Conv1D, which has no types
        self.quantised: QuantisedWeight | None
        self.register_module("quantised", None)
        self.in_4_bits = WeightIn4Bits(base_layer, name) if is_in_4_bits(base_layer) else None
        self.name = name
        self.packs = Packs(pack_weights)
        self.fan_in_fan_out = isinstance(base_layer, Conv1D)
        shape = self._weight.shape if self.in_4_bits is None else self.in_4_bits.shape
        self.out_features, self.in_features = shape
        self.base_fingerprint: str | None = None
        self.merged_adapters: list[str] = []

    def operands(self) -> Operands | None:
        """What `siva_linear` takes beside x, as the layer acts now.

        None where the base layer acts alone, and where the weight is quantised.
        """
        raise NotImplementedError

    @property
    def stored(self) -> Tensor:
        """The stored weight `(out_features, in_features)`; empty where `quantised` takes its place.

        Where it is in 4 bits these are its codes.
        """
        weight: Tensor = self._modules["base_layer"].weight  # type: ignore[union-attr, assignment]
        if weight.requires_grad and not weight.is_leaf:  # FSDP1: a view of a flat parameter of which other parts train
            weight = weight.detach()
        return weight.t() if self.fan_in_fan_out else weight

    @property
    def _quantised_weight(self) -> QuantisedWeight | WeightIn4Bits | None:
        """The weight with which products are made, where that is quantised, here or by bitsandbytes."""
        return self._modules["quantised"] or self.in_4_bits  # type: ignore[return-value]

    @property
    def _dtype(self) -> torch.dtype:
        """The dtype of the base layer's weight, or which it had before it was in 4 bits."""
        dtype: torch.dtype = self.base_layer.weight.dtype if self.in_4_bits is None else self.in_4_bits.dtype
        return dtype

    def _compute_dtype(self, x: Tensor) -> torch.dtype:
        """What a product of x with a quantised weight computes in."""
        return self.in_4_bits.compute_dtype(x) if self.in_4_bits else compute_dtype(x, self.base_layer.weight)

    @property
    def _weight(self) -> Tensor:
        """The weight that does not train, dequantised if need be, outside of autograd."""
        if self.in_4_bits is not None:
            return self.in_4_bits.dequantise(torch.float32)  # whatever dtype it had: so it is exact
        if self.quantised is not None and not self.merged:
            return self.quantised.dequantise(self.base_layer.weight.dtype)
        return self.stored.data

    @_weight.setter
    def _weight(self, value: Tensor) -> None:
        self.check_storable()
        self.packs.drop()  # it would notice, but hold the old weight until the next call
        self.base_layer.weight.data = value.t().contiguous() if self.fan_in_fan_out else value

    def check_storable(self) -> None:
        """Raise `FastpeftError` if what is stored as the base layer's weight would be lost."""
        layer = self.base_layer
        if is_sharded(layer):
            raise FastpeftError(
                f"{self.name}: its weight is sharded among processes, so that what one stores there now would be lost. "
                "Save the adapter, load it onto the base model in one process, and do it there."
            )
        # a pruned layer, and the older weight_norm, compute it in a hook
        if "weight" not in layer._parameters and (is_parametrized(layer, "weight") or layer._forward_pre_hooks):
            raise FastpeftError(
                f"{self.name}: since the adapter was put on it, its weight is computed from others, as by pruning or "
                "weight_norm, so that what is stored there now would be lost. Make it a plain weight first, as by "
                "torch.nn.utils.prune.remove(layer.base_layer, 'weight')."
            )

    def _hold(self, rest: QuantisedWeight) -> None:
        """Let a quantised W_r serve in the place of the stored weight, which keeps dtype and device."""
        self.check_storable()
        self.packs.drop()
        self.quantised = rest
        self.base_layer.weight.data = self.base_layer.weight.data.new_empty(0)

    def _take_out(self, initial: Factors, kind: Format | None) -> None:
        """Make W_r, in the format `kind`, of the pretrained weight that is stored and the initial factors."""
        if kind is None:
            self._weight = subtract(self._weight, initial)
        else:
            self._hold(QuantisedWeight(subtract(self._weight.float(), initial), kind))

    def _give_back(self, weight: Tensor) -> None:
        """Store the pretrained weight, which is computed and so equal to rounding only."""
        self._weight = weight
        # note down what it stands for, so that adapters made on it still know it
        self.base_layer.siva_restored = {fingerprint(self._weight): self.base_fingerprint}


def as_group(operands: Operands) -> tuple[list[Any], ...]:
    """What the op takes beside x of a layer with a dense weight: a group of one."""
    weight, u, s, v, bias, _ = operands
    return [weight], [None], [u], [s], [v], [bias]


def can_call_directly(x: Tensor, operands: Operands) -> bool:
    """Whether x is a token for which the op can be called as it is.

    `siva_linear` would look at the operands, cast them and choose a pack: a fifth of the time of the product.
    """
    weight, *others, _ = operands
    return (
        not torch.is_grad_enabled()
        and x.dim() > 0
        and x.shape[-1] == weight.shape[1]
        and is_token(x, weight)
        and all(other is None or other.dtype is x.dtype for other in others)
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed())
    )


def is_sharded(layer: Any) -> bool:
    """Whether processes hold parts of the layer's weight: by tensor parallelism, or by FSDP, which may gather it."""
    return is_held_by_fsdp(layer) or (dist.is_available() and isinstance(layer.weight, DTensor))


def check_kind(base_layer: nn.Module, name: str) -> None:
    """Raise `FastpeftError` unless SiVA knows the kind of layer, and all that its call computes."""
    kind = type(base_layer)
    if not isinstance(base_layer, (nn.Linear, Conv1D)):
        raise FastpeftError(
            f"{name} is a {kind.__name__}; SiVA adapts nn.Linear and transformers' Conv1D. Leave it out of "
            "target_modules."
        )
    if kind.__name__ == "Linear8bitLt":
        raise FastpeftError(
            f"{name} has a weight in 8 bits of bitsandbytes, which SiVA does not adapt. Load the model unquantised, "
            "with SivaConfig(residual_dtype='int8')."
        )
    if is_sharded(base_layer):
        raise FastpeftError(
            f"{name}: its weight is sharded among processes, and SiVA decomposes whole ones. Put the adapter on the "
            "model first and shard it then, by FSDP; tensor parallelism cannot be used."
        )
    if is_traceable_wrapper_subclass(base_layer._parameters.get("weight")):
        raise FastpeftError(
            f"{name} has a weight in the form of torchao ({type(base_layer.weight).__name__}), which SiVA does not "
            "adapt. Load the model unquantised, with SivaConfig(residual_dtype='int8') or 'nf4' for fewer bits."
        )
    # accelerate's hooks replace the forward of an instance; they move x and the weight alone
    forward = kind.forward if hasattr(base_layer, "_hf_hook") else getattr(base_layer.forward, "__func__", None)
    plain = forward in (nn.Linear.forward, Conv1D.forward, Packed.forward) or kind.__name__ in _PLAIN
    problem = None
    if "weight" not in base_layer._parameters:  # it would come out of its parts again, whatever is stored in it
        problem = "has a weight that is computed from others, as by weight_norm"
    elif not (plain or is_in_4_bits(base_layer)):
        problem = f"is a {kind.__name__} with a forward of its own"
    elif base_layer._forward_pre_hooks or base_layer._forward_hooks:
        problem = "has hooks on its forward"
    if problem is not None:
        raise FastpeftError(
            f"{name} {problem}; SiVA computes x W^T + b in its place, and what it does beside would be lost. Leave the "
            "layer out with exclude_modules, or put a plain nn.Linear there."
        )


def check_base(base_layer: nn.Module, residual: str, name: str) -> None:
    """Raise `FastpeftError` if the residual would replace a weight in 4 bits, or the weight is elsewhere."""
    if base_layer.weight.is_meta and hasattr(base_layer, "_hf_hook"):
        raise FastpeftError(
            f"{name}: accelerate keeps its weight elsewhere (offload), so none can be decomposed. Load the base with "
            "a device_map that leaves it on a device, or in fewer bits."
        )
    if residual == "frozen" and is_in_4_bits(base_layer):
        raise FastpeftError(
            f"{name}: its weight is in 4 bits, which hold no other weight in its place. Use residual='implicit'."
        )


def matrix(base_layer: Any, name: str) -> Tensor:
    """The weight `(N, K)` of a layer of any kind, as numbers."""
    if is_in_4_bits(base_layer):
        return WeightIn4Bits(base_layer, name).dequantise(torch.float32)
    weight: Tensor = base_layer.weight.data
    return weight.t() if isinstance(base_layer, Conv1D) else weight


def original_fingerprint(base_layer: Any) -> str | None:
    """The fingerprint of a pretrained weight, also if an unloaded adapter left it equal to rounding only.

    None on the meta device, where a weight has no values yet.
    """
    if is_in_4_bits(base_layer):
        return fingerprint(matrix(base_layer, "the layer"), in_4_bits=True)
    if base_layer.weight.device.type == "meta":
        return None
    found = fingerprint(matrix(base_layer, "the layer"))
    restored: dict[str, str] = getattr(base_layer, "siva_restored", {})
    return restored.get(found) or found
