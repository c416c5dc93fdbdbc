"""The one error type of the library."""

from __future__ import annotations


class FastpeftError(ValueError):
    """Raised when what was given cannot be used.

    Its message names what was given, what is allowed and what to do. The command line prints the message
    alone and exits with code 2.
    """


class NotFiniteError(FastpeftError):
    """Raised when a step came upon a NaN or an infinity, and was not made."""


class LostProcessError(FastpeftError):
    """Raised when a process that trains with this one has ended or does not answer."""


def first_line(error: Exception) -> str:
    """What another library's error says, in one line: its first, or its type where it says nothing."""
    return str(error).strip().split("\n")[0] or type(error).__name__
