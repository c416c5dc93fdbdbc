"""Which rows are equal, and how they become a training and a dev part where the data has no dev part of its own."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

from fastpeft.data.conversations import USER, Conversation
from fastpeft.data.problems import NEXT_WORDS, REGRESSION, Problem
from fastpeft.errors import FastpeftError

_BINS = 10  # of numbers, at most
# a dev part is split off where none is given
_DEV_SHARE = 0.1
_MAX_DEV_ROWS = 1_000

Labelled = list[tuple[Any, Any]]  # (text, pair or words; class name, number, tag names or label names)

logger = logging.getLogger(__name__)


def text_key(text: Any) -> Hashable:
    """What equal texts, pairs of texts, lists of words or conversations have in common."""
    if isinstance(text, Conversation):
        return text.turns
    return " ".join(text) if isinstance(text, list) else text


def prompt_key(text: Any) -> Hashable:
    """What rows of next words have in common that answer the same: the prompt of a pair, all turns before the last."""
    if isinstance(text, Conversation):
        return text.asked.turns
    return text[0] if isinstance(text, tuple) else text_key(text)


def side_key(text: Any, problem: Problem) -> Hashable:
    """The key of rows that a split keeps on one side, so that none is trained on and measured on.

    It is the text, without the white space around it. Of a prompt and its completion it is the prompt. Of a
    conversation it is the beginning, up to the user's first turn: one row may continue another.
    """
    if isinstance(text, Conversation):
        roles = [role for role, _ in text.turns]
        return _stripped(text.turns[: roles.index(USER) + 1] if USER in roles else text.turns)
    return _stripped(prompt_key(text) if problem is NEXT_WORDS else text_key(text))


def digest(text: Any) -> str:
    """Identifies a text, pair or list of words without showing it: 12 hex digits of the SHA-256 of its stripped key."""
    return hashlib.sha256(json.dumps(_stripped(text_key(text))).encode()).hexdigest()[:12]


def _stripped(key: Any) -> Hashable:
    return tuple(map(_stripped, key)) if isinstance(key, tuple) else key.strip()


def divide(read: list[Labelled], problem: Problem, seed: int | None) -> tuple[list[Labelled], str]:
    """Rows to train on and to measure on, and what to say of this division.

    Args:
        read: the rows of each table.
        problem: what they are.
        seed: decides which rows of one table are held out; None: all rows are both parts.
    """
    if seed is None:
        return [read[0], read[-1]], ""
    if len(read) > 1:
        return read, ""
    parts = _split(read[0], problem, seed)
    dev_rows = len(parts[1])
    logger.info("no dev part: %d of %d rows held out (seed %d)", dev_rows, len(read[0]), seed)
    return parts, f", {dev_rows:,} rows held out by seed {seed}"


def _split(part: Labelled, problem: Problem, seed: int) -> list[Labelled]:
    """Training and dev rows, in an order that `seed` decides."""
    if len(part) < 2:
        raise FastpeftError(f"{len(part)} row is too few to train and measure on; give at least 2.")
    dev_rows = min(max(1, round(_DEV_SHARE * len(part))), _MAX_DEV_ROWS)
    keys = [side_key(text, problem) for text, _ in part]
    rows = stratified(keys, _strata(part, problem, dev_rows), dev_rows, seed)
    return [[part[row] for row in side] for side in rows]


def _strata(part: Labelled, problem: Problem, dev_rows: int) -> list[tuple[Any, ...]]:
    """Of each row its class, its different tags or labels, "" for no label, or the bin of its number; of texts alone
    nothing."""
    labels = [label for _, label in part]
    if problem.of_texts_alone:
        return [()] * len(labels)
    if problem is REGRESSION:
        return [(number,) for number in bins(labels, dev_rows)]
    return [(label,) if isinstance(label, str) else tuple(dict.fromkeys(label)) or ("",) for label in labels]


def shuffled(rows: int, dev_rows: int, seed: int) -> tuple[list[int], list[int]]:
    """Indices of training and of `dev_rows` dev rows, in an order that `seed` decides."""
    order = permutation(rows, seed)
    return order[dev_rows:], order[:dev_rows]


def stratified(
    keys: Sequence[Hashable], strata: Sequence[Sequence[Hashable]], dev_rows: int, seed: int
) -> tuple[list[int], list[int]]:
    """Indices of training and of dev rows, in an order that `seed` decides: equal rows on one side, strata on both.

    The strata take their turns, the one with the fewest different rows first, and each gives the dev part its share of
    `dev_rows`, rounded, and one row at least. Equal rows that are more than what is left of a share stay in the
    training part. What is missing then is filled up at random. No stratum gives away the last of its different rows, so
    one whose rows are all equal is only trained on. The dev part has more than `dev_rows` rows where there are more
    strata, or where what is equal is more.

    Args:
        keys: `(rows,)`; rows with the same key are equal.
        strata: `(rows,)`; of each row those that it is of, each once: its class, or all its tags; none where there are
            none.
        dev_rows: about how many rows the dev part shall have.
        seed: decides which.

    Raises:
        FastpeftError: all rows are equal.

    Example:
        >>> train, dev = stratified("abcdefgh", ["x", "x", "x", "x", "x", "x", "y", "y"], dev_rows=3, seed=0)
        >>> sorted("xxxxxxyy"[row] for row in dev)
        ['x', 'x', 'y']
    """
    order = permutation(len(keys), seed)
    groups: dict[Hashable, list[int]] = {}  # rows by their key
    for row in order:
        groups.setdefault(keys[row], []).append(row)
    if len(groups) < 2:
        raise FastpeftError(
            "all rows have the same text, or begin with the same prompt, so none can be kept apart to measure on. Give "
            "a dev part."
        )
    dev = _DevPart(groups, strata, dev_rows)
    totals = Counter(chain.from_iterable(strata))
    for stratum in sorted(dev.members, key=lambda stratum: len(dev.members[stratum])):
        dev.take_share(stratum, max(1, round(dev_rows * totals[stratum] / len(keys))))
    dev.fill_up()
    parts: tuple[list[int], list[int]] = ([], [])
    for row in order:
        parts[keys[row] in dev.keys].append(row)
    return parts


class _DevPart:
    """The dev part of `stratified` while it is chosen, one group of equal rows at a time.

    Attributes:
        keys: of its groups.
        members: keys of all groups, by their stratum.
    """

    def __init__(
        self, groups: Mapping[Hashable, Sequence[int]], strata: Sequence[Sequence[Hashable]], dev_rows: int
    ) -> None:
        self.keys: set[Hashable] = set()
        self.members: dict[Hashable, list[Hashable]] = {}
        self._groups, self._dev_rows = groups, dev_rows
        # of each group how many of its rows each of its strata has
        self._rows = {key: Counter(chain.from_iterable(strata[row] for row in of)) for key, of in groups.items()}
        for key, rows in self._rows.items():
            for stratum in rows:
                self.members.setdefault(stratum, []).append(key)
        self._left = {stratum: len(keys) for stratum, keys in self.members.items()}  # groups in the training part
        self._taken: Counter[Hashable] = Counter()  # rows in the dev part, by their stratum
        self._size = 0  # in rows
        self._settled: set[Hashable] = set()  # groups of strata that had their turn

    def take_share(self, stratum: Hashable, share: int) -> None:
        """Take about `share` rows of a stratum, and one at least if there is one to take."""
        members = self.members[stratum]
        # first what is of most strata that the dev part lacks, as a row with several rare tags
        for key in sorted(members, key=self._lacking, reverse=True):
            fits = self._has_room(key) and self._taken[stratum] + self._rows[key][stratum] <= share
            if fits and key not in self._settled and self._is_free(key):
                self._take(key)
        if not self._taken[stratum] and (free := [key for key in members if self._is_free(key)]):
            self._take(self._smallest(free))
        self._settled.update(members)

    def fill_up(self) -> None:
        """Take groups of any stratum while there is room, and one at least."""
        for key in self._groups:
            if self._has_room(key) and self._is_free(key):
                self._take(key)
        if not self.keys:  # of no stratum, two rows differ
            self._take(self._smallest(self._groups))

    def _take(self, key: Hashable) -> None:
        self.keys.add(key)
        self._size += len(self._groups[key])
        self._taken.update(self._rows[key])
        for stratum in self._rows[key]:
            self._left[stratum] -= 1

    def _has_room(self, key: Hashable) -> bool:
        return self._size + len(self._groups[key]) <= self._dev_rows

    def _is_free(self, key: Hashable) -> bool:
        """Whether a group is in the training part and not the last one there of a stratum."""
        return key not in self.keys and all(self._left[stratum] > 1 for stratum in self._rows[key])

    def _lacking(self, key: Hashable) -> int:
        """How many strata of a group the dev part lacks."""
        return sum(not self._taken[stratum] for stratum in self._rows[key])

    def _smallest(self, keys: Iterable[Hashable]) -> Hashable:
        return min(keys, key=lambda key: len(self._groups[key]))


def bins(numbers: Sequence[float], dev_rows: int) -> list[int]:
    """The bin of each number: all about equally full, and so few that each has a row among `dev_rows`."""
    import numpy as np

    edges = np.quantile(numbers, np.linspace(0, 1, min(_BINS, dev_rows) + 1)[1:-1])
    found: list[int] = np.searchsorted(edges, numbers, side="right").tolist()
    return found


def permutation(rows: int, seed: int) -> list[int]:
    """The indices of so many rows in random order."""
    order = list(range(rows))
    random.Random(seed).shuffle(order)
    return order
