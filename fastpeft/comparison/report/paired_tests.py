"""Paired tests: whether the accuracies of any two variants differ significantly."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from fastpeft.comparison.report import significance
from fastpeft.comparison.report.document import Block, Heading, Table, Text
from fastpeft.comparison.report.results import Variant

_FEW_ROWS = 200  # below it an accuracy of 0.8 is good to ± 0.055 or worse
_NAMED = 3  # the most pairs that the verdict names
_LISTED = 15  # the most pairs, of six variants, that have a row each


@dataclass(frozen=True)
class Pair:
    """Two variants and the paired test of their accuracies.

    Attributes:
        first, second: the variants, the first with the higher accuracy or the same.
        difference: how far the first is above the second.
        p: its p value, corrected for the number of pairs (Holm).
        seeds: the number of training seeds; 0 where neither was trained.
    """

    first: Variant
    second: Variant
    difference: significance.Difference
    p: float
    seeds: int

    @property
    def significant(self) -> bool:
        return significance.verdict(self.difference.mean, self.p) != significance.UNDECIDED

    def __str__(self) -> str:
        return f"{self.first.name} {'above' if self.difference.mean else 'and'} {self.second.name}"


def all_pairs(compared: Sequence[Variant]) -> list[Pair]:
    """The paired test of every two variants whose predictions were kept, p corrected for their number (Holm)."""
    found = []
    for one, other in combinations(compared, 2):
        if tested := one.above(other):
            difference, seeds = tested
            found.append((one, other, difference, seeds) if difference.mean >= 0 else (other, one, -difference, seeds))
    corrected = significance.holm([difference.p for _, _, difference, _ in found])
    return [
        Pair(first, second, difference, p, seeds) for (first, second, difference, seeds), p in zip(found, corrected)
    ]


def verdict(compared: Sequence[Variant], tested: Sequence[Pair]) -> str:
    """One sentence that says whether any difference is significant."""
    if not tested:
        return "No difference was tested: a paired test needs the classes that two finished variants predict."
    names = list(dict.fromkeys(variant.name for pair in tested for variant in (pair.first, pair.second)))
    found = sorted((pair for pair in tested if pair.significant), key=lambda pair: pair.p)
    left = len(tested) - len(found)
    if not found:
        these = f"between {' and '.join(names)}"
        if len(names) > 2:
            these = f"among {'these' if len(names) == len(compared) else 'the'} {len(names)} variants"
            these += "" if len(names) == len(compared) else " that could be tested"
        return f"No significant difference in accuracy {these} on {_rows(tested):,} dev rows."
    if len(found) > _NAMED:
        highest = [
            name
            for name in names
            if all(pair.first.name == name and pair.difference.mean for pair in pairs_of(tested, name))
        ]
        shown = f"; {highest[0]}, the highest, is {standing(tested, highest[0])}" if len(highest) == 1 else ""
        return f"{len(found)} of {len(tested)} pairs of variants differ significantly in accuracy (Holm){shown}."
    rest = f"; no significant difference in the other {f'{left} pairs' if left > 1 else 'pair'}" if left else ""
    return f"{', '.join(map(_told, found))}{rest}."


def pairs_of(tested: Sequence[Pair], name: str) -> list[Pair]:
    """The pairs with a variant."""
    return [pair for pair in tested if name in (pair.first.name, pair.second.name)]


def standing(tested: Sequence[Pair], name: str) -> str:
    """How many others the variant of the highest accuracy is significantly above."""
    held = pairs_of(tested, name)
    below = [pair for pair in held if pair.first.name == name and pair.significant]
    if len(held) == 1:
        return f"{'' if below else 'not '}significantly above the other"
    return f"significantly above {len(below) or 'none'} of the other {len(held)} variants"


def limits(tested: Sequence[Pair]) -> str:
    """What the tests cannot show because of one seed or few rows; empty where there are enough of both."""
    told = []
    if any(pair.seeds == 1 for pair in tested):
        told.append(
            "With one seed the test counts dev rows alone: it cannot show what another seed would change. Run --seeds "
            "3 or more."
        )
    if tested and (rows := _rows(tested)) < _FEW_ROWS:
        if all(pair.seeds <= 1 for pair in tested) and not any(pair.significant for pair in tested):
            least = _least_rows(len(tested)) / rows
            size = f" below {math.floor(100 * least) / 100:.2f}" if least <= 1 else ""
            told.append(f"On {rows} dev rows no difference{size} can be significant.")
        else:
            told.append(f"{rows} dev rows are few: the test can miss a difference that more rows would show.")
    return " ".join(told)


def report(compared: Sequence[Variant], tested: Sequence[Pair]) -> Iterator[Block]:
    """The section on the pairs: a row each, or a matrix where they are many."""
    if not tested:
        return
    yield Heading("Paired tests")
    yield Text(
        "Accuracy of every two variants, paired by dev row: McNemar's exact test with one seed, else a t test whose "
        f"error counts seeds and rows. p by Holm is corrected for all {len(tested):,} pairs; a difference is "
        f"significant where that is below {significance.LEVEL:g}. Without a significant difference two variants may "
        "still differ: the rows and seeds do not show it."
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
        yield Table([header, *rows], numbers=range(2, 5))
        return
    yield Text("In each cell p by Holm; higher or lower: the row's variant is so, significantly, beside the column's.")
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
    yield Table(matrix, numbers=range(1, len(names)))


def _told(pair: Pair) -> str:
    p = significance.show_p(pair.p)
    shown = p.replace("<", "< ") if p.startswith("<") else f"= {p}"
    return f"{pair.first.name} is above {pair.second.name} (p {shown}, Holm)"


def _rows(tested: Sequence[Pair]) -> int:
    return len(next(iter(tested[0].first.answers.values())))


def _least_rows(pairs: int) -> int:
    """The least number of rows that one variant must answer rightly and the other wrongly for significance.

    By McNemar's exact test p is then 2 / 2^rows, which Holm multiplies by the number of pairs.
    """
    return math.floor(1 + math.log2(pairs / significance.LEVEL)) + 1
