"""The cells of what masked words, learned first, give a side network."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import ladder_pretraining
from bench.harness import read_rows
from fastpeft.data.examples import load_data


def test_words_are_of_other_texts_than_the_labels(tmp_path: Path) -> None:
    ladder_pretraining.write_texts(tmp_path)
    labelled = load_data(str(tmp_path / "slice"))
    assert (len(labelled.train), len(labelled.dev)) == (2_000, 1_000)
    with (tmp_path / "texts" / "train.csv").open(encoding="utf-8", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    assert len(texts) > 4_000
    assert not {*texts} & {*labelled.train.texts, *labelled.dev.texts}


def test_a_cell_starts_from_the_one_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[SimpleNamespace] = []

    def train(config: SimpleNamespace, resume: bool) -> Any:
        assert resume
        trained.append(config)
        return SimpleNamespace(metrics={"accuracy": 0.7, "trainable_parameters": 5, "peak_memory_mb": 1.5})

    monkeypatch.setattr(ladder_pretraining, "train", train)
    monkeypatch.setattr(ladder_pretraining, "TrainConfig", SimpleNamespace)  # the real one looks for the run before
    monkeypatch.setattr(ladder_pretraining, "FILE", tmp_path / "table.csv")
    for cell in ladder_pretraining.CELLS:
        ladder_pretraining.run(tmp_path, cell, seed=0, epochs=1)
    outputs = [config.output for config in trained]
    for config in trained:
        assert config.init_from is None or config.init_from in outputs[: outputs.index(config.output)]
    rows = read_rows(tmp_path / "table.csv")
    assert [row["cell"] for row in rows] == list(ladder_pretraining.CELLS)
    assert {row["accuracy"] for row in rows} == {"0.7"}
