"""What one pass is given, as one object: the inputs that a `LadderModel` knows, and those that its base alone names."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from fastpeft.errors import FastpeftError
from fastpeft.ladder.backbone import CACHE, Backbone

OTHER_CACHES = ("cache_params", "state")  # of recurrent models; a pass beside a side network has none
_JOINED = (
    "position_ids begin anew within a row, or leave some out, and there is no attention_mask: these are joined texts, "
    "which a side network cannot tell apart. Give each a row of its own (packing=False), or an attention_mask to rows "
    "of one text."
)


@dataclass
class LadderInputs:
    """The inputs of one pass of a `LadderModel`, in the order of its `forward`; None is not given.

    Args:
        input_ids: `(B, T)`, or `inputs_embeds` `(B, T, d)`. A vision model takes `pixel_values`.
        attention_mask: `(B, T)`, 1 for tokens and 0 for padding.
        token_type_ids, position_ids: `(B, T)`; token types are dropped if the base knows none.
        labels, start_positions, end_positions: as the base takes them. The loss that balances a mixture's experts is
            left out, unless an adapter in the backbone trains.
        output_hidden_states: whether to return the side states `theta_0 .. theta_N`, each `(B, T, D)`, as
            `hidden_states`.
        return_dict: False for a tuple.
        cache, past_key_values: what an earlier pass returned under that name, of which the first is transformers' since
            5.24. The inputs are then the tokens that follow, and the mask is of all tokens.
        use_cache: True keeps what later passes need of these tokens, for decoders in evaluation mode.
        cache_position, logits_to_keep: as the base takes them, where it knows them.
        others: other inputs that the base's forward names, by name; beside a decoder `num_items_in_batch` too, by which
            its loss is divided in place of the number of its own labels.
    """

    input_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    token_type_ids: Tensor | None = None
    position_ids: Tensor | None = None
    inputs_embeds: Tensor | None = None
    pixel_values: Tensor | None = None
    labels: Tensor | None = None
    start_positions: Tensor | None = None
    end_positions: Tensor | None = None
    output_hidden_states: bool | None = None
    return_dict: bool | None = None
    past_key_values: Any = None
    use_cache: bool | None = None
    cache_position: Tensor | None = None
    logits_to_keep: int | Tensor | None = None
    cache: Any = None
    others: dict[str, Any] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        self.cache = given_cache(self.cache, self.past_key_values)

    @classmethod
    def of(cls, *args: Any, **kwargs: Any) -> LadderInputs:
        """Those of a call, of which some may be the base's own."""
        own = {name: kwargs.pop(name) for name in _NAMES if name in kwargs}
        return cls(*args, **own, others=kwargs)

    @property
    def text(self) -> Tensor | None:
        """Token ids or their embeddings."""
        return self.input_ids if self.input_ids is not None else self.inputs_embeds

    @property
    def read(self) -> Tensor | None:
        """What the backbone computes features of."""
        return self.text if self.text is not None else self.pixel_values

    def for_base(self, backbone: Backbone, cache: Any = None, router_logits: bool | None = False) -> dict[str, Any]:
        """The arguments of the base, which reads and extends `cache`.

        Router logits are for a loss that balances experts: frozen ones learn nothing of it, skipped ones have none.
        """
        own = {name: getattr(self, name) for name in _OF_BASE}
        asked = {"output_hidden_states": False, "output_router_logits": router_logits}
        kept = {CACHE: cache, "use_cache": None if cache is None else True}
        return backbone.arguments({**own, **asked, **kept, **self.others})

    def check(self, backbone: Backbone, past: int = 0, joined: bool = True) -> None:
        """Raise `FastpeftError` where a pass would not compute what was meant.

        Args:
            backbone: of the pass.
            past: the number of cached tokens.
            joined: whether texts may be joined in a row.
        """
        kind, read, text = backbone.class_name, self.read, self.text
        if read is None:
            raise FastpeftError(f"LadderModel beside a {kind} got neither input_ids, inputs_embeds nor pixel_values.")
        if read.dim() < 2:
            raise FastpeftError(
                f"LadderModel beside a {kind} got a tensor of shape {tuple(read.shape)}; it takes a batch, whose first "
                "dimension is rows. Of one row give row[None]."
            )
        if text is not None:
            check_mask(self.attention_mask, (text.shape[0], past + text.shape[1]))
            if not joined:
                check_positions(self.position_ids, self.attention_mask)
        if self.others and not torch.compiler.is_compiling():
            kind_of_base: Any = type(backbone.core)
            known = _signature(kind_of_base).parameters
            if unread := [name for name, value in self.others.items() if value is not None and name not in known]:
                raise FastpeftError(f"LadderModel beside a {kind} got {', '.join(unread)}, which it does not take.")


