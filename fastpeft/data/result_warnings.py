"""What makes the figures of a run say less than they seem to, each in one sentence: `warnings` of `metrics.json`."""

from __future__ import annotations

import logging
import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence, Set
from itertools import pairwise
from statistics import mean, median
from typing import TYPE_CHECKING, Any

from fastpeft.data.names import OUTSIDE, UNLABELLED
from fastpeft.data.problems import MULTI_LABEL, REGRESSION, TAGGING, Problem
from fastpeft.data.splitting import digest

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)

_FEW_ROWS = 100
_SHOWN = 5  # names in a sentence
_FEWEST_POINTS = 10  # of a loss curve that is judged
_CERTAIN = 2.0  # standard errors
_ABSENT = ("nan", "NaN", "<NA>", "NA", "N/A", "n/a", "NULL", "null", "None")  # as csv files have what is missing
_FALL = 0.1  # of the training loss in a fifth of the steps
_LEARNED = 0.2  # of the first training loss
_GROSS = 2.0  # times the loss before training


def of_dev_rows(
    problem: Problem,
    texts: Sequence[Any],
    trained_on: Set[str],
    outputs: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
) -> list[str]:
    """Warnings about the rows that were measured, and about the answers to them.

    `trained_on` are digests of the texts that the run was trained on.
    """
    found = seen_rows(texts, trained_on)
    if len(texts) < _FEW_ROWS:
        rows = "rows were" if len(texts) > 1 else "row was"
        found.append(
            f"Only {len(texts)} {rows} evaluated, so the metrics are rough; use at least {_FEW_ROWS} to tell one "
            "result from another."
        )
    if problem.has_classes:
        found += _never_told(problem, outputs, labels, names)
    elif problem is REGRESSION:
        found += _far_off(outputs, labels)
    words = sum(map(len, texts)) if problem.per_token and not problem.of_texts_alone else 0
    if left := words and words - int((labels != UNLABELLED).sum()):
        found.append(
            f"{left} of {words} words have no token within the maximum length, or none at all, so the metrics leave "
            "them out. Do not compare these metrics with those of runs that leave out other words."
        )
    return found


def _far_off(outputs: np.ndarray, labels: np.ndarray) -> list[str]:
    """Whether predicted numbers are further from those of the rows than the mean of the rows is, by squared errors.

    In few rows chance alone may have it so: nothing is said within two standard errors.
    """
    exact = labels.astype("float64")
    errors, of_mean = (outputs[:, 0].astype("float64") - exact) ** 2, (exact - exact.mean()) ** 2
    if not 0 < of_mean.mean() < errors.mean():
        return []
    further = errors - of_mean
    if further.mean() < _CERTAIN * further.std(ddof=1) / len(exact) ** 0.5:
        return []
    return [
        f"The mean squared error, {errors.mean():.3g}, is above the {of_mean.mean():.3g} that always answering the "
        "mean of these rows has, so do not use the values. Train longer; numbers are learned as they are, so if they "
        "are far from 0, first shift and divide the column so that most lie between -1 and 1."
    ]


def of_train_rows(problem: Problem, counts: Sequence[tuple[int, int]], names: Sequence[str]) -> list[str]:
    """Which classes or labels no training row has, given the training and dev rows of each."""
    missing = [name for name, (rows, _) in zip(names, counts) if not rows]
    if not missing:
        return []
    return [f"No training row has these {problem.labels}, so the model cannot learn them: {_some(missing)}."]


