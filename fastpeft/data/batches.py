"""Which rows are computed together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def by_length(rows: Sequence[Mapping[str, Any]], size: int) -> Iterator[list[int]]:
    """The places of rows of tokens, at most `size` at a time, from the shortest on: such batches pad little."""
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]["input_ids"]))
    for start in range(0, len(order), size):
        yield order[start : start + size]
