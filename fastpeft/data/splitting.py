"""Which rows are equal, and how they become a training and a dev part where the data has no dev part of its own."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import chain
from typing import Any

from fastpeft.data.conversations import Conversation
from fastpeft.errors import FastpeftError

STRATIFIED, SHUFFLED = "stratified", "shuffled"
SPLITS = (STRATIFIED, SHUFFLED)
_BINS = 10  # of numbers, at most


def text_key(text: Any) -> Hashable:
    """What equal texts, pairs of texts, lists of words or conversations have in common."""
    if isinstance(text, Conversation):
        return text.turns
    return " ".join(text) if isinstance(text, list) else text


def prompt_key(text: Any) -> Hashable:
    """What texts to be said have in common that answer the same: the prompt of a pair, all turns before the last."""
    if isinstance(text, Conversation):
        return text.asked.turns
    return text[0] if isinstance(text, tuple) else text_key(text)


def digest(text: Any) -> str:
    """Tells a text, pair or list of words from others, without showing it: 12 hex digits of the SHA-256 of its key."""
    return hashlib.sha256(json.dumps(text_key(text)).encode()).hexdigest()[:12]


def shuffled(rows: int, dev_rows: int, seed: int) -> tuple[list[int], list[int]]:
    """Indices of training and of `dev_rows` dev rows, in an order that `seed` decides."""
    order = _order(rows, seed)
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
    order = _order(len(keys), seed)
    groups: dict[Hashable, list[int]] = {}  # rows by their key
    for row in order:
        groups.setdefault(keys[row], []).append(row)
    if len(groups) < 2:
        raise FastpeftError("all rows have the same text, so none can be kept apart to measure on. Give other data.")
    strata_of = {
        key: tuple(dict.fromkeys(chain.from_iterable(strata[row] for row in of))) for key, of in groups.items()
    }
    members: dict[Hashable, list[Hashable]] = {}  # keys by their stratum
    for key, found in strata_of.items():
        for stratum in found:
            members.setdefault(stratum, []).append(key)
    totals = Counter(chain.from_iterable(strata))
    left = {stratum: len(of) for stratum, of in members.items()}  # different rows in the training part
    taken: Counter[Hashable] = Counter()  # rows in the dev part
    dev: set[Hashable] = set()
    size = 0  # in rows

    def rows_of(key: Hashable, stratum: Hashable) -> int:
        return sum(stratum in strata[row] for row in groups[key])

    def is_free(key: Hashable) -> bool:
        return key not in dev and all(left[stratum] > 1 for stratum in strata_of[key])

    def lacking(key: Hashable) -> int:
        return sum(not taken[stratum] for stratum in strata_of[key])

    def take(key: Hashable) -> None:
        nonlocal size
        size += len(groups[key])
        dev.add(key)
        for stratum in strata_of[key]:
            taken[stratum] += rows_of(key, stratum)
            left[stratum] -= 1

    settled: set[Hashable] = set()
    for stratum in sorted(members, key=lambda stratum: len(members[stratum])):
        share = max(1, round(dev_rows * totals[stratum] / len(keys)))
        # first what is of most strata that the dev part lacks, as a row with several rare tags
        for key in sorted(members[stratum], key=lacking, reverse=True):
            fits = size + len(groups[key]) <= dev_rows and taken[stratum] + rows_of(key, stratum) <= share
            if fits and key not in settled and is_free(key):
                take(key)
        if not taken[stratum] and (free := [key for key in members[stratum] if is_free(key)]):
            take(min(free, key=lambda key: len(groups[key])))
        settled.update(members[stratum])
    for key, of in groups.items():
        if size + len(of) <= dev_rows and is_free(key):
            take(key)
    if not dev:  # of no stratum, two rows differ
        take(min(groups, key=lambda key: len(groups[key])))
    parts: tuple[list[int], list[int]] = ([], [])
    for row in order:
        parts[keys[row] in dev].append(row)
    return parts


def bins(numbers: Sequence[float], dev_rows: int) -> list[int]:
    """Of each number the bin that it is in, all about equally full, so few that each has a row among `dev_rows`."""
    import numpy as np

    edges = np.quantile(numbers, np.linspace(0, 1, min(_BINS, dev_rows) + 1)[1:-1])
    found: list[int] = np.searchsorted(edges, numbers, side="right").tolist()
    return found


def _order(rows: int, seed: int) -> list[int]:
    order = list(range(rows))
    random.Random(seed).shuffle(order)
    return order
