"""Rates, schedules and epochs with which a method trains where a person gives none."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

_WIDE = 1_024  # the hidden size of RoBERTa-large, for which most published rates were found
_NARROWEST = 384  # that was measured; beside narrower models a head has the rate of these


@dataclass(frozen=True)
class Recipe:
    """How a method trains by default; a person's options win.

    Attributes:
        learning_rate: peak rate of AdamW, or the rate of MeZO.
        head_learning_rate: peak rate of a new head beside a model as wide as RoBERTa-large, which is divided by a
            model's width in units of that: a step then changes a class's score equally far. A head begins at random, so
            that it has further to go than what is pretrained. None: the rate of all else.
        weight_decay: of AdamW, for all that is neither a bias nor of a norm.
        warmup: share of the steps over which the rate rises to its peak.
        schedule: what follows: `linear` falls to 0, `constant` stays.
        epochs: passes over the training rows, but over few rows as many as come to `least_steps`.
        least_steps: steps in which a new task is learned.
        for_causal_lm: the fields that differ where a decoder learns next words. By default few rows are passed over no
            more often: a model then repeats what it was told (Taori et al. 2023, Alpaca).
        for_narrow: the fields that differ beside a model narrower than RoBERTa-large, but where it learns next words.
    """

    learning_rate: float
    head_learning_rate: float | None = 8e-3
    weight_decay: float = 0.0
    warmup: float = 0.06
    schedule: str = "linear"
    epochs: float = 3
    least_steps: int = 1_200
    for_causal_lm: Mapping[str, Any] = field(default_factory=lambda: {"least_steps": 0})
    for_narrow: Mapping[str, Any] = field(default_factory=dict)

    def for_model(self, *, causal_lm: bool = False, hidden_size: int | None = None) -> Recipe:
        """This recipe as it is for a model.

        Args:
            causal_lm: whether the model learns next words.
            hidden_size: the width of the model; None where it is not known, and taken for wide.
        """
        if causal_lm:
            return replace(self, **self.for_causal_lm)
        width = hidden_size or _WIDE
        found = replace(self, **self.for_narrow) if width < _WIDE else self
        if found.head_learning_rate is None:
            return found
        of_head = found.head_learning_rate * _WIDE / max(width, _NARROWEST)
        return replace(found, head_learning_rate=float(f"{of_head:.2g}"))

    def epochs_of(self, steps: int) -> float:
        """Passes over the training rows, where one is of so many steps."""
        return max(self.epochs, math.ceil(self.least_steps / steps))
