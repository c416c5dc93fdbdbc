"""Rates, schedules and epochs with which a method trains where a person gives none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fastpeft.data.names import DEMO, DEMO_FOLDER
from fastpeft.support import files

_DEMO_FILE = "recipes.json"
_WIDE = 1_024  # the hidden size of RoBERTa-large, for which most published rates were found


@dataclass(frozen=True)
class Recipe:
    """How a method trains by default; a person's options win.

    Attributes:
        learning_rate: peak rate of AdamW, or the rate of MeZO.
        weight_decay: of AdamW, for all that is neither a bias nor of a norm.
        warmup: share of the steps over which the rate rises to its peak.
        schedule: what follows: `linear` falls to 0, `polynomial` in a straight line to `last_rate`, `constant` stays.
        last_rate: the rate that `polynomial` ends at; with another peak than `learning_rate`, in proportion to it.
        epochs: passes over the training rows.
        for_causal_lm: the fields that differ where a decoder learns next words. By default these are the epochs: after
            more of them a model repeats what it was told (Taori et al. 2023, Alpaca).
        for_narrow: the fields that differ beside a model narrower than RoBERTa-large, but where it learns next words.
    """

    learning_rate: float
    weight_decay: float = 0.0
    warmup: float = 0.06
    schedule: str = "linear"
    last_rate: float = 0.0
    epochs: float = 5
    for_causal_lm: Mapping[str, Any] = field(default_factory=lambda: {"epochs": 3})
    for_narrow: Mapping[str, Any] = field(default_factory=dict)

    def for_model(self, model: str, method: str, *, causal_lm: bool = False, hidden_size: int | None = None) -> Recipe:
        """This recipe as it is for a model.

        Args:
            model: the bundled one has rates of its own, which were found on a slice of the demo's training data.
            method: its name, for the bundled model's.
            causal_lm: whether the model learns next words.
            hidden_size: the width of the model; None where it is not known, and taken for wide.
        """
        if causal_lm:
            return replace(self, **self.for_causal_lm)
        if model != DEMO:
            is_narrow = hidden_size is not None and hidden_size < _WIDE
            return replace(self, **self.for_narrow) if is_narrow else self
        recipes: dict[str, Any] = files.read_json(DEMO_FOLDER / _DEMO_FILE)
        return replace(self, **{**recipes["every method"], **recipes.get(method, {})})

    def schedule_settings(self, learning_rate: float) -> dict[str, float]:
        """What the schedule takes beside the peak, in the names of transformers."""
        if self.schedule != "polynomial":
            return {}
        return {"lr_end": self.last_rate * (learning_rate / self.learning_rate), "power": 1.0}
