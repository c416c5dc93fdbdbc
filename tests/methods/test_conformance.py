"""What every method promises: it trains, resumes, is measured, used, continued by another run, merged and exported."""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from new_methods import NEW
from samples import SMALL, Interrupt, weights_of
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fastpeft import FastpeftError, TrainConfig, train
from fastpeft.methods.registry import METHODS, get_method
from fastpeft.training.evaluation import evaluate
from fastpeft.training.export import export
from fastpeft.training.loading import load_run
from fastpeft.training.prediction import predict
from fastpeft.training.recipe import TrainResult
from fastpeft.training.setup import resolve

GIVEN: dict[str, dict[str, Any]] = {
    "peft:vera": {"targets": "query,value", "settings": {"projection_prng_key": 3}},
    "peft:oft": {"targets": "query,value"},
    "peft:hra": {"targets": "query,value"},
}
UNMERGED = ("k-lst", "lst", "3-lst", "prompt-tuning")
NEW_NAMES = tuple(method.name for method in NEW)
EACH = (*NEW_NAMES, *SMALL, *GIVEN)
SHORT = (*NEW_NAMES, "siva", "mezo", *GIVEN)
of_each_method = pytest.mark.parametrize("name", EACH)

Runs = Callable[[str], tuple[TrainConfig, TrainResult]]


@pytest.fixture(autouse=True)
def new_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    for method in NEW:
        monkeypatch.setitem(METHODS, method.name, method)


@pytest.fixture(scope="module")
def runs(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """The finished run of each method, made once, with what it was given."""

    @functools.cache
    def run(name: str) -> tuple[TrainConfig, TrainResult]:
        given: dict[str, Any] = {"model": str(place / "model"), "data": str(place / "reviews.csv"), "max_steps": 3}
        output = str(tmp_path_factory.mktemp("run") / "run")
        config = TrainConfig(
            output=output, method=name, learning_rate=1e-2, save_steps=1, **given, **GIVEN.get(name, {})
        )
        return config, train(config)

    yield run
    run.cache_clear()


def by_the_card(folder: Path) -> dict[str, Any]:
    """What the code in a folder's card makes."""
    names: dict[str, Any] = {}
    exec((folder / "README.md").read_text().split("```python\n")[1].split("```")[0], names)
    return names


def said(model: Any, tokenizer: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(**tokenizer("a lovely film", return_tensors="pt")).logits
    return logits


@pytest.mark.long(but=SHORT)
@of_each_method
def test_a_run_leaves_what_loads_measures_and_repeats_it(name: str, runs: Runs) -> None:
    config, result = runs(name)
    metrics, folder = result.metrics, result.folder
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert {"f1", "samples_per_second", "trainable_parameters", "seed", "command"} <= metrics.keys()
    assert metrics["versions"].keys() >= {"torch", "transformers", "peft", "fastpeft"}
    assert (metrics["steps"], metrics["train_rows"], metrics["dev_rows"]) == (3, 54, 6)
    assert metrics["peak_memory_mb"] > 0 < metrics["samples_per_second"]
    assert TrainConfig.from_file(folder / "run.json") == resolve(config).config
    files = {path.name for path in folder.iterdir()}
    assert {"curves.png", "tokenizer.json", "tokenizer_config.json"} <= files
    assert ("adapter_config.json" in files) is (get_method(name).library == "peft")
    measured = evaluate(folder)
    assert (measured["accuracy"], measured["loss"]) == (metrics["accuracy"], pytest.approx(metrics["loss"], abs=1e-4))
    assert predict(folder, ["a lovely film"])[0][0] in ("negative", "positive")
    card, loaded, run = (folder / "README.md").read_text(), by_the_card(folder), load_run(folder).loaded
    assert f"- Method: {get_method(name).title}\n" in card
    assert all(part in card for part in ("reviews.csv", "negative, positive"))
    assert loaded["model"].config.id2label == {0: "negative", 1: "positive"}
    # to the order of additions: a finished run is loaded with packed weights, the card's model without
    expected = said(run.model.cpu(), run.tokenizer)
    torch.testing.assert_close(said(loaded["model"], loaded["tokenizer"]), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.long(but=SHORT)
@of_each_method
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(name: str, runs: Runs, tmp_path: Path) -> None:
    config, whole = runs(name)
    again = replace(config, output=str(tmp_path / "again"))
    with pytest.raises(KeyboardInterrupt):
        train(again, callbacks=[Interrupt(2)])
    resumed = train(again, resume=True)
    before, after = weights_of(whole.folder), weights_of(resumed.folder)
    assert before.keys() == after.keys()
    assert [each for each in before if not torch.equal(before[each], after[each])] == []
    assert resumed.metrics["loss"] == whole.metrics["loss"]


@pytest.mark.long(but=SHORT)
@of_each_method
def test_another_run_starts_from_it(name: str, runs: Runs, tmp_path: Path) -> None:
    config, first = runs(name)
    later = replace(config, output=str(tmp_path / "later"), init_from=str(first.folder))
    if name == "prompt-tuning":
        with pytest.raises(FastpeftError, match="no other run starts"):
            train(later)
    else:
        assert math.isfinite(train(later).metrics["loss"])


@pytest.mark.long(but=SHORT)
@of_each_method
def test_it_becomes_a_plain_model_or_says_why_not(name: str, runs: Runs, tmp_path: Path) -> None:
    _, done = runs(name)
    if name in UNMERGED:
        with pytest.raises(
            FastpeftError, match=rf"trained a side network \({METHODS[name].title}\)|cannot become a part"
        ):
            export(done.folder, tmp_path / "model")
        assert not (tmp_path / "model").exists()
        return
    folder = export(done.folder, tmp_path / "model")
    model, run = AutoModelForSequenceClassification.from_pretrained(folder), load_run(done.folder).loaded
    expected = said(run.model.cpu(), run.tokenizer)
    torch.testing.assert_close(said(model, AutoTokenizer.from_pretrained(folder)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NEW_NAMES)
def test_mezo_trains_over_it(name: str, config: TrainConfig) -> None:
    result = train(replace(config, method="mezo", settings={"over": name}))
    assert f"MeZO over {METHODS[name].title}" in (result.folder / "README.md").read_text()


@pytest.mark.long
def test_all_are_compared(place: Path, tmp_path: Path) -> None:
    """The processes of a comparison know them by what Python itself imports first."""
    (tmp_path / "sitecustomize.py").write_text(
        "from new_methods import NEW\n"
        "from fastpeft.methods.registry import METHODS\n"
        "METHODS.update({method.name: method for method in NEW})\n"
    )
    names = ",".join(method.name for method in NEW)
    command = [sys.executable, "-m", "fastpeft", "compare", "--methods", names, "--output", str(tmp_path / "out")]
    command += ["--model", str(place / "model"), "--data", str(place / "reviews.csv"), "--max-steps", "1"]
    paths = [str(tmp_path), str(Path(__file__).parents[1]), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert all(method.title in (tmp_path / "out" / "report.md").read_text() for method in NEW)
