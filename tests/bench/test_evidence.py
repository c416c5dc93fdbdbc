"""What is kept of finished cells brings a comparison back, on another machine too."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
from samples import reviews, save_tiny_decoder, save_tiny_model

from bench import evidence
from fastpeft.data.examples import load_data
from fastpeft.support.files import read_json

METHODS = ["head", "lst:init_from=head"]


def _table(file: Path, column: str, rows: int) -> None:
    lines = [f"{text}\t{int(label == 'positive')}" for text, label in reviews(rows)]
    file.write_text("\n".join([f"{column}\tlabel", *lines]) + "\n")


def test_what_is_kept_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "trec"
    source.mkdir()
    _table(source / "train.tsv", "text", 48)
    _table(source / "test.tsv", "text", 12)
    monkeypatch.setitem(evidence.TASKS, "trec", evidence.Evidence(evidence.trec, {"methods": METHODS}, {"epochs": 1}))
    model = save_tiny_model(tmp_path / "model")

    def gather(folder: str, seeds: int) -> list[dict[str, str]]:
        evidence.gather("trec", str(model), source, tmp_path / folder, seeds, tmp_path / "kept", tmp_path / "pages")
        with (tmp_path / folder / "trec" / "comparison" / "results.csv").open(newline="") as file:
            return [{name: row[name] for name in row.keys() - {"data", "command"}} for row in csv.DictReader(file)]

    first = gather("one", 1)
    assert [row["seed"] for row in first] == ["0", "0"]
    published = tmp_path / "pages" / "base-trec"
    kept = sorted((tmp_path / "kept" / "trec").iterdir())
    assert len(kept) == 2
    for file in (*kept, published / "report.md", published / "results.csv"):
        assert str(tmp_path) not in file.read_text(), "no local path"
    assert [*(published / "figures").iterdir()]
    monkeypatch.setattr("fastpeft.comparison.run.Comparison._start", None)  # nothing may be run
    assert gather("another", 1) == first
    assert (tmp_path / "another" / "trec" / "comparison" / "report.md").is_file()
    places = {"model": str(save_tiny_model(tmp_path / "other", intermediate_size=24)), "data": str(tmp_path)}
    evidence.restore(tmp_path / "kept" / "trec", tmp_path / "third", places)
    assert not (tmp_path / "third").exists(), "another model's cells"


def test_rows_of_each_task(tmp_path: Path) -> None:
    for part, rows in (("train", 30), ("dev", 4), ("test", 5)):
        _table(tmp_path / f"{part}.tsv", "sentence", rows)
        words = "\n\n".join("a\tO\nb c\tB-person" for _ in range(rows))
        (tmp_path / f"{part}.conll").write_text(f"{words}\n\n")
    for task, measured in (("sst2", 9), ("wnut17", 5)):
        folder = tmp_path / task
        folder.mkdir()
        evidence.TASKS[task].rows(tmp_path, folder)
        found = load_data(str(folder))
        assert (len(found.train), len(found.dev)) == (30, measured)
    assert found.dev.texts[0] == ["a", "b c"]
    _meanings(tmp_path)
    (tmp_path / "e2e").mkdir()
    evidence.e2e(tmp_path, tmp_path / "e2e")
    found = load_data(str(tmp_path / "e2e"), problem_type="next_words")
    assert (len(found.train), len(found.dev)) == (28, 2), "no meaning is in both parts"
    assert found.train.texts[0] == ("meaning 0\n", "it is said 0 .")


def test_masked_words_are_learned_from_phrases_once(tmp_path: Path) -> None:
    _table(tmp_path / "train.tsv", "sentence", 64)
    _table(tmp_path / "dev.tsv", "sentence", 4)
    model = str(save_tiny_model(tmp_path / "model"))
    (tmp_path / "task").mkdir()
    start = evidence.TASKS["sst2-mezo"].start
    run = start(model, tmp_path, tmp_path / "task")
    found = read_json(run / "metrics.json")
    assert found["problem_type"] == "masked_words"
    assert found["train_rows"] + found["dev_rows"] == 64
    made = (run / "metrics.json").stat().st_mtime_ns
    assert start(model, tmp_path, tmp_path / "task") == run
    assert (run / "metrics.json").stat().st_mtime_ns == made


def _meanings(folder: Path) -> None:
    for part, rows in (("valid", 30), ("test", 4)):
        lines = [f"meaning {row // 2}||it is said {row} . \n" for row in range(rows)]
        (folder / f"{part}.txt").write_text("".join(lines))


def test_a_decoder_is_asked_all_of_the_test_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _meanings(tmp_path)
    monkeypatch.setitem(evidence.TASKS, "e2e", replace(evidence.TASKS["e2e"], given={"methods": ["lst"]}))
    model = save_tiny_decoder(tmp_path / "model")
    evidence.gather(
        "e2e", str(model), tmp_path, tmp_path / "one", 1, tmp_path / "kept", tmp_path / "pages", max_steps=2
    )
    (kept,) = (tmp_path / "kept" / "e2e").iterdir()
    measured = read_json(kept)["test"]
    assert measured["prompts"] == 2
    assert 0 <= measured["bleu"] <= 100
    assert measured["general_loss"] == pytest.approx(measured["general_loss_before"], rel=0.2)
    assert measured["general_loss"] != measured["general_loss_before"]
