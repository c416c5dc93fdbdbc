"""What one cell of a table says: a text, words, tags, a number, a class or labels, or an error that names its place.

Every function raises a `FastpeftError` where the cell holds anything else.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from types import NoneType
from typing import Any, NamedTuple

from fastpeft.data.names import UNLABELLED
from fastpeft.errors import EmptyTextError, FastpeftError

SEPARATOR = "|"  # between the labels of a text in one cell
_CODE = re.compile(r"[+-]?0\d+|\d+[eE]\d+")  # 01 is another class than 1, and 1e1 than 10
_FLAGS = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}


class RowRef(NamedTuple):
    """Where a value stands, for messages."""

    table: str
    row: int

    def __str__(self) -> str:
        return f"row {self.row} of {self.table}"


def as_text(value: Any, column: str, at: RowRef) -> str:
    """A text, as it is; an empty one is one."""
    if not isinstance(value, str):
        raise FastpeftError(
            f"{at} has {reprlib.repr(value)} in column {column!r}, which must be text. Correct it or name another "
            "column with --text-column."
        )
    return value


def as_joined_text(value: Any, column: str, at: RowRef) -> str:
    """A text, or a list of words as one."""
    return " ".join(as_words(value, column, at)) if isinstance(value, list) else as_text(value, column, at)


def refuse_empty(*texts: str) -> None:
    """Raise `EmptyTextError` where a text to answer, or one of a pair, has no sign but white space."""
    if not all(text.strip() for text in texts):
        raise EmptyTextError("the text is empty. Give one, or leave it out.")


def as_words(value: Any, column: str, at: RowRef) -> list[str]:
    """A list of words, none of them empty."""
    words = value if isinstance(value, list) and value else [None]
    for number, word in enumerate(words, 1):
        if not isinstance(word, str) or not word.strip():
            what = f"{word!r} as word {number}" if words is value else reprlib.repr(value)
            raise FastpeftError(
                f"{at} has {what} in column {column!r}, which must be a list of words, none of them empty, as jsonl "
                "and parquet files can hold. Correct it or name another column with --text-column."
            )
    return value


def as_tags(value: Any, column: str, words: int, names: Mapping[int, str] | None, at: RowRef) -> list[str]:
    """The names of the tags of so many `words`, each as `as_class` reads it."""
    if not isinstance(value, list) or len(value) != words:
        what = f"a list of {len(value)}" if isinstance(value, list) else repr(value)
        raise FastpeftError(
            f"{at} has {what} in column {column!r}, which must be a list of one tag for each of the {words} words. "
            "Correct it or name another column with --label-column."
        )
    for word, tag in enumerate(value, 1):
        if tag is None or tag != tag or tag == UNLABELLED:
            raise FastpeftError(
                f"{at} has {tag!r} as the tag of word {word} in column {column!r}. Give each word one; O is for those "
                "that belong to nothing."
            )
    return [as_class(tag, column, names, at) for tag in value]


def as_labels(value: Any, column: str, names: Mapping[int, str] | None, at: RowRef) -> list[str]:
    """The names of a text's labels, each as `as_class` reads it: a list, or a text with `|` between them; or none."""
    if isinstance(value, str):
        value = value.split(SEPARATOR) if value.strip() else []
    if value is None or value != value:
        raise FastpeftError(
            f"{at} has no value for its labels in column {column!r}. Write an empty list, or in csv and tsv files an "
            "empty text, where no label applies; or leave the row out."
        )
    if isinstance(value, list) and any(isinstance(label, (list, dict)) for label in value):
        raise FastpeftError(
            f"{at} has {reprlib.repr(value)} in column {column!r}, but a label is one word or whole number. Write "
            "those; or, where these are spans of the text, a list of its words and a list of one tag for each."
        )
    labels = [as_class(label, column, names, at) for label in (value if isinstance(value, list) else [value])]
    for label in labels:
        if SEPARATOR in label:
            raise FastpeftError(
                f"{at} has the label {label!r} in column {column!r}, but {SEPARATOR} stands between labels. Rename it."
            )
    different = list(dict.fromkeys(labels))
    if len(different) < len(labels) and all(label.lower() in _FLAGS for label in labels):
        raise FastpeftError(
            f"{at} has {value!r} in column {column!r}, which are not names of labels, but flags. Write the names of "
            "the labels that apply, or a column of 0 and 1 for each label (--label-column a,b,c)."
        )
    return different


def as_flag(value: Any, column: str, at: RowRef) -> bool:
    """Whether a text has the label that its column is named after."""
    flag = _FLAGS.get(str(value).strip().lower())
    if flag is None:
        raise FastpeftError(
            f"{at} has {value!r} in column {column!r}, which must be 1 where the text has that label and 0 where "
            "not. Correct it, or name other columns with --label-column."
        )
    return flag


def as_score(value: Any, column: str, at: RowRef) -> float:
    """A finite number."""
    number = as_number(str(value).strip())
    if number is None or abs(number) == float("inf"):
        raise FastpeftError(
            f"{at} has {value!r} in column {column!r}, which must be a number for regression, with a decimal "
            "point, as 1.5, and no comma. Correct it or name another column with --label-column."
        )
    return float(number)


def as_class(value: Any, column: str, names: Mapping[int, str] | None, at: RowRef) -> str:
    """A class as a name: words and codes as they are, whole numbers by `names` or without a decimal point."""
    if not isinstance(value, (str, int, float, NoneType)):
        raise FastpeftError(
            f"{at} has {value!r} in column {column!r}, but a class is one word or whole number. Give one; learn "
            "several labels of a text by --problem-type multi-label; or name another column with --label-column."
        )
    absent = value is None or value != value  # NaN, as some writers mark what is missing
    text = "" if absent else str(value).strip()
    number = None if names is None and _CODE.fullmatch(text) else as_number(text)
    if not text or (isinstance(number, float) and not number.is_integer()):
        what, remedy = "no class", "Give it one, remove the row,"
        if text:
            what, remedy = f"the class {text!r}", "Correct it, add --problem-type regression if labels are numbers,"
        raise FastpeftError(
            f"{at} has {what} in column {column!r}; classes are words or whole numbers. {remedy} or name another "
            "column with --label-column."
        )
    if number is None:
        return text
    if names is None:
        return str(int(number))
    if number not in names:
        raise FastpeftError(
            f"{at} has the class {text!r} in column {column!r}; the numbers of classes here are "
            f"{reprlib.repr([*names])[1:-1]}. Correct it."
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
