"""A backbone made smaller since it is frozen, by fewer bits a weight."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from weakref import WeakKeyDictionary, WeakSet

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastpeft.errors import FastpeftError
from fastpeft.ladder.backbone import Backbone
from fastpeft.ladder.config import BackboneDtype
from fastpeft.ladder.frozen import CONVERSION, Conversion, conversion_of, is_quantised
from fastpeft.ops.quantise import QuantisedLinear

# by model the backbones that side networks read it by, while those exist; a copy of the model has none
_readers: WeakKeyDictionary[nn.Module, WeakSet[Backbone]] = WeakKeyDictionary()


def convert(backbone: Backbone, dtype: BackboneDtype | None) -> None:
    """Bring what is frozen of a model to `dtype`, in place: see `LadderConfig.backbone_dtype`.

    Its weights stay known by what they were before, so that a side network is recognised on the pretrained model. A
    model that was converted already is left alone. From now on, while `backbone` exists, the model stays as it is.

    Raises:
        FastpeftError: it was brought to another dtype before, another backbone reads it as it is, PEFT wraps it, it is
            quantised already, or it holds no linear layer whose weight could be. Nothing has changed then.
    """
    readers = _readers.setdefault(backbone.core, WeakSet())
    before = conversion_of(backbone.core)
    if (before.dtype if before else None) != dtype:
        _convert(backbone, dtype, before, is_read=len(readers) > 0)
    readers.add(backbone)


def _convert(backbone: Backbone, dtype: BackboneDtype | None, before: Conversion | None, is_read: bool) -> None:
    """`convert` to another dtype than the model has."""
    kind = type(backbone.core).__name__
    if before is not None:
        raise FastpeftError(
            f"backbone_dtype={dtype!r}, but another side network brought this {kind} to {before.dtype!r}. Give "
            f"backbone_dtype={before.dtype!r}, or load the model once more."
        )
    assert dtype is not None
    if is_read:
        raise FastpeftError(
            f"backbone_dtype={dtype!r}, but another side network or a pool reads this {kind} as it is, and would find "
            "other features. Load the model once more, or leave backbone_dtype out."
        )
    if backbone.model is not backbone.core:
        raise FastpeftError(
            f"backbone_dtype={dtype!r} beside a {type(backbone.model).__name__}: the adapter was made for the weights "
            "as they are. Merge it first (model.merge_and_unload()), or leave backbone_dtype out."
        )
    frozen = {
        id(tensor)
        for module in backbone.frozen
        for tensor in itertools.chain(module.parameters(recurse=False), module.buffers(recurse=False))
    }
    # of buffers those that are part of the state; others, as frequencies of positions, keep their precision
    tensors = [
        t for t in backbone.core.state_dict(keep_vars=True).values() if isinstance(t, Tensor) and id(t) in frozen
    ]
    if any(is_quantised(tensor) for tensor in tensors if isinstance(tensor, nn.Parameter)):
        raise FastpeftError(
            f"backbone_dtype={dtype!r}, but the {kind} is quantised already. Leave backbone_dtype out, or load the "
            "model without a quantization_config."
        )
    fingerprints = backbone.fingerprints()
    if dtype == "bfloat16":
        for tensor in tensors:
            if tensor.is_floating_point():
                tensor.data = tensor.data.bfloat16()
    else:
        linears = [module for module in backbone.frozen if type(module) in (nn.Linear, Conv1D)]
        if not linears:
            raise FastpeftError(
                f"backbone_dtype={dtype!r} is for linear layers, of which the backbone, a {kind}, has none. Use "
                "backbone_dtype='bfloat16'."
            )
        _replace(backbone, {linear: QuantisedLinear(linear, dtype).eval() for linear in linears})
    setattr(backbone.core, CONVERSION, Conversion(dtype, fingerprints))


def _replace(backbone: Backbone, replaced: Mapping[nn.Module, nn.Module]) -> None:
    """Put modules in the place of others wherever a model holds those."""
    for module in list(backbone.core.modules()):
        for name, child in list(module._modules.items()):
            if child in replaced:
                setattr(module, name, replaced[child])
    backbone.layers = [replaced.get(layer, layer) for layer in backbone.layers]