_NAMES = tuple(each.name for each in fields(LadderInputs))[:-1]
_OWN = ("output_hidden_states", "return_dict", "past_key_values", "use_cache", "cache")
_OF_BASE = tuple(name for name in _NAMES if name not in _OWN)
_SELF = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
_FIELDS = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None) for name in _NAMES]


def given_cache(cache: Any, past_key_values: Any) -> Any:
    """The cache that a call has, under whichever of its two names.

    Raises:
        FastpeftError: there is one under each.
    """
    if cache is not None and past_key_values is not None:
        raise FastpeftError("cache and past_key_values are two names of one argument. Give one of them.")
    return past_key_values if cache is None else cache


def check_mask(attention_mask: Tensor | None, tokens: tuple[int, int]) -> None:
    """Raise `FastpeftError` if there is a mask of another shape than `(B, T)`, where T counts cached tokens too."""
    if attention_mask is not None and attention_mask.shape != tokens:
        raise FastpeftError(
            f"attention_mask has the shape {tuple(attention_mask.shape)}; the side network takes (B, T), here "
            f"{tuple(tokens)}, with 1 for tokens and 0 for padding; cached tokens count too."
        )


def check_positions(position_ids: Tensor | None, attention_mask: Tensor | None) -> None:
    """Raise `FastpeftError` where positions do not follow each other and there is no mask: texts that were joined.

    Transformers takes such rows for joined texts, which a causal backbone keeps apart. The side network, whose masks
    are of tokens alone, would not. What `torch.compile` traces is checked when it runs, by a `RuntimeError`.
    """
    if position_ids is None or attention_mask is not None:
        return
    # time, height and width of what a model sees are no places in the row; those are a fourth plane, the first
    places = position_ids[: len(position_ids) - 3] if position_ids.ndim == 3 else position_ids
    follow = places.diff(dim=-1) == 1
    if torch.compiler.is_compiling():
        torch._assert_async(follow.all(), _JOINED)
    elif not follow.all():
        raise FastpeftError(_JOINED)


def tokens_of(given: Mapping[str, Any]) -> torch.Size | None:
    """B and T of text; None for other inputs."""
    source: Tensor | None = given.get("input_ids", given.get("inputs_embeds"))
    return None if source is None else source.shape[:2]


class WithInputsOfBase:
    """A `forward` whose signature has the fields of `LadderInputs` and, asked of a model, the inputs of its base too.

    The Trainer of transformers keeps the columns of a data set that are in this signature and drops all others.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function: Callable[..., Any] = function
        vars(function)["__signature__"] = inspect.Signature([_SELF, *_FIELDS])

    def __get__(self, model: Any, owner: Any = None) -> Callable[..., Any]:
        if model is None:
            return self._function
        if torch.compiler.is_compiling():
            return functools.partial(self._function, model)
        # a method, since accelerate makes others of the function in it
        kind: Any = type(model.backbone.core)
        return MethodType(_with_signature(self._function, kind), model)


@functools.cache
def _with_signature(function: Callable[..., Any], kind: Any) -> Callable[..., Any]:
    """`function`, not bound, with the signature that `_signature` makes for it."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    forward: Any = functools.update_wrapper(call, function)
    del forward.__wrapped__  # by which accelerate would go on to the function itself
    forward.__signature__ = inspect.Signature([_SELF, *_signature(kind).parameters.values()])
    found: Callable[..., Any] = forward
    return found


@functools.cache
def _signature(kind: Any) -> inspect.Signature:
    """The fields of `LadderInputs`, and what else the forward of a class takes."""
    of_base = list(inspect.signature(kind.forward).parameters.values())[1:]
    others = [
        inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for each in of_base
        if each.name not in (*_NAMES, *OTHER_CACHES) and each.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    return inspect.Signature([*_FIELDS, *others])
