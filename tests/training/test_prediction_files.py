"""A finished run on the rows of files: what is read, shown, written and left out."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
from pyarrow import Table, parquet
from rich.console import Console
from samples import pairs, reviews, save_tiny_model, scores, tagged, write_csv, write_jsonl
from typer.testing import CliRunner, Result

from fastpeft import FastpeftError, TrainConfig, console, train
from fastpeft.cli import app
from fastpeft.data import output_tables
from fastpeft.data.examples import load_data
from fastpeft.data.output_tables import writing
from fastpeft.data.tables import read_apart
from fastpeft.errors import EmptyTextError
from fastpeft.training import prediction_files
from fastpeft.training.evaluation import evaluate
from fastpeft.training.generation import generate
from fastpeft.training.prediction import Predictor, predict
from fastpeft.training.prediction_files import Predictions

TEXTS = ["a lovely film", "the plot, is\nvery dull", 'the "end" is funny']
NUMBERS = ("row", "text", "class", "p(negative)", "p(positive)")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of each kind."""
    place = tmp_path_factory.mktemp("runs")
    model = str(save_tiny_model(place / "model"))
    data = {
        "classes": write_csv(place / "reviews.csv", reviews(40), ("review", "stars")),
        "pairs": write_jsonl(place / "pairs.jsonl", pairs(40)),
        "numbers": write_jsonl(place / "scores.jsonl", scores(40)),
        "tags": write_jsonl(place / "tagged.jsonl", tagged(40)),
    }
    for name, file in data.items():
        label = "stars" if name == "classes" else None
        given = {"method": "head", "max_steps": 2, "learning_rate": 0.1, "label_column": label}
        train(TrainConfig(output=str(place / name), model=model, data=str(file), **given))
    return place


