"""Signals that interrupt: put off until a change is whole, noted until a step is made, or raised at once.

Python runs the handler of a signal between any two of its steps. So the KeyboardInterrupt of a Ctrl-C can come after a
change of the weights and before the note that it was made.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

# a terminal sends the last when it is closed, which Windows has not
_STOPS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
# those that schedulers, launchers and time limits send, and to which handlers that raise are set
_SIGNALS = (*_STOPS, *(getattr(signal, name) for name in ("SIGALRM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)))
_ONE_REQUEST = 0.5  # seconds: within them a person asks once, and a launcher passes on what all were sent


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Inside it no handler of a signal runs; those of signals that come meanwhile run at its end, once each.

    Only what handlers in Python do is put off, and only in the main thread: Python runs them in no other. It decorates
    functions as well.

    Example:
        >>> with uninterrupted():
        ...     pair = [1]
        ...     pair.append(2)  # a Ctrl-C is raised after this line
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
    arrived: dict[int, FrameType | None] = {}
    inside = True

    def put_off(number: int, frame: FrameType | None) -> None:
        if inside:
            arrived[number] = frame
        else:  # between the beginning of the end and its turn there
            signal.signal(number, handlers[number])
            handlers[number](number, frame)

    try:
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler):
                handlers[number] = handler
                signal.signal(number, put_off)
        yield
    finally:
        inside = False
        with ExitStack() as end:  # does all of it whatever raises, the last one first
            for number, frame in arrived.items():
                end.callback(handlers[number], number, frame)
            for number, handler in handlers.items():
                end.callback(signal.signal, number, handler)


class StopRequest:
    """Whether a run was asked to end, by a signal."""

    def __init__(self) -> None:
        self.asked = False


@contextmanager
def noting_stops(request: StopRequest, notice: str) -> Iterator[None]:
    """Inside it the first Ctrl-C, SIGTERM or SIGHUP is noted in `request`, and each raises when it comes again.

    A terminal sends a Ctrl-C to all processes, and one of them may then send SIGTERM to another: that is one request.
    So is a signal that comes again at once: schedulers send it to all processes, and a launcher passes its own on. A
    handler that somebody has set stays in its place, and a signal that is ignored stays ignored.

    Args:
        request: where to note it.
        notice: what to log as a warning when a first signal comes.

    Raises:
        KeyboardInterrupt: a signal came for the second time, half a second or more after the first.
    """
    came: dict[int, float] = {}  # when, by the monotonic clock

    def note(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number in came and now - came[number] >= _ONE_REQUEST:
            raise KeyboardInterrupt
        if not came:
            # from another thread: here a write to the terminal may be under way, which cannot be entered twice
            threading.Thread(target=logger.warning, args=(notice,)).start()
        came.setdefault(number, now)
        request.asked = True

    with _handling(note, *_STOPS):
        yield


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise `KeyboardInterrupt` inside it, unless somebody has set a handler."""
    with _handling(signal.default_int_handler, *_STOPS[1:]):
        yield


@contextmanager
def interrupted_once() -> Iterator[None]:
    """Let SIGINT, SIGTERM and SIGHUP raise `KeyboardInterrupt` inside it, unless somebody has set a handler.

    What comes within half a second of one that raised is the same request, as in `noting_stops`.
    """
    raised = -math.inf  # when, by the monotonic clock

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal raised
        if (now := time.monotonic()) - raised >= _ONE_REQUEST:
            raised = now
            raise KeyboardInterrupt

    with _handling(interrupt, *_STOPS):
        yield


def init_worker(_: int) -> None:
    """Begin a process that loads rows, which ignores SIGINT, SIGHUP, and the SIGTERM of any but the one that made it.

    A launcher or scheduler sends signals to all processes, but the one that trains has yet to make its step of rows.
    Any SIGTERM ends it where the system does not say who sent it, as macOS, and where other threads would take it, as
    those of libraries in a process that was not forked.
    """
    for number in set(_STOPS) - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    parent, threads = multiprocessing.parent_process(), "/proc/self/task"
    if parent is None or not hasattr(signal, "sigwaitinfo") or not os.path.isdir(threads) or os.listdir(threads)[1:]:
        return

    def wait() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent.pid:
            pass
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], Any], *numbers: signal.Signals) -> Iterator[None]:
    """Set a handler of signals where Python's own is set, and where handlers can be set: in the main thread."""
    before: dict[int, Any] = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in numbers:
                if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    before[number] = signal.signal(number, handler)
        yield
    finally:
        for taken, own in before.items():
            signal.signal(taken, own)
