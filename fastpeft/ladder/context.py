"""A context: tokens that a frozen decoder reads once, and that stand in front of every text.

Of each layer their keys and values are kept, `(1, heads, C, head width)`. So a pass over a text has C keys more in the
backbone's attention and nothing else, and the side network reads the text alone. As examples of a task they show the
backbone, whose weights stay as they are, where to look (Brown et al. 2020, arXiv:2005.14165).

The backbone sees a text's tokens after those of the context, at the positions that follow. Padding takes none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from fastpeft.errors import FastpeftError
from fastpeft.ladder.backbone import CACHE, Backbone, parameters_of
from fastpeft.ladder.cache import stamp_of
from fastpeft.ladder.probe import probe
from fastpeft.ladder.side_cache import GrowingLayer
from fastpeft.ops.define import is_transformed

_RELATIVE = ("bloom", "roformer")  # of models that take no positions, those whose distances do not count padding


class ContextLayer(GrowingLayer):
    """A layer of a cache that begins with the keys and values of a context, the same for all rows.

    Args:
        keys, values: of the context, `(1, heads, C, head width)`.
        keeps: whether it keeps those of the tokens that it is given. One pass over whole texts needs them once.
    """

    def __init__(self, keys: Tensor, values: Tensor, keeps: bool) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values, self._keeps = keys, values, keeps
        self._length = keys.shape[-2]

    def reset(self) -> None:
        """Forget all tokens but those of the context."""
        self.keys, self.values = (each[:1, :, : self._length] for each in (self.keys, self.values))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The keys and values of all tokens, `(B, heads, T, head width)`; see `DynamicLayer.update`."""
        rows = len(key_states)
        if len(self.keys) != rows or self.keys.dtype != key_states.dtype:
            self.keys, self.values = (each.to(key_states).expand(rows, -1, -1, -1) for each in (self.keys, self.values))
        if self._keeps:
            return self.append("keys", key_states), self.append("values", value_states)
        return torch.cat((self.keys, key_states), dim=-2), torch.cat((self.values, value_states), dim=-2)


class Context:
    """The tokens in front of every text of a backbone, and what each layer keeps of them.

    Args:
        backbone: a decoder.
        tokens: C token ids.

    Raises:
        FastpeftError: the backbone does not generate, keeps something else than the keys and values of all tokens,
            counts padding, or does not know a token.
    """

    def __init__(self, backbone: Backbone, tokens: Sequence[int]) -> None:
        core = backbone.core
        kinds = {type(layer) for layer in DynamicCache(config=core.config).layers}
        if not probe(backbone).keeps_keys or kinds - {DynamicLayer}:
            raise FastpeftError(
                "a context goes before the texts of a decoder that generates and keeps the keys and values of all "
                f"tokens, which a {backbone.class_name} does not. Leave it out."
            )
        self._takes_positions = "position_ids" in parameters_of(core)
        if not self._takes_positions and core.config.model_type not in _RELATIVE:
            raise FastpeftError(
                f"a context before texts that are padded on the left: a {backbone.class_name} would answer a row "
                "otherwise than alone, since it takes no positions. Leave the context out."
            )
        if any(hasattr(module, "create_position_ids_from_input_ids") for module in core.modules()):
            raise FastpeftError(
                f"a context before texts: a {backbone.class_name} counts positions from that of its padding, and so "
                "texts would not follow the context. Leave the context out."
            )
        words = core.get_input_embeddings().num_embeddings
        if unknown := [token for token in tokens if not 0 <= token < words]:
            raise FastpeftError(
                f"the context has the token {unknown[0]}, but the {backbone.class_name} knows those from 0 to "
                f"{words - 1}. Make it by the tokenizer of that model."
            )
        self.tokens = tuple(tokens)
        self._backbone = backbone
        self._states: list[tuple[Tensor, Tensor]] = []
        self._stamp: list[Any] | None = None  # of the backbone that made them

    def layers(self, *, keep: bool) -> list[ContextLayer]:
        """New layers of a cache, one for each of the backbone's, that begin with the context."""
        return [ContextLayer(keys, values, keep) for keys, values in self._read()]

    def in_front(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a pass over texts alone, with a `LadderCache` or without, for one after the context."""
        text: Tensor = arguments["input_ids"] if "input_ids" in arguments else arguments["inputs_embeds"]
        length, found = len(self.tokens), dict(arguments)
        cache, mask = found.get(CACHE), found.get("attention_mask")
        past = 0 if cache is None else cache.get_seq_length()
        if cache is None:
            found[CACHE] = DynamicCache()
            found[CACHE].layers = self.layers(keep=False)
        else:
            found[CACHE] = cache.of_backbone()
        if mask is not None:
            found["attention_mask"] = torch.cat((mask.new_ones(len(mask), length), mask), dim=1)
        if found.get("position_ids") is None and self._takes_positions:
            seen = text.new_ones(1, past + text.shape[1], dtype=torch.long) if mask is None else mask
            found["position_ids"] = (seen.long().cumsum(1) - 1).clamp(min=0)[:, past:]
        for name in ("position_ids", "cache_position"):
            if name in found:
                found[name] = found[name] + length
        return found

    def _read(self) -> list[tuple[Tensor, Tensor]]:
        """The keys and values of each layer, in the backbone's own dtype, as its weights and active adapters are."""
        weight = self._backbone.core.get_input_embeddings().weight
        # weights of a graph, of a transform or of a simulation are not looked at
        looks = not (torch.compiler.is_compiling() or is_transformed() or isinstance(weight, FakeTensor))
        stamp = stamp_of(self._backbone) if looks else None
        keys = self._states[0][0] if self._states else None
        fits = keys is not None and (keys.device, keys.dtype) == (weight.device, weight.dtype)
        if fits and stamp in (None, self._stamp):
            return self._states
        tokens = torch.tensor([self.tokens], device=weight.device)
        # not under inference mode, whose tensors later passes with gradients could not read
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            output = self._backbone.body(input_ids=tokens, use_cache=True, return_dict=True)
        cache = next((value for value in output.values() if isinstance(value, DynamicCache)), None)
        if cache is None:
            raise FastpeftError(
                f"a context before texts: a {self._backbone.class_name} gives back no keys and values of the "
                "context that texts could read. Leave the context out."
            )
        states = [(layer.keys, layer.values) for layer in cache.layers]
        if type(states[0][0]) is Tensor:  # a fake one is of its simulation alone
            self._states, self._stamp = states, stamp
        return states
