"""Tables that are written: rows that go to a csv, tsv, jsonl or parquet file as they come."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from fastpeft.errors import FastpeftError
from fastpeft.support.files import path_of, publish, saving, unfinished
from fastpeft.support.interrupts import uninterrupted

OutputRow = dict[str, Any]
Write = Callable[[list[OutputRow]], None]


def check_output(output: str | Path, overwrite: bool) -> Path:
    """The file to write to.

    Raises:
        FastpeftError: it is of no kind that is written, its folder is missing, or it is there and not to be replaced.
    """
    path = path_of(output)
    if path.suffix[1:].lower() not in _OPEN:
        raise FastpeftError(f"the output {str(path)!r} must end in one of {', '.join(f'.{kind}' for kind in _OPEN)}.")
    if path.is_dir():
        raise FastpeftError(f"the output {str(path)!r} is a folder. Give the name of a file.")
    if not path.parent.is_dir():
        raise FastpeftError(f"the output {str(path)!r} is to be in a folder that is not there. Make it first.")
    if path.exists() and not overwrite:
        raise FastpeftError(f"the output {str(path)!r} exists. Give another name, or --overwrite to replace it.")
    return path


@contextmanager
def writing(path: Path, columns: Mapping[str, type]) -> Iterator[Write]:
    """What appends rows to a file, which has its name once it is whole.

    Before that it is a hidden one beside it, which a killed process leaves behind. What was written before an error or
    an interrupt is kept as `NAME.unfinished.KIND`, in place of what had that name, and its message says so.

    Args:
        path: as `check_output` gives it. A file that is there is replaced.
        columns: names and types (int, str or float) of what each row has.

    Raises:
        FastpeftError: the file cannot be written.
        KeyboardInterrupt: Ctrl-C, SIGTERM or SIGHUP came.
    """
    staged = unfinished(path)
    kept = path.with_name(f"{path.stem}.unfinished{path.suffix}")
    count = 0  # rows that are worth keeping

    def guarded() -> Any:
        return saving(str(path), lambda: "Give a file that can be written, on a disk with room.")

    def append(rows: list[OutputRow]) -> None:
        nonlocal count
        with guarded(), uninterrupted():
            before, count = count, 0  # for a write that fails may leave half a row
            write(rows)
            count = before + len(rows)

    with guarded():
        write, close = _OPEN[path.suffix[1:].lower()](staged, columns)
    try:
        yield append
        with guarded(), uninterrupted():
            count = 0
            close()
            publish(staged, path)
    except BaseException as error:
        if not count:
            raise
        with guarded(), uninterrupted():
            close()
            os.replace(staged, kept)
        where = f"The {count:,} rows that were written before are in {kept}."
        if isinstance(error, (FastpeftError, KeyboardInterrupt)):
            raise type(error)(f"{str(error) or 'Interrupted.'} {where}") from error
        error.add_note(where)
        raise
    finally:
        with suppress(Exception):
            close()
        staged.unlink(missing_ok=True)


def _as_cell(value: Any, kind: type = str) -> Any:
    """A value for a column of one type: other types than text become JSON; what JSON lacks, as a date, becomes text."""
    if value is None or isinstance(value, str) or type(value) is kind:
        return value
    has = isinstance(value, (bool, int, float, list, dict))
    return json.dumps(value, ensure_ascii=False, default=str) if has else str(value)


def _open_csv(file: Path, columns: Mapping[str, type], dialect: str = "excel") -> tuple[Write, Callable[[], None]]:
    stream = file.open("x", encoding="utf-8", newline="")
    table = csv.DictWriter(stream, list(columns), dialect=dialect)
    table.writeheader()

    def write(rows: list[OutputRow]) -> None:
        table.writerows({name: _as_cell(value) for name, value in row.items()} for row in rows)
        stream.flush()

    return write, stream.close


def _open_jsonl(file: Path, columns: Mapping[str, type]) -> tuple[Write, Callable[[], None]]:
    stream = file.open("x", encoding="utf-8", newline="")

    def write(rows: list[OutputRow]) -> None:
        stream.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
        stream.flush()

    return write, stream.close


def _open_parquet(file: Path, columns: Mapping[str, type]) -> tuple[Write, Callable[[], None]]:
    import pyarrow
    from pyarrow import parquet

    types = {int: pyarrow.int64(), float: pyarrow.float64(), str: pyarrow.string()}
    schema = pyarrow.schema([(name, types[kind]) for name, kind in columns.items()])
    table = parquet.ParquetWriter(file, schema)

    def write(rows: list[OutputRow]) -> None:
        cells = [{name: _as_cell(row[name], kind) for name, kind in columns.items()} for row in rows]
        table.write_table(pyarrow.Table.from_pylist(cells, schema))

    return write, table.close


_OPEN: dict[str, Callable[[Path, Mapping[str, type]], tuple[Write, Callable[[], None]]]] = {
    "csv": _open_csv,
    "tsv": partial(_open_csv, dialect="excel-tab"),
    "jsonl": _open_jsonl,
    "parquet": _open_parquet,
}
