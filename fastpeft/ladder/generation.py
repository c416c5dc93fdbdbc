"""Generation beside a decoder: what is kept of the tokens that were read, by backbone and side network.

Of a token the backbone keeps its keys and values, as transformers caches them. Block j of the side network keeps

- the keys and values of its self-attention, 2 D numbers, and
- the keys of its window, `C_i + p_i` for the k slots, k D numbers, which are the values too. A slot outside the
  backbone keeps `p_i`, so that all blocks read k T keys. A gate reads a token's own feature only, and keeps nothing.

So a token takes (2 + k) D numbers more for each block, for LST 2 D. None is computed twice.

Dimension letters as in `side.py`; T counts all tokens so far, N those of this pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import DynamicLayer

from fastpeft.errors import FastpeftError
from fastpeft.ladder.backbone import CACHES, Backbone
from fastpeft.ladder.probes import predicts_next_tokens
from fastpeft.support.generation import option

CACHE = CACHES["cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters]
_SPARE = 8  # where a tensor of T tokens is full, room is made for T / 8 more, and at least 64
_LEAST_SPARE = 64
# what `generate` tells itself, which some decoders hand on to their forward
_OF_GENERATE = ("is_first_iteration", "next_sequence_length", "tokenizer", "assistant_tokenizer")
_KEEP_STATES = (
    "recurrent_gemma",  # beside the cache, in its modules: nothing reorders those or tells texts apart
    *("mamba", "mamba2", "falcon_mamba"),  # and no keys; from transformers 5.24 on they name it as other decoders do
)


class GrowingLayer(DynamicLayer):
    """A layer of a cache to which tokens are added in place: most steps copy none of those that are there."""

    def __init__(self) -> None:
        super().__init__()
        self._rooms: dict[str, Tensor] = {}

    def append(self, name: str, new: Tensor) -> Tensor:
        """Append tokens in place while there is room; a copy with the old ones in it makes more.

        Args:
            name: `"keys"` or `"values"`.
            new: `(B, H, N, ...)`, of the attribute of that name.

        Returns:
            The attribute, `(B, H, T, ...)`.
        """
        old: Tensor | None = getattr(self, name)
        if old is None:
            self.dtype, self.device = new.dtype, new.device
            both = new
        elif torch.is_grad_enabled():  # an earlier pass may need its tokens for backward
            both = torch.cat((old, new), dim=-2)
        else:
            both = self._with_room(name, old, new.shape[-2])
            both.narrow(-2, old.shape[-2], new.shape[-2]).copy_(new)
        setattr(self, name, both)
        return both

    def extend(self, name: str) -> Tensor:
        """The attribute with one token more, `(B, H, T + 1, ...)`, which the caller fills, without gradients."""
        both = self._with_room(name, getattr(self, name), 1)
        setattr(self, name, both)
        return both

    def _with_room(self, name: str, old: Tensor, added: int) -> Tensor:
        before = old.shape[-2]
        tokens = before + added
        room = self._rooms.get(name)
        # a cache that was reordered or repeated holds other tensors by now; one that was cropped starts where it did
        if (
            room is None
            or room.data_ptr() != old.data_ptr()
            or room.shape[0] != old.shape[0]
            or room.shape[-2] < tokens
            or (room.is_inference() and not torch.is_inference_mode_enabled())  # which may not be written to here
        ):
            size = tokens + max(_LEAST_SPARE, tokens // _SPARE)
            room = self._rooms[name] = old.new_empty(*old.shape[:-2], size, old.shape[-1])
            room.narrow(-2, 0, before).copy_(old)
        return room.narrow(-2, 0, tokens)


class SideLayer(GrowingLayer):
    """What a side block keeps, as a layer of transformers' caches, which reorder, select, repeat and crop it.

    Attributes:
        keys: `(B, 1, T, 2 D)`, the keys and values of the self-attention.
        values: `(B, 1, T, k D)`, those of the window; `(B, 1, 0, 0)` with a gate.
    """

    def add_window(self, window: Tensor) -> Tensor:
        """Append the window's keys of new tokens, `(B, N, k D)`, and return those of all, `(B, T, k D)`."""
        return self.append("values", window[:, None])[:, 0]

    def add_states(self, states: Tensor) -> Tensor:
        """Append the keys and values of new tokens, `(B, N, 2 D)`, and return those of all, `(B, T, 2 D)`."""
        self.is_initialized = True
        if getattr(self, "values", None) is None:  # a gate has no window
            self.values = states.new_empty(len(states), 1, 0, 0)
        return self.append("keys", states[:, None])[:, 0]


class SideCache:
    """What one side network keeps of the tokens it has read.

    Args:
        num_layers: L, the most blocks that it may have; the layers of those that it has not stay empty.

    Attributes:
        layers: of each block.
        step_weights: the network's, as passes over one token take them; None before the first.
    """

    def __init__(self, num_layers: int) -> None:
        self.layers = [SideLayer() for _ in range(num_layers)]
        self.step_weights: Any = None  # a `fastpeft.ladder.side_step.StepWeights`

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "step_weights": None}  # a copy needs no copy of the weights


