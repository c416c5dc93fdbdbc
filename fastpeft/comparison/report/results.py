"""The results of a comparison's variants, and their table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import mean, stdev

import numpy as np

from fastpeft.comparison import significance
from fastpeft.comparison.cells import Cell
from fastpeft.comparison.report.document import Table
from fastpeft.comparison.suites import paper_accuracy
from fastpeft.data.problems import METRICS, get_problem
from fastpeft.training.results import baseline

MARK = "†"  # after the name of a variant with a warning


@dataclass(frozen=True)
class Column:
    """A column of the table: a key of `metrics.json`, its title and format, and how it is measured."""

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
        return f"{mean(values):{self.format}} ± {stdev(values):{self.format}}"


COLUMNS = (
    *(Column(key, each.column or each.title, each.format, each.note) for key, each in METRICS.items()),
    Column(
        "samples_per_second",
        "samples/s",
        ".1f",
        "rows per second of training steps; other work on the machine slows them",
    ),
    Column(
        "peak_memory_mb",
        "peak memory, MB",
        ",.0f",
        "of a training step on the longest batch, 1 MB is 2^20 bytes: by the CUDA allocator on a GPU, else simulated",
    ),
    Column("trainable_parameters", "trainable parameters", ",.0f"),
    Column("learning_rate", "learning rate", "g", "the peak of its schedule"),
    Column("train_seconds", "seconds", ",.0f", "in training steps; for a resumed run, only since it was resumed"),
)

_MEMORY_TITLES = {"simulated": "simulated step peak, MB", "CUDA allocator": "CUDA allocator peak, MB"}  # by the source


class Variant:
    """One variant of a comparison and its results.

    Attributes:
        name: as written; it ends in `MARK` where a warning is not of all variants.
        cells: one a seed.
        runs: `metrics.json` of the finished cells.
        warnings: the warnings of these, each with the seeds that have it.
    """

    def __init__(self, cells: Sequence[Cell]) -> None:
        self.name, self.cells = cells[0].variant, cells
        self.runs: list[dict] = []
        self.warnings: dict[str, list[int | None]] = {}
        for cell in cells:
            if metrics := cell.metrics():
                self.runs.append(metrics)
                for sentence in (*metrics.get("warnings", ()), *_beside(metrics)):
                    self.warnings.setdefault(sentence, []).append(cell.seed)

    def values(self, key: str) -> list[float]:
        return [metrics[key] for metrics in self.runs if metrics.get(key) is not None]

    @cached_property
    def tested(self) -> str | None:
        """The metric that has an interval and paired tests; None where a finished cell has no scores of rows in it."""
        metrics = {found and found[0] for found in self._scores.values()}
        return metrics.pop() if len(metrics) == 1 else None

    @cached_property
    def row_scores(self) -> dict[int | None, np.ndarray]:
        """By seed, the score of each dev row in the tested metric `(rows,)`; empty where there is none."""
        return {seed: found[1] for seed, found in self._scores.items() if found and self.tested}

    @cached_property
    def words(self) -> tuple[int, ...] | None:
        """How many words its metrics are of, as `Cell.words` has it."""
        return next((found for cell in self.cells if (found := cell.words())), None)

    @cached_property
    def _scores(self) -> dict[int | None, tuple[str, np.ndarray] | None]:
        return {cell.seed: cell.row_scores() for cell in self.cells if cell.metrics()}

    @property
    def labels(self) -> np.ndarray:
        """The class of each dev row `(rows,)`, of a variant whose accuracy is tested."""
        return np.array(next(found["labels"] for cell in self.cells if (found := cell.predictions())))

    @cached_property
    def interval(self) -> tuple[float, float] | None:
        """The interval of its tested metric; None where it has none, or seeds were measured on different rows."""
        scores = list(self.row_scores.values())
        return significance.interval(np.stack(scores)) if len({each.shape for each in scores}) == 1 else None

    def above(self, other: Variant) -> tuple[significance.Difference, int] | None:
        """How far its tested metric is above another's, paired by dev row and seed, and the number of seeds.

        A variant without seeds is paired with every seed of the other. None where either has no such metric, or they
        have different ones or other rows or words, as `max_length` leaves some out.
        """
        ours, theirs = self.row_scores, other.row_scores
        seeds = [seed for seed in {**ours, **theirs} if all({seed, None} & scores.keys() for scores in (ours, theirs))]
        shapes = {scores.shape for scores in (*ours.values(), *theirs.values())}
        if not seeds or self.tested != other.tested or len(shapes) > 1:
            return None
        if None not in (self.words, other.words) and self.words != other.words:
            return None
        first, second = (
            np.stack([scores[seed if seed in scores else None] for seed in seeds]) for scores in (ours, theirs)
        )
        return significance.compare_pair(first, second), len(seeds) - (None in seeds)


def _beside(metrics: dict) -> list[str]:
    """The warning of a speed that was measured beside other cells."""
    if (jobs := metrics.get("jobs", 1)) < 2:
        return []
    told = f"Up to {jobs} cells ran at once on the machine."
    return [f"{told} Compare speed and seconds only with cells that ran in the same way."]


def variants(cells: Iterable[Cell]) -> list[Variant]:
    """The variants of some cells, in their order."""
    grouped: dict[str, list[Cell]] = {}
    for cell in cells:
        grouped.setdefault(cell.variant, []).append(cell)
    made = [Variant(group) for group in grouped.values()]
    of_all = _of_all(made)
    for variant in made:
        variant.name += f" {MARK}" if variant.warnings.keys() - of_all else ""
    return made


def warnings(compared: Sequence[Variant]) -> list[str]:
    """The warnings of runs, each after the names of the variants that have it, and the seeds where only some do."""
    named: dict[str, list[str]] = {}
    for variant in compared:
        for sentence, seeds in variant.warnings.items():
            some = f" (seed{'s' * (len(seeds) > 1)} {' and '.join(map(str, seeds))})"
            named.setdefault(sentence, []).append(variant.name + some * (len(seeds) < len(variant.runs)))
    of_all = _of_all(compared)
    return [
        f"{'all variants' if sentence in of_all else ', '.join(names)}: {sentence}" for sentence, names in named.items()
    ]


def _of_all(compared: Sequence[Variant]) -> set[str]:
    """Warnings of every trained run of several variants, which come from the data."""
    trained = [variant for variant in compared if variant.runs and variant.cells[0].seed is not None]
    whole = [{text for text, seeds in each.warnings.items() if len(seeds) == len(each.runs)} for each in trained]
    return set.intersection(*whole) if len(whole) > 1 else set()


def table(compared: Sequence[Variant], suites: Sequence[str] = ()) -> Table:
    """The main table: a row a variant, the columns that any cell has, the main metric first.

    Of `suites` it has the paper's accuracy too. The last row has the metrics of always answering the most frequent
    class of the training rows, where these are known.
    """
    shown = columns(compared)
    header = ["method", *(column.title for column in shown), *["seeds"] * any(len(v.cells) > 1 for v in compared)]
    theirs = [paper_accuracy(variant.cells[0].variant) for variant in compared]
    rows = [header + ["accuracy in the paper, %"] * bool(suites)]
    for variant, accuracy in zip(compared, theirs):
        finished, seeds = len(variant.runs), len(variant.cells)
        counted = f"{finished}" if finished == seeds else f"{finished} of {seeds}"
        row = [variant.name, *(show(variant, column) for column in shown), counted][: len(header)]
        rows.append(row + [accuracy] * bool(suites))
    always = [found for variant in compared for run in variant.runs if (found := run.get("most_frequent_class"))]
    if always:  # the row to be better than
        row = [column.show([always[0][column.key]] if column.key in always[0] else []) for column in shown]
        name = f"{baseline(always[0])} ({always[0]['class']})"
        rows.append([name, *row, *["-"] * (len(rows[0]) - 1 - len(row))])
    return Table(rows, range(1, len(rows[0])), "Results, a row a variant")


def main_metric(compared: Iterable[Variant]) -> Column | None:
    """The column of the metric to look at first; None where no cell has one."""
    return next((column for column in columns(compared) if column.key in METRICS), None)


def columns(compared: Iterable[Variant]) -> list[Column]:
    """The columns that have a value: metrics first, in the order of their problem."""
    compared = list(compared)
    runs = [metrics for variant in compared for metrics in variant.runs]
    problems = [get_problem(metrics["problem_type"]) for metrics in runs]
    # what is tested comes first, so that the chart and the first sentence are of one metric
    tested = [variant.tested for variant in compared if variant.tested]
    metrics_first = list(dict.fromkeys([*tested, *(name for problem in problems for name in problem.metrics)]))
    ordered = sorted(COLUMNS, key=lambda column: (*metrics_first, column.key).index(column.key))
    sources = {metrics.get("peak_memory_source") for metrics in runs if metrics.get("peak_memory_mb") is not None}
    if len(sources) == 1 and (measured := _MEMORY_TITLES.get(str(*sources))):
        ordered = [replace(each, title=measured) if each.key == "peak_memory_mb" else each for each in ordered]
    return [column for column in ordered if any(variant.values(column.key) for variant in compared)]


def show(variant: Variant, column: Column) -> str:
    """A variant's value in a column; the tested metric has its interval."""
    values = variant.values(column.key)
    if column.key == variant.tested and values and (ends := variant.interval):
        return f"{mean(values):.3f} ({ends[0]:.3f} to {ends[1]:.3f})"
    return column.show(values)
