"""Fingerprints of a backbone's weights, by which a side network recognises the model that it was trained on."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastpeft.errors import FastpeftError
from fastpeft.ladder.backbone import Backbone
from fastpeft.support.fingerprints import evenly_spaced, fingerprint, fingerprints_agree
from fastpeft.support.processes import is_held_by_fsdp

logger = logging.getLogger(__name__)

# an attribute of a model whose weights were converted: its fingerprints before that
BEFORE_CONVERSION = "fastpeft_fingerprints"

_BETWEEN = "layers between"
_WORDS = "layer of words"
_SAMPLE = 64  # entries of each weight of those


def fingerprints(
    backbone: Backbone, trained: Iterable[nn.Parameter] = (), *, skip_trained: bool = False
) -> dict[str, str]:
    """Fingerprints of the embedding, the first and the last layer, without those whose weights are quantised.

    What FSDP shards is left out too. Of the layers between them, and of the layer that scores words where that is not
    the embedding, some entries of every weight stand for all, or each load would read the whole model. They tell that a
    weight was trained or had an adapter merged into it, and not that a few of its entries were changed. A backbone that
    was converted to another dtype has the fingerprints of its weights before that.

    Args:
        backbone: the model.
        trained: parameters that change, such as those of an adapter; they are left out.
        skip_trained: whether to leave out each part that holds some of `trained`: the adapter itself recognises it.
    """
    before: dict[str, str] | None = getattr(backbone.core, BEFORE_CONVERSION, None)
    if before is not None:
        return dict(before)
    changing = {id(parameter) for parameter in trained}
    words, embedded = backbone.decoder, getattr(backbone.input_embeddings, "weight", None)
    parts: dict[str, Iterable[nn.Module]] = {
        "embedding": filter(None, [backbone.input_embeddings]),
        "first layer": [backbone.layers[0]],
        _BETWEEN: backbone.layers[1:-1],
        "last layer": [backbone.layers[-1]],
        _WORDS: [] if words is None or words.weight is embedded else [words],  # it is frozen and not saved
    }
    found = {}
    for name, given in parts.items():
        modules = list(given)
        if any(is_held_by_fsdp(part) for module in modules for part in module.modules()):
            continue  # its weights may be pieces here, or nothing
        weights = [p for module in modules for p in module.parameters()]
        kept = [p for p in weights if id(p) not in changing]
        if kept and not any(map(is_quantised, kept)) and not (skip_trained and len(kept) < len(weights)):
            found[name] = fingerprint(_joined([_sample(p) for p in kept] if name in (_BETWEEN, _WORDS) else kept))
    return found


def check_fingerprints(
    backbone: Backbone, expected: Mapping[str, str], source: str | None, trained: Iterable[nn.Parameter]
) -> None:
    """Raise `FastpeftError` if a saved fingerprint is not that of the backbone's weights without `trained`."""
    found = fingerprints(backbone, trained)
    different = [name for name, text in expected.items() if not fingerprints_agree(text, found.get(name, text))]
    if different:
        raise FastpeftError(
            f"the side network was trained on another backbone: weights of the {' and the '.join(different)} differ. "
            f"Load it on {source or 'the model it was trained on'}, unchanged and wrapped as it was there."
        )
    of_words = {_WORDS} if backbone.decoder is None else set()  # a side network goes on beside another head
    if expected.keys() - found.keys() - of_words:
        logger.warning("quantised or sharded weights cannot be compared; check that the backbone is %s", source)


def frozen_tensors(backbone: Backbone) -> list[Tensor]:
    """Parameters and buffers of the modules that are not part of the head."""
    own = ((module.parameters(recurse=False), module.buffers(recurse=False)) for module in backbone.frozen)
    return [tensor for tensors in own for tensor in itertools.chain(*tensors)]


def is_quantised(tensor: Tensor) -> bool:
    """Whether a weight holds codes of few bits: integers, or a tensor made of other tensors as torchao's are."""
    return not tensor.is_floating_point() or is_traceable_wrapper_subclass(tensor)


def _sample(weight: Tensor) -> Tensor:
    return weight.detach().flatten()[evenly_spaced(weight.numel(), _SAMPLE).to(weight.device)]


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """All values in one vector, in the least precise of their dtypes, so that a cast of some stays comparable."""
    dtype = max((tensor.dtype for tensor in tensors), key=lambda dtype: torch.finfo(dtype).eps)
    flat = [tensor.detach().flatten().to(dtype) for tensor in tensors]
    return flat[0] if len(flat) == 1 else torch.cat(flat)  # an embedding is large: it is not copied