def of_names(problem: Problem, names: Sequence[str]) -> list[str]:
    """Which classes or labels look like one, or like none; and whether tags of entities lack that of other words."""
    known = Counter(map(_look, names))
    alike = sorted((name for name in names if known[_look(name)] > 1), key=_look)
    found = []
    if alike:
        cases = len({*map(str.casefold, alike)}) == len({*map(_look, alike)})
        how = "upper and lower case" if cases else "case, spaces or the codes of letters"
        found = [
            f"These {problem.labels} differ only in {how}, and are trained as different {problem.labels}: "
            f"{_some(alike, repr if cases else ascii)}. If they mean the same, spell them the same way in the data."
        ]
    # -1 is a class beside 1, or beside 0 and 1, but marks rows without one beside 0, 1, 2, ... in data sets of the hub
    absent = [name for name in names if name in _ABSENT or (name == "-1" and names[1:4] == ["0", "1", "2"])]
    if absent:
        found.append(
            f"These {problem.labels} are what programs write where a value is missing: {_some(absent)}. They are "
            "trained as others; if they mean no label, remove their rows."
        )
    begins = {"B", "I"} <= {*names} or any(name.startswith(("B-", "I-")) for name in names)
    of_entities = begins or all(map(str.isdecimal, names))
    if problem is TAGGING and of_entities and OUTSIDE not in names:
        found.append(
            f"No tag is {OUTSIDE!r}, so word F1 and entity F1 count words outside all entities as entities too. If "
            f"there are such words, write their tag as {OUTSIDE}; for numbers, write the names."
        )
    return found


def _look(name: str) -> str:
    """What names have in common that look the same, whatever their case: without signs that nobody sees."""
    seen = "".join(sign for sign in unicodedata.normalize("NFKC", name) if unicodedata.category(sign) != "Cf")
    return " ".join(seen.split()).casefold()


def of_cut_texts(cut: int, texts: int, lost: int, max_length: int, model_reads: int | None = None) -> list[str]:
    """How many of so many texts were cut at `max_length` tokens, where any was.

    Args:
        cut, texts: how many were cut, and of how many.
        lost: how many of all were left out, as nothing to learn was left.
        max_length: in tokens.
        model_reads: the most that could be read in place of that; None where it is decided, as of a finished run.
    """
    if not cut:
        return []
    left_out = f", and {lost:,} dropped, because no token to train on was left" if lost else ""
    remedy = ""
    if model_reads is not None and model_reads > max_length:
        remedy = f" The model can read {model_reads:,} tokens: raise --max-length."
    return [
        f"{cut:,} of {texts:,} texts ({_share(cut, texts)}) are longer than {max_length:,} tokens and were "
        f"truncated{left_out}.{remedy}"
    ]


def of_endless_turns() -> list[str]:
    """The warning where a chat template ends no turn."""
    return [
        "The model's chat template writes no special token after what the assistant says, so where to stop is not "
        "learned, and answers may go on until --max-new-tokens. Give a tokenizer whose template ends a turn."
    ]


def of_numbers(data: str, problem: Problem, read_as: str) -> list[str]:
    """The warning where rows have numbers in place of the names of classes, tags or labels."""
    return [
        f"{data!r} has numbers in place of names of {problem.labels}; each is read as the index of a name: {read_as}. "
        "If they mean something else, the metrics are wrong: write the names instead."
    ]


def of_other_labels(table: str, learned: str, taken: str) -> list[str]:
    """The warning where rows lack the column that a run learned from, and the only other one is measured."""
    return [
        f"{table!r} has no column {learned!r}, from which the run learned, so its only other column {taken!r} was "
        "measured. If it holds something else, the metrics are wrong: name the column with --label-column."
    ]


def seen_rows(texts: Sequence[Any], trained_on: Set[str]) -> list[str]:
    """How many of the rows that are measured on were trained on, where any was."""
    seen = sum(digest(text) in trained_on for text in texts) if trained_on else 0
    if not seen:
        return []
    return [
        f"{seen:,} of {len(texts):,} rows ({_share(seen, len(texts))}) are in the training data: on these the metrics "
        "show what the model remembers, not how well it predicts new texts."
    ]


def of_changed_rows(data: str) -> list[str]:
    """The warning where a run is measured on its own rows, which are others now."""
    return [
        f"{data!r} holds other rows now than when the run was trained, so these figures are not those of its "
        "metrics.json."
    ]


