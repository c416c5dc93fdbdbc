"""The side networks of a pool: checked against its backbone, put beside it, and computed together."""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.errors import FastpeftError
from fastpeft.ladder.backbone import Backbone
from fastpeft.ladder.config import BackboneDtype, LadderConfig
from fastpeft.ladder.model import LadderModel
from fastpeft.ladder.saving import read_config, task_fields
from fastpeft.ladder.side import SideNetwork
from fastpeft.ladder.side_stack import SideStack, shape_of
from fastpeft.ops.frozen_linear import bring_back
from fastpeft.ops.packing import Packs
from fastpeft.prompts.model import PromptModel, holds_label_words, inside_prompt


@dataclass(frozen=True)
class Members:
    """The side networks of a pool at one time. A change makes a new one, so that running calls keep theirs.

    Attributes:
        models: by task, each a `LadderModel` or a `PromptModel` around one.
        stacks: side networks of one shape, with their tasks in the stack's order.
    """

    models: Mapping[str, Any]
    stacks: Sequence[tuple[tuple[str, ...], SideStack]]

    def __getitem__(self, name: str) -> Any:
        if name not in self.models:
            there = ", ".join(map(repr, self.models)) or "none"
            raise FastpeftError(f"the pool has no task {name!r}; its tasks are {there}. Add it first.")
        return self.models[name]

    @classmethod
    def of(cls, models: Mapping[str, Any]) -> Members:
        """Members, those of one shape in one stack."""
        alike: dict[Hashable, dict[str, SideNetwork]] = {}
        for name, model in models.items():
            side = inside_prompt(model).side
            alike.setdefault(shape_of(side), {})[name] = side
        return cls(models, [(tuple(sides), SideStack(list(sides.values()))) for sides in alike.values()])

    def batches(self, rows: Mapping[str, Sequence[int]]) -> Iterator[tuple[list[str], SideStack, list[int]]]:
        """Groups of tasks to compute together, each with its stack and the places of its tasks in it.

        All tasks of a group are padded to the most rows of any, so tasks with fewer than half of that are in another.
        """
        for names, stack in self.stacks:
            waiting = sorted((name for name in names if name in rows), key=lambda name: -len(rows[name]))
            while waiting:
                chosen = {name for name in waiting if 2 * len(rows[name]) >= len(rows[waiting[0]])}
                waiting = [name for name in waiting if name not in chosen]
                places = [place for place, name in enumerate(names) if name in chosen]
                yield [names[place] for place in places], stack, places


class Admission:
    """Makes members of a pool from what a user gives, on the pool's backbone.

    Args:
        backbone, backbone_dtype, feature_modules: the pool's.
        lock: held while the base is copied, so that no layer is copied while a pass listens to it.
    """

    def __init__(
        self,
        backbone: Backbone,
        backbone_dtype: BackboneDtype | None,
        feature_modules: Sequence[str] | None,
        lock: AbstractContextManager[Any],
    ) -> None:
        self._backbone, self._dtype, self._feature_modules = backbone, backbone_dtype, feature_modules
        self._lock = lock

    def member(self, side: Any) -> Any:
        """A member made of `side`, as in `LadderPool.add`: a model as it is, all else beside a twin of the base."""
        if isinstance(inside_prompt(side), LadderModel):
            member = side
        elif isinstance(side, LadderConfig):
            member = self._new(side)
        elif isinstance(side, str | os.PathLike):
            member = self._loaded(os.fspath(side))
        else:
            around = "" if (inside := inside_prompt(side)) is side else f" around a {type(inside).__name__}"
            raise FastpeftError(
                "a pool takes a folder, a LadderModel, a PromptModel around one, or a LadderConfig, not a "
                f"{type(side).__name__}{around}. Give one of these."
            )
        model: LadderModel = inside_prompt(member)
        self._check_features(model.config)
        own, others = _layer_names(self._backbone), _layer_names(model.backbone)
        if own != others:
            raise FastpeftError(
                f"the side network reads {len(others)} layers, {others[0]} to {others[-1]}, the pool {len(own)}, "
                f"{own[0]} to {own[-1]}. Give both the same feature_modules."
            )
        return member

    def _new(self, config: LadderConfig) -> LadderModel:
        config = copy.copy(config)
        config.feature_modules = config.feature_modules or self._feature_modules
        config.backbone_dtype = config.backbone_dtype or self._dtype
        if config.context is None and self._backbone.context is not None:
            config.context = list(self._backbone.context.tokens)
        self._check_features(config)
        own, asked = self._backbone.core.config.id2label, config.id2label
        if asked not in (own, LadderConfig().id2label):
            raise FastpeftError(
                f"the configuration has the labels {', '.join(map(str, asked.values()))}, but a new side network has "
                f"those of the pool's base, {', '.join(map(str, own.values()))}. Add a LadderModel on a base of its "
                "own, loaded with these labels, or a folder that one was saved to."
            )
        return LadderModel(self._twin(), config)

    def _loaded(self, source: str) -> Any:
        config = read_config(source, {})
        self._check_features(config)
        prompted = holds_label_words(source)
        if config.base_class != (own := self._backbone.class_name):
            raise FastpeftError(
                f"{source!r} has the head of a {config.base_class}, the pool's base is a {own}. Add the model that "
                f"{'PromptModel' if prompted else 'LadderModel'}.from_pretrained loads, with its own head."
            )
        model = LadderModel.from_pretrained(source, base=self._twin(config))
        return PromptModel.from_pretrained(source, masked_lm=model) if prompted else model

    def _check_features(self, config: LadderConfig) -> None:
        """Raise `FastpeftError` if a side network reads other features than the pool's; before a twin is changed."""
        if config.train_adapters:
            raise FastpeftError(
                "the side network trained together with an adapter inside the backbone, so its features are its own. "
                "Use it by itself, or train one without train_adapters (siva_layers)."
            )
        before = None if self._backbone.context is None else list(self._backbone.context.tokens)
        if before != config.context:
            raise FastpeftError(
                f"the side network reads its texts after {_length(config.context)}, the pool after {_length(before)}, "
                "and features differ. Add it to a LadderPool(base, context=...) with the same tokens."
            )
        own, other = self._dtype, config.backbone_dtype
        if own != other:
            raise FastpeftError(
                f"the side network goes beside a backbone with backbone_dtype={other!r}, the pool's has {own!r}, and "
                f"features differ. Add it to a LadderPool(base, backbone_dtype={other!r})."
            )

    def _twin(self, config: LadderConfig | None = None) -> Any:
        """A copy of the base with a head of its own, for the labels of `config`. All other tensors are shared."""
        backbone = self._backbone
        head = {id(parameter) for parameter in backbone.head_parameters().values()}
        with self._lock:
            bring_back(backbone.model)
            tensors = itertools.chain(backbone.model.parameters(), backbone.model.buffers())
            twin: Any = copy.deepcopy(backbone.model, {id(part): part for part in tensors if id(part) not in head})
        if config is not None:
            _relabel(twin.get_base_model() if backbone.model is not backbone.core else twin, task_fields(config))
        return twin


