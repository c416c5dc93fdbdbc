"""The search for learning rates of the protocol `full`: the same number of rates for each method, on a slice of rows.

The dev rows have no part in it: the slice has training rows to learn from, and other training rows to measure on.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

from fastpeft.data.conversations import Conversation
from fastpeft.data.examples import Examples, TextData
from fastpeft.data.problems import MULTI_LABEL, NEXT_WORDS, REGRESSION, Problem
from fastpeft.data.splitting import permutation, side_key
from fastpeft.errors import FastpeftError
from fastpeft.support import files

FACTORS = (1.0, 1 / 3, 3.0)  # of the recipe's rate, which comes first: a better one must beat it
ROWS, DEV_ROWS = 2_000, 1_000  # of the slice, at most
_SHARE = 2 / 3  # of few training rows, to learn from


def rates(recipe: float) -> list[float]:
    """The learning rates to try, to three digits, given a recipe's.

    Example:
        >>> rates(1e-3)
        [0.001, 0.000333, 0.003]
    """
    return [float(f"{recipe * factor:.3g}") for factor in FACTORS]


def slice_sizes(train_rows: int) -> tuple[int, int]:
    """How many of `train_rows` rows the slice has to learn from, and how many to measure on."""
    rows = min(ROWS, int(_SHARE * train_rows))
    return rows, min(DEV_ROWS, train_rows - rows)


def take_slice(data: TextData, rows: int, dev_rows: int | None = None, seed: int = 0) -> TextData:
    """Some of the training rows of `data`, and other rows to measure on.

    Args:
        data: the rows to choose from.
        rows: how many training rows to learn from.
        dev_rows: how many other training rows to measure on. None: the dev rows of `data`.
        seed: decides the choice and the order.

    Raises:
        FastpeftError: the rows to learn from lack a class or tag, or so many rows have one text (of next words one
            prompt) that none are left on a side. A label that rows to learn from lack, no row of the slice has.
    """
    order = permutation(len(data.train), seed)
    learned, left = order[:rows], order[rows:]
    if dev_rows is not None:
        learned, left = _apart(data, order, rows)
    train = data.train.take(learned)
    dev = data.dev if dev_rows is None else data.train.take(left[:dev_rows])
    if data.problem is MULTI_LABEL:
        counts = [sum(label) for label in zip(*train.labels)]
        dev = Examples(dev.texts, [[has * (count > 0) for has, count in zip(row, counts)] for row in dev.labels])
    elif data.problem is not REGRESSION and not data.problem.of_texts_alone:
        seen = {tag for tags in train.labels for tag in (tags if data.problem.per_token else [tags])}
        missing = [name for index, name in enumerate(data.labels) if index not in seen]
        if missing:
            raise FastpeftError(
                f"a slice of {rows:,} training rows has none of {missing[0]!r}, so learning rates cannot be searched "
                "on it. Give more rows, or leave rare classes out."
            )
    return dataclasses.replace(data, train=train, dev=dev)


def _apart(data: TextData, order: list[int], rows: int) -> tuple[list[int], list[int]]:
    """Indices of at most `rows` training rows in an order, and of the rest; what shares a `side_key` stays together."""
    asking: dict[Hashable, list[int]] = {}
    for row in order:
        asking.setdefault(side_key(data.train.texts[row], data.problem), []).append(row)
    learned: list[int] = []
    left: list[int] = []
    for group in asking.values():
        (learned if len(learned) + len(group) <= rows else left).extend(group)
    if not learned or not left:
        raise FastpeftError(
            f"learning rates cannot be searched on {len(order):,} rows of which so many have one text or prompt: rows "
            "to learn from and others to measure on would share it. Give the variants their learning_rate, or choose "
            "the protocol quick."
        )
    return learned, left


def write_rows(data: TextData, folder: Path) -> None:
    """Write `train.jsonl` and `dev.jsonl` into `folder`, which is made if need be, as `load_data` reads them.

    Give it their `problem_type`: scores that are all whole would be taken for classes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", data.train), ("dev", data.dev)):
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in _records(part, data))
        files.write_text(folder / f"{name}.jsonl", "".join(lines))


def _records(examples: Examples, data: TextData) -> Iterable[dict[str, Any]]:
    """Rows as JSON objects, whose columns `load_data` finds by name."""
    if data.problem.of_texts_alone:
        for text in examples.texts:
            yield _text_alone(text, data.problem)
    for text, label in zip(examples.texts, examples.labels):
        if data.problem.per_token:
            yield {"tokens": text, "tags": [data.labels[tag] for tag in label]}
            continue
        columns = {"sentence1": text[0], "sentence2": text[1]} if examples.is_pair else {"text": text}
        if data.problem is MULTI_LABEL:
            yield {**columns, "labels": [name for name, has in zip(data.labels, label) if has]}
            continue
        yield {**columns, "label": label, **({} if data.problem is REGRESSION else {"label_text": data.labels[label]})}


def _text_alone(text: Any, problem: Problem) -> dict[str, Any]:
    if isinstance(text, Conversation):
        return {"messages": text.messages}
    if isinstance(text, str):
        return {"text": text}
    names = ("prompt", "completion") if problem is NEXT_WORDS else ("sentence1", "sentence2")
    return dict(zip(names, text))
