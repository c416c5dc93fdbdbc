"""The sections of a report, from its title to the versions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import Any

from fastpeft.comparison import suites
from fastpeft.comparison.cells import Cell
from fastpeft.comparison.plan import Plan
from fastpeft.comparison.report import document, errors, figures, paired_tests
from fastpeft.comparison.report.document import Block, Code, Figure, Heading, Items, Strong, Table, Text
from fastpeft.comparison.report.results import MARK, Variant, columns, main_metric, table, variants, warnings
from fastpeft.comparison.variants import ZERO_SHOT
from fastpeft.data.problems import TITLES, best_of, get_problem, title_of
from fastpeft.methods.registry import get_method

_NAMED = 4  # the most methods in a title


def title(plan: Plan) -> str:
    """The suites or the methods that were compared, and the data."""
    data = _short(plan.results[0].values["data"])
    if plan.suites:
        return f"{'; '.join(suites.get_suite(name).title for name in plan.suites)}, on {data}"
    names = list(dict.fromkeys(map(_method, plan.results)))
    if len(names) > _NAMED:
        names[_NAMED - 1 :] = [f"{len(names) - _NAMED + 1} more"]
    return f"Comparison of {document.listed(names)} on {data}"


def report(plan: Plan, *, pictures: bool) -> list[Block]:
    """The report without its title, and with its pictures only if `pictures`."""
    compared = variants(plan.results)
    tested = paired_tests.all_pairs(compared)
    first, *others = opening(compared, tested)
    parts: list[Block] = [Strong(first), *map(Text, others), Text(_summary(plan, compared))]
    parts += _trade_off(compared) if pictures else ()
    parts += [table(compared, plan.suites)]
    parts += _list("Warnings", warnings(compared))
    parts += paired_tests.report(tested)
    parts += _training_curves(compared) if pictures else ()
    parts += errors.classes(compared)
    parts += _rates(plan)
    parts += _list("Failed", [f"{cell.name}: {error}" for cell in plan.cells if (error := cell.error())])
    parts += _list("Not run yet", [cell.name for cell in plan.cells if cell.state == "waiting"])
    return [*parts, *_where_and_how(plan, compared)]


def opening(compared: Sequence[Variant], tested: Sequence[paired_tests.Pair]) -> list[str]:
    """The first sentences: whether any difference is significant, what does not compare, what tests cannot show."""
    told = (paired_tests.verdict(compared, tested), paired_tests.other_words(compared), paired_tests.limits(tested))
    return list(filter(None, told))


def _list(heading: str, items: Sequence[str]) -> list[Block]:
    return [Heading(heading), Items(items)] if items else []


def _method(cell: Cell) -> str:
    return ZERO_SHOT if cell.method == ZERO_SHOT else get_method(cell.method, cell.values["settings"]).title


def _summary(plan: Plan, compared: Sequence[Variant]) -> str:
    """The number of variants and seeds, the model and the data."""
    models = dict.fromkeys(_short(cell.values["model"]) for cell in plan.results)
    seeds = sorted({len(variant.cells) for variant in compared if variant.cells[0].method != ZERO_SHOT})
    counted = " or ".join(f"{number} seed{'s' * (number > 1)}" for number in seeds)
    data = dict.fromkeys(filter(None, (_data(run) for variant in compared for run in variant.runs)))
    return (
        f"{len(compared)} variant{'s' * (len(compared) > 1)}{f', {counted} each' if counted else ''}. Model: "
        f"{' and '.join(models)}. Data: {' and '.join(data) or _short(plan.results[0].values['data'])}."
    )


def _short(name: str) -> str:
    """The name of a model or of data, or the last part of its path."""
    return Path(name).name if Path(name).is_absolute() else name


def versions(metrics: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in metrics.get("versions", {}).items())


def _sentence(text: str) -> str:
    """A text with a capital first letter."""
    return text[0].upper() + text[1:]


def _trade_off(compared: Sequence[Variant]) -> Iterator[Block]:
    """The chart of the main metric over memory, and of the time by the size of marks."""
    metric = main_metric(compared)
    if metric is None:
        return
    points = [
        figures.Point(
            index,
            variant.name,
            mean(memory),
            mean(scores),
            variant.interval if metric.key == variant.tested else None,
            1 / mean(speeds) if (speeds := variant.values("samples_per_second")) and min(speeds) > 0 else None,
        )
        for index, variant in enumerate(compared)
        if (memory := [value for value in variant.values("peak_memory_mb") if value > 0])
        and (scores := [value for value in variant.values(metric.key) if math.isfinite(value)])
    ]
    if points:
        memory_title = next(column.title for column in columns(compared) if column.key == "peak_memory_mb")
        yield Figure(
            f"{metric.key}-memory",
            f"{_sentence(TITLES[metric.key])} on the dev rows over memory: {len(points)} variants.",
            "Left is less memory. The area of a mark is the time of training; lines are 95 % intervals.",
            figures.scatter(points, memory_title, f"dev {metric.title}"),
        )


def _training_curves(compared: Sequence[Variant]) -> Iterator[Block]:
    """Charts of the values logged in training, over all seeds."""
    drawn: dict[str, list[figures.Curve]] = {}
    for index, variant in enumerate(compared):
        seeds = [found for cell in variant.cells if (found := cell.curves())]
        for name in dict.fromkeys(name for seed in seeds for name in seed):
            if steps := figures.over_seeds(seed[name] for seed in seeds if name in seed):
                drawn.setdefault(name, []).append(figures.Curve(index, variant.name, steps))
    if drawn:
        yield Heading("Training curves")
        yield Text(
            "A line is the mean over seeds, a band their range. Of more than "
            f"{figures.MOST_POINTS} steps neighbours are joined: their mean, and their range."
        )
    for name, lines in drawn.items():
        part, _, measure = name.rpartition(" ")
        axis = f"{part} {title_of(measure)}".strip()
        alt = f"{_sentence(axis)} over the steps: {len(lines)} curve{'s' * (len(lines) > 1)}."
        (low, lowest), (high, highest) = (
            best((line.steps[-1].mean, line.name) for line in lines) for best in (min, max)
        )
        told = f"Last values: from {low:.3f} ({lowest}) to {high:.3f} ({highest})."
        yield Figure(name.replace(" ", "-"), alt, told, figures.curves(lines, axis))


def _rates(plan: Plan) -> Iterator[Block]:
    """The learning rates that were tried, which were taken, and which of the best are at an edge of those tried."""
    taken = {cell.variant: (cell.metrics() or {}).get("learning_rate") for cell in plan.results}
    rows, at_the_edge = [["variant", "learning rate", "on the slice", ""]], []
    for name, group in groupby(plan.searches, lambda cell: cell.variant):
        scores, cells, metric = [], list(group), ""
        for cell in cells:
            rate, shown = cell.values["learning_rate"], cell.state
            if metrics := cell.metrics():
                metric = get_problem(metrics["problem_type"]).chosen_by
                scores.append((rate, metrics[metric]))
                shown = f"{metrics[metric]:.3f}"
            rows.append([name, f"{rate:g}", shown, "taken" if rate == taken.get(name) else ""])
        tried = [cell.values["learning_rate"] for cell in cells]
        best = best_of(scores, metric) if len(scores) == len(tried) else None
        if {min(tried), max(tried)} & {best, taken.get(name)}:
            at_the_edge.append(name)
    if len(rows) > 1:
        yield Heading("Learning rates")
        yield Text(
            "Trained on a slice of the training rows, and measured on another slice of them. The dev rows had no part. "
            "The best rate is taken where it beats the recipe's, the first, by a paired test (p corrected for the "
            "number of other rates), else the recipe's; of numbers, which have no test, the best."
        )
        if at_the_edge:
            yield Strong(
                "These did best at the lowest or the highest rate that was tried, so a better rate may lie beyond, and "
                f"the method may reach more than is shown here: {', '.join(at_the_edge)}."
            )
        yield Table(rows, range(1, 3), "Learning rates that were tried")


def _where_and_how(plan: Plan, compared: Sequence[Variant]) -> Iterator[Block]:
    """Machine, versions and commands, and how values were measured."""
    finished = [metrics for variant in compared for metrics in variant.runs]
    yield Heading("Where and how")
    described = (
        ("model", [_text(metrics, "model") for metrics in finished]),
        ("data", [_data(metrics) for metrics in finished]),
        ("device", [_device(metrics) for metrics in finished]),
        ("compute dtype", _by_variant(compared, "compute_dtype")),
        ("steps", _by_variant(compared, "steps")),
        ("versions", [versions(metrics) for metrics in finished]),
    )
    items = [f"{name}: {value}" for name, values in described for value in dict.fromkeys(values) if value]
    yield Code(plan.commands)
    yield Items([*items, *_notes(plan, compared)])


def _notes(plan: Plan, compared: Sequence[Variant]) -> list[str]:
    """How values were measured, and what does not compare."""
    notes = [f"{column.title}: {column.note}." for column in columns(compared) if column.note]
    chosen = [cell for cell in plan.results if (cell.metrics() or {}).get("best_step") is not None]
    if chosen:
        names = dict.fromkeys(f"{cell.variant} (by {cell.values['metric']})" for cell in chosen)
        notes.append(
            "These variants kept the checkpoint that was best on the dev rows, so their results on the dev rows are "
            f"optimistic: {', '.join(names)}."
        )
    if len({device for variant in compared for run in variant.runs if (device := _device(run))}) > 1:
        notes.append(
            "Not all cells ran on the same device with as many threads. Compare speeds and seconds only among those "
            "that did; results.csv has the device and threads of each."
        )
    if plan.suites:
        notes.append(
            f"The paper measured {suites.MEASURED_WITH}; it has two values where its tables differ. Rankings compare; "
            "absolute numbers do not."
        )
    if any(variant.interval for variant in compared):
        notes.append(
            "In brackets: the 95 % confidence interval. With one seed it covers the sampling of rows (for accuracy, "
            "Wilson's interval); with several seeds, that of rows and seeds."
        )
    if any(variant.name.endswith(MARK) for variant in compared):
        notes.append(f"{MARK}: of this variant alone, or of some, there is a warning.")
    if any(len(variant.cells) > 1 for variant in compared):
        notes.append("±: the standard deviation of one seed (of a sample) around the mean.")
    return notes


def _by_variant(compared: Sequence[Variant], name: str) -> list[str]:
    """What runs have as `name`; where that differs, which variants have what."""
    found: dict[str, list[str]] = {}
    for variant in compared:
        for value in dict.fromkeys(_text(metrics, name) for metrics in variant.runs):
            found.setdefault(value, []).append(variant.name)
    found.pop("", None)  # zero-shot
    return list(found) if len(found) < 2 else [f"{value} ({', '.join(names)})" for value, names in found.items()]


def _text(metrics: Mapping[str, Any], name: str) -> str:
    value = metrics.get(name)
    return "" if value is None else str(value)


def _device(metrics: Mapping[str, Any]) -> str:
    """Where a cell ran; empty for zero-shot, whose speed is not measured."""
    threads = metrics.get("threads")
    return _text(metrics, "device") + ("" if threads is None else f", CPU threads: {threads}")


def _data(metrics: Mapping[str, Any]) -> str:
    if "train_rows" not in metrics:  # zero-shot
        return ""
    return f"{_short(metrics['data'])}, {metrics['train_rows']:,} training rows, {metrics['dev_rows']:,} dev rows"
