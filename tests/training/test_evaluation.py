"""How good a run is: on which rows, how often, and by which command."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from samples import for_one_row, points_of, reviews, save_tiny_model, write_csv, write_jsonl
from transformers import RobertaForSequenceClassification

from fastpeft import FastpeftError, TrainConfig, train
from fastpeft.training.evaluation import evaluate
from fastpeft.training.prediction import predict


def test_tags_are_measured_row_by_row_by_every_command(config: TrainConfig, tmp_path: Path) -> None:
    """Where a row ends with a tag and the next begins with it, these are two entities; and the loss is of all words,
    however many a batch has.
    """
    words = [line.split()[: 2 + number % 5] for number, (line, _) in enumerate(reviews(60))]
    rows = [{"tokens": each, "tags": ["O", *["PER"] * (len(each) - 1)][:: 1 - 2 * (len(each) % 2)]} for each in words]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    settings = {"per_device_eval_batch_size": 5}
    trained = train(replace(config, data=str(file), batch_size=4, settings=settings))
    found = evaluate(trained.folder)
    for name in ("entity_f1", "word_f1", "accuracy", "loss"):
        assert found[name] == pytest.approx(trained.metrics[name], abs=1e-5), name
    scores = json.loads((trained.folder / "row_scores.json").read_text())
    assert found["entity_f1"] == pytest.approx(sum(scores["above"]) / sum(scores["below"]))


def test_where_memory_is_not_enough_fewer_rows_are_measured_at_once(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = train(replace(config, method="full")).metrics
    forward = RobertaForSequenceClassification.forward
    alone: Any = lambda model, **batch: for_one_row(partial(forward, model))(**batch)  # noqa: E731
    monkeypatch.setattr(RobertaForSequenceClassification, "forward", alone)
    assert evaluate(config.output)["loss"] == pytest.approx(metrics["loss"], abs=1e-5)


@pytest.mark.long(but="full-settings0")
@pytest.mark.parametrize(
    ("method", "settings"), [("full", {}), ("k-lst", {"feature_modules": "transformer.decoder.block"})]
)
def test_a_model_that_gives_more_than_logits_is_measured(
    config: TrainConfig, tmp_path: Path, method: str, settings: dict[str, Any]
) -> None:
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 1}
    model = str(save_tiny_model(tmp_path / "t5", "T5", "ForConditionalGeneration", **shape))
    result = train(replace(config, model=model, method=method, settings=settings, max_steps=2))
    assert evaluate(result.folder)["loss"] == pytest.approx(result.metrics["loss"], abs=1e-5)
    assert len(predict(result.folder, ["a lovely film"])) == 1


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_run_on_a_quantised_rest_is_loaded_again(config: TrainConfig, kind: str) -> None:
    """Its file holds factors alone, from which the codes are made again."""
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
    result = train(replace(config, method="siva", max_steps=2, settings={"residual_dtype": kind}))
    assert evaluate(result.folder)["loss"] == pytest.approx(result.metrics["loss"], abs=1e-5)
    later = replace(config, method="siva", max_steps=1, init_from=str(result.folder), output=f"{config.output}-later")
    assert evaluate(train(replace(later, settings={"residual_dtype": kind})).folder)["dev_rows"] > 0


def test_a_path_is_taken_for_its_text(config: TrainConfig) -> None:
    paths: dict[str, Any] = {name: Path(getattr(config, name)) for name in ("output", "data", "model")}
    given = replace(config, **paths)
    assert given == replace(config, **{name: str(path) for name, path in paths.items()})
    result = train(replace(given, max_steps=2))
    assert evaluate(result.folder, paths["data"])["dev_rows"] > 0


def test_three_classes_from_files_with_a_dev_part(config: TrainConfig, tmp_path: Path) -> None:
    labels = ("negative", "positive", "mixed")
    folder = tmp_path / "data"
    folder.mkdir()
    write_csv(folder / "train.csv", [*reviews(30, labels), *reviews(3, ("positive",), seed=2)])
    write_csv(folder / "dev.csv", [*reviews(12, labels, seed=1), *reviews(2, ("negative",), seed=3)])
    result = train(replace(config, method="siva", data=str(folder), max_steps=3))
    assert result.metrics["labels"] == ["mixed", "negative", "positive"]
    found = evaluate(result.folder)
    assert found["dev_rows"] == 14
    for measured in (result.metrics, found):
        assert measured["most_frequent_class"]["class"] == "positive", "that of the training rows"
    assert evaluate(result.folder, str(folder / "train.csv"))["dev_rows"] == 33


@pytest.mark.long(but="('a', 'b', 'c')")
@pytest.mark.parametrize("now", [("a", "b"), ("a", "b", "c")], ids=str)
def test_a_run_is_not_measured_by_other_classes_than_it_learned(
    config: TrainConfig, tmp_path: Path, now: tuple[str, ...]
) -> None:
    file = write_csv(tmp_path / "rows.csv", [(f"a film {n}", "bc"[n % 2]) for n in range(30)])
    folder = train(replace(config, method="head", data=str(file), max_steps=1)).folder
    write_csv(file, [(f"a film {n}", now[n % len(now)]) for n in range(30)])
    with pytest.raises(FastpeftError, match=f"learned the classes b, c, but its data .* has {', '.join(now)} now"):
        evaluate(folder)


def test_a_run_on_single_texts_is_not_measured_on_pairs(config: TrainConfig, tmp_path: Path) -> None:
    file = write_csv(tmp_path / "rows.csv", reviews(30))
    folder = train(replace(config, method="head", data=str(file), max_steps=1)).folder
    write_csv(file, [(text, text, label) for text, label in reviews(30)], ("sentence1", "sentence2", "label"))
    with pytest.raises(FastpeftError, match=r"rows.csv' has pairs of texts now. Restore that data, or name rows with"):
        evaluate(folder)


def test_other_data_is_read_by_the_columns_of_the_run(
    config: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Though it has others with usual names, unless it has none of the run's own."""
    rows = [(f"text {n}", "zzz", text, label) for n, (text, label) in enumerate(reviews(30))]
    file = str(write_csv(tmp_path / "rows.csv", rows, ("text", "label", "summary", "verdict")))
    usual = str(write_csv(tmp_path / "usual.csv", reviews(30)))
    config = replace(config, method="head", data=file, max_steps=1, text_column="summary", label_column="verdict")
    folder = train(config).folder
    expected = evaluate(folder, usual)
    assert "usual.csv has no column 'summary', which the run was trained with" in caplog.text
    assert "usual.csv has no column 'verdict', which the run was trained with" in caplog.text
    caplog.clear()
    assert evaluate(folder, file) == expected
    assert "trained with" not in caplog.text
    with pytest.raises(FastpeftError, match=r"'zzz' in .*, which is not among the trained ones: negative, positive"):
        evaluate(folder, file, label_column="label")


