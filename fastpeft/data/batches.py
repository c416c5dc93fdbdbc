"""Which rows are computed together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastpeft.data.problems import Problem

_EVALUATED = 64


def eval_batch_size(problem: Problem, trained: int) -> int:
    """How many rows are evaluated together: of outputs over the whole vocabulary as many as are `trained` on."""
    return _EVALUATED if problem.digest is None else trained


def order_by_length(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """The places of rows of tokens, from the shortest on: batches in this order pad little."""
    return sorted(range(len(rows)), key=lambda place: len(rows[place]["input_ids"]))


def by_length(rows: Sequence[Mapping[str, Any]], size: int) -> Iterator[list[int]]:
    """The places of `order_by_length`, at most `size` at a time."""
    order = order_by_length(rows)
    for start in range(0, len(order), size):
        yield order[start : start + size]
