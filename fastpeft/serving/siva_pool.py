"""Adapters of SiVA for many tasks on one model: one pass answers a batch of many tasks."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from fastpeft.errors import FastpeftError
from fastpeft.siva import SivaConfig, SivaLinear
from fastpeft.siva.rows import outside_adapters

_OF_THE_TASK = {"id2label", "label2id", "num_labels", "problem_type", "_name_or_path", "name_or_path"}


@dataclass(frozen=True)
class _Member:
    """The adapter of a task in the pool's model, and how many outputs its head has."""

    adapter: str
    outputs: int


class SivaPool:
    """Models with an adapter of SiVA, of which one base is held, by PEFT's `adapter_names`.

    Threads may call, add and remove at the same time; one of them does so at a time.

    Args:
        model: the first model, in which the adapters of others come to lie.

    Raises:
        FastpeftError: its adapter changes what rows of other tasks read too.
    """

    def __init__(self, model: PeftModel) -> None:
        check_poolable(model)
        self.model = model
        self._members: dict[str, _Member] = {}
        self._numbers = itertools.count()
        self._lock = threading.RLock()

    def add(self, name: str, model: PeftModel) -> None:
        """Take the adapter and the head over from a model, which is not needed any more.

        Raises:
            FastpeftError: its base is another, or its adapter stands on another decomposition of it.
        """
        outputs = model.base_model.model.config.num_labels
        if model is self.model:
            self._members[name] = _Member(model.active_adapter, outputs)
            return
        check_poolable(model)
        _check_alike(self.model, model)
        theirs, adapter = model.active_adapter, f"of{next(self._numbers)}"
        with self._lock:
            for (_, own), (_, other) in zip(_parts(self.model), _parts(model), strict=True):
                if isinstance(own, SivaLinear):
                    own.adopt(adapter, other, theirs)
                else:
                    own.modules_to_save[adapter] = other.modules_to_save[theirs]
                    own.update(adapter)  # it lists what is there
            self.model.peft_config[adapter] = model.peft_config[theirs]
            self._members = {**self._members, name: _Member(adapter, outputs)}

    def own_tensors(self, name: str) -> Iterator[Tensor]:
        """What a task has of its own in the model."""
        adapter = self._members[name].adapter
        for _, part in _parts(self.model):
            own = part.changes(adapter) if isinstance(part, SivaLinear) else (part.modules_to_save[adapter],)
            for module in own:
                yield from itertools.chain(module.parameters(), module.buffers())

    def remove(self, name: str) -> None:
        """Forget a task. Running calls still answer for it."""
        with self._lock:
            member = self._members[name]
            self._members = {other: each for other, each in self._members.items() if other != name}
            if not self._members:  # the last one leaves with the model
                return
            if member.adapter == self.model.active_adapter:
                self.model.set_adapter(next(iter(self._members.values())).adapter, inference_mode=True)
            self.model.delete_adapter(member.adapter)

    @torch.inference_mode()
    def __call__(self, batch: Mapping[str, Tensor], tasks: Sequence[str]) -> list[Any]:
        """For each row of a batch an object with the `logits` of its task."""
        with self._lock:
            gone = sorted({name for name in tasks if name not in self._members})
            if gone:
                raise FastpeftError(f"the pool has no task {gone[0]!r}. Add it first.")
            asked = [self._members[name] for name in tasks]
            inputs = {name: value.to(self.model.device) for name, value in batch.items() if name != "mask_positions"}
            logits = self.model(**inputs, adapter_names=[member.adapter for member in asked]).logits
        return [SimpleNamespace(logits=row[..., : member.outputs]) for row, member in zip(logits, asked)]


def check_poolable(model: Any) -> None:
    """Raise `FastpeftError` unless a model's rows can have adapters of their own."""
    config = model.peft_config[model.active_adapter]
    kept = [module for _, module in _parts(model) if not isinstance(module, SivaLinear)]
    for why, refused in {
        "trains biases, which all rows read": config.bias != "none",
        "trains tokens": not all(type(module) is ModulesToSaveWrapper for module in kept),
        "answers by words": hasattr(model.base_model.model, "prompt"),
    }.items():
        if refused:
            raise FastpeftError(f"its adapter {why}. Use it by itself.")


def is_siva(model: Any) -> bool:
    """Whether a model of a run has an adapter of SiVA."""
    return isinstance(model, PeftModel) and isinstance(model.peft_config[model.active_adapter], SivaConfig)


def _parts(model: nn.Module) -> list[tuple[str, Any]]:
    """What an adapter has changed in a model: its layers, and the modules that it has of its own, by name."""
    kinds = SivaLinear, AuxiliaryTrainingWrapper
    return [(name, module) for name, module in outside_adapters(model) if isinstance(module, kinds)]


def _check_alike(own: PeftModel, other: PeftModel) -> None:
    """Raise `FastpeftError` unless two models differ in their adapters and heads alone."""
    configs = [each.base_model.model.config.to_dict() for each in (own, other)]
    unlike = [
        key
        for key in sorted(configs[0].keys() | configs[1].keys())
        if key not in _OF_THE_TASK and configs[0].get(key) != configs[1].get(key)
    ]
    kinds = [type(each.base_model.model).__name__ for each in (own, other)]
    places = [[name for name, _ in _parts(each)] for each in (own, other)]
    if kinds[0] != kinds[1] or unlike:
        what = f"{unlike[0]} is another" if unlike else f"it is a {kinds[1]}, not a {kinds[0]}"
        raise FastpeftError(f"its model has another configuration: {what}. Use it by itself.")
    if places[0] != places[1]:
        raise FastpeftError("its adapter is in other layers. Use it by itself.")
    for (name, layer), (_, theirs) in zip(_parts(own), _parts(other), strict=True):
        if isinstance(layer, SivaLinear) and not layer.can_adopt(theirs, other.active_adapter):
            raise FastpeftError(f"its {name} was decomposed otherwise. Use it by itself.")
    frozen, its = dict(_frozen(own)), dict(_frozen(other))
    for name in sorted(frozen.keys() | its.keys()):
        if name not in frozen or name not in its or not torch.equal(frozen[name], its[name]):
            raise FastpeftError(f"its {name} has other values. Use it by itself.")


def _frozen(model: PeftModel) -> Iterator[tuple[str, Tensor]]:
    """The tensors that no adapter has of its own, W_r among them, by name."""
    apart = tuple(f"{name}." for name, _ in _parts(model))
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if not name.startswith(apart) or ".base_layer." in name or ".quantised." in name:
            yield name, tensor
