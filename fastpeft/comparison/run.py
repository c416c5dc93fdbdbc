"""Running a comparison: each unfinished cell in a process of its own, one after another or several at once."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, BinaryIO

import torch

from fastpeft.comparison import executors
from fastpeft.comparison.cells import Cell
from fastpeft.comparison.executors import ProcessExit
from fastpeft.comparison.learning_rates import slice_sizes, take_slice, write_rows
from fastpeft.comparison.plan import ROW_FIELDS, CompareConfig, Plan
from fastpeft.comparison.report import output
from fastpeft.comparison.schedule import next_ready, seconds_of_all
from fastpeft.comparison.variants import ZERO_SHOT, variant_message
from fastpeft.data.examples import TextData
from fastpeft.data.problems import CLASSIFICATION
from fastpeft.errors import FastpeftError
from fastpeft.models import check_model
from fastpeft.prompts.named import AUTO
from fastpeft.support import files
from fastpeft.support.interrupts import interrupted_once, uninterrupted
from fastpeft.support.launcher import import_path, refuse_several
from fastpeft.training.config import TrainConfig
from fastpeft.training.estimates import Estimate, estimate, process_seconds
from fastpeft.training.run_folder import ROWS_KEY
from fastpeft.training.setup import Setup, check_reporter, resolve
from fastpeft.training.task import data_for

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompareResult:
    """A comparison that has ended: its folder, and the errors of failed cells, by name."""

    folder: Path
    failed: dict[str, str]


def compare(
    config: CompareConfig, *, command: str | None = None, jobs: int | None = None, executor: str = "local"
) -> CompareResult:
    """Run every cell of `config` that is not finished, and write a report.

    The output then holds `results.csv`, `report.md`, `report.html` and `figures`; the first two are written anew after
    each cell. The same call on the same folder continues: finished cells are kept, failed ones tried again. Another
    comparison in that folder adds its cells.

    Args:
        config: what to compare.
        command: the command line that started the comparison, for the report.
        jobs: how many cells run at once. The CPU threads of the machine are divided among them, and each has a GPU
            where there are several. None: one; by Ray as many as the cluster has GPUs, or else nodes.
        executor: `local`: on this machine. `ray`: on the cluster of Ray that `RAY_ADDRESS` names, or else one that is
            started here; its nodes share the output and the working folder, and a cell whose worker is lost is tried
            again.

    Raises:
        FastpeftError: something given cannot be used, the folder holds a cell of the same name with other values, or
            another comparison runs there; then nothing was written. A cell that fails raises nothing.
        KeyboardInterrupt: on Ctrl-C, SIGTERM and SIGHUP, after the running cells have saved checkpoints and ended, and
            the report is written. A second Ctrl-C, half a second later or more, does not wait for the checkpoints.

    Example:
        >>> result = compare(CompareConfig(output="runs/all", methods=["siva", "lora"]))  # doctest: +SKIP
        >>> print((result.folder / "report.md").read_text())  # doctest: +SKIP
    """
    return Comparison(config, command, jobs, executor).run()


class Comparison:
    """A comparison and how far it has come. Its construction checks everything and writes nothing.

    Attributes:
        plan: its cells.
        executor: what runs them.
        running: when the process of each cell that runs now was started, by its name and `time.monotonic`.
    """

    def __init__(
        self, config: CompareConfig, command: str | None = None, jobs: int | None = None, executor: str = "local"
    ) -> None:
        refuse_several("a comparison")
        if not isinstance(config, CompareConfig):
            raise FastpeftError(
                f"`config` is a {type(config).__name__}; it must be a CompareConfig. Make one by CompareConfig(...)."
            )
        self.plan = Plan.make(config, command or f"fastpeft.compare({config})")
        self.executor = executors.make(executor, jobs, len(self.plan.wanted))
        data = _checked_rows(self.plan, "--prompts " if config.suite or config.prompts else "prompt=")
        self._train_rows = None if data is None else len(data.train)
        self._slice: TextData | None = None
        if any(cell.search and cell.state != "finished" for cell in self.plan.wanted):
            self._slice = self._take_slice(data)
            self.plan.tell_searches(self._slice.problem)
        self.running: dict[str, float] = {}
        self._setups: dict[str, tuple[Cell, Setup]] = {}

    def state(self, cell: Cell) -> str:
        """`running`, `finished`, `failed` or `waiting`."""
        return "running" if cell.name in self.running else cell.state

    def seconds_running(self, cell: Cell) -> float:
        """How long the process of a cell has run, if it runs."""
        now = time.monotonic()
        return now - self.running.get(cell.name, now)

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
        left = [cell for cell in self.plan.wanted if self.state(cell) in ("running", "waiting")]
        left.sort(key=lambda cell: cell.name not in self.running)
        seconds = {}
        for cell in left:
            row, outside = map(mean, zip(*taken.get(cell.method, everything)))
            seconds[cell.name] = max(0.0, self.rows_trained(cell) * row + outside - self.seconds_running(cell))
        return seconds_of_all(left, seconds, self.executor.jobs)

    def rows_trained(self, cell: Cell) -> float:
        """How many rows a cell trains on, over all epochs."""
        if cell.method == ZERO_SHOT:
            return 0.0
        measured = (metrics.get("train_rows") for other in self.plan.results if (metrics := other.metrics()))
        train_rows = next(filter(None, measured), self._train_rows or 0)
        return self._setup(cell).rows_trained(slice_sizes(train_rows)[0] if cell.search else train_rows)

    def _setup(self, cell: Cell) -> Setup:
        """What a cell's configuration comes to, kept until the plan holds another cell of its name.

        The live table asks for that of every cell twice a second, on the CPU that the cells are timed on.
        """
        kept = self._setups.get(cell.name)
        if kept is None or kept[0] is not cell:
            kept = self._setups[cell.name] = cell, resolve(cell.config)
        return kept[1]

    def estimates(self, budget_mb: float | None = None) -> dict[str, Estimate]:
        """The estimates of a cell of each variant that is not finished, by variant; see `fastpeft.training.estimates`.

        Cells that try a rate have none: they take what the variant's others take, but for fewer rows. Steps are timed
        on this machine, one variant after another, with as many threads as a cell has.
        """
        left = [cell for cell in self.plan.wanted if cell.state != "finished" and cell.method != ZERO_SHOT]
        trained = {cell.variant: cell for cell in left if not cell.search}
        process = process_seconds() if trained else 0.0
        with self.executor, _threads(self.executor.threads):
            found = {variant: estimate(cell.config, budget_mb) for variant, cell in trained.items()}
        return {variant: what.later(process) for variant, what in found.items()}

    def run(self) -> CompareResult:
        """Run what is not finished, see `compare`."""
        plan = self.plan
        with self.executor, _lock(plan.folder) as lock, interrupted_once():
            plan.save()
            if self._slice is not None and not (plan.slice / "dev.jsonl").is_file():
                self._write_slice(self._slice)
            for cell in plan.wanted:  # tried again, it has not failed yet
                if cell.state == "failed":
                    cell.log.unlink()
            try:
                self._run_cells(lock)
            finally:
                self._report(whole=True)
        return CompareResult(plan.folder, {cell.name: error for cell in plan.wanted if (error := cell.error())})

    def _take_slice(self, data: TextData | None) -> TextData:
        """The rows on which learning rates are searched; refused where the folder has some of other data."""
        if data is None:
            raise FastpeftError(
                "the protocol full chooses learning rates on the rows of one objective, and the variants have several. "
                "Give those without labels their learning_rate, or choose the protocol quick."
            )
        taken = take_slice(data, *slice_sizes(len(data.train)))
        kept = self._note_of_slice
        if kept.is_file() and kept.read_text(encoding="utf-8") != taken.fingerprint:
            raise FastpeftError(
                f"the rows in {str(self.plan.slice)!r}, on which learning rates are searched, were taken from other "
                "data than there is now. Give another output folder, or the data as it was."
            )
        return taken

    def _write_slice(self, taken: TextData) -> None:
        with self._saving():
            self.plan.slice.mkdir(parents=True, exist_ok=True)
            files.write_text(self._note_of_slice, taken.fingerprint)  # first: no rows without it
            write_rows(taken, self.plan.slice)

    @property
    def _note_of_slice(self) -> Path:
        """The file with the fingerprint of the rows in the slice."""
        return self.plan.slice / "fingerprint"

    def _report(self, *, whole: bool) -> None:
        with self._saving():
            output.write(self.plan, whole=whole)

    def _saving(self) -> AbstractContextManager[None]:
        remedy = "Finished cells are kept. Free disk space, or make the folder writable, then repeat the same command."
        return files.saving(f"to the output folder {str(self.plan.folder)!r}", lambda: remedy)

    def _run_cells(self, lock: BinaryIO) -> None:
        """Run what is not finished, each cell after those that it needs. On an exception the running ones end too."""
        waiting = [cell for cell in self.plan.wanted if cell.state != "finished"]
        running: dict[Future[ProcessExit], Cell] = {}
        try:
            while waiting or running:
                while len(running) < self.executor.jobs and (cell := next_ready(waiting, self.running)):
                    waiting.remove(cell)
                    self._start(cell, lock, running)
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    self._end(running.pop(future), future.result())
                self._report(whole=False)
        except BaseException as error:
            try:
                if isinstance(error, KeyboardInterrupt) and running:
                    logger.warning("stopping; running cells save a checkpoint first; a second Ctrl-C ends them at once")
                    self.executor.stop()
                    wait(running)
            finally:
                self.executor.kill()
                wait(running)
                for cell in running.values():
                    cell.log.unlink(missing_ok=True)
                self.running.clear()
            raise

    def _start(self, cell: Cell, lock: BinaryIO, running: dict[Future[ProcessExit], Cell]) -> None:
        """Start a cell's process, and add it to those that run. It holds the folder's lock as well, so that it keeps
        other comparisons out if this one is killed.
        """
        names = [each.name for each in self.plan.wanted]
        logger.info("%d of %d: %s", 1 + names.index(cell.name), len(names), cell.name)
        try:
            cell = self.plan.fill_in(cell)
        except FastpeftError as error:
            with self._saving():
                files.write_text(cell.log, f"Error: {error}\n")
            logger.warning("%s: not started: %s", cell.name, error)
            return
        with self._saving():
            files.write_json(cell.config_file, cell.values)
            cell.log.write_bytes(b"")
        with uninterrupted():
            self.running[cell.name] = time.monotonic()
            running[self.executor.start(_arguments(cell), cell.log, (lock.fileno(),))] = cell

    def _end(self, cell: Cell, ended: ProcessExit) -> None:
        """Keep what a cell's process has left. Where it failed, its log's last line is then `Error: ...`."""
        del self.running[cell.name]
        metrics = cell.metrics()
        if metrics is None:
            with self._saving():
                cell.mark_failed(ended.reason)
            logger.warning("%s: failed: %s", cell.name, cell.error())
        else:
            with self._saving():
                files.write_text(cell.clock, f"{ended.seconds:.1f}\n")
            told = "%s: %s (its process took %.0f s, loading and measuring included)"
            logger.info(told, cell.name, output.headline(metrics), ended.seconds)
            _check_rows(self.plan, {})  # which may have changed since the cells before


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let PyTorch compute with so many threads inside it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _checked_rows(plan: Plan, option: str) -> TextData | None:
    """The rows of unfinished variants, those with labels where any has some; None where several objectives have none.

    `option` is how a prompt is given, for the error where its words are not those of the classes.

    Raises:
        FastpeftError: a model or the rows cannot be loaded, a finished cell had other rows, or a cell's prompt, metric
            or method is not for these rows.
    """
    loaded: dict[Any, TextData] = {}
    models: set[str] = set()
    unfinished = {cell.variant for cell in plan.wanted if cell.state != "finished"}
    for cell in plan.wanted:
        if cell.search or cell.variant not in unfinished:  # cells that try rates are like those that take them
            continue
        config, rows = cell.config, _rows_key(cell)
        if rows not in loaded:
            loaded[rows] = data_for(config)
        try:
            if config.model not in models:
                check_model(config.model)
                models.add(config.model)
            check_reporter(config)
            resolve(config).for_data(loaded[rows])
        except FastpeftError as error:
            how = _words_option(config, loaded[rows], option)
            raise FastpeftError(
                f"the variant {cell.variant!r} cannot be used: {variant_message(cell.variant, error)}{how}"
            ) from None
    _check_rows(plan, {rows: data.fingerprint for rows, data in loaded.items()})
    labelled = [data for (objective, *_), data in loaded.items() if objective is None]
    if not labelled and len(loaded) > 1:
        return None
    return next(iter(labelled or loaded.values()), None)


def _check_rows(plan: Plan, fingerprints: dict[tuple[Any, ...], str]) -> None:
    """Raise `FastpeftError` where a finished cell had other rows than there are now, or than the first that finished.

    `fingerprints` are those of rows that are known, by `_rows_key`.
    """
    for cell in plan.results:
        noted = cell.folder.notes().get(ROWS_KEY) if cell.folder.finished and cell.folder.started else None
        if noted is not None and noted != fingerprints.setdefault(_rows_key(cell), noted):
            raise FastpeftError(
                f"{cell.values['data']!r} has changed: {cell.name} in {str(plan.folder)!r} has other rows, or in "
                "another order, than there are now or than another cell has, so the two could not be compared. Restore "
                "them, or delete that cell's folder to train it anew, or give another output folder."
            )


def _rows_key(cell: Cell) -> tuple[Any, ...]:
    """What decides which rows a cell has."""
    config = cell.config
    return config.objective, *(getattr(config, name) for name in ROW_FIELDS)


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


def _arguments(cell: Cell) -> list[str]:
    """What Python is given in a cell's process."""
    if cell.method == ZERO_SHOT:
        return [*import_path(), "-m", "fastpeft.comparison.zero_shot", str(cell.config_file)]
    return [*import_path(), "-m", "fastpeft", "train", "--config", str(cell.config_file), "--resume"]


def _lock(folder: Path) -> BinaryIO:
    """Make a comparison's folder, and keep other comparisons out of it until the result is closed."""
    with files.saving_into(folder):
        folder.mkdir(parents=True, exist_ok=True)
        return files.lock(
            folder / files.LOCK,
            f"another comparison, or a cell that it left, still runs in {str(folder)!r}. Wait for its end, or end it.",
        )
