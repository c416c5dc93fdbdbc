"""Records of bytes under keys, in one folder: any number of processes append them, and read them by a memory map.

ROOT/lock            locked while a process appends to any store below ROOT
ROOT/NAME/records    the records' bytes, each at a multiple of 64
ROOT/NAME/index      a line for each record: its key, its place, and checksums of its bytes and of the line

A record's bytes are written before its line. So if a process is killed, each record in the index is whole, and the
next line overwrites half a line. After a power cut the disk may hold a line without its bytes, and bytes may change
later: a process checks a record at its first read, and treats a damaged one as absent.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import struct
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fastpeft.support import files

logger = logging.getLogger(__name__)

Record = np.ndarray  # uint8 (length,)

KEY_BYTES = 16
_ENTRY = struct.Struct(f"<{KEY_BYTES}sQQI")  # key, offset, length, checksum of the bytes
_SEAL = struct.Struct("<I")  # checksum of the entry
_LINE_BYTES = _ENTRY.size + _SEAL.size
_ALIGNMENT = 64


class RecordStore:
    """Records of bytes, each under a key of 16 bytes, in the folder `root / name`, which is made if need be.

    Args:
        root: the folder that holds this store and perhaps others.
        name: the name of this store's folder.
        max_bytes: the most that all files below `root` may take together.

    Raises:
        OSError: the folder cannot be made or written.
    """

    def __init__(self, root: Path, name: str, max_bytes: int) -> None:
        self.root = root
        self.max_bytes = max_bytes
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        self._records, self._index = (_open(folder / part) for part in ("records", "index"))
        self._mapped = np.empty(0, np.uint8)
        # by key: offset, length, and the checksum, None once it has been checked
        self._places: dict[bytes, tuple[int, int, int | None]] = {}
        self._lines_end = 0  # how far the index has been read
        self._records_end = 0
        self._warned = False
        self.refresh()

    def refresh(self) -> None:
        """Read what any process has appended to the index since the last time."""
        size = os.fstat(self._index.fileno()).st_size
        end = size - size % _LINE_BYTES
        self._index.seek(self._lines_end)
        lines = memoryview(self._index.read(max(0, end - self._lines_end)))
        for start in range(0, len(lines), _LINE_BYTES):
            entry = lines[start : start + _ENTRY.size]
            if _SEAL.unpack_from(lines, start + _ENTRY.size) == (zlib.crc32(entry),):
                key, offset, length, checksum = _ENTRY.unpack(entry)
                self._places[key] = (offset, length, checksum)
                self._records_end = max(self._records_end, offset + length)
        self._lines_end += len(lines)

    def get(self, keys: Iterable[bytes]) -> dict[bytes, Record]:
        """The records under `keys`, as read-only memory maps, without those that are absent or damaged."""
        found = ((key, self._read(key)) for key in keys if key in self._places)
        return {key: record for key, record in found if record is not None}

    def _read(self, key: bytes) -> Record | None:
        offset, length, checksum = self._places[key]
        if offset + length > len(self._mapped):
            self._map()
        record = self._mapped[offset : offset + length]
        if checksum is not None:
            if len(record) < length or zlib.crc32(record.data) != checksum:
                del self._places[key]
                if not self._warned:
                    logger.warning("%s holds damaged records; they are computed again", self._records.name)
                    self._warned = True
                return None
            self._places[key] = (offset, length, None)
        return record

    def append(self, records: Mapping[bytes, Record]) -> list[bytes]:
        """Store records, without those whose key is there already.

        Returns:
            The keys of the records that do not fit within the limit.

        Raises:
            OSError: the disk is full, or the folder was deleted.
        """
        refused, lines = [], []
        with files.lock(self.root / "lock"):  # two processes that append at once would lose each other's records
            if os.fstat(self._index.fileno()).st_nlink == 0:  # nobody could read what is added
                raise FileNotFoundError(errno.ENOENT, "the folder was deleted", self._index.name)
            self.refresh()
            room = self.max_bytes - bytes_below(self.root)
            end = self._records_end
            for key, record in records.items():
                if key in self._places:
                    continue
                offset = -(-end // _ALIGNMENT) * _ALIGNMENT
                needed = offset - end + len(record) + _LINE_BYTES
                if needed > room:
                    refused.append(key)
                    continue
                content = record.data
                _write(self._records, offset, content)
                entry = _ENTRY.pack(key, offset, len(record), zlib.crc32(content))
                lines.append(entry + _SEAL.pack(zlib.crc32(entry)))
                room, end = room - needed, offset + len(record)
            _write(self._index, self._lines_end, b"".join(lines))
            self.refresh()
        return refused

    def _map(self) -> None:
        """Map the file of records at its present length."""
        if size := os.fstat(self._records.fileno()).st_size:
            self._mapped = np.frombuffer(mmap.mmap(self._records.fileno(), size, access=mmap.ACCESS_READ), np.uint8)


def bytes_below(root: Path) -> int:
    """The size of all stores below `root`."""
    return sum(file.stat().st_size for file in root.glob("*/*"))


def _open(file: Path) -> BinaryIO:
    """Open a file to read and write without a buffer; it is made if need be."""
    file.touch()
    return file.open("r+b", buffering=0)


def _write(file: BinaryIO, offset: int, content: bytes | memoryview) -> None:
    """Write all of `content` at `offset`; a single `write` may write only a part."""
    file.seek(offset)
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]
