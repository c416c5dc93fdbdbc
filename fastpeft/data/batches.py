"""Which rows are computed together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from fastpeft.data.problems import Problem
from fastpeft.errors import NotEnoughMemoryError, first_line, is_out_of_memory

logger = logging.getLogger(__name__)

EVALUATED = (64, 64 * 128)  # rows, and tokens with their padding


def eval_limits(problem: Problem, trained: int) -> tuple[int, int | None]:
    """How many rows, and tokens, are evaluated together: of a language model as many rows as are `trained` on."""
    return EVALUATED if problem.digest is None else (trained, None)


def most_rows(length: int, size: int, tokens: int | None) -> int:
    """How many rows as long as this are at most `size` and, unless there is but one, have at most so many tokens."""
    return size if tokens is None else min(size, max(1, tokens // max(1, length)))


def order_by_length(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """The places of rows of tokens, from the shortest on: batches in this order pad little."""
    lengths = [len(row["input_ids"]) for row in rows]
    return sorted(range(len(lengths)), key=lengths.__getitem__)


def by_length(rows: Sequence[Mapping[str, Any]], size: int, tokens: int | None = None) -> Iterator[list[int]]:
    """The places of `order_by_length`, at a time as many as `most_rows` says of the longest of them."""
    batch: list[int] = []
    for place in order_by_length(rows):
        if len(batch) >= most_rows(len(rows[place]["input_ids"]), size, tokens):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def compute_by_length(
    compute: Callable[[list[int]], None], rows: Sequence[Mapping[str, Any]], size: int, tokens: int | None = None
) -> None:
    """Call `compute` for each batch of `by_length`, and where memory is not enough for one, go on with half as many.

    Raises:
        NotEnoughMemoryError: memory is not enough for one row.
    """
    batches = list(by_length(rows, size, tokens))
    while batches:
        chosen = batches.pop(0)
        try:
            compute(chosen)
            continue
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            length, reason = max(len(rows[place]["input_ids"]) for place in chosen), first_line(error).rstrip(".")
            if len(chosen) == 1:
                raise NotEnoughMemoryError(
                    f"memory is not enough for one row of {length} tokens, computed alone ({reason}). Give shorter "
                    "texts, or free some memory."
                ) from error
        # not before here: the error held what was computed
        half = len(chosen) // 2
        logger.warning(
            "memory is not enough for %d rows of up to %d tokens (%s); going on with %d at once",
            len(chosen),
            length,
            reason,
            half,
        )
        batches = [batch[start : start + half] for batch in (chosen, *batches) for start in range(0, len(batch), half)]
