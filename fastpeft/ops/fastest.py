"""Which of several ways to a result is the fastest here: timed at first use, in milliseconds, then kept.

The times are on disk by processor and versions, so that all processes take the same way, and so does a run that goes
on: ways differ in the last bits. Where only deterministic algorithms are allowed, or the variable FASTPEFT_MEASURE is
0, nothing is timed and every question has its fixed answer.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from fastpeft.errors import FastpeftError
from fastpeft.support import files
from fastpeft.support.environment import cpu_name
from fastpeft.version import __version__

VARIABLE = "FASTPEFT_MEASURE"
_ROUNDS = 5
_ENOUGH = 0.05  # seconds of one question, after which no further round begins
_CLEARLY = 0.97  # of the fixed way's time: what takes more does not replace it

Times = dict[str, float]  # milliseconds by way
Ways = Mapping[str, Callable[[], object]]


class Choices:
    """The times that questions were answered by.

    Args:
        file: where they are kept; the default is in the user's cache, by processor and versions.
        enabled: False gives each question its fixed answer.
    """

    def __init__(self, file: Path | None = None, enabled: bool = True) -> None:
        self._file = file
        self._enabled = enabled
        self._keeps = True
        self._times: dict[str, Times] | None = None
        self._answers: dict[tuple[Hashable, ...], str] = {}

    def answer(self, question: tuple[Hashable, ...], fixed: str, ways: Callable[[], Ways]) -> str:
        """The name of the fastest way.

        Args:
            question: what is to be done, in which dtype, for which class of shapes.
            fixed: the way to take unless another is clearly faster.
            ways: makes what is called to time each way, on operands of its own.
        """
        if not self._enabled or torch.are_deterministic_algorithms_enabled():
            return fixed
        key = (*question, torch.get_num_threads())
        found = self._answers.get(key)
        if found is None:
            times = self._times_of(_question(key), ways)
            best = min(times, key=lambda way: times[way])
            found = self._answers[key] = best if times[best] < _CLEARLY * times.get(fixed, float("inf")) else fixed
        return found

    def times(self) -> dict[str, Times]:
        """All that is known, by question."""
        if self._times is None:
            self._times = self._read()
        return self._times

    def used(self) -> dict[str, Times]:
        """Those of the questions that this process has asked."""
        asked = map(_question, self._answers)
        return {question: self.times()[question] for question in asked}

    def take(self, times: Mapping[str, Any]) -> None:
        """Answer by these from now on, as the run did that they were kept by."""
        self.times().update(_readable(times))
        self._answers.clear()

    def _times_of(self, question: str, ways: Callable[[], Ways]) -> Times:
        if question not in self.times():
            found = _time(ways)
            kept = self._read()  # where another process may have answered meanwhile: the first answer stays
            self.times()[question] = kept.setdefault(question, found)
            self._write(kept)
        return self.times()[question]

    def _read(self) -> dict[str, Times]:
        self._file = self._file or _file()
        try:
            return _readable(files.read_json(self._file))
        except FastpeftError:  # none, or one that was damaged
            return {}

    def _write(self, times: dict[str, Times]) -> None:
        assert self._file is not None
        if not self._keeps:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            files.write_json(self._file, times)
        except OSError:
            self._keeps = False  # on a disk that cannot be written this process keeps its answers to itself


def in_words(times: Times) -> str:
    """Ways, the fastest first, with their times."""
    return ", ".join(f"{way} {times[way]:.3g} ms" for way in sorted(times, key=lambda way: times[way]))


def _readable(times: Mapping[str, Any]) -> dict[str, Times]:
    """What of a file, which anybody may have changed, are times."""
    return {
        question: found
        for question, found in times.items()
        if isinstance(found, dict) and found and all(isinstance(each, float) for each in found.values())
    }


def _question(key: tuple[Hashable, ...]) -> str:
    *question, threads = key
    return " ".join(str(part).removeprefix("torch.") for part in question) + f", threads {threads}"


def _time(ways: Callable[[], Ways]) -> Times:
    """The least time of some calls of each way, taking turns after one that warms up."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False), _disable_current_modes():
        calls = ways()
        for call in calls.values():
            call()
        least = dict.fromkeys(calls, float("inf"))
        end = time.perf_counter() + _ENOUGH
        for _ in range(_ROUNDS):
            for way, call in calls.items():
                start = time.perf_counter()
                call()
                least[way] = min(least[way], time.perf_counter() - start)
            if time.perf_counter() > end:
                break
    return {way: round(1e3 * seconds, 4) for way, seconds in least.items()}


def _file() -> Path:
    machine = f"{cpu_name()} {torch.backends.cpu.get_cpu_capability()} torch {torch.__version__} fastpeft {__version__}"
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "fastpeft" / "fastest" / f"{re.sub(r'[^A-Za-z0-9.]+', '-', machine)}.json"


choices = Choices(enabled=os.environ.get(VARIABLE) != "0")
