"""Inputs that some bases take and `LadderModel.forward` does not name, such as LayoutLM's boxes of words."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch

from fastpeft.errors import FastpeftError
from fastpeft.ladder.backbone import Backbone

OTHER_CACHES = ("cache_params", "state")  # of Mamba and RWKV; a pass beside a side network has none


class WithInputsOfBase:
    """A `forward` whose signature, asked of a model, names the inputs of its base too.

    The Trainer of transformers keeps the columns of a data set that are in this signature and drops all others. The
    last parameter of `function`, the method, takes keywords that it does not name.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __get__(self, model: Any, owner: Any = None) -> Callable[..., Any]:
        if model is None:
            return self._function
        if torch.compiler.is_compiling():
            return functools.partial(self._function, model)
        # a method, since accelerate makes others of the function in it
        kind: Any = type(model.backbone.core)
        return MethodType(_with_signature(self._function, kind, model.backbone.plain), model)


def check_others(backbone: Backbone, others: Mapping[str, Any], function: Callable[..., Any]) -> None:
    """Raise `FastpeftError` if a pass has inputs that neither `function`, our forward, nor the base names."""
    if not others or torch.compiler.is_compiling():
        return
    kind: Any = type(backbone.core)
    if unknown := others.keys() - _signature(function, kind, backbone.plain).parameters.keys():
        raise FastpeftError(
            f"LadderModel beside a {kind.__name__} got {', '.join(sorted(unknown))}, which that does not take. Leave "
            "it out."
        )


@functools.cache
def _with_signature(function: Callable[..., Any], kind: Any, plain: bool) -> Callable[..., Any]:
    """`function`, not bound, with the signature that `_signature` makes for it."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    forward: Any = functools.update_wrapper(call, function)
    del forward.__wrapped__  # by which accelerate would go on to the function itself
    model = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    own = _signature(function, kind, plain).parameters.values()
    forward.__signature__ = inspect.Signature([model, *own])
    found: Callable[..., Any] = forward
    return found


@functools.cache
def _signature(function: Callable[..., Any], kind: Any, plain: bool) -> inspect.Signature:
    """The signature of a bound `function` with what the forward of a class takes in place of its last parameter."""
    _, *own, _ = inspect.signature(function).parameters.values()
    taken = {*OTHER_CACHES, *(parameter.name for parameter in own)}
    of_base = [] if plain else list(inspect.signature(kind.forward).parameters.values())[1:]
    others = [
        inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for each in of_base
        if each.name not in taken and each.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    return inspect.Signature([*own, *others])