@pytest.mark.parametrize("given", [{}, {"metric": "accuracy", "save_steps": 2}], ids=str)
def test_curves_are_of_dev_rows_alone_and_of_steps_in_order(config: TrainConfig, given: dict[str, Any]) -> None:
    result = train(replace(config, max_steps=4, **given))
    for name in ("dev accuracy", "dev loss"):
        steps = [step for step, _ in points_of(result.folder, name)]
        assert steps == sorted(set(steps)), name
        assert steps[-1] == 4
    if "metric" not in given:
        assert points_of(result.folder, "dev loss")[-1] == (4, result.metrics["loss"])


def test_the_best_checkpoint_is_chosen_by_all_dev_rows(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the sample of them that is behind a curve alone."""
    monkeypatch.setattr("fastpeft.training.trainer.CURVE_ROWS", 2)
    result = train(replace(config, metric="accuracy", save_steps=1))
    losses = dict(points_of(result.folder, "dev loss"))
    assert losses[result.metrics["best_step"]] == pytest.approx(result.metrics["loss"])


@pytest.mark.parametrize(("every", "steps"), [(3, [0, 3, 6, 8]), (0.25, [0, 2, 4, 6, 8]), (0.3, [0, 3, 6, 8])])
def test_dev_rows_are_measured_as_often_as_is_said(config: TrainConfig, every: float, steps: list[int]) -> None:
    """A share is one of all steps, as the Trainer takes it."""
    result = train(replace(config, method="head", max_steps=8, settings={"eval_steps": every}))
    assert [step for step, _ in points_of(result.folder, "dev loss")] == steps


def test_how_often_dev_rows_are_measured_changes_no_weight(config: TrainConfig, tmp_path: Path) -> None:
    """Though dropout draws while it trains."""
    model = str(save_tiny_model(tmp_path / "model", hidden_dropout_prob=0.5))
    config = replace(config, method="lora", model=model, max_steps=6)
    rarely, often = (
        train(replace(config, output=str(tmp_path / str(every)), settings={"eval_steps": every})) for every in (6, 1)
    )
    weights = [(each.folder / "adapter_model.safetensors").read_bytes() for each in (rarely, often)]
    assert weights[0] == weights[1]


def test_a_run_whose_own_rows_changed_is_measured_with_a_word_on_it(config: TrainConfig, tmp_path: Path) -> None:
    file = write_csv(tmp_path / "rows.csv", reviews(30))
    folder = train(replace(config, method="head", data=str(file), max_steps=1)).folder
    told = f"{str(file)!r} holds other rows now than when the run was trained"
    assert told not in " ".join(evaluate(folder)["warnings"])
    write_csv(file, [(text, {"positive": "negative", "negative": "positive"}[label]) for text, label in reviews(30)])
    assert told in evaluate(folder)["warnings"][0]
