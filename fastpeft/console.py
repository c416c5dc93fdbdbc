"""What the command line shows: tables and messages."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Group
from rich.live import Live
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fastpeft.cli_options import typed
from fastpeft.comparison.cells import Cell
from fastpeft.comparison.report import document, output
from fastpeft.comparison.report.results import MARK
from fastpeft.comparison.run import Comparison
from fastpeft.comparison.schedule import seconds_of_all
from fastpeft.data import result_warnings
from fastpeft.data.output_tables import writing
from fastpeft.data.problems import TITLES, in_order, title_of
from fastpeft.errors import FastpeftError
from fastpeft.progress import console, errors
from fastpeft.support.logs import at_least, show_own_messages
from fastpeft.support.stages import report
from fastpeft.training.config import TrainConfig
from fastpeft.training.estimates import Estimate, TrainPlan, plan
from fastpeft.training.memory import peak_rss_mb
from fastpeft.training.prediction_files import Predictions
from fastpeft.training.results import baseline, class_scores, memory

_SHOWN_LEFT_OUT = 20  # rows, each with its error


class _Typed(logging.Formatter):
    """Messages that name options as the command line has them."""

    def format(self, record: logging.LogRecord) -> str:
        return FastpeftError(super().format(record)).message_for(typed)


def show_messages(quiet: bool) -> None:
    """Show this library's own messages, unless `quiet`, and nothing that others say on the way."""
    handler = RichHandler(console=errors, show_time=False, show_level=False, show_path=False, markup=False)
    handler.setFormatter(_Typed())
    show_own_messages(handler, quiet)
    result_warnings.logger.setLevel(logging.ERROR)  # `show_warnings` has them below the table


