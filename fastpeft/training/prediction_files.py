"""What a finished run says of many texts, of the rows of a file too, and as which lines and rows.

A row that cannot be used is told by itself, and the others are answered.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fastpeft.data import result_warnings
from fastpeft.data.columns import named_columns, own_columns, pick_columns, prompt_columns
from fastpeft.data.conversations import Conversation, as_conversation, is_conversation, is_written
from fastpeft.data.names import KEPT_LABELS
from fastpeft.data.output_tables import OutputRow
from fastpeft.data.problems import MASKED_WORDS, MULTI_LABEL, REGRESSION, TAGGING
from fastpeft.data.tables import Record, Table, read_apart
from fastpeft.data.values import SEPARATOR, RowRef, as_joined_text, as_text, as_words
from fastpeft.errors import EmptyTextError, FastpeftError
from fastpeft.prompts.template import refuse_one_text
from fastpeft.training.generation import TextGenerator, generates_text
from fastpeft.training.loading import EncodedText, load_run
from fastpeft.training.prediction import Predictor, shortest

logger = logging.getLogger(__name__)

_CHUNK = 256  # rows that are answered together: sorted by length they are batches that pad little
_TEXT, _PAIR = ("text",), ("text_a", "text_b")  # columns of texts that have no names


@dataclass(frozen=True)
class Prediction:
    """The prediction of a run for one text.

    Attributes:
        row: its number: of texts from 1, of a file as `read_apart` counts, after the texts where there are both.
        text: a text, a pair of texts or a list of words.
        scores: the probability of every class or label, `(classes,)`; the number, `(1,)`; or of every word the
            probabilities of the tags, `(words, tags)`; float32. Of a run on next words what it generates.
        others: the row's other columns, which go to the output as they are.
    """

    row: int
    text: Any
    scores: Any
    others: Mapping[str, Any]


class Predictions:
    """The predictions of a finished run, a few hundred rows at a time.

    Args:
        folder: folder of the run.
        texts: as `fastpeft.training.prediction.predict` takes them.
        file: a csv, tsv, jsonl, parquet or txt file, whose rows come after the texts; `-` is the standard input.
        kind: what the file is, where the end of its name does not tell.
        text_column: name of the column of texts, or two names joined by a comma. None: those that the run was trained
            with, else found by their names. Other columns, as that of labels, are not read.
        max_new_tokens: the most tokens that a run on next words generates from a text. None: as of `TextGenerator`.

    Attributes:
        labels: names of the classes or tags, or of the number.
        count: how many rows there are.
        cut: how many of those answered since the iteration began are longer than the run reads.

    Raises:
        FastpeftError: the run or the file cannot be used; or one of `texts`, of which empty ones are left out; or
            `texts` is one text, whose characters would be taken for texts.

    Example:
        >>> found = Predictions("runs/reviews", file="reviews.csv")  # doctest: +SKIP
        >>> for some, left_out in found:  # predictions, and what is wrong with other rows  # doctest: +SKIP
        ...     print([found.records(each) for each in some])
    """

    def __init__(
        self,
        folder: str | Path,
        texts: Sequence[Any] = (),
        file: str | Path | None = None,
        *,
        kind: str | None = None,
        text_column: str | None = None,
        max_new_tokens: int | None = None,
    ) -> None:
        refuse_one_text(texts)
        if text_column is not None and file is None:
            raise FastpeftError(f"`text_column` is {text_column!r}, but there is no file. Name one, or leave it out.")
        name, kind, rows = ("", "", []) if file is None else read_apart(file, kind)
        if text_column is not None and kind == "txt":
            raise FastpeftError(f"`text_column` is {text_column!r}, but {name} is text without columns. Leave it out.")
        self._predictor: Predictor | TextGenerator
        if generates_text(folder):
            self._predictor = TextGenerator(load_run(folder), max_new_tokens)
        elif max_new_tokens is not None:
            raise FastpeftError(
                f"`max_new_tokens` is {max_new_tokens}, but the run in {str(folder)!r} predicts classes or numbers and "
                "generates no text. Remove the option."
            )
        else:
            self._predictor = Predictor(folder)
        self.labels = self._predictor.run.labels
        given = [(number, self._encode_given(number, text)) for number, text in enumerate(texts, start=1)]
        for text in texts:
            if isinstance(text, str) and os.path.isfile(text):
                logger.warning("%r is the name of a file, and is read as a text; for the texts in it give --file", text)
        self._name, self._before = name, len(given)  # which rows of the file come after
        self._rows: list[tuple[int, Any]] = [*given, *((self._before + number, row) for number, row in rows)]
        self._generates = isinstance(self._predictor, TextGenerator)
        self._names: tuple[str, ...] = _PAIR if self._predictor.run.is_pair and not self._generates else _TEXT
        self._records: dict[int, Record] = {}  # of the rows that have columns, by their numbers; none of a txt file
        if file is not None and kind != "txt":
            self._records = {number: row for number, row in self._rows if isinstance(row, dict)}
            if not self._records:
                raise FastpeftError(f"{name} has no row that can be read. {rows[0][1]}")
            self._names = self._pick(text_column)
        self.count = len(self._rows)
        self.cut = 0

    def _pick(self, text_column: str | None) -> tuple[str, ...]:
        """The columns of texts."""
        run = self._predictor.run
        first = next(iter(self._records.values()))
        if text_column is None:
            read = Table(self._name, [first])
            text_column = own_columns(None, run.config.text_column, run.columns[0], read, "--text-column")
            own_labels = self._label_columns(list(first))
            first = {name: value for name, value in first.items() if name not in own_labels}
        if isinstance(self._predictor, TextGenerator):
            names = prompt_columns(Table(self._name, [first]), text_column)
            if is_conversation(first.get(names[0])):
                run.check_conversations()
            return names
        texts = pick_columns(Table(self._name, [first]), MASKED_WORDS, text_column, None).texts
        if (len(texts) == 2) is not run.is_pair:
            kinds = ("pairs of texts", "one text a row")
            learned, here = kinds if run.is_pair else kinds[::-1]
            raise FastpeftError(
                f"the run learned from {learned}, but {self._name} has {here}, in {' and '.join(map(repr, texts))}. "
                "Name the columns that are meant with --text-column."
            )
        return texts

    def _label_columns(self, columns: Sequence[str]) -> tuple[str, ...]:
        """The columns of labels that the run learned from, named or found."""
        run = self._predictor.run
        return named_columns(run.config.label_column or run.columns[1] or "", columns)

    def _read_cells(self, row: Record, at: RowRef) -> Any:
        name, value = self._names[0], row.get(self._names[0])
        if self._generates and (is_conversation(value) or is_written(value)):
            return as_conversation(value, name, at, answered=False)
        if isinstance(value, list) and self._predictor.run.problem is TAGGING:
            return as_words(value, name, at)
        read = as_joined_text if self._generates else as_text  # as in training
        texts = tuple(read(row.get(name), name, at) for name in self._names)
        for name, text in zip(self._names, texts):
            if not text.strip():
                raise FastpeftError(f"{at} has an empty text in column {name!r}. Give one, or remove the row.")
        return texts if len(texts) == 2 else texts[0]

    def __iter__(self) -> Iterator[tuple[list[Prediction], list[FastpeftError]]]:
        """Predictions, and what is wrong with the rows between them that were left out."""
        self.cut = 0
        for start in range(0, len(self._rows), _CHUNK):
            encoded, left_out = [], []
            for number, row in self._rows[start : start + _CHUNK]:
                try:
                    encoded.append((number, self._encode(number, row)))
                except FastpeftError as error:
                    left_out.append(error)
            given = [each for _, each in encoded]
            scores: Sequence[Any]
            if isinstance(self._predictor, TextGenerator):
                scores = self._predictor.generate(given)
            else:
                scores = self._predictor.scores(given)
                self.cut += self._predictor.count_cut(given)
            answered = [
                Prediction(number, each.text, found, self._records.get(number, {}))
                for (number, each), found in zip(encoded, scores)
            ]
            yield answered, left_out

    def _encode_given(self, number: int, text: Any) -> EncodedText | EmptyTextError:
        """A text; an empty one is left out as a row of a file is."""
        try:
            return self._predictor.encode(text)
        except EmptyTextError as error:
            return EmptyTextError(f"text {number}: {error}")

    def _encode(self, number: int, row: Record | EncodedText | FastpeftError) -> EncodedText:
        """A row of the file; the texts that were given are encoded already."""
        if isinstance(row, FastpeftError):
            raise row
        if isinstance(row, EncodedText):
            return row
        at = RowRef(self._name, number - self._before)
        given = self._read_cells(row, at) if self._records else row["text"].strip()
        try:
            return self._predictor.encode(given)
        except FastpeftError as error:
            raise FastpeftError(f"{at}: {error}") from None

    @property
    def warnings(self) -> list[str]:
        """Warnings about the rows that were answered so far."""
        return result_warnings.of_cut_texts(self.cut, self.count, 0, self._predictor.run.max_length)

    # -- what is shown and written -------------------------------------------------------------------------------

    def lines(self, prediction: Prediction, every: bool = False) -> Iterator[str]:
        """A prediction as lines of text, tabs between class, probability and text; with `every`, all classes.

        Of a run on tags there is a line for every word, and an empty one after each text. Of a run on several labels
        `|` stands between those that are answered, and between their probabilities. Of a run on next words it is what
        it generates, and an empty line.
        """
        problem, text = self._predictor.run.problem, prediction.text
        if self._generates:
            yield from prediction.scores.splitlines() or [""]
            yield ""
        elif problem.per_token:
            for word, scores in zip(text, prediction.scores):
                yield _line(*self._said(scores, every), word)
            yield ""
        else:
            texts = text if isinstance(text, tuple) else (text,)
            yield _line(*self._said(prediction.scores, every and problem is not REGRESSION), *texts)

    def _said(self, scores: np.ndarray, every: bool) -> list[str]:
        """What a line says of a text or a word: its class, tag or labels, and their probabilities or those of all."""
        labels, answered = self._answer(scores)
        if every:
            return [labels, ", ".join(f"{name} {p:.3f}" for name, p in zip(self.labels, scores))]
        return [labels, SEPARATOR.join(f"{p:.3f}" for p in answered)]

    def _answer(self, scores: np.ndarray) -> tuple[str, list[float]]:
        """The class, the tag of a word, or the labels with `|` between them, and the probability of each."""
        assert isinstance(self._predictor, Predictor)
        answer = self._predictor.answer(scores)
        several = answer if isinstance(answer, list) else [answer]
        return SEPARATOR.join(name for name, _ in several), [p for _, p in several]

    @cached_property
    def columns(self) -> dict[str, type]:
        """The names and types of what `records` gives: what is made, then the other columns of the file."""
        others: dict[str, list[Any]] = {}
        for row in self._records.values():
            for name, other in self._others(row).items():
                others.setdefault(name, []).append(other)
        return self._made | {name: _kind_of(values) for name, values in others.items()}

    def _others(self, row: Mapping[str, Any]) -> Record:
        """The columns of a row that follow the predictions, by their names there."""
        return {self._kept[name]: each for name, each in row.items() if name in self._kept}

    @cached_property
    def _kept(self) -> dict[str, str]:
        """The file's columns that follow the predictions, and their names there: no texts, and no name that is taken.

        Labels whose name is taken, as by the number that a run gives, get another: they are not to be lost unseen.
        """
        taken = {*self._made, *self._names}
        given = [*dict.fromkeys(name for row in self._records.values() for name in row)]
        kept = {name: name for name in given if name not in taken}
        for name in self._label_columns(given):
            if name in given and name in taken:
                kept[name] = f"{KEPT_LABELS}{name}"
                while kept[name] in {*given, *taken}:
                    kept[name] = f"{KEPT_LABELS}{kept[name]}"
        return {name: kept[name] for name in given if name in kept}

    @cached_property
    def _made(self) -> dict[str, type]:
        """The names and types of the columns of predictions, and of those of texts."""
        problem = self._predictor.run.problem
        if self._generates:
            return {"row": int, "text": str, "said": str}
        if problem.per_token:
            return {"row": int, "word": str, "tag": str, "probability": float}
        made: dict[str, type] = {"row": int}
        if problem is REGRESSION:
            said: dict[str, type] = {"value" if self.labels[0] in made else self.labels[0]: float}
        else:
            said = {"labels" if problem is MULTI_LABEL else "class": str}
            said |= {f"p({label})": float for label in self.labels}
        for name in self._names:
            if name in made or name in said:
                raise FastpeftError(
                    f"the column of texts {name!r} of {self._name} has the name of a column of predictions. Rename it."
                )
        return {**made, **dict.fromkeys(self._names, str), **said}

    def records(self, prediction: Prediction) -> list[OutputRow]:
        """A prediction as rows of a table: one, or one a word."""
        problem, text, scores = self._predictor.run.problem, prediction.text, prediction.scores
        if self._generates:
            read = text.asked if isinstance(text, Conversation) else text
            found: list[list[Any]] = [[prediction.row, str(read), scores]]
        elif problem.per_token:
            best = [self._answer(each) for each in scores]
            found = [[prediction.row, word, tag, shortest(p)] for word, (tag, (p,)) in zip(text, best)]
        else:
            said = [] if problem is REGRESSION else [self._answer(scores)[0]]
            texts = text if isinstance(text, tuple) else (text,)
            found = [[prediction.row, *texts, *said, *map(shortest, scores)]]
        given = self._others(prediction.others)
        others = {name: given.get(name) for name in self.columns if name not in self._made}
        return [dict(zip(self._made, values)) | others for values in found]


def _line(*fields: str) -> str:
    """Fields with tabs between them, and none and no end of a line in them."""
    return "\t".join(" ".join(field.splitlines()).expandtabs(1) for field in fields)


def _kind_of(values: Sequence[Any]) -> type:
    """What a column of a file holds: int, float or str, if all its values are that, else their text."""
    kinds = {type(value) for value in values if value is not None}
    fits = all(abs(value) < 2**63 for value in values if type(value) is int)
    return kinds.pop() if len(kinds) == 1 and kinds <= {int, float, str} and fits else str
