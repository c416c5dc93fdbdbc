"""A method that somebody adds to the registry: everything that is done with a run goes with it at once."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from new_methods import NEW
from safetensors.torch import load_file
from samples import Interrupt
from transformers import AutoModelForSequenceClassification

from fastpeft import FastpeftError, TrainConfig, train
from fastpeft.methods.method import Method
from fastpeft.methods.registry import METHODS
from fastpeft.methods.side_network import SideNetworkMethod
from fastpeft.training.evaluation import evaluate
from fastpeft.training.export import export
from fastpeft.training.prediction import predict


@pytest.fixture(params=NEW, ids=lambda method: method.name)
def method(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Method:
    added: Method = request.param
    monkeypatch.setitem(METHODS, added.name, added)
    return added


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*model.safetensors")
    return load_file(file)


def test_it_trains_resumes_is_measured_and_used(method: Method, config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, method=method.name, save_steps=1)
    with pytest.raises(KeyboardInterrupt):
        train(config, callbacks=[Interrupt(2)])
    resumed = train(config, resume=True)
    whole = train(replace(config, output=str(tmp_path / "whole")))
    before, after = weights(whole.folder), weights(resumed.folder)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert evaluate(whole.folder)["accuracy"] == whole.metrics["accuracy"]
    (prediction,) = predict(whole.folder, ["a lovely film"])
    assert prediction[0] in ("negative", "positive")
    card = (whole.folder / "README.md").read_text()
    assert f"- Method: {method.title}\n" in card
    loaded: dict[str, object] = {}
    exec(card.split("```python\n")[1].split("```")[0], loaded)
    assert isinstance(loaded["model"], torch.nn.Module)


def test_another_run_starts_from_it(method: Method, config: TrainConfig, tmp_path: Path) -> None:
    first = train(replace(config, method=method.name))
    later = replace(config, method=method.name, output=str(tmp_path / "later"), init_from=str(first.folder))
    assert train(later).metrics["steps"] == 3


def test_it_is_exported(method: Method, config: TrainConfig, tmp_path: Path) -> None:
    run = train(replace(config, method=method.name)).folder
    if isinstance(method, SideNetworkMethod):
        with pytest.raises(FastpeftError, match=f"trained a side network \\({method.title}\\)"):
            export(run, tmp_path / "model")
    else:
        AutoModelForSequenceClassification.from_pretrained(export(run, tmp_path / "model"))


def test_mezo_trains_over_it(method: Method, config: TrainConfig) -> None:
    result = train(replace(config, method="mezo", settings={"over": method.name}))
    assert f"MeZO over {method.title}" in (result.folder / "README.md").read_text()


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
