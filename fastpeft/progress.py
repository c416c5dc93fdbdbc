"""How far a command has come, as a person sees it. It answers at once: no other library loads here."""

from __future__ import annotations

import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.text import Text

from fastpeft.data.problems import title_of
from fastpeft.support.stages import listening, report


def _let_go(stream: TextIO) -> None:
    """Discard what is written from here on: its reader has ended, as in `| less`, or its disk is full."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _Errors(Console):
    """Standard error, whose reader may end before the run: Rich itself would end the run then."""

    def on_broken_pipe(self) -> None:
        _let_go(sys.stderr)


# what are shown are a person's own words and paths, in which brackets and colons mean nothing
console = Console(highlight=False, markup=False, emoji=False)
errors = _Errors(stderr=True, highlight=False, markup=False, emoji=False)

TRAINING = "training"  # the stage whose bar stays
LINES_EVERY_S = 10.0

_SHOWN = {
    "loss": "loss {:.3f}",
    "projected_grad": "g {:.3g}",
    "samples_per_second": "{:.1f} samples/s",
    "steps_per_second": "{:.1f} steps/s",
}


def in_words(measured: Mapping[str, float]) -> str:
    """Measurements on one line."""
    return "  ".join(_SHOWN.get(name, f"dev {title_of(name)} {{:.3f}}").format(measured[name]) for name in measured)


class _Pace:
    """How long a stage has taken, and what it still takes at its pace in this process."""

    def __init__(self, done: int) -> None:
        self.began, self.first, self.done = time.monotonic(), done, done

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def left(self, total: int | None) -> float | None:
        """Seconds; None where nothing is known yet."""
        made = self.done - self.first
        return None if total is None or made <= 0 else self.seconds / made * (total - self.done)


class _Stages(ABC):
    """A listener that hears which stage is new, and how long each has taken. What it shows is its subclass's."""

    def __init__(self) -> None:
        self.stage = ""
        self.paces: dict[str, _Pace] = {}

    def __call__(self, stage: str, done: int, total: int | None, measured: Mapping[str, float]) -> None:
        pace = self.paces.get(stage)
        if pace is None or done < pace.done:  # it begins, or begins anew
            pace, notable = _Pace(done), True
            self.paces[stage] = pace
        else:
            ends = done == total != pace.done  # later reports tell the end again
            notable = ends or stage != self.stage
        pace.done, self.stage = done, stage
        self.show(stage, done, total, measured, notable)

    @abstractmethod
    def show(self, stage: str, done: int, total: int | None, measured: Mapping[str, float], notable: bool) -> None:
        """Show a report, which is `notable` where a stage begins or ends."""

    def close(self) -> None:
        """Nothing more comes."""


class _Left(ProgressColumn):
    """The time that a stage takes still."""

    max_refresh = 0.5

    def __init__(self, stages: _Stages) -> None:
        super().__init__()
        self.stages = stages

    def render(self, task: Task) -> Text:
        pace = self.stages.paces[task.description]
        left = pace.left(None if task.total is None else int(task.total))
        return Text(clock(pace.seconds) if left is None else f"{clock(left)} left", style="progress.remaining")


class Bars(_Stages):
    """On a terminal: a bar for the stage under way, below that of the training."""

    def __init__(self) -> None:
        super().__init__()
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(24), TextColumn("{task.fields[shown]}"))
        self.progress = Progress(*columns, _Left(self), console=errors)
        self.tasks: dict[str, TaskID] = {}
        self.progress.start()

    def show(self, stage: str, done: int, total: int | None, measured: Mapping[str, float], notable: bool) -> None:
        if notable:
            self._keep(stage)
            if stage not in self.tasks:
                self.tasks[stage] = self.progress.add_task(stage, total=None, shown="")
        counted = "" if total is None else f"{done}/{total}  "
        task = self.tasks[stage]
        self.progress.update(task, completed=done, total=total, shown=counted + in_words(measured))

    def close(self) -> None:
        self._keep()
        self.progress.stop()

    def _keep(self, *stages: str) -> None:
        """Take the bars of other stages away, but for that of the training."""
        for name in self.tasks.keys() - {*stages, TRAINING}:
            self.progress.remove_task(self.tasks.pop(name))


class Lines(_Stages):
    """In a file: a line when a stage begins and where it ends, and between them one in ten seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.told = -float("inf")

    def show(self, stage: str, done: int, total: int | None, measured: Mapping[str, float], notable: bool) -> None:
        if not notable and time.monotonic() - self.told < LINES_EVERY_S:
            return
        self.told = time.monotonic()
        left = self.paces[stage].left(total)
        words = [stage if total is None else f"{stage} {done}/{total}", in_words(measured)]
        words += [f"{clock(left)} left"] if left else []
        try:
            errors.print("  ".join(filter(None, words)), soft_wrap=True)
        except OSError:
            _let_go(sys.stderr)


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


@contextmanager
def shown(quiet: bool = False, lines: bool = True) -> Iterator[None]:
    """Show how far what runs in the block has come; first, that libraries load.

    It is a bar on a terminal, and lines elsewhere.

    Args:
        quiet: show nothing.
        lines: whether it is worth lines where there is no terminal.
    """
    if quiet or not (errors.is_terminal or lines):
        yield
        return
    stages = Bars() if errors.is_terminal else Lines()
    try:
        with listening(stages):
            report("loading libraries")
            yield
    finally:
        stages.close()
