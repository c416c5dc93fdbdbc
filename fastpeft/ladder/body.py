"""A pass of a `LadderModel` without its head of words, for trainers that compute losses from states, as TRL's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from fastpeft.errors import FastpeftError
from fastpeft.ladder.checks import check_mask, check_positions
from fastpeft.ladder.feature_sources import LadderPass, choose_source

# what a configuration has where logits are not the plain product of states and the head; a trainer that reads a
# `LadderConfig` finds none of it
_OF_LOGITS = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


class Body:
    """What a `LadderModel` beside a decoder has as `base_model`: called, it makes the states that the head reads.

    All else that is asked of it, the base answers, which is its `base_model`.
    """

    def __init__(self, ladder: Any) -> None:
        self.base_model = ladder.base
        self._ladder = ladder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base_model, name)

    def __call__(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **of_joined_texts: Any,
    ) -> Any:
        """The states with the side network in them, `(B, T, d)`, that the layer of all words reads.

        What else the head has, such as the dense layer and the norm of BERT's, has run on them.

        Raises:
            FastpeftError: the head changes its logits, texts are joined, or as `LadderModel.forward`.
        """
        if of_joined_texts:
            raise FastpeftError(
                f"a pass without the head got {', '.join(of_joined_texts)}, as of joined texts: a side network cannot "
                "tell them apart. Turn off what joins them, as packing and padding_free of TRL."
            )
        ladder, backbone = self._ladder, self._ladder.backbone
        text = backbone.core.config.get_text_config()
        if changed := [name for name in _OF_LOGITS if getattr(text, name, None) not in (None, 1)]:
            raise FastpeftError(
                f"the {backbone.class_name} changes its logits ({changed[0]}), which a trainer that computes them from "
                "hidden states does not know of a LadderModel. Train it by transformers' Trainer or fastpeft train."
            )
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        tokens = input_ids if input_ids is not None else inputs_embeds
        if tokens is None:
            raise FastpeftError("a pass needs input_ids or inputs_embeds. Give one.")
        check_mask(attention_mask, (tokens.shape[0], tokens.shape[1]))
        check_positions(position_ids, attention_mask)
        inputs = backbone.inputs(given)
        run = ladder.new_side_run(attention_mask, keep_states=False)
        read = LadderPass(backbone, run, inputs, ladder.gradients_from)
        called = backbone.after_context(inputs)
        source = choose_source(ladder.feature_cache, inputs)
        with _taking_inputs(ladder.get_output_embeddings()) as states, read.around_base(source):
            ladder.base(**called, return_dict=True)
        if not states:
            raise FastpeftError(
                f"the {backbone.class_name} does not call its layer of all words as a module with one argument, so it "
                "cannot be told what that layer reads. Train it by transformers' Trainer or fastpeft train."
            )
        return BaseModelOutput(last_hidden_state=states[-1])


@contextmanager
def _taking_inputs(layer: nn.Module) -> Iterator[list[Tensor]]:
    """While the block runs, take what the layer is given, in the list, and let it compute of no token."""
    taken: list[Tensor] = []

    def take(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        taken.extend(args)
        return tuple(each[:, :0] for each in args)

    handle = layer.register_forward_pre_hook(take)
    try:
        yield taken
    finally:
        handle.remove()
