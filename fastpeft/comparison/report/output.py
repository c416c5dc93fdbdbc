"""The files that a comparison writes: `results.csv` and a JSON by cell, and the report, with a row a variant."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fastpeft.comparison.cells import Cell
from fastpeft.comparison.plan import Plan
from fastpeft.comparison.report import document, errors, method_comparison, paired_tests, results, sections
from fastpeft.comparison.variants import ZERO_SHOT
from fastpeft.data.problems import in_order, title_of
from fastpeft.support import files


def headline(metrics: Mapping[str, Any]) -> str:
    """The main metric of a finished cell, with its name."""
    names = in_order(metrics)
    return f"{title_of(names[0])} {metrics[names[0]]:.3f}" if names else ""


def summary(plan: Plan) -> tuple[list[str], document.Table, list[str]]:
    """The report in short: its opening sentences, its table and the warnings of runs."""
    compared = results.variants(plan.results)
    opening = sections.opening(compared, paired_tests.all_pairs(compared))
    return opening, results.table(compared, plan.suites), results.warnings(compared)


def write(plan: Plan, *, whole: bool) -> None:
    """Write `results.csv` and `report.md`, and if `whole` the rest; each file atomically."""
    files.write_csv(plan.folder / "results.csv", *_results(plan.cells))
    title = sections.title(plan)
    parts = sections.report(plan, pictures=whole)
    if whole:
        pictures, others = (plan.folder / name for name in (document.FIGURES, method_comparison.FOLDER))
        pictures.mkdir(exist_ok=True)
        for part in parts:
            if isinstance(part, document.Figure):
                files.write_text(pictures / part.file, part.svg)
        compared = results.variants(plan.results)
        for_page_alone = [*errors.matrices(compared), *errors.disagreements(compared)]
        files.write_text(plan.folder / "report.html", document.page(title, [*parts, *for_page_alone]))
        others.mkdir(exist_ok=True)
        for cell in plan.cells:
            if cell.method != ZERO_SHOT and (metrics := cell.metrics()):
                files.write_json(others / f"{cell.name}.json", method_comparison.result(cell, metrics))
    files.write_text(plan.folder / "report.md", document.markdown(title, parts))


def _results(cells: Iterable[Cell]) -> tuple[list[dict[str, Any]], Iterable[str]]:
    """The cells as rows, with the numbers and texts of their `metrics.json`, and the names of all columns."""
    rows = []
    for cell in cells:
        metrics = cell.metrics() or {}
        own = {"variant": cell.variant, "method": cell.method, "seed": cell.seed, "state": cell.state}
        own |= {"search": True} if cell.search else {}
        last = {"versions": sections.versions(metrics), "error": cell.error()}
        others = {name: value for name, value in metrics.items() if name not in own}
        plain = {name: value for name, value in others.items() if not isinstance(value, (list, dict))}
        rows.append({**own, **plain, **last})
    return rows, dict.fromkeys(name for row in (max(rows, key=len), *rows) for name in row)
