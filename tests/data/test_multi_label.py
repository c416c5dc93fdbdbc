"""Several labels of a text: how they are read, split, measured, learned and predicted."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from samples import SMALL, Interrupt, labelled, save_tiny_model, write_csv, write_jsonl
from typer.testing import CliRunner

from fastpeft import FastpeftError, TrainConfig, train
from fastpeft.cli import app
from fastpeft.comparison.learning_rates import take_slice, write_rows
from fastpeft.data.examples import load_data, load_rows
from fastpeft.data.problems import CLASSIFICATION, MULTI_LABEL, NEXT_WORDS, describe, most_frequent
from fastpeft.data.result_warnings import of_dev_rows, of_names, of_train_rows
from fastpeft.training.evaluation import evaluate
from fastpeft.training.export import export
from fastpeft.training.prediction import predict
from fastpeft.training.task import data_for

LABELS = ["mixed", "negative", "positive"]
ROWS = labelled(96)
TEXTS = ["a lovely film", "the plot is dull and uneven", "the film"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, the rows in each form, and a run that learned them."""
    folder = tmp_path_factory.mktemp("place")
    shape = {"hidden_size": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    save_tiny_model(folder / "model", initializer_range=0.1, **shape)
    write_jsonl(folder / "list.jsonl", ROWS)
    write_csv(folder / "sign.csv", [(row["text"], " | ".join(row["labels"])) for row in ROWS])
    flags = [(row["text"], *(int(label in row["labels"]) for label in LABELS)) for row in ROWS]
    write_csv(folder / "flags.csv", flags, ("text", *LABELS))
    given: dict[str, Any] = {"model": str(folder / "model"), "data": str(folder / "list.jsonl"), "batch_size": 8}
    train(TrainConfig(output=str(folder / "run"), method="full", epochs=20, learning_rate=3e-3, bf16=False, **given))
    return folder


# -- rows ------------------------------------------------------------------------------------------------------------


def test_a_list_a_sign_and_columns_are_the_same_rows(place: Path) -> None:
    listed = load_data(str(place / "list.jsonl"))
    assert (listed.problem, listed.labels) == (MULTI_LABEL, LABELS)
    known = {row["text"]: [float(label in row["labels"]) for label in LABELS] for row in ROWS}
    for part in (listed.train, listed.dev):
        assert [known[text] for text in part.texts] == part.labels
    assert [0.0] * 3 in listed.train.labels, "a text may have no label"
    signed = load_data(str(place / "sign.csv"), problem_type="multi-label")
    in_columns = load_data(str(place / "flags.csv"), label_column="mixed, negative,positive")
    assert signed.train == in_columns.train == listed.train
    assert signed.dev == in_columns.dev == listed.dev
    # what a run measures again needs no names: its labels are columns there
    again = load_rows(str(place / "flags.csv"), LABELS, MULTI_LABEL)
    assert again.labels == [known[text] for text in again.texts]


def test_names_of_labels_are_those_of_a_data_set(tmp_path: Path) -> None:
    from datasets import Dataset, Features, List, Value
    from datasets.features import ClassLabel

    features = Features({"text": Value("string"), "labels": List(ClassLabel(names=["joy", "anger", "awe"]))})
    rows = {"text": [f"text {row}" for row in range(9)], "labels": [[row % 3, 0] if row else [] for row in range(9)]}
    Dataset.from_dict(rows, features).save_to_disk(tmp_path / "saved")
    data = load_data(str(tmp_path / "saved"))
    assert (data.problem, data.labels) == (MULTI_LABEL, ["joy", "anger", "awe"])
    assert dict(zip(data.train.texts, data.train.labels)).get("text 4", [1.0, 1.0, 0.0]) == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("rows", "given", "said"),
    [
        ([("a", "x,y"), ("b", "x")], {}, ["'x,y'", "no row has a |", "stands between"]),
        ([("a", "x; y"), ("b", "")], {}, ["'x; y'", "no row has a |"]),
        ([("a", "['x', 'y']"), ("b", "x")], {}, ["lists in a jsonl or parquet file"]),
        ([("a", "x||y"), ("b", "x")], {}, ["row 1 of", "no class"]),
        ([("a", ""), ("b", " ")], {}, ["no label in any row"]),
        ([("a", "x"), ("b", "x")], {}, ["one class only ('x')"]),
        ([("a", "x|y"), ("b", "y|x")], {}, ["every row of", "has the same labels (x, y)"]),
        ([("a", "2"), ("b", "0")], {"label_column": "label,text"}, ["cannot tell which column", "--text-column"]),
        ([("a", "2"), ("b", "0")], {"label_column": "label,other"}, ["has no column 'other'"]),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path: Path, rows: Any, given: dict[str, str], said: list[str]) -> None:
    data = str(write_csv(tmp_path / "rows.csv", rows))
    with pytest.raises(FastpeftError) as error:
        load_data(data, problem_type="multi-label", **given)
    assert all(part in str(error.value) for part in said), error.value


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "has no value for its labels"),
        (["x|y"], "stands between labels"),
        ([["x"]], "one word"),
        ([0, 1, 0], "not names of labels, but flags"),
        ([True, True], "not names of labels, but flags"),
    ],
)
def test_a_cell_that_is_no_list_of_labels_is_refused(tmp_path: Path, value: Any, said: str) -> None:
    rows = [{"text": "a", "labels": ["x", "y"]}, {"text": "b", "labels": value}]
    with pytest.raises(FastpeftError, match=f"row 2 of .*{said}"):
        load_data(str(write_jsonl(tmp_path / "rows.jsonl", rows)), problem_type="multi-label")


