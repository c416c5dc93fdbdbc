"""A run under way: how it computes, what holds its folder, where it goes on, what stops it, what a person is told."""

from __future__ import annotations

import dataclasses
import logging
import os
import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from transformers import TrainerCallback, set_seed

from fastpeft.data import result_warnings
from fastpeft.data.examples import labels_in_words
from fastpeft.data.names import DEMO, LOSS
from fastpeft.errors import (
    FastpeftError,
    LostProcessError,
    NotEnoughMemoryError,
    NotFiniteError,
    first_line,
    is_out_of_memory,
)
from fastpeft.mezo.journal import Journal
from fastpeft.models import is_stored_in_bfloat16
from fastpeft.ops import dispatch
from fastpeft.ops.backends import warn_if_not_compiled
from fastpeft.prompts.model import inside_prompt
from fastpeft.support import files
from fastpeft.support.interrupts import noting_stops
from fastpeft.support.launcher import is_first, jobs, launched
from fastpeft.support.nonfinite import is_finite
from fastpeft.support.processes import Ranks, noticing_lost_processes
from fastpeft.support.processor import has_bfloat16
from fastpeft.training.arguments import noticing_lack_of_memory, recipe_used, refusing, shortness, training_arguments
from fastpeft.training.config import TrainConfig, check_config
from fastpeft.training.lineage import check_output, earlier_run
from fastpeft.training.outcome import Beginning, of_classes, save_model
from fastpeft.training.run_folder import JOURNAL, RunFolder, check_whole, model_fingerprint
from fastpeft.training.setup import training_device
from fastpeft.training.task import Task
from fastpeft.training.trainer import RunTrainer, trainer_class

logger = logging.getLogger(__name__)

_NOTICE = "interrupted: the run ends after this step, with a checkpoint; a second Ctrl-C ends it at once"


def begun(
    config: TrainConfig, callbacks: Sequence[TrainerCallback], *, resume: bool, overwrite: bool
) -> tuple[RunFolder, TrainConfig]:
    """The folder of a run, which may write there, and its configuration; one to resume has what it found out before."""
    check_config(config)
    if isinstance(callbacks, TrainerCallback | type):
        raise FastpeftError("callbacks is one callback. Give a list of them.")
    folder = RunFolder(config.output)
    check_output(folder, config.values(), resume=resume, overwrite=overwrite)
    if not resume:
        return folder, config
    if not folder.started:
        logger.info("there is no run in %s to resume; it starts from the beginning", folder.path)
        return folder, config
    if not (folder.finished or folder.newest_checkpoint() or folder.journal.exists()):
        logger.info("the run in %s has no checkpoint yet; it starts from the beginning", folder.path)
    missing = {name: value for name, value in folder.found().items() if getattr(config, name) is None}
    return folder, dataclasses.replace(config, **missing)


def found_finished(folder: RunFolder) -> dict[str, Any]:
    """The metrics of a run that was finished before."""
    logger.info("the run in %s is finished; nothing to do", folder.path)
    folder.clear_lock()
    return folder.metrics()


@contextmanager
def computing(config: TrainConfig, resumed: RunFolder | None) -> Iterator[None]:
    """Run the block with what decides its bits: deterministic kernels if wanted, and the choices of a resumed run."""
    dispatch.take_over({} if resumed is None else resumed.choices())
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


def made_trainer(
    task: Task, folder: RunFolder, callbacks: Sequence[TrainerCallback], *, resume: bool
) -> RunTrainer | None:
    """The Trainer of a run, which has written nothing yet; None where the run to resume is finished."""
    config = task.config
    if resume and folder.started:
        folder.check_rows(task.data.fingerprint)
    if config.cache_features is not None:
        inside_prompt(task.model).cache_features(config.cache_features)
    with tempfile.TemporaryDirectory() as elsewhere:  # a Trainer makes its folder before it has looked at all else
        arguments = training_arguments(task, elsewhere)
        if (ranks := Ranks()).size > 1:
            ranks.check_same({**config.values(), **_on_disk(task, folder)})
        if resume and folder.finished:
            return None
        if is_first() and (warning := shortness(task, arguments)):
            logger.warning("%s", warning)
        with refusing(task), noticing_lost_processes(), noticing_lack_of_memory(task):
            trainer = trainer_class(task)(task, arguments, folder, callbacks)
            trainer.create_optimizer()
    trainer.args.output_dir = str(folder.staging)
    return trainer


