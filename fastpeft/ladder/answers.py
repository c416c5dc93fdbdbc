"""Whether a base answers by what its last layer made, and by nothing else: a pass over it tells."""

from __future__ import annotations

from fastpeft.errors import FastpeftError
from fastpeft.ladder.backbone import Backbone
from fastpeft.ladder.causality import encodes_and_decodes, has_values, leaving_no_trace, two_texts
from fastpeft.ladder.passes import IdleLayersError, listen

# Answers to two texts that differ by less than this share of the largest are the same but for rounding. Measured over
# all architectures of transformers with heads for classes, tags, answers and words, in float32 and bfloat16: 0 where
# the last layer's output decides all, and above 0.4 where it does not.
_ROUNDING = 0.05


def check_answers(backbone: Backbone) -> None:
    """Raise `FastpeftError` if a base's answer depends on its text in other ways than by its last layer's output.

    A side network replaces that output. In a pass over two texts both get that of the first, and then the answers must
    be the same. There is no pass if the base has no values (on the meta device), reads no tokens, or has a decoder too,
    which reads the text again.
    """
    core = backbone.core
    if backbone.plain or backbone.input_name != "input_ids" or encodes_and_decodes(backbone) or not has_values(core):
        return
    try:
        given = backbone.arguments({"input_ids": two_texts(backbone, slice(None))})
        with leaving_no_trace(backbone), listen(backbone, lambda *_: None, lambda feature: feature[[0, 0]]):
            answers = core(**given, return_dict=True)[0].float()  # (2, ...)
    except IdleLayersError:
        raise
    except Exception:  # a model that needs other inputs raises almost any type; its own pass then tells what is wrong
        return
    if (answers[0] - answers[1]).abs().max() > _ROUNDING * answers.abs().max():
        names = {module: name for name, module in core.named_modules()}
        raise FastpeftError(
            f"the answer of the {type(core).__name__} comes not from the output of {names[backbone.layers[-1]]} alone, "
            "which a side network would replace: what else it reads would pass the side network by. Name in "
            "feature_modules whole layers, each of which reads the output of the one before, or load a model of "
            "another architecture."
        )
