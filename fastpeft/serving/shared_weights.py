"""Weights that are equal in several served models, and tokenizers, held once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.ops.packing import Packs, samples

_PLACES = {"name_or_path", "tokenizer_file", "vocab_file", "merges_file"}  # where a tokenizer was read
_PLAIN = (Tensor, nn.Parameter)  # what bitsandbytes and torchao store is more than its entries


def share_weights(model: nn.Module, others: Iterable[nn.Module]) -> int:
    """Let a model hold the parameters and buffers of others where it has equal ones, and their packs.

    For models that only answer: what changes one of these in place changes it for all.

    Returns:
        How many bytes of the model others hold too.
    """
    theirs = [module for other in others for module in other.modules()]
    known = {_look(tensor): tensor for module in theirs for _, _, tensor in _tensors(module)}
    packs = {_packed(module): module.packs for module in theirs if _packs_its_weight(module)}
    shared: dict[Tensor, int] = {}
    for module in model.modules():
        for holder, name, own in _tensors(module):
            other = known.get(_look(own))
            if other is not None and torch.equal(other, own):
                holder[name] = other
                shared[other] = other.nbytes  # of tied ones once
        if _packs_its_weight(module):
            module.packs = packs.get(_packed(module), module.packs)
    return sum(shared.values())


def content_of(tokenizer: Any) -> str:
    """What equal tokenizers that were not used yet have in common, and no others."""
    made_of = getattr(tokenizer, "backend_tokenizer", None)
    if made_of is None:  # of Python: it has no text of its own
        return str(id(tokenizer))
    settings = {name: value for name, value in tokenizer.init_kwargs.items() if name not in _PLACES}
    whole = type(tokenizer), made_of.to_str(), tokenizer.chat_template, sorted(map(repr, settings.items()))
    return sha256(repr(whole).encode()).hexdigest()


def _tensors(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """The parameters and buffers of a module itself that can be shared: where it holds each, its name, and it."""
    holders: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
    for holder in holders:
        for name, tensor in list(holder.items()):
            if type(tensor) in _PLAIN and tensor.layout is torch.strided and tensor.is_contiguous():
                yield holder, name, tensor


def _look(tensor: Tensor) -> tuple[Any, ...]:
    """What equal tensors have in common, and few others."""
    return type(tensor), tensor.requires_grad, tensor.shape, tensor.dtype, tensor.device, *samples(tensor).tolist()


def _packs_its_weight(module: nn.Module) -> bool:
    """Whether a layer packs its weight, which a run may refuse."""
    packs = getattr(module, "packs", None)
    return isinstance(packs, Packs) and packs.enabled


def _packed(module: Any) -> Tensor | None:
    """The weight that the packs of a layer are of: its own, or that of the layer which it has taken over."""
    weight: Tensor | None = module._modules.get("base_layer", module)._parameters.get("weight")
    return weight
