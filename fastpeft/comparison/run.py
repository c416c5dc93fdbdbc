"""Running a comparison: each unfinished cell in a process of its own, one after another."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import IO, Any, BinaryIO

from fastpeft.comparison.cells import Cell
from fastpeft.comparison.learning_rates import slice_sizes, take_slice, write_rows
from fastpeft.comparison.plan import ROWS, CompareConfig, Plan
from fastpeft.comparison.report import output
from fastpeft.comparison.variants import ZERO_SHOT
from fastpeft.data.examples import TextData
from fastpeft.data.models import check_model
from fastpeft.data.problems import CLASSIFICATION
from fastpeft.errors import FastpeftError
from fastpeft.prompts.named import AUTO
from fastpeft.support import files
from fastpeft.support.interrupts import sigterm_interrupts
from fastpeft.support.processes import refuse_several
from fastpeft.training.config import TrainConfig
from fastpeft.training.estimates import Estimate, estimate, process_seconds
from fastpeft.training.setup import resolve
from fastpeft.training.task import data_for

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompareResult:
    """A comparison that has ended: its folder, and the errors of failed cells, by name."""

    folder: Path
    failed: dict[str, str]


def compare(config: CompareConfig, *, command: str | None = None) -> CompareResult:
    """Run every cell of `config` that is not finished, and write a report.

    The output then holds `results.csv`, `report.md`, `report.html` and `figures`; the first two are written anew after
    each cell. The same call on the same folder continues: finished cells are kept, failed ones tried again. Another
    comparison in that folder adds its cells.

    Args:
        config: what to compare.
        command: the command line that started the comparison, for the report.

    Raises:
        FastpeftError: something given cannot be used, the folder holds a cell of the same name with other values, or
            another comparison runs there; then nothing was written. A cell that fails raises nothing.
        KeyboardInterrupt: on Ctrl-C and SIGTERM, after the running cell has saved a checkpoint and ended, and the
            report is written. A second Ctrl-C does not wait for the checkpoint.

    Example:
        >>> result = compare(CompareConfig(output="runs/all", methods=["siva", "lora"]))  # doctest: +SKIP
        >>> print((result.folder / "report.md").read_text())  # doctest: +SKIP
    """
    return Comparison(config, command).run()


class Comparison:
    """A comparison and how far it has come. Its construction checks everything and writes nothing.

    Attributes:
        plan: its cells.
        running: the cell whose process runs now.
    """

    def __init__(self, config: CompareConfig, command: str | None = None) -> None:
        refuse_several("a comparison")
        self.plan = Plan.make(config, command or f"fastpeft.compare({config})")
        data = _check(self.plan.wanted, "--prompts " if config.suite or config.prompts else "prompt=")
        self._train_rows = None if data is None else len(data.train)
        self._slice: TextData | None = None
        if any(cell.search and cell.state != "finished" for cell in self.plan.wanted):
            if data is None:
                raise FastpeftError(
                    "the protocol full chooses learning rates on rows with labels, and no variant has labels. Give "
                    "variants their learning_rate, or choose the protocol quick."
                )
            self._slice = take_slice(data, *slice_sizes(len(data.train)))
        self.running: Cell | None = None
        self._started = 0.0

    def state(self, cell: Cell) -> str:
        """`running`, `finished`, `failed` or `waiting`."""
        return "running" if cell is self.running else cell.state

    def seconds_running(self) -> float:
        """How long the process of the running cell has run."""
        return time.monotonic() - self._started if self.running else 0.0

    def seconds_left(self) -> float | None:
        """A guess from finished cells, of the same method where there are any; None before the first."""
        taken: dict[str, list[tuple[float, float]]] = {}  # by method: seconds a row, and seconds outside of training
        for cell in self.plan.cells:
            metrics = cell.metrics() or {}
            if speed := metrics.get("samples_per_second"):
                whole, training = cell.seconds(), metrics.get("train_seconds")
                outside = 0.0 if whole is None or training is None else max(0.0, whole - training)
                taken.setdefault(cell.method, []).append((1 / speed, outside))
        everything = [item for items in taken.values() for item in items]
        if not everything:
            return None
        left = 0.0
        for cell in self.plan.wanted:
            if self.state(cell) in ("running", "waiting"):
                row, outside = map(mean, zip(*taken.get(cell.method, everything)))
                run = self.seconds_running() if cell is self.running else 0.0
                left += max(0.0, self.rows(cell) * row + outside - run)
        return left

    def rows(self, cell: Cell) -> float:
        """How many rows a cell trains on, over all epochs."""
        if cell.method == ZERO_SHOT:
            return 0.0
        measured = (metrics.get("train_rows") for other in self.plan.results if (metrics := other.metrics()))
        train_rows = next(filter(None, measured), self._train_rows or 0)
        return resolve(cell.config).rows_trained(slice_sizes(train_rows)[0] if cell.search else train_rows)

    def estimates(self, budget_mb: float | None = None) -> dict[str, Estimate]:
        """The estimates of a cell of each variant that is not finished, by variant; see `fastpeft.training.estimates`.

        Cells that try a rate have none: they take what the variant's others take, but for fewer rows.
        """
        left = [cell for cell in self.plan.wanted if cell.state != "finished" and cell.method != ZERO_SHOT]
        trained = {cell.variant: cell for cell in left if not cell.search}
        process = process_seconds() if trained else 0.0
        found = {variant: estimate(cell.config, budget_mb) for variant, cell in trained.items()}
        return {variant: what.later(process) for variant, what in found.items()}

    def run(self) -> CompareResult:
        """Run what is not finished, see `compare`."""
        plan = self.plan
        with _lock(plan.folder) as lock, sigterm_interrupts():
            plan.save()
            if self._slice is not None and not (plan.slice / "dev.jsonl").is_file():
                with self._saving():
                    write_rows(self._slice, plan.slice)
            for cell in plan.wanted:  # tried again, it has not failed yet
                if cell.state == "failed":
                    cell.log.unlink()
            try:
                for number, cell in enumerate(list(plan.wanted), 1):
                    if cell.state != "finished":
                        logger.info("%d of %d: %s", number, len(plan.wanted), cell.name)
                        self._run_cell(cell, lock)
                        self._report(whole=False)
            finally:
                self._report(whole=True)
        return CompareResult(plan.folder, {cell.name: error for cell in plan.wanted if (error := cell.error())})

    def _report(self, *, whole: bool) -> None:
        with self._saving():
            output.write(self.plan, whole=whole)

    def _saving(self) -> AbstractContextManager[None]:
        remedy = "Finished cells are kept. Make room, or let it be written; the same command goes on."
        return files.saving(f"to the output folder {str(self.plan.folder)!r}", lambda: remedy)

    def _run_cell(self, cell: Cell, lock: BinaryIO) -> None:
        """Run a cell's process to its end. Where it fails, its log's last line is `Error: ...`."""
        try:
            cell = self.plan.fill_in(cell)
        except FastpeftError as error:
            with self._saving():
                files.write_text(cell.log, f"Error: {error}\n")
            logger.warning("%s: not started: %s", cell.name, error)
            return
        with self._saving():
            files.write_json(cell.config_file, cell.values)
            log = cell.log.open("wb")
        started = time.monotonic()
        self.running, self._started = cell, started
        try:
            with log:
                code = _wait(_command(cell), log, lock)
        except KeyboardInterrupt:
            cell.log.unlink(missing_ok=True)
            raise
        finally:
            self.running = None
        metrics, seconds = cell.metrics(), time.monotonic() - started
        if metrics is None:
            with self._saving():
                _mark_failed(cell.log, code)
            logger.warning("%s: failed: %s", cell.name, cell.error())
        else:
            with self._saving():
                files.write_text(cell.clock, f"{seconds:.1f}\n")
            logger.info("%s: %s (%.0f s)", cell.name, output.headline(metrics), seconds)


def _check(cells: Iterable[Cell], option: str) -> TextData | None:
    """The rows with labels that unfinished cells train on; None where no cell has labels.

    Args:
        cells: what is to run.
        option: how a prompt is given, for the error where its words are not those of the classes.

    Raises:
        FastpeftError: a model or the rows cannot be loaded, or a cell's prompt, metric or method is not for these rows.
    """
    loaded: dict[Any, TextData] = {}
    models: set[str] = set()
    for cell in cells:
        if cell.search or cell.state == "finished":  # cells that try rates are like those that take them
            continue
        config = cell.config
        rows = (config.objective, *(getattr(config, name) for name in ROWS))
        if rows not in loaded:
            loaded[rows] = data_for(config)
        try:
            if config.model not in models:
                check_model(config.model)
                models.add(config.model)
            resolve(config).for_data(loaded[rows])
        except FastpeftError as error:
            how = _words_option(config, loaded[rows], option)
            raise FastpeftError(f"the variant {cell.variant!r} cannot be used: {error}{how}") from None
    return next((data for (objective, *_), data in loaded.items() if objective is None), None)


def _words_option(config: TrainConfig, data: TextData, option: str) -> str:
    """Advice for label words that are not those of the classes; empty where they are."""
    prompt = config.parse_prompt()
    if prompt is None or prompt.label_words is None or data.problem is not CLASSIFICATION:
        return ""
    try:
        prompt.for_labels(data.labels)
    except FastpeftError:
        own = list(prompt.label_words.values())
        words = own if len(own) == len(data.labels) else [f"word{index}" for index in range(1, 1 + len(data.labels))]
        return (
            f" In a comparison write them in this order, as {option}{config.prompt}:label_words={'+'.join(words)}, or "
            f"let them be found by {option}{AUTO}."
        )
    return ""


def _command(cell: Cell) -> list[str]:
    """The command line of a cell's process."""
    python = [sys.executable, "-m"]
    if cell.method == ZERO_SHOT:
        return [*python, "fastpeft.comparison.zero_shot", str(cell.config_file)]
    return [*python, "fastpeft", "train", "--config", str(cell.config_file), "--resume", "--quiet"]


