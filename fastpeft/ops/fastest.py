"""Which of several ways to a result is the fastest here: timed at first use, in milliseconds, then kept.

The times are on disk by processor and versions, so that all processes take the same way, and a run that goes on takes
its own: ways differ in the last bits. Where only deterministic algorithms are allowed, or the variable FASTPEFT_MEASURE
is 0, nothing is timed and every question has its fixed answer.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from fastpeft.errors import FastpeftError
from fastpeft.support import files
from fastpeft.support.environment import cpu_name
from fastpeft.support.processor import has_bfloat16
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
        self._known: dict[str, Times] | None = None
        self._used: dict[str, Times] = {}
        self._answers: dict[tuple[Hashable, ...], str] = {}

    def answer(self, question: tuple[Hashable, ...], fixed: str, ways: Callable[[], Ways] | None) -> str:
        """The name of the fastest way.

        Args:
            question: what is to be done, in which dtype, for which class of shapes.
            fixed: the way to take unless another is clearly faster.
            ways: makes what is called to time each way; None where nothing can be timed.
        """
        if torch.are_deterministic_algorithms_enabled():
            return fixed
        key = (*question, torch.get_num_threads())
        found = self._answers.get(key)
        if found is None:
            times = self._times(_in_words(key), ways)
            if times is None:
                return fixed
            best = min(times, key=lambda way: times[way])
            found = self._answers[key] = best if times[best] < _CLEARLY * times.get(fixed, float("inf")) else fixed
        return found

    @property
    def file(self) -> Path:
        """Where the times are kept. To have all timed again, delete it."""
        self._file = self._file or _file()
        return self._file

    def known(self) -> dict[str, Times]:
        """All that was ever timed here, by question."""
        if self._known is None:
            self._known = self._read()
        return self._known

    @property
    def used(self) -> dict[str, Times]:
        """Those that this process has answered by, or was to."""
        return dict(self._used)

    def begin(self, times: Mapping[str, Any] | None = None) -> None:
        """Begin a run, or go on with one that kept these times."""
        self._used = _readable(times or {})
        self._answers.clear()

    def _times(self, question: str, ways: Callable[[], Ways] | None) -> Times | None:
        if question not in self._used and self._enabled:
            times = self.known().get(question) or (None if ways is None else self._measure(question, ways))
            if times is not None:
                self._used[question] = times
        return self._used.get(question)

    def _measure(self, question: str, ways: Callable[[], Ways]) -> Times:
        """Time the ways, unless another process has."""
        with self._held() as keeps:
            kept = self._read()
            if question not in kept:
                kept[question] = _time(ways)
                if keeps:
                    files.write_json(self.file, kept)
        self._known = kept if keeps else {**self.known(), question: kept[question]}
        return kept[question]

    @contextmanager
    def _held(self) -> Iterator[bool]:
        """One process times at a time; False where the disk cannot be written, and each keeps its answers to itself."""
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            held = files.lock(self.file.with_suffix(".lock"))
        except OSError:
            yield False
            return
        with held:
            yield True

    def _read(self) -> dict[str, Times]:
        try:
            return _readable(files.read_json(self.file))
        except FastpeftError:  # none, or one that was damaged
            return {}


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


def _in_words(key: tuple[Hashable, ...]) -> str:
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
    processor = f"{cpu_name()} {torch.backends.cpu.get_cpu_capability()}{' bfloat16' if has_bfloat16() else ''}"
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{processor} torch {torch.__version__} fastpeft {__version__}")
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "fastpeft" / "fastest" / f"{name}.json"


choices = Choices(enabled=os.environ.get(VARIABLE) != "0")
