"""What a person is told of a run before it trains, while there is time to stop, and of its result."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from fastpeft.data import result_warnings
from fastpeft.data.examples import labels_in_words
from fastpeft.data.names import DEMO
from fastpeft.models import is_stored_in_bfloat16
from fastpeft.ops.backends import warn_if_not_compiled
from fastpeft.support.launcher import is_first, jobs, launched
from fastpeft.support.processor import has_bfloat16
from fastpeft.training.config import TrainConfig
from fastpeft.training.outcome import of_classes
from fastpeft.training.setup import training_device
from fastpeft.training.task import Task

logger = logging.getLogger(__name__)


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
