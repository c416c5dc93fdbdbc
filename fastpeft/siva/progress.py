"""Reports of how many weights are decomposed, for a program that asks for them: `fastpeft train` draws a bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Listener = Callable[[int, int], None]

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


def report(done: int, total: int) -> None:
    """Tell the listener, if there is one."""
    listener = _listener.get()
    if listener is not None:
        listener(done, total)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Inside it `listener` is called after each layer with the number of decomposed layers and that of all."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
