"""The one error type of the library."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Callable, Iterable, Mapping

_OF_MEMORY = re.compile("out of memory|DefaultCPUAllocator|ALLOC_FAILED")  # the last from cuBLAS and cuDNN


class FastpeftError(ValueError):
    """Raised when what was given cannot be used.

    Its message names what was given, what is allowed and what to do. The command line prints the message
    alone and exits with code 2. A name of an option stands in backticks in what it is made of; the message has it as
    Python does, and on the command line as it is typed there.
    """

    def __str__(self) -> str:
        return self.message_for(str)

    def message_for(self, named: Callable[[str], str]) -> str:
        """The message, in which `named` writes the name of an option."""
        return re.sub(r"`(\w+)`", lambda found: named(found[1]), super().__str__())


class EmptyTextError(FastpeftError):
    """Raised where there should be a text and nothing is."""


class NotFiniteError(FastpeftError):
    """Raised when a step came upon a NaN or an infinity, and was not made."""


class LostProcessError(FastpeftError):
    """Raised when a process that trains with this one has ended or does not answer."""


class NotEnoughMemoryError(FastpeftError):
    """Raised when the memory of a GPU, or of the machine, is not enough for what was given."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether Python or a library says so that memory is not enough; of those on CPUs PyTorch has no type."""
    said = isinstance(error, RuntimeError) and _OF_MEMORY.search(str(error)) is not None
    return said or isinstance(error, MemoryError)


def first_line(error: Exception) -> str:
    """What another library's error says, in one line: its first, or its type where it says nothing."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def did_you_mean(given: str, allowed: Iterable[str], cutoff: float = 0.6) -> str:
    """A sentence with the names that are close to a given one, in any case, after a space; nothing where none is."""
    known, given = {name.lower(): name for name in allowed}, given.lower()
    close = [name for name in known if name.startswith(given)] or difflib.get_close_matches(given, known, 3, cutoff)
    return f" Did you mean {' or '.join(known[name] for name in close)}?" if close else ""


def install(extra: str) -> str:
    """How to install what an extra brings, for a message: its packages alone, for a build of this one takes minutes."""
    from importlib import metadata  # which takes a tenth of the time that the command line's help does

    try:
        required = metadata.requires("fastpeft") or ()
    except metadata.PackageNotFoundError:  # run from its sources
        required = ()
    packages = [each.partition(";")[0].strip() for each in required if f'extra == "{extra}"' in each]
    return f"pip install {shlex.join(packages)}" if packages else f'pip install ".[{extra}]" from a clone'


def refuse(conflicts: Mapping[str, object]) -> None:
    """Raise `FastpeftError` with the first message whose condition holds."""
    if found := next(filter(conflicts.get, conflicts), None):
        raise FastpeftError(found)
