"""Rows of data and where they come from: local files and folders, saved data sets, the hub."""

from __future__ import annotations

import csv
import io
import json
import logging
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from fastpeft.errors import EmptyTextError, FastpeftError, first_line
from fastpeft.support.files import parse_json, path_of
from fastpeft.support.hub import reachable
from fastpeft.support.safe_paths import check_named_files

logger = logging.getLogger(__name__)

Record = dict[str, Any]
Reader = Callable[[Path], list[Record]]
Numbered = tuple[int, Record | FastpeftError]  # a row, or what is wrong with it, with its number

STDIN = Path("standard input")  # stands for it, and is what messages call it

# the stems of files and the names of parts, GLUE's own for MNLI among them
_TRAIN = ("train",)
_DEV = ("dev", "validation", "val", "valid", "dev_matched", "validation_matched")
_HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?")  # owner/name:configuration
_GLUE = "nyu-mll/glue"
_OTHER_FILES = ("txt", "json", "xlsx", "gz", "zip")  # what ends so is meant to be a file, though none that can be read


@dataclass(frozen=True)
class Table:
    """The rows of one part of a data set.

    Attributes:
        name: what messages call it: a file, or a data set and its part.
        rows: each a dictionary of its columns.
        class_names: for columns of whole numbers that stand for classes, the names of those.
    """

    name: str
    rows: list[Record]
    class_names: Mapping[str, list[str]] = field(default_factory=dict)

    @cached_property
    def columns(self) -> list[str]:
        """Those of all rows: a row of a jsonl file may leave some out."""
        return list(dict.fromkeys(chain.from_iterable(self.rows)))


def find_tables(data: str, readers: Mapping[str, Reader]) -> list[Table]:
    """The rows to train on and, where `data` has them, the rows to measure on.

    Args:
        data: a file or folder, or a data set of the hub.
        readers: `READERS` or `TEXT_READERS`, whose kinds of files are looked for.

    Raises:
        FastpeftError: nothing is there, or it cannot be read.
    """
    path = path_of(data)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        import datasets

        for folder in (path, *filter(Path.is_dir, path.iterdir())):  # its parts have folders of their own
            check_named_files(folder)
        return _load_parts(data, lambda: datasets.load_from_disk(str(path)))
    check_there(data, readers)
    if hub_name := _hub_name(data, readers):
        owner, configuration = hub_name.groups()
        if data.startswith("glue/"):  # the benchmark's old name, with a task of it
            owner, configuration = _GLUE, data.removeprefix("glue/")
        logger.info("no file or folder %r here; looking for that data set in the cache and on the hub", data)
        return _load_parts(data, lambda: _load_from_hub(owner, configuration))
    return [Table(str(file), _read_rows(file, readers), _names_in(file)) for file in _find_files(path, readers)]


def is_one_table(data: str) -> bool:
    """Whether `data` is a file, or a folder that `datasets` saved one part into, and not several parts."""
    path = path_of(data)
    return path.is_file() or (path / "state.json").is_file()


def check_there(data: str, readers: Mapping[str, Reader]) -> None:
    """Raise `FastpeftError` where `data` is no file or folder, nor named as a data set of the hub. Loads no library."""
    path = path_of(data)
    if not (path.is_file() or path.is_dir() or _hub_name(data, readers)):
        raise FastpeftError(
            f"no data at {str(path)!r}; give 'demo', the path of a {', '.join(readers)} file or of a folder with "
            f"train.* and dev.* files, or a data set of the hub, as {_GLUE}:sst2."
        )


def _hub_name(data: str, readers: Mapping[str, Reader]) -> re.Match[str] | None:
    """The owner's name and the configuration, if it has one, where `data` names a data set of the hub."""
    path = path_of(data)
    is_file_name = data.startswith(".") or path.suffix[1:].lower() in (*readers, *_OTHER_FILES)
    return None if path.exists() or is_file_name else _HUB_NAME.fullmatch(data)


def _load_from_hub(owner: str, configuration: str | None) -> Any:
    """The parts of a data set of the hub; where that is out of reach, those in the cache alone."""
    import datasets

    if reachable():
        return datasets.load_dataset(owner, configuration)
    from datasets.packaged_modules.cache.cache import Cache

    name = owner.partition("/")[2]
    return Cache(dataset_name=name, repo_id=owner, config_name=configuration, version="auto", hash="auto").as_dataset()


