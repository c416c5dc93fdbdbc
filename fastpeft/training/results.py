"""What a run's `metrics.json` says, in words: for model cards and for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastpeft.data.names import DEMO
from fastpeft.data.problems import MULTI_LABEL, TAGGING, TITLES, Problem, get_problem, title_of
from fastpeft.training.config import TrainConfig

_MOST_ROWS, _WORST = 10, 5  # classes that are all shown, and how many are of more
_ON_THE_CARD = (  # fields of a `TrainConfig`
    *("objective", "problem_type", "class_weights", "metric", "patience"),
    *("prompt", "label_words", "prompt_head", "init_from"),
    *("targets", "rank", "window", "reduction", "batch_size", "seed", "dtype", "bf16"),
)
SIMULATED = "simulated"  # as `metrics.json` calls where a peak comes from


def card_fields(
    config: TrainConfig, metrics: Mapping[str, Any], recipe: Mapping[str, Any], *, measured: bool = True
) -> dict[str, Any]:
    """What the card of a run tells of it, as arguments of `model_card`.

    Args:
        config: its configuration.
        metrics: its `metrics.json`.
        recipe: rates and schedule, the first of its settings.
        measured: whether the weights are those that the metrics are of, not some from within the run.
    """
    return {
        "base_model": config.model,
        "on_hub": config.model != DEMO,
        "labels": metrics["labels"],
        "labels_are": get_problem(metrics["problem_type"]).labels,
        "answers": _answers_in_words(get_problem(metrics["problem_type"])),
        "chosen_by": title_of(metrics["metric"]) if measured and metrics["best_step"] is not None else None,
        "metrics": _results(metrics) if measured else None,
        "settings": {**recipe, "max_length": metrics["max_length"], **_settings(config)},
    }


def memory(metrics: Mapping[str, Any]) -> dict[str, str]:
    """The peaks of memory in a `metrics.json`: of a step and, where that is simulated, of the process as it was.

    The simulated one has tensors alone, as they would be on a GPU. On a CPU a process takes its libraries and what
    its allocator keeps beside them.
    """
    peak, source, resident = metrics["peak_memory_mb"], metrics["peak_memory_source"], metrics.get("peak_rss_mb")
    what = f"{source}: tensors only" if source == SIMULATED else source
    shown = {"peak memory of a step": "-" if peak is None else f"{peak:,.0f} MB ({what})"}
    if source == SIMULATED and resident:
        shown["peak resident memory"] = f"{resident:,.0f} MB (the whole process)"
    return shown


def baseline(always: Mapping[str, Any]) -> str:
    """The title of the row with the metrics of always answering the most frequent class, tag or labels."""
    return f"baseline: most frequent {'tag' if 'word_f1' in always else 'labels' if 'micro_f1' in always else 'class'}"


def _results(metrics: Mapping[str, Any]) -> dict[str, str]:
    """What a card shows of the values of a `metrics.json`."""
    problem = get_problem(metrics["problem_type"])
    title, always = TITLES[problem.primary], metrics.get("most_frequent_class", {})
    shown = {TITLES[name]: f"{metrics[name]:.3f}" for name in problem.metrics}
    shown[f"{title} before training"] = f"{metrics[f'{problem.primary}_before']:.3f}"
    if problem.primary in always:
        shown[f"{title} of always answering {always['class']}"] = f"{always[problem.primary]:.3f}"
    parameters = f"{metrics['trainable_parameters']:,} of {metrics['parameters']:,}"
    return {**shown, **memory(metrics), "trainable parameters": parameters}


def _answers_in_words(problem: Problem) -> str | None:
    """How answers follow from the model's outputs, for a card; None where the most likely class is the answer."""
    if problem is TAGGING:
        return 'a word has the tag of its first token, as a pipeline says it with aggregation_strategy="first"'
    if problem is MULTI_LABEL:
        return "every label whose probability, the sigmoid of its logit, is above 0.5"
    return None


def class_scores(metrics: Mapping[str, Any]) -> dict[str, str]:
    """F1, precision and recall of each class in a `metrics.json`, and of how many rows or words it is the label.

    Of many classes those of the lowest F1.
    """
    known = metrics.get("per_class", {})
    shown = sorted(known, key=lambda name: known[name]["f1"])[:_WORST] if len(known) > _MOST_ROWS else list(known)
    rows = {
        f"F1 of {name} (support {(found := known[name])['support']:,})": f"{found['f1']:.3f}, "
        f"precision {found['precision']:.3f}, recall {found['recall']:.3f}"
        for name in shown
    }
    if len(shown) < len(known):
        rows["all classes"] = f"{len(known):,}, of which these have the lowest F1"
    return rows


def _settings(config: TrainConfig) -> dict[str, Any]:
    """What a card shows of a run's configuration; of a prompt that was found, what it is and how it was found."""
    shown = {name: value for name, value in config.values().items() if name in _ON_THE_CARD and value is not None}
    if (found := config.found_prompt) is not None:
        shown["prompt"] = found["template"]
        if found["label_words"]:
            shown["label_words"] = ", ".join(f"{label}={word}" for label, word in found["label_words"].items())
        shown["prompt found"] = (
            f"the best of {found['templates']} templates on {found['rows']} and {found['ranked_rows']} training rows, "
            f"zero-shot accuracy {found['accuracy']:.3f}"
        )
    return {**shown, **config.settings}
