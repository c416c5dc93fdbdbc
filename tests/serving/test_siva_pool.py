"""Runs of SiVA on one base are one model, and each row has the answer of its task."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from samples import WORDS, reviews, save_tiny_model, scores, tagged, write_csv, write_jsonl

from fastpeft import FastpeftError, TrainConfig, train
from fastpeft.serving.server import described
from fastpeft.serving.siva_pool import SivaPool
from fastpeft.serving.tasks import RefusedError, Tasks
from fastpeft.training.loading import load_run
from fastpeft.training.prediction import Predictor

TEXTS = [text for text, _ in reviews(6)]
CLOSE = {"rtol": 0, "atol": 1e-6}  # of float32: a mixed batch computes its products in another order


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs by SiVA: `two`, `three` and `number` fit together; each other one differs as its name says."""
    place = tmp_path_factory.mktemp("siva")
    model = save_tiny_model(place / "model")
    two = write_csv(place / "two.csv", reviews(40))
    three = write_csv(place / "three.csv", reviews(60, tuple(WORDS)))
    for name, data, given in (
        ("two", two, {}),
        ("three", three, {}),
        ("number", write_jsonl(place / "scores.jsonl", scores(40)), {}),
        ("rank", two, {"rank": 3}),
        ("layers", two, {"targets": "query"}),
        ("implicit", two, {"settings": {"residual": "implicit"}}),
        ("biases", two, {"settings": {"bias": "all"}}),
        ("base", two, {"model": str(save_tiny_model(place / "other", initializer_range=0.5))}),
        ("tags", write_jsonl(place / "tagged.jsonl", tagged(40)), {}),
    ):
        values = {"model": str(model), "max_steps": 2, "learning_rate": 0.1, "max_length": 32, "bf16": False, **given}
        train(TrainConfig(output=str(place / name), method="siva", data=str(data), **values))
    return place


def alone(run: Path, texts: list[str]) -> list[np.ndarray]:
    predictor = Predictor(run, "cpu")
    return predictor.scores([predictor.encode(text) for text in texts])


def test_rows_of_one_batch_have_the_answers_of_their_tasks(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[set[str]] = []
    call = SivaPool.__call__
    monkeypatch.setattr(SivaPool, "__call__", lambda *given: passes.append({*given[2]}) or call(*given))
    names = ("two", "three", "number")
    tasks = Tasks({name: place / name for name in names}, device="cpu")
    passes.clear()
    asked: list[tuple[str, Any]] = [("three", TEXTS[:3]), ("number", TEXTS[1:2]), ("two", TEXTS[3:]), ("three", ["a"])]
    for (name, texts), answer in zip(asked, tasks.answer(asked), strict=True):
        assert not isinstance(answer, Exception)
        for own, expected in zip(answer[1], alone(place / name, texts), strict=True):
            np.testing.assert_allclose(own, expected, **CLOSE)
    assert [len(names) for names in passes] == [3], "one pass for all"
    assert described(tasks) == ["number, three, two: one backbone for all"]


def test_what_is_held_twice_is_what_trained(place: Path) -> None:
    tasks = Tasks({"two": place / "two", "three": place / "three", "again": place / "two"}, device="cpu")
    first, *others = tasks
    assert all(each.run.loaded.model is first.run.loaded.model for each in others)
    assert len({id(each.run.loaded.tokenizer) for each in tasks}) == 1
    assert {each.predictor.run.loaded.model for each in tasks} == {first.run.loaded.model}  # type: ignore[union-attr]
    pool = first.shared.pool  # type: ignore[union-attr]
    for task in others:
        files = {tensor.untyped_storage().filename for tensor in pool.own_tensors(task.member)}
        assert len(files) == 1
        assert not Path(files.pop()).exists(), "it has no name any more"
    layers = [module for module in pool.model.modules() if hasattr(module, "siva_u0")]
    assert all(len({tensor.data_ptr() for tensor in layer.siva_u0.values()}) == 1 for layer in layers)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("rank", "was decomposed otherwise"),
        ("layers", "its adapter is in other layers"),
        ("implicit", "was decomposed otherwise"),
        ("biases", "its adapter trains biases, which all rows read"),
        ("base", "its model has another configuration: initializer_range is another"),
        ("tags", "it is a RobertaForTokenClassification, not a RobertaForSequenceClassification"),
    ],
)
def test_a_run_that_differs_is_answered_by_itself(place: Path, name: str, why: str) -> None:
    tasks = Tasks({"two": place / "two", name: place / name}, device="cpu")
    assert why in described(tasks)[1]
    texts = TEXTS[:2]
    asked = [("two", texts), (name, texts)]
    for (task, _), answer in zip(asked, tasks.answer(asked)):
        assert not isinstance(answer, Exception)
        for own, expected in zip(answer[1], alone(place / task, texts), strict=True):
            np.testing.assert_allclose(own, expected, **CLOSE)


def test_the_same_layers_with_another_weight_are_another_base(place: Path) -> None:
    first, other = (load_run(place / name, "cpu").loaded.model for name in ("two", "three"))
    pool = SivaPool(first)
    pool.add("two", first)
    with torch.no_grad():
        other.base_model.model.roberta.embeddings.word_embeddings.weight[3, 2] += 1
    with pytest.raises(FastpeftError, match=r"embeddings.word_embeddings.weight has other values"):
        pool.add("three", other)


@pytest.mark.parametrize("left", ["two", "three", "number"])
def test_tasks_come_and_go(place: Path, left: str) -> None:
    """Also the first one, in whose model the others lie."""
    names = ["two", "three", "number"]
    tasks = Tasks({name: place / name for name in names}, device="cpu")
    for name in names:
        if name != left:
            tasks.remove(name)
    ((_, found),) = tasks.answer([(left, TEXTS)])
    for own, expected in zip(found, alone(place / left, TEXTS), strict=True):
        np.testing.assert_allclose(own, expected, **CLOSE)
    gone, there = next(name for name in names if name != left), tasks[left].shared
    tasks.add(gone, place / gone)
    assert tasks[gone].shared is there
    tasks.remove(left)
    (answer,) = tasks.answer([(left, TEXTS[:1])])
    assert isinstance(answer, RefusedError)


def test_another_precision_is_another_pool(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "two", tmp_path / "half")
    file = tmp_path / "half" / "run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "bf16": True}))
    tasks = Tasks({"two": place / "two", "half": tmp_path / "half"}, device="cpu")
    assert "its precision is not that of other runs" in described(tasks)[1]
