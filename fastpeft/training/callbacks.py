"""What a run does beside the Trainer's steps: when it measures, saves and stops, and what it reports."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState

from fastpeft.data.names import LOSS
from fastpeft.data.problems import best_of
from fastpeft.ops import dispatch
from fastpeft.support.interrupts import StopRequest
from fastpeft.support.launcher import is_first
from fastpeft.support.processes import Ranks
from fastpeft.support.stages import report
from fastpeft.training.row_order import LengthGroupedOrder
from fastpeft.training.run_folder import RunFolder

logger = logging.getLogger(__name__)

_CURVE_POINTS = 5  # of the metric's curve, with its last


def logged(state: TrainerState, name: str) -> list[tuple[int, float]]:
    """The logged values of a name, with their steps."""
    return [(entry["step"], entry[name]) for entry in state.log_history if name in entry]


class EpochOfOrder(TrainerCallback):
    """Tells the order of rows which epoch begins, by the steps made: a state made of a journal knows no epoch."""

    def __init__(self, order: LengthGroupedOrder, steps: int) -> None:
        self.order = order
        self.steps = steps  # of an epoch

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.order.epoch = state.global_step // self.steps


class CurvePoints(TrainerCallback):
    """Asks for the inner points of the metric's curve.

    At least as many rows are trained on as an evaluation reads, so that evaluating stays the smaller part of the work,
    unless `eval_steps` is given.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self._every(args, state.max_steps) == 0 and state.global_step < state.max_steps:
            control.should_evaluate = True

    def count(self, args: Any, steps: int) -> int:
        """How many inner points a run of so many steps has."""
        return (steps - 1) // self._every(args, steps)

    def _every(self, args: Any, steps: int) -> int:
        """Steps from one point to the next."""
        given = args.eval_steps or 0
        if given < 1:  # a share of all steps
            given = math.ceil(steps * given)
        rows_a_step = args.train_batch_size * args.gradient_accumulation_steps
        return int(given or max(math.ceil(steps / _CURVE_POINTS), math.ceil(self.rows / rows_a_step)))


class MeasuredCheckpoints(TrainerCallback):
    """Asks to measure what is about to be saved, and nothing else, so that the best checkpoint is known."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_evaluate = control.should_save


class Patience(TrainerCallback):
    """Ends a run whose metric was not better for as many checkpoints, also one that is resumed after the last of these.

    All that it knows is in the log, which a checkpoint holds.
    """

    def __init__(self, metric: str, checkpoints: int) -> None:
        self.metric = metric
        self.checkpoints = checkpoints

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_evaluate(args, state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        measured = logged(state, f"eval_{self.metric}")
        best = best_of(measured, self.metric) if measured else 0
        if not control.should_training_stop and sum(step > best for step, _ in measured) >= self.checkpoints:
            logger.info("ends at step %d: the best %s was that of step %d", state.global_step, self.metric, best)
            control.should_training_stop = True


class WholeCheckpoints(TrainerCallback):
    """Moves each checkpoint, once the Trainer has written it, from the staging place to its final name."""

    def __init__(self, folder: RunFolder, chosen_by: str | None, ranks: Ranks) -> None:
        self.folder = folder
        self.chosen_by = chosen_by
        self.ranks = ranks

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        staged = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        best = None
        if self.chosen_by is not None and (measured := logged(state, f"eval_{self.chosen_by}")):
            best = best_of(measured, self.chosen_by)  # a run that was stopped before has measured nothing
        self.ranks.wait()  # each process writes its random state into it
        self.ranks.first_does(lambda: self.folder.keep_checkpoint(staged, best_step=best))


class KeptChoices(TrainerCallback):
    """Writes which ways of computing were timed on a GPU, as soon as a step has asked: a resumed run takes them."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.kept: dict[str, Any] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if is_first() and (chosen := dispatch.chosen()) != self.kept:
            self.kept = chosen
            self.folder.keep_choices(chosen)


class Stopping(TrainerCallback):
    """Ends a run that was asked to stop: saves a checkpoint of the step just made, then makes no other.

    It comes after what measures each checkpoint, since one more to choose from could change the result. What one of
    several processes was asked, all do: a signal reaches them at different moments.
    """

    def __init__(self, stop: StopRequest, ranks: Ranks) -> None:
        self.stop = stop
        self.ranks = ranks
        self.stopped = False

    def _asked(self, args: Any, state: Any) -> bool:
        self.stop.asked = self.ranks.any(self.stop.asked, args.device)
        return self.stop.asked and state.global_step < state.max_steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._asked(args, state):
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._asked(args, state):
            self.stopped = control.should_training_stop = True  # now: a checkpoint keeps what was set before


class Clock(TrainerCallback):
    """Counts steps and the seconds spent in them, without evaluating and saving."""

    def __init__(self) -> None:
        self.steps = 0
        self.seconds = 0.0
        self._begin = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begin = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += 1
        self.seconds += time.perf_counter() - self._begin


class Reports(TrainerCallback):
    """Reports each step, with the latest loss and metric and the speed, and each batch that is measured.

    By MeZO, with the latest projected gradient too, and the speed in steps a second: its runs have many short ones.
    """

    def __init__(self, clock: Clock, metric: str, zeroth_order: bool) -> None:
        self.clock = clock
        self.metric = metric
        self.zeroth_order = zeroth_order
        self.latest: dict[str, float] = {}
        self.training, self.measuring = "training", "measuring before training"  # what the stages are called
        self.batches = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.measuring = "measuring"
        report(self.training, state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        speed = {"steps_per_second": self.clock.steps / self.clock.seconds}
        if not self.zeroth_order:
            rows = args.train_batch_size * args.gradient_accumulation_steps
            speed = {"samples_per_second": rows * speed["steps_per_second"]}
        report(self.training, state.global_step, state.max_steps, **self.latest, **speed)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **kwargs: Any) -> None:
        names = {"loss": LOSS, "projected_grad": "projected_grad", f"eval_{self.metric}": self.metric}
        self.latest |= {told: logs[name] for name, told in names.items() if name in logs}
        if self.measuring == "measuring" and state.max_steps > 0:  # what was logged after the last step
            report(self.training, state.global_step, state.max_steps, **self.latest)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.batches += 1
        report(self.measuring, self.batches, len(kwargs["eval_dataloader"]))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.batches = 0

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.measuring = "measuring after training"


class CudaPeak(TrainerCallback):
    """The most bytes that the allocator held in any step, without evaluating and saving."""

    def __init__(self) -> None:
        self.nbytes = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(args.device)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.device.type == "cuda":
            self.nbytes = max(self.nbytes, torch.cuda.max_memory_allocated(args.device))
