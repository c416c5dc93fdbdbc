"""Checkpoints of `MeZOTrainer`, and from which of them, or from which step of the journal, a run is resumed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState

from fastpeft.mezo.journal import FILE_NAME

STATE_FILE = "trainer_state.json"  # the Trainer writes it last into a checkpoint, and reads it first


@dataclass(frozen=True)
class Checkpoint:
    """A folder that the Trainer wrote.

    Attributes:
        step: the steps behind it.
        weights: whether it holds weights; if not, it holds a copy of the journal.
    """

    path: Path
    step: int
    weights: bool

    @classmethod
    def read(cls, path: Path) -> Checkpoint:
        step = TrainerState.load_from_json(str(path / STATE_FILE)).global_step
        return cls(path, step, not (path / FILE_NAME).exists())

    def position(self) -> int | dict[str, Any]:
        """Where its weights stand in the run, as `MeZO.resume` takes it: the step alone after `save_only_model`."""
        state = self.path / "optimizer.pt"
        return torch.load(state, map_location="cpu", weights_only=True) if state.exists() else self.step


@dataclass(frozen=True)
class Start:
    """Where a resumed run with a journal begins.

    Attributes:
        weights: the checkpoint with the weights to begin from; None: begin from the base model.
        steps: steps that are made already.
        newest: the checkpoint whose log and state the run continues; None: there is none.
    """

    weights: Checkpoint | None
    steps: int
    newest: Checkpoint | None

    @property
    def at_checkpoint(self) -> bool:
        """Whether the run continues at `newest`, not at a later step of the journal."""
        return self.newest is not None and self.newest.step == self.steps


def where_to_begin(saved: Sequence[Checkpoint], given: Checkpoint | None, reach: tuple[int, int] | None) -> Start:
    """Choose where a resumed run begins.

    Args:
        saved: the checkpoints of the run, in the order of their steps. Those outside the journal's reach were left by a
            run that went back to an earlier step, or kept no journal.
        given: the one from which to go on; None: go on as late as possible, and make a journal's last step again.
        reach: the steps after which the journal begins and ends; None: there is no journal.
    """
    first, last = reach or (0, math.inf)
    fitting = [each for each in saved if first <= each.step <= last]
    if given is None:
        newest = fitting[-1] if fitting else None
        steps = max(0 if newest is None else newest.step, 0 if reach is None else max(reach[1] - 1, reach[0]))
    else:
        newest, steps = given, given.step
        fitting = [*(each for each in fitting if each.step <= steps), given]
    return Start(next((each for each in reversed(fitting) if each.weights), None), steps, newest)
