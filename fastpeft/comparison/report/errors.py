"""The errors of variants: scores of classes, confusion matrices, and the dev rows on which variants differ."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from statistics import mean

import numpy as np

from fastpeft.comparison.report.document import Block, Heading, Table, Text
from fastpeft.comparison.report.results import Variant
from fastpeft.data.problems import ACCURACY
from fastpeft.errors import FastpeftError
from fastpeft.support.logs import at_least
from fastpeft.training.task import data_for

_CLASSES = 10  # the most classes of a matrix that is shown whole
_MOST_COLUMNS, _WORST = 6, 5  # classes that have a column each, and how many are named of more
_ROWS = 20  # the most dev rows, and pairs of classes, that are shown
_LETTERS = 300  # the most of a dev text


def classes(compared: Sequence[Variant]) -> Iterator[Block]:
    """F1 and recall of each class by each variant, the mean over seeds; of many classes those of the lowest F1."""
    rows, names = [], list(dict.fromkeys(name for variant in compared for name in _scores(variant)))
    if not names:
        return
    few = len(names) <= _MOST_COLUMNS
    for variant in compared:
        if found := _scores(variant):
            worst = sorted(found, key=lambda name: found[name])[:_WORST]
            texts = {name: f"{scores[0]:.3f} ({scores[1]:.3f})" for name, scores in found.items()}
            cells = [texts.get(name, "-") for name in names] if few else [f"{name} {texts[name]}" for name in worst]
            rows.append([variant.name, *cells])
    yield Heading("Scores by class")
    which = "" if few else f" Of {len(names)} classes, the {_WORST} of the lowest F1 of each variant."
    yield Text(f"F1 on the dev rows, with recall in brackets; means over seeds.{which}")
    header = names if few else [f"lowest F1, {place}" for place in range(1, _WORST + 1)]
    yield Table([["method", *header], *rows], caption="Scores by class")


def _scores(variant: Variant) -> dict[str, tuple[float, float]]:
    """F1 and recall of each class, the means over seeds."""
    runs = [found for run in variant.runs if (found := run.get("per_class"))]
    return {
        name: (mean(run[name]["f1"] for run in runs if name in run), mean(r[name]["recall"] for r in runs if name in r))
        for name in dict.fromkeys(name for run in runs for name in run)
    }


def matrices(compared: Sequence[Variant]) -> Iterator[Block]:
    """The confusion matrix of each variant, or of many classes the pairs that are confused most often."""
    found = {}
    for variant in compared:
        kept = [run for run in variant.runs if run.get("confusion_matrix") and run.get("per_class")]
        names = list(kept[0]["per_class"]) if kept else []
        square = (len(names), len(names))
        if kept and all(list(r["per_class"]) == names and np.shape(r["confusion_matrix"]) == square for r in kept):
            found[variant.name] = (names, np.sum([run["confusion_matrix"] for run in kept], axis=0))
    if not found:
        return
    yield Heading("Confusion matrices")
    if len(next(iter(found.values()))[0]) <= _CLASSES:
        yield Text("Rows are true labels of the dev rows, columns are predictions. Counts are sums over seeds.")
        for title, (names, counts) in found.items():
            rows = [[name, *(f"{count:,}" for count in row)] for name, row in zip(names, counts)]
            yield Table([["", *names], *rows], range(1, 1 + len(names)), title)
        return
    confused: dict[tuple[str, str], dict[str, int]] = {}
    for title, (names, counts) in found.items():
        for row, column in zip(*np.nonzero(counts * (1 - np.eye(len(names), dtype=int)))):
            confused.setdefault((names[row], names[column]), {})[title] = int(counts[row, column])
    most = sorted(confused, key=lambda pair: -sum(confused[pair].values()))[:_ROWS]
    yield Text(f"The {len(most)} of {len(confused):,} confused pairs of classes with the most errors, over all seeds.")
    rows = [[*pair, *(f"{confused[pair].get(title, 0)}" for title in found)] for pair in most]
    yield Table([["true label", "prediction", *found], *rows], range(2, 2 + len(found)), "Most frequent errors")


def disagreements(compared: Sequence[Variant]) -> Iterator[Block]:
    """The dev rows that some variants answer rightly and others do not, with their texts where these are known."""
    answered = [variant for variant in compared if variant.tested == ACCURACY]
    if len(answered) < 2:
        return
    labels = answered[0].labels
    answered = [variant for variant in answered if np.array_equal(variant.labels, labels)]
    right = np.stack([np.mean(list(variant.row_scores.values()), axis=0) for variant in answered])  # (variants, rows)
    split = np.ptp(right, axis=0)
    differ = np.flatnonzero(split)
    if not len(differ):
        return
    even = 1 - np.abs(2 * right.mean(0) - 1)  # 1 where half of the variants are right
    shown = sorted(differ, key=lambda row: (-split[row], -even[row], row))[:_ROWS]
    texts = _texts(answered[0], labels)
    names = next((list(run["per_class"]) for variant in answered for run in variant.runs if "per_class" in run), [])
    yield Heading("Rows on which variants differ")
    yield Text(
        f"On {len(differ):,} of {len(labels):,} dev rows some variants predict the true label and others do not; shown "
        f"are the {len(shown)} with the largest differences. ✓: right; ✗: wrong; with several seeds, how many of them "
        "are right."
        f"{'' if texts else ' The texts could not be loaded again, or have changed, so only row numbers are shown.'}"
    )
    rows = [["row", *(["text"] if texts else []), "label", *(variant.name for variant in answered)]]
    for row in shown:
        label = names[labels[row]] if 0 <= labels[row] < len(names) else str(labels[row])
        marks = [_mark([bool(scores[row]) for scores in variant.row_scores.values()]) for variant in answered]
        rows.append([f"{row + 1}", *([texts[row]] if texts else []), label, *marks])
    yield Table(rows, range(1), "Dev rows on which variants differ")


def _mark(right: Sequence[bool]) -> str:
    """Whether the seeds of a variant answer a row rightly."""
    return "✓" if all(right) else f"{sum(right)}/{len(right)}" if any(right) else "✗"


def _texts(variant: Variant, labels: np.ndarray) -> list[str]:
    """The dev texts of a comparison, shortened; none where they cannot be loaded, or are others by now."""
    # the runs have told what they load
    with suppress(FastpeftError, OSError), at_least("fastpeft.data", logging.ERROR):
        cell = variant.cells[0]
        data = data_for(cell.config)
        if np.array_equal(data.dev.labels, labels) and cell.folder.has_rows(data.fingerprint):
            texts = [text if isinstance(text, str) else " / ".join(text) for text in data.dev.texts]
            return [text if len(text) <= _LETTERS else f"{text[:_LETTERS]}…" for text in texts]
    return []
