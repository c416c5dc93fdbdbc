"""Rates, schedules and epochs with which a method trains where a person gives none."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fastpeft.data.names import DEMO, DEMO_FOLDER
from fastpeft.support import files

_DEMO_FILE = "recipes.json"


@dataclass(frozen=True)
class Recipe:
    """How a method trains by default; a person's options win.

    Attributes:
        learning_rate: peak rate of AdamW, or the rate of MeZO.
        weight_decay: of AdamW, for all that is neither a bias nor of a norm.
        warmup: share of the steps over which the rate rises to its peak.
        schedule: what follows: `linear` falls to 0, `polynomial` in a straight line to `last_rate`, `constant` stays.
        last_rate: the last rate of `polynomial`, in proportion to the peak where that is another.
        epochs: passes over the training rows.
        rate_of_words: the peak rate where a decoder learns next words. None: the same.
    """

    learning_rate: float
    weight_decay: float = 0.0
    warmup: float = 0.06
    schedule: str = "linear"
    last_rate: float = 0.0
    epochs: float = 5
    rate_of_words: float | None = None

    def for_model(self, model: str, method: str, *, says_words: bool = False) -> Recipe:
        """This recipe, or that of the bundled model, whose rates were found on a slice of the demo's training data."""
        if says_words and self.rate_of_words is not None:
            last = self.last_rate * self.rate_of_words / self.learning_rate
            return replace(self, learning_rate=self.rate_of_words, last_rate=last)
        if model != DEMO:
            return self
        recipes: dict[str, Any] = files.read_json(DEMO_FOLDER / _DEMO_FILE)
        return replace(self, **{**recipes["every method"], **recipes.get(method, {})})

    def schedule_settings(self, learning_rate: float) -> dict[str, float]:
        """What the schedule takes beside the peak, in the names of transformers."""
        if self.schedule != "polynomial":
            return {}
        return {"lr_end": self.last_rate * (learning_rate / self.learning_rate), "power": 1.0}
