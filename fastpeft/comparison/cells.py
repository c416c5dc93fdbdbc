"""One process of a comparison: its configuration, its files and its result."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastpeft.comparison import significance
from fastpeft.comparison.variants import ZERO_SHOT
from fastpeft.data.problems import ACCURACY, best_of, get_problem
from fastpeft.errors import FastpeftError
from fastpeft.support import files
from fastpeft.training.config import TrainConfig
from fastpeft.training.run_folder import CURVES, PREDICTIONS, ROW_SCORES, RunFolder

CELLS, SLICE = "cells", "slice"  # folders of a comparison: its runs, and rows on which learning rates are tried


@dataclass(frozen=True)
class Cell:
    """One process of a comparison.

    Attributes:
        name: name of its folder.
        variant: as written.
        method: name of its method, or `ZERO_SHOT`.
        seed: its seed; None for `ZERO_SHOT`.
        values: its configuration, as `run.json` holds it.
        after: names of cells; it starts from the best of their results.
        rates: names of cells that tried learning rates, the recipe's first; it takes the best rate, or the recipe's
            where a paired test does not tell the two apart.
        search: whether it tries a learning rate, on a slice of the training rows.
    """

    name: str
    variant: str
    method: str
    seed: int | None
    values: dict[str, Any]
    after: tuple[str, ...] = ()
    rates: tuple[str, ...] = ()
    search: bool = False

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Cell:
        """A cell of the names and values that `comparison.json` holds."""
        return cls(**{**values, **{name: tuple(values[name]) for name in ("after", "rates")}})

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.values["output"])

    @property
    def config(self) -> TrainConfig:
        """Its configuration; for `ZERO_SHOT` that of a run with the same data and prompt."""
        own = ("method", "calibrate") if self.method == ZERO_SHOT else ()
        return TrainConfig.from_values({name: value for name, value in self.values.items() if name not in own})

    @property
    def config_file(self) -> Path:
        """The file of its configuration, which its process reads."""
        return Path(f"{self.values['output']}.json")

    @property
    def log(self) -> Path:
        """The output of its latest process; the last line is `Error: ...` where it failed."""
        return Path(f"{self.values['output']}.log")

    @property
    def clock(self) -> Path:
        """The file with the seconds that its last process took."""
        return Path(f"{self.values['output']}.seconds")

    def seconds(self) -> float | None:
        """How long its last process took; None where that was not kept."""
        try:
            return float(self.clock.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the cells that come before it."""
        return (*self.after, *self.rates)

    def metrics(self) -> dict[str, Any] | None:
        """Its `metrics.json`; None while it is not finished."""
        folder = self.folder
        return folder.metrics() if folder.finished else None

    def predictions(self) -> dict[str, list[int]] | None:
        """The class of each dev row, in `labels` and as predicted; None where they were not kept."""
        return self._kept(PREDICTIONS)

    def row_scores(self) -> tuple[str, np.ndarray] | None:
        """The metric that paired tests compare, and what each dev row stands for in it; None where it was not kept."""
        if found := self.predictions():
            return ACCURACY, np.equal(found["labels"], found["predictions"])
        kept = self._kept(ROW_SCORES)
        return None if kept is None else (kept["metric"], significance.row_scores(kept["above"], kept["below"]))

    def words(self) -> tuple[int, ...] | None:
        """How many words its metric counts: of each dev row where texts alone are learned, of all rows where tags are.

        Cells with another `max_length` or tokenizer count others. None where rows count, or this was not kept.
        """
        metrics = self.metrics()
        if metrics is None:
            return None
        problem = get_problem(metrics["problem_type"])
        if problem.of_texts_alone:
            kept = self._kept(ROW_SCORES)
            return None if kept is None else tuple(kept["below"])
        known = metrics.get("per_class", {}) if problem.per_token else {}
        return (sum(tag["support"] for tag in known.values()),) if known else None

    def curves(self) -> dict[str, list[tuple[int, float]]] | None:
        """Its logged values as (step, value), by name; None where they were not kept."""
        kept = self._kept(CURVES)
        return None if kept is None else {name: [*map(tuple, points)] for name, points in kept.items()}

    def _kept(self, name: str) -> dict[str, Any] | None:
        """What its file of that name holds; None where it is not finished or has none."""
        file = self.folder.path / name
        return files.read_json(file) if self.folder.finished and file.is_file() else None

    def error(self) -> str | None:
        """The error of its latest try; None where it did not fail."""
        last = "" if self.folder.finished else self.said()
        return last.removeprefix("Error: ") if last.startswith("Error: ") else None

    def said(self) -> str:
        """The last line of its log: how far a running one has come. Empty where there is none."""
        return self._log_text().rpartition("\n")[2]

    def mark_failed(self, reason: str) -> None:
        """Add a last line `Error: ...` to the log of a process that failed, for this `reason`, and has none."""
        last = self.said()
        if not last.startswith("Error: "):
            line = f"Error: the process ended {reason}{f': {last}' if last else '.'}"
            files.write_text(self.log, f"{self._log_text()}\n{line}\n".lstrip())

    def _log_text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace").rstrip() if self.log.is_file() else ""

    @property
    def state(self) -> str:
        """`finished`, `failed` or `waiting`, by what its folder holds."""
        if self.folder.finished:
            return "finished"
        return "waiting" if self.error() is None else "failed"

    def filled_in(self, cells: Mapping[str, Cell]) -> Cell:
        """The cell with what the cells before it have found: the best learning rate, and the run to start from.

        Once it has started, it keeps both, and what it was told of a slice's labels. Before those cells have finished,
        it is returned as it is. `cells` are those of the comparison, by name.

        Raises:
            FastpeftError: the cells before it have failed.
        """
        if (self.needs or self.search) and self.folder.started:
            begun = self.folder.config()
            begun |= self.own_paths(begun)
            kept = ["learning_rate", "init_from"] if self.needs else []
            kept += ["problem_type"] if self.search else []
            return self._with({name: begun.get(name) for name in kept})
        found = {}
        tried = [cells[name] for name in self.rates]
        if best := _best(tried, "whose learning rate it takes"):
            found["learning_rate"] = _unless_chance(best, tried).values["learning_rate"]
        if best := _best([cells[name] for name in self.after], "whose result it starts from"):
            found["init_from"] = best.values["output"]
        return self._with(found)

    def own_paths(self, values: Mapping[str, Any]) -> dict[str, str]:
        """The paths among `values` that lead into the comparison's folder, which may have moved since."""
        cells = Path(self.values["output"]).parent.resolve()
        found = {"data": str(cells.with_name(SLICE))} if self.search else {}
        if self.after and values["init_from"] is not None:
            found["init_from"] = str(cells / Path(values["init_from"]).name)
        return found

    def _with(self, values: Mapping[str, Any]) -> Cell:
        return dataclasses.replace(self, values={**self.values, **values})


