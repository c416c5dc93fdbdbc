"""The linear layer that SiVA takes over: which kinds there are, and its weight as numbers and as products take it.

A weight that bitsandbytes has in 4 bits, as QLoRA's bases, stays as it is. While an adapter is added its numbers are
made each time that something asks for them.
"""

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
from fastpeft.ops.frozen_linear import Packed
from fastpeft.ops.frozen_weight import Coded, FrozenWeight
from fastpeft.ops.quantised_linear import BLOCK, Scales
from fastpeft.siva.decompose import Factors
from fastpeft.support.fingerprints import fingerprint
from fastpeft.support.four_bits import keep_form
from fastpeft.support.processes import is_held_by_fsdp

if dist.is_available():  # some builds of torch come without
    from torch.distributed.tensor import DTensor


class AdaptedLayer(nn.Module, BaseTunerLayer):
    """What groups and rows of a batch know of `SivaLinear`."""

    base_layer: Any
    in_features: int
    rows: Any = None  # while the model runs with an adapter for each row of the batch

    @property
    def frozen(self) -> FrozenWeight:
        """The weight that does not train, as products take it."""
        raise NotImplementedError

    def acting(self) -> Factors | None:
        """What must be added to the stored weight now; None if nothing."""
        raise NotImplementedError

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        """In what a product with x computes."""
        raise NotImplementedError


def check_kind(base_layer: Any, name: str) -> None:
    """Raise `FastpeftError` unless SiVA knows the kind of layer, and all that its call computes."""
    kind = type(base_layer)
    if not isinstance(base_layer, (nn.Linear, Conv1D)):
        raise FastpeftError(
            f"{name} is a {kind.__name__}; SiVA adapts nn.Linear and transformers' Conv1D. Leave it out of "
            "target_modules."
        )
    if is_sharded(base_layer):
        raise FastpeftError(
            f"{name}: its weight is sharded among processes, and SiVA decomposes whole ones. Put the adapter on the "
            "model first and shard it then, by FSDP; tensor parallelism cannot be used."
        )
    if kind.__name__ == "Linear8bitLt" or is_traceable_wrapper_subclass(base_layer._parameters.get("weight")):
        form = "8 bits of bitsandbytes" if kind.__name__ == "Linear8bitLt" else "the form of torchao"
        raise FastpeftError(
            f"{name} has a weight in {form} ({type(base_layer.weight).__name__}), which SiVA does not adapt. Load the "
            "model unquantised, with SivaConfig(residual_dtype='int8') or 'nf4' for fewer bits."
        )
    problem = None
    if "weight" not in base_layer._parameters:  # it would come out of its parts again, whatever is stored in it
        problem = "has a weight that is computed from others, as by weight_norm"
    elif not (_computes_linear(base_layer) or is_in_4_bits(base_layer)):
        problem = f"is a {kind.__name__} with a forward of its own"
    elif base_layer._forward_pre_hooks or base_layer._forward_hooks:
        problem = "has hooks on its forward"
    if problem is not None:
        raise FastpeftError(
            f"{name} {problem}; SiVA computes x W^T + b in its place, and what it does beside would be lost. Leave the "
            "layer out with exclude_modules, or put a plain nn.Linear there."
        )


def _computes_linear(layer: Any) -> bool:
    """Whether the forward of a layer is known to be `x W^T + b` and no more."""
    kind = type(layer)
    # accelerate's hooks replace the forward of an instance; they move x and the weight alone
    forward = kind.forward if hasattr(layer, "_hf_hook") else getattr(layer.forward, "__func__", None)
    return forward in (nn.Linear.forward, Conv1D.forward, Packed.forward) or kind.__name__ == "FalconLinear"


def check_base(base_layer: Any, residual: str, name: str) -> None:
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


def check_storable(base_layer: Any, name: str) -> None:
    """Raise `FastpeftError` if what is stored as the base layer's weight would be lost."""
    if is_sharded(base_layer):
        raise FastpeftError(
            f"{name}: its weight is sharded among processes, so that what one stores there now would be lost. "
            "Save the adapter, load it onto the base model in one process, and do it there."
        )
    # a pruned layer, and the older weight_norm, compute it in a hook
    computed = is_parametrized(base_layer, "weight") or base_layer._forward_pre_hooks
    if "weight" not in base_layer._parameters and computed:
        raise FastpeftError(
            f"{name}: since the adapter was put on it, its weight is computed from others, as by pruning or "
            "weight_norm, so that what is stored there now would be lost. Make it a plain weight first, as by "
            "torch.nn.utils.prune.remove(layer.base_layer, 'weight')."
        )


def is_sharded(layer: Any) -> bool:
    """Whether processes hold parts of the layer's weight: by tensor parallelism, or by FSDP, which may gather it."""
    return is_held_by_fsdp(layer) or (dist.is_available() and isinstance(layer.weight, DTensor))


def is_in_4_bits(layer: Any) -> bool:
    """Whether the layer is bitsandbytes' `Linear4bit`."""
    return hasattr(getattr(layer, "weight", None), "quant_state")


def check_4_bits(layer: Any, name: str) -> None:
    """Raise `FastpeftError` unless a `Linear4bit` has its weight in nf4 with blocks of 64; keep it in that form."""
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


def weight_in_4_bits(layer: Any) -> Coded:
    """The weight of a `Linear4bit` as products take it."""
    state = layer.weight.quant_state
    nested = (state.state2.absmax, state.state2.code, state.offset) if state.nested else None
    return Coded(layer.weight.data.view(torch.uint8), Scales(state.absmax, nested), torch.Size(shape_of(layer)))


def shape_of(layer: Any) -> tuple[int, int]:
    """The shape `(N, K)` of a layer's matrix, also where it is stored in 4 bits."""
    return (layer.out_features, layer.in_features) if hasattr(layer, "in_features") else tuple(layer.weight.T.shape)


def matrix(base_layer: Any, name: str) -> Tensor:
    """The weight `(N, K)` of a layer of any kind, as numbers."""
    if is_in_4_bits(base_layer):
        check_4_bits(base_layer, name)
        return weight_in_4_bits(base_layer).dense(torch.float32)  # whatever dtype it had: so it is exact
    weight: Tensor = base_layer.weight.data
    return weight.t() if isinstance(base_layer, Conv1D) else weight


def original_fingerprint(base_layer: Any) -> str | None:
    """The fingerprint of a pretrained weight, also if an unloaded adapter left it equal to rounding only.

    None on the meta device, where a weight has no values yet.
    """
    if base_layer.weight.device.type == "meta":
        return None
    found = fingerprint(matrix(base_layer, "the layer"), in_4_bits=is_in_4_bits(base_layer))
    restored: dict[str, str] = getattr(base_layer, "siva_restored", {})
    return restored.get(found) or found