@pytest.fixture
def place(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder; the runs are in `../runs`."""
    for name in ("classes", "pairs", "numbers", "tags"):
        (tmp_path / name).symlink_to(runs / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str, code: int = 0, given: str | None = None) -> Result:
    result = CliRunner().invoke(app, ["predict", *arguments], input=given)
    assert result.exit_code == code, result.output
    return result


def write_tsv(file: Path, rows: list[tuple[str, str]]) -> None:
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, dialect="excel-tab").writerows([("text", "label"), *rows])


WRITERS: dict[str, Callable[[Path, list[tuple[str, str]]], object]] = {
    "csv": write_csv,
    "tsv": write_tsv,
    "jsonl": lambda file, rows: write_jsonl(file, [{"text": text, "label": label} for text, label in rows]),
    "parquet": lambda file, rows: parquet.write_table(
        Table.from_pylist([{"text": text, "label": label} for text, label in rows]), file
    ),
}
READERS: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
    "csv": lambda file: list(csv.DictReader(file.open(newline="", encoding="utf-8"), quoting=csv.QUOTE_MINIMAL)),
    "tsv": lambda file: list(csv.DictReader(file.open(newline="", encoding="utf-8"), dialect="excel-tab")),
    "jsonl": lambda file: [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()],
    "parquet": lambda file: parquet.read_table(file).to_pylist(),
}


# -- what is read ------------------------------------------------------------------------------------------------------


@pytest.mark.long(only="csv")
@pytest.mark.parametrize("kind", WRITERS)
def test_files_are_read_as_for_training_and_written(place: Path, kind: str) -> None:
    WRITERS[kind](place / f"rows.{kind}", [(text, "negative") for text in TEXTS])
    shown = run("classes", "--file", f"rows.{kind}").stdout.splitlines()
    expected = predict("classes", TEXTS)
    assert [line.split("\t") for line in shown] == [
        [label, f"{p:.3f}", " ".join(text.splitlines())] for (label, p), text in zip(expected, TEXTS)
    ]
    assert "saved in out" in run("classes", "--file", f"rows.{kind}", "--output", f"out.{kind}").stdout
    rows = READERS[kind](place / f"out.{kind}")
    assert [(*row, row["label"]) for row in rows] == [(*NUMBERS, "label", "negative")] * 3
    assert [(int(row["row"]), row["text"], row["class"]) for row in rows] == [
        (number, text, label) for number, (text, (label, _)) in enumerate(zip(TEXTS, expected), start=1)
    ]
    for row, (label, p) in zip(rows, expected):
        assert float(row[f"p({label})"]) == pytest.approx(p, abs=1e-6)
        assert float(row["p(negative)"]) + float(row["p(positive)"]) == pytest.approx(1, abs=1e-6)
    assert sorted(path.name for path in place.iterdir() if path.is_file()) == [f"out.{kind}", f"rows.{kind}"]


@pytest.mark.parametrize(
    ("header", "options"),
    [
        (("opinion",), ()),  # the label is absent
        (("opinion", "stars"), ()),  # the run knows its label column
        (("label", "opinion"), ("--text-column", "opinion")),
        (("text", "opinion"), ("--text-column", "opinion")),
    ],
)
def test_columns_are_picked(place: Path, header: tuple[str, ...], options: tuple[str, ...]) -> None:
    write_csv(place / "rows.csv", [[TEXTS[0] if name == "opinion" else "0" for name in header]], header)
    assert run("classes", "--file", "rows.csv", *options).stdout.endswith(f"\t{TEXTS[0]}\n")
    run("classes", "--file", "rows.csv", *options, "--output", "out.csv")
    others = [name for name in header if name != "opinion"]
    assert list(READERS["csv"](place / "out.csv")[0]) == ["row", "opinion", *NUMBERS[2:], *others]


def test_a_column_that_training_found_is_read_beside_one_with_a_more_usual_name(place: Path) -> None:
    write_csv(place / "rows.csv", [("a comment", TEXTS[0])], ("text", "review"))
    shown = run("classes", "--file", "rows.csv")
    assert (shown.stdout, shown.stderr) == (run("classes", TEXTS[0]).stdout, "")


def test_a_file_without_the_column_of_the_run_is_read_with_a_word_on_it(place: Path, runs: Path) -> None:
    given = {"method": "head", "max_steps": 1, "text_column": "review", "label_column": "stars"}
    train(TrainConfig(output="named", model=str(runs / "model"), data=str(runs / "reviews.csv"), **given))
    write_csv(place / "rows.csv", [(TEXTS[0], "a comment")], ("review", "text"))
    write_csv(place / "usual.csv", [(TEXTS[0],)], ("text",))
    own, usual = (run("named", "--file", file) for file in ("rows.csv", "usual.csv"))
    assert own.stdout == usual.stdout
    assert own.stderr == ""
    assert "usual.csv has no column 'review', which the run was trained with" in " ".join(usual.stderr.split())


def test_the_name_of_a_file_among_the_texts_is_told(place: Path) -> None:
    write_csv(place / "rows.csv", [(TEXTS[0],)], ("review",))
    shown = run("classes", "rows.csv", "rows")
    assert len(shown.stdout.splitlines()) == 2
    told = " ".join(shown.stderr.split())
    assert told == "'rows.csv' is the name of a file, and is read as a text; for the texts in it give --file"


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ("a lovely film\nthe end\n\n \n", ()),
        ('{"text": "a lovely film"}\n{"text": "the end"}\n', ("--format", "jsonl")),
    ],
)
def test_standard_input(place: Path, given: str, kind: tuple[str, ...]) -> None:
    lines = run("classes", "--file", "-", *kind, given=given).stdout.splitlines()
    assert [line.split("\t")[2] for line in lines] == ["a lovely film", "the end"]


# -- what is left out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=repr)
def test_a_text_of_a_file_is_a_line_whatever_is_in_it(tmp_path: Path, end: str) -> None:
    texts = ["good\x0cpart two", "next\x85line", "a\u2028b", "c\x1dd"]
    (tmp_path / "x.txt").write_bytes(end.join([*texts, "end", "", ""]).encode())
    _, _, rows = read_apart(str(tmp_path / "x.txt"))
    assert [(number, row["text"]) for number, row in rows] == [*enumerate([*texts, "end"], start=1)]


BLANK = ["line 2 of x.jsonl is empty. Give a text"]
BAD: dict[str, tuple[str, str, str, list[str], list[str]]] = {
    "fields": ("classes", "x.csv", "text,n\na,1\nb,2,3\nc,1\n", ["a", "c"], ["row 2 of x.csv has 3 fields"]),
    "fields of tsv": ("classes", "x.tsv", 'text\tn\na\t1\nb\n"c\t1\n', ["a", '"c'], ["row 2 of x.tsv has 1 fields"]),
    "an open quote": (
        *("classes", "x.csv", 'text,n\na,1\n"b,2\nc,3\n"d",4\n"e,5\nf,6\n', ["a", "c", "d", "f"]),
        ["row 2: x.csv is broken at line 3: ", "row 5: x.csv is broken at line 6: "],
    ),
    "an empty text": ("classes", "x.csv", "text,n\n,1\nb,2\n  ,3\n", ["b"], ["row 1 of x.csv has an em", "row 3 of"]),
    "json": (
        "classes",
        "x.jsonl",
        '{"text": "a"}\n\n{"te\n[]\n{"text": "b"}\n',
        ["a", "b"],
        [*BLANK, "line 3 of x", "line 4"],
    ),
    "a missing text": (
        *("classes", "x.jsonl", '{"text": "a"}\n{"text": null}\n{"n": 1}\n{"text": "b"}', ["a", "b"]),
        ["row 2 of x.jsonl has None in column 'text'", "row 3 of x.jsonl has None"],
    ),
    "a blank line": ("classes", "x.txt", "a\n \nb\n\n", ["a", "b"], ["line 2 of x.txt is empty. Give a text"]),
    "a blank line of csv": ("classes", "x.csv", "\ntext,n\na,1\n\nb,2\n\n", ["a", "b"], ["row 2 of x.csv is empty. "]),
    "a blank line of tsv": ("classes", "x.tsv", "text\tn\na\t1\n\nb\t2\n", ["a", "b"], ["row 2 of x.tsv is empty. "]),
    "a broken pair": ("pairs", "x.txt", "a\tb\nc\nd\te\tf\ng\th", ["a\tb", "g\th"], ["row 2 of x.txt: ", "row 3 of"]),
    "half a pair": (
        "pairs",
        "x.csv",
        "text1,text2\na,b\nc,\n",
        ["a\tb"],
        ["row 2 of x.csv has an empty text in column"],
    ),
    "words beyond": ("tags", "x.txt", f"a b\n{'the ' * 50}\n", ["a", "b"], ["row 2 of x.txt: of the 50 words that"]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named_and_the_rest_is_answered(place: Path, case: str) -> None:
    name, file, content, answered, messages = BAD[case]
    (place / file).write_text(content)
    result = run(name, "--file", file, code=1)
    assert [line.split("\t", 2)[2] for line in result.stdout.splitlines() if line] == answered
    told = result.stderr.splitlines()
    assert len(told) == len(messages)
    for line, message in zip(told, messages):
        assert line.startswith(f"Left out: {message}")
    run(name, "--file", file, "--output", "out.jsonl", code=1)
    assert len((place / "out.jsonl").read_text().splitlines()) == len(answered)


@pytest.mark.parametrize("name", ["classes", "pairs", "numbers", "tags"])
def test_an_empty_text_that_is_typed_is_left_out_as_that_of_a_file_is(place: Path, name: str) -> None:
    text = "a film\tthe end" if name == "pairs" else "film"
    result = run(name, "", text, " ", "--output", "out.jsonl", code=1)
    assert result.stderr.splitlines() == [
        f"Left out: text {number}: the text is empty. Give one, or leave it out." for number in (1, 3)
    ]
    assert [row["row"] for row in READERS["jsonl"](place / "out.jsonl")] == [2]
    with pytest.raises(EmptyTextError):
        predict(name, [text, ""])


def test_rows_stay_beside_the_lines_of_the_input(place: Path) -> None:
    for kind, content in (
        ("txt", "a\n\nb\n"),
        ("csv", "text\na\n\nb\n"),
        ("jsonl", '{"text": "a"}\n\n{"text": "b"}\n'),
    ):
        (place / f"x.{kind}").write_text(content)
        assert "2 of 3 rows" in run("classes", "--file", f"x.{kind}", "-o", f"{kind}.jsonl", code=1).stdout
        assert [row["row"] for row in READERS["jsonl"](place / f"{kind}.jsonl")] == [1, 3]


def test_many_bad_rows_are_counted(place: Path) -> None:
    rows = [{"text": ["word"] * 1000}] * 30 + [{"text": "a film"}]
    (place / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = run("classes", "--file", "x.jsonl", code=1).stderr.splitlines()
    assert len(told) == 21
    assert max(map(len, told)) < 300
    assert told[-1] == "Left out: 10 more of the 31 rows"


def test_the_numbers_of_rows_are_those_of_the_file(place: Path) -> None:
    (place / "x.csv").write_text("text,n\na,1\nb\nc,1\n")
    run("classes", "--file", "x.csv", "--output", "out.jsonl", code=1)
    assert [row["row"] for row in READERS["jsonl"](place / "out.jsonl")] == [1, 3]
    run("classes", "first", "--file", "x.csv", "--output", "both.jsonl", code=1)
    assert [row["row"] for row in READERS["jsonl"](place / "both.jsonl")] == [1, 2, 4]


def test_a_file_of_bad_rows_alone_is_refused(place: Path) -> None:
    (place / "x.jsonl").write_text("{\n")
    assert "x.jsonl has no row that can be read. line 1 of" in run("classes", "--file", "x.jsonl", code=2).stderr


def test_many_open_quotes_are_read_at_once(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("text,n\n" + '"a" b,1\n' * 20_000)
    _, kind, rows = read_apart(str(tmp_path / "x.csv"))
    assert kind == "csv"
    assert [number for number, _ in rows] == list(range(1, 20_001))
    assert all(isinstance(row, FastpeftError) for _, row in rows)


# -- what is shown and written -----------------------------------------------------------------------------------------


def test_pairs_numbers_and_tags_are_written(place: Path) -> None:
    write_jsonl(place / "pairs.jsonl", pairs(3))
    run("pairs", "--file", "pairs.jsonl", "--output", "pairs.csv")
    row = READERS["csv"](place / "pairs.csv")[1]
    assert list(row) == ["row", "sentence1", "sentence2", "class", "p(different)", "p(same)", "label"]
    assert [row["sentence1"], row["sentence2"]] == [pairs(3)[1]["sentence1"], pairs(3)[1]["sentence2"]]
    write_jsonl(place / "scores.jsonl", scores(3))
    run("numbers", "--file", "scores.jsonl", "--output", "numbers.parquet")
    (row, *_) = READERS["parquet"](place / "numbers.parquet")
    (said,) = predict("numbers", [scores(3)[0]["text"]])
    (given, *_) = scores(3)
    expected = {"row": 1, "text": given["text"], "score": pytest.approx(said[1], abs=1e-6)}
    assert row == {**expected, "given score": given["score"]}  # the number has the name of the input's column
    write_jsonl(place / "tagged.jsonl", tagged(2))
    run("tags", "--file", "tagged.jsonl", "--output", "tags.jsonl")
    rows = READERS["jsonl"](place / "tags.jsonl")
    (said,) = predict("tags", [tagged(2)[1]["tokens"]])
    assert [(row["word"], row["tag"], row["probability"]) for row in rows if row["row"] == 2] == [
        (word, tag, pytest.approx(p, abs=1e-6)) for word, (tag, p) in zip(tagged(2)[1]["tokens"], said)
    ]


def test_a_run_is_not_measured_against_its_own_answers(place: Path) -> None:
    write_jsonl(place / "scores.jsonl", scores(3))
    run("numbers", "--file", "scores.jsonl", "--output", "said.csv")
    for use in partial(evaluate, "numbers"), load_data:
        with pytest.raises(FastpeftError, match=r"'score' of said.csv holds predictions.*--label-column 'given score'"):
            use("said.csv")
    named = evaluate("numbers", "said.csv", label_column="given score")
    assert named == evaluate("numbers", "scores.jsonl") != evaluate("numbers", "said.csv", label_column="score")
    load_data("said.csv", label_column="score")  # as to train on what a model said


def test_no_column_is_lost_where_predictions_are_predicted_again(place: Path) -> None:
    """The output of a run on numbers has both, its own and those given; as an input it may have them in any order."""
    for names in (("score", "given score"), ("given score", "score")):
        write_csv(place / "again.csv", [("A warm film.", "0.5", "0.25")], ("text", *names))
        run("numbers", "--file", "again.csv", "--output", "twice.csv", "--overwrite")
        (row,) = READERS["csv"](place / "twice.csv")
        given = dict(zip(names, ("0.5", "0.25")))
        assert row["given given score"] == given["score"]
        assert row["given score"] == given["given score"]


def test_a_pair_is_read_as_in_training(place: Path) -> None:
    """With its spaces, which many tokenizers see; those around a tab in one string are none of its texts."""
    predictor = Predictor("pairs")
    pair = (" a lovely film", "the end ")
    for given in (pair, list(pair)):
        assert predictor.encode(given).text == pair
    assert predictor.encode(" a lovely film\t the end ").text == ("a lovely film", "the end")
    write_csv(place / "rows.csv", [pair], ("text1", "text2"))
    ((found, _),) = Predictions("pairs", file="rows.csv")
    assert found[0].text == pair


@pytest.mark.parametrize("kind", READERS)
def test_other_columns_go_along(place: Path, kind: str) -> None:
    ids, notes = [7, 2**70, None], ["a", ["b", 1], True]
    rows = [{"id": ids[at], "text": "a film", "n": at, "class": "mine", "note": notes[at]} for at in range(3)]
    write_jsonl(place / "x.jsonl", [*rows[:2], {"text": " ", "n": 5, "late": "x"}, *rows[2:]])
    assert "4 of 6 rows" in run("classes", "typed", "", "--file", "x.jsonl", "-o", f"out.{kind}", code=1).stdout
    found = READERS[kind](place / f"out.{kind}")
    assert list(found[0]) == [*NUMBERS, "id", "n", "note", "late"]
    assert {row["class"] for row in found} <= {"negative", "positive"}  # not the input's column of that name
    text = {"jsonl": rows[1]["note"], "csv": '["b", 1]', "tsv": '["b", 1]', "parquet": '["b", 1]'}[kind]
    true, none = (True, None) if kind == "jsonl" else ("true", None if kind == "parquet" else "")
    large = 2**70 if kind == "jsonl" else str(2**70)
    assert [row["id"] for row in found][2:] == [large, none]
    assert [int(row["n"]) for row in found[1:]] == [0, 1, 2]
    assert [row["note"] for row in found] == [none, "a", text, true]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_date_goes_along_as_it_is(place: Path, kind: str) -> None:
    rows = [{"text": "a film", "on": date(2026, 1, day)} for day in (1, 2)]
    parquet.write_table(Table.from_pylist(rows), place / "x.parquet")
    run("classes", "--file", "x.parquet", "--output", f"out.{kind}")
    assert [row["on"] for row in READERS[kind](place / f"out.{kind}")] == ["2026-01-01", "2026-01-02"]


def test_classes_of_a_parquet_file_go_along_by_their_names(place: Path) -> None:
    """As the classes that are answered do, so that the two can be compared."""
    kind = datasets.ClassLabel(names=["negative", "positive"])
    features = {"text": datasets.Value("string"), "label": kind, "several": datasets.List(kind), "note": {"n": kind}}
    rows = [{"text": "a film", "label": label, "several": [1, 0], "note": {"n": 1}} for label in (1, 0, -1, None)]
    datasets.Dataset.from_list(rows, datasets.Features(features)).to_parquet(place / "x.parquet")
    run("classes", "--file", "x.parquet", "--output", "out.jsonl")
    found = READERS["jsonl"](place / "out.jsonl")
    assert [row["label"] for row in found] == ["positive", "negative", -1, None]
    assert (found[0]["several"], found[0]["note"]) == (["positive", "negative"], {"n": 1})
    (place / "out.jsonl").rename(place / "lines.parquet")
    run("classes", "--file", "lines.parquet", "--format", "jsonl")


def test_a_line_has_its_fields_whatever_is_in_them(place: Path, runs: Path) -> None:
    """Of a class as of a text."""
    names = {"negative": "very\tbad", "positive": "good\nor better"}
    data = write_csv(place / "rows.csv", [(f"{text}\tor so", names[label]) for text, label in reviews(20)])
    train(TrainConfig(output="odd", model=str(runs / "model"), data=str(data), method="head", max_steps=1))
    lines = run("odd", "--file", "rows.csv").stdout.splitlines()
    assert {tuple(line.split("\t")[::2]) for line in lines} <= {
        (" ".join(name.split()), f"{text} or so") for name in names.values() for text, _ in reviews(20)
    }
    assert len(lines) == 20


def test_a_number_called_row_is_not_lost(place: Path, runs: Path) -> None:
    data = write_jsonl(place / "x.jsonl", [{"text": row["text"], "row": row["score"]} for row in scores(20)])
    config = {"model": str(runs / "model"), "data": str(data), "label_column": "row", "method": "head", "max_steps": 1}
    train(TrainConfig(output="row", **config))
    run("row", "--file", "x.jsonl", "--output", "out.jsonl")
    found = READERS["jsonl"](place / "out.jsonl")
    assert [row["row"] for row in found] == [*range(1, 21)]
    assert found[0]["value"] == pytest.approx(predict("row", [scores(1)[0]["text"]])[0][1], abs=1e-6)


def test_other_columns_of_a_text_stand_beside_each_of_its_words(place: Path) -> None:
    write_jsonl(place / "x.jsonl", [{"words": ["a", "film"], "id": 5}])
    run("tags", "--file", "x.jsonl", "--text-column", "words", "--output", "out.jsonl")
    found = READERS["jsonl"](place / "out.jsonl")
    assert [(row["word"], row["id"]) for row in found] == [("a", 5), ("film", 5)]
    assert list(found[0]) == ["row", "word", "tag", "probability", "id"]


def test_every_class_is_shown(place: Path) -> None:
    label, shown, text = run("classes", "a lovely film", "--all").stdout.rstrip("\n").split("\t")
    found = dict(part.rsplit(" ", 1) for part in shown.split(", "))
    assert list(found) == ["negative", "positive"]
    assert max(found, key=lambda name: float(found[name])) == label
    assert text == "a lovely film"
    assert len(run("tags", "a film", "--all").stdout.splitlines()[0].split("\t")[1].split(", ")) == 4
    assert run("numbers", "a film", "--all").stdout == run("numbers", "a film").stdout


def test_results_come_some_rows_at_a_time(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction_files, "_CHUNK", 2)
    (place / "x.txt").write_text("a\nb\nc\nd\ne\n")
    found = Predictions("classes", file="x.txt")
    counts = []
    with writing(place / "out.csv", found.columns) as write:
        for some, left_out in found:
            assert left_out == []
            write([record for each in some for record in found.records(each)])
            (staged,) = place.glob(".*.part")
            counts.append(len(READERS["csv"](staged)))
            assert not (place / "out.csv").exists()
    assert counts == [2, 4, 5]
    assert len(READERS["csv"](place / "out.csv")) == 5
    assert found.count == 5


def test_long_texts_are_counted_once_however_often_they_are_answered(place: Path) -> None:
    found = Predictions("classes", ["a lovely film " * 60, "dull"])
    for _ in range(2):
        assert len(list(found)) == 1
        assert found.cut == 1


def test_any_error_keeps_what_was_written(place: Path) -> None:
    def write_some() -> None:
        with writing(place / "out.csv", {"row": int}) as write:
            write([{"row": 1}, {"row": 2}])
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory") as error:
        write_some()
    (note,) = error.value.__notes__
    assert note == f"The 2 rows that were written before are in {place / 'out.unfinished.csv'}."
    assert len(READERS["csv"](place / "out.unfinished.csv")) == 2


def test_one_text_is_no_list_of_its_characters(place: Path) -> None:
    for use in (Predictions, generate):
        with pytest.raises(FastpeftError, match=r"texts is one text, 'A film'; .* Give \['A film'\]"):
            use("classes", "A film")


def test_a_text_file_has_no_column(place: Path) -> None:
    (place / "x.txt").write_text("a\nb\n")
    with pytest.raises(FastpeftError, match=r"text_column is 'review', but x\.txt is text without columns"):
        Predictions("classes", file="x.txt", text_column="review")


@pytest.mark.parametrize("kind", READERS)
def test_an_interrupt_keeps_what_was_written(place: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(prediction_files, "_CHUNK", 2)
    lines = Predictions.records
    monkeypatch.setattr(Predictions, "records", lambda self, each: _interrupt() if each.row == 4 else lines(self, each))
    (place / "x.txt").write_text("a\nb\nc\nd\ne\n")
    (place / f"out.{kind}").write_text("before")
    result = run("classes", "--file", "x.txt", "--output", f"out.{kind}", "--overwrite", code=130)
    assert f"Interrupted. The 2 rows that were written before are in out.unfinished.{kind}." in result.stderr
    assert [row["text"] for row in READERS[kind](place / f"out.unfinished.{kind}")] == ["a", "b"]
    assert (place / f"out.{kind}").read_text() == "before"
    assert not list(place.glob(".*"))


def _interrupt() -> Any:
    raise KeyboardInterrupt


def test_a_write_that_fails_leaves_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(row: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    def twice() -> None:
        with writing(Path("out.jsonl"), {"row": int}) as write:
            write([{"row": 1}])
            monkeypatch.setattr(output_tables.json, "dumps", full)
            write([{"row": 2}])

    with pytest.raises(FastpeftError, match=r"cannot write out\.jsonl \(No space left on device\)"):
        twice()
    assert not [path for path in place.iterdir() if path.is_file()]


def test_what_is_there_stays_unless_it_may_be_replaced(place: Path) -> None:
    (place / "out.csv").write_text("before")
    refused = run("classes", "a film", "--output", "out.csv", code=2).stderr
    assert "the output 'out.csv' exists. Give another name, or --overwrite" in refused
    assert (place / "out.csv").read_text() == "before"
    refused = run("classes", "a film", "--output", "gone/out.csv", code=2).stderr
    assert "'gone/out.csv' is to be in a folder that is not there. Make it first." in refused
    run("classes", "a film", "--output", "out.csv", "--overwrite")
    assert len(READERS["csv"](place / "out.csv")) == 1


def test_the_bar_is_for_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def bar(terminal: bool, beside_output: bool, output_is_terminal: bool = True) -> str:
        screen = io.StringIO()
        monkeypatch.setattr(console, "errors", Console(file=screen, force_terminal=terminal))
        monkeypatch.setattr(console, "console", Console(file=io.StringIO(), force_terminal=output_is_terminal))
        with console.row_bar(7, beside_output=beside_output) as advance:
            advance(7)
        return screen.getvalue()

    assert "7/7" in bar(terminal=True, beside_output=False)
    assert "7/7" in bar(terminal=True, beside_output=True, output_is_terminal=False)
    assert bar(terminal=True, beside_output=True) == bar(terminal=False, beside_output=False) == ""
