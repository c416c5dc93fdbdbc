"""The side networks of a pool: who they are, which are computed together, and how they come to share a backbone."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.errors import FastpeftError
from fastpeft.ladder.backbone import Backbone
from fastpeft.ladder.model import LadderModel
from fastpeft.ladder.saved import task_fields
from fastpeft.ladder.stack import SideStack, shape_of


def ladder_of(member: Any) -> Any:
    """The `LadderModel` that a member is, or that a member's prompt was put around."""
    return getattr(member, "masked_lm", member)


@dataclass(frozen=True)
class Members:
    """The side networks of a pool at one time; a change makes another one, and calls keep theirs.

    Attributes:
        models: by task, each a `LadderModel` or a `PromptModel` around one.
        stacks: side networks of one shape together, with the tasks in the stack's order.
    """

    models: Mapping[str, Any]
    stacks: Sequence[tuple[tuple[str, ...], SideStack]]

    def __getitem__(self, name: str) -> Any:
        if name not in self.models:
            there = ", ".join(map(repr, self.models)) or "none"
            raise FastpeftError(f"the pool has no task {name!r}; its tasks are {there}. Add it first.")
        return self.models[name]

    def with_member(self, name: str, model: Any) -> Members:
        return self._changed({**self.models, name: model}, shape_of(ladder_of(model).side))

    def without(self, name: str) -> Members:
        left = {task: model for task, model in self.models.items() if task != name}
        return self._changed(left, shape_of(ladder_of(self.models[name]).side))

    def _changed(self, models: Mapping[str, Any], shape: Any) -> Members:
        """With `models`, of which only those of one shape are others than before."""
        stacks = [(names, stack) for names, stack in self.stacks if shape_of(stack.sides[0]) != shape]
        sides = {name: ladder_of(model).side for name, model in models.items()}
        alike = {name: side for name, side in sides.items() if shape_of(side) == shape}
        if alike:
            stacks.append((tuple(alike), SideStack(list(alike.values()))))
        return Members(models, stacks)

    def batches(self, rows: Mapping[str, Sequence[int]]) -> Iterator[tuple[list[str], SideStack, list[int]]]:
        """Which tasks are computed together, with their stack and their places in it.

        They are padded to as many rows as the first of them has, so those with fewer than half as many wait.
        """
        for names, stack in self.stacks:
            waiting = sorted((name for name in names if name in rows), key=lambda name: -len(rows[name]))
            while waiting:
                chosen = {name for name in waiting if 2 * len(rows[name]) >= len(rows[waiting[0]])}
                waiting = [name for name in waiting if name not in chosen]
                places = [place for place, name in enumerate(names) if name in chosen]
                yield [names[place] for place in places], stack, places


def share_backbone(model: LadderModel, backbone: Backbone) -> None:
    """Let a model have the weights of `backbone` in place of its own backbone's, which must be equal.

    Raises:
        FastpeftError: they are not. Nothing has changed then.
    """
    own = dict(backbone.body.named_parameters(remove_duplicate=False))
    replaced = {}
    for name, theirs in model.backbone.body.named_parameters(remove_duplicate=False):
        if theirs.requires_grad:  # a pooler, which belongs to the head
            continue
        if name not in own or not _equal(theirs, own[name]):
            raise FastpeftError(
                f"the side network stands on another backbone: its {name} differs from the pool's. Make a pool of "
                f"{model.config.base_model_name_or_path or 'the model it was trained on'}."
            )
        replaced[id(theirs)] = own[name]
    for module in model.base.modules():  # all of them: a decoder may be tied to the embeddings
        for key, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in replaced:
                setattr(module, key, replaced[id(parameter)])


def twin_of(backbone: Backbone, config: Any = None) -> Any:
    """The model of `backbone` once more: a head of its own, for the labels of `config`, and else the same tensors."""
    head = {id(parameter) for parameter in backbone.head_parameters().values()}
    tensors = itertools.chain(backbone.model.parameters(), backbone.model.buffers())
    twin: Any = copy.deepcopy(backbone.model, {id(tensor): tensor for tensor in tensors if id(tensor) not in head})
    if config is not None:
        _relabel(twin.get_base_model() if backbone.model is not backbone.core else twin, task_fields(config))
    return twin


def layer_names(backbone: Backbone) -> list[str]:
    """What the layers are called in the body."""
    names = {module: name for name, module in backbone.body.named_modules()}
    return [names[layer] for layer in backbone.layers]


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two weights are the same, or one is a cast of the other."""
    if a.shape != b.shape:
        return False
    if a.dtype != b.dtype and a.is_floating_point() and b.is_floating_point():
        least = max(a.dtype, b.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        a, b = a.to(least), b.to(least)
    return a.dtype == b.dtype and torch.equal(a, b.to(a.device))


def _relabel(core: Any, fields: Mapping[str, Any]) -> None:
    """Give a model's head the outputs that other labels need; its weights are to be loaded."""
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
