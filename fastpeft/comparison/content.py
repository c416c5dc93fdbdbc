"""What the report of a comparison says."""

from __future__ import annotations

import statistics as plain
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastpeft.comparison import figures, statistics, suites
from fastpeft.comparison.blocks import Block, Code, Figure, Heading, Items, Table, Text
from fastpeft.comparison.cells import Cell
from fastpeft.comparison.plan import Plan
from fastpeft.comparison.variants import ZERO_SHOT
from fastpeft.methods import get_method
from fastpeft.problems import CLASSIFICATION, LOSS, TITLES, get_problem

TITLE = "Comparison of fine-tuning methods"
_ACCURACY = "accuracy"  # the metric that is a mean over rows, so that rows tell how good it is


@dataclass(frozen=True)
class Column:
    """A column of the report: a key of `metrics.json`, its title and format, and how it was measured."""

    key: str
    title: str
    format: str
    note: str = ""

    def show(self, values: Sequence[float]) -> str:
        """The mean over seeds, with the standard deviation of one seed where they differ."""
        if not values:
            return "-"
        if len(set(values)) == 1:
            return format(values[0], self.format)
        return f"{plain.mean(values):{self.format}} ± {plain.stdev(values):{self.format}}"


COLUMNS = (
    Column(_ACCURACY, "accuracy", ".3f", "on all dev rows, with the weights that the run leaves"),
    Column("f1", "F1", ".3f", "of the second class where there are two, else the mean over classes"),
    Column("word_f1", "F1 of words", ".3f", "the mean over tags but for O"),
    Column("matthews", "Matthews", ".3f"),
    Column("pearson", "Pearson", ".3f"),
    Column("spearman", "Spearman", ".3f"),
    Column("mse", "MSE", ".3g"),
    Column("masked_accuracy", "accuracy of masked words", ".3f", "of the words hidden in the dev texts"),
    Column("perplexity", "perplexity", ".3g", "of the same words"),
    Column(
        "samples_per_second",
        "samples/s",
        ".0f",
        "rows trained on by the seconds spent in training steps, each cell by itself and one after another, so "
        "whatever else the machine did is in it",
    ),
    Column(
        "peak_memory_mb",
        "peak memory, MB",
        ",.0f",
        "(2^20 bytes) of a training step on the longest batch: from the CUDA allocator on a GPU; else simulated, with "
        "what a GPU would run fused counted fused",
    ),
    Column("trainable_parameters", "trained parameters", ",.0f"),
    Column("learning_rate", "learning rate", "g", "the peak of its schedule"),
    Column("train_seconds", "seconds", ",.0f", "spent in training steps"),
)


class Variant:
    """What a comparison has of one variant.

    Attributes:
        cells: one a seed.
        runs: what was measured, of those that are finished.
    """

    def __init__(self, cells: Sequence[Cell]) -> None:
        self.cells = cells
        self.runs = [metrics for cell in cells if (metrics := cell.metrics())]

    @property
    def name(self) -> str:
        """As written, or the name of its row in the report's tables."""
        row = self.cells[0].row
        return self.cells[0].variant if row is None else suites.report_row(row).title

    @property
    def method(self) -> str:
        """Its method's title."""
        cell = self.cells[0]
        return ZERO_SHOT if cell.method == ZERO_SHOT else get_method(cell.method, cell.values["settings"]).title

    @property
    def seeds(self) -> str:
        """How many are finished."""
        return f"{len(self.runs)}" if len(self.runs) == len(self.cells) else f"{len(self.runs)} of {len(self.cells)}"

    def values(self, key: str) -> list[float]:
        return [metrics[key] for metrics in self.runs if metrics.get(key) is not None]

    def answers(self) -> dict[int | None, np.ndarray]:
        """By seed, of each dev row whether its class was told `(rows,)`; empty where that was not kept."""
        kept = {cell.seed: found for cell in self.cells if (found := cell.predictions())}
        return {seed: np.equal(found["labels"], found["predictions"]) for seed, found in kept.items()}

    def interval(self) -> tuple[float, float] | None:
        """Of its accuracy; None where rows do not tell."""
        answers = list(self.answers().values())
        return statistics.interval(np.stack(answers)) if answers else None


