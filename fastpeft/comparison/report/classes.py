"""The section of a report with the scores of each class, tag or label."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import mean
from typing import Any

from fastpeft.comparison.report.document import Block, Heading, Table, Text
from fastpeft.comparison.report.results import Variant

_MOST_COLUMNS, _WORST = 6, 5  # classes that have a column each, and how many are named of more


def report(compared: Sequence[Variant]) -> Iterator[Block]:
    """F1 and recall of each class by each variant, the mean over seeds; of many classes those of the lowest F1."""
    known = {variant.name: found for variant in compared if (found := _scores(variant))}
    names = list(dict.fromkeys(name for found in known.values() for name in found))
    if not names:
        return
    yield Heading("Scores by class")
    of = "F1 on the dev rows, with recall in brackets; means over seeds."
    if len(names) <= _MOST_COLUMNS:
        support = [next(found[name][2] for found in known.values() if name in found) for name in names]
        yield Text(f"{of} The number beside a class is its support: how many dev labels it has.")
        header = [f"{name} ({rows:,.0f})" for name, rows in zip(names, support)]
        rows = [[_show(found.get(name)) for name in names] for found in known.values()]
    else:
        yield Text(f"{of} Of {len(names)} classes, the {_WORST} of the lowest F1 of each variant.")
        header = [f"lowest F1, {place}" for place in range(1, _WORST + 1)]
        worst = [sorted(found.items(), key=lambda item: item[1])[:_WORST] for found in known.values()]
        rows = [[f"{name} {_show(scores)}" for name, scores in found] for found in worst]
    yield Table([["method", *header], *([name, *row] for name, row in zip(known, rows))], caption="Scores by class")


def _scores(variant: Variant) -> dict[str, tuple[float, ...]]:
    """Of each class F1, recall and support, the means over seeds."""
    runs: list[dict[str, Any]] = [found for run in variant.runs if (found := run.get("per_class"))]
    keys = ("f1", "recall", "support")
    return {
        name: tuple(mean(run[name][key] for run in runs if name in run) for key in keys)
        for name in dict.fromkeys(name for run in runs for name in run)
    }


def _show(scores: tuple[float, ...] | None) -> str:
    return "-" if scores is None else f"{scores[0]:.3f} ({scores[1]:.3f})"