def _on_disk(task: Task, folder: RunFolder) -> dict[str, Any]:
    """What a process reads that another machine may have otherwise on its disk, by the name in a message."""
    start = task.config.init_from
    return {
        "the rows of `data`": task.data.fingerprint,
        "the weights of `model`": model_fingerprint(task.config.model),
        "the weights of `init_from`": start and earlier_run(start).fingerprint(),
        "what `output` holds, a folder that all must share": [
            file.name for file in (*folder.all_checkpoints(), folder.journal, folder.metrics_file) if file.exists()
        ],
    }


def measured_before(trainer: RunTrainer, task: Task, command: str | None) -> Beginning:
    """What the dev rows measure before the first step, and how the run was started."""
    with refusing(task), noticing_lost_processes(), noticing_lack_of_memory(task):
        measured = trainer.measure(task.dev_rows)
    again = shlex.join(["fastpeft", "train", "--config", str(trainer.folder.config_file)])
    return Beginning(measured, trainer.lowered(measured[LOSS]), task.trained_on, command or again)


@contextmanager
def under_way(trainer: RunTrainer, task: Task, *, resume: bool, overwrite: bool) -> Iterator[None]:
    """Run the block with the run's folder open and held; what ends it from outside also says how to go on."""
    folder = trainer.folder
    with ExitStack() as held:

        def open_folder() -> None:
            values = task.config.values()
            held.enter_context(folder.held())
            check_output(folder, values, resume=resume, overwrite=overwrite)  # another run may have ended there since
            folder.open(values, task.data.fingerprint, overwrite=overwrite, recipe=recipe_used(task, trainer.args))

        trainer.ranks.first_does(open_folder)
        if task.config.report_to is not None:
            with refusing(task):
                trainer.begin_reports(task.config.report_to)
        with (
            _telling_how_to_go_on(folder),
            noting_stops(trainer.stop, _NOTICE),
            noticing_lost_processes(),
            noticing_lack_of_memory(task),
        ):
            yield


def fit(trainer: RunTrainer, task: Task, *, resume: bool) -> None:
    """Train, with `resume` from where the run has come to; of one that cannot go on, keep the last good weights."""
    folder = trainer.folder
    journal = Journal.open(folder.journal) if resume and folder.journal.exists() else None
    checkpoint = folder.newest_checkpoint(None if journal is None else journal.steps) if resume else None
    start: str | bool | None = None if checkpoint is None else str(checkpoint)
    if journal is not None:
        start = True  # the last step in the journal, which leads there from the checkpoint or from the first weights
        logger.info("continuing from %s", folder.journal)
    elif checkpoint is not None:
        check_whole(checkpoint)
        logger.info("continuing from %s", checkpoint)
    try:
        if checkpoint is not None and not (checkpoint / JOURNAL).exists():  # in place of the weights
            task.method.resume(trainer.model, checkpoint)
        set_seed(task.config.seed)  # dropout starts alike whatever was computed before
        with noticing_lost_processes():
            trainer.train(resume_from_checkpoint=start)
    except NotFiniteError as error:
        raise NotFiniteError(f"{error} {_keep_last_good(trainer, task)}") from None
    except FastpeftError:
        raise
    except Exception as error:
        if checkpoint is None or trainer.samples_seen or is_out_of_memory(error):
            raise
        # a broken file surfaces as almost any type
        raise FastpeftError(
            f"cannot go on from {checkpoint}: {first_line(error)} Delete that folder to go on from what is before it, "
            "or train anew with --overwrite."
        ) from error
    if trainer.stopping.stopped:
        raise KeyboardInterrupt


