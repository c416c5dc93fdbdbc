"""The genre task says nothing of its answers, and what is measured is recorded once."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import auto_prompt as bench
from bench.harness import read_rows
from fastpeft.comparison.learning_rates import write_rows
from fastpeft.data.examples import Examples, TextData, load_data
from fastpeft.data.problems import CLASSIFICATION
from fastpeft.training.prompt_search import draw_rows


def test_a_review_that_names_one_genre_is_of_it_and_does_not_name_it() -> None:
    long = f"{'before ' * 30}cartoon{' after' * 30}"
    reviews = ["A Horror film.<br />Such horrors!", "A horror comedy.", "It wars with taste.", "Of warm love.", long]
    assert bench.genre_rows(reviews) == {
        "horror": ["A film. Such !"],
        "war": ["It with taste."],
        "animated": [("before " * 12 + "after " * 12).strip()],
    }


def test_every_part_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def measure(task: str, data: str, prompt: str, way: str, seed: int, runs: Path) -> dict[str, str]:
        asked.append((task, way, prompt))
        return {"accuracy": "0.5"}

    monkeypatch.setattr(bench, "FILE", tmp_path / "auto.csv")
    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench, "task_data", lambda *given: None)
    monkeypatch.setattr(bench, "write_rows", lambda *given: None)
    for arguments in (["--task", "genre"], []):
        monkeypatch.setattr("sys.argv", ["bench", *arguments, "--runs", str(tmp_path)])
        bench.main()
    assert len(asked) == len({*asked}) == len(read_rows(bench.FILE)) == 30


def test_the_few_rows_are_those_that_prompts_are_found_on(tmp_path: Path) -> None:
    rows = [(f"film {n}", ("good", "bad")[n % 2]) for n in range(300)]
    train, dev = (
        Examples([text for text, _ in part], [int(label == "good") for _, label in part]) for part in (rows, rows[:9])
    )
    data = TextData(train, dev, ["bad", "good"], "films", CLASSIFICATION)
    write_rows(data, tmp_path / "films")
    few = load_data(bench.few_rows(str(tmp_path / "films"), 1, tmp_path))
    chosen, ranked = draw_rows(data, 1)
    assert few.train.texts == [*chosen.texts, *ranked.texts]
    assert [few.train.labels.count(label) for label in (0, 1)] == [80, 80]
    assert few.dev.texts == dev.texts
