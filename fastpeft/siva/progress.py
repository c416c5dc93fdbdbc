"""A bar for work that turns out to take long."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PATIENCE_S = 2.0


@contextmanager
def progress(description: str) -> Iterator[Callable[[int], None]]:
    """Yield what to call after each step with the number of all; past `PATIENCE_S` a bar shows how far they are.

    The bar is on the standard error and goes away at the end. It shows on a terminal only, and not where only errors
    of this library are wanted.
    """
    console = Console(stderr=True)
    shown = console.is_terminal and logging.getLogger("fastpeft").getEffectiveLevel() <= logging.WARNING
    columns = (TextColumn(description), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True)
    task, begin = bar.add_task(description, total=None), time.monotonic()

    def step(total: int) -> None:
        bar.update(task, total=total, advance=1)
        if shown and time.monotonic() - begin > PATIENCE_S:
            bar.start()  # again is harmless

    try:
        yield step
    finally:
        if bar.live.is_started:  # what was never shown would end in an empty line
            bar.stop()
