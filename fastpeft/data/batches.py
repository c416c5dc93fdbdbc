"""Which rows are computed together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastpeft.data.problems import Problem

EVALUATED = (64, 64 * 128)  # rows, and tokens with their padding


def eval_limits(problem: Problem, trained: int) -> tuple[int, int | None]:
    """How many rows, and tokens, are evaluated together: of a language model as many rows as are `trained` on."""
    return EVALUATED if problem.digest is None else (trained, None)


def most_rows(length: int, size: int, tokens: int | None) -> int:
    """How many rows as long as this are at most `size` and, unless there is but one, have at most so many tokens."""
    return size if tokens is None else min(size, max(1, tokens // max(1, length)))


def order_by_length(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """The places of rows of tokens, from the shortest on: batches in this order pad little."""
    return _sorted(_lengths(rows))


def by_length(rows: Sequence[Mapping[str, Any]], size: int, tokens: int | None = None) -> Iterator[list[int]]:
    """The places of `order_by_length`, at a time as many as `most_rows` says of the longest of them."""
    batch: list[int] = []
    lengths = _lengths(rows)
    for place in _sorted(lengths):
        if len(batch) >= most_rows(lengths[place], size, tokens):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def _lengths(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    return [len(row["input_ids"]) for row in rows]


def _sorted(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lengths.__getitem__)