def of_training_loss(points: Sequence[tuple[int, float]], before: float, *, over_and_over: bool = True) -> list[str]:
    """Whether the training loss ended above its start, or was still falling at the end.

    It ended above its start where either is so:

    - the median of the last tenth of what was logged, three points at least, is above that of the first tenth by more
      than two standard errors. The noise behind these is the median difference between neighbours, which neither a
      slope nor a few leaps change;
    - the mean of the last tenth is more than twice the loss before training, however large the noise.

    It was still falling where the median of the last fifth is above a fifth of the loss before training, and below that
    of the fifth before by a tenth and by more than two standard errors. Of fewer than ten points nothing is said.

    Args:
        points: logged losses, each with its step.
        before: the same loss of the dev rows before training.
        over_and_over: whether more passes over the rows would help, so that it is said where the loss was still
            falling. A model that learns next words would repeat its rows.
    """
    losses = [loss for _, loss in points]
    if len(losses) < _FEWEST_POINTS:
        return []
    size = max(3, len(losses) // 10)
    start, end = losses[:size], losses[-size:]
    # 0.954: the median of |a - b| in standard deviations of one; 1.25: the error of a median in those of a mean
    noise = median(abs(b - a) for a, b in pairwise(losses)) / 0.954
    error = noise * 1.25 * math.sqrt(2 / size)
    if mean(end) > _GROSS * before:
        first, last = before, mean(end)
    elif median(end) > median(start) + _CERTAIN * error:
        first, last = median(start), median(end)
    else:
        return _still_falling(losses, before, noise) if over_and_over else []
    return [
        f"The training loss ended above its start ({first:.3g} at the start, {last:.3g} at the end), so training made "
        "the model worse; lower the learning rate."
    ]


def _still_falling(losses: Sequence[float], before: float, noise: float) -> list[str]:
    size = len(losses) // 5
    late, end = median(losses[-2 * size : -size]), median(losses[-size:])
    if end < _LEARNED * before or late - end < max(_FALL * late, _CERTAIN * noise * 1.25 * math.sqrt(2 / size)):
        return []
    return [
        f"The training loss was still falling at the end ({end:.3g}, from {late:.3g} a fifth of the steps before); "
        "more epochs would probably give a better model."
    ]


def tell(warnings: Iterable[str]) -> None:
    """Log warnings; the command line, which shows them below its table, leaves these out."""
    for warning in warnings:
        logger.warning("%s", warning)


def _never_told(problem: Problem, outputs: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> list[str]:
    """Whether the same was told of all rows or words, two at least; else which classes or labels were told of none."""
    import numpy as np

    if problem is MULTI_LABEL:
        answers = problem.answers(outputs)
    else:  # a column for each class, as of labels
        labelled, classes = labels != UNLABELLED, np.arange(len(names))
        answers, labels = problem.answers(outputs[labelled])[:, None] == classes, labels[labelled][:, None] == classes
    told, there = answers.sum(0), labels.sum(0)
    if len(answers) >= 2 and len(np.unique(answers, axis=0)) == 1:
        also = ", and so is every label" if (labels == answers[0]).all() else ""
        answer = ", ".join(repr(name) for name, count in zip(names, told) if count) or "no label"
        return [
            f"Every prediction is {answer}{also}, so nothing shows that the model can distinguish the {problem.labels}."
        ]
    never = [name for name, said, rows in zip(names, told, there) if rows and not said]
    if not never or len(answers) < 2:
        return []
    return [f"These {problem.labels} were never predicted, though some rows have them: {_some(never)}."]


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if 100 * part >= whole else "below 1 %"


def _some(names: Sequence[str], show: Callable[[str], str] = repr) -> str:
    """Names in a line, of many the first and how many more."""
    shown = [show(name) for name in names[:_SHOWN]]
    return ", ".join([*shown, f"{len(names) - _SHOWN:,} more"] if len(names) > _SHOWN else shown)
