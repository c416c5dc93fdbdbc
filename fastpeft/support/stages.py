"""Reports of how far a long call has come, for a program that asks for them: the command line shows them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

# takes a stage, how much of it is done, of how much (None: not known), and measurements by name
Listener = Callable[[str, int, int | None, Mapping[str, float]], None]

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


def report(stage: str, done: int = 0, total: int | None = None, **measured: float) -> None:
    """Tell the listener, if there is one, which stage is under way, and how far."""
    listener = _listener.get()
    if listener is not None:
        listener(stage, done, total, measured)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Inside it `listener` is called with every report."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
