"""Generation beside a decoder: one cache of what the backbone and its side networks keep of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from fastpeft.errors import FastpeftError
from fastpeft.ladder.backbone import CACHE, CACHES, Backbone
from fastpeft.ladder.inputs import LadderInputs, given_cache
from fastpeft.ladder.probe import check_generates, probe
from fastpeft.ladder.side_cache import SideCache
from fastpeft.support.generation import option

# what `generate` tells itself, which some decoders hand on to their forward
_OF_GENERATE = ("is_first_iteration", "next_sequence_length", "tokenizer", "assistant_tokenizer")


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
        if not probe(backbone).keeps_keys:
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


def cache_of_pass(backbone: Backbone, given: LadderInputs, training: bool) -> LadderCache | None:
    """The cache that a pass reads and extends, which `use_cache` makes where there is none; None for none.

    Raises:
        FastpeftError: the backbone generates no text, the model is in training mode, or the cache is of another kind.
    """
    cache = given.cache
    if cache is None and not given.use_cache:
        return None
    check_generates(backbone)
    if training:
        raise FastpeftError(
            "use_cache=True in training mode: the features that it drops would stay dropped for all later tokens. "
            "Call model.eval() first, or give use_cache=False."
        )
    if cache is None:
        return LadderCache(backbone)
    if not isinstance(cache, LadderCache):
        raise FastpeftError(
            f"{CACHE} is a {type(cache).__name__}, which holds nothing of the side network. Give "
            "what this model's forward(use_cache=True) returned, or a new fastpeft.ladder.LadderCache("
            "model.backbone)."
        )
    return cache


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
