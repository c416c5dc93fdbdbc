"""Which columns of a table hold the texts and which the labels, and what the labels are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fastpeft.data.problems import CLASSIFICATION, MASKED_WORDS, REGRESSION, TAGGING, Problem
from fastpeft.data.tables import Table
from fastpeft.data.values import as_number
from fastpeft.errors import FastpeftError

TEXT_COLUMNS = ("text", "sentence", "review", "content", "document")
PAIR_COLUMNS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text_a", "text_b"),
    ("text1", "text2"),
    ("#1 string", "#2 string"),  # GLUE's MRPC
)
LABEL_COLUMNS = (
    *("label", "labels", "class", "category", "target", "sentiment"),
    *("gold_label", "is_duplicate", "quality", "score"),  # GLUE's and SNLI's
)
WORD_COLUMNS = ("tokens", "words")
TAG_COLUMNS = ("ner_tags", "tags", "labels", "label")
_LABEL_TEXT = "label_text"  # names of the classes that `label` numbers, as in SetFit's data sets


class Columns(NamedTuple):
    """Names of the column, or two, of texts and of that of labels, which may be "" where none are asked for."""

    texts: tuple[str, ...]
    label: str


def pick_columns(table: Table, problem: Problem | None, text_column: str | None, label_column: str | None) -> Columns:
    """The columns of texts and of labels: those named, else by their usual names, else the only one that is left."""
    columns = table.columns
    texts = _named_columns(text_column, columns)
    for name in (*texts, *([label_column] if label_column else [])):
        if name not in columns:
            raise FastpeftError(
                f"{table.name} has no column {name!r}; its columns are {', '.join(columns)}. Name one of these."
            )
    texts_alone = problem is MASKED_WORDS
    if texts_alone and label_column is not None:
        raise FastpeftError(f"`label_column` is {label_column!r}, but no labels are read. Leave it out.")
    tagged = problem is TAGGING or ((problem is None or texts_alone) and _has_words(table, texts))
    label = label_column or _first_of(TAG_COLUMNS if tagged else LABEL_COLUMNS, _left(columns, texts))
    texts = texts or _find_texts(_left(columns, (label,)), tagged, alone=texts_alone or label is not None)
    left = _left(columns, texts)
    if label is None and texts and len(left) == 1:
        (label,) = left.values()
    for found, option in (
        (texts, "--text-column (for pairs two, joined by a comma)"),
        (label or texts_alone, "--label-column"),
    ):
        if not found:
            raise FastpeftError(
                f"cannot tell which column of {table.name} to take; its columns are {', '.join(columns)}. Name it with "
                f"{option}."
            )
    label = label or ""
    if label in texts:
        raise FastpeftError(
            f"column {label!r} of {table.name} cannot be both text and class; its columns are {', '.join(columns)}."
        )
    return Columns(texts, label)


def _has_words(table: Table, texts: Sequence[str]) -> bool:
    """Whether the columns of texts, named or else by their names those of words, hold lists."""
    words = texts or [column for column in table.columns if column.strip().lower() in WORD_COLUMNS]
    return any(isinstance(table.rows[0][column], list) for column in words)


def _find_texts(left: Mapping[str, str], tagged: bool, alone: bool) -> tuple[str, ...]:
    """The column of texts, or two, among those that `_left` gave; `alone`: the only one is it, whatever its name."""
    pair = next((pair for pair in PAIR_COLUMNS if all(name in left for name in pair)), None)
    if pair and not tagged:
        return left[pair[0]], left[pair[1]]
    if name := _first_of(WORD_COLUMNS if tagged else TEXT_COLUMNS, left):
        return (name,)
    return tuple(left.values()) if alone and len(left) == 1 else ()


def _left(columns: Sequence[str], taken: Sequence[str | None]) -> dict[str, str]:
    """The columns that are not taken, by their names without spaces around and in lower case."""
    return {column.strip().lower(): column for column in columns if column not in taken}


def _first_of(usual: Sequence[str], left: Mapping[str, str]) -> str | None:
    """The first of the usual names that is left, as the data writes it."""
    return next((left[name] for name in usual if name in left), None)


def _named_columns(given: str | None, columns: Sequence[str]) -> tuple[str, ...]:
    """The columns of texts that a person names: one, or two joined by a comma."""
    if given is None or given in columns:
        return () if given is None else (given,)
    names = tuple(name.strip() for name in given.split(","))
    if len(names) > 2 or len(set(names)) < len(names):
        raise FastpeftError(
            f"`text_column` is {given!r}; a row has one text or two. Name one column, or two different ones joined by "
            "a comma."
        )
    return names


def class_names(table: Table, label: str) -> list[str] | None:
    """The names of the classes that the whole numbers in the column `label` stand for, where the data has them."""
    if label in table.class_names:
        return table.class_names[label]
    if label != "label" or not all({label, _LABEL_TEXT} <= row.keys() for row in table.rows):
        return None
    pairs = {(as_number(str(row[label])), str(row[_LABEL_TEXT])) for row in table.rows}
    named = sorted((number, text) for number, text in pairs if number is not None)
    distinct = len({text for _, text in pairs}) == len(pairs)
    return [text for _, text in named] if distinct and [n for n, _ in named] == list(range(len(pairs))) else None


def tell_problem(table: Table, columns: Columns) -> Problem:
    """What the labels of `table` are."""
    if isinstance(table.rows[0][columns.texts[0]], list):
        return TAGGING
    numbers = [as_number(str(row.get(columns.label)).strip()) for row in table.rows]
    whole = all(number is None or float(number).is_integer() for number in numbers)
    return CLASSIFICATION if whole or None in numbers else REGRESSION