@pytest.mark.parametrize("flags", [[0, 1], [False, True]], ids=str)
def test_a_flag_for_each_of_two_labels_is_no_list_of_labels(tmp_path: Path, flags: list[Any]) -> None:
    rows = [{"text": "a", "labels": flags}, {"text": "b", "labels": flags[::-1]}]
    with pytest.raises(FastpeftError, match=r"the same labels .*: lists hold the names of the labels that apply"):
        load_data(str(write_jsonl(tmp_path / "rows.jsonl", rows)))


def test_a_column_of_flags_is_no_two_labels(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "rows.csv", [("a", 0, 1), ("b", 1, 0)], ("text", "x|y", "z"))
    with pytest.raises(FastpeftError, match=r"has the label 'x\|y', but \| stands between labels\. Rename its column"):
        load_data(str(file), label_column="x|y,z")


def test_columns_of_flags_hold_nothing_else(tmp_path: Path) -> None:
    data = str(write_csv(tmp_path / "rows.csv", [("a", "1", "true"), ("b", "0", "2")], ("text", "x", "y")))
    with pytest.raises(FastpeftError, match=r"row 2 of .*'2' in column 'y', which must be 1"):
        load_data(data, label_column="x,y")
    with pytest.raises(FastpeftError, match=r"'y' of .* is named twice"):
        load_data(data, label_column="x,y,y")
    with pytest.raises(FastpeftError, match="labels of 0 and 1, but problem_type is 'classification'"):
        load_data(data, label_column="x,y", problem_type="classification")
    with pytest.raises(FastpeftError, match=r"label_column is 'x,y', but no labels are read\. Leave it out"):
        load_rows(data, [], NEXT_WORDS, label_column="x,y")


def test_a_row_without_its_labels_is_named(tmp_path: Path) -> None:
    rows = [{"text": "a", "labels": []}, {"text": "b", "labels": ["x"]}, {"text": "c", "labels": None}]
    with pytest.raises(FastpeftError, match=r"row 3 of .* has no value for its labels"):
        load_data(str(write_jsonl(tmp_path / "rows.jsonl", rows)))


