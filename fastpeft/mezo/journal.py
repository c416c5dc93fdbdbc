"""The journal of a MeZO run: a few bytes a step, from which the run's weights can be made again."""

from __future__ import annotations

import itertools
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor, nn

from fastpeft.errors import FastpeftError
from fastpeft.mezo.estimator import step_seed
from fastpeft.mezo.journal_format import Kind, Position, Record, RecordFormat, pack_header, unpack_header
from fastpeft.mezo.parameters import described_params
from fastpeft.mezo.replay import repeat
from fastpeft.mezo.sharding import digest
from fastpeft.support import files
from fastpeft.support.processes import Ranks

logger = logging.getLogger(__name__)

FILE_NAME = "mezo.journal"
_FLUSHED_EVERY = 1.0  # seconds: the most that a power cut takes of a run


class Journal:
    """The file of one run: `create` begins it, `open` reads it, `replay` makes the run's weights again.

    Attributes:
        header: `seed`, `noise`, `estimator`, `num_estimates`, `restore` and `rounding` as for `MeZO`; `drawn_by`, the
            name of the way in which that noise is made (`fastpeft.ops.noise.NAMES`); `groups`, each with `eps`,
            `weight_decay` and `parameters` (name, shape, dtype and offset in the noise); `first_step` and `dropped`,
            the position at which the journal began; `weights`, a digest of the weights at that time.
        begins_at: that position.
        steps: steps made up to the last record, those before the journal included.
        dropped: estimates that were dropped after the last of these.
        torn: bytes at the end of the file that are no whole record.

    Notes:
        A position in a run is such a pair, (steps, dropped). A number of steps alone means the position right after
        that step, before any estimate of the next one was dropped.
    """

    def __init__(self, path: Path, header: dict[str, Any], size: int = 0) -> None:
        self.path = path
        self.header = header
        self.begins_at: Position = header["first_step"], header["dropped"]
        self.steps, self.dropped = self.begins_at
        self._format = RecordFormat(header)
        self._start = size  # of the records
        self._size = size  # of all that is whole
        self.torn = 0
        self._flushed = -math.inf  # when, by the monotonic clock
        self._writes = True  # or another process does

    @classmethod
    def create(cls, path: str | Path, header: dict[str, Any]) -> Journal:
        """Begin a journal.

        Raises:
            FastpeftError: there is a file at `path`, or it cannot be written.
        """
        path = Path(path)
        if path.exists():
            raise FastpeftError(f"{path} exists. Resume that run, or move its journal away.")
        content = pack_header(header)
        try:
            files.write_bytes(path, content)
        except OSError as error:
            raise FastpeftError(f"cannot write {path} ({error.strerror}). Give a folder that can be written.") from None
        return cls(path, header, len(content))

    @classmethod
    def open(cls, path: str | Path) -> Journal:
        """Read a journal. Bytes at its end that are no whole record are left out: `torn` counts them.

        Raises:
            FastpeftError: there is no journal, or its noise was drawn otherwise than by this version, or a damaged
                record is followed by a whole one.
        """
        path = Path(path)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise FastpeftError(f"cannot read the journal {path} ({error.strerror}).") from None
        journal = cls(path, *unpack_header(content, path))
        for record in journal._unpack(content):
            journal.count(record)
        journal.torn = len(content) - journal._size
        return journal

    @classmethod
    def begin(cls, path: Path, header: dict[str, Any], params: Sequence[Tensor], ranks: Ranks) -> Journal:
        """Begin the journal of an optimizer; its first process writes, the others count.

        Args:
            path: of the file.
            header: but for the digest of the weights.
            params: the weights.
            ranks: the processes.

        Raises:
            FastpeftError: on all of them, as `create`.
        """
        header = {**header, "weights": digest(params)}
        journal = ranks.together(lambda: cls.create(path, header) if ranks.is_first else cls(path, header))
        journal._writes = ranks.is_first
        return journal

    @classmethod
    def resumed(
        cls,
        path: Path,
        settings: Mapping[str, Any],
        params: Sequence[Tensor],
        start: int | Position | None,
        stop: int | None,
        ranks: Ranks,
    ) -> Journal:
        """Make the weights at `stop` of those at `start`, see `MeZO.resume`; what the journal then stands after.

        Raises:
            FastpeftError: on all processes, as `open`, `check_settings` and `replay`.
        """

        def opened() -> Journal:
            journal = cls.open(path)
            journal.check_settings(settings)
            if journal.torn and ranks.is_first:
                logger.warning("the end of %s was not written whole; its %d bytes are dropped", path, journal.torn)
            return journal

        end = start if isinstance(start, tuple) and start[0] == stop else stop
        journal = ranks.together(opened)
        if start is None:
            found = digest(params)  # of shards this is a call of all, so nothing of one alone may end it
            ranks.together(lambda: journal.check_weights(found))
            start = journal.begins_at
        ranks.together(lambda: journal.replay(params, start, end))
        if end is not None:
            journal.rewind(end)
        journal._writes = ranks.is_first
        return journal

    def add(
        self, kind: Kind, step: int, points: int, slopes: Sequence[float], groups: Sequence[Mapping[str, Any]]
    ) -> None:
        """Add what became of an estimate of step number `step`, for which the weights were brought to some points.

        Raises:
            FastpeftError: as `append`, or a setting of a group with parameters is not that of the header.
        """
        for name in ("eps", "weight_decay"):
            if [group[name] for group in groups] != [group[name] for group in self.header["groups"]]:
                raise FastpeftError(
                    f"MeZO: {name} changed, but the journal {self.path} has one for all of its steps. Begin another "
                    "one with `record`."
                )
        directions = self.header["num_estimates"]
        found = tuple(slopes) if kind == Kind.MADE else (math.nan,) * directions
        seed = step_seed(self.header["seed"], step * directions)
        record = Record(step, kind, points, seed, found, tuple(float(group["lr"]) for group in groups))
        if self._writes:
            self.append(record)
        else:
            self.count(record)

    def append(self, record: Record) -> None:
        """Add a record to the file.

        A record outlives the process. It outlives a power cut once it is flushed; the first record of each second
        flushes all before it. After `rewind`, the first new record deletes what the file holds behind it.

        Raises:
            FastpeftError: the record is of another step than the next one; or it cannot be written, and the journal
                then ends with the record before.
        """
        if record.step != self.steps:
            raise FastpeftError(
                f"the journal {self.path} stands after {self.steps} steps, so it takes no record of a step after "
                f"{record.step}. Resume from it (MeZO.resume), or begin another one."
            )
        packed = self._format.pack(record)
        try:
            with open(self.path, "r+b", buffering=0) as file:
                behind = file.seek(0, os.SEEK_END) - self._size
                file.seek(self._size)
                made_again = behind == len(packed) and file.read() == packed  # the last step, by a resumed run
                if behind > 0 and not made_again:  # a part of a record, or steps that are made anew
                    file.truncate(self._size)
                    os.fsync(file.fileno())  # or a power cut may join the new record to old ones
                    file.seek(self._size)
                if not made_again and file.write(packed) != len(packed):
                    raise OSError(0, "no space left")
                if time.monotonic() - self._flushed >= _FLUSHED_EVERY:
                    self._sync(file)
        except OSError as error:
            raise FastpeftError(
                f"the journal {self.path} cannot be written ({error.strerror}); it ends with step {self.steps}. Make "
                "room and resume."
            ) from None
        self.count(record)

    def count(self, record: Record) -> None:
        """Count a record that is in the file, or that another process writes."""
        self._size += self._format.size
        self.steps, self.dropped = record.after((self.steps, self.dropped))

    def flush(self) -> None:
        """Wait until the file is on the disk."""
        with open(self.path, "rb+") as file:
            self._sync(file)

    def _sync(self, file: BinaryIO) -> None:
        os.fsync(file.fileno())
        self._flushed = time.monotonic()

    def rewind(self, at: int | Position) -> None:
        """Go back to a position. The file keeps what follows it until the next record is added.

        Raises:
            FastpeftError: as `find`.
        """
        number = self.find(at)
        self.steps, self.dropped = self._positions()[number]
        self._size = self._start + number * self._format.size

    def content(self) -> bytes:
        """The file up to where the journal stands."""
        return self.path.read_bytes()[: self._size]

    def records(self) -> Iterator[Record]:
        """All records, from the first."""
        return self._unpack(self.content())

    def find(self, at: int | Position) -> int:
        """The number of records before a position.

        Raises:
            FastpeftError: the position is not between the journal's beginning and its end.
        """
        for number, position in enumerate(self._positions()):
            if at in (position, position[0]):
                return number
        first, steps = self.begins_at[0], at if isinstance(at, int) else at[0]
        raise FastpeftError(
            f"the journal {self.path} begins after {first} steps of the run and ends after {self.steps}, so it cannot "
            f"lead to or from the weights after {steps}. Resume from a checkpoint between these, or move the journal "
            "away and resume from a checkpoint with weights, where another one then begins."
        )

    def check_weights(self, found: str) -> None:
        """Raise a FastpeftError unless `found` is the digest of the weights with which the journal began."""
        if found != self.header["weights"]:
            raise FastpeftError(
                f"the model does not have the weights from which the run of {self.path} began. Load its base model "
                "anew, with the same dtype and seed."
            )

    def check_settings(self, found: Mapping[str, Any]) -> None:
        """Raise a FastpeftError unless the run had the settings `found`, by their names in the header."""
        theirs, ours = _flat({name: self.header[name] for name in found}), _flat(found)
        for name in theirs | ours:
            if theirs.get(name) != ours.get(name):
                raise FastpeftError(
                    f"MeZO: the journal {self.path} is of a run with another {name} {theirs.get(name)!r}, not "
                    f"{ours.get(name)!r}. Use the settings of that run, or an optimizer without this journal."
                )

    def replay(
        self,
        model: nn.Module | Sequence[Tensor],
        start: int | Position | None = None,
        stop: int | Position | None = None,
    ) -> None:
        """Make the weights of the run: repeat all its steps on the weights before it, bit for bit.

        Args:
            model: with the weights before the run, in the run's dtype; or its trained parameters in their order.
            start: the position of the weights; None: where the journal began.
            stop: the position at which to end; None: where it ends.

        Raises:
            FastpeftError: the parameters are not those of the run, or (without `start`) their values are not, or the
                journal does not hold those steps, or a number of steps does not tell where the weights stand.
        """
        groups = described_params(self.header["groups"], model, self.path)
        if start is None:
            self.check_weights(digest([param for group in groups for param in group]))
            start = self.begins_at
        records = list(self.records())
        at, end = self.find(start), len(records) if stop is None else self.find(stop)
        if sum(steps == start for steps, _ in self._positions()) > 1:
            raise FastpeftError(
                f"the journal {self.path} holds estimates that were dropped after {start} steps and changed the "
                "weights by a rounding, so this number does not tell which weights were saved. Give the optimizer's "
                "state that was saved with them (MeZO.resume), or their position."
            )
        if at > end:
            raise FastpeftError(f"the weights are at {start}, behind {stop}, to which they are to be brought.")
        repeat(self.header, records[at:end], groups)

    def _positions(self) -> list[Position]:
        """Where the run stood before each record, and at last."""
        return list(itertools.accumulate(self.records(), lambda at, record: record.after(at), initial=self.begins_at))

    def _unpack(self, content: bytes) -> Iterator[Record]:
        return self._format.unpack(content, self._start, self.begins_at, self.path)


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run by their names, also those of its groups and their parameters."""
    flat = {name: value for name, value in settings.items() if name != "groups"}
    for index, group in enumerate(settings.get("groups", ())):
        flat |= {f"{name} of group {index}": group[name] for name in ("eps", "weight_decay")}
        flat |= {f"parameter {number} of group {index}": each for number, each in enumerate(group["parameters"])}
    return flat
