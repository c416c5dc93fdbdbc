"""What runs would take: memory, simulated, and seconds, from a few steps that really run."""

from __future__ import annotations

import dataclasses
import logging
import math
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import TrainingArguments

from fastpeft.data.batches import by_length
from fastpeft.data.packed_rows import POSITIONS
from fastpeft.data.problems import MULTI_LABEL, REGRESSION
from fastpeft.errors import FastpeftError
from fastpeft.ops.packing import Packs
from fastpeft.ops.quantise import count_parameters
from fastpeft.support.launcher import import_path, launched
from fastpeft.support.processes import Ranks
from fastpeft.training.arguments import (
    ADAMW,
    ADAMW_8BIT,
    compute_dtype,
    evaluated_tokens,
    noticing_lack_of_memory,
    recipe_used,
    refusing,
    shortness,
    total_steps,
    training_arguments,
)
from fastpeft.training.callbacks import Clock, CurvePoints
from fastpeft.training.config import TrainConfig, check_config
from fastpeft.training.memory import (
    MEBIBYTE,
    BlockwiseAdamW,
    OptimizerFactory,
    embeddings_in_float,
    fused_adamw,
    simulate_training_step,
)
from fastpeft.training.row_order import LengthGroupedOrder
from fastpeft.training.run_folder import RunFolder
from fastpeft.training.setup import checkpointing_options
from fastpeft.training.task import Task
from fastpeft.training.trainer import CURVE_ROWS, trainer_class

logger = logging.getLogger(__name__)

_STEPS = 6  # that are timed, after one that allocates
_ROWS = 128  # dev rows that are measured, timed


@dataclass(frozen=True)
class Estimate:
    """What a run would take.

    Attributes:
        memory_mb: peak of a training step on the longest batch, in MB (2^20 bytes); None where it cannot be told.
        start_seconds: to load and to measure the dev rows; None where nothing was timed.
        row_seconds: of training, a row; None likewise.
        error: why nothing more can be told.
    """

    memory_mb: float | None = None
    start_seconds: float | None = None
    row_seconds: float | None = None
    error: str | None = None

    def seconds(self, rows: float) -> float | None:
        """Seconds of a run over `rows` rows, those of every epoch counted; None where nothing was timed."""
        if self.start_seconds is None or self.row_seconds is None:
            return None
        return self.start_seconds + self.row_seconds * rows

    def later(self, seconds: float) -> Estimate:
        """The estimate of the same run, begun so many seconds later."""
        if self.start_seconds is None:
            return self
        return dataclasses.replace(self, start_seconds=self.start_seconds + seconds)

    def fits(self, budget_mb: float) -> bool | None:
        """Whether the peak is within a budget; None where that cannot be told."""
        return None if self.memory_mb is None else self.memory_mb <= budget_mb


@dataclass(frozen=True)
class TrainPlan:
    """What a run would do.

    Attributes:
        trainable_parameters, parameters: numbers of values.
        steps: optimizer steps.
        rows: trained on in all of them.
        train_rows, dev_rows: rows of data.
        longest_row: tokens of the longest training row.
        recipe: rates, schedule and length, by name.
        shortness: what is told where the run is too short to learn; else empty.
        compute_dtype: what a step computes in.
        estimate: what it would take.
    """

    trainable_parameters: int
    parameters: int
    steps: int
    rows: float
    train_rows: int
    dev_rows: int
    longest_row: int
    recipe: dict[str, Any]
    shortness: str
    compute_dtype: str
    estimate: Estimate

    @property
    def peak_memory_mb(self) -> float | None:
        """The estimate's `memory_mb`."""
        return self.estimate.memory_mb


