"""What is said of figures that mislead: rows that were trained on, few rows, one answer, a loss that rose."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from samples import reviews, save_tiny_decoder, save_tiny_model, tagged, write_csv, write_jsonl
from typer.testing import CliRunner

from fastpeft import FastpeftError, TrainConfig, train
from fastpeft.cli import app
from fastpeft.data.problems import CLASSIFICATION, REGRESSION, TAGGING
from fastpeft.data.result_warnings import of_dev_rows, of_names, of_training_loss, seen_rows
from fastpeft.data.splitting import digest
from fastpeft.training.evaluation import evaluate

FEW = "Only {} rows were evaluated"
SPOILING = ("--learning-rate", "3", "--head-learning-rate", "3", "--set", "max_grad_norm=0")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def config(tmp_path: Path, checkpoint: str) -> TrainConfig:
    data = str(write_csv(tmp_path / "reviews.csv", unlike(60)))
    return TrainConfig(output=str(tmp_path / "run"), method="head", model=checkpoint, data=data, max_steps=2)


def unlike(rows: int, seed: int = 0) -> list[tuple[str, str]]:
    """`reviews` of which no two are equal."""
    return [(f"{text} {seed} {number}", label) for number, (text, label) in enumerate(reviews(rows, seed=seed))]


# -- rows ------------------------------------------------------------------------------------------------------------


def test_rows_that_were_trained_on_are_counted() -> None:
    trained_on = {digest(f"text {n}") for n in range(412)}
    said = seen_rows([f"text {n}" for n in range(500)], trained_on)
    assert [text.partition(":")[0] for text in said] == ["412 of 500 rows (82 %) are in the training data"]
    assert seen_rows(["text 1", *(f"new {n}" for n in range(999))], trained_on)[0].startswith(
        "1 of 1,000 rows (below 1 %)"
    )
    assert "(1 %)" in seen_rows(["text 1", *(f"new {n}" for n in range(99))], trained_on)[0]
    assert seen_rows(["new"], trained_on) == seen_rows(["text 1"], set()) == []


def said_of(problem: Any, outputs: Any, labels: Any, rows: int = 100) -> list[str]:
    return of_dev_rows(problem, ["a"] * rows, set(), np.array(outputs), np.array(labels), ["no", "yes"])


def test_one_answer_and_few_rows_are_told() -> None:
    both, one = [[0.0, 1.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]]
    assert said_of(CLASSIFICATION, both, [0, 1]) == []
    assert said_of(CLASSIFICATION, one, [0, 1]) == [
        "Every prediction is 'yes', so nothing shows that the model can distinguish the classes."
    ]
    assert "is 'yes', and so is every label, so nothing" in said_of(CLASSIFICATION, one, [1, 1])[0]
    assert "is 'yes', so nothing" in said_of(CLASSIFICATION, one, [0, 0])[0], "every label is another"
    assert said_of(CLASSIFICATION, one[:1], [1]) == [], "one row has one answer"
    assert "can distinguish the tags" in said_of(TAGGING, [*one, both[1]], [0, 1, -100])[0], "what has no label is none"
    assert said_of(REGRESSION, [[1.5], [1.5]], [1.0, 2.0]) == []
    assert [text.partition(",")[0] for text in said_of(CLASSIFICATION, both, [0, 1], 99)] == [FEW.format(99)]


def test_numbers_that_are_far_off_are_told() -> None:
    """As prices are, which no few steps reach from 0."""
    prices = 8 * [25_000.5, 75_000.5]
    (said,) = said_of(REGRESSION, 8 * [[7.0], [7.1]], prices)
    assert said.startswith("The mean squared error, 3.12e+09, is above the 6.25e+08 that always answering the mean")
    assert said_of(REGRESSION, 8 * [[7.0], [7.1]], 8 * [0.2, 0.4])
    assert said_of(REGRESSION, [[90.0], [160.0], [140.0]], [100.0, 120.0, 140.0]) == [], "of so few it may be chance"
    assert said_of(REGRESSION, [[26_000.0], [74_000.0]], [25_000.5, 75_000.5]) == []
    assert said_of(REGRESSION, [[0.0]], [3.0]) == [], "one row is its mean"


# -- losses ----------------------------------------------------------------------------------------------------------


def noisy(loss: Callable[[int], float], points: int = 50, seed: int = 0) -> list[tuple[int, float]]:
    noise = random.Random(seed)
    return [(step, loss(step) + noise.gauss(0, 0.1)) for step in range(points)]


def test_a_loss_that_ended_above_its_start_is_told() -> None:
    said = [of_training_loss(noisy(lambda step: 0.7 + step / 100, seed=seed), 0.7) for seed in range(20)]
    assert all(said)
    assert said[0][0].startswith("The training loss ended above its start (0.")
    late = [(step, 0.7 - step / 100 if step < 45 else 1.1) for step in range(50)]
    assert of_training_loss(late, 0.7), "where it fell first too"
    leaps = [(0, 0.7), *((step, 40.0 * (step % 3 == 0)) for step in range(1, 30))]
    assert of_training_loss(leaps, 0.7), "where it leapt at once, and is 0 for most batches"


def test_a_loss_that_was_still_falling_is_told() -> None:
    said = [of_training_loss(noisy(lambda step: 3.7 - step / 20, seed=seed), 3.7) for seed in range(20)]
    assert all(said)
    assert said[0][0].startswith("The training loss was still falling at the end (1.")
    level = [of_training_loss(noisy(lambda step: max(0.7, 3.7 - step / 10), seed=seed), 3.7) for seed in range(100)]
    assert sum(map(bool, level)) <= 5, "two standard errors, one side"


def test_a_loss_that_moved_within_its_noise_is_not() -> None:
    flat = [of_training_loss(noisy(lambda step: 0.7, seed=seed), 0.7) for seed in range(100)]
    assert sum(map(bool, flat)) <= 5, "two standard errors, one side"
    one_bad_batch = [(step, max(0.4, 0.7 - step / 100)) for step in range(49)] + [(49, 2.0)]
    assert not of_training_loss(one_bad_batch, 0.7)
    assert not of_training_loss([(step, float(step)) for step in range(9)], 1.0), "too few points"


def said_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "fastpeft.data.result_warnings"]


# -- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_and_its_evaluation_say_what_misleads(config: TrainConfig, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "fastpeft.data.result_warnings"):
        result = train(replace(config, learning_rate=1e-9))
        assert result.metrics["warnings"][0].startswith(FEW.format(6))
        assert said_in(caplog) == result.metrics["warnings"]
        assert json.loads((result.folder / "metrics.json").read_text())["warnings"] == result.metrics["warnings"]
        assert evaluate(result.folder)["warnings"] == result.metrics["warnings"]
        caplog.clear()
        said = evaluate(result.folder, config.data)["warnings"]
        assert said_in(caplog) == said
    assert said[0].startswith("54 of 60 rows (90 %) are in the training data: ")
    texts = (result.folder / "trained_on.txt").read_text()
    assert len(texts.split()) == 54
    assert not any(text in texts for text, _ in unlike(60))


def test_a_run_without_a_fault_has_no_warnings(config: TrainConfig, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    write_csv(folder / "train.csv", unlike(80))
    write_csv(folder / "dev.csv", unlike(100, seed=1))
    result = train(replace(config, method="full", data=str(folder), batch_size=8, max_steps=130, learning_rate=1e-2))
    assert result.metrics["warnings"] == evaluate(result.folder)["warnings"] == []


def test_own_dev_rows_that_are_trained_on_are_told_before_training(
    config: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    write_csv(folder / "train.csv", unlike(60))
    write_csv(folder / "dev.csv", [*unlike(60)[:9], *unlike(3, seed=1)])
    with caplog.at_level(logging.INFO, "fastpeft"):
        result = train(replace(config, data=str(folder)))
    said = [record.getMessage() for record in caplog.records]
    told = "9 of 12 rows (75 %) are in the training data"
    assert [text.startswith(told) for text in said].count(True) == 2, "before it and after"
    assert result.metrics["warnings"][0].startswith(told)
    assert "classes (training + dev): negative 30 + 7, positive 30 + 5" in said


def test_what_the_run_before_was_trained_on_counts(config: TrainConfig, tmp_path: Path) -> None:
    first = train(replace(config, method="full"))
    other = str(write_csv(tmp_path / "other.csv", unlike(40, seed=1)))
    second = train(replace(config, method="full", output=str(tmp_path / "second"), init_from=config.output, data=other))
    said = [evaluate(folder, config.data)["warnings"][0] for folder in (first.folder, second.folder)]
    assert all(text.startswith("54 of 60 rows (90 %) are in the training data: ") for text in said)


def test_damaged_files_are_told(config: TrainConfig) -> None:
    folder = train(config).folder
    (folder / "trained_on.txt").write_text("no digest\n")
    with pytest.raises(FastpeftError, match=r"trained_on\.txt is damaged"):
        evaluate(folder)
    values = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps({**values, "most_frequent_class": {"class": 3}}))
    with pytest.raises(FastpeftError, match=r"metrics\.json is damaged: most_frequent_class is"):
        evaluate(folder)


def test_the_last_lines_of_a_command_are_its_warnings(config: TrainConfig, tmp_path: Path) -> None:
    rows = [(text, "negative") for text, _ in unlike(57)] + [(text, "positive") for text, _ in unlike(3, seed=1)]
    data = str(write_csv(tmp_path / "skewed.csv", rows))
    arguments = ["--model", config.model, "--data", data, "--method", "full", "--output", config.output]
    run = ["train", *arguments, "--max-steps", "40", *SPOILING]
    shown = CliRunner().invoke(app, run)
    assert shown.exit_code == 0, shown.output
    *_, few, one, rose = shown.stdout.splitlines()
    assert few.startswith(f"Warning: {FEW.format(6)}")
    assert one.startswith("Warning: Every prediction is '")
    assert rose.startswith("Warning: The training loss ended above its start (")
    assert "Only 6 rows" not in shown.stderr, "said once"
    assert "baseline: most frequent class" in shown.stdout
    measured = CliRunner().invoke(app, ["eval", config.output, "--data", data])
    seen, *others = [line for line in measured.stdout.splitlines() if line.startswith("Warning: ")]
    assert seen.startswith("Warning: 54 of 60 rows (90 %) are in the training data: ")
    assert measured.stdout.splitlines()[-3:] == [seen, *others]
    assert "baseline: most frequent class" in measured.stdout
    assert "in the training data" not in measured.stderr


@pytest.mark.parametrize("learned", ["classes", "mlm", "causal"])
def test_cut_texts_are_told_at_the_end(tmp_path: Path, config: TrainConfig, learned: str) -> None:
    """By the files that a quiet run leaves too: nothing else says that it read the beginnings alone."""
    long = " ".join(["a lovely film"] * 9)
    rows = [(f"{long if n % 2 else 'short'} {n}", label) for n, (_, label) in enumerate(unlike(40))]
    file = str(write_csv(tmp_path / "long.csv", rows))
    objective = None if learned == "classes" else learned
    model = str(save_tiny_decoder(tmp_path / "decoder")) if learned == "causal" else config.model
    method = "head" if objective is None else "full"
    given = replace(config, data=file, model=model, method=method, objective=objective, max_length=12)
    folder = train(given).folder
    told = "20 of 40 texts (50 %) are longer than 12 tokens and were truncated"
    warnings = json.loads((folder / "metrics.json").read_text())["warnings"]
    (kept,) = [text for text in warnings if "were truncated" in text]
    assert kept.startswith(f"{told}. The model can read ")
    assert kept.endswith(" tokens: raise --max-length.")
    assert f"{told}." in evaluate(folder, file)["warnings"]
    if learned == "classes":
        predict = ["predict", str(folder), "--file", file, "--output", str(tmp_path / "said.csv")]
        said = CliRunner().invoke(app, predict)
        assert said.stderr == f"Warning: {told}.\n"
        assert "were truncated" not in CliRunner().invoke(app, ["predict", str(folder), "short"]).stderr


def test_numbers_that_stand_for_classes_are_told_at_the_end(config: TrainConfig, tmp_path: Path) -> None:
    """In the opposite sense they give figures that look right and are not."""
    numbers = [(text, int(label == "negative")) for text, label in unlike(40, seed=1)]
    file = str(write_csv(tmp_path / "numbers.csv", numbers))
    told = (
        "each is read as the index of a name: 0 as negative, 1 as positive. If they mean something else, the "
        "metrics are wrong"
    )
    said = CliRunner().invoke(app, ["eval", str(train(config).folder), "--data", file]).stdout
    assert f"Warning: {file!r} has numbers in place of names of classes; {told}" in said
    folder = tmp_path / "own"
    folder.mkdir()
    write_csv(folder / "train.csv", unlike(40))
    write_csv(folder / "dev.csv", numbers)
    warnings = train(replace(config, output=f"{config.output}-own", data=str(folder))).metrics["warnings"]
    assert [told in text for text in warnings].count(True) == 1


def test_mezo_without_a_prompt_is_told_at_both_ends(config: TrainConfig, caplog: pytest.LogCaptureFixture) -> None:
    def said(**changes: Any) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING, "fastpeft"):
            metrics = train(replace(config, **{"method": "mezo", "max_steps": 1, **changes})).metrics
        told = [text for text in metrics["warnings"] if "has no LM head" in text]
        logged = [record for record in caplog.records if "has no LM head" in record.getMessage()]
        assert [(record.name, record.getMessage()) for record in logged] == [
            (name, text) for name in ("fastpeft.mezo.trainer", "fastpeft.data.result_warnings") for text in told
        ]
        return told

    (told,) = said()
    assert told.startswith("MeZO trains RobertaForSequenceClassification, which has no LM head")
    words = {"prompt": "{text} it is <mask>", "label_words": "dull,lovely"}
    assert said(output=f"{config.output}-prompted", **words) == []
    assert said(output=f"{config.output}-head", method="head") == []
    assert said(output=f"{config.output}-later", init_from=f"{config.output}-head") == []


def test_a_tag_that_only_dev_rows_have_is_told_and_missed(config: TrainConfig, tmp_path: Path) -> None:
    folder = tmp_path / "tags"
    folder.mkdir()
    rows = tagged(40)
    write_jsonl(folder / "train.jsonl", rows)
    write_jsonl(folder / "dev.jsonl", [*rows[:9], {"tokens": ["film", "plot"], "ner_tags": ["B-new", "O"]}])
    metrics = train(replace(config, data=str(folder), method="full")).metrics
    assert "B-new" in metrics["labels"]
    assert metrics["per_class"]["B-new"]["support"] == 1
    assert any(
        text == "No training row has these tags, so the model cannot learn them: 'B-new'."
        for text in metrics["warnings"]
    )


def test_tags_of_entities_without_one_for_other_words_are_told() -> None:
    for names in (["0", "1", "2"], ["B-a", "I-a", "o"], ["B", "I", "o"]):
        (told,) = of_names(TAGGING, names)
        assert told.startswith("No tag is 'O', so word F1 and entity F1 count words outside all entities")
    for problem, names in ((TAGGING, ["B-a", "O"]), (TAGGING, ["NN", "VB"]), (CLASSIFICATION, ["0", "1"])):
        assert of_names(problem, names) == []


def test_tags_have_a_most_frequent_one_and_numbers_have_none(config: TrainConfig, tmp_path: Path) -> None:
    data = str(write_jsonl(tmp_path / "tagged.jsonl", tagged(40)))
    metrics = train(replace(config, method="lora", data=data)).metrics
    assert metrics["most_frequent_class"]["class"] == "O"
    assert metrics["most_frequent_class"]["word_f1"] == 0.0
    assert 0.5 < metrics["most_frequent_class"]["accuracy"] < 1
    assert sum(map(sum, metrics["confusion_matrix"])) == sum(tag["support"] for tag in metrics["per_class"].values())
    numbers = write_jsonl(tmp_path / "numbers.jsonl", [{"text": f"film {n}", "score": n + 0.5} for n in range(30)])
    result = train(replace(config, method="lora", data=str(numbers), output=str(tmp_path / "numbers")))
    assert not result.metrics.keys() & {"most_frequent_class", "per_class", "confusion_matrix"}
    assert result.metrics["warnings"]
