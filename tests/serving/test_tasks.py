"""Runs that share a backbone, and runs beside them, say what `predict` says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from samples import reviews

from fastpeft import FastpeftError, LadderPool
from fastpeft.serving.server import described
from fastpeft.serving.tasks import EncodedRequest, RefusedError, Shared, Tasks, parse_runs
from fastpeft.support.stages import listening
from fastpeft.training.prediction import Predictor

TEXTS = [text for text, _ in reviews(7)]
PAIRS = [[text, "a dull film"] for text in TEXTS[:3]]
ASKED: list[tuple[str, list[Any]]] = [
    ("a", TEXTS[:3]),
    ("words", TEXTS[3:5]),
    ("pairs", PAIRS),
    ("b", TEXTS[2:6]),
    ("number", TEXTS[:2]),
    ("mood", TEXTS[4:]),
    ("alone", TEXTS[:1]),
    ("a", TEXTS[5:]),
]
CLOSE = {"rtol": 0, "atol": 1e-6}  # of numbers of about 1 in float32: a batch pads more than a row alone


@pytest.fixture(scope="module")
def expected(runs: Path) -> list[list[np.ndarray]]:
    """The scores of what is `ASKED`, each run by itself."""
    known = {name: Predictor(runs / name) for name, _ in ASKED}
    return [known[name].scores([known[name].encode(text) for text in texts]) for name, texts in ASKED]


@pytest.fixture
def tasks(runs: Path) -> Tasks:
    return Tasks({name: runs / name for name, _ in ASKED}, max_rows=4)


def test_one_batch_over_tasks_has_the_answers_of_each(
    tasks: Tasks, expected: list[list[np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    shared: list[set[str]] = []  # the tasks of every pass
    call = LadderPool.__call__
    monkeypatch.setattr(
        LadderPool,
        "__call__",
        lambda pool, batch, names: (
            shared.append({name.partition(" ")[0] for name in names}),
            call(pool, batch, names),
        )[1],
    )
    answers = tasks.answer(ASKED)
    for (name, texts), answer, scores in zip(ASKED, answers, expected):
        assert not isinstance(answer, Exception)
        assert answer[0].task.name == name
        assert len(answer[1]) == len(texts)
        for own, other in zip(answer[1], scores):
            np.testing.assert_allclose(own, other, **CLOSE)
    assert set().union(*shared) == {"a", "b", "words", "mood", "alone"}
    assert max(map(len, shared)) > 1


def test_words_keep_their_tags_where_a_tokenizer_pads_on_the_left(runs: Path) -> None:
    tasks, texts = Tasks({"words": runs / "words"}), ["film", TEXTS[0]]
    (expected,) = tasks.answer([("words", texts)])
    shared = tasks["words"].shared
    assert shared is not None
    shared.tokenizer.padding_side = "left"
    (padded,) = tasks.answer([("words", texts)])
    for own, other in zip(padded[1], expected[1], strict=True):
        np.testing.assert_allclose(own, other, **CLOSE)


def test_it_is_told_what_shares_a_backbone_and_what_does_not(tasks: Tasks) -> None:
    assert described(tasks)[0] == "a, b, mood, words: one backbone for all"
    rest = {line.partition(":")[0]: line for line in described(tasks)[1:]}
    assert "stands on another backbone" in rest["alone"]
    assert rest["pairs"] == "pairs: a model of its own"
    assert "head has no side network" in rest["number"]


def in_bfloat16(run: Path, folder: Path, **others: Any) -> Path:
    """A copy of a run that computes in bfloat16."""
    shutil.copytree(run, folder)
    file = folder / "run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "bf16": True, **others}))
    return folder


def test_it_is_told_that_a_run_computes_in_another_precision(runs: Path, tmp_path: Path) -> None:
    tasks = Tasks({"a": runs / "a", "half": in_bfloat16(runs / "a", tmp_path / "half")})
    assert described(tasks)[1] == "half: a model of its own (its precision is not that of other runs)"
    (_, [whole]), (_, [half]) = tasks.answer([(name, TEXTS[:1]) for name in ("a", "half")])
    assert not np.array_equal(whole, half), "the same weights, but for the precision"
    np.testing.assert_allclose(whole, half, atol=0.01)


def test_weights_of_another_dtype_are_not_shared(runs: Path, tmp_path: Path) -> None:
    kept = in_bfloat16(runs / "a", tmp_path / "kept", dtype="bfloat16")
    tasks = Tasks({"half": in_bfloat16(runs / "a", tmp_path / "half"), "kept": kept})
    assert "its dtype of weights is not that of other runs" in described(tasks)[1]


def test_what_differs_from_the_most_alike_run_is_told(runs: Path, tmp_path: Path) -> None:
    half = in_bfloat16(runs / "b", tmp_path / "half")
    tasks = Tasks({"a": runs / "a", "half": half, "alone": runs / "alone"})
    assert "stands on another backbone" in described(tasks)[2]


def test_a_text_that_is_refused_leaves_the_others_of_its_batch(tasks: Tasks) -> None:
    first, refused, gone, last = tasks.answer(
        [("a", TEXTS[:1]), ("words", [TEXTS[0], "a " * 50]), ("x", ["a"]), ASKED[3]]
    )
    assert isinstance(first, tuple)
    assert isinstance(last, tuple)
    assert isinstance(refused, RefusedError)
    assert refused.status == 422
    assert "text 2: of the 50 words" in str(refused)
    assert isinstance(gone, RefusedError)
    assert (gone.status, "no task 'x'" in str(gone)) == (404, True)


def test_a_task_that_went_after_its_request_was_read_leaves_the_others(
    tasks: Tasks, expected: list[list[np.ndarray]]
) -> None:
    shared = tasks["b"].shared
    assert shared is not None
    shared.pool.remove(tasks["b"].member)
    there, gone = tasks.answer([ASKED[0], ASKED[3]])
    assert isinstance(gone, FastpeftError)
    assert not isinstance(there, Exception)
    np.testing.assert_allclose(there[1], expected[0], **CLOSE)


def test_tasks_come_and_go(runs: Path, expected: list[list[np.ndarray]]) -> None:
    tasks = Tasks({"a": runs / "a"})
    tasks.add("b", runs / "b")
    assert tasks.beside(tasks["b"]) == ["a"]
    tasks.remove("a")
    (answer,) = tasks.answer([ASKED[3]])
    assert not isinstance(answer, Exception)
    for own, other in zip(answer[1], expected[3]):
        np.testing.assert_allclose(own, other, **CLOSE)
    for name, status in (("b", 409), ("x", 404)):
        with pytest.raises(RefusedError) as error:
            tasks.add(name, runs / "a") if status == 409 else tasks.remove(name)
        assert error.value.status == status


def test_what_was_read_for_a_task_is_not_answered_by_one_that_replaced_it(runs: Path) -> None:
    tasks = Tasks({"a": runs / "a", "b": runs / "b"})
    held = EncodedRequest(tasks["b"], [tasks["b"].predictor.encode(TEXTS[0])])
    tasks.remove("b")
    tasks.add("b", runs / "mood")
    assert tasks.beside(tasks["a"]) == ["b"]
    there, gone = tasks._answers([EncodedRequest(tasks["b"], [tasks["b"].predictor.encode(TEXTS[0])]), held])
    assert isinstance(there, list)
    assert isinstance(gone, RefusedError)
    assert (gone.status, "no task 'b' any more" in str(gone)) == (404, True)


def test_one_request_that_cannot_be_read_fails_alone(tasks: Tasks, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = Predictor.encode

    def failing(predictor: Predictor, text: Any) -> Any:
        if text == "bad":
            raise RuntimeError("the tokenizer failed")
        return encode(predictor, text)

    monkeypatch.setattr(Predictor, "encode", failing)
    failed, there = tasks.answer([("a", ["bad"]), ("a", TEXTS[:1])])
    assert isinstance(failed, RuntimeError)
    assert isinstance(there, tuple)


def test_where_memory_is_not_enough_fewer_texts_are_answered_at_once(
    tasks: Tasks, expected: list[list[np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = Shared.scores

    def failing(shared: Shared, rows: Any) -> Any:
        if len(rows) > 1 or rows[0][0].name == "b":
            raise MemoryError
        return scores(shared, rows)

    monkeypatch.setattr(Shared, "scores", failing)
    (_, found), refused = tasks.answer([ASKED[0], ASKED[3]])
    for own, other in zip(found, expected[0]):
        np.testing.assert_allclose(own, other, **CLOSE)
    assert isinstance(refused, RefusedError)
    assert (refused.status, "memory is not enough" in str(refused)) == (503, True)


def test_each_run_is_reported_as_it_loads(runs: Path) -> None:
    stages: list[str] = []
    with listening(lambda stage, *_: stages.append(stage)):
        Tasks({"a": runs / "a", "two": runs / "b"})
    assert [stage for stage in stages if stage in ("loading a", "loading two")] == ["loading a", "loading two"]


def test_a_run_that_cannot_answer_is_not_there(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "b", tmp_path / "b")
    file = tmp_path / "b" / "model.safetensors"
    weights = load_file(file)
    weights = {name: value.fill_(3e38) if value.is_floating_point() else value for name, value in weights.items()}
    save_file(weights, file, {"format": "pt"})
    tasks = Tasks({"a": runs / "a"})
    with pytest.raises(FastpeftError, match="not finite"):
        tasks.add("b", tmp_path / "b")
    assert [task.name for task in tasks] == ["a"]
    tasks.add("b", runs / "b")
    assert tasks.beside(tasks["b"]) == ["a"]


def test_texts_are_cut_earlier_but_never_later(runs: Path) -> None:
    assert [Tasks({"a": runs / "a"}, max_length=n)["a"].predictor.run.max_length for n in (8, 99)] == [8, 32]
    for name, special in (("a", 2), ("pairs", 4)):
        with pytest.raises(FastpeftError, match=f"reads {special} special tokens .* Give {special + 1} or more"):
            Predictor(runs / name, max_length=special)
        with pytest.raises(FastpeftError, match=r"max_length is '9'; it must be a whole number\."):
            Predictor(runs / name, max_length="9")  # type: ignore[arg-type]
        one = Predictor(runs / name, max_length=special + 1)
        assert len(one.encode(TEXTS[0] if name == "a" else PAIRS[0]).row["input_ids"]) == special + 1


def test_names_of_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x=y").mkdir()
    assert parse_runs(["runs/one", "two=runs/one", "z=x=y", "./three/"]) == {
        "one": "runs/one",
        "two": "runs/one",
        "z": "x=y",
        "three": "./three/",
    }
    for items, message in (
        (["=a"], "'=a' does not name a task"),
        (["a="], "'a=' does not name a task"),
        (["a/b=c"], "'a/b=c' does not name a task"),
        (["x=y"], "'x=y' does not name a task"),
        (["one/a", "two/a"], "'one/a' and 'two/a' would both be the task 'a'"),
    ):
        with pytest.raises(FastpeftError, match=message):
            parse_runs(items)
