"""Texts as token ids, kept in little memory."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Any, overload

TokenRow = dict[str, Any]  # one text as token ids


class TokenRows(Sequence[TokenRow]):
    """Rows of tokens as a few arrays: a number takes 4 bytes, where it takes 8 to 36 in a list.

    A row is made when it is read. So changing one changes nothing here. All rows have the names of the first, and
    lists of whole numbers where it has some.

    Example:
        >>> rows = TokenRows([{"input_ids": [5, 6], "labels": 1}, {"input_ids": [7], "labels": 0}])
        >>> rows[1]
        {'input_ids': [7], 'labels': 0}
    """

    def __init__(self, rows: Iterable[TokenRow] = ()) -> None:
        self._columns: dict[str, _Lists | list[Any]] = {}
        self._number = 0
        for row in rows:
            self.append(row)

    def append(self, row: TokenRow) -> None:
        if not self._number:
            self._columns = {name: _Lists() if _is_of_integers(value) else [] for name, value in row.items()}
        for name, column in self._columns.items():
            column.append(row[name])
        self._number += 1

    def __len__(self) -> int:
        return self._number

    @overload
    def __getitem__(self, place: int) -> TokenRow: ...
    @overload
    def __getitem__(self, place: slice) -> list[TokenRow]: ...
    def __getitem__(self, place: int | slice) -> TokenRow | list[TokenRow]:
        if isinstance(place, slice):
            return [self[each] for each in range(self._number)[place]]
        at = range(self._number)[place]
        return {name: column[at] for name, column in self._columns.items()}


class _Lists:
    """Lists of whole numbers, one after the other."""

    def __init__(self) -> None:
        self._numbers, self._ends = array("i"), array("q", [0])

    def append(self, numbers: list[int]) -> None:
        self._numbers.fromlist(numbers)
        self._ends.append(len(self._numbers))

    def __getitem__(self, place: int) -> list[int]:
        return self._numbers[self._ends[place] : self._ends[place + 1]].tolist()


def _is_of_integers(value: Any) -> bool:
    return isinstance(value, list) and all(type(each) is int for each in value)
