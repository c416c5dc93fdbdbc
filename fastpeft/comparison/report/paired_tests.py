"""Paired tests: whether the metrics of any two variants differ significantly."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import mean

from fastpeft.comparison import significance
from fastpeft.comparison.report.document import Block, Heading, Table, Text, listed
from fastpeft.comparison.report.results import Variant, main_metric
from fastpeft.data.problems import ACCURACY, TITLES

_FEW_ROWS = 200  # below it an accuracy of 0.8 is good to ± 0.055 or worse
_NAMED = 3  # the most variants that a part of the verdict names
_LISTED = 15  # the most pairs, of six variants, that have a row each


@dataclass(frozen=True)
class Pair:
    """Two variants and the paired test of their metric.

    Attributes:
        first, second: the variants, the first with the higher value or the same.
        difference: how far the first is above the second.
        p: its p value, corrected for the number of pairs of its metric (Holm).
        seeds: the number of training seeds; 0 where neither was trained.
    """

    first: Variant
    second: Variant
    difference: significance.Difference
    p: float
    seeds: int

    @property
    def metric(self) -> str:
        """What was tested of both."""
        assert self.first.tested is not None  # as they were paired
        return self.first.tested

    @property
    def significant(self) -> bool:
        return significance.verdict(self.difference.mean, self.p) != significance.UNDECIDED

    def __str__(self) -> str:
        return f"{self.first.name} {'above' if self.difference.mean else 'and'} {self.second.name}"


def all_pairs(compared: Sequence[Variant]) -> list[Pair]:
    """The paired test of every two variants with a metric that is tested, p corrected for their number (Holm).

    Variants that learned different things have different metrics: those of each are apart, and those of the first
    variants come first.
    """
    found: list[Pair] = []
    for metric in dict.fromkeys(variant.tested for variant in compared if variant.tested):
        pairs = []
        for one, other in combinations([variant for variant in compared if variant.tested == metric], 2):
            if tested := one.above(other):
                difference, seeds = tested
                first, second = (one, other) if difference.mean >= 0 else (other, one)
                pairs.append((first, second, difference if first is one else -difference, seeds))
        corrected = significance.holm([difference.p for _, _, difference, _ in pairs])
        found += [
            Pair(first, second, difference, p, seeds) for (first, second, difference, seeds), p in zip(pairs, corrected)
        ]
    return found


def verdict(compared: Sequence[Variant], tested: Sequence[Pair]) -> str:
    """One sentence: which variant is best, with how much memory, and above which others significantly.

    It is of the first metric alone.
    """
    main = main_metric(compared)
    metric = main.key if main else ""
    tested = [pair for pair in tested if pair.metric == metric]
    compared = [variant for variant in compared if variant.values(metric)]
    scores = {variant.name: mean(variant.values(metric)) for variant in compared}
    best = [name for name, score in scores.items() if math.isclose(score, max(scores.values()))]
    title = TITLES.get(metric, "")
    if not tested:
        lead = f"{_highest(compared, best, scores, title)}; no" if best else "No"
        return (
            f"{lead} difference was tested: a paired test needs two finished variants with a score for every dev row, "
            "and there is none for regression."
        )
    names = list(dict.fromkeys(variant.name for pair in tested for variant in (pair.first, pair.second)))
    found = [pair for pair in tested if pair.significant]
    if not found:
        these = f"between {' and '.join(names)}"
        if len(names) > 2:
            these = f"among {'these' if len(names) == len(compared) else 'the'} {len(names)} variants"
            these += "" if len(names) == len(compared) else " that could be tested"
        return (
            f"No significant difference in {title} {these} on {_rows(tested):,} dev rows; "
            f"{_highest(compared, best, scores)}."
        )
    told = [_highest(compared, best, scores, title)]
    held = [pair for pair in tested if best[0] in (pair.first.name, pair.second.name)] if len(best) == 1 else []
    above = [pair.second.name for pair in held if pair.significant and pair.first.name == best[0]]
    others = [name for pair in held for name in (pair.first.name, pair.second.name) if name != best[0]]
    rest = [name for name in others if name not in above]
    if above:
        told += [f"significantly above {_counted(above, held)}"]
        told += [f"not significantly above {_counted(rest, held)}"] if rest else []
    else:
        told += [f"significantly above none of the other {len(held)} variants"] if held else []
        told += [f"{len(found)} of {len(tested)} pairs of variants differ significantly"]
    return f"{'; '.join(told)} (Holm)."


def _highest(compared: Sequence[Variant], best: Sequence[str], scores: Mapping[str, float], title: str = "") -> str:
    """The variants with the highest value, that value, and the memory of a single one."""
    shown = [*best[:_NAMED], *([f"{len(best) - _NAMED} more"] if len(best) > _NAMED else [])]
    text = f"{listed(shown)} {'has' if len(best) == 1 else 'share'} the highest{f' {title}' if title else ''}, "
    text += f"{scores[best[0]]:.3f}"
    memory = next(variant for variant in compared if variant.name == best[0]).values("peak_memory_mb")
    return f"{text}, at {mean(memory):,.0f} MB peak memory" if memory and len(best) == 1 else text


def _counted(names: Sequence[str], held: Sequence[Pair]) -> str:
    """A few names, or how many they are."""
    if len(names) <= _NAMED:
        return listed(names)
    return f"all {len(names)} others" if len(names) == len(held) else f"{len(names)} of the other {len(held)}"


def limits(tested: Sequence[Pair]) -> str:
    """What the tests cannot show because of one or two seeds, or few rows; empty where there are enough of both."""
    told = []
    tested = [pair for pair in tested if pair.metric == tested[0].metric]
    answers = bool(tested) and tested[0].metric == ACCURACY
    if any(pair.seeds == 1 for pair in tested):
        told.append(
            "With one seed the test accounts only for the choice of dev rows, not for variation between seeds. Run "
            "with --seeds 3 or more."
        )
    if any(pair.seeds == 2 for pair in tested):
        # Welch's t test then has hardly more than one degree of freedom, which hides more than few rows do
        told.append(
            "With two seeds the variation between seeds is poorly known: the test can miss even a large difference. "
            "Run with --seeds 3 or more."
        )
    elif tested and (rows := _rows(tested)) < _FEW_ROWS:
        if answers and all(pair.seeds <= 1 for pair in tested) and not any(pair.significant for pair in tested):
            least = _least_rows(len(tested)) / rows
            size = f" below {math.floor(100 * least) / 100:.2f}" if least <= 1 else ""
            told.append(f"On {rows} dev rows no difference{size} can be significant.")
        else:
            told.append(f"{rows} dev rows are few: the test can miss a difference that more rows would show.")
    return " ".join(told)


def other_words(compared: Sequence[Variant]) -> str:
    """Which variants were measured on other words than others with the same metric; empty where none were."""
    told = []
    for metric in dict.fromkeys(variant.tested for variant in compared if variant.words):
        groups: dict[tuple[int, ...], list[str]] = {}
        for variant in compared:
            if variant.words and variant.tested == metric:
                groups.setdefault(variant.words, []).append(variant.name)
        if metric and len(groups) > 1:
            told.append(
                f"Do not compare {TITLES[metric]} between these, which were measured on different words, as their "
                f"max_length or their tokenizer differs: {'; '.join(map(listed, groups.values()))}."
            )
    return " ".join(told)


def report(compared: Sequence[Variant], tested: Sequence[Pair]) -> Iterator[Block]:
    """The section on the pairs, those of a metric together: a row each, or a matrix where they are many."""
    if tested:
        yield Heading("Paired tests")
    for metric in dict.fromkeys(pair.metric for pair in tested):
        yield from _of_metric(metric, compared, [pair for pair in tested if pair.metric == metric])


def _of_metric(metric: str, compared: Sequence[Variant], tested: Sequence[Pair]) -> Iterator[Block]:
    title = TITLES[metric]
    tests = listed(list(dict.fromkeys(pair.difference.test for pair in tested)))
    counted = f"all {len(tested):,} pairs" if len(tested) > 1 else "the one pair"
    yield Text(
        f"{title[0].upper()}{title[1:]} of every pair of variants, paired by dev row: {tests}. "
        f"'p by Holm' is p after Holm's correction for {counted}; a difference is significant if it is "
        f"below {significance.LEVEL:g}. Two variants without a significant difference may still differ: these rows and "
        "seeds do not show it."
    )
    if len(tested) <= _LISTED:
        rows = [
            [
                str(pair),
                "yes" if pair.significant else "no",
                significance.show_difference(pair.difference),
                significance.show_p(pair.difference.p),
                significance.show_p(pair.p),
            ]
            for pair in sorted(tested, key=lambda pair: pair.p)
        ]
        header = ["variants", "significant", "difference, 95 % interval", "p", "p by Holm"]
        yield Table([header, *rows], range(2, 5), "Paired tests")
        return
    yield Text(
        "Each cell has p after Holm's correction. 'higher' and 'lower' mark significant differences: the row's variant "
        "is higher or lower than the column's."
    )
    cells = {}
    for pair in tested:
        first, second, p = pair.first.name, pair.second.name, significance.show_p(pair.p)
        words = ("higher, p ", "lower, p ") if pair.significant else ("", "")
        cells[first, second], cells[second, first] = (f"{word}{p if pair.p < 1 else 1}" for word in words)
    names = [variant.name for variant in compared if any(variant in (pair.first, pair.second) for pair in tested)]
    matrix = [["", *(f"{number}" for number in range(1, len(names)))]]
    for number, name in enumerate(names):
        before = [cells.get((name, other), "-") for other in names[:number]]
        matrix.append([f"{number + 1} {name}", *before, *[""] * (len(names) - 1 - number)])
    yield Table(matrix, range(1, len(names)), "Paired tests: p by Holm of every pair")


def _rows(tested: Sequence[Pair]) -> int:
    return len(next(iter(tested[0].first.row_scores.values())))


def _least_rows(pairs: int) -> int:
    """The least number of rows that one variant must answer rightly and the other wrongly for significance.

    By McNemar's exact test p is then 2 / 2^rows, which Holm multiplies by the number of pairs.
    """
    return math.floor(1 + math.log2(pairs / significance.LEVEL)) + 1