def _wait(command: list[str], log: IO[bytes], lock: BinaryIO) -> int:
    """Run a process that writes to `log`, and return its exit code. On an exception here the process ends too.

    It holds the folder's lock as well, so that it keeps other comparisons out if this one is killed.
    """
    kept = () if os.name == "nt" else (lock.fileno(),)
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, pass_fds=kept
    ) as process:
        try:
            try:
                return process.wait()
            except KeyboardInterrupt:
                logger.warning("ending the cell, which saves where it has come to; a second Ctrl-C ends it at once")
                process.terminate()
                process.wait()
                raise
        except BaseException:
            process.kill()
            process.wait()  # on an interruption, leaving the block does not wait
            raise


def _mark_failed(log: Path, code: int) -> None:
    """Add a last line `Error: ...` to the log of a failed process that has none."""
    text = log.read_text(encoding="utf-8", errors="replace").rstrip()
    last = text.rpartition("\n")[2]
    if last.startswith("Error: "):
        return
    ended = f"with exit code {code}"
    if code < 0:
        killed = " (perhaps for lack of memory)" if -code == getattr(signal, "SIGKILL", 9) else ""
        ended = f"by signal {-code}{killed}"
    files.write_text(log, f"{text}\nError: the process ended {ended}{f': {last}' if last else '.'}\n".lstrip())


def _lock(folder: Path) -> BinaryIO:
    """Make a comparison's folder, and keep other comparisons out of it until the result is closed."""
    with files.saving(f"to the output folder {str(folder)!r}", lambda: "Give one that can be written."):
        folder.mkdir(parents=True, exist_ok=True)
        return files.lock(
            folder / files.LOCK,
            f"another comparison, or a cell that it left, still runs in {str(folder)!r}. Wait for its end, or end it.",
        )
