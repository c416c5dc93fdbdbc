"""What a method is given beside the model that it makes ready."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastpeft.errors import FastpeftError

# layer names to train on, a regular expression that whole names must match, or a name that PEFT knows
Targets = list[str] | str | None
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Preparation:
    """What a method is given beside the model.

    Attributes:
        head: names of the modules that the checkpoint did not hold or that belong to the task; they always train.
        rank: rank of an adapter, from 1; None takes the method's own.
        targets: layers to adapt; None takes the method's own.
        settings: further fields of the method's configuration.
        trains_head: whether an adapter trains the head too; one of words that the checkpoint has stays as it is.
        window: features that each block of a side network reads; None takes the method's own.
        reduction: how many times narrower than the backbone a side network is; None takes the method's own.
        task_type: what PEFT calls the problem.
        by_words: whether the head predicts words.
        context: token ids that stand in front of every text, where the method asked for examples; else None.
    """

    head: Sequence[str]
    rank: int | None = None
    targets: Targets = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    trains_head: bool = True
    window: int | None = None
    reduction: int | None = None
    task_type: str | None = "SEQ_CLS"
    by_words: bool = False
    context: Sequence[int] | None = None


def parse_targets(text: str | None) -> Targets:
    """Targets as written on a command line: `query,key`, `all-linear`, or a regular expression."""
    if text is None or text == ALL_LINEAR:
        return text
    if re.fullmatch(r"[\w.-]+(,[\w.-]+)*", text):
        return text.split(",")
    try:
        re.compile(text)
    except re.error as error:
        raise FastpeftError(
            f"targets {text!r} are neither names joined by commas nor a regular expression ({error}). Give, for "
            "example, query,key or all-linear."
        ) from None
    return text