def test_rare_labels_are_on_both_sides(tmp_path: Path) -> None:
    rows = [
        {"text": f"text {row}", "labels": ["common"] * (row > 9) + ["rare"] * (row % 50 == 0)} for row in range(100)
    ]
    data = load_data(str(write_jsonl(tmp_path / "rows.jsonl", rows)))
    counts = Counter((tuple(label), side) for side in ("train", "dev") for label in getattr(data, side).labels)
    assert counts[(0.0, 0.0), "dev"] >= 1, "rows without a label are a kind of their own"
    assert [sum(label[1] for label in part.labels) for part in (data.train, data.dev)] == [1, 1]


def test_a_slice_may_lack_a_label(tmp_path: Path) -> None:
    rows = [{"text": f"text {row}", "labels": ["a"] * (row % 2) + ["b"] * (row % 3 == 0)} for row in range(30)]
    data = load_data(str(write_jsonl(tmp_path / "rows.jsonl", [*rows, *rows[:1]])))
    data = replace(data, labels=[*data.labels, "rare"])
    for part in (data.train, data.dev):
        part.labels[:] = [[*label, 0.0] for label in part.labels]
    data.train.labels[-1][2] = 1.0
    for seed in range(5):
        found = take_slice(data, 8, 8, seed)
        counts = np.sum(found.train.labels, axis=0)
        assert not np.sum(found.dev.labels, axis=0)[counts == 0].any(), "what nothing is learned of is not measured"
        write_rows(found, tmp_path / str(seed))
        assert load_data(str(tmp_path / str(seed))).labels[:2] == ["a", "b"]


# -- figures ---------------------------------------------------------------------------------------------------------


def test_metrics_by_hand() -> None:
    labels = np.array([[1.0, 0, 1], [0, 1, 0], [0, 0, 0], [1, 1, 0]])
    outputs = np.array([[2.0, -1, 1], [1, -2, -3], [-1, -1, -1], [3, 1, -1]])
    scores = MULTI_LABEL.score(outputs, labels, LABELS)
    assert scores["micro_f1"] == pytest.approx(2 * 4 / (2 * 4 + 1 + 1))
    assert scores["macro_f1"] == pytest.approx((4 / 5 + 2 / 3 + 1) / 3)
    assert scores["subset_accuracy"] == 0.75
    assert scores["ranking_precision"] == pytest.approx((1 + 1 / 2 + 1) / 3), "without the row that has no label"
    none = MULTI_LABEL.score(outputs[2:3], labels[2:3], LABELS)
    assert none == {"micro_f1": 0, "macro_f1": 0, "subset_accuracy": 1, "ranking_precision": 0}
    loss = torch.nn.functional.binary_cross_entropy_with_logits(torch.tensor(outputs), torch.tensor(labels))
    assert MULTI_LABEL.loss is not None
    assert MULTI_LABEL.loss(outputs, labels) == pytest.approx(loss.item(), rel=1e-12)
    # 1.25 labels a row: always one, the first of the two that are most frequent
    frequent = most_frequent(labels.tolist(), MULTI_LABEL)
    found = describe(MULTI_LABEL, outputs, labels, LABELS, frequent)
    assert found["most_frequent_class"]["classes"] == ["mixed"]
    assert found["most_frequent_class"]["micro_f1"] == pytest.approx(2 * 2 / (2 * 2 + 2 + 3))
    assert found["per_class"]["negative"] == {"precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "support": 2}
    assert found["confusion_matrix"] is None


@pytest.mark.parametrize("joined", ["dull|fun", "['dull', 'fun']"])  # the latter by pandas' to_csv
def test_joined_classes_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture, joined: str) -> None:
    rows = [(f"film {number}", ("dull", "fun", joined)[number % 3]) for number in range(30)]
    data = load_data(str(write_csv(tmp_path / "joined.csv", rows)))
    assert data.problem is CLASSIFICATION
    assert "to learn several labels of a text add --problem-type multi-label" in caplog.text