@contextmanager
def row_bar(rows: int, beside_output: bool) -> Iterator[Callable[[int], None]]:
    """What moves a bar over so many rows on, on a terminal alone; and not where results come to the same one."""
    hidden = not errors.is_terminal or (beside_output and console.is_terminal)
    columns = (TextColumn("predicting"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # standard output is not the bar's: results may go to a file from there
    with Progress(*columns, console=errors, redirect_stdout=False, disable=hidden) as progress:
        task = progress.add_task("predicting", total=rows)
        yield lambda done: progress.advance(task, done)


def show_predictions(found: Predictions, target: Path | None, every: bool) -> int:
    """Print predictions, with `every` all probabilities, or write them to the file `target`; name what was left out.

    Returns:
        How many rows were left out.
    """
    with ExitStack() as held:
        write = None if target is None else held.enter_context(writing(target, found.columns))
        advance = held.enter_context(row_bar(found.count, beside_output=write is None))
        count = 0
        for some, left_out in found:
            for error in left_out[: max(0, _SHOWN_LEFT_OUT - count)]:
                typer.echo(f"Left out: {error}", err=True)
            if write is not None:
                write([record for each in some for record in found.records(each)])
            else:
                for each in some:
                    for line in found.lines(each, every):
                        typer.echo(line)
            advance(len(some) + len(left_out))
            count += len(left_out)
    if count > _SHOWN_LEFT_OUT:
        typer.echo(f"Left out: {count - _SHOWN_LEFT_OUT:,} more of the {found.count:,} rows", err=True)
    for warning in found.warnings:
        typer.echo(f"Warning: {warning}", err=True)
    if target is not None:
        typer.echo(f"saved in {target}: {found.count - count:,} of {found.count:,} rows")
    return count


def show_table(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Print names and values."""
    console.print(title)  # not the table's own, which would be cut to the table's width
    table = Table(show_header=False)
    for name, value in rows:
        table.add_row(name, value)
    console.print(table)


def measured(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Rows of a table: what was measured, and what it was before training where that is known.

    First comes the metric that the result was chosen by, then those of the problem, the one to look at first; last,
    where there are classes, what always answering the most frequent one of the training rows would measure, and the
    scores of each.
    """
    rows = []
    for name in in_order(metrics):
        title = title_of(name)
        before = metrics.get(f"{name}_before")
        if before is not None:
            rows.append((f"{title} before", f"{before:.3f}"))
        rows.append((f"{title} after" if before is not None else title, f"{metrics[name]:.3f}"))
    if always := metrics.get("most_frequent_class"):
        scores = ", ".join(f"{TITLES[name]} {always[name]:.3f}" for name in always if name in TITLES)
        rows.append((baseline(always), f"{scores} (always {always['class']})"))
    return [*rows, *class_scores(metrics).items()]


def show_warnings(metrics: Mapping[str, Any]) -> None:
    """Print what makes the figures doubtful, a line each."""
    for warning in metrics["warnings"]:
        console.print(f"Warning: {warning}", soft_wrap=True)


def show_metrics(folder: Any, metrics: Mapping[str, Any]) -> None:
    """Print the last table of a run."""
    speed = metrics["samples_per_second"]
    show_table(
        f"{metrics['method']} on {metrics['data']}",
        [
            *measured(metrics),
            ("samples/s", "-" if speed is None else f"{speed:.1f}"),
            *memory(metrics).items(),
            ("compute dtype", metrics["compute_dtype"]),
            ("trainable parameters", f"{metrics['trainable_parameters']:,} of {metrics['parameters']:,}"),
            ("saved in", str(folder)),
        ],
    )
    show_warnings(metrics)


def run_plan(config: TrainConfig, budget_mb: float | None) -> TrainPlan:
    """What a run would do and take, its time by a few steps that really run."""
    report("running a few steps")
    return plan(config, timed=True, budget_mb=budget_mb)


def show_run_plan(config: TrainConfig, what: TrainPlan, budget_mb: float | None) -> None:
    """Print what a run would do and take, and whether the tensors of a step fit into a budget."""
    known, peak = what.estimate, what.peak_memory_mb
    seconds = known.seconds(what.rows)
    rows = [
        ("trainable parameters", f"{what.trainable_parameters:,} of {what.parameters:,}"),
        ("estimated peak memory of a step", "unknown" if peak is None else f"{peak:,.0f} MB (simulated: tensors only)"),
    ]
    if seconds is not None and (resident := peak_rss_mb()) is not None and not torch.accelerator.is_available():
        rows.append(("peak resident memory", f"{resident:,.0f} MB (the whole process)"))
    if budget_mb is not None:
        rows.append((f"tensors of a step fit into {budget_mb:,.0f} MB", _fits(known, budget_mb)))
    rows += [
        ("estimated time", known.error or _time(known, seconds, budget_mb)),
        ("steps of the run", f"{what.steps:,}"),
        ("rows", f"{what.train_rows:,} training rows, {what.dev_rows:,} dev rows"),
        ("longest row", f"{what.longest_row} tokens"),
        ("compute dtype", what.compute_dtype),
        *((name.replace("_", " "), f"{value}") for name, value in what.recipe.items()),
    ]
    show_table(f"{config.method} on {config.data}: nothing was written", rows)
    if what.shortness:
        console.print(f"Warning: {what.shortness}.", soft_wrap=True)


def _fits(known: Estimate, budget_mb: float) -> str:
    return {True: "yes", False: "no", None: "unknown"}[known.fits(budget_mb)]


def _time(known: Estimate, seconds: float | None, budget_mb: float | None) -> str:
    """What a run would take; no step is run of what does not fit."""
    if seconds is not None:
        return _duration(seconds)
    return "not timed: does not fit" if budget_mb is not None and known.fits(budget_mb) is False else "unknown"


def estimates(comparison: Comparison, budget_mb: float | None) -> dict[str, Estimate]:
    """What a run of each variant would take, by a few steps that really run."""
    report("running a few steps of each variant")
    with at_least("fastpeft", logging.WARNING):
        return comparison.estimates(budget_mb)


def show_plan(comparison: Comparison, known: Mapping[str, Estimate], budget_mb: float | None) -> dict[str, str]:
    """Print the cells of a comparison, in the order in which they run, and what each would take.

    Returns:
        Why variants would fail, by the variant.
    """
    cells = comparison.plan.wanted
    with_budget = budget_mb is not None
    table = Table("cell", "state", "memory, MB", *["tensors fit"] * with_budget, "time")
    timed: dict[str, float] = {}
    for cell in cells:
        if cell.state == "finished":
            table.add_row(cell.name, cell.state, "-", *["-"] * with_budget, "-")
            continue
        found = known.get(cell.variant, Estimate())
        seconds = found.seconds(comparison.rows_trained(cell))
        timed |= {} if seconds is None else {cell.name: seconds}
        fits = [] if budget_mb is None else [_fits(found, budget_mb)]
        peak = "-" if found.memory_mb is None else f"{found.memory_mb:,.0f}"
        time = "fails" if found.error else _time(found, seconds, budget_mb)
        table.add_row(cell.name, comparison.state(cell), peak, *fits, time)
    console.print(table)
    unfinished, executor = [cell for cell in cells if cell.state != "finished"], comparison.executor
    finished = len(cells) - len(unfinished)
    left = ""
    if timed:
        about = _duration(seconds_of_all(unfinished, timed, executor.jobs))
        left = f", about {about} for the cells with an estimated time"
        if executor.jobs > 1:
            each = f"{executor.threads} CPU thread{'s' * (executor.threads > 1)} each"
            left += f", if {executor.jobs} cells at once, with {each}, do not slow one another"
    console.print(f"{finished} of {len(cells)} finished{left}; nothing was written")
    return {variant: found.error for variant, found in known.items() if found.error}


def show_report(comparison: Comparison) -> None:
    """Print how a comparison's report begins, its table, outside of a terminal as there, warnings, and where it is."""
    opening, shown, warned = output.summary(comparison.plan)
    console.print("\n".join(opening), soft_wrap=True)
    if console.is_terminal:
        table = Table(*shown.rows[0])
        for row in shown.rows[1:]:
            table.add_row(*row)
        console.print(table)
    else:
        console.print("\n".join(document.table_lines(shown)), soft_wrap=True)
    if warned:
        meaning = f" ({MARK}: not of all variants)" if any(MARK in each for each in warned) else ""
        console.print("\n".join([f"Warnings{meaning}:", *warned]), soft_wrap=True)
    console.print(f"saved in {comparison.plan.folder / 'report.md'} and report.html")


@contextmanager
def live_comparison(comparison: Comparison, quiet: bool) -> Iterator[None]:
    """Show the cells while they run: a table that renews itself on a terminal, else only what is logged."""
    if quiet or not errors.is_terminal:
        yield
        return
    table = Live(get_renderable=lambda: _cells_view(comparison), console=errors, refresh_per_second=2)
    with at_least("fastpeft", logging.WARNING), table:  # which says the rest, that each variant would say again
        yield


_STATES = ("running", "failed", "finished", "waiting")
_BESIDE_ROWS = 7  # lines: progress, the table's head and lines, what is not shown, and the cursor's
_BESIDE_NAMES = 36  # letters: state, a short result, and the lines between them
_LINES = 18  # letters: state, and the lines


def _cells_view(comparison: Comparison) -> Group:
    """How far a comparison has come, and its cells: where they do not all fit the screen, the nearest of each state."""
    cells = comparison.plan.wanted
    width, height = errors.size
    known = {cell.name: comparison.state(cell) for cell in cells}
    states = {state: [cell for cell in cells if known[cell.name] == state] for state in _STATES}
    done, failed, left = len(states["finished"]), len(states["failed"]), comparison.seconds_left()
    head = f"{done} of {len(cells)} finished"
    head += f", {failed} failed" if failed else ""
    if done + failed < len(cells):
        head += ", time left not known yet" if left is None else f", about {_duration(left)} left"
    room = max(1, height - _BESIDE_ROWS)
    shown, hidden = cells, ""
    if len(cells) > room:
        shown = _nearest(states, room)
        counts = {
            state: len(found) - sum(known[cell.name] == state for cell in shown) for state, found in states.items()
        }
        hidden = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    table = Table("cell", "state", "result")
    names = min(max(len(cell.name) for cell in shown), max(20, width - _BESIDE_NAMES))
    for cell in shown:
        state, text = known[cell.name], output.headline(cell.metrics() or {}) or cell.error() or ""
        if state == "running":
            text = ", ".join(filter(None, (_duration(comparison.seconds_running(cell)), cell.said())))
        table.add_row(_middle_cut(cell.name, names), state, _middle_cut(text, max(12, width - names - _LINES)))
    return Group(Text(head), table, *([Text(f"not shown: {hidden}")] if hidden else []))


def _nearest(states: Mapping[str, list[Cell]], room: int) -> list[Cell]:
    """So many cells: those that run, the last that failed, the last that finished, the next that wait."""
    shown = states["running"][:room]
    shown += _last(states["failed"], min(room - len(shown), room // 4))
    rest = max(0, room - len(shown))
    waiting = states["waiting"][: max(rest // 2, rest - len(states["finished"]))]
    return [*shown, *_last(states["finished"], rest - len(waiting)), *waiting]


def _last(cells: list[Cell], count: int) -> list[Cell]:
    return cells[max(0, len(cells) - count) :]


def _middle_cut(name: str, width: int) -> str:
    """A name within so many letters: the ends of long ones, where seeds are, tell them apart."""
    if len(name) <= width:
        return name
    end = width // 2
    return f"{name[: width - end - 1]}…{name[len(name) - end :]}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:,.1f} h"