def _best(cells: Sequence[Cell], purpose: str) -> Cell | None:
    """The finished cell with the best metric, the first of equals; None where there is none, or one still waits.

    Raises:
        FastpeftError: all have failed.
    """
    finished = [(cell, metrics) for cell in cells if (metrics := cell.metrics())]
    failed = [cell.name for cell in cells if cell.error()]
    if cells and len(failed) == len(cells):
        raise FastpeftError(f"{' and '.join(failed)}, {purpose}, {'has' if len(failed) == 1 else 'have'} failed.")
    if not finished or len(finished) + len(failed) < len(cells):
        return None
    metric = get_problem(finished[0][1]["problem_type"]).chosen_by
    return best_of([(cell, metrics[metric]) for cell, metrics in finished], metric)


def _unless_chance(best: Cell, tried: Sequence[Cell]) -> Cell:
    """The best of the cells that tried rates if it beats the first, the recipe's, by a paired test, else the first.

    p is corrected for the number of other rates. Where no scores of rows were kept or the first has failed, the best.
    """
    scores = [found[1][None] for cell in (best, tried[0]) if (found := cell.row_scores())]
    if best is tried[0] or len(scores) < 2:
        return best
    difference = significance.compare_pair(*scores)
    corrected = difference.p * (len(tried) - 1)
    beats = difference.mean > 0 and significance.is_significant(difference.mean, corrected)
    return best if beats else tried[0]