class LadderCache(DynamicCache):
    """What a decoder and the side networks beside it keep of the tokens they have read.

    The backbone's layers come first, as transformers makes them for its configuration, then those of the side networks.

    Args:
        backbone: the decoder.
        sides: the number of side networks.

    Attributes:
        sides: what each of them keeps.

    Raises:
        FastpeftError: the decoder keeps something else than keys and values.
    """

    def __init__(self, backbone: Backbone, sides: int = 1) -> None:
        if not keeps_keys(backbone):
            raise FastpeftError(
                f"a {backbone.class_name} keeps something else than keys and values of earlier tokens, beside which "
                "nothing can be kept. Give use_cache=False: each token then takes a pass over all tokens."
            )
        super().__init__(config=backbone.core.config)
        self._context = 0  # tokens of it
        if backbone.context is not None:
            self.layers[:] = backbone.context.layers(keep=True)
            self._context = len(backbone.context.tokens)
        self._own = len(self.layers)  # layers of the backbone
        self.sides = [SideCache(len(backbone.layers)) for _ in range(sides)]
        for side in self.sides:
            self.layers.extend(side.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens of the texts a layer has; those of a context, which side networks do not read, are none."""
        return int(super().get_seq_length(layer_idx)) - (self._context if layer_idx < self._own else 0)

    def of_backbone(self) -> DynamicCache:
        """What the backbone keeps, with its context: the same layers."""
        own = DynamicCache()
        own.layers = self.layers[: self._own]
        return own


def with_own_cache(outputs: Any, cache: LadderCache | None) -> Any:
    """The outputs of a pass, with its own cache, or none, in place of the one that the backbone was given."""
    of_backbone = [name for name, value in outputs.items() if name in CACHES and value is not None]
    if not of_backbone or outputs[of_backbone[0]] is cache:
        return outputs
    rest = {name: value for name, value in outputs.items() if name not in CACHES}
    return type(outputs)(**rest, **({} if cache is None else {of_backbone[0]: cache}))


def keeps_keys(backbone: Backbone) -> bool:
    """Whether a backbone is a transformers model that generates and keeps keys and values of tokens as its cache."""
    known = not backbone.plain and CACHE in inspect.signature(backbone.core.forward).parameters
    generates = known and isinstance(backbone.core, GenerationMixin)
    if not generates or backbone.core.config.model_type in _KEEP_STATES:
        return False
    return bool(backbone.core._supports_default_dynamic_cache())


def check_generates(backbone: Backbone) -> None:
    """Raise `FastpeftError` unless the model generates text."""
    if not predicts_next_tokens(backbone):
        raise FastpeftError(
            f"the base, a {backbone.class_name}, does not generate text, so a side network beside it does not "
            "either. Allowed are decoders that predict next tokens: load the base by AutoModelForCausalLM."
        )


def given_cache(cache: Any, past_key_values: Any) -> Any:
    """The cache that a call has, under whichever of its two names.

    Raises:
        FastpeftError: there is one under each.
    """
    if cache is not None and past_key_values is not None:
        raise FastpeftError("cache and past_key_values are two names of one argument. Give one of them.")
    return past_key_values if cache is None else cache


def cache_of_pass(backbone: Backbone, given: Any, use_cache: bool | None, training: bool) -> LadderCache | None:
    """The cache that a pass reads and extends; None for none.

    Args:
        backbone: the backbone.
        given: what the call has.
        use_cache: whether a new one is made where it has none.
        training: whether the model is in training mode.

    Raises:
        FastpeftError: the backbone generates no text, the model trains, or the cache is of another kind.
    """
    if given is None and not use_cache:
        return None
    check_generates(backbone)
    if training:
        raise FastpeftError(
            "use_cache=True in training mode: the features that it drops would stay dropped for all later tokens. "
            "Call model.eval() first, or give use_cache=False."
        )
    if given is None:
        return LadderCache(backbone)
    if not isinstance(given, LadderCache):
        raise FastpeftError(
            f"{CACHE} is a {type(given).__name__}, which holds nothing of the side network. Give "
            "what this model's forward(use_cache=True) returned, or a new fastpeft.ladder.LadderCache("
            "model.backbone)."
        )
    return given


def prepare_pass(core: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments of a pass, as a decoder prepares them for its own, without what `generate` tells itself."""
    prepared = core.prepare_inputs_for_generation(*args, **kwargs)
    return {name: value for name, value in prepared.items() if name not in _OF_GENERATE}


def with_cache(make: Callable[[], LadderCache], arguments: dict[str, Any], *defaults: Any) -> dict[str, Any]:
    """The arguments of a call of `generate`, with a cache of both networks instead of the one that it would make.

    Args:
        make: makes the cache.
        arguments: those of the call.
        defaults: generation configurations that say what the call does not, the first one first.

    Raises:
        FastpeftError: a cache of another kind is asked for.
    """
    kind = option("cache_implementation", arguments, *defaults)
    if kind not in (None, "dynamic", "dynamic_full"):
        raise FastpeftError(
            f"cache_implementation={kind!r}: the cache of a backbone and its side network grows with the text. Leave "
            "it out, or give 'dynamic'."
        )
    cache = given_cache(arguments.get("cache"), arguments.get("past_key_values"))
    rest = {name: value for name, value in arguments.items() if name not in CACHES}
    if cache is not None:
        return {**rest, CACHE: cache}
    if option("use_cache", arguments, *defaults) is False:
        return rest
    if kind is not None:
        rest["cache_implementation"] = None  # of a configuration too
    made = make()
    # an assistant's text may be taken back: transformers 5.0 wants layers without windows
    if kind == "dynamic_full":
        made.layers[:] = [DynamicLayer() if each.is_sliding else each for each in made.layers]
    if option("is_assistant", arguments, *defaults) and hasattr(made, "activate_past_recording"):
        made.activate_past_recording()
    return {**rest, CACHE: made}
