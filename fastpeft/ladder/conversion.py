"""Conversion of a frozen backbone to fewer bits a weight."""

from __future__ import annotations

from weakref import WeakKeyDictionary, WeakSet

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastpeft.errors import FastpeftError
from fastpeft.ladder.backbone import Backbone
from fastpeft.ladder.config import BackboneDtype
from fastpeft.ladder.fingerprints import BEFORE_CONVERSION, fingerprints, frozen_tensors, is_quantised
from fastpeft.ops.frozen_linear import PackedConv1D, PackedLinear, pack_layer
from fastpeft.ops.quantise import QuantisedLinear
from fastpeft.support.stages import report

_DTYPE = "fastpeft_backbone_dtype"  # an attribute of a converted model, which a copy of the model has too

# by model the backbones through which side networks read it, while they exist; a copy of the model has none
_readers: WeakKeyDictionary[nn.Module, WeakSet[Backbone]] = WeakKeyDictionary()


def converted_to(core: nn.Module) -> BackboneDtype | None:
    """The dtype that `convert` brought a model to; None if it is as it was loaded."""
    dtype: BackboneDtype | None = getattr(core, _DTYPE, None)
    return dtype


def convert(backbone: Backbone, dtype: BackboneDtype | None) -> None:
    """Convert the frozen part of a model to `dtype`, in place: see `LadderConfig.backbone_dtype`.

    The fingerprints of its weights before the conversion are kept, so that a side network recognises the pretrained
    model. A model that has this dtype already stays as it is. While `backbone` exists, the model cannot be converted
    again.

    Raises:
        FastpeftError: it was converted to another dtype before, another backbone reads it as it is, PEFT wraps it, it
            is quantised, or it holds no linear layer to quantise. Nothing has changed then.
    """
    readers = _readers.setdefault(backbone.core, WeakSet())
    if converted_to(backbone.core) != dtype:
        _convert(backbone, dtype, is_read=len(readers) > 0)
    readers.add(backbone)


def pack(backbone: Backbone) -> None:
    """Let the frozen linear layers of a model compute with packs of their weights.

    In a model that was converted to bfloat16 these take the place of the weights.
    """
    for module in backbone.frozen:
        pack_layer(module, keeps_weight=converted_to(backbone.core) != "bfloat16")


def _convert(backbone: Backbone, dtype: BackboneDtype | None, is_read: bool) -> None:
    """`convert` to a dtype that the model does not have."""
    tensors, linears = _convertible(backbone, dtype, is_read)
    assert dtype is not None
    core = backbone.core
    before_conversion = fingerprints(backbone)
    if dtype == "bfloat16":
        for tensor in tensors:
            if tensor.is_floating_point():
                tensor.data = tensor.data.bfloat16()
    else:
        replaced: dict[nn.Module, nn.Module] = {}
        for linear in linears:
            replaced[linear] = QuantisedLinear(linear, dtype).eval()
            report("converting layers", len(replaced), len(linears))
        for name, module in list(core.named_modules(remove_duplicate=False)):
            if module in replaced:
                core.set_submodule(name, replaced[module])
        backbone.layers = [replaced.get(layer, layer) for layer in backbone.layers]
    setattr(core, BEFORE_CONVERSION, before_conversion)
    setattr(core, _DTYPE, dtype)


def _convertible(
    backbone: Backbone, dtype: BackboneDtype | None, is_read: bool
) -> tuple[list[Tensor], list[nn.Module]]:
    """The frozen tensors and linear layers of a model that may be converted, as `convert` says."""
    core = backbone.core
    kind, before = backbone.class_name, converted_to(core)
    if before is not None:
        raise FastpeftError(
            f"backbone_dtype={dtype!r}, but another side network brought this {kind} to {before!r}. Give "
            f"backbone_dtype={before!r}, or load the model once more."
        )
    if is_read:
        raise FastpeftError(
            f"backbone_dtype={dtype!r}, but another side network or a pool reads this {kind} as it is, and would find "
            "other features. Load the model once more, or leave backbone_dtype out."
        )
    if backbone.model is not core:
        raise FastpeftError(
            f"backbone_dtype={dtype!r} beside a {type(backbone.model).__name__}: the adapter was made for the weights "
            "as they are. Merge it first (model.merge_and_unload()), or leave backbone_dtype out."
        )
    frozen = {id(tensor) for tensor in frozen_tensors(backbone)}
    # buffers that are not in the state, such as frequencies of positions, keep their precision
    tensors = [t for t in core.state_dict(keep_vars=True).values() if isinstance(t, Tensor) and id(t) in frozen]
    if any(is_quantised(tensor) for tensor in tensors if isinstance(tensor, nn.Parameter)):
        raise FastpeftError(
            f"backbone_dtype={dtype!r}, but the {kind} is quantised already. Leave backbone_dtype out, or load the "
            "model without a quantization_config."
        )
    linears = [module for module in backbone.frozen if type(module) in (nn.Linear, Conv1D, PackedLinear, PackedConv1D)]
    if dtype != "bfloat16" and not linears:
        raise FastpeftError(
            f"backbone_dtype={dtype!r} is for linear layers, of which the backbone, a {kind}, has none. Use "
            "backbone_dtype='bfloat16'."
        )
    return tensors, linears
