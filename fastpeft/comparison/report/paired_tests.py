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
from fastpeft.data.problems import TITLES

_FEW_ROWS = 200  # below it an accuracy of 0.8 is good to ± 0.055 or worse
_NAMED = 3  # the most variants that a part of the verdict names


@dataclass(frozen=True)
class Pair:
    """Two variants and the paired test of their metric.

    Attributes:
        first, second: the variants, the first with the higher value or the same.
        metric: what was tested of both.
        difference: how far the first is above the second.
        p: its p value, corrected for the number of pairs of its metric (Holm).
        seeds: the number of training seeds; 0 where neither was trained.
    """

    first: Variant
    second: Variant
    metric: str
    difference: significance.Difference
    p: float
    seeds: int

    @property
    def significant(self) -> bool:
        return significance.is_significant(self.difference.mean, self.p)

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
        corrected = significance.holm([difference.p for *_, difference, _ in pairs])
        found += [Pair(one, other, metric, test, p, seeds) for (one, other, test, seeds), p in zip(pairs, corrected)]
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
    highest = _highest(compared, best, scores, TITLES[metric]) if best else ""
    if not tested:
        return (
            f"{f'{highest}; no' if best else 'No'} difference was tested: a paired test needs two finished variants "
            "with a score for every dev row, and there is none for regression."
        )
    names = list(dict.fromkeys(variant.name for pair in tested for variant in (pair.first, pair.second)))
    found = [pair for pair in tested if pair.significant]
    if not found:
        those = "these" if len(names) == len(compared) else "those tested of the"
        among = f"between {' and '.join(names)}" if len(names) == 2 else f"among {those} {len(compared)} variants"
        return f"No significant difference {among} on {_rows(tested):,} dev rows; {highest}."
    told = [highest]
    held = [pair for pair in tested if best[0] in (pair.first.name, pair.second.name)] if len(best) == 1 else []
    above = [pair.second.name for pair in held if pair.significant and pair.first.name == best[0]]
    others = [name for pair in held for name in (pair.first.name, pair.second.name) if name != best[0]]
    rest = [name for name in others if name not in above]
    if above:
        told += [f"significantly above {_counted(above, len(held))}"]
        told += [f"not significantly above {_counted(rest, len(held))}"] if rest else []
    else:
        told += [f"{len(found)} of {len(tested)} pairs of variants differ significantly"]
    return f"{'; '.join(told)} (Holm)."


def _highest(compared: Sequence[Variant], best: Sequence[str], scores: Mapping[str, float], title: str) -> str:
    """The variants with the highest value, that value, and the memory of a single one."""
    shown = [*best[:_NAMED], *([f"{len(best) - _NAMED} more"] if len(best) > _NAMED else [])]
    text = f"{listed(shown)} {'has' if len(best) == 1 else 'share'} the highest {title}, {scores[best[0]]:.3f}"
    memory = next(variant for variant in compared if variant.name == best[0]).values("peak_memory_mb")
    return f"{text}, at {mean(memory):,.0f} MB peak memory" if memory and len(best) == 1 else text


def _counted(names: Sequence[str], others: int) -> str:
    """A few names, or how many they are."""
    return listed(names) if len(names) <= _NAMED else f"{len(names)} of the other {others}"


def limits(tested: Sequence[Pair]) -> str:
    """What the tests cannot show because of one or two seeds, or few rows; empty where there are enough of both."""
    told = []
    tested = [pair for pair in tested if pair.metric == tested[0].metric]
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


def report(tested: Sequence[Pair]) -> Iterator[Block]:
    """The section on the pairs, those of a metric together, the most significant first."""
    if tested:
        yield Heading("Paired tests")
    for metric in dict.fromkeys(pair.metric for pair in tested):
        pairs = sorted((pair for pair in tested if pair.metric == metric), key=lambda pair: pair.p)
        title, tests = TITLES[metric], listed(list(dict.fromkeys(pair.difference.test for pair in pairs)))
        yield Text(
            f"{title[0].upper()}{title[1:]} of every pair of variants, paired by dev row: {tests}. 'p by Holm' is p "
            f"after Holm's correction for the {len(pairs):,} of them; a difference is significant if it is below "
            f"{significance.LEVEL:g}. Two variants without a significant difference may still differ: these rows and "
            "seeds do not show it."
        )
        rows = [["variants", "significant", "difference", "95 % interval", "p", "p by Holm"]]
        for pair in pairs:
            test = pair.difference
            ends = f"{test.low:+.3f} to {test.high:+.3f}"
            told = [f"{test.mean:+.3f}", ends, _show_p(test.p), _show_p(pair.p)]
            rows.append([str(pair), "yes" if pair.significant else "no", *told])
        yield Table(rows, range(2, 6), "Paired tests")


def _show_p(p: float) -> str:
    return f"{p:.3f}" if p >= 0.0005 else "<0.001"


def _rows(tested: Sequence[Pair]) -> int:
    return len(next(iter(tested[0].first.row_scores.values())))