def test_what_was_never_told_is_warned_of() -> None:
    labels = np.array([[1.0, 0, 1], [0, 1, 0]] * 50)
    never = np.array([[1.0, -1, 1], [1, -1, -1]] * 50)
    same = np.full((100, 3), -1.0)

    def said(problem: Any, outputs: Any, given: Any) -> list[str]:
        return of_dev_rows(problem, ["a"] * 100, set(), outputs, given, LABELS)

    assert said(MULTI_LABEL, labels * 2 - 1, labels) == []
    told = ["These labels were never predicted, though some rows have them: 'negative'."]
    assert said(MULTI_LABEL, never, labels) == told
    assert said(MULTI_LABEL, same, labels)[0].startswith("Every prediction is no label, so nothing shows")
    classes = np.array([0, 1, 2, 0] * 25)
    told = ["These classes were never predicted, though some rows have them: 'positive'."]
    assert said(CLASSIFICATION, np.eye(3)[classes % 2], classes) == told
    assert of_train_rows(MULTI_LABEL, [(3, 1), (0, 1), (2, 0)], LABELS) == [
        "No training row has these labels, so the model cannot learn them: 'negative'."
    ]
    assert of_names(CLASSIFICATION, ["Bad", "Good", "bad", "fair"]) == [
        "These classes differ only in upper and lower case, and are trained as different classes: 'Bad', 'bad'. If "
        "they mean the same, spell them the same way in the data."
    ]
    for twin in ("cafe\u0301", "caf\u00e9\u200b", "Caf\u00e9\u00a0"):
        (told,) = of_names(CLASSIFICATION, ["caf\u00e9", twin, "bar"])
        assert (
            f"differ only in case, spaces or the codes of letters, and are trained as different classes: {twin!a}"
            in (told.replace("'caf\\xe9', ", "").replace(", 'caf\\xe9'", ""))
        )
    for names, absent in (
        (["bad", "nan"], "'nan'"),
        (["-1", "0", "1", "2"], "'-1'"),
        (["NA", "None", "b"], "'NA', 'None'"),
    ):
        assert of_names(CLASSIFICATION, names) == [
            f"These classes are what programs write where a value is missing: {absent}. They are trained as others; if "
            "they mean no label, remove their rows."
        ]
    for names in (["-1", "0", "1"], ["-2", "-1", "0", "1", "2"], ["none", "other"]):
        assert of_names(CLASSIFICATION, names) == []


# -- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.long(but=("siva", "k-lst"))
@pytest.mark.parametrize("method", SMALL)
def test_every_method_is_measured_as_it_was_trained(place: Path, tmp_path: Path, method: str) -> None:
    given: dict[str, Any] = {"model": str(place / "model"), "data": str(place / "flags.csv")}
    given |= {"label_column": ",".join(LABELS), "max_steps": 2, "learning_rate": 1e-3, "batch_size": 8}
    config = TrainConfig(output=str(tmp_path / "run"), method=method, **given)
    result = train(config)
    found = evaluate(result.folder)
    names = (*MULTI_LABEL.metrics, "loss")
    assert {n: result.metrics[n] for n in names} == pytest.approx({n: found[n] for n in names}, abs=1e-4)
    # for paired tests: by row
    dev = data_for(config).dev
    said = [{name for name, _ in labels} for labels in predict(result.folder, dev.texts)]
    true = [{name for name, has in zip(LABELS, row) if has} for row in dev.labels]
    kept = json.loads((result.folder / "row_scores.json").read_text())
    assert kept["above"] == [2 * len(one & other) for one, other in zip(said, true)]
    assert kept["below"] == [len(one) + len(other) for one, other in zip(said, true)]
    assert result.metrics["problem_type"] == "multi_label_classification"
    assert result.metrics["peak_memory_mb"] > 0