def variants(cells: Iterable[Cell]) -> list[Variant]:
    """The variants that cells are of, in their order."""
    grouped: dict[str, list[Cell]] = {}
    for cell in cells:
        grouped.setdefault(cell.variant, []).append(cell)
    return [Variant(group) for group in grouped.values()]


def table(cells: Sequence[Cell]) -> list[list[str]]:
    """The report's table, its header first: the columns that any cell has, a row a variant."""
    compared = variants(cells)
    columns = _columns(compared)
    several = any(len(variant.cells) > 1 for variant in compared)
    rows = [["method", "variant", *(["seeds"] if several else []), *(column.title for column in columns)]]
    for variant in compared:
        own = variant.cells[0].variant.partition(":")[2] or "-"
        shown = [_show(variant, column) for column in columns]
        rows.append([variant.method, own, *([variant.seeds] if several else []), *shown])
    return rows


def report(plan: Plan, *, pictures: bool) -> list[Block]:
    """The report, without its title; `pictures`: with them."""
    compared = variants(plan.results)
    rows = table(plan.results)
    parts: list[Block] = [Table(rows, numbers=len(rows[0]) - 2)]
    parts += _beside_the_report(compared)
    parts += _orderings(compared)
    if pictures:
        parts += _trade_offs(compared)
        parts += _training_curves(compared)
    if "figure5" in plan.suites:
        parts += _lags(compared)
    parts += _rates(plan)
    parts += _estimates(compared)
    failed = [f"{cell.name}: {error}" for cell in plan.cells if (error := cell.error())]
    waiting = [cell.name for cell in plan.cells if cell.state == "waiting"]
    for title, items in (("Failed", failed), ("Not run yet", waiting)):
        if items:
            parts += [Heading(title), Items(items)]
    return [*parts, *_where_and_how(plan, compared)]


def versions(metrics: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in metrics.get("versions", {}).items())


def _columns(compared: Iterable[Variant]) -> list[Column]:
    """The columns of which any variant has a value: metrics first, in the order of their problem."""
    compared = list(compared)
    runs = [metrics for variant in compared for metrics in variant.runs]
    problems = [get_problem(metrics.get("problem_type", CLASSIFICATION.name)) for metrics in runs]  # zero-shot: none
    metrics_first = list(dict.fromkeys(name for problem in problems for name in problem.metrics))
    columns = sorted(COLUMNS, key=lambda column: (*metrics_first, column.key).index(column.key))
    return [column for column in columns if any(variant.values(column.key) for variant in compared)]


def _show(variant: Variant, column: Column) -> str:
    """A variant's figure: an accuracy with its interval where rows tell it."""
    values = variant.values(column.key)
    if column.key == _ACCURACY and values and (ends := variant.interval()):
        return f"{plain.mean(values):.3f} ({ends[0]:.3f} to {ends[1]:.3f})"
    return column.show(values)


def _beside_the_report(compared: Sequence[Variant]) -> Iterator[Block]:
    """The figures of the report's own tables beside ours."""
    own = [variant for variant in compared if variant.cells[0].row and variant.runs]
    if not own:
        return
    header = ["row"]
    for measure in ("accuracy, %", "F1, %", "memory, MB", "samples/s"):
        header += [f"{measure}: report", "here"]
    rows = [header]
    for variant in own:
        row = suites.report_row(variant.cells[0].row or "")
        theirs = [" / ".join(f"{value:.2f}" for value in row.accuracy)]
        theirs += [_given(row.f1, ".2f"), _given(row.memory_mb, ",.0f"), _given(row.samples_per_second, ".1f")]
        ours = [_mean(variant, "accuracy", 100, ".2f"), _mean(variant, "f1", 100, ".2f")]
        ours += [_mean(variant, "peak_memory_mb", 1, ",.0f"), _mean(variant, "samples_per_second", 1, ".1f")]
        rows.append([variant.name, *(text for pair in zip(theirs, ours) for text in pair)])
    yield Heading("Beside the report's figures")
    yield Text(
        f"The report's are of {suites.measured_with()}, on its machine; two where its own tables differ. Ours are of "
        "the model, the data and the machine below, so the orders compare, not the sizes."
    )
    yield Table(rows, numbers=len(header) - 1)


