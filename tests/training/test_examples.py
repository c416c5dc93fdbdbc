"""Runs of side networks whose decoder reads some training rows in front of every text."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from samples import PROMPT, Interrupt, reviews, save_tiny_model, write_csv, write_jsonl
from transformers import AutoTokenizer

from fastpeft import FastpeftError, TrainConfig, train
from fastpeft.data.next_words import encode_counted
from fastpeft.training.evaluation import evaluate
from fastpeft.training.generation import generate
from fastpeft.training.task import Task, data_for

COUNT = 2


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    save_tiny_model(folder / "model", "Llama", "ForCausalLM")
    pairs = [{"prompt": text.split()[0], "completion": " ".join(text.split()[1:4])} for text, _ in reviews(60)]
    write_jsonl(folder / "pairs.jsonl", pairs)
    return folder


@pytest.fixture
def config(config: TrainConfig, place: Path) -> TrainConfig:
    data, settings = str(place / "pairs.jsonl"), {"examples": COUNT}
    return replace(config, method="lst", objective="causal", data=data, batch_size=8, max_steps=4, settings=settings)


def test_rows_become_examples_and_the_run_is_used_with_them(config: TrainConfig) -> None:
    result = train(config)
    context = json.loads((result.folder / "config.json").read_text())["context"]
    data, tokenizer = data_for(config), AutoTokenizer.from_pretrained(config.model)
    rows = [row["input_ids"] for row in encode_counted(tokenizer, data.train.texts, 38)[0]]
    assert any(context == [*one, *other] for one in rows for other in rows if one is not other)
    assert result.metrics["train_rows"] == len(data.train) - COUNT
    assert result.metrics["max_length"] == 38 - len(context)
    assert evaluate(result.folder)["loss"] == pytest.approx(result.metrics["loss"], rel=1e-5)
    assert len(generate(result.folder, ["film"], 3)) == 1
    with pytest.raises(FastpeftError, match=f"must be from 1 to {37 - len(context)}"):
        generate(result.folder, ["film"], 38 - len(context))


def test_another_seed_draws_other_examples(config: TrainConfig) -> None:
    first, again, other = (Task.load(replace(config, seed=seed)).model.config.context for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize("settings", [{}, {"over": "lst"}], ids=["lst", "mezo"])
def test_resumed_to_the_same_bits(config: TrainConfig, tmp_path: Path, settings: dict[str, Any]) -> None:
    method = "mezo" if settings else "lst"
    config = replace(config, method=method, save_steps=2, settings={**config.settings, **settings})
    whole = train(replace(config, output=str(tmp_path / "whole")))
    with pytest.raises(KeyboardInterrupt):
        train(config, callbacks=[Interrupt(3)])
    resumed = train(config, resume=True)
    for name in ("model.safetensors", "config.json"):
        assert (resumed.folder / name).read_bytes() == (whole.folder / name).read_bytes()


def test_a_later_run_keeps_the_examples_of_the_one_that_it_starts_from(config: TrainConfig, tmp_path: Path) -> None:
    first = train(config)
    for settings in ({}, {"examples": 1}):
        later = replace(config, output=str(tmp_path / f"later-{len(settings)}"), init_from=str(first.folder), seed=3)
        context = [
            json.loads((folder / "config.json").read_text())["context"]
            for folder in (first.folder, train(replace(later, settings=settings)).folder)
        ]
        assert context[0] == context[1]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"settings": {"examples": 0}}, "examples is 0; it must be a whole number from 1"),
        ({"settings": {"examples": 54}}, "examples is 54, but there are 54 rows to train on"),
        ({"settings": {"examples": 20}}, r"the examples have \d+ tokens, and texts up to \d+ after them, but the"),
        ({"method": "siva"}, "unknown setting 'examples'"),
    ],
)
def test_what_is_refused(config: TrainConfig, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(FastpeftError, match=told):
        train(replace(config, **changes))
    assert not Path(config.output).exists()


def test_they_are_of_next_words(config: TrainConfig, tmp_path: Path) -> None:
    model, data = save_tiny_model(tmp_path / "encoder"), write_csv(tmp_path / "reviews.csv", reviews(20))
    labelled = replace(config, objective=None, model=str(model), data=str(data))
    for prompt in ({}, PROMPT):
        with pytest.raises(FastpeftError, match=r"examples is 2, which is of a decoder .* but the data has classes"):
            train(replace(labelled, **prompt))