def test_labels_are_learned_told_and_exported(place: Path, tmp_path: Path) -> None:
    folder = place / "run"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["micro_f1"] > 0.9 > metrics["micro_f1_before"]
    assert list(metrics["per_class"]) == LABELS
    found = predict(folder, TEXTS)
    assert [[name for name, _ in labels] for labels in found] == [["positive"], ["mixed", "negative"], []]
    assert all(p > 0.5 for labels in found for _, p in labels)
    card = (folder / "README.md").read_text()
    assert "every label whose probability, the sigmoid of its logit, is above 0.5" in card
    loaded: dict[str, Any] = {}
    exec(card.split("```python\n")[1].split("```")[0], loaded)
    with torch.no_grad():
        (logits,) = loaded["model"].eval()(**loaded["tokenizer"](TEXTS[0], return_tensors="pt")).logits
    assert found[0][0][1] == pytest.approx(logits.sigmoid()[2].item(), abs=1e-5)
    exported = export(folder, tmp_path / "exported")
    assert json.loads((exported / "config.json").read_text())["problem_type"] == "multi_label_classification"


def test_predictions_are_shown_and_written(place: Path, tmp_path: Path) -> None:
    def said(*arguments: str) -> list[str]:
        result = CliRunner().invoke(app, ["predict", str(place / "run"), *arguments])
        assert result.exit_code == 0, result.output
        return result.output.splitlines()

    shown = [line.split("\t") for line in said(*TEXTS)]
    assert [(labels, text) for labels, _, text in shown] == [
        ("positive", TEXTS[0]),
        ("mixed|negative", TEXTS[1]),
        ("", TEXTS[2]),
    ]
    assert [probabilities.count("|") for _, probabilities, _ in shown] == [0, 1, 0]
    assert said("--all", TEXTS[0])[0].split("\t")[1].startswith("mixed 0.")
    rows = write_csv(tmp_path / "new.csv", [(text,) for text in TEXTS], ("text",))
    said("--file", str(rows), "--output", str(tmp_path / "out.jsonl"))
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert list(written[0]) == ["row", "text", "labels", *(f"p({label})" for label in LABELS)]
    assert [row["labels"] for row in written] == ["positive", "mixed|negative", ""]
    # what was written can be learned from
    again = load_rows(str(tmp_path / "out.jsonl"), LABELS, MULTI_LABEL)
    assert again.labels == [[0, 0, 1], [1, 1, 0], [0, 0, 0]]


def test_eval_has_a_row_for_each_label(place: Path) -> None:
    result = CliRunner().invoke(app, ["eval", str(place / "run"), "--data", str(place / "flags.csv")])
    assert result.exit_code == 0, result.output
    shown = " ".join(result.output.split())
    assert "baseline: most frequent labels" in shown
    assert all(f"F1 of {label} (support " in shown for label in LABELS)


def test_a_run_goes_on_and_another_starts_from_it(place: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"data": str(place / "sign.csv"), "problem_type": "multi-label", "batch_size": 8}
    given |= {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-3}
    config = TrainConfig(output=str(tmp_path / "run"), method="siva", init_from=str(place / "run"), **given)
    whole = train(replace(config, output=str(tmp_path / "whole")))
    with pytest.raises(KeyboardInterrupt):
        train(config, callbacks=[Interrupt(3)])
    assert train(config, resume=True).metrics["loss"] == whole.metrics["loss"]
    assert whole.metrics["micro_f1_before"] > 0.9, "the head was taken over"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"prompt": "{text} it is <mask>", "label_words": "a,b,c"}, "this is multi-label"),
        ({"prompt": "auto"}, "this is multi-label"),
        ({"metric": "accuracy", "save_steps": 1}, "'accuracy' is not measured in multi-label"),
        ({"settings": {"label_smoothing_factor": 0.1}}, "label_smoothing_factor is for classes"),
        ({"problem_type": "causal"}, "one of classification, regression, tags, multi-label"),
    ],
)
def test_what_goes_with_classes_alone_is_refused(place: Path, tmp_path: Path, given: Any, said: str) -> None:
    with pytest.raises(FastpeftError, match=said):
        train(
            TrainConfig(
                output=str(tmp_path / "run"), model=str(place / "model"), data=str(place / "list.jsonl"), **given
            )
        )
    assert not (tmp_path / "run").exists()
