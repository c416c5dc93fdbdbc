"""The journal of a MeZO run: what each step found, in a few bytes, from which its weights can be made again.

A file, little-endian: 8 bytes of magic, the length of the header (u32), the header (JSON in UTF-8), its CRC-32; then
records of one size, appended one by one:

    step u32, kind u8, a zero byte, points u16, seed u64, n slopes f64, the lr of each group f64, CRC-32 u32

36 bytes for one direction and one group. The seed is the first of the step's draws; it follows from the header's, so
that a record tells by itself which step it is of.
"""

from __future__ import annotations

import json
import logging
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft import files
from fastpeft.errors import FastpeftError
from fastpeft.functional import mezo_perturb_
from fastpeft.mezo.parallel import digest, local_part
from fastpeft.mezo.steps import HOME, Estimator, moves, update

logger = logging.getLogger(__name__)

FILE_NAME = "mezo.journal"

_MAGIC = b"MeZOjrn\x01"
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
            with `eps`, `weight_decay` and `parameters` (name, shape, dtype and offset in the noise); `first_step`, the
            steps that had been made when the journal began; `weights`, a digest of the weights at that time.
        steps: steps made up to the last record, those before the journal included.
    """

    def __init__(self, path: Path, header: dict[str, Any], size: int = 0) -> None:
        self.path = path
        self.header = header
        self.estimator = Estimator(header["estimator"], header["num_estimates"])
        self.steps: int = header["first_step"]
        self._layout = struct.Struct(f"<IBxHQ{self.estimator.num_estimates + len(header['groups'])}d")
        self._record_size = self._layout.size + 4
        self._start = size  # of the records
        self._size = size  # of all that is whole

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
        """Read a journal. A last record that was not written to its end is left out, with a warning.

        Raises:
            FastpeftError: there is no journal, or a record before the last is damaged.
        """
        try:
            content = path.read_bytes()
        except OSError as error:
            raise FastpeftError(f"cannot read the journal {path} ({error.strerror}).") from None
        fixed = len(_MAGIC) + 4
        length = struct.unpack_from("<I", content, len(_MAGIC))[0] if len(content) >= fixed else 0
        text, checksum = content[fixed : fixed + length], content[fixed + length : fixed + length + 4]
        if content[: len(_MAGIC)] != _MAGIC or checksum != struct.pack("<I", zlib.crc32(text)):
            raise FastpeftError(f"{path} is not a journal of this version of MeZO, or its header is damaged.")
        journal = cls(path, json.loads(text), fixed + length + 4)
        for record in journal._parse(content):
            journal._count(record)
        if rest := len(content) - journal._size:
            logger.warning("the last record of %s was not written to its end; its %d bytes are dropped", path, rest)
        return journal

    def append(self, record: Record) -> None:
        """Add a record to the file; it outlives the process, and after `flush` a power cut.

        Raises:
            FastpeftError: it cannot be written; the file then ends with the record before.
        """
        packed = self._layout.pack(record.step, record.kind, record.points, record.seed, *record.slopes, *record.rates)
        packed += struct.pack("<I", zlib.crc32(packed))
        try:
            with open(self.path, "r+b", buffering=0) as file:
                file.truncate(self._size)  # of what was not written to its end
                file.seek(self._size)
                if file.write(packed) != len(packed):
                    raise OSError(0, "no space left")
        except OSError as error:
            raise FastpeftError(
                f"the journal {self.path} cannot be written ({error.strerror}); it ends with step {self.steps}. Make "
                "room and resume."
            ) from None
        self._count(record)

    def flush(self) -> None:
        """Wait until the file is on the disk."""
        with open(self.path, "rb+") as file:
            os.fsync(file.fileno())

    def cut(self, steps: int) -> None:
        """Forget all that came after the first `steps` steps of the run.

        Raises:
            FastpeftError: the journal does not reach from its beginning to there.
        """
        self._check_reach(steps)
        kept = [record for record in self.records() if record.step < steps]
        self.steps = self.header["first_step"]
        self._size = self._start
        for record in kept:
            self._count(record)
        with open(self.path, "rb+") as file:
            file.truncate(self._size)
            os.fsync(file.fileno())

    def records(self) -> Iterator[Record]:
        """All records, from the first."""
        return self._parse(self.path.read_bytes()[: self._size])

    def _check_reach(self, steps: int) -> None:
        if not self.header["first_step"] <= steps <= self.steps:
            raise FastpeftError(
                f"the journal {self.path} begins after {self.header['first_step']} steps of the run and ends after "
                f"{self.steps}, so it cannot lead to or from the weights after {steps}. Resume from a checkpoint "
                "between these, or train anew."
            )

    def _count(self, record: Record) -> None:
        self._size += self._record_size
        self.steps += record.kind != Kind.DROPPED

    def _parse(self, content: bytes) -> Iterator[Record]:
        """The records in a journal's bytes, up to one that ends the file and is not whole."""
        n, step = self.estimator.num_estimates, self.header["first_step"]
        total = (len(content) - self._start) // self._record_size
        for number in range(1, total + 1):
            end = self._start + number * self._record_size
            packed, checksum = content[end - self._record_size : end - 4], content[end - 4 : end]
            fields = self._layout.unpack(packed)
            whole = checksum == struct.pack("<I", zlib.crc32(packed))
            if not whole and end == len(content):
                return
            if not whole or fields[0] != step or fields[3] != self.estimator.seeds(self.header["seed"], step)[0]:
                raise FastpeftError(
                    f"record {number} of {total} in the journal {self.path} is damaged, so nothing after it can be "
                    "repeated. Restore the file, or resume from a checkpoint with weights."
                )
            record = Record(fields[0], Kind(fields[1]), fields[2], fields[3], fields[4 : 4 + n], fields[4 + n :])
            step += record.kind != Kind.DROPPED
            yield record

    @torch.no_grad()
    def replay(self, model: nn.Module | Sequence[Tensor], start: int | None = None, stop: int | None = None) -> None:
        """Make the weights of the run: repeat on those before it all that its steps did, bit for bit.

        Args:
            model: with the weights before the run, in the run's dtype; or its trained parameters in their order.
            start: steps that the weights have behind them; None: those they had when the journal began.
            stop: steps after which to end; None: all.

        Raises:
            FastpeftError: the parameters are not those of the run, or (without `start`) their values are not, or the
                journal does not hold those steps.

        Notes:
            A block of the weights at a time takes all steps while it is in cache; no loss is computed.
        """
        groups = self._match(model)
        if start is None and digest([param for group in groups for param in group]) != self.header["weights"]:
            raise FastpeftError(
                f"the model does not have the weights from which the run of {self.path} began. Load its base model "
                "anew, with the same dtype and seed."
            )
        first = self.header["first_step"] if start is None else start
        for steps in (first, self.steps if stop is None else stop):
            self._check_reach(steps)
        records = [record for record in self.records() if first <= record.step and (stop is None or record.step < stop)]
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
                    "of that run."
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
