"""Points of a curve are what the run measured, at the forward passes that it had made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from samples import reviews, save_tiny_model, write_csv

from bench.harness import read_rows
from bench.mezo_fzoo import Curve, Points
from fastpeft import FastpeftError, train
from fastpeft.prompts.named import NAMED_PROMPTS
from fastpeft.prompts.template import Prompt


@pytest.mark.long(but="fzoo-3-4")
@pytest.mark.parametrize(("estimator", "directions", "forwards"), [("spsa", 1, 2), ("fzoo", 3, 4)])
def test_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, estimator: str, directions: int, forwards: int
) -> None:
    words = Prompt("{text} the film is <mask>", {"negative": "awful", "positive": "lovely"})  # which the model knows
    monkeypatch.setitem(NAMED_PROMPTS, "SST-2", words)  # type: ignore[arg-type]
    model = str(save_tiny_model(tmp_path / "model"))
    data = str(write_csv(tmp_path / "reviews.csv", reviews(40)))
    curve, file = Curve(estimator, directions, 1e-3, model), tmp_path / "table.csv"
    config = curve.config(data, tmp_path, forwards=6 * forwards, points=3)
    folder = train(config, callbacks=[Points(curve, file)]).folder
    rows = read_rows(file)
    assert [(row["step"], row["forwards"]) for row in rows] == [(str(2 * i), str(2 * i * forwards)) for i in range(4)]
    log = json.loads((folder / "checkpoints" / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    losses = [f"{entry['eval_loss']:.4f}" for entry in log if "eval_loss" in entry]
    assert [row["loss"] for row in rows[1:]] == losses
    train(config, overwrite=True, callbacks=[Points(curve, file)])
    assert read_rows(file) == rows, "the same points, in their places"


def test_an_unknown_estimator_is_refused() -> None:
    with pytest.raises(FastpeftError, match="estimator is 'adam'"):
        _ = Curve("adam", 1, 1e-3).forwards