def share_backbone(model: LadderModel, backbone: Backbone) -> None:
    """Replace the weights of a model's backbone by those of `backbone`, which must be equal.

    So must the buffers be, of which most are the frequencies of positions.

    Raises:
        FastpeftError: they are not equal. Nothing has changed then.
    """
    for each in (backbone.model, model.base):
        bring_back(each)
    own = dict(backbone.body.named_parameters(remove_duplicate=False))
    head = {id(parameter) for parameter in model.backbone.head_parameters().values()}
    replaced = {}
    for name, theirs in model.backbone.body.named_parameters(remove_duplicate=False):
        if id(theirs) in head:  # a pooler
            continue
        if name not in own or not _equal(theirs, own[name]):
            raise FastpeftError(
                f"the side network stands on another backbone: its {name} differs from the pool's. Make a pool of "
                f"{model.config.base_model_name_or_path or 'the model it was trained on'}."
            )
        replaced[id(theirs)] = own[name]
    buffers = dict(backbone.body.named_buffers())
    for name, held in model.backbone.body.named_buffers():
        if name in buffers and not _equal(held, buffers[name]):
            raise FastpeftError(
                f"the side network stands on another backbone: its weights are the pool's, but its {name} differs, as "
                "by another setting of the model's configuration. Make a pool of a base with that."
            )
    scores, own_scores = model.backbone.decoder, backbone.decoder
    if scores is not None and own_scores is not None:  # where it is not tied to the embeddings
        for theirs, ours in zip(scores.parameters(), own_scores.parameters()):
            if _equal(theirs, ours):
                replaced[id(theirs)] = ours
    _replace_parameters(model.base, replaced, backbone.model)


def _replace_parameters(base: nn.Module, replaced: Mapping[int, nn.Parameter], packed: nn.Module | None = None) -> None:
    """Give a base other parameters, by the ids of its own, in all modules: a decoder may be tied to embeddings.

    What `packed` has packed of them is shared too.
    """
    there = {} if packed is None else {id(each.weight): packs for each in packed.modules() if (packs := _packs(each))}
    for module in base.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in replaced:
                setattr(module, key, replaced[id(parameter)])
                if key == "weight" and (own := _packs(module)):
                    new = Packs(own.enabled)  # what was there is of the parameter that was there
                    module.__dict__["packs"] = there.get(id(module.weight), new) if own.enabled else new


def _packs(module: nn.Module) -> Packs | None:
    packs = module.__dict__.get("packs")
    return packs if isinstance(packs, Packs) else None


def leave_backbone(model: LadderModel, backbone: Backbone) -> None:
    """Let a model have parameters of its own over the memory that it shares with `backbone`.

    A cast or a move of the model then changes it alone. A model on the pool's very base keeps that.
    """
    if model.backbone.body is backbone.body:
        return
    for each in (backbone.model, model.base):
        bring_back(each)
    shared = backbone.model.parameters()
    _replace_parameters(model.base, {id(each): nn.Parameter(each.data, requires_grad=False) for each in shared})


def _relabel(core: Any, fields: Mapping[str, Any]) -> None:
    """Give a model's head the outputs that other labels need; its weights are loaded later."""
    for name, value in fields.items():
        setattr(core.config, name, value)
    if getattr(core, "num_labels", core.config.num_labels) == core.config.num_labels:
        return
    core.num_labels = core.config.num_labels
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in type(core)(core.config).named_parameters()}
    for name, parameter in list(core.named_parameters()):
        if shapes.get(name, parameter.shape) != parameter.shape:
            module, _, key = name.rpartition(".")
            setattr(core.get_submodule(module), key, nn.Parameter(parameter.new_empty(shapes[name])))


def _length(context: Sequence[int] | None) -> str:
    """A context in words."""
    return "no context" if context is None else f"a context of {len(context)} tokens of its own"


def _layer_names(backbone: Backbone) -> list[str]:
    """The names of the layers in the body."""
    names = {module: name for name, module in backbone.body.named_modules()}
    return [names[layer] for layer in backbone.layers]


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two weights are equal, or one is a cast of the other."""
    if a.shape != b.shape:
        return False
    if a.dtype != b.dtype and a.is_floating_point() and b.is_floating_point():
        least = max(a.dtype, b.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        a, b = a.to(least), b.to(least)
    return a.dtype == b.dtype and torch.equal(a, b.to(a.device))
