"""In which order cells run, and how long that takes."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping, Sequence

from fastpeft.comparison.cells import Cell


def next_ready(waiting: Sequence[Cell], running: Collection[str]) -> Cell | None:
    """The first of the cells that wait whose needs have all ended; None where each needs one that waits or runs."""
    open_ends = {*(cell.name for cell in waiting), *running}
    return next((cell for cell in waiting if open_ends.isdisjoint(cell.needs)), None)


def seconds_of_all(cells: Sequence[Cell], seconds: Mapping[str, float], jobs: int) -> float:
    """When the last of some cells ends that begin now, each as soon as one of `jobs` places is free.

    It takes cells that run at once to be as fast as one that runs alone with as many threads.

    Args:
        cells: in their order; those that run already come first.
        seconds: what each takes, by name; one that is not there takes none.
        jobs: how many run at once.
    """
    waiting, now = list(cells), 0.0
    running: list[tuple[float, str]] = []  # a heap: when each ends
    while waiting or running:
        names = [name for _, name in running]
        if len(running) < jobs and (cell := next_ready(waiting, names)):
            waiting.remove(cell)
            heapq.heappush(running, (now + seconds.get(cell.name, 0.0), cell.name))
        else:
            now, _ = heapq.heappop(running)
    return now
