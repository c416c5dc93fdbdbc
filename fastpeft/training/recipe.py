"""The recipe of a training run: data, model, method, Trainer, result. All methods share it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from fastpeft.support.launcher import launched
from fastpeft.training import session
from fastpeft.training.config import TrainConfig
from fastpeft.training.outcome import finish
from fastpeft.training.task import Task


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

    Args:
        config: all that decides the run.
        resume: continue from the newest checkpoint in the folder, by MeZO from the last step in its journal; with
            neither, start from the beginning; a finished run is returned as it is.
        overwrite: replace the run that the folder holds. A folder that holds anything else is left alone.
        callbacks: further Trainer callbacks, as a progress bar.
        command: how the run was started, for `metrics.json`.

    Raises:
        FastpeftError: something given cannot be used; then nothing was written. Or the loss or a gradient was not
            finite, the disk is full, memory is not enough, or a process was lost; then it says what is kept.
        KeyboardInterrupt: Ctrl-C, SIGTERM or SIGHUP came. The step under way was made and a checkpoint saved, from
            which `resume` leads to the bits of an uninterrupted run; a second one does not wait.

    Notes:
        Under a launcher (`torchrun`) all processes call this, on one file system, and share each batch in equal parts.
        A run goes on with any number of them that divides `batch_size`: the weights are those of one process to
        rounding, but for dropout.

    Example:
        >>> result = train(TrainConfig(output="runs/lora", method="lora"))  # doctest: +SKIP
        >>> result.metrics["accuracy"]  # doctest: +SKIP
    """
    folder, config = session.begun(config, callbacks, resume=resume, overwrite=overwrite)
    if resume and folder.finished and launched() == 1:  # several look first whether all see it
        return TrainResult(folder.path, session.found_finished(folder))
    with session.computing(config, folder if resume else None):
        session.tell_of_dtype(config)
        task = Task.load(config)  # rows as tokens, and the model with what its method trains
        session.tell_of_task(task, config)
        trainer = session.made_trainer(task, folder, callbacks, resume=resume)
        if trainer is None:
            return TrainResult(folder.path, session.found_finished(folder))
        before = session.measured_before(trainer, task, command)
        # from here on the folder is written to
        with session.under_way(trainer, task, resume=resume, overwrite=overwrite):
            session.fit(trainer, task, resume=resume)
            metrics = finish(trainer, task, before)
    session.tell_of_warnings(metrics)
    if trainer.stop.asked:
        raise KeyboardInterrupt(f"Interrupted while the run in {folder.path} was ending; it is finished.")
    return TrainResult(folder.path, metrics)
