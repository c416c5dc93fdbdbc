"""Which columns of a table hold the texts and which the labels, and what the labels are."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fastpeft.data.conversations import is_conversation
from fastpeft.data.names import KEPT_LABELS
from fastpeft.data.problems import CLASSIFICATION, MULTI_LABEL, NEXT_WORDS, REGRESSION, TAGGING, Problem
from fastpeft.data.tables import Table
from fastpeft.data.values import SEPARATOR, as_number
from fastpeft.errors import FastpeftError

logger = logging.getLogger(__name__)

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
# what a decoder learns to say: conversations, or texts after texts
CONVERSATION_COLUMNS = ("messages", "conversations")
COMPLETION_COLUMNS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("question", "answer"),
)
_BESIDE_PROMPTS = ("input", "context", "system", "system_prompt", "history")
LABEL_COLUMNS = (
    *("label", "labels", "class", "category", "target", "sentiment"),
    *("gold_label", "is_duplicate", "quality", "score"),  # GLUE's and SNLI's
)
_ROW_NUMBERS = ("id", "idx", "index", "row")  # which would do as classes
WORD_COLUMNS = ("tokens", "words")
TAG_COLUMNS = ("ner_tags", "tags", "labels", "label")
_WORDS_OF_A_NAME = 4  # a longer one is a text
_DECIMAL = re.compile(r"[+-]?\d+([.,]\d+)?")
_LABEL_TEXT = "label_text"  # names of the classes that `label` numbers, as in SetFit's data sets


class Columns(NamedTuple):
    """Names of the column, or two, of texts and of that of labels.

    The latter is "" where no labels are asked for, and where each label has a column of its own, of 0 and 1: `flags`.
    """

    texts: tuple[str, ...]
    label: str
    flags: tuple[str, ...] = ()

    @property
    def named(self) -> tuple[str, str | None]:
        """`text_column` and `label_column` as a person would name them."""
        return ",".join(self.texts), ",".join(self.flags) or self.label or None

    @property
    def labels(self) -> str:
        """The columns of labels, for messages."""
        return ", ".join(map(repr, self.flags or [self.label]))


def pick_columns(
    table: Table,
    problem: Problem | None,
    text_column: str | None,
    label_column: str | None,
    known: Sequence[str] = (),
) -> Columns:
    """The columns of texts and of labels: those named, else by their usual names, else the only one that is left,
    unless it numbers the rows.

    Args:
        table: where to look.
        problem: what the labels are, where it is known.
        text_column, label_column: those that a person names.
        known: labels that have columns of their own, where these are there and no other is named.
    """
    columns = table.columns
    texts_alone = problem is not None and problem.of_texts_alone
    if texts_alone and label_column is not None:
        raise FastpeftError(f"`label_column` is {label_column!r}, but no labels are read. Leave it out.")
    texts = _named_texts(text_column, columns)
    if problem is NEXT_WORDS and not texts:
        texts = _find_prompts(table)
    flags = named_columns(label_column, columns) if label_column else ()
    if label_column is None and known and {*known} <= {*columns}:
        flags = tuple(known)
    for name in (*texts, *flags):
        if name not in columns:
            raise FastpeftError(
                f"{table.name} has no column {name!r}; its columns are {', '.join(columns)}. Name one of these."
            )
    if len(flags) > 1:
        return _with_flags(table, problem, texts, flags)
    tagged = problem is TAGGING or ((problem is None or texts_alone) and _has_words(table, texts))
    label = next(iter(flags), None) or _first_of(TAG_COLUMNS if tagged else LABEL_COLUMNS, _left(columns, texts))
    texts = texts or _find_texts(_left(columns, (label,)), tagged, alone=texts_alone or label is not None)
    left = _left(columns, texts)
    if label is None and texts and len(left) == 1 and left.keys().isdisjoint(_ROW_NUMBERS):
        (label,) = left.values()
    if not texts:
        raise _cannot_tell(table, "--text-column (for pairs two, joined by a comma)", problem)
    if not label and not texts_alone:
        if not left:
            raise FastpeftError(
                f"{table.name} has no column beside {' and '.join(map(repr, texts))}, so no labels. Add a column with "
                "the label of each text; a language model learns from texts alone, by --objective causal."
            )
        raise _cannot_tell(table, "--label-column", problem)
    label = "" if texts_alone else label or ""
    if label in texts:
        raise FastpeftError(
            f"column {label!r} of {table.name} cannot be both text and class; its columns are {', '.join(columns)}."
        )
    return Columns(texts, label)


def _cannot_tell(table: Table, option: str, problem: Problem | None) -> FastpeftError:
    """The error where no column is the one that `option` would name."""
    left = _left(table.columns, ())
    pair = _pair_of(COMPLETION_COLUMNS, left)
    said = beside = ""
    if (problem is None or not problem.of_texts_alone) and (pair or _find_prompts(table)):
        said = "; or, to train a language model on these texts, give --objective causal"
    elif problem is NEXT_WORDS and pair:
        others = " and ".join(repr(left[name]) for name in _BESIDE_PROMPTS if name in left)
        beside = f" Only two are read: where an answer depends on {others} too, write that into {pair[0]!r} first."
    header = ""
    if any(len(name.split()) > _WORDS_OF_A_NAME for name in table.columns):
        header = " If the first line is a row already, put one with the names of columns above it."
    return FastpeftError(
        f"cannot tell which column of {table.name} to take; its columns are {', '.join(table.columns)}. Name it with "
        f"{option}{said}.{beside}{header}"
    )


def _with_flags(table: Table, problem: Problem | None, texts: tuple[str, ...], flags: tuple[str, ...]) -> Columns:
    """The columns where every label has one of its own."""
    if problem not in (None, MULTI_LABEL):
        raise FastpeftError(
            f"`label_column` names {len(flags)} columns, {', '.join(flags)}, which are labels of 0 and 1, but "
            f"`problem_type` is {problem.short!r}. Name one column, or leave `problem_type` out."
        )
    texts = texts or _find_texts(_left(table.columns, flags), tagged=False, alone=True)
    if not texts:
        raise _cannot_tell(table, "--text-column", MULTI_LABEL)
    if doubled := {*texts} & {*flags} or [name for name in flags if flags.count(name) > 1]:
        raise FastpeftError(f"column {min(doubled)!r} of {table.name} is named twice. Name every column once.")
    if joined := [name for name in flags if SEPARATOR in name]:
        raise FastpeftError(
            f"{table.name} has the label {joined[0]!r}, but {SEPARATOR} stands between labels. Rename its column."
        )
    return Columns(texts, "", flags)


def own_columns(given: str | None, named: str | None, found: str | None, table: Table, option: str) -> str | None:
    """Which columns of `table` a finished run reads. None: they are to be found by their usual names.

    Args:
        given: what a person names now; it is taken as it is.
        named: what a person named for the training; it is taken if `table` has one of these, with a warning if not.
        found: if none were named, what the training found by usual names; it is taken if `table` has all of these.
        table: the rows to read.
        option: names the columns on the command line, for the warning.
    """
    if given is not None:
        return given
    if named is None:
        return found if found and {*named_columns(found, table.columns)} <= {*table.columns} else None
    if {*named_columns(named, table.columns)} & {*table.columns}:
        return named
    logger.warning(
        "%s has no column %r, which the run was trained with; one with a usual name is looked for. Name one with %s.",
        table.name,
        named,
        option,
    )
    return None


def named_columns(given: str, columns: Sequence[str]) -> tuple[str, ...]:
    """The columns that a person names: one, or several joined by commas."""
    return (given,) if given in columns else tuple(name.strip() for name in given.split(","))


def check_not_predicted(table: Table, columns: Columns) -> None:
    """Raise `FastpeftError` where the column of labels, which nobody named, holds what a model said of the texts."""
    kept = f"{KEPT_LABELS}{columns.label}"
    if columns.label and kept in table.columns:
        raise FastpeftError(
            f"column {columns.label!r} of {table.name} holds predictions, and {kept!r} the labels that were there. "
            f"Name the one to take with --label-column {kept!r} or {columns.label!r}."
        )


def check_separated(tables: Sequence[Table], label: str) -> None:
    """Raise `FastpeftError` where labels in one column seem to be separated by something else than `|`."""
    cells = [value for table in tables for row in table.rows if isinstance(value := row.get(label), str)]
    if any(SEPARATOR in cell for cell in cells):
        return
    odd = next((cell for cell in cells if "," in cell or ";" in cell or cell.strip().startswith("[")), None)
    if odd is not None:
        raise FastpeftError(
            f"column {label!r} of {tables[0].name} has {odd!r}, and no row has a {SEPARATOR}, which stands between the "
            f"labels of a text, as in comedy{SEPARATOR}drama. Separate them so, write lists in a jsonl or parquet "
            "file, or give each label a column of 0 and 1 and name these by --label-column, joined by commas."
        )


def check_answers(table: Table, texts: Sequence[str]) -> None:
    """Raise `FastpeftError` where a column of answers stands beside one text and no prompt: it would not be learned."""
    left = _left(table.columns, texts)
    prompts, answers = zip(*COMPLETION_COLUMNS)
    targets = () if texts[0].strip().lower() in TEXT_COLUMNS else ("target",)  # beside those it may be a class
    answer = _first_of((*answers, "summary", *targets), left)
    if answer and len(texts) == 1 and left.keys().isdisjoint(prompts):
        raise FastpeftError(
            f"{table.name} has column {answer!r} beside {texts[0]!r}. Give --text-column {texts[0]},{answer} to learn "
            f"what follows a text, or --text-column {texts[0]} to learn texts alone."
        )


def _has_words(table: Table, texts: Sequence[str]) -> bool:
    """Whether the columns of texts, named or else by their names those of words, hold lists."""
    words = texts or [column for column in table.columns if column.strip().lower() in WORD_COLUMNS]
    return any(isinstance(table.rows[0].get(column), list) for column in words)


def _find_texts(left: Mapping[str, str], tagged: bool, alone: bool) -> tuple[str, ...]:
    """The column of texts, or two, among those that `_left` gave; `alone`: the only one is it, whatever its name."""
    if (pair := _pair_of(PAIR_COLUMNS, left)) and not tagged:
        return pair
    if name := _first_of(WORD_COLUMNS if tagged else TEXT_COLUMNS, left):
        return (name,)
    return tuple(left.values()) if alone and len(left) == 1 else ()


def prompt_columns(table: Table, text_column: str | None) -> tuple[str, ...]:
    """The column of what a decoder goes on from: the one that a person names, else conversations, prompts or texts.

    Raises:
        FastpeftError: it cannot be told, or there is none of that name.
    """
    named = _named_texts(text_column, table.columns)[:1]  # of a prompt and its completion the first
    alone = _first_of([pair[0] for pair in COMPLETION_COLUMNS], _left(table.columns, ()))
    if not named and alone and not _find_prompts(table):
        named = (alone,)
    return pick_columns(table, NEXT_WORDS, named[0] if named else None, None).texts[:1]


def _find_prompts(table: Table) -> tuple[str, ...]:
    """The column of conversations, or those of prompts and completions; empty where there are none."""
    left = _left(table.columns, ())
    column = _first_of(CONVERSATION_COLUMNS, left)
    if column and any(is_conversation(row.get(column)) for row in table.rows):
        return (column,)
    if not left.keys().isdisjoint(_BESIDE_PROMPTS):  # what an answer depends on too, which would be lost
        return ()
    return _pair_of(COMPLETION_COLUMNS, left)


def _pair_of(usual: Sequence[tuple[str, str]], left: Mapping[str, str]) -> tuple[str, ...]:
    """The first of the usual pairs of names that is left, as the data writes it; empty where none is."""
    pair = next((pair for pair in usual if all(name in left for name in pair)), ())
    return tuple(left[name] for name in pair)


def _left(columns: Sequence[str], taken: Sequence[str | None]) -> dict[str, str]:
    """The columns that are not taken, by their names without spaces around and in lower case; of two with the same name
    the one that is written so."""
    left = [column for column in columns if column not in taken]
    return {column.strip().lower(): column for column in left} | {
        column: column for column in left if column == column.strip().lower()
    }


def _first_of(usual: Sequence[str], left: Mapping[str, str]) -> str | None:
    """The first of the usual names that is left, as the data writes it."""
    return next((left[name] for name in usual if name in left), None)


def _named_texts(given: str | None, columns: Sequence[str]) -> tuple[str, ...]:
    """The columns of texts that a person names: one or two; none where none is named."""
    names = () if given is None else named_columns(given, columns)
    if len(names) > 2 or len(set(names)) < len(names):
        raise FastpeftError(
            f"`text_column` is {given!r}; a row has one text or two. Name one column, or two different ones joined by "
            "a comma."
        )
    return names


def class_names(table: Table, label: str) -> dict[int, str] | None:
    """The names of the classes that the whole numbers in the column `label` stand for, where the data has them."""
    if label in table.class_names:
        return dict(enumerate(table.class_names[label]))
    if label != "label" or not any(_LABEL_TEXT in row for row in table.rows):
        return None
    pairs = {(as_number(str(row.get(label))), str(row.get(_LABEL_TEXT) or "").strip()) for row in table.rows}
    named = sorted((int(n), text) for n, text in pairs if n is not None and float(n).is_integer())
    if len(named) < len(pairs):  # labels are words, or missing
        return None
    names = dict(named)
    if not len(names) == len({*filter(None, names.values())}) == len(pairs):
        logger.warning(
            "%s: column %r does not give each number in column %r one name of its own, and is not used",
            table.name,
            _LABEL_TEXT,
            label,
        )
        return None
    return names


def tell_problem(table: Table, columns: Columns) -> Problem:
    """What the labels of `table` are."""
    if isinstance(table.rows[0].get(columns.texts[0]), list):
        return TAGGING
    # what is missing, as NaN, says nothing of the others; who reads them names its row
    given = [value for row in table.rows if (value := row.get(columns.label)) is not None and value == value]
    if columns.flags or (given and all(isinstance(value, list) for value in given)):
        return MULTI_LABEL
    cells = [cell for value in given if (cell := str(value).strip())]
    numbers = [as_number(cell) for cell in cells]
    if any(number is not None for number in numbers) and not {"true", "false"}.isdisjoint(map(str.lower, cells)):
        raise FastpeftError(
            f"column {columns.label!r} of {table.name} has numbers beside true or false, which would be other "
            "classes. Write all in one way, as 1 and 0 or as true and false."
        )
    with_comma = [cell for cell in cells if "," in cell]
    if with_comma and all(map(_DECIMAL.fullmatch, cells)):
        raise FastpeftError(
            f"column {columns.label!r} of {table.name} has numbers with a comma, as {with_comma[0]!r}. Write them with "
            "a decimal point, as 1.5; or, if they are classes, add --problem-type classification."
        )
    whole = all(number is None or float(number).is_integer() for number in numbers)
    return CLASSIFICATION if whole or None in numbers else REGRESSION
