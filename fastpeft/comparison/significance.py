"""Statistics of accuracies and F1: intervals, and paired tests of two methods.

All methods answer the same dev rows, so two are compared row by row, and seed by seed. Their scores are `(seeds, rows)`
and have the metric as their mean: of an accuracy whole numbers or bools, 1 where an answer was right and 0 where it was
wrong, else the fractions of `row_scores`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.05  # of significance; intervals have the level 1 - LEVEL
_ROUNDING = 1e-10  # scores of rows differ by more, or only in how they were rounded


@dataclass(frozen=True)
class Difference:
    """How far the accuracy of one method is above another's.

    Attributes:
        mean: the difference.
        low, high: its interval.
        p: how likely a difference of this size or more is between equal methods.
        test: which test that is of.
    """

    mean: float
    low: float
    high: float
    p: float
    test: str

    def __neg__(self) -> Difference:
        """The difference with the methods exchanged."""
        return Difference(-self.mean, -self.high, -self.low, self.p, self.test)


def row_scores(above: Sequence[int], below: Sequence[int]) -> np.ndarray:
    """What each row stands for in a metric `sum(above) / sum(below)`, `(rows,)`: its mean is the metric.

    `m + (above - m below) / mean(below)`, the linear part of what leaving a row out changes (the delta method). Where
    every `below` is 1 it is `above`.

    Example:
        >>> row_scores([2, 0, 4], [2, 2, 4]).tolist()
        [0.9375, 0.1875, 1.125]
    """
    over, under = np.asarray(above, np.float64), np.asarray(below, np.float64)
    if not under.any():
        return np.zeros_like(over)
    metric = over.sum() / under.sum()
    return metric + (over - metric * under) / under.mean()


def interval(scores: np.ndarray) -> tuple[float, float] | None:
    """The interval of a metric for new rows and, with several seeds, for new seeds; seeds that all agree are one.

    Of an accuracy with one seed Wilson's. Else, with S seeds and N rows, the mean plus or minus t standard errors,
    whose square is `var(seeds) / S + var(rows) / N` (variances of the means over the other; one seed has none), with
    Welch's degrees of freedom. Of fractions N counts the rows that have a part in the metric. None of fractions that
    are all equal, as those of an F1 of 0 or 1: they tell no spread.

    Args:
        scores: `(seeds, rows)`.

    Example:
        >>> low, high = interval(np.array([[1] * 8 + [0] * 2]))
        >>> f"{low:.3f} {high:.3f}"
        '0.490 0.943'
    """
    (scores,) = _with_a_part(_distinct(scores))
    seeds, rows = scores.shape
    error, df = _standard_error(scores)
    if _are_answers(scores) and (seeds == 1 or error == 0):
        return _wilson(int(scores[0].sum()), rows)
    if error == 0:
        return None
    centre, half = float(scores.mean()), _half_width(error, df)
    return max(0.0, centre - half), min(1.0, centre + half)


def compare_pair(first: np.ndarray, second: np.ndarray) -> Difference:
    """How far `first` is above `second`, on the same rows and the same seeds.

    With one seed of an accuracy, or several that all agree, McNemar's exact test: of the rows that only one answers
    rightly, half should be each method's. Else the t test of the mean difference, whose standard error is that of
    `interval`. Fractions that differ by as much in every row, or in none, so that it is 0, have the sign test, but
    p = 1 where those of each method are all equal. Where it is 0 for an accuracy or a sign test, the interval extends
    as far as Wilson's of as many rows, all of them right.

    Args:
        first, second: `(seeds, rows)`.
    """
    from scipy.stats import binomtest, t

    first, second = _with_a_part(first, second)
    differences = _distinct(first.astype(np.float64) - second)
    mean = float(differences.mean())
    error, df = _standard_error(differences)
    seeds, rows = differences.shape
    half = _half_width(error, df)
    answers = _are_answers(first) and _are_answers(second)
    vary = not answers and max(np.ptp(first), np.ptp(second)) > _ROUNDING
    if (answers and seeds == 1) or (error == 0 and (answers or vary)):
        half = half or 1 - _wilson(rows, rows)[0]
        # by the first seed: where the error is 0 the others have the same mean
        better, worse = (int((sign * differences[0] > _ROUNDING).sum()) for sign in (1, -1))
        p = float(binomtest(better, better + worse).pvalue) if better + worse else 1.0
        test = "McNemar's exact test" if answers else "a sign test over rows"
    else:
        p = 2 * float(t.sf(abs(mean) / error if error else 0.0, df))
        test = f"a t test over {'rows' if seeds == 1 else 'seeds and rows'}"
    return Difference(mean, max(-1.0, mean - half), min(1.0, mean + half), p, test)


def _wilson(right: int, rows: int) -> tuple[float, float]:
    """Wilson's interval of the share of rows that are right."""
    from scipy.stats import binomtest

    found = binomtest(right, rows).proportion_ci(1 - LEVEL, method="wilson")
    return float(found.low), float(found.high)


def _distinct(values: np.ndarray) -> np.ndarray:
    """One seed alone where all agree on every row: the others tell no more about new rows."""
    return values[:1] if (values == values[0]).all() else values


def _are_answers(scores: np.ndarray) -> bool:
    """Whether each is that of an answer, right or wrong."""
    return scores.dtype.kind in "biu"


def _with_a_part(*scores: np.ndarray) -> list[np.ndarray]:
    """Scores `(seeds, rows)` without the rows that have no part in any of the metrics; the metrics stay the same.

    Such a row adds 0 to both sums of `row_scores`, as a sentence without an entity in its labels and answers, so its
    score is the metric itself. If such rows counted, N would be too large and the standard error too small.
    """
    centred = [each - each.mean(1, keepdims=True) for each in scores]
    has_part = np.any([abs(each) > _ROUNDING for each in centred], axis=(0, 1))
    if all(map(_are_answers, scores)) or not has_part.any():
        return list(scores)
    share = has_part.mean()  # of rows; `row_scores` divides by a mean over rows, which are fewer now
    return [each.mean(1, keepdims=True) + share * values[:, has_part] for each, values in zip(scores, centred)]


def _standard_error(values: np.ndarray) -> tuple[float, float]:
    """The standard error of the mean of `values` `(seeds, rows)`, and its degrees of freedom (Welch)."""
    means = (values.mean(0), values.mean(1))
    # of equal means rounding would make a variance that is not 0
    parts = [(each.var(ddof=1) / len(each), len(each) - 1) for each in means if np.ptp(each) > _ROUNDING]
    square = sum(part for part, _ in parts)
    if square == 0:
        return 0.0, math.inf
    return math.sqrt(square), square**2 / sum(part**2 / df for part, df in parts)


def _half_width(error: float, df: float) -> float:
    from scipy.stats import t

    return error * float(t.ppf(1 - LEVEL / 2, df)) if error else 0.0


def holm(p_values: Sequence[float]) -> list[float]:
    """P values corrected for their number (Holm 1979): of the k-th smallest of m, `(m - k + 1) p`, never falling.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    order = np.argsort(p_values, kind="stable")
    corrected = np.empty(len(order))
    factors = np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(factors * np.asarray(p_values, float)[order]))
    return corrected.tolist()


def is_significant(difference: float, p: float) -> bool:
    """Whether there is a difference, given its p value as `holm` corrects it."""
    return difference != 0 and p < LEVEL
