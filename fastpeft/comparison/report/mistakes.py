"""The mistakes of variants: their confusion matrices, and the dev rows on which they differ."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress

import numpy as np

from fastpeft.comparison.report.document import Block, Heading, Matrix, Table, Text
from fastpeft.comparison.report.results import Variant
from fastpeft.data.problems import ACCURACY
from fastpeft.errors import FastpeftError
from fastpeft.support.logs import at_least
from fastpeft.training.task import data_for

_CLASSES = 10  # the most classes of a matrix that is shown whole
_ROWS = 20  # the most dev rows, and pairs of classes, that are shown
_LETTERS = 300  # the most of a dev text


def matrices(compared: Sequence[Variant]) -> Iterator[Block]:
    """The confusion matrix of each variant, or of many classes the pairs that are confused most often."""
    found = {}
    for index, variant in enumerate(compared):
        kept = [run for run in variant.runs if run.get("confusion_matrix") and run.get("per_class")]
        names = list(kept[0]["per_class"]) if kept else []
        square = (len(names), len(names))
        if kept and all(list(r["per_class"]) == names and np.shape(r["confusion_matrix"]) == square for r in kept):
            found[index] = (names, np.sum([run["confusion_matrix"] for run in kept], axis=0))
    if not found:
        return
    yield Heading("Confusion matrices")
    summed = " Counts are sums over seeds." if any(len(variant.runs) > 1 for variant in compared) else ""
    if len(next(iter(found.values()))[0]) <= _CLASSES:
        yield Text(f"Rows are true labels of the dev rows, columns are predictions.{summed}")
        for index, (names, counts) in found.items():
            yield Matrix(index, compared[index].name, names, counts.tolist())
        return
    confused: dict[tuple[str, str], dict[int, int]] = {}
    for index, (names, counts) in found.items():
        for row, column in zip(*np.nonzero(counts * (1 - np.eye(len(names), dtype=int)))):
            confused.setdefault((names[row], names[column]), {})[index] = int(counts[row, column])
    most = sorted(confused, key=lambda pair: -sum(confused[pair].values()))[:_ROWS]
    yield Text(f"The {len(most)} of {len(confused):,} confused pairs of classes with the most mistakes.{summed}")
    rows = [[*pair, *(f"{confused[pair].get(index, 0)}" for index in found)] for pair in most]
    header = ["true label", "prediction", *(compared[index].name for index in found)]
    yield Table([header, *rows], range(2, len(header)), "Most frequent mistakes")


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
        f"On {len(differ):,} of {len(labels):,} dev rows some variants predict the true label and others do not. "
        f"{f'Shown are the {len(shown)} with the largest differences. ' if len(shown) < len(differ) else ''}"
        "✓: right; ✗: wrong; with several seeds, how many of them are right."
        f"{'' if texts else ' The texts could not be loaded again, or have changed, so only row numbers are shown.'}"
    )
    header = ["row", *(["text"] if texts else []), "label", *(variant.name for variant in answered)]
    rows = []
    for row in shown:
        label = names[labels[row]] if 0 <= labels[row] < len(names) else str(labels[row])
        rows.append([f"{row + 1}", *([texts[row]] if texts else []), label])
        rows[-1] += [_mark([bool(right[row]) for right in variant.row_scores.values()]) for variant in answered]
    yield Table([header, *rows], range(1), "Dev rows on which variants differ")


def _mark(right: Sequence[bool]) -> str:
    """Whether the seeds of a variant answer a row rightly."""
    return "✓" if all(right) else f"{sum(right)}/{len(right)}" if any(right) else "✗"


def _texts(variant: Variant, labels: np.ndarray) -> list[str]:
    """The dev texts of a comparison, shortened; none where they cannot be loaded, or are others by now."""
    # the runs have told what they load
    with suppress(FastpeftError, OSError), at_least("fastpeft.data", logging.ERROR):
        cell = variant.cells[0]
        data = data_for(cell.config)
        dev = data.dev
        if np.array_equal(dev.labels, labels) and cell.folder.has_rows(data.fingerprint):
            texts = [text if isinstance(text, str) else " / ".join(text) for text in dev.texts]
            return [text if len(text) <= _LETTERS else f"{text[:_LETTERS]}…" for text in texts]
    return []
