"""The one table that `pytest bench` prints, in the place of a table for each benchmark."""

from __future__ import annotations

import pytest

TIMINGS = pytest.StashKey[list[list[str]]]()
HEADS = ["bench: case", "candidate", "ms", "time over the first's"]


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TIMINGS] = []


@pytest.fixture
def timings(pytestconfig: pytest.Config) -> list[list[str]]:
    """Rows of the table: a bench, a candidate, its median in milliseconds, and that over the first candidate's."""
    return pytestconfig.stash[TIMINGS]


def pytest_benchmark_group_stats() -> list[object]:
    """No table of the plugin's own."""
    return []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[TIMINGS]
    if not rows:
        return
    first, second, *others = (max(map(len, column)) for column in zip(HEADS, *rows))
    for case, candidate, *numbers in [HEADS, *rows]:
        right = "  ".join(number.rjust(width) for number, width in zip(numbers, others))
        terminalreporter.write_line(f"{case:{first}}  {candidate:{second}}  {right}")
