"""The sections of a report, from its title to the versions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from fastpeft.comparison import suites
from fastpeft.comparison.cells import Cell
from fastpeft.comparison.plan import Plan
from fastpeft.comparison.report import classes, document, figures, mistakes, paired_tests, paper
from fastpeft.comparison.report.document import Block, Code, Figure, Heading, Items, PageOnly, Strong, Table, Text
from fastpeft.comparison.report.results import MARK, Variant, columns, main_metric, show, table, variants, warnings
from fastpeft.comparison.variants import ZERO_SHOT
from fastpeft.data.problems import TITLES, best_of, get_problem, title_of
from fastpeft.methods.registry import get_method

_NAMED = 4  # the most methods in a title


def title(plan: Plan) -> str:
    """The suites or the methods that were compared, and the data."""
    data = _short(plan.results[0].values["data"])
    if plan.suites:
        return f"{'; '.join(suites.get_suite(name).title for name in plan.suites)}, on {data}"
    return f"Comparison of {_few(list(dict.fromkeys(_method(cell) for cell in plan.results)))} on {data}"


def report(plan: Plan, *, pictures: bool) -> list[Block]:
    """The report without its title, and with its pictures only if `pictures`."""
    compared = variants(plan.results)
    tested = paired_tests.all_pairs(compared)
    first, *others = opening(compared, tested)
    parts: list[Block] = [Strong(first), *map(Text, others), Text(_summary(plan, compared))]
    if pictures:
        parts += _trade_off(compared)
    parts += [table(compared)]
    if warned := warnings(compared):
        parts += [Heading("Warnings"), Items(warned)]
    if pictures:
        parts += _training_curves(compared)
        parts += [PageOnly([*mistakes.matrices(compared), *mistakes.disagreements(compared)])]
    parts += classes.report(compared)
    parts += paper.figures_beside(compared)
    parts += paper.orderings(compared)
    parts += paired_tests.report(compared, tested)
    if "figure5" in plan.suites:
        parts += paper.lags(compared)
    parts += _rates(plan)
    parts += _estimates(compared)
    failed = [f"{cell.name}: {error}" for cell in plan.cells if (error := cell.error())]
    waiting = [cell.name for cell in plan.cells if cell.state == "waiting"]
    for heading, items in (("Failed", failed), ("Not run yet", waiting)):
        if items:
            parts += [Heading(heading), Items(items)]
    return [*parts, *_where_and_how(plan, compared)]


def opening(compared: Sequence[Variant], tested: Sequence[paired_tests.Pair]) -> list[str]:
    """The first sentences: whether any difference is significant, what does not compare, what tests cannot show."""
    told = (paired_tests.verdict(compared, tested), paired_tests.other_words(compared), paired_tests.limits(tested))
    return list(filter(None, told))


def _few(names: Sequence[str]) -> str:
    """The names, of many only the first."""
    shown = names if len(names) <= _NAMED else [*names[: _NAMED - 1], f"{len(names) - _NAMED + 1} more"]
    return document.listed(shown)


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


def _trade_off(compared: Sequence[Variant]) -> Iterator[Block]:
    """The chart of the main metric over memory, and of the time by the size of marks."""
    metric = main_metric(compared)
    if metric is None:
        return
    shown = columns(compared)
    points = [
        figures.Point(
            index,
            variant.name,
            mean(memory),
            mean(scores),
            variant.interval() if metric.key == variant.tested else None,
            1000 / mean(speeds) if (speeds := variant.values("samples_per_second")) and min(speeds) > 0 else None,
            [f"{column.title}: {show(variant, column)}" for column in shown if variant.values(column.key)],
        )
        for index, variant in enumerate(compared)
        if (memory := [value for value in variant.values("peak_memory_mb") if value > 0])
        and (scores := [value for value in variant.values(metric.key) if math.isfinite(value)])
    ]
    if points:
        memory_title = next(column.title for column in shown if column.key == "peak_memory_mb")
        notes = [
            "Up is better, left is less memory",
            *(["the larger a mark, the longer 1,000 training rows take"] if any(p.size for p in points) else []),
            *(["lines are 95 % intervals"] if any(point.interval for point in points) else []),
        ]
        yield Figure(
            f"{metric.key}-memory",
            f"{_sentence(TITLES[metric.key])} on the dev rows over memory: {len(points)} variants.",
            f"{'; '.join(notes)}.",
            figures.Scatter(points, memory_title, f"dev {metric.title}", "s for 1,000 rows"),
        )


def _sentence(text: str) -> str:
    """A text with a capital first letter."""
    return text[0].upper() + text[1:]


def _training_curves(compared: Sequence[Variant]) -> Iterator[Block]:
    """Charts of the values logged in training, over all seeds."""
    kept = [[found for cell in variant.cells if (found := cell.curves())] for variant in compared]
    drawn: dict[str, list[figures.Curve]] = {}
    longest = 0
    for index, (variant, seeds) in enumerate(zip(compared, kept)):
        for name in dict.fromkeys(name for seed in seeds for name in seed):
            lines = [seed[name] for seed in seeds if seed.get(name)]
            if steps := figures.over_seeds(lines):
                longest = max(longest, *map(len, lines))
                drawn.setdefault(name, []).append(figures.Curve(index, variant.name, steps, len(lines)))
    if drawn:
        yield Heading("Training curves")
        several = any(curve.seeds > 1 for curves in drawn.values() for curve in curves)
        told = "A line is the mean over seeds, a band their range." if several else "One seed for each variant."
        if longest > figures.MOST_POINTS:
            told += f" Of more than {figures.MOST_POINTS} steps neighbours are joined: their mean, and their range."
        yield Text(told)
    for name, curves in drawn.items():
        part, _, measure = name.rpartition(" ")
        title = f"{part} {title_of(measure)}".strip()
        ends = sorted((curve.steps[-1].mean, curve.name) for curve in curves)
        low, high = (f"{value:.3f} ({variant})" for value, variant in (ends[0], ends[-1]))
        last = f"from {low} to {high}" if ends[0][0] < ends[-1][0] else f"all {ends[0][0]:.3f}"
        yield Figure(
            name.replace(" ", "-"),
            f"{_sentence(title)} over the steps: {len(curves)} curve{'s' * (len(curves) > 1)}.",
            f"Last values: {low if len(ends) == 1 else last}.",
            figures.Curves(curves, title),
        )


def _rates(plan: Plan) -> Iterator[Block]:
    """The learning rates that were tried, and which of the best are the lowest or the highest of them."""
    searched = variants(plan.searches)
    if not searched:
        return
    taken = {variant.cells[0].variant: variant.values("learning_rate") for variant in variants(plan.results)}
    rows, at_the_edge = [], []
    for variant in searched:
        name = variant.cells[0].variant
        tried, is_at_the_edge = _tried(variant, taken[name])
        rows += tried
        if is_at_the_edge:
            at_the_edge.append(name)
    problems = {metrics["problem_type"] for variant in searched for metrics in variant.runs}
    yield Heading("Learning rates")
    yield Text(
        "Trained on a slice of the training rows, and measured on another slice of them. The dev rows had no part. "
        + (
            "The best rate is taken where it beats the recipe's, the first, by a paired test (p corrected for the "
            "number of other rates); else the recipe's."
            if all(get_problem(name).tested is not None for name in problems)
            else "The best rate is taken, untested: numbers have no paired test."
        )
    )
    if at_the_edge:
        yield Strong(
            f"{len(at_the_edge)} of {len(searched)} did best at the lowest or the highest rate that was tried, so "
            "a better rate may lie beyond, and the method may reach more than is shown here: "
            f"{', '.join(at_the_edge)}."
        )
    yield Table(
        [["variant", "learning rate", "on the slice", ""], *rows], range(1, 3), "Learning rates that were tried"
    )


def _tried(variant: Variant, taken: Sequence[float]) -> tuple[list[list[str]], bool]:
    """A row for each rate that a variant tried, and whether the best, or one taken, is the lowest or the highest."""
    tried = [cell.values["learning_rate"] for cell in variant.cells]
    edges = {min(tried): "taken, the lowest tried", max(tried): "taken, the highest tried"}
    rows, scores = [], []
    for cell, rate in zip(variant.cells, tried):
        shown = cell.state
        if metrics := cell.metrics():
            chosen_by = get_problem(metrics["problem_type"]).chosen_by
            scores.append((rate, metrics[chosen_by]))
            shown = f"{metrics[chosen_by]:.3f}"
        rows.append([cell.variant, f"{rate:g}", shown, edges.get(rate, "taken") if rate in taken else ""])
    best = {best_of(scores, chosen_by)} if len(scores) == len(tried) else set()
    return rows, not edges.keys().isdisjoint(best.union(taken))


def _estimates(compared: Sequence[Variant]) -> Iterator[Block]:
    """How far the estimates of memory were from what was measured."""
    allocated, resident, errors = [], [], []
    for variant in compared:
        for metrics in variant.runs[:1]:
            estimate, peak = metrics.get("estimated_memory_mb"), metrics.get("peak_memory_mb")
            if estimate and peak and metrics["peak_memory_source"] == "CUDA allocator":
                errors.append(estimate / peak - 1)
                allocated.append([variant.name, f"{estimate:,.0f}", f"{peak:,.0f}", f"{errors[-1]:+.1%}"])
            elif estimate and metrics.get("peak_rss_mb"):
                resident.append([variant.name, f"{estimate:,.0f}", f"{metrics['peak_rss_mb']:,.0f}"])
    if allocated or resident:
        yield Heading("Estimated memory")
    if allocated:
        worst = max(errors, key=abs)
        yield Text(
            f"The estimate of --dry-run against the allocator's peak: {mean(errors):+.1%} on average, at most "
            f"{worst:+.1%}."
        )
        yield Table(
            [["variant", "estimated, MB", "measured, MB", "error"], *allocated],
            range(1, 4),
            "Estimated and measured memory",
        )
    if resident:
        yield Text(
            "The estimate of --dry-run is of a training step on a GPU. Without a GPU no allocator measures that. "
            "The peak of the whole process is not the same: it holds Python, its libraries, the data and the "
            "evaluation too."
        )
        yield Table(
            [["variant", "estimated, MB", "resident peak of the process, MB"], *resident],
            range(1, 3),
            "Estimated memory and the process",
        )


def _where_and_how(plan: Plan, compared: Sequence[Variant]) -> Iterator[Block]:
    """Machine, versions and commands, and how values were measured."""
    finished = [metrics for variant in compared for metrics in variant.runs]
    yield Heading("Where and how")
    described = (
        ("model", [_text(metrics, "model") for metrics in finished]),
        ("data", [_data(metrics) for metrics in finished]),
        ("device", [_device(metrics) for metrics in finished]),
        ("compute dtype", _by_variant(compared, "compute_dtype")),
        ("versions", [versions(metrics) for metrics in finished]),
    )
    items = [f"{name}: {value}" for name, values in described for value in dict.fromkeys(values) if value]
    if items:
        yield Items(items)
    yield Code(plan.commands)
    if notes := _notes(plan, compared):
        yield Items(notes)


def _notes(plan: Plan, compared: Sequence[Variant]) -> list[str]:
    """How values were measured, and what does not compare."""
    finished = [metrics for variant in compared for metrics in variant.runs]
    notes = [f"{column.title}: {column.note}." for column in columns(compared) if column.note]
    chosen = [cell for cell in plan.results if (cell.metrics() or {}).get("best_step") is not None]
    if chosen:
        names = dict.fromkeys(f"{cell.variant} (by {cell.values['metric']})" for cell in chosen)
        notes.append(
            "These variants kept the checkpoint that was best on the dev rows, so their results on the dev rows are "
            f"optimistic: {', '.join(names)}."
        )
    if len(set(filter(None, map(_device, finished)))) > 1:
        notes.append(
            "Not all cells ran on the same device with as many threads. Compare speeds and seconds only among those "
            "that did; results.csv has the device and threads of each."
        )
    if len(steps := _by_variant(compared, "steps")) > 1:
        notes.append(
            f"Steps of training differ: {'; '.join(steps)}. Without --epochs or --max-steps each method has the epochs "
            "of its recipe."
        )
    if any(variant.interval() for variant in compared):
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
