"""The bytes of a journal: a header, then one record an estimate.

Little-endian: 8 bytes of magic, the length of the header (u32), the header (JSON in UTF-8), its CRC-32; then records of
one size, appended one by one:

    step u32, kind u8, a zero byte, points u16, seed u64, n slopes f64, the lr of each group f64, CRC-32 u32

A record of one direction and one group has 36 bytes. Its seed is that of the step's first draw. The seed follows from
the header, so it shows whether a record belongs to its step.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from fastpeft.errors import FastpeftError
from fastpeft.mezo.estimator import check_drawn_by, estimator_of
from fastpeft.ops.noise import ROUNDINGS
from fastpeft.support import files

MAGIC = b"MeZOjrn\x01"
Position = tuple[int, int]  # in a run: steps made, and estimates dropped since the last of them


class Kind(IntEnum):
    """What became of an estimate."""

    MADE = 0  # a step
    SKIPPED = 1  # a step that changed nothing, to rounding, because a loss or the update was not finite
    DROPPED = 2  # no step: an exception ended it, and the weights were restored to rounding


@dataclass(frozen=True)
class Record:
    """One estimate, and what became of it.

    Attributes:
        step: steps made before it.
        kind: see `Kind`.
        points: how many of the estimator's points the weights were brought to.
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

    def after(self, position: Position) -> Position:
        """Where a run stands that stood at `position` before this record."""
        steps, dropped = position
        return (steps, dropped + 1) if self.kind == Kind.DROPPED else (steps + 1, 0)


def pack_header(header: dict[str, Any]) -> bytes:
    """The bytes of a journal without records."""
    text = json.dumps(header, ensure_ascii=False).encode()
    return MAGIC + struct.pack("<I", len(text)) + text + _checksum(text)


def unpack_header(content: bytes, path: Path) -> tuple[dict[str, Any], int]:
    """The header of a journal, and the number of bytes before its first record.

    Raises:
        FastpeftError: `content` does not begin with a header that a run writes, or the run's noise was drawn otherwise.
    """
    fixed = len(MAGIC) + 4
    length = struct.unpack_from("<I", content, len(MAGIC))[0] if len(content) >= fixed else 0
    text, checksum = content[fixed : fixed + length], content[fixed + length : fixed + length + 4]
    whole = content[: len(MAGIC)] == MAGIC and checksum == _checksum(text)
    header = _read_header(text) if whole else None
    if header is None:
        raise FastpeftError(
            f"{path} is not a journal of this version of MeZO, or its header is damaged. Restore the file, or move "
            "it away and resume from a checkpoint with weights."
        )
    check_drawn_by(header, f"the journal {path}")
    return header, fixed + length + 4


def _read_header(text: bytes) -> dict[str, Any] | None:
    """The header in `text`; None if a run cannot have written it. A right checksum proves nothing."""
    try:
        header = files.parse_json(text)
        estimator_of(header)
        numbers = header["seed"], header["first_step"], header["dropped"]
        fits = all(type(number) is int and 0 <= number < 2**63 for number in numbers)
        fits &= header["restore"] in ("in_place", "exact") and header["rounding"] in ROUNDINGS
        fits &= isinstance(header["weights"], str) and "drawn_by" in header and len(header["groups"]) > 0
        for group in header["groups"]:
            fits &= math.isfinite(group["eps"]) and math.isfinite(group["weight_decay"])
            for each in group["parameters"]:
                fits &= isinstance(each["name"], str) and type(each["offset"]) is int
                fits &= each["shape"] is not None and each["dtype"] is not None
    except (FastpeftError, KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return None
    return header if fits else None


class RecordFormat:
    """The records of a journal with a given header.

    Attributes:
        size: bytes of one record.
    """

    def __init__(self, header: dict[str, Any]) -> None:
        self._estimator = estimator_of(header)
        self._seed: int = header["seed"]
        self._layout = struct.Struct(f"<IBxHQ{self._estimator.num_estimates + len(header['groups'])}d")
        self.size = self._layout.size + 4

    def pack(self, record: Record) -> bytes:
        packed = self._layout.pack(record.step, record.kind, record.points, record.seed, *record.slopes, *record.rates)
        return packed + _checksum(packed)

    def unpack(self, content: bytes, start: int, position: Position, path: Path) -> Iterator[Record]:
        """The records from byte `start`, where the run is at `position`, to the last whole one.

        Raises:
            FastpeftError: a damaged record is followed by a whole one.
        """
        n = self._estimator.num_estimates
        total = (len(content) - start) // self.size
        starts = range(start, start + total * self.size, self.size)
        for number, begin in enumerate(starts, 1):
            whole = self._is_whole(content, begin)
            if not (whole or any(self._is_whole(content, later) for later in starts[number:])):
                return  # after a power cut several records may hold zeros, or anything
            step, kind, points, seed, *numbers = self._layout.unpack_from(content, begin)
            expected = position[0], self._estimator.seeds(self._seed, position[0])[0]
            known = kind in Kind.__members__.values() and points <= len(self._estimator.points)
            if not (whole and known) or (step, seed) != expected:
                raise FastpeftError(
                    f"record {number} of {total} in the journal {path} is damaged, so nothing after it can be "
                    "repeated. Restore the file, or move it away and resume from a checkpoint with weights, where "
                    "another journal then begins."
                )
            record = Record(step, Kind(kind), points, seed, tuple(numbers[:n]), tuple(numbers[n:]))
            position = record.after(position)
            yield record

    def _is_whole(self, content: bytes, start: int) -> bool:
        """Whether the record that begins at `start` has its checksum."""
        end = start + self._layout.size
        return content[end : end + 4] == _checksum(content[start:end])


def _checksum(content: bytes) -> bytes:
    return struct.pack("<I", zlib.crc32(content))
