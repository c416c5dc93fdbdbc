"""The order in which a run meets its rows."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import Sampler


class LengthGroupedOrder(Sampler[Any]):
    """A random order of rows in which each batch holds rows of about one length, so that little is padded.

    The order is a function of (seed, epoch) alone: a resumed run meets the rows that it would have met. `with_epoch`
    names rows by (epoch, index), for rows that differ from one epoch to the next.
    """

    _BATCHES_SORTED_TOGETHER = 50

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, with_epoch: bool = False) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.with_epoch = with_epoch
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[Any]:
        rows = self.rows(self.epoch)
        yield from ((self.epoch, row) for row in rows) if self.with_epoch else rows

    def rows(self, epoch: int) -> list[int]:
        """Indices of the rows, in the order of an epoch."""
        generator = random.Random(f"{self.seed}:{epoch}")
        order = list(range(len(self.lengths)))
        generator.shuffle(order)
        group = self.batch_size * self._BATCHES_SORTED_TOGETHER
        rest = len(order) % self.batch_size  # an incomplete batch can only come last
        full, last = order[: len(order) - rest], order[len(order) - rest :]
        batches = []
        for start in range(0, len(full), group):
            grouped = sorted(full[start : start + group], key=self.lengths.__getitem__)
            batches += [grouped[i : i + self.batch_size] for i in range(0, len(grouped), self.batch_size)]
        generator.shuffle(batches)
        return [row for batch in (*batches, last) for row in batch]