def plan(config: TrainConfig, *, timed: bool = False, budget_mb: float | None = None) -> TrainPlan:
    """What `train(config)` would do, without training and without writing anything.

    Args:
        config: all that decides the run.
        timed: run a few steps, so that the plan tells seconds; not under a launcher, whose processes share a step.
        budget_mb: memory that there is, in MB; what needs more runs no step. None: any amount.

    Raises:
        FastpeftError: something given cannot be used.

    Example:
        >>> plan(TrainConfig(output="runs/siva", method="siva")).steps  # doctest: +SKIP
    """
    check_config(config)
    begin = time.perf_counter()
    task = Task.load(config)
    arguments = training_arguments(task, config.output)
    trainable, total = count_parameters(task.model)
    if timed and launched() == 1:
        taken = _estimate(task, arguments, begin, budget_mb)
    else:
        taken = Estimate(simulated_peak_mb(task, arguments, _longest(task)))
    return TrainPlan(
        trainable_parameters=trainable,
        parameters=total,
        steps=total_steps(arguments, task),
        rows=task.setup.rows_trained(len(task.train_rows)) * task.num_train_texts / len(task.train_rows),
        train_rows=task.num_train_texts,
        dev_rows=len(task.dev_rows),
        longest_row=_longest(task),
        recipe=recipe_used(task, arguments),
        shortness=shortness(task, arguments),
        compute_dtype=compute_dtype(arguments),
        estimate=taken,
    )


def estimate(config: TrainConfig, budget_mb: float | None = None) -> Estimate:
    """What `train(config)` would take, by a few steps; arguments as in `plan`.

    A run that starts from another is taken as started from the model, which has the same shapes: the other may not
    have run yet.
    """
    try:
        return plan(dataclasses.replace(config, init_from=None), timed=True, budget_mb=budget_mb).estimate
    except FastpeftError as error:
        return Estimate(error=error.args[0])


def process_seconds() -> float:
    """Seconds that a process of `fastpeft train` takes beside its run: it starts, loads its libraries, and ends."""
    begin = time.perf_counter()
    libraries = "import fastpeft.console, fastpeft.training.recipe, matplotlib.backends.backend_agg, matplotlib.figure"
    command = [sys.executable, *import_path(), "-c", libraries]
    subprocess.run(command, check=False, stdin=subprocess.DEVNULL, capture_output=True)
    return time.perf_counter() - begin


def _estimate(task: Task, arguments: TrainingArguments, begin: float, budget_mb: float | None) -> Estimate:
    """What a run on `task`, loaded since `begin`, would take; trains the model a few steps."""
    memory = simulated_peak_mb(task, arguments, _longest(task))
    if budget_mb is not None and (memory is None or memory > budget_mb):
        return Estimate(memory)
    read = 2 * len(task.dev_rows) + _measured_between(task, arguments)  # before and after, and between
    with tempfile.TemporaryDirectory() as elsewhere:
        # no checkpoint and no cache of features, which would be written, and no report of it
        unmeasured: dict[str, Any] = {"save_steps": None, "metric": None, "patience": None}
        unmeasured |= {"cache_features": None, "report_to": None}
        short = dataclasses.replace(task.config, output=elsewhere, max_steps=_STEPS + 1, **unmeasured)
        try:
            task = dataclasses.replace(task, setup=dataclasses.replace(task.setup, config=short))
            clock = _LaterSteps()
            arguments = training_arguments(task, elsewhere)
            arguments.eval_steps = short.max_steps  # the last, at which nothing is measured between
            with refusing(task), noticing_lack_of_memory(task):
                trainer = trainer_class(task)(task, arguments, RunFolder(elsewhere), [clock])
                trainer.reports.training = "trial steps"  # for a plan keeps nothing of them
                trainer.reports.measuring = "measuring"
                loaded = time.perf_counter()
                trainer.measure(task.dev_rows[:_ROWS])
            measured = (time.perf_counter() - loaded) / len(task.dev_rows[:_ROWS])
            with noticing_lack_of_memory(task):
                trainer.train()
        except FastpeftError as error:
            return Estimate(memory, error=str(error))
    steps = _padded_tokens(trainer.order, trainer.args.gradient_accumulation_steps)
    timed = sum(steps[index % len(steps)] for index in range(1, 1 + clock.steps))
    row_seconds = clock.seconds / timed * sum(steps) / task.num_train_texts
    return Estimate(memory, loaded - begin + read * measured, row_seconds)


def _measured_between(task: Task, arguments: TrainingArguments) -> int:
    """How many rows a run measures between its first and its last step: for checkpoints, or for the curve."""
    rows, steps = len(task.dev_rows), total_steps(arguments, task)
    if task.config.metric is not None and task.config.save_steps is not None:
        return rows * math.ceil(steps / task.config.save_steps)
    rows = min(rows, CURVE_ROWS)
    return rows * CurvePoints(rows).count(arguments, steps)


