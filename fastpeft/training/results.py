"""What a run's `metrics.json` says, in words: for model cards and for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastpeft.data.problems import TITLES, get_problem

SIMULATED = "simulated"  # as `metrics.json` calls where a peak comes from


def memory(metrics: Mapping[str, Any]) -> dict[str, str]:
    """The peaks of memory in a `metrics.json`: of a step and, where that is simulated, of the process as it was.

    The simulated one has tensors alone, as they would be on a card. On a CPU a process takes its libraries and what
    its allocator keeps beside them.
    """
    peak, source, resident = metrics["peak_memory_mb"], metrics["peak_memory_source"], metrics.get("peak_rss_mb")
    what = f"{source}: tensors only" if source == SIMULATED else source
    shown = {"peak memory of a step": "-" if peak is None else f"{peak:,.0f} MB ({what})"}
    if source == SIMULATED and resident:
        shown["peak resident memory"] = f"{resident:,.0f} MB (the whole process)"
    return shown


def results(metrics: Mapping[str, Any]) -> dict[str, str]:
    """What a card shows of the values of a `metrics.json`."""
    problem = get_problem(metrics["problem_type"])
    return {
        **{TITLES[name]: f"{metrics[name]:.3f}" for name in problem.metrics},
        f"{TITLES[problem.primary]} before training": f"{metrics[f'{problem.primary}_before']:.3f}",
        **memory(metrics),
        "trained parameters": f"{metrics['trainable_parameters']:,} of {metrics['parameters']:,}",
    }


def chosen_by(metrics: Mapping[str, Any]) -> str | None:
    """The metric by which the checkpoint of a `metrics.json` was chosen, in words; None where it is the last."""
    name = metrics["metric"]
    return None if metrics["best_step"] is None else TITLES.get(name, name)


def found_settings(found: Mapping[str, Any]) -> dict[str, str]:
    """What a card shows of a prompt that was found, as `run.json` holds it."""
    words = ", ".join(f"{label}={word}" for label, word in (found["label_words"] or {}).items())
    search = (
        f"the best of {found['templates']} templates on {found['rows']} and {found['ranked_rows']} training rows, "
        f"accuracy {found['accuracy']:.3f} with no training"
    )
    return {"prompt": found["template"], **({"label_words": words} if words else {}), "prompt found": search}
