"""The results that the paper has, beside those of a comparison."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from statistics import mean

from fastpeft.comparison import significance, suites
from fastpeft.comparison.report.document import Block, Heading, Strong, Table, Text
from fastpeft.comparison.report.results import Variant
from fastpeft.data.problems import ACCURACY, LESS_IS_BETTER

# A share of the lower value: differences of equal variants reach it. The speeds of three runs each of 11 variants on a
# machine with other work differed by 12 to 72 %, by 18 % in the median. Memory does not vary, but 1 MB is no order.
MEMORY_MARGIN, SPEED_MARGIN = 0.02, 0.2
_AT_RATES = ", at rates "
_MEASURES = ("accuracy", "memory", "samples/s")
_VERDICTS = (significance.SEEN, significance.REVERSED, significance.UNDECIDED)


def figures_beside(compared: Sequence[Variant]) -> Iterator[Block]:
    """The results in the paper's tables beside ours."""
    own = [variant for variant in compared if variant.row and variant.runs]
    if not own:
        return
    measures = ("accuracy, %", "F1, %", "memory, MB", "samples/s")
    header = ["row", *(title for measure in measures for title in (f"{measure}: paper", "here"))]
    rows = [header]
    for variant in own:
        row = suites.paper_row(variant.row or "")
        theirs = [" / ".join(f"{value:.2f}" for value in row.accuracy)]
        theirs += [_given(row.f1, ".2f"), _given(row.memory_mb, ",.0f"), _given(row.samples_per_second, ".1f")]
        ours = [_mean(variant, "accuracy", 100, ".2f"), _mean(variant, "f1", 100, ".2f")]
        ours += [_mean(variant, "peak_memory_mb", 1, ",.0f"), _mean(variant, "samples_per_second", 1, ".1f")]
        rows.append([variant.name, *(text for pair in zip(theirs, ours) for text in pair)])
    yield Heading("Results of the paper")
    yield Text(
        f"The paper measured {suites.MEASURED_WITH}, on its own machine; it has two values where its tables differ. "
        "Ours are of the model, the data and the machine below. Rankings compare; absolute numbers do not."
    )
    yield Table(rows, range(1, len(header)), "Results of the paper and of this comparison")


