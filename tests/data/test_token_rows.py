"""Rows of tokens come back as they were given, and take little memory."""

from __future__ import annotations

import pickle
import tracemalloc
from typing import Any

import pytest

from fastpeft.data.token_rows import TokenRows

ROWS: list[dict[str, Any]] = [
    {"input_ids": [5, 70_000, 6], "labels": [-100, 1, -100], "mask_positions": 1},
    {"input_ids": [], "labels": [], "mask_positions": 300},
    {"input_ids": [7], "labels": [2], "mask_positions": 0},
]


def test_rows_come_back() -> None:
    rows = TokenRows(ROWS)
    assert [*rows] == ROWS
    assert rows[-1] == ROWS[-1]
    assert rows[:2] == ROWS[:2]
    assert [*pickle.loads(pickle.dumps(rows))] == ROWS
    with pytest.raises(IndexError):
        rows[3]
    assert not TokenRows()


@pytest.mark.parametrize("label", [1, 0.25, [1.0, 0.0]])
def test_labels_that_are_no_tokens_stay_as_they_are(label: Any) -> None:
    (row,) = TokenRows([{"input_ids": [1], "labels": label}])
    assert row["labels"] == label
    assert type(row["labels"]) is type(label)


def test_changing_a_row_changes_nothing_in_them() -> None:
    rows = TokenRows(ROWS)
    rows[0]["input_ids"].append(1)
    assert [*rows] == ROWS


def test_a_number_takes_four_bytes() -> None:
    tracemalloc.start()
    rows = TokenRows({"input_ids": [*range(1_000, 1_100)]} for _ in range(1_000))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(rows) == 1_000
    assert held < 5 * 100 * 1_000
