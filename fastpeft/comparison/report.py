"""What a comparison leaves: `results.csv`, a line a cell, and `report.md`, a row a variant."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastpeft import files
from fastpeft.comparison.plan import ZERO_SHOT, Cell, Plan
from fastpeft.methods import get_method
from fastpeft.problems import CLASSIFICATION, TITLES, get_problem, in_order


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
        return f"{statistics.mean(values):{self.format}} ± {statistics.stdev(values):{self.format}}"


COLUMNS = (
    Column("accuracy", "accuracy", ".3f", "on all dev rows, with the weights that the run leaves"),
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

_OWN_COLUMNS = ("variant", "method", "seed", "state", "error", "versions")


def headline(metrics: Mapping[str, Any]) -> str:
    """The figure to look at of a finished cell, with its name."""
    names = in_order(metrics)
    return f"{TITLES.get(names[0], names[0])} {metrics[names[0]]:.3f}" if names else ""


def write(plan: Plan) -> None:
    """Write both files, each in one atomic step."""
    files.write_text(plan.folder / "results.csv", _results(plan.cells))
    files.write_text(plan.folder / "report.md", _report(plan))


def _results(cells: Iterable[Cell]) -> str:
    """The cells as csv: what they are, and every single value of their `metrics.json`."""
    rows = []
    for cell in cells:
        metrics = cell.metrics() or {}
        measured = {k: v for k, v in metrics.items() if not isinstance(v, (list, dict)) and k not in _OWN_COLUMNS}
        rows.append(
            {
                "variant": cell.variant,
                "method": cell.method,
                "seed": cell.seed,
                "state": cell.state,
                **measured,
                "versions": _versions(metrics),
                "error": cell.error(),
            }
        )
    fullest = max(rows, key=len)
    text = io.StringIO()
    writer = csv.DictWriter(
        text, list(dict.fromkeys(key for row in (fullest, *rows) for key in row)), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def table(cells: Sequence[Cell]) -> list[list[str]]:
    """The report's table, its header first: the columns that any cell has, a row a variant."""
    measured: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        metrics = cell.metrics()
        measured.setdefault(cell.variant, []).extend([] if metrics is None else [metrics])
    columns = _columns(measured.values())
    wanted = {variant: sum(cell.variant == variant for cell in cells) for variant in measured}
    methods = {cell.variant: cell.method for cell in cells}
    several = max(wanted.values()) > 1
    rows = [["method", "variant", *(["seeds"] if several else []), *(column.title for column in columns)]]
    for variant, runs in measured.items():
        method = methods[variant]
        title = "zero-shot" if method == ZERO_SHOT else get_method(method).title
        seeds = [f"{len(runs)}" if len(runs) == wanted[variant] else f"{len(runs)} of {wanted[variant]}"]
        figures = [column.show(_values(column, runs)) for column in columns]
        rows.append([title, variant.partition(":")[2] or "-", *(seeds if several else []), *figures])
    return rows


def _columns(measured: Iterable[Iterable[Mapping[str, Any]]]) -> list[Column]:
    """The columns of which any cell has a value: metrics first, in the order of their problem."""
    runs = [metrics for group in measured for metrics in group]
    problems = [get_problem(metrics.get("problem_type", CLASSIFICATION.name)) for metrics in runs]  # zero-shot: none
    metrics_first = list(dict.fromkeys(name for problem in problems for name in problem.metrics))
    columns = sorted(COLUMNS, key=lambda column: (*metrics_first, column.key).index(column.key))
    return [column for column in columns if _values(column, runs)]


def _values(column: Column, runs: Iterable[Mapping[str, Any]]) -> list[float]:
    return [metrics[column.key] for metrics in runs if metrics.get(column.key) is not None]


def _report(plan: Plan) -> str:
    """The report in Markdown: the table, what failed, where it was measured and how."""
    finished = [metrics for cell in plan.cells if (metrics := cell.metrics())]
    lines = ["# Comparison of fine-tuning methods", ""]
    lines += markdown(table(plan.cells))
    failed = [f"- {cell.name}: {error}" for cell in plan.cells if (error := cell.error())]
    waiting = [f"- {cell.name}" for cell in plan.cells if cell.state == "waiting"]
    for title, items in (("Failed", failed), ("Not run yet", waiting)):
        if items:
            lines += ["", f"## {title}", "", *items]
    devices = [_device(metrics) for metrics in finished]
    lines += ["", "## Where and how", ""]
    for name, values in (
        ("model", [_text(metrics, "model") for metrics in finished]),
        ("data", [_data(metrics) for metrics in finished]),
        ("device", devices),
        ("versions", [_versions(metrics) for metrics in finished]),
    ):
        lines += [f"- {name}: {value}" for value in dict.fromkeys(values) if value]
    lines += ["", "```", *plan.commands, "```"]
    seeds = max(sum(cell.variant == other.variant for other in plan.cells) for cell in plan.cells)
    notes = [f"- {column.title}: {column.note}." for column in _columns([finished]) if column.note]
    chosen = [cell for cell in plan.cells if (cell.metrics() or {}).get("best_step") is not None]
    if chosen:
        names = dict.fromkeys(f"{cell.variant} (by {cell.values['metric']})" for cell in chosen)
        notes.append(
            "- Of these the best checkpoint was taken, by the dev rows that it is measured on, which makes them look "
            f"better than on new rows: {', '.join(names)}."
        )
    if len(set(filter(None, devices))) > 1:
        notes.append(
            "- Not all cells ran on the same device with as many threads: speeds and seconds compare only among those "
            "that did. `results.csv` has device and threads of each."
        )
    if seeds > 1:
        notes.append("- ±: the standard deviation of one seed (of a sample) around the mean.")
    return "\n".join([*lines, "", *notes]).rstrip() + "\n"


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, its header first, in Markdown."""
    lines = [f"| {' | '.join(text.replace('|', '&#124;') for text in row)} |" for row in rows]
    return [lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]]


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


def _versions(metrics: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in metrics.get("versions", {}).items())