def _given(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _mean(variant: Variant, key: str, factor: float, form: str) -> str:
    values = variant.values(key)
    return format(factor * mean(values), form) if values else "-"


def orderings(compared: Sequence[Variant]) -> Iterator[Block]:
    """Which orderings of the paper are seen here."""
    finished = [variant for variant in compared if variant.runs]
    judged = list(_accuracy_orders(finished))
    rows = [*judged, *_measured_orders(finished)]
    if not rows:
        return
    yield Heading("Orderings of the paper")
    if judged and any(len(variant.runs) == 1 for variant in finished if variant.row):
        yield Strong(
            "Accuracies of one seed: a verdict holds for this seed alone. Its test knows how far other rows would "
            "move the difference, but not how far another seed would, so it finds too many differences between "
            "equal methods. Run --seeds 3 or more before you conclude that one method is better."
        )
    counted = {
        measure: [row[1].partition(",")[0] for row in rows if row[0].startswith(measure)] for measure in _MEASURES
    }
    items = [
        f"{measure}: {', '.join(f'{verdicts.count(word)} {word}' for word in _VERDICTS)}"
        for measure, verdicts in counted.items()
        if verdicts
    ]
    yield Text(f"{'; '.join(items)}.")
    yield Table([["the paper has", "verdict", "here", "p", "p by Holm"], *rows], range(2, 5), "Orderings of the paper")
    yield Text(
        "Accuracies: the difference with its own 95 % interval, and p, by paired tests on the same dev rows "
        "(McNemar's exact test with one seed, else a t test whose error counts seeds and rows). The verdict is by p "
        f"after Holm's correction for the number of orderings: {significance.UNDECIDED} if p is {significance.LEVEL:g} "
        f"or more, even where the interval, which is not corrected, excludes 0; {significance.REVERSED} if the "
        "opposite ordering is significant. Memory and samples/s: the two means, and their difference; decided where "
        f"every run of one is on one side of every run of the other, by more than {100 * MEMORY_MARGIN:g} % of memory "
        f"and {100 * SPEED_MARGIN:g} % of speed. On a machine with other work, runs of one variant differ by as much "
        "in speed."
    )
    if any(_AT_RATES in row[0] for row in judged):
        yield Text(
            "At rates: the two variants have different learning rates, searched or given, which may explain a part "
            "of the difference."
        )


def _pairs(compared: Sequence[Variant], measure: str) -> Iterator[tuple[Variant, Variant]]:
    """The variants of each ordering in the paper; two that both have a prompt have the same one."""
    for first, second in suites.orderings(measure):
        for one, other in product(compared, compared):
            prompts = {one.prompt, other.prompt} - {None}
            if (one.row, other.row) == (first, second) and len(prompts) <= 1:
                yield one, other


def _accuracy_orders(compared: Sequence[Variant]) -> list[list[str]]:
    found = []
    for one, other in _pairs(compared, "accuracy"):
        if one.tested == ACCURACY and (tested := one.above(other)):
            found.append((f"{one.name} above {other.name}{_rates(one, other)}", *tested))
    corrected = significance.holm([difference.p for _, difference, _ in found])
    return [
        [
            f"accuracy: {text}",
            _verdict(difference.mean, p, seeds),
            significance.show_difference(difference),
            significance.show_p(difference.p),
            significance.show_p(p),
        ]
        for (text, difference, seeds), p in zip(found, corrected)
    ]


def _rates(one: Variant, other: Variant) -> str:
    """The learning rates of two variants, where a search found different ones."""
    taken = [
        " or ".join(f"{rate:g}" for rate in sorted(set(variant.values("learning_rate")))) for variant in (one, other)
    ]
    searched = any(variant.cells[0].rates for variant in (one, other))
    return f"{_AT_RATES}{' and '.join(taken)}" if searched and taken[0] != taken[1] and all(taken) else ""


def _verdict(difference: float, p: float, seeds: int) -> str:
    word = significance.verdict(difference, p)
    return word if seeds > 1 or word == significance.UNDECIDED else f"{word}, for this seed alone"


def _measured_orders(compared: Sequence[Variant]) -> Iterator[list[str]]:
    for measure, key, title, word, margin in (
        ("memory_mb", "peak_memory_mb", "memory", "below", MEMORY_MARGIN),
        ("samples_per_second", "samples_per_second", "samples/s", "above", SPEED_MARGIN),
    ):
        for one, other in _pairs(compared, measure):
            ours, theirs = one.values(key), other.values(key)
            if ours and theirs:
                pair = (ours, theirs) if word == "above" else (theirs, ours)
                our_mean, their_mean = mean(ours), mean(theirs)
                apart = f" ({100 * (our_mean / their_mean - 1):+.1f} %)" if their_mean else ""
                here = f"{our_mean:,.0f} and {their_mean:,.0f}{apart}"
                verdict = significance.verdict_of_ranges(*pair, margin)
                yield [f"{title}: {one.name} {word} {other.name}", verdict, here, "-", "-"]


def lags(compared: Sequence[Variant]) -> Iterator[Block]:
    """How many steps LoRA lags behind the others."""
    kept = [(variant, found) for variant in compared if (found := variant.cells[0].curves())]
    slow = next((found for variant, found in kept if variant.row == "lora"), None)
    if slow is None or len(kept) < 2:
        return
    measures = [name for name in slow if name.startswith("dev ")]
    rows = [["LoRA behind", *(f"by {name}, steps" for name in measures)]]
    for variant, fast in kept:
        if fast is not slow:
            behind = [
                significance.lag(_rising(name, slow[name]), _rising(name, fast[name])) if name in fast else None
                for name in measures
            ]
            rows.append([variant.name, *("-" if lag is None else f"{lag:+.0f}" for lag in behind)])
    steps = next(iter(slow.values()))[-1][0]
    yield Heading("LoRA's lag")
    yield Text(
        f"How many steps, of {steps:,}, LoRA needs more than the other method to reach the same level of the curve: "
        f"the median over {significance.LAG_LEVELS} levels that both curves of the first seed pass. Below 0 LoRA is "
        "ahead; - means that the curves share no level."
    )
    yield Table(rows, range(1, 1 + len(measures)), "LoRA's lag")


def _rising(name: str, points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The curve, negated where lower is better."""
    sign = -1 if name.removeprefix("dev ") in LESS_IS_BETTER else 1
    return [(step, sign * value) for step, value in points]
