"""A pass of a `LadderModel` without its head of words, for trainers that compute losses from states, as TRL's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from fastpeft.errors import FastpeftError
from fastpeft.ladder.inputs import LadderInputs

_INPUTS = ("input_ids", "attention_mask", "position_ids", "inputs_embeds")
# what a configuration has where logits are not the plain product of states and the head; a trainer that reads a
# `LadderConfig` finds none of it
_OF_LOGITS = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


class StatesOnly:
    """What a `LadderModel` beside a decoder has as `base_model`: called, it makes the states that the head reads.

    All else that is asked of it, the base answers, which is its `base_model`.
    """

    def __init__(self, ladder: Any) -> None:
        self.base_model = ladder.base
        self._ladder = ladder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base_model, name)

    def __call__(self, *args: Any, use_cache: bool | None = None, **inputs: Any) -> Any:
        """The states with the side network in them, `(B, T, d)`, that the layer of all words reads.

        What else the head has, such as a dense layer and a norm, has run on them.

        Raises:
            FastpeftError: the head changes its logits, texts are joined, or as `LadderModel.forward`.
        """
        ladder, kind = self._ladder, self._ladder.backbone.class_name
        if others := inputs.keys() - set(_INPUTS):
            raise FastpeftError(
                f"a pass without the head got {', '.join(others)}, as of joined texts: a side network cannot "
                "tell them apart. Turn off what joins them, as packing and padding_free of TRL."
            )
        text = ladder.backbone.core.config.get_text_config()
        if changed := [name for name in _OF_LOGITS if getattr(text, name, None) not in (None, 1)]:
            raise FastpeftError(
                f"the {kind} changes its logits ({changed[0]}), which a trainer that computes them from "
                "hidden states does not know of a LadderModel. Train it by transformers' Trainer or fastpeft train."
            )
        given = LadderInputs(*args, **inputs)
        given.check(ladder.backbone, joined=False)
        with _inputs_of(ladder.get_output_embeddings()) as states:
            ladder.run_base(given)
        if not states:
            raise FastpeftError(
                f"the {kind} does not call its layer of all words as a module with one argument, so it "
                "cannot be told what that layer reads. Train it by transformers' Trainer or fastpeft train."
            )
        return BaseModelOutput(last_hidden_state=states[-1])


@contextmanager
def _inputs_of(layer: nn.Module) -> Iterator[list[Tensor]]:
    """While the block runs, keep what the layer is given, in the list, and let it compute of no token."""
    kept: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        kept.extend(args)
        return tuple(each[:, :0] for each in args)

    handle = layer.register_forward_pre_hook(keep)
    try:
        yield kept
    finally:
        handle.remove()