def _given(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _mean(variant: Variant, key: str, factor: float, form: str) -> str:
    values = variant.values(key)
    return format(factor * plain.mean(values), form) if values else "-"


def _orderings(compared: Sequence[Variant]) -> Iterator[Block]:
    """Which of the report's orders are seen here."""
    by_row = {variant.cells[0].row: variant for variant in compared if variant.runs}
    rows = [*_accuracy_orders(by_row), *_measured_orders(by_row)]
    if not rows:
        return
    counts = [f"{sum(row[-1] == word for row in rows)} {word}" for word in _VERDICTS]
    yield Heading("The report's orderings")
    yield Text(f"{', '.join(counts)}.")
    yield Table([["measure", "the report has", "here", "p", "verdict"], *rows])
    yield Text(
        "Accuracies: the difference with its 95 % interval, by paired tests on the same dev rows (McNemar's exact test "
        "with one seed, else a t test whose error counts seeds and rows); p is corrected for the number of orderings "
        f"(Holm), and {statistics.UNDECIDED} is what has p from {statistics.LEVEL:g}. Memory and speed: seen where "
        "every seed of the one is on the report's side of every seed of the other; one seed is one timing."
    )


_VERDICTS = (statistics.SEEN, statistics.NOT_SEEN, statistics.UNDECIDED)


def _accuracy_orders(by_row: Mapping[str | None, Variant]) -> list[list[str]]:
    found = []
    for first, second in suites.orderings("accuracy"):
        if first not in by_row or second not in by_row:
            continue
        one, other = by_row[first], by_row[second]
        ours, theirs = one.answers(), other.answers()
        if seeds := [seed for seed in ours if seed in theirs]:
            compared = statistics.compare_pair(
                np.stack([ours[seed] for seed in seeds]), np.stack([theirs[seed] for seed in seeds])
            )
            found.append((f"{one.name} above {other.name}", compared))
    corrected = statistics.holm([difference.p for _, difference in found])
    return [
        [
            "accuracy",
            text,
            f"{difference.mean:+.3f} ({difference.low:+.3f} to {difference.high:+.3f})",
            f"{p:.3f}",
            statistics.verdict(difference.mean, p),
        ]
        for (text, difference), p in zip(found, corrected)
    ]


def _measured_orders(by_row: Mapping[str | None, Variant]) -> Iterator[list[str]]:
    for measure, key, title, word, sign in (
        ("memory_mb", "peak_memory_mb", "memory", "below", -1),
        ("samples_per_second", "samples_per_second", "samples/s", "above", 1),
    ):
        for first, second in suites.orderings(measure):
            if first in by_row and second in by_row:
                one, other = by_row[first], by_row[second]
                ours, theirs = one.values(key), other.values(key)
                if ours and theirs:
                    verdict = statistics.verdict_of_ranges([sign * v for v in ours], [sign * v for v in theirs])
                    here = f"{plain.mean(ours):,.0f} and {plain.mean(theirs):,.0f}"
                    yield [title, f"{one.name} {word} {other.name}", here, "-", verdict]


def _trade_offs(compared: Sequence[Variant]) -> Iterator[Block]:
    """Pictures of the metric to look at against memory and against speed."""
    metric = next((column for column in _columns(compared) if column.key in TITLES), None)
    if metric is None:
        return
    for key, name, x_title in (
        ("peak_memory_mb", "memory", "peak memory of a training step, MB"),
        ("samples_per_second", "speed", "samples a second"),
    ):
        places = [
            figures.Place(
                variant.name,
                plain.mean(values),
                plain.mean(variant.values(metric.key)),
                variant.interval() if metric.key == _ACCURACY else None,
            )
            for variant in compared
            if (values := [value for value in variant.values(key) if value > 0]) and variant.values(metric.key)
        ]
        if places:
            best = max(places, key=lambda place: place.y)
            if name == "memory":
                yield Heading(f"{_sentence(metric.title)} against memory and speed")
            yield Figure(
                f"{metric.key}-{name}",
                f"{_sentence(metric.title)} on the dev rows against {x_title}, of {len(places)} variants"
                f"{', with 95 % intervals' if metric.key == _ACCURACY else ''}. Highest: {best.name}, {best.y:.3f}.",
                figures.scatter(places, x_title, f"dev {metric.title}"),
            )


def _sentence(text: str) -> str:
    """A text with which a sentence may begin."""
    return text[0].upper() + text[1:]


def _training_curves(compared: Sequence[Variant]) -> Iterator[Block]:
    """Pictures of what was logged while training, of each variant's first seed."""
    kept = {variant.name: found for variant in compared if (found := variant.cells[0].curves())}
    names = list(dict.fromkeys(name for found in kept.values() for name in found))
    if names:
        yield Heading("Training curves")
        yield Text("As logged, nothing smoothed; of the first seed.")
    for name in names:
        drawn = {variant: found[name] for variant, found in kept.items() if found.get(name)}
        ends = ", ".join(f"{variant} {points[-1][1]:.3f}" for variant, points in drawn.items())
        yield Figure(
            name.replace(" ", "-"),
            f"{_sentence(name)} over the steps, unsmoothed. Last values: {ends}.",
            figures.curves(drawn, name),
        )


def _lags(compared: Sequence[Variant]) -> Iterator[Block]:
    """How many steps LoRA is behind the others."""
    kept = {variant.cells[0].row: (variant.name, found) for variant in compared if (found := variant.cells[0].curves())}
    if "lora" not in kept or len(kept) < 2:
        return
    _, slow = kept.pop("lora")
    measures = [name for name in slow if name.startswith("dev ")]
    rows = [["LoRA behind", *(f"by {name}, steps" for name in measures)]]
    for other, fast in kept.values():
        lags = [statistics.lag(_rising(name, slow[name]), _rising(name, fast[name])) for name in measures]
        rows.append([other, *("-" if lag is None else f"{lag:+.0f}" for lag in lags)])
    steps = next(iter(slow.values()))[-1][0]
    yield Heading("LoRA's lag")
    yield Text(
        f"Steps, of {steps:,}, that LoRA comes later to what the other had reached: the median over 20 levels that "
        "both curves of the first seed pass through; below 0 LoRA is ahead, - where they have none in common."
    )
    yield Table(rows, numbers=len(measures))


def _rising(name: str, points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """A curve that rises as it gets better."""
    sign = -1 if name in (f"dev {LOSS}", "dev mse", "dev perplexity") else 1
    return [(step, sign * value) for step, value in points]


def _rates(plan: Plan) -> Iterator[Block]:
    """What was tried to find learning rates."""
    rows = []
    for variant in variants(plan.searches):
        taken = {cell.values["learning_rate"] for cell in plan.results if cell.variant == variant.cells[0].variant}
        for cell in variant.cells:
            metrics, rate = cell.metrics(), cell.values["learning_rate"]
            problem = get_problem((metrics or {}).get("problem_type", CLASSIFICATION.name))
            shown = cell.state if metrics is None else f"{metrics[problem.primary]:.3f}"
            rows.append([cell.variant, f"{rate:g}", shown, "taken" if rate in taken else ""])
    if rows:
        yield Heading("Learning rates")
        yield Text(
            "Tried on a slice of the training rows, and measured on another slice of them; the dev rows had no part in "
            "it."
        )
        yield Table([["variant", "learning rate", "on the slice", ""], *rows])


def _estimates(compared: Sequence[Variant]) -> Iterator[Block]:
    """What the estimates of memory before a run are worth."""
    rows, errors = [], []
    for variant in compared:
        for metrics in variant.runs[:1]:
            estimate, peak = metrics.get("estimated_memory_mb"), metrics.get("peak_memory_mb")
            if estimate and peak and metrics["peak_memory_source"] == "CUDA allocator":
                errors.append(estimate / peak - 1)
                rows.append([variant.name, f"{estimate:,.0f}", f"{peak:,.0f}", f"{errors[-1]:+.1%}"])
            elif estimate and metrics.get("peak_rss_mb"):
                rows.append([variant.name, f"{estimate:,.0f}", f"{metrics['peak_rss_mb']:,.0f}", "-"])
    if not rows:
        return
    yield Heading("Estimated memory")
    if errors:
        worst = max(errors, key=abs)
        yield Text(
            f"What --dry-run says before a run, against the allocator's peak: {plain.mean(errors):+.1%} on average, at "
            f"most {worst:+.1%}."
        )
    else:
        yield Text(
            "What --dry-run says before a run, of a training step on a GPU. Without one there is no allocator to "
            "measure it by: the process's peak holds Python, its libraries, the data and what evaluating took as well."
        )
    yield Table([["variant", "estimated, MB", "measured, MB", "error"], *rows], numbers=3)


def _where_and_how(plan: Plan, compared: Sequence[Variant]) -> Iterator[Block]:
    """Machine, versions, commands, and how figures were come by."""
    finished = [metrics for variant in compared for metrics in variant.runs]
    devices = [_device(metrics) for metrics in finished]
    yield Heading("Where and how")
    described = (
        ("model", [_text(metrics, "model") for metrics in finished]),
        ("data", [_data(metrics) for metrics in finished]),
        ("device", devices),
        ("versions", [versions(metrics) for metrics in finished]),
    )
    items = [f"{name}: {value}" for name, values in described for value in dict.fromkeys(values) if value]
    if items:
        yield Items(items)
    yield Code(plan.commands)
    notes = [f"{column.title}: {column.note}." for column in _columns(compared) if column.note]
    chosen = [cell for cell in plan.results if (cell.metrics() or {}).get("best_step") is not None]
    if chosen:
        names = dict.fromkeys(f"{cell.variant} (by {cell.values['metric']})" for cell in chosen)
        notes.append(
            "Of these the best checkpoint was taken, by the dev rows that it is measured on, which makes them look "
            f"better than on new rows: {', '.join(names)}."
        )
    if len(set(filter(None, devices))) > 1:
        notes.append(
            "Not all cells ran on the same device with as many threads: speeds and seconds compare only among those "
            "that did. `results.csv` has device and threads of each."
        )
    if any(variant.interval() for variant in compared):
        notes.append(
            "In brackets: the 95 % interval over new rows (Wilson's), with several seeds over new rows and new seeds."
        )
    if any(len(variant.cells) > 1 for variant in compared):
        notes.append("±: the standard deviation of one seed (of a sample) around the mean.")
    if notes:
        yield Items(notes)


def _text(metrics: Mapping[str, Any], name: str) -> str:
    value = metrics.get(name)
    return "" if value is None else str(value)


def _device(metrics: Mapping[str, Any]) -> str:
    """Where a cell ran; nothing of a zero-shot row, whose speed is not measured."""
    threads = metrics.get("threads")
    return _text(metrics, "device") + ("" if threads is None else f", CPU threads: {threads}")


def _data(metrics: Mapping[str, Any]) -> str:
    if "train_rows" not in metrics:  # of a zero-shot row
        return ""
    return f"{metrics['data']}, {metrics['train_rows']:,} rows to train on, {metrics['dev_rows']:,} to measure on"