def simulated_peak_mb(task: Task, arguments: TrainingArguments, tokens: int) -> float | None:
    """Simulated peak of one step on a process's part of a batch of `tokens` tokens a row, in MB; None: unknown."""
    model, config = task.model, task.config
    optimizer = None
    if not task.method.zeroth_order:
        optimizer = _optimizer(model, arguments)
        if optimizer is None:
            return None
    batch = _batch(task, config.batch_size // Ranks().size, tokens)
    measured = _batch(task, *_most_measured(task, arguments)) if _packs_by_rows(model) else None
    try:
        if arguments.gradient_checkpointing:
            own, options = checkpointing_options(arguments)
            # the older transformers have the second name alone
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable(options or None, **own)
        autocast_dtype = torch.bfloat16 if config.bf16 else None
        step = simulate_training_step(
            model, batch, optimizer, autocast_dtype, config.optimizer_in_backward, measured=measured
        )
    except Exception as error:  # a model whose forward reads data cannot be simulated; that must not end a run
        logger.warning("peak memory cannot be simulated for this model: %s", error)
        return None
    return round(step.peak / MEBIBYTE, 1)


def _packs_by_rows(model: torch.nn.Module) -> bool:
    """Whether layers may keep a pack that only a batch of many rows asks for."""
    packs = (getattr(module, "packs", None) for module in model.modules())
    on_cpu = next(model.parameters()).device.type == "cpu"
    return on_cpu and any(isinstance(each, Packs) and each.enabled for each in packs)


def _most_measured(task: Task, arguments: TrainingArguments) -> tuple[int, int]:
    """Rows and tokens a row of the largest batch of dev rows that a process measures."""
    size = arguments.eval_batch_size // Ranks().size
    batches = by_length(task.dev_rows, size, evaluated_tokens(task))  # the longest row is the last of each
    shapes = [(len(batch), len(task.dev_rows[batch[-1]]["input_ids"])) for batch in batches]
    return max(shapes, key=math.prod)


def _batch(task: Task, rows: int, tokens: int) -> dict[str, torch.Tensor]:
    """What a step of the task is given, in form: so many rows of so many tokens, all of them 0."""
    problem, row = task.data.problem, task.train_rows[0]
    with next(task.model.parameters()).device:
        ids = torch.zeros(rows, tokens, dtype=torch.long)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if problem is MULTI_LABEL:
            batch["labels"] = torch.zeros(rows, len(task.data.labels))
        elif problem is REGRESSION:
            batch["labels"] = torch.zeros(rows)
        else:
            batch["labels"] = torch.zeros_like(ids if problem.per_token else ids[:, 0])
        if POSITIONS in row:  # of two texts, so that the step keeps a mask that tells texts apart
            del batch["attention_mask"]
            batch[POSITIONS] = (torch.arange(tokens) % max(1, tokens // 2)).expand(rows, tokens)
        if "mask_positions" in row:
            batch["mask_positions"] = torch.zeros(rows, dtype=torch.long)
    return batch


def _optimizer(model: torch.nn.Module, arguments: TrainingArguments) -> OptimizerFactory | None:
    """What makes an optimizer with the state of the Trainer's, for a simulation; None where that is not known."""
    name = arguments.optim.value
    if name in ADAMW:
        return fused_adamw
    if name in ADAMW_8BIT:
        return partial(BlockwiseAdamW, in_float=embeddings_in_float(model))
    if name == "sgd" and not arguments.optim_args:  # as momentum
        together = arguments.device.type == "cuda"  # as torch steps there
        return partial(torch.optim.SGD, weight_decay=arguments.weight_decay, foreach=together)
    return None


def _longest(task: Task) -> int:
    return max(len(row["input_ids"]) for row in task.train_rows)


def _padded_tokens(order: LengthGroupedOrder, batches_a_step: int) -> list[int]:
    """Tokens of each step of the first epoch, with padding."""
    lengths = [order.lengths[row] for row in order.rows(0)]
    batches = [lengths[start : start + order.batch_size] for start in range(0, len(lengths), order.batch_size)]
    tokens = [len(batch) * max(batch) for batch in batches]
    return [sum(tokens[start : start + batches_a_step]) for start in range(0, len(tokens), batches_a_step)]


class _LaterSteps(Clock):
    """Times the steps after the first."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > 1:
            super().on_step_end(args, state, control, **kwargs)
