"""What one cell of a table says: a text, words, tags, a number or a class, or an error that names its place.

Every function raises a `FastpeftError` where the cell holds anything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import NoneType
from typing import Any, NamedTuple

from fastpeft.errors import FastpeftError


class Place(NamedTuple):
    """Where a value stands, for messages."""

    table: str
    row: int

    def __str__(self) -> str:
        return f"row {self.row} of {self.table}"


def as_text(value: Any, column: str, place: Place) -> str:
    """A text, as it is; an empty one is one."""
    if not isinstance(value, str):
        raise FastpeftError(
            f"{place} has {value!r} in column {column!r}, which must be text. Correct it or name another column with "
            "--text-column."
        )
    return value


def as_words(value: Any, column: str, place: Place) -> list[str]:
    """A list of words, none of them empty."""
    if not isinstance(value, list) or not value or not all(isinstance(word, str) and word.strip() for word in value):
        raise FastpeftError(
            f"{place} has {value!r} in column {column!r}, which must be a list of words, none of them empty, as jsonl "
            "and parquet files can hold. Correct it or name another column with --text-column."
        )
    return value


def as_tags(value: Any, column: str, words: int, names: Sequence[str] | None, place: Place) -> list[str]:
    """The names of the tags of so many `words`, each as `as_class` reads it."""
    if not isinstance(value, list) or len(value) != words:
        what = f"a list of {len(value)}" if isinstance(value, list) else repr(value)
        raise FastpeftError(
            f"{place} has {what} in column {column!r}, which must be a list of one tag for each of the {words} words. "
            "Correct it or name another column with --label-column."
        )
    return [as_class(tag, column, names, place) for tag in value]


def as_score(value: Any, column: str, place: Place) -> float:
    """A finite number."""
    number = as_number(str(value).strip())
    if number is None or abs(number) == float("inf"):
        raise FastpeftError(
            f"{place} has {value!r} in column {column!r}, which must be a number for regression. Correct it or name "
            "another column with --label-column."
        )
    return float(number)


def as_class(value: Any, column: str, names: Sequence[str] | None, place: Place) -> str:
    """A class as a name: words as they are, whole numbers by `names` or without a decimal point."""
    if not isinstance(value, (str, int, float, NoneType)):
        raise FastpeftError(
            f"{place} has {value!r} in column {column!r}, but a class is one word or whole number: a text or a word "
            "has one class, and several at once cannot be learned. Give one, or name another column with "
            "--label-column."
        )
    absent = value is None or value != value  # NaN, as some writers mark what is missing
    text = "" if absent else str(value).strip()
    number = as_number(text)
    if not text or (isinstance(number, float) and not number.is_integer()):
        what = f"the class {text!r}" if text else "no class"
        raise FastpeftError(
            f"{place} has {what} in column {column!r}; classes are words or whole numbers. Correct it, name another "
            "column with --label-column, or learn numbers (fastpeft train --problem-type regression)."
        )
    if number is None:
        return text
    if names is None:
        return str(int(number))
    if not 0 <= number < len(names):
        raise FastpeftError(
            f"{place} has the class {text!r} in column {column!r}; classes are numbered from 0 to {len(names) - 1} "
            "here. Correct it."
        )
    return names[int(number)]


def as_number(text: str) -> int | float | None:
    """The number that `text` is, a whole one exactly; None for a word, as are inf, nan and 1_0 here."""
    if not text.isascii() or not set(text) & set("0123456789") or "_" in text:
        return None
    for kind in (int, float):
        try:
            float(number := kind(text))
        except (ValueError, OverflowError):  # of an integer that no float holds, which is infinite then
            continue
        return number
    return None