def _load_parts(data: str, load: Callable[[], Any]) -> list[Table]:
    """The parts of a data set that the library datasets loads."""
    try:
        parts = load()
    except Exception as error:  # no network, no such name, a broken file: almost any type
        raise FastpeftError(
            f"cannot load the data set {data!r}: {first_line(error)} Give the id of one on the hub, as "
            f"{_GLUE}:sst2, with a network or after it was loaded once; or the path of a {', '.join(READERS)} file."
        ) from error
    named = {data: parts}  # what was saved as one part
    if isinstance(parts, dict):
        chosen = [next((name for name in names if name in parts), None) for names in (_TRAIN, _DEV)]
        if chosen[0] is None:
            raise FastpeftError(
                f"the data set {data!r} has no part named train, only {', '.join(parts)}. Choose another."
            )
        named = {f"{data} ({name})": parts[name] for name in chosen if name is not None}
    tables = [Table(name, part.to_list(), _names_of_features(part.features)) for name, part in named.items()]
    for table in tables:
        if not table.rows:
            raise FastpeftError(f"{table.name} is empty: it has no rows. Choose another data set.")
    return tables


def _names_in(file: Path) -> dict[str, list[str]]:
    """The names of classes in a parquet file of the library datasets, as the hub has them."""
    if file.suffix.lower() != ".parquet":
        return {}
    from pyarrow import parquet

    schema = parquet.read_schema(file)
    if b"huggingface" not in (schema.metadata or {}):
        return {}
    import datasets

    try:
        return _names_of_features(datasets.Features.from_arrow_schema(schema))
    except (KeyError, TypeError, ValueError) as error:
        raise FastpeftError(
            f"{file} has features that datasets {datasets.__version__} does not know ({first_line(error)}). Write it "
            "anew with that version, or install a newer one."
        ) from None


def _names_of_features(features: Mapping[str, Any]) -> dict[str, list[str]]:
    """The names of the classes in each column that the library datasets knows to hold some, in lists or not."""
    kinds = {column: getattr(kind, "feature", kind) for column, kind in features.items()}
    return {column: list(kind.names) for column, kind in kinds.items() if hasattr(kind, "names")}


def _with_names(row: Record, names: Mapping[str, list[str]]) -> Record:
    """A row with the names of classes in place of their numbers, in lists too. What is no class, as -1, stays."""

    def named(value: Any, known: list[str]) -> Any:
        if isinstance(value, list):
            return [named(each, known) for each in value]
        return known[value] if isinstance(value, int) and 0 <= value < len(known) else value

    return row | {column: named(row[column], known) for column, known in names.items()}


def _find_files(path: Path, readers: Mapping[str, Reader]) -> list[Path]:
    """The training file and, where there is one, the dev file behind `path`."""
    if path.is_file():
        return [path]
    parts: list[Path] = []
    for stems in (_TRAIN, _DEV):
        named = sorted(
            file for file in path.iterdir() if file.name.lower().partition(".")[0] in stems and file.is_file()
        )
        found = [file for file in named if file.stem.lower() in stems and file.suffix[1:].lower() in readers]
        if len(found) > 1 or (not found and (named or not parts)):
            names = ", ".join(file.name for file in named) or "none"
            raise FastpeftError(
                f"the folder {str(path)!r} needs one file named {' or '.join(stems)}.* ({', '.join(readers)}); found: "
                f"{names}."
            )
        parts += found
    return parts


def _read_rows(file: Path, readers: Mapping[str, Reader]) -> list[Record]:
    """Every row of a file as a dictionary of its columns."""
    reader = readers.get(file.suffix[1:].lower())
    if reader is None:
        raise FastpeftError(f"{file} is of an unknown kind; allowed are {', '.join(readers)}. Give one of these.")
    rows = reader(file)
    if not rows:
        what = "a text" if "txt" in readers else "a text and a class"
        raise FastpeftError(f"{file} is empty: it has no rows. Give a file with {what} in each row.")
    return rows


