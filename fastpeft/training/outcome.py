"""The result of a run: measured, described, and written into its folder."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastpeft.data import result_warnings
from fastpeft.data.examples import count_labels
from fastpeft.data.names import LOSS
from fastpeft.data.problems import (
    CLASSIFICATION,
    MASKED_WORDS,
    NEXT_WORDS,
    best_of,
    describe,
    most_frequent,
    title_of,
)
from fastpeft.models import resolve_model
from fastpeft.ops.quantise import count_parameters
from fastpeft.prompts.model import inside_prompt
from fastpeft.prompts.template import is_of_decoder
from fastpeft.support import files
from fastpeft.support.environment import device_name, versions
from fastpeft.support.launcher import jobs
from fastpeft.support.model_card import model_card
from fastpeft.support.stages import report
from fastpeft.training.arguments import compute_dtype, recipe_used
from fastpeft.training.curves import draw_curves
from fastpeft.training.estimates import simulated_peak_mb
from fastpeft.training.generation import tell_ends
from fastpeft.training.memory import MEBIBYTE, peak_rss_mb
from fastpeft.training.results import SIMULATED, card_fields
from fastpeft.training.run_folder import CURVES, PREDICTIONS, ROW_SCORES, TRAINED_ON, RunFolder
from fastpeft.training.task import Task
from fastpeft.training.trainer import RunTrainer

logger = logging.getLogger(__name__)

Points = list[tuple[int, float]]  # steps and values


@dataclass(frozen=True)
class Beginning:
    """What is known of a run before it trains: the scores of its dev rows, and their loss that training lowers.

    `trained_on` are digests of the texts that it, and what it starts from, trains on; `command` is how it was started.
    """

    scores: Mapping[str, float]
    lowered: float
    trained_on: Set[str]
    command: str


@dataclass(frozen=True)
class _Measured:
    """What dev rows measured after training.

    Attributes:
        chosen: the step whose weights were kept as the best; None: the last weights are.
        points: by name, what they measured before, during and after training.
    """

    chosen: int | None
    scores: dict[str, float]
    outputs: np.ndarray
    labels: np.ndarray
    points: dict[str, Points]


def finish(trainer: RunTrainer, task: Task, before: Beginning) -> dict[str, Any]:
    """Measure the result and write it; what `metrics.json` then holds."""
    trainer.check_same()
    data, after = task.data, _measure(trainer, task, before)
    frequent = most_frequent(data.train.labels, data.problem)
    metrics = {
        **_metrics(trainer, task, before, after),
        **describe(data.problem, after.outputs, after.labels, data.labels, frequent),
        "warnings": _warnings(trainer, task, before, after),
    }
    report("saving")
    trainer.ranks.first_does(lambda: _write(trainer, task, before, after, metrics))
    return metrics


def _measure(trainer: RunTrainer, task: Task, before: Beginning) -> _Measured:
    """Measure the dev rows, with the weights that are to be kept."""
    chosen = _take_best(trainer, task)
    # before anything is measured again, which is logged too
    points = {
        name: [(0, before.scores[name]), *trainer.points(f"eval_{name}")] for name in dict.fromkeys((task.metric, LOSS))
    }
    scores = trainer.measure(task.dev_rows)
    if chosen is None:
        for name, curve in points.items():
            curve.append((trainer.state.global_step, scores[name]))
    return _Measured(chosen, scores, *trainer.answers(), points)


def _take_best(trainer: RunTrainer, task: Task) -> int | None:
    """Give the model the weights of its best checkpoint, where one is to be chosen, and tell its step."""
    if task.config.metric is None:
        return None
    best = best_of(trainer.points(f"eval_{task.metric}"), task.metric)
    logger.info("the best checkpoint by %s is that of step %d", task.metric, best)
    if best != trainer.state.global_step:
        task.method.load_checkpoint(trainer.model, trainer.folder.checkpoint(best))
    return best


def _metrics(trainer: RunTrainer, task: Task, before: Beginning, after: _Measured) -> dict[str, Any]:
    """What `metrics.json` holds."""
    config, seconds = task.config, trainer.clock.seconds
    problem, cache = task.data.problem, getattr(inside_prompt(trainer.model), "feature_cache", None)
    trainable, total = count_parameters(trainer.model)
    return {
        "method": config.method,
        "model": config.model,
        "data": config.data,
        "problem_type": problem.name,
        "labels": task.data.labels,
        "pairs": task.data.train.is_pair,
        "conversations": task.data.train.are_conversations,
        "columns": task.data.columns and list(task.data.columns.named),
        "max_length": task.max_length,
        **after.scores,
        f"{problem.primary}_before": before.scores[problem.primary],
        "samples_per_second": round(trainer.samples_seen / seconds, 2) if seconds else None,
        "train_seconds": round(seconds, 2),
        "steps": trainer.state.global_step,
        "processes": trainer.ranks.size,
        "found_prompt": config.found_prompt,
        "metric": config.metric,
        "best_step": after.chosen,
        "train_rows": task.num_train_texts,
        "dev_rows": len(task.dev_rows),
        "trainable_parameters": trainable,
        "parameters": total,
        **_memory(trainer, task),
        "feature_cache": None if cache is None else {"hits": cache.hits, "misses": cache.misses},
        "learning_rate": trainer.args.learning_rate,
        "head_learning_rate": task.head_learning_rate,
        "compute_dtype": compute_dtype(trainer.args),
        "seed": config.seed,
        "device": device_name(trainer.args.device),
        "threads": torch.get_num_threads(),
        "jobs": jobs(),
        "versions": versions(),
        "command": before.command,
    }


def _memory(trainer: RunTrainer, task: Task) -> dict[str, Any]:
    """What `metrics.json` holds of memory: the peak of a step, the estimate of it, and the peak of the process."""
    report("simulating memory")
    on_cuda, longest = trainer.args.device.type == "cuda", max(trainer.order.lengths)
    estimate = peak = simulated_peak_mb(task, trainer.args, longest)
    if on_cuda:
        peak = round(trainer.cuda_peak.nbytes / MEBIBYTE, 1)
    elif trainer.longest_seen not in (0, longest) and trainer.clock.steps == trainer.state.global_step:
        # every batch was seen: those before a run was resumed are not known
        peak = simulated_peak_mb(task, trainer.args, trainer.longest_seen)
    return {
        "peak_memory_mb": peak,
        "estimated_memory_mb": estimate,
        "peak_memory_source": "CUDA allocator" if on_cuda else SIMULATED,
        "peak_rss_mb": peak_rss_mb(),
    }


def _warnings(trainer: RunTrainer, task: Task, before: Beginning, after: _Measured) -> list[str]:
    """What makes these figures doubtful."""
    data = task.data
    return [
        *result_warnings.of_dev_rows(
            data.problem, data.dev.texts, before.trained_on, after.outputs, after.labels, data.labels
        ),
        *of_classes(task),
        *task.warnings,
        *trainer.warnings_of_head(),
        *result_warnings.of_training_loss(
            trainer.points("loss"), before.lowered, over_and_over=data.problem is not NEXT_WORDS
        ),
    ]


def of_classes(task: Task) -> list[str]:
    """Warnings about the names of classes or labels, and about those that no training row has."""
    problem, names = task.data.problem, task.data.labels
    absent = result_warnings.of_train_rows(problem, count_labels(task.data), names)
    return [*absent, *result_warnings.of_names(problem, names)]


def _write(trainer: RunTrainer, task: Task, before: Beginning, after: _Measured, metrics: Mapping[str, Any]) -> None:
    """Write the result into its folder, which marks the run as finished."""
    config, problem, folder = task.config, task.data.problem, trainer.folder
    staged = folder.staging / "result"
    kind = "weighted" if config.class_weights else ("smoothed" if trainer.args.label_smoothing_factor else "")
    loss_title = f"{kind} training loss".strip()  # one of another kind is not to be compared
    losses = trainer.points("loss")
    curves = {loss_title: losses, **{f"dev {name}": curve for name, curve in after.points.items()}}
    with folder.saving("the result"):
        save_model(trainer, task, staged)
        files.write_text(staged / "README.md", _card(task, metrics, folder, recipe_used(task, trainer.args)))
        files.write_json(staged / CURVES, curves)
        files.write_text(staged / TRAINED_ON, "".join(f"{text}\n" for text in sorted(before.trained_on)))
        if problem is CLASSIFICATION:
            predictions = {
                "labels": task.data.dev.labels,
                "predictions": trainer.classes(task.dev_rows),
            }
            files.write_json(staged / PREDICTIONS, predictions)
        elif problem.tested is not None:
            above, below = zip(*trainer.parts(task.dev_rows))
            files.write_json(staged / ROW_SCORES, {"metric": problem.tested, "above": above, "below": below})
        title, shown = f"{task.method.title} on {config.data}", title_of(task.metric)
        draw_curves(staged / "curves.png", title, losses, after.points[task.metric], loss_title, shown)
        folder.close(metrics, staged)


def save_model(trainer: RunTrainer, task: Task, folder: Path) -> None:
    """Write adapter or model, and the tokenizer, as `from_pretrained` reads them, and the prompt."""
    if task.data.problem is NEXT_WORDS:
        tell_ends(trainer.model, trainer.processing_class, chats=task.data.train.are_conversations)
    trainer.model.save_pretrained(folder)
    trainer.processing_class.save_pretrained(folder)
    if task.setup.prompt is not None:
        task.setup.prompt.save(folder)


def _card(task: Task, metrics: Mapping[str, Any], folder: RunFolder, recipe: Mapping[str, Any]) -> str:
    """The model card of the run."""
    config, problem, prompt = task.config, task.data.problem, task.setup.prompt
    return model_card(
        method=task.method.title,
        snippet=task.method.loading_snippet(
            str(folder.path),
            chained=config.init_from is not None or config.in_bfloat16,
            base_model=resolve_model(config.model),
            task_type=problem.task_type,
            labels=task.data.labels,
            problem_type=problem.name,
            prompt_head=None if prompt is None else prompt.head,
            masked_words=problem is MASKED_WORDS,
            decoder=is_of_decoder(task.tokenizer),
            tokenizer=True,
        ),
        library=task.method.library,
        data=task.data.description,
        **card_fields(config, metrics, recipe),
    )
