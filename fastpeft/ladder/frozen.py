"""What a backbone can be made since it is frozen: smaller, by fewer bits a weight, and compiled layer by layer."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.pytorch_utils import Conv1D

from fastpeft.errors import FastpeftError
from fastpeft.quantise import QuantisedLinear

if TYPE_CHECKING:
    from fastpeft.ladder.backbone import Backbone
    from fastpeft.ladder.config import BackboneDtype

_CONVERSION = "fastpeft_conversion"  # an attribute of the model, which a copy of the model has too

# by model the backbones that side networks read it by, while those exist; a copy of the model has none
_readers: WeakKeyDictionary[nn.Module, WeakSet[Backbone]] = WeakKeyDictionary()


class Conversion(NamedTuple):
    """What a model's backbone was brought to, and the fingerprints of its weights before that."""

    dtype: BackboneDtype
    fingerprints: dict[str, str]


def conversion_of(core: nn.Module) -> Conversion | None:
    """What `convert` did to a model; None where nothing."""
    found: Conversion | None = getattr(core, _CONVERSION, None)
    return found


def is_quantised(tensor: Tensor) -> bool:
    """Whether a weight is stored in few bits, by itself or, as one of torchao, by the tensors that it is made of."""
    return not tensor.is_floating_point() or is_traceable_wrapper_subclass(tensor)


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
    setattr(backbone.core, _CONVERSION, Conversion(dtype, fingerprints))


def _replace(backbone: Backbone, replaced: Mapping[nn.Module, nn.Module]) -> None:
    """Put modules in the place of others wherever a model holds those."""
    for module in list(backbone.core.modules()):
        for name, child in list(module._modules.items()):
            if child in replaced:
                setattr(module, name, replaced[child])
    backbone.layers = [replaced.get(layer, layer) for layer in backbone.layers]


class CompiledForward:
    """The forward of a layer, compiled when it is first called: hooks on the layer are called around it.

    It belongs to its layer: a copy of the model, unpickled or not, compiles anew for the layer that it holds.

    Args:
        layer: whose `forward` it takes the place of.
        options: as `torch.compile` takes them.
    """

    def __init__(self, layer: nn.Module, options: Mapping[str, Any]) -> None:
        own = vars(layer).get("forward")
        self._forward: Any = own._forward if isinstance(own, CompiledForward) else layer.forward
        self._options = options
        self._compiled: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._compiled is None:
            self._compiled = torch.compile(self._forward, **self._options)
        return self._compiled(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_compiled": None}