@contextmanager
def _telling_how_to_go_on(folder: RunFolder) -> Iterator[None]:
    """Run the block; what ends it from outside, with a checkpoint kept, also says how to go on."""
    try:
        yield
    except LostProcessError as error:
        raise LostProcessError(f"{error} {folder.going_on()}") from error
    except NotEnoughMemoryError as error:
        raise NotEnoughMemoryError(
            f"{error.args[0]} A run that has begun keeps its options: give others with --overwrite, or go on where "
            f"there is more memory. {folder.going_on()}"
        ) from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"Interrupted. {folder.going_on()}") from None


def _keep_last_good(trainer: RunTrainer, task: Task) -> str:
    """Save the weights before a step that failed, and say where."""
    folder = trainer.folder
    saved = folder.newest_in_words()
    if not all(map(is_finite, trainer.model.parameters())):
        return f"The weights before that step were no longer finite. {saved}"
    staged, target = folder.staging / "last-good", folder.path / "last-good"
    kept = "The weights before that step"
    if task.config.optimizer_in_backward:
        kept = "The weights, of which those with the first gradients may have made that step,"
    if trainer.ranks.is_first:
        with folder.saving("the weights before that step"):
            save_model(trainer, task, staged)
            files.discard(target, folder.staging)
            files.publish(staged, target)
    return f"{kept} are in {target}. {saved}"


# -- what a person is told --------------------------------------------------------------------------------------------


def tell_of_task(task: Task, given: TrainConfig) -> None:
    """Tell while there is time to stop what the run learns, and what will make its figures doubtful."""
    tell_of_precision(given, task.config)
    if task.data.problem.has_classes:
        logger.info("%s", labels_in_words(task.data))
    if is_first():
        tell_of_beginnings(task.config)
        for warning in (*result_warnings.seen_rows(task.data.dev.texts, task.trained_on), *of_classes(task)):
            logger.warning("%s", warning)


def tell_of_dtype(config: TrainConfig) -> None:
    """Tell of a model that will take twice its file's memory, before it is loaded."""
    if config.dtype is None and not config.why_not_in_bfloat16 and is_stored_in_bfloat16(config.model):
        logger.info(
            "the model is stored in bfloat16 and loaded in float32; --dtype bfloat16 (in Python dtype='bfloat16') "
            "keeps its weights as they are, in half the memory"
        )


def tell_of_precision(given: TrainConfig, resolved: TrainConfig) -> None:
    """Tell what is computed in bfloat16 though nobody asked for it, or though it is slow here."""
    if given.bf16 is None and resolved.bf16 and not given.in_bfloat16:
        logger.info("computing in bfloat16, which this CPU supports; --no-bf16 (in Python bf16=False) turns it off")
    in_bfloat16 = resolved.bf16 or resolved.settings.get("backbone_dtype") == "bfloat16"
    device = training_device(resolved.settings)
    if in_bfloat16 and device == "cpu" and not has_bfloat16():
        logger.warning(
            "this CPU has no bfloat16 instructions: frozen layers compute in float32, and trained layers take several "
            "times as long as in float32"
        )
    if in_bfloat16 and device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        logger.warning(
            "this GPU has no bfloat16 instructions and emulates them slowly: float32 is faster (leave out --bf16, "
            "--dtype and backbone_dtype), and float16 where the method takes it (--set fp16=true)"
        )


def tell_of_beginnings(config: TrainConfig) -> None:
    """Tell of a model that nobody may have meant, and of an installation without the compiled operations."""
    if config.model == DEMO and config.data != DEMO:
        logger.info("the model is %r, the bundled one, which is small and for trying out; --model names another", DEMO)
    if (gpus := torch.cuda.device_count()) > 1 and launched() == jobs() == 1:
        logger.info("a process trains on one of the %d GPUs; torchrun --nproc-per-node=%d takes all", gpus, gpus)
    warn_if_not_compiled()


def tell_of_warnings(metrics: Mapping[str, Any]) -> None:
    """Tell what makes the figures of a result doubtful."""
    if is_first():
        result_warnings.tell(metrics["warnings"])
