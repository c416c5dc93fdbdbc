"""The journal of a MeZO run: what each step found, in a few bytes, from which its weights can be made again.

A file, little-endian: 8 bytes of magic, the length of the header (u32), the header (JSON in UTF-8), its CRC-32; then
records of one size, appended one by one:

    step u32, kind u8, a zero byte, points u16, seed u64, n slopes f64, the lr of each group f64, CRC-32 u32

36 bytes for one direction and one group. The seed is the first of the step's draws; it follows from the header's, so
that a record tells by itself which step it is of.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import struct
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from fastpeft.errors import FastpeftError
from fastpeft.functional import mezo_perturb_
from fastpeft.mezo.sharding import digest, local_part, names_of
from fastpeft.mezo.steps import CHOICES, HOME, Estimator, moves, update
from fastpeft.support import files

logger = logging.getLogger(__name__)

FILE_NAME = "mezo.journal"

_MAGIC = b"MeZOjrn\x01"
Position = tuple[int, int]  # in a run: steps made, and estimates dropped since the last of them
_FLUSHED_EVERY = 1.0  # seconds: what a power cut may take of a run that goes on
_BLOCK = 2**16  # elements on which all steps are repeated before the next ones: 256 KiB in float32 stay in cache


class Kind(IntEnum):
    """What became of an estimate."""

    MADE = 0  # a step
    SKIPPED = 1  # a step that changed nothing, to rounding, as something was not finite
    DROPPED = 2  # no step: an exception ended it, which also restored the weights to rounding only


@dataclass(frozen=True)
class Record:
    """One estimate, and what became of it.

    Attributes:
        step: steps made before it.
        kind: see `Kind`.
        points: at how many of the estimator's points the weights were.
        seed: of the step's first draw.
        slopes: the factor of each z in the estimated gradient of the first group; NaN where no step was made.
        rates: the learning rate of each group.
    """

    step: int
    kind: Kind
    points: int
    seed: int
    slopes: tuple[float, ...]
    rates: tuple[float, ...]


class Journal:
    """The file of one run: `create` begins it, `open` reads it, `replay` makes the run's weights again.

    Attributes:
        header: `seed`, `noise`, `estimator`, `num_estimates`, `restore` and `rounding` as for `MeZO`; `groups`, each
            with `eps`, `weight_decay` and `parameters` (name, shape, dtype and offset in the noise); `first_step` and
            `dropped`, the position at which the journal began; `weights`, a digest of the weights at that time.
        begins_at: that position.
        steps: steps made up to the last record, those before the journal included.
        dropped: estimates that were dropped after the last of these.

    Notes:
        A position in a run is a pair of such numbers. Where a number of steps is given for it, what was dropped of the
        next one is not behind it.
    """

    def __init__(self, path: Path, header: dict[str, Any], size: int = 0) -> None:
        self.path = path
        self.header = header
        self.estimator = Estimator(header["estimator"], header["num_estimates"])
        self.begins_at: Position = header["first_step"], header.get("dropped", 0)
        self.steps, self.dropped = self.begins_at
        self._layout = struct.Struct(f"<IBxHQ{self.estimator.num_estimates + len(header['groups'])}d")
        self._record_size = self._layout.size + 4
        self._start = size  # of the records
        self._size = size  # of all that is whole
        self._flushed = -math.inf  # when, by the monotonic clock

    @classmethod
    def create(cls, path: Path, header: dict[str, Any]) -> Journal:
        """Begin a journal.

        Raises:
            FastpeftError: there is a file at `path`, or it cannot be written.
        """
        if path.exists():
            raise FastpeftError(f"{path} exists. Resume that run, or move its journal away.")
        text = json.dumps(header, ensure_ascii=False).encode()
        content = _MAGIC + struct.pack("<I", len(text)) + text + struct.pack("<I", zlib.crc32(text))
        try:
            files.write_bytes(path, content)
        except OSError as error:
            raise FastpeftError(f"cannot write {path} ({error.strerror}). Give a folder that can be written.") from None
        return cls(path, header, len(content))

    @classmethod
    def open(cls, path: Path) -> Journal:
        """Read a journal. What was not written whole at its end is left out, with a warning.

        Raises:
            FastpeftError: there is no journal, or a record is damaged that whole ones follow.
        """
        try:
            content = path.read_bytes()
        except OSError as error:
            raise FastpeftError(f"cannot read the journal {path} ({error.strerror}).") from None
        fixed = len(_MAGIC) + 4
        length = struct.unpack_from("<I", content, len(_MAGIC))[0] if len(content) >= fixed else 0
        text, checksum = content[fixed : fixed + length], content[fixed + length : fixed + length + 4]
        whole = content[: len(_MAGIC)] == _MAGIC and checksum == struct.pack("<I", zlib.crc32(text))
        header = _read_header(text) if whole else None
        if header is None:
            raise FastpeftError(
                f"{path} is not a journal of this version of MeZO, or its header is damaged. Restore the file, or move "
                "it away and resume from a checkpoint with weights."
            )
        journal = cls(path, header, fixed + length + 4)
        for record in journal._parse(content):
            journal.count(record)
        if rest := len(content) - journal._size:
            logger.warning("the end of %s was not written whole; its %d bytes are dropped", path, rest)
        return journal

    def append(self, record: Record) -> None:
        """Add a record to the file. It outlives the process, and a power cut once it is flushed, which the first record
        of each second does for all before it.

        What the file holds behind the position where the journal stands is lost with the first record after it only.

        Raises:
            FastpeftError: the record is of another step than the next one; or it cannot be written, and the journal
                then ends with the record before.
        """
        if record.step != self.steps:
            raise FastpeftError(
                f"the journal {self.path} stands after {self.steps} steps, so it takes no record of a step after "
                f"{record.step}. Resume from it (MeZO.resume), or begin another one."
            )
        packed = self._layout.pack(record.step, record.kind, record.points, record.seed, *record.slopes, *record.rates)
        packed += struct.pack("<I", zlib.crc32(packed))
        try:
            with open(self.path, "r+b", buffering=0) as file:
                behind = file.seek(0, os.SEEK_END) - self._size
                file.seek(self._size)
                made_again = behind == len(packed) and file.read() == packed  # the last step, by a resumed run
                if behind > 0 and not made_again:  # what was not written to its end, or is made anew
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
        """Take a record for written, as it is by another process."""
        self._size += self._record_size
        self.steps, self.dropped = _after((self.steps, self.dropped), record)

    def flush(self) -> None:
        """Wait until the file is on the disk."""
        with open(self.path, "rb+") as file:
            self._sync(file)

    def _sync(self, file: BinaryIO) -> None:
        os.fsync(file.fileno())
        self._flushed = time.monotonic()

    def rewind(self, at: int | Position) -> None:
        """Go back to a position; the file keeps what follows it until the next record is added.

        Raises:
            FastpeftError: the journal does not reach from its beginning to there.
        """
        number = self.find(at)
        self.steps, self.dropped = self._positions()[number]
        self._size = self._start + number * self._record_size

    def content(self) -> bytes:
        """The file up to where the journal stands."""
        return self.path.read_bytes()[: self._size]

    def find(self, at: int | Position) -> int:
        """The number of records before a position.

        Raises:
            FastpeftError: the journal does not reach from its beginning to there.
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
        for name, value in found.items():
            if self.header[name] != value:
                what = name if name == "groups" else f"{name} {self.header[name]!r}, not {value!r}"
                raise FastpeftError(
                    f"MeZO: the journal {self.path} is of a run with another {what}. Make the optimizer as that run "
                    "did."
                )

    def check_groups(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Raise a FastpeftError if an optimizer's groups with parameters have other settings than when it began."""
        for name in ("eps", "weight_decay"):
            if [group[name] for group in groups] != [group[name] for group in self.header["groups"]]:
                raise FastpeftError(
                    f"MeZO: {name} changed, but the journal {self.path} has one for all of its steps. Begin another "
                    "one with `record`."
                )

    def records(self) -> Iterator[Record]:
        """All records, from the first."""
        return self._parse(self.content())

    def _positions(self) -> list[Position]:
        """Where the run stood before each record, and at last."""
        return list(itertools.accumulate(self.records(), _after, initial=self.begins_at))

    def _parse(self, content: bytes) -> Iterator[Record]:
        """The records in a journal's bytes, up to the first of those at its end that are not whole."""
        n, position = self.estimator.num_estimates, self.begins_at
        total = (len(content) - self._start) // self._record_size
        starts = range(self._start, self._start + total * self._record_size, self._record_size)
        for number, start in enumerate(starts, 1):
            whole = self._is_whole(content, start)
            if not (whole or any(self._is_whole(content, later) for later in starts[number:])):
                return  # a power cut may leave zeros, or anything, in the place of several
            fields = self._layout.unpack_from(content, start)
            seed = self.estimator.seeds(self.header["seed"], position[0])[0]
            known = fields[1] in Kind.__members__.values() and fields[2] <= len(self.estimator.points)
            if not (whole and known) or (fields[0], fields[3]) != (position[0], seed):
                raise FastpeftError(
                    f"record {number} of {total} in the journal {self.path} is damaged, so nothing after it can be "
                    "repeated. Restore the file, or move it away and resume from a checkpoint with weights, where "
                    "another journal then begins."
                )
            record = Record(fields[0], Kind(fields[1]), fields[2], fields[3], fields[4 : 4 + n], fields[4 + n :])
            position = _after(position, record)
            yield record

    def _is_whole(self, content: bytes, start: int) -> bool:
        """Whether the record from `start` on has its checksum."""
        end = start + self._layout.size
        return content[end : end + 4] == struct.pack("<I", zlib.crc32(content[start:end]))

    @torch.no_grad()
    def replay(
        self,
        model: nn.Module | Sequence[Tensor],
        start: int | Position | None = None,
        stop: int | Position | None = None,
    ) -> None:
        """Make the weights of the run: repeat on those before it all that its steps did, bit for bit.

        Args:
            model: with the weights before the run, in the run's dtype; or its trained parameters in their order.
            start: the position of the weights; None: where the journal began.
            stop: the position at which to end; None: where it ends.

        Raises:
            FastpeftError: the parameters are not those of the run, or (without `start`) their values are not, or the
                journal does not hold those steps, or a number of steps does not tell where the weights stand.

        Notes:
            A block of the weights at a time takes all steps while it is in cache; no loss is computed.
        """
        groups = self._match(model)
        if start is None:
            self.check_weights(digest([param for group in groups for param in group]))
            start = self.begins_at
        at, end = self.find(start), len(list(self.records())) if stop is None else self.find(stop)
        if sum(steps == start for steps, _ in self._positions()) > 1:
            raise FastpeftError(
                f"the journal {self.path} holds estimates that were dropped after {start} steps and left their "
                "roundings, so this number does not tell which weights were saved. Give the optimizer's state that "
                "was saved with them (MeZO.resume), or their position."
            )
        if at > end:
            raise FastpeftError(f"the weights are at {start}, behind {stop}, to which they are to be brought.")
        records = list(self.records())[at:end]
        how = self.header["noise"], self.header["rounding"]
        for index, params in enumerate(groups):
            passes = list(self._passes(records, index))
            for param, described in zip(params, self.header["groups"][index]["parameters"]):
                part, offset = local_part(param.detach(), described["offset"], described["name"])
                for block in part.flatten().split(_BLOCK) if part.is_contiguous() else [part]:
                    for seeds, scales, decay in passes:
                        mezo_perturb_([block], [offset], seeds, scales, decay, *how)
                    offset += block.numel()

    def _passes(self, records: Sequence[Record], index: int) -> Iterator[tuple[list[int], list[float], float]]:
        """All that `records` added to the parameters of one group: seeds, scales and the decay with the first."""
        group, first_eps = self.header["groups"][index], self.header["groups"][0]["eps"]
        eps, in_place = group["eps"], self.header["restore"] == "in_place"
        seeds: list[int] = []
        scales: list[float] = []
        decay = 0.0
        for record in records:
            drawn = self.estimator.seeds(self.header["seed"], record.step)
            at = HOME
            for point in self.estimator.points[: record.points]:
                point = point if in_place else (point[0], 0)
                for draw, scale in moves(at, point):
                    seeds.append(drawn[draw])
                    scales.append(scale * eps)
                at = point
            if record.kind == Kind.MADE:
                terms, decays = update(at, record.slopes, first_eps, record.rates[index], eps, group["weight_decay"])
                if decays:
                    yield seeds, scales, decay
                    seeds, scales, decay = [], [], decays
            else:
                terms = [(draw, scale * eps) for draw, scale in moves(at, HOME)]
            seeds += [drawn[draw] for draw, _ in terms]
            scales += [scale for _, scale in terms]
        yield seeds, scales, decay

    def _match(self, model: nn.Module | Sequence[Tensor]) -> list[list[Tensor]]:
        """The parameters of each group."""
        described = [each for group in self.header["groups"] for each in group["parameters"]]
        if isinstance(model, nn.Module):
            named = dict(model.named_parameters())
            missing = [each["name"] for each in described if each["name"] not in named]
            if missing:
                raise FastpeftError(
                    f"the model has no parameter {missing[0]!r}, which the run of {self.path} trained. Load the model "
                    "of that run, by the version of the library that made it."
                )
            given: list[Tensor] = [named[each["name"]] for each in described]
        else:
            given = list(model)
        if [(list(p.shape), str(p.dtype)) for p in given] != [(each["shape"], each["dtype"]) for each in described]:
            raise FastpeftError(
                f"the parameters differ in number, shape or dtype from those that the run of {self.path} trained. Load "
                "the model of that run."
            )
        groups, rest = [], iter(given)
        for group in self.header["groups"]:
            groups.append([next(rest) for _ in group["parameters"]])
        return groups


def describe_groups(groups: Iterable[tuple[Mapping[str, Any], Sequence[int]]]) -> list[dict[str, Any]]:
    """What a header says of an optimizer's groups, each given with the places of its parameters in the noise."""
    described = []
    for group, offsets in groups:
        parameters = [
            {"name": name, "shape": list(param.shape), "dtype": str(param.dtype), "offset": offset}
            for name, param, offset in zip(names_of(group), group["params"], offsets)
        ]
        described.append({"eps": group["eps"], "weight_decay": group["weight_decay"], "parameters": parameters})
    return described


def position_of(state: Mapping[str, Any]) -> Position:
    """Where in its run an optimizer stood, by its `state_dict`; the first versions did not count what was dropped."""
    return state["steps_done"], state.get("dropped", 0)


def _read_header(text: bytes) -> dict[str, Any] | None:
    """The header in `text`; None where it is not one that a run writes, whatever its checksum."""
    try:
        header = files.parse_json(text)
        Estimator(header["estimator"], header["num_estimates"])
        numbers = header["seed"], header["first_step"], header.get("dropped", 0)
        fits = all(type(number) is int and 0 <= number < 2**63 for number in numbers)
        fits &= all(header[name] in CHOICES[name] for name in ("noise", "restore", "rounding"))
        fits &= isinstance(header["weights"], str) and len(header["groups"]) > 0
        for group in header["groups"]:
            fits &= math.isfinite(group["eps"]) and math.isfinite(group["weight_decay"])
            for each in group["parameters"]:
                fits &= isinstance(each["name"], str) and type(each["offset"]) is int
                fits &= each["shape"] is not None and each["dtype"] is not None
    except (FastpeftError, KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return None
    return header if fits else None


def _after(position: Position, record: Record) -> Position:
    """Where a run stands after a record."""
    steps, dropped = position
    return (steps, dropped + 1) if record.kind == Kind.DROPPED else (steps + 1, 0)
