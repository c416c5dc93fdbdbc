"""The recipe of a training run: data, model, method, Trainer, result. All methods share it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from fastpeft.errors import FastpeftError
from fastpeft.support.launcher import launched
from fastpeft.training.config import TrainConfig, check_config
from fastpeft.training.lineage import check_output
from fastpeft.training.notices import tell_of_dtype, tell_of_task, tell_of_warnings
from fastpeft.training.outcome import finish
from fastpeft.training.run_folder import RunFolder
from fastpeft.training.session import as_begun, computing, fit, made_trainer, measured_before, under_way
from fastpeft.training.task import Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """A finished run: its folder, and what `metrics.json` in it holds."""

    folder: Path
    metrics: dict[str, Any]


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    command: str | None = None,
) -> TrainResult:
    """Train as `config` says and leave in `config.output` what loads, measures and repeats the result.

    What makes the figures of the result doubtful is logged, and is in `warnings` of its metrics.

    Args:
        config: all that decides the run.
        resume: continue from the newest checkpoint in the folder, by MeZO from the last step in its journal; with
            neither, or no folder, start from the beginning; a finished run is returned as it is.
        overwrite: replace the run that the folder holds. A folder that holds anything else is left alone.
        callbacks: further Trainer callbacks, as a progress bar.
        command: how the run was started, for `metrics.json`.

    Raises:
        FastpeftError: something given cannot be used; then nothing was written. Or the loss or a gradient was not
            finite; then the weights before that step are kept in the folder. Or the disk is full, memory is not enough,
            or one of several processes was lost; then the error says what is kept.
        KeyboardInterrupt: Ctrl-C, SIGTERM or SIGHUP came. The step under way was made and a checkpoint saved, from
            which `resume` leads to the bits of an uninterrupted run; a second one does not wait. The message says how
            to go on. Where somebody has set a handler of such a signal, that one runs.

    Notes:
        Under a launcher (`torchrun`) all processes call this, on one file system. They share each batch in equal parts,
        so `batch_size` is a multiple of their number, and a run goes on with any other number of them: the weights are
        those of one process to rounding, in which dropout draws otherwise. The last batch of an epoch is filled up
        with rows of the first.

    Example:
        >>> result = train(TrainConfig(output="runs/lora", method="lora"))  # doctest: +SKIP
        >>> result.metrics["accuracy"]  # doctest: +SKIP
    """
    check_config(config)
    if isinstance(callbacks, TrainerCallback | type):
        raise FastpeftError("callbacks is one callback. Give a list of them.")
    folder = RunFolder(config.output)
    check_output(folder, config.values(), resume=resume, overwrite=overwrite)
    if resume and folder.finished and launched() == 1:  # several look first whether all see it
        return _finished(folder)
    if resume:
        config = as_begun(config, folder)
    with computing(config, folder if resume else None):
        tell_of_dtype(config)
        task = Task.load(config)  # rows as tokens, and the model with what its method trains
        if resume and folder.started:
            folder.check_rows(task.data.fingerprint)
        tell_of_task(task, config)
        trainer = made_trainer(task, folder, callbacks, resume=resume)
        if trainer is None:
            return _finished(folder)
        before = measured_before(trainer, task, command)
        with under_way(trainer, task, resume=resume, overwrite=overwrite):  # from here on the folder is written to
            fit(trainer, task, resume=resume)
            metrics = finish(trainer, task, before)
    tell_of_warnings(metrics)
    if trainer.stop.asked:
        raise KeyboardInterrupt(f"Interrupted while the run in {folder.path} was ending; it is finished.")
    return TrainResult(folder.path, metrics)


def _finished(folder: RunFolder) -> TrainResult:
    """The result of a run that was finished before."""
    logger.info("the run in %s is finished; nothing to do", folder.path)
    folder.clear_lock()
    return TrainResult(folder.path, folder.metrics())