def read_apart(file: str | Path, kind: str | None = None) -> tuple[str, str, list[Numbered]]:
    """The rows of a file, each by itself: of one that cannot be read there is the error, and the others are read.

    Args:
        file: its path, or `-` for the standard input.
        kind: csv, tsv, jsonl, parquet or txt, which has one text a line; None: by the end of its name, txt where that
            has none.

    Returns:
        What messages call the file, its kind, and its rows with their numbers from 1: of csv, tsv and parquet those of
        rows, of jsonl and txt those of lines. A blank line is a row, with an `EmptyTextError`, unless no row follows.

    Raises:
        FastpeftError: the file cannot be read at all, or it has no rows.
    """
    path = STDIN if file == "-" else path_of(file)
    if path is not STDIN and path.is_dir():
        raise FastpeftError(f"{path} is a folder. Give a file: write what the library datasets saved as parquet first.")
    allowed = [name for name in _APART if path is not STDIN or name != "parquet"]
    kind = kind or path.suffix[1:].lower() or "txt"
    if kind not in allowed:
        raise FastpeftError(
            f"{path} is of the kind {kind!r}; allowed are {', '.join(allowed)}. Convert it, or say its kind by "
            "--format."
        )
    rows = _APART[kind](path)
    if kind == "parquet" and (names := _names_in(path)):
        rows = [(number, _with_names(row, names) if isinstance(row, dict) else row) for number, row in rows]
    while rows and isinstance(rows[-1][1], EmptyTextError):
        rows.pop()
    if not rows:
        raise FastpeftError(f"{path} holds no text. Give a file with one text a row, or of the kind txt a line.")
    return str(path), kind, rows


def read_text(file: Path) -> str:
    try:
        content = sys.stdin.buffer.read() if file is STDIN else file.read_bytes()
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FastpeftError(
            f"{file} is not UTF-8 text (byte {error.start}: {error.reason}). Convert it to UTF-8."
        ) from None
    except OSError as error:
        raise FastpeftError(f"cannot read {file} ({error.strerror}). Give the path of an existing file.") from None
    if "\0" in text:
        raise FastpeftError(f"{file} is broken: it holds NUL bytes. Restore it or convert it to UTF-8 text.")
    return text


def _read_csv(file: Path) -> list[Numbered]:
    text = read_text(file)
    delimiter = _delimiter(file, text)
    if delimiter != ",":
        logger.info("%s is separated by %s, not by commas", file, "tabs" if delimiter == "\t" else delimiter)
    return _table(file, _parse(file, text, delimiter=delimiter, strict=True))


def _delimiter(file: Path, text: str) -> str:
    """A comma, unless the header has none and is divided by a sign that spreadsheets write in its place."""
    header = text.lstrip("\ufeff\r\n").partition("\n")[0]
    fields = {sign: _parse(file, header, delimiter=sign, strict=True) for sign in ",;\t"}
    whole = {sign: lines[0] for sign, lines in fields.items() if len(lines) == 1 and isinstance(lines[0], list)}
    several = [sign for sign, names in whole.items() if len(names) > 1]
    return next(iter(several), ",")


def _read_tsv(file: Path) -> list[Numbered]:
    """Rows read without quoting, as GLUE writes them, or with it, where they then fit the header no worse.

    Where all fit it without, quoting is tried only if all quotes enclose whole fields.
    """
    text = read_text(file)
    lines = _parse(file, text, delimiter="\t", quoting=csv.QUOTE_NONE)
    if lines and all(map(_is_cola, filter(None, lines))):
        return _table(file, [_COLA, *lines])
    begun = [field for fields in lines for field in fields if field.startswith('"')]
    plain = _table(file, lines)
    if (bad := _count_errors(plain)) == 0 and not all(_QUOTED.fullmatch(field) for field in begun):
        return plain  # parsed as quoted, a text that begins with a quote would swallow the rows after it
    try:
        quoted = _table(file, _parse(file, text, delimiter="\t", strict=True))
    except FastpeftError:  # no header that is one
        return plain
    return quoted if _count_errors(quoted) <= bad else plain


def _count_errors(rows: list[Numbered]) -> int:
    return sum(isinstance(row, FastpeftError) and not isinstance(row, EmptyTextError) for _, row in rows)


def _is_cola(fields: list[str] | FastpeftError) -> bool:
    """Whether a line is one of GLUE's CoLA, whose files have no header."""
    return isinstance(fields, list) and len(fields) == len(_COLA) and fields[1] in ("0", "1") and fields[2] in ("", "*")


_COLA = ["source", "label", "star", "sentence"]
_QUOTED = re.compile(r'"(?:[^"]|"")*"')
_LONGEST_FIELD = 2**31 - 1  # characters; all that a C long holds everywhere


