"""Keeping a Ctrl-C out of what must happen as a whole.

Python runs the handler of a signal between any two of its steps, so that the KeyboardInterrupt which the one of Ctrl-C
raises can part a change of the weights from the note that it was made.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

# those that schedulers, launchers and time limits send, and to which handlers that raise are set
_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGALRM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
)


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
