"""What runs would take: memory, simulated, and seconds, from a few steps that really run."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fastpeft.comparison.cells import Cell
from fastpeft.comparison.variants import ZERO_SHOT
from fastpeft.config import TrainConfig
from fastpeft.errors import FastpeftError
from fastpeft.runs import RunFolder
from fastpeft.task import Task
from fastpeft.trainer import CURVE_POINTS, CURVE_ROWS, Clock, LengthGroupedOrder, trainer_class
from fastpeft.training import simulated_peak_mb

_STEPS = 6  # that are timed, after one that allocates
_ROWS = 128  # dev rows that are measured, timed


@dataclass(frozen=True)
class Estimate:
    """What a run would take.

    Attributes:
        memory_mb: peak of a training step on the longest batch, in MB (2^20 bytes); None where it cannot be told.
        start_seconds: to load and to measure the dev rows; None where nothing was timed, for lack of memory.
        row_seconds: of training, a row; None likewise.
        error: why nothing can be told.
    """

    memory_mb: float | None = None
    start_seconds: float | None = None
    row_seconds: float | None = None
    error: str | None = None

    def seconds(self, rows: float) -> float | None:
        """Of a cell that trains on so many rows, those of every epoch counted; None where nothing was timed."""
        if self.start_seconds is None or self.row_seconds is None:
            return None
        return self.start_seconds + self.row_seconds * rows

    def fits(self, budget_mb: float) -> bool | None:
        """Whether the peak is within a budget; None where that cannot be told."""
        return None if self.memory_mb is None else self.memory_mb <= budget_mb


def estimates(cells: Iterable[Cell], budget_mb: float | None = None) -> dict[str, Estimate]:
    """What the cells of each variant would take, by the variant.

    A variant that starts from another is taken as started from the model, which has the same shapes.

    Args:
        cells: those that the variants' results are of.
        budget_mb: memory that there is, in MB; of what needs more no step is run. None: steps of every variant run.
    """
    trained = {cell.variant: cell for cell in cells if cell.method != ZERO_SHOT and not cell.search}
    return {variant: estimate(cell.config, budget_mb) for variant, cell in trained.items()}


def estimate(config: TrainConfig, budget_mb: float | None = None) -> Estimate:
    """What one run would take; arguments as in `estimates`."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as elsewhere:
        short: dict[str, Any] = {"output": elsewhere, "init_from": None, "max_steps": _STEPS + 1}
        unmeasured: dict[str, Any] = {"save_steps": None, "metric": None, "patience": None}
        unmeasured |= {"cache_features": None, "cache_dtype": None}  # which would be written
        try:
            task = Task.load(dataclasses.replace(config, **short, **unmeasured))
            memory = simulated_peak_mb(task, max(len(row["input_ids"]) for row in task.train_rows))
            if budget_mb is not None and (memory is None or memory > budget_mb):
                return Estimate(memory)
            clock = _LaterSteps()
            trainer = trainer_class(task)(task, task.training_arguments(elsewhere), RunFolder(elsewhere), [clock])
            loaded = time.perf_counter()
            trainer.measure(task.dev_rows[:_ROWS])
            measured = (time.perf_counter() - loaded) / len(task.dev_rows[:_ROWS])
            trainer.train()
        except FastpeftError as error:
            return Estimate(error=str(error))
    rows = len(task.dev_rows)
    read = 2 * rows + (CURVE_POINTS - 1) * min(rows, CURVE_ROWS)  # before and after, and for the curve
    steps = _padded_tokens(trainer.order, trainer.args.gradient_accumulation_steps)
    timed = sum(steps[index % len(steps)] for index in range(1, 1 + clock.steps))
    row_seconds = clock.seconds / timed * sum(steps) / len(task.train_rows)
    return Estimate(memory, loaded - begin + read * measured, row_seconds)


def _padded_tokens(order: LengthGroupedOrder, batches_a_step: int) -> list[int]:
    """Tokens of each step of the first epoch, with padding."""
    order.epoch = 0
    lengths = [order.lengths[index] for index in order]
    batches = [lengths[start : start + order.batch_size] for start in range(0, len(lengths), order.batch_size)]
    tokens = [len(batch) * max(batch) for batch in batches]
    return [sum(tokens[start : start + batches_a_step]) for start in range(0, len(tokens), batches_a_step)]


class _LaterSteps(Clock):
    """Times the steps after the first."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > 1:
            super().on_step_end(args, state, control, **kwargs)