def _parse(file: Path, text: str, **dialect: Any) -> list[Any]:
    """The fields of each row, or its error, from the first that has fields. After an error the next line is a row."""
    lines, start = list(io.StringIO(text, newline="")), 0
    found: list[Any] = []
    limit = csv.field_size_limit(_LONGEST_FIELD)
    try:
        while start < len(lines):
            reader, done = csv.reader(map(lines.__getitem__, range(start, len(lines))), **dialect), 0
            try:
                for fields in reader:
                    done = reader.line_num
                    if fields or found:
                        found.append(fields)
                break
            except csv.Error as error:
                start += done + 1
                found.append(FastpeftError(f"{file} is broken at line {start}: {error}. Correct that line."))
    finally:
        csv.field_size_limit(limit)
    return found


def _table(file: Path, lines: list[Any]) -> list[Numbered]:
    """Rows of a file whose first line names the columns."""
    if not lines:
        return []
    header = lines[0]
    if isinstance(header, FastpeftError):
        raise header
    if len(set(header)) < len(header):
        raise FastpeftError(f"{file} names a column twice: {', '.join(header)}. Give every column its own name.")
    rows: list[Numbered] = []
    for number, fields in enumerate(lines[1:], start=1):
        row: Record | FastpeftError
        if isinstance(fields, FastpeftError):
            row = FastpeftError(f"row {number}: {fields}")
        elif not fields:
            row = _blank(f"row {number}", file)
        elif len(fields) != len(header):
            row = FastpeftError(
                f"row {number} of {file} has {len(fields)} fields, its header has {len(header)} ({', '.join(header)}). "
                "Correct the row, or quote fields that hold the separator."
            )
        elif len(header) > 1 and [fields[0].removeprefix("\ufeff"), *fields[1:]] == header:
            row = FastpeftError(f"row {number} of {file} repeats the header, as in files that were joined. Remove it.")
        else:
            row = dict(zip(header, fields))
        rows.append((number, row))
    return rows


def _read_jsonl(file: Path) -> list[Numbered]:
    rows: list[Numbered] = []
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if not line.strip():
            rows.append((number, _blank(f"line {number}", file)))
            continue
        try:
            row = parse_json(line)
            if "\\u" in line:  # an escape can write half of a character, which has no code
                json.dumps(row, ensure_ascii=False).encode()
        except ValueError as error:
            row = FastpeftError(f"line {number} of {file} is not JSON ({error}). Write one object a line.")
        else:
            if not isinstance(row, dict):
                row = FastpeftError(f"line {number} of {file} is not a JSON object. Write one object a line.")
        rows.append((number, row))
    return rows


def _read_parquet(file: Path) -> list[Numbered]:
    import pyarrow
    from pyarrow import parquet

    try:
        return list(enumerate(parquet.read_table(file).to_pylist(), start=1))
    except (pyarrow.ArrowException, OSError) as error:
        raise FastpeftError(
            f"{file} is not a readable parquet file ({first_line(error)}). Restore or write it anew."
        ) from None


def _read_txt(file: Path) -> list[Numbered]:
    lines = io.StringIO(read_text(file), newline=None)  # splitlines would also cut at form feeds and the like
    return [
        (number, {"text": line.rstrip("\n")} if line.strip() else _blank(f"line {number}", file))
        for number, line in enumerate(lines, start=1)
    ]


def _blank(place: str, file: Path) -> EmptyTextError:
    return EmptyTextError(f"{place} of {file} is empty. Give a text, or remove it.")


def _whole(read: Callable[[Path], list[Numbered]]) -> Reader:
    """A reader that raises the first error of a row. It leaves out blank lines: texts to train on may stand apart."""

    def whole(file: Path) -> list[Record]:
        rows = []
        for _, row in read(file):
            if isinstance(row, EmptyTextError):
                continue
            if isinstance(row, FastpeftError):
                raise row from None
            rows.append(row)
        return rows

    return whole


_APART: dict[str, Callable[[Path], list[Numbered]]] = {
    "csv": _read_csv,
    "tsv": _read_tsv,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "txt": _read_txt,
}
TEXT_READERS = {kind: _whole(read) for kind, read in _APART.items()}  # for texts alone
READERS = {kind: read for kind, read in TEXT_READERS.items() if kind != "txt"}
