"""Autotuning: which of the candidates for a result is the fastest here, timed at first use in milliseconds, then kept.

The times are on disk by processor and versions, so that all processes take the same candidate, and a run that goes on
takes its own: candidates differ in the last bits. For GPUs the package can bring some in `tuned/`. Where only
deterministic algorithms are allowed every question has its fixed answer; where the variable FASTPEFT_MEASURE is 0
nothing is timed.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from fastpeft.errors import FastpeftError
from fastpeft.support import files
from fastpeft.support.processor import cpu_name, has_bfloat16
from fastpeft.version import __version__

VARIABLE = "FASTPEFT_MEASURE"
TUNED = Path(__file__).parent / "tuned"  # a file for each architecture of GPUs
_WAIT = 1_000_000  # of a GPU's cycles, about half a millisecond
_CPU = torch.device("cpu")
_CLEARLY = 0.97  # of a candidate's time: what takes more does not replace it

Times = dict[str, float]  # milliseconds by candidate
Candidates = Mapping[str, Callable[[], object]]


class Timings:
    """The times that questions were answered by.

    Args:
        file: where they are kept; the default is in the user's cache, by processor and versions.
        enabled: False times nothing, so that a question has its fixed answer unless the package brings times.
        rounds, enough: the most calls of each candidate, and the seconds after which no further round begins.
    """

    def __init__(self, file: Path | None = None, enabled: bool = True, rounds: int = 5, enough: float = 0.05) -> None:
        self._rounds = rounds
        self._enough = enough
        self._file = file
        self._enabled = enabled
        self._known: dict[str, Times] | None = None
        self._used: dict[str, Times] = {}
        self._answers: dict[tuple[Hashable, ...], str] = {}

    def answer(
        self,
        question: tuple[Hashable, ...],
        fixed: str,
        candidates: Callable[[], Candidates] | None,
        device: torch.device = _CPU,
        clearly: float = _CLEARLY,
        untimed: str | None = None,
    ) -> str:
        """The name of the fastest candidate.

        Args:
            question: what is to be done, in which dtype, for which class of shapes, and on a GPU on which.
            fixed: the candidate to take unless another is clearly faster.
            candidates: makes what is called to time each; None where nothing can be timed.
            device: where they run. On a GPU the time is its own, without the launch.
            clearly: which part of the fixed candidate's time another may take to be clearly faster.
            untimed: what to take where nothing is timed. None: the fixed candidate.
        """
        if torch.are_deterministic_algorithms_enabled():
            return untimed or fixed
        key = (*question, torch.get_num_threads()) if device.type == "cpu" else question
        found = self._answers.get(key)
        if found is None:
            times = self._times(_question_in_words(question, device), candidates, device)
            if times is None:
                return untimed or fixed
            best = min(times, key=times.__getitem__)
            found = self._answers[key] = best if times[best] < clearly * times.get(fixed, float("inf")) else fixed
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
        """The times that this process used, or took over from the run that it resumes."""
        return dict(self._used)

    def begin(self, times: Mapping[str, Any] | None = None) -> None:
        """Begin a run, or go on with one that kept these times."""
        self._used = _readable(times or {})
        self._answers.clear()

    def _times(self, question: str, candidates: Callable[[], Candidates] | None, device: torch.device) -> Times | None:
        if question not in self._used:
            times = _tuned().get(question)
            if times is None and self._enabled:
                times = self.known().get(question) or (candidates and self._measure(question, candidates, device))
            if times:
                self._used[question] = times
        return self._used.get(question)

    def _measure(self, question: str, candidates: Callable[[], Candidates], device: torch.device) -> Times:
        """Time the candidates, unless another process has.

        On a GPU without holding the file: it may first wait for what the other processes of a run have yet to launch.
        """
        timed = None
        if device.type != "cpu" and question not in self._read():
            timed = _time(candidates, device, self._rounds, self._enough)
        with self._held() as keeps:
            kept = self._read()
            if question not in kept:
                kept[question] = timed or _time(candidates, device, self._rounds, self._enough)
                if keeps:
                    with suppress(OSError):  # a full disk, on which the lock has room
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


def is_captured() -> bool:
    """Whether what a GPU is told now goes into a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def in_words(times: Times) -> str:
    """Candidates, the fastest first, with their times."""
    return ", ".join(f"{name} {times[name]:.3g} ms" for name in sorted(times, key=times.__getitem__))


def _readable(times: Mapping[str, Any]) -> dict[str, Times]:
    """What of a file, which anybody may have changed, are times."""
    return {
        question: found
        for question, found in times.items()
        if isinstance(found, dict) and found and all(isinstance(each, float) for each in found.values())
    }


def _question_in_words(question: tuple[Hashable, ...], device: torch.device) -> str:
    words = " ".join(str(part).removeprefix("torch.") for part in question)
    return f"{words}, threads {torch.get_num_threads()}" if device.type == "cpu" else words


def _time(candidates: Callable[[], Candidates], device: torch.device, rounds: int, enough: float) -> Times:
    """The least time of some calls of each candidate, taking turns after one that warms up.

    A candidate that fails, as for want of memory, is left out; the error is raised where all do.
    """
    seconds = _seconds if device.type == "cpu" else _seconds_on_gpu
    here = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with torch.no_grad(), torch.autocast(device.type, enabled=False), _disable_current_modes(), here:
        calls = dict(candidates())
        for name in list(calls):
            try:
                calls[name]()
            except Exception:  # Triton's are no RuntimeError
                if len(calls) == 1:
                    raise
                del calls[name]
        least = dict.fromkeys(calls, float("inf"))
        end = time.perf_counter() + enough
        for _ in range(rounds):
            for name, call in calls.items():
                least[name] = min(least[name], seconds(call))
            if time.perf_counter() > end:
                break
    return {name: round(1e3 * best, 4) for name, best in least.items()}


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _seconds_on_gpu(call: Callable[[], object]) -> float:
    """Seconds that the GPU works. It waits first, so that all launches, which can take longer, are made by then."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_WAIT)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@cache
def _tuned() -> dict[str, Times]:
    """The times that the package brings, of the GPUs that somebody had."""
    return {
        question: times for file in TUNED.glob("*.json") for question, times in _readable(files.read_json(file)).items()
    }


def _file() -> Path:
    processor = f"{cpu_name()} {torch.backends.cpu.get_cpu_capability()}{' bfloat16' if has_bfloat16() else ''}"
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{processor} torch {torch.__version__} fastpeft {__version__}")
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "fastpeft" / "fastest" / f"{name}.json"


timings = Timings(enabled=os.environ.get(VARIABLE) != "0")
